"""Read demonstrations, preferences and prompts from files and encode them as token ids. This is the one place that appends EOS.

Files are JSONL or JSON, plain or gzipped (with `datasets` also parquet, hub data sets). A row has one of these sets of keys (TRL's names):

    demonstrations   prompt + completion | messages | question + answer (GSM8K) | instruction [+ input] + output (Alpaca)
                     | any preference row (its chosen answer)
    preferences      prompt + chosen + rejected | chosen + rejected (whole conversations, Anthropic-HH transcripts as they are)
    feedback         prompt + completion + label (true: desirable) | any preference row, which gives two rows
    prompts          prompt | any of the above (its prompt)
    texts            text | any demonstration (prompt and answer joined; a preference row gives two texts) | a .txt file

prompt, completion, chosen and rejected are strings or lists of messages. A bad row raises an error with path:line and the reason. With
skip_bad, bad rows are skipped and counted: none is dropped silently. docs/DATA.md has every detail. Checked by tests/test_data.py.
"""

import functools
import gzip
import json
import os
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from minialign.batch import Pairs, collate
from minialign.engine.common import BadInput, one_line
from minialign.tokenizer import render_chat


@dataclass
class Demo:
    prompt: str | list  # text, or a list of {role, content} that a chat template renders
    completion: str


@dataclass
class Pair:
    prompt: str | list
    chosen: str
    rejected: str


@dataclass
class Feedback:
    prompt: str | list
    completion: str
    desirable: bool


# ----------------------------------------------------------------------------------------------------------- rows of a file


class BadRow(Exception):
    """The reason why one row is refused. The reader adds path:line."""


def read_demonstrations(path, *, skip_bad=False):
    """list[Demo]. Raises BadInput with path:line at the first bad row. With skip_bad it skips bad rows and prints how many, to stderr."""
    return _read(path, _demo, skip_bad)


def read_preferences(path, *, skip_bad=False):
    """list[Pair]. Handles bad rows like read_demonstrations."""
    return _read(path, _pair, skip_bad)


def read_feedback(path, *, skip_bad=False):
    """list[Feedback]. Handles bad rows like read_demonstrations."""
    return [row for rows in _read(path, _feedback, skip_bad) for row in rows]


def read_prompts(path, *, skip_bad=False):
    """List of prompts (text or messages). Handles bad rows like read_demonstrations."""
    return _read(path, _prompt, skip_bad)


def read_texts(path, *, skip_bad=False):
    """List of documents for a base model. A preference row gives two documents, one per answer: a base model does not prefer either."""
    if Path(path).suffix == ".txt":
        return [_decode(path, _bytes(path))]
    return [text for texts in _read(path, _texts, skip_bad) for text in texts]


def _read(path, convert, skip_bad):
    rows, bad, first = [], 0, ""
    for where, row, fault in _records(path):
        try:
            if fault:
                raise BadRow(fault)
            if not isinstance(row, dict):
                raise BadRow(f"expected an object with named fields, found {type(row).__name__}")
            rows.append(convert(row))
        except BadRow as error:
            if not skip_bad:
                raise BadInput(f"{where}: {error}; fix the row, or skip such rows with --skip_bad") from None
            bad, first = bad + 1, first or f"{where}: {error}"
    if bad:
        print(f"{path}: {bad} bad rows skipped of {bad + len(rows)}; the first: {first}", file=sys.stderr)
    if not rows:
        raise BadInput(f"{path}: no usable rows")
    return rows


