"""Pictures: SVG of what numbers say, for the page, for files and for docs. Plain text, no library."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 220, 56, 34, 22
_ALONE = (
    "<style>svg{color:#24292f;background:#fff}"
    "@media (prefers-color-scheme:dark){svg{color:#d8dee4;background:#161b22}}</style>"
)
_TEXT = 'font-family="system-ui,sans-serif" font-size="11" fill="currentColor"'


def draw_length_histogram(values: NDArray[np.integer], *, line: int | None = None, alone: bool = False) -> str:
    """Return a histogram of lengths in tokens, in steps that grow by a fourth of an octave, as SVG.

    Args:
        values: tokens of each example.
        line: where to draw the line of `max_length`.
        alone: whether it is a file of its own, which must say what colours it has.
    """
    most = max(int(values.max()) if len(values) else 1, line or 1, 16)
    least = max(int(values.min()) if len(values) else 1, 1)
    first, last = np.floor(np.log2(least) * 4) / 4, np.ceil(np.log2(most + 1) * 4) / 4
    edges = 2 ** np.arange(first, max(last, first + 1) + 0.25, 0.25)
    counts, _ = np.histogram(values, np.ceil(edges))
    ticks = [2**power for power in range(int(np.ceil(np.log2(edges[0]))), int(np.log2(edges[-1])) + 1)]

    def place(value: float) -> float:
        return float((np.log2(max(value, 1)) - np.log2(edges[0])) / np.log2(edges[-1] / edges[0]))

    bars = [(place(a), place(b), int(n), f"{int(np.ceil(a)):,} to {int(np.ceil(b)) - 1:,} tokens: {n:,}")
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]  # fmt: skip
    over = int((values > line).sum()) if line else 0
    says = f"Histogram of the lengths of {len(values):,} examples, {least:,} to {most:,} tokens."
    marked = (place(line + 1), f"max_length {line:,}: {over:,} longer") if line else None
    return _drawn(bars, [(place(tick), _short(tick)) for tick in ticks], "tokens of an example", says, marked, alone)


def draw_share_histogram(values: NDArray[np.floating], *, alone: bool = False) -> str:
    """Return a histogram of shares from 0 to 1, such as that of trained tokens, as SVG."""
    counts, edges = np.histogram(values, np.linspace(0, 1, 41))
    bars = [(float(a), float(b), int(n), f"{a:.1%} to {b:.1%}: {n:,}")
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]  # fmt: skip
    ticks = [(tick / 10, f"{tick * 10} %") for tick in range(0, 11, 2)]
    says = f"Histogram of the share of trained tokens of {len(values):,} examples."
    return _drawn(bars, ticks, "trained share of an example", says, None, alone)


def _drawn(
    bars: list[tuple[float, float, int, str]],
    ticks: list[tuple[float, str]],
    label: str,
    says: str,
    marked: tuple[float, str] | None,
    alone: bool,
) -> str:
    most = max((count for _, _, count, _ in bars), default=0) or 1
    wide, high = _WIDTH - _LEFT - 12, _HEIGHT - _BOTTOM - _TOP

    def across(share: float) -> float:
        return _LEFT + share * wide

    def up(count: float) -> float:
        return _TOP + high * (1 - count / most)

    floor = _TOP + high
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(says)}" class="picture">{_ALONE if alone else ""}<title>{escape(says)}</title>'
    ]
    parts += [
        f'<path d="M{_LEFT} {up(count):.1f}H{_WIDTH - 12}" stroke="currentColor" opacity=".15"/>'
        f'<text x="{_LEFT - 6}" y="{up(count) + 4:.1f}" text-anchor="end" {_TEXT}>{_short(count)}</text>'
        for count in _levels(most)
    ]
    for start, end, count, tip in bars:
        if count:
            x, width = across(start) + 0.5, max((end - start) * wide - 1, 0.5)
            # A bar that nobody sees says that there is nothing.
            y = min(up(count), floor - 1.5)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{floor - y:.1f}" fill="#3b82c4">'
                f"<title>{escape(tip)}</title></rect>"
            )
    parts.append(f'<path d="M{_LEFT} {floor}H{_WIDTH - 12}" stroke="currentColor"/>')
    for share, name in ticks:
        parts.append(f'<text x="{across(share):.1f}" y="{floor + 14}" text-anchor="middle" {_TEXT}>{name}</text>')
    middle = _LEFT + wide / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle" {_TEXT}>{escape(label)}</text>')
    if marked:
        x, name = across(marked[0]), escape(marked[1])
        anchor, shift = ("end", -5) if marked[0] > 0.6 else ("start", 5)
        parts.append(
            f'<path d="M{x:.1f} {_TOP - 8}V{floor}" stroke="#d1242f" stroke-width="2" stroke-dasharray="5 3"/>'
            f'<text x="{x + shift:.1f}" y="{_TOP - 10}" text-anchor="{anchor}" {_TEXT}>{name}</text>'
        )
    return "".join(parts) + "</svg>"


def _levels(most: int) -> list[int]:
    step = 10 ** max(len(str(most)) - 1, 0)
    step = next((part for part in (step // 5, step // 2, step) if part and most / part <= 5), step)
    return list(range(0, most + 1, max(step, 1)))[:8]


def _short(number: int) -> str:
    if number >= 1024 and not number % 1024:
        return f"{number // 1024}k"
    return f"{number:,}"
