"""FrozenLM: a causal language model of Hugging Face, loaded once, frozen and checked.

Everything else in memvec sees a model through this class only:

    (vectors, tokens) -> states -> logits        gradients flow to the vectors, never to the weights
    tokens <-> text

The model's own code runs unchanged. It gets `inputs_embeds` without an attention mask (right
padding needs none in a causal model). Where possible, memvec takes the last hidden states and
applies the output head itself, so that logits are computed only where they are needed. Both are
checked against the model's own forward pass at load (memvec.model.probes); a model that fails is
refused with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.errors import MemvecError, SlowPathWarning
from memvec.machine import plain_torch
from memvec.model.caching import cache_arguments, find_cache
from memvec.model.configuration import context_length, start_token
from memvec.model.fingerprint import Fingerprint, Unchanged, fingerprint_of, probe_logits
from memvec.model.heads import split_head, unwrapped
from memvec.model.large import offloaded, recomputed
from memvec.model.mixed import BFLOAT16_AUTOCAST, autocast_of
from memvec.model.probes import refuse_if_unfit
from memvec.model.reading import IN_FRONT, Reading, StartRule, reading_named
from memvec.model.soft_tokens import embedded
from memvec.model.spread import embedding_std, logit_spread

if TYPE_CHECKING:
    from memvec.companions.around import CrammedTrigger
    from memvec.companions.encoder import OnePassEncoder

WHOLE_MODEL = "gives no states apart from its logits: a step computes and keeps logits everywhere."


class FrozenLM:
    """A frozen causal LM and its tokenizer.

    `load_lm` makes one by name; the constructor takes a model and tokenizer that are in memory. It
    changes the model in place: evaluation mode, and no gradients of parameters, PEFT adapters
    included. `tokenizer` may be None if only token ids are used. Raises MemvecError for a model
    that takes no vectors and, unless `check` is False, for a model that fails a self-check.

    Attributes: `width` (D), `vocab_size` (V), `context` (tokens, None if unlimited), `bos_id` (the
    token that starts a text: BOS, else EOS, else None), `embedding_std` (standard deviation of the
    embeddings' numbers), `logit_spread` (standard deviation of its logits over the vocabulary, mean
    over a fixed probe: the unit of a recipe's temperature and margin), `caching` (the name of the
    model's cache argument, or why decoding uses no cache), `autocast` (dtype of matrix products in
    mixed precision, else None), `fingerprint`, `encoder` and `usable_encoder` (one-pass encoders of
    exact and of usable vectors, else None), `facts` (the memvec.json of its folder: measured bits
    per vector), `reading` (see `read_as`), `graphs` (True: engines replay steps, memvec.graphs).
    """

    @plain_torch()
    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str = "in-memory",
        revision: str | None = None,
        check: bool = True,
        quantize: str | None = None,
        checkpointing: bool = False,
        offload: bool = False,
    ) -> None:
        self.quantize, self.checkpointing, self.offload = quantize, checkpointing, offload
        self.reading: Reading = IN_FRONT
        self.other_trigger: tuple[int, ...] | None = None  # replaces BOS (memvec.companions.around)
        self.soft: Tensor | None = None  # soft tokens of trigger and front, a row for each
        self.front: tuple[int, ...] = ()  # ids of the tokens in front of the vectors
        self.own_trigger: CrammedTrigger | None = None  # the one in the model's folder
        self.context_scale = 1.0  # factor of vectors in context mode
        self.graphs = False
        self._original: FrozenLM | None = None  # the model of which `read_as` made this view
        self.model = model = unwrapped(model).eval().requires_grad_(False)
        self.tokenizer, self.name, self.revision = tokenizer, name, revision
        self.config: Any = model.config
        text_config = model.config.get_text_config()  # type: ignore[operator,union-attr]
        self.embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        if self.embedding is None or not hasattr(self.embedding, "weight"):
            raise MemvecError(f"{name} has no input embedding matrix, so it takes no vectors.")
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]
        self.device, self.dtype = weight.device, weight.dtype
        self.autocast: torch.dtype | None = autocast_of(model)
        self.width = int(weight.shape[1])  # D; not the hidden size where inputs are projected (OPT)
        self.context = context_length(text_config)
        self.bos_id = start_token(text_config, tokenizer, rows=len(weight))
        with torch.no_grad():  # the matrix is unscaled, though some models scale its rows (Gemma)
            self.embedding_std = embedding_std(weight)
        logits = probe_logits(self)
        self.vocab_size = int(logits.shape[-1])
        self.logit_spread = logit_spread(logits)
        self._body, self._head = split_head(model, self.embedding)
        self.caching = find_cache(model, self.embedding, self.rounding)
        if check:
            refuse_if_unfit(self)
            if not self.has_cache:
                warnings.warn(f"{name} {self.caching.sentence}", SlowPathWarning, stacklevel=3)
            if not self.has_split_head:
                warnings.warn(f"{name} {WHOLE_MODEL}", SlowPathWarning, stacklevel=3)
        mixed = BFLOAT16_AUTOCAST if self.autocast else None
        self._fingerprint = fingerprint_of(self.config, weight, logits[-1], mixed)
        self._unchanged = Unchanged(model)
        self.facts: dict[str, Any] = {}
        self.encoder: OnePassEncoder | None = None
        self.usable_encoder: OnePassEncoder | None = None

    # ------------------------------------------------------------------ tokens and text

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with no special token added.

        Raises MemvecError for a token that the model does not have, and without a tokenizer.
        """
        ids: list[int] = self._require_tokenizer()(
            text, add_special_tokens=False, verbose=False, return_attention_mask=False
        )["input_ids"]
        if max(ids, default=0) >= self.vocab_size:
            raise MemvecError(f"{self.name} has no row for the token {max(ids)} of its tokenizer.")
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids; some tokenizers do not give back exactly the tokenized text.

        Raises MemvecError without a tokenizer.
        """
        decode = self._require_tokenizer().decode
        return str(decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def adds_bos(self) -> bool:
        """True if the tokenizer puts BOS in front of a text (Llama 3, OPT). Raises as `text`."""
        ids = self._require_tokenizer()("a")["input_ids"]
        return bool(self.bos_id is not None and ids and ids[0] == self.bos_id)

    @property
    def rounding(self) -> torch.dtype:
        """The dtype of matrix products: that of autocast, else the dtype of the weights."""
        return self.autocast or self.dtype

    @property
    def has_split_head(self) -> bool:
        """True if body and head are separate, so that logits are computed only where needed."""
        return self._body is not None

    @property
    def has_cache(self) -> bool:
        """True if decoding uses the model's cache; False: each token repeats the whole forward."""
        return self.caching.argument is not None

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise MemvecError(f"{self.name} was loaded without a tokenizer, and this needs one.")
        return self.tokenizer

    # ------------------------------------------------------------------ vectors to logits

    def embed(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Embeddings of token ids, soft tokens included, as the first layer reads them."""
        rows: Tensor = self.embedding(ids) if self.soft is None else embedded(self, ids)
        return rows

    def read_as(self, layout: str | Reading) -> FrozenLM:
        """A view of this model that reads vectors in another way; the model itself if it does so.

        `layout` is the name of a layout or a Reading. The view shares the weights. With another
        layout than 'prefix', it has no encoder and no measured bits per vector, because these are
        for vectors in front of a passage. Raises MemvecError for an unknown layout.
        """
        reading = layout if isinstance(layout, Reading) else reading_named(layout)
        if reading is self.reading:
            return self
        if reading is IN_FRONT:
            return self._original or self
        view, original = copy.copy(self), self._original or self
        view.reading, view.context, view._original = reading, reading.context(original), original
        view.facts, view.encoder, view.usable_encoder = {}, None, None
        return view

    @property
    def numbers(self) -> int:
        """The number of trained and stored numbers per vector (W); D if vectors are inputs."""
        return self.reading.numbers(self)

    @property
    def trigger(self) -> tuple[int, ...]:
        """The tokens after the vectors under the start rule 'bos': BOS, or another trigger."""
        return self._bos if self.other_trigger is None else self.other_trigger

    @property
    def _bos(self) -> tuple[int, ...]:
        return () if self.bos_id is None else (self.bos_id,)

    def after_front(self, vectors: Float[Tensor, "B K D"]) -> Float[Tensor, "B N D"]:
        """The F embeddings of the front and then the vectors, in the model's dtype (N = F + K)."""
        ones = vectors.new_ones(len(vectors), 1, dtype=torch.long)  # on the device, without a copy
        front = [self.embed(token * ones) for token in self.front]
        return torch.cat([*front, vectors.to(self.dtype)], 1)

    def states(
        self,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start_rule: StartRule = "vectors",
    ) -> Float[Tensor, "B N H"]:
        """Hidden states at the predicting positions, N = T (T - 1 for 'first-token').

        `head` turns them into logits. For a model without a split head they are already the
        logits, and `head` returns them unchanged.
        """
        return self.reading.states(self, vectors, ids, start_rule)

    def states_of(
        self, inputs: Float[Tensor, "B N D"], keep: int, cache: Any = None
    ) -> Float[Tensor, "B keep H"]:
        """States (see `states`) at the last `keep` positions of `inputs`, read after `cache`."""
        out: Tensor
        options = cache_arguments(self.caching.argument, cache)
        with self._sparing():
            if self._body is not None:
                out = self._body(inputs_embeds=inputs, **options)[0][:, -keep:]
            else:
                out = self.model(inputs_embeds=inputs, **options).logits[:, -keep:]
        return out.to(self.device)  # a device_map may put the last layer on another device

    def inputs_before(self, K: int, start_rule: StartRule) -> int:
        """Number of inputs of a forward pass besides one for each predicted token."""
        # The reading counts one token of the trigger.
        further = len(self.trigger) - 1 if start_rule == "bos" else 0
        return len(self.front) + self.reading.inputs_before(K, start_rule) + further

    def head(self, states: Float[Tensor, "*shape H"]) -> Float[Tensor, "*shape V"]:
        """Logits in float32 from hidden states."""
        return self._head(states).to(self.device).float()  # copy first: fewer bytes than float32

    def logits(
        self,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start_rule: StartRule = "vectors",
    ) -> Float[Tensor, "B N V"]:
        """Logits in float32 of the predicted tokens, N as for `states` (the reference path).

        Without vectors, `start_rule` is ignored: BOS comes first, or the first token without a BOS.
        """
        if vectors is None:
            start_rule = "first-token" if self.bos_id is None else "bos"
        return self.head(self.states(vectors, ids, start_rule))

    def own_logits(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Float32 logits of the model's own forward pass on tokens, the reference for checks."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float().to(self.device)

    def hidden(self, inputs: Float[Tensor, "B N D"], keep: int) -> Float[Tensor, "B keep H"]:
        """Hidden states after the final norm, at the last `keep` positions of free inputs.

        Raises MemvecError for a model without a split head.
        """
        if self._body is None:
            raise MemvecError(f"{self.name} does not give its hidden states apart from its logits.")
        return self.states_of(inputs, keep)

    @contextlib.contextmanager
    def _sparing(self) -> Iterator[None]:
        """Save memory at the cost of time (checkpointing, offload) while gradients are computed."""
        with contextlib.ExitStack() as stack:
            if torch.is_grad_enabled() and self.checkpointing:
                stack.enter_context(recomputed(self.model))
            if torch.is_grad_enabled() and self.offload:
                stack.enter_context(offloaded(self.model, pin=self.device.type != "cpu"))
            yield

    def start_ids(
        self, ids: Int[Tensor, "B T"], start_rule: StartRule, *, alone: bool = False
    ) -> Int[Tensor, "B n"]:
        """The tokens between the vectors and the first predicted token.

        `alone` is for passages without vectors, which the model reads after BOS whatever the
        trigger is. Raises MemvecError for 'bos' without such a token.
        """
        if start_rule == "bos":
            tokens = self._bos if alone else self.trigger
            if not tokens:
                raise MemvecError(f"{self.name} has no BOS token: use the start rule 'vectors'.")
            # `new_full` fills on the device: a copy from the CPU would make a GPU wait.
            return torch.cat([ids.new_full((len(ids), 1), token) for token in tokens], 1)
        return ids[:, : int(start_rule == "first-token")]

    def computed_by(self, model: nn.Module) -> FrozenLM:
        """A view that computes with `model`, a copy of the weights in another dtype.

        The fingerprint and other facts stay those of this model (see memvec.model.precision).
        """
        other = copy.copy(self)
        other.model, other.embedding = model, model.get_input_embeddings()  # type: ignore[operator]
        other.dtype = other.embedding.weight.dtype  # type: ignore[assignment]
        other._body, other._head = split_head(model, other.embedding)
        other._unchanged = Unchanged(model)
        return other

    # ------------------------------------------------------------------ identity

    @property
    def fingerprint(self) -> Fingerprint:
        """The identity of the weights. Raises MemvecError as `check_unchanged` does."""
        self.check_unchanged()
        return self._fingerprint

    def check_unchanged(self) -> None:
        """Raise MemvecError if weights were changed in place since construction, or in train()."""
        if not self._unchanged:
            raise MemvecError(
                f"the weights of {self.name} were changed after it was loaded: make a new FrozenLM."
            )
        if self.model.training:
            raise MemvecError(f"{self.name} is in training mode, with dropout: call model.eval().")

    def description(self) -> dict[str, Any]:
        """Everything about the model that can change a result, for records."""
        return {
            "name": self.name,
            "revision": self.revision,
            **asdict(self.fingerprint),
            "probe": list(self.fingerprint.probe),
            "device": self.device.type,
            "attention": getattr(self.config, "_attn_implementation", None) or "none",
            "width": self.width,
            "vocabulary": self.vocab_size,
            "encoder": self.encoder.identity if self.encoder else None,
            **({"trigger": self.own_trigger.identity} if self.own_trigger else {}),
            **({"usable_encoder": e.identity} if (e := self.usable_encoder) else {}),
            **({"quantize": self.quantize} if self.quantize else {}),
        }
