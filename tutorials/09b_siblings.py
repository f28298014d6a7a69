# %% [markdown]
# # 09b · DPO's siblings: IPO, GPO, SLiC-HF, SimPO, ORPO, KTO, REBEL
#
# **You will build** the losses of seven methods that learn from comparisons, compute where each ends, and train a
# small GPT with those that need no reward.
#
# **Time:** 30 minutes of reading, 40 seconds of computer.
#
# **You need:** [09, DPO](09_dpo.ipynb): the margin Δ, the three completions, and why both log-probs fall.
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
from functools import partial

import torch
from torch.nn.functional import softplus

from minialign.batch import collate
from minialign.logps import seq_logps
from minialign.methods import gpo, ipo, kto, orpo, rebel, simpo, slic
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import dpo as figures
from tutorials.word_requests import (
    all_logps,
    answers_ids,
    prompts_ids,
    rewards,
    rows_of,
    rude_gpt,
    show_samples,
    speaker,
)

torch.set_default_dtype(torch.float64)  # so that "equal" can mean ten digits


def row(numbers, digits=3):
    return (
        "[" + " ".join(f"{number:.{digits}f}" for number in torch.as_tensor(numbers).tolist()) + "]"
    )


# %% [markdown]
# ## The question
#
# DPO needs a [reference](../GLOSSARY.md#reference), pairs, and somebody who stops it. Within a year of DPO, several
# papers each changed one part of it. (SLiC-HF is some days older than DPO.) What does each change repair, and what
# does it cost?

# %%
figures.family()

# %% [markdown]
# | what goes wrong with DPO | what is done instead | method |
# | --- | --- | --- |
# | with certain labels the margin grows without end | give the margin a target | IPO (Azar et al. 2023) |
# | its loss is one choice among many; what does the choice do? | any function $h$ of the margin that falls at 0 | GPO (Tang et al. 2024) |
# | a second model, ref, sits in memory; pairs in order still pull | no ref; a hinge that stops; some SFT | SLiC-HF (Zhao et al. 2023) |
# | sums of log-probs depend on length; and again ref | averages per token, no ref, a required margin | SimPO (Meng et al. 2024) |
# | it is a second stage after SFT | SFT and preferences in one loss | ORPO (Hong et al. 2024) |
# | it needs two answers to the same prompt | single answers with a thumb up or down | KTO (Ethayarajh et al. 2024) |
# | a label says who won, not by how much | fit differences of rewards | REBEL (Gao et al. 2024) |
#
# ## 1 · Notation, and a way to find where a loss ends
#
# As in 09, $y^+$ is the chosen answer, $y^-$ the rejected one, and
# $\Delta = \log\frac{\pi(y^+)}{\mathrm{ref}(y^+)} - \log\frac{\pi(y^-)}{\mathrm{ref}(y^-)}$ the margin. We write
# $\bar a(y)$ for the average log-prob per token, $\log\pi(y)$ divided by the number of tokens $|y|$. $m$ is a margin
# that a method asks for, and α is the weight of one term of a loss.
#
# The toy is that of 09: "tea!", "tea, please", "could i have tea", of 1, 2 and 4 words, which ref says with .6, .3,
# .1. The judge follows [Bradley-Terry](../GLOSSARY.md#bradley-terry) with $e^r = 1, 2, 4$. With β = ½ the
# [tilt](../GLOSSARY.md#tilt) is $\pi^* = (3, 6, 8)/17$. `land` finds the [policy](../GLOSSARY.md#policy) with the
# smallest expected loss over all nine pairs. `same` compares your loss and its gradient with minialign's.

# %%
BETA = 0.5
ref = torch.tensor([0.6, 0.3, 0.1])
r = torch.tensor([1.0, 2.0, 4.0]).log()
best = (ref.log() + r / BETA).softmax(0)  # π*
prefer = (r[:, None] - r).sigmoid()  # watch: prefer (3, 3): [a, b] is how often a is chosen over b
LENGTHS = torch.tensor([1.0, 2.0, 4.0])
three = torch.arange(3)
WON, LOST = torch.cartesian_prod(three, three).T  # watch: WON (9,): all nine pairs


def land(loss_of, prefer=prefer, mu=ref, start=ref):
    """The policy (3,) where loss_of ends. loss_of(w, l, ref_w, ref_l, n_w, n_l), each (9,) -> (9,).

    w and l: log-probs of the chosen and the rejected answers; n_w and n_l: their lengths.
    """
    logits = start.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    weight = (
        mu[WON] * mu[LOST] * prefer[WON, LOST]
    )  # mu: the distribution of whoever wrote the answers

    def loss():
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        value = (weight / weight.sum()) @ loss_of(
            logps[WON], logps[LOST], ref.log()[WON], ref.log()[LOST], LENGTHS[WON], LENGTHS[LOST]
        )
        value.backward()
        return value

    optimizer.step(loss)
    return logits.detach().softmax(0)


