"""Read rows as conversations, and check that they have answers to train."""

from __future__ import annotations

from functools import lru_cache

from ftdata.errors import BadRow
from ftdata.pipeline.recipe import Options
from ftdata.schemas import last_answer_index, normalize
from ftdata.schemas.answer_text import has_answer, has_visible_text
from ftdata.schemas.preference import PAIR_SCHEMA, exclude_messages
from ftdata.schemas.training_fields import is_rejected_side
from ftdata.types import SIDES, Conversation, Row


def read_conversation(row: Row, options: Options, *, images: bool = False) -> Conversation:
    """Normalize a row according to the options.

    Args:
        row: the row.
        options: the options.
        images: whether to read the images of the row. Otherwise, a row with images is rejected.

    Raises:
        BadRow: `pair_in_sft`: the row is a preference pair, but the task is `sft` and the schema is `auto`; or as in
            `normalize`.
    """
    conversation = normalize(row, options.schema, options.columns, options.task, images=images)
    if conversation.schema == "preference" and options.schema == "auto":
        problem = "the row is a preference pair, and supervised fine-tuning would not use its rejected side"
        hint = "set task='preference' to train on pairs, or schema='preference' to train only on the chosen answers"
        raise BadRow("pair_in_sft", problem, where=str(row.source), hint=hint)
    if options.train_on == "last_assistant":
        # Sides must have one text each, so their untrained turns must not be rendered separately.
        for side in conversation.sides:
            side.messages = exclude_messages(side.messages, last_answer_index(side.messages))
    return conversation


def drops_rejected_side(conversation: Conversation) -> bool:
    """Return whether the row has a rejected answer that the conversation omits."""
    if conversation.schema == PAIR_SCHEMA:
        return False
    return conversation.schema == "preference" or _has_rejected_column(conversation.notes)


@lru_cache(maxsize=1024)
def _has_rejected_column(notes: frozenset[str]) -> bool:
    """Return whether a note names a column with a rejected answer."""
    columns = (note.removeprefix("column ") for note in notes if note.startswith("column "))
    return any(map(is_rejected_side, columns))


def check_row_answers(conversation: Conversation) -> None:
    """Check the answers of a row, or of both sides of a preference pair.

    Raises:
        BadRow: as `check_answers`. For a pair, `field` is the side.
    """
    if not conversation.sides:
        check_answers(conversation)
        return
    for name, side in zip(SIDES, conversation.sides, strict=True):
        try:
            check_answers(side)
        except BadRow as error:
            raise BadRow(error.code, error.message, field=name, hint="remove the row, or add the answer") from None


def check_answers(conversation: Conversation) -> None:
    """Reject a row that has no answer to train, or an empty answer.

    Raises:
        BadRow: `no_answer` or `empty_answer`.
    """
    if conversation.tokens is not None:
        return
    if conversation.text is not None:
        if not has_visible_text(conversation.text):
            raise BadRow("empty_answer", "the text is empty or contains no visible character", field="text")
        return
    answers = [message for message in conversation.messages if message["role"] == "assistant"]
    if not answers:
        problem = "the row has no assistant message, so there is no answer to train"
        raise BadRow(
            "no_answer", problem, hint="add the answer as a message with the role assistant, or remove the row"
        )
    for answer in answers:
        content = answer.get("content")
        if type(content) is str and has_answer(content):
            continue
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content or ()]
        needs_answer = answer.get("train", True) and not answer.get("tool_calls")
        if needs_answer and content is not None and not any(map(has_answer, texts)):
            index = next(index for index, message in enumerate(conversation.messages) if message is answer)
            problem = "the answer has no visible character outside thinking, so the model would learn empty answers"
            hint = "remove the row, or add the answer"
            if conversation.schema in ("messages", "sharegpt", "chat_log"):
                hint = "remove the row; or set train: false in the message if the row has other answers"
            raise BadRow("empty_answer", problem, field=f"messages[{index}].content", hint=hint)
