# %% [markdown]
# # 11 · A storyteller: your reward, and what it does to a story
#
# **You will build** what is needed to align a real, if tiny, language model: a reward of a few lines, the shares of
# stories at which training must end, the loss, a measure of what training changed besides, and an expert whose
# distribution is known. Then you learn from its demonstrations.
#
# **Time:** 25 minutes of reading, one or two of computer.
#
# **You need:** [04](04_sft.ipynb) (SFT), [05](05_inverse_rl.ipynb) (π\* ∝ ref·e^(r/β)), [06](06_reward.ipynb) (a
# reward model), [07](07_policy_gradient.ipynb) (leave-one-out) and [07b](07b_kl.ipynb) (the KL in the reward).
# Section 5 uses the lemma of [05b](05b_irft.ipynb), the break the idea of [06b](06b_overoptimization.ipynb).
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
import re

import numpy as np
import torch

from minialign import stories260K
from minialign.batch import collate
from minialign.data import encode_prompt
from minialign.kl import kl_rewards
from minialign.logps import token_logps
from minialign.lora import load_model
from minialign.methods.reinforce import reinforce_loss
from minialign.methods.rloo import leave_one_out
from minialign.rewards import score
from minialign.sample import sample
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import storyteller as figures

torch.set_num_threads(1)  # the model is so small that a second core would not help

# %% [markdown]
# ## The question
#
# In the earlier tutorials we could list every completion, so we knew where training must end. A model that writes
# English has far too many completions to list. Can we still say, before training, what a reward will do to it? And
# afterwards, what it did to the language?
#
# The model is Karpathy's stories260K: 260,000 weights, trained on children's stories (TinyStories; Eldan and Li
# 2023). `python -m minialign stories260K` puts it into `runs/stories260K`, one megabyte. `load_model` returns the
# model, its tokenizer, and a third value that only adapters need. If the folder is not there, the next cell fetches
# it.

# %%
places = [Path("runs/stories260K"), Path(stories260K.__file__).parents[1] / "runs/stories260K"]
found = [place for place in places if (place / "config.json").is_file()]
ref, tokenizer, _ = load_model(found[0] if found else stories260K.main(stories260K.Config()))
ref.requires_grad_(False)

PROMPT = "Once upon a time, there was a little"
prompt_ids = encode_prompt(tokenizer, PROMPT)


def tell(policy, n=3, length=32):
    """Print n stories. The seed is always the same, so equal policies tell equal stories."""
    told = sample(policy, [prompt_ids], max_new=length, n=n, eos_id=tokenizer.eos_id, seed=[0])
    for ids in told.completions:
        print("  … a little", " ".join(tokenizer.decode(ids).split()))


print(f"{sum(p.numel() for p in ref.parameters()):,} weights, {tokenizer.vocab_size} tokens")
tell(ref)

# %% [markdown]
# These stories are not good, but they are English, and they have heroes. So a reward can prefer some heroes to
# others.
#
# ## 1 · A reward of your own
#
# We would like to read about animals. The [reward](../GLOSSARY.md#reward) is a function of the text: 2 if the hero is
# an animal, 1 for a boy, 0 for a girl or nobody. The hero is the first of these words that occurs.
# (toy/heroes.py has it as minialign's methods take it, with `--reward toy/heroes.py:hero`: a function of two lists,
# prompts and completions, that returns a list of numbers.)

# %%
ANIMALS = (
    "animal|ant|bear|bee|bird|bug|bunny|butterfly|cat|cow|dog|duck|elephant|fish|fox|frog|horse"
    "|kitten|lion|monkey|mouse|owl|pig|puppy|rabbit|sheep|squirrel|tiger|turtle"
)
HERO = re.compile(rf"\b(girl|boy|{ANIMALS})\b")  # \b: whole words, or a giant is an ant
NAMES = ("girl or nobody", "boy", "animal")


def hero(text):
    word = HERO.search(text)
    if not word:
        return 0
    return {"girl": 0, "boy": 1}.get(word[1], 2)


for text in (
    " girl named Lily. She had a dog",
    " brown bear named Tom",
    " boy. He loved",
    " box of toys",
):
    print(hero(text), text)

