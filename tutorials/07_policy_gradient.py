# %% [markdown]
# # 07 · Policy gradients: REINFORCE, RLOO, GRPO
#
# **You will hold** the losses and advantages of three methods in a few lines each, proved equal to the project's; one picture of what
# they are about, the noise of a gradient; and a table that says where a KL penalty may stand and where it may not.
#
# **Minutes:** 40 to read, about 10 seconds of CPU to run. **You need:** tutorial 03 (`log π(y|x)` is a sum over tokens), and what an
# expectation and a KL divergence are.
#
# Lines marked `# watch: name (shape)` are good places for a breakpoint. `B` completions, `N` groups of `G` completions of one prompt
# each, `C` completions that exist at all, `P` parameters.

# %%
import sys
from pathlib import Path

# The project is not installed, it runs from its checkout: find the folder above this file (or above the notebook) that holds it.
ROOT = next(folder for folder in Path(globals().get("__file__", "here")).resolve().parents if (folder / "minialign").is_dir())
sys.path.insert(0, str(ROOT))

import matplotlib
import torch

from minialign import kl
from minialign.methods import grpo, reinforce, rloo
from toy import closed_form
from toy.tiny_language import Language, TabularPolicy, tiny_gpt

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # a script draws into a file: no window to close, no screen needed
import matplotlib.pyplot as plt

torch.set_default_dtype(torch.float64)  # so that "equal" can mean twelve digits

# %% [markdown]
# ## The question
#
# Somebody pays for completions: the policy writes $y$, a program or a reward model says $R(y)$. Nobody shows a better answer, as in
# tutorial 04. And the reward is a number from a box: it has no gradient, and a sampled token has none either. How can the policy be
# improved?
#
# ## The equation
#
# What we want is a high *expected* reward, and an expectation does have a gradient, because the probabilities in it do. With
# $\nabla \pi = \pi \, \nabla \log \pi$:
#
# $$\nabla \, \mathbb{E}_{y \sim \pi}[R(y)] = \sum_y R(y) \, \nabla \pi(y)
#   = \sum_y \pi(y) \, R(y) \, \nabla \log \pi(y) = \mathbb{E}_{y \sim \pi}\big[ R(y) \, \nabla \log \pi(y) \big] .$$
#
# The right side is an average over the policy's own completions. So sample some, weigh the log-probability of each with its reward,
# and take the gradient. Every method of this tutorial does that. They differ in what they subtract from the reward, and whether they
# divide what is left:
#
# $$L(\theta) = - \frac1B \sum_i A_i \, \log \pi_\theta(y_i|x_i), \qquad
# \begin{array}{ll}
# \text{REINFORCE} & A_i = R_i - b, \quad b \text{ a running mean of earlier rewards} \\
# \text{RLOO} & A_i = R_i - \frac{1}{G-1} \sum_{j \ne i} R_j \quad \text{over the other completions of the prompt} \\
# \text{GRPO} & A_i = (R_i - \text{mean of the group}) \,/\, \text{spread of the group}
# \end{array}$$

# %% [markdown]
# ## The tiniest numbers: three actions
#
# A policy over three completions, with logits $\log \pi$, and a reward for each. In logits $\nabla \log \pi(y)$ is
# $\mathrm{onehot}_y - \pi$, so everything can be done by hand.

# %%
pi = torch.tensor([0.5, 0.3, 0.2])
R = torch.tensor([1.0, 0.0, 2.0])
scores = torch.eye(3) - pi  # watch: scores (C, 3), row y is ∇ log π(y)

logits = pi.log().requires_grad_()
(exact,) = torch.autograd.grad((logits.softmax(0) * R).sum(), logits)  # the left side: differentiate the expectation
identity = sum(pi[y] * R[y] * scores[y] for y in range(3))  # the right side: average R·∇ log π

for y in range(3):
    print(f"y = {y}   probability {pi[y]:.1f}   R {R[y]:.0f}   R·∇ log π(y) = {(R[y] * scores[y] + 0.0).numpy()}")
print("their mean  ", identity.numpy().round(4))
print("∇ E[R]      ", exact.numpy().round(4))
torch.testing.assert_close(exact, torch.tensor([0.05, -0.27, 0.22]))
torch.testing.assert_close(identity, exact)
torch.testing.assert_close(exact, pi * (R - pi @ R))  # in logits: probability times (reward minus the mean reward)

# %% [markdown]
# The mean is right, but a single draw is far from it. Action 0 is the most frequent and its reward is positive, so half of the steps
# push action 2 down, the best of them all. Only the average repairs that. Learning from few samples is a fight against this noise.
#
# ### A baseline is free
#
# Subtract a constant $b$ from all rewards. The average does not change, because $\mathbb{E}[\nabla \log \pi] = \sum_y \nabla \pi(y) =
# \nabla 1 = 0$. The noise does. Measure it as the mean squared distance of a one-sample gradient to the true one:


# %%
def one_sample(b):
    """Mean and noise of the gradient estimated from one draw with baseline b, by enumeration."""
    estimates = (R - b)[:, None] * scores  # watch: estimates (C, 3)
    mean = pi @ estimates
    return mean, (pi @ (estimates - mean).pow(2).sum(1)).item()


for b in (0.0, (pi @ R).item(), 2.0, -10.0):
    mean, noise = one_sample(b)
    print(f"b = {b:5.1f}   mean {mean.numpy().round(4)}   noise {noise:8.4f}")
    torch.testing.assert_close(mean, exact)  # any constant
assert one_sample((pi @ R).item())[1] < one_sample(0.0)[1] < one_sample(2.0)[1] < one_sample(-10.0)[1] / 70

