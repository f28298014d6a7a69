"""SFT of Pythia-1B on TL;DR summaries: the starting point of the other TL;DR recipes. Huang et al. 2024 (arXiv:2403.17031).

Published: AdamW, 3e-6, cosine, one epoch. The paper's token mean is over prompt and summary, this recipe's over the summary.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.sft_tldr_pythia
"""

from dataclasses import dataclass

from minialign.methods import sft
from minialign.recipes import FullScale, Recipe, main


@dataclass
class Config(FullScale, sft.Config):
    policy: str = "EleutherAI/pythia-1b"
    demos: str = "trl-lib/tldr"
    steps: int = 910                                            # 1 epoch of 116,722 rows
    batch_size: int = 128
    micro_batch: int = 16
    lr: float = 3e-6
    schedule: str = "cosine"
    warmup: float = 0.0
    max_len: int = 565                                          # 512 tokens of the prompt, 53 of the summary
    max_prompt: int = 512
    eval_every: int = 100
    save_every: int = 100


RECIPE = Recipe(sft, Config, model="pythia-1b", data="trl-lib/tldr", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
