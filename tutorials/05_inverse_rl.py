# %% [markdown]
# # 05 · Inverse RL: the reward behind the demonstrations
#
# **You will hold** the losses of three methods, one or two lines each, proved equal to the project's: RFT, IRFT (with SPIN inside) and
# iterative IRL. And a triangle that shows where each of them comes to rest, computed beforehand. One of them never rests.
#
# **Minutes:** 45 to read, about 10 seconds of CPU to run. **You need:** tutorial 04 (SFT ends at the law of the demonstrations), and what a
# KL divergence is. Paper and pencil help: everything happens on three actions.
#
# Lines marked `# watch: name (shape)` are good places for a breakpoint. `B` pairs of a demonstration and an own answer.

# %%
import math
import sys
from pathlib import Path

# The project is not installed, it runs from its checkout: find the folder above this file (or above the notebook) that holds it.
ROOT = next(folder for folder in Path(globals().get("__file__", "here")).resolve().parents if (folder / "minialign").is_dir())
sys.path.insert(0, str(ROOT))

import matplotlib
import torch
from torch.nn.functional import softplus

from minialign.methods.irft import irft_loss
from minialign.methods.irl import irl_loss
from minialign.methods.rft import reward_alignment_loss
from toy import closed_form

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # a script draws into a file: no window to close, no screen needed
import matplotlib.pyplot as plt

torch.set_default_dtype(torch.float64)  # so that "equal" can mean twelve digits


def show(vector, digits=4):
    return "[" + " ".join(f"{number:.{digits}f}" for number in vector.tolist()) + "]"


def assert_law(policy, law, atol=1e-10):
    torch.testing.assert_close(policy, torch.as_tensor(law), atol=atol, rtol=0)


# %% [markdown]
# ## The question
#
# Tutorial 04 ended with a complaint. SFT copies what was shown. It cannot tell an answer that is bad from one that nobody happened to
# show, because it has no *reward*. But the expert who wrote the demonstrations had something in mind. Can we recover a reward from
# demonstrations alone, follow it, and end at a better policy than SFT?
#
# Two papers say yes: "Getting More Juice Out of the SFT Data" (Li et al. 2024; RFT and IRFT) and "From Demonstrations to Rewards"
# (iterative IRL). Their algorithms are for language models. With three actions each of them can be solved on paper, so we can see
# what they do when nothing is noisy and nothing is stopped early.
#
# ## The equation
#
# One prompt, three completions $y_1, y_2, y_3$. The letters: $\pi$ the policy, $\mathrm{ref}$ the policy before training, $E$ the law of
# the expert, $r$ a reward for each completion, $\beta$ the pull to $\mathrm{ref}$. **From a reward to a policy**: the best policy that is
# held to the reference,
#
# $$\pi_r = \arg\max_\pi \; \mathbb{E}_\pi[r] - \beta\,\mathrm{KL}(\pi\|\mathrm{ref})
#   \quad\Longrightarrow\quad \pi_r(y) = \frac{\mathrm{ref}(y)\, e^{r(y)/\beta}}{Z} .$$
#
# **And back**: take the logarithm. Every policy is the best one for some reward, and that reward is known up to a constant:
#
# $$r(y) = \beta \log \frac{\pi(y)}{\mathrm{ref}(y)} + \mathrm{const} .$$
#
# **Inverse RL** asks for the reward under which the demonstrations are likeliest:
#
# $$\max_r \; \ell(r) = \sum_y E(y) \log \pi_r(y) .$$

# %% [markdown]
# ## The tiniest numbers
#
# A reference that is *not* uniform and a $\beta$ that is *not* 1. That is no decoration: forget a $1/\beta$ or a reference, and with
# $\beta = 1$ and a uniform reference nothing changes. The expert prefers $y_3$, which the reference likes least.

# %%
ref = torch.tensor([0.5, 0.3, 0.2])
E = torch.tensor([0.1, 0.2, 0.7])
BETA = 0.6


def policy_of(reward, ref=ref, beta=BETA):
    """From a reward (3,) to its best policy (3,)."""
    return (ref.log() + reward / beta).softmax(0)


def reward_of(policy, ref=ref, beta=BETA):
    """And back; the constant is chosen so that y1 has reward 0."""
    reward = beta * (policy / ref).log()
    return reward - reward[0]


# By hand: let e^{r/β} be 1, 2 and 5. The weights ref·e^{r/β} are .5, .6 and 1, their sum is 2.1.
r = BETA * torch.tensor([1.0, 2.0, 5.0]).log()
print("r              ", show(r))
print("π_r            ", show(policy_of(r)), "= .5, .6, 1, divided by 2.1")
print("back           ", show(reward_of(policy_of(r))))
print("r + 7 gives    ", show(policy_of(r + 7)))
torch.testing.assert_close(policy_of(r), torch.tensor([0.5, 0.6, 1.0]) / 2.1)
torch.testing.assert_close(reward_of(policy_of(r)), r)
torch.testing.assert_close(policy_of(r + 7), policy_of(r))  # a constant is free
assert_law(policy_of(r), closed_form.tilt(ref.numpy(), r.numpy(), BETA))

r_of_E = reward_of(E)
print("reward behind E", show(r_of_E), "= β·log(E/ref), shifted to 0 at y1")
torch.testing.assert_close(policy_of(r_of_E), E)

# %% [markdown]
# The last line settles the question on three actions, in advance: there is a reward behind $E$, and its best policy is $E$. More than
# the expert is not in it. Keep this in mind when a method promises more.
#
# ## Demonstrations carry a reward
#
# The gradient of the likelihood: $\log\pi_r = \log\mathrm{ref} + r/\beta - \log Z$ and $\partial \log Z/\partial r(y) = \pi_r(y)/\beta$, so
#
# $$\frac{\partial \ell}{\partial r(y)} = \frac{E(y) - \pi_r(y)}{\beta} .$$
#
# Raise the reward of what the expert does, lower it for what the policy does. No answer has to be called bad: the policy's own answers
# are the other side. Check it against finite differences, which know nothing of this algebra.


# %%
def likelihood(reward, beta=BETA):
    return E @ policy_of(reward, beta=beta).log()


def finite_differences(f, at, size=1e-5):
    """(f(at + size·e) − f(at − size·e)) / 2·size, for each coordinate."""
    return torch.stack([(f(at + size * e) - f(at - size * e)) / (2 * size) for e in torch.eye(3)])


