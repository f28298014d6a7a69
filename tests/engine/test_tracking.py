"""Tokens, operations and memory of a step against counts by hand, and what --log writes against metrics.jsonl."""

import importlib.util
import subprocess
import sys
import types

import pytest
import torch

from minialign.batch import collate
from minialign.engine import run, tracking
from minialign.engine.common import BadInput, read_rows
from minialign.logps import token_logps
from minialign.lora import frozen_copy, inject
from minialign.methods import ppo
from minialign.model import GPT, GPTConfig
from minialign.rewards import score
from minialign.sample import sample
from tests.conftest import METHODS
from tests.processes import ROOT


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig.tiny(11, n_embd=16, n_head=2, ffn_dim=32, max_len=32))


BATCH = collate([[1, 2], [3]], [[4, 5, 6], [7, 8]], pad_id=0)  # rows of 5 and 3 tokens: a policy reads 4 + 2, a reward model 5 + 3
N = 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 11 * 16 + 16  # two blocks of q k v o, up gate down and two norms; embedding, last norm


def counted(call):
    tracking.start()
    call()
    return {key: float(tokens) for key, tokens in tracking.stop().items()}


def test_operations_and_tokens_of_every_kind_of_pass(model):
    """6 per parameter and token that trains, 8 if activations are computed again, 4 with adapters, 2 for scoring and sampling."""
    assert sum(p.numel() for p in model.parameters()) == N
    assert counted(lambda: token_logps(model, BATCH)) == {(6 * N, True): 6}
    assert counted(lambda: token_logps(frozen_copy(model), BATCH)) == {(2 * N, False): 6}
    assert counted(lambda: torch.no_grad()(token_logps)(model, BATCH)) == {(2 * N, False): 6}
    reward_model = model.with_scalar_head()
    assert counted(lambda: score(reward_model, BATCH)) == {(6 * (N + 16), True): 8}
    model.recompute = True
    assert counted(lambda: [token_logps(model, BATCH), token_logps(model, BATCH)]) == {(8 * N, True): 12}
    model.recompute = False
    drawn = []
    found = counted(lambda: drawn.append(sample(model, [[1, 2], [1, 2], [3]], max_new=5, n=2, eos_id=0, seed=0)))
    assert found == {(2 * N, True): 2 + 1 + int(drawn[0].lengths.sum())}  # two different prompts
    inject(model, 2)
    size = sum(p.numel() for p in model.parameters())
    assert size > N and counted(lambda: token_logps(model, BATCH)) == {(4 * size, True): 6}


def test_nothing_is_counted_between_steps(model):
    assert tracking.counts is None and tracking.stop() == {}
    token_logps(model, BATCH)
    assert tracking.counts is None


