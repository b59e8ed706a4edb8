"""Checks of rows: of their flags, tokens, messages and texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from ftdata.inspection import text_detectors
from ftdata.inspection.checks.registry import CheckedRow, register_check, register_flag_check
from ftdata.inspection.row_views import content_texts
from ftdata.types import Message

# --- flags, which the stages give

register_flag_check(
    "no_trained_stop",
    "error",
    "a trained turn does not end in a trained control token: the model will not learn to stop",
    "use a template that ends turns with one, or on_missing_stop='append_eos'",
)
register_flag_check(
    "answer_truncated",
    "error",
    "max_length cuts an answer in the middle: the model learns to break off",
    "raise max_length, or choose overlong='drop_turns'",
)
register_flag_check(
    "missing_final_stop",
    "warning",
    "the last turn has no stop: the template prints it only before the next message",
    "on_missing_stop='append_eos' trains the end-of-text token there",
)
register_flag_check(
    "message_truncated",
    "warning",
    "the template prints only part of a message",
    "see what is lost with `ftdata preview --odd`",
)
register_flag_check(
    "message_dropped", "warning", "the template leaves out a whole message", "use a template that prints it"
)
register_flag_check(
    "reasoning_dropped",
    "warning",
    "the template does not print reasoning",
    "use a template that does, or take the reasoning out",
)
register_flag_check(
    "tools_dropped",
    "warning",
    "the template does not print the tools that are given, or not whole",
    "use a template that prints tools",
)
register_flag_check(
    "fields_dropped",
    "note",
    "keys of messages are not printed by the template",
    "take them out, if they are not meant to be trained",
)
register_flag_check(
    "prompt_mismatch",
    "warning",
    "what is trained lacks a scaffold that the prompt forces at inference",
    "see `ftdata templates check`; give reasoning where the prompt opens a thinking block",
)
register_flag_check(
    "empty_thinking",
    "warning",
    "answers train an empty thinking block, which the template prints where no reasoning is given",
    "pass --template-kwarg enable_thinking=false if the template reads it, which moves the block to the prompt; "
    "or give reasoning; train it only if the model shall decide not to think",
)
register_flag_check(
    "token_crosses_boundary",
    "warning",
    "a trained token crosses the boundary of the answer: inference never produces a token merged with the prompt",
    "end the prompt with a control token or a line break, or put the space before the answer into the generation block",
)
register_flag_check(
    "rejected_side_dropped",
    "note",
    "only the chosen side of preference pairs is built",
    "nothing, if supervised fine-tuning on the chosen side is meant",
)
register_flag_check(
    "generation_tags_unconfirmed",
    "warning",
    "the template's tags mark what is not, or not certainly, what the model produces",
    "mend the tags of the template, or take them out: turns are found without them",
)
register_flag_check(
    "stop_outside_generation_tags",
    "note",
    "the template's own tags leave the stop out; it is trained all the same",
    "mend the tags of the template",
)
register_flag_check(
    "control_tokens",
    "warning",
    "control tokens are spelled in the data",
    "they are tokenised as plain text; clean the data if they are left-overs of a template",
)
register_flag_check(
    "trailing_messages",
    "warning",
    "the conversation ends with messages that nothing answers",
    "drop them from the data",
)


# --- tokens of a row


@register_check(
    "double_bos",
    "error",
    "row",
    "the text begins with BOS twice",
    "take BOS out of the data, or out of the template",
)
def _double_bos(row: CheckedRow) -> Iterator[str]:
    tokenizer = row.recipe.tokenizer
    bos = tokenizer.special_tokens.get("bos_token")
    if bos is not None and any(one.input_ids[:2].tolist() == [tokenizer.id_of(bos)] * 2 for one in row.examples):
        yield f"begins with {bos} twice"


@register_check(
    "double_eos",
    "warning",
    "row",
    "an answer ends in two stop tokens",
    "take the stop out of the data: the template writes it",
)
def _double_eos(row: CheckedRow) -> Iterator[str]:
    for example in row.examples:
        ids, trained = example.input_ids, example.trained
        again = np.flatnonzero((ids[1:] == ids[:-1]) & trained[1:] & trained[:-1])
        for at in again[row.recipe.control.among(ids[again])].tolist():
            yield f"{example.text[slice(*example.offsets[at].tolist())]} twice"


_LEAST, _LONG = 0.005, 400


@register_check(
    "label_share",
    "note",
    "row",
    "next to nothing of the row is trained; or, where it came as tokens, all of it",
    "look at it with `ftdata preview --odd`: a short answer to a long text may be meant, a lost one is not",
)
def _label_share(row: CheckedRow) -> Iterator[str]:
    tokens = sum(len(one) for one in row.examples)
    trained = sum(int(one.trained.sum()) for one in row.examples)
    if tokens >= _LONG and trained < _LEAST * tokens:
        yield f"{trained:,} of {tokens:,} tokens are trained"
    came_as_tokens = row.said.tokens is not None and row.recipe.train_on != "all"
    turns = sum(row.recipe.control.count(one.input_ids) for one in row.examples)
    if came_as_tokens and tokens == trained and turns > 1:
        yield "all tokens are trained, those of prompts, too"


# --- messages of a row


@register_check(
    "role_order",
    "warning",
    "row",
    "the roles come in an order in which no model is asked",
    "mend the order: a system message first, then questions and answers by turns",
    of_messages=True,
)
def _role_order(row: CheckedRow) -> Iterator[str]:
    before = ""
    for number, message in enumerate(row.said.messages):
        role, place = message["role"], f"messages[{number}]"
        if role in ("system", "developer"):
            if before not in ("", "system", "developer"):
                yield f"{place} is a system message after others"
        elif role == "assistant" and before in ("", "system", "developer"):
            yield f"{place} answers before anything was asked"
        elif role == before and role in ("user", "assistant"):
            yield f"{place} follows a message of the same role ({role})"
        before = role
    yield from _calls(row.said.messages)


_RESULTS = ("tool", "observation", "function", "ipython", "tool_response")
"""Roles of what tools answer; those of a template's own are left as they are."""


