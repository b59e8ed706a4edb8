"""Draw a chart of the CPU time of each tool relative to ftdata, from the output of `prep.py --json FILE`.

python benchmarks/speed/draw.py FILE docs/speed.svg
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt


def main() -> None:
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "ftdata"
    found = json.loads(Path(sys.argv[1]).read_text())
    seconds = {tool: [one["cpu"] for one in each] for tool, each in found.items()}
    ours = statistics.median(seconds["ftdata"])
    tools = sorted(seconds, key=lambda tool: statistics.median(seconds[tool]), reverse=True)
    margin = max(map(max, seconds.values())) / 100
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(tools) + 1))
    for place, tool in enumerate(tools):
        middle = statistics.median(seconds[tool])
        own = tool.startswith("ftdata")
        axes.barh(place, middle, color="#2a7f62" if own else "#9aa5b1")
        axes.plot([min(seconds[tool]), max(seconds[tool])], [place, place], color="black", linewidth=1)
        axes.text(
            max(seconds[tool]) + margin, place, f"{middle:.2f} s   {middle / ours:.1f} ×", va="center", fontsize=9
        )
    axes.set_yticks(range(len(tools)), tools)
    axes.set_xlim(0, 20 * margin + max(map(max, seconds.values())))
    axes.set_xlabel("CPU seconds for 1,000 conversations of 1.08 million tokens (median, least and most)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
