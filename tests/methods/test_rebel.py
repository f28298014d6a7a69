"""REBEL. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from minialign.engine.common import BadInput, read_rows
from minialign.methods import rebel
from tests.enumerable import BETA, EOS, Enumerated, relative, tiny_gpt
from toy import closed_form


@pytest.fixture
def m():
    return rebel


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_worked_numbers(m):
    """Δ = 1, ΔR = .3: η = 1: .7² = .49; η = 2: (1/2 − .3)² = .04, and the released code's form (1 − 2·.3)² = .16 is η² times that."""
    for eta, paper, code in ((1.0, 0.49, 0.49), (2.0, 0.04, 0.16)):
        loss, _ = m.rebel_loss(f64(1.5), f64(0.5), f64(1.0), f64(0.7), eta=eta)
        assert loss.item() == pytest.approx(paper, abs=1e-12) and loss.item() * eta**2 == pytest.approx(code, abs=1e-12)


def test_the_exact_step_has_loss_zero(m):
    """π = .5 .3 .2, r = 1 0 2: π·e^{ηr}/Z has loss 0 on every pair; at η = 1 it is .433268 .095634 .471098."""
    pi, r = f64(0.5, 0.3, 0.2), f64(1, 0, 2)
    for eta in (1.0, 0.3, 2.5):
        stepped = pi * (eta * r).exp() / (pi * (eta * r).exp()).sum()
        logratio = (stepped / pi).log()
        y, other = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
        loss, stats = m.rebel_loss(logratio[y], logratio[other], r[y], r[other], eta=eta)
        assert loss.item() == pytest.approx(0, abs=1e-28) and stats["target"].item() == pytest.approx(12 / 9)
        if eta == 1.0:
            assert stepped.tolist() == pytest.approx([0.433268, 0.095634, 0.471098], abs=1e-6)


def test_first_gradient_is_the_policy_gradient(m):
    """At θ = π_t the loss over all pairs has the gradient −(4/η)·∇J: Σ π π' ·(−2/η)(ΔR)(∇log π − ∇log π') = −(4/η)·Cov(R, ∇log π)."""
    e, eta = Enumerated(prompt=1), 0.6
    R = m.kl_rewards(e.rewards, e.logps, e.ref_logps, beta=BETA)
    logratio = (e.logps - e.logps.detach()).sum(1)
    C = len(R)
    y, other = torch.cartesian_prod(torch.arange(C), torch.arange(C)).T
    root = (e.law[y] * e.law[other]).sqrt() * C  # the root of the weight goes on what is squared
    loss, stats = m.rebel_loss(root * logratio[y], root * logratio[other], root * R[y], root * R[other], eta=eta)
    assert relative(-e.gradient(loss), 4 / eta * e.gradient(e.objective())) < 1e-12
    assert loss.item() == pytest.approx(stats["target"].item(), abs=1e-12)  # nothing is explained yet


def test_penalised_rewards_by_hand(m):
    """log π = −1 −2 −.5, log ref = −1.2 −1.5 −.7: k1 = .2 −.5 .2, sum −.1; r = 1, β = .05: R = 1.005."""
    logps = f64(-1, -2, -0.5)[None].requires_grad_()
    rewards = m.kl_rewards(f64(1), logps, f64(-1.2, -1.5, -0.7)[None], beta=0.05)
    assert rewards.tolist() == pytest.approx([1.005], abs=1e-12)
    assert not rewards.requires_grad


def test_rewards_are_constants(m):
    """Nothing flows into the rewards, even if they came with a graph."""
    rewards = f64(1.0, 2.0).requires_grad_()
    m.rebel_loss(f64(0.5, 0.1).requires_grad_(), f64(0.0, 0.2), rewards, f64(0.0, 1.0), eta=1.0)[0].backward()
    assert rewards.grad is None


def test_gradient_by_finite_differences(m):
    x = [torch.randn(4, generator=torch.Generator().manual_seed(k), dtype=torch.float64, requires_grad=k < 2) for k in range(4)]
    assert gradcheck(lambda a, b: m.rebel_loss(a, b, x[2], x[3], eta=0.7)[0], x[:2])


def test_repeated_exact_steps_tend_to_the_tilt(m):
    """Three rollouts solved exactly through the loss (Newton: it is quadratic in log π) follow rebel_law, η·β ≠ 1 and η ≠ 1."""
    ref, r, beta, eta = f64(0.5, 0.3, 0.2), f64(1, 0, 2), 0.5, 0.8
    old = ref.log()
    y, other = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    for t in range(1, 4):
        R = m.kl_rewards(r, old[:, None], ref.log()[:, None], beta=beta)

        def loss_of(logps, old=old, R=R):
            return m.rebel_loss((logps - old)[y], (logps - old)[other], R[y], R[other], eta=eta)[0]

        logps = old.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(logps), logps)
        hessian = torch.autograd.functional.hessian(loss_of, old)
        old = (old - torch.linalg.pinv(hessian) @ grad).log_softmax(0)
        law = closed_form.rebel_law(ref.numpy(), r.numpy(), beta, eta, t)
        assert old.exp().tolist() == pytest.approx(law.tolist(), abs=1e-12)


