"""The one number that alignment needs: log π(y_t | x, y_<t) of tokens that are given. Every loss is arithmetic on it.

    logit_v = w_v · h / tau        logp = logit_y − log Σ_v e^{logit_v}        entropy = −Σ_v p_v log p_v

hidden h (N, C) and head W (V, C) go in; two numbers a token come out. The (N, V) matrix between them is the largest tensor of
most training steps, so there are two bodies that agree to rounding:

    naive     makes it, in float32, and lets autograd keep it: simplest, fastest while it is small
    chunked   makes `CHUNK_ROWS` rows of it at a time and again in the backward pass: no logits beyond one (chunk, V) piece

Statistics are float32 even when h and W are bfloat16: logits rounded to bfloat16 would put 1.5 to 6 % noise on every ratio.
Only scored positions enter: a prompt token costs nothing here.

Checked by tests/test_logps.py: against log_softmax, by finite differences, and against each other.
"""

import torch

CHUNK_ROWS = 1024  # rows of the logits alive at once in the chunked body
NAIVE_BYTES = 256 * 2**20  # below this many bytes of float32 logits the naive body is chosen


def token_logps(policy, batch, *, tau=1.0, entropy=False, embeds=None):
    """log π of each scored target under the policy's softmax(logits / tau), and 0 where mask is False. Autograd flows.

    batch: Batch with inputs, targets, mask (B, T). Returns logps (B, T), in nats, float32 or wider; with entropy=True also the
    entropy (B, T) of each scored prediction. embeds (B, T, C) are seen instead of those of the inputs.
    """
    mask = batch.mask
    hidden = policy.hidden(batch.inputs, embeds=embeds)  # (B, T, C)
    logps, entropies = linear_logps(hidden[mask], policy.head_weight, batch.targets[mask], tau=tau, entropy=entropy)  # (N,)
    full = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
    logps = full.masked_scatter(mask, logps)  # (B, T)
    return (logps, full.masked_scatter(mask, entropies)) if entropy else logps


def seq_logps(policy, batch):
    """log π(y|x), summed over each completion: (B,)."""
    return token_logps(policy, batch).sum(1)


def mean_logps(policy, batch):
    """log π(y|x) averaged over the tokens of each completion: (B,); 0 where nothing is scored."""
    return token_logps(policy, batch).sum(1) / batch.mask.sum(1).clamp(min=1)


def linear_logps(hidden, weight, targets, *, tau=1.0, entropy=True, body=None):
    """hidden (N, C), weight (V, C), targets (N,) -> logps (N,), entropy (N,) of softmax(hidden @ weight.T / tau).

    Both are float32 (float64 for float64 inputs) and differentiable in hidden and weight, whatever the upstream gradient.
    entropy=False skips it and returns None in its place. body: "naive", "chunked", or None to choose by size.
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and targets.shape == hidden.shape[:1], (hidden.shape, weight.shape, targets.shape)
    if body is None:
        body = "naive" if 4 * len(hidden) * len(weight) <= NAIVE_BYTES else "chunked"
    if body == "naive":
        return naive_logps(hidden, weight, targets, tau, entropy)
    logps, entropies = ChunkedLogps.apply(hidden, weight, targets, tau, entropy)
    return logps, entropies if entropy else None


def logits_of(hidden, weight, tau):
    """(N, C) @ (C, V) / tau, accumulated and kept in float32 at least."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    return logits if tau == 1.0 else logits / tau


def naive_logps(hidden, weight, targets, tau, entropy):
    all_logps = logits_of(hidden, weight, tau).log_softmax(-1)  # (N, V)
    logps = all_logps.gather(1, targets[:, None]).squeeze(1)  # (N,)
    return logps, -(all_logps.exp() * all_logps).sum(-1) if entropy else None


class ChunkedLogps(torch.autograd.Function):
    """The same two numbers from CHUNK_ROWS rows of logits at a time. Kept for backward: h, W, y, and three numbers a token.

    Backward, with upstream gradients g of logp and e of entropy S, and p = softmax:
        d logp / d logit_v = 1[v = y] − p_v        d S / d logit_v = −p_v (log p_v + S)
    so  dlogit = g (onehot − p) − e p (log p + S), recomputed chunk by chunk;  dh = dlogit W / tau;  dW += dlogitᵀ h / tau.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, tau, entropy):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps, lse, entropies = (torch.zeros(len(hidden), dtype=wide, device=hidden.device) for _ in range(3))  # (N,)
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = logits_of(hidden[rows], weight, tau)  # (chunk, V)
            lse[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - lse[rows]
            if entropy:
                logits -= lse[rows, None]  # log p, in place
                entropies[rows] = -(logits.exp() * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        ctx.tau = tau
        ctx.set_materialize_grads(False)
        return logps, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, e):
        if g is None and e is None:
            return None, None, None, None, None
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        wide = lse.dtype
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            all_logps = logits_of(hidden[rows], weight, ctx.tau).sub_(lse[rows, None])  # (chunk, V)
            p = all_logps.exp()
            if e is None:
                d_logits = p.neg_()
            else:  # −e p (log p + S) − g p, built in the memory of log p
                d_logits = all_logps.add_(entropies[rows, None]).mul_(e[rows, None])
                d_logits = d_logits.add_(0 if g is None else g[rows, None]).mul_(p).neg_()
            if g is not None:
                if e is None:
                    d_logits.mul_(g[rows, None])
                d_logits.scatter_add_(1, targets[rows, None], g[rows, None])
            d_logits /= ctx.tau
            if d_hidden is not None:
                d_hidden[rows] = (d_logits @ weight.to(wide)).to(hidden.dtype)
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[rows].to(wide)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None
