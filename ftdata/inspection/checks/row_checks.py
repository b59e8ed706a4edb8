"""Audit checks of single rows. They inspect the flags, tokens, messages and texts of a row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ftdata.inspection import text_detectors
from ftdata.inspection.checks.registry import CheckedRow, register_check, register_row_check
from ftdata.inspection.row_views import content_texts
from ftdata.pipeline.drift import describe_drift
from ftdata.pipeline.flags import FLAGS
from ftdata.schemas.answer_text import has_visible_text

# --- flags, which the pipeline sets

for _code, _flag in FLAGS.items():
    if _flag.severity:
        register_check("flag", _code, _flag.severity, _flag.sentence, _flag.fix, contradicts=_flag.contradicts)(
            lambda _: iter(())
        )


# --- tokens of a row


@register_row_check(
    "double_bos",
    "error",
    "the text begins with two BOS tokens",
    "remove the BOS token from the data or from the template",
    contradicts=("no BOS token is doubled",),
)
def _check_double_bos(row: CheckedRow) -> Iterator[str]:
    tokenizer = row.recipe.tokenizer
    bos = tokenizer.special_tokens.get("bos_token")
    bos_pair = [] if bos is None else [tokenizer.token_to_id(bos)] * 2
    if bos is not None and any(example.input_ids[:2].tolist() == bos_pair for example in row.examples):
        yield f"begins with {bos} twice"


@register_row_check(
    "double_eos",
    "warning",
    "an answer ends in two stop tokens",
    "remove the stop token from the data: the template adds it",
)
def _check_double_eos(row: CheckedRow) -> Iterator[str]:
    for example in row.examples:
        ids, trained = example.input_ids, example.trained
        repeats = np.flatnonzero((ids[1:] == ids[:-1]) & trained[1:] & trained[:-1])
        for index in repeats[row.recipe.control.is_control(ids[repeats])].tolist():
            yield f"{example.text[slice(*example.offsets[index].tolist())]} twice"


_MIN_TRAINED_SHARE, _LONG_ROW = 0.005, 400


@register_row_check(
    "label_share",
    "note",
    "almost none of a long row is trained, or all of a pretokenized row is trained",
    "run `ftdata preview --outliers`: a short answer to a long text can be intended, a missing answer is an error",
)
def _check_label_share(row: CheckedRow) -> Iterator[str]:
    token_count = sum(len(example) for example in row.examples)
    trained_count = sum(int(example.trained.sum()) for example in row.examples)
    if token_count >= _LONG_ROW and trained_count < _MIN_TRAINED_SHARE * token_count:
        yield f"{trained_count:,} of {token_count:,} tokens are trained"
    is_pretokenized = row.conversation.tokens is not None and row.recipe.train_on != "all"
    turns = sum(row.recipe.control.count(example.input_ids) for example in row.examples)
    if is_pretokenized and token_count == trained_count and turns > 1:
        yield "all tokens are trained, including the prompts"


@register_row_check(
    "drift",
    "warning",
    "the template renders other tokens than the server used",
    "train on the served tokens, and use the server's template, tokenizer and template variables when you serve the "
    "tuned model",
)
def _check_drift(row: CheckedRow) -> Iterator[str]:
    yield from describe_drift(row.conversation, row.recipe)


# --- messages of a row


@register_row_check(
    "role_order",
    "warning",
    "the order of roles does not occur at inference",
    "reorder the messages: a system message first, then alternating user and assistant messages",
    needs_messages=True,
)
def _check_role_order(row: CheckedRow) -> Iterator[str]:
    previous = ""
    for number, message in enumerate(row.conversation.messages):
        role, name = message["role"], f"messages[{number}]"
        if role in ("system", "developer"):
            if previous not in ("", "system", "developer"):
                yield f"{name} is a system message after other messages"
        elif role == "assistant" and previous in ("", "system", "developer"):
            yield f"{name} is an answer without a user message before it"
        elif role == previous and role in ("user", "assistant"):
            yield f"{name} follows a message of the same role ({role})"
        previous = role


_RESULT_ROLES = ("tool", "observation", "function", "ipython", "tool_response")
"""Roles of tool results; schemas keep these names."""


@register_row_check(
    "tool_results",
    "warning",
    "tool calls and tool results do not match",
    "put the result of each tool call after the call, with the same id",
    needs_messages=True,
)
def _check_tool_results(row: CheckedRow) -> Iterator[str]:
    pending_ids = list[str | None]()
    for number, message in enumerate(row.conversation.messages):
        name, call_id = f"messages[{number}]", message.get("tool_call_id")
        if message["role"] not in _RESULT_ROLES:
            if pending_ids:
                yield f"{name} comes before the result of a tool call"
            pending_ids = [call.get("id") for call in message.get("tool_calls") or ()]
        elif not pending_ids:
            yield f"{name} is a tool result without a tool call"
        else:
            matches = [pending for pending in pending_ids if call_id is None or pending in (None, call_id)]
            if not matches:
                yield f"{name} answers the tool call {call_id!r}, which does not exist"
            pending_ids.remove(call_id if call_id in matches else (matches or pending_ids)[0])


@register_row_check(
    "undeclared_tool",
    "warning",
    "a tool call names a function that the tools of the row do not contain",
    "add the definition of the function to tools, or correct the name",
    needs_messages=True,
)
def _check_declared_tools(row: CheckedRow) -> Iterator[str]:
    declared = {_tool_name(tool) for tool in row.conversation.tools or ()}
    for number, message in enumerate(row.conversation.messages) if declared else ():
        for call in message.get("tool_calls") or ():
            if (name := _tool_name(call)) not in declared:
                yield f"messages[{number}] calls {name!r}"


def _tool_name(tool: Mapping[str, Any]) -> Any:
    return (tool.get("function") or tool).get("name")


@register_row_check(
    "trivial_answer",
    "warning",
    "an answer has no content: it is a placeholder, or only dots and dashes",
    "remove the row; or set train: false in the message if the row has other answers",
    needs_messages=True,
    contradicts=("no answer is a placeholder",),
)
def _check_trivial_answer(row: CheckedRow) -> Iterator[str]:
    for number, message in enumerate(row.conversation.messages):
        content = message.get("content")
        is_answer = message["role"] == "assistant" and message.get("train", True) and not message.get("tool_calls")
        text = content if isinstance(content, str) else "\n".join(content_texts(content))
        if is_answer and content is not None and text_detectors.is_placeholder_text(text) and _is_trained(row, number):
            yield f"messages[{number}].content is {text.strip()!r}"


def _is_trained(row: CheckedRow, number: int) -> bool:
    """Return whether any token of a message is trained."""
    return any(
        example.trained[(example.offsets[:, 0] >= span.start) & (example.offsets[:, 1] <= span.end)].any()
        for example in row.examples
        for span in example.spans
        if span.message == number and span.generated
    )


@register_row_check(
    "empty_question",
    "warning",
    "a user message before a trained answer is empty",
    "remove the row: the model would learn to answer without a question",
    needs_messages=True,
)
def _check_empty_question(row: CheckedRow) -> Iterator[str]:
    messages = row.conversation.messages
    for number, (message, answer) in enumerate(pairwise(messages)):
        is_question = message["role"] == "user" and answer["role"] == "assistant"
        has_text = any(map(has_visible_text, content_texts(message.get("content"))))
        if is_question and not has_text and _is_trained(row, number + 1):
            yield f"messages[{number}].content is {message.get('content')!r}"


_CONTENT_COLUMNS = {
    "answer", "answers", "assistant", "completion", "content", "context", "conversations", "documents", "explanation",
    "history", "input", "instruction", "knowledge", "messages", "output", "passage", "prompt", "question", "rationale",
    "reasoning", "response", "solution", "system", "system_prompt", "text", "thinking", "thought", "user",
}  # fmt: skip
"""Column names that usually contain text for training."""


@register_row_check(
    "unread_column",
    "note",
    "a column that is not read has a name of training text",
    "map the column to a column of the schema, or remove it from the data",
    needs_messages=True,
)
def _check_unread_column(row: CheckedRow) -> Iterator[str]:
    columns = (note.removeprefix("column ") for note in row.conversation.notes if note.startswith("column "))
    yield from (f"column {column!r}" for column in sorted(columns) if column.casefold() in _CONTENT_COLUMNS)


@register_row_check(
    "left_over",
    "warning",
    "a message contains template text of another model",
    "remove it from the data: a chat template was already applied to this row",
    needs_messages=True,
)
def _check_left_over(row: CheckedRow) -> Iterator[str]:
    for name, text in _message_texts(row):
        leftover = text_detectors.find_template_leftover(text)
        if leftover and not row.recipe.control.occurs_in(leftover):
            yield f"{name} contains {leftover!r}"


def _message_texts(row: CheckedRow) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each content, and of each part of a content, in the messages of a row."""
    for number, message in enumerate(row.conversation.messages):
        for text in content_texts(message.get("content")):
            yield f"messages[{number}].content", text


