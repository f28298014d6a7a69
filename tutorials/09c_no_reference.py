# %% [markdown]
# # 09c · SLiC-HF, SimPO, ORPO and KTO: without a reference, or without pairs
#
# **You will build** the losses of four methods that need less than DPO, and train a small GPT with each.
#
# **Time:** 25 minutes of reading, 40 seconds of computer.
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

import copy
import math

import torch
from torch.nn.functional import softplus

from minialign.batch import collate
from minialign.logps import seq_logps
from minialign.methods import kto, orpo, simpo, slic
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import dpo as figures
from tutorials.three_completions import PairLogps, land, lengths, prefer, r, ref
from tutorials.word_requests import (
    all_logps,
    answers_ids,
    judged_pairs,
    prompts_ids,
    rewards,
    rows_of,
    rude_gpt,
    show_samples,
)

torch.set_default_dtype(torch.float64)  # so that "equal" can mean ten digits


def row(numbers, digits=3):
    return (
        "[" + " ".join(f"{number:.{digits}f}" for number in torch.as_tensor(numbers).tolist()) + "]"
    )


# %% [markdown]
# ## The question
#
# DPO needs a [reference](../GLOSSARY.md#reference), which is a second model in memory. It needs [SFT](../GLOSSARY.md#sft)
# before it. And it needs two answers to the same prompt. Four methods do without one of these. What takes its place?
#
# | what DPO needs | what is done instead | method |
# | --- | --- | --- |
# | a reference | a margin at which pushing stops, and some SFT | SLiC-HF (Zhao et al. 2023) |
# | a reference | log-probs per token, and a margin that each pair should reach | SimPO (Meng et al. 2024) |
# | a reference, and SFT before it | SFT and preferences in one loss | ORPO (Hong et al. 2024) |
# | pairs | single answers with a thumb up or down | KTO (Ethayarajh et al. 2024) |
#
# As in 09, $y^+$ is the chosen answer and $y^-$ the rejected one. We write $\bar a(y)$ for the average
# [log-prob](../GLOSSARY.md#log-prob) per token, $\log\pi(y)$ divided by the number of tokens $|y|$. $m$ is a margin,
# and α is the weight of one term of a loss. (The papers have other letters.)

# %%
generator = torch.Generator().manual_seed(0)
logps = -4 * torch.rand(2, 16, generator=generator)  # of chosen and of rejected answers
logps.requires_grad_()


def same(mine, theirs, name):
    """Compare your loss (B,) and its gradient with what minialign returns, (mean loss, metrics)."""
    equal(mine.mean(), theirs[0], f"Your loss equals minialign's {name}.")
    slopes = torch.autograd.grad(mine.mean(), logps), torch.autograd.grad(theirs[0], logps)
    equal(*slopes, f"The gradient of your loss equals that of minialign's {name}.")
    print(f"equal to minialign's {name}, value and gradient")


# %% [markdown]
# ## 1 · SLiC-HF: enough is enough
#
# DPO pushes every pair, though less and less. SLiC-HF stops at a pair once the chosen answer is likelier by $m$ nats.
# This is a *hinge*: a loss that falls in a straight line and is 0 from $m$ on. A little SFT on the chosen answers keeps
# the policy a language model:
#
# $$L = \mathbb{E}\big[\max(0,\ m - \log\pi(y^+) + \log\pi(y^-)) - \alpha\log\pi(y^+)\big] .$$
#
# By hand, with log-probs −3 and −4, m = 2, α = 0.1: the chosen answer is likelier by 1 nat, so 1 is missing. The hinge is
# 1, the SFT term 0.3, the loss 1.3.

# %%
def my_slic(chosen, rejected, margin, weight):
    """chosen, rejected (B,): sums of log-probs; margin is m, weight is α -> (B,)."""
    hinge = (margin - chosen + rejected).clamp(min=0)  # watch: hinge (B,)
    return hinge - weight * chosen


# %% [markdown]
# ### Checkpoint

# %%
slic_theirs = slic.slic_loss(*logps, logps[0], delta=1.0, weight=0.1)
same(my_slic(*logps, 1.0, 0.1), slic_theirs, "slic_loss")

