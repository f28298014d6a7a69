"""Not a test: a program that kills its own children with SIGKILL, so that torch is imported once for many kills.

    python -m tests.killing writes FOLDER                          kill before the k-th change of the disk, for every k
    python -m tests.killing stop METHOD TRIALS FOLDER CONFIG_JSON  stop a run by SIGTERM at random moments, resume it, compare
    python -m tests.killing run METHOD TRIALS FOLDER CONFIG_JSON   kill a training run at random moments, resume it, compare
    python -m tests.killing soak METHOD KILLS FOLDER CONFIG_JSON   measure a long run, then kill it so many times and compare

Prints JSON; tests/engine/test_checkpoint.py and tests/engine/test_resume.py read it. Each child is forked before any parallel kernel ran.
"""

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  an optimizer imports it, seconds long: once here, not in every child
from safetensors.torch import load_file

from minialign.engine import checkpoint, run
from minialign.engine.common import read_rows
from minialign.engine.tracking import TIMED

torch.set_num_threads(1)


def in_child(action, kill_after=None, number=signal.SIGKILL):
    """Run action() in a fork that gets the signal after so many seconds if it still lives. Returns True if it was killed by it."""
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            try:
                action()
            except BaseException as error:  # a child must never return into the parent's loop
                traceback.print_exc(file=sys.__stderr__)
                os._exit(1 if not isinstance(error, SystemExit) else error.code or 0)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the child failed with code {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def kill_between_writes(folder):
    """[step found afterwards] for k = 1, 2, ... until a save survives. Step 1 was saved before, step 2 is being saved."""
    from tests.engine.test_checkpoint import parts, same

    old, new, found, k = parts(), parts(steps=4), [], 0

    def save_and_die():
        calls = 0

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        for name in ("save_file", "flush_to_disk", "prune"):
            setattr(checkpoint, name, counted(getattr(checkpoint, name)))
        os.replace, Path.mkdir, Path.write_text = counted(os.replace), counted(Path.mkdir), counted(Path.write_text)
        checkpoint.save_checkpoint(folder, 2, *new, {})

    while True:
        k += 1
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint.save_checkpoint(folder, 1, *old, {})
        killed = in_child(save_and_die)
        restored = parts(seed=9, steps=1)
        state = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(folder), *restored)
        if not same(restored, new if state["step"] == 2 else old):
            raise RuntimeError(f"not bitwise equal after a kill before write {k}")
        found.append(state["step"])
        if not killed:
            return found


def result_of(folder):
    """All that a run leaves behind, without what tells the time: weights, optimizer, metrics, samples."""
    newest = checkpoint.newest_checkpoint(folder)
    files = {(path.name, name): tensor.reshape(-1).view(torch.uint8).tolist()  # (the order of names in a file is nobody's promise)
             for path in newest.glob("*.safetensors") for name, tensor in load_file(path).items()}
    exports = {"export": Path(folder) / "final", "reward": Path(folder) / "reward"}  # the second of rft and irl
    files |= {name: (path / "model.safetensors").read_bytes().hex() for name, path in exports.items() if path.is_dir()}
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(Path(folder) / "metrics.jsonl")]
    return {**files, "checkpoint": newest.name, "metrics": rows, "samples": read_rows(Path(folder) / "samples.jsonl")}


def stop_runs(method, trials, folder, settings):
    """[(was it stopped before its end, equal)] for each trial: a SIGTERM at a random moment of the steps, then resumed to the end. It ends
    with code 0, or in_child raises."""
    module = importlib.import_module(f"minialign.methods.{method}")
    for unbroken in (f"{folder}/warm", f"{folder}/unbroken"):
        started = time.monotonic()
        in_child(lambda out=unbroken: module.main(module.Config(**settings, out=out)))
        duration = time.monotonic() - started
    expected, rng, outcomes = result_of(unbroken), random.Random(0), []
    for trial in range(trials):
        out, delay = f"{folder}/trial-{trial}", duration * (trial + rng.random()) / trials
        killed = in_child(lambda out=out: module.main(module.Config(**settings, out=out)), kill_after=delay, number=signal.SIGTERM)
        stopped = not (Path(out) / "final/config.json").is_file()
        if killed:  # before the steps, when the signal has its usual effect
            shutil.rmtree(out, ignore_errors=True)
        in_child(lambda out=out, killed=killed: module.main(module.Config(**settings, out=out) if killed else module.Config(resume=out)))
        outcomes.append((stopped and not killed, result_of(out) == expected))
    return outcomes