# %% [markdown]
# Read the last line as a reward that somebody shifted by 10. The task is the same; the noise is almost a hundred times larger. The mean
# reward is a good baseline: then a completion is pushed up if it did *better than usual*. (Not quite the best one: exercise 1.)
#
# But nobody knows the mean reward. Each method has its own guess at it.

# %% [markdown]
# ## Build it yourself
#
# **REINFORCE** remembers: a running mean of the rewards of earlier batches, with a correction for its start at zero.


# %%
def my_reinforce_loss(logps, advantages, mask):
    """logps, mask (B, T); advantages (B,) -> the loss. One completion is one action: its log-probs are summed."""
    seq_logps = torch.where(mask, logps, 0).sum(1)  # watch: seq_logps (B,)
    return -(advantages.detach() * seq_logps).mean()


def my_running_means(batches, decay):
    """The baseline that each batch of rewards meets: a weighted mean of the batches before it, the older the lighter."""
    means = torch.stack([rewards.mean() for rewards in batches])
    baselines = [torch.tensor(0.0)]  # nothing to go by
    for k in range(1, len(means)):
        weights = decay ** torch.arange(k - 1, -1, -1)  # (k,) the newest has weight 1
        baselines.append((weights * means[:k]).sum() / weights.sum())
    return torch.stack(baselines)


print("rewards 4, 4, 4, 0, 0 meet the baselines",
      my_running_means([torch.tensor([reward]) for reward in (4.0, 4.0, 4.0, 0.0, 0.0)], decay=0.9).numpy().round(3))

# %% [markdown]
# **RLOO** asks the others. Sample $G$ completions of the same prompt, and compare each with the mean of the rest. This baseline knows the
# prompt and the present policy, and costs nothing. By hand, for rewards 1, 0, 0, 3: the first one's others have mean 1, so it gets 0.
# The last one's others have mean $\frac13$, so it gets $\frac83$.


# %%
def my_leave_one_out(rewards, group_size):
    """(B,), the G of one prompt adjacent -> (B,)."""
    groups = rewards.view(-1, group_size)  # watch: groups (N, G)
    columns = []
    for i in range(group_size):
        others = [j for j in range(group_size) if j != i]
        columns.append(groups[:, i] - groups[:, others].mean(1))
    return torch.stack(columns, dim=1).flatten()


four = torch.tensor([1.0, 0.0, 0.0, 3.0])
print("leave one out ", my_leave_one_out(four, 4).numpy().round(4))
torch.testing.assert_close(my_leave_one_out(four, 4), torch.tensor([0, -4 / 3, -4 / 3, 8 / 3]))

# %% [markdown]
# **GRPO** takes the mean of the whole group, oneself included, and divides by the group's standard deviation.


# %%
def my_group_advantages(rewards, group_size, normalize=True, ddof=1, std_eps=1e-4):
    """(B,), the G of one prompt adjacent -> (B,)."""
    advantages = []
    for group in rewards.view(-1, group_size):  # watch: group (G,)
        centred = group - group.mean()
        if (group == group[0]).all():
            centred = torch.zeros(group_size)
        spread = (centred.pow(2).sum() / (group_size - ddof)).sqrt() + std_eps
        advantages.append(centred / spread if normalize else centred)
    return torch.cat(advantages)


centred = my_group_advantages(four, 4, normalize=False)
print("minus the mean", centred.numpy())
print("over the spread, sample     (ddof 1)", my_group_advantages(four, 4).numpy().round(6))
print("over the spread, population (ddof 0)", my_group_advantages(four, 4, ddof=0).numpy().round(6))
torch.testing.assert_close(centred, 3 / 4 * my_leave_one_out(four, 4))  # (G − 1)/G of leave-one-out
torch.testing.assert_close(my_group_advantages(four, 4), torch.tensor([0, -0.707057, -0.707057, 1.414114]), atol=1e-6, rtol=0)
torch.testing.assert_close(my_group_advantages(four, 4, ddof=0), torch.tensor([0, -0.816430, -0.816430, 1.632860]), atol=1e-6, rtol=0)

# %% [markdown]
# ## Checkpoint
#
# Yours equal the project's, on random rewards and log-probs, gradients included.

# %%
generator = torch.Generator().manual_seed(0)
rewards = torch.randn(24, generator=generator)
rewards[:4] = 0.3  # a group of equals
for group_size in (2, 4, 8):
    torch.testing.assert_close(my_leave_one_out(rewards, group_size), rloo.leave_one_out(rewards, group_size=group_size))
    for options in ({}, {"ddof": 0}, {"normalize": False}, {"std_eps": 0.1}):
        torch.testing.assert_close(my_group_advantages(rewards, group_size, **options),
                                   grpo.group_advantages(rewards, group_size=group_size, **options))
assert (grpo.group_advantages(rewards, group_size=4)[:4] == 0).all()

mask = torch.rand(24, 6, generator=generator) < 0.7
logps = (-torch.rand(24, 6, generator=generator)).requires_grad_()
mine, (theirs, _) = my_reinforce_loss(logps, rewards, mask), reinforce.reinforce_loss(logps, rewards, mask)
torch.testing.assert_close(mine, theirs)
torch.testing.assert_close(torch.autograd.grad(mine, logps)[0], torch.autograd.grad(theirs, logps)[0])

batches, baseline, met = torch.randn(30, 8, generator=generator), reinforce.Baseline(decay=0.9), []
for batch in batches:
    met.append(baseline.value)
    baseline.update(batch)
