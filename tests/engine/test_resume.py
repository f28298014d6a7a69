"""Exact resume, for every method: bitwise equal losses, metrics, samples, weights and optimizer, wherever the run was cut."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minialign.engine import run
from minialign.engine.common import BadInput, read_rows
from minialign.engine.tracking import TIMED
from minialign.methods import rloo
from minialign.methods.rft import plan_turns
from tests.conftest import EACH_LOOP, LEARNING, LOOPS, METHODS
from tests.killing import in_child, result_of

ROOT = Path(__file__).parents[2]
ROUNDS = {"rounds": 3, "reward_share": 0.45}  # of 11 steps RRpp RRpp Rpp, of 9 Rpp Rpp Rpp: R trains the reward, p the policy
EXTRA = {"irft": {"rounds": 3},  # so that a cut falls inside a round as well as between two
         **dict.fromkeys(LEARNING, ROUNDS),  # and between the two parts of a round
         "best_of_n": {"rounds": 3, "n": 3}, "rest": {"grows": 2, "n": 4, "grow_prompts": 6, "quantiles": [0.2, 0.6]},
         "rloo": {"epochs": 2}, "grpo": {"epochs": 2}}  # so that old log-probs matter


@pytest.mark.parametrize("method", EACH_LOOP)
@pytest.mark.parametrize("micro_batch", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_sigterm_then_resume_is_bitwise(small, method, micro_batch, monkeypatch):
    """SIGTERM during steps 1, 4, 5 and 9 of 11 in turn (in epoch 0 and in later ones; not on save_every): each time the run saves after
    the step and exits with 0; the four pieces and the rest equal the unbroken run."""
    settings = dict(steps=11, micro_batch=micro_batch, **EXTRA.get(method, {}))
    module, cfg = small(method, **settings)
    expected = result_of(module.main(cfg))
    module, cfg = small(method, **settings)
    original = run.Run.log
    for stop_at in (1, 4, 5, 9):

        def log(self, step, stop_at=stop_at, **metrics):
            original(self, step, **metrics)
            if step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(run.Run, "log", log)
        with pytest.raises(SystemExit) as stop:
            module.main(cfg)
        assert stop.value.code == 0
        assert (Path(cfg.out or cfg.resume) / "checkpoints" / f"step_{stop_at:06d}").is_dir()
        cfg = module.Config(resume=cfg.out or cfg.resume)
    monkeypatch.setattr(run.Run, "log", original)
    assert result_of(module.main(cfg)) == expected


@pytest.mark.parametrize("method", EACH_LOOP)
def test_dying_in_the_middle_of_accumulation(small, method, monkeypatch):
    """An end without warning between two micro-batches, in epoch 1: the half-summed gradient is lost, the step is done again."""
    dies_and_goes_on(small, method, monkeypatch, step=5)


@pytest.mark.parametrize("method", [pytest.param("rft", marks=pytest.mark.slow), "irl"])
def test_dying_in_the_reward_step_that_begins_a_round(small, method, monkeypatch):
    """The same in the second round's first step: reward, base and anchor are those of the checkpoint, and the round begins again."""
    dies_and_goes_on(small, method, monkeypatch, step=4)


