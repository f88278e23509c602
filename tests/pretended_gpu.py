"""A simulated GPU: the tensors of the devices 'gpu:0' and 'gpu:1' are computed on the CPU.

An operation on tensors of two devices raises torch's error. The program counts every operation that
waits for a real GPU, with the line that asked for it: reading a number, a result whose shape
depends on numbers, a copy between devices. So a machine without a GPU runs the code for one.

    python tests/pretended_gpu.py                # JSON with all parts
    python tests/pretended_gpu.py cram mixed     # JSON with these

A part that raises has its traceback as a string instead.

Tests start it as a process of its own, because torch takes one such backend for a whole process.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import recorder

aten = torch.ops.aten
READING = recorder.WAITS - {aten.lift_fresh.default}  # a number, or a shape that depends on some
INDEXING = recorder.BY_INDEX | {aten._index_put_impl_.default}
COPYING = {aten._to_copy.default, aten.copy_.default}
# On CUDA these raise under torch.use_deterministic_algorithms(True), or go through MAGMA.
UNFIT = {aten.median.dim, aten.nanmedian.dim, aten.kthvalue.default, aten.cholesky_solve.default}
WAITS: collections.Counter[str] = collections.Counter()
watched = contextvars.ContextVar("watched", default=False)  # whether waits are counted now


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Within, waits are counted in WAITS, which begins empty."""
    WAITS.clear()
    token = watched.set(True)
    try:
        yield
    finally:
        watched.reset(token)


class Backend(backend_registration._DummyBackendModule):
    def device_count(self) -> int:
        return 2


class Hook(backend_registration._DummyPrivateUse1Hook):
    def device_count(self) -> int:
        return 2


class Guard(backend_registration._DummyDeviceGuard):
    def device_count(self) -> int:
        return 2

    deviceCount = device_count  # noqa: N815 (torch calls either)


def wait(what: str) -> None:
    """Count a wait under the lines that asked for it: the last of memvec, and the last of all."""
    if not watched.get():
        return
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
    asking = [f for f in frames if f.filename != __file__] or frames
    ours = [f for f in asking if "/memvec/" in f.filename] or asking
    lines = dict.fromkeys(f"{f.filename.split('/')[-1]}: {f.line}" for f in (ours[-1], asking[-1]))
    WAITS[f"{what} in {' -> '.join(lines)}"] += 1


class Pretended(torch.Tensor):
    """A tensor whose device is `place`; its numbers are in `raw`, on the CPU."""

    raw: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, raw: torch.Tensor, place: torch.device) -> Pretended:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=place,
        )
        self.raw, self.place = raw.detach(), place
        return self

    def __repr__(self) -> str:
        return f"Pretended({self.place}, {tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        wait("tolist")
        return self.raw.tolist()

    def numpy(self, *_: Any) -> Any:
        raise TypeError("can't convert a tensor of a GPU to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def mapped(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The value with `change` of every tensor in its tuples and lists."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(change, part) for part in value)
    return value


def opened(value: Any, leaves: list[torch.Tensor]) -> Any:
    """The value with the numbers in the place of pretended tensors; `leaves` gets all tensors."""
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return value.raw if isinstance(value, Pretended) else value
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([opened(part, leaves) for part in value])
    if kind is dict:
        return {name: opened(part, leaves) for name, part in value.items()}
    return value


def place_of(tensor: torch.Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, Pretended) else tensor.device


