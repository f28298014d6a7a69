"""Speed and memory as ratios within one run: every body does the same work in turn, round after round, and is divided by the first.

Seconds on their own say as much about the machine, and what else it does, as about the code. So a ratio is taken within a round, and its
median over the rounds reported, with the least and the most beside it; the error against float64 and the peak of memory stand in the same
row, because a fast wrong number is none. One thread, unless --threads says otherwise: on a busy machine two can be ten times slower.

    python -m minialign.bench                                # CPU: log-probs from hidden states, forward and backward; start-up
    python -m minialign.bench --n 2048 --rounds 9 --out docs/bench_cpu.json

Peers take part when they are installed: torch's own F.linear_cross_entropy, TRL's chunked log-probs. Memory is this process's peak above
what it held before (Linux only), in units of the head's gradient, which every body must return.

Checked by tests/test_bench.py.
"""

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from minialign import __version__
from minialign.common import BadInput, cli, exit_codes, write_atomic
from minialign.logps import linear_logps
from minialign.run import commit, describe_device


@dataclass
class Config:
    n: int = 1024                   # N: scored tokens
    c: int = 512                    # C: channels
    v: int = 50304                  # V: vocabulary
    rounds: int = 5                 # each body once a round; one round more goes before them, uncounted
    threads: int = 1                # of torch
    out: str = "runs/bench.json"    # the numbers


def log_prob_bodies(entropy):
    """{name: function of hidden, weight, targets -> logps, entropy or None}; the first is what the others are divided by."""
    def ours(body, keep_bytes=0):
        return lambda h, w, y: linear_logps(h, w, y, entropy=entropy, body=body, keep_bytes=keep_bytes)

    bodies = {"naive: log_softmax of all logits": ours("naive"), "minialign, chunked": ours("chunked"),
              "minialign, chunked, logits kept": ours("chunked", keep_bytes=2**62)}
    if hasattr(F, "linear_cross_entropy") and not entropy:
        bodies["torch F.linear_cross_entropy"] = lambda h, w, y: (-F.linear_cross_entropy(h, w, y, reduction="none"), None)
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError:
        return bodies
    outputs, chunk = (("entropy",) if entropy else ()), 32768  # its default width
    bodies["trl ChunkedLogProbFunction"] = lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, chunk, None, 1.0, outputs)[:2]
    return bodies


