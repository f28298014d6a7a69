# %% [markdown]
# # 06 · Rewards: from comparisons to a number, from a number to a policy
#
# **You will hold** the Bradley-Terry loss and the reading of a reward model, best-of-n and ReST, each in a few lines and proved equal to
# the project's; a picture of what a reward buys per nat of KL; and four mistakes that no error message reports.
#
# **Minutes:** 40 to read, about 20 seconds of CPU to run. **You need:** tutorial 03 (`log π(y|x)`, `mask`), the loss of tutorial 04, and
# what a KL divergence is.
#
# Lines marked `# watch: name (shape)` are good places for a breakpoint. `B` completions, `N` prompts, `n` draws for each winner, `C`
# completions that exist at all.

# %%
import copy
import math
import sys
from itertools import combinations, product
from pathlib import Path

# The project is not installed, it runs from its checkout: find the folder above this file (or above the notebook) that holds it.
ROOT = next(folder for folder in Path(globals().get("__file__", "here")).resolve().parents if (folder / "minialign").is_dir())
sys.path.insert(0, str(ROOT))

import matplotlib
import torch
from torch.nn.functional import softplus

from minialign.batch import Batch, collate
from minialign.logps import token_logps
from minialign.methods import best_of_n, rest, reward_model
from minialign.rewards import score
from minialign.sample import sample
from toy import closed_form
from toy.tiny_language import Language, tiny_gpt

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # a script draws into a file: no window to close, no screen needed
import matplotlib.pyplot as plt

torch.set_default_dtype(torch.float64)  # so that "equal" can mean twelve digits

# %% [markdown]
# ## The question
#
# Good answers are hard to write and easy to compare. Ask people which of two answers is better, and you have pairs: a `chosen` one and a
# `rejected` one.
#
# 1. How do comparisons become a number $r(y)$ for each answer?
# 2. How does a number become a better policy, if we may look at it but not differentiate through it?
#
# ## The equation
#
# **From pairs to a number.** Bradley and Terry assume that a difference of rewards is the log-odds of being preferred. The loss is the
# negative log-likelihood of the choices, with $\sigma(z) = 1/(1 + e^{-z})$:
#
# $$P(y \text{ beats } y') = \sigma\big(r(y) - r(y')\big), \qquad
#   L(r) = -\mathbb{E}\,\log \sigma\big(r(y_w) - r(y_l)\big) .$$
#
# **From a number to a policy.** Draw completions from a policy $\mathrm{ref}$, select some by their reward, and do SFT on those. With
# $F(y)$ the probability that a draw has a reward not above $r(y)$, and all rewards different, selection has these laws:
#
# $$\begin{array}{lll}
# \text{best-of-n} & \text{of } n \text{ draws keep the best} & \pi(y) = F(y)^n - \big(F(y) - \mathrm{ref}(y)\big)^n \\
# \text{ReST} & \text{of all draws keep those above } \tau & \pi(y) \propto \mathrm{ref}(y) \cdot \mathbf{1}[r(y) > \tau] \\
# \text{yardstick} & \text{most reward for its KL} & \pi^*(y) \propto \mathrm{ref}(y) \cdot e^{r(y)/\beta}
# \end{array}$$

# %% [markdown]
# ## The tiniest numbers: a tournament
#
# One pair first. Rewards 1.5 and 0.5: the loss is $\log(1 + e^{-1})$, and its gradient pushes the two apart with the same force.

# %%
pair = torch.tensor([1.5, 0.5], requires_grad=True)
loss = softplus(-(pair[0] - pair[1]))  # −log σ(z) = softplus(−z)
loss.backward()
print(f"loss {loss.item():.6f}   gradient {pair.grad.numpy().round(6)}")
torch.testing.assert_close(loss.item(), 0.313262, atol=1e-6, rtol=0)
torch.testing.assert_close(pair.grad, torch.tensor([-0.268941, 0.268941]), atol=1e-6, rtol=0)  # σ(1) − 1, and its negative

# %% [markdown]
# Now three answers and a table of games: `wins[i, j]` is how often $i$ was preferred to $j$. The gradient of the whole loss is readable:
# the reward of an answer rises by the games it won, minus the games it was expected to win. (Chess ratings are this, one game at a time.)


