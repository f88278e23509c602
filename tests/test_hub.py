"""Vectors as a folder and as a repository of the Hub, and their card; no test uses the network."""

from __future__ import annotations

import functools
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from conftest import QUICK, reader
from memvec import codec, hub
from memvec.errors import MemvecError
from memvec.passages.documents import Document
from memvec.vectors import MemVectors

TEXT = "the lazy fox"
# The HTTP library that this version of huggingface_hub uses.
HTTP = sys.modules[huggingface_hub.errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0]]


@functools.cache
def mem() -> MemVectors:
    return codec.cram(reader(), [TEXT], vectors=2, tokens=2, recipe=QUICK)


def named(name: str, **changes) -> MemVectors:
    header = mem().header
    model = header.model | {"name": name} | changes
    return MemVectors(mem().vectors, header.model_copy(update={"model": model}))


class FakeApi(huggingface_hub.HfApi):
    """Records what is uploaded; `fails` is raised by the next call."""

    fails: Exception | None = None
    seen: dict = {}  # noqa: RUF012

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repository, *, private, exist_ok):
        if FakeApi.fails is not None:
            raise FakeApi.fails
        FakeApi.seen = {"repository": repository, "private": private, "exist_ok": exist_ok}

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, FakeApi.place)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def model_info(self, name):
        return SimpleNamespace(card_data={"license": "llama3.2"})


@pytest.fixture
def api(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "fails", None)
    monkeypatch.setattr(FakeApi, "place", tmp_path / "uploaded", raising=False)
    return FakeApi


# ---------------------------------------------------------------------- folders


def test_a_folder_gives_the_text_back(tmp_path):
    folder = mem().save_pretrained(tmp_path / "deep/letter")
    again = MemVectors.from_pretrained(folder)
    assert torch.equal(again.vectors, mem().vectors)
    assert again.header == mem().header
    assert codec.decode(reader(), again) == [TEXT]
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", hub.FILE]


def test_a_published_folder_has_no_local_paths(tmp_path):
    folder = tmp_path / "secret" / "tiny"
    folder.mkdir(parents=True)
    lm = reader()
    document = Document.of(lm, TEXT.encode(), name="/home/secret/letter.txt")
    crammed = codec.cram(lm, [document], recipe=replace(QUICK, queries="/secret/questions.txt"))
    crammed.header.model["name"] = str(folder)
    for trigger, published in (("a/b", "a/b"), ("/secret/t.safetensors", "t.safetensors")):
        crammed.header.recipe["trigger"] = trigger  # the text of a token, or a file
        assert hub.without_paths(crammed).header.recipe["trigger"] == published
    crammed.save_pretrained(tmp_path / "published")
    written = (tmp_path / "published" / hub.FILE).read_bytes()
    assert b"secret" not in written
    again = MemVectors.from_pretrained(tmp_path / "published")
    assert (again.header.model["name"], again.header.documents[0].name) == ("tiny", "letter.txt")
    assert codec.decode(lm, again) == [TEXT]


@pytest.mark.parametrize(
    ("given", "published"),
    [
        (
            "mine(words='/home/secret/a.txt', by=2, kind='a/b')",
            "mine(by=2, kind='a/b', words='a.txt')",
        ),
        ("mine(words='~/secret/a.txt')", "mine(words='a.txt')"),
        ("mine()", "mine()"),
        ("mine(a", "mine(a"),
    ],
)
def test_local_paths_in_the_arguments_of_a_part_are_not_published(given, published):
    fields = {"objective": given, "queries": given}
    header = mem().header.model_copy(update={"recipe": mem().header.recipe | fields})
    recipe = hub.without_paths(MemVectors(mem().vectors, header)).header.recipe
    assert [recipe["objective"], recipe["queries"]] == [published] * 2


@pytest.mark.parametrize("name", ["questions(1).txt", "questions (a)", "(a=1)"])
def test_a_path_of_queries_with_brackets_is_read_as_a_path(name):
    header = mem().header
    changed = header.model_copy(update={"recipe": header.recipe | {"queries": f"/secret/{name}"}})
    assert hub.without_paths(MemVectors(mem().vectors, changed)).header.recipe["queries"] == name


def test_vectors_are_not_overwritten_without_force(tmp_path):
    mem().save_pretrained(tmp_path)
    before = (tmp_path / hub.FILE).read_bytes()
    with pytest.raises(MemvecError, match="exists"):
        mem().save_pretrained(tmp_path)
    assert (tmp_path / hub.FILE).read_bytes() == before
    mem().save_pretrained(tmp_path, force=True)


