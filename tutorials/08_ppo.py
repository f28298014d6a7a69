# %% [markdown]
# # 08 · PPO: several updates from each rollout, credit for each token
#
# **You will build** the three functions of PPO: the clipped loss, the rewards of the tokens, and their advantages. A
# loop of a dozen lines trains a policy with them. Then you measure what the clip, the critic and λ are for.
#
# **Time:** 27 minutes of reading, 30 seconds of computer.
#
# **You need:** [07 · Policy gradients](07_policy_gradient.ipynb), [07b](07b_kl.ipynb) (the KL in the reward), and π\*
# from [05](05_inverse_rl.ipynb).
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

from minialign.batch import whiten
from minialign.methods import ppo
from tutorials.checks import always, equal, this_run
from tutorials.figures import ppo as figures
from tutorials.figures.loop import rlhf_loop

# %% [markdown]
# ## The question
#
# In tutorial 07 all tokens of a completion shared one [advantage](../GLOSSARY.md#advantage), made from one
# [reward](../GLOSSARY.md#reward). After one update the completions were thrown away. Two questions remain:
#
# 1. Sampling is slow. Can one [rollout](../GLOSSARY.md#rollout) serve for several updates?
# 2. A completion has many tokens and one reward. Which tokens earned it?
#
# PPO (proximal policy optimisation, Schulman et al. 2017) answers the first with a probability ratio and a clip, and
# the second with a [critic](../GLOSSARY.md#critic), a model that predicts the reward from a prefix.

# %%
rlhf_loop(["completions", "reward", "reference", "update"], "08_loop.png",
          alt="The loop from prompts to policy, completions, reward and update; "
              "PPO changes what happens from reward to update.")

# %% [markdown]
# ## 1. Reuse a rollout: the ratio
#
# Tutorial 07 maximised the mean of $A \log \pi$ over samples of the present [policy](../GLOSSARY.md#policy) π. The
# gradient is the [policy gradient](../GLOSSARY.md#policy-gradient), $\mathbb{E}_\pi[A\,\nabla\log\pi]$. After one
# update the samples are from an older policy, π_old: we are [off-policy](../GLOSSARY.md#on-policy).
#
# *Importance sampling* repairs this: weight every sample with its [ratio](../GLOSSARY.md#ratio)
# $\rho = \pi/\pi_\mathrm{old}$.
#
# $$\mathbb{E}_\mathrm{old}[\rho\,f] = \sum_y \pi_\mathrm{old}(y)\,\frac{\pi(y)}{\pi_\mathrm{old}(y)}\,f(y)
# = \sum_y \pi(y)\,f(y) = \mathbb{E}_\pi[f]$$
#
# So PPO maximises the mean of $\rho A$ in place of $A \log\pi$. Because $\nabla\rho = \rho\,\nabla\log\pi$, its
# gradient is $\mathbb{E}_\mathrm{old}[\rho\,A\,\nabla\log\pi]$. At the first update ρ is 1, and this is the policy
# gradient of 07. Check it with autograd, for five tokens: the slope of $A\log\pi$ in a log-prob is A, that of $\rho A$
# should be ρA.

# %%
generator = torch.Generator().manual_seed(0)
old_logps, A, moved = torch.randn(3, 5, generator=generator, dtype=torch.float64)
for name, now in (("first update", old_logps), ("later", old_logps + 0.1 * moved)):
    logps = now.clone().requires_grad_()
    ratio = (logps - old_logps).exp()  # watch: ratio (5,)
    (slope,) = torch.autograd.grad((ratio * A).sum(), logps)
    print(f"{name:13} slope of ρA, divided by A:", (slope / A).numpy().round(3))
    equal(slope, ratio.detach() * A, msg="The slope of ρA is ρ times that of A log π.")

# %% [markdown]
# **One ratio per token is an approximation.** The exact weight of a completion is the *product* of the ratios of its
# tokens (02). PPO gives each token its own ratio only. Both are near 1 while all ratios are *very* near 1:

# %%
for ratio in (1.001, 1.01, 1.1, 1.2):
    print(f"ratio of each token {ratio:5}   product over 32 tokens {ratio ** 32:8.2f}")