numeric = finite_differences(likelihood, r)
print("finite differences", show(numeric, 8))
print("(E − π_r)/β       ", show((E - policy_of(r)) / BETA, 8))
torch.testing.assert_close(numeric, (E - policy_of(r)) / BETA, atol=1e-8, rtol=0)

# %% [markdown]
# This is **Lemma 3.1** of the first paper. It writes $\ell$, up to a term without $r$, as a minimum over policies,
#
# $$\ell(r) - \sum_y E(y) \log \mathrm{ref}(y) \;=\; \min_\pi \;
#   \mathbb{E}_{y \sim E,\; \tilde y \sim \pi}\!\left[ \frac{r(y) - r(\tilde y)}{\beta} \right] + \mathrm{KL}(\pi\|\mathrm{ref}) ,$$
#
# whose minimiser is $\pi_r$. At a minimum the minimiser may be held fixed while the rest is differentiated, and what remains is the
# gradient above. Both halves, in numbers:


# %%
def inside(reward, policy, beta=BETA):
    """What stands behind min_π."""
    return (E @ reward - policy @ reward) / beta + policy @ (policy / ref).log()


left = likelihood(r) - E @ ref.log()
generator = torch.Generator().manual_seed(0)
others = torch.rand(1000, 3, generator=generator).log().mul(2).softmax(1)  # watch: others (1000, 3), policies from all over the triangle
lowest = min(inside(r, policy).item() for policy in others)
print(f"left side {left:.6f}   at π_r {inside(r, policy_of(r)):.6f}   lowest of 1000 other policies {lowest:.6f}")
torch.testing.assert_close(left, inside(r, policy_of(r)))
assert lowest > left

held = policy_of(r)  # held fixed: the differences move r only
torch.testing.assert_close(finite_differences(lambda reward: inside(reward, held), r), numeric, atol=1e-8, rtol=0)
wrong_policy = finite_differences(lambda reward: inside(reward, ref), r)
print("with ref held in place of π_r, the gradient is", show(wrong_policy), "instead of", show(numeric))
assert (wrong_policy - numeric).abs().max() > 0.1  # only the minimiser will do

# %% [markdown]
# The last lines are a warning: the own answers must come from the policy that follows the *present* reward. We break this later.
#
# ## Build it yourself
#
# Three losses for pairs of a demonstration $y$ and an own answer $\tilde y$.
#
# $$\begin{array}{lll}
# \text{RFT} & -\frac1\beta\,\big(r(y) - r(\tilde y)\big) & \text{the lemma; the reward is a model of its own} \\
# \text{IRFT} & h\!\left(\beta \log\frac{\pi(y)}{\mathrm{ref}(y)} - \beta \log\frac{\pi(\tilde y)}{\mathrm{ref}(\tilde y)}\right)
#   & \text{the policy is its own reward, by the way back} \\
# \text{IRL} & h\big((r - r_\text{before})(y) - (r - r_\text{before})(\tilde y)\big) & \text{Bradley-Terry on what a round adds}
# \end{array}$$
#
# with $h(z) = -z$ ("identity") or $h(z) = \log(1 + e^{-z})$ ("logistic", Bradley-Terry's). The unknown constants of $r$ cancel in every
# difference, and so does $Z$. That is why all of them work with pairs.


# %%
def my_alignment_losses(demo_rewards, sample_rewards, beta):
    """RFT. All inputs (B,) -> the loss of each pair (B,)."""
    return -(demo_rewards - sample_rewards) / beta


def my_irft_losses(demo_logps, sample_logps, ref_demo_logps, ref_sample_logps, beta, h="logistic"):
    """IRFT. All inputs (B,) -> (B,)."""
    margin = beta * (demo_logps - ref_demo_logps) - beta * (sample_logps - ref_sample_logps)  # watch: margin (B,)
    return softplus(-margin) if h == "logistic" else -margin  # softplus(z) = log(1 + e^z)


def my_irl_losses(demo_rewards, sample_rewards, base_demo_rewards, base_sample_rewards):
    """Iterative IRL. All inputs (B,); base: the reward when the round began, or 0 -> (B,)."""
    return softplus(-((demo_rewards - base_demo_rewards) - (sample_rewards - base_sample_rewards)))


# %% [markdown]
# ## Checkpoint
#
# On random numbers, values and gradients equal the project's.

# %%
a, b, c, d = torch.randn(4, 16, generator=generator)
a.requires_grad_(), b.requires_grad_()
pairs = [
    (my_alignment_losses(a, b, BETA), reward_alignment_loss(a, b, beta=BETA)),
    (my_irft_losses(a, b, c, d, BETA), irft_loss(a, b, c, d, beta=BETA)),
    (my_irft_losses(a, b, c, d, BETA, h="identity"), irft_loss(a, b, c, d, beta=BETA, h="identity")),
    (my_irl_losses(a, b, c, d), irl_loss(a, b, c, d)),
]
for mine, (theirs, _) in pairs:
    torch.testing.assert_close(mine.mean(), theirs)
    for x, y in zip(torch.autograd.grad(mine.mean(), (a, b)), torch.autograd.grad(theirs, (a, b)), strict=True):
        torch.testing.assert_close(x, y)
print("reward_alignment_loss, irft_loss (both h), irl_loss: equal to minialign's")

# %% [markdown]
# With three actions there are nine pairs, so expectations are sums. A little machinery:

# %%
DEMO, SAMPLE = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])  # all pairs (9,)


def expected(losses, demo_law, sample_law):
    """Σ demo_law(y)·sample_law(ỹ)·loss(y, ỹ); losses (9,)."""
    return (demo_law[DEMO] * sample_law[SAMPLE]) @ losses


def gradient(loss_of, at):
    at = at.detach().requires_grad_()
    return torch.autograd.grad(loss_of(at), at)[0]


def rft_gradient(reward, demo_law, sample_law, beta=BETA):
    return gradient(lambda x: expected(my_alignment_losses(x[DEMO], x[SAMPLE], beta), demo_law, sample_law), reward)


torch.testing.assert_close(-rft_gradient(r, E, policy_of(r)), (E - policy_of(r)) / BETA)  # RFT's loss is the lemma

# %% [markdown]
# ## RFT: take turns
#
# Algorithm 1 of the first paper: move the reward by the gradient, let the policy follow it, again. Here the policy follows exactly,
# $\pi \propto \mathrm{ref}\,e^{r/\beta}$, after each step of the reward. Steps are measured in $r/\beta$, which is what the policy sees.


