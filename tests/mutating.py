"""Not a test: a program that makes mistakes in a file of minialign, one at a time, and runs the tests that should notice them.

    python -m tests.mutating FILE    FILE is relative to minialign/. From the standard input it reads [[exchanges, killers], …] as JSON:
                                     exchanges = [[text in the file, what stands there instead], …], killers = [node of pytest, …]

Prints JSON, [[exit code of pytest, names of the tests that failed], …]; tests/test_wrong_variants.py reads it. Torch and pytest are
imported once. Each mistake is a fork: minialign is imported there for the first time, so every module sees the mistake, whatever it
imports by name.
"""

import contextlib
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import linecache
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTEST_ADDOPTS", None)
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins that happen to be installed take longer to load than most tests to run

import pytest  # noqa: E402
import torch  # noqa: E402

SECONDS = 300  # of work or of waiting: a mistake may make a loop endless
# What the tests import beside minialign takes longer than most of them, so it is imported before the forks. Some are optional.
HEAVY = ("torch._dynamo", "numpy", "hypothesis", "safetensors.torch", "tokenizers", "filelock", "huggingface_hub", "tqdm",
         "torch.utils.checkpoint", "torch.distributed.fsdp", "torch.distributed.checkpoint")
# These are imported only for the files whose tests need them.
FAMILIES = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"))
ALSO = {"lora.py": ("peft",), "model.py": FAMILIES, "weights.py": FAMILIES, "kernels/logprob_triton.py": ("triton.language",),
        "kernels/linear_logprob_triton.py": ("triton.language",)}


class Mutant(importlib.machinery.SourceFileLoader):
    """Loads a module of minialign from a changed source. Its __file__ is the real one."""

    def __init__(self, fullname, path, source):
        super().__init__(fullname, path)
        self.source, self.shown = source, f"<{fullname} with a mistake>"

    def get_code(self, fullname):
        lines = self.source.splitlines(keepends=True)
        linecache.cache[self.shown] = len(self.source), None, lines, self.shown  # Triton asks for the source of its kernels
        return compile(self.source, self.shown, "exec")


class Finder:
    """On sys.meta_path it delivers the one changed module."""

    def __init__(self, fullname, path, source):
        self.fullname, self.path, self.source = fullname, path, source

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.fullname:
            return importlib.util.spec_from_file_location(fullname, self.path, loader=Mutant(fullname, self.path, self.source))


class Failed:
    """A plugin of pytest that remembers which tests failed."""

    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.names.append(f"{report.nodeid.removeprefix('tests/')} ({report.when})")


def fullname_of(file):
    return ".".join(["minialign", *Path(file).with_suffix("").parts])


def tests_with(file, source, killers, folder):
    """(exit code of pytest, names of the tests that failed) of the killers with this source in the place of the file's, in a fork."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, failed = 99, Failed()
        try:
            os.close(reader)
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")  # a found example must not help the next mistake
            sys.meta_path.insert(0, Finder(fullname_of(file), str(ROOT / "minialign" / file), source))
            switched_off = [word for name in ("cacheprovider", "unraisableexception", "threadexception") for word in ("-p", f"no:{name}")]
            nodes = [f"tests/{killer}" for killer in killers]
            code = int(pytest.main(["-x", "-q", *switched_off, "--basetemp", str(folder / "tmp"), *nodes], plugins=[failed]))
            if fullname_of(file) in sys.modules and not isinstance(sys.modules[fullname_of(file)].__loader__, Mutant):
                code = 98  # the module was there before: the tests have seen the file as it is
        finally:  # a child must never return into the parent's loop
            os.write(writer, json.dumps([code, failed.names[:3]]).encode())
            os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + SECONDS
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            break
        time.sleep(0.02)
    with open(reader, "rb") as pipe:
        written = pipe.read()
    return json.loads(written) if written else [-9, []]


def main(file):
    assert not [name for name in sys.modules if name.partition(".")[0] == "minialign"]
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in (*HEAVY, *ALSO.get(file, ())):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    gc.freeze()  # what is here stays: a child's garbage collector need not look at it
    whole, found = (ROOT / "minialign" / file).read_text(encoding="utf-8"), []
    with tempfile.TemporaryDirectory() as folder:
        for exchanges, killers in json.load(sys.stdin):
            source = whole
            for old, new in exchanges:
                source = source.replace(old, new)
            found.append(tests_with(file, source, killers, Path(folder)))
            if "-v" in sys.argv:
                print(found[-1], (Path(folder) / "log").read_text(errors="replace")[-2000:], sep="\n", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
