# %% [markdown]
# # 09c · SLiC-HF, SimPO, ORPO and KTO: without a reference, or without pairs
#
# **You will build** the losses of four methods that need less than DPO, and train a small GPT with each.
#
# **Time:** 25 minutes of reading, 50 seconds of computer.
#
# **You need:** [09, DPO](09_dpo.ipynb): the margin Δ, the three completions, and why both log-probs fall.
# [09b](09b_siblings.ipynb) is not needed.
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

import numpy as np
import torch
from torch.nn.functional import softplus

from minialign.methods import kto, orpo, simpo, slic
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import dpo as figures
from tutorials.three_completions import PairLogps, land, lengths, prefer, r, ref, row
from tutorials.word_requests import changes_of, judged_pairs, rude_gpt, show_samples, train_on_pairs

torch.set_default_dtype(torch.float64)  # so that "equal" can mean ten digits

# %% [markdown]
# ## The question
#
# DPO needs a [reference](../GLOSSARY.md#reference), a second model to run. It needs [SFT](../GLOSSARY.md#sft) before
# it. And it needs two answers to the same prompt. Four methods do without some of these:
#
# | what DPO needs | what is done instead | method |
# | --- | --- | --- |
# | a reference | a margin at which pushing stops, and some SFT | SLiC-HF (Zhao et al. 2023) |
# | a reference | log-probs per token, and a margin that each pair should reach | SimPO (Meng et al. 2024) |
# | a reference, and SFT before it | SFT and preferences in one loss | ORPO (Hong et al. 2024) |
# | pairs | single answers with a thumb up or down | KTO (Ethayarajh et al. 2024) |
#
# As in 09, $y^+$ is the chosen answer and $y^-$ the rejected one. We write $\bar a(y)$ for the average
# [log-prob](../GLOSSARY.md#log-prob) per token, $\log\pi(y)$ divided by the number of tokens $|y|$. You choose $m$, the
# margin that a pair should reach, and α, the weight of one term: of SFT in SLiC-HF, of the preferences in ORPO.
#
# Your losses take a `PairLogps`: log-probs and lengths of the answers of B pairs. Here are 16 pairs to check them with.

# %%
generator = torch.Generator().manual_seed(0)
logps = -9 * torch.rand(4, 16, generator=generator)  # log π of chosen, rejected; log ref of both
logps.requires_grad_()
sizes = torch.randint(1, 9, (2, 16), generator=generator).double()
pairs = PairLogps(*logps, *sizes)
averages = pairs.chosen / pairs.n_chosen, pairs.rejected / pairs.n_rejected  # two of (16,)


def same(mine, theirs, name):
    """Compare your loss (B,) and its gradient with what minialign returns, (mean loss, metrics)."""
    equal(mine.mean(), theirs[0], f"Your loss equals minialign's {name}.")
    slopes = [torch.autograd.grad(x, logps, retain_graph=True) for x in (mine.mean(), theirs[0])]
    equal(*slopes, f"The gradient of your loss equals that of minialign's {name}.")
    print(f"equal to minialign's {name}, value and gradient")


# %% [markdown]
# ## 1 · SLiC-HF: enough is enough
#
# DPO pushes every pair, though less and less. SLiC-HF stops comparing a pair once the chosen answer is likelier by $m$
# nats. This is a *hinge*: a loss that falls in a straight line and is 0 from $m$ on. A little SFT should keep the
# policy a language model. We do it on the chosen answers:
#
# $$L = \mathbb{E}\big[\max(0,\ m - \log\pi(y^+) + \log\pi(y^-)) - \alpha\log\pi(y^+)\big] .$$
#
# By hand, with log-probs −3 and −4, m = 2, α = 0.1: the chosen answer is likelier by 1 nat, so 1 is missing. The hinge
# is 1, the SFT term 0.3, the loss 1.3.

# %%
def my_slic(pairs, m, alpha):
    """pairs: a PairLogps of B pairs -> (B,)."""
    hinge = (m - pairs.chosen + pairs.rejected).clamp(min=0)  # watch: hinge (B,)
    return hinge - alpha * pairs.chosen


# %% [markdown]
# ### Checkpoint
#
# (minialign's third argument is the log-prob for the SFT term.)

# %%
theirs = slic.slic_loss(pairs.chosen, pairs.rejected, pairs.chosen, delta=1.0, weight=0.1)
same(my_slic(pairs, 1.0, 0.1), theirs, "slic_loss")

