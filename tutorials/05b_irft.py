# %% [markdown]
# # 05b · IRFT, SPIN and iterative IRL: learning from one's own answers
#
# **You will build** the loss of IRFT and SPIN, in which the policy is its own reward, and the rounds of iterative
# IRL. You will compute where each of them ends, and see which of them never settles.
#
# **Time:** 28 minutes of reading, 25 seconds of computer.
#
# **You need:** [05 · Inverse RL](05_inverse_rl.ipynb), above all its section [From a reward to the best
# policy](05_inverse_rl.ipynb#From-a-reward-to-the-best-policy).
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import math

import torch
from torch.nn.functional import softplus

from minialign.methods.irft import irft_loss
from minialign.methods.irl import irl_loss
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import inverse_rl as figures
from tutorials.figures import style

torch.set_default_dtype(torch.float64)  # so that "equal" can mean ten digits
torch.manual_seed(0)


def show(numbers, digits=4):
    numbers = torch.as_tensor(numbers).tolist()
    return "[" + " ".join(f"{number:.{digits}f}" for number in numbers) + "]"


def same(values, expected, msg, atol=1e-9):
    equal(values, torch.as_tensor(expected), msg, atol=atol, rtol=0)


# %% [markdown]
# ## The question
#
# RFT needs two models that take turns. Since every policy has a reward, $\beta \log(\pi/\mathrm{ref})$, could the
# policy be its own reward model? Then one model would do: raise the policy's reward of a
# [demonstration](../GLOSSARY.md#demonstration) above its reward of another answer.

# %%
figures.pair()

# %% [markdown]
# The picture leaves three choices open:
#
# 1. **Who writes the other answers?** *Fresh*: the present policy. *Stale*: the policy from the beginning of a round.
#    (A *round* samples once and then trains on those answers.)
# 2. **Which [reference](../GLOSSARY.md#reference)?** *Fixed*: the policy before training. *Moving*: a recent policy.
# 3. **Which h?** *Identity*, $h(z) = -z$, or *logistic*, $h(z) = \log(1 + e^{-z})$.
#
# The names: **RFT**, reward-learning fine-tuning, and **IRFT**, implicit reward-learning fine-tuning, are from Li et
# al. 2024, "Getting More Juice Out of the SFT Data". **SPIN** is self-play fine-tuning (Chen et al. 2024).
# **Iterative IRL** (inverse reinforcement learning) is from "From Demonstrations to Rewards" (Zeng et al. 2025,
# arXiv:2503.13538).
#
# ## 1. Where everything ends
#
# We use the three answers of 05 and exact averages. E must give every answer some probability (*full support*,
# E > 0); section 7 drops this. Then all methods that settle end on one line of policies,
#
# $$\pi_s \;\propto\; \mathrm{ref}\,\left(\frac{E}{\mathrm{ref}}\right)^{s},$$
#
# so one number $s$ says where a method ends (its [closed form](../GLOSSARY.md#closed-form)): the reference is
# $s = 0$, the [expert](../GLOSSARY.md#expert) is $s = 1$, and $s > 1$ is beyond the expert. (In 09b, s is SimPO's
# scale.) By hand for $s = 2$: the weights are .5·.2², .3·.667², .2·3.5² = .02, .133, 2.45; divided by their sum, .008,
# .051, .941.
#
# The sections below explain the rows; you need not understand them yet. "As printed" means as in the paper's
# algorithm, where each round forgets the reward of the round before.
#
# |method|other answers|reference|h|where it ends|
# |---|---|---|---|---|
# |SFT|none|none|none|s = 1, the expert|
# |RFT without a bound|fresh|fixed|identity|s = 1: it is SFT|
# |IRFT, identity|fresh|any|identity|s = 1: it is SFT|
# |IRFT, moving reference|fresh|moving|logistic|s = 1: it is SFT|
# |IRFT, fixed reference|fresh|fixed|logistic|s = 1/(1+β), short of the expert|
# |SPIN, one round|stale|fixed|logistic|s = 1/β, beyond the expert if β < 1|
# |SPIN, many rounds|stale|moving|logistic|s = 1 if β > ½, else it never settles|
# |iterative IRL, as printed|stale|fixed|logistic|s = 1/(1+β) if β > 1, else it never settles|
# |iterative IRL, rewards added|stale|fixed|logistic|s = 1 if β > ½, else it never settles|

