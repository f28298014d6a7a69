# %% [markdown]
# # 05b · IRFT, SPIN and iterative IRL: learning from one's own answers
#
# **You will build** the loss of IRFT, in which the policy is its own reward model, the training loop of IRFT and
# SPIN, and the rounds of iterative IRL. You will derive where each of them ends. One of them never settles.
#
# **Time:** 25 minutes of reading, 30 seconds of computer.
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
# In 05, inverse RL needed two models: a [reward](../GLOSSARY.md#reward) model, and a
# [policy](../GLOSSARY.md#policy) that follows it. **Can one align a policy to
# [demonstrations](../GLOSSARY.md#demonstration) without a reward model?**
#
# Every policy π already has a reward: 05 showed that π is the best policy for $\beta \log(\pi/\mathrm{ref})$. So
# let the policy be its own reward model. Training raises its reward of a demonstration above its reward of another
# answer:

# %%
figures.pair()

# %% [markdown]
# The green answer comes from the [expert](../GLOSSARY.md#expert), the red one from the model itself. The main
# question will be *when* the red answers are sampled.
#
# **IRFT** is implicit reward-learning fine-tuning (Li et al. 2024, "Getting More Juice Out of the SFT Data").
# **SPIN** is self-play fine-tuning (Chen et al. 2024). **Iterative IRL**, iterative inverse reinforcement learning,
# is from "From Demonstrations to Rewards" (Zeng et al. 2025).
#
# ## 1. The loss
#
# Let y be the demonstration and ỹ the other answer. The *margin* Δ is the difference of their log-ratios, and the
# scaled margin βΔ is the difference of their rewards. The loss is small if the demonstration has the higher reward:
#
# $$\text{loss} = \log\left(1 + e^{-\beta\Delta}\right), \qquad
#   \Delta = \log\frac{\pi(y)}{\mathrm{ref}(y)} - \log\frac{\pi(\tilde y)}{\mathrm{ref}(\tilde y)} .$$
#
# The policy's reward is known only up to a constant for each prompt. It cancels in the difference. That is why these
# methods work with pairs.


# %%
def my_irft_losses(demo_logps, other_logps, ref_demo_logps, ref_other_logps, beta):
    """The loss of each pair. All inputs (B,), log-probs of whole answers. Returns (B,).

    The margin is the log-ratio of the demonstration minus that of the other answer. The loss is
    log(1 + e^(−beta·margin)). Use softplus(z), which is log(1 + e^z).
    """
    margins = (demo_logps - ref_demo_logps) - (other_logps - ref_other_logps)  # watch: margins (B,)
    return softplus(-beta * margins)


# %% [markdown]
# ### Checkpoint
#
# Random numbers stand for log-probs. Value and gradient must equal the project's.

# %%
BETA = 0.6
demo, other, ref_demo, ref_other = torch.randn(4, 16).unbind()
demo.requires_grad_()
other.requires_grad_()
mine = my_irft_losses(demo, other, ref_demo, ref_other, BETA).mean()
theirs, _ = irft_loss(demo, other, ref_demo, ref_other, beta=BETA)
same(mine, theirs, "The mean of my_irft_losses is minialign's irft_loss.")
slopes, their_slopes = (torch.autograd.grad(x, (demo, other)) for x in (mine, theirs))
same(torch.stack(slopes), torch.stack(their_slopes), "So is the gradient of my_irft_losses.")
print("my_irft_losses equals irft_loss, value and gradient")

# %% [markdown]
# ## 2. IRFT on three answers
#
# We take the three answers of 05, so the policy has three logits. There are nine pairs (y, ỹ), and each occurs with
# probability E(y)·sampler(ỹ). The *sampler* is the distribution of the other answers. Every average is exact.
#
# In IRFT the other answers are *fresh*: the sampler is the present policy. The [reference](../GLOSSARY.md#reference)
# is fixed. `my_irft` is gradient descent on the average loss. The switch `fresh=False` is for section 4.

# %%
ANSWERS = ["i want tea or else!", "give me tea, please.", "may i have tea, please."]
ref = torch.tensor([0.5, 0.3, 0.2])
E = torch.tensor([0.1, 0.2, 0.7])
DEMO, OTHER = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)  # the nine pairs


