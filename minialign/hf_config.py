"""Convert between Hugging Face's config.json and the fields of model.GPTConfig, for six families.

The keys of config.json differ between families, and older files store the same setting under another key. We read only the settings that
change the computation. A value that we cannot reproduce raises an error that names it, so that no model is computed slightly wrong.

Checked by tests/test_model.py and tests/test_weights.py, against transformers.
"""

from minialign.engine.common import BadInput

FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
HF_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
                  "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu"}
MOST_LAYERS = 1000  # several times as many as any published model has: beyond it the file is damaged, and building it would take for ever
REFUSED = ("quantization_config", "per_layer_config")  # other numbers or other layers than the rest of config.json says


def config_from_hf(hf, make):
    """Call make (GPTConfig) with the fields from a config.json's dict. Raises BadInput with the key if a setting is not implemented."""
    family = "mistral" if hf.get("model_type") == "ministral" else hf.get("model_type")  # mistral with windows per layer
    if family not in FAMILIES:
        raise BadInput(f"config.json: model_type {family!r} is not implemented; supported are {', '.join(FAMILIES)}")
    if refused := [key for key in REFUSED if hf.get(key) is not None]:
        raise BadInput(f"config.json: {refused[0]} is not implemented: expected a model without it")
    try:
        layers = hf.get("n_layer", hf.get("num_hidden_layers"))
        if isinstance(layers, int) and not 1 <= layers <= MOST_LAYERS:
            raise BadInput(f"{layers} layers: expected 1 to {MOST_LAYERS}")
        if hf.get("is_causal", True) is not True:
            raise BadInput(f"is_causal={hf['is_causal']!r} is not implemented: every position sees only itself and earlier ones")
        return make(**(_gpt2_fields if family == "gpt2" else _rotary_fields)(hf, family))
    except KeyError as error:
        raise BadInput(f"config.json: the key {error} is missing, but a {family} model needs it") from None
    except BadInput as error:
        raise BadInput(f"config.json: {str(error).removeprefix('config.json: ')}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise BadInput(f"config.json: a value has the wrong type or size for a {family} model ({error})") from None


REWARD_FIELDS = ("reward_offset", "reward_read", "reward_bound", "reward_pad")  # fields that transformers' classifiers do not have


def _reward_fields(hf, head):
    stored = {name: hf[name] for name in REWARD_FIELDS if name in hf}
    others = head == "scalar" and "reward_read" not in hf  # a classifier that was not written here
    return stored | {"reward_read": "conversation", "reward_pad": hf.get("pad_token_id")} if others else stored


def _head_kind(hf):
    architectures = hf.get("architectures") or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        labels = hf.get("num_labels", 2) if hf.get("id2label") is None else len(hf["id2label"])
        if labels != 1:
            raise BadInput(f"config.json: a classifier with {labels} labels is not a reward model: expected 1")
        return "scalar"
    return "lm"


def _activation(hf, key, default):
    name = hf.get(key, default)
    if name not in HF_ACTIVATIONS:
        raise BadInput(f"config.json: {key} {name!r} is not implemented; supported are {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[name]


def _gpt2_fields(hf, family):
    for option, expected in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
        if hf.get(option, expected) != expected:
            raise BadInput(f"config.json: gpt2 with {option}={hf[option]} is not implemented: expected {expected}")
    general = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
               "n_positions": "max_position_embeddings"}  # the names of the other families are valid too, and they win
    hf = hf | {own: hf[name] for own, name in general.items() if name in hf}
    head = _head_kind(hf)
    return dict(
        vocab_size=hf["vocab_size"], n_layer=hf["n_layer"], n_head=hf["n_head"], n_embd=hf["n_embd"], ffn_dim=hf.get("n_inner"),
        max_len=hf["n_positions"], norm="layer", norm_eps=hf.get("layer_norm_epsilon", 1e-5), gated=False, positions="learned",
        activation=_activation(hf, "activation_function", "gelu_new"), qkv_bias=True, out_bias=True, mlp_bias=True,
        tied=head == "lm" and hf.get("tie_word_embeddings", True), head=head, **_reward_fields(hf, head), family=family,
    )


def _rotary_fields(hf, family):
    neox = family == "gpt_neox"
    n_head, n_embd, n_layer = hf["num_attention_heads"], hf["hidden_size"], hf["num_hidden_layers"]
    rotated = hf.get("head_dim") or (128 if family == "qwen3" else n_embd // n_head)
    head_dim = n_embd // n_head if neox else rotated  # gpt_neox has no head_dim; if a file names one, it changes the rotation alone

    # rope_scaling beside rope_parameters replaces it. In older files, theta and the rotated fraction lie beside them.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if nested := sorted({"full_attention", "sliding_attention"} & rope.keys()):
        raise BadInput(f"rope_scaling or rope_parameters for {nested[0]} alone are not implemented: expected the same for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise BadInput(f"rope scaling {kind!r} is not implemented; supported are default, linear, llama3")
    scaling = None
    if kind != "default":
        needed = ["factor"] + ["low_freq_factor", "high_freq_factor"] * (kind == "llama3")
        scaling = {"rope_type": kind, **{key: rope[key] for key in needed}}
    if kind == "llama3":
        old = "original_max_position_embeddings"
        scaling[old] = hf.get(old, rope.get(old, hf["max_position_embeddings"]))
    theta = rope.get("rope_theta", hf.get("rotary_emb_base" if neox else "rope_theta", 10000.0))
    fraction = rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25) if neox else hf.get("partial_rotary_factor"))
    if not neox and scaling and fraction not in (None, 1):
        raise BadInput(f"partial_rotary_factor={fraction} with rope scaling {kind!r} is not implemented for {family}: expected 1")

    window = hf.get("sliding_window", 4096)
    if family in ("qwen2", "qwen3") and not hf.get("use_sliding_window", False) or family in ("llama", "gpt_neox"):
        window = None
    if window is not None and (type(window) is not int or window < 1):
        raise BadInput(f"sliding_window must be a whole number from 1, or null, found {window!r}")
    kinds = hf.get("layer_types") if family in ("mistral", "qwen2", "qwen3") else None
    if kinds is None:
        full = n_layer if window is None else 0 if family == "mistral" else min(hf.get("max_window_layers", 28), n_layer)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (n_layer - full)
    allowed = ["full_attention"] + ["sliding_attention"] * (window is not None)
    if unknown := [kind for kind in kinds if kind not in allowed]:
        raise BadInput(f"layer_types has {unknown[0]!r}: with sliding_window {window}, expected {' or '.join(allowed)}")

    bias = bool(hf.get("attention_bias", neox)) if family in ("gpt_neox", "llama", "qwen3") else False
    head = _head_kind(hf)
    return dict(
        vocab_size=hf["vocab_size"], n_layer=n_layer, n_head=n_head, n_embd=n_embd, head_dim=head_dim,
        n_kv_head=None if neox else hf.get("num_key_value_heads", {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(family)),
        ffn_dim=hf["intermediate_size"], max_len=hf["max_position_embeddings"],
        norm="layer" if neox else "rms", norm_eps=hf["layer_norm_eps"] if neox else hf["rms_norm_eps"],
        activation=_activation(hf, "hidden_act", "gelu" if neox else "silu"), gated=not neox,
        rotary_dim=int(rotated * fraction) if neox else head_dim, rope_theta=float(theta), rope_scaling=scaling,
        parallel_residual=neox and hf.get("use_parallel_residual", True),
        qkv_bias=family == "qwen2" or bias, out_bias=bias, mlp_bias=neox or family == "llama" and hf.get("mlp_bias", False),
        qk_norm=family == "qwen3", windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        tied=head == "lm" and hf.get("tie_word_embeddings", False), head=head,
        **_reward_fields(hf, head), family=family,
    )


def config_to_hf(config):
    """The config.json from which transformers builds this model. The inverse of config_from_hf."""
    classes = {"gpt2": "GPT2", "gpt_neox": "GPTNeoX", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    if config.family == "gpt2":
        task = "LMHeadModel" if config.head == "lm" else "ForSequenceClassification"
    else:
        task = "ForCausalLM" if config.head == "lm" else "ForSequenceClassification"
    activation = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}[config.activation]
    hf = {"model_type": config.family, "architectures": [classes[config.family] + task], "vocab_size": config.vocab_size,
          "tie_word_embeddings": config.tied}
    if config.head == "scalar":
        hf |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        hf |= {name: getattr(config, name) for name in REWARD_FIELDS} | {"pad_token_id": config.reward_pad}
    if config.family == "gpt2":
        return hf | {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_inner": config.ffn_dim,
                     "n_positions": config.max_len, "layer_norm_epsilon": config.norm_eps, "activation_function": activation,
                     "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    hf |= {"num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head, "hidden_size": config.n_embd,
           "intermediate_size": config.ffn_dim, "max_position_embeddings": config.max_len, "hidden_act": activation}
    if config.family == "gpt_neox":
        fraction = config.rotary_dim / config.head_dim
        if int(fraction * config.head_dim) != config.rotary_dim:  # the reader rounds down, and division may have rounded down too
            fraction = (config.rotary_dim + 0.5) / config.head_dim
        return hf | {"layer_norm_eps": config.norm_eps, "rotary_pct": fraction,
                     "attention_bias": config.qkv_bias, "rotary_emb_base": config.rope_theta, "rope_scaling": config.rope_scaling,
                     "use_parallel_residual": config.parallel_residual}
    hf |= {"num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
           "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    window = next((window for window in config.windows if window), None)
    if config.family == "mistral":
        hf |= {"sliding_window": window}
    if config.family in ("qwen2", "qwen3"):
        hf |= {"use_sliding_window": window is not None, "sliding_window": window or 4096}
    if config.family in ("qwen2", "qwen3") or len(set(config.windows)) > 1:
        hf |= {"layer_types": ["sliding_attention" if w else "full_attention" for w in config.windows]}
    if config.family in ("llama", "qwen3"):
        hf |= {"attention_bias": config.qkv_bias}
    if config.family == "llama":
        hf |= {"mlp_bias": config.mlp_bias}
    return hf
