"""Rows for the tests of readers, and functions that write, compress and read them."""

import json

import pyarrow as pa
from hypothesis import strategies as st

from ftdata import read
from ftdata.readers import resolve_sources
from ftdata.testing import text_strategy

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text_strategy(min_size=0),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text_strategy(min_size=0), inner, max_size=3),
)
anything = st.lists(st.dictionaries(text_strategy(min_size=1), values, min_size=1, max_size=4), min_size=2, max_size=6)

TALK = [{"role": "user", "content": "q, “x”\n\r\n\u2028"}, {"role": "assistant", "content": "007"}]

ROWS = [{"messages": TALK}, {"messages": TALK[::-1]}]


def data_of(place):
    return [row.data for row in read(place)]


def questions(path):
    return [row.data["question"].rstrip("x") for row in read(path)]


CELLS = [{"question": "007", "answer": "NA"}, {"question": "2024-01-01", "answer": 'a "b", c\nd'}]

LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def outcomes(path):
    return [entry for source in resolve_sources(path) for entry in source.rows()]
