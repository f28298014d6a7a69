"""Simple preference optimisation (SimPO). Meng et al. 2024, arXiv:2405.14734, Eq. 6 (its β is our scale, its γ our target_margin).

    L(θ) = −E_{(x, y_w, y_l)}[ log σ(scale·(ā_w − ā_l) − γ) ],      ā = log π_θ(y|x) / |y|

Symbols  (→ name in the code) x: prompt; y_w: the preferred answer → chosen; y_l: the other one → rejected; π_θ: the trained policy;
         ā: log-prob of an answer, averaged over its |y| tokens → *_logps (B,); γ → target_margin.
Idea     During generation, candidate answers are often ranked by their average log-prob per token. SimPO takes this average, times scale,
         as the reward of an answer. So it needs no reference, and an answer is not better just because it is long. It is not enough that
         the chosen answer has the larger reward: its reward should be larger by the margin γ.
Differs  from dpo.py: average log-probs instead of log-ratios, no reference, and a target margin. From orpo.py: no likelihood term.
Details  There is no reference and no likelihood term, so only the learning rate (3e-7 to 1e-6 in the paper) and the number of steps limit
         how far the policy moves. A learning rate of 1e-5 ruins a large model. The paper's ratio γ/β is target_margin / scale.
         --online: the policy samples the pairs and a reward labels them, as in dpo.py.
Law      If the preferences follow Bradley-Terry on r and γ = 0, the fixed point is π = e^{|y|·(r − c)/scale}, with the c for which π sums
         to 1. It does not depend on the policy before training. With γ > 0 there is no closed form.
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
    lr: float = 3e-4                # peak learning rate (for models with billions of weights: 6e-7)


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
    """Evaluate the models on one batch of pairs and compute the loss. Only this function connects models and equation."""
    chosen_logps, rejected_logps = mean_logps(policy, pairs.chosen, pairs.rejected)  # (B,), (B,)
    return simpo_loss(chosen_logps, rejected_logps, scale=cfg.scale, target_margin=cfg.target_margin)


def main(cfg):
    """Run the method and return the run folder."""
    return train("simpo", cfg, step)
