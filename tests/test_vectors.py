"""The file of vectors: everything is read again, no text is in it, and any damage is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from safetensors.torch import save_file

import memvec
from conftest import QUICK, reader, tiny
from memvec import codec
from memvec.cli import display
from memvec.cli.use_tables import stored_use
from memvec.errors import MemvecError, NotExactError
from memvec.vectors import MemVectors
from memvec.vectors_file import digest_of, existing_path
from memvec.writing import pretty_json

TEXTS = ["the fox\r\n", "Zürich 👍"]
SPACE = {"name": "shared-basis", "numbers": 32, "options": {"dimensions": 32, "seed": 0}}


@pytest.fixture(scope="module")
def mem() -> MemVectors:
    """Two texts in a tiny model."""
    return codec.cram(reader(), TEXTS, vectors=2, tokens=2, recipe=QUICK)


@pytest.fixture(scope="module")
def good(mem, tmp_path_factory) -> bytes:
    """The bytes of its file."""
    return mem.save(tmp_path_factory.mktemp("mem") / "good.mem").read_bytes()


def forged(mem: MemVectors, path: Path, vectors: torch.Tensor | None = None, **changes) -> Path:
    """A file with changed vectors or header fields and a correct digest."""
    header = json.loads(mem.header.model_dump_json())
    for where, value in changes.items():
        at, *keys = where.split("__")
        target, key = header, at
        for k in keys:
            target, key = target[key], int(k) if k.isdigit() else k
        target[key] = value
    text = json.dumps(header)
    vectors = mem.vectors if vectors is None else vectors
    tensors = {"vectors": vectors}
    path.write_bytes(to_safetensors(tensors, {"memvec": text, "sha256": digest_of(text, tensors)}))
    return path


# ---------------------------------------------------------------------- round trip


def test_a_loaded_file_equals_the_saved_vectors(mem, tmp_path):
    assert mem.exact
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert torch.equal(again.vectors, mem.vectors)
    assert again.header == mem.header
    assert pretty_json(again.summary()) == pretty_json(mem.summary())
    assert again.documents(reader()) == [text.encode() for text in TEXTS]
    assert codec.decode(reader(), again) == TEXTS
    assert repr(again) == f"<MemVectors of shape (P, K, D) = {tuple(mem.vectors.shape)}>"


def test_figures_that_are_not_finite_are_read_again(mem, tmp_path):
    """A passage whose loss was not finite has such figures; the header stays valid JSON."""
    sick = mem.passages[0].model_copy(update={"margin": math.nan, "mem_bits": math.inf})
    header = mem.header.model_copy(update={"passages": [sick, *mem.passages[1:]]})
    file = MemVectors(mem.vectors, header).save(tmp_path / "a.mem")
    (first, *others) = MemVectors.load(file).passages
    assert math.isnan(first.margin)
    assert first.mem_bits == math.inf
    assert others == mem.passages[1:]
    with safe_open(file, framework="pt") as opened:
        json.loads(opened.metadata()["memvec"], parse_constant=pytest.fail)


def test_the_digest_covers_the_dtype_and_the_shape(mem, tmp_path):
    """The file has the same bytes with another dtype and shape."""
    file = tmp_path / "a.mem"
    other = mem.vectors.view(torch.bfloat16)
    metadata = {"memvec": mem.header.model_dump_json()}
    metadata["sha256"] = digest_of(metadata["memvec"], {"vectors": mem.vectors})
    file.write_bytes(to_safetensors({"vectors": other}, metadata))
    with pytest.raises(MemvecError, match="digest does not match"):
        MemVectors.load(file)


def test_the_digest_covers_the_header_and_names_shapes_types_and_bytes():
    """The name counts: soft tokens in front of vectors are not the same ones after them."""
    rows = torch.ones(2, 3)
    tensors = [
        {"trigger": rows},
        {"front": rows},
        {"trigger": rows, "front": rows},
        {"trigger": rows.T},
        {"trigger": rows.int()},
        {"trigger": -rows},
    ]
    found = {digest_of(header, given) for header in ("", "{}") for given in tensors}
    assert len(found) == 2 * len(tensors)
    turned = {"front": rows, "trigger": -rows}
    assert digest_of("", turned) == digest_of("", dict(reversed(turned.items())))


def test_the_digest_covers_a_dtype_of_the_same_size(mem, tmp_path):
    file, stored = tmp_path / "a.mem", mem.vectors.bfloat16()
    metadata = {"memvec": mem.header.model_dump_json()}
    metadata["sha256"] = digest_of(metadata["memvec"], {"vectors": stored})
    file.write_bytes(to_safetensors({"vectors": stored.view(torch.float16)}, metadata))
    with pytest.raises(MemvecError, match="digest does not match"):
        MemVectors.load(file)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_permissions_of_a_file_follow_the_umask(mem, tmp_path, umask):
    before = os.umask(umask)
    try:
        file = mem.save(tmp_path / "a.mem")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_text_is_not_in_the_file_without_keep_text(tmp_path):
    lm, text = reader(), "the lazy dog sat"
    options = {"vectors": 2, "tokens": 2, "recipe": QUICK}
    without = codec.cram(lm, [text], **options).save(tmp_path / "a").read_bytes()
    within = codec.cram(lm, [text], keep_text=True, **options).save(tmp_path / "b").read_bytes()
    assert text.encode() in within
    for word in text.encode().split():
        assert word not in without or word == b"the"  # 'other' of the header contains it
    ids = lm.tokenize(text)
    assert json.dumps(ids)[1:-1].encode() not in without
    assert MemVectors.load(tmp_path / "b").header.documents[0].text == text


def test_the_summary_has_the_sums_and_ratios_of_the_passages(mem):
    s, P = mem.summary(), len(mem.passages)
    K, D = mem.vectors.shape[1:]
    gain = sum(p.lm_bits - p.mem_bits for p in mem.passages)
    assert s["information_gain_bits"] == pytest.approx(gain)
    assert s["bits_per_vector"] == pytest.approx(gain / (P * K))
    assert s["bits_per_dimension"] == pytest.approx(gain / (P * K * D))
    assert s["bit_utilisation"] == pytest.approx(gain / (P * K * D * 32))
    assert s["theoretical_capacity"] == pytest.approx(K * D * 32 / math.log2(reader().vocab_size))
    assert s["token_utilisation"] == pytest.approx(
        s["token_gain"] / (P * s["theoretical_capacity"])
    )
    assert s["tokens_per_vector"] == pytest.approx(s["tokens"] / (P * K))
    assert s["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert s["vector_bytes"] == P * K * D * 4 == mem.size


def test_the_summary_combines_passages_that_differ(mem):
    """It has sums, the smallest margin, and hits divided by the predicted tokens."""
    first, *others = mem.passages
    odd = {"exact": False, "margin": -3.0, "tokens": 9, "predicted": 8, "accuracy": 0.25}
    passages = [first.model_copy(update=odd | {"seconds": 2.0, "steps": 7, "spent": 70})]
    passages += [p.model_copy(update={"seconds": 1.0, "steps": 1, "spent": 10}) for p in others]
    n, tokens = len(others), sum(p.predicted for p in others)
    s = MemVectors(mem.vectors, mem.header.model_copy(update={"passages": passages})).summary()
    assert (s["exact"], s["exact_passages"], s["margin"]) == (False, n, -3.0)
    assert (s["seconds"], s["steps"], s["spent"]) == (2.0 + n, 7 + n, 70 + 10 * n)
    assert s["accuracy"] == pytest.approx((2 + tokens) / (8 + tokens))


def test_edits_count_their_text_and_eight_bytes_each(mem):
    edits = [(0, 1, "é"), (4, 4, "👍 cat")]
    first, *others = mem.header.documents
    documents = [first.model_copy(update={"edits": edits}), *others]
    edited = MemVectors(mem.vectors, mem.header.model_copy(update={"documents": documents}))
    assert mem.summary()["edit_bytes"] == 0
    assert edited.summary()["edit_bytes"] == 2 * 8 + len("é👍 cat".encode())


def test_numbers_that_are_not_finite_are_null_in_json():
    assert json.loads(pretty_json({"a": [math.nan, 1.5], "b": (math.inf,)})) == {
        "a": [None, 1.5],
        "b": [None],
    }


def test_the_short_name_finds_the_file(mem, tmp_path):
    saved = mem.save(tmp_path / "letter.mem.safetensors")
    assert existing_path(tmp_path / "letter.mem") == saved
    assert MemVectors.load(tmp_path / "letter.mem").exact
    with pytest.raises(MemvecError, match="there is no file"):
        existing_path(tmp_path / "other.mem")
    with pytest.raises(MemvecError, match="is a directory"):
        existing_path(tmp_path)
    whole = mem.save(tmp_path / "letter.mem")  # a file of exactly this name comes first
    assert existing_path(tmp_path / "letter.mem") == whole


# ---------------------------------------------------------------------- written whole or not


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.open"])
@pytest.mark.parametrize("before", [None, b"an older file"])
def test_a_write_that_fails_leaves_the_old_file_or_none(mem, tmp_path, monkeypatch, call, before):
    target = tmp_path / "a.mem"
    if before is not None:
        target.write_bytes(before)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(MemvecError, match=r"cannot be written: No space left on device\.$"):
            mem.save(target, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["a.mem"])
    assert before is None or target.read_bytes() == before


def test_vectors_with_fewer_rows_than_passages_are_not_written(mem, tmp_path):
    """Such a file could not be read again."""
    cut = MemVectors(mem.vectors, mem.header)
    cut.vectors = cut.vectors[:-1]
    for reason in ("changed after they were certified", "is not written"):
        with pytest.raises(MemvecError, match=reason):
            cut.save(tmp_path / "a.mem")
        cut.header = cut.header.model_copy(update={"certificate": None})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten_without_force(mem, tmp_path):
    target = tmp_path / "a.mem"
    target.write_bytes(b"mine")
    with pytest.raises(MemvecError, match="use force=True"):
        mem.save(target)
    assert target.read_bytes() == b"mine"
    mem.save(target, force=True)
    assert MemVectors.load(target).exact
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------------- damage


def refused(data: bytes, path: Path) -> str:
    """The sentence with which a file is refused; fails for any other exception or none."""
    path.write_bytes(data)
    with pytest.raises(MemvecError) as error:
        MemVectors.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_truncated_file_is_refused_wherever_it_ends(good, tmp_path):
    ends = {0, 1, 7, 8, 9, len(good) - 1, *range(0, len(good), len(good) // 60)}
    assert all(refused(good[:end], tmp_path / "a.mem") for end in ends if end < len(good))


@pytest.mark.parametrize("seed", range(300))
def test_a_changed_file_is_refused(good, tmp_path, seed):
    """A bit is flipped, bytes are replaced, deleted or inserted, or the header's length changes."""
    random_ = random.Random(seed)
    data, at = bytearray(good), random_.randrange(len(good))
    n = random_.randrange(1, 9)
    match seed % 6:
        case 0 | 1:
            data[at] ^= 1 << random_.randrange(8)
        case 2:
            data[at : at + n] = random_.randbytes(len(data[at : at + n]))
        case 3:
            del data[at : at + n]
        case 4:
            data[at:at] = random_.randbytes(n)
        case 5:
            data[:8] = random_.randrange(2**64).to_bytes(8, "little")
    if bytes(data) != good:
        refused(bytes(data), tmp_path / "a.mem")


