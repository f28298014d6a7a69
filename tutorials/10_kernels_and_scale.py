# %% [markdown]
# # 10 · Kernels and scale: count the bytes, then move them once
#
# **You will hold** log-prob, entropy and gradients that never make the $(N, V)$ logits, in 30 lines of torch; their inner loop as a GPU
# kernel of 20 lines, run here by an interpreter; and three habits: count before you write, test on irregular shapes, compare times only
# within a round. Everything is proved equal to the project's.
#
# **Minutes:** 45 to read, under 30 seconds of CPU to run. **You need:** tutorial 03 (log-probs, a first look at their memory), no GPU. The
# kernel cells need Triton, which is made for Linux; elsewhere they are skipped and say so.
#
# `N` scored tokens, `V` entries of the vocabulary, `C` channels. Lines marked `# watch: name (shape)` are good places for a breakpoint.

# %%
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels become Python, run on a CPU, and can be stepped through

# The project is not installed, it runs from its checkout: find the folder above this file (or above the notebook) that holds it.
ROOT = next(folder for folder in Path(globals().get("__file__", "here")).resolve().parents if (folder / "minialign").is_dir())
sys.path.insert(0, str(ROOT))

import matplotlib
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minialign import logps
from minialign.bench import cpu as bench
from minialign.kernels import logprob
from minialign.kernels.linear_logprob import LinearLogps

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    print("Triton is not installed: the kernels are skipped")

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # a script draws into a file: no window to close, no screen needed
import matplotlib.pyplot as plt

# %% [markdown]
# ## The question
#
# A policy of $C = 4096$ channels turns $N = 8192$ tokens into as many hidden states: 64 MiB in bfloat16. Then comes the head, one more
# product, and each token becomes $V = 128256$ logits: the largest tensor of a training step. Of each row we want two numbers, the log-prob
# $\log p_y$ of the token that was written and the entropy $S$. **What does it cost to make the logits, what does it cost to look at them,
# and must they ever be there?**
#
# $$z = \frac{h W^\top}{\tau}, \qquad \mathrm{lse} = \log \sum_v e^{z_v}, \qquad \log p_v = z_v - \mathrm{lse}, \qquad
#   S = -\sum_v p_v \log p_v .$$
#
# ## Count bytes
#
# What is *alive* at the worst moment decides whether a step runs. What is *moved* decides how long it takes. The usual mixed-precision
# trainer writes bfloat16 logits, widens them, and lets autograd do the rest. Bytes for each logit:

# %%
alive = {"bfloat16 logits, which the model returns": 2, "log p, kept by autograd": 4, "gradients of log p and of the wide logits": 8}
moved = {"widen: read 2, write 4": 6, "divide by tau: read, write": 8, "log_softmax: read for the max, read, write": 12,
         "p = exp(log p): read, write": 8, "p times log p: read two, write": 12, "sum: read": 4}
assert sum(alive.values()) == 14 and sum(moved.values()) == 50

N, V, C = 8192, 128256, 4096  # Llama-3-8B
print(f"hidden states {2 * N * C / 1e9:.2f} GB, head {2 * V * C / 1e9:.2f} GB, alive between them {14 * N * V / 1e9:.1f} GB")
assert round(14 * N * V / 1e9, 1) == 14.7  # to give back 2 · 8192 numbers

# %% [markdown]
# Does the moving take the time, or the multiplying? A **roofline** answers without running anything: no pass is faster than its bytes /
# bandwidth, nor than its flops (floating-point operations) / rate. The larger of the two is its floor, and says what bounds it. The
# ceilings here are those of one H200: 4.3 TB/s, and 790 TFLOP/s in bfloat16 products. (Other arithmetic is slower; at a tenth of that rate
# the table reads the same.)

# %%
BANDWIDTH, RATE = 4.3e12, 790e12
factors = 2 * (N * C + V * C)  # bytes of h and W; for exp, max and sums ten flops a logit are allowed
passes = {  # name: (bytes it must move, flops)
    "logits: one product": (factors + 2 * N * V, 2 * N * V * C),
    "log-prob and entropy, line by line": (50 * N * V, 10 * N * V),
    "log-prob and entropy, one pass": (2 * N * V, 10 * N * V),
    "gradient over the logits, in place": (4 * N * V, 10 * N * V),
    "gradients of h and W: two products": (2 * factors + 4 * N * V, 4 * N * V * C),
}
floor = {}
print(f"{'floor in milliseconds by':>36}    bytes    flops   flops a byte   bound by   (balance: {RATE / BANDWIDTH:.0f} flops a byte)")
for name, (size, flops) in passes.items():
    by_bytes, by_flops = 1e3 * size / BANDWIDTH, 1e3 * flops / RATE
    floor[name] = max(by_bytes, by_flops)
    print(f"{name:>36} {by_bytes:8.2f} {by_flops:8.2f} {flops / size:14.1f}   {'memory' if by_bytes > by_flops else 'products'}")
