# %% [markdown]
# # 08 · PPO: a value for every prefix, and several updates from one rollout
#
# **You will hold** the five functions of PPO (token rewards, advantages, whitening, two losses), proved equal to the project's; a critic
# whose opinion of every prefix you can compare with the truth; and a training run that reaches a policy known in advance.
#
# **Minutes:** 45 to read, about 35 seconds of CPU to run. **You need:** tutorial 07 (policy gradient, baseline, the KL in the detached
# reward).
#
# Lines marked `# watch: name (shape)` are good places for a breakpoint. `B` completions, `T` tokens, `C` completions that exist at
# all, `P` parameters.

# %%
import copy
import sys
from pathlib import Path

# The project is not installed, it runs from its checkout: find the folder above this file (or above the notebook) that holds it.
ROOT = next(folder for folder in Path(globals().get("__file__", "here")).resolve().parents if (folder / "minialign").is_dir())
sys.path.insert(0, str(ROOT))

import matplotlib
import torch

from minialign.batch import whiten
from minialign.logps import token_logps
from minialign.methods import ppo, rloo
from minialign.sample import sample
from toy import closed_form
from toy.tiny_language import Language, tiny_gpt

IN_NOTEBOOK = "ipykernel" in sys.modules
matplotlib.use("module://matplotlib_inline.backend_inline" if IN_NOTEBOOK else "Agg")  # a script draws into a file, without a screen
import matplotlib.pyplot as plt

# %% [markdown]
# ## The question
#
# Tutorial 07 gave all tokens of a completion the same advantage, and threw every completion away after one update. Two wishes:
#
# 1. A completion has many tokens and one reward. Which token was it?
# 2. Sampling is slow. Can one rollout pay for several updates?
#
# PPO answers the first with a **critic**, a second network that says what a prefix is worth, and the second with a **clip**, which stops
# pushing a token once its probability has moved far enough.
#
# ## The equation
#
# $$L(\theta) = -\mathbb{E}_t \Big[ \min\big( \rho_t A_t,\; \mathrm{clip}(\rho_t, 1 - \varepsilon, 1 + \varepsilon)\, A_t \big) \Big],
# \qquad \rho_t = \frac{\pi_\theta(y_t \mid x, y_{<t})}{\pi_\mathrm{old}(y_t \mid x, y_{<t})} ,$$
#
# $$A_t = \sum_{l \ge 0} (\gamma\lambda)^l \, \delta_{t+l}, \qquad \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad V_t = V(x, y_{<t}) .$$
#
# $\delta_t$ is the surprise of one token: what it paid, plus what the next prefix is worth, minus what this prefix was worth.

# %% [markdown]
# ## The MDP, drawn once
#
# A *Markov decision process* has states, actions, rewards. Here a state is a prefix, an action is the next token, and the next state is
# the prefix with the token appended: no dice but the policy's own. The reward of the completion comes with its last token. The
# KL penalty comes with every token: $-\beta k_1 = -\beta (\log\pi - \log\mathrm{ref})$, a number, not differentiated.
#
# First the numbers alone: three tokens, $\beta = 0.05$, and the completion earns 1.


# %%
def my_shape_rewards(scores, logps, ref_logps, mask, beta):
    """scores (B,), the rest (B, T) -> the reward of each token (B, T)."""
    token_rewards = torch.where(mask, -beta * (logps - ref_logps), 0)
    for b in range(len(scores)):
        last = mask[b].nonzero().max()  # the last real token: EOS, or where the completion was cut off
        token_rewards[b, last] += scores[b]
    return token_rewards.detach()


three = torch.ones(1, 3, dtype=torch.bool)
hand = my_shape_rewards(torch.tensor([1.0]), torch.tensor([[-1, -2, -0.5]]), torch.tensor([[-1.2, -1.5, -0.7]]), three, beta=0.05)
print("token rewards", hand.numpy().round(6))
torch.testing.assert_close(hand, torch.tensor([[-0.01, 0.025, 0.99]]))