def _calls(messages: Sequence[Message]) -> Iterator[str]:
    """Yield what is wrong with calls of tools and their results."""
    waiting = list[str | None]()
    for number, message in enumerate(messages):
        place, given = f"messages[{number}]", message.get("tool_call_id")
        if message["role"] not in _RESULTS:
            if waiting:
                yield f"{place} comes before the result of a tool that was called"
            waiting = [call.get("id") for call in message.get("tool_calls") or ()]
        elif not waiting:
            yield f"{place} is the result of a tool that nobody called"
        else:
            own = [call for call in waiting if given is None or call in (None, given)]
            if not own:
                yield f"{place} answers the call {given!r}, which nobody made"
            waiting.remove(given if given in own else (own or waiting)[0])


@register_check(
    "trivial_answer",
    "warning",
    "row",
    "an answer says nothing: it is a placeholder, or dots and dashes alone",
    "take the row out, or give the message train: false",
    of_messages=True,
)
def _trivial_answer(row: CheckedRow) -> Iterator[str]:
    for number, message in enumerate(row.said.messages):
        content = message.get("content")
        asked = message["role"] == "assistant" and message.get("train", True) and not message.get("tool_calls")
        text = content if isinstance(content, str) else "\n".join(content_texts(content))
        if asked and content is not None and text_detectors.is_placeholder_text(text) and _is_trained(row, number):
            yield f"messages[{number}].content is {text.strip()!r}"


def _is_trained(row: CheckedRow, number: int) -> bool:
    """Whether any token of a message is trained."""
    for one in row.examples:
        for span in one.spans:
            if span.message == number and span.generated:
                inside = (one.offsets[:, 0] >= span.start) & (one.offsets[:, 1] <= span.end)
                if one.trained[inside].any():
                    return True
    return False


@register_check(
    "left_over",
    "warning",
    "row",
    "a message holds what the template of some model writes",
    "take it out: the data was templated once before",
    of_messages=True,
)
def _left_over(row: CheckedRow) -> Iterator[str]:
    for number, message in enumerate(row.said.messages):
        for text in content_texts(message.get("content")):
            if (found := text_detectors.find_template_leftover(text)) and not row.recipe.control.spelled(found):
                yield f"messages[{number}].content holds {found!r}"


@register_check(
    "media_placeholder",
    "warning",
    "row",
    "a message holds a placeholder for an image, a video or a sound, which is built as text",
    "remove these rows: the model would learn to answer about what it is not shown",
    of_messages=True,
)
def _media_placeholder(row: CheckedRow) -> Iterator[str]:
    for number, message in enumerate(row.said.messages):
        for text in content_texts(message.get("content")):
            if found := text_detectors.find_media_placeholder(text):
                yield f"messages[{number}].content holds {found!r}"


@register_check(
    "default_system",
    "note",
    "row",
    "the template puts a system prompt of its own before the conversation",
    "give a system message, so that training and inference say the same",
    of_messages=True,
)
def _default_system(row: CheckedRow) -> Iterator[str]:
    messages = row.said.messages
    if len(re.findall(r"[^\W\d_]+", row.adds)) > 3 and messages and messages[0]["role"] not in ("system", "developer"):
        yield repr(row.adds[:80])


# --- texts of a row


@register_check(
    "mojibake",
    "warning",
    "row",
    "the text was decoded with a wrong encoding once",
    "repair it where it was made, for example with ftfy",
)
def _mojibake(row: CheckedRow) -> Iterator[str]:
    for example in row.examples:
        # A build may end in the midst of a character, where it was cut.
        if (
            found := text_detectors.find_mojibake(example.text.rstrip("\ufffd") if example.cut else example.text)
        ) is not None:
            yield repr(found)


@register_check(
    "pii",
    "warning",
    "row",
    "something looks as if it belonged to a person",
    "take it out, or put a placeholder in its place",
    asked="pii",
)
def _pii(row: CheckedRow) -> Iterator[str]:
    for example in row.examples:
        for kind, found in text_detectors.find_personal_data(example.text):
            yield f"{kind} {found}"
