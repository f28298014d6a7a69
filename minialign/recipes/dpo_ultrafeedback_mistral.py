"""DPO of Mistral-7B on UltraFeedback: the baseline of Tables 2 and 3 of Hua et al. 2024 (arXiv:2405.11870).

Published: leaderboard mean 58.28 from the base and 57.52 after SFT; length-controlled AlpacaEval 2 8.58 and 13.72 %.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 4 -m minialign.recipes.dpo_ultrafeedback_mistral
"""

from dataclasses import dataclass

from minialign.methods import dpo
from minialign.recipes import FullScale, Recipe, main


@dataclass
class Config(FullScale, dpo.Config):
    beta: float = 0.1
    precompute_ref: bool = True
    policy: str = "mistralai/Mistral-7B-v0.1"
    pairs: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
    steps: int = 360                                            # 3 epochs of 61,135 pairs
    batch_size: int = 512
    micro_batch: int = 2
    optimizer: str = "rmsprop"                                  # as in the paper
    lr: float = 5e-7
    schedule: str = "cosine"
    max_len: int = 1024
    max_grad_norm: float = 10.0
    activation_checkpointing: bool = True
    eval_every: int = 60
    save_every: int = 60


RECIPE = Recipe(dpo, Config, model="mistral-7b", data="HuggingFaceH4/ultrafeedback_binarized", gpus=4)

if __name__ == "__main__":
    main(RECIPE)
