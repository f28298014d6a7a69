"""Odds-ratio preference optimisation (ORPO). Hong et al. 2024, arXiv:2403.07691, Eqs. 6 and 7 (its λ is our weight).

    L(θ) = E_{(x, y_w, y_l)}[ −ā_w − λ·log σ(log odds_w − log odds_l) ],      log odds = ā − log(1 − e^ā),   ā = log π_θ(y|x) / |y|

Symbols  y_w → chosen, y_l → rejected, ā → *_logps (B,), log-probs averaged over the tokens, λ → weight.
Idea     SFT raises the likelihood of the chosen answer and of whatever resembles it, the rejected one too. One more term, in the same step
         and without a reference, pushes the rejected one down: alignment in one stage instead of two.
Differs  from sft.py: a second term. From simpo.py: odds in the place of the likelihood itself, and SFT's term holds the policy.
Details  P(y|x) in the paper's odds is the average's e^ā, as its code has it: e to the sum would make 1 − P equal 1 for any real answer.
         log(1 − e^ā) is taken without cancellation, ā kept at −1e-7 or below. Only completions are scored: the released code and others put
         prompt tokens into the likelihood unless told not to.
         --online: the policy draws the pairs and a reward labels them, as in dpo.py.
Law      λ = 0, pairs drawn from μ, labelled with probability p(y ≻ y'): SFT on the winners, a short one counting more: π ∝ W(y)/|y|,
         W(y) = 2·μ(y)·E_{y'~μ} p(y ≻ y'). With λ > 0 there is no closed form. Never π*: ref and β do not occur.
Checked  tests/methods/test_orpo.py (worked numbers, gradient, stability, the limit and stationarity by enumeration), test_against_trl.py,
         toy/tiny_language.py.

    python -m minialign orpo                                                 # built-in task, laptop CPU
    python -m minialign orpo --pairs pairs.jsonl --policy runs/base/final --weight 0.25
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minialign.logps import mean_logps
from minialign.pairs import train
from minialign.settings import OnPairs


@dataclass
class Config(OnPairs):
    weight: float = 0.1             # λ: weight of the odds ratio; 0 is SFT on the chosen answers, each with the same weight
    lr: float = 3e-4                # peak learning rate of AdamW (for models with billions of weights: 5e-6)


def log_odds(mean_logps):
    """log(P / (1 − P)) of P = e^ā, ā (B,) ≤ 0. 1 − e^ā is −expm1(ā): exact for ā near 0 too, where e^ā is rounded to 1."""
    a = mean_logps.clamp(max=-1e-7)  # at 0 the odds are infinite
    return a - torch.log(-torch.expm1(a))


def orpo_loss(chosen_logps, rejected_logps, *, weight):
    """Both inputs (B,): log-probs averaged over the tokens of each completion, in nats. Returns the scalar loss, stats."""
    assert chosen_logps.dim() == 1 and chosen_logps.shape == rejected_logps.shape
    chosen_reward = log_odds(chosen_logps)  # (B,)
    rejected_reward = log_odds(rejected_logps)  # (B,)
    margin = chosen_reward - rejected_reward  # (B,)
    loss = -chosen_logps + weight * F.softplus(-margin)
    stats = {
        "rewards/chosen": chosen_reward.mean(), "rewards/rejected": rejected_reward.mean(), "rewards/margins": margin.mean(),
        "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "logps/chosen": chosen_logps.mean(), "logps/rejected": rejected_logps.mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def step(policy, ref, pairs, cfg):
    """One batch of pairs to one loss: the only place where models meet the equation."""
    chosen_logps, rejected_logps = mean_logps(policy, pairs.chosen, pairs.rejected)  # (B,), (B,)
    return orpo_loss(chosen_logps, rejected_logps, weight=cfg.weight)


def main(cfg):
    """Run it; returns the run folder."""
    return train("orpo", cfg, step)
