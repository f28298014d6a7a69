"""Two processes over gloo against one, in float64: the same step, however the weights lie; then all that can go wrong between them."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from minialign.engine import common, parallel
from minialign.engine.common import read_rows
from minialign.engine.run import Run
from minialign.engine.tracking import TIMED
from minialign.lora import frozen_copy
from minialign.model import GPT, GPTConfig
from minialign.weights import load_pretrained, new_model, save_pretrained
from tests.conftest import METHODS, Allocations
from tests.killing import result_of
from tests.processes import ROOT, run_all, torchrun

NAMED = ("sft", "grpo", "dpo", "irft", "ppo")  # the others have the loop of one of these
EXTRA = {"irft": {"rounds": 3}, "grpo": {"epochs": 2, "aggregate": "dapo"}, "rft": {"policy_step": "ppo"}, "ift": {"mix": 0.5},
         "best_of_n": {"n": 3}}


def compare(one, other, tolerance):
    """The rows of metrics.jsonl and the exported weights of two run folders: equal to `tolerance`."""
    for left, right in zip(read_rows(one / "metrics.jsonl"), read_rows(other / "metrics.jsonl"), strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {*TIMED, "rewards/accuracies", "eval/accuracy"}:  # a tie is broken by the last bit
            assert left[name] == pytest.approx(right[name], rel=tolerance, abs=tolerance), (name, left["step"])
    left, right = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).abs().max() <= tolerance, name


def equal_one_process(small, tmp_path, methods, steps):
    """Each method alone, with fsdp and with ddp."""
    jobs, alone = [], {}
    for method in methods:
        for layout in ("fsdp", "ddp"):
            jobs.append(small(method, steps=steps, micro_batch=3, parallel=layout, out=str(tmp_path / f"{method}-{layout}"),
                              **EXTRA.get(method, {})))
        module, cfg = small(method, steps=steps, out=str(tmp_path / f"{method}-alone"), **EXTRA.get(method, {}))
        alone[method] = module.main(cfg)
    done = run_all(2, jobs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for method in methods:
        for layout in ("fsdp", "ddp"):
            compare(alone[method], tmp_path / f"{method}-{layout}", 1e-10)
            samples = alone[method] / "samples.jsonl"
            assert not samples.exists() or samples.read_text() == (tmp_path / f"{method}-{layout}" / "samples.jsonl").read_text()


@pytest.mark.parametrize("methods", [("grpo",), pytest.param(("sft", "dpo", "irft", "ppo"), marks=pytest.mark.slow)])
def test_two_processes_equal_one(small, tmp_path, methods):
    """20 steps in micro-batches of 3, which two processes cut otherwise than one: losses, all metrics, samples and weights to 1e-10."""
    equal_one_process(small, tmp_path, methods, steps=20)


@pytest.mark.slow
def test_two_processes_equal_one_for_every_other_method(small, tmp_path):
    equal_one_process(small, tmp_path, [method for method in METHODS if method not in NAMED], steps=6)


@pytest.mark.slow
def test_adapters_checkpointed_activations_and_remembered_references(small, tmp_path):
    """Over two processes; adapter/ and final/ are those of one process without activation checkpointing, or with a second model."""
    both = dict(steps=4, lora=2, save_every=2)
    module, cfg = small("dpo", **both, out=str(tmp_path / "alone"))
    alone = module.main(cfg)
    jobs = [small("dpo", **both, activation_checkpointing=True, out=str(tmp_path / "two")),
            small("irft", steps=4, rounds=2, precompute_ref=True, out=str(tmp_path / "remembered"))]
    done = run_all(2, jobs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    compare(alone, tmp_path / "two", 1e-10)
    module, cfg = small("irft", steps=4, rounds=2, out=str(tmp_path / "with-a-second-model"))
    compare(module.main(cfg), tmp_path / "remembered", 1e-10)
    left, right = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (alone, tmp_path / "two"))
    assert left.keys() == right.keys() and all((left[name] - right[name]).abs().max() < 1e-10 for name in left)


def go_back_to(folder, step):
    """As if the run had been killed on its way from the checkpoint of `step`."""
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "final")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_resume_with_another_number_of_processes(small, tmp_path, method):
    """2 -> 1, in both layouts, and 1 -> 2, from step 4 of 6: as the unbroken run, to 1e-10 in float64 (1e-6 asked for)."""
    module, cfg = small(method, save_every=4, out=str(tmp_path / "alone"))
    alone = module.main(cfg)
    jobs = [small(method, save_every=4, parallel=layout, out=str(tmp_path / layout)) for layout in ("fsdp", "ddp")]
    done = run_all(2, jobs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    names = sorted(path.name for path in (tmp_path / "fsdp" / "checkpoints" / "step_000004").iterdir())
    assert [name for name in names if name.startswith("shard")] == [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    shutil.copytree(alone, tmp_path / "one")
    for layout in ("fsdp", "ddp"):
        go_back_to(tmp_path / layout, 4)
        compare(alone, module.main(module.Config(resume=str(tmp_path / layout))), 1e-10)
    go_back_to(tmp_path / "one", 4)
    done = run_all(2, [(module, module.Config(resume=str(tmp_path / "one")))], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    compare(alone, tmp_path / "one", 1e-10)


def start(arguments, metrics, rows):
    """torchrun of `python -m minialign` with so many arguments, two processes; waits until metrics.jsonl has so many rows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "minialign", *arguments]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= rows):
        if running.poll() is not None or time.monotonic() > deadline:
            running.kill()
            raise AssertionError(running.communicate()[1][-3000:])
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    return running, [int(worker) for worker in workers]


