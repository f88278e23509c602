"""Run the command line with `python -m memvec`."""

from memvec.cli import main

main()
