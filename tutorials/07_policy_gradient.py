# %% [markdown]
# # 07 · Policy gradients: REINFORCE, RLOO, GRPO
#
# **You will build** the loop that trains a language model from a reward: sample, score, compute a loss, update,
# repeat. Then you will build three [baselines](../GLOSSARY.md#baseline) for it, those of REINFORCE, RLOO and GRPO,
# and see which one learns fastest and why. At the end you add the KL penalty, and find out where it belongs.
#
# **Time:** 25 minutes of reading, about 35 seconds of computer.
#
# **You need:** [03](03_logps.ipynb) (log-probs of a completion), [05](05_inverse_rl.ipynb) (π\* ∝ ref·e^(r/β)) and
# [06](06_reward.ipynb) (what a reward is).
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

import torch

from minialign import kl
from minialign.batch import collate
from minialign.logps import token_logps
from minialign.methods import grpo, reinforce, rloo
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.task import (
    POLITE_ENDINGS,
    POLITE_OPENINGS,
    RUDE_ENDINGS,
    RUDE_OPENINGS,
    THINGS,
    builtin_prompt,
    gold_reward,
)
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import policy_gradient as figures
from tutorials.figures.loop import rlhf_loop

torch.set_default_dtype(torch.float64)  # so that "equal" can mean twelve digits
torch.set_num_threads(1)  # the models are so small that a second core only waits


# %% [markdown]
# ## The question
#
# In tutorial 04 somebody wrote good answers, and the model imitated them. Now nobody shows a better answer. The
# [policy](../GLOSSARY.md#policy) writes one, and a program or a reward model returns a number. The number has no
# gradient: a program cannot be differentiated, and neither can a token that was drawn at random. How does the number
# change the weights?

# %%
rlhf_loop(
    ["policy", "completions", "reward", "update"],
    "07_loop.png",
    alt="The loop: the policy samples completions, the reward scores them, the update follows.",
)

# %% [markdown]
# The completions of one turn of this loop, with their rewards, are a [rollout](../GLOSSARY.md#rollout). We use each
# rollout for one update and then throw it away, because it must come from the present policy. That is called
# [on-policy](../GLOSSARY.md#on-policy) training.
#
# ## 1 · Three actions by hand
#
# We want a policy with a high *expected* reward. The expectation does have a gradient, because it contains the
# policy's probabilities:
#
# $$\nabla \sum_y \pi(y)\, r(y) = \sum_y r(y)\, \nabla \pi(y) = \sum_y \pi(y)\, r(y)\, \nabla \log \pi(y)
# = \mathbb{E}_{y \sim \pi}\big[ r(y)\, \nabla \log \pi(y) \big]$$
#
# First step: rewards do not depend on the weights, so the gradient goes past them. Second: $\nabla \log \pi = \nabla
# \pi / \pi$, the *log-derivative trick*. Third: a sum weighted with π is an average over the policy's own samples. So
# we can estimate it from samples. This is the *policy gradient theorem* for one action; Williams (1992) called the
# method REINFORCE.
#
# Take three answers. For logits, $\nabla \log \pi(y)$ is a vector with 1 at place y, minus π: row y of `grad_logp`.

# %%
pi = torch.tensor([0.5, 0.3, 0.2])
r = torch.tensor([1.0, 0.0, 2.0])
grad_logp = torch.eye(3) - pi  # watch: grad_logp (3, 3)

logits = pi.log().requires_grad_()
(exact,) = torch.autograd.grad((logits.softmax(0) * r).sum(), logits)  # the left side, by autograd
for y in range(3):
    step = (r[y] * grad_logp[y] + 0.0).tolist()
    print(
        f"y = {y}   probability {pi[y]:.1f}   reward {r[y]:.0f}   one-sample gradient",
        [round(number, 2) for number in step],
    )
averaged = pi @ (r[:, None] * grad_logp)  # the right side: the mean of the three rows
print("their mean:", averaged.numpy().round(2), "  by autograd:", exact.numpy().round(2))
equal(averaged, exact, "The two sides of the policy gradient theorem are equal.")

# %% [markdown]
# The mean says: more of y = 2, less of y = 1. Half of the time, though, we draw y = 0, and its gradient pushes the
# best answer *down*. Only the average is right.
#
# ## 2 · A baseline costs nothing
#
# Subtract a constant b from all rewards. The mean gradient stays, because $\mathbb{E}[\nabla \log \pi] = \sum_y \nabla
# \pi(y) = \nabla 1 = 0$. The noise changes. We measure it as the mean squared distance between a one-sample gradient
# and the true one.

