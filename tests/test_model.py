"""minialign/model.py against transformers, and against itself.

Oracles: transformers' six models on random tiny configurations (float32 to 1e-5, float64 to 1e-10), finite differences for the
gradient, and the model's own full forward for everything that a cache, padding or embeddings must not change.
"""

import functools
import json
import math
import random

import pytest
import torch

from minialign.engine.common import BadInput
from minialign.hf_config import FAMILIES, config_to_hf
from minialign.model import GPT, GPTConfig, KVCache, padding_for_gpu, rotary_angles, scale_rotation

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
N_RANDOM = 50  # configurations a family; `make test-long` draws 150 more

# ------------------------------------------------------------------------------------------------------- random tiny models


def random_settings(family, rng):
    """The settings of a random config.json, in the names of the older files (rope_theta, rotary_pct). C <= 64, L <= 3, V <= 60."""
    heads, head_dim, layers, vocab = rng.choice([1, 2, 3, 4]), rng.choice([4, 8, 12, 16]), rng.randint(1, 3), rng.randint(5, 60)
    tied = rng.random() < 0.5
    if family == "gpt2":
        head_dim = rng.choice([5, 8, 16])  # odd widths too: nothing turns
        return dict(vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=heads * head_dim, n_positions=rng.randint(24, 40),
                    n_inner=rng.choice([None, 20]), layer_norm_epsilon=rng.choice([1e-5, 1e-3]), tie_word_embeddings=tied,
                    activation_function=rng.choice(["gelu_new", "gelu", "relu", "silu"]))
    settings = dict(vocab_size=vocab, num_hidden_layers=layers, num_attention_heads=heads, hidden_size=heads * head_dim,
                    intermediate_size=rng.choice([12, 30, 64]), max_position_embeddings=64, tie_word_embeddings=tied,
                    hidden_act=rng.choice(["silu", "gelu", "gelu_pytorch_tanh"]),
                    rope_scaling=rng.choice([None, {"rope_type": "linear", "factor": rng.choice([2.0, 3.5])},
                                             {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                              "original_max_position_embeddings": 32}]))
    if family == "gpt_neox":
        settings["hidden_size"] = heads * rng.choice([8, 16])  # so that every fraction turns an even number of channels
        return settings | dict(rotary_pct=rng.choice([0.25, 0.5, 0.75, 1.0]), rotary_emb_base=rng.choice([100, 10000]),
                               layer_norm_eps=rng.choice([1e-5, 1e-3]), use_parallel_residual=rng.random() < 0.5,
                               attention_bias=rng.random() < 0.5)
    settings |= dict(num_key_value_heads=rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
                     rms_norm_eps=rng.choice([1e-6, 1e-3]), rope_theta=rng.choice([100.0, 10000.0]))
    if family in ("llama", "mistral", "qwen3"):
        settings["head_dim"] = rng.choice([4, 6, 10, 16])
    if family in ("llama", "qwen3"):
        settings["attention_bias"] = rng.random() < 0.5
    if family == "llama":
        settings["mlp_bias"] = rng.random() < 0.5
    if family == "mistral":
        settings["sliding_window"] = rng.choice([None, rng.randint(1, 6)])
    if family in ("qwen2", "qwen3") and rng.random() < 0.7:
        settings |= dict(use_sliding_window=True, sliding_window=rng.randint(1, 6))
        if rng.random() < 0.5:
            settings["layer_types"] = [rng.choice(["sliding_attention", "full_attention"]) for _ in range(layers)]
        else:
            settings["max_window_layers"] = rng.randint(0, layers)
    return settings


@torch.no_grad()
def shake(model, seed):
    """Random weights of unit gain, norms and biases included: with the usual init a wrong bias or an unused norm weight would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() > 1:
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
        else:
            parameter.copy_(0.3 * noise + ("bias" not in name))
    return model


def random_gpt(family, rng, dtype, **changes):
    """Our model alone, for the tests that need no oracle."""
    config = GPTConfig.from_hf({"model_type": family, **random_settings(family, rng), **changes})
    return shake(GPT(config).to(dtype), rng.randrange(2**31))


def import_transformers():
    transformers = pytest.importorskip("transformers", reason="the oracle, a development dependency, is not installed")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def random_oracle(family, rng, task="ForCausalLM", **changes):
    """transformers' model of the family with random settings and shaken weights, and the settings."""
    transformers = import_transformers()
    settings = random_settings(family, rng) | changes
    config = transformers.AutoConfig.for_model(family, bos_token_id=None, eos_token_id=None, **settings)
    oracle = getattr(transformers, f"AutoModel{task}").from_config(config, attn_implementation="sdpa").eval()
    return shake(oracle, rng.randrange(2**31)), settings


