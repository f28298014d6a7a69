# %% [markdown]
# # 02 · Sampling: greedy, temperature, top-k, top-p
#
# **What you will hold.** The four ways to pick a token, written by you and equal to `minialign.sample`; your own sampler for a batch of
# prompts of different lengths, equal to `minialign`'s token for token; and the reason why a sampler for alignment must return the
# log-probabilities of the distribution *before* top-k or top-p.
#
# **Minutes.** 40 to read and run cell by cell. The computer needs about 25 seconds of it, most of them to train a tiny policy.
#
# **You must know.** Tutorial 01 (logits, the causal mask, the KV cache). A *policy* is a language model that we are going to train, a
# *completion* is what it writes after a prompt.
#
# Run it as a script from the repository root, `python tutorials/02_sampling.py`, or open it as cells. Lines marked
# `# watch: name (shape)` are good places for a breakpoint. `B` sequences, `T` predictions, `V` vocabulary.

# %%
import math
import sys
from pathlib import Path

import matplotlib
import torch
from torch.testing import assert_close

# %%
# minialign is run from its checkout, not installed: put the repository root, a folder above this file, on the path.
here = Path(globals().get("__file__", "cell")).resolve()  # a notebook has no __file__; it looks upwards from where it runs
ROOT = next(folder for folder in here.parents if (folder / "minialign").is_dir())
sys.path.insert(0, str(ROOT))

# %%
IN_NOTEBOOK = "get_ipython" in globals()
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # a script saves its figure and does not wait for a window
import matplotlib.pyplot as plt

from minialign.batch import masked_mean
from minialign.data import demo_batch, encode_prompt, encode_texts
from minialign.engine.common import batch_rows, derive_seed
from minialign.logps import token_logps
from minialign.model import GPT, GPTConfig, KVCache
from minialign.sample import draw_tokens, keep_top_k, keep_top_p, sample
from minialign.task import builtin_texts, builtin_tokenizer

FIGURES = Path("runs/tutorials")  # below the folder it runs in
FIGURES.mkdir(parents=True, exist_ok=True)
torch.set_printoptions(precision=4, sci_mode=False)

# %% [markdown]
# ## The question
#
# At every position the policy offers a probability for each of $V$ tokens. We can write down only one. Which? And when the completion
# is used for training later: under which distribution must we say that it was drawn?
#
# ## The equation
#
# The temperature $\tau$ divides the logits $z$. A truncation rule keeps a set $S$ of tokens and shares the probability out among them:
#
# $$p_\tau(v) = \frac{e^{z_v/\tau}}{\sum_u e^{z_u/\tau}}, \qquad
# q(v) = \frac{p_\tau(v)}{p_\tau(S)} \ \text{ for } v \in S, \text{ else } 0, \qquad
# H(p) = -\sum_v p(v) \ln p(v)$$
#
# * greedy: $S$ is the likeliest token. It is also the limit $\tau \to 0$.
# * top-k: $S$ is the $k$ likeliest tokens.
# * top-p: $S$ is the smallest set of likeliest tokens with $p_\tau(S) \ge p$. It is also called the nucleus.
#
# To draw from any of them, lay the probabilities side by side on the unit interval and see where a uniform number $u$ falls.

# %% [markdown]
# ## 1. Five tokens
#
# Probabilities that are powers of one half, so that everything can be done in the head. They are out of order on purpose.

# %%
tokens = ["milk", "tea", "ink", "bread", "rope"]
p = torch.tensor([[1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16]], dtype=torch.float64)  # watch: p (B, V), B = 1
logits = p.log()  # any logits with this softmax will do


def show(name, probs):
    print(f"{name:12}" + "  ".join(f"{token} {prob:.4f}" for token, prob in zip(tokens, probs[0].tolist(), strict=True)))


show("p", logits.softmax(-1))
assert_close(logits.softmax(-1), p)
assert tokens[int(logits.argmax(-1))] == "tea"  # greedy

# %% [markdown]
# **Temperature.** Dividing logits by $\tau$ raises probabilities to the power $1/\tau$ and normalises again. A half squares them: the
# squares 1/64, 1/4, 1/256, 1/16, 1/256 sum to 86/256, so tea goes from 1/2 to 64/86.


# %%
def my_tempered(logits, tau):
    return (logits / tau).softmax(-1)


