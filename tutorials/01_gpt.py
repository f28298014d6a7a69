# %% [markdown]
# # 01 · A GPT, from token ids to a loss
#
# **What you will hold.** Every part of a GPT, written by you in plain tensor operations, and a proof that your parts give the same
# numbers as `minialign.model.GPT`. Then a tiny GPT that has learned one sentence by heart, and a look inside one of its heads.
#
# **Minutes.** 40 to read and run cell by cell. The computer needs about 15 seconds of it.
#
# **You must know.** PyTorch tensors, matrix products, `loss.backward()`. Nothing about transformers or alignment.
#
# Run it as a script from the repository root, `python tutorials/01_gpt.py`, or open it as cells (VS Code, PyCharm, Jupyter with
# jupytext). Lines marked `# watch: name (shape)` are good places for a breakpoint. The letters of the shapes:
# `B` sequences, `T` positions, `V` vocabulary, `C` channels, `H` heads, `D` channels of one head, `L` layers.

# %%
import math
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
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

from minialign.batch import collate
from minialign.model import GPT, MLP, Attention, GPTConfig, KVCache, RMSNorm, rotary_angles, rotate
from minialign.sample import sample
from minialign.tokenizer import CharTokenizer

FIGURES = Path("runs/tutorials")  # below the folder it runs in
FIGURES.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
torch.set_printoptions(precision=4, sci_mode=False)

# %% [markdown]
# ## The question
#
# A language model reads a text and says, at each position, how likely every token is to come next. Training needs this for all
# positions of a text at once, in one pass. How can a position be prevented from looking at its own answer, which stands right beside
# it in the same tensor? And what else has to happen between the ids that go in and the loss that comes out?
#
# ## The equation
#
# The probability of a text is a product over its tokens, and the loss is its negative logarithm per token:
#
# $$\log \pi_\theta(y) = \sum_{t=1}^{T} \log \pi_\theta(y_t \mid y_{<t})
# \qquad\qquad
# \mathcal{L}(\theta) = -\frac{1}{T} \log \pi_\theta(y)$$
#
# Between ids and logits stands a *residual stream* $x$, one vector of $C$ channels per position. It begins as an embedding. Every
# block reads it twice and adds to it twice. The head turns the last state into $V$ logits:
#
# $$x \leftarrow E[\text{ids}], \qquad
# x \leftarrow x + \text{attn}(\text{norm}(x)), \qquad
# x \leftarrow x + \text{mlp}(\text{norm}(x)), \qquad
# \text{logits} = \text{norm}(x)\, W^\top$$
#
# Only attention moves information between positions:
#
# $$\text{attn}: \quad y = \text{softmax}\!\left(\frac{q\,k^\top}{\sqrt{D}} + M\right) v, \qquad
# M_{ts} = \begin{cases} 0 & s \le t \\ -\infty & s > t \end{cases}$$
#
# The mask $M$ is the answer to the first question: a position weighs the past and itself, and gives the future weight zero.

# %% [markdown]
# ## 1. Ids and embeddings
#
# A tokenizer gives every character a number. Id 0 is the end-of-text token, which also begins a text.

# %%
tokenizer = CharTokenizer("abcd")
ids = torch.tensor(tokenizer.encode("abcd"))  # watch: ids (T,)
print(ids.tolist(), "is", repr(tokenizer.decode(ids.tolist())))
assert ids.tolist() == [1, 2, 3, 4] and tokenizer.eos_id == 0

# %% [markdown]
# An embedding is a table with one row per id, and embedding a text is picking rows. In a real model training fills the table. Here we
# fill it by hand with three channels, so that all of attention can be done in the head.

# %%
ln = math.log
E = torch.tensor(
    [
        [0.0, 0.0, 0.0],  # end of text
        [1.0, ln(1), 8.0],  # a: channel 0 is 1 for every letter
        [1.0, ln(1), 0.0],  # b: channel 1 says how loud the letter is, as a logarithm
        [1.0, ln(2), 4.0],  # c: channel 2 is what the letter has to say
        [1.0, ln(4), 2.0],  # d
    ]
)
x = E[ids]  # watch: x (T, C)
print(x)

