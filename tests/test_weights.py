"""minialign/weights.py: folders go both ways without changing a bit, and no file, however wrong or hostile, does worse than a BadInput.

Oracles: transformers reads what we write and we read what it writes, weights bitwise equal; a live pickle whose payload leaves a
witness shows that nothing is executed; the hostile files are made byte by byte here.
"""

import functools
import json
import pickle
import random
import re
import socket
import struct
import time

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from minialign import evaluate, weights
from minialign.batch import collate
from minialign.data import Pair
from minialign.engine.common import PICKLES, BadInput, in_one_line
from minialign.hf_config import FAMILIES, config_to_hf
from minialign.lora import load_model
from minialign.model import GPT, GPTConfig
from minialign.rewards import score
from minialign.sample import sample
from minialign.tokenizer import CharTokenizer, Tokenizer
from minialign.weights import load_pretrained, read_tensors, save_pretrained
from tests.conftest import Allocations
from tests.test_model import import_transformers, in_float64, random_gpt, random_oracle, random_settings, random_tokens


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing here may call out: the hub client is told to stay offline, and a connection that is tried all the same is an error."""
    tried = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: tried.append(args))
    yield
    assert not tried


@pytest.fixture
def folder(tmp_path):
    """A sound folder of ours: an untied one-layer llama with V = 7, C = 8, its weights in one file."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=7, n_layer=1, n_head=2, n_embd=8, ffn_dim=8, max_len=16, tied=False))
    save_pretrained(model, tmp_path / "policy")
    return tmp_path / "policy"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def refused(folder, *parts):
    """load_pretrained refuses the folder in one line that contains every part."""
    with pytest.raises(BadInput) as error:
        load_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def same_weights(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)


def reload(oracle, folder):
    """transformers' own reading of a folder, as a model of the oracle's class."""
    return type(oracle).from_pretrained(folder, attn_implementation="sdpa").eval()


