"""Several processes, one run: the only file that knows ranks. Without torchrun everything here hands back what it was given.

    torchrun --nproc_per_node 8 -m minialign dpo …                     # weights split over eight GPUs (FSDP2)
    torchrun --nproc_per_node 8 -m minialign dpo … --parallel ddp      # a whole copy on each

Every process runs the same program on the same numbers, so that a method file reads as if there were one. They differ in four places:

    micro-batches   each does those of its equal share of a step's rows (`share`). A micro-batch counts by its share of the whole step,
                    so gradients are summed, not averaged, and a step is the same step on 1, 2 or 64 processes. The processes must divide
                    --batch_size evenly: then all do equally many, and none waits in a collective that another never enters.
    rollouts        each draws its rows of one, from weights gathered once (`whole`), not once a token; then all get all of them.
    rewards         each asks for its rows; then all get all of them, or all get the error.
    files, terminal the first process writes. Checkpoints excepted: there each writes its own part.

A parameter of a sharded model is a DTensor: here a slice, its shape that of the whole. FSDP2's `fully_shard` gathers a block's weights for
its forward pass and again for its backward pass, and drops them in between; `shard` makes it sum all processes' gradients into the slices.
"ddp" is the same over a mesh of (processes, 1): each holds a whole copy.

Checked by tests/engine/test_parallel.py: two processes over gloo equal one to 1e-10 in float64, in both layouts.
"""

import copy
import datetime
import functools
import os
import sys
import warnings
import weakref

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

PLAIN = weakref.WeakKeyDictionary()  # {sharded model: the same without weights, as it was before}


def start():
    """Join the other processes, if torchrun started this one; once."""
    if not launched() or dist.is_initialized():
        return
    # Two hours: the others wait while one process writes, or hashes, or asks a slow judge.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=2))
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # all say the same


def launched():
    """Whether this process is torchrun's."""
    return dist.is_torchelastic_launched()


def leave():
    """Leave the others when all is done, and end the process. Not after an error: NCCL would wait for those that did not get this far.

    At once, without the interpreter's own ending: now and then a thread of gloo meets that half-way, and a run that is done would abort.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def peer_lost(error):
    """Whether this is what a collective raises when another process is gone."""
    return started() and (isinstance(error, dist.DistError) or "Connection" in str(error) or "Timed out" in str(error))


def started():
    """Whether there is a group of processes; it may be of one."""
    return dist.is_initialized()


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    return rank() == 0


def local_rank():
    """Which of this machine's processes, and so which of its GPUs."""
    return int(os.environ.get("LOCAL_RANK", 0))


# ------------------------------------------------------------------------------------------------------- what is done by all


