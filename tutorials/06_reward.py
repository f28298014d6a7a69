# %% [markdown]
# # 06 · Rewards: from comparisons to a number, from a number to a policy
#
# **You will build** the loss of a reward model, the function that reads a reward from a GPT, and best-of-n, the
# simplest way to use the reward. In the end a GPT writes better answers, trained with nothing but comparisons.
#
# **Time:** 26 minutes of reading, 25 seconds of computer.
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
from itertools import product

import torch
from torch.nn.functional import softplus

from minialign.batch import collate
from minialign.logps import token_logps
from minialign.methods import best_of_n, reward_model
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
# [reward](../GLOSSARY.md#reward). Then the [policy](../GLOSSARY.md#policy) is trained so that its answers get higher
# numbers. This is reinforcement learning from human feedback, RLHF (Christiano et al. 2017, Ouyang et al. 2022):

# %%
rlhf_loop(["completions", "reward"], "06_loop.png",
          alt="The RLHF loop: prompts go to the policy, which samples completions; they get a "
          "reward and are compared with the reference; an update changes the policy.")

# %% [markdown]
# This lesson is about the coloured boxes. **How do comparisons become a reward?** The last section uses the reward in
# the simplest way: keep the best answers and do [SFT](../GLOSSARY.md#sft) on them. 06b adds the reference.
#
# ## 1. From comparisons to numbers
#
# We look for numbers $r$ that explain who was chosen over whom. In the model of
# [Bradley and Terry](../GLOSSARY.md#bradley-terry) (1952), a larger difference of rewards makes the choice surer:
#
# $$P(y^+ \text{ is chosen over } y^-) = \sigma\big(r(y^+) - r(y^-)\big), \qquad \sigma(z) = \frac{1}{1 + e^{-z}} .$$
#
# Here $y^+$ and $y^-$ are the chosen and the rejected answer. A difference of 0 means 50 : 50, and a difference of
# $\log 3$ means 75 : 25, that is, odds of 3 : 1. The loss is the negative log-likelihood of the choices. In torch,
# $-\log \sigma(z) = \log(1 + e^{-z})$ is `softplus(-z)`. By hand: rewards of 1.5 and 0.5 give a loss of
# $\log(1 + e^{-1}) = 0.313$.

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
# over answer $j$. What is the gradient of the whole log-likelihood in $r_i$? A comparison that $i$ wins against $j$
# adds $1 - \sigma(r_i - r_j)$. One that it loses subtracts $\sigma(r_i - r_j)$. So each win adds 1, and each
# comparison, won or lost, subtracts $\sigma(r_i - r_j)$: **the reward goes up by the comparisons that the answer won,
# and down by those that it was expected to win.**


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
#
# The gradient must equal that of autograd.

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
# Follow this gradient from 0 until it vanishes. Stop in `my_gradient` when `fit` first calls it. All rewards are 0,
# so an answer is expected to win half of its comparisons with each other one: 6 of 12, or 7 of 14. `fit` divides by
# all 38 comparisons, so `expected` holds .158 and .184, and 0 on the diagonal.


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
# The odds 2 : 1, 3 : 1 and 6 : 1 agree with each other, so three numbers reproduce them exactly.
#
# ## 2. What comparisons cannot say
#
# The fit always returns numbers. Three facts limit what they mean. The cell shows one after the other:
#
# - **Only differences count.** Add 100 to every reward, and the loss is the same.
# - **An answer that never loses gets no finite reward.** Its reward grows with the logarithm of the number of steps.
#   So its size depends on how long the model was trained.
# - **A cycle cannot be represented.** Let the first answer beat the second, the second the third, and the third the
#   first, 9 : 3 each. All three get the same reward.

# %%
shifted = log_likelihood(wins, fitted + 100)
equal(log_likelihood(wins, fitted), shifted, msg="100 more for all changes nothing.")
never_lost = torch.tensor([[0.0, 4, 0], [8, 0, 0], [12, 9, 0]])
gaps = [(fit(never_lost, steps)[2] - fit(never_lost, steps)[1]).item() for steps in (1000, 10_000)]
print("the third never lost: its lead after 1000 and 10000 steps:", [round(gap, 2) for gap in gaps])
cycle = torch.tensor([[0.0, 9, 3], [3, 0, 9], [9, 3, 0]])
print("rewards of a cycle:", show(fit(cycle)))
this_run(gaps[1] - gaps[0] > 2, "The lead grows by about log 10 = 2.3.")
always(fit(cycle).abs().max() < 1e-9, "A symmetric cycle leaves all rewards at 0.")

