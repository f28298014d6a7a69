"""Best-of-n. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch

import minialign.sample as sample_module
from minialign.engine.common import BadInput, read_rows
from minialign.engine.tracking import TIMED
from minialign.methods import best_of_n
from tests.enumerable import padded, random_rows
from tests.killing import result_of
from toy import closed_form


@pytest.fixture
def m():
    return best_of_n


REF, REWARD = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])


def by_enumeration(ref, reward, n):
    """All draws of n, each with its probability, the first of the best kept."""
    law = np.zeros(len(ref))
    for draw in product(range(len(ref)), repeat=n):
        best = max(draw, key=lambda y: reward[y])  # max keeps the first
        law[best] += ref[list(draw)].prod()
    return law


def test_the_law_equals_enumeration():
    """π = .5 .3 .2, rewards rising, n = 4: .5⁴ = .0625, .8⁴ − .5⁴ = .3471, 1 − .8⁴ = .5904. And with ties, and five completions."""
    assert closed_form.best_of_n_law(REF, REWARD, 4).tolist() == pytest.approx([0.0625, 0.3471, 0.5904], abs=1e-12)
    rng = np.random.default_rng(0)
    for reward in ([0, 1, 2, 3, 4], [1, 0, 1, 0, 1], [2, 2, 2, 2, 2], [0, 3, 3, -1, 3]):
        ref = closed_form.normalise(rng.random(5))
        for n in (1, 2, 5):
            law = closed_form.best_of_n_law(ref, np.array(reward, dtype=float), n)
            assert law.tolist() == pytest.approx(by_enumeration(ref, reward, n).tolist(), abs=1e-12)


def test_the_bound(m):
    """log n − (n − 1)/n: .193147, .636294, 1.204442, 2.496986; above the exact .559751 of the law above; met by many equal completions
    with rewards all different."""
    for n, bound in ((1, 0), (2, 0.193147), (4, 0.636294), (8, 1.204442), (32, 2.496986)):
        assert m.kl_bound(n) == pytest.approx(bound, abs=1e-6)
    assert closed_form.kl(closed_form.best_of_n_law(REF, REWARD, 4), REF) == pytest.approx(0.559751, abs=1e-6)
    uniform = np.full(20_000, 1 / 20_000)
    assert closed_form.kl(closed_form.best_of_n_law(uniform, np.arange(20_000.0), 4), uniform) == pytest.approx(m.kl_bound(4), abs=1e-3)


def test_pick_by_hand(m):
    assert m.pick(torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])).tolist() == [1, 0, 0]  # of equals the first


def test_picked_samples_follow_the_law(m):
    """20,000 draws of 4: each frequency within four standard errors."""
    draws = torch.multinomial(torch.tensor(REF), 80_000, replacement=True, generator=torch.Generator().manual_seed(0)).view(-1, 4)
    rewards = torch.tensor([0.0, 1.0, 1.0])[draws]  # two of three tie
    winners = draws.gather(1, m.pick(rewards)[:, None]).squeeze(1)
    law = closed_form.best_of_n_law(REF, np.array([0.0, 1.0, 1.0]), 4)
    frequency = np.bincount(winners, minlength=3) / 20_000
    assert (np.abs(frequency - law) < 4 * np.sqrt(law * (1 - law) / 20_000)).all()


def test_expected_max(m):
    """0 1 2 3 and n = 2: 14/6; every n against the mean over all subsets; n = 1 is the mean, n = N the maximum."""
    assert m.expected_max([3, 1, 0, 2], 2) == pytest.approx(14 / 6)
    rewards = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in range(1, 8):
        subsets = [max(subset) for subset in combinations(rewards.tolist(), n)]
        assert m.expected_max(rewards, n) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
    assert m.expected_max(torch.arange(3000.0), 1500) < 3000  # no overflow
    for n in (0, 8):
        with pytest.raises(BadInput, match="expected_max needs at least"):
            m.expected_max(rewards, n)


def test_the_loss_by_hand_and_its_padding(m):
    """Two winners of −1 −2 and −.5: (3 + .5)/2; nll per token 3.5/3."""
    logps = torch.tensor([[-1.0, -2.0], [-0.5, 99.0]], dtype=torch.float64)
    loss, stats = m.best_of_n_loss(logps, torch.tensor([[1, 1], [1, 0]]))
    assert loss.item() == pytest.approx(1.75) and stats["nll"].item() == pytest.approx(3.5 / 3)
    logps, _, _, mask = random_rows()
    assert torch.allclose(m.best_of_n_loss(*padded(logps, mask))[0], m.best_of_n_loss(logps, mask)[0], atol=1e-14)


def test_a_run_keeps_the_best_and_renews_its_sampler(small, monkeypatch):
    """reward/best is the mean of the row maxima of what was scored; with rounds=3 of 6 steps the sampler changes at steps 3 and 5."""
    scored, samplers = [], []
    original = best_of_n.sample

    def counted(old, *args, **how):
        samplers.append(old.tok_embed.weight.sum().item())
        return original(old, *args, **how)

    monkeypatch.setattr(best_of_n, "sample", counted)
    module, cfg = small("best_of_n", n=3, rounds=3)
    monkeypatch.setattr(best_of_n, "pick", lambda rewards: scored.append(rewards) or rewards.argmax(-1))
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert [row["reward/best"] for row in rows] == pytest.approx([float(s.max(1).values.mean()) for s in scored], abs=1e-6)
    assert all(s.shape == (8, 3) for s in scored) and [row["round"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [a == b for a, b in zip(samplers, samplers[1:], strict=False)] == [True, False, True, False, True]
    with pytest.raises(BadInput, match="--rounds 9: there are only 6 steps"):
        module.main(small("best_of_n", rounds=9)[1])


def test_kl_bound_is_increasing_and_below_log_n(m):
    bounds = [m.kl_bound(n) for n in range(1, 50)]
    assert bounds == sorted(bounds) and all(bound <= math.log(n) for n, bound in enumerate(bounds, start=1))


def test_what_main_trains_on_are_the_winners_under_their_own_prompts(small, monkeypatch):
    """Every row given to step, decoded: a prompt of the file, its completion one of those drawn for it, and their rewards reward/best."""
    from minialign.data import read_prompts
    from minialign.rewards import open_reward
    from minialign.tokenizer import load_tokenizer

    module, cfg = small("best_of_n", n=4, held_out=0.0)
    drawn, given = [], []
    sample, step = best_of_n.sample, best_of_n.step

    def recorded(old, prompts_ids, **how):
        answers = sample(old, prompts_ids, **how)
        drawn.append({(tuple(prompts_ids[b // 4]), tuple(ids)) for b, ids in enumerate(answers.completions)})
        return answers

    monkeypatch.setattr(best_of_n, "sample", recorded)
    monkeypatch.setattr(best_of_n, "step", lambda policy, batch, cfg: given.append(batch) or step(policy, batch, cfg))
    rows, tokenizer = read_rows(module.main(cfg) / "metrics.jsonl"), load_tokenizer(cfg.policy)
    reward, prompts = open_reward(cfg.reward, prompts=cfg.prompts), set(read_prompts(cfg.prompts))
    for row, pairs, batch in zip(rows, drawn, given, strict=True):
        texts = []
        for inputs, targets, mask in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.mask.tolist(), strict=True):
            first = mask.index(True)
            prompt, completion = inputs[: first + 1], [token for token, scored in zip(targets, mask, strict=True) if scored]
            assert (tuple(prompt), tuple(completion)) in pairs and tokenizer.decode_prompt(prompt) in prompts
            texts.append(tokenizer.decode(completion))
        assert float(reward([""] * len(texts), texts).mean()) == pytest.approx(row["reward/best"], abs=1e-6)


def test_answers_of_several_steps_are_drawn_together(small, monkeypatch):
    """On a GPU: here room for 70 rows, two steps of 8 prompts with 4 answers. Rounds of 3 steps are drawn as 2 + 1; the run is that of
    single draws to rounding. Killed in the middle of a pair, it draws the pair again and goes on bitwise."""
    settings = dict(rounds=2, n=4, steps=6, save_every=1)
    module, cfg = small("best_of_n", **settings)
    alone = read_rows(module.main(cfg) / "metrics.jsonl")
    monkeypatch.setattr(sample_module, "most_rows", lambda *_: 70)
    drawn, draw = [], best_of_n.draw_together
    monkeypatch.setattr(best_of_n, "draw_together", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    module, cfg = small("best_of_n", **settings)
    folder = module.main(cfg)
    assert [[*steps] for steps in drawn] == [[0, 1], [2], [3, 4], [5]]
    for one, other in zip(alone, read_rows(folder / "metrics.jsonl"), strict=True):
        one, other = ({name: value for name, value in row.items() if name not in TIMED} for row in (one, other))
        assert other == pytest.approx(one, abs=1e-9)
    whole, step, calls = result_of(folder), best_of_n.step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return step(*args)

    module, cfg = small("best_of_n", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(best_of_n, "step", dies)
        with pytest.raises(MemoryError):
            module.main(cfg)
    assert result_of(module.main(module.Config(resume=cfg.out))) == whole
