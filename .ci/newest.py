"""Print the libraries that the suite needs, without their bounds: for `make test-newest`."""

import re
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))
named = chain(
    project["project"]["dependencies"],
    *project["project"]["optional-dependencies"].values(),
    *(group for name, group in project["dependency-groups"].items() if name != "docs"),
)
names = {re.split(r"[<>=!~ ]", requirement)[0] for requirement in named}
print(" ".join(sorted(name for name in names if not name.startswith("memvec"))))
