"""One run on several processes. Only this file calls torch.distributed. Without torchrun there is one process and no communication.
With `--dtype mixed`, which needs FSDP2, that process forms a group of one.

    torchrun --nproc_per_node 8 -m minialign dpo …                     # weights split over eight GPUs (FSDP2)
    torchrun --nproc_per_node 8 -m minialign dpo … --parallel ddp      # a full copy on each

Every process runs the same program on the same numbers, so a method file reads as for one process. The processes differ in four places:

    micro-batches   each process takes an equal share of a step's rows (`local_rows`). A micro-batch is weighted by its share of the step,
                    so gradients are summed, not averaged, and a step is the same on 1, 2 or 64 processes. The number of processes must
                    divide --batch_size: then all have equally many micro-batches, and none waits forever for a collective operation.
    rollouts        each process samples its share of the rows, with weights gathered once (`full_copy`), not per token; all get all rows.
    rewards         each process computes the rewards of its share of the rows. Then all get all rewards, or all raise the same error.
    files, terminal only the first process writes. Checkpoints are the exception: each process writes its own part and computes its hash.
                    Machines share one run folder, which is checked first of all. Rows are encoded once on each machine (opening.py).

A model is read from its file, or a new one drawn, slice by slice (`slicing`): no process holds more than its slices and one whole tensor.

A parameter of a sharded model is a DTensor: it holds one slice, but has the shape of the full tensor. FSDP2's `fully_shard` gathers the
weights of a block for its forward pass and again for its backward pass, and drops them in between. `shard` makes FSDP2 sum the gradients
of all processes into the slices. "ddp" is the same over a mesh of (processes, 1), where each process holds a full copy.

Checked by tests/engine/test_parallel.py: two processes over gloo equal one to 1e-10 in float64, in both layouts.
"""

import copy
import datetime
import functools
import os
import sys
import tempfile
import time
import warnings
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

PLAIN = weakref.WeakKeyDictionary()  # {sharded model: the model as it was before sharding, without weights}


def start(alone=False):
    """Join the other processes if torchrun started this one; a second call then does nothing. Without torchrun the group of an earlier run
    ends, and alone=True forms a group of one."""
    if dist.is_initialized():
        if launched():
            return
        dist.destroy_process_group()  # of an earlier run in this process
        mesh.cache_clear()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if launched():
        # Two hours, because the others wait while one process writes, computes hashes, or waits for a slow reward.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    elif alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # every process would print the same lines


def launched():
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def leave():
    """End this process when the run is complete. Without torchrun it does nothing. Not for errors: NCCL would wait for other processes.

    The process ends at once, without the interpreter's shutdown: there a gloo thread sometimes makes a finished run abort.
    """
    if launched() and dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def peer_lost(error):
    """Whether this is the error that a collective raises when another process is gone."""
    return world() > 1 and (isinstance(error, dist.DistError) or "Connection" in str(error) or "Timed out" in str(error))


def started():
    """Whether there is a process group. It may have only one process."""
    return dist.is_initialized()


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    return rank() == 0


