"""The checkpoint folder against kill -9 between any two writes, a full disk, truncation, flipped bits and strangers."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minialign.engine import checkpoint, common
from minialign.engine.common import BadInput
from minialign.lora import adapters, frozen_copy, inject
from minialign.model import GPT, GPTConfig

ROOT = Path(__file__).parents[2]


def parts(seed=0, steps=3):
    """A small module with a tied weight and an AdamW that has taken a few steps."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(2, 4)).pow(2).sum().backward()
        optimizer.step()
    return {"policy": module}, {"optimizer": optimizer}


def same(left, right):
    """Bitwise: every parameter and every optimizer tensor."""

    def tensors(modules, optimizers):
        named = dict(modules["policy"].named_parameters())
        for index, values in optimizers["optimizer"].state_dict()["state"].items():
            named |= {f"{index}.{key}": value for key, value in values.items()}
        return named

    left, right = tensors(*left), tensors(*right)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_round_trip_is_bitwise(tmp_path):
    saved = parts()
    torch.manual_seed(77)
    checkpoint.save_checkpoint(tmp_path, 5, *saved, {"skipped": 1})
    drawn = torch.rand(3)
    restored = parts(seed=9, steps=1)
    folder = checkpoint.newest_checkpoint(tmp_path)
    state = checkpoint.load_checkpoint(folder, *restored)
    assert folder.name == "step_000005" and same(saved, restored)
    assert state["step"] == 5 and state["skipped"] == 1 and state["threads"] == torch.get_num_threads()
    assert torch.equal(torch.rand(3), drawn)  # the generator continues where it was


def test_every_file_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    """A power cut after the rename must find the content on the disk, not only in the cache of the operating system."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    final = checkpoint.save_checkpoint(tmp_path, 3, *parts(), {})
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {path.name for path in final.iterdir()} < set(before) and any(name.startswith("step_000003.tmp-") for name in before)
    assert after == ["checkpoints"]


class Counting(torch.optim.Optimizer):
    """An optimizer whose state is a plain number: how many steps a weight has taken."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["taken"] = self.state[p].get("taken", 0) + 1


def test_an_optimizers_numbers_and_settings_come_back(tmp_path):
    module = torch.nn.Linear(2, 1)
    saved, restored = Counting(module.parameters(), lr=0.25), Counting(module.parameters(), lr=0.5)
    for _ in range(3):
        saved.step()
    folder = checkpoint.save_checkpoint(tmp_path, 3, {"policy": module}, {"optimizer": saved}, {})
    checkpoint.load_checkpoint(folder, {"policy": module}, {"optimizer": restored})
    assert [restored.state[p] for p in module.parameters()] == [{"taken": 3}] * 2 and restored.param_groups[0]["lr"] == 0.25


def test_a_weight_that_two_modules_share_is_stored_once(tmp_path):
    modules, optimizers = parts()
    folder = checkpoint.save_checkpoint(tmp_path, 1, {**modules, "critic": modules["policy"]}, optimizers, {})
    assert sorted(load_file(folder / "model.safetensors")) == sorted(f"policy.{name}" for name, _ in modules["policy"].named_parameters())


def test_no_pickle_in_the_folder(tmp_path):
    folder = checkpoint.save_checkpoint(tmp_path, 1, *parts(), {})
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors", ".safetensors", ".safetensors"]


