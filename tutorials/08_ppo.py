# %% [markdown]
# # 08 · PPO: a value for every prefix, and several updates from one rollout
#
# **You will hold** the five functions of PPO (token rewards, advantages, whitening, two losses), proved equal to the project's; a critic
# whose opinion of every prefix you can compare with the truth; and a training run that reaches a policy known in advance. Then the same
# functions play Frozen Lake, a game whose every value, best move and chance you compute yourself, and a reward comes back from games alone.
#
# **Minutes:** 65 to read, about 50 seconds of CPU to run. **You need:** tutorial 07 (policy gradient, baseline, the KL in the detached
# reward); for the reward from games a look at tutorial 05.
#
# Lines marked `# watch: name (shape)` are good places for a breakpoint. `B` completions, `T` tokens, `C` completions that exist at
# all, `P` parameters; on the lake `S` fields and `A` moves.

# %%
import copy
import sys
from pathlib import Path

# The project is not installed, it runs from its checkout: find the folder above this file (or above the notebook) that holds it.
ROOT = next(folder for folder in Path(globals().get("__file__", "here")).resolve().parents if (folder / "minialign").is_dir())
sys.path.insert(0, str(ROOT))

import matplotlib
import numpy as np
import torch

from minialign.batch import whiten
from minialign.logps import token_logps
from minialign.methods import ppo, rloo
from minialign.sample import sample
from toy import closed_form, frozen_lake
from toy.frozen_lake import FOUR, Lake
from toy.tiny_language import Language, tiny_gpt

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # a script draws into a file: no window to close, no screen needed
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

divergence = (law * (law.log() - ref_logps.sum(-1))).sum(1)  # (2,) KL(π ‖ ref)
objective = (law * language.rewards).sum(1) - BETA * divergence
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
    side = "left" if advantage > 0 else "right"
    ax.text(1, advantage - 0.08, "  every token  \n  starts here  ", color=DARK, ha=side, va="top", fontsize=9)
    ax.set(xlabel="ratio ρ of the token", xlim=(0.4, 1.7), xticks=(0.4, 0.8, 1, 1.2, 1.6))
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=DARK)
axes[0].set(ylabel="objective")
axes[0].text(1.68, 1.17, "flat: likely enough,\nno more push", color=BLUE, ha="right", va="top", fontsize=9)
axes[0].text(0.42, 0.84, "full slope: was lowered\nby mistake, comes back", color=BLUE, ha="left", va="bottom", fontsize=9)
axes[1].text(0.42, -0.83, "flat: unlikely enough,\nno more push", color=RED, ha="left", va="top", fontsize=9)
axes[1].text(1.68, -1.2, "full slope: was raised\nby mistake, comes back", color=RED, ha="right", va="bottom", fontsize=9)
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
# and the gradient is the plain policy gradient $-A_t \nabla\log\pi$, since $\nabla\rho = \rho\,\nabla\log\pi$. The *value* of the loss is
# then $-\overline{A}$: with advantages of mean zero it is 0, whether the policy is perfect or hopeless. Do not plot it as progress.

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
# Back to the 85 completions of the first prompt. The gradient that one completion gives is $\sum_t A_t \nabla\log\pi(y_t|\cdot)$. Average
# it over all completions, and compare with the true gradient of $J$ (**bias**); and see how far single ones are from their average
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
steps = [torch.stack([once[y[: t + 1]] if t < len(y) else nothing for t in range(3)]) for y in language.completions]
steps = torch.stack(steps)  # watch: steps (C, T, P), ∇ log π of every token


def bias_and_noise(values, lam):
    advantages, _ = ppo.gae(token_rewards[0], values, mask, gamma=1.0, lam=lam)  # watch: advantages (C, T)
    estimates = torch.einsum("ct,ctp->cp", advantages, steps)  # (C, P) one gradient per completion
    mean = law[0] @ estimates
    noise = law[0] @ (estimates - mean).pow(2).sum(1)
    return ((mean - true_gradient).norm() / true_gradient.norm()).item(), (noise.sqrt() / true_gradient.norm()).item()


LAMBDAS = (1.0, 0.95, 0.5, 0.0)


def print_row(name, cells, more=""):
    print(f"{name:12}" + "".join(f"   {bias:.3f} ± {noise:.3f}" for bias, noise in cells) + more)


print("bias ± noise, in lengths of the true gradient")
print(" " * 12 + "".join(f"{f'λ = {lam}':>16}" for lam in LAMBDAS))
right = [bias_and_noise(exact_V[0], lam) for lam in LAMBDAS]
empty = [bias_and_noise(torch.zeros_like(exact_V[0]), lam) for lam in LAMBDAS]
print_row("exact V", right)
print_row("V = 0", empty)
assert max(bias for bias, _ in right) < 1e-12 and empty[0][0] < 1e-12  # exact values: any λ;  λ = 1: any values
assert [bias for bias, _ in empty] == sorted(bias for bias, _ in empty) and empty[-1][0] > 0.4
assert all([noise for _, noise in row] == sorted((noise for _, noise in row), reverse=True) for row in (right, empty))

# %% [markdown]
# Two zeros to remember. With the exact values **every** $\lambda$ is unbiased. With $\lambda = 1$ **every** critic is. Between the two,
# smaller $\lambda$ means less noise, and more trust in a critic that may be wrong. The usual 0.95 costs 3 % of bias with $V = 0$, and
# that shrinks as a critic learns.
#
# ## The critic learns what is true
#
# A value model is the policy's trunk with a head of one number instead of $V$ logits. Keep the policy as it is, draw completions, and fit
# the returns at $\lambda = 1$: plain sums of what came. Each is a noisy number, one run of luck from its prefix on. What minimises the
# squared distance to all of them is their mean, the true value.

