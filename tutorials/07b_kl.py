# %% [markdown]
# # 07b · Where the KL goes: in the reward or in the loss
#
# **You will build** three estimators of the KL, the reward with its penalty, and the formula for the policy at which
# GRPO's kind of loss ends. You check by training where each choice ends.
#
# **Time:** 25 minutes of reading, about 20 seconds of computer.
#
# **You need:** [07](07_policy_gradient.ipynb) (the policy gradient, RLOO, GRPO) and [05](05_inverse_rl.ipynb)
# (the best policy π\* ∝ ref·e^(r/β)).
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import copy

import torch

from minialign import kl
from minialign.logps import token_logps
from minialign.methods.reinforce import reinforce_loss
from minialign.methods.rloo import leave_one_out
from minialign.sample import sample
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import policy_gradient as figures
from tutorials.phrase_requests import EOS, MAX_NEW, bonus, manners, rude_gpt, show_answers

torch.set_default_dtype(torch.float64)  # so that "equal" can mean twelve digits
torch.set_num_threads(1)  # the tensors are so small that a second core only waits


# %% [markdown]
# ## The question
#
# Trained on the reward alone, the policy ends on the answers with the highest reward, and the rest of what the model
# could do may get lost. So one subtracts a penalty: β times the [KL divergence](../GLOSSARY.md#kl) of the
# [policy](../GLOSSARY.md#policy) π from the [reference](../GLOSSARY.md#reference) ref, with β > 0. The objective is
#
# $$J(\pi) = \mathbb{E}_{\pi}[r] - \beta\, \mathrm{KL}(\pi \| \mathrm{ref}),$$
#
# and by tutorial 05 its maximum is the [tilt](../GLOSSARY.md#tilt) π\* ∝ ref·e^(r/β).
#
# The KL is an average over answers, so we must estimate it from samples. Each sampled answer y gives a log-ratio $d =
# \log \pi(y) - \log \mathrm{ref}(y)$. Some programs subtract it from the reward, as a number. Others add a function of
# it to the loss, and differentiate it. Do both end at π\*?

# %%
figures.places()

# %% [markdown]
# ## 1 · Three estimates of the KL
#
# Three functions of d are in use (Schulman 2020):
#
# $$k_1 = d, \qquad k_2 = \tfrac12 d^2, \qquad k_3 = d + (e^{-d} - 1)$$
#
# - $k_1$ is the definition of the KL. Its mean over samples of π is the KL, but single values may be negative.
# - $k_2$ is never negative. It is biased: its mean is close to the KL only while π is near ref.
# - $k_3$ adds to $k_1$ a term whose mean is 0, because $\mathbb{E}_\pi[e^{-d}] = \sum_y \pi(y)\,
#   \mathrm{ref}(y)/\pi(y) = 1$ if π has no zeros. So its mean is the KL too. It is never negative, because
#   $e^{-d} \ge 1 - d$.


# %%
def my_kl_estimators(logps, ref_logps):
    """logps, ref_logps: log-probs of the same samples, any one shape -> (k1, k2, k3), by the
    formulas above: three tensors of that shape.
    """
    d = logps - ref_logps
    return d, d**2 / 2, d + (-d).exp() - 1


# %% [markdown]
# ### Checkpoint: values and means
#
# We take the three answers of tutorial 07 and a reference, and sum over all three answers. Compare the means with the
# KL, and the spreads (standard deviations) with each other.

# %%
r = torch.tensor([1.0, 0.0, 2.0])
pi = torch.tensor([0.5, 0.3, 0.2])
ref = torch.tensor([0.2, 0.3, 0.5])
print(f"KL(π‖ref) = {pi @ (pi.log() - ref.log()):.3f}")
for k, theirs in zip(my_kl_estimators(pi.log(), ref.log()), (kl.k1, kl.k2, kl.k3), strict=True):
    name = theirs.__name__
    equal(k, theirs(pi.log(), ref.log()), f"{name} of my_kl_estimators equals minialign's {name}.")
    spread = (pi @ (k - pi @ k) ** 2).sqrt()
    print(f"{name}: values {k.numpy().round(3)}   mean {pi @ k:.3f}   spread {spread:.3f}")

