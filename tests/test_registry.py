"""The registry: every name resolves, errors are one sentence, and other packages add names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from conftest import tiny
from memvec import plugins, registry
from memvec.companions.encoder import OnePassEncoder
from memvec.errors import MemvecError
from memvec.export import Target, names, target
from memvec.export.target import Item
from memvec.lab.sources import SOURCES, Source

PLACES = [
    (kind, name, place)
    for kind, choices in registry.BUILT_IN.items()
    for name, place in choices.items()
]


@pytest.fixture
def empty(monkeypatch):
    """The registry without names that plug-ins have added."""
    monkeypatch.setattr(registry, "_ADDED", {kind: {} for kind in registry.KINDS})


# ---------------------------------------------------------------------- names


def test_every_kind_has_a_table_and_a_description():
    assert registry.BUILT_IN.keys() == registry.KINDS.keys()
    assert all(registry.KINDS.values())


@pytest.mark.parametrize(("kind", "name", "place"), PLACES)
def test_every_built_in_name_resolves(kind, name, place):
    attribute = place.partition(":")[2]
    assert registry.get(kind, name).__name__ == attribute


@pytest.mark.parametrize("kind", registry.KINDS)
def test_built_in_names_come_first(kind):
    assert registry.names(kind)[: len(registry.BUILT_IN[kind])] == list(registry.BUILT_IN[kind])


def test_unknown_kinds_and_names_are_one_sentence():
    for call in (registry.names, lambda kind: registry.get(kind, "x")):
        with pytest.raises(MemvecError, match=r"^unknown kind 'sorce': did you mean 'source'\?$"):
            call("sorce")
    with pytest.raises(MemvecError, match="unknown kind 'sorce'"):
        registry.register("sorce", "mine")
    with pytest.raises(MemvecError, match=r"^unknown source 'filse': did you mean 'files'\?$"):
        registry.get("source", "filse")
    known = "adapted, recurrent, slots, summary, usable"
    with pytest.raises(
        MemvecError, match=rf"^unknown encoder '7': known: {known}; if it is a plug-in's, "
    ):
        registry.get("encoder", "7")


@pytest.mark.usefixtures("empty")
def test_a_name_is_registered_for_one_object_only():
    def first(): ...

    def second(): ...

    assert registry.register("encoder", "mine")(first) is first
    assert registry.register("encoder", "mine")(first) is first  # as when a module is reloaded
    assert registry.get("encoder", "mine") is first
    assert registry.names("encoder")[-1] == "mine"
    for name in ("mine", "slots"):
        with pytest.raises(MemvecError, match=f"^the name '{name}' is taken by another encoder"):
            registry.register("encoder", name)(second)
    assert registry.get("encoder", "mine") is first
    assert registry.register("export", "mine")(second) is second  # another kind has its own names


# ---------------------------------------------------------------------- sources, targets, encoders


@pytest.mark.parametrize("kind", registry.BUILT_IN["source"])
def test_a_source_is_made_by_the_name_of_its_kind(kind):
    source = SOURCES[kind](name="x")
    assert issubclass(SOURCES[kind], Source)
    assert source.kind == source.settings()["kind"] == kind
    assert SOURCES[kind].__doc__


@pytest.mark.parametrize("name", names())
def test_a_target_has_its_registered_name(name):
    assert isinstance(target(name), Target)
    assert target(name).name == name
    assert target(name).description


def test_sources_and_targets_are_those_of_the_registry():
    assert list(SOURCES) == registry.names("source")
    assert names() == registry.names("export")
    assert len(SOURCES) == len(list(SOURCES))
    assert "mine" not in SOURCES
    assert 0 not in SOURCES
    assert SOURCES.get("mine") is None
    with pytest.raises(MemvecError, match=r"^unknown target 'vlm': did you mean 'vllm'\?$"):
        target("vlm")


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({}, "the export 'mine' has no description and no suffix."),
        ({"suffix": ".x"}, "the export 'mine' has no description."),
    ],
)
def test_a_target_without_its_attributes_is_refused(members, sentence):
    registry.register("export", "mine")(type("Mine", (Target,), members))
    with pytest.raises(MemvecError, match=f"^{re.escape(sentence)}$"):
        target("mine")


@pytest.mark.usefixtures("empty")
def test_a_target_without_its_methods_or_its_base_is_refused():
    registry.register("export", "mine")(type("Mine", (Target,), {"description": "", "suffix": ""}))
    item = Item(torch.zeros(1, tiny().width), (), 1)
    for method in ("read", "write"):
        with pytest.raises(MemvecError, match=f"^the export 'mine' has no method {method}.$"):
            getattr(target("mine"), method)(Path("x"), item, tiny())
    registry.register("export", "theirs")(object)
    with pytest.raises(MemvecError, match=r"^the export 'theirs' is no class derived"):
        target("theirs")


@pytest.mark.slow
def test_the_abstract_encoder_imports_no_model():
    """The model has an encoder, so that import would be a circle."""
    code = "import memvec.companions.encoder, sys; print('memvec.model' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
    assert OnePassEncoder.__abstractmethods__ == {"to", "read"}


# ---------------------------------------------------------------------- plug-ins

PLUGIN = """
    from typing import Literal

    from memvec import register
    from memvec.export import Target
    from memvec.passages.passage import Passage
    from memvec.lab.sources import Source, SourcedPassage


    @register("source", "counting")
    class Counting(Source):
        kind: Literal["counting"] = "counting"
        step: int = 1

        def passages(self, lm, count, length, base=None):
            for i in range(count):
                ids = tuple(range(2, 2 + length * self.step, self.step))
                yield SourcedPassage(i, Passage(ids, i), f"counting #{i}")


    @register("export", "nowhere")
    class Nowhere(Target):
        description = "nothing"
        suffix = ".none"
