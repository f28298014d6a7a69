"""A stranger's model: a folder that transformers wrote goes through SFT, IRFT and sampling, and what comes out loads in transformers."""

import json

import pytest
import torch

from minialign import __main__ as front_door
from minialign.methods import irft, sft
from minialign.tokenizer import load_tokenizer, train_bpe
from minialign.weights import load_pretrained

transformers = pytest.importorskip("transformers", reason="the independent oracle (requirements-dev.txt)")


def test_a_pythia_like_folder_with_a_chat_template(tmp_path, capsys):
    """gpt_neox layout, 512 embedding rows for 400 tokens, conversations as messages: three methods' plumbing in one walk."""
    questions = [f"What is {i} plus {i}?" for i in range(60)]
    answers = [f"It is {2 * i}." for i in range(60)]
    turns = zip(questions, answers, strict=True)
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bpe = train_bpe(questions * 3 + answers, 400)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe.inner, eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
    torch.manual_seed(0)
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=128))
    theirs.save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")

    shared = dict(demos=str(data), batch_size=8, max_len=64, max_new=12, log_every=100, device="cpu")
    first = sft.main(sft.Config(policy=str(tmp_path / "neox"), steps=40, lr=1e-2, out=str(tmp_path / "sft"), **shared))
    assert "<user>What is " in capsys.readouterr().out  # the template, in the first look
    losses = [json.loads(line)["loss"] for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2
    second = irft.main(irft.Config(policy=str(first / "final"), steps=4, rounds=2, out=str(tmp_path / "irft"), **shared))

    policy, ours = load_pretrained(second / "final"), load_tokenizer(second / "final")
    assert policy.config.n_tokens == ours.vocab_size == len(tokenizer) < policy.config.vocab_size == 512
    back = transformers.AutoModelForCausalLM.from_pretrained(second / "final")
    ids = torch.tensor([tokenizer("What is 3 plus 3?")["input_ids"]])
    assert ids.tolist()[0] == [ours.bos_id, *ours.encode("What is 3 plus 3?")]
    assert (back(ids).logits - policy(ids)).abs().max() < 1e-5
    assert transformers.AutoTokenizer.from_pretrained(second / "final").chat_template == tokenizer.chat_template

    capsys.readouterr()
    front_door.main(["sample", "--policy", str(second / "final"), "--prompt", "What is 7 plus 7?", "--chat", "--n", "2", "--max_new", "8"])
    assert capsys.readouterr().out.count("What is 7 plus 7?⟦") == 2