torch.testing.assert_close(my_running_means(batches, decay=0.9), torch.tensor(met))
print("reinforce_loss, Baseline, leave_one_out, group_advantages: equal to minialign's")

# %% [markdown]
# ## Which of them is unbiased?
#
# Three actions, groups of $G$: there are $3^G$ groups, so sum over all of them.


# %%
def expected_gradient(advantages_of, group_size):
    """E[ mean over the group of A_i ∇ log π(y_i) ], over all groups, each with its probability."""
    groups = torch.cartesian_prod(*[torch.arange(3)] * group_size)  # watch: groups (3^G, G)
    chance = pi[groups].prod(1)  # (3^G,)
    advantages = advantages_of(R[groups].flatten(), group_size).view(-1, group_size)
    return (chance[:, None, None] * advantages[:, :, None] * scores[groups]).sum(0).mean(0)


def group_mean(rewards, group_size):
    return my_group_advantages(rewards, group_size, normalize=False)


print(f"{'exact':28}{exact.numpy().round(4)}")
for group_size in (2, 3, 6):
    for advantages_of in (my_leave_one_out, group_mean, my_group_advantages):
        mean = expected_gradient(advantages_of, group_size)
        length = (mean.norm() / exact.norm()).item()
        cosine = (mean @ exact / mean.norm() / exact.norm()).item()
        print(f"G = {group_size} {advantages_of.__name__.removeprefix('my_'):22}{mean.numpy().round(4)}   length × {length:.4f}   "
              f"cosine {cosine:.4f}")
        if advantages_of is my_leave_one_out:
            torch.testing.assert_close(mean, exact)
        if advantages_of is group_mean:
            torch.testing.assert_close(mean, exact * (group_size - 1) / group_size)

# %% [markdown]
# - *Leave one out* is exact at every $G$. Given the others, $b$ is a constant for $y_i$.
# - *The group's mean* contains $R_i$ itself. A share $\frac1G$ of every reward is subtracted from itself, so the gradient is exactly
#   $\frac{G-1}{G}$ of the true one. The direction is right.
# - *Dividing by the spread* changes the direction too, because the spread depends on the draw. Above all it changes the scale, and by
#   another factor for every prompt:

# %%
for rewards in ([1.0, 0, 0, 3], [11.0, 10, 10, 13], [100.0, 0, 0, 300], [0.01, 0, 0, 0.03], [2.0, 2, 2, 2]):
    shown = my_group_advantages(torch.tensor(rewards), 4)
    print(f"{str(rewards):24} leave one out {str(my_leave_one_out(torch.tensor(rewards), 4).numpy().round(3)):35} "
          f"GRPO {shown.numpy().round(3)}")
torch.testing.assert_close(my_group_advantages(100 * four, 4), my_group_advantages(four, 4), atol=1e-3, rtol=0)
torch.testing.assert_close(my_group_advantages(four / 100, 4), my_group_advantages(four, 4), atol=0.02, rtol=0)

# %% [markdown]
# Rewards in other units give the same step. That is handy. But a prompt where completions differ by a hundredth pushes as hard as one
# where everything is at stake, and near the end, where all completions are about equally good, GRPO magnifies what is left. (Subtract a
# KL penalty after the division and this can go wrong altogether: exercise 3.)
#
# ## The experiment: the noise of four gradients
#
# Now with a GPT. The language has four letters and an end token, and a completion has at most three tokens: 85 completions of each
# prompt. So the exact gradient is a sum, and the noise of an estimate is known.
#
# There are two prompts, and the first is easier: all its rewards are 2 higher. That changes no gradient. But it is what real prompts
# are like, and a baseline that does not know the prompt will suffer.

# %%
language = Language(n_content=4, max_new=3, n_prompts=2)
policy = tiny_gpt(language.vocab_size, seed=0, mixing=0.3)
rewards = language.rewards + torch.tensor([[2.0], [0.0]])  # watch: rewards (2, C)
law = language.law_of(policy)  # watch: law (2, C), all probabilities
value = (law * rewards).sum(1)  # (2,) the mean reward of each prompt
print(f"{law.shape[1]} completions a prompt; mean rewards {value.numpy().round(3)}")
torch.testing.assert_close(law.sum(1), torch.ones(2))

parameters = list(policy.parameters())
seq_logps = language.token_logps(policy).sum(-1)  # (2, C)


def flat_gradient(scalar):
    pieces = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if piece is None else piece).flatten() for p, piece in zip(parameters, pieces, strict=True)])


scores = torch.stack([torch.stack([flat_gradient(logp) for logp in row]) for row in seq_logps])  # watch: scores (2, C, P), ∇ log π(y)
exact = ((law * rewards)[..., None] * scores).sum(1)  # (2, P) one gradient a prompt
torch.testing.assert_close(exact.mean(0), flat_gradient((seq_logps.exp() * rewards).sum(1).mean()))  # the identity again
print(f"∇ log π of 2 × 85 completions in {scores.shape[-1]:,} parameters; length of ∇ E[R]: {exact.mean(0).norm():.3f}")

