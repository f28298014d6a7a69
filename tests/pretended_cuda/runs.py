"""What tests do on the pretended device. Each function yields dicts, which `start` prints as lines of JSON."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import traceback

import torch

import minialign.batch
import minialign.model
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


def passes(*families):
    """Rows of 10 and 70 positions in a context of 100: distance of log-probs and gradients from the CPU's, lengths of the passes."""
    forward, lengths = minialign.model.Block.forward, []

    def counted(self, x, *context):
        lengths.append(x.shape[1])
        return forward(self, x, *context)

    for family in families:
        here, there = (tiny_gpt(max_len=100, **FAMILIES[family]) for _ in range(2))
        batch = minialign.batch.collate([[1, 2]] * 2, [[3] * n for n in (9, 69)], pad_id=0)
        expected = token_logps(here, batch)
        expected.sum().backward()
        with device.Everything():
            there.to("cuda")
            minialign.model.Block.forward = counted
            found = [token_logps(there, batch[b : b + 1].trimmed().to("cuda")) for b in range(2)]
            minialign.model.Block.forward = forward
            sum(x.sum() for x in found).backward()
            off = [float((x.cpu() - expected[b : b + 1, : x.shape[1]]).detach().abs().max()) for b, x in enumerate(found)]
            off += [float((p.grad.cpu() - q.grad).abs().max()) for p, q in zip(there.parameters(), here.parameters(), strict=True)]
        yield dict(family=family, off=max(off), lengths=sorted(set(lengths)))
        lengths.clear()


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


def refusals():
    """What CUDA would refuse, and what it would wait for: yields the error or the number of waits of each line."""
    def record(function):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=None)
        try:
            function()
        finally:
            graph.capture_end()

    with device.Everything():
        x, here = torch.arange(6.0, device="cuda").view(2, 3), torch.ones(3)
        pinned = here.pin_memory()
        lines = {
            "x + 1": lambda: x + 1, "x * scalar of the host": lambda: x * here.sum(), "x.sum()": x.sum,
            "x[:, rows]": lambda: x[:, x[0].long()], "x + here": lambda: x + here, "here + x": lambda: here + x,
            "x @ here": lambda: x @ here, "cat": lambda: torch.cat([x[0], here]), "float(x)": lambda: float(x.sum()),
            "x.tolist()": x.tolist, "if x": lambda: bool((x > 0).all()), "x.cpu()": x.cpu,
            "x[x > 2]": lambda: x[x > 2], "x.nonzero()": x.nonzero, "here.to": lambda: here.to("cuda"),
            "pinned.to": lambda: pinned.to("cuda", non_blocking=True), "x.copy_": lambda: x[0].copy_(here),
            "record x + 1": lambda: record(lambda: x + 1), "record float(x)": lambda: record(lambda: float(x.sum())),
            "record x[x > 2]": lambda: record(lambda: x[x > 2]), "record here.to": lambda: record(lambda: here.to("cuda")),
        }
        for name, function in lines.items():
            device.waits.clear()
            try:
                function()
                yield {name: sum(device.waits.values())}
            except RuntimeError as error:
                yield {name: str(error).split(",")[0][:40]}
        graph, total = torch.cuda.CUDAGraph(), torch.zeros(3, device="cuda")
        graph.capture_begin()
        twice = x[0] * 2
        total += twice
        graph.capture_end()
        yield {"recorded": [bool(twice.isnan().all()), total.tolist()]}
        x[0] = 5.0
        graph.replay()
        graph.replay()
        yield {"replayed": [twice.tolist(), total.tolist()]}
        torch.use_deterministic_algorithms(True)
        sums, settled = minialign.sample.running_sums(x), torch.are_deterministic_algorithms_enabled()
        yield {"running sums": [sums.tolist(), settled]}