# %%
def my_rft(demo_law, ref=ref, beta=BETA, bounds=(-math.inf, math.inf), steps=400, size=2.0, follow=policy_of, answers_of=None):
    """The policies on the way (steps + 1, 3), by exact expectations. answers_of: who writes the own answers; the policy, unless told."""
    reward, path = torch.zeros(3), [follow(torch.zeros(3), ref, beta)]
    for _ in range(steps):
        own = path[-1] if answers_of is None else answers_of
        reward = reward - size * beta**2 * rft_gradient(reward, demo_law, own, beta)
        reward = reward.clamp(*bounds)  # watch: reward (3,)
        path.append(follow(reward, ref, beta))
    return torch.stack(path)


def kl_to(policy, law=E):
    """KL(law ‖ policy)."""
    return (law * (law / policy).log()).sum().abs().item()  # abs: a rounding error below 0 would print a minus


unbounded = my_rft(E)
print("RFT ends at", show(unbounded[-1], 8), "  E", show(E, 8), f"  its reward is E's: {show(reward_of(unbounded[-1]))}")
assert_law(unbounded[-1], E)
torch.testing.assert_close(reward_of(unbounded[-1]), r_of_E)

# %% [markdown]
# At the expert, where SFT ends too. Not only that: step by step the policy is *the same*. One step adds $\mathrm{size} \cdot (E - \pi)$
# to $r/\beta$, which stands inside the softmax, exactly where SFT adds it to the logits.

# %%
path = my_rft(E, size=0.2, steps=400)
sft_logits, sft_path = ref.log(), [ref]
for _ in range(400):
    sft_logits = sft_logits + 0.2 * (E - sft_logits.softmax(0))  # tutorial 04: minus the gradient of −Σ E log π
    sft_path.append(sft_logits.softmax(0))
torch.testing.assert_close(path, torch.stack(sft_path), atol=1e-12, rtol=0)

distances = torch.tensor([kl_to(policy) for policy in path])
print("KL(E ‖ π) after 0, 10, 100, 400 steps:", [f"{distances[k]:.1e}" for k in (0, 10, 100, 400)], "  largest gap to SFT's path",
      f"{(path - torch.stack(sft_path)).abs().max():.0e}")
assert (distances.diff() < 0).all()  # it only falls

# %% [markdown]
# So without noise, with a reward that is free at every action, inverse RL **is** SFT by another road. What may differ is what
# the paper's Example 1 puts in: *a bound*.
#
# ### One demonstration and a bound
#
# The reference is uniform, the only demonstration is $y_3$, and rewards must lie in $[0, R]$. SFT drives $y_3$ to 1. The gradient
# $(E - \pi)/\beta$ pushes $r(y_3)$ up and the two others down at every policy, so they stop at the bounds: $r = (0, 0, R)$ and
#
# $$\pi = \left( \frac{1}{2 + e^{R/\beta}},\; \frac{1}{2 + e^{R/\beta}},\; \frac{e^{R/\beta}}{2 + e^{R/\beta}} \right) .$$
#
# The paper's Table 1 prints $\frac{2}{2 + e^{R/\beta}}$ for each unseen action. Sum it.

# %%
uniform, only_y3 = torch.ones(3) / 3, torch.tensor([0.0, 0.0, 1.0])
print("R/β       y1       y2       y3   |  as printed: y1, y2      sum")
for x in (0.5, 1.0, 2.0, 4.0):
    bounded = my_rft(only_y3, uniform, bounds=(0, x * BETA))[-1]
    e = math.exp(x)
    printed = torch.tensor([2, 2, e]) / (2 + e)
    print(f"{x:3.1f}  " + "  ".join(f"{p:7.5f}" for p in bounded.tolist()) + f"   |          {printed[0]:7.5f}       {printed.sum():7.5f}")
    assert_law(bounded, closed_form.table_1(x))
    assert_law(bounded, torch.tensor([1, 1, e]) / (2 + e))
    assert printed.sum() > 1.03

# %% [markdown]
# Take the bound away, and the mass on unseen actions leaves. These are the very numbers of tutorial 04 (steps of 0.1 there, too):

# %%
path = my_rft(only_y3, uniform, size=0.1, steps=1000)
for steps, expected_value in ((10, 0.540064), (100, 0.925654), (1000, 0.993159)):
    print(f"no bound, {steps:4} steps: π(y3) = {path[steps, 2]:.6f}")
    torch.testing.assert_close(path[steps, 2].item(), expected_value, atol=1e-6, rtol=0)

# %% [markdown]
# So it is **the bound that regularises**, not inverse RL. (Stopping early does it as well, for SFT too.) This matters more than a toy
# suggests: real data shows *one* demonstration a prompt, so on the training prompts every $E$ is a corner.
#
# With any expert and any reference the bound keeps $r/\beta$ within a window of width $x = R/\beta$. An action that comes to rest inside
# the window has exactly $E$'s probability ($y_2$ below, at $R/\beta = 2$); the others stop at its edges. If the window is wide enough for
# all of them, the bound does nothing. `closed_form.demonstration_law` derives it.

# %%
for x in (1.0, 2.0, 3.0):
    bounded = my_rft(E, bounds=(0, x * BETA))[-1]
    print(f"E, R/β = {x:.0f}: {show(bounded)}   KL(E ‖ π) = {kl_to(bounded):.4f}")
    assert_law(bounded, closed_form.demonstration_law(E.numpy(), ref.numpy(), x))
bounded_one = {x: my_rft(only_y3, bounds=(0, x * BETA))[-1] for x in (1, 2, 4)}  # one demonstration, our reference: for the figure
for x, policy in bounded_one.items():
    assert_law(policy, closed_form.demonstration_law(only_y3.numpy(), ref.numpy(), x))

# %% [markdown]
# ### With samples
#
# Nothing above was random. The algorithm itself draws a demonstration and an own answer for each step of the reward, and
# the policy follows after every $K$ of them.


# %%
def algorithm_1(demo_law, ref, *, rounds, K=10, B=1, size=0.1, bounds=(-math.inf, math.inf), decay=False):
    """RFT as it is run: sampled pairs; the policy follows after K steps of the reward. Returns the last policy (3,)."""
    reward, policy = torch.zeros(3), ref
    for t in range(rounds):
        demos = torch.multinomial(demo_law, K * B, replacement=True, generator=generator).view(K, B)
        own = torch.multinomial(policy, K * B, replacement=True, generator=generator).view(K, B)
        for y, y_own in zip(demos, own, strict=True):  # watch: y, y_own (B,)
            step = gradient(lambda x, y=y, y_own=y_own: my_alignment_losses(x[y], x[y_own], BETA).mean(), reward)
            lr = size * BETA**2 * (1 - t / rounds if decay else 1)
            reward = (reward - lr * step).clamp(*bounds)
        policy = policy_of(reward, ref)  # the policy step
    return policy