def _bytes(path):
    """The file's bytes, decompressed if it is gzipped (its first two bytes show this, not its name)."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise BadInput(f"{path}: the gzip archive is cut short or damaged ({error}); fetch it again") from None
    return content


def _decode(path, content):
    try:
        return content.decode("utf-8-sig")  # a byte-order mark is not part of the text
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None


def _records(path):
    """Yield (where, value, fault) for each row: where it is ('path:line'), its JSON value, and an error message if there is no value."""
    name, _, split = (str(path), "", "") if os.path.exists(path) else str(path).partition(":")
    if os.path.isdir(name) or name.endswith(".parquet") or not os.path.exists(name) and HUB_NAME.fullmatch(name) and not Path(name).suffix:
        yield from _hub_records(name, split or "train")
        return
    content = _bytes(path)
    if content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":  # one JSON list of rows
        try:
            rows = json.loads(_decode(path, content))
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number with thousands of digits
            raise BadInput(f"{path}: not valid JSON ({error})") from None
        for number, row in enumerate(rows, start=1):
            yield f"{path}: row {number}", row, None
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")), None
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", None, f"not a line of JSON ({error})"


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")  # owner/name, or owner/name/configuration


def _hub_records(name, split):
    """Read one split of a hub data set, of a folder in the hub's layout, or of a parquet file, with the optional package `datasets`."""
    here = os.path.exists(name)
    try:
        from datasets import load_dataset
    except ImportError:
        what = "to read it with the package `datasets`" if here else "no such file; to read it as a hub data set"
        raise BadInput(f"{name}: {what}, first `pip install datasets`") from None
    try:
        if name.endswith(".parquet"):
            rows = load_dataset("parquet", data_files=name, split=split)
        else:
            owner_and_name, configuration = (name, None) if here else ("/".join(name.split("/")[:2]), (name.split("/") + [None])[2])
            rows = load_dataset(owner_and_name, configuration, split=split)
    except Exception as error:  # network, name, access or split: the library's message says which
        what = "`datasets` cannot read it" if here else "no such file, and the hub could not deliver it"
        raise BadInput(f"{name}: {what} ({one_line(error)}); choose another split with {name}:SPLIT") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}: row {number}", row, None


def _is_text(value):
    return isinstance(value, str) or _is_messages(value)


def _is_messages(value):
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)


def _check(row, *keys, messages=True):
    for key in keys:
        value = row[key]
        if not (_is_text(value) if messages else isinstance(value, str)):
            raise BadRow(f"{key!r} must be text{' or a list of {role, content}' * messages}, found {type(value).__name__}")
        texts = [value] if isinstance(value, str) else [text for message in value for text in (message["role"], message["content"])]
        if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
            raise BadRow(f"{key!r} contains half of a surrogate pair, which is not a character")


def _answer(value):
    """The text of a completion: a string, or the content of the one assistant message."""
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0]["role"] != "assistant":
        raise BadRow("a completion given as messages must be exactly one message of the assistant")
    return value[0]["content"]


TURN = "\n\nAssistant: "


def _split_conversations(chosen, rejected):
    """Two whole conversations -> their common prompt and the two answers."""
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise BadRow("'chosen' and 'rejected' must both be text or both be messages")
    if isinstance(chosen, list):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)  # two equal conversations: their last messages are the answers
        if not shared:
            raise BadRow("'chosen' and 'rejected' share no message that could be the prompt")
        return chosen[:shared], _answer(chosen[shared:]), _answer(rejected[shared:])
    # Some transcripts continue for several turns after they differ. The prompt ends at the last turn that both share.
    cut = os.path.commonprefix([chosen, rejected]).rfind(TURN.rstrip())
    if cut < 0:
        raise BadRow(f"'chosen' and 'rejected' share no {TURN.strip()!r} turn; put the prompt into its own field 'prompt'")
    cut += len(TURN.rstrip())
    cut += chosen[cut : cut + 1] == rejected[cut : cut + 1] == " "
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _pair(row):
    if {"chosen", "rejected"} <= row.keys():
        _check(row, "chosen", "rejected")
        whole = all(isinstance(row[key], list) and len(row[key]) > 1 for key in ("chosen", "rejected"))  # they include the prompt
        if row.get("prompt") is not None and not whole:
            _check(row, "prompt")
            return Pair(row["prompt"], _answer(row["chosen"]), _answer(row["rejected"]))
        return Pair(*_split_conversations(row["chosen"], row["rejected"]))
    raise BadRow(f"found the keys {sorted(row)}, expected prompt + chosen + rejected, or chosen + rejected")