# %% [markdown]
# ## 2. One attention head by hand
#
# Three matrices read three things from each position: a **query** (what am I looking for), a **key** (what do I offer to those who
# look), a **value** (what do I hand over). Our matrices pick one channel each, so $D = 1$.

# %%
W_q, W_k, W_v = torch.eye(3)[0:1], torch.eye(3)[1:2], torch.eye(3)[2:3]  # each (D, C)
q, k, v = x @ W_q.T, x @ W_k.T, x @ W_v.T  # watch: q, k, v (T, D)
print("q", q.squeeze().tolist(), " e^k", k.exp().squeeze().tolist(), " v", v.squeeze().tolist())

# %% [markdown]
# The score of query $t$ for key $s$ is their product. Softmax turns a row of scores into weights, each proportional to $e^{score}$:
# here to 1, 1, 2, 4. The mask removes the future before the softmax, so that each row sums to one over what it may see.


# %%
def my_attention(q, k, v, causal=True):
    """q, k, v (..., T, D) -> what each position gathers (..., T, D), and the weights it gathered with (..., T, T)."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # watch: scores (..., T, T), row t is the query
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)  # True where s > t
        scores = scores.masked_fill(future, -torch.inf)
    weights = scores.softmax(-1)  # watch: weights (..., T, T), every row sums to 1
    return weights @ v, weights


y, weights = my_attention(q, k, v)
print("weights\n", weights)
print("gathered", y.squeeze().tolist())

# Row d: (1·8 + 1·0 + 2·4 + 4·2) / 8 = 3. Do rows b and c yourself.
assert_close(weights[3], torch.tensor([1, 1, 2, 4]) / 8)
assert_close(y.squeeze(), torch.tensor([8.0, 4.0, 4.0, 3.0]))

# %% [markdown]
# The first letter can only look at itself. A larger query makes a head pickier: doubling it squares the odds.

# %%
_, picky = my_attention(2 * q, k, v)
print("last row with a query of 2:", picky[3].tolist())
assert_close(picky[3], torch.tensor([1, 1, 4, 16]) / 22)

# %% [markdown]
# **Why divide by $\sqrt{D}$?** The product of two random vectors of $D$ channels has a standard deviation of $\sqrt{D}$. Without the
# division a wide head would begin with one key taking nearly everything, where the softmax has almost no gradient.

# %%
generator = torch.Generator().manual_seed(0)
wide_q, wide_k = torch.randn(2, 1000, 256, generator=generator)  # 1000 positions, D = 256
raw = wide_q @ wide_k.T
for name, scores in (("undivided", raw), ("divided by √D", raw / math.sqrt(256))):
    print(f"{name:14} std {scores.std():5.2f}   largest weight, on average {scores.softmax(-1).amax(-1).mean():.3f}")
assert 15.5 < raw.std() < 16.5 and raw.softmax(-1).amax(-1).mean() > 0.5
assert (raw / 16).softmax(-1).amax(-1).mean() < 0.05

# %% [markdown]
# **Checkpoint.** PyTorch has this operation as one call, and `minialign` uses that call.

# %%
q4, k4, v4 = torch.randn(3, 2, 5, 4, generator=generator)  # 2 heads, 5 positions, 4 channels
assert_close(my_attention(q4, k4, v4)[0], F.scaled_dot_product_attention(q4, k4, v4, is_causal=True))

# %% [markdown]
# ## 3. Where am I? Rotary positions
#
# So far the head is blind to order. Swap the first two letters, and the last one gathers the same:

# %%
swapped = E[torch.tensor([2, 1, 3, 4])]  # b a c d
y_swapped, _ = my_attention(swapped @ W_q.T, swapped @ W_k.T, swapped @ W_v.T)
print("abcd ->", y[3].item(), "  bacd ->", y_swapped[3].item())
assert_close(y_swapped[3], y[3])

# %% [markdown]
# Rotary positions cure that by turning queries and keys. Channels are taken in pairs, channel $i$ with channel $i + D/2$, and the pair
# at position $t$ is turned by the angle $t \cdot \theta^{-2i/D}$. Two vectors turned by $t$ and $s$ meet at the angle between them, so a
# score depends on positions only through the **distance** $t - s$. With $D = 2$ there is one pair and it turns 1 radian per position.


# %%
def my_rotate(x, positions, theta=10000.0):
    """Turn x (..., T, D) to its positions (T,)."""
    half = x.shape[-1] // 2
    speed = 1 / theta ** (torch.arange(half) / half)  # (D/2,) radians per position: the first pair is fast, the last is slow
    angle = positions[:, None] * speed  # watch: angle (T, D/2)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


same = torch.tensor([1.0, 0.0]).expand(4, 2)  # the same vector at four positions
turned = my_rotate(same, torch.arange(4))
print("turned\n", turned)
print("scores\n", turned @ turned.T)  # cos(t − s): constant along every diagonal
distance = torch.arange(4)[:, None] - torch.arange(4)
assert_close(turned @ turned.T, distance.float().cos())

# %% [markdown]
# The same for random vectors of 16 channels. Move query and key together by 100 positions, and the score stays. Move one of them, and
# it changes.

# %%
one_q, one_k = torch.randn(2, 1, 16, generator=generator)


def score(t, s):
    return (my_rotate(one_q, torch.tensor([t])) @ my_rotate(one_k, torch.tensor([s])).T).item()


print(f"(7, 3): {score(7, 3):.4f}   (107, 103): {score(107, 103):.4f}   (7, 4): {score(7, 4):.4f}")
assert abs(score(7, 3) - score(107, 103)) < 1e-4
assert abs(score(7, 3) - score(7, 4)) > 0.1

# %% [markdown]
# **Checkpoint.** `rotary_angles` makes the table once per call of the model and `rotate` applies it in every layer.

# %%
config = GPTConfig.tiny(vocab_size=11)
cos, sin = rotary_angles(config, torch.arange(9)[None])  # (1, 1, T, D/2) each
heads = torch.randn(2, config.n_head, 9, config.head_dim, generator=generator)
assert_close(my_rotate(heads, torch.arange(9)), rotate(heads, cos, sin))

# %% [markdown]
# ## 4. Norm, MLP, and the residual stream
#
# **RMSNorm** divides a vector by its root mean square, so that what a part reads has the same size whatever the stream has grown to.
# For (3, 4) the root mean square is $\sqrt{(9 + 16)/2} = 3.5355$.


# %%
def my_norm(x, weight, eps=1e-5):
    """x (..., C) scaled to a root mean square of 1, then stretched per channel."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