# %% [markdown]
# A step draws 32 completions of each prompt, in groups of $G$: 16 groups of 2, or 1 of 32. Every estimate is a weighted sum of the 85
# rows of `scores`, with weights $w$. So is its mean. The squared distance of two such sums is $(w - w')^\top K (w - w')$ with
# $K = S S^\top$: thousands of gradients of a GPT cost a few products of 85 × 85 matrices.
#
# For each method we want two numbers about its gradient $\hat g$:
#
# - **noise**: $\mathbb{E}\,\|\hat g - \mathbb{E}\hat g\|^2 \,/\, \|\mathbb{E}\hat g\|^2$. Relative, so that a mere factor, which a learning
#   rate takes out, does not count;
# - **bias**: $\|\mathbb{E}\hat g - g\| \,/\, \|g\|$, and what is left of it after the best such factor: the error of the *direction*.
#
# The mean $\mathbb{E}\hat g = \sum_y \pi(y)\, \mathbb{E}[A \mid y]\, \nabla\log\pi(y)$ needs the expected advantage of each completion. We
# give all 85 of them the same drawn companions, so that their luck is common to all and cancels.

# %%
K = scores @ scores.transpose(1, 2)  # watch: K (2, C, C)
PER_PROMPT = 32


def draw(n, *shape):
    return torch.multinomial(law[n], torch.Size(shape).numel(), replacement=True, generator=generator).view(shape)


def squared(weights, n):
    return ((weights @ K[n]) * weights).sum(-1)


def compare(mean_weights, noise):
    """mean_weights (2, C) of the mean gradient, and its squared noise: relative noise, bias, bias of the direction."""
    mean = (mean_weights[..., None] * scores).sum(1).mean(0)  # (P,)
    g = exact.mean(0)
    off_direction = (mean - g * (mean @ g) / (g @ g)).norm() / mean.norm()  # the sine of the angle between them
    return noise / (mean @ mean).item(), ((mean - g).norm() / g.norm()).item(), off_direction.item()


def measure(advantages_of, group_size, draws=8000, companions=2000):
    mean_weights, noise = torch.zeros_like(law), 0.0
    for n in range(2):
        y = draw(n, draws, group_size)
        advantages = advantages_of(rewards[n][y].flatten(), group_size).view(draws, group_size)
        weights = torch.zeros(draws, law.shape[1]).scatter_add(1, y, advantages / group_size)  # watch: weights (draws, C)
        others = draw(n, companions, group_size - 1).expand(law.shape[1], companions, group_size - 1)
        with_me = torch.cat([torch.arange(law.shape[1])[:, None, None].expand(-1, companions, 1), others], dim=-1)  # (C, companions, G)
        given_me = advantages_of(rewards[n][with_me].flatten(), group_size).view(law.shape[1], companions, group_size)[..., 0].mean(1)
        mean_weights[n] = law[n] * given_me
        of_a_group = squared(weights - mean_weights[n], n).mean()
        noise += (of_a_group * group_size / PER_PROMPT).item() / 4  # mean over the groups of a prompt, then over two prompts
    return compare(mean_weights, noise)


def constant_baseline(b):
    """b (2,), a baseline of each prompt that does not depend on the draw: exact, by enumeration."""
    weights = law * (rewards - b[:, None])
    one = [(law[n] @ ((rewards[n] - b[n]) ** 2 * K[n].diagonal()) - squared(weights[n], n)).item() for n in range(2)]
    return compare(weights, sum(one) / PER_PROMPT / 4)


def running_mean(steps=2000):
    """REINFORCE as it runs: one baseline for both prompts, made of earlier batches."""
    ys = torch.stack([draw(n, steps, PER_PROMPT) for n in range(2)], dim=1)  # (steps, 2, 32)
    drawn = torch.stack([rewards[n][ys[:, n]] for n in range(2)], dim=1)
    baselines = my_running_means(drawn.flatten(1)[:200], decay=0.9)[20:]  # after the start
    noise = torch.stack([torch.tensor(constant_baseline(torch.full((2,), b))) for b in baselines.tolist()])
    return tuple(noise.mean(0).tolist())


GROUPS = [2, 4, 8, 16, 32]
fixed = {"no baseline": constant_baseline(torch.zeros(2)), "running mean": running_mean(),
         "true mean of the prompt": constant_baseline(value)}
methods = {"RLOO": rloo.leave_one_out, "group mean": grpo.group_advantages, "GRPO": grpo.group_advantages}
options = {"RLOO": {}, "group mean": {"normalize": False}, "GRPO": {}}
curves = {
    name: [measure(lambda r, size, f=f, name=name: f(r, group_size=size, **options[name]), size) for size in GROUPS]
    for name, f in methods.items()
}
print(f"{'':26}{'noise':>8}{'bias':>9}{'of direction':>15}")
for name, numbers in fixed.items():
    print(f"{name:26}{numbers[0]:8.2f}{numbers[1]:9.4f}{numbers[2]:15.4f}")
for name, row in curves.items():
    for size, numbers in zip(GROUPS, row, strict=True):
        print(f"{name + f', G = {size}':26}{numbers[0]:8.2f}{numbers[1]:9.4f}{numbers[2]:15.4f}")

none, running, best = (fixed[name][0] for name in ("no baseline", "running mean", "true mean of the prompt"))
noise_of = {name: [numbers[0] for numbers in row] for name, row in curves.items()}
bias_of = {name: [numbers[1] for numbers in row] for name, row in curves.items()}
turn_of = {name: [numbers[2] for numbers in row] for name, row in curves.items()}
assert max(*bias_of["RLOO"], *(numbers[1] for numbers in fixed.values())) < 1e-12  # unbiased, all of them
torch.testing.assert_close(torch.tensor(bias_of["group mean"]), 1 / torch.tensor(GROUPS, dtype=torch.float64))
assert max(turn_of["group mean"]) < 1e-6 and min(turn_of["GRPO"]) > 0.1
assert none > 1.5 * running > 2.5 * noise_of["RLOO"][0] and noise_of["RLOO"][:3] == sorted(noise_of["RLOO"][:3], reverse=True)
assert noise_of["RLOO"][2] < 1.2 * best and noise_of["RLOO"][-1] < 1.1 * best
torch.testing.assert_close(torch.tensor(noise_of["group mean"]), torch.tensor(noise_of["RLOO"]), rtol=0.1, atol=0)

