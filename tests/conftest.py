"""Tiny models of every architecture, a tiny tokenizer, and a folder that the command can load."""

from __future__ import annotations

import functools
import gc
import os
import runpy
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download a model
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Output has 80 columns and no colours, whatever the terminal is and a CI asks for.
os.environ |= {"COLUMNS": "80", "TERM": "xterm"}
COLOURS = {"FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR", "PY_COLORS"}
for name in COLOURS | {"TERMINAL_WIDTH", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}:
    os.environ.pop(name, None)
gc.disable()  # during the imports, of whose time collections would take a quarter

import jaxtyping
import pytest
import torch
import transformers
import typer
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers.pytorch_utils import Conv1D

import preloaded
import support
import typechecks  # before memvec is imported
from memvec.cramming.recipe import Recipe
from memvec.errors import SlowPathWarning
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.usable import certificate

# The folders of tests are made here if there is room (bytes). On a disk, tests wait for the many
# files that are flushed and deleted.
IN_MEMORY, ROOM = "/dev/shm", 2 * 2**30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models", type=Path, help="write docs/models.md from the family tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shows(column): a property of docs/models.md")
    config.addinivalue_line("markers", "slow: left out of `make check`, part of `make test`")
    if (path := config.getoption("--models")) is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(support.Writer(path))
    if not hasattr(config, "workerinput"):  # one for all of xdist's workers
        cache = tempfile.TemporaryDirectory(prefix="memvec-data-sets-")
        os.environ["HF_DATASETS_CACHE"] = cache.name  # not in the user's home folder
        config.add_cleanup(cache.cleanup)
        os.environ["MEMVEC_TEST_PYTHON"], end = preloaded.begin()
        config.add_cleanup(end)
        if os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > ROOM:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", IN_MEMORY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as slow: those of most families, and those of a whole study.

    `make check` runs a test over families with the few that differ most: outside of
    test_families.py, an attention model and a recurrent one. A test with the fixture 'study' or
    'done' needs a whole study, which takes long.
    """
    for item in items:
        if {"study", "done"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        parameters = getattr(item, "callspec", None)
        family = parameters.params.get("family") if parameters is not None else None
        few = IN_EVERY_CHECK if item.path.name == "test_families.py" else IN_OTHER_FILES
        if family in FAMILIES | ALSO and family not in few:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Count calls anew in each test, so that the first calls of each function are checked.

    A test draws the same random numbers alone and after others. They are not those of the
    generators of tests, whose seeds are small.
    """
    typechecks.calls.clear()
    torch.manual_seed(1_000_003)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Turn collections on again, without the objects of the imports, which are many and stay.

    Collections are rarer than by default, where they take a twentieth of the time of tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


@pytest.fixture(autouse=True)
def _shown(request: pytest.FixtureRequest, record_property: Callable[..., None]) -> None:
    """Add the claim of a test (column, family) to its report, from which the page is written."""
    if (marker := request.node.get_closest_marker("shows")) is not None:
        record_property("shows", (marker.args[0], request.node.callspec.params["family"]))


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """Leave torch's threads, the environment and the hooks for errors and SIGTERM as they were.

    A program of recipes/ sets the first: two processes of tests with two threads each on two cores
    take three to four times as long. The command and Ray set the others.
    """
    threads, hook, variables = torch.get_num_threads(), sys.excepthook, dict(os.environ)
    ended = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, ended)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    sys.excepthook = hook
    if os.environ.keys() != variables.keys() or any(
        os.environ[name] != value
        for name, value in variables.items()
        if name != "PYTEST_CURRENT_TEST"
    ):
        os.environ.clear()
        os.environ.update(variables)


V = 24  # few tokens, so that any short passage of a random model decodes from some vector
STD = {"embedding": 0.2, "linear": 0.35, "head": 0.3}  # large, so that a vector changes the logits
MODEL = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
UNLIMITED = {k: v for k, v in MODEL.items() if k != "max_position_embeddings"}
GROUPED = MODEL | {"num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
SLIDING = {"sliding_window": 5}  # shorter than the passages
EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
}

