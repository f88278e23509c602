"""Every function that takes a path accepts a str or a Path, and `~` in it is the home folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import QUICK, reader
from memvec import MemVectors, Recipe, cram, load_lm
from memvec.companions.around import CrammedTrigger
from memvec.companions.encoder_files import load_encoder, read_encoders, shape_of
from memvec.companions.triggers import load_trigger, save_trigger
from memvec.engines.run import run_engine
from memvec.errors import MemvecError
from memvec.export import export, target
from memvec.lab.report.report import write_report
from memvec.lab.sentences.files import load_latent_model, model_of
from memvec.lab.study.check import check_study
from memvec.lab.study.export import export_rows
from memvec.lab.study.run import run_study
from memvec.lab.study.spec import parse_spec, read_spec
from memvec.lab.study.store import Store
from memvec.passages.documents import read_document
from memvec.usable import receipts
from memvec.usable.columns import Column
from memvec.usable.evaluate import Evaluation
from memvec.usable.queries import questions_of
from memvec.usable.recipe_files import named_files
from memvec.usable.trigger_training import TriggerPlan, train_trigger
from memvec.writing import make_folder, path_of

SPEC = """
name = "none"
[[models]]
name = "pocket"
[[sources]]
kind = "files"
path = "texts"
[[runs]]
protocol = "exact"
lengths = [4]
"""
PLAN = TriggerPlan(rows=1, front=0, vectors=1, tokens=4, batches=1, batch_size=1)
FORMS = {
    "str": lambda home, name: str(home / name),
    "Path": lambda home, name: home / name,
    "~": lambda home, name: f"~/{name}",
    "Path of ~": lambda home, name: Path("~") / name,
    "~nouser": lambda home, name: f"~nouser/{name}",
}


class Named(os.PathLike):
    """A path of another class than Path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __fspath__(self) -> str:
        return self.name


@pytest.fixture(scope="module")
def mem() -> MemVectors:
    """A text in a tiny model."""
    return cram(reader(), "fox", recipe=QUICK)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder. In the current one, `~nouser` is a folder of this name."""
    folder = tmp_path / "home"
    folder.mkdir()
    (tmp_path / "~nouser").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(params=FORMS)
def path(request, home):
    """A path by its name in the home folder or `~nouser`, in one of the forms."""
    return lambda name: FORMS[request.param](home, name)


def whole(path: object) -> str:
    """The path with the home folder in place of `~`, as errors show it."""
    return str(path).replace("~/", os.environ["HOME"] + "/")


MISSING = {
    "MemVectors.load": MemVectors.load,
    "from_pretrained": MemVectors.from_pretrained,
    "load_lm": load_lm,
    "load_lm(encoder)": lambda path: read_encoders(reader(), None, path),
    "load_encoder": lambda path: load_encoder(path, reader()),
    "shape_of": shape_of,
    "load_trigger": lambda path: load_trigger(path, reader()),
    "trigger": lambda path: cram(
        reader(), "a", recipe=Recipe.of("usable", trigger=f"{path}.safetensors")
    ),
    "neighbours": lambda path: named_files(Recipe.of("usable", neighbours=str(path))),
    "questions_of": questions_of,
    "tasks_folder": lambda path: Evaluation(("t",), tasks_folder=path).check(),
    "receipts": receipts.read,
    "run_engine": lambda path: run_engine("vllm", "python", path, "float32", []),
    "read_spec": read_spec,
    "check_study": check_study,
    "write_report": lambda path: write_report(path, path),
    "export_rows": lambda path: export_rows(path, path),
    "Store": Store,
    "base": lambda path: run_study(parse_spec(SPEC, "spec"), "out", Store, base=path),
    "load_latent_model": lambda path: load_latent_model(path, reader()),
    "model_of": model_of,
}


@pytest.mark.parametrize("entry", MISSING)
def test_a_missing_file_is_named_whatever_form_its_path_has(entry, path):
    """`~NAME` of an unknown user is not replaced: it is the name of a file."""
    with pytest.raises(MemvecError) as caught:
        MISSING[entry](path("none"))
    error = str(caught.value)
    assert whole(path("none")) in error


def test_a_journal_in_a_folder_that_is_not_there_is_refused(path):
    with pytest.raises(MemvecError, match=r"there is no folder .* to keep journal in"):
        cram(reader(), "a", recipe=QUICK, journal=path("none/journal"))


def test_a_training_reads_the_file_at_its_path(home, path):
    for folder in (home, Path("~nouser")):
        (folder / "text").write_text("no trigger")
    with pytest.raises(MemvecError, match="text is not a trigger that memvec can read"):
        train_trigger(reader(), [[1, 2]], PLAN, replace(QUICK, term="use"), path("text"))


def test_files_are_written_at_their_paths(home, path, mem):
    lm = reader()
    mem.save(path("a.mem.safetensors"))
    mem.save_pretrained(path("folder"), base_licence="mit")
    save_trigger(path("t.safetensors"), CrammedTrigger(mem.vectors[0].float()), lm, {})
    export(lm, mem, target("npy"), path("npy"))
    make_folder(path("receipts"))
    cram(lm, "a", recipe=QUICK, journal=path("journal"))
    Column(lm, "crammed", cache=path("cache"), tokens=4)
    with pytest.raises(MemvecError, match=r"a\.mem\.safetensors exists"):
        mem.save(path("a.mem.safetensors"))
    there = home if str(path("")).startswith(("~/", str(home))) or str(path("")) == "~" else None
    names = {file.name for file in (there or Path("~nouser")).iterdir()}
    assert names == {"a.mem.safetensors", "folder", "t.safetensors", "npy", "receipts", "journal"}
    assert MemVectors.load(path("a.mem")).header == mem.header
    assert MemVectors.from_pretrained(path("folder")).passages == mem.passages
    written = (there or Path("~nouser")) / "text"
    written.write_text("fox")
    assert read_document(lm, path("text")).name == str(path("text"))


@pytest.mark.parametrize("form", [str, Path, Named])
@pytest.mark.parametrize("given", ["a", "~", "~/a"])
def test_a_path_has_the_home_folder_for_its_tilde(home, given, form):
    assert path_of(form(given)) == Path(given.replace("~", str(home)))


@pytest.mark.parametrize("given", [None, 7, ["a"], b"a"])
def test_a_path_of_another_type_is_refused(given, untyped):
    with pytest.raises(MemvecError, match=r"^a path is a str or a Path, not "):
        MemVectors.load(given)
    with pytest.raises(MemvecError, match=r"^a path is a str or a Path, not "):
        read_spec(given)
