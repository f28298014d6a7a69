"""Rewards of completions. So far the learned one: a GPT with a scalar head, read at the completion's last token."""

import torch


def score(reward_model, batch):
    """The reward model's number for each row, (B,): its scalar head at the last completion token (EOS, unless the row was cut).

    batch: Batch with inputs, targets, mask (B, T). The index comes from the mask, so padding may look like anything. A row with
    nothing scored is read at its first token.
    """
    tokens = torch.cat([batch.inputs[:, :1], batch.targets], dim=1)  # (B, T + 1) the whole row: the last target is an input here
    places = torch.arange(1, tokens.shape[1], device=tokens.device)  # target t is token t + 1
    last = torch.where(batch.mask, places, 0).amax(dim=1)  # (B,)
    return reward_model(tokens)[torch.arange(len(tokens), device=tokens.device), last]
