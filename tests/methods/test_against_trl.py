"""Each loss that TRL has too: equal values and equal gradients on 200 random batches, of 1 to 8 rows, with random β, γ, δ and weights.

TRL's formulas live in methods of its trainers, between forward pass and metrics. They are called unbound, on a stand-in for the trainer
with the attributes that they read, and on a model that returns given log-probs: none of their arithmetic is copied here. Log-probs are of
tokens, answers of unequal length, so sums and averages are theirs as well. A whole trainer, with its own batches and forward passes, is
test_dpo.py's test_against_trl, and KTO's at the end of this page. TRL has no Savage, exponential or squared hinge loss.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from minialign.batch import collate
from minialign.data import encode_feedback
from minialign.methods.dpo import dpo_loss
from minialign.methods.gpo import gpo_loss
from minialign.methods.ipo import ipo_loss
from minialign.methods.kto import Config as KTOSettings
from minialign.methods.kto import kto_loss, mismatched_kl, reference_point
from minialign.methods.kto import step as kto_step
from minialign.methods.orpo import orpo_loss
from minialign.methods.simpo import simpo_loss
from minialign.methods.slic import slic_loss
from minialign.task import builtin_feedback, builtin_tokenizer
from minialign.weights import save_pretrained
from tests.enumerable import tiny_gpt

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
BATCHES, T = 200, 6
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="trl is not installed: pip install -r requirements-dev.txt")


@pytest.fixture(scope="module")
def cpo(trl):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    return CPOTrainer


def one_process():
    """What the trainers ask of accelerate, with nobody else there."""
    return SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def trainer(**attributes):
    return SimpleNamespace(accelerator=one_process(), model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None,
                           precompute_ref_logps=True, use_weighting=False, f_divergence_type="reverse_kl", label_smoothing=0.0, alpha=0.0,
                           _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **attributes)


class Answers:
    """Random (B, T) token log-probs under policy and ref, 0 outside answers of unequal length, behind prompts of one or two tokens."""

    def __init__(self, generator, rows, longest=T):
        first = torch.randint(0, 2, (rows, 1), generator=generator)
        length = torch.randint(1, longest - 1, (rows, 1), generator=generator)
        place = torch.arange(T)
        self.mask = (place >= first) & (place < first + length)  # (B, T) predictions
        self.tokens = [torch.where(self.mask, -2 * torch.rand(rows, T, generator=generator, dtype=torch.float64), 0) for _ in range(2)]
        self.tokens[0].requires_grad_()
        self.lengths = self.mask.sum(1)

    def sums(self):
        """(B,) of the policy and of ref."""
        return [tokens.sum(1) for tokens in self.tokens]

    def averages(self):
        return [sums / self.lengths for sums in self.sums()]


def inputs_of(mask):
    """The columns of a batch that a trainer reads beside the log-probs: a completion mask has one more place, for the first token."""
    ids = torch.zeros(len(mask), T + 1, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": torch.cat([ids[:, :1], mask.long()], 1)}


def outputs_of(log_probs):
    zeros = torch.zeros(log_probs.shape)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def draw(generator, low, high):
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def compare(loss_of, seed=0, tolerance=1e-6):
    """loss_of(generator, chosen, rejected, B) -> (ours, theirs), on BATCHES batches: the losses, and their gradients in each token."""
    generator, seen = torch.Generator().manual_seed(seed), set()
    for _ in range(BATCHES):
        B = int(torch.randint(1, 9, (), generator=generator))
        pair = [Answers(generator, B) for _ in range(2)]
        ours, theirs = loss_of(generator, *pair, B)
        assert ours.item() == pytest.approx(float(theirs), rel=tolerance, abs=tolerance)
        tokens = [side.tokens[0] for side in pair]
        slopes = [torch.autograd.grad(loss, tokens, retain_graph=True, materialize_grads=True) for loss in (ours, theirs)]
        for mine, other in zip(*slopes, strict=True):
            assert torch.allclose(mine, other, rtol=tolerance, atol=tolerance)
        seen.add(round(ours.item(), 6))
    assert len(seen) > BATCHES // 2


def through_dpo_trainer(trl, loss_type, beta, chosen, rejected, **attributes):
    inputs = inputs_of(torch.cat([chosen.mask, rejected.mask]))
    inputs |= {"ref_chosen_logps": chosen.sums()[1], "ref_rejected_logps": rejected.sums()[1]}
    stand_in = trainer(beta=beta, loss_types=[loss_type], loss_weights=[1.0])
    vars(stand_in).update(attributes)
    outputs = outputs_of(torch.cat([chosen.tokens[0], rejected.tokens[0]]))
    return trl.DPOTrainer._compute_loss(stand_in, lambda **_: outputs, inputs, False)


def sides(chosen, rejected, of="sums"):
    """The four (B,) arguments of a loss with a reference."""
    (w, ref_w), (l, ref_l) = (getattr(side, of)() for side in (chosen, rejected))
    return w, l, ref_w, ref_l


@pytest.mark.parametrize(("loss_type", "ours"), [("sigmoid", "logistic"), ("hinge", "hinge")])
def test_dpo_and_the_hinge(trl, loss_type, ours):
    """DPOTrainer's sigmoid and hinge: of β·Δ, sums over the tokens, ref taken off."""
    def losses(generator, chosen, rejected, B):
        beta = draw(generator, 0.05, 1)
        mine = gpo_loss(*sides(chosen, rejected), beta=beta, f=ours)[0]
        if ours == "logistic":
            assert mine.item() == pytest.approx(dpo_loss(*sides(chosen, rejected), beta=beta)[0].item(), rel=1e-12)
        return mine, through_dpo_trainer(trl, loss_type, beta, chosen, rejected)

    compare(losses)


