# %% [markdown]
# # 06 · Rewards: from comparisons to a number, from a number to a policy
#
# **You will hold** the Bradley-Terry loss and the reading of a reward model, best-of-n and ReST, each in a few lines and proved equal to
# the project's; a picture of what a reward buys per nat of KL, and one of a policy that finds the place where its reward is wrong; and
# half a dozen mistakes, most of them silent.
#
# **Minutes:** 60 to read, about 30 seconds of CPU to run. **You need:** tutorial 03 (`log π(y|x)`, `mask`), the loss of tutorial 04, and
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
from minialign.rewards import score, weight_average
from minialign.sample import sample
from toy import closed_form, overoptimization
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
# 3. What happens when the number is wrong somewhere, and the policy is good at finding it?
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
        gradients = [torch.autograd.grad(one, number, retain_graph=True)[0] for one in (mine, theirs)]
        torch.testing.assert_close(*gradients)

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
    """Share of the judges' opinions, among pairs drawn from ref with different rewards, that these scores order rightly; a tie is wrong."""
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
# merge points of this picture, and merging cannot raise a KL. Here it is rising to the bound as completions get finer:


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
# subset of $n$: sort the rewards; the $i$-th smallest is the largest of $\binom{i-1}{n-1}$ of the $\binom{N}{n}$ subsets. For 0, 1, 2, 3
# and $n = 2$: $(1 \cdot 1 + 2 \cdot 2 + 3 \cdot 3)/6 = 2.333$.


# %%
def my_expected_max(rewards, n):
    """The mean, over all subsets of n, of the largest."""
    N, ordered = len(rewards), sorted(rewards.tolist())
    return sum(math.comb(i - 1, n - 1) / math.comb(N, n) * reward for i, reward in enumerate(ordered, start=1))


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

measured = {n: sum(my_expected_max(drawn_rewards[x, :1000], n) for x in range(2)) / 2 for n in NS}  # as one has to in practice

# %%
DARK, BLUE, RED, GREY = "#1b2a41", "#2a6f97", "#d1495b", "#8a93a0"
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), dpi=150, width_ratios=[1.3, 1])
x, y = zip(*of_tilt, strict=True)
left.fill_between([*x, 3], [*y, y[-1]], 1.2, color=DARK, alpha=0.06, linewidth=0)
left.plot(x, y, color=DARK, linewidth=1.6, label=r"$\mathrm{ref} \cdot e^{r/\beta}$, the most that is possible")
left.plot(*zip(*of_n, strict=True), "o-", color=BLUE, linewidth=1.6, markersize=4.5, label="best of n")
left.plot(*zip(*of_rest, strict=True), ".-", color=RED, linewidth=1.2, markersize=5, label="ReST, r > τ")
for trained, color in ((trained_n, BLUE), (trained_rest, RED)):
    left.plot(*zip(*trained.values(), strict=True), "D", color="white", markeredgecolor=color, markersize=7, zorder=4)
left.plot([], [], "D", color="white", markeredgecolor=GREY, markersize=7, label="a GPT trained on 12 000 draws")
left.plot([math.sqrt(bound(n)) for n in NS[1:]], [measured[n] for n in NS[1:]], "o", color="none", markeredgecolor=BLUE, markersize=9,
          label="best of n from 1000 draws and the bound")
left.legend(frameon=False, loc="lower right", fontsize=9, labelcolor=DARK)
for n, (root, reward) in zip(NS, of_n, strict=True):
    if 1 < n <= 64 and n not in trained_n:
        text = f"best of {n}" if n in (2, 64) else f"{n}"
        left.text(root - 0.04, reward + 0.05, text, color=BLUE, ha="right", va="bottom", fontsize=9)
left.text(0.03, 1.05, "no policy gets here", color=DARK, fontsize=9, va="top")
left.set(xlabel="√KL(π ‖ ref)", ylabel="mean reward", xlim=(-0.03, 2.2), ylim=(-0.1, 1.1))
left.set_title("Best-of-n wastes little, a hard threshold more", color=DARK, loc="left", fontsize=12)

