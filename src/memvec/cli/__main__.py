"""`python -m memvec`."""

from memvec.cli import main

main()
