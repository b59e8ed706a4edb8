"""Measure how long packing takes and how full the packed sequences are, for ftdata and TRL.

    python benchmarks/speed/packing.py [-n 1000000] [--capacity 4096 32768] [--rounds 3]

The lengths are lognormal, like the lengths of chats: 70 % have a median of 180 tokens, and 30 % have a median of
1,100. `bound` is the smallest possible number of packs. TRL packs rows instead of lengths, so it receives lists of
these lengths, but only a tenth as many.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from ftdata.build.pack import best_fit_decreasing


def lengths(count: int, capacity: int) -> np.ndarray:
    chance = np.random.default_rng(0)
    short = chance.random(count) < 0.7
    drawn = np.where(short, chance.lognormal(np.log(180), 1.0, count), chance.lognormal(np.log(1100), 0.8, count))
    return np.clip(drawn, 8, capacity).astype(np.int64)


def ours(given: np.ndarray, capacity: int) -> Callable[[], int]:
    return lambda: len(best_fit_decreasing(given, capacity))


def trl(given: np.ndarray, capacity: int) -> Callable[[], int]:
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    rows = datasets.Dataset.from_dict({"input_ids": [[0] * int(length) for length in given]})
    return lambda: len(pack_dataset(rows, capacity, strategy="bfd"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| packer | lengths | pack of | CPU µs each (min to max) | full | packs over bound |")
    print("|---|---:|---:|---:|---:|---:|")
    for capacity in given.capacity:
        for name, make, count in (("ftdata", ours, given.n), ("trl", trl, given.n // 10)):
            some = lengths(count, capacity)
            plan, times, packs = make(some, capacity), [], 0
            for _ in range(given.rounds):
                began = time.process_time()
                packs = plan()
                times.append((time.process_time() - began) / count * 1e6)
            bound = -(-int(some.sum()) // capacity)
            print(
                f"| {name} | {count:,} | {capacity:,} | {statistics.median(times):.2f} ({min(times):.2f} to "
                f"{max(times):.2f}) | {some.sum() / (packs * capacity):.3%} | {packs / bound - 1:.3%} |"
            )


if __name__ == "__main__":
    main()