three_four = torch.tensor([3.0, 4.0])
print(my_norm(three_four, torch.ones(2)), my_norm(100 * three_four, torch.ones(2)))
assert_close(my_norm(three_four, torch.ones(2)), torch.tensor([0.8485, 1.1314]), atol=1e-4, rtol=0)
assert_close(my_norm(three_four, torch.ones(2)), my_norm(100 * three_four, torch.ones(2)), atol=1e-5, rtol=0)

norm = RMSNorm(64, eps=1e-5)
wide = torch.randn(3, 64, generator=generator)
assert_close(my_norm(wide, norm.weight), norm(wide))  # checkpoint

# %% [markdown]
# **The MLP** works on each position alone. It widens, bends, narrows. Bending is done by $\text{silu}(g) = g \cdot \sigma(g)$, about 0
# for a negative $g$ and about $g$ for a positive one. So `gate` decides, channel by channel, how much of `up` passes.


# %%
def my_mlp(x, w_gate, w_up, w_down):
    """x (..., C) -> (..., C), through a wider layer."""
    gate = x @ w_gate.T
    return (gate * torch.sigmoid(gate) * (x @ w_up.T)) @ w_down.T


g = torch.tensor([-6.0, 0.0, 1.0, 6.0])
print("silu", g.tolist(), "->", [round(value, 4) for value in (g * g.sigmoid()).tolist()])
assert_close(g * g.sigmoid(), torch.tensor([-0.0148, 0.0, 0.7311, 5.9852]), atol=1e-4, rtol=0)

