"""The command `memvec`: `app` has its verbs, and a module for each verb has its options.

Exit codes: 0 done and exact; 2 invalid input (one sentence on stderr); 3 not exact; 130
interrupted.
"""

import atexit
import gc
import os
import signal


def main() -> None:
    """Entry point. Ctrl-C while the command line is imported is exit code 130, too.

    SIGTERM, by which schedulers end a job, interrupts as Ctrl-C does: what is finished is kept.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Read by GNU OpenMP when torch is imported. By default, threads that wait for each other keep
    # their cores busy, and beside another busy process every one of them waits long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # The imports make a million objects that stay. By default, collections that look through them
    # take a twentieth of the time of a short command, and those at its end take a tenth.
    gc.set_threshold(50_000, 20, 50)
    atexit.register(gc.freeze)
    try:
        from memvec.cli.app import run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()
