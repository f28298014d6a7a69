"""Hidden states and head in, log-prob and entropy out, and never more than a slice of the (N, V) logits between them.

    z = h Wᵀ / tau (N, V)     lse = log Σ_v e^{z_v}     logp = z_y − lse     S = −Σ_v p_v log p_v,  p_v = e^{z_v − lse}
    dz_v = g (1[v = y] − p_v) − e p_v (log p_v + S)     dh = Σ_v dz_v W_v / tau     dW_v = Σ_n dz_v h_n / tau

Bytes, float32, N rows: naive autograd holds z, log p, their gradients (4 N V each; entropy adds two more), and dW (4 V C). Here dW, dh
and one slice: z is cut over the *vocabulary*, not over the rows. So

    forward    a slice is folded into three numbers a row (max, Σ e^{z − max}, Σ e^{z − max}·(z − max)) and forgotten:   2 N V C flops
    backward   a slice is made again, turned into dz in its own memory, and finishes its part of dW by one product:     6 N V C flops
               dW[slice] = dzᵀ h, written once. Only dh adds up, (N, C) in float32.

Cut over rows instead (torch's, Liger's and TRL's linear losses), dW is the sum over the chunks: V x C more numbers in float32, and
rounded in between when it is not.

The two passes over a slice are logprob.py's fold and to_gradient. On a CPU a slice is small, so that it stays in cache; a GPU wants long
products. Where nothing asks for a gradient (a reference, old log-probs) a GPU needs no slice either: the kernel of linear_logprob_triton.py
folds the tiles of the product where they are made.

Floors of one H200 (4.3 TB/s, 790 bfloat16 TFLOP/s), N = 8192, forward and backward: Pythia-1.4B (C 2048, V 50304) 9.9 ms, of which the
products take 8.6; Llama-3-8B (4096, 128256) 47 and 43.6. The products are the bound.

Checked by tests/kernels/test_linear_logprob.py and tests/test_logps.py: against log_softmax in float64, finite differences, memory.
"""

import functools

import torch

from minialign.kernels.logprob import Statistics, to_gradient, update_statistics

SLICE_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}  # of float32 logits: the width of a slice is what N rows leave of it


def vocabulary_slices(n, vocab_size, device):
    """The vocabulary cut into [start, end) of equal width: a multiple of 128, at least 256, SLICE_BYTES of float32 for n rows."""
    width = max(256, SLICE_BYTES.get(device.type, 2**26) // (4 * max(n, 1)) // 128 * 128)
    return [slice(start, min(start + width, vocab_size)) for start in range(0, vocab_size, width)]


def matmul_wide(a, b):
    """a @ b, summed up and left in float32 at least. Not differentiable: bfloat16 goes into a GPU's tensor cores as it is, by an operation
    that has no gradient; widened first it would take some ten times as long, and a copy of both."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if a.is_cuda and a.dtype == b.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def logits_of(hidden, weight):
    """hidden (N, C), weight (V, C) -> (N, V) in float32 at least, for reading only."""
    return matmul_wide(hidden, weight.T)


def fused_scorer(hidden, weight):
    """The Triton kernel that scores without logits, where it runs: both bfloat16 or float16, on CUDA, Triton installed. Else None."""
    return kernel() if hidden.is_cuda and hidden.dtype == weight.dtype in (torch.bfloat16, torch.float16) else None


@functools.cache
def kernel():
    try:
        from minialign.kernels.linear_logprob_triton import fused_statistics
    except ImportError:  # macOS, Windows
        return None
    return fused_statistics


class LinearLogps(torch.autograd.Function):
    """hidden (N, C), weight (V, C), targets (N,) -> logps (N,), entropies (N,; zeros unless asked for), float32 or wider.

    Saved for backward: the inputs, lse and entropies. Each backward pass makes the slices again, so retain_graph is exact. A frozen hidden
    or weight costs nothing: its product is skipped.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, tau, entropy):
        statistics = Statistics.empty(len(hidden), torch.promote_types(hidden.dtype, torch.float32), hidden.device)
        for part in vocabulary_slices(len(hidden), len(weight), hidden.device):
            logits = logits_of(hidden, weight[part])  # (N, width)
            update_statistics(logits, targets - part.start, statistics, tau, entropy=entropy)
            del logits  # before the next are made: one slice at a time
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
            dz = logits.to(hidden.dtype) if hidden.is_cuda else logits  # tensor cores take what is as narrow as the other factor
            if d_hidden is not None and dz.dtype == lse.dtype:
                d_hidden.addmm_(dz, weight[part].to(dz.dtype))
            elif d_hidden is not None:
                d_hidden += matmul_wide(dz, weight[part])
            if d_weight is not None and d_weight.dtype == dz.dtype:
                torch.mm(dz.T, hidden, out=d_weight[part])  # into its place, and final
            elif d_weight is not None:
                d_weight[part] = matmul_wide(dz.T, hidden)  # summed in float32, rounded once
            del logits, dz
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None


def chunked_logps(hidden, weight, targets, tau, entropy):
    """LinearLogps; or, where nobody asks for a gradient and there is a kernel for it, scores without a slice of logits."""
    score = fused_scorer(hidden, weight)
    if score is None or torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return LinearLogps.apply(hidden, weight, targets, tau, entropy)
    statistics = score(hidden, weight, targets, tau, entropy)
    lse = statistics.lse()
    return statistics.target - lse, statistics.entropy() if entropy else torch.zeros_like(lse)
