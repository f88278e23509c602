"""Execute the notebooks of this folder and store their outputs; Jupyter is not needed.

    python examples/notebooks.py                      # all notebooks
    python examples/notebooks.py first-cram.ipynb

Cells run in order in a copy of this folder. A cell's output is what it prints, and the value of its
last expression: text, or a matplotlib figure.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def execute(source: str, namespace: dict[str, Any], name: str) -> Any:
    """Run the code of a cell. Returns the value of its last expression, or None without one."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace)


def output_of(value: Any) -> dict[str, Any]:
    """The output data of a value in a notebook cell."""
    if hasattr(value, "savefig"):
        buffer = io.BytesIO()
        value.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        image = base64.b64encode(buffer.getvalue()).decode()
        return {"image/png": image, "text/plain": ["<Figure>"]}
    return {"text/plain": repr(value).splitlines(keepends=True)}


def run(path: Path, folder: Path) -> dict[str, Any]:
    """The notebook with fresh outputs; cells run with `folder` as the working directory."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    working_directory = Path.cwd()
    os.chdir(folder)
    try:
        count = 0
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                continue
            count += 1
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                value = execute("".join(cell["source"]), namespace, f"{path.name}, cell {count}")
            cell["execution_count"], cell["outputs"] = count, []
            if printed.getvalue():
                text = printed.getvalue().splitlines(keepends=True)
                cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": text})
            if value is not None:
                cell["outputs"].append(
                    {
                        "output_type": "execute_result",
                        "execution_count": count,
                        "metadata": {},
                        "data": output_of(value),
                    }
                )
    finally:
        os.chdir(working_directory)
    return notebook


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all, and store their outputs."""
    os.environ.setdefault("MPLBACKEND", "agg")
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(FOLDER, Path(folder) / "examples")
            notebook = run(path, Path(folder) / "examples")
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: outputs stored")


if __name__ == "__main__":
    main(sys.argv[1:])