def flags(cfg):
    """The command line that makes a Config."""
    words = []
    for name, value in vars(cfg).items():
        if value != getattr(type(cfg)(), name) and not isinstance(value, bool):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.mark.skipif(not shutil.which("pgrep"), reason="finds the workers by pgrep")
@pytest.mark.parametrize(("at", "victim"), [
    pytest.param(25, 1, marks=pytest.mark.slow),
    *[pytest.param(at, victim, marks=pytest.mark.long) for at in (2, 40, 60, 80, 99) for victim in (0, 1)]])
def test_a_killed_process_ends_all_and_a_stopped_run_goes_on(small, tmp_path, record_property, at, victim):
    """kill -9 of one worker: within 30 s all are gone, the exit code is not 0, and the other says why. SIGTERM: both save the same step.
    Either way --resume, with two processes again, equals the unbroken run bit for bit."""
    steps = dict(steps=150, save_every=20, eval_every=100)
    jobs = [small("sft", **steps, out=str(tmp_path / "unbroken"))]
    module, cfg = small("sft", **steps, out=str(tmp_path / "killed"))
    running, workers = start(["sft", *flags(cfg)], tmp_path / "killed" / "metrics.jsonl", at)
    os.kill(workers[victim], signal.SIGKILL)
    began = time.monotonic()
    _, said = running.communicate(timeout=600)
    assert running.returncode != 0 and time.monotonic() - began < 30 and "another process is gone" in said and "--resume" in said
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    jobs.append((module, module.Config(resume=str(tmp_path / "killed"))))

    _, cfg = small("sft", **steps, out=str(tmp_path / "stopped"))
    running, workers = start(["sft", *flags(cfg)], tmp_path / "stopped" / "metrics.jsonl", at)
    os.kill(workers[victim], signal.SIGTERM)  # only one is told: all save and stop
    said, _ = running.communicate(timeout=600)
    assert running.returncode == 0, said
    step = int(re.search(r"stopped after step (\d+)", said)[1])  # an evaluation that was given up has no row yet
    assert step < 150 and (tmp_path / "stopped" / "checkpoints" / f"step_{step:06d}" / "manifest.json").is_file()
    jobs.append((module, module.Config(resume=str(tmp_path / "stopped"))))

    done = run_all(2, jobs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    unbroken = result_of(tmp_path / "unbroken")
    assert result_of(tmp_path / "killed") == unbroken and result_of(tmp_path / "stopped") == unbroken
    record_property("tried", 2)


@pytest.mark.slow
def test_mixed_precision_keeps_what_bfloat16_would_lose(small, tmp_path):
    """At lr 1e-6 no step moves a bfloat16 weight of ordinary size; with --dtype mixed the float32 weights of the checkpoint have moved, the
    export is bfloat16, and the sampler agrees with the training pass (grpo looks)."""
    some = dict(lr=1e-6, schedule="constant", warmup=0.0, dtype="mixed", steps=3, save_every=3)
    jobs = [small(method, **some, out=str(tmp_path / method)) for method in ("sft", "grpo")]
    done = run_all(2, jobs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    name = "blocks.0.attn.q.weight"
    before = load_pretrained(jobs[0][1].policy, dtype=torch.float32).get_parameter(name)
    for method in ("sft", "grpo"):
        assert load_pretrained(tmp_path / method / "final").head_weight.dtype == torch.bfloat16
        shards = [load_file(path) for path in sorted((tmp_path / method / "checkpoints/step_000003").glob("shard-*"))]
        moved = (torch.cat([shard[f"policy.{name}"] for shard in shards]) - before).abs()
        assert shards[0][f"policy.{name}"].dtype == torch.float32 and 1e-7 < moved.median() < 1e-5
        for other, p in load_pretrained(tmp_path / method / "final").named_parameters():  # rounded, then gathered; here the other way round
            whole = torch.cat([shard[f"policy.{other}"] for shard in shards if f"policy.{other}" in shard])
            assert torch.equal(p, whole.bfloat16()), other


def test_mixed_precision_without_torchrun_is_that_of_one_process_under_it(small, tmp_path):
    """grpo, bit for bit, also when it was stopped after step 2 and resumed; the next run in this process has no group of processes."""
    some = dict(dtype="mixed", steps=4, save_every=2, eval_every=4)
    module, cfg = small("grpo", **some, out=str(tmp_path / "alone"))
    module.main(cfg)
    done = run_all(1, [small("grpo", **some, out=str(tmp_path / "torchrun"))], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(tmp_path / "alone", tmp_path / "resumed")
    go_back_to(tmp_path / "resumed", 2)
    module.main(module.Config(resume=str(tmp_path / "resumed")))
    assert result_of(tmp_path / "alone") == result_of(tmp_path / "torchrun") == result_of(tmp_path / "resumed")
    module, cfg = small("sft", steps=1, save_every=1)
    module.main(cfg)
    assert (Path(cfg.out) / "checkpoints" / "step_000001" / "model.safetensors").is_file()


@pytest.mark.slow
def test_float32_parts_of_bfloat16_models_over_two_processes(small, tmp_path):
    """ppo's adapters and critic's head, and a reward model's head: float32 in checkpoints, moments and exports. The losses are those of one
    process to the rounding of bfloat16 sums."""
    some = dict(dtype="bfloat16", steps=2, save_every=2)
    jobs = [small("ppo", lora=2, **some, out=str(tmp_path / "ppo")), small("reward_model", **some, out=str(tmp_path / "reward_model"))]
    done = run_all(2, jobs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for module, cfg in jobs:
        one = module.main(module.Config(**vars(cfg) | {"out": f"{cfg.out}-alone"}))
        for left, right in zip(read_rows(one / "metrics.jsonl"), read_rows(Path(cfg.out) / "metrics.jsonl"), strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=0.02, abs=0.002)
    stored = load_file(next((tmp_path / "ppo" / "checkpoints/step_000002").glob("shard-*")))
    weights = {name for name in stored if "optimizer" not in name}
    assert "value_model.head.weight" in weights and all(name.endswith(("lora_A", "lora_B", "value_model.head.weight")) for name in weights)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert {p.dtype for p in load_file(tmp_path / "ppo" / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}
    found = load_pretrained(tmp_path / "reward_model" / "final")
    assert found.head_weight.dtype == torch.float32 and found.tok_embed.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_adapters_and_a_second_model_resume_with_another_number_of_processes(small, tmp_path):
    """irl and irft with --lora: the checkpoint of two processes holds adapters and heads only, and one process goes on from it."""
    methods = {"irl": dict(policy_step="rloo"), "irft": dict(rounds=2)}
    jobs = [small(method, lora=2, save_every=4, out=str(tmp_path / method), **more) for method, more in methods.items()]
    done = run_all(2, jobs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for module, cfg in jobs:
        whole = module.main(module.Config(**vars(cfg) | {"out": f"{cfg.out}-alone"}))
        folder = Path(cfg.out)
        stored = load_file(next((folder / "checkpoints/step_000004").glob("shard-*")))
        assert not [name for name in stored if "optimizer" not in name and not name.endswith(("lora_A", "lora_B", "head.weight"))]
        assert any(name.startswith(("old.blocks", "anchor.blocks")) for name in stored)
        go_back_to(folder, 4)
        compare(whole, module.main(module.Config(resume=str(folder))), 1e-10)


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process_skips_the_step_in_all(small, tmp_path):
    """From its second call on: both skip, the run ends after three such steps, and says the reward's own words."""
    (tmp_path / "r.py").write_text("import os\n\ncalls = []\n\ndef g(prompts, completions):\n    calls.append(1)\n"
                                   "    if os.environ['RANK'] == '1' and len(calls) > 1:\n        raise RuntimeError('no judge today')\n"
                                   "    return [1.0] * len(prompts)\n")
    done = run_all(2, [small("rloo", reward=[f"{tmp_path / 'r.py'}:g"], steps=5)], tmp_path)
    assert done.returncode != 0 and "3 steps in a row had no rewards" in done.stderr and "no judge today" in done.stderr


def test_refusals(small, tmp_path):
    """What cannot be divided evenly, and a layout nobody knows: one sentence, before anything is written."""
    module, cfg = small("sft", parallel="zero")
    with pytest.raises(common.BadInput, match="--parallel zero: must be fsdp or ddp"):
        module.main(cfg)
    _, cfg = small("rebel", batch_size=6)
    done = torchrun(2, "-m", "minialign", "rebel", *flags(cfg), timeout=600)
    assert done.returncode != 0 and "--batch_size 6: must be a multiple of 4" in done.stderr and not Path(cfg.out).exists()


@pytest.mark.parametrize("policy_step", ["bon_sft", "bon_dpo"])
def test_prompts_with_n_answers_each_are_divided_whole(small, monkeypatch, policy_step):
    """8 rows with 8 answers to each prompt are one prompt, which two processes cannot share; with 4 answers they are two."""
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "on_main", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(parallel, "gather", lambda value: [value, value])
    module, cfg = small("irl", policy_step=policy_step, n=8)
    with pytest.raises(common.BadInput, match="--batch_size 8: must be a multiple of 16, so that each of the 2 processes gets an equal"):
        module.main(cfg)
    assert not Path(cfg.out).exists()
    Run("irl", small("irl", policy_step=policy_step, n=4)[1])


def test_alone_nothing_is_done():
    """Without torchrun every function hands back what it was given."""
    rows = torch.arange(6.0)
    assert parallel.local_rows(rows) is not None and torch.equal(parallel.local_rows(rows), rows) and parallel.gather("x") == ["x"]
    assert parallel.gather_rows(rows) is rows and parallel.sum_over_processes(2.5) == 2.5 and parallel.on_main(max, 1, 2) == 2
    model = torch.nn.Linear(2, 2)
    parallel.shard(model, "fsdp", "cpu", torch.float32)
    assert type(model) is torch.nn.Linear and parallel.full_copy(model) is model and parallel.resharded(model) is model


@contextlib.contextmanager
def one_of_four():
    """This process is the last of a group of four whose others do not exist: nothing can be gathered, but weights can be sliced."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=3, world_size=4, store=FakeStore())
    parallel.mesh.cache_clear()
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        parallel.mesh.cache_clear()


OLDER = dict(norm="layer", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True)
OF_FAMILY = {"gpt2": OLDER | {"activation": "gelu_tanh", "positions": "learned"}, "gpt_neox": OLDER | {"activation": "gelu"},
             "qwen2": {"qkv_bias": True}}


@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_process_holds_only_its_slices(tmp_path, family, layout):
    """A bfloat16 file as float32 policy, reference and reward model, from loading to sharding: at no time more numbers than the slices of
    the three and one block or table. The slices are those of the file, also of rows that do not divide by four, and of a tied head."""
    torch.manual_seed(0)
    config = GPTConfig.tiny(97, family=family, n_layer=6, n_embd=48, n_head=4, ffn_dim=96, max_len=64, tied=family != "gpt_neox",
                            **OF_FAMILY[family])
    save_pretrained(GPT(config).bfloat16(), tmp_path)
    wanted = load_pretrained(tmp_path, dtype=torch.float32)
    with one_of_four(), Allocations() as counted:
        place = parallel.slicing(layout, torch.device("cpu"))
        policy = load_pretrained(tmp_path, dtype=torch.float32, place=place)
        ref, reward_model = frozen_copy(policy), policy.with_scalar_head()
        optimizer = torch.optim.AdamW(policy.parameters())
        for model in (policy, ref, reward_model):
            parallel.shard(model, layout, "cpu", torch.float32, [optimizer] if model is policy else [])
    share = 4 if layout == "fsdp" else 1
    most = max(p.numel() for p in wanted.parameters())
    assert counted.peak <= 4 * (3 * sum(p.numel() for p in wanted.parameters()) / share + 2 * most)
    assert (policy.head.weight is policy.tok_embed.weight) == config.tied
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in policy.parameters()]
    for model in (policy, ref, reward_model):
        for (name, whole), p in zip(wanted.named_parameters(), model.parameters(), strict=model is policy):
            if name != "head.weight" or model is not reward_model:
                parts = whole.chunk(share)
                mine = parts[share - 1] if len(parts) == share else whole[:0]
                assert p.shape == whole.shape and p.requires_grad == (model is not ref) and torch.equal(p.to_local(), mine), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OF_FAMILY)
def test_a_new_model_is_the_same_in_slices(family, dtype):
    """new_model draws what GPT(config) draws, and leaves the generator where it does, but never holds more than the slices, one tensor and
    what init_weights makes of it. The oracle is the constructor."""
    config = GPTConfig.tiny(97, family=family, n_layer=6, n_embd=48, n_head=4, ffn_dim=96, max_len=64, tied=family != "gpt_neox",
                            **OF_FAMILY[family])
    torch.manual_seed(0)
    wanted, after = GPT(config).to(dtype), torch.rand(3)
    torch.manual_seed(0)
    whole, then = new_model(config, dtype=dtype), torch.rand(3)
    assert torch.equal(then, after) and (whole.head.weight is whole.tok_embed.weight) == config.tied
    with one_of_four(), Allocations() as counted:
        torch.manual_seed(0)
        mine = new_model(config, dtype=dtype, place=parallel.slicing("fsdp", torch.device("cpu")))
        assert torch.equal(torch.rand(3), after)
        parallel.shard(mine, "fsdp", "cpu", dtype)
    most, total = max(p.numel() for p in wanted.parameters()), sum(p.numel() for p in wanted.parameters())
    assert counted.peak <= dtype.itemsize * total / 4 + 4 * 2 * most
    for (name, p), own, part in zip(wanted.named_parameters(), whole.parameters(), mine.parameters(), strict=True):
        parts = p.chunk(4)
        assert own.requires_grad and part.requires_grad and own.dtype == part.dtype == dtype
        assert torch.equal(own, p) and torch.equal(part.to_local(), parts[3] if len(parts) == 4 else p[:0]), name


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_what_is_shared_out_is_computed_once(monkeypatch, world):
    """By one process each, with the results in order in all; an error in one is raised in all."""
    monkeypatch.setattr(parallel, "world", lambda: world)

    def run(function, items):
        sent, results = [], []
        monkeypatch.setattr(parallel, "gather", lambda value: sent.append(value) or [([], None)] * world)
        for rank in range(world):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            with contextlib.suppress(IndexError):
                parallel.share_out(function, items)
        monkeypatch.setattr(parallel, "gather", lambda value: sent)
        for rank in range(world):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            results.append(parallel.share_out(lambda item: None, items))
        return results

    for n in (0, 1, 5, 24):
        calls = []
        assert run(lambda i, calls=calls: calls.append(i) or i * i, range(n)) == [[i * i for i in range(n)]] * world
        assert sorted(calls) == list(range(n))
    with pytest.raises(ZeroDivisionError) as caught:
        run(lambda i: 1 // (i - 4), range(5))
    assert caught.value.in_all


@pytest.mark.slow
def test_a_bad_row_is_one_sentence_and_a_good_file_is_encoded_once(small, tmp_path, monkeypatch):
    """Two processes: the first one's error ends both with code 2, and nothing is left of the rows in the temporary folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "ask for tea: ", "completion": "tea"}\n{"prompt": 3, "completion": "x"}\n')
    _, cfg = small("sft", demos=str(tmp_path / "bad.jsonl"))
    done = torchrun(2, "-m", "minialign", "sft", *flags(cfg), timeout=600)
    assert done.returncode != 0 and done.stderr.count("bad.jsonl:2: 'prompt' must be text") == 1, done.stderr[-3000:]
    assert "exitcode  : 2" in done.stderr
    done = torchrun(2, "-m", "minialign", "sft", *flags(small("sft", steps=1)[1]), timeout=600)
    assert done.returncode == 0 and not list((tmp_path / "temporary").glob("minialign-rows-*")), done.stderr[-3000:]


def launch_two_machines(port, folders, arguments):
    """Two launches of torchrun, as on two machines with one process each, in two working folders."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "7", "-m", "minialign", *arguments]
    return [subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for folder in folders]


def free_port():
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


@pytest.mark.slow
def test_two_machines(small, tmp_path):
    """Without a shared folder: exit code 2 and one sentence on each machine, before anything is loaded. With one --out for both they train,
    both are killed, and one process resumes the run."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    module, cfg = small("sft", steps=150, save_every=4, eval_every=100)
    alone = [word for word in flags(cfg) if word not in ("--out", cfg.out)]
    for process in launch_two_machines(free_port(), folders, ["sft", *alone]):
        said, errors = process.communicate(timeout=600)
        assert process.returncode != 0 and "exitcode  : 2" in errors and "parameters" not in said
        assert errors.count("process 1 does not see what process 0 has written there; all machines need one shared folder") == 1
    running = launch_two_machines(free_port(), folders, ["sft", *flags(cfg)])
    metrics, deadline = Path(cfg.out) / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 10):
        assert all(process.poll() is None for process in running) and time.monotonic() < deadline, running[0].communicate()[1][-3000:]
        time.sleep(0.05)
    for process in running:
        for worker in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
            os.kill(int(worker), signal.SIGKILL)
    for process in running:
        process.communicate(timeout=600)
    resumed = module.main(module.Config(resume=cfg.out))
    unbroken = module.main(module.Config(**vars(cfg) | {"out": str(tmp_path / "alone")}))
    compare(unbroken, resumed, 1e-8)


def test_passes_over_held_out_rows_are_shared(monkeypatch):
    """Each process makes as many passes as the others, of at most its part of a batch or a micro-batch; each row has weight 1 in all."""
    for world in (1, 2, 3, 8):
        monkeypatch.setattr(parallel, "world", lambda world=world: world)
        for n in (0, 1, 5, 24):
            for micro_batch, most in ((0, -(-8 // world)), (1, 1), (64, -(-8 // world))):
                passes, weights = [], [0] * n
                for rank in range(world):
                    monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
                    cfg = SimpleNamespace(batch_size=8, micro_batch=micro_batch, eval_batch=0)
                    passes.append([*common.held_out_passes([([1], [2] * i) for i in range(n)], cfg)])
                    for rows, weight in passes[-1]:
                        assert 0 < len(rows) <= most
                        for i in rows:
                            weights[i] += weight
                assert weights == [1] * n and len(set(map(len, passes))) == 1


def test_rows_that_do_not_divide_evenly_are_computed_once_or_twice(monkeypatch):
    """5 rows in 8 processes: one each, the first three again. The parts, put together, are the squares of 0 to 4."""
    world, parts = 8, []
    monkeypatch.setattr(parallel, "world", lambda: world)
    monkeypatch.setattr(parallel, "gather_rows", lambda part: parts.append(part) or part)
    for rank in range(world):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        common.in_micro(lambda micro: torch.tensor([i * i for i in micro]), range(5), 2)
    assert torch.cat(parts)[:5].tolist() == [0, 1, 4, 9, 16] and [len(part) for part in parts] == [1] * world


def test_shares_cover_all_rows_once(monkeypatch):
    for world in (1, 2, 3, 8):
        for n in (0, 1, 7, 8, 24):
            shares = []
            for rank in range(world):
                monkeypatch.setattr(parallel, "world", lambda world=world: world)
                monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
                shares.append(parallel.local_rows(list(range(n))))
            assert sum(shares, []) == list(range(n)) and max(map(len, shares)) - min(map(len, shares)) <= 1
            assert n % world or len(set(map(len, shares))) == 1
