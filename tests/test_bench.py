"""The bench: ratios by hand, each body against float64 at a small shape, memory that is counted, numbers that are written."""

import json
import sys

import pytest
import torch

from minialign import bench
from minialign.bench import Config
from minialign.common import BadInput


def test_ratios_are_taken_within_a_round():
    """Rounds of 1, 2, 4 s and 2, 2, 4 s: ratios 2, 1, 1, median 1. The ratio of the sums, 8/7, would be another number."""
    assert bench.ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 4.0]}) == {"a": (1, 1, 1), "b": (1, 1, 2)}


def test_works_take_turns_and_the_first_round_is_not_counted():
    order = []
    seconds = bench.rounds_of({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4 and [len(values) for values in seconds.values()] == [3, 3]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_the_peak_is_what_was_held_at_once():
    """64 MiB made twice and dropped each time are 64, not 128, and are seen though they are gone at the end."""
    def work():
        for _ in range(2):
            torch.ones(2**24)
        return "done"

    result, peak = bench.peak_above(work)
    assert result == "done" and 60 * 2**20 < peak < 100 * 2**20


def test_what_importing_us_costs_is_beyond_torch(monkeypatch):
    """Runs of .1 s for torch and .3 s for each of ours: .2 s of our own."""
    monkeypatch.setattr(bench, "rounds_of", lambda works, rounds: {name: [0.1 if name == "import torch" else 0.3] for name in works})
    assert bench.start_up(1) == {name: pytest.approx(0.2 * (name != "import torch")) for name in bench.start_up(1)}


def test_a_small_run_says_and_writes_the_same(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "start_up", lambda rounds: {"import torch": 0.0, "import minialign": 0.1})
    numbers = bench.main(Config(n=64, c=16, v=500, rounds=1, out=str(tmp_path / "new" / "bench.json")))
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == numbers
    for rows in numbers["log-probs"].values():
        assert rows[0]["ratio"] == rows[0]["least"] == rows[0]["most"] == 1
        for row in rows:
            assert row["error"] < 1e-4 and row["gradient error"] < 1e-5 and row["name"] in out, row
    assert all(row["entropy error"] < 1e-4 for row in numbers["log-probs"]["log-prob and entropy"])
    assert {"minialign, chunked", "minialign, chunked, logits kept"} <= {row["name"] for row in numbers["log-probs"]["log-prob"]}


def test_a_wrong_body_shows_in_its_error(monkeypatch):
    """A body that halves every log-prob: its error is as large as the log-probs."""
    real = bench.log_prob_bodies

    def wrong(entropy):
        bodies = real(entropy)
        return bodies | {"wrong": lambda h, w, y: (0.5 * bodies["minialign, chunked"](h, w, y)[0], None)}

    monkeypatch.setattr(bench, "log_prob_bodies", wrong)
    rows = {row["name"]: row for row in bench.log_probs(Config(n=32, c=8, v=300, rounds=1), False)}
    assert rows["wrong"]["error"] > 1 and rows["wrong"]["gradient error"] > 0.4


@pytest.mark.parametrize("changes", [{"n": 0}, {"rounds": 0}, {"threads": 0}])
def test_bad_arguments_are_one_sentence(changes, tmp_path):
    with pytest.raises(BadInput, match="--"):
        bench.main(Config(**changes, out=str(tmp_path / "bench.json")))
