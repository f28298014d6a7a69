# %% [markdown]
# # 11 · A storyteller: your reward, and what it does to a story
#
# **You will hold** a model of 260,000 weights that tells children's stories, a reward of four lines that you can replace by your own, and
# the whole craft around it: look at what the model says, follow the reward with RLOO, watch the stories walk to where a formula says they
# must end, measure what the training broke besides, push it until the text breaks, and then do the same from demonstrations alone.
#
# **Minutes:** 30 to read, about two minutes of CPU to run. **You need:** tutorial 07 (RLOO) and π\* ∝ ref·e^{r/β} from tutorial 05.
#
# The model is Karpathy's stories260K, one megabyte. `python -m minialign stories260K` fetches it once into `runs/stories260K`.
#
# Lines marked `# watch: name (shape)` are good places for a breakpoint. `B` stories, `T` tokens of a story.

# %%
import copy
import re
import sys
from pathlib import Path

# The project is not installed, it runs from its checkout: find the folder above this file (or above the notebook) that holds it.
ROOT = next(folder for folder in Path(globals().get("__file__", "here")).resolve().parents if (folder / "minialign").is_dir())
sys.path.insert(0, str(ROOT))

import matplotlib
import numpy as np
import torch

from minialign import stories260K
from minialign.batch import collate
from minialign.data import encode_prompt
from minialign.evaluate import needed_kl
from minialign.logps import token_logps
from minialign.lora import load_model
from minialign.methods.rft import Config as RewardSettings
from minialign.methods.rft import constant_reward
from minialign.methods.rloo import leave_one_out
from minialign.methods.sft import sft_loss
from minialign.rewards import score
from minialign.sample import sample
from toy import closed_form

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # a script draws into a file: no window to close, no screen needed
import matplotlib.pyplot as plt

torch.set_num_threads(1)  # the model is so small that a second core only waits

# %% [markdown]
# ## The storyteller
#
# If the folder is not there yet, the first line fetches it. The second opens it as any run opens a model: the policy, its tokenizer, and
# a third value that is only for adapters.

# %%
here = [folder for folder in (Path("runs/stories260K"), ROOT / "runs/stories260K") if (folder / "config.json").is_file()]
FOLDER = here[0] if here else stories260K.main(stories260K.Config())
ref, tokenizer, _ = load_model(FOLDER)
ref.requires_grad_(False)
print(f"{sum(p.numel() for p in ref.parameters()):,} weights, {tokenizer.vocab_size} tokens")

PROMPT = "Once upon a time, there was a little"
prompt_ids = encode_prompt(tokenizer, PROMPT)


def tell(policy, n=3, seed=0, length=40):
    """Print n stories. The same seed gives policies the same luck, so that they can be compared."""
    for ids in sample(policy, [prompt_ids], max_new=length, n=n, eos_id=tokenizer.eos_id, seed=[seed]).completions:
        print("  …", PROMPT.split(", ")[1] + tokenizer.decode(ids))


tell(ref)

# %% [markdown]
# No one would publish these stories, but they are English, they have heroes, and the heroes have names. That is enough to align.
#
# ## A reward of your own
#
# We would like to read about animals. A reward is a function of the text and nothing else: here 2 if the hero is an animal, 1 for a boy,
# and 0 for a girl or nobody. The first of these words that occurs is the hero. The same function, in a file, is what
# `--reward toy/heroes.py:hero` gives to every method of the project.

# %%
ANIMALS = "animal|ant|bear|bee|bird|bug|bunny|butterfly|cat|cow|dog|duck|elephant|fish|fox|frog|horse|kitten|lion|monkey|mouse|owl|pig"


def hero(text):
    found = re.search(rf"\b(girl|boy|{ANIMALS}|puppy|rabbit|sheep|squirrel|tiger|turtle)\b", text)
    return 0 if not found or found[1] == "girl" else 1 if found[1] == "boy" else 2


for text in (" girl named Lily. She had a dog", " brown bear named Tom", " boy. He loved", " box of toys"):
    print(hero(text), text)
