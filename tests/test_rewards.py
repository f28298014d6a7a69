"""Rewards: the built-in ones on odd text, reward models on rows made by hand, `ask` on rewards that lie, hang or die, and runs
that outlive them."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minialign import rewards
from minialign.batch import Rollout, collate
from minialign.data import Demo, encode_completion, encode_prompt, read_prompts
from minialign.engine import checkpoint, run
from minialign.engine.common import BadInput, read_rows
from minialign.model import GPT, GPTConfig
from minialign.rewards import (
    GSM8K_FORMAT,
    BadReward,
    ask,
    ensemble,
    exact_match,
    final_number,
    format_match,
    learned,
    length,
    lexicon,
    open_reward,
    regex,
    reward_folders,
    rollout_stats,
    score,
    weight_average,
)
from minialign.task import builtin_tokenizer
from minialign.tokenizer import CharTokenizer, Tokenizer, train_bpe
from minialign.weights import load_pretrained, save_pretrained
from tests.conftest import ONLINE
from tests.killing import result_of

ROOT = Path(__file__).parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
PROMPTS, COMPLETIONS = [[1, 2], [3], [4, 5, 6]], [[7, 0], [8, 9, 1, 2, 0], [0]]


def reward_model(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig.tiny(11, n_embd=16, n_head=2, ffn_dim=32, **changes)).double().with_scalar_head()


def at_the_end(model, row):
    """The oracle: the row alone, unpadded, and the number at its last position."""
    return model(torch.tensor([row]))[0, -1].item()


@torch.no_grad()
def test_reads_the_last_token_of_each_row_eos_included():
    for changes in ({}, {"positions": "learned", "norm": "layer"}, {"windows": (2, None)}):
        model = reward_model(**changes)
        scores = score(model, collate(PROMPTS, COMPLETIONS, pad_id=0))
        expected = [at_the_end(model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        assert torch.allclose(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
        without_eos = at_the_end(model, PROMPTS[0] + COMPLETIONS[0][:-1])
        assert abs(scores[0].item() - without_eos) > 1e-3  # reading one token early would show


@torch.no_grad()
def test_a_batch_of_one_equals_a_batch_of_many():
    model = reward_model()
    together = score(model, collate(PROMPTS, COMPLETIONS, pad_id=0))
    alone = [score(model, collate([p], [c], pad_id=0))[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-12)


@torch.no_grad()
def test_padding_may_be_anything():
    model = reward_model()
    scores = [score(model, collate(PROMPTS, COMPLETIONS, pad_id=pad)) for pad in range(11)]
    assert all(torch.equal(s, scores[0]) for s in scores)


@torch.no_grad()
def test_a_cut_row_is_read_where_it_was_cut():
    model = reward_model()
    scores = score(model, collate(PROMPTS, COMPLETIONS, pad_id=0, max_len=4))
    assert abs(scores[1].item() - at_the_end(model, [3, 8, 9, 1])) < 1e-12


@torch.no_grad()
def test_an_empty_row_is_read_at_its_first_token():
    model = reward_model()
    scores = score(model, collate([[3, 4], [1]], [[], [2, 0]], pad_id=0))
    assert abs(scores[0].item() - at_the_end(model, [3])) < 1e-12 and scores.isfinite().all()


def test_the_gradient_reaches_head_and_trunk():
    """d score / d head is the trunk's output at the place that is read."""
    model = reward_model()
    batch = collate(PROMPTS[:1], COMPLETIONS[:1], pad_id=0)
    score(model, batch).sum().backward()
    hidden = model.hidden(torch.tensor([PROMPTS[0] + COMPLETIONS[0]]))[0, -1]
    assert torch.allclose(model.head_weight.grad[0], hidden, atol=1e-12)
    assert model.tok_embed.weight.grad[0].abs().sum() > 0  # id 0, the EOS, was seen


@torch.no_grad()
def test_a_bfloat16_model_gives_float32_rewards():
    """A sum over 12 tokens and its offset are taken in float32: bfloat16 would keep 8 bits of them."""
    model = reward_model().bfloat16()
    model.config.reward_read, model.config.reward_offset = "sum", 1 / 3
    numbers = model(torch.tensor([[3, 8, 9, 1, 4, 2] * 2])).detach().float() + 1 / 3  # (1, 12) what the head says, the offset added to each
    scores = score(model, collate([[3]], [[8, 9, 1, 4, 2, 3, 8, 9, 1, 4, 2]], pad_id=0))
    assert scores.dtype == torch.float32
    assert abs(scores.item() - (float(numbers[0, 1:].double().sum()) - 1 / 3)) < 1e-5


def test_the_offset_is_subtracted():
    model = reward_model()
    batch = collate(PROMPTS, COMPLETIONS, pad_id=0)
    before = score(model, batch)
    model.config.reward_offset = 0.75
    assert torch.allclose(score(model, batch), before - 0.75, atol=1e-12)


# A reward that is a sum over tokens, and bounded. Tests that take `m` alone are also run against wrong variants of rewards.py
# (tests/test_wrong_variants.py).


@pytest.fixture
def m():
    return rewards


class Numbers:
    """Stands in for a reward model: its number at a position is .1·position + .01·token, NaN on the token 10."""

    def __init__(self, read, bound=0.0):
        self.config = GPTConfig.tiny(11, head="scalar", reward_read=read, reward_bound=bound)

    def __call__(self, tokens):
        numbers = 0.1 * torch.arange(tokens.shape[1]).double() + 0.01 * tokens.double()
        return torch.where(tokens == 10, torch.nan, numbers)


def test_the_sum_over_tokens_by_hand(m):
    """1 2 | 7 0: (.2 + .07) + .3 = .57. 3 | 8 9 1 2 0: .18 + .29 + .31 + .42 + .5 = 1.7. 4 5 6 | 0: .3. Read at the last token: .3, .5, .3.
    Within [0, 2]: 2·σ of that."""
    batch = collate(PROMPTS, COMPLETIONS, pad_id=0)
    for read, numbers in (("sum", [0.57, 1.7, 0.3]), ("last", [0.3, 0.5, 0.3])):
        assert m.score(Numbers(read), batch).tolist() == pytest.approx(numbers, abs=1e-12)
        squeezed = [2 / (1 + math.exp(-x)) for x in numbers]
        assert m.score(Numbers(read, bound=2.0), batch).tolist() == pytest.approx(squeezed, abs=1e-12)


def test_what_is_not_the_completion_does_not_count_in_the_sum(m):
    """Padding of the token whose number is NaN: nothing changes. Another prompt of the same length: nothing either."""
    for read in ("sum", "last"):
        clean, rubbish = (m.score(Numbers(read), collate(PROMPTS, COMPLETIONS, pad_id=pad)) for pad in (0, 10))
        assert torch.equal(clean, rubbish) and clean.isfinite().all()
        other = collate([[8, 9], [7], [10, 9, 10]], COMPLETIONS, pad_id=10)
        assert torch.equal(m.score(Numbers(read), other), clean)


