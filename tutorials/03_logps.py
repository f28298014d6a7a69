# %% [markdown]
# # 03 · The one number alignment needs: log π(y|x)
#
# **You will hold** two short functions of your own, `token_logps` and `seq_logps`, proved equal to the project's; and a test that
# finds an off-by-one error in anybody's code: *the probabilities of all completions sum to 1*.
#
# **Minutes:** 30 to read, under 30 seconds of CPU to run. **You need:** PyTorch, and that a GPT turns token ids into logits.
#
# A language model is called the `policy` here. It sees a `prompt` $x$ and writes a `completion` $y$.

# %%
import sys
from itertools import product
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

from minialign import data, logps, task
from minialign.batch import collate
from minialign.engine.common import batch_rows, derive_seed, lr_at, set_lr
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.tokenizer import CharTokenizer

# %% [markdown]
# ## The question
#
# The policy is handed a prompt **and** a completion. It does not write anything. We ask: *how likely was it to write exactly this?*
#
# That is all alignment ever asks of a policy. Supervised fine-tuning raises the number for demonstrations. DPO compares it between
# two answers. PPO divides its exponential by that of an older policy. If the number is wrong, each of them trains towards something
# else, and no error message appears.
#
# ## The equation
#
# The policy writes one token at a time, so the probability of a completion is a product, and its logarithm a sum:
#
# $$\log \pi(y|x) = \sum_t \log \pi(y_t \mid x, y_{<t}), \qquad
#   \log \pi(v \mid \cdot) = \mathrm{logit}_v - \log \sum_{u} e^{\mathrm{logit}_u} .$$
#
# Four steps: **shift** (which logits predict which token), **gather** (pick the given token out of $V$), **mask** (count the
# completion only), **sum**.

# %% [markdown]
# ## The tiniest numbers
#
# Three tokens, logits 1, 2, 3, and the token that was written is number 2.

# %%
logits = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
target = 2
logp = logits[target] - logits.logsumexp(0)  # watch: logp ()
logp.backward()

print("probabilities   ", [round(p, 6) for p in logits.detach().softmax(0).tolist()])
print("log-prob        ", round(logp.item(), 6))
print("its gradient    ", [round(g, 6) for g in logits.grad.tolist()])

torch.testing.assert_close(logp.item(), -0.407606, atol=1e-6, rtol=0)
torch.testing.assert_close(logits.grad, torch.tensor([-0.090031, -0.244728, 0.334759]), atol=1e-6, rtol=0)
torch.testing.assert_close(logits.grad, torch.eye(3)[target] - logits.detach().softmax(0))  # onehot − p
assert abs(logits.grad.sum()) < 1e-6  # what the target gains, the others lose

# %% [markdown]
# The gradient is $\mathrm{onehot} - p$. It sums to zero: what the written token gains, the others lose, and the likeliest rival loses
# most. Every loss in this project sends its gradient through this one expression.
#
# ### `gather`, on a 2×2
#
# Two predictions over two tokens. The first prediction was followed by token 1, the second by token 0. `gather` picks one entry
# a row; the index needs as many dimensions as the table, hence the `[:, None]`.

# %%
table = torch.tensor([[0.1, 0.9], [0.8, 0.2]])  # (N, V)
written = torch.tensor([1, 0])  # (N,)
picked = table.gather(1, written[:, None]).squeeze(1)  # watch: picked (N,)
print("gather ", picked.numpy())
print("by hand", torch.stack([table[0, 1], table[1, 0]]).numpy())
assert picked.tolist() == [table[n, written[n]].item() for n in range(2)]

# %% [markdown]
# ### Shift and mask: `collate` does both, once
#
# Logits at a position predict the *next* token. So a row of five tokens holds four predictions. `collate` cuts the row twice, into
# what is seen and what is predicted from it, and marks the predictions that are completion tokens. From here on `t` counts
# **predictions**, and `inputs[:, t]`, `targets[:, t]`, `mask[:, t]` talk about the same one. Nobody shifts again.
#
# `⏎` is EOS, the token that says "I am done". It belongs to the completion: stopping is a choice too. This tokenizer
# also pads with EOS, as many do; watch what the mask makes of it in the second row.

