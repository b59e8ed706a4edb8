"""G21: untrusted bytes are read or refused with a clear error: the seeds of the fuzzer and mutations of them."""

import random
import time

import fuzz
import pytest
from laws import ONCE, profile

TARGETS = [pytest.param(name, marks=pytest.mark.slow if name == "render" else ()) for name in fuzz.TARGETS]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_random_bytes_are_read_or_refused(target):
    chance = random.Random(target)
    known = list(fuzz.seeds(target))
    tries = (20 if target == "render" else 300) * profile() // ONCE
    for data in [*known, *(near(chance, known) for _ in range(tries))]:
        began = time.process_time()
        fuzz.run_target(target, data)
        assert time.process_time() - began < 10, data


def near(chance, known):
    """Return a seed with parts replaced, repeated or removed, or with a piece of another seed."""
    data, other = bytearray(chance.choice(known)), chance.choice(known)
    for _ in range(chance.randint(1, 8)):
        at, size = chance.randint(0, len(data)), chance.choice([0, 1, 1, 4, 16])
        begin = chance.randint(0, len(other))
        piece = chance.choice([bytes([chance.randrange(256)]), other[begin : begin + size], data[at : at + size] * 2])
        data[at : at + size] = piece
    return bytes(data)
