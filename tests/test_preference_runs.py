"""Whole runs of the methods that learn from preferences: what is held out, what is logged; --online, where the pairs are the run's own."""

import json
import os
import signal

import pytest
import torch

from minialign.data import encode_pairs, encode_prompts, pair_batch, read_preferences
from minialign.engine import run
from minialign.engine.checkpoint import newest_checkpoint
from minialign.engine.common import BadInput, batch_rows, derive_seed, read_rows
from minialign.engine.tracking import TIMED
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.task import builtin_tokenizer
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained, save_pretrained
from tests.conftest import PREFERRING
from tests.killing import result_of
from tests.preferring import replay, token_logps_alone

BOTH = pytest.mark.parametrize("method", ["dpo", "ipo"])


@pytest.mark.parametrize("method", PREFERRING)
def test_held_out_pairs_are_those_never_trained_on(small, method):
    """eval/loss and eval/accuracy from the last five of twenty pairs, in batches of 2, with ref where the run began."""
    module, cfg = small(method, held_out=0.25, batch_size=2)
    folder = module.main(cfg)
    logged = read_rows(folder / "metrics.jsonl")[-1]
    policy, ref, tokenizer = load_pretrained(folder / "final"), load_pretrained(cfg.policy), load_tokenizer(cfg.policy)
    rows = encode_pairs(tokenizer, read_preferences(cfg.pairs))
    with torch.no_grad():
        loss, stats = module.step(policy, ref, pair_batch(rows, range(15, 20), pad_id=tokenizer.pad_id, max_len=64), cfg)
    assert logged["eval/loss"] == pytest.approx(loss.item(), abs=1e-10)
    assert logged["eval/accuracy"] == pytest.approx(stats["rewards/accuracies"].item(), abs=1e-6)


@pytest.mark.parametrize(("method", "changes"), [
    ("dpo", {}), ("dpo", {"online": True, "reward": ["length:8"]}), ("kto", {}),
    *[pytest.param(method, {}, marks=pytest.mark.slow) for method in PREFERRING if method != "dpo"],  # their loop is dpo's
])
def test_logged_means_do_not_depend_on_the_micro_batch(small, method, changes):
    """Nor do the weights. KTO's means of a kind count its answers, of which a micro-batch of one has none or one."""
    logged, exported = [], []
    for micro_batch in (0, 3, 1):
        module, cfg = small(method, micro_batch=micro_batch, **changes)
        logged.append(read_rows(module.main(cfg) / "metrics.jsonl"))
        exported.append(load_pretrained(f"{cfg.out}/final").head_weight.detach())
    for one, *others in zip(*logged, strict=True):
        for other in others:
            assert one.keys() == other.keys()
            for name in one.keys() - {*TIMED}:
                assert one[name] == pytest.approx(other[name], abs=1e-6 if "accurac" in name else 1e-8), name
    assert all((exported[0] - other).abs().max() < 1e-9 for other in exported[1:])


# --------------------------------------------------------------------------------------------------------------------- online

THINGS = ["tea", "salt", "rope", "ink", "milk", "corn", "oil", "soap", "rice", "wood"]


@pytest.fixture
def online(small, tmp_path):
    """online(method, reward body, **settings) -> (module, Config, asked): ten prompts, all different, with file answers that no policy of a
    few steps writes; asked() is what the reward of FILE.py was asked, [(prompts, completions)], since it began."""
    pairs, told, program = tmp_path / "pairs.jsonl", tmp_path / "told.jsonl", tmp_path / "judge.py"
    rows = [{"prompt": f"ask for {x}: ", "chosen": f"may i have {x}, please.", "rejected": f"give me {x} now!"} for x in THINGS]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(method, body="[-abs(len(text) - 8) / 8 for text in completions]", **settings):
        program.write_text("import json\ncalls = 0\ndef reward(prompts, completions):\n    global calls\n    calls += 1\n"
                           f"    with open({str(told)!r}, 'a') as file:\n        file.write(json.dumps([prompts, completions]) + '\\n')\n"
                           f"    return {body}\n")
        fixed = dict(online=True, pairs=str(pairs), reward=[f"{program}:reward"], batch_size=5, held_out=0.0)
        fixed |= {"beta": 0.3} if method in ("dpo", "ipo", "gpo") else {}
        return *small(method, **{**fixed, **settings}), lambda: [json.loads(line) for line in told.open()] if told.exists() else []

    return make


