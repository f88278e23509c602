"""Read a request, check it, let an engine generate, write the answer.

python runners ENGINE REQUEST_FOLDER...   (in the engine's environment, which needs NumPy)

A request is a folder of `request.json` and one `prompt-0000.npy` (N, D) float32 for each prompt
with vectors; `answer.json` is written beside them. Nothing is given to the engine before every file
has the length and the hash that the request names: a request that was cut short is refused here,
and the engine is not even imported.

An engine is one file of this folder, with `version()` and a class `Engine(model, dtype, settings)`
whose `generate(prompts)` gives the greedy token ids after each prompt of a batch. Its settings are
those of the request and `longest`, the inputs and new tokens of the longest prompt. A file that
raises RequestError refuses in one sentence.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from asked import RequestError, read

REFUSED = 2  # exit code: the request is wrong, and the last line of stderr says how


def main(engine: str, folders: list[Path]) -> int:
    """Run requests, one after the other, up to the first that fails; the exit code."""
    for folder in folders:
        try:
            run(engine, folder)
        except RequestError as error:
            print(error, file=sys.stderr)
            return REFUSED
    return 0


def run(engine: str, folder: Path) -> None:
    """Run one request and write its answer. Raises RequestError as `read` and the engine do."""
    request, prompts = read(folder)
    module = importlib.import_module(engine)
    settings = {**request["settings"], "longest": max(prompt.length for prompt in prompts)}
    opened = module.Engine(request["model"], request["dtype"], settings)
    try:
        batches = [[prompts[i] for i in batch] for batch in request["batches"]]
        ids = [opened.generate(batch) for batch in batches]
    finally:
        if hasattr(opened, "close"):
            opened.close()
    aside = folder / "answer.json.part"
    aside.write_text(json.dumps({"version": module.version(), "ids": ids}), encoding="utf-8")
    aside.replace(folder / "answer.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]]))
