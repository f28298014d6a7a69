"""`python -m minialign.bench.receipts`: measure real steps at the recipes' sizes on one GPU, beside the estimates of --plan.

It takes a few optimizer steps each of SFT, DPO, IRFT and GRPO, in bfloat16 with AdamW. The models have random weights in the hub's layout,
the rows are this package's own source text. (The 7B model trains adapters of rank 64 where all weights and a reference would not fit on
the card.) After them it evaluates once, which is measured too. A run saves no model. The numbers, with date, card and versions, go to
--out; a recipe's --plan prints those of docs/receipts.json:

    python -m minialign.bench.receipts --out docs/receipts.json

Checked by tests/bench/test_receipts.py, at small sizes on a CPU.
"""

import contextlib
import dataclasses
import gc
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from minialign import pairs
from minialign.bench.cpu import own_sources
from minialign.engine.common import BadInput, describe_device, environment, pick_device, write_atomic
from minialign.engine.run import Run
from minialign.model import GPT
from minialign.recipes import CARDS, MODELS, RESERVE, Recipe, plan, receipt_line
from minialign.settings import cli, exit_codes
from minialign.weights import save_pretrained

LENGTH = 512  # tokens of a prompt, and of a completion


@dataclass
class Config:
    models: list[str] = field(default_factory=lambda: ["pythia-1.4b", "mistral-7b"])  # models to measure, with random weights
    methods: list[str] = field(default_factory=lambda: ["sft", "dpo", "irft", "grpo"])
    steps: int = 5                  # optimizer steps of each method; the first is not timed
    batch_size: int = 16            # rows per step
    micro_batch: int = 2            # rows per forward pass
    max_new: int = 128              # tokens that irft and grpo sample
    device: str = "cuda"            # device; a CPU reports no memory
    dtype: str = "bfloat16"         # of weights and arithmetic
    out: str = "runs/receipts.json"  # file for the numbers


class Done(Exception):
    pass


class Meter:
    """Seconds and peak GiB of what is called through it. On a CPU there are no GiB."""

    def __init__(self, device):
        self.cuda, self.seconds, self.gib = device.type == "cuda", None, None

    def begin(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()

    def end(self, begun):
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - begun
        self.gib = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None

    def around(self, function):
        def measured(*arguments):
            begun = self.begin()
            result = function(*arguments)
            self.end(begun)
            return result

        return measured


def receipt(model, config, method, cfg, folder):
    """Run cfg.steps steps and evaluate: {'seconds' per step, peak 'GiB', those of the evaluation, 'planned' values of all, 'tokens/s'}.

    folder holds the policy and the rows. The answers for samples.jsonl are not part of the evaluation.
    """
    module, device = importlib.import_module(f"minialign.methods.{method}"), pick_device(cfg.device)
    shared = dict(policy=str(folder / "policy"), batch_size=cfg.batch_size, micro_batch=cfg.micro_batch, steps=10**6, save_every=10**6,
                  eval_every=cfg.steps, device=cfg.device, dtype=cfg.dtype, activation_checkpointing=True, out=str(folder / method))
    own = {"sft": {"demos": "demos.jsonl", "max_len": 2 * LENGTH}, "dpo": {"pairs": "pairs.jsonl", "max_len": 2 * LENGTH},
           "irft": {"demos": "demos.jsonl", "max_len": 2 * LENGTH, "max_new": cfg.max_new},
           "grpo": {"prompts": "demos.jsonl", "max_new": cfg.max_new, "reward": ["length:100"]}}[method]
    own = {name: str(folder / value) if str(value).endswith(".jsonl") else value for name, value in own.items()}
    own |= {"lora": 64} if config.n_embd >= 4096 and method != "sft" else {}
    settings = module.Config(**shared, **own)
    training, evaluation, marks = Meter(device), Meter(device), []

    def mark(*_):
        if len(marks) == cfg.steps:  # an evaluation came before this step, which is not timed
            raise Done
        training.end(marks[0] if marks else time.perf_counter())
        marks.append(time.perf_counter())

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    training.begin()
    hook = register_optimizer_step_post_hook(mark)
    try:
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=2**60)))
            patches.enter_context(mock.patch.object(Run, "save", lambda run, step: None))  # so no disk space is needed
            for place, name in itertools.product((module, pairs), ("held_out_nll", "held_out_pairs", "held_out_reward")):
                if hasattr(place, name):
                    patches.enter_context(mock.patch.object(place, name, evaluation.around(getattr(place, name))))
            module.main(settings)
    except Done:
        seconds = training.seconds / (cfg.steps - 1)
    finally:
        hook.remove()
    name = describe_device(device).lower()
    card = next((known for known in CARDS if known in name), "h100")
    rows = len((folder / "demos.jsonl").read_text(encoding="utf-8").splitlines())
    planned_for = dataclasses.replace(settings, eval_every=settings.steps)  # one evaluation, so that steps and evaluation can be told apart
    expected = plan(Recipe(module, module.Config, model, "", 1), planned_for, card, config=config, prompt=LENGTH, rows=rows)
    hours, phases = expected["hours"], expected["phases"]
    fixed = expected["GiB"] - max(phases.values()) - RESERVE  # (what the allocator counts is without the reserve)
    a_step = 3600 * (hours["training and scoring"] + hours["sampling"]) / settings.steps
    planned = {"seconds": a_step, "GiB": fixed + max(phases.values()),
               "evaluation seconds": 3600 * (hours["sampling"] / settings.steps if method == "grpo" else hours["evaluation"]),
               "evaluation GiB": fixed + phases["sampling" if method == "grpo" else "a micro-batch in evaluation"]}
    measured = {"seconds": seconds, "GiB": training.gib, "evaluation seconds": evaluation.seconds, "evaluation GiB": evaluation.gib}
    tokens = {"sft": 2 * LENGTH, "dpo": 4 * LENGTH, "irft": 3 * LENGTH + cfg.max_new, "grpo": LENGTH + cfg.max_new}[method] * cfg.batch_size
    return {"model": model, "method": method, "lora": own.get("lora", 0), **measured,
            **{f"planned {name}": value for name, value in planned.items()}, "tokens/s": tokens / seconds, "card planned for": card}


