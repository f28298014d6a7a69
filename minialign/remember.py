"""Reference log-probs once instead of at every step (--precompute_ref): then no reference is kept in memory.

For DPO and its like the reference is the policy before training; for IRFT with --ref round the policy as a round begins, which then also
draws the round's answers. So the policy itself is asked, before it moves, and what it said is kept in the run folder: when a run is
resumed the policy is no longer what it was. The numbers are those of a second model, to rounding (rows share a batch with others).

Checked by tests/test_remember.py.
"""

import json

import torch

from minialign import parallel
from minialign.batch import collate
from minialign.common import BadInput, batch_rows, in_micro, write_atomic
from minialign.logps import Remembered, seq_logps


def once(run, file, began, compute):
    """The JSON value of a file of the run; computed by `compute()` and written if it is not there, unless the policy has been trained past
    step `began`, where it was the reference."""
    file = run.folder / file
    if not parallel.on_main(file.is_file):
        if run.first_step > began:
            raise BadInput(f"{file}: is missing, and the policy of step {run.first_step} is no reference; begin a new run")
        value = compute()
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, json.dumps(value))
        parallel.gather(None)  # a barrier: nobody reads before it is there
    return json.loads(file.read_text(encoding="utf-8"))


def remember_pairs(run, policy, ref, rows, held_out, batch_of):
    """ref; or, with --precompute_ref, what the policy says before step 1 of all pairs that the run will see.

    batch_of(rows, picked) -> Pairs.
    """
    cfg = run.cfg
    if not getattr(cfg, "precompute_ref", False):
        return ref
    seen = {i for k in range(cfg.steps) for i in batch_rows(len(rows), cfg.batch_size, k, cfg.seed)}
    rows = [rows[i] for i in sorted(seen)] + held_out

    def logps_of(micro):
        pairs = batch_of(rows, micro)
        return torch.stack([seq_logps(policy, pairs.chosen), seq_logps(policy, pairs.rejected)], 1)  # (b, 2)

    def compute():
        print(f"the reference's log-probs of {len(rows):,} pairs", flush=True)
        even = [*range(len(rows)), *range(-len(rows) % parallel.world())]  # some rows twice, so that each process has an equal part
        return in_micro(logps_of, even, cfg.micro_batch or cfg.batch_size)[: len(rows)].tolist()  # (rows, 2)

    logps, ref = torch.tensor(once(run, "ref_logps.json", 0, compute), dtype=torch.promote_types(run.dtype, torch.float32)), Remembered()
    for start in range(0, len(rows), cfg.batch_size):
        pairs = batch_of(rows, range(start, min(start + cfg.batch_size, len(rows))))
        for i, side in enumerate((pairs.chosen, pairs.rejected)):
            ref.learn(side, logps[start : start + cfg.batch_size, i])
    return ref


def remember_round(run, policy, rows, batch_of, tokenizer, t, answers_of):
    """What IRFT needs of π_t, the policy as round t begins: ({step: its own answers}, what it says of them and of the demonstrations).

    answers_of(policy, step, picked) -> completions of the prompts of rows[picked]; batch_of(rows, picked) -> Batch of demonstrations.
    """
    cfg = run.cfg
    steps = [k for k in range(cfg.steps) if k * cfg.rounds // cfg.steps == t]
    picked = {k: batch_rows(len(rows), cfg.batch_size, k, cfg.seed) for k in steps}

    def sides(k, completions):
        own = collate([rows[i][0] for i in picked[k]], completions, pad_id=tokenizer.pad_id)
        return batch_of(rows, picked[k]), own.to(run.device)

    def ask(micro):
        return seq_logps(policy, micro)  # (b,)

    def compute():
        print(f"round {t}: its own answers and the reference's log-probs, {len(steps):,} steps of {cfg.batch_size} rows", flush=True)
        made = {"answers": [answers_of(policy, k, picked[k]) for k in steps]}
        pairs = (sides(k, completions) for k, completions in zip(steps, made["answers"], strict=True))
        made["logps"] = [[in_micro(ask, side, cfg.micro_batch).tolist() for side in pair] for pair in pairs]
        return made

    made, ref = once(run, f"rounds/{t:06d}.json", steps[0], compute), Remembered()
    for k, completions, both in zip(steps, made["answers"], made["logps"], strict=True):
        for side, logps in zip(sides(k, completions), both, strict=True):
            ref.learn(side, torch.tensor(logps, dtype=torch.promote_types(run.dtype, torch.float32)))
    return dict(zip(steps, made["answers"], strict=True)), ref
