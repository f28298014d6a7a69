"""Every input from outside, damaged at random: it is accepted as what it says, or refused in one sentence, and nothing worse happens.

Worse is a traceback, a hang, more than 2 GB of memory, an ended process, a reading other than that of the official reader. Each family of
inputs is a function fuzz_<family>(seed, rounds) -> Counter of outcomes. The default tests take a few seconds each. The long tests do the
same with thousands of rounds and other seeds. tests/fuzzing.py has the children and the random edits, and says how to repeat a round.

JSONL rows, headers of safetensors, edited configs and archives have tests of their own beside what reads them.
"""

import functools
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings, strategies
from safetensors.torch import load_file, save_file

from minialign.data import (
    Demo,
    Feedback,
    Pair,
    encode_demos,
    encode_prompt,
    read_demonstrations,
    read_feedback,
    read_preferences,
    read_prompts,
    read_texts,
)
from minialign.engine.common import BadInput
from minialign.hf_config import FAMILIES
from minialign.lora import inject, load_model, save_adapter
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.task import builtin_tokenizer
from minialign.tokenizer import Tokenizer, content, load_tokenizer, render_chat, train_bpe
from minialign.weights import layout, load_pretrained, read_tensors, save_pretrained
from tests import fuzzing
from tests.fuzzing import Fault, edited_bytes, edited_json, fuzz, in_children, odd, refused_or, sentence, write_json

torch.set_num_threads(1)


@functools.cache
def scratch():
    """A folder for what rounds start from, made once and deleted at the end."""
    made = tempfile.TemporaryDirectory(prefix="fuzz-base-")
    KEPT.append(made)
    return Path(made.name)


KEPT = []


# ------------------------------------------------------------------------------------------------------------- safetensors


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
ODD_NAMES = ["", "\ud800", "é", "__metadata__", "x" * 300, "model.norm.weight", "lm_head.weight", "embed_tokens.weight",
             "model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.h.0.attn.bias"]