def test_foreign_files_are_refused(tmp_path, mem, good):
    path = tmp_path / "a.mem"
    assert "truncated" in refused(b"", path)
    refused(b"not a file of vectors at all, but long enough to have a header", path)
    refused(b"\x80\x04\x95 pickle", path)
    refused(bytes(8), path)
    refused((2**63).to_bytes(8, "little") + good[8:], path)  # a header of eight exabytes
    save_file({"vectors": torch.zeros(1, 1, 2)}, path)
    with pytest.raises(MemvecError, match="not one of memvec's"):
        MemVectors.load(path)
    save_file({"x": torch.zeros(1)}, path, {"memvec": mem.header.model_dump_json()})
    with pytest.raises(MemvecError, match="not one of memvec's"):
        MemVectors.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"format": "other"},
        {"surprise": 1},
        {"start_rule": "middle"},
        {"passages": []},
        {"documents": []},
        {"documents__0__passages": 99},
        {"documents__0__size": 0},
        {"documents__0__sha256": "short"},
        {"documents__0__edits": [[0, 1]]},
        {"passages__0__tokens": 0},
        {"passages__0__tokens": 10**7},
        {"passages__0__tokens": "many"},
        {"passages__0__status": "fine"},
        {"passages__0__seconds": -1},
        {"model": "llama"},
        {"model": {}},
        {"model__probe": ["x"]},
        {"model__probe": 3},
        {"model__probe": None},
        {"model__weights": 7},
        {"model__vocabulary": 1},
        {"model__vocabulary": "many"},
        {"model__name": None},
        {"recipe": None},
        {"layout": "one-step", "start_rule": "bos"},
        {"layout": "one-step", "space": SPACE},
        {"layout": "one-step", "front": "bos"},
        {"front": "bos", "space": SPACE},
        {"soft_front": 1, "soft_trigger": 1, "start_rule": "bos", "space": SPACE},
        {"soft_trigger": 1},
        {"soft_trigger": 1, "start_rule": "bos", "trigger": 3},
        {"soft_front": 1, "start_rule": "bos"},
    ],
    ids=str,
)
def test_a_header_with_wrong_fields_is_refused(mem, tmp_path, changes):
    with pytest.raises(MemvecError, match="damaged header"):
        MemVectors.load(forged(mem, tmp_path / "a.mem", **changes))