def average(losses, expert, sampler):
    """losses (9,), weighted by how often each pair occurs."""
    return (expert[DEMO] * sampler[OTHER]) @ losses


def my_irft(expert, ref, beta, fresh=True, steps=1500, size=4.0):
    """Gradient descent on the logits, from log ref. Returns the policies (steps + 1, 3), first ref.

    fresh: the sampler is the present policy, otherwise ref. It is a constant: no gradient flows
    through it. Each step subtracts size/(beta·(1 + beta)) times the gradient of the average of
    my_irft_losses over the nine pairs.
    """
    logits, path = ref.log(), [ref]
    for _ in range(steps):
        sampler = path[-1] if fresh else ref
        logits = logits.detach().requires_grad_()
        logps, ref_logps = logits.log_softmax(0), ref.log()  # watch: logps (3,)
        losses = my_irft_losses(logps[DEMO], logps[OTHER], ref_logps[DEMO], ref_logps[OTHER], beta)
        gradient = torch.autograd.grad(average(losses, expert, sampler), logits)[0]
        logits = logits.detach() - size / (beta * (1 + beta)) * gradient
        path.append(logits.softmax(0))
    return torch.stack(path)


# %% [markdown]
# The factor 1/(β(1+β)) makes the speed similar for every β.
#
# ### Checkpoint
#
# At the start all margins are 0. There the loss has the slope −β/2, and one step adds size/(2(1+β))·(E − sampler) to
# the logits. Stop in `my_irft` at the first call: logps is log ref, (−.69, −1.20, −1.61). Then look at the last two
# lines: does IRFT end at the expert?

# %%
one = my_irft(E, ref, BETA, steps=1)[1]
same(one, (ref.log() + 4.0 / (2 * (1 + BETA)) * (E - ref)).softmax(0),
     "The first step of my_irft adds (E − ref)·size/(2(1 + β)).")
irft = my_irft(E, ref, BETA)[-1]  # watch: irft (3,)
expected = closed_form.geometric_mixture(E.numpy(), ref.numpy(), BETA)
same(irft, expected, "my_irft with fresh answers ends where the project says.", atol=1e-6)
stale = my_irft(E, ref, BETA, fresh=False)[-1]
expected = closed_form.converged_round(E.numpy(), ref.numpy(), ref.numpy(), BETA)
same(stale, expected, "So does my_irft with fresh=False.", atol=1e-4)
print("reference     ", show(ref))
print("IRFT ends at  ", show(irft))
print("expert        ", show(E))

# %% [markdown]
# It does not. It ends between the reference and the expert. Why there?
#
# ## 3. Where IRFT ends
#
# We need one fact, a lemma about this loss. Give each answer a free score f. Demonstrations come from E, the other
# answers from any distribution q, and both are above 0 everywhere. Which scores make the average loss smallest?
#
# $$\arg\min_f \;\mathbb{E}_{y \sim E,\, \tilde y \sim q}\, \log\left(1 + e^{-(f(y) - f(\tilde y))}\right)
#   \;=\; \log\frac{E}{q} + \mathrm{const} .$$
#
# *Proof.* Take two answers a and b. The pair (a shown, b sampled) occurs with probability E(a)q(b), the pair (b
# shown, a sampled) with E(b)q(a). Of these two pairs, the loss gives the first the probability σ(f(a) − f(b)).
# A log loss is smallest if the predicted probability equals the true one, so the odds must be equal: $e^{f(a) - f(b)}
# = E(a)q(b) / E(b)q(a)$. The scores f = log E/q satisfy this for all pairs at once. ∎
#
# The best scores compare the expert with the sampler; the reference does not occur. The cell finds them by gradient
# descent, for three different q:

# %%
for name, q in (("ref", ref), ("uniform", torch.ones(3) / 3), ("E itself", E)):
    f = torch.zeros(3)
    for _ in range(1500):
        f = f.detach().requires_grad_()
        loss = average(softplus(-(f[DEMO] - f[OTHER])), E, q)
        f = f.detach() - 4 * torch.autograd.grad(loss, f)[0]
    ratio = (E / q).log()
    print(f"other answers from {name:9}", show(f - f[0]), "  log E/q", show(ratio - ratio[0]))
    always((f - f[0] - ratio + ratio[0]).abs().max() < 1e-6, "The best scores are log E/q.")

