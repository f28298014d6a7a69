"""Folders as the world has them: 200 random ones, written by transformers, are read to the same ids, logits and generations.

A folder has one of six families of models, a tokenizer of one of the kinds below, one or several EOS ids, and a chat template. transformers
is the oracle for each number; peft and trl are in tests/test_lora.py and tests/methods/test_against_trl.py.
"""

import json
import random
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minialign import evaluate
from minialign.data import Chat, Demo, Pair, encode_answers, encode_completion, encode_demos, encode_pairs, encode_prompt
from minialign.engine.common import BadInput
from minialign.evaluate import pair_measures
from minialign.rewards import learned
from minialign.sample import sample
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained, save_pretrained

transformers = pytest.importorskip("transformers", reason="the oracle (requirements-dev.txt)")

FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
TEXTS = ["", " ", "a", "The quick brown fox", " jumps over\nthe lazy dog.", "naïve café ☕ 1234", "<|im_start|>user\nhi<|im_end|>",
         "x  y\n\n z "]
CORPUS = ["the quick brown fox jumps over the lazy dog. 0123456789 hello world, yes no please", "Question: two plus two? Answer: four",
          "user assistant system tool \n weather city Rome", "Human: hi Assistant: hello there friend"] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]


def byte_level(rng, prefix_space=False):
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space), decoders.ByteLevel()
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=rng.choice([300, 400]), special_tokens=SPECIAL, show_progress=False,
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return inner