def raw(header, data, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


@functools.cache
def weights_folder(family):
    torch.manual_seed(0)
    changes = {"gpt2": dict(positions="learned", norm="layer", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True),
               "llama": {}}[family]
    model = GPT(GPTConfig(vocab_size=28 if family == "gpt2" else 29, n_layer=1, n_head=2, n_embd=8, ffn_dim=8, max_len=16, tied=False,
                          family=family, **changes))
    save_pretrained(model, scratch() / family, builtin_tokenizer() if family == "llama" else None)
    return scratch() / family


def damaged_weights(rng, whole):
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.sample(names, 2)
    match rng.randrange(15):
        case 0 | 1:
            return edited_bytes(rng, whole)
        case 2:
            return whole[: rng.randrange(len(whole))]
        case 3:
            return whole + rng.randbytes(rng.randint(1, 20))
        case 4:  # offsets exchanged
            header[a]["data_offsets"], header[b]["data_offsets"] = header[b]["data_offsets"], header[a]["data_offsets"]
        case 5:  # shape and offsets exchanged: two tensors change places
            header[a], header[b] = header[b], header[a]
        case 6:
            header[a]["dtype"] = rng.choice([*DTYPES, "F8_E4M3", "F8_E5M2", "C64", "U16", "U32", "U64", "F4", "F6_E2M3", "f32", "F33"])
        case 7:
            shape = header[a]["shape"]
            header[a]["shape"] = rng.choice([shape[::-1], [*shape, 1], [1, *shape], [torch.Size(shape).numel()], shape[:-1], []])
        case 8:
            moved = rng.choice([1, 2, 4, 8, -1, -4])
            header[a]["data_offsets"] = [header[a]["data_offsets"][0] + moved, header[a]["data_offsets"][1] + moved]
        case 9:
            header[rng.choice(ODD_NAMES)] = header.pop(a)
        case 10:
            header["__metadata__"] = rng.choice([None, {}, {"a": "b"}, {"a": 1}, [], "a", {"a": None}, {"format": "tf"}, {"é": "\ud800"}])
        case 11:
            text = json.dumps(header, indent=rng.choice([None, 1]), separators=rng.choice([None, (",", ":")])).encode()
            return raw(text + rng.choice([b"", b" ", b"\n", b"\0", b"x", b" " * 1000]), data, rng.choice([None, len(text), len(text) + 8]))
        case 12:  # a key twice
            text = json.dumps(header).encode().replace(json.dumps(a).encode(), json.dumps(b).encode())
            return raw(text, data)
        case 13:  # numbers that no computation survives
            size = rng.choice([2, 4, 8])
            at = rng.randrange(len(data) // size) * size
            bad = {2: b"\xff\x7f", 4: b"\0\0\x80\x7f", 8: b"\0\0\xc0\x7f\0\0\x80\xff"}[size]
            data = data[:at] + bad + data[at + size :]
        case 14:
            header, _ = edited_json(rng, header)
    keys = [*header]
    rng.shuffle(keys)
    return raw({key: header[key] for key in keys}, data)


def official(content):
    """{name: (dtype, shape, bytes)} of the official reader, None if it refuses."""
    try:
        return {name: (part["dtype"], part["shape"], bytes(part["data"])) for name, part in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        return None


def same_as(part, tensor):
    dtype, shape, content = part
    if dtype not in DTYPES:
        return True
    if tensor.dtype != DTYPES[dtype] or list(tensor.shape) != shape:
        return False
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == content if tensor.numel() else True


def fuzz_safetensors(seed, rounds):
    """Our readers and the official one accept the same files, and give the same bits. What is accepted can be sampled, or says why not."""
    for family in ("llama", "gpt2"):
        weights_folder(family)

    def one(rng, place):
        folder = weights_folder(rng.choice(["llama", "llama", "gpt2"]))
        whole = (folder / "model.safetensors").read_bytes()
        content, file = damaged_weights(rng, whole), place / "model.safetensors"
        file.write_bytes(content)
        for beside in folder.glob("*.json"):
            os.link(beside, place / beside.name)
        theirs, wanted = official(content), official(whole)
        outcome, ours = refused_or(lambda: read_tensors([file]))
        if (theirs is None) != (ours is None) and all(part[0] in DTYPES for part in (theirs or {}).values()):
            raise Fault(f"the official reader {'refuses' if theirs is None else 'accepts'} it, ours is {outcome}")
        for name, tensor in (ours or {}).items():
            if not same_as(theirs[name], tensor):
                raise Fault(f"{name} has other bits than in the official reader")
        loaded, model = refused_or(lambda: load_pretrained(place))
        sound = theirs is not None and {name: part[:2] for name, part in theirs.items()} == {n: part[:2] for n, part in wanted.items()}
        if sound and model is None:
            raise Fault("all tensors are there with their shapes and dtypes, and it is refused")
        if model is None:
            return loaded
        state = model.state_dict()
        for name, mine, (_, unpack) in layout(model.config)[0]:
            for own, part in zip(mine, unpack(ours[name]), strict=True):
                if not torch.equal(state[own].view(-1).view(torch.uint8), part.contiguous().view(-1).view(torch.uint8)):
                    raise Fault(f"{own} is not what the file holds")
        sampled, _ = refused_or(lambda: sample(model, [[1, 2, 3]], max_new=3, eos_id=None, seed=0))
        return f"{loaded}, sampling {sampled}"

    return fuzz("safetensors", seed, rounds, one)


# ----------------------------------------------------------------------------------------------------------------- parquet

READERS = (read_demonstrations, read_preferences, read_feedback, read_prompts, read_texts)
CHAT = [{"role": "user", "content": "hi"}]
ROWS = [{"prompt": "a b", "completion": "c", "label": True}, {"prompt": "d", "chosen": "e", "rejected": "f"}, {"text": "some text"},
        {"messages": [*CHAT, {"role": "assistant", "content": "yes"}]}, {"question": "q", "answer": "#### 1"},
        {"prompt": CHAT, "completion": [{"role": "assistant", "content": "yes"}]}, {"instruction": "i", "input": "", "output": "o"}]


def random_column(rng, pyarrow, n):
    """A column of a random arrow type."""
    kind = rng.randrange(16)
    words = ["a", "b c", "", "é", "x" * 50]
    values = {
        0: lambda: pyarrow.array([rng.choice(words) for _ in range(n)]),
        1: lambda: pyarrow.array([rng.choice([*words, None]) for _ in range(n)]),
        2: lambda: pyarrow.array([None] * n),
        3: lambda: pyarrow.array([rng.choice([0, 1, -(2**63), 2**63 - 1]) for _ in range(n)]),
        4: lambda: pyarrow.array([rng.choice([0.5, float("nan"), float("inf")]) for _ in range(n)]),
        5: lambda: pyarrow.array([rng.choice([b"a", b"\xff\xfe", b""]) for _ in range(n)]),
        6: lambda: pyarrow.array([rng.random() < 0.5 for _ in range(n)]),
        7: lambda: pyarrow.array([rng.choice(words) for _ in range(n)], pyarrow.large_string()),
        8: lambda: pyarrow.array([rng.choice(words) for _ in range(n)]).dictionary_encode(),
        9: lambda: pyarrow.array([rng.randrange(2**40) for _ in range(n)], pyarrow.timestamp("us")),
        10: lambda: pyarrow.array([rng.choice([[], ["a"], ["a", None], None]) for _ in range(n)], pyarrow.list_(pyarrow.string())),
        11: lambda: pyarrow.array([rng.choice([[("a", "b")], [], None]) for _ in range(n)], pyarrow.map_(pyarrow.string(),
                                                                                                         pyarrow.string())),
        12: lambda: pyarrow.array([rng.choice([CHAT, [*CHAT, {"role": "assistant", "content": "yes"}], [{"role": None, "content": "a"}],
                                               []])
                                   for _ in range(n)]),
        13: lambda: pyarrow.array([{"role": "user", "content": rng.choice(words)} for _ in range(n)]),
        14: lambda: pyarrow.array([rng.randrange(10**6) for _ in range(n)], pyarrow.decimal128(10, 2)),
        15: lambda: pyarrow.array([rng.randrange(100) for _ in range(n)], pyarrow.duration("s")),
    }
    return values[kind]()


def random_table(rng, pyarrow):
    """A table of good rows in which columns have other types, are missing or stand there twice; or of random columns alone."""
    n = rng.choice([0, 1, 3, 5])
    rows = [rng.choice(ROWS)] * max(n, 1) if rng.random() < 0.8 else rng.sample(ROWS[:3], 3)
    table = pyarrow.Table.from_pylist(rows)
    for _ in range(rng.choice([0, 1, 1, 2])):
        name = rng.choice([*table.column_names, "label", "prompt", "completion", "tools", "system", "", "finished", "é"])
        column = random_column(rng, pyarrow, len(table))
        if name in table.column_names and rng.random() < 0.9:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table if n else table.slice(0, 0)


def fuzz_parquet(seed, rounds):
    """A parquet file is read as the same rows in JSONL are, or refused. A damaged one is refused, or read as pyarrow reads it."""
    pyarrow = pytest.importorskip("pyarrow", reason="reads parquet")
    pytest.importorskip("datasets", reason="reads parquet")
    from pyarrow import parquet

    def rows_of(path):
        """(does pyarrow read it, the same rows as lines of JSON or None if JSON cannot hold them)."""
        try:
            rows = parquet.read_table(path).to_pylist()
        except Exception:
            return False, None
        try:
            return True, [json.dumps(row) for row in rows]
        except (TypeError, ValueError):
            return True, None

    def one(rng, place):
        path, plain = place / "rows.parquet", place / "rows.jsonl"
        parquet.write_table(random_table(rng, pyarrow), path, compression=rng.choice(["snappy", "none", "zstd", "gzip"]),
                            use_dictionary=rng.random() < 0.5, row_group_size=rng.choice([1, 2, 100]))
        if rng.random() < 0.5:
            path.write_bytes(edited_bytes(rng, path.read_bytes()))
        named = rng.choice([path, path, place / "rows.jsonl.bin", place / "rows[1].parquet"])
        path.rename(named)
        readable, lines = rows_of(named)
        plain.write_text("".join(line + "\n" for line in lines or []))
        outcomes = []
        for reader in READERS:
            for skip_bad in (False, True):
                outcome, rows = refused_or(lambda reader=reader, skip_bad=skip_bad: reader(named, skip_bad=skip_bad))
                outcomes.append(outcome)
                if rows is None or not readable and named.read_bytes()[:4] != b"PAR1":  # (without the mark it may be lines of JSON)
                    continue
                if not readable:
                    raise Fault(f"{reader.__name__} reads {len(rows)} rows of a file that pyarrow refuses")
                for row in rows:
                    parts = list(vars(row).values()) if isinstance(row, Demo | Pair | Feedback) else [row]
                    json.dumps(parts, ensure_ascii=False).encode()
                _, others = refused_or(lambda reader=reader, skip_bad=skip_bad: reader(plain, skip_bad=skip_bad))
                if lines is not None and others is not None and repr(rows) != repr(others):
                    raise Fault(f"{reader.__name__} reads {repr(rows)[:200]}, and the same rows in JSON as {repr(others)[:200]}")
        return "accepted by a reader" if "accepted" in outcomes else outcomes[0]

    return fuzz("parquet", seed, rounds, one)


@pytest.mark.slow
def test_a_small_parquet_file_that_fills_the_memory_is_refused(tmp_path):
    """Thirty million equal rows take less than a megabyte on the disk."""
    pyarrow = pytest.importorskip("pyarrow", reason="reads parquet")
    pytest.importorskip("datasets", reason="reads parquet")
    import numpy
    from pyarrow import parquet

    n = 30_000_000
    equal = pyarrow.DictionaryArray.from_arrays(pyarrow.array(numpy.zeros(n, dtype=numpy.int32)), pyarrow.array(["x" * 100]))
    parquet.write_table(pyarrow.table({"prompt": equal, "completion": equal}), tmp_path / "equal", row_group_size=n)
    parquet.write_table(pyarrow.table({"prompt": pyarrow.nulls(n, pyarrow.string())}), tmp_path / "nulls", row_group_size=n)
    del equal
    for name in ("equal", "nulls"):
        assert (tmp_path / name).stat().st_size < 10**6
        found = in_children(lambda _, name=name: refused_or(lambda: read_demonstrations(tmp_path / name, skip_bad=True))[0], [0], seconds=5)
        assert found == {0: "refused"}, name


# ------------------------------------------------------------------------------------------------------------- config.json

SMALL = {
    "gpt2": dict(vocab_size=29, n_layer=2, n_head=2, n_embd=8, n_positions=32, n_inner=12, layer_norm_epsilon=1e-5,
                 activation_function="gelu_new", tie_word_embeddings=False),
    "gpt_neox": dict(rotary_pct=0.5, rotary_emb_base=10000, layer_norm_eps=1e-5, use_parallel_residual=True, attention_bias=True),
    "llama": dict(num_key_value_heads=1, rms_norm_eps=1e-6, head_dim=4, attention_bias=True, mlp_bias=True),
    "mistral": dict(num_key_value_heads=2, rms_norm_eps=1e-6, sliding_window=4),
    "qwen2": dict(num_key_value_heads=1, rms_norm_eps=1e-6, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": dict(num_key_value_heads=1, rms_norm_eps=1e-6, head_dim=4, use_sliding_window=True, sliding_window=3,
                  layer_types=["full_attention", "sliding_attention"], attention_bias=False),
}
ROPES = [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 100.0},
         {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}]
UNSAID = ["eos_token_id", "bos_token_id", "pad_token_id", "rope_theta", "partial_rotary_factor", "rope_parameters", "rope_scaling", "dtype",
          "torch_dtype", "layer_types", "id2label", "num_labels", "is_causal", "reward_offset", "reward_bound", "reward_read", "reward_pad",
          "quantization_config", "sliding_window", "use_sliding_window", "max_window_layers", "head_dim", "attention_bias", "mlp_bias",
          "hidden_act", "tie_word_embeddings", "add_cross_attention", "tokenizer_class", "n_positions", "original_max_position_embeddings"]


@functools.cache
def config_folder(family):
    general = dict(vocab_size=29, num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=12,
                   max_position_embeddings=32, hidden_act="gelu" if family == "gpt_neox" else "silu", tie_word_embeddings=False,
                   rope_scaling=ROPES[2])
    hf = {"model_type": family, **({} if family == "gpt2" else general), **SMALL[family]}
    torch.manual_seed(1)
    folder = scratch() / f"config {family}"
    model = GPT(GPTConfig.from_hf(hf))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_pretrained(model, folder, builtin_tokenizer())
    return folder, hf | {"architectures": json.loads((folder / "config.json").read_text())["architectures"]}


def fuzz_configs(seed, rounds, oracle=False):
    """config.json of six families with a wrong value anywhere: refused in a sentence, or a model that runs.

    oracle: what is accepted and transformers accepts too gives transformers' logits.
    """
    for family in FAMILIES:
        config_folder(family)
    if oracle:
        transformers = pytest.importorskip("transformers", reason="the oracle")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        transformers.AutoModelForCausalLM.from_pretrained(config_folder("llama")[0])  # imports, before the fork

    def one(rng, place):
        folder, plain = config_folder(rng.choice(FAMILIES))
        hf = plain
        if rng.random() < 0.3:
            hf = hf | {rng.choice(["rope_scaling", "rope_parameters"]): rng.choice(ROPES)}
        if rng.random() < 0.4:
            hf = hf | {rng.choice(UNSAID): odd(rng)}
        else:
            hf, _ = edited_json(rng, hf)
        for file in folder.iterdir():
            os.link(file, place / file.name)
        (place / "config.json").unlink()
        if rng.random() < 0.05:
            (place / "config.json").write_bytes(edited_bytes(rng, json.dumps(hf).encode("utf-8", "surrogatepass")))
        else:
            write_json(place / "config.json", hf)

        def run():
            model, tokenizer, _ = load_model(place, dtype=torch.float32)
            prompts = [tokenizer.encode("ask for tea: "), tokenizer.encode("a")]
            ids = torch.tensor([prompts[0]])
            with torch.no_grad():
                logits = model(ids)
            if model.config.head == "lm":
                rollout = sample(model, prompts, max_new=4, eos_id=tokenizer.eos_id, seed=0)
                tokenizer.decode(rollout.completions[0])
            if len(str(model.config)) < 10**5:
                save_pretrained(model, place / "again", tokenizer)
                again = load_pretrained(place / "again")
                with torch.no_grad():
                    if not torch.equal(again(ids), logits) and logits.isfinite().all():
                        raise Fault("the exported model gives other logits")
            return ids, logits

        outcome, made = refused_or(run)
        if not oracle or made is None:
            return outcome
        if hf.get("num_labels", 0) not in range(10):
            return outcome  # transformers makes a list of so many names
        try:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
            with torch.no_grad():
                expected = theirs(made[0]).logits
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return "accepted, transformers refuses"
        if made[1].dim() != 3:
            return "accepted, a reward model"
        if not expected.isfinite().all() or not made[1].isfinite().all():
            return "accepted, not finite"
        off = float((made[1] - expected).abs().max() / (1 + expected.abs().max()))
        if off > 1e-3:
            keys = [key for key in sorted({*hf, *plain}) if hf.get(key) != plain.get(key)]
            raise Fault(f"accepted, and the logits differ from transformers' by {off:.2g}: {str({key: hf.get(key) for key in keys})[:400]}")
        return "accepted, transformers' logits"

    return fuzz("configs", seed, rounds, one)


# --------------------------------------------------------------------------------------------------------------- tokenizer

TEXTS = ["", " ", "a", "ask for tea: ", "the quick brown fox\n", "é ☕ \u200b", "<|endoftext|>", "<s>hi</s>", "\0", "a" * 400]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@functools.cache
def tokenizer_folders():
    """Folders of a character tokenizer, a byte-level BPE and one as in Llama 2, each with all the files that a folder may have."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors, trainers

    corpus = ["ask for tea: please a cup of tea", "the quick brown fox jumps over the lazy dog"] * 3
    pieces = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False)
    pieces.train_from_iterator(corpus, trainer)
    pieces.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "unk_token": "<unk>", "legacy": True,
                "tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": True, "additional_special_tokens": ["<x>"],
                "added_tokens_decoder": {"1": {"content": "<s>", "special": True, "lstrip": False, "normalized": False},
                                         "320": {"content": "<x>", "special": True}}}
    made = {"characters": builtin_tokenizer(), "bytes": train_bpe(corpus, 300), "pieces": Tokenizer(pieces, settings)}
    for name, tokenizer in made.items():
        folder = scratch() / name
        tokenizer.settings = tokenizer.settings | {"chat_template": TEMPLATE, "extra_special_tokens": {"mark": "<y>"}}
        torch.manual_seed(2)
        config = GPTConfig(vocab_size=330, n_layer=1, n_head=1, n_embd=4, ffn_dim=4, max_len=600)
        save_pretrained(GPT(config), folder, tokenizer)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        ends = content(tokenizer.settings["eos_token"])
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": ends, "pad_token": {"content": ends}}))
        (folder / "added_tokens.json").write_text(json.dumps({"<z>": 321}))
    return [scratch() / name for name in made]


PARTS = [  # what tokenizers knows, each with something that it may not expect
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "FixedLength", "length": 0}, {"type": "FixedLength", "length": 2**63},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithNext", "invert": True},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}, {"type": "Replace", "pattern": {"Regex": ""}, "content": "b"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"}, {"type": "Prepend", "prepend": ""},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}] * 12},
    {"type": "Sequence", "pretokenizers": []}, {"type": "Sequence", "decoders": []}, {"type": "Sequence", "processors": []},
    {"type": "BPEDecoder", "suffix": ""}, {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "Strip", "content": " ", "start": 2**40, "stop": 2**40}, {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "WordPiece", "prefix": "", "cleanup": True}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                                                           "split": True},
    {"type": "Metaspace", "replacement": "__", "prepend_scheme": "first", "split": False}, {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}, {"type": "UnicodeScripts"},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [], "special_tokens": {}},
    {"type": "TemplateProcessing", "pair": [], "single": [{"SpecialToken": {"id": "q", "type_id": 0}}, {"Sequence": {"id": "A",
                                                                                                                     "type_id": 0}}],
     "special_tokens": {"q": {"id": "q", "ids": [2**32 - 1], "tokens": ["q"]}}},
    {"type": "TemplateProcessing", "pair": [], "single": [{"SpecialToken": {"id": "q", "type_id": 0}}, {"Sequence": {"id": "A",
                                                                                                                     "type_id": 0}}],
     "special_tokens": {"q": {"id": "q", "ids": [0, 1], "tokens": ["q"]}}},
    {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2], "trim_offsets": True, "add_prefix_space": True},
    {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2**32 - 1]}, {"type": "NFKC"}, {"type": "StripAccents"}, {"type": "Nmt"},
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}, {"type": "Unigram", "unk_id": 5, "vocab": []},
    {"type": "Unigram", "unk_id": None, "vocab": [["a", float("nan")], ["b", -1e308]], "byte_fallback": True},
    {"type": "WordLevel", "vocab": {}, "unk_token": ""}, {"type": "WordLevel", "vocab": {"a": 0, "b": 0}, "unk_token": "a"},
    {"type": "WordPiece", "vocab": {"a": 2**32 - 1}, "unk_token": "a", "continuing_subword_prefix": "", "max_input_chars_per_word": 0},
    {"type": "BPE", "vocab": {"a": 0, "b": 4_000_000_000}, "merges": []}, {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]},
    {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": ["a a", "a  a"]},
    {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 3},
    {"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
]


def odd_part(rng):
    return json.loads(json.dumps(rng.choice(PARTS))) if rng.random() < 0.4 else odd(rng)


def use_tokenizer(place):
    """All that a run does with a tokenizer. Every id is one of the model's rows, and the text comes back."""
    model, tokenizer, _ = load_model(place)
    limit = model.config.vocab_size
    outcomes = []
    for text in TEXTS:
        for what in (lambda t=text: tokenizer.encode(t), lambda t=text: encode_prompt(tokenizer, t),
                     lambda t=text: encode_demos(tokenizer, [Demo("a", t or "b")])[0][1]):
            outcome, ids = refused_or(what)
            outcomes.append(outcome)
            if ids is None:
                continue
            if not all(type(i) is int and 0 <= i < limit for i in ids):
                raise Fault(f"encodes {text[:20]!r} to {ids[:10]}, and the model has {limit} rows")
            tokenizer.decode(ids)
    chat, _ = refused_or(lambda: encode_prompt(tokenizer, [{"role": "user", "content": "tea"}]))
    rollout = sample(model, [[tokenizer.eos_id]], max_new=8, eos_id=tokenizer.eos_id, seed=0)
    tokenizer.decode(rollout.completions[0])
    tokenizer.decode_prompt([tokenizer.eos_id, 0])
    tokenizer.decode(range(tokenizer.vocab_size if tokenizer.vocab_size < 400 else 0))
    save_pretrained(model, place / "again", tokenizer)
    again = load_tokenizer(place / "again")
    for text in TEXTS:
        first, ids = refused_or(lambda t=text: tokenizer.encode(t))
        second, others = refused_or(lambda t=text: again.encode(t))
        if ids is not None and ids != others:
            raise Fault(f"our own export encodes {text[:20]!r} to {others and others[:10]}, the tokenizer to {ids[:10]}")
    return tokenizer


FILES = ["tokenizer.json"] * 4 + ["tokenizer_config.json"] * 3 + ["special_tokens_map.json", "added_tokens.json", "generation_config.json"]


def fuzz_tokenizers(seed, rounds, oracle=False):
    """The JSON files of a tokenizer with a part exchanged, or cut: refused in a sentence, or a tokenizer with which a run works.

    oracle: what is accepted and transformers accepts too gives transformers' ids.
    """
    folders = tokenizer_folders()
    if oracle:
        transformers = pytest.importorskip("transformers", reason="the oracle")
        transformers.utils.logging.set_verbosity_error()
        transformers.AutoTokenizer.from_pretrained(folders[1])  # imports, before the fork

    def one(rng, place):
        folder = rng.choice(folders)
        for file in folder.iterdir():
            os.link(file, place / file.name)
        if rng.random() < 0.5:
            (place / "chat_template.jinja").unlink()
        name = rng.choice(FILES)
        whole = (place / name).read_bytes()
        (place / name).unlink()
        if rng.random() < 0.1:
            (place / name).write_bytes(edited_bytes(rng, whole))
        else:
            changed, _ = edited_json(rng, json.loads(whole), odd_part)
            if name == "tokenizer.json" and rng.random() < 0.4:
                part = rng.choice(["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "truncation", "padding"])
                changed[part] = odd_part(rng)
            write_json(place / name, changed)
        outcome, tokenizer = refused_or(lambda: use_tokenizer(place))
        if not oracle or tokenizer is None:
            return outcome
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(place)
            expected = [theirs(text, add_special_tokens=False).input_ids for text in TEXTS]
        except BaseException:
            return "accepted, transformers refuses"
        for text, ids in zip(TEXTS, expected, strict=True):
            _, ours = refused_or(lambda t=text: tokenizer.encode(t))
            if ours is not None and ours != ids:
                raise Fault(f"{text[:20]!r} is {ours[:8]}, in transformers {ids[:8]} ({name})")
        return "accepted, transformers' ids"

    return fuzz("tokenizers", seed, rounds, one, memory=2**31)


# ---------------------------------------------------------------------------------------------------------------- adapters


@functools.cache
def adapter_folder(family):
    folder, hf = config_folder(family)
    model = inject(load_pretrained(folder), 2, 8.0)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    save_adapter(model, scratch() / f"adapter {family}", str(folder))
    return scratch() / f"adapter {family}"


ODD_ADAPTER = [{"q_proj": 4}, {"": 2}, {"(": 2}, {".*": 1}, {"layers.0": None}, {"mlp": "2"}, ["q_proj"], "all-linear", "(", "gaussian",
               "pissa",
               "..", "/nowhere", "owner/name", "a" * 300, "\0", 10**400, -2, 0, 1e-300, float("nan"), "REGRESSION", "IA3", "CAUSAL_LM"]


def fuzz_adapters(seed, rounds, oracle=False):
    """adapter_config.json and the adapter's weights with a wrong value anywhere: refused in a sentence, or a model that runs.

    oracle: what is accepted and PEFT accepts too gives PEFT's logits.
    """
    families = ("llama", "gpt2", "gpt_neox")
    for family in families:
        adapter_folder(family)
    if oracle:
        transformers = pytest.importorskip("transformers", reason="the oracle")
        peft = pytest.importorskip("peft", reason="the oracle")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        folder = config_folder("llama")[0]
        peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), adapter_folder("llama"))

    def values(rng):
        return rng.choice(ODD_ADAPTER) if rng.random() < 0.5 else odd(rng)

    def one(rng, place):
        family = rng.choice(families)
        offline()
        base, folder = config_folder(family)[0], adapter_folder(family)
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = (folder / "adapter_model.safetensors").read_bytes()
        match rng.randrange(8):
            case 0:
                weights = damaged_weights(rng, weights)
            case 1:
                tensors = load_file(folder / "adapter_model.safetensors")
                name = rng.choice([*tensors])
                change = rng.choice([lambda t: t[:1], lambda t: t.T.contiguous(), lambda t: t.to(torch.int32), lambda t: t * float("nan"),
                                     lambda t: t[:0], lambda t: t.to(torch.complex64), lambda t: t.bool(), lambda t: t.double()])
                tensors[rng.choice([name, name, name + "x", "base_model.model." + name])] = change(tensors.pop(name)).contiguous()
                save_file(tensors, place / "adapter_model.safetensors")
                weights = (place / "adapter_model.safetensors").read_bytes()
            case 2:
                option = rng.choice(["use_rslora", "use_dora", "modules_to_save", "revision", "alpha_pattern", "rank_pattern", "bias",
                                     "layers_to_transform", "fan_in_fan_out", "init_lora_weights", "peft_type", "lora_bias", "r"])
                config[option] = values(rng)
            case _:
                config, _ = edited_json(rng, config, values)
        (place / "adapter_model.safetensors").write_bytes(weights)
        write_json(place / "adapter_config.json", config)

        def run():
            model, tokenizer, _ = load_model(place, dtype=torch.float32)
            ids = torch.tensor([tokenizer.encode("ask for tea: ")])
            with torch.no_grad():
                logits = model(ids)
            refused_or(lambda: sample(model, [[1, 2]], max_new=3, eos_id=tokenizer.eos_id, seed=0))
            save_adapter(model, place / "again", str(base))
            again, _, _ = load_model(place / "again", dtype=torch.float32)
            with torch.no_grad():
                if logits.isfinite().all() and not torch.allclose(again(ids), logits, rtol=1e-4, atol=1e-4):
                    raise Fault("the exported adapter gives other logits")
            return ids, logits

        outcome, made = refused_or(run)
        if not oracle or made is None:
            return outcome
        try:
            theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), place)
            with torch.no_grad():
                expected = theirs(made[0]).logits
        except BaseException:
            return "accepted, PEFT refuses"
        if not expected.isfinite().all() or not made[1].isfinite().all():
            return "accepted, not finite"
        off = float((made[1] - expected).abs().max() / (1 + expected.abs().max()))
        if off > 1e-3:
            plain = json.loads((folder / "adapter_config.json").read_text())
            keys = [key for key in sorted({*config, *plain}) if config.get(key) != plain.get(key)]
            raise Fault(f"accepted, and the logits differ from PEFT's by {off:.2g}: {str({key: config.get(key) for key in keys})[:400]}")
        return "accepted, PEFT's logits"

    return fuzz("adapters", seed, rounds, one)


