"""Speed and memory, measured beside a peer and beside the floor of bare matrix products.

    python -m minialign.bench                # cpu.py: log-probs, generation, steps of SFT, DPO and GRPO, start-up
    python -m minialign.bench --gpu          # gpu.py: kernels, log-probs, decoding and training steps on one CUDA card
    python -m minialign.bench.receipts       # real steps of the recipes' models on one GPU, beside what --plan says
"""
