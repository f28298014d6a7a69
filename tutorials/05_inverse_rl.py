# %% [markdown]
# # 05 · Inverse RL: the reward behind the demonstrations
#
# **You will build** the step from a reward to the best policy and the step back, the gradient that finds a reward
# behind demonstrations, and RFT, a method that alternates the two. You will see when RFT is the same as SFT, and what a
# limit on the reward changes.
#
# **Time:** 25 minutes of reading, 10 seconds of computer.
#
# **You need:** [04 · SFT](04_sft.ipynb), for demonstrations and the KL divergence.
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

from minialign.methods.rft import reward_alignment_loss
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import inverse_rl as figures

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
# [SFT](../GLOSSARY.md#sft) copies the [demonstrations](../GLOSSARY.md#demonstration). It does not know why they are
# good, so it cannot tell a bad answer from a good one that nobody happened to show. The
# [expert](../GLOSSARY.md#expert) who wrote them had something in mind. Can we recover it as a number for each answer,
# and train on that number instead?

# %%
figures.reward_loop()

# %% [markdown]
# The upper half of the picture is *reinforcement learning* (RL): a [reward](../GLOSSARY.md#reward) is given, and
# training looks for a [policy](../GLOSSARY.md#policy) that gets much of it. The lower half is *[inverse
# RL](../GLOSSARY.md#inverse-rl)*: demonstrations are given, and training looks for the reward behind them. We do both
# on three or four answers, where every step can be computed exactly.
#
# ## 1. Why does training hold on to a reference?
#
# A reward $r(x, y)$ is a number that says how good completion $y$ is for prompt $x$. It may be a program. Take a crude
# one: one point for each "please". Take a policy that writes nonsense once in a thousand answers.
#
# We train its four logits to maximise the average reward minus β times the [KL divergence](../GLOSSARY.md#kl) from the
# [reference](../GLOSSARY.md#reference), a frozen copy of the policy from before the training. First β = 1, then β = 0,
# that is, without the KL. Look at the last text.

# %%
ANSWERS = ["i want tea or else!", "give me tea, please.", "may i have tea, please."]
texts = [*ANSWERS, "please please please please"]
pleases = torch.tensor([float(text.count("please")) for text in texts])  # 0, 1, 1, 4
before = torch.tensor([0.5, 0.3, 0.199, 0.001])


def trained(ref, reward, beta, steps=600):
    """The policy (K,) after Adam on E_π[r] − β·KL(π‖ref), from ref."""
    logits = ref.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        policy = logits.softmax(0)
        objective = policy @ reward - beta * policy @ (policy / ref).log()  # watch: objective ()
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    return logits.detach().softmax(0)


PULL = 1.0  # β of this section
held, free = trained(before, pleases, beta=PULL), trained(before, pleases, beta=0.0)
for name, policy in (("before", before), (f"β = {PULL:g}", held), ("β = 0", free)):
    print(f"{name:6} average reward {policy @ pleases:.2f}   policy {show(policy)}")
this_run(free[3] > 0.99, "Without the KL the nonsense wins.")
this_run(held[3] < 0.1, "With β = 1 the policy rarely writes nonsense.")
figures.with_and_without(texts, before.numpy(), held.numpy(), free.numpy(), PULL)

# %% [markdown]
# Without the KL all probability goes to the text with the largest reward. Here that text is nonsense. With β = 1 it
# gets a probability of only 0.03, because writing it often takes the policy far from the reference. So β is in reward
# per [nat](../GLOSSARY.md#nats): a change that adds one nat of KL raises the objective only if it adds more than β to
# the average reward. Set `PULL = 0.3` in the cell, with TINKER on: the policy writes nonsense.