# %%
noises = {}
for b in (0.0, 0.9, 2.0, -10.0):
    A = r - b
    estimates = A[:, None] * grad_logp  # watch: estimates (3, 3)
    mean = pi @ estimates
    noises[b] = (pi @ (estimates - mean).pow(2).sum(1)).item()
    print(f"b = {b:5.1f}   mean {mean.numpy().round(2)}   noise {noises[b]:6.2f}")
    equal(mean, exact, "A constant baseline does not change the mean gradient.")
figures.arrows(pi.numpy(), r.numpy(), grad_logp.numpy(), (0.0, 0.9))

# %% [markdown]
# 0.9 is the mean reward. With it an answer is pushed up only if it was *better than usual*; what is left of a reward
# after the baseline is the [advantage](../GLOSSARY.md#advantage) A. The last row is like a reward raised by 10: the
# same task, with almost a hundred times the noise.
#
# ## 3 · Build it yourself: the loss
#
# PyTorch minimises a scalar. We write down one whose gradient is minus the estimate:
#
# $$L = -\frac1B \sum_{i=1}^{B} A_i \log \pi(y_i | x_i)$$
#
# B is the number of sampled completions, x their prompts. A completion of several tokens is one action: the log-probs
# of its tokens are added. The value of L means nothing; only its gradient does.


# %%
def my_reinforce_loss(logps, advantages, mask):
    """logps (B, T): log-prob of each token; mask (B, T): True where a token belongs to the
    completion; advantages (B,).

    Returns the scalar loss: minus the mean over completions of advantage times log-prob of the
    whole completion. Advantages are constants: no gradient may flow into them. What logps holds
    outside the mask must not count.
    """
    seq_logps = torch.where(mask, logps, 0).sum(1)  # watch: seq_logps (B,)
    return -(advantages.detach() * seq_logps).mean()


# %% [markdown]
# ### Checkpoint: value and gradient equal the project's

# %%
generator = torch.Generator().manual_seed(0)
mask = torch.rand(24, 6, generator=generator) < 0.7
logps = (-torch.rand(24, 6, generator=generator)).requires_grad_()
some = torch.randn(24, generator=generator, requires_grad=True)
mine = my_reinforce_loss(logps, some, mask)
theirs, _ = reinforce.reinforce_loss(logps, some, mask)
gradients = [torch.autograd.grad(loss, logps)[0] for loss in (mine, theirs)]
equal(mine, theirs, "my_reinforce_loss equals minialign's reinforce_loss.")
equal(*gradients, "The gradient of my_reinforce_loss equals that of minialign's.")
always(
    not torch.autograd.grad(my_reinforce_loss(logps, some, mask) + 0 * some.sum(), some)[0].any(),
    "my_reinforce_loss detaches the advantages: no gradient flows into them.",
)
print("reinforce_loss: equal")

# %% [markdown]
# ## 4 · The loop
#
# The language of polite and rude requests again. To be fast, a [token](../GLOSSARY.md#token) is a whole phrase here: a
# thing, an opening or an ending. The prompt is a thing, and a good completion is opening, thing, ending, end. We train
# a small GPT on rude speakers.

# %%
PHRASES = [*THINGS, *POLITE_OPENINGS, *RUDE_OPENINGS, *POLITE_ENDINGS, *RUDE_ENDINGS]
OPENING = len(THINGS)  # 24, the id of the first opening: 3 polite ones, then 3 rude ones
ENDING = OPENING + 6  # 30, the id of the first ending: 3 polite ones, then 3 rude ones
EOS = len(PHRASES)  # 36, the end token


def text(ids):
    spaced = [PHRASES[i] if i >= ENDING else " " + PHRASES[i] for i in ids if i != EOS]
    return "".join(spaced).strip()


def rude_requests(n, generator):
    """Prompts and completions (two lists of ids) of speakers who choose each phrase politely with
    probability 1/4.
    """
    things = torch.randint(len(THINGS), (n,), generator=generator)
    kinds = 3 * (torch.rand(2, n, generator=generator) < 0.75)  # 0 is polite, 3 is rude
    opening, ending = kinds + torch.randint(3, (2, n), generator=generator)
    end = torch.full((n,), EOS)
    said = torch.stack([OPENING + opening, things, ENDING + ending, end], dim=1)
    return things[:, None].tolist(), said.tolist()


