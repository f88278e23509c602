"""The corpus, its tokenizer, and the batches of token ids that a training step takes from it.

Notable:
- a corpus is a parquet file with a `text` column (the columns `novel` and `split` are used if they
  exist), or a folder of .txt files. Without `split`, one text in 16 is held out, by a hash of its
  name;
- the tokenizer is byte-level BPE without normaliser, prefix space or added tokens, so that every
  UTF-8 text is decoded to the same bytes;
- the batches of step n depend on (seed, n) only. A run that is stopped and resumed, and the plain
  twin (docs/concepts.md), read the same ordinary tokens in the same order.

Other programs import this module; it is not run.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kept import digest, refuse_others, write
from memvec.errors import MemvecError

BOS, EOS = 0, 1
VOCABULARY = "tokenizer.json"


def read_texts(path: Path) -> pd.DataFrame:
    """A table with a row for each text: name, split ("train" or "valid"), text."""
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        texts = [f.read_bytes().decode() for f in files]  # read_text would change CRLF
        frame = pd.DataFrame({"name": [f.stem for f in files], "text": texts})
    else:
        if not path.exists():
            raise MemvecError(f"there is no {path}: give --corpus, a parquet file or a folder.")
        frame = pd.read_parquet(path)
        if "text" not in frame:
            raise MemvecError(f"--corpus {path}: no column 'text'; it has {list(frame.columns)}.")
        frame["name"] = frame["novel"] if "novel" in frame else frame.index.astype(str)
    if "split" not in frame:
        digests = [hashlib.sha256(str(name).encode()).digest()[0] for name in frame["name"]]
        frame["split"] = ["valid" if digest < 16 else "train" for digest in digests]
    for split in ("train", "valid"):
        if not (frame["split"] == split).any():
            raise MemvecError(f"--corpus {path}: no text in split '{split}'; give more texts.")
    return frame[["name", "split", "text"]]


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """A byte-level BPE with <s> (0), </s> (1), all 256 bytes, and merges learnt from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenized(tokenizer: Tokenizer, texts) -> np.ndarray:
    """The ids (N,) of texts, with </s> after each one."""
    pieces = []
    for text in texts:
        # 100 000 characters at a time: the encodings of a novel take a hundred times its size in
        # memory
        spans = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
        for encoding in tokenizer.encode_batch_fast(spans):
            pieces.append(np.array(encoding.ids, dtype=np.uint16))
        pieces.append(np.array([EOS], dtype=np.uint16))
    return np.concatenate(pieces)


def _made_of(corpus: Path, vocabulary: Path, vocab_size: int) -> dict:
    """Everything that the token streams depend on, as a record."""
    record = {"corpus": f"SHA-256 {digest(corpus)[:16]}", "vocab_size": vocab_size}
    if vocabulary.exists():
        record["tokenizer"] = f"SHA-256 {digest(vocabulary)[:16]}"
    return record


def _refuse_other_text(corpus: Path, work: Path, vocab_size: int) -> None:
    """Raise MemvecError if the streams in `work` are not those of this corpus and vocabulary."""
    record = work / "text.json"
    if not record.exists():
        raise MemvecError(
            f"{work} does not say of which corpus its text is: delete train.npy and valid.npy "
            "there to make them again of the same one, or use another --work."
        )
    if not corpus.exists():
        print(f"there is no {corpus}: using the text in {work}", file=sys.stderr)
        return
    recorded, requested = (
        json.loads(record.read_text()),
        _made_of(corpus, work / VOCABULARY, vocab_size),
    )
    refuse_others(f"the text in {work}", recorded, requested, "use another --work")


def prepare(corpus: Path, work: Path, vocab_size: int):
    """Make the tokenizer and the token streams, or read them from `work` if they exist.

    A tokenizer.json in `work` is used, and no other one is trained. text.json records of what the
    streams were made; the program ends if they are not of this corpus and vocabulary size.
    Returns the tokenizer and {"train", "valid"}: ids (N,), with </s> after each text.
    """
    work.mkdir(parents=True, exist_ok=True)
    vocabulary, record = work / VOCABULARY, work / "text.json"
    streams = {split: work / f"{split}.npy" for split in ("train", "valid")}
    complete = all(path.exists() for path in (vocabulary, *streams.values()))
    if complete or record.exists():
        _refuse_other_text(corpus, work, vocab_size)
    if not complete:
        frame = read_texts(corpus)
        if not vocabulary.exists():
            texts = frame[frame["split"] == "train"]["text"]
            train_tokenizer(texts, vocab_size).save(str(vocabulary))
        tokenizer = Tokenizer.from_file(str(vocabulary))
        for split, path in streams.items():
            unfinished = path.with_suffix(".part.npy")
            np.save(unfinished, tokenized(tokenizer, frame[frame["split"] == split]["text"]))
            unfinished.replace(path)
        write(record, _made_of(corpus, vocabulary, vocab_size))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    return tokenizer, {
        split: torch.from_numpy(np.load(path).astype(np.int64)) for split, path in streams.items()
    }


def generator(seed: int, purpose: str, step: int, device: str = "cpu") -> torch.Generator:
    """A generator whose random numbers depend on the arguments only."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def windows(stream, count: int, length: int, rng) -> torch.Tensor:
    """`count` spans (count, length) from random places of the stream (N,)."""
    starts = torch.randint(len(stream) - length, (count, 1), generator=rng)
    return stream[starts + torch.arange(length)]


def ordinary_batch(stream, tokens: int, length: int, rng) -> torch.Tensor:
    """Crops (B, length) of ordinary text with B·length ≈ tokens. About half begin with <s>."""
    crops = windows(stream, tokens // length, length, rng)
    with_bos = torch.rand(len(crops), generator=rng) < 0.5
    crops[with_bos] = torch.cat(
        (torch.full((int(with_bos.sum()), 1), BOS), crops[with_bos, :-1]), dim=1
    )
    return crops


def passage_batch(stream, count: int, length: int, odd_share: float, vocab_size: int, rng):
    """Draw `count` passages of `length` tokens. Returns ids (B, T) and how many of them are odd.

    Odd passages are not running text; they come last. The model learns from them to give back text
    that is unlike the corpus. A third has uniformly random tokens, a third has tokens of the corpus
    drawn one by one, and a third is passages with their tokens shuffled.
    """
    passages = windows(stream, count, length, rng)
    third_size = int(count * odd_share) // 3
    first_random, first_drawn, first_shuffled = (
        count - 3 * third_size,
        count - 2 * third_size,
        count - third_size,
    )
    passages[first_random:first_drawn] = torch.randint(
        2, vocab_size, (third_size, length), generator=rng
    )
    passages[first_drawn:first_shuffled] = stream[
        torch.randint(len(stream), (third_size, length), generator=rng)
    ]
    order = torch.rand(third_size, length, generator=rng).argsort(1)
    passages[first_shuffled:] = passages[first_shuffled:].gather(1, order)
    return passages, 3 * third_size
