"""A published llama that writes children's stories, as a Hugging Face folder: 260,032 weights, so that every method aligns it in a minute.

Karpathy's TinyLlamas (hub: karpathy/tinyllamas, MIT) were trained on TinyStories and are published in the format of his llama2.c, which
this file reads, for any of their sizes.

    *.bin          seven int32: C, FFN width, L, H, KV, V (negative: the head is not tied and follows at the end), longest row. Then
                   float32: embedding (V, C); of all layers each: attention norm (L, C), wq, wk, wv, wo, FFN norm, w1 (gate), w2 (down),
                   w3 (up); final norm (C); two tables of rotary angles, which are computed instead; the head
    tokenizer      int32: longest piece. Then for each id a float32 score, an int32 length and the bytes. Ids 0 to 2 are <unk>, <s>, </s>,
                   3 to 258 the bytes; then come pieces. Neighbouring pieces are merged, the pair with the best score first (SentencePiece)

Its rotary pairs are neighbouring channels (2i, 2i + 1), those of Hugging Face's llama are i and i + D/2, so the rows of wq and wk are put
in another order. A story ends with <s>, which is BOS and EOS.

    python -m minialign stories260K                                             # fetches 1 MB from the hub, writes runs/stories260K
    python -m minialign sample --policy runs/stories260K --prompt "Once upon a time"

Checked by tests/test_stories260K.py: logits by another reading of the file in numpy, ids by SentencePiece's rule.
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, processors

from minialign.engine.common import BadInput, one_line, read_regular
from minialign.model import GPT, GPTConfig
from minialign.tokenizer import Tokenizer
from minialign.weights import save_pretrained

REPOSITORY = "karpathy/tinyllamas"
FILES = ("stories260K/stories260K.bin", "stories260K/tok512.bin")
HEADER = 7 * 4  # bytes


@dataclass
class Config:
    bin: str = ""                   # the weights in llama2.c's format; default: stories260K.bin from the hub
    tokenizer: str = ""             # the tokenizer in llama2.c's format; default: tok512.bin from the hub
    out: str = "runs/stories260K"   # the folder to write


def main(cfg):
    """Write the folder, unless it is there. Returns it."""
    folder = Path(cfg.out)
    if (folder / "config.json").is_file():  # written last, so the folder is complete
        print(f"{folder} is there already")
        return folder
    if bool(cfg.bin) != bool(cfg.tokenizer):
        raise BadInput("--bin and --tokenizer belong together: name both files, or neither to fetch them from the hub")
    bin_file, tokenizer_file = (cfg.bin, cfg.tokenizer) if cfg.bin else fetch()
    model = read_model(bin_file)
    tokenizer = read_tokenizer(tokenizer_file, model.config.vocab_size)
    unfinished = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    save_pretrained(model, unfinished, tokenizer)
    if folder.exists():
        shutil.rmtree(unfinished)
        raise BadInput(f"{folder}: exists and is not a finished model; remove it, or name another --out")
    os.replace(unfinished, folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} weights, {model.config.vocab_size} tokens; "
          f"python -m minialign sample --policy {folder} --prompt \"Once upon a time\"")
    return folder


def fetch():
    """The paths of both files from the hub, or from its cache. Raises BadInput if the hub cannot deliver them."""
    from huggingface_hub import hf_hub_download  # imported here because it is slow

    try:
        return [hf_hub_download(REPOSITORY, file) for file in FILES]
    except Exception as error:  # no network, or no such repository: the message says which
        raise BadInput(f"{REPOSITORY}: the hub could not deliver {FILES[0]} ({one_line(error)}); fetch the two files elsewhere and name "
                       "them with --bin and --tokenizer") from None


def read_bytes(path):
    try:
        return read_regular(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def read_model(path):
    """The GPT of a .bin file, in float32. Raises BadInput if the header is not one, or if the file has another size than it says."""
    content = read_bytes(path)
    numbers = [int(x) for x in np.frombuffer(content[:HEADER], "<i4")] if len(content) >= HEADER else []
    if not numbers or not all(0 < abs(x) < 2**24 for x in numbers) or min(numbers[:5] + numbers[6:]) < 0:
        raise BadInput(f"{path}: does not begin with the seven sizes of llama2.c's first format; take a .bin of {REPOSITORY}")
    C, ffn, L, H, KV, V, longest = numbers
    if C % H or (C // H) % 2 or H % KV:
        raise BadInput(f"{path}: {C} channels, {H} heads and {KV} key-value heads do not fit together; the file is damaged")
    D, tied = C // H, V > 0
    V = abs(V)
    shapes = {"embed": (V, C), "norm1": (L, C), "q": (L, H * D, C), "k": (L, KV * D, C), "v": (L, KV * D, C), "o": (L, C, H * D),
              "norm2": (L, C), "gate": (L, ffn, C), "down": (L, C, ffn), "up": (L, ffn, C), "norm": (C,), "angles": (longest * D,),
              **({} if tied else {"head": (V, C)})}
    sizes = [math.prod(shape) for shape in shapes.values()]
    if len(content) != HEADER + 4 * sum(sizes):
        raise BadInput(f"{path}: has {len(content):,} bytes, but its sizes ask for {HEADER + 4 * sum(sizes):,}; fetch it again")
    parts = torch.from_numpy(np.frombuffer(content, "<f4", offset=HEADER).astype(np.float32)).split(sizes)
    tensors = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    for name, heads in (("q", H), ("k", KV)):  # channels 2i and 2i + 1 of a head become i and i + D/2
        tensors[name] = tensors[name].view(L, heads, D // 2, 2, C).transpose(2, 3).reshape(L, heads * D, C)

    model = GPT(GPTConfig(V, n_layer=L, n_head=H, n_kv_head=KV, n_embd=C, ffn_dim=ffn, max_len=longest, tied=tied))
    state = {"tok_embed.weight": tensors["embed"], "norm.weight": tensors["norm"], "head.weight": tensors["embed" if tied else "head"]}
    places = {"norm1": "norm1", "norm2": "norm2", **{x: f"attn.{x}" for x in "qkvo"}, **{x: f"mlp.{x}" for x in ("gate", "up", "down")}}
    state |= {f"blocks.{layer}.{place}.weight": tensors[name][layer] for layer in range(L) for name, place in places.items()}
    model.load_state_dict(state)
    return model


def read_tokenizer(path, vocab_size):
    """The tokenizer as BPE with byte fallback, whose merges are all ways to put a piece together from two, best score first.

    Raises BadInput if the file is damaged or has another number of pieces than the model.
    """
    content, place, pieces, scores = read_bytes(path), 4, [], []
    while place + 8 <= len(content):
        scores.append(float(np.frombuffer(content, "<f4", 1, place)[0]))
        size = int(np.frombuffer(content, "<i4", 1, place + 4)[0])
        pieces.append(content[place + 8 : place + 8 + max(size, 0)].decode("utf-8", "replace"))
        place += 8 + max(size, 0)
    if place != len(content) or len(pieces) != vocab_size or len(pieces) < 259:
        raise BadInput(f"{path}: holds {len(pieces)} pieces in {len(content):,} bytes, but the model has {vocab_size} tokens: take the "
                       "tokenizer that belongs to it")
    special = ["<unk>", "<s>", "</s>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)] + [piece.replace(" ", "▁") for piece in pieces[259:]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [(piece[:cut], piece[cut:]) for piece in sorted(pieces[259:], key=lambda piece: -scores[vocabulary[piece]])
              for cut in range(1, len(piece)) if piece[:cut] in vocabulary and piece[cut:] in vocabulary]
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens(special)
    return Tokenizer(inner, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"})
