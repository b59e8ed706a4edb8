"""Read rows with the tokens that a server received and generated, e.g. of vLLM or of reinforcement learning.

A row has the columns `prompt_token_ids` and `completion_token_ids`: a list of ids, or for several turns a list of such
lists. The tokens of a turn continue the tokens of the turn before only if its prompt begins with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ftdata.errors import BadRow, count_noun, first_difference
from ftdata.schemas.shapes import SERVED_COLUMNS, parse_json_list
from ftdata.schemas.training_fields import describe_value
from ftdata.types import Conversation, Reject, Row, RowTokens

_PROMPTS, _COMPLETIONS, _LOGPROBS = SERVED_COLUMNS

Turn = tuple[list[int], list[int]]
"""The token ids of a prompt and of its completion."""


def read_served_row(data: Mapping[str, Any], origin: Conversation | None) -> Conversation:
    """Convert a row with served tokens to a conversation. Exactly the tokens of the completions are trained.

    A completion whose message has `train: false` is not trained.

    Args:
        data: the row.
        origin: the messages of the row, whose last answers are the completions; `None` if the row has no messages.

    Raises:
        BadRow: a value is invalid, or a prompt does not begin with the tokens of the turns before.
    """
    turns = _read_turns(data)
    ids, bounds = list[int](), list[tuple[int, int]]()
    for number, (prompt, completion) in enumerate(turns):
        if prompt[: len(ids)] != ids:
            position = first_difference(prompt, ids)
            problem = f"differs at token {position} from the tokens of the turns before, which it must begin with"
            raise BadRow("turn_prefix", problem, field=f"{_PROMPTS}[{number}]", hint="write one row for each turn")
        ids = [*prompt, *completion]
        bounds.append((len(prompt), len(ids)))
    answers = _count_answers(origin.messages) if origin else 0
    if origin is not None and answers < len(turns):
        problem = f"the messages have {count_noun(answers, 'answer')}, but the row has {count_noun(len(turns), 'turn')}"
        raise BadRow("served_turns", problem, field="messages", hint="remove the messages, or add the missing answers")
    trained = np.zeros(len(ids), np.bool_)
    excluded = _find_excluded(origin.messages, len(bounds)) if origin else [False] * len(bounds)
    for (start, end), is_excluded in zip(bounds, excluded, strict=True):
        trained[start:end] = not is_excluded
    trained[0] = False  # There is no context from which the model could predict the first token.
    tokens = RowTokens(np.asarray(ids, np.int32), trained, tuple(bounds), origin)
    return Conversation(messages=(), tokens=tokens)


def split_turns(rows: Iterable[Row | Reject], columns: Mapping[str, str] | None = None) -> Iterator[Row | Reject]:
    """Replace each row whose prompts do not begin with the tokens of the turns before by one row per group of turns.

    The messages of such a row end with the last answer of its group. A row with an invalid value is yielded unchanged;
    `read_served_row` rejects it.

    Args:
        rows: the rows.
        columns: canonical column name -> name in the data.

    >>> from ftdata.types import UNKNOWN_SOURCE
    >>> data = {"prompt_token_ids": [[1], [1, 2, 3], [1, 3]], "completion_token_ids": [[2], [4], [5]]}
    >>> [row.data["completion_token_ids"] for row in split_turns([Row(data, UNKNOWN_SOURCE)])]
    [[[2], [4]], [[5]]]
    """
    names = {name: (columns or {}).get(name, name) for name in (*SERVED_COLUMNS, "messages")}
    for row in rows:
        data = row.data if isinstance(row, Row) else None
        if isinstance(row, Row) and isinstance(data, Mapping) and data.get(names[_PROMPTS]) is not None:
            yield from _split_row(row, data, names)
        else:
            yield row


def _split_row(row: Row, data: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[Row]:
    messages = parse_json_list(data.get(names["messages"]))
    try:
        turns = _read_turns({name: data.get(column) for name, column in names.items()})
    except BadRow:
        yield row
        return
    groups, answers = [*_group_turns(turns)], _find_answers(messages)[-len(turns) :]
    if len(groups) < 2 or (messages is not None and len(answers) < len(turns)):
        yield row
        return
    turn = 0
    for group in groups:
        turn += len(group)
        values: dict[str, Any] = {
            names[_PROMPTS]: [prompt for prompt, _ in group],
            names[_COMPLETIONS]: [completion for _, completion in group],
        }
        if messages is not None:
            values[names["messages"]] = messages[: answers[turn - 1] + 1]
        # The text of a single completion cannot be divided.
        unused = (names[_LOGPROBS], *(("prompt", "completion") if messages is None else ()))
        others = {name: value for name, value in data.items() if name not in unused}
        yield row._replace(data={**others, **values}, notes=row.notes | {"served turns"})


def _group_turns(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    group = list[Turn]()
    for turn in turns:
        if group and turn[0][: len(group[-1][0]) + len(group[-1][1])] != group[-1][0] + group[-1][1]:
            yield group
            group = []
        group.append(turn)
    yield group


def _read_turns(data: Mapping[str, Any]) -> list[Turn]:
    """Read the turns of a row.

    Raises:
        BadRow: `tokens_type`, `tokens_shape` or `no_tokens`.
    """
    prompts, completions = (_read_lists(data, name) for name in (_PROMPTS, _COMPLETIONS))
    if len(prompts) != len(completions):
        problem = f"the row has {count_noun(len(prompts), 'prompt')} and {count_noun(len(completions), 'completion')}"
        raise BadRow("tokens_shape", problem, field=_COMPLETIONS, hint="write one completion for each prompt")
    logprobs = _read_logprobs(data)
    for number, completion in enumerate(completions):
        where = f"{_COMPLETIONS}[{number}]" if len(completions) > 1 else _COMPLETIONS
        if not completion:
            raise BadRow("no_tokens", "the list is empty, expected token ids", field=where, hint="remove the turn")
        if logprobs is not None and (len(logprobs) <= number or len(logprobs[number]) != len(completion)):
            problem = f"the number of log probabilities differs from the number of tokens in {where}"
            raise BadRow("tokens_shape", problem, field=_LOGPROBS, hint="write one number for each generated token")
    return list(zip(prompts, completions, strict=True))


def _read_lists(data: Mapping[str, Any], name: str) -> list[list[int]]:
    """Read a column with a list of ids for each turn, or with the ids of a single turn."""
    value = parse_json_list(data.get(name))
    if not isinstance(value, list):
        raise BadRow("tokens_type", f"is {describe_value(value)}, expected a list of token ids", field=name)
    lists = value if value and all(isinstance(item, list) for item in value) else [value]
    for number, ids in enumerate(lists):
        where = name if lists == [value] else f"{name}[{number}]"
        for position, id_ in enumerate(ids):
            if type(id_) is not int or not 0 <= id_ < 1 << 31:
                problem = f"is {describe_value(id_)}, expected a token id"
                raise BadRow("tokens_type", problem, field=f"{where}[{position}]")
    return lists


def _read_logprobs(data: Mapping[str, Any]) -> list[list[float]] | None:
    """Read the log probabilities. They are checked, and not used: supervised fine-tuning needs only the tokens."""
    value = parse_json_list(data.get(_LOGPROBS))
    if value is None or value == "":
        return None
    if not isinstance(value, list):
        raise BadRow("tokens_type", f"is {describe_value(value)}, expected a list of numbers", field=_LOGPROBS)
    lists = value if value and all(isinstance(item, list) for item in value) else [value]
    for number, logprobs in enumerate(lists):
        for position, logprob in enumerate(logprobs):
            is_number = isinstance(logprob, int | float) and not isinstance(logprob, bool) and not math.isnan(logprob)
            if not is_number or logprob > 0:
                where = _LOGPROBS if lists == [value] else f"{_LOGPROBS}[{number}]"
                problem = f"is {describe_value(logprob)}, expected a log probability, which is at most 0"
                raise BadRow("tokens_type", problem, field=f"{where}[{position}]")
    return lists


def _find_excluded(messages: Sequence[Mapping[str, Any]], turns: int) -> list[bool]:
    """Return for each turn whether its message has `train: false`. The turns are the last answers."""
    answers = [message for message in messages if message["role"] == "assistant"]
    return [not message.get("train", True) for message in answers[-turns:]]


def _count_answers(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


_ANSWER_ROLES = ("assistant", "gpt", "model", "chatbot", "bot")


def _find_answers(messages: Any) -> list[int]:
    """Return the indices of the answers in a list of messages, or an empty list for another value."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return []
    roles = (message.get("role", message.get("from")) for message in messages)
    return [index for index, role in enumerate(roles) if role in _ANSWER_ROLES]