# %% [markdown]
# ## 2 · SimPO: per token
#
# A sum of log-probs is lower for a longer answer. SimPO compares averages per token instead, times a scale $s$, so that
# the length of an answer counts less. $m$ is the margin that a pair should have:
#
# $$L = \mathbb{E}\,\log\big(1 + e^{\,m - s\,(\bar a(y^+) - \bar a(y^-))}\big) .$$
#
# By hand: answers of 2 and 4 tokens with the log-prob −1 per token have the sums −2 and −4, but the same average. With
# m = 0 the loss is log 2.

# %%
def my_simpo(mean_chosen, mean_rejected, scale, margin):
    """mean_chosen, mean_rejected (B,): averages per token; margin is m -> (B,).

    log(1 + e^x) is softplus(x).
    """
    x = margin - scale * (mean_chosen - mean_rejected)  # watch: x (B,)
    return softplus(x)


# %% [markdown]
# ### Checkpoint

# %%
simpo_theirs = simpo.simpo_loss(*logps, scale=2.0, target_margin=1.0)
same(my_simpo(*logps, 2.0, 1.0), simpo_theirs, "simpo_loss")

# %% [markdown]
# ## 3 · ORPO: SFT and preferences at once
#
# ORPO trains a base model with one loss: SFT on the chosen answers, plus a term that compares *odds*. $P = e^{\bar a}$
# is the (geometric) mean probability of a token of the answer. Its odds are $P/(1 - P)$:
#
# $$L = \mathbb{E}\Big[-\bar a(y^+) - \alpha\log\sigma\Big(\log\tfrac{P^+}{1-P^+} - \log\tfrac{P^-}{1-P^-}\Big)\Big] .$$
#
# By hand: $P^+ = 0.9$ has the odds 9, $P^- = 0.5$ the odds 1. σ(log 9 − log 1) = 0.9, so the second term is 0.105 α.

# %%
def my_orpo(mean_chosen, mean_rejected, weight):
    """mean_chosen, mean_rejected (B,): averages per token, below 0; weight is α -> (B,).

    The log of the odds is a − log(1 − e^a). Write log(1 − e^a) as (−torch.expm1(a)).log(), which
    does not lose digits, and −log σ(x) as softplus(−x).
    """
    odds_chosen = mean_chosen - (-torch.expm1(mean_chosen)).log()  # watch: odds_chosen (B,)
    odds_rejected = mean_rejected - (-torch.expm1(mean_rejected)).log()
    return -mean_chosen + weight * softplus(odds_rejected - odds_chosen)


# %% [markdown]
# ### Checkpoint

# %%
same(my_orpo(*logps, 0.25), orpo.orpo_loss(*logps, weight=0.25), "orpo_loss")

# %% [markdown]
# ## 4 · KTO: thumbs instead of pairs
#
# Users rarely compare two answers. KTO takes single answers, each marked good or bad. It has a reference:
#
# $$L = \mathbb{E}\Big[1 - \sigma\big(\pm\beta\,\big(\log\tfrac{\pi(y)}{\mathrm{ref}(y)} - z_0\big)\big)\Big],$$
#
# with + for a good answer and − for a bad one. A good answer should have a log-ratio above the reference point $z_0$,
# a bad one below it. σ is steepest at 0, so answers far from $z_0$ count little. By hand: at log-ratio $z_0$ the loss
# is ½, good or bad.
#
# $z_0$ says how far log-ratios have drifted in general, so a good answer must rise by more than that. The paper means
# the KL from ref, but sampling for it is expensive. So each prompt is paired with the answer of another row, mostly to
# *another* prompt. $z_0$ is the mean log-ratio of these (0 if it is negative), without gradient: a rough measure of
# drift, not the KL.

# %%
def my_kto(logps, ref_logps, good, z0, beta):
    """logps, ref_logps (B,): sums of log-probs; good (B,): True for a thumb up -> (B,)."""
    sign = torch.where(good, 1.0, -1.0)  # watch: sign (B,)
    return 1 - (sign * beta * (logps - ref_logps - z0)).sigmoid()


# %% [markdown]
# ### Checkpoint

# %%
thumbs = torch.arange(16) % 3 > 0
kto_theirs = kto.kto_loss(*logps, thumbs, 0.2, beta=0.5)
same(my_kto(*logps, thumbs, 0.2, 0.5), kto_theirs, "kto_loss")

