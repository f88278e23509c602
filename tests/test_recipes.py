"""The recipes' own model is the one that transformers loads; plans of small models are complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

# What torch imports for its compiler is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FOLDER = Path(__file__).parent.parent / "recipes"


@pytest.fixture(autouse=True)
def recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    torch.compiler.set_stance("force_eager")  # a compiler is for training, not for a test
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize(("norm", "family"), [("before", "llama"), ("after", "olmo2")])
def test_what_is_trained_is_what_transformers_computes(norm, family):
    from decoder import Decoder, Shape

    small = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64}
    shape = Shape(vocab_size=50, num_hidden_layers=3, norm=norm, **small)
    torch.manual_seed(0)
    ours = Decoder(shape)
    for weight in ours.parameters():
        if weight.dim() == 1:  # gains that are all 1 would hide a norm in the wrong place
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    theirs = AutoModelForCausalLM.from_config(shape.config()).float()
    assert theirs.config.model_type == family
    theirs.load_state_dict({**ours.state_dict(), "lm_head.weight": ours.embedding})
    x = torch.randn(2, 9, 48)
    torch.testing.assert_close(theirs.base_model(inputs_embeds=x)[0], ours(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_every_small_model_can_be_made_and_trained():
    """Its configuration is one, and both of its losses reach every parameter."""
    import shapes

    plans = shapes.read(FOLDER / "shapes.toml")
    assert len(plans) > 20
    done = set()
    for plan in plans.values():
        kind = (plan.family, *plan.config.values(), plan.memory_from < 1)
        if kind in done:
            continue
        done.add(kind)
        trained = shapes.Trained(plan)
        ids = torch.randint(2, 2048, (2, 12))
        loss, right = trained.memory_loss(ids, 0.04, torch.Generator().manual_seed(0))
        (loss + trained.text_loss(ids)).backward()
        assert all(p.grad is not None for p in trained.parameters())
        assert 0 <= right <= 1
