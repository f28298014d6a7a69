# %% [markdown]
# # 10 · Kernels
#
# **You will build** GPU kernels in [Triton](https://triton-lang.org): first the sum of two vectors, then the sum of a
# row, then the [log-prob](../GLOSSARY.md#log-prob) and the entropy of a row of logits in one pass over memory. Then
# you compute both, with gradients, without ever holding all [logits](../GLOSSARY.md#logits).
#
# **Time:** 30 minutes of reading, about a minute of computer. No GPU is needed.
#
# **You need:** [03 · Log-probs](03_logps.ipynb). Lessons 04 to 09 taught the methods. This lesson and
# [10b](10b_scale.ipynb) teach how their numbers are computed for large models. If you want to align a model first, go
# to [11](11_storyteller.ipynb): it needs neither of the two.
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger. Shapes say (rows, V): a row is one scored token, V is the size of the vocabulary.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import functools
import math
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the one switch of this tutorial
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels then run as Python

from tutorials.checks import always, equal, this_run
from tutorials.figures import kernels as figures

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is made for Linux; elsewhere a stand-in in plain torch runs these
    triton, tl = figures.stand_in()

from minialign.kernels import logprob
from minialign.kernels.linear_logprob import LinearLogps
from minialign.logps import naive_logps

print("kernels run on", DEVICE if DEVICE == "cuda" else "the CPU, in Triton's interpreter")

# %% [markdown]
# Without a GPU, Triton's interpreter runs the kernels as Python, and breakpoints inside them work.
#
# ## The question
#
# At its end, a model multiplies the hidden state of every token, C numbers, with its *head*, a (V, C) matrix, and gets
# V logits. Most methods of this course need only two numbers of such a row: the log-prob of one token and, at times,
# the entropy $-\sum p \log p$. With a vocabulary of 128,256, the logits are the largest tensor of the whole step. **How
# many bytes must be moved for these two numbers, and must all logits be in memory at the same time?**

# %%
figures.gpu()

# %% [markdown]
# A GPU has a large memory (HBM, high-bandwidth memory) and a chip. A **kernel** is a function that runs on the chip.
# It is started ("launched") as many **programs**, each for its own part of the data. A program loads numbers from
# memory into registers, which are fast but few, computes, and stores results.
#
# Each line of torch code runs one or more kernels. Between two lines, every tensor is written to memory and read
# again.
#
# ## 1. Count the bytes
#
# Here is the usual code. Beside each line stands what it reads and writes at least, in bytes for each logit: a
# bfloat16 number has 2 bytes, a float32 number 4. τ is the temperature of [02](02_sampling.ipynb).


# %%
def line_by_line(logits, targets, tau=1.0):
    """logits (rows, V), targets (rows,) -> log-probs and entropies, (rows,) each."""
    wide = logits.float()  # read 2, write 4
    z = wide / tau  # read 4, write 4
    log_p = z.log_softmax(1)  # read 4 twice (lse, then result), write 4
    logps = log_p.gather(1, targets[:, None])[:, 0]  # one number for each row
    p = log_p.exp()  # read 4, write 4
    entropies = -(p * log_p).sum(1)  # product: read 8, write 4; sum: read 4
    return logps, entropies


moved = (2 + 4) + (4 + 4) + (4 + 4 + 4) + (4 + 4) + (8 + 4 + 4)
always(moved == 50, "The comments add up to 50 bytes for each logit.")

ROWS, V, C = 8192, 128256, 4096  # scored tokens of a step; vocabulary and channels of Llama-3-8B
BANDWIDTH, RATE = 4.3e12, 790e12  # bytes and flops a second that the project assumes for an H200
for name, size in {"line by line": 50 * ROWS * V, "each logit read once": 2 * ROWS * V}.items():
    print(f"{name:28} {size / 1e9:5.1f} GB  at least {1e3 * size / BANDWIDTH:5.2f} ms")
product = 2 * ROWS * V * C  # flops
print(f"{'the product that makes them':28}           at least {1e3 * product / RATE:5.2f} ms")

# %% [markdown]
# These times are **lower bounds by arithmetic**: bytes divided by bandwidth, and flops (operations)
# divided by their rate. Nothing has been measured on a GPU yet ([RESULTS](../../docs/RESULTS.md)).
#
# By these bounds, the lines above cost about as much as the product that makes the logits. The product is
# compute-bound (limited by arithmetic), so we leave it to torch. The lines are memory-bound. A kernel that reads each
# logit once moves 2 bytes instead of 50.
#
# ## 2. The first kernel: add two vectors
#
# - `tl.program_id(0)` is the number of this program. All programs run the same code.
# - `tl.arange(0, BLOCK)` makes the numbers 0 … BLOCK − 1. Each place of such a block is called a **lane**.
# - `x` is an address, and `x + place` are those of x[place]. `tl.load` reads, `tl.store` writes.
# - `mask` turns off the lanes that lie beyond the end.
# - `BLOCK: tl.constexpr` is known when the kernel is compiled. It must be a power of two.