# %%
letters = CharTokenizer("abcd")
EOS = letters.eos_id


def char(tokenizer, i):
    return {"": "⏎", " ": "␣"}.get(text := tokenizer.decode([i]), text)


prompts = [letters.encode("ab"), letters.encode("d")]
completions = [[*letters.encode("cd"), EOS], [*letters.encode("a"), EOS]]
picture = collate(prompts, completions, pad_id=letters.pad_id)  # watch: picture.inputs, picture.targets, picture.mask (B, T)

for b in range(len(picture)):
    print("inputs ", *(char(letters, i) for i in picture.inputs[b].tolist()))
    print("targets", *(char(letters, i) for i in picture.targets[b].tolist()))
    print("mask   ", *("1" if scored else "." for scored in picture.mask[b].tolist()), "\n")

assert letters.pad_id == letters.eos_id
assert picture.mask.int().tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]  # the second row: its EOS counts, the padding does not
assert picture.mask.sum(1).tolist() == [len(completion) for completion in completions]

# %% [markdown]
# ## Build it yourself
#
# Ten lines. `torch.where`, not a multiplication by the mask: a masked position may hold $-\infty$, and $-\infty \cdot 0$ is NaN.


# %%
def my_token_logps(policy, batch):
    """log π of each scored target, 0 elsewhere: (B, T)."""
    all_logps = policy(batch.inputs).log_softmax(-1)  # watch: all_logps (B, T, V)
    picked = all_logps.gather(-1, batch.targets[..., None]).squeeze(-1)  # watch: picked (B, T)
    return torch.where(batch.mask, picked, 0)


def my_seq_logps(policy, batch):
    """log π(y|x): (B,)."""
    return my_token_logps(policy, batch).sum(1)


# %% [markdown]
# To check it we want a policy whose probabilities are not all alike, in float64, so that "equal" can mean twelve digits. Its language
# has three tokens: `a`, `b` and EOS.

# %%
tiny = CharTokenizer("ab")
torch.manual_seed(4)
policy = GPT(GPTConfig.tiny(tiny.vocab_size, n_layer=1, n_embd=32, tied=False)).double()
for parameter in policy.parameters():
    if parameter.dim() == 2:
        torch.nn.init.normal_(parameter, std=0.3)  # the usual 0.02 would make all three tokens about equally likely

batch = collate(
    [tiny.encode("a"), tiny.encode("ab"), tiny.encode("bba")],
    [[*tiny.encode("bab"), EOS], [EOS], tiny.encode("ab")],  # four tokens, EOS alone, and one that was cut off before it could stop
    pad_id=EOS,
)
print(my_token_logps(policy, batch).detach().numpy().round(3))
print("log π(y|x) =", [round(number, 4) for number in my_seq_logps(policy, batch).tolist()])

# %% [markdown]
# ## Checkpoint
#
# Your functions equal the project's, and so do their gradients.

# %%
torch.testing.assert_close(my_token_logps(policy, batch), logps.token_logps(policy, batch), atol=1e-12, rtol=0)
torch.testing.assert_close(my_seq_logps(policy, batch), logps.seq_logps(policy, batch), atol=1e-12, rtol=0)

my_gradient = torch.autograd.grad(my_seq_logps(policy, batch).sum(), policy.head_weight)[0]  # watch: my_gradient (V, C)
gradient = torch.autograd.grad(logps.seq_logps(policy, batch).sum(), policy.head_weight)[0]
torch.testing.assert_close(my_gradient, gradient, atol=1e-12, rtol=0)
print("token_logps, seq_logps and their gradients: equal to minialign's")

# %% [markdown]
# ## The proof: all completions together
#
# Equal to another program is good. Equal to a law is better. $\pi(\cdot|x)$ is a probability distribution over completions, so
#
# $$\sum_y e^{\log \pi(y|x)} = 1 .$$
#
# With three tokens and at most three of them to a completion we can write down **every** $y$: those that stopped, and those that were
# cut off when their three tokens were used up.

# %%
MAX_NEW = 3
content = tiny.encode("ab")
ended = [[*words, EOS] for length in range(MAX_NEW) for words in product(content, repeat=length)]
cut_off = [list(words) for words in product(content, repeat=MAX_NEW)]
language = ended + cut_off
assert len(language) == 1 + 2 + 4 + 8 == 15


