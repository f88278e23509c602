"""Read a request, check it, let an engine generate, write the answer.

python runners ENGINE REQUEST_FOLDER      (in the engine's environment, which needs NumPy)

A request is a folder of `request.json` and one `prompt-0000.npy` (N, D) float32 for each prompt;
`answer.json` is written beside them. Nothing is given to the engine before every file has the
length and the hash that the request names: a request that was cut short is refused here.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

REFUSED = 2  # exit code: the request is wrong, and the last line of stderr says how


class RequestError(Exception):
    """A request that no engine should see, in one sentence."""


def read(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The request and its prompts, (N, D) float32 arrays. Raises RequestError if it is damaged."""
    try:
        request: dict[str, Any] = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        files = request["prompts"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RequestError(f"{folder} holds no whole request.json: write it again.") from None
    prompts = []
    for file in files:
        path = folder / file["file"]
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise RequestError(f"{file['file']} of the request is missing, cut short or changed.")
        prompt = np.load(path, allow_pickle=False)
        if prompt.ndim != 2 or not len(prompt) or prompt.shape[1] != request["width"]:
            raise RequestError(
                f"{file['file']} has the shape {prompt.shape} and the model takes vectors of "
                f"{request['width']}."
            )
        prompts.append(prompt)
    return request, prompts


def main(engine: str, folder: Path) -> int:
    """Run one request; the exit code."""
    try:
        request, prompts = read(folder)
    except RequestError as error:
        print(error, file=sys.stderr)
        return REFUSED
    module = importlib.import_module(engine)
    lengths = [file["new_tokens"] for file in request["prompts"]]
    opened = module.Engine(request["model"], request["dtype"], request["settings"])
    batch = request["batch"]
    ids: list[list[int]] = []
    for at in range(0, len(prompts), batch):
        ids += opened.generate(prompts[at : at + batch], lengths[at : at + batch])
    answer = {"version": module.version(), "ids": ids}
    aside = folder / "answer.json.part"
    aside.write_text(json.dumps(answer), encoding="utf-8")
    aside.replace(folder / "answer.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
