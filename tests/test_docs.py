"""The documentation: links have targets, pages are in the site, and texts agree with the code.

Only the standard library is used for links, so that they are checked wherever the tests run;
`make docs` builds the whole site strictly.
"""

import html
import json
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
STUDY = DOCS / "pocket-full"  # the report of a study, written by memvec
WRITTEN = sorted(page for page in DOCS.rglob("*.md") if STUDY not in page.parents)
PAGES = [ROOT / "README.md", *WRITTEN]
ARMS = ("progressive", "low-dim", "alignment")  # of Tarasov et al., columns of docs/related.md
LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as python-markdown's `toc` makes them."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", page.read_text("utf-8"), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", html.unescape(heading))
        ascii_only = text.encode("ascii", "ignore").decode()
        name = re.sub(r"[^\w\s-]", "", ascii_only).strip().lower()
        names.add(re.sub(r"[-\s]+", "-", name))
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_and_anchor_has_a_target(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        if page.is_relative_to(DOCS):
            assert target.is_relative_to(DOCS), f"{page.name}: {link} is not in the site"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_links_and_anchors_are_recognised():
    assert LINK.findall("see [the [mem] vector](missing.md#place)") == ["missing.md#place"]
    assert "recipe-fields" in anchors(DOCS / "cli.md")


def test_every_page_is_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in WRITTEN:
        assert f": {page.relative_to(DOCS).as_posix()}\n" in site, page.name
    assert "font: false" in site


def test_the_command_line_page_is_up_to_date():
    written = runpy.run_path(str(DOCS / "cli_page.py"))["page"]()
    page = (DOCS / "cli.md").read_text("utf-8")
    assert page == written, "run: python docs/cli_page.py"


def test_the_tables_of_the_studies_page_are_up_to_date():
    written = runpy.run_path(str(DOCS / "study_page.py"))
    assert (DOCS / "studies.md").read_text("utf-8") == written["page"](), (
        "run: python docs/study_page.py"
    )
    units = {name: unit for name, unit, *_ in written["columns"]()}
    assert all(units.values())
    assert units["information_gain"] == units["least_loss_gain"] == "bits"
    assert units["spent"] == "tokens"
    assert units["accuracy"] == "share"
    assert units["extra: after_copy"] == "bits, hits"


def test_every_field_of_a_spec_has_a_meaning():
    written = runpy.run_path(str(DOCS / "study_page.py"))
    meanings = {(where, name): text for where, name, _, text in written["fields"]()}
    assert not {key for key, text in meanings.items() if text in ("", "None")}
    for key in (
        ("top", "batch_size"),
        ("`[[sources]]` of kind `files`, `hub`, `pg19`, `fanfics`", "dataset"),
        ("`[[runs]]`", "lengths"),
        ("`[[runs]]` of protocol `transfer`", "origin"),
    ):
        assert key in meanings


def test_every_name_in_the_python_reference_exists():
    """Every name is imported, without the documentation tools that `make docs` uses."""
    named = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text("utf-8"), flags=re.MULTILINE)
    assert len(named) >= 10
    for name in named:
        assert pkgutil.resolve_name(name), name


def source_words() -> str:
    """All of the package's text, with the pieces of split strings joined."""
    source = "\n".join(p.read_text("utf-8") for p in sorted((ROOT / "src").rglob("*.py")))
    source = re.sub(r"[\"']\s*\n\s*f?[\"']", "", source)
    source = source.replace("\\n", " ")
    return " ".join(re.sub(r"\{[^{}]*\}", " ", source).split())


def test_the_sentences_of_the_errors_page_are_in_the_code():
    """Every piece of a sentence between two placeholders is in the code."""
    source = source_words()
    page = (DOCS / "errors.md").read_text("utf-8")
    sentences = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(sentences) > 30
    missing = []
    for sentence in sentences:
        pieces = re.split(r"'?\b(?:[A-Z]|[A-Z]{3,})\b'?", sentence.replace("ENCODING", "NAME"))
        for piece in (p.strip(" .:,()'`") for p in pieces):
            if len(piece) > 14 and piece not in source:
                missing.append((sentence, piece))
    assert not missing


def test_the_published_lengths_on_the_page_are_those_of_the_package():
    data = json.loads((ROOT / "src/memvec/lab/report/published.json").read_text("utf-8"))
    names = {name.split("/")[-1].lower(): name for name in data["progressive"]["values"]}
    text = (DOCS / "related.md").read_text("utf-8")
    table = text.split("<!-- lengths: ")[1].split("<!-- end of lengths -->")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 9
    for model, *cells in rows:
        name = names[model.strip().lower()]
        seed = data["table1"]["values"].get(name, {}).get("pg19", {}).get("longest")
        arms = data["progressive"]["values"][name]
        means = [arms.get(arm, {}).get("tokens", [None])[0] for arm in ARMS]
        one_step = data["one_step"]["values"]["longest"].get(name, {}).get("pg19", {}).get("own_m")
        shown = [None if cell.strip() == "–" else float(cell) for cell in cells]
        assert shown == [seed, *means, one_step], model


def test_no_page_installs_memvec_from_a_package_index():
    """memvec is on no index, so a package of that name would be someone else's."""
    wrong = re.compile(r"pip install [\"']?memvec")
    texts = [*DOCS.rglob("*.md"), ROOT / "README.md", *(ROOT / "src").rglob("*.py")]
    named = {str(p.relative_to(ROOT)) for p in texts if wrong.search(p.read_text("utf-8"))}
    assert named == {"docs/log.md"} & named  # entries of the log are not changed later


def test_examples_are_named_in_the_start_page():
    start = (DOCS / "index.md").read_text("utf-8")
    notebooks = [p.name for p in (ROOT / "examples").glob("*.ipynb")]
    assert notebooks
    assert all(f"`{name}`" in start for name in notebooks)
