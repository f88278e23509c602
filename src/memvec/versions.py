"""The releases of torch and transformers that memvec was tested with.

Other releases may compute other numbers or need other calls. With them memvec warns and continues.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

from packaging.version import Version

from memvec.errors import UntestedVersionWarning

# name -> (oldest, newest) release with which all tests pass (`make test-oldest`,
# `make test-newest`). pyproject.toml allows no minor release above the newest.
TESTED = {"torch": ("2.11.0", "2.15.0"), "transformers": ("5.10.1", "5.24.0")}


def warn_of_untested_versions() -> None:
    """Issue an UntestedVersionWarning for each library that is newer or older than those tested."""
    for name, (oldest, newest) in TESTED.items():
        installed = Version(version(name))
        public = Version(installed.public)
        if public > Version(newest):
            where = f"newer than {newest}, the newest that memvec was tested with"
        elif public < Version(oldest):
            where = f"older than {oldest}, the lowest that memvec was tested with"
        else:
            continue
        warnings.warn(f"{name} {public} is {where}.", UntestedVersionWarning, stacklevel=3)
