"""A complete GPT: configuration, rotary positions, attention with a ragged KV cache, MLP, block, and the model with its head.

One class covers six families (gpt2, gpt_neox, llama, mistral, qwen2, qwen3), because every switch of GPTConfig names a mechanism
(learned or rotary positions, LayerNorm or RMSNorm, parallel residual, grouped keys, ...) and never a model. There is no dropout,
because with dropout the policy that computes log-probs would differ from the policy that sampled.

Read the file from the bottom up: GPT.hidden is the forward pass, and Block, Attention and MLP are its parts. minialign/__init__.py
explains the letters. In addition, KV is the number of key-value heads and S is the number of cached positions.

Checked by tests/test_model.py against transformers (>= 50 random configurations per family, float32 and float64) and against itself
(the cached forward pass equals the full one for ragged batches).
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minialign.engine.common import BadInput
from minialign.hf_config import config_from_hf


@dataclass
class GPTConfig:
    vocab_size: int                     # V: rows of the embedding, padding rows included
    n_layer: int = 2                    # L
    n_head: int = 4                     # H
    n_embd: int = 64                    # C
    n_kv_head: int | None = None        # KV: fewer than H means grouped-query attention; None = H
    head_dim: int | None = None         # D; None = C / H
    ffn_dim: int | None = None          # hidden width of the MLP; None = 4C
    max_len: int = 512                  # longest sequence, in tokens
    norm: str = "rms"                   # rms | layer
    norm_eps: float = 1e-5
    activation: str = "silu"            # silu | gelu | gelu_tanh | relu
    gated: bool = True                  # MLP: down(act(gate(x)) · up(x)) instead of down(act(up(x)))
    positions: str = "rotary"           # rotary | learned
    rotary_dim: int | None = None       # how many of the D channels are rotated; None = D
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # llama3 or linear: slower rotation, for contexts longer than in training
    parallel_residual: bool = False     # x + attn(norm1(x)) + mlp(norm2(x)) instead of one after the other
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False               # RMSNorm on each head's query and key
    windows: tuple = ()                 # per layer: how many positions a query sees, itself and earlier ones; None = all
    tied: bool = True                   # the LM head is the embedding matrix
    head: str = "lm"                    # lm: logits (B, T, V) | scalar: one number per position (B, T)
    reward_offset: float = 0.0          # the scalar head subtracts it, so that demonstrations score 0 on average
    reward_read: str = "last"           # a completion's reward: last (the scalar head at its last token) | sum (over its tokens)
                                        # | conversation (last, of the whole conversation in its chat template: classifiers of others)
    reward_bound: float = 0.0           # R: rewards are R·σ(·), within [0, R]; 0 = unbounded
    reward_pad: int | None = None       # the head is read at the last token that is not this id. For classifiers of others; None = any id
    eos_ids: tuple = ()                 # further ids that end a completion in sampling, from generation_config.json
    n_tokens: int | None = None         # ids below this decode to text; the rest pad the embedding and are never sampled. None = V
    family: str = "llama"               # a saved folder uses this family's names and layout; the model itself never reads it

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.ffn_dim = self.ffn_dim or 4 * self.n_embd
        self.rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        self.windows = tuple(self.windows) or (None,) * self.n_layer
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "ffn_dim", "max_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise BadInput(f"{name} must be a whole number from 1 to 2**31 − 1, found {value!r}")
        numbers = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta, "reward_offset": self.reward_offset,
                   "reward_bound": self.reward_bound} | {name: n for name, n in (self.rope_scaling or {}).items() if name != "rope_type"}
        for name, value in numbers.items():
            above = name not in ("norm_eps", "reward_offset", "reward_bound")
            if type(value) not in (int, float) or not abs(value) < 1e15 or (value <= 0 if above else value < 0 and name == "norm_eps"):
                raise BadInput(f"{name} must be a number{' above 0' * above} and below 1e15, found {value!r}")
        if "low_freq_factor" in numbers and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
            raise BadInput(f"low_freq_factor must be below high_freq_factor, found {numbers['low_freq_factor']!r}")
        if any(window is not None and not 1 <= window < 2**31 for window in self.windows):
            raise BadInput(f"a window must be from 1 to 2**31 − 1, found {max(filter(None, self.windows))!r}")
        choices = {"norm": ("rms", "layer"), "positions": ("rotary", "learned"), "head": ("lm", "scalar"), "activation": tuple(ACTIVATIONS),
                   "reward_read": ("last", "sum", "conversation")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        odd = not isinstance(self.rotary_dim, int) or self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim
        if self.positions == "rotary" and odd:
            raise BadInput(f"rotary_dim must be even and at most head_dim = {self.head_dim}, found {self.rotary_dim!r}")
        if self.n_head % self.n_kv_head:
            raise BadInput(f"{self.n_head} heads cannot share {self.n_kv_head} key-value heads evenly: n_kv_head must divide n_head")
        if len(self.windows) != self.n_layer:
            raise BadInput(f"windows has {len(self.windows)} entries for {self.n_layer} layers: give one per layer")

    @classmethod
    def tiny(cls, vocab_size, **changes):
        """Two layers and 64 channels: it trains on a laptop CPU in seconds. For tests, toys and the built-in task."""
        return cls(vocab_size=vocab_size, **{"ffn_dim": 128, **changes})

    @classmethod
    def from_hf(cls, config_dict):
        """Build from the dict of a Hugging Face config.json. Raises BadInput for an architecture or option that is not implemented."""
        return config_from_hf(config_dict, cls)


# ---------------------------------------------------------------------------------------------------------------- positions


def rotary_angles(config, positions):
    """positions (B, T) or (1, T) -> cos, sin of the rotary angles, each (B, 1, T, rotary_dim/2). Su et al. 2021, arXiv:2104.09864.

    Channel pair (i, i + rotary_dim/2) is rotated by position · theta^(−2i/rotary_dim). The angles are float32 for every model dtype:
    bfloat16 positions would be wrong beyond 256, and checkpoints were trained with float32 angles.
    """
    exponent = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32) / config.rotary_dim
    speed = 1.0 / config.rope_theta**exponent  # (rotary_dim/2,) radians per position
    if config.rope_scaling:
        speed = scale_rotation(speed, config.rope_scaling)
    angle = positions[:, None, :, None].float() * speed  # (B, 1, T, rotary_dim/2)
    return angle.cos(), angle.sin()


def scale_rotation(speed, scaling):
    """Slow the rotation so that a longer context spans the angles seen in training. `linear` slows all pairs, `llama3` only slow pairs.

    llama3 (Llama 3.1 report, section 3.1.2): pairs that make few turns within the context of training are slow, and their speed is
    divided by `factor`. Fast pairs are unchanged, and a linear ramp connects the two.
    """
    if scaling["rope_type"] == "linear":
        return speed / scaling["factor"]
    old_context, low, high = scaling["original_max_position_embeddings"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = old_context * speed / (2 * math.pi)  # full turns within the old context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: divided by factor
    return keep * speed + (1 - keep) * speed / scaling["factor"]


def rotate(x, cos, sin):
    """Rotate the first rotary_dim channels of x (B, H, T, D); the others are unchanged."""
    half = cos.shape[-1]
    first, second, passing = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, passing], dim=-1)


# -------------------------------------------------------------------------------------------------------------------- cache


class KVCache:
    """Keys and values of every layer for a ragged batch. Row b holds `lengths[b]` positions, then garbage that no query ever sees.

    keys, values: (L, B, KV, capacity, D). A row's next token is written at that row's own position, so rows need no left padding.
    longest: the largest length, or more, as a Python int: no step waits for the GPU to report it.
    """

    def __init__(self, config, batch_size, capacity, *, device=None, dtype=None):
        shape = (config.n_layer, batch_size, config.n_kv_head, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # (B,)
        self.longest = 0

    def span(self, end):
        """Positions to attend to when `end` are filled: on CUDA rounded up to 64, 128, 256, …, so that recorded graphs are few."""
        return min(max(64, 2 ** (end - 1).bit_length()), self.keys.shape[3]) if self.keys.is_cuda else end

    def write(self, layer, k, v, positions, span):
        """Store k, v (B, KV, T, D) at positions (B, T); return the layer's first `span` keys and values (B, KV, span, D)."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]  # (B, 1)
        self.keys[layer, rows, :, positions] = k.transpose(1, 2)
        self.values[layer, rows, :, positions] = v.transpose(1, 2)
        return self.keys[layer, :, :, :span], self.values[layer, :, :, :span]

    def select(self, rows):
        """A new cache with the given rows, in that order. A row may appear more than once (one prefill, many samples).

        On CUDA `longest` stays what it was, an upper bound: the host need not wait for the new one.
        """
        chosen = copy.copy(self)
        chosen.keys, chosen.values, chosen.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]
        chosen.longest = self.longest if self.keys.is_cuda else int(chosen.lengths.max())
        return chosen


