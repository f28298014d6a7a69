"""RLOO of Pythia-1B on TL;DR summaries. Ahmadian et al. 2024 (arXiv:2402.14740).

Published win rates over the human summaries at 6.9B: REBEL 78.1, RLOO 77.9 (k = 4) and 74.2 (k = 2), PPO 77.6, REINFORCE 70.7, DPO 68.4,
SFT 45.2 % (Gao et al. 2024, arXiv:2404.16767).
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.rloo_tldr_pythia
"""

from dataclasses import dataclass

from minialign.methods import rloo
from minialign.recipes import TLDR, Recipe, main


@dataclass
class Config(TLDR, rloo.Config):
    beta: float = 0.03
    group_size: int = 4                                         # k
    epochs: int = 2                                             # optimizer steps on each generation
    micro_batch: int = 16
    lr: float = 1e-6


RECIPE = Recipe(rloo, Config, model="pythia-1b", data="trl-lib/tldr", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
