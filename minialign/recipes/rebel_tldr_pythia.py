"""REBEL of Pythia-1B on TL;DR summaries. Gao et al. 2024 (arXiv:2404.16767).

Published win rates over the human summaries at 1.4B: REBEL 55.1, PPO 51.7, iterative DPO 47.2, DPO 42.7, SFT 24.9 %.
The paper trains adapters of rank 1024 (--lora 1024); this recipe trains all weights by default.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.rebel_tldr_pythia
"""

from dataclasses import dataclass

from minialign.methods import rebel
from minialign.recipes import TLDR, Recipe, main


@dataclass
class Config(TLDR, rebel.Config):
    beta: float = 0.05
    eta: float = 1.0
    epochs: int = 4
    micro_batch: int = 16
    lr: float = 3e-6


RECIPE = Recipe(rebel, Config, model="pythia-1b", data="trl-lib/tldr", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