# %% [markdown]
# ## 3. A language in which we can check everything
#
# We want every answer and its exact probability. So we use a tiny language. Its [tokens](../GLOSSARY.md#token) are
# the letters a, b, c, d and the end of the answer (EOS), printed as a full stop. A prompt is one letter, a or b. A
# [completion](../GLOSSARY.md#prompt) has at most three tokens: it ends with a full stop, or it is cut off. That makes
# $1 + 4 + 16 + 64 = 85$ completions.
#
# A rule says how good each is: $+0.5$ for each letter that equals the prompt, $-0.5$ for each letter three further on
# (after d comes a), $-0.4$ for each letter that repeats the one before, $+0.3$ for a full stop. We use it only to
# play the judges and to check results.
#
# A GPT of one layer with random weights stands for the policy after SFT. `language.law_of` returns its exact
# [distribution](../GLOSSARY.md#distribution) over the 85 completions, which we call `ref`.

# %%
language = Language(n_content=4, max_new=3, n_prompts=2)
EOS = language.eos_id  # token ids: 0 to 3 are the letters a to d, 4 is EOS
K = len(language.completions)  # 85 tuples of ids; language.index[y] is the place of y in this list
policy = tiny_gpt(language.vocab_size, seed=0, mixing=0.3)  # mixing: how much the prefix counts
rewards = language.rewards  # (2, 85): rewards[x, c], by the rule
ref = language.law_of(policy)  # watch: ref (2, 85)

# One batch with a row for each prompt and completion. collate pads the rows and returns a Batch
# with inputs, targets and mask, each (170, 3), as in tutorial 03.
everything = collate([prompt for prompt in language.prompts for _ in range(K)],
                     [list(y) for y in language.completions] * 2, pad_id=EOS)


def text(y):
    """The letters of a completion."""
    return "".join("abcd."[token] for token in y)


print("prompt a: the four likeliest completions, and two with the best reward")
best_two = rewards[0].argsort(descending=True, stable=True)[:2]
for c in [*ref[0].argsort(descending=True)[:4].tolist(), *best_two.tolist()]:
    y = language.completions[c]
    print(f"   {text(y):4}  probability {ref[0, c]:.4f}   reward {rewards[0, c]:5.2f}")
print(f"mean reward of the policy: {(ref * rewards).sum(1).mean():.3f}")
equal(ref.sum(1), torch.ones(2), msg="All completions together have probability 1.")

# %% [markdown]
# ## 4. Build it yourself: the reward model
#
# For texts, the table of rewards becomes a network: a copy of the policy whose head returns one number for each
# position instead of logits, `policy.with_scalar_head()`. Which of these numbers is the reward? The one at the
# answer's **last token**, the first position from which the whole answer can be seen. In the shorter rows of a batch,
# that is not the last position:

# %%
figures.read_position()

# %% [markdown]
# Now write the loss, and the function that reads the reward:


# %%
def my_bradley_terry_loss(chosen_rewards, rejected_rewards):
    """chosen_rewards, rejected_rewards (B,), one entry for each pair.

    Return a scalar, the mean over pairs of −log σ(chosen − rejected). Use softplus: −log σ(z) by
    its formula is infinite at z = −1000.
    """
    gap = chosen_rewards - rejected_rewards  # watch: gap (B,)
    return softplus(-gap).mean()


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
#
# Both functions must equal the project's, and so must the gradient of the loss.

# %%
generator = torch.Generator().manual_seed(0)
chosen, rejected = torch.randn(2, 16, generator=generator).requires_grad_()
mine = my_bradley_terry_loss(chosen, rejected)
theirs, _ = reward_model.bradley_terry_loss(chosen, rejected)
equal(mine, theirs, msg="my_bradley_terry_loss equals the project's.")
slopes = [torch.stack(torch.autograd.grad(one, (chosen, rejected))) for one in (mine, theirs)]
equal(*slopes, msg="The gradient of my_bradley_terry_loss equals the project's.")
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
# probability, as if there were infinitely many comparisons. For prompt b the judges' rewards are all 2 lower, as for
# a question to which no answer is good. Does training find the judges' rewards?

