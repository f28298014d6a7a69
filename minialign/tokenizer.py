"""Text <-> token ids: a character tokenizer, any tokenizer.json through `tokenizers`, byte-level BPE training, chat templates.

Tokenizer and CharTokenizer have .encode(str) -> list[int], .decode(ids) -> str, .eos_id, .eos_ids, .pad_id, .bos_id, .vocab_size and
.save(folder). `encode` adds no special token: only data.py and chat templates put BOS in front and append EOS. A folder is read as
transformers reads it.

Checked by tests/test_tokenizer.py and tests/test_world.py, against transformers.
"""

import datetime
import functools
import json
import math
import re
from pathlib import Path

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minialign.engine.common import BadInput, find_folder, one_line, read_json, write_atomic
from minialign.engine.safety import Overtime, memory_limit, time_limit

END = "<|endoftext|>"  # the special token of the tokenizers made here, used as BOS, EOS and padding
MAX_TEMPLATE = 200_000  # most characters in a chat template, and most that it may render per message
TEMPLATE_SECONDS, TEMPLATE_BYTES = 5, 2**29  # the most that rendering one conversation may take


class Foreign(Exception):
    """What the library `tokenizers` refuses. It raises bare Exception for it."""


def guarded(call):
    """call(), which uses the library `tokenizers`. Raises Foreign for what it refuses, BadInput if it fails inside (a panic)."""
    try:
        return call()
    except Exception as error:
        raise Foreign(one_line(error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"tokenizer.json: the library tokenizers fails on it ({one_line(error)}); fetch or write it again") from None


class Tokenizer:
    """A tokenizer.json, read by `tokenizers`, with the special tokens and the chat template from tokenizer_config.json.

    bos_id is the token that tokenizer.json's post-processor puts in front of a text, None if it puts none there. eos_id ends a completion
    in training. eos_ids are all tokens that end one in sampling: eos_id, and those in `stops`. pad_id falls back to eos_id: masks come from
    lengths, not from ids.
    """

    def __init__(self, inner, settings, stops=()):
        if inner.padding and settings.get("pad_token") is None and inner.token_to_id(inner.padding["pad_token"]) is not None:
            settings = settings | {"pad_token": inner.padding["pad_token"]}
        inner.no_truncation()  # transformers stores what its last call asked for; it is no property of the tokenizer
        inner.no_padding()
        if isinstance(inner.model, models.BPE):
            inner.model.dropout = None  # it would give a text other ids at every call
        self.inner, self.settings = inner, settings
        self.limit = math.inf  # ids from here on have no embedding in the model (weights.fit_vocabulary sets it)
        ids = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1  # ids may have gaps
        if len({*ids.values()}) < len(ids):
            raise BadInput("tokenizer.json gives two tokens one id; fetch or write it again")
        self.eos_id = self._special("eos_token")
        if self.eos_id is None:
            raise BadInput("tokenizer_config.json names no eos_token: without one a policy cannot learn to stop; add it")
        self.eos_ids = tuple(dict.fromkeys([self.eos_id, *stops]))
        self._special("bos_token")  # raises BadInput if it is not in the vocabulary
        pad_id = self._special("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        # Any text that it can encode shows what is put in front: a character tokenizer may lack "a".
        self.lead = next(filter(None, map(self._encoded, ("a", *sorted(inner.get_vocab(with_added_tokens=False))[:500]))), None)
        processed = guarded(lambda: inner.post_process(self.lead)) if self.lead else None
        self.front = processed.ids[: processed.special_tokens_mask.index(0)] if processed else []  # what stands in front of every text
        self.bos_id = self.front[0] if self.front else None
        self.spaced = bool(self.lead) and self.lead.tokens[0][0] in "▁Ġ"  # a space is put in front of every text, as in Llama 2
        # Some decoders drop the first space of what they are given. They are given other text in front.
        lead = self.lead.ids if self.lead else []
        alone, twice = [guarded(lambda n=n: inner.decode(lead * n, skip_special_tokens=False)) for n in (1, 2)]
        self.before = self.lead.ids if twice != alone * 2 else []
        self.chat_template = settings.get("chat_template")  # text, or [{"name", "template"}] if there are several, or None
        self.joins_spaces = any(re.match("[▁Ġ].", token) for token in inner.get_vocab())  # a word's token includes the space before it

    def _encoded(self, text):
        try:
            encoding = guarded(lambda: self.inner.encode(text, add_special_tokens=False))
        except Foreign:  # here for a character outside a character vocabulary
            return None
        return encoding if encoding.ids else None

    def _special(self, name):
        """The id of a special token. tokenizer_config.json names it as a string or as {'content': string}. None if it is not named."""
        token = content(self.settings.get(name))
        if token is None:
            return None
        token_id = self.inner.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise BadInput(f"tokenizer_config.json: the {name} {token!r} is not in tokenizer.json's vocabulary")
        return token_id

    def encode(self, text):
        try:
            ids = guarded(lambda: self.inner.encode(text, add_special_tokens=False)).ids
        except Foreign as error:  # e.g. for a character outside a character vocabulary
            unknown = sorted({char for char in text if "\ud800" <= char <= "\udfff" or self.inner.token_to_id(char) is None})
            raise BadInput(f"cannot encode {text[:40]!r}: the vocabulary lacks {unknown[:5]} ({error})") from None
        if max(ids, default=0) >= self.limit:
            token = f"{self.inner.id_to_token(max(ids))!r} (id {max(ids)})"
            raise BadInput(f"the token {token} in {text[:40]!r} has no embedding: the model has only {self.limit} rows")
        return ids

    def encode_after(self, text):
        """The ids of a text that continues another one: no space is put in front of it."""
        for before in ("\n", "=", "a") if self.spaced and text else ():  # one of these does not merge with the beginning of the text
            alone, both = self.encode(before), self.encode(before + text)
            if both[: len(alone)] == alone:
                return both[len(alone) :]
        return self.encode(text)

    def decode(self, ids):
        """The text of ids that continue other text. A space in front and special tokens are kept; only EOS at the end is left out."""
        ids = list(ids)
        ids = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        before, whole = [self.inner.decode(self.before + more, skip_special_tokens=False) for more in ([], ids)]
        return whole[len(before) :]

    def decode_prompt(self, ids):
        """A prompt as text for people to read. BOS in front is left out; all other special tokens are shown."""
        ids = ids[1:] if ids[0] == self.bos_id else ids
        text = self.decode([*ids, self.eos_id])  # decode leaves out this EOS and keeps the prompt's own
        return text.removeprefix(" ") if self.spaced else text

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tokenizer_config.json", json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")
        write_atomic(folder / "tokenizer.json", self.inner.to_str(pretty=True))  # written last: if this file exists, both do


def content(token):
    """The text of a special token, which tokenizer_config.json holds as text or as {'content': text}."""
    return token.get("content") if isinstance(token, dict) else token


def _own(inner):
    """A tokenizer made here: END in front of every text, as transformers will put it there too."""
    inner.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, inner.token_to_id(END))])
    return inner


