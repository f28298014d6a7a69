"""Each rule of --keep by hand, the tilt and the Bradley-Terry labels by their exact laws, and files that survive a death at any moment."""

import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minialign import generate
from minialign.batch import collate
from minialign.data import (
    encode_demos,
    encode_feedback,
    encode_pairs,
    encode_prompt,
    encode_texts,
    read_demonstrations,
    read_feedback,
    read_preferences,
    read_texts,
)
from minialign.engine.common import BadInput, derive_seed, read_rows
from minialign.generate import selected
from minialign.logps import seq_logps
from minialign.methods import dpo, sft
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.tokenizer import CharTokenizer
from minialign.weights import save_pretrained

ROOT = Path(__file__).parent.parent
REWARDS = "def letters(prompts, completions): return [c.count('a') for c in completions]\n"


@pytest.fixture(scope="module")
def small_policy(tmp_path_factory):
    """A random GPT over four letters, and its folder; r.py beside it counts the letter a."""
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    tokenizer = CharTokenizer("abcd")
    policy = GPT(GPTConfig.tiny(tokenizer.vocab_size, n_embd=16, n_head=2, ffn_dim=32, max_len=16)).double()
    with torch.no_grad():
        policy.head.weight.mul_(5)
    save_pretrained(policy, folder / "policy", tokenizer)
    (folder / "r.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("ab", "c", "dd", "ab", "a")))
    return policy, tokenizer, folder


def config(folder, out_file, **changes):
    usual = dict(policy=str(folder / "policy"), prompts=str(folder / "prompts.jsonl"), reward=[f"{folder / 'r.py'}:letters"], n=4,
                 max_new=2, batch_size=2, dtype="float64", out=str(out_file))
    return generate.Config(**{**usual, **changes})


def test_every_rule_by_hand():
    rewards, coins = [1.0, 3.0, 0.0, 3.0], [0.1, 0.9, 0.5, 0.2]
    assert selected("all", None, rewards, coins) == [(0,), (1,), (2,), (3,)]
    assert selected("best", None, rewards, coins) == [(1,)] and selected("above", 1.0, rewards, coins) == [(0,), (1,), (3,)]
    assert selected("best_worst", None, rewards, coins) == [(1, 2)] and selected("best_worst", None, [2.0, 2.0], coins) == []
    # e^{(r − 3)/2}: .368, 1, .223, 1 against the coins
    assert selected("tilt", 2.0, rewards, coins, 3.0) == [(0,), (1,), (3,)]
    # σ((1 − 3)/2) = .269 is above the coin .1: the first is chosen, though its reward is lower; with .3 it is not
    assert selected("bradley_terry", 2.0, rewards, coins) == [(0, 1)] and selected("bradley_terry", 2.0, rewards, [0.3, 0]) == [(1, 0)]
    assert selected("bradley_terry", 1e-9, [0.0, 1e9], [0.5, 0]) == [(1, 0)]
    assert selected("bradley_terry", 1e-9, [1e9, 0.0], [0.5, 0]) == [(0, 1)]
    with pytest.raises(BadInput, match="has the reward 3, above --reward_max 2"):
        selected("tilt", 2.0, rewards, coins, 2.0)


@torch.no_grad()
def law_of_rewards(policy, tokenizer, prompt):
    """{number of a: probability} over all completions of at most two letters, by enumeration."""
    letters = tokenizer.encode("abcd")
    completions = [[0], *[[x, 0] for x in letters], *[[x, y] for x, y in itertools.product(letters, letters)]]  # (0 is EOS)
    ids = [0, *tokenizer.encode(prompt)]
    probs = seq_logps(policy, collate([ids] * len(completions), completions, pad_id=0)).exp()
    assert abs(probs.sum() - 1) < 1e-12
    law = dict.fromkeys((0, 1, 2), 0.0)
    for completion, p in zip(completions, probs.tolist(), strict=True):
        law[completion.count(letters[0])] += p
    return law


def chi_square(counts, law):
    total = sum(counts.values())
    return sum((counts.get(key, 0) - total * p) ** 2 / (total * p) for key, p in law.items())


def test_the_tilt_is_the_closed_form(small_policy, tmp_path):
    """Of 6,000 completions those kept have the law P(r)·e^{r/β}/Z (chi-square with two degrees of freedom, .999 quantile 13.8), as many as
    Z·e^{−2/β} says (four standard deviations). With the law of ref, or with 1/β doubled, the chi-square fails."""
    policy, tokenizer, folder = small_policy
    (tmp_path / "one.jsonl").write_text('{"prompt": "ab"}\n')
    out = generate.main(config(folder, tmp_path / "o.jsonl", prompts=str(tmp_path / "one.jsonl"), n=6000, keep="tilt:0.8", reward_max=2.0,
                               write="demonstrations"))
    ref = law_of_rewards(policy, tokenizer, "ab")
    kept = [row["reward"] for row in read_rows(out)]
    counts = {r: kept.count(r) for r in ref}

    def tilted(rate):
        z = sum(p * math.exp(r * rate) for r, p in ref.items())
        return {r: p * math.exp(r * rate) / z for r, p in ref.items()}

    assert chi_square(counts, tilted(1 / 0.8)) < 13.8 < min(chi_square(counts, tilted(0)), chi_square(counts, tilted(2 / 0.8)))
    share = sum(p * math.exp((r - 2) / 0.8) for r, p in ref.items())
    assert abs(len(kept) - 6000 * share) < 4 * math.sqrt(6000 * share * (1 - share))
    assert all(row["completion"].count("a") == row["reward"] for row in read_rows(out))


def test_bradley_terry_labels_follow_the_sigmoid(small_policy, tmp_path):
    """400 prompts: of the pairs with another reward the higher one is chosen with probability σ(Δ/β)."""
    _, _, folder = small_policy
    (tmp_path / "many.jsonl").write_text('{"prompt": "ab"}\n' * 400)
    out = generate.main(config(folder, tmp_path / "o.jsonl", prompts=str(tmp_path / "many.jsonl"), n=2, keep="bradley_terry:1.5",
                               batch_size=400))
    differences = [row["chosen_reward"] - row["rejected_reward"] for row in read_rows(out)]
    assert len(differences) == 400
    for size in (1, 2):
        trials, right = sum(abs(d) == size for d in differences), differences.count(size)
        p = 1 / (1 + math.exp(-size / 1.5))
        assert trials > 10 and abs(right - trials * p) < 4 * math.sqrt(trials * p * (1 - p))


def test_written_answers_are_trained_on_as_they_were_sampled(small_policy, tmp_path, capsys):
    """Token for token: EOS stands behind a completion if the policy wrote it, not where max_new cut it off. The oracle is sample itself."""
    policy, tokenizer, folder = small_policy
    out = generate.main(config(folder, tmp_path / "all.jsonl", n=8))
    rows = read_rows(out)
    seeds = [derive_seed("generate", 0, i) for i in range(5)]
    prompts = [encode_prompt(tokenizer, p) for p in ("ab", "c", "dd", "ab", "a")]
    drawn = sample(policy, prompts, max_new=2, n=8, eos_id=tokenizer.eos_id, seed=seeds)
    own = [list(ids) for ids in drawn.completions]
    assert {ids[-1] == tokenizer.eos_id for ids in own} == {True, False}
    assert [ids for _, ids in encode_demos(tokenizer, read_demonstrations(out))] == own
    cut = sum(ids[-1] != tokenizer.eos_id for ids in own)
    assert f"{cut} of 40 rows have an answer that was cut off when it was sampled" in capsys.readouterr().err

    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps({**row, "label": row["sample"] % 2 == 0}) + "\n" for row in rows))
    assert [ids for _, ids, _ in encode_feedback(tokenizer, read_feedback(labelled))] == own
    pairs = generate.main(config(folder, tmp_path / "pairs.jsonl", n=8, keep="bradley_terry:1"))  # of the first two of each prompt
    both = [sorted(sides) for _, *sides in encode_pairs(tokenizer, read_preferences(pairs))]
    assert both == [sorted(own[i : i + 2]) for i in range(0, 40, 8)]
    texts = encode_texts(tokenizer, read_texts(out), max_len=16)  # as documents, whose prompts are scored too
    assert [ids for _, ids in texts] == [prompts[i // 8][1:] + ids for i, ids in enumerate(own)]
    chosen = [ids for _, ids in encode_demos(tokenizer, read_demonstrations(pairs))]  # a pair is also a demonstration of its better answer
    assert chosen == [ids for _, ids, _ in encode_pairs(tokenizer, read_preferences(pairs))]


def test_an_unfinished_turn_has_no_end(tmp_path):
    """A chat template that ends a turn with c, which is not EOS. By hand: c and EOS end a finished answer, nothing one cut off."""
    tokenizer = CharTokenizer("abcd")
    tokenizer.chat_template = ("{% for m in messages %}{{ 'a' if m.role == 'user' else 'b' }}{{ m.content }}c{% endfor %}"
                               "{% if add_generation_prompt %}b{% endif %}")
    row = {"prompt": [{"role": "user", "content": "d"}], "completion": "dda"}
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row | {"finished": finished}) + "\n" for finished in (True, False)))
    (prompt, whole), (_, cut) = encode_demos(tokenizer, read_demonstrations(tmp_path / "f.jsonl"))
    assert tokenizer.decode(prompt) == "adcb" and cut == tokenizer.encode("dda")
    assert whole == [*tokenizer.encode("ddac"), tokenizer.eos_id]


