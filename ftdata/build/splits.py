"""Lay out: which examples go into which split, how often, and in which order. Numbers of rows only, never their tokens.

    rows built ──> without repeats ──> a sample ──> train and test ──> sources weighted ──> shuffled

Everything that looks like chance is a sort by `seeded_hash(number of the row, seed)`, so it is the same on every machine, for
every version of numpy, for any number of workers.
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
"""What a number is drawn for: the draws of one seed are independent of each other."""


def check_similarity_threshold(near: Any) -> None:
    """Refuse what is no similarity.

    Raises:
        UsageError: it is no number from 0.5 to 1.
    """
    if isinstance(near, bool) or not isinstance(near, int | float) or not 0.5 <= near <= 1:
        raise UsageError(
            "near_duplicate_threshold",
            f"near_duplicate_threshold is {near!r}, expected a similarity from 0.5 to 1, such as 0.8",
        )


@dataclass(frozen=True)
class Layout:
    """How examples become splits and rows of splits; checked when made.

    Attributes:
        packing: `None` or `"bfd"`.
        max_length: tokens that a pack holds.
        test_size: share (below 1) or number of rows for a test split.
        seed: decides all that is left to chance.
        dedup: leave out rows whose tokens and labels are those of an earlier one.
        near_duplicate_threshold: how similar (0.5 to 1) rows must be to count as equal, for `dedup` and `test_size`.
        sample: share (below 1) or number of rows to take; splits of the data other than `train` stay whole.
        shuffle: whether rows come in another order than that of the data.
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
            raise UsageError("seed", f"seed is {self.seed!r}, expected a whole number")
        if self.packing and self.max_length is None:
            raise UsageError("packing_length", "packing needs max_length, the tokens that a pack holds")
        for name in ("test_size", "sample"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not (whole or (isinstance(value, float) and 0 < value < 1)):
                raise UsageError(name, f"{name} is {value!r}, expected a share below 1 or a whole number of rows")
        if self.near_duplicate_threshold is not None:
            check_similarity_threshold(self.near_duplicate_threshold)
            if not (self.dedup or self.test_size):
                raise UsageError(
                    "near_duplicate_threshold",
                    "near_duplicate_threshold says which rows count as equal: it goes with dedup or test_size",
                )


@dataclass(frozen=True)
class ExampleFacts:
    """What the layout must know of the examples built, in the order of the data.

    Attributes:
        source: int64 `[examples]`, the number of the source.
        row: int64 `[examples]`, the row's number in its source.
        content: `[examples]` of anything that can be compared: equal where rows are, for `dedup`.
        asked: the same: equal where rows must not be on both sides of a test split.
        tokens: int64 `[examples]`.
        splits: the split of each source, `None` where it has none.
        shares: how much is trained on of each place that the user named.
        places: the number of the place of each source; `None`: each is one.
    """

    source: NDArray[np.int64]
    row: NDArray[np.int64]
    content: NDArray[np.generic]
    asked: NDArray[np.generic]
    tokens: NDArray[np.int64]
    splits: Sequence[str | None]
    shares: Sequence[SourceShare]
    places: Sequence[int] | None = None


@dataclass(frozen=True)
class SplitPlan:
    """The layout: int64 numbers of examples for each split, in order; how many rows were left out, and why.

    `shared`: how many rows of a split of the data are in `train`, too.
    """

    splits: Mapping[str, NDArray[np.int64]]
    left_out: Counter[str] = field(default_factory=Counter)
    shared: Counter[str] = field(default_factory=Counter)


def assign_splits(facts: ExampleFacts, layout: Layout) -> SplitPlan:
    """Decide on all examples at once.

    Examples of one row stay together. Rows with equal contents are never on both sides of a test split.

    Raises:
        UsageError: the test split would leave nothing to train on, or the data has splits already.
    """
    first = _rows(facts)
    source = facts.source[first]
    given = [name or "train" for name in facts.splits]
    several = len(set(given)) > 1
    if several and layout.test_size is not None:
        found = f"the data has splits already: {', '.join(dict.fromkeys(given))}"
        raise UsageError("test_size", found, hint="leave test_size out, or choose one with split")
    names = list(dict.fromkeys(["train", *given]))
    # One split alone, whatever its name, was chosen to be trained.
    split = np.asarray([names.index(name) if several else _TRAIN for name in given], np.int32)[source]
    left_out = Counter[str]()
    kept = np.asarray([share.amount > 0 for share in facts.shares])[source]
    if not kept.all():
        left_out["of weight 0"] = int((~kept).sum())
    if layout.dedup:
        content = _numbered(facts.content[first])
        repeated = kept & ~_first_of_each(np.where(kept, content, -1), split == _TRAIN)
        left_out["duplicate"] = int(repeated.sum())
        kept &= ~repeated
    if layout.sample is not None:
        chosen = np.flatnonzero(kept & (split == _TRAIN))
        size = _count(layout.sample, len(chosen))
        dropped = chosen[_drawn(chosen, layout.seed, _SAMPLE)[size:]]
        left_out["not sampled"] = len(dropped)
        kept[dropped] = False
    asked = _numbered(facts.asked[first]) if several or layout.test_size is not None else np.arange(len(first))
    rows = _splits(np.flatnonzero(kept), asked, split, names, layout)
    if any(share != WHOLE for share in facts.shares):
        places = np.asarray(facts.places if facts.places is not None else range(len(facts.splits)))
        shares = dict(zip(places.tolist(), facts.shares, strict=True))
        idle = [place for place, share in shares.items() if share.amount and share != WHOLE]
        trained = {place for place, name in zip(places.tolist(), given, strict=True) if name == "train"}
        if several and (beside := set(idle) - trained):
            found = f"{facts.splits[places.tolist().index(min(beside))]} is not trained on"
            raise UsageError("share", f"{found}: weight, rows and tokens say how much of a source is")
        tokens = np.add.reduceat(facts.tokens, first)
        rows["train"] = _shared(rows["train"], places[source], tokens, shares, layout.seed)
    shared = Counter[str]()
    for name in set(rows) - {"train"}:
        shared[name] = int(np.isin(asked[rows[name]], asked[rows["train"]]).sum())
    if layout.shuffle:
        rows["train"] = rows["train"][_drawn(np.arange(len(rows["train"])), layout.seed, _SHUFFLE)]
    examples_of = np.concatenate((first, [len(facts.row)]))
    return SplitPlan({name: _examples(numbers, examples_of) for name, numbers in rows.items()}, left_out, +shared)


_TRAIN = 0
"""The number of the split that is trained on."""


def _numbered(values: NDArray[np.generic]) -> NDArray[np.int64]:
    return np.asarray(np.unique(values, return_inverse=True)[1], dtype=np.int64)


def seeded_hash(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return a number for each that looks like chance (SplitMix64; Steele, Lea and Flood 2014).

    >>> seeded_hash(np.arange(2, dtype=np.uint64), 42).tolist()
    [13679457532755275413, 2949826092126892291]
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed % (1 << 64)) + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def _rows(facts: ExampleFacts) -> NDArray[np.int64]:
    """Return the first example of each row of each source."""
    begins = np.ones(len(facts.row), dtype=np.bool_)
    begins[1:] = (np.diff(facts.row) != 0) | (np.diff(facts.source) != 0)
    return np.flatnonzero(begins)


def _drawn(numbers: NDArray[np.int64], seed: int, purpose: np.uint64) -> NDArray[np.int64]:
    """Return an order of the numbers, by chance."""
    return np.argsort(seeded_hash(numbers.astype(np.uint64) + purpose, seed), kind="stable")


def _count(size: float, rows: int) -> int:
    # 0.07 * 100 is a little more than 7.
    return int(np.ceil(round(size * rows, 6))) if size < 1 else min(int(size), rows)


def _first_of_each(group: NDArray[np.int64], last: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the first row of each group; rows of `last` come after the others: what is tested is not trained."""
    order = np.argsort(last, kind="stable")
    _, firsts = np.unique(group[order], return_index=True)
    found = np.zeros(len(group), dtype=np.bool_)
    found[order[firsts]] = True
    return found


def _splits(
    rows: NDArray[np.int64], group: NDArray[np.int64], split: NDArray[np.int32], names: Sequence[str], layout: Layout
) -> dict[str, NDArray[np.int64]]:
    numbers, first = np.unique(split[rows], return_index=True)
    used = dict.fromkeys([_TRAIN, *numbers[np.argsort(first)].tolist()])
    if len(used) > 1:
        return {names[number]: rows[split[rows] == number] for number in used}
    if layout.test_size is None:
        return {"train": rows}
    size = _count(layout.test_size, len(rows))
    if layout.test_size >= len(rows) or size >= len(rows):
        taken = int(max(size, layout.test_size))
        raise UsageError("test_size", f"test_size takes {taken} of {len(rows)} rows, which leaves none to train on")
    # Equal rows go together: a group is drawn by its first row, and taken if all of it still fits.
    _, first, of, sizes = np.unique(group[rows], return_index=True, return_inverse=True, return_counts=True)
    order = _drawn(rows[first], layout.seed, _SPLIT)
    fits = np.zeros(len(first), dtype=np.bool_)
    room = size
    for number in order.tolist():
        if not room:
            break
        if sizes[number] <= room:
            fits[number] = True
            room -= int(sizes[number])
    in_test = fits[of]
    if not in_test.any():
        raise UsageError("test_size", "every row has too many equals to be put into a test split without them")
    return {"train": rows[~in_test], "test": rows[in_test]}


def _shared(
    rows: NDArray[np.int64],
    place: NDArray[np.int64],
    tokens: NDArray[np.int64],
    shares: Mapping[int, SourceShare],
    seed: int,
) -> NDArray[np.int64]:
    """Return the rows of each place as often as its share says: all of them, and a part of them once more.

    Of tokens there are never more than asked for, and as many as whole rows allow, taken in the order drawn.
    """
    times = np.zeros(len(rows), dtype=np.int64)
    for number, share in shares.items():
        own = np.flatnonzero(place[rows] == number)
        size = tokens[rows[own]] if share.unit == "tokens" else np.ones(len(own), dtype=np.int64)
        whole = int(size.sum())
        amount = round(share.amount * whole) if share.unit == "times" else int(share.amount)
        if whole:
            times[own] = amount // whole
            drawn = _drawn(rows[own], seed, _WEIGHT)
            times[own[drawn[np.cumsum(size[drawn]) <= amount % whole]]] += 1
    # Round by round, so that what is repeated stands apart.
    return np.concatenate([rows[times > done] for done in range(int(times.max(initial=0)))] or [rows[:0]])


def _examples(rows: NDArray[np.int64], begins: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the examples of rows, in their order."""
    starts, counts = begins[rows], begins[rows + 1] - begins[rows]
    if (counts == 1).all():
        return starts
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(np.repeat(starts, counts) + inside, dtype=np.int64)