mlp = MLP(config)
assert_close(my_mlp(wide, mlp.gate.weight, mlp.up.weight, mlp.down.weight), mlp(wide))  # checkpoint

# %% [markdown]
# **The residual stream.** No part replaces what is there, every part adds. So the last state is the embedding plus everything that was
# written, and we can list the writers. In a new model the embedding is the loudest: `init_weights` makes the projections into the
# stream small.

# %%
torch.manual_seed(0)
policy = GPT(config)
ids = torch.randint(11, (1, 9))
writes = {"embedding": policy.embed(ids)}
for layer, block in enumerate(policy.blocks):
    for name, part in (("attn", block.attn), ("mlp", block.mlp)):
        part.register_forward_hook(lambda module, args, out, key=f"block {layer} {name}": writes.update({key: out}))
final = policy.hidden(ids)  # (B, T, C), after the last norm

for name, write in writes.items():
    print(f"{name:13} writes vectors of length {write.norm(dim=-1).mean():.4f}")
assert len(writes) == 5 and max(writes, key=lambda name: writes[name].norm()) == "embedding"
assert_close(my_norm(sum(writes.values()), policy.norm.weight), final)

# %% [markdown]
# ## 5. All of it: a GPT in one screen
#
# Several heads run side by side: the $C$ channels of `q`, `k`, `v` are cut into $H$ pieces of $D$, each piece is a head of its own, and
# `o` mixes what they gathered. The head at the end is the embedding table again (*tied*): the logit of a token is the product of the
# last state with the row of that token.


# %%
def my_gpt(w, inputs, n_layer, n_head, causal=True):
    """w: {name: parameter}; inputs (B, T) -> logits (B, T, V), and the attention weights of each layer, L tensors (B, H, T, T)."""
    B, T = inputs.shape
    positions, maps = torch.arange(T), []
    x = w["tok_embed.weight"][inputs]  # watch: x (B, T, C), the residual stream
    for layer in range(n_layer):
        block = f"blocks.{layer}"
        read = my_norm(x, w[f"{block}.norm1.weight"])
        q, k, v = (
            (read @ w[f"{block}.attn.{name}.weight"].T).view(B, T, n_head, -1).transpose(1, 2)  # (B, H, T, D)
            for name in ("q", "k", "v")
        )
        y, weights = my_attention(my_rotate(q, positions), my_rotate(k, positions), v, causal)  # watch: weights (B, H, T, T)
        x = x + y.transpose(1, 2).reshape(B, T, -1) @ w[f"{block}.attn.o.weight"].T
        maps.append(weights)

        read = my_norm(x, w[f"{block}.norm2.weight"])
        x = x + my_mlp(read, *(w[f"{block}.mlp.{name}.weight"] for name in ("gate", "up", "down")))
    x = my_norm(x, w["norm.weight"])
    return x @ w["tok_embed.weight"].T, maps  # watch: logits (B, T, V)


# %% [markdown]
# **Checkpoint.** Your GPT with the weights of `minialign`'s gives `minialign`'s logits. A new model has tiny weights, which would hide
# mistakes, so we give both large random ones first. And we compare in float64, where rounding cannot excuse a difference.

# %%
big = GPT(config).double()
with torch.no_grad():
    for parameter in big.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
weights_of_big = dict(big.named_parameters())
ids = torch.randint(11, (3, 20), generator=generator)  # B = 3, T = 20