def test_a_file_does_not_depend_on_batches_and_says_where_it_comes_from(small_policy, tmp_path, capsys):
    _, _, folder = small_policy
    first = generate.main(config(folder, tmp_path / "a.jsonl"))
    second = generate.main(config(folder, tmp_path / "b.jsonl", batch_size=5))
    rows = read_rows(first)
    assert first.read_bytes() == second.read_bytes() and len(rows) == 20
    assert {name: rows[7][name] for name in ("prompt", "prompt_number", "sample", "seed", "policy")} == {
        "prompt": "c", "prompt_number": 1, "sample": 3, "seed": 0, "policy": str(folder / "policy")}
    first_ab, second_ab = ([row["completion"] for row in rows[start : start + 4]] for start in (0, 12))
    assert rows[12]["prompt"] == "ab" and first_ab != second_ab  # equal prompts are drawn apart
    assert "20 rows from 20 completions of 5 prompts" in capsys.readouterr().out
    generate.main(config(folder, tmp_path / "a.jsonl"))  # it is finished, so nothing is drawn
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("keep", ["all", "best_worst"])
def test_a_death_anywhere_loses_and_repeats_nothing(small_policy, tmp_path, monkeypatch, keep):
    """Between the rows and the note of progress, and before either, at each batch in turn."""
    _, _, folder = small_policy
    whole = generate.main(config(folder, tmp_path / "whole.jsonl", keep=keep, batch_size=1)).read_bytes()
    writes, fsync = generate.write_atomic, generate.os.fsync
    for k in range(12):
        out, calls = tmp_path / f"{k}.jsonl", []

        def dying(original, calls=calls, k=k):
            def call(*args):
                calls.append(1)
                if len(calls) == k + 1:
                    raise MemoryError
                return original(*args)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(generate, "write_atomic", dying(writes))
            patch.setattr(generate.os, "fsync", dying(fsync))
            try:
                generate.main(config(folder, out, keep=keep, batch_size=1))
            except MemoryError:
                pass
        assert generate.main(config(folder, out, keep=keep, batch_size=1)).read_bytes() == whole, k


