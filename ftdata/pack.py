"""Pack: lengths -> bins, by best-fit decreasing. Lengths only; tokens are gathered when packs are written.

Every example goes, whole, into exactly one pack. The plan depends on the lengths and their order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import UsageError


@dataclass(frozen=True, slots=True)
class Plan:
    """Which example goes where.

    Attributes:
        order: int64 `[examples]`, the examples in the order in which the packs hold them.
        bounds: int64 `[packs + 1]`, pack `p` holds `order[bounds[p]:bounds[p + 1]]`.
    """

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def packs(self) -> list[list[int]]:
        """The packs as lists of example indices."""
        return [self.order[a:b].tolist() for a, b in zip(self.bounds[:-1], self.bounds[1:], strict=True)]


def unpacked(count: int) -> Plan:
    """Return the plan that puts each of `count` examples into a row of its own."""
    return Plan(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def best_fit_decreasing(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> Plan:
    """Put examples, longest first, each into the fullest pack that still has room.

    Packs come out in the order of their first example, and hold their examples in the order given.

    Args:
        lengths: tokens of each example, `1 <= length <= capacity`.
        capacity: tokens that fit into one pack.

    Raises:
        UsageError: an example is longer than a pack, or empty.

    >>> best_fit_decreasing([5, 3, 4, 1, 2], 8).packs
    [[0, 1], [2, 3, 4]]
    """
    given = np.asarray(lengths, dtype=np.int64)
    if len(given) and not (given.min() >= 1 and given.max() <= capacity):
        raise UsageError(
            "pack_length", f"lengths range from {given.min()} to {given.max()}, a pack holds 1 to {capacity}"
        )
    pack_of = np.empty(len(given), dtype=np.int64)
    # Open packs by free space, and the set of spaces in use as the bits of one integer: the smallest space
    # that fits is the lowest bit at or above the length.
    with_space: dict[int, list[int]] = {}
    spaces = 0
    count = 0
    for index in np.argsort(-given, kind="stable").tolist():
        length = int(given[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            pack = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, pack = capacity, count
            count += 1
        pack_of[index] = pack
        left = space - length
        if left:
            with_space.setdefault(left, []).append(pack)
            spaces |= 1 << left
    return _in_order(pack_of, count)


def _in_order(pack_of: NDArray[np.int64], count: int) -> Plan:
    first = np.full(count, len(pack_of), dtype=np.int64)
    np.minimum.at(first, pack_of, np.arange(len(pack_of)))
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(count)
    ranked = rank[pack_of]
    sizes = np.bincount(ranked, minlength=count)
    return Plan(np.argsort(ranked, kind="stable"), np.concatenate(([0], np.cumsum(sizes))))
