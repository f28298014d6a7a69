"""Intuitive fine-tuning (IFT; not instruction fine-tuning). Hua et al. 2024, arXiv:2405.11870, Algorithm 1, as its released code runs.

    L(θ) = (1/B) Σ_b Σ_t (w_t / n)·ℓ_t,       ℓ_t = −log π_θ(y_t | ê_x, ê_{<t}),       ê_t = (1 − λ)·e(y_t) + λ·e(ỹ_t)
           w_t = n·c_t / Σ_s c_s,              c_t = Σ_{i≥t} γ^{i−t}·ℓ_i,               ỹ_t = argmax_a π_θ(a | x, y_{<t})

Symbols  (→ name in the code) e: embedding of a token; ỹ_t: the policy's guess of y_t; λ → mix; γ → decay; n: tokens of a completion;
         ℓ: token losses, −logps (B, T); c: discounted sum of the losses from t on (B, T); w → weights (B, T), mean 1 per completion.
Idea     In SFT the policy reads only the demonstration, never its own mistakes. Here its own guesses are mixed into the input embeddings,
         so it reads some of its mistakes, without sampling. Also, a token's weight includes the losses of the tokens that follow it, so
         tokens before a difficult place have more weight than those after it.
Differs  from sft.py: mixed inputs, weights, and a mean per completion, not over tokens. With λ = 0 and γ = 0 it is SFT with that mean.
         From irft.py: there are no samples and no reference, only one extra forward pass without gradient.
Details  γ = 0 means w = 1, as in the released code. The limit γ → 0 of the formula is different: w_t ∝ ℓ_t.
         detach_weights: the paper describes w as weights, so by default they are constants. The released code differentiates them
         (--no-detach_weights), which makes some tokens *less* likely. In the paper's listing, ℓ comes from the pass without gradient, so
         backward fails. Its Eq. 22, a double sum, gives *later* tokens more weight; the code, Algorithm 1 and this file give *earlier*
         tokens more (docs/ERRATA.md).
         Prompts keep their own embeddings. A token in the completion that is not scored still counts in the exponent of γ.
         The released code also freezes the input embeddings at their initial values. Here they are trained like everything else.
Law      Completions of one token: the expert E, as in SFT. Longer ones, with λ = 0 and constant weights: π(a|s) ∝ E(a|s)·E[w_t/n | s, a]
         for token a after prefix s, seldom E (toy/closed_form.py, ift_law). Of two, the first gains if it is rare or little loss follows.
Checked  tests/methods/test_ift.py (worked numbers in both modes, holes, gradients, what is fed in), toy/tiny_language.py (the law).

    python -m minialign ift                                                  # built-in task, laptop CPU
    python -m minialign ift --demos demos.jsonl --policy runs/base/final --max_len 512
    python -m minialign ift --mix 0 --decay 0                                # SFT in which every completion has the same weight
"""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.engine import tracking
from minialign.engine.common import Mean, batch_rows, lr_at, micro_batches, set_lr
from minialign.engine.look import first_look
from minialign.engine.opening import open_demos, open_optimizer, open_policy
from minialign.engine.run import Run
from minialign.evaluate import held_out_nll
from minialign.kernels.linear_logprob import logits_of
from minialign.logps import CHUNK_ROWS, token_logps
from minialign.settings import OnDemonstrations


@dataclass
class Config(OnDemonstrations):
    mix: float = 0.2                # λ: share of the policy's own guess in each input embedding; 0 uses the demonstration only
    decay: float = 0.95             # γ: how strongly a token's weight includes the losses of later tokens; 0 makes all weights 1
    detach_weights: bool = True     # treat the weights as constants; off: differentiate them, as the released code does
    steps: int = 150                # optimizer steps


