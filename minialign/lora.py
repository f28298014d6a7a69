"""Low-rank adapters (LoRA): train two thin matrices beside each frozen one. Hu et al. 2021, arXiv:2106.09685, Eq. 3.

    h = W x + (alpha / rank) · B A x          W (out, in) frozen, A (rank, in) random, B (out, rank) zero: training starts at W

In layers of width C, about 2·rank·C numbers per matrix are trained instead of C², and only these have gradients and optimizer states.
A reference or an old policy copies only the thin matrices, because `frozen_copy` shares everything that is already frozen. So a
reference needs neither a second copy of the frozen weights nor a switch that turns the adapters off.

A and B are float32 beside bfloat16 weights too, and are rounded where they are used. If they were bfloat16 themselves, AdamW's steps
would be lost by rounding as soon as a number is a few hundred times larger than the learning rate.

On disk an adapter is a PEFT folder (adapter_config.json, adapter_model.safetensors), so PEFT reads ours and we read PEFT's. PEFT's gpt2
and gpt_neox have one matrix for queries, keys and values. When we read such an adapter, each of our three matrices gets its rows of B and
all of A. When we write one, we stack our three A and put our three B on a block diagonal: the rank triples, B A x is unchanged.

Checked by tests/test_lora.py: logits equal PEFT's for every family, both ways; merged weights equal W + (alpha / rank)·B A.
"""

import copy
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from minialign.engine.common import BadInput, find_folder, open_to_readers, persist, read_json, write_atomic
from minialign.tokenizer import load_tokenizer
from minialign.weights import first_five, fit_vocabulary, layout, load_pretrained, read_tensors, same

ALL = r"attn\.[qkvo]|mlp\.(gate|up|down)"  # every matrix of every block, as QLoRA recommends (Dettmers et al. 2023, arXiv:2305.14314)


class LoRALinear(nn.Linear):
    """x (…, in) -> (…, out). Its weight and bias are the same frozen tensors as those of `linear`."""

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)  # not nn.Linear's, which would create a weight
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, alpha / rank
        self.weight, self.bias = linear.weight, linear.bias
        bound = 1 / math.sqrt(self.in_features)  # as in PEFT: uniform, with the bound of nn.Linear's initialization
        where = dict(device=self.weight.device, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features).uniform_(-bound, bound).to(**where))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank).to(**where))

    def forward(self, x):
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, A), B)

    def merged_weight(self):
        """W + (alpha / rank)·B A, (out, in), computed in at least float32."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.weight.to(wide) + self.scale * self.lora_B.to(wide) @ self.lora_A.to(wide)).to(self.weight.dtype)


def adapters(model):
    """{name: LoRALinear} of a model, empty if it has no adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def inject(model, rank, alpha=16.0, targets=ALL):
    """Freeze the model and put an adapter beside every matrix of its blocks whose name ends in the pattern `targets`, in place.

    Raises BadInput if the rank is below 1 or if the pattern matches no matrix.
    """
    if rank < 1:
        raise BadInput(f"a LoRA rank of {rank}: must be at least 1")
    names = [name for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and name.startswith("blocks.") and re.search(rf"\.({targets})$", name)]
    if not names:
        raise BadInput(f"LoRA targets {targets!r} match no matrix of this model: names are like blocks.0.attn.q, blocks.0.mlp.up")
    model.requires_grad_(False)
    model.head.requires_grad_(model.config.head == "scalar")  # a reward model trains its head too: it is only one row
    for name in names:
        replace(model, name, lambda linear: LoRALinear(linear, rank, alpha))
    return model


def replace(model, name, make):
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, child, make(getattr(parent, child)))


def frozen_copy(model):
    """A copy that will not be trained. Parameters that are already frozen are shared, so if only the adapters are trained, only they
    are copied. If all parameters are frozen, nothing is copied, and a change of the model changes its "copy" too."""
    weights = {id(p): nn.Parameter(p.detach().clone(), False) if p.requires_grad else p for p in model.parameters()}
    return copy.deepcopy(model, weights)


def merged(model):
    """A model without adapters that computes the same. The merged matrices are new; all other parameters are shared with `model`."""
    plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for name in adapters(plain):
        replace(plain, name, merge_one)
    return plain