assert [hero(text) for text in (" girl and her cat", " cat and a girl", " catalogue", " boys", " boy.")] == [0, 2, 0, 0, 1]

# %% [markdown]
# How often does the storyteller do what we want before we train anything? We draw 8,192 beginnings of eight tokens and count. Look at the
# three shares as you looked at the three actions in tutorial 05: girls, boys and animals are the actions, and they are chosen by a
# language model.

# %%
LENGTH = 8
NAMES = ("girl or nobody", "boy", "animal")
LEVELS = np.array([0.0, 1.0, 2.0])  # the rewards of the three classes


def draw(policy, n, seed):
    """n beginnings of a story: the Batch of sample(), and the reward of each, (B,)."""
    stories = sample(policy, [prompt_ids], max_new=LENGTH, n=n, eos_id=tokenizer.eos_id, seed=[seed])
    return stories, torch.tensor([hero(tokenizer.decode(ids)) for ids in stories.completions], dtype=torch.float32)


def counted(rewards):
    return torch.bincount(rewards.long(), minlength=3).double()  # (3,)


ref_stories, ref_rewards = draw(ref, 8192, seed=1)
ref_counts = counted(ref_rewards)  # watch: ref_counts (3,)
ref_shares = (ref_counts / ref_counts.sum()).numpy()
print({name: round(float(share), 3) for name, share in zip(NAMES, ref_shares, strict=True)})

# %% [markdown]
# ## Where it must end, before a single update
#
# Tutorial 05 found the policy with the highest E[r] − β·KL(π‖ref): π\*(y) ∝ ref(y)·e^{r(y)/β}. We cannot list all stories, as we listed
# three actions. But the factor e^{r(y)/β} depends on a story only through its reward. So two things follow, and they hold for any model:
#
# - **the shares of the three classes** are those of three actions: P(r) ∝ P_ref(r)·e^{r/β};
# - **within a class nothing changes**: among stories about animals, π\* tells each as often as ref does.
#
# The first gives us three numbers to walk to. We take β = 1.25, so that a forgotten 1/β would show.

# %%
BETA = 1.25
law = closed_form.tilt(ref_shares, LEVELS, BETA)
by_hand = ref_shares * np.exp(LEVELS / BETA)
assert np.allclose(law, by_hand / by_hand.sum())
print("ref  ", ref_shares.round(3))
print("law  ", law.round(3))

# %% [markdown]
# ## Follow it: RLOO in twenty lines
#
# This is the loop of tutorial 07 on a real model. One step: draw 128 stories, give each its reward minus β times its log-ratio, compare it
# with the mean of the others, and make it more or less likely by that much. The only new thing is what we record: the shares of each
# batch, and the log-ratio, whose mean over the policy's own stories is the KL from ref.


# %%
def my_advantages(rewards):
    """(B,) each reward minus the mean of the others."""
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