def local_rank():
    """The index of this process on its machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


# ------------------------------------------------------------------------------------------------------- what is done by all


def local_rows(rows):
    """This process's part of rows (anything with a length that can be sliced). All parts are equal if the rows divide evenly."""
    n = len(rows)
    return rows[rank() * n // world() : (rank() + 1) * n // world()]


def gather(value):
    """[value of process 0, value of process 1, …], in every process. The values are pickled, so tensors should be on the CPU."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows):
    """The whole tensor, joined from the `local_rows` of each process."""
    return rows if world() == 1 else torch.cat(gather(rows.cpu())).to(rows.device)


def sum_over_processes(number):
    """The sum of all processes' numbers."""
    return sum(gather(number))


def on_main(function, *arguments):
    """Call the function in the first process only, and return its result in all. An exception there is raised in all."""
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
        error.in_all = True  # settings.exit_codes prints it once on each machine
        raise error
    return value


def share_out(function, items):
    """[function(item) for item in items], in every process. Each process computes a part. An exception in one is raised in all."""
    mine = error = None
    try:
        mine = [function(item) for item in items[rank() :: world()]]
    except Exception as caught:
        error = caught
    found = gather((mine, error))
    for _, error in found:
        if error is not None:
            error.in_all = True
            raise error
    return [found[i % world()][0][i // world()] for i in range(len(items))]


def blind(folder):
    """The processes that do not see a file which the first one has just written to `folder`. Each gets five seconds for it."""
    token = on_main(lambda: Path(tempfile.mkstemp(prefix="seen-by-all-", dir=folder)[1]).name)
    deadline = time.monotonic() + 5  # a network disk may show the file late
    while not (seen := (folder / token).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = gather(seen)
    on_main((folder / token).unlink)
    return [process for process, sees in enumerate(seen) if not sees]


def as_float(value):
    """Convert a number, a tensor or a DTensor to a float. (The gradient norm of a sharded model is a DTensor.)"""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)


# -------------------------------------------------------------------------------------------------------------------- models


@functools.cache
def mesh(device_type, layout):
    from torch.distributed.device_mesh import init_device_mesh

    if layout == "fsdp":
        return init_device_mesh(device_type, (world(),))
    return init_device_mesh(device_type, (world(), 1), mesh_dim_names=("copies", "slices"))


def shard(model, layout, device_type, dtype, optimizers=()):
    """Split a GPT's weights over the processes, in place. Optimizers get the slices; they must not have stepped yet.

    Without torchrun this does nothing. layout: fsdp or ddp. dtype: that of the forward and backward pass. Gradients are summed in at
    least float32.
    """
    if not dist.is_initialized() or model in PLAIN:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    wide = torch.promote_types(dtype, torch.float32)
    exact = "lora_", *["head.weight"] * (model.config.head == "scalar")  # these stay float32 in a full copy too
    empty = {id(p): blank(p, wide if any(part in name for part in exact) else dtype) for name, p in model.named_parameters()}
    slices = {name: p for name, p in model.named_parameters(remove_duplicate=False) if hasattr(p, "to_local")}  # made by `slicing`
    blanks = {id(p): blank(p, p.dtype, p.requires_grad) for p in slices.values()}
    place, taken = {key: i for i, key in enumerate(empty)}, []  # nothing else keeps full weights: each is freed once it is sliced
    for optimizer in optimizers:
        taken.append([[place.get(id(p), p) for p in group["params"]] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["params"] = []
    PLAIN[model] = copy.deepcopy(model, {**empty, id(model.config): model.config})
    for name, p in slices.items():
        module, _, field = name.rpartition(".")
        setattr(model.get_submodule(module), field, blanks[id(p)])
    # model: embeddings, final norm, LM head. They stay gathered, as the head is used later. A scalar head computes in float32, on its own.
    for module in (*model.blocks, *[model.head] * (model.config.head == "scalar"), model):
        precision = MixedPrecisionPolicy(param_dtype=wide if module is model.head else dtype, reduce_dtype=wide)
        fully_shard(module, mesh=mesh(device_type, layout), mp_policy=precision, reshard_after_forward=module is not model)
        module.set_gradient_divide_factor(1.0)  # sum, do not average
        module.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo has no multiply-and-sum
    model.load_state_dict(slices, strict=False, assign=True)
    sliced = list(model.parameters())
    for optimizer, places in zip(optimizers, taken, strict=True):
        for group, mine in zip(optimizer.param_groups, places, strict=True):
            group["params"] = [sliced[p] if isinstance(p, int) else p for p in mine]
    if model.config.head == "scalar":
        return
    register_fsdp_forward_method(model, "hidden")  # log-probs use this; reward models use `forward`, which needs no registration
    hidden = model.hidden
    # FSDP reduces a module's gradients once a gradient has reached one of its inputs. Embeds are computed from the same weights, whose
    # gradients are not complete at that time. So embeds are passed inside a function, where FSDP does not see them as an input.
    model.hidden = lambda *inputs, embeds=None, **more: hidden(*inputs, embeds=None if embeds is None else lambda: embeds, **more)


def blank(parameter, dtype, requires_grad=False):
    """A parameter of the same whole shape that takes no memory."""
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="meta"), requires_grad)


def slicing(layout, device):
    """The function (whole tensor, dtype) -> this process's slice of it, a DTensor as `shard` makes them. None without processes.

    So a model can be loaded tensor by tensor, and no process ever holds all of its weights. `shard` takes such slices as they are.
    """
    if not dist.is_initialized():
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def slice_of(whole, dtype):
        where = mesh(device.type, layout)
        parts, mine = whole.chunk(where.size(-1)), where.get_local_rank(-1)
        part = parts[mine] if mine < len(parts) else whole[:0]
        return DTensor.from_local(torch.empty(part.shape, dtype=dtype, device=device).copy_(part), where,
                                  [Replicate()] * (where.ndim - 1) + [Shard(0)], run_check=False, shape=whole.shape,
                                  stride=torch.empty(whole.shape, device="meta").stride())

    return slice_of


def local(parameter):
    """The numbers of the parameter that this process holds."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def numel(parameter):
    return local(parameter).numel()


def resharded(model):
    """Return the model itself. First replace weights that a forward pass has left gathered by their slices."""
    for module in model.modules() if model in PLAIN else ():
        if hasattr(module, "reshard"):
            module.reshard()
    return model


@torch.no_grad()
def full_copy(model):
    """The model with all of its weights in this process: the model itself if it is not sharded, else a frozen copy in every process.

    Each slice is converted to the dtype of the forward pass before it is sent, which gives the same bits with half of the traffic.
    """
    if model not in PLAIN:
        return model
    full = {id(model.config): model.config}
    for empty, p in zip(PLAIN[model].parameters(), resharded(model).parameters(), strict=True):
        whole = torch.empty_like(empty, device=p.device).copy_(p.detach().to(empty.dtype).full_tensor())
        full[id(empty)] = nn.Parameter(whole, requires_grad=False)
    return copy.deepcopy(PLAIN[model], full)


# --------------------------------------------------------------------------------------------------------------- checkpoints


def save_slices(tensors, folder):
    """Write {name: tensor or DTensor} to an existing folder as safetensors. Each process writes its slices."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        checkpoint.save(tensors, storage_writer=checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # raised in all processes if one fails
        process, (reason, _) = next(iter(error.failures.items()))
        kind = OSError if isinstance(reason, (OSError, SafetensorError)) else RuntimeError  # save_checkpoint retries disk errors
        raise kind(f"process {process}: {reason}") from None


def stored_sizes(folder):
    """{name: size of the whole tensor} of all model and optimizer tensors in a folder, sliced or not."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in metadata.items() if name.split(".")[0] not in ("cpu", "cuda")}  # rng.safetensors


def load_slices(tensors, folder):
    """Fill {name: tensor or DTensor} in place from a checkpoint's folder, however it was sliced."""
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns if there is only one process
        checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)), no_dist=not started())
