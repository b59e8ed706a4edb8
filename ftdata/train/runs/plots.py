"""The loss as a picture: PNG and SVG for the run's folder, and blocks for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

_BLOCKS = " ▁▂▃▄▅▆▇█"


def write_loss_plot(history: Sequence[dict[str, float]], folder: Path) -> None:
    """Write `loss.png` and `loss.svg` from the trainer's log history; the same history gives the same bytes."""
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
    """Return values as a line of blocks, at most `width` of them.

    >>> draw_sparkline([3.0, 2.0, 1.0, 0.0])
    '█▆▃▁'
    """
    chosen, low, high = _bucketed(values, width)
    scale = (len(_BLOCKS) - 2) / ((high - low) or 1)
    return "".join(_BLOCKS[1 + round((value - low) * scale)] for value in chosen)


def draw_chart(values: Sequence[float], width: int = 60, height: int = 6) -> str:
    """Return values as a picture of blocks, `height` lines of at most `width`, the largest and smallest beside it.

    >>> print(draw_chart([4.0, 2.0, 1.0, 0.0], height=2))
      4.0000 █▁
      0.0000 ██▅▁
    """
    chosen, low, high = _bucketed(values, width)
    eighths = [1 + round((value - low) / ((high - low) or 1) * (8 * height - 1)) for value in chosen]
    lines = []
    for level in reversed(range(height)):
        blocks = "".join(_BLOCKS[min(max(value - 8 * level, 0), 8)] for value in eighths)
        label = {height - 1: f"{high:8.4f}", 0: f"{low:8.4f}"}.get(level, "")
        lines.append(f"{label:8} {blocks}".rstrip())
    return "\n".join(lines)


def _bucketed(values: Sequence[float], width: int) -> tuple[list[float], float, float]:
    step = max(1, -(-len(values) // width))
    chosen = [max(values[at : at + step]) for at in range(0, len(values), step)]
    return chosen, min(chosen), max(chosen)