def test_ipo_of_averages(trl):
    """TRL's IPO takes log-ratios averaged over the tokens: the same function of the margin, so averages are given to ours as well."""
    def losses(generator, chosen, rejected, B):
        beta = draw(generator, 0.05, 1)
        return (ipo_loss(*sides(chosen, rejected, "averages"), beta=beta)[0],
                through_dpo_trainer(trl, "ipo", beta, chosen, rejected))

    compare(losses)


def test_ipo_of_sums_is_not_theirs(trl):
    """For answers of one token the two are one; for longer ones they are not."""
    generator = torch.Generator().manual_seed(0)
    for longest in (T, 3):
        chosen, rejected = Answers(generator, 4, longest), Answers(generator, 4, longest)
        theirs = through_dpo_trainer(trl, "ipo", 0.3, chosen, rejected)
        gap = abs(ipo_loss(*sides(chosen, rejected), beta=0.3)[0] - theirs).item()
        assert gap < 1e-12 if longest == 3 else gap > 0.1


def test_smoothed_labels(trl, cpo):
    """cDPO: TRL has it as `aot`, which for a single pair is no more than that, and in its reference-free trainer, fed with differences."""
    def losses(generator, chosen, rejected, B):
        beta, smoothing = draw(generator, 0.05, 1), draw(generator, 0, 0.49)
        w, l, ref_w, ref_l = sides(chosen, rejected)
        stand_in = trainer(beta=beta, loss_type="sigmoid")
        stand_in.label_smoothing = smoothing
        theirs = cpo.cpo_loss(stand_in, w - ref_w, l - ref_l)[0].mean()
        if B == 1:
            aot = through_dpo_trainer(trl, "aot", beta, chosen, rejected, label_smoothing=smoothing)
            assert aot.item() == pytest.approx(theirs.item(), abs=1e-9)
        return dpo_loss(w, l, ref_w, ref_l, beta=beta, label_smoothing=smoothing)[0], theirs

    compare(losses)