def offline():
    """Nothing may call out: the hub client is told to stay offline."""
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    huggingface_hub.constants.HF_HUB_CACHE = str(scratch() / "hub")


# ---------------------------------------------------------------------------------------------------------- chat templates

SECRET = "a-secret-of-this-machine-4711"
NAMES = ["messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt", "m", "x", "loop", "self", "cycler", "joiner",
         "namespace", "lipsum", "range", "dict", "raise_exception", "strftime_now", "caller", "varargs", "kwargs", "none", "nothing", "ns"]
WALKS = ["__class__", "__init__", "__globals__", "__builtins__", "__mro__", "__subclasses__()", "__dict__", "__getitem__", "gi_frame",
         "gi_code", "f_globals", "cr_frame", "tb_frame", "mro", "func_globals", "_TemplateReference__context", "environment", "ctx", "name",
         "parent", "exported_vars", "blocks", "eval_ctx", "role", "content", "append", "pop", "clear", "update", "format", "format_map",
         "items()", "keys()", "index0", "changed", "cycle", "undefined", "replace", "join", "encode", "real", "__call__", "__reduce__"]
FILTERS = ["abs", "attr('__class__')", "attr('content')", "batch(99999)", "capitalize", "center(1000000000)", "center(3)", "count",
           "default('d')", "dictsort", "escape", "filesizeformat", "first", "float", "forceescape", "format(1, 2)", "groupby('role')",
           "indent(1000000)", "int", "int(base=99)", "int(base=16)", "items", "join('x' * 1000)", "last", "length", "list", "lower",
           "map(attribute='role')", "map('upper')", "map('string')", "map('list')", "max", "min", "pprint", "random", "reject('none')",
           "rejectattr('role')", "replace('', 'x' * 1000)", "replace('a', 'aa')", "reverse", "round(100000000, 'floor')", "round(2)",
           "safe",
           "round(-30000000, 'ceil')", "select", "selectattr('role', 'equalto', 'user')", "slice(99999)", "sort", "string", "striptags",
           "sum",
           "sum(start='a')", "title", "tojson", "tojson(indent=1000000)", "trim", "truncate(3)", "unique", "upper", "urlencode", "urlize",
           "wordcount", "wordwrap(1)", "wordwrap(-1)", "xmlattr", "tojson(indent='x' * 10000)", "nothing"]
