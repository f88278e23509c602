"""The library's sentences in the words of the command line: its arguments become options.

The library calls an argument by its Python name, in two forms only: `NAME must be ...` at the
beginning of a sentence, and `NAME=VALUE` anywhere. All its other words suit both kinds of readers.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any

RENAMED = {"examples": "fewshot", "weight": "use-weight"}  # options with a name of their own
WRITTEN = {
    "checkpointing=True": "--load checkpointing",
    "device_map='auto'": "--load device_map=auto",
    "encoder=FILE": "--encoder FILE",
    "encoding='latin-1'": "--encoding latin-1",
    "examples=N": "--fewshot N",
    "force=True": "--force",
    "largest=BYTES": "--max-bytes BYTES",
    "model=FILE": "--engine-model FILE",
    "model=FOLDER": "--engine-model FOLDER",
    "offload=True": "--load offload",
    "quantize='4bit'": "--load quantize=4bit",
    "split=TEXT": "--split TEXT",
}
ARGUMENT = re.compile(rf"(?<![\w'])({'|'.join(map(re.escape, WRITTEN))})(?![\w'])")


def option_of(argument: str) -> str:
    """The option of an argument: 'batch_size' is --batch-size."""
    return "--" + RENAMED.get(argument, argument).replace("_", "-")


def options_of(command: Any) -> Iterator[str]:
    """The options of a command and of the verbs in it."""
    yield from (option for parameter in command.params for option in parameter.opts)
    for verb in getattr(command, "commands", {}).values():
        yield from options_of(verb)


def as_options(sentence: str, options: Container[str]) -> str:
    """The sentence with options in the place of arguments; `options` are those that there are."""
    sentence = ARGUMENT.sub(lambda found: WRITTEN[found[1]], sentence)
    name, must, rest = sentence.partition(" must be ")
    is_option = bool(must) and option_of(name) in options
    return f"{option_of(name)}{must}{rest}" if is_option else sentence