def write_receipt_inputs(config, dtype, device, folder):
    """Write policy/, demos.jsonl and pairs.jsonl to the folder."""
    tokenizer, pieces = own_sources(LENGTH, LENGTH)
    with torch.device(device):
        policy = GPT(config).to(dtype)
    save_pretrained(policy, folder / "policy", tokenizer)
    rejected = [completion for _, completion in pieces[1:] + pieces[:1]]
    demos = [{"prompt": prompt, "completion": completion} for prompt, completion in pieces]
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": other} for (prompt, chosen), other in zip(pieces, rejected, strict=True)]
    for name, rows in (("demos", demos), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(cfg, configs=MODELS):
    """Print, write and return the receipts. Raises BadInput if the device is missing, and for an unknown model or method."""
    device, dtype = pick_device(cfg.device), getattr(torch, cfg.dtype, None)
    if cfg.batch_size % 8:
        raise BadInput(f"--batch_size {cfg.batch_size}: must be a multiple of 8, the completions that grpo samples per prompt")
    if not set(cfg.models) <= configs.keys() or not set(cfg.methods) <= {"sft", "dpo", "irft", "grpo"} or cfg.steps < 2:
        raise BadInput(f"--models are of {', '.join(configs)}; --methods of sft, dpo, irft, grpo; --steps must be at least 2")
    record = {"date": time.strftime("%Y-%m-%d"), **environment(device), "steps": cfg.steps, "batch_size": cfg.batch_size,
              "micro_batch": cfg.micro_batch, "rows": []}
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    for model in cfg.models:
        with tempfile.TemporaryDirectory() as folder:
            write_receipt_inputs(configs[model], dtype, device, Path(folder))
            for method in cfg.methods:
                with open(os.devnull, "w", encoding="utf-8") as quiet, mock.patch("sys.stdout", quiet):
                    row = receipt(model, configs[model], method, cfg, Path(folder))
                record["rows"].append(row)
                write_atomic(cfg.out, json.dumps(record, indent=1) + "\n")
                print(f"{model}, {method}{', LoRA 64' * bool(row['lora'])}: {receipt_line(row)}", flush=True)
    print(f"numbers: {cfg.out}")
    return record


if __name__ == "__main__":
    with exit_codes("minialign receipts"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign.bench.receipts", description=__doc__))
