import sys

from minialign.bench import cpu
from minialign.settings import cli, exit_codes

with exit_codes("bench"):
    cpu.main(cli(cpu.Config, sys.argv[1:], prog="python -m minialign.bench", description=cpu.__doc__))