# %%
true = rewards - torch.tensor([[0.0], [2.0]])
prefer = (true[:, :, None] - true[:, None]).sigmoid()  # [x, i, j]: how often i is chosen over j
pair_weights = ref[:, :, None] * ref[:, None] * prefer  # watch: pair_weights (2, 85, 85)

torch.manual_seed(0)
model = policy.with_scalar_head()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for k in range(300):
    optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / 300)
    scores = score(model, everything).view(2, K)  # watch: scores (2, 85)
    losses = softplus(-(scores[:, :, None] - scores[:, None]))  # (2, 85, 85): chosen, rejected
    loss = (pair_weights * losses).sum((1, 2)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    learned = score(model, everything).view(2, K)  # watch: learned (2, 85)

difference = learned - true
constant = (ref * difference).sum(1)  # watch: constant (2,)
spread = (ref * (difference - constant[:, None]) ** 2).sum(1).sqrt()
for x in range(2):
    print(f"prompt {'ab'[x]}: learned − true reward is {constant[x]:.3f} ± {spread[x]:.3f}")
print("prompt a, without this constant:")
for y in ((0, 1, 0), (0, EOS), (EOS,), (2, 2, 0), (3, 3, 3)):
    c = language.index[y]
    found = learned[0, c] - constant[0]
    print(f"   {text(y):4} true reward {true[0, c]:5.2f}, learned {found:5.2f}")
this_run(spread.max() < 0.12, "Within a prompt, learned = true + constant.")
this_run(abs(constant[0] - constant[1]) > 1, "The two constants differ by more than 1.")

# %% [markdown]
# Within a prompt it does, up to a constant, and least well for rare completions like `ddd`.
#
# The constants of the two prompts are far apart, and b has the higher one although its answers are worse. No pair
# compared answers to different prompts, so nothing ties the constants together. They come from the random start of
# the head and from training. So **the learned reward of one answer means nothing by itself; only compare answers to
# the same prompt.**
#
# ## 5. Break it: read the wrong token
#
# `numbers[:, -1]` reads at the **last position** of the batch, which may be padding. Reading at the last *input* is
# **one token early**: the number there was computed before the last token was seen. How many pairs does the model
# then order correctly?

# %%
rows = torch.cat([everything.inputs[:, :1], everything.targets], dim=1)
length = everything.mask.sum(1)  # (170,) k tokens end at position k, because prompts have one token
with torch.no_grad():
    numbers = model(rows)  # (170, 4)
last_position = numbers[:, -1].view(2, K)
one_early = numbers[torch.arange(len(rows)), length - 1].view(2, K)
better = true[:, :, None] - true[:, None] > 1e-9  # [x, i, j]: i is truly better than j


def agreement(scores):
    """The share of pairs that scores (2, 85) order right: drawn from ref, rewards different."""
    weight = ref[:, :, None] * ref[:, None] * better
    return ((weight * (scores[:, :, None] > scores[:, None])).sum() / weight.sum()).item()


readings = {"last token": learned, "last position": last_position, "one token early": one_early}
for name, scores in readings.items():
    print(f"{name:16} {100 * agreement(scores):5.1f} % of the pairs in the right order")
this_run(agreement(learned) > agreement(last_position) + 0.02, "The last position is worse.")
this_run(agreement(one_early) < 0.75, "One token early orders far fewer pairs right.")

full = 100 * (ref.flatten() * (length == 3)).sum() / 2
print(f"{full:.0f} % of the policy's answers have full length")

# %% [markdown]
# No error is raised. The last position looks almost right, because for answers of full length it *is* the last token.
# But the reward of a short answer is now read at padding, so it depends on the longest row of its batch.
#
# ## 6. Use it: best-of-n
#
# **Best-of-n** samples $n$ completions of a prompt and keeps the one with the highest reward (Stiennon et al. 2020).
# It compares answers to one prompt only, so the constants do not matter.
#
# What distribution do the winners have? Let `at_most` be the probability that one sample has a reward of at most
# $r(y)$, and `level` that it has exactly $r(y)$. The best of $n$ is at most $r(y)$ if all $n$ samples are. That has
# probability `at_most**n`. In the same way it is below $r(y)$ with probability `(at_most - level)**n`. The difference
# is the probability that it equals $r(y)$. Completions of equal reward share it in proportion to ref.
#
# By hand, for ref = (.5, .3, .2), rising rewards and $n = 4$: $.5^4 = .0625$, $.8^4 - .5^4 = .3471$, $1 - .8^4 =
# .5904$. Four samples nearly triple the best one's probability.


# %%
def my_best_of_n(ref, rewards, n):
    """The distribution of the best of n samples from ref, for one prompt.

    ref, rewards (K,). Return (K,). For each completion, let at_most be the probability that a
    sample of ref has a reward of at most its reward, and level that it has exactly its reward.
    The winner has this reward with probability at_most^n − (at_most − level)^n, and the
    completion's share of it is ref/level.
    """
    at_most = ((rewards[:, None] >= rewards) * ref).sum(1)  # watch: at_most (K,)
    level = ((rewards[:, None] == rewards) * ref).sum(1)
    return ref / level * (at_most**n - (at_most - level).clamp(min=0) ** n)


# %% [markdown]
# ### Checkpoint
#
# The cell writes down all $3^4$ draws, picks the first of the best in each, and adds up the probabilities. In the
# second line two rewards are equal, and they keep ref's proportions, .3 : .2.

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
print("my_best_of_n: equal to minialign's")

# %% [markdown]
# The learned reward is not the rule. How much is lost if we select by it? Look at the mean of the *rule's* reward:


# %%
def mean_reward(distribution):
    """By the rule."""
    return (distribution * rewards).sum(1).mean().item()


lost = []
for n in (2, 4, 16, 64):
    by_rule, by_learned = (torch.stack([my_best_of_n(ref[x], r[x], n) for x in range(2)])
                           for r in (rewards, learned))
    lost.append(mean_reward(by_rule) - mean_reward(by_learned))
    print(f"best of {n:2} by the rule's reward: {mean_reward(by_rule):.3f}, "
          f"by the learned reward: {mean_reward(by_learned):.3f}")
this_run(0 <= min(lost) and max(lost) < 0.08, "Selecting by the learned reward loses little.")

# %% [markdown]
# ### Train on the winners
#
# Now sample from the policy, select by the learned reward, and do SFT on the winners. Then *one* sample of the new
# policy should be about as good as the best of 16 of the old one. (`sample(policy, prompts, n=…).completions` holds
# first the $n$ of prompt a, then those of prompt b.)

# %%
DRAWS, BEST_OF = 6400, 16
drawn_text = sample(policy, language.prompts, n=DRAWS, max_new=3, eos_id=EOS, seed=0).completions
drawn = torch.tensor([language.index[tuple(y)] for y in drawn_text])
drawn = drawn.view(2, DRAWS)  # watch: drawn (2, 6400)
drawn_learned = learned.gather(1, drawn)  # watch: drawn_learned (2, 6400)
row_of = drawn + torch.tensor([[0], [K]])  # (2, 6400): the row of `everything` where each stands
best = best_of_n.pick(drawn_learned.view(-1, BEST_OF))  # watch: best (800,)
winners = row_of.view(-1, BEST_OF).gather(1, best[:, None]).squeeze(1)

trained = copy.deepcopy(policy)
optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3, betas=(0.9, 0.99))
for k in range(150):
    optimizer.param_groups[0]["lr"] = 3e-3 * (1 - k / 150)
    batch = everything[winners[torch.randint(len(winners), (64,), generator=generator)].tolist()]
    loss = -torch.where(batch.mask, token_logps(trained, batch), 0).sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