def sentencepiece(rng, prepend):
    """BPE with byte fallback, as in Llama 2: a space in front of every text by a normalizer (Prepend) or a pre-tokenizer (Metaspace)."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = rng.choice(["first", "always"])
        inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + pieces, show_progress=False))
    state = json.loads(inner.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level with a prefix space": lambda rng: byte_level(rng, True),
    "sentencepiece, Prepend": lambda rng: sentencepiece(rng, True),
    "sentencepiece, Metaspace": lambda rng: sentencepiece(rng, False),
}
CHATML = ("{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>"
          "{{ m.reasoning_content }}</think>{% endif %}{% if m.content is string %}{{ m.content }}{% elif m.content %}"
          "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% for call in m.tool_calls or [] %}<call>"
          "{{ call.function|tojson }}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEMPLATES = {
    "chatml": CHATML,
    "with bos and a date": "{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}{% if tools is not none %}"
                           "TOOLS{% endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}"
                           "{{ eos_token }}{% endif %}{% endfor %}",
    "strict": "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('roles!') }}{% endif %}"
              "{% generation %}{{ m.content.strip() }}{% endgeneration %};{% endfor %}",
}
USER, CALL = {"role": "user", "content": "weather?"}, {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "é", "parameters": {"type": "object", "properties": {}}}}
CONVERSATIONS = {
    "user": ([USER], None),
    "system": ([{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "yes"}, USER], None),
    "tools": ([USER], [TOOL]),
    "a tool call and its result": ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "sun"}],
                                   [TOOL]),
    "null": ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}, USER], None),
    "reasoning": ([USER, {"role": "assistant", "content": "four", "reasoning_content": "2+2 is 4"}, USER], None),
    "thinking": ([USER, {"role": "assistant", "content": "four", "thinking": "2+2 is 4"}, USER], None),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]}], None),
    "unfinished": ([USER, {"role": "assistant", "content": "It is"}], None),
}


def make_tokenizer(rng, folder):
    """Write a random tokenizer with transformers and return what was chosen."""
    kind, template = rng.choice(list(TOKENIZERS)), rng.choice(list(TEMPLATES))
    inner, named = TOKENIZERS[kind](rng), {"bos_token": "<s>", "eos_token": rng.choice(["</s>", "<|im_end|>"])}
    if rng.random() < 0.5:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    if rng.random() < 0.6:
        named["pad_token"] = rng.choice(["<pad>", named["eos_token"]])
    flags = {"add_bos_token": rng.random() < 0.5} if rng.random() < 0.5 else {}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **named, **flags)
    theirs.chat_template = TEMPLATES[template]
    if stored := rng.random() < 0.4 and "pad_token" in named:
        theirs(["some text"], truncation=True, max_length=5, padding="max_length")
    theirs.save_pretrained(folder)
    if rng.random() < 0.3:  # as older folders have it: special tokens in a file of their own
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config = {key: value for key, value in config.items() if key not in (*named, "added_tokens_decoder", "unk_token")}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").write_text(json.dumps(named))
    return f"{kind}, {template}, {named}, stored {stored}"


def make_model(rng, folder, vocab_size, seed, **changes):
    byte_level = "ByteLevel" in (folder / "tokenizer.json").read_text()
    family, width = rng.choice([family for family in FAMILIES if byte_level or family != "qwen2"]), 32
    shape = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes}
    if family == "gpt2":
        shape |= {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 256}
    else:
        shape |= {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "max_position_embeddings": 256}
    if family not in ("gpt2", "gpt_neox"):
        shape |= {"num_key_value_heads": rng.choice([1, 2, 4])}
    config = transformers.AutoConfig.for_model(family, **shape)
    torch.manual_seed(seed)
    kind = transformers.AutoModelForSequenceClassification if "num_labels" in changes else transformers.AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return family


def theirs_of(folder, kind="AutoModelForCausalLM"):
    loaded = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    return loaded, transformers.AutoTokenizer.from_pretrained(folder)


def same_ids(tokenizer, theirs):
    for text in TEXTS:
        expected = theirs(text).input_ids
        assert encode_prompt(tokenizer, text) == (expected or [tokenizer.eos_id]), text
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
    for name, (messages, tools) in CONVERSATIONS.items():
        chat = Chat(messages)
        chat.columns = {"tools": tools}
        goes_on = messages[-1]["role"] == "assistant"
        try:
            expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=not goes_on, continue_final_message=goes_on)
        except Exception:
            with pytest.raises(BadInput, match="chat template failed"):
                encode_prompt(tokenizer, chat)
            continue
        assert encode_prompt(tokenizer, chat) == expected["input_ids"], name
    for prompt, answer in (("2+2=", "4"), ("Answer:", " yes"), ("Answer: ", "yes"), ("the", " fox"), ("\n", "hello")):
        ids, completion = encode_answers(tokenizer, prompt, answer)
        together = theirs(prompt + answer).input_ids
        assert theirs.decode(ids + completion[:-1]) == theirs.decode(together)  # no space is added or lost
        if together[: len(ids)] == ids:  # the answer does not change the prompt's last token
            assert ids + completion == [*together, tokenizer.eos_id], (prompt, answer)
        joins = any(token[0] in "▁Ġ" and len(token) > 1 for token in theirs.get_vocab())
        assert tokenizer.decode(completion) == (" " + answer if prompt[-1] == " " and joins else answer)


@torch.no_grad()
def same_numbers(folder, seed, prompts):
    """Equal logits, and equal greedy generations, whatever ends them."""
    (model, _), ours, tokenizer = theirs_of(folder), load_pretrained(folder, dtype=torch.float64), load_tokenizer(folder)
    ids = torch.randint(ours.config.n_tokens, (3, 24), generator=torch.Generator().manual_seed(seed))
    assert (model(ids).logits - ours(ids)).abs().max() < 1e-4  # transformers computes norms and angles in float32
    padding = list(range(ours.config.n_tokens, ours.config.vocab_size)) or None  # rows of the table without a token: never sampled here
    rollout = sample(ours, prompts, max_new=12, eos_id=tokenizer.eos_id, seed=0, greedy=True)
    for prompt, completion in zip(prompts, rollout.completions, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, suppress_tokens=padding)
        assert completion == expected[0, len(prompt) :].tolist()
    return ours, tokenizer, rollout


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.long] * (seed >= 24)) for seed in range(200)])
def test_a_random_folder_is_read_as_transformers_reads_it(seed, tmp_path):
    rng, folder = random.Random(seed), tmp_path / "theirs"
    what = make_tokenizer(rng, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    make_model(rng, folder, len(theirs) + rng.choice([0, 7]), seed, eos_token_id=theirs.eos_token_id)
    prompts = [[token % len(theirs) for token in rng.sample(range(10, 280), n)] for n in (1, 4, 7)]

    free = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    free = free.generate(torch.tensor([prompts[1]]), max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0,
                         suppress_tokens=list(range(len(theirs), free.config.vocab_size)) or None)
    ends = [theirs.eos_token_id, *([free[0, 6].item()] if rng.random() < 0.6 else [])]  # the third token of a generation ends it
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends if len(ends) > 1 else ends[0]}))

    theirs = transformers.AutoTokenizer.from_pretrained(folder)  # anew: the class depends on the model's config
    same_ids(load_tokenizer(folder), theirs)
    ours, tokenizer, first = same_numbers(folder, seed, prompts)

    save_pretrained(ours, tmp_path / "ours", tokenizer)
    model, again = theirs_of(tmp_path / "ours")
    same_ids(tokenizer, again)
    same_numbers(tmp_path / "ours", seed, prompts)
    model.save_pretrained(tmp_path / "again")
    again.save_pretrained(tmp_path / "again")
    same_ids(load_tokenizer(tmp_path / "again"), theirs)
    _, _, last = same_numbers(tmp_path / "again", seed, prompts)
    assert last.completions == first.completions, what


def test_the_classes_of_transformers(tmp_path):
    """tokenizer_config.json names a class that transformers builds itself, beside a tokenizer.json that says something else."""
    cases = [("llama", "LlamaTokenizer", TOKENIZERS["sentencepiece, Prepend"], {"legacy": legacy}) for legacy in (True, False)]
    cases += [("llama", "LlamaTokenizerFast", TOKENIZERS["sentencepiece, Prepend"], {"legacy": False, "add_prefix_space": False})]
    cases += [("gpt2", "GPT2Tokenizer", byte_level, {"add_prefix_space": space}) for space in (True, False)]
    cases += [("llama", "LlamaTokenizer", byte_level, {})]  # Llama 3's folder: the class is not believed
    for number, (family, name, make, changes) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(random.Random(number)).save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **changes}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in [*TEXTS, "<s>hello<s>world"]:
            assert load_tokenizer(folder).encode(text) == theirs(text, add_special_tokens=False).input_ids, (name, changes, text)


def test_the_answer_to_a_prefix_space_prompt_is_not_a_new_text(tmp_path):
    """By hand: "lo" as a completion begins with no space, though a tokenizer of Llama 2 writes the text "lo" as " lo"."""
    sentencepiece(random.Random(0), True).save(str(tmp_path / "tokenizer.json"))
    Path(tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer = load_tokenizer(tmp_path)
    tokens = [tokenizer.inner.id_to_token(i) for i in encode_completion(tokenizer, "lo")]
    assert tokens == ["l", "o", "</s>"] or tokens == ["lo", "</s>"]
    assert [tokenizer.inner.id_to_token(i) for i in tokenizer.encode("lo")][0].startswith("▁")
    assert tokenizer.decode(tokenizer.encode("hello world")[1:]).endswith(" world")


ANSWERED = {  # how published templates write an answer: what stands between the generation prompt and the text
    "ChatML": (CHATML, "<|im_end|>"),
    "a space in front, as in Llama 2 and Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
        "{{ eos_token }}{% endif %}{% endfor %}", "</s>"),
    "no generation prompt": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}", "</s>"),
    "an empty think, as in Qwen3": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|im_end|>"),
    "a strip": (
        "{% for m in messages %}{{ m.role }}: {{ m.content.strip() }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}"
        "assistant: {% endif %}", "</s>"),
    "an end of turn that is not EOS": (CHATML, "</s>"),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_is_the_text_that_trl_trains_on(name, tmp_path):
    """What a template puts between prompt and answer is trained: a space, the assistant's header, an empty <think>. One EOS ends it."""
    trl = pytest.importorskip("trl", reason="the oracle (requirements-dev.txt)")
    template, eos = ANSWERED[name]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(random.Random(0)), unk_token="<unk>", bos_token="<s>",
                                                  eos_token=eos, chat_template=template)
    theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for answer in ("yes", "yes, hello there ", "two\nlines"):
        chosen, rejected = [{"role": "assistant", "content": answer}], [{"role": "assistant", "content": "no"}]
        expected = trl.apply_chat_template({"prompt": [USER], "chosen": chosen, "rejected": rejected}, theirs)
        rows = encode_pairs(tokenizer, [Pair(Chat([USER]), answer, "no")]) + encode_demos(tokenizer, [Demo(Chat([USER]), answer)])
        assert rows[1] == rows[0][:2] and theirs.decode(rows[0][0]) == expected["prompt"]
        for ids, side in zip(rows[0][1:], ("chosen", "rejected"), strict=True):
            assert ids[-1] == tokenizer.eos_id
            assert theirs.decode(ids[:-1]).removesuffix(eos) == expected[side].rstrip("\n").removesuffix(eos).rstrip("\n") \
                or theirs.decode(ids[:-1]) == expected[side]  # the line end after EOS is never sampled