# %% [markdown]
# ## 5 · Where they end, on three completions
#
# The toy is that of 09: "tea!", "tea, please" and "could i have tea", of 1, 2 and 4 words, which ref says with .6, .3,
# .1. The judge follows [Bradley-Terry](../GLOSSARY.md#bradley-terry) with $e^r = 1, 2, 4$. DPO at β = ½ ends at
# $\pi^* = (3, 6, 8)/17$. Where do the other losses end? `land` trains the three probabilities until they rest.

# %%
BETA = 0.5
print("π*, where DPO ends", row((ref.log() + r / BETA).softmax(0)))

# %% [markdown]
# ### SLiC-HF mixes SFT with the preferences
#
# Take $m$ so large that no pair reaches it. Then the hinge is a straight line. Let $w^+$ be an answer's share among the
# chosen answers, and $w^-$ its share among the rejected ones. The mean loss is
#
# $$m - \sum_y \big((1 + \alpha)\,w^+ - w^-\big)\log\pi(y) .$$
#
# That is the loss of SFT (04), which ends at the weights of log π. Here they sum to α, since shares sum to 1. So we divide
# by α:
#
# $$\pi(y) = w^+ + (w^+ - w^-)/\alpha .$$
#
# SFT would end at $w^+$. The preferences add the rest. (No probability may be negative, so α must be large here.) By hand,
# for the first answer, $w^+ = .504$, $w^- = .696$ and α = 2: .504 − .192/2 = .408.

# %%
def slic_of(pairs):
    return my_slic(pairs.chosen, pairs.rejected, margin=10.0, weight=2.0)


pair_shares = ref[:, None] * ref * prefer  # watch: pair_shares (3, 3): [a, b], a chosen over b
w_chosen = pair_shares.sum(1) / pair_shares.sum()
w_rejected = pair_shares.sum(0) / pair_shares.sum()
predicted = w_chosen + (w_chosen - w_rejected) / 2
found = land(slic_of)
print("w⁺                ", row(w_chosen))
print("SLiC-HF, predicted", row(predicted))
print("SLiC-HF, found    ", row(found))
there = torch.allclose(found, predicted, atol=1e-4, rtol=0)
this_run(there, "SLiC-HF ends where the formula says.")
law = torch.as_tensor(closed_form.slic_law(ref.numpy(), prefer.numpy(), 2.0))
equal(predicted, law, "The prediction is the closed form of SLiC-HF in toy/closed_form.py.")

# %% [markdown]
# ### SimPO multiplies the reward by the length
#
# With $m = 0$, SimPO is the loss of a reward model (06). Its reward is $s\,\bar a(y)$. A reward model ends at the judge's
# reward plus a constant:
#
# $$s\,\bar a(y) = r(y) + c, \qquad\text{so}\qquad \log\pi(y) = |y|\,\big(r(y) + c\big)/s .$$
#
# The second formula follows because $\bar a(y)$ is $\log\pi(y)$ divided by $|y|$. The constant $c$ makes the sum 1.
# Predict before you run: which answer gains, against π\*?

# %%
def simpo_of(pairs):
    mean_chosen = pairs.chosen / pairs.n_chosen
    mean_rejected = pairs.rejected / pairs.n_rejected
    return my_simpo(mean_chosen, mean_rejected, scale=BETA, margin=0.0)


found = land(simpo_of)
print("SimPO, found", row(found))
law = torch.as_tensor(closed_form.simpo_law(lengths.numpy(), r.numpy(), BETA))
there = torch.allclose(found, law, atol=1e-4, rtol=0)
this_run(there, "SimPO ends where the formula says.")

# %% [markdown]
# The longest answer gets .88; in π\* it has .47. Averages were to make length count less. But at the end of training the
# reward is multiplied by the length. And ref plays no part at all.
#
# ### KTO has no such end
#
# We follow its gradient descent: ref writes the answers, the chosen ones get a thumb up and the
# rejected ones a thumb down. ($z_0$ is 0 here: with one prompt and answers from ref, the mean log-ratio is
# $-\mathrm{KL}(\mathrm{ref}\|\pi)$, which is never positive.)

