r"""`memvec use`: a prompt after the \[mem] vectors of a text, and what the model writes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from memvec.cli import options
from memvec.cli.common import ModelChoice, check_seed, open_file
from memvec.errors import MemvecError, check_minimum
from memvec.writing import pretty_json

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.usable.generate import Context
    from memvec.vectors import MemVectors

EXAMPLES = options.examples(
    'memvec use usable.mem --prompt "The next morning"',
    'memvec use usable.mem more.mem --prompt "She said" --compare',
)

Files = Annotated[
    list[str], typer.Argument(help="Files of usable vectors; they stand one after the other.")
]
Prompt = Annotated[
    str, typer.Option("--prompt", "-p", help="What follows the vectors; - for standard input.")
]
Passage = Annotated[
    list[int] | None,
    typer.Option("--passage", help="Only this passage of the file (from 0); may be repeated."),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", help="Maximum number of tokens to write.")
]
Sample = Annotated[
    bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")
]
Temperature = Annotated[
    float | None, typer.Option(help="Temperature of sampling; implies --sample.")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Share of probability of nucleus sampling; implies --sample."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of sampling; implies --sample.")]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Show what is written after the vectors, the text and nothing; --json has all three.",
    ),
]


def use(
    files: Files,
    prompt: Prompt,
    model: options.ModelOfFile = None,
    passage: Passage = None,
    max_new_tokens: NewTokens = 128,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    compare: Compare = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOfFile = None,
    load: options.Load = None,
    force: options.ForceWeights = False,
    json: options.Json = False,
) -> None:
    """Continue a prompt after the vectors of a text, which stand for the text as context."""
    from memvec.usable.certificate import check_usable
    from memvec.vectors import MemVectors

    check_seed(seed)
    settings = _settings(max_new_tokens, sample or seed is not None, temperature, top_p)
    choice = ModelChoice.of(model, revision, device, dtype, load)
    settings |= {"force": force, "passages": passage}
    prompt_text = _text(prompt)
    first, lm = open_file(files[0], choice)
    mems = [first, *(MemVectors.load(file) for file in files[1:])]
    for file, mem in zip(files, mems, strict=True):
        check_usable(mem, f"the vectors in {file}" if len(files) > 1 else "these vectors")
    if passage and len(mems) > 1:
        raise MemvecError("--passage picks from one file: name a single FILE with it.")
    if json or compare:
        _show_all(lm, mems, prompt_text, seed, settings, json)
    else:
        _stream(lm, mems, prompt_text, seed, settings)


def _settings(
    new_tokens: int, sample: bool, temperature: float | None, top_p: float | None
) -> dict[str, Any]:
    """Settings of the model's `generate`. Raises MemvecError for values out of range."""
    check_minimum(1, max_new_tokens=new_tokens)
    if temperature is not None and not 1e-3 <= temperature <= 1e3:
        raise MemvecError(f"--temperature must be from 0.001 to 1000, not {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise MemvecError(f"--top-p must be in (0, 1], not {top_p}.")
    given = {"temperature": temperature, "top_p": top_p}
    drawn = {name: value for name, value in given.items() if value is not None}
    return {"max_new_tokens": new_tokens, "do_sample": sample or bool(drawn), **drawn}


def _text(prompt: str) -> str:
    """The prompt, or what standard input has. Raises MemvecError if it is not UTF-8."""
    if prompt == "-" and sys.stdin is None:
        raise MemvecError("standard input is closed: give the prompt itself.")
    # What is not UTF-8 in the command line comes as surrogates.
    try:
        data = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
        return data.decode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise MemvecError(f"the prompt is not UTF-8 (byte {error.start}): convert it.") from None


def _seed(seed: int | None) -> None:
    import torch

    if seed is not None:
        torch.manual_seed(seed)


def _stream(
    lm: FrozenLM,
    mems: list[MemVectors],
    prompt: str,
    seed: int | None,
    settings: dict[str, Any],
) -> None:
    """Print the answer as it is written."""
    from transformers import TextStreamer

    from memvec.usable.generate import use as write

    _seed(seed)
    streamer = TextStreamer(lm.tokenizer, skip_special_tokens=True)
    write(lm, mems, prompt, streamer=streamer, **settings)


def _show_all(
    lm: FrozenLM,
    mems: list[MemVectors],
    prompt: str,
    seed: int | None,
    settings: dict[str, Any],
    json: bool,
) -> None:
    """Print the answers after the vectors, the text and nothing, one below the other."""
    from memvec.cli.use_tables import show_answers
    from memvec.usable import generate

    contexts: tuple[Context, ...] = get_args(generate.Context)
    answers: dict[str, str] = {}
    for context in contexts:
        _seed(seed)
        answers[context] = generate.use(lm, mems, prompt, context=context, **settings)
    if json:
        typer.echo(pretty_json({"prompt": prompt, **answers}))
    else:
        show_answers(answers)
