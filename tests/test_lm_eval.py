"""lm-evaluation-harness on a folder that save_pretrained wrote, with a task file and data of our own, so that nothing is fetched.

It loads the folder through transformers. What it reports must be what the project computes on the same text: log-likelihoods of answers to
choose from, and greedy generations.
"""

import json

import pytest
import torch

from minialign.batch import collate
from minialign.data import encode_prompt
from minialign.logps import seq_logps
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.task import builtin_demos
from minialign.tokenizer import train_bpe
from minialign.weights import save_pretrained

pytestmark = pytest.mark.slow
MAX_NEW = 12
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOOSE = TASK + """
output_type: multiple_choice
doc_to_choice: "{{{{options}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}]
"""
SAY = TASK + """
output_type: generate_until
doc_to_target: "{{{{options[right]}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {max_new}}}
metric_list: [{{metric: exact_match}}]
"""


def test_lm_eval_reports_our_log_probs_and_greedy_answers(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -r requirements-dev.txt")
    from lm_eval.tasks import TaskManager

    demos = builtin_demos()
    tokenizer = train_bpe([f"{demo.prompt} {demo.completion}" for demo in demos], 300)
    torch.manual_seed(0)
    policy = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_head=4, n_embd=32, ffn_dim=64, max_len=128, tied=False))
    for parameter in policy.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)  # a flat distribution would hide a wrong context
    save_pretrained(policy, tmp_path / "policy", tokenizer)

    questions = list(dict.fromkeys(demo.prompt.strip() for demo in demos))[:12]
    options = [demos[0].completion.strip(), "tea", "no, never"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": question, "options": options, "right": 1}) + "\n" for question in questions))
    (tmp_path / "choose.yaml").write_text(CHOOSE.format(name="choose", data=data))
    (tmp_path / "say.yaml").write_text(SAY.format(name="say", data=data, max_new=MAX_NEW))
    report = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tmp_path / "policy"), "dtype": "float32"}, device="cpu",
        tasks=["choose", "say"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )

    prompts = [encode_prompt(tokenizer, question) for question in questions]
    answers = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in report["samples"].items()}
    for prompt, row in zip(prompts, answers["choose"], strict=True):
        batch = collate([prompt] * len(options), [tokenizer.encode(" " + option) for option in options], pad_id=tokenizer.pad_id)
        theirs = [float(logp) for logp, _ in row["filtered_resps"]]
        assert theirs == pytest.approx(seq_logps(policy, batch).tolist(), abs=1e-4)
    said = sample(policy, prompts, max_new=MAX_NEW, eos_id=tokenizer.eos_id, seed=0, greedy=True).completions
    ours = [tokenizer.decode([token for token in ids if token != tokenizer.eos_id]) for ids in said]
    assert [row["resps"][0][0] for row in answers["say"]] == ours and len(set(ours)) > 3