# %% [markdown]
# <a id="From-a-reward-to-the-best-policy"></a>
# ## 2. From a reward to the best policy
#
# The best policy has a formula, which tutorials 06 to 11 use again and again. Let $r(y)$ be the reward of each answer
# to one prompt, $\mathrm{ref}(y)$ and $\pi(y)$ the probabilities under reference and policy. All $\mathrm{ref}(y)$ are
# above 0, and so is β. What training maximises is
#
# $$J(\pi) \;=\; \mathbb{E}_\pi[r] - \beta\,\mathrm{KL}(\pi\|\mathrm{ref})
#   \;=\; \sum_y \pi(y) \left( r(y) - \beta \log \frac{\pi(y)}{\mathrm{ref}(y)} \right) .$$
#
# **Step 1.** Write the reward as a logarithm, $r = \beta \log e^{r/\beta}$, and put both logarithms together:
#
# $$J(\pi) \;=\; -\beta \sum_y \pi(y) \log \frac{\pi(y)}{\mathrm{ref}(y)\, e^{r(y)/\beta}} .$$
#
# **Step 2.** The denominator is positive, but its sum is not 1. Call the sum $Z$, and divide by it to get a
# distribution:
#
# $$Z = \sum_y \mathrm{ref}(y)\, e^{r(y)/\beta}, \qquad \pi^*(y) = \frac{\mathrm{ref}(y)\, e^{r(y)/\beta}}{Z} .$$
#
# **Step 3.** Put $Z\pi^*$ into the denominator, split the logarithm, and use that $\pi$ sums to 1:
#
# $$J(\pi) \;=\; -\beta \sum_y \pi(y) \log \frac{\pi(y)}{Z\,\pi^*(y)}
#   \;=\; -\beta \sum_y \pi(y) \log \frac{\pi(y)}{\pi^*(y)} + \beta \log Z
#   \;=\; \beta \log Z - \beta\,\mathrm{KL}(\pi\|\pi^*) .$$
#
# The first term does not contain $\pi$. A KL is never negative, and it is 0 only for equal distributions. **So $\pi^*$
# is the best policy**, with the value $\beta \log Z$. In words: multiply each probability of the reference by
# $e^{r/\beta}$, then divide by the sum. We call this a [tilt](../GLOSSARY.md#tilt) of the reference.
#
# By hand: ref = (.5, .3, .2) and $e^{r/\beta}$ = (1, 2, 5) give the products .5, .6, 1. Their sum is Z = 2.1.


# %%
def my_best_policy(ref, reward, beta):
    """The tilt. ref: (K,) probabilities, all above 0. reward: (K,). Returns π* (K,), with sum 1.

    Use logarithms, so that a large reward/beta does not overflow: add reward/beta to log ref, then
    take the softmax, which divides by Z. (Autograd must pass through it.)
    """
    return (ref.log() + reward / beta).softmax(0)


# %% [markdown]
# ### Checkpoint
#
# First the numbers by hand, the project's formula, and the gradient of the softmax.

# %%
ref = torch.tensor([0.5, 0.3, 0.2])
BETA = 0.6
r = BETA * torch.tensor([1.0, 2.0, 5.0]).log()
best = my_best_policy(ref, r, BETA)  # watch: best (3,)
print("π* =", show(best))
same(best, torch.tensor([0.5, 0.6, 1.0]) / 2.1, "my_best_policy gives .5, .6, 1 over 2.1.")
same(best, closed_form.tilt(ref.numpy(), r.numpy(), BETA), "my_best_policy is closed_form.tilt.")
reward = r.clone().requires_grad_()
slope = torch.autograd.grad(my_best_policy(ref, reward, BETA)[2], reward)[0]
same(slope, best[2] * (torch.eye(3)[2] - best) / BETA,
     "The gradient of my_best_policy is π(y)·(1[y] − π)/β.")

# %% [markdown]
# Now the derivation. Did the training of section 1 arrive at the formula? And is $J = \beta\log Z -
# \beta\,\mathrm{KL}(\pi\|\pi^*)$ true for 1000 random policies?

# %%
print("section 1 trained to", show(held))
print("the formula says    ", show(my_best_policy(before, pleases, PULL)))
same(held, my_best_policy(before, pleases, PULL), "Training arrives at the formula.", atol=0.02)
others = torch.rand(1000, 3).log().mul(2).softmax(1)  # watch: others (1000, 3)
J = others @ r - BETA * (others * (others / ref).log()).sum(1)  # watch: J (1000,)
log_Z = (ref * (r / BETA).exp()).sum().log()
kl_to_best = (others * (others / best).log()).sum(1)  # watch: kl_to_best (1000,)
print(f"highest J of the 1000: {J.max():.5f}   J(π*) = β log Z = {BETA * log_Z:.5f}")
same(J, BETA * log_Z - BETA * kl_to_best, "J = β log Z − β KL(π‖π*) for every policy.")
always((J < BETA * log_Z).all(), "No policy has a higher J than the tilt.")

