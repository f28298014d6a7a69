"""llama2.c's format against another reading of it: a forward pass in numpy over the bytes, SentencePiece's rule, transformers."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from minialign import stories260K
from minialign.data import encode_prompt
from minialign.engine.common import BadInput
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT.parent / "shared" / "data" / "stories260K"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder made of the two published files."""
    if not PUBLISHED.is_dir():
        pytest.skip("the published files (../shared/data/stories260K) are not part of the project")
    return stories260K.main(stories260K.Config(str(PUBLISHED / "stories260K.bin"), str(PUBLISHED / "tok512.bin"),
                                               str(tmp_path_factory.mktemp("stories") / "folder")))


def made_up(folder, *, tied, n_head=4, n_kv_head=2, width=16, layers=2, longest=32):
    """A .bin of random weights and a tokenizer of 256 bytes and a few pieces, written here byte by byte."""
    pieces = [(" t", 0.0), ("he", -1.0), (" the", -2.0), ("th", -3.0), (" th", -4.0)] + [(chr(c), -5.0 - c) for c in range(33, 127)]
    pieces += [(" ", -200.0)]
    V, ffn, D = 259 + len(pieces), 24, width // n_head
    sizes = [V * width, layers * width, layers * width * n_head * D, *[layers * width * n_kv_head * D] * 2, layers * width * n_head * D,
             layers * width, *[layers * ffn * width] * 3, width, longest * D, V * width * (not tied)]
    rng = np.random.default_rng(0)
    header = struct.pack("<7i", width, ffn, layers, n_head, n_kv_head, V if tied else -V, longest)
    (folder / "model.bin").write_bytes(header + rng.normal(0, 0.3, sum(sizes)).astype("<f4").tobytes())
    entries = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *[(f"<0x{byte:02X}>", 0.0) for byte in range(256)], *pieces]
    content = b"".join(struct.pack("<fi", score, len(piece.encode())) + piece.encode() for piece, score in entries)
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 8) + content)
    return stories260K.Config(str(folder / "model.bin"), str(folder / "tokenizer.bin"), str(folder / "out"))


def logits_by_numpy(path, ids):
    """llama2.c's forward pass in float64, one position after the other, rotating neighbouring channels: (T, V)."""
    content = Path(path).read_bytes()
    C, ffn, L, H, KV, V, longest = struct.unpack("<7i", content[:28])
    flat, at, D, tied, V = np.frombuffer(content[28:], "<f4").astype(np.float64), 0, C // H, V > 0, abs(V)

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return flat[at - int(np.prod(shape)) : at].reshape(shape)

    embed, norm1, wq, wk, wv, wo = take(V, C), take(L, C), take(L, C, C), take(L, KV * D, C), take(L, KV * D, C), take(L, C, C)
    norm2, w1, w2, w3, norm, _ = take(L, C), take(L, ffn, C), take(L, C, ffn), take(L, ffn, C), take(C), take(longest * D)
    head = embed if tied else take(V, C)
    assert at == len(flat)

    def rms(x, weight):
        return x / np.sqrt((x**2).mean() + 1e-5) * weight

    keys, values, rows = [[] for _ in range(L)], [[] for _ in range(L)], []
    for t, token in enumerate(ids):
        x = embed[token]
        for layer in range(L):
            h = rms(x, norm1[layer])
            q, k, v = (w[layer] @ h for w in (wq, wk, wv))
            for vector in (q, k):
                for i in range(0, len(vector), 2):
                    angle = t * 10000.0 ** (-(i % D) / D)
                    a, b = vector[i], vector[i + 1]
                    vector[i], vector[i + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
            keys[layer].append(k)
            values[layer].append(v)
            out = []
            for head_number in range(H):
                part = slice(head_number // (H // KV) * D, (head_number // (H // KV) + 1) * D)
                scores = np.array([key[part] @ q[head_number * D : (head_number + 1) * D] for key in keys[layer]]) / np.sqrt(D)
                weights = np.exp(scores - scores.max())
                out.append(sum(w * value[part] for w, value in zip(weights / weights.sum(), values[layer], strict=True)))
            x = x + wo[layer] @ np.concatenate(out)
            h = rms(x, norm2[layer])
            gate = w1[layer] @ h
            x = x + w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ h))
        rows.append(head @ rms(x, norm))
    return np.array(rows)


def ids_by_rule(path, text):
    """SentencePiece's rule as llama2.c has it: characters or bytes, then the best-scored pair of neighbours again and again."""
    content, at, entries = Path(path).read_bytes(), 4, []
    while at < len(content):
        score, size = struct.unpack("<fi", content[at : at + 8])
        entries.append((content[at + 8 : at + 8 + size], score))
        at += 8 + size
    number = {piece: i for i, (piece, _) in enumerate(entries)}
    ids = []
    for char in (" " + text if text else ""):
        raw = char.encode()
        ids += [number[raw]] if raw in number else [byte + 3 for byte in raw]
    while True:
        joined = [(entries[number[both]][1], -i) for i in range(len(ids) - 1)
                  if (both := entries[ids[i]][0] + entries[ids[i + 1]][0]) in number and ids[i] >= 259 and ids[i + 1] >= 259]
        if not joined:
            return [1, *ids]
        i = -max(joined)[1]
        ids[i : i + 2] = [number[entries[ids[i]][0] + entries[ids[i + 1]][0]]]