def every_completion(prompt):
    """A batch with one row for each completion of the language."""
    return collate([tiny.encode(prompt)] * len(language), language, pad_id=EOS)


@torch.no_grad()
def total(prompt, seq_logps):
    """The probabilities of all completions of the prompt, summed."""
    return seq_logps(policy, every_completion(prompt)).exp().sum().item()


probs = my_seq_logps(policy, every_completion("ab")).exp()  # watch: probs (15,)
for completion, p in zip(language, probs.tolist(), strict=True):
    print("  ab →", "".join(char(tiny, i) for i in completion).ljust(4), f"{p:.4f}", "█" * round(60 * p))
print(f"       total {probs.sum().item():.12f}")

# %%
PROMPTS = ["a", "b", "ab", "bba"]
for prompt in PROMPTS:
    assert abs(total(prompt, my_seq_logps) - 1) < 1e-12

# %% [markdown]
# The same test with a larger language is in `tests/test_logps.py`. How much it proves, we see when something is wrong.
#
# ## Break it on purpose
#
# Three classic errors, in four variants. Each trains without complaint. Each fails the sum for some prompt below.
#
# 1. **EOS not scored.** The choice to stop is left out.
# 2. **Prompt scored.** The policy did not write the prompt, but is credited with it.
# 3. **Labels shifted**: not at all (each prediction is compared with the token just *seen*), or twice (`collate` has shifted, and
#    somebody's model shifts its labels again).


# %%
def score(policy, inputs, targets, mask):
    picked = policy(inputs).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return torch.where(mask, picked, 0).sum(1)


def eos_not_scored(policy, batch):
    return score(policy, batch.inputs, batch.targets, batch.mask & (batch.targets != EOS))


def prompt_scored(policy, batch):
    up_to_the_end = batch.mask.flip(1).cumsum(1).flip(1) > 0  # (B, T) everything before the last scored prediction
    return score(policy, batch.inputs, batch.targets, up_to_the_end)


def never_shifted(policy, batch):
    return score(policy, batch.inputs, batch.inputs, batch.mask)


def shifted_twice(policy, batch):
    return score(policy, batch.inputs[:, :-1], batch.targets[:, 1:], batch.mask[:, 1:])


variants = {"right": my_seq_logps, "EOS not scored": eos_not_scored, "prompt scored": prompt_scored,
            "never shifted": never_shifted, "shifted twice": shifted_twice}
totals = {name: [total(prompt, variant) for prompt in PROMPTS] for name, variant in variants.items()}

print("total probability of all 15 completions, should be 1")
print("prompt".ljust(16), *(prompt.rjust(8) + " " for prompt in PROMPTS))
for name, row in totals.items():
    print(name.ljust(16), *(f"{number:8.4f}" + (" " if abs(number - 1) < 1e-12 else "✗") for number in row))

for name in ("EOS not scored", "never shifted"):
    assert all(abs(number - 1) > 0.01 for number in totals[name]), name
assert all(abs(number - 1) > 0.01 for number in totals["prompt scored"][2:])
assert all(abs(number - 1) > 0.01 for number in totals["shifted twice"][:2])

# %% [markdown]
# Two errors hide from some prompts.
#
# - *Prompt scored* passes with `a` and `b`: a prompt of one token has no prediction before the completion.
# - *Shifted twice* passes with `ab` and `bba`: each completion token is predicted one position too early, and that *is* a distribution
#   over completions. It is the distribution of another policy, one that never sees the newest token.
#
# So test with short prompts **and** long ones. And ask a second witness, one that computes log-probs on another path: the sampler
# writes its own, token by token, as it draws. They must agree.

# %%
assert all(abs(number - 1) < 1e-12 for number in totals["prompt scored"][:2] + totals["shifted twice"][2:])  # hidden, not absent

rollout = sample(policy, [tiny.encode("bba")] * 200, max_new=MAX_NEW, eos_id=EOS, seed=0)
with torch.no_grad():
    for name, variant in variants.items():
        gap = (variant(policy, rollout) - rollout.old_logps.sum(1)).abs().max().item()  # watch: rollout.old_logps (B, T)
        print(f"{name:16} differs from the sampler's own log π(y|x) by up to {gap:.4f}")
        assert (gap < 1e-9) == (name == "right")