# %%
ANSWERS = ["i want tea or else!", "give me tea, please.", "may i have tea, please."]
ref = torch.tensor([0.5, 0.3, 0.2])
E = torch.tensor([0.1, 0.2, 0.7])
BETA = 0.6


def on_the_line(s):
    return (ref.log() + s * (E / ref).log()).softmax(0)


def position(logps):
    """s of a policy on the line, from its log-probs (..., 3): the share of log E/ref in it."""
    whole, part = (E / ref).log(), logps - ref.log()
    return (part[..., 2] - part[..., 0]) / (whole[2] - whole[0])


print("s = 2:", show(on_the_line(2)), "  its position:", f"{position(on_the_line(2).log()):.4f}")
figures.ends(ANSWERS, torch.stack([on_the_line(k / 50) for k in range(200)]).numpy(), {
    "reference, s = 0": (ref.numpy(), style.GREY, (0.12, 0.35)),
    "IRFT, fixed reference": (on_the_line(1 / (1 + BETA)).numpy(), style.PURPLE, (0.80, 0.46)),
    "expert: SFT, RFT": (E.numpy(), style.GREEN, (0.80, 0.62)),
    f"SPIN, one round (β = {BETA})": (on_the_line(1 / BETA).numpy(), style.ORANGE, (0.72, 0.78)),
})

# %% [markdown]
# ## 2. The loss
#
# Let y be the demonstration and ỹ the other answer. The margin Δ is the difference of their log-ratios. The scaled
# margin βΔ is the difference of their rewards. The unknown constant cancels in it; that is why all these methods work
# with pairs.
#
# $$\text{loss} = h(\beta\Delta), \qquad
#   \Delta = \log\frac{\pi(y)}{\mathrm{ref}(y)} - \log\frac{\pi(\tilde y)}{\mathrm{ref}(\tilde y)} .$$


# %%
def identity(z):
    return -z


def logistic(z):
    return softplus(-z)  # log(1 + e^−z)


def my_irft_losses(demo_logps, other_logps, ref_demo_logps, ref_other_logps, beta, h):
    """The loss of each pair. All inputs (B,), log-probs of whole answers. h: a function of the
    scaled margins beta·Δ (B,). Returns (B,).
    """
    margins = (demo_logps - ref_demo_logps) - (other_logps - ref_other_logps)  # watch: margins (B,)
    return h(beta * margins)


# %% [markdown]
# ### Checkpoint

# %%
a, b, c, d = torch.randn(4, 16).unbind()
a.requires_grad_(), b.requires_grad_()
for h, name in ((identity, "identity"), (logistic, "logistic")):
    mine = my_irft_losses(a, b, c, d, BETA, h).mean()
    theirs, _ = irft_loss(a, b, c, d, beta=BETA, h=name)
    same(mine, theirs, f"my_irft_losses equals minialign's irft_loss with h = {name}.")
    slopes, their_slopes = torch.autograd.grad(mine, (a, b)), torch.autograd.grad(theirs, (a, b))
    same(torch.stack(slopes), torch.stack(their_slopes), "So does the gradient of my_irft_losses.")
print("my_irft_losses equals irft_loss, value and gradient, for both h")

# %% [markdown]
# Now the training, with the three choices as arguments. The average loss is a sum over nine pairs; (y, ỹ) has the
# weight E(y)·sampler(ỹ).

# %%
DEMO, OTHER = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)  # the nine pairs


def average(losses, expert, sampler):
    """losses (9,), weighted by how often each pair occurs."""
    return (expert[DEMO] * sampler[OTHER]) @ losses


def my_irft(expert, ref, beta, *, fresh, moving=False, h=logistic, steps=1500, size=4.0):
    """Gradient descent on the logits, from log ref. Returns the policies (steps + 1, 3).

    fresh: the sampler is the present policy, otherwise ref. moving: the reference is the present
    policy, otherwise ref. Both are constants: no gradient flows through them. Each step subtracts
    size/(beta·(1 + beta)) times the gradient of the average of my_irft_losses over the nine pairs.
    """
    logits, path = ref.log(), [ref]
    for _ in range(steps):
        sampler = path[-1] if fresh else ref
        reference = path[-1] if moving else ref
        logits = logits.detach().requires_grad_()
        logps, ref_logps = logits.log_softmax(0), reference.log()  # watch: logps (3,)
        losses = my_irft_losses(
            logps[DEMO], logps[OTHER], ref_logps[DEMO], ref_logps[OTHER], beta, h
        )
        gradient = torch.autograd.grad(average(losses, expert, sampler), logits)[0]
        logits = logits.detach() - size / (beta * (1 + beta)) * gradient
        path.append(logits.softmax(0))
    return torch.stack(path)


