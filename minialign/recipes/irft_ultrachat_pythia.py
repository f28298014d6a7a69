"""IRFT of Pythia-1.4B on UltraChat: Table 3 of Li et al. 2024 (arXiv:2405.17888), T = 1 (SPIN), 2, 5, 8, 10, 16.

For T = 10 and 16, add a second run at a fifth of the learning rate: --policy is the first run's final/, --rounds 5 or 8, --lr 1e-7.
Published (mean of six benchmarks): base 37.27, SFT 37.27, SPIN 37.35, T2 37.18, T5 37.36, T8 37.43, T10 37.69, T16 37.57 (its six
scores have the mean 38.02: docs/ERRATA.md). Differences of .1 are within the noise of those benchmarks. The policy's
answers are sampled at temperature 1.
To compare: run lm-evaluation-harness on final/, and `evaluate` on held-out pairs.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.irft_ultrachat_pythia
"""

from dataclasses import dataclass

from minialign.methods import irft
from minialign.recipes import FullScale, Recipe, main


@dataclass
class Config(FullScale, irft.Config):
    beta: float = 0.1
    rounds: int = 5                                             # T
    precompute_ref: bool = True                                 # gives "the same memory as SFT": docs/RESULTS.md
    policy: str = "EleutherAI/pythia-1.4b"
    demos: str = "HuggingFaceH4/ultrachat_200k:train_sft"       # the paper uses 50,000 of them
    steps: int = 6_250                                          # 100,000 rows; the paper uses 50,000, each twice
    batch_size: int = 16                                        # Appendix C: two cards with 8 rows each
    micro_batch: int = 4
    optimizer: str = "rmsprop"                                  # as in the paper
    lr: float = 5e-7
    schedule: str = "linear"
    max_len: int = 1024
    max_prompt: int = 512
    max_new: int = 256
    eval_every: int = 500
    save_every: int = 500


RECIPE = Recipe(irft, Config, model="pythia-1.4b", data="HuggingFaceH4/ultrachat_200k", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
