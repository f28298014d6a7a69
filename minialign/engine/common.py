"""Small helpers used everywhere: one error class, seeds, micro-batches, devices, the learning rate, files, averages.

Nothing here is about alignment. Of the package it imports only the version and parallel.py, which imports nothing of the package.
"""

import errno
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from minialign import __version__
from minialign.engine import parallel


class BadInput(ValueError):
    """The user's input cannot be used. The message is one sentence: what, where, what was expected, how to fix it. Exit code 2."""

    def __init__(self, message):
        super().__init__(in_one_line(message))


def in_one_line(text, most=540):
    """The text in one line. What other people's files and names make too long loses its middle."""
    text = re.sub(r"\S{161,}", lambda word: f"{word[0][:80]}…{word[0][-70:]}", " ".join(str(text).splitlines()))
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 3 :]}"


def no_run():
    return None


running = no_run  # gives the Run of this process while it trains: an error that ends it says how to go on (settings.exit_codes)


# ------------------------------------------------------------------------------------------------ numbers that must repeat


def derive_seed(*parts):
    """A 63-bit seed from any values, e.g. (seed, step, prompt ids). Equal values give equal seeds on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def batch_rows(n_rows, batch_size, step, seed):
    """The rows that step `step` (counted from 0) trains on: a list of batch_size ints in [0, n_rows).

    It depends on (seed, step) only, so a resumed run needs no saved data state. Each epoch is one permutation of the rows, seeded by
    (seed, epoch); a batch may contain the end of one epoch and the start of the next.
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
    """Cut rows (a list, a range, a tensor) into micro-batches of at most `micro_batch` rows, in their order; 0 means one piece."""
    size = micro_batch or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


SHORTEST = 2 / 3  # a pass holds no row shorter than this share of its longest, unless the processes need it to be equally full