# %%
def fit(wins, steps=3000, lr=2.0):
    """Bradley-Terry rewards (A,) of A answers from wins (A, A), by gradient descent from 0, the gradient written out."""
    wins = wins / wins.sum()
    games = wins + wins.T
    r = torch.zeros(len(wins))
    for _ in range(steps):
        expected = games * (r[:, None] - r).sigmoid()  # watch: expected (A, A)
        r = r + lr * (wins - expected).sum(1)
    return r


games = torch.tensor([[0.0, 4, 2], [8, 0, 3], [12, 9, 0]])  # B beats A 8 : 4, C beats B 9 : 3, C beats A 12 : 2
r = fit(games)
print("rewards of A, B, C:", r.numpy().round(6), "   minus that of A:", (r - r[0]).numpy().round(6))
torch.testing.assert_close(r - r[0], torch.tensor([1.0, 2, 6]).log())  # odds 2 : 1, 3 : 1, and 6 : 1, which is their product

# %% [markdown]
# The three odds agree with each other, so three numbers hold them exactly. Three things to know about this fit:
#
# - **Only differences are identified.** The loss sees $r(y_w) - r(y_l)$. Add 100 to every reward, and nothing changes. Descent from 0 ends
#   at mean 0 because each game pushes two answers apart by equal amounts.
# - **An answer that never loses has no finite reward.** Its reward grows like the logarithm of the steps. The scale of a learned reward
#   then tells how long it was trained.
# - **A circle cannot be said.** If A beats B, B beats C, and C beats A, three numbers cannot order them, and all get the same.


# %%
def loss_of(r, wins):
    return (wins * softplus(-(r[:, None] - r))).sum() / wins.sum()


torch.testing.assert_close(loss_of(r, games), loss_of(r + 100, games))
assert abs(r.sum()) < 1e-9

unbeaten = torch.tensor([[0.0, 4, 0], [8, 0, 0], [12, 9, 0]])
heights = [(r := fit(unbeaten, steps=steps))[2].item() - r[1].item() for steps in (1000, 10_000, 30_000)]
print("C never lost: r(C) − r(B) after 1000, 10000, 30000 steps", [round(height, 3) for height in heights])
assert abs(heights[1] - heights[0] - math.log(10)) < 0.2 and abs(heights[2] - heights[1] - math.log(3)) < 0.1

circle = torch.tensor([[0.0, 9, 3], [3, 0, 9], [9, 3, 0]])
print("in a circle, 9 : 3 each: rewards", fit(circle).numpy().round(6) + 0.0)
assert fit(circle).abs().max() < 1e-12

# %% [markdown]
# ### Chosen from one law, rejected from another
#
# Sometimes nobody compares. The chosen answers are all from one source, say an expert's demonstrations with law $P$, and the rejected
# ones from another, say a policy with law $Q$. What does the same loss find then?
#
# Look at one pair of answers $\{a, b\}$. It occurs as "$a$ chosen, $b$ rejected" with weight $P_a Q_b$, and the other way round with
# weight $P_b Q_a$. So it is a tournament, in which $a$ beats $b$ with odds $P_a Q_b : P_b Q_a$. The log-odds are
# $\log \frac{P_a}{Q_a} - \log \frac{P_b}{Q_b}$, a difference, and all pairs agree:
#
# $$r(y) = \log \frac{P(y)}{Q(y)} + \text{const} .$$
#
# That is the **density-ratio lemma**. The reward says how much likelier an answer is under the one law than under the other. Learning a
# reward from demonstrations alone rests on it.

# %%
P, Q = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.3, 0.2])
found = fit(P[:, None] * Q)  # wins[a, b] = P_a·Q_b
print("found    ", found.numpy().round(6))
print("log P/Q  ", (P / Q).log().numpy().round(6))
torch.testing.assert_close(found, (P / Q).log() - (P / Q).log().mean())

