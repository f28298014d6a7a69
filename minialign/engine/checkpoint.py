"""Checkpoints that survive kill -9 at any moment, a full disk and a flipped bit, and resume bit for bit.

    checkpoints/step_000100/   model.safetensors   parameters of every module of the run, 'policy.…', 'old.…'; with --lora not the
                                                   frozen weights, which a resumed run takes from --policy again
                               optim.safetensors   the optimizers' tensors
                               rng.safetensors     torch's CPU (and CUDA) generator states
                               state.json          step, skipped steps, the optimizers' settings, torch's version, thread count
                               manifest.json       size and sha256 of each file above

Under torchrun each process writes its slices of model and optim into shard-….safetensors (torch.distributed.checkpoint, in Hugging Face's
layout). A run can be resumed with a different number of processes, or with one.

A checkpoint is written into a temporary folder, each file is flushed to disk, and then the folder is renamed to step_000100. So step_000100
is never half-written. A resumed run takes the newest folder that matches its manifest and prints which ones it skips. No pickle is used.

The data order and the learning rate are functions of (seed, step), and samplers are seeded by step, so a run needs nothing else to resume.
Checked by tests/engine/test_checkpoint.py: a kill between any two writes, a full disk, truncations and flipped bits.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minialign.engine import parallel
from minialign.engine.common import BadInput, note, open_to_readers, persist


def save_checkpoint(run_folder, step, modules, optimizers, state, *, keep=2):
    """Write checkpoints/step_{step:06d} from {name: module}, {name: optimizer} and a dict of plain values; keep the newest `keep`.

    Raises BadInput with the path and the bytes needed if writing still fails after three retries. Older checkpoints stay intact.
    """
    folder = Path(run_folder) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:06d}"
    temporary = folder / f"{final.name}.tmp-{parallel.on_main(os.getpid)}"

    def write():
        try:
            _write(temporary, final, step, modules, optimizers, state)
        except (OSError, SafetensorError):
            parallel.on_main(shutil.rmtree, temporary, True)
            raise

    try:
        persist(final, write)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{final}: the checkpoint could not be written ({error}); it needs about {size_of(modules):,} bytes free; "
                       "earlier checkpoints are intact: make room and resume") from None
    parallel.on_main(prune, folder, step, keep)
    return final


def parameters_of(modules):
    """{'policy.blocks.0…': parameter} of {name: module} that a checkpoint stores. A shared one (a tied head) appears once.

    With adapters the frozen weights are left out, in the trained model and in its frozen copies. The adapters of both are stored.
    """
    named = {name: dict(parallel.resharded(module).named_parameters()) for name, module in modules.items()}
    base = {(key, p.shape) for own in named.values() if any(p.requires_grad for p in own.values())
            for key, p in own.items() if not p.requires_grad}
    found = {}
    for name, own in named.items():
        for key, p in own.items():
            if (key, p.shape) not in base:
                found.setdefault(id(p), (f"{name}.{key}", p))
    return dict(found.values())


def size_of(modules, moments=2):
    """About how many bytes a checkpoint takes: the weights, and the optimizer's moments (AdamW has two) of those that are trained."""
    return sum(p.numel() * p.element_size() * (1 + moments * p.requires_grad) for p in parameters_of(modules).values())


def tensors_of(modules, optimizers):
    """What a checkpoint holds: ({'policy.blocks.0…': tensor}, {'optimizer.0.exp_avg': tensor}, the optimizers' non-tensor state)."""
    weights = {name: parameter.detach() for name, parameter in parameters_of(modules).items()}
    moments, settings = {}, {}
    for name, optimizer in optimizers.items():
        packed = optimizer.state_dict()
        settings[name] = {"param_groups": packed["param_groups"], "numbers": {}}
        for index, values in packed["state"].items():
            for key, value in values.items():
                if torch.is_tensor(value):
                    moments[f"{name}.{index}.{key}"] = value.detach()
                else:
                    settings[name]["numbers"][f"{index}.{key}"] = value
    return weights, moments, settings


def _write(temporary, final, step, modules, optimizers, state):
    weights, moments, settings = tensors_of(modules, optimizers)
    parallel.on_main(_empty, temporary)
    if parallel.started():
        parallel.save_slices({**weights, **moments}, temporary)
    else:
        for name, tensors in (("model", weights), ("optim", moments)):
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, temporary / f"{name}.safetensors")
    record = {"step": step, "optimizers": settings, "torch": torch.__version__, "threads": torch.get_num_threads(),
              "processes": parallel.world(), **state}
    parallel.on_main(_write_rest, temporary, record)
    names = sorted((path.name for path in temporary.iterdir()), key=lambda name: (not name.startswith("shard-"), name))
    parts = parallel.share_out(lambda name: _seal(temporary / name), names)  # in this order each process gets the shard that it wrote
    parallel.on_main(_finish, temporary, final, dict(sorted(zip(names, parts, strict=True))))