# %% [markdown]
# At 1.2 the exact weight is 342, and one completion would decide the whole update. With one ratio per token there is
# less noise, but the objective is only right near π_old. So something has to keep π there.
#
# ## 2. The clip
#
# PPO sets the gradient of a token to 0 when its ratio has moved by more than ε in the direction of its advantage.
#
# $$L = -\,\mathrm{mean}_t\,\min\big(\rho_t A_t,\; \mathrm{clip}(\rho_t, 1 - \varepsilon, 1 + \varepsilon)\,A_t\big)$$
#
# Clip moves a number into the interval; ε is usually 0.2. By hand, ρ = 1.5: for A = 1, min(1.5, 1.2) = 1.2 is constant,
# so there is no gradient; for A = −1, min(−1.5, −1.2) = −1.5 keeps it.


# %%
def my_policy_loss(logps, old_logps, advantages, mask, eps):
    """The clipped loss of PPO, a number: minus the mean of min(ρA, clip(ρ)A) where mask is True.

    logps, old_logps: (B, T) log-probs of the tokens now and when they were sampled. ρ is a ratio
    of probabilities, not of log-probs.
    advantages: (B, T). mask: (B, T) bool. eps: ρ is clipped to [1 − eps, 1 + eps].
    """
    ratio = (logps - old_logps).exp()  # watch: ratio (B, T)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    return -objective[mask].mean()


# %% [markdown]
# ### Checkpoint
#
# 

# %%
begins, ends = torch.tensor([0, 1, 2, 3, 0, 5]), torch.tensor([9, 4, 9, 4, 1, 8])
places = torch.arange(9)
mask = (places >= begins[:, None]) & (places < ends[:, None])  # watch: mask (B, T)
old, change, A, ref, v = torch.randn(5, 6, 9, generator=generator, dtype=torch.float64)
new = (old + 0.3 * change).requires_grad_()
mine = my_policy_loss(new, old, A, mask, 0.2)
theirs = ppo.policy_loss(new, old, A, mask, eps=0.2)[0]
equal(mine, theirs, msg="my_policy_loss equals the project's.")
equal(*(torch.autograd.grad(loss, new)[0] for loss in (mine, theirs)),
      msg="my_policy_loss has the project's gradient.")
print("my_policy_loss equals minialign.methods.ppo.policy_loss")

# %% [markdown]
# There are six cases: the ratio is below, inside or above the interval, and A is positive or negative. Which have a
# gradient? Guess first.


# %%
def one_token(ratio, advantage, eps=0.2):
    """(objective, its slope in the ratio) of a single token."""
    ratio, one = torch.tensor([[ratio]], requires_grad=True), torch.ones(1, 1)
    objective = -my_policy_loss(ratio.log(), 0 * one, advantage * one, one.bool(), eps)
    objective.backward()
    return objective.item(), ratio.grad.item()


print("slope      ρ = 0.5   ρ = 1.1   ρ = 1.5")
for advantage, expected in ((1.0, [1, 1, 0]), (-1.0, [0, -1, -1])):
    found = [one_token(ratio, advantage)[1] + 0.0 for ratio in (0.5, 1.1, 1.5)]
    print(f"A = {advantage:+.0f}   " + "".join(f"{slope:9.0f} " for slope in found))
    always([round(slope, 5) for slope in found] == expected,
           "my_policy_loss clips only on the side where the token has moved enough.")

ratios = torch.linspace(0.4, 1.7, 131).tolist()
curves = {sign: [one_token(ratio, float(sign)) for ratio in ratios] for sign in (1, -1)}
figures.clip(ratios, {sign: [objective for objective, _ in rows] for sign, rows in curves.items()},
             {sign: [slope for _, slope in rows] for sign, rows in curves.items()}, eps=0.2)

