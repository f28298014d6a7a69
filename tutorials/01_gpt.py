# %% [markdown]
# # 01 · A GPT, from text to a loss
#
# **You will build** every part of a GPT from plain tensor operations, and check that your parts give the same numbers
# and gradients as `minialign.model.GPT`. Then you train it on one sentence and take away one part at a time.
#
# **Time:** 28 minutes of reading, 40 seconds of computer.
#
# **You need:** PyTorch tensors, matrix products and `loss.backward()`. Nothing about transformers or alignment.
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from minialign.batch import collate
from minialign.model import GPT, MLP, GPTConfig, RMSNorm, rotary_angles, rotate
from minialign.tokenizer import CharTokenizer
from tutorials.checks import always, equal, this_run
from tutorials.figures import gpt as figures

torch.manual_seed(0)
torch.set_printoptions(precision=4, sci_mode=False)
generator = torch.Generator().manual_seed(0)


def same(mine, theirs, tensors, name):
    """Compare two results, and the gradients of their squares with respect to `tensors`."""

    def near(a, b, what, atol):
        message = f"The {what} of {name} are right."
        equal(a, b, atol=atol, rtol=1e-4, msg=message)

    near(mine, theirs, "values", 1e-5)
    grads = [torch.autograd.grad((y**2).sum(), tensors) for y in (mine, theirs)]
    for my_grad, their_grad in zip(*grads, strict=True):
        near(my_grad, their_grad, "gradients", 1e-4)
    print("checkpoint passed:", name)


# %% [markdown]
# ## The question
#
# A language model reads a text that is cut into [tokens](../GLOSSARY.md#token), here characters. At each position it
# computes V numbers, the [logits](../GLOSSARY.md#logits), one for each token of its vocabulary. Softmax turns them
# into the probabilities of the next token.
#
# Training predicts all positions of a text in one pass. The token that position t must predict is stored at position
# t + 1 of the same tensor. What stops the model from reading it? And how does one position learn anything from the
# others?
#
# This is the machine that we build (Vaswani et al. 2017; as a language model Radford et al. 2018):

# %%
figures.blocks()

# %% [markdown]
# Each position has a vector of C numbers (*channels*), the *residual stream*. It starts as the embedding of the token.
# Attention and MLP (*multi-layer perceptron*) read a copy of it, scaled by a norm, and **add** their output to it. Only
# attention moves information from one position to another. Shapes use these letters: B texts in a batch, T positions, V
# tokens of the vocabulary, C channels, H heads (attentions side by side, section 4), D = C / H, L blocks.

# %% [markdown]
# ## 1. Attention, by hand
#
# First the input. A tokenizer gives every character a number, its id. Id 0 is not a character. It marks the end of a
# text, and it also stands in front of every text, so that the first character is predicted from something (in the code:
# `eos_id` and `bos_id`, both 0).
#
# An embedding is a table with one row per id. We fill one by hand, with three channels, so that you can check every
# number below on paper. The cell prints the ids of the four letters and their rows of the table:

# %%
tokenizer = CharTokenizer("abcd")
ids = torch.tensor(tokenizer.encode("abcd"))  # (T,)
ln = math.log
table = torch.tensor(
    [
        [0.0, 0.0, 0.0],  # id 0
        [1.0, ln(1), 8.0],  # a
        [1.0, ln(1), 0.0],  # b
        [1.0, ln(2), 4.0],  # c
        [1.0, ln(4), 2.0],  # d
    ]
)
x = table[ids]  # watch: x (T, C)
print(ids.tolist(), "\n", x)

# %% [markdown]
# Three matrices take three vectors from each position: a **query** (what this position looks for), a **key** (what
# others can find it by) and a **value** (what it hands over). Our matrices pick one channel each, so D = 1.
#
# The *score* of a query for a key is their dot product. Softmax turns scores into weights that are proportional to
# $e^{score}$. Here all queries are 1, so the letters a, b, c, d get the weights $e^k$ = 1, 1, 2, 4, divided by their
# sum 8. The result is the weighted sum of the values:

# %%
W_q, W_k, W_v = torch.eye(3)[0:1], torch.eye(3)[1:2], torch.eye(3)[2:3]  # each (D, C)
q, k, v = x @ W_q.T, x @ W_k.T, x @ W_v.T  # (T, D) each
print("q", q.squeeze().tolist(), " e^k", k.exp().squeeze().tolist(), " v", v.squeeze().tolist())
figures.by_hand("abcd", shares=(1, 1, 2, 4), values=(8, 0, 4, 2), gathered=3)