assert round(8e3 * N * V * C / RATE, 1) == 43.6  # a forward and backward pass that makes the logits twice: its products
assert all(10 * passes[name][1] / RATE < passes[name][0] / BANDWIDTH for name in list(passes)[1:4])
assert floor["log-prob and entropy, line by line"] > floor["logits: one product"] > 20 * floor["log-prob and entropy, one pass"]

# %% [markdown]
# Read line by line, the logits cost more to look at than to make. The products are bound by arithmetic, and a library does them well:
# leave them alone. What sits between them is bound by memory, and there a kernel wins by **moving less**: 2 bytes a logit, not 50.
#
# ## The naive body, measured
#
# A count wants to be measured once. All torch operations pass through a dispatcher, and a *dispatch mode* may watch. This one keeps weak
# references to the storages that come out and adds up those still alive. (Scratch memory inside one operation it does not see.)


# %%
class Meter(TorchDispatchMode):
    """The most bytes alive at once of what was made under it; what is `given` was there before and does not count."""

    def __init__(self, *given):
        super().__init__()
        self.given, self.alive, self.peak = {x.untyped_storage().data_ptr() for x in given}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if torch.is_tensor(x)):
            if storage.data_ptr() not in self.given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def problem(n, c, v, dtype):
    """hidden (N, C) and weight (V, C) whose logits have standard deviation 3, targets (N,), and upstream gradients (2, N)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, c, generator=generator), torch.randn(v, c, generator=generator) * 3 / c**0.5
    targets, upstream = torch.randint(v, (n,), generator=generator), torch.randn(2, n, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, upstream


def trainer(hidden, weight, targets):
    logits = hidden @ weight.T  # watch: logits (N, V), which the model returns, so they live on
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0], logits


def peak(body, hidden, weight, targets, upstream):
    """Bytes alive at the peak of a forward and backward pass, gradients of hidden and weight included."""
    with Meter(hidden, weight, targets, upstream) as meter:
        out = body(hidden, weight, targets)
        loss = (out[0] * upstream[0]).sum() + ((out[1] * upstream[1]).sum() if out[1].dim() == 1 else 0)
        torch.autograd.grad(loss, (hidden, weight))
    return meter.peak


for v in (2048, 8192):
    measured = peak(trainer, *problem(512, 64, v, torch.bfloat16))
    print(f"V {v:5}: {measured / 2**20:6.2f} MiB measured, {14 * 512 * v / 2**20:6.2f} counted")
    assert abs(measured / (14 * 512 * v) - 1) < 0.01

# %% [markdown]
# ## Online softmax: three numbers a row
#
# To read a row once, slice by slice, we need numbers into which one more slice can be folded. Three will do; the maximum is there to keep
# the others small (in float32 $e^{89}$ is infinite):
#
# $$m = \max_v z_v, \qquad a = \sum_v e^{z_v - m}, \qquad b = \sum_v e^{z_v - m} (z_v - m), \qquad
#   \mathrm{lse} = m + \log a, \qquad S = \log a - \frac{b}{a}.$$
#
# When a slice moves the maximum up by $\delta$, the old terms must be measured from there: each exponential shrinks by $e^{-\delta}$,
# and each $z_v - m$ falls by $\delta$. So $a \to e^{-\delta} a$ and $b \to e^{-\delta} (b - \delta a)$. By hand, with logits 1, 3 and
# then 4, 2:

# %%
row = torch.tensor([1.0, 3.0, 4.0, 2.0], dtype=torch.float64)
e = torch.e
m, a, b = 3, e**-2 + 1, -2 * e**-2  # terms 1 − 3 and 3 − 3
print(f"first slice    m {m}   a {a:.6f}   b {b:.6f}")
m, a, b = 4, a / e, (b - 1 * a) / e  # δ = 1
print(f"rescaled       m {m}   a {a:.6f}   b {b:.6f}")
a, b = a + 1 + e**-2, b - 2 * e**-2  # terms 4 − 4 and 2 − 4
print(f"second slice   m {m}   a {a:.6f}   b {b:.6f}")
torch.testing.assert_close([a, b], [(row - 4).exp().sum().item(), ((row - 4).exp() * (row - 4)).sum().item()], atol=1e-12, rtol=0)

# %% [markdown]
# ### Build it yourself
#
# The maximum starts very low but *finite*: from $-\infty$, a first slice of nothing but $-\infty$ would give $-\infty - (-\infty)$, not a
# number. For the same reason a term with $p = 0$ is not multiplied by its $-\infty$. The target's logit is caught as its slice passes.


# %%
def nothing_seen(n, dtype):
    return torch.full((n,), -1e30, dtype=dtype), *torch.zeros(3, n, dtype=dtype)


def my_fold(logits, places, state):
    """logits (N, W), one slice; places (N,) of the targets in it, outside 0 … W − 1 if elsewhere. Returns the new state."""
    top, total, weighted, target = state
    within = (0 <= places) & (places < logits.shape[1])
    target = torch.where(within, logits.gather(1, torch.where(within, places, 0)[:, None])[:, 0].to(top.dtype), target)
    highest = torch.maximum(top, logits.to(top.dtype).amax(1))  # watch: highest (N,)
    shifted = logits.to(top.dtype) - highest[:, None]
    p, rescale = shifted.exp(), (top - highest).exp()
    weighted = (weighted - (highest - top) * total) * rescale + (p * torch.where(p > 0, shifted, 0)).sum(1)
    return highest, total * rescale + p.sum(1), weighted, target


def finish(state):
    top, total, weighted, target = state
    lse = top + total.log()
    return target - lse, total.log() - weighted / total, lse  # log-prob, entropy, log-sum-exp


def in_slices(logits, targets, width):
    state = nothing_seen(len(logits), torch.promote_types(logits.dtype, torch.float32))
    for start in range(0, logits.shape[1], width):
        state = my_fold(logits[:, start : start + width], targets - start, state)
    return finish(state)


# %% [markdown]
# ### Checkpoint: the definition, and minialign's `update_statistics`

# %%
logits = 5 * torch.randn(6, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
targets = torch.tensor([0, 1, 332, 333, 334, 999])
for width in (1, 333, 1000):
    my_logps, my_entropies, my_lse = in_slices(logits, targets, width)
    theirs = logprob.Statistics.empty(6, torch.float64, logits.device)
    for start in range(0, 1000, width):
        logprob.update_statistics(logits[:, start : start + width], targets - start, theirs)
    torch.testing.assert_close(my_lse, logits.logsumexp(1), atol=1e-12, rtol=0)
    torch.testing.assert_close(my_entropies, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-12, rtol=0)
    torch.testing.assert_close((my_logps, my_entropies), (theirs.target - theirs.lse(), theirs.entropy()), atol=1e-12, rtol=0)
print("in slices of 1, 333 and 1000: equal to logsumexp, to the entropy, and to minialign's update_statistics")

# %% [markdown]
# ## The gradient, with nothing kept
#
# A slice that was forgotten can be made again, by one more product. Its gradient then needs only $\mathrm{lse}$ and $S$ of each row. With
# upstream gradients $g$ of the log-prob and $e$ of the entropy, any numbers for each token,
#
# $$\frac{\partial \log p_y}{\partial z_v} = 1[v = y] - p_v, \qquad \frac{\partial S}{\partial z_v} = -p_v (\log p_v + S), \qquad
#   dz_v = g\,(1[v = y] - p_v) - e\,p_v (\log p_v + S).$$
#
# The second: $dS = -\sum_u (\log p_u + 1)\, dp_u$ with $dp_u = p_u (1[u = v] - p_v)\, dz_v$, and the $1$ drops out, as $\sum_u dp_u = 0$.


# %%
class MyLinearLogps(torch.autograd.Function):
    """hidden (N, C), weight (V, C), targets (N,) -> log-probs and entropies (N,), by slices of the vocabulary."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, width):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        state = nothing_seen(len(hidden), wide)
        for start in range(0, len(weight), width):
            state = my_fold(hidden.to(wide) @ weight[start : start + width].to(wide).T, targets - start, state)
        ctx.width, (logps, entropies, lse) = width, finish(state)
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, g, e):
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        h = hidden.to(lse.dtype)
        d_hidden, d_weight = torch.zeros_like(h), torch.empty_like(weight)
        for start in range(0, len(weight), ctx.width):
            part = weight[start : start + ctx.width].to(lse.dtype)
            log_p = h @ part.T - lse[:, None]  # watch: log_p (N, width), made a second time
            p = log_p.exp()
            onehot = torch.arange(len(part)) == (targets - start)[:, None]
            dz = g[:, None] * (onehot.to(p.dtype) - p) - e[:, None] * p * (log_p + entropies[:, None])
            d_hidden += dz @ part  # a sum over the slices, but only (N, C)
            d_weight[start : start + ctx.width] = dz.T @ h  # these rows are finished, and rounded once
            del dz  # else it lives on while the next is made
        return d_hidden.to(hidden.dtype), d_weight, None, None