# %% [markdown]
# In IRFT the score is $\beta\log(\pi/\mathrm{ref})$, and q is the policy itself. Where training ends, the gradient is
# 0 with the sampler kept constant. The loss is convex in the scores, so they are the best ones for q = π:
#
# $$\beta \log\frac{\pi}{\mathrm{ref}} = \log\frac{E}{\pi} + \mathrm{const} .$$
#
# Write $\log\frac{E}{\pi} = \log\frac{E}{\mathrm{ref}} - \log\frac{\pi}{\mathrm{ref}}$ and bring the last term to the
# left:
#
# $$(1+\beta) \log\frac{\pi}{\mathrm{ref}} = \log\frac{E}{\mathrm{ref}} + \mathrm{const}
#   \quad\Longrightarrow\quad
#   \pi \;\propto\; \mathrm{ref}\,\left(\frac{E}{\mathrm{ref}}\right)^{s}, \quad s = \frac{1}{1+\beta} .$$
#
# So IRFT ends at the reference times a *power* s of E/ref. The reference itself is s = 0, the expert s = 1. The
# methods below have other s. All these policies $\pi_s$ lie on one line, the grey curve in the figure.
#
# Each point of the triangle is a policy over the three answers. A corner is a policy that writes only that answer.
# The nearer a point is to a corner, the likelier is that answer.


# %%
def on_the_line(s):
    return (ref.log() + s * (E / ref).log()).softmax(0)


def position(logps):
    """s of a policy on the line, from its log-probs (..., 3): the share of log E/ref in it."""
    whole, part = (E / ref).log(), logps - ref.log()
    return (part[..., 2] - part[..., 0]) / (whole[2] - whole[0])


print(f"IRFT ends at s = {position(irft.log()):.4f},   1/(1 + β) = {1 / (1 + BETA):.4f}")
same(position(irft.log()), 1 / (1 + BETA), "IRFT ends at s = 1/(1 + β).", atol=1e-6)
figures.ends(ANSWERS, torch.stack([on_the_line(k / 50) for k in range(200)]).numpy(), {
    "reference, s = 0": (ref.numpy(), style.GREY, (0.12, 0.35)),
    "IRFT": (on_the_line(1 / (1 + BETA)).numpy(), style.PURPLE, (0.80, 0.46)),
    "expert, s = 1": (E.numpy(), style.GREEN, (0.80, 0.62)),
    f"SPIN, one round (β = {BETA})": (on_the_line(1 / BETA).numpy(), style.ORANGE, (0.72, 0.78)),
})

# %% [markdown]
# ## 4. SPIN samples once in a round
#
# Sampling at every step is slow. **SPIN** samples once from the reference and then trains on these *stale* answers.
# What does that change? If it trains to its end, the lemma with q = ref gives
#
# $$\beta \log\frac{\pi}{\mathrm{ref}} = \log\frac{E}{\mathrm{ref}} + \mathrm{const}
#   \quad\Longrightarrow\quad s = \frac{1}{\beta} .$$
#
# With β < 1 this is beyond the expert. Look at s, and at how far the policy is from E, as β falls:

# %%
def kl_from_E(policies):
    return (E * (E / policies).log()).sum(-1).abs()


for beta in (2.0, 1.0, 0.6, 0.3, 0.1):
    spin = my_irft(E, ref, beta, fresh=False, size=8.0)[-1]  # watch: spin (3,)
    kl = kl_from_E(spin)
    print(f"β = {beta:3.1f}: {show(spin)}   s = {position(spin.log()):6.3f}   KL(E‖π) = {kl:.3f}")
    same(spin, on_the_line(1 / beta), "A round of my_irft, not fresh, ends at s = 1/β.", atol=1e-4)
kls = kl_from_E(my_irft(E, ref, 0.1, fresh=False, size=0.5, steps=200))
print(f"β = 0.1 in small steps: the lowest KL(E‖π) is {kls.min():.3f}, at step {int(kls.argmin())}")

