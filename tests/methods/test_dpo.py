"""DPO. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.batch import Pairs, collate
from minialign.data import encode_pairs, read_preferences
from minialign.engine.common import BadInput, batch_rows, read_rows
from minialign.methods import dpo
from minialign.methods.irft import irft_loss
from minialign.task import builtin_pairs, builtin_tokenizer
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained, save_pretrained
from tests.enumerable import EOS, LANGUAGE, expected, relative, tiny_gpt
from tests.preferring import CHOSEN, REJECTED, check_main, f64, log_prob, pairs_of, random_pairs
from toy import closed_form
from toy.three_actions import minimise


@pytest.fixture
def m():
    return dpo


def one(m, chosen, rejected, ref_chosen, ref_rejected, **settings):
    loss, stats = m.dpo_loss(*(f64(x) for x in (chosen, rejected, ref_chosen, ref_rejected)), **settings)
    return loss.item(), {name: value.item() for name, value in stats.items()}


# ------------------------------------------------------------------------------------------------------------------- the loss


def test_worked_numbers(m):
    """log π = −.5 − 1 and −1 − 1.5 − .5, log ref = −2, −2.5: Δ = .5 − (−.5) = 1. β = .1: log(1 + e^−.1) = .644397. ε = .1:
    .9·.644397 + .1·log(1 + e^.1) = .9·.644397 + .1·.744397 = .654397. Where the policy is ref: log 2, whatever ε."""
    loss, stats = one(m, -1.5, -3.0, -2.0, -2.5, beta=0.1)
    assert loss == pytest.approx(0.644397, abs=1e-6)
    assert stats["rewards/chosen"] == pytest.approx(0.05) and stats["rewards/rejected"] == pytest.approx(-0.05)
    assert stats["rewards/margins"] == pytest.approx(0.1) and stats["rewards/accuracies"] == 1
    assert stats["logps/chosen"] == -1.5 and stats["logps/rejected"] == -3
    assert one(m, -1.5, -3.0, -2.0, -2.5, beta=0.1, label_smoothing=0.1)[0] == pytest.approx(0.654397, abs=1e-6)
    for smoothing in (0.0, 0.3):
        loss, stats = one(m, -1.5, -3.0, -1.5, -3.0, beta=0.7, label_smoothing=smoothing)
        assert loss == pytest.approx(math.log(2), abs=1e-12) and stats["rewards/accuracies"] == 0.5


def test_slopes_by_hand(m):
    """Δ = .25, β = .1: −β·σ(−.025) = −.1·.493750 = −.049375 in log π of the chosen one, + that in the rejected one's; ε = .1 adds
    .1·.1·(σ(.025) + σ(−.025)) = .01: −.039375. ref's log-probs have the same slopes with the other sign."""
    tensors = [f64(x).requires_grad_() for x in (-1.0, -2.0, -1.1, -1.85)]
    for smoothing, slope in ((0.0, -0.049375), (0.1, -0.039375)):
        grads = torch.autograd.grad(m.dpo_loss(*tensors, beta=0.1, label_smoothing=smoothing)[0], tensors)
        assert [g.item() for g in grads] == pytest.approx([slope, -slope, -slope, slope], abs=1e-6)


def test_gradient_by_finite_differences(m):
    tensors = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensors = [row.requires_grad_() for row in tensors]
    assert gradcheck(lambda *x: m.dpo_loss(*x, beta=0.7, label_smoothing=0.2)[0], tensors)


def test_against_numpy_torch_and_irft(m):
    """−(1 − ε)·log σ(βΔ) − ε·log σ(−βΔ); without ε it is irft.py's loss with the rejected answer in the place of the own one."""
    chosen, rejected, ref_chosen, ref_rejected = tensors = random_pairs()
    z = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    log_sigmoid = torch.nn.functional.logsigmoid
    for smoothing in (0.0, 0.15):
        loss = m.dpo_loss(*tensors, beta=0.3, label_smoothing=smoothing)[0]
        assert torch.allclose(loss, -((1 - smoothing) * log_sigmoid(z) + smoothing * log_sigmoid(-z)).mean(), atol=1e-13)
        other = (1 - smoothing) * np.log1p(np.exp(-z.numpy())) + smoothing * np.log1p(np.exp(z.numpy()))
        assert loss.item() == pytest.approx(other.mean(), abs=1e-12)
    assert torch.allclose(m.dpo_loss(*tensors, beta=0.3)[0], irft_loss(*tensors, beta=0.3)[0], atol=1e-14)


