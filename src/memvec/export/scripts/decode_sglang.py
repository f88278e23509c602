"""Decode the passages of this folder with a server of SGLang, greedily.

    python -m sglang.launch_server --model-path MODEL --dtype bfloat16 --disable-radix-cache
    python decode.py http://localhost:30000

Prints one list of token ids for each passage, and ends with 3 if one does not have the hash of what
was crammed.
"""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from passages import decode


def after(path: Path, passage: dict[str, Any]) -> list[int]:
    """The new tokens that the server answers a request body with."""
    request = urllib.request.Request(
        f"{sys.argv[1].rstrip('/')}/generate",
        path.read_bytes(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            ids: list[int] = json.load(answer)["output_ids"]
    except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{sys.argv[1]} did not answer as a server of SGLang does: {error!r}.")
    return ids


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith(("http://", "https://")):
        sys.exit("name the server's address: python decode.py http://localhost:30000")
    sys.exit(decode(after))
