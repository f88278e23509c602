"""docs/models.md, written by a run of the family tests from their results.

    pytest tests/test_families.py --models docs/models.md

A test of a property over families is marked `@shows(COLUMN, FAMILIES)`, which parametrises it and
enters its families into `CLAIMS`. The page is made from these entries. With the option it is
written only after a run in which every entry passed. `test_the_page_says_what_is_tested` fails if
a family has no row, or if a 'yes' has no test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
CLAIMS: dict[str, list[str]] = {}  # column -> families that its test covers

# family -> the common name of its models
KNOWN_AS = {
    "bloom": "BLOOM (ALiBi)",
    "cohere": "Command R (logits scaled)",
    "falcon": "Falcon",
    "falcon-alibi": "Falcon-RW (ALiBi)",
    "falcon-h1": "Falcon-H1 (attention and Mamba-2)",
    "gemma": "Gemma",
    "gemma2": "Gemma 2 (soft caps, sliding windows)",
    "gemma3": "Gemma 3 (sliding windows)",
    "gemma4": "Gemma 4 (heads of two sizes, sliding windows)",
    "gpt-neo": "GPT-Neo (local attention)",
    "gpt-neox": "GPT-NeoX, Pythia",
    "gpt2": "GPT-2",
    "granite": "Granite (embeddings, residuals and logits scaled)",
    "jamba": "Jamba (attention, Mamba, experts)",
    "llama": "Llama 1-3, Sheared-LLaMA, SmolLM2",
    "llama3.2": "Llama 3.2 (tied head, scaled RoPE)",
    "mamba": "Mamba",
    "mamba2": "Mamba-2",
    "mistral": "Mistral (sliding window)",
    "mixtral": "Mixtral (mixture of experts)",
    "mpt": "MPT (ALiBi)",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "opt": "OPT",
    "opt-projected": "OPT-350m (inputs are projected)",
    "phi": "Phi-1, Phi-2",
    "phi3": "Phi-3, Phi-4",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3-moe": "Qwen3-MoE",
    "rwkv": "RWKV-4",
    "smollm3": "SmolLM3 (layers without positions)",
    "stablelm": "StableLM",
    "openai-gpt": "GPT",
    "gptj": "GPT-J",
    "gpt-bigcode": "StarCoder",
    "cohere2": "Command R7B",
    "deepseek-v3": "DeepSeek-V3 (latent attention, experts)",
    "gpt-oss": "gpt-oss (attention sinks, experts)",
    "olmoe": "OLMoE",
    "glm4": "GLM-4",
    "nemotron": "Nemotron",
    "recurrent-gemma": "RecurrentGemma",
    "ernie4.5": "Ernie 4.5",
    "exaone4": "EXAONE 4",
    "helium": "Helium",
    "lfm2": "LFM2 (convolutions and attention)",
    "seed-oss": "Seed-OSS",
    "arcee": "Arcee",
    "olmo3": "OLMo 3",
    "glm4-moe": "GLM-4-MoE",
    "bitnet": "BitNet",
    "hunyuan": "HunYuan",
    "nemotron-h": "Nemotron-H (attention and Mamba-2)",
    "persimmon": "Persimmon",
    "diffllama": "DiffLlama",
    "starcoder2": "StarCoder 2",
    "apertus": "Apertus",
    "doge": "Doge",
    "minimax": "MiniMax (linear attention, experts)",
    "qwen3-next": "Qwen3-Next (linear attention, experts)",
    "qwen3-next-linear": "Qwen3-Next without a layer of full attention",
    "xlstm": "xLSTM",
    "xglm": "XGLM",
    "vaultgemma": "VaultGemma",
    "xlm": "XLM",
    "reformer": "Reformer",
}

HEAD = """# Models

Written by `pytest tests/test_families.py --models docs/models.md` from the results of its tests.
Each row is a tiny model of the family with random weights, built from the family's own
configuration; a *yes* is a property that a test asserts for it. Weights do not matter to these
properties, code does; `memvec doctor --model NAME` repeats the checks on the model itself.

