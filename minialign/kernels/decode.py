"""One more token for every row on a CPU: what GPT.hidden computes with a cache for T = 1, in as few operations as there are.

A step of a small model is bound by the number of its operations, 5 to 20 µs each, not by what they compute. So, here only:

    queries, keys and values of a layer come from one product (a copy of those weights for the time of a `sample`, adapters merged)
    rotary angles come from a table; the turn is x · cos + swapped x · sin over all D channels, with cos 1 and sin 0 where nothing turns
    the H/KV queries that share a key stand where a sequence would; scores, softmax and sum are an operation each
    while all rows are equally long there is no mask, and what is new lies in one place

That takes a third off a step of four layers of 128 channels, a quarter at 256, little at 512, where reading the weights takes the time.

Checked by tests/kernels/test_decode.py against GPT.hidden: every family, ragged rows, windows, adapters.
"""

import torch
import torch.nn.functional as F

from minialign.model import rotary_angles


class Decoder:
    """Tokens (A,) that continue the rows of a cache -> hidden states (A, C)."""

    def __init__(self, policy, cache):
        config, device, dtype = policy.config, cache.keys.device, cache.keys.dtype
        self.policy, self.cache = policy, cache
        self.layers = [(block, side_by_side(block.attn.q, block.attn.k, block.attn.v)) for block in policy.blocks]
        self.rows = torch.arange(len(cache.lengths), device=device)
        self.even = bool((cache.lengths == cache.longest).all()) and not any(config.windows)
        if config.positions == "rotary":
            positions = torch.arange(cache.keys.shape[3], device=device)[None]
            cos, sin = (table[0, 0] for table in rotary_angles(config, positions))  # (capacity, rotary_dim)
            half, passing = config.rotary_dim // 2, config.head_dim - config.rotary_dim
            sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=1)  # a pair (a, b) turns to (a cos − b sin, b cos + a sin)
            self.cos, self.sin = F.pad(cos, (0, passing), value=1.0).to(dtype), F.pad(sin, (0, passing)).to(dtype)  # (capacity, D)
            self.swapped = torch.arange(config.head_dim, device=device)
            self.swapped[: 2 * half] = self.swapped[: 2 * half].roll(half)

    def __call__(self, tokens):
        config, cache, at, span = self.policy.config, self.cache, self.cache.lengths, self.cache.longest + 1
        H, KV, D, A = config.n_head, config.n_kv_head, config.head_dim, len(tokens)
        x = self.policy.tok_embed(tokens)  # (A, C)
        if config.positions == "learned":
            x = x + self.policy.pos_embed(at)
        else:
            cos, sin = self.cos[at][:, None], self.sin[at][:, None]  # (A, 1, D)
        masks = dict.fromkeys(config.windows)  # none is needed, or (A, 1, H/KV, S) each
        if not self.even:
            masks = {window: self.policy.mask(at[:, None], span, window, cache, x.dtype) for window in masks}

        for layer, ((block, qkv), window) in enumerate(zip(self.layers, config.windows, strict=True)):
            heads = F.linear(block.norm1(x), *qkv).view(A, H + 2 * KV, D)
            qk, v = heads[:, : H + KV], heads[:, H + KV :]
            if block.attn.q_norm is not None:
                qk = torch.cat([block.attn.q_norm(qk[:, :H]), block.attn.k_norm(qk[:, H:])], dim=1)
            if config.positions == "rotary":
                qk = qk * cos + qk.index_select(2, self.swapped) * sin
            place = (layer, slice(None), slice(None), span - 1) if self.even else (layer, self.rows, slice(None), at)
            cache.keys[place], cache.values[place] = qk[:, H:], v
            keys, values = cache.keys[layer, :, :, :span], cache.values[layer, :, :, :span]  # (A, KV, S, D)
            scores = (qk[:, :H].reshape(A, KV, H // KV, D) * D**-0.5) @ keys.transpose(2, 3)  # (A, KV, H/KV, S)
            scores = scores if masks[window] is None else scores + masks[window]
            y = (scores.softmax(-1) @ values).view(A, H * D)
            after = x + block.attn.o(y)
            x = after + block.mlp(block.norm2(x if config.parallel_residual else after))
        cache.lengths += 1
        cache.longest += 1
        return self.policy.norm(x)


def side_by_side(*linears):
    """(weight, bias or None) of one linear layer whose output is that of the given ones side by side."""
    weights = [linear.merged_weight() if hasattr(linear, "merged_weight") else linear.weight for linear in linears]  # (lora.LoRALinear)
    return torch.cat(weights), None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