# %% [markdown]
# ## 2 · SimPO: per token
#
# Longer answers usually have lower log-probs. SimPO compares averages per token, times a scale $s$. Unlike SLiC-HF's
# hinge, it never quite stops pushing:
#
# $$L = \mathbb{E}\,\log\big(1 + e^{\,m - s\,(\bar a(y^+) - \bar a(y^-))}\big) .$$
#
# By hand: answers of 2 and 4 tokens with the log-prob −1 per token have the sums −2 and −4, but the same average. With
# m = 0 the loss is log 2.

# %%
def my_simpo(pairs, s, m):
    """pairs: a PairLogps of B pairs -> (B,).  log(1 + e^x) is softplus(x)."""
    chosen = pairs.chosen / pairs.n_chosen  # watch: chosen (B,)
    rejected = pairs.rejected / pairs.n_rejected
    return softplus(m - s * (chosen - rejected))


# %% [markdown]
# ### Checkpoint

# %%
theirs = simpo.simpo_loss(*averages, scale=2.0, target_margin=1.0)
same(my_simpo(pairs, 2.0, 1.0), theirs, "simpo_loss")

# %% [markdown]
# ## 3 · ORPO: SFT and preferences at once
#
# ORPO trains a base model with one loss: SFT on the chosen answers, plus a term that compares *odds*. $P = e^{\bar a}$
# is the (geometric) mean probability of a token of the answer. Its odds are $P/(1 - P)$:
#
# $$L = \mathbb{E}\Big[-\bar a(y^+) - \alpha\log\sigma\Big(\log\tfrac{P^+}{1-P^+} - \log\tfrac{P^-}{1-P^-}\Big)\Big] .$$
#
# By hand: $P^+ = 0.9$ has the odds 9, $P^- = 0.5$ the odds 1. Since $\sigma(\log o) = o/(1 + o)$, σ(log 9 − log 1) is
# 0.9, and the second term is −α log 0.9 = 0.105 α.

# %%
def my_orpo(pairs, alpha):
    """pairs: a PairLogps of B pairs -> (B,).

    The log of the odds is a − log(1 − e^a). Write log(1 − e^a) as (−torch.expm1(a)).log(), which
    does not lose digits, and −log σ(x) as softplus(−x).
    """
    chosen = pairs.chosen / pairs.n_chosen
    rejected = pairs.rejected / pairs.n_rejected
    odds_chosen = chosen - (-torch.expm1(chosen)).log()  # watch: odds_chosen (B,)
    odds_rejected = rejected - (-torch.expm1(rejected)).log()
    return -chosen + alpha * softplus(odds_rejected - odds_chosen)


# %% [markdown]
# ### Checkpoint

# %%
same(my_orpo(pairs, 0.25), orpo.orpo_loss(*averages, weight=0.25), "orpo_loss")

# %% [markdown]
# ## 4 · KTO: thumbs instead of pairs
#
# Users rarely compare two answers. KTO takes single answers, each marked good or bad. It has a reference:
#
# $$L = \mathbb{E}\Big[1 - \sigma\big(\pm\beta\,\big(\log\tfrac{\pi(y)}{\mathrm{ref}(y)} - z_0\big)\big)\Big],$$
#
# with + for a good answer and − for a bad one. A good answer should have a log-ratio above a reference point $z_0$, a
# bad one below it. σ is steepest at 0, so answers far from $z_0$ count little. By hand, with β = 1 and a log-ratio of
# $z_0 + \log 3$: σ is ¾, so a good answer costs ¼, and a bad one ¾.

# %%
def my_kto(logps, ref_logps, good, z0, beta):
    """logps, ref_logps (B,): sums of log-probs; good (B,): True for a thumb up -> (B,)."""
    sign = torch.where(good, 1.0, -1.0)  # watch: sign (B,)
    return 1 - (sign * beta * (logps - ref_logps - z0)).sigmoid()


# %% [markdown]
# ### Checkpoint

# %%
thumbs = torch.arange(16) % 3 > 0
theirs = kto.kto_loss(pairs.chosen, pairs.ref_chosen, thumbs, 0.2, beta=0.5)
same(my_kto(pairs.chosen, pairs.ref_chosen, thumbs, 0.2, 0.5), theirs, "kto_loss")

