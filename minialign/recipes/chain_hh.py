"""Anthropic HH with Pythia-1.4B from demonstrations alone: SFT, then RFT, which learns a reward and follows it. Li et al. 2024.

Figure 2 of arXiv:2405.17888 compares the two. To compare: `evaluate` with both final/ folders and --reward runs/rft_hh_pythia/reward.

    python -m minialign.recipes.chain_hh --plan h100
"""

from minialign.recipes import Stage, chain

STAGES = [
    Stage("sft_hh_pythia"),
    Stage("rft_hh_pythia", policy="sft_hh_pythia/final"),
]

if __name__ == "__main__":
    chain(STAGES)