# ---------------------------------------------------------------------------------------------------------------- the parts


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, in at least float32. Zhang & Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def make_norm(config):
    return RMSNorm(config.n_embd, config.norm_eps) if config.norm == "rms" else nn.LayerNorm(config.n_embd, eps=config.norm_eps)


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class Attention(nn.Module):
    """Causal attention of H query heads over KV key-value heads. H/KV query heads share each key-value head.

    forward: x (B, T, C); rotary (cos, sin) or None; mask from GPT.mask, or None for plain causal attention. With a cache also the
    positions (B, T) where the new keys are stored, and span S, the number of cached positions to attend to. Returns (B, T, C).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, config.n_head, config.n_kv_head, config.head_dim
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x, rotary, mask, cache, positions, span):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, KV, T, D)
        v = self.v(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, KV, T, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, positions, span)  # (B, KV, S, D)
        grouped = self.n_kv_head != self.n_head
        if grouped and T == 1:  # queries that share a key take the place of the sequence axis, so no key is repeated
            q = q.reshape(B, self.n_kv_head, -1, self.head_dim)  # (B, KV, H/KV, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, self.n_head, 1, self.head_dim)
        else:  # No mask means plain causal attention: with right padding, no padding key comes before a real query.
            if grouped and q.is_cuda and q.dtype == torch.float32:  # only the kernel that holds all T × T scores takes these as they are
                k, v, grouped = *(x.repeat_interleave(self.n_head // self.n_kv_head, 1) for x in (k, v)), False
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)  # (B, H, T, D)
        return self.o(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.n_embd, config.ffn_dim, bias=config.mlp_bias)
        self.gate = nn.Linear(config.n_embd, config.ffn_dim, bias=config.mlp_bias) if config.gated else None
        self.down = nn.Linear(config.ffn_dim, config.n_embd, bias=config.mlp_bias)

    def forward(self, x):
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.norm1, self.attn = make_norm(config), Attention(config, layer)
        self.norm2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, *context):
        if self.parallel_residual:
            return x + self.attn(self.norm1(x), *context) + self.mlp(self.norm2(x))
        x = x + self.attn(self.norm1(x), *context)
        return x + self.mlp(self.norm2(x))


# ---------------------------------------------------------------------------------------------------------------- the model


def padding_for_gpu(T, max_len):
    """Positions to add to T, up to a multiple of 64 within the context: attention kernels are chosen and tuned for each length anew."""
    return max(0, min(-T % 64, max_len - T))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # activation checkpointing: backward recomputes a block's activations instead of keeping them
        self.tok_embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_embed = nn.Embedding(config.max_len, config.n_embd) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size if config.head == "lm" else 1, bias=False)
        self.init_weights()
        if config.tied and config.head == "lm":
            self.head.weight = self.tok_embed.weight

    def init_weight(self, name, parameter):
        """Normal with std 0.02; the two projections into the residual stream have 0.02/sqrt(2L), as in GPT-2. Norms keep their ones."""
        if parameter.dim() == 2:
            into_residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if into_residual else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)

    def init_weights(self):
        """Every parameter by `init_weight`. A scalar head has std 1/sqrt(C+1) instead."""
        for name, parameter in self.named_parameters():
            self.init_weight(name, parameter)
        if self.config.head == "scalar":
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(self.config.n_embd + 1))

    @property
    def head_weight(self):
        """The weight of the head: (V, C) for the LM head, (1, C) for the scalar head."""
        return self.head.weight

    def embed(self, inputs):
        """Token ids (B, T) -> token embeddings (B, T, C), without positions. The argument `embeds` below replaces these."""
        return self.tok_embed(inputs)

    def forward(self, inputs, *, embeds=None, cache=None, lengths=None):
        """LM head: logits (B, T, V). Scalar head: one number per position (B, T). The arguments are those of `hidden`."""
        hidden = self.hidden(inputs, embeds=embeds, cache=cache, lengths=lengths)
        if self.config.head == "scalar":  # float32 beside a bfloat16 trunk too: a reward near 5 would be rounded to 1/32
            return self.head(hidden.to(self.head_weight.dtype)).squeeze(-1) - self.config.reward_offset  # (B, T)
        return self.head(hidden)  # (B, T, V)

    def hidden(self, inputs, *, embeds=None, cache=None, lengths=None):
        """The forward pass without the head: the residual stream after the final norm, (B, T, C).

        inputs   (B, T) token ids, right-padded. The outputs at padding positions are meaningless and do not affect other positions.
        embeds   (B, T, C) used instead of embed(inputs), or a function that returns them.
        cache    a KVCache: the T tokens continue each row at its own length, and their keys and values are stored.
        lengths  (B,), only with a cache: how many of the T tokens are real in each row (default: all T).
        Raises BadInput if a position is beyond the learned position table or the cache.
        """
        T = inputs.shape[1]
        more = padding_for_gpu(T, self.config.max_len) if inputs.is_cuda and cache is None else 0
        first = torch.zeros(1, dtype=torch.long, device=inputs.device) if cache is None else cache.lengths
        positions = first[:, None] + torch.arange(T + more, device=inputs.device)  # (1, T) or (B, T); T is with the padding
        end = T if cache is None else cache.longest + T
        limits = {"the model's context of": self.config.max_len if self.pos_embed is not None else end,
                  "the KV cache's": cache.keys.shape[3] if cache is not None else end}
        for what, limit in limits.items():
            if end > limit:
                raise BadInput(f"{end} positions do not fit {what} {limit}: shorten the rows (--max_len, --max_new)")

        embeds = self.embed(inputs) if embeds is None else embeds
        x = embeds() if callable(embeds) else embeds  # (B, T, C)
        x = F.pad(x, (0, 0, 0, more)) if more else x
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        rotary = None
        if self.config.positions == "rotary":
            rotary = tuple(table.to(x.dtype) for table in rotary_angles(self.config, positions))

        empty = cache is None or cache.longest == 0  # no token comes before these
        span = T + more if empty else cache.span(end)
        masks = {window: self.mask(positions, span, window, empty, x.dtype) for window in set(self.config.windows)}
        for block, window in zip(self.blocks, self.config.windows, strict=True):
            context = rotary, masks[window], cache, positions, span
            again = self.recompute and cache is None and torch.is_grad_enabled()
            x = checkpoint(block, x, *context, use_reentrant=False) if again else block(x, *context)
        if cache is not None:
            cache.lengths += T if lengths is None else lengths.to(cache.lengths)  # in place: a recorded CUDA graph reads this tensor
            cache.longest = end if lengths is None or inputs.is_cuda else int(cache.lengths.max())
        return self.norm(x[:, :T])

    def mask(self, positions, span, window, empty, dtype):
        """The mask added to attention scores, (B, 1, T, S): 0 where a query sees the key, else −∞. None means plain causal attention.

        empty: no token comes before these T, so that without a window plain causal attention is right.
        For T = 1 it is (B, 1, H/KV, S), because attention then puts the queries that share a key on the sequence axis.
        """
        if empty and (window is None or window >= positions.shape[1]):
            return None
        keys = torch.arange(span, device=positions.device)  # (S,) no row has more positions than this
        back = positions[:, None, :, None] - keys  # (B, 1, T, S) how far back each key lies; negative means the future
        seen = (back >= 0) if window is None else (back >= 0) & (back < window)
        if positions.shape[1] == 1:
            seen = seen.expand(-1, -1, self.config.n_head // self.config.n_kv_head, -1)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

    def with_scalar_head(self, *, reward_read="last", reward_bound=0.0):
        """A copy of this model with a new scalar head (std 1/sqrt(C+1)), in at least float32. Reward and value models start from it."""
        model = copy.deepcopy(self, {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in self.parameters()})
        fresh = dict(reward_read=reward_read, reward_bound=reward_bound, reward_pad=None)
        model.config = replace(self.config, head="scalar", tied=False, **fresh)
        weight = torch.empty(1, self.config.n_embd).normal_(std=1 / math.sqrt(self.config.n_embd + 1))
        model.head = nn.Linear(self.config.n_embd, 1, bias=False)
        model.head.weight = nn.Parameter(weight.to(self.head_weight.device, torch.promote_types(self.head_weight.dtype, torch.float32)))
        return model
