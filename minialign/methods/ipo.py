"""Identity preference optimisation (IPO). Azar et al. 2023, arXiv:2310.12036, Eq. 17 (its τ is our β). Online: Guo et al. 2024.

    L(θ) = E_{(x, y_w, y_l)}[ (Δ − 1/(2β))² ],      Δ = log π_θ(y_w|x)/π_ref(y_w|x) − log π_θ(y_l|x)/π_ref(y_l|x)

Symbols  (→ name in the code) x: prompt; y_w: the preferred answer → chosen; y_l: the other one → rejected; π_θ: the trained policy;
         π_ref: the policy before training, frozen → ref; log π: log-prob of an answer → *_logps (B,); the paper's τ → beta.
Idea     Suppose everybody prefers y_w to y_l. Bradley-Terry explains this only by an infinite difference of their rewards, so DPO makes Δ
         larger and larger, however strong the pull to ref is. IPO does not maximise this difference (the logit of the preference). It
         maximises the probability that the policy's answer is preferred, which is at most 1. So Δ gets a finite target.
Differs  from dpo.py: the loss is the squared distance of Δ to 1/(2β), not −log σ. A pair whose Δ is beyond the target is pulled back.
Details  Log-probs are summed over the answer, as in the paper. Some libraries average them over the tokens. That is another method: its
         targets grow with the length of the answers.
         The table of GPO losses in the lecture (docs/ERRATA.md) has (β·Δ − 1)². That is β² times IPO at half the β: its target is 1/β.
         --online: the policy samples two answers per prompt. A reward prefers the first one with the Bradley-Terry probability σ(r₁ − r₂).
Law      Pairs are drawn from μ, and y is preferred to y' with probability p(y ≻ y'). Fixed point: π ∝ ref·e^{g/β}. Here g(y) = E_{y'~μ}
         p(y ≻ y') is how often y wins. It depends on μ (online: on π itself). log π/ref stays finite even where p is 0 or 1.
Checked  tests/methods/test_ipo.py (worked numbers, gradient, the laws by enumeration), test_against_trl.py, toy/tiny_language.py.

    python -m minialign ipo                                                  # built-in task, laptop CPU
    python -m minialign ipo --pairs pairs.jsonl --policy runs/sft/final
    python -m minialign ipo --online --reward runs/rm/final --pairs pairs.jsonl --policy runs/sft/final
"""

from dataclasses import dataclass

import torch

from minialign.logps import seq_logps
from minialign.pairs import train
from minialign.settings import OnPairs


@dataclass
class Config(OnPairs):
    beta: float = 0.1               # β: strength of the pull to ref; the target of Δ is 1/(2β) nats
    precompute_ref: bool = False    # compute the reference's log-probs once, before step 1, and keep no second model while training


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
    """All inputs (B,): log-probs summed over each completion, in nats. Returns the scalar loss, stats."""
    assert chosen_logps.dim() == 1 and chosen_logps.shape == rejected_logps.shape == ref_chosen_logps.shape == ref_rejected_logps.shape
    chosen_reward = beta * (chosen_logps - ref_chosen_logps)  # (B,) implicit reward, without a term that depends only on x
    rejected_reward = beta * (rejected_logps - ref_rejected_logps)  # (B,)
    margin = chosen_reward - rejected_reward  # (B,) the missing term would cancel here
    loss = (margin / beta - 1 / (2 * beta)) ** 2
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
    return ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=cfg.beta)


def main(cfg):
    """Run the method and return the run folder."""
    return train("ipo", cfg, step)
