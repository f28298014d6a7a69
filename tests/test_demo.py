import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minialign import demo
from minialign.common import BadInput
from minialign.data import EXPERT, builtin_law, builtin_prompt
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained

ROOT = Path(__file__).parent.parent


def test_kl_of_the_measure_is_exact(policy_folder):
    """KL(expert‖π) against one completion at a time with log_softmax; the random policy is far from the expert."""
    import torch

    policy, tokenizer = load_pretrained(policy_folder), load_tokenizer(policy_folder)
    numbers, samples = demo.measure(policy, tokenizer, seed=0)
    total = 0.0
    for thing in demo.THINGS:
        prompt = builtin_prompt(thing)
        x = [tokenizer.bos_id] + tokenizer.encode(prompt)
        for text, p in builtin_law(prompt, EXPERT).items():
            y = tokenizer.encode(text) + [tokenizer.eos_id]
            logps = policy(torch.tensor([x + y])).log_softmax(-1)[0]
            total += p * (math.log(p) - sum(float(logps[len(x) - 1 + i, token].detach()) for i, token in enumerate(y)))
    assert numbers["KL(expert‖π)"] == pytest.approx(total / len(demo.THINGS), rel=1e-9)
    assert len(samples) == len(demo.THINGS)


def test_exact_rows():
    """The expert: politeness .9, so gold reward 1 + 2·(.9 − .1) = 2.6 and both polite .81; rude speakers at .25: 1 + 2·(.25 − .75) = 0,
    and KL 2·(.9 log .9/.25 + .1 log .1/.75) = 1.902700. Gap: a slot that is polite in the chosen and rude in the rejected answer counts
    log(.9/.1) for the expert, log(.25/.75) for rude speakers, so the two gaps have the ratio of these logs."""
    expert, rude = (demo.exact_rows()[name] for name in ("expert (exact)", "rude speakers (exact)"))
    assert (expert["gold reward"], expert["polite"], expert["KL(expert‖π)"]) == pytest.approx((2.6, 0.81, 0))
    assert (rude["gold reward"], rude["polite"], rude["KL(expert‖π)"]) == pytest.approx((0, 0.0625, 1.902700), abs=1e-6)
    assert expert["gap"] > 0 and rude["gap"] / expert["gap"] == pytest.approx(math.log(1 / 3) / math.log(9))


def table(spin, sft):
    columns = ("gold reward", "polite", "gap", "KL(expert‖π)")
    return {name: dict.fromkeys(columns, values) for name, values in (("base", sft), ("SFT", sft), ("SPIN (IRFT, 1 round)", spin))}


VERDICTS = [([2.0, 2, 2], "3/3  holds"), ([0.0, 0, 0], "0/3  does not hold"), ([0.0, 2, 2], "not separable")]


@pytest.mark.parametrize(("spin", "verdict"), VERDICTS)
def test_verdicts_come_from_the_runs(capsys, spin, verdict):
    """Swap who wins and the verdict flips."""
    answers = {name: [("p", "t")] * 2 for name in ("base", "SFT", "SPIN (IRFT, 1 round)")}
    demo.report(table(spin, [1.0, 1, 1]), answers, demo.exact_rows(), demo.Config(seeds=3))
    assert capsys.readouterr().out.count(verdict) == 3


def test_bad_settings():
    with pytest.raises(BadInput, match="at least 1"):
        demo.main(demo.Config(seeds=0))


@pytest.mark.slow
def test_the_demo(tmp_path):
    """The whole of `make demo` after the install, in a fresh folder: exit code 0, under 5 minutes, a table and two figures."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "minialign", "demo", "--out", "runs/demo"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "18 of 18 on their law" in result.stdout and "expert (exact)" in result.stdout and "holds" in result.stdout
    content = json.loads((tmp_path / "runs/demo/table.json").read_text())
    assert len(content["table"]["SFT"]["gap"]) == 5
    for figure in ("demo.png", "three_actions.png"):
        assert (tmp_path / "runs/demo" / figure).stat().st_size > 20_000
    # What holds in this setting on every seed, and does so by a wide margin:
    base, sft, spin = (content["table"][name] for name in ("base", "SFT", "SPIN (IRFT, 1 round)"))
    assert min(sft["gold reward"]) > max(base["gold reward"]) + 0.5 and max(sft["KL(expert‖π)"]) < min(base["KL(expert‖π)"])
    assert min(spin["gap"]) > max(sft["gap"]) and min(spin["KL(expert‖π)"]) > max(sft["KL(expert‖π)"])