# %% [markdown]
# ### Checkpoint: autograd of the naive body, and minialign's `LinearLogps`

# %%
bodies = {
    "naive, autograd": lambda h, w, y: logps.naive_logps(h, w, y, 1.0, True),
    "yours, in slices": lambda h, w, y: MyLinearLogps.apply(h, w, y, 300),
    "minialign, chunked": lambda h, w, y: LinearLogps.apply(h, w, y, 1.0, True),
}


def forward_backward(body, hidden, weight, targets, upstream):
    out = torch.stack(body(hidden, weight, targets))  # watch: out (2, N)
    return out.detach(), *torch.autograd.grad((out * upstream).sum(), (hidden, weight))


results = {name: forward_backward(body, *problem(50, 16, 700, torch.float64)) for name, body in bodies.items()}
for name, result in results.items():
    torch.testing.assert_close(results["yours, in slices"], result, atol=1e-11, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
print("log-probs, entropies and both gradients: equal to autograd's and to minialign's")

# %% [markdown]
# ### Why slices of the vocabulary, not of the tokens?
#
# Both bound the memory. But $dW = \sum_n dz_n h_n^\top$ runs over *tokens*. A slice of the vocabulary is finished by one product over all
# tokens, summed in float32 inside. Chunks of tokens add to **all** of $dW$, again and again: in bfloat16, whose numbers have 8 significant
# bits, a grown sum swallows what is added; in float32 it is one more tensor, of $4 V C$ bytes (2.1 GB for Llama-3-8B).

# %%
generator = torch.Generator().manual_seed(0)
dz = (torch.rand(8192, 64, generator=generator) - 0.3).bfloat16()  # most tokens pull the same way
h = torch.rand(8192, 16, generator=generator).bfloat16()
exact, dw_error = dz.double().T @ h.double(), {}
for chunks in (1, 8, 64, 512):
    d_weight = torch.zeros(64, 16, dtype=torch.bfloat16)
    for rows in torch.arange(8192).chunk(chunks):
        d_weight += (dz[rows].float().T @ h[rows].float()).bfloat16()  # watch: d_weight (V, C), rounded after each chunk
    dw_error[chunks] = ((d_weight.double() - exact).norm() / exact.norm()).item()
    print(f"{chunks:4} chunks of tokens, added in bfloat16: dW off by {100 * dw_error[chunks]:5.2f} %")
assert dw_error[1] < 0.003 < 0.01 < dw_error[512]  # 1 chunk is what a slice of the vocabulary does

# %% [markdown]
# ## A kernel
#
# On a GPU each torch line of `my_fold` is a trip to memory. A kernel makes one: it is a program for *one row*, run for thousands at once.
#
# - **int64**: `row * stride` counts logits, and passes $2^{31}$ at row 16384 of 131072. A wrapped offset reads elsewhere without a word.
# - **Scalars** carry the three statistics. One for each lane (a column of the block) would each rescale by an exponential: twice as many.
# - **Mask**: a block is a power of two, a vocabulary is not. Lanes beyond the row's end load $-\infty$, and $e^{-\infty} = 0$ leaves max
#   and sums as they are. At $V = 128256$ these are 768 lanes of the last 1024.
# - **float32 at once**: bfloat16 is how logits are *stored*, not how we count.
# - **exp2**: $2^x$ is one instruction and $e^x = 2^{x \log_2 e}$ two. $\log_2 e$ goes with $1/\tau$ into `scale`, a multiplication that is
#   there anyway, and $\ln 2$ comes out once a row: one multiplication saved for each of a billion logits.
# - **One pass**: 2.1 GB in the place of 52.5, a floor of 0.49 ms in the place of 12.2.

# %%
if triton is not None:

    @triton.jit
    def my_kernel(logits, targets, logps_p, entropies_p, stride, width, scale, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        top, total, weighted = -1e30, 0.0, 0.0  # in units of log2
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + row * stride + column, mask=column < width, other=-float("inf")).to(tl.float32) * scale
            highest = tl.maximum(top, tl.max(z, 0))
            shifted = z - highest
            p, rescale = tl.exp2(shifted), tl.exp2(top - highest)
            weighted = (weighted - (highest - top) * total) * rescale + tl.sum(p * tl.where(p > 0, shifted, 0.0), 0)
            total = total * rescale + tl.sum(p, 0)
            top = highest
        target = tl.load(logits + row * stride + tl.load(targets + row)).to(tl.float32) * scale
        tl.store(logps_p + row, (target - top - tl.log2(total)) * 0.6931471805599453)
        tl.store(entropies_p + row, (tl.log2(total) - weighted / total) * 0.6931471805599453)


def run_my_kernel(logits, targets, tau=1.0):
    out, scale = torch.empty(2, len(logits)), 1.4426950408889634 / tau
    my_kernel[(len(logits),)](logits, targets, out[0], out[1], logits.stride(0), logits.shape[1], scale, BLOCK=1024)
    return out


# %% [markdown]
# ### Checkpoint: minialign's kernel
#
# It takes *slices* (it reads the statistics that earlier ones left, and writes them back). Otherwise you have just read it.

# %%
if triton is not None:
    theirs = logprob.Statistics.empty(6, torch.float32, logits.device)
    logprob.kernels().update_statistics(logits.bfloat16(), targets, theirs, 0.7, True)  # tau = 0.7
    expected = torch.stack([theirs.target - theirs.lse(), theirs.entropy()])
    torch.testing.assert_close(run_my_kernel(logits.bfloat16(), targets, tau=0.7), expected, atol=1e-5, rtol=0)
    print("your kernel and minialign's: equal")
assert torch.tensor(16384, dtype=torch.int32) * 131072 == -(2**31)  # int32 offsets: the row before the first
assert -V % 1024 == 768 and round(floor["log-prob and entropy, one pass"], 2) == 0.49 and round(50 * N * V / 1e9, 1) == 52.5

# %% [markdown]
# ## The irregular test
#
# A kernel that is right at $V = 4096$ has shown little. So: sizes that nothing divides, one smaller than a block, entries of $-\infty$, a
# whole slice of them, offsets that overflow an unshifted exponential, all the mass in one late block, targets at the edges. The reference
# is float64 on the *same stored numbers*, and a tolerance belongs to a number format: near 1000, float32 has steps of 6e-5.


# %%
def case(v, *, n=5, offset=0.0, dtype=torch.bfloat16, at=None, add=0.0):
    generator = torch.Generator().manual_seed(v)
    logits = torch.randn(n, v, generator=generator) * 5 + offset
    targets = torch.randint(v, (n,), generator=generator) if at is None else torch.tensor([1501, 2000, 3001, 4000, 5002])  # never hidden
    logits[:, at or slice(0)] += add
    return logits.to(dtype), targets


def float64(logits, targets):
    log_p = logits.double().log_softmax(1)
    return torch.stack([log_p.gather(1, targets[:, None])[:, 0], torch.special.entr(log_p.exp()).sum(1)])


cases = {f"V = {v}, bfloat16": case(v) for v in (7, 1000, 4096, 5003)}
cases["every third logit −∞"] = case(5003, at=slice(0, None, 3), add=-torch.inf)
cases["the first 1500 logits −∞"] = case(5003, at=slice(0, 1500), add=-torch.inf)
cases["all the mass in 4 columns"] = case(5003, at=slice(4096, 4100), add=60.0)
cases["targets at edges of blocks"] = case(5003)[0], torch.tensor([0, 1023, 1024, 4095, 5002])
cases["offset +1000, float32"], cases["offset −1000, float32"] = (case(5003, offset=x, dtype=torch.float32) for x in (1000, -1000))

print("largest error against float64    in torch" + "     kernel" * (triton is not None))
for name, (z, y) in cases.items():
    found = [torch.stack(in_slices(z, y, 1024)[:2]), *([run_my_kernel(z, y)] if triton is not None else [])]
    errors = [(x.double() - float64(z, y)).abs().max().item() for x in found]
    print(f"{name:28}" + "".join(f"   {error:8.1e}" for error in errors))
    assert max(errors) < (5e-4 if name.startswith("offset") else 2e-5), name

# %% [markdown]
# ## Break it on purpose
#
# Three errors that people make. A load **without a mask** reads on into the next row. A sum **without a rescale** still counts from an
# older maximum. And logits that were **rounded to bfloat16 before the softmax** are lost before the kernel begins (tutorial 03 has shown
# it on a head; here it competes).


# %%
def no_mask(z, y):
    beyond = z.roll(-1, 0).repeat(1, 1 + 1024 // z.shape[1])[:, : -z.shape[1] % 1024]  # what lies behind a row, up to the block's end
    return in_slices(torch.cat([z, beyond], 1), y, 1024)[0]


def no_rescale(z, y):
    state = nothing_seen(len(z), z.dtype)
    for start in range(0, z.shape[1], 1024):
        block = z[:, start : start + 1024]
        state = my_fold(block, y - start, (torch.maximum(state[0], block.amax(1)), *state[1:]))  # the max moves, the sums do not
    return finish(state)[0]


SIZES = (7, 1000, 4096, 5003)
variants = {"right": lambda z, y: in_slices(z, y, 1024)[0], "no mask": no_mask, "no rescale": no_rescale,
            "bfloat16 logits": lambda z, y: in_slices(z.bfloat16(), y, 1024)[0]}
errors = {name: [] for name in variants}
print("error of a log-prob  " + "".join(f"V = {v:<9}" for v in SIZES))
for name, variant in variants.items():
    for z, y in (case(v, n=64, dtype=torch.float32) for v in SIZES):
        error = (variant(z, y) - float64(z, y)[0]).abs()  # watch: error (N,)
        errors[name].append(error.max().item())
    print(f"{name:20}" + "".join(f" {x:8.1e} {' ' if x < 2e-5 else '✗'}  " for x in errors[name]))
print(f"bfloat16 logits: the ratio of a policy that has not moved is off by {100 * torch.expm1(error).mean():.1f} %")

assert max(errors["right"]) < 2e-5
assert min(errors["no mask"][k] for k in (0, 1, 3)) > 0.1 and errors["no mask"][2] < 2e-5  # 4 · 1024 hides it
assert min(errors["no rescale"][2:]) > 0.1 and max(errors["no rescale"][:2]) < 2e-5  # a single block hides it
assert min(errors["bfloat16 logits"]) > 0.01 and 0.01 < torch.expm1(error).mean() < 0.06

# %% [markdown]
# At $V = 4096$ nobody misses the mask, at $V = 1000$ nobody misses the rescale; 5003 is a good number. Rounded logits agree with any other
# code that rounds them: only float64 tells. Their noise lands on every ratio $e^{\log\pi - \log\pi_\text{old}}$ that PPO and GRPO clip.
#
# ## Benchmark
#
# Seconds alone say nothing: they measure the machine and its other guests along with the code. So the bodies run **in turn, round after
# round**; each is divided by the first *of its round*; reported are the median of these ratios, the least and the most. The **floor**
# stands beside them: the three products that nobody can leave out, bare. Nothing is asserted here, and your numbers will differ.

# %%
torch.set_num_threads(1)
bodies["yours, in slices"] = lambda h, w, y: MyLinearLogps.apply(h, w, y, 1024)
hidden, weight, y, upstream = problem(512, 128, 16384, torch.float32)


@torch.no_grad()
def bare_products():
    z = hidden @ weight.T
    return z @ weight, z.T @ hidden


contest = {name: lambda body=body: forward_backward(body, hidden, weight, y, upstream) for name, body in bodies.items()}
print("time over the naive body's   median   least    most")
for name, numbers in bench.ratios(bench.rounds_of(contest | {"floor: bare products": bare_products}, 5)).items():
    print(f"{name:26}" + "".join(f"{number:8.2f}" for number in numbers))

# %% [markdown]
# ## One figure: bytes and breaks
#
# Left, the peak of a forward and backward pass against $V$: dots are measured, lines counted. Yours holds $dW$, $dh$ in float32 with
# a wide copy of $h$, and of one slice its weights and six float32 matrices (and one of booleans). Right, the three breaks.

# %%
N, C, WIDTH, VOCABULARIES = 512, 64, 512, [2**k for k in range(10, 16)]
DARK, GOLD, LINE, BLUE = "#1b2a41", "#e0a030", "#d1495b", "#3a7ca5"
memory = {  # name: (body, its count, colour)
    "naive: 14 N V": (trainer, lambda v: 14 * N * v, LINE),
    "slices of the vocabulary": (lambda h, w, y: MyLinearLogps.apply(h, w, y, WIDTH),
                                 lambda v: 2 * v * C + 2 * 4 * N * C + 4 * WIDTH * C + (6 * 4 + 1) * N * WIDTH, BLUE),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), dpi=150)
for name, (body, count, colour) in memory.items():
    measured = [peak(body, *problem(N, C, v, torch.bfloat16)) / 2**20 for v in VOCABULARIES]
    counted = [count(v) / 2**20 for v in VOCABULARIES]
    print(f"{name:24} MiB measured", *(f"{x:6.2f}" for x in measured), "  counted", *(f"{x:6.2f}" for x in counted))
    assert all(abs(x / y - 1) < 0.02 for x, y in zip(measured, counted, strict=True))
    left.plot(VOCABULARIES, counted, color=colour)
    left.plot(VOCABULARIES, measured, "o", color=colour)
    left.annotate(name, (16384, counted[4]), xytext=(-12, 10), textcoords="offset points", ha="right", color=colour)
left.set(xscale="log", yscale="log", xlabel="vocabulary V", ylabel="MiB alive at the peak", ylim=(4, 400))
left.set_xticks(VOCABULARIES, VOCABULARIES)
left.set_yticks([4, 10, 40, 100, 400], [4, 10, 40, 100, 400])
left.minorticks_off()
left.set_title(f"Memory: dots measured, lines counted (N = {N}, C = {C})", fontsize=11, loc="left")

for k, (name, colour) in enumerate(zip(errors, (DARK, GOLD, LINE, BLUE), strict=True)):
    right.plot([x + 0.14 * (k - 1.5) for x in range(4)], errors[name], "o", color=colour, markersize=8, label=name)
right.axhline(2e-5, color=DARK, linewidth=0.8, linestyle=":")
right.text(3.45, 2.6e-5, "tolerance", ha="right", fontsize=9)
right.set(yscale="log", ylabel="largest error of a log-prob", ylim=(3e-7, 3e3), xlim=(-0.5, 3.5))
right.set_xticks(range(4), [f"V = {v}" for v in SIZES])
right.legend(frameon=False, ncols=4, loc="upper center", fontsize=9, handletextpad=0.1)
right.set_title("Three breaks: round sizes and small ones hide two of them", fontsize=11, loc="left")
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
path = Path("runs/tutorials/10_kernels_and_scale.png")  # below the folder you run from
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path)
if IN_NOTEBOOK:
    plt.show()
