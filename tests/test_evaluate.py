import json
import math

import pytest
import torch

from minialign import evaluate
from minialign.common import BadInput
from minialign.data import read_preferences
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained


def test_mean_interval():
    """[1, 2, 3, 4]: mean 2.5, sample std 1.290994, 1.96·1.290994/2 = 1.265174."""
    assert evaluate.mean_interval(torch.tensor([1.0, 2, 3, 4])) == pytest.approx((2.5, 1.265174), abs=1e-6)
    assert math.isnan(evaluate.mean_interval(torch.tensor([1.0]))[1])


def test_share_interval_is_wilsons():
    """8 of 10: the textbook's [.490, .943]; 0 of 10 stays inside [0, 1] with a lower end of 0."""
    assert evaluate.share_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert evaluate.share_interval(0, 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)


def test_ratio_interval():
    """Equal lengths: the ordinary mean over rows divided by the length. Against resampling for unequal ones."""
    sums, sizes = torch.tensor([2.0, 4, 6, 8]), torch.full((4,), 2.0)
    mean, half = evaluate.mean_interval(sums / 2)
    assert evaluate.ratio_interval(sums, sizes) == pytest.approx((mean, half), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (400,), generator=generator).double()
    sums = sizes * (2 + 0.5 * torch.randn(400, generator=generator, dtype=torch.float64))
    draws = torch.randint(0, 400, (3000, 400), generator=generator)
    resampled = sums[draws].sum(1) / sizes[draws].sum(1)
    assert evaluate.ratio_interval(sums, sizes)[1] == pytest.approx(1.96 * float(resampled.std()), rel=0.08)


def test_wins_count_ties_half():
    assert evaluate.wins(torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 2, 4])) == 1.5


def test_the_table_against_a_loop(policy_folder, pairs_file, small, capsys):
    """Gap, NLL and implicit accuracy of two policies, recomputed row by row with log_softmax alone."""
    module, cfg = small("sft", steps=20)
    trained = module.main(cfg) / "final"
    capsys.readouterr()
    rows = evaluate.main(evaluate.Config(policies=[str(policy_folder), str(trained)], pairs=str(pairs_file), held_out=1, dtype="float64"))
    out = capsys.readouterr().out
    assert "20 pairs" in out and "(is the reference)" in out and "±" in out

    tokenizer, pairs = load_tokenizer(policy_folder), read_preferences(pairs_file)

    def logp(model, prompt, completion):
        x, y = [tokenizer.bos_id] + tokenizer.encode(prompt), tokenizer.encode(completion) + [tokenizer.eos_id]
        all_logps = model(torch.tensor([x + y])).log_softmax(-1)[0]
        return sum(float(all_logps[len(x) - 1 + i, token].detach()) for i, token in enumerate(y)), len(y)

    ref, policy = load_pretrained(policy_folder), load_pretrained(trained)
    table = [[logp(m, p.prompt, a) for m in (ref, policy) for a in (p.chosen, p.rejected)] for p in pairs]
    gaps = [row[2][0] - row[3][0] for row in table]
    assert rows[1]["gap"][0] == pytest.approx(sum(gaps) / 20, abs=1e-9)
    nll = -sum(row[2][0] for row in table) / sum(row[2][1] for row in table)
    assert rows[1]["nll"][0] == pytest.approx(nll, abs=1e-9)
    margins = [row[2][0] - row[0][0] - row[3][0] + row[1][0] for row in table]
    margins = [0.0 if p.chosen == p.rejected else margin for p, margin in zip(pairs, margins, strict=True)]
    wins = sum(margin > 0 for margin in margins) + 0.5 * sum(margin == 0 for margin in margins)
    assert rows[1]["implicit_accuracy"][0] == pytest.approx(wins / 20)
    assert rows[0]["implicit_accuracy"][0] == 0.5  # a reference against itself: all ties


def test_a_reward_model_and_json(small, pairs_file, tmp_path, capsys):
    module, cfg = small("reward_model")
    reward = str(module.main(cfg) / "final")
    out = tmp_path / "table.json"
    rows = evaluate.main(evaluate.Config(reward=[reward], pairs=str(pairs_file), held_out=0.5, out=str(out)))
    assert rows[0]["n"] == 10 and 0 <= rows[0]["accuracy"][0] <= 1
    assert "accuracy" in capsys.readouterr().out and json.loads(out.read_text())[0]["n"] == 10


def test_batching_does_not_matter(policy_folder, pairs_file):
    settings = dict(policies=[str(policy_folder)], pairs=str(pairs_file), held_out=1, dtype="float64")
    tables = [evaluate.main(evaluate.Config(**settings, batch_size=b)) for b in (1, 7, 32)]
    for table in tables[1:]:
        assert table[0]["gap"] == pytest.approx(tables[0][0]["gap"], abs=1e-10)


def test_held_out_is_the_end_of_the_file(policy_folder, pairs_file):
    rows = evaluate.main(evaluate.Config(policies=[str(policy_folder)], pairs=str(pairs_file), held_out=0.1))
    assert rows[0]["n"] == 2


@pytest.mark.parametrize(("changes", "message"), [
    ({}, "nothing to evaluate"), ({"held_out": 0.0}, "--held_out 0.0"), ({"held_out": 0.01}, "no pair at all"),
])
def test_errors(changes, message, policy_folder, pairs_file):
    settings = {"policies": [str(policy_folder)], "pairs": str(pairs_file), **changes} if changes else {}
    with pytest.raises(BadInput, match=message):
        evaluate.main(evaluate.Config(**settings))


def test_the_wrong_kind_of_model_is_refused(policy_folder, pairs_file, small):
    module, cfg = small("reward_model", steps=1)
    reward = str(module.main(cfg) / "final")
    with pytest.raises(BadInput, match="is a policy: name it with --policies"):
        evaluate.main(evaluate.Config(reward=[str(policy_folder)], pairs=str(pairs_file)))
    with pytest.raises(BadInput, match="is a reward model: name it with --reward"):
        evaluate.main(evaluate.Config(policies=[reward], pairs=str(pairs_file)))


def test_pairs_without_room_for_an_answer_are_left_out_aloud(policy_folder, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "ask for tea: " * n, "chosen": "tea", "rejected": "tea now!"} for n in (1, 1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = evaluate.main(evaluate.Config(policies=[str(policy_folder)], pairs=str(path), held_out=1, max_len=40))
    assert table[0]["n"] == 2 and "1 of 3 rows are left out: their prompt alone fills --max_len 40" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no pair has a scored token"):
        evaluate.main(evaluate.Config(policies=[str(policy_folder)], pairs=str(path), held_out=1, max_len=5))
