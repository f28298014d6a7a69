"""TL;DR summaries with Pythia-1B from demonstrations to PPO: SFT, a reward model from it, PPO with both. Huang et al. 2024.

The reward model and the policy of PPO start from the SFT model, the critic from the reward model (arXiv:2403.17031).
rloo_tldr_pythia and rebel_tldr_pythia start from the same two folders, so after this chain each is one more run.

    python -m minialign.recipes.chain_tldr --plan h100
"""

from minialign.recipes import Stage, chain

STAGES = [
    Stage("sft_tldr_pythia"),
    Stage("reward_model_tldr_pythia", policy="sft_tldr_pythia/final"),
    Stage("ppo_tldr_pythia", policy="sft_tldr_pythia/final", reward="reward_model_tldr_pythia/final",
          value="reward_model_tldr_pythia/final"),
]

if __name__ == "__main__":
    chain(STAGES)
