"""SFT of Pythia-1.4B on the chosen answers of Anthropic HH: the starting point of Figures 1 and 2 of Li et al. 2024 (arXiv:2405.17888).

The paper trains ten epochs and keeps the best one (--snapshots keeps all).
To compare: the held-out log-prob gap by `evaluate --policies … --pairs Anthropic/hh-rlhf:test`. The figure shows it below 0.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.sft_hh_pythia
"""

from dataclasses import dataclass

from minialign.methods import sft
from minialign.recipes import FullScale, Recipe, main


@dataclass
class Config(FullScale, sft.Config):
    policy: str = "EleutherAI/pythia-1.4b"
    demos: str = "Anthropic/hh-rlhf"                            # the chosen answer of each pair is the demonstration
    steps: int = 25_125                                         # 10 epochs of 160,800 rows
    batch_size: int = 64                                        # not published
    micro_batch: int = 8
    optimizer: str = "rmsprop"                                  # as in the paper
    lr: float = 5e-7                                            # the peak rate in Appendix C
    schedule: str = "linear"
    max_len: int = 1024
    eval_every: int = 500
    save_every: int = 500


RECIPE = Recipe(sft, Config, model="pythia-1.4b", data="Anthropic/hh-rlhf", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