# %% [markdown]
# - Inside the interval every token has its gradient (two cases).
# - If a token moved in the right direction by more than ε, its gradient is 0 (two cases).
# - If it moved in the wrong direction, the full gradient remains and brings it back (two cases).
#
# The clip is no hard limit: gradients of other tokens, which share the weights, can move a ratio past 1 ± ε.
#
# ## 3. A reward for every token
#
# Now the second question. As in 05 we maximise $\mathbb{E}_\pi[r] - \beta\,\mathrm{KL}(\pi\|\mathrm{ref})$. The
# [KL](../GLOSSARY.md#kl) is the mean of $\log(\pi/\mathrm{ref})$ over the policy's own completions, so this is the mean
# of $R = r - \beta\log(\pi/\mathrm{ref})$. Its gradient is 07's with R in place of r, and R is held constant
# ([07b](07b_kl.ipynb) shows why). The KL part is a sum over tokens: each gets its own
# $-\beta(\log\pi - \log\mathrm{ref})$. The last token also gets r.
#
# By hand: β = 0.05, log-probs −1, −2, −0.5, [reference](../GLOSSARY.md#reference) −1.2, −1.5, −0.7, reward 1. The
# token rewards are −0.05·0.2 = −0.01, −0.05·(−0.5) = 0.025, and 1 − 0.05·0.2 = 0.99.


# %%
def my_shape_rewards(rewards, logps, ref_logps, mask, beta):
    """The reward of every token, (B, T), without gradient: −beta·(logps − ref_logps), plus the
    completion's reward at its last token.

    rewards: (B,) one for each completion. logps, ref_logps: (B, T). mask: (B, T) bool, True at the
    completion's tokens, which are adjacent but may end before T. The result is 0 where it is False.
    """
    token_rewards = torch.where(mask, -beta * (logps - ref_logps), 0)  # watch: token_rewards (B, T)
    for b in range(len(rewards)):
        last = mask[b].nonzero().max()
        token_rewards[b, last] += rewards[b]
    return token_rewards.detach()


# %% [markdown]
# ### Checkpoint

# %%
three = torch.ones(1, 3, dtype=torch.bool)
by_hand = my_shape_rewards(torch.tensor([1.0]), torch.tensor([[-1, -2, -0.5]]),
                           torch.tensor([[-1.2, -1.5, -0.7]]), three, 0.05)
equal(by_hand, torch.tensor([[-0.01, 0.025, 0.99]]),
      msg="my_shape_rewards gives the rewards by hand.")
six_rewards = torch.randn(6, generator=generator, dtype=torch.float64)
token_rewards = my_shape_rewards(six_rewards, old, ref, mask, 0.3)
equal(token_rewards, ppo.shape_rewards(six_rewards, old, ref, mask, beta=0.3),
      msg="my_shape_rewards equals the project's, also in rows that end early.")
print("my_shape_rewards equals minialign.methods.ppo.shape_rewards")

# %% [markdown]
# ## 4. The critic, and GAE
#
# The critic gives each prefix a *value* v: the sum of token rewards that it expects from here on. A token is judged
# by what it changed:
#
# $$\delta_t = r_t + \gamma\,v_{t+1} - v_t$$
#
# $r_t$ is the token's own reward, $v_t$ the value of the prefix before it, $v_{t+1}$ of the prefix with it (0 after
# the last token). γ is the *discount*: a reward k tokens later counts γ^k. Language models use γ = 1, games 0.99.

# %%
values, rewards = torch.tensor([[0.5, 0.4, 0.3]]), torch.tensor([[0.0, 0.0, 1.0]])
figures.chain(values[0].tolist(), rewards[0].tolist(), [-0.1, -0.1, 0.7])

