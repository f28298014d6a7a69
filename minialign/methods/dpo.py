"""Direct preference optimisation (DPO). Rafailov et al. 2023, arXiv:2305.18290, Eq. 7. Online: Guo et al. 2024, arXiv:2402.04792.

    L(θ) = −E_{(x, y_w, y_l)}[ (1 − ε)·log σ(β·Δ) + ε·log σ(−β·Δ) ],      Δ = log π_θ(y_w|x)/π_ref(y_w|x) − log π_θ(y_l|x)/π_ref(y_l|x)

Symbols  y_w → chosen, y_l → rejected, log π → *_logps (B,), ε → label_smoothing.
Idea     The policy that is best for a reward r under a pull β to ref is π* ∝ ref·e^{r/β}, so r = β·log π*/ref up to a term in x only. Put
         that into Bradley-Terry, where the term cancels: the policy itself is fitted as a reward model, and no RL is left to do.
Differs  from reward_model.py: the reward is the policy's own log-ratio. From irft.py: somebody labelled the rejected answer.
Details  Log-probs are summed over the completion, not averaged. label_smoothing is cDPO: a share ε of the labels is flipped.
         Only Δ is trained: both log-probs may fall together, as long as the rejected one falls faster (`logps/chosen` shows it).
         --online: the pairs are two fresh answers of the policy, labelled by a reward with the Bradley-Terry probability σ(r₁ − r₂).
Law      ε = 0, preferences from Bradley-Terry on r, any full-support sampling of the pairs, so online as well: π* ∝ ref·e^{r/β}. With
         labels that never contradict each other Δ grows without end: nothing in the loss stops it.
Checked  tests/methods/test_dpo.py (worked numbers, gradient, shifts, the law by enumeration, trl), toy/tiny_language.py (trained).

    python -m minialign dpo                                                  # built-in task, laptop CPU
    python -m minialign dpo --pairs pairs.jsonl --policy runs/sft/final
    python -m minialign dpo --online --reward runs/rm/final --pairs pairs.jsonl --policy runs/sft/final
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minialign.logps import seq_logps
from minialign.pairs import train
from minialign.settings import OnPairs


@dataclass
class Config(OnPairs):
    beta: float = 0.1               # β: the pull to ref; small β lets the policy go far
    label_smoothing: float = 0.0    # ε: the share of labels taken to be wrong, below 0.5
    precompute_ref: bool = False    # compute the reference's log-probs once, before step 1, and keep no second model while training


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, label_smoothing=0.0):
    """All inputs (B,): log-probs summed over each completion, in nats. Returns the scalar loss, stats."""
    assert chosen_logps.dim() == 1 and chosen_logps.shape == rejected_logps.shape == ref_chosen_logps.shape == ref_rejected_logps.shape
    chosen_reward = beta * (chosen_logps - ref_chosen_logps)  # (B,) implicit reward, up to a term in x only
    rejected_reward = beta * (rejected_logps - ref_rejected_logps)  # (B,)
    margin = chosen_reward - rejected_reward  # (B,) that term cancels here
    loss = (1 - label_smoothing) * F.softplus(-margin) + label_smoothing * F.softplus(margin)
    stats = {
        "rewards/chosen": chosen_reward.mean(), "rewards/rejected": rejected_reward.mean(), "rewards/margins": margin.mean(),
        "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "logps/chosen": chosen_logps.mean(), "logps/rejected": rejected_logps.mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def step(policy, ref, pairs, cfg):
    """One batch of pairs to one loss: the only place where models meet the equation."""
    chosen_logps, rejected_logps = seq_logps(policy, pairs.chosen, pairs.rejected)  # (B,), (B,)
    with torch.no_grad():  # ref is a constant of the objective
        ref_chosen_logps, ref_rejected_logps = seq_logps(ref, pairs.chosen, pairs.rejected)
    return dpo_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=cfg.beta, label_smoothing=cfg.label_smoothing
    )


def main(cfg):
    """Run it; returns the run folder."""
    return train("dpo", cfg, step)