many = [2**k for k in range(11)]
passed = (rewards > 0.3).double()
right.plot(many, [bound(n) for n in many], color=DARK, linewidth=1.2, linestyle=(0, (4, 3)))
for numbers, color, text, height in ((rewards, BLUE, "the language's\nreward", 3.4), (passed, RED, "pass or fail", 1.3)):
    costs = [torch.stack([kl(my_best_of_n_law(ref[x], numbers[x], n), ref[x]) for x in range(2)]).mean().item() for n in many]
    limit = -(ref * (numbers == numbers.amax(1, keepdim=True))).sum(1).log().mean().item()
    assert all(cost <= min(bound(n), limit) + 1e-9 for n, cost in zip(many, costs, strict=True))
    right.axhline(limit, color=color, linewidth=0.8, linestyle=(0, (1, 2)))
    right.plot(many, costs, "o-", color=color, linewidth=1.6, markersize=4.5)
    right.text(1024, height, text, color=color, weight="bold", ha="right", va="top")
right.text(140, bound(140) + 0.35, "log n − (n − 1)/n", color=DARK, ha="right")
right.text(1, limit + 0.06, "−log P(pass)", color=RED, fontsize=9)
right.text(1, 3.95, "−log P(the best reward there is)", color=BLUE, fontsize=9)
right.set(xscale="log", xlabel="n", ylabel="KL(π ‖ ref), nats", ylim=(-0.1, 6.1))
right.set_xticks(many[::2], many[::2])
right.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
right.set_title("The bound holds, and forgets about ties", color=DARK, loc="left", fontsize=12)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=DARK)
figure.tight_layout(w_pad=3)
figure_path = Path("runs/tutorials/06_reward.png")  # below the folder you run from
figure_path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(figure_path)
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", figure_path)

# %% [markdown]
# Left: best-of-n stays close to what is possible at all, for every $n$. ReST's threshold lies clearly below: it treats everything above
# $\tau$ alike and forbids everything below, which is dear in KL. (It is cheap in draws: exercise 3.) The axis is $\sqrt{\mathrm{KL}}$
# because near ref the reward rises in proportion to it. The trained GPTs (diamonds) lie where their laws are, a little short of them:
# a net of this size cannot quite make a sharp edge.
#
# The rings are what one has without an enumerable language: `expected_max` of 1000 draws for the reward, the bound for the KL. The
# reward is right up to noise. The KL is too large, and the right panel shows why. The bound grows for ever, but the winner can do no
# better than be in the best level, which costs $-\log P(\text{best level})$. With a reward that only says pass or fail, this is reached
# soon.
#
# ## Break it on purpose, 2: equal rewards
#
# Many rewards are 0 or 1, so ties are the rule. Three ways to stumble over them.
#
# **Python breaks ties for you.** `max(zip(rewards, texts))` compares the texts when the rewards are equal, and the last in the alphabet
# wins. For answers 1 and 2 of equal reward:

# %%
draws = torch.tensor(list(product(range(3), repeat=4)))
careless = torch.tensor([max((tied[y].item(), y) for y in draw)[1] for draw in draws.tolist()])
law = torch.zeros(3).scatter_add(0, careless, three[draws].prod(1))
print("rewards 0, 1, 1:   first drawn", my_best_of_n_law(three, tied, 4).numpy().round(4), "   max of tuples", law.numpy().round(4))
torch.testing.assert_close(law, my_best_of_n_law(three, rising, 4))  # as if answer 2 were better

# %% [markdown]
# **A group of equals has a winner nevertheless.** If all $n$ completions pass, or all fail, the winner is just a draw of ref. Training on
# it is SFT on ref's own text: it teaches nothing, and once the policy has moved it pulls the policy back. The loss does not show it. Watch
# the share of such groups: `frac_reward_zero_std` in every run that draws groups.

# %%
torch.testing.assert_close(my_best_of_n_law(three, torch.ones(3), 4), three)  # all tied: ref
drawn_passed = (drawn_rewards > 0.3).double().view(2, -1, 4)
idle = (drawn_passed.amax(2) == drawn_passed.amin(2)).double().mean().item()
print(f"pass or fail, groups of 4: {100 * idle:.0f} % of the groups are all equal")
assert 0.3 < idle < 0.5

# %% [markdown]
# **A threshold that is also a reward.** One completion in five passes, so the median reward is 0, and the quantile .9 is 1. "At
# least the median" keeps everything. "Above the quantile .9" keeps nothing, and the mean over nothing is NaN: one optimizer step, and all
# weights are NaN. So `keep` is strict, and falls back to the largest rewards.

