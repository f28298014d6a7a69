"""Sequence likelihood calibration with human feedback (SLiC-HF), direct variant. Zhao et al. 2023, arXiv:2305.10425, section 2.

    L(θ) = E_{(x, y_w, y_l)}[ max(0, δ − log π_θ(y_w|x) + log π_θ(y_l|x)) − λ·log π_θ(y_ref|x) ]

Symbols  y_w → chosen, y_l → rejected, y_ref → target, log π → *_logps (B,), δ → delta, λ → weight.
Idea     Of two answers the chosen one should be likelier, by e^δ at least; beyond that a pair is done and says no more. The likelihood of
         a good answer in a second term keeps the policy a language model.
Differs  from dpo.py: no reference, and a hinge: its pressure does not fade, it stops. The lecture's "SLiC", a hinge on log-ratios to ref,
         is gpo.py with f = hinge. From orpo.py: sums, not averages: a long answer weighs more in both terms.
Details  Log-probs are summed over the completion. y_ref is the chosen answer here; it may be any good one. The paper's other variant ranks
         samples of the SFT policy, which is this file on pairs made in that way.
         --online: the policy draws the pairs and a reward labels them, as in dpo.py.
Law      Pairs drawn from μ, labelled with probability p; W(y) and L(y): the shares with which y is the chosen and the rejected one. If
         π = W + (W − L)/λ is nowhere negative and no pair of it has reached δ, it is that. Else, and at the default λ nearly always, there
         is no closed form. Never π*: ref and β do not occur.
Checked  tests/methods/test_slic.py (worked numbers, gradient, law, stationarity), test_against_trl.py, toy/tiny_language.py.

    python -m minialign slic                                                 # built-in task, laptop CPU
    python -m minialign slic --pairs pairs.jsonl --policy runs/sft/final --delta 1 --weight 0.1
"""

from dataclasses import dataclass

import torch.nn.functional as F

from minialign.logps import seq_logps
from minialign.pairs import train
from minialign.settings import OnPairs


@dataclass
class Config(OnPairs):
    delta: float = 1.0              # δ: by how many nats the chosen answer should be more likely
    weight: float = 0.1             # λ: weight of the likelihood of the chosen answer


def slic_loss(chosen_logps, rejected_logps, target_logps, *, delta, weight):
    """All inputs (B,): log-probs summed over each completion, in nats. Returns the scalar loss, stats."""
    assert chosen_logps.dim() == 1 and chosen_logps.shape == rejected_logps.shape == target_logps.shape
    margin = chosen_logps - rejected_logps  # (B,)
    loss = F.relu(delta - margin) - weight * target_logps
    stats = {
        "rewards/margins": margin.mean(), "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "logps/chosen": chosen_logps.mean(), "logps/rejected": rejected_logps.mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def step(policy, ref, pairs, cfg):
    """One batch of pairs to one loss: the only place where models meet the equation."""
    chosen_logps, rejected_logps = seq_logps(policy, pairs.chosen, pairs.rejected)  # (B,), (B,)
    return slic_loss(chosen_logps, rejected_logps, chosen_logps, delta=cfg.delta, weight=cfg.weight)


def main(cfg):
    """Run it; returns the run folder."""
    return train("slic", cfg, step)
