"""What the online methods have in common, held against each other: one step from the policy that sampled, they are one gradient."""

import pytest
import torch

from minialign.kl import moved
from minialign.logps import token_logps
from minialign.methods import grpo, ppo, rebel, reinforce, rloo
from minialign.sample import sample
from tests.enumerable import EOS, tiny_gpt


def first_rollout(dtype=torch.float64, tau=1.0):
    policy = tiny_gpt(dtype=dtype)
    return policy, sample(policy, [[0], [1], [2, 0, 1]], max_new=3, n=4, tau=tau, eos_id=EOS, seed=0)


def flat(loss, policy):
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_one_gradient_at_ratio_one(tau):
    """The same advantages: REINFORCE, RLOO, GRPO (dr_grpo, β = 0, constant 1) give one gradient, PPO the same times completions/tokens,
    REBEL 4/η of the pairwise form. Ratio exactly 1, clip 0, KL to an equal ref exactly 0."""
    policy, answers = first_rollout(tau=tau)
    A = torch.randn(len(answers), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = len(answers) / int(answers.mask.sum())

    cfg = reinforce.Config(tau=tau)
    answers.advantages = A
    expected = flat(reinforce.step(policy, answers, cfg)[0], policy)
    loss, stats = rloo.step(policy, answers, rloo.Config(tau=tau), on_policy=True)
    assert torch.allclose(flat(loss, policy), expected, atol=1e-12) and stats["ratio"] == 1 and stats["clip_ratio/region_mean"] == 0

    answers.ref_logps = token_logps(policy, answers, tau=tau).detach()
    settings = grpo.Config(tau=tau, beta=0.3, aggregate="dr_grpo", max_new=1)
    loss, stats = grpo.step(policy, answers, settings, on_policy=True)
    assert torch.allclose(flat(loss, policy), expected, atol=1e-12) and stats["ratio"] == 1  # k3's gradient is 0 at π = ref

    value_model = policy.with_scalar_head()
    answers.values = answers.returns = torch.zeros_like(answers.ref_logps)
    answers.advantages = A[:, None].expand_as(answers.ref_logps)
    loss, _, stats = ppo.step(policy, value_model, answers, ppo.Config(tau=tau), on_policy=True)
    assert torch.allclose(flat(loss, policy), expected * size, atol=1e-12)
    assert stats["ratio"] == 1 and stats["clip_ratio/region_mean"] == 0 and stats["approx_kl"] == 0

    # (0 − (R − R'))² has the gradient −(2/η)(R − R')(∇log π − ∇log π'); a leave-one-out pair is A = ±(R − R'): twice the mean over rows.
    answers.advantages, answers.rewards = rloo.leave_one_out(A, group_size=2), A
    expected = flat(reinforce.step(policy, answers, cfg)[0], policy)
    loss, _ = rebel.step(policy, answers, rebel.Config(tau=tau, eta=0.6), on_policy=True)
    assert torch.allclose(flat(loss, policy), 4 / 0.6 * expected, atol=1e-12)


@pytest.mark.parametrize("n", [41, 47, 188])
def test_on_policy_steps_on_a_device_that_multiplies_by_1_over_n(monkeypatch, n):
    """CUDA's mean is the sum times float32(1/n), so the mean of n ones is .99999994. The ratio of every completion is 1 all the same."""
    monkeypatch.setattr(torch.Tensor, "mean", lambda self: self.sum() * torch.tensor(1 / self.numel(), dtype=torch.float32))
    assert torch.ones(n).mean() != 1
    policy = tiny_gpt(dtype=torch.float32)
    answers = sample(policy, [[0]], max_new=3, n=2 * n, eos_id=EOS, seed=0)  # n pairs for rebel, n completions for the others
    answers.rewards, answers.ref_logps = torch.ones(2 * n), torch.zeros_like(answers.old_logps)
    answers.advantages, answers.values, answers.returns = torch.ones(2 * n), answers.ref_logps, answers.ref_logps
    rebel.step(policy, answers, rebel.Config(), on_policy=True)
    answers = answers[:n]
    assert rloo.step(policy, answers, rloo.Config(), on_policy=True)[1]["ratio"] != 1  # an assertion of the mean would fail
    grpo.step(policy, answers, grpo.Config(), on_policy=True)
    answers.advantages = answers.ref_logps
    ppo.step(policy, policy.with_scalar_head(), answers, ppo.Config(), on_policy=True)


def test_a_log_prob_that_moved_is_noticed():
    """By its own size, however small its share of the mean; NaN is left to run.may_update."""
    logps = torch.zeros(1000, 4)
    assert not moved(logps, logps.clone()) and not moved(logps * torch.nan, logps)
    logps[7, 3] = 1e-30
    assert moved(logps, torch.zeros(1000, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_samplers_log_probs_are_those_of_training(dtype):
    """Without on_policy the ratio is that of two computations of one number: within 1e-6 of 1."""
    policy, answers = first_rollout(dtype)
    logps = token_logps(policy, answers)
    assert ((logps - answers.old_logps).exp() - 1).abs().max() < 1e-6
    answers.advantages = torch.ones(len(answers), dtype=dtype)
    _, stats = rloo.step(policy, answers, rloo.Config(), on_policy=False)
    assert abs(stats["ratio"] - 1) < 1e-6


@pytest.mark.parametrize("method", ["rloo", "grpo", "ppo", "rebel"])
def test_later_epochs_compare_with_the_policy_that_sampled(small, method):
    """epochs = 3: the ratio (of REBEL: what is explained) leaves its start with the second update."""
    from minialign.engine.common import read_rows

    stat = "explained" if method == "rebel" else "ratio"
    module, cfg = small(method, epochs=1, lr=3e-2)
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert all(row[stat] == (0 if method == "rebel" else 1) for row in rows)
    module, cfg = small(method, epochs=3, lr=3e-2)
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert any(abs(row[stat] - (0 if method == "rebel" else 1)) > 1e-3 for row in rows)


@pytest.mark.parametrize("method", ["reinforce", "rloo", "grpo", "ppo", "rebel"])
def test_step_zero_of_a_run(small, method, capsys):
    """Before step 1 a run says that the ratio is 1 and the KL 0; its first row has a KL of 0 up to the sampler's rounding."""
    from minialign.engine.common import read_rows

    module, cfg = small(method, dtype="float32", steps=1)
    row = read_rows(module.main(cfg) / "metrics.jsonl")[0]
    assert "KL to ref: 0 nats" in capsys.readouterr().out
    assert abs(row["kl"]) < 1e-5 and 0 <= row["kl_k3"] < 1e-9  # sums of float32 log-probs: two computations of one number
    module, cfg = small(method, dtype="float64", steps=1)
    row = read_rows(module.main(cfg) / "metrics.jsonl")[0]
    assert abs(row["kl"]) < 1e-12 and 0 <= row["kl_k3"] < 1e-24


@pytest.mark.parametrize("method", ["reinforce", "rloo", "grpo", "ppo", "rebel"])
def test_a_mismatch_between_sampling_and_training_is_refused(small, method, monkeypatch):
    """A sampler at another temperature than the log-probs: the run stops before step 1 and says by how much."""
    from minialign.engine import look
    from minialign.engine.common import BadInput

    monkeypatch.setattr(look, "sample", lambda *args, tau, **kwargs: sample(*args, tau=1.3, **kwargs))
    module, cfg = small(method)
    with pytest.raises(BadInput, match="sampler and training pass differ by"):
        module.main(cfg)


def test_siblings_have_one_config_but_for_their_own_knobs():
    """The same field means the same thing: every field shared by two online methods has one comment and type."""
    from minialign.settings import field_comments

    seen = {}
    for module in (reinforce, rloo, grpo, ppo, rebel):
        for name, comment in field_comments(module.Config).items():
            seen.setdefault(name, set()).add((comment, str(module.Config.__dataclass_fields__[name].type)))
    own = {"beta", "eps", "steps", "batch_size", "out", "epochs"}  # said in the method's own words
    assert {name: entries for name, entries in seen.items() if len(entries) > 1 and name not in own} == {}
