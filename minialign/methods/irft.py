"""Implicit reward-learning fine-tuning (IRFT), which includes SPIN. Li et al. 2024, "Getting More Juice Out of the SFT Data", Algorithm 2,
Eq. 6-7, with the loss of its released code; Chen et al. 2024 (SPIN), arXiv:2401.01335, Eq. 4.7.

    L(θ) = E_{(x,y)~D, ỹ~π_t(·|x)} [ h( β·( log π_θ(y|x)/π_ref(y|x) − log π_θ(ỹ|x)/π_ref(ỹ|x) ) ) ],     h(z) = log(1 + e^{−z})

Symbols  y: demonstration → demo; ỹ: the policy's own answer → sample; π_t: policy at the start of the round → old; π_ref → ref; T → rounds.
Idea     There are demonstrations but no preferences. As in dpo.py the policy is its own reward model, with r = β·log π_θ/π_ref. Training
         raises the reward of a demonstration above the reward of the policy's own answer. So a reward is learned from demonstrations alone.
Differs  from sft.py: the loss makes the policy's own answer less likely. From dpo.py: no labels; the policy samples the rejected answer.
         One SPIN iteration is rounds=1 with the default ref="round". For a second iteration, start a second run from final/ (SPIN's own
         code also mixes in answers of the first). rounds=T is T iterations with one optimizer and one learning-rate schedule.
         Two separate choices define the family: how often to sample again (rounds), and what the reference is
         (ref="round": the policy at the start of the round, as in the released code; ref="initial": fixed, as printed in Eq. 6).
Details  Log-probs are summed over the completion, not averaged. The policy's own answer has an EOS only if the policy emitted it.
         h="logistic" is the loss above, "hinge" is max(0, 1 − z), "identity" is −z. The paper has h = log σ with σ(t) = log(1 + e^{−t}),
         which is a log of a log. Its code has softplus(−z), as intended (docs/ERRATA.md). max_len cuts demo, max_new cuts sample.
         With fresh samples (rounds = steps, tau = 1) and ref = policy, the expected gradient of "identity" is β times that of SFT on
         summed log-probs; for "logistic" it is β/2 times. IRFT differs from SFT only by stale samples, a reference that lags, and σ(−z).
Law      For an expert E with full support and exact expectations (toy/three_actions.py, derived in toy/closed_form.py):
         fresh samples, fixed ref:  π ∝ E^{1/(1+β)} · ref^{β/(1+β)}, the geometric mixture, never E (E if ref = π_t at every step);
         one converged round:       π ∝ ref · (E/π_t)^{1/β}. With ref = π_t and β < 1 this goes beyond E.
Checked  tests/methods/test_irft.py (worked numbers, gradients by enumeration, SPIN equality), toy/three_actions.py (the laws).

    python -m minialign irft                                                 # SPIN on the built-in task, laptop CPU
    python -m minialign irft --rounds 5                                      # IRFT
    python -m minialign irft --demos demos.jsonl --policy runs/sft/final
"""

import functools
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from minialign.batch import collate
from minialign.engine.common import BadInput, Mean, batch_rows, derive_seed, in_micro, lr_at, micro_batches, set_lr
from minialign.engine.look import first_look
from minialign.engine.opening import check_context, open_demos, open_optimizer, open_policy
from minialign.engine.run import Run
from minialign.evaluate import held_out_nll
from minialign.logps import Remembered, seq_logps
from minialign.lora import frozen_copy
from minialign.sample import drawn_with, sample
from minialign.settings import OnDemonstrations


@dataclass
class Config(OnDemonstrations):
    beta: float = 0.1               # β: reward for one nat of log-ratio; with a small β the policy may move far from ref
    rounds: int = 1                 # T: number of rounds; each samples from the policy at its start. 1: SPIN; T = steps: always fresh
    ref: str = "round"              # the reference: round (the policy at the start of the round) or initial (never updated)
    h: str = "logistic"             # logistic, hinge or identity
    precompute_ref: bool = False    # compute a round's answers and reference log-probs when it begins, and keep no second model
    tau: float = 1.0                # sampling temperature
    greedy: bool = False            # choose the most likely token in own answers instead of sampling
    steps: int = 60                 # optimizer steps; each round has about K = steps / rounds of them
    log_every: int = 10
    eval_every: int = 20
    save_every: int = 50


def irft_loss(demo_logps, sample_logps, ref_demo_logps, ref_sample_logps, *, beta, h="logistic"):
    """All inputs (B,): log-probs summed over each completion, in nats. Returns the scalar loss, stats. Raises BadInput for another h."""
    assert demo_logps.dim() == 1 and demo_logps.shape == sample_logps.shape == ref_demo_logps.shape == ref_sample_logps.shape
    demo_reward = beta * (demo_logps - ref_demo_logps)  # (B,) implicit reward, without a term that depends only on x
    sample_reward = beta * (sample_logps - ref_sample_logps)  # (B,)
    margin = demo_reward - sample_reward  # (B,) the missing term would cancel here
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
    """The policy's own answer to each prompt: ỹ ~ π_t. Every step of a round samples from the policy at the start of the round."""
    return sample(old, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, greedy=cfg.greedy, eos_id=eos_id, seed=seed)


def draw_together(old, k, rows, cfg, eos_id):
    """{step: own answers} of step k and of the steps that are drawn with it."""
    steps = drawn_with(k, old, rows, cfg)
    picked = {j: batch_rows(len(rows), cfg.batch_size, j, cfg.seed) for j in steps}
    seeds = [derive_seed("irft", cfg.seed, j) for j in steps for _ in range(cfg.batch_size)]
    answers = rollout(old, [rows[i][0] for j in steps for i in picked[j]], cfg, eos_id, seeds).completions
    return {j: answers[n * cfg.batch_size : (n + 1) * cfg.batch_size] for n, j in enumerate(steps)}