# %%
@triton.jit
def my_add(x, y, out, n, BLOCK: tl.constexpr):
    """Program k computes out[i] = x[i] + y[i] for its places i = k BLOCK, …, k BLOCK + BLOCK - 1.

    x, y, out: addresses of the first of n numbers. Lanes at or beyond n must not load or store.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # watch: place (BLOCK,)
    mask = place < n
    total = tl.load(x + place, mask=mask) + tl.load(y + place, mask=mask)
    tl.store(out + place, total, mask=mask)


# %% [markdown]
# `kernel[(programs,)](…)` launches it. 1000 numbers in blocks of 256 need 4 programs, and 24 lanes of the last one
# are turned off. Stop in `my_add` at the second program: `place` is 256 … 511.
#
# ### Checkpoint

# %%
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(2, 1000, generator=generator).to(DEVICE)
memory = torch.full((1024,), -1.0, device=DEVICE)
my_add[(triton.cdiv(1000, 256),)](x, y, memory, 1000, BLOCK=256)
message = "my_add must give x + y in its first 1000 places."
equal(memory[:1000], x + y, msg=message)
always(bool((memory[1000:] == -1).all()), "my_add writes nothing behind n: its store has the mask.")
print("my_add equals torch's sum and leaves the memory behind it alone")

# %% [markdown]
# ## 3. One program for each row: a sum
#
# A row of logits does not fit into one block. So one program takes one row, block by block. In memory, rows lie one
# behind the other. Row r begins at `r * stride`, where the stride is the distance between two rows.

# %%
figures.blocks()

# %% [markdown]
# A masked lane loads `other`. For a sum that must be 0. And `row` becomes a 64-bit integer, because `row * stride`
# passes $2^{31}$ at row 16384 of 131072 logits, and a 32-bit number would overflow.


# %%
@triton.jit
def my_row_sum(rows, out, stride, width, BLOCK: tl.constexpr):
    """Program r writes the sum of row r to out[r]. It adds up block after block, in float32.

    rows: address of the first number. Row r begins r * stride numbers later; its width is `width`.
    """
    row = tl.program_id(0).to(tl.int64)
    total = 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        numbers = tl.load(rows + row * stride + column, mask=column < width, other=0.0)
        total += tl.sum(numbers.to(tl.float32), 0)  # watch: total ()
    tl.store(out + row, total)


# %% [markdown]
# ### Checkpoint

# %%
matrix = torch.randn(5, 700, generator=generator).bfloat16().to(DEVICE)
sums = torch.empty(5, device=DEVICE)
for width in (700, 512, 3):  # also only the first columns of each row: the stride stays 700
    my_row_sum[(5,)](matrix, sums, matrix.stride(0), width, BLOCK=256)
    expected = matrix[:, :width].float().sum(1)
    message = f"my_row_sum must equal torch's sum for rows of {width} numbers."
    equal(sums, expected, atol=1e-4, rtol=0, msg=message)
print("my_row_sum equals torch's sum of each row")

# %% [markdown]
# ## 4. Softmax in one pass, by hand
#
# A softmax seems to need two passes: one for the maximum, which is subtracted because $e^{89}$ is infinite in
# float32, and one for the sum. *Online softmax* (Milakov and Gimelshein 2018) needs one pass. For the log-prob it
# keeps two numbers for each row, top and total, and each new slice of the row updates them. For the entropy we add a
# third, weighted. With $z_i$ the logits divided by τ:
#
# $$\text{top} = \max_i z_i, \qquad \text{total} = \sum_i e^{z_i - \text{top}}, \qquad
#   \text{weighted} = \sum_i e^{z_i - \text{top}}\,(z_i - \text{top}) .$$
#
# Let lse be top + log total, the *log-sum-exp*. Then $\log p_i = z_i - \mathrm{lse}$, which gives both:
#
# $$\log p_y = z_y - \text{top} - \log \text{total}, \qquad
#   \text{entropy} = -\sum_i p_i \log p_i = \log \text{total} - \frac{\text{weighted}}{\text{total}} .$$
#
# If a slice raises top by some amount `rise`, the old sums were made with the old top. Every old exponential must be
# multiplied by $e^{-\text{rise}}$, and every old $z_i - \text{top}$ falls by `rise`. So total becomes
# $\text{total} \cdot e^{-\text{rise}}$, and weighted becomes
# $(\text{weighted} - \text{rise} \cdot \text{total})\, e^{-\text{rise}}$. By hand, with the logits 1, 3
# and then 4, 2: after the first slice top is 3, total is $e^{-2} + 1 = 1.135$, and weighted is $-2e^{-2} = -0.271$. Then
# top rises by 1:

# %%
e1, e2 = math.exp(-1), math.exp(-2)
first = 3, e2 + 1, -2 * e2  # terms 1 - 3 and 3 - 3
rescaled = 4, first[1] * e1, (first[2] - 1 * first[1]) * e1  # top rises by 1
second = 4, rescaled[1] + 1 + e2, rescaled[2] - 2 * e2  # terms 4 - 4 and 2 - 4
four = torch.tensor([1.0, 3.0, 4.0, 2.0], dtype=torch.float64)
total, weighted = (four - 4).exp().sum(), ((four - 4).exp() * (four - 4)).sum()
always(abs(second[1] - total) < 1e-12, "The folded total equals its definition.")
always(abs(second[2] - weighted) < 1e-12, "The folded weighted equals its definition.")
figures.fold([first, rescaled, second])

# %% [markdown]
# ### Build it yourself, in torch
#
# Top starts at −1e30 and not at −∞: if the first slice holds nothing but −∞, then −∞ − (−∞) is not a number. 0 · (−∞)
# is not a number either, so a term with p = 0 must add 0. The target's logit is stored when its slice is read.


# %%
def nothing_seen(rows, dtype, device):
    """The state before the first slice: top, total, weighted, target's logit, (rows,) each."""
    zeros = torch.zeros(3, rows, dtype=dtype, device=device)
    return torch.full_like(zeros[0], -1e30), *zeros


