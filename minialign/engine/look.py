"""What a run prints before step 1, so that a wrong file, template or mask is seen before it costs computing time.

`first_look` is for methods that train on rows of a file, `first_rollout` for those that sample. Both print device and sizes, three rows
with the scored tokens in ⟦ ⟧, counts, and an estimate of the peak memory. `check_sampler` stops a run whose sampler and training pass
disagree.

Checked by tests/engine/test_run.py.
"""

import copy
from dataclasses import replace

import torch

from minialign.batch import Batch
from minialign.data import answers_of, counts, known
from minialign.engine import parallel
from minialign.engine.common import BadInput, describe_device, note, rows_at_once
from minialign.engine.opening import MOMENTS
from minialign.kernels.linear_logprob import SLICE_BYTES
from minialign.kl import k1
from minialign.logps import best_body, token_logps
from minialign.rewards import BadReward, ask
from minialign.sample import most_rows, rounds_coarsely, sample

RATIO_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # how far any token's ratio of training pass to sampler may be from 1
COARSE_TOLERANCE = 0.3  # in bfloat16, and that on average: a right sampler of a deep model may be off by 0.1 on average and by 1 in a token


def first_look(run, tokenizer, rows, batch, models):
    """Print, before step 1, device, sizes, three decoded rows with the scored tokens in ⟦ ⟧, counts, and the estimated peak memory.

    rows: all training rows; batch: the first Batch or Pairs. models: {name: model or None}, every model that takes memory.
    """
    total, rows = len(rows), known(rows)
    numbers = counts(rows, run.cfg.max_len)
    sides = [batch] if isinstance(batch, Batch) else [batch.chosen, batch.rejected]
    drawn = run.cfg.batch_size if run.method in ("irft", "rft", "irl") else 2 * run.cfg.batch_size if getattr(run.cfg, "online", 0) else 4
    needed = print_sizes(run, models, sum(side.inputs.shape[1] for side in sides), drawn)  # (an evaluation samples four answers)
    empty = sum(len(ids) == 1 and ids[0] == tokenizer.eos_id for row in rows for ids in answers_of(row))
    doubled = sum(len(ids) > 1 and ids[-2] in tokenizer.eos_ids and ids[-1] == tokenizer.eos_id for row in rows for ids in answers_of(row))
    twice = f", {doubled:,} end in EOS twice (their text spells it)" if doubled else ""
    of = f" (of the first {len(rows):,}:" if len(rows) < total else ","
    print(f"data: {total:,} rows{of} {numbers['scored_tokens']:,} scored tokens, {numbers['truncated']:,} truncated, "
          f"{empty:,} empty{twice}{')' * (len(rows) < total)}; about {needed:,.0f} MB at the peak")
    for side in sides:
        for b in range(min(3, len(side))):
            print("  " + show_row(tokenizer, side, b))
    print_folder(run)


@torch.no_grad()
def first_rollout(run, tokenizer, rows, reward_fn, models):
    """Like first_look, for methods that sample: print completions of three prompts with their rewards. models has policy and ref."""
    cfg = run.cfg
    prompts_ids, prompts = zip(*rows[:3], strict=True)
    lengths = [len(ids) for ids, _ in known(rows)]
    sampled = max(cfg.batch_size, getattr(cfg, "grow_prompts", cfg.batch_size) * getattr(cfg, "n", 1))  # at once; evaluation: batch_size
    needed = print_sizes(run, models, max(lengths) + cfg.max_new, sampled)
    print(f"prompts: {len(rows):,}, the longest has {max(lengths):,} tokens; up to {cfg.max_new:,} new tokens each; about {needed:,.0f} MB "
          "at the peak")
    answers = check_sampler(run, tokenizer, prompts_ids, policy=models["policy"], ref=models["ref"])
    texts = [tokenizer.decode(ids) for ids in answers.completions]
    try:
        with torch.random.fork_rng(devices=[]):  # if the reward draws random numbers, those of the steps stay the same, also when resumed
            rewards = ask(reward_fn, prompts, texts, limit=cfg.reward_limit)
    except BadReward as error:
        raise BadInput(f"{error}; a reward is called as reward(prompts, completions), two lists of B, and returns B numbers") from None
    for b, reward in enumerate(rewards.tolist()):
        print(f"  {show_row(tokenizer, answers, b)}  reward {reward:g}")
    if hasattr(cfg, "beta"):
        print("watch reward and kl: for this method a falling loss does not mean progress")
    print_folder(run)


