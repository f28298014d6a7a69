"""The boring page: one error class, seeds, device and dtype, the learning rate, atomic files, metric rows, flags from a Config.

Nothing here is about alignment. It imports nothing of ours but parallel.py, which imports nothing.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from pathlib import Path

import torch

from minialign import parallel


class BadInput(ValueError):
    """What the user gave cannot be used. One sentence: what, where, what was expected, how to mend it. The front door exits with 2."""


# ------------------------------------------------------------------------------------------------ numbers that must repeat


def derive_seed(*parts):
    """A 63-bit seed from any values, e.g. (seed, step, prompt ids). Equal parts give equal seeds on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def batch_rows(n_rows, batch_size, step, seed):
    """The rows that step `step` (counted from 0) trains on: a pure function of (seed, step), so that resuming needs no data state.

    The rows are an endless stream of permutations, one per epoch, each seeded by (seed, epoch); a batch may straddle two epochs.
    Returns a list of batch_size ints in [0, n_rows).
    """
    rows = []
    position = step * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(position, n_rows)
        permutation = torch.randperm(n_rows, generator=torch.Generator().manual_seed(derive_seed("epoch", seed, epoch)))
        rows += permutation[offset : offset + batch_size - len(rows)].tolist()
        position = step * batch_size + len(rows)
    return rows


def split_micro(rows, micro_batch):
    """Cut one batch of rows (a list, a range, a tensor, a Batch) into micro-batches of at most `micro_batch` rows; 0 is all at once.

    Slices of tensors are views: what is written into one is written into the whole. Under torchrun: those of this process.
    """
    assert len(rows) % parallel.world() == 0, (len(rows), parallel.world())
    rows = parallel.share(rows)
    size = micro_batch or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@torch.no_grad()
def in_micro(function, rows, micro_batch):
    """function of each micro-batch, (rows of it, …), put together to that of the whole batch, without gradients."""
    if len(rows) % parallel.world():  # held-out rows come in any number: then every process does all of them
        size = micro_batch or len(rows)
        return torch.cat([function(rows[i : i + size]) for i in range(0, len(rows), size)])
    return parallel.gather_rows(torch.cat([function(micro) for micro in split_micro(rows, micro_batch)]))


def lr_at(step, *, lr, steps, warmup=0.0, schedule="cosine"):
    """The learning rate of step `step` (from 0): linear warm-up over the share `warmup` of all steps, then cosine | linear | constant.

    A function of the step alone: nothing to save, nothing to restore.
    """
    warmup_steps = int(warmup * steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "constant":
        return lr
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    raise BadInput(f"schedule {schedule!r} is unknown: use cosine, linear or constant")


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def pick_device(name):
    """'auto' takes a CUDA device if there is one, else the CPU. Apple's mps is used only when asked for by name."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", parallel.local_rank())
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels and recorded graphs go to the current one
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name} cannot be used here ({reason}); use cpu, or auto to take what there is") from None
    return device


def pick_dtype(name):
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in dtypes:
        raise BadInput(f"--dtype {name} is unknown: use float32, bfloat16 or float64")
    return dtypes[name]


# ------------------------------------------------------------------------------------------------------------------- files


def write_atomic(path, text):
    """Write text so that `path` holds either the old content or the whole new one, whenever the process dies."""
    if not parallel.is_main():
        return
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")  # same folder: a rename across devices would fail
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_rows(path):
    """The JSON objects of a .jsonl file that a run appended to. A torn last line, left by a killed run, is passed over."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # splitlines would also cut at U+2028 inside a text
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines):
                raise BadInput(f"{path}:{number}: not a line of JSON; the file was edited or damaged") from None
    return rows


def append_row(path, row):
    if not parallel.is_main():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def first_line(error):
    """What an exception of somebody else's code says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def find_folder(path_or_hub_name):
    """The local folder: the path itself, or the files of a hub name, fetched (or found in the cache) by huggingface_hub."""
    folder = Path(path_or_hub_name).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix in PICKLES or folder.suffix == ".safetensors":
        raise BadInput(f"{folder}: expected a folder with config.json and model.safetensors, not a single file")
    from huggingface_hub import snapshot_download  # imported where used: it takes longer to import than most runs to start
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(path_or_hub_name), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except HFValidationError:
        raise BadInput(f"{path_or_hub_name}: no such folder, and not a hub name (owner/name) either") from None
    except Exception as error:  # network, missing repository, gated repository: huggingface_hub's own sentence says which
        raise BadInput(
            f"{path_or_hub_name}: no such folder here, and the hub could not deliver it ({first_line(error)}); "
            "for a gated model run `hf auth login` first"
        ) from None


def read_json(path):
    """A JSON object from a file; BadInput naming the file if it is missing, no JSON, or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: the file is missing") from None
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of thousands of digits
        raise BadInput(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected an object, found {type(content).__name__}")
    return content


# ------------------------------------------------------------------------------------------------------ statistics of a step


class Mean:
    """Weighted means of the stats of several micro-batches, so that 1×8, 2×4 and 8×1 log the same numbers."""

    def __init__(self):
        self.sums, self.weights = {}, {}

    def add(self, stats, weight=1.0):
        for name, value in stats.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value) * weight
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def result(self):
        """{name: mean} of what was added, here and in the other processes."""
        parts = parallel.gather((self.sums, self.weights))
        names = dict.fromkeys(name for sums, _ in parts for name in sums)
        sums, weights = ({name: sum(part[i].get(name, 0.0) for part in parts) for name in names} for i in (0, 1))
        return {name: sums[name] / weights[name] for name in names}


