"""Select: the rows that are wanted, by an expression over their columns."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftdata.errors import UsageError, describe_exception
from ftdata.types import Reject, Row


@dataclass
class RowFilter:
    """The rows of one or several sources that are wanted. Rejects pass: whether they were wanted is not known.

    Attributes:
        where: an expression of the user's own; it runs in this process, without limits.
        limit: how many rows.
        filtered: how many were read and not wanted.
        taken: how many were yielded.
    """

    where: str | None = None
    limit: int | None = None
    filtered: int = 0
    taken: int = 0

    def __post_init__(self) -> None:
        if self.where is not None:
            if not isinstance(self.where, str):
                raise UsageError("where", f"where is {self.where!r}, expected an expression")
            _expression(self.where)
        if self.limit is not None and (type(self.limit) is not int or not 1 <= self.limit <= sys.maxsize):
            raise UsageError("limit", f"limit is {self.limit!r}, expected a number of rows from 1")

    def of(self, rows: Iterator[Row | Reject]) -> Iterator[Row | Reject]:
        """Yield the rows that are wanted, the first `limit` of them; a reject for each on which `where` fails."""
        if self.where is None and self.limit is None:
            yield from rows
            return
        for row in islice(self._wanted(rows), None if self.limit is None else self.limit - self.taken):
            self.taken += 1
            yield row

    def _wanted(self, rows: Iterator[Row | Reject]) -> Iterator[Row | Reject]:
        for row in rows:
            wanted = self._judged(row)
            if wanted is None:
                self.filtered += 1
            else:
                yield wanted

    def _judged(self, row: Row | Reject) -> Row | Reject | None:
        if self.where is None or isinstance(row, Reject):
            return row
        columns = row.data if isinstance(row.data, Mapping) else {"messages": row.data}
        try:
            wanted = _expression(self.where)({"row": columns} | {str(name): value for name, value in columns.items()})
        except jinja2.UndefinedError:
            return None
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001  (an expression of the user's own)
            fix = "mend the row, or ask for what every row has"
            return Reject(row.source, "where", "", f"where={self.where!r} fails on it: {error}", fix)
        return row if wanted else None


@lru_cache(maxsize=8)
def _expression(where: str) -> Callable[..., Any]:
    """Compile a Jinja expression: `lang == "en" and messages | length > 2`; what asks for an absent column is false.

    Raises:
        UsageError: it is none.
    """
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    # A name that is no column must not be something of Jinja's.
    environment.globals.clear()
    environment.tests["matching"] = _matching
    environment.filters["from_json"] = _from_json
    try:
        return environment.compile_expression(where)
    except jinja2.TemplateSyntaxError as error:
        hint = "e.g. lang == 'en' and messages | length > 2"
        raise UsageError("where", f"where={where!r} is no expression: {error.message}", hint=hint) from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise UsageError("where", f"where={where!r:.100} cannot be compiled: {describe_exception(error)}") from None


def _from_json(text: Any) -> Any:
    """Return what a cell of a table holds, for `messages | from_json | length`."""
    return json.loads(text) if isinstance(text, str) else text


def _matching(text: Any, pattern: str) -> bool:
    """As `re.search`, for `question is matching('^How')`."""
    try:
        return isinstance(text, str) and re.search(pattern, text) is not None
    except re.error as error:
        raise UsageError("where", f"{pattern!r} is no regular expression: {error}") from None