SHORT = ["'a'", "''", "0", "1", "2.5", "-1", "10 ** 300", "9 * 9", "true", "none", "[]", "{}", "[1, 2]", "{'a': 1}", "'x' * 100000",
         "[1] * 100000", "range(99999)", "messages[0].content", "'%1000000000d' % 1", "'{:>1000000000}'.format(1)", "1e308 * 10",
         "'<' * 100000",
         "'http://' * 20000", "'é' * 100000", "'{0.__class__}'.format(messages)", "'{x.__init__.__globals__}'.format(x=cycler)",
         "'{a[__class__]}'.format_map({'a': 1})", "'%s' % messages", "'9' * 5000", "'a'.ljust(1000000000)", "'a'.encode('utf-32')",
         "lipsum(n=100000)", "strftime_now('%Y' * 100000)", "strftime_now('')", "dict(a=1)", "'a\\tb'.expandtabs(1000000000)",
         "(1).__class__", "''.__class__.__mro__", "cycler.__init__.__globals__.os", "lipsum.__globals__['os'].popen('id')",
         "self._TemplateReference__context", "raise_exception.__globals__", "strftime_now.__closure__", "messages.append(1)",
         "messages[0].update({'a': 1})", "range.__self__", "joiner.__init__.__globals__", "namespace.__init__", "'\\ud800'", "'\\x00'",
         "raise_exception('x' * 100000)", "raise_exception('two\\nlines')", "raise_exception(messages)", "raise_exception(none)"]


def expression(rng, depth=0):
    """A random expression of jinja."""
    if depth > 3 or rng.random() < 0.25:
        return rng.choice([*SHORT, *NAMES])
    more = functools.partial(expression, rng, depth + 1)
    match rng.randrange(12):
        case 0 | 1:
            return f"{more()}.{rng.choice(WALKS)}"
        case 2:
            return f"{more()}['{rng.choice(WALKS).removesuffix('()')}']"
        case 3 | 4 | 5:
            return f"({more()})|{rng.choice(FILTERS)}"
        case 6:
            return f"({more()} {rng.choice(['+', '-', '*', '**', '/', '//', '%', '~', '~', 'and', 'or', 'in', '==', '<'])} {more()})"
        case 7:
            return f"[{more()}, {more()}]"
        case 8:
            return f"{{{more()}: {more()}}}"
        case 9:
            return f"{rng.choice([*NAMES, 'f', 'f', 'loop', 'caller'])}({more()})"
        case 10:
            return f"({more()} if {more()} else {more()})"
        case _:
            return f"({more()})[{rng.choice(['0', '-1', '::2', '1000000:', more()])}]"