def _settings():
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END}


class CharTokenizer(Tokenizer):
    """One token per character of `text_or_alphabet`, sorted, plus id 0, the end-of-text token, which is also BOS and padding."""

    def __init__(self, text_or_alphabet):
        alphabet = sorted(set(text_or_alphabet))
        vocabulary = {END: 0, **{char: i for i, char in enumerate(alphabet, start=1)}}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<no such token>"))
        inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens([END])
        super().__init__(_own(inner), _settings())


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE tokenizer with `vocab_size` ids on an iterable of strings. It encodes any text. Used by `--policy new`."""
    if vocab_size < 257:
        raise BadInput(f"a byte-level vocabulary needs 256 bytes and the end token: --vocab {vocab_size} is below 257")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return Tokenizer(_own(inner), _settings())


# What a class of transformers assumes if tokenizer_config.json does not name the token: (BOS, EOS, padding).
CLASS_TOKENS = {"GPT2Tokenizer": (END, END, None), "GPTNeoXTokenizer": (END, END, "<|padding|>"), "Qwen2Tokenizer": (None, END, END),
                "LlamaTokenizer": ("<s>", "</s>", None)}


def load_tokenizer(path_or_hub_name, *, model_folder=None):
    """Load the tokenizer.json of a folder (or hub name) as transformers reads it: special tokens, chat templates, BOS in front of a text.

    The tokens that end a completion are those of generation_config.json or config.json, in model_folder if it is given, and eos_token.
    Raises BadInput with the file's name if a file is missing or damaged, or if no EOS is named.
    """
    folder = find_folder(path_or_hub_name)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BadInput(f"{file}: the file is missing; minialign reads fast tokenizers only (transformers: tokenizer.save_pretrained)")
    try:
        inner = guarded(lambda: tokenizers.Tokenizer.from_file(str(file)))
    except Foreign as error:
        raise BadInput(f"{file}: not a valid tokenizer ({error}); fetch or write it again") from None

    def optional(name, folder=folder):
        return read_json(folder / name) if (folder / name).is_file() else {}

    settings, model_config = optional("tokenizer_config.json"), optional("config.json", model_folder or folder)
    if "added_tokens_decoder" not in settings:  # older folders name special tokens in a file of their own
        settings = settings | optional("special_tokens_map.json")
    if inner.post_processor is None and settings.get("add_bos_token") and settings.get("bos_token") == settings.get("pad_token") == END:
        _own(inner)  # made here by a version that exported no post-processor, and trained with END in front
    kind = class_of(settings, model_config)
    for name, token in zip(("bos_token", "eos_token", "pad_token"), CLASS_TOKENS.get(kind, ()), strict=False):
        if token is not None and name not in settings and inner.token_to_id(token) is not None:
            settings = settings | {name: token}
    as_class(inner, kind, settings)
    try:
        json.dumps(settings, ensure_ascii=False).encode()  # (half a surrogate pair cannot be written again)
        add_named_tokens(inner, settings, optional("added_tokens.json"))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadInput(f"{folder}: the tokens that tokenizer_config.json or added_tokens.json add have a wrong form "
                       f"({one_line(error)})") from None
    inner.encode_special_tokens = settings.get("split_special_tokens") is True

    generation = (model_folder or folder) / "generation_config.json"
    stops = (read_json(generation) if generation.is_file() else model_config).get("eos_token_id")
    stops = [stop for stop in (stops if isinstance(stops, list) else [stops]) if type(stop) is int and 0 <= stop < 2**31]
    if settings.get("eos_token") is None and stops:
        settings = settings | {"eos_token": inner.id_to_token(stops[0])}
    try:
        return Tokenizer(inner, settings | chat_templates(folder, settings), stops)
    except Foreign as error:
        raise BadInput(f"{file}: not a valid tokenizer ({error}); fetch or write it again") from None


# How Qwen2's tokenizer cuts text into words: contractions, letters, single digits, signs, line ends, spaces.
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


# Classes that transformers builds in another way than tokenizer.json says, none of them of the six families.
REFUSED = ("AlbertTokenizer", "BartTokenizer", "BertTokenizer", "CodeGenTokenizer", "GemmaTokenizer", "RobertaTokenizer", "T5Tokenizer",
           "XLNetTokenizer")


def class_of(settings, model_config):
    """The class with which transformers 5 reads a folder, '' for the one that takes tokenizer.json as it is."""
    family, named = model_config.get("model_type"), settings.get("tokenizer_class") or model_config.get("tokenizer_class")
    if family in ("mistral", "ministral"):
        return ""
    if family == "qwen2":
        return "Qwen2Tokenizer"
    usual = {"gpt2": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer", "qwen3": "Qwen2Tokenizer"}.get(family, "")
    kind = str(named or usual).removesuffix("Fast")
    if kind in REFUSED:
        raise BadInput(f"tokenizer_class {kind!r} is not implemented; load the folder with transformers and save its tokenizer as a "
                       "PreTrainedTokenizerFast")
    return kind


def add_named_tokens(inner, settings, added):
    """Make every token that is named beside tokenizer.json one token, also inside a text, as transformers does. New ones get new ids.

    added: {token: id} of added_tokens.json. Tokens of added_tokens_decoder come with their flags, which win over tokenizer.json's.
    """
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    entries = settings.get("added_tokens_decoder") or {i: {"content": token, "normalized": True} for token, i in added.items()}
    known = {token.content: token for token in inner.get_added_tokens_decoder().values()}
    for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        token = tokenizers.AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
        if repr(known.get(token.content)) != repr(token):
            inner.add_tokens([token])
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    first = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # the order decides the ids of new tokens
    names = [settings[name] for name in dict.fromkeys([*first, *settings]) if name in settings and name.endswith("_token")]
    names += list(extra.values()) if isinstance(extra, dict) else extra
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    required = [content(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")]  # refused if they are unknown
    names = [name for name in map(content, names) if isinstance(name, str) and name not in known]
    inner.add_special_tokens([name for name in names if name not in required or inner.token_to_id(name) is not None])


def as_class(inner, kind, settings):
    """Replace the parts that transformers 5 builds itself for the class that it takes."""
    pieces, bpe = str(inner.pre_tokenizer), isinstance(inner.model, models.BPE)
    if kind == "LlamaTokenizer" and not bpe:
        raise BadInput(f"tokenizer_class {kind!r} with a model other than BPE is not implemented")
    if kind == "LlamaTokenizer" and "ByteLevel" not in pieces:
        first = "never" if settings.get("add_prefix_space") is False else "always" if settings.get("legacy") else "first"
        inner.normalizer, inner.model.fuse_unk, inner.model.byte_fallback = None, True, True
        inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=first, split=False)
    elif kind in ("GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer") and bpe:
        space = bool(settings.get("add_prefix_space"))
        inner.model.fuse_unk, inner.model.byte_fallback, inner.model.ignore_merges = False, False, False
        inner.decoder = decoders.ByteLevel()
        if kind == "GPTNeoXTokenizer":
            inner.post_processor = None
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
        inner.normalizer = None if kind == "GPT2Tokenizer" else normalizers.NFC()
        if kind == "Qwen2Tokenizer":
            words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), behavior="isolated")
            last = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
            inner.pre_tokenizer = pre_tokenizers.Sequence([words, last])


def chat_templates(folder, settings):
    """{'chat_template': text, or [{'name', 'template'}] if there are several}, or {} if there is none. Files win over the settings."""
    files = {"default": folder / "chat_template.jinja", **{f.stem: f for f in sorted(folder.glob("additional_chat_templates/*.jinja"))}}
    try:
        texts = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    except UnicodeDecodeError as error:
        raise BadInput(f"{folder}: chat_template.jinja or another template is not UTF-8 text ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if texts:
        template = texts["default"] if [*texts] == ["default"] else [{"name": name, "template": texts[name]} for name in texts]
    named = template if isinstance(template, list) else [] if template is None else [{"name": "default", "template": template}]
    if not all(isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template")) for entry in named):
        raise BadInput("tokenizer_config.json: the chat template must be text, or a list of {name, template}")
    return {} if template is None else {"chat_template": template}


# ---------------------------------------------------------------------------------------------------------------- templates


def plain_text_of(message):
    """The text of a message whose content is text, absent, or a list of parts like {'type': 'text', 'text': …}."""
    parts = message.get("content") or ""
    return parts if isinstance(parts, str) else "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def plain_chat(messages):
    """Messages as an Anthropic-HH transcript. If the last one is not the assistant's, it ends where the assistant is to speak."""
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    lines = [f"\n\n{names.get(message['role'], message['role'])}: {plain_text_of(message)}" for message in messages]
    return "".join(lines) + ("" if messages and messages[-1]["role"] == "assistant" else "\n\nAssistant:")


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox that also refuses large powers and products: 'x' * 10**9 would take gigabytes before anything is rendered."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator, left, right):
        numbers = all(isinstance(value, int | float) for value in (left, right))
        sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
        if max(sizes) > 10**9 if numbers and operator == "*" else sizes[0] * sizes[1] > (1000 if operator == "**" else MAX_TEMPLATE):
            raise TemplateError(f"{operator}: large powers and products are refused")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's text in templates of transformers. It renders as what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True)).set_lineno(line)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise TemplateError(message)