torch.manual_seed(0)
base = GPT(GPTConfig(EOS + 1, n_layer=1, n_head=2, n_kv_head=2, n_embd=64, max_len=8))
optimizer = torch.optim.Adam(base.parameters(), lr=1e-2)
for k in range(200):
    optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / 200)
    batch = collate(*rude_requests(64, generator), pad_id=EOS)
    loss = -token_logps(base, batch).sum(1).mean()  # SFT, tutorial 04
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def tell(policy, shown=6, each=16):
    """Print an answer to each of a few prompts, and how many of 24 · 16 are whole requests."""
    asked = [[i] for i in range(len(THINGS))]
    answers = sample(policy, asked, max_new=4, n=each, eos_id=EOS, seed=0)
    for i in range(shown):
        print(f"   {THINGS[i]:8} -> {text(answers.completions[each * i])}")
    whole = [
        len(y) == 4 and OPENING <= y[0] < ENDING <= y[2] < EOS and y[1] == i // each
        for i, y in enumerate(answers.completions)
    ]
    print(f"   whole requests: {sum(whole) / len(whole):.0%}")


tell(base)

# %% [markdown]
# The reward: 0 to 5 marks for manners. Opening and ending give 2 each if polite, 1 if there is none, 0 if rude; naming
# the thing gives 1. Real prompts are not equally easy. So every answer about a thing with "a", such as *a map*, gets 2
# marks more. This bonus changes nothing about which answer is better.
#
# Stop in `train` at its first call, at `advantages`: B is 32, and none is negative.


# %%
def manners(prompts, completions):
    """Lists of ids -> marks (B,) from 0 to 5."""
    asked = [builtin_prompt(PHRASES[x[0]]) for x in prompts]
    return torch.tensor(gold_reward(asked, [text(y) for y in completions])) + 2


def bonus(prompts):
    return torch.tensor([2.0 * PHRASES[x[0]].startswith("a ") for x in prompts])


GROUP = 4  # G: completions of each prompt in a rollout
PROMPTS = 8  # N: prompts in a rollout


