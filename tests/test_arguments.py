"""Errors name arguments in Python and options on the command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

import memvec
from conftest import QUICK, reader
from memvec import MemvecError, Recipe
from memvec.cli.app import app
from memvec.cli.arguments import WRITTEN, as_options, options_of
from memvec.encoders.usable_training import UsablePlan
from memvec.export import export
from memvec.usable.evaluate import Evaluation

ROOT = Path(memvec.__file__).parent
LIBRARY = [path for path in ROOT.rglob("*.py") if path.parent.name != "cli"]
OF_COMMANDS = ("memvec encoder train --recurrent", "python -m nltk.downloader")
OPTIONS = set(options_of(typer.main.get_command(app)))


@pytest.fixture(scope="module")
def mem() -> memvec.MemVectors:
    """A text in a tiny model."""
    return memvec.cram(reader(), "a", recipe=QUICK)


def sentences(path: Path) -> list[str]:
    """The texts in calls of MemvecError and of the errors derived from it."""
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")
    ]
    return [
        node.value
        for call in calls
        for node in ast.walk(call)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.slow
def test_errors_of_the_library_name_no_options_of_the_command():
    named = []
    for path in LIBRARY:
        for sentence in sentences(path):
            for of_command in OF_COMMANDS:
                sentence = sentence.replace(of_command, "")
            if re.search(r"(?<![\w-])--?[a-z]", sentence):
                named.append((path.name, sentence))
    assert named == []


def test_every_translated_argument_is_in_the_library_and_every_option_in_a_verb():
    source = "\n".join(path.read_text("utf-8") for path in LIBRARY)
    for argument, option in WRITTEN.items():
        assert argument in source
        assert option.split()[0] in OPTIONS


def test_every_argument_with_a_value_in_an_error_is_translated():
    value = re.compile(r"(?<![\w'])[a-z_]+=(?:True|False|[A-Z]+|'[^']+')(?![\w'])")
    named = {found for path in LIBRARY for s in sentences(path) for found in value.findall(s)}
    of_parts = {"kind='soft'", "file='letter.mem.safetensors'"}  # that a recipe names
    assert named - WRITTEN.keys() == of_parts


@pytest.mark.parametrize(
    ("sentence", "printed"),
    [
        ("batch_size must be at least 1.", "--batch-size must be at least 1."),
        ("weight must be a number from 0.", "--use-weight must be a number from 0."),
        ("the space must be this.", "the space must be this."),
        ("passage_ids must be whole.", "passage_ids must be whole."),
        ("a.mem exists: use force=True.", "a.mem exists: use --force."),
        ("call f(enforce=True) or 'force=True'.", "call f(enforce=True) or 'force=True'."),
        ("use encoding='latin-1', say.", "use --encoding latin-1, say."),
    ],
)
def test_arguments_become_options(sentence, printed):
    assert as_options(sentence, OPTIONS) == printed


def test_errors_in_python_name_arguments(mem, tmp_path):
    with pytest.raises(MemvecError, match=r"^batch_size must be at least 1, not 0\.$"):
        memvec.cram(reader(), "a", batch_size=0)
    with pytest.raises(MemvecError, match=r"^examples must be at least 0, not -1\.$"):
        Evaluation(("t",), examples=-1).check()
    with pytest.raises(MemvecError, match=r"^weight must be a number from 0, not -1\.0\.$"):
        UsablePlan(weight=-1.0)
    with pytest.raises(MemvecError, match=r"neighbours is for use only: take the preset 'usable'"):
        Recipe(neighbours="x")
    mem.save(tmp_path / "a.mem")
    with pytest.raises(MemvecError, match=r"exists: use force=True to overwrite it"):
        mem.save(tmp_path / "a.mem")


@pytest.mark.slow
def test_errors_of_the_command_name_options(mem, tmp_path, command):
    (tmp_path / "a.txt").write_text("The fox.")
    (tmp_path / "latin.txt").write_bytes("Füchse".encode("latin-1"))
    mem.save(tmp_path / "a.mem")
    for words, sentence in (
        (("cram", tmp_path / "a.txt", "--batch-size", 0), "--batch-size must be at least 1"),
        (("eval", "t", "--fewshot", -1), "--fewshot must be at least 0, not -1"),
        (("cram", tmp_path / "a.txt", "-o", tmp_path / "a.mem"), "exists: use --force"),
        (("cram", tmp_path / "latin.txt"), "use --encoding latin-1, which takes any bytes"),
        (("cram", tmp_path / "a.txt", "--max-bytes", 3), "allow it with --max-bytes BYTES"),
    ):
        ran = command(*words)
        assert (ran.code, sentence in ran.sentence) == (2, True), ran.sentence


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda lm, mem: memvec.cram(lm, "a", tokens=True), "tokens must be a whole number"),
        (lambda lm, mem: memvec.cram(lm, "a", layout=5), "unknown layout '5'"),
        (lambda lm, mem: memvec.cram(lm, "a", layout=None), "unknown layout 'None'"),
        (lambda lm, mem: Recipe.of(None), "unknown preset 'None'"),
        (lambda lm, mem: memvec.Engine(lm, poll=-1), "poll must be at least 1"),
        (lambda lm, mem: memvec.certify(lm, [mem], "a"), "mem is a memvec.MemVectors"),
        (lambda lm, mem: memvec.load_lm(None), "a path is a str or a Path, not None"),
        (lambda lm, mem: memvec.load_lm(b"pocket"), "a path is a str or a Path, not b'pocket'"),
        (lambda lm, mem: memvec.FrozenLM("pocket"), "a model of transformers is needed, not a str"),
        (lambda lm, mem: memvec.score(lm, mem, None, [" a"]), "the prompt is no str"),
        (lambda lm, mem: memvec.score(lm, mem, "a", b"b"), "answers is a list of at least one"),
        (lambda lm, mem: memvec.score(lm, mem, "a", [5]), "answers is a list of at least one"),
        (lambda lm, mem: export(lm, mem, None, "out"), "unknown target 'None'"),
        (lambda lm, mem: export(lm, [mem], "npy", "out"), "mem is a memvec.MemVectors"),
    ],
)
def test_a_python_caller_gets_one_sentence_for_a_wrong_argument(mem, call, sentence):
    with pytest.raises(MemvecError, match=f"^{re.escape(sentence)}"):
        call(reader(), mem)
