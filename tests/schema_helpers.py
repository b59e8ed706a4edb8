"""Messages for the tests of schemas, and a function that normalizes a row."""

from ftdata.schemas import normalize
from ftdata.types import Row, Source

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def convert(data, **options):
    return normalize(Row(data, Source("data.json", 4, 7)), **options)


FUNCTION = {"name": "f", "arguments": {"a": 0}}

CALL = {"type": "function", "function": FUNCTION}
