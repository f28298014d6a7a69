"""A pretended CUDA device on a CPU build of torch: its tensors say cuda:0, and hold real numbers that the CPU computes.

What CUDA would refuse raises RuntimeError here too: operands on both devices, and whatever waits for the device while a graph is recorded.
What would make the host wait is counted by its place in minialign: reading a number, a list or a boolean index off the device, and copies
in either direction (but not those of pinned memory that are asked not to wait). A recorded graph runs nothing and is replayed on the same
memory, so whatever it froze by mistake shows in the numbers. Streams, speed and rounding are those of the CPU.

install() changes torch for the whole process, so tests use it in a process of its own: start(…) of this folder.
"""

import collections
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

ROOT, aten = Path(__file__).parents[2] / "minialign", torch.ops.aten
waits = collections.Counter()  # {place in minialign: how often the host waited there}
pinned = {}  # storages in pinned memory; kept, so that no other one gets their address
recording = None  # the graph that is being recorded
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "masked_scatter_backward", "_unique2", "unique_dim", "bincount")
INDEXES = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
WHOLE = ("mm", "bmm", "addmm", "cat", "stack", "gather", "scatter", "index_select", "embedding")  # not even a scalar of the host


def wait(what):
    if recording is not None:
        raise RuntimeError(f"while a graph is recorded, {what} would wait for the device")
    frame, place = sys._getframe(1), "backward, or a library"
    while frame:
        if frame.f_code.co_filename.startswith(str(ROOT)):
            place = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
            break
        frame = frame.f_back
    waits[f"{place} {what}"] += 1