# %% [markdown]
# ## 3. And back: from a policy to its reward
#
# Take the logarithm of the formula and solve it for the reward:
#
# $$r(y) \;=\; \beta \log \frac{\pi(y)}{\mathrm{ref}(y)} + \mathrm{const} .$$
#
# So if ref has no zeros, *every* policy without zeros is the best one for some reward. The constant ($\beta \log Z$) is
# free: adding 7 to all rewards of a prompt changes no policy. DPO, in [09](09_dpo.ipynb), is built on this way back.


# %%
def my_reward_of(policy, ref, beta):
    """The reward whose tilt is `policy`, shifted so that the first answer has reward 0.

    policy, ref: (K,). Returns (K,).
    """
    reward = beta * (policy / ref).log()
    return reward - reward[0]


# %% [markdown]
# ### Checkpoint
#
# Let the expert write the three answers with probabilities E = (.1, .2, .7). The last column is the reward behind E.

# %%
E = torch.tensor([0.1, 0.2, 0.7])
same(my_reward_of(best, ref, BETA), r, "my_reward_of gives the reward that we began with.")
same(my_best_policy(ref, r + 7, BETA), best, "A constant added to all rewards changes no policy.")
r_of_E = my_reward_of(E, ref, BETA)  # watch: r_of_E (3,)
same(my_best_policy(ref, r_of_E, BETA), E, "The best policy of the reward behind E is E.")
for text, p, q, number in zip(ANSWERS, ref, E, r_of_E, strict=True):
    print(f"{text:24} reference {p:.1f}   expert {q:.1f}   reward {number:6.3f}")

# %% [markdown]
# So there is a reward whose best policy *is* the expert. It need not be what the expert had in mind: another ref or β
# gives another reward (Ng & Russell 2000; Ziebart et al. 2008).
#
# ## 4. Finding the reward from demonstrations
#
# With a language model we do not know $E$; we have samples of it. *Maximum-likelihood inverse RL* looks for the reward
# whose best policy $\pi_r$ makes them most likely. It maximises
#
# $$\ell(r) = \sum_y E(y) \log \pi_r(y), \qquad \log \pi_r(y) = \log\mathrm{ref}(y) + \frac{r(y)}{\beta} - \log Z .$$
#
# For the gradient, note that $r(y)$ occurs in two places. The term $E(y)\,r(y)/\beta$ has the derivative $E(y)/\beta$.
# The other place is $\log Z$:
#
# $$\frac{\partial \log Z}{\partial r(y)} = \frac1Z \cdot \mathrm{ref}(y)\, e^{r(y)/\beta} \cdot \frac1\beta
#   = \frac{\pi_r(y)}{\beta}, \qquad\text{so}\qquad
#   \frac{\partial \ell}{\partial r(y)} \;=\; \frac{E(y) - \pi_r(y)}{\beta} .$$
#
# **Raise the reward of what the expert writes, lower it for what the policy writes.** Nobody has to label an answer as
# bad: the policy's own answers take that place. (It follows from Lemma 3.1 of Li et al. 2024.) By hand, at r = 0:
# $\pi_r$ = ref, and the gradient is (.1−.5, .2−.3, .7−.2)/.6 = (−.667, −.167, .833).


# %%
def my_reward_gradient(reward, expert, ref, beta):
    """∂ℓ/∂r. reward, expert, ref: (K,). Returns (K,): positive where the reward should rise."""
    policy = my_best_policy(ref, reward, beta)  # watch: policy (K,)
    return (expert - policy) / beta


# %% [markdown]
# ### Checkpoint
#
# The numbers by hand, and autograd at another reward.

# %%
at_0 = my_reward_gradient(torch.zeros(3), E, ref, BETA)
print("at r = 0", show(at_0, 3))
same(at_0, (E - ref) / BETA, "my_reward_gradient at r = 0 is (E − ref)/β.")
reward = r.clone().requires_grad_()
exact = torch.autograd.grad(E @ my_best_policy(ref, reward, BETA).log(), reward)[0]
same(my_reward_gradient(r, E, ref, BETA), exact, "my_reward_gradient equals autograd's.")

# %% [markdown]
# ## 5. RFT: take turns
#
# **RFT**, reward-learning fine-tuning, takes turns: the reward moves along this gradient, the policy follows the
# reward, and again (Li et al. 2024, "Getting More Juice Out of the SFT Data", Algorithm 1; not rejection sampling).
# Here the policy follows exactly, by the formula. We move the reward by size·β²·gradient = size·β·(E − π). So $r/\beta$
# moves by size·(E − π), for any β.


