"""A row as a conversation, and messages that tests of schemas share."""

from ftdata.schemas import normalize
from ftdata.types import Row, Source

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def convert(data, **options):
    return normalize(Row(data, Source("data.json", 4, 7)), **options)


FUNCTION = {"name": "f", "arguments": {"a": 0}}

CALL = {"type": "function", "function": FUNCTION}