def kill_runs(method, trials, folder, settings):
    """[(steps saved at the kill, None before the first; had it begun; times killed; equal)] for each trial: killed once or twice, then
    resumed to the end."""
    module = importlib.import_module(f"minialign.methods.{method}")
    for unbroken in (f"{folder}/warm", f"{folder}/unbroken"):  # the second knows how long a run takes
        started = time.monotonic()
        in_child(lambda out=unbroken: module.main(module.Config(**settings, out=out)))
        duration = time.monotonic() - started
    expected, rng, outcomes = result_of(unbroken), random.Random(0), []
    for trial in range(trials):
        out, kills = f"{folder}/trial-{trial}", 1
        delay = duration * (trial + rng.random()) / trials  # spread over the whole run
        while not in_child(lambda out=out: module.main(module.Config(**settings, out=out)), kill_after=delay):
            shutil.rmtree(out)  # it had ended: the machine is faster at the moment
            delay *= 0.9
        started_at_all, newest = (Path(out) / "config.json").is_file(), checkpoint.newest_checkpoint(out)
        config = module.Config(resume=out) if started_at_all else module.Config(**settings, out=out + "-again")
        if rng.random() < 0.4 and started_at_all:  # and once more, while it resumes
            kills += int(in_child(lambda config=config: module.main(config), kill_after=duration * rng.random()))
        in_child(lambda config=config: module.main(config))
        outcomes.append((newest and newest.name, started_at_all, kills, result_of(out if started_at_all else out + "-again") == expected))
        shutil.rmtree(out, ignore_errors=True)
    return outcomes


def soak(method, kills, folder, settings):
    """A long run: {'measured': [[step, resident MB, open files]], 'kills': how many met the run, 'equal': is the killed run the unbroken
    one}. It is killed at random moments, each time in another part of it."""
    module, measured = importlib.import_module(f"minialign.methods.{method}"), f"{folder}/measured.jsonl"
    unbroken, out = f"{folder}/unbroken", f"{folder}/killed"
    Path(folder).mkdir(parents=True, exist_ok=True)

    def measuring():
        log = run.Run.log

        def measure(self, step, **metrics):
            log(self, step, **metrics)
            if (step + 1) % 500 == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                with open(measured, "a") as file:
                    file.write(f"[{step + 1}, {pages * os.sysconf('SC_PAGE_SIZE') / 2**20:.1f}, {len(os.listdir('/proc/self/fd'))}]\n")

        run.Run.log = measure
        module.main(module.Config(**settings, out=unbroken))

    started = time.monotonic()
    in_child(measuring)
    part, rng, met, config = (time.monotonic() - started) / (kills + 1), random.Random(0), 0, module.Config(**settings, out=out)
    while in_child(lambda config=config: module.main(config), kill_after=part * rng.uniform(0.7, 1.3)):
        met += 1
        if (Path(out) / "config.json").is_file():
            config = module.Config(resume=out)
    rows = [json.loads(line) for line in Path(measured).read_text().splitlines()]
    return {"measured": rows, "kills": met, "equal": result_of(out) == result_of(unbroken)}


if __name__ == "__main__":
    if sys.argv[1] == "writes":
        print(json.dumps(kill_between_writes(sys.argv[2])))
    elif sys.argv[1] == "stop":
        print(json.dumps(stop_runs(sys.argv[2], int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))))
    elif sys.argv[1] == "soak":
        print(json.dumps(soak(sys.argv[2], int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))))
    else:
        print(json.dumps(kill_runs(sys.argv[2], int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))))
