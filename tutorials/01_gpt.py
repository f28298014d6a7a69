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

FIGURES = ROOT / "runs" / "tutorials"
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
cos, sin = rotary_angles(config, torch.arange(9)[None])  # (1, 1, T, D) each
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
# written, and we can list the writers. At the start they whisper: `init_weights` makes the projections into the stream small.

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
assert len(writes) == 5
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
sentence = "the rat saw the cat and the cat saw the hat."
tokenizer = CharTokenizer(sentence)
batch = collate([[tokenizer.bos_id]], [tokenizer.encode(sentence) + [tokenizer.eos_id]], pad_id=tokenizer.pad_id)
for t in range(4):
    print(f"t = {t}   sees {tokenizer.decode(batch.inputs[0, : t + 1].tolist())!r:6} predicts {tokenizer.decode([int(batch.targets[0, t])])!r}")


def my_loss(logits, targets):
    """logits (B, T, V), targets (B, T) -> mean of −log π(target), in nats per token."""
    logps = logits - logits.logsumexp(-1, keepdim=True)  # watch: logps (B, T, V), exp of it sums to 1 over V
    return -logps.gather(-1, targets[..., None]).mean()


V = tokenizer.vocab_size
config = GPTConfig.tiny(V)
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
assert int(cache.lengths[0]) == T == 45 and T * (T + 1) // 2 == 1035
assert cache.keys.numel() + cache.values.numel() == T * 2 * config.n_layer * config.n_head * config.head_dim == T * 256

# %% [markdown]
# ## 8. The experiment: learn one sentence by heart
#
# A model that cannot learn one sentence has a bug. So this is the first thing to try with any new model. Watch the greedy
# continuation (`sample` always takes the likeliest token) while the loss falls.

# %%
STEPS = 120


def train(forward, policy):
    """Fit `forward(inputs) -> logits` to the sentence; returns the losses."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = my_loss(forward(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


losses = train(policy, policy)
said = sample(policy, [[tokenizer.bos_id]], max_new=60, eos_id=tokenizer.eos_id, seed=0, greedy=True)
said = tokenizer.decode(said.completions[0])
print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}\nsays {said!r}")
assert losses[-1] < 0.02
assert said == sentence
