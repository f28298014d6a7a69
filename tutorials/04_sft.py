# %% [markdown]
# # 04 · Supervised fine-tuning and IFT: be like the demonstrations
#
# **You will hold** `sft_loss`, five lines, and `ift_loss`, ten, both proved equal to the project's; a picture of overfitting measured
# against the exact truth; and four ways to get SFT wrong without noticing, each caught by an assertion.
#
# **Minutes:** 40 to read, about 40 seconds of CPU to run. **You need:** tutorial 03 (`token_logps`, `mask`), and what a KL
# divergence is.

# %%
import copy
import math
import sys
from pathlib import Path

# The project is not installed, it runs from its checkout: find the folder above this file (or above the notebook) that holds it.
ROOT = next(folder for folder in Path(globals().get("__file__", "here")).resolve().parents if (folder / "minialign").is_dir())
sys.path.insert(0, str(ROOT))

import matplotlib

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # a script draws into a file: no window to close, no screen needed
import matplotlib.pyplot as plt
import torch

from minialign import data, task
from minialign.batch import collate
from minialign.engine.common import batch_rows, lr_at, set_lr, split_micro
from minialign.logps import seq_logps, token_logps
from minialign.methods import ift, sft
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from toy.closed_form import ift_law, sft_flow

# %% [markdown]
# ## The question
#
# Somebody shows how it is done: prompts $x$ with good completions $y$. There is no reward, and nobody says which answers are bad. What
# policy should come out of this?
#
# ## The equation
#
# The plain answer: the policy under which the demonstrations are likeliest. Let $E$ be the law that the demonstrations are drawn from.
#
# $$\mathrm{KL}(E \,\|\, \pi) = \underbrace{\sum_y E(y|x) \log E(y|x)}_{-H(E),\ \text{no } \pi \text{ in it}}
#   \; - \; \sum_y E(y|x) \log \pi(y|x) .$$
#
# The first term is fixed. So raising the log-probability of demonstrations **is** lowering $\mathrm{KL}(E\|\pi)$, and the lowest point is
# $\pi = E$. With $N$ scored tokens in the step, the loss is
#
# $$L = -\frac{1}{N} \sum_b \sum_t \log \pi(y_{b,t} \mid x_b, y_{b,<t}) .$$

# %% [markdown]
# ## The tiniest numbers: three actions
#
# One prompt, three completions of one token, and a policy that is three logits. The expert always shows action 3. By hand: at equal
# logits $p = (\frac13, \frac13, \frac13)$, the loss is $\log 3 = 1.098612$, and its gradient is $p - \mathrm{onehot}$.

# %%
shown = torch.tensor([0.0, 0.0, 1.0])  # the expert's law E
logits = torch.zeros(3, requires_grad=True)
loss = -(shown * logits.log_softmax(0)).sum()
loss.backward()
print(f"loss {loss.item():.6f}   gradient {logits.grad.numpy().round(6)}")
torch.testing.assert_close(loss.item(), math.log(3), atol=1e-6, rtol=0)
torch.testing.assert_close(logits.grad, torch.tensor([1 / 3, 1 / 3, -2 / 3]))


def descend(law, steps, lr):
    """Gradient descent on KL(law ‖ softmax(logits)) from equal logits, by hand: the policies after each step (steps + 1, 3)."""
    logits, path = torch.zeros(3, dtype=torch.float64), []
    for _ in range(steps + 1):
        p = logits.softmax(0)  # watch: p (3,)
        path.append(p)
        logits = logits - lr * (p - law)  # the gradient, written out
    return torch.stack(path)


# %% [markdown]
# How fast? Let $d$ be the shown logit minus another one. With infinitely small steps, $d$ obeys
# $2d + e^d = 1 + 3 \cdot \mathrm{lr} \cdot \mathrm{steps}$ (derived in `toy/closed_form.py`). Steps of 0.1 run a little ahead of it.

# %%
path = descend(shown.double(), steps=1000, lr=0.1)
print("steps   probability of the shown action   the law of the flow")
for steps, expected in ((0, 0.333333), (10, 0.540064), (100, 0.925654), (1000, 0.993159)):
    law = sft_flow(0.1 * steps)
    d = math.log(2 * law / (1 - law))
    print(f"{steps:5}   {path[steps, 2].item():.6f}   {' ' * 22} {law:.6f}")
    torch.testing.assert_close(path[steps, 2].item(), expected, atol=1e-6, rtol=0)
    assert abs(path[steps, 2].item() - law) < 0.005
    assert abs(2 * d + math.exp(d) - (1 + 3 * 0.1 * steps)) < 1e-6  # the law solves its equation

# %% [markdown]
# Two lessons from three numbers. The probability goes to **1**: one demonstration, shown for ever, and the other two actions die, although
# nobody called them bad. And it goes there slowly, like $1 - 1/(1.5 \cdot \mathrm{lr} \cdot \mathrm{steps})$: the gradient shrinks with
# what is left.
#
# An expert who mixes is copied as a mixture. The gradient is then $p - E$, and it vanishes at $p = E$ and nowhere else.

# %%
left_over = (1 - path[1000, 2]).item()
torch.testing.assert_close(left_over, 1 / (1.5 * 0.1 * 1000), atol=0, rtol=0.05)