# %% [markdown]
# As a number to watch, $k_3$ is a good choice while π is near ref: it has the right mean, and here less than a third
# of the spread of $k_1$. Far from ref, $e^{-d}$ can be huge.
#
# ## 2 · In the reward, as a number
#
# Which loss has the gradient of J? We differentiate J as in section 1 of tutorial 07. Now the number in the average
# depends on the weights too, because d contains log π:
#
# $$\nabla J = \nabla \sum_y \pi(y)\,\big(r(y) - \beta d(y)\big)
# = \sum_y \big(r - \beta d\big) \nabla \pi \;-\; \beta \sum_y \pi\, \nabla d$$
#
# In the last sum $\nabla d = \nabla \log \pi$, and $\sum \pi \nabla \log \pi = \sum \nabla \pi = 0$. So
#
# $$\nabla J = \mathbb{E}_\pi\big[R\, \nabla \log \pi\big], \qquad R = r - \beta d .$$
#
# This is the policy gradient of 07 with R in the place of r. R is used as a constant: no gradient flows into it. So the
# rest of the loop, with its baselines, stays as it is. (Exercise 2 does this on the GPT of 07.)


# %%
def my_penalised_rewards(rewards, logps, ref_logps, beta):
    """rewards (B,); logps, ref_logps (B, T): log-probs of the tokens under π and ref, 0 where
    nothing is scored.

    Returns R (B,): the reward minus β times the log-ratio of the whole completion. R is a constant:
    it is detached from logps.
    """
    d = (logps - ref_logps).sum(1)  # watch: d (B,)
    return (rewards - beta * d).detach()


# %% [markdown]
# ### Checkpoint

# %%
generator = torch.Generator().manual_seed(0)
logps, ref_logps = -torch.rand(2, 8, 5, generator=generator)
logps.requires_grad_()
some = torch.randn(8, generator=generator)
R = my_penalised_rewards(some, logps, ref_logps, 0.1)
theirs = kl.kl_rewards(some, logps, ref_logps, beta=0.1)
equal(R, theirs, "my_penalised_rewards equals minialign's kl_rewards.")
always(not R.requires_grad, "my_penalised_rewards returns a constant.")
print("penalised rewards: equal")

# %% [markdown]
# To see where a loss ends, `settle` follows its *mean* update, without the noise of samples, until nothing changes.
# `loss_of(logps)` gets the log-probs of the three answers and returns, for each answer, its loss if it is drawn.
# Autograd goes through `loss_of`, but not through the probabilities π(y) of the average, because a sample is fixed once
# it is drawn. The last two lines of the output should agree.


# %%
BETA = 0.8


def settle(loss_of, steps=1000, lr=1.0):
    """Gradient descent from ref on the mean of loss_of(logps (3,)) -> (3,). Returns the last π."""
    logits = ref.log().requires_grad_()
    for _ in range(steps):
        logps = logits.log_softmax(0)
        loss = logps.exp().detach() @ loss_of(logps)  # watch: loss ()
        (slope,) = torch.autograd.grad(loss, logits)
        logits = (logits - lr * slope).detach().requires_grad_()
    return logits.softmax(0).detach()


def k1_in_reward(logps):
    R = my_penalised_rewards(r, logps[:, None], ref.log()[:, None], BETA)  # answers of one token
    return -R * logps


star = torch.tensor(closed_form.tilt(ref.numpy(), r.numpy(), BETA))  # π*
end = settle(k1_in_reward)
print("R at the end:    ", (r - BETA * (end / ref).log()).numpy().round(3))
print("k1 in the reward:", end.numpy().round(3))
print("π*:              ", star.numpy().round(3))
this_run(torch.allclose(end, star, atol=1e-6, rtol=0), "k1 in the reward ends at π*.")

