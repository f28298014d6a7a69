"""The base model of the built-in task: made once, by a process of its own, and never noticed by the run that needed it. New run folders."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minialign.engine import opening, run
from minialign.engine.common import BadInput
from minialign.lora import load_model, merged
from minialign.weights import load_pretrained

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick_base(monkeypatch, tmp_path):
    """In an empty folder, with a base model of two steps."""
    monkeypatch.setattr(opening, "BASE", opening.BASE.replace("--steps 500", "--steps 2"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_generator_of_the_run_does_not_notice(quick_base, capsys):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    folder = opening.builtin_base()
    assert torch.equal(before, torch.get_rng_state()) and "needs its base model once" in capsys.readouterr().out
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert opening.builtin_base() == folder and capsys.readouterr().out == ""  # the second time it is there
    assert (folder / "config.json").stat().st_mtime_ns == stamp


def test_a_first_run_is_the_run_that_finds_the_base(quick_base, small):
    """Adapters start from torch's generator: with the base trained first, or found, the same numbers come."""
    from minialign.methods import sft

    logged = []
    for out in ("first", "second"):
        cfg = sft.Config(steps=2, lora=4, device="cpu", save_every=9, eval_every=9, max_new=4, out=out)
        folder = sft.main(cfg)
        model, _, base = load_model(folder / "adapter")  # it names a folder that is there, not the word "builtin"
        final = load_pretrained(folder / "final")
        assert base == str(opening.builtin_base())
        assert all(torch.equal(p, q) for p, q in zip(merged(model).parameters(), final.parameters(), strict=True))
        logged.append([line.split('"seconds"')[0] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert logged[0] == logged[1]


def test_two_processes_train_one_base(quick_base):
    """Both ask at the same time: one trains, the other waits for it; what a killed process left half-made is swept."""
    leftover = quick_base / "builtin-base.tmp-1"
    leftover.mkdir(parents=True)
    (quick_base / "builtin-base").mkdir()  # made by an older version and never finished
    program = "from minialign.engine import opening; opening.BASE = %r; print(opening.builtin_base())" % opening.BASE
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("training it" in text for text in said) == 1 and all(text.strip().endswith("final") for text in said)
    assert sorted(path.name for path in quick_base.iterdir()) == ["builtin-base", "builtin-base.lock"]


def test_a_base_that_cannot_be_trained_is_one_sentence(quick_base, monkeypatch):
    monkeypatch.setattr(opening, "BASE", opening.BASE + " --steps 0")
    with pytest.raises(BadInput, match="the base model of the built-in task could not be trained .*--steps 0"):
        opening.builtin_base()


def test_two_runs_in_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = time.strftime("%Y%m%d-%H%M%S")
    monkeypatch.setattr(run.time, "strftime", lambda form: now)
    assert [str(run.new_folder("sft")) for _ in range(3)] == [f"runs/sft-{now}{end}" for end in ("", "~2", "~3")]
    assert len(list((tmp_path / "runs").iterdir())) == 3  # made, not only named


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="cannot be written"):
        run.new_folder("sft")