def test_swapping_the_answers_swaps_the_labels(m):
    """Chosen and rejected exchanged under ε is the pair as it was under 1 − ε; and softplus(−z) − softplus(z) = −z."""
    chosen, rejected, ref_chosen, ref_rejected = random_pairs(1)
    for smoothing in (0.0, 0.1, 0.4):
        there = m.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, label_smoothing=smoothing)[0]
        back = m.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=0.3, label_smoothing=1 - smoothing)[0]
        assert torch.allclose(there, back, atol=1e-13)
    there, back = one(m, -1.5, -3.0, -2.0, -2.5, beta=0.1)[0], one(m, -3.0, -1.5, -2.5, -2.0, beta=0.1)[0]
    assert there - back == pytest.approx(-0.1, abs=1e-12)


def test_only_the_difference_of_log_ratios_counts(m):
    """A constant on both answers of the policy, on both of ref, or on policy and ref of one answer; β on both sides or neither."""
    chosen, rejected, ref_chosen, ref_rejected = random_pairs(2)
    loss = m.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)[0]
    for a, b, c, d in ((9, 9, 0, 0), (0, 0, 9, 9), (9, 0, 9, 0), (0, 9, 0, 9)):
        assert torch.allclose(m.dpo_loss(chosen + a, rejected + b, ref_chosen + c, ref_rejected + d, beta=0.3)[0], loss, atol=1e-12)
    scaled = m.dpo_loss(3 * chosen, 3 * rejected, 3 * ref_chosen, 3 * ref_rejected, beta=0.1)[0]
    assert torch.allclose(scaled, loss, atol=1e-12)
    assert abs(m.dpo_loss(chosen, rejected, ref_chosen + 1, ref_rejected, beta=0.3)[0] - loss) > 1e-2


def test_ranks_are_asserted(m):
    for shapes in (((2, 3),) * 4, ((2,), (3,), (2,), (2,)), ((2,), (2,), (2,), (3,))):
        with pytest.raises(AssertionError):
            m.dpo_loss(*map(torch.zeros, shapes), beta=1)


# ------------------------------------------------------------------------------------------------------------------- the step


def test_step_sums_the_completions_tokens(m):
    """Two GPTs, pairs of unequal length: the loss from each completion's own log-probs; whatever the padding; no gradient for ref."""
    policy, ref = tiny_gpt(seed=0), tiny_gpt(seed=1)
    cfg = m.Config(beta=0.3, label_smoothing=0.1)
    delta = torch.stack([(log_prob(policy, w) - log_prob(ref, w)) - (log_prob(policy, l) - log_prob(ref, l))
                         for w, l in zip(CHOSEN, REJECTED, strict=True)]).detach()
    oracle = (0.9 * torch.log1p((-0.3 * delta).exp()) + 0.1 * torch.log1p((0.3 * delta).exp())).mean().item()
    for pad_id in (EOS, 0, 3):
        loss, stats = m.step(policy, ref, pairs_of(CHOSEN, REJECTED, pad_id), cfg)
        assert loss.item() == pytest.approx(oracle, abs=1e-12)
        assert stats["rewards/margins"].item() == pytest.approx(0.3 * delta.mean().item(), abs=1e-12)
    loss.backward()
    assert all(p.grad is None for p in ref.parameters()) and policy.head_weight.grad.abs().sum() > 0
    assert m.step(policy, policy, pairs_of(CHOSEN, REJECTED), cfg)[0].item() == pytest.approx(math.log(2), abs=1e-14)


def test_the_expected_gradient_by_enumeration(m):
    """Chosen ~ one law, rejected ~ another, all 85² pairs: −β·Σ w(a, b)·σ(−βΔ)·(∇log π(a) − ∇log π(b)) in all weights of a GPT, and per row
    of a real step: −β·σ(−βΔ) of its margin."""
    beta, policy, ref = 0.3, tiny_gpt(seed=0), tiny_gpt(seed=1)
    logps = LANGUAGE.token_logps(policy)[1].sum(-1)
    ref_logps = LANGUAGE.token_logps(ref)[1].sum(-1).detach()
    first, second = logps.detach().exp(), ref_logps.exp()
    loss = expected(lambda a, b: m.dpo_loss(logps[a], logps[b], ref_logps[a], ref_logps[b], beta=beta)[0], first, second)
    ratio = (logps - ref_logps).detach()
    pull = beta * first[:, None] * second * torch.sigmoid(-beta * (ratio[:, None] - ratio))  # (C, C) from b to a
    coefficient = pull.sum(0) - pull.sum(1)  # (C,) of ∇log π(y)

    def gradient(scalar):
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, list(policy.parameters()), retain_graph=True)])

    assert relative(gradient(loss), gradient((coefficient * logps).sum())) < 1e-12
    logps = [(log_prob(policy, w), log_prob(policy, l)) for w, l in zip(CHOSEN, REJECTED, strict=True)]
    terms = []
    for (w, l), chosen, rejected in zip(logps, CHOSEN, REJECTED, strict=True):
        delta = (w - l - log_prob(ref, chosen) + log_prob(ref, rejected)).detach()
        terms.append(-beta * torch.sigmoid(-beta * delta) * (w - l) / 3)
    assert relative(gradient(m.step(policy, ref, pairs_of(CHOSEN, REJECTED), m.Config(beta=beta))[0]), gradient(sum(terms))) < 1e-12


