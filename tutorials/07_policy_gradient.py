# %% [markdown]
# # 07 · Policy gradients: REINFORCE, RLOO, GRPO
#
# **You will build** the loop that trains a language model from a reward: sample, score, compute a loss, update,
# repeat. You also build the [baselines](../GLOSSARY.md#baseline) of REINFORCE, RLOO and GRPO, and measure how fast each
# one learns and how noisy its gradient is.
#
# **Time:** 26 minutes of reading, about 40 seconds of computer.
#
# **You need:** [03](03_logps.ipynb) (log-probs of a completion), [04](04_sft.ipynb) (SFT) and
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

from minialign.logps import token_logps
from minialign.methods import grpo, reinforce, rloo
from minialign.sample import sample
from minialign.task import THINGS
from tutorials.checks import always, equal, this_run
from tutorials.figures import policy_gradient as figures
from tutorials.figures.loop import rlhf_loop
from tutorials.phrase_requests import EOS, MAX_NEW, bonus, manners, rude_gpt, show_answers

torch.set_default_dtype(torch.float64)  # so that "equal" can mean twelve digits
torch.set_num_threads(1)  # the models are so small that a second core only waits


# %% [markdown]
# ## The question
#
# In tutorial 04 somebody wrote good answers, and the model imitated them. Now nobody shows a better answer. The
# [policy](../GLOSSARY.md#policy) writes one, and a program or a model returns a number, the
# [reward](../GLOSSARY.md#reward). We cannot differentiate this number: a program has no gradient, and drawing a token
# at random has none either. How can the number change the weights?

# %%
rlhf_loop(
    ["policy", "completions", "reward", "update"],
    "07_loop.png",
    alt="The loop: the policy samples completions, the reward scores them, the update follows.",
)

# %% [markdown]
# The completions of one turn of this loop, with their rewards, are a [rollout](../GLOSSARY.md#rollout). We use each
# rollout for one update. Then we throw it away, because the formula below needs samples of the present policy. This is
# called [on-policy](../GLOSSARY.md#on-policy) training. The reference, one of the two grey boxes, comes in
# [07b](07b_kl.ipynb).
#
# ## 1 · The policy gradient, on three actions
#
# We want a policy with a high *expected* reward. The expected reward does have a gradient, because it contains the
# policy's probabilities:
#
# $$\nabla \sum_y \pi(y)\, r(y) = \sum_y r(y)\, \nabla \pi(y) = \sum_y \pi(y)\, r(y)\, \nabla \log \pi(y)
# = \mathbb{E}_{y \sim \pi}\big[ r(y)\, \nabla \log \pi(y) \big]$$
#
# 1. The reward of a given y does not depend on the weights. So the gradient acts on π(y) only.
# 2. $\nabla \log \pi = \nabla \pi / \pi$, so $\nabla \pi = \pi\, \nabla \log \pi$.
# 3. A sum weighted with π is an average over samples of the policy. So we can estimate it from samples.
#
# This is the *policy gradient theorem* for a single action. Williams (1992) called the method REINFORCE.
#
# We check it on a policy with three answers, whose weights are three logits. Then $\nabla \log \pi(y)$ is a vector with
# 1 at place y, minus π: row y of `grad_logp`. In the last line of the output, the mean of the three one-sample
# gradients, weighted with their probabilities, is the gradient that autograd computes.

# %%
pi = torch.tensor([0.5, 0.3, 0.2])
r = torch.tensor([1.0, 0.0, 2.0])
grad_logp = torch.eye(3) - pi  # watch: grad_logp (3, 3)

logits = pi.log().requires_grad_()
(exact,) = torch.autograd.grad((logits.softmax(0) * r).sum(), logits)  # the left side, by autograd
for y in range(3):
    gradient = (r[y] * grad_logp[y] + 0.0).numpy().round(2)  # + 0.0 turns −0.0 into 0.0
    print(f"y = {y}   probability {pi[y]:.1f}   reward {r[y]:.0f}   one-sample gradient {gradient}")