# %%
pass_or_fail = (drawn_rewards > 0.3).double().flatten()
for quantile in (0.5, 0.9):
    tau = pass_or_fail.quantile(quantile)
    shares = [(pass_or_fail >= tau).double().mean(), (pass_or_fail > tau).double().mean(), my_keep(pass_or_fail, tau).double().mean()]
    print(f"quantile {quantile}: τ = {tau:.0f}   kept by ≥ {shares[0]:.2f}, by > {shares[1]:.2f}, by keep {shares[2]:.2f}")
    torch.testing.assert_close(shares[2], pass_or_fail.mean())
assert (pass_or_fail >= pass_or_fail.quantile(0.5)).all() and not (pass_or_fail > pass_or_fail.quantile(0.9)).any()
assert my_nll(logps[:0], mask[:0]).isnan()

# %% [markdown]
# ## Break it on purpose, 3: one threshold for all prompts
#
# Best-of-n compares completions of one prompt, so a constant added to all rewards of a prompt changes nothing. ReST's threshold is one for
# all prompts. And the constants of a learned reward are arbitrary, as we saw: about −1.5 and 4.4. Take the median of the learned
# rewards as the threshold:

# %%
drawn_learned = learned.gather(1, drawn)  # watch: drawn_learned (2, DRAWS)
centred = drawn_learned - drawn_learned.mean(1, keepdim=True)
kept_shares = {}
for name, numbers in (("the language's reward", drawn_rewards), ("the learned reward", drawn_learned),
                      ("minus each prompt's mean", centred)):
    kept = my_keep(numbers.flatten(), numbers.quantile(0.5)).view(2, -1)
    kept_shares[name] = kept.double().mean(1)
    print(f"{name:26} kept of prompt 0: {kept_shares[name][0]:.2f}, of prompt 1: {kept_shares[name][1]:.2f}")
assert kept_shares["the learned reward"][0] < 0.05 and kept_shares["the learned reward"][1] > 0.95
assert (kept_shares["minus each prompt's mean"] - 0.5).abs().max() < 0.1
assert torch.equal(my_pick(drawn_learned[:, :1000].reshape(-1, 4)), my_pick(centred[:, :1000].reshape(-1, 4)))  # best-of-n does not mind

# %% [markdown]
# All of one prompt is kept and all of the other dropped. The run selects *prompts*, and learns nothing about answers. Real prompts
# differ in difficulty too, so this needs no learned reward to happen. Subtracting each prompt's mean mends it here.
#
# ## From pairs to a policy
#
# Now both halves together: the judges' pairs gave the learned reward, and best-of-n selects by it. What does the language's own reward
# say of the result?

# %%
print("  n   E[r], selected by r   selected by the learned reward")
lost = []
for n in NS[1:]:
    by_learned = torch.stack([my_best_of_n_law(ref[x], learned[x], n) for x in range(2)])
    lost.append(place(selected[n])[1] - place(by_learned)[1])
    print(f"{n:3}   {place(selected[n])[1]:19.3f}   {place(by_learned)[1]:.3f}")
assert 0 <= min(lost) and max(lost) < 0.05 and lost[0] < lost[4]

# %% [markdown]
# Little is lost, and no judge was asked again. More is lost at larger $n$: the harder one selects, the more it matters how the
# model orders the few completions at the top, which were rare among the pairs.

# %% [markdown]
# ## When the reward is wrong in one place
#
# This learned reward was wrong by a little, everywhere. Real ones are also wrong *somewhere*, and always to the same side: judges like
# long answers, a program tests what is easy to test. What happens if one presses on? Gao et al. (2022) put a large reward model, **gold**,
# in the judges' place, fitted small ones, **proxies**, to its choices, and then optimised a proxy while watching gold.
#
# `toy/overoptimization.py` does so where everything can be summed. Its language has six letters, up to four tokens, three prompts, 1555
# completions each. Gold gives .5 for a letter like the prompt's, −.5 for the disliked one, .3 for EOS, and −.7 · repeats². The proxy is
# linear in *how often each token occurs*, counted from the prompt's letter on. Order is hidden from it, and so are repeats.

# %%
setting = overoptimization.Setting()
blind, seeing, gold = setting.blind, setting.seeing, setting.gold  # watch: blind (3, 1555, 7), seeing (3, 1555, 8): one more, repeats²
END, place_of = setting.language.eos_id, setting.language.index
print("answer to prompt 0    how often 0 1 2 3 4 5 EOS   gold")
for y in ((0, 1, 0, END), (0, 0, 1, END), (0, 0, 0, 0)):
    print(f"{' '.join('EOS' if token == END else str(token) for token in y):22}"
          f"{' ' * 10}{' '.join(f'{count:.0f}' for count in blind[0, place_of[y]])}   {gold[0, place_of[y]]:6.1f}")
