"""Fixtures: a policy folder and data small enough that a whole training run takes a second. No download, nothing outside tmp_path."""

import json
import os
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minialign.model import GPT, GPTConfig
from minialign.task import builtin_demos, builtin_pairs, builtin_tokenizer
from minialign.weights import save_pretrained

ONLINE = ("reinforce", "rloo", "grpo", "ppo", "rebel")  # they follow a reward
SELECTING = ("best_of_n", "rest")  # they keep what a reward likes
LEARNING = ("rft", "irl")  # they learn a reward from demonstrations and follow it
PREFERRING = ("dpo", "ipo", "slic", "gpo", "simpo", "orpo")  # they are trained on pairs
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
torch.set_num_threads(1)  # the models are tiny: a second thread only waits, and sums would depend on the machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the processes that tests start


class Allocations(TorchDispatchMode):
    """with Allocations() as counted: counted.peak is the most bytes that tensors made inside held at one time. A file that is mapped into
    memory does not count, because no operation makes its storage."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in self.storages((args, kwargs))}
        result = function(*args, **kwargs or {})
        for storage in self.storages(result):
            if storage._cdata not in given | self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    @staticmethod
    def storages(values):
        """Those of all tensors on the CPU; of a DTensor, the slice's."""
        tensors = [getattr(x, "_local_tensor", x) for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        return [x.untyped_storage() for x in tensors if x.device.type == "cpu"]


def pytest_collection_modifyitems(items):
    """A test belongs to one of `make test`, `make test-slow` and `make test-long`."""
    twice = [item.nodeid for item in items if item.get_closest_marker("slow") and item.get_closest_marker("long")]
    if twice:
        raise pytest.UsageError(f"{twice[0]} is marked both slow and long")


@pytest.fixture(autouse=torch.cuda.is_available())
def full_float32():
    """A run on CUDA lets float32 products use TF32, for the rest of the process. No other test inherits that."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    """A random two-layer GPT with the tokenizer of the built-in task, in float64."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = builtin_tokenizer()
    torch.manual_seed(0)
    config = GPTConfig.tiny(tokenizer.vocab_size, n_embd=16, n_head=2, ffn_dim=32, max_len=128)
    save_pretrained(GPT(config).double(), folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def demos_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "demos.jsonl"
    path.write_text("".join(json.dumps(vars(demo)) + "\n" for demo in builtin_demos(20)))
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(vars(pair)) + "\n" for pair in builtin_pairs(20)))
    return path


@pytest.fixture
def small(policy_folder, demos_file, pairs_file, tmp_path):
    """small('irft', steps=6, ...) -> (module, Config) of a run that takes about a second, in its own folder under tmp_path."""
    import importlib

    def make(method, **changes):
        module = importlib.import_module(f"minialign.methods.{method}")
        if method in ONLINE + SELECTING:  # a random policy names no thing: what it can be rewarded for is length and letters
            data = {"prompts": str(demos_file), "reward": ["length:9", "lexicon:a,-e"], "max_new": 12}
            data |= {"quantiles": [0.5], "grow_prompts": 8} if method == "rest" else {}
        else:
            flag, file = ("feedback", pairs_file) if method == "kto" else ("demos", demos_file)
            flag, file = ("pairs", pairs_file) if method in ("reward_model", *PREFERRING) else (flag, file)
            data = {"max_len": 64, flag: str(file)}
            data |= {} if method == "reward_model" else {"max_new": 12}
            data |= {"rounds": 2 if changes.get("steps", 6) > 3 else 1, "reward_lr": 3e-3} if method in LEARNING else {}
            data |= {"reward_share": 1.0} if method in LEARNING and changes.get("steps") == 1 else {}
            data |= {"mode": "accumulate", "anchor": "current"} if method == "irl" else {}  # so that every part of a round has a part
        settings = dict(policy=str(policy_folder), steps=6, batch_size=8, dtype="float64", device="cpu", eval_every=4,
                        save_every=4, log_every=100, lr=3e-3, out=str(tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"))
        return module, module.Config(**{**settings, **data, **changes})

    return make


# Every method there is; tests/test_house.py holds this list to the folder.
METHODS = ("sft", "ift", "irft", "reward_model", *PREFERRING, "kto", *LEARNING, *SELECTING, *ONLINE)
# The others have the loop of one of these: what takes a whole run or several is done for all of them by the slow tests only.
LOOPS = ("sft", "reward_model", "dpo", "kto", "irl", "rest", "grpo", "ppo")
EACH_LOOP = [pytest.param(method, marks=[] if method in LOOPS else pytest.mark.slow) for method in METHODS]
