"""The machine room: what every run does around its method. You need none of it to read a method.

common.py      small helpers: seeds, micro-batches, files, averages
opening.py     load and check the policy, optimizer, data and rewards
adamw8bit.py   an optimizer of torchao's in the form that a run needs
look.py        what a run prints before step 1
run.py         the run folder, the loop over steps, skipping bad steps, log, export
tracking.py    tokens per second, use of the card, memory; TensorBoard and Weights & Biases
checkpoint.py  saved state that survives kill -9 and resumes bit for bit
parallel.py    several processes (torchrun); the only file that calls torch.distributed
"""
