# %% [markdown]
# # 09 · DPO: the policy is its own reward model
#
# **You will build** direct preference optimisation (DPO; Rafailov et al. 2023) from two equations, train a small GPT
# with it until its rude requests become more polite, and find out why *both* log-probs fall in training.
#
# **Time:** 26 minutes of reading, 40 seconds of computer.
#
# **You need:** [05, inverse RL](05_inverse_rl.ipynb) for the tilt, [06, rewards](06_reward.ipynb) for Bradley-Terry.
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

from minialign.batch import Pairs
from minialign.logps import seq_logps
from minialign.methods import dpo
from minialign.methods.reward_model import bradley_terry_loss
from tutorials.checks import always, equal, this_run
from tutorials.figures import dpo as figures
from tutorials.three_completions import land, prefer, r, ref, row
from tutorials.word_requests import (
    all_logps,
    prompts,
    rewards,
    rows_of,
    rude_gpt,
    show_samples,
    speaker,
    texts,
)

torch.set_default_dtype(torch.float64)  # so that "equal" can mean ten digits


# %% [markdown]
# ## The question
#
# People compared answers: for each [prompt](../GLOSSARY.md#prompt) somebody saw two and chose one. Such a
# [preference](../GLOSSARY.md#preference) can train a reward model (06), and a [reward](../GLOSSARY.md#reward) can
# train a [policy](../GLOSSARY.md#policy) (07, 08), which is expensive. Can we go from the pairs to the policy directly?

# %%
figures.two_routes()

# %% [markdown]
# DPO does. This picture shows what one step of it does to the answers of some pairs:
#
# ![Pairs of answers: tokens of chosen answers are blue, of rejected ones orange.](../../docs/microscope.png)
#
# *Made by `python -m minialign microscope dpo ipo orpo`, after 40 steps. Look at the rows of dpo. The two others
# are methods of 09b and 09c.*
#
# A step on DPO's loss pushes the tokens of the chosen answer up (blue) and those of the rejected answer down (orange).
# All tokens of an answer are pushed alike, so a row has one colour. Two things here will need an explanation. Why are
# some pairs pushed less than others? And why do the log-probs of chosen answers *fall* in training all the same?

# %% [markdown]
# ## 1 · The data: pairs of requests
#
# We use the project's small language of requests. A speaker answers "ask for tea:" with an opening, the thing, and an
# ending: 36 possible answers to a prompt. Our speakers are mostly rude. The judge's reward counts politeness: it is −1
# if opening and ending are rude, 1 if one of them is polite, 3 if both are.
# [Bradley-Terry](../GLOSSARY.md#bradley-terry) says how the judge chooses: the first of two answers wins with
# probability $\sigma(r_1 - r_2)$.

# %%
def my_judged_pairs(probs, rewards, n_pairs, generator):
    """probs, rewards (N, K), for N prompts with K answers -> a tensor (3, n_pairs) of indices.

    Its rows are prompt, chosen, rejected. Pair k belongs to prompt k % N. Draw two answers from
    probs[prompt] with torch.multinomial and `generator`, and again while they are equal. The first
    is the chosen one with probability σ(reward of the first − reward of the second).
    """
    found = []
    for k in range(n_pairs):
        n = k % len(probs)
        first = second = 0
        while first == second:
            first, second = torch.multinomial(
                probs[n], 2, replacement=True, generator=generator
            ).tolist()
        first_wins = (
            torch.rand((), generator=generator) < (rewards[n, first] - rewards[n, second]).sigmoid()
        )
        found.append((n, first, second) if first_wins else (n, second, first))
    return torch.tensor(found).T


# %% [markdown]
# ### Checkpoint
#
# If two rewards differ by $\log 3$, the better answer must be chosen three times out of four. Then we draw 1000 pairs
# for training. The judge sometimes chooses the ruder answer.

