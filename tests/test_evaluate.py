import json
import math

import pytest
import torch

from minialign import evaluate
from minialign.data import encode_prompt, read_preferences
from minialign.engine.common import BadInput, read_rows
from minialign.logps import token_logps
from minialign.methods import dpo
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.task import builtin_tokenizer
from minialign.tokenizer import load_tokenizer, train_bpe
from minialign.weights import load_pretrained, save_pretrained
from tests.conftest import EACH_LOOP, METHODS
from tests.enumerable import Enumerated


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
    assert evaluate.ratio_interval(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 9.0]))[0] == 1.1  # 11 / 10; the rows' mean is 1.5


def test_held_out_nll_is_nats_per_scored_token(policy_folder):
    """Rows of 1 to 9 tokens, in passes of 2: the sum over all tokens divided by their number, by log_softmax and a loop."""
    from minialign.batch import collate
    from minialign.methods import sft

    policy, nats, tokens = load_pretrained(policy_folder), 0.0, 0
    rows = [([3, 4 + i], [5 + (i * j) % 7 for j in range(length)]) for i, length in enumerate((1, 9, 2, 5, 3))]
    for prompt, completion in rows:
        logps = policy(torch.tensor([prompt + completion]))[0].log_softmax(-1)
        nats -= sum(logps[len(prompt) + j - 1, token].item() for j, token in enumerate(completion))
        tokens += len(completion)
    found = evaluate.held_out_nll(policy, rows, lambda rows, picked: collate(*zip(*[rows[i] for i in picked], strict=True), pad_id=0),
                                  sft.Config(eval_batch=2))
    assert found["eval/nll"] == pytest.approx(nats / tokens, abs=1e-10)


def test_held_out_pairs_are_averaged_over_rows():
    """Losses 1 2 4 8 16 in passes of two, two and one: 31 / 5, whatever the passes are; the means of the passes would give 8.33."""
    losses = torch.tensor([1.0, 2, 4, 8, 16])

    def step(picked):
        return losses[picked].mean(), {"rewards/accuracies": (losses[picked] > 3).float().mean()}

    rows = [([1], [2], [3] * i) for i in range(5)]
    for size in (1, 2, 3, 5):
        found = evaluate.held_out_pairs(step, rows, lambda rows, picked: picked, dpo.Config(eval_batch=size))
        assert found == {"eval/loss": pytest.approx(31 / 5), "eval/accuracy": pytest.approx(3 / 5)}


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


@pytest.mark.parametrize("method", EACH_LOOP)
def test_no_pass_of_an_evaluation_has_more_rows_than_a_training_pass(small, monkeypatch, method):
    """With --micro_batch 2 of 8 rows. Sampling, which has a cache, keeps its batch. The rows are counted where they enter the model."""
    rows, hidden = {True: [], False: []}, GPT.hidden

    def counted(self, inputs, *more, cache=None, **options):
        if cache is None:
            rows[torch.is_grad_enabled()].append(len(inputs))
        return hidden(self, inputs, *more, cache=cache, **options)

    monkeypatch.setattr(GPT, "hidden", counted)
    module, cfg = small(method, micro_batch=2, steps=2, eval_every=1, held_out=0.45)
    metrics = read_rows(module.main(cfg) / "metrics.jsonl")
    assert rows[False] and max(rows[False]) <= max(rows[True]) and any(name.startswith("eval/") for name in metrics[-1])
    results = [{name: value for name, value in row.items() if name.startswith("eval/")} for row in metrics]
    module, cfg = small(method, steps=2, eval_every=1, held_out=0.45)
    for row, result in zip(read_rows(module.main(cfg) / "metrics.jsonl"), results, strict=True):
        assert {name: row[name] for name in result} == pytest.approx(result, abs=1e-9)


