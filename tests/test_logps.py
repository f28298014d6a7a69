"""Log-probs by hand, by finite differences, body against body, in memory, in bfloat16; and by summing over a whole language."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minialign import logps as module
from minialign.batch import collate
from minialign.engine.tracking import TIMED
from minialign.kernels import linear_logprob as kernel
from minialign.kernels import logprob
from minialign.logps import best_body, linear_logps, mean_logps, seq_logps, token_logps
from tests.conftest import METHODS
from tests.enumerable import EOS, MAX_NEW, N_CONTENT, PROMPTS, all_completions, tiny_gpt

BODIES = ("naive", "chunked")


def narrow(monkeypatch, width, rows=2):
    """Slices of so few tokens of the vocabulary, blocks of so few rows."""
    cut = lambda n, v, device: [slice(start, min(start + width, v)) for start in range(0, v, width)]  # noqa: E731
    monkeypatch.setattr(kernel, "vocabulary_slices", cut)
    monkeypatch.setattr(logprob, "BLOCK_ROWS", {"cpu": rows})


def problem(n, *, c=5, v=11, dtype=torch.float64, seed=0):
    """hidden (n, c), weight (v, c), targets (n,): leaves that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, c), (v, c)))
    targets = torch.randint(v, (n,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def by_numpy(hidden, weight, targets, tau=1.0):
    """logps and entropy from the definition, in float64."""
    logits = hidden.detach().double().numpy() @ weight.detach().double().numpy().T / tau
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.log(p[np.arange(len(p)), targets.numpy()]), -(p * np.log(p)).sum(-1)


# ------------------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize("body", BODIES)
def test_worked_number(body):
    """logits 1 2 3, target 2: 3 − log(e + e² + e³) = −.407606; the gradient in the logits is onehot − p = −.090031 −.244728 .334759."""
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    logps, entropy = linear_logps(logits, torch.eye(3, dtype=torch.float64), torch.tensor([2]), body=body)
    logps.sum().backward()
    assert logps.item() == pytest.approx(-0.407606, abs=1e-6)
    assert logits.grad[0].tolist() == pytest.approx([-0.090031, -0.244728, 0.334759], abs=1e-6)
    p = np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum()
    assert entropy.item() == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("tau", [1.0, 0.7, 3.0])
def test_against_numpy(body, tau):
    hidden, weight, targets = problem(13)
    expected_logps, expected_entropy = by_numpy(hidden, weight, targets, tau)
    logps, entropy = linear_logps(hidden, weight, targets, tau=tau, body=body)
    assert np.allclose(logps.detach(), expected_logps, atol=1e-12) and np.allclose(entropy.detach(), expected_entropy, atol=1e-12)


@pytest.mark.parametrize("body", BODIES)
def test_large_logits_do_not_overflow(body):
    """Logits of ±1000 in float32: the likely token has log-prob 0, the other −2000, and the gradients are finite."""
    hidden = torch.tensor([[1000.0], [1000.0]], requires_grad=True)
    logps, entropy = linear_logps(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), body=body)
    (logps.sum() + entropy.sum()).backward()
    assert logps.tolist() == [0, -2000] and entropy.tolist() == [0, 0] and hidden.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------- token_logps, seq_logps


def test_token_logps_is_log_softmax_and_gather_where_scored_and_zero_elsewhere():
    """The oracle runs each row alone, unpadded, takes all logits, and picks the completion's."""
    policy = tiny_gpt()
    prompts, completions = [[0, 1], [2], [3, 3, 3]], [[1, EOS], [0, 1, 2], []]
    batch = collate(prompts, completions, pad_id=EOS)
    for tau in (1.0, 0.7):
        logps, entropy = token_logps(policy, batch, tau=tau, entropy=True)
        assert torch.equal(logps, token_logps(policy, batch, tau=tau))
        assert logps.shape == entropy.shape == batch.mask.shape
        assert (logps[~batch.mask] == 0).all() and (entropy[~batch.mask] == 0).all()
        for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = torch.tensor([prompt + completion])
            all_logps = (policy(row) / tau).log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected = [all_logps[t, token].item() for t, token in enumerate(completion)]
            assert logps[b][batch.mask[b]].tolist() == pytest.approx(expected, abs=1e-12)
            entropies = -(all_logps.exp() * all_logps).sum(-1)
            assert entropy[b][batch.mask[b]].tolist() == pytest.approx(entropies.tolist(), abs=1e-12)
    assert seq_logps(policy, batch).tolist() == pytest.approx(token_logps(policy, batch).sum(1).tolist())


def test_a_batch_with_nothing_scored_has_zeros_and_zero_gradients():
    policy = tiny_gpt()
    logps, entropy = token_logps(policy, collate([[0, 1]], [[]], pad_id=EOS), entropy=True)
    (logps.sum() + entropy.sum()).backward()
    assert not logps.any() and not entropy.any() and not policy.head_weight.grad.any()


def test_padding_changes_nothing():
    """Each row alone and in a batch with up to 8 pads beside it: no difference beyond rounding of a differently shaped product."""
    policy = tiny_gpt()
    completions = [[1, EOS], [0, 1, 2, 3, 0, 1, 2, 3, EOS], [EOS]]
    together = seq_logps(policy, collate([[2]] * 3, completions, pad_id=0))
    alone = torch.cat([seq_logps(policy, collate([[2]], [completion], pad_id=0)) for completion in completions])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- two bodies, one number


UPSTREAM = {"logps": (1, 0), "entropy": (0, 1), "both": (1, 1)}


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("width", [1, 4, 1024])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_chunked_equals_naive_forward_and_backward(monkeypatch, n, width, upstream):
    """Values and gradients in hidden and weight, with a different upstream gradient for every token, for one output or both."""
    narrow(monkeypatch, width, rows=4)
    results = {}
    for body in BODIES:
        hidden, weight, targets = problem(n)
        logps, entropy = linear_logps(hidden, weight, targets, tau=0.7, body=body)
        g, e = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        use_logps, use_entropy = UPSTREAM[upstream]
        loss = ((g * logps).sum() if use_logps else 0) + ((e * entropy).sum() if use_entropy else 0)
        loss.backward()
        results[body] = logps, entropy, hidden.grad, weight.grad
    for naive, chunked in zip(results["naive"], results["chunked"], strict=True):
        assert naive.shape == chunked.shape and torch.allclose(naive, chunked, rtol=0, atol=1e-12)


@pytest.mark.parametrize("body", BODIES)
def test_without_entropy_the_logps_and_their_gradients_are_the_same(body, monkeypatch):
    narrow(monkeypatch, 4)
    grads = []
    for entropy in (True, False):
        hidden, weight, targets = problem(7)
        logps, entropies = linear_logps(hidden, weight, targets, entropy=entropy, body=body)
        assert (entropies is None) == (not entropy)
        logps.pow(2).sum().backward()
        grads.append((logps, hidden.grad, weight.grad))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_chunked_with_one_input_frozen(monkeypatch, frozen):
    """A frozen head (LoRA) or a frozen trunk: the other gradient is that of the naive body, the frozen one stays None."""
    narrow(monkeypatch, 4)
    grads = []
    for body in BODIES:
        hidden, weight, targets = problem(7)
        still, moving = (hidden, weight) if frozen == "hidden" else (weight, hidden)
        still.requires_grad_(False)
        linear_logps(hidden, weight, targets, body=body)[0].sum().backward()
        assert still.grad is None
        grads.append(moving.grad)
    assert torch.allclose(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_gradients_by_finite_differences(monkeypatch, body, tau):
    narrow(monkeypatch, 3)
    hidden, weight, targets = problem(5, c=3, v=4)
    assert gradcheck(lambda h, w: linear_logps(h, w, targets, tau=tau, body=body), (hidden, weight))


def test_the_body_is_chosen_by_size(monkeypatch):
    """At NAIVE_BYTES of float32 logits the naive body runs, one token later the chunked one: told apart by the graph."""
    monkeypatch.setattr(module, "NAIVE_BYTES", 4 * 11 * 6)
    for n, chunked in ((6, False), (7, True)):
        logps, _ = linear_logps(*problem(n))
        assert ("LinearLogps" in logps.grad_fn.name()) == chunked
        assert best_body(n, 11, torch.device("cpu")) == ("chunked" if chunked else "naive")
        assert best_body(n, 11, torch.device("cuda")) == "chunked"


class Largest(TorchDispatchMode):
    """Records the most elements that any tensor made under it has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))])
        return out


def largest(body, n, c, v):
    hidden, weight, targets = problem(n, c=c, v=v, dtype=torch.float32)
    with Largest() as seen:
        logps, entropy = linear_logps(hidden, weight, targets, tau=0.7, body=body)
        (logps.sum() + (entropy**2).sum()).backward()
    return seen.numel


def test_the_chunked_body_never_makes_more_than_a_slice_of_logits(monkeypatch):
    """N = 100, V = 300, slices of 16: no tensor of forward or backward exceeds the weight's own 300·8; the naive body makes 100·300."""
    narrow(monkeypatch, 16, rows=32)
    assert largest("chunked", n=100, c=8, v=300) == 300 * 8
    assert largest("naive", n=100, c=8, v=300) == 100 * 300  # the recorder sees what it should


def test_an_unknown_body_is_refused():
    with pytest.raises(ValueError, match="use naive, chunked"):
        linear_logps(*problem(3), body="fast")


# ------------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("body", BODIES)
def test_bfloat16_inputs_give_float32_statistics(monkeypatch, body):
    """No worse than 1e-5 against float64 arithmetic on the same bfloat16 numbers; logits rounded to bfloat16 would be off by 1e-2."""
    narrow(monkeypatch, 16, rows=16)
    hidden, weight, targets = problem(50, c=32, v=100, dtype=torch.bfloat16)
    logps, entropy = linear_logps(hidden, weight, targets, tau=0.7, body=body)
    assert logps.dtype == entropy.dtype == torch.float32
    expected_logps, expected_entropy = by_numpy(hidden, weight, targets, 0.7)
    assert np.abs(logps.detach().numpy() - expected_logps).max() < 1e-5
    assert np.abs(entropy.detach().numpy() - expected_entropy).max() < 1e-5
    rounded = ((hidden @ weight.T).float() / 0.7).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert np.abs(rounded.detach().numpy() - expected_logps).max() > 1e-3  # the bound has teeth
    (logps.sum() + entropy.sum()).backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_bfloat16_gradients_of_the_two_bodies_agree(monkeypatch):
    """The weight's gradient is summed in float32 and rounded once: within one bfloat16 rounding, 2^-8, of the naive body's."""
    narrow(monkeypatch, 16, rows=16)
    grads = []
    for body in BODIES:
        hidden, weight, targets = problem(50, c=32, v=100, dtype=torch.bfloat16)
        linear_logps(hidden, weight, targets, body=body)[0].sum().backward()
        grads.append((hidden.grad.float(), weight.grad.float()))
    for naive, chunked in zip(*grads, strict=True):
        assert (naive - chunked).abs().max() <= 2**-7 * naive.abs().max()


@pytest.mark.parametrize("body", BODIES)
def test_float32_stays_close_to_float64(body):
    hidden, weight, targets = problem(50, c=32, v=100, dtype=torch.float32)
    logps, entropy = linear_logps(hidden, weight, targets, body=body)
    expected_logps, expected_entropy = by_numpy(hidden, weight, targets)
    assert np.abs(logps.detach().numpy() - expected_logps).max() < 1e-5
    assert np.abs(entropy.detach().numpy() - expected_entropy).max() < 1e-5


# ------------------------------------------------------------------------------------------- probabilities of a whole language

COMPLETIONS = all_completions(N_CONTENT, EOS, MAX_NEW)


def total(policy, batch):
    with torch.no_grad():
        return seq_logps(policy, batch).exp().sum().item()


def every_completion(prompt):
    return collate([prompt] * len(COMPLETIONS), COMPLETIONS, pad_id=EOS)


def test_the_language_is_complete():
    """1 + 4 + 16 completions with EOS and 64 without: 85 different ones, each ending in its first EOS or as long as allowed."""
    assert len(COMPLETIONS) == len(set(map(tuple, COMPLETIONS))) == 85
    assert all(EOS not in c[:-1] and (c[-1] == EOS or len(c) == MAX_NEW) for c in COMPLETIONS)
    assert len(all_completions(6, 0, 4)) == 1555


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_of_all_completions_sum_to_one(prompt, seed):
    """Through collate, the model, and seq_logps; pad is EOS. Whatever is scored twice, not at all, or one place off breaks it."""
    policy = tiny_gpt(seed=seed)
    assert abs(total(policy, every_completion(prompt)) - 1) < 1e-12
    with torch.no_grad():
        first = policy(torch.tensor([prompt]))[0, -1].softmax(-1)
    assert first.max() / first.min() > 1.5  # not flat: a wrong token would be noticed


def test_probabilities_sum_to_one_through_the_chunked_body(monkeypatch):
    monkeypatch.setattr(module, "NAIVE_BYTES", 0)
    narrow(monkeypatch, 3, rows=7)
    assert abs(total(tiny_gpt(), every_completion(PROMPTS[-1])) - 1) < 1e-12


def eos_unscored(batch, prompt):
    return replace(batch, mask=batch.mask & (batch.targets != EOS))


def prompt_scored(batch, prompt):
    mask = batch.mask.clone()
    mask[:, : len(prompt) - 1] = True
    return replace(batch, mask=mask)


def shifted_back(batch, prompt):
    """The model is asked to predict what it was just shown."""
    return replace(batch, targets=batch.inputs)


def mask_shifted(batch, prompt):
    """The mask one place early: the prompt's last token is scored in the place of the completion's last."""
    return replace(batch, mask=batch.mask.roll(-1, dims=1))


def padding_scored(batch, prompt):
    mask = batch.mask.clone()
    mask[:, len(prompt) - 1 :] = True
    return replace(batch, mask=mask)


@pytest.mark.parametrize("mutation", [eos_unscored, prompt_scored, shifted_back, mask_shifted, padding_scored])
def test_the_identity_has_teeth(mutation):
    """Each classic mistake, made on the Batch, moves the sum away from 1 by more than a tenth."""
    prompt = PROMPTS[-1]
    batch = mutation(every_completion(prompt), prompt)
    assert abs(total(tiny_gpt(), batch) - 1) > 0.1


def test_a_length_average_is_no_probability():
    """exp of the mean log-prob sums to far more than 1 (about 8 in this size of language)."""
    batch = every_completion(PROMPTS[0])
    with torch.no_grad():
        mean = seq_logps(tiny_gpt(), batch) / batch.mask.sum(1)
    assert mean.exp().sum().item() > 3


def test_the_expected_score_is_zero():
    """E_y ∇ log π(y|x) = 0: the gradient of the sum of probabilities, in every parameter."""
    policy = tiny_gpt()
    seq_logps(policy, every_completion(PROMPTS[-1])).exp().sum().backward()
    assert max(p.grad.abs().max().item() for p in policy.parameters() if p.grad is not None) < 1e-12
    assert math.isfinite(total(policy, every_completion([0])))


@pytest.mark.parametrize("method", METHODS)
def test_no_method_notices_which_body_it_has(small, monkeypatch, method):
    """Three steps of a run in float32, naive and in slices of 16 tokens: every number of the first update agrees to 1e-6 of its size, later
    ones to what 1e-6 of a gradient becomes when AdamW divides it by its root mean square."""
    logged, once = {}, {"epochs": 1} if method in ("ppo", "rebel") else {}  # one update a step
    for body in ("naive", "chunked"):
        monkeypatch.setattr(module, "best_body", lambda n, v, device, body=body: body)
        narrow(monkeypatch, 16, rows=128)
        run, cfg = small(method, steps=3, dtype="float32", **once)
        logged[body] = [json.loads(line) for line in (run.main(cfg) / "metrics.jsonl").read_text().splitlines()]
    assert len(logged["naive"]) == len(logged["chunked"]) >= 3
    for step, (naive, chunked) in enumerate(zip(logged["naive"], logged["chunked"], strict=True)):
        for name in naive.keys() - {*TIMED}:
            bound = 1e-6 if step == 0 else 1e-3
            assert naive[name] == pytest.approx(chunked[name], rel=bound, abs=bound), (step, name)


def test_several_batches_go_through_together():
    """One forward pass; the numbers and gradients of two, to rounding; sums and means."""
    policy, calls = tiny_gpt(), []
    first, second = collate([[1, 2], [3]], [[3, 1], [2]], pad_id=0), collate([[4, 1, 2], [1]], [[3], [2, 3, 1, 1]], pad_id=0)
    for logps in (seq_logps, mean_logps):
        alone = [logps(policy, batch) for batch in (first, second)]
        (alone[0] * 2 - alone[1]).sum().backward()
        expected = [p.grad.clone() for p in policy.parameters()]
        policy.zero_grad()
        hidden, policy.hidden = policy.hidden, lambda *a, hidden=policy.hidden, **k: calls.append(1) or hidden(*a, **k)
        together = logps(policy, first, second)
        policy.hidden = hidden
        (together[0] * 2 - together[1]).sum().backward()
        assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(alone, together, strict=True)) and len(together[0]) == 2
        assert all(torch.allclose(p.grad, q, atol=1e-12) for p, q in zip(policy.parameters(), expected, strict=True))
        policy.zero_grad()
    assert len(calls) == 2


@torch.no_grad()
def test_mean_logps_divide_by_what_is_scored():
    """Answers of 3, 1 and 0 tokens in one batch, and of 2 in another: the mean over each answer's own tokens, row by row; 0 for none."""
    policy = tiny_gpt()
    prompts, completions = [[0, 1], [2], [3]], [[1, 2, EOS], [EOS], []]
    expected = []
    for prompt, completion in zip([*prompts, [1]], [*completions, [3, EOS]], strict=True):
        law = policy(torch.tensor([prompt + completion]))[0].log_softmax(-1)
        logps = [law[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]
        expected.append(sum(logps) / max(1, len(logps)))
    batch, other = collate(prompts, completions, pad_id=EOS), collate([[1]], [[3, EOS]], pad_id=EOS)
    assert mean_logps(policy, batch).tolist() == pytest.approx(expected[:3], abs=1e-12)
    assert [means.tolist() for means in mean_logps(policy, batch, other)] == [pytest.approx(expected[:3]), pytest.approx(expected[3:])]
