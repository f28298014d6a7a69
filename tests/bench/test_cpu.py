"""The bench: ratios by hand, each body against float64 at a small shape, memory that is counted, numbers that are written."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minialign.bench import cpu as bench
from minialign.bench import gpu as bench_gpu
from minialign.bench.cpu import Config
from minialign.engine.common import BadInput


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
    rows = bench.start_up(1)
    assert [row["seconds"] for row in rows] == [pytest.approx(0.2)] * 2 and all("minialign" in row["name"] for row in rows)


def test_a_small_run_says_and_writes_the_same(tmp_path, capsys):
    numbers = bench.main(Config(n=64, c=16, v=500, rounds=1, only=["log-probs"], out=str(tmp_path / "new" / "bench.json")))
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == numbers
    assert len(numbers["tables"]) == 2
    for title, rows in numbers["tables"].items():
        assert title in out and rows[0]["ratio"] == rows[0]["least"] == rows[0]["most"] == 1
        for row in rows:
            assert row["error"] < 1e-4 and row["gradient error"] < 1e-5 and row["name"] in out, row
            assert row["entropy error"] is None or row["entropy error"] < 1e-4
        assert {"minialign, chunked"} <= {row["name"] for row in rows}


def test_a_wrong_body_shows_in_its_error(monkeypatch):
    """A body that halves every log-prob: its error is as large as the log-probs."""
    real = bench.log_prob_bodies

    def wrong(entropy):
        bodies = real(entropy)
        return bodies | {"wrong": lambda h, w, y: (0.5 * bodies["minialign, chunked"](h, w, y)[0], None)}

    monkeypatch.setattr(bench, "log_prob_bodies", wrong)
    rows = {row["name"]: row for row in bench.log_probs(Config(n=32, c=8, v=300, rounds=1), False)}
    assert rows["wrong"]["error"] > 1 and rows["wrong"]["gradient error"] > 0.4


@pytest.mark.parametrize("changes", [{"n": 0}, {"rounds": 0}, {"threads": 0}, {"only": ["log-prob"]}])
def test_bad_arguments_are_one_sentence(changes, tmp_path):
    with pytest.raises(BadInput, match="--"):
        bench.main(Config(**changes, out=str(tmp_path / "bench.json")))


# -------------------------------------------------------------------------------------------------- generation and steps


def test_bare_products_are_those_of_the_model():
    """Flops as torch counts them: 2 a weight and token forward, three times that with backward; the head's for scored tokens alone."""
    policy = bench.neox(n_embd=64, vocab_size=50)
    head, others = 50 * 64, 6 * (4 * 64 * 64 + 2 * 64 * 256)
    for backward, times in ((False, 2), (True, 6)):
        with FlopCounterMode(display=False) as flops:
            bench.products(policy, 7, 3, backward=backward)
        assert flops.get_total_flops() == times * (7 * others + 3 * head)


def test_the_stopwatch_counts_from_step_to_step():
    weight = torch.zeros(2, requires_grad=True)
    with bench.Stopwatch() as watch:
        optimizer = torch.optim.SGD([weight])
        for _ in range(4):
            optimizer.step()
    assert len(watch.marks) == 4 and 0 < watch.median() < 1
    optimizer.step()
    assert len(watch.marks) == 4  # it is gone


@pytest.mark.slow
def test_generation_and_steps_beside_their_peers():
    """At the smallest sizes that still run all of it: each group's first row is its unit, ours and the floor are there."""
    pytest.importorskip("trl", reason="TRL is not installed")
    rows = bench.generation(1, shapes={"small": dict(n_embd=64, vocab_size=300)}, batch=2, prompt=3, new=4)
    assert [row["name"] for row in rows] == ["small: transformers generate", "small: minialign", "small: bare products"]
    small = dict(n_embd=64, vocab_size=2048, n_layer=1, n_head=4)
    rows = bench.training_steps(1, count=2, shapes={"least": (8, small)}, n_prompt=8, n_completion=8)
    assert [row["name"].split(": ")[1] for row in rows] == ["trl", "minialign", "bare products"] * 3
    assert all(row["ratio"] == 1 for row in rows[::3]) and all(0 < row["seconds"] < 60 for row in rows)


@pytest.mark.slow
def test_ragged_rows_beside_trl():
    """Two steps of each: rows dealt by length need less padding than rows as they come, and TRL's need no less than those."""
    pytest.importorskip("trl", reason="the peer (requirements-dev.txt)")
    rows = {row["name"]: row for row in bench.ragged(1, count=2, shape=dict(n_embd=32, vocab_size=2048, n_layer=1, n_head=2))}
    padded = {name: row["padded"] for name, row in rows.items()}
    assert list(rows) == ["trl", "minialign, rows as they come", "minialign"] and rows["trl"]["ratio"] == 1
    assert 1 < padded["minialign"] < 0.9 * padded["minialign, rows as they come"] and padded["trl"] > 1.1 * padded["minialign"]