averaged = pi @ (r[:, None] * grad_logp)  # the right side: the mean of the three rows
print("their mean:", averaged.numpy().round(2), "  by autograd:", exact.numpy().round(2))
equal(averaged, exact, "The two sides of the policy gradient theorem are equal.")

# %% [markdown]
# The mean raises the logit of y = 2, the best answer, and lowers that of y = 1, the worst. But half of the time we draw
# y = 0, and this one-sample gradient *lowers* the logit of the best answer. Single gradients are noisy. Only their
# average is right.
#
# ## 2 · A baseline makes it less noisy
#
# Subtract a constant b, the baseline, from all rewards. The mean gradient does not change, because
# $\mathbb{E}[b\, \nabla \log \pi] = b \sum_y \nabla \pi(y) = b\, \nabla 1 = 0$. The noise does change. We measure it
# as the mean squared distance between a one-sample gradient and the true gradient. Look at the column "noise".

# %%
for b in (0.0, 0.9, 2.0, -10.0):
    estimates = (r - b)[:, None] * grad_logp  # watch: estimates (3, 3)
    mean = pi @ estimates
    noise = (pi @ (estimates - mean).pow(2).sum(1)).item()
    print(f"b = {b:5.1f}   mean {mean.numpy().round(2)}   noise {noise:6.2f}")
    equal(mean, exact, "A constant baseline does not change the mean gradient.")
figures.arrows(pi.numpy(), r.numpy(), grad_logp.numpy(), (0.0, 0.9))

# %% [markdown]
# The noise is lowest in the second row, where b is the mean reward, 0.9. With this baseline a sample raises the
# probability of an answer only if the answer was *better than usual*. The reward minus the baseline is called the
# [advantage](../GLOSSARY.md#advantage) A. The last row, b = −10, is the same as rewards that are higher by 10: the task
# is the same, and the noise is almost a hundred times as large.
#
# ## 3 · Build it yourself: the loss
#
# PyTorch minimises a scalar. So we write down a scalar whose gradient is minus the estimate:
#
# $$L = -\frac1B \sum_{i=1}^{B} A_i \log \pi(y_i | x_i)$$
#
# B is the number of sampled completions, $x_i$ their prompts. The log-probs of the tokens of a completion are added.
# The value of L does not tell you whether training works; watch the rewards for that.


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
# ## 4 · The loop, on a small GPT
#
# The task is that of tutorial 00: ask for a thing politely. As in 04, a small GPT was first trained on rude speakers.
# To make sampling fast, a [token](../GLOSSARY.md#token) is a whole phrase here (tutorials/phrase_requests.py). The
# prompt is a thing, and a good answer is opening, thing, ending, end.
#
# The reward is a program, the gold reward of tutorial 00 plus 2. So it gives 0 to 5 *marks* for manners: 1 for naming
# the thing, and 2 each for a polite opening and a polite ending (1 each if there is none, 0 if it is rude).
#
# Real prompts are not equally easy. So every answer about a thing with "a", such as *a map*, gets a *bonus* of 2,
# however good it is.
#
# Before training, the model answers like this:

# %%
base = rude_gpt()
show_answers(base)

# %% [markdown]
# Now the loop. Each turn has four steps: sample, score, compute the loss, update. Methods differ only in
# `advantages_of`, which turns rewards into advantages. The simplest choice takes the rewards as they are.

# %%
PROMPTS = 8  # N: prompts in a rollout
GROUP = 4  # G: completions of each prompt