# %%
torch.manual_seed(0)
value_model = policy.with_scalar_head()
optimizer = torch.optim.Adam(value_model.parameters(), lr=1e-2, betas=(0.9, 0.99))
prompts_ids = [x for x in language.prompts for _ in range(32)]  # 64 rows


def values_of(value_model):
    """(2, C, T): what the critic says of every prefix."""
    values = value_model(language.inputs.flatten(0, 1)).unflatten(0, language.inputs.shape[:2])  # (2, prefixes, T)
    return torch.where(mask, values[:, language.rows[:, None], torch.arange(3)], 0).detach()


LOOKS = (0, 20, 300)
looks = {}
for k in range(LOOKS[-1] + 1):
    if k in LOOKS:
        looks[k] = values_of(value_model)
    optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / (LOOKS[-1] + 1))  # falls to 0
    answers = sample(policy, prompts_ids, max_new=3, eos_id=EOS, seed=("critic", k))
    with torch.no_grad():
        drawn_rewards = ppo.shape_rewards(language.scores(prompts_ids, answers), answers.old_logps, token_logps(ref, answers),
                                          answers.mask, beta=BETA)
    values = value_model(answers.inputs)  # watch: values (B, T)
    _, returns = ppo.gae(drawn_rewards, values, answers.mask, gamma=1.0, lam=1.0)
    loss = my_value_loss(values, values.detach(), returns, answers.mask, eps=torch.inf)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

prefixes = {y[:t]: (c, t) for c, y in enumerate(language.completions) for t in range(len(y))}  # each of the 21 prefixes, once
at = torch.tensor(list(prefixes.values())).T  # (2, 21) its row and its column
truth = exact_V[:, at[0], at[1]]  # watch: truth (2, 21)
reach = law[:, None, :] * torch.tensor([[y[: len(s)] == s for y in language.completions] for s in prefixes])  # (2, 21, C)
reach = reach.sum(-1)  # (2, 21) how often the policy passes this prefix
print("bias ± noise, in lengths of the true gradient")
print(" " * 12 + "".join(f"{f'λ = {lam}':>16}" for lam in LAMBDAS) + "    error of V")
error = {}
for k, values in looks.items():
    error[k] = (reach * (values[:, at[0], at[1]] - truth) ** 2).sum().div(reach.sum()).sqrt().item()
    learned = [bias_and_noise(values[0], lam) for lam in LAMBDAS]
    print_row(f"{k} updates", learned, f"{error[k]:14.3f}")
    assert learned[0][0] < 1e-12  # λ = 1 does not mind
assert error[300] < 0.2 * error[0] and learned[1][0] < 0.5 * empty[1][0]

# %% [markdown]
# A new critic, with its random head, is worse than none, and a few updates mend that. It has never seen a true value, only sums that
# came out one way or another, and yet approaches it (the picture is below): the bias of $\lambda = 0.95$ is gone but for a trace. In just
# this way it follows the policy from rollout to rollout while PPO runs.
#
# ## The experiment: to π*, beside RLOO
#
# The maximiser of $\mathbb{E}_\pi[r] - \beta\,\mathrm{KL}(\pi\|\mathrm{ref})$ is $\pi^* \propto \mathrm{ref} \cdot e^{r/\beta}$, so the
# distance $\mathrm{KL}(\pi\|\pi^*)$ can be computed at every moment, over all 85 completions of both prompts. PPO and RLOO get the same
# start, the same learning rate and the **same number of completions**, 64 per rollout. PPO makes four updates of each rollout, RLOO one.
# To see what the four updates do by themselves, RLOO runs twice more: with four updates as well, held by the same clip on its ratio of
# whole completions, and with one update of three times the learning rate.

# %%
ROLLOUTS, LR, EPOCHS, SEEDS, EPS, LAM = 70, 1e-3, 4, (0, 1, 2), 0.2, 0.95
start = tiny_gpt(language.vocab_size, seed=0, mixing=0.3, dtype=torch.float32)
start_law = language.law_of(start)
star = [torch.tensor(closed_form.tilt(start_law[n].numpy(), language.rewards[n].numpy(), BETA)) for n in range(2)]
star = torch.stack(star)  # watch: star (2, C)


def kl_to_star(policy):
    law = language.law_of(policy)
    return (law * (law.log() - star.log())).sum(1).mean().item()


def adam(model, lr):
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))


def update(optimizer, loss, k):
    optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * (1 - k / ROLLOUTS)  # falls to 0
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train_ppo(seed, loss_of=my_policy_loss, rollouts=ROLLOUTS, look=None):
    """The whole of PPO. Returns the policy and [KL(π ‖ π*)] after each rollout."""
    policy, ref = copy.deepcopy(start), start
    torch.manual_seed(seed)
    value_model = policy.with_scalar_head()
    optimizer, value_optimizer, path = adam(policy, LR), adam(value_model, 3 * LR), [kl_to_star(start)]
    for k in range(rollouts):
        answers = sample(policy, prompts_ids, max_new=3, eos_id=EOS, seed=(seed, k))
        with torch.no_grad():
            old_logps, ref_logps = token_logps(policy, answers), token_logps(ref, answers)  # watch: old_logps (B, T)
            old_values = value_model(answers.inputs)
        scores = language.scores(prompts_ids, answers)
        token_rewards = ppo.shape_rewards(scores, old_logps, ref_logps, answers.mask, beta=BETA)
        advantages, returns = ppo.gae(token_rewards, old_values, answers.mask, gamma=1.0, lam=LAM)  # watch: advantages (B, T)
        advantages = my_whiten(advantages, answers.mask)
        for epoch in range(EPOCHS):
            logps = token_logps(policy, answers)
            if look and k == 0:
                look(epoch, logps, old_logps, answers.mask)
            update(optimizer, loss_of(logps, old_logps, advantages, answers.mask, EPS), k)
            update(value_optimizer, my_value_loss(value_model(answers.inputs), old_values, returns, answers.mask, EPS), k)
        path.append(kl_to_star(policy))
    return policy, path


