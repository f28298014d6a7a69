"""Bradley-Terry reward model from preferences. Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, Eq. 1.

    L(φ) = −E[ log σ( r_φ(x, y_w) − r_φ(x, y_l) − m ) ] + c·E[ (r_φ(x, y_w) + r_φ(x, y_l))² ]

Symbols  y_w → chosen, y_l → rejected, r_φ → *_rewards (B,), m → margin, c → centre.
Idea     If P(y_w preferred) = σ(r(y_w) − r(y_l)), maximum likelihood recovers r up to a term in x only.
Differs  from dpo.py: the reward is a model of its own, a trunk with a scalar head, not the policy's log-ratio.
Details  The reward is read at the last token (EOS), found from lengths, never from ids. Only differences are identified: after
         training the mean reward of the chosen training answers is subtracted (config.reward_offset), so that they score 0 on
         average. centre > 0 pulls both rewards of a pair towards opposite signs instead; .01 is usual.
Law      With labels from r: r up to a constant per prompt. With chosen ~ P and rejected ~ Q: log P/Q up to a constant per prompt
         (the pairwise density-ratio lemma, toy/closed_form.py), which is what RFT and IRL use.
Checked  tests/methods/test_reward_model.py (worked numbers, shifts, gradient, the lemma by enumeration).

    python -m minialign reward_model                                         # built-in task, laptop CPU
    python -m minialign reward_model --pairs pairs.jsonl --policy runs/sft/final
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from minialign.common import Mean, batch_rows, cli, exit_codes, lr_at, set_lr, split_micro
from minialign.data import builtin_pairs, encode_pairs, pair_batch, read_preferences, split_scorable
from minialign.rewards import score
from minialign.run import Run


@dataclass
class Config:
    margin: float = 0.0             # m: by how much the chosen reward should exceed the rejected one
    centre: float = 0.0             # c: weight of the squared sum of a pair's rewards; .01 keeps rewards near 0
    policy: str = "builtin"         # whose trunk to start from: builtin, a folder, a hub name
    pairs: str = "builtin"          # preferences: builtin, or a JSONL/JSON(.gz) file
    steps: int = 150                # optimizer steps
    batch_size: int = 32            # pairs per step
    micro_batch: int = 0            # pairs per forward pass; 0 = all of the step's at once (fewer saves memory, changes nothing)
    lr: float = 1e-3                # peak learning rate of AdamW (for models with billions of weights: 3e-6)
    schedule: str = "cosine"        # cosine, linear or constant, after the warm-up
    warmup: float = 0.1             # share of the steps over which the learning rate rises
    weight_decay: float = 0.0       # AdamW's
    max_grad_norm: float = 1.0      # gradients longer than this are shortened to it
    max_len: int = 256              # most tokens of a row, prompt and completion; the end is cut off
    max_prompt: int | None = None   # most tokens of a prompt; its beginning is cut off
    held_out: float = 0.1           # the last share of the file, never trained on
    seed: int = 0                   # data order, new head
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16, float64, or mixed: float32 weights, bfloat16 arithmetic (needs torchrun)
    parallel: str = "fsdp"          # under torchrun: fsdp (each process holds a part of the weights) or ddp (all of them)
    activation_checkpointing: bool = False  # make activations again in the backward pass: less memory, a third more time
    lora: int = 0                   # rank of adapters that are trained in the place of the weights; 0 trains the weights
    lora_alpha: float = 16.0        # their products count lora_alpha / lora times
    log_every: int = 25             # steps between lines on the terminal
    eval_every: int = 50            # steps between evaluations on the held-out pairs
    save_every: int = 100           # steps between checkpoints
    snapshots: bool = False         # export the model at every evaluation too, to snapshots/<step>/
    out: str = ""                   # run folder; default runs/reward_model-<time>
    resume: str = ""                # continue this run folder, bit for bit
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


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
    """One batch of pairs to one loss: the only place where the model meets the equation."""
    chosen_rewards = score(reward_model, pairs.chosen)  # (B,)
    rejected_rewards = score(reward_model, pairs.rejected)  # (B,)
    return bradley_terry_loss(chosen_rewards, rejected_rewards, margin=cfg.margin, centre=cfg.centre)


def main(cfg):
    """Run it; returns the run folder."""
    run = Run("reward_model", cfg)
    cfg = run.cfg
    policy, tokenizer = run.open_policy(cfg.policy)
    run.same_input("data", cfg.pairs)
    pairs = builtin_pairs() if cfg.pairs == "builtin" else read_preferences(cfg.pairs, skip_bad=cfg.skip_bad)
    rows, held_out = split_scorable(encode_pairs(tokenizer, pairs, max_prompt=cfg.max_prompt), cfg.held_out, cfg.max_len)

    def batch_of(source, picked):
        return pair_batch(source, picked, pad_id=tokenizer.pad_id, max_len=cfg.max_len).to(run.device)

    torch.manual_seed(cfg.seed)  # the new head, whatever came before
    reward_model = policy.with_scalar_head() if policy.config.head == "lm" else policy
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    run.track(reward_model=reward_model, optimizer=optimizer)
    first = batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed))
    run.first_look(tokenizer, rows, first, reward_model=reward_model)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        total, stats = 0.0, Mean()
        for micro in split_micro(picked, cfg.micro_batch):
            loss, micro_stats = step(reward_model, batch_of(rows, micro), cfg)
            share = len(micro) / len(picked)  # the loss is a mean over pairs: a micro-batch counts by its pairs
            (loss * share).backward()
            total += loss.item() * share
            stats.add(micro_stats, weight=share)
        total = run.sum(total)
        grad_norm = clip_grad_norm_(reward_model.parameters(), cfg.max_grad_norm)
        if run.finite(k, reward_model, picked, total, grad_norm):
            optimizer.step()

        metrics = {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        if run.due(k):
            if held_out:
                chosen, rejected = all_scores(reward_model, held_out, batch_of, cfg.batch_size)
                loss, held_out_stats = bradley_terry_loss(chosen, rejected, margin=cfg.margin, centre=cfg.centre)
                metrics |= {"eval/loss": loss, "eval/accuracy": held_out_stats["rewards/accuracies"]}
            run.snapshot(k, reward_model, tokenizer)
        run.log(k, **metrics)

    chosen, _ = all_scores(reward_model, rows, batch_of, cfg.batch_size)
    reward_model.config.reward_offset += float(chosen.mean())  # a constant that Bradley-Terry cannot see
    return run.close(reward_model, tokenizer)


@torch.no_grad()
def all_scores(reward_model, rows, batch_of, batch_size):
    """The rewards of all chosen and of all rejected answers, (rows,) each."""
    chosen, rejected = [torch.zeros(0)], [torch.zeros(0)]
    for start in range(0, len(rows), batch_size):
        pairs = batch_of(rows, range(start, min(start + batch_size, len(rows))))
        chosen.append(score(reward_model, pairs.chosen).cpu())
        rejected.append(score(reward_model, pairs.rejected).cpu())
    return torch.cat(chosen), torch.cat(rejected)


if __name__ == "__main__":
    import sys

    with exit_codes("minialign reward_model"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign reward_model", description=__doc__))