# %%
DARK, BLUE, RED, GREEN, GREY = "#1b2a41", "#2a6f97", "#d1495b", "#3a7d44", "#8a93a0"
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), dpi=150)
for name, height, color in (("REINFORCE, no baseline", none, DARK), ("REINFORCE, running mean", running, GREY)):
    left.axhline(height, color=color, linewidth=2.2)
    left.text(32, height * 1.04, name, color=color, ha="right", va="bottom", weight="bold")
left.axhline(best, color=DARK, linewidth=1, linestyle=(0, (4, 3)))
left.text(2, best / 1.04, "the true mean of each prompt as baseline", color=DARK, ha="left", va="top", fontsize=9)
left.plot(GROUPS, noise_of["GRPO"], "o-", color=RED, linewidth=2.2)
left.plot(GROUPS, noise_of["RLOO"], "o-", color=BLUE, linewidth=2.2)
left.plot(GROUPS, noise_of["group mean"], "o", color="white", markeredgecolor=BLUE, markersize=10, zorder=1)
left.text(2.15, noise_of["GRPO"][0] * 1.02, "GRPO", color=RED, ha="left", va="bottom", weight="bold")
left.text(32, noise_of["RLOO"][-1] * 1.12, "RLOO, and group mean (rings)", color=BLUE, ha="right", va="bottom", weight="bold")
left.set(ylabel="noise of the gradient / its length, both squared", yscale="log", ylim=(0.45, 5))
left.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
left.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
left.set_title("Noise: know the prompt, then ask a few others", color=DARK, loc="left", fontsize=12)

right.plot(GROUPS, bias_of["RLOO"], "o-", color=BLUE, linewidth=2.2)
right.plot(GROUPS, bias_of["group mean"], "o-", color=BLUE, markerfacecolor="white", linewidth=1.2, markersize=10, zorder=1)
right.plot(GROUPS, bias_of["GRPO"], "o-", color=RED, linewidth=2.2)
right.plot(GROUPS, turn_of["GRPO"], "o--", color=RED, linewidth=1.2, markersize=4)
right.text(32, bias_of["GRPO"][-1] + 0.02, "GRPO", color=RED, ha="right", va="bottom", weight="bold")
right.text(32, turn_of["GRPO"][-1] + 0.05, "GRPO, its direction alone", color=RED, ha="right", va="bottom", fontsize=9)
right.text(2.2, bias_of["group mean"][0], "group mean: 1/G", color=BLUE, ha="left", va="bottom", weight="bold")
right.text(2, 0.015, "RLOO and both REINFORCE: 0", color=BLUE, ha="left", va="bottom", weight="bold")
right.set(ylabel="mean gradient: relative distance from the true one", ylim=(-0.03, 0.8))
right.set_title("Bias: dividing by the spread turns the gradient", color=DARK, loc="left", fontsize=12)
for ax in (left, right):
    ax.set(xscale="log", xlabel="G, completions in a group (32 of each prompt in a step)", xlim=(1.85, 34))
    ax.set_xticks(GROUPS, GROUPS)
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=DARK)
figure.tight_layout(w_pad=3)
figure_path = Path("runs/tutorials/07_policy_gradient.png")  # below the folder you run from
figure_path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(figure_path)
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", figure_path)

# %% [markdown]
# Left: without a baseline most of the noise is the common height of the rewards. The running mean removes what both prompts share, but
# one prompt is easier, and the mean of the two is wrong for each. A single sibling does better than this memory. Beyond a group of
# eight there is little left to gain, because a baseline is as good as it can be when it knows the prompt's mean (dashed). The group mean
# has the same noise per signal as RLOO: it *is* RLOO, times $\frac{G-1}{G}$.
#
# Right: RLOO pays nothing for it. The group's mean shrinks the gradient by a known factor. GRPO's is a gradient of another length (that
# alone would be a matter of the learning rate) and of another direction. In small groups the spread depends on the draw. In groups of
# any size it is another one for each prompt, so the two prompts no longer count the same:

# %%
spread = (law * (rewards - value[:, None]) ** 2).sum(1).sqrt()  # (2,)
divided, g = (exact / spread[:, None]).mean(0), exact.mean(0)  # what GRPO's mean gradient tends to in large groups
turned = (1 - (divided @ g / divided.norm() / g.norm()) ** 2).sqrt().item()
print(f"spread of each prompt {spread.numpy().round(3)};   direction off by {turned:.3f} for G → ∞, {turn_of['GRPO'][-1]:.3f} at G = 32")
assert abs(turned - turn_of["GRPO"][-1]) < 0.02

# %% [markdown]
# ## The KL: three estimators
#
# A reward alone drives the policy to whatever pays, however odd. So all methods here are held to a reference policy and maximise
# $\mathbb{E}_\pi[r] - \beta\,\mathrm{KL}(\pi \| \mathrm{ref})$, with its maximum at $\pi^* \propto \mathrm{ref} \cdot e^{r/\beta}$. The
# KL too is an expectation, to be estimated from samples. Three estimators are in use, with $d = \log \pi(y) - \log \mathrm{ref}(y)$:
#
# $$k_1 = d, \qquad k_2 = \tfrac12 d^2, \qquad k_3 = e^{-d} - 1 + d .$$
#
# First as **values**:


# %%
def my_k1(logps, ref_logps):
    return logps - ref_logps


def my_k2(logps, ref_logps):
    return (logps - ref_logps) ** 2 / 2


def my_k3(logps, ref_logps):
    return (ref_logps - logps).exp() - 1 + logps - ref_logps


ref = torch.tensor([0.2, 0.3, 0.5])
true_kl = (pi * (pi.log() - ref.log())).sum()
print(f"KL(π ‖ ref) = {true_kl:.6f}")
for mine, theirs in ((my_k1, kl.k1), (my_k2, kl.k2), (my_k3, kl.k3)):
    k = mine(pi.log(), ref.log())  # watch: k (3,)
    torch.testing.assert_close(k, theirs(pi.log(), ref.log()))  # checkpoint
    mean = pi @ k
    deviation = (pi @ (k - mean) ** 2).sqrt()
    print(f"{mine.__name__.removeprefix('my_')}   {str(k.numpy().round(6)):34} mean {mean:.6f}   standard deviation {deviation:.3f}")
torch.testing.assert_close(true_kl.item(), 0.274887, atol=1e-6, rtol=0)
torch.testing.assert_close(pi @ my_k1(pi.log(), ref.log()), true_kl)
torch.testing.assert_close(pi @ my_k3(pi.log(), ref.log()), true_kl)
torch.testing.assert_close((pi @ my_k2(pi.log(), ref.log())).item(), 0.293856, atol=1e-6, rtol=0)

# %% [markdown]
# $k_1$ and $k_3$ are right on average, $k_2$ is a little off. $k_3$ is never negative, and it scatters less than a third as much as $k_1$
# does. As a number to watch, $k_3$ wins.
#
# Now as **loss terms**: put the mean of $k$ over samples into the loss and call `backward`. The samples are held fixed, so the
# gradient is $\mathbb{E}[\nabla k]$, and that is not $\nabla\,\mathbb{E}[k]$.

# %%
logits = pi.log().requires_grad_()


def gradient(scalar):
    return torch.autograd.grad(scalar, logits, retain_graph=True)[0]


live = logits.log_softmax(0)
reverse_kl, forward_kl = (live.exp() * (live - ref.log())).sum(), (ref * (ref.log() - live)).sum()
as_loss = {k.__name__.removeprefix("my_"): gradient((pi * k(live, ref.log())).sum()) for k in (my_k1, my_k2, my_k3)}
in_reward = gradient((pi * my_k1(live, ref.log()).detach() * live).sum())  # E[k1 · ∇ log π], k1 a number like any reward
for name, value in (("∇ KL(π ‖ ref)", gradient(reverse_kl)), ("∇ KL(ref ‖ π)", gradient(forward_kl)),
                    *((f"{name} in the loss", g) for name, g in as_loss.items()), ("k1 in the detached reward", in_reward)):
    print(f"{name:26}", (value.numpy().round(6) + 0.0))
torch.testing.assert_close(as_loss["k1"], torch.zeros(3), atol=1e-12, rtol=0)
torch.testing.assert_close(as_loss["k2"], gradient(reverse_kl))
torch.testing.assert_close(as_loss["k3"], gradient(forward_kl))
torch.testing.assert_close(in_reward, gradient(reverse_kl))

# %% [markdown]
# - $k_1$ in the loss does **nothing** on average: $\mathbb{E}[\nabla \log \pi] = 0$, the line that made baselines free.
# - $k_2$ in the loss, the biased value, has the right gradient, if $d$ is of the whole completion. (Per token it has not, from two tokens
#   on: a token changes the KL of later tokens.)
# - $k_3$ in the loss, the best value, has the gradient of the *other* divergence. GRPO does this.
# - $k_1$ **in the detached reward** is right, and needs no thought: it is the identity at the top with
#   $R = r - \beta d$. Is it enough to differentiate the first factor of $\pi R$ when $R$ depends on $\theta$ too? Yes: the other part is
#   $\mathbb{E}[\nabla R] = -\beta\,\mathbb{E}[\nabla\log\pi] = 0$ once more.
#
# So the project's REINFORCE, RLOO and PPO use the last line. Where does each line lead in the end? Follow the expected update of three
# logits until it rests.


# %%
def settle(loss_of, steps=1500, lr=1.0):
    """Gradient descent on Σ_y π(y)·loss(y), with π(y) held fixed as sampling does; from ref. Where it comes to rest, (3,)."""
    logits = ref.log().requires_grad_()
    for _ in range(steps):
        logps = logits.log_softmax(0)
        loss = (logps.exp().detach() * loss_of(logps)).sum()
        (step,) = torch.autograd.grad(loss, logits)
        logits = (logits - lr * step).detach().requires_grad_()
    return logits.softmax(0).detach()


r, beta = torch.tensor([1.0, 0.0, 2.0]), 0.8
star = torch.tensor(closed_form.tilt(ref.numpy(), r.numpy(), beta))  # π*
k3_law = torch.tensor(closed_form.sequence_k3_law(ref.numpy(), r.numpy(), beta))


def kl_to_star(p):
    return (p * (p.log() - star.log())).sum().abs().item()  # abs: a rounding error below 0 would print a minus


