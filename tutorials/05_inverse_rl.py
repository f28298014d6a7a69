# %% [markdown]
# # 05 · Inverse RL: the reward behind the demonstrations
#
# **You will build** the step from a reward to the best policy and the step back, the gradient that finds a reward
# behind demonstrations, and RFT, a method that alternates the two. You will see that RFT without a limit on its reward
# is SFT, and what a limit changes.
#
# **Time:** 28 minutes of reading, 10 seconds of computer.
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
from minialign.task import gold_reward
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
# The upper half of the picture is *reinforcement learning* (RL): somebody gives a reward, and training looks for a
# [policy](../GLOSSARY.md#policy) that gets much of it. The lower half is *[inverse RL](../GLOSSARY.md#inverse-rl)*
# (IRL): somebody gives behaviour, and training looks for the reward behind it. Tutorials 06 to 08 treat the upper
# half with real samples. Here we do both on three or four answers, where every step can be computed exactly.
#
# ## 1. What a reward is
#
# A [reward](../GLOSSARY.md#reward) r(x, y) is a number that says how good completion y is for prompt x. It may be a
# program. The built-in language has one: one point if the thing is named, and one more for a polite opening and a
# polite ending each (minus one if rude).

# %%
ANSWERS = ["i want tea or else!", "give me tea, please.", "may i have tea, please."]
for text in [*ANSWERS, "may i have tea tea tea, please."]:
    print(f"{gold_reward(['ask for tea: '], [text])[0]:5.1f}   {text}")

# %% [markdown]
# The last line gets the full reward too: the author of this reward did not think of such an answer.
#
# ## 2. Why training holds on to a reference
#
# Take a cruder reward, one point for each "please", and a policy that writes nonsense once in a thousand answers. We
# train its four logits with a ready-made optimiser. It maximises the average reward minus β times the [KL
# divergence](../GLOSSARY.md#kl) from the [reference](../GLOSSARY.md#reference), which is a frozen copy of the policy
# from before the training. First with β = 1, then without the KL.

# %%
texts = [*ANSWERS, "please please please please"]
pleases = torch.tensor([float(text.count("please")) for text in texts])  # 0, 1, 1, 4
before = torch.tensor([0.5, 0.3, 0.199, 0.001])


def trained(ref, reward, beta, steps=600):
    """The policy (C,) after Adam on E_π[r] − β·KL(π‖ref), from ref."""
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
    print(f"\n{name}: reward {policy @ pleases:.2f}, four samples:")
    for i in torch.multinomial(policy, 4, replacement=True).tolist():
        print("   ", texts[i])
this_run(free[3] > 0.99, "Without the KL the nonsense wins.")
this_run(held[3] < 0.1, "With β = 1 the nonsense does not pay.")
figures.with_and_without(texts, before.numpy(), held.numpy(), free.numpy(), PULL)

# %% [markdown]
# Without the KL the policy ends on the text with the largest reward: the average of a reward is largest if all
# probability is on its maximum. Here that text is nonsense. With the KL it costs too much. Moving probability to an
# answer that the reference hardly ever writes takes many [nats](../GLOSSARY.md#nats), and each nat costs β.
#
# So β is a price in reward per nat. Set `PULL = 0.3` in the cell, with TINKER on: four points now pay for nonsense.

# %% [markdown]
# <a id="From-a-reward-to-the-best-policy"></a>
# ## 3. From a reward to the best policy
#
# The best policy has a formula, and almost everything in tutorials 06 to 11 rests on it. Let $r(y)$ be the reward of
# each answer to one prompt, $\mathrm{ref}(y)$ and $\pi(y)$ the probabilities under reference and policy. What training
# maximises is
#
# $$J(\pi) \;=\; \mathbb{E}_\pi[r] - \beta\,\mathrm{KL}(\pi\|\mathrm{ref})
#   \;=\; \sum_y \pi(y) \left( r(y) - \beta \log \frac{\pi(y)}{\mathrm{ref}(y)} \right) .$$
#
# Write the reward as a logarithm, $r = \beta \log e^{r/\beta}$, and put both logarithms together:
#
# $$J(\pi) \;=\; -\beta \sum_y \pi(y) \log \frac{\pi(y)}{\mathrm{ref}(y)\, e^{r(y)/\beta}} .$$
#
# The denominator is almost a distribution; only its sum is not 1. Let $Z$ be that sum, and divide by it:
#
# $$Z = \sum_y \mathrm{ref}(y)\, e^{r(y)/\beta}, \qquad \pi^*(y) = \frac{\mathrm{ref}(y)\, e^{r(y)/\beta}}{Z} .$$
#
# Put $Z\pi^*$ into the denominator. Since $\pi$ sums to 1, $\log Z$ comes out of the sum, and what remains is a KL:
#
# $$J(\pi) \;=\; \beta \log Z - \beta\,\mathrm{KL}(\pi\|\pi^*) .$$
#
# The first term does not contain $\pi$. A KL is never negative, and 0 only for equal distributions. **So $\pi^*$ is
# the best policy**, with the value $\beta \log Z$. In words: multiply each probability of the reference by
# $e^{r/\beta}$, then divide by the sum. We call this a [tilt](../GLOSSARY.md#tilt) of the reference.
#
# By hand: ref = (.5, .3, .2) and $e^{r/\beta}$ = (1, 2, 5) give weights .5, .6, 1. Their sum is Z = 2.1.


