"""What surrounds a method: guards against NaN, the first look, the export, refusals at second 0."""

import json
import math
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from minialign.batch import Rollout, collate
from minialign.engine import look, run
from minialign.engine.common import BadInput, read_rows
from minialign.engine.tracking import TIMED
from minialign.methods import rloo
from minialign.task import builtin_tokenizer
from tests.conftest import EACH_LOOP, LEARNING, METHODS
from tests.killing import result_of


def poison(monkeypatch, module, bad_steps, where="loss"):
    """Let module.step return a NaN loss (or a NaN gradient) in the given steps, counted from 1."""
    original, calls = module.step, []

    def step(*args, **kwargs):
        calls.append(1)
        loss, *rest = original(*args, **kwargs)
        if len(calls) in bad_steps:
            loss = loss * math.nan if where == "loss" else loss + 0 * torch.sqrt(loss.detach() * 0 + 0 * loss)  # d sqrt(0) is inf
        return loss, *rest

    monkeypatch.setattr(module, "step", step)


@pytest.mark.parametrize("method", EACH_LOOP)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_named(small, monkeypatch, capsys, method, where):
    once = {"epochs": 1} if method in ("ppo", "rebel") else {}  # one update on each rollout, so that the third call is step 3
    once |= {"reward_share": 1.0} if method in LEARNING else {}  # every step is one of the reward; those of the policy: the next test
    module, cfg = small(method, steps=5, save_every=1, **once)
    poison(monkeypatch, module, {3}, where)
    folder = module.main(cfg)
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    error = capsys.readouterr().err
    assert "step 3 skipped" in error and "rows [" in error and "first non-finite gradient: tok_embed.weight" in error
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "final" / "model.safetensors").values())


