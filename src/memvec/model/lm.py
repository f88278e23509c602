"""FrozenLM: a causal language model of Hugging Face, loaded once, frozen and checked.

Everything else in memvec sees a model through this class only:

    (vectors, tokens) -> states -> logits        gradients flow to the vectors, never to the weights
    tokens <-> text

A model is used the way its authors wrote it: we hand it `inputs_embeds` without an attention mask
(right padding needs none in a causal model) and, where the model lets us, take the last hidden
states and apply its output head ourselves, so that logits exist only where they are needed. Both
liberties are checked against the model's own forward at load (see `memvec.doctor`), and a model
that fails is refused with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.encoders.base import OnePassEncoder
from memvec.errors import MemvecError, SlowPathWarning, did_you_mean
from memvec.model.caching import find_cache
from memvec.model.large import loading_options, offloaded, recomputed
from memvec.model.memory import keep_freed_memory, out_of_memory
from memvec.model.precision import widen_attention
from memvec.versions import warn_of_untested_versions

StartRule = Literal["vectors", "bos", "first-token"]
START_RULES: tuple[StartRule, ...] = get_args(StartRule)
Layout = Literal["prefix", "one-step", "one-step-shared"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POCKET = Path(__file__).parent.parent / "pocket"
UNKNOWN_DEVICE = "unknown device '{}': use auto, cpu or cuda:0."


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a model's weights, whatever dtype they are loaded in.

    `config` is the SHA-256 of the configuration, `weights` that of the embedding matrix rounded to
    bfloat16; `probe` holds a few logits of a fixed prompt, compared with a tolerance because
    kernels differ.
    """

    config: str
    weights: str
    probe: tuple[float, ...]
    dtype: str

    def matches(self, other: Fingerprint) -> bool:
        """True if both come from the same model (probe logits within 2 % of their size + 0.1).

        Numbers that went through float16 round to other bfloat16s, so there the probe decides.
        """
        return (
            self.config == other.config
            and (self.weights == other.weights or "float16" in (self.dtype, other.dtype))
            and len(self.probe) == len(other.probe)
            and all(
                abs(a - b) <= 0.1 + 0.02 * abs(a)
                for a, b in zip(self.probe, other.probe, strict=True)
            )
        )


