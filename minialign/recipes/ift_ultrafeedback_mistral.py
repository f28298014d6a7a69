"""IFT of Mistral-7B on UltraFeedback: Tables 2 and 3 of Hua et al. 2024 (arXiv:2405.11870).

Published leaderboard means. From the base: ORPO 57.70, DPO 58.28, SFT 58.65, IFT 59.61. After SFT: SFT 56.99, ORPO 57.35, DPO 57.52, IFT
58.22. From the base, SFT and IFT also train on 60,000 rows of UltraChat, which this recipe leaves out. The paper also
uses a frozen copy of the embedding.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 4 -m minialign.recipes.ift_ultrafeedback_mistral
"""

from dataclasses import dataclass

from minialign.methods import ift
from minialign.recipes import FullScale, Recipe, main


@dataclass
class Config(FullScale, ift.Config):
    mix: float = 0.2                                            # λ
    decay: float = 0.95                                         # γ
    detach_weights: bool = False                                # as in the released code; ift.py detaches by default (docs/ERRATA.md)
    policy: str = "mistralai/Mistral-7B-v0.1"
    demos: str = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # the chosen answers
    steps: int = 360                                            # 3 epochs of 61,135 rows
    batch_size: int = 512
    micro_batch: int = 4
    optimizer: str = "rmsprop"                                  # as in the paper
    lr: float = 5e-7
    schedule: str = "cosine"
    max_len: int = 1024
    max_grad_norm: float = 10.0
    activation_checkpointing: bool = True
    eval_every: int = 60
    save_every: int = 60


RECIPE = Recipe(ift, Config, model="mistral-7b", data="HuggingFaceH4/ultrafeedback_binarized", gpus=4)

if __name__ == "__main__":
    main(RECIPE)