@register_row_check(
    "media_placeholder",
    "warning",
    "a message contains a placeholder for an image, a video or audio, which is trained as plain text",
    "remove the row: the model would learn to answer questions about media that it does not receive",
    needs_messages=True,
)
def _check_media_placeholder(row: CheckedRow) -> Iterator[str]:
    for name, text in _message_texts(row):
        if placeholder := text_detectors.find_media_placeholder(text):
            yield f"{name} contains {placeholder!r}"


_SMALL_SIDE, _LARGE_AREA = 16, 16_000_000


@register_row_check(
    "image_size",
    "note",
    "an image is very small or very large, so the image processor changes its size very much",
    "check whether the image is complete, and whether the model can see what the answer describes",
)
def _check_image_size(row: CheckedRow) -> Iterator[str]:
    for image in (image for example in row.examples for image in example.images):
        if min(image.width, image.height) < _SMALL_SIDE or image.width * image.height > _LARGE_AREA:
            yield f"{image.width}×{image.height} pixels"


@register_row_check(
    "default_system",
    "note",
    "the template adds a default system prompt to the conversation",
    "add a system message to the data, and use the same message at inference",
    needs_messages=True,
)
def _check_default_system(row: CheckedRow) -> Iterator[str]:
    messages = row.conversation.messages
    has_system_message = bool(messages) and messages[0]["role"] in ("system", "developer")
    if len(re.findall(r"[^\W\d_]+", row.added_text)) > 3 and messages and not has_system_message:
        yield repr(row.added_text[:80])


# --- texts of a row


@register_row_check(
    "mojibake",
    "warning",
    "the text was decoded with the wrong encoding (mojibake)",
    "decode the source with the correct encoding, or repair the text, for example with ftfy",
)
def _check_mojibake(row: CheckedRow) -> Iterator[str]:
    for example in row.examples:
        # A truncated example can end in the middle of a character, which is decoded as U+FFFD.
        text = example.text.rstrip("\ufffd") if example.cut else example.text
        if (excerpt := text_detectors.find_mojibake(text)) is not None:
            yield repr(excerpt)


@register_row_check(
    "pii",
    "warning",
    "the text contains personal data (PII)",
    "remove it, or replace it with a placeholder",
    enabled_by="pii",
)
def _check_pii(row: CheckedRow) -> Iterator[str]:
    for example in row.examples:
        for kind, excerpt in text_detectors.find_personal_data(example.text):
            yield f"{kind} {excerpt}"