for tau in (0.01, 0.5, 1.0, 2.0, 100.0):
    show(f"tau {tau:g}", my_tempered(logits, tau))
assert_close(my_tempered(logits, 0.5), torch.tensor([[4, 64, 1, 16, 1]], dtype=torch.float64) / 86)
assert_close(my_tempered(logits, 0.01)[0, 1].item(), 1.0)  # tau -> 0 is greedy
assert_close(my_tempered(logits, 1e6), torch.full_like(p, 1 / 5), atol=1e-5, rtol=0)  # tau -> infinity is uniform

# %% [markdown]
# **Entropy** says in one number how open the choice is. In bits, $p$ has $\frac12 1 + \frac14 2 + \frac18 3 + \frac1{16} 4 + \frac1{16} 4 =
# 1.875$; in nats, which the code uses, times $\ln 2$. A policy that weighs $n$ tokens evenly has $\ln n$, so $e^H$ reads as "about so many
# choices".


# %%
def my_entropy(probs):
    """probs (..., V) -> nats (...,). A token of probability 0 adds nothing."""
    return -torch.where(probs > 0, probs * probs.clamp(min=1e-300).log(), 0).sum(-1)


H = my_entropy(p).item()
print(f"H = {H / math.log(2):.3f} bits = {H:.4f} nats, about {math.exp(H):.2f} choices")
assert_close(H, 1.875 * math.log(2))

# %% [markdown]
# Entropy always rises with the temperature, and its slope is known: $\dfrac{dH}{d\tau} = \dfrac{\text{Var}_{p_\tau}(z)}{\tau^3}$. Autograd
# agrees.

# %%
tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
probs = (logits / tau).softmax(-1)
(slope,) = torch.autograd.grad(my_entropy(probs).sum(), tau)
mean_z = (probs * logits).sum()
variance = (probs * (logits - mean_z) ** 2).sum()
print(f"dH/dtau at 0.7: {slope:.4f} by autograd, {variance / tau**3:.4f} by the formula")
assert_close(slope, (variance / tau**3).detach())

# %% [markdown]
# ## 2. Truncation
#
# Both rules forbid tokens by giving them the logit $-\infty$. The softmax that follows then shares out what is left.


# %%
def my_top_k(logits, k):
    """Forbid all but the k likeliest."""
    kth = logits.sort(dim=-1, descending=True).values[:, k - 1 : k]  # watch: kth (B, 1), the smallest logit that stays
    return logits.masked_fill(logits < kth, -torch.inf)


def my_top_p(logits, p):
    """Walk from the likeliest token down; stop as soon as the mass collected reaches p."""
    kept = torch.full_like(logits, -torch.inf)
    for b, row in enumerate(logits):
        mass = 0.0
        for v in row.argsort(descending=True):
            kept[b, v] = row[v]
            mass += row.softmax(-1)[v]  # watch: mass ()
            if mass >= p:
                break
    return kept


show("top-k 2", my_top_k(logits, 2).softmax(-1))
show("top-p 0.7", my_top_p(logits, 0.7).softmax(-1))
show("top-p 0.8", my_top_p(logits, 0.8).softmax(-1))
assert_close(my_top_k(logits, 2).softmax(-1)[0, [1, 3]], torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))  # tea, bread
assert_close(my_top_p(logits, 0.8).softmax(-1)[0, [1, 3, 0]], torch.tensor([4, 2, 1], dtype=torch.float64) / 7)  # and milk
assert torch.equal(my_top_p(logits, 0.7), my_top_k(logits, 2))

# %% [markdown]
# **Checkpoint**, on five tokens and on random logits. `minialign` walks no loop: it sorts, takes the cumulative sum, and puts the verdicts
# back in the order of the vocabulary with `scatter`.

# %%
generator = torch.Generator().manual_seed(0)
many = 2 * torch.randn(50, 30, generator=generator, dtype=torch.float64)
for k in (1, 2, 3, 5):
    assert_close(my_top_k(logits, k), keep_top_k(logits, k))
    assert_close(my_top_k(many, k), keep_top_k(many, k))
for mass in (0.1, 0.7, 0.8, 0.95):
    assert_close(my_top_p(logits, mass), keep_top_p(logits, mass))
    assert_close(my_top_p(many, mass), keep_top_p(many, mass))