places = {
    "k1 in the detached reward": lambda logps: -(r - beta * my_k1(logps, ref.log())).detach() * logps,
    "k2 in the loss": lambda logps: -r * logps + beta * my_k2(logps, ref.log()),
    "k3 in the loss": lambda logps: -r * logps + beta * my_k3(logps, ref.log()),
    "k1 in the loss": lambda logps: -r * logps + beta * my_k1(logps, ref.log()),
}
ends = {name: settle(loss_of) for name, loss_of in places.items()}
print(f"{'π* ∝ ref·exp(r/β)':28}{star.numpy().round(5)}")
print(f"{'β·ref/(c − r)':28}{k3_law.numpy().round(5)}")
for name, end in ends.items():
    print(f"{name:28}[{' '.join(f'{p:.5f}' for p in end.tolist())}]   KL to π* {kl_to_star(end):.5f}")
torch.testing.assert_close(ends["k1 in the detached reward"], star, atol=1e-6, rtol=0)
torch.testing.assert_close(ends["k2 in the loss"], star, atol=1e-6, rtol=0)
torch.testing.assert_close(ends["k3 in the loss"], k3_law, atol=1e-6, rtol=0)
assert kl_to_star(k3_law) > 0.02 and ends["k1 in the loss"][2] > 0.99  # it has no penalty: it does not rest

# %% [markdown]
# $k_3$ in the loss has a law of its own, $\pi = \beta\,\mathrm{ref} / (c - r)$, derived in `toy/closed_form.py`. It is not a small
# change: its tails are heavier, since $1/(c - r)$ falls slower than $e^{r/\beta}$. (Completions of several tokens add one more effect;
# `token_k3_law` there is GRPO's.)
#
# ## Break it on purpose, 1: do not detach the reward
#
# One forgotten `.detach()`: the log-prob inside $R$ is differentiated with the rest. Nothing crashes, the reward rises. By the product
# rule the update gets one more term, $-\beta \log\pi \cdot \nabla\log\pi$, so it rests where $r - 2\beta\log\pi + \beta\log
# \mathrm{ref}$ is the same for all completions: at $\pi \propto \sqrt{\mathrm{ref} \cdot e^{r/\beta}}$.

# %%
attached = settle(lambda logps: -(r - beta * my_k1(logps, ref.log())) * logps)
root = (ref * (r / beta).exp()).sqrt()
print("not detached            ", attached.numpy().round(5))
print("√(ref·exp(r/β)), scaled ", (root / root.sum()).numpy().round(5))
print("π*                      ", star.numpy().round(5), f"  KL to π* {kl_to_star(attached):.4f}")
torch.testing.assert_close(attached, root / root.sum(), atol=1e-6, rtol=0)
assert kl_to_star(attached) > 0.05

# %% [markdown]
# It looks like a policy with twice the $\beta$, and one would tune $\beta$ to make up for it. But the reference is under the root too: even
# with all rewards 0 the policy does not stay at $\mathrm{ref}$.

# %%
without_reward = settle(lambda logps: beta * my_k1(logps, ref.log()) * logps)
print("r = 0, not detached:", without_reward.numpy().round(4), "  ref:", ref.numpy())
torch.testing.assert_close(without_reward, ref.sqrt() / ref.sqrt().sum(), atol=1e-6, rtol=0)

# %% [markdown]
# The project's `kl_rewards` detaches, and `reinforce_loss` detaches once more:

# %%
live = logits.log_softmax(0)[:, None]  # (3, 1): three completions of one token
project = reinforce.kl_rewards(r, live, ref.log()[:, None], beta=beta)
assert not project.requires_grad
torch.testing.assert_close(project, r - beta * (pi.log() - ref.log()))

# %% [markdown]
# ## Break it on purpose, 2: include yourself
#
# Take the group's mean for a leave-one-out mean. The gradient shrinks by $\frac{G-1}{G}$. With the KL in the reward the *whole* gradient
# shrinks and only the learning rate notices. With the KL as a term of its own, as in GRPO, the reward shrinks and the KL does not:
# $\beta$ becomes $\beta\,\frac{G}{G-1}$. With pairs, twice the $\beta$ you set. (The KL term below is $k_2$, to keep the law simple.)


# %%
def expected_advantage(p, rewards, include_me):
    """E[A | y] in pairs, the other one drawn from p (3,): (3,)."""
    pair = torch.stack([rewards[:, None].expand(3, 3), rewards.expand(3, 3)], dim=-1)  # watch: pair (y, other, 2)
    baseline = pair.mean(-1) if include_me else pair[..., 1]
    return ((rewards[:, None] - baseline) * p).sum(1)


def pairs(include_me, kl_in_reward):
    def loss_of(logps):
        p = logps.exp().detach()
        if kl_in_reward:
            return -expected_advantage(p, (r - beta * my_k1(logps, ref.log())).detach(), include_me) * logps
        return -expected_advantage(p, r, include_me) * logps + beta * my_k2(logps, ref.log())

    return settle(loss_of)


double = torch.tensor(closed_form.tilt(ref.numpy(), r.numpy(), 2 * beta))
print(f"π* at β = {beta}: {star.numpy().round(4)}      π* at β = {2 * beta}: {double.numpy().round(4)}")
for include_me in (False, True):
    for kl_in_reward in (True, False):
        end = pairs(include_me, kl_in_reward)
        name = f"{'group mean' if include_me else 'leave one out'}, KL in the {'reward' if kl_in_reward else 'loss'}"
        print(f"{name:32}-> {end.numpy().round(4)}")
        torch.testing.assert_close(end, double if include_me and not kl_in_reward else star, atol=1e-6, rtol=0)