@pytest.mark.parametrize("times", [pytest.param(4, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.long)])
def test_kill_9_at_random_moments(small_policy, tmp_path, times):
    """So many kills of a real process while it draws; then it ends, and the file is that of an unbroken call."""
    _, _, folder = small_policy
    (tmp_path / "slow.py").write_text("import time\n\n\ndef letters(prompts, completions):\n    time.sleep(0.05)\n"
                                      "    return [c.count('a') for c in completions]\n")
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"prompt": "abcd"[i % 4]}) + "\n" for i in range(80)))

    def command(out):
        flags = dict(policy=folder / "policy", prompts=tmp_path / "many.jsonl", reward=f"{tmp_path / 'slow.py'}:letters", n=2, max_new=2,
                     batch_size=1, out=out, keep="above:1")
        return [sys.executable, "-m", "minialign", "generate", *[str(word) for flag in flags.items() for word in (f"--{flag[0]}", flag[1])]]

    subprocess.run(command(tmp_path / "whole.jsonl"), cwd=ROOT, check=True, capture_output=True)
    rng, kills = random.Random(0), 0
    while kills < times:
        process = subprocess.Popen(command(tmp_path / "killed.jsonl"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        progress = Path(tmp_path / "killed.jsonl.progress.json")
        begun = progress.read_bytes() if progress.is_file() else b""
        while process.poll() is None and (progress.read_bytes() if progress.is_file() else b"") == begun:
            time.sleep(0.01)  # until it has written something
        time.sleep(0.15 * rng.random())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run(command(tmp_path / "killed.jsonl"), cwd=ROOT, check=True, capture_output=True)
    assert kills >= min(times, 5) and (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_methods_train_on_what_was_written(small_policy, tmp_path):
    _, _, folder = small_policy
    best, pairs = (generate.main(config(folder, tmp_path / f"{keep}.jsonl", keep=keep)) for keep in ("best", "best_worst"))
    assert len(read_demonstrations(best)) == 5 and 1 <= len(read_preferences(pairs)) <= 5
    shared = dict(policy=str(folder / "policy"), steps=1, batch_size=2, max_len=16, max_new=4, held_out=0.0)
    sft.main(sft.Config(demos=str(best), out=str(tmp_path / "sft"), **shared))
    dpo.main(dpo.Config(pairs=str(pairs), out=str(tmp_path / "dpo"), **shared))


def test_messages_are_written_as_messages(small_policy, tmp_path):
    """A prompt of messages stays one, with its tools; the answer is its text without the spaces that a template puts around it."""
    policy, tokenizer, folder = small_policy
    tokenizer.settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save_pretrained(policy, tmp_path / "chat", tokenizer)
    del tokenizer.settings["chat_template"]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "ab"}], "tools": [{"name": "x"}]}) + "\n")
    out = generate.main(config(folder, tmp_path / "o.jsonl", policy=str(tmp_path / "chat"), prompts=str(tmp_path / "p.jsonl")))
    for row in read_rows(out):
        assert row["prompt"] == [{"role": "user", "content": "ab"}] and row["tools"] == [{"name": "x"}]
        assert isinstance(row["completion"], str)
    assert read_demonstrations(out)[0].prompt.columns["tools"] == [{"name": "x"}]


