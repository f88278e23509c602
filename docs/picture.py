"""Draw docs/result.svg: bits of each token of one passage, without and with its [mem] vector.

    python docs/picture.py

The passage is examples/bus.txt, 48 tokens of ordinary text, crammed into one vector of `pocket`.
"""

from __future__ import annotations

import html
from pathlib import Path

import torch

import memvec
from memvec import metrics

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT, LEFT, BASE, TALLEST = 860, 330, 52, 222, 150
ALONE, CRAMMED = "#b9c4cf", "#d9822b"


def bits_of_each_token() -> tuple[list[str], list[float], list[float], float, float, int]:
    """Tokens, bits without and with the vector, both sums, and the width D."""
    lm = memvec.load_lm("pocket")
    text = (ROOT / "examples/bus.txt").read_text(encoding="utf-8")
    ids = lm.tokenize(text)
    mem = memvec.cram(lm, text, tokens=len(ids))
    assert mem.exact
    assert len(mem.passages) == 1
    assert memvec.decode(lm, mem) == [text]
    table = torch.tensor([ids])
    with torch.no_grad():
        crammed = metrics.surprisal(lm.head(lm.states(mem.vectors, table, "vectors")), table)[0]
        alone = metrics.surprisal(lm.head(lm.states(None, table, "bos")), table)[0]
    passage = mem.passages[0]
    words = [lm.text([token]).replace("\n", "↵").strip(" ") or "␣" for token in ids]
    return (
        words,
        alone.tolist(),
        crammed.tolist(),
        passage.lm_bits,
        passage.mem_bits,
        lm.width,
    )


def svg() -> str:
    """The figure, with its numbers computed and none typed in."""
    words, alone, crammed, before, after, D = bits_of_each_token()
    scale = TALLEST / max(alone)
    pitch = (WIDTH - LEFT - 20) / len(words)
    title = (
        f"One vector of {D} numbers, {len(words)} tokens exact: "
        f"{before:.0f} bits without it, {after:.1f} with it"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13" role="img" '
        f'aria-label="{title}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#fbfbf8"/>',
        f'<text x="{LEFT}" y="32" font-size="17" font-weight="bold" fill="#222">{title}</text>',
        f'<rect x="{LEFT}" y="46" width="12" height="12" fill="{ALONE}"/>',
        f'<text x="{LEFT + 18}" y="57" fill="#444">the frozen model alone</text>',
        f'<rect x="{LEFT + 190}" y="46" width="12" height="12" fill="{CRAMMED}"/>',
        f'<text x="{LEFT + 208}" y="57" fill="#444">with the [mem] vector in front</text>',
    ]
    for tick in range(0, int(max(alone)) + 1, 5):
        y = BASE - tick * scale
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{tick}</text>'
        )
    parts.append(
        f'<text transform="translate(16 {BASE - TALLEST / 2:.0f}) rotate(-90)" '
        'text-anchor="middle" fill="#444">bits per token</text>'
    )
    for i, (word, a, c) in enumerate(zip(words, alone, crammed, strict=True)):
        x, half = LEFT + (i + 0.12) * pitch, 0.38 * pitch
        for at, value, colour in ((x, a, ALONE), (x + half, c, CRAMMED)):
            tall = max(1.0, value * scale)
            parts.append(
                f'<rect x="{at:.1f}" y="{BASE - tall:.1f}" width="{half:.1f}" '
                f'height="{tall:.1f}" fill="{colour}"/>'
            )
        parts.append(
            f'<text transform="translate({x + half + 4:.1f} {BASE + 10}) rotate(-90)" '
            f'text-anchor="end" fill="#222">{html.escape(word)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs/result.svg").write_text(svg(), encoding="utf-8")
