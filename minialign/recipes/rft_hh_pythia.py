"""RFT of Pythia-1.4B on Anthropic HH: a reward learned from demonstrations, then PPO. Figure 2 of Li et al. 2024 (arXiv:2405.17888).

The paper uses a reward model of 1B and a policy of 1.4B. Here the reward model starts from the policy's own trunk. The released code uses
the `bt` loss at every token and trains the policy by advantage-induced policy alignment (docs/ERRATA.md). The paper says PPO, and
this recipe uses PPO.
To compare: mean reward and wins over SFT by `evaluate --reward runs/…/reward`. The figure shows RFT above SFT, both on all rows and on the
best 10,000.
Receipt (of a run at full size): none yet.

    torchrun --nproc_per_node 2 -m minialign.recipes.rft_hh_pythia
"""

from dataclasses import dataclass

from minialign.methods import rft
from minialign.recipes import FullScale, Recipe, main


@dataclass
class Config(FullScale, rft.Config):
    beta: float = 0.1
    rounds: int = 1                                             # T
    loss: str = "bt"                                            # as in the released code; Algorithm 1 prints the linear loss
    bound: float = 0.0                                          # no bound
    read: str = "last"
    policy_step: str = "ppo"
    policy: str = "runs/sft_hh_pythia/final"                    # made by sft_hh_pythia --out runs/sft_hh_pythia
    demos: str = "Anthropic/hh-rlhf"                            # the paper uses the 10,000 best by a public reward
    reward_share: float = 0.5
    reward_lr: float = 1e-6                                     # from the released code
    optimizer: str = "rmsprop"                                  # as in the paper
    lr: float = 1e-6                                            # from the released code
    steps: int = 5_000                                          # 20,000 rows for each part; the paper uses 10,000, each twice
    batch_size: int = 8                                         # Appendix C: two cards with 4 rows each
    micro_batch: int = 4                                        # rows per card in Appendix C
    max_len: int = 256                                          # from the released code; Appendix C has 1024
    max_prompt: int = 128
    max_new: int = 128
    eval_every: int = 500
    save_every: int = 500


RECIPE = Recipe(rft, Config, model="pythia-1.4b", data="Anthropic/hh-rlhf", gpus=2)

if __name__ == "__main__":
    main(RECIPE)