# %% [markdown]
# And where two answers of the *same* law are compared by somebody whose choices follow rewards $r$? Then $a$ beats $b$ with odds
# $e^{r_a - r_b}$, whatever that law is: it says how often a pair is seen, not who wins. The fit returns $r$.

# %%
r = torch.tensor([0.0, 1.0, 3.0])
for law in (P, Q, torch.tensor([0.05, 0.05, 0.9])):
    found = fit(law[:, None] * law * (r[:, None] - r).sigmoid(), steps=20_000)
    print(f"answers from {law.numpy()}: found {(found - found[0]).numpy().round(6) + 0.0}")
    torch.testing.assert_close(found - found[0], r, atol=1e-5, rtol=0)

# %% [markdown]
# ## Build it yourself, 1: the reward model
#
# For texts, a table of rewards becomes a network: the trunk of a GPT, with a head that gives one number per position. The reward of an
# answer is the number at its **last token**, usually EOS, the first place from which the whole answer can be seen.
#
# Two options of the loss are in use. A `margin` demands that the chosen reward be higher by at least so much. `centre` is a small price
# on the sum of the two rewards, which pins down the constant that the loss itself cannot see.


# %%
def my_bradley_terry_loss(chosen_rewards, rejected_rewards, margin=0.0, centre=0.0):
    """chosen_rewards, rejected_rewards (B,) -> the loss."""
    gap = chosen_rewards - rejected_rewards  # watch: gap (B,)
    return (softplus(-(gap - margin)) + centre * (chosen_rewards + rejected_rewards) ** 2).mean()


def my_score(model, batch):
    """The model's number at the last completion token of each row: (B,)."""
    rows = torch.cat([batch.inputs[:, :1], batch.targets], dim=1)  # (B, T + 1) the rows before they were cut into inputs and targets
    numbers = model(rows)  # watch: numbers (B, T + 1)
    last = [1 + scored.nonzero().max() for scored in batch.mask]  # prediction t is of token t + 1
    return numbers[torch.arange(len(rows)), last]


# %% [markdown]
# ## Checkpoint
#
# The model below is a tiny GPT over a language of four letters and EOS, with at most three tokens to a completion. So each prompt has
# $1 + 4 + 16 + 64 = 85$ completions, and everything can be summed instead of sampled. `everything` holds them all, for two prompts. The
# language has its own reward: 0.5 for each letter that the prompt likes, −0.5 for one it dislikes, −0.4 for a letter repeated at
# once, 0.3 for ending with EOS.

# %%
generator = torch.Generator().manual_seed(0)
chosen, rejected = torch.randn(2, 16, generator=generator).requires_grad_()
for options in ({}, {"margin": 0.3}, {"centre": 0.01}):
    mine, (theirs, _) = my_bradley_terry_loss(chosen, rejected, **options), reward_model.bradley_terry_loss(chosen, rejected, **options)
    torch.testing.assert_close(mine, theirs)
    for number in (chosen, rejected):
        torch.testing.assert_close(torch.autograd.grad(mine, number, retain_graph=True), torch.autograd.grad(theirs, number, retain_graph=True))

language = Language(n_content=4, max_new=3, n_prompts=2)
EOS, C = language.eos_id, len(language.completions)
rewards = language.rewards.round(decimals=6)  # watch: rewards (2, C); equal sums, added in another order, shall be equal
policy = tiny_gpt(language.vocab_size, seed=0, mixing=0.3)
ref = language.law_of(policy)  # watch: ref (2, C), all probabilities
everything = collate([prompt for prompt in language.prompts for _ in range(C)], [list(y) for y in language.completions] * 2, pad_id=EOS)

torch.manual_seed(0)
model = policy.with_scalar_head()
with torch.no_grad():
    torch.testing.assert_close(my_score(model, everything), score(model, everything))
print(f"bradley_terry_loss, score: equal to minialign's;   {C} completions a prompt, E[r] of ref {(ref * rewards).sum(1).mean():.4f}")

# %% [markdown]
# ### Train it on all pairs at once
#
# The judges see two draws of ref and choose by $\sigma$ of the difference. Every pair of completions enters with its exact probability:
# this is what infinitely many comparisons would give. The second prompt is a harder one: the judges' rewards are 2 lower there, for
# all of its completions.

