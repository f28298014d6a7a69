"""Load our GPT from a Hugging Face folder (config.json, safetensors) and save it as one, without transformers.

Reading a folder never executes anything from it: weights come from safetensors only, and pickles (.bin, .pt) are refused. Every
name and shape is checked before a tensor is used. If tensors are left over or missing, the error names them.

One table describes how the layouts differ: `layout(config)` lists, for each tensor of the file, which of our tensors it holds and
how they are packed. gpt2 stores its matrices transposed and q, k, v side by side. gpt_neox interleaves q, k, v head by head. The
others store the same tensors as we do.

Checked by tests/test_weights.py: round trips through transformers are bitwise equal for every family; hostile files are refused.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_module_registration_hook

from minialign.engine.common import PICKLES, BadInput, find_folder, open_to_readers, persist, read_json, write_atomic
from minialign.hf_config import config_to_hf
from minialign.model import GPT, GPTConfig
from minialign.tokenizer import load_tokenizer

# ------------------------------------------------------------------------------------------------------------ the packings
# A packing is a pair: pack(our tensors) -> the file's tensor, unpack(the file's tensor) -> our tensors.


def same():
    return lambda ours: ours[0], lambda theirs: [theirs]


def transposed():  # gpt2's Conv1D stores (in, out)
    return lambda ours: ours[0].T, lambda theirs: [theirs.T]


def side_by_side(transpose):  # gpt2's c_attn: q, k, v stacked along the output
    def pack(ours):
        return torch.cat(ours).T if transpose else torch.cat(ours)

    def unpack(theirs):
        return list((theirs.T if transpose else theirs).chunk(3))

    return pack, unpack


def interleaved(n_head):  # gpt_neox's query_key_value: q, k, v of one head, then of the next
    def pack(ours):
        return torch.stack([part.view(n_head, -1, *part.shape[1:]) for part in ours], dim=1).flatten(0, 2)

    def unpack(theirs):
        parts = theirs.view(n_head, 3, -1, *theirs.shape[1:])
        return [parts[:, i].flatten(0, 1) for i in range(3)]

    return pack, unpack


def layout(config):
    """[(name in the file, [our names], (pack, unpack))] and the prefix of the trunk's names, e.g. 'model.'."""
    rows = []

    def add(theirs, *ours, packing=None):
        rows.append((theirs, list(ours), packing or same()))

    def weight_and_bias(theirs, ours, bias, packing=same):
        add(f"{theirs}.weight", f"{ours}.weight", packing=packing())
        if bias:
            add(f"{theirs}.bias", f"{ours}.bias")

    biased_norm = config.norm == "layer"
    if config.family == "gpt2":
        prefix, block, scalar = "transformer.", "h", "score.weight"
        add("wte.weight", "tok_embed.weight")
        add("wpe.weight", "pos_embed.weight")
        weight_and_bias("ln_f", "norm", biased_norm)
    elif config.family == "gpt_neox":
        prefix, block, scalar = "gpt_neox.", "layers", "score.weight"
        add("embed_in.weight", "tok_embed.weight")
        weight_and_bias("final_layer_norm", "norm", biased_norm)
    else:
        prefix, block, scalar = "model.", "layers", "score.weight"
        add("embed_tokens.weight", "tok_embed.weight")
        weight_and_bias("norm", "norm", biased_norm)

    for i in range(config.n_layer):
        theirs, ours = f"{block}.{i}", f"blocks.{i}"
        qkv = [f"{ours}.attn.{part}" for part in "qkv"]
        if config.family == "gpt2":
            weight_and_bias(f"{theirs}.ln_1", f"{ours}.norm1", True)
            weight_and_bias(f"{theirs}.ln_2", f"{ours}.norm2", True)
            add(f"{theirs}.attn.c_attn.weight", *[f"{name}.weight" for name in qkv], packing=side_by_side(transpose=True))
            add(f"{theirs}.attn.c_attn.bias", *[f"{name}.bias" for name in qkv], packing=side_by_side(transpose=False))
            weight_and_bias(f"{theirs}.attn.c_proj", f"{ours}.attn.o", True, transposed)
            weight_and_bias(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up", True, transposed)
            weight_and_bias(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down", True, transposed)
            continue
        weight_and_bias(f"{theirs}.input_layernorm", f"{ours}.norm1", biased_norm)
        weight_and_bias(f"{theirs}.post_attention_layernorm", f"{ours}.norm2", biased_norm)
        if config.family == "gpt_neox":
            for kind in ["weight", "bias"][: 1 + config.qkv_bias]:
                packing = interleaved(config.n_head)
                add(f"{theirs}.attention.query_key_value.{kind}", *[f"{name}.{kind}" for name in qkv], packing=packing)
            weight_and_bias(f"{theirs}.attention.dense", f"{ours}.attn.o", config.out_bias)
            weight_and_bias(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.mlp.up", True)
            weight_and_bias(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.mlp.down", True)
            continue
        for part in "qkv":
            weight_and_bias(f"{theirs}.self_attn.{part}_proj", f"{ours}.attn.{part}", config.qkv_bias)
        weight_and_bias(f"{theirs}.self_attn.o_proj", f"{ours}.attn.o", config.out_bias)
        if config.qk_norm:
            add(f"{theirs}.self_attn.q_norm.weight", f"{ours}.attn.q_norm.weight")
            add(f"{theirs}.self_attn.k_norm.weight", f"{ours}.attn.k_norm.weight")
        for part in ("gate", "up", "down"):
            weight_and_bias(f"{theirs}.mlp.{part}_proj", f"{ours}.mlp.{part}", config.mlp_bias)

    rows = [(prefix + theirs, ours, packing) for theirs, ours, packing in rows]
    if config.head == "scalar":
        rows.append((scalar, ["head.weight"], same()))
    elif not config.tied:
        rows.append(("embed_out.weight" if config.family == "gpt_neox" else "lm_head.weight", ["head.weight"], same()))
    return rows, prefix


# ----------------------------------------------------------------------------------------------------------------- reading

# Constants that older checkpoints store beside the weights: causal masks, rotary frequencies and angles. We compute them instead.
CONSTANTS = re.compile(r"(\.(attn|attention|self_attn)\.(masked_)?bias|rotary_emb\.(\w*inv_freq|cos_cached|sin_cached))$")


def weight_files(folder):
    """The safetensors files of a folder: model.safetensors, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise BadInput(
                f"{folder}: its weights are pickles ({pickles[0]}), which can run code when loaded and are refused; "
                "convert them to safetensors first (transformers: model.save_pretrained)"
            )
        raise BadInput(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise BadInput(f"{index}: 'weight_map' must map tensor names to file names")
    files, present = [], {file.name for file in folder.iterdir()}
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index}: names the shard {name!r}: expected a .safetensors file in the same folder")
        if name not in present:
            raise BadInput(f"{folder}: the index names the shard {name}, but it is missing; fetch the folder again")
        files.append(folder / name)
    return files


def find_tensors(files):
    """{name: (file, the tensor's shape and dtype, as a tensor without numbers)} of all files.

    Raises BadInput for anything the official safetensors reader refuses.
    """
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():
                    if name in tensors:
                        raise BadInput(f"{file}: the tensor {name} is in another shard too")
                    tensors[name] = file, reader.get_tensor(name).to("meta")
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: not a valid safetensors file ({error}); fetch or write it again") from None
    return tensors


def read_tensor(file, name):
    """One tensor, on the CPU. Its memory is that of the file, mapped: a part that is not used is not read, and all is freed with it."""
    with safe_open(file, framework="pt") as reader:
        return reader.get_tensor(name)


def read_tensors(files):
    """{name: tensor} of all files, on the CPU. Raises BadInput as find_tensors does."""
    return {name: read_tensor(file, name) for name, (file, _) in find_tensors(files).items()}


def first_five(names):
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def load_pretrained(path_or_hub_name, *, dtype=None, device=None, place=None):
    """Load a GPT from a Hugging Face folder or hub name. dtype None keeps the file's dtype. device None means the CPU.

    The file is read tensor by tensor. place(tensor, dtype) -> what the model keeps of it; default: all of it, on the device.
    If dtype is None and the file mixes dtypes, all weights get config.json's dtype, or the first tensor's if it names none.

    The scalar head is built if config.json names a ...ForSequenceClassification architecture. If the folder has a tokenizer,
    config.n_tokens is set from it, so that ids without a token (padding of the embedding) are never sampled.
    Raises BadInput with the file's name if the architecture is not implemented, if tensors are missing, unknown or of the wrong
    shape, if a file is damaged, or if the weights are pickles.
    """
    folder = find_folder(path_or_hub_name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: holds an adapter, not a model: load both with minialign.lora.load_model or pass it to --policy")
    hf = read_json(folder / "config.json")
    config = GPTConfig.from_hf(hf)
    with torch.device("meta"):  # shapes only: the weights come from the file, so nothing is initialised or copied
        model = GPT(config)
    shapes = dict(model.named_parameters(remove_duplicate=False))
    tensors = {name: found for name, found in find_tensors(weight_files(folder)).items() if not CONSTANTS.search(name)}
    dtypes = [tensor.dtype for _, tensor in tensors.values() if tensor.dtype.is_floating_point]
    if dtype is None and len(set(dtypes)) > 1:
        named = getattr(torch, str(hf.get("dtype") or hf.get("torch_dtype")), None)
        dtype = named if isinstance(named, torch.dtype) and named.is_floating_point else dtypes[0]
    rows, prefix = layout(config)

    # Files that hold only the trunk, such as the hub's gpt2, leave the prefix out.
    if not any(name.startswith(prefix) for name in tensors):
        rows = [(theirs.removeprefix(prefix), ours, packing) for theirs, ours, packing in rows]
    head = "embed_out.weight" if config.family == "gpt_neox" else "lm_head.weight"
    tied_copy = tensors.pop(head, None) if config.tied else None
    expected = {theirs for theirs, _, _ in rows}
    if missing := expected - tensors.keys():
        raise BadInput(f"{folder}: tensors are missing that a {config.family} model needs: {first_five(missing)}")
    if unknown := tensors.keys() - expected:
        raise BadInput(f"{folder}: tensors that a {config.family} model does not have: {first_five(unknown)}")

    for theirs, ours, (pack, _) in rows:
        tensor, wanted = tensors[theirs][1], pack([shapes[name] for name in ours]).shape
        if tensor.shape != wanted:
            raise BadInput(f"{folder}: {theirs} has shape {tuple(tensor.shape)}, but config.json asks for {tuple(wanted)}")
        if not tensor.dtype.is_floating_point:
            raise BadInput(f"{folder}: {theirs} has dtype {tensor.dtype}: expected floating-point weights")
    if tied_copy is not None:
        embedding, copied = (read_tensor(*which).to(dtype=dtype) for which in ((tensors[rows[0][0]][0], rows[0][0]), (tied_copy[0], head)))
        if not torch.equal(embedding, copied):
            raise BadInput(f"{folder}: config.json ties the head to the embedding, but the file holds a different head")

    place, state = place or whole_on(device), {}
    for theirs, ours, (_, unpack) in rows:
        for name, part in zip(ours, unpack(read_tensor(tensors[theirs][0], theirs)), strict=True):
            kept = dtype or part.dtype
            exact = config.head == "scalar" and name == "head.weight"
            state[name] = place(part, torch.promote_types(kept, torch.float32) if exact else kept)
    fill(model, state)
    if (folder / "tokenizer.json").is_file():
        fit_vocabulary(model, load_tokenizer(folder))
    return model


def new_model(config, *, dtype=torch.float32, device=None, place=None):
    """GPT(config), which has the LM head, with random weights that depend on torch's seed. `place` is that of load_pretrained.

    Each tensor is drawn, placed and freed before the next. The numbers are those of GPT(config): a module's own initial weights are drawn
    too, since they come first from the same generator, and go when the module is registered in its parent.
    """
    with register_module_module_registration_hook(lambda parent, name, module: module.to("meta")):
        model = GPT(config)
    place, state = place or whole_on(device), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        whole = torch.ones(parameter.shape)
        model.init_weight(name, whole)
        state[name] = place(whole, dtype)
    return fill(model, state)


def whole_on(device):
    return lambda tensor, dtype: tensor.to(device=device, dtype=dtype).contiguous()


def fill(model, state):
    """Put the tensors {name: tensor} in the place of the model's parameters, which have none yet."""
    if model.config.tied:
        state["head.weight"] = state["tok_embed.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tied:
        model.head.weight = model.tok_embed.weight
    return model.requires_grad_(True)


def fit_vocabulary(model, tokenizer):
    """Record how many of the embedding's rows the tokenizer has ids for (the others are padding), and which ids end a completion.

    A tokenizer with more ids is allowed, as many public ones have added tokens: encoding a text that uses one raises BadInput. If the
    padding token has no row, EOS pads. Raises BadInput if EOS has none.
    """
    model.config.n_tokens, model.config.eos_ids = min(tokenizer.vocab_size, model.config.vocab_size), tokenizer.eos_ids
    tokenizer.limit = model.config.vocab_size
    if tokenizer.eos_id >= tokenizer.limit:
        raise BadInput(f"the tokenizer's EOS has the id {tokenizer.eos_id}, but the model has only {tokenizer.limit} embedding rows: "
                       "take the tokenizer that belongs to the model")
    if tokenizer.pad_id >= tokenizer.limit:
        tokenizer.pad_id = tokenizer.eos_id


def save_pretrained(model, folder, tokenizer=None):
    """Write a folder that transformers, vLLM and lm-evaluation-harness load: config.json, safetensors (sharded above 5 GB), tokenizer.

    A tied head is left out of the file, as safetensors requires. config.json is written last, so a folder that has it is complete. It also
    stores a reward model's fields (hf_config.REWARD_FIELDS). transformers ignores these and returns the head's raw outputs.
    Raises BadInput, before anything is written, if the family's layout cannot express the configuration.
    """
    from huggingface_hub import save_torch_state_dict  # imported here because importing it is slow

    ours, readers = vars(replace(model.config, n_tokens=None, eos_ids=())), vars(GPTConfig.from_hf(config_to_hf(model.config)))
    if lost := [name for name in ours if ours[name] != readers[name]]:
        raise BadInput(f"{folder}: the {model.config.family} layout cannot express {', '.join(lost)} of this model: nothing was written")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)  # written again last, so that a half-written export cannot be loaded
    state, tensors = model.state_dict(), {}
    if extra := state.keys() - {name for _, ours, _ in layout(model.config)[0] for name in ours} - {"head.weight"}:
        raise BadInput(f"{folder}: the layout has no place for {first_five(extra)}: merge adapters first (minialign.lora.merged)")
    for theirs, ours, (pack, _) in layout(model.config)[0]:
        tensors[theirs] = pack([state[name].detach() for name in ours]).cpu().contiguous()
    persist(folder, lambda: save_torch_state_dict(tensors, folder, metadata={"format": "pt"}))
    open_to_readers(folder)
    hf = config_to_hf(model.config) | {"dtype": str(model.tok_embed.weight.dtype).removeprefix("torch.")}
    if tokenizer is not None:
        tokenizer.save(folder)
        ends = list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
        if model.config.head == "lm":
            write_atomic(folder / "generation_config.json", json.dumps(ids, indent=2) + "\n")
        elif model.config.reward_pad is not None or tokenizer.pad_id == tokenizer.eos_id:
            ids["pad_token_id"] = model.config.reward_pad  # transformers reads a reward at the last token that is not this id
        hf |= ids
    write_atomic(folder / "config.json", json.dumps(hf, indent=2) + "\n")