def my_fold(logits, places, state):
    """Update the state with one slice of logits.

    logits (rows, width). places (rows,): the target's column in this slice. If it is below 0 or at
    least `width`, the target is in another slice, and the state keeps its `target`.
    state: (top, total, weighted, target), (rows,) each; compute in top's dtype. Returns the new.
    Top begins at -1e30. A term with p = 0 adds 0 to weighted, also where its logit is -inf.
    """
    top, total, weighted, target = state
    logits = logits.to(top.dtype)
    here = (places >= 0) & (places < logits.shape[1])
    found = logits.gather(1, torch.where(here, places, 0)[:, None])[:, 0]
    highest = torch.maximum(top, logits.amax(1))  # watch: highest (rows,)
    rise, shifted = highest - top, logits - highest[:, None]
    p = shifted.exp()
    weighted = (weighted - rise * total) * (-rise).exp()
    weighted = weighted + (p * torch.where(p > 0, shifted, 0)).sum(1)
    total = total * (-rise).exp() + p.sum(1)
    return highest, total, weighted, torch.where(here, found, target)


def finish(state):
    """Log-probs, entropies and log-sum-exps, (rows,) each, of a state that has seen all slices."""
    top, total, weighted, target = state
    lse = top + total.log()
    return target - lse, total.log() - weighted / total, lse


# %% [markdown]
# Stop in `my_fold` at its first call: `highest` is the maximum of the first column alone.
#
# ### Checkpoint: minialign's `update_statistics`

# %%
logits = 5 * torch.randn(6, 1000, dtype=torch.float64, generator=generator).to(DEVICE)
targets = torch.tensor([0, 1, 332, 333, 334, 999], device=DEVICE)
for width in (1, 333, 1000):
    state = nothing_seen(6, torch.float64, DEVICE)
    theirs = logprob.Statistics.empty(6, torch.float64, DEVICE)
    for start in range(0, 1000, width):
        part = logits[:, start : start + width]
        state = my_fold(part, targets - start, state)
        logprob.update_statistics(part, targets - start, theirs)
    found = finish(state)
    message = f"In slices of {width}, my_fold must equal minialign's update_statistics."
    expected = (theirs.target - theirs.lse(), theirs.entropy(), theirs.lse())
    equal(found, expected, atol=1e-12, rtol=0, msg=message)
    message = f"In slices of {width}, my_fold's log-sum-exp must equal torch's."
    equal(found[2], logits.logsumexp(1), msg=message)
print("in slices of 1, 333 and 1000: equal to minialign's, and to torch.logsumexp")

