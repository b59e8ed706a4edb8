"""Plot the loss as PNG and SVG files for the run directory, and as block characters for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

_BLOCKS = " ▁▂▃▄▅▆▇█"


def write_loss_plot(history: Sequence[dict[str, float]], folder: Path) -> None:
    """Plot the losses in the trainer's log history, and write `loss.png` and `loss.svg`.

    The same history always produces the same files.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "test split", "o--")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (mean per trained token)", ylim=(0, None))
    axes.grid(visible=True, alpha=0.3)
    if axes.get_lines():
        axes.legend()
    with rc_context({"svg.hashsalt": "ftdata", "svg.fonttype": "none"}):
        figure.savefig(folder / "loss.png", dpi=120, metadata={"Software": None})
        figure.savefig(folder / "loss.svg", metadata={"Date": None})


def draw_sparkline(values: Sequence[float], width: int = 60) -> str:
    """Return a one-line chart of block characters, at most `width` characters wide.

    >>> draw_sparkline([3.0, 2.0, 1.0, 0.0])
    '█▆▃▁'
    """
    maxima, low, high = _take_maxima(values, width)
    scale = (len(_BLOCKS) - 2) / ((high - low) or 1)
    return "".join(_BLOCKS[1 + round((value - low) * scale)] for value in maxima)


def draw_chart(values: Sequence[float], width: int = 60, height: int = 6) -> str:
    """Return a chart of block characters. The labels show the largest value and the smallest value.

    The chart has `height` lines of at most `width` blocks each.

    >>> print(draw_chart([4.0, 2.0, 1.0, 0.0], height=2))
      4.0000 █▁
      0.0000 ██▅▁
    """
    maxima, low, high = _take_maxima(values, width)
    eighths = [1 + round((value - low) / ((high - low) or 1) * (8 * height - 1)) for value in maxima]
    lines = []
    for level in reversed(range(height)):
        blocks = "".join(_BLOCKS[min(max(value - 8 * level, 0), 8)] for value in eighths)
        label = {height - 1: f"{high:8.4f}", 0: f"{low:8.4f}"}.get(level, "")
        lines.append(f"{label:8} {blocks}".rstrip())
    return "\n".join(lines)


def _take_maxima(values: Sequence[float], width: int) -> tuple[list[float], float, float]:
    """Divide values into at most `width` groups. Return all maxima, the smallest maximum and the largest."""
    size = max(1, -(-len(values) // width))
    maxima = [max(values[start : start + size]) for start in range(0, len(values), size)]
    return maxima, min(maxima), max(maxima)