# %%
generator = torch.Generator().manual_seed(0)
_, better, worse = my_judged_pairs(
    torch.tensor([[0.3, 0.7]]), torch.tensor([[math.log(3), 0.0]]), 4000, generator
)
share = (better == 0).double().mean().item()
print(f"the better answer is chosen in {share:.3f} of 4000 pairs, Bradley-Terry says 0.750")
always(
    abs(share - 0.75) < 0.04, "my_judged_pairs draws the chosen answer with probability σ(r1 − r2)."
)
always((better != worse).all(), "The two answers in a pair of my_judged_pairs differ.")

# From tutorials/word_requests.py: prompts, 36 texts for each, and of each text the probability
# under our speakers (speaker) and the judge's reward (rewards), both (4, 36).
PAIRS = my_judged_pairs(speaker, rewards, 1000, generator)  # watch: PAIRS (3, 1000)
PROMPT, CHOSEN, REJECTED = PAIRS  # watch: PROMPT (1000,)
for x, yes, no in PAIRS.T[:4]:
    print(f"{prompts[x]}  chosen: {texts[x][yes]:32} rejected: {texts[x][no]}")

# %% [markdown]
# ## 2 · DPO from two equations
#
# **Equation one** says what the best policy is, if the reward $r$ is known. Let ref be the
# [reference](../GLOSSARY.md#reference), the policy before training, and let β > 0 say how many units of reward one
# [nat](../GLOSSARY.md#nats) of [KL divergence](../GLOSSARY.md#kl) from ref costs. Tutorial 05 derived the best
# policy, the [tilt](../GLOSSARY.md#tilt). Solve it for the reward:
#
# $$\pi^*(y) = \frac{\mathrm{ref}(y)\, e^{r(y)/\beta}}{Z}
#   \quad\Longrightarrow\quad r(y) = \beta \log\frac{\pi^*(y)}{\mathrm{ref}(y)} + \beta \log Z .$$
#
# $Z$ is a sum over all completions, far too many for a real model.
#
# **Equation two** is Bradley-Terry. It contains only a *difference* of two rewards to the same prompt, so
# $\beta\log Z$ cancels. Let $y^+$ be the chosen answer and $y^-$ the rejected one:
#
# $$P(y^+ \text{ chosen over } y^-) = \sigma\big(r(y^+) - r(y^-)\big) =
#   \sigma\Big(\beta\log\frac{\pi^*(y^+)}{\mathrm{ref}(y^+)} - \beta\log\frac{\pi^*(y^-)}{\mathrm{ref}(y^-)}\Big) .$$
#
# **Now the step that makes DPO.** We do not know π\*. So we put the policy π that we train in its place, and read
# $\beta\log\frac{\pi}{\mathrm{ref}}$ as *its* reward. Then we fit π to the choices by maximum likelihood, as a reward
# model is fitted. If the fitted reward is right up to a constant, then π is π\*. The loss is
#
# $$L_\mathrm{DPO} = -\mathbb{E}\,\log\sigma(\beta\Delta), \qquad
#   \Delta = \log\frac{\pi(y^+)}{\mathrm{ref}(y^+)} - \log\frac{\pi(y^-)}{\mathrm{ref}(y^-)} .$$
#
# Δ is the **margin**: how much more the policy has raised the [log-prob](../GLOSSARY.md#log-prob) of $y^+$ than that
# of $y^-$.
#
# ### By hand
#
# Suppose a prompt had only three answers, "tea!", "tea, please" and "could i have tea". Let ref say them with
# probability .6, .3, .1. The judge prefers each to the one before with odds 2 : 1, so $e^r = 1, 2, 4$. With
# $\beta = \frac12$, $e^{r/\beta} = 1, 4, 16$. Multiply: $.6,\ 1.2,\ 1.6$, whose sum is $Z = 3.4$. So
# $\pi^* = \frac{3}{17}, \frac{6}{17}, \frac{8}{17}$. The cell checks that π\* agrees with the judge about every pair.