class FrozenLM:
    """A frozen causal LM and its tokenizer.

    Build one with `load_lm`; the constructor takes a loaded model and tokenizer, for tests and for
    models made in memory. `tokenizer` may be None when only token ids are used.

    Attributes: `width` (D), `vocab_size` (V), `context` (tokens, None if unlimited), `bos_id`,
    `embedding_std`, `logit_spread` (standard deviation of its logits over the vocabulary, mean over
    a fixed probe: the unit of a recipe's temperature and margin), `caching` (what the model's cache
    is called, or why decoding goes without one), `fingerprint`, `encoder` (None for most models),
    `facts` (the model folder's memvec.json: measured bits per vector), `layout` (how vectors are
    read: 'prefix' here, in front of a passage; memvec.onestep has the other one).
    """

    layout: ClassVar[Layout] = "prefix"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str = "in-memory",
        revision: str | None = None,
        folder: Path | None = None,
        check: bool = True,
        quantize: str | None = None,
        checkpointing: bool = False,
        offload: bool = False,
    ) -> None:
        self.quantize, self.checkpointing, self.offload = quantize, checkpointing, offload
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.config: Any = model.config
        text_config = model.config.get_text_config()  # type: ignore[operator,union-attr]
        self.embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        if self.embedding is None or not hasattr(self.embedding, "weight"):
            raise MemvecError(f"{name} has no input embedding matrix, so it takes no vectors.")
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]
        self.device = weight.device
        self.dtype = weight.dtype
        self.width = int(weight.shape[1])  # OPT projects its inputs: this is not its hidden size
        self.context = _context_length(text_config)
        self.bos_id = _start_token(text_config, tokenizer, rows=len(weight))
        # As the model sees them: what is handed in as inputs_embeds.
        with torch.no_grad():
            self.embedding_std = float(weight[:50_000].float().std())
        with _answering(name), torch.no_grad():
            logits = self.own_logits(self._probe_ids())[0].float()
        self.vocab_size = int(logits.shape[-1])
        self.logit_spread = _spread(logits)
        self._body, self._head = _split(model, self.embedding)
        self.caching = find_cache(model, self.embedding)
        if check:
            from memvec.doctor import refuse_if_unfit

            refuse_if_unfit(self)
            if not self.has_cache:
                warnings.warn(f"{name} {self.caching.sentence}", SlowPathWarning, stacklevel=2)
        self.fingerprint = self._fingerprint()
        self.facts: dict[str, Any] = {}
        self.encoder: OnePassEncoder | None = None
        if folder is not None:
            self._read_extras(folder)

    # ------------------------------------------------------------------ tokens and text

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with no special token added."""
        ids: list[int] = self._need_tokenizer()(
            text, add_special_tokens=False, verbose=False, return_attention_mask=False
        )["input_ids"]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids; for some tokenizers not quite the text that was tokenized."""
        text: str = self._need_tokenizer().decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    @property
    def adds_bos(self) -> bool:
        """True if the tokenizer itself puts a BOS in front of a text (Llama 3, OPT)."""
        ids = self._need_tokenizer()("a")["input_ids"]
        return bool(self.bos_id is not None and ids and ids[0] == self.bos_id)

    @property
    def has_split_head(self) -> bool:
        """True if states and logits come apart, so that logits exist only where they are needed."""
        return self._body is not None

    @property
    def has_cache(self) -> bool:
        """True if decoding uses the model's cache; False: each token repeats the whole forward."""
        return self.caching.argument is not None

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise MemvecError(f"{self.name} was loaded without a tokenizer: give token ids.")
        return self.tokenizer

    # ------------------------------------------------------------------ vectors to logits

    def embed(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Embeddings of token ids, as they are handed to the model."""
        embedded: Tensor = self.embedding(ids)
        return embedded

    def inputs(
        self,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """What stands before each predicted token: [vectors, (BOS,) t_1 ... t_{T-1}].

        `start` says what follows the vectors: nothing ('vectors': token 1 is predicted from the
        last vector), the model's BOS ('bos'), or the passage's first token ('first-token': tokens
        2 to T are predicted). Without vectors, 'vectors' is meaningless and BOS is used.
        """
        parts = [] if vectors is None else [vectors.to(self.dtype)]
        if start == "bos":
            if self.bos_id is None:
                raise MemvecError(f"{self.name} has no BOS token: use --start-rule vectors.")
            parts.append(self.embed(ids.new_full((len(ids), 1), self.bos_id)))
        parts.append(self.embed(ids[:, :-1]))
        return torch.cat(parts, dim=1)

    def states(
        self,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start: StartRule = "vectors",
    ) -> Float[Tensor, "B N H"]:
        """Hidden states at the predicting positions, N = T (T - 1 for 'first-token').

        `head` turns them into logits. For a model whose head we may not take apart these are the
        logits already, and `head` leaves them as they are.
        """
        predicted = ids.shape[1] - (start == "first-token")
        return self._run(self.inputs(vectors, ids, start), keep=predicted)

    def inputs_before(self, K: int, start: StartRule) -> int:
        """Inputs that a forward pass reads besides one for each predicted token."""
        return K - 1 + (start != "vectors")

    def head(self, states: Float[Tensor, "*shape H"]) -> Float[Tensor, "*shape V"]:
        """Logits in float32 from hidden states."""
        return self._head(states).float().to(self.device)

    def logits(
        self,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start: StartRule = "vectors",
    ) -> Float[Tensor, "B N V"]:
        """Logits in float32 of the predicted tokens (the reference path)."""
        if vectors is None:
            start = "first-token" if self.bos_id is None else "bos"
        return self.head(self.states(vectors, ids, start))

    def own_logits(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """The model's own forward on real tokens: the truth our logits are checked against."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float().to(self.device)

    def hidden(self, inputs: Float[Tensor, "B N D"], keep: int) -> Float[Tensor, "B keep H"]:
        """Last hidden states (after the final norm) of free inputs; None of the head's work.

        Raises MemvecError for a model whose head cannot be taken apart.
        """
        if self._body is None:
            raise MemvecError(f"{self.name} does not give its hidden states apart from its logits.")
        return self._run(inputs, keep)

    def _run(self, inputs: Tensor, keep: int) -> Tensor:
        out: Tensor
        with self._sparing():
            if self._body is not None:
                out = self._body(inputs_embeds=inputs, use_cache=False)[0][:, -keep:]
            else:
                out = self.model(inputs_embeds=inputs, use_cache=False).logits[:, -keep:]
        return out.to(self.device)  # the last layer may live on another one

    @contextlib.contextmanager
    def _sparing(self) -> Iterator[None]:
        """Memory paid for with time while gradients are asked for; nothing otherwise."""
        with contextlib.ExitStack() as stack:
            if torch.is_grad_enabled() and self.checkpointing:
                stack.enter_context(recomputed(self.model))
            if torch.is_grad_enabled() and self.offload:
                stack.enter_context(offloaded(self.model, pin=self.device.type == "cuda"))
            yield

    def start_ids(self, ids: Int[Tensor, "B T"], start: StartRule) -> Int[Tensor, "B n"]:
        """The tokens that are given between the vectors and the first predicted token."""
        if start == "bos":
            if self.bos_id is None:
                raise MemvecError(f"{self.name} has no BOS token: use --start-rule vectors.")
            return ids.new_full((len(ids), 1), self.bos_id)
        return ids[:, : int(start == "first-token")]

    def computed_by(self, model: nn.Module) -> FrozenLM:
        """This model, with everything but its identity computed by another module of its kind.

        For a copy of the weights in another dtype (memvec.model.precision).
        """
        other = copy.copy(self)
        other.model, other.embedding = model, model.get_input_embeddings()  # type: ignore[operator]
        other.dtype = other.embedding.weight.dtype  # type: ignore[assignment]
        other._body, other._head = _split(model, other.embedding)
        return other

    # ------------------------------------------------------------------ what identifies it

    def description(self) -> dict[str, Any]:
        """Everything about the model that could change a number (design rule 6)."""
        return {
            "name": self.name,
            "revision": self.revision,
            "config": self.fingerprint.config,
            "weights": self.fingerprint.weights,
            "probe": list(self.fingerprint.probe),
            "dtype": self.fingerprint.dtype,
            "device": self.device.type,
            "attention": getattr(self.config, "_attn_implementation", None) or "none",
            "width": self.width,
            "vocabulary": self.vocab_size,
            "encoder": self.encoder.identity if self.encoder else None,
            **({"quantize": self.quantize} if self.quantize else {}),
        }

    def _probe_ids(self) -> Int[Tensor, "1 8"]:
        rows = int(self.embedding.weight.shape[0])  # type: ignore[index,union-attr]
        return (torch.arange(1, 9, device=self.device) * 7919 % rows)[None]

    @torch.no_grad()
    def _fingerprint(self) -> Fingerprint:
        config = self.config.to_dict()
        # Saving and loading a model writes these; they say nothing about its weights.
        for volatile in (
            "_name_or_path",
            "architectures",
            "transformers_version",
            "dtype",
            "torch_dtype",
        ):
            config.pop(volatile, None)
        described = json.dumps(config, sort_keys=True, default=str).encode()
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]
        rounded = weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
        last = self.own_logits(self._probe_ids())[0, -1]
        probe = last[:: max(1, len(last) // 8)][:8]
        return Fingerprint(
            hashlib.sha256(described).hexdigest(),
            hashlib.sha256(rounded).hexdigest(),
            tuple(round(float(x), 3) for x in probe),
            str(self.dtype).removeprefix("torch."),
        )

    def _read_extras(self, folder: Path) -> None:
        facts = folder / "memvec.json"
        if facts.is_file():
            self.facts = json.loads(facts.read_text())
        weights = folder / "encoder.safetensors"
        if weights.is_file():
            self.read_encoder(weights)

    def read_encoder(self, path: Path) -> None:
        """Start passages from the one-pass encoder in a file (memvec.encoders.files).

        Raises MemvecError if it is none, or was made for another model.
        """
        from memvec.encoders.files import load_encoder

        self.encoder = load_encoder(path, self)


def load_lm(
    name: str = "pocket",
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
    encoder: str | Path | None = None,
    check: bool = True,
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    checkpointing: bool = False,
    offload: bool = False,
) -> FrozenLM:
    """Load a causal LM by Hub id, from a local folder, or the built-in 'pocket'.

    `device` 'auto' is the first GPU, else the CPU. `dtype` 'auto' is float32 on a CPU and bfloat16
    on a GPU. `attention` names a kernel of transformers ('sdpa', 'eager', 'flash_attention_2');
    default: the model's, in float32 where a CPU's kernel for the dtype is slow (precision.py).
    `encoder` is a file of `memvec encoder train`; default: the one in the model's folder, if any.

    For big models: `device_map` ('auto', or transformers' dictionary) spreads layers over devices;
    `quantize` '8bit' or '4bit' keeps linear weights in few bits (vectors are then for exactly this
    model, and decode with it only); `checkpointing` computes each layer twice instead of keeping
    its activations, and `offload` keeps them in the computer's memory.

    Raises MemvecError, in one sentence: no such model, no network, no weights, not a causal LM, or
    a causal LM that cannot be served exactly.
    """
    warn_of_untested_versions()
    if dtype not in ("auto", *DTYPES):
        raise MemvecError(f"unknown dtype '{dtype}': {did_you_mean(dtype, ['auto', *DTYPES])}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        raise MemvecError(UNKNOWN_DEVICE.format(device)) from None
    if where.type not in ("cpu", "cuda"):
        raise MemvecError(UNKNOWN_DEVICE.format(device))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise MemvecError("this machine has no usable GPU: use --device cpu.")
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "bfloat16"
    if where.type == "cpu":
        keep_freed_memory()
    with _quiet():
        big = loading_options(device_map, quantize, DTYPES[dtype], where)
    local = _local_folder(name)
    source = str(local) if local is not None else name
    if local is not None and revision is not None:
        raise MemvecError(f"{name} is a folder here: only models of the Hub have a --revision.")
    with _loading(name), _quiet():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        config = AutoConfig.from_pretrained(source, revision=revision)
        _refuse_other_tasks(name, config)
        kernel = {"attn_implementation": attention} if attention else {}
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=DTYPES[dtype],
            output_loading_info=True,
            **kernel,
            **big,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        if not big:
            model = model.to(where)
    if missing := sorted(info["missing_keys"]):
        raise MemvecError(
            f"{name} has no weights for {len(missing)} tensors of a causal LM "
            f"(first: {missing[0]}), so its logits would be noise: is it another kind of model?"
        )
    if where.type == "cpu" and DTYPES[dtype] != torch.float32 and attention is None:
        widen_attention(model)
    lm = FrozenLM(
        model,
        tokenizer,
        name=name,
        revision=revision or getattr(config, "_commit_hash", None),
        folder=local,
        check=check,
        quantize=quantize,
        checkpointing=checkpointing,
        offload=offload,
    )
    if encoder is not None:
        lm.read_encoder(Path(encoder).expanduser())
    return lm


def _spread(logits: Float[Tensor, "n V"]) -> float:
    """Mean over positions of the standard deviation over the columns that are not masked."""
    kept = [row[row > -1e4] for row in logits]  # a model that is refused may have none
    return sum(float(row.std()) for row in kept if len(row) > 1) / len(kept) or 1.0


def _local_folder(name: str) -> Path | None:
    """The model's folder, or None for a Hub id. 'pocket' is a folder of the package."""
    try:
        folder = POCKET if name == "pocket" else Path(name).expanduser()
    except RuntimeError:
        raise MemvecError(f"no model in {name}: there is no such home folder.") from None
    looks_local = name == "pocket" or name.startswith((".", "/", "~")) or folder.exists()
    if not looks_local:
        return None
    if not (folder / "config.json").is_file():
        raise MemvecError(f"no model in {folder}: there is no config.json.")
    return folder


def _refuse_other_tasks(name: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made_for = ", ".join(getattr(config, "architectures", None) or ["?"])
    if getattr(config, "is_encoder_decoder", False):
        raise MemvecError(
            f"{name} is an encoder-decoder ({made_for}); memvec needs a decoder-only causal LM."
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "MaskedLM" in made_for:
        raise MemvecError(f"{name} is a {config.model_type} ({made_for}), not a causal LM.")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn the many ways in which loading fails into one sentence each."""
    try:
        yield
    except MemvecError:
        raise
    # A stranger's configuration goes into a stranger's constructor: anything may be raised.
    except Exception as error:
        reason = str(error).strip()
        first = reason.splitlines()[0] if reason else type(error).__name__
        if out_of_memory(error):
            raise MemvecError(
                f"{name} does not fit in the memory of the device: use device_map='auto' or "
                "quantize (on the command line: --load device_map=auto, --load quantize=4bit)."
            ) from error
        if isinstance(error, ImportError):
            raise MemvecError(f"{name} needs a package that is missing: {first}") from error
        if any(word in reason for word in ("couldn't connect", "offline", "Connection", "resolve")):
            raise MemvecError(
                f"{name} is not a folder here and the Hub could not be reached: "
                "check the name and the network, or give a local folder."
            ) from error
        if "is not a valid model identifier" in reason or "Repository Not Found" in reason:
            raise MemvecError(
                f"{name} is neither a folder nor a model on the Hub: check the name "
                "(private models need a login)."
            ) from error
        if "no file named" in reason or "does not appear to have a file named" in reason:
            raise MemvecError(
                f"{name} has no weights that transformers can load: {first}"
            ) from error
        raise MemvecError(f"{name} could not be loaded: {first}") from error


@contextlib.contextmanager
def _answering(name: str) -> Iterator[None]:
    """A model that cannot even read tokens is refused in a sentence, whatever it raises."""
    try:
        yield
    except Exception as error:  # its code is not ours: any kind of error is its answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MemvecError(
            f"{name} cannot be crammed: its own forward on plain tokens fails ({reason})."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no remarks while weights load; all put back afterwards.

    What is wrong is raised. The remarks are those of packages that transformers imports because
    they are there (torchao, on kernels for other machines), and its report on weights.
    """
    from transformers.utils import logging as reports

    bars, disabled = reports.is_progress_bar_enabled(), logging.root.manager.disable
    reports.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        if bars:
            reports.enable_progress_bar()


def _context_length(config: Any) -> int | None:
    """Longest input in positions; None for models without a limit (Mamba)."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        length = getattr(config, key, None)
        if isinstance(length, int) and 0 < length < 10**9:
            return length
    return None


def _start_token(config: Any, tokenizer: Any, rows: int) -> int | None:
    """The token that starts a text: BOS, else the end-of-text token that separates documents."""
    candidates = [
        getattr(tokenizer, "bos_token_id", None),
        getattr(config, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
    ]
    for token in candidates:
        if isinstance(token, list):
            token = token[0] if token else None
        if isinstance(token, int) and 0 <= token < rows:
            return token
    return None


Head = Callable[[Tensor], Tensor]


@torch.no_grad()
def _split(model: nn.Module, embedding: nn.Module) -> tuple[nn.Module | None, Head]:
    """The model's body and a head that together equal its own forward, or (None, identity).

    Families add a scale (Cohere, Granite) or a soft cap (Gemma 2) after the linear head; each
    candidate is tried on a probe and taken only if the logits agree.
    """
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(body, nn.Module) or body is model or linear is None:
        return None, lambda states: states
    config: Any = model.config
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    heads: list[Head] = [linear]
    if isinstance(scale, int | float):
        heads.append(lambda states: linear(states) * scale)
    if isinstance(divisor, int | float):
        heads.append(lambda states: linear(states) / divisor)
    if isinstance(cap, int | float):
        heads.append(lambda states: torch.tanh(linear(states) / cap) * cap)
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    inputs = embedding(torch.arange(1, 6, device=weight.device)[None] % len(weight))
    try:
        states = body(inputs_embeds=inputs, use_cache=False)[0]
        truth = model(inputs_embeds=inputs, use_cache=False).logits.float()
        for head in heads:
            if torch.allclose(head(states).float(), truth, rtol=1e-3, atol=1e-3):
                return body, head
    except Exception:  # the body asks for something else: use the whole, whose checks give reasons
        pass
    return None, lambda states: states
