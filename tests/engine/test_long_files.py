"""JSONL files that are too long to be read at once: the same run as with all rows in memory, and no bad row that nobody hears of."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minialign import data
from minialign.engine.common import BadInput, read_rows
from minialign.engine.tracking import TIMED
from minialign.task import builtin_demos, builtin_tokenizer
from tests.processes import run_all

ROOT = Path(__file__).parents[2]


@pytest.fixture
def long(monkeypatch):
    """Files of more than 5 rows are long, and 3 rows are checked at a time."""
    monkeypatch.setattr(data, "LONG", 5)
    monkeypatch.setattr(data, "AT_ONCE", 3)


def result_of(folder):
    metrics = [{name: value for name, value in row.items() if name not in TIMED} for row in read_rows(folder / "metrics.jsonl")]
    return metrics, read_rows(folder / "samples.jsonl"), load_file(folder / "final/model.safetensors")


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "irft", "reward_model", "rft"])
def test_the_run_is_that_of_rows_in_memory(small, monkeypatch, capsys, method):
    """Metrics, samples and weights bit for bit; the rows are held out alike, and the long file is noticed."""
    results = []
    for limit in (data.LONG, 5):
        monkeypatch.setattr(data, "LONG", limit)
        monkeypatch.setattr(data, "AT_ONCE", 3)
        module, cfg = small(method)
        results.append(result_of(module.main(cfg)))
    (metrics, samples, weights), (long_metrics, long_samples, long_weights) = results
    assert (metrics, samples) == (long_metrics, long_samples)
    assert weights.keys() == long_weights.keys() and all(torch.equal(weights[name], long_weights[name]) for name in weights)
    assert capsys.readouterr().err.count("each is read when it is needed") == 1


def test_with_a_precomputed_reference_and_online(small, long, capsys):
    """--precompute_ref reads the rows of a long file twice. --online reads the whole file, because it needs the prompts beside the rows."""
    module, cfg = small("dpo", precompute_ref=True)
    module.main(cfg)
    assert "each is read" in capsys.readouterr().err
    module, cfg = small("dpo", online=True, reward=["length:9"])
    module.main(cfg)
    assert "each is read" not in capsys.readouterr().err


@pytest.mark.parametrize("online", [False, True])
def test_rows_that_cannot_be_used_where_the_reference_is_remembered(small, long, tmp_path, capsys, online):
    """One prompt fills max_len: --precompute_ref knows the rows that are trained on in its place."""
    pairs = [json.loads(line) for line in open(small("dpo")[1].pairs)]
    pairs[3]["prompt"] = "ask for tea: " * 6
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    module, cfg = small("dpo", pairs=str(path), **({"online": True, "reward": ["length:9"]} if online else {"precompute_ref": True}))
    module.main(cfg)
    assert len(read_rows(Path(cfg.out) / "metrics.jsonl")) == cfg.steps


def test_a_prompt_that_fills_the_row_is_no_prompt_without_room(small, long, tmp_path, capsys):
    """irft leaves such a prompt out, however long it is, and says how many; a step of a long file reads the rows it needs, not all."""
    demos = [vars(demo) for demo in builtin_demos(60)]
    demos[10]["prompt"] *= 20
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(demo) + "\n" for demo in demos))
    module, cfg = small("irft", demos=str(path), steps=4, batch_size=4, eval_every=100, held_out=0.0)
    reads, read = [], data.LongFile.read

    def counted(self, i, counted=None):
        reads.append(i)
        return read(self, i, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.LongFile, "read", counted)
        module.main(cfg)
    said = capsys.readouterr().err
    assert "1 prompts of 12 fill --max_len" in said
    assert f"{path}: the run ended after 12 of 60 rows had been checked" in said
    assert len(reads) < 4 * 4 * 8  # (three for a batch, some for lengths and the check)


def test_a_bad_row_far_behind_stops_the_run_early(small, long, tmp_path, capsys):
    """Row 20, of which the third step reads nothing: it is found when it is checked, at step 7 of 40, with its line. With --skip_bad the
    run ends and counts it."""
    good = [json.dumps(vars(demo)) for demo in builtin_demos(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*good[:19], '{"prompt": "p"}', *good[20:]]))
    module, cfg = small("sft", demos=str(path), steps=40, batch_size=1, held_out=0.5)
    with pytest.raises(BadInput, match=re.escape(f"{path}:20: found the keys ['prompt'], expected") + ".*--skip_bad"):
        module.main(cfg)
    done = len(read_rows(Path(cfg.out) / "metrics.jsonl"))
    assert done <= 6  # (a step may have asked for the row before)
    capsys.readouterr()
    module, cfg = small("sft", demos=str(path), steps=40, batch_size=1, held_out=0.5, skip_bad=True)
    module.main(cfg)
    said = capsys.readouterr().err
    assert f"{path}: 1 bad rows of 40; the next row is read in the place of each; the first: {path}:20: found the keys" in said


def test_the_next_row_of_the_same_part_takes_the_place_of_one_that_cannot_be_used(long, tmp_path, capsys):
    """Rows 1 and 3 fill max_len, row 5 is bad. The training rows are 0 to 3, held out are 4 and 5: no part reads a row of the other."""
    answers = ["a", "b", "a", "c", "a", None]
    prompts = ["rope", "rope" * 9, "ink", "ink" * 12, "oil", "oil"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": a} if a else {"prompt": p}) + "\n"
                            for p, a in zip(prompts, answers, strict=True)))
    tokenizer = builtin_tokenizer()
    rows = data.long_demos(path, tokenizer, max_prompt=None, skip_bad=True)
    train, held_out = data.split_scorable(rows, 1 / 3, max_len=20)
    texts = [[tokenizer.decode(row[0][1:]) for row in part] for part in (train, held_out)]  # [1:]: without BOS
    assert texts == [["rope", "ink", "ink", "rope"], ["oil", "oil"]]
    assert len(train) == 4 and tokenizer.decode(train[-1][0][1:]) == "rope" and [*train[2:3]] == [train[1]]
    for _ in range(3):
        rows.long.check()
    said = capsys.readouterr().err
    assert "2 prompts of 6 fill --max_len; the next row is read in the place of each" in said and "1 bad rows of 6;" in said
    with pytest.raises(BadInput, match="no usable rows"):
        data.split_scorable(rows, 0, max_len=1)[0][0]


def test_what_was_cut_and_what_is_not_read_is_said_at_the_end(long, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "ask for " * (n + 1), "completion": "a", "id": n}) + "\n" for n in range(7)))
    rows = data.long_demos(path, builtin_tokenizer(), max_prompt=20, skip_bad=False)
    for _ in range(5):
        rows.long.check()
    said = capsys.readouterr().err.splitlines()
    assert said[1:] == ["5 of 7 prompts are cut to --max_prompt 20: they lose their beginning", f"{path}: columns that are never read: id"]
    assert max(len(row[0]) for row in rows) == 20


def test_a_prompt_without_room_is_named_when_it_is_read(small, long, tmp_path):
    """The first rows fit. Row 30 leaves no room for --max_new."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "ask for tea: " * (12 if n == 29 else 1)}) + "\n" for n in range(40)))
    module, cfg = small("rloo", prompts=str(path), steps=40)
    with pytest.raises(BadInput, match=re.escape(f"{path}:30: the longest prompt has 157 tokens") + ".*--max_prompt"):
        module.main(cfg)