def test_a_late_token_over_an_early_one(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"70m": dict(n_embd=64, vocab_size=50)})
    rows = bench.decode_cost(1, batches=(1,), positions=(4, 9), count=2)
    assert [row["name"] for row in rows] == ["batch 1: position 4", "batch 1: position 9"] and rows[0]["ratio"] == 1


# -------------------------------------------------------------------------------------------------------------- on a GPU


def test_the_gpu_tables_at_small_sizes_on_a_cpu():
    """The same functions with the torch bodies: floors first, errors small for ours."""
    cpu = torch.device("cpu")
    rows = {row["name"]: row for row in bench_gpu.kernels(16, 300, cpu, rounds=2)}
    assert rows["fold"]["error"] < 2e-5 and rows["copy of the logits: 4 N V bytes"]["ratio"] == 1
    rows = {row["name"]: row for row in bench_gpu.log_probs(16, 32, 300, cpu, rounds=2)}
    for name in ("minialign", "eager in float32: log_softmax of all logits"):
        assert rows[name]["error"] < 2e-5 and rows[name]["entropy error"] < 1e-4, rows[name]
    rows = bench_gpu.scoring(16, 32, 300, cpu, rounds=2)
    assert [row["name"] for row in rows[:2]] == ["one bare product", "slices"] and all(row["error"] < 2e-5 for row in rows[1:])
    rows = bench_gpu.scorer(cpu, n=16, v=300, cs=(16, 32), rounds=2)
    assert all(row["tokens/s"] > 0 for row in rows) and len(rows) % 2 == 0
    assert sum("the faster" in row["name"] for row in rows) in (0, 2)  # (0 without Triton: there is nothing to compare)
    rows = bench_gpu.scaling(cpu, c=16, ns=(8, 16), vs=(100, 200), rounds=1)
    assert [row["name"] for row in rows] == ["N 8, V 100", "N 16, V 100", "N 8, V 200", "N 16, V 200"] and rows[0]["ratio"] == 1
    size = dict(bench_gpu.PYTHIA, vocab_size=100, n_layer=2, n_head=2, n_embd=32, rotary_dim=4)
    made = [bench_gpu.decoding(size, 2, 5, cpu, rounds=1, new=3), bench_gpu.training(size, 2, 8, cpu, rounds=1)]
    assert all(row["ms"] > 0 and row["tokens/s"] > 0 for rows in made for row in rows)


def test_a_body_that_fails_says_so_and_stands_aside():
    """Out of memory in its second round: the row names it, the others have all their rounds."""
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    good, bad = bench_gpu.time_in_turns({"good": lambda: None, "bad": fails}, torch.device("cpu"), rounds=3)
    assert good["ratio"] == 1 and bad == {"name": "bad: CUDA out of memory. Tried to allocate 7 GiB"} and len(calls) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
def test_without_a_card_the_gpu_bench_is_one_sentence(tmp_path):
    with pytest.raises(BadInput, match="no CUDA card"):
        bench.main(Config(gpu=True, out=str(tmp_path / "bench.json")))


def test_the_page_of_results_has_the_numbers_of_the_file():
    """docs/RESULTS.md against docs/bench_cpu.json: every ratio of every table, in the order of the file."""
    root = Path(__file__).parents[2]
    tables = json.loads((root / "docs" / "bench_cpu.json").read_text(encoding="utf-8"))["tables"]
    page = (root / "docs" / "RESULTS.md").read_text(encoding="utf-8").split("## Speed and memory, on a CPU")[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    by_kind = {title.split(",")[0].split(" ")[0]: rows for title, rows in tables.items()}
    with_entropy = {row["name"]: row for row in next(rows for title, rows in tables.items() if title.startswith("log-prob and"))}
    for row, line in zip(next(rows for title, rows in tables.items() if title.startswith("log-prob,")), cells[2:], strict=False):
        assert line[1].split(" ")[0] == f"{row['ratio']:.2f}" and line[2] == f"{row['memory']:.2f}", line
        if row["name"] in with_entropy:
            other = with_entropy[row["name"]]
            assert line[3].split(" ")[0] == f"{other['ratio']:.2f}" and line[4] == f"{other['memory']:.2f}", line
    groups = [rows[i : i + 3] for key in ("16", "an") for rows in [by_kind[key]] for i in range(0, len(rows), 3)]
    lines = cells[-len(groups) :]
    for (peer, ours, floor), line in zip(groups, lines, strict=True):
        assert line[1].split(" ")[1] == f"{peer['seconds']:.2f}" and line[2:] == [f"{ours['ratio']:.2f}", f"{floor['ratio']:.2f}"], line
    late = next(rows for title, rows in tables.items() if title.startswith("a token late"))
    assert all(f"{row['ratio']:.2f}" in page for row in late[1::2])
