"""Intuitive fine-tuning (IFT; not instruction fine-tuning). Hua et al. 2024, arXiv:2405.11870, Algorithm 1, as its released code runs.

    L(θ) = (1/B) Σ_b Σ_t (w_t / n)·ℓ_t,       ℓ_t = −log π_θ(y_t | ê_x, ê_{<t}),       ê_t = (1 − λ)·e(y_t) + λ·e(ỹ_t)
           w_t = n·c_t / Σ_s c_s,              c_t = Σ_{i≥t} γ^{i−t}·ℓ_i,               ỹ_t = argmax_a π_θ(a | x, y_{<t})

Symbols  e → embeddings of tokens, ỹ_t → the policy's own guess of y_t, λ → mix, γ → decay, n → tokens of the completion,
         ℓ → −logps (B, T), c → suffix sums (B, T), w → weights (B, T), of mean 1 in every completion.
Idea     A demonstration is read as the policy would have begun to write it: its inputs are mixed with its own guesses, so that it meets
         a little of its own mistakes without sampling. And a token answers, with its weight, for what follows it: steps before
         a difficulty count more than those after it.
Differs  from sft.py: mixed inputs, weights, and a mean per completion, not over tokens. With λ = 0 and γ = 0 it is SFT with that mean.
         From irft.py: no samples, no reference, one extra forward pass without gradient and nothing more.
Details  γ = 0 means w = 1, as in the released code; the limit γ → 0 of the formula is another thing, w_t ∝ ℓ_t.
         detach_weights: the paper reads w as weights, so they are constants by default. The released code lets the gradient run through
         them (--no-detach_weights): then a share of the tokens is pushed *down*. As printed, the listing takes ℓ from the pass
         without gradient: it has none at all, and backward fails. Eq. 22 printed as a double sum weights *later* tokens more, the code
         (and Algorithm 1) earlier ones; this is the code (docs/ERRATA.md).
         Prompts keep their own embeddings. A hole in the mask still advances the exponent of γ.
         The released code also freezes the input embeddings at their first values. Here they train like everything else.
Law      One token: SFT's, the expert. Several tokens, λ = 0, constant weights: π(a|s) ∝ E(a|s)·E[w_t/n | s, a], not the expert: a token
         counts by its share of its completion's c, so a first token gains that is rare, or that little loss follows
         (toy/closed_form.py, ift_law).
Checked  tests/methods/test_ift.py (worked numbers in both modes, holes, gradients, what is fed in), toy/tiny_language.py (the law).

    python -m minialign ift                                                  # built-in task, laptop CPU
    python -m minialign ift --demos demos.jsonl --policy runs/base/final --max_len 512
    python -m minialign ift --mix 0 --decay 0                                # SFT with every completion counting the same
"""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.common import Mean, batch_rows, cli, exit_codes, lr_at, set_lr, split_micro
from minialign.data import builtin_demos, demo_batch, encode_demos, read_demonstrations, split_scorable
from minialign.evaluate import held_out_nll
from minialign.kernels.linear_logprob import logits_of
from minialign.logps import CHUNK_ROWS, token_logps
from minialign.run import Run


@dataclass
class Config:
    mix: float = 0.2                # λ: share of the policy's own guess in each input embedding; 0 reads the demonstration alone
    decay: float = 0.95             # γ: how far a token answers for those after it; 0 is all weights 1
    detach_weights: bool = True     # weights are constants; off: differentiated, as the released code does
    policy: str = "builtin"         # start from: builtin, a folder, a hub name
    demos: str = "builtin"          # demonstrations: builtin, or a JSONL/JSON(.gz) file
    steps: int = 150                # optimizer steps
    batch_size: int = 32            # rows per step
    micro_batch: int = 0            # rows per forward pass; 0 = all of the step's at once (fewer saves memory, changes nothing)
    lr: float = 3e-4                # peak learning rate of AdamW (for models with billions of weights: 5e-7)
    schedule: str = "cosine"        # cosine, linear or constant, after the warm-up
    warmup: float = 0.1             # share of the steps over which the learning rate rises
    weight_decay: float = 0.0       # AdamW's
    max_grad_norm: float = 1.0      # gradients longer than this are shortened to it
    max_len: int = 256              # most tokens of a row, prompt and completion; the end is cut off
    max_prompt: int | None = None   # most tokens of a prompt; its beginning is cut off
    max_new: int = 64               # most tokens of a sample shown in samples.jsonl
    held_out: float = 0.1           # the last share of the file, never trained on
    seed: int = 0                   # data order, samples
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16, float64, or mixed: float32 weights, bfloat16 arithmetic (needs torchrun)
    parallel: str = "fsdp"          # under torchrun: fsdp (each process holds a part of the weights) or ddp (all of them)
    activation_checkpointing: bool = False  # make activations again in the backward pass: less memory, a third more time
    lora: int = 0                   # rank of adapters that are trained in the place of the weights; 0 trains the weights
    lora_alpha: float = 16.0        # their products count lora_alpha / lora times
    log_every: int = 25             # steps between lines on the terminal
    eval_every: int = 50            # steps between evaluations on the held-out rows
    save_every: int = 100           # steps between checkpoints
    snapshots: bool = False         # export the model at every evaluation too, to snapshots/<step>/
    out: str = ""                   # run folder; default runs/ift-<time>
    resume: str = ""                # continue this run folder, bit for bit
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