# %%
def my_best_policy(ref, reward, beta):
    """The tilt. ref: (C,) probabilities, all above 0. reward: (C,). Returns π* (C,), with sum 1.

    Use logarithms, so that a large reward/beta does not overflow: add reward/beta to log ref, then
    take the softmax, which divides by Z.
    """
    return (ref.log() + reward / beta).softmax(0)


# %% [markdown]
# ### Checkpoint
#
# The hand computation, the project's formula, the trained policy of section 2, and the derivation itself for 1000
# random policies.

# %%
ref = torch.tensor([0.5, 0.3, 0.2])
BETA = 0.6
r = BETA * torch.tensor([1.0, 2.0, 5.0]).log()
best = my_best_policy(ref, r, BETA)
by_hand = my_best_policy(torch.tensor([0.5, 0.3, 0.2]), r, BETA)
same(by_hand, torch.tensor([0.5, 0.6, 1.0]) / 2.1, "my_best_policy gives .5, .6, 1 over 2.1.")
same(best, closed_form.tilt(ref.numpy(), r.numpy(), BETA), "my_best_policy is closed_form.tilt.")
reward = r.clone().requires_grad_()
slope = torch.autograd.grad(my_best_policy(ref, reward, BETA)[2], reward)[0]
same(slope, best[2] * (torch.eye(3)[2] - best) / BETA,
     "The gradient of my_best_policy is π(y)·(1[y] − π)/β.")
print("section 2 trained to", show(held))
print("the formula says    ", show(my_best_policy(before, pleases, PULL)))
same(held, my_best_policy(before, pleases, PULL), "Training arrives at the formula.", atol=0.02)


def objective(policies, ref, reward, beta):
    """J of each row. policies: (N, C). Returns (N,)."""
    return policies @ reward - beta * (policies * (policies / ref).log()).sum(-1)


others = torch.rand(1000, 3).log().mul(2).softmax(1)  # watch: others (1000, 3)
log_Z = (ref * (r / BETA).exp()).sum().log()
kl_to_best = (others * (others / best).log()).sum(1)  # watch: kl_to_best (1000,)
J = objective(others, ref, r, BETA)  # watch: J (1000,)
gap = (J - (BETA * log_Z - BETA * kl_to_best)).abs().max()
print(f"J and β log Z − β KL(π‖π*) differ by at most {gap:.0e} in 1000 random policies")
print(f"highest J of the 1000: {J.max():.5f}   J(π*) = β log Z = {BETA * log_Z:.5f}")
always(gap < 1e-9, "J(π) = β log Z − β KL(π‖π*) holds for every policy.")
always((J < BETA * log_Z).all(), "No policy has a higher J than the tilt.")

# %% [markdown]
# ## 4. And back: from a policy to its reward
#
# Solve the formula for the reward:
#
# $$r(y) \;=\; \beta \log \frac{\pi(y)}{\mathrm{ref}(y)} + \mathrm{const} .$$
#
# So *every* policy with no zeros is the best one for some reward. The constant ($\beta \log Z$) is free: adding 7 to
# all rewards of a prompt changes no policy. This way back makes DPO possible in [09](09_dpo.ipynb).


# %%
def my_reward_of(policy, ref, beta):
    """The reward whose tilt is `policy`, shifted so that the first answer has reward 0.

    policy, ref: (C,). Returns (C,).
    """
    reward = beta * (policy / ref).log()
    return reward - reward[0]


# %% [markdown]
# ### Checkpoint

