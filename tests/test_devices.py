"""The code for a GPU, tested on a CPU with a simulated device (tests/pretended_gpu.py)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch takes no pretended device",
    ),
]
# Waits that transformers causes. Each forward pass looks for packed sequences and makes an empty
# cache of each layer on the CPU; a graph of steps does neither (memvec.graphs). The oldest release
# that is allowed also makes the value of eager attention's masks on the CPU.
OF_TRANSFORMERS = (
    "packed_sequence_mask",
    "torch.tensor([]",
    "masking_utils.py: mask = torch.where(mask, torch.tensor(",
)


@pytest.fixture(scope="module")
def said_by(python: str) -> Callable[[str], dict[str, Any]]:
    """What a part of the program said as JSON. One process runs all of them."""
    program = Path(__file__).with_name("pretended_gpu.py")
    parts = ["mixed", "cram", "train"]
    parts += ["split"] * (importlib.util.find_spec("accelerate") is not None)
    ran = subprocess.run(
        [python, program, *parts], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = json.loads(ran.stdout)

    def get(part: str) -> dict[str, Any]:
        assert isinstance(said[part], dict), said[part]
        return said[part]

    return get


def test_the_simulated_gpu_refuses_tensors_of_two_devices_and_counts_waits(said_by):
    said = said_by("mixed")
    assert said["refused"] == ["Expected all tensors to be on the same device"] * 2
    assert said["total"] == 6.0
    assert said["waits"] == 1


def test_no_recipe_makes_a_gpu_wait_between_polls(said_by):
    """From the first step to the certificate, no operation has tensors of two devices, and none
    calls a kernel that CUDA refuses under deterministic algorithms or that MAGMA computes."""
    for name, said in said_by("cram").items():
        ours = [w for w in said["waits"] if not any(words in w for words in OF_TRANSFORMERS)]
        assert ours == [], name
        assert said["outcomes"] == 3, name


def test_every_training_runs_and_its_encoder_is_measured_on_a_gpu(said_by):
    """A training may start from the model's own encoder, which is on the GPU already."""
    assert said_by("train") == {
        "slots": "SlotEncoder",
        "adapted": "AdaptedEncoder",
        "usable": "UsableEncoder",
        "recurrent": "RecurrentEncoder",
        "latents": "LatentModel",
    }


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_an_untied_head_on_another_gpu_is_computed_apart_from_the_model(said_by):
    """With the head inside the model, a step would keep the logits of every position. Logits that
    come from the other GPU have the model's dtype, not float32."""
    expected = {"head": True, "states": [1, 5, 32], "device": "gpu:0", "crossed": ["bfloat16"]}
    assert said_by("split") == expected
