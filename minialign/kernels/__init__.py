"""What is written for speed: one algorithm a file, imported by logps.py and sample.py (and by ift.py and run.py for a word).

logprob.py                 logits -> log-prob, entropy and log-sum-exp of each row in one pass, and the gradient in their place
logprob_triton.py          the same two passes for a GPU
linear_logprob.py          (N, C) hidden states and a (V, C) head -> log-prob and entropy of each row, and no (N, V) matrix
linear_logprob_triton.py   the same for a GPU where nobody asks for a gradient, and no slice of it either
decode.py                  one more token for every row, on a CPU
"""