# %%
true = rewards - torch.tensor([[0.0], [2.0]])
wins = ref[:, :, None] * ref[:, None] * (true[:, :, None] - true[:, None]).sigmoid()  # watch: wins (2, C, C)
floor = sum(loss_of(true[n], wins[n]) for n in range(2)).item() / 2  # not 0: the judges toss a coin, though a loaded one
STEPS = 400
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for k in range(STEPS):
    optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / STEPS)
    scores = score(model, everything).view(2, C)
    loss = sum(loss_of(scores[n], wins[n]) for n in range(2)) / 2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if k % 100 == 0 or k == STEPS - 1:
        print(f"step {k:3}   loss {loss.item():.5f}   the least possible {floor:.5f}")

learned = score(model, everything).detach().view(2, C)  # watch: learned (2, C)
error = learned - true
constant = (ref * error).sum(1, keepdim=True)  # (2, 1)
spread = (ref * (error - constant) ** 2).sum(1).sqrt()
for n in range(2):
    print(f"prompt {n}: learned minus true reward = {constant[n].item():6.3f} ± {spread[n].item():.3f} over completions drawn from ref")
assert 0 < loss.item() - floor < 0.002 and spread.max() < 0.1
assert (constant[0] - constant[1]).abs() > 1

# %% [markdown]
# Within a prompt the model has found the reward, up to a constant. The constants of the two prompts have nothing to do with each other,
# nor with the truth: no pair ever compared answers to *different* prompts. So the learned reward of one answer means nothing, and
# neither does a comparison across prompts. (After training, the project subtracts the mean reward of the chosen answers. That
# sets one constant for all prompts together.)
#
# ## Break it on purpose, 1: read the wrong token
#
# Two errors that are easy to make. **At the last position**: `numbers[:, -1]` is right for the longest row of a batch, and stands on
# padding in all others. **One token early**, at the last *input*: the answer's last token has then not been read.

# %%
rows = torch.cat([everything.inputs[:, :1], everything.targets], dim=1)
last = everything.mask.sum(1)  # (2·C,) prompts have one token here, so a completion of k tokens ends at position k
with torch.no_grad():
    numbers = model(rows)  # (2·C, T + 1)
at_the_end, one_early = numbers[:, -1].view(2, C), numbers[torch.arange(len(rows)), last - 1].view(2, C)


def agreement(scores):
    """Share of the judges' opinions, among pairs drawn from ref with different rewards, that these scores order rightly."""
    both, better = ref[:, :, None] * ref[:, None], true[:, :, None] - true[:, None] > 1e-9
    return ((both * better * (scores[:, :, None] > scores[:, None])).sum() / (both * better).sum()).item()


for name, scores in (("last token", learned), ("last position", at_the_end), ("one token early", one_early)):
    print(f"{name:16} orders {100 * agreement(scores):.1f} % of the pairs rightly")
assert agreement(learned) > 0.97 and agreement(at_the_end) < 0.95 and agreement(one_early) < 0.7

# %% [markdown]
# Worse than wrong, the first is *not a function of the answer*: the number depends on how long the longest neighbour in the batch is. A
# model trained so looks fine on the batches it was trained with. The second gives the same reward to answers that differ in the last
# token only; whether an answer ended at all is such a difference.

# %%
short = [[0], [1, EOS]]  # a prompt and its answer of two tokens
for neighbour in ([EOS], [1, 2, 3]):
    batch = collate([short[0], [0]], [short[1], neighbour], pad_id=EOS)
    with torch.no_grad():
        whole = torch.cat([batch.inputs[:, :1], batch.targets], dim=1)
        print(f"beside an answer of {len(neighbour)}: read at the last token {score(model, batch)[0].item():.4f}, "
              f"at the last position {model(whole)[0, -1].item():.4f}")
        torch.testing.assert_close(score(model, batch)[0], learned[0, language.index[1, EOS]])
first, second = language.index[1, 2, EOS], language.index[1, 2, 3]
assert one_early[0, first] == one_early[0, second] and learned[0, first] > learned[0, second]