def test_the_law_is_the_same_for_every_mu():
    """y ~ π_t, y' ~ μ, also a μ with a single completion: three rollouts solved exactly follow rebel_law."""
    ref, r, beta, eta = f64(0.5, 0.3, 0.2), f64(1, 0, 2), 0.5, 0.8
    y, other = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    for mu in (f64(1, 1, 1) / 3, f64(0.1, 0.8, 0.1), f64(0, 0, 1)):
        old = ref.log()
        for t in range(1, 4):
            R = rebel.kl_rewards(r, old[:, None], ref.log()[:, None], beta=beta)
            root = 3 * (old.exp()[y] * mu[other]).sqrt()  # the root of the weight goes on what is squared

            def loss_of(logps, old=old, R=R, root=root):
                return rebel.rebel_loss(root * (logps - old)[y], root * (logps - old)[other], root * R[y], root * R[other], eta=eta)[0]

            logps = old.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss_of(logps), logps)
            old = (old - torch.linalg.pinv(torch.autograd.functional.hessian(loss_of, old)) @ grad).log_softmax(0)
            assert old.exp().tolist() == pytest.approx(closed_form.rebel_law(ref.numpy(), r.numpy(), beta, eta, t).tolist(), abs=1e-12)


def test_first_gradient_with_another_mu():
    """−(2/η)·(∇J + Σ μ·(R − E_π R)·∇log π): half of the policy gradient's weight, and the better completions of μ are raised."""
    e, eta = Enumerated(prompt=1), 0.6
    C = len(e.rewards)
    mu = torch.rand(C, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    mu = mu / mu.sum()
    R = rebel.kl_rewards(e.rewards, e.logps, e.ref_logps, beta=BETA)
    seq_logps = e.logps.sum(1)
    logratio = seq_logps - seq_logps.detach()
    y, other = torch.cartesian_prod(torch.arange(C), torch.arange(C)).T
    root = (e.law[y] * mu[other]).sqrt() * C
    loss = rebel.rebel_loss(root * logratio[y], root * logratio[other], root * R[y], root * R[other], eta=eta)[0]
    raised = (mu * (R - e.law @ R) * seq_logps).sum()
    assert relative(-e.gradient(loss), 2 / eta * (e.gradient(e.objective()) + e.gradient(raised))) < 1e-12


def test_pairs_of_a_sample_and_of_mu(m):
    """Rows 2i are the samples, rows 2i + 1 the given completions, each with the log-probs of the policy and of ref at temperature tau."""
    policy, ref = tiny_gpt(seed=0), tiny_gpt(seed=1)
    prompts, sampled, others = [[0], [2, 0, 1]], [[1, EOS], [3, 2, 3]], [[2], [0, 1, EOS]]
    answers = SimpleNamespace(completions=sampled, mask=torch.zeros(1))
    tokenizer, cfg = SimpleNamespace(pad_id=3, eos_ids=[EOS, 2]), m.Config(tau=0.7, micro_batch=3)
    pairs = m.pair_up(policy, ref, answers, prompts, others, cfg, tokenizer)
    assert pairs.completions == [[1, EOS], [2], [3, 2, 3], [0, 1, EOS]] and pairs.finished.tolist() == [True, True, False, True]
    assert pairs.lengths.tolist() == [2, 1, 3, 3]
    for row, (prompt, completion) in enumerate(zip([p for p in prompts for _ in range(2)], pairs.completions, strict=True)):
        for model, logps in ((policy, pairs.old_logps), (ref, pairs.ref_logps)):
            logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
            expected = (logits / 0.7).log_softmax(-1)[torch.arange(len(completion)), completion]
            assert logps[row].sum().item() == pytest.approx(expected.sum().item(), abs=1e-12)


def test_a_run_against_a_data_set(small, demos_file, tmp_path):
    """The reward sees a completion of the file beside every sample, one of its own prompt; metrics are of the samples alone."""
    seen, rows = [], [json.loads(line) for line in demos_file.read_text().splitlines()]
    path = tmp_path / "spy.py"
    path.write_text("import json, pathlib\ndef reward(prompts, completions):\n"
                    f"    with open({str(tmp_path / 'seen.jsonl')!r}, 'a') as file:\n"
                    "        file.write(json.dumps([[str(p) for p in prompts], completions]) + '\\n')\n"
                    "    return [float(len(c)) for c in completions]\n")
    module, cfg = small("rebel", steps=3, mu=str(demos_file), reward=[f"{path}:reward"], held_out=0.25, micro_batch=2)
    metrics = read_rows(module.main(cfg) / "metrics.jsonl")
    given = {}
    for row in rows:
        given.setdefault(row["prompt"], set()).add(row["completion"])
    for line in (tmp_path / "seen.jsonl").read_text().splitlines():
        prompts, completions = json.loads(line)
        if len(prompts) == 8 and all(prompts[i] == prompts[i + 1] for i in range(0, 8, 2)):
            seen.append(completions)
            assert all(completions[i] in given[prompts[i]] for i in range(1, 8, 2))
    assert len(seen) == 3 and all(math.isfinite(row["loss"]) for row in metrics)
    assert [row["reward"] for row in metrics] == pytest.approx([sum(map(len, texts[::2])) / 4 for texts in seen])


def test_mu_must_know_the_prompts(small, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "ask for tea: ", "completion": "tea, please."}\n')
    module, cfg = small("rebel", mu=str(other))
    with pytest.raises(BadInput, match="has no completion of the prompt '.*'; name the same file for --prompts and --mu"):
        module.main(cfg)
    module, cfg = small("rebel", mu=str(other), prompts=str(other), held_out=0.0, max_new=2)
    other.write_text('{"prompt": "ask for tea: ", "completion": "' + "a" * 200 + '"}\n')
    with pytest.raises(BadInput, match="tokens exceeds the policy's context of 128; leave it out"):
        module.main(cfg)


def test_refusals(small):
    module, cfg = small("rebel", batch_size=7)
    with pytest.raises(BadInput, match="--batch_size 7: must be even"):
        module.main(cfg)
