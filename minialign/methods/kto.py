"""Kahneman-Tversky optimisation (KTO): thumbs up or down, one answer at a time. Ethayarajh et al. 2024, arXiv:2402.01306, section 4.

    L(θ) = E_{(x, y)}[ λ_D·(1 − σ(β·(ρ − z₀))) if y is desirable, else λ_U·(1 − σ(β·(z₀ − ρ))) ],   ρ = log π_θ(y|x)/π_ref(y|x)
    z₀   = max(0, mean over a batch of log π_θ(y'|x)/π_ref(y'|x)),   y' = the answer of the previous row in the batch

Symbols  (→ name in the code) log π: log-prob of an answer → *_logps (B,); z₀ → kl; λ_D → desirable_weight; λ_U → undesirable_weight.
Idea     People feel gains and losses relative to a reference point, and each further gain or loss counts less. Here the reward of an answer
         is its log-ratio ρ. The reference point z₀ is how far the policy has moved on average. An answer is a gain if its ρ is above z₀.
Differs  from dpo.py: no pairs. A prompt needs no second answer, and one kind of answer may be far more frequent than the other.
Details  Log-probs are summed over the answer. For z₀ each prompt is paired with the answer of the previous row, mostly one to another
         prompt. That needs two more forward passes but no sampling. z₀ has no gradient and is the same in all micro-batches.
         With one prompt and answers sampled from ref the mean is −KL(ref‖π), so z₀ is 0. With other prompts the mean has either sign.
         The paper advises λ_D·n_D / (λ_U·n_U) in [1, 4/3] (n: the number of answers of that kind). The run prints this ratio.
         --value is what a gain x = β·(ρ − z₀), or β·(z₀ − ρ), is worth. KTO has σ(x). It replaces Tversky and Kahneman's "prospect" value,
         x^.88 for gains and −2.25·|x|^.88 for losses. The paper's ablations: "concave" log σ(x), "neutral" x itself, --no-z0 (compare with
         0), and --no-reference: ρ = log π, as if ref were uniform. No second model is in memory then, and z₀ is far below 0, mostly far
         below ρ too, because an answer to another prompt is unlikely.
Law      None in closed form, but for "neutral". Let a(y) be λ_D times how often y is labelled desirable, and b(y) λ_U times how often
         undesirable. KTO's loss is const − Σ (a − b)·σ(β·(ρ − z₀)). If some answers have a > b, however slightly, the probability of all
         others falls to 0, ever more slowly, even if nobody labelled them. If β < 1, those with a > b then share all the probability so
         that (a − b)·σ'(β·(ρ − z₀))/π is the same for each: while β is small, π ∝ a − b, whatever ref is. If β > 1, one of them that has
         become rare enough stays rare. "neutral": exactly π ∝ a − b if all a > b, for every β, ref and z₀; else it never rests.
         "concave": an answer that is ever liked keeps some probability. "prospect": an answer with a/b in [1/2.25, 2.25] is
         pulled to ρ = z₀ from both sides.
Checked  tests/methods/test_kto.py (worked numbers, gradient, z₀, stationarity by enumeration), test_against_trl.py, toy/three_actions.py.

    python -m minialign kto                                                  # built-in task, laptop CPU
    python -m minialign kto --feedback feedback.jsonl --policy runs/sft/final
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from minialign.data import encode_feedback, read_feedback, split_scorable
from minialign.engine.common import BadInput, Mean, batch_rows, eval_rows, held_out_passes, in_micro, lr_at, micro_batches, note, set_lr
from minialign.engine.look import first_look
from minialign.engine.opening import batches_of, encoded_once, open_optimizer, open_policy
from minialign.engine.run import Run
from minialign.logps import seq_logps
from minialign.lora import frozen_copy
from minialign.settings import Training
from minialign.task import builtin_feedback


@dataclass
class Config(Training):
    beta: float = 0.1               # β: how fast gains and losses saturate; with a small β the policy may move far from ref
    desirable_weight: float = 1.0   # λ_D: weight of the desirable answers
    undesirable_weight: float = 1.0  # λ_U: weight of the undesirable answers
    value: str = "logistic"         # what a gain is worth: logistic (KTO), prospect, concave or neutral
    z0: bool = True                 # compare with the reference point z₀; --no-z0 with 0
    reference: bool = True          # log π/ref; --no-reference takes log π in its place
    feedback: str = "builtin"       # rows of prompt + completion + label, or preferences: builtin, or a JSONL/JSON(.gz) file
    batch_size: int = 64            # answers per step, at least 2
    max_len: int = 256              # longest row in tokens, prompt and completion together; a longer one loses its end
    max_new: int = 64               # longest answer in samples.jsonl, in tokens

    def __post_init__(self):
        if self.value not in VALUES:
            raise BadInput(f"--value {self.value}: must be one of {', '.join(VALUES)}")


def prospect(x, *, power=0.88, aversion=2.25, near=1e-3):
    """−v(x) of Tversky and Kahneman 1992: v = x^power for gains, −aversion·|x|^power for losses. Within ±near a chord replaces the power,
    whose slope at 0 is infinite. Every run begins there."""
    size = torch.where(x < 0, -x, x)  # not abs, which has slope 0 at 0
    size = torch.where(size < near, size * near ** (power - 1), size.clamp(min=near) ** power)
    return torch.where(x < 0, aversion * size, -size)


VALUES = {  # what is lost at x = β·gain, applied elementwise
    "logistic": lambda x: 1 - torch.sigmoid(x),
    "prospect": prospect,
    "concave": lambda x: F.softplus(-x),
    "neutral": lambda x: -x,
}


def kto_loss(logps, ref_logps, desirable, kl, *, beta, desirable_weight=1.0, undesirable_weight=1.0, value="logistic"):
    """logps, ref_logps: (B,) log-probs summed over each completion, in nats; desirable: (B,) bool; kl: z₀, a scalar in nats, constant.
    value: a key of VALUES.

    Returns the scalar loss, stats. If the batch has no answer of a kind, the stats of that kind are left out.
    """
    assert logps.dim() == 1 and logps.shape == ref_logps.shape == desirable.shape
    logratio = logps - ref_logps  # (B,)
    gain = torch.where(desirable, logratio - kl, kl - logratio)  # (B,) nats above the reference point, or below it for undesirable answers
    lost = VALUES[value](beta * gain)
    loss = torch.where(desirable, desirable_weight * lost, undesirable_weight * lost)
    stats = {}
    for kind, rows in (("chosen", desirable), ("rejected", ~desirable)):
        if rows.any():
            stats |= {f"rewards/{kind}": beta * logratio[rows].mean(), f"logps/{kind}": logps[rows].mean()}
    stats["rewards/accuracies"] = ((gain > 0).float() + 0.5 * (gain == 0).float()).mean()
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def mismatched_kl(logps, ref_logps):
    """z₀ from the (B,) log-probs of answers to other prompts: max(0, mean log-ratio), detached. Without ref_logps the mean of logps."""
    if ref_logps is None:
        return logps.mean().detach()
    assert logps.dim() == 1 and logps.shape == ref_logps.shape
    return (logps - ref_logps).mean().clamp(min=0).detach()


@torch.no_grad()
def reference_point(policy, ref, rows, batch_of, size):
    """z₀ of encoded rows: each prompt gets the completion of the previous row. `size` rows go through each forward pass. ref: or None."""
    moved = [(x, rows[i - 1][1]) for i, (x, *_) in enumerate(rows)]  # row 0 gets the last row's
    logps, ref_logps = (model and in_micro(lambda micro, model=model: seq_logps(model, batch_of(moved, micro)), range(len(moved)), size,
                                           moved) for model in (policy, ref))  # (B,)
    return mismatched_kl(logps, ref_logps)


def step(policy, ref, batch, desirable, kl, cfg):
    """Evaluate the models on one batch of answers and compute the loss. Only this function connects models and equation."""
    logps = seq_logps(policy, batch)  # (B,)
    with torch.no_grad():  # ref is a constant of the objective
        ref_logps = seq_logps(ref, batch) if cfg.reference else torch.zeros_like(logps)
    return kto_loss(
        logps, ref_logps, desirable, kl, beta=cfg.beta, desirable_weight=cfg.desirable_weight, undesirable_weight=cfg.undesirable_weight,
        value=cfg.value,
    )


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("kto", cfg)
    cfg = run.cfg
    if cfg.z0 and cfg.batch_size < 2:
        raise BadInput("--batch_size 1: the reference point needs an answer to another prompt; use at least 2")
    policy, tokenizer = open_policy(run)
    run.same_input("data", cfg.feedback)

    def encode():
        feedback = builtin_feedback() if cfg.feedback == "builtin" else read_feedback(cfg.feedback, skip_bad=cfg.skip_bad)
        return encode_feedback(tokenizer, feedback, max_prompt=cfg.max_prompt, skip_bad=cfg.skip_bad)

    rows, held_out = split_scorable(encoded_once(encode), cfg.held_out, cfg.max_len)
    batch_of = batches_of(run, tokenizer)
    if cfg.z0 and len(rows) < 2:
        raise BadInput(f"{cfg.feedback}: one answer to train on; the reference point needs an answer to another prompt, so at least 2")
    if cfg.z0 and len(held_out) == 1:
        note("note: no eval/loss, because the reference point of a held-out answer needs a second one; a larger --held_out has more")

    n_desirable = sum(desirable for *_, desirable in rows)
    good, bad = cfg.desirable_weight * n_desirable, cfg.undesirable_weight * (len(rows) - n_desirable)
    shown = f"λ_D·n_D / (λ_U·n_U) = {good / bad:.2f}" if bad else "none undesirable"
    print(f"{n_desirable:,} of {len(rows):,} answers are desirable; {shown} (the paper advises 1 to 4/3)")

    def labels_of(source, picked):
        return torch.tensor([source[i][2] for i in picked], device=run.device)

    ref = frozen_copy(policy) if cfg.reference else None
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, optimizer=optimizer)
    first = batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed))
    first_look(run, tokenizer, rows, first, {"policy": policy, "ref": ref})
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_feedback(policy, ref, held_out, batch_of, labels_of, cfg) if len(held_out) > cfg.z0 else {})

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        asked = [rows[i] for i in picked]
        kl = reference_point(policy, ref, asked, batch_of, cfg.micro_batch) if cfg.z0 else torch.zeros(())  # one z₀ for all rows
        losses, stats = [], Mean()
        for micro in micro_batches(picked, rows, cfg):
            desirable = labels_of(rows, micro)
            loss, micro_stats = step(policy, ref, batch_of(rows, micro), desirable, kl, cfg)
            share = len(micro) / len(picked)  # the loss is a mean over answers: a micro-batch is weighted by its number of answers
            loss = loss * share
            loss.backward()
            losses.append(loss.detach())
            for kind, weight in (("chosen", int(desirable.sum())), ("rejected", int((~desirable).sum())), ("accuracies", len(micro))):
                stats.add({name: value for name, value in micro_stats.items() if name.endswith(kind)}, weight=weight)
        total = run.sum(losses)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_update(k, policy, picked, total, grad_norm):
            optimizer.step()

        metrics = {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], "z0": kl, **stats.result()}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)


@torch.no_grad()
def held_out_feedback(policy, ref, rows, batch_of, labels_of, cfg):
    """Metrics over all held-out rows: the loss, and the share of answers on the right side of z₀, which is computed from these rows."""
    mixed = [rows[i] for i in batch_rows(len(rows), len(rows), 0, cfg.seed)]  # because in a file the previous row often has the same prompt
    mean, kl = Mean(), reference_point(policy, ref, mixed, batch_of, eval_rows(cfg)) if cfg.z0 else torch.zeros(())
    for picked, weight in held_out_passes(rows, cfg):
        loss, stats = step(policy, ref, batch_of(rows, picked), labels_of(rows, picked), kl, cfg)
        mean.add({"eval/loss": loss, "eval/accuracy": stats["rewards/accuracies"]}, weight=weight * len(picked))
    return mean.result()
