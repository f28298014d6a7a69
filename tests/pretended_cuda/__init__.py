"""Compiles and loads what device.py needs. This file does not import torch: torch asks for CUDA's hooks once, when it is imported."""

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

TORCH = Path(importlib.util.find_spec("torch").origin).parent
LIBRARIES = [str(TORCH / "lib" / name) for name in ("libc10.so", "libtorch_cpu.so")]


def build(library):
    """Compile device.cpp against the installed torch."""
    include = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", *include, str(Path(__file__).with_name("device.cpp")), "-o", str(library)]
    subprocess.run([*command, *LIBRARIES], check=True, capture_output=True, text=True)


def start(library, program):
    """For `python -c`: load the library, then torch, install the device, and run a function of runs.py with the arguments that follow."""
    for name in (*LIBRARIES, library):
        ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
    from tests.pretended_cuda import device, runs

    device.install()
    for found in getattr(runs, program)(*sys.argv[1:]):
        print(runs.line(found), flush=True)
