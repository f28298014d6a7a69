"""UltraChat with Pythia-1.4B from demonstrations alone: SFT, then IRFT from the SFT model. Li et al. 2024 (arXiv:2405.17888).

irft_ultrachat_pythia by itself starts from the base model. To compare: `evaluate` with both final/ folders on held-out pairs.

    python -m minialign.recipes.chain_ultrachat --plan h100
"""

from minialign.recipes import Stage, chain

STAGES = [
    Stage("sft_ultrachat_pythia"),
    Stage("irft_ultrachat_pythia", policy="sft_ultrachat_pythia/final"),
]

if __name__ == "__main__":
    chain(STAGES)
