"""The models, vectors and prompts of benchmarks/engines.py."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import memvec
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.engines import Prompt
from memvec.engines.decode import passage_prompts
from memvec.export.target import embedded
from memvec.header import DocumentRecord, Header, PassageRecord
from memvec.loading import POCKET, load_lm
from memvec.machine import environment
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage, ids_hash
from memvec.storage import STORAGES
from memvec.vectors import MemVectors

V, EOS = 64, 1
LENGTHS = {1: 3, 2: 5, 8: 10}  # tokens of a passage, by K
PASSAGES = 16  # for each K and start rule
# Start rules of decoding.
RULES = ("vectors", "bos", "first-token")
# Usable vectors: K, tokens of a passage, passages.
USE_VECTORS, USE_TOKENS, USE_PASSAGES = 4, 8, 4
QUESTION_TOKENS, ANSWER_TOKENS = 40, 8
EXAMPLES = Path(__file__).parent.parent / "examples"
# Questions after the vectors of each passage. In float32 they are the first ones of the candidates.
# In bfloat16 they are those whose answers have the largest leads, because rounding decides the
# others (docs/engines.md).
QUESTIONS, CANDIDATES = 4, 128
# Heads have 32 dimensions, the fewest that the CPU kernels of vLLM support.
SHAPE = {
    "vocab_size": V,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "smollm3": "SmolLM3Config",
}


@dataclass(frozen=True)
class Group:
    """Prompts of one K and start rule, with the hashes of the expected answers.

    Each way of asking for a group is one cell.
    """

    K: int
    rule: str  # a start rule, or 'use'
    prompts: list[Prompt]
    begins: list[list[int]]  # ids in front of each answer when it is hashed
    hashes: list[str]
    eos: bool  # whether a passage contains the model's EOS
    leads: list[float]  # for 'use': the smallest lead of each expected answer


def folder_of(family: str, work: Path) -> Path:
    """The folder of a tiny random model of a family, which is made once, or of `pocket`."""
    if family == "pocket":
        return POCKET
    folder = work / f"tiny-{family}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = getattr(transformers, FAMILIES[family])(**SHAPE)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2:  # large weights, so that a vector changes the logits
                    weight.normal_(0, 0.2 if "embed" in name else 0.3)
        model.save_pretrained(folder)
    return folder


def lm_of(family: str, dtype: str, folder: Path) -> FrozenLM:
    """The model in a dtype."""
    if family == "pocket":
        return load_lm("pocket", dtype=dtype, device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return FrozenLM(model.eval(), name=f"tiny-{family}")


def passages_of(lm: FrozenLM, K: int) -> list[Passage]:
    """Random passages over the model's vocabulary; the first holds its EOS."""
    generator = torch.Generator().manual_seed(K)
    vocabulary = lm.embedding.weight.shape[0]
    passages = []
    for i in range(PASSAGES):
        ids = torch.randint(2, vocabulary, (LENGTHS[K],), generator=generator).tolist()
        if i == 0:
            ids[len(ids) // 2] = EOS
        passages.append(Passage(tuple(ids), i))
    return passages


def crammed(
    lm: FrozenLM, recipe: Recipe, K: int, passages: list[Passage], path: Path
) -> MemVectors:
    """Vectors of the passages that became exact; they are crammed once and stored at `path`."""
    if path.is_file():
        mem = MemVectors.load(path)
        mem.check_model(lm)
        return mem
    dtype = str(lm.dtype).removeprefix("torch.")
    engine = Engine(lm, recipe, vectors=K, storage=STORAGES[dtype], batch_size=PASSAGES)
    exact_outcomes = [
        outcome
        for outcome in sorted(engine.run(passages), key=lambda outcome: outcome.passage.document)
        if outcome.exact
    ]
    records = [
        PassageRecord(
            **outcome.result.model_dump(),
            sha256=ids_hash(outcome.passage.ids),
            first=outcome.passage.ids[0] if recipe.start_rule == "first-token" else None,
        )
        for outcome in exact_outcomes
    ]
    empty = hashlib.sha256(b"").hexdigest()
    header = Header(
        model=lm.description(),
        start_rule=recipe.start_rule,
        recipe=recipe.record(),
        environment=environment(),
        documents=[DocumentRecord(name="ids", sha256=empty, size=1, passages=len(records))],
        passages=records,
    )
    mem = MemVectors(torch.stack([outcome.vectors for outcome in exact_outcomes]), header)
    mem.save(path)
    return mem


def groups_of(family: str, lm: FrozenLM, Ks: list[int], work: Path) -> list[Group]:
    """The prompts of every K and start rule, and of usable vectors."""
    dtype = str(lm.dtype).removeprefix("torch.")
    groups = []
    for K in Ks:
        for rule in RULES:
            recipe = Recipe.of(start_rule=rule, steps=800, patience=800)
            passages = passages_of(lm, K)
            mem = crammed(lm, recipe, K, passages, work / f"{family}-{dtype}-{K}-{rule}.mem")
            prompts, begins = passage_prompts(mem, lm)
            hashes = [p.sha256 for p in mem.passages]
            eos = ids_hash(passages[0].ids) in hashes
            groups.append(Group(K, rule, prompts, begins, hashes, eos, []))
    return [*groups, use_group(family, lm, work)]


def use_group(family: str, lm: FrozenLM, work: Path) -> Group:
    """Questions after usable vectors; the expected answers are those of memvec's own decoder."""
    dtype = str(lm.dtype).removeprefix("torch.")
    recipe = Recipe.of("usable", settle=100, steps=400, patience=400)
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.embedding.weight.shape[0]

    def random(n: int) -> list[int]:
        return torch.randint(2, vocabulary, (n,), generator=generator).tolist()

    has_text = family == "pocket"
    ids = lm.tokenize(_text()) if has_text else random(USE_TOKENS * USE_PASSAGES)
    passages = [
        Passage(tuple(ids[at * USE_TOKENS : (at + 1) * USE_TOKENS]), at)
        for at in range(USE_PASSAGES)
    ]
    mem = crammed(lm, recipe, USE_VECTORS, passages, work / f"{family}-{dtype}-use.mem")
    questions_file = work / f"{family}-{dtype}-use.json"
    if not questions_file.is_file():
        random_ones = [random(QUESTION_TOKENS) for _ in range(CANDIDATES)]
        chosen = _chosen(lm, mem, _questions(lm) if has_text else random_ones, has_text)
        questions_file.write_text(json.dumps(chosen), encoding="utf-8")
    prompts, hashes, leads = [], [], []
    for question in json.loads(questions_file.read_text(encoding="utf-8")):
        vectors = mem.vectors[question["passage"]].to(lm.dtype).float()
        after = embedded(question["question"], lm).float()
        prompts.append(
            Prompt(vectors, question["question"], ANSWER_TOKENS, after, question["text"])
        )
        hashes.append(ids_hash(question["answer"]))
        leads.append(question["lead"])
    return Group(USE_VECTORS, "use", prompts, [[] for _ in prompts], hashes, False, leads)


def _chosen(
    lm: FrozenLM, mem: MemVectors, questions: list[list[int]], has_text: bool
) -> list[dict[str, Any]]:
    """The questions after each passage's vectors, with memvec's own answers and their leads."""
    chosen = []
    for i, vectors in enumerate(mem.vectors):
        vectors_in_dtype, selected = vectors.to(lm.dtype), questions[i * QUESTIONS :][:QUESTIONS]
        if lm.dtype != torch.float32:
            _, leads = answered(lm, vectors_in_dtype, questions)
            best = sorted(range(len(questions)), key=lambda q: -leads[q])[:QUESTIONS]
            selected = [questions[q] for q in best]
        for tokens in selected:
            # One question at a time, as in `memvec.use`: another batch shape rounds differently.
            (answer,), (smallest_lead,) = answered(lm, vectors_in_dtype, [tokens])
            text = lm.text(tokens) if has_text else None
            if text is not None:
                _same_as_use(lm, mem, i, text, answer)
            record = {"passage": i, "question": tokens, "text": text}
            chosen.append({**record, "answer": answer, "lead": round(smallest_lead, 4)})
    return chosen


def _text() -> str:
    return (EXAMPLES / "harbour.txt").read_text(encoding="utf-8")


def _questions(lm: FrozenLM) -> list[list[int]]:
    """Pieces of an example text. The text of each is tokenized to the same tokens again."""
    ids = lm.tokenize(_text())[USE_TOKENS * USE_PASSAGES :]
    step = max(1, (len(ids) - QUESTION_TOKENS) // (2 * CANDIDATES))
    pieces = [ids[at : at + QUESTION_TOKENS] for at in range(0, len(ids) - QUESTION_TOKENS, step)]
    return [piece for piece in pieces if lm.tokenize(lm.text(piece)) == piece][:CANDIDATES]


@torch.no_grad()
def answered(
    lm: FrozenLM, vectors: torch.Tensor, questions: list[list[int]]
) -> tuple[list[list[int]], list[float]]:
    """(memvec's answers after vectors (K, D) and questions, smallest lead in each answer).

    The lead of a token is its logit minus the next largest one, in standard deviations of the
    logits.
    """
    prompts = torch.stack([torch.cat([vectors, embedded(tokens, lm)]) for tokens in questions])
    answers = decode_ids(lm, prompts, [ANSWER_TOKENS] * len(prompts))
    written = torch.stack([embedded(answer[:-1], lm) for answer in answers])
    inputs = torch.cat([prompts, written], 1)
    logits = lm.model(inputs_embeds=inputs, use_cache=False).logits[:, -ANSWER_TOKENS:].float()
    best = logits.topk(2, dim=-1).values
    leads = ((best[..., 0] - best[..., 1]) / logits.std(-1)).amin(-1)
    return answers, leads.tolist()


def _same_as_use(lm: FrozenLM, mem: MemVectors, i: int, text: str, answer: list[int]) -> None:
    """Raise RuntimeError if `memvec.use` writes anything else than the answer up to an EOS."""
    ends = [at for at, token in enumerate(answer) if token == EOS]
    expected = lm.text(answer[: ends[0]] if ends else answer)
    if memvec.use(lm, mem, text, passages=[i], max_new_tokens=ANSWER_TOKENS) != expected:
        raise RuntimeError(f"memvec.use and its decoder differ on passage {i}: {text!r}")


def plain_prompts(lm: FrozenLM, lengths: set[int]) -> list[Prompt]:
    """Prompts without vectors, for batches that mix them with prompts with vectors."""
    generator = torch.Generator().manual_seed(5)
    vocabulary = lm.embedding.weight.shape[0]
    return [
        Prompt(None, torch.randint(2, vocabulary, (n,), generator=generator).tolist(), 6)
        for n in (*sorted(lengths), 3, 7, 12)
    ]


def lead(lm: FrozenLM, prompt: Prompt, right: list[int], wrong: int) -> float:
    """How far the right token leads the wrong one after a prompt and its right tokens so far.

    In standard deviations of the logits, as memvec's own forward pass has them.
    """
    parts: list[Any] = [prompt.vectors] if prompt.vectors is not None else []
    parts.append(embedded([*prompt.tokens, *right[:-1]], lm).float())
    with torch.no_grad():
        inputs = torch.cat(parts)[None].to(lm.dtype)
        logits = lm.model(inputs_embeds=inputs, use_cache=False).logits[0, -1].float()
    return float((logits[right[-1]] - logits[wrong]) / logits.std())
