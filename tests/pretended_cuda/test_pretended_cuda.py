"""All methods and the sampler on a pretended CUDA device: no operands on two devices, no wait while a graph is recorded, few waits."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import LEARNING, METHODS
from tests.pretended_cuda import build
from tests.test_sample import FAMILIES

WAITS_PER_MICRO_BATCH = 12  # the budget of test_few_waits_per_micro_batch


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if torch.version.cuda or torch.version.hip:
        pytest.skip("needs a build of torch for CPUs, which has no device of that name")
    if platform.system() != "Linux" or not shutil.which("g++"):
        pytest.skip("needs Linux and g++, which compiles the device")
    path = tmp_path_factory.mktemp("pretended") / "device.so"
    build(path)
    return path


def on_the_device(library, program, *arguments):
    """What a function of runs.py yields, in a process of its own."""
    code = f"from tests.pretended_cuda import start; start({str(library)!r}, {program!r})"
    command, root = [sys.executable, "-c", code, *map(str, arguments)], Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("families", [["llama"], pytest.param(list(FAMILIES), marks=pytest.mark.slow)], ids=len)
def test_recorded_steps_are_the_model(library, families):
    """Graphs over the spans 64 and 128 and after rows have left: in float32 the CPU's completions. At most one question in 8 tokens, and
    two waits besides: so 53 tokens have .17 of a wait each."""
    found = on_the_device(library, "sampler", *families)
    assert len(found) == 3 * len(families)
    for row in found:
        assert row["off"] < (1e-5 if row["dtype"] == "float32" else 0.05) and (row["same"] or row["dtype"] == "bfloat16"), row
        assert row["waits"] <= 2 + -(-row["tokens"] // 8), row
    assert max(row["tokens"] for row in found) == 100 and all(row["waits"] <= 0.2 * 100 for row in found)


@pytest.mark.parametrize("families", [["gpt2", "llama"], pytest.param(list(FAMILIES), marks=pytest.mark.slow)], ids=len)
def test_passes_are_padded_to_few_lengths(library, families):
    """To 64, and to the context of 100 that 128 would exceed; log-probs and gradients are the CPU's. llama has grouped keys in float32."""
    for row in on_the_device(library, "passes", *families):
        assert row["off"] < 1e-4 and row["lengths"] == [64, 100], row


def waits(library, small, tmp_path, methods, dtype, **changes):
    """{method: the host's waits in the second step of a run of two, by place}. Fails if a run fails."""
    settings = {}
    for method in methods:
        config = {**vars(small(method)[1]), "steps": 2, "batch_size": 8, "eval_every": 10**6, "save_every": 10**6, **changes}
        config |= {"rounds": 1, "reward_share": 0.5, "mode": "literal"} if method in LEARNING else {}
        settings[method] = {**config, "out": str(tmp_path / f"{method}-{dtype}-{changes['micro_batch']}")}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    found = on_the_device(library, "methods", file, dtype)
    assert [row["method"] for row in found] == list(methods)
    assert not any("error" in row for row in found), next(row["error"] for row in found if "error" in row)
    return {row["method"]: row["waits"] for row in found}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_method_takes_two_steps(library, small, tmp_path, dtype):
    waits(library, small, tmp_path, METHODS, dtype, micro_batch=4)


@pytest.mark.slow
def test_few_waits_per_micro_batch(library, small, tmp_path):
    """What two more micro-batches add to a step, epochs counted apart, is at most 12 waits a micro-batch in every method."""
    few, many = (waits(library, small, tmp_path, METHODS, "bfloat16", micro_batch=size) for size in (4, 2))
    epochs = {"rebel": 4, "ppo": 4}
    extra = {method: (sum(many[method].values()) - sum(few[method].values())) / 2 / epochs.get(method, 1) for method in METHODS}
    assert max(extra.values()) <= WAITS_PER_MICRO_BATCH, extra


def test_the_device_refuses_and_waits_as_cuda_does(library):
    """Without this the other tests could not fail. A recording has no effect; each replay has all of them, on the values of then."""
    found = {name: value for row in on_the_device(library, "refusals") for name, value in row.items()}
    free = ("x + 1", "x * scalar of the host", "x.sum()", "x[:, rows]", "pinned.to", "record x + 1")
    waited = ("float(x)", "x.tolist()", "if x", "x.cpu()", "x[x > 2]", "x.nonzero()", "here.to", "x.copy_")
    assert {name: found[name] for name in free} == dict.fromkeys(free, 0)
    assert {name: found[name] for name in waited} == dict.fromkeys(waited, 1)
    for name in ("x + here", "here + x", "x @ here", "cat"):
        assert "expected all tensors on one device" in found[name], name
    for name in ("record float(x)", "record x[x > 2]", "record here.to"):
        assert found[name] == "while a graph is recorded", name
    assert found["recorded"] == [True, [0, 0, 0]] and found["replayed"] == [[10, 10, 10], [20, 20, 20]]
    assert found["running sums"] == [[[5, 10, 15], [3, 7, 12]], True]