@torch.no_grad()
def test_the_sum_is_that_of_each_row_alone(m):
    """A GPT: the numbers of a row on its own, unpadded, at its completion tokens; whatever the padding; a cut row up to the cut."""
    model = reward_model()
    model.config.reward_read, model.config.reward_bound = "sum", 3.0
    for max_len in (None, 4):
        rows = [(p, c[: None if max_len is None else max_len - len(p)]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        sums = torch.stack([model(torch.tensor([p + c]))[0, len(p) :].sum() for p, c in rows])
        for pad in (0, 5):
            scores = m.score(model, collate(PROMPTS, COMPLETIONS, pad_id=pad, max_len=max_len))
            assert torch.allclose(scores, 3 / (1 + (-sums).exp()), atol=1e-12)
    batch = collate(PROMPTS, COMPLETIONS, pad_id=0)
    scores, generator = m.score(model, batch), torch.Generator().manual_seed(0)
    noise = torch.randint(0, 11, batch.targets.shape, generator=generator)
    behind = batch.mask.flip(1).cumsum(1).flip(1) == 0  # (B, T) after the last token
    batch.targets = torch.where(behind, noise, batch.targets)
    assert torch.allclose(m.score(model, batch), scores, atol=1e-14)


def test_the_gradient_of_the_sum(m):
    """d score / d head = the sum of the trunk's outputs at the completion's tokens; with a bound times R·σ(1 − σ)."""
    model, row = reward_model(), PROMPTS[0] + COMPLETIONS[0]
    model.config.reward_read = "sum"
    batch, hidden = collate(PROMPTS[:1], COMPLETIONS[:1], pad_id=0), model.hidden(torch.tensor([row]))[0, len(PROMPTS[0]) :].sum(0)
    (grad,) = torch.autograd.grad(m.score(model, batch).sum(), model.head_weight)
    assert torch.allclose(grad[0], hidden, atol=1e-12)
    model.config.reward_bound = 3.0
    score_now = m.score(model, batch).sum()
    (grad,) = torch.autograd.grad(score_now, model.head_weight)
    share = score_now.item() / 3
    assert torch.allclose(grad[0], 3 * share * (1 - share) * hidden, atol=1e-12)


def test_a_row_with_nothing_scored_sums_to_zero(m):
    """... which within [0, 3] is 1.5, as any completion is under a head of zeros."""
    model = reward_model()
    model.config.reward_read = "sum"
    scores = m.score(model, collate([[3, 4], [1]], [[], [2, 0]], pad_id=0))
    assert scores[0].item() == 0 and scores[1].item() != 0
    model.config.reward_bound = 3.0
    assert m.score(model, collate([[3, 4], [1]], [[], [2, 0]], pad_id=0))[0].item() == 1.5
    torch.nn.init.zeros_(model.head_weight)
    assert m.score(model, collate(PROMPTS, COMPLETIONS, pad_id=0)).tolist() == [1.5, 1.5, 1.5]


@torch.no_grad()
@pytest.mark.parametrize(("read", "bound"), [("sum", 0.0), ("sum", 4.5), ("last", 4.5), ("last", 0.0)])
def test_how_a_reward_is_read_survives_its_folder(tmp_path, read, bound):
    trunk = GPT(GPTConfig.tiny(11, n_embd=16, n_head=2, ffn_dim=32)).double()
    model = trunk.with_scalar_head(reward_read=read, reward_bound=bound)
    batch = collate(PROMPTS, COMPLETIONS, pad_id=0)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert (again.config.reward_read, again.config.reward_bound) == (read, bound)
    assert torch.equal(score(again, batch), score(model, batch))


# ------------------------------------------------------------------------------------------------------------- programmatic

NUMBERS = {
    "#### 72": "72", "so 5 + 5\n#### 10": "10", "#### 1,080": "1080", "#### 109,200,000": "109200000", "#### $18": "18",
    "#### $1,250.50": "1250.5", "#### 0.25": "0.25", "#### .5": "0.5", "#### -3": "-3", "#### -0": "0", "#### $-5": "-5",
    "#### 72.": "72", "#### 72...": "72", "#### 72.0": "72", "#### 007": "7", "#### 5,": "5", "#### 1,000.": "1000",
    "#### 72 apples": "72", "#### 72\n": "72", "#### 72 is it": "72", "#### 50%": "50", "####5": "5", "####    5": "5", "##### 5": "5",
    "#### 1\n#### 2": "1", "#### 3 or #### 4": "3", "a #### none\n#### 6": "6",
    "": None, "72": None, "### 72": None, "####": None, "#### ": None, "#### none": None, "#### x72": None, "# # # # 72": None,
    "####\n72": None, "#### .": None, "#### ,": None, "#### $": None, "#### -": None, "#### 1.2.3": None, "#### \u221272": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_final_number(text):
    """Commas are thousands, a trailing dot ends the sentence, the first `#### number` counts, and text without one has none."""
    number = final_number(text)
    assert number == (None if NUMBERS[text] is None else Decimal(NUMBERS[text]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(-10**15, 10**15), st.integers(0, 3))
def test_a_number_reads_the_same_with_and_without_commas(number, zeros):
    decimals = "." + "0" * zeros if zeros else ""
    assert final_number(f"#### {number:,}{decimals}") == final_number(f"#### {number}") == number


def test_exact_match_accepts_the_number_however_it_is_written():
    reward = exact_match([Demo("q", "2 + 2\n#### 1,250"), Demo("r", "#### 1250")])
    said = ["#### 1250", "#### $1,250.00", "well\n#### 1,250.", "#### 1251", "1250", "", "#### 125\n#### 1250"]
    assert reward(["q"] * 7, said) == [1, 1, 1, 0, 0, 0, 0]


def test_exact_match_of_a_prompt_demonstrated_twice_accepts_both_answers_and_only_there():
    reward = exact_match([Demo("q", "#### 1"), Demo("q", "#### 2"), Demo("q", "#### 2.0"), Demo("r", "#### 3")])
    assert reward(["q", "q", "q", "r", "r"], ["#### 1", "#### 2", "#### 3", "#### 3", "#### 2"]) == [1, 1, 0, 1, 0]


def test_exact_match_of_prompts_given_as_messages():
    """Equal messages are one prompt, whichever list object holds them; another role is another prompt."""
    def user(text):
        return [{"role": "user", "content": text}]

    reward = exact_match([Demo(user("1+1?"), "#### 2"), Demo("1+1?", "#### 3")])
    assert reward([user("1+1?"), "1+1?", user("1+1?")], ["#### 2", "#### 3", "#### 3"]) == [1, 1, 0]
    with pytest.raises(ValueError, match="no demonstrated answer for the prompt '.*1.1"):
        reward([[{"role": "system", "content": "1+1?"}]], ["#### 2"])


def test_exact_match_names_a_demonstration_without_an_answer_and_a_prompt_without_a_demonstration():
    with pytest.raises(BadInput, match="exact_match: demonstration 2 has no final `#### number`: '#### many'"):
        exact_match([Demo("q", "#### 1"), Demo("r", "#### many")])
    with pytest.raises(BadReward, match=r"no demonstrated answer for the prompt 's' \(row 1, prompt 's', completion '#### 2'\)"):
        ask(exact_match([Demo("q", "#### 1")]), ["q", "s"], ["#### 1", "#### 2"])


def test_exact_match_refuses_lists_of_unequal_length():
    with pytest.raises(ValueError):
        exact_match([Demo("q", "#### 1")])(["q"], ["#### 1", "#### 1"])


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K (../shared/data) is not part of the project")
def test_every_answer_of_gsm8k_is_right_and_well_formed():
    demos = [Demo(row["question"], row["answer"]) for row in map(json.loads, GSM8K.read_text(encoding="utf-8").splitlines())]
    prompts, answers = [demo.prompt for demo in demos], [demo.completion for demo in demos]
    assert len(demos) > 1000 and set(exact_match(demos)(prompts, answers)) == {1.0} == set(format_match()(prompts, answers))
    assert sum(exact_match(demos)(prompts, answers[1:] + answers[:1])) < 0.05 * len(demos)  # the neighbour's answer is another


FORMATS = {
    "#### 72": 1, "first\nthen\n#### -1,250.5": 1, "\n#### 7": 1, "#### 1\n#### 2": 1, "#### .5": 1, "#### 1,000": 1,
    "#### 72\n": 0, "#### 72.": 0, "so #### 72": 0, "72": 0, "": 0, "#### ": 0, "#### 72 apples": 0, "####72": 0, "#### $7": 0,
}


@pytest.mark.parametrize("text", FORMATS)
def test_the_default_format_is_a_last_line_of_four_hashes_and_a_number(text):
    assert format_match()(["p"], [text]) == [FORMATS[text]]
    assert open_reward(["format"])(["p"], [text]) == open_reward([f"format:{GSM8K_FORMAT}"])(["p"], [text]) == [FORMATS[text]]


def test_format_matches_the_whole_completion_and_regex_anywhere():
    texts = ["ab", "xab", "abx", "a\nb", "", "AB"]
    assert format_match("a.?b")([""] * 6, texts) == [1, 0, 0, 1, 0, 0]  # a dot matches line ends too
    assert regex("a.?b")([""] * 6, texts) == [1, 1, 1, 0, 0, 0]
    assert regex("(?i)^ab$")([""] * 6, texts) == [1, 0, 0, 0, 0, 1]
    assert regex(r"\w")(["", ""], ["é", "…"]) == [1, 0]


def test_length_is_zero_at_the_target_and_falls_to_minus_one_on_both_sides():
    texts = ["", "a", "ab", "abcd", "abcdef", "a" * 8, "a" * 9, "a" * 900, "äöü🙂"]
    assert length(4)([""] * 9, texts) == [-1, -0.75, -0.5, 0, -0.5, -1, -1, -1, 0]  # characters, not bytes
    assert length(1)([""] * 3, ["", "a", "ab"]) == [-1, 0, -1]


LEXICON = {
    "please": 1, "Please!": 1, "PLEASE, please": 2, "pleased": 0, "displease": 0, "please_me": 0, "please2": 0, "(please)": 1,
    "now": -1, "know nowhere": 0, "please now": 0, "now,now;now": -3, "": 0, "thank you": 2, "Thank You, thank you": 4, "thank": 0,
    "thank yourself": 0, "you thank": 0, "thank  you": 0, "no": -0.5, "no no no": -1.5, "no-no": -1, "know": 0,
    "straße": 3, "Straße straßen": 3, "ÉCLAIR": 4, "éclairs": 0, "c++": 5, "C++ and c": 5, "c+++": 5, "xc++": 0, "a.b": 6, "axb": 0,
}


@pytest.mark.parametrize("text", LEXICON)
def test_lexicon(text):
    """Whole words, upper and lower case alike; phrases; punctuation in a word is itself; letters beyond ASCII are letters."""
    weights = {"please": 1, "now": -1, "thank you": 2, "no": -0.5, "straße": 3, "éclair": 4, "c++": 5, "a.b": 6}
    assert lexicon(weights)(["now please"], [text]) == [LEXICON[text]]  # and the prompt's words do not count


def test_lexicon_counts_each_of_overlapping_words_and_an_overlapping_phrase_once():
    reward = lexicon({"thank": 1, "thank you": 10, "you": 100, "very very": 1000})
    assert reward([""] * 3, ["thank you", "you thank", "very very very"]) == [111, 101, 1000]
    assert lexicon({})(["p"], ["anything"]) == [0]


# ------------------------------------------------------------------------------------------------------------------ learned

CONTEXT = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.:!?"


def scorer(tokenizer, seed=0, **changes):
    """A reward model of random weights over a tokenizer. Its position table ends at CONTEXT: a longer row would raise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = dict(n_embd=16, n_head=2, ffn_dim=32, max_len=CONTEXT, positions="learned", norm="layer", activation="gelu_tanh",
                     gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, family="gpt2")
        return GPT(GPTConfig.tiny(tokenizer.vocab_size, **{**shape, **changes})).double().with_scalar_head()


def by_hand(model, tokenizer, prompt, completion, bos=True):
    """The oracle: BOS (a chat template would write it itself) + prompt + completion + EOS as ids, the row alone; what is too much comes
    off the prompt's front, then the end."""
    answer = (tokenizer.encode(completion) + [tokenizer.eos_id])[: CONTEXT - 1]
    asked = [tokenizer.bos_id][:bos] + tokenizer.encode(prompt)
    return at_the_end(model, asked[len(asked) - min(len(asked), CONTEXT - len(answer)) :] + answer)


ROWS = {
    "short": ("ask: ", "yes."), "empty completion": ("ask: ", ""), "empty prompt": ("", "yes."), "both empty": ("", ""),
    "just fits": ("a" * 11, "b" * 11), "one too long": ("ab" * 6, "c" * 11), "long prompt": ("abcde" * 20, "yes."),
    "long completion": ("ask: ", "abcde" * 20), "completion fills it": ("xyz", "b" * 22), "completion is one over": ("xyz", "b" * 23),
    "both long": ("vwxyz" * 9, "abcde" * 9),
}


@torch.no_grad()
def test_learned_is_the_number_at_the_end_of_hand_made_rows():
    """All rows in one batch, of any batch_size, equal each row alone, long prompts and completions cut as the docstring says."""
    tokenizer = CharTokenizer(LETTERS)
    model = scorer(tokenizer)
    prompts, completions = zip(*ROWS.values(), strict=True)
    expected = torch.tensor([by_hand(model, tokenizer, *row) for row in ROWS.values()], dtype=torch.float64)
    assert expected.unique().numel() == len(ROWS)  # so a mix-up of rows would show
    for batch_size in (1, 2, 3, 11, 32):
        rewards = learned(model, tokenizer, batch_size=batch_size)(list(prompts), list(completions))
        assert rewards.shape == (len(ROWS),) and torch.allclose(rewards, expected, atol=1e-12), batch_size


@torch.no_grad()
def test_learned_is_score_of_the_collated_rows():
    tokenizer = CharTokenizer(LETTERS)
    model = scorer(tokenizer)
    model.config.reward_offset = 0.5
    prompts, completions = ["ask: ", "tell me, "], ["yes.", "no, never!"]
    asked = [[tokenizer.bos_id] + tokenizer.encode(text) for text in prompts]
    answers = [tokenizer.encode(text) + [tokenizer.eos_id] for text in completions]
    expected = score(model, collate(asked, answers, pad_id=tokenizer.pad_id))
    assert torch.equal(learned(model, tokenizer)(prompts, completions), expected)


def test_learned_reads_with_its_own_tokenizer():
    """Text that the policy's tokenizer does not even know, through a byte-level BPE of the reward model's own."""
    tokenizer = train_bpe(["ask for tea: may i have tea, please. " * 20], 270)
    model = scorer(tokenizer)
    rows = [("Ask: ", "Été 🙂"), ("ask for tea: ", "may i have tea"), ("", "…")]
    with torch.no_grad():
        expected = [by_hand(model, tokenizer, *row) for row in rows]
    rewards = learned(model, tokenizer)([p for p, _ in rows], [c for _, c in rows])
    assert torch.allclose(rewards, torch.tensor(expected, dtype=torch.float64), atol=1e-12) and not rewards.requires_grad
    with pytest.raises(BadInput):
        builtin_tokenizer().encode(rows[0][1])


def test_learned_names_the_row_that_its_tokenizer_cannot_read():
    tokenizer = CharTokenizer(LETTERS)
    with pytest.raises(BadReward, match=r"the vocabulary lacks \['É'\].*\(row 1, prompt 'p', completion 'É'\)"):
        ask(learned(scorer(tokenizer), tokenizer), ["p", "p", "p"], ["e", "É", "f"])


def test_learned_puts_messages_through_the_reward_models_own_template():
    tokenizer = CharTokenizer(LETTERS + "\n<>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    model = scorer(tokenizer)
    with torch.no_grad():
        expected = by_hand(model, tokenizer, "<hi><you>", "yes.", bos=False)
    messages = [{"role": "system", "content": "hi"}, {"role": "user", "content": "you"}]
    assert learned(model, tokenizer)([messages], ["yes."]).item() == pytest.approx(expected, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------- ensemble

NUMBER = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 5).flatmap(lambda b: st.lists(st.lists(NUMBER, min_size=b, max_size=b), min_size=1, max_size=4)))
def test_ensemble_is_numpys_mean_and_min_of_each_row(columns):
    rewards = [lambda prompts, completions, column=column: column for column in columns]
    table, B = np.array(columns, dtype=np.float32), len(columns[0])
    mean, least = (ensemble(rewards, how)(["p"] * B, ["c"] * B) for how in ("mean", "min"))
    assert mean.shape == least.shape == (B,)
    assert np.allclose(mean.numpy(), table.mean(0), rtol=1e-5, atol=1e-5 * np.abs(table).max()) and (least.numpy() == table.min(0)).all()


def test_ensemble_takes_lists_tensors_and_arrays_together():
    parts = [lambda p, c: [1, 2], lambda p, c: torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True),
             lambda p, c: np.array([5, -6])]
    assert ask(ensemble(parts), ["p"] * 2, ["c"] * 2).tolist() == [3, 0]
    assert ask(ensemble(parts, "min"), ["p"] * 2, ["c"] * 2).tolist() == [1, -6]


def test_ensemble_hides_no_fault_of_its_members():
    """A NaN of one member survives the mean and the minimum; another number of rewards is refused, saying whose it is."""
    for how in ("mean", "min"):
        reward = ensemble([lambda p, c: [0.0] * len(c), lambda p, c: [math.nan if text == "bad" else -1.0 for text in c]], how)
        with pytest.raises(BadReward, match=r"returned nan \(row 1, .*'bad'\)"):
            ask(reward, ["p"] * 3, ["c", "bad", "d"])
    with pytest.raises(BadReward, match=r"reward 2 gave the shape \((4,\), not \(3|2,\), not \(1),\)"):
        ask(ensemble([lambda p, c: [0.0] * len(c), lambda p, c: [0.0] * (len(c) + 1)]), ["p"] * 3, ["c"] * 3)
    with pytest.raises(BadInput, match="combine 'median' is unknown: use mean, min or warm"):
        ensemble([length(3), length(4)], "median")


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_weight_average_is_the_mean_of_every_parameter_and_leaves_its_inputs_alone():
    tokenizer = CharTokenizer("ab")
    models = [scorer(tokenizer, seed) for seed in (0, 1, 2)]
    for model, offset in zip(models, (0.5, -1.0, 3.5), strict=True):
        model.config.reward_offset = offset
    before = [weights_of(model) for model in models]
    average = weight_average(models)
    for name, parameter in average.named_parameters():
        mean = np.mean([weights[name].numpy() for weights in before], axis=0)
        assert np.allclose(parameter.detach().numpy(), mean, atol=1e-15), name
    assert average.config.reward_offset == 1.0 and [model.config.reward_offset for model in models] == [0.5, -1.0, 3.5]
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.fill_(9.0)  # nothing is shared with the inputs
    assert all(torch.equal(p, weights[name]) for model, weights in zip(models, before, strict=True) for name, p in model.named_parameters())


def test_weight_average_of_one_model_with_itself_is_that_model():
    model = scorer(CharTokenizer("ab"))
    model.config.reward_offset = 0.25
    for copies in (1, 2, 4):  # powers of two: the mean is exact
        average = weight_average([model] * copies)
        assert all(torch.equal(average.get_parameter(name), value) for name, value in weights_of(model).items())
        assert average.config.reward_offset == 0.25


ARCHITECTURES = {
    "width": {"n_embd": 32}, "depth": {"n_layer": 3}, "biases": {"qkv_bias": False}, "context": {"max_len": CONTEXT + 1},
    "heads, though every shape is equal": {"n_head": 4}, "activation, though every shape is equal": {"activation": "relu"},
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("what", ARCHITECTURES)
def test_weight_average_refuses_another_architecture(what, order):
    """In either order: no tensor of one model may be dropped because the other, named first, does not have it."""
    tokenizer = CharTokenizer("ab")
    with pytest.raises(BadInput, match="warm: the reward models differ in .*only models of one architecture can be averaged"):
        weight_average([scorer(tokenizer), scorer(tokenizer, **ARCHITECTURES[what])][::order])


# --------------------------------------------------------------------------------------------------------- from the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved reward models: a and b of one architecture, wide of another, bare without a tokenizer."""
    tokenizer, root = CharTokenizer(LETTERS), tmp_path_factory.mktemp("rewards")
    for seed, (name, changes) in enumerate({"a": {}, "b": {}, "wide": {"n_embd": 32}, "bare": {}}.items()):
        model = scorer(tokenizer, seed, **changes)
        model.config.reward_offset = seed / 4
        save_pretrained(model, root / name, tokenizer if name != "bare" else None)
    return root


def said(folder, prompts, completions):
    return learned(load_pretrained(folder), CharTokenizer(LETTERS))(prompts, completions)


def test_reward_models_alone_and_combined(folders):
    """One folder; the mean, the minimum of two; warm: the reward of the averaged weights, one model."""
    a, b = folders / "a", folders / "b"
    prompts, completions = ["ask: "] * 4, ["", "yes.", "no!", "abcde" * 20]
    alone = said(a, prompts, completions), said(b, prompts, completions)
    assert torch.equal(open_reward([str(a)])(prompts, completions), alone[0])
    mean, least = (open_reward([str(a), str(b)], combine=how)(prompts, completions) for how in ("mean", "min"))
    assert torch.allclose(mean.double(), (alone[0] + alone[1]) / 2, atol=1e-6)
    assert torch.allclose(least.double(), torch.minimum(*alone), atol=1e-6)
    warm = open_reward([str(a), str(b)], combine="warm")(prompts, completions)
    averaged = weight_average([load_pretrained(a), load_pretrained(b)])
    assert torch.equal(warm, learned(averaged, CharTokenizer(LETTERS))(prompts, completions))
    assert not torch.allclose(warm, (alone[0] + alone[1]) / 2, atol=1e-3)  # a mean of weights is no mean of rewards
    assert torch.equal(open_reward([str(a)], combine="warm")(prompts, completions), alone[0])


def test_a_reward_model_takes_the_dtype_of_the_run_and_is_frozen(folders):
    reward = open_reward([str(folders / "a")], dtype=torch.float32)(["ask: "], ["yes."])
    assert reward.dtype == torch.float32 and not reward.requires_grad
    assert reward.item() == pytest.approx(said(folders / "a", ["ask: "], ["yes."]).item(), abs=1e-4)


def test_a_folder_and_a_function_together(folders):
    prompts, completions = ["ask: "] * 2, ["yes.", "no!"]
    expected = (said(folders / "a", prompts, completions) + torch.tensor([0.0, -0.25])) / 2
    assert torch.allclose(open_reward([str(folders / "a"), "length:4"])(prompts, completions).double(), expected, atol=1e-6)


GOOD = {
    "builtin": [1, 1], "format:.*e": [0, 1], "regex:\\d+": [1, 0], "regex:7: *t": [1, 0], "regex:a.py:f": [0, 0], "length:7": [0, 0],
    "length:14": [-0.5, -0.5], "lexicon:tea": [1, 1], "lexicon:tea,-please": [1, 0], "lexicon: TEA , -Please ,": [1, 0],
    "lexicon:my tea": [0, 0], "lexicon:tea, - please": [1, 0],
}


@pytest.mark.parametrize("spec", GOOD)
def test_specs_that_are_accepted(spec):
    completions = ["7: tea ", "tea, please"] if not spec.startswith("length") else ["7: tea ", "tea pls"]
    expected = [0, 0] if spec == "builtin" else GOOD[spec]
    assert list(open_reward([spec])(["ask for soap: "] * 2, completions)) == pytest.approx(expected)


CATALOGUE = "expected builtin, exact_match, .*FILE.py:FUNCTION, or a reward model's folder"
REFUSED = {
    "nonsense": "nonsense: " + CATALOGUE, "": CATALOGUE, " length:9": CATALOGUE, "Length:9": CATALOGUE, "builtin:2": CATALOGUE,
    "exact_match:2": CATALOGUE, "rewards.py": "rewards.py: expected FILE.py:FUNCTION", "x" * 300: CATALOGUE,
    "exact_match": "needs --prompts FILE with answers that end in `#### number`",
    "length": "expected a number of characters, like length:200", "length:": "like length:200", "length:many": "like length:200",
    "length:-3": "like length:200", "length:2.5": "like length:200", "length:0": "at least 1 character", "length:9 ": "like length:200",
    "lexicon": "expected words, like lexicon:", "lexicon:": "expected words", "lexicon: , ,": "expected words",
    "lexicon:-": "expected words", "lexicon:please,-": "lexicon:please,-",
    "regex": "expected a pattern|regex:PATTERN", "regex:": "expected a pattern|regex:PATTERN",
    "regex:(": r"regular expression '\(' is not valid: missing \)", "format:[": r"regular expression '\[' is not valid",
    "regex:a{99999999999999999999}": "not valid",
    "absent.py:f": "absent.py:f: there is no file absent.py", "absent.py:": "there is no file absent.py",
    r"C:\rewards\mine.py:f": r"there is no file C:\\rewards\\mine.py", "x" * 300 + ".py:f": "there is no file x",
    "no/such/folder": "no/such/folder: no such folder", "no/such/model.safetensors": "expected a folder with config.json",
}


def refusal(*specs, **how):
    """The sentence with which open_reward refuses: it must be BadInput, and one line."""
    with pytest.raises(BadInput) as refused:
        open_reward(list(specs), **how)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("spec", REFUSED, ids=lambda spec: spec[:40] or "nothing")
def test_specs_that_are_refused(spec):
    """One sentence of BadInput that says what was expected, alone and as one of several; never another exception, never a guess."""
    assert re.search(REFUSED[spec], refusal(spec))
    assert re.search(REFUSED[spec], refusal("length:9", spec))


def test_looking_for_folders_among_long_specs_finds_none(folders):
    """A word list longer than a file name may be is a word list; the folders of a run are the reward models alone."""
    words = "lexicon:" + ",".join(f"word{i}" for i in range(100))
    assert open_reward([words])(["p"], ["word7 word99 word100"]) == [2]
    assert reward_folders([str(folders / "a"), "length:9", "absent.py:f", "nonsense"]) == [folders / "a"]
    assert reward_folders([words, "regex:" + "a" * 5000]) == []


@pytest.mark.parametrize("specs", [["length:9"], ["length:9", "length:8"]])
def test_combine_is_checked_for_one_reward_as_for_several(specs):
    assert "must be mean, min or warm" in refusal(*specs, combine="median")


def test_folders_that_are_no_reward_model(folders, policy_folder, tmp_path):
    for how in ("mean", "warm"):
        assert "is a language model, which gives no reward; train one with" in refusal(str(policy_folder), combine=how)
        assert f"{tmp_path}/config.json: the file is missing" in refusal(str(tmp_path), combine=how)
        assert f"{folders / 'bare'}/tokenizer.json: the file is missing" in refusal(str(folders / "bare"), combine=how)
    assert "only models of one architecture can be averaged" in refusal(str(folders / "a"), str(folders / "wide"), combine="warm")


def test_warm_says_that_it_needs_reward_models(folders):
    assert "warm" in refusal(str(folders / "a"), "length:9", combine="warm")


# A file's function.


@pytest.fixture
def write(tmp_path):
    """write(source) -> the path of rewards.py that holds it."""

    def make(source, name="rewards.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
        return path

    return make


COUNT = "def f(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
FILES = {
    "function": COUNT, "lambda": "f = lambda prompts, completions: [len(c) for c in completions]\n",
    "instance of a class": "class Count:\n    def __call__(self, p, c): return [len(x) for x in c]\nf = Count()\n",
    "bound method": "class Count:\n    def go(self, p, c): return [len(x) for x in c]\nf = Count().go\n",
    "partial": "import functools\ndef g(k, p, c): return [k * len(x) for x in c]\nf = functools.partial(g, 1)\n",
    "made by minialign": "from minialign.rewards import ensemble\ndef g(p, c): return [len(x) for x in c]\nf = ensemble([g, g], 'min')\n",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass Count:\n    k: int = 1\n"
                 "    def __call__(self, p, c): return [self.k * len(x) for x in c]\nf = Count()\n",
    "dataclass, annotations as text": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Count:\n"
                                      "    k: int = 1\n    def __call__(self, p, c): return [self.k * len(x) for x in c]\nf = Count()\n",
    "a main of its own": COUNT + "if __name__ == '__main__':\n    raise SystemExit(f(['p'], ['c']))\n",
    "no ASCII": "# Länge\n" + COUNT,
}


@pytest.mark.parametrize("kind", FILES)
def test_a_function_of_a_file(write, kind):
    assert ask(open_reward([f"{write(FILES[kind])}:f"]), ["p"] * 3, ["", "a", "abc"]).tolist() == [0, 1, 3]


@pytest.mark.parametrize("name", ["rewards.py", "C:\\rewards.py", "my rewards: new.py", "json.py", "a.py:b.py", "regexes.py"])
def test_a_file_by_any_name_leaves_other_modules_alone(write, monkeypatch, name):
    """The last colon ends the path, whatever the path holds; a file named like a module of Python does not replace it."""
    monkeypatch.chdir(write(COUNT, name).parent)
    assert open_reward([f"{name}:f"])(["p"], ["ab"]) == [2]
    import json as fresh

    assert fresh is json and sys.modules["json"] is json and hasattr(json, "dumps")


def test_two_files_of_one_name_are_two_rewards(write):
    """And a mended file is read again: nothing is remembered by its name."""
    first, second = write(COUNT, "one/rewards.py"), write(COUNT.replace("len(c)", "-3 * len(c)"), "two/rewards.py")
    assert open_reward([f"{first}:f", f"{second}:f"])(["p"], ["ab"]).tolist() == [-2]
    first.write_text(COUNT.replace("len(c)", "100 + len(c)"))
    assert open_reward([f"{first}:f"])(["p"], ["ab"]) == [102]


BROKEN = {
    "syntax error": ("def f(prompts, completions)\n    return 1\n", "cannot be imported .SyntaxError: .*line 1"),
    "missing import": ("import no_such_package\n", "cannot be imported .ModuleNotFoundError: No module named 'no_such_package'"),
    "raises": ("x = 1\n1 / 0\n" + COUNT, "cannot be imported .ZeroDivisionError: division by zero"),
    "raises, in several lines": ("raise ValueError('first\\nsecond')\n", "cannot be imported .ValueError: first."),
    "ends the process": ("import sys\n" + COUNT + "sys.exit(0)\n", "cannot be imported .SystemExit"),
    "no such function": ("def g(prompts, completions): return []\n", r"defines no function f; it needs `def f\(prompts, completions\)`"),
    "no function but a number": ("f = 3\n", "defines no function f; it needs"),
    "empty": ("", "defines no function f; it needs"),
    "a null byte": ("x = '\0'\n", "cannot be imported .(SyntaxError|ValueError): .*null byte"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_reward(write, kind):
    source, words = BROKEN[kind]
    path = write(source)
    sentence = refusal(f"{path}:f")
    assert sentence.startswith(f"--reward {path}:f: ") and re.search(words, sentence)


def test_a_file_that_is_not_utf_8(tmp_path):
    (tmp_path / "rewards.py").write_bytes(b"x = '\xe9'\n" + COUNT.encode())
    assert re.search("cannot be imported .SyntaxError: .*utf-?8", refusal(f"{tmp_path}/rewards.py:f"), re.I)


def test_a_path_of_a_file_without_its_function_says_how_to_name_one(write, tmp_path):
    assert "FUNCTION" in refusal(str(write(COUNT)))
    assert "FUNCTION" in refusal(f"{tmp_path}/absent.py")
    assert "defines no function" in refusal(f"{write(COUNT)}:")
    (tmp_path / "folder.py").mkdir()
    assert f"there is no file {tmp_path}/folder.py" in refusal(f"{tmp_path}/folder.py:f")


def test_exact_match_from_a_file_of_prompts(write):
    """The answers of --prompts; a row without one is refused, or passed over where other bad rows are."""
    path = write('{"question": "1+1?", "answer": "#### 2"}\n{"prompt": [{"role": "user", "content": "2+2?"}], "completion": "#### 4"}\n')
    reward = open_reward(["exact_match"], prompts=str(path))
    asked = ["Question: 1+1?\nAnswer:", [{"role": "user", "content": "2+2?"}]]
    assert reward(asked, ["#### 2", "#### 4"]) == [1, 1] and reward(asked, ["#### 4", "#### 2"]) == [0, 0]
    assert "demonstration 2 has no final `#### number`: ' four'" in refusal(
        "exact_match", prompts=str(write('{"question": "a", "answer": "#### 2"}\n{"question": "b", "answer": "four"}\n')))
    only_prompts = write('{"prompt": "a"}\n')
    assert f"{only_prompts}:1: found the keys ['prompt'], expected prompt + completion" in refusal("exact_match", prompts=str(only_prompts))
    some = write('{"prompt": "a"}\n{"question": "b", "answer": "#### 5"}\n')
    assert open_reward(["exact_match"], prompts=str(some), skip_bad=True)(["Question: b\nAnswer:"], [" #### 5"]) == [1]
    assert "absent.jsonl: cannot be read" in refusal("exact_match", prompts="absent.jsonl")


# ----------------------------------------------------------------------------------------------------------- asking safely

ASKED, BAD = ["p0", "p1", "p2"], ["good", "bad", "fine"]
LIMIT = 0.2


@pytest.fixture(autouse=True)
def alarms():
    """Whatever a failing test left behind, the next one finds no timer and the handler of before."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def fault(reward, prompts=ASKED, completions=BAD, limit=30):
    """The sentence with which ask refuses a reward: it must be BadReward, and one line."""
    with pytest.raises(BadReward) as refused:
        ask(reward, prompts, completions, limit=limit)
    assert "\n" not in str(refused.value)
    return str(refused.value)


SCORES = [0.5, 1.0, -2.0]
ANSWERS = {
    "list": lambda: SCORES, "tuple": lambda: tuple(SCORES), "float32": lambda: torch.tensor(SCORES),
    "float64": lambda: torch.tensor(SCORES, dtype=torch.float64), "bfloat16": lambda: torch.tensor(SCORES, dtype=torch.bfloat16),
    "requires grad": lambda: torch.tensor(SCORES, requires_grad=True) * 1,
    "not contiguous": lambda: torch.tensor([[s, 9] for s in SCORES])[:, 0],
    "array": lambda: np.array(SCORES), "half array": lambda: np.array(SCORES, dtype=np.float16),
    "numpy scalars": lambda: list(np.array(SCORES)), "tensor scalars": lambda: [torch.tensor(s) for s in SCORES],
    "map": lambda: map(float, SCORES), "generator": lambda: (s for s in SCORES),
    "fractions": lambda: [Fraction(s) for s in SCORES], "decimals": lambda: [Decimal(s) for s in SCORES],
}


@pytest.mark.parametrize("form", ANSWERS)
def test_ask_takes_any_form_of_three_numbers(form):
    """Float32 on the CPU, without a graph, a tensor of its own. What is accepted alone is accepted in an ensemble."""
    rewards = ask(lambda prompts, completions: ANSWERS[form](), ASKED, BAD)
    assert rewards.dtype == torch.float32 and rewards.device.type == "cpu" and not rewards.requires_grad
    assert rewards.shape == (3,) and rewards.tolist() == SCORES
    pair = ensemble([lambda prompts, completions: ANSWERS[form](), lambda prompts, completions: [0.0] * 3])
    assert ask(pair, ASKED, BAD).tolist() == [s / 2 for s in SCORES]


@pytest.mark.parametrize("form", [list, torch.tensor, np.array, lambda row: [np.bool_(x) for x in row]])
def test_ask_takes_whole_numbers_and_truth_values(form):
    assert ask(lambda p, c: form([True, False, True]), ASKED, BAD).tolist() == [1, 0, 1]
    assert ask(lambda p, c: list(map(int, [3, -4, 0])), ASKED, BAD).tolist() == [3, -4, 0]


def test_ask_keeps_no_hold_on_the_rewards_own_tensor():
    own = torch.tensor(SCORES)
    rewards = ask(lambda p, c: own, ASKED, BAD)
    own.fill_(9.0)
    assert rewards.tolist() == SCORES


def of_bad(answer):
    """A reward that gives `answer` (or what it returns when called) for the row 'bad' and 1 for the others."""
    return lambda prompts, completions: [(answer() if callable(answer) else answer) if text == "bad" else 1.0 for text in completions]


def raising(error):
    def answer():
        raise error

    return of_bad(answer)


def hanging(wait):
    """wait() for up to 5 seconds at the row 'bad', so that a broken limit fails the test and does not stop it for ever."""
    return of_bad(lambda: wait(time.monotonic() + 5))


def sleeps(end):
    time.sleep(5)
    return 1.0


def loops(end):
    while time.monotonic() < end:
        pass
    return 1.0


def backtracks(end):
    return float(re.fullmatch("(a+)+$", "a" * 27 + "b") is not None)


def swallows(end):
    while time.monotonic() < end:
        try:
            time.sleep(5)
        except Exception:
            pass
    return 1.0


def sleeps_in_finally(end):
    try:
        raise ValueError
    except ValueError:
        time.sleep(5)
    finally:
        time.sleep(0.01)
    return 1.0


def lazily(prompts, completions):
    """Computed only when it is read: after the call has returned."""
    return (1.0 / (text != "bad") for text in completions)


def lazily_slow(prompts, completions):
    for text in completions:
        end = time.monotonic() + 1.5
        while text == "bad" and time.monotonic() < end:
            time.sleep(0.01)
        yield 1.0


GUILTY = {
    "raises": (raising(ValueError("no verdict")), "raised ValueError: no verdict"),
    "raises, in several lines": (raising(RuntimeError("first\nsecond")), "raised RuntimeError: first "),
    "raises, without a word": (raising(KeyError()), "raised KeyError"),
    "fails to assert": (raising(AssertionError("not so")), "raised AssertionError: not so"),
    "runs out of memory": (raising(MemoryError()), "raised MemoryError"),
    "recurses": (of_bad(lambda: (lambda f: f(f))(lambda f: f(f))), "raised RecursionError"),
    "refuses its input": (raising(BadInput("not this")), "raised BadInput: not this"),
    "ends the process": (of_bad(lambda: sys.exit(0)), "SystemExit"),
    "raises when it is read": (lazily, "raised ZeroDivisionError"),
    "sleeps": (hanging(sleeps), "took longer than 0.2 s"), "loops": (hanging(loops), "took longer than 0.2 s"),
    "backtracks": (hanging(backtracks), "took longer than 0.2 s"),
    "swallows every Exception": (hanging(swallows), "took longer than 0.2 s"),
    "sleeps while it handles an error": (hanging(sleeps_in_finally), "took longer than 0.2 s"),
    "sleeps when it is read": (lazily_slow, "took longer than 0.2 s"),
    "nan": (of_bad(math.nan), "returned nan"), "inf": (of_bad(math.inf), "returned inf"), "-inf": (of_bad(-math.inf), "returned -inf"),
    "beyond float32": (of_bad(1e39), r"returned 1e\+39"), "beyond float64": (of_bad(10**400), "returned"),
    "nan in an array": (lambda p, c: np.array([math.nan if text == "bad" else 1.0 for text in c]), "returned nan"),
    "inf in half precision": (lambda p, c: torch.tensor([1e6 if text == "bad" else 1.0 for text in c]).half(), "returned inf"),
    "None": (of_bad(None), "returned None, which is not a number"), "text": (of_bad("good"), "returned 'good', which is not a number"),
    "a number as text": (of_bad("7"), "returned '7', which is not a number"), "a list": (of_bad(lambda: [1.0]), "which is not a number"),
    "a dict": (of_bad(lambda: {"reward": 1.0}), "which is not a number"), "complex": (of_bad(1j), "which is not a number"),
    "a tensor of two": (of_bad(torch.ones(2)), "which is not a number"), "an array of two": (of_bad(np.ones(2)), "which is not a number"),
    "an exception": (of_bad(ValueError("returned, not raised")), "which is not a number"),
    "a function": (of_bad(lambda: len), "which is not a number"),
    "leaves the row out": (lambda p, c: [1.0 for text in c if text != "bad"], "returned 2 rewards for 3 completions|0 rewards for 1 "),
    "two of the row": (lambda p, c: [1.0 for text in c for _ in range(1 + (text == "bad"))], "4 rewards for 3|2 rewards for 1 "),
}


@pytest.mark.parametrize("kind", GUILTY)
def test_ask_refuses_and_names_the_guilty_row(kind):
    """One row of three is at fault: the sentence says which fault, the row, its prompt and its completion."""
    reward, words = GUILTY[kind]
    start = time.monotonic()
    sentence = fault(reward, limit=LIMIT if "longer" in words else 30)
    assert re.search(words, sentence) and sentence.startswith("the reward ")
    assert sentence.endswith("(row 1, prompt 'p1', completion 'bad')") and len(sentence) < 300
    assert time.monotonic() - start < 4  # the limit was for the batch, and again for the search


@pytest.mark.parametrize("guilty", [0, 2])
def test_ask_names_the_first_and_the_last_row_as_well(guilty):
    completions = ["bad" if b == guilty else "good" for b in range(3)]
    for kind in ("raises", "nan", "None", "leaves the row out"):
        assert f"(row {guilty}, prompt 'p{guilty}', completion 'bad')" in fault(GUILTY[kind][0], ASKED, completions), kind


def test_ask_names_the_first_of_several_guilty_rows():
    for kind in ("raises", "nan", "None"):
        assert "(row 1," in fault(GUILTY[kind][0], ASKED, ["good", "bad", "bad"])


async def awaited(prompts, completions):
    return [1.0] * len(completions)


WHOLE = {
    "None": lambda p, c: None, "a number": lambda p, c: 1.0, "a tensor of no dimension": lambda p, c: torch.tensor(1.0),
    "column": lambda p, c: torch.ones(len(c), 1), "row": lambda p, c: torch.ones(1, len(c)),
    "table": lambda p, c: torch.ones(len(c), len(c)), "table of numpy": lambda p, c: np.ones((len(c), 2)),
    "nothing": lambda p, c: [], "another function": lambda p, c: len,
    "a dict by row": lambda p, c: {b: 1.0 for b in range(len(c))}, "a dict by name": lambda p, c: {"rewards": [1.0] * len(c)},
    "a set": lambda p, c: {float(b) for b in range(len(c))}, "text": lambda p, c: "123"[: len(c)], "bytes": lambda p, c: b"123"[: len(c)],
    "a sparse tensor": lambda p, c: torch.ones(len(c)).to_sparse(), "numbers as text": lambda p, c: ["1"] * len(c),
    "always one short": lambda p, c: [1.0] * (len(c) - 1), "always one over": lambda p, c: [1.0] * (len(c) + 1), "coroutine": awaited,
}


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("kind", WHOLE)
def test_ask_refuses_what_is_not_one_number_for_each_row(kind):
    """Keys of a dict, members of a set and characters of a text are not rewards, even where there are as many as rows."""
    assert fault(WHOLE[kind]).startswith("the reward ")


def test_a_fault_that_no_row_has_alone_is_said_to_be_one():
    """Only in company: no row is blamed for what the batch does; where the answer itself shows the row, it is named."""
    def company(prompts, completions):
        if len(completions) > 1:
            raise RuntimeError("too many at once")
        return [1.0]

    assert fault(company) == "the reward raised RuntimeError: too many at once (no single row does it alone)"
    sleepy = fault(lambda p, c: time.sleep(5 if len(c) > 1 else 0) or [1.0] * len(c), limit=LIMIT)
    assert sleepy == "the reward took longer than 0.2 s (no single row does it alone)"
    spread = fault(lambda p, c: [0.0, 1.0, math.nan] if len(c) > 1 else [0.0])
    assert spread == "the reward returned nan (row 2, prompt 'p2', completion 'fine')"


def test_the_fault_of_the_batch_is_said_though_single_rows_have_another():
    """A reward divided by its spread in the batch is NaN for a row alone: the search must not put that in the place of what happened."""
    def standardised(prompts, completions):
        if "bad" in completions and len(completions) > 1:
            raise ValueError("no verdict")
        return torch.ones(len(completions)) / torch.tensor([float(len(text)) for text in completions]).std(correction=0)

    assert "raised ValueError: no verdict" in fault(standardised)


def test_a_reward_too_slow_for_the_batch_is_blamed_on_no_row():
    """Sixteen rows of .04 s each: every row alone is well within the limit, and the limit that is named is the one that was given."""
    prompts = [f"p{b}" for b in range(16)]
    sentence = fault(lambda p, c: time.sleep(0.04 * len(c)) or [1.0] * len(c), prompts, prompts, limit=0.3)
    assert "took longer than 0.3 s" in sentence and "(row" not in sentence


def test_a_search_that_ran_out_of_time_does_not_blame_the_row_it_stopped_at():
    """What the batch did is still what is said. Nor does it say that no row does it alone: the last one was never asked."""
    def reward(prompts, completions):
        time.sleep(0.06)
        if "c15" in completions:
            raise ValueError("no verdict")
        return [1.0] * len(completions)

    sentence = fault(reward, [f"p{b}" for b in range(16)], [f"c{b}" for b in range(16)], limit=0.3)
    assert "raised ValueError: no verdict" in sentence and "(row" not in sentence and "no single row" not in sentence


def test_the_search_for_the_row_takes_no_longer_than_twice_the_limit():
    start = time.monotonic()
    fault(lambda p, c: time.sleep(5 if len(c) > 1 else 0.15) or [1.0] * len(c), ["p"] * 60, ["c"] * 60, limit=LIMIT)
    assert time.monotonic() - start < 4  # sixty rows would take nine seconds


def test_a_timeout_that_a_bare_except_swallowed_still_is_one():
    """`except: reward = 0` is common. The reward that comes back late is an accident of the alarm, not a verdict."""
    def bare(prompts, completions):
        try:
            time.sleep(5)
        except:  # noqa: E722
            pass
        return [0.0] * len(completions)

    assert "took longer than 0.2 s" in fault(bare, limit=LIMIT)


def test_a_reward_that_waits_for_its_threads_is_stopped_too():
    """A pool of judges, one of which never answers: leaving the `with` waits for it, so one alarm is not enough."""
    answered = threading.Event()

    def pooled(prompts, completions):
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda text: float(answered.wait(1.5)), completions))

    start = time.monotonic()
    try:
        assert "took longer than 0.2 s" in fault(pooled, ["p"], ["c"], limit=LIMIT)
        assert time.monotonic() - start < 1.4
    finally:
        answered.set()


def test_long_and_odd_texts_stay_one_short_line():
    prompt = [{"role": "user", "content": "what\nis " + "x" * 5000}]
    sentence = fault(raising(ValueError("no")), [prompt] * 3, ["good", "bad", "good"])
    assert "(row 1, prompt " in sentence and len(sentence) < 300
    sentence = fault(lambda p, c: [math.nan], ["p"], ["line\nline\u2028 " + "y" * 5000])
    assert "completion 'line\\nline" in sentence and len(sentence) < 300


def test_a_long_wrong_answer_stays_one_short_line():
    """A reward that hands back the completions themselves, or a table of numpy: its answer is not printed in full."""
    assert len(fault(of_bad("x" * 10_000))) < 500
    assert len(fault(of_bad(np.ones((40, 40))))) < 500


def test_ctrl_c_is_not_a_fault_of_the_reward():
    def interrupted(prompts, completions):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt):
        ask(interrupted, ASKED, BAD)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


# What a reward does to its arguments.


def spoils(prompts, completions):
    """Fair, but it empties what it was given."""
    rewards = [float(len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)]
    prompts.clear()
    completions[:] = ["spoilt"] * 7
    return rewards


def test_a_reward_may_spoil_the_lists_it_gets():
    prompts, completions = list(ASKED), list(BAD)
    assert ask(spoils, prompts, completions).tolist() == ask(spoils, tuple(prompts), tuple(completions)).tolist() == [6, 5, 6]
    assert prompts == ASKED and completions == BAD

    def spoils_and_fails(prompts, completions):
        fails = "bad" in completions
        spoils(prompts, completions)
        return 1 / 0 if fails else [1.0]

    assert fault(spoils_and_fails, prompts, completions).endswith("(row 1, prompt 'p1', completion 'bad')")


def test_a_reward_may_append_to_the_messages_it_gets():
    """Putting the completion behind the prompt is how a judge is asked. The prompts are the run's: they must come back as they were,
    and two rows of one prompt (a group of samples) must not see each other."""
    seen = []

    def judge(prompts, completions):
        for prompt, text in zip(prompts, completions, strict=True):
            seen.append([message["content"] for message in prompt])
            prompt.append({"role": "assistant", "content": text})
            prompt[0]["content"] = "judged"
        return [1.0] * len(prompts)

    prompt = [{"role": "user", "content": "hi"}]
    for _ in range(2):
        ask(judge, [prompt, prompt], ["a", "b"])
    assert prompt == [{"role": "user", "content": "hi"}]
    assert seen == [["hi"]] * 4


# Signals and timers.


def quiet(prompts, completions):
    return [1.0] * len(completions)


def takes_the_alarm(prompts, completions):
    """A reward that limits itself by the same signal, and does not tidy up."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 30)
    return [1.0] * len(completions)


@pytest.mark.parametrize("reward", [quiet, raising(ValueError()), hanging(sleeps), takes_the_alarm, of_bad(math.nan)])
def test_the_alarms_handler_and_timer_are_as_before(reward):
    rung = []

    def mine(number, frame):
        rung.append(number)

    signal.signal(signal.SIGALRM, mine)
    try:
        ask(reward, ASKED, BAD, limit=LIMIT)
    except BadReward:
        pass
    assert signal.getsignal(signal.SIGALRM) is mine and signal.getitimer(signal.ITIMER_REAL) == (0, 0) and rung == []


@pytest.mark.parametrize("reward", [quiet, hanging(sleeps)])
def test_somebody_elses_timer_goes_on(reward):
    """A timer that was set before, as a test runner's time limit is, still runs afterwards."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        ask(reward, ASKED, BAD, limit=LIMIT)
    except BadReward:
        pass
    assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100


def test_no_limit_at_all():
    """inf is the number that says so; it must not be put down to the reward, nor leave a handler behind."""
    before = signal.getsignal(signal.SIGALRM)
    assert ask(quiet, ASKED, BAD, limit=math.inf).tolist() == [1, 1, 1]
    assert signal.getsignal(signal.SIGALRM) is before


def test_ask_works_outside_the_main_thread():
    """There is no alarm there, so no limit; everything else is as in the main thread."""
    def slow(prompts, completions):
        time.sleep(0.1)
        return SCORES

    results = []

    def work():
        results.append(ask(slow, ASKED, BAD, limit=0.01).tolist())
        results.append(fault(raising(ValueError("no verdict"))))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=10)
    assert results == [SCORES, "the reward raised ValueError: no verdict (row 1, prompt 'p1', completion 'bad')"]


def test_many_asks_leave_nothing_behind():
    before = signal.getsignal(signal.SIGALRM)
    for _ in range(300):
        ask(quiet, ASKED, BAD, limit=5)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


# ---------------------------------------------------------------------------------------------------------------- whole runs
#
# The reward file knows who asks by the number of completions: the first look 3, a step 8, an evaluation 5 (of 20 prompts a quarter).

JUDGE = """
BAD, FAULT, WHO = {bad!r}, {fault!r}, {who!r}
calls = 0

def reward(prompts, completions):
    global calls
    calls += len(completions) == WHO
    if len(completions) == WHO and calls in BAD:
        if FAULT == "hang":
            import time
            time.sleep(20)
        if FAULT == "short":
            return [1.0] * (len(completions) - 1)
        if FAULT == "nan":
            return [float(len(text)) for text in completions[:-1]] + [float("nan")]
        raise RuntimeError("the judge is down")
    return [-abs(len(text) - 6) / 6 for text in completions]
"""


@pytest.fixture
def judged(small, write):
    """judged('reinforce', bad={3}) -> (module, Config, mend): a run of 8 steps whose reward fails in those steps; mend() mends it."""

    def make(method="reinforce", bad=(), fault="raise", who=8, **changes):
        path = write(JUDGE.format(bad=set(bad), fault=fault, who=who))
        settings = dict(reward=[f"{path}:reward"], steps=8, schedule="constant", **changes)
        module, cfg = small(method, **settings)
        return module, cfg, lambda: write(JUDGE.format(bad=set(), fault="", who=0))

    return make


def snapshots(monkeypatch):
    """{step: the bytes of all that training changes, as each step finds it when it asks for its rewards}."""
    original, seen = run.Run.ask, {}

    def spy(self, step, *args):
        tensors = [p.detach() for module in self.modules.values() for p in module.parameters()]
        tensors += [v for o in self.optimizers.values() for state in o.state.values() for v in state.values() if torch.is_tensor(v)]
        seen[step + 1] = b"".join(tensor.numpy().tobytes() for tensor in tensors)
        return original(self, step, *args)

    monkeypatch.setattr(run.Run, "ask", spy)
    return seen


@pytest.mark.parametrize("method", ONLINE)
def test_a_step_without_rewards_is_skipped_and_named_and_changes_nothing(judged, monkeypatch, capsys, method):
    """Step 4 of 8, in the middle of training and due for an evaluation: policy, baseline and moments are bitwise those of step 3."""
    seen = snapshots(monkeypatch)
    module, cfg, _ = judged(method, bad={4})
    folder = module.main(cfg)
    assert seen[5] == seen[4] and all(seen[k] != seen[k + 1] for k in (1, 2, 3, 5, 6, 7))
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9)) and [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert set(rows[3]) == {"step", "skipped", "seconds"} and "reward" in rows[2] and "reward" in rows[4] and "eval/reward" in rows[7]
    error = capsys.readouterr().err
    assert "step 4 skipped: the reward raised RuntimeError: the judge is down (no single row does it alone)" in error
    assert error.count("skipped") == 1


@pytest.mark.parametrize(("fault", "words"), [
    ("hang", "the reward took longer than 0.5 s"), ("short", "the reward returned 7 rewards for 8 completions"),
    ("nan", r"the reward returned nan \(row 7, prompt 'ask for .*completion "),
])
def test_every_kind_of_fault_skips_its_step(judged, capsys, fault, words):
    module, cfg, _ = judged(bad={2}, fault=fault, reward_limit=0.5)
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0] + [1] * 7 and len([row for row in rows if "loss" in row]) == 7
    assert re.search("step 2 skipped: " + words, capsys.readouterr().err)


def test_a_run_whose_last_step_has_no_rewards_ends_as_one_a_step_shorter(judged):
    weights = []
    for steps, bad in ((5, {5}), (4, ())):
        module, cfg, _ = judged(bad=bad)
        cfg.steps = steps
        weights.append((module.main(cfg) / "final" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_two_steps_in_a_row_without_rewards_are_survived_again_and_again(judged):
    module, cfg, _ = judged(bad={1, 2, 4, 5, 7})
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1, 2, 2, 3, 4, 4, 5, 5]


@pytest.mark.parametrize(("bad", "newest"), [({1, 2, 3}, None), ({2, 4, 5, 6}, "step_000003")])
def test_three_steps_in_a_row_end_the_run_and_a_mended_reward_resumes_it(judged, monkeypatch, capsys, bad, newest):
    """The newest checkpoint is of the last good step and finite. Mended and resumed, the run ends bitwise as one that never failed
    after that checkpoint; with no checkpoint yet it begins again."""
    module, cfg, mend = judged(bad=bad, save_every=1)
    last = max(bad)
    said = f"3 steps in a row had no rewards, the last step {last}: .*the judge is down.*--resume {cfg.out} --reward "
    with pytest.raises(BadInput, match=said):
        module.main(cfg)
    assert capsys.readouterr().err.count("skipped") == len(bad)
    found = checkpoint.newest_checkpoint(cfg.out)
    assert (found and found.name) == newest
    assert newest is None or all(tensor.isfinite().all() for tensor in load_file(found / "model.safetensors").values())
    assert not (Path(cfg.out) / "final").exists()
    mend()
    with pytest.raises(BadInput, match=f"it cannot be shown that you began this run with it; .* --reward {cfg.reward[0]}"):
        module.main(module.Config(resume=cfg.out))
    resumed = result_of(module.main(module.Config(resume=cfg.out, reward=cfg.reward)))
    before = {step for step in bad if newest and step <= int(newest[5:])}
    module, cfg, _ = judged(bad=before, save_every=1)
    assert resumed == result_of(module.main(cfg)) and resumed["metrics"][-1]["skipped"] == len(before)


def test_a_reward_that_fails_in_the_evaluation_leaves_out_only_that_number(judged, capsys):
    """The training is that of a run whose evaluation works, bit for bit."""
    results = []
    for bad in ({1}, ()):  # evaluations come after steps 4 and 8
        module, cfg, _ = judged(bad=bad, who=5)
        results.append(result_of(module.main(cfg)))
    failed, worked = (result["metrics"] for result in results)
    assert [[row["step"] for row in rows if "eval/reward" in row] for rows in (failed, worked)] == [[8], [4, 8]]
    assert all(row["skipped"] == 0 and "loss" in row for row in failed)
    assert results[0]["export"] == results[1]["export"] and results[0]["samples"] == results[1]["samples"]
    assert "no eval/reward: the reward raised RuntimeError: the judge is down" in capsys.readouterr().err


def test_a_reward_that_fails_at_the_first_look_is_refused_before_step_1(judged):
    """One sentence that says how a reward is called; the mended command may use the same folder."""
    module, cfg, mend = judged(bad={1}, who=3)
    with pytest.raises(BadInput, match=r"the judge is down.*called as reward\(prompts, completions\), two lists of B, and returns B num"):
        module.main(cfg)
    assert not (Path(cfg.out) / "metrics.jsonl").exists()
    mend()
    assert len(read_rows(module.main(cfg) / "metrics.jsonl")) == 8


def test_a_changed_reward_model_is_refused_when_resuming_and_a_changed_file_is_not(judged, folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folders / "a", model)
    save_pretrained(scorer(builtin_tokenizer(), max_len=128), model, builtin_tokenizer())
    module, cfg, mend = judged()
    cfg.reward = [*cfg.reward, str(model)]
    folder = module.main(cfg)
    mend()
    module.main(module.Config(resume=str(folder), reward=cfg.reward))  # code is named again
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="model: has changed since this run began"):
        module.main(module.Config(resume=str(folder), reward=cfg.reward))


def test_a_mistyped_reward_is_one_line_and_code_2(policy_folder, tmp_path):
    command = [sys.executable, "-m", "minialign", "reinforce", "--reward", "nonsense", "--policy", str(policy_folder)]
    result = subprocess.run([*command, "--out", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "minialign reinforce: --reward nonsense: expected builtin, exact_match, " in result.stderr


# --------------------------------------------------------------------------------------------------------------------- log


def test_rollout_stats():
    """Two prompts of two completions: k1 = log π/ref and k3 = ref/π − 1 + k1, summed over tokens, then averaged over completions."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 4.0])
    logps, zeros = torch.tensor([[-1.0, 0.0], [-1.0, -1.0], [-2.0, 0.0], [0.0, 0.0]]), torch.zeros(4, 2)
    answers = Rollout(zeros, zeros, zeros.bool(), logps, torch.tensor([1, 2, 1, 0]), torch.tensor([True, False, True, True]), [],
                      ref_logps=logps - math.log(2))
    stats = {name: float(value) for name, value in rollout_stats(rewards, answers, group_size=2).items()}
    expected = {
        "reward": 1.5, "reward_std": 1.5, "kl": 2 * math.log(2), "kl_k3": 2 * (math.log(2) - 0.5),
        "completions/mean_length": 1.0, "completions/finished": 0.75, "frac_reward_zero_std": 0.5,
    }
    assert stats == pytest.approx(expected, abs=1e-6)
    assert "frac_reward_zero_std" not in rollout_stats(rewards, answers)


# ------------------------------------------------------------------------------------------------ other people's reward models


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "GPTNeoX", "GPT2"])
def test_a_classifier_that_transformers_saved_is_a_reward(family, tmp_path):
    """A sequence classifier with one label, made and saved by transformers, its tokenizer beside it, named by --reward: each completion's
    number is transformers' own logit for the row of prompt, completion and EOS, to 1e-5."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = builtin_tokenizer()
    size = dict(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
    size |= dict(intermediate_size=48) if family != "GPT2" else {}
    size |= dict(num_key_value_heads=2) if family in ("Llama", "Mistral", "Qwen2") else {}
    config = getattr(transformers, f"{family}Config")(**size, num_labels=1, pad_token_id=tokenizer.pad_id, bos_token_id=None,
                                                      eos_token_id=tokenizer.eos_id)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    prompts, completions = ["ask for tea: ", "ask for bread: "], ["i would like tea if you can.", "bread."]
    found = open_reward([str(tmp_path)])(prompts, completions)
    for x, y, number in zip(prompts, completions, found, strict=True):
        ids = [*encode_prompt(tokenizer, x), *encode_completion(tokenizer, y)]
        with torch.no_grad():
            assert abs(theirs(torch.tensor([ids])).logits.item() - float(number)) < 1e-5  # read before EOS, which pads here
    assert found[0] != found[1]


# ------------------------------------------------------------------------------------------------- functions as TRL calls them

TRL_REWARDS = """
def ours(prompts, completions): return [1.0 for _ in completions]
def other_names(questions, texts): return [2.0 for _ in texts]
def answer(completions, answer, **kwargs): return [float(c == a) for c, a in zip(completions, answer)]
def turned(completions, prompts): return [float(c == "4" and "?" in p) for p, c in zip(prompts, completions)]
def option(prompts, completions, weight=3.0): return [weight * ("4" in c) for c in completions]
def keyword_only(*, completions, answer): return [float(c == a) for c, a in zip(completions, answer)]
def all_of_it(prompts, completions, **columns): return [float(sorted(columns) == ["answer", "level"]) for _ in prompts]
def chat(completions, **kwargs): return [float(c[0]["role"] == "assistant" and len(c[0]["content"])) for c in completions]
def ids(completions, completion_ids): return [0.0 for _ in completions]
"""


def test_a_reward_with_trls_parameters_gets_what_trl_gives_it(write, tmp_path):
    """By hand from TRL's documentation: prompts, completions and the other columns, by name; told apart from ours by the names."""
    (tmp_path / "r.py").write_text(TRL_REWARDS)
    path = write('{"prompt": "2+2?", "answer": "4", "level": 1}\n{"prompt": "3+3?", "answer": "6", "level": 2}\n', "a.jsonl")
    prompts = read_prompts(path)

    def rewards(name, texts, prompts=prompts):
        return ask(open_reward([f"{tmp_path / 'r.py'}:{name}"], prompts=str(path)), prompts, texts).tolist()

    assert rewards("ours", ["4", "4"]) == [1, 1] and rewards("other_names", ["4", "4"]) == [2, 2]
    for name in ("answer", "keyword_only"):
        assert rewards(name, ["4", "4"]) == [1, 0] and rewards(name, ["5", "6"]) == [0, 1]
    assert rewards("all_of_it", ["", ""]) == [1, 1] and rewards("turned", ["4", "5"]) == [1, 0] and rewards("option", ["4", "5"]) == [3, 0]
    nulls = read_prompts(write('{"prompt": "a", "answer": null}\n{"prompt": "b", "answer": null}\n', "c.jsonl"))
    assert rewards("answer", ["4", "4"], nulls) == [0, 0]  # a column of nulls is a column
    with pytest.raises(BadReward, match="needs 'completion_ids', which is no column of the file; its columns are prompt, answer, level"):
        rewards("ids", ["a", "b"])
    conversation = write('{"prompt": [{"role": "user", "content": "hi"}]}\n', "b.jsonl")
    assert rewards("chat", ["abc"], read_prompts(conversation)) == [3]
    assert rewards("option", ["a 4"], read_prompts(conversation)) == [3]  # ours, with an option: text


def test_decode_keeps_special_tokens_and_the_first_space():
    """What a reward reads of the sampled "<tool> tea": special token and space are part of the text, the EOS that ended it is not."""
    tokenizer = CharTokenizer("ate <>lo")
    tokenizer.inner.add_special_tokens(["<tool>"])
    tokenizer = Tokenizer(tokenizer.inner, tokenizer.settings)
    ids = [tokenizer.inner.token_to_id("<tool>"), *tokenizer.encode(" tea"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<tool> tea" and tokenizer.decode([*ids, tokenizer.eos_id]) == "<tool> tea<|endoftext|>"