@torch.no_grad()
def check_sampler(run, tokenizer, prompts_ids, *, policy, ref):
    """Sample answers to a few prompts and print two numbers: the ratio, which must be 1, and the KL to ref, 0 at the start of a run.

    The ratio is exp(log-prob in the training pass − log-prob in the sampler). Raises BadInput if it is too far from 1: then the
    temperature, truncation or a position may differ, and every importance ratio would be wrong. Where rounding alone moves it as far as
    such an error would (bfloat16), a shallow float32 copy of the policy is tried too, and it decides. Returns the Rollout.
    """
    cfg = run.cfg

    def compare(policy):
        answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, eos_id=tokenizer.eos_id, seed=cfg.seed)
        logps = torch.cat([token_logps(policy, answers[b : b + 1], tau=cfg.tau) for b in range(len(answers))])  # (B, T)
        return answers, logps, ((logps - answers.old_logps)[answers.mask].exp() - 1).abs()

    answers, logps, off = compare(policy)
    ref_logps = torch.cat([token_logps(ref, answers[b : b + 1], tau=cfg.tau) for b in range(len(answers))])
    mean, largest, exact = float(off.mean()), float(off.max()), ""
    right = largest <= RATIO_TOLERANCE.get(run.dtype, torch.inf)
    if rounds_coarsely(policy):
        precision, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "ieee"  # (no TF32)
        off = float(compare(shallow(policy))[2].max())
        torch.backends.cuda.matmul.fp32_precision = precision
        right, exact = mean <= COARSE_TOLERANCE and off <= RATIO_TOLERANCE[torch.float32], f" ({off:.1e} in float32, in its first layers)"
    print(f"ratio of training to sampling: 1 to within {mean:.1e} on average, {largest:.1e} in all tokens{exact}; "
          f"KL to ref: {float(k1(logps, ref_logps).sum(1).mean()):.3g} nats per completion (0 at the start)")
    if not right:
        raise BadInput(f"sampler and training pass differ by {mean:.2g} in ratio on average and {largest:.2g} in all tokens{exact} "
                       f"at --dtype {cfg.dtype}; try --dtype float32")
    return answers


def shallow(policy):
    """A float32 copy of the policy with only the first layer of each attention window. What tells an error of the sampler from rounding
    needs no more layers, and so it takes little memory beside a large policy."""
    policy = parallel.full_copy(policy)
    windows = tuple(dict.fromkeys(policy.config.windows))
    blocks = copy.deepcopy(torch.nn.ModuleList(policy.blocks[policy.config.windows.index(window)] for window in windows))
    for layer, block in enumerate(blocks):
        block.attn.layer = layer
    config = replace(policy.config, n_layer=len(windows), windows=windows)
    return copy.deepcopy(policy, {id(policy.blocks): blocks, id(policy.config): config}).float()


def print_sizes(run, models, positions, sampled=0):
    """Print device, dtype and parameter counts; return the peak memory in MB. Warns if the GPU has less free memory."""
    models = {name: model for name, model in models.items() if model is not None}
    for model in models.values():  # run.register has sharded those in checkpoints, not the others
        run.shard(model)
    needed = peak_memory(run, models, positions, sampled)
    sizes = ", ".join(f"{name} {sum(p.numel() for p in model.parameters()):,}" for name, model in models.items())
    head = next(iter(models.values())).config
    body = f", log-probs {best_body(rows_at_once(run.cfg) * positions, head.vocab_size, run.device)}" if head.head == "lm" else ""
    print(f"{run.method}: {describe_device(run.device)}, {run.cfg.dtype}, parameters: {sizes}{body}")
    if run.device.type == "cuda" and needed * 2**20 > torch.cuda.mem_get_info(run.device)[0]:
        note("note: the peak is above the GPU's free memory; a smaller --micro_batch or shorter rows need less")
    return needed