mixed = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
path = descend(mixed, steps=1000, lr=0.1)
kl = (mixed * (mixed.log() - path.log())).sum(1)  # watch: kl (steps + 1,)
print("KL(E ‖ π) at steps 0, 10, 100, 1000:", [f"{kl[k].item():.2e}" for k in (0, 10, 100, 1000)], "  π →", path[-1].numpy().round(6))
assert (kl.diff() <= 1e-15).all()  # it only falls
torch.testing.assert_close(path[-1], mixed, atol=1e-6, rtol=0)

# %% [markdown]
# ## Build it yourself
#
# For sequences: the sum of `logps` over scored tokens, divided by how many there are. `n_tokens` will matter in a minute.


# %%
def my_sft_loss(logps, mask, n_tokens=None):
    """logps, mask (B, T) -> the mean negative log-likelihood of the scored tokens, in nats per token."""
    scored = torch.where(mask, logps, 0).sum()  # watch: scored ()
    return -scored / (mask.sum() if n_tokens is None else n_tokens)


# %% [markdown]
# ## Checkpoint
#
# On random numbers, with masked positions at $-\infty$ for good measure: values and gradients equal the project's.

# %%
generator = torch.Generator().manual_seed(0)
mask = torch.rand(4, 6, generator=generator) < 0.6
logps = (-torch.rand(4, 6, generator=generator)).masked_fill(~mask, -torch.inf).requires_grad_()
for n_tokens in (None, 100):
    mine, (theirs, stats) = my_sft_loss(logps, mask, n_tokens), sft.sft_loss(logps, mask, n_tokens=n_tokens)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.autograd.grad(mine, logps)[0], torch.autograd.grad(theirs, logps)[0])
print(f"sft_loss: equal to minialign's ({int(stats['scored_tokens'])} scored tokens)")

# %% [markdown]
# ## Divided by what?
#
# Two completions; their token losses are [1, 1] and [2, 2, 2, 2]. Three programs, three numbers, all called "the SFT loss":

# %%
two_losses = torch.tensor([[1.0, 1, 0, 0], [2, 2, 2, 2]])
two_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()


def token_mean(losses, mask):
    return torch.where(mask, losses, 0).sum() / mask.sum()


def sequence_mean(losses, mask):
    return (torch.where(mask, losses, 0).sum(1) / mask.sum(1)).mean()


def sequence_sum_mean(losses, mask):
    return torch.where(mask, losses, 0).sum(1).mean()


for reduction, expected in ((token_mean, 1.666667), (sequence_mean, 1.5), (sequence_sum_mean, 5.0)):
    print(f"{reduction.__name__:18} {reduction(two_losses, two_mask).item():.6f}")
    torch.testing.assert_close(reduction(two_losses, two_mask).item(), expected, atol=1e-6, rtol=0)
torch.testing.assert_close(my_sft_loss(-two_losses, two_mask), token_mean(two_losses, two_mask))

# %% [markdown]
# Is that only a matter of units? No. A prompt has two answers, demonstrated **equally often**: a short one of 2 tokens, a long one of 6.
# The first token decides which; the others are then certain. So there is one logit $z$, and maximum likelihood must end at one half.

# %%
answer_mask = torch.zeros(2, 6, dtype=torch.bool)
answer_mask[0, :2], answer_mask[1, :6] = True, True


def share_of_short(reduction):
    """The probability of the short answer after 2000 steps of gradient descent with this reduction."""
    z = torch.tensor(0.3, requires_grad=True)
    for _ in range(2000):
        first = -torch.nn.functional.logsigmoid(torch.stack([z, -z]))  # (2,) the loss of each answer's first token
        losses = torch.cat([first[:, None], torch.zeros(2, 5)], dim=1)  # (2, 6) the others cost nothing
        (gradient,) = torch.autograd.grad(reduction(losses, answer_mask), z)
        z = (z - 0.5 * gradient).detach().requires_grad_()
    return z.sigmoid().item()


for reduction, expected in ((token_mean, 0.5), (sequence_mean, 0.75), (sequence_sum_mean, 0.5)):
    share = share_of_short(reduction)
    print(f"{reduction.__name__:18} ends at π(short) = {share:.4f}")
    assert abs(share - expected) < 0.001

# %% [markdown]
# The mean of sequence means divides the long answer's choice by 6 and the short one's by 2. It teaches a preference for short
# answers, three to one, that no demonstration contains. Token mean and sequence sum differ by one factor for the whole batch; both are
# maximum likelihood. The project divides by tokens.

# %% [markdown]
# ## Break it on purpose, 1: the mean of means
#
# A batch that does not fit into memory is split into micro-batches whose gradients add up. One batch of 8, two of 4, eight of 1: the same
# 8 rows should give the same gradient. They do if each piece is divided by the tokens of the **whole** step, and do not if each is
# divided by its own and the pieces are averaged. The first rows below are five answers in a word or two, the last three a sentence.

# %%
tokenizer = task.builtin_tokenizer()
torch.manual_seed(0)
small = GPT(GPTConfig.tiny(tokenizer.vocab_size)).double()
answers = ["now", "tea", "i want", "rope", "me"] + ["could i get tea if you can. could i get tea if you can."] * 3
prompt = data.encode_prompt(tokenizer, "ask for tea: ")
rows = [(prompt, data.encode_completion(tokenizer, answer)) for answer in answers]