apart, together = place_of[0, 1, 0, END], place_of[0, 0, 1, END]
assert torch.equal(blind[0, apart], blind[0, together]) and abs(gold[0, apart] - gold[0, together] - 0.7) < 1e-9

# %% [markdown]
# The first two rows are one row to the proxy. Now fit it to 1000 comparisons of ref's own completions, labelled by Bradley-Terry on gold.
# The model is seven weights; a small ridge keeps them finite, and descent takes care of the rest.


# %%
def my_linear_fit(seen, compared, ridge=1.0, steps=1500, lr=1.0):
    """seen (N, C, F), compared (B, 3) of prompt, chosen, rejected -> the weights (F,) of the best linear reward."""
    prompt, chosen, rejected = compared.T
    weights = torch.zeros(seen.shape[-1], requires_grad=True)
    for _ in range(steps):
        loss, _ = reward_model.bradley_terry_loss(seen[prompt, chosen] @ weights, seen[prompt, rejected] @ weights)
        loss = loss + ridge / (2 * len(compared)) * (weights**2).sum()
        (slope,) = torch.autograd.grad(loss, weights)
        weights = (weights - lr * slope).detach().requires_grad_()
    return weights.detach()


def accuracy(numbers, pairs):
    """The loss's own statistic: the share of pairs with the chosen one higher, a tie counting half. numbers (N, C)."""
    prompt, chosen, rejected = pairs.T
    numbers = torch.as_tensor(numbers)
    return reward_model.bradley_terry_loss(numbers[prompt, chosen], numbers[prompt, rejected])[1]["rewards/accuracies"].item()


compared, fresh = setting.compare(1000, seed=0), setting.compare(1000, seed=1)  # watch: compared (1000, 3)
proxies = {}
for name, seen in (("blind", blind), ("seeing", seeing)):
    weights, fitted = my_linear_fit(seen, compared), overoptimization.fit(seen, compared, 1.0)
    torch.testing.assert_close(weights, fitted.weight[0].detach(), atol=1e-5, rtol=0)  # checkpoint: theirs is L-BFGS, to the end
    proxies[name] = overoptimization.scores(fitted, seen)  # (3, 1555)
    print(f"{name:6} weights {weights.numpy().round(2)}")
right = {name: accuracy(numbers, fresh) for name, numbers in {**proxies, "gold": gold}.items()}
print("of 1000 fresh pairs rightly ordered:", ", ".join(f"{name} {100 * share:.1f} %" for name, share in right.items()))
assert 0.6 < right["blind"] < right["gold"] < right["blind"] + 0.06

# %% [markdown]
# Look at the accuracies. Gold itself is right about two pairs of three only, as the judges toss loaded coins. The blind proxy is hardly
# worse: repeats are rare where the pairs come from, and what they cost is partly charged to the letters, .4 where gold pays .5. A test on
# ref's pairs does not warn you.
#
# Now turn it up, by best-of-n and by the tilt $\mathrm{ref} \cdot e^{\text{proxy}/\beta}$, where RL ends. Gao's axis is
# $d = \sqrt{\mathrm{KL}}$. A curve is rows of ($d$, proxy, gold), all exact, means over the prompts.

# %%
D, PROXY, GOLD = overoptimization.D, overoptimization.PROXY, overoptimization.GOLD
THE_REF, MANY = setting.ref, [2**k for k in range(15)]
curve = {name: overoptimization.curves(THE_REF, proxy, gold, MANY) for name, proxy in proxies.items()}
of_blind = curve["blind"]

mine = torch.stack([my_best_of_n_law(*map(torch.tensor, (THE_REF[x], proxies["blind"][x])), 64) for x in range(3)])
mine = [math.sqrt(kl(mine, torch.tensor(THE_REF)).mean()), *((mine.numpy() * of).sum(1).mean() for of in (proxies["blind"], gold))]
torch.testing.assert_close(torch.tensor(mine), torch.tensor(of_blind["best-of-n"][6]))  # checkpoint: a point of the curve, by our own law

print("    n      d   proxy    gold   proxy, gold of the tilt at this d")
for n, best in zip(MANY, of_blind["best-of-n"], strict=True):
    tilted = overoptimization.tilt_like(THE_REF, proxies["blind"], gold, best, D)
    if n in (1, 4, 16, 64, 256, 1024, 16384):
        print(f"{n:5}  {best[D]:5.2f}  {best[PROXY]:6.2f}  {best[GOLD]:6.2f}  {tilted[PROXY]:6.2f}  {tilted[GOLD]:6.2f}")
    assert best[D] ** 2 <= best_of_n.kl_bound(n) + 1e-9 and tilted[PROXY] >= best[PROXY] - 1e-6  # the bound; nobody has more proxy
    assert n < 16 or tilted[GOLD] < best[GOLD]

