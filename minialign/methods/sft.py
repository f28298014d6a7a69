"""Supervised fine-tuning: maximum likelihood on demonstrations. The other methods here start from it and are compared with it.

    L(θ) = −(1/N) Σ_b Σ_t log π_θ(y_{b,t} | x_b, y_{b,<t})          N = number of scored tokens in the optimizer step

Symbols  (→ name in the code) x: prompt; y: completion, its EOS included; log π_θ(y_t|·): log-prob of a token → logps (B, T); N → n_tokens.
Idea     Make the demonstrations likely. Minimising L minimises KL(demonstrations ‖ π_θ): probability moves to them and away from the rest.
Differs  from irft.py: no answer is pushed down explicitly; others fall because probabilities sum to one. There is no reference model.
Details  The mean is over tokens, as in TRL: for token losses [1, 1] and [2, 2, 2, 2] it is 10/6. This is maximum likelihood. The mean of
         sequence sums (5) is maximum likelihood too, because it differs only by a factor that is the same for all tokens. The mean of
         sequence means (1.5) is not: it gives more weight to the tokens of short completions.
         N counts the whole step, so one micro-batch of 8 rows, two of 4 and eight of 1 give the same gradient. With a mean of micro-batch
         means they would differ. Prompts are not scored. EOS is scored: a policy that is never taught to stop does not stop.
         --text trains a base model instead: every token of plain text after BOS is a target. --policy new starts from random weights.
Law      As the data grow, the policy converges to the expert's distribution. In toy/three_actions.py the gap d between the logit of the
         demonstrated action and another follows 2d + e^d = 1 + 3·lr·steps as lr → 0. Its probability tends to 1; the rest falls as 1/steps.
Checked  tests/methods/test_sft.py (worked numbers, accumulation, masks), toy/three_actions.py (the trajectory).

    python -m minialign sft                                                  # built-in task, laptop CPU, half a minute
    python -m minialign sft --demos demos.jsonl --policy gpt2 --max_len 512
    python -m minialign sft --text corpus.txt --policy new --out runs/base   # a base model from plain text
"""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.data import counts, encode_demos, encode_texts, plain_text, read_demonstrations, read_texts, split_held_out, split_scorable
from minialign.engine.common import batch_rows, lr_at, micro_batches, set_lr
from minialign.engine.look import first_look
from minialign.engine.opening import batches_of, encoded_once, open_demos, open_optimizer, open_policy, set_passes
from minialign.engine.run import Run
from minialign.evaluate import held_out_nll
from minialign.logps import token_logps
from minialign.model import GPTConfig
from minialign.settings import OnDemonstrations
from minialign.task import builtin_demos, builtin_texts, builtin_tokenizer
from minialign.tokenizer import load_tokenizer, train_bpe
from minialign.weights import new_model


@dataclass
class Config(OnDemonstrations):
    policy: str = "builtin"         # the model to start from: builtin, a folder, a hub name, or new (random weights)
    text: str = ""                  # train a base model on this text instead: builtin, a .txt, or a JSONL/JSON(.gz) file
    steps: int = 150                # optimizer steps
    lr: float = 3e-4                # peak learning rate (for models with billions of weights: 1e-5)
    layers: int = 2                 # layers of a new policy
    width: int = 64                 # channels of a new policy
    heads: int = 4                  # attention heads of a new policy
    vocab: int = 2048               # size of the byte-level BPE vocabulary that is trained for a new policy


def sft_loss(logps, mask, *, n_tokens=None):
    """Mean negative log-likelihood of the scored tokens, in nats per token.

    logps, mask: (B, T). n_tokens: the number to divide by. By default it is the number of scored tokens in this batch. If this batch is one
    micro-batch of a step, give the number in the whole step. Returns the scalar loss and stats. A batch with nothing scored has loss 0.
    """
    assert logps.dim() == 2 and logps.shape == mask.shape, (logps.shape, mask.shape)
    mask = mask.bool()
    scored = torch.where(mask, logps, 0).sum()
    loss = -scored / (mask.sum().clamp(min=1) if n_tokens is None else n_tokens)
    stats = {"nll": -scored / mask.sum().clamp(min=1), "scored_tokens": mask.sum()}
    return loss, {name: value.detach() for name, value in stats.items()}


