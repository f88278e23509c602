"""A program behaves in the Python of tests/preloaded.py as in the interpreter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import json, os, sys
about = [sys.argv, sys.path, os.getcwd(), os.environ.get("MARK"), __name__, sys.stdin.read()]
print(json.dumps([*about, "memvec" in sys.modules]))
print("said", file=sys.stderr)
"""


@pytest.fixture
def programs(tmp_path):
    """The program as a file, a module, a folder and a string of code."""
    for place in (tmp_path, tmp_path / "folder", tmp_path / "packages"):
        place.mkdir(exist_ok=True)
        (place / "about.py").write_text(PROGRAM)
    (tmp_path / "folder" / "__main__.py").write_text(PROGRAM)
    return {
        "file": [str(tmp_path / "about.py")],
        "relative": ["packages/../about.py"],
        "module": ["-m", "about"],
        "folder": [str(tmp_path / "folder")],
        "words": ["-c", PROGRAM],
        "unbuffered": ["-u", str(tmp_path / "about.py")],
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "relative", "module", "folder", "words", "unbuffered"])
def test_a_program_has_the_same_arguments_paths_and_input(kind, programs, tmp_path, python):
    own = {"MARK": "é", "PYTHONPATH": os.pathsep.join([str(tmp_path / "packages"), "/nowhere"])}
    seen = []
    for executable in (sys.executable, python):
        ran = subprocess.run(
            [executable, *programs[kind], "a b", "-x"],
            input="line\n",
            cwd=tmp_path,
            env=os.environ | own,
            capture_output=True,
            text=True,
        )
        assert (ran.returncode, ran.stderr) == (0, "said\n")
        seen.append(json.loads(ran.stdout))
    assert seen[0] == seen[1]
    assert seen[1][3:] == ["é", "__main__", "line\n", False]


ENDS = {
    "import sys; sys.exit(3)": 3,
    "import sys; print('x'); sys.exit('why')": 1,
    "raise SystemExit": 0,
    "1 / 0": 1,
    "import os; os._exit(7)": 7,
    "import os; os.kill(os.getpid(), 9)": -signal.SIGKILL,
    "import os; os.abort()": -signal.SIGABRT,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "import atexit; atexit.register(print, 'last'); print('first')": 0,
    "import threading; threading.Timer(0.2, print, ['last']).start(); print('first')": 0,
}


@pytest.mark.slow
def test_lines_are_not_kept_back_with_the_option_for_that(python):
    """A program that ends at once loses what is in a buffer."""
    words = ["-u", "-c", "import os; print('said'); os._exit(0)"]
    said = [subprocess.check_output([program, *words]) for program in (sys.executable, python)]
    assert said == [b"said\n"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("code", ENDS)
def test_a_program_ends_as_in_the_interpreter(code, python):
    ends = []
    for executable in (sys.executable, python):
        ran = subprocess.run([executable, "-c", code], capture_output=True, text=True)
        ends.append((ran.returncode, ran.stdout, ran.stderr.strip().splitlines()[-1:]))
    assert ends[0] == ends[1]
    assert ends[1][0] == ENDS[code]


WAITS = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_reaches_the_program_itself(number, python):
    process = subprocess.Popen(
        [python, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    program = int(process.stdout.readline())
    process.send_signal(number)
    known = number != signal.SIGUSR1 or python == sys.executable
    assert process.wait(30) == -(number if known else signal.SIGKILL)
    process.stdout.close()
    until = time.monotonic() + 30
    while alive(program) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(program)


def alive(process: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_the_libraries_are_loaded_before_a_program_starts(python):
    code = "import sys; print('torch' in sys.modules, sys.executable)"
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    if python != sys.executable:
        assert ran.stdout == f"True {python}\n"
