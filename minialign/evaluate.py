"""Comparing checkpoints on pairs nobody trained on: held-out NLL, log-prob gap, implicit-reward and reward-model accuracy.

    NLL         −Σ log π(y_w|x) / tokens                        what SFT minimises, on the chosen answers
    gap         mean of log π(y_w|x) − log π(y_l|x)             does the policy itself prefer the chosen answer? (sums of tokens)
    implicit    share of pairs with log π/ref (y_w) > log π/ref (y_l): the reward that training wrote into the policy
    reward acc. share of pairs with r(y_w) > r(y_l), for a reward model

Always with n and a 95 % interval: normal for means, Wilson for shares, the ratio estimator for the NLL. A tie counts one half.
The gap of sums favours whichever answer is shorter; the gap per token stands beside it.

    python -m minialign evaluate --policies runs/base/final runs/sft/final --ref runs/base/final --pairs pairs.jsonl --reward runs/rm/final
"""

import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from minialign.common import BadInput, check_config, pick_device, pick_dtype, write_atomic
from minialign.data import builtin_pairs, encode_pairs, pair_batch, read_preferences, scorable, split_held_out
from minialign.logps import token_logps
from minialign.rewards import BadReward, ask, score
from minialign.sample import sample
from minialign.tokenizer import load_tokenizer
from minialign.weights import fit_vocabulary, load_pretrained


@dataclass
class Config:
    policies: list[str] = field(default_factory=list)  # folders or hub names to compare
    ref: str = ""                   # the reference of the implicit reward; default the first policy
    reward: str = ""                # a reward model's folder or hub name, optional
    pairs: str = "builtin"          # preferences: builtin, or a JSONL/JSON(.gz) file
    held_out: float = 0.1           # use the last share of the file, which training with the same share never saw; 1 = all of it
    batch_size: int = 32            # pairs per forward pass; published numbers name it
    max_len: int = 256              # most tokens of a row; the end is cut off
    max_prompt: int | None = None   # most tokens of a prompt; its beginning is cut off
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16 or float64
    out: str = ""                   # also write the table as JSON to this file
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


# ---------------------------------------------------------------------------------------------------------------- intervals


def mean_interval(values):
    """(mean, half-width of the normal 95 % interval) of a (n,) tensor; the half-width is NaN for n < 2."""
    values = values.double()
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), half


def ratio_interval(sums, sizes):
    """(Σ sums / Σ sizes, half-width of its 95 % interval): nats per token over rows of unequal length, by the ratio estimator."""
    sums, sizes = sums.double(), sizes.double()
    ratio = float(sums.sum() / sizes.sum())
    n = len(sums)
    spread = math.sqrt(n / (n - 1) * float(((sums - ratio * sizes) ** 2).sum())) / float(sizes.sum()) if n > 1 else math.nan
    return ratio, 1.96 * spread


def share_interval(successes, n):
    """(share, low, high): Wilson's 95 % interval, which stays inside [0, 1] and works for small n."""
    z, p = 1.96, successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return p, centre - half, centre + half


def wins(left, right):
    """How often left exceeds right, ties counting one half: a float."""
    return float((left > right).sum()) + 0.5 * float((left == right).sum())


# ------------------------------------------------------------------------------------------------------------------ measures


@torch.no_grad()
def held_out_nll(policy, rows, batch_of, batch_size):
    """Nats per scored token over all rows of encode_demos; NaN if there are none. batch_of(rows, picked) -> Batch."""
    nats, tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = batch_of(rows, range(start, min(start + batch_size, len(rows))))
        nats, tokens = nats - float(token_logps(policy, batch).sum()), tokens + int(batch.mask.sum())
    return nats / tokens if tokens else math.nan


def held_out_reward(policy, tokenizer, rows, reward_fn, cfg):
    """{'eval/reward': mean reward of one completion of each of the first batch_size held-out prompts}; {} without any.

    rows: [(prompt ids, prompt)] of encode_prompts. A reward that fails here is said and left out: nothing is trained on it.
    """
    if not rows:
        return {}
    prompts_ids, prompts = zip(*rows[: cfg.batch_size], strict=True)
    answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, eos_id=tokenizer.eos_id, seed=("eval", cfg.seed))
    try:
        rewards = ask(reward_fn, prompts, [tokenizer.decode(ids) for ids in answers.completions], limit=cfg.reward_limit)
    except BadReward as error:
        print(f"no eval/reward: {error}", file=sys.stderr)
        return {}
    return {"eval/reward": rewards.mean()}