@pytest.mark.parametrize("method", [pytest.param("rft", marks=pytest.mark.slow), "irl"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_policy_step_that_is_not_finite_is_skipped_and_the_reward_goes_on(small, monkeypatch, capsys, method, where):
    """RpRpRp: the second policy step is bad. It is named, the third one and every reward step are done, and both exports are finite; the
    policy is that of the only two other steps."""
    module, cfg = small(method, steps=6, rounds=3, reward_share=0.5, snapshots=True, eval_every=1)
    poison(monkeypatch, rloo, {2}, where)
    folder = module.main(cfg)
    assert [row["skipped"] for row in read_rows(folder / "metrics.jsonl")] == [0, 0, 0, 1, 1, 1]
    assert "step 4 skipped" in capsys.readouterr().err
    shots = [(folder / f"snapshots/{step:06d}/model.safetensors").read_bytes() for step in range(1, 7)]
    assert [a == b for a, b in zip(shots, shots[1:], strict=False)] == [False, True, True, True, False]
    for path in ("final", "reward"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / path / "model.safetensors").values())


def test_a_skipped_step_leaves_the_weights_alone(small, monkeypatch):
    """The last step is bad: the export equals that of a run one step shorter, bit for bit (constant learning rate)."""
    weights = []
    for steps, bad in ((3, {3}), (2, set())):
        module, cfg = small("sft", steps=steps, schedule="constant", warmup=0.0)
        with monkeypatch.context() as patch:
            poison(patch, module, bad)
            weights.append((module.main(cfg) / "final" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_three_bad_steps_end_the_run_and_the_checkpoint_is_finite(small, monkeypatch):
    module, cfg = small("sft", steps=9, save_every=1)
    poison(monkeypatch, module, {3, 4, 5})
    with pytest.raises(FloatingPointError, match="3 steps in a row .* last step 5, rows .* smaller --lr"):
        module.main(cfg)
    newest = run.checkpoint.newest_checkpoint(cfg.out)
    assert newest.name == "step_000002"  # no step whose guard failed is ever saved
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


@pytest.mark.parametrize("stop_at", [None, 4])
def test_good_reward_steps_between_do_not_save_a_diverged_policy(small, monkeypatch, stop_at):
    """RpRpRpRp with bad policy steps 4, 6, 8: three in a row of the policy end the run, whatever the reward did between them; also when
    the run was stopped after the first of them and resumed."""
    module, cfg = small("rft", steps=8, rounds=4, reward_share=0.5, save_every=1)
    if stop_at:
        poison(monkeypatch, rloo, {2})
        original = run.Run.log

        def log(self, step, **metrics):
            original(self, step, **metrics)
            if step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(run.Run, "log", log)
            with pytest.raises(SystemExit):
                module.main(cfg)
        cfg = module.Config(resume=cfg.out)
        poison(monkeypatch, rloo, {1, 2})
    else:
        poison(monkeypatch, rloo, {2, 3, 4})
    with pytest.raises(FloatingPointError, match="3 steps in a row .* last step 8"):
        module.main(cfg)


def test_two_bad_steps_then_a_good_one_go_on(small, monkeypatch):
    module, cfg = small("sft", steps=6)
    poison(monkeypatch, module, {1, 2, 4, 5})
    assert read_rows(module.main(cfg) / "metrics.jsonl")[-1]["skipped"] == 4


def test_each_answer_is_judged_with_its_own_prompt():
    """Two prompts with two answers each: the reward sees a a b b. Answers without EOS, here the second and third, lose missing_eos."""
    batch = collate([[1], [1], [2], [2]], [[3, 0], [4], [5], [0]], pad_id=0)
    finished = torch.tensor([True, False, False, True])
    answers = Rollout(batch.inputs, batch.targets, batch.mask, torch.zeros(4, 2), torch.tensor([2, 1, 1, 1]), finished,
                      [[3, 0], [4], [5], [0]])
    stub = SimpleNamespace(cfg=SimpleNamespace(reward_limit=60.0, missing_eos=0.5), device=torch.device("cpu"), dtype=torch.float64)
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    seen = []

    def reward(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [1.0, 2.0, 3.0, 4.0]

    rewards = run.Run.ask(stub, 0, reward, tokenizer, ["a", "b"], answers)
    assert seen == [("a", "3 0"), ("a", "4"), ("b", "5"), ("b", "0")] and rewards.tolist() == [1.0, 1.5, 2.5, 4.0]


def test_first_look(small, capsys):
    """Device, sizes, decoded rows with what is scored in ⟦ ⟧ and EOS as ⏎, counts."""
    module, cfg = small("sft", steps=1)
    module.main(cfg)
    out = capsys.readouterr().out
    assert "sft: cpu (1 threads), float64, parameters: policy " in out
    assert "data: 18 rows, " in out and " truncated, " in out and " empty; about " in out and " MB at the peak" in out
    assert "ask for " in out and "⟦" in out and "⏎⟧" in out and " scored)" in out
    for line in ("curves ", "samples ", "talk ", "weights "):
        assert line in out


def test_first_look_says_what_was_cut_and_what_ends_twice(small, tmp_path, capsys):
    """A prompt that --max_prompt cuts, and an answer whose text spells the EOS that is appended to it."""
    path = tmp_path / "demos.jsonl"
    rows = [{"prompt": "ask for tea: ", "completion": "tea"}, {"prompt": "ask", "completion": "tea<|endoftext|>"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module, cfg = small("sft", steps=1, demos=str(path), held_out=0.0, max_prompt=6, batch_size=2)
    module.main(cfg)
    out, err = capsys.readouterr()
    assert "1 of 2 prompts are cut to --max_prompt 6: they lose their beginning\n" in err
    assert "0 empty, 1 end in EOS twice (their text spells it); about " in out and "tea<|endoftext|>⏎⟧" in out


def test_show_row_marks_exactly_what_is_scored():
    tokenizer = builtin_tokenizer()
    prompt, completion = tokenizer.encode("ask for tea: "), tokenizer.encode("give me tea now!") + [tokenizer.eos_id]
    whole = collate([prompt], [completion], pad_id=tokenizer.pad_id)
    assert look.show_row(tokenizer, whole, 0) == "ask for tea: ⟦give me tea now!⏎⟧  (17 scored)"
    cut = collate([prompt], [completion], pad_id=tokenizer.pad_id, max_len=len(prompt) + 4)
    assert look.show_row(tokenizer, cut, 0) == "ask for tea: ⟦give⟧  (4 scored)"
    none = collate([prompt], [completion], pad_id=tokenizer.pad_id, max_len=len(prompt))
    assert look.show_row(tokenizer, none, 0).endswith("⟦⟧  (0 scored)")


def test_the_run_folder(small):
    module, cfg = small("irft")
    folder = module.main(cfg)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "env.json", "inputs.json", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl",
                     "samples.jsonl", "checkpoints", "final", ".lock", ".pid"}
    environment = json.loads((folder / "env.json").read_text())
    assert {"minialign", "commit", "python", "torch", "platform", "device", "threads", "argv", "started", "config",
            "mark"} == set(environment)
    sample_rows = read_rows(folder / "samples.jsonl")
    assert {"step", "prompt", "completion", "finished"} == set(sample_rows[0]) and sample_rows[-1]["step"] == cfg.steps
    for method in LEARNING:  # what they learned lies beside
        module, cfg = small(method)
        assert {path.name for path in module.main(cfg).iterdir()} == names | {"reward"}


def test_metrics_are_valid_json_everywhere(small):
    """NaN is no JSON: no metric may need it, with or without held-out rows."""
    for method in METHODS:
        for held_out in (0.0, 0.2):
            module, cfg = small(method, held_out=held_out, steps=2)
            text = (module.main(cfg) / "metrics.jsonl").read_text()
            json.loads("[" + ",".join(text.splitlines()) + "]", parse_constant=pytest.fail)


def odd_rows(kind):
    """Rows that are legal and odd, in the form of every method at once. Rewards of `lexicon:§` are equal."""
    answers = {"chosen": "may i have tea, please.", "rejected": "give me tea now!"}
    row = {"prompt": "ask for tea: ", "completion": answers["chosen"], "label": True, **answers}
    if kind == "one row":
        return [row]
    if kind == "an empty answer":
        return [row, {**row, "completion": "", "chosen": ""}, {**row, "label": False, "rejected": ""}, row]
    if kind == "equal answers":
        return [{**row, "rejected": row["chosen"], "label": bool(i % 2)} for i in range(4)]
    return [row, {**row, "prompt": "ask for tea: " * 9}, {**row, "label": False}, row]  # a prompt that fills max_len


@pytest.mark.parametrize("kind", ["one row", "an empty answer", "equal answers", "a prompt that fills the row", "max_new 1"])
@pytest.mark.parametrize("method", [pytest.param(method, marks=[] if method in ("sft", "dpo", "grpo") else pytest.mark.slow)
                                    for method in METHODS])
def test_odd_rows_train_or_are_refused_in_a_sentence(small, tmp_path, method, kind):
    """Losses are finite, or BadInput says what cannot be (one row of feedback has no reference point, a prompt leaves no room)."""
    path = tmp_path / "odd.jsonl"
    flag = next(flag for flag in ("demos", "pairs", "feedback", "prompts") if hasattr(small(method)[1], flag))
    keys = {"demos": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected"), "feedback": ("prompt", "completion", "label"),
            "prompts": ("prompt",)}[flag]
    path.write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in odd_rows(kind)))
    changes = {flag: str(path), "steps": 2, "batch_size": 8, "held_out": 0.0, "max_len": 64}
    changes |= {"max_new": 1} if kind == "max_new 1" else {}
    changes |= {"reward": ["lexicon:§"]} if flag == "prompts" else {}
    module, cfg = small(method, **{name: value for name, value in changes.items() if hasattr(small(method)[1], name)})
    try:
        rows = read_rows(module.main(cfg) / "metrics.jsonl")
    except BadInput as error:
        assert kind in ("one row", "a prompt that fills the row") and str(error).count("\n") == 0
        return
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows if "loss" in row) and rows[-1]["skipped"] == 0


def test_a_clock_that_jumps_back_changes_nothing(small, monkeypatch):
    """An hour back in each second call: the same metrics but for the seconds, the same weights."""
    module, cfg = small("sft")
    expected = result_of(module.main(cfg))
    now, calls = time.time, []

    def jumping():
        calls.append(1)
        return now() - 3600 * (len(calls) % 2)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "monotonic", jumping)
    module, cfg = small("sft")
    assert result_of(module.main(cfg)) == expected and calls


@pytest.mark.parametrize(("changes", "message"), [
    ({"steps": 0}, "--steps 0: must be at least 1"), ({"batch_size": -3}, "--batch_size -3"), ({"held_out": 0.95}, "at most 0.9"),
    ({"warmup": 2.0}, "--warmup 2.0"), ({"max_grad_norm": 0.0}, "--max_grad_norm 0.0: must be above 0"),
    ({"optimizer": "sgd"}, "--optimizer sgd: must be adamw, rmsprop or adamw8bit"),
    ({"schedule": "cos"}, "--schedule cos"), ({"lr": -1.0}, "--lr -1.0"), ({"lr": math.nan}, "--lr nan"),
    ({"policy": "no/such/folder"}, "no/such/folder: no such folder"),
    ({"demos": "absent.jsonl"}, "absent.jsonl: cannot be read"), ({"max_len": 500}, "--max_len 500: the policy's context is 128"),
    ({"dtype": "half"}, "--dtype half"), ({"device": "abacus"}, "--device abacus"),
])
def test_refusals_at_second_0(small, changes, message):
    module, cfg = small("sft", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)


def test_a_run_folder_that_cannot_be_written(small, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    module, cfg = small("sft", out=str(blocker / "run"))
    with pytest.raises(BadInput, match="cannot be written"):
        module.main(cfg)


def test_a_tokenizer_too_large_for_the_policy(small, policy_folder, tmp_path):
    import shutil

    from minialign.tokenizer import CharTokenizer

    folder = tmp_path / "mixed"
    shutil.copytree(policy_folder, folder)
    CharTokenizer("".join(chr(i) for i in range(32, 140))).save(folder)
    module, cfg = small("sft", policy=str(folder))
    with pytest.raises(BadInput, match=r"jsonl:1: the token '.' .id \d+. in .ask for .* has no embedding: the model has only"):
        module.main(cfg)


@pytest.mark.parametrize("method", EACH_LOOP)
def test_snapshots_are_exports_of_every_evaluation(small, method):
    """--eval_every 4 of 6 steps: after 4 and at the end, and the last equals the export (a reward model's but for its offset, which is
    measured after the last step)."""
    module, cfg = small(method, snapshots=True)
    folder = module.main(cfg)
    assert sorted(path.name for path in (folder / "snapshots").iterdir()) == ["000004", "000006"]
    last, final = folder / "snapshots" / "000006", folder / "final"
    assert (last / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    assert (folder / "snapshots" / "000004" / "model.safetensors").read_bytes() != (final / "model.safetensors").read_bytes()
    if method in LEARNING:
        rewards = [load_file(folder / name / "model.safetensors") for name in ("reward_snapshots/000006", "reward")]
        assert all(torch.equal(rewards[0][name], tensor) for name, tensor in rewards[1].items())
    plain, cfg = small(method)
    assert not (plain.main(cfg) / "snapshots").exists()


@pytest.mark.parametrize("method", ["sft", "reward_model", *LEARNING])
def test_the_last_token_of_a_row_is_read_by_rewards_only(small, method, demos_file, pairs_file):
    """A context of 128 positions: a policy is trained on rows of 129 tokens, of which it never reads the last; a reward model reads it."""
    module, cfg = small(method, max_len=129, steps=1)
    if method == "sft":
        module.main(cfg)
        return
    with pytest.raises(BadInput, match="--max_len 129: the policy's context is 128"):
        module.main(cfg)
    module, cfg = small(method, max_len=128, steps=1)
    module.main(cfg)


@pytest.mark.parametrize("method", ["irft", *LEARNING])
def test_an_answer_may_fill_the_context(small, method, tmp_path):
    """Prompts of 20 tokens (an EOS leads) with 108 new ones fill 128 positions: the longest that a reward model can read. One more is
    refused where a reward model reads it, and fits where only the sampler writes it."""
    file = tmp_path / "even.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"ask for {thing}: ".rjust(19, "a"), "completion": "tea now!"}) + "\n"
                            for thing in ("tea", "milk", "bread", "salt") * 4))
    module, cfg = small(method, demos=str(file), max_new=108, steps=2)
    module.main(cfg)
    module, cfg = small(method, demos=str(file), max_new=109, steps=2)
    if method == "irft":
        module.main(cfg)
    else:
        with pytest.raises(BadInput, match="the longest prompt has 20 tokens.*set --max_prompt 19"):
            module.main(cfg)


def test_prompts_that_leave_no_room_for_sampling(small):
    module, cfg = small("irft", max_new=120)
    with pytest.raises(BadInput, match="the longest prompt has .* --max_new 120 .* context of 128; set --max_prompt 8"):
        module.main(cfg)


def test_a_disk_too_small_for_checkpoints(small, monkeypatch):
    module, cfg = small("sft")
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(BadInput, match="checkpoints need about .* bytes and the disk has 1,000 free"):
        module.main(cfg)


def test_the_share_of_bfloat16_weights_that_a_step_leaves_unchanged(small, capsys):
    """As many as PyTorch's AdamW leaves unchanged in its first step, which has the size of lr. Float32 weights and adapters: no note."""
    w = torch.nn.Parameter(torch.randn(1000, 100, generator=torch.Generator().manual_seed(0)).bfloat16().abs())
    before, optimizer = w.detach().clone(), torch.optim.AdamW([w], lr=1e-3, weight_decay=0.0, eps=0.0)
    share = run.unmoved([optimizer])
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert 0.5 < share < 0.99 and share == pytest.approx(float((w == before).double().mean()), abs=0.005)
    for changes, noted in (({"dtype": "bfloat16"}, True), ({"dtype": "bfloat16", "lora": 2}, False), ({"dtype": "float32"}, False)):
        module, cfg = small("sft", steps=1, lr=1e-6, **changes)
        module.main(cfg)
        assert ("note: --dtype bfloat16 rounds" in capsys.readouterr().err) is noted


def test_a_run_refused_before_step_1_may_be_repeated(small, demos_file):
    """A mistyped file leaves a folder behind; the mended command may use it, and the stale record of inputs is gone."""
    module, cfg = small("sft", demos="absent.jsonl")
    with pytest.raises(BadInput):
        module.main(cfg)
    cfg.demos = str(demos_file)
    module.main(cfg)
    with pytest.raises(BadInput, match="exists and is not empty"):
        module.main(cfg)


def test_a_reward_model_is_no_policy(small):
    module, cfg = small("reward_model", steps=1)
    reward = module.main(cfg) / "final"
    for method in ("sft", "irft", "dpo", *LEARNING):
        module, cfg = small(method, policy=str(reward))
        with pytest.raises(BadInput, match="is a reward model"):
            module.main(cfg)


def test_a_run_of_another_version_is_not_resumed(small):
    module, cfg = small("sft", steps=1)
    folder = module.main(cfg)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "learning_rate": 1.0}))
    with pytest.raises(BadInput, match="'learning_rate'.*another version"):
        module.main(module.Config(resume=str(folder)))