# %% [markdown]
# Here the critic lowers its prediction twice, and then a reward of 1 arrives. Were two tokens bad, or was the critic
# wrong? *Generalised advantage estimation* (GAE, Schulman et al. 2016) adds later errors to a token's own:
#
# $$A_t = \delta_t + \gamma\lambda\,\delta_{t+1} + (\gamma\lambda)^2\,\delta_{t+2} + \dots$$
#
# - **λ = 0:** $A_t = \delta_t$. Later tokens add no noise, but if the critic is wrong, so is $A_t$ (bias).
# - **λ = 1:** the values in between cancel, and $A_t$ is all rewards still to come, minus $v_t$. The critic is only a
#   [baseline](../GLOSSARY.md#baseline), so a wrong one gives no bias. But the luck of later tokens is in $A_t$ (noise).
# - **In between**, usually 0.95, an error k tokens later counts $\lambda^k$ (for γ = 1).
#
# By hand, with γ = 1, λ = 0.5: $A = (-0.1 - 0.05 + 0.175,\; -0.1 + 0.35,\; 0.7) = (0.025, 0.25, 0.7)$. The critic's
# target, the *return*, is $A_t + v_t$: with λ = 1, all rewards still to come.


# %%
def my_gae(token_rewards, values, mask, gamma, lam):
    """(advantages, returns), both (B, T) and 0 where mask is False. returns = advantages + values.

    token_rewards, values: (B, T); values[b, t] is v of the prefix before token t. mask: (B, T)
    bool; the True ones of a row are adjacent. The value after the last of them is 0, whatever
    stands in the padding. δ_t = token_rewards[:, t] + gamma·v_{t+1} − v_t. Going backwards,
    A_t = δ_t + gamma·lam·A_{t+1}.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]  # watch: delta (B,)
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_value = torch.where(mask[:, t], values[:, t], 0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0)


# %% [markdown]
# ### Checkpoint
#
# (Stop in `my_gae` at its first call: the first `delta` is 0.7.) In the table λ moves the advantages from δ to
# "reward − v".

# %%
print("λ      advantages              returns")
for lam in (0, 0.5, 1):
    advantages, returns = my_gae(rewards, values, three, 1.0, lam)
    print(f"{lam:<5}  {str(advantages[0].numpy().round(3)):23} {returns[0].numpy().round(3)}")
equal(my_gae(rewards, values, three, 1.0, 0.5)[0], torch.tensor([[0.025, 0.25, 0.7]]),
      msg="my_gae gives the advantages by hand.")
for gamma, lam in ((1.0, 0.95), (0.9, 0.8), (1.0, 0.0)):
    equal(my_gae(token_rewards, v, mask, gamma, lam),
          ppo.gae(token_rewards, v, mask, gamma=gamma, lam=lam),
          msg=f"my_gae equals the project's for γ = {gamma}, λ = {lam}.")
print("my_gae equals minialign.methods.ppo.gae")

# %% [markdown]
# ## 5. The loop
#
# The policy types 32 characters, each chosen from 27. The reward is the share of right ones, given once at the end.
# The policy is a table of logits, (32, 27), all 0 at first: it types at random. So does the reference.
#
# The best policy is known (05): $\pi^* \propto \mathrm{ref}\,e^{r/\beta}$. A right letter adds 1/32 to the reward,
# so π\* takes it $e^{1/(32\beta)}$ times as often as each wrong one. With β = 0.005:

# %%
TEXT, ALPHABET = "generalised advantage estimation", "abcdefghijklmnopqrstuvwxyz "
BETA, N = 0.005, 64  # N texts in a rollout
goal = torch.tensor([ALPHABET.index(letter) for letter in TEXT])
PLACES, T, V = torch.arange(len(TEXT)), len(TEXT), len(ALPHABET)
MASK, REF_LOGPS = torch.ones(N, T, dtype=torch.bool), torch.full((N, T), -math.log(V))

star = torch.ones(T, V)
star[PLACES, goal] = math.exp(1 / (T * BETA))
star = star / star.sum(1, keepdim=True)  # watch: star (T, V)
BEST = star[0, goal[0]].item()
torch.manual_seed(0)
for name, probs in (("reference", torch.full((T, V), 1 / V)), ("π*", star)):
    text = "".join(ALPHABET[i] for i in torch.multinomial(probs, 1).squeeze(1))
    print(f"{name:9}  P(right letter) {probs[0, goal[0]]:.3f}   {text}")

# %% [markdown]
# A language model's critic is a copy of its network with one output. Here two learned numbers per place are enough:
# v = offset + slope · (share of the text that is right so far). Both are 0 at first.


# %%
def type_texts(logits, n, generator):
    """n texts of the policy: y (n, T), and which letters are right (n, T), as 0. and 1."""
    y = torch.multinomial(logits.softmax(-1), n, replacement=True, generator=generator).T
    return y, (y == goal).float()


def logps_of(logits, y):
    return logits.log_softmax(-1)[PLACES, y]


def critic(numbers, hits):
    """The value of every prefix, (n, T). numbers: (2, T), an offset and a slope for each place."""
    so_far = (hits.cumsum(1) - hits) / T  # the share that was right before token t
    return numbers[0] + numbers[1] * so_far


def quality(logits):
    """(mean probability of the right letter, KL(π ‖ π*) in nats)"""
    logps = logits.detach().log_softmax(-1)
    kl = (logps.exp() * (logps - star.log())).sum()
    return logps.exp()[PLACES, goal].mean().item(), kl.item()


# %% [markdown]
# This is PPO: sample, score every token, then four updates from the same 64 texts. 

# %%
generator = torch.Generator().manual_seed(0)
logits, numbers = torch.zeros(T, V, requires_grad=True), torch.zeros(2, T, requires_grad=True)
optimizer = torch.optim.Adam([logits, numbers], lr=0.1)
for k in range(40):
    with torch.no_grad():  # the policy of now is π_old for the updates below
        y, hits = type_texts(logits, N, generator)
        old_logps, values = logps_of(logits, y), critic(numbers, hits)
    token_rewards = my_shape_rewards(hits.mean(1), old_logps, REF_LOGPS, MASK, BETA)
    advantages, returns = my_gae(token_rewards, values, MASK, 1.0, 0.95)  # watch: advantages (B, T)
    for _ in range(4):
        loss = my_policy_loss(logps_of(logits, y), old_logps, advantages, MASK, 0.2)
        loss = loss + 0.5 * (critic(numbers, hits) - returns).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if k % 8 == 7:
        right, kl = quality(logits)
        text = "".join(ALPHABET[i] for i in y[0])
        print(f"{k + 1:2} rollouts   P(right letter) {right:.3f}   KL(π ‖ π*) {kl:5.2f}   {text}")
print(f"the critic's slope, middle of the text: {numbers[1, T // 2]:.2f} (a perfect critic: 1)")
this_run(abs(right - BEST) < 0.05 and kl < 1, "PPO ends near π*.")

# %% [markdown]
# It ends near π\*. The critic's slope is near 1: it has learned what a right letter adds to the reward.
#
# > **The loss says nothing about progress.** At the first update of a rollout it is minus the mean advantage. With a
# > right critic this is near 0 for any policy. Plot the reward instead.
#
# With a GPT the loop is the same, and the critic is a second model: `python -m minialign ppo`. It also *whitens*
# advantages (mean 0, variance 1 in each rollout; exercise 2) and clips the change of a value.
#
# ## 6. What the critic and λ are for
#
# PPO is now complete. The rest takes it apart. Only the line with `my_gae` decides which letters get the credit.
# `train` is the same loop with this line as an argument, `credit`.


# %%
def with_lambda(lam):
    def credit(token_rewards, values):
        every = torch.ones_like(values, dtype=torch.bool)
        return ppo.gae(token_rewards, values, every, gamma=1.0, lam=lam)
    return credit


USUAL = with_lambda(0.95)


def train(credit=USUAL, *, epochs=4, eps=0.2, rollouts=40, loss_of=my_policy_loss):
    """The loop above. Returns P(right letter) after 0, 1, … rollouts, the logits, the numbers."""
    generator, path = torch.Generator().manual_seed(0), []
    logits, numbers = torch.zeros(T, V, requires_grad=True), torch.zeros(2, T, requires_grad=True)
    optimizer = torch.optim.Adam([logits, numbers], lr=0.1)
    for _ in range(rollouts):
        path.append(quality(logits)[0])
        with torch.no_grad():
            y, hits = type_texts(logits, N, generator)
            old_logps, values = logps_of(logits, y), critic(numbers, hits)
        token_rewards = ppo.shape_rewards(hits.mean(1), old_logps, REF_LOGPS, MASK, beta=BETA)
        advantages, returns = credit(token_rewards, values)
        for _ in range(epochs):
            loss = loss_of(logps_of(logits, y), old_logps, advantages, MASK, eps)
            loss = loss + 0.5 * (critic(numbers, hits) - returns).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [*path, quality(logits)[0]], logits.detach(), numbers.detach()


def report(runs):
    """Print a line for each run. Returns {name: P(right letter) after 0, 1, … rollouts}."""
    for name, (path, logits, _) in runs.items():
        above = sum(right <= 0.9 for right in path)
        when = f"above 0.9 after {above} rollouts" if above < len(path) else "never above 0.9"
        print(f"{name:26}  P(right letter) {path[-1]:.3f}   "
              f"KL(π ‖ π*) {quality(logits)[1]:6.2f}   {when}")
    return {name: path for name, (path, *_) in runs.items()}


# %% [markdown]
# **Does one need a critic?** There are three ways to do without it:
#
# - **RLOO** (07; here with ratio and clip): a letter gets R, the sum of all token rewards, minus the mean R of the
#   other texts.
# - **Rewards to go:** a letter gets the sum of the token rewards from it on. It cannot change the earlier ones.
# - **Rewards to go minus a mean:** the same, minus the mean of the other texts *at that place*.
#
# 

# %%
def minus_others(x):
    """Each number minus the mean of the others in its column."""
    return (x - x.mean(0)) * len(x) / (len(x) - 1)


def rloo(token_rewards, values):
    return minus_others(token_rewards.sum(1, keepdim=True)).expand(-1, T), 0 * values


def to_go(token_rewards, values):
    return with_lambda(1.0)(token_rewards, 0 * values)[0], 0 * values


def to_go_minus_mean(token_rewards, values):
    return minus_others(to_go(token_rewards, values)[0]), 0 * values


kinds = {"PPO: critic, λ = 0.95": with_lambda(0.95), "RLOO: all letters share R": rloo,
         "rewards to go": to_go, "rewards to go minus a mean": to_go_minus_mean}
runs = {name: train(credit) for name, credit in kinds.items()}
whole = runs["PPO: critic, λ = 0.95"]
paths = report(runs)
ends = [path[-1] for path in paths.values()]
figures.race(paths, BEST, "08_race.png", "Rewards to go need a baseline",
             "PPO and RLOO reach the computed optimum after about 20 rollouts, and rewards to go "
             "minus a mean soon after; rewards to go alone end far below it.")
this_run(abs(ends[0] - right) < 1e-3, "train() is the loop of section 5.")
this_run(min(ends[0], ends[1], ends[3]) > 0.9 > ends[2] + 0.1,
         "With any baseline it ends near π*; rewards to go alone do not.")

# %% [markdown]
# Why do rewards to go fail? Let the policy after 10 rollouts type 4,000 texts. The picture shows the mean advantage of
# right and of wrong letters, place by place, and how far single ones scatter.

# %%
_, half, half_numbers = train(rollouts=10)
y, hits = type_texts(half, 4000, torch.Generator().manual_seed(1))
hit = hits.bool()
ref_logps = torch.full_like(hits, -math.log(V))
token_rewards = ppo.shape_rewards(hits.mean(1), logps_of(half, y), ref_logps,
                                  torch.ones_like(hit), beta=BETA)
credits = {name: credit(token_rewards, critic(half_numbers, hits))[0]
           for name, credit in kinds.items()}
figures.credit(list(TEXT), {name: (A.numpy(), hit.numpy()) for name, A in credits.items()})
print("                            right minus wrong   size of A (root mean square)")
for name, A in credits.items():
    gap = sum(A[hit[:, t], t].mean() - A[~hit[:, t], t].mean() for t in range(T)) / T
    print(f"{name:26}{gap:15.3f}{A.square().mean().sqrt():20.3f}")

# %% [markdown]
# All four separate right from wrong by about 0.02. They differ in size:
#
# - **Rewards to go** are far from 0, and rise from left to right because early letters have more of the KL penalty
#   ahead of them. It is the same for right and wrong letters, so it changes no average,
#   but in 64 texts it is noise, more than ten times as large as the difference. Minus a mean for each place, they reach
#   π\*.
# - **RLOO** is centred at 0. The luck of the 31 other letters remains.
# - **The critic** is a baseline for each place *and* for what was typed before. It removes most of that luck.
#
# In this short task RLOO is as good as the critic, and needs no second model.
#
# **What is λ for?** The same critic, four values:

# %%
by_lambda = {f"λ = {lam}": train(with_lambda(lam)) for lam in (0.0, 0.5, 1.0)}
paths = report(dict(sorted((by_lambda | {"λ = 0.95": whole}).items())))
this_run(paths["λ = 0.0"][-1] < 0.3 and paths["λ = 1.0"][-1] > 0.9,
         "λ = 0 fails with a critic that starts from nothing, and λ = 1 does not.")

# %% [markdown]
# With λ = 0 a value is learned from the next value only. The reward comes after the last letter, so right values spread
# backwards by at most one place in each rollout. Meanwhile the policy follows wrong values and settles on wrong
# letters. λ = 0.5 fails for the same reason: an error seven letters later counts only 0.5⁷, less than 1 %. With λ = 1 a
# wrong critic gives no bias, but a useless one leaves all the noise: "rewards to go" are λ = 1 with a critic of 0. So
# PPO ends near π\* if its critic learns the values in time. Here λ = 1 is as good as 0.95: 32 letters bring little
# noise.
#
# ## 7. Break it: more updates, and no clip
#
# Does it help to use a rollout four times? What does the clip prevent? Watch the lines with 20 updates.

# %%
reuse = {"4 updates, clip": whole, "1 update": train(epochs=1),
         "20 updates, no clip": train(epochs=20, eps=torch.inf),
         "20 updates, clip": train(epochs=20)}
report({"4 updates, no clip": train(eps=torch.inf)})
paths = report(reuse)
figures.race(paths, BEST, "08_without_clip.png", "Many updates of one rollout need the clip",
             "With one update per rollout the policy learns slowly, with four or twenty fast; "
             "without the clip twenty updates end far below the optimum.")
this_run(paths["1 update"][-1] < 0.8, "One update per rollout is slower.")
this_run(paths["20 updates, no clip"][-1] < 0.7 < 0.9 < paths["20 updates, clip"][-1],
         "Without the clip 20 updates spoil the policy.")

# %% [markdown]
# Four updates reach after 20 rollouts what one update has not reached after 40. With 20 updates and no clip the policy
# fits the luck of 64 texts until it is sure of wrong letters. Then the right ones are hardly ever sampled, so nothing
# corrects it.
#
# ## What is wrong here? (1)
#
# Somebody takes the ratio of the *log*-probs. What happens, and which check finds it?


# %%
def shortcut(logps, old_logps, advantages, mask, eps):
    ratio = logps / old_logps
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    return -objective[mask].mean()


path, _, _ = train(loss_of=shortcut)
print(f"P(right letter) {path[0]:.4f} → {path[-1]:.4f}")
this_run(path[-1] < path[0], "The shortcut makes right letters rarer.")

# %% [markdown]
# ## What is wrong here? (2)
#
# This GAE lacks one `torch.where` of `my_gae`. The first completion has two tokens, the second three. Which advantages
# are wrong, and what would a policy learn from them?


# %%
def shorter_gae(token_rewards, values, mask, gamma, lam):
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_value, advantages[:, t] = values[:, t], next_advantage
    return advantages


two_rows = torch.tensor([[True, True, False], [True, True, True]])
given = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
halves = torch.full((2, 3), 0.5)  # the critic says 0.5 everywhere, also about the padding
print(shorter_gae(given, halves, two_rows, 1.0, 1.0).numpy())

# %% [markdown]
# ## What you now know
#
# - The mean of ρA, with ρ = π/π_old, has the policy gradient at ρ = 1. So one rollout serves for several updates. One
#   ratio per token is an approximation, good while their product is near 1.
# - The clip stops a token when its ratio has moved by ε in the direction of its advantage.
# - A critic is a baseline for every prefix. Without a baseline for each place, rewards to go are noisy.
# - GAE's λ chooses between the critic's bias (0) and noise (1).
#
# Next: [08b · Frozen Lake](08b_frozen_lake.ipynb), where the same functions play a game, or [09 · DPO](09_dpo.ipynb),
# without rollouts.
#
# **Sources:** Schulman et al. 2017 (PPO, arXiv:1707.06347), Schulman et al. 2016 (GAE, arXiv:1506.02438), Ouyang et al.
# 2022 (InstructGPT, which adds a pretraining loss, arXiv:2203.02155), Huang et al. 2024 (details, arXiv:2403.17031).
# The code is `minialign/methods/ppo.py`.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes, try this). A right letter has probability 1/27 when it is sampled. Its gradient becomes
# 0 when its ratio passes 1 + ε. Which probability has it then, for ε = 0.02 and for 0.2? Now run
# `train(epochs=20, eps=0.02)`.
#
# **Exercise 2** (medium, 10 minutes). Write a `credit` that whitens: `whiten(advantages, MASK)`. Does it help?
#
# **Exercise 3** (hard, 20 minutes). Let the policy be π\*. Show that $v(s) = \beta \log
# \mathbb{E}_\mathrm{ref}[e^{r/\beta}\,|\,s]$ for every prefix s, and that each δ is 0. Check it on samples from π\*.
#
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# The gradient is ∇ log π divided by log π_old, which is negative: every token is pushed in the wrong direction. A
# check of values at ρ = 1 passes; one of gradients fails.
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# Both tokens of the first row should have A = 1 − 0.5 = 0.5 but get 1: the critic's number for the padding is added as
# if it were the value of a next prefix. This is a bonus of 0.5 for stopping early.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
right_ones = my_gae(given, halves, two_rows, 1.0, 1.0)[0]
always((shorter_gae(given, halves, two_rows, 1.0, 1.0) - right_ones)[0].tolist() == [0.5, 0.5, 0],
       "The critic's number for the padding is added to both tokens of the short row.")
print(right_ones.numpy())

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# To 1.02/27 = 0.0378 with ε = 0.02, to 1.2/27 = 0.0444 with 0.2. But if the other 26 all fall by 2 %, it has
# 1 − 0.98·26/27 = 0.056. So ε bounds a ratio only loosely. A narrow clip is slow.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
narrow = train(epochs=20, eps=0.02)
report({"20 updates, ε = 0.02": narrow})
print(f"after one rollout {narrow[0][1]:.4f}")
this_run(narrow[0][-1] < 0.9, "A narrow clip is slow.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# It learns a little faster. At π\* the true advantages are all 0 (exercise 3), so there it only enlarges noise.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def whitened(token_rewards, values):
    advantages, returns = with_lambda(0.95)(token_rewards, values)
    return whiten(advantages, MASK), returns


_ = report({"whitened": train(whitened)})

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Given s, π\*(y|s) = ref(y|s) e^{r/β}/Z(s) with Z(s) = 𝔼_ref[e^{r/β}|s]. The token rewards still to come sum to r −
# β log π\*(y|s)/ref(y|s) = β log Z(s), the same for every y. So this is v(s), and δ = 0. For our text, v = (share right
# so far) + (places left) · β log((e^{1/(32β)} + 26)/27).
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
y, hits = type_texts(star.log(), N, torch.Generator().manual_seed(2))
star_rewards = ppo.shape_rewards(hits.mean(1), logps_of(star.log(), y), REF_LOGPS, MASK, beta=BETA)
per_place = BETA * math.log((math.exp(1 / (T * BETA)) + V - 1) / V)
star_values = (hits.cumsum(1) - hits) / T + (T - PLACES) * per_place
delta, _ = ppo.gae(star_rewards, star_values, MASK, gamma=1.0, lam=0.0)  # λ = 0: A is δ
print(f"largest |δ| at π*: {delta.abs().max():.0e}")
always(delta.abs().max() < 1e-5, "At π* no token changes the value.")