# %% [markdown]
# Then one row of a language. It has four letters and EOS (`⏎`), and a completion has at most three tokens: 85 completions, 21 prefixes.
# Policy and reference are two different tiny GPTs, as if training had gone on for a while. Because everything can be enumerated,
# the true value of each prefix is known: the average of what is still to come.

# %%
BETA = 0.5
language = Language(n_content=4, max_new=3, n_prompts=2)
EOS, mask = language.eos_id, language.mask  # watch: mask (C, T)
policy, ref = (tiny_gpt(language.vocab_size, seed=seed, mixing=0.3) for seed in (0, 1))
logps = language.token_logps(policy)  # (2, C, T): of every completion of both prompts; autograd flows
ref_logps = language.token_logps(ref).detach()
law = logps.detach().sum(-1).exp()  # watch: law (2, C)
token_rewards = torch.stack([my_shape_rewards(language.rewards[n], logps[n], ref_logps[n], mask, BETA) for n in range(2)])
exact_V = torch.stack([language.exact_values(law[n], token_rewards[n]) for n in range(2)])  # (2, C, T)


def text(ids):
    return " ".join("⏎" if i == EOS else "abcd"[i] for i in ids)


y = language.index[(0, 1, EOS)]
print("t   state    action   −β·k1    score   reward r_t   to come   V(state)")
for t in range(3):
    r, to_come = token_rewards[0, y, t].item(), token_rewards[0, y, t:].sum().item()
    penalty = -BETA * (logps[0, y, t] - ref_logps[0, y, t]).item()
    print(f"{t}   {text([0, *language.completions[y][:t]]):9}{text([language.completions[y][t]]):7}{penalty:8.3f}{r - penalty:9.3f}"
          f"{r:11.3f}{to_come:11.3f}{exact_V[0, y, t]:10.3f}")

objective = ((law * language.rewards).sum(1) - BETA * torch.tensor([closed_form.kl(law[n], ref_logps[n].sum(1).exp()) for n in range(2)]))
print(f"J = E[r] − β·KL(π ‖ ref) = {objective[0]:.6f};   V(prompt) = {exact_V[0, 0, 0]:.6f}")
torch.testing.assert_close(exact_V[:, 0, 0], objective)  # the value of the prompt alone is the objective

# %% [markdown]
# ## Ratio and clip
#
# One token, $\varepsilon = 0.2$. The objective is $\min(\rho A, \mathrm{clip}(\rho) A)$; its slope says whether this token still pushes.


# %%
def my_policy_loss(logps, old_logps, advantages, mask, eps):
    """All (B, T) -> the mean over the tokens of the mask."""
    ratio = (logps - old_logps).exp()  # watch: ratio (B, T)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    return -objective[mask].mean()


def clipped_objective(ratio, advantage, eps=0.2):
    """The objective of one token, and its slope in the ratio."""
    ratio = torch.tensor(ratio, requires_grad=True)
    one = torch.ones(1, 1)
    value = -my_policy_loss(ratio.log() * one, 0 * one, advantage * one, one.bool(), eps)
    (slope,) = torch.autograd.grad(value, ratio)
    return value.item(), slope.item() + 0.0


print("A     ρ     objective   slope")
for advantage, table in ((1.0, ((0.5, 0.5, 1), (1.1, 1.1, 1), (1.5, 1.2, 0))), (-1.0, ((0.5, -0.8, 0), (0.9, -0.9, -1), (1.5, -1.5, -1)))):
    for ratio, *expected in table:
        value, slope = clipped_objective(ratio, advantage)
        print(f"{advantage:+.0f}   {ratio:.1f}   {value:7.2f}   {slope:8.2f}")
        torch.testing.assert_close([value, slope], [float(number) for number in expected])