def problem(cfg, seed=0):
    """hidden (N, C), weight (V, C) with logits of standard deviation 3, targets (N,), and upstream gradients of both outputs (N,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(cfg.n, cfg.c, generator=generator), torch.randn(cfg.v, cfg.c, generator=generator) * 3 / cfg.c**0.5
    upstream = torch.randn(2, cfg.n, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(cfg.v, (cfg.n,), generator=generator), upstream


def forward_backward(body, hidden, weight, targets, upstream):
    """Log-probs, entropies and both gradients."""
    logps, entropies = body(hidden, weight, targets)
    loss = (upstream[0].to(logps.dtype) * logps).sum()
    if entropies is not None:
        loss = loss + (upstream[1].to(logps.dtype) * entropies).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return logps.detach(), None if entropies is None else entropies.detach(), *grads


def peak_above(work):
    """(what work() returns, bytes of memory at its peak above those before): None where the system does not say.

    It runs once before, for what libraries set up at a first call, and what the C library has kept of freed memory is given back first:
    else a second run would find there what it needs, and seem to need none.
    """
    try:
        work()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
        result = work()
        return result, resident("VmHWM") - before
    except OSError:
        return work(), None


def resident(field):
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def rounds_of(works, rounds):
    """{name: [seconds of each round]}, the works in turn; a round before the first is not counted."""
    seconds = {name: [] for name in works}
    for k in range(rounds + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if k:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratios(seconds):
    """{name: (median, least, most) of the ratio to the first of the names, taken within each round}."""
    base = next(iter(seconds.values()))
    of = {name: [s / b for s, b in zip(values, base, strict=True)] for name, values in seconds.items()}
    return {name: (statistics.median(values), min(values), max(values)) for name, values in of.items()}


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def log_probs(cfg, entropy):
    """Rows of the table: one dict per body."""
    *tensors, upstream = problem(cfg)
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]
    exact = forward_backward(log_prob_bodies(entropy)["naive: log_softmax of all logits"], *wide, upstream)
    bodies, rows = log_prob_bodies(entropy), []
    for name, body in bodies.items():
        found, peak = peak_above(lambda body=body: forward_backward(body, *tensors, upstream))
        rows.append({
            "name": name, "error": float((found[0] - exact[0]).abs().max()), "gradient error": max(map(relative, found[2:], exact[2:])),
            "entropy error": float((found[1] - exact[1]).abs().max()) if entropy else None,
            "memory": None if peak is None else peak / (4 * cfg.v * cfg.c),
        })
        del found
    seconds = rounds_of({name: lambda body=body: forward_backward(body, *tensors, upstream) for name, body in bodies.items()}, cfg.rounds)
    for row, (median, least, most) in zip(rows, ratios(seconds).values(), strict=True):
        row |= {"seconds": statistics.median(seconds[row["name"]]), "ratio": median, "least": least, "most": most}
    return rows


def start_up(rounds):
    """Seconds that importing us takes beyond `import torch`, each in a fresh interpreter; medians over the rounds."""
    programs = {"import torch": "import torch", "import minialign": "import torch, minialign",
                "import minialign.logps, .sample, .model": "import torch, minialign.logps, minialign.sample, minialign.model"}
    works = {name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True) for name, code in programs.items()}
    seconds = rounds_of(works, rounds)
    base = seconds["import torch"]
    return {name: statistics.median(s - b for s, b in zip(values, base, strict=True)) for name, values in seconds.items()}


def main(cfg):
    """Print the tables, write the numbers; returns them. Raises BadInput for arguments out of range."""
    if min(cfg.n, cfg.c, cfg.v, cfg.rounds, cfg.threads) < 1:
        raise BadInput("--n, --c, --v, --rounds and --threads must be at least 1")
    torch.set_num_threads(cfg.threads)
    print(f"{describe_device(torch.device('cpu'))}, torch {torch.__version__}: N {cfg.n}, C {cfg.c}, V {cfg.v}, float32, forward and "
          f"backward, medians of {cfg.rounds} rounds; the head's gradient has {4 * cfg.v * cfg.c / 2**20:.0f} MiB")
    tables = {}
    for entropy in (False, True):
        title = "log-prob and entropy" if entropy else "log-prob"
        tables[title] = log_probs(cfg, entropy)
        print(f"\n{title:36}{'ratio':>7}{'least':>7}{'most':>7}{'seconds':>9}{'memory':>8}{'error':>10}{'of gradients':>14}")
        for row in tables[title]:
            memory = "" if row["memory"] is None else f"{row['memory']:.2f}"
            print(f"  {row['name']:34}{row['ratio']:7.2f}{row['least']:7.2f}{row['most']:7.2f}{row['seconds']:9.3f}{memory:>8}"
                  f"{row['error']:10.1e}{row['gradient error']:14.1e}")
    start = start_up(cfg.rounds)
    print("\nseconds beyond `import torch`: " + ", ".join(f"{name} {value:.2f}" for name, value in start.items() if name != "import torch"))
    numbers = {"config": asdict(cfg), "date": time.strftime("%Y-%m-%d"), "commit": commit(), "minialign": __version__,
               "torch": torch.__version__, "python": platform.python_version(), "machine": platform.processor() or platform.machine(),
               "log-probs": tables, "start": start}
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(cfg.out, json.dumps(numbers, indent=1) + "\n")
    print(f"memory: peak above what was held before, in units of the head's gradient; error: against float64. Numbers: {cfg.out}")
    return numbers


if __name__ == "__main__":
    with exit_codes("bench"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign.bench", description=__doc__))