# %%
E = torch.tensor([0.1, 0.2, 0.7])  # how often the expert writes each of the ANSWERS
same(my_reward_of(best, ref, BETA), r, "my_reward_of gives the reward that we began with.")
same(my_best_policy(ref, r + 7, BETA), best, "A constant added to all rewards changes no policy.")
r_of_E = my_reward_of(E, ref, BETA)
same(my_best_policy(ref, r_of_E, BETA), E, "The best policy of the reward behind E is E.")
policy = E.clone().requires_grad_()
slope = torch.autograd.grad(my_reward_of(policy, ref, BETA)[2], policy)[0]
same(slope, torch.tensor([-BETA / E[0], 0, BETA / E[2]]),
     "my_reward_of is β log π(y) − β log π(y1), and a constant.")
for text, p, q, number in zip(ANSWERS, ref, E, r_of_E, strict=True):
    print(f"{text:24} reference {p:.1f}   expert {q:.1f}   reward {number:6.3f}")

# %% [markdown]
# So there is a reward whose best policy *is* the expert. It is not `gold_reward`, and another ref or β gives another.
# It is a reward under which the expert is best for *our* ref and β (Ng & Russell 2000; Ziebart et al. 2008).
#
# ## 5. Finding the reward from demonstrations
#
# With a language model we do not know $E$; we have samples. Inverse RL by maximum likelihood asks: under which reward
# does the best policy $\pi_r$ make the demonstrations most likely?
#
# $$\max_r \; \ell(r) = \sum_y E(y) \log \pi_r(y), \qquad \log \pi_r = \log\mathrm{ref} + r/\beta - \log Z .$$
#
# We need the gradient. The only hard part is $\log Z$. Section 3 says what it is: the best value,
# $\log Z = \max_\pi J(\pi)/\beta$. When the reward moves a little, the maximiser $\pi_r$ moves too, but at a maximum
# a small move of the policy changes $J$ by nothing to first order. This is the **envelope theorem**: to differentiate
# a maximum, keep the maximiser fixed. With $\pi$ fixed, $J/\beta$ contains the reward only in
# $\mathbb{E}_\pi[r]/\beta$, so $\partial \log Z/\partial r(y) = \pi_r(y)/\beta$ and
#
# $$\frac{\partial \ell}{\partial r(y)} \;=\; \frac{E(y) - \pi_r(y)}{\beta} .$$
#
# Raise the reward of what the expert writes, lower it for what the policy writes. Nobody has to label an answer as
# bad: the policy's own answers are the other side. (Lemma 3.1 of Li et al. 2024.) By hand, at r = 0: $\pi_r$ = ref,
# and the gradient is (.1−.5, .2−.3, .7−.2)/.6 = (−.667, −.167, .833).


# %%
def my_reward_gradient(reward, expert, ref, beta):
    """∂ℓ/∂r. reward, expert, ref: (C,). Returns (C,): positive where the reward should rise."""
    policy = my_best_policy(ref, reward, beta)  # watch: policy (C,)
    return (expert - policy) / beta


# %% [markdown]
# ### Checkpoint
#
# Automatic differentiation goes through the softmax and does not know the envelope theorem.

# %%
reward = r.clone().requires_grad_()
likelihood = E @ my_best_policy(ref, reward, BETA).log()
numeric = torch.autograd.grad(likelihood, reward)[0]
print("autograd", show(numeric, 6), "  (E − π_r)/β", show(my_reward_gradient(r, E, ref, BETA), 6))
same(my_reward_gradient(r, E, ref, BETA), numeric, "my_reward_gradient equals autograd's.")
at_0 = my_reward_gradient(torch.zeros(3), E, ref, BETA)
same(at_0, (E - ref) / BETA, "my_reward_gradient at r = 0 is (E − ref)/β.")
wrong = (E - ref) / BETA  # as if another policy than the maximiser were kept fixed
print("with the answers of ref at this r:", show(wrong, 6))
always((wrong - numeric).abs().max() > 1e-3, "Only the maximiser may be kept fixed.")

# %% [markdown]
# The last line shows: the own answers must come from the policy that follows the *present* reward.
#
# For texts we estimate both averages with samples. A batch holds B demonstrations $y$ and B own answers $\tilde y$.
# The loss whose gradient is minus the one above is $-\frac1\beta\,\big(r(y) - r(\tilde y)\big)$, averaged over the
# batch.


# %%
def my_rft_loss(demo_rewards, sample_rewards, beta):
    """The mean loss of B pairs, a scalar.

    demo_rewards, sample_rewards: (B,), the rewards of the demonstrations and of the own answers.
    """
    margins = demo_rewards - sample_rewards  # watch: margins (B,)
    return -margins.mean() / beta