def passes(lengths, micro_batch, *, unit=1, rank=None):
    """How a step's rows are dealt to the passes of this process (or of process `rank`): lists of the rows' places.

    lengths: the tokens of each row. micro_batch: the most rows of a pass; 0 means all of this process. unit: this many neighbours stay
    together. Padding costs as much as real tokens, and the passes of all processes wait for each other. So rows are sorted from the longest
    to the shortest (a step that does not fit in memory fails at once), and in each pass all processes take equally many of the next ones.
    The gradient of a step is a sum over its rows: which of them share a pass changes it by rounding only. One process with one pass keeps
    the order.
    """
    world, rank = parallel.world(), parallel.rank() if rank is None else rank
    n, most = len(lengths), world * (micro_batch or -(-len(lengths) // parallel.world()))  # rows of one pass of all processes
    assert n % (world * unit) == most % (world * unit) == 0, (n, most, world, unit)
    if world == 1 and n <= most:
        return [[*range(n)]]
    size = [max(lengths[g : g + unit]) for g in range(0, n, unit)]  # of each unit
    units, dealt, start = sorted(range(n // unit), key=lambda g: -size[g]), [], 0  # (those of equal size keep their order)
    while start < len(units):
        end = start + world
        while end < len(units) and end - start < most // unit and size[units[end]] >= SHORTEST * size[units[start]]:
            end += world
        dealt.append([g * unit + i for g in units[start:end][rank::world] for i in range(unit)])
        start = end
    return dealt


def micro_batches(picked, rows, cfg):
    """The micro-batches of a step: lists of the numbers in `picked`, the places of its rows among the encoded rows. See `passes`."""
    lengths = row_lengths([rows[i] for i in picked], getattr(cfg, "max_len", math.inf))
    return [[picked[i] for i in own] for own in passes(lengths, cfg.micro_batch)]


def row_lengths(rows, max_len=math.inf):
    """The tokens of encoded rows: of the prompt and the longest answer, at most max_len."""
    return [min(len(row[0]) + max((len(part) for part in row[1:] if hasattr(part, "__len__")), default=0), max_len) for row in rows]


def rows_at_once(cfg):
    """The most rows of a training pass: a micro-batch, or this process's part of a batch."""
    part = -(-cfg.batch_size // parallel.world())
    return min(cfg.micro_batch or part, part)


def eval_rows(cfg):
    """The most rows of a pass of an evaluation."""
    return cfg.eval_batch or rows_at_once(cfg)


def held_out_passes(rows, cfg):
    """This process's passes over encoded held-out rows, from the longest to the shortest: yields (indices of rows, weight). Every process
    makes equally many, as FSDP needs. The passes that are missing for that repeat the first one, with weight 0.
    """
    size, lengths = eval_rows(cfg), row_lengths(rows)
    order = sorted(range(len(rows)), key=lambda i: -lengths[i]) if len(rows) > size else [*range(len(rows))]
    weighted = [(order[start : start + size], 1) for start in range(0, len(rows), size)]
    missing = [(weighted[0][0], 0)] * (-len(weighted) % parallel.world()) if weighted else []
    yield from parallel.local_rows(weighted + missing)


@torch.no_grad()
def in_micro(function, rows, micro_batch, encoded=None):
    """Apply `function`, which returns one output row per input row, to each micro-batch and concatenate the outputs. No gradients.

    rows: a Batch, or a range over `encoded` rows. Rows of similar length share a pass; the outputs are in the order of the rows.
    Outputs as wide as their trimmed micro-batch are padded with 0 to the width of the Batch.
    """
    n, width = len(rows), rows.mask.shape[1] if hasattr(rows, "mask") else None
    lengths = (rows.sizes if width else encoded and row_lengths(encoded)) or [1] * n
    if n % parallel.world():  # held-out rows, a list or range: some are computed again, so that all processes have equally many
        again = [i % n for i in range(n + -n % parallel.world())]
        rows, lengths = [rows[i] for i in again], [lengths[i] for i in again]
    outputs = []
    for own in passes(lengths, micro_batch):
        output = function(rows[own].trimmed() if width else [rows[i] for i in own])
        outputs.append(F.pad(output, (0, width - output.shape[1])) if width and output.dim() == 2 else output)
    order = [i for rank in range(parallel.world()) for own in passes(lengths, micro_batch, rank=rank) for i in own]
    joined = parallel.gather_rows(torch.cat(outputs))
    return (joined if order == [*range(len(order))] else joined[torch.tensor(order).argsort().to(joined.device)])[:n]


def lr_at(step, *, lr, steps, warmup=0.0, schedule="cosine"):
    """The learning rate of step `step` (from 0): linear warm-up over the share `warmup` of all steps, then cosine | linear | constant.

    It depends on the step only, so there is nothing to save or restore.
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


def pick_device(name, *, deterministic=False):
    """'auto' takes a CUDA device if there is one, else the CPU. Apple's mps is used only if --device says mps.

    On CUDA, float32 products then use TF32 (10 bits of mantissa, several times as fast). deterministic: the same input gives the same bits
    on the same card; both settings are torch's own and hold for the whole process.
    """
    try:
        if name.partition(":")[0] == "meta":
            raise RuntimeError("its tensors have no numbers")
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", parallel.local_rank())
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels and recorded graphs run on the current device
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new batch shape, which takes up to a second
        if deterministic:  # (flash and memory-efficient attention then add up their gradients in a fixed order)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
            torch.use_deterministic_algorithms(True)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = one_line(error)
        raise BadInput(f"--device {name} cannot be used here ({reason}); use cpu, or auto to take what there is") from None
    return device


def pick_dtype(name):
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in dtypes:
        raise BadInput(f"--dtype {name} is unknown: use float32, bfloat16 or float64 (or, in training, mixed)")
    return dtypes[name]


# ------------------------------------------------------------------------------------------------------------------- files


def write_atomic(path, text):
    """Write text so that `path` holds either all of the old content or all of the new one, even if the process is killed here."""
    if not parallel.is_main():
        return
    path = Path(os.path.realpath(path))  # of a link, the file that it leads to
    if path.is_dir():
        raise BadInput(f"{path}: is a folder, expected the name of a file")
    if path.is_fifo():
        raise BadInput(f"{path}: is a pipe, expected the name of a file")
    if path.exists() and not path.is_file():  # a device, as /dev/stdout: it is written to, not replaced
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")  # same folder, because a rename across devices would fail

    def write():
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    persist(path, write)


RETRY_SECONDS = (1, 4, 16)
FOR_GOOD = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EFBIG)


def persist(path, write):
    """Return write(). If it fails, try again after 1, 4 and 16 s: a short failure of a network disk must not end a run of days.

    Raises the last error (OSError, or SafetensorError), and at once one that waiting cannot mend.
    """
    for attempt, pause in enumerate((*RETRY_SECONDS, None), start=2):
        try:
            return write()
        except (OSError, SafetensorError) as error:
            if pause is None or getattr(error, "errno", None) in FOR_GOOD:
                raise
            print(f"writing {path} failed ({one_line(error)}); try {attempt} in {pause} s", file=sys.stderr)
            time.sleep(pause)


def open_to_readers(folder):
    """Give the .safetensors files in a folder the rights of other new files. safetensors makes them readable for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def read_rows(path, key=None):
    """The JSON objects of a .jsonl file that a run appended to. An incomplete last line, left by a killed run, is skipped.

    key: a field that each must have, as a whole number. Raises BadInput with path:line for any other line.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    lines = read_regular(path).removesuffix(b"\n").split(b"\n")  # of bytes, because the last line may end inside a character
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError:
            row = None
        if isinstance(row, dict) and (key is None or isinstance(row.get(key), int)):
            rows.append(row)
        elif number != len(lines):
            raise BadInput(f"{path}:{number}: not an object of JSON{f' with a {key}' if key else ''}; the file was edited or damaged")
    return rows


def append_row(path, row):
    if not parallel.is_main():
        return
    line = json.dumps(row, ensure_ascii=False) + "\n"
    size = persist(path, lambda: os.path.getsize(path) if os.path.exists(path) else 0)

    def write():
        with open(path, "ab") as file:
            file.truncate(size)  # without the half of a line that a failed try left
            file.write(line.encode())

    persist(path, write)


def read_regular(path):
    """The bytes of a file. Raises BadInput for a pipe or a device, which could be waited for without end."""
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "folder" if os.path.isdir(path) else "pipe or a device; write its content to a file first"
        raise BadInput(f"{path}: expected a file, found a {kind}")
    return Path(path).read_bytes()


def figure_path(flag, path):
    """Create the folder of a figure, before the work that it shows. Raises BadInput if that fails or if the name is not one of a figure."""
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".webp"):
        raise BadInput(f"{flag} {path}: expected the name of a figure, such as figure.png (or .pdf, .svg)")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{flag} {path}: cannot be written ({error.strerror})") from None


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def one_line(error):
    """The message of an exception from other people's code, cut to one line."""
    try:
        text = str(error).strip()
    except Exception:  # an error of a reward may fail even here
        text = ""
    return (text or type(error).__name__).splitlines()[0][:300]


def find_folder(path_or_hub_name):
    """The local folder of a path or hub name. huggingface_hub downloads a hub name's files, or finds them in its cache."""
    try:
        folder = Path(path_or_hub_name).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, ValueError, RuntimeError) as error:  # more than 255 bytes, a null byte, ~ of nobody
        raise BadInput(f"{path_or_hub_name}: cannot be the name of a folder ({one_line(error)})") from None
    if folder.is_file() or folder.suffix in (*PICKLES, ".safetensors", ".gguf"):  # other dots are part of a hub name
        raise BadInput(f"{folder}: expected a folder with config.json and model.safetensors, not a single file")
    note(f"{path_or_hub_name}: no such folder here; asking the hub for it")
    from huggingface_hub import snapshot_download  # imported here because importing it takes longer than most runs take to start
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(path_or_hub_name), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except HFValidationError:
        raise BadInput(f"{path_or_hub_name}: no such folder, and not a hub name (owner/name) either") from None
    except Exception as error:  # network, missing or gated repository: huggingface_hub's message says which
        raise BadInput(
            f"{path_or_hub_name}: no such folder here, and the hub could not deliver it ({one_line(error)}); "
            "for a gated model run `hf auth login` first"
        ) from None


def read_json(path):
    """The JSON object in a file. Raises BadInput, naming the file, if it is missing, is not JSON, or is not an object."""
    try:
        content = json.loads(read_regular(path).decode("utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: the file is missing") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number with thousands of digits
        raise BadInput(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected an object, found {type(content).__name__}")
    return content


# ------------------------------------------------------------------------------------------------------ statistics of a step


def floats(values):
    """Numbers and scalar tensors as a list of floats. The tensors are fetched together, so a GPU is waited for once, not for each."""
    values = [value.detach() if torch.is_tensor(value) else value for value in values]
    for dtype in {value.dtype for value in values if torch.is_tensor(value)}:
        places = [i for i, value in enumerate(values) if torch.is_tensor(value) and value.dtype == dtype]
        for i, number in zip(places, torch.stack([values[i] for i in places]).tolist(), strict=True):
            values[i] = number
    return [float(value) for value in values]


class Mean:
    """Weighted means of stats over micro-batches: one micro-batch of 8 rows logs the same numbers as two of 4 or eight of 1."""

    def __init__(self):
        self.added = []  # (name, value, weight)

    def add(self, stats, weight=1.0):
        """stats: {name: number or scalar tensor}. Tensors, also as weight, are read in result(), so adding them does not wait for a GPU."""
        self.added += [(name, value.detach() if torch.is_tensor(value) else value, weight) for name, value in stats.items()]

    def result(self):
        """{name: mean} of everything added, in this process and in the others."""
        numbers, sums, weights = floats([x for _, *both in self.added for x in both]), {}, {}
        for (name, *_), value, weight in zip(self.added, numbers[::2], numbers[1::2], strict=True):
            sums[name], weights[name] = sums.get(name, 0.0) + value * weight, weights.get(name, 0.0) + weight
        parts = parallel.gather((sums, weights))
        names = dict.fromkeys(name for sums, _ in parts for name in sums)
        sums, weights = ({name: sum(part[i].get(name, 0.0) for part in parts) for name in names} for i in (0, 1))
        return {name: sums[name] / weights[name] for name in names}


def note(text):
    """Print a remark on stderr. Under torchrun only the first process prints it. Half a surrogate pair, from a file, is shown escaped."""
    if parallel.is_main():
        print(in_one_line(text).encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def commit():
    """The checkout's git commit, or None outside a checkout."""
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def environment(device):
    """What a published number depends on: versions, commit, machine and threads, as a dict for JSON."""
    return {"minialign": __version__, "commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
            "platform": platform.platform(), "device": describe_device(device), "threads": torch.get_num_threads()}


def describe_device(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({torch.get_num_threads()} threads)"
