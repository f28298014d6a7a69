"""collate by its docstring's example and by properties over random rows; masked_mean and whiten by hand."""

import math

import pytest
import torch

from minialign.batch import Batch, Pairs, Rollout, collate, masked_mean, stack, whiten
from minialign.engine.common import BadInput

hypothesis = pytest.importorskip("hypothesis", reason="the property tests need hypothesis (requirements-dev.txt)")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

ids = st.lists(st.integers(0, 9), max_size=8)
rows = st.lists(st.tuples(ids.filter(len), ids), min_size=1, max_size=6)  # (prompt, completion); a completion may be empty


def test_docstring_example():
    """prompt a b, completion c d EOS: inputs a b c d, targets b c d EOS, mask . 1 1 1."""
    batch = collate([[1, 2]], [[3, 4, 0]], pad_id=9)
    assert batch.inputs.tolist() == [[1, 2, 3, 4]]
    assert batch.targets.tolist() == [[2, 3, 4, 0]]
    assert batch.mask.tolist() == [[False, True, True, True]] and batch.mask.dtype == torch.bool
    assert len(batch) == 1


def test_a_ragged_batch_by_hand():
    """Rows of 5 and 3 tokens: T = 4, the short row is padded on the right, and its EOS (0) is scored although pad is 0 too."""
    batch = collate([[1, 2], [5]], [[3, 4, 0], [6, 0]], pad_id=0)
    assert batch.inputs.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4, 0], [6, 0, 0, 0]]
    assert batch.mask.tolist() == [[False, True, True, True], [True, True, False, False]]


@settings(max_examples=200, deadline=None, database=None)
@given(rows=rows, pad_id=st.integers(0, 9))
def test_what_is_scored_is_the_completions_and_nothing_else(rows, pad_id):
    """The scored targets, read row by row, are the completions themselves, so their number is the sum of the lengths."""
    prompts, completions = zip(*rows, strict=True)
    batch = collate(prompts, completions, pad_id=pad_id)
    assert int(batch.mask.sum()) == sum(map(len, completions))
    for b, completion in enumerate(completions):
        assert batch.targets[b][batch.mask[b]].tolist() == completion
        assert not batch.mask[b, : len(prompts[b]) - 1].any()


@settings(max_examples=200, deadline=None, database=None)
@given(rows=rows, pad_id=st.integers(0, 9))
def test_targets_are_inputs_one_later_and_rows_come_back_whole(rows, pad_id):
    prompts, completions = zip(*rows, strict=True)
    batch = collate(prompts, completions, pad_id=pad_id)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    whole = torch.cat([batch.inputs[:, :1], batch.targets], dim=1)
    for b, (prompt, completion) in enumerate(rows):
        row = [*prompt, *completion]
        assert whole[b, : len(row)].tolist() == row
        assert whole[b, len(row) :].eq(pad_id).all()
    assert whole.shape[1] == max(2, max(len(p) + len(c) for p, c in rows))


@settings(max_examples=100, deadline=None, database=None)
@given(rows=rows)
def test_the_mask_does_not_depend_on_the_pad_id(rows):
    """Masks come from lengths: any pad id, be it EOS or a word of the completion, gives the same mask."""
    prompts, completions = zip(*rows, strict=True)
    masks = [collate(prompts, completions, pad_id=pad).mask for pad in range(10)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@settings(max_examples=200, deadline=None, database=None)
@given(rows=rows, max_len=st.integers(1, 16))
def test_max_len_cuts_the_end_and_invents_nothing(rows, max_len):
    """Scored are exactly the completion tokens among a row's first max_len tokens; a cut completion gets no EOS in exchange."""
    prompts, completions = zip(*[(p, [*(i % 9 for i in c), 9]) for p, c in rows], strict=True)  # 9 is EOS, once, at the end
    batch = collate(prompts, completions, pad_id=9, max_len=max_len)
    assert batch.inputs.shape[1] <= max(1, max_len - 1)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        kept = completion[: max(0, max_len - len(prompt))]
        scored = batch.targets[b][batch.mask[b]].tolist()
        assert scored == kept
        assert (9 in scored) == (len(prompt) + len(completion) <= max_len)


def test_a_prompt_that_fills_max_len_leaves_nothing_scored():
    batch = collate([[1, 2, 3], [1]], [[4, 0], [2, 0]], pad_id=0, max_len=3)
    assert batch.mask.tolist() == [[False, False], [True, True]]
    assert not collate([[1, 2, 3]], [[4, 0]], pad_id=0, max_len=3).mask.any()
    assert not collate([[1, 2, 3]], [[4, 0]], pad_id=0, max_len=2).mask.any()


def test_rows_of_one_token_still_have_one_prediction():
    """T is at least 1, so that nothing downstream meets a tensor without columns."""
    batch = collate([[5]], [[]], pad_id=0)
    assert batch.inputs.tolist() == [[5]] and not batch.mask.any()


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([], [], "no rows"),
        ([[1], []], [[2], [3]], "row 1 has an empty prompt"),
        ([[1]], [[2], [3]], "1 prompts and 2 completions"),
    ],
)
def test_collate_refuses(prompts, completions, message):
    with pytest.raises(BadInput, match=message):
        collate(prompts, completions, pad_id=0)


