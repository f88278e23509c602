"""`python -m memvec.cli`."""

from memvec.cli import main

main()
