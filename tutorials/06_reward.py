# %% [markdown]
# # 06 · Rewards: from comparisons to a number, from a number to a policy
#
# **You will build** the loss of a reward model, the function that reads a reward from a GPT, and two ways to improve a
# policy by selection: best-of-n and ReST. You check each against the project, and meet mistakes that raise no error.
#
# **Time:** 30 minutes of reading, 25 seconds of computer.
#
# **You need:** [02 · Sampling](02_sampling.ipynb), [03 · Log-probs](03_logps.ipynb), [04 · SFT](04_sft.ipynb).
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
import math
from itertools import combinations, product

import torch
from torch.nn.functional import softplus

from minialign.batch import collate
from minialign.logps import token_logps
from minialign.methods import best_of_n, rest, reward_model
from minialign.rewards import score
from minialign.sample import sample
from toy import closed_form
from toy.tiny_language import Language, tiny_gpt
from tutorials.checks import always, equal, this_run
from tutorials.figures import reward as figures
from tutorials.figures.loop import rlhf_loop

torch.set_default_dtype(torch.float64)  # so that "equal" can mean twelve digits


def show(numbers, digits=3):
    rounded = [round(number, digits) + 0.0 for number in numbers.tolist()]  # (+ 0.0: no "-0")
    return "[" + "  ".join(f"{number:.{digits}f}" for number in rounded) + "]"


# %% [markdown]
# ## The question
#
# It is hard to write a good answer and easy to *compare* two. So many chat models are trained in two stages. People
# compare answers, and a model learns from the comparisons to give every answer a number, its
# [reward](../GLOSSARY.md#reward). Then the [policy](../GLOSSARY.md#policy) is changed so that its answers get higher
# numbers. This is reinforcement learning from human feedback, RLHF (Christiano et al. 2017, Stiennon et al. 2020,
# Ouyang et al. 2022). The loop:

# %%
rlhf_loop(["completions", "reward"], "06_loop.png",
          alt="The RLHF loop: prompts go to the policy, which samples completions; they get a "
          "reward and are compared with the reference; an update changes the policy.")

# %% [markdown]
# This tutorial builds the coloured boxes and the simplest update: keep the best completions and do
# [SFT](../GLOSSARY.md#sft) on them. The reference, and the price β of moving away from it,
# come back in [06b](06b_overoptimization.ipynb).

# %% [markdown]
# ## 1. From comparisons to numbers
#
# We look for numbers $r$ that explain who was chosen over whom. In the model of
# [Bradley and Terry](../GLOSSARY.md#bradley-terry) (1952), a larger difference of rewards makes the choice surer:
#
# $$P(y^+ \text{ is chosen over } y^-) = \sigma\big(r(y^+) - r(y^-)\big), \qquad \sigma(z) = \frac{1}{1 + e^{-z}} .$$
#
# Here $y^+$ and $y^-$ are the chosen and the rejected answer. A difference of 0 means 50 : 50, and a difference of
# $\log 3$ means 75 : 25, that is, odds of 3 : 1. The loss is the negative log-likelihood of the choices. In torch,
# $-\log \sigma(z) = \log(1 + e^{-z})$ is `softplus(-z)`. Rewards of 1.5 and 0.5 give a loss of $\log(1 + e^{-1}) =
# 0.313$:

# %%
pair = torch.tensor([1.5, 0.5], requires_grad=True)
loss = softplus(-(pair[0] - pair[1]))
loss.backward()
print(f"loss {loss.item():.6f}   gradient {show(pair.grad, 6)}")
always(abs(loss.item() - 0.313262) < 1e-6, "The loss of the pair is log(1 + e⁻¹).")

# %% [markdown]
# The two gradients are opposite. Their size $1 - \sigma(1) = 0.27$ is the probability that the model gave to the
# other choice.
#
# Now three answers to "ask for tea", and a table of comparisons. `wins[i, j]` says how often answer $i$ was chosen
# over answer $j$. Add up the gradients of all comparisons, and a simple rule appears: **the reward of an answer goes
# up by the comparisons that it won, and down by those that it was expected to win.**


# %%
def my_gradient(wins, rewards):
    """The gradient of the log-likelihood of a table of comparisons.

    wins (K, K): how often answer i was chosen over answer j. rewards (K,).
    Return (K,): the number of comparisons that each answer won, minus the number that it is
    expected to win. It is expected to win the share σ(r_i − r_j) of all comparisons of i and j,
    whoever won them.
    """
    compared = wins + wins.T
    expected = compared * (rewards[:, None] - rewards).sigmoid()  # watch: expected (K, K)
    return (wins - expected).sum(1)


# %% [markdown]
# ### Checkpoint

