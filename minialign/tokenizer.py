"""Text <-> token ids: a character tokenizer, any tokenizer.json through `tokenizers`, byte-level BPE training, chat templates.

Tokenizer and CharTokenizer have .encode(str) -> list[int], .decode(ids) -> str, .eos_id, .pad_id, .bos_id, .vocab_size and .save(folder).
`encode` adds no special token: only data.py prepends BOS and appends EOS. `decode` leaves special tokens out.
"""

import json
import re
from pathlib import Path

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, pre_tokenizers, trainers

from minialign.engine.common import BadInput, find_folder, read_json, write_atomic

END = "<|endoftext|>"  # the special token of the tokenizers made here, used as BOS, EOS and padding
MAX_TEMPLATE = 200_000  # most characters in a chat template, and most that it may render per message


class Tokenizer:
    """A tokenizer.json, read by `tokenizers`, with the special tokens and the chat template from tokenizer_config.json.

    bos_id is None unless the folder says that prompts begin with BOS. pad_id falls back to eos_id: masks come from lengths, not from ids.
    """

    def __init__(self, inner, settings):
        self.inner, self.settings = inner, settings
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids may have gaps
        self.eos_id = self._special("eos_token")
        if self.eos_id is None:
            raise BadInput("tokenizer_config.json names no eos_token: without one a policy cannot learn to stop; add it")
        pad_id = self._special("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.bos_id = self._special("bos_token") if settings.get("add_bos_token", False) else None
        template = settings.get("chat_template")
        if isinstance(template, list):  # several named templates: [{"name": "default", "template": …}, …]
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default", template)
        if template is not None and not isinstance(template, str):
            raise BadInput("tokenizer_config.json: the chat template must be text, or a list with one template named 'default'")
        self.chat_template = template

    def _special(self, name):
        """The id of a special token. tokenizer_config.json names it as a string or as {'content': string}. None if it is not named."""
        token = self.settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        token_id = self.inner.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise BadInput(f"tokenizer_config.json: the {name} {token!r} is not in tokenizer.json's vocabulary")
        return token_id

    def encode(self, text):
        try:
            return self.inner.encode(text, add_special_tokens=False).ids
        except Exception as error:  # `tokenizers` raises bare Exception, e.g. for a character outside a character vocabulary
            unknown = sorted({char for char in text if self.inner.token_to_id(char) is None})
            raise BadInput(f"cannot encode {text[:40]!r}: the vocabulary lacks {unknown[:5]} ({error})") from None

    def decode(self, ids):
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tokenizer_config.json", json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")
        write_atomic(folder / "tokenizer.json", self.inner.to_str(pretty=True))  # written last: if this file exists, both do


def _settings():
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END, "add_bos_token": True}


class CharTokenizer(Tokenizer):
    """One token per character of `text_or_alphabet`, sorted, plus id 0, the end-of-text token, which is also BOS and padding."""

    def __init__(self, text_or_alphabet):
        alphabet = sorted(set(text_or_alphabet))
        vocabulary = {END: 0, **{char: i for i, char in enumerate(alphabet, start=1)}}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<no such token>"))
        inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens([END])
        super().__init__(inner, _settings())


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
    return Tokenizer(inner, _settings())


def load_tokenizer(path_or_hub_name):
    """Load a tokenizer.json from a folder (or hub name). EOS, PAD, BOS and the chat template come from tokenizer_config.json beside it.

    Raises BadInput with the file's name if a file is missing or damaged, or if no EOS is named.
    """
    folder = find_folder(path_or_hub_name)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BadInput(f"{file}: the file is missing; minialign reads fast tokenizers only (transformers: tokenizer.save_pretrained)")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises bare Exception for every kind of damage
        raise BadInput(f"{file}: not a valid tokenizer ({error}); fetch or write it again") from None
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if "eos_token" not in settings and (folder / "config.json").is_file():  # the model's config.json may have the id
        eos_id = read_json(folder / "config.json").get("eos_token_id")
        eos_id = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id
        settings = settings | {"eos_token": inner.id_to_token(eos_id) if isinstance(eos_id, int) else None}
    if "add_bos_token" not in settings:  # Llama 3 says only in tokenizer.json's post-processor that prompts begin with BOS
        ids = inner.encode("a").ids
        bos = settings.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        settings = settings | {"add_bos_token": bool(ids) and isinstance(bos, str) and ids[0] == inner.token_to_id(bos)}
    template = folder / "chat_template.jinja"
    if template.is_file():
        try:
            settings = settings | {"chat_template": template.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise BadInput(f"{template}: not UTF-8 text ({error})") from None
    return Tokenizer(inner, settings)


# ---------------------------------------------------------------------------------------------------------------- templates


def plain_chat(messages):
    """Messages as an Anthropic-HH transcript that ends with the assistant's turn. Used if a tokenizer has no chat template."""
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    lines = [f"\n\n{names.get(message['role'], message['role'])}: {message['content']}" for message in messages]
    return "".join(lines) + "\n\nAssistant: "


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox that also refuses powers and large products: 'x' * 10**9 would take gigabytes before anything is rendered."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator, left, right):
        sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > MAX_TEMPLATE:
            raise TemplateError(f"{operator}: powers and large products are refused")
        return super().call_binop(context, operator, left, right)


def render_chat(tokenizer, messages):
    """Render a list of {role, content} as the prompt text with the tokenizer's chat template.

    A template is others' code. It runs in jinja2's immutable sandbox, where it cannot read attributes that start with an underscore or
    change its inputs. Raises BadInput if the template fails or breaks the rules of the sandbox.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return plain_chat(messages)
    if len(template) > MAX_TEMPLATE:
        raise BadInput(f"the chat template has {len(template)} characters: at most {MAX_TEMPLATE} are allowed")

    def raise_exception(message):
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])  # as transformers sets it up
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokenizer.settings.items()}
    tokens = {name: value for name, value in tokens.items() if re.fullmatch(r"\w+_token", name) and isinstance(value, str)}
    try:
        rendered, limit = "", MAX_TEMPLATE * (1 + len(messages))
        for piece in environment.from_string(template).generate(messages=messages, add_generation_prompt=True, **tokens):
            rendered += piece
            if len(rendered) > limit:
                raise TemplateError(f"it renders more than {limit} characters")
    except Exception as error:  # a template may raise anything, even ZeroDivisionError or MemoryError
        raise BadInput(f"the chat template failed ({type(error).__name__}: {error})") from None
    return rendered