def program(rng, depth=0):
    """A random template. Most of its parts fail if they are run, so they often stand where they are run last."""
    if depth > 4 or rng.random() < 0.15:
        return rng.choice(["text", "{{ m.content }}", "{{ messages[0].content }}", show(expression(rng))])
    inside = functools.partial(program, rng, depth + 1)
    match rng.randrange(16):
        case 0 | 1 | 2:
            over = rng.choice(["messages", "messages", "range(99999)", "range(300)", "range(3)", "x", expression(rng, 2)])
            how = rng.choice(["", "", "", " recursive", f" if {expression(rng, 3)}"])
            last = rng.choice(["", "", "{{ loop(x) }}", "{% break %}", "{% continue %}"])
            return statement(f"for m in {over}{how}") + inside() + last + statement("endfor")
        case 3:
            return statement(f"if {expression(rng, 1)}") + inside() + statement("else") + inside() + statement("endif")
        case 4:
            return statement(f"set x = {expression(rng)}") + inside()
        case 5:
            grown = rng.choice(["ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]", "ns.x * 2", "[ns.x]", expression(rng, 2)])
            seen = rng.choice(["", "|tojson", "|string|length", "|length", "|pprint"])
            begin = rng.choice(["'ab'", "[1]", "1", "2.5", expression(rng, 2)])
            return statement(f"set ns = namespace(x={begin})") + statement(f"for i in range({rng.choice([3, 40, 99999])})") + \
                statement(f"set ns.x = {grown}") + statement("endfor") + show(f"ns.x{seen}")
        case 6:
            again = rng.choice(["", "{{ f(x) }}", "{{ f(x) }}{{ f(x) }}", "{{ caller() }}"])
            return statement("macro f(x)") + inside() + again + statement("endmacro") + show(f"f({expression(rng, 2)})") + inside()
        case 7:
            return statement("set x") + inside() + statement("endset") + inside()
        case 8:
            return statement(f"filter {rng.choice(FILTERS)}") + inside() + statement("endfilter")
        case 9:
            return statement(f"call f({expression(rng, 2)})") + inside() + statement("endcall")
        case 10:
            return statement("generation") + inside() + statement("endgeneration")
        case 11 if rng.random() < 0.3:
            other, end = rng.choice([("include", ""), ("extends", ""), ("import", "as x"), ("from", "import x")])
            return statement(f"{other} {expression(rng, 2)} {end}")
        case 12 if rng.random() < 0.5:
            n = rng.choice([5, 200, 3000, 30_000])
            return rng.choice(["{{ " + "(" * n + "1" + ")" * n + " }}", "{{ " + "-" * n + "1 }}", "{% if 1 %}" * n + "{% endif %}" * n,
                               "{{ " + "1 + " * n + "1 }}", "{{ x" + ".a" * n + " }}", "{{ " + "[" * n + "]" * n + " }}",
                               "{{ x" + "|string" * n + " }}", "{% for i in [1] %}" * (n // 10) + "x" + "{% endfor %}" * (n // 10)])
        case 13:
            return statement(f"block b{rng.randrange(10**6)}") + inside() + statement("endblock") + show("self.b()")
        case _:
            return inside() + inside()


def show(text):
    return "{{ " + text + " }}"


def statement(text):
    return "{% " + text + " %}"


CONVERSATIONS = [[{"role": "user", "content": "tea"}], [{"role": "system", "content": "s"}, {"role": "user", "content": "hi " * 50}],
                 [{"role": "user", "content": "tea"}, {"role": "assistant", "content": "It is"}]]
WATCHED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "urllib.", "pty.", "tempfile.")


def render_watched(template):
    """Render a template in all ways. Raises Fault if it reads a file or a secret, changes its inputs, or leaves limits behind."""
    import resource
    import signal

    from minialign import tokenizer as module

    module.TEMPLATE_SECONDS = 1
    tokenizer = load_tokenizer(tokenizer_folders()[1])
    before, outcomes, events = resource.getrlimit(resource.RLIMIT_AS), [], []

    def watch(event, arguments):
        if WATCHING and (event.startswith(WATCHED) or event == "open" and not str(arguments[0]).startswith(("/proc/self/statm", "/usr",
                                                                                                            "<"))):
            events.append(f"{event} {str(arguments)[:100]}")

    sys.addaudithook(watch)
    os.environ["FUZZ_SECRET"] = SECRET
    for conversation in CONVERSATIONS:
        tokenizer.chat_template, given = template, json.dumps(conversation)
        began = time.monotonic()
        WATCHING.append(1)
        try:
            outcome, text = refused_or(lambda c=conversation: render_chat(tokenizer, c))
        finally:
            WATCHING.clear()
        outcomes.append("refused" if outcome == "out of memory" else outcome)  # (the bound on templates is small)
        if SECRET in (text or ""):
            raise Fault("the template reads the environment")
        if events and not all("linecache" in event or ".py" in event for event in events):
            raise Fault(f"the template does {events[0]}")
        if json.dumps(conversation) != given:
            raise Fault("the template changes the messages")
        if time.monotonic() - began > 8:
            raise Fault(f"it takes {time.monotonic() - began:.0f} s with a limit of 1 s")
        if resource.getrlimit(resource.RLIMIT_AS) != before or signal.getitimer(signal.ITIMER_REAL)[0]:
            raise Fault("a limit is left behind")
    tokenizer.chat_template = "{{ messages[0].content }}"
    if render_chat(tokenizer, CONVERSATIONS[0]) != "tea":
        raise Fault("the next conversation does not render")
    return outcomes[0]


WATCHING = []


def fuzz_templates(seed, rounds):
    """Random programs in jinja's grammar: rendered, or refused in a sentence within seconds. None reads or changes anything else."""
    tokenizer_folders()

    def one(rng, place):
        template = program(rng)
        if rng.random() < 0.05:
            template = edited_bytes(rng, TEMPLATE.encode()).decode("utf-8", "replace")
        return render_watched(template)

    return fuzz("templates", seed, rounds, one, batch=20)


# ----------------------------------------------------------------------------------------------------------- command lines

DATA = {"demos": [{"prompt": f"ask for {w}: ", "completion": f"please a {w}"} for w in ("tea", "soap", "rice", "salt") * 3],
        "pairs": [{"prompt": f"ask for {w}: ", "chosen": f"please a {w}", "rejected": f"a {w} now"} for w in ("tea", "soap", "rice",
                                                                                                              "salt") * 3]}
COMMANDS = ("sample", "evaluate", "generate", "plot", "show", "microscope", "demo", "stories260K")
LONG = "9" * 5000
TEXT_VALUES = ["", " ", "--", "-", "-1", "nan", "NaN", "inf", "-inf", "1e308", "-1e308", "1e-300", "0", "1", "0.5", "2", str(2**63),
               str(2**64), "1" * 30,
               LONG, "1e999", "0x10", "1_000", "٣", "True", "none", "x" * 300, "x" * 5000, "\udce9", "a\nb", "\t", "é", "a=b", "%s%n", "{}",
               "*", "~", ".",
               "..", "/", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/nowhere/at/all", "owner/name", "a/b/c", "a:b",
               "http://[::1", "runs",
               "policy", "policy/config.json", "policy/model.safetensors", "policy/tokenizer.json", "demos.jsonl", "pairs.jsonl",
               "empty.jsonl", "binary",
               "fifo", "locked", "loop", "rm", "run", "run/final", "run/checkpoints", "adapter", "policy:train", "demos.jsonl:train",
               "rewards.py:f",
               "rewards.py", "rewards.py:", ":f", "rewards.py:nothing", "policy.py:f", "new", "builtin"]
WORDS = {"device": ["cpu", "meta", "cuda:99", "cuda", "xla", "mps", "cpu:7", "hpu", "cuda:-1", "auto", "vulkan", "cpu:x"],
         "dtype": ["float32", "float64", "bfloat16", "mixed", "float16", "int8"], "schedule": ["linear", "cosine", "step"],
         "optimizer": ["adamw", "rmsprop", "sgd"], "log": ["wandb", "tensorboard", "x"], "combine": ["mean", "min", "warm", "max"],
         "reward": ["length:9", f"length:{LONG}", "length:٣", "length:0", "length:", "regex:(", "regex:(a+)+$", "format:[",
                    "regex:" + "(" * 500, "lexicon:,-",
                    "lexicon:a,-b", "exact_match", "builtin", "rewards.py:f", "rewards.py:raises", "rewards.py:nan", "rm", "policy",
                    "length:1e3"],
         "keep": ["all", "best", "above:nan", "above:", "tilt:0", "tilt:1e-300", "bradley_terry:1", "best_worst", f"above:{LONG}",
                  "tilt:-1", "x:1"],
         "mode": ["accumulate", "x"], "anchor": ["current", "x"], "parallel": ["fsdp", "ddp", "x"], "value": ["policy", "rm", "x"],
         "quantiles": ["0.5", "2"]}
# Flags for which a large number is work that was asked for, or memory that the sentence says is not there.
AMOUNTS = {"steps", "epochs", "rounds", "n", "batch_size", "group_size", "max_new", "layers", "width", "heads", "vocab", "grow_prompts",
           "grows",
           "lora", "max_len", "seeds", "workers", "micro_batch", "show", "last", "quantiles", "reward_limit", "eval_batch", "answers",
           "rows"}


@functools.cache
def command_folder():
    """The current folder of the commands: small models, data, and things that are not what a flag expects."""
    import datasets  # noqa: F401  imports, before the fork
    import huggingface_hub  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    place = scratch() / "commands"
    place.mkdir()
    torch.manual_seed(4)
    tokenizer = builtin_tokenizer()
    model = GPT(GPTConfig.tiny(tokenizer.vocab_size, n_layer=1, n_embd=8, n_head=1, ffn_dim=8, max_len=64))
    save_pretrained(model, place / "policy", tokenizer)
    save_pretrained(model.with_scalar_head(), place / "rm", tokenizer)
    save_pretrained(model, place / "runs/builtin-base/final", tokenizer)  # so that no command trains it
    save_adapter(inject(load_pretrained(place / "policy"), 1), place / "adapter", str(place / "policy"))
    for name, rows in DATA.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "empty.jsonl").touch()
    (place / "binary").write_bytes(bytes(range(256)) * 20)
    os.mkfifo(place / "fifo")
    (place / "loop").symlink_to("loop")
    (place / "locked").mkdir(mode=0o500)
    (place / "rewards.py").write_text("def f(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
                                      "def raises(prompts, completions):\n    raise OSError('no')\n"
                                      "def nan(prompts, completions):\n    return [float('nan')] * len(completions)\n")
    code, said, _ = called(["sft", *base_flags("sft"), "--out", "run"], place)
    assert code == 0, said
    return place


def base_flags(command):
    """Flags with which a command ends within a second."""
    from tests.conftest import LEARNING, METHODS, ONLINE, PREFERRING, SELECTING

    if command not in METHODS:
        return {"sample": ["--policy", "policy", "--max_new", "3"], "show": ["run"], "plot": ["run"],
                "microscope": ["dpo", *base_flags("dpo"), "--page", "p.html"],
                "evaluate": ["--policies", "policy", "--pairs", "pairs.jsonl", "--max_new", "3", "--held_out", "0.9",
                             "--max_len", "48"],
                "generate": ["--policy", "policy", "--prompts", "demos.jsonl", "--reward", "length:9", "--max_new", "3", "--out",
                             "made.jsonl"],
                "stories260K": ["--bin", "binary", "--tokenizer", "binary", "--out", "stories"], "demo": ["--no-toy", "--seeds",
                                                                                                          "0"]}[command]
    flags = ["--policy", "policy", "--batch_size", "4", "--held_out", "0.2", "--device", "cpu", "--steps", "1"]
    if command in ONLINE + SELECTING:
        flags += ["--prompts", "demos.jsonl", "--reward", "length:9"]
    elif command == "kto":
        flags += ["--feedback", "pairs.jsonl", "--max_len", "48"]
    elif command in ("reward_model", *PREFERRING):
        flags += ["--pairs", "pairs.jsonl", "--max_len", "48"]
    else:
        flags += ["--demos", "demos.jsonl", "--max_len", "48"]
    flags += [] if command == "reward_model" else ["--max_new", "3"]
    flags += ["--rounds", "1", "--reward_share", "1.0"] if command in LEARNING else []
    return flags + (["--quantiles", "0.5", "--grow_prompts", "4"] if command == "rest" else [])


def known_commands():
    from tests.conftest import METHODS

    return (*METHODS, *COMMANDS)


def furnish(own):
    """Make a folder into one in which a command can run: links to all that command_folder() has."""
    for file in command_folder().iterdir():
        if file.name[0] != ".":
            (own / file.name).symlink_to(file)
    return own


@functools.cache
def fields_of(command):
    import dataclasses
    import importlib
    import typing

    from minialign import __main__ as front_door
    from tests.conftest import METHODS

    own = {"sample": front_door.SampleConfig, "plot": front_door.PlotConfig, "show": front_door.ShowConfig}
    if command == "microscope":
        return {"page": str, "rows": int, **fields_of("dpo")}
    module = f"minialign.methods.{command}" if command in METHODS else f"minialign.{command}"
    config = own.get(command) or importlib.import_module(module).Config
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def odd_flags(rng, command):
    """(one to three random flags with their values, whether one of them asks for much work)."""
    words, much = [], False
    fields = fields_of(command)
    for name in rng.sample([*fields], min(len(fields), rng.choice([1, 1, 1, 2, 3]))):
        kind = str(fields[name])
        if "bool" in kind:
            words += [rng.choice([f"--{name}", f"--no-{name}", f"--{name}=1"])]
            much |= name in ("compile", "toy")
            continue
        pool = WORDS.get(name, []) * 3 + TEXT_VALUES
        if "int" in kind or "float" in kind:
            pool = [value for value in TEXT_VALUES[:28]] * 2 + TEXT_VALUES
        value = rng.choice(pool)
        much |= name in AMOUNTS
        flag = name.replace("_", "-") if rng.random() < 0.2 else name
        several = "list" in kind and rng.random() < 0.3
        words += [f"--{flag}={value}"] if rng.random() < 0.2 else [f"--{flag}", value, *([rng.choice(pool)] if several else [])]
    if rng.random() < 0.05:
        words.insert(rng.randrange(len(words) + 1), rng.choice(["--", "-", "", "--x", "-x", "--help", "a", "--steps", "\udce9", "=",
                                                                "--="]))
    return words, much


def called(words, place, *, seconds=fuzzing.SECONDS, memory=fuzzing.BYTES, before=None):
    """(exit code or None if it was killed, stderr, stdout) of the front door in a fork, in the folder `place`."""
    out, err = place / ".out", place / ".err"
    pid = os.fork()
    if not pid:
        code = 99
        try:
            os.chdir(place)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            for stream, file in ((1, out), (2, err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.stdout, sys.stderr = open(1, "w", closefd=False, encoding="utf-8"), open(2, "w", closefd=False, encoding="utf-8")
            offline()
            os.environ["XDG_CACHE_HOME"] = str(scratch() / "cache")
            fuzzing.limit_memory(memory)
            from minialign.__main__ import main

            if before is not None:
                before()
            code = ended(main, words)
            for stream in (sys.stderr, sys.stdout):  # (a reward may have closed one)
                if not stream.closed:
                    stream.flush()
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while (status := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    if status[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    said = [file.read_text(encoding="utf-8", errors="replace") if file.exists() else "" for file in (err, out)]
    return (None if status[0] == 0 else os.waitstatus_to_exitcode(status[1])), *said


def ended(main, words):
    try:
        main(words)
        return 0
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99


def judged(code, said, printed, much=False):
    """The outcome of a command, by what the front door promises of its exit code and its last line."""
    last = (said.strip().splitlines() or [""])[-1]
    if "Traceback" in said + printed:
        place = [line.strip() for line in said.splitlines() if line.strip().startswith("File ")][-2:]
        raise Fault(f"a traceback: {last[:300]} at {' '.join(reversed(place))[:300]}")
    if code is None:
        if much:
            return "much work"
        raise Fault(f"it hangs; stderr: {said[-200:]!r}")
    if code not in (0, 1, 2):
        raise Fault(f"exit code {code}; stderr: {said[-300:]!r}")
    if code == 0:
        return "accepted"
    if not last:
        raise Fault(f"exit code {code} without a word")
    sentence(last)
    if code == 2 and "there is not enough memory" in last and not much:
        raise Fault(f"more than 2 GB: {last[:200]}")
    return {1: "not finite", 2: "refused"}[code]


def fuzz_command_lines(seed, rounds):
    """Random flags of all methods and commands: exit code 0, 1 or 2, and one line that says why."""
    from tests.conftest import METHODS

    command_folder()
    for command in (*METHODS, *COMMANDS):
        fields_of(command)
    def one(rng, own):
        command = rng.choice([*METHODS, *COMMANDS])
        base, (words, much) = base_flags(command), odd_flags(rng, command)
        if command == "demo" and not any(word.startswith("--seeds") for word in words):
            base = [*base, "--workers", "1"]
        furnish(own)
        if any("--resume" in word for word in words) and rng.random() < 0.7:
            base = []
        argv = [command, *base, *words]
        try:
            return judged(*called(argv, own), much=much)
        except Fault as error:
            raise Fault(f"{shown(command, words)}: {error}") from None

    return fuzz("command_lines", seed, rounds, one, seconds=60, memory=2**33)


def shown(command, words):
    return f"[{command} … {' '.join(repr(word) if len(word) < 60 else repr(word[:20]) + f'({len(word)})' for word in words)}]"


# ----------------------------------------------------------------------------------------------------------------- rewards

ANSWERS = ["[1.0] * n", "[0.5, -0.5] * n", "[1.0] * (n - 1)", "[]", "[float('nan')] * n", "[float('inf')] * n", "[1e300] * n",
           "[10**400] * n", "1.0",
           "None", "'abcd'", "b'abcd'", "['1.0'] * n", "[None] * n", "[[1.0]] * n", "[True] * n", "{i: 1.0 for i in range(n)}",
           "set(range(n))",
           "(1.0 for _ in range(n))", "iter([1.0] * n)", "range(n)", "map(len, completions)", "torch.ones(n)", "torch.ones(n, 1)",
           "torch.ones(1, n)",
           "torch.ones(n, dtype=torch.bfloat16)", "torch.ones(n, dtype=torch.int8)", "torch.ones(n, dtype=torch.bool)", "torch.tensor(1.0)",
           "torch.ones(n, dtype=torch.complex64)", "torch.ones(n, requires_grad=True)", "torch.ones(n, device='meta')",
           "torch.ones(n).to_sparse()",
           "torch.full((n,), float('nan'))", "numpy.ones(n)", "numpy.ones((n, 1))", "numpy.array(['a'] * n)",
           "numpy.array([1.0, None] * n)[:n]",
           "numpy.ma.masked_array([1.0] * n, True)", "[numpy.float16(1)] * n", "[torch.tensor(1.0)] * n", "[torch.tensor([1.0])] * n",
           "[torch.ones(2)] * n",
           "[fractions.Fraction(1, 3)] * n", "[decimal.Decimal('NaN')] * n", "[1j] * n", "Bad()", "[Bad()] * n", "f",
           "f(prompts, completions)",
           "type('L', (list,), {'__len__': lambda self: 10**9})([1.0] * n)", "Endless()", "itertools.repeat(1.0)",
           "collections.deque([1.0] * n)",
           "[1.0] * 10**10", "torch.ones(10**11)", "'x' * 10**11", "memoryview(b'abcd')", "NotImplemented", "...",
           "datetime.datetime.now()"]
DEEDS = ["", "", "", "raise ValueError('no')", "raise ValueError('two\\nlines')", "raise ValueError('x' * 10**6)", "raise SystemExit(3)",
         "raise SystemExit",
         "sys.exit('bye')", "raise KeyboardInterrupt", "raise GeneratorExit", "raise StopIteration", "raise BaseException('b')",
         "raise MemoryError",
         "raise RecursionError", "raise OSError(28, 'No space left on device')", "raise BrokenPipeError", "raise FloatingPointError('f')",
         "assert False",
         "raise UnicodeDecodeError('utf-8', b'', 0, 1, 'x')", "raise ExceptionGroup('g', [ValueError()])", "raise Silent",
         "raise warnings.WarningMessage",
         "raise torch.OutOfMemoryError('CUDA out of memory')", "raise RuntimeError(\"can't allocate memory\")",
         "raise type('E', (Exception,), {})()",
         "print('x' * 10**5)", "print('\\ud800')", "sys.stdout.close()", "sys.stdout = None", "warnings.warn('w')",
         "os.close(1)",
         "def g(): return g()\n    g()", "prompts.clear()", "completions.append('x')", "completions[0] = 5", "del prompts[0]",
         "prompts[0] = None",
         "torch.manual_seed(5)", "random.seed(5)", "torch.rand(3)", "torch.set_grad_enabled(False)",
         "torch.set_default_dtype(torch.float64)",
         "torch.set_num_threads(2)", "signal.signal(signal.SIGALRM, signal.SIG_IGN)", "signal.alarm(0)",
         "signal.setitimer(signal.ITIMER_REAL, 0)",
         "time.sleep(30)", "while True: pass", "re.match('(a+)+$', 'a' * 40 + 'b')", "sum(range(10**10))", "9 ** (10 ** 8)",
         "os.chdir('/')",
         "try:\n        time.sleep(30)\n    except Exception: pass", "try:\n        time.sleep(30)\n    except BaseException: pass",
         "threading.Thread(target=time.sleep, args=(0.1,)).start()", "os.environ.clear()", "sys.path.clear()", "gc.disable()",
         "sys.setrecursionlimit(50)",
         "importlib.reload(json)", "if os.fork() == 0: os._exit(0)", "if os.fork() == 0: raise ValueError",
         "subprocess.run(['true'])", "open('/nowhere/x')", "json.loads('{')", "[0][1]", "1 / 0", "undefined",
         "torch.ones(2) @ torch.ones(3)"]
HEADS = ["def f(prompts, completions):", "def f(prompts, completions):", "def f(prompts, completions):",
         "def f(prompts, completions, **kwargs):",
         "def f(completions, **kwargs):", "def f(prompts, completions, answer):", "def f(prompts, completions, answer=None):",
         "def f(*args):",
         "async def f(prompts, completions):", "def f():", "def f(a, b):", "def f(a, b, c):",
         "@functools.cache\ndef f(prompts, completions):",
         "@functools.wraps(len)\ndef f(prompts, completions):", "def f(prompts, /, completions):", "def f(*, prompts, completions):"]
IMPORTS = """
import collections, datetime, decimal, fractions, functools, gc, importlib, itertools, json, os, random, re, signal, subprocess, sys
import threading, time, warnings
import numpy, torch
"""
CLASSES = """
class Bad:
    def __iter__(self): raise ValueError("iter")
    def __float__(self): raise ValueError("float")
    def __repr__(self): raise ValueError("repr")
    def __len__(self): raise ValueError("len")
class Endless:
    def __iter__(self):
        while True: yield 1.0
class Silent(Exception):
    def __str__(self): raise ValueError("str")
"""
TOPS = ["", "", "", "", "", "", "raise ValueError('import')", "sys.exit(0)", "def (", "\0", "f = 5", "del f", "f = len", "f = print",
        "f = Bad", "f = Bad()",
        "f = functools.partial(f)", "f = type('C', (), {'__call__': lambda self, prompts, completions: [1.0] * len(prompts)})()",
        "# é \udce9",
        "raise KeyboardInterrupt", "f = torch.nn.Identity()", "while True: pass", "os._exit(0)", "f.__signature__ = 5", "raise Silent"]


def random_reward(rng):
    """The text of a reward file: what it does at import, what f does in some of its calls, what it returns."""
    deed, answer, top = rng.choice(DEEDS), rng.choice(ANSWERS), rng.choice(TOPS)
    if rng.random() < 0.6:
        answer = "[float(len(c)) for c in completions]"
    when = rng.choice(["True", "True", "CALLS[0] > 1", "CALLS[0] == 2", "len(completions) == 1", "len(completions) > 3"])
    body = "    CALLS[0] += 1\n    n = len(completions)\n"
    body += f"    if not ({when}): return [float(len(c)) for c in completions]\n    {deed or 'pass'}\n"
    return IMPORTS + CLASSES + f"CALLS = [0]\n{rng.choice(HEADS)}\n{body}    return {answer}\n{top}\n", top, deed


def fuzz_rewards(seed, rounds):
    """A random function as --reward: the run ends, skips steps or refuses it, within its limit, with finite weights."""
    place = command_folder()

    def one(rng, own):
        text, top, deed = random_reward(rng)
        for file in ("policy", "demos.jsonl"):
            (own / file).symlink_to(place / file)
        (own / "mine.py").write_bytes(text.encode("utf-8", "surrogateescape"))
        method = rng.choice(["rloo", "reinforce", "best_of_n"])
        flags = [*base_flags(method), "--reward", "mine.py:f", "--steps", "2", "--reward_limit", "0.5", "--out", "run", "--log_every", "1"]
        code, said, printed = called([method, *flags], own)
        what = f"[{method}: {top!r}, {deed!r}, {text.split('return ')[-1].splitlines()[0]!r}]"
        interrupts = "KeyboardInterrupt" in top + deed and code == 130
        if top in ("os._exit(0)", "while True: pass") or interrupts:
            return "ends the process itself"
        if code == 0 and not (own / "run/final/config.json").is_file() and "fork" not in deed:
            raise Fault(f"{what}: exit code 0 and no model; stderr {said[-200:]!r}")
        try:
            outcome = judged(code, said, printed if "print" not in deed else "")
        except Fault as error:
            raise Fault(f"{what}: {error}") from None
        if code == 0:
            for name, tensor in load_file(own / "run/final/model.safetensors").items():
                if not tensor.isfinite().all():
                    raise Fault(f"{what}: {name} is not finite")
            if "skipped" in said and "skipped: the reward" in said:
                outcome += ", steps skipped"
        return outcome

    return fuzz("rewards", seed, rounds, one, seconds=60, memory=2**33)


# ------------------------------------------------------------------------------------------------------------- run folders

RUNS = {"sft": ["--demos", "demos.jsonl"], "rft": ["--demos", "demos.jsonl", "--rounds", "2", "--reward_share", "0.5"],
        "rloo": ["--prompts", "demos.jsonl", "--reward", "length:9"], "dpo": ["--pairs", "pairs.jsonl", "--lora", "2", "--snapshots"]}


@functools.cache
def broken_run(method):
    """(the folder of an unfinished run of 5 steps with a checkpoint after step 3, the results of the unbroken run)."""
    from tests.killing import result_of

    place = command_folder()
    flags = [*base_flags(method), *RUNS[method], "--steps", "5", "--save_every", "1", "--eval_every", "2", "--out"]
    code, said, _ = called([method, *flags, f"whole-{method}"], place)
    assert code == 0, said
    code, said, _ = called([method, *flags, f"run-{method}"], place, before=lambda: dies_in_step(4))
    assert code == 7 and not (place / f"run-{method}/final").exists(), said
    expected = result_of(place / f"whole-{method}")
    code, said, _ = called([method, "--resume", f"run-{method}"], copied(place, method))
    assert code == 0 and result_of(place / f"again-{method}/run-{method}") == expected, said
    return place / f"run-{method}", expected


def copied(place, method):
    """A folder with a copy of the unfinished run and links to its inputs."""
    again = place / f"again-{method}"
    again.mkdir(exist_ok=True)
    shutil.copytree(place / f"run-{method}", again / f"run-{method}")
    for name in ("policy", "demos.jsonl", "pairs.jsonl"):
        (again / name).symlink_to(place / name)
    return again


def dies_in_step(step):
    """In this process a run ends without a word when this step is to begin."""
    from minialign.engine import run

    def begin(self, at):
        if at == step - 1:
            os._exit(7)
        original(self, at)

    original, run.Run.begin = run.Run.begin, begin


def damage_run(rng, folder):
    """One or two random edits of a run folder. The names of the files that changed."""
    names = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        path = rng.choice(files if rng.random() < 0.5 else [file for file in files if file.suffix in (".json", ".jsonl")] or files)
        names.append(str(path.relative_to(folder)))
        whole = path.read_bytes()
        match rng.randrange(12):
            case 0 | 1:
                path.write_bytes(edited_bytes(rng, whole))
            case 2 | 3 | 4 if path.suffix == ".json":
                value, _ = edited_json(rng, json.loads(whole))
                write_json(path, value)
            case 2 | 3 | 4 if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in whole.splitlines()]
                edited, _ = edited_json(rng, rows)
                path.write_bytes(b"".join(json.dumps(row).encode("utf-8", "surrogatepass") + b"\n" for row in edited))
            case 5:
                path.write_bytes(whole[: rng.randrange(len(whole) + 1)])
            case 6:
                path.unlink()
            case 7:
                path.unlink()
                path.mkdir()
            case 8:
                path.write_bytes(rng.choice(files).read_bytes())
            case 9:
                path.write_bytes(b"")
            case 10:
                path.unlink()
                rng.choice([lambda p: p.symlink_to("/dev/null"), lambda p: p.symlink_to("nowhere"), os.mkfifo,
                            lambda p: p.symlink_to(p)])(path)
            case 11:
                shutil.rmtree(rng.choice([p for p in sorted(folder.rglob("*")) if p.is_dir()]))
    return names


def fuzz_run_folders(seed, rounds, methods=tuple(RUNS)):
    """An unfinished run with edited files: --resume refuses, or gives the unbroken run bit for bit. plot and show refuse or print.

    What is edited in the two logs themselves stays as it was edited.
    """
    from tests.killing import result_of

    for method in methods:
        broken_run(method)
    place = command_folder()
    def one(rng, own):
        method = rng.choice(methods)
        start, expected = broken_run(method)
        folder = own / start.name
        shutil.copytree(start, folder)
        for name in ("policy", "demos.jsonl", "pairs.jsonl"):
            (own / name).symlink_to(place / name)
        names = damage_run(rng, folder)
        try:
            for command in ("plot", "show"):
                if rng.random() < 0.4:
                    judged(*called([command, folder.name], own))
            code, said, printed = called([method, "--resume", folder.name], own)
            outcome = judged(code, said, printed)
            if code:
                return outcome
            found = result_of(folder)
        except Fault as error:
            raise Fault(f"[{method}, {names}]: {error}") from None
        differ = [key for key in expected if found.get(key) != expected[key]]
        logs = [{"metrics.jsonl": "metrics", "samples.jsonl": "samples"}.get(name) for name in names]
        if not differ:
            return "bitwise"
        if set(differ) <= {*logs}:
            return "an edited log"
        if "skipped" in said or "note" in said:
            return "said so"
        raise Fault(f"[{method}, {names}]: other {differ[:3]}, and not a word: {said[-200:]!r}")

    return fuzz("run_folders", seed, rounds, one, seconds=90, memory=2**33)


# ------------------------------------------------------------------------------------------- one value at a time, with examples

JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(max_size=20)
    | strategies.sampled_from([2**31, 2**63, 2**64, 10**400, "x" * 10_000, "\ud800", "(", "1e-5"]),
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=3),
    max_leaves=6)
QUICK = settings(derandomize=True, print_blob=True, deadline=None, max_examples=8, database=None, suppress_health_check=list(HealthCheck))
THOROUGH = settings(QUICK, max_examples=2000)


def examples(*names, cases):
    """@example for each of the cases. They were faults once, and are tried before anything else."""
    def decorate(test):
        for case in reversed(cases):
            test = example(**dict(zip(names, case, strict=True)))(test)
        return test

    return decorate


def rope(**changes):
    return "rope_scaling", ROPES[2] | changes


CONFIG_FAULTS = [
    ("llama", *rope(factor="8")), ("llama", *rope(factor=None)), ("llama", *rope(factor=[1, 2])), ("llama", *rope(factor=10**400)),
    ("llama", *rope(low_freq_factor=None)), ("llama", *rope(low_freq_factor={})), ("llama", *rope(high_freq_factor=[])),
    ("llama", *rope(original_max_position_embeddings="16")), ("llama", *rope(original_max_position_embeddings=10**30)),
    ("llama", *rope(low_freq_factor=10**400)), ("llama", *rope(high_freq_factor=10**400)), ("llama", "rope_scaling",
                                                                                            {"rope_type": "x" * 10_000}),
    ("llama", "rms_norm_eps", "1e-6"), ("llama", "rms_norm_eps", []), ("gpt2", "layer_norm_epsilon", None), ("gpt_neox", "layer_norm_eps",
                                                                                                             {}),
    ("mistral", "sliding_window", 2**63), ("mistral", "sliding_window", 10**30), ("llama", "num_key_value_heads", [1] * 5000),
    ("llama", "hidden_act", "x" * 10_000), ("llama", "model_type", "x" * 10_000),
]
KEYS = sorted({*UNSAID, "model_type", *(key for family in SMALL.values() for key in family)})
CONFIGS = given(family=strategies.sampled_from(FAMILIES), key=strategies.sampled_from(KEYS), value=JSON)


def any_config(family, key, value):
    """A config.json with one other value is refused in a sentence, or gives a model that runs."""
    changed = json.loads(json.dumps(config_folder(family)[1] | {key: value}))

    def run():
        config = GPTConfig.from_hf(changed)
        with torch.device("meta"):
            size = sum(p.numel() for p in GPT(config).parameters()) if config.n_layer < 20 else 10**9
        if size < 10**6:
            with torch.no_grad():
                GPT(config)(torch.tensor([[1, 2, 3]]))

    return refused_or(run)[0]


@QUICK
@CONFIGS
@examples("family", "key", "value", cases=CONFIG_FAULTS)
def test_any_value_in_a_config(family, key, value):
    any_config(family, key, value)


@pytest.mark.long
@THOROUGH
@CONFIGS
def test_many_values_in_a_config(family, key, value):
    any_config(family, key, value)


WRONG = [("llama", "is_causal", []), ("qwen3", "is_causal", 0), ("llama", *rope(high_freq_factor=-0.5)),
         ("mistral", *rope(low_freq_factor=-(2**63))), ("llama", *rope(high_freq_factor=0.5))]


@pytest.mark.parametrize(("family", "key", "value"), WRONG)
def test_values_that_transformers_reads_otherwise_are_refused(family, key, value):
    """The model would be computed slightly wrong."""
    assert any_config(family, key, value) == "refused"


def changed_folder(folder, name, content):
    """A new folder with links to the files of another one, but for one file. content: bytes, or a value to write as JSON."""
    place = Path(tempfile.mkdtemp(dir=scratch()))
    for file in folder.iterdir():
        if file.name != name:
            os.link(file, place / file.name)
    (place / name).write_bytes(content) if isinstance(content, bytes) else write_json(place / name, content)
    return place


ENTRY = {"content": "<s>", "special": True}
TOKENIZER_FAULTS = [
    ("tokenizer_config.json", "added_tokens_decoder", value) for value in (
        {" ": ENTRY}, {"é": ENTRY}, {"x" * 300: ENTRY}, {"1": {}}, {"1": None}, {"1": "a"}, {"1": {"content": {}}},
        {"1": {"content": None}},
        {"1": ENTRY | {"lstrip": {}}}, {"1": ENTRY | {"special": "yes"}}, {"1": {"content": "\ud800"}}, [1], 5, "a", [[1, 2]])
] + [("tokenizer_config.json", name, value) for name in ("extra_special_tokens", "additional_special_tokens")
     for value in (5, [[]], [{}], {"a": []}, {"a": {"content": []}}, [None], True, ["\ud800"])] + [
    ("added_tokens.json", "a", value) for value in ("x", None, [], {}, 1.5, 2**64)
] + [("tokenizer_config.json", "eos_token", "x" * 10_000), ("tokenizer_config.json", "anything", "\ud800"),
     ("tokenizer_config.json", "eos_token", ["a"]), ("tokenizer_config.json", "tokenizer_class", "x" * 10_000),
     ("generation_config.json", "eos_token_id", 2**63), ("generation_config.json", "eos_token_id", [-(2**63) - 1]),
     ("generation_config.json", "eos_token_id", 2**40), ("generation_config.json", "eos_token_id", -1),
     ("generation_config.json", "eos_token_id", True), ("special_tokens_map.json", "eos_token", {"content": []}),
     ("tokenizer_config.json", "unk_token", {}), ("tokenizer_config.json", "chat_template", {"a": 1})]
SETTINGS = given(file=strategies.sampled_from(FILES[4:]), value=JSON, key=strategies.sampled_from(
    ["added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "eos_token", "bos_token", "pad_token", "unk_token", "a",
     "tokenizer_class", "add_bos_token", "add_prefix_space", "legacy", "chat_template", "split_special_tokens", "eos_token_id",
     "model_max_length"]))


def any_setting(file, key, value):
    """A tokenizer with one other value in a JSON file beside tokenizer.json is refused in a sentence, or a run works with it."""
    folder = tokenizer_folders()[2]
    content = json.loads((folder / file).read_text())
    if file == "tokenizer_config.json" and key in ("extra_special_tokens", "additional_special_tokens"):
        content = {name: old for name, old in content.items() if name != "extra_special_tokens"}
    if file == "added_tokens.json":  # it is read where nothing else names the tokens
        (place := changed_folder(folder, file, content | {key: value}))
        own = json.loads((folder / "tokenizer_config.json").read_text())
        own.pop("added_tokens_decoder")
        (place / "tokenizer_config.json").unlink()
        write_json(place / "tokenizer_config.json", own)
    else:
        place = changed_folder(folder, file, content | {key: value})
    try:
        return refused_or(lambda: use_tokenizer(place))[0]
    finally:
        shutil.rmtree(place)


@QUICK
@SETTINGS
@examples("file", "key", "value", cases=TOKENIZER_FAULTS)
def test_any_value_beside_a_tokenizer(file, key, value):
    any_setting(file, key, value)


@pytest.mark.long
@THOROUGH
@SETTINGS
def test_many_values_beside_a_tokenizer(file, key, value):
    any_setting(file, key, value)


MODULE = "model.layers.0.mlp.up_proj"
ADAPTER_FAULTS = [
    *[("lora_alpha", value) for value in (None, "8", {}, [8], 10**400, 0, float("nan"), float("inf"), True)],
    *[(name, value) for name in ("rank_pattern", "alpha_pattern")
      for value in ("a", 5, True, [1], 1.5, {"(": 2}, {MODULE: None}, {MODULE: "2"}, {MODULE: []}, {MODULE: 10**400})],
    *[("r", value) for value in (None, "2", [], 2.5, 10**400)], ("base_model_name_or_path", "x" * 300), ("base_model_name_or_path", "\0"),
    ("base_model_name_or_path", "\ud800"), ("peft_type", "x" * 10_000), ("use_dora", [1] * 5000), ("init_lora_weights", []),
    ("init_lora_weights", "x" * 10_000), ("revision", "x" * 10_000), ("x" * 10_000, True),
]
ADAPTERS = given(value=JSON, key=strategies.sampled_from(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "target_modules", "fan_in_fan_out", "peft_type", "bias",
     "init_lora_weights", "revision", "use_rslora", "layers_to_transform", "exclude_modules", "modules_to_save", "task_type"]))


def any_adapter(key, value):
    """An adapter with one other value in adapter_config.json is refused in a sentence, or gives a model that runs and can be saved."""
    offline()
    folder = adapter_folder("llama")
    config = json.loads((folder / "adapter_config.json").read_text())
    place = changed_folder(folder, "adapter_config.json", config | {key: value})

    def run():
        model, _, _ = load_model(place)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
        save_adapter(model, place / "again", "base")

    try:
        return refused_or(run)[0]
    finally:
        shutil.rmtree(place)


@QUICK
@ADAPTERS
@examples("key", "value", cases=ADAPTER_FAULTS)
def test_any_value_in_an_adapter_config(key, value):
    any_adapter(key, value)


@pytest.mark.long
@THOROUGH
@ADAPTERS
def test_many_values_in_an_adapter_config(key, value):
    any_adapter(key, value)


@pytest.mark.parametrize(("key", "value"), [("target_modules", ["q_proj"]), ("target_modules", "nothing"), ("exclude_modules", ["q_proj"]),
                                            ("layers_to_transform", [1]), ("target_modules", []), ("target_modules", None)])
def test_an_adapter_of_a_module_that_its_config_leaves_out_is_refused(key, value):
    """PEFT leaves the tensors of such a module unused, with a warning."""
    assert any_adapter(key, value) == "refused"


LOGS = [("plot", {"loss": value}) for value in ({"a": 1}, 10**400)] + [("plot", {"step": 10**400, "loss": 1.0})] + [
    ("show", row) for row in ({}, {"prompt": "a"}, {"prompt": "a", "completion": "b"}, {"prompt": 1, "completion": [], "finished": None},
                              {"prompt": "\ud800", "completion": "b", "finished": True})]


@pytest.mark.parametrize(("command", "row"), LOGS, ids=str)
def test_an_edited_log_is_plotted_or_refused_in_one_sentence(command, row, tmp_path):
    (tmp_path / "edited").mkdir()
    name = {"plot": "metrics.jsonl", "show": "samples.jsonl"}[command]
    (tmp_path / "edited" / name).write_text(json.dumps({"step": 1, **row}) + "\n" + json.dumps({"step": 2, **row}) + "\n")
    judged(*called([command, "edited"], tmp_path))


@pytest.mark.parametrize("deed", ["raise Silent", *(pytest.param(deed, marks=pytest.mark.long) for deed in (
    "raise ValueError('two\\nlines')", "raise ValueError('x' * 10**6)"))])
@pytest.mark.parametrize("where", ["import", "call"])
def test_what_a_reward_raises_is_one_sentence(deed, where, tmp_path):
    body = f"    {deed}\n" if where == "call" else "    return [1.0] * len(completions)\n" + deed + "\n"
    furnish(tmp_path)
    (tmp_path / "mine.py").write_text(CLASSES + "def f(prompts, completions):\n" + body)
    assert judged(*called(["rloo", *base_flags("rloo"), "--reward", "mine.py:f"], tmp_path)) == "refused"


@pytest.mark.parametrize("template", ["{{ raise_exception('two\\nlines') }}", "{{ raise_exception('x' * 100000) }}"])
def test_what_a_template_raises_is_one_sentence(template):
    tokenizer = load_tokenizer(tokenizer_folders()[1])
    tokenizer.chat_template = template
    assert refused_or(lambda: render_chat(tokenizer, CONVERSATIONS[0]))[0] == "refused"


COMMAND_FAULTS = [
    ["slic", "--lora", "1" * 30], ["plot", "--out", "policy/config.json"], ["sample", "--device", "mps"], ["dpo", "--max_prompt", LONG],
    ["microscope", "--rows", "²"], ["rloo", "--reward", f"length:{LONG}"], ["sft", "--out", "a\0b"], ["rloo", "--reward", "\0.py:f"],
    ["generate", "--keep", f"above:{LONG}"], ["sample", "--prompt", "\udce9"], ["sft", "--device", "meta"], ["sft", "--device", "hpu"],
    ["sft", "--policy", "new", "--vocab", str(2**70)], ["ppo", "--eps", "1e308"], ["sft", "--policy=--"], ["x" * 5000],
    ["rloo", "--reward", "regex:" + "(" * 5000], ["show", "--last", "-1"], ["sft", "--demos", "fifo"], ["sft", "--text", "/dev/zero"],
    ["sft", "--batch_size", str(2**64)], ["sft", "--policy", "new", "--layers", "100000"], ["show", "--runs", "x" * 5000],
]
MORE_COMMAND_FAULTS = [  # of the same kinds
    ["simpo", "--lora", str(2**63)], ["sft", "--lora", "1000000"], ["plot", "--out", "figure.txt"], ["show", "--last", LONG],
    ["rloo", "--max_new", "x" * 5000], ["microscope", "--rows", LONG], ["sft", "--demos", "\0"], ["plot", "--out", "a\0.png"],
    ["generate", "--out", "\0"], ["sample", "--device", "meta"], ["sft", "--device", "xla"], ["sft", "--device", "privateuseone"],
    ["sft", "--device", "x" * 300], ["sft", "x" * 5000], ["sft", "--" + "x" * 5000], ["generate", "--prompts", "fifo"],
    ["evaluate", "--out", "fifo"], ["stories260K", "--bin", "fifo", "--tokenizer", "fifo"], ["demo", "--seeds=--"],
    ["stories260K", "--bin", "/dev/zero", "--tokenizer", "/dev/zero"], ["sft", "--lora_alpha=--"], ["rest", "--reward", "/",
                                                                                                    "rewards.py:f"],
    ["sft", "--policy", "/"], ["sft", "--text", "/dev/full"],
]


@pytest.mark.parametrize("words", [*COMMAND_FAULTS, *(pytest.param(words, marks=pytest.mark.long) for words in MORE_COMMAND_FAULTS)],
                         ids=lambda words: " ".join(word[:20] for word in words))
def test_these_command_lines_are_answered_in_one_sentence(words, tmp_path):
    command, *flags = words
    base = base_flags(command) if command in known_commands() else []
    outcome = judged(*called([command, *base, *flags], furnish(tmp_path), seconds=10))
    assert outcome == "refused"


# ---------------------------------------------------------------------------------------------------------------- the tests

#                  rounds by default, in the long test
ROUNDS = {"safetensors": (100, 2000), "parquet": (12, 300), "configs": (50, 600), "tokenizers": (20, 400), "adapters": (40, 400),
          "templates": (12, 300), "command_lines": (16, 500), "rewards": (6, 100), "run_folders": (4, 60)}


@pytest.mark.parametrize("family", ROUNDS)
def test_a_few_rounds(family, record_property):
    fewer = {"methods": ("sft",)} if family == "run_folders" else {}
    counts = globals()[f"fuzz_{family}"](0, ROUNDS[family][0], **fewer)
    record_property("tried", sum(counts.values()))


@pytest.mark.long
@pytest.mark.parametrize("family", ROUNDS)
def test_many_rounds(family, record_property):
    """Other seeds than the short test's, and where there is one, with the oracle."""
    oracle = {"oracle": True} if family in ("configs", "tokenizers", "adapters") else {}
    counts = globals()[f"fuzz_{family}"](1000, ROUNDS[family][1], **oracle)
    record_property("tried", sum(counts.values()))


def test_a_parquet_file_of_ordinary_chats_is_read(tmp_path):
    """A long system prompt that all rows share is stored once; and few prompts of many labels are fewer bytes than rows."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet")
    from pyarrow import parquet

    system = {"role": "system", "content": "Be brief. " * 700}
    rows = [{"messages": [system, {"role": "user", "content": "tea?"}, {"role": "assistant", "content": "yes"}]}] * 5000
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet", compression="zstd")
    assert len(read_demonstrations(tmp_path / "chats.parquet")) == 5000
    rows = [{"prompt": f"p{n % 5}", "completion": "c", "label": bool(n % 2)} for n in range(20_000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "labels.parquet", compression="zstd")
    assert len(read_feedback(tmp_path / "labels.parquet")) == 20_000 > (tmp_path / "labels.parquet").stat().st_size


def test_a_data_folder_that_names_files_elsewhere_is_refused(tmp_path):
    pytest.importorskip("datasets", reason="reads folders")
    (tmp_path / "secret.jsonl").write_text('{"prompt": "p", "completion": "stolen"}\n')
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    settings = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n"
    for path in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), "https://example.org/rows.jsonl"):
        (folder / "README.md").write_text(f"---\n{settings.format(path)}---\n")
        with pytest.raises(BadInput, match=f"its README.md names {path}, which is not in the folder"):
            read_demonstrations(folder)
    (folder / "README.md").write_text(f"---\n{settings.format('rows.jsonl')}---\n")
    assert [demo.completion for demo in read_demonstrations(folder)] == ["c"]
    (folder / ".huggingface.yaml").write_text(settings.format("../secret.jsonl"))
    with pytest.raises(BadInput, match="its .huggingface.yaml may name files elsewhere"):
        read_demonstrations(folder)


def test_what_is_damaged_here_was_sound():
    """Else all rounds could end at the same first check."""
    tokenizer_folders(), [config_folder(family) for family in FAMILIES], [adapter_folder(family) for family in ("llama", "gpt2",
                                                                                                                "gpt_neox")]
    for folder in tokenizer_folders():
        with tempfile.TemporaryDirectory() as place:
            use_tokenizer(shutil.copytree(folder, Path(place) / "copy"))
    for family in FAMILIES:
        load_model(config_folder(family)[0])
    for family in ("llama", "gpt2", "gpt_neox"):
        load_model(adapter_folder(family))
