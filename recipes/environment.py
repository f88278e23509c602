"""Environment variables that make training on a CPU faster.

`pocket.py` and the programs that train with it import this module; it is not run.
"""

import os
import sys

ENVIRONMENT = {
    # OpenMP threads that wait actively at barriers slow each other down when other processes run: a
    # product of two 384 x 384 matrices took 20 times as long beside one busy process
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "1000",
    # by default glibc returns large blocks to the kernel after each step and requests them again
    # in the next one, which takes half of the time of a step
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


def in_environment():
    """Start this program again with the variables of ENVIRONMENT, unless all of them are set.

    OpenMP and glibc read these variables only when a process starts.
    """
    if not ENVIRONMENT.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**ENVIRONMENT, **os.environ})
