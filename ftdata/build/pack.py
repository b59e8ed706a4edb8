"""Assign examples to packed sequences with best-fit decreasing bin packing.

Every example is in exactly one pack and is never cut. The plan depends only on the lengths of the examples and their
order. Tokens are gathered later, when the packs are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import UsageError


@dataclass(frozen=True, slots=True)
class PackPlan:
    """The assignment of examples to packed sequences (packs).

    Attributes:
        order: int64 `[examples]`, the examples in the order of the packs.
        bounds: int64 `[packs + 1]`; pack `p` contains the examples `order[bounds[p]:bounds[p + 1]]`.
    """

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def packs(self) -> list[list[int]]:
        """For each packed sequence, the list of the indices of its examples."""
        return [self.order[start:end].tolist() for start, end in zip(self.bounds[:-1], self.bounds[1:], strict=True)]


def plan_unpacked(count: int) -> PackPlan:
    """Return an assignment with one example in each packed sequence."""
    return PackPlan(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def plan_pairs(count: int) -> PackPlan:
    """Return an assignment of the two sides of each preference pair, which are consecutive, to one pack."""
    return PackPlan(np.arange(count, dtype=np.int64), np.arange(0, count + 1, 2, dtype=np.int64))


WINDOW = 1 << 22
"""Number of examples that are packed together. A larger window would not fill packs better, and would make writing
slower, because the tokens of a pack would come from more places."""


def plan_packs(lengths: NDArray[np.integer], capacity: int) -> PackPlan:
    """Assign examples to packed sequences with `best_fit_decreasing`, separately for every `WINDOW` examples."""
    starts = range(0, max(len(lengths), 1), WINDOW)
    plans = [best_fit_decreasing(lengths[start : start + WINDOW], capacity) for start in starts]
    ends = [plan.bounds[1:] + start for start, plan in zip(starts, plans, strict=True)]
    orders = [plan.order + start for start, plan in zip(starts, plans, strict=True)]
    return PackPlan(np.concatenate(orders), np.concatenate([np.zeros(1, np.int64), *ends]))


def best_fit_decreasing(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> PackPlan:
    """Assign examples to packed sequences, longest first. Each is added to the fullest sequence with enough space.

    The packs are sorted by their first example, and the examples of a pack are in their original order.

    Args:
        lengths: number of tokens of each example, `1 <= length <= capacity`.
        capacity: maximum number of tokens of a pack.

    Raises:
        UsageError: an example is empty or longer than a pack.

    >>> best_fit_decreasing([5, 3, 4, 1, 2], 8).packs
    [[0, 1], [2, 3, 4]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= capacity):
        raise UsageError(
            "pack_length",
            f"the examples have lengths from {sizes.min()} to {sizes.max()}, expected lengths from 1 to {capacity}",
        )
    order = _stable_argsort(capacity - sizes)
    pack_of = np.empty(len(sizes), dtype=np.int64)
    sorted_sizes = sizes[order]
    edges = np.flatnonzero(np.diff(sorted_sizes, prepend=0, append=0)).tolist()
    # Open packs are grouped by free space, and the existing free spaces are the bits of one integer. The smallest
    # sufficient space is the lowest bit at or above the length.
    packs_by_space: dict[int, list[int]] = {}
    spaces = count = 0
    for first, end in pairwise(edges):
        length, position = int(sorted_sizes[first]), first
        while position < end:
            fitting = spaces >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            # Examples of equal length fill one pack completely before the next pack is used.
            per_pack = space // length
            needed = -((position - end) // per_pack)
            if fitting:
                open_packs = packs_by_space[space]
                packs = open_packs[: -needed - 1 : -1]
                del open_packs[-needed:]
                if not open_packs:
                    spaces &= ~(1 << space)
            else:
                packs = list(range(count, count + needed))
                count += needed
            packed = min(end - position, per_pack * len(packs))
            pack_of[order[position : position + packed]] = (
                np.repeat(packs, per_pack)[:packed] if per_pack > 1 else packs
            )
            position += packed
            full, remainder = divmod(packed, per_pack)
            filled, partial = (packs[:full], space - per_pack * length), (packs[full:], space - remainder * length)
            for group, free in (filled, partial):
                if group and free:
                    packs_by_space.setdefault(free, []).extend(group)
                    spaces |= 1 << free
    return _make_plan(pack_of, count)


def _stable_argsort(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices that sort non-negative integers. Equal integers keep their order.

    This is a radix sort with 16-bit digits, four times as fast as `np.argsort` for a million numbers.
    """
    order = np.argsort(numbers.astype(np.uint16), kind="stable")
    for shift in range(16, int(numbers.max(initial=0)).bit_length(), 16):
        order = order[np.argsort((numbers[order] >> shift).astype(np.uint16), kind="stable")]
    return order


def _make_plan(pack_of: NDArray[np.int64], count: int) -> PackPlan:
    first = np.full(count, len(pack_of), dtype=np.int64)
    np.minimum.at(first, pack_of, np.arange(len(pack_of)))
    rank = np.empty(count, dtype=np.int64)
    rank[_stable_argsort(first)] = np.arange(count)
    ranked = rank[pack_of]
    sizes = np.bincount(ranked, minlength=count)
    return PackPlan(_stable_argsort(ranked), np.concatenate(([0], np.cumsum(sizes))))