@torch.no_grad()
def pair_measures(model, tokenizer, pairs, cfg):
    """For each pair: {'chosen', 'rejected'} summed log-probs (or rewards, for a scalar head) and scored tokens, as (n,) tensors."""
    rows = scorable(encode_pairs(tokenizer, pairs, max_prompt=cfg.max_prompt), cfg.max_len)
    if not rows:
        raise BadInput(f"no pair has a scored token: every prompt fills --max_len {cfg.max_len}; raise it, or set --max_prompt")
    columns = {"chosen": [], "rejected": [], "chosen_tokens": [], "rejected_tokens": []}
    for start in range(0, len(rows), cfg.batch_size):
        picked = range(start, min(start + cfg.batch_size, len(rows)))
        batch = pair_batch(rows, picked, pad_id=tokenizer.pad_id, max_len=cfg.max_len).to(model.head_weight.device)
        for side, half in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            values = score(model, half) if model.config.head == "scalar" else token_logps(model, half).sum(1)
            columns[side].append(values.double().cpu())
            columns[f"{side}_tokens"].append(half.mask.sum(1).double().cpu())
    return {name: torch.cat(parts) for name, parts in columns.items()}


def policy_row(name, measures, ref_measures):
    """One line of the table, as plain numbers with intervals."""
    chosen, rejected = measures["chosen"], measures["rejected"]
    implicit = wins(chosen - ref_measures["chosen"], rejected - ref_measures["rejected"])
    per_token = chosen / measures["chosen_tokens"].clamp(min=1) - rejected / measures["rejected_tokens"].clamp(min=1)
    return {
        "policy": name, "n": len(chosen), "nll": ratio_interval(-chosen, measures["chosen_tokens"]),
        "gap": mean_interval(chosen - rejected), "gap_per_token": mean_interval(per_token),
        "implicit_accuracy": share_interval(implicit, len(chosen)),
    }


def main(cfg):
    """Print the table; returns the list of its rows as dicts."""
    if not cfg.policies and not cfg.reward:
        raise BadInput("nothing to evaluate: name --policies, --reward or both")
    if not 0 < cfg.held_out <= 1:
        raise BadInput(f"--held_out {cfg.held_out}: must lie in (0, 1]")
    check_config(replace(cfg, held_out=min(cfg.held_out, 0.9)))
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    device, dtype = pick_device(cfg.device), pick_dtype(cfg.dtype)
    pairs = builtin_pairs() if cfg.pairs == "builtin" else read_preferences(cfg.pairs, skip_bad=cfg.skip_bad)
    pairs = pairs if cfg.held_out == 1 else split_held_out(pairs, cfg.held_out)[1]
    if not pairs:
        raise BadInput(f"{cfg.pairs}: --held_out {cfg.held_out} of it is no pair at all; raise it")

    def measure(name, head):
        model, tokenizer = load_pretrained(name, dtype=dtype, device=device), load_tokenizer(name)
        fit_vocabulary(model, tokenizer, name)
        if model.config.head != head:
            what, flag = ("policy", "--policies") if head == "scalar" else ("reward model", "--reward")
            raise BadInput(f"{name}: is a {what}: name it with {flag}")
        return pair_measures(model, tokenizer, pairs, cfg)

    rows = []
    if cfg.policies:
        ref = cfg.ref or cfg.policies[0]
        ref_measures = measure(ref, "lm")
        print(f"{len(ref_measures['chosen'])} pairs of {cfg.pairs}; ± and [ ] are 95 % intervals; implicit reward against {ref}")
        print(f"{'policy':40} {'NLL / token':>18} {'gap, nats':>20} {'gap / token':>20} {'implicit acc.':>22}")
        for name in cfg.policies:
            row = policy_row(name, ref_measures if name == ref else measure(name, "lm"), ref_measures)
            rows.append(row)
            accuracy = "    (is the reference)" if name == ref else "{:6.1%} [{:.1%}, {:.1%}]".format(*row["implicit_accuracy"])
            print(f"{name[-40:]:40} {row['nll'][0]:9.4f} ± {row['nll'][1]:.4f} {row['gap'][0]:+11.3f} ± {row['gap'][1]:6.3f} "
                  f"{row['gap_per_token'][0]:+11.4f} ± {row['gap_per_token'][1]:.4f} {accuracy:>22}")
    if cfg.reward:
        measures = measure(cfg.reward, "scalar")
        n = len(measures["chosen"])
        accuracy = share_interval(wins(measures["chosen"], measures["rejected"]), n)
        rows.append({"reward_model": cfg.reward, "n": n, "accuracy": accuracy})
        print("reward model {}: accuracy {:.1%} [{:.1%}, {:.1%}] on {} pairs".format(cfg.reward, *accuracy, n))
    if cfg.out:
        write_atomic(cfg.out, json.dumps(rows, indent=1) + "\n")
    return rows