def train_rloo(seed, epochs, lr=LR):
    policy, ref, path = copy.deepcopy(start), start, [kl_to_star(start)]
    optimizer = adam(policy, lr)
    for k in range(ROLLOUTS):
        answers = sample(policy, prompts_ids, max_new=3, eos_id=EOS, seed=(seed, k))
        with torch.no_grad():
            old_logps, ref_logps = token_logps(policy, answers), token_logps(ref, answers)
        rewards = rloo.kl_rewards(language.scores(prompts_ids, answers), old_logps, ref_logps, beta=BETA)
        advantages = rloo.leave_one_out(rewards, group_size=4)  # (B,)
        for _ in range(epochs):
            update(optimizer, rloo.rloo_loss(token_logps(policy, answers), old_logps, advantages, answers.mask, eps=EPS)[0], k)
        path.append(kl_to_star(policy))
    return path


def first_rollout(epoch, logps, old_logps, mask):
    ratio = (logps - old_logps).exp()[mask]  # watch: ratio (tokens,)
    outside = ((ratio - 1).abs() > EPS).float().mean()
    print(f"first rollout, epoch {epoch}: ratio {ratio.min():.3f} to {ratio.max():.3f}, {100 * outside:2.0f} % of the tokens beyond 1 ± ε")
    if epoch == 0:
        assert (ratio - 1).abs().max() < 1e-6


paths = {"PPO": [], "RLOO": [], "RLOO, 4 epochs": [], "RLOO, 3 × lr": []}
for seed in SEEDS:
    trained, path = train_ppo(seed, look=first_rollout if seed == 0 else None)
    paths["PPO"].append(path)
    paths["RLOO"].append(train_rloo(seed, epochs=1))
    paths["RLOO, 4 epochs"].append(train_rloo(seed, epochs=EPOCHS))
    paths["RLOO, 3 × lr"].append(train_rloo(seed, epochs=1, lr=3 * LR))
paths = {name: torch.tensor(rows) for name, rows in paths.items()}  # (seeds, ROLLOUTS + 1)
print(f"\nKL(π ‖ π*), mean of {len(SEEDS)} seeds, after so many completions")
moments = [0, 5, 10, 30, 50, 70]
print(" " * 16 + "".join(f"{64 * k:9}" for k in moments))
for name, rows in paths.items():
    print(f"{name:16}" + "".join(f"{rows[:, k].mean():9.4f}" for k in moments))

final = {name: rows[:, -1].mean().item() for name, rows in paths.items()}
at_640 = {name: rows[:, 10].mean().item() for name, rows in paths.items()}
assert final["PPO"] < 0.01  # it arrives
assert max(at_640["PPO"], at_640["RLOO, 4 epochs"]) < at_640["RLOO, 3 × lr"] < at_640["RLOO"]  # reuse is fast
assert final["RLOO, 4 epochs"] < final["RLOO"] and final["PPO"] < final["RLOO"]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), dpi=150, width_ratios=(1, 1.35))
low, high = truth.min().item() - 0.15, truth.max().item() + 0.15
left.plot([low, high], [low, high], color=GREY, linewidth=1, zorder=0)
for k, color, label in ((20, "#a9d0e3", "20 updates"), (300, BLUE, "300 updates")):
    learned = looks[k][:, at[0], at[1]]
    left.scatter(truth, learned, s=12 + 200 * reach, color=color, alpha=0.85, edgecolor="white", linewidth=0.6, label=label)
left.set(xlabel="true value, by enumeration", ylabel="what the critic says", xlim=(low, high), ylim=(low, high))
legend = left.legend(frameon=False, loc="upper left", labelcolor=[DARK, DARK])
for handle in legend.legend_handles:
    handle.set_sizes([50])
left.text(high, low + 0.03, "42 prefixes; area: how often\nthe policy comes by", color=GREY, ha="right", va="bottom", fontsize=9)
left.set_title("The critic learns what prefixes are worth", color=DARK, loc="left", fontsize=12)

completions = [64 * k for k in range(ROLLOUTS + 1)]
for name, color, width, style in (("RLOO, 4 epochs", DARK, 1.2, "-"), ("RLOO, 3 × lr", RED, 1.2, (0, (3, 2))), ("RLOO", RED, 2.2, "-"),
                                  ("PPO", BLUE, 2.2, "-")):
    rows = paths[name]
    if width > 2:
        right.fill_between(completions, rows.min(0).values, rows.max(0).values, color=color, alpha=0.12, linewidth=0)
    right.semilogy(completions, rows.log().mean(0).exp(), color=color, linewidth=width, linestyle=style)
ends = sorted((rows[:, -1].log().mean().exp().item(), name) for name, rows in paths.items())
colors = {"PPO": BLUE, "RLOO": RED, "RLOO, 3 × lr": RED, "RLOO, 4 epochs": DARK}
labels = {"PPO": "PPO, 4 epochs", "RLOO": "RLOO, 1 update"}
above = 0.0
for height, name in ends:
    above = max(height, 1.26 * above)  # labels do not touch
    right.text(completions[-1] * 1.015, above, labels.get(name, name), color=colors[name], va="center", fontsize=9,
               weight="bold" if name in labels else "normal")
right.set(xlabel="completions sampled", ylabel="KL(π ‖ π*), by enumeration", xlim=(0, completions[-1]), ylim=(1.5e-3, 0.6))
right.set_title("On the way to π*", color=DARK, loc="left", fontsize=12)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=DARK)
figure.tight_layout(w_pad=3)
figure.savefig(FIGURES / "08_ppo.png")
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", FIGURES / "08_ppo.png")

