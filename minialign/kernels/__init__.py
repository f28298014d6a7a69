"""The code written for speed, one algorithm per file. logps.py and sample.py use it.

logprob.py                 logits -> log-prob, entropy and log-sum-exp of each row in one pass, then the gradient in place of the logits
logprob_triton.py          the same two passes for a GPU
linear_logprob.py          (N, C) hidden states and a (V, C) head -> log-prob and entropy of each row, without an (N, V) matrix
linear_logprob_triton.py   the same for a GPU when no gradient is needed, without even a slice of that matrix
decode.py                  runs the model on one more token of every row, on a CPU
"""