# %% [markdown]
# How often does the model do what we want before any training? We draw 4,096 beginnings of eight tokens and count.

# %%
LENGTH = 8


def draw(policy, n, seed):
    """n beginnings: what sample() returns, with .inputs, .targets, .mask (n, T) and .completions;
    and rewards (n,). The seed can be any value; equal seeds draw equal random numbers.
    """
    stories = sample(
        policy, [prompt_ids], max_new=LENGTH, n=n, eos_id=tokenizer.eos_id, seed=[seed]
    )
    heroes = [hero(tokenizer.decode(ids)) for ids in stories.completions]
    return stories, torch.tensor(heroes, dtype=torch.float32)


def shares_of(rewards):
    return np.bincount(rewards.long().numpy(), minlength=3) / len(rewards)


ref_stories, ref_rewards = draw(ref, 4096, seed=1)
ref_shares = shares_of(ref_rewards)  # watch: ref_shares (3,)
print(dict(zip(NAMES, ref_shares.round(3).tolist(), strict=True)))

# %% [markdown]
# ## 2 · Where it must end, before a single update
#
# Tutorial 05 found the policy that maximises the expected reward minus β·KL(π‖ref): π\*(y) ∝ ref(y)·e^(r(y)/β). We
# cannot list the stories y. But the factor depends on a story only through its reward. So think of three boxes of
# stories, one for each reward:
#
# - each box is made larger or smaller by its factor: $P^*(r) \propto P_\mathrm{ref}(r)\, e^{r/\beta}$, where $P(r)$
#   is the share of the box;
# - inside a box nothing changes: among stories about animals, π\* tells each as often as ref does.


# %%
def my_target_shares(ref_shares, rewards, beta):
    """ref_shares (K,): ref's share of each class; rewards (K,): the reward of each class (NumPy
    arrays).

    Returns the shares (K,) of π*: multiply each share by e^(reward/β), then scale so that they sum
    to 1.
    """
    weights = ref_shares * np.exp(rewards / beta)  # watch: weights (K,)
    return weights / weights.sum()


# %% [markdown]
# ### Checkpoint: by hand, and equal to the project's closed form
#
# With e^(1/β) = 2, shares of ½, ¼, ¼ get the weights ½, ½ and 1.

# %%
by_hand = my_target_shares(np.array([0.5, 0.25, 0.25]), np.arange(3.0), 1 / np.log(2))
always(np.allclose(by_hand, [0.25, 0.25, 0.5]), "my_target_shares gives ¼, ¼, ½ by hand.")
BETA, LEVELS = 1.25, np.arange(3.0)
target = my_target_shares(ref_shares, LEVELS, BETA)
always(
    np.allclose(target, closed_form.tilt(ref_shares, LEVELS, BETA)),
    "my_target_shares equals minialign's tilt.",
)
print("ref   ", ref_shares.round(3))
print("target", target.round(3))
figures.classes(NAMES, ref_shares, target, np.exp(LEVELS / BETA))

# %% [markdown]
# ## 3 · Get there: RLOO
#
# The loss is made from the parts of 07 and 07b: subtract the KL penalty from each reward, subtract the mean of the
# others, and weight each story's log-prob with the result. All stories have the same
# [prompt](../GLOSSARY.md#prompt) here, so the batch is one group.


# %%
def my_rloo_loss(logps, ref_logps, rewards, beta):
    """logps, ref_logps (B, T): log-probs of each token, 0 outside the story; rewards (B,). Returns
    the scalar loss.

    R = reward − beta · (log-prob of the story − ref's log-prob of it). Advantage: R minus the mean
    R of the B − 1 others. Loss: minus the mean of advantage times log-prob of the story. The
    advantages are constants.
    """
    seq_logps = logps.sum(1)  # watch: seq_logps (B,)
    R = (rewards - beta * (seq_logps - ref_logps.sum(1))).detach()
    advantages = R - (R.sum() - R) / (len(R) - 1)  # watch: advantages (B,)
    return -(advantages * seq_logps).mean()


