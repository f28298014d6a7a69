"""Seeds, batches, the learning rate, files, devices."""

import errno
import io
import math
import os
import random

import pytest
import torch

from minialign.batch import collate
from minialign.engine import common
from minialign.engine.common import BadInput


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


@pytest.mark.parametrize(("n", "world", "micro_batch", "unit"), [
    (8, 1, 3, 1), (8, 1, 0, 1), (12, 2, 0, 1), (12, 2, 4, 1), (12, 3, 2, 2), (16, 4, 2, 2), (64, 8, 4, 1), (6, 1, 100, 1)])
def test_rows_are_dealt_by_length(monkeypatch, n, world, micro_batch, unit):
    """Over all processes every row occurs once and units stay together. A pass has at most micro_batch rows, equally many in each process,
    none longer than one of the pass before. It ends before the next rows, one for each process, are all below two thirds of its longest."""
    rng = random.Random(n)
    lengths = [rng.randrange(1, 50) for _ in range(n)]
    monkeypatch.setattr(common.parallel, "world", lambda: world)
    dealt = [common.passes(lengths, micro_batch, unit=unit, rank=rank) for rank in range(world)]
    assert sorted(i for own in dealt for micro in own for i in micro) == [*range(n)]
    if world == 1 and micro_batch in (0, 100):
        assert dealt == [[[*range(n)]]]
        return
    assert len({tuple(map(len, own)) for own in dealt}) == 1
    longest = [max(lengths[i - i % unit : i - i % unit + unit]) for i in range(n)]  # of the row's unit
    before = 50
    for micros in zip(*dealt, strict=True):  # the passes that wait for each other
        assert all(len(micro) <= (micro_batch or n // world) and micro[i] // unit == micro[i - i % unit] // unit
                   for micro in micros for i in range(len(micro)))
        sizes = sorted((longest[i] for micro in micros for i in micro), reverse=True)
        assert sizes[0] <= before and (len(micros[0]) == unit or sizes[-world * unit] >= 2 / 3 * sizes[0])
        before = sizes[-1]


@pytest.mark.parametrize(("world", "batch", "micro_batch"), [(1, 32, 2), (1, 64, 4), (8, 64, 2), (8, 128, 4), (4, 32, 4), (8, 512, 2)])
def test_dealt_rows_need_little_padding(monkeypatch, world, batch, micro_batch):
    """Rows with log-normal lengths, as dialogues have. All processes wait for the widest of their passes: in the file's order they compute
    1.3 to 4 tokens for each real one, dealt less than 1.5."""
    torch.manual_seed(0)
    lengths = [min(1024, int(x)) for x in torch.distributions.LogNormal(5.0, 0.8).sample((batch,))]
    monkeypatch.setattr(common.parallel, "world", lambda: world)

    def padded(dealt):
        return sum(sum(map(len, micros)) * max(lengths[i] for micro in micros for i in micro)
                   for micros in zip(*dealt, strict=True)) / sum(lengths)

    part = batch // world
    in_order = [common.split_micro(range(rank * part, (rank + 1) * part), micro_batch) for rank in range(world)]
    by_length = [common.passes(lengths, micro_batch, rank=rank) for rank in range(world)]
    assert padded(in_order) > 1.3 and padded(by_length) < min(1.5, 0.85 * padded(in_order))


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
def test_in_micro_keeps_the_order_and_the_width(micro_batch):
    """Of a Batch, whose passes are trimmed and sorted, and of a range over encoded rows."""
    batch = collate([[1]] * 4, [[2, 0], [3, 3, 3, 0], [4, 0], [5, 5, 0]], pad_id=0)
    found = common.in_micro(lambda micro: micro.inputs * 10, batch, micro_batch)
    assert torch.equal(found, batch.inputs * 10)  # the padding is 0
    assert common.in_micro(lambda micro: micro.inputs[:, 0] + micro.mask.sum(1), batch, micro_batch).tolist() == [3, 5, 3, 4]
    rows, seen = [([1], [2] * n) for n in (3, 1, 4, 1, 5)], []
    found = common.in_micro(lambda micro: seen.append([*micro]) or torch.tensor([[i, -i] for i in micro]), range(5), micro_batch, rows)
    assert found.tolist() == [[i, -i] for i in range(5)]
    assert seen == {0: [[0, 1, 2, 3, 4]], 1: [[4], [2], [0], [1], [3]], 2: [[4, 2], [0], [1, 3]], 3: [[4, 2, 0], [1, 3]]}[micro_batch]


def test_floats_are_those_of_float():
    """Numbers and tensors of several types, in their order; float32 is widened exactly."""
    values = [1, torch.tensor(0.1), torch.tensor(True), 0.1, torch.tensor(0.1).double(), torch.tensor(7), torch.tensor(math.nan)]
    found = common.floats(values)
    assert found[:-1] == [float(value) for value in values[:-1]] and math.isnan(found[-1]) and common.floats([]) == []


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
    assert common.read_rows(path, "step") == [{"step": 1}, {"step": 2}]
    whole = path.read_bytes().split(b'{"step": 3')[0]
    for torn in (b'{"step": 3, "text": "caf\xc3', b"12", b"{}", b'{"step": "1"}', b"\0" * 9, b'{"step": 3, \0\0', b"null\n", b"\xe2\x80\n"):
        path.write_bytes(whole + torn)
        assert common.read_rows(path, "step") == [{"step": 1}, {"step": 2}]
        path.write_bytes(torn.removesuffix(b"\n") + b"\n" + whole)  # not at the end: nothing that a killed run leaves
        with pytest.raises(BadInput, match=r"metrics.jsonl:1: not an object of JSON with a step"):
            common.read_rows(path, "step")
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl:2: not an object of JSON with a step"):
        common.read_rows(path, "step")
    assert common.read_rows(tmp_path / "none") == []


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    common.write_atomic(path, "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "RETRY_SECONDS", ())
    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(OSError):
        common.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_device_and_dtype():
    assert common.pick_device("cpu").type == "cpu" and common.pick_dtype("float64") == torch.float64
    with pytest.raises(BadInput, match="--device tpu9 cannot be used"):
        common.pick_device("tpu9")
    with pytest.raises(BadInput, match=r"float32, bfloat16 or float64 \(or, in training, mixed\)"):
        common.pick_dtype("fp16")


@pytest.mark.parametrize("name, local_rank, expected", [("auto", None, 0), ("cuda", None, 0), ("cuda:1", None, 1), ("cuda", "3", 3)])
def test_a_gpu_is_named_by_its_index_and_made_the_current_one(monkeypatch, full_float32, name, local_rank, expected):
    """torch.cuda.set_device refuses a device without an index; under torchrun each process takes its own. (No GPU: what torch is asked.)"""
    current, made = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: made.append(device))
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: current.append(on))
    assert common.pick_device(name) == torch.device("cuda", expected) == current[0] == made[0]
    assert current[1:] == [False] and torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_deterministic_is_torchs_own_setting(monkeypatch):
    """Off unless asked for. A workspace that the user has chosen for cuBLAS stays."""
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    common.pick_device("cpu")
    assert asked == [] and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    common.pick_device("cpu", deterministic=True)
    assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    common.pick_device("cpu", deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_line_that_was_half_written_is_written_again_whole(tmp_path, monkeypatch, capsys):
    """The disk fails in the middle of the second line, once. And what waiting cannot mend is raised at once."""
    path, tries = tmp_path / "rows.jsonl", []

    class Failing(io.FileIO):
        def write(self, content):
            tries.append(content)
            if len(tries) == 2:
                super().write(content[:5])
                raise OSError(errno.EIO, "Input/output error")
            return super().write(content)

    monkeypatch.setattr(common, "RETRY_SECONDS", (0,))
    monkeypatch.setattr(common, "open", lambda path, mode: Failing(path, mode.replace("b", "")), raising=False)
    for n in range(3):
        common.append_row(path, {"step": n})
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n{"step": 2}\n' and len(tries) == 4
    assert capsys.readouterr().err == f"writing {path} failed ([Errno 5] Input/output error); try 2 in 0 s\n"
    with pytest.raises(FileNotFoundError):
        common.append_row(tmp_path / "none" / "rows.jsonl", {})
    assert not capsys.readouterr().err