def test_a_run_of_an_older_version_gets_the_defaults_of_newer_flags(small, capsys):
    """config.json without one field: the run is resumed with that field's default, and the file stays as it is."""
    module, cfg = small("sft", steps=4, save_every=2)
    folder = module.main(cfg)
    record = json.loads((folder / "config.json").read_text())
    del record["deterministic"]
    (folder / "config.json").write_text(json.dumps(record))
    env = json.loads((folder / "env.json").read_text())
    del env["config"]  # older versions did not record the file's hash here
    (folder / "env.json").write_text(json.dumps(env))
    for checkpoint in (folder / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)  # they hold the hash of the whole file
    with pytest.raises(BadInput, match="drop --deterministic"):
        module.main(module.Config(resume=str(folder), deterministic=True))
    before = [row | dict.fromkeys(TIMED, 0) for row in read_rows(folder / "metrics.jsonl")]
    module.main(module.Config(resume=str(folder)))
    assert [row | dict.fromkeys(TIMED, 0) for row in read_rows(folder / "metrics.jsonl")] == before
    assert json.loads((folder / "config.json").read_text()) == record


def test_a_sampled_line_separator_does_not_stop_a_resume(small):
    """U+2028 and U+0085 are characters of a text, not ends of a line of JSON."""
    module, cfg = small("sft", steps=2)
    folder = module.main(cfg)
    with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2, "prompt": "", "completion": "a\u2028b\u0085c", "finished": true}\n')
    module.main(module.Config(resume=str(folder)))
    assert read_rows(folder / "samples.jsonl")[-1]["completion"] == "a\u2028b\u0085c"