sampled_one = algorithm_1(only_y3, uniform, rounds=50, bounds=(0, 2 * BETA))
sampled = algorithm_1(E, ref, rounds=200, B=16, decay=True)
print("one demonstration, R/β = 2, sampled", show(sampled_one), "  exactly Table 1: the bound absorbs the noise")
print("E, no bound, sampled               ", show(sampled), "  E within the noise")
assert_law(sampled_one, closed_form.table_1(2.0))
assert_law(sampled, E, atol=0.03)

# %% [markdown]
# ## A lemma for the rest
#
# The linear loss $h(z) = -z$ has no lowest point; only the alternation makes it rest. Bradley-Terry's $h(z) = \log(1 + e^{-z})$ has one.
# Let demonstrations come from $E$ and the other answers from *any* law $q$. Which scores $f$ are best?
#
# $$\arg\min_f \; \mathbb{E}_{y \sim E,\; \tilde y \sim q} \log\!\big(1 + e^{-(f(y) - f(\tilde y))}\big)
#   \;=\; \log \frac{E}{q} + \mathrm{const} .$$
#
# *Proof.* Take two actions $a$ and $b$. The pair occurs as ($a$ shown, $b$ sampled) with weight $E_a q_b$, and the other way round with
# $E_b q_a$. That is a coin, predicted by $\sigma(f_a - f_b)$, and the best prediction is the coin's own odds:
# $e^{f_a - f_b} = E_a q_b / E_b q_a$. All pairs agree on $f = \log E/q$, so no pair has to give way.
#
# The scores tell the expert from the sampler. They speak of $q$, whoever that is. Remember that.


# %%
def minimise(loss_of, at):
    """Newton's method for convex losses. A constant added to all three changes nothing: the matrix of ones fixes it."""
    for _ in range(100):
        g = gradient(loss_of, at)
        if g.abs().max() < 1e-15:
            break
        step = torch.linalg.solve(torch.autograd.functional.hessian(loss_of, at) + torch.ones(3, 3), g)
        at = at - step / max(1.0, step.abs().max().item())  # far out the curvature says little: at most one nat a step
    return at


def arg_min(sampler, base=None):
    """The reward (3,) of lowest IRL loss against answers from `sampler`."""
    base = torch.zeros(3) if base is None else base
    return minimise(lambda x: expected(my_irl_losses(x[DEMO], x[SAMPLE], base[DEMO], base[SAMPLE]), E, sampler), base)


for name, q in (("ref", ref), ("uniform", uniform), ("E itself", E)):
    scores = arg_min(q)
    print(f"against {name:9}", show(scores - scores[0]), "  log E/q", show((E / q).log() - (E / q).log()[0]))
    torch.testing.assert_close(scores - scores[0], (E / q).log() - (E / q).log()[0], atol=1e-9, rtol=0)

# %% [markdown]
# ## IRFT: the policy is its own reward
#
# Two models are one too many, says Algorithm 2. By the way back, a policy *has* a reward, $\beta \log \pi/\mathrm{ref}$. So train the
# policy on it directly. Two choices are left: who writes the own answers (fresh from $\pi$, or stale from an earlier policy), and which
# reference. And $h$.
#
# First $h(z) = -z$. The $\log\mathrm{ref}$ has no gradient, and in the logits both $\nabla\log\pi$ have the same $-\pi$, which cancels:


# %%
def irft_gradient(logits, sampler, ref, h="logistic", beta=BETA):
    def loss_of(z):
        logps, ref_logps = z.log_softmax(0), ref.log()
        return expected(my_irft_losses(logps[DEMO], logps[SAMPLE], ref_logps[DEMO], ref_logps[SAMPLE], beta, h), E, sampler)

    return gradient(loss_of, logits)


somewhere = torch.tensor([0.4, 0.35, 0.25])
for name, sampler in (("fresh answers", somewhere), ("answers of ref", ref)):
    for given in (ref, uniform):
        torch.testing.assert_close(irft_gradient(somewhere.log(), sampler, given, "identity"), BETA * (sampler - E))
    print(f"identity, {name:15}", show(irft_gradient(somewhere.log(), sampler, ref, "identity")), " = β·(sampler − E)")
print("SFT                      ", show(somewhere - E))
z = ref.log()
for _ in range(25):
    z = z - 0.1 * irft_gradient(z, ref, ref, "identity")
assert_law(z.softmax(0), closed_form.identity_round(E.numpy(), ref.numpy(), 25 * 0.1 * BETA))
assert_law(z.softmax(0), (ref.log() - 25 * 0.1 * BETA * (ref - E)).softmax(0))  # one step of SFT, 25 times as long (times β)
torch.testing.assert_close(irft_gradient(somewhere.log(), somewhere, somewhere), BETA / 2 * (somewhere - E))

# %% [markdown]
# With fresh answers the expected gradient is $\beta\,(\pi - E)$, which is SFT's times $\beta$. **SFT in disguise**, with more noise:
# the own answers cancel on average. With stale answers the direction stays the same for a round, so the round is one long step of SFT.
# The logistic $h$ with fresh answers and a reference equal to the policy is no better (last line of the cell): SFT times $\beta/2$.
#
# Beyond the length of its steps, what IRFT adds can only come from the bend of $h$ where margins are not 0. That takes a reference that
# stays behind.
#
# Now those. **Fresh answers, fixed reference, logistic $h$.** Where it rests, the lemma holds with $q = \pi$ and
# $f = \beta\log\pi/\mathrm{ref}$:
#
# $$\beta \log\frac{\pi}{\mathrm{ref}} = \log\frac{E}{\pi} + \mathrm{const}
#   \quad\Longrightarrow\quad \pi \propto E^{\frac{1}{1+\beta}}\, \mathrm{ref}^{\frac{\beta}{1+\beta}} ,$$
#
# a geometric mixture: held back by the reference, it never gets to $E$.


# %%
def settle(gradient_of, logits, size):
    """Follow an expected gradient until nothing moves."""
    for _ in range(5000):
        step = size * gradient_of(logits)
        if step.abs().max() < 1e-13:
            break
        logits = logits - step
    return logits.softmax(0)


