# %% [markdown]
# # 09 · DPO: the policy is its own reward model
#
# **You will build** direct preference optimisation (DPO; Rafailov et al. 2023) from two equations, train a small GPT
# with it until most rude requests become polite, see what else it does to the GPT, and answer a question that many
# ask about DPO: why do *both* log-probs fall?
#
# **Time:** 30 minutes of reading, 40 seconds of computer.
#
# **You need:** [05, inverse RL](05_inverse_rl.ipynb) for the tilt, [06, rewards](06_reward.ipynb) for Bradley-Terry.
# It helps to know what [08, PPO](08_ppo.ipynb) costs.
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
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import dpo as figures
from tutorials.figures.loop import rlhf_loop
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


def row(numbers, digits=3):
    return (
        "[" + " ".join(f"{number:.{digits}f}" for number in torch.as_tensor(numbers).tolist()) + "]"
    )


# %% [markdown]
# ## The question
#
# People compared answers: for each [prompt](../GLOSSARY.md#prompt) somebody saw two and chose one. Such a
# [preference](../GLOSSARY.md#preference) can train a reward model (06), and a [reward](../GLOSSARY.md#reward) can
# train a [policy](../GLOSSARY.md#policy) (07, 08). The second training is expensive: it samples at every step, PPO
# also trains a critic, and it easily becomes unstable. Can we go from the pairs to the policy directly?

# %%
figures.two_routes()

# %% [markdown]
# Of the loop in 06 to 08, DPO keeps the parts in colour:

# %%
rlhf_loop(
    {"policy", "reference", "update"},
    "09_loop.png",
    "The loop of tutorials 06 to 08; for DPO only policy, reference and update are in colour.",
)

# %% [markdown]
# ## 1 · The data: pairs of requests
#
# We use the project's small language of requests. A speaker answers "ask for tea:" with an opening, the thing, and an
# ending: 36 possible answers to a prompt. Our speakers are mostly rude. The judge's reward counts politeness: it runs
# from −1 (rude opening and ending) to 3 (both polite). [Bradley-Terry](../GLOSSARY.md#bradley-terry) says how the
# judge chooses: the first of two answers wins with probability $\sigma(r_1 - r_2)$.

