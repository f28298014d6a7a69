"""IRFT of zephyr-7b-sft-full on UltraChat: Tables 4 (full) and 6 (LoRA) of Li et al. 2024 (arXiv:2405.17888).

For Table 6 use --lora 64 (alpha 16, the default). T = 10 and 16 need a second run, as in irft_ultrachat_pythia.
Published (mean of six benchmarks): base 59.48, T8 59.85, T16 60.25, SPIN 60.32, T5 60.71, SPIN's second iteration 61.02, T10 61.03. With
LoRA: SFT 59.86, SPIN 60.13, T5 60.87.
To compare: run lm-evaluation-harness on final/.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 8 -m minialign.recipes.irft_ultrachat_zephyr
"""

from dataclasses import dataclass

from minialign.methods import irft
from minialign.recipes import FullScale, Recipe, main


@dataclass
class Config(FullScale, irft.Config):
    beta: float = 0.1
    rounds: int = 5                                             # T; Table 4 has 1 (SPIN), 5, 8, 10 and 16
    precompute_ref: bool = True                                 # gives "the same memory as SFT": docs/RESULTS.md
    policy: str = "alignment-handbook/zephyr-7b-sft-full"
    demos: str = "HuggingFaceH4/ultrachat_200k:train_sft"       # the paper uses 50,000 of them
    steps: int = 6_250                                          # 100,000 rows; the paper uses 50,000, each twice
    batch_size: int = 16                                        # Appendix C: eight cards with 2 rows each
    micro_batch: int = 1
    optimizer: str = "rmsprop"                                  # as in the paper
    lr: float = 5e-7
    schedule: str = "linear"
    max_len: int = 2048
    max_prompt: int = 512
    max_new: int = 256
    activation_checkpointing: bool = True
    eval_every: int = 500
    save_every: int = 500


RECIPE = Recipe(irft, Config, model="mistral-7b", data="HuggingFaceH4/ultrachat_200k", gpus=8)

if __name__ == "__main__":
    main(RECIPE)
