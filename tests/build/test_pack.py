import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftdata.build.pack import best_fit_decreasing, plan_unpacked
from ftdata.errors import UsageError

cases = st.integers(1, 64).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)


@given(cases)
def test_every_example_is_in_one_pack_and_complete(case):
    """P1, P3, P10."""
    lengths, capacity = case
    packs = best_fit_decreasing(lengths, capacity).packs
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= capacity for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)


def naive(lengths, capacity):
    """Return the free space of each pack after textbook best-fit decreasing."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting, key=lambda index: free[index])] -= length
        else:
            free.append(capacity - length)
    return free


@given(cases)
def test_packing_equals_textbook_best_fit_decreasing(case):
    """P6: the number and the fill of the packs equal those of the textbook algorithm."""
    lengths, capacity = case
    packs = best_fit_decreasing(lengths, capacity).packs
    assert sorted(capacity - sum(lengths[i] for i in pack) for pack in packs) == sorted(naive(lengths, capacity))
    assert len(packs) >= math.ceil(sum(lengths) / capacity)


def test_realistic_lengths_fill_the_packs():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, 20_000), 1, 2048).astype(int)
    plan = best_fit_decreasing(lengths, 2048)
    assert len(plan) <= math.ceil(lengths.sum() / 2048) * 1.001


@pytest.mark.parametrize("lengths", [[0], [9], [3, -1]])
def test_unpackable_lengths_are_refused(lengths):
    with pytest.raises(UsageError):
        best_fit_decreasing(lengths, 8)


def test_unpacked_plan_has_one_example_per_sequence():
    assert plan_unpacked(3).packs == [[0], [1], [2]]
    assert best_fit_decreasing([], 8).packs == []