@pytest.mark.parametrize("method", [pytest.param(method, marks=[pytest.mark.slow] * (method not in ("sft", "kto"))) for method in METHODS])
def test_eval_batch_changes_no_number(small, method):
    """--eval_batch 1 and 5 of 8 rows: to rounding the numbers of the default, and passes of that many rows."""
    results = []
    for size in (0, 1, 5):
        module, cfg = small(method, steps=2, eval_every=1, held_out=0.45, eval_batch=size)
        rows = read_rows(module.main(cfg) / "metrics.jsonl")
        results.append([{name: value for name, value in row.items() if name.startswith("eval/")} for row in rows])
    assert results[0][0]
    for found in results[1:]:
        assert found == [pytest.approx(row, abs=1e-7) for row in results[0]]  # a share is counted in float32


def test_win_shares():
    """Prompt 1: answers 1, 3 against 2, 3: 1<2, 1<3, 3>2, 3=3, so (0 + 0 + 1 + ½)/4 = .375. Prompt 2: always ties."""
    shares = evaluate.win_shares(torch.tensor([[1.0, 3], [5, 5]]), torch.tensor([[2.0, 3], [5, 5]]))
    assert shares.tolist() == [0.375, 0.5]
    other = evaluate.win_shares(torch.tensor([[2.0, 3], [5, 5]]), torch.tensor([[1.0, 3], [5, 5]]))
    assert (shares + other).tolist() == [1, 1]


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_what_a_policy_writes(policy_folder, small, tau):
    """KL (at the temperature of sampling), rewards, lengths of the answers, recomputed answer by answer from the same samples; n answers of
    a prompt are averaged first."""
    module, cfg = small("sft", steps=20)
    ref, policy, tokenizer = load_pretrained(policy_folder), load_pretrained(module.main(cfg) / "final"), load_tokenizer(policy_folder)
    prompts = ["ask for tea: ", "ask for a map: ", "ask for tea: "]
    settings = evaluate.Config(n=4, max_new=9, batch_size=2, seed=3, tau=tau)
    measures = evaluate.sample_measures(policy, tokenizer, ref, prompts, lambda prompts, texts: [len(text) for text in texts], settings)
    assert len(measures["texts"]) == 12 and measures["rewards"].shape == (3, 4) and measures["kl"].shape == (3,)
    assert measures["rewards"].flatten().tolist() == [len(text) for text in measures["texts"]]
    kls = []
    for row, text in enumerate(measures["texts"]):
        y = tokenizer.encode(text) + ([tokenizer.eos_id] if measures["finished"][row] else [])
        x = [tokenizer.bos_id] + tokenizer.encode(prompts[row // 4])
        assert measures["tokens"][row] == len(y)
        logps = [(model(torch.tensor([x + y])) / tau).log_softmax(-1)[0, len(x) - 1 : -1].detach() for model in (policy, ref)]
        kls.append(sum(float(logps[0][t, token] - logps[1][t, token]) for t, token in enumerate(y)))
    assert measures["kl"].tolist() == pytest.approx(torch.tensor(kls, dtype=torch.float64).view(3, 4).mean(1).tolist(), abs=1e-9)

    row = evaluate.sample_row(measures, measures, measures["rewards"])
    assert row["reward"] == evaluate.mean_interval(measures["rewards"].mean(1)) and row["win_rate"][0] == 0.5
    assert row["distinct"] == len(set(measures["texts"])) / 12 and row["kl"] == evaluate.mean_interval(measures["kl"])


def test_the_kl_estimate_is_near_the_exact_one():
    """On the enumerable language: 4000 samples of each prompt, within four standard errors of the sum over all completions."""
    from tests.enumerable import LANGUAGE, tiny_gpt

    class Tokens:  # the language's tokens as letters
        eos_id = LANGUAGE.eos_id
        bos_id = None

        def encode(self, text):
            return [int(letter) for letter in text]

        def decode(self, ids):
            return "".join(str(i) for i in ids if i != self.eos_id)

    policy, ref = tiny_gpt(seed=0), tiny_gpt(seed=1)
    settings = evaluate.Config(n=4000, max_new=LANGUAGE.max_new, batch_size=1)
    prompts = [[x] for x in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "encode_prompts", lambda tokenizer, prompts, max_prompt: [(ids, "") for ids in prompts])
        measures = evaluate.sample_measures(policy, Tokens(), ref, prompts, None, settings)
    logps, ref_logps = (LANGUAGE.token_logps(model).detach().sum(-1) for model in (policy, ref))
    exact = (logps.exp() * (logps - ref_logps)).sum(1)
    spread = (logps.exp() * (logps - ref_logps - exact[:, None]) ** 2).sum(1).sqrt()
    assert measures["rewards"] is None and ((measures["kl"] - exact).abs() < 4 * spread / 4000**0.5).all()


def test_the_kl_of_a_model_to_itself_is_0_in_bfloat16(tmp_path):
    """Sampler and training pass round differently, which summed over 40 tokens is not 0. Both log-probs of the KL are of training passes.
    needed is 0 within its interval, as the reference's other answers are compared."""
    torch.manual_seed(0)
    tokenizer = builtin_tokenizer()
    model = GPT(GPTConfig.tiny(tokenizer.vocab_size, n_layer=6, n_embd=64, n_head=4, ffn_dim=128, max_len=128))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    save_pretrained(model.bfloat16(), tmp_path / "policy", tokenizer)
    policy, ids = load_pretrained(tmp_path / "policy"), encode_prompt(tokenizer, "ask for tea: ")
    answers = sample(policy, [ids] * 8, max_new=40, eos_id=None, seed=0)
    assert (token_logps(policy, answers) - answers.old_logps).sum(1).abs().max() > 0.01  # so there is something to see
    names = [str(tmp_path / "policy")]
    row = evaluate.main(evaluate.Config(policies=names, held_out=0.3, max_new=40, reward=["length:40"], dtype="bfloat16"))[0]
    assert row["kl"][0] == 0 and abs(row["needed"][0]) <= row["needed"][1]


def test_the_whole_table_with_answers(policy_folder, pairs_file, small, tmp_path, capsys):
    """Three policies, two rewards, an opponent who is none of them, JSON and frontier; the first reward judges the answers."""
    module, cfg = small("sft", steps=20)
    trained = str(module.main(cfg) / "final")
    module, cfg = small("rft", steps=2)
    rft = module.main(cfg)
    capsys.readouterr()
    names, out, figure = [str(policy_folder), trained], tmp_path / "table.json", tmp_path / "deep" / "frontier.png"
    rewards = ["length:9", str(rft / "reward")]
    rows = evaluate.main(evaluate.Config(
        policies=names, ref=trained, against=str(rft / "final"), reward=rewards, pairs=str(pairs_file), held_out=1,
        n=2, max_new=12, dtype="float64", out=str(out), figure=str(figure),
    ))
    text = capsys.readouterr().out
    assert json.loads(out.read_text()) == json.loads(json.dumps(rows)) and figure.stat().st_size > 5000
    assert [row.get("policy") for row in rows] == [*names, None, None] and [row.get("reward") for row in rows[2:]] == rewards
    assert rows[1]["kl"] == pytest.approx((0, 0), abs=1e-12)
    assert rows[0]["kl"][0] > 0 and -1 <= rows[0]["reward"][0] <= 0  # trained is the reference
    pairs = read_preferences(pairs_file)
    near = [-abs(len(pair.chosen) - 9) / 9 for pair in pairs], [-abs(len(pair.rejected) - 9) / 9 for pair in pairs]
    won = sum((max(-1, a) > max(-1, b)) + 0.5 * (max(-1, a) == max(-1, b)) for a, b in zip(*near, strict=True))
    assert rows[2]["accuracy"][0] == pytest.approx(won / len(pairs))
    assert "wins over" in text and f"{pairs[0].prompt}\n" in text and text.count("⟦") >= 4


def test_no_answers_are_drawn_with_n_0(policy_folder, pairs_file, capsys):
    rows = evaluate.main(evaluate.Config(policies=[str(policy_folder)], pairs=str(pairs_file), held_out=1, n=0))
    assert "reward" not in rows[0] and "distinct" not in rows[0] and "win rate" not in capsys.readouterr().out


def test_a_reward_that_fails_is_named(policy_folder, pairs_file, tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text("def broken(prompts, completions):\n    raise KeyError('tone')\n")
    with pytest.raises(BadInput, match="raised KeyError"):
        evaluate.main(evaluate.Config(policies=[str(policy_folder)], reward=[f"{path}:broken"], pairs=str(pairs_file)))


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
    ({}, "nothing to evaluate"), ({"held_out": 0.0}, "--held_out 0.0"), ({"held_out": 0.01}, "leaves no pairs; raise it"),
    ({"n": -1}, "--n -1"), ({"max_new": 500}, "--max_new 500: the policy's context is 128"), ({"figure": "x.png"}, "--figure draws reward"),
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


def test_policies_with_other_tokens_are_compared_on_their_common_pairs(policy_folder, tmp_path, capsys):
    """The built-in task's letters make 40 tokens of a prompt of which a byte-level BPE makes a few. Under --max_len 25 one model loses one
    of four pairs, and both are compared on the other three: the numbers are those of a file with these three."""
    torch.manual_seed(0)
    tokenizer = train_bpe(["ask for tea, please " * 9] * 20, 280)
    save_pretrained(GPT(GPTConfig.tiny(tokenizer.vocab_size, n_embd=16, n_head=2, ffn_dim=32, max_len=128)).double(), tmp_path / "bpe",
                    tokenizer)
    prompts = ["tea", "ask for tea, please " * 2, "ink", "no tea, please now"]
    path, own = tmp_path / "pairs.jsonl", load_tokenizer(policy_folder)
    path.write_text("".join(json.dumps({"prompt": x, "chosen": "tea", "rejected": "no tea"}) + "\n" for x in prompts))
    few_path, lines = tmp_path / "few.jsonl", path.read_text().splitlines(True)
    few_path.write_text("".join([lines[0], *lines[2:]]))
    assert len(encode_prompt(own, prompts[1])) > 25 > max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    names, settings = [str(policy_folder), str(tmp_path / "bpe")], dict(held_out=1, max_new=4, max_len=25, dtype="float64")
    for policies in (names, names[::-1]):
        table = evaluate.main(evaluate.Config(policies=policies, pairs=str(path), **settings))
        assert "1 of 4 rows are left out: their prompt alone fills --max_len 25 in the tokens of at least" in capsys.readouterr().out
        assert [row["n"] for row in table] == [3, 3]
        few = evaluate.main(evaluate.Config(policies=policies, pairs=str(few_path), n=0, **settings))
        for row, alone in zip(table, few, strict=True):
            assert [row[name] for name in alone] == [pytest.approx(value, abs=1e-12) for value in alone.values()]


def test_the_limit_of_a_reward_is_for_a_batch_and_the_pairs_come_first(policy_folder, pairs_file, tmp_path, capsys):
    """20 answers at .05 s each are 1 s: above a limit of .5 s for all, below it for batches of 4. A judge that fails on the second batch
    fails there, and the table of the pairs has been printed by then."""
    (tmp_path / "r.py").write_text("import time\n\nsizes = []\n\ndef slow(prompts, completions):\n    time.sleep(0.05 * len(prompts))\n"
                                   "    sizes.append(len(prompts))\n    assert len(sizes) < 12, 'tired'\n    return [0.0] * len(prompts)\n")
    settings = dict(policies=[str(policy_folder)], pairs=str(pairs_file), held_out=1, max_new=4, batch_size=4, reward_limit=0.5)
    with pytest.raises(BadInput, match="tired"):  # 5 batches of chosen, 5 of rejected, one of answers
        evaluate.main(evaluate.Config(reward=[f"{tmp_path / 'r.py'}:slow"], **settings))
    said = capsys.readouterr().out
    assert "NLL / token" in said and "r.py:slow: accuracy" in said and "win rate" not in said


def test_pairs_without_room_for_an_answer_are_left_out_aloud(policy_folder, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "ask for tea: " * n, "chosen": "tea", "rejected": "tea now!"} for n in (1, 1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = evaluate.main(evaluate.Config(policies=[str(policy_folder)], pairs=str(path), held_out=1, max_len=40))
    assert table[0]["n"] == 2 and "1 of 3 rows are left out: their prompt alone fills --max_len 40" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no pair has a scored token"):
        evaluate.main(evaluate.Config(policies=[str(policy_folder)], pairs=str(path), held_out=1, max_len=5))


def test_rows_that_a_models_own_template_refuses_can_be_skipped(policy_folder, tmp_path, capsys):
    """Two models: one has a template that refuses system messages. Both are compared on the other rows, and only those are sampled."""
    model, tokenizer = load_pretrained(policy_folder), load_tokenizer(policy_folder)
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system!') }}{% endif %}"
    for name, first in (("lenient", ""), ("strict", strict)):
        tokenizer.settings |= {"chat_template": first + "{% for m in messages %}{{ m.content }}{% endfor %}"}
        save_pretrained(model, tmp_path / name, tokenizer)
    user, system = {"role": "user", "content": "ask for tea: "}, {"role": "system", "content": "be kind. "}
    rows = [{"prompt": prompt, "chosen": [{"role": "assistant", "content": "tea please."}], "rejected": [
        {"role": "assistant", "content": "tea."}]} for prompt in ([user], [system, user], [user])]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = [str(tmp_path / "lenient"), str(tmp_path / "strict")]
    given = dict(policies=names, pairs=str(tmp_path / "pairs.jsonl"), held_out=1, max_new=4)
    with pytest.raises(BadInput, match=r"pairs.jsonl:2: the chat template failed .*no system!.*--skip_bad"):
        evaluate.main(evaluate.Config(**given))
    capsys.readouterr()
    table = evaluate.main(evaluate.Config(**given, skip_bad=True))
    printed = capsys.readouterr()
    assert [row["n"] for row in table] == [2, 2] and "answers to each of 2 prompts" in printed.out
    assert "1 bad rows skipped of 3; the first: " in printed.err and "pairs.jsonl:2" in printed.err


# ------------------------------------------------------------------------------------------------------------ needed and wasted


def split_by_enumeration(law, ref, rewards):
    """(KL(π‖ref), KL of the rewards' distributions, Σ P_π(r)·KL(π(·|r)‖ref(·|r))) of distributions over the same outcomes."""
    paid = float((law * (law / ref).log()).sum())
    needed = wasted = 0.0
    for value in rewards.unique():
        inside = rewards == value
        p, q = law[inside].sum(), ref[inside].sum()
        needed += float(p * (p / q).log())
        wasted += float(p * (law[inside] / p * (law[inside] / p / (ref[inside] / q)).log()).sum())
    return paid, needed, wasted


def test_needed_and_wasted_add_up_and_the_optimum_wastes_nothing():
    """On the enumerable language, to 1e-12: KL = needed + wasted for any policy; for ref·e^{r/β} wasted is 0; for the same law blurred, a
    mixture with one that ignores the reward, it is the number by enumeration. needed_kl of exact shares is the first term."""
    language = Enumerated()
    ref, rewards = language.ref_logps.sum(1).exp(), (language.rewards * 3).round()
    tilted = ref * (rewards / 0.7).exp()
    tilted = tilted / tilted.sum()
    blurred = 0.8 * tilted + 0.2 * language.law
    for law in (language.law, tilted, blurred):
        paid, needed, wasted = split_by_enumeration(law, ref, rewards)
        assert abs(paid - needed - wasted) < 1e-12 and wasted > -1e-15
        counts = [torch.stack([x[rewards == value].sum() for value in rewards.unique()]) * 1e15 for x in (law, ref)]
        assert evaluate.needed_kl(*counts)[0] == pytest.approx(needed, abs=1e-9)
        assert (wasted < 1e-12) == (law is tilted)


def test_classes_of_rewards():
    """Few values are classes as they are; one that ref has fewer than five times joins its neighbour; many are cut at ref's quantiles."""
    ref, own = torch.tensor([0.0] * 10 + [1.0] * 6 + [2.0] * 3), torch.tensor([0.0, 2, 2, 2])
    assert [x.tolist() for x in evaluate.reward_classes(own, ref)] == [[1, 3], [10, 9]]
    assert [x.tolist() for x in evaluate.reward_classes(own, torch.cat([ref, torch.tensor([2.0, 2])]))] == [[1, 0, 3], [10, 6, 5]]
    assert [x.tolist() for x in evaluate.reward_classes(torch.tensor([5.0]), torch.tensor([1.0] * 7))] == [[1], [7]]  # ref never has 5
    many = torch.arange(1200, dtype=torch.float64)
    own, others = evaluate.reward_classes(many[-100:], many)
    assert len(own) == 12 and others.tolist() == [100] * 12 and own.tolist() == [0] * 11 + [100]


@pytest.mark.parametrize(("law", "ref", "n", "m"), [
    ((0.4, 0.3, 0.2, 0.1), (0.25,) * 4, 300, 300), ((0.422, 0.4, 0.14, 0.038), (0.715, 0.249, 0.033, 0.003), 512, 6000),
    ((0.5, 0.5), (0.9, 0.1), 100, 400), ((0.25,) * 4, (0.25,) * 4, 300, 300)])
def test_the_interval_of_needed_covers_the_truth(law, ref, n, m):
    """400 trials: in at least 92 % (three standard deviations below 95 %) the interval holds the true value, and the estimate is not biased
    by more than a tenth of the half-width."""
    generator, law, ref = torch.Generator().manual_seed(0), torch.tensor(law).double(), torch.tensor(ref).double()
    truth, found = float((law * (law / ref).log()).sum()), []
    for _ in range(400):
        draws = [torch.multinomial(x, size, replacement=True, generator=generator).double() for x, size in ((law, n), (ref, m))]
        found.append(evaluate.needed_kl(*evaluate.reward_classes(*draws)))
    covered = sum(abs(estimate - truth) <= half for estimate, half in found) / len(found)
    bias, half = sum(estimate for estimate, _ in found) / len(found) - truth, sum(half for _, half in found) / len(found)
    assert covered >= 0.92 and abs(bias) < 0.1 * half, (covered, bias, half)


def test_the_table_has_needed_and_wasted(policy_folder, tmp_path, capsys):
    """Of the reference itself both are 0 within their intervals; of another policy they add up to the KL, whoever the opponent is."""
    torch.manual_seed(1)
    model, tokenizer = load_pretrained(policy_folder), load_tokenizer(policy_folder)
    with torch.no_grad():
        model.head.weight.add_(torch.randn_like(model.head.weight) * 0.3)
    save_pretrained(model, tmp_path / "other", tokenizer)
    names = [str(policy_folder), str(tmp_path / "other")]
    settings = dict(policies=names, held_out=0.5, max_new=4, n=8, reward=["length:4"])
    for against in ("", names[1]):
        own, other = evaluate.main(evaluate.Config(against=against, **settings))[:2]
        assert abs(own["needed"][0]) <= own["needed"][1] and own["kl"][0] == pytest.approx(0, abs=1e-4)
        assert other["needed"][0] + other["wasted"][0] == pytest.approx(other["kl"][0], abs=1e-12) and other["wasted"][0] > 0
    assert "needed" in capsys.readouterr().out


def test_needed_is_counted_from_answers_of_ref_that_are_not_in_the_table(policy_folder, monkeypatch):
    """With the table's seed, a policy near ref would give ref's own answers, and needed would come out too low."""
    seeds, original = [], evaluate.sample_measures

    def recorded(policy, tokenizer, ref, prompts, reward_fn, cfg):
        seeds.append((ref is None, cfg.seed))
        return original(policy, tokenizer, ref, prompts, reward_fn, cfg)

    monkeypatch.setattr(evaluate, "sample_measures", recorded)
    evaluate.main(evaluate.Config(policies=[str(policy_folder)], reward=["length:9"], max_new=4, seed=3, device="cpu"))
    apart, table = ({seed for alone, seed in seeds if alone == own} for own in (True, False))
    assert apart and table == {3} and not apart & table