def in_float64(oracle, config):
    """The oracle in float64 throughout: transformers computes every RMSNorm in float32, whatever the dtype of the model.

    Its llama3 frequencies round in another order than ours; both are float32, so they are held equal to 1e-6 and then exchanged,
    as for the comparison of the rest to 1e-10 the angles must be the same.
    """
    def rms_norm(module, x):
        eps = getattr(module, "variance_epsilon", None) or module.eps
        return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    oracle.double()
    for module in oracle.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(rms_norm, module)
        if hasattr(module, "inv_freq"):
            exponent = torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim
            ours = 1.0 / config.rope_theta**exponent
            ours = scale_rotation(ours, config.rope_scaling) if config.rope_scaling else ours
            assert torch.allclose(ours.double(), module.inv_freq, rtol=1e-6, atol=0)
            module.inv_freq = ours
    return oracle


def random_tokens(model, B, T, seed=0):
    return torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------------- parity


def check_parity(family, seeds, tmp_path):
    from minialign.weights import load_pretrained

    for seed in seeds:
        rng = random.Random(f"parity {family} {seed}")
        oracle, settings = random_oracle(family, rng)
        oracle.save_pretrained(tmp_path)
        inputs = random_tokens(oracle, 2, rng.randint(1, 24), seed)
        for dtype in (torch.float32, torch.float64):
            model = load_pretrained(tmp_path, dtype=dtype)
            assert model.config == GPTConfig.from_hf({"model_type": family, **settings}), (seed, settings)  # old file, new file: one config
            oracle = oracle if dtype == torch.float32 else in_float64(oracle, model.config)
            with torch.no_grad():
                theirs, ours = oracle(inputs).logits, model(inputs)
            assert ours.shape == (*inputs.shape, settings["vocab_size"]) and ours.dtype == theirs.dtype == dtype
            assert (ours - theirs).abs().max() <= TOLERANCE[dtype], (seed, dtype, settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path, record_property):
    """50 random configurations: the folder that transformers saves, loaded by us, gives transformers' logits in both precisions."""
    check_parity(family, range(N_RANDOM), tmp_path)
    record_property("tried", N_RANDOM)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_on_many_more(family, tmp_path, record_property):
    check_parity(family, range(N_RANDOM, 4 * N_RANDOM), tmp_path)
    record_property("tried", 3 * N_RANDOM)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_settings_reach_every_mechanism(family):
    """Parity proves nothing about an option that was never drawn: each option of the family occurs with each of its values."""
    configs = [GPTConfig.from_hf({"model_type": family, **random_settings(family, random.Random(f"parity {family} {seed}"))})
               for seed in range(N_RANDOM)]

    def seen(describe):
        return {describe(config) for config in configs}

    assert seen(lambda c: c.tied) == {True, False} and seen(lambda c: c.n_layer) == {1, 2, 3} and len(seen(lambda c: c.activation)) >= 3
    if family != "gpt2":
        assert seen(lambda c: (c.rope_scaling or {}).get("rope_type")) == {None, "linear", "llama3"}
    if family == "gpt_neox":
        assert len(seen(lambda c: (c.parallel_residual, c.qkv_bias))) == 4
        assert seen(lambda c: c.rotary_dim / c.head_dim) == {0.25, 0.5, 0.75, 1.0}
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        assert seen(lambda c: c.n_kv_head < c.n_head) == {True, False}
    if family in ("llama", "mistral", "qwen3"):
        assert seen(lambda c: c.head_dim * c.n_head == c.n_embd) == {True, False}
    if family in ("llama", "qwen3"):
        assert seen(lambda c: c.qkv_bias) == {True, False}
    if family == "llama":
        assert len(seen(lambda c: (c.mlp_bias, c.qkv_bias))) == 4
    if family in ("mistral", "qwen2", "qwen3"):
        assert {1, 2, 6} <= seen(lambda c: max(w or 0 for w in c.windows))
    if family in ("qwen2", "qwen3"):
        assert sum(len(set(c.windows)) == 2 for c in configs) >= 5  # windowed and full layers in one model


