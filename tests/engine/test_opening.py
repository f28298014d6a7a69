"""The base model of the built-in task: made once, by a process of its own, and never noticed by the run that needed it. New run folders.
The optimizers of --optimizer against formulas by hand, and --compile against the model as it is."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minialign.batch import collate
from minialign.engine import opening, run
from minialign.engine.common import BadInput, read_rows
from minialign.engine.opening import open_optimizer, set_passes
from minialign.engine.tracking import TIMED
from minialign.logps import token_logps
from minialign.lora import frozen_copy, inject, load_model, merged
from minialign.methods import sft
from minialign.model import GPT, GPTConfig, KVCache
from minialign.weights import load_pretrained
from tests.processes import run_all

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick_base(monkeypatch, tmp_path):
    """In an empty folder, with a base model of two steps."""
    monkeypatch.setattr(opening, "BASE", opening.BASE.replace("--steps 500", "--steps 2"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_generator_of_the_run_does_not_notice(quick_base, capsys):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    folder = opening.builtin_base()
    assert torch.equal(before, torch.get_rng_state()) and "needs its base model once" in capsys.readouterr().out
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert opening.builtin_base() == folder and capsys.readouterr().out == ""  # the second time it is there
    assert (folder / "config.json").stat().st_mtime_ns == stamp


def test_a_first_run_is_the_run_that_finds_the_base(quick_base, small):
    """Adapters start from torch's generator: with the base trained first, or found, the same numbers come."""
    from minialign.methods import sft

    logged = []
    for out in ("first", "second"):
        cfg = sft.Config(steps=2, lora=4, device="cpu", save_every=9, eval_every=9, max_new=4, out=out)
        folder = sft.main(cfg)
        model, _, base = load_model(folder / "adapter")  # it names a folder that is there, not the word "builtin"
        final = load_pretrained(folder / "final")
        assert base == str(opening.builtin_base())
        assert all(torch.equal(p, q) for p, q in zip(merged(model).parameters(), final.parameters(), strict=True))
        logged.append([line.split('"seconds"')[0] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert logged[0] == logged[1]


@pytest.mark.slow
def test_two_processes_train_one_base(quick_base):
    """Both ask at the same time: one trains, the other waits for it; what a killed process left half-made is swept."""
    leftover = quick_base / "builtin-base.tmp-1"
    leftover.mkdir(parents=True)
    (quick_base / "builtin-base").mkdir()  # made by an older version and never finished
    program = "from minialign.engine import opening; opening.BASE = %r; print(opening.builtin_base())" % opening.BASE
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("training it" in text for text in said) == 1 and all(text.strip().endswith("final") for text in said)
    assert sorted(path.name for path in quick_base.iterdir()) == ["builtin-base", "builtin-base.lock"]


def test_a_base_that_cannot_be_trained_is_one_sentence(quick_base, monkeypatch):
    monkeypatch.setattr(opening, "BASE", opening.BASE + " --steps 0")
    with pytest.raises(BadInput, match="the base model of the built-in task could not be trained .*--steps 0"):
        opening.builtin_base()


def test_two_runs_in_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = time.strftime("%Y%m%d-%H%M%S")
    monkeypatch.setattr(run.time, "strftime", lambda form: now)
    assert [str(run.new_folder("sft")) for _ in range(3)] == [f"runs/sft-{now}{end}" for end in ("", "~2", "~3")]
    assert len(list((tmp_path / "runs").iterdir())) == 3  # made, not only named


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="cannot be written"):
        run.new_folder("sft")


# ------------------------------------------------------------------------------------------------------------- optimizers


def steps_of(optimizer, model, gradients):
    """The weight (1, 3) after each step with the given gradients, float64."""
    found = []
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimizer.step()
        found.append(model.weight.detach().clone())
    return found


def test_optimizers_are_the_formulas():
    """AdamW with betas .9 and .95 and decoupled decay; RMSprop with alpha .99 and the decay in the gradient. Float64, by hand."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(5, 1, 3, generator=generator, dtype=torch.float64)
    for kind, lr in (("adamw", None), ("rmsprop", None), ("adamw", 0.5)):
        model = torch.nn.Linear(3, 1, bias=False).double()
        model.weight.data.copy_(start)
        cfg = sft.Config(optimizer=kind, lr=0.1, weight_decay=0.3)
        found = steps_of(open_optimizer(cfg, model, lr=lr), model, gradients)
        w, m, v, rate = start, 0, 0, lr or 0.1
        for t, (g, one) in enumerate(zip(gradients, found, strict=True), start=1):
            if kind == "adamw":
                m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
                w = w - rate * 0.3 * w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            else:
                g = g + 0.3 * w
                v = 0.99 * v + 0.01 * g**2
                w = w - rate * g / (v.sqrt() + 1e-8)
            assert (one - w).abs().max() < 1e-12


def test_an_optimizer_of_two_models_has_both_and_its_own_rate():
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    optimizer = open_optimizer(sft.Config(), one, None, two, lr=0.25)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4] and optimizer.param_groups[0]["lr"] == 0.25


def stopped_and_resumed(small, monkeypatch, method="sft", **changes):
    """(folder of an unbroken run, folder of one that failed after step 5 and was resumed from step 4)."""
    module, cfg = small(method, **changes)
    whole = module.main(cfg)
    module, cfg = small(method, **changes)
    log = run.Run.log
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "log", lambda self, step, **metrics: log(self, step, **metrics) or 1 / (step - 4))
        with pytest.raises(ZeroDivisionError):
            module.main(cfg)
    return whole, module.main(module.Config(resume=cfg.out))


def logged(folder):
    return [{name: value for name, value in row.items() if name not in TIMED} for row in read_rows(folder / "metrics.jsonl")]


def assert_same_bits(one, other):
    assert logged(one) == logged(other) and len(logged(one)) == 6
    for file in ("final/model.safetensors", "checkpoints/step_000006/optim.safetensors"):
        left, right = load_file(one / file), load_file(other / file)
        assert left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("method", ["sft", *[pytest.param(method, marks=pytest.mark.slow) for method in ("ppo", "irl")]])
def test_rmsprop_resumes_bit_for_bit(small, monkeypatch, method):
    """sft, ppo with its critic, irl with its reward."""
    whole, resumed = stopped_and_resumed(small, monkeypatch, method, optimizer="rmsprop", dtype="float32")
    assert_same_bits(whole, resumed)
    moments = {name.split(".")[-1] for name in load_file(whole / "checkpoints/step_000006/optim.safetensors")}
    assert moments == {"step", "square_avg"}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_adamw8bit_is_adamw_to_the_precision_of_its_moments_and_resumes_bit_for_bit(small, monkeypatch, wide_folder, dtype):
    pytest.importorskip("torchao", reason="torchao is not installed")
    same = dict(policy=str(wide_folder), dtype=dtype, lr=1e-3)
    whole, resumed = stopped_and_resumed(small, monkeypatch, optimizer="adamw8bit", **same)
    assert_same_bits(whole, resumed)
    stored = load_file(whole / "checkpoints/step_000006/optim.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith(".codes")} == {torch.uint8}
    module, cfg = small("sft", **same)
    expected = logged(module.main(cfg))
    for row, other in zip(logged(whole), expected, strict=True):
        assert row["lr"] == other["lr"] and row["loss"] == pytest.approx(other["loss"], rel=0.01)


@pytest.fixture
def wide_folder(policy_folder, tmp_path):
    """A model with matrices of at least 4,096 numbers, whose moments torchao keeps in bytes."""
    from minialign.task import builtin_tokenizer
    from minialign.weights import save_pretrained

    tokenizer = builtin_tokenizer()
    torch.manual_seed(0)
    save_pretrained(GPT(GPTConfig.tiny(tokenizer.vocab_size, n_layer=1, max_len=128)), tmp_path / "wide", tokenizer)
    return tmp_path / "wide"


def test_rounding_at_random_moves_every_weight_on_average():
    """The note about bfloat16 weights that do not move is for optimizers that round to the nearest."""
    w = torch.nn.Parameter(torch.full((256,), 3.0, dtype=torch.bfloat16))
    nearest = torch.optim.AdamW([w], lr=1e-6)
    assert run.unmoved([nearest]) == 1.0
    nearest.bf16_stochastic_round = True
    assert run.unmoved([nearest]) == 0.0


def test_adamw8bit_is_refused_where_weights_are_sliced(small, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(run, "check_compiler", lambda cfg, device: None)
    module, cfg = small("sft", optimizer="adamw8bit", dtype="mixed", policy="no/such/folder")
    with pytest.raises(BadInput, match="--optimizer adamw8bit: .* and with --dtype mixed use adamw"):
        module.main(cfg)


# ---------------------------------------------------------------------------------------------------------------- compile


def test_a_machine_that_cannot_compile_is_refused(small, monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler found\nlong text")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: object())
    for changes, flag in (({"compile": True}, "--compile"), ({"optimizer": "adamw8bit"}, "--optimizer adamw8bit")):
        module, cfg = small("sft", policy="no/such/folder", **changes)
        with pytest.raises(BadInput, match=rf"^{flag}: torch.compile does not work here \(no C\+\+ compiler found\); install [^\n]*$"):
            module.main(cfg)


def test_compiled_blocks_follow_copies_and_keep_their_names(monkeypatch):
    """A copy's blocks are its own: changing the original does not reach it. With a cache the plain forward pass runs."""
    calls = []
    monkeypatch.setattr(opening, "compiled_block", lambda: lambda block, *args: calls.append(block) or opening.Block.forward(block, *args))
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny(11, n_embd=16, n_head=2, ffn_dim=32, max_len=32))
    names, inputs = list(model.state_dict()), torch.tensor([[1, 2, 3]])
    plain = model(inputs)
    set_passes(model, sft.Config(compile=True))
    copy = frozen_copy(model)
    assert list(model.state_dict()) == names and torch.equal(model(inputs), plain) and calls == list(model.blocks)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.zero_()
    calls.clear()
    assert torch.equal(copy(inputs), plain) and calls == list(copy.blocks)
    calls.clear()
    model(inputs, cache=KVCache(model.config, 1, 8))
    assert not calls


