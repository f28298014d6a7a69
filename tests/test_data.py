"""Files in every accepted form and every damaged one; text to ids; the built-in task against its own law."""

import codecs
import gzip
import inspect
import json
import random
import re
import shutil
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minialign import data
from minialign.data import (
    Chat,
    Demo,
    Feedback,
    Pair,
    Text,
    as_feedback,
    counts,
    demo_batch,
    encode_completion,
    encode_demos,
    encode_feedback,
    encode_pairs,
    encode_prompt,
    encode_prompts,
    encode_texts,
    pair_batch,
    pick,
    read_demonstrations,
    read_feedback,
    read_preferences,
    read_prompts,
    read_rows,
    read_texts,
    split_held_out,
    write_rows,
)
from minialign.engine.common import BadInput
from minialign.task import builtin_tokenizer
from minialign.tokenizer import CharTokenizer, train_bpe

REAL = Path(__file__).parents[2] / "shared" / "data"
READERS = (read_demonstrations, read_preferences, read_feedback, read_prompts, read_texts)
USER, REPLY, OTHER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "Be kind."}
TEXT_OR_MESSAGES = "must be text or a list of {role, content}"
ACCEPTED = "expected prompt + completion, messages, chosen + rejected, question + answer, or instruction + output"


def lines(*rows, end="\n"):
    return "".join(json.dumps(row) + end for row in rows).encode()


@pytest.fixture
def write(tmp_path):
    """write(bytes or rows) -> the path of a file that holds them."""

    def make(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else lines(*content))
        return path

    return make


# ------------------------------------------------------------------------------------------------------ accepted rows

DEMOS = {
    "strings": ({"prompt": "p", "completion": "c"}, Demo("p", "c")),
    "empty completion": ({"prompt": "p", "completion": ""}, Demo("p", "")),
    "other keys too": ({"prompt": "p", "completion": "c", "id": 7, "meta": None}, Demo("p", "c")),
    "prompt and completion as messages": ({"prompt": [SYSTEM, USER], "completion": [REPLY]}, Demo([SYSTEM, USER], "yes")),
    "messages": ({"messages": [SYSTEM, USER, REPLY]}, Demo([SYSTEM, USER], "yes")),
    "several turns": ({"messages": [USER, OTHER, USER, REPLY]}, Demo([USER, OTHER, USER], "yes")),
    "gsm8k": ({"question": "1+1?", "answer": "2\n#### 2"}, Demo("Question: 1+1?\nAnswer:", " 2\n#### 2")),
    "alpaca": ({"instruction": "Add.", "input": "1 1", "output": "2"},
               Demo("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n", "2")),
    "alpaca, empty input": ({"instruction": "Hi.", "input": "", "output": "Hi"}, Demo("### Instruction:\nHi.\n\n### Response:\n", "Hi")),
    "alpaca, no input": ({"instruction": "Hi.", "output": "Hi"}, Demo("### Instruction:\nHi.\n\n### Response:\n", "Hi")),
}
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
PAIRS = {
    "strings": ({"prompt": "p", "chosen": "c", "rejected": "r"}, Pair("p", "c", "r")),
    "messages": ({"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}, Pair([USER], "yes", "no")),
    "conversations": ({"chosen": [SYSTEM, USER, REPLY], "rejected": [SYSTEM, USER, OTHER]}, Pair([SYSTEM, USER], "yes", "no")),
    "equal conversations": ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, Pair([USER], "yes", "yes")),
    "hh": ({"chosen": HH + " yes", "rejected": HH + " no"}, Pair(HH, " yes", " no")),
    "hh, equal beginnings": ({"chosen": HH + " yes, I do", "rejected": HH + " yes, he does"}, Pair(HH, " yes, I do", " yes, he does")),
    "hh, an empty answer": ({"chosen": HH + " yes", "rejected": HH}, Pair(HH, " yes", "")),
    "hh, equal": ({"chosen": HH + " x", "rejected": HH + " x"}, Pair(HH, " x", " x")),
    # They part in the first answer and go on: the prompt ends at the last turn of the assistant that both share.
    "hh, parted early": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
         "rejected": "\n\nHuman: a\n\nAssistant: B\n\nHuman: c\n\nAssistant: d"},
        Pair("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d", " B\n\nHuman: c\n\nAssistant: d"),
    ),
    # They part in what the human says second: the shared answer b is part of what is judged.
    "hh, parted by the human": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: e\n\nAssistant: f"},
        Pair("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d", " b\n\nHuman: e\n\nAssistant: f"),
    ),
}


@pytest.mark.parametrize("name", DEMOS)
def test_demonstrations(write, name):
    row, demo = DEMOS[name]
    assert read_demonstrations(write([row])) == [demo]
    assert read_prompts(write([row])) == [demo.prompt]


@pytest.mark.parametrize("name", PAIRS)
def test_preferences(write, name):
    """The pair; as a demonstration its chosen answer; as feedback both; as prompts its prompt. Nothing is lost or doubled."""
    row, pair = PAIRS[name]
    assert read_preferences(write([row])) == [pair]
    assert read_feedback(write([row])) == [Feedback(pair.prompt, pair.chosen, True), Feedback(pair.prompt, pair.rejected, False)]
    assert read_demonstrations(write([row])) == [Demo(pair.prompt, pair.chosen)]
    assert read_prompts(write([row])) == [pair.prompt]
    if isinstance(row["chosen"], str) and "prompt" not in row:
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])