def _empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write_rest(temporary, record):
    """Write generator states and plain values."""
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators |= {f"cuda.{i}": rng for i, rng in enumerate(torch.cuda.get_rng_state_all())}
    save_file(generators, temporary / "rng.safetensors")
    open_to_readers(temporary)
    (temporary / "state.json").write_text(json.dumps(record), encoding="utf-8")


def _seal(path):
    flush_to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _finish(temporary, final, manifest):
    """Write the manifest, then rename the folder."""
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush_to_disk(temporary / "manifest.json")
    flush_to_disk(temporary)
    if final.exists():  # a damaged checkpoint of the same step, which resuming skipped: the new one replaces it
        shutil.rmtree(final)
    os.replace(temporary, final)
    flush_to_disk(final.parent)


def flush_to_disk(path):
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, but it journals the rename
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(folder):
    """The reason why a checkpoint folder is damaged, as text. None if it is intact. Each process looks at a share of the files."""
    def matches(name):
        path = folder / name
        return path.stat().st_size == manifest[name]["bytes"] and sha256(path) == manifest[name]["sha256"]

    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        names = sorted({*manifest, "rng.safetensors", "state.json"})
        if bad := [name for name, good in zip(names, parallel.share_out(matches, names), strict=True) if not good]:
            return f"{bad[0]} does not match its sha256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no valid manifest ({type(error).__name__})"
    return None


def numbered(folder):
    """{step: path} of the checkpoints in a folder. Half-written ones (step_000100.tmp-4711) are none."""
    return {int(path.name[5:]): path for path in folder.glob("step_*") if path.name[5:].isdigit()}


def newest_checkpoint(run_folder):
    """The newest intact checkpoint folder, or None, in all processes. Prints to stderr which damaged folders it skips."""
    for _, folder in sorted(numbered(Path(run_folder) / "checkpoints").items(), reverse=True):
        reason = fault(folder)
        if reason is None:
            return folder
        note(f"{folder}: skipped, {reason}")
    return None


def load_checkpoint(folder, modules, optimizers):
    """Restore in place what save_checkpoint stored, and return state.json as a dict. `folder` is one that newest_checkpoint returned."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    whole = None
    if not parallel.started() and (folder / "model.safetensors").is_file():
        whole = load_file(folder / "model.safetensors") | load_file(folder / "optim.safetensors")
    sizes = parallel.stored_sizes(folder) if whole is None else {name: tensor.shape for name, tensor in whole.items()}
    targets = {name: parameter.detach() for name, parameter in parameters_of(modules).items()}
    for name, parameter in targets.items():
        if sizes.get(name) != parameter.shape:
            raise BadInput(f"{folder}: has no {name} of shape {tuple(parameter.shape)}: it is from another model")
    packed = {name: {"param_groups": state["optimizers"][name]["param_groups"], "state": {}} for name in optimizers}
    for name, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        values = dict(state["optimizers"][name]["numbers"])
        for key, size in sizes.items():
            if key.startswith(f"{name}."):  # a moment is sliced like its parameter
                like = parameters[int(key.split(".")[1])]
                targets[key] = values[key.removeprefix(f"{name}.")] = (
                    torch.zeros_like(like) if size == like.shape else torch.zeros(size, device=like.device)
                )
        for key, value in values.items():
            index, field = key.split(".", 1)
            packed[name]["state"].setdefault(int(index), {})[field] = value
    frozen = {f"{name}.{key}" for name, module in modules.items() for key, _ in module.named_parameters()}  # older versions stored them
    if unknown := sizes.keys() - targets.keys() - frozen:
        raise BadInput(f"{folder}: has {sorted(unknown)[0]}, which this run does not have: it is from another method or model")
    if whole is None:
        parallel.load_slices(targets, folder)
    else:
        for name, target in targets.items():
            target.copy_(whole[name])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(packed[name])

    generators = load_file(folder / "rng.safetensors")
    torch.set_rng_state(generators["cpu"])
    if torch.cuda.is_available() and "cuda.0" in generators:
        cards = min(len(generators) - 1, torch.cuda.device_count())
        torch.cuda.set_rng_state_all([generators[f"cuda.{i}"] for i in range(cards)])
    return state


def prune(folder, step, keep):
    """Delete all but the `keep` newest checkpoints up to `step`, and the half-written folders of killed processes.

    Folders of later steps are deleted too. They are damaged: otherwise the run would have resumed from them.
    """
    numbers = numbered(folder)
    kept = sorted(number for number in numbers if number <= step)[-keep:]
    for path in [numbers[number] for number in numbers if number not in kept] + list(folder.glob("*.tmp-*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
