"""SFT of Pythia-1.4B on UltraChat: the baseline of Table 3 of Li et al. 2024 (arXiv:2405.17888).

Published (mean of six benchmarks): base 37.27, SFT 37.27. Batch and number of steps are not published; here one epoch.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.sft_ultrachat_pythia
"""

from dataclasses import dataclass

from minialign.methods import sft
from minialign.recipes import FullScale, Recipe, main


@dataclass
class Config(FullScale, sft.Config):
    policy: str = "EleutherAI/pythia-1.4b"
    demos: str = "HuggingFaceH4/ultrachat_200k:train_sft"
    steps: int = 3_216                                          # 1 epoch of 205,787 rows
    batch_size: int = 64
    micro_batch: int = 8
    lr: float = 5e-7                                            # as in irft_ultrachat_pythia
    schedule: str = "linear"
    max_len: int = 1024
    max_prompt: int = 512
    eval_every: int = 500
    save_every: int = 500


RECIPE = Recipe(sft, Config, model="pythia-1.4b", data="HuggingFaceH4/ultrachat_200k", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
