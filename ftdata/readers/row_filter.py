"""Select rows with a Jinja expression, and limit the number of rows."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftdata.errors import UsageError, describe_exception, suggest_similar
from ftdata.types import Reject, Row


@dataclass
class RowFilter:
    """Keeps the rows for which a Jinja expression is true, and every `Reject`, until a maximum number is reached.

    Attributes:
        where: the Jinja expression of the user, which is evaluated in this process, without limits.
        limit: maximum number of rows.
        filtered: number of rows that did not match so far.
        taken: number of rows that were yielded so far.
        missing_columns: number of rows that did not match because they lack a column, by column.
    """

    where: str | None = None
    limit: int | None = None
    filtered: int = 0
    taken: int = 0
    missing_columns: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.where is not None:
            if not isinstance(self.where, str):
                raise UsageError("where", f"where={self.where!r} is not a string, expected a Jinja expression")
            _compile_expression(self.where)
        if self.limit is not None and (type(self.limit) is not int or not 1 <= self.limit <= sys.maxsize):
            message = f"limit={self.limit!r} is not a valid number of rows, expected an integer of at least 1"
            raise UsageError("limit", message)

    def filter_rows(self, rows: Iterator[Row | Reject]) -> Iterator[Row | Reject]:
        """Yield at most `limit` rows for which `where` is true. If `where` raises an error, yield a `Reject`."""
        if self.where is None and self.limit is None:
            yield from rows
            return
        for row in islice(self._matching_rows(rows), None if self.limit is None else self.limit - self.taken):
            self.taken += 1
            yield row

    def _matching_rows(self, rows: Iterator[Row | Reject]) -> Iterator[Row | Reject]:
        for row in rows:
            result = self._match_row(row)
            if result is None:
                self.filtered += 1
            else:
                yield result

    def _match_row(self, row: Row | Reject) -> Row | Reject | None:
        if self.where is None or isinstance(row, Reject):
            return row
        columns = _columns(row)
        variables = {"row": columns} | {str(name): value for name, value in columns.items()}
        try:
            is_match = bool(_compile_expression(self.where)(variables))
        except jinja2.UndefinedError:
            self.missing_columns.update(_find_names(self.where) - variables.keys())
            return None
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001  (the expression of a user can raise any exception)
            fix = "correct the row, or change the expression so that it works for every row"
            return Reject(row.source, "where", "", f"where={self.where!r} failed for this row: {error}", fix)
        return row if is_match else None


@lru_cache(maxsize=8)
def _find_names(where: str) -> frozenset[str]:
    """Return the names of the columns that an expression uses."""
    return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(f"{{{{ {where} }}}}")) - {"row"})


def _columns(row: Row) -> Mapping[Any, Any]:
    return row.data if isinstance(row.data, Mapping) else {"messages": row.data}


_COMPARED_ROWS = 1000


def find_missing_column(where: str | None, rows: Iterable[Row | Reject]) -> str:
    """Describe a name in an expression that is not a column of the first 1,000 rows. Return `""` if there is none.

    This explains why the expression matched no row.

    >>> from ftdata.types import Source
    >>> find_missing_column("langg == 'en'", [Row({"lang": "en", "question": "Open?"}, Source("data.jsonl", 0))])
    "no row has the column 'langg'; did you mean 'lang'?"
    """
    if where is None:
        return ""
    first_rows = [row for row in islice(rows, _COMPARED_ROWS) if isinstance(row, Row)]
    columns = {str(name) for row in first_rows for name in _columns(row)}
    names = _find_names(where) - columns
    if not names or not columns:
        return ""
    name = min(names)
    subject = "no row has" if len(first_rows) < _COMPARED_ROWS else f"the first {_COMPARED_ROWS:,} rows do not have"
    hint = suggest_similar(name, columns)
    return f"{subject} the column {name!r}" + (f"; {hint}" if hint else "")


@lru_cache(maxsize=8)
def _compile_expression(where: str) -> Callable[..., Any]:
    """Compile a Jinja expression such as `lang == "en" and messages | length > 2`.

    An expression that uses a column that the row does not have is false.

    Raises:
        UsageError: The expression is invalid.
    """
    try:
        return _environment().compile_expression(where, undefined_to_none=False)
    except jinja2.TemplateSyntaxError as error:
        hint = "e.g. lang == 'en' and messages | length > 2"
        raise UsageError("where", f"where={where!r} is not a valid expression: {error.message}", hint=hint) from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise UsageError("where", f"where={where!r:.100} cannot be compiled: {describe_exception(error)}") from None


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    # Without the globals of Jinja, a name always refers to a column.
    environment.globals.clear()
    environment.tests["matching"] = _matches
    environment.filters["from_json"] = _from_json
    return environment


def _from_json(text: Any) -> Any:
    """Parse the JSON text in a cell, for expressions such as `messages | from_json | length`."""
    return json.loads(text) if isinstance(text, str) else text


def _matches(text: Any, pattern: str) -> bool:
    """Return whether a text matches a regular expression, for expressions such as `question is matching('^How')`."""
    try:
        return isinstance(text, str) and re.search(pattern, text) is not None
    except re.error as error:
        raise UsageError("where", f"{pattern!r} is not a valid regular expression: {error}") from None