# ------------------------------------------------------------------------------------------- config.json as others write it


def random_edits(family, rng):
    """Keys of config.json that change the model or that transformers ignores, in old, new and mixed forms, None and absent keys too."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0}
    ropes = [None, {}, {"type": "default"}, {"type": "linear", "factor": 2}, {"rope_type": "linear", "type": "yarn", "factor": 3.5},
             llama3, llama3 | {"original_max_position_embeddings": 32, "rope_theta": 500}, {"rope_type": "default", "rope_theta": 200.0},
             {"rope_type": "default", "partial_rotary_factor": 0.5}, {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
             {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, {"type": "dynamic", "factor": 2.0},
             {"full_attention": {"rope_type": "default", "rope_theta": 100.0}, "sliding_attention": {"rope_type": "default"}}]
    kinds = [[rng.choice(["full_attention", "sliding_attention"]) for _ in range(3)], ["full_attention"] * 3, None,
             ["sliding_attention"] * 3, ["chunked_attention"] * 3]
    acts = ["silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate",
            "relu", "relu2", "quick_gelu", "tanh"]
    choices = dict(rope_scaling=ropes, rope_parameters=ropes, rope_theta=[100, 1e6], partial_rotary_factor=[None, 0.5, 1.0],
                   rotary_pct=[0.5, 1.0], rotary_emb_base=[100, 500.0], original_max_position_embeddings=[16],
                   sliding_window=[None, 1, 3], use_sliding_window=[True, True, False], max_window_layers=[0, 1, 2, 3], layer_types=kinds,
                   head_dim=[None, 8, 16], num_key_value_heads=[None, 1, 2, "absent"], tie_word_embeddings=["absent"],
                   attention_bias=[True, False], mlp_bias=[True, False], hidden_act=acts, activation_function=acts,
                   attention_dropout=[0.1], hidden_dropout=[0.1], quantization_config=[None, {"quant_method": "awq"}], is_decoder=[True],
                   attention_multiplier=[0.5], attn_logit_softcapping=[3.0], query_pre_attn_scalar=[2], logit_scale=[0.5],
                   pretraining_tp=[2], use_parallel_residual=[True, False, "absent"], hidden_size=[32], n_inner=[None, 20, "absent"],
                   intermediate_size=[24], scale_attn_weights=[False], scale_attn_by_inverse_layer_idx=[True],
                   reorder_and_upcast_attn=[True], layer_norm_epsilon=["absent"], rms_norm_eps=["absent"], per_layer_config=[None])
    if family == "gpt2":
        choices |= dict(num_attention_heads=[1, 4], num_hidden_layers=[1, 2], max_position_embeddings=[24])
    return {key: rng.choice(values) for key, values in choices.items() if rng.random() < 0.15}


def check_edited_configs(family, seeds, tmp_path):
    """Each edited config.json either gives transformers' logits or is refused by the name of an edited key. Returns (equal, refused)."""
    from minialign.weights import load_pretrained

    transformers, equal, refused = import_transformers(), 0, 0
    sizes = dict(vocab_size=40, num_hidden_layers=3, num_attention_heads=4, hidden_size=32, intermediate_size=24, hidden_act="gelu",
                 max_position_embeddings=64, num_key_value_heads=2, layer_norm_eps=1e-5, rms_norm_eps=1e-6, head_dim=8)
    if family == "gpt2":
        sizes = dict(vocab_size=40, n_layer=3, n_head=4, n_embd=32, n_positions=64, bos_token_id=None, eos_token_id=None)
    for seed in seeds:
        rng = random.Random(f"edits {family} {seed}")
        edits = random_edits(family, rng)
        hf = {"model_type": family, **sizes, **edits}
        hf = {key: value for key, value in hf.items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(hf))
        try:
            assert not hf.get("quantization_config")  # transformers would need another library
            config = transformers.AutoConfig.from_pretrained(tmp_path)
            oracle = shake(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval(), seed)
            inputs = random_tokens(oracle, 2, 12, seed)
            with torch.no_grad():
                oracle(inputs)
            oracle.save_pretrained(tmp_path)
            (tmp_path / "config.json").write_text(json.dumps(hf))
        except Exception:
            oracle = None  # transformers refuses it, in its own way
        try:
            model = load_pretrained(tmp_path, dtype=torch.float64)
        except BadInput as error:
            refused += 1
            assert oracle is None or any(key in str(error) for key in edits) or "rope scaling" in str(error), (seed, edits, error)
            continue
        if oracle is None:
            continue
        with torch.no_grad():
            assert (in_float64(oracle, model.config)(inputs).logits - model(inputs)).abs().max() <= 1e-9, (seed, edits)
        assert GPTConfig.from_hf(json.loads(json.dumps(config_to_hf(model.config)))) == model.config, (seed, edits)
        equal += 1
    return equal, refused