def local_rows(rows):
    """This process's part of rows (whatever has a length and can be sliced): equal parts where the processes divide them evenly."""
    n = len(rows)
    return rows[rank() * n // world() : (rank() + 1) * n // world()]


def gather(value):
    """[the value of process 0, that of process 1, …], in every process. What is gathered is pickled: tensors should be on the CPU."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows):
    """The whole tensor, of which each process has its `share`."""
    return rows if world() == 1 else torch.cat(gather(rows.cpu())).to(rows.device)


def sum_over_processes(number):
    """The sum of all processes' numbers."""
    return sum(gather(number))


def on_main(function, *arguments):
    """What the function returns in the first process, which alone calls it; an exception there is raised in all."""
    if world() == 1:
        return function(*arguments)
    result = [None]
    if is_main():
        try:
            result = [(function(*arguments), None)]
        except Exception as error:
            result = [(None, error)]
    dist.broadcast_object_list(result)
    value, error = result[0]
    if error is not None:
        raise error
    return value


def as_float(value):
    """A float of a number that may be a tensor, or a DTensor of which each process has a part (a norm over all slices)."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)


# -------------------------------------------------------------------------------------------------------------------- models


@functools.cache
def mesh(device_type, layout):
    from torch.distributed.device_mesh import init_device_mesh

    if layout == "fsdp":
        return init_device_mesh(device_type, (world(),))
    return init_device_mesh(device_type, (world(), 1), mesh_dim_names=("copies", "slices"))


def shard(model, layout, device_type, dtype, optimizers=()):
    """Split a GPT's weights over the processes, in place; optimizers that have not stepped yet are given the slices.

    Without torchrun nothing is done. layout: fsdp or ddp. dtype: what forward and backward pass compute in. Gradients are summed in float32
    at least.
    """
    if not dist.is_initialized() or model in PLAIN:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta", dtype=dtype), requires_grad=False) for p in model.parameters()}
    place, taken = {key: i for i, key in enumerate(empty)}, []  # nobody else holds on to whole weights: each goes when it is sliced
    for optimizer in optimizers:
        taken.append([[place.get(id(p), p) for p in group["params"]] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["params"] = []
    PLAIN[model] = copy.deepcopy(model, {**empty, id(model.config): model.config})
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32))
    for module in (*model.blocks, model):  # the last takes what is left, embeddings, final norm, head: the head is used after forward
        fully_shard(module, mesh=mesh(device_type, layout), mp_policy=precision, reshard_after_forward=module is not model)
        module.set_gradient_divide_factor(1.0)  # a sum
        module.set_force_sum_reduction_for_comms(True)  # as such: gloo has no multiply-and-sum
    sliced = list(model.parameters())
    for optimizer, places in zip(optimizers, taken, strict=True):
        for group, mine in zip(optimizer.param_groups, places, strict=True):
            group["params"] = [sliced[p] if isinstance(p, int) else p for p in mine]
    if model.config.head == "scalar":
        return
    register_fsdp_forward_method(model, "hidden")  # what log-probs are made from; `forward`, a reward model's way, is one by itself
    hidden = model.hidden
    # FSDP reduces a module's gradients once one has reached an input. Embeds are made from the same weights, whose gradients are not
    # complete then: a function hides them.
    model.hidden = lambda *inputs, embeds=None, **more: hidden(*inputs, embeds=None if embeds is None else lambda: embeds, **more)


def numel(parameter):
    """How many of its numbers this process holds."""
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


def resharded(model):
    """The model itself, with slices in the place of weights that a forward pass has left gathered."""
    for module in model.modules() if model in PLAIN else ():
        if hasattr(module, "reshard"):
            module.reshard()
    return model


@torch.no_grad()
def full_copy(model):
    """The model with all of its weights in this process: itself if it never was sharded, else a frozen copy, which every process makes."""
    if model not in PLAIN:
        return model
    full = {id(model.config): model.config}
    for empty, p in zip(PLAIN[model].parameters(), resharded(model).parameters(), strict=True):
        full[id(empty)] = nn.Parameter(torch.empty_like(empty, device=p.device).copy_(p.full_tensor()), requires_grad=False)
    return copy.deepcopy(PLAIN[model], full)


# --------------------------------------------------------------------------------------------------------------- checkpoints


def save_slices(tensors, folder):
    """Write {name: tensor or DTensor} to a folder that is there, each process its slices, as safetensors."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        checkpoint.save(tensors, storage_writer=checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # raised in all processes, whoever failed
        process, (reason, _) = next(iter(error.failures.items()))
        kind = OSError if isinstance(reason, (OSError, SafetensorError)) else RuntimeError  # a disk's fault is tried again
        raise kind(f"process {process}: {reason}") from None


def stored_sizes(folder):
    """{name: size of the whole tensor} of all model and optimizer tensors in a folder, sliced or not."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in metadata.items() if name.split(".")[0] not in ("cpu", "cuda")}  # of rng.safetensors


def load_slices(tensors, folder):
    """Fill {name: tensor or DTensor} in place from such a folder, however it was sliced."""
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of being alone
        checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)), no_dist=not started())