# --------------------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("task", ["ForCausalLM", "ForSequenceClassification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise(family, task, tmp_path):
    """transformers' folder -> our GPT -> our folder -> transformers: every weight as it was, tied and untied, LM and reward head."""
    labels = {"num_labels": 1} if task == "ForSequenceClassification" else {}
    for seed in range(8):
        oracle, settings = random_oracle(family, random.Random(f"round trip {family} {seed}"), task, **labels)
        oracle.save_pretrained(tmp_path / "theirs")
        model = load_pretrained(tmp_path / "theirs")
        save_pretrained(model, tmp_path / "ours")
        again = reload(oracle, tmp_path / "ours")
        assert same_weights(oracle.state_dict(), again.state_dict()), settings
        inputs = random_tokens(oracle, 1, 6, seed)
        with torch.no_grad():
            assert (oracle(inputs).logits - again(inputs).logits).abs().max() <= 1e-5, settings
        assert load_pretrained(tmp_path / "ours").config == model.config


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_loading_holds_the_model_and_one_tensor(family, tmp_path):
    """A bfloat16 file read as float32 takes 4 bytes for each number of the model at the peak, and what unpacking one tensor takes."""
    oracle, _ = random_oracle(family, random.Random(3), tie_word_embeddings=True)
    oracle.bfloat16().save_pretrained(tmp_path)
    with Allocations() as counted:
        model = load_pretrained(tmp_path, dtype=torch.float32)
    sizes = [p.numel() for p in model.parameters()]
    assert 4 * sum(sizes) <= counted.peak <= 4 * sum(sizes) + 2 * 3 * max(sizes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_load_like_one_file(family, tied, tmp_path):
    """transformers' folder in shards, with an index, and the same in one file give the same GPT; our shards go back to transformers."""
    oracle, _ = random_oracle(family, random.Random(f"shards {family}"), tie_word_embeddings=tied)
    oracle.save_pretrained(tmp_path / "one")
    oracle.save_pretrained(tmp_path / "many", max_shard_size="2KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1 and not (tmp_path / "many" / "model.safetensors").exists()
    one, many = load_pretrained(tmp_path / "one"), load_pretrained(tmp_path / "many")
    assert same_weights(one.state_dict(), many.state_dict()) and one.config == many.config and one.config.tied is tied
    assert (one.head_weight is one.tok_embed.weight) is tied and all(p.requires_grad for p in one.parameters())


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    """With the limit lowered from 5 GB to 8 KB: an index, shards, and both readers get every bit back."""
    oracle, _ = random_oracle("llama", random.Random(7), tie_word_embeddings=True)
    oracle.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    writer = functools.partial(huggingface_hub.save_torch_state_dict, max_shard_size="8KB")
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", writer)
    save_pretrained(model, tmp_path / "ours")
    shards = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and sorted(set(index["weight_map"].values())) == shards
    assert same_weights(load_pretrained(tmp_path / "ours").state_dict(), model.state_dict())
    assert same_weights(reload(oracle, tmp_path / "ours").state_dict(), oracle.state_dict())


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("tied", [True, False])
def test_our_own_tiny_model_runs_in_transformers(tied, head, tmp_path):
    """GPTConfig.tiny with fresh weights, never seen by transformers before: its logits there equal ours to 1e-5."""
    transformers = import_transformers()
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny(13, tied=tied and head == "lm", head=head))
    save_pretrained(model, tmp_path)
    auto = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    oracle, inputs = auto.from_pretrained(tmp_path).eval(), random_tokens(model, 1, 9)
    with torch.no_grad():
        ours, theirs = model(inputs), oracle(inputs).logits
    difference = ours - theirs if head == "lm" else ours[:, -1:] - theirs
    assert difference.abs().max() <= 1e-5 and ours.abs().max() > 1e-3
    assert same_weights(load_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_model_scores_like_transformers(family, tmp_path):
    """A ...ForSequenceClassification folder loads as the scalar head: our number at the last token is transformers' score."""
    for seed in range(3):
        oracle, settings = random_oracle(family, random.Random(f"score {family} {seed}"), "ForSequenceClassification", num_labels=1)
        oracle.save_pretrained(tmp_path)
        model, inputs = load_pretrained(tmp_path), random_tokens(oracle, 3, 7, seed)
        with torch.no_grad():
            theirs = torch.cat([oracle(row[None]).logits for row in inputs])[:, 0]  # one by one: these configs have no pad token
            ours = model(inputs)
        assert model.config.head == "scalar" and ours.shape == (3, 7)
        assert (ours[:, -1] - theirs).abs().max() <= 1e-5, settings


def scoring(oracle, batch):
    """transformers' scores of a batch's rows, in float64: of the padded batch if the classifier has a pad token, else row by row."""
    rows = torch.cat([batch.inputs[:, :1], batch.targets], dim=1)
    lengths = [1 + max(mask.nonzero().flatten().tolist()) + 1 for mask in batch.mask]
    with torch.no_grad():
        if oracle.config.pad_token_id is not None:
            return oracle(rows).logits[:, 0]
        return torch.cat([oracle(row[None, :length]).logits[:, 0] for row, length in zip(rows, lengths, strict=True)])


def read_by_transformers(folder, config):
    transformers = import_transformers()
    return in_float64(transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval(), config)


@pytest.mark.parametrize("pad", [0, 1], ids=["pad is EOS", "pad of its own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_read_where_transformers_reads_them(family, pad, tmp_path):
    """transformers reads the last token that is not the pad token, in the prompt too. So do we with a classifier that it wrote, before and
    after our export. In our own reward models the last token counts, whatever it is, and transformers agrees about our export.
    """
    tokenizer = CharTokenizer("abcdefghijk")  # EOS is id 0
    tokenizer = Tokenizer(tokenizer.inner, tokenizer.settings | {"pad_token": tokenizer.inner.id_to_token(pad)})
    changes = dict(num_labels=1, vocab_size=12, pad_token_id=pad)
    oracle, _ = random_oracle(family, random.Random(f"pad {family}"), "ForSequenceClassification", **changes)
    oracle.save_pretrained(tmp_path / "theirs")
    prompts, answers = [[2, 3, 1, 4], [5, 6], [7, 0, 0]], [[8, 9, 10, 0], [11, 1, 0], [0]]
    batch = collate(prompts, answers, pad_id=pad)
    theirs = load_pretrained(tmp_path / "theirs", dtype=torch.float64)
    own = theirs.with_scalar_head()
    wanted = scoring(read_by_transformers(tmp_path / "theirs", theirs.config), batch)
    last = torch.stack([own(torch.tensor([prompt + answer]))[0, -1] for prompt, answer in zip(prompts, answers, strict=True)])
    for name, model, right in (("theirs", theirs, wanted), ("own", own, last)):
        assert model.config.reward_pad == {"theirs": pad, "own": None}[name]
        assert (score(model, batch) - right).abs().max() <= 1e-9
        save_pretrained(model, tmp_path / name / "ours", tokenizer)
        again = read_by_transformers(tmp_path / name / "ours", model.config)
        again.save_pretrained(tmp_path / name / "again")
        assert (scoring(again, batch) - right).abs().max() <= 1e-9
        for folder in ("ours", "again"):
            assert (score(load_pretrained(tmp_path / name / folder), batch) - right).abs().max() <= 1e-9, (name, folder)
    theirs.config.reward_pad = None
    assert ((score(theirs, batch) - wanted).abs().max() > 1e-6) == (pad == 0)  # the rows end in EOS, so that it matters


def test_reward_offset_survives_in_our_folder(tmp_path):
    """transformers knows no offset, so its score is ours plus the offset; we read the offset back."""
    transformers = import_transformers()
    model = random_gpt("llama", random.Random(0), torch.float32).with_scalar_head()
    model.config.reward_offset = 0.75
    save_pretrained(model, tmp_path)
    inputs = random_tokens(model, 1, 5)
    with torch.no_grad():
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)(inputs).logits[0, 0]
        assert (theirs - (model(inputs)[0, -1] + 0.75)).abs() <= 1e-5
        assert torch.equal(load_pretrained(tmp_path)(inputs), model(inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_the_trip(family):
    """config_to_hf and from_hf are inverse on 100 random configurations, as an LM and as a reward model."""
    for seed in range(100):
        config = GPTConfig.from_hf({"model_type": family, **random_settings(family, random.Random(seed))})
        for sent in (config, GPTConfig(**{**vars(config), "head": "scalar", "tied": False, "reward_offset": 0.5, "reward_pad": 3})):
            assert GPTConfig.from_hf(json.loads(json.dumps(config_to_hf(sent)))) == sent


def test_every_rotary_width_survives_the_trip():
    """rotary_pct is a quotient that readers multiply and truncate again: int(30/44 · 44) is 29 in floating point."""
    lost = []
    for head_dim in range(2, 129, 2):
        for rotary_dim in range(2, head_dim + 1, 2):
            config = GPTConfig(vocab_size=5, n_head=1, n_embd=head_dim, rotary_dim=rotary_dim, norm="layer", gated=False, family="gpt_neox")
            if GPTConfig.from_hf(config_to_hf(config)).rotary_dim != rotary_dim:
                lost.append((rotary_dim, head_dim))
    assert not lost


@pytest.mark.parametrize("changes", [dict(windows=(2, None)), dict(parallel_residual=True), dict(qk_norm=True), dict(gated=False),
                                     dict(positions="learned"), dict(norm="layer"), dict(out_bias=True), dict(rotary_dim=8)], ids=str)
def test_a_model_that_its_family_cannot_express_is_not_exported(changes, tmp_path):
    """Our GPT mixes mechanisms freely; a llama folder cannot say so and would come back as another model: refused, not written."""
    with pytest.raises(BadInput, match=re.escape(next(iter(changes)))):
        save_pretrained(GPT(GPTConfig.tiny(11, **changes)), tmp_path)
    assert not (tmp_path / "config.json").exists()


# ---------------------------------------------------------------------------------------------- older and unusual files


def test_gpt2_without_prefix_and_with_causal_masks(tmp_path):
    """The hub's gpt2 has neither 'transformer.' in its names nor a head, but the causal masks of each layer."""
    oracle, _ = random_oracle("gpt2", random.Random(1), tie_word_embeddings=True)
    oracle.save_pretrained(tmp_path)
    wanted = load_pretrained(tmp_path).state_dict()

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(oracle.config.n_layer):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(tmp_path, age)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert same_weights(load_pretrained(tmp_path).state_dict(), wanted)


def test_bare_trunk_has_all_but_an_untied_head(folder):
    """Without 'model.' in its names a tied llama is whole; an untied one lacks its head, and the message says so."""
    def strip(tensors):
        del tensors["lm_head.weight"]
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    wanted = load_pretrained(folder).tok_embed.weight
    edit_tensors(folder, strip)
    assert refused(folder, str(folder)).endswith("tensors are missing that a llama model needs: lm_head.weight")
    edit_config(folder, tie_word_embeddings=True)
    assert torch.equal(load_pretrained(folder).head_weight, wanted)


@pytest.mark.parametrize(("family", "constants"), [
    ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
    ("gpt_neox", ["gpt_neox.layers.0.attention.rotary_emb.inv_freq", "gpt_neox.layers.0.attention.bias",
                  "gpt_neox.layers.0.attention.masked_bias", "gpt_neox.rotary_emb.inv_freq"]),
    *[(family, ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.cos_cached",
                "model.layers.0.self_attn.rotary_emb.sin_cached", "model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"])
      for family in ("llama", "mistral", "qwen2", "qwen3")],
])
def test_constants_of_older_files_are_passed_over(family, constants, tmp_path):
    oracle, _ = random_oracle(family, random.Random(2))
    oracle.save_pretrained(tmp_path)
    wanted = load_pretrained(tmp_path).state_dict()
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(4) for name in constants}))
    assert same_weights(load_pretrained(tmp_path).state_dict(), wanted)


def test_tied_file_may_hold_an_equal_head_but_no_other(folder):
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    model = load_pretrained(folder)
    assert model.head_weight is model.tok_embed.weight

    def nudge(tensors):
        tensors["lm_head.weight"][3, 2] += 1e-3

    edit_tensors(folder, nudge)
    refused(folder, str(folder), "config.json ties the head to the embedding, but the file holds a different head")


def test_dtype_is_kept_or_converted(folder):
    """A bfloat16 file stays bfloat16; dtype= converts; both heads stay tied on the way."""
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    kept, wide = load_pretrained(folder), load_pretrained(folder, dtype=torch.float32, device="cpu")
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16} and {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(torch.equal(a.float(), b) for a, b in zip(kept.parameters(), wide.parameters(), strict=True))
    save_pretrained(kept, folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert same_weights(load_pretrained(folder).state_dict(), kept.state_dict())


def test_a_loaded_tied_head_is_the_embedding(tmp_path):
    """One parameter, not two with the same memory: an optimizer would step twice. Of a loaded model and of a new one."""
    config = GPTConfig(vocab_size=7, n_layer=1, n_head=2, n_embd=8, ffn_dim=8, max_len=16)
    save_pretrained(GPT(config), tmp_path)
    for model in (load_pretrained(tmp_path), weights.new_model(config)):
        assert model.head.weight is model.tok_embed.weight


def test_a_scalar_head_stays_float32_beside_a_bfloat16_trunk(tmp_path):
    model = GPT(GPTConfig.tiny(7)).with_scalar_head()
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for name, p in loaded.named_parameters() if name != "head.weight"} == {torch.bfloat16}
    assert loaded.head_weight.dtype == torch.float32 and torch.equal(loaded.head_weight, model.head_weight)


def test_padding_rows_of_the_vocabulary_are_known(folder):
    """5 characters and the end token make 6 ids for 7 embedding rows: the seventh decodes to nothing and must not be sampled."""
    assert load_pretrained(folder).config.n_tokens is None  # no tokenizer, nothing known
    CharTokenizer("abcde").save(folder)
    assert load_pretrained(folder).config.n_tokens == 6
    CharTokenizer("abcdef").save(folder)
    assert load_pretrained(folder).config.n_tokens == 7


def test_a_tokenizer_may_have_more_ids_than_the_model(folder):
    """Many public tokenizers have added tokens that their model has no row for. Padding has no row of its own either: EOS pads."""
    tokenizer = CharTokenizer("abcdefg")
    Tokenizer(tokenizer.inner, tokenizer.settings | {"pad_token": "g"}).save(folder)
    model, tokenizer, _ = load_model(folder)
    assert tokenizer.vocab_size == 8 and model.config.n_tokens == 7 and tokenizer.pad_id == tokenizer.eos_id == 0
    assert tokenizer.encode("abc") == [1, 2, 3]
    with pytest.raises(BadInput, match=r"a row: the token 'g' \(id 7\) in 'ag' has no embedding: the model has only 7"):
        evaluate.pair_measures(model, tokenizer, [Pair("b", "a", "ag")], evaluate.Config(max_len=9))
    with pytest.raises(BadInput, match="a prompt holds the id 7, but the model has 7 embedding rows"):
        sample(model, [[1, 7]], max_new=2, eos_id=0, seed=0)


@pytest.mark.parametrize(("named", "dtype"), [({"dtype": "float16"}, torch.float16), ({"torch_dtype": "float32"}, torch.float32),
                                              ({"dtype": "bfloat16", "torch_dtype": "float32"}, torch.bfloat16), ({}, None)], ids=str)
def test_mixed_dtypes_become_one(folder, named, dtype):
    """As transformers decides with dtype="auto": the dtype of config.json, else that of the first tensor."""
    def mix(tensors):
        for number, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].bfloat16() if number % 3 else tensors[name].double()

    edit_tensors(folder, mix)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | named))
    model = load_pretrained(folder)
    auto = import_transformers().AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {auto.dtype} == {dtype or auto.dtype}
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


