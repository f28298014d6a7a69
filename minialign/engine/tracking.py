"""What a step cost, and the writers behind --log: tokens per second, use of the card, memory, and the metrics for a dashboard.

A forward pass calls `count` with its model and the number of tokens it reads: token_logps, rewards.score, the sampler, PPO's critic and
IFT's guesses. On CUDA that number is a tensor on the device, so the host does not wait for it. A run begins to count when a step begins
and reads the counts once, when the step ends. Between two steps nothing is counted: evaluations and checkpoints are not training.

Checked by tests/engine/test_tracking.py.
"""

import sys
import time
from pathlib import Path

import torch

from minialign.engine import parallel
from minialign.engine.common import BadInput, derive_seed, describe_device, note, one_line

TIMED = ("seconds", "tokens_per_second", "mfu", "memory")  # the metrics that differ between two runs of the same steps
# Dense bfloat16 matrix products without sparsity, operations per second, from the data sheets of NVIDIA (that of each card; for the RTX
# cards the white papers of Ada and Ampere, with sums in float32). The names are those that CUDA reports.
PEAKS = {
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312e12),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), 989e12), "NVIDIA H100 NVL": 835e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA B200": 2250e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12,
}
watcher = None  # microscope.py's: is shown (model, batch, values) for each call of token_logps and score
counts, began = None, 0.0  # {(operations per token, whether they are tokens of the step): tokens} while a step runs, else None


def start():
    """Begin to count, from zero."""
    global counts, began
    counts, began = {}, time.monotonic()


def stop():
    """Return what was counted since `start` and count no more."""
    global counts
    counted, counts = counts, None
    return counted or {}


def watched(model, batch, values):
    """What token_logps or score returns, log-probs (B, T) or rewards (B,), after a watcher has seen it."""
    return watcher(model, batch, values) if watcher else values


def count(model, tokens, *, of_step=None):
    """Count one forward pass of `model` over a number of tokens (a tensor, or an int), and the backward pass that will follow it.

    Operations per parameter and token: 2 forward, 4 more backward (2 with adapters: frozen weights get no gradient), 2 more if the
    backward pass computes the activations again. of_step: whether tokens_per_second counts them; by default if the model is trained here.
    """
    if counts is None:
        return
    trains = [p.requires_grad for p in model.parameters()] if torch.is_grad_enabled() else [False]
    each = 2 + any(trains) * (2 + 2 * all(trains) + 2 * model.recompute)
    key = each * sum(p.numel() for p in model.parameters()), any(trains) if of_step is None else of_step
    counts[key] = counts.get(key, 0) + tokens


def tokens_read(batch):
    """How many tokens of a batch a policy reads, as a tensor: all of a row up to its last scored prediction, and no padding."""
    places = torch.arange(1, batch.mask.shape[1] + 1, device=batch.mask.device)
    return torch.where(batch.mask, places, 0).amax(1).sum()


def speed(device):
    """{tokens_per_second, mfu, memory} of the step since `start`, over all processes. docs/METRICS.md defines them. Counting ends here."""
    counted = [(*key, float(tokens)) for key, tokens in stop().items()]  # this waits for the device, so the time is that of its work too
    seconds = time.monotonic() - began
    tokens, work = sum(n for _, of_step, n in counted if of_step), sum(n * operations for operations, _, n in counted)
    parts = parallel.gather((tokens, work, peak_memory(device)))
    tokens, work, memory = (sum(part[0] for part in parts), sum(part[1] for part in parts), max(part[2] for part in parts))
    peak = PEAKS.get(describe_device(device))
    found = {"tokens_per_second": round(tokens / seconds, 1)}
    found |= {"mfu": round(work / seconds / peak / parallel.world(), 4)} if peak else {}
    return found | ({"memory": round(memory, 3)} if memory else {})


def peak_memory(device):
    """The most memory that this process has held so far, in GiB: PyTorch's on CUDA, else what was resident; 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":  # ru_maxrss would begin at what the process held that started this one
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def describe(row):
    """The speed in a row of metrics.jsonl as it stands on the terminal."""
    texts = {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "{:.1%} MFU", "memory": "{:.1f} GiB"}
    return "".join(f", {text.format(row[name])}" for name, text in texts.items() if name in row)


# ------------------------------------------------------------------------------------------------------------------- --log


class Writer:
    """Sends rows of metrics to TensorBoard (RUN/tensorboard) or Weights & Biases. Only the first process of a run has one.

    Raises BadInput if it cannot begin. An error later, of the disk or the network, ends the writing with a note; the run goes on.
    """

    def __init__(self, kind, folder, settings, first_step):
        self.kind = kind
        try:
            if kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.to = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)  # a resumed run repeats the steps from here on
            else:
                import wandb

                name = f"{derive_seed(folder.name, (folder / 'env.json').read_text(encoding='utf-8')):x}"  # the same when it is resumed
                self.to = wandb.init(project="minialign", dir=folder, name=folder.name, id=name, resume="allow", config=settings)
                self.to.define_metric("*", step_metric="step")
        except Exception as error:
            raise BadInput(f"--log {kind}: cannot begin ({one_line(error)}); mend this, or start without --log") from None

    def _try(self, action, *arguments):
        try:
            action(*arguments)
        except Exception as error:
            note(f"note: --log {self.kind} ends here ({one_line(error)}); the run goes on, and metrics.jsonl has every row")
            self.to = None

    def write(self, row):
        """row: {name: number or None}, with step."""
        if self.to is not None:
            self._try(self._scalars if self.kind == "tensorboard" else self.to.log, row)

    def _scalars(self, row):
        for name, value in row.items():
            if name != "step" and value is not None:
                self.to.add_scalar(name, value, row["step"])

    def close(self):
        if self.to is not None:
            self._try(self.to.close if self.kind == "tensorboard" else self.to.finish)
