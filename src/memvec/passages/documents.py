"""Documents: texts as token ids from which exactly the same bytes can be restored.

Most tokenizers decode their token ids into the same text. Some do not: they normalise, add or drop
a space, or have no token for a character. So a document compares the decoded text with the original
and keeps the edits that turn one into the other. The edits are stored with the vectors, and their
bytes are counted.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memvec.errors import MemvecError, NotExactError
from memvec.writing import path_of

if TYPE_CHECKING:
    from memvec.header import DocumentRecord
    from memvec.model.lm import FrozenLM

LARGEST = 4_000_000  # default maximum size, bytes: larger texts would take days
CLOSE_LOOK = 4_000  # maximum length of a changed block that is compared character by character

Edit = tuple[int, int, str]  # (start, end, new): `new` replaces [start, end) of the decoded text


@dataclass(frozen=True)
class Document:
    """A text as token ids, with what is needed to restore its bytes."""

    ids: tuple[int, ...]
    name: str
    sha256: str
    size: int  # bytes
    encoding: str = "utf-8"
    edits: tuple[Edit, ...] = ()

    @classmethod
    def of(
        cls, lm: FrozenLM, text: str | bytes, *, name: str = "text", encoding: str = "utf-8"
    ) -> Document:
        """Tokenize a text. `encoding` is that of `bytes`, and of the bytes to restore from a `str`.

        Raises MemvecError for another type than `str` or `bytes`, for a text that is empty or not
        in `encoding`, and for a text without tokens.
        """
        if not isinstance(text, str | bytes):
            raise MemvecError(f"{name} is no str or bytes but of the type {type(text).__name__}.")
        data = text if isinstance(text, bytes) else _encode(text, encoding, name)
        if not data:
            raise MemvecError(f"{name} is empty: there is nothing to cram.")
        decoded = _decode(data, encoding, name)
        ids = lm.tokenize(decoded)
        edits = tuple(edits_between(lm.text(ids), decoded))
        if not ids:
            raise MemvecError(f"the tokenizer of {lm.name} makes no tokens of {name}.")
        return cls(tuple(ids), name, hashlib.sha256(data).hexdigest(), len(data), encoding, edits)

    def data(self, lm: FrozenLM) -> bytes:
        """The text's bytes, from its tokens and edits. Raises NotExactError as `restore` does."""
        return restore(lm, self.ids, self)


def documents_of(
    lm: FrozenLM, texts: str | bytes | Document | Iterable[str | bytes | Document]
) -> list[Document]:
    """A document for each text, or for a single text. Raises MemvecError as `Document.of` does.

    A table or a row of a table is refused, because iterating over it yields the names of its
    columns. A dictionary without values is accepted as an ordered set of texts (`dict.fromkeys`).
    """
    table = any(texts.values()) if isinstance(texts, Mapping) else hasattr(texts, "columns")
    if isinstance(texts, str | bytes | Document) or table or not isinstance(texts, Iterable):
        texts = [texts]  # type: ignore[list-item]
    return [
        text if isinstance(text, Document) else Document.of(lm, text, name=f"text {i}")
        for i, text in enumerate(texts)
    ]


def restore(lm: FrozenLM, ids: Sequence[int], document: Document | DocumentRecord) -> bytes:
    """The document's bytes, from its token ids.

    Raises NotExactError if the hash of the bytes is not that of the document.
    """
    text, encoding = apply_edits(lm.text(ids), document.edits), document.encoding
    try:
        data = text.encode(encoding, errors="surrogatepass" if encoding == "utf-8" else "strict")
    except (ValueError, LookupError) as error:  # an encoding's name with a NUL is a ValueError
        raise NotExactError(f"{document.name} cannot be written as {encoding}: {error}.") from None
    if hashlib.sha256(data).hexdigest() != document.sha256:
        raise NotExactError(
            f"the tokens of {document.name} came back but its bytes did not: is this the tokenizer "
            "that it was crammed with?"
        )
    return data


