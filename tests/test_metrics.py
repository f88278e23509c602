"""Every metric against a second, slow computation: float64 loops in plain Python, in bits."""

from __future__ import annotations

import lzma
import math
import random

import pytest
import torch
import zstandard

from conftest import passages, tiny
from memvec import metrics
from memvec.cramming.outcomes import position_scores
from memvec.lab.compressors import byte_account
from memvec.lab.report.published import published
from memvec.model import memory
from memvec.model.reading import START_RULES
from memvec.passages.passage import Passage
from memvec.results import PositionScores

B, T, V = 3, 8, 13
XZ_9E = {  # the filter of `xz -9e`
    **{"id": lzma.FILTER_LZMA2, "dict_size": 2**26, "lc": 3, "lp": 0, "pb": 2},
    **{"mode": lzma.MODE_NORMAL, "nice_len": 273, "mf": lzma.MF_BT4, "depth": 512},
}
SEEDS = range(5)


def problem(seed: int, size: float = 3.0):
    """Random logits (B, T, V) in float64 and true ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, V, (B, T), generator=generator)


def slow_bits(row: list[float], true: int) -> float:
    """-log2 softmax(row)[true]."""
    top = max(row)
    total = math.fsum(math.exp(x - top) for x in row)
    return -math.log2(math.exp(row[true] - top) / total)


def slow_margin(row: list[float], true: int) -> float:
    """True logit minus the best other."""
    return row[true] - max(x for i, x in enumerate(row) if i != true)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_surprisal_is_in_bits(seed, dtype):
    logits, ids = problem(seed)
    logits = logits.to(dtype)
    found = metrics.surprisal(logits, ids)
    for b in range(B):
        for t in range(T):
            slow = slow_bits(logits[b, t].tolist(), int(ids[b, t]))
            assert float(found[b, t]) == pytest.approx(slow, rel=1e-4, abs=1e-5)


def test_a_fair_coin_is_one_bit():
    assert float(metrics.surprisal(torch.zeros(1, 1, 2), torch.tensor([[1]]))) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_margins_and_horizon(seed):
    logits, ids = problem(seed)
    ids[0] = logits[0].argmax(-1)  # one passage that is right throughout
    ids[1, : seed + 1] = logits[1, : seed + 1].argmax(-1)
    found = metrics.margins(logits, ids)
    right = found > 0
    for b in range(B):
        leading = 0
        for t in range(T):
            slow = slow_margin(logits[b, t].tolist(), int(ids[b, t]))
            assert float(found[b, t]) == pytest.approx(slow, abs=1e-9)
            assert bool(right[b, t]) == (int(logits[b, t].argmax()) == int(ids[b, t]))
        while leading < T and bool(right[b, leading]):
            leading += 1
        assert int(metrics.horizon(right)[b]) == leading


@pytest.mark.parametrize("seed", SEEDS)
def test_gains(seed):
    logits, ids = problem(seed)
    without, _ = problem(seed + 100)
    bits, base = metrics.surprisal(logits, ids)[0], metrics.surprisal(without, ids)[0]
    right, right_without = (metrics.margins(x, ids)[0] > 0 for x in (logits, without))
    pairs = [(logits[0, t].tolist(), without[0, t].tolist(), int(ids[0, t])) for t in range(T)]
    gain = math.fsum(slow_bits(b, i) - slow_bits(a, i) for a, b, i in pairs)
    assert metrics.information_gain(bits, base) == pytest.approx(gain, abs=1e-9)
    tokens = sum((slow_margin(a, i) > 0) - (slow_margin(b, i) > 0) for a, b, i in pairs)
    assert metrics.token_gain(right, right_without) == tokens
    share = sum(slow_margin(a, i) > 0 for a, _, i in pairs) / T
    assert metrics.teacher_forced_accuracy(right) == pytest.approx(share)


def test_sums_over_positions_are_exact_and_99_of_100_is_a_share_of_0_99():
    """Sums in float32 would lose a bit, and such a share would be above the paper's threshold."""
    few, many = torch.zeros(2), torch.tensor([2.0**24, 1.0])
    assert metrics.information_gain(few, many) == 2**24 + 1
    scores = PositionScores(many, few, many, few).measures(2, 0)
    assert scores.lm_bits == scores.mem_bits == 2**24 + 1
    assert metrics.teacher_forced_accuracy(torch.arange(100) > 0) == 0.99


def test_a_margin_of_0_is_no_hit_and_corrected_positions_have_no_smallest_margin():
    """A tie in which the true token is not the first one has the margin 0 (`first_of_ties`)."""
    bits, margin = torch.ones(3), torch.tensor([0.0, -2.0, 1.0])
    scores = PositionScores(bits, margin, bits, margin - 1.5)
    assert scores.token_gain() == 1
    found = scores.measures(3, 0, corrected=[1])
    assert (found.accuracy, found.token_gain, found.margin) == (pytest.approx(1 / 3), 1, 0.0)
    assert scores.measures(3, 0).margin == -2.0


@pytest.mark.parametrize(("D", "K", "b", "size"), [(2048, 1, 16, 128256), (512, 4, 32, 4096)])
def test_theoretical_capacity_is_the_number_of_tokens_that_fit(D, K, b, size):
    capacity = 0.0  # count the tokens that fit, one by one
    while (capacity + 1) * math.log2(size) <= K * D * b:
        capacity += 1
    assert math.floor(metrics.theoretical_capacity(D, K, b, size)) == capacity