class OnDevice(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, requires_grad=requires_grad)
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device("cuda", 0), **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def tolist(self):
        wait("tolist")
        return self.held.tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def data_ptr(self):
        return self.held.data_ptr()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = OnDevice(self.held.clone(), self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copied.detach(), self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        raise RuntimeError("a tensor of the device is pickled")


class Everything(TorchDispatchMode):
    """Active around whatever is to run on the device: it sees the operations that make a tensor, which have none yet."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def held(x):
    return x.held if isinstance(x, OnDevice) else x


def compute(func, args, kwargs):
    name = func._opname
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    target = kwargs.get("device") and torch.device(kwargs["device"]).type
    if name in ("pin_memory", "_pin_memory", "is_pinned"):
        if name == "is_pinned":
            return args[0].untyped_storage()._cdata in pinned
        copied = args[0].clone()
        pinned[copied.untyped_storage()._cdata] = copied
        return copied
    if not ours and target != "cuda":
        return func(*args, **kwargs)

    moves = name == "_to_copy" and target and (target == "cuda") != bool(ours)
    moves = moves or name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice)
    if moves:
        source = args[0] if name == "_to_copy" else args[1]
        patient = kwargs.get("non_blocking") or args[2:3] == (True,)
        if not (patient and source.untyped_storage()._cdata in pinned):
            wait("copy")
    elif len(ours) != len(tensors):
        indexed = name in INDEXES and isinstance(args[0], OnDevice)
        if any(x.dim() > 0 or name in WHOLE for x in tensors if not isinstance(x, OnDevice)) and not indexed:
            raise RuntimeError(f"{name}: expected all tensors on one device, found {[(str(x.device), tuple(x.shape)) for x in tensors]}")
        if indexed:
            wait("index of the host")
    if name in READS:
        wait(name)
    if name in INDEXES and any(index is not None and index.dtype == torch.bool for index in args[1]):
        wait("boolean index")

    options = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    options |= {"device": "cpu"} if "device" in kwargs and name != "_to_copy" else {}
    inner, options = tree_map(held, args), tree_map(held, options)
    run = lambda: func(*inner, **options)  # noqa: E731
    if name == "mm" and func._overloadname.startswith("dtype"):  # tensor cores: bfloat16 in, summed and returned in float32
        run = lambda: inner[0].to(inner[2]) @ inner[1].to(inner[2])  # noqa: E731
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments)
    view = not writes and any(result.alias_info is not None for result in func._schema.returns)
    if recording is not None and writes:
        recording.remember(func, inner, options)
    out = run()
    if name in ("_local_scalar_dense", "equal") or name == "_to_copy" and target == "cpu":
        return out
    if recording is not None and not view:
        recording.note(run, None if writes else out)
    wrapped = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if (writes or view) and func._schema.returns else wrapped


class Graph:
    """torch.cuda.CUDAGraph: what is computed between capture_begin and capture_end has no effect then, and every effect in a replay."""

    def __init__(self):
        self.steps, self.before, self.made = [], {}, set()

    def pool(self):
        return (0, 1)

    def capture_begin(self, pool=None, capture_error_mode="global"):
        global recording
        assert pool in (None, (0, 1)) and recording is None
        recording = self

    def capture_end(self):
        global recording
        recording = None
        for storage, content in self.before.values():
            storage.copy_(content)
        for _, outputs in self.steps:
            for x in outputs or ():
                x.fill_(float("nan") if x.is_floating_point() else 0)

    def remember(self, func, args, kwargs):
        """Before an operation that writes: what its target held, unless the graph itself made the target."""
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs[argument.name] if argument.name in kwargs else args[position]
                for x in [value] if isinstance(value, torch.Tensor) else value:
                    storage = x.untyped_storage()
                    if storage._cdata not in self.made:
                        self.before.setdefault(storage._cdata, (storage, storage.clone()))

    def note(self, run, out):
        outputs = None if out is None else [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        self.made |= {x.untyped_storage()._cdata for x in outputs or ()}
        self.steps.append((run, outputs))

    def replay(self):
        with torch.no_grad(), torch._C._DisableTorchDispatch():
            for run, outputs in self.steps:
                fresh = run()
                for old, new in zip(outputs or (), [x for x in tree_flatten(fresh)[0] if isinstance(x, torch.Tensor)], strict=False):
                    old.copy_(new)


def kernels():
    """In place of the Triton bodies: their specifications, once every tensor is seen to be on the device."""
    from minialign.kernels import logprob

    def on_host(x):
        assert x is None or isinstance(x, (float, bool, OnDevice)), f"a tensor of the host goes into a kernel: {x}"
        return held(x)

    def update_statistics(logits, places, statistics, tau, entropy):
        inner = logprob.Statistics(*map(on_host, vars(statistics).values()))
        with torch._C._DisableTorchDispatch():
            logprob.update_statistics(on_host(logits), on_host(places), inner, tau, entropy=entropy)

    def to_gradient(*args):
        with torch._C._DisableTorchDispatch():
            logprob.to_gradient(*map(on_host, args))

    def fused_statistics(hidden, weight, targets, tau, entropy):
        with torch._C._DisableTorchDispatch():
            logits = on_host(hidden).float() @ on_host(weight).float().T
            statistics = logprob.Statistics.empty(len(logits), logits.dtype, logits.device)
            logprob.update_statistics(logits, on_host(targets), statistics, tau, entropy=entropy)
        return logprob.Statistics(*map(OnDevice, vars(statistics).values()))

    return SimpleNamespace(update_statistics=update_statistics, to_gradient=to_gradient, fused_statistics=fused_statistics)


def install():
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is a copy to the device, which the mode then sees
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters; these have no memory to write into
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replaced = dict(  # (a function of its own for each: torch keeps a table of them)
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, set_device=lambda device: None,
        get_device_name=lambda device=None: "pretended", mem_get_info=lambda device=None: (2**40, 2**40), _lazy_init=lambda: None,
        get_rng_state_all=lambda: [torch.zeros(16, dtype=torch.uint8)], set_rng_state_all=lambda states: None, CUDAGraph=Graph,
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=2**40),
        synchronize=lambda *args: wait("synchronize"), Stream=lambda: stream, current_stream=lambda *args: stream,
        stream=lambda stream: contextlib.nullcontext())
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    from minialign.kernels import linear_logprob, logprob

    bodies = kernels()
    logprob.kernels, linear_logprob.kernel = lambda: bodies, lambda: bodies.fused_statistics