mine, maps = my_gpt(weights_of_big, ids, config.n_layer, config.n_head)
theirs = big(ids)
print(f"logits {tuple(mine.shape)}   spread {theirs.std():.2f}   largest gap {(mine - theirs).abs().max():.0e}")
assert theirs.std() > 1
assert_close(mine, theirs, atol=1e-5, rtol=0)
assert len(maps) == config.n_layer and maps[0].shape == (3, config.n_head, 20, 20)

# And the same one level down: the attention of block 0, with its projections.
read = my_norm(big.embed(ids), big.blocks[0].norm1.weight)
attention = big.blocks[0].attn
assert isinstance(attention, Attention)
q, k, v = ((read @ getattr(attention, name).weight.T).view(3, 20, config.n_head, -1).transpose(1, 2) for name in "qkv")
at = torch.arange(20)
by_hand = my_attention(my_rotate(q, at), my_rotate(k, at), v)[0].transpose(1, 2).reshape(3, 20, -1) @ attention.o.weight.T
rotary = tuple(table.double() for table in rotary_angles(config, at[None]))
assert_close(by_hand, attention(read, rotary, None, None, at[None], 0), atol=1e-5, rtol=0)

# %% [markdown]
# ## 6. From logits to a loss
#
# `collate` lays a text out once: `inputs[:, t]` is seen, `targets[:, t]` is the token that follows. The loss takes the log-probability
# of each target. A new model knows nothing and spreads its bets, so its loss is near that of a uniform guess, $\ln V$.

# %%
sentence = "she sells sea shells by the sea."
tokenizer = CharTokenizer(sentence)
batch = collate([[tokenizer.bos_id]], [tokenizer.encode(sentence) + [tokenizer.eos_id]], pad_id=tokenizer.pad_id)
for t in range(4):
    seen, next_one = tokenizer.decode(batch.inputs[0, 1 : t + 1].tolist()), tokenizer.decode([int(batch.targets[0, t])])
    print(f"t = {t}   sees {seen!r:6} predicts {next_one!r}")  # the end-of-text token, seen first, is left out


def my_loss(logits, targets):
    """logits (B, T, V), targets (B, T) -> mean of −log π(target), in nats per token."""
    logps = logits - logits.logsumexp(-1, keepdim=True)  # watch: logps (B, T, V), exp of it sums to 1 over V
    return -logps.gather(-1, targets[..., None]).mean()


V = tokenizer.vocab_size
config = GPTConfig.tiny(V, n_head=2)
torch.manual_seed(0)
policy = GPT(config)
loss = my_loss(policy(batch.inputs), batch.targets)
print(f"\nV = {V}   loss {loss:.3f}   ln V = {ln(V):.3f}")
assert_close(loss, F.cross_entropy(policy(batch.inputs).flatten(0, 1), batch.targets.flatten()))
assert 0 < loss.item() - ln(V) < 0.4

# Why a little above ln V? With a tied head the last state still resembles the embedding of the token just read,
# so a new model bets on seeing that token again.
again = policy(batch.inputs).softmax(-1).gather(-1, batch.inputs[..., None]).mean().item()
print(f"probability of repeating the token just read: {again:.3f}; a uniform guess would be {1 / V:.3f}")
assert again > 2 / V

# %% [markdown]
# ## 7. The KV cache: write once, read often
#
# To continue a text, only the newest position needs a prediction. Its query looks at all earlier keys and values. Those cannot have
# changed since: the mask kept earlier positions from ever seeing the new token. So they are computed once and kept.
#
# In the letters of section 2: the last row alone, against kept keys and values, is the last row of the whole.

# %%
x = E[torch.tensor([1, 2, 3, 4])]
kept_k, kept_v = x @ W_k.T, x @ W_v.T  # (T, D) each: the cache
q_new = x[3:] @ W_q.T  # (1, D): one query
y_new = (q_new @ kept_k.T).softmax(-1) @ kept_v  # no mask needed: the newest position may see everything
print("last row alone:", y_new.item())
assert_close(y_new.item(), 3.0)

