"""Draw histograms as SVG, without a plotting library."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 220, 56, 34, 22
_STANDALONE_STYLE = (
    "<style>svg{color:#24292f;background:#fff}"
    "@media (prefers-color-scheme:dark){svg{color:#d8dee4;background:#161b22}}</style>"
)
_TEXT = 'font-family="system-ui,sans-serif" font-size="11" fill="currentColor"'


def draw_length_histogram(values: NDArray[np.integer], *, line: int | None = None, standalone: bool = False) -> str:
    """Draw an SVG histogram of lengths on a logarithmic axis. Four bars cover each doubling of the length.

    Args:
        values: The number of tokens of each example.
        line: The `max_length` to mark with a line.
        standalone: Whether the SVG is a separate file, which must define its colors.
    """
    maximum = max(int(values.max()) if len(values) else 1, line or 1, 16)
    minimum = max(int(values.min()) if len(values) else 1, 1)
    first, last = np.floor(np.log2(minimum) * 4) / 4, np.ceil(np.log2(maximum + 1) * 4) / 4
    edges = 2 ** np.arange(first, max(last, first + 1) + 0.25, 0.25)
    counts, _ = np.histogram(values, np.ceil(edges))
    ticks = [2**power for power in range(int(np.ceil(np.log2(edges[0]))), int(np.log2(edges[-1])) + 1)]

    def position(value: float) -> float:
        return float((np.log2(max(value, 1)) - np.log2(edges[0])) / np.log2(edges[-1] / edges[0]))

    bars = [(position(a), position(b), int(n), f"{int(np.ceil(a)):,} to {int(np.ceil(b)) - 1:,} tokens: {n:,}")
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]  # fmt: skip
    longer = int((values > line).sum()) if line else 0
    title = f"Histogram of the lengths of {len(values):,} examples, {minimum:,} to {maximum:,} tokens."
    marker = (position(line + 1), f"max_length {line:,}: {longer:,} longer") if line else None
    labels = [(position(tick), _format_number(tick)) for tick in ticks]
    return _draw_histogram(bars, labels, "tokens per example", title, marker, standalone)


def draw_share_histogram(values: NDArray[np.floating], *, standalone: bool = False) -> str:
    """Draw an SVG histogram of fractions between 0 and 1, such as the fraction of trained tokens in each example."""
    counts, edges = np.histogram(values, np.linspace(0, 1, 41))
    bars = [(float(a), float(b), int(n), f"{a:.1%} to {b:.1%}: {n:,}")
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]  # fmt: skip
    ticks = [(tick / 10, f"{tick * 10} %") for tick in range(0, 11, 2)]
    title = f"Histogram of the share of trained tokens of {len(values):,} examples."
    return _draw_histogram(bars, ticks, "share of trained tokens per example", title, None, standalone)


def _draw_histogram(
    bars: list[tuple[float, float, int, str]],
    ticks: list[tuple[float, str]],
    label: str,
    title: str,
    marker: tuple[float, str] | None,
    standalone: bool,
) -> str:
    """Draw a histogram with labels, grid lines and tooltips as SVG.

    Args:
        bars: Start and end of each bar as shares of the width, its count, and its tooltip.
        ticks: Position of each tick as a share of the width, and its label.
        label: The label of the horizontal axis.
        title: The description of the chart.
        marker: Position and label of a vertical line.
        standalone: Whether the SVG is a separate file.
    """
    max_count = max((count for _, _, count, _ in bars), default=0) or 1
    plot_width, plot_height = _WIDTH - _LEFT - 12, _HEIGHT - _BOTTOM - _TOP

    def to_x(share: float) -> float:
        return _LEFT + share * plot_width

    def to_y(count: float) -> float:
        return _TOP + plot_height * (1 - count / max_count)

    floor = _TOP + plot_height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" class="picture">{_STANDALONE_STYLE if standalone else ""}'
        f"<title>{escape(title)}</title>"
    ]
    parts += [
        f'<path d="M{_LEFT} {to_y(count):.1f}H{_WIDTH - 12}" stroke="currentColor" opacity=".15"/>'
        f'<text x="{_LEFT - 6}" y="{to_y(count) + 4:.1f}" text-anchor="end" {_TEXT}>{_format_number(count)}</text>'
        for count in _grid_levels(max_count)
    ]
    for start, end, count, tooltip in bars:
        if count:
            x, width = to_x(start) + 0.5, max((end - start) * plot_width - 1, 0.5)
            # A minimum height keeps small counts visible.
            y = min(to_y(count), floor - 1.5)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{floor - y:.1f}" fill="#3b82c4">'
                f"<title>{escape(tooltip)}</title></rect>"
            )
    parts.append(f'<path d="M{_LEFT} {floor}H{_WIDTH - 12}" stroke="currentColor"/>')
    for share, name in ticks:
        parts.append(f'<text x="{to_x(share):.1f}" y="{floor + 14}" text-anchor="middle" {_TEXT}>{name}</text>')
    middle = _LEFT + plot_width / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle" {_TEXT}>{escape(label)}</text>')
    if marker:
        x, name = to_x(marker[0]), escape(marker[1])
        anchor, shift = ("end", -5) if marker[0] > 0.6 else ("start", 5)
        parts.append(
            f'<path d="M{x:.1f} {_TOP - 8}V{floor}" stroke="#d1242f" stroke-width="2" stroke-dasharray="5 3"/>'
            f'<text x="{x + shift:.1f}" y="{_TOP - 10}" text-anchor="{anchor}" {_TEXT}>{name}</text>'
        )
    return "".join(parts) + "</svg>"


def _grid_levels(max_count: int) -> list[int]:
    """Choose the counts at which horizontal grid lines are drawn."""
    step = 10 ** max(len(str(max_count)) - 1, 0)
    step = next((size for size in (step // 5, step // 2, step) if size and max_count / size <= 5), step)
    return list(range(0, max_count + 1, max(step, 1)))[:8]


def _format_number(number: int) -> str:
    if number >= 1024 and not number % 1024:
        return f"{number // 1024}k"
    return f"{number:,}"