@functools.lru_cache(maxsize=8)
def compiled(template):
    """The template in the sandbox, with the filters and functions that transformers gives it. Raises jinja2's errors."""
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    return environment.from_string(template)


def chat_template(tokenizer, tools):
    """The template that renders a conversation, or None: with tools the one named tool_use if there is one, else the default."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, list):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    name = "tool_use" if tools and "tool_use" in named else "default"
    if name not in named:
        raise BadInput(f"the tokenizer has several chat templates ({', '.join(named)}) and none is named default; name one of them so")
    return named[name]


CONTINUED = "HERE-THE-ANSWER-GOES-ON"  # put behind the last message of the assistant, to cut the rendered text there


def marked(body):
    """The content of a message, text or parts, with the mark CONTINUED and a space behind its last text."""
    if isinstance(body, str):
        return body + CONTINUED + " "
    last = max(i for i, part in enumerate(body) if isinstance(part.get("text"), str))
    return [part | {"text": marked(part["text"])} if i == last else part for i, part in enumerate(body)]


def render_chat(tokenizer, messages, *, answered=False):
    """Render a list of {role, content} with the tokenizer's chat template, as the text in front of the assistant's answer.

    If the last message is the assistant's, the text ends inside it, so that the policy continues it. With answered=True the conversation is
    rendered to its end. messages.columns, if it exists (data.Chat), may hold tools, documents and chat_template_kwargs for the template.
    A template is others' code. It runs in jinja2's immutable sandbox, where it cannot read attributes that start with an underscore or
    change its inputs, and may take TEMPLATE_SECONDS and TEMPLATE_BYTES. Raises BadInput if it fails or breaks one of these rules.
    """
    columns = getattr(messages, "columns", {})
    template = chat_template(tokenizer, columns.get("tools"))
    if template is None:
        return plain_chat(messages)
    options = columns.get("chat_template_kwargs") or {}
    if own := {"chat_template", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message"} & options.keys():
        raise BadInput(f"chat_template_kwargs holds {min(own)!r}, which is not an option of the template: remove it")
    if len(template) > MAX_TEMPLATE:
        raise BadInput(f"the chat template has {len(template)} characters: at most {MAX_TEMPLATE} are allowed")

    tokens = {name: content(value) for name, value in tokenizer.settings.items() if re.fullmatch(r"\w+_token", name)}
    variables = {name: value for name, value in tokens.items() if isinstance(value, str)} | options
    messages = [with_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages]
    goes_on, last = not answered and messages[-1]["role"] == "assistant", plain_text_of(messages[-1])
    if goes_on and not last.strip():
        raise BadInput("the last message is the assistant's and has no text that the answer could continue")
    if goes_on:
        messages[-1]["content"] = marked(messages[-1]["content"])
    try:
        rendered, limit = "", MAX_TEMPLATE * (1 + len(messages))
        with time_limit(TEMPLATE_SECONDS), memory_limit(TEMPLATE_BYTES):
            for piece in compiled(template).generate(
                messages=messages, tools=columns.get("tools") or None, documents=columns.get("documents"),
                add_generation_prompt=not answered and not goes_on, **variables,
            ):
                rendered += piece
                if len(rendered) > limit:
                    raise TemplateError(f"it renders more than {limit} characters")
        before, found, after = rendered.rpartition(CONTINUED)
        if goes_on and not (found and last.strip() in before):
            raise TemplateError("it does not render the last message of the assistant, which the answer continues")
    except Overtime:
        raise BadInput(f"the chat template failed: it takes longer than {TEMPLATE_SECONDS} s for one conversation") from None
    except Exception as error:  # a template may raise anything, even ZeroDivisionError or MemoryError
        raise BadInput(f"the chat template failed ({type(error).__name__}: {error})") from None
    if not goes_on:
        return rendered
    return before if after.startswith(" ") else before.rstrip()  # a template that strips the message has taken the mark's space too


REASONING = ("reasoning_content", "thinking", "reasoning")


def with_reasoning(message):
    """A message with its reasoning under the two names that templates read, whichever of the three names it has."""
    found = next((message[name] for name in REASONING if name in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}