@pytest.mark.parametrize("method", [pytest.param(method, marks=[pytest.mark.slow] * (method not in ("sft", "ppo"))) for method in METHODS])
def test_dying_in_an_evaluation(small, method, monkeypatch):
    """Out of memory in the first evaluation (before save_every), in a later one, in the last one, and while its samples are written: the
    step before each is in a checkpoint, and the resumed run begins with the evaluation that is missing."""
    settings = dict(steps=9, eval_every=2, save_every=4, snapshots=True, held_out=0.3, **EXTRA.get(method, {}))
    module, cfg = small(method, **settings)
    expected = result_of(module.main(cfg))
    expected_samples = read_rows(Path(cfg.out) / "samples.jsonl")
    module, cfg = small(method, **settings)
    folder, original, samples = cfg.out, run.Run.finish_evaluation, run.Run.log_samples
    for dies_at, dying in ((2, "measure"), (4, "measure"), *[(4, "samples")] * (method != "reward_model"), (9, "measure")):

        def finish(self, dies_at=dies_at, dying=dying):
            if self.unlogged and self.unlogged[0] + 1 == dies_at and dying == "measure":
                raise MemoryError("out of memory")
            original(self)

        def log_samples(self, step, *more, dies_at=dies_at, dying=dying):
            samples(self, step, *more)
            if step + 1 == dies_at and dying == "samples":
                raise MemoryError("out of memory")

        monkeypatch.setattr(run.Run, "finish_evaluation", finish)
        monkeypatch.setattr(run.Run, "log_samples", log_samples)
        with pytest.raises(MemoryError):
            module.main(cfg)
        assert (Path(folder) / "checkpoints" / f"step_{dies_at:06d}").is_dir()
        cfg = module.Config(resume=folder)
    monkeypatch.undo()
    assert result_of(module.main(cfg)) == expected and read_rows(Path(folder) / "samples.jsonl") == expected_samples


def test_a_resumed_run_may_evaluate_in_smaller_passes(small, monkeypatch, capsys):
    """The way out if an evaluation does not fit in memory: --resume RUN --eval_batch 1. The results are those of the run as it was."""
    from minialign.__main__ import main

    module, cfg = small("sft", steps=4, eval_every=2, held_out=0.3)
    expected = read_rows(module.main(cfg) / "metrics.jsonl")
    module, cfg = small("sft", steps=4, eval_every=2, held_out=0.3)
    original = module.held_out_nll

    def needs_small_passes(policy, rows, batch_of, cfg):
        if cfg.eval_batch != 1:
            raise MemoryError("out of memory")
        return original(policy, rows, batch_of, cfg)

    monkeypatch.setattr(module, "held_out_nll", needs_small_passes)
    with pytest.raises(MemoryError):
        module.main(cfg)
    main(["sft", "--resume", cfg.out, "--eval_batch", "1"])
    for row, wanted in zip(read_rows(Path(cfg.out) / "metrics.jsonl"), expected, strict=True):
        assert {name: row[name] for name in row if name not in TIMED} == {
            name: pytest.approx(wanted[name], abs=1e-12) for name in wanted if name not in TIMED}


def dies_and_goes_on(small, method, monkeypatch, step):
    settings = dict(steps=9, micro_batch=2, save_every=3, **EXTRA.get(method, {}))
    module, cfg = small(method, **settings)
    expected = result_of(module.main(cfg))
    module, cfg = small(method, **settings)
    calls = []

    def dying(original):
        def dies(*args, **kwargs):
            calls.append(1)
            if len(calls) == 4 * (step - 1) + 3:  # four micro-batches a step: the third of this one
                raise MemoryError("the machine went away")
            return original(*args, **kwargs)

        return dies

    with monkeypatch.context() as patch:
        for trained in [module, rloo] if method in LEARNING else [module]:  # rloo's step is their policy step
            patch.setattr(trained, "step", dying(trained.step))
        with pytest.raises(MemoryError):
            module.main(cfg)
    assert result_of(module.main(module.Config(resume=cfg.out))) == expected


@pytest.mark.parametrize(("method", "changes"), [
    ("irl", {}),  # accumulate, current: base and anchor move
    *[pytest.param(method, changes, marks=pytest.mark.slow) for method, changes in [
        ("irl", {"mode": "literal"}), ("irl", {"mode": "linear", "policy_step": "ppo"}), ("irl", {"policy_step": "bon_dpo", "n": 4}),
        ("rft", {}), ("rft", {"policy_step": "ppo", "loss": "bt"}),
    ]],
])
def test_a_cut_after_each_step_of_a_run_in_rounds(small, monkeypatch, method, changes):
    """RRpp RRpp Rpp, stopped after every step in turn: inside the reward part, between the parts, inside the policy part, between rounds.
    Eleven pieces equal the unbroken run bit for bit, the exported reward included."""
    settings = dict(steps=11, eval_every=100, save_every=100, **ROUNDS, **changes)
    module, cfg = small(method, **settings)
    plan = [(t, of_reward) for t, of_reward, _ in plan_turns(cfg)[0]]
    assert [t for t, _ in plan] == [0] * 4 + [1] * 4 + [2] * 3 and "".join("pR"[r] for _, r in plan) == "RRppRRppRpp"
    expected = result_of(module.main(cfg))
    module, cfg = small(method, **settings)
    original = run.Run.log

    def log(self, step, **metrics):
        original(self, step, **metrics)
        if step + 1 < 11:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run.Run, "log", log)
    for _ in range(10):
        with pytest.raises(SystemExit):
            module.main(cfg)
        cfg = module.Config(resume=cfg.out or cfg.resume)
    assert result_of(module.main(cfg)) == expected


