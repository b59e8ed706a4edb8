"""Read ranked lists of answers as preference pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from ftdata.errors import BadRow
from ftdata.schemas.training_fields import describe_value
from ftdata.types import SIDES, Reject, Row

ANSWERS, SCORES = "completions", "scores"
"""Columns of a ranked list: the answers, and their scores, of which the highest is the best."""

RANKING_COLUMNS = (ANSWERS, SCORES)


def expand_rankings(rows: Iterable[Row | Reject], columns: Mapping[str, str] | None = None) -> Iterator[Row | Reject]:
    """Replace each row with a list of answers by one row for each pair of answers of different rank.

    The answers are in the column `completions`, from the best to the worst, or in any order with the column `scores`.
    Answers with equal scores yield no pair. A row with an invalid list is yielded unchanged; `read_pair` rejects it.

    Args:
        rows: the rows.
        columns: canonical column name -> name in the data.

    >>> from ftdata.types import UNKNOWN_SOURCE
    >>> row = Row({"prompt": "2+2?", "completions": ["4", "5", "22"]}, UNKNOWN_SOURCE)
    >>> [(pair.data["chosen"], pair.data["rejected"]) for pair in expand_rankings([row])]
    [('4', '5'), ('4', '22'), ('5', '22')]
    """
    answers_name, scores_name = ((columns or {}).get(name, name) for name in (ANSWERS, SCORES))
    side_names = [(columns or {}).get(name, name) for name in SIDES]
    for row in rows:
        data = row.data if isinstance(row, Row) else None
        if not isinstance(row, Row) or not isinstance(data, Mapping) or data.get(answers_name) is None:
            yield row
            continue
        if any(data.get(name) is not None for name in side_names):
            yield row
            continue
        try:
            pairs = _make_pairs(data[answers_name], data.get(scores_name))
        except BadRow:
            yield row
            continue
        unused = (answers_name, scores_name, *side_names)
        other_columns = {name: value for name, value in data.items() if name not in unused}
        for pair in pairs:
            yield row._replace(data={**other_columns, **pair}, notes=row.notes | {"ranking"})


def check_ranking(data: Mapping[str, Any]) -> None:
    """Raise an error if a row has a list of answers that yields no pair.

    Raises:
        BadRow: `ranking`.
    """
    sides = [name for name in SIDES if data.get(name) is not None]
    if ANSWERS not in data or (sides and data[ANSWERS] is None):
        return
    if sides:
        problem = f"the row has the columns {ANSWERS} and {sides[0]}, expected either {ANSWERS}, or chosen and rejected"
        raise BadRow("ranking", problem, field=sides[0], hint=f"remove {sides[0]} or {ANSWERS}")
    _make_pairs(data[ANSWERS], data.get(SCORES))


def _make_pairs(answers: Any, scores: Any) -> Sequence[Mapping[str, Any]]:
    """Return the pairs of a list of answers, with their scores if the row has scores."""
    if not isinstance(answers, list) or len(answers) < 2:
        problem = f"is {describe_value(answers)}, expected a list of at least two answers"
        raise BadRow("ranking", problem, field=ANSWERS, hint="add answers, or remove the row")
    if any(better == worse for better, worse in combinations(answers, 2)):
        problem = "the list contains an answer twice"
        raise BadRow("ranking", problem, field=ANSWERS, hint="remove one of the equal answers")
    if scores is None:
        return [{"chosen": better, "rejected": worse} for better, worse in combinations(answers, 2)]
    is_valid = isinstance(scores, list) and len(scores) == len(answers)
    if not is_valid or not all(map(is_finite_number, scores)):
        problem = f"is {describe_value(scores)}, expected a list of {len(answers)} numbers, one for each answer"
        raise BadRow("ranking", problem, field=SCORES, hint="correct the scores, or remove them to use the order")
    order = sorted(range(len(answers)), key=lambda number: -scores[number])
    ranked = [
        {
            "chosen": answers[better],
            "rejected": answers[worse],
            "score_chosen": scores[better],
            "score_rejected": scores[worse],
        }
        for better, worse in combinations(order, 2)
        if scores[better] > scores[worse]
    ]
    if not ranked:
        problem = "all scores are equal, so there is no preference to learn"
        raise BadRow("ranking", problem, field=SCORES, hint="remove the row")
    return ranked


def is_finite_number(value: Any) -> bool:
    """Return whether a value is a number that a float can represent: not true or false, and not infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max