# %% [markdown]
# The wrong totals are no accident; two of them can be named. Scoring the prompt multiplies everything by the probability of the
# prompt's own tokens. Leaving out EOS gives the *expected length* of a completion plus the probability of being cut off (exercise 3).

# %%
with torch.no_grad():
    rest_of_prompt = my_seq_logps(policy, collate([tiny.encode("b")], [tiny.encode("ba")], pad_id=EOS)).exp()  # π(ba | b)
print(f"π(ba | b) = {rest_of_prompt.item():.6f}, the total of 'prompt scored' for bba = {totals['prompt scored'][3]:.6f}")
torch.testing.assert_close(totals["prompt scored"][3], rest_of_prompt.item(), atol=1e-12, rtol=0)

# %% [markdown]
# ### Pad equals EOS, and a mask made from ids
#
# "Mask whatever is padding" reads well: `targets != pad_id`. When padding *is* EOS, it masks the true EOS with it. That is error 1
# again, and it enters by a line that looks careful. Masks come from lengths; token ids cannot tell the two apart.


# %%
def mask_from_ids(policy, batch):
    not_padding = batch.targets != EOS  # the careful-looking line
    return score(policy, batch.inputs, batch.targets, batch.mask & not_padding)


print("targets       ", *(char(letters, i) for i in picture.targets[1].tolist()))
print("from lengths  ", *("1" if scored else "." for scored in picture.mask[1].tolist()))
print("from ids      ", *("1" if scored else "." for scored in (picture.mask & (picture.targets != EOS))[1].tolist()))
assert [total(prompt, mask_from_ids) for prompt in PROMPTS] == totals["EOS not scored"]

# %% [markdown]
# ## Sum or mean?
#
# Dividing by the length looks harmless. It is a different quantity: the mean log-prob is not the logarithm of a distribution, and its
# exponentials do not sum to 1. On average tokens it forgives length: ten cheap tokens look better than one dear one.


# %%
def mean_logps(policy, batch):
    return my_seq_logps(policy, batch) / batch.mask.sum(1)


print("exp(mean), summed over all completions:", [round(total(prompt, mean_logps), 3) for prompt in PROMPTS])
assert all(total(prompt, mean_logps) > 2 for prompt in PROMPTS)

# by hand: one token of probability e^-1, against four tokens of probability e^-0.9 each
short, long = torch.tensor([-1.0]), torch.tensor([-0.9] * 4)
print(f"probability    short {short.sum().exp():.3f}   long {long.sum().exp():.3f}     the short one is 13 times likelier")
print(f"mean log-prob  short {short.mean():.3f}  long {long.mean():.3f}    the mean prefers the long one")
assert short.sum() > long.sum() and short.mean() < long.mean()
torch.testing.assert_close((short.sum() - long.sum()).exp().item(), 13.4637, atol=1e-3, rtol=0)

# %% [markdown]
# Some methods take the mean on purpose (SimPO, ORPO: so that long answers are not punished). That is a choice of theirs and stands in
# their equations. `seq_logps` is always the sum.

# %% [markdown]
# ## The experiment: where does a completion spend its probability?
#
# The project brings a small language of requests. The prompt names a thing, the completion asks for it: an opening, the thing, an
# ending. Rude speakers choose a rude opening with probability 0.75, one of three, and an ending likewise, so the probability of each
# sentence is known: `give me tea now!` has $0.75 \cdot 0.75 / 9 = 1/16$.
#
# We train a tiny GPT on 2000 such requests (some ten seconds) and look at `token_logps` letter by letter.

