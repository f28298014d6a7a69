"""The one number that alignment needs: log π(y_t | x, y_<t), the log-prob of a given token. Every policy loss is computed from it.

    logit_v = w_v · h / tau        logp = logit_y − log Σ_v e^{logit_v}        entropy = −Σ_v p_v log p_v

The inputs are hidden states h (N, C) and the head W (V, C). The outputs are two numbers per token. The (N, V) logits between them are the
largest tensor of most training steps, so there are two implementations (bodies). They agree to rounding:

    naive     computes all logits in float32, and autograd keeps them: simplest, and fastest while they are small
    chunked   computes the logits of one slice of the vocabulary at a time, and again in the backward pass (kernels/linear_logprob.py). It
              never holds a tensor of the size of the logits. For large logits it is also faster, because a slice stays in cache

Statistics are float32 even when h and W are bfloat16: logits rounded to bfloat16 would put 1.5 to 6 % noise on every ratio.
Only scored positions are computed, so a prompt token costs nothing here.

Checked by tests/test_logps.py: both bodies against log_softmax, by finite differences, and against each other.
"""

import hashlib

import torch

from minialign.batch import stack
from minialign.engine import tracking
from minialign.kernels.linear_logprob import chunked_logps

CHUNK_ROWS = 1024  # where logits over the whole vocabulary are needed (IFT's greedy guesses), at most this many rows at once
NAIVE_BYTES = 32 * 2**20  # up to this many bytes of float32 logits, the naive body is used


def token_logps(policy, batch, *, tau=1.0, entropy=False, embeds=None):
    """log π of each scored target under the policy's softmax(logits / tau), and 0 where mask is False. Differentiable.

    batch: Batch with inputs, targets, mask (B, T). Returns logps (B, T), in nats, float32 or wider; with entropy=True also the
    entropy (B, T) of each scored prediction. embeds (B, T, C) replace the embeddings of the inputs.
    """
    tracking.count(policy, tracking.tokens_read(batch))
    hidden = policy.hidden(batch.inputs, embeds=embeds).flatten(0, 1)  # (B·T, C)
    scored = batch.mask.flatten().nonzero().squeeze(1)  # (N,) the places of the scored predictions. A GPU is waited for here, and only here
    targets = batch.targets.flatten()[scored]
    logps, entropies = linear_logps(hidden.index_select(0, scored), policy.head_weight, targets, tau=tau, entropy=entropy)  # (N,)
    full = torch.zeros(batch.mask.numel(), dtype=logps.dtype, device=logps.device)
    logps = tracking.watched(policy, batch, full.index_copy(0, scored, logps).view(batch.mask.shape))  # (B, T)
    return (logps, full.index_copy(0, scored, entropies).view(batch.mask.shape)) if entropy else logps


def seq_logps(policy, *batches):
    """log π(y|x), summed over each completion: (B,), one for each batch. A Remembered model (below) is looked up, not run.

    Several batches share one forward pass. With two, autograd would keep two copies of every gradient for a while: those from the first
    pass wait until those from the second are added.
    """
    batch = batches[0] if len(batches) == 1 else stack(batches)
    logps = policy.of(batch) if isinstance(policy, Remembered) else token_logps(policy, batch).sum(1)
    return logps if len(batches) == 1 else logps.split([len(part) for part in batches])


class Remembered:
    """Stores a model's log π(y|x) of certain rows. seq_logps accepts it in place of the model, which can then be deleted.

    A row is identified by its tokens and by which of them are scored, in any batch and with any padding.
    """

    def __init__(self):
        self.known = {}

    @staticmethod
    def keys(batch):
        for inputs, targets, mask in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.mask.tolist(), strict=True):
            end = max((t + 1 for t, scored in enumerate(mask) if scored), default=0)
            yield hashlib.blake2b(repr((inputs[:end], targets[:end], mask[:end])).encode(), digest_size=16).digest()

    def learn(self, batch, logps):
        """Store the logps (B,) of the rows of a batch."""
        self.dtype = logps.dtype
        self.known |= zip(self.keys(batch), logps.tolist(), strict=True)

    def of(self, batch):
        """The stored logps (B,) of the rows of a batch. Raises KeyError for a row that was not stored."""
        return torch.tensor([self.known[key] for key in self.keys(batch)], dtype=self.dtype, device=batch.inputs.device)


def mean_logps(policy, *batches):
    """log π(y|x) averaged over the tokens of each completion: (B,), one for each batch; 0 where nothing is scored."""
    sums = seq_logps(policy, *batches)
    means = [logps / batch.mask.sum(1).clamp(min=1) for logps, batch in zip([sums] if len(batches) == 1 else sums, batches, strict=True)]
    return means[0] if len(batches) == 1 else means


def linear_logps(hidden, weight, targets, *, tau=1.0, entropy=True, body=None):
    """hidden (N, C), weight (V, C), targets (N,) -> logps (N,), entropy (N,) of softmax(hidden @ weight.T / tau).

    Both are float32 (float64 for float64 inputs) and differentiable in hidden and weight, for any upstream gradient.
    entropy=False skips the entropy and returns None for it. body: "naive", "chunked", or None to let best_body choose. Raises ValueError
    for any other body.
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and targets.shape == hidden.shape[:1], (hidden.shape, weight.shape, targets.shape)
    body = body or best_body(len(hidden), len(weight), hidden.device)
    if body == "naive":
        return naive_logps(hidden, weight, targets, tau, entropy)
    if body != "chunked":
        raise ValueError(f"body={body!r} is unknown: use naive, chunked, or None")
    logps, entropies = chunked_logps(hidden, weight, targets, tau, entropy)
    return logps, entropies if entropy else None


def best_body(n, vocab_size, device):
    """The body to use for n rows: naive while the logits are small. Never on a GPU: there it would copy a bfloat16 head to float32."""
    return "naive" if device.type != "cuda" and 4 * n * vocab_size <= NAIVE_BYTES else "chunked"


def naive_logps(hidden, weight, targets, tau, entropy):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    all_logps = (logits if tau == 1.0 else logits / tau).log_softmax(-1)  # (N, V)
    logps = all_logps.gather(1, targets[:, None]).squeeze(1)  # (N,)
    return logps, -(all_logps.exp() * all_logps).sum(-1) if entropy else None