# %% [markdown]
# So d gathers (1·8 + 1·0 + 2·4 + 4·2) / 8 = 3. This is how one position learns from the others.
#
# The other letters must not look at letters to their right. The scores of these keys are set to $-\infty$ **before** the
# softmax, which makes their weights 0. This is the *causal mask*. It stops a position from reading its answer:
#
# $$y = \text{softmax}\!\left(\frac{q\,k^\top}{\sqrt{D}} + M\right) v, \qquad
# M_{ts} = 0 \text{ if } s \le t, \text{ else } -\infty$$
#
# Row t belongs to the query, column s to the key. Compute on paper what b and c gather, then look at the output.


# %%
def my_attention(q, k, v, causal=True):
    """q, k, v (..., T, D) -> what each position gathers (..., T, D), and its weights (..., T, T).

    Scores are q·k / sqrt(D). With causal=True the scores of keys to the right of a query become
    -inf before the softmax. Every row of the weights sums to 1.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # watch: scores (..., T, T)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)  # True where s > t
        scores = scores.masked_fill(future, -torch.inf)
    weights = scores.softmax(-1)  # watch: weights (..., T, T)
    return weights @ v, weights


y, weights = my_attention(q, k, v)
print("weights\n", weights)
print("gathered", y.squeeze().tolist())

# %% [markdown]
# Stop in `my_attention` at this first call: `scores` is 4 × 4, and each row holds 0, 0, 0.69, 1.39 before the mask.
#
# **Why divide by √D?** The dot product of two vectors of D independent random numbers with mean 0 and variance 1 has a
# standard deviation of √D. Undivided, for large D one key would take nearly all the weight, and then the softmax has
# almost no gradient.
#
# ### Checkpoint: attention

# %%
always(ids.tolist() == [1, 2, 3, 4], "The tokenizer gives a, b, c, d the ids 1 to 4.")
by_hand = torch.tensor([1, 1, 2, 4]) / 8
equal(weights[3], by_hand, msg="In my_attention, d weighs the letters 1 : 1 : 2 : 4.")
by_hand = torch.tensor([8.0, 4.0, 4.0, 3.0])
equal(y.squeeze(), by_hand, msg="In my_attention, a, b, c, d gather 8, 4, 4, 3.")

# q, k, v of 2 heads, 5 positions, D = 4
heads = torch.randn(3, 2, 5, 4, generator=generator, requires_grad=True)
for causal in (True, False):
    theirs = F.scaled_dot_product_attention(*heads, is_causal=causal)
    same(my_attention(*heads, causal)[0], theirs, [heads], f"my_attention(causal={causal})")

# %% [markdown]
# ## 2. Positions: turn the queries and keys
#
# So far the last letter does not notice the order of the others: `bacd` gives d the same sum.

# %%
swapped = table[torch.tensor([2, 1, 3, 4])]
y_swapped, _ = my_attention(swapped @ W_q.T, swapped @ W_k.T, swapped @ W_v.T)
print("abcd ->", y[3].item(), "  bacd ->", y_swapped[3].item())

# %% [markdown]
# Rotary positions (Su et al. 2021) change that. A pair of channels is a point in the plane, and the point is turned
# by an angle that is proportional to its position. The dot product of two vectors depends on the angle between them. If
# both move by the same distance, the angle stays the same. Compare the three circles:

# %%
figures.rotation()

# %% [markdown]
# So a score depends on positions only through the **distance** between query and key. A head has D channels, which make
# D/2 pairs: channel i goes with channel i + D/2. This pair turns by $10000^{-2i/D}$ radians per position. The first pair
# turns by 1 radian, so it tells neighbours apart. The last ones turn slowly, so they tell far from near.


# %%
def my_rotate(x, positions, base=10000.0):
    """x (..., T, D), positions (T,) -> x with every pair of channels turned, same shape.

    Pair i is (channel i, channel i + D/2). At position t it turns by a = t * base ** (-2i/D):
    (first, second) -> (first * cos a - second * sin a, second * cos a + first * sin a).
    """
    half = x.shape[-1] // 2
    speed = 1 / base ** (torch.arange(half) / half)  # radians per position, (D/2,)
    angle = positions[:, None] * speed  # watch: angle (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


turned = my_rotate(torch.tensor([1.0, 0.0]).expand(4, 2), torch.arange(4))
print("the vector (1, 0) at positions 0 to 3:\n", turned)
print("all dot products with each other, cos(t - s):\n", turned @ turned.T)

# %% [markdown]
# ### Checkpoint: positions

# %%
distance = (torch.arange(4)[:, None] - torch.arange(4)).float()
meaning = "After my_rotate, the dot product of (1, 0) at t and (1, 0) at s is cos(t - s)."
equal(turned @ turned.T, distance.cos(), msg=meaning)
config = GPTConfig.tiny(vocab_size=11)
places = torch.arange(3, 12)
heads = torch.randn(2, config.n_head, 9, config.head_dim, generator=generator, requires_grad=True)
cos, sin = rotary_angles(config, places[None])  # the project's table; rotate does the turn
project = rotate(heads, cos, sin)
same(my_rotate(heads, places), project, [heads], "my_rotate")

# %% [markdown]
# ## 3. Norm and MLP
#
# **RMSNorm** (Zhang & Sennrich 2019) divides a vector by its root mean square, so that every part reads vectors of
# the same size. Then each channel is multiplied by a learned weight. For (3, 4) the root mean square is √(25/2) = 3.54.
# A small number `eps` under the root avoids a division by 0.
#
# **The MLP** works on each position alone. It maps C channels to a wider layer, applies a nonlinear function, and
# maps back to C. We use the gated form (SwiGLU, Shazeer 2020). Here σ is the logistic function and ⊙ multiplies
# channel by channel:
#
# $$\text{mlp}(x) = W_{down}\,\big(\text{silu}(W_{gate}\,x) \odot W_{up}\,x\big), \qquad \text{silu}(g) = g\,\sigma(g)$$
#
# silu(g) is about 0 for very negative g and about g for large g. So the gate decides, channel by channel, how much of
# `up` passes.


# %%
def my_norm(x, weight, eps=1e-5):
    """x (..., C), weight (C,) -> x / sqrt(mean of x² over channels + eps) * weight, (..., C)."""
    mean_square = x.pow(2).mean(-1, keepdim=True)  # watch: mean_square (..., 1)
    return x / (mean_square + eps).sqrt() * weight


def my_mlp(x, w_gate, w_up, w_down):
    """x (..., C), w_gate, w_up (width, C), w_down (C, width) -> (..., C), by the formula above."""
    gate, up = x @ w_gate.T, x @ w_up.T
    return (gate * torch.sigmoid(gate) * up) @ w_down.T


three_four = torch.tensor([3.0, 4.0])
normed = my_norm(three_four, 1.0)
print("(3, 4) normed:", normed, " 100 times that:", my_norm(100 * three_four, 1.0))

# %% [markdown]
# ### Checkpoint: norm and MLP

# %%
by_hand = three_four / 3.5355
equal(normed, by_hand, atol=1e-4, rtol=0, msg="my_norm turns (3, 4) into (3, 4) / 3.54.")
some = torch.randn(3, 64, generator=generator, requires_grad=True)
norm, mlp = RMSNorm(64, eps=1e-5), MLP(config)
nn.init.uniform_(norm.weight, 0.5, 1.5)
same(my_norm(0.01 * some, norm.weight), norm(0.01 * some), [some, norm.weight], "my_norm")
for parameter in mlp.parameters():
    nn.init.normal_(parameter, std=0.2)
mine = my_mlp(some, mlp.gate.weight, mlp.up.weight, mlp.down.weight)
same(mine, mlp(some), [some, *mlp.parameters()], "my_mlp")

# %% [markdown]
# ## 4. The whole GPT
#
# Several heads run side by side. The C channels of q, k and v are cut into H pieces of D, each piece is a head of its
# own, and a last matrix `o` mixes what the heads gathered. The logit of a token is the dot product of the last norm's
# output with the token's row of the embedding table (*tied* embeddings, Press & Wolf 2017).


# %%
def my_gpt(w, inputs, n_layer, n_head, causal=True):
    """inputs (B, T) ids -> logits (B, T, V).

    w holds the matrices: "tok_embed.weight" (V, C), "norm.weight" (C,), and for block 0, 1, ...
    "blocks.0.norm1.weight" (C,), "blocks.0.attn.q.weight" (C, C) (also k, v and o),
    "blocks.0.norm2.weight", "blocks.0.mlp.gate.weight" (width, C) (also up and down).
    Follow the picture: x + attention(norm1(x)), then x + mlp(norm2(x)), and at the end the norm.
    Queries and keys are rotated, values are not. Head h has channels hD to (h + 1)D.
    """
    B, T = inputs.shape
    positions = torch.arange(T)
    x = w["tok_embed.weight"][inputs]  # watch: x (B, T, C), the residual stream
    for layer in range(n_layer):
        prefix = f"blocks.{layer}."
        own = {name.removeprefix(prefix): w[name] for name in w if name.startswith(prefix)}
        read = my_norm(x, own["norm1.weight"])
        q, k, v = (read @ own[f"attn.{name}.weight"].T for name in "qkv")  # (B, T, C)
        q, k, v = (z.view(B, T, n_head, -1).transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        q, k = my_rotate(q, positions), my_rotate(k, positions)  # watch: q (B, H, T, D)
        y, _ = my_attention(q, k, v, causal)
        x = x + y.transpose(1, 2).reshape(B, T, -1) @ own["attn.o.weight"].T
        read = my_norm(x, own["norm2.weight"])
        x = x + my_mlp(read, *(own[f"mlp.{name}.weight"] for name in ("gate", "up", "down")))
    logits = my_norm(x, w["norm.weight"]) @ w["tok_embed.weight"].T  # watch: logits (B, T, V)
    return logits


# %% [markdown]
# ### Checkpoint: the same logits and gradients as minialign
#
# A new model has tiny weights, which would hide mistakes. So we give both models large random weights first, in
# float64.

# %%
big = GPT(config).double()
with torch.no_grad():
    for parameter in big.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
ids = torch.randint(11, (3, 20), generator=generator)  # B = 3, T = 20
w = dict(big.named_parameters())
mine = my_gpt(w, ids, config.n_layer, config.n_head)
same(mine, big(ids), list(big.parameters()), "my_gpt")
unmasked = my_gpt(w, ids, config.n_layer, config.n_head, causal=False)
always((unmasked - mine).abs().max() > 0.1, "my_gpt gives other logits with causal=False.")

# %% [markdown]
# ## 5. From logits to a loss
#
# The probability of a text is the product of the probabilities of its tokens. The loss is its negative logarithm, per
# token:
#
# $$\text{loss} = -\frac{1}{T} \sum_{t=1}^{T} \log \pi(y_t \mid y_{<t})$$
#
# π is the model, $y_t$ the token at t and $y_{<t}$ everything before it. Logarithms are natural; their unit is called
# a [nat](../GLOSSARY.md#nats). `collate` lays the text out: `inputs` is the text without its last token, and
# `targets` the same text moved by one, so that `targets[:, t]` is the token that follows `inputs[:, t]`. The first lines
# of the output show what four positions see and must predict:

# %%
sentence = "she sells sea shells by the sea."
tokenizer = CharTokenizer(sentence)
eos, V = tokenizer.eos_id, tokenizer.vocab_size
# pad_id would fill up shorter rows; here there is only one row
batch = collate([[tokenizer.bos_id]], [tokenizer.encode(sentence) + [eos]], pad_id=eos)
inputs, targets = batch.inputs, batch.targets  # (B, T) = (1, 33) each
for t in range(1, 5):
    seen = tokenizer.decode(inputs[0, 1 : t + 1].tolist())
    following = tokenizer.decode([int(targets[0, t])])
    print(f"t = {t}   sees {seen!r:7} predicts {following!r}")


def my_loss(logits, targets):
    """logits (B, T, V), targets (B, T) -> the mean of -log(softmax probability of the target)."""
    logps = logits - logits.logsumexp(-1, keepdim=True)  # watch: logps (B, T, V)
    return -logps.gather(-1, targets[..., None]).mean()


# %% [markdown]
# ### Checkpoint: the loss

# %%
some = torch.randn(2, 7, V, generator=generator, requires_grad=True)
answers = torch.randint(V, (2, 7), generator=generator)
theirs = F.cross_entropy(some.flatten(0, 1), answers.flatten())
same(my_loss(some, answers), theirs, [some], "my_loss")

small = GPTConfig.tiny(V, n_head=2)  # C = 64, L = 2, H = 2, D = 32
torch.manual_seed(0)
model = GPT(small)
with torch.no_grad():
    first_loss = my_loss(model(inputs), targets).item()
print(f"new model: loss {first_loss:.3f}, uniform guess ln {V} = {ln(V):.3f}")

# %% [markdown]
# A new model has learned nothing, so its loss is near that of a uniform guess, ln V. It is a little higher, because the
# guesses of random weights are not exactly uniform.

# %% [markdown]
# ## 6. Learn one sentence, with and without its parts
#
# In this sentence the current letter is not enough: after `s` comes `h`, `e` or a space. A model that sees only the
# current letter cannot beat the average of −log P(next letter | this letter). We can count that bound. Then we train
# twice: the whole model, and one whose attention returns zero. Compare the two last losses with the bound.

# %%
text = [tokenizer.bos_id, *tokenizer.encode(sentence), eos]
counts = torch.zeros(V, V)
for this, following in pairwise(text):
    counts[this, following] += 1
chance = counts / counts.sum(1, keepdim=True)  # (V, V), row: this letter
bound = -(counts * chance.log()).nansum().item() / counts.sum().item()
STEPS = 120


def train(forward, parameters, lr=5e-3):
    """Fit forward(inputs) -> logits to the sentence; return the loss of every step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = my_loss(forward(inputs), targets)  # watch: loss ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def write(forward):
    """Start with the start token and append the likeliest token, again and again."""
    ids = [tokenizer.bos_id]
    while len(ids) <= len(sentence) and (len(ids) == 1 or ids[-1] != eos):
        ids.append(int(forward(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids[1:])


class Nothing(nn.Module):
    def forward(self, x, *_):
        return torch.zeros_like(x)


def fresh(without="", seed=0, **sizes):
    """A new model, without one of its parts."""
    torch.manual_seed(seed)
    if without == "positions":
        sizes["rotary_dim"] = 0  # no channel is turned
    model = GPT(GPTConfig.tiny(V, n_head=2, **sizes))
    for block in model.blocks:
        if without == "attention":
            block.attn = Nothing()
        if without == "MLP":
            block.mlp = Nothing()
        if without == "norms":
            block.norm1 = block.norm2 = model.norm = nn.Identity()
    return model


model, one_letter = fresh(), fresh(without="attention")
print(f"before training    {write(model)!r}  (it repeats id 0, which also means the end)")
losses = train(model, model.parameters())
blind = train(one_letter, one_letter.parameters())
print(f"whole model        {losses[-1]:.3f}  {write(model)!r}")
print(f"without attention  {blind[-1]:.3f}  {write(one_letter)!r}")
print(f"best from the last letter alone {bound:.3f}, uniform guess {ln(V):.3f}")
figures.learning(losses, blind, ln(V), bound)
always(min(blind) > bound - 1e-3, "No model that sees one letter gets below the bound.")
this_run(blind[-1] < bound + 0.03, "Without attention, training ends at the bound.")
this_run(write(model) == sentence, "The whole model knows the sentence by heart.")

# %% [markdown]
# Which other parts does this sentence need? We remove one at a time, and train with two seeds. Compare the rows with the
# whole model above.

# %%
final = {}
for part in ("positions", "MLP", "norms"):
    models = [fresh(without=part, seed=seed) for seed in (0, 1)]
    final[part] = [train(one, one.parameters())[-1] for one in models]
    first, second = final[part]
    print(f"without {part:10} loss {first:.3f} and {second:.3f}   {write(models[0])!r}")
this_run(min(final["positions"]) > 2 * max(final["MLP"]), "Positions matter more than the MLP.")

# %% [markdown]
# Attention and positions are needed. Without positions the model still learns something, because the causal mask alone
# contains some order: the first position sees one key, the second sees two. Without the norms training becomes
# unreliable: compare the two seeds.
#
# **This sentence is learned without the MLP too.** So it is too short to show what the MLP is for. In large models the
# MLPs hold most of the weights.

# %% [markdown]
# ## 7. Break it: remove the mask
#
# `my_gpt(causal=False)` lets every position see the whole row, with its own answer. Here is a test that finds this.
# Position 10 has to predict token 11. So if we change token 11 of the input, the logits at position 10 must not move. The
# output shows this test, the loss and the written text, with the mask and without it.


# %%
def peek(forward):
    """How far the logits at position 10 move when token 11 changes."""
    changed = inputs.clone()
    changed[0, 11] = (changed[0, 11] + 1) % V
    with torch.no_grad():
        return (forward(changed) - forward(inputs))[0, 10].abs().max().item()


def causal_gpt(inputs):
    return my_gpt(dict(model.named_parameters()), inputs, small.n_layer, small.n_head)


peeker = fresh()


def maskless(inputs):
    w = dict(peeker.named_parameters())
    return my_gpt(w, inputs, small.n_layer, small.n_head, causal=False)


peeker_losses = train(maskless, peeker.parameters())
for name, forward, run in (("with", causal_gpt, losses), ("without", maskless, peeker_losses)):
    print(f"{name:7} the mask: logits at 10 move by {peek(forward):.3f}, loss {run[-1]:.4f}")
    print(f"                  it writes {write(forward)!r}")
always(peek(causal_gpt) < 1e-5 < peek(maskless), "Only without the mask, the logits move.")
this_run(peeker_losses[-1] < 0.05, "Without the mask the loss also falls below 0.05.")
this_run(write(maskless) != sentence, "Without the mask the model does not write the sentence.")

# %% [markdown]
# **The loss gives no warning.** One sentence can be learned by heart, so a loss near 0 is possible, and without the
# mask it is even a little higher. Only the changed token and the written text show the leak: when the model writes by
# itself, there is no next token to read. If every training batch is new, nothing can be learned by heart. Then an
# average loss clearly below the best possible one means a leak (exercise 3).

# %% [markdown]
# ## What is wrong here? (1)
#
# This attention sets the future weights to 0, as it should. The result for the *first* letter still changes when the
# *last* letter does. Why? (Right values: 8 for both.)

# %%
for word in ("abcd", "abcc"):
    state = table[torch.tensor(["abcd".index(letter) + 1 for letter in word])]
    scores = (state @ W_q.T) @ (state @ W_k.T).T
    weights = scores.softmax(-1).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), 0.0)
    print(word, "-> the first letter gathers", round((weights @ state @ W_v.T)[0].item(), 3))

