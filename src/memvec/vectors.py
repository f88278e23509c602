"""MemVectors: [mem] vectors and a header with everything that decoding and verification need.

The file is in the safetensors format. It holds the tensors of a storage (memvec.storage: `vectors`
(P, K, D), or integer `codes` and `scales`) and a JSON header, which memvec.header describes and
validates. It holds the text only if the caller asks for it. A digest of the header and the tensors
detects every change. Reading a file unpickles nothing, and allocates no more than the size of its
tensors (4-bit codes take eight times their size as float32 numbers).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memvec import corrections, hub, metrics
from memvec.companions.around import as_context_at, surrounded
from memvec.decoding import decode_ids
from memvec.errors import MemvecError, NotExactError, check_type
from memvec.header import Header, PassageRecord
from memvec.model.fingerprint import Fingerprint
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule, in_space, reading_named
from memvec.passages.documents import restore
from memvec.passages.passage import ids_hash
from memvec.storage import STORAGES, Storage, storage_of
from memvec.vectors_file import digest_of, existing_path, read_file, write_file
from memvec.writing import path_of


class MemVectors:
    """The [mem] vectors of P passages, `vectors` (P, K, D), and a header.

    `vectors` have the dtype in which they are stored; vectors stored as integers are float32, equal
    to codes times scales. In another space than 'inputs' a vector has W numbers instead of D.
    `soft` holds the soft tokens that the header names, in float32: `trigger` (R, D) after the
    vectors, `front` (F, D) in front of them. Raises MemvecError for vectors or soft tokens that do
    not fit the header.
    """

    def __init__(
        self, vectors: Tensor, header: Header, soft: Mapping[str, Tensor] | None = None
    ) -> None:
        if vectors.dim() != 3 or len(vectors) != len(header.passages):
            raise MemvecError(
                f"{len(header.passages)} passages need vectors of shape (P, K, D), "
                f"got {tuple(vectors.shape)}."
            )
        if header.space and header.space.numbers != vectors.shape[2]:
            raise MemvecError(
                f"vectors in the space '{header.space.name}' have {header.space.numbers} numbers "
                f"by their header and {vectors.shape[2]} here."
            )
        reading = reading_named(header.layout)
        if reading.fixed_vectors not in (None, vectors.shape[1]):
            raise MemvecError(f"one-step vectors are two, e and m, not {vectors.shape[1]}.")
        if reading.shares_vector and not bool((vectors[:, 1] == vectors[:1, 1]).all()):
            raise MemvecError("these vectors do not share one m, as their header says.")
        self.soft = {name: rows.detach().float().cpu() for name, rows in (soft or {}).items()}
        _check_soft_tokens(self.soft, header)
        self.vectors = vectors.detach().cpu().contiguous()
        self.header = header
        if header.packing is not None:
            numbers = self.vectors.float()
            if not torch.equal(self.storage.rounded(numbers), numbers):
                raise MemvecError(
                    f"these vectors are not rounded to {header.packing}, as their header says."
                )

    def __repr__(self) -> str:
        return f"<MemVectors of shape (P, K, D) = {tuple(self.vectors.shape)}>"

    # ------------------------------------------------------------------ figures

    @property
    def passages(self) -> list[PassageRecord]:
        """The record of each passage."""
        return self.header.passages

    @property
    def exact(self) -> bool:
        """True if every passage is exact, and the vectors were not changed since."""
        return all(p.exact for p in self.passages) and not self.changed

    @property
    def digest(self) -> str:
        """The SHA-256 (hex) of the vectors and soft tokens as they are stored."""
        return digest_of("", self.storage.pack(self.stored) | self.soft)

    @property
    def changed(self) -> bool:
        """True if the vectors were changed after they were certified."""
        certified = (self.header.certificate or {}).get("vectors_sha256")
        return certified is not None and bool(certified != self.digest)

    @property
    def size(self) -> int:
        """Bytes of the vectors as stored: of codes and scales, if they are stored as integers."""
        rows = self.stored
        return self.storage.size(rows.shape[0] * rows.shape[1], rows.shape[2])

    @property
    def stored(self) -> Tensor:
        """The rows (R, k, D) of the file, in which an m that all passages share is one row."""
        return reading_named(self.header.layout).rows(self.vectors)

    @property
    def storage(self) -> Storage:
        """The storage of the vectors. Raises MemvecError for a dtype without a storage."""
        name = self.header.packing or str(self.vectors.dtype).removeprefix("torch.")
        if name not in STORAGES:
            raise MemvecError(f"memvec does not store vectors as {name}.")
        return STORAGES[name]

    def summary(self) -> dict[str, Any]:
        """The figures of the whole file, by name.

        Units: names with `bits` are in bits, names with `bytes` in bytes, `margin` in logits,
        `spent` in forward-backward tokens, `seconds` in seconds. `theoretical_capacity` (tokens) is
        that of the K vectors of one passage; both utilisations are those of all vectors. A vector
        that all passages share counts once.
        """
        (P, K, D), stored = self.vectors.shape, self.stored
        vectors = stored.shape[0] * stored.shape[1]
        V = int(self.header.model.get("vocabulary", 2))
        number_bits = 8 * self.size / max(1, stored.numel())  # stored bits per number
        gain = sum(p.information_gain for p in self.passages)
        token_gain = sum(p.token_gain for p in self.passages)
        count = max(1, vectors)
        mean, error = metrics.mean_and_error([p.tokens * P / count for p in self.passages])
        inserted = [new for d in self.header.documents for _, _, new in d.edits]
        return {
            "model": self.header.model.get("name"),
            "documents": len(self.header.documents),
            "passages": P,
            "vectors_per_passage": K,
            "vectors": vectors,
            "width": D,
            "storage": self.storage.name,
            "bits_per_number": number_bits,
            "start_rule": self.header.start_rule,
            "front": self.header.front,
            "layout": self.header.layout,
            "space": self.header.space.name if self.header.space else "inputs",
            "tokens": sum(p.tokens for p in self.passages),
            "tokens_per_vector": mean,
            "tokens_per_vector_error": error,
            "exact_passages": sum(p.exact for p in self.passages),
            "exact": self.exact,
            "accuracy": sum(p.accuracy * p.predicted for p in self.passages)
            / max(1, sum(p.predicted for p in self.passages)),
            "margin": min((p.margin for p in self.passages), default=math.nan),
            "lm_bits": sum(p.lm_bits for p in self.passages),
            "information_gain_bits": gain,
            "token_gain": token_gain,
            "bits_per_vector": gain / count,
            "bits_per_dimension": metrics.bits_per_dimension(gain, D, count),
            "theoretical_capacity": metrics.theoretical_capacity(D, K, number_bits, V),
            "token_utilisation": metrics.token_utilisation(token_gain, D, count, number_bits, V),
            "bit_utilisation": metrics.bit_utilisation(gain, D, count, number_bits),
            "text_bytes": sum(d.size for d in self.header.documents),
            "vector_bytes": self.size,
            "trigger_bytes": sum(4 * rows.numel() for rows in self.soft.values()),
            "edit_bytes": sum(8 + len(new.encode()) for new in inserted),
            "corrections": sum(len(p.corrections) for p in self.passages),
            "correction_bytes": corrections.size([p.corrections for p in self.passages]),
            "steps": sum(p.steps for p in self.passages),
            "spent": sum(p.spent for p in self.passages),
            "seconds": sum(p.seconds for p in self.passages),
        }

    # ------------------------------------------------------------------ decoding

    def tokens(self, lm: FrozenLM, *, force: bool = False) -> list[list[int]]:
        """The token ids of every passage: decode all freely, and compare each with its hash.

        Raises MemvecError as `decode_passages` does, and NotExactError as `checked` does.
        """
        return self.checked(self.decode_passages(lm, force=force))

    def checked(
        self, decoded: list[list[int]], passages: Sequence[int] | None = None
    ) -> list[list[int]]:
        """`decoded`, the token ids of every passage, or of the passages of these numbers.

        Raises NotExactError if the hash of a passage differs, so that wrong text is never returned,
        and MemvecError for another number of lists than of passages.
        """
        numbers = range(len(self.passages)) if passages is None else passages
        if (n := len(decoded)) != len(numbers):
            raise MemvecError(f"tokens are a list for each passage ({len(numbers)} here), not {n}.")
        for i, ids in zip(numbers, decoded, strict=True):
            record = self.passages[i]
            if ids_hash(ids) != record.sha256:
                raise NotExactError(
                    f"passage {i} did not come back: its tokens do not hash to what was crammed "
                    f"(its record says {record.horizon} of {record.predicted} tokens decode); "
                    "'memvec verify' shows which ones do."
                )
        return decoded

    def decode_passages(self, lm: FrozenLM, *, force: bool = False) -> list[list[int]]:
        """Token ids of every passage, decoded freely and not checked.

        Raises MemvecError for vectors of another model (with `force`: of another width only), and
        for a passage that does not fit the model's context.
        """
        self.check_model(lm, force=force)
        lm = self.view(lm)
        lengths = [p.tokens for p in self.passages]
        longest = max(lengths, default=0)
        rule: StartRule = self.header.start_rule
        inputs = longest + lm.inputs_before(self.vectors.shape[1], rule)
        if lm.context is not None and inputs > lm.context:
            raise MemvecError(f"a passage of {longest} tokens does not fit {lm.name}'s context.")
        # A forged file may name tokens that the model does not have. Any other token is as wrong.
        last_id = lm.vocab_size - 1
        first = [min(p.first or 0, last_id) for p in self.passages]
        listed = [[(at, min(token, last_id)) for at, token in p.corrections] for p in self.passages]
        rows = self.vectors.float()
        return decode_ids(lm, rows, lengths, start_rule=rule, first=first, corrections=listed)

    def view(self, lm: FrozenLM) -> FrozenLM:
        """A view of the model with the header's layout, space, front, trigger and context scale.

        The weights are not compared: see `check_model`. Raises MemvecError for a model that does
        not support one of these.
        """
        header = self.header
        view = surrounded(self._in_space(lm), header.front, header.trigger, self.soft)
        return as_context_at(view, header.context_scale)

    def _in_space(self, lm: FrozenLM) -> FrozenLM:
        lm, space = lm.read_as(self.header.layout), self.header.space
        return lm if space is None else in_space(lm, space.name, space.options)

    def documents(self, lm: FrozenLM, *, force: bool = False) -> list[bytes]:
        """The bytes of every document. Raises as `tokens` and `restored` do."""
        return self.restored(lm, self.tokens(lm, force=force))

    def restored(self, lm: FrozenLM, tokens: Sequence[list[int]]) -> list[bytes]:
        """The bytes of every document, from the token ids of all passages.

        Raises NotExactError if the hash of a document differs.
        """
        passages = iter(tokens)
        return [
            restore(lm, [token for _ in range(d.passages) for token in next(passages)], d)
            for d in self.header.documents
        ]

    def check_model(self, lm: FrozenLM, *, force: bool = False) -> None:
        """Raise MemvecError for a model of other weights (unless `force`) or of another width."""
        check_type("lm", lm, FrozenLM, "memvec.load_lm")
        model = self.header.model
        made_for = " in ".join(filter(None, (model["name"], model.get("quantize"))))
        if self.vectors.shape[2] != (takes := self._in_space(lm).numbers):
            raise MemvecError(
                f"these vectors have {self.vectors.shape[2]} numbers each and {lm.name} takes "
                f"{takes}: they were made for {made_for}."
            )
        if not force and not Fingerprint.of_record(model).matches(lm.fingerprint):
            raise MemvecError(
                f"these vectors were made for other weights (of {made_for}) than those of "
                f"{lm.name}: load that model, or try it as it is with force=True."
            )

    # ------------------------------------------------------------------ the file

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the file atomically (temporary file, fsync, rename); returns its path.

        Raises MemvecError if the file exists (unless `force`) or cannot be written, and if the
        vectors were changed after they were certified or are not finite.
        """
        if self.changed:
            raise MemvecError(
                "these vectors were changed after they were certified: use mem.with_vectors and "
                "memvec.certify."
            )
        if (target := path_of(path)).exists() and not force:
            raise MemvecError(f"{target} exists: use force=True to overwrite it, or name another.")
        write_file(target, self.header, self.storage.pack(self.stored) | self.soft)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MemVectors:
        """Read a file. Raises MemvecError for one that is missing, damaged, foreign or changed."""
        header, vectors, soft = read_file(existing_path(path))
        return cls(reading_named(header.layout).vectors(vectors), header, soft)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> Path:
        """Write a folder with the vectors and a card: see `memvec.hub.save_pretrained`."""
        return hub.save_pretrained(self, folder, **options)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> MemVectors:
        """Vectors from a folder of `save_pretrained` or the Hub: see `memvec.hub.local_file`."""
        return cls.load(hub.local_file(name, **options))

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the vectors and a card: see `memvec.hub.push_to_hub`."""
        return hub.push_to_hub(self, repository, **options)

    def with_vectors(self, vectors: Tensor, storage: str | None = None) -> MemVectors:
        """The same file with other vectors (P, K, D), stored as these ones or by `storage`.

        Until `memvec.certify` measures them, no passage is exact and all measures are NaN or 0.
        Raises MemvecError for a value that is not a tensor, for another number of passages, and for
        an unknown storage.
        """
        if not isinstance(vectors, Tensor):
            shown = type(vectors).__name__
            raise MemvecError(f"vectors is a tensor of shape (P, K, D), not of the type {shown}.")
        stored = self.storage if storage is None else storage_of(storage)
        names = ("accuracy", "margin", "mem_bits", "information_gain")
        unknown = {"exact": False, "horizon": 0, "token_gain": 0, **dict.fromkeys(names, math.nan)}
        passages = [p.model_copy(update=unknown) for p in self.passages]
        update = {"passages": passages, "packing": stored.packing, "certificate": None, "use": None}
        rounded = stored.rounded(vectors.detach().cpu().float()).to(stored.dtype)
        return MemVectors(rounded, self.header.model_copy(update=update), self.soft)

    def with_certificate(self, certificate: dict[str, Any], exact: Sequence[bool]) -> MemVectors:
        """The same vectors with a certificate, and for each passage whether it is `exact`."""
        each = zip(self.passages, exact, strict=True)
        passages = [p.model_copy(update={"exact": e}) for p, e in each]
        header = self.header.model_copy(update={"certificate": certificate, "passages": passages})
        return MemVectors(self.vectors, header, self.soft)

    def with_use(self, use: dict[str, Any] | None) -> MemVectors:
        """The same vectors with a certificate of use."""
        return MemVectors(self.vectors, self.header.model_copy(update={"use": use}), self.soft)


def _check_soft_tokens(soft: Mapping[str, Tensor], header: Header) -> None:
    """Raise MemvecError unless these are the soft tokens that the header names, of one width."""
    shapes = [tuple(rows.shape) for rows in soft.values()]
    if any(len(shape) != 2 for shape in shapes) or len({width for _, width in shapes}) > 1:
        raise MemvecError(f"soft tokens are rows (tokens, width) of one width, not {shapes}.")
    for name, count in (("trigger", header.soft_trigger), ("front", header.soft_front)):
        if (got := len(soft.get(name, ()))) != count:
            raise MemvecError(
                f"these vectors need a trigger of {header.soft_trigger} soft tokens and "
                f"{header.soft_front} in front by their header, and '{name}' has {got} here."
            )