def test_keeps_the_newest_and_sweeps_up(tmp_path):
    stray = tmp_path / "checkpoints" / "step_000009.tmp-1"
    stray.mkdir(parents=True)
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(tmp_path, step, *parts(), {}, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000003"]


def test_damaged_later_ones_do_not_push_out_a_sound_one(tmp_path, capsys):
    """Steps 2 and 3 are damaged, the run begins again from 1 and saves 1 anew: it must not be pruned as the oldest of three."""
    for step in (1, 2, 3):
        folder = checkpoint.save_checkpoint(tmp_path, step, *parts(), {}, keep=3)
        if step > 1:
            (folder / "state.json").write_text("torn")
    checkpoint.save_checkpoint(tmp_path, 1, *parts(), {}, keep=2)
    assert checkpoint.newest_checkpoint(tmp_path).name == "step_000001"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000001"]


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoint.save_checkpoint(tmp_path, step, *parts(), {})
    assert checkpoint.newest_checkpoint(tmp_path).name == "step_1000000"


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "rng.safetensors", "state.json", "manifest.json"])
def test_damage_is_noticed_and_stepped_over(tmp_path, name, capsys, record_property):
    """Truncations at many places and single flipped bits, in every file: always refused, and the older checkpoint serves."""
    checkpoint.save_checkpoint(tmp_path, 1, *parts(), {})
    folder = checkpoint.save_checkpoint(tmp_path, 2, *parts(), {})
    path = folder / name
    whole = path.read_bytes()
    damages = [whole[: len(whole) * i // 16] for i in range(16)]
    if name != "manifest.json":  # a flipped bit there may hit white space; its numbers are checked against the files
        for bit in range(0, 8 * len(whole), max(1, 8 * len(whole) // 250)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            damages.append(bytes(flipped))
    record_property("tried", len(damages))
    for damage in damages:
        path.write_bytes(damage)
        assert checkpoint.newest_checkpoint(tmp_path).name == "step_000001"
    assert "skipped" in capsys.readouterr().err
    path.unlink()
    assert checkpoint.newest_checkpoint(tmp_path).name == "step_000001"
    path.write_bytes(whole)
    assert checkpoint.newest_checkpoint(tmp_path).name == "step_000002"


def test_a_manifest_that_names_nothing_is_damage(tmp_path):
    """Every checkpoint has generators and a state. A manifest without them vouches for nothing."""
    checkpoint.save_checkpoint(tmp_path, 1, *parts(), {})
    folder = checkpoint.save_checkpoint(tmp_path, 2, *parts(), {})
    (folder / "manifest.json").write_text("{}")
    assert checkpoint.newest_checkpoint(tmp_path).name == "step_000001"


def test_nothing_sound_is_none(tmp_path):
    assert checkpoint.newest_checkpoint(tmp_path) is None


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path):
    folder = checkpoint.save_checkpoint(tmp_path, 1, *parts(), {})
    (folder / "model.safetensors").write_bytes(b"torn")
    checkpoint.save_checkpoint(tmp_path, 1, *parts(), {})
    assert checkpoint.newest_checkpoint(tmp_path) == folder


def test_full_disk(tmp_path, monkeypatch):
    """Whichever write meets the full disk: the old checkpoint stays, the message names path and bytes, nothing half-written remains."""
    monkeypatch.setattr(common, "RETRY_SECONDS", (0, 0, 0))
    saved = parts()
    checkpoint.save_checkpoint(tmp_path, 1, *saved, {})
    real = checkpoint.save_file
    for fails_at in (1, 2, 3):
        calls = []

        def full(tensors, path, calls=calls, fails_at=fails_at):
            calls.append(path)
            if len(calls) == fails_at or len(calls) > 3:  # the first try meets it at this write, later ones too
                Path(path).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            real(tensors, path)

        monkeypatch.setattr(checkpoint, "save_file", full)
        with pytest.raises(BadInput, match=r"step_000002: the checkpoint could not be written .*No space.* bytes free; earlier"):
            checkpoint.save_checkpoint(tmp_path, 2, *saved, {})
        assert checkpoint.newest_checkpoint(tmp_path).name == "step_000001"
        assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))


def test_one_stumble_is_retried(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RETRY_SECONDS", (0, 0, 0))
    real, calls = checkpoint.flush_to_disk, []

    def stumble(path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(checkpoint, "flush_to_disk", stumble)
    checkpoint.save_checkpoint(tmp_path, 1, *parts(), {})
    assert checkpoint.newest_checkpoint(tmp_path) is not None and capsys.readouterr().err.count("try 2") == 1


def test_another_model_is_refused(tmp_path):
    folder = checkpoint.save_checkpoint(tmp_path, 1, *parts(), {})
    other = {"policy": torch.nn.Linear(4, 3)}, {"optimizer": torch.optim.AdamW(torch.nn.Linear(4, 3).parameters())}
    with pytest.raises(BadInput, match="from another method or model|from another model"):
        checkpoint.load_checkpoint(folder, *other)


def adapted(seed=0):
    """A policy with adapters that have taken a step, and its frozen copy from before."""
    torch.manual_seed(0)
    policy = inject(GPT(GPTConfig.tiny(60)), 2)
    torch.manual_seed(seed)
    for adapter in adapters(policy).values():
        torch.nn.init.normal_(adapter.lora_B)
    old, optimizer = frozen_copy(policy), torch.optim.AdamW(policy.parameters(), lr=0.1)
    policy(torch.arange(6)[None]).sum().backward()
    optimizer.step()
    return {"policy": policy, "old": old}, {"optimizer": optimizer}


def equal(left, right):
    return all(torch.equal(p, q) for name in left for p, q in zip(left[name].parameters(), right[name].parameters(), strict=True))


@pytest.mark.parametrize("everything", [False, True])
def test_beside_adapters_the_frozen_weights_are_not_stored(tmp_path, monkeypatch, everything):
    """Stored are the adapters of both models. Checkpoints of older versions hold the frozen weights too; both kinds are read."""
    modules, optimizers = adapted()
    if everything:
        names = {f"policy.{name}": p for name, p in modules["policy"].named_parameters()}
        names |= {f"old.{name}": p for name, p in modules["old"].named_parameters() if "lora" in name}
        monkeypatch.setattr(checkpoint, "parameters_of", lambda modules: names)
    folder = checkpoint.save_checkpoint(tmp_path, 1, modules, optimizers, {})
    monkeypatch.undo()
    stored = load_file(folder / "model.safetensors")
    wanted = {f"{model}.{name}.lora_{side}" for model in modules for name in adapters(modules[model]) for side in "AB"}
    assert stored.keys() > wanted if everything else stored.keys() == wanted
    restored = adapted(seed=1)
    assert not equal(modules, restored[0])
    checkpoint.load_checkpoint(folder, *restored)
    assert equal(modules, restored[0])


@pytest.mark.parametrize("make", [parts, adapted])
def test_the_size_asked_for_is_that_of_the_tensors_written(tmp_path, make):
    modules, optimizers = make()
    folder = checkpoint.save_checkpoint(tmp_path, 1, modules, optimizers, {})
    tensors = [*load_file(folder / "model.safetensors").values(), *load_file(folder / "optim.safetensors").values()]
    assert checkpoint.size_of(modules) == sum(tensor.nbytes for tensor in tensors if tensor.dim())  # without AdamW's counts of steps


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_between_any_two_writes(tmp_path, record_property):
    """SIGKILL before the k-th change of the disk, for every k: what is found afterwards is a whole checkpoint, the old one until the
    rename, the new one from then on, bit for bit (the program compares)."""
    command = [sys.executable, "-m", "tests.killing", "writes", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found[0] == 1 and found[-1] == 2 and found == sorted(found) and found.count(1) >= 10 and found.count(2) >= 3, found
    record_property("tried", len(found))
