"""A Python for the programs that tests start, in which torch and transformers are imported already.

Their import takes most of the time of such a program. So one server process imports them, once for
all workers of a run and only when a test starts a first program. It forks a process for each
program:

    python preloaded.py serve SOCKET        imports, forks, and ends with its standard input
    python preloaded.py run SOCKET ...      a test starts this instead of `python ...`

The second sends its arguments, environment, working directory and standard streams to the server,
passes signals on, and ends as the program ends. The program has `sys.path` and `sys.argv` as the
interpreter sets them, and it imports memvec itself. Tests of an import, or of the interpreter's
end, start `sys.executable`. With MEMVEC_TRUE_PYTHON=1, or if the path of the temporary
folder is too long for a socket, all tests do.
"""

import atexit
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path

LIBRARIES = """
import gc
gc.disable()
import peft, pydantic, rich.console, safetensors.torch, tokenizers, torch, typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import LlamaForCausalLM, Olmo2ForCausalLM, PreTrainedTokenizerFast
gc.collect()
gc.freeze()  # so a collection in a program does not write to, and copy, pages that all share
gc.enable()
"""

# A SIGKILL cannot be passed on. So a test sends SIGUSR1, and the program gets a SIGKILL.
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGKILL,
}


def begin() -> tuple[str, Callable[[], None]]:
    """Start the server; returns the path of the Python for tests, and a function that ends it."""
    long = len(os.fsencode(tempfile.gettempdir())) > 80  # a socket's path has at most 107 bytes
    if os.environ.get("MEMVEC_TRUE_PYTHON") or sys.platform != "linux" or long:
        return sys.executable, lambda: None
    folder = Path(tempfile.mkdtemp(prefix="memvec-"))
    words = [sys.executable, "-P", __file__]
    python, path = folder / "python", folder / "socket"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" run "{path}" "$@"\n')
    python.chmod(0o755)
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [*words, "serve", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=own,
        start_new_session=True,
    )
    server.stdout.readline()  # wait until it listens

    def end() -> None:
        server.communicate()
        shutil.rmtree(folder)

    return str(python), end


# ---------------------------------------------------------------------- the client


def run(path: str, words: list[str]) -> int:
    """Start a program and wait for it; returns its exit code, or ends by the same signal."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        socket.send_fds(line, [b"."], [0, 1, 2])
        # A signal waits until it can be passed on: the program may already run by then.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        line.sendall(json.dumps([words, dict(os.environ), str(Path.cwd())]).encode() + b"\n")
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: line.send(bytes([PASSED_ON[number]])))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        ended = line.makefile().readline()
    if not ended:
        sys.exit("the process that forks has ended: MEMVEC_TRUE_PYTHON=1 does without it.")
    status = json.loads(ended)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.WEXITSTATUS(status)


# ---------------------------------------------------------------------- the server


def serve(path: str) -> list[str] | None:
    """Fork a process for each program that a client starts, and return its arguments there.

    Returns None in the server itself, when its standard input has ended.
    """
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    # A shell that starts the tests in the background makes them ignore SIGINT; programs need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("listening", flush=True)
    imported, keepers = False, 0
    while listening in select.select([listening, 0], [], [])[0]:
        line, _ = listening.accept()
        if not imported:
            exec(LIBRARIES, {})
            imported = True
        if os.fork() == 0:
            listening.close()
            return keep(line, path)
        line.close()
        keepers += 1
        while keepers and os.waitpid(-1, os.WNOHANG)[0]:
            keepers -= 1
    for _ in range(keepers):
        os.wait()
    return None


def keep(line: socket.socket, path: str) -> list[str]:
    """Fork the program; this process passes signals to it and its exit status to the client.

    Returns the program's arguments in its own process, which has the streams, the environment, the
    working directory and the interpreter of the client.
    """
    _, streams, _, _ = socket.recv_fds(line, 1, 3)
    words, environment, folder = json.loads(line.makefile().readline())
    program = os.fork()
    if program:

        def pass_on() -> None:
            while told := line.recv(1):
                os.kill(program, told[0])
            os.kill(program, signal.SIGKILL)  # the client was killed

        threading.Thread(target=pass_on, daemon=True).start()
        line.sendall(b"%d\n" % os.waitpid(program, 0)[1])
        os._exit(0)
    line.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.executable = str(Path(path).with_name("python"))  # for the programs that it starts
    return words


def execute(words: list[str]) -> None:
    """Do what `python WORDS` does, for `-c CODE`, `-m MODULE`, a file, or a folder, after `-u`."""
    if words[0] == "-u":
        words = words[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)
    first, *rest = words
    before = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if first == "-c":
        sys.argv, sys.path[0:0] = ["-c", *rest[1:]], ["", *before]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv, sys.path[0:0] = rest, [str(Path.cwd()), *before]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        where = [] if Path(first).is_dir() else [str(Path(first).resolve().parent)]
        sys.argv, sys.path[0:0] = words, [*where, *before]
        runpy.run_path(first, run_name="__main__")


def finish(words: list[str]) -> None:
    """Execute the program, and end as the interpreter does, except that no modules are cleared.

    Clearing hundreds of them takes half a second, and no program that a test starts depends on it.
    """
    code: object = 0
    try:
        execute(words)
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            code = -signal.SIGINT
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)


if __name__ == "__main__":
    task, path, *words = sys.argv[1:]
    if task == "run":
        sys.exit(run(path, words))
    if (asked := serve(path)) is not None:
        finish(asked)
