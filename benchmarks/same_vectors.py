"""Are the vectors of a cram bit for bit the same after a change of the code?

    python benchmarks/same_vectors.py --write before.json     # with the code before the change
    python benchmarks/same_vectors.py --against before.json   # with the code after it

Three short texts are crammed on one thread through the public API, with each of a fixed list of
models and recipes (a case). The vectors, steps, forward-backward tokens and exactness of a case are
hashed. A change that only moves code leaves every hash as it was. Hashes depend on the machine and
on the releases of torch and transformers: make both runs on one machine.

A line for each case has the first digits of its hash and the number of exact passages. RESULT
`same` is the number of cases whose hash is that of the file, `of` the number of all cases. The exit
code is 1 if a case differs. With --write alone nothing is compared, and all cases count as the
same. A run takes one to two minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import memvec

TEXTS = ["It was a bright cold day in April.", "The harbour lay still, and no boat moved.", "Yes."]
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "vocab_size": 2048,
    "pad_token_id": None,
}
SHORT = {"steps": 60, "patience": 60}
# name → (model, preset, changes of the recipe, options of memvec.cram)
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "pocket": ("pocket", "default", {}, {}),
    "pocket, no encoder": ("pocket", "default", {"start": "noise", **SHORT}, {}),
    "pocket, two vectors": ("pocket", "default", {}, {"vectors": 2}),
    "pocket, int8": ("pocket", "default", {}, {"storage": "int8"}),
    "pocket, bfloat16 storage": ("pocket", "default", {}, {"storage": "bfloat16"}),
    "pocket, corrections": ("pocket", "default", {"corrections": 2, "start": "noise", **SHORT}, {}),
    "pocket, first token": ("pocket", "default", {"start_rule": "first-token"}, {}),
    "pocket, bos": ("pocket", "default", {"start_rule": "bos"}, {}),
    "pocket, float32 steps": ("pocket", "default", {"compute": "model"}, {}),
    "pocket, paper": ("pocket", "paper", SHORT, {}),
    "pocket, progressive": ("pocket", "progressive", SHORT, {}),
    "pocket, temperature": ("pocket", "temperature", SHORT, {}),
    "pocket, low-dim": ("pocket", "low-dim", SHORT, {}),
    "pocket, margin": ("pocket", "margin", SHORT, {}),
    "pocket, one step": ("pocket", "one-step", SHORT, {"layout": "one-step", "tokens": 4}),
    "pocket, shared m": (
        "pocket",
        "one-step",
        {**SHORT, "lr": 0.1},
        {"layout": "one-step-shared", "tokens": 4},
    ),
    "llama": ("LlamaConfig", "default", SHORT, {"tokens": 6}),
    "gemma 2": ("Gemma2Config", "default", SHORT, {"tokens": 6}),
    "gpt-neox": ("GPTNeoXConfig", "default", SHORT, {"tokens": 6, "vectors": 2}),
    "mamba": ("MambaConfig", "default", SHORT, {"tokens": 6}),
}


def folder_of(config: str, parent: Path) -> Path:
    """A tiny random model of a family, saved with pocket's tokenizer."""
    torch.manual_seed(0)
    options = {k: v for k, v in TINY.items() if config != "MambaConfig" or "max_pos" not in k}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    folder = parent / config
    model.save_pretrained(folder)
    memvec.load_lm("pocket").tokenizer.save_pretrained(folder)
    return folder


def hashes(names: list[str]) -> dict[str, str]:
    """Case → hash of its vectors and of steps, forward-backward tokens and exactness."""
    digests, models = {}, {"pocket": memvec.load_lm("pocket")}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            model, preset, changes, options = CASES[name]
            if model not in models:
                models[model] = memvec.load_lm(str(folder_of(model, Path(temporary))))
            mem = memvec.cram(
                models[model],
                TEXTS,
                recipe=memvec.Recipe.of(preset, **changes),
                **{"tokens": 12, **options},
            )
            digest = hashlib.sha256(mem.vectors.contiguous().view(torch.uint8).numpy().tobytes())
            digest.update(
                str([(p.sha256, p.steps, p.spent, p.exact) for p in mem.passages]).encode()
            )
            digests[name] = digest.hexdigest()
            exact = sum(p.exact for p in mem.passages)
            print(f"{name}: {digests[name][:16]}, {exact} of {len(mem.passages)} exact", flush=True)
    return digests


def main() -> None:
    """Hash every case, and write the hashes or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="file to write the hashes to")
    parser.add_argument("--against", type=Path, help="file of hashes to compare with")
    arguments = parser.parse_args()
    if arguments.write is None and arguments.against is None:
        parser.error("give --write FILE, --against FILE, or both")
    # Read first: a file that cannot be read ends the program before the cases are crammed.
    before = None
    if arguments.against is not None:
        try:
            before = json.loads(arguments.against.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--against {arguments.against}: {error}; name a file of --write")
    torch.set_num_threads(1)
    digests = hashes(list(CASES))
    if arguments.write is not None:
        arguments.write.write_text(json.dumps(digests, indent=1) + "\n")
    before = digests if before is None else before
    different = [name for name, value in digests.items() if before.get(name) != value]
    for name in different:
        print(f"differs: {name}")
    print(f"RESULT same={len(digests) - len(different)} of={len(digests)}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
