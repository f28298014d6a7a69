import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minialign import demo, evaluate
from minialign.engine.common import BadInput
from minialign.task import EXPERT, builtin_law, builtin_pairs, builtin_prompt
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained

ROOT = Path(__file__).parent.parent


def test_the_measure(policy_folder):
    """KL(expert‖π) and the gap against one completion at a time with log_softmax; base against itself is a tie everywhere."""
    policy, tokenizer = load_pretrained(policy_folder), load_tokenizer(policy_folder)

    def logp(prompt, text):
        x, y = [tokenizer.bos_id] + tokenizer.encode(prompt), tokenizer.encode(text) + [tokenizer.eos_id]
        logps = policy(torch.tensor([x + y])).log_softmax(-1)[0]
        return sum(float(logps[len(x) - 1 + i, token].detach()) for i, token in enumerate(y))

    numbers, rewards, answers = demo.measure_policy(policy, policy, tokenizer, seed=0)
    total = 0.0
    for thing in demo.THINGS:
        prompt = builtin_prompt(thing)
        total += sum(p * (math.log(p) - logp(prompt, text)) for text, p in builtin_law(prompt, EXPERT).items())
    assert numbers["KL(expert‖π)"] == pytest.approx(total / len(demo.THINGS), rel=1e-9)
    gaps = [logp(pair.prompt, pair.chosen) - logp(pair.prompt, pair.rejected) for pair in builtin_pairs(seed=1)]
    assert numbers["gap"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-9)
    assert (numbers["implicit"], numbers["KL(π‖base)"]) == pytest.approx((0.5, 0), abs=1e-9)
    assert len(rewards) == len(answers) == len(demo.THINGS) and len(rewards[0]) == 8


def test_exact_rows():
    """The expert: politeness .9, so gold reward 1 + 2·(.9 − .1) = 2.6; rude speakers at .25: 1 + 2·(.25 − .75) = 0, and KL
    2·(.9 log .9/.25 + .1 log .1/.75) = 1.902700. Gap: a slot that is polite in the chosen and rude in the rejected answer counts
    log(.9/.1) for the expert, log(.25/.75) for rude speakers, so the two gaps have the ratio of these logs."""
    expert, rude = (demo.exact_rows()[name] for name in ("expert (exact)", "rude speakers (exact)"))
    assert (expert["gold reward"], expert["KL(expert‖π)"], expert["KL(π‖base)"]) == pytest.approx((2.6, 0, 1.902700), abs=1e-6)
    assert (rude["gold reward"], rude["KL(expert‖π)"], rude["KL(π‖base)"]) == pytest.approx((0, 1.902700, 0), abs=1e-6)
    assert expert["gap"] > 0 and rude["gap"] / expert["gap"] == pytest.approx(math.log(1 / 3) / math.log(9))
    assert rude["implicit"] == 0.5 and 0.6 < expert["implicit"] < 0.8


def test_verdict():
    """[1, 2, 3]: mean 2, deviation 1, half-width 4.30/√3 = 2.482606, so 0 lies inside. [2, 2.1, 2.2]: deviation .1, half .248261, holds."""
    assert evaluate.verdict([1.0, 2, 3]) == (2.0, pytest.approx(2.482606, abs=1e-5), 3, "not separable")
    assert evaluate.verdict([2.0, 2.1, 2.2]) == (pytest.approx(2.1), pytest.approx(0.248261, abs=1e-5), 3, "holds")
    assert evaluate.verdict([-2.0, -2.1, -2.2])[2:] == (0, "does not hold")
    assert evaluate.verdict([5.0])[2:] == (1, "not separable")  # one seed has no interval


NAMES = ("base", demo.SFT, demo.IFT, *(demo.irft_name(T) for T in demo.ROUNDS), demo.RFT, demo.IRL, demo.BEST)