def test_noisy_labels_by_robust(trl):
    """TRL's `robust` takes the smoothed part off instead of adding it: ((1 − ε)·f(x) − ε·f(−x))/(1 − 2ε), made of dpo.py's two halves."""
    def losses(generator, chosen, rejected, B):
        beta, smoothing = draw(generator, 0.05, 1), draw(generator, 0, 0.4)
        w, l, ref_w, ref_l = sides(chosen, rejected)
        there, back = dpo_loss(w, l, ref_w, ref_l, beta=beta)[0], dpo_loss(l, w, ref_l, ref_w, beta=beta)[0]
        ours = ((1 - smoothing) * there - smoothing * back) / (1 - 2 * smoothing)
        return ours, through_dpo_trainer(trl, "robust", beta, chosen, rejected, label_smoothing=smoothing)

    compare(losses)


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_the_reference_free_hinge_and_ipo(cpo, loss_type):
    """CPOTrainer's, of differences of sums; its hinge at β = 1/δ, times δ, is SLiC's term, which has no reference."""
    def losses(generator, chosen, rejected, B):
        beta = draw(generator, 0.1, 1)
        w, l, ref_w, ref_l = sides(chosen, rejected)
        theirs = cpo.cpo_loss(trainer(beta=beta, loss_type=loss_type), w - ref_w, l - ref_l)[0].mean()
        if loss_type == "ipo":
            return ipo_loss(w, l, ref_w, ref_l, beta=beta)[0], theirs
        slic = slic_loss(w - ref_w, l - ref_l, w, delta=1 / beta, weight=0.0)[0]
        assert beta * slic.item() == pytest.approx(theirs.item(), abs=1e-9)
        return gpo_loss(w, l, ref_w, ref_l, beta=beta, f="hinge")[0], theirs

    compare(losses)


def test_slic_with_its_likelihood(cpo):
    """CPOTrainer's whole loss with `hinge`, β = 1, so δ = 1: the hinge and cpo_alpha times a likelihood, the chosen answers'."""
    def losses(generator, chosen, rejected, B):
        weight, (w, l) = draw(generator, 0.01, 1), (side.sums()[0] for side in (chosen, rejected))
        stand_in = trainer(beta=1.0, loss_type="hinge", cpo_alpha=weight)
        stand_in.concatenated_forward = lambda model, batch: (w, l, torch.zeros(1), torch.zeros(1), -w.mean())
        stand_in.cpo_loss = lambda *given: cpo.cpo_loss(stand_in, *given)
        return slic_loss(w, l, w, delta=1.0, weight=weight)[0], cpo.get_batch_loss_metrics(stand_in, None, {})[0]

    compare(losses)


def test_simpo(cpo):
    """CPOTrainer's simpo: averages, β our scale, and its simpo_gamma our γ, divided by β and multiplied again."""
    def losses(generator, chosen, rejected, B):
        scale, gamma = draw(generator, 0.5, 10), draw(generator, 0, 3)
        w, l = (side.averages()[0] for side in (chosen, rejected))
        theirs = cpo.cpo_loss(trainer(beta=scale, loss_type="simpo", simpo_gamma=gamma), w, l)[0].mean()
        return simpo_loss(w, l, scale=scale, target_margin=gamma)[0], theirs

    compare(losses)


