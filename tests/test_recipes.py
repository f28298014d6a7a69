"""Every recipe's --smoke and --plan; its numbers are a Config of its method; the plan's counts against the thing itself; chains; GSM8K.

The activations are counted on the meta device, where tensors have sizes and no content: every storage that an operation makes, until it
is freed.
"""

import dataclasses
import importlib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minialign import recipes
from minialign.batch import Batch
from minialign.data import encode_prompt
from minialign.engine.common import BadInput
from minialign.engine.look import layer_numbers
from minialign.kernels import linear_logprob
from minialign.logps import token_logps
from minialign.lora import load_model
from minialign.methods import sft
from minialign.model import GPT, GPTConfig
from minialign.recipes import grpo_gsm8k_qwen as gsm8k
from minialign.settings import cli, field_comments

ROOT = Path(__file__).parent.parent
FILES = {path.stem for path in (ROOT / "minialign/recipes").glob("[!_]*.py")}
CHAINS = sorted(name for name in FILES if name.startswith("chain_"))
NAMES = sorted(FILES - {*CHAINS})
QUICK = ("irft_ultrachat_zephyr",)
STAGES = {stage.recipe for chain in CHAINS for stage in importlib.import_module(f"minialign.recipes.{chain}").STAGES}
MARKS = {name: () if name in QUICK else pytest.mark.long if name in STAGES else pytest.mark.slow for name in NAMES}  # chains run the stages


