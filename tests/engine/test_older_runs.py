"""A run folder that an older version wrote is resumed: its Config keys, its checkpoint and its hashes of inputs are still understood.

run_of_e4c1357/ was written by commit e4c1357: three runs of six steps on a model of 8 channels, stopped after the checkpoint of step 3,
with the metrics of the unbroken runs in expected.jsonl. (`checkpoints/latest`, which later versions do not write, is among the files.)
"""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from minialign.engine.common import read_rows
from minialign.engine.tracking import TIMED
from minialign.weights import load_pretrained

STORED = Path(__file__).parent / "run_of_e4c1357"


@pytest.mark.parametrize("method", ["dpo", "irl", "rloo"])
def test_a_stored_run_resumes_and_ends_as_it_would_have(method, tmp_path, monkeypatch):
    """dpo with stored reference log-probs, irl with a critic, base and anchor, rloo with adapters. Every metric to 1e-3 of what the
    unbroken run logged (bits need not agree between machines); the first three rows are the stored ones, bit for bit."""
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    module = importlib.import_module(f"minialign.methods.{method}")
    folder = module.main(module.Config(resume=method))
    torch.set_num_threads(threads)
    rows, expected = read_rows(folder / "metrics.jsonl"), read_rows(folder / "expected.jsonl")
    assert rows[:3] == expected[:3] and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, other in zip(rows, expected, strict=True):
        assert [name for name in row if name not in TIMED] == [name for name in other if name not in TIMED]
        for name in row.keys() - {*TIMED}:
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (row["step"], name)
    assert (folder / "checkpoints" / "step_000006" / "manifest.json").is_file()
    assert torch.isfinite(load_pretrained(folder / "final").head_weight).all()
    assert json.loads((folder / "config.json").read_text()) == json.loads((STORED / method / "config.json").read_text())