def test_a_file_that_changes_is_named(long, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    rows = data.long_demos(path, builtin_tokenizer(), max_prompt=None, skip_bad=True)
    assert rows[7]
    path.write_text('{"prompt": "a", "completion": "bb"}\n' * 8)
    with pytest.raises(BadInput, match="was changed while this run reads it"):
        rows[7]


def test_lines_start_where_they_do(tmp_path):
    """Random bytes with blank lines, carriage returns and no end of line at the end, against bytes.split."""
    rng, path = random.Random(0), tmp_path / "lines"
    for _ in range(300):
        content = b"".join(rng.choice([b"\n", b"a", b" ", b"\r\n", b"{}" * 9, "é".encode()]) for _ in range(rng.randrange(20)))
        path.write_bytes(content)
        starts, numbers = data.line_starts(path)
        lines = [content[start:end] for start, end in zip(starts, starts[1:], strict=False)]
        expected = content.split(b"\n")
        assert [line.removesuffix(b"\n") for line in lines] == expected[: len(lines)] and not any(expected[len(lines):])
        assert numbers.tolist() == [number for number, line in enumerate(expected) if line.strip()]


def million(path, rows=1_000_000):
    demos = builtin_demos(1000)
    with open(path, "w") as file:
        file.writelines(json.dumps(vars(demos[i * 7919 % 1000])) + "\n" for i in range(rows))
    return path


@pytest.mark.slow
def test_a_million_rows_take_less_than_500_mb(policy_folder, tmp_path, record_property):
    """A process of its own, from its start to its first steps: peak resident memory. How many seconds the first step takes is recorded."""
    program = """if True:
        import sys, time
        began = time.monotonic()
        from minialign.engine.run import Run
        from minialign.engine.tracking import peak_memory
        def first_step(self, step, metrics):
            print("first step", time.monotonic() - began, peak_memory(self.device) * 2**30 / 1e6)
            sys.exit()
        Run.end_of_step = first_step
        from minialign.methods import sft
        sft.main(sft.Config(policy=sys.argv[1], demos=sys.argv[2], max_len=64, batch_size=8, out=sys.argv[3]))"""
    path = million(tmp_path / "million.jsonl")
    command = [sys.executable, "-c", program, policy_folder, path, tmp_path / "run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds, megabytes = map(float, result.stdout.splitlines()[-1].split()[2:])
    assert "1,000,000 rows" in result.stderr and megabytes < 500
    record_property("seconds", round(seconds, 1))
    record_property("megabytes", round(megabytes))


@pytest.mark.slow
def test_two_processes_read_the_same_rows(small, tmp_path):
    """Under torchrun each process reads the file itself: losses to rounding, and the same rows in each step."""
    path, folders = million(tmp_path / "rows.jsonl", 120_000), []
    for processes in (1, 2):
        module, cfg = small("sft", demos=str(path), steps=3, held_out=0.0)
        result = run_all(processes, [(module, cfg)], tmp_path)
        assert result.returncode == 0 and "120,000 rows" in result.stderr, result.stderr
        folders.append(Path(cfg.out))
    one, two = (read_rows(folder / "metrics.jsonl") for folder in folders)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-12)