drops = {name: {method: overoptimization.fall(of[method]) for method in of} for name, of in curve.items()}
for method, of in of_blind.items():
    peak = of[of[:, GOLD].argmax()]
    print(f"{method:9} gold {of[0, GOLD]:.2f} at the start, {peak[GOLD]:.2f} at d = {peak[D]:.2f}, in the end {of[-1, GOLD]:.2f}")
    assert peak[GOLD] > of[0, GOLD] + 0.1 and drops["blind"][method] > 1 and (of[1:, PROXY] > of[:-1, PROXY]).all()

# %% [markdown]
# The proxy rises all the way. Gold rises with it, stands still, and falls far below ref. Watching the reward of the run, you would see
# nothing but success. That is **over-optimisation**.
#
# The tilt has more proxy at every KL, as it must, and *less gold* once it has begun to fall: the better optimiser finds the hole sooner.
# `0 0 0 0` is rare under ref; best of $n$ can hardly pick what does not occur among $n$ draws, but $e^{\text{proxy}/\beta}$ lifts it
# however rare it is.
#
# ### Why a parabola
#
# Let the proxy $x$ be Gaussian under ref, in units of its standard deviation, and gold on average $a x - b x^2$ where the proxy is $x$.
#
# 1. $e^{s x}$ times a Gaussian is a Gaussian again, moved by $s$: the tilt with $\beta = 1/s$ is $N(s, 1)$.
# 2. Its KL is $s^2/2$, so $s = \sqrt{2}\,d$.
# 3. $\mathbb{E}[x] = s$ and $\mathbb{E}[x^2] = 1 + s^2$, so gold gains $a s - b s^2 = d\,(\sqrt{2}\,a - 2b\,d)$.
#
# Up in proportion to $d$, down with its square. Gao et al. fitted this form, $d(\alpha - \beta d)$, to best-of-n, and $d(\alpha - \beta
# \log d)$ to RL. `gao` fits both by least squares and says how much of the variance each explains, $R^2$.

# %%
x, a, b = torch.linspace(-12, 12, 2401), 0.8, 0.3
bell = closed_form.normalise(torch.exp(-(x**2) / 2).numpy())[None]
ideal = overoptimization.curves(bell, x[None].numpy(), (a * x - b * x**2)[None].numpy(), [1])["RL"]
d = ideal[ideal[:, D] < 4, D]  # further out the grid ends
torch.testing.assert_close(torch.tensor(ideal[: len(d), GOLD] + b), torch.tensor(d * (math.sqrt(2) * a - 2 * b * d)))  # ref has −b

explained = {}
for method, of in of_blind.items():
    for form, written in (("best-of-n", "d(α − β·d)    "), ("RL", "d(α − β·log d)")):
        (alpha, down), explained[method, form] = overoptimization.gao(of, form)
        print(f"{method:9} {written}  α = {alpha:.2f}, β = {down:.2f}, R² = {explained[method, form]:.3f}")
assert explained["RL", "best-of-n"] > 0.98 and all(explained[m, "best-of-n"] > explained[m, "RL"] for m in of_blind)

# %% [markdown]
# So the parabola that theory gives to the *tilt* describes the tilt here, better than Gao's logarithm does. For best-of-n it is the
# better of the two as well, but a poor one: the curve stays up for long and then breaks off. Two things to take home. A form that
# fits describes a curve and does not say why. And it depends on ref and on the draw of the comparisons: among the runs of
# `toy/overoptimization.py` there are some where the logarithm fits the tilt better.
#
# ## Break it on purpose, 4: mend it in the wrong place
#
# Is it noise in the labels? Then several proxies should help, each fitted to its own bootstrap sample: their mean, their minimum (the most
# sceptical rules), or one model with averaged weights. Or is it blindness? Then the missing feature should help.

# %%
samples = [overoptimization.bootstrap(compared, seed) for seed in range(5)]
members = [overoptimization.fit(blind, sample, 1.0) for sample in samples]
columns = [overoptimization.scores(member, blind) for member in members]
for how in ("mean", "min"):
    curve[how] = overoptimization.curves(THE_REF, overoptimization.combine(columns, how), gold, MANY)
