"""RLOO of Pythia-1B on TL;DR summaries. Ahmadian et al. 2024 (arXiv:2402.14740).

Published win rates over the human summaries at 6.9B: REBEL 78.1, RLOO 77.9 (k = 4) and 74.2 (k = 2), PPO 77.6, REINFORCE 70.7, DPO 68.4,
SFT 45.2 % (Gao et al. 2024, arXiv:2404.16767).
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.rloo_tldr_pythia
    python -m minialign.recipes.rloo_tldr_pythia --plan h100
"""

from dataclasses import dataclass, field

from minialign.methods import rloo
from minialign.recipes import Recipe, main


@dataclass
class Config(rloo.Config):
    beta: float = 0.03
    group_size: int = 4                                         # k
    epochs: int = 2                                             # optimizer steps on each generation
    policy: str = "runs/sft_tldr_pythia/final"                  # made by sft_tldr_pythia --out runs/sft_tldr_pythia
    prompts: str = "trl-lib/tldr"
    reward: list[str] = field(default_factory=lambda: ["runs/reward_model_tldr_pythia/final"])
    missing_eos: float = 1.0                                    # subtracted from the reward; the reference code sets it to −1 instead
    steps: int = 1_954                                          # 1,000,000 completions
    batch_size: int = 512
    micro_batch: int = 16
    lr: float = 1e-6
    schedule: str = "linear"
    max_prompt: int = 512
    max_new: int = 53
    tau: float = 0.7
    dtype: str = "mixed"
    held_out: float = 0.01
    eval_every: int = 100
    save_every: int = 100


RECIPE = Recipe(rloo, Config, model="pythia-1b", data="trl-lib/tldr", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