# %%
def my_rft(expert, ref, beta, steps=400, size=0.2):
    """RFT with exact averages, from reward 0. Returns the policies (steps + 1, K), first ref.

    Each step adds size·beta²·my_reward_gradient(…) to the reward (K,), and appends the best policy
    of the new reward to the path.
    """
    reward = torch.zeros(len(ref))
    path = [my_best_policy(ref, reward, beta)]
    for _ in range(steps):
        gradient = my_reward_gradient(reward, expert, ref, beta)  # watch: gradient (K,)
        reward = reward + size * beta**2 * gradient
        path.append(my_best_policy(ref, reward, beta))
    return torch.stack(path)


# %% [markdown]
# ### Checkpoint
#
# Stop in `my_rft` at the first call: after the first step the reward is β · (−.4, −.1, .5) = (−.24, −.06, .3).

# %%
first = my_rft(E, ref, BETA, steps=1, size=1.0)
same(first[0], ref, "my_rft starts at ref.")
same(first[1], (ref.log() + E - ref).softmax(0), "my_rft's first step adds E − ref to r/β.")
path = my_rft(E, ref, BETA)  # watch: path (401, 3)
print("RFT ends at", show(path[-1]), "  its reward", show(my_reward_of(path[-1], ref, BETA)))
this_run((path[-1] - E).abs().max() < 1e-5, "RFT has arrived at the expert.")

# %% [markdown]
# RFT finds the expert and the reward of section 3. Now compare it with SFT, which starts from the logits log ref and
# adds size·(E − π) to them at each step (04, section 2). RFT adds the same to $r/\beta$, and its policy is the softmax
# of log ref + $r/\beta$. So both have the same policy after *every* step.
#
# In the picture each point of the triangle is a distribution over the three answers. At a corner the policy writes only
# that answer, and on the opposite side never. In between, the distance from that side is the answer's probability.

# %%
logits, sft = ref.log(), [ref]
for _ in range(400):
    logits = logits + 0.2 * (E - logits.softmax(0))
    sft.append(logits.softmax(0))
sft = torch.stack(sft)  # watch: sft (401, 3)
print(f"largest gap between RFT's path and SFT's: {(path - sft).abs().max():.0e}")
same(path, sft, "my_rft and SFT have the same policy after every step.")
figures.same_path(ANSWERS, ref.numpy(), E.numpy(), path.numpy(), sft.numpy())

# %% [markdown]
# So RFT **is** SFT under three conditions:
#
# - the reward is a free number for each answer, without a limit (the next section adds one);
# - the averages over E and π are exact;
# - the policy follows the reward exactly, after every step of the reward ("Break it" drops this).
#
# Real runs break all three: the reward is a network, averages are samples, and the policy follows by a few steps.
#
# ## 6. One demonstration and a bound
#
# Real data often has one demonstration for each prompt. The expert may write other answers too, but the data look like
# E = (0, 0, 1). Then the gradient (E − π)/β is never 0: the reward of $y_3$ rises forever, those of the others fall
# forever, and their probabilities go to 0.
#
# Li et al. (Example 1) keep rewards between 0 and a bound $r_{\max}$. The signs of the gradient stay the same. So
# $r(y_3)$ rises until it reaches $r_{\max}$, and the other two stay at 0. Write $x = r_{\max}/\beta$. With a uniform
# reference the tilt of these rewards is
#
# $$\pi = \frac{(1,\; 1,\; e^x)}{2 + e^x} .$$
#
# (Their Table 1 prints 2 in place of 1.) In the code one line is new, the `clamp`. The figure shows the probability of
# the two answers that were not shown.


# %%
def bounded_rft(expert, ref, x, steps=1000, size=0.1):
    """RFT with rewards in [0, x·BETA]. Returns the policies (steps + 1, K)."""
    reward = torch.zeros(len(ref))
    path = [my_best_policy(ref, reward, BETA)]
    for _ in range(steps):
        reward = reward + size * BETA**2 * my_reward_gradient(reward, expert, ref, BETA)
        reward = reward.clamp(0, x * BETA)  # watch: reward (K,)
        path.append(my_best_policy(ref, reward, BETA))
    return torch.stack(path)