# %% [markdown]
# ### What is $z_0$?
#
# The data's log-ratios may all drift up together. $z_0$ says how far. In theory it is KL(π‖ref), the mean log-ratio of
# the policy's own answers, but sampling those is expensive. So in each batch a neighbouring row's answer is put after
# the prompt: mostly one that was not asked for, which shows the drift. $z_0$, without gradient, is their mean
# log-ratio, at least 0 (`reference_point` in word_requests.py).
#
# ## 5 · Where they end, on three completions
#
# The toy is that of 09: "tea!", "tea, please" and "could i have tea", of 1, 2 and 4 words, which ref says with .6, .3,
# .1. The judge follows [Bradley-Terry](../GLOSSARY.md#bradley-terry) with $e^r = 1, 2, 4$. DPO at β = ½ ends at $\pi^*
# = (3, 6, 8)/17$. Where do the others end (ORPO, α = 0: exercise 1)? `land` looks for the three probabilities with the
# smallest expected loss.

# %%
BETA = 0.5


def shares(mu):
    """The share of each answer (3,) among the chosen, and among the rejected, if mu (3,) writes."""
    drawn = mu[:, None] * mu * prefer  # watch: drawn (3, 3): [a, b], a chosen over b
    return drawn.sum(1) / drawn.sum(), drawn.sum(0) / drawn.sum()


w_chosen, w_rejected = shares(ref)
print("π*, where DPO ends     ", row((ref.log() + r / BETA).softmax(0)))
print("shares of the chosen   ", row(w_chosen))
print("shares of the rejected ", row(w_rejected))

# %% [markdown]
# ### SLiC-HF mixes SFT with the preferences
#
# Take $m$ so large that no pair reaches it. Then the hinge is a straight line. Write $w^+$ and $w^-$ for the two shares
# of an answer: the mean of $\log\pi(y^+)$ is $\sum_y w^+\log\pi(y)$, and of $\log\pi(y^-)$ likewise. So the mean loss
# is
#
# $$m - \sum_y q(y)\log\pi(y), \qquad q(y) = (1 + \alpha)\,w^+ - w^- .$$
#
# 1. Shares sum to 1, so the weights $q$ sum to α.
# 2. SFT on weighted answers ends at the weights divided by their sum (04).
# 3. So SLiC-HF ends at $\pi(y) = q(y)/\alpha = w^+ + (w^+ - w^-)/\alpha$.
#
# SFT would end at $w^+$. By hand, for the first answer and α = 2: .504 + (.504 − .696)/2 = .408. (Below α = .38 its $q$
# is negative, and its probability falls until pairs reach $m$.)

# %%
found = land(lambda pairs: my_slic(pairs, m=10.0, alpha=2.0))
predicted = w_chosen + (w_chosen - w_rejected) / 2
print("SLiC-HF, predicted", row(predicted))
print("SLiC-HF, found    ", row(found))
there = torch.allclose(found, predicted, atol=1e-4, rtol=0)
this_run(there, "SLiC-HF ends where the formula says.")

# %% [markdown]
# ### SimPO: the length does not cancel
#
# With $m = 0$, SimPO is the loss of a reward model (06). Its reward is $s\,\bar a(y)$. A reward model ends at the
# judge's reward plus a constant, which we write $-k$:
#
# $$s\,\bar a(y) = r(y) - k, \qquad\text{so}\qquad \log\pi(y) = -|y|\,\big(k - r(y)\big)/s .$$
#
# Log-probs are negative, so $k$ exceeds every reward; that probabilities sum to 1 fixes $k$. So each word costs $(k -
# r)/s$ nats: few if the reward is high. `simpo_law` searches for $k$.

# %%
found = land(lambda pairs: my_simpo(pairs, s=BETA, m=0.0))
print("SimPO, found             ", row(found))
for words in ([1, 2, 4], [1, 1, 1], [4, 2, 1]):
    law = torch.as_tensor(closed_form.simpo_law(np.array(words), r.numpy(), BETA))
    per_word = -law.log() / torch.tensor(words)
    print(f"closed form, words {words}", row(law), " a word costs", row(per_word))
    if words == lengths.tolist():
        there = torch.allclose(found, law, atol=1e-4, rtol=0)
        this_run(there, "SimPO ends where the formula says.")