# %%
DARK, BLUE, RED, GREY = "#1b2a41", "#2a6f97", "#d1495b", "#8a93a0"
ratios = torch.linspace(0.4, 1.7, 131).tolist()
figure, axes = plt.subplots(1, 2, figsize=(12, 3.8), dpi=150)
for ax, advantage in zip(axes, (1.0, -1.0), strict=True):
    ax.axvspan(0.8, 1.2, color=GREY, alpha=0.12, linewidth=0)
    ax.plot(ratios, [advantage * ratio for ratio in ratios], color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    ax.plot(ratios, [clipped_objective(ratio, advantage)[0] for ratio in ratios], color=BLUE if advantage > 0 else RED, linewidth=2.6)
    ax.plot(1, advantage, "o", color=DARK, markersize=7, zorder=3)
    ax.text(1, advantage - 0.08, "  every token\n  starts here", color=DARK, ha="left", va="top", fontsize=9)
    ax.set(xlabel="ratio ρ = π / π_old of the token", xlim=(0.4, 1.7), xticks=(0.4, 0.8, 1, 1.2, 1.6))
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=DARK)
axes[0].set(ylabel="objective")
axes[0].text(1.68, 1.17, "flat: likely enough,\nno more push", color=BLUE, ha="right", va="top", fontsize=9)
axes[0].text(0.55, 0.62, "full slope: was lowered\nby mistake, comes back", color=BLUE, ha="right", va="bottom", fontsize=9)
axes[1].text(0.42, -0.77, "flat: unlikely enough,\nno more push", color=RED, ha="left", va="bottom", fontsize=9)
axes[1].text(1.68, -1.3, "full slope: was raised\nby mistake, comes back", color=RED, ha="right", va="bottom", fontsize=9)
axes[0].set_title("A = +1, better than expected", color=DARK, loc="left", fontsize=12)
axes[1].set_title("A = −1, worse than expected", color=DARK, loc="left", fontsize=12)
figure.tight_layout(w_pad=3)
FIGURES = Path("runs/tutorials")  # below the folder you run from
FIGURES.mkdir(parents=True, exist_ok=True)
figure.savefig(FIGURES / "08_ppo_clip.png")
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", FIGURES / "08_ppo_clip.png")

# %% [markdown]
# The minimum makes the clip one-sided. It never hides a mistake: where a token has moved the *wrong* way the slope is whole. It only
# ends the reward for going further the right way. And it is no wall, a token can be carried beyond it by its neighbours' gradients.
#
# ### At first the ratio is exactly 1, and the loss says nothing
#
# The policy that trains is the one that sampled, so the first update of every rollout has $\rho = 1$ at each token, nothing is clipped,
# and the gradient is the plain policy gradient $-A_t \nabla\log\pi$, since $\nabla\rho = \rho\,\nabla\log\pi$. The *value* of the loss is then
# $-\overline{A}$: with advantages of mean zero it is 0, whether the policy is perfect or hopeless. Do not plot it as progress.

# %%
generator = torch.Generator().manual_seed(0)
some = torch.randn(85, 3, generator=generator, dtype=torch.float64)
some -= some[mask].mean()
loss = my_policy_loss(logps[0], logps[0].detach(), some, mask, eps=0.2)
plain = -(some * logps[0])[mask].mean()  # REINFORCE with an advantage for each token
gradients = [torch.autograd.grad(x, policy.head_weight, retain_graph=True)[0] for x in (loss, plain)]
print(f"loss {abs(loss.item()):.1e}   length of its gradient {gradients[0].norm():.3f}")
torch.testing.assert_close(gradients[0], gradients[1])
assert abs(loss.item()) < 1e-12 < gradients[0].norm()

# %% [markdown]
# ## Advantages: GAE by hand
#
# Rewards 0, 0, 1, and a critic that says 0.5, 0.4, 0.3. It thinks things get worse, and then a reward of 1 arrives. After the last token
# there is no state, so $V = 0$ there. With $\gamma = 1$: $\delta = (0.4 - 0.5,\; 0.3 - 0.4,\; 1 - 0.3) = (-0.1, -0.1, 0.7)$.