# %% [markdown]
# Three of four are right, so a test that trains RLOO and looks where it lands does not catch the mistake. Only the expected gradient
# does, the table under *Which of them is unbiased?*. Test estimators, not only results.
#
# ## Where to read on
#
# - `minialign/methods/reinforce.py`: loss, `Baseline`, `step` and `main`; `minialign/kl.py` has `kl_rewards`. `rloo.py` and `grpo.py`
#   have the same shape; read them side by side. Both have a *ratio* and a clip that we left out: at one update per rollout the ratio is
#   exactly 1. Tutorial 08 is about them.
# - `minialign/kl.py`: the three estimators, safe at large log-ratios.
# - `tests/methods/test_reinforce.py`, `test_rloo.py`, `test_grpo.py`: the enumerations above, with GPTs.
# - `python -m toy.tiny_language --full` trains all of them on 1555 completions and measures how far each ends from its own law.
#
# ## Exercises
#
# **Exercise 1** (★☆☆, 10 minutes). The mean reward is not the best constant baseline. Find the one with the least noise, by algebra, and
# check it on the three actions. Why do methods not use it?
#
# **Exercise 2** (★★☆, 15 minutes). How noisy is each gradient *at the end* of training? Put a `TabularPolicy` at $\pi^*$, with the KL in
# the reward, and compute the noise of one completion with $b = 0$ and with $b = \mathbb{E}[R]$.
#
# **Exercise 3** (★★★, 20 minutes). Divide $r$ by its spread, and subtract $\beta k_1$ *after* the division. Then the law is
# $\mathrm{ref} \cdot e^{r/(\beta\sigma)}$, where $\sigma$ is the spread of $r$ under that very law. Settle three logits at $\beta$ = 2, 1.5
# and 0.8 and watch. What does `closed_form.collapse_threshold` say? What changes if $\beta k_1$ is subtracted *before* the division?
#
# ---
#
# ## Solutions
#
# **Solution 1.** The noise is $\mathbb{E}[(R - b)^2 \|s\|^2] - \|g\|^2$ with $s = \nabla\log\pi$, a parabola in $b$, lowest at
# $b = \mathbb{E}[R\,\|s\|^2] / \mathbb{E}[\|s\|^2]$: a mean reward in which rare completions, with their long gradients, count more. It
# takes the length of every single gradient, one backward pass per completion, and gains little.

# %%
three_scores = torch.eye(3) - pi
lengths = three_scores.pow(2).sum(1)
best_b = ((pi * R * lengths).sum() / (pi * lengths).sum()).item()


def three_noise(b):
    return (pi @ ((R - b) ** 2 * lengths) - (pi * (R - pi @ R)).pow(2).sum()).item()


for b in ((pi @ R).item(), best_b):
    print(f"b = {b:.3f}   noise {three_noise(b):.4f}")
assert three_noise(best_b) < min(three_noise(best_b + 0.01), three_noise(best_b - 0.01), three_noise((pi @ R).item()))
assert three_noise(best_b) > 0.9 * three_noise((pi @ R).item())

# %% [markdown]
# **Solution 2.** At $\pi^*$ the reward with the KL in it, $r - \beta\log\pi^*/\mathrm{ref} = \beta \log Z$, is the same everywhere.
# With a good baseline nothing is left, not even noise: RLOO can come to rest at $\pi^*$ itself. With $b = 0$ the noise stays. (GRPO's
# $k_3$ is outside the advantages, so its noise never ends either.)

# %%
for n in range(2):
    p = closed_form.tilt(law[n].numpy(), language.rewards[n].numpy(), beta)
    tabular, at_star = TabularPolicy(language, p), torch.tensor(p)
    all_logps = tabular.token_logps().sum(1)  # (C,)
    rows = torch.stack([torch.autograd.grad(logp, tabular.logits, retain_graph=True)[0].flatten() for logp in all_logps])  # (C, P)
    R_star = language.rewards[n] - beta * (at_star.log() - law[n].log())  # (C,)
    noises = []
    for b in (0.0, at_star @ R_star):
        estimates = (R_star - b)[:, None] * rows
        noises.append((at_star @ (estimates - at_star @ estimates).pow(2).sum(1)).item())
    print(f"prompt {n}: R from {R_star.min():.6f} to {R_star.max():.6f}   noise with b = 0: {noises[0]:.4f}, b = E[R]: {noises[1]:.1e}")
    assert R_star.std() < 1e-9 and noises[0] > 1e-4 and noises[1] < 1e-12

# %% [markdown]
# **Solution 3.** A smaller spread makes the reward count more, which sharpens the policy, which makes the spread smaller. Above the
# threshold the two find a balance. Below it they never do: the policy collapses onto the best action, whatever the KL says. The order of
# the two matters. If the KL is subtracted first, the division changes only the length of the step: $R = r - \beta k_1$ is the same for all
# actions at $\pi^*$ and nowhere else, so the policy rests at $\pi^*$ for every $\beta$.

# %%
threshold, _ = closed_form.collapse_threshold(ref.numpy(), r.numpy())
print(f"threshold: β = {threshold:.4f}")


def divided(beta):
    def loss_of(logps):
        p = logps.exp().detach()
        spread = (p @ (r - p @ r) ** 2).sqrt()
        return -((r - p @ r) / spread - beta * my_k1(logps, ref.log())).detach() * logps

    return settle(loss_of, steps=4000, lr=0.2)


for beta in (2.0, 1.5, 0.8):
    end, balanced = divided(beta), closed_form.std_normalised_law(ref.numpy(), r.numpy(), beta)
    print(f"β = {beta}: {end.numpy().round(4)}   the law: {'none' if balanced is None else balanced.round(4)}")
    if balanced is not None:
        torch.testing.assert_close(end, torch.tensor(balanced), atol=1e-5, rtol=0)
    assert (balanced is None) == (beta < threshold) == (end[2].item() > 0.99)
