"""Measure how fast a browser opens, draws and searches the HTML report.

    python benchmarks/inspection/page.py --tokenizer MODEL data.jsonl

The script of the report times each search, from the key press until the first rows are drawn.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from ftdata import preview


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 1000])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for rows in given.rows:
            path = Path(scratch) / f"{rows}.html"
            began = time.perf_counter()
            shown = preview(given.data, given.tokenizer, n=rows, html=path)
            made = time.perf_counter() - began
            tokens = sum(len(view) for row in shown.rows for view in row.examples)
            page = browser.new_page()
            began = time.perf_counter()
            page.goto(f"file://{path}")
            page.wait_for_selector("#list[data-ready]", state="attached")
            ready = time.perf_counter() - began
            took = []
            for text in ("the", "a", "import", "nowhere to be found", "/[A-Z]{3,}/", "/\\d+ (of|and)/") * 3:
                page.fill("#q", text)
                took.append(float(page.get_attribute("#status", "data-ms")))
                page.wait_for_selector("#list[data-ready]", state="attached")
            size = f"{tokens:,} tokens in {len(shown.rows):,} rows, {path.stat().st_size / 1e6:.1f} MB"
            search = f"a search {statistics.median(took):.0f} ms (at most {max(took):.0f})"
            print(f"{size}: made in {made:.1f} s, drawn in {ready:.2f} s, {search}")
        browser.close()


if __name__ == "__main__":
    main()
