"""Round trips, files that transformers reads to the same ids, special tokens, damage, and chat templates as foreign code."""

import json

import pytest
import tokenizers

from minialign.data import Chat
from minialign.engine.common import BadInput
from minialign.task import builtin_tokenizer
from minialign.tokenizer import END, CharTokenizer, Tokenizer, load_tokenizer, plain_chat, render_chat, train_bpe

hypothesis = pytest.importorskip("hypothesis", reason="the property tests need hypothesis (requirements-dev.txt)")
transformers = pytest.importorskip("transformers", reason="the oracle (requirements-dev.txt)")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

CORPUS = ["the cat sat on the mat\n", "naïve café ☕ 😀 東京", "def f(x):\n\treturn x  # ok\r\n"] * 3
BPE = train_bpe(CORPUS, 300)
CHAR = CharTokenizer("abc xyz.\n\r\té😀")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say <b>hi</b> & 'bye'\n\ttwice 😀"},
    {"role": "assistant", "content": "hi hi"},
    {"role": "user", "content": "  again  "},
]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def edit(folder, name="tokenizer_config.json", **changes):
    """Change keys of a JSON file in place; None removes one."""
    content = json.loads((folder / name).read_text(encoding="utf-8")) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


@pytest.fixture
def bpe_folder(tmp_path):
    BPE.save(tmp_path)
    return tmp_path


# -------------------------------------------------------------------------------------------------------- text and back


@settings(max_examples=300, deadline=None, database=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_bpe_gives_any_text_back(text):
    """Emoji, newlines, NUL, right-to-left marks: byte-level BPE loses nothing, and no id is outside the vocabulary."""
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text.removesuffix(END) and all(0 <= i < BPE.vocab_size for i in ids)


@settings(max_examples=100, deadline=None, database=None)
@given(text=st.text(alphabet="abc xyz.\n\r\té😀", max_size=60))
def test_char_tokenizer_gives_its_alphabet_back(text):
    """One id a character, counted from 1 in sorted order."""
    ids = CHAR.encode(text)
    assert CHAR.decode(ids) == text and ids == [sorted("abc xyz.\n\r\té😀").index(char) + 1 for char in text]


def test_char_tokenizer_by_hand():
    tokenizer = CharTokenizer("banana")
    assert tokenizer.vocab_size == 4 and tokenizer.encode("nab") == [3, 1, 2]
    assert tokenizer.eos_id == tokenizer.pad_id == tokenizer.bos_id == 0
    assert CharTokenizer("abn").encode("nab") == [3, 1, 2]  # a text or its alphabet: the same tokenizer


def test_an_unknown_character_is_named():
    with pytest.raises(BadInput, match=r"cannot encode 'cab z!'.*lacks \[' ', '!', 'z'\]"):
        CharTokenizer("abc").encode("cab z!")


def test_encode_adds_no_special_token_and_decode_drops_only_eos_at_the_end():
    for tokenizer in (CHAR, BPE):
        ids = tokenizer.encode("abc")
        assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == "abc"
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.eos_id]) == f"{END}abc{END}"
        assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_bpe_learns_merges_and_refuses_a_vocabulary_below_the_bytes():
    assert len(BPE.encode("the cat")) < len("the cat") and 257 < BPE.vocab_size <= 300
    assert train_bpe(CORPUS, 257).vocab_size == 257
    with pytest.raises(BadInput, match="--vocab 256 is below 257"):
        train_bpe(CORPUS, 256)


# ------------------------------------------------------------------------------------------------------------------ files


TEXTS = ["", "abc", " abc  x\n\n", "é 😀\r\n\tz", "a" * 200]


@pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])
def test_a_saved_tokenizer_gives_equal_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text
    names = ("eos_id", "pad_id", "bos_id", "vocab_size", "settings")
    assert all(getattr(again, name) == getattr(tokenizer, name) for name in names)
    if tokenizer is CHAR:
        with pytest.raises(BadInput, match="cannot encode 'Q'"):
            again.encode("Q")