# A tie at the k-th place: ink and rope are equally likely, and top-k with k = 4 keeps both.
assert keep_top_k(logits, 4).isfinite().sum() == 5

# %% [markdown]
# **Order matters.** Temperature comes first, then top-k, then top-p. Top-p looks at the tempered mass, so a hot policy keeps more tokens.

# %%
for tau in (0.5, 1.0, 2.0):
    print(f"tau {tau:g}: top-p 0.7 keeps {int(keep_top_p(logits / tau, 0.7).isfinite().sum())} of 5")
assert [int(keep_top_p(logits / tau, 0.7).isfinite().sum()) for tau in (0.5, 1.0, 2.0)] == [1, 2, 3]

# %% [markdown]
# ## 3. Drawing
#
# Lay the probabilities side by side. Token $v$ owns a piece of the unit interval as long as its probability. A uniform $u$ falls into one
# piece. Sixteen points, one in the middle of each sixteenth, must fall 2, 8, 1, 4 and 1 times: exactly $16\,p$.


# %%
def my_draw(logits, uniform):
    """logits (B, V), uniform (B,) in [0, 1) -> the first token whose cumulative probability exceeds u, (B,)."""
    cumulative = logits.softmax(-1).cumsum(-1)  # watch: cumulative (B, V)
    return (cumulative <= uniform[:, None]).sum(-1)


points = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
drawn = my_draw(logits.expand(16, -1), points)  # watch: drawn (B,)
print("cumulative", logits.softmax(-1).cumsum(-1)[0].tolist())
print("drawn     ", [tokens[v] for v in drawn])
assert torch.equal(drawn.bincount(minlength=5), (16 * p[0]).long())

# %% [markdown]
# **Checkpoint.** The project's `draw_tokens` takes probabilities, and guards the end: a rounded cumulative sum may stop just short of 1,
# and a $u$ beyond it must not pick a forbidden token.

# %%
uniform = torch.rand(50, generator=generator, dtype=torch.float64)
assert_close(my_draw(many, uniform), draw_tokens(many.softmax(-1), uniform))
truncated = keep_top_k(many, 3)
assert truncated.gather(1, draw_tokens(truncated.softmax(-1), uniform)[:, None]).isfinite().all()

# %% [markdown]
# ## 4. A policy to sample from
#
# The built-in task: a prompt names a thing, the completion asks for it, politely or rudely. Ten lines train a tiny GPT on such requests.
# Every token of a text is a target, the first one predicted from BOS.

# %%
tokenizer = builtin_tokenizer()
rows = encode_texts(tokenizer, builtin_texts(), max_len=96)
torch.manual_seed(0)
policy = GPT(GPTConfig.tiny(tokenizer.vocab_size))
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
for step in range(300):
    batch = demo_batch(rows, batch_rows(len(rows), 32, step, seed=0), pad_id=tokenizer.pad_id, max_len=96)
    loss = -masked_mean(token_logps(policy, batch), batch.mask)  # watch: loss (), nats per token
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")
assert loss.item() < 0.3

eos_id = tokenizer.eos_id
prompt = encode_prompt(tokenizer, "ask for honey: ")
settings = {
    "greedy": dict(greedy=True),
    "tau 0.5": dict(tau=0.5),
    "tau 1": dict(tau=1.0),
    "tau 2": dict(tau=2.0),
    "tau 2, top-p 0.7": dict(tau=2.0, top_p=0.7),
}
for name, how in settings.items():
    rollout = sample(policy, [prompt], n=3, max_new=40, eos_id=eos_id, seed=0, **how)
    print(f"{name:16}", "  |  ".join(tokenizer.decode(completion) for completion in rollout.completions))

# %% [markdown]
# ## 5. The experiment: where does a policy have a choice?
#
# A text is not equally open everywhere. At the first letter of a completion the policy chooses among six openings. In the middle of a word
# it has no choice. We know the law that the built-in texts are drawn from, so we can check the first one: an opening is polite with
# probability 1/4, there are three of either kind, and one of either kind begins with `i`: 1/12 + 1/4.

# %%
completion = "i want honey, thank you."
ids = prompt + tokenizer.encode(completion) + [eos_id]
with torch.no_grad():
    seen = policy(torch.tensor([ids[:-1]]))[0, len(prompt) - 1 :].double()  # watch: seen (T, V), one row of logits per token
