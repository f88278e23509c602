"""The commands that the pages show are accepted as they are written; none of them is run here.

A command of memvec goes through the parser of its verb, and one of a program in `benchmarks/` or
`recipes/` through the parser that the program makes. Files of the repository must exist, and
`--preset` and `--set` must give a recipe.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from memvec.cli.app import app
from memvec.cli.common import recipe_of

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/*.md", "docs/howto/*.md", "src/**/*.md", "studies/*.toml")
PROGRAMS = sorted(p for folder in ("benchmarks", "recipes") for p in (ROOT / folder).glob("*.py"))
PAGES = [*sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern)), *PROGRAMS]
DATED = ("log.md", "CHANGELOG.md")  # their lines of prose name options of earlier versions
TREE = ("benchmarks/", "docs/", "examples/", "recipes/", "src/", "studies/", "tests/")
VERBS: Any = typer.main.get_command(app)
# Modules that torch imports for its compiler raise this warning.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# ---------------------------------------------------------------------- what a page shows


def shown(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The words of each command of a page, and whether it is complete: in prose, some are not."""
    text = page.read_text("utf-8")
    text = (ast.get_docstring(ast.parse(text)) or "") if page.suffix == ".py" else text
    text = text.replace("\\\n", " ")
    if page.name == "errors.md":  # the first column of its tables has sentences
        text = re.sub(r"^\| .*? \| ", "", text, flags=re.MULTILINE)
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    margin = r"^#\s+" if page.suffix == ".toml" else r"^ {4,}"
    lines = "".join(blocks).splitlines()
    for line in [*lines, *re.findall(margin + "(.*)", text, flags=re.MULTILINE)]:
        yield from ((words, True) for words in simple_commands(line))
    if page.suffix == ".md" and page.name not in DATED:
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
            yield from ((words, False) for words in simple_commands(" ".join(code.split())))


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of memvec, or of a Python program, in a line of shell.

    A single capital letter stands for a number, which is 8 here. Dots and brackets at the end mean
    that there may be more.
    """
    line = re.sub(r"\s#(\s.*)?$", "", line)
    for part in re.split(r"&&|\|\||[|;]", line):
        command = re.sub(r"^\s*(?:[A-Z_]+=\S+ )*", "", part)
        command = re.sub(r"\s(>+ ?\S+|\.\.\.|\[.*\])\s*$", "", command)
        if re.match(r"memvec [a-z-]+(\s|$)|python \S+\.py(\s|$)", command):
            yield [re.sub(r"^[A-Z]$", "8", word) for word in shlex.split(command)]


# ---------------------------------------------------------------------- what accepts it


class MadeError(Exception):
    """Ends a program as soon as it has made its parser, which is the argument."""


def stop(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
    raise MadeError(parser)


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise AssertionError(message)


@functools.cache
def parser_of(program: Path) -> argparse.ArgumentParser:
    """The parser of a program. Raises AssertionError for a program that has none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [program.name])
        patch.syspath_prepend(str(program.parent))
        if program.parent.name == "recipes":  # as if the program had started itself again
            variables = runpy.run_path(str(ROOT / "recipes/environment.py"))["ENVIRONMENT"]
            for name, value in variables.items():
                patch.setenv(name, value)
        try:
            runpy.run_path(str(program), run_name="__main__")
        except MadeError as made:
            return made.args[0]
    raise AssertionError(f"{program.name} takes no options")


def values_of_program(words: list[str], complete: bool) -> dict[str, Any]:
    """The options of a program. Raises AssertionError with what its parser says."""
    parser = parser_of(ROOT / words[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        for action in parser._actions:
            patch.setattr(action, "required", action.required and complete)
        return vars(parser.parse_args(words[1:]))


def values_of_verb(words: list[str], complete: bool) -> dict[str, Any]:
    """The options of a verb of memvec. Raises AssertionError with what its parser says."""
    command, context = VERBS, None
    while hasattr(command, "commands"):
        context = typer.Context(command, parent=context)
        if not words and not complete:
            return {}
        assert words, "a verb is missing"
        assert words[0] in command.commands, f"there is no verb {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    try:
        return command.make_context(command.name, list(words), parent=context).params
    except Exception as error:  # of the click that typer has inside
        if complete or type(error).__name__ != "MissingParameter":
            raise AssertionError(getattr(error, "format_message", error.__str__)()) from error
    return {}


def check(words: list[str], complete: bool) -> None:
    """Raise AssertionError or MemvecError for a command that cannot be run as it is written."""
    for word in words:
        if word.startswith(TREE):
            assert (ROOT / word).exists(), f"{word} is not in the repository"
    if words[0] == "memvec":
        values = values_of_verb(words[1:], complete)
    elif ROOT / words[1] in PROGRAMS:
        values = values_of_program(words[1:], complete)
    else:
        return
    check_recipe(values, words)


def check_recipe(values: dict[str, Any], words: list[str]) -> None:
    """Raise MemvecError if the preset and the fields of a command give no recipe."""
    given = values.get("set") or values.get("set_") or []
    changes = [change for change in given if change != "objective=hinge"]  # a part of a how-to
    preset = values.get("preset") or "default"
    if values.get("usable") or words[1] == "trigger" or words[1].endswith("usable.py"):
        preset = "usable" if preset == "default" else preset
    recipe_of(preset, changes, space=values.get("space"))


def refused(page: Path, first: str) -> list[tuple[str, str]]:
    """The commands of a page that begin with `first` and are refused, and why."""
    wrong = []
    for words, complete in shown(page):
        try:
            if words[0] == first:
                check(words, complete)
        except Exception as error:
            wrong.append((shlex.join(words), str(error)))
    return wrong


# ---------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_of_memvec_on_a_page_are_accepted(page):
    assert refused(page, "memvec") == []


@pytest.mark.slow  # it imports every program
def test_the_commands_of_programs_are_accepted():
    pages = {page.name: refused(page, "python") for page in PAGES}
    assert {name: wrong for name, wrong in pages.items() if wrong} == {}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("memvec crams letter.txt", "there is no verb crams"),
        ("memvec study go SPEC", "there is no verb go"),
        ("memvec cram", "Missing argument"),
        ("memvec cram letter.txt --token 4", "No such option: --token"),
        ("memvec cram letter.txt --tokens few", "'--tokens'"),
        ("memvec cram letter.txt --preset largest", "largest"),
        ("memvec cram letter.txt --set margn=1", "did you mean 'margin'"),
        ("A=1 memvec cram examples/train.txt | head", "examples/train.txt is not in"),
        ("cd x && python benchmarks/gone.py  # gone", "benchmarks/gone.py is not in"),
        ("python benchmarks/batch.py --fast", "unrecognized arguments: --fast"),
        ("python benchmarks/batch.py --rounds few", "invalid int value: 'few'"),
    ],
)
def test_a_command_that_cannot_be_run_is_noticed(command, reason, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Run\n\n    {command}\n")
    wrong = refused(page, "memvec") + refused(page, "python")
    assert len(wrong) == 1
    assert reason in wrong[0][1]


def test_in_prose_a_command_may_lack_its_file_and_a_number(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Use `memvec cram --corrections N` or `memvec study`, not `memvec cram --ram`.")
    assert [command for command, _ in refused(page, "memvec")] == ["memvec cram --ram"]