plt.close(figure)
print("figure:", path)

# %% [markdown]
# ## Scale: what changes on a GPU
#
# - **Long products.** A slice of 2 MiB stays in a CPU's cache; a GPU is filled by long products, so there it is 512 MiB (`SLICE_BYTES`).
# - **Tensor cores** take bfloat16 and sum in float32. `linear_logprob.matmul_wide` asks for that sum as it is: the logits are wide without
#   widening their factors, and the third break does not happen.
# - **Scoring without logits.** A reference and old log-probs need no gradient. `linear_logprob_triton.py` folds each tile of the product
#   in the registers where it was made: 12 bytes leave the chip for 128 logits, not 256.
# - **A recorded decode step.** A new token is some thirty launches a layer, and with few rows the launching takes longer than the work.
#   `Step` in `minialign/sample.py` records them as one graph and replays it. Its floor: weights and cache read once, 2.1 ms for 64 rows of
#   Pythia-1.4B at position 512.
# - **The floor of it all**, at the shape of the table above: 43.6 ms of products, forward and backward, and 47 with the passes between.
#
# `python -m minialign.bench --gpu` measures each of these on one card, beside its floor. Without the flag it measures the CPU.

# %% [markdown]
# ## Where to read on
#
# - `minialign/kernels/logprob.py` and `logprob_triton.py`: `update_statistics` and the gradient pass, each in torch and in Triton.
# - `minialign/kernels/linear_logprob.py`: your autograd function with a temperature and frozen inputs.
#   `minialign/logps.py` chooses between it and the naive body, which is faster while the logits are small.
# - `tests/kernels/`: irregular shapes, and kernels compiled for cards that are not there, to see that nothing spills out of registers.
# - Milakov and Gimelshein 2018, arXiv:1805.02867: the online softmax.
#
# ## Exercises
#
# **Exercise 1** (★☆☆, 5 minutes). Kept bfloat16 logits save the product of the backward pass. What share of all flops? Up to which $N$ do
# they take no more memory than the float32 $dW$ of the token cut?
#
# **Exercise 2** (★★☆, 15 minutes). Two programs have seen one half of a row each. Write `merge(one, other)` of two states. Must the halves
# come in order? What does that allow a GPU?
#
# **Exercise 3** (★★★, 20 minutes). A well-known trick makes $dh$ and $dW$ in the *forward* pass, with $g = 1$ (the loss being a sum of
# log-probs), and scales them in the backward pass: 6 in the place of $8 N V C$ flops, nothing kept. For which upstream gradients is it
# right? Show where it is wrong, and why only one of the two gradients can be mended.
#
# ---
#
# ## Solutions
#
# **Solution 1.** 6 instead of $8 N V C$: a quarter. $2 N V \le 4 V C$, so up to $N = 2 C$ tokens, whatever the vocabulary.