def online_account(method, cfg, asked):
    """A loss_of_batch for replay: two answers of the present policy to each prompt, labelled by a coin of weight σ(r₁ − r₂)."""
    tokenizer = load_tokenizer(cfg.policy)
    prompts = encode_prompts(tokenizer, [pair.prompt for pair in read_preferences(cfg.pairs)])

    def loss_of_batch(k, picked, policy, ref, rows):
        seed, losses = derive_seed(method, 0, k), []
        answers = sample(policy, [prompts[i][0] for i in picked], max_new=cfg.max_new, tau=cfg.tau, n=2, eos_id=tokenizer.eos_id, seed=seed)
        said = [tokenizer.decode(ids) for ids in answers.completions]
        assert asked[k] == [[prompts[i][1] for i in picked for _ in range(2)], said]
        coins = torch.rand(len(picked), generator=torch.Generator().manual_seed(seed)).tolist()
        for b, i in enumerate(picked):
            first, second = answers.completions[2 * b : 2 * b + 2]
            r = [-abs(len(text) - 8) / 8 for text in said[2 * b : 2 * b + 2]]
            if coins[b] >= 1 / (1 + 2.718281828459045 ** (r[1] - r[0])):
                first, second = second, first
            ratio = [token_logps_alone(policy, y, prompts[i][0]).sum() - token_logps_alone(ref, y, prompts[i][0]).sum().detach()
                     for y in (first, second)]
            delta = ratio[0] - ratio[1]
            losses.append((1 + (-0.3 * delta).exp()).log() if method == "dpo" else (delta - 1 / 0.6) ** 2)
        return sum(losses) / len(losses)

    return loss_of_batch


@BOTH
def test_online_is_its_account(online, method):
    """Four steps written out again: the reward is asked about the present policy's own answers to those prompts, two each, at tau; the
    loss is that of the pairs it labels; the file's answers are not in it."""
    module, cfg, asked = online(method, steps=4, schedule="constant", warmup=0.0, micro_batch=2, tau=0.8)
    folder = module.main(cfg)
    replay(folder, cfg, THINGS, online_account(method, cfg, asked()))
    rewards = [[-abs(len(text) - 8) / 8 for text in completions] for _, completions in asked()]
    logged = [row["reward"] for row in read_rows(folder / "metrics.jsonl")]
    assert logged == pytest.approx([sum(batch) / 10 for batch in rewards], abs=1e-6) and len(asked()) == 4


def test_a_prompt_twice_in_a_batch_has_two_pairs_of_its_own(online):
    """Ten prompts, batches of twenty: each prompt twice, four answers, two pairs."""
    module, cfg, asked = online("dpo", steps=2, schedule="constant", warmup=0.0, batch_size=20)
    assert len(set(batch_rows(10, 20, 0, 0))) == 10
    replay(module.main(cfg), cfg, THINGS, online_account("dpo", cfg, asked()))


@pytest.mark.parametrize("method", ["dpo", *[pytest.param(method, marks=pytest.mark.slow) for method in PREFERRING if method != "dpo"]])
def test_online_resumed_after_sigterm_is_bitwise(online, method, monkeypatch):
    """Stopped after steps 1, 4 and 5 of 7: the pieces draw the answers, and the labels, of the unbroken run."""
    settings = dict(steps=7, micro_batch=2, eval_every=3, held_out=0.2)
    module, cfg, _ = online(method, **settings)
    expected = result_of(module.main(cfg))
    module, cfg, asked = online(method, **settings)
    before, original = len(asked()), run.Run.log
    for stop_at in (1, 4, 5):

        def log(self, step, stop_at=stop_at, **metrics):
            original(self, step, **metrics)
            if step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(run.Run, "log", log)
        with pytest.raises(SystemExit) as stop:
            module.main(cfg)
        assert stop.value.code == 0
        cfg = module.Config(resume=cfg.out or cfg.resume)
    monkeypatch.setattr(run.Run, "log", original)
    assert result_of(module.main(cfg)) == expected
    assert asked()[before:] == asked()[:before]  # seven batches, none asked twice