@pytest.mark.parametrize("make", [lambda: CHAR, lambda: BPE, builtin_tokenizer], ids=["char", "bpe", "builtin"])
def test_transformers_reads_the_folder_to_equal_ids(make, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the independent oracle (requirements-dev.txt)")
    tokenizer = make()
    tokenizer.save(tmp_path)
    for theirs in (transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("", "a tea", "a\n b") if make is builtin_tokenizer else TEXTS:
            try:
                ids = tokenizer.encode(text)
            except BadInput:
                continue
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids
            assert theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
        assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id)
        assert len(theirs) == tokenizer.vocab_size


def test_vocab_size_counts_gaps_in_the_ids():
    """Ids 0, 1 and 7: a table of 3 rows would not hold the 7."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7, END: 1}, unk_token="a"))
    assert Tokenizer(inner, {"eos_token": END}).vocab_size == 8


# --------------------------------------------------------------------------------------------------------- special tokens


def test_a_special_token_may_be_an_object(bpe_folder):
    edit(bpe_folder, eos_token={"__type": "AddedToken", "content": END, "lstrip": False}, pad_token=None)
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.eos_id == tokenizer.pad_id == 0


def test_pad_falls_back_to_eos(bpe_folder):
    edit(bpe_folder, pad_token=None, eos_token="a")
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.pad_id == tokenizer.eos_id == BPE.inner.token_to_id("a") != 0
    edit(bpe_folder, pad_token="b")
    assert load_tokenizer(bpe_folder).pad_id == BPE.inner.token_to_id("b")
    edit(bpe_folder, pad_token=END)
    assert load_tokenizer(bpe_folder).pad_id == 0  # an id of 0 is an id


@pytest.mark.parametrize("changes", [{}, {"add_bos_token": False}, {"add_bos_token": True}, {"bos_token": "a", "add_bos_token": True}])
@pytest.mark.parametrize("post_processor", [False, True])
def test_bos_stands_where_transformers_puts_it(bpe_folder, post_processor, changes):
    inner = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    if not post_processor:
        state = json.loads(inner.to_str()) | {"post_processor": None}
        (bpe_folder / "tokenizer.json").write_text(json.dumps(state))
        changes = {"bos_token": "b", **changes}
    edit(bpe_folder, **changes)
    tokenizer, theirs = load_tokenizer(bpe_folder), transformers.AutoTokenizer.from_pretrained(bpe_folder)
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert front + tokenizer.encode("a cat") == theirs("a cat").input_ids and bool(front) == post_processor


def test_an_export_of_an_older_version_keeps_bos(bpe_folder):
    """Versions before the post-processor trained with BOS in front and said so with add_bos_token alone, which transformers ignores."""
    state = json.loads((bpe_folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (bpe_folder / "tokenizer.json").write_text(json.dumps(state))
    edit(bpe_folder, add_bos_token=True)
    load_tokenizer(bpe_folder).save(bpe_folder)
    assert transformers.AutoTokenizer.from_pretrained(bpe_folder)("a").input_ids == [0, *BPE.encode("a")]


def test_bos_said_by_the_post_processor_alone(bpe_folder):
    """As llama3's tokenizer.json has it: a template '<bos> $A' and no add_bos_token."""
    inner = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    inner.save(str(bpe_folder / "tokenizer.json"))
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.bos_id == 0 and tokenizer.encode("a") == BPE.encode("a")  # and encode still adds none


def test_no_eos_is_refused(bpe_folder):
    edit(bpe_folder, eos_token=None)
    with pytest.raises(BadInput, match="names no eos_token"):
        load_tokenizer(bpe_folder)
    (bpe_folder / "tokenizer_config.json").unlink()
    with pytest.raises(BadInput, match="names no eos_token"):
        load_tokenizer(bpe_folder)


@pytest.mark.parametrize("eos_token_id", [5, [5, 6]])
def test_the_models_config_may_know_eos(bpe_folder, eos_token_id):
    edit(bpe_folder, eos_token=None)
    (bpe_folder / "config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    assert load_tokenizer(bpe_folder).eos_id == 5


@pytest.mark.parametrize("token", ["<|no such|>", {"content": "<|no such|>"}, 7, ["a"], {"content": 7}])
@pytest.mark.parametrize("name", ["eos_token", "pad_token", "bos_token"])
def test_a_special_token_outside_the_vocabulary_is_refused(bpe_folder, name, token):
    edit(bpe_folder, **{name: token})
    with pytest.raises(BadInput, match=f"the {name} .* is not in tokenizer.json's vocabulary"):
        load_tokenizer(bpe_folder)


# ----------------------------------------------------------------------------------------------------------------- damage


def test_a_missing_tokenizer_json_is_named(tmp_path):
    with pytest.raises(BadInput, match="tokenizer.json: the file is missing; minialign reads fast tokenizers only"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_json_is_refused(bpe_folder):
    """Cut at every sixteenth, emptied, an object that is no tokenizer, a list, not UTF-8: always one sentence naming the file."""
    whole = (bpe_folder / "tokenizer.json").read_bytes()
    damaged = [whole[: len(whole) * i // 16] for i in range(16)] + [b"{}", b"[1]", b"null", whole.replace(b"BPE", b"\xff\xfe")]
    for content in damaged:
        (bpe_folder / "tokenizer.json").write_bytes(content)
        with pytest.raises(BadInput, match="tokenizer.json: not a valid tokenizer"):
            load_tokenizer(bpe_folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff\xfe{}", b"[" * 100_000])
def test_damaged_tokenizer_config_is_refused(bpe_folder, content):
    (bpe_folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(BadInput, match="tokenizer_config.json: (not valid JSON|expected an object)"):
        load_tokenizer(bpe_folder)


@pytest.mark.parametrize("template", [5, True, {"default": 1}, [1], [{}], [{"name": "other"}], [{"name": "a", "template": "x"}]])
def test_a_chat_template_of_the_wrong_type_is_refused(bpe_folder, template):
    edit(bpe_folder, chat_template=template)
    with pytest.raises(BadInput, match="chat template"):
        render_chat(load_tokenizer(bpe_folder), CHAT)


def test_a_chat_template_file_that_is_not_text_is_refused(bpe_folder):
    (bpe_folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ 1 }}")
    with pytest.raises(BadInput, match="chat_template.jinja"):
        load_tokenizer(bpe_folder)


# ------------------------------------------------------------------------------------------------------------- templates


def with_template(template):
    tokenizer = CharTokenizer("ab")
    tokenizer.chat_template = template
    return tokenizer


def test_without_a_template_messages_become_a_transcript():
    expected = "\n\nSystem: Be brief.\n\nHuman: Say <b>hi</b> & 'bye'\n\ttwice 😀\n\nAssistant: hi hi\n\nHuman:   again  \n\nAssistant:"
    assert plain_chat(CHAT) == render_chat(None, CHAT) == render_chat(CharTokenizer("ab"), CHAT) == expected


def test_chatml_by_hand():
    rendered = render_chat(with_template(CHATML), CHAT[:2])
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay <b>hi</b> & 'bye'\n\ttwice 😀<|im_end|>\n<|im_start|>assistant\n"
    )


TEMPLATES = {
    "chatml": CHATML,
    "chatml in lines": """{% for message in messages %}
    {% if message['role'] == 'user' %}
        {{- '<|user|>\n' + message['content'] + eos_token }}
    {%- else %}
{{ message['role'] }}: {{ message.content | trim }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
""",
    "tokens and loop": "{{ bos_token }}{% for m in messages[1:] %}{{ loop.index0 }}{{ m['content'] + pad_token }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ ns.n }}",
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "reversed, tests, methods": "{% for m in messages[::-1] if m.role is string and not m.content.startswith('B') %}{{ m.content.strip() }}"
    "{{ '\n' if not loop.last }}{% endfor %}{% if tools is defined and tools %}tools{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name, bpe_folder):
    """The tokenizer of the same folder, apply_chat_template(tokenize=False, add_generation_prompt=True), character for character."""
    transformers = pytest.importorskip("transformers", reason="transformers is the independent oracle (requirements-dev.txt)")
    (bpe_folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(bpe_folder)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    tokenizer = load_tokenizer(bpe_folder)
    assert expected and render_chat(tokenizer, CHAT) == expected
    assert theirs(expected, add_special_tokens=False)["input_ids"] == tokenizer.encode(expected)


def test_the_template_may_stand_in_the_config_or_in_a_list(bpe_folder):
    edit(bpe_folder, chat_template="config {{ messages|length }}")
    assert render_chat(load_tokenizer(bpe_folder), CHAT) == "config 4"
    edit(bpe_folder, chat_template=[{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}])
    assert render_chat(load_tokenizer(bpe_folder), CHAT) == "plain"
    (bpe_folder / "chat_template.jinja").write_text("file")  # as transformers has it, the file wins
    assert render_chat(load_tokenizer(bpe_folder), CHAT) == "file"


@pytest.mark.parametrize("settings", [
    {"added_tokens_decoder": {"2": {"content": "<2>", "rstrip": True, "special": True}}}, {"split_special_tokens": True},
    {"additional_special_tokens": ["<new>", "<other>"]}, {"extra_special_tokens": {"tool_token": "<new>"}}, {"tool_token": "<new>"},
    {"unk_token": "<new>"}, {"added_tokens_decoder": {"300": {"content": "<new>", "special": False}}},
    {"tokenizer_class": "GPT2Tokenizer"}, {"tokenizer_class": "GPTNeoXTokenizer"}, {"tokenizer_class": "Qwen2Tokenizer"}], ids=str)
@pytest.mark.parametrize("family", [None, "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"])
def test_what_stands_beside_tokenizer_json(bpe_folder, settings, family):
    """Tokens, their flags and the class are named in tokenizer_config.json; the family is named in config.json."""
    edit(bpe_folder, **settings)
    if family:
        (bpe_folder / "config.json").write_text(json.dumps({"model_type": family}))
    if settings.get("split_special_tokens") and family == "qwen2":
        pytest.skip("transformers adds the tokens of Qwen2Tokenizer after this setting")
    ours, theirs = load_tokenizer(bpe_folder), transformers.AutoTokenizer.from_pretrained(bpe_folder)
    for text in ("a <new> cat 1234", f"on{END} the <2> mat", "<other>x <new>"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert ([] if ours.bos_id is None else [ours.bos_id]) + ours.encode(text) == theirs(text).input_ids


@pytest.mark.parametrize("template", ["[{{ messages[-1].content }}]", "[{{ messages[-1].content | trim }}]",
                                      "{{ messages[-1].content[0].text }}."])
@pytest.mark.parametrize("content", ["It is", "It is ", "It is:\n", [{"type": "text", "text": "It is "}], "", None])
def test_an_unfinished_answer_is_continued_as_in_transformers(bpe_folder, template, content):
    """Also where the template strips the message, or the message is made of parts; refused where transformers refuses."""
    edit(bpe_folder, chat_template=template)
    ours, theirs = load_tokenizer(bpe_folder), transformers.AutoTokenizer.from_pretrained(bpe_folder)
    chat = [*CHAT, {"role": "assistant", "content": content, "tool_calls": [{"function": {"name": "w"}}]}]
    try:
        expected = theirs.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    except Exception:
        expected = None
    if expected is None or not content:
        with pytest.raises(BadInput):
            render_chat(ours, chat)
    else:
        assert render_chat(ours, chat) == expected


def test_several_templates_survive_an_export(bpe_folder):
    """The default and one for tools, in files as transformers writes them. After our export transformers finds both."""
    theirs = transformers.AutoTokenizer.from_pretrained(bpe_folder)
    theirs.chat_template = {"default": "{{ messages|length }}", "tool_use": "tools {{ tools|length }}"}
    theirs.save_pretrained(bpe_folder)
    tokenizer = load_tokenizer(bpe_folder)
    tokenizer.save(bpe_folder / "ours")
    again, chat = transformers.AutoTokenizer.from_pretrained(bpe_folder / "ours"), Chat(CHAT)
    for chat.columns in ({}, {"tools": [{"type": "function"}]}):
        text = render_chat(tokenizer, chat)
        assert text == again.apply_chat_template(CHAT, **chat.columns, tokenize=False) == ("tools 1" if chat.columns else "4")


def test_several_templates_of_which_none_is_the_default_are_refused_where_one_is_needed(bpe_folder):
    edit(bpe_folder, chat_template=[{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "t"}])
    tokenizer = load_tokenizer(bpe_folder)  # plain text needs no template
    with pytest.raises(BadInput, match=r"several chat templates \(rag, tool_use\) and none is named default"):
        render_chat(tokenizer, CHAT)


def test_a_template_may_refuse_with_its_own_words():
    with pytest.raises(BadInput, match="the chat template failed .*roles must alternate"):
        render_chat(with_template("{{ raise_exception('roles must alternate') }}"), CHAT)


MALICIOUS = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ raise_exception.__globals__['Path']('MARK').touch() }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (messages|tojson).__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages.pop() }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages[0].pop('content') }}",
    "{% include 'MARK' %}",
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 'x' * 1000001 }}",
    "x" * 200_001,
    "{{ 'x' * 10 ** 18 }}",
    "{{ 1 / 0 }}",
    "{{ 1 % 0 }}",
    "{{ 'a'.encode('no such encoding') }}",
    "{{ messages[9].content }}",
    "{{ nothing.at.all }}",
    "{{ 'a' + 1 }}",
    "{{ messages|no_such_filter }}",
    "{{ unfinished",
    "{% no_such_tag %}",
]


@pytest.mark.parametrize("template", MALICIOUS, ids=lambda t: t[:45])
def test_a_template_that_oversteps_is_refused_and_does_nothing(template, tmp_path):
    """BadInput, the messages as they were, and no file where the template tried to leave one."""
    mark, messages = tmp_path / "mark", json.loads(json.dumps(CHAT))
    with pytest.raises(BadInput, match="chat template"):
        render_chat(with_template(template.replace("MARK", str(mark))), messages)
    assert messages == CHAT and not mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''['__class__'] }}",
        "{{ messages.__class__.__init__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages|map(attribute='__class__')|list }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '%s'|format(self._TemplateReference__context) }}",
    ],
)
def test_a_quiet_attribute_walk_finds_nothing(template):
    """jinja2 answers some walks with `undefined` instead of an error: what counts is that no class comes out."""
    assert "class" not in render_chat(with_template(template), CHAT)


def test_special_tokens_in_a_chat_become_their_ids(bpe_folder):
    """A template writes EOS as text; in the ids it is one token."""
    tokenizer = load_tokenizer(bpe_folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ eos_token }}"
    assert tokenizer.encode(render_chat(tokenizer, CHAT)) == [*BPE.encode("Be brief."), 0]