# %% [markdown]
# The judge's favourite gets .88; in π\* it has .47. Most comes from having no ref: with one word each it gets .76. The
# lengths do the rest. Its own four words cost almost nothing, but the second answer pays its price twice, and falls
# from .19 to .06. With the lengths reversed, the favourite would get .94.
#
# ### KTO goes on for ever
#
# ref writes the answers. The chosen ones get a thumb up and the rejected ones a thumb down. So the first answer has
# .504 of the likes and .696 of the dislikes. Here is what it costs at smaller and smaller log-ratios, with $z_0 = 0$.
# (Neighbours' answers come from ref too. So their mean log-ratio is $-\mathrm{KL}(\mathrm{ref}\|\pi) \le 0$, and $z_0$
# is 0.)

# %%
UP, DOWN = torch.tensor([True]), torch.tensor([False])
for x in (0.0, -2.0, -4.0, -8.0, -16.0):
    log_ratio = torch.tensor([x])
    like = my_kto(log_ratio, torch.zeros(1), UP, 0.0, BETA).item()
    dislike = my_kto(log_ratio, torch.zeros(1), DOWN, 0.0, BETA).item()
    cost = w_chosen[0] * like + w_rejected[0] * dislike
    print(f"log-ratio {x:5.1f}: like {like:.3f}, dislike {dislike:.3f}, together {cost:.3f}")

# %% [markdown]
# It gets cheaper all the way: there is no minimum. Now gradient descent, with all three.

# %%
def kto_descent(mu, steps):
    """The policies after the given numbers of steps, if answers come from mu (3,)."""
    likes, dislikes = shares(mu)
    print("likes minus dislikes:", row(likes - dislikes))
    logits = ref.log()
    found = {}
    for k in range(1, max(steps) + 1):
        logits.requires_grad_()
        now = logits.log_softmax(0)
        loss = likes @ my_kto(now, ref.log(), UP, 0.0, BETA)
        loss = loss + dislikes @ my_kto(now, ref.log(), DOWN, 0.0, BETA)
        logits = (logits - 2.5 * torch.autograd.grad(loss, logits)[0]).detach()
        if k in steps:
            found[k] = logits.softmax(0)
            print(f"after {k:5} steps: {row(found[k], 5)}")
    return found


kto_at = kto_descent(ref, (100, 1000, 5000))
this_run(kto_at[5000][0] < 0.3 * kto_at[1000][0], "KTO goes on driving the first answer out.")

# %% [markdown]
# The first answer goes to 0, ever more slowly, because σ becomes flat. KTO asks of an answer whether it is liked more
# than disliked. The judge's favourite gets less than the second: its surplus of likes is smaller, and as it is further
# above ref, the flatter σ pushes it less.
#
# ## 6 · The same GPT, the same pairs
#
# **This is no ranking.** Every method has the same learning rate and number of steps, untuned. The table
# shows *what each does* to chosen answers, rejected answers, and the language.
#
# Base model and requests are those of 09. `train_on_pairs` trains a copy of the base model on any loss of pairs, for 50
# steps of Adam. We do it three times, each with its own base model and 1000 pairs, as one run may be luck. KTO takes
# chosen answers as good and rejected ones as bad. (ORPO is meant for a model before SFT, which is not tested here.)

# %%
def kto_of(pairs):
    both = torch.cat([pairs.chosen, pairs.rejected])
    ref_both = torch.cat([pairs.ref_chosen, pairs.ref_rejected])
    good = torch.arange(len(both)) < len(pairs.chosen)
    return my_kto(both, ref_both, good, pairs.z0, beta=1.0)


def dpo_of(pairs):
    delta = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
    return softplus(-delta)


LOSSES = {
    "DPO, β = 1": dpo_of,
    "KTO, β = 1": kto_of,
    "SLiC-HF, m = 1, α = .1": lambda pairs: my_slic(pairs, m=1.0, alpha=0.1),
    "SimPO, s = 2, m = 1": lambda pairs: my_simpo(pairs, s=2.0, m=1.0),
    "ORPO, α = .1": lambda pairs: my_orpo(pairs, alpha=0.1),
}

# %% [markdown]
# The reward averages the well-formed answers only. Look at the two changes of log π (of chosen and of rejected answers,
# means of three runs), then at each run's well-formed share.

# %%
BASES, DATA = [], []
for seed in range(3):
    generator.manual_seed(seed)
    DATA.append(judged_pairs(1000, generator))  # (3, 1000): prompt, chosen, rejected
    BASES.append(rude_gpt(generator))