probs = seen.softmax(-1)
entropies = my_entropy(probs)  # watch: entropies (T,)
nucleus = keep_top_p(seen, 0.9).isfinite().sum(-1)  # watch: nucleus (T,), how many tokens top-p keeps
labels = [*completion.replace(" ", "␣"), "eos"]

first_letters = torch.tensor([1 / 3, 1 / 4, 1 / 4, 1 / 12, 1 / 12])  # i, h, g, m, c
law = my_entropy(first_letters).item()
print("kept by top-p 0.9:", " ".join(f"{label}{int(n)}" for label, n in zip(labels, nucleus, strict=True)))
print(f"on average {nucleus.double().mean():.2f} of {tokenizer.vocab_size} tokens")
print(f"entropy of the first letter {entropies[0]:.3f}, of the law {law:.3f}")
assert abs(entropies[0].item() - law) < 0.2
assert nucleus[0] >= 3 and nucleus.min() == 1 and nucleus.double().mean() < 2

# %%
places = {"the first letter": 0, "after “honey”": completion.index(","), "inside “honey”": completion.index("ney")}
taus = torch.logspace(-1, 1, 80, dtype=torch.float64)
curves = {name: torch.stack([my_entropy(my_tempered(seen[t], tau)) for tau in taus]) for name, t in places.items()}
for curve in curves.values():
    assert (curve.diff() > -1e-9).all() and curve[-1] < math.log(tokenizer.vocab_size)  # entropy rises with tau, up to ln V

figure, axes = plt.subplots(2, 1, figsize=(11, 8.2), height_ratios=[1.1, 1], constrained_layout=True)
for color, (name, curve) in zip(("C0", "C1", "C2"), curves.items(), strict=True):
    axes[0].plot(taus, curve, color=color, lw=2, label=name)
    axes[0].plot(1, entropies[places[name]], "o", color=color, ms=7)
axes[0].axhline(math.log(tokenizer.vocab_size), color="0.45", ls="--", lw=1)
axes[0].text(0.1, math.log(tokenizer.vocab_size) - 0.06, "ln V: all tokens equally likely", va="top", fontsize=10, color="0.35")
axes[0].axvline(1, color="0.8", lw=1, zorder=0)
axes[0].set_xscale("log")
axes[0].set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
axes[0].set(xlabel="temperature tau", ylabel="entropy (nats)", xlim=(0.095, 10.5))
axes[0].set_title("Temperature opens every choice, the settled ones too")
axes[0].legend(frameon=False, loc="center left", title="the policy chooses", alignment="left")
axes[0].spines[["top", "right"]].set_visible(False)

RANKS = 6
best = probs.topk(RANKS)  # values and indices (T, RANKS)
image = axes[1].imshow(best.values.T.sqrt(), cmap="Blues", vmin=0, vmax=1, aspect="auto")  # square root: small chances stay visible
for t in range(len(labels)):
    for rank in range(RANKS):
        prob, v = best.values[t, rank].item(), int(best.indices[t, rank])
        if prob >= 0.01:
            letter = "eos" if v == eos_id else tokenizer.decode([v]).replace(" ", "␣")
            axes[1].text(t, rank, letter, ha="center", va="center", fontsize=10, color="white" if prob > 0.4 else "0.15")