def killed(method, trials, folder, settings, how="run"):
    command = [sys.executable, "-m", "tests.killing", how, method, str(trials), str(folder), json.dumps(settings)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check(outcomes, trials):
    assert len(outcomes) == trials and all(equal for *_, equal in outcomes), outcomes
    assert sum(begun for _, begun, _, _ in outcomes) >= trials // 2  # most kills met a run that had written something
    assert sum(kills for _, _, kills, _ in outcomes) >= trials
    assert len({saved for saved, *_ in outcomes}) >= min(trials, 14) // 3  # at different steps of the 14


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("method", "trials"), [
    ("sft", 3),
    *[pytest.param(method, 4 if method in LOOPS else 2, marks=pytest.mark.slow) for method in METHODS if method != "sft"],
    *[pytest.param(method, 20, marks=pytest.mark.long) for method in ("irft", "reward_model", "ppo")],
    pytest.param("sft", 80, marks=pytest.mark.long),
])
def test_kill_9_at_random_moments(small, tmp_path, record_property, method, trials):
    """SIGKILL at moments spread over the whole run, which saves at every step so that many fall into a write; some runs are
    killed again while they resume. Every one ends bitwise equal to the unbroken run."""
    _, cfg = small(method, steps=14, save_every=1, eval_every=5, micro_batch=3, **EXTRA.get(method, {}))
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out", "resume")}
    outcomes = killed(method, trials, tmp_path / "kills", settings)
    check(outcomes, trials)
    record_property("tried", sum(kills for _, _, kills, _ in outcomes))


@pytest.mark.long
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_ten_thousand_steps(small, tmp_path, record_property):
    """Memory and open files are the same at the end as at step 1,000. Killed ten times, the run ends as the unbroken one."""
    _, cfg = small("sft", steps=10_000, save_every=50, eval_every=500, log_every=1000)
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out", "resume")}
    found = killed("sft", 10, tmp_path / "soak", settings, how="soak")
    assert found["equal"] and found["kills"] >= 5
    steps, memory, files = zip(*found["measured"], strict=True)
    assert steps == tuple(range(500, 10_001, 500)) and max(memory) < 1.05 * memory[1] and len({*files}) == 1, found
    record_property("tried", 10_000)
    record_property("kills", found["kills"])
    record_property("megabytes", max(memory))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("method", ["sft", *[pytest.param(method, marks=pytest.mark.slow if method in LOOPS else pytest.mark.long)
                                            for method in METHODS if method != "sft"]])
def test_sigterm_at_random_moments(small, tmp_path, record_property, method):
    """In the middle of steps, of sampling, of rewards, of evaluations. The run ends with code 0 and a checkpoint, and a resumed run ends
    bitwise as the unbroken one."""
    _, cfg = small(method, steps=14, save_every=5, eval_every=3, micro_batch=3, **EXTRA.get(method, {}))
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out", "resume")}
    outcomes = killed(method, 6, tmp_path / "stops", settings, how="stop")
    assert all(equal for _, equal in outcomes) and sum(stopped for stopped, _ in outcomes) >= 2, outcomes
    record_property("tried", len(outcomes))