def train(advantages_of, seed=0, steps=60, lr=1e-3):
    """Returns the trained policy and the mean marks of each turn, (steps,).
    advantages_of(rewards (B,), past) -> (B,), where past lists the mean rewards of earlier turns.
    """
    policy = copy.deepcopy(base)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    draw = torch.Generator().manual_seed(seed)
    past, all_marks = [], []
    for k in range(steps):
        # 1. sample: G answers to each of N prompts; the answers to one prompt are neighbours
        prompts = torch.randperm(len(THINGS), generator=draw)[:PROMPTS, None].tolist()
        answers = sample(policy, prompts, max_new=MAX_NEW, n=GROUP, eos_id=EOS, seed=(seed, k))
        # 2. score
        asked = [x for x in prompts for _ in range(GROUP)]
        marks = manners(asked, answers.completions)
        rewards = marks + bonus(asked)  # watch: rewards (B,)
        # 3. the loss
        advantages = advantages_of(rewards, past)  # watch: advantages (B,)
        logps = token_logps(policy, answers)  # watch: logps (B, T), with gradient
        loss = my_reinforce_loss(logps, advantages, answers.mask)
        # 4. one update, then a fresh rollout
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        past.append(rewards.mean().item())
        all_marks.append(marks.mean().item())
    return policy, torch.tensor(all_marks)


def no_baseline(rewards, past):
    return rewards


policy, marks = train(no_baseline)
print(f"marks: first ten turns {marks[:10].mean():.2f}, last ten {marks[-10:].mean():.2f}")
show_answers(policy)
this_run(marks[-10:].mean() > marks[:10].mean() + 0.5, "The marks rise even without a baseline.")

# %% [markdown]
# The marks rise, but the language breaks: only 40 % of the answers are whole requests any more. The reason is that no
# reward is negative. The term $-r \log \pi(y)$ of a sampled answer never makes this answer less likely, however bad it
# is. So whatever happens to be drawn becomes likelier, broken answers too. The loop needs a baseline.
#
# ## 5 · Three baselines
#
# **REINFORCE** usually takes a running mean: the mean of earlier rewards, in which older turns count less.