def test_feedback(write):
    """Labelled answers as text and as messages, pairs among them, in the order of the file; other keys do not hurt."""
    rows = [{"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "", "label": False, "id": 7},
            {"prompt": [SYSTEM, USER], "completion": [REPLY], "label": False}, {"prompt": "p", "chosen": "c", "rejected": "r"},
            {"prompt": None, "chosen": HH + " yes", "rejected": HH + " no"}]
    assert read_feedback(write(rows)) == [
        Feedback("p", "c", True), Feedback("p", "", False), Feedback([SYSTEM, USER], "yes", False),
        Feedback("p", "c", True), Feedback("p", "r", False), Feedback(HH, " yes", True), Feedback(HH, " no", False)]
    assert as_feedback(Pair("p", "c", "r")) == [Feedback("p", "c", True), Feedback("p", "r", False)]


@pytest.mark.parametrize("label", [1, 0, 1.0, "true", "false", [True], {}])
def test_a_label_is_true_or_false(write, label):
    """A number or a word is refused: 0 and "false" would be told apart by nobody."""
    path = write([{"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "c", "label": label}])
    with pytest.raises(BadInput) as error:
        read_feedback(path)
    assert str(error.value).startswith(f"{path}:2: 'label' must be true (desirable) or false, found {label!r}; fix the row")
    assert read_feedback(path, skip_bad=True) == [Feedback("p", "c", True)]


def test_an_answer_without_a_label_is_no_feedback(write):
    expected = r"expected prompt \+ completion \+ label, or chosen \+ rejected with or without prompt"
    for row in (GOOD, {"prompt": "p", "label": True}, {"completion": "c", "label": True}, {"messages": [USER, REPLY]}):
        with pytest.raises(BadInput, match=rf":1: found the keys .*{expected}"):
            read_feedback(write([row]))
    with pytest.raises(BadInput, match=":1: 'completion' must be text"):
        read_feedback(write([{"prompt": "p", "completion": 3, "label": True}]))
    with pytest.raises(BadInput, match=":1: a completion given as messages must be exactly one message of the assistant"):
        read_feedback(write([{"prompt": "p", "completion": [USER], "label": True}]))


def test_a_disliked_answer_is_no_demonstration(write, capsys):
    """Nor a text to train a base model on, for which it would have to be one; its prompt may be asked all the same."""
    path = write([{"prompt": "p", "completion": "good", "label": True}, {"prompt": "q", "completion": "bad", "label": False}])
    sentence = "'label' is False: only an answer labelled true is a demonstration (kto learns from both)"
    for reader, kept in ((read_demonstrations, [Demo("p", "good")]), (read_texts, ["pgood"])):
        with pytest.raises(BadInput) as error:
            reader(path)
        assert str(error.value) == f"{path}:2: {sentence}; fix the row, or skip such rows with --skip_bad"
        assert reader(path, skip_bad=True) == kept
        assert capsys.readouterr().err == f"{path}: 1 bad rows skipped of 2; the first: {path}:2: {sentence}\n"
    assert read_prompts(path) == ["p", "q"]


def test_prompts_of_their_own(write):
    assert read_prompts(write([{"prompt": "p"}, {"prompt": [USER]}])) == ["p", [USER]]


def test_a_prompt_with_other_keys_beside_it(write):
    """As in the other formats, keys that are not asked for do not hurt."""
    assert read_prompts(write([{"prompt": "p", "id": 3}])) == ["p"]


def test_texts(write):
    """text; prompt + completion joined; both answers of a preference; a conversation, whole, for the chat template."""
    rows = [{"text": "t"}, DEMOS["strings"][0], PAIRS["strings"][0], {"messages": [USER, REPLY]}]
    assert read_texts(write(rows)) == ["t", "pc", "pc", "pr", [USER, REPLY]]


def test_a_txt_file_is_one_document(write):
    text = "\n line one\r\nline two ☕\n\n"
    assert read_texts(write(text.encode(), "a.txt")) == [text]
    assert read_texts(write(codecs.BOM_UTF8 + text.encode(), "b.txt")) == [text]
    assert read_texts(write(gzip.compress(text.encode()), "c.txt")) == [text]
    with pytest.raises(BadInput, match=r"d.txt: not UTF-8 text \(byte 2\)"):
        read_texts(write(b"ab\xff", "d.txt"))


# ----------------------------------------------------------------------------------------------------- accepted files

ROWS = [{"prompt": f"p{i} é ☕ \u2028", "completion": f"c{i}"} for i in range(3)]
FILES = {
    "jsonl": lines(*ROWS),
    "no newline at the end": lines(*ROWS)[:-1],
    "crlf": lines(*ROWS, end="\r\n"),
    "byte-order mark": codecs.BOM_UTF8 + lines(*ROWS),
    "blank lines": b"\n" + b"\n  \n".join(lines(row) for row in ROWS) + b"\r\n",
    "utf-8 as it is": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "json list": json.dumps(ROWS).encode(),
    "json list, indented, with mark": codecs.BOM_UTF8 + b"\n " + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_files(write, name, packed):
    """Gzip is told by its first bytes: the name says nothing."""
    content = gzip.compress(FILES[name]) if packed else FILES[name]
    assert read_demonstrations(write(content, "data")) == [Demo(row["prompt"], row["completion"]) for row in ROWS]


# ------------------------------------------------------------------------------------------------------------- errors

GOOD = {"prompt": "p", "completion": "c"}
BAD_ROWS = {
    "a list": (b"[1, 2]", "expected an object with named fields, found list"),
    "a number": (b"5", "expected an object with named fields, found int"),
    "null": (b"null", "expected an object with named fields, found NoneType"),
    "a string": (b'"prompt"', "expected an object with named fields, found str"),
    "torn": (b'{"prompt": "p", "compl', "not a line of JSON (Unterminated string"),
    "nul": (b'{"prompt": "a\0b", "completion": "c"}', "not a line of JSON (Invalid control character"),
    "nul bytes": (b"\0\0\0\0", "not a line of JSON"),
    "not utf-8": (b'{"prompt": "\xff", "completion": "c"}', "not a line of JSON ('utf-8' codec can't decode byte 0xff"),
    "two rows on a line": (b'{"prompt": "p", "completion": "c"}{"a": 1}', "not a line of JSON (Extra data"),
    "too deep": (b'{"prompt": ' + b"[" * 100_000, "not a line of JSON"),
    "a number of 5000 digits": (b'{"prompt": "p", "completion": "c", "id": ' + b"1" * 5000 + b"}", "not a line of JSON"),
    "wrong keys": (b'{"promt": "p", "completion": "c"}', f"found the keys ['completion', 'promt'], {ACCEPTED}"),
    "no keys": (b"{}", f"found the keys [], {ACCEPTED}"),
    "a completion of numbers": (b'{"prompt": "p", "completion": [1, 2]}', "'completion': message 1 must be an object with a 'role'"),
    "a null completion": (b'{"prompt": "p", "completion": null}', f"found the keys ['prompt'], {ACCEPTED}"),
    "a number as prompt": (b'{"prompt": 3, "completion": "c"}', f"'prompt' {TEXT_OR_MESSAGES}, found int"),
    "an empty list": (b'{"prompt": [], "completion": "c"}', "'prompt' is an empty list of messages"),
    "a message without content": (b'{"prompt": [{"role": "user"}], "completion": "c"}', "'prompt': message 1 has neither content nor"),
    "a message of numbers": (b'{"prompt": [{"role": "user", "content": [3]}], "completion": "c"}', "must be text or a list of parts"),
    "a key given twice": (b'{"prompt": "p", "completion": "c", "prompt": "q"}', "the key 'prompt' is given twice"),
    "a label of words": (b'{"prompt": "p", "completion": "c", "label": "rejected"}', "'label' is 'rejected': only an answer labelled"),
    "a label of -1": (b'{"prompt": "p", "completion": "c", "label": -1}', "'label' is -1: only an answer labelled true"),
    "two system texts": (lines({"messages": [SYSTEM, USER, REPLY], "system": "Be rude."})[:-1], "are two system messages: keep one"),
    "tools that are no list": (lines({"messages": [USER, REPLY], "tools": "3"})[:-1], "'tools' must be a list of objects, found int"),
    "half a pair in tools": (lines({"messages": [USER, REPLY], "tools": [{"name": "\ud83d"}]})[:-1], "'tools' contains half of a"),
    "a call of nothing": (lines({"messages": [{"role": "user", "content": None, "tool_calls": []}, REPLY]})[:-1], "message 1 has neither"),
    "tools beside text": (b'{"prompt": "p", "completion": "c", "tools": [{}]}', "the field 'tools' cannot be used here: only messages"),
    "a history": (b'{"instruction": "p", "output": "c", "history": [["a", "b"]]}', "the field 'history' cannot be used here"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d", "completion": "c"}', "'prompt' contains half of a surrogate pair"),
    "half a pair in a message": (b'{"prompt": [{"role": "user", "content": "\\udc00"}], "completion": "c"}', "'prompt' contains half of"),
    "half a pair as a role": (b'{"prompt": [{"role": "\\ud800", "content": "x"}], "completion": "c"}', "'prompt' contains half of"),
    "two completions": (lines({"prompt": "p", "completion": [REPLY, OTHER]})[:-1], "must be exactly one message of the assistant"),
    "the user completes": (lines({"prompt": "p", "completion": [USER]})[:-1], "must be exactly one message of the assistant"),
    "messages end with the user": (lines({"messages": [REPLY, USER]})[:-1], "a list of at least two messages, the last from the assistant"),
    "one message": (lines({"messages": [REPLY]})[:-1], "must be a list of at least two messages, the last from the assistant"),
    "messages are text": (b'{"messages": "hi"}', "must be a list of at least two messages, the last from the assistant"),
    "no shared turn": (b'{"chosen": "yes", "rejected": "no"}', "no 'Assistant:' turn; put the prompt into its own field 'prompt'"),
    "no shared message": (lines({"chosen": [USER, REPLY], "rejected": [SYSTEM, REPLY]})[:-1], "share no message that could be the prompt"),
    "text and messages": (lines({"chosen": "x", "rejected": [USER, REPLY]})[:-1], "must both be text or both be messages"),
    "conversations of several turns": (
        lines({"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, OTHER, USER, REPLY]})[:-1], "exactly one message of the assistant"),
    "gsm8k with a number": (b'{"question": "q", "answer": 3}', "'answer' must be text"),
    "alpaca with a number": (b'{"instruction": "q", "input": 3, "output": "x"}', "'input' must be text"),
    "gsm8k with messages": (lines({"question": "q", "answer": [REPLY]})[:-1], "'answer' must be text"),
    "gsm8k asked in messages": (lines({"question": [USER], "answer": "a"})[:-1], "'question' must be text"),
    "alpaca with messages": (lines({"instruction": "q", "output": [REPLY]})[:-1], "'output' must be text"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line_and_can_be_skipped(write, capsys, name):
    """Line 143 of 144, blank lines counted as an editor counts them; with skip_bad it is counted, named, and the rest is read."""
    row, message = BAD_ROWS[name]
    path = write(lines(GOOD) * 100 + b"\n" + lines(GOOD) * 41 + row + b"\n" + lines(GOOD))
    with pytest.raises(BadInput) as error:
        read_demonstrations(path)
    assert str(error.value).startswith(f"{path}:143: ") and message in str(error.value)
    assert str(error.value).endswith("; fix the row, or skip such rows with --skip_bad")
    capsys.readouterr()
    assert read_demonstrations(path, skip_bad=True) == [Demo("p", "c")] * 142
    said = capsys.readouterr().err
    assert f"{path}: 1 bad rows skipped of 143; the first: {path}:143: " in said and message in said


@pytest.mark.parametrize("reader", READERS)
def test_skip_bad_names_the_first_and_goes_on(write, capsys, reader):
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = write(lines(row) + b"{torn\n" + lines(row, {"a": 1}, 5, row))
    assert len(reader(path, skip_bad=True)) == (6 if reader in (read_texts, read_feedback) else 3)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"3 bad rows skipped of 6; the first: {path}:2: not a line of JSON" in said


def test_each_reader_says_which_keys_it_accepts(write):
    path = write([{"a": 1, "b": 2}])
    for reader, accepted in (
        (read_demonstrations, re.escape(ACCEPTED)),
        (read_preferences, r"expected prompt \+ chosen \+ rejected, or chosen \+ rejected"),
        (read_feedback, r"expected prompt \+ completion \+ label, or chosen \+ rejected with or without prompt"),
        (read_prompts, r"expected .*\bprompt\b(?! \+).* instruction \+ output"),
        (read_texts, r"expected .*\btext\b.* instruction \+ output"),
    ):
        with pytest.raises(BadInput, match=rf":1: found the keys \['a', 'b'\], {accepted}"):
            reader(path)


def test_a_text_of_the_wrong_type_is_named(write):
    with pytest.raises(BadInput, match=":1: 'text' must be text"):
        read_texts(write([{"text": 5}]))


@pytest.mark.parametrize("reader", [read_prompts, read_texts])
def test_half_a_surrogate_pair_is_refused_everywhere(write, reader):
    with pytest.raises(BadInput, match=":1: .* contains half of a surrogate pair"):
        reader(write(b'{"%s": "\\ud83d"}' % (b"prompt" if reader is read_prompts else b"text")))


def test_a_prompt_of_the_wrong_type_is_named(write):
    with pytest.raises(BadInput, match=r":1: 'prompt' must be text or a list of \{role, content\}, found int"):
        read_prompts(write([{"prompt": 5}]))


def test_rows_of_a_list_are_counted(write, capsys):
    path = write(json.dumps([GOOD, {"a": 1}, GOOD]).encode())
    with pytest.raises(BadInput, match=r"row 2: found the keys \['a'\]"):
        read_demonstrations(path)
    assert len(read_demonstrations(path, skip_bad=True)) == 2 and "row 2" in capsys.readouterr().err


def test_a_demonstration_is_no_preference(write):
    with pytest.raises(BadInput, match=r"found the keys \['completion', 'prompt'\], expected prompt \+ chosen \+ rejected"):
        read_preferences(write([GOOD]))


def test_files_that_hold_no_rows(write, tmp_path):
    whole = gzip.compress(lines(*ROWS) * 20)
    for content, message in {
        b"": "no usable rows",
        b"\n \r\n": "no usable rows",
        b"[]": "no usable rows",
        gzip.compress(b""): "no usable rows",
        b'[{"prompt": "p"': "not valid JSON",
        b"[" * 100_000: "not valid JSON",
        b"[" + b"1" * 5000 + b"]": "not valid JSON",
        b'[{"prompt": "\xff"}]': r"not UTF-8 text \(byte 13\)",
        b"[1]\n[2]\n": "not valid JSON",
        "[1]".encode("utf-16"): "not a line of JSON",
        whole[:-1]: "cut short or damaged .*; fetch it again",
        whole[: len(whole) // 2]: "cut short or damaged",
        whole[:5]: "cut short or damaged",
        whole[:2]: "cut short or damaged",
        whole[:20] + b"\0\0\0" + whole[23:]: "cut short or damaged",
    }.items():
        path = write(content)
        with pytest.raises(BadInput, match=f"rows.jsonl:?.* {message}"):
            read_demonstrations(path)
    with pytest.raises(BadInput, match="rows.jsonl: no usable rows"):
        read_demonstrations(write([{"a": 1}]), skip_bad=True)
    with pytest.raises(BadInput, match=r"none.jsonl: cannot be read \(No such file or directory\)"):
        read_demonstrations(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: (`datasets` cannot read it|to read it with the package `datasets`)"):
        read_demonstrations(tmp_path / "empty")


def test_a_hub_name_needs_datasets(monkeypatch):
    """None in sys.modules makes `import datasets` fail as if it were not installed."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    for reader in READERS:
        with pytest.raises(BadInput, match="some/dataset: no such file; to read it as a hub data set, first `pip install datasets`"):
            reader("some/dataset")


def test_a_hub_name_through_datasets(monkeypatch):
    """A stand-in for the library: its rows are read, its error is quoted, whatever that says."""
    fake = types.ModuleType("datasets")
    known = {("some/dataset", None, "train"): [GOOD, GOOD], ("some/dataset", "main", "test"): [GOOD]}
    fake.load_dataset = lambda name, configuration, split: known[name, configuration, split]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_demonstrations("some/dataset") == [Demo("p", "c")] * 2
    assert read_demonstrations("some/dataset/main:test") == [Demo("p", "c")]
    with pytest.raises(BadInput, match="some/dataset: row 1: found the keys"):
        read_preferences("some/dataset")
    for words, message in (("No route to host\nTraceback …", r"could not deliver it \(No route to host\)"), ("", "could not deliver it")):

        def fail(name, configuration, split, words=words):
            raise ConnectionError(words)

        fake.load_dataset = fail
        with pytest.raises(BadInput, match=message):
            read_demonstrations("some/dataset")


ASKED, SAID, REFUSED = ({"role": role, "content": text} for role, text in (("user", "why?"), ("assistant", "so."), ("assistant", "no.")))
HUB = {  # data set: (split, a row with the columns that it has on the hub)
    "ultrachat_200k": ("train_sft", {"prompt": "why?", "prompt_id": "1", "messages": [ASKED, SAID]}),
    "ultrafeedback_binarized": ("train_prefs", {
        "prompt": "why?", "prompt_id": "1", "chosen": [ASKED, SAID], "rejected": [ASKED, REFUSED], "messages": [ASKED, SAID],
        "score_chosen": 8.0, "score_rejected": 5.5}),
    "tldr": ("train", {"prompt": "SUBREDDIT: r/x TL;DR:", "completion": " short"}),
    "hh-rlhf": ("train", {"chosen": "\n\nHuman: why?\n\nAssistant: so.", "rejected": "\n\nHuman: why?\n\nAssistant: no."}),
    "gsm8k": ("train", {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}),
}


@pytest.fixture
def hub_copy(tmp_path, monkeypatch):
    """hub_copy(name) -> a folder as the hub has it, of two rows in parquet, its split named in the file."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name):
        split, row = HUB[name]
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        datasets.Dataset.from_list([row, row]).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        return folder, split

    return make


def test_the_papers_data_sets_as_the_hub_has_them(hub_copy):
    """Columns, messages and split names of the five, through parquet and the library."""
    folder, split = hub_copy("ultrachat_200k")
    assert read_demonstrations(f"{folder}:{split}") == [Demo([ASKED], "so.")] * 2
    assert read_prompts(f"{folder}:{split}") == [[ASKED]] * 2  # not the bare text that stands in `prompt` too
    folder, split = hub_copy("ultrafeedback_binarized")
    assert read_preferences(f"{folder}:{split}") == [Pair([ASKED], "so.", "no.")] * 2
    assert read_demonstrations(f"{folder}:{split}") == [Demo([ASKED], "so.")] * 2
    folder, _ = hub_copy("tldr")
    assert read_demonstrations(folder) == [Demo("SUBREDDIT: r/x TL;DR:", " short")] * 2
    folder, _ = hub_copy("hh-rlhf")
    assert read_preferences(folder) == [Pair("\n\nHuman: why?\n\nAssistant:", " so.", " no.")] * 2
    folder, _ = hub_copy("gsm8k")
    assert read_demonstrations(folder / "data" / "train-00000-of-00001.parquet")[0].completion.endswith("#### 2")


def test_a_run_on_a_folder_of_parquet_refuses_to_resume_on_another(hub_copy, small):
    """A run on TL;DR's columns; another row in the file, and --resume says that it has changed."""
    import datasets

    folder, split = hub_copy("tldr")
    file, rows = folder / "data" / f"{split}-00000-of-00001.parquet", [{"prompt": "ask for tea: ", "completion": "tea, please."}] * 2
    datasets.Dataset.from_list(rows).to_parquet(file)
    module, cfg = small("sft", demos=f"{folder}:{split}", steps=1, held_out=0.0)
    module.main(cfg)
    datasets.Dataset.from_list(rows[:1]).to_parquet(file)
    with pytest.raises(BadInput, match="has changed since this run began"):
        module.main(module.Config(resume=cfg.out))


def test_a_split_that_is_not_there_is_named(hub_copy):
    folder, _ = hub_copy("ultrachat_200k")
    with pytest.raises(BadInput, match="train_sft.*:SPLIT"):
        read_demonstrations(folder)


# --------------------------------------------------------------------------------------------------------------- fuzz


def mutate(rng, content):
    """One to four random edits: flip, delete, insert, repeat, cut, or a fragment that means something to a parser."""
    fragments = [b"\0", b"\n", b"\r", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"null", b"1e999", b"NaN", b"\xef\xbb\xbf", b"\xff",
                 b"\\ud800", b'"prompt"', b'"chosen": 1,', b"-0", b"\x1f\x8b", b"\xe2\x80\xa8", b"1" * 5000, b"[" * 2000]
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(content) + 1)
        j = min(len(content), i + rng.randint(1, 30))
        match rng.randrange(6):
            case 0:
                content[i:j] = bytes(rng.randrange(256) for _ in range(j - i))
            case 1:
                del content[i:j]
            case 2:
                content[i:i] = rng.choice(fragments)
            case 3:
                content[i:i] = content[i:j]
            case 4:
                del content[i:]
            case 5:
                content[i:j] = rng.choice(fragments)
    return bytes(content)


def fuzz(tmp_path, capsys, seed, rounds):
    rng = random.Random(seed)
    every = [row for row, _ in [*DEMOS.values(), *PAIRS.values()]] + [{"prompt": "p"}, {"text": "t"}]
    every += [{"prompt": "p", "completion": "c", "label": label} for label in (True, False)]
    wholes = [lines(*every), lines(*ROWS, end="\r\n"), json.dumps(every).encode(), gzip.compress(lines(*every), mtime=0),
              codecs.BOM_UTF8 + "\n".join(json.dumps(row, ensure_ascii=False) for row in every).encode()]
    path, outcomes = tmp_path / "fuzzed", Counter()
    for _ in range(rounds):
        content = mutate(rng, rng.choice(wholes))
        path.write_bytes(content)
        for reader in READERS:
            for skip_bad in (False, True):
                try:
                    rows = reader(path, skip_bad=skip_bad)
                except BadInput as error:
                    outcomes["refused"] += 1
                    assert str(error).startswith(str(path)) and not capsys.readouterr().out
                    continue
                outcomes["read"] += 1
                said = capsys.readouterr().err
                for row in rows:  # a prompt is text or messages, an answer text; all of it can be encoded
                    prompt, *answers = vars(row).values() if isinstance(row, Demo | Pair | Feedback) else [row]
                    if isinstance(row, Feedback):
                        assert isinstance(answers.pop(), bool)
                    assert isinstance(prompt, str | list) and all(isinstance(answer, str | dict) for answer in answers)
                    json.dumps([prompt, answers], ensure_ascii=False).encode()
                skipped = int(m.group(1)) if (m := re.search(r": (\d+) bad rows skipped of", said)) else 0
                assert skip_bad or not skipped
                plain = content[:2] != b"\x1f\x8b" and content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"["
                if plain and reader not in (read_texts, read_feedback):  # nothing is dropped silently
                    assert len(rows) + skipped == sum(bool(line.strip()) for line in content.split(b"\n"))
    return outcomes


def test_damaged_files_are_refused_or_read_never_worse(tmp_path, capsys, record_property):
    """600 damaged files, each read ten ways: BadInput that begins with the path, or rows of sound text that add up."""
    outcomes = fuzz(tmp_path, capsys, seed=0, rounds=600)
    assert min(outcomes["refused"], outcomes["read"]) > 300
    record_property("tried", 600)


@pytest.mark.long
def test_many_more_damaged_files(tmp_path, capsys, record_property):
    fuzz(tmp_path, capsys, seed=1, rounds=10_000)
    record_property("tried", 10_000)


# ---------------------------------------------------------------------------------------------------------- real files


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f"the real data is not here: {REAL.parent.name}/{REAL.name}/{name} beside the checkout")
    return REAL / name


def test_hh_harmless_is_read_whole():
    """1,800 rows; prompt and answers put together are the transcripts of the file, and every prompt ends where the assistant speaks."""
    path = real("hh_harmless.jsonl.gz")
    rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    pairs = read_preferences(path)
    assert len(pairs) == len(rows) == 1800
    for row, pair in zip(rows, pairs, strict=True):
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
        assert pair.prompt.startswith("\n\nHuman: ") and pair.prompt.rstrip().endswith("\n\nAssistant:")
    assert read_demonstrations(path) == [Demo(pair.prompt, pair.chosen) for pair in pairs]
    assert read_prompts(path) == [pair.prompt for pair in pairs] and len(read_texts(path)) == 3600
    assert read_feedback(path) == [row for pair in pairs for row in as_feedback(pair)]


def test_gsm8k_is_read_whole():
    path = real("gsm8k_train.jsonl")
    demos = read_demonstrations(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert demos == [Demo(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows] and len(demos) == 7473
    with pytest.raises(BadInput, match=r":1: found the keys \['answer', 'question'\]"):
        read_preferences(path)


# ------------------------------------------------------------------------------------------------------------ to ids


class Spelled:
    """a = 1, b = 2, …; BOS 90, EOS 91, pad 92, all different so that each can be counted. '<' is BOS spelled out by a template."""

    bos_id, eos_id, pad_id, settings = 90, 91, 92, {"bos_token": "<"}
    chat_template = None

    def encode(self, text):
        return [90 if char == "<" else ord(char) - 96 for char in text]


class WithoutBos(Spelled):
    bos_id = None


def test_encode_prompt():
    """BOS in front of text, as transformers puts it there even if the text spells it too; max_prompt keeps BOS and the end."""
    assert encode_prompt(Spelled(), "abc") == [90, 1, 2, 3]
    assert encode_prompt(Spelled(), "<abc") == [90, 90, 1, 2, 3]
    assert encode_prompt(Spelled(), "abcdef", max_prompt=3) == [90, 5, 6]
    assert encode_prompt(Spelled(), "abc", max_prompt=4) == [90, 1, 2, 3]
    assert encode_prompt(Spelled(), "") == [90]
    assert encode_prompt(WithoutBos(), "abc") == [1, 2, 3]
    assert encode_prompt(WithoutBos(), "abcdef", max_prompt=2) == [5, 6]
    assert encode_prompt(WithoutBos(), "") == [91]


@pytest.mark.parametrize("max_prompt", [1, 2, 3, 8])
@pytest.mark.parametrize("tokenizer", [Spelled(), WithoutBos()], ids=["bos", "no bos"])
def test_max_prompt_is_a_maximum(tokenizer, max_prompt):
    for text in ("", "a", "ab", "abcdefghij"):
        ids = encode_prompt(tokenizer, text, max_prompt=max_prompt)
        assert 1 <= len(ids) <= max_prompt


def test_messages_go_through_the_template_which_may_write_bos_itself():
    tokenizer = Spelled()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert encode_prompt(tokenizer, [{"role": "user", "content": "ab"}]) == [90, 1, 2]


def test_eos_is_appended_exactly_once():
    tokenizer = Spelled()
    assert encode_completion(tokenizer, "ab") == [1, 2, 91] and encode_completion(tokenizer, "") == [91]
    assert encode_demos(tokenizer, [Demo("ab", "c")]) == [([90, 1, 2], [3, 91])]
    assert encode_pairs(tokenizer, [Pair("abc", "c", "de")], max_prompt=2) == [([90, 3], [3, 91], [4, 5, 91])]


def test_an_answer_that_was_cut_off_gets_no_eos(write):
    """`finished: false` beside a completion, or chosen_finished and rejected_finished. No word on it means that the answer is whole."""
    tokenizer = CharTokenizer("pyn")
    y, n, end = *tokenizer.encode("yn"), tokenizer.eos_id
    rows = [{"prompt": "p", "completion": "y", **said} for said in ({}, {"finished": True}, {"finished": False})]
    assert [ids for _, ids in data.encode_demos(tokenizer, data.read_demonstrations(write(rows)))] == [[y, end], [y, end], [y]]
    pairs = [{"prompt": "p", "chosen": "y", "rejected": "n", "chosen_finished": not cut, "rejected_finished": cut} for cut in (True, False)]
    encoded = data.encode_pairs(tokenizer, data.read_preferences(write(pairs)))
    assert [answers for _, *answers in encoded] == [[[y], [n, end]], [[y, end], [n]]]


def test_prompt_and_completion_are_encoded_apart():
    """A tokenizer that joins 'ab' into one id must not join them across the border."""

    class Joining(WithoutBos):
        def encode(self, text):
            return [ord(piece[0]) if len(piece) == 1 else 77 for piece in re.findall("ab|.", text)]

    assert Joining().encode("ab") == [77]
    assert encode_demos(Joining(), [Demo("a", "b")]) == [([97], [98, 91])]


@pytest.mark.parametrize("max_len", [2, 3, 4, 5, 100])
@pytest.mark.parametrize("tokenizer", [Spelled(), WithoutBos()], ids=["bos", "no bos"])
def test_windows_score_every_token_once(tokenizer, max_len):
    """Each row: one token seen, at most max_len − 1 scored; scored tokens in order are the text and its EOS; each row's seen token
    is the one just before (BOS, or EOS where there is none, at the start)."""
    for text in ("", "a", "abcdefghijkl"):
        rows = encode_texts(tokenizer, [text, "xy"], max_len=max_len)
        seen = [token for prompt, _ in rows for token in prompt]
        scored = [token for _, completion in rows for token in completion]
        start = tokenizer.bos_id or tokenizer.eos_id
        assert scored == [*tokenizer.encode(text), 91, 24, 25, 91]
        assert all(len(prompt) == 1 and 1 <= len(completion) < max_len for prompt, completion in rows)
        before = dict(zip(range(len(scored)), [start, *tokenizer.encode(text), start, 24, 25], strict=True))
        places = [sum(len(c) for _, c in rows[:i]) for i in range(len(rows))]
        assert seen == [before[place] for place in places]


def test_batches_of_picked_rows():
    rows = encode_demos(Spelled(), [Demo("a", "b"), Demo("c", "de"), Demo("f", "g")])
    batch = demo_batch(rows, [1, 0], pad_id=92, max_len=10)
    assert batch.inputs.tolist() == [[90, 3, 4, 5], [90, 1, 2, 91]]
    assert batch.targets.tolist() == [[3, 4, 5, 91], [1, 2, 91, 92]]
    pairs = pair_batch(encode_pairs(Spelled(), [Pair("a", "b", "cd")]), [0, 0], pad_id=92, max_len=4)
    assert len(pairs) == 2 and pairs.chosen.targets[0][pairs.chosen.mask[0]].tolist() == [2, 91]
    assert pairs.rejected.targets[0][pairs.rejected.mask[0]].tolist() == [3, 4]


def test_feedback_is_encoded_as_demonstrations_are_and_keeps_its_label():
    feedback = [Feedback("abc", "c", True), Feedback("a", "", False)]
    assert encode_feedback(Spelled(), feedback, max_prompt=2) == [([90, 3], [3, 91], True), ([90, 1], [91], False)]
    batch = demo_batch(encode_feedback(Spelled(), feedback), [1, 0], pad_id=92, max_len=10)
    assert [row[mask].tolist() for row, mask in zip(batch.targets, batch.mask, strict=True)] == [[91], [3, 91]]


def test_counts_agree_with_the_batches():
    """Rows of 2 + 3, 6 + 2 and 1 + 1 tokens at max_len 4: scored 2 + 0 + 1, two cut, one of them empty; the masks say the same."""
    rows = [([1, 1], [2, 2, 9]), ([1] * 6, [2, 9]), ([1], [9])]
    assert counts(rows, 4) == {"rows": 3, "scored_tokens": 3, "truncated": 2}
    rng = random.Random(0)
    for _ in range(50):
        rows = [([1] * rng.randint(1, 6), [2] * rng.randint(1, 6), [3] * rng.randint(1, 6)) for _ in range(5)]
        max_len = rng.randint(1, 13)
        pairs = pair_batch(rows, range(5), pad_id=0, max_len=max_len)
        per_row = [*pairs.chosen.mask.sum(1).tolist(), *pairs.rejected.mask.sum(1).tolist()]
        whole = [len(row[1]) for row in rows] + [len(row[2]) for row in rows]
        cut = sum(scored < length for scored, length in zip(per_row, whole, strict=True))
        assert counts(rows, max_len) == {"rows": 5, "scored_tokens": sum(per_row), "truncated": cut}


@pytest.mark.parametrize(("n", "share", "held"), [(10, 0.2, 2), (10, 0.0, 0), (9, 0.1, 0), (20, 0.1, 2), (10, 1.0, 10)])
def test_split_held_out(n, share, held):
    rows = list(range(n))
    training, kept = split_held_out(rows, share)
    assert training + kept == rows and kept == rows[n - held :]


def test_rows_are_split_before_the_unusable_are_left_out(capsys):
    """Ten rows, the first nine prompts of one token, the last of six: what is held out is the last row of the file, not of what is left."""
    rows = [([1], [2, 0])] * 9 + [([1] * 6, [2, 0])]
    train, held_out = data.split_scorable(rows, 0.1, max_len=6)
    assert len(train) == 9 and held_out == [] and "1 of 1 rows are left out" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no row has a scored token: every prompt fills --max_len 1"):
        data.split_scorable(rows, 0.1, max_len=1)


# ------------------------------------------------------------------------------------- what stands beside the known keys

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CHAT_TEMPLATE = ("{% if tools %}{{ tools|length }} tools {% endif %}{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}"
                 "{{ m.content }}{% for call in m.tool_calls or [] %}call {{ call.name }}{% endfor %}{{ eos_token }}\n{% endfor %}"
                 "{% if add_generation_prompt %}[assistant]{% endif %}")


@pytest.fixture
def chatting():
    tokenizer = CharTokenizer("".join(map(chr, range(32, 127))) + "\n")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def texts_of(tokenizer, rows):
    return [tuple(tokenizer.inner.decode(ids, skip_special_tokens=False) for ids in row) for row in rows]


def test_tools_system_and_calls_reach_the_template(write, chatting):
    """By hand: the prompt as the template writes it, the answer as the template writes it, then EOS once."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}
    rows = [{"messages": [USER, call], "tools": TOOLS}, {"messages": [USER, REPLY], "tools": json.dumps(TOOLS)},
            {"messages": [USER, REPLY], "system": "be kind"}, {"messages": [USER, {**REPLY, "reasoning_content": "well"}]}]
    demos = read_demonstrations(write(rows))
    assert texts_of(chatting, encode_demos(chatting, demos)) == [
        ("1 tools [user]hi<|endoftext|>\n[assistant]", "call weather<|endoftext|>"),
        ("1 tools [user]hi<|endoftext|>\n[assistant]", "yes<|endoftext|>"),
        ("[system]be kind<|endoftext|>\n[user]hi<|endoftext|>\n[assistant]", "yes<|endoftext|>"),
        ("[user]hi<|endoftext|>\n[assistant]", "wellyes<|endoftext|>")]
    pair = {"prompt": [USER], "chosen": [call], "rejected": [{**call, "tool_calls": [{"name": "other"}]}]}
    rows = encode_pairs(chatting, read_preferences(write([pair])))
    assert texts_of(chatting, rows)[0][1:] == ("call weather<|endoftext|>", "call other<|endoftext|>")


def test_a_system_message_that_only_the_prompt_has(write):
    rows = [{"prompt": [SYSTEM, USER], "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
            {"prompt": [USER], "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
            {"prompt": [USER], "chosen": [SYSTEM, USER, REPLY], "rejected": [SYSTEM, USER, OTHER]}]
    assert read_preferences(write(rows)) == [Pair(prompt, "yes", "no") for prompt in ([SYSTEM, USER], [USER], [SYSTEM, USER])]
    with pytest.raises(BadInput, match=":1: the messages of 'prompt' are not those that 'chosen' and 'rejected' begin with"):
        read_preferences(write([{"prompt": [SYSTEM], "chosen": [USER, REPLY], "rejected": [USER, OTHER]}]))


def test_preferences_with_alpacas_instruction(write):
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "chosen": "2", "rejected": "3"}
    assert read_preferences(write([row])) == [Pair("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n", "2", "3")]


def test_an_answer_that_text_cannot_hold_is_named(write, chatting):
    """Without a template a tool call would train an empty answer."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}
    path = write([{"messages": [USER, REPLY]}, {"messages": [USER, call]}])
    with pytest.raises(BadInput, match=r"rows.jsonl:2: the answer has tool_calls, which only a chat template can write"):
        chatting.chat_template = None
        encode_demos(chatting, read_demonstrations(path))


def test_what_a_transcript_cannot_hold_is_named(write, chatting):
    """Tools and calls in a prompt vanish from a transcript; an answer of a call after a prompt of text has no template either."""
    call, template = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}, chatting.chat_template
    chatting.chat_template = None
    for number, (row, said) in enumerate([({"messages": [USER, REPLY], "tools": TOOLS}, "the prompt has tools"),
                                          ({"messages": [USER, call, USER, REPLY]}, "the prompt has tool_calls"),
                                          ({"prompt": "hi", "completion": [call]}, "the answer has tool_calls, ")]):
        demos = read_demonstrations(write([row], f"{number}.jsonl"))
        with pytest.raises(BadInput, match=f"{number}.jsonl:1: {said}.* chat template"):
            encode_demos(chatting, demos)
    chatting.chat_template = template
    with pytest.raises(BadInput, match="2.jsonl:1: the answer has tool_calls, but the prompt is text"):
        encode_demos(chatting, demos)
    chatting.chat_template = template.replace("{{ m.reasoning_content }}", "")
    path = write([{"messages": [USER, {**call, "reasoning_content": "well"}]}], "r.jsonl")
    with pytest.raises(BadInput, match="r.jsonl:1: the chat template writes nothing of the answer's reasoning_content"):
        encode_demos(chatting, read_demonstrations(path))
    with pytest.raises(BadInput, match="t.jsonl:1: the answer has tool_calls, but the prompt is text"):
        read_texts(write([{"prompt": "hi", "completion": [call]}], "t.jsonl"))


def test_a_row_that_template_or_tokenizer_refuse_is_named_and_can_be_skipped(write, chatting, capsys):
    chatting.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no!') }}{% endif %}{{ messages[0].content }}"
    rows = [{"messages": [USER, REPLY]}, {"messages": [SYSTEM, USER, REPLY]}, {"prompt": "\u2028", "completion": "x"}]
    demos = read_demonstrations(write(rows))
    with pytest.raises(BadInput, match=r"rows.jsonl:2: the chat template failed .*no!.*--skip_bad"):
        encode_demos(chatting, demos)
    assert len(encode_demos(chatting, demos, skip_bad=True)) == 1 and demos == [Demo([USER], "yes")]
    assert "2 bad rows skipped of 3; the first: " in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"no usable rows; the first: .*rows.jsonl:3: cannot encode"):
        encode_demos(chatting, read_demonstrations(write(rows))[2:], skip_bad=True)


def test_one_prompt_whatever_the_flag(write):
    """UltraFeedback and UltraChat have the prompt as bare text too."""
    rows = [{"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, {"prompt": "hi", "messages": [USER, REPLY]}]
    path = write(rows)
    assert read_prompts(path) == [demo.prompt for demo in read_demonstrations(path)] == [[USER], [USER]]
    rows = [{"prompt": "1+1?", "question": "1+1?", "answer": "#### 2"}, {"prompt": "p", "completion": "c", "messages": [USER, REPLY]}]
    path = write(rows, "more.jsonl")
    assert read_prompts(path) == [demo.prompt for demo in read_demonstrations(path)] == ["Question: 1+1?\nAnswer:", "p"]
    assert read_prompts(write([{"messages": [SYSTEM, USER]}, {"prompt": "1+1?", "answer": "2"}])) == [[SYSTEM, USER], "1+1?"]


def test_a_space_at_the_end_of_a_prompt_goes_to_the_answer(write):
    """With byte-level BPE the ids are then those of the whole text, as in trl; a character tokenizer has nothing to join."""
    tokenizer = train_bpe(["say the word, the very word: the end"] * 9, 300)
    prompt, completion = encode_demos(tokenizer, [Demo("say: ", "the end")])[0]
    assert prompt + completion == [0, *tokenizer.encode("say: the end"), 0]
    assert tokenizer.decode(completion) == " the end" and encode_prompts(tokenizer, ["say: "])[0][0] == prompt
    assert encode_demos(tokenizer, [Demo("say: ", " the end")]) == [(prompt, completion)]
    assert encode_demos(builtin_tokenizer(), [Demo("ask for tea: ", "tea")])[0][1] == [*builtin_tokenizer().encode("tea"), 0]


def test_cut_prompts_are_counted(capsys):
    demos = [Demo("ask for tea: ", "tea"), Demo("ask", "tea")]
    encode_demos(builtin_tokenizer(), demos, max_prompt=5)
    assert capsys.readouterr().err == "1 of 2 prompts are cut to --max_prompt 5: they lose their beginning\n"


def test_arrow_nulls_are_absent_fields(tmp_path):
    """The same rows from JSONL and from parquet, where arrow gives each message the fields of all others."""
    datasets = pytest.importorskip("datasets")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "city": None}]}
    turns = [{**USER, "name": "Bob"}, {**call, "name": "x"}, {"role": "tool", "content": "sun"}, REPLY]
    rows = [{"messages": [USER, REPLY]}, {"messages": turns}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "run[12].parquet")
    datasets.Dataset.from_list([{"prompt": "wrong", "completion": "file"}]).to_parquet(tmp_path / "run1.parquet")
    first, second = read_demonstrations(tmp_path / "run[12].parquet")
    assert first.prompt == [USER] and second.prompt[0] == {**USER, "name": "Bob"} and "tool_calls" not in second.prompt[2]
    assert second.prompt[1]["tool_calls"] == [{"name": "weather"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert read_demonstrations(tmp_path / "saved") == [first, second]
    for name in ("run1.parquet", "saved"):
        with pytest.raises(BadInput, match=f"{name}:test: has no splits"):
            read_demonstrations(f"{tmp_path / name}:test")
    with pytest.raises(BadInput, match="absent.parquet: cannot be read"):
        read_demonstrations(tmp_path / "absent.parquet")
    (tmp_path / "a[1]").mkdir()
    with pytest.raises(BadInput, match="as a pattern; rename it"):
        read_demonstrations(tmp_path / "a[1]")


def test_an_answer_ends_in_one_eos_behind_its_turn(write, chatting):
    """The template ends the assistant's turn with EOS and a line end. The answer is its text and one EOS."""
    rows = read_demonstrations(write([{"prompt": [USER], "completion": [REPLY]}]))
    [(_, answer)] = encode_demos(chatting, rows)
    assert answer == [*chatting.encode("yes"), chatting.eos_id]


def test_conversations_as_text_go_through_the_template(write, chatting):
    """The whole conversation as the template writes it, to its end. BOS in front and EOS behind, unless the template wrote them."""
    texts = read_texts(write([{"messages": [USER, REPLY]}]))
    rows = encode_texts(chatting, texts, max_len=200)
    written = "[user]hi<|endoftext|>\n[assistant]yes<|endoftext|>\n"
    assert texts_of(chatting, rows) == [("<|endoftext|>", written + "<|endoftext|>")]
    chatting.chat_template = "{{ eos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    rows = encode_texts(chatting, texts, max_len=200)
    assert texts_of(chatting, rows) == [("<|endoftext|>", "hi<|endoftext|>yes<|endoftext|>")]
    chatting.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(BadInput, match="rows.jsonl:1: the chat template failed"):
        encode_texts(chatting, texts, max_len=200)


def test_columns_that_are_not_read_are_named(write, capsys):
    """Not for prompts, whose columns a reward may read."""
    path = write([{"prompt": "p", "completion": "c", "id": 7}, {"prompt": "p", "completion": "c", "source": "web", "meta": None}])
    read_demonstrations(path)
    assert capsys.readouterr().err == f"{path}: columns that are never read: id, source\n"
    assert read_prompts(path)[0].columns["id"] == 7 and not capsys.readouterr().err
    path = write(b'{"prompt": "p", "completion": "c", "\\ud800": 1}\n', "half.jsonl")
    assert read_demonstrations(path) and capsys.readouterr().err == f"{path}: columns that are never read: \\ud800\n"


def test_rows_in_files_are_the_rows_of_the_list(tmp_path):
    """Pairs, feedback with its label and prompts with a chat: item by item, in slices, selections and joined ones; 4 bytes a token."""
    kinds = {3: [([90, 1], [2, 91], [91]), ([70_000], [], [5, 6, 91]), ([1], [2], [3])],
             2: [([90], [91], True), ([1, 2], [3], False), ([4], [], True)], 1: [([7, 8], Chat([USER])), ([9], Text("x")), ([1], "y")]}
    for parts, listed in kinds.items():
        folder = tmp_path / str(parts)
        folder.mkdir()
        write_rows(listed, parts, folder)
        rows = read_rows(folder, [row[parts:] for row in listed])
        mapped = inspect.getclosurevars(rows.read).nonlocals["ids"]
        assert isinstance(mapped, np.memmap) and mapped.nbytes == 4 * sum(len(ids) for row in listed for ids in row[:parts])
        shutil.rmtree(folder)  # what is mapped stays
        assert [*rows] == listed and len(rows) == 3 and rows[-1] == listed[-1] and all(type(ids) is list for ids in rows[0][:parts])
        assert [*rows[1:]] == listed[1:] and [*pick(rows, [2, 0])] == [listed[2], listed[0]] == pick(listed, [2, 0])
        assert [*(pick(rows, [2]) + rows[:1])] == [listed[2], listed[0]]
        train, held_out = data.split_scorable(rows, 0.4, max_len=2)
        assert ([*train], [*held_out]) == data.split_scorable(listed, 0.4, max_len=2) and not rows[3:]
        with pytest.raises(IndexError):
            rows[3]
    (tmp_path / "none").mkdir()
    write_rows([], 2, tmp_path / "none")
    assert len(read_rows(tmp_path / "none", [])) == 0