def gradient_of(micro_batch, global_count):
    batches = [data.demo_batch(rows, picked, pad_id=tokenizer.pad_id, max_len=96) for picked in split_micro(range(8), micro_batch)]
    n_tokens = sum(int(batch.mask.sum()) for batch in batches)
    small.zero_grad()
    for batch in batches:
        logps = token_logps(small, batch)  # (B, T)
        loss = my_sft_loss(logps, batch.mask, n_tokens) if global_count else my_sft_loss(logps, batch.mask) / len(batches)
        loss.backward()  # gradients add up in .grad
    return torch.cat([parameter.grad.flatten() for parameter in small.parameters()])  # watch: the gradient (parameters,)


whole = gradient_of(8, global_count=True)
for micro_batch in (8, 4, 1):
    right, wrong = gradient_of(micro_batch, global_count=True), gradient_of(micro_batch, global_count=False)
    error = ((right - whole).norm() / whole.norm()).item(), ((wrong - whole).norm() / whole.norm()).item()
    print(f"{8 // micro_batch} × {micro_batch}: relative error with the global count {error[0]:.1e}, as a mean of means {error[1]:.1e}")
    assert error[0] < 1e-12
    assert (error[1] > 0.1) == (micro_batch < 8)

# %% [markdown]
# ## The experiment: demonstrations of which we know the law
#
# The built-in language of requests: the prompt names a thing, the completion asks for it with one of 6 openings and one of 6 endings, so
# each prompt has 36 completions. Speakers differ in one number only, how often an opening or an ending is polite:
#
# - the **base model** read 2000 texts of rude speakers (polite with probability 0.25);
# - the **expert** is polite with probability 0.9;
# - the 200 **demonstrations** come from the expert, but 30 % of them from a rude speaker after all. Real data is like that.
#
# Because the laws are known, so is $\mathrm{KL}$: no estimate, a sum over 36 completions, averaged over the 24 things.

# %%
PROMPTS = [task.builtin_prompt(thing) for thing in task.THINGS]
COMPLETIONS = [list(task.builtin_law(prompt, task.EXPERT)) for prompt in PROMPTS]  # 24 lists of 36
everything = collate(
    [data.encode_prompt(tokenizer, prompt) for prompt in PROMPTS for _ in range(36)],
    [data.encode_completion(tokenizer, completion) for completions in COMPLETIONS for completion in completions],
    pad_id=tokenizer.pad_id,
)
expert = torch.tensor([list(task.builtin_law(prompt, task.EXPERT).values()) for prompt in PROMPTS])  # watch: expert (24, 36)
rude = torch.tensor([list(task.builtin_law(prompt, task.RUDE).values()) for prompt in PROMPTS])
shown = 0.7 * expert + 0.3 * rude  # the law that the demonstrations are drawn from
entropy = -(shown * shown.log()).sum(1).mean().item()


def exact_kl(law, all_logps):
    """KL(law ‖ π), averaged over the prompts; law, all_logps (24, 36)."""
    return (law * (law.log() - all_logps)).sum(1).mean().item()


@torch.no_grad()
def all_logps_of(policy):
    return seq_logps(policy, everything).view(24, 36)


torch.testing.assert_close(shown.sum(1), torch.ones(24))
print(f"entropy of the demonstrations' law: {entropy:.4f} nats a completion;   KL(expert ‖ that law) {exact_kl(expert, shown.log()):.4f}")

# %% [markdown]
# First the base model, a tiny GPT (two layers, 64 channels), trained on plain text: the same loss, with every token scored. Some ten
# seconds.