# %% [markdown]
# ### Checkpoint: value and gradient equal the project's

# %%
generator = torch.Generator().manual_seed(0)
logps, ref_logps = (-torch.rand(2, 16, 8, generator=generator)).unbind(0)
logps.requires_grad_()
penalised = kl_rewards(ref_rewards[:16], logps, ref_logps, beta=BETA)
theirs, _ = reinforce_loss(
    logps, leave_one_out(penalised, group_size=16), torch.ones(16, 8, dtype=torch.bool)
)
mine = my_rloo_loss(logps, ref_logps, ref_rewards[:16], BETA)
gradients = [torch.autograd.grad(loss, logps)[0] for loss in (mine, theirs)]
message = "my_rloo_loss must equal minialign's loss."
equal(mine, theirs, msg=message)
message = "The gradient of my_rloo_loss must equal minialign's."
equal(*gradients, msg=message)
print("my_rloo_loss: equal")


# %%
def follow(policy, beta, *, steps, lr, batch=64, reward_of=None):
    """Train the policy in place. Returns the shares (3,) of each step's stories. reward_of(stories)
    replaces the heroes' reward.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0)
    path = []
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        # The seed is the same in every call of follow: equal settings repeat a run exactly.
        stories, rewards = draw(policy, batch, seed=("follow", k))  # watch: rewards (B,)
        path.append(shares_of(rewards))
        logps = token_logps(policy, stories)  # watch: logps (B, T)
        with torch.no_grad():
            ref_logps = token_logps(ref, stories)
            rewards = rewards if reward_of is None else reward_of(stories)
        loss = my_rloo_loss(logps, ref_logps, rewards, beta)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return path


policy = copy.deepcopy(ref).requires_grad_(True)
path = follow(policy, BETA, steps=60, lr=1.5e-4)
figures.walk(NAMES, ref_shares, path, target)
tell(policy)

# %% [markdown]
# (Stop in `follow` at its first call, first step: `logps` equals `ref_logps`, because the policy is still a copy of
# ref.) Dots are the shares in one update's 64 stories, lines are running means. The stories are as good or bad as
# before, but other heroes turn up. Count on fresh stories:

# %%
_, rewards = draw(policy, 2048, seed=2)
shares = shares_of(rewards)
print("ref    ", ref_shares.round(3))
print("learned", shares.round(3), " (each known to about ± 0.02)")
print("target ", target.round(3))
this_run(
    np.abs(shares - target).max() < np.abs(ref_shares - target).max() / 2,
    "The shares went at least half of the way.",
)

# %% [markdown]
# They have come close. The last part is slow: near π\* all R are almost equal, so the gradient of 64 stories is
# mostly noise. And the learning rate falls to 0, which ends the training wherever it is then. `python -m
# toy.storyteller` takes more steps with more stories each, and tests how near it comes.
#
# ## 4 · How far it moved: needed and wasted
#
# The policy has moved some [nats](../GLOSSARY.md#nats) of [KL](../GLOSSARY.md#kl) away from ref. Was that necessary?
# Split a story into its box r and the rest. The chain rule splits the KL in the same way:
#
# $$\mathrm{KL}(\pi\,\|\,\mathrm{ref}) = \underbrace{\mathrm{KL}(P_\pi\,\|\,P_\mathrm{ref})}_{\text{needed}}
# + \underbrace{\textstyle\sum_r P_\pi(r)\,\mathrm{KL}(\pi(\cdot|r)\,\|\,\mathrm{ref}(\cdot|r))}_{\text{wasted}}$$
#
# $P_\pi$ and $P_\mathrm{ref}$ are the shares of the boxes, $\pi(\cdot|r)$ is the distribution inside one. The first
# term is the smallest KL that a policy with these shares can have. The second is what training changed *inside* the
# boxes: names, words, grammar. That does not change the reward. At π\* it is 0. (The
# [glossary](../GLOSSARY.md#needed) has both words.)


# %%
def my_split(logps, ref_logps, shares, ref_shares):
    """logps, ref_logps (B, T): log-probs, 0 outside the story, of B stories *of the policy*;
    shares, ref_shares (K,) NumPy arrays.

    Returns (kl, needed, wasted) in nats. kl: the mean log-ratio of a story, which estimates
    KL(π‖ref). needed: the KL between the shares; a share of 0 adds nothing. wasted: the rest.
    """
    kl = (logps - ref_logps).sum(1).mean().item()
    seen = shares > 0
    needed = float((shares[seen] * np.log(shares[seen] / ref_shares[seen])).sum())
    return kl, needed, kl - needed


# %% [markdown]
# ### Checkpoint

# %%
numbers = my_split(
    logps.detach(), ref_logps, np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25])
)
always(
    np.isclose(numbers[1], closed_form.kl([0.5, 0.5, 0], [0.25, 0.5, 0.25])),
    "my_split's needed is the KL between the shares.",
)
always(np.isclose(numbers[1], np.log(2) / 2), "By hand, needed is ½·log 2 + ½·log 1 + 0.")
always(
    np.isclose(numbers[0], kl_rewards(torch.zeros(16), logps, ref_logps, beta=-1.0).mean()),
    "my_split's kl is the mean of Σ k1.",
)
always(np.isclose(sum(numbers[1:]), numbers[0]), "my_split: needed + wasted = kl")


# %%
@torch.no_grad()
def measure(policy):
    """(reward, kl, needed, wasted, errors) from 1,024 stories of the policy. errors: the standard
    errors of kl, needed and wasted. (For needed, a story counts with its box's log-ratio.)
    """
    stories, rewards = draw(policy, 1024, seed=3)
    both = token_logps(policy, stories), token_logps(ref, stories)
    shares = shares_of(rewards)
    log_ratios = (both[0] - both[1]).sum(1).numpy()
    of_boxes = np.log(np.maximum(shares, 1e-9) / ref_shares)[rewards.long().numpy()]
    errors = [x.std() / 1024**0.5 for x in (log_ratios, of_boxes, log_ratios - of_boxes)]
    return rewards.mean().item(), *my_split(*both, shares, ref_shares), errors


table = {"RLOO, your reward": measure(policy)}
reward, kl, needed, wasted, errors = table["RLOO, your reward"]
print(f"reward {reward:.2f}; KL {kl:.3f} nats = needed {needed:.3f} + wasted {wasted:.3f}")
print("standard errors of the three: ± {:.3f}, {:.3f}, {:.3f}".format(*errors))
always(wasted > -0.15, "The KL is at least the needed part (up to the noise of counting).")

# %% [markdown]
# Most of the KL was needed: about 0.14 of 0.17 nats changed the shares of the heroes. The rest is what the network
# changed besides, because all stories share its weights. (Another 1,024 stories would give other numbers; the
# standard errors say by about how much.)
#
# ## Break it: no reference
#
# β holds the policy near the [reference](../GLOSSARY.md#reference). Set it to 0 and change nothing else. Read the
# stories, not only the numbers.

# %%
pushed = copy.deepcopy(ref).requires_grad_(True)
follow(pushed, 0.0, steps=60, lr=1.5e-4)
tell(pushed)
pushed_numbers = measure(pushed)
for name, numbers in (("β = 1.25", table["RLOO, your reward"]), ("β = 0", pushed_numbers)):
    print(
        f"{name:9} reward {numbers[0]:.2f}   needed {numbers[2]:.2f}   wasted {numbers[3]:.2f} nats"
    )
this_run(
    pushed_numbers[0] > reward and pushed_numbers[3] > 4 * wasted,
    "β = 0: more reward, much more waste.",
)

# %% [markdown]
# The reward is nearly perfect, 1.99 of 2. It needs 2.22 nats: a policy that tells only of animals needs −log of ref's
# share of animals, which is 2.24. The other 4.90 nats changed something else. The texts show what: syllables and
# names are repeated. The reward does not show it, since nearly each of these texts has an animal for its hero. This
# is [over-optimisation](../GLOSSARY.md#overoptimization). A learning rate of 3e-3 destroys the language altogether:
# try it.
#
# ## 5 · From demonstrations alone
#
# Now suppose that nobody tells us the reward, but an [expert](../GLOSSARY.md#expert) wrote stories. To check what we
# learn we need an expert whose distribution is known. Since no reward is above 2, we can have π\* itself: draw a
# story from ref and keep it with probability e^((r − 2)/β). A kept story is distributed ∝ ref·e^(r/β). This is
# *rejection sampling*.


# %%
def my_kept(rewards, uniform, beta, highest):
    """rewards, uniform (B,): a number from [0, 1) for each story. Returns the indices of the
    stories that are kept, a list.

    A story is kept with probability e^((reward − highest)/β), that is, if its uniform number is
    below it.
    """
    keep = uniform < ((rewards - highest) / beta).exp()  # watch: keep (B,)
    return keep.nonzero().flatten().tolist()


# %% [markdown]
# ### Checkpoint: which are kept, and how many
#
# With 1,000 evenly spaced numbers instead of random ones, the kept share of each class is known to a thousandth.

# %%
three = my_kept(torch.tensor([0.0, 2, 1]), torch.tensor([0.5, 0.5, 0.4]), 1.25, highest=2.0)
always(three == [1, 2], "my_kept keeps the stories 1 and 2 (probabilities 0.20, 1 and 0.45).")
grid = torch.arange(1000) / 1000
for level in (0.0, 1.0, 2.0):
    share = len(my_kept(torch.full((1000,), level), grid, BETA, highest=2.0)) / 1000
    print(f"reward {level:.0f}: kept {share:.3f}")
    always(
        abs(share - np.exp((level - 2) / BETA)) < 0.002,
        "my_kept keeps the share e^((r − 2)/β) of a class.",
    )

pool, pool_rewards = draw(ref, 8192, seed=4)
kept = my_kept(pool_rewards, torch.rand(8192, generator=generator), BETA, highest=2.0)
demos = [pool.completions[i] for i in kept]
print(
    f"{len(demos):,} demonstrations; shares {shares_of(pool_rewards[kept]).round(3)}, "
    f"target {target.round(3)}"
)

# %% [markdown]
# **Imitate.** [SFT](../GLOSSARY.md#sft) (tutorial 04) makes the demonstrations likely. Its fixed point is the expert,
# so the shares must move towards the same target, though no reward occurs in this cell.

# %%
imitator = copy.deepcopy(ref).requires_grad_(True)
optimizer = torch.optim.AdamW(imitator.parameters(), lr=2e-4, weight_decay=0)
STEPS = min(len(demos), len(ref_rewards)) // 64
for k in range(STEPS):
    optimizer.param_groups[0]["lr"] = 2e-4 * (1 - k / STEPS)
    batch = collate([prompt_ids] * 64, demos[64 * k : 64 * k + 64], pad_id=tokenizer.pad_id)
    loss = -token_logps(imitator, batch).sum() / batch.mask.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
table["SFT"] = measure(imitator)
print("reward {:.2f}; KL {:.3f} = needed {:.3f} + wasted {:.3f}".format(*table["SFT"]))
tell(imitator)

# %% [markdown]
# **Recover the reward.** The demonstrations *contain* the reward. Train a scalar head on the storyteller's own layers
# to tell the expert's stories from ref's, with the logistic loss. With exact expectations, its optimum is log
# E(y)/ref(y) plus a constant, where E is the expert's distribution (the lemma of [05b](05b_irft.ipynb), in the
# section on where IRFT ends). For our expert that is r(y)/β plus a constant. So β times the learned number should
# grow by 1 from class to class. (`score` returns the head's number at a story's last token.)

# %%
reward_model = ref.with_scalar_head(reward_read="last", reward_bound=0.0).requires_grad_(True)
torch.nn.init.zeros_(reward_model.head_weight)
optimizer = torch.optim.AdamW(reward_model.parameters(), lr=1e-3, weight_decay=0)


def judged(stories):
    return BETA * score(reward_model, stories)


for k in range(STEPS):
    optimizer.param_groups[0]["lr"] = 1e-3 * (1 - k / STEPS)
    rows = demos[64 * k : 64 * k + 64] + ref_stories.completions[64 * k : 64 * k + 64]
    batch = collate([prompt_ids] * 128, rows, pad_id=tokenizer.pad_id)
    scores = score(reward_model, batch)  # watch: scores (2B,)
    loss = torch.nn.functional.softplus(scores[64:] - scores[:64]).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
    optimizer.step()

fresh, fresh_rewards = draw(ref, 2048, seed=5)
with torch.no_grad():
    unseen = judged(fresh)  # watch: unseen (2048,)
means = [unseen[fresh_rewards == level].mean().item() for level in LEVELS]
print("true reward    0.00 1.00 2.00")
print("learned reward", " ".join(f"{mean - means[0]:.2f}" for mean in means))
nobody = torch.tensor([not HERO.search(tokenizer.decode(ids)) for ids in fresh.completions])
print(f"stories without a hero (true reward 0): {unseen[nobody].mean() - means[0]:.2f}")
this_run(means[0] < means[1] < means[2], "The order of the three classes is recovered.")

# %% [markdown]
# The model was trained without any reward, and it finds the order 0 < 1 < 2. But the first step is 1.25 instead of 1,
# and the second is 0.39 instead of 1. The last line above shows what is wrong. After 43 updates the model mostly
# tells girls from all others: stories without a hero get 1.39, more than boys, though their reward is 0 too.
#
# **Follow what was learned.** This is the plan of RFT and [inverse RL](../GLOSSARY.md#inverse-rl): put the learned
# reward where yours was, in the same loop. The target is now the tilt of the *learned* reward. Its shares are ref's,
# each story counted e^(learned reward/β) times. The cell prints them first; "mean hero" is the mean of your reward.

# %%
factors = (unseen / BETA).exp()
sums = [factors[fresh_rewards == level].sum().item() for level in LEVELS]
learned_target = np.array(sums) / sum(sums)
for name, wanted in (("true", target), ("learned", learned_target)):
    print(f"target of the {name:7} reward: {wanted.round(3)}, mean hero {wanted @ LEVELS:.2f}")

follower = copy.deepcopy(ref).requires_grad_(True)
follow(follower, BETA, steps=40, lr=2e-4, reward_of=judged)
table["RLOO, learned reward"] = measure(follower)
before = ref_shares @ LEVELS  # ref's mean reward
goal = target @ LEVELS  # that of π*
print(f"{'':21} reward     KL needed wasted   of the way")
for name, (*numbers, _) in table.items():
    way = (numbers[0] - before) / (goal - before)
    print(f"{name:21}" + "".join(f"{number:7.3f}" for number in numbers) + f"{way:13.0%}")
figures.cost(table)
tell(follower)

# %% [markdown]
# "Of the way" says how far the mean reward has come from ref's towards that of π\*. The policy in the last row has
# reached its own target (mean hero 0.75). So what it lacks comes from the error of the learned reward.
#
# ## What is wrong here? (1)
#
# Somebody writes the target shares in one line and tries three values of β. No error, and the shares sum to 1.

# %%
for beta in (0.5, 1.25, 5.0):
    weights = ref_shares * np.exp(LEVELS) / beta
    print(f"β = {beta:4}: {(weights / weights.sum()).round(3)}")

# %% [markdown]
# ## What is wrong here? (2)
#
# Somebody estimates the policy's KL from ref with stories that were drawn before. A KL is never negative, but this
# number is.

# %%
with torch.no_grad():
    few = ref_stories[:512]
    hurried = (token_logps(policy, few) - token_logps(ref, few)).sum(1).mean().item()
print(f"{hurried:.3f} nats")

# %% [markdown]
# ## What you now know
#
# - A reward with few values sorts the texts of a language model into a few boxes. **Count** the boxes, and for β > 0
#   you know the shares at which training must end.
# - Read the text, and split the KL into **needed and wasted**: both show what the reward does not.
# - Demonstrations alone moved the mean reward most of the way to the same target in this run: three quarters of
#   it by imitation, two thirds by a learned reward.
# - The learned reward can be read for each story. The imitator's β·log(π/ref) can be read in the same way: at its
#   fixed point it is the expert's reward too, up to a constant.
#
# This is the last tutorial. `python -m toy.storyteller` does all this with eight methods (`--full`: ten);
# docs/RESULTS.md has the table. Where things are in the project stands at the end of [start
# here](00_start_here.ipynb).
#
# ## Exercises
#
# 1. **Try this** (easy, 10 minutes): what does β change? Predict with `my_target_shares` the share
#    of animals, and the nats that it needs, for β = 5, 1.25 and 0.5. Then run `follow` with β = 0.5, and print its
#    `measure`. Do you expect more waste than with β = 1.25, or less?
# 2. **Wrong sign** (medium, 10 minutes): train with +β·log-ratio in the reward instead of −. Predict what happens to
#    the waste.
# 3. **Best of four** (hard, 20 minutes): what are the shares of the best of four stories of ref? Find a formula,
#    check it by drawing. Which of needed and wasted is 0, and why?
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# The three rows are equal. `np.exp(LEVELS) / beta` divides after the exponential, and a common factor is lost when
# everything is scaled to sum to 1. So β has no effect, and the result is the target of β = 1. It must be
# `np.exp(LEVELS / beta)`. That is why the checkpoint uses a β that is not 1.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
always(
    np.allclose(weights / weights.sum(), my_target_shares(ref_shares, LEVELS, 1.0)),
    "The weights of the puzzle give the target of β = 1.",
)

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The stories are ref's. The mean of log(π/ref) over ref's own stories is −KL(ref‖π), which is never positive. For
# KL(π‖ref) the stories must come from the policy.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
always(hurried < 0.05, "On ref's stories the mean is minus a KL (up to the noise of counting).")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# At β = 0.5 seven stories of ten should be about animals, and that needs more than a nat. The waste grows too: the
# weights have to move further, and all stories share them. After the same 60 steps the reward is still short of the
# target.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for beta in (5.0, 1.25, 0.5):
    wanted = my_target_shares(ref_shares, LEVELS, beta)
    nats = closed_form.kl(wanted, ref_shares)
    print(f"β = {beta:4}: animals {wanted[2]:.3f}, needs {nats:.2f} nats")
always(
    my_target_shares(ref_shares, LEVELS, 0.5)[2] > my_target_shares(ref_shares, LEVELS, 5.0)[2],
    "With a smaller β more stories are about animals.",
)
freer = copy.deepcopy(ref).requires_grad_(True)
follow(freer, 0.5, steps=60, lr=1.5e-4)
for name, numbers in (("β = 1.25", table["RLOO, your reward"]), ("β = 0.5", measure(freer))):
    print(f"{name:9} reward {numbers[0]:.2f}   needed {numbers[2]:.2f}   wasted {numbers[3]:.2f}")
this_run(numbers[3] > table["RLOO, your reward"][3], "β = 0.5 wastes more than β = 1.25.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# Moving away from ref now raises R. Stories that are unlikely under ref have the largest R, so the policy learns to
# write what ref would never write. There is no optimum: the KL grows as long as training goes on.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
away = copy.deepcopy(ref).requires_grad_(True)
follow(away, -BETA, steps=15, lr=1e-3)
tell(away, n=2)
print("reward {:.2f}; KL {:.2f} = needed {:.2f} + wasted {:.2f}".format(*measure(away)))

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# All four are girls or nobody with probability $p_0^4$; none is an animal with $(p_0 + p_1)^4$. So the shares are
# $p_0^4$, $(p_0 + p_1)^4 - p_0^4$ and the rest. Inside a box the best is simply the first of its class, a sample of
# ref: nothing is wasted.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
below = ref_shares.cumsum() ** 4  # none of four is above this class
formula = np.diff(below, prepend=0)
drawn = shares_of(pool_rewards.view(-1, 4).amax(1))
print("best of 4 by formula", formula.round(3), "by drawing", drawn.round(3))
always(
    np.allclose(formula, closed_form.best_of_n_law(ref_shares, LEVELS, 4)),
    "The formula equals the project's closed form.",
)
always(np.abs(formula - drawn).max() < 0.06, "Counting agrees with the formula.")