SLOW = """import os, time


def f(prompts, completions):
    if os.environ.get("SLOW") == str(len(prompts)):
        os.kill(os.getpid(), 15)
        time.sleep(8)
    return [float(len(c)) for c in completions]
"""
CATCHES = SLOW.replace("        os.kill(os.getpid(), 15)\n        time.sleep(8)", "        try:\n            os.kill(os.getpid(), 15)\n"
                       "            time.sleep(8)\n        except:\n            return [0.0] * len(prompts)")
DRAWS = SLOW.replace("    if os", "    import torch\n    torch.rand(7)\n    if os")
DRAWS = DRAWS.replace("float(len(c))", "len(c) + float(torch.rand(1))")


@pytest.mark.parametrize("where", ["reward", "evaluation"])
@pytest.mark.parametrize("code", [SLOW, CATCHES, DRAWS], ids=["slow", "catches everything", "draws random numbers"])
def test_a_signal_does_not_wait_for_a_slow_reward(small, tmp_path, where, code):
    """A reward of 8 s. The step, or the evaluation, is given up at once, and done again when the run is resumed, with the same random
    numbers and without what the reward returned when it was interrupted."""
    (tmp_path / "slow.py").write_text(code)
    settings = dict(steps=4, save_every=100, eval_every=2, group_size=4, reward=[f"{tmp_path / 'slow.py'}:f"], held_out=0.2)
    module, cfg = small("rloo", **settings)
    expected = result_of(module.main(cfg))
    module, cfg = small("rloo", **settings)
    held_out = len(Path(cfg.prompts).read_text().splitlines()) // 5
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setenv("SLOW", str(8 if where == "reward" else held_out))
        module.main(cfg)
    assert stop.value.code == 0 and time.monotonic() - began < 6
    assert result_of(module.main(module.Config(resume=cfg.out))) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_mixed_run_finishes_its_step_before_it_stops(small, tmp_path, monkeypatch):
    """Its float32 weights are whole only between steps. The signal of step 1's reward leaves a checkpoint of step 1, not of step 0."""
    (tmp_path / "slow.py").write_text(SLOW.replace("sleep(8)", "sleep(0.1)"))
    settings = dict(steps=3, save_every=100, eval_every=100, group_size=4, dtype="mixed", reward=[f"{tmp_path / 'slow.py'}:f"])
    module, cfg = small("rloo", **settings)
    in_child(lambda: module.main(cfg))
    whole = result_of(cfg.out)
    module, cfg = small("rloo", **settings)
    monkeypatch.setenv("SLOW", "8")
    in_child(lambda: module.main(cfg))
    assert [path.name for path in (Path(cfg.out) / "checkpoints").iterdir()] == ["step_000001"]
    monkeypatch.delenv("SLOW")
    in_child(lambda: module.main(module.Config(resume=cfg.out)))
    assert result_of(cfg.out) == whole