# family -> (configuration class, its options)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "gpt-neox": ("GPTNeoXConfig", MODEL),
    "opt": ("OPTConfig", MODEL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-projected": ("OPTConfig", MODEL | {"ffn_dim": 48, "word_embed_proj_dim": 24}),
    "gpt2": ("GPT2Config", MODEL | GPT),
    "mamba": ("MambaConfig", UNLIMITED | {"state_size": 8}),
    "gpt-neo": (
        "GPTNeoConfig",
        MODEL | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "mistral": ("MistralConfig", GROUPED | SLIDING),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED),
    "gemma": ("GemmaConfig", GROUPED),
    "gemma2": ("Gemma2Config", GROUPED | SLIDING | {"final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", GROUPED | SLIDING | {"query_pre_attn_scalar": 8}),
    "llama3.2": (
        "LlamaConfig",
        GROUPED
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "smollm3": ("SmolLM3Config", GROUPED | {"no_rope_layers": [1, 0]}),
    "phi": ("PhiConfig", MODEL),
    "phi3": ("Phi3Config", GROUPED | SLIDING | {"pad_token_id": 1}),
    "stablelm": ("StableLmConfig", MODEL | {"num_key_value_heads": 2}),
    "falcon": ("FalconConfig", MODEL | {"alibi": False}),
    "falcon-alibi": ("FalconConfig", MODEL | {"alibi": True, "new_decoder_architecture": False}),
    "bloom": ("BloomConfig", MODEL | {"n_head": 4, "n_layer": 2}),
    "mpt": ("MptConfig", MODEL | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "granite": ("GraniteConfig", GROUPED | {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "cohere": ("CohereConfig", GROUPED | {"logit_scale": 2.0}),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "mamba2": (
        "Mamba2Config",
        MODEL | {"state_size": 8, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon-h1": (
        "FalconH1Config",
        GROUPED
        | {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "jamba": (
        "JambaConfig",
        GROUPED
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "pad_token_id": 1,
        },
    ),
}

IN_EVERY_CHECK = {"llama", "gpt2", "mamba", "gemma3"}
IN_OTHER_FILES = {"llama", "mamba"}

LINEAR = GROUPED | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

# Further families, which docs/models.md lists without columns; they have a shorter test.
ALSO: dict[str, tuple[str, dict[str, Any]]] = {
    "openai-gpt": ("OpenAIGPTConfig", MODEL | GPT),
    "gptj": ("GPTJConfig", MODEL | GPT | {"rotary_dim": 4}),
    "gpt-bigcode": ("GPTBigCodeConfig", MODEL | GPT),
    "cohere2": ("Cohere2Config", GROUPED | SLIDING),
    "deepseek-v3": (
        "DeepseekV3Config",
        UNLIMITED
        | EXPERTS
        | {
            "max_position_embeddings": 128,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        GROUPED | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe": ("OlmoeConfig", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm4": ("Glm4Config", GROUPED | {"pad_token_id": 1}),
    "nemotron": ("NemotronConfig", GROUPED),
    "ernie4.5": ("Ernie4_5Config", GROUPED),
    "exaone4": ("Exaone4Config", GROUPED | SLIDING),
    "helium": ("HeliumConfig", GROUPED),
    "lfm2": ("Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "seed-oss": ("SeedOssConfig", GROUPED),
    "arcee": ("ArceeConfig", GROUPED),
    "olmo3": ("Olmo3Config", GROUPED | SLIDING),
    "glm4-moe": (
        "Glm4MoeConfig",
        GROUPED | EXPERTS,
    ),
    "bitnet": ("BitNetConfig", GROUPED),
    "hunyuan": ("HunYuanDenseV1Config", GROUPED),
    "nemotron-h": (
        "NemotronHConfig",
        GROUPED
        | {
            "hybrid_override_pattern": "M*",
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "persimmon": ("PersimmonConfig", MODEL),
    "diffllama": ("DiffLlamaConfig", GROUPED),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "apertus": ("ApertusConfig", GROUPED),
    "doge": ("DogeConfig", GROUPED),
    "minimax": (
        "MiniMaxConfig",
        GROUPED
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "qwen3-next-linear": (  # no full attention, whose cache gives the length to a cached forward
        "Qwen3NextConfig",
        LINEAR | {"layer_types": ["linear_attention", "linear_attention"]},
    ),
    "rwkv": ("RwkvConfig", MODEL | {"attention_hidden_size": 32, "context_length": 128}),
    "xlstm": (
        "xLSTMConfig",
        {k: v for k, v in UNLIMITED.items() if "attention" not in k and "intermediate" not in k}
        | {"num_heads": 4},
    ),
    "xglm": (
        "XGLMConfig",
        {k: v for k, v in MODEL.items() if k not in ("hidden_size", "num_hidden_layers")}
        | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    ),
    "gemma4": (  # heads of two sizes; no token embeddings in each layer
        "Gemma4TextConfig",
        GROUPED
        | SLIDING
        | {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16}
        | {"hidden_size_per_layer_input": 0, "final_logit_softcapping": 3.0},
    ),
    "vaultgemma": ("VaultGemmaConfig", GROUPED | SLIDING | {"query_pre_attn_scalar": 8}),
    "xlm": (
        "XLMConfig",
        {"vocab_size": V, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True}
        | {"max_position_embeddings": 128},
    ),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        GROUPED
        | {"block_types": ["recurrent", "attention"], "attention_window_size": 5, "lru_width": 32},
    ),
    "reformer": (
        "ReformerConfig",
        {"vocab_size": V, "hidden_size": 32, "is_decoder": True, "num_attention_heads": 4}
        | {"attention_head_size": 8, "feed_forward_size": 48, "attn_layers": ["local", "local"]}
        | {"axial_pos_embds": False, "max_position_embeddings": 128},
    ),
}

# Families that are decoded without a cache under the installed transformers, and why.
WITHOUT_CACHE: dict[str, str] = {
    "openai-gpt": "GPT keeps none",
    "recurrent-gemma": "keeps its states inside its own layers",
    "xlm": "XLM keeps none",
    "rwkv": "its cached decoding disagrees with its own forward",
    "xlstm": "its forward with a cache fails",
    "qwen3-next-linear": "its forward with a cache fails",
    "minimax": "its cached decoding disagrees with its own forward",
}
# Families that pass the self-checks only with newer releases of transformers: release, and why.
SERVED_SINCE = {"doge": ("5.18", "a later token changed an earlier prediction")}
TOO_NEW = {
    family
    for family, (release, _) in SERVED_SINCE.items()
    if Version(transformers.__version__) < Version(release)
}


def build(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny random model of a family; the same seed gives the same weights."""
    name, options = (FAMILIES | ALSO)[family]
    config = getattr(transformers, name)(**(options | changes))
    torch.manual_seed(seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    head: nn.Module = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, STD["embedding"])
            elif isinstance(module, nn.Linear | Conv1D) and not (module is head and tied):
                module.weight.normal_(0, STD["head" if module is head else "linear"])
    return model.eval()


@functools.cache
def tiny(family: str = "llama", dtype: str = "float32", seed: int = 0) -> FrozenLM:
    """A frozen tiny model, built once for all tests, which must not change it.

    A test that sets an attribute sets it on a copy. After `monkeypatch`, pytest before 9 leaves a
    method on an object, bound to it, and views of the model would inherit it.
    """
    model = build(family, seed).to(getattr(torch, dtype))
    with warnings.catch_warnings():  # tests/test_caching.py tests them
        warnings.simplefilter("ignore", SlowPathWarning)
        return FrozenLM(model, name=f"tiny-{family}")


def one_step(lm: FrozenLM) -> FrozenLM:
    """A model that reads two vectors as [e, m, ..., m]."""
    return lm.read_as("one-step")


def passages(*lengths: int, seed: int = 0, vocabulary: int = V) -> list[Passage]:
    """Random passages of these lengths, one document each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Passage(tuple(torch.randint(2, vocabulary, (n,), generator=generator).tolist()), i)
        for i, n in enumerate(lengths)
    ]


# ---------------------------------------------------------------------- models that read text

TRAINED_ON = "the quick brown fox jumps over the lazy dog and the cat sat on the mat " * 20
SPECIAL = ["<s>", "</s>"]


def fast(tokenizer: Tokenizer, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of transformers, with BOS and EOS."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options
    )


@functools.cache
def byte_tokenizer(merges: int = 42) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, which decodes every text to the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL) + merges,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINED_ON], trainer)
    return fast(tokenizer)


@functools.cache
def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each known word, [UNK] for others; it lowers the case and drops white space."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator([TRAINED_ON], trainer)
    return fast(tokenizer, unk_token="[UNK]")


@functools.cache
def reader(kind: str = "bytes", seed: int = 0, **changes: Any) -> FrozenLM:
    """A tiny Llama with a tokenizer: 'bytes' or 'words'."""
    tokenizer = byte_tokenizer() if kind == "bytes" else word_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = build("llama", seed, **(sizes | ids | {"head_dim": 16} | changes))
    return FrozenLM(model, tokenizer, name=f"tiny-{kind}")


def refusal(program: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a program that refuses its `sys.argv` says: one sentence, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(program), run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("memvec: ")
    return said


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer in the format of Hugging Face."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    lm = reader()
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def every_protocol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study of every protocol in 'out'; tests take copies of it."""
    import studies

    base = tmp_path_factory.mktemp("every-protocol")
    studies.run(studies.spec_in(base), base, base / "out", studies.EVERYTHING)
    return base


@pytest.fixture(scope="module")
def few_words() -> Iterator[None]:
    """Certificates of use have queries of 4 tokens instead of 48, for tests of other properties.

    All tests of a file name it, so that each gives the same result alone and after the others.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "TOKENS", 4)
        yield


@pytest.fixture
def untyped() -> Iterator[None]:
    """No signature is type-checked, as outside of tests, so that memvec's own errors are raised."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# ---------------------------------------------------------------------- programs


@pytest.fixture(scope="session")
def python() -> str:
    """The path of a Python that has torch imported already (tests/preloaded.py)."""
    return os.environ["MEMVEC_TEST_PYTHON"]


@pytest.fixture(scope="session")
def memvec_with_ray(python: str) -> list[str]:
    """The words that start `memvec` in a Python that has torch imported already, as its workers do.

    The program first writes its process id to standard error. A Ray older than the locked one gives
    forked workers no name, by which tests find them, so it gets the interpreter itself.
    """
    if Version(version("ray")) < Version("2.60"):
        python = sys.executable
    code = "import os, sys; print(os.getpid(), file=sys.stderr)"
    return [python, "-c", f"{code}; from memvec.cli import main; main()"]


# ---------------------------------------------------------------------- the command line


command_of = functools.cache(typer.main.get_command)


class Ran:
    """The exit code, standard output and standard error of a run of the command."""

    def __init__(self, code: int, out: bytes, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def sentence(self) -> str:
        """The last line on standard error, where an error is printed."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Iterator[Callable[..., Ran]]:
    """Run `memvec` in this process, through its own entry point.

    typer builds the command once for all tests, because that takes longer than many verbs.
    """
    from memvec import cli

    monkeypatch.setattr("typer.main.get_command", command_of)

    def run(*words: object) -> Ran:
        capfdbinary.readouterr()
        monkeypatch.setattr("sys.argv", ["memvec", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfdbinary.readouterr()
        return Ran(code, captured.out, captured.err.decode())

    return run  # type: ignore[return-value]


QUICK = Recipe(steps=600, patience=600)
