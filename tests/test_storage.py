"""Storages: rounding and packing, exactness as stored, counted bytes, and damaged files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from conftest import QUICK, passages, reader, tiny
from memvec import codec
from memvec.cramming.coordinates import as_stored
from memvec.cramming.engine import Engine
from memvec.decoding import decode_ids
from memvec.errors import MemvecError, NotExactError
from memvec.storage import STORAGES, storage_of
from memvec.vectors import MemVectors
from memvec.vectors_file import digest_of

PACKED = ["int8", "int4"]
TEXT = "the cat sat on the lazy dog"


def noise(*shape: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---------------------------------------------------------------------- rounding and packing


@pytest.mark.parametrize("size", [1e-38, 1e-4, 1.0, 1e4, 1e36])
@pytest.mark.parametrize("D", [1, 2, 7, 64])
@pytest.mark.parametrize("name", STORAGES)
def test_rounding_is_idempotent_and_packing_is_lossless(name, D, size):
    storage, vectors = STORAGES[name], noise(5, 3, D, size=min(size, 1e4 if "16" in name else size))
    vectors[0, 0] = 0
    rounded = storage.rounded(vectors)
    assert torch.equal(storage.rounded(rounded), rounded)
    tensors = storage.pack(rounded)
    again = storage.unpack(tensors)
    assert again.dtype == storage.dtype
    assert torch.equal(again.float().view(torch.int32), (rounded + 0.0).view(torch.int32)) or (
        storage.packing is None and torch.equal(again.float(), rounded)
    )
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == storage.size(15, D)


@pytest.mark.parametrize("name", PACKED)
def test_codes_are_the_nearest_ones(name):
    """The reference is a search over all codes."""
    storage, vectors = STORAGES[name], noise(2, 3, 9)
    scale = (vectors.abs().amax(-1, keepdim=True) / storage.largest).bfloat16().float()
    codes = torch.arange(-storage.largest, storage.largest + 1.0)
    distance = (vectors[..., None] - codes * scale[..., None]).abs()
    assert torch.equal(storage.rounded(vectors), codes[distance.argmin(-1)] * scale)
    largest = storage.pack(vectors)["codes"]
    if name == "int8":
        assert (largest.abs().amax(-1) == 127).all()


def test_two_four_bit_codes_share_a_byte():
    tensors = STORAGES["int4"].pack(torch.tensor([[[-7.0, 3.0, 0.0]]]))
    assert tensors["codes"].tolist() == [[[1 | 11 << 4, 8]]]
    assert tensors["scales"].tolist() == [[1.0]]


@pytest.mark.parametrize("name", STORAGES)
def test_rounding_keeps_numbers_that_are_not_finite(name):
    """Otherwise vectors that diverged could be called exact."""
    for bad in (torch.nan, torch.inf):
        vectors = noise(1, 2, 4)
        vectors[0, 1, 2] = bad
        rounded = STORAGES[name].rounded(vectors)
        assert torch.isfinite(rounded[0, 0]).all()
        assert not torch.isfinite(rounded[0, 1]).all()


@pytest.mark.parametrize("name", PACKED)
def test_rounding_to_integers_lets_gradients_through(name):
    vectors = noise(2, 1, 8).requires_grad_()
    stored = as_stored(vectors, STORAGES[name])
    (gradient,) = torch.autograd.grad((stored * torch.arange(8.0)).sum(), vectors)
    assert torch.equal(gradient, torch.arange(8.0).expand(2, 1, 8))


def test_a_storage_is_found_by_its_name_or_dtype():
    assert storage_of(torch.bfloat16) is storage_of("bfloat16") is STORAGES["bfloat16"]
    with pytest.raises(MemvecError, match=r"unknown storage 'int2': did you mean 'int"):
        storage_of("int2")
    with pytest.raises(MemvecError, match="unknown storage 'int64'"):
        storage_of(torch.int64)


# ---------------------------------------------------------------------- exact as stored


@pytest.mark.slow
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("name", STORAGES)
def test_passages_are_exact_in_every_storage_with_and_without_cache_and_batch(name, K, tmp_path):
    """Seven passages are read from the file and decoded one by one and together."""
    lm = reader("words")
    asked = ["the cat sat", "Fox", "lazy dog", "on the mat", "dog and cat", "mat mat", "quick fox"]
    mem = codec.cram(lm, asked, vectors=K, tokens=3, recipe=QUICK, storage=name)
    assert mem.exact
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert torch.equal(again.vectors, mem.vectors)
    assert again.header == mem.header
    assert codec.decode(lm, again) == asked
    truth = again.tokens(lm)
    lengths = [p.tokens for p in again.passages]
    for cached in (True, False):
        for batch in (1, 7):
            options = {"batch": batch, "cached": cached}
            assert decode_ids(lm, again.vectors.float(), lengths, **options) == truth


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_returned_vectors_are_rounded_and_have_the_required_margin(family, name):
    lm, storage = tiny(family), STORAGES[name]
    for o in Engine(lm, QUICK, vectors=2, batch_size=2, storage=name).run(passages(2, 3)):
        assert o.exact
        assert o.vectors.dtype == torch.float32
        assert torch.equal(storage.rounded(o.vectors), o.vectors)
        assert o.metrics.margin >= o.margin_asked - 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_a_passage_that_is_too_long_for_its_storage_is_halved(name):
    recipe = replace(QUICK, steps=60, patience=30)
    mem = codec.cram(reader(), [TEXT[:30]], tokens=16, recipe=recipe, storage=name)
    assert mem.exact
    assert len(mem.passages) > -(-len(reader().tokenize(TEXT[:30])) // 16)
    assert codec.decode(reader(), mem) == [TEXT[:30]]


# ---------------------------------------------------------------------- the file


@pytest.fixture(scope="module", params=PACKED)
def mem(request) -> MemVectors:
    return codec.cram(reader(), [TEXT], vectors=2, tokens=3, recipe=QUICK, storage=request.param)


def test_packed_bytes_and_scales_are_counted(mem, tmp_path):
    P, K, D = mem.vectors.shape
    bits = 8 if mem.storage.name == "int8" else 4
    s = mem.summary()
    assert s["vector_bytes"] == mem.size == P * K * (D * bits // 8 + 2)
    assert s["storage"] == mem.storage.name
    assert s["bit_utilisation"] == pytest.approx(s["information_gain_bits"] / (8 * mem.size))
    tensors = load_file(mem.save(tmp_path / "a.mem"))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == mem.size


def forged(mem: MemVectors, path, change, *, old_digest: bool = False):
    """Write a file with changed tensors; with `old_digest` it has the digest of the others."""
    tensors, header = mem.storage.pack(mem.vectors), mem.header.model_dump_json()
    true = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors = change(tensors)
    digest = digest_of(header, true if old_digest else tensors)
    path.write_bytes(to_safetensors(tensors, {"memvec": header, "sha256": digest}))
    return path


def scaled(factor):
    return lambda t: t | {"scales": t["scales"] * factor}


def test_a_changed_scale_is_refused_or_does_not_decode(mem, tmp_path):
    with pytest.raises(MemvecError, match="was changed after it was written"):
        MemVectors.load(forged(mem, tmp_path / "a.mem", scaled(4), old_digest=True))
    wrong = MemVectors.load(forged(mem, tmp_path / "b.mem", scaled(2**-40)))
    with pytest.raises(NotExactError):
        wrong.tokens(reader())
    assert MemVectors.load(forged(mem, tmp_path / "c.mem", scaled(1))).tokens(reader())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_scale_of_minus_0_is_refused(kind):
    """It gives the same numbers as 0, so two files of the same vectors would differ."""
    tensors = STORAGES[kind].pack(torch.zeros(1, 2, 4))
    assert not STORAGES[kind].unpack(tensors).any()
    with pytest.raises(ValueError, match="does not make"):
        STORAGES[kind].unpack(tensors | {"scales": -tensors["scales"]})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (scaled(-1), "does not make"),
        (scaled(0), "does not make"),
        (scaled(torch.nan), "does not make"),
        (scaled(torch.inf), "does not make"),
        (lambda t: t | {"scales": t["scales"].float()}, "which memvec does not write"),
        (lambda t: t | {"codes": t["codes"].float()}, "which memvec does not write"),
        (lambda t: t | {"scales": t["scales"][:, :1].contiguous()}, "it is damaged"),
        (lambda t: t | {"scales": t["scales"].flatten()}, "it is damaged"),
        (lambda t: t | {"codes": t["codes"][:-1].contiguous()}, "it is damaged"),
        (lambda t: t | {"codes": t["codes"][:, :, :0].contiguous()}, "it is damaged"),
        (lambda t: t | {"codes": t["codes"][0].contiguous()}, "it is damaged"),
        (lambda t: t | {"codes": torch.zeros_like(t["codes"])}, "does not make"),
        (lambda t: t | {"codes": torch.full_like(t["codes"], 128 if _four(t) else -128)}, "make"),
    ],
)
def test_tensors_that_memvec_does_not_write_are_refused(mem, tmp_path, change, sentence):
    with pytest.raises(MemvecError, match=sentence) as refused:
        MemVectors.load(forged(mem, tmp_path / "a.mem", change))
    assert "\n" not in str(refused.value)


def _four(tensors) -> bool:
    return tensors["codes"].dtype == torch.uint8


def test_tensors_that_contradict_the_packing_of_the_header_are_refused(mem, tmp_path):
    with pytest.raises(MemvecError, match="not one of memvec's"):
        MemVectors.load(forged(mem, tmp_path / "a.mem", lambda t: {"codes": t["codes"]}))
    header = mem.header.model_copy(update={"packing": None}).model_dump_json()
    tensors, path = mem.storage.pack(mem.vectors), tmp_path / "b.mem"
    path.write_bytes(to_safetensors(tensors, {"memvec": header, "sha256": ""}))
    with pytest.raises(MemvecError, match="claims the packing None"):
        MemVectors.load(path)
    with pytest.raises(MemvecError, match="are not rounded to"):
        MemVectors(mem.vectors * 1.01 + 0.003, mem.header)


@pytest.mark.parametrize("D", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_the_size_of_vectors_is_that_of_their_tensors(name, D):
    """With an odd number of four-bit codes, half a byte of each vector is unused."""
    storage = storage_of(name)
    packed = storage.pack(torch.randn(3, 2, D, generator=torch.Generator().manual_seed(0)))
    assert storage.size(3 * 2, D) == sum(t.numel() * t.itemsize for t in packed.values())