# %%
for c, v in ((2048, 50304), (4096, 128256)):
    assert 2 * (2 * c) * v == 4 * v * c and 2 * (2 * c + 1) * v > 4 * v * c
    print(f"C {c}, V {v}: up to {2 * c} tokens, {4 * v * c / 1e9:.1f} GB")

# %% [markdown]
# **Solution 2.** Both are rescaled to the larger maximum, then added: no order. So tiles of a row can go to programs that never wait for
# each other, and their numbers be added up at the end. That is how the scorer works; run it here on a tiny head.


# %%
def merge(one, other):
    highest = torch.maximum(one[0], other[0])
    parts = [(a * (m - highest).exp(), (b + (m - highest) * a) * (m - highest).exp()) for m, a, b, _ in (one, other)]
    return highest, parts[0][0] + parts[1][0], parts[0][1] + parts[1][1], one[3] + other[3]  # the half without the target holds 0


empty = nothing_seen(6, torch.float64)
one, other = my_fold(logits[:, :400], targets, empty), my_fold(logits[:, 400:], targets - 400, empty)
for merged in (merge(one, other), merge(other, one)):
    torch.testing.assert_close(finish(merged), in_slices(logits, targets, 1000), atol=1e-12, rtol=0)

if triton is not None:
    from minialign.kernels.linear_logprob_triton import fused_statistics

    small = [x.detach() for x in problem(5, 16, 300, torch.float32)[:3]]
    scored = fused_statistics(*small, 1.0, True)  # tau, entropy
    torch.testing.assert_close(scored.target - scored.lse(), MyLinearLogps.apply(*small, 300)[0], atol=1e-5, rtol=0)

# %% [markdown]
# **Solution 3.** Right when all tokens have the same $g$, as in a mean of log-probs. $dh_n$ belongs to one token: scale its row by $g_n$.
# But $dW$ is a sum over tokens, and once it is summed no number can weigh its terms. Advantages, masks of DPO pairs, KL penalties are
# different $g$ for each token; so minialign makes the logits again, or keeps them.

# %%
hidden, weight, y, (g, _) = problem(20, 8, 50, torch.float64)
dh, dw = torch.autograd.grad(logps.naive_logps(hidden, weight, y, 1.0, False)[0].sum(), (hidden, weight))  # with g = 1
for name, upstream in (("the same g", torch.full_like(g, 0.3)), ("a g of its own", g)):
    my_logps, _ = MyLinearLogps.apply(hidden, weight, y, 16)
    true_dh, true_dw = torch.autograd.grad((my_logps * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(dh * upstream[:, None], true_dh, atol=1e-12, rtol=0)
    best = (dw * true_dw).sum() / dw.square().sum()  # the best single factor
    gap = ((best * dw - true_dw).norm() / true_dw.norm()).item()
    print(f"{name:14} for each token: dW off by {100 * gap:.1f} %")
    assert gap < 1e-12 if name == "the same g" else gap > 0.3