after = language.law_of(trained)  # watch: after (2, 85)
exact = torch.stack([my_best_of_n(ref[x], learned[x], BEST_OF) for x in range(2)])
print(f"mean reward by the rule: {mean_reward(ref):.3f} before, {mean_reward(after):.3f} after, "
      f"closed form {mean_reward(exact):.3f}")
this_run(abs(mean_reward(after) - mean_reward(exact)) < 0.06, "It is near the closed form.")
for name, writer in (("before", policy), ("after", trained)):
    samples = sample(writer, language.prompts, n=9, max_new=3, eos_id=EOS, seed=1)
    written = [text(y) for y in samples.completions]
    for prompt, of_prompt in (("a", written[:9]), ("b", written[9:])):
        print(f"{name:7} {prompt} → {' '.join(f'{y:4}' for y in of_prompt)}")
figures.selection(rewards, [("reference", ref, None), (f"best of {BEST_OF}", exact, after)])

# %% [markdown]
# (A bar of the figure collects rewards in a range of 0.5.) Nearly all samples now hold the prompt's letter, which is
# what the judges like. The policy met the rule only through the judges' choices.
#
# **ReST** (Gulcehre et al. 2023) selects by a threshold instead. It samples one data set and does SFT on all
# completions whose reward is above a threshold, then on those above a higher one. With a large data set and training
# to the end, the policy becomes ref restricted to the completions above the last threshold: $\pi(y) \propto
# \mathrm{ref}(y)$ there, 0 elsewhere. One threshold serves all prompts. With a learned reward it would select the
# *prompts* with the highest constants, so first subtract each prompt's mean. The code is
# [rest.py](../../minialign/methods/rest.py).
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
# - Bradley-Terry turns comparisons into rewards. Each answer's reward moves by its wins minus its expected wins.
# - Comparisons determine the rewards of a prompt's answers up to a constant, if they connect all answers and no group
#   of answers always wins. Nothing ties the constants of different prompts together.
# - The reward of a text is one number, read at its last token. Reading elsewhere raises no error.
# - Best-of-n selects within a prompt, and its distribution is known. A GPT that is trained on the winners comes near
#   its mean reward.
#
# Next: in [06b](06b_overoptimization.ipynb) the reward is wrong, and the policy is optimised for it.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes). Best of 64 by the learned reward has a mean of .886 by the rule. What do you
# expect of the best of 1024: which answers, and which mean? Then compute it with `my_best_of_n`.
#
# **Exercise 2** (medium, 10 minutes). An uneven cycle: the first answer beats the second 9 : 3, the second the third
# 9 : 3, and the third the first 11 : 1. Which answer gets the highest reward? Use the rule of `my_gradient`, then
# fit.
#
# **Exercise 3** (hard, 20 minutes). Nobody judges: all chosen answers come from one source, $P$, all rejected ones
# from another, $Q$. Show that Bradley-Terry then finds $\log P(y)/Q(y)$ plus a constant. Now six answers are equally
# likely. The best of 3 samples is chosen, one more sample is rejected. Predict the reward, then fit.
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
always(bool((pairs[0] == drawn_learned[0, :2]).all()), "A group holds completions of one prompt.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The two completions with the highest learned rewards win nearly always: for prompt a mostly `aaa` (.98), for b `bbb`
# (.59) and `bdb` (.41). The learned reward of `aaa` is
# .91, by the rule it is .7; `aca`, with 1.0 by the rule, comes second. So the mean falls to .765. Strong selection
# finds the errors of a learned reward: this is the subject of [06b](06b_overoptimization.ipynb).
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
strict = torch.stack([my_best_of_n(ref[x], learned[x], 1024) for x in range(2)])
print(f"best of 1024: mean reward {mean_reward(strict):.3f}, largest {rewards.max():.1f}")
for x in range(2):
    for c in strict[x].topk(2).indices.tolist():
        without_constant = learned[x, c] - ref[x] @ (learned[x] - rewards[x])
        print(f"   {'ab'[x]} → {text(language.completions[c])} {strict[x, c]:.2f}, "
              f"rule {rewards[x, c]:.1f}, learned {without_constant:.2f}")
this_run(mean_reward(strict) < 0.886, "The best of 1024 is worse than the best of 64.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The third: it won 14 of its 24 comparisons, the second 12, the first 10. At the optimum each answer is expected to
# win as often as it won. Every pair was compared 12 times, so the rewards are ordered like the wins. They do not
# reproduce the odds: the first is said to lose most of its comparisons with the second, but it won 9 of 12.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
uneven = torch.tensor([[0.0, 9, 1], [3, 0, 9], [11, 3, 0]])
found = fit(uneven)
print("wins", show(uneven.sum(1), 0), "  rewards", show(found))
always(my_gradient(uneven, found).abs().max() < 1e-6, "Expected wins equal wins.")
always(bool((found.argsort() == uneven.sum(1).argsort()).all()), "Rewards are ordered like wins.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Answers $y$ and $z$ meet as (chosen $y$, rejected $z$) with probability $P(y)Q(z)$, the other way round with
# $P(z)Q(y)$. A log loss is smallest if the predicted odds equal the true ones: $e^{r(y) - r(z)} = P(y)Q(z) /
# P(z)Q(y)$, and $r = \log P/Q$ satisfies this for all pairs. The best of 3 is the $k$-th with probability $(k^3 -
# (k-1)^3)/216$, so the reward is $\log(3k^2 - 3k + 1)$ plus a constant. It depends only on the *ranks* of the
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
