"""Read demonstrations, preferences and prompts from files and encode them as token ids. This is the one place that appends EOS.

Files are JSONL or JSON, plain or gzipped (with `datasets` also parquet, hub data sets). A row has one of these sets of keys (TRL's names):

    demonstrations   prompt + completion | messages | question + answer (GSM8K) | instruction [+ input] + output (Alpaca)
                     | any preference row (its chosen answer)
    preferences      prompt + chosen + rejected | chosen + rejected (whole conversations, Anthropic-HH transcripts as they are)
                     | instruction [+ input] + chosen + rejected
    feedback         prompt + completion + label (true: desirable) | any preference row, which gives two rows
    prompts          prompt | any of the above (its prompt)
    texts            text | any demonstration (prompt and answer joined; a preference row gives two texts) | a .txt file

A JSONL file of more than 100,000 demonstrations, preferences or prompts is not read at once: see LongFile.
prompt, completion, chosen and rejected are strings or lists of messages. Beside messages, a row may have tools, documents, system and
chat_template_kwargs. A bad row raises an error with path:line and the reason. With skip_bad, bad rows are skipped and counted: none is
dropped silently. docs/DATA.md has every detail. Checked by tests/test_data.py and tests/test_world.py.
"""

import functools
import glob
import gzip
import io
import itertools
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minialign.batch import Pairs, collate
from minialign.engine.common import BadInput, note, one_line, read_regular
from minialign.tokenizer import REASONING, plain_text_of, render_chat


class Text(str):
    """A prompt that is text. where: its place in the file ('path:line'). columns: all fields of its row. Chat has both too."""

    where, columns = "", {}


class Chat(list):
    """A prompt that is a list of {role, content}, which a chat template renders with the tools and documents among its columns."""

    where, columns = "", {}


class CutOff(str):
    """An answer that ends where sampling was stopped ("finished": false, as generate writes it). So no EOS is put behind it."""


@dataclass
class Demo:
    prompt: Text | Chat | str | list
    completion: str | dict  # an answer of more than text (tool_calls, reasoning_content) is a message, which the chat template renders

    def document(self):
        return document(self.prompt, self.completion)


@dataclass
class Pair:
    prompt: Text | Chat | str | list
    chosen: str | dict
    rejected: str | dict


@dataclass
class Feedback:
    prompt: Text | Chat | str | list
    completion: str | dict
    desirable: bool


# ----------------------------------------------------------------------------------------------------------- rows of a file


class BadRow(Exception):
    """The reason why one row is refused. The reader adds path:line."""


class Row(dict):
    """The fields of one row without those that are null: null means that the row does not have the field. where: path:line. columns: all
    fields, with those that are null."""

    where, columns = "", {}


def read_demonstrations(path, *, skip_bad=False):
    """list[Demo]. Raises BadInput with path:line at the first bad row. With skip_bad it skips bad rows and prints how many, to stderr."""
    return _read(path, _good_demo, skip_bad)


def read_preferences(path, *, skip_bad=False):
    """list[Pair]. Handles bad rows like read_demonstrations."""
    return _read(path, _pair, skip_bad)


def read_feedback(path, *, skip_bad=False):
    """list[Feedback]. Handles bad rows like read_demonstrations."""
    return [row for rows in _read(path, _feedback, skip_bad) for row in rows]


def read_prompts(path, *, skip_bad=False):
    """List of prompts (text or messages). Handles bad rows like read_demonstrations."""
    return _read(path, _prompt, skip_bad, reads_all=True)  # rewards may read all columns


def read_texts(path, *, skip_bad=False):
    """List of documents for a base model. A preference row gives two documents, one per answer: a base model does not prefer either."""
    if Path(path).suffix == ".txt":
        return [_decode(path, _bytes(path))]
    return [text for texts in _read(path, _texts, skip_bad) for text in texts]


def _read(path, convert, skip_bad, reads_all=False):
    rows, bad, first, columns = [], 0, "", {}
    for where, row, fault in _records(path):
        try:
            if fault:
                raise BadRow(fault)
            row = _fields_of(where, row)
            rows.append(convert(row))
            columns |= dict.fromkeys(row)
        except (BadRow, BadInput) as error:
            if not skip_bad:
                raise BadInput(f"{where}: {error}; fix the row, or skip such rows with --skip_bad") from None
            bad, first = bad + 1, first or f"{where}: {error}"
    if bad:
        note(f"{path}: {bad} bad rows skipped of {bad + len(rows)}; the first: {first}")
    if not rows:
        raise BadInput(f"{path}: no usable rows")
    if not reads_all:
        _name_unread(path, columns)
    return rows


def _fields_of(where, row):
    if not isinstance(row, dict):
        raise BadRow(f"expected an object with named fields, found {type(row).__name__}")
    fields, row = row, Row((key, value) for key, value in row.items() if value is not None)
    row.where, row.columns = where, fields
    return row


def _name_unread(path, columns):
    if unread := [name for name in columns if name not in READ]:
        note(f"{path}: columns that are never read: {', '.join(unread)}")