# %% [markdown]
# Left: in the end the critic knows the prefixes that the policy visits (large dots). Of the rare ones it has seen little.
#
# Right (bands: three seeds): PPO arrives at $\pi^*$, and gets much more out of the first few hundred completions than RLOO with one
# update of each. That comes from reuse, not from the critic. RLOO with four clipped updates (thin, dark) is as fast, and one step three
# times as large (dashed) is not the same as four steps that look again. With completions of three tokens there is little credit to assign,
# and siblings are cheap; a critic is meant for completions that are long and dear. Four steps on the same noise have a
# price too, the zigzag, which lasts until the falling learning rate calms it.
#
# ## Break it on purpose, 1: forget the exp
#
# $\rho$ is a ratio of probabilities, $e^{\log\pi - \log\pi_\mathrm{old}}$. Take the ratio of the *log*-probabilities, which lie at
# hand, and it is exactly 1 at first, as it should be. The assertion passes, the loss is 0, the clip fraction 0.


# %%
def without_exp(logps, old_logps, advantages, mask, eps):
    ratio = logps / old_logps
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    return -objective[mask].mean()


right_gradient = torch.autograd.grad(my_policy_loss(logps[0], logps[0].detach(), some, mask, 0.2), logps, retain_graph=True)[0]
wrong_gradient = torch.autograd.grad(without_exp(logps[0], logps[0].detach(), some, mask, 0.2), logps, retain_graph=True)[0]
opposite = (right_gradient * wrong_gradient)[0][mask] < 0  # (tokens,)
print(f"loss {abs(without_exp(logps[0], logps[0].detach(), some, mask, 0.2).item()):.1e};   "
      f"tokens that are pushed the wrong way: {opposite.sum()} of {len(opposite)}")
broken_policy, broken_path = train_ppo(0, loss_of=without_exp, rollouts=15)
print("KL(π ‖ π*) after 0, 5, 10, 15 rollouts: " + "  ".join(f"{broken_path[k]:.3f}" for k in (0, 5, 10, 15))
      + f"   (right: {paths['PPO'][0, 15]:.3f})")
before, after = ((language.law_of(p) * language.rewards).sum(1).mean().item() for p in (start, broken_policy))
print(f"mean reward at the start {before:.3f}, then {after:.3f}")
assert opposite.all() and broken_path[-1] > 2 * broken_path[0] and after < before

# %% [markdown]
# The derivative of $\log\pi / \log\pi_\mathrm{old}$ is $\nabla\log\pi / \log\pi_\mathrm{old}$, and the logarithm of a probability is
# *negative*. Every single token is pushed the wrong way, the unlikely ones least. A check of values at $\rho = 1$ cannot see it. A check
# of gradients does at once; without one you would wonder why the reward falls.
#
# ## Break it on purpose, 2: bootstrap past the end
#
# After the last token there is no state, so $V = 0$ there. But the tensor goes on: the critic says something about the padding too. Let it
# say 0.5 everywhere, and forget the mask when the next value is looked up.

# %%
beyond = torch.where(mask, exact_V[0], 0.5)  # (C, T) exact values, and an opinion about the padding


def past_the_end(token_rewards, values, mask, gamma, lam):
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # not masked
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_values[:, t] - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * lam * following, 0)
        advantages[:, t] = following
    return advantages


def mean_gradient(advantages):
    return law[0] @ torch.einsum("ct,ctp->cp", advantages, steps)


safe, unsafe = ppo.gae(token_rewards[0], beyond, mask, gamma=1.0, lam=LAM)[0], past_the_end(token_rewards[0], beyond, mask, 1.0, LAM)
for name, advantages in (("minialign", safe), ("past the end", unsafe)):
    print(f"{name:14} bias {(mean_gradient(advantages) - true_gradient).norm() / true_gradient.norm():.4f}")
early = (language.lengths < 3).double()  # (C,) EOS came with room to spare
bonus = flat_gradient((live * (language.rewards[0] + 0.5 * early - BETA * (logps[0] - ref_logps[0]).sum(1))).sum())
torch.testing.assert_close(mean_gradient(safe), true_gradient)
torch.testing.assert_close(mean_gradient(past_the_end(token_rewards[0], beyond, mask, 1.0, 1.0)), bonus)
assert (mean_gradient(unsafe) - true_gradient).norm() > 0.1 * true_gradient.norm()

# %% [markdown]
# With $\lambda = 1$ it is exactly the gradient for another reward: the critic's word about the padding is paid as a *bonus for stopping
# early*. And the critic is never corrected, for nothing is learned on padding. Policies that fall silent, or never stop, are the
# symptom; the project's `gae` starts from the last real token of each row.

# %% [markdown]
# ## Frozen Lake: the same functions play a game
#
# Nothing in `gae`, `policy_loss` and `value_loss` knows what a token is. Give them gymnasium's Frozen Lake: a state is one of 16 fields,
# an action one of four moves, and the game is over in a hole or at the gift. Only the gift pays, 1. On the *slippery* lake a move
# succeeds one time in three, and else one slides to its left or its right: dice that are not the policy's, which no completion has.
#
# Who goes where is a table, so every number is known before anything learns. *Value iteration* says 0 everywhere, and then lets each
# field repeat what its best move promises, until nothing changes:
#
# $$Q(s, a) = \sum_{s'} P(s'|s, a)\,\big(r(s') + \gamma V(s')\big), \qquad V(s) = \max_a Q(s, a) .$$

# %%
GAMMA, PULL = 0.99, 0.1  # PULL: the β of the lake
lake, slippery = Lake(FOUR), Lake(FOUR, slippery=True)  # .P (S, A, S) from gymnasium, 0 where the game is over; .goal (S,) 1 at the gift


def my_value_iteration(lake, gamma, sweeps=1000):
    V = np.zeros(16)
    for _ in range(sweeps):
        Q = lake.P @ (lake.goal + gamma * V)  # watch: Q (S, A)
        V = Q.max(1)
    return V, Q


