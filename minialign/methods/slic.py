"""Sequence likelihood calibration with human feedback (SLiC-HF), direct variant. Zhao et al. 2023, arXiv:2305.10425, section 2.

    L(θ) = E_{(x, y_w, y_l)}[ max(0, δ − log π_θ(y_w|x) + log π_θ(y_l|x)) − λ·log π_θ(y_ref|x) ]

Symbols  (→ name in the code) x: prompt; y_w: the preferred answer → chosen; y_l: the other one → rejected; y_ref: a good answer → target;
         π_θ: the trained policy; log π: log-prob of an answer → *_logps (B,); δ → delta; λ → weight.
Idea     The first term is a hinge: the chosen answer should be at least e^δ times as likely as the rejected one. Beyond this margin its
         gradient is 0. The second term raises the likelihood of a good answer, so that the policy stays a language model.
Differs  from dpo.py: there is no reference. The hinge has a constant gradient until the margin and then none; DPO's gradient fades instead.
         The lecture's "SLiC" (docs/ERRATA.md), a hinge on log-ratios to ref, is gpo.py with --f hinge.
         From orpo.py: log-probs are summed, not averaged, so a long answer has more weight in both terms.
Details  Log-probs are summed over the answer. y_ref is the chosen answer by default. With --demos FILE it is a row of that file, as many
         rows a step as pairs; the prompt is then the row's own. (eval/loss always takes the chosen answer.)
         The paper's other variant, sample-rank: answers of the SFT policy, ranked by a reward. `generate --keep best_worst` writes them.
         --online: the policy samples the pairs and a reward labels them, as in dpo.py.
Law      Pairs are drawn from μ and labelled with probability p. W(y) and L(y) are the shares of pairs in which y is chosen and rejected,
         D(y) its share among the y_ref (W by default). If π = D + (W − L)/λ is nowhere negative and no pair reaches the margin δ under it,
         it is the fixed point (with --demos, if each prompt is as frequent there as in the pairs). Otherwise, nearly always at the default
         λ, there is no closed form. The fixed point is never π* ∝ ref·e^{r/β} (dpo.py): ref and β do not occur in the loss.
Checked  tests/methods/test_slic.py (worked numbers, gradient, law, stationarity), test_against_trl.py, toy/tiny_language.py.

    python -m minialign slic                                                 # built-in task, laptop CPU
    python -m minialign generate --policy runs/sft/final --prompts p.jsonl --reward runs/rm/final --keep best_worst --out pairs.jsonl
    python -m minialign slic --pairs pairs.jsonl --policy runs/sft/final --delta 1 --weight 0.1 --demos demos.jsonl
"""

from dataclasses import dataclass

import torch.nn.functional as F

from minialign.logps import seq_logps
from minialign.pairs import train
from minialign.settings import OnPairs


@dataclass
class Config(OnPairs):
    delta: float = 1.0              # δ: by how many nats the chosen answer should be more likely
    weight: float = 0.1             # λ: weight of the likelihood of y_ref
    demos: str = ""                 # y_ref: demonstrations (builtin, or a file); default: the chosen answers


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
    """Evaluate the models on one batch of pairs and compute the loss. Only this function connects models and equation."""
    targets = [pairs.target] if pairs.target else []
    chosen_logps, rejected_logps, *target_logps = seq_logps(policy, pairs.chosen, pairs.rejected, *targets)  # (B,) each
    target_logps = target_logps[0] if targets else chosen_logps
    return slic_loss(chosen_logps, rejected_logps, target_logps, delta=cfg.delta, weight=cfg.weight)


def main(cfg):
    """Run the method and return the run folder."""
    return train("slic", cfg, step)