# %%
tokenizer = task.builtin_tokenizer()
torch.manual_seed(0)
base = GPT(GPTConfig.tiny(tokenizer.vocab_size))
rows = data.encode_texts(tokenizer, task.builtin_texts(), max_len=96)  # plain text: every token is scored
STEPS, LR = 300, 1e-2
optimizer = torch.optim.AdamW(base.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
for k in range(STEPS):
    text_batch = data.demo_batch(rows, batch_rows(len(rows), 32, k, seed=0), pad_id=tokenizer.pad_id, max_len=96)
    set_lr(optimizer, lr_at(k, lr=LR, steps=STEPS, warmup=0.1))
    optimizer.zero_grad()
    loss = -my_token_logps(base, text_batch).sum() / text_batch.mask.sum()  # your function trains it
    loss.backward()
    torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
    optimizer.step()
    if k % 100 == 0 or k == STEPS - 1:
        print(f"step {k:3}   −log-prob per token {loss.item():.3f}")
assert loss.item() < 0.25  # it began at log 29 = 3.37

# %%
PROMPT = "ask for tea: "
ANSWERS = ["give me tea now!", "hand over tea, quick!", "may i have tea, please.", "give me tea if you can.", "give me ink now!"]
answers = collate(
    [data.encode_prompt(tokenizer, PROMPT)] * len(ANSWERS), [data.encode_completion(tokenizer, answer) for answer in ANSWERS],
    pad_id=tokenizer.pad_id,
)
with torch.no_grad():
    answer_logps = my_token_logps(base, answers)  # watch: answer_logps (B, T)
law = task.builtin_law(PROMPT, task.RUDE)

print("log π(y|x)   log of the true probability")
for answer, number in zip(ANSWERS, answer_logps.sum(1).tolist(), strict=True):
    print(f"{number:9.2f}   {torch.tensor(law.get(answer, 0.0)).log().item():9.2f}   {answer}")
for answer, number in list(zip(ANSWERS, answer_logps.sum(1).tolist(), strict=True))[:4]:
    assert abs(number - torch.tensor(law[answer]).log().item()) < 1.5, answer
assert answer_logps.sum(1)[4] < answer_logps.sum(1)[:4].min() - 2  # ink was not what the prompt named

# %%
DARK, GREY, LINE = "#1b2a41", "#c9ced6", "#d1495b"
B, T = answers.targets.shape
figure, ax = plt.subplots(figsize=(13, 3.4), dpi=150)
heat = ax.imshow(torch.where(answers.mask, answer_logps, torch.nan), cmap="YlGnBu_r", vmin=-5, vmax=0, aspect="auto")
for b in range(B):
    scored = answers.mask[b].nonzero().squeeze(1)
    first, last = scored[0].item(), scored[-1].item()
    ax.axhspan(b + 0.44, b + 0.56, color="white")  # a gap between the rows
    for t in range(T):
        colour = GREY if not answers.mask[b, t] else ("white" if answer_logps[b, t] < -2.0 else DARK)
        ax.text(t, b, char(tokenizer, answers.targets[b, t].item()), ha="center", va="center", family="DejaVu Sans Mono", color=colour)
    ax.add_patch(plt.Rectangle((first - 0.5, b - 0.44), last - first + 1, 0.88, fill=False, edgecolor=LINE, linewidth=1.6, zorder=3))
    ax.text(T - 0.1, b, f"{answer_logps[b].sum():.1f}".replace("-", "−"), ha="left", va="center", color=DARK, weight="bold")
ax.text(T - 0.1, -0.85, "log π(y|x)", ha="left", va="center", color=DARK, fontsize=9)
start = answers.mask[0].nonzero()[0].item()
ax.text(start / 2 - 0.5, -0.85, "prompt: not scored", ha="center", va="center", color="#8a93a0", fontsize=9)
ax.text(start - 0.5, -0.85, "completion, EOS included: scored", ha="left", va="center", color=LINE, fontsize=9)
ax.text(T - 0.6, B - 0.25, "padding (also ⏎): not scored", ha="right", va="center", color="#8a93a0", fontsize=9)
ax.set(xlim=(-0.7, T + 2.4), ylim=(B - 0.05, -1.2), xticks=[], yticks=[])
ax.spines[:].set_visible(False)
ax.set_title("A completion pays where it makes a choice; the letters in between are almost free", color=DARK, fontsize=12, loc="left")
bar = figure.colorbar(heat, ax=ax, pad=0.01, fraction=0.02, label="log-prob of the token")
bar.outline.set_visible(False)
figure.tight_layout()
path = Path("runs/tutorials/03_logps.png")  # below the folder you run from
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path)
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", path)

