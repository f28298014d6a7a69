"""The commands of docs/RESULTS.md on real Anthropic-HH transcripts, a few steps of each: base, SFT, IRFT, reward model, evaluation."""

import math
from pathlib import Path

import pytest

from minialign import evaluate
from minialign.common import read_rows
from minialign.methods import irft, reward_model, sft

HH = Path(__file__).parent.parent.parent / "shared" / "data" / "hh_harmless.jsonl.gz"


@pytest.mark.slow
@pytest.mark.skipif(not HH.is_file(), reason="the transcripts (../shared/data/hh_harmless.jsonl.gz) are not part of the project")
def test_the_first_real_run_in_small(tmp_path, capsys):
    base = sft.main(sft.Config(text=str(HH), policy="new", layers=2, width=64, vocab=600, max_len=128, steps=40, batch_size=8, lr=5e-3,
                               eval_every=40, out=str(tmp_path / "base")))
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
    assert [row["n"] for row in table] == [180] * 4 and "180 pairs of" in out and "reward model" in out and "±" in out
    assert table[1]["nll"][0] < table[0]["nll"][0]  # SFT lowers what it minimises, on transcripts it never saw
    assert all(0 <= row["implicit_accuracy"][0] <= 1 for row in table[:3]) and 0.3 < table[3]["accuracy"][0] < 0.8