# %% [markdown]
# The training ends at π\*. There R is the same for all answers: $\log(\pi^*/\mathrm{ref}) = r/\beta - \log Z$, so $R =
# \beta \log Z$. All advantages of RLOO are then 0, so even single updates no longer move the policy.
#
# ## 3 · In the loss: which gradient does it have?
#
# The other place is the loss: $-A \log \pi(y) + \beta\, k(d)$. Autograd differentiates k and takes the sampled y as
# fixed. So the mean gradient is $\mathbb{E}_\pi[\nabla k]$. This is not the gradient of $\mathbb{E}_\pi[k]$, because
# the π of the average also depends on the weights. For each estimator:
#
# - $\nabla k_1 = \nabla \log \pi$. Its mean is 0. On average, $k_1$ in the loss does nothing.
# - $\nabla k_2 = d\, \nabla \log \pi$. Its mean is the gradient of KL(π‖ref), as section 2 has shown.
# - $\nabla k_3 = (1 - e^{-d})\, \nabla \log \pi$. The 1 has mean 0. The rest is $-\sum_y \pi\,
#   \frac{\mathrm{ref}}{\pi} \nabla \log \pi = -\sum_y \mathrm{ref}\, \nabla \log \pi$. This is the gradient of the
#   *other* divergence, $\mathrm{KL}(\mathrm{ref}\|\pi) = \sum_y \mathrm{ref}\, (\log \mathrm{ref} - \log \pi)$.
#
# In the output, look for each estimator at which of the first two lines it equals.

# %%
logits = pi.log().requires_grad_()
live = logits.log_softmax(0)  # log π with its gradient


def gradient(scalar):
    (slope,) = torch.autograd.grad(scalar, logits, retain_graph=True)
    return slope


reverse = gradient(live.exp() @ (live - ref.log()))
forward = gradient(ref @ (ref.log() - live))
in_loss = [gradient(pi @ k) for k in my_kl_estimators(live, ref.log())]
print("∇ KL(π‖ref)   ", reverse.numpy().round(3))
print("∇ KL(ref‖π)   ", forward.numpy().round(3) + 0.0)  # + 0.0 turns −0.0 into 0.0
for name, slope in zip(("k1", "k2", "k3"), in_loss, strict=True):
    print(f"{name} in the loss", slope.numpy().round(3) + 0.0)
equal(in_loss[0], torch.zeros(3), "k1 in the loss has mean gradient 0.", atol=1e-12, rtol=0)
equal(in_loss[1], reverse, "k2 in the loss has the gradient of the KL.")
equal(in_loss[2], forward, "k3 in the loss has the gradient of the other KL.")

# %% [markdown]
# All this holds for samples of the present policy, and for d of whole completions. If k is added token by token, the
# gradients of $k_2$ and $k_3$ are no longer exactly these; section 6 comes back to this.
#
# ## 4 · Where k3 in the loss ends
#
# With $k_3$ in the loss, training maximises another objective: $\mathbb{E}_\pi[r] - \beta\, \mathrm{KL}(\mathrm{ref} \|
# \pi)$. We can compute its maximum. Only the part $\sum_y \pi\, r + \beta \sum_y \mathrm{ref} \log \pi$ depends on π.
# The probabilities must sum to 1, so at the maximum the derivatives by all π(y) are equal: otherwise one could move
# probability to where the derivative is larger. Call their common value c:
#
# $$r(y) + \beta\, \frac{\mathrm{ref}(y)}{\pi(y)} - c = 0 \qquad \Longrightarrow \qquad
# \pi(y) = \frac{\beta\, \mathrm{ref}(y)}{c - r(y)} .$$
#
# Probabilities are positive, so c lies above all rewards. As c grows, all π(y) fall, so exactly one c gives the sum 1.
# We can find it by bisection. At $c = \max_y (r + \beta\,\mathrm{ref})$ one of the π(y) is 1, so the sum is at least
# 1. At $c = \max_y r + \beta$ each π(y) is at most ref(y), so the sum is at most 1.


