"""The machine room: what every run does around its method. You need none of it to read a method.

common.py      small helpers: seeds, micro-batches, files, averages
opening.py     policy, data and rewards, opened and checked
look.py        what is printed before step 1
run.py         the run folder, the steps, guards, log, export
checkpoint.py  saved state that survives kill -9 and resumes bit for bit
parallel.py    several processes (torchrun); the only file that knows about them
"""
