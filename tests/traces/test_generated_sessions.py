"""Properties of converted sessions, for random sessions in every log format."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from trace_sessions import MARKER, Differences, compare_rows, make_session
from trace_writers import WRITERS

from ftdata.readers.sources import MemorySource
from ftdata.types import Reject

DOCUMENTS = ("atif", "responses", "verifiers")
"""Formats whose records are inside a single object."""

SEEDS = st.integers(0, 1 << 30)


def convert(records):
    """Return the rows and the rejects of records in memory."""
    items = list(MemorySource(records).rows())
    return [item.data for item in items if not isinstance(item, Reject)], [
        item for item in items if isinstance(item, Reject)
    ]


def write(name, seed, size):
    writer, features = WRITERS[name]
    session = make_session(seed, size, features)
    return session, writer(seed).write(session)


@pytest.mark.parametrize("name", WRITERS)
@often(60)
@given(seed=SEEDS, size=st.integers(1, 30))
def test_nothing_is_lost_duplicated_or_reordered(name, seed, size):
    session, records = write(name, seed, size)
    rows, rejects = convert(records)
    assert rejects == []
    assert compare_rows(session, [row["messages"] for row in rows]) == Differences(0, 0, 0, 0)


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in DOCUMENTS])
@often(30)
@given(seed=SEEDS, size=st.integers(1, 30))
def test_counts_add_up_to_the_records(name, seed, size):
    _, records = write(name, seed, size)
    rows, _ = convert(records)
    counts = [row["trace"]["records"] for row in rows]
    assert sum(number for count in counts for kind, number in count.items() if kind != "repeated") == len(records)


@pytest.mark.parametrize("name", ["claude_code", "codex", "pi", "droid"])
@often(30)
@given(seed=SEEDS, size=st.integers(4, 30))
def test_answers_of_the_live_contexts_are_trained_without_the_abandoned_contexts(name, seed, size):
    session, records = write(name, seed, size)
    rows, _ = convert(records)
    live = [row for row in rows if not row["trace"]["abandoned"]]
    trained = {
        marker
        for row in live
        for message in row["messages"]
        if message["role"] == "assistant" and message.get("train", True)
        for marker in MARKER.findall(json.dumps(message))
    }
    # The last context is live, and nothing of the model in it may depend on a row that a filter removes.
    assert {marker for marker in session.contexts[-1] if marker[2] in "tkc"} <= trained


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["text", "user", "tool_use"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("name", WRITERS)
@often(150)
@given(seed=SEEDS, size=st.integers(1, 12), value=VALUES, choice=SEEDS)
def test_damaged_sessions_are_rejected_without_exceptions(name, seed, size, value, choice):
    """Replace or remove one value anywhere in the records."""
    _, records = write(name, seed, size)
    records = json.loads(json.dumps(records))
    places = list(walk(records))
    container, key = random.Random(choice).choice(places)
    if choice % 3:
        container[key] = value
    else:
        del container[key]
    rows, rejects = convert(records)
    assert all(reject.code and reject.reason for reject in rejects)
    assert all(isinstance(row, dict | list) or row is value for row in rows)


def walk(value):
    """Yield each value inside a JSON value, as its container and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from walk(item)