# %% [markdown]
# The factor 1/(β(1+β)) makes the speed similar for every β. It does not change the end, unless the step is too large
# (exercise 1).
#
# ### Checkpoint
#
# One step with h = identity must move the logits by size/(1+β)·(E − sampler). Stop in `my_irft` at the first call:
# logps is log ref, (−.69, −1.20, −1.61).

# %%
step = 1.0 / (1 + BETA)
one = my_irft(E, ref, BETA, fresh=True, h=identity, steps=1, size=1.0)[1]
same(one, (ref.log() + step * (E - ref)).softmax(0),
     "One step of my_irft adds (E − ref)·size/(1 + β).")
stale = my_irft(E, ref, BETA, fresh=False, h=identity, steps=20, size=1.0)[-1]
expected = closed_form.identity_round(E.numpy(), ref.numpy(), 20 * step)
same(stale, expected, "With stale answers all steps of my_irft are equal.")
mixture = my_irft(E, ref, BETA, fresh=True)[-1]  # watch: mixture (3,)
expected = closed_form.geometric_mixture(E.numpy(), ref.numpy(), BETA)
same(mixture, expected, "my_irft, fresh, fixed reference, ends at s = 1/(1 + β).", atol=1e-6)
moving = my_irft(E, ref, BETA, fresh=True, moving=True)[-1]
same(moving, E, "my_irft, fresh, moving reference, ends at the expert.", atol=1e-6)
print("fresh, fixed reference :", show(mixture), f"  s = {position(mixture.log()):.4f}")
print("fresh, moving reference:", show(moving), f"  s = {position(moving.log()):.4f}")

# %% [markdown]
# ## 3. Two rows that are SFT
#
# Take h = identity. The reference is a constant and has no gradient. In the logits, the gradients of log π(y) and log
# π(ỹ) both contain −π, which cancels in the difference. What remains on average is β·(sampler − E). With fresh answers
# that is β·(π − E): **SFT's gradient times β**, with more noise when it is sampled.
#
# Take the logistic h and let the reference be the present policy. Then every margin is 0, where h has the slope −½:
# SFT's gradient times β/2. So with fresh answers IRFT differs from SFT only if the slope of h differs from pair to
# pair. It depends on the margin, and margins leave 0 only if the reference stays behind the policy.

# %%
sft = my_irft(E, ref, BETA, fresh=True, h=identity, size=1.0, steps=200)
half = my_irft(E, ref, BETA, fresh=True, moving=True, size=2.0, steps=200)
print(f"the two paths differ by at most {(sft - half).abs().max():.0e}")
same(sft, half, "Logistic with a moving reference is identity at half the speed.")

# %% [markdown]
# ## 4. A lemma: the logistic loss finds a density ratio
#
# For the other rows we need to know where the logistic loss is smallest. Give each answer a free score f. Let
# demonstrations come from E and the other answers from any distribution q that is above 0 wherever E is. Which scores
# are best?
#
# $$\arg\min_f \;\mathbb{E}_{y \sim E,\, \tilde y \sim q}\, \log\left(1 + e^{-(f(y) - f(\tilde y))}\right)
#   \;=\; \log\frac{E}{q} + \mathrm{const} .$$
#
# *Proof.* Look at two answers a and b. The pair (a shown, b sampled) has the weight E(a)q(b), and the pair (b shown,
# a sampled) has E(b)q(a). The loss predicts with σ(f(a) − f(b)) which of the two it is, and the best prediction gives
# the true odds: $e^{f(a) - f(b)} = E(a)q(b) / E(b)q(a)$. The scores f = log E/q do this for all pairs at once. ∎
#
# In words: the scores tell the expert from the sampler, and the reference plays no part. We check it with iterative
# IRL's loss, which subtracts what earlier rounds have learned (here nothing).


# %%
def my_irl_losses(demo_rewards, other_rewards, base_demo_rewards, base_other_rewards):
    """The logistic loss of what this round adds to the reward. All inputs (B,). Returns (B,).

    base: the rewards when the round began. h is applied to the increase of the demonstration's
    reward since then, minus the increase of the other answer's reward.
    """
    increase = demo_rewards - base_demo_rewards
    return logistic(increase - (other_rewards - base_other_rewards))