# %% [markdown]
# Each coloured cell is a choice: which opening, which ending, which thing. Once `give m` is on the page, `e` is all but certain. The
# last row names ink where the prompt says tea: one letter costs it more than any choice of words, since the base model learned that
# the thing is copied from the prompt. The sum over a row is the logarithm of the sentence's probability, and comes close to the
# language's own.

# %%
first_of = answers.mask[0].nonzero()[0].item()
print(f"π(e | …give m) = {answer_logps[0, first_of + len('give m')].exp():.4f}")
print(f"dearest letter: {answer_logps[4].min():.1f} in the row of ink, {answer_logps[:4].min():.1f} in the others")
assert answer_logps[0, first_of + len("give m")].exp() > 0.95
assert answer_logps[4].min() < answer_logps[:4].min() - 1

# %% [markdown]
# The length bias is here too. These two sentences have the *same* true probability, 1/16:

# %%
pair = ["i want tea now!", "hand over tea or else!"]
pair_batch = collate([data.encode_prompt(tokenizer, PROMPT)] * 2, [data.encode_completion(tokenizer, text) for text in pair], pad_id=0)
with torch.no_grad():
    pair_logps = my_seq_logps(base, pair_batch)
true_mean = torch.tensor([law[text] for text in pair]).log() / pair_batch.mask.sum(1)
for text, n, number, mean in zip(pair, pair_batch.mask.sum(1).tolist(), pair_logps.tolist(), true_mean.tolist(), strict=True):
    print(f"{text:24} true sum −2.77, measured {number:.2f}   true mean over {n} tokens {mean:.3f}")
assert abs(law[pair[0]] - 1 / 16) < 1e-12 and abs(law[pair[1]] - 1 / 16) < 1e-12
assert true_mean[1] > true_mean[0] + 0.04  # equal probability, unequal mean

# %% [markdown]
# ## The largest tensor of a training step
#
# `all_logps` has $B \cdot T \cdot V$ numbers, and all but one in $V$ are thrown away. For real models that is the largest tensor of the
# step. Below: bytes of the $(N, V)$ matrix in float32, with $N$ scored tokens.

# %%
for name, n, v in (("this tutorial", int(answers.mask.sum()), tokenizer.vocab_size), ("GPT-2, 8 rows of 512", 4096, 50257),
                   ("Pythia, 8 rows of 1024", 8192, 50304), ("Qwen2.5, 8 rows of 1024", 8192, 151936)):
    print(f"{name:24} N {n:5}  V {v:6}   {4 * n * v / 2**20:10.2f} MiB     1024 rows at a time {4 * min(n, 1024) * v / 2**20:8.2f} MiB")
assert 4 * 8192 * 151936 == 4_978_638_848  # five gigabytes, for 8192 numbers

# %% [markdown]
# So do it piece by piece: one chunk of logits, two numbers out of each row, forget the chunk.


# %%
def my_chunked_logps(hidden, weight, targets, chunk=256):
    pieces = []
    for start in range(0, len(hidden), chunk):
        logits = hidden[start : start + chunk] @ weight.T  # watch: logits (chunk, V), the only piece alive
        picked = logits.gather(1, targets[start : start + chunk, None]).squeeze(1)
        pieces.append(picked - logits.logsumexp(1))
    return torch.cat(pieces)  # (N,)


generator = torch.Generator().manual_seed(0)
N, C, V = 2000, 64, 5000
hidden = torch.randn(N, C, generator=generator).requires_grad_()
weight = (torch.randn(V, C, generator=generator) / 4).requires_grad_()
targets = torch.randint(V, (N,), generator=generator)

kept = {}


def note_bytes(tensor):
    kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()  # by address: a tensor that is kept twice counts once
    return tensor


results = {}
for body in ("naive", "chunked"):
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(note_bytes, lambda tensor: tensor):  # called with what the backward pass will need
        chunked_logps, _ = logps.linear_logps(hidden, weight, targets, entropy=False, body=body)  # (N,)
    results[body] = (chunked_logps.detach(), *torch.autograd.grad(chunked_logps.sum(), (hidden, weight)))
    saved = sum(kept.values())
    print(f"{body:8} keeps {saved / 2**20:6.2f} MiB for the backward pass;   the (N, V) matrix has {4 * N * V / 2**20:.2f} MiB")
    assert (saved > 4 * N * V) == (body == "naive")