WORKERS = """import multiprocessing


def length(text):
    return float(len(text))


def f(prompts, completions):
    with multiprocessing.get_context("fork").Pool(2) as pool:  # which ends its workers by SIGTERM
        return pool.map(length, completions)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_signal_to_a_process_that_a_reward_has_forked_is_not_ours(small, tmp_path, capfd):
    (tmp_path / "pool.py").write_text(WORKERS)
    module, cfg = small("rloo", steps=3, save_every=100, group_size=4, reward=[f"{tmp_path / 'pool.py'}:f"])
    folder = module.main(cfg)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000003"]
    assert "stopped after" not in capfd.readouterr().out


def test_resume_with_a_learned_reward_and_a_critic_made_of_it(small, monkeypatch):
    """PPO whose reward and value model are a reward model's folder, stopped in the middle: bitwise as if it had not been. Afterwards a
    changed reward model is refused."""
    module, cfg = small("reward_model", steps=2)
    reward_model = module.main(cfg) / "final"
    settings = dict(reward=[str(reward_model)], value=str(reward_model))
    ppo, cfg = small("ppo", **settings)
    expected = result_of(ppo.main(cfg))
    ppo, cfg = small("ppo", **settings)
    original = run.Run.log

    def log(self, step, **metrics):
        original(self, step, **metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "log", log)
        with pytest.raises(SystemExit):
            ppo.main(cfg)
    assert result_of(ppo.main(ppo.Config(resume=cfg.out))) == expected
    config = reward_model / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(BadInput, match="has changed since this run began"):
        ppo.main(ppo.Config(resume=cfg.out))


def test_a_run_killed_before_its_first_checkpoint_begins_again(small):
    settings = dict(steps=3, save_every=100)
    module, cfg = small("sft", **settings)
    expected = result_of(module.main(cfg))
    module, cfg = small("sft", **settings)
    original = module.step
    module.step = lambda *args: (_ for _ in ()).throw(MemoryError)
    try:
        with pytest.raises(MemoryError):
            module.main(cfg)
    finally:
        module.step = original
    assert result_of(module.main(module.Config(resume=cfg.out))) == expected


def test_a_finished_run_resumes_to_the_same_end(small):
    module, cfg = small("sft")
    expected = result_of(module.main(cfg))
    assert result_of(module.main(module.Config(resume=cfg.out))) == expected


def test_the_same_seed_twice_is_the_same_run_and_another_is_not(small):
    runs = []
    for seed in (1, 1, 2):
        module, cfg = small("irft", seed=seed)
        runs.append(result_of(module.main(cfg)))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("method", EACH_LOOP)
def test_logging_evaluating_and_saving_do_not_change_the_training(small, method):
    exports = []
    for changes in ({"eval_every": 1, "save_every": 1, "log_every": 1}, {"eval_every": 100, "save_every": 100}):
        module, cfg = small(method, **changes)
        exports.append((module.main(cfg) / "final" / "model.safetensors").read_bytes())
    assert exports[0] == exports[1]


@pytest.mark.parametrize("method", EACH_LOOP)
def test_accumulation_is_invariant(small, method):
    """1×8 = 2×4 = 8×1 (and 3+3+2): the same weights after 6 steps to 1e-10 in float64, the same logged losses."""
    from safetensors.torch import load_file

    weights, losses = [], []
    for micro_batch in (0, 4, 1, 3):
        module, cfg = small(method, micro_batch=micro_batch)
        folder = module.main(cfg)
        weights.append(load_file(folder / "final" / "model.safetensors"))
        losses.append([row["loss"] for row in result_of(folder)["metrics"]])
    for other, other_losses in zip(weights[1:], losses[1:], strict=True):
        assert max(float((weights[0][name] - other[name]).abs().max()) for name in other) < 1e-10
        assert max(abs(a - b) for a, b in zip(losses[0], other_losses, strict=True)) < 1e-10


# ----------------------------------------------------------------------------------------------------------------- refusals


def test_resume_refuses_what_would_not_be_the_same_run(small, demos_file, tmp_path):
    module, cfg = small("sft")
    folder = module.main(cfg)
    irft, _ = small("irft")
    with pytest.raises(BadInput, match="was not made by irft"):
        irft.main(irft.Config(resume=str(folder)))
    with pytest.raises(BadInput, match="drop --steps .*--policy"):
        module.main(module.Config(resume=str(folder), steps=99))
    with pytest.raises(BadInput, match="has no config.json"):
        module.main(module.Config(resume=str(tmp_path / "nowhere")))
    with pytest.raises(BadInput, match="exists and is not empty.*--resume"):
        module.main(cfg)


def test_resume_refuses_changed_data(small, demos_file, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(demos_file.read_bytes())
    module, cfg = small("sft", demos=str(copy))
    folder = module.main(cfg)
    copy.write_bytes(demos_file.read_bytes() + b'{"prompt": "ask for tea: ", "completion": "tea now!"}\n')
    with pytest.raises(BadInput, match="copy.jsonl: has changed since this run began"):
        module.main(module.Config(resume=str(folder)))


def test_resume_refuses_an_edited_configuration(small):
    module, cfg = small("sft")
    folder = module.main(cfg)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"lr": 0.003', '"lr": 0.004'))
    with pytest.raises(BadInput, match="config.json: was edited since this run began"):
        module.main(module.Config(resume=str(folder)))