def step(policy, ref, demos, samples, cfg):
    """Evaluate the models on demonstrations and own answers and compute the loss. Only this function connects models and equation."""
    demo_logps, sample_logps = seq_logps(policy, demos, samples)  # (B,), (B,)
    with torch.no_grad():  # ref is a constant of the objective
        ref_demo_logps, ref_sample_logps = seq_logps(ref, demos, samples)
    return irft_loss(demo_logps, sample_logps, ref_demo_logps, ref_sample_logps, beta=cfg.beta, h=cfg.h)


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("irft", cfg)
    cfg = run.cfg
    if cfg.ref not in ("round", "initial"):
        raise BadInput(f"--ref {cfg.ref}: must be round or initial")
    if cfg.precompute_ref and cfg.ref == "initial":
        raise BadInput("--precompute_ref: --ref initial must evaluate answers that are sampled later; drop one of the two")
    if cfg.rounds > cfg.steps:
        raise BadInput(f"--rounds {cfg.rounds}: there are only {cfg.steps} steps to divide into rounds")
    policy, tokenizer = open_policy(run)
    rows, held_out, batch_of = open_demos(run, tokenizer)
    check_context(run, policy, rows)

    drawn = {}  # {step: own answers} of the steps that were drawn together

    def answers_at(old, k):
        """The own answers of step k by the policy at the start of its round. On a GPU those of several steps are drawn together."""
        if k not in drawn:
            drawn.clear()
            drawn.update(draw_together(old, k, rows, cfg, tokenizer.eos_id))
        return drawn[k]

    old = None if cfg.precompute_ref else frozen_copy(policy)  # π_t: the policy at the start of the round
    ref = old if cfg.ref == "round" else frozen_copy(policy)  # "round": the same object, updated together with old
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, old=old, optimizer=optimizer)
    first_look(run, tokenizer, rows, batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed)),
               {"policy": policy, "old": old, "ref": None if ref is old else ref})
    run.at_evaluation(policy, tokenizer, held_out or rows, lambda: held_out_nll(policy, held_out, batch_of, cfg))

    for k in run.steps(cfg.steps):
        t, t_before = k * cfg.rounds // cfg.steps, (k - 1) * cfg.rounds // cfg.steps
        if t != t_before and old is not None:  # a round begins
            old.load_state_dict(policy.state_dict())
        if old is None and (t != t_before or k == run.first_step):  # a round begins, or a resumed run enters one
            answers, ref = remember_round(run, policy, rows, batch_of, tokenizer, t, answers_at)

        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        completions = answers[k] if old is None else answers_at(old, k)
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        losses, stats = [], Mean()
        both = [(*rows[i], own) for i, own in zip(picked, completions, strict=True)]  # prompt, demonstration, own answer
        for micro in micro_batches(range(len(both)), both, cfg):
            demo_rows = batch_of(both, micro)
            own = collate([both[i][0] for i in micro], [both[i][2] for i in micro], pad_id=tokenizer.pad_id)
            loss, micro_stats = step(policy, ref, demo_rows, own.to(run.device), cfg)
            share = len(micro) / len(picked)  # the loss is a mean over rows: a micro-batch is weighted by its number of rows
            loss = loss * share
            loss.backward()
            losses.append(loss.detach())
            stats.add(micro_stats, weight=share)
        total = run.sum(losses)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_update(k, policy, picked, total, grad_norm):
            optimizer.step()

        metrics = {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], "round": t, **stats.result()}
        metrics["completions/mean_length"] = sum(map(len, completions)) / len(completions)
        metrics["completions/finished"] = sum(ids[-1] in tokenizer.eos_ids for ids in completions) / len(completions)
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)


def remember_round(run, policy, rows, batch_of, tokenizer, t, answers_at):
    """For --precompute_ref, called when round t begins: ({step: own answers of the policy}, the reference as a Remembered model).

    answers_at(policy, step) -> completions for the step's prompts. batch_of(rows, picked) -> Batch of demonstrations.
    """
    cfg = run.cfg
    steps = [k for k in range(cfg.steps) if k * cfg.rounds // cfg.steps == t]
    picked = {k: batch_rows(len(rows), cfg.batch_size, k, cfg.seed) for k in steps}

    def sides(k, completions):
        own = collate([rows[i][0] for i in picked[k]], completions, pad_id=tokenizer.pad_id)
        return batch_of(rows, picked[k]), own.to(run.device)

    def compute(k):
        completions = answers_at(policy, k)
        logps = [in_micro(functools.partial(seq_logps, policy), side, cfg.micro_batch).tolist() for side in sides(k, completions)]
        return {"answers": completions, "logps": logps}

    print(f"round {t}: own answers and the reference's log-probs of {len(steps):,} steps with {cfg.batch_size} rows", flush=True)
    answers, ref, earlier = {}, Remembered(), run.folder / f"rounds/{t:06d}.json"  # runs of earlier versions have a whole round in one file
    whole = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else None
    for i, k in enumerate(steps):  # a file for each step: a run that is killed here loses only the step that it was at
        file = f"rounds/{t:06d}/{k:06d}.json"
        made = {name: whole[name][i] for name in whole} if whole else run.compute_or_read(file, steps[0], functools.partial(compute, k))
        answers[k] = made["answers"]
        for side, logps in zip(sides(k, answers[k]), made["logps"], strict=True):
            ref.learn(side, torch.tensor(logps, dtype=torch.promote_types(run.dtype, torch.float32)))
    return answers, ref
