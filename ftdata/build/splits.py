"""Assign examples to splits. The steps are deduplication, sampling, splitting, weighting and shuffling.

    built rows ──> deduplicated ──> sampled ──> train and test ──> weighted sources ──> shuffled

Random choices sort the rows by `seeded_hash(row number, seed)`, so the result is the same on every machine, for every
version of NumPy and for any number of workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import UsageError, check_choice
from ftdata.types import WHOLE, SourceShare

_SPLIT, _SAMPLE, _WEIGHT, _SHUFFLE = (np.uint64(number) << np.uint64(56) for number in (0, 1, 2, 3))
"""The purposes of random numbers; numbers for different purposes are independent."""


def check_similarity_threshold(threshold: Any) -> None:
    """Check that a similarity threshold is a number from 0.5 to 1.

    Raises:
        UsageError: the threshold is not a number from 0.5 to 1.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0.5 <= threshold <= 1:
        message = f"near_duplicate_threshold is {threshold!r}, expected a similarity from 0.5 to 1, such as 0.8"
        raise UsageError("near_duplicate_threshold", message)


@dataclass(frozen=True)
class Layout:
    """The options that control splits and packing. They are validated on construction.

    Attributes:
        packing: `None` or `"bfd"`.
        max_length: maximum number of tokens of a pack.
        test_size: share (below 1) or number of rows of the test split.
        seed: random seed for splitting, sampling, shuffling and mixing.
        dedup: whether to remove rows with the same tokens and labels as an earlier row.
        near_duplicate_threshold: similarity (0.5 to 1) from which rows count as identical for `dedup` and `test_size`.
        sample: share (below 1) or number of rows to sample from `train`; other splits of the data are not sampled.
        shuffle: whether to shuffle the rows of the train split.
    """

    packing: str | None = None
    max_length: int | None = None
    test_size: float | None = None
    seed: int = 0
    dedup: bool = False
    near_duplicate_threshold: float | None = None
    sample: float | None = None
    shuffle: bool = False

    def __post_init__(self) -> None:
        check_choice("packing", str(self.packing), ("None", "bfd"))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise UsageError("seed", f"seed is {self.seed!r}, expected an integer")
        if self.packing and self.max_length is None:
            raise UsageError("packing_length", "packing needs max_length, the maximum length of a pack")
        for name in ("test_size", "sample"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not (is_count or (isinstance(value, float) and 0 < value < 1)):
                raise UsageError(name, f"{name} is {value!r}, expected a fraction below 1 or a number of rows")
        if self.near_duplicate_threshold is not None:
            check_similarity_threshold(self.near_duplicate_threshold)
            if not (self.dedup or self.test_size):
                message = "near_duplicate_threshold has no effect without dedup or test_size"
                hint = "set dedup or test_size, or remove near_duplicate_threshold"
                raise UsageError("near_duplicate_threshold", message, hint=hint)


@dataclass(frozen=True)
class ExampleFacts:
    """The properties of all examples that `assign_splits` needs, in the order of the data.

    Attributes:
        source: int64 `[examples]`, the number of the source.
        row: int64 `[examples]`, the number of the row in its source.
        content: `[examples]` of a comparable dtype; equal for rows that are duplicates of each other, for `dedup`.
        leakage_group: `[examples]` of a comparable dtype; equal for rows that must not be in different splits.
        tokens: int64 `[examples]`, the number of tokens.
        splits: the split of each source; `None` if the source has no split.
        shares: the share of each source to train on.
        places: for each source, the number of the item of `data` that it belongs to; `None` if every source is its
            own item.
    """

    source: NDArray[np.int64]
    row: NDArray[np.int64]
    content: NDArray[np.generic]
    leakage_group: NDArray[np.generic]
    tokens: NDArray[np.int64]
    splits: Sequence[str | None]
    shares: Sequence[SourceShare]
    places: Sequence[int] | None = None


@dataclass(frozen=True)
class SplitPlan:
    """The result of `assign_splits`: the examples of each split, and the number of omitted rows.

    Attributes:
        splits: int64 example numbers of each split, in order.
        left_out: number of rows that were left out, by reason.
        shared: for each other split, the number of its rows that are also in `train`.
    """

    splits: Mapping[str, NDArray[np.int64]]
    left_out: Counter[str] = field(default_factory=Counter)
    shared: Counter[str] = field(default_factory=Counter)


def assign_splits(facts: ExampleFacts, layout: Layout) -> SplitPlan:
    """Assign all examples to splits.

    Examples of the same row are in the same split. Rows of the same leakage group are never divided by `test_size`.

    Raises:
        UsageError: the test split would leave no rows to train on, or the data already has splits.
    """
    first = _first_examples(facts)
    source = facts.source[first]
    source_splits = [name or "train" for name in facts.splits]
    has_splits = len(set(source_splits)) > 1
    if has_splits and layout.test_size is not None:
        problem = (
            f"test_size cannot be used, because the data already has splits: {', '.join(dict.fromkeys(source_splits))}"
        )
        raise UsageError("test_size", problem, hint="remove test_size, or select one split with split")
    names = list(dict.fromkeys(["train", *source_splits]))
    # A single split is the train split, whatever its name.
    split = np.asarray([names.index(name) if has_splits else _TRAIN for name in source_splits], np.int32)[source]
    left_out = Counter[str]()
    is_kept = np.asarray([share.amount > 0 for share in facts.shares])[source]
    if not is_kept.all():
        left_out["weight 0"] = int((~is_kept).sum())
    if layout.dedup:
        content = _to_numbers(facts.content[first])
        repeated = is_kept & ~_first_of_each(np.where(is_kept, content, -1), split == _TRAIN)
        left_out["duplicate"] = int(repeated.sum())
        is_kept &= ~repeated
    if layout.sample is not None:
        candidates = np.flatnonzero(is_kept & (split == _TRAIN))
        size = _row_count(layout.sample, len(candidates))
        dropped = candidates[_random_order(candidates, layout.seed, _SAMPLE)[size:]]
        left_out["not sampled"] = len(dropped)
        is_kept[dropped] = False
    needs_groups = has_splits or layout.test_size is not None
    groups = _to_numbers(facts.leakage_group[first]) if needs_groups else np.arange(len(first))
    rows = _split_rows(np.flatnonzero(is_kept), groups, split, names, layout)
    if any(share != WHOLE for share in facts.shares):
        places = np.asarray(facts.places if facts.places is not None else range(len(facts.splits)))
        shares = dict(zip(places.tolist(), facts.shares, strict=True))
        weighted = [place for place, share in shares.items() if share.amount and share != WHOLE]
        trained = {place for place, name in zip(places.tolist(), source_splits, strict=True) if name == "train"}
        if has_splits and (untrained := set(weighted) - trained):
            name = facts.splits[places.tolist().index(min(untrained))]
            raise UsageError(
                "share",
                f"a source of the split {name} has the option weight, rows or tokens, "
                "which can be set only for the split train",
            )
        tokens = np.add.reduceat(facts.tokens, first)
        rows["train"] = _apply_shares(rows["train"], places[source], tokens, shares, layout.seed)
    shared = Counter[str]()
    for name in set(rows) - {"train"}:
        shared[name] = int(np.isin(groups[rows[name]], groups[rows["train"]]).sum())
    if layout.shuffle:
        rows["train"] = rows["train"][_random_order(np.arange(len(rows["train"])), layout.seed, _SHUFFLE)]
    bounds = np.concatenate((first, [len(facts.row)]))
    return SplitPlan({name: _examples(numbers, bounds) for name, numbers in rows.items()}, left_out, +shared)


_TRAIN = 0
"""The number of the train split."""


def _to_numbers(values: NDArray[np.generic]) -> NDArray[np.int64]:
    return np.asarray(np.unique(values, return_inverse=True)[1], dtype=np.int64)


def seeded_hash(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Hash each number with a seed to a pseudorandom 64-bit number (SplitMix64; Steele, Lea and Flood 2014).

    >>> seeded_hash(np.arange(2, dtype=np.uint64), 42).tolist()
    [13679457532755275413, 2949826092126892291]
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed % (1 << 64)) + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def _first_examples(facts: ExampleFacts) -> NDArray[np.int64]:
    """Return the index of the first example of each row (int64 `[rows]`)."""
    is_first = np.ones(len(facts.row), dtype=np.bool_)
    is_first[1:] = (np.diff(facts.row) != 0) | (np.diff(facts.source) != 0)
    return np.flatnonzero(is_first)


def _random_order(numbers: NDArray[np.int64], seed: int, purpose: np.uint64) -> NDArray[np.int64]:
    """Return the indices of `numbers` in a seeded random order."""
    return np.argsort(seeded_hash(numbers.astype(np.uint64) + purpose, seed), kind="stable")


def _row_count(size: float, rows: int) -> int:
    # Rounding corrects floating-point errors: 0.07 * 100 is slightly more than 7.
    return int(np.ceil(round(size * rows, 6))) if size < 1 else min(int(size), rows)


def _first_of_each(group: NDArray[np.int64], last: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For each row, return whether it is the first row of its group (bool `[rows]`).

    Rows marked in `last` come after all other rows: a duplicate in train and test is removed from train.
    """
    order = np.argsort(last, kind="stable")
    _, first = np.unique(group[order], return_index=True)
    is_first = np.zeros(len(group), dtype=np.bool_)
    is_first[order[first]] = True
    return is_first


def _split_rows(
    rows: NDArray[np.int64], group: NDArray[np.int64], split: NDArray[np.int32], names: Sequence[str], layout: Layout
) -> dict[str, NDArray[np.int64]]:
    numbers, first = np.unique(split[rows], return_index=True)
    used_splits = dict.fromkeys([_TRAIN, *numbers[np.argsort(first)].tolist()])
    if len(used_splits) > 1:
        return {names[number]: rows[split[rows] == number] for number in used_splits}
    if layout.test_size is None:
        return {"train": rows}
    size = _row_count(layout.test_size, len(rows))
    if layout.test_size >= len(rows) or size >= len(rows):
        count = int(max(size, layout.test_size))
        raise UsageError("test_size", f"test_size selects {count} of {len(rows)} rows, so no row is left to train on")
    # Identical rows stay together: groups are visited in random order, and selected if they fit completely.
    _, first, group_of, sizes = np.unique(group[rows], return_index=True, return_inverse=True, return_counts=True)
    order = _random_order(rows[first], layout.seed, _SPLIT)
    is_selected = np.zeros(len(first), dtype=np.bool_)
    remaining = size
    for number in order.tolist():
        if not remaining:
            break
        if sizes[number] <= remaining:
            is_selected[number] = True
            remaining -= int(sizes[number])
    in_test = is_selected[group_of]
    if not in_test.any():
        problem = "no test split is possible: every group of identical rows is larger than test_size"
        raise UsageError("test_size", problem, hint="raise test_size, or remove duplicates with dedup")
    return {"train": rows[~in_test], "test": rows[in_test]}


def _apply_shares(
    rows: NDArray[np.int64],
    place: NDArray[np.int64],
    tokens: NDArray[np.int64],
    shares: Mapping[int, SourceShare],
    seed: int,
) -> NDArray[np.int64]:
    """Repeat or leave out rows, so that each item of `data` contributes its requested amount to the train split.

    All rows are repeated equally often, and a random subset is repeated once more. A share in tokens is never exceeded.
    """
    times = np.zeros(len(rows), dtype=np.int64)
    for number, share in shares.items():
        members = np.flatnonzero(place[rows] == number)
        sizes = tokens[rows[members]] if share.unit == "tokens" else np.ones(len(members), dtype=np.int64)
        total = int(sizes.sum())
        amount = round(share.amount * total) if share.unit == "times" else int(share.amount)
        if total:
            times[members] = amount // total
            order = _random_order(rows[members], seed, _WEIGHT)
            times[members[order[np.cumsum(sizes[order]) <= amount % total]]] += 1
    # Each repetition of the data follows the previous one completely, so that copies of a row are far from each other.
    return np.concatenate([rows[times > count] for count in range(int(times.max(initial=0)))] or [rows[:0]])


def _examples(rows: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices of all examples that belong to `rows`, in the order of `rows`."""
    starts, counts = bounds[rows], bounds[rows + 1] - bounds[rows]
    if (counts == 1).all():
        return starts
    index_in_row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(np.repeat(starts, counts) + index_in_row, dtype=np.int64)
