"""Direct preference optimisation (DPO). Rafailov et al. 2023, arXiv:2305.18290, Eq. 7. Online: Guo et al. 2024, arXiv:2402.04792.

    L(θ) = −E_{(x, y_w, y_l)}[ (1 − ε)·log σ(β·Δ) + ε·log σ(−β·Δ) ],      Δ = log π_θ(y_w|x)/π_ref(y_w|x) − log π_θ(y_l|x)/π_ref(y_l|x)

Symbols  (→ name in the code) x: prompt; y_w: the preferred answer → chosen; y_l: the other one → rejected; π_θ: the trained policy;
         π_ref: the policy before training, frozen → ref; log π: log-prob of an answer → *_logps (B,); ε → label_smoothing.
Idea     We want a policy with a high reward r that stays close to ref: the maximiser of E[r] − β·KL(π‖ref). It is π* ∝ ref·e^{r/β}. Solving
         for the reward gives r = β·log π*/ref plus a term that depends only on the prompt. Bradley-Terry says that y_w is preferred to
         y_l with probability σ(r(y_w) − r(y_l)), and in this difference the term cancels. So we write β·log π_θ/π_ref for r and fit the
         policy directly to the preferences, by maximum likelihood. No separate reward model and no RL are needed.
Differs  from reward_model.py: the reward is not a model of its own but the policy's log-ratio, β·log π_θ/π_ref. From irft.py: the rejected
         answer comes from labelled data; there the policy samples it.
Details  Log-probs are summed over the tokens of the answer, not averaged.
         label_smoothing is cDPO: it assumes that a share ε of the labels is flipped.
         The loss depends on Δ only. So both log-probs may fall, as long as the rejected one falls faster: watch the metric `logps/chosen`.
         --online: the policy samples two answers per prompt. A reward prefers the first one with the Bradley-Terry probability σ(r₁ − r₂).
         --rounds T (iterative DPO): the pairs stay, or with --online are new; at the start of each round ref becomes the policy so far. All
         rounds share one optimizer and one learning-rate schedule.
Law      If ε = 0 and preferences follow Bradley-Terry on r, the fixed point is π* ∝ ref·e^{r/β}, for every distribution of the pairs with
         full support, so also online. After T rounds, each trained to its end, it is ref·e^{T·r/β}. If instead labels never contradict
         each other, nothing in the loss stops Δ from growing.
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
    beta: float = 0.1               # β: strength of the pull to ref; with a small β the policy may move far from ref
    label_smoothing: float = 0.0    # ε: the share of labels assumed to be wrong, below 0.5
    precompute_ref: bool = False    # compute the reference's log-probs once, before step 1, and keep no second model while training


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, label_smoothing=0.0):
    """All inputs (B,): log-probs summed over each completion, in nats. Returns the scalar loss, stats."""
    assert chosen_logps.dim() == 1 and chosen_logps.shape == rejected_logps.shape == ref_chosen_logps.shape == ref_rejected_logps.shape
    chosen_reward = beta * (chosen_logps - ref_chosen_logps)  # (B,) implicit reward, without a term that depends only on x
    rejected_reward = beta * (rejected_logps - ref_rejected_logps)  # (B,)
    margin = chosen_reward - rejected_reward  # (B,) the missing term would cancel here
    loss = (1 - label_smoothing) * F.softplus(-margin) + label_smoothing * F.softplus(margin)
    stats = {
        "rewards/chosen": chosen_reward.mean(), "rewards/rejected": rejected_reward.mean(), "rewards/margins": margin.mean(),
        "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "logps/chosen": chosen_logps.mean(), "logps/rejected": rejected_logps.mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def step(policy, ref, pairs, cfg):
    """Evaluate the models on one batch of pairs and compute the loss. Only this function connects models and equation."""
    chosen_logps, rejected_logps = seq_logps(policy, pairs.chosen, pairs.rejected)  # (B,), (B,)
    with torch.no_grad():  # ref is a constant of the objective
        ref_chosen_logps, ref_rejected_logps = seq_logps(ref, pairs.chosen, pairs.rejected)
    return dpo_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=cfg.beta, label_smoothing=cfg.label_smoothing
    )


def main(cfg):
    """Run the method and return the run folder."""
    return train("dpo", cfg, step)
