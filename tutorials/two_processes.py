"""For tutorial 10b: a tiny model and the rows that it trains on, and two ways to call a function of the lesson.

    here(work)               in this process, as a group of one: breakpoints work
    run(work, *functions)    in two processes that torchrun starts
"""

import datetime
import inspect
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from minialign.model import GPT, GPTConfig
from minialign.task import THINGS

# ------------------------------------------------------------------------------------------------------ the model and its rows

SHORT = [f"ask for {thing}: please." for thing in THINGS[4:8]]
TEXTS = SHORT + [f"ask for {thing}: may i have {thing}, please." for thing in THINGS[:4]]
LETTERS = " " + "".join(sorted(set("".join(TEXTS)) - {" "}))


def all_rows():
    """The eight rows of a step: inputs, targets and mask, (8, T) each. The mask is 1 on the text and 0 on the padding."""
    longest = max(map(len, TEXTS))
    ids = torch.tensor([[LETTERS.index(letter) for letter in text.ljust(longest)] for text in TEXTS])
    mask = torch.tensor([[float(t < len(text)) for t in range(1, longest)] for text in TEXTS])
    return ids[:, :-1], ids[:, 1:], mask.double()


def tiny_model():
    """Two layers, 64 channels, float64. The same random weights whenever it is called."""
    torch.manual_seed(0)
    return GPT(GPTConfig.tiny(32, tied=False)).double()


def token_losses(model, inputs, targets):
    """-log π of each target, (B, T), for inputs and targets (B, T)."""
    return F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")


# ------------------------------------------------------------------------------------------------------------- one process or two

HEAD = """\
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tutorials.two_processes import all_rows, in_a_process, tiny_model, token_losses
"""


def here(work):
    """What work() returns in this process, which is a group of one: its rank is 0, and a sum over the group is its own number."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=(Path(folder) / "group").as_uri(), rank=0, world_size=1)
        try:
            return work()
        finally:
            dist.destroy_process_group()


def run(work, *functions):
    """[what work() returned in process 0, in process 1]. torchrun starts both.

    A new process has none of the functions of this one. So a file is written for it, with the source of `work` and of the `functions` that
    it calls. Raises AssertionError with the traceback of a process that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, project = Path(folder) / "two.py", str(Path(__file__).parents[1])
        parts = [HEAD, *map(inspect.getsource, (*functions, work)), f"in_a_process({work.__name__}, {folder!r})\n"]
        file.write_text("\n\n".join(parts), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file)],
            capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": project, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            problems = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("problem*"))]
            raise AssertionError("This should hold, and does not: both processes end without an error.\n" + (problems or [done.stderr])[0])
        return [torch.load(Path(folder) / f"result{rank}.pt") for rank in (0, 1)]


def in_a_process(work, folder):
    """What each process does: join the group, call work(), and write what it returns, or its traceback, into the folder."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    rank = dist.get_rank()
    try:
        torch.save(work(), Path(folder) / f"result{rank}.pt")
    except BaseException:
        (Path(folder) / f"problem{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    dist.destroy_process_group()