# %% [markdown]
# ### Checkpoint

# %%
a, b = torch.randn(2, 16).unbind()
a.requires_grad_(), b.requires_grad_()
mine, (theirs, _) = my_rft_loss(a, b, BETA), reward_alignment_loss(a, b, beta=BETA)
same(mine, theirs, "my_rft_loss equals minialign's.")
slopes, their_slopes = torch.autograd.grad(mine, (a, b)), torch.autograd.grad(theirs, (a, b))
same(torch.stack(slopes), torch.stack(their_slopes), "The gradient of my_rft_loss is minialign's.")

reward = r.clone().requires_grad_()
demos = torch.multinomial(E, 100_000, replacement=True)
own = torch.multinomial(my_best_policy(ref, r, BETA), 100_000, replacement=True)
sampled = -torch.autograd.grad(my_rft_loss(reward[demos], reward[own], BETA), reward)[0]
print("gradient from 100,000 pairs", show(sampled), "  exact", show(numeric))
this_run((sampled - numeric).abs().max() < 0.02, "The sampled gradient is near the exact one.")

# %% [markdown]
# ## 6. RFT takes the same path as SFT
#
# **RFT**, reward-learning fine-tuning (Li et al. 2024, "Getting More Juice Out of the SFT Data", Algorithm 1; not
# rejection sampling), takes turns: the reward moves along this gradient, the policy follows the reward, and again. Here
# the policy follows exactly, by the formula. We move the reward by size·β²·gradient, so that $r/\beta$ moves by
# size·(E − π) for any β. `low` and `high` limit the reward; we need them below.


# %%
def my_rft(expert, ref, beta, steps=400, size=2.0, low=-math.inf, high=math.inf):
    """RFT with exact averages, from reward 0. Returns the policies (steps + 1, C), first ref.

    Each step adds size·beta²·my_reward_gradient(…) to the reward (C,), clamps the reward to
    [low, high], and appends the best policy of the reward to the path.
    """
    reward = torch.zeros(len(ref))
    path = [my_best_policy(ref, reward, beta)]
    for _ in range(steps):
        reward = reward + size * beta**2 * my_reward_gradient(reward, expert, ref, beta)
        reward = reward.clamp(low, high)  # watch: reward (C,)
        path.append(my_best_policy(ref, reward, beta))
    return torch.stack(path)


# %% [markdown]
# ### Checkpoint
#
# Stop in `my_rft` at the first call, first step: the reward is β · (−.4, −.1, .5) = (−.24, −.06, .3).

# %%
first = my_rft(E, ref, BETA, steps=1, size=1.0)
same(first[1], (ref.log() + E - ref).softmax(0), "my_rft's first step adds E − ref to r/β.")
x = 2.0  # r_max/β
limited = my_rft(E, ref, BETA, high=x * BETA, low=0.0)[-1]
expected = closed_form.demonstration_law(E.numpy(), ref.numpy(), x)
same(limited, expected, "my_rft clamps the reward to [low, high].", atol=1e-6)

path = my_rft(E, ref, BETA, size=0.2)
logits, sft = ref.log(), [ref]
for _ in range(400):  # SFT, tutorial 04: minus the gradient of −Σ E log π in the logits is E − π
    logits = logits + 0.2 * (E - logits.softmax(0))
    sft.append(logits.softmax(0))
sft = torch.stack(sft)
print("RFT ends at", show(path[-1]), "  its reward", show(my_reward_of(path[-1], ref, BETA)))
print(f"largest gap between RFT's path and SFT's: {(path - sft).abs().max():.0e}")
same(path, sft, "my_rft and SFT have the same policy after every step.")
figures.same_path(ANSWERS, ref.numpy(), E.numpy(), path.numpy(), sft.numpy())
for name, policy in (("before", ref), ("after", path[-1])):
    print(f"\n{name}:")
    for i in torch.multinomial(policy, 6, replacement=True).tolist():
        print("   ", ANSWERS[i])