# %%
def train(policy, rows, *, steps, lr, schedule="cosine", every=0, look=None):
    """The whole of SFT. `look(k)` is called every `every` steps."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(steps):
        if look and k % every == 0:
            look(k)
        batch = data.demo_batch(rows, batch_rows(len(rows), 32, k, seed=0), pad_id=tokenizer.pad_id, max_len=96)
        set_lr(optimizer, lr_at(k, lr=lr, steps=steps, warmup=0.1, schedule=schedule))
        optimizer.zero_grad()
        loss = my_sft_loss(token_logps(policy, batch), batch.mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    if look:
        look(steps)
    return loss.item()


torch.manual_seed(0)
base = GPT(GPTConfig.tiny(tokenizer.vocab_size))
train(base, data.encode_texts(tokenizer, task.builtin_texts(), max_len=96), steps=300, lr=1e-2)
base_logps = all_logps_of(base)
print(f"KL(rude ‖ base) {exact_kl(rude, base_logps):.3f}   KL(expert ‖ base) {exact_kl(expert, base_logps):.3f}   "
      f"mass on the 36 completions {base_logps.exp().sum(1).mean():.3f}")
assert exact_kl(rude, base_logps) < 0.4 < 1.2 < exact_kl(expert, base_logps)

# %% [markdown]
# Now SFT on the 200 demonstrations, much longer than is good for it. At each look we note
#
# - the loss of the **training demonstrations**, in nats per completion;
# - the loss of **all demonstrations that could have been drawn**: $-\sum_y D(y) \log \pi(y)$ with their exact law $D$. By the equation at
#   the top it is $H(D) + \mathrm{KL}(D\|\pi)$, so it can never go below $H(D)$;
# - where the probability is: on completions that were demonstrated for their prompt, on the other ones of the 36, or on none of them.

# %%
demos = task.builtin_demos()
demo_rows = data.encode_demos(tokenizer, demos)
demo_whole = data.demo_batch(demo_rows, range(len(demo_rows)), pad_id=tokenizer.pad_id, max_len=96)
seen = torch.tensor([[(prompt, completion) in {(d.prompt, d.completion) for d in demos} for completion in completions]
                     for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True)])  # watch: seen (24, 36)

policy, history, best = copy.deepcopy(base), [], {}


def look(k):
    with torch.no_grad():
        train_loss = -seq_logps(policy, demo_whole).mean().item()
    all_logps = all_logps_of(policy)
    probs = all_logps.exp()
    row = {"step": k, "train": train_loss, "kl": exact_kl(shown, all_logps), "expert_kl": exact_kl(expert, all_logps),
           "true": -(shown * all_logps).sum(1).mean().item(),
           "seen": (probs * seen).sum(1).mean().item(), "unseen": (probs * ~seen).sum(1).mean().item()}
    assert abs(row["true"] - (entropy + row["kl"])) < 1e-4  # the equation at the top
    if row["kl"] < min((old["kl"] for old in history), default=math.inf):
        best.update(row, policy=copy.deepcopy(policy))
    history.append(row)
    if k % 40 == 0:
        print(*(f"{row[name]:11.3f}" if name != "step" else f"{k:4}" for name in row))


print("step       train   KL(D ‖ π)   KL(E ‖ π)        true        seen      unseen")
train(policy, demo_rows, steps=160, lr=3e-4, schedule="constant", every=10, look=look)
print(f"best KL(D ‖ π) {best['kl']:.3f} at step {best['step']}")

first, last = history[0], history[-1]
assert all(later["train"] < earlier["train"] for earlier, later in zip(history[::4], history[4::4], strict=False))  # it always looks better
assert best["kl"] < 0.5 * first["kl"] and last["kl"] > 2 * best["kl"]  # it is not
assert last["train"] < entropy < best["true"]  # below the entropy: no policy can be that good on fresh demonstrations
assert last["seen"] > first["seen"] + 0.2 and last["unseen"] < first["unseen"] - 0.2

# %%
DARK, BLUE, RED, LIGHT = "#1b2a41", "#2a6f97", "#d1495b", "#c9ced6"
steps = [row["step"] for row in history]
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), dpi=150)

true_loss, train_loss = [row["true"] for row in history], [row["train"] for row in history]
left.fill_between(steps, entropy, true_loss, color=RED, alpha=0.10, linewidth=0)
left.plot(steps, true_loss, color=RED, linewidth=2.2)
left.plot(steps, train_loss, color=BLUE, linewidth=2.2)
left.axhline(entropy, color=DARK, linewidth=1, linestyle=(0, (4, 3)))
left.plot(best["step"], best["true"], "o", color=RED, markersize=7, zorder=3)
left.annotate(f"best policy, step {best['step']}", (best["step"], best["true"]), (best["step"] + 4, best["true"] + 0.6), color=DARK,
              fontsize=9, arrowprops=dict(arrowstyle="-", color=DARK, linewidth=0.7, shrinkB=5))
left.text(steps[-1], true_loss[-1] + 0.05, "all possible demonstrations", color=RED, ha="right", va="bottom", weight="bold")
left.text(steps[-1], train_loss[-1] - 0.08, "the 200 training demonstrations", color=BLUE, ha="right", va="top", weight="bold")
left.text(steps[-1] - 2, (entropy + true_loss[-1]) / 2, "KL(D ‖ π)", color=RED, ha="right", va="center")
left.text(steps[-1], entropy - 0.05, "H(D), the entropy of their law", color=DARK, ha="right", va="top", fontsize=9)
left.set(xlabel="optimizer steps", ylabel="loss, nats per completion", xlim=(0, steps[-1]))
left.set(ylim=(min(train_loss) - 0.35, max(true_loss) + 0.3))
left.set_title("The training loss keeps falling, the true loss does not", color=DARK, loc="left", fontsize=12)

mass_seen, mass_unseen = [row["seen"] for row in history], [row["unseen"] for row in history]
neither = [1 - a - b for a, b in zip(mass_seen, mass_unseen, strict=True)]
right.stackplot(steps, mass_seen, mass_unseen, neither, colors=[BLUE, "#a9d0e3", LIGHT], edgecolor="white", linewidth=0.8)
under_law = (shown * seen).sum(1).mean().item()
right.axhline(under_law, color=DARK, linewidth=1, linestyle=(0, (4, 3)))
right.text(steps[-1] - 2, under_law - 0.02, f"their share under the law: {under_law:.2f}", color="white", ha="right", va="top", fontsize=9)
right.text(steps[-1] - 2, 0.12, "demonstrated for this prompt", color="white", ha="right", weight="bold")
right.text(60, 0.66, "requests of the language\nthat were not demonstrated", color=DARK, ha="center", va="center", weight="bold")
right.text(60, 1 - neither[6] / 2, "any other text", color=DARK, ha="center", va="center", fontsize=9)
right.set(xlabel="optimizer steps", ylabel="probability", xlim=(0, steps[-1]), ylim=(0, 1))
right.set_title("The mass leaves what was not shown", color=DARK, loc="left", fontsize=12)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=DARK)
figure.tight_layout(w_pad=3)
figure_path = Path("runs/tutorials/04_sft.png")  # below the folder you run from
figure_path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(figure_path)
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", figure_path)

# %% [markdown]
# Left: the blue curve is all that SFT sees, and it never turns. The red one is the truth. They part early; once blue is below the
# dashed line the policy claims to know more about the demonstrations than there is to know. It has learned them by heart.
#
# Right: what learning by heart does. Under the true law, the 175 completions that happened to be demonstrated hold 30 % of the
# probability. SFT goes on until they hold more than half. The others were never called bad, and some are as polite as can be. They
# lose because probabilities sum to one. It is the three-action toy again, 24 times.

# %%
assert int(seen.sum()) == 175 and abs(under_law - 0.30) < 0.01
polite_unseen = (expert > 0.05) & ~seen  # polite opening and polite ending, in no demonstration
best_probs, last_probs = all_logps_of(best["policy"]).exp(), all_logps_of(policy).exp()
polite_mass = [(probs * polite_unseen).sum(1).mean().item() for probs in (shown, best_probs, last_probs)]
print(f"{int(polite_unseen.sum())} polite requests, never demonstrated: mass {polite_mass[0]:.3f} under the law, "
      f"{polite_mass[1]:.3f} at the best step, {polite_mass[2]:.3f} at the last")
assert polite_mass[2] < 0.85 * polite_mass[1] and last["seen"] > 0.5

# %% [markdown]
# ### SFT copies the demonstrators, not the expert
#
# Even the best policy of the run is not the expert's. Its target is the law of the demonstrations, rude speakers included.

# %%
polite_opening = torch.tensor([[c.startswith(task.POLITE_OPENINGS) for c in completions] for completions in COMPLETIONS])
shares = {"base": base_logps.exp(), "SFT, best step": best_probs, "demonstrations' law": shown, "expert": expert}
shares = {name: ((probs * polite_opening).sum(1) / probs.sum(1)).mean().item() for name, probs in shares.items()}
for name, share in shares.items():
    print(f"{name:20} polite openings {share:.3f}  {'█' * round(40 * share)}")
torch.testing.assert_close(shares["demonstrations' law"], 0.7 * 0.9 + 0.3 * 0.25, atol=1e-4, rtol=0)
assert abs(shares["SFT, best step"] - shares["demonstrations' law"]) < 0.12 and shares["SFT, best step"] < shares["expert"]

# %% [markdown]
# Two things SFT does not have, then: a reason to spare a good answer that nobody showed, and a notion that some demonstrations are better
# than others. Both would take a *reward*. Tutorial 05, inverse_rl, learns one from demonstrations alone, and measures what it adds
# (and what it does not).
#
# ## Break it on purpose, 2: score the prompt
#
# With plain text every token is a target. With demonstrations the prompt is given, and the policy will never have to write it. Score it
# anyway, and the loss carries a part that nobody can learn: which of 24 things comes next, $\log 24 = 3.18$ nats a row.

# %%
whole_rows = [(prompt_ids[:1], prompt_ids[1:] + completion_ids) for prompt_ids, completion_ids in demo_rows]
whole_batch = data.demo_batch(whole_rows, range(len(whole_rows)), pad_id=tokenizer.pad_id, max_len=96)  # prompt scored
with torch.no_grad():
    whole_logps = token_logps(best["policy"], whole_batch)
prompt_loss = -(torch.where(demo_whole.mask, 0, whole_logps).sum(1).mean()).item()
completion_loss = -(torch.where(demo_whole.mask, whole_logps, 0).sum(1).mean()).item()
base_prompt_loss = -(torch.where(demo_whole.mask, 0, token_logps(base, whole_batch)).sum(1).mean()).item()
prompt_share = 1 - demo_whole.mask.sum().item() / whole_batch.mask.sum().item()
print(f"loss per row: completion {completion_loss:.2f}, prompt {prompt_loss:.2f} (base {base_prompt_loss:.2f}, log 24 {math.log(24):.2f})")
print(f"tokens that are prompt: {100 * prompt_share:.0f} %;   per token: masked {completion_loss * 200 / demo_whole.mask.sum():.3f}, "
      f"unmasked {-whole_logps.sum() / whole_batch.mask.sum():.3f}")
torch.testing.assert_close(whole_batch.targets, demo_whole.targets)  # the same rows, another mask
assert abs(base_prompt_loss - math.log(24)) < 0.5
assert prompt_share > 0.3

# %% [markdown]
# A third of the gradient's terms would go into guessing prompts, and the number on your screen would mix two things. `collate` masks the
# prompt; for plain text `encode_texts` hands it everything but the first token as completion.
#
# ## Break it on purpose, 3: never teach EOS
#
# Cut EOS off every completion, train from random weights, and sample. We also ask the policy directly: at the end of each of the
# $24 \cdot 36$ sentences, how likely is EOS?

# %%
torch.manual_seed(0)
endless = GPT(GPTConfig.tiny(tokenizer.vocab_size))
without_eos = [(seen_ids, ids[:-1]) for seen_ids, ids in data.encode_texts(tokenizer, task.builtin_texts(), max_len=96)]
train(endless, without_eos, steps=150, lr=1e-2)

asked = [data.encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
last_prediction = everything.mask & (everything.mask.cumsum(1) == everything.mask.sum(1, keepdim=True))  # (24·36, T) the one of EOS
assert (everything.targets[last_prediction] == tokenizer.eos_id).all()


def stopping(model):
    """(share of 96 samples that stop within 60 tokens, mean probability of EOS at the end of a sentence)."""
    with torch.no_grad():
        at_the_end = token_logps(model, everything)[last_prediction].exp().mean().item()
    rollout = sample(model, asked, n=4, max_new=60, eos_id=tokenizer.eos_id, seed=0)  # watch: rollout.finished (B,)
    return rollout.finished.float().mean().item(), at_the_end, tokenizer.decode(rollout.completions[0])


for name, model in (("with EOS", base), ("without EOS", endless)):
    share, at_the_end, text = stopping(model)
    print(f"{name:12} π(EOS | end of sentence) {at_the_end:.4f}   {100 * share:5.1f} % stop   {PROMPTS[0]}{text}")
    assert (share > 0.9 and at_the_end > 0.9) if name == "with EOS" else (share < 0.25 and at_the_end < 0.05), name

# %% [markdown]
# EOS was never a target, so every step pushed its logit down. The policy finishes its request and babbles on until it is cut
# off, but for a few samples that hit EOS by accident.
#
# Now the case that hides: start from a base model that *can* stop, and fine-tune without EOS. No gradient reaches the
# prediction after the last letter, the old habit survives, and every sample looks right.

# %%
hidden_bug = copy.deepcopy(base)
train(hidden_bug, [(prompt_ids, ids[:-1]) for prompt_ids, ids in demo_rows], steps=40, lr=3e-4)
share, at_the_end, text = stopping(hidden_bug)
print(f"base with EOS, fine-tuned without: π(EOS | end of sentence) {at_the_end:.4f}   {100 * share:.1f} % stop")
assert share > 0.9  # so samples do not reveal it; the mask does:
scored_eos = demo_whole.mask & (demo_whole.targets == tokenizer.eos_id)
assert (scored_eos.sum(1) == 1).all()  # one EOS scored in each row: assert this of your data

# %% [markdown]
# It surfaces with the first base model that does not know your EOS. Do not trust samples here, look at the mask. Every run of this
# project prints three rows with their scored tokens marked before its first step.
#
# ## IFT: read the demonstration as you would have begun it
#
# SFT always reads the demonstrator's words, and writes one token after them. Later the policy reads its *own* words, slips included, which
# it never met in training. Intuitive fine-tuning changes two things, and needs no samples for either:
#
# - the **inputs** are mixed with the policy's own greedy guesses, a share $\lambda$ of each embedding: it meets a little of what it would
#   have written;
# - a token gets a **weight** for the losses that follow it, faded by $\gamma$ per step: it answers for where it leads.
#
# $$L = \frac1B \sum_b \frac1n \sum_t w_t \, \ell_t, \qquad \ell_t = -\log \pi(y_t \mid \hat e_{<t}), \qquad
#   \hat e_t = (1 - \lambda)\, e(y_t) + \lambda\, e(\tilde y_t), \qquad
#   w_t = \frac{n\, c_t}{\sum_s c_s}, \qquad c_t = \sum_{i \ge t} \gamma^{i-t} \ell_i .$$
#
# By hand, for losses 1, 2, .5, 4 and $\gamma = .95$, from the end: $c_4 = 4$, $c_3 = .5 + .95 \cdot 4 = 4.3$, $c_2 = 2 + .95 \cdot 4.3 =
# 6.085$, $c_1 = 6.78075$. Their sum is 21.16575, so $w = 4c / 21.16575$, of mean 1. The last token is the hardest and has the smallest
# weight.


# %%
def my_ift_loss(logps, mask, decay, detach_weights=True):
    """logps, mask (B, T) -> the mean over completions of Σ_t w_t·ℓ_t / n."""
    rows = []
    for row, scored in zip(logps, mask, strict=True):
        places = scored.nonzero().squeeze(1)  # (n,)
        losses = -row[places]  # (n,)
        reach = torch.triu(decay ** (places - places[:, None]).clamp(min=0).to(losses))  # watch: reach (n, n), γ^(i−t) for i ≥ t
        c = reach @ losses
        w = len(places) * c / c.sum() if decay else torch.ones_like(c)  # 0 means no weights at all
        rows.append(((w.detach() if detach_weights else w) * losses).mean())
    return torch.stack(rows).mean()


ell = torch.tensor([[1, 2, 0.5, 4]], requires_grad=True)
all_four = torch.ones(1, 4, dtype=torch.bool)
loss = my_ift_loss(-ell, all_four, decay=0.95)
(weights,) = torch.autograd.grad(4 * loss, ell)  # held constant, they are the gradient
(attached,) = torch.autograd.grad(4 * my_ift_loss(-ell, all_four, decay=0.95, detach_weights=False), ell)
print(f"loss {loss.item():.6f} (plain mean {ell.mean().item():.3f})   w {weights[0].numpy().round(6)}")
print(f"slopes if the gradient runs through w as well: {attached[0].numpy().round(6)}")
torch.testing.assert_close(loss.item(), 1.752867, atol=1e-6, rtol=0)
torch.testing.assert_close(weights[0], torch.tensor([1.281457, 1.149971, 0.812634, 0.755938]), atol=1e-6, rtol=0)

# %% [markdown]
# Checkpoint: with holes in the mask (they count as steps), at several $\gamma$, with the weights held constant and not; and the mixed
# inputs. The guess $\tilde y_t$ is made from demonstrated tokens alone, so one forward pass without gradient finds them all.


# %%
def my_lookahead_embeds(policy, batch, mix):
    """(B, T, C): the embeddings of the inputs, mixed with those of the greedy guesses where an input is a completion token."""
    with torch.no_grad():
        guesses = torch.where(batch.mask, policy(batch.inputs).argmax(-1), batch.targets)  # watch: guesses (B, T), of the targets
    guessed_inputs = torch.cat([batch.inputs[:, :1], guesses[:, :-1]], dim=1)  # target t − 1 is input t
    return (1 - mix) * policy.embed(batch.inputs) + mix * policy.embed(guessed_inputs)


holes = torch.rand(5, 8, generator=generator) < 0.7
holes[:, 0] = True
logps = (-torch.rand(5, 8, generator=generator)).requires_grad_()
for decay in (0.0, 0.5, 0.95, 1.0):
    for detach_weights in (True, False):
        mine = my_ift_loss(logps, holes, decay, detach_weights)
        theirs, _ = ift.ift_loss(logps, holes, decay=decay, detach_weights=detach_weights)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(torch.autograd.grad(mine, logps)[0], torch.autograd.grad(theirs, logps)[0])
torch.testing.assert_close(my_ift_loss(logps, holes, 0), sequence_mean(-logps, holes))  # γ = 0: SFT, every completion counting the same

one = data.demo_batch([demo_rows[13]], [0], pad_id=tokenizer.pad_id, max_len=96)
for mix in (0.0, 0.2, 1.0):
    torch.testing.assert_close(my_lookahead_embeds(base, one, mix), ift.lookahead_embeds(base, one, mix=mix))
print("ift_loss, lookahead_embeds: equal to minialign's")
print("demonstrated:", tokenizer.decode(one.targets[one.mask][:-1].tolist()))
print("guessed:     ", tokenizer.decode(base(one.inputs).argmax(-1)[one.mask][:-1].tolist()))

# %% [markdown]
# The guess differs where the base model would have chosen another word. The input after such a place is a blur of two letters, and the
# policy has to go on from it.
#
# The released code lets the gradient run through the weights too. Then a token can lower the loss by taking weight away from a worse one,
# and about one token in ten is pushed *down*. Held constant, the weights are never negative.

# %%
losses = torch.empty(1000, 8).exponential_(generator=generator).requires_grad_()
for detach_weights in (True, False):
    loss, _ = ift.ift_loss(-losses, torch.ones(1000, 8).bool(), decay=0.95, detach_weights=detach_weights)
    (slopes,) = torch.autograd.grad(loss, losses)
    share = (slopes < 0).float().mean().item()
    print(f"weights {'constant' if detach_weights else 'differentiated':15} {100 * share:4.1f} % of the tokens are pushed down")
    assert share == 0 if detach_weights else 0.05 < share < 0.15

# %% [markdown]
# ### Its fixed point is not the expert
#
# With completions of one token $w = 1$, and IFT is SFT. With more, a token counts by its share of its completion's $c$. So even with
# unlimited demonstrations and $\lambda = 0$ the policy comes to rest where $\pi(a|s) \propto E(a|s) \cdot \mathbb{E}[w_t / n \mid s, a]$
# (`ift_law` in `toy/closed_form.py`). The smallest case: an expert says A half of the time and stops, or says B and then C or
# D. For $\gamma = 0$ the share of A is 1, that of B is $\frac12$, so A ends at $\frac23$.

# %%
E = torch.tensor([0.5, 0.25, 0.25])  # of A, BC, BD
two_tokens = torch.tensor([[1, 0], [1, 1], [1, 1]]).bool()


def settle(loss_of_row, steps=400, lr=1.0):
    """π(A) where gradient descent on Σ_y E(y)·loss(y) comes to rest."""
    z = torch.zeros(4, requires_grad=True)  # logits of A, B and of C, D
    for _ in range(steps):
        first, second = z[:2].log_softmax(0), z[2:].log_softmax(0)
        logps = torch.stack([first[[0, 1, 1]], torch.cat([torch.zeros(1), second])], dim=1)  # (3, 2)
        loss = sum(E[c] * loss_of_row(logps[c : c + 1], two_tokens[c : c + 1]) for c in range(3))
        (gradient,) = torch.autograd.grad(loss, z)
        z = (z - lr * gradient).detach().requires_grad_()
    return z[:2].softmax(0)[0].item()


print(f"SFT             π(A) = {settle(lambda logps, mask: -logps[mask].sum()):.4f}, the expert's")
for decay, expected in ((0.0, 2 / 3), (0.5, 0.6066), (0.95, 0.5912)):
    share = settle(lambda logps, mask, decay=decay: my_ift_loss(logps, mask, decay))
    law = ift_law([(0,), (1, 2), (1, 3)], E.numpy(), decay)[0]
    print(f"IFT, γ = {decay:4}   π(A) = {share:.4f}, the law {law:.4f}")
    assert abs(share - law) < 1e-4 and abs(law - expected) < 1e-4

# %% [markdown]
# A gains because nothing comes after it that could take a share of the weight. In general a first token gains if little difficulty
# follows, and if it is rare, because its own loss is then large. That is what the objective says, not an error of the program.
# Whether the mixed inputs are worth it is a question for an experiment; `python -m minialign ift` runs one.
#
# ## Where to read on
#
# - `minialign/methods/sft.py`: the loss above, then `step`, then `main` with micro-batches and the global token count. `ift.py` beside it.
# - `minialign/data.py`: `encode_demos`, and `encode_completion`, the one place that appends EOS. `minialign/task.py`: the built-in task.
# - `toy/closed_form.py`: `sft_flow` and `ift_law` with their derivations. `tests/methods/test_sft.py`, `test_ift.py`: the worked numbers.
# - `python -m minialign sft` runs it on the built-in task. `python -m minialign sft --demos FILE --policy FOLDER` on yours.
#
# ## Exercises
#
# **Exercise 1** (★☆☆, 5 minutes). SFT lowers $\mathrm{KL}(E\|\pi)$. Compute the other direction, $\mathrm{KL}(\pi\|E)$, for the best
# policy. What do you get, and which term is to blame?
#
# **Exercise 2** (★★☆, 10 minutes). We stopped by looking at the exact KL, which nobody has. Do it honestly: train again from `base`, watch
# the loss on 200 *other* demonstrations (`task.builtin_demos(seed=1)`), and stop where it is lowest. How much exact KL does that cost?
#
# **Exercise 3** (★★★, 15 minutes). Show that with $n$ other actions the flow obeys $n d + e^d = 1 + (n + 1)\,\mathrm{lr} \cdot
# \mathrm{steps}$, and use it to predict how many steps of 0.1 ten actions need to reach a probability of 0.9. Check by descending.
#
# ---
#
# ## Solutions
#
# **Solution 1.** Infinite. The policy gives some probability to texts that the expert never writes, and there $\log E = -\infty$.
# $\mathrm{KL}(E\|\pi)$ does not mind: it asks only where $E$ is. That is why SFT covers everything that was shown, and is lax about the
# rest.

# %%
elsewhere = 1 - best_probs.sum(1, keepdim=True)  # (24, 1) the mass on every other text, as one more outcome
with_elsewhere, expert_too = torch.cat([best_probs, elsewhere], dim=1), torch.cat([expert, torch.zeros(24, 1)], dim=1)
other_way = (with_elsewhere * (with_elsewhere.log() - expert_too.log())).sum(1).mean()
print(f"mass elsewhere {elsewhere.mean():.4f}   KL(π ‖ E) = {other_way.item()}   KL(E ‖ π) = {best['expert_kl']:.3f}")
assert (elsewhere > 0).all() and other_way == torch.inf and math.isfinite(best["expert_kl"])

# %% [markdown]
# **Solution 2.** Held-out demonstrations estimate $H(D) + \mathrm{KL}(D\|\pi)$ without bias, with the noise of 200 draws; the same
# draws judge every step, so most of the noise is common to all of them and the lowest step is found well.

# %%
held_out_rows = data.encode_demos(tokenizer, task.builtin_demos(seed=1))
held_out = data.demo_batch(held_out_rows, range(200), pad_id=tokenizer.pad_id, max_len=96)
again, curve = copy.deepcopy(base), []


def look_honestly(k):
    with torch.no_grad():
        curve.append((-seq_logps(again, held_out).mean().item(), exact_kl(shown, all_logps_of(again)), k))


train(again, demo_rows, steps=60, lr=3e-4, schedule="constant", every=10, look=look_honestly)
held_out_loss, kl_there, chosen = min(curve)
best_kl = min(kl for _, kl, _ in curve)
print(f"held-out loss lowest at step {chosen}: {held_out_loss:.3f};   exact KL there {kl_there:.3f}, at the best step {best_kl:.3f}")
assert kl_there < best_kl + 0.15

# %% [markdown]
# **Solution 3.** With $p = e^d / (n + e^d)$ the shown logit rises at rate $1 - p$, and each other one falls at rate $(1 - p)/n$. So
# $d' = (1 - p)(1 + 1/n) = (n + 1)/(n + e^d)$, that is $(n + e^d)\, d' = n + 1$. Integrate from $d = 0$. At $p = 0.9$, $e^d = 9n$.

# %%
n = 9
needed = (n * math.log(9 * n) + 9 * n - 1) / (n + 1) / 0.1
ten, count = torch.zeros(10, dtype=torch.float64), 0
while ten.softmax(0)[-1] < 0.9:
    ten -= 0.1 * (ten.softmax(0) - torch.eye(10, dtype=torch.float64)[-1])
    count += 1
print(f"predicted {needed:.1f} steps, counted {count}")
assert abs(sft_flow(0.1 * needed, n_others=n) - 0.9) < 1e-9
assert abs(count / needed - 1) < 0.02