def train(advantages_of, seed=0, steps=80, lr=1e-3):
    """Returns the trained policy and the mean marks of each step. advantages_of(rewards (B,), past)
    -> (B,).
    """
    policy = copy.deepcopy(base)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    past = []
    marks = []
    for k in range(steps):
        prompts = torch.randperm(len(THINGS), generator=draw)[:PROMPTS, None].tolist()
        answers = sample(policy, prompts, max_new=4, n=GROUP, eos_id=EOS, seed=(seed, k))  # sample
        asked = [x for x in prompts for _ in range(GROUP)]  # G answers to a prompt are neighbours
        graded = manners(asked, answers.completions)  # score
        rewards = graded + bonus(asked)  # watch: rewards (B,)
        advantages = advantages_of(rewards, past)  # watch: advantages (B,)
        logps = token_logps(policy, answers)  # watch: logps (B, T), with gradient
        loss = my_reinforce_loss(logps, advantages, answers.mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # one update, then a fresh rollout
        past.append(rewards.mean().item())
        marks.append(graded.mean().item())
    return policy, torch.tensor(marks)


def no_baseline(rewards, past):
    return rewards


policy, marks = train(no_baseline)
print(f"marks: first ten steps {marks[:10].mean():.2f}, last ten {marks[-10:].mean():.2f}")
tell(policy)
this_run(marks[-10:].mean() > marks[:10].mean() + 0.5, "The marks rise even without a baseline.")

# %% [markdown]
# The marks rise, and the language breaks: polite phrases are repeated where a thing should stand. No reward is
# negative. So no sampled answer is made less likely by its own term of the loss, however bad it is, and what happened
# to be drawn takes over. The loop needs a baseline.
#
# ## 5 · Three baselines
#
# **REINFORCE** takes a mean of earlier rewards, in which older batches count less.


# %%
def my_running_mean(past, decay=0.9):
    """past: list of floats, the mean rewards of the batches so far, oldest first -> float, the
    baseline for the next batch.

    A weighted mean: the newest has weight 1, the one before it `decay`, then decay², … Without any
    past it is 0.
    """
    if not past:
        return 0.0
    weights = decay ** torch.arange(len(past) - 1, -1, -1)  # watch: weights (k,)
    return ((weights * torch.tensor(past)).sum() / weights.sum()).item()


# %% [markdown]
# ### Checkpoint

# %%
means = torch.randn(30, generator=generator).tolist()
baseline = reinforce.Baseline(decay=0.9)
theirs = []
for number in means:
    theirs.append(baseline.value)
    baseline.update(torch.tensor([number]))
mine = torch.tensor([my_running_mean(means[:k]) for k in range(30)])
equal(mine, torch.tensor(theirs), "my_running_mean equals minialign's Baseline.")
print("after rewards 4, 4, 0:", round(my_running_mean([4.0, 4.0, 0.0]), 3))

# %% [markdown]
# **RLOO**, REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024), samples G completions of the same prompt
# and compares each with the mean of the *others*. This baseline fits the prompt and the present policy. By hand, for
# rewards 1, 0, 0, 3: the others of the first have mean 1, so A = 0. Those of the last have mean 1/3, so A = 8/3.


# %%
def my_leave_one_out(rewards, group_size):
    """rewards (B,), the G completions of one prompt adjacent -> advantages (B,): each minus the
    mean of its G − 1 others.

    Raises ValueError for G below 2: there are no others.
    """
    if group_size < 2:
        raise ValueError(
            f"group_size {group_size}: leave-one-out needs at least 2 completions of a prompt"
        )
    groups = rewards.view(-1, group_size)  # watch: groups (N, G)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)  # (N, G)
    return (groups - others).flatten()


# %% [markdown]
# ### Checkpoint


# %%
def refused(advantages_of):
    """True if a group of one completion raises ValueError."""
    try:
        advantages_of(torch.ones(3), 1)
    except ValueError:
        return True
    return False


four = torch.tensor([1.0, 0, 0, 3])
many = torch.randn(24, generator=generator)
many[:4] = 0.5  # a group of equals
print("leave one out:", my_leave_one_out(four, 4).numpy().round(3))
for size in (2, 4, 8):
    theirs = rloo.leave_one_out(many, group_size=size)
    equal(my_leave_one_out(many, size), theirs, "my_leave_one_out equals rloo.leave_one_out.")
always(refused(my_leave_one_out), "my_leave_one_out raises ValueError for G = 1, which gives 0/0.")

# %% [markdown]
# **GRPO** (Shao et al. 2024) subtracts the mean of the *whole* group and divides by the group's standard deviation. A
# small number, `std_eps`, is added to that, so that a group of equal rewards gives 0 and not 0/0.


# %%
def my_group_advantages(rewards, group_size, std_eps=1e-4):
    """rewards (B,), the G of one prompt adjacent -> advantages (B,): (reward − mean of its group) /
    (std of its group + std_eps).

    std is the sample standard deviation (divide by G − 1). Raises ValueError for G below 2: there
    is no spread.
    """
    if group_size < 2:
        raise ValueError(
            f"group_size {group_size}: a group needs at least 2 completions of a prompt"
        )
    groups = rewards.view(-1, group_size)  # watch: groups (N, G)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + std_eps)).flatten()


# %% [markdown]
# ### Checkpoint

# %%
print("group:", my_group_advantages(four, 4).numpy().round(3))
for size in (2, 4, 8):
    theirs = grpo.group_advantages(many, group_size=size)
    equal(my_group_advantages(many, size), theirs, "my_group_advantages equals minialign's.")
always(refused(my_group_advantages), "my_group_advantages raises ValueError for G = 1 (std: NaN).")

# %% [markdown]
# Without the two checks a group of one makes every weight NaN, without an error. Now the same loop four times, each
# with three seeds.

# %%
methods = {
    "no baseline": no_baseline,
    "running mean": lambda rewards, past: rewards - my_running_mean(past),
    "leave one out (RLOO)": lambda rewards, past: my_leave_one_out(rewards, GROUP),
    "group (GRPO)": lambda rewards, past: my_group_advantages(rewards, GROUP),
}
trained = {}
curves = {}
for name, advantages_of in methods.items():
    runs = [train(advantages_of, seed) for seed in range(3)]
    trained[name] = runs[0][0]  # of seed 0
    curves[name] = torch.stack([marks for _, marks in runs])  # (3, steps)

print(f"{'mean marks in updates':24}  1-10  11-20  21-40  41-80")
for name, seeds in curves.items():
    parts = [seeds[:, a:b].mean() for a, b in ((0, 10), (10, 20), (20, 40), (40, 80))]
    print(f"{name:24}" + "".join(f"{part:7.2f}" for part in parts))
figures.curves({name: seeds.numpy() for name, seeds in curves.items()})
early = {name: seeds[:, :40].mean().item() for name, seeds in curves.items()}
best = min(early["leave one out (RLOO)"], early["group (GRPO)"])
this_run(early["no baseline"] + 0.2 < early["running mean"], "No baseline learns slowest by far.")
this_run(early["running mean"] < best + 0.05, "Groups learn at least as fast as the running mean.")

# %%
for name, policy in trained.items():
    print(name)
    tell(policy, shown=6 if "RLOO" in name else 0)

# %% [markdown]
# Nobody has shown the model better requests. It said polite ones by chance, and they were made likelier. Without a
# baseline most answers of seed 0 are no whole requests any more; with any of the three nearly all are. The few that
# broke are a reason for the penalty of section 7.
#
# ## 6 · Why: the noise of four gradients
#
# Back to the three actions, with a second prompt: higher rewards, and less at stake (3.2, 3.0, 3.4). An update draws
# twelve completions of each prompt, in groups of G. With three actions there are only $3^G$ groups, so we sum over
# all: mean and noise are exact. We divide the noise by the squared length of the mean gradient, because the learning
# rate can make up for a factor.


# %%
prompts_r = torch.stack([r, 3 + r / 5])  # (2, 3)


def measure(advantages_of, group_size):
    """Of one update: (relative noise, cosine to the true gradient, relative length along it).
    advantages_of(rewards (B,), G) -> (B,).
    """
    groups = torch.cartesian_prod(*[torch.arange(3)] * group_size)
    groups = groups.view(-1, group_size)  # watch: groups (3^G, G)
    chance = pi[groups].prod(1)  # (3^G,) the probability of each group
    means = []
    noise = 0.0
    for rewards in prompts_r:
        advantages = advantages_of(rewards[groups].flatten(), group_size).view(-1, group_size, 1)
        estimates = (advantages * grad_logp[groups]).mean(1)  # (3^G, 3) one gradient for each group
        means.append(chance @ estimates)
        of_one_group = chance @ (estimates - means[-1]).pow(2).sum(1)
        noise += of_one_group * group_size / 12  # an update takes the mean of 12/G groups
    mean = torch.cat(means)
    true = torch.cat([pi * (rewards - pi @ rewards) for rewards in prompts_r])  # both prompts
    cosine = (mean @ true / mean.norm() / true.norm()).item()
    length = (mean @ true / (true @ true)).item()
    return (noise / (mean @ mean)).item(), cosine, length


def group_mean(rewards, group_size):  # GRPO without the division
    groups = rewards.view(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


overall = (prompts_r @ pi).mean()  # where a running mean over all prompts settles
rows = {
    "no baseline": measure(lambda rewards, _: rewards, 1),
    "running mean": measure(lambda rewards, _: rewards - overall, 1),
}
for name, function in (
    ("leave one out (RLOO)", my_leave_one_out),
    ("group mean", group_mean),
    ("group (GRPO)", my_group_advantages),
):
    for size in (2, 4, 6):
        rows[name, size] = measure(function, size)
for name, (noise, cosine, length) in rows.items():
    label = name if isinstance(name, str) else f"{name[0]}, G = {name[1]}"
    print(f"{label:28} noise {noise:5.2f}   cosine {cosine:.3f}   length {length:.3f}")
    if "GRPO" not in label:
        always(cosine > 1 - 1e-9, "Without a division the mean gradient has the true direction.")
        factor = (name[1] - 1) / name[1] if "group mean" in label else 1
        always(abs(length - factor) < 1e-9, "The length is (G − 1)/G for the group mean, else 1.")
figures.noise(
    {name: rows[name][0] for name in ("no baseline", "running mean")},
    {
        name: {size: rows[name, size][0] for size in (2, 4, 6)}
        for name in ("leave one out (RLOO)", "group (GRPO)")
    },
)
always(
    rows["leave one out (RLOO)", 2][0] < rows["running mean"][0] < rows["no baseline"][0],
    "RLOO with a single other sample is less noisy than a mean over both prompts.",
)

# %% [markdown]
# - **No baseline**: most of the noise is the average height of the rewards.
# - **Running mean**: too high for one prompt, too low for the other.
# - **RLOO**: with only one other sample (G = 2) it beats the running mean. And it is unbiased: the others do not
#   depend on $y_i$.
# - **Group mean**: it contains $r_i$ itself, so the gradient is exactly $\frac{G-1}{G}$ of the true one.
# - **GRPO**: dividing by the spread gives both prompts equal weight, though five times more is at stake in the first.
#   That turns the gradient (cosine below 1). In return the unit of the reward does not matter:

# %%
for group in ([1.0, 0, 0, 3], [100.0, 0, 0, 300], [0.01, 0, 0, 0.03]):
    rewards = torch.tensor(group)
    print(
        f"{str(group):22} RLOO {my_leave_one_out(rewards, 4).numpy().round(3)}   "
        f"GRPO {my_group_advantages(rewards, 4).numpy().round(2)}"
    )

# %% [markdown]
# ## 7 · Stay near the reference: three estimators of the KL
#
# A reward alone drives the policy to whatever pays. So one subtracts β times the [KL divergence](../GLOSSARY.md#kl)
# from the [reference](../GLOSSARY.md#reference); the best policy is then π\* ∝ ref·e^(r/β) (tutorial 05). The KL must
# be estimated from samples too. With the log-ratio $d = \log \pi(y) - \log \mathrm{ref}(y)$ of a sample, three
# estimators are in use (Schulman 2020):
#
# $$k_1 = d, \qquad k_2 = \tfrac12 d^2, \qquad k_3 = d + (e^{-d} - 1)$$
#
# $k_1$ is the definition: its mean is the KL, but single values may be negative. $k_2$ is never negative but biased:
# its mean is the KL only to second order, near ref. $k_3$ adds a term of mean zero, since $\mathbb{E}_\pi[e^{-d}] =
# \sum_y \pi(y)\, \mathrm{ref}(y)/\pi(y) = 1$. All values of $k_3$ are non-negative, because $e^{-d} \ge 1 - d$.


# %%
def my_kl_estimators(logps, ref_logps):
    """logps, ref_logps: log-probs of the same samples, any one shape -> (k1, k2, k3), three tensors
    of that shape.
    """
    d = logps - ref_logps
    return d, d**2 / 2, d + (-d).exp() - 1


# %% [markdown]
# ### Checkpoint: values and means

# %%
ref = torch.tensor([0.2, 0.3, 0.5])
true_kl = pi @ (pi.log() - ref.log())
print(f"KL(π‖ref) = {true_kl:.3f}")
for k, theirs in zip(my_kl_estimators(pi.log(), ref.log()), (kl.k1, kl.k2, kl.k3), strict=True):
    name = theirs.__name__
    equal(k, theirs(pi.log(), ref.log()), f"{name} of my_kl_estimators equals minialign's {name}.")
    spread = (pi @ (k - pi @ k) ** 2).sqrt()
    print(f"{name}: values {k.numpy().round(3)}   mean {pi @ k:.3f}   spread {spread:.3f}")

# %% [markdown]
# As a number to watch, $k_3$ is best while π is near ref: the right mean, and here a third of the spread of $k_1$.
# (Far away $e^{-d}$ can be huge.) In a *loss* the order is another. There the samples are fixed, and autograd returns
# the mean of $\nabla k$, which is not the gradient of the mean of k:

# %%
logits = pi.log().requires_grad_()
live = logits.log_softmax(0)


def gradient(scalar):
    return torch.autograd.grad(scalar, logits, retain_graph=True)[0]


reverse = gradient(live.exp() @ (live - ref.log()))  # of KL(π‖ref)
forward = gradient(ref @ (ref.log() - live))  # of KL(ref‖π)
in_loss = [gradient(pi @ k) for k in my_kl_estimators(live, ref.log())]
in_reward = gradient(pi @ ((pi.log() - ref.log()) * live))  # k1 as a number, times log π
for name, value in (
    ("∇ KL(π‖ref)", reverse),
    ("∇ KL(ref‖π)", forward),
    ("k1 in the loss", in_loss[0]),
    ("k2 in the loss", in_loss[1]),
    ("k3 in the loss", in_loss[2]),
    ("k1 in the reward", in_reward),
):
    print(f"{name:17} {value.numpy().round(3) + 0.0}")
equal(in_loss[0], torch.zeros(3), "k1 in the loss has mean gradient 0.", atol=1e-12, rtol=0)
equal(in_loss[1], reverse, "k2 in the loss has the gradient of the KL.")
equal(in_loss[2], forward, "k3 in the loss has the gradient of the other KL.")
equal(in_reward, reverse, "k1 in the reward has the gradient of the KL.")

# %% [markdown]
# $k_1$ in the loss does nothing on average. $k_3$ in the loss, where GRPO puts it, follows the *other* divergence.
# $k_1$ in the reward, $R = r - \beta d$ as a constant, is right. R depends on the policy too, but that part of the
# gradient would be $-\beta\, \mathbb{E}[\nabla \log \pi] = 0$. To see where each choice ends, we follow the expected
# update until nothing changes.


# %%
def settle(loss_of, beta=0.8, steps=1500, lr=1.0):
    """Gradient descent from ref on Σ π(y)·loss(y), π(y) held fixed as sampling does -> the last
    policy (3,).
    """
    logits = ref.log().requires_grad_()
    for _ in range(steps):
        logps = logits.log_softmax(0)
        (slope,) = torch.autograd.grad(logps.exp().detach() @ loss_of(logps, beta), logits)
        logits = (logits - lr * slope).detach().requires_grad_()
    return logits.softmax(0).detach()


def with_penalty(logps, beta):
    """R = r − β·d, a constant."""
    return (r - beta * (logps - ref.log())).detach()


star = torch.tensor(closed_form.tilt(ref.numpy(), r.numpy(), 0.8))  # π*
ends = {
    "k1 in the reward": settle(lambda logps, beta: -with_penalty(logps, beta) * logps),
    "k2 in the loss": settle(
        lambda logps, beta: -r * logps + beta * my_kl_estimators(logps, ref.log())[1]
    ),
    "k3 in the loss": settle(
        lambda logps, beta: -r * logps + beta * my_kl_estimators(logps, ref.log())[2]
    ),
    "k1 in the loss": settle(
        lambda logps, beta: -r * logps + beta * my_kl_estimators(logps, ref.log())[0]
    ),
}
for name, end in {"π*": star, **ends}.items():
    print(f"{name:17} {end.numpy().round(3)}")
figures.ends(star.numpy(), {name: end.numpy() for name, end in ends.items()})
k3_end = torch.tensor(closed_form.sequence_k3_law(ref.numpy(), r.numpy(), 0.8))
equal(ends["k1 in the reward"], star, "k1 in the reward ends at π*.", atol=1e-6, rtol=0)
equal(ends["k3 in the loss"], k3_end, "k3 in the loss ends at β·ref/(c − r).", atol=1e-6, rtol=0)
print("R at π*:", with_penalty(star.log(), 0.8).numpy().round(3))

# %% [markdown]
# With $k_3$ in the loss the [fixed point](../GLOSSARY.md#closed-form) is $\pi = \beta\,\mathrm{ref}/(c - r)$. Here c
# is the one number above all rewards for which the probabilities sum to 1. It is the fixed point of GRPO *without*
# the division by the spread, for large groups and completions of one token. With the division see
# `group_normalised_law` in toy/closed_form.py, for several tokens `token_k3_law`. At π\* all R are equal (last line),
# so RLOO's advantages are 0 and it stops.
#
# ## Break it: count yourself among the others
#
# Use the group mean instead of leave-one-out. In pairs (G = 2) every advantage is halved. With the KL in the reward,
# that acts like a smaller learning rate. With the KL in the loss, only the reward is halved, so β counts double.
# (GRPO without the division is this: β acts as $\beta\, G/(G-1)$.)

# %%
double = torch.tensor(closed_form.tilt(ref.numpy(), r.numpy(), 1.6))
for place in ("reward", "loss"):
    for share, baseline in (
        (1.0, "leave one out"),
        (0.5, "group mean"),
    ):  # E[A|y] = share · (r − mean)

        def loss_of(logps, beta, share=share, place=place):
            if place == "reward":
                return -share * with_penalty(logps, beta) * logps
            return -share * r * logps + beta * my_kl_estimators(logps, ref.log())[1]

        end = settle(loss_of, steps=3000)
        print(f"KL in the {place:6}  {baseline:14} {end.numpy().round(3)}")
        right = double if place == "loss" and share == 0.5 else star
        where = "π* of 2β" if right is double else "π*"
        equal(end, right, f"KL in the {place}, {baseline}: ends at {where}.", atol=1e-6, rtol=0)

# %% [markdown]
# Only one of the four combinations ends at the wrong policy. With the KL in the reward, a test of the final policy
# would miss the bug. The table of section 6 catches it (length 0.5 at G = 2), because it tests the estimator.
#
# ## What is wrong here? (1)
#
# Two prompts, *map* and *tea*, two answers each. What do these advantages do to the answers about tea?

# %%
prompts = ["map", "tea"] * 2
rewards = torch.tensor([6.0, 1.0, 7.0, 0.0])  # of map, tea, map, tea
print(dict(enumerate(zip(prompts, my_leave_one_out(rewards, group_size=2).tolist(), strict=True))))

# %% [markdown]
# ## What is wrong here? (2)
#
# The KL in the reward, as it should be. Nothing crashes. But it does not end at π\*.

# %%
attached = settle(lambda logps, beta: -(r - beta * (logps - ref.log())) * logps)
print("ends at", attached.numpy().round(3), "  π* is", star.numpy().round(3))

# %% [markdown]
# ## What you now know
#
# - $\mathbb{E}[r\, \nabla \log \pi]$ is the gradient of the expected reward, so samples and their rewards suffice to
#   train.
# - A baseline that does not depend on the sample leaves the mean of the gradient and removes noise; of the three,
#   other answers to the same prompt make the least noisy one.
# - Dividing by the group's spread (GRPO) makes the unit of the reward irrelevant and changes the direction.
# - The KL belongs in the reward as a constant. In the loss, $k_1$ does nothing, and $k_3$ has another fixed point.
#
# [Tutorial 08](08_ppo.ipynb) uses each rollout several times, and learns a baseline for every token: PPO.
#
# ## Exercises
#
# 1. **Try this** (easy, 5 minutes): train with leave-one-out and ten times the learning rate, `lr=1e-2`. What do you
#    expect of marks and text?
# 2. **The best constant** (medium, 15 minutes): the mean reward is not quite the best baseline. Find the b with the
#    least noise for the three actions, by algebra. Why does nobody use it?
# 3. **Divide, but what?** (hard, 20 minutes): (a) divide r by *its own* spread under the policy, and then subtract
#    $\beta k_1$, undivided. Follow it with `settle` for β = 2, 1.5 and 0.8. (b) First form $R = r - \beta k_1$, then
#    divide R by the spread of R. Which one has π\* as its fixed point? `closed_form.collapse_threshold(ref, r)` says
#    below which β the other one breaks.
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# Groups must be adjacent: the order has to be map, map, tea, tea. Here each answer about tea is compared with one
# about a map, gets a negative advantage, and is pushed down, the good one too. The mean gradient is still right,
# because the other answer is independent of this one. The noise grows, so learning only seems slow. In the right
# order the advantages are −1, 1 and 1, −1.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
sorted_rewards = torch.tensor([6.0, 7.0, 1.0, 0.0])
always(
    my_leave_one_out(sorted_rewards, 2).tolist() == [-1, 1, 1, -1],
    "In the right order my_leave_one_out compares tea with tea.",
)

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# R was not detached. The product rule adds $-\beta \log \pi \cdot \nabla \log \pi$, which is not 0 on average, and the
# fixed point becomes $\propto \sqrt{\mathrm{ref} \cdot e^{r/\beta}}$. Even with r = 0 it would leave the reference.
# `my_reinforce_loss` detaches.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
root = (ref * (r / 0.8).exp()).sqrt()
end_attached = root / root.sum()
equal(attached, end_attached, "Without detach it ends at √(ref·e^(r/β)).", atol=1e-6, rtol=0)

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The marks rise to about 3 and stay there, with answers such as "i would like i would like i would like". A polite
# opening alone pays that much. A few large steps made one phrase likely in every place, so no sample names the thing
# or ends politely any more, and what is never sampled cannot be made likelier.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
wild, marks = train(methods["leave one out (RLOO)"], lr=1e-2)
print("last ten steps:", round(marks[-10:].mean().item(), 2))
tell(wild)

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The noise is $\mathbb{E}[(r - b)^2\, \|\nabla \log \pi\|^2]$ minus a constant: a parabola in b, lowest at $b =
# \mathbb{E}[r\, \|\nabla \log \pi\|^2] / \mathbb{E}[\|\nabla \log \pi\|^2]$. It is a mean reward in which rare answers
# count more. It needs the gradient of every single completion, and gains little.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
lengths = grad_logp.pow(2).sum(1)
best = (pi @ (r * lengths) / (pi @ lengths)).item()


def noise_at(b):
    return (pi @ ((r - b) ** 2 * lengths) - exact @ exact).item()


print(f"b = {best:.3f}: noise {noise_at(best):.4f};  b = 0.9: noise {noise_at(0.9):.4f}")
always(
    noise_at(best) <= min(noise_at(best + 0.01), noise_at(best - 0.01), noise_at(0.9)),
    "The noise is lowest at the best b.",
)

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# (b) ends at π\* for every β: there R is the same for all answers, and the division only scales the step. (a) has the
# fixed point ref·e^(r/(β·spread)), with the spread of r under it. A smaller spread makes r count more, which sharpens
# the policy, which makes the spread smaller. Below the threshold this never stops, and the policy collapses onto the
# best answer.
#
# </details>


# %% tags=["solution"] jupyter={"source_hidden": true}
def spread_of(values, p):
    return (p @ (values - p @ values) ** 2).sqrt() + 1e-9


def divide_r(logps, beta):
    p = logps.exp().detach()
    d = (logps - ref.log()).detach()
    return -((r - p @ r) / spread_of(r, p) - beta * d) * logps


def divide_all(logps, beta):
    p = logps.exp().detach()
    R = with_penalty(logps, beta)
    # 0.05, because the spread of R goes to 0 near π*, and the steps would grow without bound
    return -(R - p @ R) / (spread_of(R, p) + 0.05) * logps


threshold, _ = closed_form.collapse_threshold(ref.numpy(), r.numpy())
print(f"threshold: β = {threshold:.3f}")
for beta in (2.0, 1.5, 0.8):
    a = settle(divide_r, beta, steps=4000, lr=0.2)
    b = settle(divide_all, beta, steps=4000, lr=0.05)
    tilted = torch.tensor(closed_form.tilt(ref.numpy(), r.numpy(), beta))
    print(
        f"β = {beta}:  (a) {a.numpy().round(3)}   (b) {b.numpy().round(3)}   "
        f"π* {tilted.numpy().round(3)}"
    )
    always((a[2].item() > 0.99) == (beta < threshold), "(a) collapses exactly below the threshold.")
    equal(b, tilted, "(b) ends at π*.", atol=1e-3, rtol=0)
