"""Odds-ratio preference optimisation (ORPO). Hong et al. 2024, arXiv:2403.07691, Eqs. 6 and 7 (its λ is our weight).

    L(θ) = E_{(x, y_w, y_l)}[ −ā_w − λ·log σ(log odds_w − log odds_l) ],      log odds = ā − log(1 − e^ā),   ā = log π_θ(y|x) / |y|

Symbols  (→ name in the code) x: prompt; y_w: the preferred answer → chosen; y_l: the other one → rejected; π_θ: the trained policy;
         ā: log-prob of an answer, averaged over its |y| tokens → *_logps (B,); odds: P/(1 − P) with P = e^ā; λ → weight.
Idea     The first term is SFT on the chosen answers. Alone, it would also make similar answers more likely, and the rejected one is often
         similar. The second term lowers the odds of the rejected answer relative to those of the chosen one. Both terms are trained in
         the same step and without a reference, so alignment takes one stage instead of two.
Differs  from sft.py: the second term. From simpo.py: odds instead of likelihoods, and SFT's term limits how far the policy moves.
Details  P(y|x) in the paper's odds is computed from the average log-prob, P = e^ā, as in its code. With the sum instead, 1 − P would be
         practically 1 for any real answer. log(1 − e^ā) is computed without cancellation, and ā is clamped to at most −1e-7.
         Only completions are scored. The released code and other libraries include prompt tokens in the likelihood by default.
         --online: the policy samples the pairs and a reward labels them, as in dpo.py.
Law      Pairs are drawn from μ, and y is preferred to y' with probability p(y ≻ y'). With λ = 0 this is SFT on the chosen answers in
         which tokens of short answers have more weight: π ∝ W(y)/|y|, where W(y) = 2·μ(y)·E_{y'~μ} p(y ≻ y') is how often y is chosen.
         With λ > 0 there is no closed form. The fixed point is never π* ∝ ref·e^{r/β} (dpo.py): ref and β do not occur in the loss.
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
    weight: float = 0.1             # λ: weight of the odds-ratio term; 0 is SFT on the chosen answers, each with the same weight
    lr: float = 3e-4                # peak learning rate (for models with billions of weights: 5e-6)


def log_odds(mean_logps):
    """log(P / (1 − P)) of P = e^ā, for ā (B,) ≤ 0. 1 − e^ā is computed as −expm1(ā): exact even near 0, where e^ā rounds to 1."""
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
    """Evaluate the models on one batch of pairs and compute the loss. Only this function connects models and equation."""
    chosen_logps, rejected_logps = mean_logps(policy, pairs.chosen, pairs.rejected)  # (B,), (B,)
    return orpo_loss(chosen_logps, rejected_logps, weight=cfg.weight)


def main(cfg):
    """Run the method and return the run folder."""
    return train("orpo", cfg, step)