# %%
def my_gae(token_rewards, values, mask, gamma, lam):
    """All (B, T) -> advantages, returns (B, T). The definition, term by term."""
    advantages = torch.zeros_like(values)
    for b in range(len(values)):
        places = mask[b].nonzero().squeeze(1).tolist()
        r, V = token_rewards[b, places], torch.cat([values[b, places], torch.zeros(1, dtype=values.dtype)])  # watch: V (tokens + 1,)
        delta = r + gamma * V[1:] - V[:-1]
        for t in range(len(places)):
            advantages[b, places[t]] = sum((gamma * lam) ** (l - t) * delta[l] for l in range(t, len(places)))
    return advantages, torch.where(mask, advantages + values, 0)


r, V = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.3]])
print("  γ     λ      advantages                   returns")
for gamma, lam, A, G in (
    (1, 0.95, [0.43675, 0.565, 0.7], [0.93675, 0.965, 1]),
    (1, 1, [0.5, 0.6, 0.7], [1, 1, 1]),
    (1, 0, [-0.1, -0.1, 0.7], [0.4, 0.3, 1]),
    (0.9, 0.8, [0.12928, 0.374, 0.7], [0.62928, 0.774, 1]),
):
    advantages, returns = my_gae(r, V, three, gamma, lam)
    print(f"{gamma:4}  {lam:4}    {str(advantages[0].numpy().round(5)):28} {returns[0].numpy().round(5)}")
    torch.testing.assert_close(advantages[0], torch.tensor(A))
    torch.testing.assert_close(returns[0], torch.tensor(G, dtype=torch.float32))

# %% [markdown]
# - $\lambda = 0$: each token answers for its own surprise alone. The first two are blamed because the *critic* grew gloomy.
# - $\lambda = 1$: the $V$ in between cancel, $A_t = (\text{all that was still to come}) - V_t$. Monte Carlo minus a baseline: the critic
#   can no longer mislead, but all the luck of the rest of the completion is back.
# - In between: a surprise $l$ tokens later counts $\lambda^l$.
#
# ### Whitening
#
# Before use, PPO shifts and scales the advantages of a rollout to mean 0 and variance 1 (the population's), over its real tokens. The
# size of rewards then no longer matters for the size of the step. It also means that the noise of a step never fades, not even at the
# optimum, where true advantages vanish.


# %%
def my_whiten(x, mask):
    real = x[mask]
    variance = (real - real.mean()).pow(2).mean()
    return torch.where(mask, (x - real.mean()) / (variance + 1e-8).sqrt(), 0)


white = my_whiten(torch.tensor([[0.635, 0.665, 0.7]]), three)
print("whitened", white.numpy().round(6))
torch.testing.assert_close(white, torch.tensor([[-1.192158, -0.062745, 1.254903]]), atol=1e-5, rtol=0)

# %% [markdown]
# ### The critic's loss
#
# Squared distance to the returns, with a clip of its own: within one rollout a value gains nothing from moving further than
# $\varepsilon_V$ towards its return. By hand: $V = 1$, it was $0.5$, the return is 2. Clipped it is $0.7$, and
# $\frac12 \max\big((1 - 2)^2, (0.7 - 2)^2\big) = 0.845$.


# %%
def my_value_loss(values, old_values, returns, mask, eps):
    clipped = old_values + (values - old_values).clamp(-eps, eps)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)[mask].mean()


one = torch.ones(1, 1)
print("value loss", round(my_value_loss(one, 0.5 * one, 2 * one, one.bool(), 0.2).item(), 6))
torch.testing.assert_close(my_value_loss(one, 0.5 * one, 2 * one, one.bool(), 0.2).item(), 0.845, atol=1e-6, rtol=0)

# %% [markdown]
# ## Checkpoint
#
# All five equal the project's, on random rows of unequal length with a prompt before and padding behind.

# %%
B, T = 6, 9
places = torch.arange(T)
begins, ends = torch.tensor([0, 1, 2, 3, 0, 5]), torch.tensor([9, 4, 9, 4, 1, 8])
rows = (places >= begins[:, None]) & (places < ends[:, None])  # watch: rows (B, T)
new, old, other, V, new_V = torch.randn(5, B, T, generator=generator, dtype=torch.float64)
scores = torch.randn(B, generator=generator, dtype=torch.float64)

