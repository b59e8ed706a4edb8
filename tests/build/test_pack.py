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
def test_every_example_once_and_whole(case):
    """P1, P3, P10."""
    lengths, capacity = case
    packs = best_fit_decreasing(lengths, capacity).packs
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= capacity for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)


def naive(lengths, capacity):
    """Best-fit decreasing as a textbook has it."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting, key=lambda index: free[index])] -= length
        else:
            free.append(capacity - length)
    return free


@given(cases)
def test_it_is_best_fit_decreasing(case):
    """P6: as many packs, and as full, as the plain algorithm; never fewer than the tokens need."""
    lengths, capacity = case
    packs = best_fit_decreasing(lengths, capacity).packs
    assert sorted(capacity - sum(lengths[i] for i in pack) for pack in packs) == sorted(naive(lengths, capacity))
    assert len(packs) >= math.ceil(sum(lengths) / capacity)


def test_realistic_lengths_fill_the_packs():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, 20_000), 1, 2048).astype(int)
    plan = best_fit_decreasing(lengths, 2048)
    assert len(plan) <= math.ceil(lengths.sum() / 2048) * 1.001


@pytest.mark.parametrize("lengths", [[0], [9], [3, -1]])
def test_lengths_that_cannot_be_packed_are_refused(lengths):
    with pytest.raises(UsageError):
        best_fit_decreasing(lengths, 8)


def test_unpacked_is_one_each():
    assert plan_unpacked(3).packs == [[0], [1], [2]]
    assert best_fit_decreasing([], 8).packs == []