only_y3, uniform = torch.tensor([0.0, 0.0, 1.0]), torch.ones(3) / 3
unbounded = my_rft(only_y3, uniform, BETA, steps=1000, size=0.1)  # watch: unbounded (1001, 3)
print("without a bound, π(y3) after 10, 100, 1000 steps:", show(unbounded[[10, 100, 1000], 2]))
curves = {"SFT; RFT without a bound": unbounded[1:, 2]}
for x in (1, 2, 4):
    bounded = bounded_rft(only_y3, uniform, x)
    print(f"r_max/β = {x}: ends at", show(bounded[-1]))
    law = torch.as_tensor(closed_form.table_1(x))
    arrived = torch.allclose(bounded[-1], law, atol=1e-6)
    this_run(arrived, "After 1000 steps it is at (1, 1, e^x)/(2 + e^x).")
    curves[f"r_max/β = {x}"] = bounded[1:, 2]
figures.one_demonstration(range(1, 1001), curves)

# %% [markdown]
# Without a bound this probability keeps falling. With one it stops. So it is the bound that keeps the other answers,
# not inverse RL. Stopping early does the same, and so does a *ridge*, a penalty on large rewards. About $y_1$ and $y_2$
# no run has learned anything: they keep the proportion of the reference, 1 : 1.
#
# ## Break it: stale answers
#
# Sampling is slow. So sample the own answers once, from the reference, and train the reward on those. Then the gradient
# is (E − ref)/β at every step. Follow KL(E‖π) down its column.

# %%
rewards = [BETA * 0.2 * k * (E - ref) for k in range(401)]  # after k equal steps
stale = torch.stack([my_best_policy(ref, reward, BETA) for reward in rewards])
kl_stale, kl_fresh = ((E * (E / policies).log()).sum(1) for policies in (stale, path))
nearest = int(kl_stale.argmin())  # watch: nearest ()
print("steps   answers of ref: π          KL(E‖π)    answers of the policy: KL(E‖π)")
for k in (0, nearest, 40, 400):
    print(f"{k:5}   {show(stale[k])}   {kl_stale[k]:8.4f}    {kl_fresh[k].abs():8.4f}")
this_run(kl_stale[nearest] < 0.05 < kl_stale[-1], "Stale answers pass near the expert and leave.")

# %% [markdown]
# The policy passes close to the expert and goes on into the corner of $y_3$, because the stale gradient never becomes
# smaller. The number of steps or a bound then decides where training ends.
#
# ## What is wrong here? (1)
#
# A colleague forgot the 1/β in the policy. RFT still ends at the expert. Is the mistake harmless?

# %%
reward = torch.zeros(3)
for _ in range(800):
    policy = (ref.log() + reward).softmax(0)
    reward = reward + BETA * (E - policy)
print("policy", show(policy), "  expert", show(E), "  its reward", show(reward - reward[0]))

# %% [markdown]
# ## What is wrong here? (2)
#
# Another colleague checks the tilt by training, as in section 1. The training converges, but not to the tilt.

# %%
logits = ref.log().requires_grad_()
optimizer = torch.optim.Adam([logits], lr=0.02)
for _ in range(2000):
    policy = logits.softmax(0)
    loss = -(policy @ r - BETA * ref @ (ref / policy).log())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("trained", show(policy.detach()), "  tilt", show(best))

# %% [markdown]
# ## The same with samples
#
# For texts nobody can sum over all answers. So `minialign/methods/rft.py` takes B demonstrations $y$ and B own answers
# $\tilde y$, and its loss is the mean of $-\frac1\beta\,(r(y) - r(\tilde y))$. Minus its gradient estimates the
# gradient of section 4:

# %%
reward = r.clone().requires_grad_()
demos = torch.multinomial(E, 100_000, replacement=True)
own = torch.multinomial(my_best_policy(ref, r, BETA), 100_000, replacement=True)
loss, _ = reward_alignment_loss(reward[demos], reward[own], beta=BETA)  # watch: loss ()
sampled = -torch.autograd.grad(loss, reward)[0]
print("gradient from samples", show(sampled), "  exact", show(exact))
this_run((sampled - exact).abs().max() < 0.02, "The sampled gradient is near the exact one.")

