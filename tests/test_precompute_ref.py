"""Reference log-probs computed once: the numbers of a second model without one, also when the run is cut in the middle of a round."""

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minialign.engine import run
from minialign.engine.common import BadInput, read_rows
from minialign.engine.tracking import TIMED
from minialign.logps import Remembered, seq_logps, token_logps
from minialign.methods import irft
from minialign.model import GPT
from minialign.weights import load_pretrained
from tests.killing import result_of

METHODS = ("dpo", "ipo", "gpo", "irft")
MORE = {"irft": {"rounds": 3}}


def test_a_row_is_known_in_any_batch_and_padding(policy_folder):
    from minialign.batch import collate

    policy = load_pretrained(policy_folder)
    prompts, completions = [[5, 6], [7], [5, 6]], [[8, 9, 3], [4], [8]]
    batch = collate(prompts, completions, pad_id=0)
    remembered = Remembered()
    with torch.no_grad():
        remembered.learn(batch, seq_logps(policy, batch))
        for rows in ([0], [1], [2, 1], [2, 0, 1]):
            some = collate([prompts[b] for b in rows], [completions[b] for b in rows], pad_id=1)
            assert torch.allclose(seq_logps(remembered, some), token_logps(policy, some).sum(1), atol=1e-12)
    last = collate([[5, 6]], [[8, 9, 4]], pad_id=0)  # differs in the last token alone, which is a target and no input
    with pytest.raises(KeyError):
        seq_logps(remembered, last)
    with pytest.raises(KeyError):  # the same tokens, but another split into prompt and completion
        seq_logps(remembered, collate([[5]], [[6, 8, 9, 3]], pad_id=0))


@pytest.mark.parametrize("method", ["dpo", pytest.param("irft", marks=pytest.mark.slow),
                                    *[pytest.param(method, marks=pytest.mark.long) for method in ("ipo", "gpo")]])  # their loop is dpo's