# %%
def my_running_mean(past, decay=0.9):
    """past: list of floats, the mean rewards of the turns so far, oldest first -> float, the
    baseline for the next turn.

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
# **RLOO**, REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024), samples G completions of the same prompt,
# a *group*. The baseline of each completion is the mean reward of the *others* in its group. Take the rewards 1, 0, 0,
# 3. The others of the first have mean 1, so its advantage is 1 − 1 = 0. The others of the last have mean 1/3, so its
# advantage is 3 − 1/3 = 8/3.
#
# The baseline of $y_i$ is now random, but it does not depend on $y_i$: the others were drawn independently. So the
# proof of section 2 still holds, and the mean gradient does not change.


# %%
def my_leave_one_out(rewards, group_size):
    """rewards (B,), the G completions of one prompt adjacent -> advantages (B,): each reward minus
    the mean of the G − 1 others of its group. G is at least 2.
    """
    groups = rewards.view(-1, group_size)  # watch: groups (N, G)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)  # watch: others (N, G)
    return (groups - others).flatten()


# %% [markdown]
# ### Checkpoint

# %%
four = torch.tensor([1.0, 0, 0, 3])
many = torch.randn(24, generator=generator)
print("leave one out:", my_leave_one_out(four, 4).numpy().round(3))
for size in (2, 4, 8):
    theirs = rloo.leave_one_out(many, group_size=size)
    equal(my_leave_one_out(many, size), theirs, "my_leave_one_out equals rloo.leave_one_out.")

# %% [markdown]
# **GRPO** (Shao et al. 2024) also compares the answers of a group. Its advantages differ from RLOO's in two ways. (We
# leave out its lengths, its clip (08) and its KL (07b).)
#
# First, it subtracts the mean of the *whole* group, which contains $r_i$ itself. This only scales the advantage:
# if $m_i$ is the mean of the others, the group's mean is $\frac1G r_i + \frac{G-1}{G} m_i$, so
# $r_i - \text{mean} = \frac{G-1}{G} (r_i - m_i)$.
#
# Second, it divides by the group's standard deviation. A small number, `std_eps`, is added to the standard deviation.
# So a group of equal rewards gives 0 and not 0/0.


# %%
def my_group_advantages(rewards, group_size, std_eps=1e-4):
    """rewards (B,), the G of one prompt adjacent -> advantages (B,): (reward − mean of its group) /
    (std of its group + std_eps).

    std is the sample standard deviation (divide by G − 1). G is at least 2.
    """
    groups = rewards.view(-1, group_size)  # watch: groups (N, G)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + std_eps)).flatten()


# %% [markdown]
# ### Checkpoint
#
# The last lines of the cell compare RLOO and GRPO on the same rewards in three units.

# %%
for size in (2, 4, 8):
    theirs = grpo.group_advantages(many, group_size=size)
    equal(my_group_advantages(many, size), theirs, "my_group_advantages equals minialign's.")
share = (four - four.mean()) / my_leave_one_out(four, 4)  # 0/0 in the first place
equal(share[1:], torch.full((3,), 3 / 4), "r − group mean is (G − 1)/G of leave-one-out.")
for unit in (1, 100, 0.01):
    print(
        f"rewards {str((unit * four).tolist()):24} "
        f"RLOO {my_leave_one_out(unit * four, 4).numpy().round(3)}   "
        f"GRPO {my_group_advantages(unit * four, 4).numpy().round(2)}"
    )

# %% [markdown]
# After the division the unit of the reward does not matter (up to `std_eps`). But a prompt whose answers differ by 0.03
# now counts as much as one whose answers differ by 3. So the mean gradient is in general no longer that of the expected
# reward. In small groups the mean gradient is another one even for a single prompt: with G = 2 the advantage is ±0.71,
# whatever the difference, so the policy learns to win comparisons.
#
# ## 6 · Four methods side by side
#
# We run the loop with four `advantages_of`, each with three seeds. Look at how fast the marks rise in the first 40
# turns, and at the share of whole requests at the end.

# %%
methods = {
    "no baseline": no_baseline,
    "running mean": lambda rewards, past: rewards - my_running_mean(past),
    "leave one out (RLOO)": lambda rewards, past: my_leave_one_out(rewards, GROUP),
    "group (GRPO)": lambda rewards, past: my_group_advantages(rewards, GROUP),
}
curves = {}
print(f"{'mean marks in turns':24}  1-10  11-20  21-40  41-60")
for name, advantages_of in methods.items():
    runs = [train(advantages_of, seed) for seed in range(3)]
    curves[name] = torch.stack([marks for _, marks in runs])  # (3, steps)
    parts = [curves[name][:, a:b].mean() for a, b in ((0, 10), (10, 20), (20, 40), (40, 60))]
    print(f"{name:24}" + "".join(f"{part:7.2f}" for part in parts))
    show_answers(runs[0][0], shown=6 if "RLOO" in name else 0)
figures.curves({name: seeds.numpy() for name, seeds in curves.items()})
early = {name: seeds[:, :40].mean().item() for name, seeds in curves.items()}
best = min(early["leave one out (RLOO)"], early["group (GRPO)"])
this_run(early["no baseline"] + 0.2 < early["running mean"], "No baseline learns slowest by far.")
this_run(early["running mean"] < best + 0.05, "Groups learn at least as fast as the running mean.")

# %% [markdown]
# Nobody has shown the model a better request. It wrote polite ones by chance, and their probability rose. Without a
# baseline it learns most slowly, and most answers of seed 0 are broken at the end. With a baseline 71 % to 96 % are
# whole. Some broken ones get full marks, such as "could i get give me tea, please.", because the program looks only at
# the beginning, the thing and the ending. 07b comes back to this.
#
# ## 7 · Why: the noise of their gradients
#
# Three seeds are few, so we also compute the noise exactly, for the three actions and two prompts. An update draws
# twelve completions of each prompt, in groups of G. There are only $3^G$ different groups, so we can sum over all of
# them. We divide the noise by the squared length of the mean gradient, because a common factor acts like a learning
# rate.
#
# In the first column the rewards of the second prompt are higher by 2. In the second column both prompts have the same
# rewards. Compare the running mean with RLOO in both columns.


# %%
def exact_mean_and_noise(advantages_of, group_size, rewards):
    """(mean (3,), noise) of the gradient from twelve completions of a prompt with rewards (3,)."""
    groups = torch.cartesian_prod(*[torch.arange(3)] * group_size)
    groups = groups.view(-1, group_size)  # watch: groups (3^G, G)
    chance = pi[groups].prod(1)  # watch: chance (3^G,)
    advantages = advantages_of(rewards[groups].flatten()).view(-1, group_size, 1)
    estimates = (advantages * grad_logp[groups]).mean(1)  # (3^G, 3) one gradient for each group
    mean = chance @ estimates
    noise_of_one_group = chance @ (estimates - mean).pow(2).sum(1)
    return mean, noise_of_one_group * group_size / 12  # the mean of 12/G groups


def relative_noise(advantages_of, group_size, height):
    """Noise / squared length of the mean gradient, for prompts with rewards r and r + height."""
    parts = [exact_mean_and_noise(advantages_of, group_size, r + h) for h in (0, height)]
    return (sum(noise for _, noise in parts) / sum(mean @ mean for mean, _ in parts)).item()


rows = {}
for height in (2, 0):
    overall = pi @ r + height / 2  # the mean over both prompts, near which a running mean stays
    rows["no baseline", height] = relative_noise(lambda rewards: rewards, 1, height)
    rows["running mean", height] = relative_noise(lambda rewards, b=overall: rewards - b, 1, height)
    for name, function in (("RLOO", my_leave_one_out), ("GRPO", my_group_advantages)):
        for size in (2, 4, 6):

            def compare(rewards, function=function, size=size):
                return function(rewards, size)

            rows[f"{name}, G = {size}", height] = relative_noise(compare, size, height)
            if name == "RLOO":
                mean, _ = exact_mean_and_noise(compare, size, r + height)
                equal(mean, exact, "The mean gradient of RLOO is the true one.")
print("relative noise     prompts differ by 2   same mean")
for name in [name for name, height in rows if height == 0]:
    print(f"{name:18} {rows[name, 2]:19.2f} {rows[name, 0]:11.2f}")
figures.noise(rows)
this_run(
    rows["RLOO, G = 2", 2] < rows["running mean", 2] < rows["no baseline", 2],
    "If prompts differ by 2, RLOO with one other sample is less noisy than the running mean.",
)
this_run(
    rows["running mean", 0] < rows["RLOO, G = 6", 0],
    "If prompts have the same mean reward, the running mean is less noisy than RLOO.",
)

# %% [markdown]
# - **No baseline.** Most of the noise comes from the average height of the rewards.
# - **Running mean.** If prompts differ, it is too high a baseline for the first prompt and too low for the second. If
#   both have the same mean reward, it is the least noisy of the three, because it averages over many samples.
# - **RLOO.** Its baseline fits the prompt, so the height of a prompt makes no difference. But it is a mean of only
#   G − 1 samples, so it is noisy itself. This noise falls as G grows.
# - **GRPO.** Its noise is near that of RLOO, a little higher here.
#
# ## Break it: ten times the learning rate
#
# Even a gradient without noise is right only near the policy at which it was computed. So a step must not be too large.
# Train RLOO with `lr=1e-2`, and read the answers.

# %%
wild, marks = train(methods["leave one out (RLOO)"], lr=1e-2)
print("marks in the last ten turns:", round(marks[-10:].mean().item(), 2))
show_answers(wild)
this_run(marks[-10:].mean() < 4.1, "With ten times the learning rate the marks stop near 4.")

# %% [markdown]
# The marks stop near 4: the answers begin and end politely, but none of the six names its thing. A few large steps made
# polite phrases likely in every place. After that hardly any sample names the thing, and the loop can only make
# likelier what it samples. [07b](07b_kl.ipynb) holds the policy near the model from which it started.
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
# To make the training less noisy, somebody samples without randomness: `greedy=True` always takes the likeliest token.
# What will this run learn?

# %%
calm = sample(base, [[0]], max_new=MAX_NEW, n=4, eos_id=EOS, seed=0, greedy=True)
rewards = manners([[0]] * 4, calm.completions)
print("rewards", rewards.tolist(), "  advantages", my_leave_one_out(rewards, 4).tolist())

# %% [markdown]
# ## What you now know
#
# - $\mathbb{E}[r\, \nabla \log \pi]$ is the gradient of the expected reward. So samples and their rewards are enough to
#   train a policy.
# - A baseline that does not depend on the sample leaves the mean gradient as it is, and a good one makes it much less
#   noisy.
# - Other answers to the same prompt make the least noisy baseline of the three, if prompts differ much in their mean
#   reward.
# - GRPO divides by the group's spread. Then the unit of the reward does not matter, but the mean gradient is no longer
#   exactly that of the expected reward.
#
# Next: [07b](07b_kl.ipynb) adds the KL penalty to the loop, and shows where it must be put.
#
# ## Exercises
#
# 1. **A hundred marks more** (easy, 5 minutes). Add 100 to every reward. For which of the four methods do the
#    advantages change, and in which turns?
# 2. **The best constant** (medium, 15 minutes). The mean reward is not quite the best baseline. Find the b with the
#    least noise for the three actions, by algebra. Why does nobody use it?
# 3. **Where the running mean wins** (hard, 20 minutes). In section 7 let the second prompt have rewards r + h. For
#    which h are the running mean and RLOO with G = 2 equally noisy?
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# The answers to one prompt must be adjacent: map, map, tea, tea. Here each answer about tea is compared with one about
# a map, and gets a negative advantage, the good one too. The mean gradient is still right, because the other answer is
# independent of this one. But the noise grows, so learning only seems slow.
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
# Nothing. All answers to a prompt are the same, so all advantages are 0. The policy learns from *differences* between
# its own answers, sampled from π itself.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
always(len(set(map(tuple, calm.completions))) == 1, "Greedy answers to one prompt are all equal.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# RLOO and GRPO compare within a group, so nothing changes. With the running mean only the first turn changes, when
# there is no past and the baseline is 0. Without a baseline all advantages are higher by 100 in all turns.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for name, advantages_of in methods.items():
    rewards, past = torch.tensor([1.0, 0, 0, 3]), [2.0, 3.0]
    before = advantages_of(rewards, past)
    change = advantages_of(rewards + 100, [number + 100 for number in past]) - before
    first = advantages_of(rewards + 100, []) - advantages_of(rewards, [])
    print(f"{name:22} first turn +{first.abs().max():.0f}   later +{change.abs().max():.0f}")
    always((change.abs().max() > 1e-9) == (name == "no baseline"), "Later only the first changes.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The noise is $\mathbb{E}[(r - b)^2\, \|\nabla \log \pi\|^2]$ minus a constant: a parabola in b, lowest at $b =
# \mathbb{E}[r\, \|\nabla \log \pi\|^2] / \mathbb{E}[\|\nabla \log \pi\|^2]$. It needs the gradient of every completion,
# and lowers the noise here by only 0.3 %.
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
# The running mean is too high by h/2 for the first prompt and too low by h/2 for the second. In the squares of $r - b
# \pm h/2$ the mixed terms of the two prompts cancel. So the relative noise is that at h = 0 plus $\frac{h^2}{4}
# \mathbb{E}[\|\nabla \log \pi\|^2] / (12\, \|\nabla \mathbb{E}[r]\|^2)$. That of RLOO does not depend on h.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
slope = (pi @ lengths / (4 * 12 * exact @ exact)).item()
h = ((rows["RLOO, G = 2", 0] - rows["running mean", 0]) / slope) ** 0.5
b = pi @ r + h / 2
print(f"equal at h = {h:.3f}")
equal(
    relative_noise(lambda rewards: rewards - b, 1, h),
    relative_noise(lambda rewards: my_leave_one_out(rewards, 2), 2, h),
    "At this h the running mean and RLOO with G = 2 are equally noisy.",
)