shaped = my_shape_rewards(scores, old, other, rows, beta=0.3)
torch.testing.assert_close(shaped, ppo.shape_rewards(scores, old, other, rows, beta=0.3))
for gamma, lam in ((1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)):
    mine, theirs = my_gae(shaped, V, rows, gamma, lam), ppo.gae(shaped, V, rows, gamma=gamma, lam=lam)
    torch.testing.assert_close(mine[0][rows], theirs[0][rows])
    torch.testing.assert_close(mine[1], theirs[1])
A, G = ppo.gae(shaped, V, rows, gamma=1.0, lam=0.95)
torch.testing.assert_close(my_whiten(A, rows), whiten(A, rows))

new, new_V = (old + 0.3 * new).requires_grad_(), (V + 0.3 * new_V).requires_grad_()
for mine, (theirs, _), x in ((my_policy_loss(new, old, A, rows, 0.2), ppo.policy_loss(new, old, A, rows, eps=0.2), new),
                             (my_value_loss(new_V, V, G, rows, 0.2), ppo.value_loss(new_V, V, G, rows, eps=0.2), new_V)):
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.autograd.grad(mine, x)[0], torch.autograd.grad(theirs, x)[0])
print("shape_rewards, gae, whiten, policy_loss, value_loss: equal to minialign's")

# %% [markdown]
# ## What λ trades: bias against noise, exactly
#
# Back to the 85 completions of the first prompt. The gradient that one completion gives is $\sum_t A_t \nabla\log\pi(y_t|\cdot)$. Average it
# over all completions, and compare with the true gradient of $J$ (**bias**); and see how far single ones are from their average
# (**noise**). Once with the exact values, once with $V = 0$, a critic that has learned nothing yet.

# %%
parameters = list(policy.parameters())


def flat_gradient(scalar):
    pieces = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if piece is None else piece).flatten() for p, piece in zip(parameters, pieces, strict=True)])


live = logps[0].sum(1).exp()  # (C,) probabilities with their graph
J = (live * (language.rewards[0] - BETA * (logps[0] - ref_logps[0]).sum(1))).sum()
true_gradient = flat_gradient(J)
once = {}  # ∇ log π of each (prefix, token), computed once
for c, completion in enumerate(language.completions):
    for t in range(len(completion)):
        if completion[: t + 1] not in once:
            once[completion[: t + 1]] = flat_gradient(logps[0, c, t])
nothing = torch.zeros_like(true_gradient)
steps = torch.stack([torch.stack([once[y[: t + 1]] if t < len(y) else nothing for t in range(3)]) for y in language.completions])  # (C, T, P)


def bias_and_noise(values, lam, gae=ppo.gae):
    advantages, _ = gae(token_rewards[0], values, mask, gamma=1.0, lam=lam)  # watch: advantages (C, T)
    estimates = torch.einsum("ct,ctp->cp", advantages, steps)  # (C, P) one gradient per completion
    mean = law[0] @ estimates
    noise = law[0] @ (estimates - mean).pow(2).sum(1)
    return ((mean - true_gradient).norm() / true_gradient.norm()).item(), (noise / true_gradient.norm() ** 2).item()


critics = {"exact V": exact_V[0], "V = 0": torch.zeros_like(exact_V[0])}
print(f"{'':12}" + "".join(f"{f'λ = {lam}':>20}" for lam in (1.0, 0.95, 0.5, 0.0)))
table = {name: [bias_and_noise(values, lam) for lam in (1.0, 0.95, 0.5, 0.0)] for name, values in critics.items()}
for name, cells in table.items():
    print(f"{name:12}" + "".join(f"   {bias:.3f} ± {noise**0.5:8.3f}" for bias, noise in cells) + "   bias ± noise, in lengths of ∇J")
