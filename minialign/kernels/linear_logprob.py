"""Hidden states and head in, log-prob and entropy out. At most one slice of the (N, V) logits exists at a time.

    z = h Wᵀ / tau (N, V)     lse = log Σ_v e^{z_v}     logp = z_y − lse     S = −Σ_v p_v log p_v,  p_v = e^{z_v − lse}
    dz_v = g (1[v = y] − p_v) − e p_v (log p_v + S)     dh = Σ_v dz_v W_v / tau     dW_v = Σ_n dz_v h_n / tau

Bytes in float32, N rows: naive autograd holds z, log p, their gradients (4 N V each; entropy adds two more), and dW (4 V C). This file
holds dW, dh and one slice, because it cuts z over the *vocabulary*, not over the rows:

    forward    reduces a slice to three numbers per row (max, Σ e^{z − max}, Σ e^{z − max}·(z − max)) and frees it:   2 N V C flops
    backward   computes the slice again, turns it into dz in place, and computes its part of dW with one product:     6 N V C flops
               dW[slice] = dzᵀ h is written once. Only dh is accumulated, (N, C) in float32.

Torch's, Liger's and TRL's linear losses cut over the rows instead. Then dW is a sum over chunks: it takes V x C more numbers in float32, or
it is rounded after each chunk.

The two passes over a slice are logprob.py's update_statistics and to_gradient. On a CPU a slice is small, so that it stays in cache. A GPU
needs large products. When no gradient is needed (a reference, old log-probs), a GPU needs no slice either: up to FUSED_UP_TO channels
the kernel of linear_logprob_triton.py reduces each tile of the product where it is computed.

Bytes moved in bfloat16 on a GPU, forward and backward, besides what the products read: 30 per logit (forward: write 4, read 4; backward:
write 4, read and write 8, round to bfloat16 6, read 2 for each of two products), and 16 N C per slice, where dh is added up in float32.
With these, lower bounds on one H200 (4.3 TB/s, 790 bfloat16 TFLOP/s) for N = 8192: Pythia-1.4B (C 2048, V 50304) 11.7 ms, of which 8.6 are
the products; Mistral-7B (4096, 32000) 13.0, of which 10.9; Llama-3-8B (4096, 128256) 51.9, of which 43.6. Nothing of this was measured.

Checked by tests/kernels/test_linear_logprob.py and tests/test_logps.py: against log_softmax in float64, finite differences, memory.
"""

import functools

import torch

from minialign.kernels.logprob import Statistics, to_gradient, update_statistics

SLICE_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}  # of float32 logits in one slice; dividing by N rows gives its width
# Most channels C for which the Triton kernel scores; above, slices do. The kernel saves 8 moved bytes per logit, which matter less in a
# wider model, but its products are slower than cuBLAS's. By arithmetic both take the same time at C = 2048 on an H200 if it reaches 74 % of
# cuBLAS's speed. No card has decided this yet: `python -m minialign.bench --gpu` prints both by C.
FUSED_UP_TO = 2048


def vocabulary_slices(n, vocab_size, device):
    """The vocabulary in slices of equal width: a multiple of 128, at least 256, and about SLICE_BYTES of float32 for n rows."""
    width = max(256, SLICE_BYTES.get(device.type, 2**26) // (4 * max(n, 1)) // 128 * 128)
    return [slice(start, min(start + width, vocab_size)) for start in range(0, vocab_size, width)]


def matmul_wide(a, b):
    """a @ b, summed and returned in at least float32. Not differentiable: on a GPU, bfloat16 goes into the tensor cores unconverted, by an
    operation without a gradient. Converting to float32 first would take some ten times as long and need a copy of both."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if a.is_cuda and a.dtype == b.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def logits_of(hidden, weight):
    """hidden (N, C), weight (V, C) -> (N, V) in at least float32. Not differentiable."""
    return matmul_wide(hidden, weight.T)


def fused_scorer(hidden, weight):
    """The Triton kernel that scores without logits, if both are bfloat16 or both float16, on CUDA, with Triton installed, and of at most
    FUSED_UP_TO channels. Else None."""
    suits = hidden.is_cuda and hidden.dtype == weight.dtype in (torch.bfloat16, torch.float16) and hidden.shape[1] <= FUSED_UP_TO
    return kernel() if suits else None


@functools.cache
def kernel():
    try:
        from minialign.kernels.linear_logprob_triton import fused_statistics
    except ImportError:  # macOS, Windows
        return None
    return fused_statistics


class LinearLogps(torch.autograd.Function):
    """hidden (N, C), weight (V, C), targets (N,) -> logps (N,), entropies (N,) (zeros if not asked for), float32 or wider.

    Saved for backward: the inputs, lse and entropies. Each backward pass computes the slices again, so a second one (retain_graph) is
    exact too. A frozen hidden or weight costs nothing, because its product is skipped.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, tau, entropy):
        statistics = Statistics.empty(len(hidden), torch.promote_types(hidden.dtype, torch.float32), hidden.device)
        for part in vocabulary_slices(len(hidden), len(weight), hidden.device):
            logits = logits_of(hidden, weight[part])  # (N, width)
            update_statistics(logits, targets - part.start, statistics, tau, entropy=entropy)
            del logits  # before the next slice: only one at a time exists
        lse = statistics.lse()
        entropies = statistics.entropy() if entropy else torch.zeros_like(lse)
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        ctx.tau = tau
        ctx.set_materialize_grads(False)
        return statistics.target - lse, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, e):
        if g is None and e is None:
            return None, None, None, None, None
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for part in vocabulary_slices(len(hidden), len(weight), hidden.device):
            logits = logits_of(hidden, weight[part])  # (N, width)
            to_gradient(logits, targets - part.start, lse, entropies, g, e, ctx.tau)
            dz = logits.to(hidden.dtype) if hidden.is_cuda else logits  # tensor cores need both factors in the same dtype
            if d_hidden is not None and dz.dtype == lse.dtype:
                d_hidden.addmm_(dz, weight[part].to(dz.dtype))
            elif d_hidden is not None:
                d_hidden += matmul_wide(dz, weight[part])
            if d_weight is not None and d_weight.dtype == dz.dtype:
                torch.mm(dz.T, hidden, out=d_weight[part])  # written once, into its place
            elif d_weight is not None:
                d_weight[part] = matmul_wide(dz.T, hidden)  # summed in float32, rounded once
            del logits, dz
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None


def chunked_logps(hidden, weight, targets, tau, entropy):
    """Runs LinearLogps. If no gradient is needed and the Triton kernel applies, runs that kernel, which stores no slice of logits."""
    score = fused_scorer(hidden, weight)
    if score is None or torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return LinearLogps.apply(hidden, weight, targets, tau, entropy)
    return fused_logps(score, hidden, weight, targets, tau, entropy)


def fused_logps(score, hidden, weight, targets, tau, entropy):
    """LinearLogps without gradient, by the Triton kernel `score`."""
    statistics = score(hidden, weight, targets, tau, entropy)
    lse = statistics.lse()
    return statistics.target - lse, statistics.entropy() if entropy else torch.zeros_like(lse)
