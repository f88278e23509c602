"""How the programs of `recipes/` and `benchmarks/` end when their input is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from memvec.errors import MemvecError


def run_program(main: Callable[[], None]) -> None:
    """Run a program. A MemvecError is printed as one sentence and ends with exit code 2."""
    try:
        main()
    except MemvecError as error:
        print(f"memvec: {error}", file=sys.stderr)
        sys.exit(2)