# ------------------------------------------------------------------------------------------------------------------ export


def test_export_writes_these_files_and_config_json_last(tmp_path, monkeypatch):
    """Files in the order they appear; ids and dtype in config.json; transformers reads the ids from generation_config.json."""
    order, write_atomic, writer = [], weights.write_atomic, huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(weights, "write_atomic", lambda path, text: (order.append(path.name), write_atomic(path, text)))
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", lambda *a, **k: (order.append("weights"), writer(*a, **k)))
    tokenizer = CharTokenizer("abc")
    save_pretrained(GPT(GPTConfig.tiny(tokenizer.vocab_size)), tmp_path / "new" / "policy", tokenizer)
    assert order == ["weights", "generation_config.json", "config.json"]
    assert sorted(file.name for file in (tmp_path / "new" / "policy").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = json.loads((tmp_path / "new" / "policy" / "config.json").read_text())
    assert {name: config[name] for name in ids} == ids
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    generation = import_transformers().GenerationConfig.from_pretrained(tmp_path / "new" / "policy")
    assert {name: getattr(generation, name) for name in ids} == ids


@pytest.mark.parametrize("older", [False, True])
def test_export_that_dies_leaves_no_config_json(older, folder, tmp_path, monkeypatch):
    """A folder that has config.json is whole, so one that died after its weights has none, not even that of an older export."""
    writer = huggingface_hub.save_torch_state_dict

    def write_and_die(*args, **options):
        writer(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", write_and_die)
    target = folder if older else tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(random_gpt("llama", random.Random(1), torch.float32), target)
    assert (target / "model.safetensors").exists()
    refused(target, "config.json: the file is missing")


def test_a_second_export_into_a_folder_replaces_the_first(folder, monkeypatch):
    """Shards over one file and one file over shards: the reader gets the model written last."""
    one_file = huggingface_hub.save_torch_state_dict
    for limit in ("1KB", "5GB", "2KB"):
        monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", functools.partial(one_file, max_shard_size=limit))
        model = random_gpt("llama", random.Random(limit), torch.float32, num_hidden_layers=2)
        save_pretrained(model, folder)
        assert same_weights(load_pretrained(folder).state_dict(), model.state_dict()), limit


def test_export_does_not_touch_the_model(tmp_path):
    model = random_gpt("gpt_neox", random.Random(0), torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_pretrained(model, tmp_path)
    assert same_weights(before, model.state_dict()) and all(p.requires_grad and p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------- errors: folder and config.json


def test_no_such_folder_nor_hub_name(tmp_path):
    refused(tmp_path / "absent", str(tmp_path / "absent"), "no such folder, and not a hub name (owner/name) either")
    refused("nobody/no-such-model", "nobody/no-such-model: no such folder here, and the hub could not deliver it (", "hf auth login")
    for name in ("model.safetensors", "model.gguf", "nobody/model.bin"):
        refused(tmp_path / name, "expected a folder with config.json and model.safetensors, not a single file")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path / "config.json", "expected a folder with config.json and model.safetensors, not a single file")
    for name in ("nobody/llama-3.1", "nobody/model-v0.1", "nobody/qwen2.5-0.5b.safetensors-like"):  # dots are part of many names
        refused(name, f"{name}: no such folder here, and the hub could not deliver it (")


def test_hub_name_fetches_weights_and_settings_only(folder, monkeypatch):
    """What a hub repository may hold besides, pickles and code, is not even downloaded."""
    asked = {}

    def deliver(name, allow_patterns):
        asked[name] = set(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", deliver)
    assert load_pretrained("owner/name").config.vocab_size == 7
    assert asked == {"owner/name": {"*.json", "*.safetensors", "*.jinja"}}


def test_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, f"{folder / 'tokenizer.json'}: not a valid tokenizer", "fetch or write it again")


@pytest.mark.parametrize(("content", "part"), [
    (None, "the file is missing"), (b"", "not valid JSON"), (b"{,}", "not valid JSON"), (b"\xff\xfe{}", "not valid JSON"),
    (b"[1]", "expected an object, found list"), (b"3", "expected an object, found int"), (b"[" * 100_000, "not valid JSON"),
    (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"), (b'{"model_type": "mamba"}', "model_type 'mamba' is not implemented"),
    (b"{}", "model_type None is not implemented"),
], ids=["missing", "empty", "syntax", "utf16", "list", "number", "deep", "long number", "mamba", "no type"])
def test_bad_config_json(folder, content, part):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    refused(folder, "config.json: ", part)


def test_truncated_config_json_is_refused(folder):
    whole = (folder / "config.json").read_bytes().strip()
    for size in range(0, len(whole), 7):
        (folder / "config.json").write_bytes(whole[:size])
        refused(folder, str(folder / "config.json"), "not valid JSON")


@pytest.mark.parametrize("changes", [dict(vocab_size=0), dict(vocab_size=-7), dict(hidden_size="8"), dict(num_hidden_layers=1.5),
                                     dict(hidden_size=2**62), dict(vocab_size=None), dict(rope_theta="big"), dict(architectures=[1]),
                                     dict(intermediate_size=[8]), dict(architectures=3), dict(head_dim=-4)], ids=str)
def test_odd_sizes_in_config_json_are_refused(folder, changes):
    """Either the config is refused or the tensors no longer fit it; an odd value is never a crash."""
    edit_config(folder, **changes)
    refused(folder)


# ----------------------------------------------------------------------------------------------- errors: pickles, the index


class Payload:
    """Unpickling this touches a file."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (open, (str(self.witness), "w"))


def write_pickle(path, witness, zipped=False):
    if zipped:
        torch.save({"lm_head.weight": Payload(witness)}, path)
    else:
        path.write_bytes(pickle.dumps({"lm_head.weight": Payload(witness)}))


def test_the_payload_is_live(tmp_path):
    """The tests below would see an execution: unpickling does leave the witness."""
    write_pickle(tmp_path / "model.bin", tmp_path / "witness")
    pickle.loads((tmp_path / "model.bin").read_bytes())["lm_head.weight"].close()
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", [f"pytorch_model{suffix}" for suffix in PICKLES] + ["pytorch_model-00001-of-00002.bin"])
def test_pickles_are_refused_and_never_executed(folder, tmp_path, name, zipped):
    (folder / "model.safetensors").unlink()
    write_pickle(folder / name, tmp_path / "witness", zipped)
    refused(folder, f"{folder}: its weights are pickles ({name})", "can run code when loaded and are refused", "convert them to")
    refused(folder / name, "expected a folder with config.json and model.safetensors, not a single file")
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch.save"])
def test_a_pickle_under_another_name_is_never_executed(folder, tmp_path, zipped):
    """Renamed to model.safetensors, or named by the index as a shard."""
    write_pickle(folder / "model.safetensors", tmp_path / "witness", zipped)
    refused(folder, str(folder / "model.safetensors"), "not a valid safetensors file", "fetch or write it again")
    (folder / "model.safetensors").rename(folder / "shard.bin")
    write_index(folder, {"lm_head.weight": "shard.bin"})
    refused(folder, "names the shard 'shard.bin': expected a .safetensors file in the same folder")
    assert not (tmp_path / "witness").exists()


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors", "evil.bin", "..", "",
                                  "evil.safetensors/", "./evil.safetensors", ".safetensors/.."])
def test_index_may_name_only_safetensors_of_its_folder(folder, name):
    """The file that the name leads to exists, so following it would be noticed as a load."""
    (folder / "sub").mkdir()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for place in ("../evil.safetensors", "sub/evil.safetensors", "evil.bin", "evil.safetensors"):
        (folder / place).write_bytes(whole)
    write_index(folder, {"lm_head.weight": name})
    refused(folder, "model.safetensors.index.json: names the shard ", repr(name), "expected a .safetensors file in the same folder")


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", 3, {"a": 1}, {"a": None}, {"a": ["model.safetensors"]}], ids=str)
def test_index_with_a_wrong_weight_map(folder, weight_map):
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    refused(folder, "model.safetensors.index.json: 'weight_map' must map tensor names to file names")


def test_index_that_is_no_json(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "model.safetensors.index.json: not valid JSON")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "nul\0.safetensors", "n" * 300 + ".safetensors"],
                         ids=["plain", "NUL", "long"])
def test_missing_shard_is_named(folder, name):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    write_index(folder, {"lm_head.weight": "a.safetensors", "model.norm.weight": name})
    refused(folder, str(folder), in_one_line(f"the index names the shard {name}, but it is missing; fetch the folder again"))


def test_tensor_in_two_shards(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros(7, 8)}, folder / "b.safetensors")
    write_index(folder, {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"})
    refused(folder, str(folder / "b.safetensors"), "the tensor lm_head.weight is in another shard too")


def test_index_that_names_nothing(folder):
    (folder / "model.safetensors").unlink()
    write_index(folder, {})
    refused(folder, "tensors are missing that a llama model needs: embed_tokens.weight, ", "and 7 more")


# ---------------------------------------------------------------------------------------------------------- errors: tensors


def test_missing_tensors_are_named(folder):
    def drop(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]

    edit_tensors(folder, drop)
    assert refused(folder, str(folder)).endswith(
        "tensors are missing that a llama model needs: model.layers.0.mlp.up_proj.weight, model.norm.weight")


def test_unknown_tensors_are_named_the_first_five(folder):
    edit_tensors(folder, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(7)}))
    assert refused(folder, str(folder)).endswith(
        "tensors that a llama model does not have: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t[None], lambda t: t.reshape(-1, 1), lambda t: t[:0]],
                         ids=["short", "deeper", "column", "empty"])
def test_misshapen_tensor_is_named_with_both_shapes(folder, name, change):
    wanted = tuple(load_file(folder / "model.safetensors")[name].shape)
    edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}))
    found = tuple(load_file(folder / "model.safetensors")[name].shape)
    refused(folder, f"{folder}: {name} has shape {found}, but config.json asks for {wanted}")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_misshapen_fused_tensor_is_named_with_both_shapes(family, tmp_path):
    """Query, key and value in one tensor: its shape is checked before it is cut."""
    model = random_gpt(family, random.Random(0), torch.float32)
    save_pretrained(model, tmp_path)
    name = next(name for name in load_file(tmp_path / "model.safetensors") if re.search(r"(c_attn|query_key_value)\.weight", name))
    wanted = tuple(load_file(tmp_path / "model.safetensors")[name].shape)
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][:, 1:]}))
    refused(tmp_path, f"{name} has shape {(wanted[0], wanted[1] - 1)}, but config.json asks for {wanted}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_quantised_or_integer_tensor_is_named(folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(dtype)}))
    refused(folder, f"{folder}: lm_head.weight has dtype {dtype}: expected floating-point weights")


# -------------------------------------------------------------------------------------------------- errors: damaged bytes


def raw_safetensors(header, data=b"", length=None):
    """The bytes of a safetensors file: 8 bytes of header length, the header (a dict or bytes), the data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def test_truncated_weights_are_always_refused(folder, record_property):
    whole = (folder / "model.safetensors").read_bytes()
    for part in range(64):
        (folder / "model.safetensors").write_bytes(whole[: len(whole) * part // 64])
        refused(folder, str(folder / "model.safetensors"), "not a valid safetensors file", "fetch or write it again")
    (folder / "model.safetensors").write_bytes(whole[:-1])
    refused(folder, "not a valid safetensors file")
    (folder / "model.safetensors").write_bytes(whole)
    load_pretrained(folder)
    record_property("tried", 65)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "length 2^60": raw_safetensors({"a": F32}, bytes(8), length=2**60),
    "length 2^64-1": raw_safetensors({"a": F32}, bytes(8), length=2**64 - 1),
    "length 0": raw_safetensors(b""),
    "length past the end": raw_safetensors({"a": F32}, length=10_000),
    "overlap": raw_safetensors({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
    "same bytes twice": raw_safetensors({"a": F32, "b": F32}, bytes(8)),
    "gap": raw_safetensors({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20)),
    "starts late": raw_safetensors({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
    "backwards": raw_safetensors({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8)),
    "negative offset": raw_safetensors({"a": F32 | {"data_offsets": [-8, 0]}}, bytes(8)),
    "past the end": raw_safetensors({"a": F32 | {"shape": [4], "data_offsets": [0, 16]}}, bytes(8)),
    "shape 2^63": raw_safetensors({"a": F32 | {"shape": [2**63]}}, bytes(8)),
    "shape overflows to 8 bytes": raw_safetensors({"a": F32 | {"shape": [2**62 + 2]}}, bytes(8)),
    "shape overflows as a product": raw_safetensors({"a": F32 | {"shape": [2**32, 2**32]}}, bytes(8)),
    "negative shape": raw_safetensors({"a": F32 | {"shape": [-2]}}, bytes(8)),
    "shape disagrees": raw_safetensors({"a": F32 | {"shape": [3]}}, bytes(8)),
    "shape of floats": raw_safetensors({"a": F32 | {"shape": [2.0]}}, bytes(8)),
    "no shape": raw_safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "unknown dtype": raw_safetensors({"a": F32 | {"dtype": "F33"}}, bytes(8)),
    "dtype is a number": raw_safetensors({"a": F32 | {"dtype": 7}}, bytes(8)),
    "invalid utf-8": raw_safetensors(json.dumps({"a": F32}).encode().replace(b'"a"', b'"\xff"'), bytes(8)),
    "trailing bytes": raw_safetensors({"a": F32}, bytes(9)),
    "key twice": raw_safetensors(json.dumps({"a": F32, "b": F32 | {"data_offsets": [8, 16]}}).encode().replace(b'"b"', b'"a"'), bytes(16)),
    "list": raw_safetensors(b"[]"),
    "no JSON": raw_safetensors(b"x" * 64),
    "deep JSON": raw_safetensors(b'{"a":' + b"[" * 50_000),
    "metadata of numbers": raw_safetensors({"__metadata__": {"a": 1}, "a": F32}, bytes(8)),
    "empty file": b"",
    "seven bytes": bytes(7),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(folder, name):
    (folder / "model.safetensors").write_bytes(HOSTILE[name])
    start = time.monotonic()
    refused(folder, str(folder / "model.safetensors"), "not a valid safetensors file")
    assert time.monotonic() - start < 1


def test_the_pattern_of_the_hostile_files_is_sound(tmp_path):
    """They are refused for their one fault: the same bytes without it load, a tensor of size zero included."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw_safetensors({"a": F32, "none": F32 | {"shape": [0, 3], "data_offsets": [8, 8]}}, struct.pack("<2f", 1.5, -2)))
    tensors = read_tensors([file])
    assert tensors["a"].tolist() == [1.5, -2.0] and tensors["none"].shape == (0, 3)


def only_bad_input(folder, content):
    """Write the bytes as the weights and load: True if loaded, False if refused; any other exception passes on and fails the test."""
    (folder / "model.safetensors").write_bytes(content)
    try:
        model = load_pretrained(folder)
    except BadInput as error:
        assert str(folder) in str(error)
        return False
    assert sum(p.numel() for p in model.parameters()) > 0
    return True


def flip_and_load(folder, seeds):
    """Per case: one to four flipped bits in the header or its length."""
    whole = (folder / "model.safetensors").read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    loaded = 0
    for seed in seeds:
        rng, content = random.Random(seed), bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.choice([rng.randrange(8), rng.randrange(header_end)])] ^= 1 << rng.randrange(8)
        loaded += only_bad_input(folder, bytes(content))
    assert loaded <= 0.02 * len(seeds)  # almost every flip breaks the JSON, an offset or a name; a flipped metadata text may load


def exchange_and_load(folder, seeds):
    """Per case: one entry of a sound JSON header exchanged for something else, so that the damage lies behind the parser."""
    whole = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    odd = [None, -1, 0, 1, 2**31, 2**63, 2**64, 1.5, "", "F32", "F16", "F64", "BF16", "I64", "F8_E4M3", "F4", "C64", "\ud800", "é", [],
           [0], [8, 8], [-1, 8], [2**63, 2], [0, 2**63], [8, 0], {}, {"a": "b"}, True]
    for seed in seeds:
        rng = random.Random(seed)
        changed = json.loads(json.dumps(header))
        name = rng.choice([name for name in header if name != "__metadata__"])
        where = rng.choice(["name", "whole", "dtype", "shape", "data_offsets", "duplicate"])
        if where == "name":
            changed[str(rng.choice(odd))] = changed.pop(name)
        elif where == "whole":
            changed[name] = rng.choice(odd)
        elif where == "duplicate":
            changed[name] = changed[rng.choice(list(header))]
        else:
            changed[name][where] = rng.choice(odd)
        only_bad_input(folder, raw_safetensors(changed, data))


def test_flipped_bits_in_the_header_are_refused(folder, record_property):
    flip_and_load(folder, range(400))
    record_property("tried", 400)


def test_exchanged_header_entries_are_refused(folder, record_property):
    exchange_and_load(folder, range(400))
    record_property("tried", 400)


@pytest.mark.long
def test_ten_thousand_damaged_headers(folder, record_property):
    record_property("tried", 10_000)
    whole = (folder / "model.safetensors").read_bytes()
    flip_and_load(folder, range(10_000, 15_000))
    (folder / "model.safetensors").write_bytes(whole)
    exchange_and_load(folder, range(10_000, 15_000))


def test_random_bytes_are_refused(folder):
    for seed in range(100):
        rng = random.Random(seed)
        assert not only_bad_input(folder, rng.randbytes(rng.randint(0, 300)))
