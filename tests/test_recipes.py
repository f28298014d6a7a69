"""Every recipe's --smoke and --plan; its numbers are a Config of its method; the plan's counts against the thing itself."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minialign import recipes
from minialign.model import GPT
from minialign.settings import field_comments

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "minialign/recipes").glob("[!_]*.py"))
QUICK = ("irft_ultrachat_zephyr",)  # the others by the slow tests


def run(name, *flags, **settings):
    command = [sys.executable, "-m", f"minialign.recipes.{name}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, **settings)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES])
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
    """Finite numbers for every card; on the cards of 80 GB and more the recipe fits as it stands."""
    recipe = importlib.import_module(f"minialign.recipes.{name}").RECIPE
    numbers = recipes.print_plan(recipe, recipe.Config(), card)
    assert numbers["steps"] > 0 and all(size > 0 for size in numbers["memory"].values()) and sum(numbers["hours"].values()) > 0
    assert sum(numbers["memory"].values()) < recipes.CARDS[card][0]
    assert f"{numbers['parameters']:,} parameters" in capsys.readouterr().out


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
    assert numbers["memory"]["weights"] == 4 * parameters / 2 / 2**30
    assert numbers["memory"]["gradients and AdamW"] == 12 * parameters / 2 / 2**30 and "frozen copies" not in numbers["memory"]
    seconds = 6 * parameters * cfg.steps * cfg.batch_size * cfg.max_len / 2 / (790e12 * 0.5)
    assert numbers["hours"] == {"training and scoring": pytest.approx(seconds / 3600)}
    # An evaluation samples four answers, two on each card, from a bfloat16 copy of all weights, with a cache of 16 layers, keys and values.
    assert numbers["memory"]["whole copy to sample and export"] == 2 * parameters / 2**30
    positions = (cfg.max_prompt or 512) + cfg.max_new
    assert numbers["memory"]["cache of sampling"] == pytest.approx(1.75 * 2 * positions * 16 * 2 * 2048 * 2 / 2**30)
    again = recipes.plan(recipe, dataclasses.replace(cfg, activation_checkpointing=True), "h100")
    assert again["hours"]["training and scoring"] == pytest.approx(8 / 6 * seconds / 3600)
    assert again["memory"]["activations of a micro-batch"] < numbers["memory"]["activations of a micro-batch"] / 5
    adapters = recipes.plan(recipe, dataclasses.replace(cfg, lora=64), "h100")
    assert adapters["memory"]["gradients and AdamW"] < numbers["memory"]["gradients and AdamW"] / 20
    half = recipes.plan(recipe, dataclasses.replace(cfg, lora=64, dtype="bfloat16"), "h100")  # the base is bfloat16, the adapters are not
    assert half["memory"]["gradients and AdamW"] == adapters["memory"]["gradients and AdamW"]
    assert half["memory"]["weights"] == adapters["memory"]["weights"] / 2
    assert adapters["hours"]["training and scoring"] == pytest.approx(4 / 6 * seconds / 3600 * adapters["parameters"] / parameters)


def test_the_list_names_them_all(capsys):
    from minialign.__main__ import main

    main(["recipes"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in NAMES)


def test_an_unknown_card_is_one_sentence():
    done = run("sft_tldr_pythia", "--plan", "abacus")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a100, h100, h200" in done.stderr


@pytest.mark.slow
def test_receipts_at_small_sizes(tmp_path, capsys):
    """All four methods of a small model on a CPU: steps are timed and planned, and the file has them."""
    from minialign.bench import receipts

    small = {"tiny": recipes.small(recipes.MODELS["mistral-7b"], 2048)}
    small["tiny"] = dataclasses.replace(small["tiny"], max_len=1024)
    cfg = receipts.Config(models=["tiny"], steps=2, batch_size=8, micro_batch=4, max_new=4, device="cpu", dtype="float32",
                          out=str(tmp_path / "receipts.json"))
    record = receipts.main(cfg, small)
    assert [row["method"] for row in record["rows"]] == ["sft", "dpo", "irft", "grpo"]
    assert all(row["seconds"] > 0 and row["planned seconds"] > 0 and row["planned GiB"] > 0 for row in record["rows"])
    assert "tiny, grpo: " in capsys.readouterr().out and (tmp_path / "receipts.json").is_file()
    with pytest.raises(recipes.BadInput, match="--models are of"):
        receipts.main(dataclasses.replace(cfg, models=["huge"]), small)