# -------------------------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_preferences_from_a_reward_lead_to_its_tilt(m, beta, seed):
    """Five completions, labels from Bradley-Terry on r: P(a over b) = σ(r_a − r_b), pairs drawn from two laws with full support. The
    minimum over all logits is ref·e^{r/β}, from another start than ref."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(5, generator=generator, dtype=torch.float64)
    ref, first, second = (torch.rand(5, generator=generator, dtype=torch.float64) + 0.1 for _ in range(3))
    ref, first, second = (p / p.sum() for p in (ref, first, second))
    ref_logps, wins = ref.log(), torch.sigmoid(reward[:, None] - reward)  # (5, 5) P(a over b)

    def loss(z):
        logps = z.log_softmax(0)

        def labelled(a, b):
            there, back = (m.dpo_loss(logps[x], logps[y], ref_logps[x], ref_logps[y], beta=beta)[0] for x, y in ((a, b), (b, a)))
            return wins[a, b].squeeze() * there + wins[b, a].squeeze() * back

        return expected(labelled, first, second)

    learned = minimise(loss, torch.zeros(5, dtype=torch.float64)).softmax(0).numpy()
    assert np.allclose(learned, closed_form.tilt(ref.numpy(), reward.numpy(), beta), atol=1e-8)
    assert np.abs(learned - closed_form.tilt(np.ones(5), reward.numpy(), beta)).max() > 0.01  # ref is in it


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_labels_shrink_the_law(m, smoothing):
    """Two completions, a preferred with p = .8: βΔ is the logit of p·(1 − ε) + (1 − p)·ε, .8 or .68: Δ = 1.386/β or .754/β."""
    beta, p, ref_logps = 0.5, 0.8, f64(0.3, 0.7).log()

    def loss(z):
        logps = z.log_softmax(0)
        pairs = [m.dpo_loss(logps[[a]], logps[[b]], ref_logps[[a]], ref_logps[[b]], beta=beta, label_smoothing=smoothing)[0]
                 for a, b in ((0, 1), (1, 0))]
        return p * pairs[0] + (1 - p) * pairs[1]

    ratio = minimise(loss, f64(0, 0)).log_softmax(0) - ref_logps
    believed = p * (1 - smoothing) + (1 - p) * smoothing
    assert (ratio[0] - ratio[1]).item() == pytest.approx(math.log(believed / (1 - believed)) / beta, abs=1e-8)


# ---------------------------------------------------------------------------------------------------------------------- main


def test_main_in_rounds(small):
    """Four steps in three rounds, which begin at steps 0, 2 and 3: the reference of each is the policy before it."""
    def loss(w, l, ref_w, ref_l):
        return (1 + (-0.3 * (w.sum() - ref_w.sum() - l.sum() + ref_l.sum())).exp()).log()

    check_main(small, "dpo", loss, beta=0.3, rounds=3)


@pytest.mark.parametrize(("smoothing", "micro_batch"), [(0.0, 0), (0.1, 3)])
def test_main_is_its_account(small, smoothing, micro_batch):
    """Four steps written out again, one answer at a time, unpadded: equal weights, and every logged loss and margin; the first loss is
    log 2, since ref is where the run began."""
    B, beta, lr, steps = 8, 0.3, 3e-3, 4
    module, cfg = small("dpo", beta=beta, label_smoothing=smoothing, steps=steps, micro_batch=micro_batch, lr=lr, held_out=0.0,
                        schedule="constant", warmup=0.0)
    folder = module.main(cfg)
    policy, tokenizer = load_pretrained(cfg.policy), load_tokenizer(cfg.policy)
    ref = copy.deepcopy(policy)
    rows = encode_pairs(tokenizer, read_preferences(cfg.pairs))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def logp(model, x, y):
        logits = model(torch.tensor([x + y]))[0, len(x) - 1 : -1].log_softmax(-1)
        return logits[torch.arange(len(y)), torch.tensor(y)].sum()

    for k, logged in enumerate(read_rows(folder / "metrics.jsonl")):
        losses, margins = [], []
        for i in batch_rows(len(rows), B, k, 0):
            x, w, l = rows[i]
            with torch.no_grad():
                at_ref = logp(ref, x, w) - logp(ref, x, l)
            z = beta * (logp(policy, x, w) - logp(policy, x, l) - at_ref)
            losses.append((1 - smoothing) * (1 + (-z).exp()).log() + smoothing * (1 + z.exp()).log())
            margins.append(z.item())
        optimizer.zero_grad()
        loss = sum(losses) / B
        loss.backward()
        norm = sum(float((p.grad**2).sum()) for p in policy.parameters()) ** 0.5
        for p in policy.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        optimizer.step()
        assert logged["loss"] == pytest.approx(loss.item(), abs=1e-10)
        assert logged["rewards/margins"] == pytest.approx(sum(margins) / B, abs=1e-10)
        assert k or logged["loss"] == pytest.approx(math.log(2), abs=1e-12)
    exported = dict(load_pretrained(folder / "final").named_parameters())
    first = dict(load_pretrained(cfg.policy).named_parameters())
    for name, parameter in policy.named_parameters():
        assert (parameter - exported[name]).abs().max() < 1e-10
    assert max(float((exported[name] - first[name]).detach().abs().max()) for name in first) > 1e-3


@pytest.mark.parametrize(("changes", "message"), [
    ({"label_smoothing": 0.5}, "--label_smoothing 0.5: must be at least 0 and below 0.5, where labels carry no information"),
    ({"label_smoothing": -0.1}, "--label_smoothing -0.1: must be at least 0"),
    ({"beta": 0.0}, "--beta 0.0: must be above 0"), ({"pairs": "absent.jsonl"}, "absent.jsonl: cannot be read"),
    ({"max_len": 500}, "--max_len 500: the policy's context is 128"),
])
def test_bad_settings(small, changes, message):
    module, cfg = small("dpo", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)


# ------------------------------------------------------------------------------------------------------------------------ trl


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_against_trl(tmp_path, m):
    """TRL's own trainer, its batches, masks and forward passes included, on the same two exported folders: equal losses, equal gradients.
    Its smoothed form is its `aot`, which for a single pair is cDPO."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install -r requirements-dev.txt")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install -r requirements-dev.txt")
    transformers = pytest.importorskip("transformers")
    tokenizer = builtin_tokenizer()
    policy, ref = models = [tiny_gpt(tokenizer.vocab_size, seed=seed, max_len=64) for seed in (0, 1)]
    for name, model in zip("01", models, strict=True):
        save_pretrained(model, tmp_path / name, tokenizer)
    for n, settings in ((4, {"loss_type": ["sigmoid"]}), (1, {"loss_type": ["aot"], "label_smoothing": 0.15})):
        theirs = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64).eval() for name in "01"]
        args = trl.DPOConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=n, beta=0.3, max_length=None, bf16=False,
                             gradient_checkpointing=False, use_cpu=True, report_to=[], **settings)
        dataset = datasets.Dataset.from_list([vars(pair) for pair in builtin_pairs(n)])
        trainer = trl.DPOTrainer(model=theirs[0], ref_model=theirs[1], args=args, train_dataset=dataset,
                                 processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "0"))
        trainer.model.eval()  # a GPT-2 of transformers has dropout
        batch = next(iter(trainer.get_train_dataloader()))
        their_loss = trainer.compute_loss(trainer.model, batch)
        their_loss.backward()

        prompts, completions = [], []  # their rows, by their mask: the chosen ones, then the rejected ones
        for ids, scored in zip(batch["input_ids"].tolist(), batch["completion_mask"].tolist(), strict=True):
            first = scored.index(1)
            prompts.append(ids[:first])
            completions.append([token for token, one_of_it in zip(ids, scored, strict=True) if one_of_it])
        pairs = Pairs(*(collate(prompts[a : a + n], completions[a : a + n], pad_id=tokenizer.pad_id) for a in (0, n)))
        policy.zero_grad()
        loss, _ = m.step(policy, ref, pairs, m.Config(beta=0.3, label_smoothing=settings.get("label_smoothing", 0.0)))
        loss.backward()
        assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5) and abs(loss.item() - math.log(2)) > 1e-2
        their_gradient = trainer.model.get_input_embeddings().weight.grad.double()
        assert relative(policy.tok_embed.weight.grad, their_gradient) < 1e-4  # their log-probs are float32