@pytest.mark.parametrize("model", published()["utilisation"]["values"])
def test_capacity_and_utilisation_are_those_of_the_paper(model):
    """The values are those of Figure 5, computed from the token gains of Tables 1 and 3."""
    figure, gains = (published()[name]["values"][model] for name in ("utilisation", "table1"))
    D, size = figure["width"], figure["vocabulary"]
    assert metrics.theoretical_capacity(D, 1, 16, size) == pytest.approx(
        figure["theoretical"], abs=0.5
    )
    share = 100 * metrics.token_utilisation(gains["pg19"]["token_gain"][0], D, 1, 16, size)
    assert share == pytest.approx(figure["utilisation_pg19"], rel=2e-3)


def test_utilisation_and_bits_per_dimension_by_hand():
    """24 bits in three vectors of four 8-bit numbers, of 96 bits."""
    assert metrics.bit_utilisation(24.0, 4, 3, 8) == 0.25
    assert metrics.bits_per_dimension(24.0, 4, 3) == 2.0
    assert metrics.token_utilisation(3, 4, 3, 8, 256) == 0.25  # a token of 256 is 8 bits


@pytest.mark.parametrize("n", [2, 3, 50])
def test_mean_and_its_standard_error(n):
    values = [random.Random(n).gauss(5, 2) for _ in range(n)]
    mean, error = metrics.mean_and_error(values)
    slow = sum(values) / n
    assert mean == pytest.approx(slow)
    deviation = math.sqrt(sum((x - slow) ** 2 for x in values) / (n - 1))
    assert error == pytest.approx(deviation / math.sqrt(n))


def test_a_standard_error_needs_two_values():
    assert metrics.mean_and_error([3.0])[0] == 3.0
    assert math.isnan(metrics.mean_and_error([3.0])[1])
    assert all(math.isnan(x) for x in metrics.mean_and_error([]))


@pytest.mark.parametrize("text", [b"", b"to be or not to be " * 50])
def test_the_byte_account_can_be_decompressed(text):
    account = byte_account(text, 4096, 100.5)
    assert (account["text"], account["vectors"]) == (len(text), 4096)
    assert account["arithmetic"] == 13  # 100.5 bits need 12.56 bytes
    packed = lzma.compress(text, filters=[XZ_9E])
    assert account["xz"] == len(packed)
    assert lzma.decompress(packed) == text
    packed = zstandard.ZstdCompressor(level=19).compress(text)
    assert account["zstd"] == len(packed)
    assert zstandard.ZstdDecompressor().decompress(packed) == text


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("rule", START_RULES)
@pytest.mark.parametrize("longest", [1, 6])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_measures_equal_a_loop_over_the_models_own_logits(
    monkeypatch, family, longest, rule, bos, chunk
):
    """With vectors and without, over the same positions, passage by passage, token by token."""
    if rule == "bos" and not bos:
        pytest.skip("a model without a BOS has no such start rule")
    lm, given = tiny(family), int(rule == "first-token")
    asked = passages(6, 3, 4, seed=3)
    if longest == 1:
        asked = passages(1 + given, 1 + given, 1 + given, seed=3)
    # A text with its own BOS, as a source's `bos` makes it, gets no second one.
    asked[1] = Passage((lm.bos_id, *asked[1].ids[1:]), asked[1].document)
    if not bos:
        monkeypatch.setattr(lm, "bos_id", None)
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", chunk)
    vectors = torch.randn(3, 2, lm.width, generator=torch.Generator().manual_seed(1))
    batch = position_scores(lm, vectors, asked, rule)
    scores = [batch[i, : len(p) - given] for i, p in enumerate(asked)]
    found = [own.measures(len(p), 0).model_dump() for own, p in zip(scores, asked, strict=True)]

    def next_token(parts: list[torch.Tensor]) -> list[float]:
        inputs = torch.cat(parts)[None]
        with torch.no_grad():
            return lm.model(inputs_embeds=inputs).logits[0, -1].double().tolist()

    for row, vector, passage in zip(found, vectors, asked, strict=True):
        sums = {"lm": 0.0, "mem": 0.0}
        right = {"lm": 0, "mem": 0}
        margins = []
        for t in range(given, len(passage)):
            true, before = passage.ids[t], [lm.embedding.weight[i][None] for i in passage.ids[:t]]
            start = [lm.embedding.weight[lm.bos_id][None]] if bos else []
            mem = next_token([vector, *(start if rule == "bos" else []), *before])
            own = bos and rule != "first-token" and passage.ids[0] == lm.bos_id
            alone = [*(start if rule != "first-token" and not own else []), *before]
            base = next_token(alone) if alone else None
            sums["mem"] += slow_bits(mem, true)
            if own and t == 0:  # it is given
                margins.append(slow_margin(mem, true))
                right["mem"] += margins[-1] > 0
                right["lm"] += 1
                continue
            sums["lm"] += math.log2(lm.vocab_size) if base is None else slow_bits(base, true)
            margins.append(slow_margin(mem, true))
            right["mem"] += margins[-1] > 0
            right["lm"] += base is not None and slow_margin(base, true) > 0
        n = len(passage) - given
        assert (row["tokens"], row["predicted"]) == (len(passage), n)
        assert row["lm_bits"] == pytest.approx(sums["lm"], rel=1e-4)
        assert row["mem_bits"] == pytest.approx(sums["mem"], rel=1e-4)
        assert row["information_gain"] == pytest.approx(sums["lm"] - sums["mem"], abs=1e-3)
        assert row["token_gain"] == right["mem"] - right["lm"]
        assert row["accuracy"] == pytest.approx(right["mem"] / n)
        assert row["margin"] == pytest.approx(min(margins), abs=1e-4)