edges = torch.arange(len(labels) + 1) - 0.5
axes[1].stairs(nucleus.double() - 0.5, edges, baseline=-0.5, color="C3", lw=2, label="kept by top-p 0.9")
axes[1].axhline(4 - 0.5, color="C1", ls="--", lw=2, label="kept by top-k 4")
axes[1].set_xticks(range(len(labels)), labels, family="DejaVu Sans Mono", fontsize=10)
axes[1].set_yticks(range(RANKS), range(1, RANKS + 1))
axes[1].tick_params(length=0)
axes[1].set(xlabel="the completion, character by character", ylabel="rank")
axes[1].set_title("A fixed k keeps noise where nothing is open; top-p follows the policy")
axes[1].legend(loc="lower right", ncols=2)
axes[1].set_ylim(RANKS - 0.5, -0.56)
bar = figure.colorbar(image, ax=axes[1], pad=0.01, label="probability")
bar.set_ticks([0, 0.1**0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.5", "1"])
figure.savefig(FIGURES / "02_sampling.png", dpi=140)
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", FIGURES / "02_sampling.png")

# %% [markdown]
# ## 6. The log-probs that a sampler must return
#
# Methods that train on their own samples compare two policies on each token: the one that is being trained, $\pi_\theta$, and the one that
# sampled, $\pi_{\text{old}}$,
#
# $$\text{ratio}_t = \frac{\pi_\theta(y_t \mid x, y_{<t})}{\pi_{\text{old}}(y_t \mid x, y_{<t})}
# = \exp(\texttt{logps}_t - \texttt{old\_logps}_t).$$
#
# Before the first step both are the same policy, so the ratio must be 1 everywhere. `sample` returns `old_logps` of the tempered,
# **untruncated** distribution. `token_logps` gives `logps` of given tokens; the temperature must be the same.

# %%
prompts = [encode_prompt(tokenizer, f"ask for {thing}: ") for thing in ("honey", "a lamp", "tea", "rope")]
rollout = sample(policy, prompts, n=16, tau=0.8, top_p=0.8, max_new=40, eos_id=eos_id, seed=0)  # B = 4 · 16
with torch.no_grad():
    logps = token_logps(policy, rollout, tau=0.8)  # watch: logps (B, T)
    forgot_tau = token_logps(policy, rollout)
ratio = (logps - rollout.old_logps).exp()[rollout.mask]  # watch: ratio (scored tokens,)
print(f"ratio between {ratio.min():.5f} and {ratio.max():.5f}")
forgot = (forgot_tau - rollout.old_logps).exp()[rollout.mask]
print(f"with tau forgotten between {forgot.min():.3f} and {forgot.max():.3f}")
assert_close(ratio, torch.ones_like(ratio), atol=1e-3, rtol=0)
assert (forgot - 1).abs().max() > 0.05

# %% [markdown]
# **Break it on purpose.** It seems more honest to store the log-probs of $q$, since tokens were drawn from $q$. But then the ratio of an
# unchanged policy is $p / q = p / (p / p(S)) = p(S)$: the kept mass. Training would begin with the belief that the policy had already moved
# away from each of its own tokens.

# %%
with torch.no_grad():
    tempered = policy(rollout.inputs).double()[rollout.mask] / 0.8  # (scored tokens, V)
kept = keep_top_p(tempered, 0.8)
kept_mass = (kept.logsumexp(-1) - tempered.logsumexp(-1)).exp()  # watch: kept_mass (scored tokens,)
truncated_logps = kept.log_softmax(-1).gather(1, rollout.targets[rollout.mask][:, None]).squeeze(1)
wrong_ratio = (logps[rollout.mask].double() - truncated_logps).exp()
print(f"wrong ratio: mean {wrong_ratio.mean():.3f}, smallest {wrong_ratio.min():.3f}")
assert_close(wrong_ratio, kept_mass, atol=1e-4, rtol=0)  # it is the kept mass
assert wrong_ratio.max() < 1 + 1e-6 and wrong_ratio.min() < 0.9  # and it fails to be 1

per_completion = torch.zeros(rollout.mask.shape, dtype=torch.float64).masked_scatter(rollout.mask, wrong_ratio.log()).sum(1).exp()
print(f"over a whole completion: {per_completion.mean():.3f} on average, where it should be 1")
assert per_completion.mean() < 0.8

# %% [markdown]
# The right bookkeeping does not make truncated samples fair, though. They still come from $q$, and an average over them is an average under
# $q$. Give `milk` the reward 1 and the rest 0, and draw with top-k 2: the reward is never seen. So: **truncate for display, not for
# training.**

# %%
reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
q = keep_top_k(logits, 2).softmax(-1)
print("expected reward under p:", (p[0] * reward).sum().item(), "  under top-k 2:", (q[0] * reward).sum().item())
assert (p[0] * reward).sum() == 1 / 8 and (q[0] * reward).sum() == 0

# %% [markdown]
# ## 7. One generator for each row
#
# `sample` promises: the same seed gives the same completion, whatever else is in the batch. Otherwise a change of batch size would change
# the experiment. A generator shared by the batch breaks the promise: who comes first takes the first numbers.

# %%
alone = torch.rand(1, 4, generator=torch.Generator().manual_seed(0))
third_of_three = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))[2:]
print("shared generator, the same row alone and as third of three:\n", torch.cat([alone, third_of_three]))
assert not torch.equal(alone, third_of_three)


