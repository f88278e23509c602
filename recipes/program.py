"""How the programs of this folder end when their input is wrong.

The programs import this module; it is not run.
"""

import sys

from memvec.errors import MemvecError


def run_program(main):
    """Run a program. A MemvecError is printed as one sentence and ends with exit code 2."""
    try:
        main()
    except MemvecError as error:
        print(f"memvec: {error}", file=sys.stderr)
        sys.exit(2)
