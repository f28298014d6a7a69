"""The parts of the log-prob that are written for speed: one algorithm a file, imported by logps.py and by nothing else.

logprob.py          logits -> log-prob, entropy and log-sum-exp of each row in one pass, and the gradient in their place
logprob_triton.py   the same two passes for a GPU
linear_logprob.py   (N, C) hidden states and a (V, C) head -> log-prob and entropy of each row, and no (N, V) matrix
"""