def ift_loss(logps, mask, *, decay, detach_weights=True):
    """logps, mask: (B, T), decay in [0, 1]. Returns the scalar loss, stats. A row with nothing scored has loss 0.

    ℓ = 1, 2, .5, 4 with decay .95: c = 6.781, 6.085, 4.3, 4 and w = 1.281, 1.150, .813, .756; loss Σ w·ℓ / 4 = 1.753.
    """
    assert logps.dim() == 2 and logps.shape == mask.shape, (logps.shape, mask.shape)
    mask = mask.bool()
    losses = -torch.where(mask, logps, 0)  # (B, T) ℓ
    sizes = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1) n
    suffix, columns = torch.zeros_like(losses[:, 0]), []
    for t in reversed(range(losses.shape[1])):
        suffix = losses[:, t] + decay * suffix  # (B,) c_t
        columns.append(suffix)
    weights = torch.where(mask, torch.stack(columns[::-1], dim=1), 0)  # (B, T)
    weights = weights * sizes / weights.sum(1, keepdim=True).clamp(min=1e-12)  # mean 1
    if decay == 0:
        weights = mask.to(losses)
    weights = weights.detach() if detach_weights else weights
    loss = (losses * weights / sizes).sum(1)  # (B,)
    stats = {"nll": losses.sum() / mask.sum().clamp(min=1), "weights/first": weights.gather(1, mask.int().argmax(1, keepdim=True)).mean()}
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def lookahead_embeds(policy, batch, *, mix):
    """(B, T, C): the embeddings of batch.inputs. Those of completion tokens are mixed with the embeddings of the policy's greedy guesses.

    The guess for inputs[:, t] is the prediction at t − 1 from demonstrated tokens only. The guesses take one forward pass without gradient.
    """
    with torch.no_grad():
        tracking.count(policy, tracking.tokens_read(batch))
        hidden, head = policy.hidden(batch.inputs)[batch.mask], policy.head_weight[: policy.config.n_tokens]  # (scored, C), (V, C)
        guesses = torch.cat([logits_of(rows, head).argmax(-1) for rows in hidden.split(CHUNK_ROWS)])  # (scored,)
        further = batch.targets.masked_scatter(batch.mask, guesses)  # (B, T)
        further = torch.cat([batch.inputs[:, :1], further[:, :-1]], dim=1)  # target t − 1 is input t
    embeds = policy.embed(batch.inputs)
    return embeds + mix * (policy.embed(further) - embeds)  # at a prompt token both are the same, so it keeps its embedding


def step(policy, batch, cfg):
    """Evaluate the policy on one batch of demonstrations and compute the loss. Only this function connects model and equation."""
    embeds = lookahead_embeds(policy, batch, mix=cfg.mix) if cfg.mix else None  # (B, T, C); None: the inputs' own embeddings
    logps = token_logps(policy, batch, embeds=embeds)  # (B, T)
    return ift_loss(logps, batch.mask, decay=cfg.decay, detach_weights=cfg.detach_weights)


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("ift", cfg)
    cfg = run.cfg
    policy, tokenizer = open_policy(run)
    rows, held_out, batch_of = open_demos(run, tokenizer)
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, optimizer=optimizer)
    first_look(run, tokenizer, rows, batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed)), {"policy": policy})
    run.at_evaluation(policy, tokenizer, held_out or rows, lambda: held_out_nll(policy, held_out, batch_of, cfg))

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        losses, stats = [], Mean()
        for micro in micro_batches(picked, rows, cfg):
            batch = batch_of(rows, micro)
            loss, micro_stats = step(policy, batch, cfg)
            share = len(micro) / len(picked)  # the loss is a mean over rows: a micro-batch is weighted by its number of rows
            loss = loss * share
            loss.backward()
            losses.append(loss.detach())
            stats.add({"nll": micro_stats.pop("nll")}, weight=batch.mask.sum())  # a mean over tokens
            stats.add(micro_stats, weight=share)
        total = run.sum(losses)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_update(k, policy, picked, total, grad_norm):
            optimizer.step()

        metrics = {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)