curve["weights"] = overoptimization.curves(THE_REF, overoptimization.scores(weight_average(members), blind), gold, MANY)
drops = {name: [overoptimization.fall(of[method]) for method in of] for name, of in curve.items()}
for name in ("blind", "mean", "min", "weights", "seeing"):
    print(f"{name:8} gold falls by {drops[name][0]:.2f} (best-of-n), {drops[name][1]:.2f} (tilt)")
assert all(min(drops[name]) > 1 for name in ("blind", "mean", "min", "weights")) and max(drops["seeing"]) < 0.1
assert abs(drops["mean"][1] - drops["weights"][1]) < 1e-3  # for a linear reward these are one and the same

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), dpi=150)
colors = {"best-of-n": BLUE, "RL": RED}
for method, color in colors.items():
    of, name = of_blind[method], "tilt" if method == "RL" else method
    axes[0].plot(of[:, D], of[:, GOLD] - of_blind["best-of-n"][0, GOLD], ".-", color=color, linewidth=1.6, label=f"gold, {name}")
    axes[0].plot(of[:, D], of[:, PROXY] - of_blind["best-of-n"][0, PROXY], "--", color=color, linewidth=1.2, label=f"proxy, {name}")
    axes[1].plot(of[:, D], of[:, GOLD] - of[0, GOLD], ".", color=color, label=f"gold, {name}")
    d = torch.linspace(0.1, of[-1, D], 100).numpy()
    for form, style, written in (("best-of-n", "-", "d(α − βd)"), ("RL", ":", "d(α − β log d)")):
        line = overoptimization.FORMS[form](d) @ overoptimization.gao(of, form)[0]
        axes[1].plot(d, line, style, color=color, linewidth=1.2, label=f"{written}, R² {explained[method, form]:.3f}")
shown = {"blind": ("one blind proxy", DARK, "-"), "mean": ("mean of five, or averaged weights", RED, "-"),
         "min": ("min of five", BLUE, (0, (4, 3))), "seeing": ("one that sees repeats", GREY, "-")}
for name, (text, color, style) in shown.items():
    of = curve[name]["RL"]
    axes[2].plot(of[:, D], of[:, GOLD] - of[0, GOLD], color=color, linestyle=style, linewidth=1.6, label=text)
for ax, title in zip(axes, ("The proxy rises, gold falls", "Gao's two forms", "Gold of the tilt, four proxies"), strict=True):
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(xlabel="d = √KL(π ‖ ref)", ylabel="gained over ref", ylim=(-4.3, 2.3))
    ax.set_title(title, color=DARK, loc="left", fontsize=12)
    ax.legend(frameon=False, loc="lower left", fontsize=8, labelcolor=DARK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=DARK)
figure.tight_layout(w_pad=2)
figure_path = Path("runs/tutorials/06_overoptimization.png")
figure.savefig(figure_path)
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", figure_path)