mixture = settle(lambda z: irft_gradient(z, z.softmax(0), ref), ref.log(), 4 / BETA / (1 + BETA))
refreshed = settle(lambda z: irft_gradient(z, z.softmax(0), z.softmax(0)), ref.log(), 4 / BETA)
print("fresh answers, fixed reference     ", show(mixture), f"  KL(E ‖ π) = {kl_to(mixture):.4f}")
print("fresh answers, reference = policy  ", show(refreshed), f"  KL(E ‖ π) = {kl_to(refreshed):.4f}   (β/2 times SFT: at E)")
assert_law(mixture, closed_form.geometric_mixture(E.numpy(), ref.numpy(), BETA))
assert_law(refreshed, E)

# %% [markdown]
# **Stale answers, one round until it converges.** This is one iteration of SPIN (Chen et al. 2024): sample once from $\mathrm{ref}$, train
# to the end. The lemma with $q = \mathrm{ref}$:
#
# $$\beta \log\frac{\pi}{\mathrm{ref}} = \log\frac{E}{\mathrm{ref}} + \mathrm{const}
#   \quad\Longrightarrow\quad \pi \propto \mathrm{ref} \left(\frac{E}{\mathrm{ref}}\right)^{1/\beta} .$$


# %%
def irft_round(sampler, ref, beta=BETA):
    """Train on answers of `sampler` until the loss is lowest: the policy (3,)."""

    def loss_of(z):
        logps, ref_logps = z.log_softmax(0), ref.log()
        return expected(my_irft_losses(logps[DEMO], logps[SAMPLE], ref_logps[DEMO], ref_logps[SAMPLE], beta), E, sampler)

    return minimise(loss_of, ref.log()).softmax(0)


spin = irft_round(ref, ref)
print("E                 ", show(E))
for beta in (2.0, 1.0, BETA, 0.3, 0.1):
    end = irft_round(ref, ref, beta)
    print(f"SPIN, β = {beta:3.1f}     ", show(end), f"  KL(E ‖ π) = {kl_to(end):7.4f}")
    assert_law(end, closed_form.converged_round(E.numpy(), ref.numpy(), ref.numpy(), beta), atol=1e-8)
    assert (end[2] > E[2] + 1e-3) == (beta < 1)

# %% [markdown]
# With $\beta = 1$ one round lands on the expert. With $\beta < 1$ it goes **beyond**: what the expert does more often than the reference is
# overdone, what it does less often dies. $\beta = 0.1$, SPIN's own value, leaves $y_3$ alone. A metric such as "how far is the good answer
# above the bad one" applauds. The distance to the expert does not.
#
# Is it wrong? If demonstrations are the good behaviour with some bad mixed in, going on in the direction from $\mathrm{ref}$ to $E$ may be
# what you want. But know that it is extrapolation, and that training long enough carries it out to the end.
#
# ### All on one line
#
# Three laws, and each is of the form $\mathrm{ref} \cdot (E/\mathrm{ref})^s$: the reward is a multiple of $\log E/\mathrm{ref}$. So where
# one of these methods rests is a single number, $s$:
#
# | $s$ | policy | who lands there |
# | --- | --- | --- |
# | $0$ | $\mathrm{ref}$ | |
# | $1/(1+\beta)$ | geometric mixture | IRFT, fresh answers, fixed reference |
# | $1$ | $E$ | SFT; RFT without a bound |
# | $1/\beta$ | beyond $E$ if $\beta < 1$ | SPIN, one round |


# %%
def on_the_line(s):
    return (ref.log() + s * (E / ref).log()).softmax(0)


def position(policy):
    """s of a policy on the line: how much of log E/ref it contains, measured between y1 and y3."""
    whole, part = (E / ref).log(), (policy / ref).log()
    return ((part[2] - part[0]) / (whole[2] - whole[0])).item()


for name, policy, s in (("ref", ref, 0.0), ("mixture", mixture, 1 / (1 + BETA)), ("E", E, 1.0), ("SPIN", spin, 1 / BETA)):
    print(f"{name:8} s = {position(policy):.4f}   expected {s:.4f}")
    assert_law(policy, on_the_line(s))
    assert abs(position(policy) - s) < 1e-9

# %% [markdown]
# ## Iterative IRL: the loop that swings
#
# The second paper goes back to a reward model, and trains it with Bradley-Terry: tell the demonstrations from the policy's own answers,
# *to the minimum*, then follow the reward from $\mathrm{ref}$, then a new reward, and so on. Its Algorithm 1 has $\beta = 1$.
#
# Round 1. Own answers of $\mathrm{ref}$. By the lemma $r = \log E/\mathrm{ref}$, and the policy becomes $\mathrm{ref}\,e^{r} = E$. Done, in
# one round.
#
# Round 2. Own answers of $E$. Nothing tells them from demonstrations, so $r = \log E/E = 0$. The policy follows this reward from
# $\mathrm{ref}$ and becomes $\mathrm{ref}\,e^0 = \mathrm{ref}$. Back to the start.


# %%
def my_irl(beta, rounds, mode):
    """Exact rounds; the policies (rounds + 1, 3). literal: every reward from nothing. accumulate: on top of the one before."""
    reward, path = torch.zeros(3), [ref]
    for _ in range(rounds):
        base = reward if mode == "accumulate" else torch.zeros(3)
        reward = arg_min(path[-1], base)  # watch: reward (3,)
        path.append(policy_of(reward, ref, beta))
    return torch.stack(path)


swing = my_irl(beta=1.0, rounds=8, mode="literal")
for k, policy in enumerate(swing[:6]):
    print(f"β = 1, round {k}: {show(policy)}   KL(E ‖ π) = {kl_to(policy):.4f}")
for k, policy in enumerate(swing):
    assert_law(policy, ref if k % 2 == 0 else E, atol=1e-7)

# %% [markdown]
# It swings with period 2, for ever. The reward of round 2 is not wrong about its question, "who is this sampler, compared to the
# expert?". It is used for another question, "what should $\mathrm{ref}$ change?".
#
# For other $\beta$, put $\pi \propto \mathrm{ref}\,(E/\mathrm{ref})^s$ into the round:
#
# $$\text{literal:}\quad s \leftarrow \frac{1 - s}{\beta}, \qquad\qquad
#   \text{accumulate:}\quad s \leftarrow s + \frac{1 - s}{\beta} .$$
#
# The first has its fixed point at the mixture, $s = \frac{1}{1+\beta}$, and multiplies the distance to it by $-\frac1\beta$ in every
# round. It settles there for $\beta > 1$, and for $\beta < 1$ it swings ever wider. The second is the repair: *add* the new reward to the
# old one. Its fixed point is $s = 1$, the expert, and the factor is $1 - \frac1\beta$: it settles for every $\beta > \frac12$.