def step(policy, batch, n_tokens=None):
    """Evaluate the policy on one batch of demonstrations and compute the loss. Only this function connects model and equation."""
    logps = token_logps(policy, batch)  # (B, T)
    return sft_loss(logps, batch.mask, n_tokens=n_tokens)


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("sft", cfg)
    cfg = run.cfg
    policy, tokenizer, rows, held_out = open_policy_and_rows(run)
    batch_of = batches_of(run, tokenizer)
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, optimizer=optimizer)
    first_look(run, tokenizer, rows, batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed)), {"policy": policy})
    run.at_evaluation(policy, tokenizer, held_out or rows, lambda: held_out_nll(policy, held_out, batch_of, cfg))

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        n_tokens = max(1, counts([rows[i] for i in picked], cfg.max_len)["scored_tokens"])
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        losses = []
        for micro in micro_batches(picked, rows, cfg):
            loss, _ = step(policy, batch_of(rows, micro), n_tokens)  # already divided by the tokens of the whole step
            loss.backward()
            losses.append(loss.detach())
        total = run.sum(losses)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_update(k, policy, picked, total, grad_norm):
            optimizer.step()

        metrics = {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], "tokens": n_tokens}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)


def open_policy_and_rows(run):
    """(policy, tokenizer, rows to train on, held-out rows), for demonstrations or plain text, with an existing policy or a new one."""
    cfg = run.cfg
    if not cfg.text and cfg.policy != "new":
        policy, tokenizer = open_policy(run)
        return policy, tokenizer, *open_demos(run, tokenizer)[:2]
    run.same_input("data", cfg.text or cfg.demos)
    if cfg.text:
        texts = builtin_texts() if cfg.text == "builtin" else read_texts(cfg.text, skip_bad=cfg.skip_bad)
        train, held_out = split_held_out(texts, cfg.held_out) if len(texts) > 1 else (texts, [])  # whole documents are held out
    else:
        demos = builtin_demos() if cfg.demos == "builtin" else read_demonstrations(cfg.demos, skip_bad=cfg.skip_bad)
        train, _ = split_held_out(demos, cfg.held_out)

    if cfg.policy == "new":
        if run.resuming and (run.folder / "tokenizer.json").is_file():  # the tokenizer was trained when the run began
            tokenizer = load_tokenizer(run.folder)
        else:
            own = [plain_text(text if cfg.text else text.document()) for text in train]
            tokenizer = builtin_tokenizer() if (cfg.text or cfg.demos) == "builtin" else train_bpe(own, cfg.vocab)
            tokenizer.save(run.folder)
        torch.manual_seed(cfg.seed)
        size = dict(n_layer=cfg.layers, n_embd=cfg.width, n_head=cfg.heads, ffn_dim=2 * cfg.width, max_len=max(512, 2 * cfg.max_len))
        policy = new_model(GPTConfig(vocab_size=tokenizer.vocab_size, **size), **run.load)
        set_passes(policy, cfg)
    else:
        policy, tokenizer = open_policy(run)

    def encode(texts):
        return encoded_once(lambda: encode_texts(tokenizer, texts, max_len=cfg.max_len))

    if not cfg.text:
        rows = encoded_once(lambda: encode_demos(tokenizer, demos, max_prompt=cfg.max_prompt, skip_bad=cfg.skip_bad))
        return policy, tokenizer, *split_scorable(rows, cfg.held_out, cfg.max_len)
    if len(texts) == 1:  # a single document: its last rows are held out
        return policy, tokenizer, *split_held_out(encode(texts), cfg.held_out)
    return policy, tokenizer, encode(train), encode(held_out)