# %% [markdown]
# The two paths agree to rounding error: RFT adds size·(E − π) to $r/\beta$ inside the softmax, and SFT adds it to the
# logits. With exact steps and a reward that is free for each answer, inverse RL is SFT. What can make it different?
#
# - **A limit on the reward**: the next section.
# - **Generalisation.** A reward model is a network. What it learns from one prompt it applies to others. Whether that
#   helps must be measured on held-out prompts.
# - **A second use.** A reward can rank new answers or judge another policy.
#
# ## 7. One demonstration and a bound
#
# Real data has one demonstration for each prompt. It is one sample of the expert, who may write other answers too. But
# the data look like E = (0, 0, 1), and SFT drives every other answer towards 0. Li et al. (Example 1) keep rewards
# between 0 and a bound $r_{\max}$. The gradient then pushes $r(y_3)$ up to the bound and the others down to 0. With
# $x = r_{\max}/\beta$ and a uniform reference, the shown answer gets $e^x/(2+e^x)$ and each other one $1/(2+e^x)$.
# (Their Table 1 prints 2 in place of 1.)

# %%
only_y3, uniform = torch.tensor([0.0, 0.0, 1.0]), torch.ones(3) / 3
unbounded = my_rft(only_y3, uniform, BETA, steps=1000, size=0.1)  # watch: unbounded (1001, 3)
curves = {"SFT; RFT without a bound": unbounded[1:, 2]}
print("r_max/β  y1      y2      y3")
for x in (1, 2, 4):
    bounded = my_rft(only_y3, uniform, BETA, steps=1000, size=0.1, low=0.0, high=x * BETA)
    print(f"{x:5}  ", "  ".join(f"{p:.4f}" for p in bounded[-1]))
    same(bounded[-1], closed_form.table_1(x), "The end is (1, 1, e^x)/(2 + e^x), x = r_max/β.")
    curves[f"r_max/β = {x}"] = bounded[1:, 2]
print("without a bound, π(y3) after 10, 100, 1000 steps:", show(unbounded[[10, 100, 1000], 2]))
figures.one_demonstration(range(1, 1001), curves)

# %% [markdown]
# So it is the bound that keeps the other answers, not inverse RL. A price on large rewards (a *ridge*, exercise 3) or
# stopping early does the same. About $y_1$ and $y_2$ the bound knows only what the reference said. The bounded runs are
# slower from the first step: rewards start at 0, the lower bound, so those of $y_1$ and $y_2$ cannot fall.
#
# ## Break it: stale answers
#
# Sampling is expensive. So sample own answers once, from the reference, and train the reward on those. The gradient
# is then (E − ref)/β at every step.

# %%
rewards = [BETA * 0.2 * k * (E - ref) for k in range(401)]  # after k equal steps
stale = torch.stack([my_best_policy(ref, reward, BETA) for reward in rewards])
kl_stale, kl_fresh = ((E * (E / policies).log()).sum(1) for policies in (stale, path))
nearest = int(kl_stale.argmin())
print("steps   answers of ref: π          KL(E‖π)    answers of the policy: KL(E‖π)")
for k in (0, 5, nearest, 40, 400):
    print(f"{k:5}   {show(stale[k])}   {kl_stale[k]:8.4f}    {kl_fresh[k].abs():8.4f}")
this_run(kl_stale[nearest] < 0.05 < kl_stale[-1], "Stale answers pass near the expert and leave.")

# %% [markdown]
# The policy passes close to the expert and goes on into the corner, because nothing tells the reward that the policy
# has arrived. With stale answers, the number of steps or the bound decides where training ends.

# %% [markdown]
# ## What is wrong here? (1)
#
# A colleague forgot the 1/β when the policy follows the reward. RFT still ends at the expert. Is the mistake
# harmless?

# %%
reward = torch.zeros(3)
for _ in range(800):
    policy = (ref.log() + reward).softmax(0)
    reward = reward + BETA * (E - policy)
print("policy", show(policy), "  expert", show(E), "  its reward", show(reward - reward[0]))