# %% [markdown]
# In the model `KVCache` keeps keys and values of every layer. Feeding the tokens one at a time gives the logits of one full pass.

# %%
T = batch.inputs.shape[1]
cache = KVCache(config, batch_size=1, capacity=T)
with torch.no_grad():
    pieces = [policy(batch.inputs[:, t : t + 1], cache=cache) for t in range(T)]  # each (B, 1, V)
    assert_close(torch.cat(pieces, dim=1), policy(batch.inputs), atol=1e-5, rtol=1e-4)
print(f"positions through the model for {T} tokens: {T} with the cache, {T * (T + 1) // 2} without")
print(f"numbers kept per token: 2·L·H·D = {2 * config.n_layer * config.n_head * config.head_dim}")
assert int(cache.lengths[0]) == T == 33 and T * (T + 1) // 2 == 561
assert cache.keys.numel() + cache.values.numel() == T * 2 * config.n_layer * config.n_head * config.head_dim == T * 256

# %% [markdown]
# ## 8. The experiment: learn one sentence by heart
#
# A model that cannot learn one sentence has a bug. So this is the first thing to try with any new model.
#
# The sentence is chosen to need attention. After `s` comes `h`, `e` or a space; after `e` comes a space, `l` or `a`. Whoever sees only the
# last letter can do no better than the average surprise of the next letter given this one. We can count that bound.

# %%
text = [tokenizer.bos_id, *tokenizer.encode(sentence), tokenizer.eos_id]
counts = torch.zeros(V, V)
for this, following in zip(text[:-1], text[1:], strict=True):
    counts[this, following] += 1
chance = counts / counts.sum(1, keepdim=True).clamp(min=1)  # watch: chance (V, V), row = this letter, column = the next
last_letter_only = -(counts * chance.clamp(min=1e-9).log()).sum().item() / counts.sum().item()
print(f"uniform guess {ln(V):.3f}   best from the last letter alone {last_letter_only:.3f}   (nats per token)")
assert 0.6 < last_letter_only < ln(V)

# %%
STEPS = 120


def train(forward, parameters):
    """Fit `forward(inputs) -> logits` to the sentence; returns the loss of every step."""
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = my_loss(forward(batch.inputs), batch.targets)  # watch: loss ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


losses = train(policy, policy.parameters())
rollout = sample(policy, [[tokenizer.bos_id]], max_new=60, eos_id=tokenizer.eos_id, seed=0, greedy=True)  # the likeliest token, always
said = tokenizer.decode(rollout.completions[0])
print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}   says {said!r}")
assert losses[-1] < 0.02 < last_letter_only
assert said == sentence

# %% [markdown]
# Where did it look? `my_gpt` also returns the weights of all heads. We draw the most decided one: the head whose largest weight in a row
# is largest on average. Each row is a position that predicts; its dark squares are the letters it gathered from. Do not expect grammar:
# a model that learns one sentence needs only some landmark that tells one `s` from the next, and any landmark will do.

# %%
with torch.no_grad():
    _, maps = my_gpt(dict(policy.named_parameters()), batch.inputs, config.n_layer, config.n_head)
heads = torch.cat([weights[0] for weights in maps])  # watch: heads (L·H, T, T)
number = heads.amax(-1).mean(-1).argmax().item()
layer, head = divmod(number, config.n_head)
looks = heads[number]  # (T, T)
assert_close(looks.sum(-1), torch.ones(T))
assert looks.triu(1).abs().max() == 0  # nothing from the future

letters = ["▸", *sentence.replace(" ", "␣")]
figure, axes = plt.subplots(1, 2, figsize=(13, 6.2), width_ratios=[1, 1.15], constrained_layout=True)
axes[0].semilogy(range(1, STEPS + 1), losses, color="C0", lw=2)
for level, label in ((ln(V), "uniform guess, ln V"), (last_letter_only, "best from the last letter alone")):
    axes[0].axhline(level, color="0.45", lw=1, ls="--")
    axes[0].text(STEPS, level * 1.05, label, ha="right", va="bottom", fontsize=10, color="0.35")
