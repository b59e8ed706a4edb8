"""A row as a conversation, and messages that tests of schemas share."""

from ftdata.schemas import normalise
from ftdata.types import Row, Source

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def convert(data, **options):
    return normalise(Row(data, Source("data.json", 4, 7)), **options)


FUNCTION = {"name": "f", "arguments": {"a": 0}}

CALL = {"type": "function", "function": FUNCTION}