def edits_between(old: str, new: str) -> Iterator[Edit]:
    """Yield the edits that turn `old` into `new`, in order; none if they are equal."""
    if old == new:
        return
    a, b = old.splitlines(keepends=True), new.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, a))]
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        at, before, after = starts[i1], "".join(a[i1:i2]), "".join(b[j1:j2])
        if len(before) > CLOSE_LOOK or len(after) > CLOSE_LOOK:
            yield at, at + len(before), after
            continue
        inner = difflib.SequenceMatcher(None, before, after, autojunk=False)
        for kind, k1, k2, m1, m2 in inner.get_opcodes():
            if kind != "equal":
                yield at + k1, at + k2, after[m1:m2]


def apply_edits(text: str, edits: Sequence[Edit]) -> str:
    """The edited text; the positions of all edits are those in `text`.

    Raises NotExactError for edits that overlap or are outside the text.
    """
    parts, at = [], 0
    for start, end, new in edits:
        if not at <= start <= end <= len(text):
            raise NotExactError("the file's edits do not fit the decoded text.")
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])


def peek(path: str | os.PathLike[str], largest: int = LARGEST) -> None:
    """Raise MemvecError for a file that is missing, empty, a folder, or above `largest` bytes.

    This needs no model, so it can run before one is loaded.
    """
    if path == "-":
        return
    file = path_of(path)
    if file.is_dir():
        raise MemvecError(f"{path} is a directory: name a text file in it.")
    if not file.exists():
        raise MemvecError(f"there is no file {path}.")
    if file.is_file() and file.stat().st_size == 0:
        raise MemvecError(f"{path} is empty: there is nothing to cram.")
    if file.is_file():
        _refuse_large(str(path), file.stat().st_size, largest)


def read_document(
    lm: FrozenLM, path: str | os.PathLike[str], *, encoding: str = "utf-8", largest: int = LARGEST
) -> Document:
    """Read a document from a file, or from standard input if `path` is '-'.

    Raises MemvecError for a file that is missing, unreadable or larger than `largest` bytes, and as
    `Document.of` does.
    """
    if path == "-":
        if sys.stdin is None:
            raise MemvecError("standard input is closed: name a file.")
        data, name = sys.stdin.buffer.read(largest + 1), "standard input"
    else:
        peek(path, largest)
        name = os.fsencode(path).decode("utf-8", "replace")  # records are UTF-8, a name may not be
        try:
            with path_of(path).open("rb") as stream:
                data = stream.read(largest + 1)
        except OSError as error:
            raise MemvecError(f"{path} cannot be read: {error.strerror}.") from None
    _refuse_large(name, len(data), largest)
    return Document.of(lm, data, name=name, encoding=encoding)


def _refuse_large(name: str, size: int, largest: int) -> None:
    if size > largest:
        raise MemvecError(
            f"{name} is larger than {largest} bytes, which would take very long to cram: "
            "cut it, or allow it with largest=BYTES."
        )


def _encode(text: str, encoding: str, name: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as why:
        raise MemvecError(f"{name} has characters that are not {encoding}: {why.reason}.") from None
    except (LookupError, UnicodeError):
        return text.encode()  # `_decode` refuses such an encoding


def _decode(data: bytes, encoding: str, name: str) -> str:
    try:
        text = data.decode(encoding)
        if text.encode(encoding) == data:
            return text
    except UnicodeDecodeError as error:
        raise MemvecError(
            f"{name} is not {encoding} (byte {error.start}): name its encoding, or use "
            "encoding='latin-1', which takes any bytes."
        ) from None
    except (LookupError, UnicodeError):  # unknown, or not an encoding of texts ('idna')
        raise MemvecError(f"unknown encoding '{encoding}': try utf-8, latin-1 or utf-16.") from None
    # Encoding the text again gives other bytes, as for utf-16 without a byte order mark.
    raise MemvecError(f"{name} does not survive the encoding {encoding}: use encoding='latin-1'.")