# %%
def kto_descent(mu, steps):
    """The policies after the given numbers of steps, if answers come from mu (3,)."""
    pairs = mu[:, None] * mu * prefer  # watch: pairs (3, 3): [a, b], a chosen over b
    likes, dislikes = pairs.sum(1), pairs.sum(0)
    print("thumbs up minus thumbs down:", row(likes - dislikes))
    good = torch.ones(3, dtype=torch.bool)
    logits = ref.log()
    found = {}
    for k in range(1, max(steps) + 1):
        logits.requires_grad_()
        now = logits.log_softmax(0)
        loss = likes @ my_kto(now, ref.log(), good, 0.0, BETA)
        loss = loss + dislikes @ my_kto(now, ref.log(), ~good, 0.0, BETA)
        logits = (logits - 5 * torch.autograd.grad(loss, logits)[0]).detach()
        if k in steps:
            found[k] = logits.softmax(0)
            print(f"after {k:5} steps: {row(found[k], 5)}")
    return found


kto_at = kto_descent(ref, (100, 1000, 5000))
this_run(kto_at[5000][0] < 0.3 * kto_at[1000][0], "KTO goes on driving the first answer out.")

# %% [markdown]
# Write $x$ for an answer's log-ratio. With $z_0 = 0$ a like costs $1 - \sigma(\beta x)$ and a dislike
# $\sigma(\beta x)$. Together that is likes − (likes − dislikes) σ(βx). If the dislikes are more, this falls as long as
# x falls, and has no minimum. So the probability of the first answer goes to 0, ever more slowly, because σ becomes
# flat.
#
# KTO follows the majority for each answer. The second answer has a few more likes to spare than the third, because
# ref writes it more often. So it ends ahead of the judge's favourite, .55 to .45.
#
# ORPO is missing here: with α > 0 no closed form is known. (Exercise 1 has α = 0.)
#
# ## 6 · The same GPT, the same pairs
#
# **This is no ranking.** It is one data set and one seed, and every method has the same learning rate and number of
# steps, though their losses differ much in scale. The table shows *what each method does* to the chosen answers, the
# rejected answers, and the language. It does not show which is better.
#
# Base model and requests are those of 09, with 1000 pairs drawn anew. Each method trains a copy of the base model for 50
# steps: DPO and KTO with β = 1, SLiC-HF with $m = 1$ and α = 0.1, SimPO with $s = 2$ and $m = 1$, ORPO with α = 0.1.
# KTO takes chosen answers as good and rejected ones as bad.

# %%
PAIRS = judged_pairs(1000, generator)  # watch: PAIRS (3, 1000): prompt, chosen, rejected
base = rude_gpt(generator)
ref_logps = all_logps(base)  # watch: ref_logps (4, 36)


def reference_point(policy, n, c):
    """KTO's z0: prompt n[i] with the answer of row i − 1, which mostly answers another prompt."""
    n, c = n.tolist(), c.tolist()
    unrelated = [answers_ids[n[i - 1]][c[i - 1]] for i in range(len(n))]
    batch = collate([prompts_ids[x] for x in n], unrelated, pad_id=0)
    with torch.no_grad():
        return (seq_logps(policy, batch) - seq_logps(base, batch)).mean().clamp(min=0)


def train(loss_of, steps=50, with_z0=False):
    """A copy of base, trained on loss_of, a function of a PairLogps (as for `land`)."""
    policy = copy.deepcopy(base).requires_grad_(True)
    shuffle = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4, betas=(0.9, 0.99))
    for _ in range(steps):
        n, yes, no = PAIRS[:, torch.randperm(PAIRS.shape[1], generator=shuffle)[:32]]
        chosen, rejected = rows_of(n, yes), rows_of(n, no)
        pairs = PairLogps(
            *seq_logps(policy, chosen, rejected),
            ref_logps[n, yes],
            ref_logps[n, no],
            chosen.mask.sum(1),
            rejected.mask.sum(1),
            reference_point(policy, n.repeat(2), torch.cat([yes, no])) if with_z0 else 0.0,
        )
        loss = loss_of(pairs).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


# %% [markdown]
# One short function says what each method takes from a pair. The reward averages the well-formed answers only. Look at
# the two changes of log π, then at the last column.

# %%
def dpo_loss(pairs):
    delta = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
    return softplus(-delta)