def numbered(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device("gpu", device.index or 0) if device.type == "gpu" else device


@functools.cache
def traits(func: Any) -> tuple[bool, bool, bool, bool]:
    """Whether it copies between devices, makes a GPU wait, takes indices, and returns memory of an
    argument (a view, or an argument that is written): one look instead of one in each set."""
    shares = any(argument.alias_info is not None for argument in func._schema.arguments)
    return func in COPYING, func in READING or func in UNFIT, func in INDEXING, shares


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation on the CPU; raise where a GPU raises, and count where it waits."""
    copies, waits, takes_indices, shares = traits(func)
    leaves: list[torch.Tensor] = []
    raw_args, raw_kwargs = opened(args, leaves), opened(kwargs, leaves)
    pretended = [t for t in leaves if isinstance(t, Pretended)]
    here = [t for t in leaves if not isinstance(t, Pretended) and t.dim() > 0]
    target = kwargs.get("device")
    target = numbered(target) if target is not None else None
    if target is not None and target.type == "gpu":
        raw_kwargs = raw_kwargs | {"device": torch.device("cpu")}
    if "pin_memory" in raw_kwargs:
        raw_kwargs = raw_kwargs | {"pin_memory": False}
    places = {t.place for t in pretended}
    if copies:
        source, goal = args[1 if func is aten.copy_.default else 0], target or place_of(args[0])
        if numbered(place_of(source)) != numbered(goal):
            wait(f"a copy between devices of {source.dtype}")
    elif len(places) > 1 or (pretended and here and not takes_indices):
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} of {places} "
            f"and {len(here)} tensors on the CPU"
        )
    elif pretended and here:
        wait("an index from the CPU")
    if pretended and waits:
        wait(func.__name__)
    if (
        pretended
        and takes_indices
        and any(index is not None and index.dtype == torch.bool for index in args[1])
    ):
        wait("an index of truth values")
    out = func(*raw_args, **raw_kwargs)
    place = target or (next(iter(places)) if places else torch.device("cpu"))
    if copies and target is None:
        place = place_of(args[0])
    if place.type != "gpu":
        return out
    out = mapped(lambda t: Pretended(t, place), out)
    if not pretended or not shares:
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


class Mode(TorchDispatchMode):
    """Within, `device="gpu:0"` makes pretended tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is aten.lift_fresh.default else compute(func, args, kwargs or {})


def moved(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """The module with its parameters and buffers on a pretended device."""
    place = torch.device(device)

    def there(tensor: torch.Tensor) -> Pretended:
        return Pretended(
            (tensor.raw if isinstance(tensor, Pretended) else tensor.data).clone(), place
        )

    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(there(parameter), requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = there(buffer)
    return module


def begin() -> None:
    """Register the devices with torch; torch.tensor makes a number on the CPU and copies it."""
    backend_registration._setup_privateuseone_for_python_backend(
        "gpu", backend_module=Backend(), hook=Hook(), device_guard=Guard()
    )
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        made = make(data, **options)
        return made if device is None else made.to(device)

    torch.tensor = tensor


def cram() -> dict[str, Any]:
    """For each recipe the waits of four steps between polls, and the outcomes of a whole run."""
    from conftest import build, passages
    from memvec.cramming.engine import Engine
    from memvec.cramming.recipe import Recipe
    from memvec.model.lm import FrozenLM

    prefix: dict[str, Any] = {"start_rule": "bos", "lr": 0.3, "lr_large": 0.0, "optimizer": "nadam"}
    query: dict[str, Any] = {"query_count": 3, "query_tokens": 6, "teacher_top": 8, "settle": 12}
    recipes = {
        "default": Recipe(),
        "margin": Recipe(objective="margin", start_rule="bos", front="bos"),
        "deficit": Recipe(objective="deficit", start_rule="first-token", corrections=1),
        "usable": Recipe.of("usable", **query),
        "prefix": Recipe(space="prefix", **prefix),
        "low-dim": Recipe(coordinates="low-dim", dimensions=4),
        "alignment": Recipe(term="alignment", align_layers=2),
        "prefix-layer": Recipe(space="prefix-layer", layer=1, **prefix),
        "shared-basis": Recipe(space="shared-basis", dimensions=8),
        "whitened": Recipe(coordinates="whitened"),
        "geometric": Recipe(schedule="geometric", start="embeddings"),
    }
    said: dict[str, Any] = {}
    with Mode():
        model = moved(build("llama").to(torch.bfloat16), "gpu:0")
        model.set_attn_implementation("eager")
        lm = FrozenLM(model, name="pretended")
        for name, recipe in recipes.items():
            recipe = replace(recipe, steps=6, margin=1000.0)  # no passage is done before
            engine = Engine(lm, recipe, vectors=2, batch_size=2, storage="bfloat16")
            for passage in passages(6, 5):
                engine.push(passage)
            engine.fill(2)
            engine.step()
            with watching():
                for _ in range(4):
                    engine.step()
            waits = dict(WAITS)
            few = replace(recipe, steps=1)
            run = Engine(lm, few, vectors=2, batch_size=2, storage="int8")
            outcomes = list(run.run(passages(3, 2, 3)))
            said[name] = {"waits": waits, "outcomes": len(outcomes)}
    return said


def train() -> dict[str, Any]:
    """The type of encoder that each training makes, with and without the model's own encoder."""
    from conftest import build
    from memvec.cramming.recipe import Recipe
    from memvec.encoders import training_run
    from memvec.encoders.adapted_training import AdaptedPlan, AdaptedTraining
    from memvec.encoders.measure import compare
    from memvec.encoders.recurrent_measure import compare_segments
    from memvec.encoders.recurrent_training import RecurrentPlan, RecurrentTraining
    from memvec.encoders.summary import SummaryEncoder
    from memvec.encoders.training import SlotsPlan, Training
    from memvec.encoders.usable_training import UsablePlan, UsableTraining
    from memvec.lab.sentences.cutting import Sentence
    from memvec.lab.sentences.plan import LatentPlan
    from memvec.lab.sentences.training import LatentTraining
    from memvec.model.lm import FrozenLM
    from trainings import stream

    options: dict[str, Any] = {"steps": 2, "slots": 2, "positions": 64}
    network: dict[str, Any] = {"hidden": 16, "heads": 2, "layers": 1}
    adapters: dict[str, Any] = {"rank": 2, "shortest": 2, "longest": 4}
    chain: dict[str, Any] = {"segments": 2, "lags": 2, "segment_tokens": 4}
    training_run.GRID = (1, 4)  # lengths at which an encoder is measured: fewer and shorter ones
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # for Module.to
    with Mode():
        model = moved(build("llama", num_hidden_layers=1), "gpu:0")
        model.set_attn_implementation("eager")
        lm = FrozenLM(model, name="pretended")
        text, D = stream(lm), lm.width
        own = SummaryEncoder(torch.ones(1, D), torch.eye(D), torch.zeros(D))
        own = own.to(lm.device, lm.dtype)
        runs: dict[str, Callable[[], Any]] = {
            "slots": lambda: Training(lm, text, SlotsPlan(**options, **network)),
            "adapted": lambda: AdaptedTraining(lm, text, AdaptedPlan(**options, **adapters)),
            "usable": lambda: UsableTraining(
                lm, text, UsablePlan(**options, **adapters, query_tokens=4)
            ),
            "recurrent": lambda: RecurrentTraining(
                lm, text, RecurrentPlan(**options, **network, **chain)
            ),
        }
        made = {}
        for name, run in runs.items():
            for encoder in (None, own):
                lm.encoder = encoder
                made[name] = run().run()
        ids, few = text[:16].view(2, 8), Recipe(steps=2)
        for lm.encoder in (made["slots"], made["adapted"], made["recurrent"]):
            compare(lm, ids, [4], few)
        compare_segments(lm, ids, 2, recipe=few)
        lm.encoder = own
        sentences = [Sentence(tuple(row)) for row in text[:60].view(12, 5).tolist()]
        plan = LatentPlan(
            steps=2, vectors=2, max_tokens=8, window=3, batch=2, loss="both", **network
        )
        made["latents"] = LatentTraining(lm, [sentences], plan).run()
        return {name: type(thing).__name__ for name, thing in made.items()}


def split() -> dict[str, Any]:
    """A model whose second half and untied head accelerate has put on a second device."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    from conftest import build
    from memvec.model.lm import FrozenLM

    with Mode():
        model: Any = build("llama").to(torch.bfloat16)
        model.set_attn_implementation("eager")
        half = len(model.model.layers) // 2
        places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
        places |= {f"model.layers.{i}": int(i >= half) for i in range(len(model.model.layers))}
        devices = {name: torch.device("gpu", place) for name, place in places.items()}
        for name, device in devices.items():
            moved(model.get_submodule(name), str(device))
        attach_align_device_hook_on_blocks(
            model,
            execution_device=devices | {"": torch.device("gpu", 0)},
            offload=dict.fromkeys(devices, False),
        )
        lm = FrozenLM(model, name="split", check=False)  # no gradients on a second one
        ids = torch.zeros(1, 5, dtype=torch.long, device="gpu:0")
        with torch.no_grad():
            states = lm.states(torch.zeros(1, 1, lm.width, device="gpu:0"), ids)
            with watching():
                logits = lm.head(states)
        crossed = sorted({what.split(" in ")[0].split(".")[-1] for what in WAITS})
        shape, head = list(states.shape), lm.has_split_head
        assert logits.dtype == torch.float32
        return {"head": head, "states": shape, "device": str(lm.device), "crossed": crossed}


def mixed() -> dict[str, Any]:
    """The operations on two devices that raise, and the waits of reading one number."""
    with Mode():
        row = torch.ones(3, device="gpu:0")
        refused = []
        for other in (torch.ones(3, device="gpu:1"), torch.ones(3)):
            try:
                row + other
            except RuntimeError as error:
                refused.append(str(error).split(":")[0])
        with watching():
            total = float((row * 2).sum())
        return {"refused": refused, "total": total, "waits": sum(WAITS.values())}


PARTS = {
    "mixed": mixed,  # an operation on tensors of two devices
    "cram": cram,  # waits of each recipe
    "split": split,  # a model on two devices
    "train": train,  # what every kind of training makes
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    begin()
    said: dict[str, Any] = {}
    for name in sys.argv[1:] or PARTS:
        try:
            said[name] = PARTS[name]()
        except Exception:
            said[name] = traceback.format_exc()
    print(json.dumps(said))
