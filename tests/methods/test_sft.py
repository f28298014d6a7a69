import math

import pytest
import torch
from torch.autograd import gradcheck

from minialign.batch import collate
from minialign.engine.common import BadInput, read_rows
from minialign.methods.sft import sft_loss, step
from minialign.model import GPT, GPTConfig
from minialign.tokenizer import END


def test_worked_number():
    """Token losses [1, 1] and [2, 2, 2, 2]: the mean over tokens is 10/6; sequence means would give 1.5, sequence sums 5."""
    logps = torch.tensor([[-1.0, -1, 0, 0], [-2, -2, -2, -2]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    loss, stats = sft_loss(logps, mask)
    assert loss.item() == pytest.approx(10 / 6, abs=1e-12)
    assert stats["nll"].item() == pytest.approx(10 / 6) and stats["scored_tokens"].item() == 6
    assert not stats["nll"].requires_grad


def test_micro_batches_add_up_to_the_whole():
    """With n_tokens of the whole step, two micro-batches sum to the step's loss; their own means (1 and 2) would average to 1.5."""
    logps = torch.tensor([[-1.0, -1, 0, 0], [-2, -2, -2, -2]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    parts = [sft_loss(logps[b : b + 1], mask[b : b + 1], n_tokens=6)[0] for b in range(2)]
    assert sum(parts).item() == pytest.approx(10 / 6)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    logps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert gradcheck(lambda x: sft_loss(x, mask)[0], logps)


def test_nothing_scored_is_zero_not_nan():
    """What cross_entropy with every label ignored would answer with NaN; and −inf in a masked slot stays out."""
    logps = torch.full((1, 2), -math.inf, requires_grad=True)
    loss, _ = sft_loss(logps, torch.zeros(1, 2))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logps.grad, torch.zeros(1, 2))


def test_ranks_are_asserted():
    with pytest.raises(AssertionError):
        sft_loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError):
        sft_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_step_ignores_prompt_targets_and_padding():
    """The loss must not depend on what the prompt predicts or on the pad id: a lost mask would show here."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig.tiny(9)).double()
    one, two = ([1, 2, 3], [4, 5, 0]), ([1], [6, 0])
    loss, _ = step(policy, collate([one[0], two[0]], [one[1], two[1]], pad_id=0))
    other_pad, _ = step(policy, collate([one[0], two[0]], [one[1], two[1]], pad_id=7))
    assert loss.item() == pytest.approx(other_pad.item(), abs=1e-14)
    by_hand = 0.0
    for prompt, completion in (one, two):
        logps = policy(torch.tensor([prompt + completion])).log_softmax(-1)[0]
        by_hand -= sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))
    assert loss.item() == pytest.approx(by_hand / 5, abs=1e-12)


def test_training_lowers_the_held_out_loss(small):
    module, cfg = small("sft", steps=60, eval_every=20, lr=1e-2)
    folder = module.main(cfg)
    losses = [row["eval/nll"] for row in read_rows(folder / "metrics.jsonl") if "eval/nll" in row]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.3, losses


def test_a_base_model_from_plain_text(small, tmp_path):
    """`sft --text FILE --policy new`: its own tokenizer, every token scored, EOS learned."""
    text = tmp_path / "corpus.txt"
    text.write_text("the cat sat on the mat. " * 200)
    module, cfg = small("sft", policy="new", text=str(text), demos="", steps=60, vocab=300, max_len=32, width=32, lr=1e-2)
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.5 < 5 < rows[0]["loss"]


def test_too_long_prompts_are_refused_at_second_0(small):
    module, cfg = small("sft", max_len=4)
    with pytest.raises(BadInput, match="no row has a scored token.*--max_len 4"):
        module.main(cfg)


def test_held_out_text_is_held_out_by_document(small, tmp_path, monkeypatch):
    """No document has windows on both sides; a single document is cut by windows."""
    from minialign.engine.run import Run
    from minialign.methods import sft

    documents = [f"document {i} " * (1 + i % 5) for i in range(20)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join('{"text": "%s"}\n' % text for text in documents))
    module, cfg = small("sft", policy="new", text=str(path), demos="", vocab=300, max_len=16, held_out=0.2)
    _, tokenizer, rows, held_out = sft.open_policy_and_rows(Run("sft", cfg))
    held = tokenizer.decode([token for _, completion in held_out for token in completion])
    trained = tokenizer.decode([token for _, completion in rows for token in completion])
    held, trained = held.replace(END, ""), trained.replace(END, "")
    assert held == "".join(documents[16:]) and trained == "".join(documents[:16])

    path = tmp_path / "one.txt"
    path.write_text("".join(documents))
    module, cfg = small("sft", policy="new", text=str(path), demos="", vocab=300, max_len=16, held_out=0.2)
    _, tokenizer, rows, held_out = sft.open_policy_and_rows(Run("sft", cfg))
    assert len(held_out) == int(0.2 * (len(rows) + len(held_out))) > 0
