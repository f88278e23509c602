"""Memory and time of `memvec cram` for short and long parts of a text, and for several workers.

    python benchmarks/book.py --quick                      # of examples/harbour.txt
    python benchmarks/book.py --text book.txt --bytes 20000 320000
    python benchmarks/book.py --text book.txt --bytes 25000 250000 --tokens 8    # many passages
    python benchmarks/book.py --text book.txt --bytes 1000000 --workers 1 2      # memvec[ray]

Each part begins at the start of the text. The command crams and decodes it in processes of its own,
with the same number of slots for every part, and the decoded text is compared byte for byte. The
table has a row for each part: bytes of text, tokens, passages, bytes of the vectors, seconds of
cramming (wall clock, loading included) and the peak memory of the process (`peak_mib`, MiB).

RESULT `peak_ratio` is the peak memory of the longest part divided by that of the shortest, and
`text_ratio` is how many times as long the text is. With --workers only the longest part is crammed,
once for each number of Ray workers on this machine: `speedup` is the seconds with the fewest
workers divided by those with the most, with the start of the workers and the loading of their
models. The memory of workers is not measured.

`--quick` crams 1000 and 4000 bytes.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, report
from memvec.cli.program import run_program
from memvec.errors import MemvecError
from memvec.vectors import MemVectors
from texts import PROSE


def crammed(text: bytes, options: argparse.Namespace, workers: int = 0) -> dict[str, Any]:
    """Cram and decode a text in separate processes; sizes, seconds and peak memory of cramming.

    The peak is that of the largest child process so far, so call this with texts of rising size.
    The memory of Ray's workers is not measured. Raises MemvecError if the text does not come back.
    """
    model = options.model
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "text.txt"), Path(folder, "text.mem")
        source.write_bytes(text)
        memvec = [sys.executable, "-c", "from memvec.cli import main; main()"]
        options_of_cram = [
            "--model",
            model,
            "--batch-size",
            str(options.batch_size),
            "--output",
            str(target),
        ]
        options_of_cram += ["--max-bytes", str(len(text)), "--workers", str(workers)]
        options_of_cram += [] if options.tokens is None else ["--tokens", str(options.tokens)]
        start = time.perf_counter()
        _output([*memvec, "cram", str(source), *options_of_cram])
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        decoded = _output([*memvec, "decode", str(target), "--model", model])
        mem = MemVectors.load(target)
    if decoded != text:
        raise MemvecError(f"{len(text)} bytes of text did not come back from their vectors.")
    return {
        "bytes": len(text),
        "tokens": sum(p.tokens for p in mem.passages),
        "passages": len(mem.passages),
        "vector_bytes": mem.vectors.numel() * 4,
        "workers": workers,
        "seconds": seconds,
        "peak_mib": 0.0 if workers else peak / 1024,
    }


def _output(command: list[str]) -> bytes:
    """What a command of memvec prints; a MemvecError with its last line if it fails."""
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise MemvecError(lines[-1].removeprefix("memvec: "))
    return done.stdout


def main() -> None:
    """Cram the parts, the shortest first, or the longest part with each number of workers."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--text", type=Path, default=PROSE, help="file of UTF-8 text")
    parser.add_argument(
        "--bytes",
        type=int,
        nargs="+",
        default=[2000, 10_000],
        help="length of each part, in characters of the text (bytes, if it is ASCII)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="slots of a batch")
    parser.add_argument(
        "--tokens", type=int, help="of each passage; default: as 'memvec cram' does"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[], help="numbers of Ray workers")
    options = parser.parse_args()
    try:
        full_text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MemvecError(f"--text {options.text}: {error}; name a file of UTF-8 text.") from None
    sizes = [1000, 4000] if options.quick else sorted(options.bytes)
    if len(full_text) < sizes[-1]:
        raise MemvecError(
            f"--text {options.text} has {len(full_text)} characters, fewer than {sizes[-1]}: "
            "name a longer text, or lower --bytes."
        )
    if options.workers:
        text = full_text[: sizes[-1]].encode()
        rows = [crammed(text, options, workers) for workers in sorted(options.workers)]
        speedup = rows[0]["seconds"] / rows[-1]["seconds"]
        report("book", rows, options, speedup=speedup, workers=rows[-1]["workers"])
        return
    if len(sizes) < 2:
        parser.error("--bytes takes at least two sizes.")
    rows = [crammed(full_text[:size].encode(), options) for size in sizes]
    first, last = rows[0], rows[-1]
    report(
        "book",
        rows,
        options,
        peak_ratio=last["peak_mib"] / first["peak_mib"],
        text_ratio=last["bytes"] / first["bytes"],
    )


if __name__ == "__main__":
    run_program(main)