def test_a_template_that_begins_answers_otherwise_than_prompts_end_is_said(tmp_path, capsys):
    """As in DeepSeek-R1: the generation prompt ends in <think>, which conversations do not have."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(random.Random(0)), eos_token="</s>", chat_template=(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: <think>\n"
        "{% endif %}"))
    theirs.save_pretrained(tmp_path)
    demos = [Demo(Chat([USER]), "yes"), Demo(Chat([USER]), "no")]
    rows = encode_demos(load_tokenizer(tmp_path), demos)
    assert [theirs.decode(prompt + answer) for prompt, answer in rows] == [
        "user: weather?</s>assistant: <think>\nyes</s>", "user: weather?</s>assistant: <think>\nno</s>"]
    said = capsys.readouterr().err
    assert "2 of 2 answers stand right behind their prompt: the chat template writes another text before an answer" in said


@pytest.mark.parametrize("pad", ["<pad>", "<|im_end|>", None], ids=["pad of its own", "pad is EOS", "no pad"])
def test_a_classifier_of_others_reads_the_conversation_as_its_template_writes_it(pad, tmp_path):
    """Its reward is transformers' logit of the rendered conversation, alone and on the pairs of evaluate, also after our export."""
    rng = random.Random(3)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(rng), bos_token="<s>", eos_token="<|im_end|>",
                                                  chat_template=CHATML, **({"pad_token": pad} if pad else {}))
    theirs.save_pretrained(tmp_path / "theirs")
    make_model(rng, tmp_path / "theirs", len(theirs), 3, num_labels=1, pad_token_id=theirs.pad_token_id)
    oracle, _ = theirs_of(tmp_path / "theirs", "AutoModelForSequenceClassification")
    pair = Pair(Chat([USER]), "It is sunny.", "no")
    wanted = []
    for answer in (pair.chosen, pair.rejected):
        ids = theirs.apply_chat_template([USER, {"role": "assistant", "content": answer}], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted.append(oracle(ids).logits.item())
    model, tokenizer = load_pretrained(tmp_path / "theirs", dtype=torch.float64), load_tokenizer(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours", tokenizer)
    for folder in ("theirs", "ours"):
        model = load_pretrained(tmp_path / folder, dtype=torch.float64)
        found = learned(model, load_tokenizer(tmp_path / folder))([pair.prompt] * 2, [pair.chosen, pair.rejected])
        assert found.tolist() == pytest.approx(wanted, abs=1e-4), folder
        measures = pair_measures(model, tokenizer, [pair], evaluate.Config())
        assert [float(measures[side][0]) for side in ("chosen", "rejected")] == pytest.approx(wanted, abs=1e-4)