# %% [markdown]
# Averaging removes what differs between the members. All five are blind to the same thing, so they rise and turn together. (The mean ends
# higher here because its favourite has one repeat less: exercise 4. Over ten draws in the toy, neither mean nor min is reliably better
# than one proxy.) One more feature, and gold rises all the way. An ensemble can help against noise, but not against what no member can
# see. Seeing helps: a reward model that can tell, and comparisons of what the *policy* now writes, where the hole is common. Or stop in
# time (exercise 6).
#
# ## Where to read on
#
# - `minialign/methods/reward_model.py`: the loss, and what is subtracted at the end. `minialign/rewards.py`: `score`, rewards that are
#   programs, and `learned`, which makes a reward of a model.
# - `minialign/methods/best_of_n.py` and `rest.py`: selection, then the SFT above. Several rounds or Grow steps are an option of each.
# - `toy/closed_form.py`: `best_of_n_law`, `rest_law`, `tilt`, the lemma with its proof; `tests/methods/test_reward_model.py`,
#   `test_best_of_n.py`, `test_rest.py`.
# - `toy/overoptimization.py`: the last section over ten draws of the comparisons and other references, with neural reward models, and the
#   claims of the papers judged one by one. `minialign/rewards.py`: `ensemble`, `weight_average`.
# - Gao et al. 2022, arXiv:2210.10760; on ensembles Coste et al. 2023, arXiv:2310.02743, Eisenstein et al. 2023, arXiv:2312.09244, and on
#   averaged weights Ramé et al. 2024, arXiv:2401.12187.
# - Tutorial 07 uses the reward without throwing any completion away.
#
# ## Exercises
#
# **Exercise 1** (★☆☆, 10 minutes). Best of 4, SFT to convergence, then best of 4 from the new policy. What is the law? What does a second
# Grow step of ReST do with the *same* threshold?
#
# **Exercise 2** (★★☆, 10 minutes). Train Bradley-Terry with the best of $n$ as chosen and a plain draw as rejected. Which reward does it
# find? Predict it for a die and the best of 3 rolls, then fit.
#
# **Exercise 3** (★★★, 20 minutes). Let $u$ be spread evenly over $[0, 1]$ and be the reward. Compare best-of-n with a threshold: the
# mean reward at equal KL, and at equal draws per kept completion. Which is better at what? Check with 3000 completions.
#
# **Exercise 4** (★☆☆, 10 minutes). Where does gold end as $\beta \to 0$? Say it from the proxy's scores, without a curve. Then take another
# reference, `overoptimization.Setting(5)`: why does gold fall less there?
#
# **Exercise 5** (★★☆, 15 minutes). Split 100 comparisons into five parts and fit one *blind* proxy to each. Does the minimum of these five
# fall as deep as a single proxy of all 100? As their mean? Why, if all five are blind? Try several draws of the comparisons.
#
# **Exercise 6** (★★☆, 15 minutes). Gold costs money, so it was measured once: on the first draw of the comparisons the tilt's gold peaks at
# some $d$. Stop at this $d$ on five other draws, with the tilt and with best-of-n. What is lost against their own peaks?
#
# ---
#
# ## Solutions
#
# **Solution 1.** $F$ becomes $F^4$, and then $(F^4)^4 = F^{16}$: best of 16, with ties too. $T$ rounds of $n$ are best of $n^T$. The same
# threshold again changes nothing: everything that is drawn now is above it.

# %%
for x in range(2):
    twice = my_best_of_n_law(my_best_of_n_law(ref[x], rewards[x], 4), rewards[x], 4)
    torch.testing.assert_close(twice, my_best_of_n_law(ref[x], rewards[x], 16))
    once = torch.tensor(closed_form.rest_law(ref[x].numpy(), rewards[x].numpy(), 0.3))
    torch.testing.assert_close(torch.tensor(closed_form.rest_law(once.numpy(), rewards[x].numpy(), 0.3)), once)
print("best of 4, twice: best of 16")

# %% [markdown]
# **Solution 2.** By the lemma $\log P/Q$ with $P$ the law of the best and $Q$ that of a draw: about $\log n + (n - 1) \log F(y)$. It is a
# reward made of *ranks*: what the eyes of the die were worth is forgotten, and the gaps at the bottom are the widest.

# %%
Q = torch.full((6,), 1 / 6)
P = my_best_of_n_law(Q, torch.arange(6.0), 3)  # (k³ − (k − 1)³) / 216
found = fit(P[:, None] * Q, steps=20_000)
print("found", (found - found[-1]).numpy().round(3), "  log P/Q", ((P / Q).log() - (P / Q)[-1].log()).numpy().round(3))
torch.testing.assert_close(found - found[-1], (P / Q).log() - (P / Q)[-1].log(), atol=1e-4, rtol=0)

# %% [markdown]
# **Solution 3.** Best-of-n: mean $n/(n+1)$. A threshold $t$: mean $(1+t)/2$, KL $-\log(1-t)$, draws per kept completion $1/(1-t)$. At equal
# KL $1/(1-t) = n\,e^{-(n-1)/n}$. So ReST has less reward at the same KL, but needs only $1/e$ of the draws for large $n$. At equal draws,
# $1/(1-t) = n$, it is the other way round: mean $1 - \frac{1}{2n}$ beats $1 - \frac{1}{n+1}$, and costs $\log n$ nats. Selection by
# threshold is thrifty with draws, best-of-n with KL.

# %%
u = (torch.arange(3000.0) + 0.5) / 3000
even = torch.full((3000,), 1 / 3000)
for n in (4, 16):
    best = my_best_of_n_law(even, u, n)
    per_kept = n * math.exp(-(n - 1) / n)
    same_kl, same_draws = (torch.where(u > 1 - 1 / draws, even, 0) for draws in (per_kept, n))
    same_kl, same_draws = same_kl / same_kl.sum(), same_draws / same_draws.sum()
    for name, law, draws in (("best of n", best, n), ("threshold, same KL", same_kl, per_kept), ("threshold, same draws", same_draws, n)):
        print(f"n = {n:2}   {name:22} {draws:4.1f} draws   KL {kl(law, even):.3f}   mean reward {law @ u:.3f}")
    torch.testing.assert_close((best @ u).item(), n / (n + 1), atol=1e-3, rtol=0)
    torch.testing.assert_close((same_kl @ u).item(), 1 - 1 / (2 * per_kept), atol=1e-3, rtol=0)
    assert abs(kl(best, even) - kl(same_kl, even)) < 2e-3 and same_kl @ u < best @ u < same_draws @ u

