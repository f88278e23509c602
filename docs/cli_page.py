"""Write docs/cli.md from the command line itself and from the fields of a recipe.

python docs/cli_page.py
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from memvec import registry
from memvec.cli.app import app
from memvec.cramming.recipe import Recipe

PAGE = Path(__file__).parent / "cli.md"
HEAD = """# Command line

Written by `python docs/cli_page.py` from the command line itself.

`memvec VERB --help` shows the same text. Results go to standard output; progress and messages go to
standard error. `--json` prints one JSON object for programs.

| exit code | meaning |
|---|---|
| 0 | done; where a result can be exact, it is exact |
| 1 | the reader of the output, such as `head`, ended before memvec did |
| 2 | invalid input; one sentence says what is wrong and what to change |
| 3 | not exact |
| 130 | interrupted by Ctrl-C or SIGTERM; what is finished is kept |
"""
RECIPE = """## Recipe fields

A recipe holds every choice that changes the vectors. `--preset` picks a recipe by name, and
`--set FIELD=VALUE` changes a field. In Python: `memvec.Recipe.of("paper", steps=100)`. A plug-in
adds a preset with `@memvec.register("preset", "mine")` above a function that returns a `Recipe`.
"""


def cell(text: str) -> str:
    """Text that fits a cell of a Markdown table."""
    text = re.sub(r"\[/?(bold|cyan)\]", "", text).replace("\\[", "[").replace("|", "\\|")
    return " ".join(text.split())


def options(command: Any) -> list[str]:
    """The table of a command's arguments and options."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for item in command.params:
        shown = getattr(item, "help", None)
        if getattr(item, "hidden", False) or "--help" in item.opts:
            continue
        if item.param_type_name == "argument":
            names = f"`{(item.metavar or item.name).upper()}`"
        else:
            names = ", ".join(f"`{name}`" for name in [*item.opts, *item.secondary_opts])
        default = item.default
        if item.required:
            default = "required"
        elif default is None or default is False or callable(default):
            default = ""
        else:
            default = f"`{getattr(default, 'value', default)}`"
        rows.append(f"| {names} | {default} | {cell(shown or '')} |")
    return rows if len(rows) > 2 else []


def commands(command: Any, name: str) -> list[str]:
    """A section for a command, or one for each command of a group."""
    inner = getattr(command, "commands", None)
    if inner is not None:
        return [line for key, each in inner.items() for line in commands(each, f"{name} {key}")]
    lines = [f"## {name}", "", cell(command.help or ""), "", *options(command), ""]
    examples = re.findall(r"\[cyan\](.*?)\[/cyan\]", command.epilog or "")
    return lines + [f"    {line}" for line in examples] + [""] * bool(examples)


def presets() -> list[str]:
    """Every preset by name, with its documentation."""
    rows = ["| preset | recipe |", "|---|---|"]
    for name in registry.BUILT_IN["preset"]:
        documented = inspect.getdoc(registry.get("preset", name)) or ""
        rows.append(f"| `{name}` | {cell(documented.partition('Raises ')[0])} |")
    return [*rows, ""]


def recipe() -> list[str]:
    """Every field of a recipe: the default, what other presets change, the meaning."""
    rows = ["| field | default | meaning | other presets |", "|---|---|---|---|"]
    base = Recipe()
    known = {name: Recipe.of(name) for name in registry.BUILT_IN["preset"]}
    for item in fields(Recipe):
        usual = getattr(base, item.name)
        other = [
            f"{name} `{getattr(preset, item.name)}`"
            for name, preset in known.items()
            if getattr(preset, item.name) != usual
        ]
        text = cell(str(item.metadata["help"]))
        rows.append(f"| `{item.name}` | `{usual}` | {text} | {', '.join(other)} |")
    return rows


def page() -> str:
    """The whole page."""
    root = typer.main.get_command(app)
    lines = [HEAD, *commands(root, "memvec"), RECIPE, *presets(), *recipe()]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
