"""The commands of docs/RESULTS.md on real Anthropic-HH transcripts, a few steps of each: base, SFT, IRFT, reward model, evaluation."""

import importlib
import math
from pathlib import Path

import pytest

from minialign import evaluate
from minialign.engine.common import read_rows
from minialign.methods import irft, reward_model, sft
from tests.conftest import PREFERRING

HH = Path(__file__).parent.parent.parent / "shared" / "data" / "hh_harmless.jsonl.gz"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run folder: forty steps on the text of the transcripts."""
    if not HH.is_file():
        pytest.skip("the transcripts (../shared/data/hh_harmless.jsonl.gz) are not part of the project")
    return sft.main(sft.Config(text=str(HH), policy="new", layers=2, width=64, vocab=600, max_len=128, steps=40, batch_size=8, lr=5e-3,
                               eval_every=40, out=str(tmp_path_factory.mktemp("hh") / "base")))


@pytest.mark.slow
def test_the_first_real_run_in_small(base, tmp_path, capsys):
    rows = read_rows(base / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(600), abs=0.5) and rows[-1]["eval/nll"] < 5.5
    policy = str(base / "final")
    shared = dict(policy=policy, max_prompt=64, max_len=128, batch_size=8)
    tuned = sft.main(sft.Config(demos=str(HH), steps=6, eval_every=6, out=str(tmp_path / "sft"), **shared))
    spin = irft.main(irft.Config(demos=str(HH), steps=4, eval_every=4, max_new=24, out=str(tmp_path / "spin"), **shared))
    reward = reward_model.main(reward_model.Config(pairs=str(HH), steps=6, eval_every=6, out=str(tmp_path / "rm"), **shared))
    capsys.readouterr()
    table = evaluate.main(evaluate.Config(policies=[policy, str(tuned / "final"), str(spin / "final")], reward=[str(reward / "final")],
                                          pairs=str(HH), max_prompt=64, max_len=128))
    out = capsys.readouterr().out
    assert [row["n"] for row in table] == [180] * 4 and "180 pairs of" in out and "final: accuracy" in out and "±" in out
    assert table[1]["nll"][0] < table[0]["nll"][0]  # SFT lowers what it minimises, on transcripts it never saw
    assert all(0 <= row["implicit_accuracy"][0] <= 1 for row in table[:3]) and 0.3 < table[3]["accuracy"][0] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("method", [*PREFERRING, "kto"])
def test_the_preference_family_on_transcripts(base, small, method):
    """Six steps of each on pairs of the file, read as it is (kto: each answer alone): finite losses, and the held-out pairs measured."""
    flag = "feedback" if method == "kto" else "pairs"
    module, cfg = small(method, policy=str(base / "final"), **{flag: str(HH)}, max_prompt=64, max_len=128, dtype="float32")
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert all(math.isfinite(row["loss"]) for row in rows) and {"eval/loss", "eval/accuracy"} <= set(rows[-1])


@pytest.mark.parametrize("method", [pytest.param("dpo", marks=pytest.mark.slow), pytest.param("ipo", marks=pytest.mark.long)])
def test_online_on_the_built_in_task(tmp_path, monkeypatch, method):
    """The gold reward labels fresh answers: it rises by more than ½ in 60 steps, and the held-out pairs end better ordered than by a coin.
    The loss is no signal: its labels come from the answers of the day, nearer and nearer to a coin."""
    monkeypatch.chdir(tmp_path)  # the base model is trained into runs/ of this folder
    module = importlib.import_module(f"minialign.methods.{method}")
    rows = read_rows(module.main(module.Config(steps=60, eval_every=60, online=True)) / "metrics.jsonl")
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.5 and rows[-1]["eval/accuracy"] > 0.5
