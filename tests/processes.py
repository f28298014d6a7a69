"""Run methods under torchrun: several runs one after the other in the same processes, because starting those takes longest."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(processes, *arguments, **settings):
    """subprocess.run of torchrun on this machine, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **settings)


def run_all(processes, jobs, folder):
    """jobs: [(module, Config)]. Each is run by so many processes; returns torchrun's result."""
    path = Path(folder) / "jobs.json"
    path.write_text(json.dumps([(module.__name__, vars(cfg)) for module, cfg in jobs]))
    return torchrun(processes, "-m", "tests.processes", path, timeout=600)


if __name__ == "__main__":
    import importlib

    import torch

    from minialign.engine import parallel

    torch.set_num_threads(1)
    for name, settings in json.loads(Path(sys.argv[1]).read_text()):
        module = importlib.import_module(name)
        module.main(module.Config(**settings))
    parallel.leave()
