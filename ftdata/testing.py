"""Test utilities: Hypothesis strategies for difficult conversations, and checks of the masking rules.

    from ftdata.testing import try_template

    def test_my_template():
        rejects = try_template("my-model", "my.jinja", max_examples=1000)
        assert not rejects, rejects

To check single rules, use `@given(conversation_strategy())` and call `check_masking_rules(example, messages)` for every
example of `encode(messages, ...)`.

The rules:

- M0: the ids are the ids of the whole text as the tokenizer encodes it.
- M1: only generated text is trained: turns of the assistant with their stop tokens.
- M2: all generated text is trained.
- M3: a label is the id of its token, or -100.
- M8: the text of a row never becomes a control token.

This module requires Hypothesis (`pip install 'ftdata[test]'`).
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
from ftdata.schemas.answer_text import has_answer
from ftdata.types import IGNORE_INDEX, Example, Message

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

AWKWARD_TEXTS = (
    "{{ 7*7 }}", "{% for x in y %}", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "[INST]", "[/INST]",
    "<eos>", "\u200b", "\ufeff", "e\u0301", "\u202eabc", "👩‍👩‍👧", "\x00", "\r\n", "\u2028", " ", "  ", "\n", "\n\n",
    "\t", "true", "007", "2024-01-01", "NA", "年", "Â", "’", '"', "\\", "'", "<", "&", "None",
)  # fmt: skip
"""Texts that often cause errors: control tokens, template syntax, whitespace, combining marks, numbers as text."""


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer that needs no download.

    Ids 0 to 255 are bytes. Ids 256 and 257 are the control tokens of ChatML.

    >>> encoded = byte_tokenizer().encode("Hi<|im_end|>")
    >>> encoded.ids, encoded.tokens
    ([72, 105, 257], ['H', 'i', '<|im_end|>'])
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # Byte-level BPE represents unprintable bytes by characters from U+0100 on (GPT-2's `bytes_to_unicode`).
    unprintable = {byte: 256 + n for n, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    vocabulary = {chr(unprintable.get(byte, byte)): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def text_strategy(*, min_size: int = 1) -> st.SearchStrategy[str]:
    """Return a Hypothesis strategy for texts, each made of up to four random or difficult strings.

    A string is any Unicode text without surrogates, or an item of `AWKWARD_TEXTS`.

    Args:
        min_size: minimum number of strings; a string can be empty.
    """
    piece = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.sampled_from(AWKWARD_TEXTS))
    return st.lists(piece, min_size=min_size, max_size=4).map("".join)


def conversation_strategy(
    *, system: bool = True, reasoning: bool = False, tools: bool = False, max_turns: int = 4
) -> st.SearchStrategy[list[Message]]:
    """Return a Hypothesis strategy for conversations with alternating user and assistant messages.

    Args:
        system: whether conversations can begin with a system message.
        reasoning: whether answers can have `reasoning_content`.
        tools: whether answers can follow a tool call and its result.
        max_turns: maximum number of user messages.
    """
    answer = text_strategy().filter(has_answer)
    reasoning_text = st.none() | answer if reasoning else st.none()
    call = st.none() | st.tuples(answer, answer) if tools else st.none()
    turn = st.tuples(text_strategy(), call, reasoning_text, answer)
    system_text = st.none() | text_strategy() if system else st.none()
    return st.tuples(system_text, st.lists(turn, min_size=1, max_size=max_turns)).map(_make_conversation)


def _make_conversation(
    parts: tuple[str | None, list[tuple[str, tuple[str, str] | None, str | None, str]]],
) -> list[Message]:
    system_text, turns = parts
    messages: list[Message] = [{"role": "system", "content": system_text}] if system_text is not None else []
    for number, (question, call, reasoning_text, answer) in enumerate(turns):
        messages.append({"role": "user", "content": question})
        if call is not None:
            name, id_ = "look_up", f"call{number:05}"
            function: Any = {"name": name, "arguments": {"what": call[0]}}
            tool_call: Any = {"type": "function", "id": id_, "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [tool_call]})
            messages.append({"role": "tool", "name": name, "tool_call_id": id_, "content": call[1]})
        message: Message = {"role": "assistant", "content": answer}
        messages.append(message if reasoning_text is None else {**message, "reasoning_content": reasoning_text})
    return messages


_RENDERING_OPTIONS = ("turns", "on_dropped_message", "date", "template_kwargs")


def try_template(
    tokenizer: Any, template: str | Path | None = None, *, max_examples: int = 200, **options: Any
) -> dict[str, int]:
    """Encode difficult conversations with a template, and check all rules on every example.

    Args:
        tokenizer: see `encode`.
        template: see `encode`.
        max_examples: number of conversations: plain, with a system message, with reasoning, and with tool calls.
        options: options of `encode` that affect rendering: `turns`, `on_dropped_message`, `date`, `template_kwargs`.

    Returns:
        The number of rejected conversations by error code. A template need not support every conversation.

    Raises:
        AssertionError: an example breaks a rule. Hypothesis prints the smallest conversation that breaks the rule.
        UsageError: an option is not supported, because it would change the rules.
        TemplateRefused: the template or the tokenizer cannot be used for any row.
        HubError: the tokenizer cannot be downloaded.

    >>> rejects = try_template(byte_tokenizer(), "chatml", max_examples=5)
    """
    for name in options:
        check_choice("option", name, _RENDERING_OPTIONS)
    rejects: Counter[str] = Counter()
    recipe = make_recipe(tokenizer, template)
    kinds: tuple[dict[str, bool], ...] = ({"system": False}, {}, {"reasoning": True}, {"tools": True})

    @settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.one_of(*(conversation_strategy(**kind) for kind in kinds)))
    def check(messages: list[Message]) -> None:
        try:
            plain = encode(messages, tokenizer, template, **options)
            allowed = encode(messages, tokenizer, template, **{**options, "control_tokens": "allow"})
        except BadRow as error:
            rejects[error.code] += 1
            return
        for example in plain:
            check_masking_rules(example, messages)
            check_control_tokens(example, recipe.control.ids)
            unconfirmed = "M2: the generation tags of the template mark text that the model does not generate"
            assert "generation_tags_unconfirmed" not in example.flags, unconfirmed
        generated = {span.message for example in plain for span in example.spans if span.generated}
        answers = {index for index, message in enumerate(messages) if message["role"] == "assistant"}
        assert generated == answers, "M2: a turn is not trained"
        for example in allowed:
            check_masking_rules(example, messages)
            ids = recipe.tokenizer.encode([example.text])[0].ids
            assert example.input_ids[-len(ids) :].tolist() == ids.tolist(), "M0: ids differ from the tokenizer's ids"

    check()
    return dict(rejects)


def check_control_tokens(example: Example, control: ArrayLike) -> None:
    """Assert that all control tokens of an example come from the template, and none from the text of the row.

    Args:
        example: the result of `encode` with control tokens escaped.
        control: ids of the control tokens (integers).

    Raises:
        AssertionError: the example breaks a rule; the message contains the number of the rule.
    """
    scaffold = np.ones(len(example.text) + 1, dtype=np.bool_)
    for span in example.spans:
        if span.part.is_data:
            scaffold[span.start : span.end] = False
    for position in np.flatnonzero(np.isin(example.input_ids, np.asarray(control))):
        start, end = example.offsets[position]
        assert scaffold[start:end].all(), f"M8: the control token at position {position} covers text of the row"


def check_masking_rules(
    example: Example, messages: Sequence[Mapping[str, Any]], trained: Sequence[int] | None = None
) -> None:
    """Assert that an encoded conversation follows the masking rules M1, M2 and M3, which this module defines.

    Args:
        example: the result of `encode`.
        messages: the conversation.
        trained: indices of the messages that must be trained; `None` allows any assistant messages.

    Raises:
        AssertionError: the example breaks a rule; the message contains the number of the rule.
    """
    ids, labels, offsets = example.input_ids, example.labels, example.offsets
    assert len(ids) == len(labels) == len(example.trained) == len(offsets), "M3: lengths differ"
    assert ((labels == ids) | (labels == IGNORE_INDEX)).all(), "M3: a label is neither the id nor -100"
    position = 0
    for span in example.spans:
        assert span.start == position < span.end, "spans do not tile the text"
        position = span.end
    assert position == len(example.text), "spans do not tile the text"
    generated = {span.message for span in example.spans if span.generated}
    is_answer = [messages[index]["role"] == "assistant" for index in generated]
    assert all(is_answer), "M1: a non-assistant message is generated"
    if trained is not None:
        assert generated == set(trained), f"M1/M2: generated messages are {generated}, expected {set(trained)}"
    inside = np.zeros(len(example.text) + 1, dtype=np.bool_)
    for span in example.spans:
        if span.generated:
            inside[span.start : span.end] = True
    overlaps = np.array([bool(inside[start:end].any()) for start, end in offsets], dtype=np.bool_)
    overlaps[:1] = False
    assert (example.trained <= overlaps).all(), "M1: a token outside every generated span is trained"
    if trained is not None:
        assert (example.trained == overlaps).all(), "M2: a token of a generated span is not trained"