# %% [markdown]
# ## 5. The log-prob kernel
#
# Now put sections 3 and 4 together: the loop of `my_row_sum` with the body of `my_fold`. The kernel has one row, so
# top, total and weighted are single numbers. They stay in registers until the row is done. Most lines are those of
# `my_fold` in Triton's words:
#
# | `my_fold`, torch, for all rows | the kernel, Triton, for one row |
# | --- | --- |
# | `logits.to(top.dtype)` | `tl.load(at, mask=…, other=…).to(tl.float32) * scale` |
# | `torch.maximum(top, logits.amax(1))` | `tl.maximum(top, tl.max(z, 0))` |
# | `shifted.exp()` | `tl.exp(shifted)` |
# | `torch.where(p > 0, shifted, 0)` | `tl.where(p > 0, shifted, 0.0)` |
# | `p.sum(1)` | `tl.sum(p, 0)` |
# | `logits.gather(1, places)` | `tl.load` at the target's own address, once, after the loop |
#
# Stop at its first call: `p` has 1024 lanes, and the last 24 are 0.


# %%
@triton.jit
def my_logprob_kernel(
    logits, targets, logps, entropies, stride, width, scale, BLOCK: tl.constexpr
):
    """Program r writes the log-prob of targets[r] and the entropy of row r, after one pass over it.

    The arguments are addresses, the stride between rows, the width of a row, and scale = 1 / tau:
    a logit times `scale` is z. Masked lanes must count as z = -inf. Start top at -1e30.
    """
    row = tl.program_id(0).to(tl.int64)
    top, total, weighted = -1e30, 0.0, 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = logits + row * stride + column
        z = tl.load(at, mask=column < width, other=-float("inf")).to(tl.float32) * scale
        highest = tl.maximum(top, tl.max(z, 0))
        rise, shifted = highest - top, z - highest
        p = tl.exp(shifted)  # watch: p (BLOCK,)
        weighted = (weighted - rise * total) * tl.exp(-rise)
        weighted += tl.sum(p * tl.where(p > 0, shifted, 0.0), 0)
        total = total * tl.exp(-rise) + tl.sum(p, 0)
        top = highest
    target = tl.load(logits + row * stride + tl.load(targets + row)).to(tl.float32) * scale
    tl.store(logps + row, target - top - tl.log(total))
    tl.store(entropies + row, tl.log(total) - weighted / total)


def launch(logits, targets, tau=1.0, block=1024):
    """logits (rows, V), targets (rows,) -> log-probs and entropies, (rows,) each, by the kernel."""
    logps, entropies = torch.empty(2, len(logits), device=logits.device)
    my_logprob_kernel[(len(logits),)](
        logits, targets, logps, entropies, logits.stride(0), logits.shape[1], 1 / tau, BLOCK=block
    )
    return logps, entropies


# %% [markdown]
# ### Checkpoint: torch, and minialign's kernel
#
# The logits are stored in bfloat16, and τ is 0.7. Each row is read in one block, then in four.

# %%
stored = logits.bfloat16()
expected = line_by_line(stored, targets, 0.7)
for block in (1024, 256):
    found = launch(stored, targets, 0.7, block)
    message = f"In blocks of {block}, my_logprob_kernel must equal line_by_line of section 1."
    equal(found, expected, atol=1e-4, rtol=0, msg=message)
if logprob.kernels() is not None:  # None without Triton
    theirs = logprob.Statistics.empty(6, torch.float32, DEVICE)
    logprob.kernels().update_statistics(stored, targets, theirs, 0.7, True)  # tau; with entropy
    expected = (theirs.target - theirs.lse(), theirs.entropy())
    message = "my_logprob_kernel must equal minialign's kernel."
    equal(found, expected, atol=1e-4, rtol=0, msg=message)
print("the kernel equals line_by_line, and minialign's kernel")

# %% [markdown]
# ## What is wrong here? (1)
#
# Somebody writes the product with the head the other way round, `(head @ hidden.T).T`. The logits are the same, no
# error is raised, and the log-probs are wrong. Why?

# %%
hidden = torch.randn(6, 16, generator=generator).to(DEVICE)
head = torch.randn(1000, 16, generator=generator).to(DEVICE)
one, other = hidden @ head.T, (head @ hidden.T).T
print("the same logits:", torch.allclose(one, other, atol=1e-4))
print("log-probs of one  ", launch(one, targets)[0].tolist()[:3])
print("log-probs of other", launch(other, targets)[0].tolist()[:3])

# %% [markdown]
# ## What is wrong here? (2)
#
# Many trainers give a token that is not scored the target −100, and leave its log-prob out of the mean with the
# [mask](../GLOSSARY.md#mask). The mean is right, and no error is raised. Why is this still a bug?

# %%
marked = targets.clone()
marked[2] = -100
logps = launch(one, marked)[0]
print("mean of the scored tokens", logps[marked >= 0].mean().item())
print("log-prob of target -100  ", logps[2].item())

