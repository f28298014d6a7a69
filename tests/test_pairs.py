"""The loop of the six methods for pairs: the labels of --online, the reference, the learning rate.

Whole runs: tests/test_preference_runs.py; wrong variants: tests/test_wrong_variants.py.
"""

import pytest
import torch

from minialign import pairs
from minialign.engine.common import BadInput, read_rows
from minialign.methods import dpo, gpo, ipo, orpo, simpo, slic
from tests.engine.test_parallel import go_back_to
from tests.enumerable import tiny_gpt
from tests.killing import result_of


@pytest.fixture
def m():
    return pairs


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_run_in_rounds_resumes_with_the_reference_of_its_round(small, method):
    """Six steps in two rounds: the reference is the policy after step 3. From the checkpoint of step 4 the run ends as the unbroken one."""
    settings = dict(steps=6, rounds=2, save_every=4, lr=1e-2, beta=0.3)
    module, cfg = small(method, **settings)
    folder = module.main(cfg)
    expected, (_, other) = result_of(folder), small(method, **settings | {"rounds": 1})
    one_round = module.main(other)
    go_back_to(folder, 4)
    assert result_of(module.main(module.Config(resume=str(folder)))) == expected
    losses = [[row["loss"] for row in read_rows(path / "metrics.jsonl")] for path in (folder, one_round)]
    assert losses[0][:3] == losses[1][:3] and losses[0][3:] != losses[1][3:]


@pytest.mark.parametrize(("method", "changes", "message"), [
    ("slic", {"rounds": 2}, "--rounds 2: slic has no reference that a round could renew; dpo, ipo and gpo have one"),
    ("dpo", {"rounds": 2, "precompute_ref": True}, "--precompute_ref: with --rounds the reference changes; drop one of the two"),
    ("ipo", {"rounds": 7, "steps": 6}, "--rounds 7: there are only 6 steps to divide into rounds"),
    ("grpo", {"rounds": 7, "steps": 6}, "--rounds 7: there are only 6 steps to divide into rounds"),
    ("gpo", {"rounds": 0}, "--rounds 0: must be at least 1"),
])
def test_rounds_that_cannot_be(small, method, changes, message):
    module, cfg = small(method, **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)


def test_pairs_are_labelled_by_their_rewards(m):
    """Of 4000 pairs with one difference of rewards the first answer is chosen σ(r₁ − r₂) of the time, within 4 standard errors: σ(1.2) is
    .768525. Equal rewards are a fair coin, rewards far apart no coin at all. What belongs together stays together; the seed decides."""
    n = 4000
    prompts = [[b] for b in range(n)]
    completions = [[b, side] for b in range(n) for side in (0, 1)]
    for first, second, p in ((0.7, -0.5, 0.768525), (-0.5, 0.7, 0.231475), (3.0, 3.0, 0.5), (50.0, -50.0, 1.0), (-1e4, 1e4, 0.0)):
        rows = m.label_by_reward(prompts, completions, torch.tensor([first, second]).repeat(n), 7)
        assert len(rows) == n
        assert all((x, sorted([chosen, rejected])) == ([b], [[b, 0], [b, 1]]) for b, (x, chosen, rejected) in enumerate(rows))
        share = sum(chosen[1] == 0 for _, chosen, _ in rows) / n
        assert abs(share - p) <= 4 * (p * (1 - p) / n) ** 0.5
    rewards = torch.randn(2 * n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = m.label_by_reward(prompts, completions, rewards, 7)
    again, other = (m.label_by_reward(prompts, completions, rewards, seed) == rows for seed in (7, 8))
    assert again and not other
    won = torch.tensor([chosen[1] == 0 for _, chosen, _ in rows]).double()  # Σ (won − p)·d over its own spread: a standard normal
    d = rewards[::2] - rewards[1::2]
    p = torch.sigmoid(d)
    assert abs(((won - p) * d).sum() / (p * (1 - p) * d**2).sum().sqrt()) < 4


@pytest.mark.parametrize(("method", "held"), [(dpo, True), (ipo, True), (gpo, True), (simpo, False), (orpo, False), (slic, False)])
def test_ref_is_the_policy_as_it_was_and_only_where_beta_pulls_to_it(m, method, held):
    """It has memory of its own: what is added to the policy afterwards does not reach it; and no gradient does."""
    policy = tiny_gpt()
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    ref = m.frozen_reference(policy, method.Config())
    assert (ref is not None) == held
    if held:
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(1)
        assert all(torch.equal(weight, before[name]) and not weight.requires_grad for name, weight in ref.named_parameters())
        assert all(weight.requires_grad for weight in policy.parameters())


def test_each_step_has_the_rate_of_its_own_place(small):
    """Warm-up over 2 of 6 steps, then linear: 1/2, 1, 1, 3/4, 1/2 and 1/4 of --lr."""
    module, cfg = small("dpo", warmup=0.34, schedule="linear", lr=0.004)
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([0.002, 0.004, 0.004, 0.003, 0.002, 0.001])