# %% [markdown]
# **Solution 4.** The tilt ends on the proxy's favourite, whatever its probability under ref, so gold ends at the favourite's gold. With
# reference 0 the favourite is four letters like the prompt's, three repeats: $4 \cdot .5 - .7 \cdot 9 = -4.3$. With reference 5 the
# comparisons make EOS worth more than a fourth letter. The favourite has two repeats and EOS: $3 \cdot .5 + .3 - .7 \cdot 4 = -1$. So how
# deep gold falls can hang on two weights that are nearly equal.

# %%
for seed in (0, 5):
    other = setting if not seed else overoptimization.Setting(seed)
    proxy = overoptimization.scores(overoptimization.fit(other.blind, other.compare(1000, seed), 1.0), other.blind)
    favourites = proxy.argmax(1)
    end = overoptimization.point(other.ref, overoptimization.tilted(other.ref, proxy, 1e-3), proxy, other.gold)
    print(f"ref {seed}: favourite of prompt 0 {other.language.completions[favourites[0]]}, gold in the end {end[GOLD]:.3f}")
    assert abs(end[GOLD] - other.gold[range(3), favourites].mean()) < 1e-3 and abs(end[GOLD] - (-1.0 if seed else -4.3)) < 1e-3

# %% [markdown]
# **Solution 5.** The minimum falls much less, on most draws. Twenty comparisons leave a lot of noise, so the five disagree, and most about
# answers far from the common ones: a weight that is off by $\epsilon$ moves `0 0 0 0` by $4\epsilon$. The minimum counts disagreement as
# a cost, which holds the policy back where comparisons were few: noise acts as pessimism. The mean does not ask who disagrees. Give the
# members 1000 comparisons, as in the section or in fifths, and they agree on the same error: the fall is back, on most draws. More labels
# and less safety: a lucky side effect, no cure.

# %%
rows = []
for seed in range(6):
    few = overoptimization.compare(setting.language, setting.law, 100, seed)
    parts = few[torch.randperm(100, generator=torch.Generator().manual_seed(seed))].view(5, 20, 3)
    columns = [overoptimization.scores(overoptimization.fit(blind, part, 1.0), blind) for part in (few, *parts)]
    tried = (columns[0], overoptimization.combine(columns[1:], "mean"), overoptimization.combine(columns[1:], "min"))
    rows.append([overoptimization.mean_fall(overoptimization.curves(THE_REF, proxy, gold, MANY[::2])) for proxy in tried])
    print(f"draw {seed}: gold falls by {rows[-1][0]:.2f} (one), {rows[-1][1]:.2f} (mean of five), {rows[-1][2]:.2f} (min of five)")
rows = torch.tensor(rows)
assert rows[:, 2].mean() < rows[:, 0].mean() / 2 and rows[:, 1].mean() > 1

# %% [markdown]
# **Solution 6.** With the tilt almost nothing is lost: the peak's place belongs to what the proxy cannot see, hardly to the draw. With
# best-of-n the same budget stops too early, as it reaches the repeats later and may go further. A KL budget belongs to its method.

# %%
peak_of = {method: of[of[:, GOLD].argmax()] for method, of in of_blind.items()}
budget, lost = peak_of["RL"][D], {"RL": [], "best-of-n": []}
for seed in range(1, 6):
    proxy = overoptimization.scores(overoptimization.fit(blind, setting.compare(1000, seed), 1.0), blind)
    for method, of in overoptimization.curves(THE_REF, proxy, gold, MANY).items():
        at_budget = torch.tensor(of[:, D] <= budget + 1e-9).nonzero().max()  # the last point within it
        lost[method].append(round(float(of[:, GOLD].max() - of[at_budget, GOLD]), 3))
print(f"budget d = {budget:.2f}; gold lost with the tilt {lost['RL']}, with best-of-n {lost['best-of-n']}")
assert max(lost["RL"]) < 0.1 < min(lost["best-of-n"])