def report(name, loss_of):
    """Train on each data set, print one line; return the first policy, changes, shares (3,)."""
    policies = BASES
    if loss_of:
        runs = zip(BASES, DATA, strict=True)
        policies = [train_on_pairs(base, pairs, loss_of) for base, pairs in runs]
    found = torch.tensor([changes_of(*run) for run in zip(policies, BASES, DATA, strict=True)])
    up, down, reward, _ = found.mean(0).tolist()
    formed = found[:, 3]
    print(
        f"{name:23} change of log π: {up:5.2f}, {down:5.2f}   reward {reward:4.2f}   "
        f"well-formed {row(formed, 2)}"
    )
    return policies[0], (up, down), formed


report("before training", None)
results = {name: report(name, loss_of) for name, loss_of in LOSSES.items()}
figures.changes({name.split(",")[0]: changes for name, (_, changes, _) in results.items()})

# %%
for name in ("SimPO, s = 2, m = 1", "ORPO, α = .1"):
    print(name)
    show_samples(results[name][0])

# %% [markdown]
# - **DPO** lowers mainly the rejected answers, and keeps 94 to 95 % well-formed.
# - **KTO** moves both much further than DPO does. It keeps 63 to 79 %.
# - **SLiC-HF** keeps 75 to 96 %.
# - **SimPO** loses much language: it keeps 9, 78 and 26 %. (The samples are those of the first.) Perhaps (we did not
#   test it) because its m asks for m/s = ½ nat per token, 3.5 for 7 tokens. SLiC-HF's asks for 1.
# - **ORPO** is mostly SFT at this α. It alone raises the chosen answers, and gains the least reward.
#
# ## 7 · Break it: take the SFT term away
#
# SLiC-HF has no reference, yet it kept most of the language. Is it the SFT term? We train it without, and SimPO with
# one.

# %%
def simpo_with_sft(pairs):
    return my_simpo(pairs, s=2.0, m=1.0) - 0.1 * pairs.chosen


def slic_without_sft(pairs):
    return my_slic(pairs, m=1.0, alpha=0.0)


_, _, without = report("SLiC-HF, α = 0", slic_without_sft)
_, _, with_term = report("SimPO with SFT", simpo_with_sft)
alone = results["SimPO, s = 2, m = 1"][2]
this_run((with_term > alone).all(), "With an SFT term SimPO keeps more language, each time.")
this_run(without.mean() > alone.mean(), "SLiC-HF without SFT keeps more language than SimPO.")

# %% [markdown]
# Without its SFT term SLiC-HF keeps about as much: more in one run, less in two. Here it was not needed; perhaps the
# hinge is enough. SimPO keeps far more with an SFT term, and gains less reward. (An α of 0.1 weighs more for SimPO: it
# pushes log π(y) with at most $s/|y| \approx 0.3$, SLiC-HF with 1.)
#
# ## What is wrong here? (1)

# %%
# two answers, of 1 and of 4 tokens; padding is 0
token_logps = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
per_token = token_logps.mean(1)
print("average log-probs for SimPO:", row(per_token))

# %% [markdown]
# In both answers each token has log-prob −1. What will SimPO learn from these averages?
#
# ## What is wrong here? (2)

# %%
# two answers, of 2 and of 8 tokens with log-prob −1 each, to a prompt of 10 tokens with −3 each
answer_logps, tokens = torch.tensor([-2.0, -8.0]), torch.tensor([2.0, 8.0])
scored = answer_logps - 30.0  # the mask also counts the prompt
print("DPO's difference:  ", (scored[0] - scored[1]).item(), " as it should be")
print("SimPO's averages:  ", row(scored / (tokens + 10)))

