"""One algorithm per file, each in the same order: docstring, Config, loss, step, main. `ls` is the table of contents."""