# %% [markdown]
# ### Checkpoint

# %%
mine, (theirs, _) = my_irl_losses(a, b, c, d).mean(), irl_loss(a, b, c, d)
same(mine, theirs, "The mean of my_irl_losses is minialign's irl_loss.")
slopes, their_slopes = torch.autograd.grad(mine, (a, b)), torch.autograd.grad(theirs, (a, b))
same(torch.stack(slopes), torch.stack(their_slopes), "So is the gradient of my_irl_losses.")

zeros = torch.zeros(9)
for name, q in (("ref", ref), ("uniform", torch.ones(3) / 3), ("E itself", E)):
    f = torch.zeros(3)
    for _ in range(1500):
        f = f.detach().requires_grad_()
        loss = average(my_irl_losses(f[DEMO], f[OTHER], zeros, zeros), E, q)
        f = f.detach() - 4 * torch.autograd.grad(loss, f)[0]
    ratio = (E / q).log()
    print(f"other answers from {name:9}", show(f - f[0]), "  log E/q", show(ratio - ratio[0]))
    same(f - f[0], ratio - ratio[0], "The best scores of my_irl_losses are log E/q.", atol=1e-6)

# %% [markdown]
# ## 5. IRFT and SPIN
#
# In IRFT the score of an answer is $\beta\log(\pi/\mathrm{ref})$.
#
# **Fresh answers, fixed reference.** At the end the slope is 0 with the sampler kept constant, so the lemma holds
# with q = π:
#
# $$\beta \log\frac{\pi}{\mathrm{ref}} = \log\frac{E}{\pi} + \mathrm{const}
#   \quad\Longrightarrow\quad \pi \propto E^{\frac{1}{1+\beta}}\, \mathrm{ref}^{\frac{\beta}{1+\beta}} ,$$
#
# which is $s = 1/(1+\beta)$. The reference holds the policy back, and it never gets to E.
#
# **SPIN, one round.** Sample once from the reference, train to the end. The lemma with q = ref:
#
# $$\beta \log\frac{\pi}{\mathrm{ref}} = \log\frac{E}{\mathrm{ref}} + \mathrm{const}
#   \quad\Longrightarrow\quad \pi \propto \mathrm{ref} \left(\frac{E}{\mathrm{ref}}\right)^{1/\beta} ,$$
#
# which is $s = 1/\beta$.

# %%
def kl_from_E(policies):
    return (E * (E / policies).log()).sum(-1).abs()


for beta in (2.0, 1.0, 0.6, 0.3, 0.1):
    spin = my_irft(E, ref, beta, fresh=False, size=8.0)[-1]  # watch: spin (3,)
    kl = kl_from_E(spin)
    print(f"β = {beta:3.1f}: {show(spin)}   s = {position(spin.log()):6.3f}   KL(E‖π) = {kl:.3f}")
    expected = closed_form.converged_round(E.numpy(), ref.numpy(), ref.numpy(), beta)
    same(spin, expected, "One round of my_irft, not fresh, ends at s = 1/β.", atol=1e-4)
kls = kl_from_E(my_irft(E, ref, 0.1, fresh=False, size=0.5, steps=200))
print(f"β = 0.1 in small steps: the lowest KL(E‖π) is {kls.min():.3f}, at step {int(kls.argmin())}")

for name, policy in (("before", ref), ("SPIN, β = 0.1", spin)):
    samples = torch.multinomial(policy, 4, replacement=True).tolist()
    print(f"{name:14}", " | ".join(ANSWERS[i] for i in samples))

# %% [markdown]
# With β = 1 one round lands on the expert. With β < 1 it goes beyond: what the expert writes more often than the
# reference becomes too frequent, the rest disappears. SPIN's own β = 0.1 leaves one answer. That can help if some
# demonstrations are bad, but it is extrapolation. In small steps the path first passes near the expert, so training
# that stops early can end there.
#
# ## 6. Iterative IRL: the loop that oscillates
#
# Iterative IRL has a reward model again. Each round trains it to the end, with the logistic loss, to tell
# demonstrations from answers of the present policy. Then the policy follows the reward from the reference. The
# printed algorithm has β = 1. By hand:
#
# - **Round 1.** The policy is ref. By the lemma r = log E/ref, and the policy becomes ref·$e^r$ = E.
# - **Round 2.** The policy is E. Nothing tells its answers from demonstrations, so r = 0, and the policy becomes
#   ref·$e^0$ = ref.
#
# So two rounds lead back to ref. The reward of round 2 compares the expert with the *present* policy, but the policy
# step applies it to the *reference*. The repair is to *add* each new reward to the old one. We use the lemma in place
# of an optimiser.