@pytest.mark.parametrize(
    ("rule", "front", "around"), [("vectors", "none", 0), ("bos", "none", 1), ("bos", "bos", 2)]
)
def test_a_passage_that_is_longer_than_the_context_is_not_decoded(mem, rule, front, around):
    """Inputs around the vectors count; the last token is not read, and so does not."""
    lm, (first, *others) = reader(), mem.passages
    fits = lm.context - 2 - around + 1
    for tokens in (fits, fits + 1):
        update = {"passages": [first.model_copy(update={"tokens": tokens}), *others]}
        update |= {"start_rule": rule, "front": front}
        forged = MemVectors(mem.vectors, mem.header.model_copy(update=update))
        if tokens == fits:
            assert len(forged.decode_passages(lm)[0]) == fits
        else:
            with pytest.raises(MemvecError, match=f"a passage of {tokens} tokens does not fit"):
                forged.decode_passages(lm)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: v[:-1], "it is damaged"),
        (lambda v: torch.cat([v, v[:1]]), "it is damaged"),
        (lambda v: v[0], "it is damaged"),
        (lambda v: v.flatten(), "it is damaged"),
        (lambda v: v.double(), "which memvec does not write"),
        (lambda v: v.long(), "which memvec does not write"),
        (lambda v: v * math.nan, "not finite"),
        (lambda v: v.index_fill(2, torch.tensor([0]), math.inf), "not finite"),
        (lambda v: v[:, :0], "it is damaged"),
        (lambda v: v[:, :, :0], "it is damaged"),
    ],
)
def test_vectors_that_do_not_fit_the_header_are_refused(mem, tmp_path, change, sentence):
    with pytest.raises(MemvecError, match=sentence):
        MemVectors.load(forged(mem, tmp_path / "a.mem", change(mem.vectors)))