for ice, share in ((lake, 1), (slippery, 14 / 17)):
    best_V, best_Q = my_value_iteration(ice, GAMMA)
    their_V, their_Q, best_moves = frozen_lake.value_iteration(ice, ice.goal, GAMMA)
    arrive = frozen_lake.success(ice, best_moves)  # no sampling: the same recursion, with the policy's mean in the place of the max
    print(f"{'slippery' if ice is slippery else 'dry'}: V(start) = {best_V[0]:.6f}, the best moves arrive in {arrive:.6f} of the games")
    for letters, numbers in zip(ice.letters.reshape(4, 4), best_V.reshape(4, 4).round(3), strict=True):
        print("  ", *letters, "  ", numbers)
    np.testing.assert_allclose([*best_V, *best_Q.ravel(), arrive], [*their_V, *their_Q.ravel(), share], atol=1e-12)
np.testing.assert_allclose(my_value_iteration(lake, GAMMA)[0][0], GAMMA**5)

# %% [markdown]
# Six moves lead to the gift and the sixth is paid at once: $V(\mathrm{start}) = \gamma^5$. On slippery ice the best that anyone can do is
# 14 games in 17.
#
# ### The closed form again
#
# Now pay $-\beta k_1$ for every move, with $\mathrm{ref}$ uniform, as for every token above. The max becomes a soft one, and the policy is
# the tilt of tutorial 05, once in every field, with $Q$ for the reward:
#
# $$V(s) = \beta \log \sum_a \mathrm{ref}(a|s)\, e^{Q(s, a)/\beta}, \qquad \pi^*(a|s) \propto \mathrm{ref}(a|s)\, e^{Q(s, a)/\beta} .$$
#
# A popular alternative is a *bonus* for entropy, $+\beta H(\pi)$. Since $H(\pi) = \log 4 - \mathrm{KL}(\pi\|\mathrm{uniform})$, it is the
# same thing but for a constant, $\beta\log 4$. Only, the constant is paid for every move.


# %%
def my_soft_value_iteration(lake, gamma, beta, bonus=0.0, sweeps=3000):
    """bonus: added to every move. Returns V (S,), π (S, A)."""
    V = np.zeros(16)
    for _ in range(sweeps):
        Q = lake.P @ (lake.goal + gamma * V) + bonus
        V = np.where(lake.over, 0, beta * np.log(np.exp(Q / beta).mean(1)))
    return V, np.stack([closed_form.tilt(np.full(4, 0.25), q, beta) for q in Q])  # the very function that made π* above


soft_V, soft_star = my_soft_value_iteration(lake, GAMMA, PULL)
trap_V, trapped = my_soft_value_iteration(lake, GAMMA, PULL, bonus=PULL * np.log(4))
for mine, entropy in (((soft_V, soft_star), False), ((trap_V, trapped), True)):
    theirs = frozen_lake.soft_value_iteration(lake, lake.goal, GAMMA, PULL, entropy=entropy)
    np.testing.assert_allclose(mine[0], theirs[0], atol=1e-9)
    np.testing.assert_allclose(mine[1][lake.live], theirs[1][lake.live], atol=1e-7)
print(f"pull to uniform: V(start) {soft_V[0]:6.3f}   arrives within 100 moves: {frozen_lake.success(lake, soft_star, 100):.4f}")
print(f"entropy bonus:   V(start) {trap_V[0]:6.3f}   arrives within 100 moves: {frozen_lake.success(lake, trapped, 100):.0e}")
assert frozen_lake.success(lake, trapped, 100) < 1e-9 < 0.99 < frozen_lake.success(lake, soft_star, 100)

# %% [markdown]
# The gift is worth 1, once. To walk about for ever is worth up to $\beta\log 4\,/\,(1 - \gamma) = 13.9$. So the second agent takes care
# never to arrive. It is not broken, it is paid that way. A bonus per *token* asks a language model not to stop, in the same manner.
#
# ### PPO on the lake
#
# A table of logits is the policy, a table of values the critic, both 0 at first: uniform moves, of 72 games one arrives. Everything else
# is `train_ppo` once more, with the project's functions. Games are stopped after 30 moves. Each seed must end at the closed form.


# %%
def play_ppo(ice, seed, beta=PULL, gamma=GAMMA, n=64, limit=30):
    """Returns π (S, A), V (S,) and the exact chances of the gift, before and after each rollout."""
    generator, path = torch.Generator().manual_seed(seed), []
    logits, values = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((16, 4), (16,)))
    optimizer = torch.optim.Adam([logits, values], lr=0.1)
    for k in range(ROLLOUTS + 1):
        old = logits.detach().log_softmax(-1)
        path.append(frozen_lake.success(ice, old.exp().numpy()))
        if k == ROLLOUTS:
            return old.exp().numpy(), values.detach().numpy(), path
        states, moves, arrivals, playing = (x[0] for x in frozen_lake.play(ice, old[None], n, generator, limit))  # watch: states (n, T)
        old_logps, old_values = old[states, moves], values.detach()[states]
        move_rewards = torch.where(playing, torch.tensor(ice.goal)[arrivals] - beta * (old_logps - np.log(1 / 4)), 0)
        advantages, returns = ppo.gae(move_rewards, old_values, playing, gamma=gamma, lam=LAM)
        advantages = whiten(advantages, playing)
        for _ in range(EPOCHS):
            policy_part, _ = ppo.policy_loss(logits.log_softmax(-1)[states, moves], old_logps, advantages, playing, eps=EPS)
            value_part, _ = ppo.value_loss(values[states], old_values, returns, playing, eps=EPS)
            update(optimizer, policy_part + value_part, k)