axes[0].set(xlabel="step", ylabel="loss (nats per token)", xlim=(0, STEPS + 2), title="Below the second line only attention can go")
axes[0].spines[["top", "right"]].set_visible(False)

future = torch.ones(T, T, dtype=torch.bool).triu(1)
image = axes[1].imshow(looks.masked_fill(future, torch.nan), cmap="Blues", vmin=0, vmax=1)
axes[1].set_facecolor("0.94")
axes[1].text(T * 0.71, T * 0.27, "the future:\nmasked", ha="center", va="center", fontsize=11, color="0.45")
axes[1].set_xticks(range(T), letters, fontsize=9, family="DejaVu Sans Mono")
axes[1].set_yticks(range(T), letters, fontsize=9, family="DejaVu Sans Mono")
axes[1].tick_params(length=0)
axes[1].set_ylabel("position that predicts the next letter", labelpad=8)
axes[1].set(xlabel="gathers from", title=f"Attention of layer {layer}, head {head}")
figure.colorbar(image, ax=axes[1], shrink=0.8, label="attention weight")
figure.savefig(FIGURES / "01_gpt.png", dpi=140)
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", FIGURES / "01_gpt.png")

# %% [markdown]
# ## 9. Break it on purpose: take the mask away
#
# `my_gpt(causal=False)` lets every position see the whole row, its own target included. Does the loss warn us? First ask which inputs
# a prediction depends on: the gradient of one position's logits with respect to every position's embedding.


# %%
def sees(causal):
    """The length of d(logits at position 10) / d(embedding of each position), (T,)."""
    weights = dict(policy.named_parameters())
    x = policy.embed(batch.inputs).detach().requires_grad_(True)  # (1, T, C)
    table = torch.cat([weights["tok_embed.weight"].detach(), x[0]])  # extra rows V … V+T−1: one private embedding per position
    logits, _ = my_gpt({**weights, "tok_embed.weight": table}, V + torch.arange(T)[None], config.n_layer, config.n_head, causal)
    (grad,) = torch.autograd.grad(logits[0, 10, :V].sum(), x)
    return grad[0].norm(dim=-1)  # watch: (T,)


with_mask, without_mask = sees(causal=True), sees(causal=False)
print("position 10 sees, with the mask   :", "".join("#" if length > 0 else "." for length in with_mask))
print("position 10 sees, without the mask:", "".join("#" if length > 0 else "." for length in without_mask))
assert (with_mask[:11] > 0).all() and (with_mask[11:] == 0).all()
assert (without_mask > 0).all()  # position 11 holds the answer, and it is seen

# %% [markdown]
# Now train without the mask, from the same start. The loss looks just as good. But when the model writes by itself there is no future to
# copy from, and it has learned little else.

# %%
torch.manual_seed(0)
peeker = GPT(config)
weights = dict(peeker.named_parameters())
peeker_losses = train(lambda inputs: my_gpt(weights, inputs, config.n_layer, config.n_head, causal=False)[0], peeker.parameters())

written = [tokenizer.bos_id]
with torch.no_grad():
    for _ in range(len(sentence)):
        logits, _ = my_gpt(weights, torch.tensor([written]), config.n_layer, config.n_head, causal=False)
        written.append(int(logits[0, -1].argmax()))
peeker_said = tokenizer.decode(written[1:])
print(f"with the mask    loss {losses[-1]:.4f}   says {said!r}")
print(f"without the mask loss {peeker_losses[-1]:.4f}   says {peeker_said!r}")
assert peeker_losses[-1] < 0.02  # nothing in the loss warns you
assert peeker_said != sentence