# %% [markdown]
# ## Build it yourself, 2: select
#
# Now the second question. The reward is a box that gives numbers; take its largest. **Best-of-n** draws $n$ completions of a prompt and
# keeps the best. **ReST** draws a whole data set from many prompts, once (the *Grow* step), and keeps what is above a threshold. Then it
# raises the threshold, on the same data (the *Improve* steps). The thresholds are quantiles of the rewards that were drawn.


# %%
def my_pick(rewards):
    """rewards (N, n) -> the index of the best of each row, (N,); of equals the first."""
    return torch.tensor([max(range(len(row)), key=lambda i, row=row: row[i]) for row in rewards.tolist()])  # max keeps the first


def my_keep(rewards, threshold):
    """rewards (B,) -> which are kept, (B,): those strictly above the threshold. If that leaves nothing, those that equal the largest."""
    above = rewards > threshold
    return above if above.any() else rewards == rewards.max()


def my_nll(logps, mask):
    """SFT on what was selected: logps, mask (B, T) -> the mean over completions of −log π(y|x)."""
    return -torch.where(mask, logps, 0).sum(1).mean()


def my_best_of_n_law(ref, rewards, n):
    """ref, rewards (C,) -> the law of the best of n draws, (C,); between equal rewards ref's shares stay."""
    upto = ((rewards[:, None] >= rewards) * ref).sum(1)  # (C,) F: the mass with a reward not above mine
    level = ((rewards[:, None] == rewards) * ref).sum(1)  # (C,) the mass with my reward
    return ref / level * (upto**n - (upto - level).clamp(min=0) ** n)


# %% [markdown]
# Where does the law come from? The best of $n$ is not above a reward if and only if all $n$ draws are not above it: $F^n$. Subtract
# the same for the next lower reward. By hand, for $\mathrm{ref} = (.5, .3, .2)$ with rising rewards and $n = 4$: $.5^4 = .0625$,
# $.8^4 - .5^4 = .3471$, $1 - .8^4 = .5904$. To be sure, write down all $3^4$ draws.

# %%
three = torch.tensor([0.5, 0.3, 0.2])


def by_enumeration(pick, rewards, n):
    """The law of what `pick` returns, over all 3^n draws from `three`, each with its probability."""
    draws = torch.tensor(list(product(range(3), repeat=n)))  # watch: draws (3^n, n)
    winners = draws.gather(1, pick(rewards[draws])[:, None]).squeeze(1)
    return torch.zeros(3).scatter_add(0, winners, three[draws].prod(1))


rising, tied = torch.tensor([0.0, 1, 2]), torch.tensor([0.0, 1, 1])
for r in (rising, tied):
    law = my_best_of_n_law(three, r, 4)
    print(f"rewards {r.numpy()}: best of 4 {law.numpy().round(4)}")
    torch.testing.assert_close(law, by_enumeration(my_pick, r, 4))
torch.testing.assert_close(my_best_of_n_law(three, rising, 4), torch.tensor([0.0625, 0.3471, 0.5904]))

# %% [markdown]
# In the second line two answers tie. The level gets its $1 - .5^4$, and inside it ref's shares stay, $.3 : .2$. The first drawn of the
# best is a fair draw among them.
#
# ReST by hand: rewards .2, .5, .9, .7 have mean .575, and the last two are above it.
#
# ## Checkpoint

# %%
random_rewards = torch.randint(0, 4, (50, 6), generator=generator).double()  # full of ties
assert torch.equal(my_pick(random_rewards), best_of_n.pick(random_rewards))
for row in random_rewards:
    for threshold in (row.mean(), row.median(), row.max()):
        assert torch.equal(my_keep(row, threshold), rest.keep(row, threshold))
assert my_keep(torch.tensor([0.2, 0.5, 0.9, 0.7]), 0.575).tolist() == [False, False, True, True]

mask = torch.rand(8, 5, generator=generator) < 0.7
logps = -torch.rand(8, 5, generator=generator)
torch.testing.assert_close(my_nll(logps, mask), best_of_n.best_of_n_loss(logps, mask)[0])
torch.testing.assert_close(my_nll(logps, mask), rest.rest_loss(logps, mask)[0])