# %%
def my_irl(expert, ref, beta, rounds, accumulate):
    """Iterative IRL with exact rounds. Returns the policies' log-probs (rounds + 1, 3), first ref.

    Each round finds log E/π by the lemma. accumulate: this is added to the reward, otherwise it
    replaces the reward. Then the policy is the tilt of ref by the reward.
    """
    reward, path = torch.zeros(3), [ref.log()]
    for _ in range(rounds):
        found = expert.log() - path[-1]  # watch: found (3,)
        reward = reward + found if accumulate else found
        path.append((ref.log() + reward / beta).log_softmax(0))
    return torch.stack(path)


# %% [markdown]
# ### Checkpoint
#
# Put $\pi_s$ into a round: as printed $s \leftarrow (1 - s)/\beta$, added up $s \leftarrow s + (1 - s)/\beta$.

# %%
for accumulate in (False, True):
    mine = my_irl(E, ref, BETA, 2, accumulate)[1:].exp()
    law = closed_form.rounds_law(E.numpy(), ref.numpy(), BETA, 2, ref_update=accumulate)
    same(mine, law, "The rounds of my_irl are those of closed_form.rounds_law.")

print("s after round             0      1      2      3      4      5      6")
for name, accumulate in (("as printed", False), ("added up", True)):
    for beta in (2.0, 1.0, 0.6):
        places, s = position(my_irl(E, ref, beta, 6, accumulate)), 0.0
        print(f"{name:10}   β = {beta}   ", " ".join(f"{place:6.2f}" for place in places))
        for place in places:
            always(abs(place - s) < 1e-6 * (1 + abs(s)), "my_irl moves s by the formula above.")
            s = s + (1 - s) / beta if accumulate else (1 - s) / beta

# %% [markdown]
# As printed, a round multiplies the distance to $s = 1/(1+\beta)$ by −1/β: it settles for β > 1, oscillates without
# end at β = 1, and ever wider below. Added up, a round multiplies the distance to the expert by 1−1/β: it settles for
# β > ½. At β = ½ it jumps between s = 0 and s = 2.
#
# SPIN in rounds, each with the last policy as sampler *and* reference, is the second recursion: adding log-ratios is
# adding rewards.

# %%
policy = ref
for k in range(2):
    policy = my_irft(E, policy, BETA, fresh=False, steps=3000)[-1]
    added = my_irl(E, ref, BETA, k + 1, True)[-1].exp()
    print(f"round {k + 1}: SPIN {show(policy)}   IRL, added up {show(added)}")
    this_run((policy - added).abs().max() < 1e-3, "SPIN in rounds is IRL with added rewards.")

printed_loop = position(my_irl(E, ref, 1.0, 8, False)).numpy()
added_up = position(my_irl(E, ref, BETA, 8, True)).numpy()
figures.swing({
    "IRL as printed, β = 1": (printed_loop, style.RED, 0.12),
    f"IRL with added rewards,\nSPIN in rounds (β = {BETA})": (added_up, style.GREEN, 1.2),
})

# %% [markdown]
# Real runs train few steps in each round, and then the oscillation hardly shows.
#
# ## 7. One demonstration for each prompt
#
# So far E > 0. Real data shows one answer to a prompt. The expert may write others too, but the data look like E = (0,
# 0, 1). The lemma then has no finite answer: log 0. What does each method do? For comparison we add RFT with a bound
# and with a ridge (05, exercise 3). Step sizes differ from method to method, so compare the ends, not the speeds.

# %%
only_y3 = torch.tensor([0.0, 0.0, 1.0])


def rft(expert, beta, steps, bound=math.inf, ridge=0.0):
    """RFT of tutorial 05: rewards in [0, bound], or with a price `ridge` on squared rewards."""
    size = beta**2 / (1 + 4 * ridge * beta**2)
    reward, path = torch.zeros(3), [ref]
    for _ in range(steps):
        up = (expert - path[-1]) / beta - 2 * ridge * (expert + path[-1]) * reward
        reward = (reward + size * up).clamp(0.0 if bound < math.inf else -math.inf, bound)
        path.append((ref.log() + reward / beta).softmax(0))
    return torch.stack(path)


