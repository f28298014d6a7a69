"""Receipts at small sizes on a CPU: steps and an evaluation are timed, planned, written and printed."""

import dataclasses
import json

import pytest

from minialign import recipes
from minialign.bench import receipts
from minialign.engine import checkpoint
from minialign.engine.common import BadInput

TINY = {"tiny": dataclasses.replace(recipes.small(recipes.MODELS["mistral-7b"], 2048), max_len=1024)}


@pytest.mark.slow
def test_receipts_at_small_sizes(tmp_path, capsys, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *arguments: saved.append(arguments))
    cfg = receipts.Config(models=["tiny"], steps=2, batch_size=8, micro_batch=4, max_new=4, device="cpu", dtype="float32",
                          out=str(tmp_path / "receipts.json"))
    record = receipts.main(cfg, TINY)
    assert [row["method"] for row in record["rows"]] == ["sft", "dpo", "irft", "grpo"]
    for row in record["rows"]:
        for what in ("seconds", "evaluation seconds"):
            assert row[what] > 0 and row[f"planned {what}"] > 0, row
        assert row["planned GiB"] >= row["planned evaluation GiB"] > 0 and row["GiB"] is row["evaluation GiB"] is None
    assert not saved, "a checkpoint was written"
    said = capsys.readouterr().out
    assert "tiny, grpo: " in said and said.count("an evaluation ") == 4
    assert json.loads((tmp_path / "receipts.json").read_text())["rows"] == record["rows"]


def test_models_and_methods_are_known():
    with pytest.raises(BadInput, match="--models are of tiny"):
        receipts.main(receipts.Config(models=["huge"], device="cpu"), TINY)


def test_a_meter_measures_what_is_called_through_it(monkeypatch):
    """Seconds by a clock that is set by hand; the result is passed on."""
    import torch

    clock = iter([3.0, 7.5])
    monkeypatch.setattr(receipts.time, "perf_counter", lambda: next(clock))
    meter = receipts.Meter(torch.device("cpu"))
    assert meter.around(lambda: {"eval/nll": 1.0})() == {"eval/nll": 1.0} and meter.seconds == 4.5 and meter.gib is None