# %%
answers = ["give me tea now!", "i want tea, please.", "may i have tea, please."]
wins = torch.tensor([[0.0, 4, 2],  # the second beats the first 8 : 4,
                     [8, 0, 3],    # the third beats the second 9 : 3
                     [12, 9, 0]])  # and the first 12 : 2


def log_likelihood(wins, rewards):
    return -(wins * softplus(-(rewards[:, None] - rewards))).sum()


trial = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
(expected_gradient,) = torch.autograd.grad(log_likelihood(wins, trial), trial)
equal(my_gradient(wins, trial.detach()), expected_gradient, msg="my_gradient equals autograd's.")
print("my_gradient: equal to autograd's")

# %% [markdown]
# Follow this gradient from 0 until it vanishes. Stop in `my_gradient` when `fit` first calls it: all rewards are 0,
# so an answer is expected to win 6 of 12 comparisons with each other one. `fit` divides by all 38 comparisons, so
# `expected` holds 6/38 = .158.


# %%
def fit(wins, steps=3000, lr=2.0):
    """Bradley-Terry rewards (K,) from wins (K, K), by gradient ascent from 0."""
    rewards = torch.zeros(len(wins))
    for _ in range(steps):
        rewards = rewards + lr * my_gradient(wins / wins.sum(), rewards)
    return rewards


fitted = fit(wins)
for answer, number in zip(answers, fitted.tolist(), strict=True):
    print(f"{answer:26} {number:7.3f}")
odds = (fitted - fitted[0]).exp()
print("odds against the first answer:", show(odds))
this_run((odds - torch.tensor([1.0, 2, 6])).abs().max() < 1e-3, "The odds are 2 : 1 and 6 : 1.")

# %% [markdown]
# The odds 2 : 1, 3 : 1 and 6 : 1 agree with each other, so three numbers reproduce them exactly. Three facts matter
# later:
#
# - **Only differences count.** Add 100 to every reward, and the loss is the same.
# - **An answer that never loses gets no finite reward.** Its reward grows with the logarithm of the number of steps. So
#   the scale of a learned reward depends on how long it was trained.
# - **Cycles cannot be represented.** If the first answer beats the second, the second the third, and the third the
#   first, no three numbers reproduce the odds. In a symmetric cycle all three get the same reward. In an uneven one
#   they get a compromise.

# %%
shifted = log_likelihood(wins, fitted + 100)
equal(log_likelihood(wins, fitted), shifted, msg="100 more for all changes nothing.")
never_lost = torch.tensor([[0.0, 4, 0], [8, 0, 0], [12, 9, 0]])
gaps = [(fit(never_lost, steps)[2] - fit(never_lost, steps)[1]).item() for steps in (1000, 10_000)]
print("the third never lost: its lead after 1000 and 10000 steps:", [round(gap, 2) for gap in gaps])
symmetric = torch.tensor([[0.0, 9, 3], [3, 0, 9], [9, 3, 0]])
uneven = torch.tensor([[0.0, 9, 1], [3, 0, 9], [11, 3, 0]])
print("cycle, 9 : 3 each:             ", show(fit(symmetric)))
print("cycle, 9 : 3, 9 : 3 and 11 : 1:", show(fit(uneven)))
this_run(gaps[1] - gaps[0] > 2, "The lead grows by about log 10 = 2.3.")
always(fit(symmetric).abs().max() < 1e-9, "A symmetric cycle leaves all rewards at 0.")
this_run(fit(uneven)[2] - fit(uneven)[0] > 0.4, "An uneven cycle does not leave them at 0.")

# %% [markdown]
# ### Where the two answers come from
#
# What if both answers of a pair come from the same policy, and a judge with rewards $r$ picks the winner? The policy
# decides how often a pair is shown, not who wins it. So the fit returns $r$. And what if nobody judges: all chosen
# answers come from one source $P$, all rejected ones from another, $Q$? Then the fit returns $\log P(y)/Q(y)$ plus a
# constant, because then $\sigma(r(y) - r(z)) = P(y)Q(z)\,/\,(P(y)Q(z) + P(z)Q(y))$. And that is the share of their
# comparisons that $y$ wins against $z$. (It is the lemma of [05b](05b_irft.ipynb).) Both in numbers:

# %%
P, Q = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.3, 0.2])
judge = torch.tensor([0.0, 1.0, 3.0])
same_source = fit(Q[:, None] * Q * (judge[:, None] - judge).sigmoid(), steps=20_000)
two_sources = fit(P[:, None] * Q)
same_source = same_source - same_source[0]
print("one source, a judge:  ", show(same_source))
print("two sources, no judge:", show(two_sources))
this_run((same_source - judge).abs().max() < 1e-3, "The fit returns the judge's rewards.")
this_run((two_sources - (P / Q).log()).abs().max() < 1e-3, "It is log P/Q, whose mean is 0 here.")

