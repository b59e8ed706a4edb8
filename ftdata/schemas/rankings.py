"""Read ranked lists of answers as preference pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from ftdata.errors import BadRow
from ftdata.schemas.training_fields import describe_value
from ftdata.types import Reject, Row

RANKING_COLUMNS = ("completions", "scores")
"""Columns of a ranked list: the answers, and their scores, of which the highest is the best."""


def expand_rankings(rows: Iterable[Row | Reject], columns: Mapping[str, str] | None = None) -> Iterator[Row | Reject]:
    """Replace each row with a list of answers by one row for each pair of answers of different rank.

    The answers are in the column `completions`, from the best to the worst, or in any order with the column `scores`.
    Answers with equal scores make no pair. A list that cannot be expanded stays a row, which `read_pair` rejects.

    Args:
        rows: the rows.
        columns: canonical column name -> name in the data.

    >>> from ftdata.types import UNKNOWN_SOURCE
    >>> row = Row({"prompt": "2+2?", "completions": ["4", "5", "22"]}, UNKNOWN_SOURCE)
    >>> [(pair.data["chosen"], pair.data["rejected"]) for pair in expand_rankings([row])]
    [('4', '5'), ('4', '22'), ('5', '22')]
    """
    answers_name, scores_name = ((columns or {}).get(name, name) for name in RANKING_COLUMNS)
    for row in rows:
        data = row.data if isinstance(row, Row) else None
        is_list = isinstance(data, Mapping) and answers_name in data and "chosen" not in data
        if not isinstance(row, Row) or not isinstance(data, Mapping) or not is_list:
            yield row
            continue
        try:
            pairs = _rank(data[answers_name], data.get(scores_name))
        except BadRow:
            yield row
            continue
        rest = {name: value for name, value in data.items() if name not in (answers_name, scores_name)}
        for pair in pairs:
            yield row._replace(data={**rest, **pair}, notes=row.notes | {"ranking"})


def check_ranking(data: Mapping[str, Any]) -> None:
    """Raise an error if a row has a list of answers that makes no pair.

    Raises:
        BadRow: `ranking`.
    """
    if "completions" in data:
        _rank(data["completions"], data.get("scores"))


def _rank(answers: Any, scores: Any) -> Sequence[Mapping[str, Any]]:
    """Return the pairs of a list of answers, with their scores if the row has scores."""
    if not isinstance(answers, list) or len(answers) < 2:
        problem = f"is {describe_value(answers)}, expected a list of at least two answers"
        raise BadRow("ranking", problem, field="completions", hint="add answers, or remove the row")
    if scores is None:
        return [{"chosen": answers[left], "rejected": answers[right]} for left, right in _pairs(len(answers))]
    is_valid = isinstance(scores, list) and len(scores) == len(answers)
    if not is_valid or not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        problem = f"is {describe_value(scores)}, expected a list of {len(answers)} numbers, one for each answer"
        raise BadRow("ranking", problem, field="scores", hint="correct the scores, or remove them to use the order")
    order = sorted(range(len(answers)), key=lambda number: -scores[number])
    ranked = [
        {
            "chosen": answers[order[left]],
            "rejected": answers[order[right]],
            "score_chosen": scores[order[left]],
            "score_rejected": scores[order[right]],
        }
        for left, right in _pairs(len(answers))
        if scores[order[left]] > scores[order[right]]
    ]
    if not ranked:
        problem = "all scores are equal, so there is no preference to learn"
        raise BadRow("ranking", problem, field="scores", hint="remove the row")
    return ranked


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    return combinations(range(count), 2)
