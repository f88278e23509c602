"""The command `memvec`: `app` has its verbs, and a module for each verb has its options.

Exit codes: 0 done and exact; 2 invalid input (one sentence on stderr); 3 not exact; 130
interrupted.
"""

import sys


def main() -> None:
    """Entry point. Ctrl-C while the command line is imported is exit code 130, too."""
    try:
        from memvec.cli.app import run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