# %% [markdown]
# ## 2. The toy language
#
# To check a method we want every answer and its exact probability. So we use a tiny language. Its
# [tokens](../GLOSSARY.md#token) are the letters a, b, c, d and the end of the answer (EOS), printed as a full stop. A
# prompt is one letter. A [completion](../GLOSSARY.md#prompt) has at most three tokens: it ends with a full stop, or it
# is cut off. That makes $1 + 4 + 16 + 64 = 85$. A rule gives the reward: $+0.5$ for each letter that equals the
# prompt, $-0.5$ for each letter three further on (after d comes a), $-0.4$ for each letter that repeats the one
# before, $+0.3$ for a full stop.
#
# A GPT of one layer with random weights stands for the policy after SFT. `language.law_of` multiplies its token
# probabilities to the exact [distribution](../GLOSSARY.md#distribution) over the 85 completions.

# %%
language = Language(n_content=4, max_new=3, n_prompts=2)
EOS = language.eos_id  # token ids: 0 to 3 are the letters a to d, 4 is EOS
K = len(language.completions)  # 85 tuples of ids; language.index[y] is the place of y in this list
policy = tiny_gpt(language.vocab_size, seed=0, mixing=0.3)  # mixing: how much the prefix counts
rewards = language.rewards  # (2, 85): rewards[x, c]
ref = language.law_of(policy)  # watch: ref (2, 85)

# One batch with a row for each prompt and completion. collate pads the rows and returns a Batch
# with inputs, targets and mask, each (170, 3), as in tutorial 03.
everything = collate([prompt for prompt in language.prompts for _ in range(K)],
                     [list(y) for y in language.completions] * 2, pad_id=EOS)


def text(y):
    """The letters of a completion."""
    return "".join("abcd."[token] for token in y)


print("prompt a: the eight likeliest completions, and two with the best reward")
best_two = rewards[0].argsort(descending=True, stable=True)[:2]
for c in [*ref[0].argsort(descending=True)[:8].tolist(), *best_two.tolist()]:
    y = language.completions[c]
    print(f"   {text(y):4}  probability {ref[0, c]:.4f}   reward {rewards[0, c]:5.2f}")
print(f"mean reward of the policy: {(ref * rewards).sum(1).mean():.3f}")
equal(ref.sum(1), torch.ones(2), msg="All completions together have probability 1.")

# %% [markdown]
# ## 3. Build it yourself: the reward model
#
# For texts, the table of rewards becomes a network: a copy of the policy whose head returns one number for each
# position instead of logits, `policy.with_scalar_head()`. The reward of an answer is the number at its **last token**,
# the first position from which the whole answer can be seen. In the shorter rows of a batch, that is not the last
# position:

# %%
figures.read_position()

# %% [markdown]
# The loss has two options. A `margin` asks the chosen reward to be higher by at least that much. `centre` is a small
# price on $(r(y^+) + r(y^-))^2$, which keeps the rewards near 0.


# %%
def my_bradley_terry_loss(chosen_rewards, rejected_rewards, margin=0.0, centre=0.0):
    """chosen_rewards, rejected_rewards (B,), one entry for each pair.

    Return a scalar, the mean over pairs of
        −log σ(chosen − rejected − margin) + centre·(chosen + rejected)².
    Use softplus: −log σ(z) by its formula is infinite at z = −1000.
    """
    gap = chosen_rewards - rejected_rewards  # watch: gap (B,)
    return (softplus(-(gap - margin)) + centre * (chosen_rewards + rejected_rewards) ** 2).mean()


def my_score(model, batch):
    """The reward of each row, (B,). batch has inputs, targets and mask, all (B, T).

    1. Rebuild the whole rows (B, T + 1): the first input, then all targets.
    2. model(rows) returns one number for each position, (B, T + 1).
    3. Target t is the token at position t + 1 of the row. So the last completion token is at
       1 + the last t with mask.
    """
    rows = torch.cat([batch.inputs[:, :1], batch.targets], dim=1)
    numbers = model(rows)  # watch: numbers (B, T + 1)
    positions = torch.arange(1, rows.shape[1])
    last = (batch.mask * positions).amax(1)  # watch: last (B,)
    return numbers[torch.arange(len(rows)), last]


# %% [markdown]
# ### Checkpoint

