"""For tests of your own: strategies that make awkward conversations, and the laws that every example keeps.

    from hypothesis import given
    from ftdata.testing import check_laws, conversations

    @given(conversations())
    def test_my_template(messages):
        for example in encode(messages, tokenizer="my-model", template="my.jinja"):
            check_laws(example, messages)

Needs Hypothesis (`pip install 'ftdata[test]'`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftdata.types import IGNORE_INDEX, Example, Message

try:
    from hypothesis import strategies as st
except ImportError as error:  # pragma: no cover
    from ftdata.errors import MissingDependency

    raise MissingDependency(
        "missing_hypothesis", "ftdata.testing needs Hypothesis", hint="pip install 'ftdata[test]'"
    ) from error

AWKWARD = (
    "{{ 7*7 }}",
    "{% for x in y %}",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "</s>",
    "<s>",
    "[INST]",
    "[/INST]",
    "<eos>",
    "\u200b",
    "\ufeff",
    "e\u0301",
    "\u202eabc",
    "👩‍👩‍👧",
    "\x00",
    "\r\n",
    "\u2028",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "true",
    "007",
    "2024-01-01",
    "NA",
    "年",
    "Â",
    "’",
    '"',
    "\\",
    "'",
    "<",
    "&",
    "None",
)
"""Pieces that break tools: control tokens, template syntax, blanks, combining marks, look-alikes of numbers."""


def texts(*, min_size: int = 1) -> st.SearchStrategy[str]:
    """Return a strategy for texts: any Unicode but surrogates, mixed with `AWKWARD` pieces."""
    piece = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.sampled_from(AWKWARD))
    return st.lists(piece, min_size=min_size, max_size=6).map("".join)


def conversations(*, system: bool = True, max_turns: int = 4) -> st.SearchStrategy[list[Message]]:
    """Return a strategy for conversations: maybe a system message, then user and assistant by turns."""

    def build(parts: tuple[str | None, list[tuple[str, str]]]) -> list[Message]:
        rule, turns = parts
        messages: list[Message] = [{"role": "system", "content": rule}] if rule is not None else []
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages

    answer = texts().filter(lambda text: bool(text.strip()))
    rule = st.none() | texts() if system else st.none()
    return st.tuples(rule, st.lists(st.tuples(texts(), answer), min_size=1, max_size=max_turns)).map(build)


def check_laws(example: Example, messages: Sequence[Mapping[str, Any]], trained: Sequence[int] | None = None) -> None:
    """Assert the masking laws on one encoded conversation.

    Args:
        example: the result of `encode`.
        messages: the conversation.
        trained: the messages that must carry loss; `None` leaves open which of the assistant's do.

    Raises:
        AssertionError: naming the law.
    """
    ids, labels, offsets = example.input_ids, example.labels, example.offsets
    assert len(ids) == len(labels) == len(example.trained) == len(offsets), "M3: lengths differ"
    assert ((labels == ids) | (labels == IGNORE_INDEX)).all(), "M3: a label is neither the id nor -100"
    position = 0
    for span in example.spans:
        assert span.start == position < span.end, "spans do not tile the text"
        position = span.end
    assert position == len(example.text), "spans do not tile the text"
    owners = {span.message for span in example.spans if span.generated}
    assert all(messages[owner]["role"] == "assistant" for owner in owners), "M1: a message of another role is generated"
    if trained is not None:
        assert owners == set(trained), f"M1/M2: generated messages are {owners}, expected {set(trained)}"
    inside = np.zeros(len(example.text) + 1, dtype=np.bool_)
    for span in example.spans:
        if span.generated:
            inside[span.start : span.end] = True
    overlaps = np.array([bool(inside[a:b].any()) for a, b in offsets], dtype=np.bool_)
    overlaps[:1] = False
    assert (example.trained <= overlaps).all(), "M1: a token outside every generated span is trained"
    if trained is not None:
        assert (example.trained == overlaps).all(), "M2: a token of a generated span is not trained"