# %%
def my_k3_end(ref, rewards, beta):
    """The policy β·ref/(c − r), with the one c above all rewards for which it sums to 1.

    ref, rewards: (K,). Returns (K,). Bisection: start with the c between max(r + β·ref), where the
    sum is at least 1, and max(r) + β, where it is at most 1. Halve 100 times.
    """
    low, high = (rewards + beta * ref).max(), rewards.max() + beta
    for _ in range(100):
        c = (low + high) / 2  # watch: c ()
        if (beta * ref / (c - rewards)).sum() > 1:
            low = c
        else:
            high = c
    return beta * ref / (high - rewards)


# %% [markdown]
# ### Checkpoint: the formula, the project's, and training
#
# We let all four choices settle. Which of them end at π\*?

# %%
k3_end = my_k3_end(ref, r, BETA)
theirs = closed_form.sequence_k3_law(ref.numpy(), r.numpy(), BETA)
equal(k3_end, torch.tensor(theirs), "my_k3_end equals sequence_k3_law.", atol=1e-9, rtol=0)
ends = {"k1 in the reward": end}
for i, name in ((1, "k2 in the loss"), (2, "k3 in the loss"), (0, "k1 in the loss")):
    ends[name] = settle(
        lambda logps, i=i: -r * logps + BETA * my_kl_estimators(logps, ref.log())[i]
    )
for name, policy in {"π*": star, "β·ref/(c − r)": k3_end, **ends}.items():
    print(f"{name:17} {policy.numpy().round(3)}")
settled = torch.allclose(ends["k2 in the loss"], star, atol=1e-6, rtol=0)
this_run(settled, "k2 in the loss ends at π*.")
settled = torch.allclose(ends["k3 in the loss"], k3_end, atol=1e-6, rtol=0)
this_run(settled, "k3 in the loss ends at β·ref/(c − r).")
figures.ends(star.numpy(), {name: policy.numpy() for name, policy in ends.items()})

# %% [markdown]
# $k_1$ in the reward and $k_2$ in the loss end at π\*. $k_3$ in the loss ends elsewhere: here the worst answer keeps
# more than twice the probability. $k_1$ in the loss has no effect on average, so the policy goes to the best
# answer, as if β were 0.
#
# ## 5 · Break it: a baseline that contains the answer itself
#
# Use the mean of the *whole* group as baseline, as GRPO does. By section 5 of tutorial 07 this multiplies the
# advantage by (G − 1)/G: by ½ for pairs. What happens to the end?
#
# With the KL in the reward, the advantage contains both r and the penalty, so both are halved. With the KL in the loss,
# only the reward is halved, and the penalty is not. Then β acts as $\beta\, G/(G-1)$, here as 2β. (Subtracting a
# constant changes nothing on average. So in the cell the advantage is `share * r` or `share * R`.)

# %%
double = torch.tensor(closed_form.tilt(ref.numpy(), r.numpy(), 2 * BETA))  # π* of 2β
for share, baseline in ((1.0, "leave one out"), (0.5, "group mean, G = 2")):
    in_reward = settle(lambda logps, share=share: share * k1_in_reward(logps))
    in_loss = settle(
        lambda logps, share=share: -share * r * logps
        + BETA * my_kl_estimators(logps, ref.log())[1]
    )
    print(f"{baseline:18} KL in the reward {in_reward.numpy().round(3)}", end="")
    print(f"   k2 in the loss {in_loss.numpy().round(3)}")
    settled = torch.allclose(in_reward, star, atol=1e-6, rtol=0)
    this_run(settled, "With the KL in the reward it ends at π*.")
    right = star if share == 1 else double
    settled = torch.allclose(in_loss, right, atol=1e-6, rtol=0)
    this_run(settled, "In the loss a share of ½ doubles β.")