# %% [markdown]
# The policy then follows by policy gradient ([07](07_policy_gradient.ipynb)). By default, `python -m minialign rft`
# does this in one round, with the reference's answers and rewards in [0, 6]. So it does not end where SFT ends.
#
# ## What you now know
#
# - A reward alone drives a policy to that reward's maximum, sensible or not. The term β KL(π‖ref) prevents it.
# - For β > 0 the best policy is $\pi^* \propto \mathrm{ref}\, e^{r/\beta}$, because
#   $J = \beta \log Z - \beta\,\mathrm{KL}(\pi\|\pi^*)$.
# - Every policy without zeros has a reward, $\beta\log(\pi/\mathrm{ref})$, up to a constant for each prompt.
# - The reward behind demonstrations has the gradient (E − π)/β. With a free reward for each answer, no limit, and exact
#   steps, this is SFT. A bound on the reward keeps answers that nobody showed.
#
# Next: [05b](05b_irft.ipynb) drops the reward model and uses the policy's own log-ratio as the reward. Or go straight
# to [06](06_reward.ipynb), where rewards are learned from comparisons.
#
# ## Exercises
#
# **1** (easy, 5 minutes). How large must $r_{\max}/\beta$ be for a bound to do nothing to our E and ref? Derive the
# number, then run `bounded_rft` with size 2 a little below and above it.
#
# **2** (medium, 10 minutes). Try this: run `my_rft(E, ref, BETA, size=s)` for s = 1, 4, 6, 10. Which arrive, and why?
#
# **3** (medium, 10 minutes). At which β does the best policy of section 1 write the nonsense half of the time? Use the
# tilt.
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# Not harmless. The policy is right, but the reward is log(E/ref) instead of β log(E/ref). With a bound the policy is
# wrong too. With β = 1 the bug is invisible, so test with β ≠ 1.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
right = my_reward_of(E, ref, 1.0)  # β = 1
print("log(E/ref), shifted:", show(right))
same(right * BETA, my_reward_of(E, ref, BETA), "Only the factor β is missing.")

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The KL has its arguments exchanged: KL(ref‖π) averages over what the *reference* writes. So training maximises $\sum
# \pi r + \beta \sum \mathrm{ref} \log \pi$. At its maximum among distributions all derivatives are equal: $r(y) +
# \beta\,\mathrm{ref}(y)/\pi(y) = c$. So $\pi(y) = \beta\,\mathrm{ref}(y)/(c - r(y))$, and c makes the sum 1. In
# [07b](07b_kl.ipynb) GRPO's "k3" penalty does this.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
expected = torch.tensor(closed_form.sequence_k3_law(ref.numpy(), r.numpy(), BETA))
print("β ref/(c − r):", show(expected))
same(policy.detach(), expected, "The other KL has this best policy.", atol=1e-3)

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The reward behind E must fit between 0 and the bound. It is β log(E/ref) up to a constant. E/ref is 0.2 for the first
# answer and 3.5 for the last, so the rewards differ by up to β log(3.5/0.2). Hence $r_{\max}/\beta$ ≥ log 17.5 = 2.862.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
needed = ((E / ref).log().max() - (E / ref).log().min()).item()
for x in (needed - 0.1, needed + 0.1):
    end = bounded_rft(E, ref, x, size=2.0)[-1]
    print(f"r_max/β = {x:.3f}: {show(end, 6)}")
    same(end, closed_form.demonstration_law(E.numpy(), ref.numpy(), x), "The closed form.", 1e-6)
    arrived = (end - E).abs().max() < 1e-6
    this_run(arrived == (x > needed), "The bound matters below this number only.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# 1 and 4 arrive, 6 and 10 jump from side to side. Near E each step multiplies the distance to E by 1 − s·k, where k is
# an eigenvalue of diag(E) − EEᵀ, the slope of the softmax. The largest k is 0.334. So s must stay below 2/0.334 = 5.98.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
limit = 2 / torch.linalg.eigvalsh(torch.diag(E) - torch.outer(E, E)).max()
print(f"steps must stay below {limit:.2f}")
for size in (1.0, 4.0, 6.0, 10.0):
    end = my_rft(E, ref, BETA, size=size)[-2:]
    print(f"size {size:4}: last two policies {show(end[0])} {show(end[1])}")
    arrived = torch.allclose(end[0], E, atol=1e-6)
    this_run(arrived == (size < limit), "Below the limit it arrives, above it does not.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Write $u = e^{1/\beta}$. The tilt gives the four texts the weights .5, .3u, .199u and .001u⁴. The last one is half of
# the sum if .001u⁴ = .5 + .499u. This holds at u = 8.24, that is at β = 1/log u = 0.474.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
u = 8.0
for _ in range(50):
    u = (500 + 499 * u) ** 0.25
half = my_best_policy(before, pleases, 1 / math.log(u))
print(f"u = {u:.3f}, β = {1 / math.log(u):.4f}, policy {show(half)}")
same(half[3], 0.5, "At this β the nonsense has probability ½.")