def ift_loss(logps, mask, *, decay, detach_weights=True):
    """logps, mask: (B, T), decay in [0, 1]. Returns the scalar loss, stats. A row with nothing scored has loss 0.

    ℓ = 1, 2, .5, 4 with decay .95: c = 6.780, 6.084, 4.3, 4 and w = 1.281, 1.150, .813, .756; loss Σ w·ℓ / 4 = 1.753.
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
    weights = weights * sizes / weights.sum(1, keepdim=True).clamp(min=1e-12)  # of mean 1
    if decay == 0:
        weights = mask.to(losses)
    weights = weights.detach() if detach_weights else weights
    loss = (losses * weights / sizes).sum(1)  # (B,)
    stats = {"nll": losses.sum() / mask.sum().clamp(min=1), "weights/first": weights.gather(1, mask.int().argmax(1, keepdim=True)).mean()}
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def lookahead_embeds(policy, batch, *, mix):
    """(B, T, C): the embeddings of batch.inputs, mixed with those of the policy's greedy guesses where the input is a completion token.

    The guess for inputs[:, t] is made at t − 1, from demonstrated tokens alone: one forward pass without gradient.
    """
    with torch.no_grad():
        hidden, head = policy.hidden(batch.inputs)[batch.mask], policy.head_weight[: policy.config.n_tokens]  # (scored, C), (V, C)
        guesses = torch.cat([logits_of(rows, head).argmax(-1) for rows in hidden.split(CHUNK_ROWS)])  # (scored,)
        further = batch.targets.masked_scatter(batch.mask, guesses)  # (B, T)
        further = torch.cat([batch.inputs[:, :1], further[:, :-1]], dim=1)  # target t − 1 is input t
    embeds = policy.embed(batch.inputs)
    return embeds + mix * (policy.embed(further) - embeds)  # a prompt token is its own guess, and stays what it is


def step(policy, batch, cfg):
    """One batch of demonstrations to one loss: the only place where the model meets the equation."""
    embeds = lookahead_embeds(policy, batch, mix=cfg.mix) if cfg.mix else None  # (B, T, C); None: the inputs' own
    logps = token_logps(policy, batch, embeds=embeds)  # (B, T)
    return ift_loss(logps, batch.mask, decay=cfg.decay, detach_weights=cfg.detach_weights)


def main(cfg):
    """Run it; returns the run folder."""
    run = Run("ift", cfg)
    cfg = run.cfg
    policy, tokenizer = run.open_policy(cfg.policy)
    run.same_input("data", cfg.demos)
    demos = builtin_demos() if cfg.demos == "builtin" else read_demonstrations(cfg.demos, skip_bad=cfg.skip_bad)
    rows, held_out = split_scorable(encode_demos(tokenizer, demos, max_prompt=cfg.max_prompt), cfg.held_out, cfg.max_len)

    def batch_of(source, picked):
        return demo_batch(source, picked, pad_id=tokenizer.pad_id, max_len=cfg.max_len).to(run.device)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    run.track(policy=policy, optimizer=optimizer)
    run.first_look(tokenizer, rows, batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed)), policy=policy)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        total, stats = 0.0, Mean()
        for micro in split_micro(picked, cfg.micro_batch):
            batch = batch_of(rows, micro)
            loss, micro_stats = step(policy, batch, cfg)
            share = len(micro) / len(picked)  # the loss is a mean over rows: a micro-batch counts by its rows
            (loss * share).backward()
            total += loss.item() * share
            stats.add({"nll": micro_stats.pop("nll")}, weight=int(batch.mask.sum()))  # a mean over tokens
            stats.add(micro_stats, weight=share)
        total = run.sum(total)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.finite(k, policy, picked, total, grad_norm):
            optimizer.step()

        metrics = {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        if run.due(k):
            if held_out:
                metrics["eval/nll"] = held_out_nll(policy, held_out, batch_of, cfg.batch_size)
            run.log_samples(k, policy, tokenizer, [row[0] for row in (held_out or rows)[:4]])
            run.snapshot(k, policy, tokenizer)
        run.log(k, **metrics)
    return run.close(policy, tokenizer)


if __name__ == "__main__":
    import sys

    with exit_codes("minialign ift"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign ift", description=__doc__))