# %%
print("s after round           0      1      2      3      4      5      6")
for beta, mode in ((2.0, "literal"), (1.0, "literal"), (BETA, "literal"), (2.0, "accumulate"), (1.0, "accumulate"), (BETA, "accumulate")):
    rounds = 4 if (beta, mode) == (BETA, "literal") else 6  # after that its probabilities leave float64
    places, s = [position(policy) for policy in my_irl(beta, rounds, mode)], 0.0
    print(f"{mode:10} β = {beta:3.1f}   " + " ".join(f"{place:6.3f}" for place in places))
    law = closed_form.rounds_law(E.numpy(), ref.numpy(), beta, rounds, ref_update=mode == "accumulate")
    assert_law(my_irl(beta, rounds, mode)[1:], law, atol=1e-6)
    for place in places:
        assert abs(place - s) < 1e-4
        s = (1 - s) / beta if mode == "literal" else s + (1 - s) / beta

# %% [markdown]
# Another repair needs no new idea: the *linear* gradient. It does not ask for an arg min; its steps are small and the reward goes on. That
# is RFT, which went to $E$ without a swing. (Bradley-Terry in small steps, the reward going on from round to round, does not swing
# either. Real runs are nearer to that, which may be why the swing is seldom seen. But it rests at the mixture, not at $E$: exercise 2.)
#
# SPIN in rounds, each from the last one's policy as reference, is the second recursion again: adding log-ratios is adding rewards.

# %%
policy, spin_rounds = ref, [ref]
for _ in range(6):
    policy = irft_round(policy, policy)  # both the sampler and the reference are renewed
    spin_rounds.append(policy)
assert_law(torch.stack(spin_rounds), my_irl(BETA, 6, "accumulate"), atol=1e-8)
print("SPIN, π(y3) round by round:", show(torch.stack(spin_rounds)[:, 2]), "  the same as IRL that accumulates")

# %% [markdown]
# ## The figure
#
# Left: every policy is a point of a triangle; the nearer a corner, the likelier that action. Right: the probability of $y_3$, round by
# round.

# %%
DARK, BLUE, RED, GREEN, GREY, ORANGE = "#1b2a41", "#2a6f97", "#d1495b", "#3a7d44", "#8a93a0", "#e08e2b"
CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])


def xy(policies):
    """(..., 3) -> the horizontal and the vertical coordinate, (2, ...)."""
    return torch.movedim(policies @ CORNERS, -1, 0)


figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.4), dpi=150, width_ratios=[1, 1.05])
left.plot(*xy(torch.eye(3)[[0, 1, 2, 0]]), color=DARK, linewidth=1)
for label, x, y in (("$y_1$", -0.04, -0.02), ("$y_2$", 1.04, -0.02), ("$y_3$", 0.5, 0.91)):
    left.text(x, y, label, ha="center", va="center", color=DARK, fontsize=13)

left.plot(*xy(torch.stack([on_the_line(s) for s in torch.linspace(0, 4, 200)])), color=GREY, linewidth=1.5, zorder=1)
left.plot(*xy(my_rft(E, size=0.05, steps=2000)), color=BLUE, linewidth=2.2, zorder=2)
one_demo = torch.stack([policy_of(BETA * torch.tensor([0, 0, x])) for x in torch.linspace(0, 5, 50)])
left.plot(*xy(one_demo), color=GREEN, linewidth=1.5, linestyle=(0, (4, 3)), zorder=1)


def point(policy, label, color, at, side, marker="o"):
    """A dot in the triangle and its name outside, joined by a thin line."""
    x, y = xy(policy).tolist()
    left.plot([x, at[0]], [y, at[1]], color=color, linewidth=0.7, zorder=1)
    left.plot(x, y, marker, color=color, markersize=9, zorder=4, markeredgecolor="white")
    left.text(at[0] + (0.01 if side == "left" else -0.01), at[1], label, color=color, ha=side, va="center", weight="bold")


point(spin, "SPIN, one round", ORANGE, (0.80, 0.80), "left")
point(E, "E: SFT, and RFT\nwithout a bound", BLUE, (0.80, 0.62), "left")
point(mixture, "IRFT, fresh answers,\nfixed reference", RED, (0.80, 0.44), "left")
point(ref, "ref", DARK, (0.27, 0.08), "right")
for x, policy in bounded_one.items():
    point(policy, f"R/β = {x}", GREEN, (0.14, xy(policy)[1].item()), "right", marker="s")
left.text(0.13, 0.905, "RFT with a bound,\nonly $y_3$ shown", color=GREEN, ha="right", va="center", weight="bold")
left.text(0.485, 0.27, "ref·(E/ref)$^s$", color=GREY, ha="left", va="center")
left.set(xlim=(-0.2, 1.2), ylim=(-0.06, 0.97), aspect="equal")
left.axis("off")
left.set_anchor("N")
left.set_title(f"Where they come to rest, β = {BETA}", color=DARK, loc="left", fontsize=12)