"""

USE = """
    import io
    import json
    import sys

    from memvec import export, registry
    from memvec.cli import main
    from memvec.errors import MemvecError
    from memvec.lab.study.spec import Spec, parse_spec

    SPEC = '''
    name = "s"
    [[models]]
    name = "pocket"
    [[sources]]
    kind = "KIND"
    KEY = 3
    [[runs]]
    protocol = "exact"
    lengths = [4]
    '''

    def sentence(kind, key):
        try:
            parse_spec(SPEC.replace("KIND", kind).replace("KEY", key), "spec")
        except MemvecError as error:
            return str(error)

    spec = parse_spec(SPEC.replace("KIND", "counting").replace("KEY", "step"), "spec")
    (source,) = spec.sources
    def ended(*words):
        sys.argv, sys.stderr = ["memvec", *words], io.StringIO()
        try:
            main()
        except SystemExit as end:
            return end.code, sys.stderr.getvalue()

    export_to = ("export", "none.mem", "--to")
    print(json.dumps({
        "misspelt": ended(*export_to, "nowhre"),
        "known": ended(*export_to, "nowhere"),
        "sources": registry.names("source"),
        "ids": [p.passage.ids for p in source.passages(None, 2, 4)],
        "settings": source.settings(),
        "again": Spec.model_validate(spec.model_dump()) == spec,
        "target": [export.target("nowhere").name, export.target("nowhere").description],
        "sentences": [sentence("countin", "step"), sentence("counting", "stepp")],
    }))
"""


def installed(folder: Path, source: str) -> Path:
    """A distribution as pip installs it: a module, its metadata and its entry point."""
    (folder / "counting.py").write_text(textwrap.dedent(source))
    metadata = folder / "memvec_counting-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: memvec-counting\nVersion: 1.0")
    (metadata / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nmine = counting\n")
    return folder


def ran_beside(folder: Path, code: str, python: str) -> subprocess.CompletedProcess[str]:
    """Run a program in whose environment the distribution in a folder is installed."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{textwrap.dedent(code)}"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_package_adds_a_source_and_a_target_for_the_command(tmp_path, python):
    ran = ran_beside(installed(tmp_path, PLUGIN), USE, python)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen["sources"] == [*registry.BUILT_IN["source"], "counting"]
    assert seen["ids"] == [[2, 5, 8, 11]] * 2
    assert seen["settings"] == {"kind": "counting", "seed": 0, "step": 3}
    assert seen["again"] is True
    assert seen["target"] == ["nowhere", "nothing"]
    assert seen["sentences"] == [
        "spec: unknown kind 'countin' in sources [1]: did you mean 'counting'?",
        "spec: unknown key 'stepp' in sources [1]: did you mean 'step'?",
    ]
    for word, (code, sentence) in (
        ("did you mean 'nowhere'", seen["misspelt"]),
        ("none.mem", seen["known"]),  # the target exists, and only the file is missing
    ):
        assert code == 2
        assert word in sentence


def test_a_package_that_cannot_be_imported_is_one_sentence(tmp_path):
    use = """
        from memvec import registry
        from memvec.errors import MemvecError
        try:
            registry.names("source")
        except MemvecError as error:
            print(error)
    """
    ran = ran_beside(installed(tmp_path, "import no_such_library"), use, sys.executable)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "the plug-in 'mine' (counting) cannot be imported: No module named 'no_such_library'"
    ]