def test_a_new_policy_has_both_settings_too(small, monkeypatch):
    monkeypatch.setattr(run, "check_compiler", lambda cfg, device: None)
    module, cfg = small("sft", policy="new", activation_checkpointing=True, compile=True, steps=1)
    policy, *_ = sft.open_policy_and_rows(run.Run("sft", cfg))
    assert policy.recompute and all("forward" in vars(block) for block in policy.blocks)


@pytest.mark.parametrize(("dtype", "tolerance", "changes", "rank", "recompute"), [
    pytest.param(torch.float64, 1e-10, {"n_kv_head": 1, "windows": (3, None)}, 0, False, marks=pytest.mark.slow),
    pytest.param(torch.float32, 1e-5, {}, 2, True, marks=pytest.mark.long)])
def test_compiled_logits_and_gradients_are_the_plain_ones(dtype, tolerance, changes, rank, recompute):
    """Rows of several lengths, and one row. Grouped keys and windows in float64; adapters and recomputed activations in float32."""
    torch.manual_seed(0)
    plain, compiled = [GPT(GPTConfig.tiny(31, n_embd=16, n_head=2, ffn_dim=32, max_len=64, **changes)).to(dtype) for _ in range(2)]
    compiled.load_state_dict(plain.state_dict())
    set_passes(compiled, sft.Config(compile=True))
    for model in (plain, compiled):
        model.recompute = recompute
        if rank:
            torch.manual_seed(1)
            inject(model, rank)
    for lengths in ([5, 3], [9, 2, 4], [7]):
        batch = collate([[1]] * len(lengths), [list(range(2, 2 + n)) for n in lengths], pad_id=0)
        for model in (plain, compiled):
            model.zero_grad()
            token_logps(model, batch).sum().backward()
        for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert p.grad is q.grad is None or (p.grad - q.grad).abs().max() <= tolerance
        with torch.no_grad():
            assert (plain(batch.inputs) - compiled(batch.inputs)).abs().max() <= tolerance


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one(small, monkeypatch):
    """dpo with a frozen reference: every metric and weight to rounding; resumed in one process it is bit for bit itself."""
    whole, resumed = stopped_and_resumed(small, monkeypatch, "dpo", compile=True)
    assert_same_bits(whole, resumed)
    module, cfg = small("dpo")
    plain = module.main(cfg)
    for row, other in zip(logged(whole), logged(plain), strict=True):
        assert all(row[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9) for name in row.keys() - {"rewards/accuracies"})
    left, right = (load_file(folder / "final" / "model.safetensors") for folder in (whole, plain))
    assert left.keys() == right.keys() and all((left[name] - right[name]).abs().max() < 1e-9 for name in left)
    assert isinstance(load_pretrained(whole / "final"), GPT)


@pytest.mark.parametrize("changes", [
    pytest.param({"compile": True, "lora": 2, "activation_checkpointing": True}, marks=pytest.mark.long),
    pytest.param({"optimizer": "rmsprop"}, marks=pytest.mark.slow)])
def test_two_processes_are_one_with_compile_and_rmsprop(small, tmp_path, changes):
    module, cfg = small("dpo", **changes)
    alone = module.main(cfg)
    _, cfg = small("dpo", **changes)
    result = run_all(2, [(module, cfg)], tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for row, other in zip(logged(alone), logged(Path(cfg.out)), strict=True):
        assert all(row[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9) for name in row.keys() - {"rewards/accuracies",
                                                                                                        "eval/accuracy"})