# %% [markdown]
# Only one of the four ends at another policy. With the KL in the reward the group mean acts like a smaller learning
# rate, so the final policy would not show the difference.
#
# ## 6 · Where GRPO ends
#
# GRPO puts $k_3$ in the loss, and it divides the advantage by the group's standard deviation σ (not the logistic
# function here). (We leave out `std_eps`.) For large groups the mean and σ of a group are those of the policy. So the
# derivation of section 4 holds with r/σ in the place of r:
#
# $$\pi(y) = \frac{\beta\, \mathrm{ref}(y)}{c - r(y)/\sigma}
# = \frac{\beta\sigma\, \mathrm{ref}(y)}{c\,\sigma - r(y)} .$$
#
# This is the end of section 4 with βσ in the place of β. Here σ is the standard deviation of the rewards under this
# final policy itself. The cell trains, and puts the σ that it ends with into your formula.

# %%
def sigma(policy, rewards):
    return (policy @ (rewards - policy @ rewards) ** 2).sqrt()


def grpo_loss(logps, rewards=r):
    policy = logps.exp().detach()
    advantages = (rewards - policy @ rewards) / sigma(policy, rewards)
    return -advantages * logps + BETA * my_kl_estimators(logps, ref.log())[2]


grpo_end = settle(grpo_loss)
print(f"GRPO ends at {grpo_end.numpy().round(3)}   σ there: {sigma(grpo_end, r):.3f}")
formula = my_k3_end(ref, r, BETA * sigma(grpo_end, r))
print(f"k3 with βσ:  {formula.numpy().round(3)}   π*: {star.numpy().round(3)}")
theirs = closed_form.group_normalised_law([(0,), (1,), (2,)], ref.numpy(), r.numpy(), BETA)
this_run(torch.allclose(formula, grpo_end, atol=1e-6, rtol=0), "GRPO ends at β·σ·ref/(c − r).")
settled = torch.allclose(grpo_end, torch.tensor(theirs), atol=1e-6, rtol=0)
this_run(settled, "GRPO ends at group_normalised_law.")

# %% [markdown]
# Here βσ is 0.40, half of β, and the best answer gets more than in π\*. So the number β of GRPO means something else
# than β in RLOO or PPO. You cannot copy it from one method to the other.
#
# All answers here have one token. GRPO adds $k_3$ token by token, so for longer answers each token has such a formula,
# computed from the last token backwards: `token_k3_law` and `group_normalised_law` in `toy/closed_form.py`.
#
# ## What is wrong here? (1)
#
# Somebody calls the estimators with the two arguments exchanged. All values of $k_3$ are still non-negative. What does
# the mean estimate now?

# %%
swapped = my_kl_estimators(ref.log(), pi.log())[2]
print("values", swapped.numpy().round(3), f"  mean {pi @ swapped:.3f}, and KL(π‖ref) is 0.275")

# %% [markdown]
# ## What is wrong here? (2)
#
# The KL is in the reward, as it should be. Nothing crashes. But the training does not end at π\*.

# %%
attached = settle(lambda logps: -(r - BETA * (logps - ref.log())) * logps)
print("ends at", attached.numpy().round(3), "  π* is", star.numpy().round(3))