# %% [markdown]
# ## 6. Test on irregular sizes
#
# Which tests does a kernel need? One round size alone shows little. So test other sizes, logits of −∞, a whole block of
# them, and logits near 1000. Compare with float64, computed from the same numbers.


# %%
def case(v, rows=5, dtype=torch.float32, offset=0.0):
    """Random logits (rows, v) and targets. Spare memory lies behind the last row, for the break."""
    generator = torch.Generator().manual_seed(v)
    memory = 5 * torch.randn(rows * v + 1024, generator=generator) + offset
    targets = torch.randint(v, (rows,), generator=generator)
    return memory.to(dtype).to(DEVICE)[: rows * v].view(rows, v), targets.to(DEVICE)


def exact(logits, targets):
    """Log-probs and entropies in float64."""
    log_p = logits.double().log_softmax(1)
    entropies = torch.special.entr(log_p.exp()).sum(1)
    return torch.stack([log_p.gather(1, targets[:, None])[:, 0], entropies])


cases = {f"V = {v}": case(v, dtype=torch.bfloat16) for v in (7, 1000, 4096, 5003)}
late = torch.tensor([1501, 2000, 3001, 4000, 5002], device=DEVICE)  # targets whose logit is finite
cases["every third logit -inf"] = case(5003)[0], late
cases["every third logit -inf"][0][:, ::3] = -torch.inf
cases["the first 1500 logits -inf"] = case(5003)[0], late
cases["the first 1500 logits -inf"][0][:, :1500] = -torch.inf
cases["logits near 1000"] = case(5003, offset=1000.0)
for name, (z, y) in cases.items():
    error = (torch.stack(launch(z, y)).double() - exact(z, y)).abs().max().item()
    print(f"{name:28} largest error {error:.1e}")
    always(error < 1e-4, f"my_logprob_kernel is right to 1e-4 in the case: {name}.")

# %% [markdown]
# ## Break it: which size shows which bug?
#
# Two bugs are common. **No mask**: the last block reads on into the next row. **No rescale**: the old total is not
# multiplied by $e^{-\text{rise}}$ when the maximum rises. Before you run the cell: which of them does V = 4096 show?
# A ✗ marks an error above 1e-4.


