"""Ten thousand damaged files: reading each one raises a MemvecError or gives the right text.

There are two kinds. Random damage (bits, bytes, lengths, truncation) must fail the digest. Changed
fields under a correct digest must fail the checks of each field, or change nothing that matters.
Both kinds are made with a fixed seed from one good file, and are read from a file. Reading must not
take a gigabyte: a damaged file cannot make the reader allocate more than it contains.
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
DAMAGED, FORGED = 9000, 1100
WRONG_VALUES: list[Any] = [
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
    """The bytes of a safetensors file, from its header and its numbers."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def damaged(good: bytes, count: int) -> Iterator[bytes]:
    """Damage by disks, networks and editors, and wrong lengths, shapes and dtypes."""
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
                length = chance.choice(lengths) if i % 20 == 7 else chance.randrange(2 * len(good))
                data[:8] = struct.pack("<Q", length)
            case 8:  # the tensor's own description
                changed = json.loads(json.dumps(header))
                what = chance.choice(["dtype", "shape", "data_offsets"])
                changed["vectors"][what] = chance.choice(
                    [
                        "F64",
                        "I8",
                        "BF16",
                        "F16",
                        *WRONG_VALUES,
                        [10**9, 10**9, 64],
                        [0, 2**62],
                        [-4, 4],
                    ]
                )
                data = bytearray(joined(changed, numbers))
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
    """One or two fields of the JSON header changed, added or left out, with a correct digest."""
    chance = random.Random(1)
    header, numbers = parts(good)
    stored = header["__metadata__"]["memvec"]
    for _ in range(count):
        changed = json.loads(stored)
        for _ in range(chance.choice((1, 1, 2))):
            container, key = chance.choice(list(places(changed)))
            if chance.random() < 0.1 and isinstance(container, dict):
                del container[key]
            elif chance.random() < 0.1 and isinstance(container, list):
                container.append(container[key])
            elif isinstance(container[key], int) and chance.random() < 0.5:
                container[key] += chance.choice((-1, 1, 2, 1000))
            else:
                container[key] = chance.choice(WRONG_VALUES)
        text = json.dumps(changed)
        described = f"vectors torch.float32 {header['vectors']['shape']}"
        digest = hashlib.sha256((text + described).encode() + numbers).hexdigest()
        meta = {"__metadata__": {"memvec": text, "sha256": digest}, "vectors": header["vectors"]}
        yield joined(meta, numbers)


def read(data: bytes, path: Path) -> str:
    """'refused', 'right', or a description of any other result, which is an error."""
    path.unlink(missing_ok=True)  # otherwise ext4 flushes each file to the disk
    path.write_bytes(data)
    try:
        mem = MemVectors.load(path)
        mem.summary()
        # Another name of the model is no error; the fingerprint refuses other weights.
        texts = codec.decode(reader(), mem)
    except MemvecError as error:
        message = str(error)
        return "refused" if len(message.splitlines()) == 1 else f"not a sentence: {message}"
    return "right" if texts == [TEXT] else f"wrong: {texts}"


@pytest.mark.slow
def test_ten_thousand_damaged_files_are_refused_or_read_right(good, tmp_path, untyped):
    path = tmp_path / "a.mem"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read(good, path) == "right"
    outside = Counter(read(data, path) for data in damaged(good, DAMAGED) if data != good)
    assert set(outside) == {"refused"}
    assert outside["refused"] > 0.99 * DAMAGED
    inside = Counter(read(data, path) for data in forged(good, FORGED))
    assert set(inside) == {"refused", "right"}
    assert inside.total() == FORGED
    assert inside["refused"] > FORGED / 4
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"reading took {grown} KiB"