def test_equal_to_a_second_model_without_one(small, method, monkeypatch):
    """All metrics and the weights to 1e-10 in float64; while training one GPT is alive, where without the flag there are two."""
    alive, log = [], run.Run.log

    def counting(self, *arguments, **metrics):
        log(self, *arguments, **metrics)
        gc.collect()
        alive.append(sum(type(thing) is GPT for thing in gc.get_objects()))

    monkeypatch.setattr(run.Run, "log", counting)
    settings = dict(steps=6, micro_batch=3, **MORE.get(method, {}))
    gc.collect()
    before = sum(type(thing) is GPT for thing in gc.get_objects())
    module, cfg = small(method, **settings)
    two = module.main(cfg)
    assert max(alive) == before + 2
    alive.clear()
    gc.collect()
    before = sum(type(thing) is GPT for thing in gc.get_objects())
    module, cfg = small(method, precompute_ref=True, **settings)
    one = module.main(cfg)
    assert max(alive) == before + 1
    for left, right in zip(read_rows(two / "metrics.jsonl"), read_rows(one / "metrics.jsonl"), strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {*TIMED, "rewards/accuracies", "eval/accuracy"}:  # at the start margins are 0 but for rounding
            assert left[name] == pytest.approx(right[name], abs=1e-10), name
    left, right = (load_pretrained(folder / "final") for folder in (two, one))
    assert all((p - q).abs().max() < 1e-10 for p, q in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("method", ["dpo", "irft"])
def test_resume_in_the_middle_is_bitwise(small, method):
    """From step 4 of 6, for IRFT in the middle of the second round: as the unbroken run. What was kept is read, not made anew."""
    settings = dict(steps=6, save_every=4, precompute_ref=True, **({"rounds": 2} if method == "irft" else {}))
    module, cfg = small(method, **settings)
    whole = module.main(cfg)
    cut = whole.with_name("cut")
    shutil.copytree(whole, cut)
    for name in ("checkpoints/step_000006", "final"):
        shutil.rmtree(cut / name)
    file = cut / ("rounds/000001/000004.json" if method == "irft" else "ref_logps.json")
    stamp = file.stat().st_mtime_ns
    assert result_of(module.main(module.Config(resume=str(cut)))) == result_of(whole) and file.stat().st_mtime_ns == stamp


def test_a_run_killed_while_it_computes_a_round_keeps_the_steps_before(small, monkeypatch):
    """Killed while it samples step 5 of 6, the last but one of the second round: once resumed from step 3, it samples only that one and the
    last, and ends as the unbroken run, bit for bit. So does a run whose rounds are in one file each, as earlier versions wrote them."""
    module, cfg = small("irft", steps=6, save_every=3, rounds=2, precompute_ref=True)
    expected, rollout, sampled = result_of(module.main(cfg)), irft.rollout, []

    def dying(*arguments):
        sampled.append(1)
        if len(sampled) == 5:
            raise KeyboardInterrupt
        return rollout(*arguments)

    monkeypatch.setattr(irft, "rollout", dying)
    module, cfg = small("irft", steps=6, save_every=3, rounds=2, precompute_ref=True)
    with pytest.raises(KeyboardInterrupt):
        module.main(cfg)
    earlier = Path(cfg.out).with_name("earlier")
    shutil.copytree(cfg.out, earlier)
    assert result_of(module.main(module.Config(resume=cfg.out))) == expected and len(sampled) == 5 + 2
    for t in (0, 1):
        files = sorted((Path(cfg.out) / f"rounds/{t:06d}").iterdir())
        made = [json.loads(file.read_text())["value"] for file in files]
        shutil.rmtree(earlier / f"rounds/{t:06d}")
        (earlier / f"rounds/{t:06d}.json").write_text(json.dumps({name: [each[name] for each in made] for name in made[0]}))
    assert result_of(module.main(module.Config(resume=str(earlier)))) == expected and len(sampled) == 5 + 2


def test_what_was_kept_is_asked_for_when_the_policy_has_moved(small):
    for method, file in (("dpo", "ref_logps.json"), ("irft", "rounds/000000/000002.json")):
        module, cfg = small(method, steps=6, save_every=3, precompute_ref=True)
        folder = module.main(cfg)
        shutil.rmtree(folder / "checkpoints/step_000006")
        (folder / file).unlink()
        with pytest.raises(BadInput, match="is missing, and the policy of step 4 is not the reference"):
            module.main(module.Config(resume=str(folder)))


def test_log_probs_that_were_edited_are_refused(tmp_path):
    """What a run stored is read again, and is that of its first reading or nothing."""
    stub = SimpleNamespace(folder=tmp_path, first_step=0)
    read = lambda: run.Run.compute_or_read(stub, "ref_logps.json", 0, lambda: [[-1.5, -2.0]])  # noqa: E731
    assert read() == read() == [[-1.5, -2.0]]
    file = tmp_path / "ref_logps.json"
    file.write_text(file.read_text().replace("-1.5", "-1.6"))
    with pytest.raises(BadInput, match="has changed since this run wrote it"):
        read()


def test_refusals(small):
    module, cfg = small("dpo", online=True, reward=["length:9"], precompute_ref=True)
    with pytest.raises(BadInput, match="--online samples new answers"):
        module.main(cfg)
    module, cfg = small("irft", ref="initial", precompute_ref=True)
    with pytest.raises(BadInput, match="--ref initial"):
        module.main(cfg)


def test_only_what_the_run_sees_is_asked(small, pairs_file):
    """Two steps of two pairs and the held-out ones, not the whole file."""
    module, cfg = small("dpo", steps=2, batch_size=2, precompute_ref=True)
    rows = json.loads((module.main(cfg) / "ref_logps.json").read_text())["value"]
    assert len(rows) == 4 + 2 < len(pairs_file.read_text().splitlines()) and all(len(row) == 2 for row in rows)