played = [play_ppo(lake, seed) for seed in SEEDS]
arrive_star = frozen_lake.success(lake, soft_star)
print(f"chance of the gift after so many games; the closed form arrives in {arrive_star:.4f}, V(start) = {soft_V[0]:.3f}")
for seed, (moved, critic, path) in zip(SEEDS, played, strict=True):
    off = frozen_lake.distance(lake, soft_star, moved, GAMMA)  # total variation, where π* spends its time
    print(f"seed {seed}: " + "  ".join(f"{64 * k}: {path[k]:.3f}" for k in (0, 5, 10, 20, 70))
          + f"   distance to π* {off:.4f}   critic V(start) {critic[0]:.3f}")
    assert abs(path[-1] - arrive_star) < 0.01 and off < 0.02 and abs(critic[0] - soft_V[0]) < 0.02

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3.7), dpi=150, width_ratios=(1, 1, 1, 1.35))
frozen_lake.arrows(axes[0], lake, np.full((16, 4), 0.25), f"before: {played[0][2][0]:.3f} arrive", np.zeros(16))
frozen_lake.arrows(axes[1], lake, played[0][0], f"PPO, {64 * ROLLOUTS} games: {played[0][2][-1]:.3f}", played[0][1])
frozen_lake.arrows(axes[2], lake, soft_star, f"closed form: {arrive_star:.3f}", soft_V)
games = [64 * k for k in range(ROLLOUTS + 1)]
axes[3].axhline(arrive_star, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
axes[3].text(games[-1], arrive_star + 0.02, "π*, computed", color=GREY, ha="right", va="bottom", fontsize=9)
axes[3].plot(games, np.transpose([path for _, _, path in played]), color=BLUE, linewidth=1.4, alpha=0.8)
axes[3].text(900, 0.6, "PPO, three seeds", color=BLUE, fontsize=9)
axes[3].set(xlabel="games played", ylabel="chance of the gift, exact", xlim=(0, games[-1]), ylim=(0, 1.12), yticks=(0, 0.25, 0.5, 0.75, 1))
axes[3].spines[["top", "right"]].set_visible(False)
axes[3].tick_params(colors=DARK)
figure.tight_layout(w_pad=2)
figure.savefig(FIGURES / "08_ppo_frozen_lake.png")
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", FIGURES / "08_ppo_frozen_lake.png")

# %% [markdown]
# An arrow is as long as its move is likely; the small numbers are values, the critic's in the second picture. PPO has found the closed
# form in every field that matters. Its critic is still up to .02 low: it can only follow.
#
# ### Demonstrations carry a reward
#
# Let somebody play by $\pi^*$, and forget the gift. What is left are **visits**, $D(s) = \sum_t \gamma^t P(s_{t+1} = s)$. Tutorial 05 went
# from demonstrations back to a reward; here is the same gradient in a table. Up where the expert goes, down where the own policy goes:

# %%
expert_visits, _ = frozen_lake.visits(lake, soft_star, GAMMA)
my_reward = np.zeros(16)
for _ in range(1000):
    _, own = frozen_lake.soft_policy_iteration(lake, my_reward, GAMMA, PULL)  # the policy that this reward asks for
    my_reward += 0.02 * (expert_visits - frozen_lake.visits(lake, own, GAMMA)[0])
learned, taught = frozen_lake.learn_reward(lake, expert_visits, GAMMA, PULL)  # the same ascent with a line search, to the very top
compared = frozen_lake.same_reward(lake, learned, lake.goal, GAMMA)
print(learned.reshape(4, 4).round(3), compared.reshape(4, 4).round(3) + 0.0, sep="\n\n")
print(f"distance of policies to the expert's: a thousand steps {frozen_lake.distance(lake, soft_star, own, GAMMA):.4f}, "
      f"at the top {frozen_lake.distance(lake, soft_star, taught, GAMMA):.0e}")
assert frozen_lake.distance(lake, taught, own, GAMMA) < 2e-3
np.testing.assert_allclose(compared, lake.goal, atol=1e-3)

# %% [markdown]
# The learned reward pays .8 for the gift, fines every hole with .2 and each other step with .002. It looks like another opinion and is
# not: take $c = .2$ from what every end pays and $(1 - \gamma)\,c$ from every other arrival, and each game loses exactly $c$, however it
# goes. No policy can show the difference. Put it back, and the gift alone remains.
#
# That was with all the visits there are. From five games, beside SFT (a table of the moves that were seen):

# %%
few = {}
for name, ice, beta in (("dry", lake, PULL), ("slippery", slippery, 0.005)):  # exercise 6 says why so small a pull
    _, expert = frozen_lake.soft_value_iteration(ice, ice.goal, GAMMA, beta)
    few[name] = np.mean([frozen_lake.from_few(ice, expert, 5, GAMMA, beta, np.random.default_rng(seed)) for seed in range(5)], axis=0)
    print(f"{name:9} distance to the expert:" + "".join(f"   {way} {off:.3f}" for way, off in zip(frozen_lake.FEW, few[name], strict=True)))
assert few["dry"][0] < few["dry"][2] and few["slippery"][0] > 3 * few["slippery"][1]

# %% [markdown]
# On dry ice a move says where one arrives, visits and moves are the same data, and the reward beats SFT: one number for the gift says what
# to do on fields that nobody showed. On slippery ice visits are mostly the ice's doing. A reward fitted to them pays for luck, and is far
# worse than SFT. Fitted to the *moves*, it is not.
#
# ### What an error of parameters is worth
#
# The paper on IFT compares methods on Frozen Lake by the squared distance of their *parameters* to those of a best policy. Fit a net of
# two layers to $\pi^*$, then put its hidden units in another order and turn the signs of some, before and after the tanh:

# %%
first = frozen_lake.first_weights(16, 32, seeds=1)
cross_entropy = frozen_lake.each(lambda net: -(torch.tensor(soft_star) * frozen_lake.log_policy(net))[lake.live].sum(1).mean())
fitted = frozen_lake.fit(first, cross_entropy, 600, torch.optim.Adam, 1e-2)
shuffled = frozen_lake.shuffled_units(fitted, torch.Generator().manual_seed(0))
for name, net in (("fitted to π*", fitted), ("its units shuffled", shuffled), ("first weights", first)):
    (away,), (moved,) = frozen_lake.parameter_error(net, fitted), frozen_lake.policies_of(net)
    print(f"{name:20} error of parameters {away:.3f}   distance to π* {frozen_lake.distance(lake, soft_star, moved, GAMMA):.4f}")
assert frozen_lake.parameter_error(shuffled, fitted) > 2 * frozen_lake.parameter_error(first, fitted)
np.testing.assert_allclose(frozen_lake.policies_of(shuffled), frozen_lake.policies_of(fitted), atol=1e-12)

# %% [markdown]
# The same policy, to the last digit, is further away than a net that has learned nothing. Compare policies: what they do, and how often
# they arrive. `toy/frozen_lake.py` has the whole experiment, and a setting in which the paper's order holds: towards a θ* that itself
# seldom arrives.
#
# ## Where to read on
#
# - `minialign/methods/ppo.py`: the functions above, then `rollout_with_values`, `credit`, `step` with its assertion that the first ratio
#   is 1, `main` with the two optimizers. `explained_variance` is the number to watch: how much of the returns the critic foresees.
# - `minialign/methods/rloo.py` and `grpo.py`: the same clip, on whole completions and on tokens, without a critic.
# - `tests/methods/test_ppo.py`: the enumerations above. `python -m toy.tiny_language --full --methods ppo` trains on 1555 completions of
#   three prompts.
# - `toy/frozen_lake.py`: PPO and seven other methods on the lake, with nets; what inverse RL makes of one, five and twenty games.
#   `tests/toy/test_frozen_lake.py` has the 14/17 in fractions.
# - `python -m minialign ppo` runs it on the built-in task, with `--reward` and `--value` on your reward model.
#
# ## Exercises
#
# **Exercise 1** (★☆☆, 5 minutes). A token has $A > 0$ and $\varepsilon = 0.2$. Up to which probability does one rollout push it, if it had
# 0.01, 0.5, 0.9 before? What does the clip mean for a rare token that turned out well?
#
# **Exercise 2** (★★☆, 15 minutes). Put the reward one slot late: `last + 1`, as in code written for rollouts of fixed length, and let the
# mask do the rest. What gradient is left? Name it, and check by enumeration with $\lambda = 1$, $V = 0$.
#
# **Exercise 3** (★★★, 20 minutes). At $\pi^*$ show that $V(s) = \beta \log \mathbb{E}_\mathrm{ref}[e^{r/\beta} \mid s]$ for every prefix
# $s$, and that each single $\delta_t$ vanishes. Check both by enumeration. What does whitening make of such advantages?
#
# **Exercise 4** (★☆☆, 5 minutes). On the dry lake, what become of $\pi^*$ and of its chance of the gift for $\beta \to \infty$, for
# $\beta \to 0$? Say it first, then run soft value iteration.
#
# **Exercise 5** (★★☆, 15 minutes). Let $\gamma = 1$ on the dry lake. What are the values now, and does a player arrive who always takes
# the *first* of the best moves, in the order left, down, right, up? With the pull, show that a game is one long completion: $\pi^*$
# arrives with $p\,e^{1/\beta} / (1 - p + p\,e^{1/\beta})$, where $p$ is the uniform player's chance. Does PPO?
#
# **Exercise 6** (★★★, 20 minutes). Let PPO play the slippery lake with $\beta = 0.1$. It hardly ever arrives. Is it broken? Compute what
# the best player would pay. Then try $\beta = 0.005$ with games of up to 100 moves. What is still in the way, and what helps?
#
# ---
#
# ## Solutions
#
# **Solution 1.** Up to $1.2$ times what it was: 0.012, 0.6, and 1.08, that is, without limit. The clip counts in ratios, so it lets a
# likely token go anywhere and a rare one almost nowhere. A good rare token needs many rollouts.

# %%
for p in (0.01, 0.5, 0.9):
    limit = 1.2 * p
    slopes = [clipped_objective(new / p, 1.0)[1] for new in (min(0.999 * limit, 1.0), min(1.001 * limit, 1.0))]
    print(f"had {p:4}: pushed up to {min(limit, 1.0):.3f}   slope just below {slopes[0]:.0f}, just above {slopes[1]:.0f}")
    assert slopes == ([1.0, 0.0] if limit < 1 else [1.0, 1.0])

# %% [markdown]
# **Solution 2.** The score stands on padding, or beyond the tensor, and the mask removes it. Only the KL is left: the gradient is
# $-\beta\,\nabla\mathrm{KL}(\pi\|\mathrm{ref})$. The policy stays at ref, the KL is a beautiful 0, and no reward is ever learned.

# %%
late = my_shape_rewards(torch.zeros(85, dtype=torch.float64), logps[0], ref_logps[0], mask, BETA)
late = torch.cat([late, torch.zeros(85, 1)], dim=1)  # (C, T + 1) room for the slot after the last token
late.scatter_(1, language.lengths[:, None], language.rewards[0][:, None])
late_mask = torch.cat([mask, torch.zeros(85, 1, dtype=torch.bool)], dim=1)
advantages, _ = ppo.gae(late, torch.zeros_like(late), late_mask, gamma=1.0, lam=1.0)
kl_gradient = flat_gradient(-BETA * (live * (logps[0] - ref_logps[0]).sum(1)).sum())
torch.testing.assert_close(mean_gradient(advantages[:, :3]), kl_gradient)
print("one slot late: the gradient is −β ∇KL(π ‖ ref), the reward is gone")

# %% [markdown]
# **Solution 3.** Given a prefix $s$ (the empty one included), $\pi^*(y|s) = \mathrm{ref}(y|s)\,e^{r/\beta} / Z(s)$ with
# $Z(s) = \mathbb{E}_\mathrm{ref}[e^{r/\beta}|s]$. What is still to come is $r - \beta\log\pi^*(y|s)/\mathrm{ref}(y|s) = \beta\log Z(s)$,
# the same for every $y$. So nothing is ever a surprise: $\delta_t = 0$. Whitening divides such zeros by their spread. With an imperfect
# critic it blows the critic's errors up to size 1.

# %%
star_logps = language.conditionals(star[0])  # (C, T)
ref0_logps = language.conditionals(start_law[0])
star_rewards = my_shape_rewards(language.rewards[0], star_logps, ref0_logps, mask, BETA)
star_V = language.exact_values(star[0], star_rewards)
soft = torch.zeros_like(star_V)
for c, y in enumerate(language.completions):
    for t in range(len(y)):
        below = [i for i, other in enumerate(language.completions) if other[:t] == y[:t]]
        weights = start_law[0][below] / start_law[0][below].sum()
        soft[c, t] = BETA * (weights * (language.rewards[0][below] / BETA).exp()).sum().log()
delta, _ = ppo.gae(star_rewards, star_V, mask, gamma=1.0, lam=0.0)  # λ = 0: the advantages are the δ
print(f"largest |V − β log E_ref[exp(r/β) | s]|: {(star_V - soft).abs().max():.1e};   largest |δ|: {delta.abs().max():.1e}")
torch.testing.assert_close(star_V, soft)
assert delta.abs().max() < 1e-9

# %% [markdown]
# **Solution 4.** $\beta \to \infty$: nothing is worth leaving ref for, and 1 game in 72 arrives. $\beta \to 0$: the best moves alone, and
# all arrive. In between the tilt makes a gift about $e^{1/\beta}$ times as likely as a failure, against what it was. It takes a factor
# of 72 to get half of the games there, so the change comes near $\beta = 1/\log 72 = 0.23$. (Exercise 5 makes this exact.)

# %%
for beta in (10, 1, 0.3, 0.1, 0.03, 0.01):
    _, moved = frozen_lake.soft_value_iteration(lake, lake.goal, GAMMA, beta)
    print(f"β = {beta:5}: start {moved[0].round(3)} in the order LDRU   arrive {frozen_lake.success(lake, moved):.4f}")
    assert beta < 10 or abs(frozen_lake.success(lake, moved) - played[0][2][0]) < 0.002
assert frozen_lake.success(lake, moved) > 1 - 1e-6

# %% [markdown]
# **Solution 5.** Every live field is worth 1, for the gift can wait. So every move is a best one that does not fall into a hole. Who takes
# the first of them walks left into the border, for ever: values that do not say *when* do not make a plan. The pull keeps the player
# random, so nobody gets stuck. Without dice and discount the objective of a game is
# $r - \beta\log\pi(\text{game})/\mathrm{ref}(\text{game})$, exactly that of a completion. So $\pi^* \propto \mathrm{ref}\,e^{r/\beta}$
# over whole games, and all that arrive are made likelier by the same factor.

# %%
patient_V, patient_Q = my_value_iteration(lake, 1.0)
first_best = np.eye(4)[patient_Q.argmax(1)]
_, patient = my_soft_value_iteration(lake, 1.0, PULL)
p = frozen_lake.success(lake, np.full((16, 4), 0.25))
game_law = closed_form.tilt([1 - p, p], np.array([0.0, 1.0]), PULL)
_, _, path = play_ppo(lake, 0, gamma=1.0)
arrive = frozen_lake.success(lake, first_best, 1000)
print(f"V of the live fields: {np.unique(patient_V[lake.live])}   who takes the first of the best moves arrives in {arrive} of the games")
print(f"pull: tilt of games {game_law[1]:.6f}   soft value iteration {frozen_lake.success(lake, patient):.6f}   PPO {path[-1]:.3f}")
assert (patient_V[lake.live] == 1).all() and arrive == 0
np.testing.assert_allclose(frozen_lake.success(lake, patient), game_law[1], atol=1e-9)
assert abs(path[-1] - game_law[1]) < 0.01

# %% [markdown]
# **Solution 6.** It is right. The best player needs 35 moves (discounted), and where only one move is best it pays $\beta\log 4$ for it:
# 4.8 in all, to earn .54. So the maximiser stays near the uniform player, and the closed form arrives in 3 games of 100. With
# $\beta = 0.005$ the price is .24, and $\pi^*$ arrives in three games of four. Now noise is in the way: 64 games hold one gift at first,
# and the ice's dice are in every return. Four times as many games in a rollout, and PPO nearly arrives at $\pi^*$.

# %%
_, _, best_moves = frozen_lake.value_iteration(slippery, slippery.goal, GAMMA)
_, spent = frozen_lake.visits(slippery, best_moves, GAMMA)
for beta, n, limit in ((0.1, 64, 30), (0.005, 64, 100), (0.005, 256, 100)):
    price = beta * (spent * (best_moves * np.log(4 * np.maximum(best_moves, 1e-9))).sum(1))[lake.live].sum()
    _, expert = frozen_lake.soft_value_iteration(slippery, slippery.goal, GAMMA, beta)
    arrived = [play_ppo(slippery, seed, beta=beta, n=n, limit=limit)[2][-1] for seed in (0, 1)]
    print(f"β = {beta:5}, {n:3} games a rollout: the best player would pay {price:.2f}; "
          f"closed form {frozen_lake.success(slippery, expert):.3f}, PPO {arrived[0]:.3f}, {arrived[1]:.3f}")
    assert n == 64 and beta < 0.1 or abs(np.mean(arrived) - frozen_lake.success(slippery, expert)) < 0.1