def test_every_claim_is_a_difference_of_these_runs():
    """A table of numbered cells: each claim's difference by hand for the first seed; with two rows exchanged the verdict flips."""
    table = {name: {column: [10.0 * i + j + 0.01 * seed for seed in range(3)] for j, column in enumerate(demo.COLUMNS)}
             for i, name in enumerate(NAMES)}
    accuracy = [[0.5, 0.6 + 0.001 * seed] for seed in range(3)]
    found = {(source, claim): differences for source, claim, differences in demo.claims(table, accuracy)}
    assert len(found) >= 20 and all(len(differences) == 3 for differences in found.values())
    rows = (demo.SPIN, demo.SFT, demo.RFT, demo.IRL, demo.irft_name(5), demo.BEST)
    spin, sft, rft, irl, five, best = (NAMES.index(name) for name in rows)
    gap, wins, implicit = (demo.COLUMNS.index(column) for column in ("gap", "wins over SFT", "implicit"))
    for (source, claim), value in {
        ("RFT/IRFT, Fig. 1", "SFT's gap is below 0"): -(10 * sft + gap), ("RFT/IRFT, Fig. 1", "SPIN's gap is above 0"): 10 * spin + gap,
        ("RFT/IRFT, Fig. 2", "RFT's reward is above SFT's"): 10 * (rft - sft),
        ("RFT/IRFT, Fig. 2", "RFT wins against SFT"): 10 * rft + wins - 0.5,
        ("RFT/IRFT, Tab. 3", "IRFT's reward, T = 5, is above SPIN's"): 10 * (five - spin),
        ("IRL, Fig. 2a", "the reward's accuracy rises over rounds"): 0.1,
        ("IRL, Tab. 1", "its reward is more accurate than SPIN's"): 0.6 - (10 * spin + implicit),
        ("IRL, Fig. 2c", "IRL wins against SFT (paper: demonstrations)"): 10 * irl + wins - 0.5,
        ("their price", "SPIN is farther from the expert than SFT"): 10 * (spin - sft),
        ("best-of-n", "a learned reward lifts it above SFT"): 10 * (best - sft),
    }.items():
        assert found[source, claim][0] == pytest.approx(value), claim
    assert evaluate.verdict(found["RFT/IRFT, Fig. 2", "RFT's reward is above SFT's"])[3] == "holds"
    table[demo.RFT], table[demo.SFT] = table[demo.SFT], table[demo.RFT]
    turned = {(source, claim): differences for source, claim, differences in demo.claims(table, accuracy)}
    assert evaluate.verdict(turned["RFT/IRFT, Fig. 2", "RFT's reward is above SFT's"])[3] == "does not hold"


def test_wins_are_over_sft_of_the_same_seed():
    """Seed 0: SFT's rewards 0 everywhere, RFT's 1: all won. Seed 1: the other way round."""
    numbers = dict.fromkeys(("gold reward", "gap", "implicit", "KL(expert‖π)", "KL(π‖base)"), 0.0)

    def run(name, seed, reward):
        return {"name": name, "seed": seed, "numbers": numbers, "rewards": [[reward] * 2] * 3}

    table = demo.table_of([run(demo.SFT, 1, 1.0), run(demo.RFT, 0, 1.0), run(demo.SFT, 0, 0.0), run(demo.RFT, 1, 0.0)])
    assert table[demo.RFT]["wins over SFT"] == [1.0, 0.0] and table[demo.SFT]["wins over SFT"] == [0.5, 0.5]


@pytest.mark.parametrize("settings", [dict(seeds=0), dict(steps=3), dict(workers=-1)])
def test_bad_settings(settings, tmp_path):
    with pytest.raises(BadInput, match="at least"):
        demo.main(demo.Config(**settings, out=str(tmp_path / "demo")))


def test_a_folder_with_work_in_it_is_refused(tmp_path):
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(BadInput, match="not empty"):
        demo.main(demo.Config(out=str(tmp_path)))


@pytest.mark.slow
def test_the_demo(tmp_path):
    """The whole of `make demo` after the install, in a fresh folder: exit code 0, a table and two figures."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "minialign", "demo", "--out", "runs/demo"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "55 of 55 on their law" in result.stdout and "expert (exact)" in result.stdout and "holds" in result.stdout
    content = json.loads((tmp_path / "runs/demo/table.json").read_text())
    assert set(content["table"]) == set(NAMES) and all(len(values["gap"]) == 5 for values in content["table"].values())
    for figure in ("demo.png", "three_actions.png"):
        assert (tmp_path / "runs/demo" / figure).stat().st_size > 20_000
    for claim in content["claims"]:  # each verdict is that of its own numbers, and stands in the output
        assert claim["verdict"] == evaluate.verdict(claim["differences"])[3] and claim["claim"] in result.stdout
    # What holds in this setting on every seed, and does so by a wide margin:
    base, sft, spin, rft = (content["table"][name] for name in ("base", demo.SFT, demo.SPIN, demo.RFT))
    assert min(sft["gold reward"]) > max(base["gold reward"]) + 0.5 and max(sft["KL(expert‖π)"]) < min(base["KL(expert‖π)"])
    assert min(spin["gap"]) > max(sft["gap"]) and min(spin["KL(expert‖π)"]) > max(sft["KL(expert‖π)"])
    assert min(rft["gold reward"]) > max(base["gold reward"]) + 1 and min(rft["gap"]) > max(base["gap"]) + 0.5