def kto_loss(pairs):
    logps = torch.cat([pairs.chosen, pairs.rejected])
    references = torch.cat([pairs.ref_chosen, pairs.ref_rejected])
    good = torch.arange(len(logps)) < len(pairs.chosen)
    return my_kto(logps, references, good, pairs.z0, beta=1.0)


def slic_loss(pairs):
    return my_slic(pairs.chosen, pairs.rejected, margin=1.0, weight=0.1)


def simpo_loss(pairs):
    mean_chosen = pairs.chosen / pairs.n_chosen
    mean_rejected = pairs.rejected / pairs.n_rejected
    return my_simpo(mean_chosen, mean_rejected, scale=2.0, margin=1.0)


def orpo_loss(pairs):
    mean_chosen = pairs.chosen / pairs.n_chosen
    mean_rejected = pairs.rejected / pairs.n_rejected
    return my_orpo(mean_chosen, mean_rejected, weight=0.1)


def report(name, policy):
    """Print one line; return the changes of mean log π and the share of well-formed answers."""
    logps = all_logps(policy)
    n, yes, no = PAIRS
    moved = logps - ref_logps
    up, down = moved[n, yes].mean().item(), moved[n, no].mean().item()
    formed = logps.exp().sum(1)
    reward = ((logps.exp() * rewards).sum(1) / formed).mean()
    print(
        f"{name:18} change of log π: chosen {up:6.2f}, rejected {down:6.2f}   reward {reward:5.2f}"
        f"   well-formed {formed.mean():.2f}"
    )
    return up, down, formed.mean().item()


report("base", base)
changes = {}
policies = {}
for name, loss_of in (
    ("DPO", dpo_loss),
    ("KTO", kto_loss),
    ("SLiC-HF", slic_loss),
    ("SimPO", simpo_loss),
    ("ORPO", orpo_loss),
):
    policies[name] = train(loss_of, with_z0=name == "KTO")
    changes[name] = report(name, policies[name])
figures.changes({name: (up, down) for name, (up, down, _) in changes.items()})

# %%
for name in ("SimPO", "ORPO"):
    print(name)
    show_samples(policies[name])

# %% [markdown]
# - **DPO** lowers mainly the rejected answers.
# - **KTO** with the same β moves both much further. KTO only follows the majority, so it goes on: 83 % stays well-formed.
# - **SLiC-HF** stops at pairs that are in order by $m$. 94 % stays well-formed.
# - **SimPO** loses the language: 24 % is well-formed. It has neither ref nor SFT, and its margin is per token: with m =
#   1 and s = 2, answers of 7 tokens must differ by 3.5 nats, and the push never stops. SLiC-HF stops at 1 nat.
# - **ORPO** is mostly SFT at this α. It is the only one that raises the chosen answers, and it gains the least reward.
#
# ## 7 · Break it: take the SFT term away
#
# SLiC-HF has no reference, yet it kept the language. Is it the hinge or the SFT term? We train it without the SFT term,
# and SimPO with one.

# %%
def slic_without_sft(pairs):
    return my_slic(pairs.chosen, pairs.rejected, margin=1.0, weight=0.0)


def simpo_with_sft(pairs):
    return simpo_loss(pairs) - 0.1 * pairs.chosen


print(f"SLiC-HF as above: well-formed {changes['SLiC-HF'][2]:.2f}")
without = report("SLiC-HF, α = 0", train(slic_without_sft))
print(f"SimPO as above: well-formed {changes['SimPO'][2]:.2f}")
with_term = report("SimPO with SFT", train(simpo_with_sft))
this_run(without[2] < changes["SLiC-HF"][2], "Without its SFT term SLiC-HF loses more language.")
this_run(with_term[2] > changes["SimPO"][2], "With an SFT term SimPO keeps more language.")

# %% [markdown]
# Without its SFT term SLiC-HF still keeps nearly nine tenths: here the hinge alone keeps most of the language. With an
# SFT term SimPO keeps 90 % instead of 24 %, and gains less reward. So a method without a reference needs something else
# that limits it: an SFT term, a hinge, or few and small steps. (SimPO's paper uses learning rates of at most 1e-6, for
# models with billions of weights.)
#
# ## What is wrong here? (1)

