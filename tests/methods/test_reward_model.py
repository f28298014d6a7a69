import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.data import encode_pairs, pair_batch
from minialign.engine.common import read_rows
from minialign.methods import reward_model
from minialign.methods.reward_model import bradley_terry_loss
from minialign.rewards import score
from minialign.task import builtin_pairs, gold_reward
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained


def loss_of(chosen, rejected, **kwargs):
    return bradley_terry_loss(torch.tensor([chosen]), torch.tensor([rejected]), **kwargs)[0].item()


def test_worked_numbers():
    """r = (1.5, .5): log(1 + e^−1) = .313262; margin .3: log(1 + e^−.7) = .403186; centring adds .01·2² = .04."""
    assert loss_of(1.5, 0.5) == pytest.approx(0.313262, abs=1e-6)
    assert loss_of(1.5, 0.5, margin=0.3) == pytest.approx(0.403186, abs=1e-6)
    assert loss_of(1.5, 0.5, centre=0.01) == pytest.approx(0.353262, abs=1e-6)


def test_only_differences_are_identified():
    assert loss_of(1.5, 0.5) == pytest.approx(loss_of(101.5, 100.5), abs=1e-6)
    assert loss_of(1.5, 0.5, centre=0.01) != pytest.approx(loss_of(101.5, 100.5, centre=0.01), abs=1)


def test_swapping_a_pair_mirrors_the_loss():
    """softplus(−g) − softplus(g) = −g."""
    assert loss_of(2.0, 0.7) - loss_of(0.7, 2.0) == pytest.approx(-1.3, abs=1e-6)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    rewards = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(lambda c, r: bradley_terry_loss(c, r, margin=0.2, centre=0.1)[0], rewards)


def test_ranks_are_asserted():
    with pytest.raises(AssertionError):
        bradley_terry_loss(torch.zeros(2, 1), torch.zeros(2, 1))


def test_pairwise_density_ratio_lemma():
    """chosen ~ P, rejected ~ Q, all pairs weighted exactly: the minimiser is log P/Q up to a constant."""
    P, Q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.tensor([0.4, 0.25, 0.25, 0.1], dtype=torch.float64)
    rewards = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([rewards], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = sum(P[i] * Q[j] * bradley_terry_loss(rewards[i, None], rewards[j, None])[0] for i in range(4) for j in range(4))
        loss.backward()
        return loss

    optimizer.step(closure)
    law = (P / Q).log()
    assert np.allclose((rewards.detach() - rewards.detach().mean()), law - law.mean(), atol=1e-7)


def test_it_learns_and_is_centred(small):
    """On the built-in pairs, whose labels are Bradley-Terry draws: it orders fresh pairs as the gold reward does, which it never saw;
    the chosen training answers score 0 on average."""
    module, cfg = small("reward_model", pairs="builtin", steps=200, batch_size=32, lr=1e-2, eval_every=200, dtype="float32")
    folder = module.main(cfg)
    assert read_rows(folder / "metrics.jsonl")[-1]["eval/accuracy"] > 0.5
    model, tokenizer = load_pretrained(folder / "final"), load_tokenizer(folder / "final")

    def scores(pairs):
        batch = pair_batch(encode_pairs(tokenizer, pairs), range(len(pairs)), pad_id=tokenizer.pad_id, max_len=64)
        return score(model, batch.chosen), score(model, batch.rejected)

    fresh = builtin_pairs(200, seed=5)
    gold = [gold_reward([p.prompt, p.prompt], [p.chosen, p.rejected]) for p in fresh]
    chosen, rejected = scores(fresh)
    agree = [(c > r) == (a > b) for c, r, (a, b) in zip(chosen.tolist(), rejected.tolist(), gold, strict=True) if a != b]
    assert sum(agree) / len(agree) > 0.85, sum(agree) / len(agree)
    assert abs(scores(builtin_pairs()[:360])[0].mean().item()) < 1e-4


def test_the_last_pass_scores_each_chosen_answer_once(small, monkeypatch):
    """18 training pairs, one step on 8, no held-out pair scored before: 8 chosen, 8 rejected, then 18 chosen in passes of at most 2."""
    sizes = []
    monkeypatch.setattr(reward_model, "score", lambda model, batch: sizes.append(len(batch)) or score(model, batch))
    module, cfg = small("reward_model", steps=1, micro_batch=2, held_out=0.1)
    monkeypatch.setattr(reward_model.Run, "end_of_step", lambda *_: None)
    module.main(cfg)
    assert sizes == [2] * 8 + [2] * 9


def test_a_reward_model_can_be_trained_further(small):
    module, cfg = small("reward_model")
    folder = module.main(cfg)
    module, cfg = small("reward_model", policy=str(folder / "final"))
    assert load_pretrained(module.main(cfg) / "final").config.head == "scalar"