| column | what was asserted |
|---|---|
| doctor | every check of `memvec doctor` holds, in float32 and bfloat16, and its round trip |
| file | crammed, saved, reloaded and decoded exactly, with each of the three start rules |
| batch | a passage crams alone as it does beside others |
| cache | decoding with the model's cache gives the tokens that decoding without it gives |
| grid | every certified vector decodes exactly: float32 and bfloat16 models; batches of 1, 7, 32; \
with the cache and without; stored in float32, bfloat16, float16, int8, int4 |
"""


NO_CACHE = """These are decoded without a cache, so that each token repeats the whole forward.
`memvec doctor`, a line at load and the certificate say so:
"""

RANDOM_WEIGHTS = """How much a tiny random model holds depends on its weights, not on its family. Of
8 passages of 4 tokens in one vector, with three seeds of the weights that the tests use, Llama
gives back 8, 8, 8, XGLM 7, 5, 7, VaultGemma 8, 8, 8, Gemma 2 1, 0, 1. With linear weights of half
that size (two seeds) XGLM gives back 2 and 0, VaultGemma 0 and 0, Llama 7 and 8, Gemma 2 1 and 4.
So few passages that come back from random weights say nothing about a family: the properties above
are asserted with two vectors and short passages."""


def shows(column: str, families: Iterable[str]) -> Callable[[Any], Any]:
    """Mark a test as the one behind a column of the page, for these families."""
    CLAIMS[column] = sorted(families)

    def mark(test: Any) -> Any:
        return pytest.mark.shows(column)(pytest.mark.parametrize("family", CLAIMS[column])(test))

    return mark


def page(
    refused: dict[str, str], without: dict[str, str], since: dict[str, tuple[str, str]]
) -> str:
    """The whole page.

    `refused` holds the error for each family that memvec refuses, `without` the reason why a family
    is decoded without a cache, `since` the first release of transformers for a family, and why.
    """
    columns = list(CLAIMS)
    families = sorted({f for covered in CLAIMS.values() for f in covered})
    lines = [
        HEAD,
        f"| family | models | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for family in families:
        cells = ["yes" if family in CLAIMS[column] else "–" for column in columns]
        lines.append(f"| {family} | {KNOWN_AS[family]} | {' | '.join(cells)} |")
    also = ", ".join(
        sorted(KNOWN_AS[f] for f in KNOWN_AS if f not in families and f not in refused)
    )
    lines += ["", f"A shorter test (file and cache) covers: {also}.", "", NO_CACHE]
    lines += [f"- **{f}** ({KNOWN_AS[f]}): {why}." for f, why in sorted(without.items())]
    lines += ["", "Refused at load:", ""]
    lines += [f"- **{f}** ({KNOWN_AS[f]}): {said}" for f, said in sorted(refused.items())]
    lines += [
        f"- **{f}** ({KNOWN_AS[f]}): before transformers {release}, where {why}."
        for f, (release, why) in sorted(since.items())
    ]
    lines += ["", RANDOM_WEIGHTS]
    return "\n".join(lines) + "\n"


class Writer:
    """Writes the page at the end of a run in which every claim was tested and true."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: set[tuple[str, str]] = set()
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect the claims that were true; xdist's workers send their reports here, too."""
        # This test compares the old page, so it may fail in the run that writes the new one.
        self.failed |= report.failed and not report.nodeid.endswith("the_page_says_what_is_tested")
        if report.when == "call" and report.passed:
            self.held |= {value for name, value in report.user_properties if name == "shows"}

    def pytest_sessionfinish(self) -> None:
        """Write the page, or raise an error that names claims without a passed test."""
        from test_families import models_page

        claimed = {(column, f) for column, covered in CLAIMS.items() for f in covered}
        if self.failed or claimed - {tuple(pair) for pair in self.held}:
            missing = sorted(claimed - {tuple(pair) for pair in self.held})
            raise pytest.UsageError(f"{self.path} is not written: not shown {missing[:5]}")
        self.path.write_text(models_page(), encoding="utf-8")