STEPS = 3000
paths = {
    "SFT; IRFT, identity": my_irft(only_y3, ref, BETA, fresh=True, h=identity, steps=STEPS),
    "IRFT, fixed reference": my_irft(only_y3, ref, BETA, fresh=True, steps=STEPS),
    "SPIN; IRL, one round": my_irft(only_y3, ref, BETA, fresh=False, steps=STEPS),
    "RFT, bound r_max = 2β": rft(only_y3, BETA, STEPS, bound=2 * BETA),
    "RFT, ridge c = 0.5": rft(only_y3, BETA, STEPS, ridge=0.5),
}
print(f"{'probability of the two unshown answers':40} after 10  100      {STEPS} steps")
for name, path in paths.items():
    unshown = path[[10, 100, STEPS], :2].sum(1)
    print(f"{name:40}    ", "  ".join(f"{p:.1e}" for p in unshown))
    keeps = "bound" in name or "ridge" in name
    always(keeps or unshown[2] < unshown[1] < unshown[0], "Without a limit it keeps falling.")
    this_run(not keeps or unshown[2] > 0.001, "A bound or a ridge keeps probability.")

# %%
COLORS = (style.GREY, style.PURPLE, style.ORANGE, style.GREEN, style.BLUE)
figures.unshown(range(1, STEPS + 1), {
    name: (path[1:, :2].sum(1).numpy(), color, None)
    for (name, path), color in zip(paths.items(), COLORS, strict=True)
})

# %% [markdown]
# SPIN goes to the corner (0, 0, 1). So does IRFT: its formula has a zero wherever E has one, so the reference does not
# protect the other answers at all. Only a bound, a ridge, or stopping early keeps them. (What a network learns from
# other prompts is not in this toy.)
#
# ## Break it: two slips in print
#
# Algorithm 2 of Li et al. leaves out β in the margin, and its h reads as the logarithm of a logarithm, log(log(1 +
# e^−z)). Their code has neither slip.

# %%
def printed(z):
    return softplus(-z).log()


runs = (("right", BETA, logistic), ("without β", 1.0, logistic), ("log log", BETA, printed))
for name, beta, h in runs:
    fresh = my_irft(E, ref, beta, fresh=True, h=h)[-1]
    stale = my_irft(E, ref, beta, fresh=False, h=h, steps=1500 if h == logistic else 200)[-1]
    print(f"{name:10} fresh {show(fresh)}   stale {show(stale)}")

# %% [markdown]
# Without β the ends are those of β = 1: SPIN lands on the expert, whatever β you set. The logarithm of a logarithm has
# no smallest value: at large scaled margins it falls as steeply as the identity. Stale answers drive it into the
# corner, fresh answers end beyond the expert. Neither run raises an error.
#
# ## What is wrong here? (1)
#
# A colleague trains IRFT with fresh answers and a fixed reference, and expects s = 1/(1+β).

# %%
logits = ref.log().requires_grad_()
policy = logits.softmax(0).detach()
optimizer = torch.optim.SGD([logits], lr=4.0)
for _ in range(1500):
    logps = logits.log_softmax(0)
    margins = (logps[DEMO] - ref.log()[DEMO]) - (logps[OTHER] - ref.log()[OTHER])
    loss = average(logistic(BETA * margins), E, policy)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"s = {position(logps.detach()):.3f}, expected {1 / (1 + BETA):.3f}")

# %% [markdown]
# ## What is wrong here? (2)
#
# "SPIN with β = 0.1 is the best method: its mean margin is ten times the expert's, and it prefers the demonstration
# as often as any."

# %%
for name, end in (("IRFT", mixture), ("expert", E), ("SPIN, β = 0.1", spin)):
    log_ratio = (end / ref).log()
    margins = log_ratio[DEMO] - log_ratio[OTHER]
    wins = average((margins > 0).double() + 0.5 * (margins == 0), E, ref)
    print(f"{name:14} mean margin {average(margins, E, ref):6.2f}   preferred {wins:.3f}")