for n in (1, 2, 4, 64):
    for x in range(2):
        oracle = closed_form.best_of_n_law(ref[x].numpy(), rewards[x].numpy(), n)
        torch.testing.assert_close(my_best_of_n_law(ref[x], rewards[x], n), torch.tensor(oracle))
print("pick, keep, best_of_n_loss, rest_loss: equal to minialign's; the law equals toy/closed_form.py's")

# %% [markdown]
# ### What best-of-n costs
#
# How far does it move from ref? If there are many completions, all unlikely and no two alike in reward, then $u = F(y)$ is spread evenly
# over $[0, 1]$. The winner's $u$ has the density $n u^{n-1}$, and
#
# $$\mathrm{KL}(\pi \,\|\, \mathrm{ref}) = \int_0^1 n u^{n-1} \log\!\big(n u^{n-1}\big)\, du = \log n - \frac{n-1}{n} .$$
#
# No reward in it, and no language: 8 draws cost at most 1.20 nats, 32 at most 2.50. "At most", because likely completions and ties only
# merge cells of this picture, and merging cannot raise a KL. Here it is rising to the bound as completions get finer:

# %%


def kl(p, q):
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0).sum(-1)


def bound(n):
    return math.log(n) - (n - 1) / n


for size in (1, 3, 10, 100, 3000):
    uniform = torch.full((size,), 1 / size)
    divergence = kl(my_best_of_n_law(uniform, torch.arange(float(size)), 4), uniform).item()
    print(f"{size:5} equally likely completions, rewards all different, n = 4: KL {divergence:.6f}   bound {bound(4):.6f}")
    assert divergence <= bound(4)
assert bound(4) - divergence < 1e-3
torch.testing.assert_close(kl(my_best_of_n_law(three, rising, 4), three).item(), 0.559751, atol=1e-6, rtol=0)
for n in (2, 8, 32):
    torch.testing.assert_close(bound(n), best_of_n.kl_bound(n))
assert abs(bound(8) - 1.20) < 0.005 and abs(bound(32) - 2.50) < 0.005

# %% [markdown]
# ### What it gains: the expected maximum
#
# $\mathbb{E}[\max \text{ of } n]$ has to be estimated from samples. Given $N \ge n$ rewards of one prompt, the best estimate uses every
# subset of $n$: sort the rewards; the $i$-th smallest is the largest of $\binom{i-1}{n-1}$ of the $\binom{N}{n}$ subsets. For 0, 1, 2, 3 and
# $n = 2$: $(1 \cdot 1 + 2 \cdot 2 + 3 \cdot 3)/6 = 2.333$.


# %%
def my_expected_max(rewards, n):
    """The mean, over all subsets of n, of the largest."""
    N, ordered = len(rewards), sorted(rewards.tolist())
    return sum(math.comb(i - 1, n - 1) * reward for i, reward in enumerate(ordered, start=1)) / math.comb(N, n)


def by_groups(rewards, n):
    """N/n groups, as they were drawn: the mean of their maxima."""
    return rewards.view(-1, n).amax(1).mean().item()


def plug_in(rewards, n):
    """The exact law of best-of-n, for the sample in ref's place: draws with replacement."""
    N = len(rewards)
    return (my_best_of_n_law(torch.full((N,), 1 / N), rewards, n) @ rewards).item()


four = torch.tensor([0.0, 1, 2, 3])
torch.testing.assert_close(my_expected_max(four, 2), 14 / 6)
for n in (1, 2, 3, 4):
    subsets = [max(subset) for subset in combinations(four.tolist(), n)]
    torch.testing.assert_close(my_expected_max(four, n), sum(subsets) / len(subsets))  # checkpoint
    torch.testing.assert_close(my_expected_max(four, n), best_of_n.expected_max(four, n))