# %%
generator = torch.Generator().manual_seed(0)
chosen, rejected = torch.randn(2, 16, generator=generator).requires_grad_()
for options in ({}, {"margin": 0.3}, {"centre": 0.01}):
    mine = my_bradley_terry_loss(chosen, rejected, **options)
    theirs, _ = reward_model.bradley_terry_loss(chosen, rejected, **options)
    equal(mine, theirs, msg=f"my_bradley_terry_loss with {options} equals the project's.")
    for number in (chosen, rejected):
        (my_slope,) = torch.autograd.grad(mine, number, retain_graph=True)
        (their_slope,) = torch.autograd.grad(theirs, number, retain_graph=True)
        equal(my_slope, their_slope,
              msg=f"The gradient of my_bradley_terry_loss with {options} equals the project's.")
far = my_bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
always(bool(far.isfinite()), "my_bradley_terry_loss is finite for a pair far off.")

torch.manual_seed(0)
untrained = policy.with_scalar_head()
with torch.no_grad():
    theirs = score(untrained, everything)
    equal(my_score(untrained, everything), theirs, msg="my_score equals the project's score.")
print("my_bradley_terry_loss, my_score: equal to minialign's")

# %% [markdown]
# ### Train it
#
# The judges see two completions of the policy and choose by Bradley-Terry. We enter *every* pair with its exact
# probability, as if there were infinitely many comparisons. For prompt b the judges' rewards are all 2 lower, as for a
# question to which no answer is good.

# %%
true = rewards - torch.tensor([[0.0], [2.0]])
prefer = (true[:, :, None] - true[:, None]).sigmoid()  # [x, i, j]: how often i is chosen over j
pair_weights = ref[:, :, None] * ref[:, None] * prefer  # watch: pair_weights (2, 85, 85)