def test_masked_mean_by_hand():
    x, mask = torch.tensor([[1.0, 2.0], [6.0, 100.0]]), torch.tensor([[True, True], [True, False]])
    assert masked_mean(x, mask).item() == 3
    assert masked_mean(x, mask.float()).item() == 3  # a mask of ones and zeros is as good
    assert masked_mean(x, torch.zeros(2, 2)).item() == 0


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_masked_entries_may_be_anything(poison):
    x, mask = torch.tensor([1.0, 2.0, poison], requires_grad=True), torch.tensor([True, True, False])
    mean = masked_mean(x, mask)
    mean.backward()
    assert mean.item() == 1.5 and x.grad.tolist() == [0.5, 0.5, 0]
    assert whiten(x.detach(), mask).tolist() == pytest.approx([-1, 1, 0], abs=1e-6)


def test_whiten_uses_the_population_variance():
    """A = .635, .665, .7: mean 2/3, population variance 7.0556e-4: (A − mean)/sd = −1.192158, −.062745, 1.254903 with the 1e-8."""
    x = torch.tensor([0.635, 0.665, 0.7], dtype=torch.float64)
    assert whiten(x, torch.ones(3)).tolist() == pytest.approx([-1.192158, -0.062745, 1.254903], abs=1e-6)
    padded = torch.tensor([[0.635, 7.0], [0.665, 0.7]], dtype=torch.float64)
    white = whiten(padded, torch.tensor([[1, 0], [1, 1]]))
    assert white.flatten().tolist() == pytest.approx([-1.192158, 0, -0.062745, 1.254903], abs=1e-6)


def test_whiten_of_equal_or_no_entries_is_zero():
    for value in (2.0, 0.1, 0.7):
        assert whiten(torch.full((7,), value), torch.ones(7)).tolist() == [0] * 7
    assert whiten(torch.tensor([2.0, 3.0]), torch.zeros(2)).tolist() == [0, 0]


def test_to_moves_every_tensor_and_keeps_the_class():
    """The meta device stands in for a GPU: every tensor field must arrive there, the lists stay lists."""
    batch = collate([[1]], [[2, 0]], pad_id=0)
    rollout = Rollout(batch.inputs, batch.targets, batch.mask, torch.zeros(1, 2), torch.tensor([2]), torch.tensor([True]), [[2, 0]])
    moved = rollout.to("meta")
    assert type(moved) is Rollout and moved.completions == [[2, 0]]
    fields = ("inputs", "targets", "mask", "old_logps", "lengths", "finished")
    assert {getattr(moved, name).device.type for name in fields} == {"meta"}
    assert {getattr(rollout, name).device.type for name in fields} == {"cpu"}
    pairs = Pairs(batch, rollout).to("meta")
    assert len(pairs) == 1 and type(pairs.rejected) is Rollout and pairs.chosen.mask.device.type == "meta"


def test_stacked_batches_are_their_rows_padded():
    """Two batches of other lengths: the rows of each come out as they went in, and nothing of the padding is scored."""
    first, second = collate([[1, 2]], [[3]], pad_id=9), collate([[4], [5, 6]], [[7, 8, 1], [2]], pad_id=9)
    both = stack([first, second])
    assert both.mask.shape == (3, 3)
    assert both.inputs[0, :2].tolist() == [1, 2] and both.targets[0, :2].tolist() == [2, 3]
    assert both.mask[0].tolist() == [False, True, False]
    for name in ("inputs", "targets", "mask"):
        assert torch.equal(getattr(both, name)[1:], getattr(second, name))


def test_the_rows_of_a_batch_are_picked_and_trimmed():
    """Rows of 4, 2 and 3 positions. A slice is a view and a trimmed slice too; a list of rows is a copy."""
    batch = collate([[1, 2], [5], [7, 8]], [[3, 4, 0], [6, 0], [9, 0]], pad_id=0)
    assert batch.sizes == [4, 2, 3] and batch.to("cpu").sizes == [4, 2, 3]
    short = batch[1:].trimmed()
    assert short.inputs.tolist() == [[5, 6, 0], [7, 8, 9]] and short.sizes == [2, 3] and short.mask.shape == (2, 3)
    short.inputs[0, 0] = 6
    assert batch.inputs[1, 0] == 6
    picked = batch[[2, 0]]
    assert picked.inputs.tolist() == [[7, 8, 9, 0], [1, 2, 3, 4]] and picked.sizes == [3, 4]
    picked.inputs[0, 0] = 1
    assert batch.inputs[2, 0] == 7
    assert [micro.sizes for micro in batch.micro_batches(2)] == [[4, 3], [2]] and batch.micro_batches(0) == [batch]
    assert [micro.inputs.shape for micro in batch.micro_batches(2, lengths=[1, 1, 9])] == [(1, 3), (2, 4)]
    by_hand = Batch(batch.inputs, batch.targets, batch.mask)  # whose sizes are not known
    assert by_hand.trimmed().inputs.shape == (3, 4) and len(by_hand.micro_batches(2)) == 2