# %%
@triton.jit
def breakable(
    logits, lse, stride, width, MASK: tl.constexpr, RESCALE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    top, total = -1e30, 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = logits + row * stride + column
        if MASK:
            z = tl.load(at, mask=column < width, other=-float("inf"))
        else:
            z = tl.load(at)
        highest = tl.maximum(top, tl.max(z, 0))
        if RESCALE:
            total = total * tl.exp(top - highest)
        total += tl.sum(tl.exp(z - highest), 0)
        top = highest
    tl.store(lse + row, top + tl.log(total))


variants = {"right": (True, True), "no mask": (False, True), "no rescale": (True, False)}
SIZES, ROW_COUNT, errors = (7, 1000, 4096, 5003), 16, {}
print("error of a log-prob " + "".join(f"V = {v:<9}" for v in SIZES))
for name, (mask, rescale) in variants.items():
    errors[name] = []
    for v in SIZES:
        z, y = case(v, ROW_COUNT)
        lse = torch.empty(ROW_COUNT, device=DEVICE)
        breakable[(ROW_COUNT,)](z, lse, v, v, MASK=mask, RESCALE=rescale, BLOCK=1024)
        logps = z.gather(1, y[:, None])[:, 0] - lse  # watch: logps (ROW_COUNT,)
        errors[name].append((logps - exact(z, y)[0]).abs().max().item())
    marks = (f" {error:8.1e} {'✗' if error > 1e-4 else ' '}  " for error in errors[name])
    print(f"{name:18}" + "".join(marks))

always(max(errors["right"]) < 1e-4, "The kernel with mask and rescale is right at every size.")
this_run(errors["no mask"][2] < 1e-4, "4096 = 4 * 1024 hides the missing mask.")
this_run(max(errors["no rescale"][:2]) < 1e-4, "One single block hides the missing rescale.")
this_run(min(errors["no mask"][k] for k in (0, 1, 3)) > 0.01, "Other sizes show the missing mask.")
this_run(min(errors["no rescale"][2:]) > 0.01, "More than one block shows the missing rescale.")

# %% [markdown]
# V = 4096 hides the missing mask, and V = 1000 hides the missing rescale. 5003 shows both: it is a prime, and larger
# than a block.
#
# ## 7. Logits that never exist
#
# The kernel is done; take a break here. What follows needs only `my_fold`. The kernel saves traffic, not memory: it
# still needs all logits, 2.1 GB in section 1, and float32 copies for the gradients. But `my_fold` takes *slices* of the
# vocabulary. So compute one slice of logits, fold it into the state, and drop it. For the gradient, compute each slice
# again, at the price of one more product. Only lse and entropy of each row are kept.
#
# With $g_\ell$ and $g_H$ the gradients that arrive at a row's log-prob and entropy, the gradient for $z_i$ is
#
# $$g_\ell\,(1[i = y] - p_i) \;-\; g_H\,p_i\,(\log p_i + \text{entropy}),$$
#
# where $1[i = y]$ is 1 for the target and 0 elsewhere. The first part is the gradient of $z_y - \mathrm{lse}$:
# $\partial\, \mathrm{lse}/\partial z_i = p_i$. Exercise 2 derives the second. (Below, τ = 1.)


# %%
def my_slice_gradient(logits, places, lse, entropies, g_logps, g_entropies):
    """The gradient with respect to one slice of logits, (rows, width).

    logits (rows, width), places (rows,) as in my_fold. The others are (rows,): log-sum-exp and
    entropy of the whole row, and the gradients that arrive at its log-prob and at its entropy.
    Where p = 0, also for a logit of -inf, the entropy's part of the gradient is 0.
    """
    log_p = logits - lse[:, None]  # watch: log_p (rows, width)
    p = log_p.exp()
    log_p = torch.where(p > 0, log_p, 0)  # 0 * -inf is not a number
    columns = torch.arange(logits.shape[1], device=logits.device)
    is_target = (columns == places[:, None]).to(p.dtype)
    first = g_logps[:, None] * (is_target - p)
    return first - g_entropies[:, None] * p * (log_p + entropies[:, None])


# %% [markdown]
# ### Checkpoint: autograd, on two slices, with one logit of −∞

# %%
z = logits.clone()
z[:, 5] = -torch.inf
z.requires_grad_()
upstream = torch.randn(2, 6, dtype=torch.float64, generator=generator).to(DEVICE)
log_p = z.log_softmax(1)
p = log_p.exp()
logps = log_p.gather(1, targets[:, None])[:, 0]
entropies = -(p * torch.where(p > 0, log_p, 0)).sum(1)
loss = (logps * upstream[0]).sum() + (entropies * upstream[1]).sum()
(expected,) = torch.autograd.grad(loss, z)
z, entropies = z.detach(), entropies.detach()
found = [
    my_slice_gradient(z[:, part], targets - part.start, z.logsumexp(1), entropies, *upstream)
    for part in (slice(0, 333), slice(333, 1000))
]
message = "my_slice_gradient must equal autograd."
equal(torch.cat(found, 1), expected, atol=1e-12, rtol=0, msg=message)
print("my_slice_gradient equals autograd")


# %% [markdown]
# The forward pass is a loop over slices of the head, and so is the backward pass. With `torch.autograd.Function` one
# writes a backward pass by hand: `ctx` keeps what `backward` needs, `upstream` are the gradients of the two results,
# and `backward` returns a gradient for each argument of `forward`, or None. `InSlices.apply(…)` calls it. A slice of
# logits is `hidden @ part.T`. So every slice adds `d @ part` to the gradient of `hidden`, and its own rows of `d_head`
# are `d.T @ hidden`.


# %%
class InSlices(torch.autograd.Function):
    """hidden (rows, C), head (V, C), targets (rows,) -> log-probs and entropies, (rows,) each."""

    @staticmethod
    def forward(ctx, hidden, head, targets, width):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        state = nothing_seen(len(hidden), wide, hidden.device)
        for start in range(0, len(head), width):
            part = head[start : start + width].to(wide)
            state = my_fold(hidden.to(wide) @ part.T, targets - start, state)
        logps, entropies, lse = finish(state)
        ctx.save_for_backward(hidden, head, targets, lse, entropies)
        ctx.width = width
        return logps, entropies

    @staticmethod
    def backward(ctx, *upstream):
        hidden, head, targets, lse, entropies = ctx.saved_tensors
        wide = hidden.to(lse.dtype)
        d_hidden, d_head = torch.zeros_like(wide), torch.empty_like(head)
        for start in range(0, len(head), ctx.width):
            part = head[start : start + ctx.width].to(wide.dtype)
            again, places = wide @ part.T, targets - start
            d = my_slice_gradient(again, places, lse, entropies, *upstream)
            d_hidden += d @ part  # watch: d_hidden (rows, C)
            d_head[start : start + ctx.width] = d.T @ wide
        return d_hidden.to(hidden.dtype), d_head, None, None


# %%
def problem(rows, channels, v, dtype):
    """hidden (rows, C), head (V, C), targets (rows,), upstream gradients (2, rows)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, channels, generator=generator).to(DEVICE, dtype).requires_grad_()
    head = torch.randn(v, channels, generator=generator) * 3 / channels**0.5
    head = head.to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(v, (rows,), generator=generator).to(DEVICE)
    return hidden, head, targets, torch.randn(2, rows, generator=generator).to(DEVICE)


def all_logits(hidden, head, targets):
    """What most trainers do. Returns the bfloat16 logits too, so that they stay in memory."""
    model_output = hidden @ head.T
    log_p = model_output.float().log_softmax(1)
    return log_p.gather(1, targets[:, None])[:, 0], model_output


def forward_backward(body, hidden, head, targets, upstream):
    """Log-probs and entropies, if the body gives them, then the gradients of hidden and head."""
    out = body(hidden, head, targets)
    results = [x for x in out if x.dim() == 1]
    loss = sum((a * b).sum() for a, b in zip(results, upstream[: len(results)], strict=True))
    return *(x.detach() for x in results), *torch.autograd.grad(loss, (hidden, head))


# %% [markdown]
# ### Checkpoint: autograd with all logits, and minialign's `LinearLogps`

# %%
inputs = problem(50, 16, 700, torch.float64)
mine = forward_backward(lambda h, w, y: InSlices.apply(h, w, y, 300), *inputs)
for name, body in (
    ("autograd", lambda h, w, y: naive_logps(h, w, y, 1.0, True)),  # tau; with entropies
    ("LinearLogps", lambda h, w, y: LinearLogps.apply(h, w, y, 1.0, True)),
):
    theirs = forward_backward(body, *inputs)
    message = f"InSlices, with my_fold and my_slice_gradient, must equal {name}."
    equal(mine, theirs, atol=1e-10, rtol=0, msg=message)
print("log-probs, entropies and both gradients: equal to autograd's and to minialign's")

# %% [markdown]
# ### Measure the memory
#
# `figures.peak_bytes` returns the most bytes that were alive at once in tensors made during a call. We count first:
#
# - `all_logits` has 14 bytes for each logit at its peak: 2 (bfloat16 logits) + 4 (log p, kept by autograd) + 8 (two
#   float32 gradients).
# - `InSlices` has at most nine float32 matrices of *one slice* at once, 36 bytes for each of its logits (most in
#   `my_slice_gradient`). This does not grow with V. Besides, it has the slice of the head in float32 and both
#   gradients.
#
# Dots in the figure are measured, lines are counted.

# %%
ROW_COUNT, CHANNELS, WIDTH, SIZES = 512, 64, 512, [2**k for k in range(11, 16)]
one_slice = 36 * ROW_COUNT * WIDTH + 4 * WIDTH * CHANNELS
gradients = [2 * v * CHANNELS + 8 * ROW_COUNT * CHANNELS for v in SIZES]  # head; hidden, twice
counted = {
    "all logits: 14 bytes each": [14 * ROW_COUNT * v / 2**20 for v in SIZES],
    "slices of the vocabulary": [(size + one_slice) / 2**20 for size in gradients],
}
bodies = all_logits, lambda h, w, y: InSlices.apply(h, w, y, WIDTH)
measured = {}
for name, body in zip(counted, bodies, strict=True):
    run = functools.partial(forward_backward, body)
    inputs = [problem(ROW_COUNT, CHANNELS, v, torch.bfloat16) for v in SIZES]
    measured[name] = [figures.peak_bytes(run, *some) / 2**20 for some in inputs]
    print(f"{name:26} MiB at the peak:", *(f"{x:6.1f}" for x in measured[name]))
    for a, b in zip(measured[name], counted[name], strict=True):
        always(abs(a / b - 1) < 0.05, f"{name}: the count must agree with the measurement to 5 %.")
figures.memory(SIZES, measured, counted)

# %% [markdown]
# With slices, only the gradient of the head grows with the vocabulary. The project does this in
# `minialign/kernels/linear_logprob.py`, with much larger slices on a GPU, because small products leave most of it
# idle. `python -m minialign.bench --gpu` times it on a GPU, beside its lower bounds.
#
# ## What you now know
#
# - A kernel runs as many programs. Each loads, computes in registers, and stores. Masks turn off lanes.
# - Count the bytes first. Work between matrix products is mostly limited by memory traffic.
# - Online softmax folds any slice of logits into three numbers, so the logits need not exist at the same time.
# - Test on irregular sizes and against float64. A kernel does not check its addresses: check inputs before the
#   launch.
#
# Next: [10b · Scale](10b_scale.ipynb), or [11 · A storyteller](11_storyteller.ipynb).
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes; try this). In `my_logprob_kernel`, masked lanes load −∞. Load 0 in their place, as
# in `my_row_sum`. What do you expect at V = 7, 1000 and 4096? Then run the cell of section 6 without its `always`.
#
# **Exercise 2** (medium, 15 minutes). Derive the gradient of the entropy, $-p_i(\log p_i + \text{entropy})$, from
# $\partial p_j/\partial z_i = p_j(1[i = j] - p_i)$.
#
# **Exercise 3** (hard, 20 minutes). Two programs have each seen one half of a row. Write `merge(one, other)` of their
# two states. Must the halves come in order? How can a GPU use that for few, very long rows?
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# The transposed matrix is not contiguous: its strides are (1, 6), but the kernel takes only the row stride and
# assumes that columns are 1 apart. So it reads the wrong numbers. The launcher must demand `stride(-1) == 1`.
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# The kernel loads the number 100 places before its row. It belongs to another row, or for row 0 to another tensor.
# The mean hides it, until the address lies outside the memory of the process. So check the targets, or pass scored
# tokens only, as minialign does.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def checked_launch(logits, targets, tau=1.0):
    """`launch`, after a check of what the kernel does not check."""
    always(logits.stride(-1) == 1, "A row's numbers lie side by side (or call .contiguous()).")
    inside = (targets >= 0) & (targets < logits.shape[1])
    always(bool(inside.all()), "Every target lies in 0 … V - 1.")
    return launch(logits, targets, tau)


refused = 0
for bad in ((other, targets), (one, marked)):
    try:
        checked_launch(*bad)
    except AssertionError as error:
        refused += 1
        print("refused:", error)
always(refused == 2, "checked_launch refuses the inputs of both puzzles.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# Each masked lane adds $e^{0 - \text{top}}$ to total. At V = 4096 no lane is masked and nothing changes. At V = 7
# there are 1017 such lanes and the error is large. At V = 1000 there are 24: the error is at the limit of the test.
# At V = 5003 the test passes. With logits near −1000 the masked lanes take all the probability: a case that section 6
# lacks.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
wrong = {}
for v, offset in ((7, 0.0), (1000, 0.0), (4096, 0.0), (5003, 0.0), (5003, -1000.0)):
    z, y = case(v, dtype=torch.bfloat16, offset=offset)
    zeros = torch.zeros(5, -v % 1024, device=DEVICE)  # what the masked lanes would hold
    wrong[v, offset] = (exact(torch.cat([z, zeros], 1), y) - exact(z, y)).abs().max().item()
    print(f"V = {v:4}, logits around {offset:6.0f}: off by {wrong[v, offset]:.1e}")
always(wrong[4096, 0.0] == 0, "At V = 4096 no lane is masked.")
this_run(wrong[5003, 0.0] < 1e-4 < wrong[7, 0.0], "V = 7 shows the error, V = 5003 does not.")
this_run(wrong[5003, -1000.0] > 900, "With logits near -1000 the zeros take all the probability.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# entropy = $-\sum_j p_j \log p_j$. Its derivative is $-\sum_j (\log p_j + 1)\, \partial p_j/\partial z_i$. The 1
# drops out, because $\sum_j \partial p_j/\partial z_i = 0$. Insert $\partial p_j/\partial z_i$:
#
# $$-p_i \log p_i + p_i \sum_j p_j \log p_j = -p_i(\log p_i + \text{entropy}) .$$
#
# </details>
#
# <details><summary>Exercise 3</summary>
#
# Rescale both states to the larger top, then add. The order does not matter. So several programs can take parts of
# one row at the same time and merge their states at the end. `linear_logprob_triton.py` does that.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def merge(one, other):
    """One state of two that have seen different slices of the same rows."""
    highest = torch.maximum(one[0], other[0])
    total = weighted = 0
    for top, part_total, part_weighted, _ in (one, other):
        rise = highest - top
        total = total + part_total * (-rise).exp()
        weighted = weighted + (part_weighted - rise * part_total) * (-rise).exp()
    return highest, total, weighted, one[3] + other[3]  # the half without the target holds 0


empty = nothing_seen(6, torch.float64, DEVICE)
one = my_fold(logits[:, :400], targets, empty)
other = my_fold(logits[:, 400:], targets - 400, empty)
expected = finish(my_fold(logits, targets, empty))
for merged in (merge(one, other), merge(other, one)):
    message = "merge of two halves must equal my_fold of the whole."
    equal(finish(merged), expected, atol=1e-12, rtol=0, msg=message)
print("merged in either order: equal")
