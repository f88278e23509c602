"""Print the test tools that pyproject.toml asks for, for pips that do not know `--group`."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
print(" ".join(project["dependency-groups"]["test"]).replace(" >=", ">="))
