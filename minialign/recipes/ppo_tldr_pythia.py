"""PPO of Pythia-1B on TL;DR summaries. Huang et al. 2024 (arXiv:2403.17031).

Published win rates over the human summaries at 1.4B: REBEL 55.1, PPO 51.7, iterative DPO 47.2, DPO 42.7, SFT 24.9 %
(Gao et al. 2024, arXiv:2404.16767).
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.ppo_tldr_pythia
"""

from dataclasses import dataclass

from minialign.methods import ppo
from minialign.recipes import TLDR, Recipe, main


@dataclass
class Config(TLDR, ppo.Config):
    beta: float = 0.05
    epochs: int = 4
    value: str = "runs/reward_model_tldr_pythia/final"          # the critic starts from the reward model
    value_lr: float = 3e-6
    micro_batch: int = 8
    lr: float = 3e-6


RECIPE = Recipe(ppo, Config, model="pythia-1b", data="trl-lib/tldr", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