samples = torch.tensor(list(product(range(3), repeat=8)))  # every sample of N = 8
chance, truth = three[samples].prod(1), (my_best_of_n_law(three, rising, 4) @ rising).item()
print(f"E[max of 4] = {truth:.4f}, estimated from 8 samples:")
for estimate in (my_expected_max, by_groups, plug_in):
    estimates = torch.tensor([estimate(rising[eight], 4) for eight in samples])  # watch: estimates (3^8,)
    mean = (chance @ estimates).item()
    deviation = (chance @ (estimates - mean) ** 2).sqrt().item()
    print(f"{estimate.__name__.removeprefix('my_'):14} mean {mean:.4f}   standard deviation {deviation:.4f}")
    assert (abs(mean - truth) < 1e-12) == (estimate is not plug_in)

# %% [markdown]
# All subsets and groups are both right on average, and all subsets scatter less. The third looks like a shortcut and is too low: it draws
# the same sample twice, which new draws would not.
#
# ## The experiment: what does a nat buy?
#
# Each method can be turned up: best-of-n by $n$, ReST by $\tau$. Each then gets more reward and moves further from ref. The fair question
# is how much reward at the *same* KL. The yardstick answers what is possible: $\mathrm{ref} \cdot e^{r/\beta}$ maximises
# $\mathbb{E}[r] - \beta\,\mathrm{KL}$, so no policy at all has more reward at its KL. All three laws are known, so there is nothing to
# estimate: two sums over 85 completions, averaged over the two prompts.


# %%
def place(law):
    """(√KL to ref, mean reward) of a law (2, C), averaged over prompts."""
    return math.sqrt(max(0.0, kl(law, ref).mean().item())), (law * rewards).sum(1).mean().item()


def tilt(beta):
    return torch.stack([torch.tensor(closed_form.tilt(ref[x].numpy(), rewards[x].numpy(), beta)) for x in range(2)])


def restricted(threshold):
    kept = ref * (rewards > threshold)
    return kept / kept.sum(1, keepdim=True)


NS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
LEVELS = [level for level in rewards.unique().tolist() if ((rewards > level).any(1)).all()]  # thresholds that leave something
selected = {n: torch.stack([my_best_of_n_law(ref[x], rewards[x], n) for x in range(2)]) for n in NS}
of_tilt = [place(tilt(beta)) for beta in torch.logspace(2, -2.5, 300).tolist()]
of_n = [place(selected[n]) for n in NS]
of_rest = [place(restricted(level)) for level in LEVELS]


def most(root_kl):
    """The most reward that any policy can have at this √KL: that of the tilt there, by bisection in β."""
    low, high = 1e-4, 1e4
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if place(tilt(middle))[0] > root_kl else (low, middle)
    return place(tilt(low))[1]


print("  n    KL     bound   E[r]   most possible at this KL")
for n, (root, reward) in zip(NS, of_n, strict=True):
    print(f"{n:3}   {root**2:.3f}   {bound(n):.3f}   {reward:.3f}   {most(root):.3f}")
    assert root**2 <= bound(n) + 1e-12 and reward <= most(root) + 1e-9
for level, (root, reward) in zip(LEVELS, of_rest, strict=True):
    assert reward <= most(root) + 1e-9
    if (rewards > level).any(1).all():  # its KL is −log of what is accepted
        torch.testing.assert_close(root**2, -(ref * (rewards > level)).sum(1).log().mean().item())

# %% [markdown]
# Then the same with a GPT, from samples. One Grow step draws 6000 completions of each prompt. Best of 4 and best of 16 take their
# winners from it, ReST what is above the quantiles .5, .7, .9 of all rewards. Each trains a copy of ref with `my_nll`.

# %%
DRAWS = 6000
answers = sample(policy, language.prompts, n=DRAWS, max_new=3, eos_id=EOS, seed=0)
drawn = torch.tensor([language.index[tuple(y)] for y in answers.completions]).view(2, DRAWS)  # watch: drawn (2, DRAWS)
drawn_rewards = rewards.gather(1, drawn)
row_of = drawn + torch.tensor([[0], [C]])  # (2, DRAWS) where each stands in `everything`


