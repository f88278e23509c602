"""What the README shows is run as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
POCKET = ROOT / "src/memvec/pocket/model.safetensors"

pytestmark = pytest.mark.skipif(not POCKET.exists(), reason="the built-in model is not made yet")


def test_the_eight_lines_run(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("True ")


@pytest.mark.slow
def test_the_commands_run_and_the_bytes_come_back(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    block = README.split("## On the command line")[1].split("| verb |")[0]
    commands = [line.strip() for line in block.splitlines() if line.startswith("    ")]
    assert len(commands) >= 6
    memvec = tmp_path / "bin" / "memvec"
    memvec.parent.mkdir()
    memvec.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m memvec.cli "$@"\n')
    memvec.chmod(0o755)
    search = os.pathsep.join([str(memvec.parent), os.environ["PATH"]])
    for command in commands:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": search, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, (command, done.stderr.decode())
        if command.startswith("memvec decode"):
            assert done.stdout == (tmp_path / "examples/letter.txt").read_bytes()
