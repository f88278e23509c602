"""What the README and the start page show is run, and its output is compared with what they show.

Words must be equal. Numbers may differ a little, because another processor rounds differently; the
line with the cost, which has the seconds, is compared by its words only.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "docs/index.md").read_text(encoding="utf-8")
LETTER = ROOT / "examples/letter.txt"
HEADLINE = ROOT / "examples/bus.txt"
POCKET = ROOT / "src/memvec/pocket/model.safetensors"
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
TIMED = "cost"  # the label of the line whose numbers depend on the machine
NEAR = 0.35

pytestmark = pytest.mark.skipif(not POCKET.exists(), reason="the built-in model is not made yet")


def section(page: str, title: str) -> str:
    """The text below a heading."""
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(part: str) -> list[str]:
    return [line.strip() for line in part.splitlines() if line.startswith("    memvec ")] + [
        line.strip() for line in part.splitlines() if line.startswith("    cat ")
    ]


def outputs(part: str) -> list[str]:
    return re.findall(r"```text\n(.*?)```", part, re.DOTALL)


def assert_alike(real: str, shown: str) -> None:
    """The same words, line by line, and numbers that are near each other."""
    real_lines = [" ".join(line.split()) for line in real.strip().splitlines()]
    shown_lines = [" ".join(line.split()) for line in shown.strip().splitlines()]
    words = [[NUMBER.sub("#", line) for line in lines] for lines in (real_lines, shown_lines)]
    assert words[0] == words[1]
    for ours, theirs in zip(real_lines, shown_lines, strict=True):
        if ours.startswith(TIMED):
            continue
        for a, b in zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True):
            assert float(a) == pytest.approx(float(b), rel=NEAR, abs=0.05), (ours, theirs)


@pytest.fixture
def shell(tmp_path, python):
    """Run a command line in a folder that has the examples and the command `memvec`."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    memvec = tmp_path / "bin" / "memvec"
    memvec.parent.mkdir()
    memvec.write_text(f'#!/bin/sh\nexec "{python}" -m memvec "$@"\n')
    memvec.chmod(0o755)
    search = os.pathsep.join([str(memvec.parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": search,
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": "80",
    }

    def run(command: str) -> bytes:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, (command, done.stderr.decode())
        return done.stdout

    return run


def test_the_eight_lines_print_what_is_shown(tmp_path, monkeypatch, capsys):
    part = section(README, "Eight lines")
    code = re.search(r"```python\n(.*?)```", part, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) == 8
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == outputs(part)[0]


@pytest.mark.slow
def test_the_python_of_the_start_page_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", section(START, "In Python"), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/index.md", "exec"), {})
    assert re.fullmatch(r"12 tokens, \d+ bits\n", capsys.readouterr().out)


@pytest.mark.slow
def test_the_two_commands_print_what_is_shown(shell):
    part = section(README, "Two commands")
    cram, decode = commands(part)
    crammed, decoded = outputs(part)
    assert_alike(shell(cram).decode(), crammed)
    written = shell(decode)
    assert written.decode().strip() == decoded.strip()
    assert written == HEADLINE.read_bytes()


@pytest.mark.slow
def test_the_commands_of_the_start_page_run_and_the_bytes_come_back(shell, tmp_path):
    """`plan` and `cram -` have shorter texts than on the page: they cram fewer passages."""
    shown = commands(section(START, "First commands"))
    assert len(shown) >= 7
    harbour, letter = (tmp_path / f"examples/{name}.txt" for name in ("harbour", "letter"))
    harbour.write_bytes(harbour.read_bytes()[:150])
    for command in shown:
        if command in commands(section(README, "Two commands")):
            continue  # run, and its output compared, by the test of the README
        if command.startswith("cat"):  # after the commands that use the whole letter
            letter.write_bytes(letter.read_bytes()[:150])
        data = shell(command)
        if command.startswith("memvec decode"):
            assert data == LETTER.read_bytes()


def test_the_headline_is_ordinary_text_of_48_tokens():
    """Held-out novels have 1.75 to 1.98 bits per character; an easier text would fit better."""
    import memvec
    from memvec.passages.cutting import surprisals

    lm, text = memvec.load_lm("pocket"), HEADLINE.read_text(encoding="utf-8")
    ids = lm.tokenize(text)
    each = float(surprisals(lm, ids).double().sum()) / len(text)
    assert len(ids) == 48
    assert each >= 1.7
    assert f"{each:.2f} bits per character" in README


def test_the_readme_is_short_and_names_the_test_command():
    assert len(README.splitlines()) <= 110
    assert "`make test`" in README


def test_the_comparison_notices_other_words_and_distant_numbers():
    assert_alike("  tokens   225, cost 1.0 s", "tokens 226, cost 1.1 s")
    with pytest.raises(AssertionError):
        assert_alike("tokens 225", "tokens 400")
    with pytest.raises(AssertionError):
        assert_alike("tokens 225", "vectors 225")
