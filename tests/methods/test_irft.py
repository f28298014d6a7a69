import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import minialign.sample as sample_module
from minialign.batch import collate
from minialign.engine.common import BadInput, read_rows
from minialign.engine.tracking import TIMED
from minialign.logps import seq_logps
from minialign.methods import irft
from minialign.methods.irft import irft_loss
from minialign.methods.sft import sft_loss
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained
from tests.killing import result_of

H = ("logistic", "hinge", "identity")


def one(demo, sample, ref_demo, ref_sample, **kwargs):
    return irft_loss(*(torch.tensor([x], dtype=torch.float64) for x in (demo, sample, ref_demo, ref_sample)), **kwargs)


@pytest.mark.parametrize(("h", "expected"), [("logistic", 0.644397), ("hinge", 0.9), ("identity", -0.1)])
def test_worked_numbers(h, expected):
    """log π: demo −1.5, own −3; log ref: −2, −2.5, so Δ = 0.5 − (−0.5) = 1; β = .1: log(1 + e^−.1), 1 − .1, −.1."""
    loss, stats = one(-1.5, -3.0, -2.0, -2.5, beta=0.1, h=h)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert stats["rewards/demo"].item() == pytest.approx(0.05) and stats["rewards/sample"].item() == pytest.approx(-0.05)
    assert stats["rewards/margins"].item() == pytest.approx(0.1) and stats["rewards/accuracies"].item() == 1
    assert stats["logps/demo"].item() == -1.5 and stats["logps/sample"].item() == -3


def test_loss_is_log_2_where_policy_is_ref():
    loss, stats = one(-1.5, -3.0, -1.5, -3.0, beta=0.7)
    assert loss.item() == pytest.approx(math.log(2)) and stats["rewards/accuracies"].item() == 0.5


def test_logistic_is_spins_loss():
    """SPIN Eq. 4.7: ℓ(λ log p(y)/p_t(y) − λ log p(y')/p_t(y')), ℓ(t) = log(1 + e^−t); in numpy, over random batches."""
    rng = np.random.default_rng(0)
    demo, sample, ref_demo, ref_sample = rng.normal(size=(4, 50)) * 5
    t = 0.3 * (demo - ref_demo) - 0.3 * (sample - ref_sample)
    loss, _ = irft_loss(*(torch.tensor(x) for x in (demo, sample, ref_demo, ref_sample)), beta=0.3)
    assert loss.item() == pytest.approx(np.log1p(np.exp(-t)).mean(), abs=1e-12)


@pytest.mark.parametrize("h", H)
def test_gradients_by_finite_differences(h):
    torch.manual_seed(0)
    tensors = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert gradcheck(lambda *x: irft_loss(*x, beta=0.7, h=h)[0], tensors)


@pytest.mark.parametrize(
    ("h", "beta", "ref", "expected"),
    [
        ("identity", 1.0, "policy", [-0.412327, -0.250089, 0.662415]),
        ("logistic", 0.1, "policy", [-0.020616, -0.012504, 0.033121]),
        ("logistic", 1.0, "uniform", [-0.226711, -0.106427, 0.333138]),
    ],
)
def test_expected_gradient_in_three_logits(h, beta, ref, expected):
    """logits [.3, −.2, .1], the demonstration is y3, own answers from the policy: the ascent direction, summed over own answers.

    SFT's is onehot(y3) − π = [−.412327, −.250089, .662415]. Identity has no other; logistic at ref = policy halves it and scales by β.
    """
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    logps, policy = logits.log_softmax(0), logits.detach().softmax(0)
    ref_logps = policy.log() if ref == "policy" else torch.full((3,), -math.log(3), dtype=torch.float64)
    total = sum(policy[o] * irft_loss(logps[2:], logps[o, None], ref_logps[2:], ref_logps[o, None], beta=beta, h=h)[0] for o in range(3))
    total.backward()
    assert torch.allclose(-logits.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(("h", "factor"), [("identity", 1.0), ("logistic", 0.5)])
def test_expected_gradient_on_an_enumerable_gpt(h, factor):
    """All weights of a GPT: E over (demonstration, own answer) of the IRFT gradient = β (identity) or β/2 (logistic, ref = policy)
    times the gradient of sequence-level SFT, by summing over every completion through collate, the model and seq_logps."""
    from minialign.model import GPT, GPTConfig

    beta, eos = 0.3, 0
    torch.manual_seed(0)
    policy = GPT(GPTConfig.tiny(4, n_embd=8, n_head=2, n_layer=1, ffn_dim=16)).double()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    completions = [[eos], *([a, eos] for a in (1, 2, 3)), *([a, b] for a in (1, 2, 3) for b in range(4) if b != eos)]
    logps = seq_logps(policy, collate([[1]] * len(completions), completions, pad_id=eos))
    probs = logps.detach().exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-12)
    expert = torch.rand(len(completions), dtype=torch.float64)
    expert /= expert.sum()

    n = len(completions)
    demo, own = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    losses = torch.stack(
        [irft_loss(logps[y, None], logps[o, None], logps[y, None].detach(), logps[o, None].detach(), beta=beta, h=h)[0]
         for y, o in zip(demo, own, strict=True)]
    )
    irft_gradient = torch.autograd.grad((losses * expert[demo] * probs[own]).sum(), list(policy.parameters()), retain_graph=True)
    sft = sum(w * sft_loss(lp.view(1, 1), torch.ones(1, 1))[0] for w, lp in zip(expert, logps, strict=True))
    sft_gradient = torch.autograd.grad(sft, list(policy.parameters()))
    assert max(g.abs().max() for g in sft_gradient) > 1e-2
    for a, b in zip(irft_gradient, sft_gradient, strict=True):
        assert torch.allclose(a, beta * factor * b, atol=1e-12)