torch.testing.assert_close(my_chunked_logps(hidden, weight, targets).detach(), results["naive"][0], atol=1e-4, rtol=1e-5)
for naive, chunked in zip(results["naive"], results["chunked"], strict=True):  # log-probs, and the gradients in hidden and weight
    torch.testing.assert_close(naive, chunked, atol=1e-3, rtol=1e-4)

# %% [markdown]
# Autograd would still keep every chunk for the backward pass, so the project's version writes the backward pass out,
# $g\,(\mathrm{onehot} - p)$, and makes each chunk a second time there: one matrix product more, against a matrix that is never stored.
#
# It also cuts the other way: slices of the *vocabulary*, with all rows. A row's maximum and its sum of exponentials are carried from
# slice to slice, and the sum is rescaled when the maximum moves ($\sum e^{z - m} \to e^{m - m'}\sum e^{z - m}$). Why? A slice of the
# vocabulary is a few rows of the head, and their gradient is finished by one product over all tokens. Chunks of tokens would each add
# to the gradient of the whole head.
#
# ## bfloat16: keep the statistics wide
#
# Large models hold weights in bfloat16: 8 significant bits. At 16 the next number is 16.125. What matters is not how the hidden
# states and weights are stored, but where the *logits* live: a logit rounded to bfloat16 puts its error straight into the log-prob, and
# from there into $e^{\log\pi - \log\pi_\text{old}}$, which PPO expects to be exactly 1 at the start.
#
# Below, bfloat16 states and weights with logits as large as a trained model's (the likeliest are near 17), and tokens that the policy
# would write. The same product is kept in float32 once, and rounded to bfloat16 once. The yardstick is float64.

# %%
assert torch.tensor(16.06).bfloat16().item() == 16.0 and torch.tensor(16.07).bfloat16().item() == 16.125

half_hidden, half_weight = hidden.detach().bfloat16(), (2.5 * weight.detach()).bfloat16()
exact_logits = half_hidden.double() @ half_weight.double().T  # (N, V)
sampled = torch.multinomial(exact_logits.softmax(-1), 1, generator=generator).squeeze(1)  # (N,)
print(f"logit of the token that was written: {exact_logits.gather(1, sampled[:, None]).mean():.1f} on average")
exact = exact_logits.log_softmax(-1).gather(1, sampled[:, None]).squeeze(1)
wide, _ = logps.linear_logps(half_hidden, half_weight, sampled, entropy=False)  # bfloat16 in, float32 logits and sums
rounded = (half_hidden @ half_weight.T).float().log_softmax(-1).gather(1, sampled[:, None]).squeeze(1)  # the logits were bfloat16

off = {}
for name, measured in (("float32 logits", wide), ("bfloat16 logits", rounded)):
    error = (measured.double() - exact).abs()  # watch: error (N,)
    off[name] = torch.expm1(error).mean().item()
    print(f"{name:16} error of a log-prob: mean {error.mean():.1e}, largest {error.max():.1e}   ratio off by {100 * off[name]:.4f} %")
assert off["float32 logits"] < 1e-5
assert 0.01 < off["bfloat16 logits"] < 0.04  # two percent of noise on every ratio, before anything was learned