# %% [markdown]
# ## What you now know
#
# - As values, $k_1$ and $k_3$ have the KL as their mean. As terms of a loss they do something else.
# - The KL belongs in the reward, as a constant: $R = r - \beta d$. The training then ends at π\*.
# - In the loss, on samples of the present policy, $k_2$ has the right gradient, $k_1$ does nothing on average, and
#   $k_3$ has that of KL(ref‖π). With $k_3$ training ends at $\beta\,\mathrm{ref}/(c - r)$.
# - GRPO ends there too, for large groups and answers of one token, with βσ in the place of β.
#
# Next: [08](08_ppo.ipynb) uses each rollout several times, and learns a baseline for every token: PPO.
#
# ## Exercises
#
# For 1 and 4 write a function `loss_of(logps)` that returns three losses, as `k1_in_reward` and `grpo_loss` do.
#
# 1. **Another unit** (easy, 5 minutes). Multiply all rewards by 100 and leave β as it is. Where do GRPO and "k1 in the
#    reward" end?
# 2. **On the GPT** (medium, 15 minutes). Add the penalty to the loop of 07 with RLOO: compute `ref_logps` with
#    `token_logps(base, answers)`, and take R in place of the rewards. What do you expect for the share of whole
#    requests?
# 3. **Small β** (medium, 15 minutes). Let β go to 0 in π\* and in $\beta\,\mathrm{ref}/(c - r)$. How fast does the
#    probability of the worst answer fall in each? Check with `my_k3_end`.
# 4. **Divide, but what?** (hard, 20 minutes). (a) Divide r by its own standard deviation under the policy, and then
#    subtract $\beta k_1$, undivided. Follow it with `settle` for β = 2, 1.5 and 0.8. (b) First form $R = r - \beta
#    k_1$, then divide R by the standard deviation of R. Which one ends at π\*? `closed_form.collapse_threshold(ref, r)`
#    says below which β the other one breaks.
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# Exchanged, $k_3$ is $e^{d} - 1 - d$. Its mean over samples of π is $\sum_y \pi^2/\mathrm{ref} - 1 -
# \mathrm{KL}(\pi\|\mathrm{ref})$, which is no KL, although all values are non-negative. So check an estimator's mean
# against a KL that you can sum, as in section 1.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
mean = (pi**2 / ref).sum() - 1 - pi @ (pi.log() - ref.log())
equal(pi @ swapped, mean, "The mean of the exchanged k3 is Σ π²/ref − 1 − KL.")

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# R was not detached. This does not contradict section 2. There the term that we dropped was $-\beta\,
# \mathbb{E}[\nabla \log \pi] = 0$. But autograd differentiates the product $R \log \pi$, and adds $\log \pi \cdot
# \nabla R = -\beta \log \pi\, \nabla \log \pi$ to $R\, \nabla \log \pi$. The mean of this term is not 0. Together they
# are $(r - \beta d - \beta \log \pi)\, \nabla \log \pi$. The bracket is constant at $\pi \propto \sqrt{\mathrm{ref}
# \cdot e^{r/\beta}}$. Even with r = 0 such a training leaves the reference.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
root = (ref * (r / BETA).exp()).sqrt()
end_attached = root / root.sum()
settled = torch.allclose(attached, end_attached, atol=1e-6, rtol=0)
this_run(settled, "Without detach it ends at √(ref·e^(r/β)).")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# GRPO ends at the same policy, because its advantages do not change. "k1 in the reward" ends at the π\* of β/100: all
# probability is on the best answer.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
scaled = settle(lambda logps: grpo_loss(logps, 100 * r))
equal(scaled, grpo_end, "The end of GRPO does not depend on the unit of the reward.")
print("GRPO", scaled.numpy().round(3), end="   ")
print("π*", closed_form.tilt(ref.numpy(), 100 * r.numpy(), BETA).round(3))

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# In this run 85 % of the requests are whole without the penalty and 95 % with β = 0.2, at no lower marks. A broken
# request such as "could i get give me tea, please." gets full marks, but it is rare under the reference. So its d grows
# as the policy makes it likelier, and its R falls below that of a whole request. (This is one seed, and 60 turns are
# not the end of training.)
#
# </details>