def print_folder(run):
    print(f"folder: {run.folder}" + (f", resuming after step {run.first_step}" if run.resuming else ""), flush=True)


def layer_numbers(config):
    """(kept, passing): how many numbers the activations of one layer take at one position, counted on the model's own operations.

    kept: what autograd keeps for the backward pass. passing: what a backward pass holds besides, and all that a pass without gradient
    holds, at most. RMSNorm keeps its input in float32, which counts double.
    """
    c, queries, keys = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    norms = 8 * c if config.norm == "rms" else (3 if config.parallel_residual else 4) * c
    attention = 2 * queries + 2 * keys + 3 * (queries + keys) * config.qk_norm  # queries, keys, values and the output
    kept = norms + attention + 2 * (1 + config.gated) * config.ffn_dim
    return kept, 6 * c + max((2 + config.gated) * config.ffn_dim, 2 * attention)


def peak_memory(run, models, positions, sampled=0):
    """Peak memory in MB, roughly.

    Counted: trained weights with gradients and the optimizer's moments, frozen weights once, and the largest of: the activations of one
    micro-batch of rows with `positions` tokens in training; those of one in evaluation; those of `sampled` such rows in one layer. Besides
    these the logits (or what logps.py's chunked body keeps of them), and the key-value cache of the `sampled` rows. They are sampled
    together, on a GPU in passes of sample.most_rows; micro_batch does not limit sampling. Under torchrun each process samples its share of
    them, from a whole copy of the first model.
    """
    size = torch.tensor([], dtype=run.dtype).element_size()
    parameters = {id(p): p for model in models.values() for p in model.parameters()}.values()  # copies share frozen weights
    total = sum(parallel.numel(p) * p.element_size() * (2 + MOMENTS[run.cfg.optimizer] if p.requires_grad else 1) for p in parameters)
    first, rows, sampled = next(iter(models.values())), rows_at_once(run.cfg), -(-sampled // parallel.world())
    config, sampled = first.config, min(sampled, most_rows(first, positions) or sampled)
    total += size * sum(p.numel() for p in first.parameters()) * parallel.started()
    (layer, passing), ends = layer_numbers(config), 8 * config.n_embd  # ends: embeddings, final norm, what enters the log-probs
    kept = config.n_layer * config.n_embd + layer if run.cfg.activation_checkpointing else config.n_layer * layer
    evaluated = getattr(run.cfg, "eval_batch", 0) or rows
    activations = max(rows * (kept + passing + ends), evaluated * (passing + ends), sampled * passing) * size  # at each position
    if config.head == "lm" and best_body(rows * positions, config.vocab_size, run.device) == "naive":
        total += 12 * config.vocab_size * rows * positions
    elif config.head == "lm":
        total += 2 * SLICE_BYTES.get(run.device.type, 2**26)
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * size + 16  # keys, values, and 16 bytes for each sampled token
    return (total + positions * (activations + sampled * cache)) / 2**20


def show_row(tokenizer, batch, b, width=160):
    """Row b as text, with the scored part in ⟦ ⟧ and EOS as ⏎. The middle of a long prompt or completion is left out."""

    def shorten(text):
        text = text.replace("\n", "\\n")
        return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"

    mask = batch.mask[b]
    scored = batch.targets[b][mask].tolist()  # its special tokens are shown, except EOS at the end (⏎)
    n_scored = len(scored)
    first = int(mask.int().argmax()) if n_scored else len(mask)
    prompt = tokenizer.decode_prompt(batch.inputs[b][: first + 1].tolist())
    end = "⏎" if scored and scored[-1] in tokenizer.eos_ids else ""
    return f"{shorten(prompt)}⟦{shorten(tokenizer.decode(scored))}{end}⟧  ({n_scored} scored)"