def test_a_missing_folder_or_repository_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MemvecError, match=r"no \[mem\] vectors in"):
        MemVectors.from_pretrained(tmp_path / "empty")
    with pytest.raises(MemvecError, match=r"empty is a folder here: only the Hub has a revision"):
        MemVectors.from_pretrained(tmp_path / "empty", revision="main")
    with pytest.raises(MemvecError, match=r"no folder .* not a Hub id"):
        MemVectors.from_pretrained(tmp_path / "none")
    for relative in ("./none", "../none"):
        with pytest.raises(MemvecError, match=r"no folder .* not a Hub id"):
            MemVectors.from_pretrained(relative)
    with pytest.raises(MemvecError, match=r"the Hub could not be reached for somebody/letter") as e:
        MemVectors.from_pretrained("somebody/letter")  # tests run offline
    assert "\n" not in str(e.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(MemvecError, match="cannot be made"):
        mem().save_pretrained(tmp_path / "file/folder")


def test_a_repository_is_downloaded(tmp_path, monkeypatch):
    folder = mem().save_pretrained(tmp_path / "a")
    asked = []

    def download(name, file, *, revision, token):
        asked.append((name, file, revision, token))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    again = MemVectors.from_pretrained("somebody/letter", revision="abc")
    assert again.header == mem().header
    assert asked == [("somebody/letter", hub.FILE, "abc", None)]


# ---------------------------------------------------------------------- the card


def test_the_card_has_model_licence_warning_and_certificate():
    text = hub.card(named("org/model", revision="f00"), repository="me/letter", licence="cc0-1.0")
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]
    assert "base_model: org/model" in front
    assert "license: cc0-1.0" in front
    assert hub.WARNING in text
    assert 'from_pretrained("me/letter")' in text
    assert 'load_lm("org/model", revision="f00", dtype="float32")' in text
    passages = len(mem().passages)
    assert f"Exact: {passages} of {passages} passages came back" in text
    assert "not known here" in text
    assert TEXT not in text
    bare = MemVectors(mem().vectors, mem().header.model_copy(update={"certificate": None}))
    assert "were not decoded as a whole" in hub.card(bare)
    fallen = mem().with_certificate(mem().header.certificate | {"exact": False}, [False] * passages)
    assert "**Not exact**" in hub.card(fallen)


def test_the_hub_s_reader_reads_the_card():
    """huggingface_hub reads every field of the metadata, and the text below it."""
    card = huggingface_hub.ModelCard(hub.card(named("org/model"), licence="cc0-1.0"))
    assert card.data.to_dict() == {
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "library_name": "memvec",
        "license": "cc0-1.0",
        "tags": ["mem-vectors"],
    }
    assert card.text.startswith("\n# [mem] vectors of org/model\n")


def test_the_card_names_no_local_folder(tmp_path):
    folder = tmp_path / "secret" / "tiny"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# tiny\nlicense: gpl\n")
    text = hub.card(named(str(folder)))
    assert "secret" not in text
    assert "base_model:" not in text
    assert "base model's licence is `mit`" in text
    for relative in ("./gone", "../gone", "../models/gone"):  # crammed in another folder
        text = hub.card(named(relative))
        assert "base_model:" not in text
        assert 'load_lm("gone"' in text
    for text, licence in (
        ("# tiny\n\nlicense: gpl\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("---\nlicense:\n- mit\n- gpl\n---\n", None),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: other\nlicense_name: tiny-licence\n---\n", "tiny-licence"),
    ):
        (folder / "README.md").write_text(text)
        assert hub.licence_of(named(str(folder))) == licence


def test_the_card_of_the_built_in_model_has_its_licence():
    assert hub.licence_of(named("pocket")) == "apache-2.0"
    assert "base_model:" not in hub.card(named("pocket"))


def test_the_card_s_code_runs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = named(str(folder)).save_pretrained("letter")
    code = re.search(r"```python\n(.*?)```", (saved / "README.md").read_text("utf-8"), re.DOTALL)[1]
    code = code.replace('"FOLDER"', '"letter"').replace('load_lm("tiny"', f'load_lm("{folder}"')
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == TEXT + "\n"


# ---------------------------------------------------------------------- the Hub


def test_pushing_uploads_the_vectors_and_their_card(api):
    address = named("org/model").push_to_hub("me/letter", private=True, licence="cc0-1.0")
    assert address == "https://hub/me/letter/commit/1"
    assert api.seen == {"repository": "me/letter", "private": True, "exist_ok": True}
    assert torch.equal(MemVectors.from_pretrained(api.place).vectors, mem().vectors)
    assert "base model's licence is `llama3.2`" in (api.place / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (HTTP.ConnectError("no route"), "could not be reached"),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), "could not be reached"),
        (huggingface_hub.errors.LocalTokenNotFoundError("no token\nlog in"), "no token"),
        (
            huggingface_hub.errors.HfHubHTTPError(
                "no", response=HTTP.Response(403, request=HTTP.Request("POST", "https://hub"))
            ),
            r"refused me/letter \(403\)",
        ),
        (
            huggingface_hub.errors.RepositoryNotFoundError(
                "no", response=HTTP.Response(404, request=HTTP.Request("POST", "https://hub"))
            ),
            "no repository me/letter",
        ),
    ],
)
def test_each_error_of_the_hub_is_one_sentence(api, error, sentence, monkeypatch):
    monkeypatch.setattr(FakeApi, "fails", error)
    with pytest.raises(MemvecError, match=sentence) as raised:
        mem().push_to_hub("me/letter", base_licence="mit")
    assert "\n" not in str(raised.value)
    assert not Path(api.place).exists()


def test_a_name_that_is_no_repository_is_refused(api):
    with pytest.raises(MemvecError, match="write user/name"):
        mem().push_to_hub("letter")


def test_another_readme_is_not_overwritten_without_force(tmp_path):
    (tmp_path / "README.md").write_text("MY OWN README")
    with pytest.raises(MemvecError, match=r"README.md is not a card of vectors"):
        hub.save_pretrained(mem(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    hub.save_pretrained(mem(), tmp_path, force=True)
    (tmp_path / "vectors.mem.safetensors").unlink()
    hub.save_pretrained(mem(), tmp_path)  # over its own card


def test_the_card_says_how_the_model_was_quantized():
    assert 'quantize="8bit")' in hub.card(named("x/y", quantize="8bit"))
