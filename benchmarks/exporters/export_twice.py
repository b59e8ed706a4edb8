"""Export a build twice in one process, and print the tokens per second of the second export as JSON.

    python benchmarks/exporters/export_twice.py BUILD FORMAT FOLDER

The first export imports the packages that write the format, so its time is not counted.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from ftdata.exporters.export import export


def main() -> None:
    """Write the export to FOLDER."""
    build, name, folder = sys.argv[1:4]
    with tempfile.TemporaryDirectory() as scratch:
        export(build, name, Path(scratch) / "first")
    start = time.monotonic()
    report = export(build, name, folder)
    seconds = time.monotonic() - start
    tokens = sum(split["tokens"] for split in report.splits.values())
    print(json.dumps({"tokens_per_second": round(tokens / seconds), "limitations": dict(report.limitations)}))


if __name__ == "__main__":
    main()
