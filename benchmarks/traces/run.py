"""Compare how tools convert the logs of agent sessions: items that are lost, duplicated, reordered or out of context.

Needs `pip install teich datasets` beside ftdata:

    python benchmarks/traces/run.py --sessions 200
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trace_sessions import compare_rows, make_session
from trace_writers import WRITERS

Messages = Sequence[dict[str, Any]]


def convert_with_ftdata(path: Path) -> Iterator[Messages]:
    import ftdata

    for row in ftdata.read(path):
        yield row.data["messages"]


def convert_with_teich(path: Path) -> Iterator[Messages]:
    from teich import convert_traces_to_training_data

    for row in convert_traces_to_training_data(str(path)):
        yield row["messages"]


def convert_with_datasets(path: Path) -> Iterator[Messages]:
    from datasets import load_dataset

    with tempfile.TemporaryDirectory() as cache:
        for row in load_dataset("json", data_files=str(path), split="train", cache_dir=cache):
            yield row["messages"]


TOOLS: dict[str, Callable[[Path], Iterator[Messages]]] = {
    "ftdata": convert_with_ftdata,
    "teich": convert_with_teich,
    "datasets": convert_with_datasets,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=200, help="sessions of each format")
    parser.add_argument("--tools", default="ftdata,teich,datasets")
    options = parser.parse_args()
    logging.disable()
    tools = options.tools.split(",")
    names = {name: f"{name} {version(name)}" for name in tools}
    print("| format | tool | items | lost | duplicated | reordered | out of context | sessions not converted |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name, (writer, features) in WRITERS.items():
        for tool in tools:
            totals, items, failed = Counter[int](), 0, 0
            for seed in range(options.sessions):
                session = make_session(seed, 4 + seed % 20, features)
                items += len({marker for context in session.contexts for marker in context})
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "session.jsonl"
                    lines = (json.dumps(record) for record in writer(seed).write(session))
                    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                    try:
                        rows = [messages for messages in TOOLS[tool](path) if messages]
                    except Exception:  # noqa: BLE001  (whatever a tool raises, it did not convert the session)
                        rows = []
                if not rows:
                    failed += 1
                    continue
                for index, number in enumerate(astuple(compare_rows(session, rows))):
                    totals[index] += number
            counts = " | ".join(f"{totals[index]:,}" for index in range(4))
            if failed == options.sessions:
                counts = "– | – | – | –"
            print(f"| {name} | {names[tool]} | {items:,} | {counts} | {failed} |", flush=True)


if __name__ == "__main__":
    main()