def test_speed_is_tokens_and_operations_over_seconds(model, monkeypatch):
    """3 seconds on a card of 1e6 operations a second: 6 trained tokens, 6 scored ones."""
    monkeypatch.setitem(tracking.PEAKS, "toy card", 1e6)
    monkeypatch.setattr(tracking, "describe_device", lambda device: "toy card")
    clock = iter([10.0, 13.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    tracking.start()
    token_logps(model, BATCH)
    token_logps(frozen_copy(model), BATCH)
    found = tracking.speed(torch.device("cpu"))
    assert found["tokens_per_second"] == 2.0 and found["mfu"] == round((6 * 6 + 2 * 6) * N / 3 / 1e6, 4)
    assert 0.05 < found["memory"] < 100  # GiB of a process that has imported torch


@pytest.mark.skipif(sys.platform == "win32", reason="not known there")
def test_memory_is_the_largest_resident_size():
    """Half a GiB held and given back raises it by half a GiB. What the process holds that started this one does not count: Linux hands that
    on to the child's ru_maxrss."""
    program = """if True:
        import torch
        from minialign.engine.tracking import peak_memory
        print(peak_memory(torch.device("cpu")))
        held = bytearray(b"1") * 2**29
        del held
        print(peak_memory(torch.device("cpu")))"""
    held = bytearray(b"1") * 3 * 2**29
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(float, child.stdout.split())
    assert len(held) / 2**30 > 1.4 > before > 0.05 and after - before == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_no_pass_of_a_method_is_forgotten(small, monkeypatch, method):
    """Within steps GPT.hidden runs without a cache as often as `count` is called for such a pass, with the same model."""
    passes, counts, hidden, count = [], [], GPT.hidden, tracking.count

    def watched(model, inputs, **settings):
        if tracking.counts is not None and settings.get("cache") is None:
            passes.append(id(model))
        return hidden(model, inputs, **settings)

    def counting(model, tokens, **settings):
        if tracking.counts is not None and not settings.get("of_step"):
            counts.append(id(model))
            assert tokens > 0
        count(model, tokens, **settings)

    monkeypatch.setattr(GPT, "hidden", watched)
    monkeypatch.setattr(tracking, "count", counting)
    module, cfg = small(method, steps=2, micro_batch=4)
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert passes == counts and len(passes) >= 2
    assert all(row["tokens_per_second"] > 0 and row["memory"] > 0 and "mfu" not in row for row in rows)


def test_ppo_counts_a_token_once_for_policy_and_critic(small, monkeypatch):
    """A rollout of known lengths, four epochs: each completion is sampled once and trained on four times, the critic's passes are work."""
    seen, original = {}, ppo.credit
    monkeypatch.setattr(ppo, "credit", lambda answers, *rest: seen.update(answers=answers) or original(answers, *rest))
    read = tracking.speed
    monkeypatch.setattr(tracking, "speed", lambda device: seen.update(counts=dict(tracking.counts)) or read(device))
    module, cfg = small("ppo", steps=1, eval_every=9, epochs=4)
    module.main(cfg)
    answers, by_key = seen["answers"], {key: float(n) for key, n in seen["counts"].items()}
    rows = [int(mask.nonzero().max()) + 1 for mask in answers.mask]  # tokens read of each
    prompts = {tuple(ids[: int(mask.nonzero().min()) + 1].tolist()) for ids, mask in zip(answers.inputs, answers.mask, strict=True)}
    trained = [n for (operations, of_step), n in by_key.items() if of_step]
    assert sorted(trained) == sorted([4 * sum(rows), sum(map(len, prompts)) + int(answers.lengths.sum())])
    assert sorted(n for (_, of_step), n in by_key.items() if not of_step) == sorted([sum(rows), 4 * sum(rows), sum(rows)])


def test_a_step_without_rewards_has_no_speed(small, tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("calls = []\ndef reward(prompts, completions):\n    calls.append(1)\n    if len(calls) == 3:\n"
                    "        raise RuntimeError('down')\n    return [1.0] * len(completions)\n")
    module, cfg = small("rloo", steps=4, reward=[f"{file}:reward"])
    module.main(cfg)
    rows = read_rows(f"{cfg.out}/metrics.jsonl")
    assert sorted("tokens_per_second" in row for row in rows) == [False, True, True, True]


# --------------------------------------------------------------------------------------------------------------------- --log


def events(folder):
    """{(name, step): value} that TensorBoard reads from a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {(name, event.step): event.value for name in read.Tags()["scalars"] for event in read.Scalars(name)}


def test_tensorboard_reads_back_metrics_jsonl(small, monkeypatch):
    """Of an unbroken run, and of one that was killed after step 5 and resumed from step 4: no step stands there twice."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    module, cfg = small("sft", log="tensorboard", save_every=4)
    whole = module.main(cfg)
    module, cfg = small("sft", log="tensorboard", save_every=4)
    with monkeypatch.context() as patch:
        log = run.Run.log
        patch.setattr(run.Run, "log", lambda self, step, **metrics: log(self, step, **metrics) or 1 / (step - 4))
        with pytest.raises(ZeroDivisionError):
            module.main(cfg)
    for folder in (whole, module.main(module.Config(resume=cfg.out))):
        rows = read_rows(folder / "metrics.jsonl")
        written = {(name, row["step"]): value for row in rows for name, value in row.items() if name != "step" and value is not None}
        found = events(folder)
        assert len(rows) == 6 and found.keys() == written.keys()
        assert all(found[key] == pytest.approx(value, rel=1e-6) for key, value in written.items())  # TensorBoard keeps float32


class Recorded(types.ModuleType):
    """Stands for the package wandb: keeps what it is told."""

    def __init__(self, fails_at=None):
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.inits, self.rows, self.finished, self.fails_at = [], [], 0, fails_at

    def init(self, **settings):
        self.inits.append(settings)
        return self

    def define_metric(self, *names, **settings):
        assert (names, settings) == (("*",), {"step_metric": "step"})

    def log(self, row):
        if row["step"] == self.fails_at:
            raise ConnectionError("no route to host")
        self.rows.append(dict(row))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_rows_of_metrics_jsonl_and_one_id_for_both_halves(small, monkeypatch):
    wandb = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    module, cfg = small("sft", log="wandb", save_every=4)
    folder = module.main(cfg)
    assert wandb.rows == read_rows(folder / "metrics.jsonl") and wandb.finished == 1
    module.main(module.Config(resume=cfg.out))
    other, cfg = small("sft", log="wandb", steps=1)
    other.main(cfg)
    first, again, another = wandb.inits
    assert first["project"] == "minialign" and first["dir"] == folder and first["config"]["method"] == "sft" and first["resume"] == "allow"
    assert first["id"] == again["id"] != another["id"] and wandb.finished == 3


def test_a_writer_that_fails_later_does_not_end_the_run(small, monkeypatch, capsys):
    wandb = Recorded(fails_at=3)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    module, cfg = small("sft", log="wandb")
    folder = module.main(cfg)
    assert len(read_rows(folder / "metrics.jsonl")) == 6 and [row["step"] for row in wandb.rows] == [1, 2]
    error = capsys.readouterr().err
    assert error.count("--log wandb ends here (no route to host)") == 1


def test_refusals_of_log(small, monkeypatch):
    module, cfg = small("sft", log="wnadb")
    with pytest.raises(BadInput, match="--log wnadb: must be tensorboard or wandb"):
        module.main(cfg)
    wandb = Recorded()
    monkeypatch.setattr(wandb, "init", lambda **settings: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    module, cfg = small("sft", log="wandb")
    with pytest.raises(BadInput, match=r"--log wandb: cannot begin \(division by zero\)"):
        module.main(cfg)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    for flag, value, package in (("log", "wandb", "wandb"), ("log", "tensorboard", "tensorboard"), ("optimizer", "adamw8bit", "torchao")):
        module, cfg = small("sft", **{flag: value}, policy="no/such/folder")
        with pytest.raises(BadInput, match=f"--{flag} {value}: needs the package {package}; install it with: pip install {package}"):
            module.main(cfg)