def test_orpo(trl):
    """ORPOTrainer's whole loss: likelihood minus β times its mean log σ, of averages. It rounds them to float32, and may score the prompt
    in its likelihood: here the likelihood given to it is that of the chosen answers alone."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    def losses(generator, chosen, rejected, B):
        weight, (w, l) = draw(generator, 0.01, 1), (side.averages()[0] for side in (chosen, rejected))
        stand_in = trainer(beta=weight)
        stand_in.concatenated_forward = lambda model, batch: (w, l, torch.zeros(1), torch.zeros(1), -w.mean())
        stand_in.odds_ratio_loss = lambda *given: ORPOTrainer.odds_ratio_loss(stand_in, *given)
        theirs, _ = ORPOTrainer.get_batch_loss_metrics(stand_in, None, {})
        return orpo_loss(w, l, weight=weight)[0], theirs

    compare(losses)


def test_kto(trl):
    """KTOTrainer's: the chosen and the rejected answers as one batch of labelled ones in random order, z₀ from other (B,) log-probs that
    play the mismatched answers, weights that differ. Now and then a kind is missing."""
    clamped = []

    def losses(generator, chosen, rejected, B):
        beta, weights = draw(generator, 0.05, 1), (draw(generator, 0.5, 2), draw(generator, 0.5, 2))
        answers, others = chosen, Answers(generator, B)
        label = torch.rand(B, generator=generator) < 0.5
        inputs = inputs_of(answers.mask)
        inputs |= {f"KL_{name}": column + 1 - 1 for name, column in inputs_of(others.mask).items()}
        inputs |= {"label": label, "ref_logps": answers.sums()[1], "ref_KL_logps": others.sums()[1]}
        stand_in = trainer(beta=beta, loss_type="kto", calculate_KL=True, desirable_weight=weights[0], undesirable_weight=weights[1])
        stand_in._compute_kl_logps = lambda model, batch: trl.KTOTrainer._compute_kl_logps(stand_in, model, batch)

        def model(input_ids, **_):
            return outputs_of((others if input_ids is inputs["KL_input_ids"] else answers).tokens[0])

        theirs = trl.KTOTrainer._compute_loss(stand_in, model, inputs, False)
        kl = mismatched_kl(*others.sums())
        clamped.append(kl.item() == 0)
        assert stand_in._metrics["train"]["kl"] == [pytest.approx(kl.item(), abs=1e-9)]
        weighted = dict(desirable_weight=weights[0], undesirable_weight=weights[1])
        return kto_loss(*answers.sums(), label, kl, beta=beta, **weighted)[0], theirs

    compare(losses)
    assert 0.2 < sum(clamped) / len(clamped) < 0.8


def test_ktos_own_trainer(trl, tmp_path):
    """TRL's KTO trainer on two exported folders, its batches, masks, rotated answers and forward passes included: equal loss, z₀ and
    gradient."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install -r requirements-dev.txt")
    transformers = pytest.importorskip("transformers")
    tokenizer, n = builtin_tokenizer(), 6
    models = [tiny_gpt(tokenizer.vocab_size, seed=seed, max_len=64) for seed in (0, 1)]
    feedback = builtin_feedback(n)[:n]
    encoded = encode_feedback(tokenizer, feedback)

    def batch_of(rows, picked):
        return collate([rows[i][0] for i in picked], [rows[i][1] for i in picked], pad_id=tokenizer.pad_id)

    if reference_point(*models, encoded, batch_of, 0) == 0:
        models.reverse()
    policy, ref = models
    for name, model in zip("01", models, strict=True):
        save_pretrained(model, tmp_path / name, tokenizer)
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64).eval() for name in "01"]
    args = trl.KTOConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=n, beta=0.3, desirable_weight=1.5,
                         undesirable_weight=0.75, max_length=None, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[])
    dataset = datasets.Dataset.from_list([{"prompt": r.prompt, "completion": r.completion, "label": r.desirable} for r in feedback])
    their_trainer = trl.KTOTrainer(model=theirs[0], ref_model=theirs[1], args=args, train_dataset=dataset,
                                   processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "0"))
    their_trainer.model.eval()
    batch = next(iter(their_trainer.get_train_dataloader()))
    their_loss = their_trainer.compute_loss(their_trainer.model, batch)
    their_loss.backward()

    kl = reference_point(policy, ref, encoded, batch_of, 2)
    settings = KTOSettings(beta=0.3, desirable_weight=1.5, undesirable_weight=0.75)
    labels = torch.tensor([label for *_, label in encoded])
    loss, _ = kto_step(policy, ref, batch_of(encoded, range(n)), labels, kl, settings)
    loss.backward()
    assert kl.item() > 0.01 and their_trainer._metrics["eval"]["kl"][-1] == pytest.approx(kl.item(), abs=1e-5)
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-6)
    their_gradient = their_trainer.model.get_input_embeddings().weight.grad.double()
    assert float((policy.tok_embed.weight.grad - their_gradient).norm() / their_gradient.norm()) < 1e-4  # their log-probs are float32
