"""GRPO of Qwen2.5-1.5B on GSM8K, rewarded for the right final number. Shao et al. 2024 (arXiv:2402.03300).

It starts after SFT on the same questions, which teaches the #### before the number that `exact_match` reads. On one card of 80 GB:

    python -m minialign sft --policy Qwen/Qwen2.5-1.5B --demos openai/gsm8k/main --max_len 512 --lr 1e-5 --steps 700 --dtype mixed
        --micro_batch 8 --out runs/sft_gsm8k_qwen

Published: from 82.9 % to 88.2 % on GSM8K, for DeepSeekMath-7B after its own SFT.
To compare: the share of right answers on the test split, greedy and as pass@k (the probability that at least one of k sampled answers is
right; Chen et al. 2021, arXiv:2107.03374). Prompts are written as in the training. lm-evaluation-harness, task gsm8k, has its own.

    python -m minialign.recipes.grpo_gsm8k_qwen --accuracy runs/sft_gsm8k_qwen/final --pass_at 8 --dtype bfloat16

Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 4 -m minialign.recipes.grpo_gsm8k_qwen
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field

import torch

from minialign.data import encode_prompts, read_demonstrations
from minialign.engine import parallel
from minialign.engine.common import BadInput, pick_device, pick_dtype, write_atomic
from minialign.evaluate import mean_interval, share_interval
from minialign.lora import load_model
from minialign.methods import grpo
from minialign.recipes import FullScale, Recipe, main
from minialign.rewards import exact_match
from minialign.sample import sample
from minialign.settings import cli, exit_codes


@dataclass
class Config(FullScale, grpo.Config):
    beta: float = 0.04
    group_size: int = 64                                        # G
    policy: str = "runs/sft_gsm8k_qwen/final"
    prompts: str = "openai/gsm8k/main"
    reward: list[str] = field(default_factory=lambda: ["exact_match"])
    steps: int = 467                                            # one pass over 7,473 questions
    batch_size: int = 1024                                      # 16 questions with 64 answers each
    micro_batch: int = 8
    lr: float = 1e-6
    schedule: str = "constant"
    max_prompt: int = 512
    max_new: int = 1024
    activation_checkpointing: bool = True
    eval_every: int = 50
    save_every: int = 50


RECIPE = Recipe(grpo, Config, model="qwen2.5-1.5b", data="openai/gsm8k", gpus=4)


@dataclass
class Accuracy:
    accuracy: str = ""              # the model to measure: a folder or a hub name
    prompts: str = "openai/gsm8k/main:test"  # questions with answers that end in `#### number`
    pass_at: int = 8                # k of pass@k; 0 = greedy answers only
    samples: int = 16               # sampled answers to each question, at least k
    tau: float = 1.0                # temperature of the sampled answers
    max_prompt: int | None = 512    # longest prompt in tokens, as in the training
    max_new: int = 1024             # longest answer in tokens, as in the training
    batch_size: int = 256           # answers sampled together
    seed: int = 0                   # seed of the sampled answers
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16 or float64
    out: str = ""                   # also write the numbers as JSON to this file


def pass_at_k(right, n, k):
    """The unbiased estimate of the probability that one of k answers is right, from `right` right ones of n >= k: the share of the sets
    of k answers of these n in which one is right, 1 − C(n − right, k) / C(n, k)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def right_answers(policy, tokenizer, demos, cfg, *, n, greedy):
    """(N,) how many of n answers to each of N questions have the demonstrated number."""
    rows, reward, right = encode_prompts(tokenizer, [demo.prompt for demo in demos], max_prompt=cfg.max_prompt), exact_match(demos), []
    size = max(1, cfg.batch_size // n)
    for start in range(0, len(rows), size):
        ids, prompts = zip(*rows[start : start + size], strict=True)
        answers = sample(policy, ids, max_new=cfg.max_new, tau=cfg.tau, n=n, greedy=greedy, eos_id=tokenizer.eos_id, seed=cfg.seed)
        texts = [tokenizer.decode(completion) for completion in answers.completions]
        right.append(torch.tensor(reward([prompt for prompt in prompts for _ in range(n)], texts)).view(-1, n).sum(1).long())
    return torch.cat(right)


def measure(cfg):
    """Print and return the accuracy of greedy answers with Wilson's 95 % interval, and pass@k with a normal one over questions.

    Raises BadInput if --samples is below --pass_at, or if there are no questions.
    """
    if cfg.batch_size < 1 or not 0 <= cfg.pass_at <= max(cfg.samples, 0):
        raise BadInput(f"--pass_at {cfg.pass_at} --samples {cfg.samples} --batch_size {cfg.batch_size}: pass@k needs at least k answers to "
                       "each question, and a batch at least 1")
    parallel.start()  # under torchrun the processes share the answers
    demos = read_demonstrations(cfg.prompts)
    if not demos:
        raise BadInput(f"{cfg.prompts}: has no rows; expected questions with answers that end in `#### number`")
    policy, tokenizer, _ = load_model(cfg.accuracy, dtype=pick_dtype(cfg.dtype), device=pick_device(cfg.device))
    right = int(right_answers(policy, tokenizer, demos, cfg, n=1, greedy=True).sum())
    numbers = {"questions": len(demos), "greedy": share_interval(right, len(demos))}
    print("{}, {:,} questions of {}\n  greedy  {:.1%} right (95 %: {:.1%} to {:.1%})".format(
        cfg.accuracy, len(demos), cfg.prompts, *numbers["greedy"]), flush=True)
    if cfg.pass_at:
        counts = right_answers(policy, tokenizer, demos, cfg, n=cfg.samples, greedy=False).tolist()
        for k in dict.fromkeys((1, cfg.pass_at)):
            estimates = torch.tensor([pass_at_k(c, cfg.samples, k) for c in counts], dtype=torch.float64)
            mean, half = numbers[f"pass@{k}"] = mean_interval(estimates)
            print(f"  pass@{k:<3}{mean:.1%} ± {half:.1%}, of {cfg.samples} answers at temperature {cfg.tau:g}")
    if cfg.out:
        write_atomic(cfg.out, json.dumps({**asdict(cfg), **numbers}, indent=1) + "\n")
    return numbers


if __name__ == "__main__":
    if any(word.split("=")[0] == "--accuracy" for word in sys.argv):
        with exit_codes("grpo_gsm8k_qwen --accuracy"):
            measure(cli(Accuracy, sys.argv[1:], prog="python -m minialign.recipes.grpo_gsm8k_qwen", description=__doc__))
    else:
        main(RECIPE)