def merge_one(adapter):
    linear = nn.Linear(adapter.in_features, adapter.out_features, bias=adapter.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(adapter.merged_weight().detach()), adapter.bias
    return linear


# ------------------------------------------------------------------------------------------------------------ PEFT's folder

PREFIX = "base_model.model."
# Fields of PEFT's configuration that change neither the formula above nor the frozen weights. All others are refused if they are set.
HARMLESS = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
            "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
            "layers_pattern", "fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying",
            "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # these five: if STARTS allows the first
STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")  # other ways to start an adapter, such as PiSSA, change the frozen weights


def packed(config):
    """[(PEFT's module, [our modules], (pack, unpack) for the rows of B)] for every matrix in the blocks."""
    rows, packings = [], {theirs: packing for theirs, _, packing in layout(config)[0]}
    for theirs, ours, packing in layout(config)[0]:
        module, names = theirs.removesuffix(".weight"), [name.removesuffix(".weight") for name in ours]
        if theirs.endswith(".weight") and re.search(rf"^blocks\..*({ALL})$", names[0]):
            # Rows of B are packed like the bias, because gpt2 stores its matrices as (in, out) but its adapters as (out, rank).
            rows.append((module, names, packings.get(f"{module}.bias", packing) if len(names) > 1 else same()))
    return rows


def save_adapter(model, folder, base=""):
    """Write the adapters as a PEFT folder. `base` is the name or folder of their model. adapter_config.json is written last."""
    found, tensors, ranks, scales = adapters(model), {}, {}, {}
    for theirs, ours, (pack, _) in packed(model.config):
        mine = [found.get(name) for name in ours]
        if not any(mine):
            continue
        ranks[theirs] = rank = sum(len(adapter.lora_A) for adapter in mine if adapter)
        scales[theirs] = scale = next(adapter.scale for adapter in mine if adapter)
        blocks, start = [], 0
        for name, adapter in zip(ours, mine, strict=True):
            block = torch.zeros(model.get_submodule(name).out_features, rank, dtype=next(iter(found.values())).lora_B.dtype)
            if adapter:
                block[:, start : start + len(adapter.lora_A)] = adapter.lora_B.detach().cpu() * (adapter.scale / scale)
                start += len(adapter.lora_A)
            blocks.append(block)
        tensors[f"{PREFIX}{theirs}.lora_A.weight"] = torch.cat([adapter.lora_A.detach().cpu() for adapter in mine if adapter])
        tensors[f"{PREFIX}{theirs}.lora_B.weight"] = pack(blocks).contiguous()
    rank, scale = min(ranks.values()), next(iter(scales.values()))
    task = "CAUSAL_LM" if model.config.head == "lm" else "SEQ_CLS"
    config = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": str(base), "inference_mode": True,
              "r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "bias": "none",
              "rank_pattern": {name: ranks[name] for name in ranks if ranks[name] != rank},
              "alpha_pattern": {name: scales[name] * ranks[name] for name in ranks if scales[name] * ranks[name] != scale * rank},
              "target_modules": sorted(ranks), "fan_in_fan_out": model.config.family == "gpt2"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").unlink(missing_ok=True)
    persist(folder, lambda: save_file(tensors, folder / "adapter_model.safetensors"))
    open_to_readers(folder)
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def load_adapter(model, folder):
    """Freeze the model and put the adapters of a PEFT folder beside its matrices, in place.

    Raises BadInput with the file's name if the adapter is of another kind, if an option changes the formula in a way that is not
    implemented here, or if tensors are missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    where = folder / "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{where}: peft_type {config.get('peft_type')!r} is not LoRA")
    plain = {name: name in HARMLESS or value in (None, False, "none", [], {}) for name, value in config.items()}
    plain["init_lora_weights"] = config.get("init_lora_weights", True) in STARTS
    if changes := [name for name in plain if not plain[name]]:
        raise BadInput(f"{where}: {changes[0]}={config[changes[0]]!r} changes the formula or the frozen weights in a way that is "
                       "not implemented here; if PEFT can merge the adapter into its base, load the merged model")
    if adapters(model):
        raise BadInput(f"{folder}: the model has adapters already; merge them first")
    if not (folder / "adapter_model.safetensors").is_file():
        raise BadInput(f"{folder}: adapter_model.safetensors is missing (pickles are not read)")
    tensors = read_tensors([folder / "adapter_model.safetensors"])
    for name, of_all, kinds in (("rank_pattern", "r", (int,)), ("alpha_pattern", "lora_alpha", (int, float))):
        pattern = config.get(name) or {}
        try:
            values = [config.get(of_all), *pattern.values()]
            sound = all(type(value) in kinds and 0 < abs(value) < 2**31 and (value > 0 or float in kinds) for value in values)
            [re.compile(f"({key})") for key in pattern]
        except (AttributeError, re.error):
            sound = False
        if not sound:
            raise BadInput(f"{where}: {of_all} must be a number, and {name} an object with numbers under patterns of names")
    model.requires_grad_(False)
    for theirs, ours, (_, unpack) in packed(model.config):
        a, b = (tensors.pop(f"{PREFIX}{theirs}.lora_{side}.weight", None) for side in "AB")
        if a is None and b is None:
            continue
        if not selected(config, theirs):
            raise BadInput(f"{where}: target_modules, exclude_modules or layers_to_transform leave out {theirs}, which has tensors that "
                           "PEFT would not use; correct the list, or save the adapter again")
        rank = of_module(config.get("rank_pattern"), theirs, config.get("r"))
        alpha = of_module(config.get("alpha_pattern"), theirs, config.get("lora_alpha"))
        linears = [model.get_submodule(name) for name in ours]
        wanted = (rank, linears[0].in_features), (sum(linear.out_features for linear in linears), rank)
        if a is None or b is None or (tuple(a.shape), tuple(b.shape)) != wanted:
            found = [None if x is None else tuple(x.shape) for x in (a, b)]
            raise BadInput(f"{folder}: the adapter of {theirs} has shapes {found[0]}, {found[1]} (A, B): expected {wanted[0]}, {wanted[1]}")
        for name, part in zip(ours, unpack(b), strict=True):
            replace(model, name, lambda linear, rank=rank, alpha=alpha: LoRALinear(linear, rank, alpha))
            adapter = model.get_submodule(name)
            with torch.no_grad():
                adapter.lora_A.copy_(a)
                adapter.lora_B.copy_(part)
    if tensors:
        raise BadInput(f"{folder}: tensors that a {model.config.family} model has no place for: {first_five(tensors)}")
    if not adapters(model):
        raise BadInput(f"{folder}: adapter_model.safetensors has no tensors, so this would be the base model; save the adapter again")
    return model


def load_model(path, *, dtype=None, device=None, place=None):
    """Load (model, tokenizer, base) from a folder or hub name. base is None if the folder holds a model.

    If the folder holds a PEFT adapter, base is the model that adapter_config.json names. That model is loaded and the adapters are put
    beside its matrices. The tokenizer comes from the adapter's folder if it has one. Raises BadInput if adapter_config.json names no base.
    """
    folder, base = find_folder(path), None
    if (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():  # transformers puts the adapter on too
        base = str(folder)
    elif (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json")
        base = config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise BadInput(f"{folder}/adapter_config.json: names no base_model_name_or_path, so the model it belongs to is unknown")
        if config.get("revision") not in (None, "main") and not Path(base).expanduser().is_dir():
            raise BadInput(f"{folder}/adapter_config.json: revision={config['revision']!r} of {base} is not fetched: download it and name "
                           "its folder as base_model_name_or_path")
    source = folder if base is None else find_folder(base)
    model = load_pretrained(source, dtype=dtype, device=device, place=place)
    if base is not None:
        load_adapter(model, folder)
    where = folder if (folder / "tokenizer.json").is_file() else source
    tokenizer = load_tokenizer(where, model_folder=source)
    fit_vocabulary(model, tokenizer)
    return model, tokenizer, base


def selected(config, module):
    """PEFT's rule: whether the configuration puts an adapter beside the module of this name."""
    def names(patterns):
        if isinstance(patterns, str):
            return re.fullmatch(patterns, module)
        return any(module == name or module.endswith(f".{name}") for name in patterns)

    try:
        layer = re.match(r".*?\.(\d+)\.", module)
        layers = config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        return (names(config.get("target_modules") or []) and not names(config.get("exclude_modules") or [])
                and (not layers or layer and int(layer[1]) in layers))
    except (TypeError, re.error):
        return False


def of_module(pattern, module, otherwise):
    """PEFT's rule: the value of the first key in the pattern that matches the end of the module's name, else `otherwise`."""
    return next((value for key, value in (pattern or {}).items() if re.search(rf"(^|\.)({key})$", module)), otherwise)