def test_a_header_that_is_no_json_is_refused(mem, tmp_path):
    for text in ("", "[", "null", "[" * 100_000, '{"passages": ' * 5000, "\u0000"):
        path = tmp_path / "a.mem"
        digest = digest_of(text, {"vectors": mem.vectors})
        save_file({"vectors": mem.vectors}, path, {"memvec": text, "sha256": digest})
        with pytest.raises(MemvecError, match="has a damaged header"):
            MemVectors.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"documents__0__encoding": "no-such"},
        {"documents__0__encoding": "hex"},
        {"documents__0__encoding": "ascii", "documents__0__edits": [[0, 0, "é"]]},
        {"documents__0__edits": [[5, 2, "x"]]},
        {"documents__0__edits": [[-3, 2, "x"]]},
        {"documents__0__edits": [[0, 10**30, "x"]]},
        {"documents__0__name": "[bold]\x1b[2J"},
        {"start_rule": "first-token", "passages__0__first": 10**9},
        {"start_rule": "first-token"},
        {"start_rule": "bos"},
        {"passages__0__tokens": 1_000_000},
        {"passages__0__tokens": 1},
        {"model__surprise": []},
        {"environment": {}},
        {"recipe": {}},
        {"recipe": {"temperature": "x", "unit": "logits"}},
        {"model__quantize": 3},
        {"documents__0__encoding": "utf\0"},
        {"certificate": {}},
        {"passages__0__lm_bits": 1e308, "passages__1__lm_bits": 1e308},
        {"certificate": {"exact": "no", "passages": "[x"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("force", [False, True])
def test_a_forged_file_is_refused_in_one_sentence_or_read_right(
    mem, tmp_path, changes, force, capsys
):
    """The digest is correct, so only the checks of each field can refuse it."""
    path = forged(mem, tmp_path / "a.mem", **changes)
    sentences, found = [], []
    for use in (
        lambda m: m.summary(),
        lambda m: display.inspect(m, str(path)),
        lambda m: pretty_json(m.header.model_dump(mode="json")),
        lambda m: memvec.verify(reader(), m, force=force),
        lambda m: found.append(m.documents(reader(), force=force)),
    ):
        try:
            use(MemVectors.load(path))
        except MemvecError as error:
            sentences.append(str(error))
    assert all(len(text.splitlines()) == 1 for text in sentences)
    assert found in ([], [[text.encode() for text in TEXTS]])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("use", [{}, {"vectors": 1, "held_out": {"contexts": []}}])
def test_a_forged_certificate_of_use_is_refused(mem, tmp_path, use):
    """It is only shown to people, so it is checked where it is shown."""
    path = forged(mem, tmp_path / "a.mem", use=use)
    with pytest.raises(MemvecError, match="a certificate of use that is damaged"):
        stored_use(MemVectors.load(path), str(path))


def test_the_error_for_another_version_names_a_later_memvec(mem, tmp_path):
    with pytest.raises(MemvecError, match=r"or a later memvec's \(version: "):
        MemVectors.load(forged(mem, tmp_path / "a.mem", version=2))


# ---------------------------------------------------------------------- another model


def test_vectors_of_another_model_are_refused(mem):
    other = reader(seed=1)
    with pytest.raises(MemvecError, match="other weights"):
        mem.documents(other)
    with pytest.raises(NotExactError, match="did not come back"):
        mem.documents(other, force=True)
    with pytest.raises(MemvecError, match=r"64 numbers each and tiny-llama takes 32"):
        mem.documents(tiny(), force=True)


def test_a_passage_longer_than_the_context_is_refused(mem, tmp_path):
    loaded = MemVectors.load(forged(mem, tmp_path / "a.mem", passages__0__tokens=128))
    with pytest.raises(MemvecError, match="does not fit tiny-bytes's context"):
        loaded.documents(reader())


def test_swapped_vectors_are_not_exact_and_give_no_text(mem):
    """Vectors of one passage in place of those of another decode to the wrong passage."""
    swapped = MemVectors(mem.vectors.roll(1, 0), mem.header)
    with pytest.raises(NotExactError, match="passage 0 did not come back"):
        swapped.documents(reader())
    certificate, exact = memvec.verify(reader(), swapped)
    assert certificate["exact"] is False
    assert certificate["exact_passages"] == sum(exact) < len(exact)


@pytest.mark.parametrize("more", [-1, 1])
def test_lists_of_tokens_are_as_many_as_passages(mem, more):
    P = len(mem.passages)
    with pytest.raises(MemvecError, match=rf"list for each passage \({P} here\), not "):
        mem.checked([[0]] * (P + more))
    with pytest.raises(MemvecError, match=r"list for each passage \(1 here\), not 2\.$"):
        mem.checked([[0], [0]], [1])


@pytest.mark.parametrize("shape", [(1, 2, 64), (2, 64)])
def test_vectors_need_a_set_for_each_passage(mem, shape):
    with pytest.raises(MemvecError, match=r"shape \(P, K, D\)"):
        MemVectors(torch.zeros(shape), mem.header)


@pytest.mark.parametrize("name", ["vectors", "trigger", "front"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_forged_file_with_numbers_that_are_not_finite_is_refused(name, number, tmp_path):
    """The digest is correct, so each tensor is checked, also those of soft tokens."""
    recipe = QUICK.__class__(steps=5, start_rule="bos", if_not_exact="stop")
    mem = codec.cram(reader(), ["the fox"], vectors=2, tokens=4, recipe=recipe)
    header = mem.header.model_copy(update={"soft_trigger": 3, "soft_front": 2})
    rows = {"trigger": torch.ones(3, reader().width), "front": torch.ones(2, reader().width)}
    tensors, text = {"vectors": mem.vectors.clone(), **rows}, header.model_dump_json()
    for sound in (True, False):
        if not sound:
            tensors[name].view(-1)[3] = number
        metadata = {"memvec": text, "sha256": digest_of(text, tensors)}
        (tmp_path / "a.mem").write_bytes(to_safetensors(tensors, metadata))
        if sound:
            assert torch.equal(MemVectors.load(tmp_path / "a.mem").soft["front"], rows["front"])
        else:
            with pytest.raises(MemvecError, match="numbers that are not finite"):
                MemVectors.load(tmp_path / "a.mem")


@pytest.mark.parametrize(
    ("trigger", "front", "sentence"),
    [
        ((3, 5), (2, 5), None),
        ((3, 5), (1, 5), "a trigger of 3 soft tokens and 2 in front .* and 'front' has 1 here"),
        ((2, 5), (2, 5), "a trigger of 3 soft tokens and 2 in front .* and 'trigger' has 2 here"),
        ((3, 5), None, "and 'front' has 0 here"),
        ((3, 5), (2, 4), r"one width, not \[\(3, 5\), \(2, 4\)\]"),
        ((3, 5, 1), (2, 5), r"rows \(tokens, width\)"),
    ],
)
def test_soft_tokens_are_those_of_the_header_and_of_one_width(mem, trigger, front, sentence):
    """A wrong number and a wrong width have different errors."""
    header = mem.header.model_copy(update={"soft_trigger": 3, "soft_front": 2})
    shapes = {"trigger": trigger, "front": front}
    soft = {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
    if sentence is None:
        assert MemVectors(mem.vectors, header, soft).soft.keys() == shapes.keys()
    else:
        with pytest.raises(MemvecError, match=sentence):
            MemVectors(mem.vectors, header, soft)