def as_feedback(pair):
    """A pair as feedback: the chosen answer is desirable, the rejected one is not."""
    return [Feedback(pair.prompt, pair.chosen, True), Feedback(pair.prompt, pair.rejected, False)]


def _feedback(row):
    if {"chosen", "rejected"} <= row.keys():
        return as_feedback(_pair(row))
    if {"prompt", "completion", "label"} <= row.keys():
        _check(row, "prompt", "completion")
        if not isinstance(row["label"], bool):
            raise BadRow(f"'label' must be true (desirable) or false, found {row['label']!r:.40}")
        return [Feedback(row["prompt"], _answer(row["completion"]), row["label"])]
    raise BadRow(f"found the keys {sorted(row)}, expected prompt + completion + label, or chosen + rejected with or without prompt")


DEMO_KEYS = "prompt + completion, messages, chosen + rejected, question + answer, or instruction + output"


def _demo(row, other_keys=""):
    if {"prompt", "completion"} <= row.keys():
        _check(row, "prompt", "completion")
        if row.get("label", True) in (False, 0):
            raise BadRow("'label' is false: an answer that somebody disliked is not a demonstration (kto learns from both kinds)")
        return Demo(row["prompt"], _answer(row["completion"]))
    if "messages" in row:
        _check(row, "messages")
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise BadRow("'messages' must be a list of at least two messages, the last from the assistant")
        return Demo(messages[:-1], messages[-1]["content"])
    if {"chosen", "rejected"} <= row.keys():
        pair = _pair(row)
        return Demo(pair.prompt, pair.chosen)
    if {"question", "answer"} <= row.keys():
        _check(row, "question", "answer", messages=False)
        return Demo(f"Question: {row['question']}\nAnswer: ", row["answer"])
    if {"instruction", "output"} <= row.keys():
        _check(row, "instruction", "output", *(["input"] if row.get("input") else []), messages=False)
        given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
        return Demo(f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n", row["output"])
    raise BadRow(f"found the keys {sorted(row)}, expected {other_keys}{DEMO_KEYS}")


def _prompt(row):
    if "prompt" in row:
        _check(row, "prompt")
        return row["prompt"]
    return _demo(row, "prompt, ").prompt


def _texts(row):
    if row.get("text") is not None:
        _check(row, "text", messages=False)
        return [row["text"]]
    if {"chosen", "rejected"} <= row.keys():
        pair = _pair(row)
        return [plain_text(pair.prompt) + pair.chosen, plain_text(pair.prompt) + pair.rejected]
    demo = _demo(row, "text, ")
    return [plain_text(demo.prompt) + demo.completion]


def plain_text(prompt):
    """A prompt as text. Messages become a transcript."""
    return prompt if isinstance(prompt, str) else render_chat(None, prompt)


# ------------------------------------------------------------------------------------------------------- text -> token ids


def encode_prompt(tokenizer, prompt, *, max_prompt=None):
    """Token ids of a prompt, never empty. Messages go through the chat template. BOS is put in front, once, if the tokenizer has one.

    A prompt longer than max_prompt keeps BOS and its end, where the question is.
    """
    ids = tokenizer.encode(prompt if isinstance(prompt, str) else render_chat(tokenizer, prompt))
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = ids[1:] if bos and ids[:1] == bos else ids  # a template may have added BOS already
    if max_prompt is not None:
        ids = ids[max(0, len(ids) - (max_prompt - len(bos))) :]
    return bos + ids or [tokenizer.eos_id]


def encode_completion(tokenizer, completion):
    """Token ids of a completion plus EOS. Completions get EOS only here. (Text that spells out the EOS token is encoded as that token.)"""
    return tokenizer.encode(completion) + [tokenizer.eos_id]


def encode_demos(tokenizer, demos, *, max_prompt=None):
    """[(prompt ids, completion ids)]. Prompt and completion are encoded separately, so that neither changes the other's tokens."""
    return [(encode_prompt(tokenizer, d.prompt, max_prompt=max_prompt), encode_completion(tokenizer, d.completion)) for d in demos]


def encode_feedback(tokenizer, feedback, *, max_prompt=None):
    """[(prompt ids, completion ids, desirable)]."""
    return [(*ids, row.desirable) for ids, row in zip(encode_demos(tokenizer, feedback, max_prompt=max_prompt), feedback, strict=True)]


def encode_pairs(tokenizer, pairs, *, max_prompt=None):
    """[(prompt ids, chosen ids, rejected ids)]."""
    answer = functools.partial(encode_completion, tokenizer)
    return [(encode_prompt(tokenizer, p.prompt, max_prompt=max_prompt), answer(p.chosen), answer(p.rejected)) for p in pairs]


def encode_prompts(tokenizer, prompts, *, max_prompt=None):
    """[(prompt ids, prompt as it is in the file)]. The policy uses the ids, the reward uses the prompt."""
    return [(encode_prompt(tokenizer, prompt, max_prompt=max_prompt), prompt) for prompt in prompts]


def encode_texts(tokenizer, texts, *, max_len):
    """Documents as rows of at most max_len tokens: [(one context token, the tokens that follow)]. Every token of a document is scored.

    BOS (EOS if there is no BOS) is put before each document and EOS after it. A row continues where the row before it stopped.
    """
    rows = []
    for text in texts:
        ids = encode_prompt(tokenizer, "") + tokenizer.encode(text) + [tokenizer.eos_id]
        for start in range(0, len(ids) - 1, max_len - 1):
            rows.append((ids[start : start + 1], ids[start + 1 : start + max_len]))
    return rows


def demo_batch(rows, picked, *, pad_id, max_len):
    """The picked rows of encode_demos or encode_texts -> Batch."""
    return collate([rows[i][0] for i in picked], [rows[i][1] for i in picked], pad_id=pad_id, max_len=max_len)


def pair_batch(rows, picked, *, pad_id, max_len):
    """The picked rows of encode_pairs -> Pairs."""
    prompts = [rows[i][0] for i in picked]
    chosen = collate(prompts, [rows[i][1] for i in picked], pad_id=pad_id, max_len=max_len)
    return Pairs(chosen, collate(prompts, [rows[i][2] for i in picked], pad_id=pad_id, max_len=max_len))


def counts(rows, max_len):
    """{'rows', 'scored_tokens', 'truncated'} of encoded rows cut at max_len. A truncated completion has lost its end."""
    numbers = {"rows": len(rows), "scored_tokens": 0, "truncated": 0}
    for prompt, *completions in rows:
        for completion in completions:
            scored = min(len(completion), max(0, max_len - len(prompt)))
            numbers["scored_tokens"] += scored
            numbers["truncated"] += scored < len(completion)
    return numbers


def split_held_out(rows, share):
    """(training rows, held-out rows). The last `share` of the rows, in file order, is held out and never trained on."""
    n = int(len(rows) * share)
    return (rows[:-n], rows[-n:]) if n else (rows, [])


def scorable(rows, max_len):
    """The encoded rows whose prompt leaves room under max_len for at least one scored token. Prints how many rows are left out."""
    kept = [row for row in rows if len(row[0]) < max_len]
    if len(kept) < len(rows):
        left_out = f"{len(rows) - len(kept)} of {len(rows)} rows are left out"
        print(f"{left_out}: their prompt alone fills --max_len {max_len} (--max_prompt shortens it)")
    return kept


def split_scorable(rows, share, max_len):
    """Apply split_held_out, then scorable to both parts. In this order training holds out the rows of the file that `evaluate` uses.

    Raises BadInput if nothing is left to train on.
    """
    train, held_out = (scorable(part, max_len) for part in split_held_out(rows, share))
    if not train:
        raise BadInput(f"no row has a scored token: every prompt fills --max_len {max_len}; raise it, or set --max_prompt")
    return train, held_out
