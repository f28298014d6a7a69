"""The parts of the log-prob that are written for speed: one algorithm a file, imported by logps.py and by nothing else.

linear_logprob.py   (N, C) hidden states and a (V, C) head -> log-prob and entropy of each row, and no (N, V) matrix
"""
