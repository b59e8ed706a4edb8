"""Assign examples to splits. The steps are deduplication, sampling, splitting, weighting and shuffling.

    built rows ──> deduplicated ──> sampled ──> train and test ──> weighted sources ──> shuffled

Random choices sort the rows by `seeded_hash(row number, seed)`, so the result is the same on every machine, for every
version of NumPy and for any number of workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import UsageError
from ftdata.options import check_choices
from ftdata.types import WHOLE, SourceShare

_SPLIT, _SAMPLE, _WEIGHT, _SHUFFLE = (np.uint64(number) << np.uint64(56) for number in (0, 1, 2, 3))
"""The purposes of random numbers. They are added to row numbers before hashing. A purpose is in the highest byte, and
row numbers are smaller than 2**56, so the hashed numbers of different purposes are never equal."""


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
        check_choices({"packing": self.packing})
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
    rows = _Rows.from_examples(facts)
    if rows.has_splits and layout.test_size is not None:
        problem = f"test_size cannot be used, because the data already has splits: {', '.join(rows.source_splits)}"
        raise UsageError("test_size", problem, hint="remove test_size, or select one split with split")
    is_kept, left_out = _select_rows(facts, rows, layout)
    needs_groups = rows.has_splits or layout.test_size is not None
    groups = _to_numbers(facts.leakage_group[rows.first]) if needs_groups else np.arange(len(rows.first))
    splits = _divide_rows(np.flatnonzero(is_kept), groups, rows, layout)
    if any(share != WHOLE for share in facts.shares):
        splits["train"] = _apply_shares(splits["train"], facts, rows, layout.seed)
    train_groups = groups[splits["train"]]
    shared = Counter({name: int(np.isin(groups[splits[name]], train_groups).sum()) for name in set(splits) - {"train"}})
    if layout.shuffle:
        positions = np.arange(len(splits["train"]))
        splits["train"] = splits["train"][_random_order(positions, layout.seed, _SHUFFLE)]
    bounds = np.concatenate((rows.first, [len(facts.row)]))
    return SplitPlan({name: _examples(numbers, bounds) for name, numbers in splits.items()}, left_out, +shared)


_TRAIN = 0
"""The number of the train split."""


class _Rows(NamedTuple):
    """The properties of all rows. Each array has one element per row.

    Attributes:
        first: int64 `[rows]`, the index of the first example of the row.
        source: int64 `[rows]`, the number of the source.
        split: int64 `[rows]`, the index of the split in `names`.
        names: the names of all splits; the first name is `train`.
        source_splits: the different splits of the sources, in order. A single split is the train split, whatever its
            name.
    """

    first: NDArray[np.int64]
    source: NDArray[np.int64]
    split: NDArray[np.int64]
    names: Sequence[str]
    source_splits: Sequence[str]

    @property
    def has_splits(self) -> bool:
        """Whether the data already has several splits."""
        return len(self.source_splits) > 1

    @classmethod
    def from_examples(cls, facts: ExampleFacts) -> _Rows:
        """Find the rows that the examples belong to. The examples of a row are consecutive."""
        is_first = np.ones(len(facts.row), dtype=np.bool_)
        is_first[1:] = (np.diff(facts.row) != 0) | (np.diff(facts.source) != 0)
        first = np.flatnonzero(is_first)
        source = facts.source[first]
        split_of_source = [name or "train" for name in facts.splits]
        source_splits = list(dict.fromkeys(split_of_source))
        names = list(dict.fromkeys(["train", *source_splits]))
        has_splits = len(source_splits) > 1
        numbers = np.asarray([names.index(name) if has_splits else _TRAIN for name in split_of_source], np.int64)
        return cls(first, source, numbers[source], names, source_splits)


def _select_rows(facts: ExampleFacts, rows: _Rows, layout: Layout) -> tuple[NDArray[np.bool_], Counter[str]]:
    """Leave out rows of sources with weight 0, duplicates, and train rows that are not sampled.

    Returns:
        Whether each row is kept (bool `[rows]`), and the number of rows that were left out, by reason.
    """
    left_out = Counter[str]()
    is_train = rows.split == _TRAIN
    is_kept = np.asarray([share.amount > 0 for share in facts.shares])[rows.source]
    if not is_kept.all():
        left_out["weight 0"] = int((~is_kept).sum())
    if layout.dedup:
        # All rows that are already left out form one group, -1, so that they never replace another row.
        content = np.where(is_kept, _to_numbers(facts.content[rows.first]), -1)
        is_repeated = is_kept & ~_first_of_each(content, is_train)
        left_out["duplicate"] = int(is_repeated.sum())
        is_kept &= ~is_repeated
    if layout.sample is not None:
        candidates = np.flatnonzero(is_kept & is_train)
        size = _row_count(layout.sample, len(candidates))
        dropped = candidates[_random_order(candidates, layout.seed, _SAMPLE)[size:]]
        left_out["not sampled"] = len(dropped)
        is_kept[dropped] = False
    return is_kept, left_out


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


def _divide_rows(
    selected: NDArray[np.int64], groups: NDArray[np.int64], rows: _Rows, layout: Layout
) -> dict[str, NDArray[np.int64]]:
    """Divide the selected rows by their splits. If all rows have the same split, divide them into train and test."""
    split = rows.split[selected]
    numbers, first = np.unique(split, return_index=True)
    used_splits = dict.fromkeys([_TRAIN, *numbers[np.argsort(first)].tolist()])
    if len(used_splits) > 1:
        return {rows.names[number]: selected[split == number] for number in used_splits}
    if layout.test_size is None:
        return {"train": selected}
    size = _row_count(layout.test_size, len(selected))
    if layout.test_size >= len(selected) or size >= len(selected):
        count = int(max(size, layout.test_size))
        problem = f"test_size selects {count} of {len(selected)} rows, so no row is left to train on"
        raise UsageError("test_size", problem)
    in_test = _choose_test_rows(selected, groups[selected], size, layout.seed)
    if not in_test.any():
        problem = "no test split is possible: every group of identical rows is larger than test_size"
        raise UsageError("test_size", problem, hint="raise test_size, or remove duplicates with dedup")
    return {"train": selected[~in_test], "test": selected[in_test]}


def _choose_test_rows(rows: NDArray[np.int64], group: NDArray[np.int64], size: int, seed: int) -> NDArray[np.bool_]:
    """Choose at most `size` rows for the test split. Return whether each row is chosen (bool `[rows]`).

    Identical rows stay together: groups are visited in random order, and a group is chosen if it fits completely.
    """
    _, first, group_of, sizes = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    is_chosen = np.zeros(len(first), dtype=np.bool_)
    remaining = size
    for number in _random_order(rows[first], seed, _SPLIT).tolist():
        if not remaining:
            break
        if sizes[number] <= remaining:
            is_chosen[number] = True
            remaining -= int(sizes[number])
    return np.asarray(is_chosen[group_of])


def _apply_shares(selected: NDArray[np.int64], facts: ExampleFacts, rows: _Rows, seed: int) -> NDArray[np.int64]:
    """Repeat or leave out rows, so that each item of `data` contributes its requested amount to the train split.

    All rows are repeated equally often, and a random subset is repeated once more. A share in tokens is never exceeded.
    """
    item_of_source = np.asarray(facts.places if facts.places is not None else range(len(facts.splits)))
    shares = dict(zip(item_of_source.tolist(), facts.shares, strict=True))
    if rows.has_splits:
        _check_shares(facts, item_of_source.tolist(), shares)
    # The examples of a row are consecutive, so each sum ends where the next row begins.
    tokens = np.add.reduceat(facts.tokens, rows.first)
    item = item_of_source[rows.source[selected]]
    times = np.zeros(len(selected), dtype=np.int64)
    for number, share in shares.items():
        members = np.flatnonzero(item == number)
        sizes = tokens[selected[members]] if share.unit == "tokens" else np.ones(len(members), dtype=np.int64)
        total = int(sizes.sum())
        amount = round(share.amount * total) if share.unit == "times" else int(share.amount)
        if total:
            # amount = repetitions * total + remainder: the remainder is filled with rows in random order.
            repetitions, remainder = divmod(amount, total)
            times[members] = repetitions
            order = _random_order(selected[members], seed, _WEIGHT)
            times[members[order[np.cumsum(sizes[order]) <= remainder]]] += 1
    # Each repetition of the data follows the previous one completely, so that copies of a row are far from each other.
    return np.concatenate([selected[times > count] for count in range(int(times.max(initial=0)))] or [selected[:0]])


def _check_shares(facts: ExampleFacts, items: Sequence[int], shares: Mapping[int, SourceShare]) -> None:
    """Raise an error if an item of `data` has a share but no source in the train split."""
    trained = {item for item, split in zip(items, facts.splits, strict=True) if (split or "train") == "train"}
    weighted = {item for item, share in shares.items() if share.amount and share != WHOLE}
    if untrained := weighted - trained:
        name = facts.splits[items.index(min(untrained))]
        problem = (
            f"a source of the split {name} has the option weight, rows or tokens, "
            "which can be set only for the split train"
        )
        raise UsageError("share", problem)


def _examples(rows: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices of all examples that belong to `rows`, in the order of `rows`."""
    starts, counts = bounds[rows], bounds[rows + 1] - bounds[rows]
    if (counts == 1).all():
        return starts
    # `np.cumsum(counts) - counts` is the output position of the first example of each row. The position of an example
    # minus the position of the first example of its row is the index of the example in its row: 0, 1, ...
    index_in_row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(np.repeat(starts, counts) + index_in_row, dtype=np.int64)
