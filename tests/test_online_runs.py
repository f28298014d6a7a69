"""Whole runs of the online methods in trouble: a spike in the reward, a reward that dies, inputs that do not fit. Nothing is lost."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minialign.engine.checkpoint import newest_checkpoint
from minialign.engine.common import BadInput, read_rows
from minialign.engine.tracking import TIMED
from minialign.methods import rloo
from tests.conftest import ONLINE, SELECTING


@pytest.fixture
def reward_file(tmp_path):
    """reward_file(body) -> FILE.py:reward of a function of (calls, prompts, completions); calls counts from 1, of training batches only."""

    def make(body):
        path = tmp_path / "rewards.py"
        path.write_text("calls = 0\ndef reward(prompts, completions):\n    global calls\n    calls += len(completions) == 8\n" + body)
        return [f"{path}:reward"]

    return make


SPIKE = "    return [(1e25 if calls == 3 else 1.0) * len(text) for text in completions]\n"


@pytest.mark.parametrize("method", ONLINE)
def test_one_spike_is_one_skipped_step(small, reward_file, method, capsys):
    """A reward of 1e25 in step 3: that step alone is skipped, with all its epochs, and nothing of it stays behind (no baseline, no
    moment of Adam); steps 4 to 6 train. float32, where the square of it is inf."""
    epochs = {} if method == "reinforce" else {"epochs": 4}
    beyond = {"whiten": False} if method == "ppo" else {"normalize": False} if method == "grpo" else {}  # else the spike is divided out
    module, cfg = small(method, reward=reward_file(SPIKE), dtype="float32", **epochs, **beyond)
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1], capsys.readouterr().err
    assert capsys.readouterr().err.count("skipped:") <= 1
    assert all(math.isfinite(row["grad_norm"]) for row in rows[3:])
    assert all(tensor.isfinite().all() for tensor in load_file(Path(cfg.out) / "final" / "model.safetensors").values())
    if method == "reinforce":
        assert rows[4]["baseline"] < 100


@pytest.mark.parametrize("method", [*ONLINE, *SELECTING])
def test_a_reward_that_dies_loses_no_step(small, reward_file, method):
    """It fails from the 5th batch on, with save_every far away: the run ends after three failures, the four good steps are saved, and
    once the reward is mended the run goes on and ends as if nothing had happened."""
    dying = "    if calls >= DEAD:\n        raise RuntimeError('no judge')\n    return [len(text) % 5 for text in completions]\n"
    settings = dict(steps=8, save_every=100, eval_every=100)
    if method == "best_of_n":  # rounds that begin at steps 3, 5 and 7 of 8: among the failures too
        settings |= {"rounds": 4, "n": 1}
    if method == "rest":  # it asks once a Grow step: four of them, of two steps each
        settings |= {"grows": 4, "n": 1, "quantiles": [0.2]}
    dead = {"rest": 3}.get(method, 5)
    module, cfg = small(method, reward=reward_file(dying.replace(">= DEAD", "< 0")), **settings)
    expected = (module.main(cfg) / "final" / "model.safetensors").read_bytes()
    module, cfg = small(method, reward=reward_file(dying.replace("DEAD", str(dead))), **settings)
    with pytest.raises(BadInput, match="3 steps in a row had no rewards, the last step 7: .*no judge.*repeat these steps with --resume"):
        module.main(cfg)
    assert newest_checkpoint(cfg.out).name == "step_000004"
    reward_file(dying.replace(">= DEAD", "< 0"))
    folder = module.main(module.Config(resume=cfg.out, reward=cfg.reward))
    assert (folder / "final" / "model.safetensors").read_bytes() == expected
    assert [row["skipped"] for row in read_rows(folder / "metrics.jsonl")] == [0] * 8


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("method", "changes"), [
    ("grpo", {"group_size": 4}), ("rloo", {"group_size": 4}), ("rloo", {"group_size": 8}), ("rebel", {}),
])
def test_equal_rewards_leave_the_weights_alone(small, reward_file, policy_folder, method, changes, dtype):
    """One reward for all answers and β = 0: nothing is to be learned, and Adam makes a full step of any gradient that is not exactly 0."""
    reward = reward_file("    return [0.7] * len(completions)\n")
    module, cfg = small(method, reward=reward, beta=0.0, steps=3, batch_size=16, dtype=dtype, **changes)
    after = load_file(module.main(cfg) / "final" / "model.safetensors")
    for name, weight in load_file(policy_folder / "model.safetensors").items():
        assert torch.equal(after[name], weight.to(after[name].dtype)), name


def test_a_run_whose_last_step_is_skipped_is_still_saved(small, reward_file):
    body = "    if calls == 6:\n        raise RuntimeError('no judge')\n    return [len(text) % 5 for text in completions]\n"
    module, cfg = small("rloo", reward=reward_file(body), save_every=100)
    module.main(cfg)
    assert newest_checkpoint(cfg.out).name == "step_000006"


@pytest.mark.parametrize("method", ONLINE)
def test_metrics_are_json_whatever_happens(small, reward_file, method):
    """A skipped step logs null, not NaN; equal rewards and completions of one token leave out what would be 0/0."""
    for reward, changes in ((SPIKE, {}), ("    return [1.0] * len(completions)\n", {"beta": 0.0, "max_new": 1})):
        module, cfg = small(method, reward=reward_file(reward), dtype="float32", **changes)
        lines = (module.main(cfg) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
        assert all(value is None or abs(value) < 1e30 for row in rows for value in row.values())


@pytest.mark.parametrize("method", ["reinforce", "rloo", "grpo", "ppo", "ift", "best_of_n", "rest"])
def test_logged_means_do_not_depend_on_the_micro_batch(small, method):
    epochs = {"epochs": 3} if method in ("rloo", "grpo", "ppo") else {}
    logged = []
    for micro_batch in (0, 3):
        module, cfg = small(method, micro_batch=micro_batch, **epochs)
        logged.append(read_rows(module.main(cfg) / "metrics.jsonl"))
    for one, other in zip(*logged, strict=True):
        for name in one.keys() - {*TIMED}:
            assert one[name] == pytest.approx(other[name], abs=1e-8), name


def test_the_sequence_ratio_does_not_overflow():
    """Four tokens, each e^29 times likelier than before, A = 1: clipped to 1.2, gradient 0, not 0·inf."""
    logps = torch.full((1, 4), -1.0, requires_grad=True)
    loss, _ = rloo.rloo_loss(logps, torch.full((1, 4), -30.0), torch.ones(1), torch.ones(1, 4).bool(), eps=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2) and logps.grad.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(("changes", "message"), [
    ({"reward": ["builtin"]}, "--reward builtin scores the built-in task, not .*: name a reward"),
    ({"lr": math.inf}, "--lr inf: must be a finite number"), ({"missing_eos": math.nan}, "--missing_eos nan: must be a finite number"),
    ({"tau": 0.0}, "--tau 0.0: must be above 0"), ({"reward_limit": 0.0}, "--reward_limit 0.0"), ({"beta": -0.1}, "--beta -0.1"),
    ({"max_new": 1000}, "--max_new 1000 it exceeds the policy's context of 128; lower --max_new"),
    ({"max_new": 120}, "exceeds the policy's context of 128; set --max_prompt 8, or a smaller --max_new"),
    ({"reward": ["nonsense"]}, "--reward nonsense: expected builtin, exact_match"),
])
def test_refusals_before_step_1(small, changes, message):
    module, cfg = small("rloo", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)


def test_a_critic_of_another_vocabulary_is_refused(small, tmp_path):
    """The same characters under other ids: every value would be of another text."""
    import shutil

    module, cfg = small("reward_model", steps=1)
    folder = tmp_path / "permuted"
    shutil.copytree(module.main(cfg) / "final", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    module, cfg = small("ppo", value=str(folder))
    with pytest.raises(BadInput, match="--value .*expected a reward model with the policy's own tokens"):
        module.main(cfg)


def test_the_memory_estimate_knows_the_cache_and_the_length(small, policy_folder, capsys):
    """More rows drawn together and longer completions need more, though the micro-batch is one row."""
    from types import SimpleNamespace

    from minialign.engine.look import peak_memory
    from minialign.weights import load_pretrained

    policy, needed = load_pretrained(policy_folder), []
    for batch_size, max_new in ((8, 12), (800, 12), (800, 100)):
        run = SimpleNamespace(cfg=rloo.Config(batch_size=batch_size, micro_batch=1), dtype=torch.float32, device=torch.device("cpu"))
        needed.append(peak_memory(run, {"policy": policy}, 17 + max_new, sampled=batch_size))
    assert needed[0] < needed[1] < needed[2]
    module, cfg = small("reinforce", steps=1)
    module.main(cfg)
    assert " tokens; up to 12 new tokens each; about " in capsys.readouterr().out