for name, policy in (("before", ref), ("SPIN, β = 0.1", spin)):
    samples = torch.multinomial(policy, 4, replacement=True).tolist()
    print(f"{name:14}", " | ".join(ANSWERS[i] for i in samples))

# %% [markdown]
# Beyond the expert, the answers with the largest E/ref become too frequent and the others too rare (exercise 2). At
# SPIN's own β = 0.1 a round that is trained to its end leaves one answer. In small steps the path first passes near
# the expert, so a run that stops early can end near it.
#
# **More rounds.** The next round starts from the policy $\pi_k$ that the last one left. It samples from $\pi_k$ and
# takes $\pi_k$ as its reference. The lemma with q = ref = $\pi_k$ gives
#
# $$\beta \log\frac{\pi_{k+1}}{\pi_k} = \log\frac{E}{\pi_k} + \mathrm{const} .$$
#
# Let $\pi_k$ be at position s, so $\log\pi_k = \log\mathrm{ref} + s \log(E/\mathrm{ref})$ plus a constant. Then
# $\log(E/\pi_k) = (1 - s) \log(E/\mathrm{ref})$ plus a constant, and the round adds it, divided by β:
#
# $$s \;\leftarrow\; s + \frac{1-s}{\beta} .$$
#
# So each round multiplies the distance to the expert, 1 − s, by 1 − 1/β. It shrinks exactly if β > ½; then SPIN ends
# at the expert. With β = 0.6 it jumps over the expert and back, closer each time:

# %%
policy, s = ref, 0.0
for k in range(3):
    policy, s = my_irft(E, policy, BETA, fresh=False, steps=2000)[-1], s + (1 - s) / BETA
    print(f"round {k + 1}: {show(policy)}   s = {position(policy.log()):.3f}, predicted {s:.3f}")
    this_run(abs(position(policy.log()) - s) < 0.01, "A round of SPIN moves s to s + (1 − s)/β.")

# %% [markdown]
# ## 5. Iterative IRL: a loop that oscillates
#
# Iterative IRL has a reward model again. Each round trains it to tell demonstrations from answers of the present
# policy, with the loss of the lemma. So it finds $r = \log(E/\pi_k)$, up to a constant. Then the policy becomes the
# best one for this reward, the [tilt](../GLOSSARY.md#tilt) ref·$e^{r/\beta}$ of the *original* reference. The algorithm
# as the paper prints it has β = 1. By hand:
#
# - **Round 1.** The policy is ref. The reward is log E/ref, and the policy becomes ref·E/ref = E.
# - **Round 2.** The policy is E. Its answers and the demonstrations now have the same distribution, so the best
#   reward is constant. The policy becomes ref.
#
# Two rounds lead back to the start. The new reward compares the expert with the *present* policy, but it is applied
# to the *reference*. The repair is to **add** each new reward to the old one.
#
# From position s the round finds $r = (1 - s)\log(E/\mathrm{ref})$. As printed this replaces the old reward, so
# $s \leftarrow (1-s)/\beta$. Added to the old reward, which is $\beta s \log(E/\mathrm{ref})$, it gives
# $s \leftarrow s + (1-s)/\beta$. That is SPIN's recursion.


# %%
def my_irl(expert, ref, beta, rounds, add):
    """Iterative IRL with exact rounds. Returns the policies' log-probs (rounds + 1, 3), first ref.

    Each round finds log E/π of the present policy. add: this is added to the reward (from 0),
    otherwise it replaces the reward. Then the policy is the tilt of ref by the reward.
    """
    reward, path = torch.zeros(3), [ref.log()]
    for _ in range(rounds):
        found = expert.log() - path[-1]  # watch: found (3,)
        reward = reward + found if add else found
        path.append((ref.log() + reward / beta).log_softmax(0))
    return torch.stack(path)


# %% [markdown]
# ### Checkpoint
#
# The rounds must equal the project's, and their positions the two recursions. In which lines does s settle?

# %%
mine = my_irft_losses(demo, other, ref_demo, ref_other, 1.0).mean()
theirs, _ = irl_loss(demo, other, ref_demo, ref_other)
same(mine, theirs, "irl_loss is IRFT's loss with β = 1 and rewards as inputs: new, new, old, old.")
for add in (False, True):
    mine = my_irl(E, ref, BETA, 2, add)[1:].exp()
    law = closed_form.rounds_law(E.numpy(), ref.numpy(), BETA, 2, ref_update=add)
    same(mine, law, "The rounds of my_irl are those of closed_form.rounds_law.")