# %% tags=["solution"] jupyter={"source_hidden": true}
def train(base, beta, steps=60):
    """The loop of 07, RLOO with the penalty. Returns (policy, mean marks of the last ten)."""
    policy = copy.deepcopy(base)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    history = []
    for k in range(steps):
        prompts = torch.randperm(24, generator=draw)[:8, None].tolist()
        answers = sample(policy, prompts, max_new=MAX_NEW, n=4, eos_id=EOS, seed=(0, k))
        asked = [x for x in prompts for _ in range(4)]
        marks = manners(asked, answers.completions)
        logps = token_logps(policy, answers)
        with torch.no_grad():
            ref_logps = token_logps(base, answers)
        R = my_penalised_rewards(marks + bonus(asked), logps, ref_logps, beta)
        advantages = leave_one_out(R, group_size=4)
        loss, _ = reinforce_loss(logps, advantages, answers.mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(marks.mean().item())
    return policy, sum(history[-10:]) / 10


base = rude_gpt()
for beta in (0.0, 0.2):
    policy, marks = train(base, beta)
    print(f"β = {beta}   marks in the last ten turns {marks:.2f}")
    show_answers(policy)

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# In π\* the worst answer falls exponentially: $\pi^*(y)/\pi^*(\text{best}) = \frac{\mathrm{ref}(y)}
# {\mathrm{ref}(\text{best})}\, e^{-(r_{\max} - r(y))/\beta}$. With $k_3$ in the loss, c goes to $r_{\max}$, so π(y) is
# about $\beta\,\mathrm{ref}(y)/(r_{\max} - r(y))$. It falls only in proportion to β. So bad answers stay possible, and
# the better of two bad answers is not much likelier.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for beta in (0.8, 0.1, 0.01):
    tilted = closed_form.tilt(ref.numpy(), r.numpy(), beta)[1]
    k3, about = my_k3_end(ref, r, beta)[1], beta * ref[1] / (r.max() - r[1])
    print(f"β = {beta:<4}  worst answer: π* {tilted:.1e}   k3 {k3:.1e}   about {about:.1e}")
always(abs(k3 / about - 1) < 0.01, "For β = 0.01 the approximation holds within 1 %.")

# %% [markdown]
# <details><summary>Exercise 4</summary>
#
# (b) ends at π\* for every β: there R is the same for all answers, and the division only scales the step. (a) has the
# fixed point ∝ ref·e^(r/(βσ)), with the σ of r under itself. A smaller σ makes r count more, which sharpens the policy,
# which makes σ smaller. Below the threshold this never stops, and the policy collapses onto the best answer.
#
# </details>


# %% tags=["solution"] jupyter={"source_hidden": true}
def divide_r(logps, beta):
    p, d = logps.exp().detach(), (logps - ref.log()).detach()
    return -((r - p @ r) / (sigma(p, r) + 1e-9) - beta * d) * logps


def divide_all(logps, beta):
    p, d = logps.exp().detach(), (logps - ref.log()).detach()
    R = r - beta * d
    # 0.05, because the spread of R goes to 0 near π*, and the steps would grow without bound
    return -(R - p @ R) / (sigma(p, R) + 0.05) * logps


threshold, _ = closed_form.collapse_threshold(ref.numpy(), r.numpy())
print(f"threshold: β = {threshold:.3f}")
for beta in (2.0, 1.5, 0.8):
    a = settle(lambda logps, beta=beta: divide_r(logps, beta))
    b = settle(lambda logps, beta=beta: divide_all(logps, beta), lr=0.05)
    tilted = torch.tensor(closed_form.tilt(ref.numpy(), r.numpy(), beta))
    print(
        f"β = {beta}:  (a) {a.numpy().round(3)}   (b) {b.numpy().round(3)}   "
        f"π* {tilted.numpy().round(3)}"
    )
    collapsed = a[2].item() > 0.99
    this_run(collapsed == (beta < threshold), "(a) collapses exactly below the threshold.")
    this_run(torch.allclose(b, tilted, atol=1e-3, rtol=0), "(b) ends at π*.")
