"""Ten thousand damaged files: each ends in a sentence or in the right text.

Two kinds. Damage from outside (bits, bytes, lengths, truncation) meets the digest; a forger who
writes a new digest meets the checks of every field. Both are made in memory from one good file with
a fixed seed, and read through a file, as a person would. Nothing may hang or take a gigabyte: a
damaged file cannot make the reader allocate what it does not itself contain.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import QUICK, reader
from memvec import codec
from memvec.errors import MemvecError
from memvec.vectors import MemVectors

TEXT = "the fox"
OUTSIDE, FORGED = 9000, 1100
LIES: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1,
        2,
        2**31,
        2**63,
        10**30,
        0.5,
        1e308,
        "",
        "x",
        "[b]",
        "\x1b[2J",
        "é" * 99,
    ),
    *([], {}, [[]], [None], [0, 1, "x"], {"a": 1}, [[[]]], [1] * 50, float("inf"), float("nan")),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """The bytes of a small file."""
    mem = codec.cram(reader(), [TEXT], vectors=2, tokens=2, recipe=QUICK)
    assert mem.exact
    return mem.save(tmp_path_factory.mktemp("fuzz") / "good.mem").read_bytes()


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The safetensors header and the numbers after it."""
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def joined(header: dict[str, Any], numbers: bytes) -> bytes:
    """A file again."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def damaged(good: bytes, count: int) -> Iterator[bytes]:
    """Damage from outside: what disks, networks and editors do, and lies about lengths."""
    chance = random.Random(0)
    header, numbers = parts(good)
    lengths = [0, 1, 7, len(good), 2**31 - 1, 2**32, 2**62, 2**63, 2**64 - 1]
    for i in range(count):
        data, at, n = bytearray(good), chance.randrange(len(good)), chance.randrange(1, 64)
        match i % 10:
            case 0 | 1 | 2:
                data[at] ^= 1 << chance.randrange(8)
            case 3:
                data[at : at + n] = chance.randbytes(len(data[at : at + n]))
            case 4:
                del data[at : at + n]
            case 5:
                data[at:at] = chance.randbytes(n)
            case 6:
                del data[at:]
            case 7:
                lie = chance.choice(lengths) if i % 20 == 7 else chance.randrange(2 * len(good))
                data[:8] = struct.pack("<Q", lie)
            case 8:  # the tensor's own description
                lied = json.loads(json.dumps(header))
                what = chance.choice(["dtype", "shape", "data_offsets"])
                lied["vectors"][what] = chance.choice(
                    ["F64", "I8", "BF16", "F16", *LIES, [10**9, 10**9, 64], [0, 2**62], [-4, 4]]
                )
                data = bytearray(joined(lied, numbers))
            case 9:  # two pieces change places
                other = chance.randrange(len(good))
                data[at : at + n], data[other : other + n] = (
                    good[other : other + n],
                    good[at : at + n],
                )
        yield bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a header."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def forged(good: bytes, count: int) -> Iterator[bytes]:
    """One or two fields of the JSON header changed, added or left out, under a right digest."""
    chance = random.Random(1)
    header, numbers = parts(good)
    told = header["__metadata__"]["memvec"]
    for _ in range(count):
        lied = json.loads(told)
        for _ in range(chance.choice((1, 1, 2))):
            container, key = chance.choice(list(places(lied)))
            if chance.random() < 0.1 and isinstance(container, dict):
                del container[key]
            elif chance.random() < 0.1 and isinstance(container, list):
                container.append(container[key])
            elif isinstance(container[key], int) and chance.random() < 0.5:
                container[key] += chance.choice((-1, 1, 2, 1000))
            else:
                container[key] = chance.choice(LIES)
        text = json.dumps(lied)
        said = f"vectors torch.float32 {header['vectors']['shape']}"
        digest = hashlib.sha256((text + said).encode() + numbers).hexdigest()
        meta = {"__metadata__": {"memvec": text, "sha256": digest}, "vectors": header["vectors"]}
        yield joined(meta, numbers)


def read(data: bytes, path: Path) -> str:
    """What a person gets: 'refused', 'right', or what must not be."""
    path.unlink(missing_ok=True)  # else ext4 flushes each file to the disk
    path.write_bytes(data)
    try:
        mem = MemVectors.load(path)
        mem.summary()
        # Another model's name is no damage; and wrong weights would be refused by the fingerprint.
        texts = codec.decode(reader(), mem)
    except MemvecError as error:
        told = str(error)
        return "refused" if len(told.splitlines()) == 1 else f"not a sentence: {told}"
    return "right" if texts == [TEXT] else f"wrong: {texts}"


@pytest.mark.slow
def test_ten_thousand_damaged_files(good, tmp_path, untyped):
    path = tmp_path / "a.mem"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read(good, path) == "right"
    outside = Counter(read(data, path) for data in damaged(good, OUTSIDE) if data != good)
    assert set(outside) == {"refused"}
    assert outside["refused"] > 0.99 * OUTSIDE
    inside = Counter(read(data, path) for data in forged(good, FORGED))
    assert set(inside) == {"refused", "right"}
    assert inside.total() == FORGED
    assert inside["refused"] > FORGED / 4
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"reading took {grown} KiB"
