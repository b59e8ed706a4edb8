"""Audit checks of single rows. They inspect the flags, tokens, messages and texts of a row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from ftdata.inspection import text_detectors
from ftdata.inspection.checks.registry import CheckedRow, register_check, register_flag_check
from ftdata.inspection.row_views import content_texts
from ftdata.types import Message

# --- flags, which the pipeline sets

register_flag_check(
    "no_trained_stop",
    "error",
    "a trained turn does not end in a trained control token: the model will not learn to stop",
    "use a template that ends turns with a control token, or set on_missing_stop='append_eos'",
)
register_flag_check(
    "answer_truncated",
    "error",
    "max_length cuts an answer in the middle: the model learns to stop in mid-sentence",
    "raise max_length, or set overlong='drop_turns'",
)
register_flag_check(
    "missing_final_stop",
    "warning",
    "the last turn has no stop token: the template prints it only before the next message",
    "set on_missing_stop='append_eos' to append and train the EOS token",
)
register_flag_check(
    "message_truncated",
    "warning",
    "the template prints only part of a message",
    "run `ftdata preview --odd` to see the missing text, and use a template that prints it",
)
register_flag_check(
    "message_dropped", "warning", "the template does not print a message", "use a template that prints it"
)
register_flag_check(
    "reasoning_dropped",
    "warning",
    "the template does not print the reasoning",
    "use a template that prints reasoning, or remove the reasoning from the data",
)
register_flag_check(
    "tools_dropped",
    "warning",
    "the template does not print all of the tool definitions",
    "use a template that prints tools, or remove the tools from the data",
)
register_flag_check(
    "fields_dropped",
    "note",
    "the template does not print some fields of the messages",
    "remove the fields from the data if the model does not need them; otherwise use a template that prints them",
)
register_flag_check(
    "prompt_mismatch",
    "warning",
    "the trained text lacks template text that the generation prompt contains at inference",
    "run `ftdata templates check`; add reasoning to the data if the generation prompt opens a thinking block",
)
register_flag_check(
    "empty_thinking",
    "warning",
    "answers train an empty thinking block, which the template prints for messages without reasoning",
    "pass --template-kwarg enable_thinking=false if the template supports it, which moves the block to the prompt; "
    "or add reasoning to the data; keep it only if the model should learn to skip thinking",
)
register_flag_check(
    "token_crosses_boundary",
    "warning",
    "a trained token crosses the boundary of the answer: inference never produces a token merged with the prompt",
    "end the prompt with a control token or a line break, or move the space before the answer into the generation tags",
)
register_flag_check(
    "whitespace_removed",
    "warning",
    "a control token of the tokenizer removes whitespace of the row, which no token contains",
    "remove the whitespace from the data, or set lstrip and rstrip of the token to false in tokenizer.json",
)
register_flag_check(
    "rejected_side_dropped",
    "note",
    "the build contains only the chosen side of preference pairs",
    "ignore this note if you want supervised fine-tuning on the chosen side",
)
register_flag_check(
    "generation_tags_unconfirmed",
    "warning",
    "the template's generation tags mark text that the model might not generate",
    "correct the generation tags of the template, or remove them: ftdata locates turns without them",
)
register_flag_check(
    "stop_outside_generation_tags",
    "note",
    "the template's generation tags exclude the stop token; ftdata trains it anyway",
    "move the stop token inside the generation tags of the template",
)
register_flag_check(
    "control_tokens",
    "warning",
    "the data contains the text of control tokens, which is tokenized as plain text",
    "remove it from the data if it is left over from another template",
)
register_flag_check(
    "trailing_messages",
    "warning",
    "the conversation ends with messages that have no answer",
    "remove these messages from the data",
)


# --- tokens of a row


@register_check(
    "double_bos",
    "error",
    "row",
    "the text begins with two BOS tokens",
    "remove the BOS token from the data or from the template",
)
def _check_double_bos(row: CheckedRow) -> Iterator[str]:
    tokenizer = row.recipe.tokenizer
    bos = tokenizer.special_tokens.get("bos_token")
    bos_pair = [] if bos is None else [tokenizer.token_to_id(bos)] * 2
    if bos is not None and any(example.input_ids[:2].tolist() == bos_pair for example in row.examples):
        yield f"begins with {bos} twice"


@register_check(
    "double_eos",
    "warning",
    "row",
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


@register_check(
    "label_share",
    "note",
    "row",
    "almost none of a long row is trained, or all of a pretokenized row is trained",
    "run `ftdata preview --odd`: a short answer to a long text can be intended, a missing answer is an error",
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


# --- messages of a row


@register_check(
    "role_order",
    "warning",
    "row",
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
    yield from _check_tool_results(row.conversation.messages)


_RESULT_ROLES = ("tool", "observation", "function", "ipython", "tool_response")
"""Roles of tool results; schemas keep these names."""


def _check_tool_results(messages: Sequence[Message]) -> Iterator[str]:
    """Describe each tool call without a result, and each tool result without a call."""
    pending_ids = list[str | None]()
    for number, message in enumerate(messages):
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


@register_check(
    "trivial_answer",
    "warning",
    "row",
    "an answer has no content: it is a placeholder, or only dots and dashes",
    "remove the row, or set train: false in the message",
    needs_messages=True,
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
    for example in row.examples:
        for span in example.spans:
            if span.message == number and span.generated:
                inside = (example.offsets[:, 0] >= span.start) & (example.offsets[:, 1] <= span.end)
                if example.trained[inside].any():
                    return True
    return False


@register_check(
    "left_over",
    "warning",
    "row",
    "a message contains template text of another model",
    "remove it from the data: a chat template was already applied to this row",
    needs_messages=True,
)
def _check_left_over(row: CheckedRow) -> Iterator[str]:
    for number, message in enumerate(row.conversation.messages):
        for text in content_texts(message.get("content")):
            leftover = text_detectors.find_template_leftover(text)
            if leftover and not row.recipe.control.occurs_in(leftover):
                yield f"messages[{number}].content contains {leftover!r}"


@register_check(
    "media_placeholder",
    "warning",
    "row",
    "a message contains a placeholder for an image, a video or audio, which is trained as plain text",
    "remove the row: the model would learn to answer questions about media that it does not receive",
    needs_messages=True,
)
def _check_media_placeholder(row: CheckedRow) -> Iterator[str]:
    for number, message in enumerate(row.conversation.messages):
        for text in content_texts(message.get("content")):
            if placeholder := text_detectors.find_media_placeholder(text):
                yield f"messages[{number}].content contains {placeholder!r}"


@register_check(
    "default_system",
    "note",
    "row",
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


@register_check(
    "mojibake",
    "warning",
    "row",
    "the text was decoded with the wrong encoding (mojibake)",
    "decode the source with the correct encoding, or repair the text, for example with ftfy",
)
def _check_mojibake(row: CheckedRow) -> Iterator[str]:
    for example in row.examples:
        # A truncated example can end in the middle of a character, which is decoded as U+FFFD.
        text = example.text.rstrip("\ufffd") if example.cut else example.text
        if (excerpt := text_detectors.find_mojibake(text)) is not None:
            yield repr(excerpt)


@register_check(
    "pii",
    "warning",
    "row",
    "the text contains personal data (PII)",
    "remove it, or replace it with a placeholder",
    enabled_by="pii",
)
def _check_pii(row: CheckedRow) -> Iterator[str]:
    for example in row.examples:
        for kind, excerpt in text_detectors.find_personal_data(example.text):
            yield f"{kind} {excerpt}"
