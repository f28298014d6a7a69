"""Generalised preference optimisation (GPO): one loss, six functions. Tang et al. 2024, arXiv:2402.05749.

    L(θ) = E_{(x, y_w, y_l)}[ f(β·Δ) ],      Δ = log π_θ(y_w|x)/π_ref(y_w|x) − log π_θ(y_l|x)/π_ref(y_l|x)

    f                    f(x)              f(0)   f'(0)   f''(0)   |f''(0)/f'(0)|
    logistic             log(1 + e^−x)     .693   −½      ¼        ½     DPO
    hinge                max(0, 1 − x)     1      −1      0        0     SLiC's hinge, on log-ratios
    squared              (x − 1)²          1      −2      2        1     IPO at half the β
    exponential          e^−x              1      −1      1        1     the loss of AdaBoost
    truncated_quadratic  max(0, 1 − x)²    1      −2      2        1     the loss of an SVM
    savage               (1 + e^x)^−2      .25    −¼      ⅛        ½     not convex: f'' < 0 for x < −log 2

Symbols  y_w: the preferred answer → chosen; y_l: the other one → rejected; log π: log-prob of an answer → *_logps (B,); π_ref → ref.
Idea     To say which of two answers is better is binary classification with margin β·Δ, so f may be any classification loss. To first
         order in Δ all f agree up to a factor. The second-order term pulls back to ref: |f''(0)/f'(0)| says how strongly, at a given β.
Differs  from dpo.py: f is a setting. From ipo.py: β scales the margin instead of the target.
Details  Log-probs are summed over the answer, not averaged. The hinge has a reference here; the original SLiC (slic.py) has none.
         The exponential weights a pair by e^{−margin}, so a few wrong labels can dominate the gradient.
         --online: the policy samples the pairs and a reward labels them, as in dpo.py.
Law      If preferences follow Bradley-Terry on r, logistic and savage converge to π* ∝ ref·e^{r/β}, exponential to ref·e^{r/2β}, squared
         to ref·e^{2g/β} (g: see ipo.py). truncated_quadratic converges to the same as squared if no two g differ by more than ½;
         otherwise it has no closed form, and hinge has none. For small r, all except hinge converge to ref·e^{r/(2β·|f''(0)/f'(0)|)}.
Checked  tests/methods/test_gpo.py (table, gradients, laws, stationarity), test_against_trl.py, toy/tiny_language.py.

    python -m minialign gpo --f exponential                                  # built-in task, laptop CPU
    python -m minialign gpo --f savage --pairs pairs.jsonl --policy runs/sft/final
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minialign.engine.common import BadInput
from minialign.logps import seq_logps
from minialign.pairs import train
from minialign.settings import OnPairs


@dataclass
class Config(OnPairs):
    beta: float = 0.1               # β: strength of the pull to ref; with a small β the policy may move far from ref
    f: str = "logistic"             # logistic, hinge, squared, exponential, truncated_quadratic or savage
    precompute_ref: bool = False    # compute the reference's log-probs once, before step 1, and keep no second model while training

    def __post_init__(self):
        if self.f not in FUNCTIONS:
            raise BadInput(f"--f {self.f}: must be one of {', '.join(FUNCTIONS)}")


FUNCTIONS = {  # functions of x = β·Δ, applied elementwise
    "logistic": lambda x: F.softplus(-x),
    "hinge": lambda x: F.relu(1 - x),
    "squared": lambda x: (x - 1) ** 2,
    "exponential": lambda x: torch.exp(-x),
    "truncated_quadratic": lambda x: F.relu(1 - x) ** 2,
    "savage": lambda x: torch.sigmoid(-x) ** 2,
}


def gpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, f="logistic"):
    """All inputs (B,): log-probs summed over each completion, in nats. f: a key of FUNCTIONS. Returns the scalar loss, stats."""
    assert chosen_logps.dim() == 1 and chosen_logps.shape == rejected_logps.shape == ref_chosen_logps.shape == ref_rejected_logps.shape
    chosen_reward = beta * (chosen_logps - ref_chosen_logps)  # (B,) implicit reward, without a term that depends only on x
    rejected_reward = beta * (rejected_logps - ref_rejected_logps)  # (B,)
    margin = chosen_reward - rejected_reward  # (B,) the missing term would cancel here
    loss = FUNCTIONS[f](margin)
    stats = {
        "rewards/chosen": chosen_reward.mean(), "rewards/rejected": rejected_reward.mean(), "rewards/margins": margin.mean(),
        "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "logps/chosen": chosen_logps.mean(), "logps/rejected": rejected_logps.mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def regularisation(f):
    """(f(0), f'(0), f''(0)) of a key of FUNCTIONS, computed by autograd: the columns of the table above."""
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = FUNCTIONS[f](x)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, x) if slope.requires_grad else (torch.zeros(()),)  # the hinge's slope is a constant
    return value.item(), slope.item(), curvature.item()


def step(policy, ref, pairs, cfg):
    """Evaluate the models on one batch of pairs and compute the loss. Only this function connects models and equation."""
    chosen_logps, rejected_logps = seq_logps(policy, pairs.chosen, pairs.rejected)  # (B,), (B,)
    with torch.no_grad():  # ref is a constant of the objective
        ref_chosen_logps, ref_rejected_logps = seq_logps(ref, pairs.chosen, pairs.rejected)
    return gpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=cfg.beta, f=cfg.f)


def main(cfg):
    """Run the method and return the run folder."""
    return train("gpo", cfg, step)