@pytest.mark.parametrize("family", FAMILIES)
def test_edited_configs_give_transformers_logits_or_are_refused_by_name(family, tmp_path):
    equal, refused = check_edited_configs(family, range(20), tmp_path)
    assert equal >= 8 and refused >= 2, (equal, refused)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_many_more_edited_configs(family, tmp_path):
    check_edited_configs(family, range(40, 300), tmp_path)


# ---------------------------------------------------------------------------------------------------------------- KV cache


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_equals_full_forward(family, dtype):
    """Ragged chunks (some rows advance by nothing), single tokens, repeated and dropped rows: each real position's logits equal those
    of the row alone, seen whole, without a cache. Tokens beyond a row's length are garbage on purpose.
    """
    for seed in range(12):
        rng = random.Random(f"cache {family} {seed}")
        model = random_gpt(family, rng, dtype)
        cache = KVCache(model.config, 4, 24, dtype=dtype)
        rows = [[] for _ in range(4)]  # the tokens that each row holds
        for chunk in range(7):
            T = (rng.randint(2, 8), 1, 1, rng.randint(2, 4), 1, 3, 1)[chunk]
            ragged = chunk in (0, 3, 4, 5)
            real = [rng.randint(chunk == 0, T) if ragged else T for _ in rows]
            inputs = random_tokens(model, len(rows), T, seed=rng.randrange(2**31))
            with torch.no_grad():
                logits = model(inputs, cache=cache, lengths=torch.tensor(real) if ragged else None)
                for b, row in enumerate(rows):
                    row += inputs[b, : real[b]].tolist()
                    alone = model(torch.tensor([row]))[0, len(row) - real[b] :]
                    assert (logits[b, : real[b]] - alone).abs().max() <= TOLERANCE[dtype] if real[b] else True, (seed, chunk, b)
            assert cache.lengths.tolist() == [len(row) for row in rows]
            if chunk in (1, 4):
                keep = [rng.randrange(len(rows)) for _ in range(rng.randint(2, 6))]
                cache, rows = cache.select(keep), [list(rows[i]) for i in keep]


def test_a_selected_row_is_a_copy():
    """Two samples of one prefill go different ways; neither disturbs the other, nor the cache they came from."""
    model = random_gpt("llama", random.Random(3), torch.float64)
    prompt, first, second = random_tokens(model, 1, 5), torch.tensor([[1], [2]]), torch.tensor([[3], [4]])
    with torch.no_grad():
        source = KVCache(model.config, 1, 8, dtype=torch.float64)
        model(prompt, cache=source)
        twice = source.select([0, 0])
        model(first, cache=twice)
        ours = model(second, cache=twice)
        alone = model(torch.cat([prompt.expand(2, -1), first, second], dim=1))[:, -1:]
        untouched = model(second[:1], cache=source)
    assert (ours - alone).abs().max() <= 1e-12 and (ours[0] - ours[1]).abs().max() > 1e-3
    assert source.lengths.tolist() == [6] and (untouched - model(torch.cat([prompt, second[:1]], 1))[:, -1:]).abs().max() <= 1e-12