# ----------------------------------------------------------------------------------------------- a command line from a Config


def field_comments(config_class):
    """{field: the comment beside it in the source}: the help text of its flag."""
    comments = {}
    for line in "\n".join(inspect.getsource(kind) for kind in reversed(config_class.__mro__[:-1])).splitlines():  # a recipe's is a subclass
        match = re.match(r"\s*(\w+)\s*:[^#]*#\s*(.*)", line)
        if match:
            comments[match.group(1)] = match.group(2).strip()
    return comments


def cli(config_class, argv, *, prog, description=""):
    """Parse `--field value` flags into a config_class; every field is a flag, its comment is the help, its default the default.

    An unknown flag or a value of the wrong type is one sentence on stderr and exit code 2. `--batch-size` equals `--batch_size`.
    """
    hints, comments = typing.get_type_hints(config_class), field_comments(config_class)
    parser = argparse.ArgumentParser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags = []
    for field in dataclasses.fields(config_class):
        names = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]))
        flags.append(names[0])
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else repr(default)
        options = dict(dest=field.name, default=default, help=f"{comments.get(field.name, '')} (default: {shown})".replace("%", "%%"))
        kind = hints[field.name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):  # `int | None`: the flag takes the int
            kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(kind) is list:
            parser.add_argument(*names, nargs="+", type=typing.get_args(kind)[0], metavar=field.name.upper(), **options)
        else:
            parser.add_argument(*names, type=kind, metavar=kind.__name__, **options)

    def refuse(message):
        print(f"{prog}: {message}", file=sys.stderr)
        raise SystemExit(2)

    parser.error = refuse
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), flags, n=1, cutoff=0.5)
        hint = f": did you mean {near[0]}?" if near else ""
        refuse(f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}{hint} (`{prog} --help` lists them)")
    others = [flag for word in argv if word.startswith("--") and (flag := word.split("=")[0]) != "--resume"]
    if getattr(known, "resume", "") and others:
        refuse(f"--resume continues a run as it was configured: drop {others[0]} (to go on otherwise: --policy {known.resume}/final)")
    return config_class(**vars(known))


def check_config(cfg):
    """Refuse numbers that cannot work, at second 0. Knows the fields by name, so that a Config only lists them."""
    at_least = {"steps": 1, "batch_size": 1, "micro_batch": 0, "max_len": 2, "max_new": 1, "log_every": 1, "eval_every": 1,
                "save_every": 1, "rounds": 1, "max_prompt": 1, "lr": 0, "weight_decay": 0, "warmup": 0, "held_out": 0,
                "layers": 1, "heads": 1, "width": 1, "group_size": 1, "epochs": 1, "n": 1, "grows": 1, "grow_prompts": 1,
                "gamma": 0, "lam": 0, "decay": 0, "mix": 0, "std_eps": 0, "bound": 0, "ridge": 0, "reward_share": 0, "weight": 0,
                "desirable_weight": 0, "undesirable_weight": 0, "delta": 0, "target_margin": 0, "lora": 0}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"--{field.name} {value}: must be a finite number")
    at_most = {"warmup": 1, "held_out": 0.9, "gamma": 1, "lam": 1, "decay": 1, "mix": 1, "reward_share": 1}
    for name, low in at_least.items():
        value = getattr(cfg, name, low)
        value = low if value is None else value
        high = at_most.get(name, math.inf)
        if not low <= value <= high:
            raise BadInput(f"--{name} {value}: must be at least {low}" + (f" and at most {high}" if name in at_most else ""))
    online = hasattr(cfg, "reward") and not hasattr(cfg, "pairs")  # following a reward, a method can do without the pull to ref: beta 0
    for name in ("max_grad_norm", "beta", "tau", "eps", "eps_value", "eta", "value_lr", "reward_limit", "reward_lr", "reward_share",
                 "scale", "lora_alpha"):
        value = getattr(cfg, name, 1)
        if not (value > 0 or (online and name == "beta" and value == 0)):
            raise BadInput(f"--{name} {value}: must be {'at least' if online and name == 'beta' else 'above'} 0")
    if online and cfg.batch_size % getattr(cfg, "group_size", 1):
        raise BadInput(f"--batch_size {cfg.batch_size}: must be a multiple of --group_size {cfg.group_size} (completions of one prompt)")
    if not getattr(cfg, "online", True) and cfg.reward != ["builtin"]:
        raise BadInput(f"--reward {cfg.reward[0]}: labels only what --online draws; without it the labels are the file's")
    if getattr(cfg, "lora", 0) and cfg.policy == "new":
        raise BadInput(f"--lora {cfg.lora}: adapts weights that are there; --policy new has none to keep")
    if not 0 <= getattr(cfg, "label_smoothing", 0) < 0.5:
        raise BadInput(f"--label_smoothing {cfg.label_smoothing}: must be at least 0 and below 0.5, where the labels say nothing")
    if getattr(cfg, "schedule", "cosine") not in ("cosine", "linear", "constant"):
        raise BadInput(f"--schedule {cfg.schedule}: must be cosine, linear or constant")


@contextlib.contextmanager
def exit_codes(prog):
    """Around a main(): BadInput becomes one line and exit code 2, a diverged run or a process lost under torchrun 1, Ctrl-C 130.

    Anything else is a bug: a traceback.
    """
    try:
        yield
        parallel.end()
    except BadInput as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:
        if not parallel.lost(error):
            raise
        print(f"{prog}: process {parallel.rank()} ends because another one is gone ({first_line(error)}); "
              "what that one said stands above, and --resume goes on from the newest checkpoint", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:  # `python -m minialign … | head`: the reader left, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
