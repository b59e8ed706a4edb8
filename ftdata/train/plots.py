"""The loss as a picture: PNG and SVG for the run's folder, and a line for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

_BLOCKS = "▁▂▃▄▅▆▇█"


def loss_picture(history: Sequence[dict[str, float]], folder: Path) -> None:
    """Write `loss.png` and `loss.svg` from the trainer's log history."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o--")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (mean per trained token)", ylim=(0, None))
    axes.grid(visible=True, alpha=0.3)
    if axes.get_lines():
        axes.legend()
    for name in ("loss.png", "loss.svg"):
        figure.savefig(folder / name, dpi=120)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Return values as a line of blocks, at most `width` of them.

    >>> sparkline([3.0, 2.0, 1.0, 0.0])
    '█▆▃▁'
    """
    step = max(1, -(-len(values) // width))
    chosen = [max(values[at : at + step]) for at in range(0, len(values), step)]
    low, high = min(chosen), max(chosen)
    scale = (len(_BLOCKS) - 1) / ((high - low) or 1)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in chosen)