@pytest.mark.parametrize(("changes", "said"), [
    ({"keep": "some"}, "--keep some: must be all, best"), ({"keep": "above"}, "expected above:NUMBER"),
    ({"keep": "best:2"}, "expected best"),
    ({"keep": "above:x"}, "expected above:NUMBER"), ({"keep": "tilt:0", "reward_max": 1.0}, "β must be above 0"),
    ({"keep": "tilt:1"}, "needs --reward_max"), ({"reward_max": 1.0}, "is used only with --keep tilt"),
    ({"keep": "best_worst", "n": 1}, "a pair needs at least 2"), ({"keep": "best", "write": "pairs"}, "--keep best writes demonstrations"),
    ({"n": 0}, "--n 0: must be at least 1"), ({"max_new": 16}, "the policy's context is 16"), ({"out": ""}, "--out: name the JSONL file"),
    ({"reward": ["length:0"]}, "must be at least 1 character"),
])
def test_what_is_refused(small_policy, tmp_path, changes, said):
    with pytest.raises(BadInput, match=said):
        generate.main(config(small_policy[2], tmp_path / "o.jsonl", **changes))


def test_another_command_does_not_go_on_in_a_file(small_policy, tmp_path):
    _, _, folder = small_policy
    out = generate.main(config(folder, tmp_path / "o.jsonl"))
    with pytest.raises(BadInput, match="was begun with another --seed"):
        generate.main(config(folder, out, seed=1))
    (tmp_path / "p.jsonl").write_bytes((folder / "prompts.jsonl").read_bytes())
    own = generate.main(config(folder, tmp_path / "own.jsonl", prompts=str(tmp_path / "p.jsonl")))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' * 5)
    with pytest.raises(BadInput, match="was begun with another content of prompts"):
        generate.main(config(folder, own, prompts=str(tmp_path / "p.jsonl")))
    out.write_bytes(out.read_bytes()[:-9])
    with pytest.raises(BadInput, match="is shorter than o.jsonl.progress.json says"):
        generate.main(config(folder, out))
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match="mine.jsonl: exists; name another --out"):
        generate.main(config(folder, tmp_path / "mine.jsonl"))
    (folder / "bad.py").write_text("def letters(prompts, completions): raise ValueError('tired')\n")
    with pytest.raises(BadInput, match="tired.*the same command goes on here"):
        generate.main(config(folder, tmp_path / "new.jsonl", reward=[f"{folder / 'bad.py'}:letters"]))