def follow(policy, beta, *, steps, lr, batch=128, reward_of=None):
    """Train the policy in place with RLOO. Returns [(shares (3,), KL)] of each step's stories, before the step's update."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0)
    path = []
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        stories, rewards = draw(policy, batch, seed=("rloo", k))  # watch: stories.targets (B, T)
        path_shares = counted(rewards) / batch
        if reward_of is not None:
            rewards = reward_of(stories)
        logps = token_logps(policy, stories).sum(1)  # (B,) log-prob of each story
        with torch.no_grad():
            logratio = logps - token_logps(ref, stories).sum(1)  # watch: logratio (B,)
        advantages = my_advantages(rewards - beta * logratio)  # watch: advantages (B,)
        loss = -(advantages * logps).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        path.append((path_shares.numpy(), float(logratio.mean())))
    return path


policy = copy.deepcopy(ref).requires_grad_(True)
path = follow(policy, BETA, steps=60, lr=2e-4)
tell(policy)

# %% [markdown]
# Same luck, other heroes: where ref told of a girl, a policy may now tell of a bird.
#
# **Checkpoint.** Your advantages are the project's.

# %%
some = torch.randn(128, generator=torch.Generator().manual_seed(0))
torch.testing.assert_close(my_advantages(some), leave_one_out(some, group_size=128), atol=1e-6, rtol=0)

# %% [markdown]
# Did the shares arrive? Count again, on fresh stories.

# %%
stories, rewards = draw(policy, 4096, seed=2)
counts = counted(rewards)
shares = (counts / counts.sum()).numpy()
print("ref    ", ref_shares.round(3))
print("learned", shares.round(3), "± 0.015 at most")
print("law    ", law.round(3))
assert np.abs(shares - law).max() < np.abs(ref_shares - law).max() / 2, "of this run: at least half of the way is behind us"

# %% [markdown]
# ## What it cost: needed and wasted
#
# The policy is KL(π‖ref) away from where it started. Was that necessary? Split a story into its class and the rest, and the chain rule of
# the KL gives
#
# $$\mathrm{KL}(\pi\,\|\,\mathrm{ref}) = \underbrace{\mathrm{KL}(P_\pi(r)\,\|\,P_\mathrm{ref}(r))}_{\text{needed}}
# + \underbrace{\textstyle\sum_r P_\pi(r)\,\mathrm{KL}(\pi(\cdot|r)\,\|\,\mathrm{ref}(\cdot|r))}_{\text{wasted}}$$
#
# The first term is the least that any policy with these shares can pay. The second is what training changed *within* the classes: names,
# words, grammar, nothing that the reward asked for. At π\* it is 0. `python -m minialign evaluate` prints both for any policy and reward.


# %%
@torch.no_grad()
def cost(policy, seed=3):
    """(reward, KL paid, needed, wasted) from 2,048 stories of the policy."""
    stories, rewards = draw(policy, 2048, seed)
    paid = float((token_logps(policy, stories) - token_logps(ref, stories)).sum(1).mean())
    needed, _ = needed_kl(counted(rewards), ref_counts)
    return float(rewards.mean()), paid, needed, paid - needed


reward, paid, needed, wasted = cost(policy)
p, q = shares, ref_shares
print(f"needed by hand: {(p * np.log(p / q)).sum():.3f}")
print(f"reward {reward:.3f}, paid {paid:.3f} nats = needed {needed:.3f} + wasted {wasted:.3f}")
assert wasted > -0.03, "a law, up to the noise of counting: nothing costs less than it needs"

# %% [markdown]
# Most of the price was for the heroes. The rest is what a small network changes besides, because all stories share its weights.

# %%
walk = np.array([ref_shares, *[step_shares for step_shares, _ in path]])  # (1 + steps, 3): ref, then the stories of each update
smooth = np.array([walk[max(0, k - 4) : k + 5].mean(0) for k in range(len(walk))])
smooth[0] = ref_shares
figure, axis = plt.subplots(figsize=(7, 3.4), constrained_layout=True)
for level, color in enumerate(("0.5", "C0", "C1")):
    axis.plot(walk[:, level], ".", color=color, ms=3, alpha=0.5)
    axis.plot(smooth[:, level], color=color, label=NAMES[level])
    axis.axhline(law[level], color=color, ls="--", lw=1)
axis.set(xlabel="update", ylabel="share of the stories", ylim=(0, None))
axis.set_title("Shares walk to their closed form (dashed)", fontsize=11)
axis.legend(frameon=False, loc="upper right", ncols=3)
plt.show() if IN_NOTEBOOK else figure.savefig("11_walk.png", dpi=110)

# %% [markdown]
# ## Break it: let go of ref
#
# β holds the policy to ref. Set it to 0 and take ten times the learning rate: the policy gets nearly all of the reward, and its language
# breaks. Read the stories, not only the numbers.

# %%
pushed = copy.deepcopy(ref).requires_grad_(True)
follow(pushed, 0.0, steps=40, lr=2e-3)
tell(pushed)
reward_0, paid_0, needed_0, wasted_0 = cost(pushed)
print(f"β = 1.25: reward {reward:.2f}, needed {needed:.2f}, wasted {wasted:.2f} nats")
print(f"β = 0:    reward {reward_0:.2f}, needed {needed_0:.2f}, wasted {wasted_0:.2f} nats")
assert reward_0 > reward and wasted_0 > 4 * wasted, "of this run: more reward, and much more waste"

# %% [markdown]
# The reward is nearly perfect and needs about two nats: −log of ref's share of animals, for a policy that tells of nothing else. All the
# other nats are damage. A reward cannot see it, because every one of these stories has an animal for its hero.
#
# ## From demonstrations alone
#
# Now nobody tells us the reward. Somebody wrote stories, and we have them. To check what we learn we need an expert whose distribution is
# known, and since the reward is at most 2, we can have one exactly: keep a story of ref with probability e^{(r − 2)/β}. What is kept is
# distributed as ref·e^{r/β}. This is rejection sampling, and `python -m minialign generate --keep tilt:1.25 --reward_max 2` does it.

# %%
pool, pool_rewards = draw(ref, 16384, seed=4)
coins = torch.rand(len(pool_rewards), generator=torch.Generator().manual_seed(5))
kept = (coins < ((pool_rewards - 2) / BETA).exp()).nonzero().flatten().tolist()
demos = [pool.completions[i] for i in kept]
print(f"{len(demos):,} demonstrations; shares", (counted(pool_rewards[kept]) / len(kept)).numpy().round(3), "law", law.round(3))

# %% [markdown]
# ### Imitate: SFT
#
# Tutorial 04: make the demonstrations likely. Its fixed point is the expert, so the shares must walk to the same three numbers, though no
# reward is anywhere in this cell.

# %%
imitator = copy.deepcopy(ref).requires_grad_(True)
optimizer = torch.optim.AdamW(imitator.parameters(), lr=3e-4, weight_decay=0)
order = torch.randperm(len(demos), generator=torch.Generator().manual_seed(6)).tolist()
STEPS = len(demos) // 64
for k in range(STEPS):
    optimizer.param_groups[0]["lr"] = 3e-4 * (1 - k / STEPS)
    batch = collate([prompt_ids] * 64, [demos[i] for i in order[64 * k : 64 * k + 64]], pad_id=tokenizer.pad_id)
    loss, _ = sft_loss(token_logps(imitator, batch), batch.mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

_, rewards = draw(imitator, 4096, seed=7)
print("learned", (counted(rewards) / 4096).numpy().round(3), "law", law.round(3))
print("reward {:.3f}, paid {:.3f} = needed {:.3f} + wasted {:.3f}".format(*cost(imitator)))
tell(imitator)

# %% [markdown]
# ### Recover the reward
#
# The idea behind inverse RL is that the demonstrations *contain* the reward. Train a scalar head on the storyteller's own trunk to tell the
# expert's stories from ref's, with the logistic loss. Its best answer is log E(y)/ref(y) (the density-ratio lemma of toy/closed_form.py),
# and for our expert that is r(y)/β + a constant. So β times what it learns must be 0, 1 and 2 for the three classes, up to a constant. It
# has never seen a reward.

# %%
settings = RewardSettings(bound=0.0)
reward_model = constant_reward(ref, settings).requires_grad_(True)
optimizer = torch.optim.AdamW(reward_model.parameters(), lr=1e-3, weight_decay=0)
for k in range(STEPS):
    optimizer.param_groups[0]["lr"] = 1e-3 * (1 - k / STEPS)
    shown = [demos[i] for i in order[64 * k : 64 * k + 64]]
    own = ref_stories.completions[64 * k % 8192 : 64 * k % 8192 + 64]
    good, usual = (score(reward_model, collate([prompt_ids] * 64, rows, pad_id=tokenizer.pad_id)) for rows in (shown, own))
    loss = torch.nn.functional.softplus(usual - good).mean()  # watch: good (B,)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
    optimizer.step()

with torch.no_grad():
    learned = BETA * score(reward_model, collate([prompt_ids] * 2048, pool.completions[-2048:], pad_id=tokenizer.pad_id))
means = torch.stack([learned[pool_rewards[-2048:] == level].mean() for level in LEVELS])
print("true reward    0.00 1.00 2.00")
print("learned reward", " ".join(f"{mean:.2f}" for mean in means - means[0]))
assert means[0] < means[1] < means[2], "of this run: the order of the three classes is recovered"

# %% [markdown]
# ### And follow what was learned
#
# RFT and IRL put this reward where yours was. The same loop, another reward, the same three numbers to walk to.

# %%
follower = copy.deepcopy(ref).requires_grad_(True)


@torch.no_grad()
def learned_reward(stories):
    return BETA * score(reward_model, stories)


follow(follower, BETA, steps=50, lr=3e-4, reward_of=learned_reward)
results = {"RLOO, your reward": policy, "SFT": imitator, "RLOO, learned reward": follower}
print(f"{'':22}{'reward':>8}{'paid':>8}{'needed':>8}{'wasted':>8}")
table = {name: cost(model) for name, model in results.items()}
for name, numbers in table.items():
    print(f"{name:22}" + "".join(f"{number:8.3f}" for number in numbers))
tell(follower)

# %%
figure, axis = plt.subplots(figsize=(7, 2.4), constrained_layout=True)
for y, (_, _, needed, wasted) in enumerate(table.values()):
    axis.barh(y, needed, 0.6, color="C2", label="needed" if not y else None)
    axis.barh(y, wasted, 0.6, left=needed, color="C3", label="wasted" if not y else None)
axis.set(yticks=range(len(table)), yticklabels=list(table), xlabel="KL from ref, nats")
axis.set_xlim(0, 1.35 * max(paid for _, paid, _, _ in table.values()))
axis.invert_yaxis()
axis.legend(frameon=False, loc="center right")
axis.set_title("What the heroes cost, and what went to waste", fontsize=11)
plt.show() if IN_NOTEBOOK else figure.savefig("11_cost.png", dpi=110)

# %% [markdown]
# ## What to take home
#
# - A reward of few values turns a language model into a handful of actions: **count**, and you know where training must end.
# - The text shows what the numbers do not, and the split into **needed and wasted** shows what the reward does not.
# - Demonstrations alone gave the same heroes. Imitation did it directly; the learned reward did it by way of a number per story, which can
#   be looked at, and kept.
# - `python -m toy.storyteller` does this with ten methods, each against its own closed form (docs/RESULTS.md has the table).
#
# ## Exercises
#
# 1. **Your own reward.** Give 1 to stories whose hero has a name that begins with T, and 0 to the others. What are ref's shares, what is
#    the law at β = ½, and does `follow` get there?
# 2. **Wrong on purpose.** Change the sign of the KL in `follow` (`rewards + beta * logratio`). Predict what happens to the waste first.
# 3. **Best of 4.** What are the shares of the best of four stories of ref, by formula and by drawing? Which of needed and wasted is 0?
#
# <details><summary><b>Solutions</b></summary>
#
# 1. `hero = lambda text: int(bool(re.search(r"named T", text)))`, with `LEVELS = np.array([0., 1.])`, `minlength=2` in `counted`, and
#    `closed_form.tilt(shares, LEVELS, 0.5)`. A share p becomes p·e²/(1 − p + p·e²). It gets there as the heroes do.
# 2. The policy is paid for moving away from ref, so nothing holds it: the waste grows without bound, and the text breaks even though the
#    reward is the same.
# 3. `closed_form.best_of_n_law(ref_shares, LEVELS, 4)`: all four are girls with probability p₀⁴, and so on. Within a class the best is the
#    first of its class, a sample of ref: nothing is wasted.
#
# </details>

# %%
solution = closed_form.best_of_n_law(ref_shares, LEVELS, 4)
groups = ref_rewards.view(-1, 4)  # 2,048 groups of four stories
drawn = counted(groups.amax(1)) / len(groups)
print("best of 4 by formula", solution.round(3), "by drawing", drawn.numpy().round(3))
assert np.abs(solution - drawn.numpy()).max() < 0.04