# %% [markdown]
# Keep this in mind for every method that follows: **a loss that is better than it can be is a leak**, and only samples show it.
# Exercise 3 makes a test of it.
#
# ## Where to read on
#
# * `minialign/model.py`, from the bottom up: `GPT.hidden` is section 5, `Block`, `Attention` and `MLP` are its parts, `rotary_angles`
#   and `rotate` are section 3, `KVCache` is section 7. The other switches of `GPTConfig` turn the same class into GPT-2, Pythia, Llama,
#   Mistral, Qwen2 and Qwen3.
# * `minialign/batch.py`: `collate`, the one place that shifts.
# * `tests/test_model.py`: the same model against the `transformers` library.
# * Next: `tutorials/02_sampling.py`, how to draw a text from these logits.
#
# ## Exercises
#
# 1. **Count** (easy, 5 minutes). How many parameters has `GPTConfig.tiny(V)`? Write the formula in $V$, $C$, $L$ and the MLP's width.
# 2. **Grouped queries** (medium, 10 minutes). Large models share one key-value head among several query heads, which makes the cache
#    smaller. Compute the attention of a model with `n_head=4, n_kv_head=2` with `my_attention`.
# 3. **The impossible loss** (medium, 15 minutes). On letters drawn at random no honest model can get below $\ln(\text{letters})$. Train on
#    fresh random letters at every step, with and without the mask. How far below the floor does the peeker get?
#
# Solutions follow. Stop scrolling here.

# %% [markdown]
# ---
# ## Solutions
#
# **1.** The table is $VC$ and the head is the same table. A block has four attention projections of $C^2$, three MLP matrices of $C$ times
# its width, and two norms of $C$. One more norm at the end.

# %%
config = GPTConfig.tiny(100)
C, width, L = config.n_embd, config.ffn_dim, config.n_layer
by_formula = 100 * C + L * (4 * C * C + 3 * C * width + 2 * C) + C
print(by_formula, "parameters")
assert by_formula == sum(parameter.numel() for parameter in GPT(config).parameters()) == 88_640

# %% [markdown]
# **2.** Query heads 0 and 1 read key-value head 0, query heads 2 and 3 read head 1. So repeat each key-value head twice, in place.

# %%
grouped = GPTConfig.tiny(11, n_head=4, n_kv_head=2)
torch.manual_seed(0)
attention = Attention(grouped, layer=0)
x = torch.randn(1, 9, grouped.n_embd)
rotary = rotary_angles(grouped, torch.arange(9)[None])

q = attention.q(x).view(1, 9, 4, -1).transpose(1, 2)  # (B, H, T, D)
k = attention.k(x).view(1, 9, 2, -1).transpose(1, 2).repeat_interleave(2, dim=1)  # (B, 2, T, D) -> (B, H, T, D)
v = attention.v(x).view(1, 9, 2, -1).transpose(1, 2).repeat_interleave(2, dim=1)
y, _ = my_attention(my_rotate(q, torch.arange(9)), my_rotate(k, torch.arange(9)), v)
assert_close(attention.o(y.transpose(1, 2).reshape(1, 9, -1)), attention(x, rotary, None, None, torch.arange(9)[None], 0))
print("grouped queries agree")

# %% [markdown]
# **3.** The honest model stays at the floor. The peeker falls through it: the answer stands one position to the right, and rotary
# positions make "one to the right" easy to find.


# %%
def loss_on_noise(causal, steps=150, letters=8):
    torch.manual_seed(0)
    config = GPTConfig.tiny(letters, n_layer=1, n_head=2, ffn_dim=64)
    model = GPT(config)
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        noise = torch.randint(letters, (16, 17))  # fresh every step: nothing can be learned by heart
        logits, _ = my_gpt(weights, noise[:, :-1], config.n_layer, config.n_head, causal)
        loss = my_loss(logits, noise[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


honest, leaking = loss_on_noise(causal=True), loss_on_noise(causal=False)
print(f"floor ln 8 = {ln(8):.3f}   with the mask {honest:.3f}   without {leaking:.3f}")
assert honest > ln(8) - 0.1
assert leaking < 0.7 * ln(8)
