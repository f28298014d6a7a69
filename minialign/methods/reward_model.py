"""Bradley-Terry reward model from preferences. Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, Eq. 1.

    L(φ) = −E[ log σ( r_φ(x, y_w) − r_φ(x, y_l) − m ) ] + c·E[ (r_φ(x, y_w) + r_φ(x, y_l))² ]

Symbols  y_w: the preferred answer → chosen; y_l: the other → rejected; r_φ: rewards → *_rewards (B,); m → margin; c → centre.
Idea     If y_w is preferred with probability σ(r(y_w) − r(y_l)), maximum likelihood recovers r, up to a term that depends on x only.
Differs  from dpo.py: the reward is a separate model, a trunk with a scalar head, not the policy's log-ratio.
Details  The reward is read at the last token (EOS), found from lengths, never from ids. The loss determines only differences of rewards.
         So after training, the mean reward of the chosen training answers is subtracted (config.reward_offset): they then score 0 on
         average. centre > 0 also pulls the sum of the two rewards of a pair towards 0 during training; .01 is usual.
Law      If labels follow Bradley-Terry on r, the reward converges to r. If chosen ~ P and rejected ~ Q, it converges to log P/Q (the
         pairwise density-ratio lemma, toy/closed_form.py; rft.py and irl.py use it). Both hold up to a constant per prompt.
Checked  tests/methods/test_reward_model.py (worked numbers, shifts, gradient, the lemma by enumeration).

    python -m minialign reward_model                                         # built-in task, laptop CPU
    python -m minialign reward_model --pairs pairs.jsonl --policy runs/sft/final
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from minialign.engine.common import Mean, batch_rows, eval_rows, in_micro, lr_at, micro_batches, set_lr
from minialign.engine.look import first_look
from minialign.engine.opening import open_optimizer, open_policy
from minialign.engine.run import Run
from minialign.pairs import open_pairs
from minialign.rewards import score
from minialign.settings import Training


@dataclass
class Config(Training):
    margin: float = 0.0             # m: by how much the chosen reward should exceed the rejected one
    centre: float = 0.0             # c: weight of the squared sum of a pair's rewards; .01 keeps rewards near 0
    pairs: str = "builtin"          # preferences: builtin, or a JSONL/JSON(.gz) file
    steps: int = 150                # optimizer steps
    lr: float = 1e-3                # peak learning rate (for models with billions of weights: 3e-6)
    max_len: int = 256              # longest row in tokens, prompt and completion together; a longer one loses its end


def bradley_terry_loss(chosen_rewards, rejected_rewards, *, margin=0.0, centre=0.0):
    """chosen_rewards, rejected_rewards: (B,). Returns the scalar loss, stats."""
    assert chosen_rewards.dim() == 1 and chosen_rewards.shape == rejected_rewards.shape
    gap = chosen_rewards - rejected_rewards  # (B,)
    loss = F.softplus(-(gap - margin)) + centre * (chosen_rewards + rejected_rewards) ** 2  # (B,)
    stats = {
        "rewards/chosen": chosen_rewards.mean(), "rewards/rejected": rejected_rewards.mean(), "rewards/margins": gap.mean(),
        "rewards/accuracies": ((gap > 0).float() + 0.5 * (gap == 0).float()).mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def step(reward_model, pairs, cfg):
    """Evaluate the reward model on one batch of pairs and compute the loss. Only this function connects model and equation."""
    chosen_rewards = score(reward_model, pairs.chosen)  # (B,)
    rejected_rewards = score(reward_model, pairs.rejected)  # (B,)
    return bradley_terry_loss(chosen_rewards, rejected_rewards, margin=cfg.margin, centre=cfg.centre)


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("reward_model", cfg)
    cfg = run.cfg
    policy, tokenizer = open_policy(run)
    rows, held_out, batch_of, _ = open_pairs(run, tokenizer)
    torch.manual_seed(cfg.seed)  # the new head depends on the seed alone
    reward_model = policy.with_scalar_head() if policy.config.head == "lm" else policy
    del policy  # its trunk was copied
    optimizer = open_optimizer(cfg, reward_model)
    run.register(reward_model=reward_model, optimizer=optimizer)
    first = batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed))
    first_look(run, tokenizer, rows, first, {"reward_model": reward_model})

    def rewards_of(rows, side):  # (rows,)
        return in_micro(lambda micro: score(reward_model, getattr(batch_of(rows, micro), side)), range(len(rows)), eval_rows(cfg),
                        rows).cpu()

    def evaluate():
        if not held_out:
            return {}
        chosen, rejected = rewards_of(held_out, "chosen"), rewards_of(held_out, "rejected")
        loss, held_out_stats = bradley_terry_loss(chosen, rejected, margin=cfg.margin, centre=cfg.centre)
        return {"eval/loss": loss, "eval/accuracy": held_out_stats["rewards/accuracies"]}
    run.at_evaluation(reward_model, tokenizer, [], evaluate)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        losses, stats = [], Mean()
        for micro in micro_batches(picked, rows, cfg):
            loss, micro_stats = step(reward_model, batch_of(rows, micro), cfg)
            share = len(micro) / len(picked)  # the loss is a mean over pairs: a micro-batch is weighted by its number of pairs
            loss = loss * share
            loss.backward()
            losses.append(loss.detach())
            stats.add(micro_stats, weight=share)
        total = run.sum(losses)
        grad_norm = clip_grad_norm_(reward_model.parameters(), cfg.max_grad_norm)
        if run.may_update(k, reward_model, picked, total, grad_norm):
            optimizer.step()

        metrics = {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        run.end_of_step(k, metrics)

    reward_model.config.reward_offset += float(rewards_of(rows, "chosen").mean())  # a constant, which the loss leaves open
    return run.close(reward_model, tokenizer)