@BOTH
def test_online_leaves_the_held_out_pairs_alone(online, method):
    """The reward is never asked about the last three prompts, and eval/ is measured on the file's own answers to them."""
    module, cfg, asked = online(method, held_out=0.3, steps=6, eval_every=2)
    folder = module.main(cfg)
    assert {prompt for prompts, _ in asked() for prompt in prompts} == {f"ask for {thing}: " for thing in THINGS[:7]}
    policy, ref, tokenizer = load_pretrained(folder / "final"), load_pretrained(cfg.policy), load_tokenizer(cfg.policy)
    rows = encode_pairs(tokenizer, read_preferences(cfg.pairs))
    with torch.no_grad():
        loss, _ = module.step(policy, ref, pair_batch(rows, range(7, 10), pad_id=tokenizer.pad_id, max_len=64), cfg)
    logged = read_rows(folder / "metrics.jsonl")
    assert logged[-1]["eval/loss"] == pytest.approx(loss.item(), abs=1e-10)
    assert [row["step"] for row in logged if "eval/loss" in row] == [2, 4, 6]
    shown = {row["prompt"] for row in read_rows(folder / "samples.jsonl")}
    assert shown == {f"ask for {thing}: " for thing in THINGS[7:]}


@BOTH
def test_a_reward_that_fails_once_is_one_skipped_step(online, method, capsys):
    """Step 3 of 5 has no rewards: said, counted, logged without a loss; the weights are those of a run that does the other four."""
    module, cfg, _ = online(method, "[1 / (calls != 3) * len(text) % 3 for text in completions]", steps=5)
    logged = read_rows(module.main(cfg) / "metrics.jsonl")
    assert [row["skipped"] for row in logged] == [0, 0, 1, 1, 1] and ["loss" in row for row in logged] == [True, True, False, True, True]
    assert "step 3 skipped: " in capsys.readouterr().err


@BOTH
def test_three_failures_in_a_row_end_the_run_and_lose_nothing(online, method):
    """From the 4th batch on it fails: the three good steps are saved, and once the reward is mended the run ends as if nothing had been."""
    body = "[len(text) % 5 for text in completions] if calls < DEAD else 1 / 0"
    settings = dict(steps=6, save_every=100, eval_every=100)
    module, cfg, _ = online(method, body.replace("DEAD", "100"), **settings)
    expected = (module.main(cfg) / "final" / "model.safetensors").read_bytes()
    module, cfg, _ = online(method, body.replace("DEAD", "4"), **settings)
    with pytest.raises(BadInput, match="3 steps in a row had no rewards, the last step 6: .*repeat these steps with --resume"):
        module.main(cfg)
    assert newest_checkpoint(cfg.out).name == "step_000003"
    online(method, body.replace("DEAD", "100"))
    assert (module.main(module.Config(resume=cfg.out, reward=cfg.reward)) / "final" / "model.safetensors").read_bytes() == expected


@BOTH
@pytest.mark.parametrize(("changes", "message"), [
    ({"reward": ["builtin"]}, "--reward builtin scores the built-in task, not .*: name a reward"),
    ({"reward": ["nonsense"]}, "--reward nonsense: expected builtin"), ({"reward_limit": 0.0}, "--reward_limit 0.0: must be above 0"),
    ({"max_new": 120}, "exceeds --max_len 64, so answers would be cut after the reward has judged them; set --max_len"),
    ({"max_new": 120, "max_len": 128}, "exceeds"), ({"max_new": 60, "max_len": 80, "online": False}, "is used only with --online"),
    ({"beta": 0.0}, "--beta 0.0: must be above 0"),
])
def test_online_refusals_before_step_1(online, method, changes, message):
    module, cfg, asked = online(method, **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)
    assert not asked()


def test_at_a_small_rate_mixed_learns_what_float32_learns(small, tmp_path):
    """DPO at lr 5e-7: the mean margin of the last 10 of 40 steps is float32's to 10 %. In bfloat16 hardly a weight moves."""
    torch.manual_seed(0)
    save_pretrained(GPT(GPTConfig.tiny(builtin_tokenizer().vocab_size, max_len=128)), tmp_path / "wide", builtin_tokenizer())
    margins = {}
    for dtype in ("float32", "mixed", "bfloat16"):
        module, cfg = small("dpo", policy=str(tmp_path / "wide"), dtype=dtype, lr=5e-7, schedule="constant", warmup=0.0, steps=40,
                            eval_every=99, save_every=99, held_out=0.0)
        rows = read_rows(module.main(cfg) / "metrics.jsonl")
        margins[dtype] = sum(row["rewards/margins"] for row in rows[-10:]) / 10
    assert margins["mixed"] == pytest.approx(margins["float32"], rel=0.1) and abs(margins["bfloat16"]) < 0.1 * margins["float32"]