# %%
# two answers, of 1 and of 4 tokens; padding is 0
token_logps = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
averages = token_logps.mean(1)
print("average log-probs for SimPO:", row(averages))

# %% [markdown]
# In both answers each token has log-prob −1. What will SimPO learn from these averages?
#
# ## What is wrong here? (2)

# %%
# two answers, of 2 and of 8 tokens with log-prob −1 each, to a prompt of 10 tokens with −3 each
answer_logps, sizes = torch.tensor([-2.0, -8.0]), torch.tensor([2.0, 8.0])
scored = answer_logps - 30.0  # the mask also counts the prompt
print("DPO's difference:  ", (scored[0] - scored[1]).item(), " as it should be")
print("SimPO's averages:  ", row(scored / (sizes + 10)))

# %% [markdown]
# The code was tested with DPO and used with SimPO. What went wrong, and why did DPO not show it?
#
# ## What you now know
#
# - SLiC-HF, SimPO and ORPO need no reference. SLiC-HF and ORPO have an SFT term. SimPO has none, and depends on few and
#   small steps.
# - In these runs an SFT term or a hinge alone kept most of the language. SimPO, with neither, lost it.
# - KTO learns from single answers. It follows majorities and has no closed form.
# - SimPO and ORPO divide by the number of tokens. So they need a mask without padding and without the prompt.
#
# Next: [11](11_storyteller.ipynb), where you align a model with a reward of your own. Or, for large models,
# [10](10_kernels.ipynb), kernels; 11 does not need it.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes). ORPO with α = 0 is SFT on the chosen answers, averaged over tokens. Does it end at
# the shares of the chosen answers? Predict, then compute it with `land`.
#
# **Exercise 2** (medium, try this, 10 minutes). Write all three equally often, with $z_0$ still 0: `kto_descent` with
# `torch.ones(3) / 3`. Predict which answers KTO drives out. What about the second, which is liked as often as
# disliked?
#
# **Exercise 3** (hard, 20 minutes). One pair, labelled this way round with probability $p$. Let $u$ be its margin for
# SimPO, $u = s\,(\bar a(y^+) - \bar a(y^-))$. Which $u$ is best? Show that it is $\log\frac{p}{1-p}$ for $m = 0$, and
# near $m + \log\frac{2p-1}{1-p}$ for large $m$ and $p > \frac12$.
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# The mean runs over the padding as well: every answer is divided by 4, the longest length in the batch. So the short
# answer seems better, and the number changes with the batch. Divide by each answer's own number of tokens, as
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
print("right:", row(answer_logps / sizes))
equal(answer_logps / sizes, torch.tensor([-1.0, -1.0]), "Both have −1 nat per token.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# No. Each answer's loss is divided by its length, so an answer of 4 words counts a quarter. ORPO with α = 0 ends at the
# shares of the chosen answers, each divided by its length, and scaled to sum 1.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def orpo_of(pairs):
    mean_chosen = pairs.chosen / pairs.n_chosen
    return my_orpo(mean_chosen, pairs.rejected / pairs.n_rejected, weight=0.0)


end = land(orpo_of)
print("chosen shares", row(w_chosen), " ORPO, α = 0, ends at", row(end))
law = w_chosen / lengths / (w_chosen / lengths).sum()
equal(end, law, "ORPO with α = 0 ends at winners / length.", atol=1e-4, rtol=0)

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The third answer, liked most, takes all the probability. The first goes to 0 quickly. The second is liked as often as
# disliked, so nothing pushes it directly. It falls nevertheless, because probabilities sum to 1.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
alike = kto_descent(torch.ones(3) / 3, (100, 1000, 5000))
this_run(alike[5000][2] > alike[1000][2] > alike[100][2], "The third answer gains all the time.")

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
        loss = p * my_simpo(u, 0, 1.0, margin) + (1 - p) * my_simpo(-u, 0, 1.0, margin)
        always(abs(torch.autograd.grad(loss, u)[0]) < 1e-12, "The slope at the best u is 0.")
        print(
            f"p = {p}, m = {margin:.0f}: u = {best_u:.3f}; "
            f"log(p/(1 − p)) = {math.log(p / (1 - p)):.3f}, "
            f"m + log((2p − 1)/(1 − p)) = {margin + math.log((2 * p - 1) / (1 - p)):.3f}"
        )