def _bytes(path):
    """The file's bytes, decompressed if it is gzipped (its first two bytes show this, not its name)."""
    try:
        content = read_regular(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if content[:2] == b"\x1f\x8b":
        try:
            content = expanded(content)
        except Bomb:
            raise BadInput(f"{path}: the gzip archive holds more than 100 times its own size: no text does; unpack it first") from None
        except (OSError, EOFError, zlib.error) as error:
            raise BadInput(f"{path}: the gzip archive is cut short or damaged ({error}); fetch it again") from None
    return content


class Bomb(Exception):
    """An archive that would fill the memory."""


def expanded(content):
    """The bytes inside a gzip archive. Raises Bomb if there are more than 100 times as many as in the archive."""
    most = 100 * len(content) + 2**20
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as archive:
        inside = archive.read(most + 1)
    if len(inside) > most:
        raise Bomb
    return inside


def _decode(path, content):
    try:
        return content.decode("utf-8-sig")  # a byte-order mark is not part of the text
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None


# A name that ends so is a file, never a hub name.
FILES = (".json", ".jsonl", ".gz", ".txt", ".csv", ".tsv", ".zip", ".zst", ".arrow", ".parquet")


def _fields(pairs):
    """A JSON object as a dict. Raises ValueError if a key stands in it twice, because one of the two values would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return fields


def _records(path):
    """Yield (where, value, fault) for each row: where it is ('path:line'), its JSON value, and an error message if there is no value."""
    name, _, split = (str(path), "", "") if os.path.exists(path) else str(path).partition(":")
    hub = not os.path.exists(name) and HUB_NAME.fullmatch(name) and not name.endswith(FILES)
    if os.path.isdir(name) or hub or os.path.isfile(name) and Path(name).open("rb").read(4) == b"PAR1":  # parquet, whatever its name
        yield from _hub_records(name, split)
        return
    content = _bytes(path)
    if content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":  # one JSON list of rows
        try:
            rows = json.loads(_decode(path, content), object_pairs_hook=_fields)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number with thousands of digits
            raise BadInput(f"{path}: not valid JSON ({error})") from None
        for number, row in enumerate(rows, start=1):
            yield f"{path}: row {number}", row, None
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", *_parse(line, number)


def _parse(line, number):
    """(the JSON value of a line of bytes, None), or (None, the reason why it has none)."""
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_fields), None
    except (ValueError, RecursionError) as error:
        return None, f"not a line of JSON ({error})"


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")  # owner/name, or owner/name/configuration


def _hub_records(name, split):
    """Read a split of a hub data set, of a folder (in the hub's layout, or of save_to_disk), or a parquet file, with `datasets`."""
    here = os.path.exists(name)
    try:
        import datasets
        from pyarrow import parquet
    except ImportError:
        what = "to read it with the package `datasets`" if here else "no such file; to read it as a hub data set"
        raise BadInput(f"{name}: {what}, first `pip install datasets`") from None
    saved = [mark for mark in ("dataset_dict.json", "state.json") if os.path.exists(os.path.join(name, mark))]  # by save_to_disk
    if split and (os.path.isfile(name) or saved == ["state.json"]):
        raise BadInput(f"{name}:{split}: has no splits; leave out :{split}")
    if os.path.isdir(name) and not saved and glob.has_magic(os.path.abspath(name)):
        raise BadInput(f"{name}: `datasets` reads *, ? and [ in a folder's name as a pattern; rename it, or name one of its .parquet files")
    try:
        if os.path.isfile(name):  # (load_dataset reads the name as a pattern)
            if (total := parquet.read_metadata(name).num_rows) > max(10**6, 10 * os.path.getsize(name)):
                raise ValueError(f"it has {total:,} rows in {os.path.getsize(name):,} bytes, which no text has")
            rows = (row for batch in parquet.ParquetFile(name).iter_batches(1000) for row in batch.to_pylist())
        elif saved:
            rows = datasets.load_from_disk(name)
            if saved[0] == "dataset_dict.json" and (split or "train") not in rows:
                raise ValueError(f"it has the splits {', '.join(rows)}")
            rows = rows[split or "train"] if saved[0] == "dataset_dict.json" else rows
        elif here:
            stay_inside(name)
            rows = datasets.load_dataset(name, split=split or "train")
        else:
            owner_and_name, configuration = "/".join(name.split("/")[:2]), (name.split("/") + [None])[2]
            rows = datasets.load_dataset(owner_and_name, configuration, split=split or "train")
    except Exception as error:  # network, name, access or split: the library's message says which
        what = "`datasets` cannot read it" if here else "no such file, and the hub could not deliver it"
        other = "write it again" if os.path.isfile(name) else f"choose another split with {name}:SPLIT"
        raise BadInput(f"{name}: {what} ({one_line(error)}); {other}") from None
    files = [name] if os.path.isfile(name) else [file for file in Path(name).rglob("*") if file.is_file()] if here else []
    left, rows = max(100 * sum(map(os.path.getsize, files)), MOST_TEXT) if here else math.inf, iter(rows)
    for number in itertools.count(1):
        try:
            row = without_nulls(next(rows))
        except StopIteration:
            return
        except Exception as error:  # of pyarrow, at a damaged page
            raise BadInput(f"{name}: cannot be read ({one_line(error)}); fetch or write it again") from None
        if (left := left - 1000 - sum(map(len, _texts_in(row)))) < 0:  # (1000: about what a row takes beside its text)
            raise BadInput(f"{name}: holds more text than fits into memory, and more than 100 times its own size; name a part of it")
        yield f"{name}: row {number}", row, None


MOST_TEXT = 2**30  # characters that a small file may hold when it is expanded


def stay_inside(folder):
    """Raise ValueError if the folder's README.md names data files outside the folder: `datasets` would read them."""
    readme = Path(folder) / "README.md"
    if (Path(folder) / ".huggingface.yaml").exists():
        raise ValueError("its .huggingface.yaml may name files elsewhere; remove that file")
    if readme.is_file():
        from huggingface_hub import DatasetCard

        for text in _texts_in(DatasetCard.load(readme).data.to_dict().get("configs") or []):
            if os.path.isabs(text) or "://" in text or ".." in Path(text).parts:
                raise ValueError(f"its README.md names {text}, which is not in the folder")


def without_nulls(value):
    """A value from an arrow table without the fields that are null: arrow gives every object the fields of all the others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------- what a row means

BESIDE = {"tools": list, "documents": list, "chat_template_kwargs": dict}  # columns that a chat template reads beside the messages
# Columns that some kind of row uses.
READ = {*BESIDE, "prompt", "completion", "messages", "chosen", "rejected", "label", "question", "answer", "instruction", "input", "output",
        "text", "system", "finished", "chosen_finished", "rejected_finished"}
LOST = (*BESIDE, "system", "history", "functions", "tool_calls", "reasoning_content")  # where one cannot be used, the row is bad


def _check(row, *keys, messages=True):
    for key in keys:
        value = row[key]
        if isinstance(value, list) and messages:
            _check_messages(key, value)
        elif not isinstance(value, str):
            raise BadRow(f"{key!r} must be text{' or a list of {role, content}' * messages}, found {type(value).__name__}")
        _check_characters(key, value)


def _check_characters(key, value):
    if any("\ud800" <= char <= "\udfff" for text in _texts_in(value) for char in text):
        raise BadRow(f"{key!r} contains half of a surrogate pair, which is not a character")


def _texts_in(value):
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(item)


def _check_messages(key, messages):
    if not messages:
        raise BadRow(f"{key!r} is an empty list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"{key!r}: message {number} must be an object with a 'role' that is text")
        body = message.get("content")
        parts = body if isinstance(body, list) else []
        if not (isinstance(body, str) or body is None or parts and all(isinstance(part, dict) and "type" in part for part in parts)):
            raise BadRow(f"{key!r}: the content of message {number} must be text or a list of parts with a 'type', found "
                         f"{type(body).__name__}")
        if body is None and not _more(message):
            raise BadRow(f"{key!r}: message {number} has neither content nor anything else (tool_calls, …)")


def _prompt_of(row, prompt):
    """A prompt that knows its row. Messages get the row's system text in front. A field that the prompt cannot use makes the row bad."""
    chat = isinstance(prompt, list)
    if chat and row.get("system"):
        _check(row, "system", messages=False)
        system = {"role": "system", "content": row["system"]}
        if prompt[0]["role"] == "system" and plain_text_of(prompt[0]) != row["system"]:
            raise BadRow("'system' and the first message are two system messages: keep one of them")
        prompt = prompt if prompt[0]["role"] == "system" else [system, *prompt]
    if lost := [name for name in LOST if row.get(name) and not (chat and name in (*BESIDE, "system"))]:
        raise BadRow(f"the field {lost[0]!r} cannot be used here: " + ("move it into the messages" if chat else "only messages have it"))
    prompt = Chat(prompt) if chat else Text(prompt)
    prompt.where, prompt.columns = row.where, dict(row.columns)
    for key, kind in BESIDE.items() if chat else ():
        try:
            value = json.loads(row[key]) if isinstance(row.get(key), str) and row[key] else row.get(key)  # a table may hold JSON text
        except ValueError:
            raise BadRow(f"{key!r} is text, but not JSON") from None
        if value and (not isinstance(value, kind) or kind is list and not all(isinstance(item, dict) for item in value)):
            raise BadRow(f"{key!r} must be {'an object' if kind is dict else 'a list of objects'}, found {type(value).__name__}")
        _check_characters(key, value)
        if key in row:
            prompt.columns[key] = value or None
    return prompt


def _answer(value, finished=None):
    """A completion: text, or the one assistant message. The message becomes text if it says nothing but its content."""
    if isinstance(value, str):
        return CutOff(value) if value and finished is False else value
    if len(value) != 1 or value[0]["role"] != "assistant":
        raise BadRow("a completion given as messages must be exactly one message of the assistant")
    return _answer_of(value[0])


def _answer_of(message):
    parts = message.get("content")
    if isinstance(parts, list) and any(not isinstance(part.get("text"), str) for part in parts):
        raise BadRow("the answer has a part without text: only text can be learned")
    return message if _more(message) else plain_text_of(message)


def _more(message):
    """The names of what a message says beside its content: tool calls and reasoning. '' if nothing."""
    return ", ".join(key for key, item in message.items() if key in ("tool_calls", "function_call", *REASONING) and item)


TURN = "\n\nAssistant:"


def _split_conversations(row):
    """The two whole conversations of a row -> their common prompt and the two answers. A prompt of messages may stand beside them."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise BadRow("'chosen' and 'rejected' must both be text or both be messages")
    if isinstance(chosen, list):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)  # two equal conversations: their last messages are the answers
        prompt, given = chosen[:shared], row.get("prompt")
        if isinstance(given, list):  # it may hold a system message that the conversations leave out
            begin = next((i for i in range(len(given)) if given[i:] == prompt[: len(given) - i]), None)
            without = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt  # or the conversations hold one that it leaves out
            if begin is None and given != without[: len(given)]:
                raise BadRow("the messages of 'prompt' are not those that 'chosen' and 'rejected' begin with")
            prompt = given[: begin or 0] + prompt
        if not shared:
            raise BadRow("'chosen' and 'rejected' share no message that could be the prompt")
        return prompt, _answer(chosen[shared:]), _answer(rejected[shared:])
    # Some transcripts continue for several turns after they differ. The prompt ends at the last turn that both share.
    cut = os.path.commonprefix([chosen, rejected]).rfind(TURN)
    if cut < 0:
        raise BadRow(f"'chosen' and 'rejected' share no {TURN.strip()!r} turn; put the prompt into its own field 'prompt'")
    cut += len(TURN)  # the space after it belongs to the answers: tokenizers write it with the next word
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _pair(row):
    if {"chosen", "rejected"} <= row.keys():
        _check(row, "chosen", "rejected", *(["prompt"] if "prompt" in row else []))
        whole = all(isinstance(row[key], list) and len(row[key]) > 1 for key in ("chosen", "rejected"))  # they include the prompt
        if "prompt" in row and not whole:
            answers = [_answer(row[side], row.get(f"{side}_finished")) for side in ("chosen", "rejected")]
            return Pair(_prompt_of(row, row["prompt"]), *answers)
        if isinstance(row.get("instruction"), str) and isinstance(row["chosen"], str):
            return Pair(_prompt_of(row, _alpaca(row)), _answer(row["chosen"]), _answer(row["rejected"]))
        prompt, chosen, rejected = _split_conversations(row)
        return Pair(_prompt_of(row, prompt), chosen, rejected)
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
        return [Feedback(_prompt_of(row, row["prompt"]), _answer(row["completion"], row.get("finished")), row["label"])]
    raise BadRow(f"found the keys {sorted(row)}, expected prompt + completion + label, or chosen + rejected with or without prompt")


DEMO_KEYS = "prompt + completion, messages, chosen + rejected, question + answer, or instruction + output"


def _alpaca(row):
    _check(row, "instruction", *(["input"] if row.get("input") else []), messages=False)
    given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
    return f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n"


def _good_demo(row, other_keys=""):
    if row.get("label", True) is not True:
        raise BadRow(f"'label' is {row['label']!r:.40}: only an answer labelled true is a demonstration (kto learns from both)")
    return _demo(row, other_keys)


def _demo(row, other_keys=""):
    if {"prompt", "completion"} <= row.keys():
        _check(row, "prompt", "completion")
        return Demo(_prompt_of(row, row["prompt"]), _answer(row["completion"], row.get("finished")))
    if "messages" in row:
        _check(row, "messages")
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise BadRow("'messages' must be a list of at least two messages, the last from the assistant")
        return Demo(_prompt_of(row, messages[:-1]), _answer_of(messages[-1]))
    if {"chosen", "rejected"} <= row.keys():
        pair = _pair(row)
        return Demo(pair.prompt, pair.chosen)
    if {"question", "answer"} <= row.keys():
        _check(row, "question", "answer", messages=False)
        return Demo(_prompt_of(row, f"Question: {row['question']}\nAnswer:"), f" {row['answer']}")
    if {"instruction", "output"} <= row.keys():
        _check(row, "output", messages=False)
        return Demo(_prompt_of(row, _alpaca(row)), row["output"])
    raise BadRow(f"found the keys {sorted(row)}, expected {other_keys}{DEMO_KEYS}")


def _prompt(row):
    """The prompt that the row has as a demonstration or preference, so that it is the same for every method. Else its field `prompt`."""
    forms = ({"messages"}, {"chosen", "rejected"}, {"question", "answer"}, {"instruction", "output"})
    if "messages" in row and "completion" not in row and isinstance(row["messages"], list):
        _check(row, "messages")
        if row["messages"][-1]["role"] != "assistant":
            return _prompt_of(row, row["messages"])
    if "prompt" not in row or "completion" not in row and any(form <= row.keys() for form in forms):
        return _demo(row, "prompt, ").prompt
    _check(row, "prompt")
    return _prompt_of(row, row["prompt"])


def _texts(row):
    if "text" in row:
        _check(row, "text", messages=False)
        return [row["text"]]
    if {"chosen", "rejected"} <= row.keys():
        pair = _pair(row)
        return [document(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
    return [_good_demo(row, "text, ").document()]


def document(prompt, answer):
    """Prompt and answer as one text, or as one conversation (which a chat template renders)."""
    if isinstance(prompt, str) and isinstance(answer, dict):
        raise BadInput(f"the answer has {_more(answer)}, but the prompt is text: only messages go through a chat template")
    if isinstance(prompt, str):
        return type(answer)(prompt + answer)
    whole = Chat([*prompt, answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}])
    whole.where, whole.columns = getattr(prompt, "where", ""), getattr(prompt, "columns", {})
    return whole


def plain_text(value):
    """A prompt or an answer as text, for rewards and for people. Messages become a transcript; an answer's message its content."""
    return value if isinstance(value, str) else plain_text_of(value) if isinstance(value, dict) else render_chat(None, value)


# ------------------------------------------------------------------------------------------------------- text -> token ids


def encode_prompt(tokenizer, prompt, *, max_prompt=None):
    """Token ids of a prompt, never empty: those that transformers gives for the text, or for the messages with their chat template.

    A tokenizer that has BOS puts it in front of text; a template writes it itself. A prompt longer than max_prompt keeps BOS and its end,
    where the question is. Raises BadInput if template or tokenizer fail, or if the transcript of messages cannot hold what they say.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(prompt, list) and template is None:
        more = [name for name in BESIDE if getattr(prompt, "columns", {}).get(name)] + [_more(message) for message in prompt]
        if any(more):
            raise BadInput(f"the prompt has {next(filter(None, more))}, which only a chat template can write, and the tokenizer has none: "
                           "remove it from the row")
    text = prompt if isinstance(prompt, str) else render_chat(tokenizer, prompt)
    ids = tokenizer.encode(text) if isinstance(prompt, list) and template is not None else in_front(tokenizer) + tokenizer.encode(text)
    return cut_prompt(tokenizer, ids, max_prompt) or [tokenizer.eos_id]


def in_front(tokenizer):
    """The ids that stand in front of every text: BOS, if the tokenizer has it."""
    return list(getattr(tokenizer, "front", [tokenizer.bos_id] if tokenizer.bos_id is not None else []))


def cut_prompt(tokenizer, ids, max_prompt):
    """The ids cut to max_prompt: BOS, if it is in front, and the end."""
    if max_prompt is None or len(ids) <= max_prompt:
        return ids
    bos = in_front(tokenizer)
    bos = bos if bos and ids[: len(bos)] == bos and len(bos) < max_prompt or bos == ids[:max_prompt] else []
    return bos + ids[len(ids) - (max_prompt - len(bos)) :]


def encode_completion(tokenizer, completion):
    """Token ids of a completion plus EOS. Completions get EOS only here. (Text that spells out the EOS token is encoded as that token.)

    No space is put between prompt and completion, not even by tokenizers that put one in front of every text.
    """
    return getattr(tokenizer, "encode_after", tokenizer.encode)(completion) + [tokenizer.eos_id]


def encode_answers(tokenizer, prompt, *answers):
    """(prompt ids, completion ids of each answer) of one row. Prompt and answers are encoded apart, so neither changes the other's tokens.

    Answers are text as a policy would sample it (written_answer makes it of a row's answer). If the tokenizer joins a space with the next
    word (joins_spaces), spaces at the end of the prompt move to the answers, unless an answer begins with its own. Without a chat template
    an answer to messages gets a space in front, after "Assistant:". Raises BadInput as encode_prompt does.
    """
    spaces = ""
    if isinstance(prompt, list) and getattr(tokenizer, "chat_template", None) is None and prompt[-1]["role"] != "assistant":
        spaces = " "
    if isinstance(prompt, str) and getattr(tokenizer, "joins_spaces", False):
        spaces, prompt = prompt[len(prompt.rstrip(" ")) :], prompt.rstrip(" ")
    answers = [spaces + answer if answer and answer[0] != " " else answer for answer in answers]
    return encode_prompt(tokenizer, prompt), *[encode_completion(tokenizer, answer) for answer in answers]


def encode_whole(tokenizer, prompt, *answers):
    """encode_answers for a classifier that was not trained here: it reads a conversation as its chat template writes it, to the end, as in
    TRL. Of such a conversation the first id stands for the prompt. Text, and messages without a template, are encoded as always."""
    if isinstance(prompt, str) or tokenizer.chat_template is None:
        return encode_answers(tokenizer, prompt, *answers)
    whole = [tokenizer.encode(render_chat(tokenizer, document(prompt, answer), answered=True)) for answer in answers]
    return whole[0][:1], *[ids[1:] for ids in whole]


def written_answer(tokenizer, prompt, answer):
    """The text of a row's answer as the chat template writes it behind the prompt, without EOS at its end; without a template the answer.

    It holds all that the template puts between the two: a space in front (Llama 2, Mistral), an empty <think> (Qwen3), and the assistant's
    header if the template writes no generation prompt. TRL trains on the same text. None if the template does not write the conversation
    up to the answer as it writes the prompt alone. Raises BadInput if an answer of more than text (tool_calls) would lose a part of it.
    """
    has_more = isinstance(answer, dict)
    if getattr(tokenizer, "chat_template", None) is None:
        if has_more:
            raise BadInput(f"the answer has {_more(answer)}, which only a chat template can write, and the tokenizer has none: remove it "
                           "from the message")
        return answer
    if not has_more and (isinstance(prompt, str) or prompt[-1]["role"] == "assistant"):
        return answer
    text = render_chat(tokenizer, document(prompt, answer), answered=True)
    before = render_chat(tokenizer, prompt)
    for name in _more(answer).split(", ") if has_more else ():
        same = REASONING if name in REASONING else (name,)
        less = {key: value for key, value in answer.items() if key not in same}
        if text == render_chat(tokenizer, document(prompt, less), answered=True):
            raise BadInput(f"the chat template writes nothing of the answer's {name}: remove it from the message")
    if not text.startswith(before):
        if has_more:
            raise BadInput("the chat template does not write the conversation up to the answer as it writes the prompt alone")
        return None
    if isinstance(answer, CutOff) and answer in text[len(before) :]:
        return text[len(before) : text.rindex(answer) + len(answer)]  # without the end of the turn
    text, ends = text[len(before) :], filter(None, map(tokenizer.inner.id_to_token, tokenizer.eos_ids))
    return next((text.rstrip().removesuffix(end) for end in ends if text.rstrip().endswith(end)), text)


def _encode_row(tokenizer, row, answers, max_prompt, whole=False):
    """(token ids of prompt and answers, what happened to them: a list of keys of HAPPENED). Raises BadInput as encode_answers does."""
    prompt = row if isinstance(row, (str, list)) else row.prompt
    written = [answer if whole else written_answer(tokenizer, prompt, answer) for answer in answers]
    other = None in written
    ids, happened = (encode_whole if whole else encode_answers)(tokenizer, prompt, *(answers if other else written)), ["apart"] * other
    if max_prompt is not None and len(ids[0]) > max_prompt:
        ids, happened = (cut_prompt(tokenizer, ids[0], max_prompt), *ids[1:]), [*happened, "cut"]
    stops = [isinstance(answer, CutOff) and not whole for answer in answers]
    ids = ids[0], *[own[:-1] if stop else own for own, stop in zip(ids[1:], stops, strict=True)]
    return ids, [*happened, "stopped"] if any(stops) else happened


HAPPENED = {
    "apart": "answers stand right behind their prompt: the chat template writes another text before an answer than at the end of a prompt "
             "(<think>, for example)",
    "stopped": "rows have an answer that was cut off when it was sampled (finished: false): no EOS follows it",
    "cut": "prompts are cut to --max_prompt {}: they lose their beginning",
}


def _say(happened, total, max_prompt):
    for name, sentence in HAPPENED.items():
        if happened[name]:
            note(f"{happened[name]:,} of {total:,} {sentence.format(max_prompt)}")


def _encode(tokenizer, rows, answers_of, max_prompt, skip_bad, whole=False):
    """Encode each row with encode_answers. Rows that template or tokenizer refuse are named by path:line or, with skip_bad, counted and
    removed from `rows` too. Prompts cut to max_prompt are counted, and so are answers without EOS or behind another prompt."""
    encoded, kept, bad, happened = [], [], [], Counter()
    for row in rows:
        try:
            ids, own = _encode_row(tokenizer, row, answers_of(row), max_prompt, whole)
        except BadInput as error:
            bad.append(f"{getattr(getattr(row, 'prompt', row), 'where', '') or 'a row'}: {error}")
            if not skip_bad:
                raise BadInput(f"{bad[0]}; fix the row, or skip such rows with --skip_bad") from None
            continue
        encoded.append(ids)
        kept.append(row)
        happened.update(own)
    if bad:
        rows[:] = kept
        note(f"{len(bad)} bad rows skipped of {len(bad) + len(kept)}; the first: {bad[0]}")
    if bad and not kept:
        raise BadInput(f"no usable rows; the first: {bad[0]}")
    _say(happened, len(kept), max_prompt)
    return encoded


def encode_demos(tokenizer, demos, *, max_prompt=None, skip_bad=False):
    """[(prompt ids, completion ids)]."""
    return _encode(tokenizer, demos, lambda row: [row.completion], max_prompt, skip_bad)


def encode_feedback(tokenizer, feedback, *, max_prompt=None, skip_bad=False):
    """[(prompt ids, completion ids, desirable)]."""
    encoded = encode_demos(tokenizer, feedback, max_prompt=max_prompt, skip_bad=skip_bad)
    return [(*ids, row.desirable) for ids, row in zip(encoded, feedback, strict=True)]


def encode_pairs(tokenizer, pairs, *, max_prompt=None, skip_bad=False, whole=False):
    """[(prompt ids, chosen ids, rejected ids)]. whole: as encode_whole."""
    return _encode(tokenizer, pairs, lambda row: [row.chosen, row.rejected], max_prompt, skip_bad, whole)


def encode_prompts(tokenizer, prompts, *, max_prompt=None, skip_bad=False):
    """[(prompt ids, prompt as it is in the file)]. The policy uses the ids, the reward uses the prompt."""
    encoded = _encode(tokenizer, prompts, lambda row: [], max_prompt, skip_bad)
    return [(ids[0], prompt) for ids, prompt in zip(encoded, prompts, strict=True)]


def encode_texts(tokenizer, texts, *, max_len):
    """Documents as rows of at most max_len tokens: [(one context token, the tokens that follow)]. Every token of a document is scored.

    BOS (EOS if there is no BOS) is put before each document and EOS after it, unless a chat template begins or ends the text with that
    token, or the text is CutOff. A row continues where the row before it stopped.
    """
    rows, front = [], encode_prompt(tokenizer, "")
    for text in texts:
        chat = isinstance(text, list)
        try:
            ids = tokenizer.encode(render_chat(tokenizer, text, answered=True) if chat else text)
        except BadInput as error:
            raise BadInput(f"{getattr(text, 'where', '') or 'a document'}: {error}") from None
        ids = ids if chat and ids[:1] == front else front + ids
        ids = ids if chat and ids[-1] == tokenizer.eos_id or isinstance(text, CutOff) else [*ids, tokenizer.eos_id]
        for start in range(0, len(ids) - 1, max_len - 1):
            rows.append((ids[start : start + 1], ids[start + 1 : start + max_len]))
    return rows


class Rows(Sequence):
    """Some rows of a file, in an order, each read when it is asked for. Slices, sums and picks are Rows too.

    read(place) gives a row, or None if it cannot be used: then the next one of these rows takes its place. long: the LongFile, if it is
    one.
    """

    def __init__(self, read, places, long=None):
        self.read, self.places, self.long = read, places, long

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Rows(self.read, self.places[i], self.long)
        i = range(len(self))[i]  # (counts from the end, and raises IndexError)
        for j in itertools.chain(range(i, len(self)), range(i)):
            if (row := self.read(self.places[j])) is not None:
                return row
        raise BadInput("no usable rows")

    @functools.cached_property
    def known(self):
        return [*self[:AT_ONCE]] if self.long else self

    def __add__(self, other):
        """Two selections of the same rows, one after the other."""
        return Rows(self.read, [*self.places, *other.places], self.long)

    def pick(self, places):
        return Rows(self.read, [self.places[i] for i in places], self.long)


def write_rows(rows, parts, folder):
    """Write the token ids of a list of tuples, which are the first `parts` members of each, to an existing folder, 4 bytes each."""
    ends = np.cumsum([0] + [len(ids) for row in rows for ids in row[:parts]])
    np.save(folder / "edges.npy", ends[np.arange(len(rows))[:, None] * parts + np.arange(parts + 1)])  # (rows, parts + 1)
    ids = itertools.chain.from_iterable(ids for row in rows for ids in row[:parts])
    np.save(folder / "ids.npy", np.fromiter(ids, np.int32, ends[-1]))


def read_rows(folder, beside):
    """Rows of what write_rows wrote, which the processes of a machine share. beside: for each row a tuple of what it has beside token ids,
    such as a label or the prompt as it is in the data."""
    edges = np.load(folder / "edges.npy")
    ids = np.load(folder / "ids.npy", mmap_mode="r") if len(edges) else None
    return Rows(lambda i: (*(ids[start:end].tolist() for start, end in itertools.pairwise(edges[i])), *beside[i]), range(len(edges)))


LONG = 100_000  # a JSONL file of more rows is not read at once
AT_ONCE = 2000  # so many of its rows are checked at each step


class LongFile:
    """A JSONL file of a million rows: only the places of its lines are in memory. A row is read, checked and encoded each time that it is
    asked for.

    At each step AT_ONCE further rows are checked (Run.steps calls check): a bad row stops the run when its turn comes, and training starts
    within seconds. With skip_bad the next row takes a bad one's place.
    """

    def __init__(self, path, convert, encode, skip_bad, max_prompt):
        self.path, self.convert, self.encode, self.skip_bad, self.max_prompt = path, convert, encode, skip_bad, max_prompt
        self.starts, self.numbers = line_starts(path)
        self.file, self.guards, self.max_len = open(path, "rb"), [], math.inf
        self.status = os.fstat(self.file.fileno())
        self.checked, self.bad, self.first, self.unscored, self.happened, self.columns = 0, 0, "", 0, Counter(), {}

    def line(self, i):
        """(path:line, value, fault) of row i, as _records gives them."""
        number, now = int(self.numbers[i]), os.fstat(self.file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise BadInput(f"{self.path}: was changed while this run reads it; restore it, and go on with --resume")
        self.file.seek(start := int(self.starts[number]))
        return f"{self.path}:{number + 1}", *_parse(self.file.read(int(self.starts[number + 1]) - start), number + 1)

    def read(self, i, counted=None):
        """The encoded row i. None if it has no scored token or, with skip_bad, is bad."""
        where, value, fault = self.line(i)
        try:
            if fault:
                raise BadRow(fault)
            row = _fields_of(where, value)
            ids, happened = self.encode(self.convert(row))
        except (BadRow, BadInput) as error:
            if not self.skip_bad:
                raise BadInput(f"{where}: {error}; fix the row, or skip such rows with --skip_bad") from None
            if counted:
                self.bad, self.first = self.bad + 1, self.first or f"{where}: {error}"
            return None
        scored = len(ids[0]) < self.max_len
        if counted:
            self.columns |= dict.fromkeys(row)
            self.happened.update(happened)
            self.unscored += not scored
        for guard in self.guards if scored else ():
            try:
                guard(ids)
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from None
        return ids if scored else None

    def check(self):
        """Check AT_ONCE further rows. After the last one, say what was found."""
        total, begin = len(self.numbers), self.checked
        if begin == total:
            return
        self.checked = min(total, begin + AT_ONCE)
        for i in range(begin, self.checked):
            self.read(i, counted=True)
        if self.checked == total:
            self.report()

    def report(self):
        """Say what was found in the rows that have been checked. Run.steps calls this too, if it ends before all of them are."""
        checked, total = self.checked, len(self.numbers)
        if self.bad:
            note(f"{self.path}: {self.bad:,} bad rows of {checked:,}; the next row is read in the place of each; the first: {self.first}")
        if self.unscored:
            note(f"{self.path}: {self.unscored:,} prompts of {checked:,} fill --max_len; the next row is read in the place of each")
        _say(self.happened, checked, self.max_prompt)
        if self.convert is not _prompt:  # rewards may read all columns
            _name_unread(self.path, self.columns)
        if checked < total:
            note(f"{self.path}: the run ended after {checked:,} of {total:,} rows had been checked")


def line_starts(path):
    """(where the lines of a file start, and where the last one ends; the numbers, from 0, of the lines that are not blank)."""
    starts, end = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while part := file.read(2**24):
            starts.append(np.flatnonzero(np.frombuffer(part, np.uint8) == 10) + end + 1)
            end += len(part)
        starts, blank = np.concatenate(starts), []
        starts = starts if starts[-1] == end else np.append(starts, end)
        for number in np.flatnonzero(np.diff(starts) < 16).tolist():  # (a longer blank line is a bad row)
            file.seek(int(starts[number]))
            if not file.read(int(starts[number + 1] - starts[number])).strip():
                blank.append(number)
    return starts, np.delete(np.arange(len(starts) - 1), blank)


def long_rows(path, convert, encode, *, skip_bad, max_prompt):
    """Rows of a JSONL file with more than LONG rows. None for any other: those are read at once.

    convert: Row -> Demo, Pair or prompt. encode: that -> (token ids, what happened), as _encode_row.
    """
    if not os.path.isfile(path) or os.path.getsize(path) <= 2 * LONG:
        return None
    with open(path, "rb") as file:
        if file.read(2**12).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":  # gzipped, parquet, or one JSON list
            return None
    long = LongFile(path, convert, encode, skip_bad, max_prompt)
    total = len(long.numbers)
    if total <= LONG:
        return None
    note(f"{path}: {total:,} rows; each is read when it is needed, and all of them are checked in the first {-(-total // AT_ONCE):,} steps")
    return Rows(long.read, range(total), long)


def long_demos(path, tokenizer, *, max_prompt, skip_bad):
    return long_rows(path, _good_demo, lambda demo: _encode_row(tokenizer, demo, [demo.completion], max_prompt), skip_bad=skip_bad,
                     max_prompt=max_prompt)


def long_pairs(path, tokenizer, *, max_prompt, skip_bad):
    return long_rows(path, _pair, lambda pair: _encode_row(tokenizer, pair, [pair.chosen, pair.rejected], max_prompt), skip_bad=skip_bad,
                     max_prompt=max_prompt)


def long_prompts(path, tokenizer, *, max_prompt, skip_bad):
    def encode(prompt):
        ids, happened = _encode_row(tokenizer, prompt, [], max_prompt)
        return (ids[0], prompt), happened

    return long_rows(path, _prompt, encode, skip_bad=skip_bad, max_prompt=max_prompt)


def demo_batch(rows, picked, *, pad_id, max_len):
    """The picked rows of encode_demos or encode_texts -> Batch."""
    picked = [rows[i] for i in picked]
    return collate([row[0] for row in picked], [row[1] for row in picked], pad_id=pad_id, max_len=max_len)


def pair_batch(rows, picked, *, pad_id, max_len):
    """The picked rows of encode_pairs -> Pairs."""
    prompts, *answers = zip(*[rows[i][:3] for i in picked], strict=True)
    return Pairs(*[collate(prompts, side, pad_id=pad_id, max_len=max_len) for side in answers])


def answers_of(row):
    """The token ids of an encoded row's answers, without the label that a row of feedback has beside them."""
    return [part for part in row[1:] if not isinstance(part, bool)]


def counts(rows, max_len):
    """{'rows', 'scored_tokens', 'truncated'} of encoded rows cut at max_len. A truncated completion has lost its end."""
    numbers = {"rows": len(rows), "scored_tokens": 0, "truncated": 0}
    for row in rows:
        for completion in answers_of(row):
            scored = min(len(completion), max(0, max_len - len(row[0])))
            numbers["scored_tokens"] += scored
            numbers["truncated"] += scored < len(completion)
    return numbers


def split_held_out(rows, share):
    """(training rows, held-out rows). The last `share` of the rows, in file order, is held out and never trained on."""
    kept = len(rows) - int(len(rows) * share)
    return rows[:kept], rows[kept:]


def known(rows):
    """The rows themselves; of a LongFile the first AT_ONCE of them, as a list."""
    return rows.known if isinstance(rows, Rows) else rows


def pick(rows, places):
    """The rows at these places."""
    return rows.pick(places) if isinstance(rows, Rows) and not rows.long else [rows[i] for i in places]


def scorable(rows, max_len):
    """The encoded rows whose prompt leaves room under max_len for at least one scored token. Prints how many rows are left out. Of a
    LongFile none is left out: when one of these is asked for, the next row is read."""
    if isinstance(rows, Rows) and rows.long:
        rows.long.max_len = max_len
        return rows
    kept = pick(rows, [i for i, row in enumerate(rows) if len(row[0]) < max_len])
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