# %% [markdown]
# So each row gets its own, seeded by what the row *is*: the seed, the ids of its prompt, and which sample of this prompt it is.


# %%
def my_uniforms(seed, prompt, which, max_new):
    """The random numbers of one completion (max_new,): a function of the row, not of the batch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, tuple(prompt), which))
    return torch.rand(max_new, generator=generator, dtype=torch.float64).float()


alone = sample(policy, prompts[2:3], max_new=40, eos_id=eos_id, seed=5)
together = sample(policy, prompts, n=2, max_new=40, eos_id=eos_id, seed=5)  # rows 4 and 5 are the two samples of prompt 2
print(repr(tokenizer.decode(alone.completions[0])), "alone;", [tokenizer.decode(together.completions[b]) for b in (4, 5)], "together")
assert alone.completions[0] == together.completions[4]
assert together.completions[4] != together.completions[5]

# %% [markdown]
# ## 8. Prompts of different lengths in one batch
#
# A tensor is a rectangle, prompts are not. Padding on the **right** changes nothing: the causal mask already hides what comes later, so
# the logits at the last real token are those of the prompt alone. Padding on the **left** puts strangers before the prompt, and without
# a mask of its own every later token sees them.

# %%
lengths = torch.tensor([len(prompt) for prompt in prompts])
longest = int(lengths.max())
right = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])  # watch: right (B, T)
left = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
with torch.no_grad():
    one_by_one = torch.cat([policy(torch.tensor([prompt]))[:, -1] for prompt in prompts])  # (B, V)
    from_right = policy(right)[torch.arange(len(prompts)), lengths - 1]
    from_left = policy(left)[:, -1]
print("lengths", lengths.tolist())
for b in range(len(prompts)):
    gap_right, gap_left = ((logits_of[b] - one_by_one[b]).abs().max().item() for logits_of in (from_right, from_left))
    print(f"row {b}: {longest - int(lengths[b])} of padding   gap from the right {gap_right:.0e}   from the left {gap_left:.0e}")
assert_close(from_right, one_by_one, atol=1e-4, rtol=0)
assert (from_left - one_by_one).abs().max() > 0.05  # the left-padded rows are wrong

# %% [markdown]
# Left padding can be repaired with a mask and with shifted positions, and many libraries do so. Here the next token is written at **each
# row's own** position instead: the KV cache knows the length of every row. Watch the lengths grow side by side.

# %%
with torch.no_grad():
    cache = KVCache(policy.config, len(prompts), longest + 12)
    last = policy(right, cache=cache, lengths=lengths)[torch.arange(len(prompts)), lengths - 1]  # watch: last (B, V)
    columns = []
    for _ in range(12):
        print(cache.lengths.tolist(), end=" ")
        token = last.argmax(-1)  # watch: token (B,)
        columns.append(token)
        last = policy(token[:, None], cache=cache)[:, -1]
by_hand = torch.stack(columns, dim=1).tolist()
print()
print([tokenizer.decode(completion) for completion in by_hand])
assert by_hand == sample(policy, prompts, max_new=12, eos_id=None, seed=0, greedy=True).completions  # checkpoint

# %% [markdown]
# ## 9. The whole sampler
#
# Everything together, one row at a time and without a cache: slow, and short enough to be believed.


# %%
def my_sample(policy, prompts, *, max_new, tau, top_k, top_p, seed):
    """-> completions, and the log-prob of each of their tokens before truncation: two lists of lists."""
    completions, all_logps = [], []
    for prompt in prompts:
        uniforms, completion, logps = my_uniforms(seed, prompt, 0, max_new), [], []
        for t in range(max_new):
            logits = policy(torch.tensor([prompt + completion]))[:, -1] / tau  # watch: logits (1, V)
            token = my_draw(my_top_p(my_top_k(logits, top_k), top_p), uniforms[t : t + 1])
            completion.append(int(token))
            logps.append(logits.log_softmax(-1)[0, token].item())
            if completion[-1] == eos_id:
                break
        completions.append(completion)
        all_logps.append(logps)
    return completions, all_logps


# %% [markdown]
# **Checkpoint.** The batched, cached sampler of `minialign` writes the same tokens, and returns the same log-probs.

# %%
how = dict(max_new=40, tau=1.3, top_k=8, top_p=0.95, seed=3)
with torch.no_grad():
    completions, all_logps = my_sample(policy, prompts, **how)
rollout = sample(policy, prompts, eos_id=eos_id, **how)
for completion in rollout.completions:
    print(repr(tokenizer.decode(completion)))
assert completions == rollout.completions
assert rollout.lengths.tolist() == [len(completion) for completion in completions]
assert_close(torch.tensor([logp for logps in all_logps for logp in logps]), rollout.old_logps[rollout.mask], atol=1e-3, rtol=0)

# %% [markdown]
# ## Where to read on
#
# * `minialign/sample.py`: the three rules you wrote stand at the top. `sample` is section 9 with one prefill for each distinct prompt, and
#   finished rows leave the batch.
# * `minialign/batch.py`: `Rollout`, what `sample` returns: already shifted and masked, ready for a loss.
# * `tests/test_sample.py`: a chi-square test against a model small enough to list all its completions.
# * Next: `tutorials/03_logps.py`, the one number that alignment needs.
#
# ## Exercises
#
# 1. **Min-p** (easy, 5 minutes). Another rule keeps the tokens with at least a share $m$ of the likeliest token's probability. Write it
#    with one comparison of logits, without a softmax. Which of the five tokens does $m = 0.2$ keep?
# 2. **Gumbel** (medium, 10 minutes). Add $g_v = -\ln(-\ln u_v)$ to each logit, with one uniform $u_v$ per token, and take the argmax. Show
#    that this draws from the softmax.
# 3. **A temperature for tokens is none for texts** (medium, 15 minutes). A language of three texts: first A with 0.6 or B with 0.4; after
#    A comes 1 or 2 with 0.5 each; after B nothing more. Compute the law of the texts when each *token* is drawn at $\tau = 0.5$, and the
#    law $\propto p(\text{text})^{1/\tau}$. Which text does greedy write, and which one is likeliest?
#
# Solutions follow. Stop scrolling here.

# %% [markdown]
# ---
# ## Solutions
#
# **1.** $p_v \ge m\,p_{\max}$ means $z_v \ge z_{\max} + \ln m$. With $m = 0.2$ the bar is at 0.1: tea, bread and milk stay.


# %%
def keep_min_p(logits, m):
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(m), -torch.inf)


stays = keep_min_p(logits, 0.2).isfinite()[0].tolist()
print("min-p 0.2 keeps", [token for token, stay in zip(tokens, stays, strict=True) if stay])
assert stays == [True, True, False, True, False]

# %% [markdown]
# **2.** 100,000 draws; a frequency then errs by at most about 0.0016 (one standard deviation).

# %%
uniform = torch.rand(100_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(min=1e-12)
frequency = (logits - (-uniform.log()).log()).argmax(-1).bincount(minlength=5) / 100_000
show("p", p)
show("gumbel", frequency[None])
assert (frequency - p[0]).abs().max() < 5 * 0.0016

# %% [markdown]
# **3.** At $\tau = 0.5$ the first token is A with $0.36/(0.36 + 0.16)$, and A's share is then halved. The law of squares weighs whole
# texts: 0.09, 0.09, 0.16. Greedy writes a text that begins with A, but the likeliest text is B. Cooling tokens favours openings with many
# ways to go on; cooling texts does not. Remember this when a closed form says $\pi^* \propto \pi_{\text{ref}}\, e^{r/\beta}$:
# it speaks of texts.

# %%
texts = torch.tensor([0.6 * 0.5, 0.6 * 0.5, 0.4], dtype=torch.float64)  # A1, A2, B
first = my_tempered(torch.tensor([0.6, 0.4], dtype=torch.float64).log(), 0.5)
by_token = torch.stack([first[0] / 2, first[0] / 2, first[1]])
by_text = texts**2 / (texts**2).sum()
print("each token cooled:", by_token.tolist())
print("whole text cooled:", by_text.tolist())
assert_close(by_token, torch.tensor([9, 9, 8], dtype=torch.float64) / 26)
assert_close(by_text, torch.tensor([9, 9, 16], dtype=torch.float64) / 34)
assert first.argmax() == 0 and texts.argmax() == 2
