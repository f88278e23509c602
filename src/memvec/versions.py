"""The releases of torch and transformers that memvec was tested with.

Both change what a model computes and how it is called. With a newer release memvec goes on and says
so in one line; with an older one than it supports, too.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

from packaging.version import Version

from memvec.errors import UntestedVersionWarning

# name -> (lowest, newest) release with which the whole suite passes: `make test-oldest`,
# `make test-newest`. pyproject.toml allows the newest's minor release and nothing above.
TESTED = {"torch": ("2.11.0", "2.15.0"), "transformers": ("5.10.1", "5.24.0")}


def warn_of_untested_versions() -> None:
    """Warn once of each library that is newer or older than every release that was tested."""
    for name, (lowest, newest) in TESTED.items():
        installed = Version(version(name))
        public = Version(installed.public)
        if public > Version(newest):
            where = f"newer than {newest}, the newest that memvec was tested with"
        elif public < Version(lowest):
            where = f"older than {lowest}, the lowest that memvec was tested with"
        else:
            continue
        warnings.warn(f"{name} {public} is {where}.", UntestedVersionWarning, stacklevel=3)