def run(name, *flags, **settings):
    command = [sys.executable, "-m", f"minialign.recipes.{name}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, **settings)


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in NAMES])
def test_smoke(name):
    """Two steps over two processes from files in the hub's formats, mixed precision and all, and the export loads."""
    done = run(name, "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2/2" in done.stdout and f"smoke: minialign.recipes.{name} ran in 2 processes" in done.stdout


@pytest.mark.slow
def test_smoke_with_adapters():
    done = run("irft_ultrachat_zephyr", "--smoke", "--lora", "64")
    assert done.returncode == 0 and "adapter" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("card", recipes.CARDS)
def test_plan(name, card, capsys):
    """Finite numbers for every card. On its own card a recipe fits as it stands, with a tenth of the card to spare."""
    recipe = importlib.import_module(f"minialign.recipes.{name}").RECIPE
    numbers = recipes.print_plan(recipe, recipe.Config(), card)
    said = capsys.readouterr().out
    assert numbers["steps"] > 0 and all(size > 0 for part in ("resident", "phases") for size in numbers[part].values())
    assert sum(numbers["hours"].values()) > 0 and f"{numbers['parameters']:,} parameters" in said
    assert numbers["GiB"] == sum(numbers["resident"].values()) + max(numbers["phases"].values()) and numbers["resident"]["reserve"] == 6
    assert recipes.fits(numbers) == ("DOES NOT FIT" not in said) == (numbers["GiB"] <= 0.9 * numbers["card"])
    assert card != recipe.card or recipes.fits(numbers)


def test_a_plan_that_does_not_fit_names_the_flags_that_make_it_fit(capsys):
    """DPO of a 7B model whose activations are all kept, and whose micro-batch is large: too much for 80 GB, and not with the flags."""
    recipe = importlib.import_module("minialign.recipes.dpo_ultrafeedback_mistral").RECIPE
    cfg = dataclasses.replace(recipe.Config(), micro_batch=8, activation_checkpointing=False)
    assert not recipes.fits(recipes.print_plan(recipe, cfg, "h100"))
    assert "DOES NOT FIT; it does with --activation_checkpointing\n" in capsys.readouterr().out
    assert recipes.fits(recipes.plan(recipe, dataclasses.replace(cfg, activation_checkpointing=True), "h100"))
    alone = dataclasses.replace(recipe, gpus=1)
    assert recipes.what_fits(alone, cfg, "h100") == "--nproc_per_node 2 --activation_checkpointing"
    evaluated = dataclasses.replace(recipe.Config(), micro_batch=0)  # all 128 pairs of a card at once, in evaluation too
    assert recipes.plan(recipe, evaluated, "h100")["phases"]["a micro-batch in evaluation"] > 25


# ------------------------------------------------------------------------------------------- activations, counted on meta tensors


class Peak(TorchDispatchMode):
    """The bytes of all storages that operations have made and that still exist: now, and at most. Known ones are not counted."""

    def __init__(self, known):
        super().__init__()
        self.seen, self.now, self.most = {t.untyped_storage()._cdata for t in known}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "aten::nonzero":  # which rows a mask picks is unknown here: all of them
            out = args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


class Flash(torch.autograd.Function):
    """Attention as a GPU's fused kernels keep it: queries, keys, values, the output and one number per query; no scores."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2), q.new_empty(q.shape[:3])
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, g):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def narrow_products(monkeypatch):
    """On the meta device what linear_logprob.py does on CUDA: slices of the same size, products of bfloat16 without a float32 copy."""
    monkeypatch.setitem(linear_logprob.SLICE_BYTES, "meta", linear_logprob.SLICE_BYTES["cuda"])
    monkeypatch.setattr(linear_logprob, "matmul_wide", lambda a, b: torch.empty(len(a), b.shape[1], device="meta"))
    monkeypatch.setattr(linear_logprob, "update_statistics", lambda *args, **more: None)
    monkeypatch.setattr(linear_logprob, "to_gradient", lambda *args: None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: Flash.apply(q, k, v))


SHAPES = {**recipes.MODELS, "gpt2": GPTConfig(vocab_size=500, n_layer=4, n_head=4, n_embd=256, norm="layer", activation="gelu_tanh",
                                              gated=False, positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True, max_len=64),
          "qwen3": GPTConfig(vocab_size=500, n_layer=4, n_head=4, n_kv_head=2, n_embd=256, head_dim=128, ffn_dim=512, qk_norm=True)}


@pytest.mark.parametrize("name", SHAPES)
def test_the_numbers_of_a_layer_are_those_it_keeps(name, monkeypatch):
    """Bytes kept with four layers minus bytes kept with two: two layers', to a hundredth of what layer_numbers says. And a pass without
    gradient holds no more than it says besides the embeddings, however many layers there are."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: Flash.apply(q, k, v))
    kept, ids = {}, torch.zeros(2, 64, dtype=torch.long, device="meta")
    for layers in (2, 4):
        config = dataclasses.replace(SHAPES[name], n_layer=layers, windows=SHAPES[name].windows[:2] * (layers // 2))
        with torch.device("meta"):
            model = GPT(config).to(torch.bfloat16)
        with Peak(model.parameters()) as peak:
            hidden = model.hidden(ids)
        kept[layers] = peak.now
        with Peak(model.parameters()) as passing, torch.no_grad():
            model.hidden(ids)
        assert passing.most <= (layer_numbers(config)[1] + config.n_embd) * 2 * ids.numel()
        del hidden
    assert (kept[4] - kept[2]) / (2 * 2 * ids.numel()) == pytest.approx(layer_numbers(config)[0], rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_counted_activations_are_under_the_plan(name, monkeypatch):
    """A training micro-batch and an evaluation of two layers at full width and length: every byte that exists at the same time, beside
    weights and gradients, is at most what the plan has for activations and log-probs, and not far below it."""
    recipe = importlib.import_module(f"minialign.recipes.{name}").RECIPE
    cfg = dataclasses.replace(recipe.Config(), dtype="bfloat16")  # (mixed computes in bfloat16; here there is nothing to gather)
    cfg, one = dataclasses.replace(cfg, batch_size=cfg.batch_size // recipe.gpus), dataclasses.replace(recipe, gpus=1)
    config = recipes.MODELS[recipe.model]
    config = dataclasses.replace(config, n_layer=2, windows=config.windows[:2])
    numbers = recipes.plan(one, cfg, "h100", config=config)
    narrow_products(monkeypatch)
    learned = recipe.name == "reward_model"
    with torch.device("meta"):
        models = [GPT(config).to(torch.bfloat16) for _ in range(1 + (recipe.name in ("ppo", "rft", "irl")))]
        models = [model.with_scalar_head() if learned or i else model for i, model in enumerate(models)]
        rows = cfg.micro_batch * (2 if recipe.name in ("dpo", "orpo", "irft", "reward_model") else 1)
        ids = torch.zeros(2 * rows, numbers["length"], dtype=torch.long)
        batch = Batch(ids, ids, ids == 0)
    weights = [p for model in models for p in model.parameters()]
    for model in models:
        model.recompute = cfg.activation_checkpointing
    for p in weights:
        p.grad = torch.empty_like(p)
    known = [t for p in weights for t in (p, p.grad)]

    def forward(rows):
        return [model(rows.inputs).sum() if model.config.head == "scalar" else token_logps(model, rows).sum() for model in models]

    with Peak(known) as training:
        sum(forward(batch[:rows])).backward()
    sides = 2 if recipe.name in ("dpo", "orpo") else 1  # (these evaluate pairs in one pass)
    with Peak(known) as evaluation, torch.no_grad():
        forward(batch[: sides * cfg.micro_batch])
    made = 2 * max(model.tok_embed.weight.nbytes for model in models)  # new gradients of embedding and head, before they are added
    for peak, phase, besides, least in ((training, "a micro-batch in training", made, 0.45),
                                        (evaluation, "a micro-batch in evaluation", 0, 0.15)):  # (where 1 GiB for slices is the most)
        planned = numbers["phases"][phase] * 2**30 + besides
        assert least * planned < peak.most <= planned, (phase, peak.most / 2**30, planned / 2**30)


def test_the_page_has_the_plans_as_they_are():
    """docs/SCALE.md: a row for each recipe, with the numbers that --plan prints for its card; the hours of each chain."""
    page = (ROOT / "docs/SCALE.md").read_text(encoding="utf-8")
    for name in NAMES:
        recipe = importlib.import_module(f"minialign.recipes.{name}").RECIPE
        numbers = plan_of(name)
        phase, size = max(numbers["phases"].items(), key=lambda item: item[1])
        row = [recipe.gpus, f"{sum(numbers['resident'].values()):.1f}", f"{phase}, {size:.1f}", f"{numbers['GiB']:.1f}",
               f"{sum(numbers['hours'].values()):.1f}", f"{max(numbers['host'].values()):.0f}"]
        assert f"| [{name}](../minialign/recipes/{name}.py) | " + " | ".join(map(str, row)) + " |\n" in page, (name, row)
    for name in CHAINS:
        hours = sum(sum(plan_of(stage.recipe)["hours"].values()) for stage in stages_of(name))
        assert f"| [{name}](../minialign/recipes/{name}.py) | {hours:.1f} |" in page, (name, hours)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_its_methods_config_with_other_numbers(name):
    """No new fields, so that `python -m minialign METHOD --resume` goes on with its runs; every flag has a comment; a receipt stands."""
    module = importlib.import_module(f"minialign.recipes.{name}")
    recipe = module.RECIPE
    own = [field.name for field in dataclasses.fields(recipe.method.Config)]
    assert [field.name for field in dataclasses.fields(recipe.Config)] == own and field_comments(recipe.Config).keys() >= set(own)
    assert "Receipt (of a run at full size): " in module.__doc__
    assert f"--nproc_per_node {recipe.gpus} -m minialign.recipes.{name}" in module.__doc__
    assert recipe.Config().batch_size % recipe.gpus == 0


PUBLISHED = {"pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808, "mistral-7b": 7_241_732_096, "qwen2.5-1.5b": 1_543_714_304}


@pytest.mark.parametrize("name", recipes.MODELS)
def test_the_architectures_have_the_published_numbers_of_parameters(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(recipes.MODELS[name]).parameters()) == PUBLISHED[name]


def test_what_a_plan_counts():
    """SFT of pythia-1b on two cards, by hand: 12 bytes of moments and gradients and 4 of weights a parameter, halved; 8 flops a parameter
    and token with activation checkpointing, 6 without, 4 with adapters."""
    recipe = importlib.import_module("minialign.recipes.sft_tldr_pythia").RECIPE
    cfg, parameters = recipe.Config(), PUBLISHED["pythia-1b"]
    numbers = recipes.plan(recipe, cfg, "h100")
    assert numbers["resident"]["weights"] == 4 * parameters / 2 / 2**30
    assert numbers["resident"]["gradients and moments"] == 12 * parameters / 2 / 2**30 and "frozen copies" not in numbers["resident"]
    assert numbers["length"] == 576  # 565 tokens are 564 positions, in whole 64s 576
    seconds = 6 * parameters * cfg.steps * cfg.batch_size * 576 / 2 / (790e12 * 0.5)
    assert numbers["hours"]["training and scoring"] == pytest.approx(seconds / 3600)
    # Ten evaluations of 1 % of the rows, forward only. Each samples four answers, two on each card, from a bfloat16 copy of all weights
    # with a cache of 16 layers, keys and values; the copy's other half comes from the other card.
    assert numbers["hours"]["evaluation"] == pytest.approx(10 * 2 * parameters * 1_167 * 576 / 2 / (790e12 * 0.5) / 3600)
    assert numbers["hours"]["whole copies, gathered"] == pytest.approx(11 * parameters / 360e9 / 3600)
    positions, width = cfg.max_prompt + cfg.max_new, 2048
    assert numbers["hours"]["sampling"] == pytest.approx(
        10 * cfg.max_new * (2 * parameters + 2 * 16 * 2 * width * 2 * (positions - cfg.max_new / 2)) / (3.0e12 * 0.6) / 3600)
    cache, prefill = 1.75 * 2 * positions * 16 * 2 * width * 2, 2 * cfg.max_prompt * (6 * width + 2 * 8192) * 2
    assert numbers["phases"]["sampling"] == pytest.approx((2 * parameters + cache + prefill + 2 * 16 * 50304) / 2**30)
    assert numbers["host"] == {"loading": 2 * 2 * parameters / 2**30, "saving": 12 * parameters / 2**30}
    training = "a micro-batch in training"
    again = recipes.plan(recipe, dataclasses.replace(cfg, activation_checkpointing=True), "h100")
    assert again["hours"]["training and scoring"] == pytest.approx(8 / 6 * seconds / 3600)
    assert again["phases"][training] < numbers["phases"][training] / 2
    adapters = recipes.plan(recipe, dataclasses.replace(cfg, lora=64), "h100")
    assert adapters["resident"]["gradients and moments"] < numbers["resident"]["gradients and moments"] / 20
    half = recipes.plan(recipe, dataclasses.replace(cfg, lora=64, dtype="bfloat16"), "h100")  # the base is bfloat16, the adapters are not
    assert half["resident"]["gradients and moments"] == adapters["resident"]["gradients and moments"]
    assert half["resident"]["weights"] == adapters["resident"]["weights"] / 2
    assert adapters["hours"]["training and scoring"] == pytest.approx(4 / 6 * seconds / 3600 * adapters["parameters"] / parameters)


def plan_of(name, **changes):
    recipe = importlib.import_module(f"minialign.recipes.{name}").RECIPE
    return recipes.plan(recipe, dataclasses.replace(recipe.Config(), **changes), "h100")


def test_what_is_done_once_is_planned_once():
    """By hand: the reference of dpo is scored once per pair, not in each of three epochs; the last pass of reward_model; rows that IRFT's
    policy draws together, which changes only with the round: as many as a quarter of the card holds, where a step has 2."""
    remembered, kept = plan_of("dpo_ultrafeedback_mistral"), plan_of("dpo_ultrafeedback_mistral", precompute_ref=False)
    once, thrice = 8 * 2 * 184_320 + 2 * 2 * 61_135, 8 * 2 * 184_320 + 2 * 2 * 184_320
    assert remembered["hours"]["training and scoring"] / kept["hours"]["training and scoring"] == pytest.approx(once / thrice)
    model = plan_of("reward_model_tldr_pythia")
    rows = 92_858 - 928
    assert model["hours"]["reward_model's last pass"] == pytest.approx(
        2 * rows * PUBLISHED["pythia-1b"] * 640 / 2 / (790e12 * 0.5) / 3600)
    drawn, cache, layers = plan_of("irft_ultrachat_zephyr"), 2 * 32 * 8 * 128 * 2, PUBLISHED["mistral-7b"]
    fits = int(79.6 * 2**30 / 4 / (1.75 * cache * 768 + 16 * 32000))
    assert drawn["drawn"] == fits > 64
    rounds, evaluations = 100_000 / 8 / fits, 13  # (an evaluation samples four answers)
    moved = 256 * (rounds * (2 * layers + fits * cache * 640) + evaluations * (2 * layers + 0.5 * cache * 640))
    assert drawn["hours"]["sampling"] == pytest.approx(moved / (3.0e12 * 0.6) / 3600)


def test_receipts_stand_beside_the_plan(tmp_path, capsys, monkeypatch):
    recipe = importlib.import_module("minialign.recipes.sft_hh_pythia").RECIPE
    row = {"model": "pythia-1.4b", "method": "sft", "GiB": 20.25, "seconds": 1.5, "evaluation GiB": 8.0, "evaluation seconds": 0.25,
           "planned GiB": 21.0, "planned seconds": 1.25, "planned evaluation GiB": 9.0, "planned evaluation seconds": 0.5, "tokens/s": 9e3}
    record = {"device": "a card", "date": "2026-01-01", "batch_size": 16, "micro_batch": 2, "rows": [row, row | {"method": "dpo"}]}
    (tmp_path / "receipts.json").write_text(json.dumps(record))
    monkeypatch.setattr(recipes, "RECEIPTS", tmp_path / "receipts.json")
    recipes.print_plan(recipe, recipe.Config(), "h100")
    said = [line for line in capsys.readouterr().out.splitlines() if "receipt" in line]
    assert said == ["  receipt of a card, 2026-01-01, batch 16, micro-batch 2: 20.2 GiB (planned 21.0), 1.50 s a step (planned 1.25), "
                    "9,000 tokens/s; an evaluation 8.0 GiB (planned 9.0), 0.25 s (planned 0.50)"]


def test_the_list_names_them_all(capsys):
    from minialign.__main__ import main

    main(["recipes"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in FILES)
    assert said.index("chains ") < min(said.index(f"  {name} ") for name in CHAINS) and len(CHAINS) == 3


@pytest.mark.parametrize(("name", "flags", "said"), [
    ("sft_tldr_pythia", ["--plan", "abacus"], "a100, h100, h200"),
    pytest.param("sft_tldr_pythia", ["--gpus", "2"], "--nproc_per_node", marks=pytest.mark.slow),
    pytest.param("chain_tldr", ["--plan", "abacus"], "a100, h100, h200", marks=pytest.mark.slow),
    pytest.param("chain_hh", ["--gpus", "3"], "divide the batch size 64", marks=pytest.mark.slow)])
def test_a_wrong_flag_is_one_sentence(name, flags, said):
    done = run(name, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr


# -------------------------------------------------------------------------------------------------------------------- chains


def stages_of(name):
    return importlib.import_module(f"minialign.recipes.{name}").STAGES


@pytest.mark.parametrize("name", CHAINS)
def test_the_stages_of_a_chain_fit_together(name):
    """With the default folder each link is what the recipe itself names; it is an export of an earlier stage; one tokenizer, one model."""
    earlier, defaults = [], {"irft_ultrachat_pythia": {"policy": "EleutherAI/pythia-1.4b"}}  # (by itself it starts from the base)
    for stage in stages_of(name):
        recipe = stage.open()
        cfg = recipe.Config()
        for field in ("policy", "reward", "value"):
            taken, own = getattr(stage, field), getattr(cfg, field, "")
            if taken:
                assert taken.split("/")[0] in earlier
                assert own in (f"runs/{taken}", [f"runs/{taken}"], defaults.get(stage.recipe, {}).get(field))
            else:
                assert not str(own).startswith(("runs", "['runs")), (stage, field)
        earlier.append(stage.recipe)
    assert len({stage.open().model for stage in stages_of(name)}) == 1


def test_the_command_of_a_stage(tmp_path):
    """New, begun, at toy size; torchrun only for several processes."""
    last = stages_of("chain_tldr")[-1]
    cfg = recipes.ChainConfig(out=str(tmp_path))
    names = [f"{tmp_path}/{name}" for name in ("ppo_tldr_pythia", "sft_tldr_pythia/final", "reward_model_tldr_pythia/final")]
    own = ["--out", names[0], "--policy", names[1], "--reward", names[2], "--value", names[2]]
    module = ["-m", "minialign.recipes.ppo_tldr_pythia"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    assert recipes.command_of(last, cfg)[1:] == [*launcher, "2", *module, *own]
    assert recipes.command_of(last, dataclasses.replace(cfg, gpus=4))[1:] == [*launcher, "4", *module, *own]
    assert recipes.command_of(last, dataclasses.replace(cfg, gpus=1))[1:] == [*module, *own]
    assert recipes.command_of(last, dataclasses.replace(cfg, smoke=True, gpus=1))[1:] == [*module, "--smoke", "--gpus", "1", *own]
    (tmp_path / "ppo_tldr_pythia").mkdir()
    (tmp_path / "ppo_tldr_pythia/config.json").write_text("{}")
    assert recipes.command_of(last, dataclasses.replace(cfg, gpus=1))[1:] == [*module, "--resume", names[0]]


def test_a_chain_ends_where_a_stage_fails_and_goes_on_from_there(tmp_path, capsys, monkeypatch):
    """Stages that are other programs: the first is finished, the second fails with 7, then is stopped, then is well."""
    monkeypatch.setattr(recipes, "own_name", lambda: "a chain")
    programs = {"fails": "raise SystemExit(7)", "stops": "pass", "is killed": "import os; os.kill(os.getpid(), 9)",
                "is well": "import pathlib, sys; f = pathlib.Path(sys.argv[1]); f.mkdir(parents=True); (f / 'config.json').write_text('')"}
    stages, cfg, today = [recipes.Stage("first"), recipes.Stage("second")], recipes.ChainConfig(out=str(tmp_path)), ["is well", "fails"]
    monkeypatch.setattr(recipes, "command_of", lambda stage, cfg: [
        sys.executable, "-c", programs[today[stage.recipe == "second"]], f"{cfg.out}/{stage.recipe}/final"])
    ends = ("fails", 7, "failed with exit code 7"), ("stops", 1, "was stopped"), ("is killed", 137, "was ended by signal 9")
    for how, code, said in ends:
        today[1] = how
        with pytest.raises(SystemExit) as end:
            recipes.run_chain(stages, cfg)
        assert end.value.code == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"second {said}" in error and "again continues" in error
    today[:] = ["fails", "is well"]
    recipes.run_chain(stages, cfg)
    assert "first is finished" in capsys.readouterr().out


def test_a_sigterm_is_passed_on_to_the_stage():
    """The stage ends in its own way, here with code 5, and the chain's process lives on with the handler that it had."""
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print('ready', flush=True); time.sleep(60)"
    earlier, stage = signal.getsignal(signal.SIGTERM), subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert stage.stdout.readline() == b"ready\n"
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert recipes.wait_for(stage) == 5 and signal.getsignal(signal.SIGTERM) is earlier


@pytest.mark.parametrize("name", CHAINS)
def test_the_plan_of_a_chain_is_the_sum_of_its_stages(name, capsys, monkeypatch):
    monkeypatch.setattr(recipes, "own_name", lambda: name)
    hours = recipes.plan_chain(stages_of(name), recipes.ChainConfig(plan="h100"))
    said = capsys.readouterr().out
    parts = [sum(plan_of(stage.recipe)["hours"].values()) for stage in stages_of(name)]
    assert hours == pytest.approx(sum(parts)) and f"{name}: {hours:.2f} hours for {len(parts)} stages" in said
    assert f"{2 * hours:.2f} hours of a card" in said  # (all of these stages are for two)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_at_toy_size(name, tmp_path):
    """End to end over two processes: each stage starts from what the one before made; a second call has nothing to do."""
    done = run(name, "--smoke", "--out", str(tmp_path))
    assert done.returncode == 0 and done.stdout.count("ran in 2 processes") == len(stages_of(name)), done.stderr[-3000:]
    for stage in stages_of(name):
        folder = tmp_path / stage.recipe
        config = json.loads((folder / "config.json").read_text())
        assert (folder / "final/config.json").is_file()
        assert not stage.policy or config["policy"] == str(tmp_path / stage.policy)
        assert not stage.reward or config["reward"] == [str(tmp_path / stage.reward)] and config["value"] == str(tmp_path / stage.value)
    again = run(name, "--smoke", "--out", str(tmp_path))
    assert again.returncode == 0 and again.stdout.count("is finished") == len(stages_of(name)) and "step 1" not in again.stdout


@pytest.mark.slow
def test_a_killed_chain_ends_as_the_unbroken_one(tmp_path):
    """kill -9 of all its processes inside the first stage, then after it; the third call ends with the same weights, bit for bit."""
    flags = [sys.executable, "-m", "minialign.recipes.chain_hh", "--smoke", "--gpus", "1", "--out"]
    settings = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "killed/sft_hh_pythia"
    for until in (first / "checkpoints/step_000001", first / "final/config.json"):
        process = subprocess.Popen([*flags, str(tmp_path / "killed")], start_new_session=True, **settings)
        while not until.exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    for folder in ("killed", "whole"):
        assert run("chain_hh", *flags[3:], str(tmp_path / folder)).returncode == 0
    for stage in stages_of("chain_hh"):
        killed, whole = (load_file(tmp_path / folder / stage.recipe / "final/model.safetensors") for folder in ("killed", "whole"))
        assert killed.keys() == whole.keys() and all(torch.equal(killed[key], whole[key]) for key in whole)


# ------------------------------------------------------------------------------------------------------- GSM8K: right answers


def test_pass_at_k_is_the_share_of_sets_with_a_right_answer():
    """Against every set of k of n answers; and its mean over all outcomes of n draws is 1 − (1 − p)^k."""
    for n, k in ((1, 1), (4, 2), (5, 3), (6, 6)):
        for right in range(n + 1):
            sets = [any(i < right for i in chosen) for chosen in itertools.combinations(range(n), k)]
            assert gsm8k.pass_at_k(right, n, k) == pytest.approx(sum(sets) / len(sets))
        p = 0.3
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * gsm8k.pass_at_k(c, n, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_accuracy_against_enumeration(tmp_path, policy_folder, capsys, monkeypatch):
    """A random model's answers of one token, right if the token is one of five: their probability from the logits of each question.

    Greedy: whether the most likely token is one. pass@3 of 400 answers to each of two questions: within four standard errors.
    """
    policy, tokenizer, _ = load_model(policy_folder)
    file = tmp_path / "questions.jsonl"
    questions = ["ask for tea: ", "ask for ink: "]
    file.write_text("".join(json.dumps({"prompt": q, "completion": "#### 1"}) + "\n" for q in questions))
    with torch.no_grad():
        probs = [policy(torch.tensor([encode_prompt(tokenizer, q)]))[0, -1].softmax(-1) for q in questions]
    right = {int(probs[0].argmax()), *range(8, 12)}
    texts = {tokenizer.decode([i]) for i in right}
    monkeypatch.setattr(gsm8k, "exact_match", lambda demos: lambda prompts, answers: [float(text in texts) for text in answers])
    same = [i for i in range(policy.config.vocab_size) if tokenizer.decode([i]) in texts]
    cfg = gsm8k.Accuracy(accuracy=str(policy_folder), prompts=str(file), pass_at=3, samples=400, max_new=1, device="cpu", dtype="float64",
                         out=str(tmp_path / "numbers.json"))
    numbers = gsm8k.measure(cfg)
    exact = [float(p[same].sum()) for p in probs]
    assert numbers["greedy"][0] == sum(int(p.argmax()) in same for p in probs) / 2 and numbers["questions"] == 2
    for k in (1, 3):
        errors = [(k * (1 - p) ** (k - 1)) ** 2 * p * (1 - p) / 400 for p in exact]  # of 1 − (1 − p)^k, to first order
        expected = sum(1 - (1 - p) ** k for p in exact) / 2
        assert 0 < expected < 1 and abs(numbers[f"pass@{k}"][0] - expected) < 4 * math.sqrt(sum(errors)) / 2, k
    assert "pass@3" in capsys.readouterr().out and json.loads((tmp_path / "numbers.json").read_text())["questions"] == 2


def test_accuracy_of_a_file_in_gsm8ks_columns(tmp_path, policy_folder, monkeypatch):
    """Three questions, answers of a policy that is replaced by a table: two of three are right greedily; Wilson's interval by hand."""
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"so it is <<{i}+1={i + 1}>>.\n#### {i + 1}"}) + "\n"
                            for i in (1, 2, 1_000)))
    tokenizer = load_model(policy_folder)[1]
    said = iter([["#### 2", "the answer is 3", "#### 1,001"]])

    class Answers:
        completions = None

    def sample(policy, ids, **more):
        answers = Answers()
        answers.completions = next(said)
        return answers

    monkeypatch.setattr(gsm8k, "sample", sample)
    monkeypatch.setattr(gsm8k, "load_model", lambda *args, **more: (None, tokenizer, None))
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, text: text)
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: [1] * len(text))
    share, low, high = gsm8k.measure(gsm8k.Accuracy(accuracy="x", prompts=str(file), pass_at=0, device="cpu"))["greedy"]
    z = 1.96  # the roots p of (2/3 − p)² = z² p (1 − p) / 3
    assert share == 2 / 3 and all((2 / 3 - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / 3) for p in (low, high)) and low < share < high


def test_accuracy_refuses_fewer_answers_than_k():
    with pytest.raises(BadInput, match="at least k answers"):
        gsm8k.measure(gsm8k.Accuracy(accuracy="x", pass_at=9, samples=8))


def test_the_sft_command_of_gsm8k_fits_one_card():
    """The command in the docstring, as it stands there, by plan."""
    command = " ".join(gsm8k.__doc__.split("minialign sft ")[1].split("\n\n")[0].split())
    cfg = cli(sft.Config, shlex.split(command), prog="sft")
    numbers = recipes.plan(recipes.Recipe(sft, sft.Config, "qwen2.5-1.5b", "openai/gsm8k", 1), cfg, "h100")
    assert recipes.fits(numbers) and cfg.out == "runs/sft_gsm8k_qwen"
    as_it_was = dataclasses.replace(cfg, dtype="float32", micro_batch=0)
    assert not recipes.fits(recipes.plan(recipes.Recipe(sft, sft.Config, "qwen2.5-1.5b", "openai/gsm8k", 1), as_it_was, "h100"))