def train(policy, kept, steps=150, lr=3e-3):
    """SFT in place on the rows `kept` of `everything`, 64 at a time."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, betas=(0.9, 0.99))
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        picked = kept[torch.randint(len(kept), (64,), generator=generator)]
        batch = Batch(everything.inputs[picked], everything.targets[picked], everything.mask[picked])
        loss = my_nll(token_logps(policy, batch), batch.mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return language.law_of(policy)


trained_n = {}
for n in (4, 16):
    best = my_pick(drawn_rewards.view(-1, n))  # (2·DRAWS/n,)
    winners = row_of.view(-1, n).gather(1, best[:, None]).squeeze(1)
    trained_n[n] = place(train(copy.deepcopy(policy), winners))
    print(f"best of {n:2}: {len(winners):4} winners          √KL {trained_n[n][0]:.3f}, E[r] {trained_n[n][1]:.3f};   "
          f"its law {place(selected[n])[0]:.3f}, {place(selected[n])[1]:.3f}")

trained_rest, improved = {}, copy.deepcopy(policy)
for quantile in (0.5, 0.7, 0.9):
    tau = drawn_rewards.quantile(quantile).item()
    kept = row_of.flatten()[my_keep(drawn_rewards.flatten(), tau)]
    trained_rest[tau] = place(train(improved, kept))
    print(f"ReST r > {tau:.1f}: {len(kept):4} of {2 * DRAWS} kept   √KL {trained_rest[tau][0]:.3f}, E[r] {trained_rest[tau][1]:.3f};   "
          f"its law {place(restricted(tau))[0]:.3f}, {place(restricted(tau))[1]:.3f}")
for got, law in [(trained_n[n], selected[n]) for n in (4, 16)] + [(trained_rest[tau], restricted(tau)) for tau in trained_rest]:
    assert abs(got[0] - place(law)[0]) < 0.12 and abs(got[1] - place(law)[1]) < 0.06 and got[1] < most(got[0])

measured = {n: sum(my_expected_max(drawn_rewards[x, :256], n) for x in range(2)) / 2 for n in NS}  # as one has to in practice

# %%
DARK, BLUE, RED, GREY = "#1b2a41", "#2a6f97", "#d1495b", "#8a93a0"
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), dpi=150, width_ratios=[1.25, 1])
x, y = zip(*of_tilt, strict=True)
left.fill_between(x, y, 1.15, color=DARK, alpha=0.06, linewidth=0)
left.plot(x, y, color=DARK, linewidth=1.6)
left.plot(*zip(*of_rest, strict=True), ".-", color=RED, linewidth=1.2, markersize=5)
left.plot(*zip(*of_n, strict=True), "o-", color=BLUE, linewidth=1.6, markersize=5)
left.plot([math.sqrt(bound(n)) for n in NS], [measured[n] for n in NS], "o", color="none", markeredgecolor=BLUE, markersize=9)
left.plot(*zip(*trained_n.values(), strict=True), "D", color="white", markeredgecolor=BLUE, markersize=7, zorder=4)
left.plot(*zip(*trained_rest.values(), strict=True), "D", color="white", markeredgecolor=RED, markersize=7, zorder=4)
for n, (root, reward) in zip(NS, of_n, strict=True):
    if 1 < n <= 64:
        left.text(root + 0.03, reward - 0.035, f"{n}", color=BLUE, ha="left", va="top", fontsize=9)
left.text(0.06, 1.02, "no policy gets here", color=DARK, fontsize=9)
left.annotate(r"ref$\cdot e^{r/\beta}$", (x[150], y[150]), (0.25, 0.62), color=DARK, weight="bold",
              arrowprops=dict(arrowstyle="-", color=DARK, linewidth=0.7))
left.text(1.98, 0.55, "ReST: r > τ", color=RED, weight="bold", ha="right", va="top")
left.text(1.98, 0.45, "best of n", color=BLUE, weight="bold", ha="right", va="top")
left.set(xlabel="√KL(π ‖ ref)", ylabel="mean reward", xlim=(-0.04, 2.25), ylim=(-0.12, 1.1))
left.set_title("What a nat buys", color=DARK, loc="left", fontsize=12)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=DARK)
figure.tight_layout(w_pad=3)
figure_path = Path("runs/tutorials/06_reward.png")  # below the folder you run from
figure_path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(figure_path)
