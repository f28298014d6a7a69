"""Identity preference optimisation (IPO). Azar et al. 2023, arXiv:2310.12036, Eq. 17 (its τ is our β). Online: Guo et al. 2024.

    L(θ) = E_{(x, y_w, y_l)}[ (Δ − 1/(2β))² ],      Δ = log π_θ(y_w|x)/π_ref(y_w|x) − log π_θ(y_l|x)/π_ref(y_l|x)

Symbols  y_w → chosen, y_l → rejected, log π → *_logps (B,), the paper's τ → beta.
Idea     Bradley-Terry turns a preference that is always the same into an infinite difference of rewards, and DPO follows it there, past any
         pull to ref. IPO maximises not that logit but the probability of being preferred, which is at most 1: Δ has a target.
Differs  from dpo.py: a square around 1/(2β) in the place of −log σ: a pair beyond its target is pulled back.
Details  Log-probs are summed over the completion, as the paper's are. Averages per token, which some libraries take, are another method:
         its targets grow with the length of the answers.
         The lecture's table of GPO losses has (β·Δ − 1)², which is β²·IPO at half the β: its target is 1/β.
         --online: the pairs are two fresh answers of the policy, labelled by a reward with the Bradley-Terry probability σ(r₁ − r₂).
Law      Pairs drawn from μ, labelled with probability p(y ≻ y'): ref·e^{g/β}, g(y) = E_{y'~μ} p(y ≻ y'). It depends on μ (online: on the
         policy itself), and is finite even where p is 0 or 1.
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
    beta: float = 0.1               # β: the pull to ref; the target of Δ is 1/(2β) nats
    precompute_ref: bool = False    # compute the reference's log-probs once, before step 1, and keep no second model while training


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
    """All inputs (B,): log-probs summed over each completion, in nats. Returns the scalar loss, stats."""
    assert chosen_logps.dim() == 1 and chosen_logps.shape == rejected_logps.shape == ref_chosen_logps.shape == ref_rejected_logps.shape
    chosen_reward = beta * (chosen_logps - ref_chosen_logps)  # (B,) implicit reward, up to a term in x only
    rejected_reward = beta * (rejected_logps - ref_rejected_logps)  # (B,)
    margin = chosen_reward - rejected_reward  # (B,) that term cancels here
    loss = (margin / beta - 1 / (2 * beta)) ** 2
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
    return ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=cfg.beta)


def main(cfg):
    """Run it; returns the run folder."""
    return train("ipo", cfg, step)