def test_an_empty_cache_needs_no_mask(monkeypatch):
    """Plain causal attention is the fast kernel on CUDA, also for grouped keys. Tokens that continue a row do need a mask."""
    attention, masks = torch.nn.functional.scaled_dot_product_attention, []

    def watched(q, k, v, attn_mask=None, **rest):
        masks.append(attn_mask)
        return attention(q, k, v, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = random_gpt("llama", random.Random(4), torch.float64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    inputs, cache = random_tokens(model, 3, 9), KVCache(model.config, 3, 20, dtype=torch.float64)
    with torch.no_grad():
        prefill = model.hidden(inputs, cache=cache, lengths=torch.tensor([9, 4, 1]))
        model.hidden(inputs[:, :2], cache=cache)
        assert [mask is None for mask in masks] == [True, False] and torch.equal(prefill, model.hidden(inputs))


def test_cache_overflow_is_refused():
    model = random_gpt("llama", random.Random(0), torch.float32)
    cache = KVCache(model.config, 2, 6)
    model(random_tokens(model, 2, 6), cache=cache)
    with pytest.raises(BadInput, match=r"7 positions do not fit the KV cache's 6: shorten the rows \(--max_len, --max_new\)"):
        model(random_tokens(model, 2, 1), cache=cache)


def test_learned_position_overflow_is_refused():
    model = random_gpt("gpt2", random.Random(0), torch.float32, n_positions=10)
    assert model(random_tokens(model, 1, 10)).shape[1] == 10
    with pytest.raises(BadInput, match=r"11 positions do not fit the model's context of 10: shorten the rows"):
        model(random_tokens(model, 1, 11))


def test_learned_position_overflow_is_refused_in_a_roomy_cache():
    """The cache has room for 20 positions, the table of learned positions only for 10: the table decides."""
    model = random_gpt("gpt2", random.Random(0), torch.float32, n_positions=10)
    cache = KVCache(model.config, 1, 20)
    model(random_tokens(model, 1, 10), cache=cache)
    with pytest.raises(BadInput, match="11 positions do not fit the model's context of 10"):
        model(random_tokens(model, 1, 1), cache=cache)


# ----------------------------------------------------------------------------------------------- what must change nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_changes_no_real_position(family):
    """0 to 64 pads of random tokens: the real positions stay within 1e-6 in float32 and 1e-12 in float64."""
    for seed, pads in enumerate((0, 1, 2, 5, 17, 33, 64)):
        rng = random.Random(f"padding {family} {seed}")
        changes = {"n_positions": 80} if family == "gpt2" else {}
        model = random_gpt(family, rng, torch.float64, **changes)
        inputs = random_tokens(model, 3, rng.randint(1, 12), seed)
        padded = torch.cat([inputs, random_tokens(model, 3, pads, seed + 1)], dim=1)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            model = model.to(dtype)
            with torch.no_grad():
                hidden = model.hidden(padded)[:, : inputs.shape[1]]
                assert (hidden - model.hidden(inputs)).abs().max() <= tolerance * max(1, hidden.abs().max()), (seed, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_change_no_earlier_logit(family):
    """Causality, with teeth: the changed token's own logits and the next position's do change."""
    for seed in range(5):
        model = random_gpt(family, random.Random(f"causal {family} {seed}"), torch.float64, sliding_window=3)
        inputs = random_tokens(model, 2, 11, seed)
        changed = inputs.clone()
        changed[:, 6] = (changed[:, 6] + 1) % model.config.vocab_size
        with torch.no_grad():
            moved = (model(inputs) - model(changed)).abs().amax(dim=(0, 2))  # (T,)
        assert moved[:6].max() == 0 and moved[6] > 1e-4 and moved[7] > 1e-6, (seed, moved)


def test_a_window_hides_what_lies_behind_it():
    """A window of w reaches w - 1 positions back, so L layers reach L·(w - 1): 2 layers of w = 4 reach 6 back and never 7."""
    changes = dict(sliding_window=4, num_hidden_layers=2)
    model = random_gpt("mistral", random.Random(1), torch.float64, **changes)
    inputs = random_tokens(model, 1, 12)
    changed = inputs.clone()
    changed[0, 2] = (changed[0, 2] + 1) % model.config.vocab_size
    with torch.no_grad():
        moved = (model(inputs) - model(changed)).abs().amax(dim=(0, 2)) > 1e-9  # (T,)
    assert moved.tolist() == [False] * 2 + [True] * 7 + [False] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_embeds_and_head_weight_are_the_two_ends(family):
    """embeds=embed(inputs) equals inputs; hidden @ head_weight.T equals forward; other embeds do change the result."""
    model = random_gpt(family, random.Random(f"ends {family}"), torch.float64)
    inputs = random_tokens(model, 2, 9)
    with torch.no_grad():
        embeds, hidden, logits = model.embed(inputs), model.hidden(inputs), model(inputs)
        assert embeds.shape == hidden.shape == (2, 9, model.config.n_embd)
        assert torch.equal(model(inputs, embeds=embeds), logits)
        assert (hidden @ model.head_weight.T - logits).abs().max() <= 1e-12
        assert (model(inputs, embeds=embeds + 0.1 * torch.randn_like(embeds)) - logits).abs().max() > 1e-3
    assert model.head_weight.shape == (model.config.vocab_size, model.config.n_embd)


def test_tied_head_is_the_embedding_and_untied_is_not():
    tied, untied = GPT(GPTConfig.tiny(11)), GPT(GPTConfig.tiny(11, tied=False))
    assert tied.head_weight is tied.tok_embed.weight
    assert untied.head_weight is not untied.tok_embed.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 11 * 64


# ------------------------------------------------------------------------------------------------------------- scalar head


@pytest.mark.parametrize("tied", [True, False])
def test_with_scalar_head_shares_the_values_of_the_trunk_and_no_memory(tied):
    model = random_gpt("llama", random.Random(5), torch.float64, tie_word_embeddings=tied)
    reward = model.with_scalar_head()
    inputs = random_tokens(model, 2, 7)
    assert (model.config.head, reward.config.head, reward.config.tied) == ("lm", "scalar", False)
    assert torch.equal(model.hidden(inputs), reward.hidden(inputs))
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in reward.parameters())
    assert reward.head_weight.shape == (1, model.config.n_embd) and reward.head_weight.dtype == torch.float64
    assert reward(inputs).shape == (2, 7) and model(inputs).shape == (2, 7, model.config.vocab_size)

    before = model(inputs).detach()
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(inputs), before)


def test_scalar_head_subtracts_the_reward_offset():
    model = GPT(GPTConfig.tiny(11, head="scalar", tied=False)).double()
    inputs = random_tokens(model, 2, 5)
    before = model(inputs)
    model.config.reward_offset = 1.5
    assert torch.allclose(model(inputs), before - 1.5, rtol=0, atol=1e-12)
    assert torch.allclose(before, (model.hidden(inputs) @ model.head_weight.T)[..., 0], rtol=0, atol=1e-12)


def test_scalar_head_starts_with_the_width_of_the_paper():
    """std 1/sqrt(C + 1) = 1/sqrt(1024) = 0.03125 for C = 1023, whether the model is built or converted."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=5, n_layer=1, n_head=1, n_embd=1023, head_dim=2, ffn_dim=2, head="scalar", tied=False)
    for head in (GPT(config).head_weight, GPT(GPTConfig(**{**vars(config), "head": "lm"})).with_scalar_head().head_weight):
        assert head.std().item() == pytest.approx(0.03125, rel=0.1)


# ---------------------------------------------------------------------------------------------------------- positions, init


def test_rotary_angles_by_hand():
    """Two pairs, theta = 100: speeds 1 and 100^(-2/4) = 1/10. Position 7: angles 7 and 0.7."""
    config = GPTConfig(vocab_size=5, n_head=1, n_embd=8, rotary_dim=4, rope_theta=100.0)
    cos, sin = rotary_angles(config, torch.tensor([[0, 7]]))
    assert cos.shape == sin.shape == (1, 1, 2, 2) and cos.dtype == torch.float32
    assert cos[0, 0, 0].tolist() == [1.0] * 2 and sin[0, 0, 0].tolist() == [0.0] * 2
    assert cos[0, 0, 1].tolist() == pytest.approx([math.cos(7), math.cos(0.7)], abs=1e-6)
    assert sin[0, 0, 1].tolist() == pytest.approx([math.sin(7), math.sin(0.7)], abs=1e-6)


def test_rope_scaling_by_hand():
    """linear: every speed divided by the factor 4.

    llama3 with an old context of 100, low 1, high 4, factor 8: a pair of n turns within the context has speed 2πn/100. n = 5: kept.
    n = 0.5: divided by 8. n = 2.5: halfway up the ramp, so (1 + 1/8)/2 = 0.5625 of it.
    """
    assert scale_rotation(torch.tensor([1.0, 0.5]), {"rope_type": "linear", "factor": 4.0}).tolist() == [0.25, 0.125]
    speed = 2 * math.pi * torch.tensor([5.0, 2.5, 0.5]) / 100
    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=100)
    assert (scale_rotation(speed, llama3) / speed).tolist() == pytest.approx([1.0, 0.5625, 0.125], rel=1e-5)


def test_fresh_weights_have_gpt2s_widths():
    """std 0.02, and 0.02/sqrt(2L) = 0.01 for the projections into the residual stream of L = 2 layers; norms 1, biases 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny(200, qkv_bias=True, out_bias=True, mlp_bias=True, norm="layer"))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            width = 0.01 if name.endswith(("attn.o.weight", "mlp.down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(width, rel=0.05), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_bfloat16_stays_near_float32():
    """Weights rounded to bfloat16 run in either dtype: rotary angles and norms are computed in float32, so position 500 is no worse."""
    model = random_gpt("llama", random.Random(2), torch.bfloat16, rope_theta=10000.0, max_position_embeddings=600)
    inputs = random_tokens(model, 1, 500)
    cache = KVCache(model.config, 1, 500, dtype=torch.bfloat16)
    with torch.no_grad():
        narrow, cached = model(inputs).float(), model(inputs, cache=cache).float()
        wide = model.float()(inputs)
    assert narrow.isfinite().all() and (narrow - wide).abs().max() < 0.2 and (cached - wide).abs().max() < 0.2
    assert (narrow - wide)[:, 300:].abs().mean() < 2 * (narrow - wide)[:, :200].abs().mean() + 1e-3


# ----------------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
def test_gradients_by_finite_differences(family):
    """Every parameter, and the embeddings that IFT differentiates through, in float64; qwen3 with grouped keys and a window of 2."""
    sizes = dict(gpt2=dict(n_embd=4, n_head=2, n_inner=5, n_positions=6, n_layer=1),
                 gpt_neox=dict(hidden_size=16, num_attention_heads=2, intermediate_size=5, num_hidden_layers=1, rotary_pct=0.5),
                 qwen3=dict(hidden_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=4, intermediate_size=5,
                            num_hidden_layers=2, use_sliding_window=True, sliding_window=2,
                            layer_types=["sliding_attention", "full_attention"]))[family]
    model = random_gpt(family, random.Random(0), torch.float64, vocab_size=5, tie_word_embeddings=True, **sizes)
    inputs, weight = random_tokens(model, 2, 4), torch.randn(2, 4, 5, dtype=torch.float64)
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(embeds, *values):
        arguments = dict(embeds=embeds) if embeds is not None else {}
        return (torch.func.functional_call(model, dict(zip(names, values, strict=True)), (inputs,), arguments) * weight).sum()

    values = [value.detach().requires_grad_(True) for value in values]
    assert torch.autograd.gradcheck(lambda *values: loss(None, *values), values, eps=1e-6, atol=1e-6)
    embeds = model.embed(inputs).detach().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda embeds: loss(embeds, *values), embeds, eps=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- errors


def test_config_errors_name_the_culprit():
    with pytest.raises(BadInput, match="4 heads cannot share 3 key-value heads evenly: n_kv_head must divide n_head"):
        GPTConfig(vocab_size=5, n_head=4, n_kv_head=3)
    with pytest.raises(BadInput, match="windows has 1 entries for 2 layers: give one per layer"):
        GPTConfig(vocab_size=5, windows=(3,))


LLAMA = dict(model_type="llama", vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
             max_position_embeddings=8, rms_norm_eps=1e-5)
GPT2 = dict(model_type="gpt2", vocab_size=5, n_embd=8, n_layer=1, n_head=2, n_positions=8)
NEOX = {**{k: v for k, v in LLAMA.items() if k != "rms_norm_eps"}, "model_type": "gpt_neox", "layer_norm_eps": 1e-5}


@pytest.mark.parametrize(("changes", "message"), [
    (dict(model_type="mamba"), r"model_type 'mamba' is not implemented; supported are gpt2, gpt_neox, llama, mistral, qwen2, qwen3"),
    (dict(model_type=None), "model_type None is not implemented"),
    (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope scaling 'yarn' is not implemented; supported are default, linear, llama3"),
    (dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), "rope scaling 'dynamic' is not implemented"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "the key 'low_freq_factor' is missing"),
    (dict(hidden_act="xielu"), "hidden_act 'xielu' is not implemented; supported are silu"),
    (dict(rope_scaling={"sliding_attention": {"rope_type": "default"}}), "rope_parameters for sliding_attention alone are not implemented"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5 with rope scaling"),
    (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config is not implemented"),
    (dict(model_type="qwen2", layer_types=["sliding_attention"]), "layer_types has 'sliding_attention': with sliding_window None"),
    (dict(model_type="mistral", sliding_window=0), "sliding_window must be a whole number from 1, or null, found 0"),
    (dict(model_type="mistral", layer_types=["chunked_attention"]), "layer_types has 'chunked_attention': with sliding_window 4096"),
    (dict(num_key_value_heads=3), "2 heads cannot share 3 key-value heads"),
    (dict(num_attention_heads="2"), "a value has the wrong type or size for a llama model"),
    (dict(num_attention_heads=0), "a value has the wrong type or size for a llama model"),
    (dict(architectures=["LlamaForSequenceClassification"], num_labels=3), "a classifier with 3 labels is not a reward model: expected 1"),
])
def test_config_json_errors_name_the_culprit(changes, message):
    assert GPTConfig.from_hf(LLAMA).n_embd == 8  # sound without the change
    with pytest.raises(BadInput, match=message) as error:
        GPTConfig.from_hf(LLAMA | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "value"), [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
                                               ("add_cross_attention", True)])
def test_gpt2_options_that_are_not_implemented_are_named(option, value):
    with pytest.raises(BadInput, match=f"gpt2 with {option}={value} is not implemented: expected {not value}"):
        GPTConfig.from_hf(GPT2 | {option: value})


@pytest.mark.parametrize("sound", [LLAMA, GPT2, NEOX], ids=lambda config: config["model_type"])
def test_each_missing_key_is_named(sound):
    for key in sound.keys() - {"model_type"}:
        with pytest.raises(BadInput, match=f"the key '{key}' is missing, but a {sound['model_type']} model needs it"):
            GPTConfig.from_hf({k: v for k, v in sound.items() if k != key})


def test_odd_values_in_config_json_are_refused_or_make_a_model():
    """Every value of a sound config exchanged for every odd one: a BadInput, or a model that can be built; never another exception."""
    odd = [None, 0, -1, 1.5, float("nan"), float("inf"), "abc", True, [1], {"a": 1}, 2**70]
    optional = dict(head_dim=4, num_key_value_heads=1, rope_theta=1e4, rope_scaling=None, hidden_act="silu", tie_word_embeddings=True,
                    architectures=["LlamaForSequenceClassification"], id2label={"0": "a"}, num_labels=1, attention_bias=True,
                    sliding_window=2, use_sliding_window=True, layer_types=["full_attention"], max_window_layers=0, reward_offset=0.0,
                    activation_function="gelu", n_inner=4, rotary_pct=0.5, rope_parameters={})
    refused, built = 0, []
    for sound in (LLAMA, GPT2, NEOX, LLAMA | {"model_type": "qwen3", "num_key_value_heads": 1}):
        for key in sound | optional:
            for value in odd:
                try:
                    config = GPTConfig.from_hf({**sound, "num_labels": 1, **{key: value}})
                    if config not in built:
                        with torch.device("meta"):
                            GPT(config)
                        built.append(config)
                except BadInput as error:
                    refused += 1
                    assert str(error).strip()
                except Exception as error:
                    pytest.fail(f"{sound['model_type']} with {key}={value!r}: {type(error).__name__}: {error}")
    assert refused > 200


@pytest.mark.parametrize(("name", "value"), [("norm", "foo"), ("positions", "sinus"), ("head", "value"), ("activation", "tanh")])
def test_a_mechanism_that_does_not_exist_is_refused(name, value):
    with pytest.raises(BadInput, match=f"{name} must be one of .*, found '{value}'"):
        GPTConfig(vocab_size=7, **{name: value})


def saved_bytes(model, batch):
    """(loss, gradients, bytes that the forward pass leaves for the backward pass)."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch).square().mean()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return float(loss), gradients, sum(kept.values())


def test_activation_checkpointing_changes_memory_alone():
    """Loss and gradients bit for bit; of six layers some two are kept. With a cache, and without a gradient, nothing is different."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny(50, n_layer=6)).double()
    batch = torch.randint(50, (4, 24))
    loss, gradients, kept = saved_bytes(model, batch)
    model.recompute = True
    loss_again, gradients_again, kept_again = saved_bytes(model, batch)
    assert loss == loss_again and all(torch.equal(p, q) for p, q in zip(gradients, gradients_again, strict=True))
    assert kept_again < 0.4 * kept
    assert torch.equal(model.hidden(batch), model.hidden(batch, cache=KVCache(model.config, 4, 24, dtype=torch.float64)))


def test_padding_for_a_gpu():
    """Up to the next multiple of 64, but within the context."""
    found = [padding_for_gpu(T, max_len) for T, max_len in ((1, 1000), (64, 1000), (65, 1000), (999, 1000), (1000, 1000), (70, 60))]
    assert found == [63, 0, 63, 1, 0, 0]
