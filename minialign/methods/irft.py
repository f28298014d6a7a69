"""Implicit reward-learning fine-tuning (IRFT), SPIN inside. Li et al. 2024, "Getting More Juice Out of the SFT Data", Algorithm 2,
Eq. 6-7, with the loss of its released code; Chen et al. 2024 (SPIN), arXiv:2401.01335, Eq. 4.7.

    L(θ) = E_{(x,y)~D, ỹ~π_t(·|x)} [ h( β·( log π_θ(y|x)/π_ref(y|x) − log π_θ(ỹ|x)/π_ref(ỹ|x) ) ) ],     h(z) = log(1 + e^{−z})

Symbols  y → demo, ỹ → sample (the policy's own answer), π_t → old (the policy at the start of the round), π_ref → ref, T → rounds.
Idea     The policy is its own reward model, r = β·log π_θ/π_ref: raise the demonstration's reward above that of one's own answer.
         A reward learned from demonstrations alone.
Differs  from sft.py: the own answer is pushed down by name. From dpo.py: the rejected answer is not labelled by anyone, it is sampled.
         SPIN is rounds=1 with the default ref="round"; a second SPIN iteration is a second run from the first one's export (SPIN's
         own code also mixes in the first one's answers). rounds=T is T of them under one optimizer and one learning-rate schedule.
         Two separate choices make the family: how often to sample again (rounds), and what the reference is
         (ref="round": the policy at the start of the round, as the code of the paper runs; ref="initial": fixed, as Eq. 6 prints it).
Details  Log-probs are summed over the completion, not averaged. The own answer carries EOS only if the policy emitted it.
         h="logistic" is the loss above, "hinge" max(0, 1 − z), "identity" −z. The paper's h = log σ with σ(t) = log(1 + e^{−t})
         reads as log log; softplus(−z) is what was run, and what is meant (docs/ERRATA.md).
         max_len cuts the demonstration, max_new the own answer.
         With fresh samples (rounds = steps, tau = 1) and ref = policy, the expected gradient of "identity" is β times that of SFT on summed
         log-probs, that of "logistic" β/2 times: what IRFT adds comes only from stale samples, a reference that stays behind, and σ(−z).
Law      Full-support expert E, exact expectations (toy/three_actions.py, derived in toy/closed_form.py):
         fresh samples, fixed ref:  π ∝ E^{1/(1+β)} · ref^{β/(1+β)}, the geometric mixture, never E;
         one converged round:       π ∝ ref · (E/π_t)^{1/β}, which for ref = π_t extrapolates past E when β < 1.
Checked  tests/methods/test_irft.py (worked numbers, gradients by enumeration, SPIN equality), toy/three_actions.py (the laws).

    python -m minialign irft                                                 # SPIN on the built-in task, laptop CPU
    python -m minialign irft --rounds 5                                      # IRFT
    python -m minialign irft --demos demos.jsonl --policy runs/sft/final
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from minialign.batch import collate
from minialign.common import BadInput, Mean, batch_rows, cli, derive_seed, exit_codes, lr_at, set_lr, split_micro
from minialign.data import builtin_demos, demo_batch, encode_demos, read_demonstrations, split_scorable
from minialign.evaluate import held_out_nll
from minialign.logps import seq_logps
from minialign.lora import frozen_copy
from minialign.remember import remember_round
from minialign.run import Run
from minialign.sample import sample


@dataclass
class Config:
    beta: float = 0.1               # β: reward for one nat of log-ratio; small β lets the policy go far from ref
    rounds: int = 1                 # T: how often the sampling policy is renewed; 1 is SPIN, steps is "fresh samples at every step"
    ref: str = "round"              # the reference: round (policy at the start of the round) or initial (never renewed)
    h: str = "logistic"             # logistic, hinge or identity
    precompute_ref: bool = False    # all of a round's answers and reference log-probs at its start: no second model is kept while training
    policy: str = "builtin"         # start from: builtin, a folder, a hub name
    demos: str = "builtin"          # demonstrations: builtin, or a JSONL/JSON(.gz) file
    steps: int = 60                 # optimizer steps, about K = steps / rounds of them in a round
    batch_size: int = 32            # rows per step
    micro_batch: int = 0            # rows per forward pass; 0 = all of the step's at once (fewer saves memory, changes nothing)
    lr: float = 3e-4                # peak learning rate of AdamW (for models with billions of weights: 5e-7)
    schedule: str = "cosine"        # cosine, linear or constant, after the warm-up
    warmup: float = 0.1             # share of the steps over which the learning rate rises
    weight_decay: float = 0.0       # AdamW's
    max_grad_norm: float = 1.0      # gradients longer than this are shortened to it
    max_len: int = 256              # most tokens of a row, prompt and completion; the end is cut off
    max_prompt: int | None = None   # most tokens of a prompt; its beginning is cut off
    max_new: int = 64               # most tokens of an own answer
    tau: float = 1.0                # sampling temperature
    greedy: bool = False            # own answers by the likeliest token instead of sampling
    held_out: float = 0.1           # the last share of the file, never trained on
    seed: int = 0                   # data order, samples
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16, float64, or mixed: float32 weights, bfloat16 arithmetic (needs torchrun)
    parallel: str = "fsdp"          # under torchrun: fsdp (each process holds a part of the weights) or ddp (all of them)
    activation_checkpointing: bool = False  # make activations again in the backward pass: less memory, a third more time
    lora: int = 0                   # rank of adapters that are trained in the place of the weights; 0 trains the weights
    lora_alpha: float = 16.0        # their products count lora_alpha / lora times
    log_every: int = 10             # steps between lines on the terminal
    eval_every: int = 20            # steps between evaluations on the held-out rows
    save_every: int = 50            # steps between checkpoints
    snapshots: bool = False         # export the model at every evaluation too, to snapshots/<step>/
    out: str = ""                   # run folder; default runs/irft-<time>
    resume: str = ""                # continue this run folder, bit for bit
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


def irft_loss(demo_logps, sample_logps, ref_demo_logps, ref_sample_logps, *, beta, h="logistic"):
    """All inputs (B,): log-probs summed over each completion, in nats. Returns the scalar loss, stats. Raises BadInput for another h."""
    assert demo_logps.dim() == 1 and demo_logps.shape == sample_logps.shape == ref_demo_logps.shape == ref_sample_logps.shape
    demo_reward = beta * (demo_logps - ref_demo_logps)  # (B,) implicit reward, up to a term in x only
    sample_reward = beta * (sample_logps - ref_sample_logps)  # (B,)
    margin = demo_reward - sample_reward  # (B,) that term cancels here
    if h == "logistic":
        loss = F.softplus(-margin)
    elif h == "hinge":
        loss = F.relu(1 - margin)
    elif h == "identity":
        loss = -margin
    else:
        raise BadInput(f"h={h!r} is unknown: use logistic, hinge or identity")
    stats = {
        "rewards/demo": demo_reward.mean(), "rewards/sample": sample_reward.mean(), "rewards/margins": margin.mean(),
        "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "logps/demo": demo_logps.mean(), "logps/sample": sample_logps.mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def rollout(old, prompts_ids, cfg, eos_id, seed):
    """The policy's own answer to each prompt: ỹ ~ π_t. Every step of a round samples from the policy that began the round."""
    return sample(old, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, greedy=cfg.greedy, eos_id=eos_id, seed=seed)


