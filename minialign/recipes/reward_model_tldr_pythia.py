"""A Bradley-Terry reward model from Pythia-1B on TL;DR preferences, for ppo, rloo and rebel. Huang et al. 2024 (arXiv:2403.17031).

Published settings: AdamW, learning rate 3e-6, batch 64, cosine, one epoch.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.reward_model_tldr_pythia
"""

from dataclasses import dataclass

from minialign.methods import reward_model
from minialign.recipes import FullScale, Recipe, main


@dataclass
class Config(FullScale, reward_model.Config):
    policy: str = "runs/sft_tldr_pythia/final"                  # made by sft_tldr_pythia --out runs/sft_tldr_pythia
    pairs: str = "trl-lib/tldr-preference"
    steps: int = 1_450                                          # 1 epoch of 92,858 pairs
    batch_size: int = 64
    micro_batch: int = 8
    lr: float = 3e-6
    schedule: str = "cosine"
    warmup: float = 0.0
    max_len: int = 638
    max_prompt: int = 512
    eval_every: int = 100
    save_every: int = 100


RECIPE = Recipe(reward_model, Config, model="pythia-1b", data="trl-lib/tldr-preference", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