# %% [markdown]
# The code was tested with DPO and used with SimPO. What went wrong, and why did DPO not show it?
#
# ## What you now know
#
# - SLiC-HF, SimPO and ORPO need no reference. SLiC-HF and ORPO have an SFT term. SimPO has none. Its and
#   ORPO's ends depend on lengths.
# - In each run SimPO without an SFT term lost more language than SLiC-HF without one.
# - KTO learns from single answers. It asks which are liked more than disliked, and in the toy it never stops driving
#   out the others.
# - SimPO and ORPO divide by the number of tokens. So they need a mask without padding and without the prompt.
#
# Next: [11](11_storyteller.ipynb), where you align a model with a reward of your own. Or, for large models,
# [10](10_kernels.ipynb), kernels; 11 does not need it.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes). ORPO with α = 0 is SFT on the chosen answers, averaged over tokens. Does it end at
# the shares of the chosen answers? Predict, then use `land`.
#
# **Exercise 2** (medium, try this, 10 minutes). Write all three equally often: `kto_descent(torch.ones(3) / 3, (10,
# 100, 5000))`, with $z_0$ held at 0. Predict which answers KTO drives out. What about the second, which is liked as
# often as disliked?
#
# **Exercise 3** (hard, 20 minutes). The judge chooses $y_1$ over $y_2$ with probability $p$. For SimPO, which $u =
# s\,(\bar a(y_1) - \bar a(y_2))$ is best? Show that it is $\log\frac{p}{1-p}$ for $m = 0$, and near $m +
# \log\frac{2p-1}{1-p}$ for large $m$ and $p > \frac12$.
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# The mean runs over the padding as well: every answer is divided by 4, the longest length in the batch. So SimPO
# compares sums again, at a scale that changes with the batch. Divide by each answer's own number of tokens, as
# `minialign.logps.mean_logps` does.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
right = token_logps.sum(1) / torch.tensor([1.0, 4.0])
print("right:", row(right))
equal(right, torch.tensor([-1.0, -1.0]), "Both answers have −1 nat per token.")

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The mask counts the prompt's tokens. In DPO's difference the prompt cancels, because both answers have the same one.
# SimPO divides by the length first. The prompt's −30 then counts more in the shorter answer, which seems worse although
# all tokens of both answers are equally likely. So test the masks themselves, as in [03](03_logps.ipynb).
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
print("right:", row(answer_logps / tokens))
equal(answer_logps / tokens, torch.tensor([-1.0, -1.0]), "Both have −1 nat per token.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# No. Each answer's loss is divided by its length, so an answer of 4 words counts a quarter. ORPO with α = 0 ends at the
# shares of the chosen answers, each divided by its length, and scaled to sum 1.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
end = land(lambda pairs: my_orpo(pairs, alpha=0.0))
print("chosen shares", row(w_chosen), " ORPO, α = 0, ends at", row(end))
law = w_chosen / lengths / (w_chosen / lengths).sum()
equal(end, law, "ORPO with α = 0 ends at winners / length.", atol=1e-4, rtol=0)

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The third answer, liked most, takes all the probability. The first goes to 0 quickly. The second is liked as often as
# disliked, so nothing pushes it directly. It rises at first, as the first one gives probability away. Then it falls,
# because probabilities sum to 1.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
alike = kto_descent(torch.ones(3) / 3, (10, 100, 5000))
this_run(alike[10][1] > ref[1] > alike[100][1] > alike[5000][1], "The second rises, then falls.")
this_run(alike[5000][2] > alike[100][2] > alike[10][2], "The third answer gains all the time.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# The expected loss is $p\log(1 + e^{m-u}) + (1-p)\log(1 + e^{m+u})$. Set its slope to 0, with $x = e^u$ and
# $a = e^m$: $p\frac{a}{a+x} = (1-p)\frac{ax}{1+ax}$, that is $(1-p)x^2 - (2p-1)\,a\,x - p = 0$, so
#
# $$x = \frac{(2p-1)\,a + \sqrt{(2p-1)^2a^2 + 4p(1-p)}}{2(1-p)} .$$
#
# At $a = 1$ the root is $\sqrt1$ and $x = \frac{p}{1-p}$. For large $a$ the second term under the root does not
# count.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for p in (0.6, 0.8):
    for margin in (0.0, 1.0, 4.0):
        a = math.exp(margin)
        root = math.sqrt((2 * p - 1) ** 2 * a**2 + 4 * p * (1 - p))
        best_u = math.log(((2 * p - 1) * a + root) / (2 * (1 - p)))
        u = torch.tensor(best_u, requires_grad=True)
        loss = p * softplus(margin - u) + (1 - p) * softplus(margin + u)
        always(abs(torch.autograd.grad(loss, u)[0]) < 1e-12, "The slope at the best u is 0.")
        print(
            f"p = {p}, m = {margin:.0f}: u = {best_u:.3f}; "
            f"log(p/(1 − p)) = {math.log(p / (1 - p)):.3f}, "
            f"m + log((2p − 1)/(1 − p)) = {margin + math.log((2 * p - 1) / (1 - p)):.3f}"
        )
