"""SFT of Pythia-1.4B on the chosen answers of Anthropic HH: the base of Figures 1 and 2 of Li et al. 2024 (arXiv:2405.17888).

Published: ten epochs, of which the best is kept (--snapshots keeps all). Here AdamW, there RMSprop.
Compare: held-out log-prob gap, `evaluate --policies … --pairs Anthropic/hh-rlhf:test`; the figure shows it below 0.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.sft_hh_pythia
    python -m minialign.recipes.sft_hh_pythia --plan h100
"""

from dataclasses import dataclass

from minialign.methods import sft
from minialign.recipes import Recipe, main


@dataclass
class Config(sft.Config):
    policy: str = "EleutherAI/pythia-1.4b"
    demos: str = "Anthropic/hh-rlhf"                            # the chosen answer of a pair is its demonstration
    steps: int = 25_125                                         # 10 epochs of 160,800 rows
    batch_size: int = 64                                        # not published
    micro_batch: int = 8
    lr: float = 5e-7                                            # the peak of its Appendix C
    schedule: str = "linear"
    max_len: int = 1024
    dtype: str = "mixed"
    held_out: float = 0.01
    eval_every: int = 500
    save_every: int = 500


RECIPE = Recipe(sft, Config, model="pythia-1.4b", data="Anthropic/hh-rlhf", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