print("s after round             0      1      2      3      4      5      6")
for name, add in (("as printed", False), ("added up", True)):
    for beta in (2.0, 1.0, 0.6):
        places, s = position(my_irl(E, ref, beta, 6, add)), 0.0
        print(f"{name:10}   β = {beta}   ", " ".join(f"{place:6.2f}" for place in places))
        for place in places:
            always(abs(place - s) < 1e-6 * (1 + abs(s)), "my_irl moves s by the formula above.")
            s = s + (1 - s) / beta if add else (1 - s) / beta

# %% [markdown]
# Two of the lines as a figure, with two more rounds:

# %%
figures.swing({
    "IRL as printed, β = 1": (position(my_irl(E, ref, 1.0, 8, False)).numpy(), style.RED, 0.12),
    f"IRL with added rewards,\nSPIN in rounds (β = {BETA})":
        (position(my_irl(E, ref, BETA, 8, True)).numpy(), style.GREEN, 1.2),
})

# %% [markdown]
# In the paper's loop, (1 − s)/β leaves only s = 1/(1+β) unchanged, and a round multiplies the distance to it by −1/β.
# So it settles there for β > 1, oscillates between reference and expert at β = 1, and diverges below. With added
# rewards it settles at the expert for β > ½. If a run trains only a few steps in each round, the oscillation hardly
# shows.
#
# ## 6. Break it: one demonstration for each prompt
#
# So far E > 0. Real data shows one answer to a prompt, so the data look like E = (0, 0, 1), and log E/q is −∞ for the
# other two. Do IRFT and SPIN keep some probability for them? (Compare where they go, not how fast.)

# %%
only_y3 = torch.tensor([0.0, 0.0, 1.0])
print("probability of the two unshown answers   after 10  100      3000 steps")
for name, fresh in (("IRFT", True), ("SPIN, one round", False)):
    path = my_irft(only_y3, ref, BETA, fresh=fresh, steps=3000)
    unshown = path[[10, 100, 3000], :2].sum(1)  # watch: unshown (3,)
    print(f"{name:40}    ", "  ".join(f"{p:.1e}" for p in unshown))
    always(unshown[2] < unshown[1] < unshown[0], "It keeps falling.")

# %% [markdown]
# No. Both fall towards 0. IRFT's formula has a zero wherever E has one, so the reference does not protect these
# answers. A bound or a ridge on the reward (05) or stopping early keeps them. (What a network learns from other
# prompts is not in this toy.)
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
    loss = average(softplus(-BETA * margins), E, policy)
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
for name, end in (("IRFT", irft), ("expert", E), ("SPIN, β = 0.1", spin)):
    log_ratio = (end / ref).log()
    margins = log_ratio[DEMO] - log_ratio[OTHER]
    wins = average((margins > 0).double() + 0.5 * (margins == 0), E, ref)
    print(f"{name:14} mean margin {average(margins, E, ref):6.2f}   preferred {wins:.3f}")