# %% [markdown]
# ## What is wrong here? (2)
#
# The same model and the same data, but the loss stops falling far above 0. No learning rate and no number of steps brings
# it near 0. Why?

# %%
puzzled = fresh()
optimizer = torch.optim.AdamW(puzzled.parameters(), lr=1e-3, weight_decay=0.0)
for step in range(STEPS):
    probs = puzzled(inputs).softmax(-1)
    stuck = F.cross_entropy(probs.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    stuck.backward()
    optimizer.step()
    if step % 40 == 0 or step == STEPS - 1:
        print(f"step {step:3}   loss {stuck.item():.3f}")

# %% [markdown]
# ## What you now know
#
# - A GPT has a stream of vectors, one per position. Attention and MLP read it and add to it. Only attention mixes
#   positions.
# - The causal mask, applied before the softmax, keeps a position from seeing its answer.
# - With rotary positions, a score depends on positions only through the distance.
# - A loss can be compared with numbers that you can count: ln V, or the best possible from the last letter.
# - On fresh data, an average loss clearly below a known bound means a leak. In any case, change one token and compare
#   earlier outputs.
#
# Next: [02](02_sampling.ipynb), how to draw a text from these logits.
#
# ## Exercises
#
# 1. **Count** (easy, 5 minutes). How many parameters has the model of section 6? C = 64, L = 2, MLP width 128, V =
#    11, no biases.
# 2. **Try this** (easy, 10 minutes). A common test of a new model is whether it can learn one sentence.
#    `fresh(n_embd=256)` is four times as wide as the model of section 6. Train both with the rates 1e-3 and 5e-3. Write
#    down first what you expect.
# 3. **The impossible loss** (medium, 15 minutes). Nobody can predict letters that are drawn at random: the best loss
#    is the ln of their number. Take 8 letters, and at every step 16 new rows of 17 random letters (16 inputs, 16 targets
#    each). Train `my_gpt` on them, with and without the mask. How far below the bound does it get without the mask?

# %% [markdown]
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# The mask comes after the softmax, which has already divided by a sum over all four letters. So the last letter still
# changes the first one through that sum: a gathers 8·1/8 = 1 in abcd and 8·1/6 in abcc. Set scores to −∞ before the
# softmax.
#
# </details>

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# `F.cross_entropy` expects logits and applies a softmax itself. Here it gets probabilities. The best case is
# probability 1 for the target. Then the function reads the logits (1, 0, …, 0), and with V = 11 the loss is ln(e + 10)
# − 1 = 1.543. No training gets below it. If a wrong token gets probability 1, the logit of the target is 0, and the
# loss is ln(e + 10) = 2.543, one nat more.
#
# This run ends at 1.621. At 2 of the 33 positions the model still prefers a wrong token, and 1.543 + 2/33 = 1.604. The
# gradient of a softmax that is almost certain is almost 0, so the model hardly gets away from there.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
T = inputs.shape[1]
perfect = F.one_hot(targets, V).double()
lowest = F.cross_entropy(perfect.flatten(0, 1), targets.flatten()).item()
wrong = (probs.argmax(-1) != targets).sum().item()
print(f"lowest possible: {lowest:.3f}   a wrong token is likeliest at {wrong} of {T} positions")
print(f"lowest + {wrong}/{T} = {lowest + wrong / T:.3f}   loss at the end {stuck.item():.3f}")
always(abs(lowest - ln(1 + (V - 1) / math.e)) < 1e-6, "The lowest loss is ln(1 + (V - 1)/e).")
always(stuck.item() > lowest, "No loss of puzzle 2 is below the lowest possible.")
this_run(abs(stuck.item() - lowest - wrong / T) < 0.03, "A wrong token costs one nat more.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The table has V·C numbers, and the output uses the same table. A block has four matrices of C², three MLP matrices
# of C·128 and two norms of C. One more norm comes at the end: V·C + L·(4C² + 3·128·C + 2C) + C = 704 + 2·41,088 + 64
# = 82,944.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
C, L, width = 64, 2, 128
by_formula = V * C + L * (4 * C * C + 3 * width * C + 2 * C) + C
print(f"{by_formula:,} parameters")
counted = sum(parameter.numel() for parameter in GPT(GPTConfig.tiny(V)).parameters())
always(by_formula == counted, "The formula counts every parameter.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# At 1e-3 the wide model learns faster. At 5e-3 it does not learn the sentence, and the narrow one does. So a model that
# fails this test need not have a bug: the learning rate may be too high for its size. Large models are trained with lower
# rates, and the rate rises slowly over the first steps (*warm-up*).
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
grid = {}
for lr in (1e-3, 5e-3):
    for width in (64, 256):
        one = fresh(n_embd=width)
        grid[lr, width] = train(one, one.parameters(), lr)[-1]
        print(f"rate {lr:g}  C = {width:3}  loss {grid[lr, width]:.3f}   {write(one)!r}")
this_run(grid[1e-3, 256] < grid[1e-3, 64], "At a rate of 1e-3 the wide model learns faster.")
this_run(grid[5e-3, 64] < 0.1 < grid[5e-3, 256], "At a rate of 5e-3 only the narrow one learns.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# With the mask the model stays at the bound, ln 8 = 2.079. Without it the loss falls to about 0.15. Rotary positions
# make it easy to look one position to the right, where the answer is. Only the last of the 16 positions has nothing to
# its right. So the lowest possible loss is ln 8 / 16 = 0.130.
#
# </details>


# %% tags=["solution"] jupyter={"source_hidden": true}
def loss_on_noise(causal, steps=150, n_letters=8):
    torch.manual_seed(0)
    shape = GPTConfig.tiny(n_letters, n_layer=1, n_head=2, ffn_dim=64)
    weights = dict(GPT(shape).named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    for _ in range(steps):
        noise = torch.randint(n_letters, (16, 17))
        logits = my_gpt(weights, noise[:, :-1], shape.n_layer, shape.n_head, causal)
        loss = my_loss(logits, noise[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


honest, leaking = loss_on_noise(causal=True), loss_on_noise(causal=False)
print(f"with the mask    {honest:.3f}   lowest possible ln 8 = {ln(8):.3f}")
print(f"without the mask {leaking:.3f}   lowest possible ln 8 / 16 = {ln(8) / 16:.3f}")
this_run(honest > ln(8) - 0.1, "With the mask the loss stays at the bound.")
this_run(leaking < 0.7 * ln(8), "Without the mask the loss is far below the bound.")
