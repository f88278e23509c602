"""The tested releases agree with pyproject.toml and the locks; other releases give a warning."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from memvec import versions
from memvec.errors import UntestedVersionWarning
from memvec.loading import load_lm

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RANGES = {
    found.name: found.specifier for found in map(Requirement, PROJECT["project"]["dependencies"])
}
GROUPS = PROJECT["dependency-groups"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
# lock -> its requirements; the tools of the site and the evaluation harness have their own locks
LOCKS = {
    "requirements.lock": [
        PROJECT["project"]["dependencies"],
        *(extra for name, extra in EXTRAS.items() if name != "eval"),
        *(group for name, group in GROUPS.items() if name != "docs"),
    ],
    "requirements-eval.lock": [PROJECT["project"]["dependencies"], EXTRAS["eval"], GROUPS["test"]],
    "requirements-docs.lock": [GROUPS["docs"]],
}
EVERYTHING = [
    (lock, Requirement(text))
    for lock, groups in LOCKS.items()
    for group in groups
    for text in group
]


@pytest.mark.parametrize("name", versions.TESTED)
def test_the_declared_range_is_the_tested_one(name):
    lowest, newest = map(Version, versions.TESTED[name])
    assert RANGES[name].contains(lowest)
    assert not RANGES[name].contains(f"{lowest.major}.{lowest.minor - 1}.99")
    assert RANGES[name].contains(newest)
    assert not RANGES[name].contains(f"{newest.major}.{newest.minor + 1}.0")


@pytest.mark.parametrize("requirement", [r for _, r in EVERYTHING], ids=str)
def test_every_range_is_bounded(requirement):
    operators = {clause.operator for clause in requirement.specifier}
    if requirement.name != "memvec":
        assert ">=" in operators
        assert "<" in operators or requirement.name == "packaging"  # whose versions are dates


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_one_release_in_range_of_every_requirement(lock):
    lines = (ROOT / lock).read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    locked = {pin.name.lower().replace("_", "-"): pin for pin in pins}
    for name, requirement in EVERYTHING:
        if name != lock or requirement.name == "memvec":
            continue
        (pin,) = locked[requirement.name.lower()].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("99.0", "is newer than 2.15.0, the newest that memvec was tested with."),
        ("2.15.1+cu130", "torch 2.15.1 is newer than 2.15.0"),
        ("1.0", "is older than 2.11.0, the lowest that memvec was tested with."),
    ],
)
def test_an_untested_release_is_one_line(monkeypatch, installed, said):
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda n: installed if n == "torch" else real(n))
    with pytest.warns(UntestedVersionWarning) as warned:
        versions.warn_of_untested_versions()
    lines = [str(w.message) for w in warned if "torch" in str(w.message)]
    assert len(lines) == 1
    assert said in lines[0]
    assert "\n" not in lines[0]


def test_a_tested_release_gives_no_warning(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: versions.TESTED[name][1] + "+cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_of_untested_versions()


def test_loading_a_model_warns_of_untested_releases(folder, monkeypatch, command, tmp_path):
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda n: "99.0" if n == "torch" else real(n))
    with pytest.warns(UntestedVersionWarning, match=r"torch 99\.0 is newer"):
        load_lm(str(folder), check=False)
    (tmp_path / "a.txt").write_text("the cat")
    ran = command("cram", tmp_path / "a.txt", "--model", folder, "--tokens", 2)
    assert ran.code == 0
    assert "memvec: torch 99.0 is newer than 2.15.0" in ran.err