# %% [markdown]
# ## The same in the real methods
#
# ```
# python -m minialign irft                                 # SPIN: one round of stale answers
# python -m minialign irft --rounds 60 --ref initial       # 60 steps, 60 rounds: fresh answers, fixed reference
# python -m minialign irl --mode literal --rounds 6 --steps 360 --schedule constant   # the printed loop
# python -m minialign irl --mode accumulate --rounds 6     # rewards added up
# ```
#
# ## What you now know
#
# One can do without a reward model, because the policy's log-ratio to the reference is a reward. The loss finds log
# E/q, the ratio of the expert to whoever wrote the other answers. With E > 0, exact averages and rounds that are
# trained to their end, the methods of this lesson end at ref·(E/ref)^s:
#
# |method|other answers from|reference|s|
# |---|---|---|---|
# |IRFT|the present policy|fixed|1/(1+β), short of the expert|
# |SPIN, one round|ref|fixed|1/β, beyond the expert if β < 1|
# |SPIN, many rounds|the last round's policy|moves with each round|1 if β > ½, else it never settles|
# |IRL, rewards added|the last round's policy|fixed|1 if β > ½, else it never settles|
# |IRL, as printed|the last round's policy|fixed|1/(1+β) if β > 1, else it never settles|
#
# With one demonstration for each prompt, IRFT and SPIN drive all other answers towards 0, unless something stops
# them.
#
# Next: [06 · Rewards](06_reward.ipynb) learns a reward from comparisons.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes). Try this: set BETA = 1.5, with TINKER on, and run everything again, then 0.4.
# Predict s for IRFT and for one round of SPIN first. Where do both end if you forget β in the margin?
#
# **Exercise 2** (medium, 15 minutes). E = (.1, .3, .6) and ref = (.6, .25, .15): the expert writes the second answer
# more often than the reference. Does it become more frequent still beyond the expert? Hint: derive $\log\pi_s(y)$ in
# s.
#
# **Exercise 3** (hard, 15 minutes). Replace the loss by −βΔ, IRFT's *identity* loss. Show that its average gradient
# in the logits is β·(sampler − E). Where does IRFT end then, with fresh and with stale answers?
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# `policy` is computed once, before the loop. So the answers are stale, and the run is one round of SPIN: s = 1/β.
# Compute the policy inside the loop.
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
distances = kl_from_E(torch.stack([irft, E, spin]))
print("KL(E‖π):", show(distances))
this_run(distances[2] > distances[0] > distances[1], "SPIN is the farthest from the expert.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# β = 1.5: .4 and .667, both short of the expert. β = 0.4: .714 and 2.5, and SPIN's rounds swing ever wider, since 1 −
# 1/β = −1.5. Without β both end as with β = 1, at ½ and 1, and no error is raised. (Algorithm 2 of Li et al. leaves β
# out, their code does not.)
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for beta in (1.5, 0.4, 1.0):
    ends = [my_irft(E, ref, beta, fresh=fresh)[-1].log() for fresh in (True, False)]
    print(f"β = {beta}: IRFT s = {position(ends[0]):.3f}, SPIN s = {position(ends[1]):.3f}")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# No: it falls from .3 to .18 at s = 1/.6. The derivative of $\log\pi_s(y)$ is $\log\frac{E(y)}{\mathrm{ref}(y)}$
# minus the mean of this log-ratio under $\pi_s$, which at s = 1 is KL(E‖ref). So just beyond the expert only answers
# with $\log(E/\mathrm{ref}) > \mathrm{KL}(E\|\mathrm{ref})$ rise. For any s > 1, $\pi_s/E$ grows with E/ref: answers
# above some value of E/ref are more frequent than in E, the others rarer.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
other_E, other_ref = torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.6, 0.25, 0.15])
ratio = (other_E / other_ref).log()
beyond = (other_ref.log() + ratio / 0.6).softmax(0)
print("at s = 1/.6:", show(beyond), "  log E/ref:", show(ratio), f"  KL {other_E @ ratio:.3f}")
near = (other_ref.log() + 1.001 * ratio).softmax(0)
rising = near > other_E
always((rising == (ratio > other_E @ ratio)).all(), "Just beyond E these rise, and no others.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# In the logits, the gradient of log π(y) is 1[y] − π, and that of log π(ỹ) is 1[ỹ] − π. The π cancels in the
# difference, and the average of −β(1[y] − 1[ỹ]) is β(sampler − E). With fresh answers this is β(π − E), **SFT's
# gradient times β**, so it ends at the expert. With stale answers the gradient never changes, so the logits grow
# without end. (With the logistic loss and the *present* policy as reference, all margins stay 0, where the slope is
# −½: SFT's gradient times β/2.)
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for name, fresh in (("fresh", True), ("stale", False)):
    policy = ref
    for _ in range(200):
        logits = policy.log().requires_grad_()
        logps, sampler = logits.log_softmax(0), policy if fresh else ref
        loss = average(-BETA * (logps[DEMO] - logps[OTHER]), E, sampler)
        gradient = torch.autograd.grad(loss, logits)[0]
        same(gradient, BETA * (sampler - E), "The average gradient is β(sampler − E).")
        policy = (logits.detach() - gradient).softmax(0)
    print(f"identity, {name}:", show(policy))
