"""The one number that alignment needs: log π(y_t | x, y_<t) of tokens that are given. Every policy's loss is arithmetic on it.

    logit_v = w_v · h / tau        logp = logit_y − log Σ_v e^{logit_v}        entropy = −Σ_v p_v log p_v

hidden h (N, C) and head W (V, C) go in; two numbers a token come out. The (N, V) matrix between them is the largest tensor of
most training steps, so there are two bodies that agree to rounding:

    naive     makes it, in float32, and lets autograd keep it: simplest, and fastest while it is small
    chunked   makes a slice of the vocabulary of it at a time, and again in the backward pass (kernels/linear_logprob.py): nothing of the
              size of the logits is ever there, and once they are large it is faster, because a slice stays in cache

Statistics are float32 even when h and W are bfloat16: logits rounded to bfloat16 would put 1.5 to 6 % noise on every ratio.
Only scored positions enter: a prompt token costs nothing here.

Checked by tests/test_logps.py: against log_softmax, by finite differences, and against each other.
"""

import hashlib

import torch

from minialign.batch import stack
from minialign.kernels.linear_logprob import chunked_logps

CHUNK_ROWS = 1024  # rows whose logits over the whole vocabulary may be alive at once where they are needed (IFT's greedy guesses)
NAIVE_BYTES = 32 * 2**20  # below this many bytes of float32 logits the naive body is chosen


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


def seq_logps(policy, *batches):
    """log π(y|x), summed over each completion: (B,); of several batches one each. A Remembered model (below) is looked up, not run.

    Several go through the policy in one forward pass: after two, autograd would hold the gradients of one until those of the other arrive,
    a second copy of them all.
    """
    batch = batches[0] if len(batches) == 1 else stack(batches)
    logps = policy.of(batch) if isinstance(policy, Remembered) else token_logps(policy, batch).sum(1)
    return logps if len(batches) == 1 else logps.split([len(part) for part in batches])


class Remembered:
    """What a model gave as log π(y|x) of certain rows; stands in seq_logps for the model, which need not be there any more.

    A row is known by its tokens and by what of it is scored, whatever batch and padding it comes in.
    """

    def __init__(self):
        self.known = {}

    @staticmethod
    def keys(batch):
        for inputs, targets, mask in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.mask.tolist(), strict=True):
            end = max((t + 1 for t, scored in enumerate(mask) if scored), default=0)
            yield hashlib.blake2b(repr((inputs[:end], targets[:end], mask[:end])).encode(), digest_size=16).digest()

    def learn(self, batch, logps):
        """logps (B,) of the rows of a batch."""
        self.dtype = logps.dtype
        self.known |= zip(self.keys(batch), logps.tolist(), strict=True)

    def of(self, batch):
        """(B,). Raises KeyError for a row that was not learned."""
        return torch.tensor([self.known[key] for key in self.keys(batch)], dtype=self.dtype, device=batch.inputs.device)


def mean_logps(policy, *batches):
    """log π(y|x) averaged over the tokens of each completion: (B,); 0 where nothing is scored. Several batches as in seq_logps."""
    sums = seq_logps(policy, *batches)
    means = [logps / batch.mask.sum(1).clamp(min=1) for logps, batch in zip([sums] if len(batches) == 1 else sums, batches, strict=True)]
    return means[0] if len(batches) == 1 else means


def linear_logps(hidden, weight, targets, *, tau=1.0, entropy=True, body=None):
    """hidden (N, C), weight (V, C), targets (N,) -> logps (N,), entropy (N,) of softmax(hidden @ weight.T / tau).

    Both are float32 (float64 for float64 inputs) and differentiable in hidden and weight, whatever the upstream gradient.
    entropy=False skips it and returns None in its place. body: "naive", "chunked", or None for best_body's choice. Raises ValueError for
    another body.
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
    """The name of the body for n rows: naive while the logits are small. Never on a GPU: in bfloat16 it would widen the whole head."""
    return "naive" if device.type != "cuda" and 4 * n * vocab_size <= NAIVE_BYTES else "chunked"


def naive_logps(hidden, weight, targets, tau, entropy):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    all_logps = (logits if tau == 1.0 else logits / tau).log_softmax(-1)  # (N, V)
    logps = all_logps.gather(1, targets[:, None]).squeeze(1)  # (N,)
    return logps, -(all_logps.exp() * all_logps).sum(-1) if entropy else None