def train_reward_model(centre, steps=300):
    """A reward model trained on all pairs of both prompts. Returns it and its rewards (2, 85)."""
    torch.manual_seed(0)
    model = policy.with_scalar_head()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / steps)
        scores = score(model, everything).view(2, K)
        one, other = scores[:, :, None], scores[:, None]  # chosen, rejected
        losses = softplus(other - one) + centre * (one + other) ** 2  # (2, 85, 85)
        loss = (pair_weights * losses).sum((1, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model, score(model, everything).view(2, K)


model, learned = train_reward_model(centre=0.0)  # watch: learned (2, 85)
_, learned_centred = train_reward_model(centre=0.01)


def constant_and_error(scores):
    """By prompt: mean and standard deviation of scores − true over the policy's completions."""
    difference = scores - true
    mean = (ref * difference).sum(1)
    return mean, (ref * (difference - mean[:, None]) ** 2).sum(1).sqrt()


print("learned minus true reward      prompt a          prompt b          mean learned reward")
for name, scores in (("centre = 0", learned), ("centre = 0.01", learned_centred)):
    mean, spread = constant_and_error(scores)
    print(f"   {name:20} {mean[0]:9.3f} ± {spread[0]:.3f} {mean[1]:9.3f} ± {spread[1]:.3f}     "
          f"{show((ref * scores).sum(1))}")
print("prompt a, centre = 0, without the constant:")
for y in ((0, 1, 0), (0, EOS), (EOS,), (2, 2, 0), (3, 3, 3)):
    c = language.index[y]
    found = learned[0, c] - constant_and_error(learned)[0][0]
    print(f"   {text(y):4} true reward {true[0, c]:5.2f}, learned {found:5.2f}")
this_run(constant_and_error(learned)[1].max() < 0.12, "Within a prompt, learned = true + constant.")
for scores in (learned, learned_centred):
    constants = constant_and_error(scores)[0]
    this_run(abs(constants[0] - constants[1]) > 1, "The two constants differ by more than 1.")

# %% [markdown]
# Within a prompt the model has found the judges' rewards, up to a constant, least well for rare completions like
# `ddd`. The two constants have nothing to do with each other, because no pair compared answers to different prompts.
# So the learned reward of one answer means nothing by itself. `centre` does not change this: it pulls the mean learned
# reward of *each* prompt to 0, although prompt b is truly worse by 2.
#
# ## 4. Break it: read the wrong token
#
# `numbers[:, -1]` reads at the **last position** of the batch. Reading at the last
# *input* is **one token early**: the number there was computed before the last token was seen.

# %%
rows = torch.cat([everything.inputs[:, :1], everything.targets], dim=1)
length = everything.mask.sum(1)  # (170,) k tokens end at position k, because prompts have one token
with torch.no_grad():
    numbers = model(rows)  # (170, 4)
last_position = numbers[:, -1].view(2, K)
one_early = numbers[torch.arange(len(rows)), length - 1].view(2, K)
better = true[:, :, None] - true[:, None] > 1e-9  # [x, i, j]: i is truly better than j
full = (language.lengths == 3).double()
both_full = (full[:, None] * full).expand(2, K, K)


def agreement(scores, among=1.0):
    """The share of pairs that scores (2, 85) order right: drawn from ref, rewards different."""
    weight = ref[:, :, None] * ref[:, None] * better * among
    return ((weight * (scores[:, :, None] > scores[:, None])).sum() / weight.sum()).item()


readings = {"last token": learned, "last position": last_position, "one token early": one_early}
print("pairs in the right order        all   both of full length   others")
for name, scores in readings.items():
    shares = [100 * agreement(scores, among) for among in (1.0, both_full, 1 - both_full)]
    print(f"   {name:20} {shares[0]:9.1f} % {shares[1]:17.1f} % {shares[2]:8.1f} %")
print(f"{100 * (ref * full).sum(1).mean():.0f} % of the policy's answers have full length")
this_run(agreement(learned) > agreement(last_position) + 0.02, "The last position is worse.")
this_run(agreement(one_early) < 0.75, "One token early orders far fewer pairs right.")

# %% [markdown]
# The last position looks almost right, because most completions here have full length, and for them it *is* the last
# token. The reward of the short ones now depends on the longest neighbour in the batch:

# %%
for neighbour in ((EOS,), (1, 2, 3)):
    batch = collate([[0], [0]], [[1, EOS], list(neighbour)], pad_id=EOS)
    whole = torch.cat([batch.inputs[:, :1], batch.targets], dim=1)
    with torch.no_grad():
        right, wrong = score(model, batch)[0].item(), model(whole)[0, -1].item()
    print(f"b. beside {text(neighbour):3}: last token {right:.3f}, last position {wrong:.3f}")
    difference = abs(right - learned[0, language.index[1, EOS]])
    always(difference < 1e-9, "Read at the last token, neighbours do not matter.")

# %% [markdown]
# ## 5. Build it yourself: best-of-n
#
# **Best-of-n** samples $n$ completions of a prompt and keeps the one with the highest reward (Stiennon et al. 2020).
# Show the winner to the user, or do SFT on the winners, so that *one* sample of the new policy is as good as the best
# of $n$ of the old one.
#
# What distribution do the winners have? Call the policy that samples ref. Let $F(y)$ be the probability that one
# sample has a reward of at most $r(y)$, and $F_{<}(y)$ that it is below. The best of $n$ is at most $r(y)$ if all $n$
# samples are: $F(y)^n$. So the winner's reward equals $r(y)$ with probability $F(y)^n - F_{<}(y)^n$. Completions of
# equal reward share it in proportion to ref.
#
# By hand, for ref = (.5, .3, .2), rising rewards and $n = 4$: $.5^4 = .0625$, $.8^4 - .5^4 = .3471$, $1 - .8^4 =
# .5904$. Four samples nearly triple the best one's probability.


# %%
def my_best_of_n(ref, rewards, n):
    """The distribution of the best of n samples from ref, for one prompt.

    ref, rewards (K,). Return (K,). For each completion, let at_most be the probability that a
    sample of ref has a reward of at most its reward (F), and level that it has exactly its reward.
    The winner has this reward with probability at_most^n − (at_most − level)^n, and the
    completion's share of it is ref/level.
    """
    at_most = ((rewards[:, None] >= rewards) * ref).sum(1)  # watch: at_most (K,)
    level = ((rewards[:, None] == rewards) * ref).sum(1)
    return ref / level * (at_most**n - (at_most - level).clamp(min=0) ** n)


# %% [markdown]
# ### Checkpoint
#
# The cell writes down all $3^4$ draws, picks the first of the best in each, and adds up the probabilities. The tie in
# the second line shows that equal rewards keep ref's proportions, .3 : .2.

# %%
three = torch.tensor([0.5, 0.3, 0.2])
draws = torch.tensor(list(product(range(3), repeat=4)))  # watch: draws (81, 4)


def winners_of(places):
    """The probability (3,) that each completion wins. places (81,): which of four draws wins."""
    winners = draws.gather(1, places[:, None]).squeeze(1)
    return torch.zeros(3).scatter_add(0, winners, three[draws].prod(1))


for r in (torch.tensor([0.0, 1, 2]), torch.tensor([0.0, 1, 1])):
    mine = my_best_of_n(three, r, 4)
    print(f"rewards {r.tolist()}: best of 4 {show(mine, 4)}")
    equal(mine, winners_of(best_of_n.pick(r[draws])), msg="my_best_of_n equals the enumeration.")
for n in (1, 4, 64):
    theirs = torch.tensor(closed_form.best_of_n_law(ref[0].numpy(), rewards[0].numpy(), n))
    equal(my_best_of_n(ref[0], rewards[0], n), theirs, msg="my_best_of_n equals best_of_n_law.")
rising = torch.tensor([0.0, 1, 2])
twice = my_best_of_n(my_best_of_n(three, rising, 4), rising, 4)
equal(twice, my_best_of_n(three, rising, 16), msg="Best of 4 of best of 4 is best of 16.")
print("my_best_of_n: equal to minialign's. Best of 4 of the best-of-4 policy is best of 16.")

# %% [markdown]
# ## 6. Build it yourself: ReST
#
# Best-of-n throws $n - 1$ of $n$ samples away. **ReST** (Gulcehre et al. 2023) uses one data set several times. The
# *Grow* step samples completions of many prompts. An *Improve* step does SFT on those whose reward is above a
# threshold, the next one on those above a higher threshold, and so on. The thresholds are quantiles of the sampled
# rewards, here .5, .7 and .9, of both prompts together. The policy ends at ref restricted to the completions above
# the last threshold: $\pi(y) \propto \mathrm{ref}(y)$ there, and 0 elsewhere.
#
# Rewards are often only 0 or 1, "pass or fail". Then the .9 quantile may be 1, and nothing is above it. The mean over
# nothing is NaN, and one optimizer step later all weights are NaN.


# %%
def my_keep(rewards, threshold):
    """Which completions an Improve step keeps. rewards (B,), threshold a number. Return (B,) bool.

    Keep the rewards strictly above the threshold. If there are none, keep those that equal the
    largest reward.
    """
    above = rewards > threshold
    return above if above.any() else rewards == rewards.max()


# %% [markdown]
# ### Checkpoint

# %%
by_hand = my_keep(torch.tensor([0.2, 0.5, 0.9, 0.7]), 0.575)  # their mean is 0.575
always(by_hand.tolist() == [False, False, True, True], "my_keep keeps the last two.")
for row in torch.randint(0, 4, (50, 6), generator=generator).double():  # many equal rewards
    for threshold in (row.mean(), row.median(), row.max()):
        same = torch.equal(my_keep(row, threshold), rest.keep(row, threshold))
        always(same, "my_keep equals the project's keep.")
print("my_keep: equal to minialign's")

# %% [markdown]
# ### Train both
#
# `sample(policy, prompts, n=…)` returns `.completions`: first the $n$ of prompt a, then those of prompt b. We draw
# 6400 each, once. Best-of-16 keeps the winner of every 16, ReST what is above its thresholds. Each trains a copy of
# the policy by SFT, with the mean of $-\log \pi(y|x)$ as the loss.

# %%
DRAWS = 6400
QUANTILES = (0.5, 0.7, 0.9)
drawn_text = sample(policy, language.prompts, n=DRAWS, max_new=3, eos_id=EOS, seed=0).completions
drawn = torch.tensor([language.index[tuple(y)] for y in drawn_text])
drawn = drawn.view(2, DRAWS)  # watch: drawn (2, 6400)
drawn_rewards = rewards.gather(1, drawn)
row_of = drawn + torch.tensor([[0], [K]])  # (2, 6400): the row of `everything` where each stands


def train(policy, kept, steps=150, lr=3e-3):
    """SFT in place on the rows `kept` of `everything`. Returns the exact distribution after it."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, betas=(0.9, 0.99))
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        batch = everything[kept[torch.randint(len(kept), (64,), generator=generator)].tolist()]
        loss = -torch.where(batch.mask, token_logps(policy, batch), 0).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return language.law_of(policy)


def mean_reward(distribution):
    return (distribution * rewards).sum(1).mean().item()


best = best_of_n.pick(drawn_rewards.view(-1, 16))  # watch: best (800,)
winners = row_of.view(-1, 16).gather(1, best[:, None]).squeeze(1)
best_policy = copy.deepcopy(policy)
after_best = train(best_policy, winners)
exact_best = torch.stack([my_best_of_n(ref[x], rewards[x], 16) for x in range(2)])
print(f"best of 16: {len(winners)} winners, mean reward {mean_reward(after_best):.3f}, "
      f"closed form {mean_reward(exact_best):.3f}")

rest_policy = copy.deepcopy(policy)
for quantile in QUANTILES:
    threshold = drawn_rewards.quantile(quantile)
    kept = row_of.flatten()[my_keep(drawn_rewards.flatten(), threshold)]
    after_rest = train(rest_policy, kept)
    exact_rest = ref * (rewards > threshold)
    exact_rest = exact_rest / exact_rest.sum(1, keepdim=True)
    print(f"ReST above {threshold:.1f}: {len(kept)} kept, "
          f"mean reward {mean_reward(after_rest):.3f}, closed form {mean_reward(exact_rest):.3f}")
for after, exact in ((after_best, exact_best), (after_rest, exact_rest)):
    distance = abs(mean_reward(after) - mean_reward(exact))
    this_run(distance < 0.06, "The trained GPT is close to the closed form.")

# %% [markdown]
# What do the policies write now? The prompt's letter is good, repeats are bad, a full stop is good.

# %%
for name, writer in (("before", policy), ("best of 16", best_policy), ("ReST", rest_policy)):
    samples = sample(writer, language.prompts, n=9, max_new=3, eos_id=EOS, seed=1)
    written = [text(y) for y in samples.completions]
    for prompt, of_prompt in (("a", written[:9]), ("b", written[9:])):
        print(f"{name:10} {prompt} → {' '.join(f'{y:4}' for y in of_prompt)}")
figures.selection(rewards, [("reference", ref, None), ("best of 16", exact_best, after_best),
                            (f"ReST, quantile {QUANTILES[-1]}", exact_rest, after_rest)])

# %% [markdown]
# ### Both halves together
#
# The judges' pairs gave a learned reward. Select by it, and look at the rule's reward of the result:

# %%
lost = []
for n in (2, 4, 16, 64):
    by_rule = torch.stack([my_best_of_n(ref[x], rewards[x], n) for x in range(2)])
    by_learned = torch.stack([my_best_of_n(ref[x], learned[x], n) for x in range(2)])
    lost.append(mean_reward(by_rule) - mean_reward(by_learned))
    print(f"best of {n:2} by the rule's reward: {mean_reward(by_rule):.3f}, "
          f"by the learned reward: {mean_reward(by_learned):.3f}")
this_run(0 <= min(lost) and max(lost) < 0.08, "Selecting by the learned reward loses little.")

# %% [markdown]
# Little is lost: this reward model is wrong by a little everywhere. [06b](06b_overoptimization.ipynb) shows what
# happens if it is very wrong in one place.
#
# ## 7. Break it: one threshold for all prompts
#
# Best-of-n compares answers to the same prompt, so the constants of section 3 do not matter to it. ReST has one
# threshold for all prompts. Take the median as the threshold, for three kinds of rewards:

# %%
drawn_learned = learned.gather(1, drawn)  # watch: drawn_learned (2, 6400)
centred = drawn_learned - drawn_learned.mean(1, keepdim=True)
drawn_true = true.gather(1, drawn)  # the judges' rewards, 2 lower for prompt b
shares = {}
for name, r in (("rule's reward", drawn_rewards), ("judges' reward", drawn_true),
                ("learned reward", drawn_learned),
                ("learned, minus each prompt's mean", centred)):
    shares[name] = my_keep(r.flatten(), r.quantile(0.5)).view(2, -1).double().mean(1)
    of_a, of_b = (100 * shares[name]).tolist()
    print(f"{name:34} kept of prompt a: {of_a:3.0f} %, of prompt b: {of_b:3.0f} %")
this_run(shares["learned reward"][0] < 0.05, "By the learned reward hardly any a is kept.")
this_run(shares["judges' reward"][1] < 0.05, "By the judges' reward hardly any b is kept.")

# %% [markdown]
# The judges' rewards keep prompt a and drop b, for which they are 2 lower. The learned rewards do the opposite,
# because b's constant is higher. Either selects *prompts* and learns little about answers. Subtract each prompt's
# mean first.
#
# ## What is wrong here? (1)
#
# "The best of four" in one line of Python. Completions 1 and 2 have the same reward. Why does 2 win so often?

# %%
tied = torch.tensor([0.0, 1.0, 1.0])
picked = torch.tensor([max((tied[y].item(), y) for y in draw)[1] for draw in draws.tolist()])
careless = torch.zeros(3).scatter_add(0, picked, three[draws].prod(1))
print("this code:   ", show(careless, 4))
print("best of four:", show(my_best_of_n(three, tied, 4), 4))

# %% [markdown]
# ## What is wrong here? (2)
#
# Best of 2 for the two prompts, from the learned rewards. The loss falls and the mean reward of the winners is high.
# But look at where the winners come from:

# %%
groups = drawn_learned.reshape(2, -1).T  # (6400, 2): "two completions in each row"
winners_prompt = groups.argmax(1)
print("winners from prompt a, prompt b:", torch.bincount(winners_prompt, minlength=2).tolist())

# %% [markdown]
# ## What you now know
#
# - Comparisons determine rewards up to a constant for each prompt. Nothing ties these constants together.
# - The reward of a text is one number, read at its last token. Reading elsewhere raises no error.
# - Best-of-n and ReST improve a policy by selection and SFT. Both have a closed form, and the trained GPT reaches it.
# - Mistakes with ties, thresholds and constants do not show in the loss.
#
# Next: [06b](06b_overoptimization.ipynb), what a wrong reward costs.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes). Try this: set `QUANTILES = (0.98,)` and run "Train both" again. What do you expect
# of the mean reward and of the samples?
#
# **Exercise 2** (medium, 15 minutes). You have $G$ rewards of one prompt and want to know the expected best of $n <
# G$. Write a function that averages the maximum over *all* subsets of size $n$, without listing them. Hint: sort. In
# how many subsets is the $i$-th smallest the largest?
#
# **Exercise 3** (hard, 20 minutes). Six answers are equally likely. The best of 3 samples is chosen, one more sample
# rejected. Which reward does Bradley-Terry find? Predict it with "where the two answers come from", then fit.
#
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# `max` compares tuples. If the rewards are equal, it compares the second entries, so the higher number (with texts:
# the last in the alphabet) wins every tie. `rewards.argmax(-1)` keeps the first *sample* of the equals, and which one
# came first is chance.
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# `drawn_learned` is (2, 6400). Its transpose puts one completion of prompt a beside one of prompt b in each row. So
# the prompts compete, and the one with the higher constant wins. Right is `drawn_learned.view(-1, 2)`: neighbours in
# memory, of the same prompt.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
always(bool((careless[2] > 0.5).item()), "The last in the order wins the ties.")
this_run(winners_prompt.double().mean() > 0.99, "Nearly all winners come from prompt b.")
pairs = drawn_learned.view(-1, 2)
prompts_of_pairs = torch.arange(2).repeat_interleave(DRAWS // 2)
print("grouped by prompt: winners from a, from b:", torch.bincount(prompts_of_pairs).tolist())
always(bool((pairs[0] == drawn_learned[0, :2]).all()), "A group holds completions of one prompt.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# Only completions with a reward of 1 are kept, the maximum. The mean reward is .995, and the variety is gone: two
# answers are left for each prompt. The reward does not count this as a loss. [06b](06b_overoptimization.ipynb)
# measures it, as KL.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
threshold = drawn_rewards.quantile(0.98)
kept = row_of.flatten()[my_keep(drawn_rewards.flatten(), threshold)]
after_strict = train(copy.deepcopy(policy), kept)
print(f"ReST above {threshold:.1f}: {len(kept)} kept, mean reward {mean_reward(after_strict):.3f}, "
      f"largest {rewards.max():.1f}")
for x in range(2):
    likeliest = after_strict[x].topk(4)
    shown = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
    written = [f"{text(language.completions[c])} {p:.2f}" for p, c in shown]
    print(f"   {'ab'[x]} →", "   ".join(written))

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The $i$-th smallest is the largest of a subset if the other $n - 1$ members are among the $i - 1$ smaller ones. So
# it counts $\binom{i-1}{n-1}$ times of $\binom{G}{n}$. For 0, 1, 2, 3 and $n = 2$: $(1 + 2 \cdot 2 + 3 \cdot 3)/6 =
# 2.33$. This estimate is right on average. Drawing *with* replacement gives too little.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def expected_max(rewards, n):
    G = len(rewards)
    ordered = sorted(rewards.tolist())
    counts = [math.comb(i - 1, n - 1) for i in range(1, G + 1)]
    total = sum(count * reward for count, reward in zip(counts, ordered, strict=True))
    return total / math.comb(G, n)


sampled = drawn_rewards[0, :12]
by_listing = [max(subset) for subset in combinations(sampled.tolist(), 4)]
for theirs in (sum(by_listing) / len(by_listing), best_of_n.expected_max(sampled, 4)):
    equal(expected_max(sampled, 4), theirs, msg="expected_max equals listing and the project's.")
print(f"expected best of 4: {expected_max(drawn_rewards[0], 4):.4f} from samples, "
      f"{my_best_of_n(ref[0], rewards[0], 4) @ rewards[0]:.4f} exactly")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# $\log P/Q$, with $P$ the distribution of the best of 3 and $Q$ uniform. The best of 3 is the $k$-th with probability
# $(k^3 - (k-1)^3)/216$, so the reward is $\log(3k^2 - 3k + 1)$ plus a constant. It depends only on the *ranks* of the
# answers, not on how good they were.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
uniform = torch.full((6,), 1 / 6)
best_of_three = my_best_of_n(uniform, torch.arange(6.0), 3)
found = fit(best_of_three[:, None] * uniform, steps=20_000)
k = torch.arange(1.0, 7)
predicted = (3 * k**2 - 3 * k + 1).log()
print("found    ", show(found - found[0]))
print("predicted", show(predicted))
this_run((found - found[0] - predicted).abs().max() < 1e-2, "The fit finds log P/Q.")
