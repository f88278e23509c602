"""`memvec decode`: the text that was crammed, byte for byte."""

from __future__ import annotations

import sys

from memvec.cli import options
from memvec.cli.common import ModelChoice, open_file
from memvec.errors import MemvecError

EXAMPLES = options.examples("memvec decode letter.mem", "memvec decode letter.mem > letter.txt")


def decode(
    file: options.VectorFile,
    model: options.ModelOfFile = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOfFile = None,
    load: options.Load = None,
    force: options.ForceWeights = False,
) -> None:
    """Write the crammed bytes to standard output; if they are not exact, only an error."""
    if sys.stdout is None:
        raise MemvecError("standard output is closed: there is nowhere to write the text.")
    from memvec.cli.progress import decoding_progress
    from memvec.workers import decode_passages

    mem, lm = open_file(file, ModelChoice.of(model, revision, device, dtype, load))
    with decoding_progress(str(file)) as show:
        decoded = decode_passages(lm, mem, force=force, on_share=show)
    for data in mem.restored(lm, mem.checked(decoded)):
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