generator = torch.Generator().manual_seed(0)
four = (
    -4 * torch.rand(4, 16, generator=generator)
).requires_grad_()  # log-probs: chosen, rejected, and both of ref


def same(mine, theirs, name, logps=four):
    equal(mine.mean(), theirs[0], f"Your loss equals minialign's {name}.")
    slopes = torch.autograd.grad(mine.mean(), logps), torch.autograd.grad(theirs[0], logps)
    equal(*slopes, f"The gradient of your loss equals that of minialign's {name}.")
    print(f"equal to minialign's {name}, value and gradient")


# %% [markdown]
# ## 2 · IPO: a target
#
# If labels are certain DPO raises Δ without end (09, section 6). IPO asks for a finite margin and pulls back what is
# beyond:
#
# $$L_\mathrm{IPO} = \mathbb{E}\Big(\Delta - \frac{1}{2\beta}\Big)^2 .$$


# %%
def my_ipo(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Four log-probs of whole answers, each (B,) -> the loss of each pair (B,).

    Stop in it at the first call: delta has 16 entries, and 1/(2β) is 1.
    """
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)  # watch: delta (B,)
    return (delta - 1 / (2 * beta)) ** 2


# %% [markdown]
# ### Checkpoint
#
# And with certain labels? `certain` prefers the higher reward always.

# %%
same(my_ipo(*four, BETA), ipo.ipo_loss(*four, beta=BETA), "ipo_loss")
certain = (r[:, None] > r).double() + 0.5 * torch.eye(3)
for name, labels in (("Bradley-Terry", prefer), ("certain", certain)):
    end = land(lambda *args: my_ipo(*args[:4], BETA), prefer=labels)
    wins = labels @ ref
    print(f"labels {name:14} IPO ends at {row(end)}   how often each wins: {row(wins)}")
    law = (ref.log() + wins / BETA).softmax(0)
    equal(end, law, "my_ipo ends at the distribution ∝ ref·e^(wins/β).", atol=1e-5, rtol=0)

# %% [markdown]
# It ends at a finite policy, $\propto \mathrm{ref}\cdot e^{g/\beta}$. Here $g(y)$ is how often $y$ wins against a
# random answer of the data: at most 1. So IPO maximises the probability of *being preferred*, not the reward behind
# it, and its end depends on who wrote the pairs.
#
# ## 3 · GPO: any shape of loss
#
# "Is this pair in order?" is a question for a classifier, and there are many losses for that. Tang et al. put any such
# function $h$ on $z = \beta\Delta$: $L_\mathrm{GPO} = \mathbb{E}\,h(\beta\Delta)$. With $h(z) = \log(1 + e^{-z})$ it is
# DPO.

# %%
H = {
    "logistic": lambda z: softplus(-z),
    "hinge": lambda z: (1 - z).clamp(min=0),
    "squared": lambda z: (z - 1) ** 2,
    "exponential": lambda z: (-z).exp(),
    "truncated_quadratic": lambda z: (1 - z).clamp(min=0) ** 2,
    "savage": lambda z: (-z).sigmoid() ** 2,
}
for name, h in H.items():
    same(
        h(BETA * (four[0] - four[2] - four[1] + four[3])),
        gpo.gpo_loss(*four, beta=BETA, f=name),
        f"gpo_loss, {name}",
    )
z = torch.linspace(-2, 3, 200)
slopes = {
    name: abs(gpo.regularisation(name)[1]) for name in H
}  # |h'(0)|, to draw all with the same slope at 0
figures.shapes(
    {
        "x": z.numpy(),
        **{name.replace("_", " "): (h(z) / slopes[name]).numpy() for name, h in H.items()},
    }
)

# %% [markdown]
# What does the shape decide? Take one pair whose rewards differ by a small $d$. It is labelled this way round with
# probability $p = \sigma(d) \approx \frac12 + \frac d4$. The expected loss $p\,h(z) + (1-p)\,h(-z)$ is smallest where
#
# $$p\,h'(z) = (1-p)\,h'(-z) .$$
#
# For small $z$ put $h'(\pm z) \approx h'(0) \pm z\,h''(0)$. What remains is $(2p - 1)\,h'(0) + z\,h''(0) = 0$. Since
# $2p - 1 = \frac d2$ and $h'(0) < 0$,
#
# $$\beta\Delta = z = t\,d, \qquad t = \frac{1}{2\,|h''(0)/h'(0)|} .$$
#
# The factor $t$ is the same for every pair, so one policy fits them all: $\mathrm{ref}\cdot e^{t\,r/\beta}$. The
# slope $h'(0)$ pushes, the curvature $h''(0)$ pulls back. (Exact for small rewards only.)


# %%
def my_tilt_factor(h):
    """h: a function of a tensor z -> t = 1 / (2·|h''(0)/h'(0)|), a float.

    Differentiate twice with torch.autograd.grad; create_graph=True keeps the first derivative
    differentiable.
    """
    z = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(h(z), z, create_graph=True)  # watch: slope ()
    (curvature,) = torch.autograd.grad(slope, z)
    return 1 / (2 * abs(curvature / slope).item())


# %% [markdown]
# ### Checkpoint
#
# Predict $t$, then measure it with rewards a thousand times smaller. (The hinge has no curvature; we leave it out.)

# %%
slight = (0.001 * (r[:, None] - r)).sigmoid()
IPO = {
    "IPO: (z − ½)²": lambda z: (z - 0.5) ** 2
}  # IPO's loss times β², which does not move its minimum
for name, h in {**{name: h for name, h in H.items() if name != "hinge"}, **IPO}.items():
    end = land(
        lambda w, l, ref_w, ref_l, *_, h=h: h(BETA * (w - ref_w - l + ref_l)) * 1e3, prefer=slight
    )
    tilt = BETA * (end / ref).log()
    measured = ((tilt[2] - tilt[0]) / (0.001 * (r[2] - r[0]))).item()
    print(f"{name:20} predicted t = {my_tilt_factor(h):.2f}, measured {measured:.3f}")
    always(abs(measured - my_tilt_factor(h)) < 0.01, "my_tilt_factor is the measured t.")

# %% [markdown]
# IPO's $t$ is ¼: **the same β is not the same pull.** For small rewards, IPO at β stays as near to ref as DPO at 4β.
# Compare methods at equal KL, not at equal β.
#
# ## 4 · SLiC-HF, SimPO, ORPO: without a reference
#
# **SLiC-HF** saves the memory of ref, and stops pulling at a pair once it is in order by a margin $m$. A little
# [SFT](../GLOSSARY.md#sft) keeps it a language model:
#
# $$L = \mathbb{E}\big[\max(0,\ m - \log\pi(y^+) + \log\pi(y^-)) - \alpha\log\pi(y^+)\big] .$$
#
# **SimPO** observes that a sum of log-probs depends on the length of an answer, and compares averages per token,
# times a scale $s$. $m$ is the margin that a pair should have:
#
# $$L = \mathbb{E}\,\log\big(1 + e^{\,m - s\,(\bar a(y^+) - \bar a(y^-))}\big) .$$
#
# **ORPO** saves the SFT stage before DPO: SFT on the chosen answers, plus a term that compares *odds*.
# $P = e^{\bar a}$ is the (geometric) mean probability of a token of the answer. Its odds are $P/(1 - P)$, nearly $P$ if
# $P$ is small:
#
# $$L = \mathbb{E}\Big[-\bar a(y^+) - \alpha\log\sigma\Big(\log\tfrac{P^+}{1-P^+} - \log\tfrac{P^-}{1-P^-}\Big)\Big] .$$


# %%
def my_slic(chosen, rejected, margin, weight):
    """chosen, rejected (B,): sums of log-probs; margin is m, weight is α -> (B,)."""
    hinge = (margin - chosen + rejected).clamp(min=0)  # watch: hinge (B,)
    return hinge - weight * chosen


def my_simpo(mean_chosen, mean_rejected, scale, margin):
    """mean_chosen, mean_rejected (B,): averages per token; margin is m -> (B,).

    log(1 + e^x) is softplus(x).
    """
    return softplus(margin - scale * (mean_chosen - mean_rejected))


def my_orpo(mean_chosen, mean_rejected, weight):
    """mean_chosen, mean_rejected (B,): averages per token, below 0; weight is α -> (B,).

    log(1 − e^a) is (−torch.expm1(a)).log(), which does not lose digits.
    """
    odds_chosen, odds_rejected = (
        a - (-torch.expm1(a)).log() for a in (mean_chosen, mean_rejected)
    )  # logs of odds
    return -mean_chosen + weight * softplus(odds_rejected - odds_chosen)


# %% [markdown]
# ### Checkpoint

# %%
two = four[:2].detach().requires_grad_()  # watch: two (2, 16): no ref, so two log-probs
slic_theirs = slic.slic_loss(*two, two[0], delta=1.0, weight=0.1)
simpo_theirs = simpo.simpo_loss(*two, scale=2.0, target_margin=1.0)
same(my_slic(*two, 1.0, 0.1), slic_theirs, "slic_loss", two)
same(my_simpo(*two, 2.0, 1.0), simpo_theirs, "simpo_loss", two)
same(my_orpo(*two, 0.25), orpo.orpo_loss(*two, weight=0.25), "orpo_loss", two)

# %% [markdown]
# ## 5 · KTO: thumbs instead of pairs
#
# Users rarely compare two answers. KTO takes single answers, marked good or bad. An answer gains if its log-ratio is
# above a reference point $z_0$, and each further gain counts less:
#
# $$L = \mathbb{E}\Big[1 - \sigma\big(\pm\beta\,\big(\log\tfrac{\pi(y)}{\mathrm{ref}(y)} - z_0\big)\big)\Big].$$
#
# (+ for a good answer, − for a bad one. The paper also gives each class a weight; ours are 1.)
#
# $z_0$ should be the KL of the policy from ref. Sampling for it would be expensive, and the batch's own log-ratios
# are what the training pushes up and down. So each prompt is paired with the answer of the previous row, mostly an
# answer to *another* prompt. The mean log-ratio of these unrelated answers, at least 0 and without gradient, is
# $z_0$.


# %%
def my_kto(logps, ref_logps, good, z0, beta):
    """logps, ref_logps (B,): sums of log-probs; good (B,): True for a thumb up -> (B,)."""
    sign = torch.where(good, 1.0, -1.0)  # watch: sign (B,)
    return 1 - (sign * beta * (logps - ref_logps - z0)).sigmoid()


# %% [markdown]
# ### Checkpoint
#
# Then we follow KTO on the three completions. Ref writes the answers; winners get a thumb up, losers a thumb down.

# %%
thumbs = torch.arange(16) % 3 > 0
kto_theirs = kto.kto_loss(*two, thumbs, 0.2, beta=BETA)
same(my_kto(*two, thumbs, 0.2, BETA), kto_theirs, "kto_loss", two)

pairs_of_ref = ref[:, None] * ref * prefer  # watch: pairs_of_ref (3, 3): [a, b], a chosen over b
chosen_share = pairs_of_ref.sum(1)
rejected_share = pairs_of_ref.sum(0)
print("thumbs up minus thumbs down:", row(chosen_share - rejected_share))
logits = ref.log()
kto_at = {}
yes = torch.ones(3, dtype=torch.bool)
for k in range(1, 10_001):
    logits.requires_grad_()
    logps = logits.log_softmax(0)
    loss = chosen_share @ my_kto(logps, ref.log(), yes, 0.0, BETA) + rejected_share @ my_kto(
        logps, ref.log(), ~yes, 0.0, BETA
    )
    logits = (logits - 5 * torch.autograd.grad(loss, logits)[0]).detach()
    if k in (100, 1000, 10_000):
        kto_at[k] = logits.softmax(0)
        print(f"after {k:6} steps: {row(kto_at[k], 5)}")
this_run(kto_at[10_000][0] < 0.1 * kto_at[1000][0], "KTO goes on driving the first answer out.")

# %% [markdown]
# KTO does not match label frequencies; it follows majorities. An answer disliked more often than liked goes to
# probability 0, ever more slowly. ($z_0$ is 0 here: with one prompt and answers from ref the mean log-ratio is
# $-\mathrm{KL}(\mathrm{ref}\|\pi)$, which is never positive.)
#
# ## 6 · REBEL: by how much
#
# A label says who won, a reward also by how much. REBEL lets the present policy $\pi_\mathrm{old}$ write two answers
# $y, y'$, and fits the margin, now measured from $\pi_\mathrm{old}$, to the difference of rewards by least squares. η
# is the step size, and $R = r - \beta\log\frac{\pi}{\mathrm{ref}}$ the reward minus the KL penalty (07):
#
# $$L = \mathbb{E}\Big(\frac1\eta\,\Delta - \big(R(y) - R(y')\big)\Big)^2 .$$


# %%
def my_rebel(log_ratio, other_log_ratio, rewards, other_rewards, eta):
    """All (B,): log π/π_old and R of the two answers -> (B,)."""
    target = rewards - other_rewards
    return ((log_ratio - other_log_ratio) / eta - target) ** 2


# %% [markdown]
# ### Checkpoint

# %%
scores, other = torch.rand(2, 16, generator=generator)
rebel_theirs = rebel.rebel_loss(*two, scores, other, eta=0.7)
same(my_rebel(*two, scores, other, 0.7), rebel_theirs, "rebel_loss", two)
one = torch.ones(16)
as_rebel = my_rebel(four[0] - four[2], four[1] - four[3], one / (2 * BETA), 0 * one, 1.0)
same(as_rebel, ipo.ipo_loss(*four, beta=BETA), "ipo_loss, as REBEL on rewards 1/(2β) and 0")

# %% [markdown]
# So IPO regresses on *who won*, REBEL on *by how much*. Regressing on noisy labels is the same as regressing on their
# mean, up to a constant. With $p$ the probability of the label, the three targets of Δ are
# $\frac1\beta\log\frac{p}{1-p} = \frac1\beta(r - r')$ for DPO, $\frac{1}{2\beta}(2p - 1)$ for IPO, and
# $\eta\,(R - R')$ for REBEL. Repeated with new answers, REBEL converges to π\* if $0 < \eta\beta < 2$.
#
# ## 7 · Where each ends
#
# Where a [closed form](../GLOSSARY.md#closed-form) is known (`toy/closed_form.py` derives it) the end
# must equal it.

# %%
# w, l: log-probs of chosen and rejected answers; rw, rl: those of ref; nw, nl: their lengths
ref_np, prefer_np, r_np, lengths_np = (x.numpy() for x in (ref, prefer, r, LENGTHS))
gpo_end = {
    name: land(lambda w, l, rw, rl, *_, h=H[name]: h(BETA * (w - rw - l + rl)))
    for name in ("savage", "exponential", "squared")
}
one_step = land(lambda w, l, rw, rl, *_: my_rebel(w - rw, l - rl, r[WON], r[LOST], 1 / BETA))
simpo_end = land(lambda w, l, _, __, nw, nl: my_simpo(w / nw, l / nl, BETA, 0.0))
ends = {  # name: (where it ends, closed form)
    "DPO": (land(lambda w, l, rw, rl, *_: H["logistic"](BETA * (w - rw - l + rl))), best),
    "GPO, savage": (gpo_end["savage"], best),
    "REBEL, η = 1/β, one round": (one_step, best),
    "GPO, exponential": (gpo_end["exponential"], closed_form.tilt(ref_np, r_np, 2 * BETA)),
    "GPO, squared": (gpo_end["squared"], closed_form.ipo_law(ref_np, prefer_np, BETA / 2, ref_np)),
    "IPO": (
        land(lambda *args: my_ipo(*args[:4], BETA)),
        closed_form.ipo_law(ref_np, prefer_np, BETA, ref_np),
    ),
    "SLiC-HF, m = 10, α = 2": (
        land(lambda w, l, *_: my_slic(w, l, 10.0, 2.0)),
        closed_form.slic_law(ref_np, prefer_np, 2.0),
    ),
    "SimPO, s = β, m = 0": (simpo_end, closed_form.simpo_law(lengths_np, r_np, BETA)),
    "SimPO, s = β, m = ½": (
        land(lambda w, l, _, __, nw, nl: my_simpo(w / nw, l / nl, BETA, 0.5), start=simpo_end),
        None,
    ),
    "ORPO, α = 0: SFT": (
        land(lambda w, l, _, __, nw, nl: my_orpo(w / nw, l / nl, 0.0)),
        closed_form.winners_law(ref_np, prefer_np, lengths_np),
    ),
    "ORPO, α = 1": (land(lambda w, l, _, __, nw, nl: my_orpo(w / nw, l / nl, 1.0)), None),
    "KTO, 10 000 steps": (kto_at[10_000], None),
}
print(f"{'':27}{'ends at':23}KL to π*   KL to ref")
for name, (end, law) in ends.items():
    print(
        f"{name:27}{row(end)}   {abs(closed_form.kl(end.numpy(), best.numpy())):8.3f}   "
        f"{closed_form.kl(end.numpy(), ref_np):8.3f}"
    )
    if law is not None:
        equal(end, torch.as_tensor(law), f"{name} ends at its closed form.", atol=1e-4, rtol=0)

# %% [markdown]
# Three end at π\*. The others minimise something else. SimPO with $m = 0$ ends at
# $\log\pi(y) = |y|\,(r(y)/s + c)$, where $c$ makes the sum 1: it multiplies a reward by the length of the answer. ORPO's
# SFT term averages over tokens, so with α = 0 each answer's share among the chosen is divided by its length. (For
# SLiC-HF we chose $m$ and α so that a closed form exists.)
#
# ## 8 · One data set, seven runs
#
# The GPT and the requests are those of [09](09_dpo.ipynb), section 7 (tutorials/word_requests.py). The pairs are drawn
# anew, so the row of DPO differs from 09.

# %%
def draw_pairs(n_pairs, generator):
    """prompt, chosen, rejected (n_pairs,): two different answers, labelled by the judge."""
    n = torch.arange(n_pairs) % 4
    two = torch.multinomial(speaker[n], 2, generator=generator)  # (n_pairs, 2), without repetition
    first_wins = (
        torch.rand(n_pairs, generator=generator)
        < (rewards[n, two[:, 0]] - rewards[n, two[:, 1]]).sigmoid()
    )
    return n, two[range(n_pairs), (~first_wins).long()], two[range(n_pairs), first_wins.long()]


PROMPT, CHOSEN, REJECTED = draw_pairs(100, generator)  # watch: PROMPT (100,)


# %%
base = rude_gpt(generator)
ref_logps = all_logps(base)  # watch: ref_logps (4, 36)
print(
    f"probability of well-formed answers: {ref_logps.exp().sum(1).mean():.3f}. The base model says:"
)
show_samples(base)

# %% [markdown]
# Each method trains a copy of that base model for 100 steps, with the defaults of its file in minialign/methods: β =
# 0.1 for DPO, IPO and KTO; $m = 1$, α = 0.1 for SLiC-HF; $s = 2$ with $m = 0$ and $m = 1$ for SimPO; α = 0.1 for
# ORPO. KTO takes chosen answers as good, rejected ones as bad. Of GPO only the logistic case, DPO, takes part; REBEL
# needs a reward.


# %%
def reference_point(policy, n, c):
    """KTO's z0: prompt n[i] with the answer of row i − 1, which mostly answers another prompt."""
    moved = [answers_ids[n[i - 1]][c[i - 1]] for i in range(len(n))]
    batch = collate([prompts_ids[x] for x in n], moved, pad_id=0)
    with torch.no_grad():
        return (seq_logps(policy, batch) - seq_logps(base, batch)).mean().clamp(min=0)


def train(loss_of, steps=100, lr=3e-4):
    """A trained copy of base, and the log-probs of all answers after 0, 5, 10, … steps."""
    policy = copy.deepcopy(base).requires_grad_(True)
    shuffle = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, betas=(0.9, 0.99))
    path = [all_logps(policy)]
    for k in range(1, steps + 1):
        some = torch.randperm(len(PROMPT), generator=shuffle)[:32]
        n = PROMPT[some].repeat(2)  # watch: n (64,)
        c = torch.cat([CHOSEN[some], REJECTED[some]])
        batch = rows_of(n, c)
        logps = seq_logps(policy, batch)  # watch: logps (64,)
        sizes = batch.mask.sum(1)
        z0 = partial(reference_point, policy, n.tolist(), c.tolist())  # only KTO calls it
        loss = loss_of(logps, ref_logps[n, c], sizes, z0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if k % 5 == 0:
            path.append(all_logps(policy))
    return policy, torch.stack(path)


def halves(x):
    return x[:32], x[32:]  # chosen, rejected


RUNS = {
    "DPO": lambda logps, ref, sizes, z0: softplus(-0.1 * torch.sub(*halves(logps - ref))),
    "IPO": lambda logps, ref, sizes, z0: my_ipo(*halves(logps), *halves(ref), 0.1),
    "KTO": lambda logps, ref, sizes, z0: my_kto(logps, ref, torch.arange(64) < 32, z0(), 0.1),
    "SLiC-HF": lambda logps, ref, sizes, z0: my_slic(*halves(logps), 1.0, 0.1),
    "SimPO, m = 0": lambda logps, ref, sizes, z0: my_simpo(*halves(logps / sizes), 2.0, 0.0),
    "SimPO, m = 1": lambda logps, ref, sizes, z0: my_simpo(*halves(logps / sizes), 2.0, 1.0),
    "ORPO": lambda logps, ref, sizes, z0: my_orpo(*halves(logps / sizes), 0.1),
}


def numbers_of(logps):
    """(reward of well-formed answers, probability of a well-formed answer), means over prompts."""
    probs = logps.exp()
    return ((probs * rewards).sum(1) / probs.sum(1)).mean().item(), probs.sum(1).mean().item()


trained = {name: train(loss_of) for name, loss_of in RUNS.items()}
start = trained["DPO"][1][0]  # watch: start (4, 36)
print(f"{'':14}log π: chosen  rejected       Δ   reward   well-formed")
changes = {}
deltas = {}
for name, (_, path) in {"before": (base, start[None]), **trained}.items():
    chosen = path[:, PROMPT, CHOSEN].mean(1)
    rejected = path[:, PROMPT, REJECTED].mean(1)
    up = chosen - chosen[0]
    down = rejected - rejected[0]
    if name != "before":
        changes[name] = up[-1].item(), down[-1].item()
        deltas[name] = (up - down).tolist()
    reward, formed = numbers_of(path[-1])
    print(
        f"{name:14}{chosen[-1]:13.2f}{rejected[-1]:10.2f}{up[-1] - down[-1]:8.2f}"
        f"{reward:9.2f}{formed:14.2f}"
    )
for name in ("DPO", "IPO", "KTO", "SLiC-HF", "SimPO, m = 1", "ORPO"):
    print(name)
    show_samples(trained[name][0], n=1)
this_run(
    changes["DPO"][0] < 0 < changes["ORPO"][0], "DPO lowers the chosen answers; ORPO does not."
)
figures.changes(changes)
figures.margins(deltas, target=1 / (2 * 0.1), every=5)

# %% [markdown]
# - **DPO** lowers both ends, as in 09. **KTO** reaches the same Δ with less damage here: 77 % stays well-formed, with
#   DPO 43 %. The same answers push and pull, but each has its own weight, which saturates.
# - **IPO** aims at a margin, not at a level. Its Δ goes slowly to the target, and both ends fall together.
# - **SimPO** has nothing that holds it, neither ref nor SFT. With $m = 1$ a pair in order by less than $m$ still counts
#   more than half, so Δ grows more.
# - **SLiC-HF** stops at pairs that are in order by $m$, and its SFT term keeps whole sentences. **ORPO** is mostly
#   SFT at this α: the only one that raises the chosen answers, with the least gain in reward.
#
# This is no ranking: it is one data set, one seed.
#
# ## 9 · Break it: ten times the learning rate
#
# What holds a method without a reference? We take 30 steps of SimPO and ORPO, and as controls of DPO, which has a
# reference, and of SFT alone.

# %%
FAST = {
    **{name: RUNS[name] for name in ("SimPO, m = 1", "DPO", "ORPO")},
    "SFT": lambda logps, ref, sizes, z0: -halves(logps / sizes)[0],
}
for name, loss_of in FAST.items():
    policy, path = train(loss_of, steps=30, lr=3e-3)
    formed = numbers_of(path[-1])[1]
    print(f"{name}: probability of a well-formed answer {formed:.3f}")
    show_samples(policy, n=1)
    this_run(
        (formed > 0.8) == (name in ("ORPO", "SFT")) and (formed > 0.8 or formed < 0.2),
        "ORPO and SFT keep the language; SimPO and DPO lose it.",
    )

# %% [markdown]
# SimPO loses the language, and so does DPO with its reference. The SFT term keeps it. SimPO depends on few and small
# steps: its paper uses learning rates of at most 1e-6, for models with billions of weights.
#
# ## What is wrong here? (1)


# %%
def quick_ipo(w, l, rw, rl, *_):
    return (BETA * (w - rw - l + rl) - 1) ** 2


print("GPO's squared loss is (β·Δ − 1)², so this is IPO:", row(land(quick_ipo)))
print(
    "closed form of IPO at this β:                    ",
    row(closed_form.ipo_law(ref_np, prefer_np, BETA, ref_np)),
)

# %% [markdown]
# Both are squared distances. Why do they not end at the same policy?
#
# ## What is wrong here? (2)

# %%
# two answers, of 1 and of 4 tokens; padding is 0
token_logps = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
averages = token_logps.mean(1)
print("average log-probs for SimPO:", row(averages))

# %% [markdown]
# In both answers each token has log-prob −1. What will SimPO learn from these averages?
#
# ## What you now know
#
# - Each sibling changes one part of DPO: the shape of the loss (IPO, GPO), the reference (SLiC-HF, SimPO, ORPO), the
#   pairs (KTO), or the label (REBEL).
# - Near ref a loss $h$ gives the tilt $\mathrm{ref}\cdot e^{t\,r/\beta}$ with $t = 1/(2|h''(0)/h'(0)|)$.
# - Each method has an end of its own. DPO, GPO with Savage's $h$, and REBEL end at π\*.
# - An SFT term keeps the language; a target or a hinge limits the margin; a reference alone does neither.
#
# Next: [10, kernels](10_kernels.ipynb).
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes). One pair, and the label never changes. For which share `flip` of doubted labels
# does DPO with flipped labels (09) stop where IPO stops? Does it depend on β?
#
# **Exercise 2** (medium, try this, 10 minutes). IPO at β pulls like DPO at 4β. So give the GPT IPO with β = 0.4, 0.1
# and 0.025 for 100 steps. Predict the target of Δ for each; which run comes nearest, in nats and as a share? Run it.
#
# **Exercise 3** (hard, 20 minutes). One pair, labelled this way round with probability $p$. Let $u$ be its margin for
# SimPO, $u = s\,(\bar a(y^+) - \bar a(y^-))$. Which $u$ is best? Show that it is $\log\frac{p}{1-p}$ for $m = 0$, and
# near $m + \log\frac{2p-1}{1-p}$ for large $m$ and $p > \frac12$.
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# $(\beta\Delta - 1)^2 = \beta^2\,(\Delta - \frac1\beta)^2$: its target is $\frac1\beta$, IPO's is $\frac{1}{2\beta}$.
# It is IPO at half the β.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
at_half = torch.tensor(closed_form.ipo_law(ref_np, prefer_np, BETA / 2, ref_np))
equal(land(quick_ipo), at_half, "The squared GPO loss is IPO at half the β.", atol=1e-5, rtol=0)

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The mean runs over the padding as well: every answer is divided by 4, the longest length in the batch. So the short
# answer seems better, and the number changes with the batch. Divide by each answer's own number
# of tokens, as `minialign.logps.mean_logps` does.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
sizes = torch.tensor([1.0, 4.0])
print("right:", row(token_logps.sum(1) / sizes))
always(
    torch.equal(token_logps.sum(1) / sizes, torch.tensor([-1.0, -1.0])),
    "Both answers have −1 nat per token.",
)

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# DPO with flipped labels stops at $\Delta = \frac1\beta\log\frac{1-\mathrm{flip}}{\mathrm{flip}}$, IPO at
# $\frac{1}{2\beta}$. They are equal for $\mathrm{flip} = \frac{1}{1+\sqrt e} = 0.378$, for every β. IPO is as careful
# as if more than a third of all labels were wrong.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
flip = 1 / (1 + math.sqrt(math.e))
for beta in (0.3, 0.6, 1.2):
    delta = torch.tensor(1 / (2 * beta), requires_grad=True)
    loss = (1 - flip) * softplus(-beta * delta) + flip * softplus(beta * delta)
    always(abs(torch.autograd.grad(loss, delta)[0]) < 1e-12, "The slope at IPO's target is 0.")
print(f"flip = {flip:.4f}")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The targets are 1.25, 5 and 20 nats. In nats the run with β = 0.4 comes nearest, as a share that with β = 0.1. β = 0.4
# keeps most of the language; β = 0.025 goes farthest from ref.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
reached = {}
for beta in (0.4, 0.1, 0.025):
    _, path = train(
        lambda logps, ref, sizes, z0, beta=beta: my_ipo(*halves(logps), *halves(ref), beta)
    )
    reached[beta] = (
        ((path[-1] - start)[PROMPT, CHOSEN] - (path[-1] - start)[PROMPT, REJECTED]).mean().item()
    )
    print(
        f"β = {beta}: target {1 / (2 * beta):5.2f}, reached {reached[beta]:5.2f} "
        f"({100 * 2 * beta * reached[beta]:.0f} %), "
        f"well-formed {numbers_of(path[-1])[1]:.2f}"
    )
this_run(reached[0.4] < reached[0.1] < reached[0.025], "A smaller β asks for a larger margin.")

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
        best_u = math.log(
            ((2 * p - 1) * a + math.sqrt((2 * p - 1) ** 2 * a**2 + 4 * p * (1 - p))) / (2 * (1 - p))
        )
        u = torch.tensor(best_u, requires_grad=True)
        slope = torch.autograd.grad(
            p * my_simpo(u, 0, 1.0, margin) + (1 - p) * my_simpo(-u, 0, 1.0, margin), u
        )[0]
        print(
            f"p = {p}, m = {margin:.0f}: u = {best_u:.3f}; "
            f"log(p/(1 − p)) = {math.log(p / (1 - p)):.3f}, "
            f"m + log((2p − 1)/(1 − p)) = {margin + math.log((2 * p - 1) / (1 - p)):.3f}"
        )
        always(abs(slope) < 1e-12, "The slope at the best u is 0.")