# %% [markdown]
# ## The same in the real methods
#
# ```
# python -m minialign irft                                 # SPIN: one round of stale answers
# python -m minialign irft --rounds 60 --ref initial       # 60 steps, 60 rounds: fresh, fixed
# python -m minialign irl --mode literal --rounds 6 --steps 360 --schedule constant   # the printed loop
# python -m minialign irl --mode accumulate --rounds 6     # rewards added up
# ```
#
# ## What you now know
#
# - IRFT, SPIN and iterative IRL differ in three choices: who writes the other answers, which reference, which h.
# - The logistic loss finds log E/q, the ratio of the expert to whoever wrote the other answers.
# - With E > 0 a method that settles ends on the line ref·(E/ref)^s: IRFT with a fixed reference short of the expert,
#   SPIN beyond it for β < 1.
# - Rounds that forget the old reward settle only for β > 1, at s = 1/(1+β). Rounds that add to it settle at the expert
#   for β > ½.
# - With one demonstration for each prompt all of them go to a corner, unless something stops them.
#
# Next: [06 · Rewards](06_reward.ipynb) learns a reward from comparisons, with the lemma of section 4.
#
# ## Exercises
#
# **1** (easy, 5 minutes). Try this: set BETA = 1.5, with TINKER on, and run everything again, then 0.4. Predict s for
# IRFT and one round of SPIN first. Then try `size=20` in `my_irft` with fresh answers.
#
# **2** (medium, 10 minutes). How many rounds does SPIN need until s is within .01 of the expert, for β = 0.5, 0.6,
# 0.9, 2?
#
# **3** (hard, 20 minutes). Iterative IRL without the arg min: one small step of `my_irl_losses` a round, the reward
# goes on from round to round, the policy follows exactly. Derive where it ends and run it, (a) with base rewards from
# the start of each round, (b) with all base rewards 0. Which rows of the table are they?
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# `policy` is computed once, before the loop. So the answers are stale, and the run is SPIN: s = 1/β. Compute the policy
# inside the loop.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
this_run(abs(position(logps.detach()) - 1 / BETA) < 1e-2, "Stale answers end at s = 1/β.")

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The margin is what SPIN trains, so it measures how far training went, not how good the policy is. The count of
# preferred answers is the same for all three, because they order the answers alike. Measure KL(E‖π), or the loss on
# held-out demonstrations.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
distances = kl_from_E(torch.stack([mixture, E, spin]))
print("KL(E‖π):", show(distances))
this_run(distances[2] > distances[0] > distances[1], "SPIN is the farthest from the expert.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# β = 1.5: .4 and .667, both short of the expert. β = 0.4: .714 and 2.5, and added-up IRL swings ever wider, since
# 1−1/β = −1.5. With size = 20 each step overshoots the end by more than it corrects.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for size in (4.0, 20.0):
    last = my_irft(E, ref, BETA, fresh=True, size=size)[-2:]
    print(f"size {size:4}: last two policies {show(last[0])} {show(last[1])}")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The distance starts at 1 and is multiplied by |1−1/β| each round: 1, .667, .111, .5. So never, 12, 3 and 7 rounds.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for beta, rounds in ((0.5, None), (0.6, 12), (0.9, 3), (2.0, 7)):
    near = (position(my_irl(E, ref, beta, 30, True)) - 1).abs() < 0.01
    print(f"β = {beta}:", int(near.int().argmax()) if near.any() else "never")
    found = int(near.int().argmax()) if near.any() else None
    always(found == rounds, "The distance after k rounds is |1 − 1/β|^k.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# (a) Each step starts with all increases 0, where the slope is −½ for every pair. So the step is a multiple of RFT's,
# and ends at the expert, s = 1. (b) The reward stops where the logistic loss with q = π has slope 0. By the lemma
# r = log E/π + const there. The policy follows it: β log π/ref = r + const. That is IRFT with fresh answers and a fixed
# reference, s = 1/(1+β).
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for name, from_start, end in (("start of the round", True, E), ("0", False, mixture)):
    reward = torch.zeros(3)
    for _ in range(4000):
        policy = (ref.log() + reward / BETA).softmax(0)
        base = reward.clone() if from_start else torch.zeros(3)
        reward = reward.requires_grad_()
        losses = my_irl_losses(reward[DEMO], reward[OTHER], base[DEMO], base[OTHER])
        slope = torch.autograd.grad(average(losses, E, policy), reward)[0]
        reward = reward.detach() - 0.5 * min(1.0, BETA) * slope
    print(f"base rewards: {name:18}", show(policy), f"  s = {position(policy.log()):.4f}")
    same(policy, end, "It ends at E from the round's start, at IRFT's mixture from 0.", atol=1e-6)