# %%
# From tutorials/three_completions.py: ref and r (3,), and prefer (3, 3): [a, b] is how often the
# judge chooses a over b.
BETA = 0.5
best = (ref.log() + r / BETA).softmax(0)  # watch: best (3,): π*
log_ratio = (best / ref).log()
print("r            ", row(r))
print("β·log π*/ref ", row(BETA * log_ratio), f"  smaller by β·log Z = {BETA * math.log(3.4):.3f}")
this_run(torch.allclose(best * 17, torch.tensor([3.0, 6.0, 8.0])), "π* is (3, 6, 8)/17.")
equal(
    (BETA * (log_ratio[:, None] - log_ratio)).sigmoid(),
    prefer,
    "σ(β·Δ) at π* is the judge's probability, for every pair.",
)

# %% [markdown]
# ## 3 · Build it yourself: the loss
#
# The log-probs are sums over the tokens of each answer.

# %%
def my_dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Four log-probs of whole answers, each (B,) -> the loss of each pair (B,).

    −log σ(z) is softplus(−z). Stop in it at the first call: delta has 16 entries; where delta is 0
    the loss is log 2 = 0.693.
    """
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)  # watch: delta (B,)
    return softplus(-beta * delta)


# %% [markdown]
# ### Checkpoint
#
# Your loss must equal minialign's, and also the loss of tutorial 06's reward model with the reward
# $\beta\log\frac{\pi}{\mathrm{ref}}$.

# %%
four = -4 * torch.rand(4, 16, generator=generator)  # chosen, rejected, and both of ref
four.requires_grad_()
mine = my_dpo(*four, BETA).mean()
theirs, _ = dpo.dpo_loss(*four, beta=BETA)
equal(mine, theirs, "my_dpo equals minialign's dpo_loss.")
equal(
    torch.autograd.grad(mine, four, retain_graph=True),
    torch.autograd.grad(theirs, four),
    "The gradient of my_dpo equals that of minialign's dpo_loss.",
)
as_reward_model, _ = bradley_terry_loss(BETA * (four[0] - four[2]), BETA * (four[1] - four[3]))
print(f"DPO                                                  {mine:.10f}")
print(f"reward model's loss, with β·log(π/ref) as the reward {as_reward_model:.10f}")
equal(mine, as_reward_model, "my_dpo is the reward model's loss with the reward β·log(π/ref).")

# %% [markdown]
# Now we can say why some pairs are pushed less. The gradient of the loss is
#
# $$\nabla L = -\beta\,\sigma(-\beta\Delta)\,\big(\nabla\log\pi(y^+) - \nabla\log\pi(y^-)\big) .$$
#
# The further a pair is in order, the less it counts: the factor $\sigma(-\beta\Delta)$ is a half at
# $\beta\Delta = 0$, about a quarter at $\beta\Delta = 1$, and a twentieth at $\beta\Delta = 3$. In the picture at
# the top, the paler pair of dpo has the larger Δ.
#
# ## 4 · Where it ends, whoever wrote the pairs
#
# With three answers we can replace sampling by a sum over all nine pairs. `mu` is the
# [distribution](../GLOSSARY.md#distribution) of whoever wrote the answers: ref, somebody else, or π\* itself. `land`
# (in tutorials/three_completions.py) finds the policy with the smallest expected loss. Does the end depend on `mu`?

# %%
def dpo_of(pairs):
    """my_dpo for `land`, which gives the log-probs of nine pairs as one object."""
    return my_dpo(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, BETA)


writers = {
    "ref": ref,
    "all answers alike": torch.ones(3) / 3,
    "nearly always the third": torch.tensor([0.05, 0.05, 0.9]),
    "π* itself": best,
}
for name, mu in writers.items():
    end = land(dpo_of, mu)
    print(f"pairs written by {name:24} DPO ends at {row(end, 5)}")
    equal(end, best, "DPO ends at π*, whoever wrote the pairs.", atol=1e-5, rtol=0)

# %% [markdown]
# It ends at π\* each time. How often the judge chooses one answer over another does not depend on who wrote them, and
# one policy, π\*, fits all pairs at once. This needs three assumptions:
#
# 1. The judge follows Bradley-Terry. (Exercise 2 breaks this one.)
# 2. The pairs connect all answers, directly or through other answers, and the policy can represent π\*.
# 3. Every pair was judged so often that the label frequencies are right.
#
# The third assumption is the one that fails most often. In a real data set a prompt mostly has one pair, and it is
# judged once. So nothing in the data contradicts the label. Then the loss has no minimum: it falls as long as Δ grows,
# and Δ grows as long as one trains. [09b](09b_siblings.ipynb) computes how fast. So DPO is stopped after one or a few
# passes over the data.
#
# ## 5 · A GPT learns from the pairs
#
# A GPT first learns to speak like the rude speakers ([SFT](../GLOSSARY.md#sft), tutorial 04), then DPO trains it on our
# pairs. A token is a word here. The 36 answers to a prompt are the *well-formed* ones. We compute their probabilities
# as we go. One minus their sum is the probability of broken texts. Our 1000 pairs often contradict each other, because
# four prompts have only 36 answers each.

# %%
# From tutorials/word_requests.py: rude_gpt does the SFT, rows_of(n, c) is the Batch of answers c to
# prompts n, and all_logps gives log π of all 36 answers to the 4 prompts.
base = rude_gpt(generator)
ref_logps = all_logps(base)  # watch: ref_logps (4, 36)
formed = ref_logps.exp().sum(1).mean().item()
print(f"probability of well-formed answers: {formed:.3f}. The base model says:")
show_samples(base)

# %% [markdown]
# `my_dpo_step` connects the models with the loss.

# %%
def my_dpo_step(policy, ref_policy, chosen, rejected, beta):
    """The DPO loss of one batch, a scalar. chosen, rejected: Batches of B answers each.

    seq_logps(model, batch) gives the (B,) log-probs of the answers under a model. Only the policy's
    log-probs may carry a gradient: compute the reference's under torch.no_grad().
    """
    logps_chosen = seq_logps(policy, chosen)  # watch: logps_chosen (B,)
    logps_rejected = seq_logps(policy, rejected)
    with torch.no_grad():
        ref_chosen = seq_logps(ref_policy, chosen)
        ref_rejected = seq_logps(ref_policy, rejected)
    return my_dpo(logps_chosen, logps_rejected, ref_chosen, ref_rejected, beta).mean()


# %% [markdown]
# ### Checkpoint

# %%
moved = copy.deepcopy(base).requires_grad_(True)
thawed = copy.deepcopy(base).requires_grad_(True)
with torch.no_grad():
    moved.head_weight.mul_(1.1)
batch = Pairs(rows_of(PROMPT[:8], CHOSEN[:8]), rows_of(PROMPT[:8], REJECTED[:8]))
mine = my_dpo_step(moved, thawed, batch.chosen, batch.rejected, 0.1)
theirs, _ = dpo.step(moved, thawed, batch, dpo.Config(beta=0.1))
equal(mine, theirs, "my_dpo_step equals minialign's dpo.step.")
mine.backward()
always(
    all(p.grad is None for p in thawed.parameters()),
    "my_dpo_step gives the reference no gradient.",
)
print(f"my_dpo_step {mine:.6f}, dpo.step {theirs:.6f}")

# %% [markdown]
# Train for 80 steps with β = 1. The printed reward is the mean over well-formed answers; the last column says how
# likely such an answer is at all. Look at the reward first, then at the two log-probs.

# %%
def train(beta, pairs=PAIRS, steps=40, lr=3e-4, sft=0.0):
    """A trained copy of base, and the log-probs of all answers after 0, 5, 10, … steps.

    sft: the weight of −log π of the chosen answers, an extra term that only exercise 1 uses.
    """
    policy = copy.deepcopy(base).requires_grad_(True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, betas=(0.9, 0.99))
    shuffle = torch.Generator().manual_seed(0)
    path = [all_logps(policy)]
    for k in range(1, steps + 1):
        n, yes, no = pairs[:, torch.randperm(pairs.shape[1], generator=shuffle)[:32]]
        loss = my_dpo_step(policy, base, rows_of(n, yes), rows_of(n, no), beta)
        if sft:
            loss = loss - sft * seq_logps(policy, rows_of(n, yes)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if k % 5 == 0:
            path.append(all_logps(policy))
    return policy, torch.stack(path)


def report(name, logps, pairs=PAIRS):
    """Print what became of the pairs and of the language; return reward and well-formed share."""
    n, yes, no = pairs
    probs = logps.exp()
    formed = probs.sum(1)
    reward = ((probs * rewards).sum(1) / formed).mean().item()
    print(
        f"{name:22} log π: chosen {logps[n, yes].mean():6.2f}, rejected {logps[n, no].mean():6.2f}"
        f"   reward {reward:5.2f}   well-formed {formed.mean():.2f}"
    )
    return reward, formed.mean().item()


trained, path = train(beta=1.0, steps=80)
for steps in (0, 10, 20, 40, 80):
    reward, formed = report(f"DPO, {steps} steps", path[steps // 5])
show_samples(trained)
at_the_tilt = ((speaker.log() + rewards / 1.0).softmax(1) * rewards).sum(1).mean().item()
print(f"reward of π*, if the speakers were the reference: {at_the_tilt:.2f}")
this_run(reward > 1.2 and formed > 0.9, "DPO raises the reward and keeps the language.")

# %% [markdown]
# The reward rises from −0.05 to 1.48, on its way to the 1.84 of π\*. Well-formed answers keep 95 % of the probability.
# So DPO works. Now the log-probs. The rejected answers fall by one nat, as they should. The chosen ones rise a little in
# the first ten steps, then they fall too, from −3.65 to −3.84.
#
# ## 6 · Why do both log-probs fall?
#
# `logps/chosen` fell, although it is the *chosen* answer. Is a sign wrong? No. The loss contains only the distance Δ.
# Where its two ends go is decided by π\*:
#
# $$\log\frac{\pi^*(y)}{\mathrm{ref}(y)} = \frac{r(y)}{\beta} - \log Z < 0 \iff r(y) < \beta\log Z .$$
#
# Probabilities sum to 1. A chosen answer has won *one* comparison, but other answers may be better still. π\* gives
# them more probability, so the chosen answer may get less than before. The bound $\beta\log Z =
# \beta\log\mathbb{E}_{\mathrm{ref}}\,e^{r/\beta}$ is near the mean reward for a large β and near the *best* reward for
# a small one. Chosen answers below it must fall. We count them in our pairs, with the speakers as ref. Compare β = 1
# with the run above.

# %%
falls = []
expected = {}
for beta in (2.0, 1.0, 0.5, 0.1):
    soft_best = beta * (speaker.log() + rewards / beta).logsumexp(1)  # watch: soft_best (4,)
    change = (rewards - soft_best[:, None]) / beta  # watch: change (4, 36): log π*/ref
    falls.append((change[PROMPT, CHOSEN] < 0).double().mean().item())
    expected[beta] = [change[PROMPT, side].mean().item() for side in (CHOSEN, REJECTED)]
    print(
        f"β = {beta:3.1f}: β·log Z = {soft_best[0]:4.2f}; {100 * falls[-1]:2.0f} % of the chosen "
        f"answers fall; mean change: chosen {expected[beta][0]:6.2f}, "
        f"rejected {expected[beta][1]:6.2f}"
    )
always(falls == sorted(falls), "A smaller β lowers at least as many of the chosen answers.")
chosen = path[:, PROMPT, CHOSEN].mean(1)  # watch: chosen (17,)
rejected = path[:, PROMPT, REJECTED].mean(1)
found = [(ends[-1] - ends[0]).item() for ends in (chosen, rejected)]
print(f"the GPT after 80 steps, β = 1:  chosen {found[0]:5.2f}, rejected {found[1]:5.2f}")
this_run(
    all(aim < now < 0.1 for now, aim in zip(found, expected[1.0], strict=True)),
    "Neither of the GPT's log-probs has fallen further than at π*.",
)
figures.both_fall(chosen.tolist(), rejected.tolist(), expected[1.0], every=5)

# %% [markdown]
# At β = 1, π\* itself has a lower mean log-prob of the chosen answers, by 0.40 nats, and of the rejected ones, by 1.38.
# The GPT is on its way there. So here the fall is no damage: it is what the best policy looks like. With β = 0.1 both
# must fall by more than 20 nats.
#
# The usual recipe adds a cause: it runs SFT on the chosen answers first. SFT puts their mean log-prob at its maximum, so
# every change from there lowers it.
#
# ## 7 · Break it: a small β and few pairs
#
# β = 0.1 is a usual default, and real data judge each pair once. We change one thing, then the other,
# then both, and train for 40 steps each. Look at the last column.

# %%
settings = {
    "100 pairs": {"beta": 1.0, "pairs": PAIRS[:, :100]},
    "β = 0.1": {"beta": 0.1},
    "β = 0.1, 100 pairs": {"beta": 0.1, "pairs": PAIRS[:, :100]},
}
runs = {name: train(**setting) for name, setting in settings.items()}
kept = {"as above": report("as above", path[8])[1]}
for name, (_, run_path) in runs.items():
    kept[name] = report(name, run_path[-1])[1]
broken, broken_path = runs["β = 0.1, 100 pairs"]
show_samples(broken, n=1)
this_run(
    max(kept["β = 0.1"], kept["β = 0.1, 100 pairs"]) < 0.6 < kept["100 pairs"] < kept["as above"],
    "A small β damages the language, and so do few pairs.",
)
in_a_pair = torch.zeros(4, 36, dtype=torch.bool)
in_a_pair[PROMPT[:100], CHOSEN[:100]] = in_a_pair[PROMPT[:100], REJECTED[:100]] = True
probs = broken_path.exp()
seen = (probs * in_a_pair).sum(2).mean(1)
figures.where_mass_goes(seen, probs.sum(2).mean(1) - seen, every=5)

# %% [markdown]
# Either change alone costs language, and the small β costs half of it. Both log-probs now fall by many nats. Three
# causes act together:
#
# - **A small β asks for large margins.** Two answers whose rewards differ by 2 must get a margin Δ of $2/\beta$: their
#   log-probs move apart by 2 nats at β = 1, by 20 at β = 0.1.
# - **With few pairs, few labels contradict each other.** So nothing stops the margin (section 4).
# - **A network shares its weights.** The GPT cannot move answers one by one; it moves words. Pushing down "now" after
#   some words pushes up every other word there, whether that gives a sentence or not. No pair contains such a broken
#   text, so the loss says nothing about it.
#
# (Does a lower learning rate help? Try `train(0.1, PAIRS[:, :100], lr=1e-4, steps=100)`.) So falling log-probs alone are
# no error. Watch a reward, stop early, and *read samples*.
#
# ## What is wrong here? (1)

# %%
n, no, yes = my_judged_pairs(speaker, rewards, 1000, torch.Generator().manual_seed(2))
pairs = torch.stack([n, yes, no])
puzzling, _ = train(beta=1.0, pairs=pairs, steps=30)
with torch.no_grad():
    loss = my_dpo_step(puzzling, base, rows_of(n, yes), rows_of(n, no), 1.0)
print(f"loss at the start 0.693, after 30 steps {loss:.3f}: it works")

# %% [markdown]
# The loss has fallen, as it should. Would you use this policy?
#
# ## What is wrong here? (2)

# %%
policy = copy.deepcopy(base).requires_grad_(True)
frozen = policy
optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
losses = []
for k in range(30):
    n, yes, no = PAIRS[:, 32 * k : 32 * k + 32]
    loss = my_dpo_step(policy, frozen, rows_of(n, yes), rows_of(n, no), 1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("loss:", ", ".join(f"{losses[k]:.4f}" for k in (0, 10, 20, 29)))
report("before", ref_logps)
_ = report("after 30 steps", all_logps(policy))

# %% [markdown]
# The loss does not move at all. The policy does. Why?
#
# ## What you now know
#
# - DPO is the reward model's loss with $\beta\log\frac{\pi}{\mathrm{ref}}$ as the reward. With Bradley-Terry labels,
#   judged often enough, on pairs that connect all answers, it ends at the tilt π\*, whoever wrote them.
# - If nothing contradicts the labels, the loss has no minimum and Δ grows. So stop early.
# - Both log-probs may fall, because better answers need the probability. The smaller β, the more they fall.
# - Pairs say nothing about broken texts, so probability can go there. The loss does not show it, nor does it show swapped
#   labels. Rewards and samples do.
#
# Next: [09b](09b_siblings.ipynb), what β and the shape of the loss mean. The code is `minialign/methods/dpo.py`;
# [METRICS](../../docs/METRICS.md) explains each logged number.
#
# ## Exercises
#
# **Exercise 1** (easy, try this, 5 minutes). The last run of section 7 loses the language. Add some SFT on the chosen
# answers: `train(0.1, PAIRS[:, :100], sft=0.1)`. Predict what happens to the chosen log-prob, to the well-formed share
# and to the reward. Then run it.
#
# **Exercise 2** (medium, 15 minutes). A judge in a circle: the first answer beats the second, the second the third, and
# the third the first, each three times out of four. Where does DPO end if all answers are written equally often? And if
# ref writes them? Which assumption of section 4 is broken?
#
# **Exercise 3** (medium, 10 minutes). The reference is forgotten: Δ is $\log\pi(y^+) - \log\pi(y^-)$. Where does this
# end on the three completions? Predict, then compute it with `land`.
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# The cell unpacks chosen and rejected in the wrong order. So DPO learns to prefer what the judge rejected. The loss only
# says that the policy agrees with its labels. The reward shows the error.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
reward, _ = report("swapped", all_logps(puzzling), pairs[[0, 2, 1]])  # chosen: by the judge
show_samples(puzzling, n=1)
this_run(reward < -0.2, "Swapped labels make the answers ruder.")

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The policy is its own reference: `frozen` is a second name for it, not a copy. Then Δ is 0 at every step and the loss is
# log 2. But the reference is computed without gradient, so the gradient of the loss is not 0: every pair always counts
# with $\beta\sigma(0) = \beta/2$, however far it is in order.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
always(
    all(abs(loss - math.log(2)) < 1e-5 for loss in losses),
    "With the policy as its own reference the loss is log 2.",
)
this_run((all_logps(policy) - ref_logps).abs().max() > 1, "The policy has moved all the same.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# 88 % stays well-formed instead of 44 %: SFT trains on whole sentences. Both log-probs fall much less, and the reward
# rises less too, to 0.87 instead of 2.03.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
with_sft, sft_path = train(0.1, PAIRS[:, :100], sft=0.1)
report("without SFT", broken_path[-1])
_, formed = report("with SFT", sft_path[-1])
show_samples(with_sft, n=1)
this_run(formed > 0.8, "With some SFT most texts stay well-formed.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# No reward makes a circle, so the judge is not Bradley-Terry. If all answers are written equally often, everything
# cancels and DPO stays at ref. If ref writes, most pairs contain the frequent first answer: the third, which beats it,
# gains, and the second, which loses to it, falls. So the end depends on the writer.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
circle = torch.tensor([[0.5, 0.75, 0.25], [0.25, 0.5, 0.75], [0.75, 0.25, 0.5]])
ends = {name: land(dpo_of, writers[name], circle) for name in ("all answers alike", "ref")}
for name, end in ends.items():
    print(f"written by {name:18} DPO ends at {row(end)}   log π/ref {row((end / ref).log())}")
equal(ends["all answers alike"], ref, "A circle changes nothing.", atol=1e-6, rtol=0)
always(
    ends["ref"][2] > ref[2] and ends["ref"][1] < ref[1],
    "Written by ref, the third answer gains and the second loses.",
)

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# The fitted reward is now $\beta\log\pi$, so DPO ends at $\propto e^{r/\beta}$: at π\* for a reference that says all
# answers alike.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def without_ref(pairs):
    return my_dpo(pairs.chosen, pairs.rejected, 0, 0, BETA)


print("with ref   ", row(best))
print("without ref", row(land(without_ref)))
equal(land(without_ref), (r / BETA).softmax(0), "No ref: e^(r/β).", atol=1e-4, rtol=0)