def test_unknown_h_and_ranks():
    with pytest.raises(BadInput, match="logistic, hinge or identity"):
        one(0.0, 0, 0, 0, beta=1, h="logsigmoid")
    with pytest.raises(AssertionError):
        irft_loss(*[torch.zeros(2, 3)] * 4, beta=1)
    with pytest.raises(AssertionError):
        irft_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2), beta=1)


def watch_rollouts(monkeypatch):
    """Record a weight of the sampling policy, and of the policy trained, at every rollout."""
    seen = []
    original = irft.rollout
    monkeypatch.setattr(irft, "rollout", lambda old, *args: seen.append(old.head_weight.detach().clone()) or original(old, *args))
    return seen


def test_one_round_is_spin(small, monkeypatch):
    """rounds=1: all answers come from the policy that began, which is the reference too, so ref=round and ref=initial are one run."""
    seen = watch_rollouts(monkeypatch)
    module, cfg = small("irft", rounds=1)
    first = module.main(cfg)
    assert len(seen) == 6 and all(torch.equal(weight, seen[0]) for weight in seen)
    module, cfg = small("irft", rounds=1, ref="initial")
    second = module.main(cfg)
    assert (first / "final" / "model.safetensors").read_bytes() == (second / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("rounds", "distinct"), [(3, 3), (6, 6), (4, 4)])
def test_rounds_renew_the_sampler(small, monkeypatch, rounds, distinct):
    seen = watch_rollouts(monkeypatch)
    module, cfg = small("irft", rounds=rounds)
    module.main(cfg)
    assert len({tuple(weight.flatten().tolist()) for weight in seen}) == distinct


def test_a_prompt_gets_other_answers_in_another_step(policy_folder):
    """Each step seeds its own draws. With one seed for all, every epoch would see the same answer to a prompt."""
    policy, rows = load_pretrained(policy_folder), [([5, 6], [7])] * 4
    cfg = irft.Config(batch_size=4, max_new=12, steps=3, seed=1)
    drawn = [irft.draw_together(policy, k, rows, cfg, 0)[k] for k in range(3)]
    assert len({str(answers) for answers in drawn}) == 3
    assert drawn[1] == irft.draw_together(policy, 1, rows, cfg, 0)[1] != irft.draw_together(policy, 1, rows, replace(cfg, seed=2), 0)[1]


@pytest.mark.parametrize("precompute", [False, True])
def test_answers_of_several_steps_are_drawn_together(small, monkeypatch, precompute):
    """On a GPU: here room for 20 rows, two steps of 8. Rounds of 3 steps are drawn as 2 + 1; the run is that of single draws to rounding.
    Killed in the middle of a pair, it draws the pair again and goes on bitwise."""
    settings = dict(rounds=2, precompute_ref=precompute, save_every=1)
    module, cfg = small("irft", **settings)
    alone = module.main(cfg)
    monkeypatch.setattr(sample_module, "most_rows", lambda *_: 20)
    seen = watch_rollouts(monkeypatch)
    module, cfg = small("irft", **settings)
    together = module.main(cfg)
    assert len(seen) == 4
    for one, other in zip(*[read_rows(folder / "metrics.jsonl") for folder in (alone, together)], strict=True):
        one, other = ({name: value for name, value in row.items() if name not in TIMED} for row in (one, other))
        assert other == pytest.approx(one, abs=1e-9)
    whole, step = result_of(together), irft.step
    module, cfg = small("irft", **settings)
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(irft, "step", dies)
        with pytest.raises(MemoryError):
            module.main(cfg)
    assert result_of(module.main(module.Config(resume=cfg.out))) == whole


def test_refreshed_and_initial_reference_differ_from_the_second_round_on(small):
    folders = []
    for ref in ("round", "initial"):
        module, cfg = small("irft", rounds=2, ref=ref)
        folders.append(module.main(cfg))
    left, right = ((folder / "final" / "model.safetensors").read_bytes() for folder in folders)
    assert left != right


def test_own_answers_have_no_fake_eos():
    """An answer cut at max_new carries no EOS: exactly max_new tokens are scored."""
    from minialign.model import GPT, GPTConfig

    torch.manual_seed(0)
    policy = GPT(GPTConfig.tiny(5))
    answers = irft.rollout(policy, [[1, 2]] * 20, irft.Config(max_new=3), 4, seed=0)
    cut = ~answers.finished
    assert cut.any() and (answers.mask.sum(1)[cut] == 3).all()
    assert all(4 not in ids for ids, is_cut in zip(answers.completions, cut, strict=True) if is_cut)


def test_bad_settings(small):
    bad = (({"ref": "sometimes"}, "round or initial"), ({"rounds": 9}, "only 6 steps"), ({"beta": 0.0}, "--beta 0.0: must be above 0"))
    for changes, message in bad:
        module, cfg = small("irft", **changes)
        with pytest.raises(BadInput, match=message):
            module.main(cfg)


def test_demonstrations_without_room_are_left_out(small, capsys):
    """A prompt that fills max_len leaves nothing of the demonstration: its own answer alone would only be pushed down."""
    module, cfg = small("irft", steps=1, max_len=16)
    module.main(cfg)
    assert "rows are left out: their prompt alone fills --max_len 16" in capsys.readouterr().out


def test_any_eos_of_the_folder_ends_an_own_answer(small, policy_folder, tmp_path):
    """With every id among those that end a completion, each answer is one token long and finished."""
    folder = shutil.copytree(policy_folder, tmp_path / "policy")
    ids = list(range(load_tokenizer(folder).vocab_size))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    module, cfg = small("irft", policy=str(folder), steps=2)
    for row in read_rows(module.main(cfg) / "metrics.jsonl"):
        assert row["completions/finished"] == row["completions/mean_length"] == 1
