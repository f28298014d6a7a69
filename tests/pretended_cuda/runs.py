"""What tests do on the pretended device. Each function yields dicts, which `start` prints as lines of JSON."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import traceback

import torch

import minialign.sample
from minialign.engine.run import Run
from minialign.logps import token_logps
from tests.enumerable import EOS, PROMPTS, tiny_gpt
from tests.pretended_cuda import device
from tests.test_sample import FAMILIES

line = json.dumps


def sampler(*families):
    """float32 and bfloat16, rows that end and rows that do not: each beside the same on the CPU, and beside one forward pass."""
    generate, first = inspect.getsourcelines(minialign.sample.generate)
    of_generate = {f"sample.py:{number}" for number in range(first, first + len(generate))}
    for family in families:
        for dtype, eos_id in ((torch.float32, EOS), (torch.float32, None), (torch.bfloat16, EOS)):
            here, there = (tiny_gpt(dtype=dtype, max_len=160, **FAMILIES[family]) for _ in range(2))
            settings = dict(max_new=100, n=3, eos_id=eos_id, seed=1)
            expected = minialign.sample.sample(here, PROMPTS, **settings)
            with device.Everything():
                there.to("cuda")
                device.waits.clear()
                answers = minialign.sample.sample(there, PROMPTS, **settings)
                asked = sum(count for place, count in device.waits.items() if place.split()[0] in of_generate or "model.py" in place)
                with torch.no_grad():
                    off = float((token_logps(there, answers) - answers.old_logps).abs().max())
            yield dict(family=family, dtype=str(dtype)[6:], off=off, same=expected.completions == answers.completions, waits=asked,
                       tokens=max(map(len, answers.completions)))


def methods(file, dtype):
    """A run of each Config in a file of JSON, {method: settings}: yields the waits of its last step by place, or the error."""
    steps, waits = Run.steps, {}

    def counted(self, total):
        for k in steps(self, total):
            device.waits.clear()
            yield k
            waits.clear()
            waits.update(device.waits)

    Run.steps = counted
    for method, settings in json.load(open(file, encoding="utf-8")).items():
        module = importlib.import_module(f"minialign.methods.{method}")
        fields = {field.name for field in dataclasses.fields(module.Config)}
        settings = {name: value for name, value in {**settings, "dtype": dtype, "device": "cuda"}.items() if name in fields}
        try:
            with device.Everything(), contextlib.redirect_stdout(io.StringIO()):
                module.main(module.Config(**settings))
            yield dict(method=method, waits=dict(waits))
        except BaseException:
            yield dict(method=method, error=traceback.format_exc()[-3000:])
