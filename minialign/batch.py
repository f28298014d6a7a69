"""Batch, Pairs, Rollout and collate: the ONE place that shifts tokens, pads rows and decides which predictions are scored.

    prompt  a b      completion  c d ⏎            row  a b c d ⏎

    inputs   a b c d      what the model sees
    targets  b c d ⏎      what it predicts from that
    mask     . 1 1 1      the predictions that are completion tokens, EOS included

All other code is indexed by prediction and never shifts a batch itself. Masks come from lengths, never from token ids, so that
padding may use the EOS id.
"""

from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F

from minialign.engine.common import BadInput, passes


def to_device(tensor, device):
    """The tensor on a device. A copy to a GPU leaves from pinned memory, so the host does not wait for it."""
    to_gpu = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if to_gpu else tensor.to(device)


@dataclass
class Batch:
    inputs: torch.Tensor  # (B, T) token ids
    targets: torch.Tensor  # (B, T) token ids, targets[:, t] follows inputs[:, t]
    mask: torch.Tensor  # (B, T) bool
    sizes: list | None = field(default=None, kw_only=True)  # B ints: how many of a row's T positions are not padding. None = not known

    def to(self, device):
        return self._map(lambda part: to_device(part, device))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, rows):
        """Some of the rows: a slice (its tensors are views, so writing into it also writes into the batch), or a list of indices."""
        places = rows if isinstance(rows, slice) else to_device(torch.tensor(rows), self.inputs.device)
        return self._map(lambda part: part[places], lambda part: part[rows] if isinstance(rows, slice) else [part[b] for b in rows])

    def micro_batches(self, micro_batch, *, lengths=None, unit=1):
        """This process's micro-batches, trimmed, with rows of similar length in each: see common.passes. lengths: B ints to
        deal by instead of `sizes`. If there is one, it is the batch itself; otherwise they are copies."""
        dealt = passes(lengths or self.sizes or [1] * len(self), micro_batch, unit=unit)
        return [self] if dealt == [[*range(len(self))]] else [self[own].trimmed() for own in dealt]

    def trimmed(self):
        """Without the columns in which every row has padding. The tensors are views."""
        T = max(self.sizes) if self.sizes else self.mask.shape[1]
        return self._map(lambda part: part[:, :T] if part.dim() == 2 else part)

    def _map(self, of_tensor, of_list=lambda part: part):
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: None if part is None else of_tensor(part) if torch.is_tensor(part) else of_list(part)
                             for name, part in parts.items()})


@dataclass
class Pairs:
    chosen: Batch  # row b of chosen and row b of rejected have the same prompt
    rejected: Batch
    target: Batch | None = None  # slic's y_ref, as many rows, each with a prompt of its own

    def to(self, device):
        return Pairs(self.chosen.to(device), self.rejected.to(device), self.target and self.target.to(device))

    def __len__(self):
        return len(self.chosen)


@dataclass
class Rollout(Batch):
    """What a policy sampled, and what a method computes for it before its updates. A slice of the rows slices every field."""

    old_logps: torch.Tensor  # (B, T) under the tempered, untruncated distribution that sampled; 0 where mask is False
    lengths: torch.Tensor  # (B,) completion tokens, EOS included
    finished: torch.Tensor  # (B,) bool: the policy emitted EOS
    completions: list  # B lists of token ids, EOS included where it was emitted
    ref_logps: torch.Tensor | None = None  # (B, T) of the reference; 0 where mask is False
    advantages: torch.Tensor | None = None  # (B,) or, for ppo, (B, T)
    rewards: torch.Tensor | None = None  # (B,) minus the KL penalty, for the loss of rebel
    values: torch.Tensor | None = None  # (B, T) of ppo's critic before the updates
    returns: torch.Tensor | None = None  # (B, T) the targets of the critic


def collate(prompts_ids, completions_ids, *, pad_id, max_len=None):
    """Lists of token ids -> Batch. Row b is prompts_ids[b] + completions_ids[b]; completions already include their EOS.

    max_len is the maximum length of a row in tokens, prompt and completion together. The end of a longer row is cut off: its completion
    loses the EOS, and if the prompt fills the row, nothing is scored. T is the longest row minus 1, at least 1.
    Raises BadInput for an empty prompt (no input would predict its first completion token) or an empty batch.
    """
    if len(prompts_ids) != len(completions_ids):
        raise BadInput(f"collate got {len(prompts_ids)} prompts and {len(completions_ids)} completions: give one completion per prompt")
    if not len(prompts_ids):
        raise BadInput("collate got no rows: a batch needs at least one")
    rows = []
    for b, (prompt, completion) in enumerate(zip(prompts_ids, completions_ids, strict=True)):
        if not len(prompt):
            raise BadInput(f"row {b} has an empty prompt: give it at least one token (BOS or EOS)")
        rows.append([*prompt, *completion][:max_len])
    T = max(1, max(len(row) for row in rows) - 1)
    tokens = torch.full((len(rows), T + 1), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[b, len(prompts_ids[b]) - 1 : len(row) - 1] = True  # prediction t predicts token t + 1
    sizes = [max(1, len(row) - 1) for row in rows]
    return Batch(inputs=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous(), mask=mask, sizes=sizes)


def stack(batches):
    """Concatenate batches along the rows into one Batch. Shorter rows are padded, which does not change their results."""
    T = max(batch.mask.shape[1] for batch in batches)
    return Batch(*[torch.cat([F.pad(getattr(batch, name), (0, T - batch.mask.shape[1])) for batch in batches])
                   for name in ("inputs", "targets", "mask")])


def masked_mean(x, mask):
    """Mean of x over the entries where mask is True; 0 if there are none. Masked entries may be inf or NaN."""
    mask = mask.bool()
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def whiten(x, mask):
    """(x − mean) / sqrt(variance + 1e-8) over the entries where mask is True, with the population variance; 0 elsewhere.

    The PPO implementations behind the summarisation results use this form: population variance, not sample variance. Equal entries give
    exactly 0, not a rounding error.
    """
    mask = mask.bool()
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    differ = (x[mask] != x[mask][:1]).any()
    return torch.where(mask & differ, (x - mean) * torch.rsqrt(variance + 1e-8), 0)
