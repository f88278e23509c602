"""Memory and time of `memvec cram` over a long text: short and long parts, one worker and more.

    python benchmarks/book.py --quick                      # of examples/harbour.txt
    python benchmarks/book.py --text book.txt --bytes 20000 320000
    python benchmarks/book.py --text book.txt --bytes 25000 250000 --tokens 8    # many passages
    python benchmarks/book.py --text book.txt --bytes 1000000 --workers 1 2      # memvec[ray]

Each part is crammed by the command in a process of its own, at the same number of slots, decoded,
and compared byte for byte. RESULT peak_ratio is the peak of the longest part over that of the
shortest; text_ratio how many times as long the text is. With --workers the longest part alone is
crammed, by so many Ray workers on this machine, and speedup is the time with the fewest workers
over that with the most; loading and starting the workers count (`seconds` has no other part).
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

from common import arguments, report, run
from memvec.vectors import MemVectors
from texts import PROSE


def crammed(text: bytes, options: argparse.Namespace, workers: int = 0) -> dict[str, Any]:
    """Cram and decode a text in separate processes; sizes, seconds and peak memory of cramming.

    The peak is that of the largest child process so far, so call this with texts of rising size.
    The memory of Ray's workers is not measured.
    """
    model = options.model
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "text.txt"), Path(folder, "text.mem")
        source.write_bytes(text)
        memvec = [sys.executable, "-c", "from memvec.cli import main; main()"]
        flags = ["--model", model, "--batch-size", str(options.batch_size), "--output", str(target)]
        flags += ["--max-bytes", str(len(text)), "--workers", str(workers)]
        flags += [] if options.tokens is None else ["--tokens", str(options.tokens)]
        began = time.perf_counter()
        subprocess.run([*memvec, "cram", str(source), *flags], check=True, capture_output=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        decode = [*memvec, "decode", str(target), "--model", model]
        decoded = subprocess.run(decode, check=True, capture_output=True).stdout
        mem = MemVectors.load(target)
    if decoded != text:
        raise SystemExit(f"{len(text)} bytes did not come back.")
    return {
        "bytes": len(text),
        "tokens": sum(p.tokens for p in mem.passages),
        "passages": len(mem.passages),
        "vector_bytes": mem.vectors.numel() * 4,
        "workers": workers,
        "seconds": seconds,
        "peak_mib": 0.0 if workers else peak / 1024,
    }


def main() -> None:
    """Parts from the start of the text, shortest first."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--text", type=Path, default=PROSE)
    parser.add_argument("--bytes", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--tokens", type=int, help="of each passage; default: as 'memvec cram' does"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[], help="Ray workers, rising")
    options = parser.parse_args()
    whole = options.text.read_text(encoding="utf-8")
    sizes = [1000, 4000] if options.quick else sorted(options.bytes)
    if options.workers:
        text = whole[: sizes[-1]].encode()
        rows = [crammed(text, options, workers) for workers in sorted(options.workers)]
        speedup = rows[0]["seconds"] / rows[-1]["seconds"]
        report("book", rows, options, speedup=speedup, workers=rows[-1]["workers"])
        return
    if len(sizes) < 2:
        parser.error("--bytes takes at least two sizes.")
    rows = [crammed(whole[:size].encode(), options) for size in sizes]
    first, last = rows[0], rows[-1]
    report(
        "book",
        rows,
        options,
        peak_ratio=last["peak_mib"] / first["peak_mib"],
        text_ratio=last["bytes"] / first["bytes"],
    )


if __name__ == "__main__":
    run(main)