def texts(count):
    """Pieces of this project's own pages, with what else a text may hold: runs of spaces, line ends, accents, signs."""
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    found = [pages[start : start + 17 + start % 90] for start in range(0, len(pages), len(pages) // count)][: count - 5]
    return [*found, "", " ", "  two  spaces ", "line\nends\r\n", "naïve ☕ 日本"]


@pytest.mark.parametrize("shape", [dict(tied=True), dict(tied=False, n_head=2, n_kv_head=2), dict(tied=False, n_head=4, n_kv_head=1)])
def test_a_made_up_file_is_read_as_numpy_reads_it(tmp_path, shape):
    cfg = made_up(tmp_path, **shape)
    model = load_pretrained(stories260K.main(cfg), dtype=torch.float64)
    ids = [1, *np.random.default_rng(1).integers(3, model.config.vocab_size, 20)]
    expected = logits_by_numpy(cfg.bin, ids)
    with torch.no_grad():
        assert abs(model(torch.tensor([ids]))[0].numpy() - expected).max() < 1e-7  # (frequencies are float32 in ours)
    tokenizer = load_tokenizer(cfg.out)
    for text in ("the the thethe", "tthhee", " the  th e", "", "ü 中"):
        assert encode_prompt(tokenizer, text) == ids_by_rule(cfg.tokenizer, text), text


def test_the_published_model_in_transformers(published):
    """Logits to 1e-4 and ids of the folder as transformers reads it, against numpy and the rule; so are ours."""
    transformers = pytest.importorskip("transformers", reason="the oracle (requirements-dev.txt)")
    theirs, their_tokenizer = (kind.from_pretrained(published) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    model, tokenizer = load_pretrained(published), load_tokenizer(published)
    ids = ids_by_rule(PUBLISHED / "tok512.bin", "Once upon a time, there was a little girl named Lily. She had a big red ball.")
    expected = logits_by_numpy(PUBLISHED / "stories260K.bin", ids)
    with torch.no_grad():
        for logits in (theirs(torch.tensor([ids])).logits[0], model(torch.tensor([ids]))[0]):
            assert abs(logits.numpy() - expected).max() < 1e-4
    for text in texts(200):
        right = ids_by_rule(PUBLISHED / "tok512.bin", text)
        assert encode_prompt(tokenizer, text) == right, text
        assert their_tokenizer(text).input_ids == right, text
    assert tokenizer.decode(tokenizer.encode("was a girl")) == " was a girl" and tokenizer.eos_id == tokenizer.bos_id == 1


def test_it_is_written_once_and_whole(tmp_path, monkeypatch, capsys):
    """A second call does nothing; a kill in the middle leaves no folder, and the next call sweeps what it left."""
    cfg = made_up(tmp_path, tied=True)
    original = stories260K.save_pretrained

    def dies(model, folder, tokenizer):
        original(model, folder, tokenizer)
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(stories260K, "save_pretrained", dies)
        stories260K.main(cfg)
    assert not Path(cfg.out).exists() and len(list(tmp_path.glob("out.tmp-*"))) == 1
    stories260K.main(cfg)
    assert not list(tmp_path.glob("out.tmp-*")) and "weights" in capsys.readouterr().out
    before = (Path(cfg.out) / "model.safetensors").stat().st_mtime_ns
    stories260K.main(cfg)
    assert "is there already" in capsys.readouterr().out and (Path(cfg.out) / "model.safetensors").stat().st_mtime_ns == before


def test_what_is_refused(tmp_path, monkeypatch):
    cfg = made_up(tmp_path, tied=True)
    content, tokens = Path(cfg.bin).read_bytes(), Path(cfg.tokenizer).read_bytes()
    for damaged, said in ((content[:-1], "bytes, but its sizes ask for"), (content[:20], "does not begin with the seven sizes"),
                          (b"ak42" + content[4:], "does not begin with the seven sizes"),
                          (struct.pack("<i", 15) + content[4:], "do not fit"),
                          (content + b"\0" * 4, "bytes, but its sizes ask for")):
        Path(cfg.bin).write_bytes(damaged)
        with pytest.raises(BadInput, match=said):
            stories260K.main(cfg)
    Path(cfg.bin).write_bytes(content)
    for damaged in (tokens[:-3], tokens[:4], tokens + tokens[4:40]):
        Path(cfg.tokenizer).write_bytes(damaged)
        with pytest.raises(BadInput, match="take the tokenizer that belongs to it"):
            stories260K.main(cfg)
    with pytest.raises(BadInput, match="belong together"):
        stories260K.main(stories260K.Config(bin=cfg.bin, out=str(tmp_path / "other")))
    with pytest.raises(BadInput, match="nowhere.bin: cannot be read"):
        stories260K.main(stories260K.Config(str(tmp_path / "nowhere.bin"), cfg.tokenizer, str(tmp_path / "other")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(BadInput, match="the hub could not deliver .*--bin and --tokenizer"):
        stories260K.main(stories260K.Config(out=str(tmp_path / "other")))