# %%
def my_judged_pairs(probs, rewards, n_pairs, generator):
    """probs, rewards (N, C), for N prompts with C answers -> a tensor (3, n_pairs) of indices.

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
# Two answers whose rewards differ by $\log 3$: the better one must be chosen three times out of four.

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
PAIRS = my_judged_pairs(speaker, rewards, 100, generator)  # watch: PAIRS (3, 100)
PROMPT, CHOSEN, REJECTED = PAIRS  # watch: PROMPT (100,)
for x, yes, no in PAIRS.T[:4]:
    print(f"{prompts[x]}  chosen: {texts[x][yes]:32} rejected: {texts[x][no]}")

# %% [markdown]
# ## 2 · DPO from two equations
#
# **Equation one** says what the best policy is, if the reward $r$ is known. Let ref be the
# [reference](../GLOSSARY.md#reference), the policy before training, and let β say how many units of reward one
# [nat](../GLOSSARY.md#nats) of [KL divergence](../GLOSSARY.md#kl) from ref costs. Tutorial 05 derived the best
# policy, the [tilt](../GLOSSARY.md#tilt). Solve it for the reward:
#
# $$\pi^*(y) = \frac{\mathrm{ref}(y)\, e^{r(y)/\beta}}{Z}
#   \quad\Longrightarrow\quad r(y) = \beta \log\frac{\pi^*(y)}{\mathrm{ref}(y)} + \beta \log Z .$$
#
# $Z$ is a sum over all completions of the prompt, which nobody can compute for a real model.
#
# **Equation two** is Bradley-Terry. It contains only a *difference* of two rewards to the same prompt, so
# $\beta\log Z$ cancels:
#
# $$P(y^+ \text{ chosen over } y^-) = \sigma\big(r(y^+) - r(y^-)\big) = \sigma(\beta\Delta), \qquad
#   \Delta = \log\frac{\pi(y^+)}{\mathrm{ref}(y^+)} - \log\frac{\pi(y^-)}{\mathrm{ref}(y^-)} .$$
#
# $y^+$ is the chosen answer and $y^-$ the rejected one. Δ is the **margin**: how much more the policy has raised the
# [log-prob](../GLOSSARY.md#log-prob) of $y^+$ than that of $y^-$. (Training logs show $\beta\Delta$ under
# `rewards/margins`.) Now fit the policy to the choices by maximum likelihood:
#
# $$L_\mathrm{DPO} = -\mathbb{E}\,\log\sigma(\beta\Delta) .$$

# %% [markdown]
# ## 3 · Three completions, by hand
#
# Suppose a prompt had only three answers, "tea!", "tea, please" and "could i have tea". Let ref say them with
# probability .6, .3, .1. The judge prefers each to the one before with odds 2 : 1, so $e^r = 1, 2, 4$. With
# $\beta = \frac12$, $e^{r/\beta} = 1, 4, 16$. Multiply: $.6,\ 1.2,\ 1.6$, whose sum is $Z = 3.4$. So
# $\pi^* = \frac{3}{17}, \frac{6}{17}, \frac{8}{17}$.

# %%
BETA = 0.5
ref = torch.tensor([0.6, 0.3, 0.1])
r = torch.tensor([1.0, 2.0, 4.0]).log()
best = (ref.log() + r / BETA).softmax(0)  # π*
prefer = (r[:, None] - r).sigmoid()  # watch: prefer (3, 3): [a, b] is how often a is chosen over b
this_run(torch.allclose(best * 17, torch.tensor([3.0, 6.0, 8.0])), "π* is (3, 6, 8)/17.")
log_ratio = (best / ref).log()
print(
    "r            ",
    row(r),
    "\nβ·log π*/ref ",
    row(BETA * log_ratio),
    f"  each smaller by β·log Z = {BETA * math.log(3.4):.3f}",
)
print(
    "σ(β·Δ), third answer over first:",
    (BETA * (log_ratio[2] - log_ratio[0])).sigmoid().item(),
    "  the judge:",
    prefer[2, 0].item(),
)
equal(
    (BETA * (log_ratio[:, None] - log_ratio)).sigmoid(),
    prefer,
    "σ(β·Δ) at π* is the judge's probability, for every pair.",
)

# %% [markdown]
# ## 4 · Build it yourself: the loss
#
# The log-probs are sums over the tokens of each answer. We add one option, which section 6 needs: `flip`, the share
# of labels that we take to be wrong. The loss then is
# $-(1-\mathrm{flip})\log\sigma(\beta\Delta) - \mathrm{flip}\,\log\sigma(-\beta\Delta)$. (This variant is called
# cDPO.)


# %%
def my_dpo(chosen, rejected, ref_chosen, ref_rejected, beta, flip=0.0):
    """Four log-probs of whole answers, each (B,) -> the loss of each pair (B,).

    flip: the share of labels taken to be wrong. Use softplus: −log σ(z) = softplus(−z).
    Stop in it at the first call: delta has 16 entries; where delta is 0 the loss is log 2 = 0.693.
    """
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)  # watch: delta (B,)
    return (1 - flip) * softplus(-beta * delta) + flip * softplus(beta * delta)


# %% [markdown]
# ### Checkpoint

# %%
four = (
    -4 * torch.rand(4, 16, generator=generator)
).requires_grad_()  # chosen, rejected, and both of ref
for flip in (0.0, 0.1):
    mine = my_dpo(*four, BETA, flip).mean()
    theirs, _ = dpo.dpo_loss(*four, beta=BETA, label_smoothing=flip)
    equal(mine, theirs, "my_dpo equals minialign's dpo_loss.")
    equal(
        torch.autograd.grad(mine, four),
        torch.autograd.grad(theirs, four),
        "The gradient of my_dpo equals that of minialign's dpo_loss.",
    )
as_reward_model, _ = bradley_terry_loss(BETA * (four[0] - four[2]), BETA * (four[1] - four[3]))
print(f"DPO                                                  {my_dpo(*four, BETA).mean():.10f}")
print(f"reward model's loss, with β·log(π/ref) as the reward {as_reward_model:.10f}")
equal(
    my_dpo(*four, BETA).mean(),
    as_reward_model,
    "my_dpo is the reward model's loss with the reward β·log(π/ref).",
)

# %% [markdown]
# DPO is the reward model's loss of tutorial 06, with $\beta\log\frac{\pi}{\mathrm{ref}}$ as the reward. Its gradient
# is
#
# $$\nabla L = -\beta\,\sigma(-\beta\Delta)\,\big(\nabla\log\pi(y^+) - \nabla\log\pi(y^-)\big) .$$
#
# The factor $\sigma(-\beta\Delta)$ is the probability that the policy, read as a reward model, gives to the *wrong*
# order. A pair that is already in order hardly counts.
#
# ## 5 · Where it ends, whoever wrote the pairs
#
# With three answers we can replace sampling by sums over all nine pairs. `mu` is the
# [distribution](../GLOSSARY.md#distribution) of whoever wrote the answers. The optimiser is LBFGS from torch, a
# quasi-Newton method: it estimates the curvature of the loss from past gradients.

# %%
three = torch.arange(3)
WON, LOST = torch.cartesian_prod(three, three).T  # watch: WON (9,): all nine pairs


def land(loss_of, mu=ref, prefer=prefer, ref=ref):
    """The policy (3,) with the smallest expected loss. loss_of: four log-probs (9,) -> (9,)."""
    logits = ref.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=300,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    weight = mu[WON] * mu[LOST] * prefer[WON, LOST]  # watch: weight (9,): of a pair and label

    def loss():
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        value = (weight / weight.sum()) @ loss_of(
            logps[WON], logps[LOST], ref.log()[WON], ref.log()[LOST]
        )
        value.backward()
        return value

    optimizer.step(loss)
    return logits.detach().softmax(0)


uniform = torch.ones(3) / 3
writers = {
    "ref": ref,
    "all answers alike": uniform,
    "nearly always the third": torch.tensor([0.05, 0.05, 0.9]),
    "π* itself": best,
}
for name, mu in writers.items():
    end = land(lambda *logps: my_dpo(*logps, BETA), mu)
    print(f"pairs written by {name:24} DPO ends at {row(end, 5)}")
    equal(end, best, "DPO ends at π*, whoever wrote the pairs.", atol=1e-5, rtol=0)

# %% [markdown]
# It ends at π\* each time. For each pair, the label frequency depends on the judge only, not on who wrote it, and one
# policy fits all pairs. This includes **online DPO** (Guo et al. 2024), where the policy generates its own pairs; the
# last row shows its [fixed point](../GLOSSARY.md#closed-form). Who writes the pairs matters for the noise, not for
# the end.
#
# This needs three assumptions. The judge follows Bradley-Terry (exercise 2 breaks this one). Every answer occurs in
# the pairs, and the policy can represent π\*. And every pair was judged so often that the label frequencies are right.
# No real data set is like that. The next section breaks the third assumption, section 7 the last two.
#
# ## 6 · Break it: labels that never contradict each other
#
# A real data set judges each pair once, so every preference in it is certain. Take one pair, the third answer chosen
# over the first, again and again, and descend on three logits. The gradient of Δ is +1 for the logit of $y^+$, −1 for
# that of $y^-$, and 0 for the other; the normaliser of the softmax cancels. So a step of size lr changes Δ by
# $-2\,\mathrm{lr}\cdot\frac{dL}{d\Delta}$.


# %%
def my_delta_path(beta, steps, lr=0.1, flip=0.0):
    """Δ before each step and after the last: a list of steps + 1 floats that begins with 0.0.

    Each step adds −2·lr·dL/dΔ, where dL/dΔ = −(1 − flip)·β·σ(−βΔ) + flip·β·σ(βΔ).
    Use math.exp; no tensors are needed.
    """
    path = [0.0]
    for _ in range(steps):
        up = 1 / (1 + math.exp(-beta * path[-1]))  # σ(β·Δ)
        path.append(path[-1] - 2 * lr * beta * (flip * up - (1 - flip) * (1 - up)))
    return path


# %% [markdown]
# ### Checkpoint
#
# The same descent with autograd and your loss.

# %%
for flip in (0.0, 0.1):
    logits = ref.log()
    for _ in range(200):
        logits.requires_grad_()
        logps = logits.log_softmax(0)
        (slope,) = torch.autograd.grad(
            my_dpo(logps[2], logps[0], ref.log()[2], ref.log()[0], BETA, flip), logits
        )
        logits = (logits - 0.1 * slope).detach()
    moved = logits - ref.log()
    always(
        abs((moved[2] - moved[0]).item() - my_delta_path(BETA, 200, flip=flip)[-1]) < 1e-9,
        "my_delta_path follows the Δ of autograd's descent.",
    )

paths = {f"β = {beta}": my_delta_path(beta, 100_000) for beta in (0.25, 0.5, 1.0)}
paths["β = 0.5, flip = 0.1"] = my_delta_path(0.5, 100_000, flip=0.1)
stop = math.log(0.9 / 0.1) / 0.5
print("Δ after steps         " + "".join(f"{10**k:9}" for k in range(6)))
for name, path in paths.items():
    print(f"{name:22}" + "".join(f"{path[10**k]:9.2f}" for k in range(6)))
for beta in (0.25, 0.5, 1.0):
    path = paths[f"β = {beta}"]
    print(
        f"β = {beta}: the last factor of 10 in steps added {path[-1] - path[10_000]:.2f} nats; "
        f"log(10)/β = {math.log(10) / beta:.2f}"
    )
    this_run(
        abs(path[-1] - path[10_000] - math.log(10) / beta) < 0.1 / beta,
        "DPO's margin grows by log(10)/β for ten times the steps.",
    )
this_run(
    abs(paths["β = 0.5, flip = 0.1"][-1] - stop) < 1e-3,
    "With flip = 0.1 the margin stops at log((1 − flip)/flip)/β.",
)
figures.certain_labels(paths, {"β = 0.5, flip = 0.1": stop})

# %% [markdown]
# DPO's margin grows like $\frac1\beta \log(\text{steps})$, without end. A smaller β ends *further* from ref, and no β
# stops it: β pulls towards ref only where labels contradict each other. Two things stop it. One is the end of the
# training. The other is doubt: with flip > 0 no label is certain, and the margin ends at
# $\frac1\beta\log\frac{1-\mathrm{flip}}{\mathrm{flip}}$. IPO, in [09b](09b_siblings.ipynb), is a third.
#
# ## 7 · A GPT learns from the pairs
#
# A GPT first learns to speak like the rude speakers ([SFT](../GLOSSARY.md#sft), tutorial 04), then DPO trains it on
# our 100 pairs. A token is a word here, which makes the training fast. There are 36 well-formed answers to a prompt,
# so we can compute the probability of all of them at every step.


# %%
# From tutorials/word_requests.py: rude_gpt does the SFT, rows_of(n, c) is the Batch of answers c to
# prompts n, and all_logps gives log π of all 36 answers to the 4 prompts.
base = rude_gpt(generator)
ref_logps = all_logps(base)  # watch: ref_logps (4, 36)
print(
    f"probability of well-formed answers: {ref_logps.exp().sum(1).mean():.3f}. The base model says:"
)
show_samples(base)

# %% [markdown]
# `my_dpo_step` connects the models with the loss. The reference is a constant, so it needs no gradient.


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
# Train for 100 steps with β = 0.1. The printed reward is the mean over well-formed answers; the last column says how
# likely such an answer is at all.


# %%
def train(loss_of, steps=100, lr=3e-4, pairs=PAIRS):
    """A trained copy of base, and (steps + 1, 4, 36) log-probs of all answers along the way."""
    policy = copy.deepcopy(base).requires_grad_(True)
    shuffle = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, betas=(0.9, 0.99))
    path = [all_logps(policy)]
    for _ in range(steps):
        some = torch.randperm(pairs.shape[1], generator=shuffle)[:32]
        n, yes, no = pairs[:, some]
        loss = loss_of(policy, rows_of(n, yes), rows_of(n, no))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(all_logps(policy))
    return policy, torch.stack(path)


def report(name, logps, pairs=PAIRS):
    """One line: what became of the pairs, and of the language."""
    n, yes, no = pairs
    probs = logps.exp()
    formed = probs.sum(1)
    reward = ((probs * rewards).sum(1) / formed).mean()
    print(
        f"{name:18} log π: chosen {logps[n, yes].mean():6.1f}, "
        f"rejected {logps[n, no].mean():6.1f}"
        f"   reward {reward:5.2f}   well-formed {formed.mean():.2f}"
    )


trained, path = train(lambda policy, *pair: my_dpo_step(policy, base, *pair, 0.1))
for steps in (0, 10, 30, 80, 100):
    report(f"DPO, {steps} steps", path[steps])
show_samples(trained)
chosen = path[:, PROMPT, CHOSEN].mean(1)  # watch: chosen (101,)
rejected = path[:, PROMPT, REJECTED].mean(1)
this_run(
    chosen[-1] < chosen[0] - 2 and rejected[-1] < chosen[-1],
    "Both log-probs fall, the rejected one more.",
)
figures.both_fall(chosen.tolist(), rejected.tolist())

# %%
in_a_pair = torch.zeros(4, 36, dtype=torch.bool)
in_a_pair[PROMPT, CHOSEN] = in_a_pair[PROMPT, REJECTED] = True
probs = path.exp()
seen = (probs * in_a_pair).sum(2).mean(1)
figures.where_mass_goes(seen, probs.sum(2).mean(1) - seen)

# %% [markdown]
# After ten steps all is as hoped. At step 30 the language has broken down: well-formed answers have 5 % of the
# probability. At step 100 they have 54 %, and are mostly polite. But both log-probs fell by many nats (the chosen one
# not evenly: −16, −12, −15), and much of the probability went to texts that are not well-formed. No pair contains such
# a text, so the loss says nothing about it.
#
# ## 8 · Why do both log-probs fall?
#
# `logps/chosen` falls, although it is the *chosen* answer. Is a sign wrong? No. The loss sees only the distance Δ. Four
# other things decide where the two ends go.
#
# **Cause 1: probabilities sum to 1.** A chosen answer has won one comparison, but better answers need its
# probability. At the end of DPO,
#
# $$\log\frac{\pi^*(y)}{\mathrm{ref}(y)} = \frac{r(y)}{\beta} - \log Z < 0 \iff r(y) < \beta\log Z .$$
#
# The number $\beta\log Z = \beta\log\mathbb{E}_{\mathrm{ref}}\,e^{r/\beta}$ is near the mean reward for a large β and
# near the *best* reward for a small one. Chosen answers below it fall. PPO has the same π\* and lowers them just as
# much; it only logs no such number. For our speakers we can count exactly:

# %%
wins = (
    speaker[0] * speaker[0][:, None] * (rewards[0][:, None] - rewards[0]).sigmoid()
)  # (36, 36) chosen, rejected
wins.fill_diagonal_(0)
wins = wins / wins.sum()
falls = []
for beta in (2.0, 0.5, 0.1):
    soft_best = beta * (speaker[0].log() + rewards[0] / beta).logsumexp(0)
    change = (rewards[0] - soft_best) / beta  # watch: change (36,): log π*/ref
    falls.append((wins.sum(1) @ (change < 0).double()).item())
    print(
        f"β = {beta:3.1f}: β·log Z = {soft_best:5.2f}; {100 * falls[-1]:3.0f} % of the chosen "
        "answers fall; mean change of "
        f"log π: chosen {wins.sum(1) @ change:6.2f}, rejected {wins.sum(0) @ change:6.2f}"
    )
always(falls == sorted(falls), "A smaller β lowers at least as many of the chosen answers.")

# %% [markdown]
# **Cause 2: SFT came first.** The usual recipe fits ref to the chosen answers, then runs DPO on the same pairs. But
# SFT puts the mean log-prob of the chosen answers at its maximum, so every change from there lowers it. On the three
# completions:

# %%
chosen_share = (ref[:, None] * ref * prefer).sum(1)
chosen_share = chosen_share / chosen_share.sum()  # SFT on the chosen answers ends here
after = land(lambda *logps: my_dpo(*logps, BETA), ref=chosen_share)
print(
    f"mean log π(chosen): after SFT {chosen_share @ chosen_share.log():.3f}, "
    f"after DPO {chosen_share @ after.log():.3f}"
)
always(
    chosen_share @ after.log() < chosen_share @ chosen_share.log(),
    "SFT has put the mean log-prob of the chosen answers at its maximum: DPO lowers it.",
)

# %% [markdown]
# **Cause 3: the network shares its weights.** Compare the GPT with a *table of answers*: 36 free logits for each
# prompt, where changing one answer says nothing about another. Same loss, same pairs. We look when the mean Δ first
# exceeds 2, 5 and 10.
#
# **Cause 4: the learning rate.** The third run is the GPT at a third of the rate.

# %%
logits = ref_logps.clone().requires_grad_()
tabled = []
optimizer = torch.optim.Adam([logits], lr=5e-2, betas=(0.9, 0.99))
for _ in range(300):
    logps = logits.log_softmax(1)
    pair = logps[PROMPT, CHOSEN], logps[PROMPT, REJECTED]
    ref_pair = ref_logps[PROMPT, CHOSEN], ref_logps[PROMPT, REJECTED]
    tabled.append([(pair[0] - ref_pair[0]).mean().item(), (pair[1] - ref_pair[1]).mean().item()])
    optimizer.zero_grad()
    my_dpo(*pair, *ref_pair, 0.1).mean().backward()
    optimizer.step()
_, slow_path = train(
    lambda policy, *pair: my_dpo_step(policy, base, *pair, 0.1), steps=200, lr=1e-4
)
changes = {  # of mean log π: of the chosen, of the rejected answers, (steps + 1,) each
    "table": torch.tensor(tabled).T,
    "GPT": (chosen - chosen[0], rejected - rejected[0]),
    "GPT, slower": [
        (slow_path - slow_path[0])[:, PROMPT, side].mean(1) for side in (CHOSEN, REJECTED)
    ],
}
print("change of log π                  chosen   rejected")
fell = {}
for mark in (2, 5, 10):
    for name, (up, down) in changes.items():
        reached = (up - down > mark).nonzero()
        k = reached[0].item() if len(reached) else len(up) - 1
        fell[name, mark] = up[k].item()
        print(f"Δ > {mark:2}  {name:12} step {k:4}   {up[k]:6.2f}     {down[k]:6.2f}")
    this_run(
        fell["GPT", mark] < fell["table", mark] - 1,
        "The GPT lowers the chosen answers more than the table does.",
    )
this_run(
    fell["GPT", 5] < fell["GPT, slower", 5] < fell["table", 5],
    "At Δ = 5 the slower GPT has lowered the chosen answers less, but more than the table.",
)

# %% [markdown]
# The table lowers the chosen answers late, by cause 1: with almost certain labels the answers get ranked, and the top
# one takes the probability. The GPT lowers them early. It cannot move answers one by one; it moves words. Pushing down
# "now" and "hand over" after some prefix pushes up every other word there, whether that gives a sentence or not. Large
# steps add to this: at Δ > 5 the GPT is in the breakdown of section 7, at Δ > 10 past it, so its fall is smaller there.
# The slower GPT reaches Δ = 5 with half the fall.
#
# So falling log-probs alone are no error. Watch the reward, and *read samples*.
#
# ## 9 · Break it: four slips that no accuracy shows
#
# Each of the first three slips ranks all pairs correctly by its own score, so `rewards/accuracies` is 1. Look where
# each ends.

# %%
LENGTHS = torch.tensor([1.0, 2.0, 4.0])  # words in the three completions


def averaged(*four):
    """Slip 1: log-probs averaged over the tokens instead of summed."""
    return my_dpo(
        *(x / n for x, n in zip(four, (LENGTHS[WON], LENGTHS[LOST]) * 2, strict=True)), BETA
    )


def no_ref(chosen, rejected, ref_chosen, ref_rejected):
    """Slip 2: the reference is forgotten."""
    return my_dpo(chosen, rejected, 0, 0, BETA)


def beta_outside(*four):
    """Slip 3: β stands before the logarithm instead of inside it."""
    return BETA * my_dpo(*four, 1.0)


own_score = {
    averaged: lambda end: (end / ref).log() / LENGTHS,
    no_ref: torch.log,
    beta_outside: lambda end: (end / ref).log(),
}
print(f"right                {row(best)}")
for slip, score in own_score.items():
    end = land(slip)
    accuracy = (
        (score(end)[:, None] > score(end))[r[:, None] > r].double().mean()
    )  # over the three pairs of different rewards
    gap = closed_form.kl(end.numpy(), best.numpy())
    print(
        f"{slip.__name__:20} {row(end)}   KL to π*: {gap:.3f}   "
        f"accuracy by its own score: {accuracy:.2f}"
    )
    this_run(
        (end - best).abs().max() > 0.02 and accuracy == 1,
        "Each slip orders all pairs rightly and misses π*.",
    )
without_ref = (r / BETA).softmax(0)
equal(land(no_ref), without_ref, "Without ref DPO ends at e^(r/β).", atol=1e-4, rtol=0)
prompt = -9 * torch.rand(16)
ref_prompt = -9 * torch.rand(16)
scored_too = my_dpo(
    four[0] + prompt, four[1] + prompt, four[2] + ref_prompt, four[3] + ref_prompt, BETA
)
equal(scored_too, my_dpo(*four, BETA), "The prompt's log-prob cancels in my_dpo.")
print("slip 4, prompt tokens scored as well: no change")

# %% [markdown]
# With averages the second answer ends below the first, although the judge prefers it. Slip 4 does nothing here, because
# the prompt is in both log-probs of Δ. It does harm when the same code serves SimPO or ORPO (09b), which divide by the
# length. So test the log-probs too, as in [03](03_logps.ipynb), not only the loss.
#
# ## What is wrong here? (1)

# %%
n, no, yes = my_judged_pairs(speaker, rewards, 100, torch.Generator().manual_seed(2))
pairs = torch.stack([n, yes, no])
puzzling, _ = train(
    lambda policy, *pair: my_dpo_step(policy, base, *pair, 0.1), steps=40, pairs=pairs
)
with torch.no_grad():
    loss = my_dpo_step(puzzling, base, rows_of(n, yes), rows_of(n, no), 0.1)
print(f"loss at the start 0.693, after 40 steps {loss:.3f}: it works")

# %% [markdown]
# The loss has fallen, as it should. Would you use this policy?
#
# ## What is wrong here? (2)

# %%
losses = []


def step_and_log(policy, chosen, rejected):
    losses.append(my_dpo_step(policy, policy, chosen, rejected, 0.1))
    return losses[-1]


odd, _ = train(step_and_log, steps=40)
print("loss:", ", ".join(f"{losses[k].item():.4f}" for k in (0, 10, 20, 39)))
report("after 40 steps", all_logps(odd))

# %% [markdown]
# The loss does not move at all. The policy does. Why?
#
# ## What you now know
#
# - DPO is the reward model's loss with $\beta\log\frac{\pi}{\mathrm{ref}}$ as the reward. With Bradley-Terry labels,
#   judged often enough, on pairs that contain every answer, it ends at the tilt π\*, whoever wrote them.
# - If labels never contradict each other it has no end: Δ grows like $\frac1\beta\log(\text{steps})$. Stop early, or
#   doubt the labels.
# - Both log-probs may fall: because better answers need the probability, because SFT came first, because a network
#   shares weights, because steps are large.
# - Accuracy and loss show neither swapped labels nor a missing reference. Samples and a reward do.
#
# Next: [09b, DPO's siblings](09b_siblings.ipynb). The code is `minialign/methods/dpo.py`; docs/METRICS.md explains
# each logged number.
#
# ## Exercises
#
# **Exercise 1** (easy, try this, 5 minutes). Add $-0.1\cdot\log\pi(y^+)$, averaged over the batch, to the loss of
# section 7: some SFT on the chosen answers. Predict what happens to the chosen log-prob and to the share of
# well-formed answers in 60 steps. Then run it, and β = 1 without SFT.
#
# **Exercise 2** (medium, 15 minutes). A judge in a circle: the first answer beats the second, the second the third,
# and the third the first, each three times out of four. Where does DPO end if the pairs are written evenly? And if
# ref writes them? Which assumption of section 5 is broken?
#
# **Exercise 3** (hard, 20 minutes). Some say that *within* a pair the rejected answer drags the chosen one
# down, since they share words. A first step on one pair changes $\log\pi(y^+)$ in proportion to
# $g^+\cdot(g^+ - g^-)$, where $g^\pm$ is the gradient of $\log\pi(y^\pm)$. For how many of the first 40 pairs is that
# negative at the base model? And after 20 steps of section 7?
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# `my_judged_pairs` returns prompt, chosen, rejected; the cell unpacks them in the wrong order. So DPO learns to prefer
# what the judge rejected. The loss only says that the policy agrees with its labels. The reward shows the error.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
report("swapped", all_logps(puzzling), pairs[[0, 2, 1]])  # chosen: what the judge chose
show_samples(puzzling, n=1)
probs = all_logps(puzzling).exp()
this_run(
    ((probs * rewards).sum(1) / probs.sum(1)).mean() < -0.2,
    "Swapped labels make the answers ruder.",
)

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The policy is its own reference: `my_dpo_step(policy, policy, …)`. Then Δ is 0 at every step and the loss is log 2. But
# the reference is computed without gradient, so the gradient of the loss is not 0: every pair always counts with
# $\beta\sigma(0) = \beta/2$, and no pair is ever in order. The same happens if ref is a second name for the policy
# instead of a copy.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
always(
    all(abs(loss.item() - math.log(2)) < 1e-5 for loss in losses),
    "With the policy as its own reference the loss is log 2.",
)
this_run((all_logps(odd) - ref_logps).abs().max() > 1, "The policy has moved all the same.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The chosen log-prob stays near its start, the rejected one falls by one nat, and 92 % stays well-formed: SFT on the
# chosen answers trains on whole sentences. The reward rises less. β = 1 is between: pairs lose weight sooner.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def with_sft(policy, chosen, rejected):
    return my_dpo_step(policy, base, chosen, rejected, 0.1) - 0.1 * seq_logps(policy, chosen).mean()


report("DPO, β = 0.1", path[60])
losses_of = {
    "DPO, β = 1": lambda policy, *pair: my_dpo_step(policy, base, *pair, 1.0),
    "β = 0.1, with SFT": with_sft,
}
for name, loss_of in losses_of.items():
    policy, at = train(loss_of, steps=60)
    report(name, at[-1])
show_samples(policy, n=1)
this_run(at[-1].exp().sum(1).mean() > 0.8, "With some SFT most texts stay well-formed.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# No reward makes a circle, so the judge is not Bradley-Terry, and no policy fits the three label frequencies. Written
# evenly, the three answers are alike: DPO stays at ref. If ref writes, it matters who is compared with whom. Most
# pairs contain the frequent first answer: the third, which beats it, gains, and the second, which loses to it, falls.
# Now the end depends on the writer.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
circle = torch.tensor([[0.5, 0.75, 0.25], [0.25, 0.5, 0.75], [0.75, 0.25, 0.5]])
ends = {
    name: land(lambda *logps: my_dpo(*logps, BETA), mu, prefer=circle)
    for name, mu in (("evenly", uniform), ("ref", ref))
}
for name, end in ends.items():
    print(f"written by {name:6} DPO ends at {row(end)}   log π/ref {row((end / ref).log())}")
equal(ends["evenly"], ref, "Written evenly, a circle changes nothing.", atol=1e-6, rtol=0)
always(
    ends["ref"][2] > ref[2] and ends["ref"][1] < ref[1],
    "Written by ref, the third answer gains and the second loses.",
)

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# At the base model for none of the 40: each pair alone would raise its own chosen answer. After 20 steps, while the
# mean falls fast, for 6. So it is mostly *other* pairs that lower a chosen answer here. Papers report the effect
# within a pair for large models and answers that are nearly alike.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def gradient(model, n, c):
    """The gradient of log π of answer c to prompt n, all weights in one vector."""
    grads = torch.autograd.grad(seq_logps(model, rows_of(n, c)).sum(), model.parameters())
    return torch.cat([grad.flatten() for grad in grads])


after_20, _ = train(lambda policy, *pair: my_dpo_step(policy, base, *pair, 0.1), steps=20)
lowered = {}
for name, model in {"at the base model": base, "after 20 steps": after_20}.items():
    model = copy.deepcopy(model).requires_grad_(True)
    lowered[name] = 0
    for k in range(40):
        up = gradient(model, PROMPT[[k]], CHOSEN[[k]])
        down = gradient(model, PROMPT[[k]], REJECTED[[k]])
        lowered[name] += (up @ (up - down)).item() < 0
    print(f"{name}: {lowered[name]} of 40 pairs alone would lower their chosen answer")
this_run(lowered["at the base model"] == 0, "At the base model each pair raises its chosen answer.")
this_run(
    lowered["after 20 steps"] < 20, "After 20 steps most pairs alone raise their chosen answer."
)
