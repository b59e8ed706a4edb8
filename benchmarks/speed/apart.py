"""Measure the CPU time of the template worker: builds with the worker, and with templates in the main process.

    python benchmarks/speed/apart.py --tokenizer FOLDER --data chats.jsonl [--rounds 3] TEMPLATE.jinja ...

The output shows the minimum CPU seconds of the rounds, for all processes. To exclude the startup, the time of a build
of a few rows is subtracted. Both kinds of builds take turns.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FEW = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="*")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("apart", "here"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        built(given.data, given.tokenizer, given.templates[0], given.child)
        return
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        few = Path(scratch) / "few.jsonl"
        few.write_text("".join(Path(given.data).read_text(encoding="utf-8").splitlines(keepends=True)[:FEW]))
        for template in given.templates:
            used = {"apart": [], "here": []}
            try:
                for _ in range(given.rounds):
                    for which, seconds in used.items():
                        whole, start = (cpu(which, given.tokenizer, data, template) for data in (given.data, str(few)))
                        seconds.append(whole - start)
            except subprocess.CalledProcessError:
                print(f"{Path(template).stem[:50]:50} is refused under this tokenizer", flush=True)
                continue
            apart, here = min(used["apart"]), min(used["here"])
            ratios.append(apart / here)
            print(f"{Path(template).stem[:50]:50} {here:6.2f} s {apart:6.2f} s {apart / here - 1:+6.1%}", flush=True)
    print(f"median {statistics.median(ratios) - 1:+.1%}, at most {max(ratios) - 1:+.1%}")


def cpu(which: str, tokenizer: str, data: str, template: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--child", which, "--tokenizer", tokenizer, "--data", data, template]
    subprocess.run(command, check=True, env={**os.environ, "FTDATA_CACHE": "off"}, stderr=subprocess.DEVNULL)  # noqa: S603
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def built(data: str, tokenizer: str, template: str, which: str) -> None:
    from ftdata.build.dataset import write_build
    from ftdata.templates.worker import client

    client.HERE = which == "here"
    with tempfile.TemporaryDirectory() as scratch:
        write_build(
            data, tokenizer, Path(scratch) / "out", template=template, on_bad_rows="quarantine", max_rejects="100%"
        )


if __name__ == "__main__":
    main()
