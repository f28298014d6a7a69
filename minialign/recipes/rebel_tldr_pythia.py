"""REBEL of Pythia-1B on TL;DR summaries. Gao et al. 2024 (arXiv:2404.16767).

Published win rates over the human summaries at 1.4B: REBEL 55.1, PPO 51.7, iterative DPO 47.2, DPO 42.7, SFT 24.9 %.
The paper trains adapters of rank 1024 (--lora 1024); this recipe trains all weights by default.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.rebel_tldr_pythia
    python -m minialign.recipes.rebel_tldr_pythia --plan h100
"""

from dataclasses import dataclass, field

from minialign.methods import rebel
from minialign.recipes import Recipe, main


@dataclass
class Config(rebel.Config):
    beta: float = 0.05
    eta: float = 1.0
    epochs: int = 4
    policy: str = "runs/sft_tldr_pythia/final"                  # made by sft_tldr_pythia --out runs/sft_tldr_pythia
    prompts: str = "trl-lib/tldr"
    reward: list[str] = field(default_factory=lambda: ["runs/reward_model_tldr_pythia/final"])
    missing_eos: float = 1.0                                    # subtracted from the reward; the reference code sets it to −1 instead
    steps: int = 1_954                                          # 1,000,000 completions
    batch_size: int = 512
    micro_batch: int = 16
    lr: float = 3e-6
    schedule: str = "linear"
    max_prompt: int = 512
    max_new: int = 53
    tau: float = 0.7
    dtype: str = "mixed"
    held_out: float = 0.01
    eval_every: int = 100
    save_every: int = 100


RECIPE = Recipe(rebel, Config, model="pythia-1b", data="trl-lib/tldr", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