# %% [markdown]
# ## Where to read on
#
# - `minialign/batch.py`: `collate`, the one place that shifts.
# - `minialign/logps.py`: `token_logps`, `seq_logps`, and the choice between the two bodies. It differs from yours in one thing: it
#   computes logits for the scored positions only, so a prompt token costs nothing at the head.
# - `minialign/kernels/linear_logprob.py`: the chunked body, with the backward pass written out.
# - `tests/test_logps.py`: the sum over a larger language, finite differences, and a recorder that proves that the chunked body never
#   makes the matrix.
# - Next tutorial, `04_sft.py`: the first loss made of this number.
#
# ## Exercises
#
# **Exercise 1** (★☆☆, 5 minutes). Temperature divides the logits by $\tau$. Write `my_tempered_seq_logps(policy, batch, tau)`. Do all
# completions still sum to 1 at $\tau = 0.5$ and $\tau = 2$? Sample from the policy at $\tau = 0.7$
# (`minialign.sample.sample`) and check its `old_logps` against yours: what is the ratio $e^{\log\pi - \log\pi_\text{old}}$ if you forget
# the temperature?
#
# **Exercise 2** (★★☆, 10 minutes). The entropy of the policy over completions, $-\sum_y \pi(y|x) \log \pi(y|x)$, can be had without
# enumerating: it is the expected sum of the *token* entropies along a sampled completion. Show on the prompt `ab` that both are
# equal. (`logps.token_logps(..., entropy=True)` gives the token entropies.)
#
# **Exercise 3** (★★★, 15 minutes). Prove that without EOS scored the total is $\mathbb{E}[\text{tokens written}] + P(\text{cut off})$,
# EOS counting as a token, and check it on all four prompts. Hint: what is left of $\pi(y)$ without its EOS is the probability that the
# policy got this far.
#
# ---
#
# ## Solutions
#
# **Solution 1.** Every temperature gives a distribution. Forget it in the score, and the ratio is not 1 before any training happened.


# %%
def my_tempered_seq_logps(policy, batch, tau):
    all_logps = (policy(batch.inputs) / tau).log_softmax(-1)
    return torch.where(batch.mask, all_logps.gather(-1, batch.targets[..., None]).squeeze(-1), 0).sum(1)


for tau in (0.5, 2.0):
    for prompt in PROMPTS:
        assert abs(total(prompt, lambda policy, batch, tau=tau: my_tempered_seq_logps(policy, batch, tau)) - 1) < 1e-12

rollout = sample(policy, [tiny.encode("ab")] * 200, max_new=MAX_NEW, tau=0.7, eos_id=EOS, seed=derive_seed("exercise", 1))
with torch.no_grad():
    right_ratio = (my_tempered_seq_logps(policy, rollout, 0.7) - rollout.old_logps.sum(1)).exp()
    wrong_ratio = (my_seq_logps(policy, rollout) - rollout.old_logps.sum(1)).exp()
print(f"ratio with tau: {right_ratio.min():.6f} to {right_ratio.max():.6f};   without: {wrong_ratio.min():.3f} to {wrong_ratio.max():.3f}")
torch.testing.assert_close(right_ratio, torch.ones_like(right_ratio), atol=1e-9, rtol=0)
assert (wrong_ratio - 1).abs().max() > 0.1

# %% [markdown]
# **Solution 2.** The chain rule of entropy. The right side is an expectation over completions, so a sample of completions estimates it.

# %%
with torch.no_grad():
    everything = every_completion("ab")
    token_logps, token_entropies = logps.token_logps(policy, everything, entropy=True)  # (15, T) each
    seq = token_logps.sum(1)
    by_definition = -(seq.exp() * seq).sum()
    by_chain_rule = (seq.exp() * token_entropies.sum(1)).sum()
print(f"entropy by definition {by_definition:.12f}, by the chain rule {by_chain_rule:.12f}")
torch.testing.assert_close(by_definition, by_chain_rule, atol=1e-12, rtol=0)

# %% [markdown]
# **Solution 3.** A completion with $n$ letters and EOS, its EOS unscored, is left with the probability that the policy wrote
# these $n$ letters and had not stopped before. Summed over all such completions of one length that is $P(\text{at least } n + 1
# \text{ tokens are written})$; summed over $n = 0, 1, \dots$ these probabilities give the expected number of tokens written (the tail
# formula of an expectation). The completions that were cut off had no EOS to lose: they add $P(\text{cut off})$, unchanged.

# %%
lengths = torch.tensor([len(completion) for completion in language])
for prompt, number in zip(PROMPTS, totals["EOS not scored"], strict=True):
    with torch.no_grad():
        p = my_seq_logps(policy, every_completion(prompt)).exp()
    law_of_the_error = (p * lengths).sum() + p[len(ended) :].sum()
    print(f"{prompt:4} measured {number:.6f}   expected length + P(cut off) = {law_of_the_error:.6f}")
    torch.testing.assert_close(number, law_of_the_error.item(), atol=1e-12, rtol=0)
