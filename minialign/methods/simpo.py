"""Simple preference optimisation (SimPO). Meng et al. 2024, arXiv:2405.14734, Eq. 6 (its β is our scale, its γ our target_margin).

    L(θ) = −E_{(x, y_w, y_l)}[ log σ(scale·(ā_w − ā_l) − γ) ],      ā = log π_θ(y|x) / |y|

Symbols  y_w → chosen, y_l → rejected, ā → *_logps (B,), log-probs averaged over the tokens, γ → target_margin.
Idea     Answers are often ranked by their average log-prob when they are decoded, so let that be the reward: no ref is needed, and a long
         answer is not better for being long. γ asks of every pair to be ordered by a margin, not just right.
Differs  from dpo.py: averages in the place of log-ratios, no reference, a target margin. From orpo.py: no likelihood term.
Details  Without a reference and without a likelihood nothing holds the policy but the learning rate (the paper's are 3e-7 to 1e-6) and the
         number of steps; a learning rate of 1e-5 ruins a large model. The paper's ratio γ/β is target_margin / scale.
         --online: the policy draws the pairs and a reward labels them, as in dpo.py.
Law      Preferences from Bradley-Terry on r, γ = 0: π ∝ e^{|y|·(r − c)/scale}, c such that it sums to 1; where training began is
         forgotten. With γ > 0 there is no closed form.
Checked  tests/methods/test_simpo.py (worked numbers, gradient, the law by enumeration), test_against_trl.py, toy/tiny_language.py.

    python -m minialign simpo                                                # built-in task, laptop CPU
    python -m minialign simpo --pairs pairs.jsonl --policy runs/sft/final
"""

from dataclasses import dataclass

import torch.nn.functional as F

from minialign.logps import mean_logps
from minialign.pairs import train
from minialign.settings import OnPairs


@dataclass
class Config(OnPairs):
    scale: float = 2.0              # the paper's β: nats of reward for each nat of average log-prob
    target_margin: float = 1.0      # γ: by how much the chosen reward should exceed the rejected one
    lr: float = 3e-4                # peak learning rate of AdamW (for models with billions of weights: 6e-7)


def simpo_loss(chosen_logps, rejected_logps, *, scale, target_margin):
    """Both inputs (B,): log-probs averaged over the tokens of each completion, in nats. Returns the scalar loss, stats."""
    assert chosen_logps.dim() == 1 and chosen_logps.shape == rejected_logps.shape
    chosen_reward = scale * chosen_logps  # (B,)
    rejected_reward = scale * rejected_logps  # (B,)
    margin = chosen_reward - rejected_reward  # (B,)
    loss = F.softplus(target_margin - margin)
    stats = {
        "rewards/chosen": chosen_reward.mean(), "rewards/rejected": rejected_reward.mean(), "rewards/margins": margin.mean(),
        "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "logps/chosen": chosen_logps.mean(), "logps/rejected": rejected_logps.mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def step(policy, ref, pairs, cfg):
    """One batch of pairs to one loss: the only place where models meet the equation."""
    chosen_logps, rejected_logps = mean_logps(policy, pairs.chosen, pairs.rejected)  # (B,), (B,)
    return simpo_loss(chosen_logps, rejected_logps, scale=cfg.scale, target_margin=cfg.target_margin)


def main(cfg):
    """Run it; returns the run folder."""
    return train("simpo", cfg, step)