# %% [markdown]
# ## What is wrong here? (2)
#
# Another colleague checks the tilt by training, as in section 2, and does not arrive at it. The loss falls.

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
# ## The same in the real methods
#
# For texts the sums become batches, the reward is a model with its own weights, and the policy follows it by a few
# steps of policy gradient ([07](07_policy_gradient.ipynb)). `minialign/methods/rft.py` does this on the built-in
# language:
#
# ```
# python -m minialign rft                # one round: all reward steps, then all policy steps; --bound 6
# python -m minialign rft --rounds 4     # four rounds, each with the policy's present answers
# ```
#
# ## What you now know
#
# - A reward alone drives a policy to that reward's maximum, sensible or not. The KL to a reference makes unlikely
#   answers expensive.
# - The best policy is $\pi^* \propto \mathrm{ref}\, e^{r/\beta}$, because
#   $J = \beta \log Z - \beta\,\mathrm{KL}(\pi\|\pi^*)$.
# - Every policy has a reward, $\beta\log(\pi/\mathrm{ref})$, up to a constant for each prompt. It depends on ref and β.
# - The reward behind demonstrations has the gradient (E − π)/β. Without a limit on the reward this is SFT.
# - With one demonstration for each prompt, a bound or a ridge keeps other answers.
#
# Next: [05b](05b_irft.ipynb) drops the reward model and lets the policy be its own reward, or go straight to
# [06](06_reward.ipynb), where rewards are learned from comparisons.
#
# ## Exercises
#
# **1** (easy, 5 minutes). How large must $r_{\max}/\beta$ be for a bound to do nothing to our E and ref? Derive the
# number, then run `my_rft` a little below and above it.
#
# **2** (medium, 10 minutes). Try this: run `my_rft(E, ref, BETA, size=s)` for s = 1, 4, 6, 10. Which arrive? What do
# you see in the others, and why?
#
# **3** (hard, 20 minutes). Make rewards cost something: add $c\,(r(y)^2 + r(\tilde y)^2)$ to the loss. Show that it
# ends where $r = \frac{E - \pi}{2c\beta\,(E + \pi)}$. Run it with c = 0.5 for E and for one demonstration. Does it
# keep the answers nobody showed, and what does that cost?
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# Not harmless. The reward makes up for what the policy step leaves out, so the policy is right and the reward is the
# wrong one: it is log(E/ref) instead of β log(E/ref). With a bound or a ridge the policy is wrong too. With β = 1 the
# bug is invisible, so test with β ≠ 1, and with a reference that is not uniform.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
same(reward - reward[0], my_reward_of(E, ref, 1.0), "The reward is that for β = 1.", atol=1e-6)

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The KL has its arguments exchanged: KL(ref‖π) averages over what the *reference* says. It is a KL, it is 0 at ref,
# and its best policy is another one: π(y) = β ref(y)/(c − r(y)), where the constant c makes the sum 1. Tutorial
# [07](07_policy_gradient.ipynb) meets it again, where GRPO's "k3" penalty does this by accident.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
expected = torch.tensor(closed_form.sequence_k3_law(ref.numpy(), r.numpy(), BETA))
print("β ref/(c − r):", show(expected))
same(policy.detach(), expected, "The other KL has this best policy.", atol=1e-3)

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The reward behind E must fit between 0 and the bound. It is β log(E/ref) up to a constant, and spreads over
# β log(3.5/0.2). So $r_{\max}/\beta$ ≥ log 17.5 = 2.862.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
needed = ((E / ref).log().max() - (E / ref).log().min()).item()
for x in (needed - 0.1, needed + 0.1):
    end = my_rft(E, ref, BETA, steps=1000, low=0.0, high=x * BETA)[-1]
    print(f"r_max/β = {x:.3f}: {show(end, 6)}")
    arrived = (end - E).abs().max() < 1e-6
    this_run(arrived == (x > needed), "The bound matters below this number only.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# 1 and 4 arrive, 6 and 10 jump from side to side. Near E each step multiplies the distance to E by 1−s·k, where k is
# a slope of the softmax (an eigenvalue of diag(E)−EEᵀ). The largest k is 0.334 here. For s > 2/0.334 = 5.98 a step
# overshoots by more than the distance that it corrects. SFT has the same limit.
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
# On average the loss is $-\frac1\beta\sum(E - \pi)\,r + c\sum(E + \pi)\,r^2$. Set its derivative in r(y) to 0 with π
# fixed. Since |E − π| ≤ E + π, no reward exceeds 1/(2cβ): the ridge is a soft bound, and the other answers keep some
# probability. The price: for the full E it holds the policy back. The best answer gets .485 in place of .7.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
c = 0.5
for name, expert in (("E", E), ("one demonstration", only_y3)):
    reward = torch.zeros(3)
    for _ in range(6000):
        policy = my_best_policy(ref, reward, BETA)
        gradient = -(expert - policy) / BETA + 2 * c * (expert + policy) * reward
        reward = reward - BETA**2 / (1 + 4 * c * BETA**2) * gradient
    print(f"{name:18}", show(policy), "  rewards", show(reward))
    end = torch.tensor(closed_form.ridge_law(expert.numpy(), ref.numpy(), BETA, c))
    r_end = (expert - end) / (2 * c * BETA * (expert + end))
    same(my_best_policy(ref, r_end, BETA), end, "At the end r has the formula above.", atol=1e-6)
    this_run((policy - end).abs().max() < 0.01, "The run arrives at the end.")
