"""Sequence likelihood calibration with human feedback (SLiC-HF), direct variant. Zhao et al. 2023, arXiv:2305.10425, section 2.

    L(θ) = E_{(x, y_w, y_l)}[ max(0, δ − log π_θ(y_w|x) + log π_θ(y_l|x)) − λ·log π_θ(y_ref|x) ]

Symbols  y_w → chosen, y_l → rejected, y_ref → target, log π → *_logps (B,), δ → delta, λ → weight.
Idea     Of two answers the chosen one should be likelier, by e^δ at least; beyond that a pair is done and says no more. The likelihood of
         a good answer in a second term keeps the policy a language model.
Differs  from dpo.py: no reference, and a hinge: its pressure does not fade, it stops. The lecture's "SLiC", a hinge on log-ratios to ref,
         is gpo.py with f = hinge. From orpo.py: sums, not averages: a long answer weighs more in both terms.
Details  Log-probs are summed over the completion. y_ref is the chosen answer here; it may be any good one. The paper's other variant ranks
         samples of the SFT policy, which is this file on pairs made in that way.
         --online: the policy draws the pairs and a reward labels them, as in dpo.py.
Law      Pairs drawn from μ, labelled with probability p; W(y) and L(y): the shares with which y is the chosen and the rejected one. If
         π = W + (W − L)/λ is nowhere negative and no pair of it has reached δ, it is that. Else, and at the default λ nearly always, there
         is no closed form. Never π*: ref and β do not occur.
Checked  tests/methods/test_slic.py (worked numbers, gradient, law, stationarity), test_against_trl.py, toy/tiny_language.py.

    python -m minialign slic                                                 # built-in task, laptop CPU
    python -m minialign slic --pairs pairs.jsonl --policy runs/sft/final --delta 1 --weight 0.1
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from minialign.common import Mean, batch_rows, cli, exit_codes, lr_at, set_lr, split_micro
from minialign.data import pair_batch
from minialign.evaluate import held_out_pairs
from minialign.logps import seq_logps
from minialign.pairs import open_pairs, reference
from minialign.remember import remember_pairs
from minialign.run import Run


@dataclass
class Config:
    delta: float = 1.0              # δ: nats by which the chosen answer should be likelier
    weight: float = 0.1             # λ of the likelihood of the chosen answer
    policy: str = "builtin"         # start from: builtin, a folder, a hub name
    pairs: str = "builtin"          # preferences: builtin, or a JSONL/JSON(.gz) file
    online: bool = False            # both answers drawn from the policy, --reward chooses; of the pairs only the prompts are trained on
    reward: list[str] = field(default_factory=lambda: ["builtin"])  # with online: FILE.py:FUNCTION, a reward model, …: docs/DATA.md
    combine: str = "mean"           # with online: of several rewards mean, min, or warm (one reward model of averaged weights)
    reward_limit: float = 60.0      # with online: seconds that the reward may take for one batch
    tau: float = 1.0                # with online: sampling temperature
    steps: int = 100                # optimizer steps
    batch_size: int = 32            # pairs per step
    micro_batch: int = 0            # pairs per forward pass; 0 = all of the step's at once (fewer saves memory, changes nothing)
    lr: float = 3e-4                # peak learning rate of AdamW (for models with billions of weights: 5e-7)
    schedule: str = "cosine"        # cosine, linear or constant, after the warm-up
    warmup: float = 0.1             # share of the steps over which the learning rate rises
    weight_decay: float = 0.0       # AdamW's
    max_grad_norm: float = 1.0      # gradients longer than this are shortened to it
    max_len: int = 256              # most tokens of a row, prompt and completion; the end is cut off
    max_prompt: int | None = None   # most tokens of a prompt; its beginning is cut off
    max_new: int = 64               # most tokens of an answer: those of samples.jsonl, and those that online draws
    held_out: float = 0.1           # the last share of the file, never trained on
    seed: int = 0                   # data order, online's answers and their labels
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
    out: str = ""                   # run folder; default runs/slic-<time>
    resume: str = ""                # continue this run folder, bit for bit
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


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
    """One batch of pairs to one loss: the only place where models meet the equation."""
    chosen_logps, rejected_logps = seq_logps(policy, pairs.chosen, pairs.rejected)  # (B,), (B,)
    return slic_loss(chosen_logps, rejected_logps, chosen_logps, delta=cfg.delta, weight=cfg.weight)


def main(cfg):
    """Run it; returns the run folder."""
    run = Run("slic", cfg)
    cfg = run.cfg
    policy, tokenizer = run.open_policy(cfg.policy)
    rows, held_out, draw = open_pairs(run, policy, tokenizer)

    def batch_of(source, picked):
        return pair_batch(source, picked, pad_id=tokenizer.pad_id, max_len=cfg.max_len).to(run.device)

    ref = reference(policy, cfg)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    run.track(policy=policy, optimizer=optimizer)
    run.first_look(tokenizer, rows, batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed)), policy=policy, ref=ref)
    ref = remember_pairs(run, policy, ref, rows, held_out, batch_of)  # with --precompute_ref its log-probs, else ref itself

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        batch, metrics = draw(k, picked)
        if batch is None:  # online, and the reward failed
            continue
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        total, stats = 0.0, Mean()
        for micro in split_micro(range(len(batch)), cfg.micro_batch):
            loss, micro_stats = step(policy, ref, batch_of(batch, micro), cfg)
            share = len(micro) / len(batch)  # the loss is a mean over pairs: a micro-batch counts by its pairs
            (loss * share).backward()
            total += loss.item() * share
            stats.add(micro_stats, weight=share)
        total = run.sum(total)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.finite(k, policy, picked, total, grad_norm):
            optimizer.step()

        metrics |= {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        if run.due(k):
            if held_out:
                metrics |= held_out_pairs(lambda pairs: step(policy, ref, pairs, cfg), held_out, batch_of, cfg.batch_size)
            run.log_samples(k, policy, tokenizer, [row[0] for row in (held_out or rows)[:4]])
            run.snapshot(k, policy, tokenizer)
        run.log(k, **metrics)
    return run.close(policy, tokenizer)


if __name__ == "__main__":
    import sys

    with exit_codes("minialign slic"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign slic", description=__doc__))
