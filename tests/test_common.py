import math
from dataclasses import dataclass, field

import pytest
import torch

from minialign import common
from minialign.common import BadInput


@dataclass
class Config:
    beta: float = 0.1               # β: pull to ref
    steps: int = 5                  # how many
    max_prompt: int | None = None   # most tokens
    greedy: bool = False            # likeliest token
    names: list[str] = field(default_factory=lambda: ["a"])  # some names


def parse(*argv):
    return common.cli(Config, list(argv), prog="prog", description="What it does.")


def test_cli_defaults_and_types():
    assert parse() == Config()
    cfg = parse("--beta", "2", "--max-prompt", "7", "--greedy", "--names", "b", "c", "--steps=9")
    assert cfg == Config(beta=2.0, steps=9, max_prompt=7, greedy=True, names=["b", "c"])
    assert parse("--no-greedy").greedy is False


@pytest.mark.parametrize(("argv", "message"), [
    (["--bta", "0.1"], "unknown flag --bta: did you mean --beta? (`prog --help` lists them)"),
    (["--bet", "0.1"], "did you mean --beta?"),  # no silent abbreviations
    (["--max-promt", "3"], "did you mean --max_prompt?"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--beta"], "expected one argument"),
    (["stray"], "unknown argument stray"),
])
def test_cli_errors_are_one_sentence_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@dataclass
class Resumable:
    lr: float = 1e-3                # learning rate
    resume: str = ""                # run folder


def test_flags_beside_resume_are_refused_even_at_their_default(capsys):
    assert common.cli(Resumable, ["--resume", "runs/a"], prog="prog").resume == "runs/a"
    assert common.cli(Resumable, ["--resume", "runs/a", "--resume=runs/b"], prog="prog").resume == "runs/b"
    with pytest.raises(SystemExit) as stop:
        common.cli(Resumable, ["--lr", "1e-3", "--resume=runs/a"], prog="prog")
    assert stop.value.code == 2 and "drop --lr (to go on otherwise: --policy runs/a/final)" in capsys.readouterr().err


def test_help_shows_every_field_with_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "What it does." in text
    expected = (("--beta", "β: pull to ref", "0.1"), ("--steps", "how many", "5"), ("--greedy", "likeliest token", "False"),
                ("--max_prompt", "most tokens", "None"), ("--names", "some names", "a"))
    for flag, comment, default in expected:
        assert flag in text and f"{comment} (default: {default})" in text


def test_batch_rows_are_permutations_epoch_by_epoch():
    """10 rows, batches of 4: rows 0-9 of the stream are one permutation, 10-19 another; a batch may straddle; nothing depends on order."""
    stream = [row for step in range(5) for row in common.batch_rows(10, 4, step, seed=3)]
    assert sorted(stream[:10]) == list(range(10)) and sorted(stream[10:20]) == list(range(10)) and stream[:10] != stream[10:20]
    assert common.batch_rows(10, 4, 2, seed=3) == stream[8:12]
    assert [common.batch_rows(10, 4, s, seed=4) for s in range(5)] != [stream[i : i + 4] for i in range(0, 20, 4)]
    assert sorted(common.batch_rows(3, 7, 0, seed=0))[:2] == [0, 0]  # fewer rows than a batch: epochs follow on


def test_batch_rows_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    common.batch_rows(10, 4, 2, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_derive_seed_is_fixed_for_ever():
    """The value, so that no refactoring changes what a seed means between releases."""
    assert common.derive_seed(0, (1, 2), 3) == common.derive_seed(0, (1, 2), 3) != common.derive_seed(0, (1, 2), 4)
    assert common.derive_seed("a", 1) == 6222101017213550541


def test_split_micro():
    assert common.split_micro([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]] and common.split_micro([1, 2], 0) == [[1, 2]]


def test_lr_schedules():
    lr = lambda step, **k: common.lr_at(step, lr=1.0, steps=100, **k)  # noqa: E731
    assert lr(0, warmup=0.1) == pytest.approx(0.1) and lr(9, warmup=0.1) == 1 and lr(10, warmup=0.1) == 1
    assert lr(50) == pytest.approx(0.5) and lr(25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert lr(25, schedule="linear") == 0.75 and lr(99, schedule="constant") == 1
    with pytest.raises(BadInput, match="cosine, linear or constant"):
        lr(1, schedule="cosin")


def test_mean_of_micro_batches():
    mean = common.Mean()
    mean.add({"a": 1.0}, weight=0.25)
    mean.add({"a": torch.tensor(5.0), "b": 2.0}, weight=0.75)
    assert mean.result() == {"a": 4.0, "b": 2.0}


def test_rows_of_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    common.append_row(path, {"step": 1})
    common.append_row(path, {"step": 2})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')  # torn
    assert common.read_rows(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl:2: not a line of JSON"):
        common.read_rows(path)
    assert common.read_rows(tmp_path / "none") == []


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    common.write_atomic(path, "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(OSError):
        common.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_exit_codes(capsys):
    for error, code in ((BadInput("no such thing"), 2), (FloatingPointError("diverged"), 1), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as stop, common.exit_codes("prog"):
            raise error
        assert stop.value.code == code
    assert "prog: no such thing\n" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), common.exit_codes("prog"):  # a bug keeps its traceback
        1 / 0  # noqa: B018


def test_device_and_dtype():
    assert common.pick_device("cpu").type == "cpu" and common.pick_dtype("float64") == torch.float64
    with pytest.raises(BadInput, match="--device tpu9 cannot be used"):
        common.pick_device("tpu9")
    with pytest.raises(BadInput, match="float32, bfloat16 or float64"):
        common.pick_dtype("fp16")


@pytest.mark.parametrize("name, local_rank, expected", [("auto", None, 0), ("cuda", None, 0), ("cuda:1", None, 1), ("cuda", "3", 3)])
def test_a_gpu_is_named_by_its_index_and_made_the_current_one(monkeypatch, name, local_rank, expected):
    """torch.cuda.set_device refuses a device without an index; under torchrun each process takes its own. (No GPU: what torch is asked.)"""
    current, made = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: made.append(device))
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert common.pick_device(name) == torch.device("cuda", expected) == current[0] == made[0]
