"""GRPO of Qwen2.5-1.5B on GSM8K, rewarded for the right final number. Shao et al. 2024 (arXiv:2402.03300).

It starts after SFT on the same questions, which teaches the #### before the number that `exact_match` reads: python -m minialign sft
--policy Qwen/Qwen2.5-1.5B --demos openai/gsm8k/main --max_len 512 --lr 1e-5 --steps 700 --out runs/sft_gsm8k_qwen. Published: from 82.9 %
to 88.2 % on GSM8K, for DeepSeekMath-7B after its own SFT.
To compare: run lm-evaluation-harness, task gsm8k, on final/.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 4 -m minialign.recipes.grpo_gsm8k_qwen
"""

from dataclasses import dataclass, field

from minialign.methods import grpo
from minialign.recipes import FullScale, Recipe, main


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

if __name__ == "__main__":
    main(RECIPE)
