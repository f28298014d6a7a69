"""One algorithm per file, the same rooms in the same order: docstring, Config, loss, step, main. `ls` is the table of contents."""