def step(policy, ref, demos, samples, cfg):
    """One batch of demonstrations and own answers to one loss: the only place where models meet the equation."""
    demo_logps, sample_logps = seq_logps(policy, demos, samples)  # (B,), (B,)
    with torch.no_grad():  # ref is a constant of the objective
        ref_demo_logps, ref_sample_logps = seq_logps(ref, demos, samples)
    return irft_loss(demo_logps, sample_logps, ref_demo_logps, ref_sample_logps, beta=cfg.beta, h=cfg.h)


def main(cfg):
    """Run it; returns the run folder."""
    run = Run("irft", cfg)
    cfg = run.cfg
    if cfg.ref not in ("round", "initial"):
        raise BadInput(f"--ref {cfg.ref}: must be round or initial")
    if cfg.precompute_ref and cfg.ref == "initial":
        raise BadInput("--precompute_ref: --ref initial is asked about answers that are not drawn yet; drop one of the two")
    if cfg.rounds > cfg.steps:
        raise BadInput(f"--rounds {cfg.rounds}: there are only {cfg.steps} steps to divide into rounds")
    policy, tokenizer = run.open_policy(cfg.policy)
    run.same_input("data", cfg.demos)
    demos = builtin_demos() if cfg.demos == "builtin" else read_demonstrations(cfg.demos, skip_bad=cfg.skip_bad)
    rows, held_out = split_scorable(encode_demos(tokenizer, demos, max_prompt=cfg.max_prompt), cfg.held_out, cfg.max_len)
    run.check_context(policy, rows)

    def batch_of(source, picked):
        return demo_batch(source, picked, pad_id=tokenizer.pad_id, max_len=cfg.max_len).to(run.device)

    def answers_of(policy, k, picked):
        return rollout(policy, [rows[i][0] for i in picked], cfg, tokenizer.eos_id, derive_seed("irft", cfg.seed, k)).completions

    old = None if cfg.precompute_ref else frozen_copy(policy)  # π_t: the policy at the start of the round
    ref = old if cfg.ref == "round" else frozen_copy(policy)  # "round": the same object, renewed together with old
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    run.track(policy=policy, old=old, optimizer=optimizer)
    run.first_look(tokenizer, rows, batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed)), policy=policy, old=old,
                   ref=None if ref is old else ref)

    for k in run.steps(cfg.steps):
        t, t_before = k * cfg.rounds // cfg.steps, (k - 1) * cfg.rounds // cfg.steps
        if t != t_before and old is not None:  # a round begins
            old.load_state_dict(policy.state_dict())
        if old is None and (t != t_before or k == run.first_step):  # a round begins, or a resumed run enters one
            answers, ref = remember_round(run, policy, rows, batch_of, tokenizer, t, answers_of)

        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        completions = answers[k] if old is None else answers_of(old, k, picked)
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        total, stats = 0.0, Mean()
        for micro in split_micro(range(len(picked)), cfg.micro_batch):
            demo_rows = batch_of(rows, [picked[i] for i in micro])
            own = collate([rows[picked[i]][0] for i in micro], [completions[i] for i in micro], pad_id=tokenizer.pad_id)
            loss, micro_stats = step(policy, ref, demo_rows, own.to(run.device), cfg)
            share = len(micro) / len(picked)  # the loss is a mean over rows: a micro-batch counts by its rows
            (loss * share).backward()
            total += loss.item() * share
            stats.add(micro_stats, weight=share)
        total = run.sum(total)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.finite(k, policy, picked, total, grad_norm):
            optimizer.step()

        metrics = {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], "round": t, **stats.result()}
        metrics["completions/mean_length"] = sum(map(len, completions)) / len(completions)
        metrics["completions/finished"] = sum(ids[-1] == tokenizer.eos_id for ids in completions) / len(completions)
        if run.due(k):
            if held_out:
                metrics["eval/nll"] = held_out_nll(policy, held_out, batch_of, cfg.batch_size)
            run.log_samples(k, policy, tokenizer, [row[0] for row in (held_out or rows)[:4]])
            run.snapshot(k, policy, tokenizer)
        run.log(k, **metrics)
    return run.close(policy, tokenizer)


if __name__ == "__main__":
    import sys

    with exit_codes("minialign irft"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign irft", description=__doc__))