literal, accumulate, linear = my_irl(BETA, 4, "literal"), my_irl(BETA, 8, "accumulate"), my_rft(E, size=0.2, steps=80)[::10]
for law, label, height in ((E, "E", 0.7), (ref, "ref", 0.2)):
    right.plot([0, 8], [law[2]] * 2, color=DARK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    right.text(8.25, height, label, color=DARK, ha="left", va="center", weight="bold")
right.plot(range(5), literal[:, 2], "o--", color=RED, linewidth=1.2, markersize=4, alpha=0.75)
for path, color in ((swing, RED), (accumulate, ORANGE), (linear, BLUE)):
    right.plot(range(9), path[:, 2], "o-", color=color, linewidth=2.2)
for x, y, label, color, weight in ((3.15, 1.0, f"IRL literal, β = {BETA}: ever wider", RED, "normal"),
                                   (8.25, 0.27, "IRL literal, β = 1,\nas printed", RED, "bold"),
                                   (8.25, 0.80, f"IRL that accumulates;\nSPIN in rounds, β = {BETA}", ORANGE, "bold"),
                                   (8.25, 0.60, "RFT, linear gradient,\nten small steps a round", BLUE, "bold")):
    right.text(x, y, label, color=color, ha="left", va="center", weight=weight)
right.set(xlabel="rounds", ylabel="$\\pi(y_3)$", ylim=(-0.03, 1.05), xlim=(-0.2, 12.2), xticks=range(9))
right.spines["bottom"].set_bounds(0, 8)
right.xaxis.set_label_coords(8.4 / 2 / 12.4, -0.08)
right.set_title("Which of them swing", color=DARK, loc="left", fontsize=12)
right.spines[["top", "right"]].set_visible(False)
right.tick_params(colors=DARK)
figure.tight_layout(w_pad=3)
figure_path = Path("runs/tutorials/05_inverse_rl.png")  # below the folder you run from
figure_path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(figure_path)
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", figure_path)

# %% [markdown]
# Left: the grey curve is the line of one number $s$. SPIN, IRFT and the expert lie on it; RFT (blue) travels elsewhere and ends on it.
# The green squares are the only ones that depend on a bound: one demonstration of $y_3$, and the policy stops where $R$ says. Note what
# is *not* in the picture: a method that knows more about $y_1$ and $y_2$ than $E$ and $\mathrm{ref}$ do.
#
# Right: small steps of a likelihood walk to the expert. Arg mins jump. Forget the last jump and you swing; add to it and you spiral in.
#
# ### What is gained, then?
#
# On three actions, nothing that SFT does not have, except what one puts in by hand: a bound, a ridge, an early stop, a reference that
# holds. Two real reasons lie outside this toy. A reward model is a *network*: what it learns about one prompt it says about others, and
# about answers that nobody wrote. And a reward is an object of its own, to rank answers with, or to judge new policies. Whether that
# pays must be measured on held-out prompts, and beside the distance to the demonstrations, not instead of it.
#
# ## Break it on purpose, 1: lose β, or lose the reference
#
# $\beta = \frac12$, our reference. Two mistakes: the policy follows $\mathrm{ref} \cdot e^{r}$ (and IRFT's margin has no $\beta$); or
# the policy follows $e^{r/\beta}$ (and IRFT's margin has no $\log\mathrm{ref}$). Both are in print: Algorithm 1 has $\pi \propto e^r$, and
# Eq. 7 has the margin without $\beta$. In which of four methods do they show?


# %%
def four_ends(ref, beta, lost=""):
    """Where four methods rest; lost: "", "beta" or "ref"."""
    used_beta, used_ref = 1.0 if lost == "beta" else beta, uniform if lost == "ref" else ref

    def follow(reward, ref, beta):
        return policy_of(reward, used_ref, used_beta)

    return {
        "RFT, expert E, no bound": my_rft(E, ref, beta, follow=follow)[-1],
        "RFT, only y3, R/β = 2": my_rft(only_y3, ref, beta, bounds=(0, 2 * beta), follow=follow)[-1],
        "IRFT, fresh answers": settle(lambda z: irft_gradient(z, z.softmax(0), used_ref, beta=used_beta), ref.log(), 2.0),
        "SPIN, one round": irft_round(ref, used_ref, used_beta),
    }


right_ends, without_beta, without_ref = (four_ends(ref, 0.5, lost) for lost in ("", "beta", "ref"))
print(f"{'':26}{'right':25}{'no 1/β':25}no ref")
for name, end in right_ends.items():
    print(f"{name:26}{show(end)}  {show(without_beta[name])}  {show(without_ref[name])}")
    same = name == "RFT, expert E, no bound"
    assert (torch.allclose(end, without_beta[name]), torch.allclose(end, without_ref[name])) == (same, same)

assert_law(without_beta["RFT, only y3, R/β = 2"], closed_form.demonstration_law(only_y3.numpy(), ref.numpy(), 1.0))  # R, not R/β
assert_law(without_ref["RFT, only y3, R/β = 2"], closed_form.table_1(2.0))  # any reference is taken for a uniform one
assert_law(without_beta["IRFT, fresh answers"], closed_form.geometric_mixture(E.numpy(), ref.numpy(), 1.0))
assert_law(without_beta["SPIN, one round"], E, atol=1e-8)
for name, end in four_ends(ref, 1.0).items():
    assert_law(four_ends(ref, 1.0, "beta")[name], end)
for name, end in four_ends(uniform, 0.5).items():
    assert_law(four_ends(uniform, 0.5, "ref")[name], end)
print("with β = 1 the first mistake changes none of the four, with a uniform reference the second changes none")

# %% [markdown]
# The first row hides both: with a free reward the loop closes by itself. The reward learns whatever the policy step left out, and the
# policy ends at $E$, with the wrong reward behind it. Three rows show it, but only because $\beta \ne 1$ and the reference is not
# uniform. So choose the numbers of a test against the mistake you fear.
#
# (Lose the $1/\beta$ of RFT's *gradient* instead, and every row stays as it is: there it is only a step size. Finite differences see it.)

# %%
numeric, lost = finite_differences(lambda reward: likelihood(reward, beta=0.5), r), E - policy_of(r, beta=0.5)
print("finite differences / (E − π) =", show(numeric / lost))
torch.testing.assert_close(numeric / lost, torch.full((3,), 2.0), atol=1e-6, rtol=0)

# %% [markdown]
# ## Break it on purpose, 2: own answers of the old policy
#
# Sampling is dear, so sample once, from $\mathrm{ref}$, and train the reward on that. The linear gradient is then the same at every step,
# $(E - \mathrm{ref})/\beta$. Nothing tells it that the policy has arrived.

# %%
stale = my_rft(E, answers_of=ref, size=0.2, steps=400)
stale_distances = torch.tensor([kl_to(policy) for policy in stale])
nearest = int(stale_distances.argmin())
print("steps     own answers of ref              own answers of the policy")
for k in (0, 5, nearest, 30, 60, 400):
    print(f"{k:5}     {show(stale[k])} KL {stale_distances[k]:7.4f}   {show(sft_path[k])} KL {kl_to(sft_path[k]):.4f}")
assert 0 < nearest < 60 and stale_distances[nearest] < 0.05 and stale_distances[-1] > 5
assert (stale_distances[nearest:].diff() > 0).all()

bounded_stale = my_rft(E, answers_of=ref, bounds=(0, 2 * BETA))[-1]
print("with R/β = 2:", show(bounded_stale), " as if only y3 had been shown")
assert_law(bounded_stale, bounded_one[2])

# %% [markdown]
# It passes close to the expert, faster than the right algorithm, and leaves for the corner. With a bound it stops at an edge that knows
# only the *sign* of $E - \mathrm{ref}$. This is not always a mistake: it is Algorithm 1 with $T = 1$, which the paper's experiments use.
# But then the stopping time or the bound decides where it ends, and should be reported with the result.
#
# ## The same idea in the real methods
#
# For a language model $y$ is a text, the sums over pairs become batches, and $\log\pi$ comes from tutorial 03. Three files, the three
# losses from above:
#
# ```
# python -m minialign rft                                    # 4 rounds: a reward model by the linear loss, a policy that follows it by RLOO
# python -m minialign rft --rounds 1                         # own answers of ref only: "break it, 2", held by the bound
# python -m minialign rft --loss bt                          # Bradley-Terry in place of the linear loss
# python -m minialign irft                                   # SPIN: one round of stale answers
# python -m minialign irft --rounds 60 --ref initial         # 60 steps, 60 rounds: fresh answers, fixed reference
# python -m minialign irl --mode literal --rounds 6          # the printed loop
# python -m minialign irl --mode accumulate --rounds 6       # the repair
# ```
#
# Each runs on the built-in language of requests. Not one of the policy steps is exact there: the policy follows its reward by a few steps
# of RLOO (tutorial 07), PPO, GRPO or REBEL. And no reward goes all the way to its minimum: how much of the swing is left depends on how
# near a round comes to it. The bound is $r = R\,\sigma(\cdot)$ instead of a clip, so it is approached and not met.
#
# The knobs are those of this tutorial: `bound`, `ridge` (exercise 3), `rounds`, `ref`, `mode`. `--anchor current` holds IRL to the policy
# of the round before, as SPIN in rounds does. Watch `eval/nll`, the loss of demonstrations that were held out, beside every reward.
#
# ## Where to read on
#
# - `minialign/methods/rft.py`, `irft.py`, `irl.py`: the loss, `step`, `main`. Read `irft.py` first, it has one model less.
# - `toy/closed_form.py`: every law of this tutorial with its derivation. `python -m toy.three_actions` holds the project's losses to them.
# - `docs/ERRATA.md`: Table 1, the missing $\beta$, and $h = \log\sigma$, which read literally is a logarithm of a logarithm.
# - `tests/methods/test_irft.py`: the expected gradients again, on a GPT whose completions can be counted.
# - Tutorial 06, rewards, learns $r$ from comparisons instead of demonstrations: the same lemma, with labels. Tutorial 09 turns the way
#   back, $r = \beta\log\pi/\mathrm{ref}$, into DPO.
#
# ## Exercises
#
# **Exercise 1** (★☆☆, 5 minutes). How large must $R/\beta$ be for the bound to do nothing to our $E$ and $\mathrm{ref}$? Derive the number,
# and run `my_rft` a little below and a little above it.
#
# **Exercise 2** (★★☆, 15 minutes). Iterative IRL without the arg min: Bradley-Terry on the reward, one small step a round, the reward
# goes on from round to round, the policy follows exactly. Show with the lemma where it rests, then run it. Which method of this tutorial
# is it, with two models in place of one?
#
# **Exercise 3** (★★★, 20 minutes). Instead of a bound, make rewards cost something: add $c\,(r(y)^2 + r(\tilde y)^2)$ to RFT's loss. Show
# that it rests at $r = \frac{E - \pi}{2c\beta\,(E + \pi)}$ with $\pi \propto \mathrm{ref}\,e^{r/\beta}$. Run it with $c = 0.5$ for the
# expert $E$ and for one demonstration, and compare with `closed_form.ridge_law`. Does it keep mass on unseen actions?
#
# ---
#
# ## Solutions
#
# **Solution 1.** $E$ is reached if some reward within $[0, R]$ has it as its policy. That reward is $\beta\log E/\mathrm{ref}$ up to a
# constant; its values spread over $\beta\,(\log 3.5 - \log 0.2)$. So $R/\beta \ge \log 17.5 = 2.862$.

# %%
needed = ((E / ref).log().max() - (E / ref).log().min()).item()
print(f"R/β needed: {needed:.6f}")
torch.testing.assert_close(needed, math.log(17.5))
for x in (needed - 0.1, needed + 0.1):
    end = my_rft(E, bounds=(0, x * BETA))[-1]
    print(f"R/β = {x:.3f}: {show(end, 6)}")
    assert (kl_to(end) < 1e-12) == (x > needed)

# %% [markdown]
# **Solution 2.** Each step goes down the loss of the lemma with $q = \pi$, the present policy. At rest $r = \log E/\pi + \mathrm{const}$,
# and the policy follows this reward: $\beta\log\pi/\mathrm{ref} = \log E/\pi + \mathrm{const}$. That is IRFT's equation for fresh answers
# and a fixed reference: the geometric mixture, and no swing. In `minialign/methods/rft.py` it is `loss="bt"`.

# %%
reward, zeros = torch.zeros(3), torch.zeros(9)
for _ in range(3000):
    own = policy_of(reward)
    reward = reward - 0.5 * gradient(lambda x, q=own: expected(my_irl_losses(x[DEMO], x[SAMPLE], zeros, zeros), E, q), reward)
print("Bradley-Terry in small steps", show(policy_of(reward)), "  the mixture", show(mixture))
assert_law(policy_of(reward), mixture, atol=1e-9)

# %% [markdown]
# **Solution 3.** The expected loss is $-\frac1\beta\sum(E - \pi)\,r + c\sum(E + \pi)\,r^2$. Set its gradient in $r$ to zero, with $\pi$
# held fixed. Since $|E - \pi| \le E + \pi$, no reward exceeds $\frac{1}{2c\beta}$ either way. So the ridge is a soft bound, and yes, it
# keeps mass on unseen actions.

# %%
c = 0.5
for name, demo_law in (("E       ", E), ("only y3 ", only_y3)):
    reward = torch.zeros(3)
    for _ in range(4000):
        own = policy_of(reward)

        def with_ridge(x, demo_law=demo_law, own=own):
            losses = my_alignment_losses(x[DEMO], x[SAMPLE], BETA) + c * (x[DEMO] ** 2 + x[SAMPLE] ** 2)
            return expected(losses, demo_law, own)

        reward = reward - BETA**2 * gradient(with_ridge, reward)
    end, law = policy_of(reward), torch.tensor(closed_form.ridge_law(demo_law.numpy(), ref.numpy(), BETA, c))
    print(name, show(end), "  law", show(law), "  rewards", show(reward))
    torch.testing.assert_close(reward, (demo_law - end) / (2 * c * BETA * (demo_law + end)), atol=1e-8, rtol=0)
    assert_law(end, law, atol=1e-8)
    assert end.min() > 0.02
mine = my_alignment_losses(a, b, BETA) + c * (a**2 + b**2)
torch.testing.assert_close(mine.mean(), reward_alignment_loss(a, b, beta=BETA, ridge=c)[0])  # the project's ridge is this one
