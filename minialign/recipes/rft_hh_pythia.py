"""RFT of Pythia-1.4B on Anthropic HH: a reward learned from demonstrations, followed by PPO. Figure 2 of Li et al. 2024 (arXiv:2405.17888).

Published: a reward of 1B and a policy of 1.4B, RMSprop; here the reward starts from the policy's own trunk, and AdamW. The released
code's loss is that of `bt` at every token, and it follows the reward by advantage-induced policy alignment (docs/ERRATA.md); the paper
says PPO, and so does this.
Compare: mean reward and wins over SFT, `evaluate --reward runs/…/reward`; the figure shows RFT above SFT on all rows and on the best
10,000.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.rft_hh_pythia
    python -m minialign.recipes.rft_hh_pythia --plan h100
"""

from dataclasses import dataclass

from minialign.methods import rft
from minialign.recipes import Recipe, main


@dataclass
class Config(rft.Config):
    beta: float = 0.1
    rounds: int = 1                                             # T
    loss: str = "bt"                                            # as the released code; Algorithm 1 prints the linear one
    bound: float = 0.0                                          # none
    read: str = "last"
    policy_step: str = "ppo"
    policy: str = "runs/sft_hh_pythia/final"                    # made by sft_hh_pythia --out runs/sft_hh_pythia
    demos: str = "Anthropic/hh-rlhf"                            # the paper: the 10,000 best by a public reward
    reward_share: float = 0.5
    reward_lr: float = 1e-6                                     # of the released code
    lr: float = 1e-6                                            # of the released code
    steps: int = 5_000                                          # 20,000 rows for either part; the paper: 10,000, each twice
    batch_size: int = 8                                         # Appendix C: two cards with 4
    micro_batch: int = 4                                        # per card, Appendix C
    max_len: int = 256                                          # of the released code; Appendix C has 1024
    max_prompt: int = 128
    max_new: int = 128
    dtype: str = "mixed"
    held_out: float = 0.01
    eval_every: int = 500
    save_every: int = 500


RECIPE = Recipe(rft, Config, model="pythia-1.4b", data="Anthropic/hh-rlhf", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
