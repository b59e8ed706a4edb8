"""For tests of your own: strategies that make awkward conversations, and the laws that every example keeps.

    from ftdata.testing import try_template

    def test_my_template():
        refused = try_template("my-model", "my.jinja", max_examples=1000)
        assert not refused, refused

or law by law, with `@given(conversations())` and `check_masking_rules(example, messages)` for each of `encode(messages, ...)`.

The laws:

- M0: ids are those that the tokenizer gives the whole text.
- M1: nothing is trained but what the model must produce: turns of the assistant, with their stops.
- M2: all of that is trained.
- M3: a label is the token's own id, or -100.
- M8: no control token is made of what a row says.

Needs Hypothesis (`pip install 'ftdata[test]'`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import ArrayLike

from ftdata.errors import BadRow, check_choice
from ftdata.pipeline.examples import encode
from ftdata.pipeline.recipe import make_recipe
from ftdata.schemas.messages import has_answer
from ftdata.types import IGNORE_INDEX, Example, Message, Part

__all__ = [
    "byte_tokenizer",
    "check_control_tokens",
    "check_masking_rules",
    "conversation_strategy",
    "text_strategy",
    "try_template",
]

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError as error:
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


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Return a tokenizer that needs no download: a token for each byte, whose id it is, and ChatML's control tokens.

    >>> encoded = byte_tokenizer().encode("Hi<|im_end|>")
    >>> encoded.ids, encoded.tokens
    ([72, 105, 257], ['H', 'i', '<|im_end|>'])
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # How byte-level BPE spells bytes that show nothing (GPT-2's `bytes_to_unicode`).
    others = {byte: 256 + n for n, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    vocabulary = {chr(others.get(byte, byte)): byte for byte in range(256)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made


def text_strategy(*, min_size: int = 1) -> st.SearchStrategy[str]:
    """Return a strategy for texts: any Unicode but surrogates, mixed with `AWKWARD` pieces.

    Args:
        min_size: how many pieces at least, of four at most; a piece may be empty.
    """
    piece = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.sampled_from(AWKWARD))
    return st.lists(piece, min_size=min_size, max_size=4).map("".join)


def conversation_strategy(
    *, system: bool = True, reasoning: bool = False, tools: bool = False, max_turns: int = 4
) -> st.SearchStrategy[list[Message]]:
    """Return a strategy for conversations: maybe a system message, then user and assistant by turns.

    Args:
        system: some begin with a system message.
        reasoning: some answers have `reasoning_content`.
        tools: some answers come after a tool call and its result.
        max_turns: how many questions at most.
    """
    answer = text_strategy().filter(has_answer)
    thought = st.none() | answer if reasoning else st.none()
    call = st.none() | st.tuples(answer, answer) if tools else st.none()
    turn = st.tuples(text_strategy(), call, thought, answer)
    rule = st.none() | text_strategy() if system else st.none()
    return st.tuples(rule, st.lists(turn, min_size=1, max_size=max_turns)).map(_conversation)


def _conversation(
    parts: tuple[str | None, list[tuple[str, tuple[str, str] | None, str | None, str]]],
) -> list[Message]:
    rule, turns = parts
    messages: list[Message] = [{"role": "system", "content": rule}] if rule is not None else []
    for number, (question, call, thought, answer) in enumerate(turns):
        messages.append({"role": "user", "content": question})
        if call is not None:
            name, id_ = "look_up", f"call{number:05}"
            function: Any = {"name": name, "arguments": {"what": call[0]}}
            messages.append(
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "id": id_, "function": function}],
                }
            )
            messages.append({"role": "tool", "name": name, "tool_call_id": id_, "content": call[1]})
        spoken: Message = {"role": "assistant", "content": answer}
        messages.append(spoken if thought is None else {**spoken, "reasoning_content": thought})
    return messages


_RENDERING = ("turns", "on_dropped_message", "date", "template_kwargs")


def try_template(
    tokenizer: Any, template: str | Path | None = None, *, max_examples: int = 200, **options: Any
) -> dict[str, int]:
    """Encode awkward conversations and check every law on each.

    Args:
        tokenizer: as for `encode`.
        template: as for `encode`.
        max_examples: how many conversations: plain ones, with a system message, with reasoning, with tool calls.
        options: options of `encode` that change the rendering: `turns`, `on_dropped_message`, `date`, `template_kwargs`.

    Returns:
        How many conversations were refused, by code: what a template does not take is no broken law.

    Raises:
        AssertionError: a law is broken; Hypothesis shows the smallest conversation that breaks it.
        UsageError: another option, under which the laws say something else.
        TemplateRefused: the template, or the tokenizer, cannot be used at all.
        HubError: the tokenizer cannot be had.

    >>> refused = try_template(byte_tokenizer(), "chatml", max_examples=5)
    """
    for name in options:
        check_choice("option", name, _RENDERING)
    refused: Counter[str] = Counter()
    recipe = make_recipe(tokenizer, template)
    kinds: tuple[dict[str, bool], ...] = ({"system": False}, {}, {"reasoning": True}, {"tools": True})

    @settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.one_of(*(conversation_strategy(**kind) for kind in kinds)))
    def check(messages: list[Message]) -> None:
        try:
            plain = encode(messages, tokenizer, template, **options)
            allowed = encode(messages, tokenizer, template, **{**options, "control_tokens": "allow"})
        except BadRow as refusal:
            refused[refusal.code] += 1
            return
        for example in plain:
            check_masking_rules(example, messages)
            check_control_tokens(example, recipe.control.ids)
            assert "generation_tags_unconfirmed" not in example.flags, (
                "M2: the template marks what the model need not produce"
            )
        assert {span.message for one in plain for span in one.spans if span.generated} == {
            index for index, message in enumerate(messages) if message["role"] == "assistant"
        }, "M2: a turn is not trained"
        for example in allowed:
            check_masking_rules(example, messages)
            alone = recipe.tokenizer.encode([example.text])[0].ids
            assert example.input_ids[-len(alone) :].tolist() == alone.tolist(), "M0: ids are not the tokenizer's own"

    check()
    return dict(refused)


def check_control_tokens(example: Example, control: ArrayLike) -> None:
    """Assert that no control token stands where the row's own text does.

    Args:
        example: the result of `encode` with control tokens escaped.
        control: ids of control tokens (integers).

    Raises:
        AssertionError: naming the law.
    """
    scaffold = np.ones(len(example.text) + 1, dtype=np.bool_)
    for span in example.spans:
        if span.part is not Part.SCAFFOLD:
            scaffold[span.start : span.end] = False
    for position in np.flatnonzero(np.isin(example.input_ids, np.asarray(control))):
        start, end = example.offsets[position]
        assert scaffold[start:end].all(), f"M8: control token {position} is made of the row's text"


def check_masking_rules(
    example: Example, messages: Sequence[Mapping[str, Any]], trained: Sequence[int] | None = None
) -> None:
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
