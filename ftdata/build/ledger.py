"""The ledger: what became of every row and every token. Nothing is lost that is not counted here.

    rows read = built + rejected + passed over        tokens in = kept + cut + rejected

Both are asserted in every build, against what was written; if they fail, that is a bug of ftdata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

from ftdata._version import __version__
from ftdata.errors import InternalError
from ftdata.pipeline.examples import Batch
from ftdata.pipeline.recipe import FLAGS, Recipe
from ftdata.types import Conversation, Reject


@dataclass
class Ledger:
    """What became of the rows of one source, and of their tokens.

    Attributes:
        source: its file, or what it is.
        read: rows that were read.
        built: of these, rows that became examples.
        filtered: rows that were passed over: by `where`, `sample`, `dedup`, `weight`.
        rejected: code -> rows that were rejected.
        schemas: schema -> rows.
        flags: flag -> examples.
        notes: how rows were read, where that is not plain -> rows.
        examples: what was built.
        tokens_in: of the rows that were read.
        tokens_kept: of the examples.
        tokens_cut: taken by truncation.
        tokens_rejected: of rejected rows that came so far as to have some.
        tokens_trained: that carry loss.
        tokens_repeated: prompts that stand again in several examples of a conversation.
    """

    source: str
    read: int = 0
    built: int = 0
    filtered: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    schemas: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: int = 0
    tokens_in: int = 0
    tokens_kept: int = 0
    tokens_cut: int = 0
    tokens_rejected: int = 0
    tokens_trained: int = 0
    tokens_repeated: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the ledger as JSON."""
        return {
            each.name: dict(value) if isinstance(value := getattr(self, each.name), Counter) else value
            for each in fields(self)
        }

    @classmethod
    def of(cls, counts: Mapping[str, Any]) -> Ledger:
        """Return the ledger that `as_dict` gave."""
        values: dict[str, Any] = {
            name: Counter(value) if isinstance(value, dict) else value for name, value in counts.items()
        }
        return cls(**values)

    def join(self, other: Ledger) -> None:
        """Add what became of other rows of the same source."""
        for each in fields(self)[1:]:
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            setattr(self, each.name, mine + theirs)

    def add(self, batch: Batch) -> None:
        """Count what rows became."""
        self.reject(batch.rejects)
        self.read_as(batch.conversations)
        columns, tokens = batch.columns, int(batch.columns.lengths.sum())
        self.examples += len(columns.lengths)
        self.flags.update(chain.from_iterable(sorted(flags) for flags in columns.flags if flags))
        self.tokens_repeated += batch.repeated
        self.tokens_cut += batch.cut
        self.tokens_in += batch.cut + tokens
        self.tokens_kept += tokens
        self.tokens_trained += int(columns.trained_counts.sum())

    def reject(self, rejects: Sequence[Reject]) -> None:
        """Count rows that were rejected."""
        self.read += len(rejects)
        for reject in rejects:
            self.rejected[reject.code] += 1
            self.tokens_rejected += reject.tokens
            self.tokens_in += reject.tokens

    def read_as(self, conversations: Sequence[Conversation]) -> None:
        """Count rows that were built, and how they were read."""
        self.read += len(conversations)
        self.built += len(conversations)
        self.schemas.update(one.schema for one in conversations)
        for note in chain.from_iterable(sorted(one.notes) for one in conversations if one.notes):
            if note in self.notes or len(self.notes) < _MOST_NOTES:
                self.notes[note] += 1

    def add_filtered(self, rows: int) -> None:
        """Count rows that were read and not wanted."""
        self.read += rows
        self.filtered += rows

    def check(self, written: int, tokens_written: int, rejects_written: int) -> None:
        """Assert the identities, against what was really written.

        Raises:
            InternalError: they do not hold.
        """
        rows = (
            self.read == self.built + self.rejected.total() + self.filtered and rejects_written == self.rejected.total()
        )
        tokens = self.tokens_in == self.tokens_kept + self.tokens_cut + self.tokens_rejected
        if not (rows and tokens and written == self.examples and tokens_written == self.tokens_kept):
            raise InternalError(
                "ledger",
                f"the ledger of {self.source} does not add up: {self.as_dict()}, "
                f"written: {written} examples, {tokens_written} tokens, {rejects_written} rejects",
            )


_MOST_NOTES = 200
"""Columns and keys that are counted by name: where every row has others, there is no end to them."""

COUNTS = (
    "read",
    "built",
    "rejected",
    "filtered",
    "examples",
    "tokens_in",
    "tokens_kept",
    "tokens_cut",
    "tokens_rejected",
    "tokens_trained",
    "tokens_repeated",
)
"""What every ledger counts, and a report adds up."""


@dataclass(frozen=True)
class Report:
    """The result of a build in figures: `report.json`, and `.report` of the returned `DatasetDict`.

    Attributes:
        sources: one ledger per source.
        splits: split -> examples, rows (packs, or as many as examples), tokens, trained tokens, fill (share of
            `rows * max_length` that holds tokens; `None` unpacked), and how much of it each source is.
        notes: what a careful reader should know, in sentences.
        rejects: the first rejected rows, in words.
        fingerprint: hash of everything that decides the result.
        seconds: how long the build took.
        encoder: name and version of what made the tokens, which never changes them; empty where the build was there.
    """

    sources: tuple[Ledger, ...]
    splits: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    rejects: tuple[str, ...]
    fingerprint: str
    options: dict[str, Any]
    seconds: float
    encoder: str = ""

    def total(self, name: str) -> int:
        """Return a count over all sources: `"read"`, `"built"`, `"rejected"`, `"tokens_kept"`, ..."""
        values = (getattr(ledger, name) for ledger in self.sources)
        return sum(value.total() if isinstance(value, Counter) else value for value in values)

    @property
    def totals(self) -> dict[str, int]:
        """The counts of all sources together."""
        return {name: self.total(name) for name in COUNTS}

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Report:
        """Return the report that `report.json` holds; it says neither how long the build took nor who made it."""
        own = {each.name: known[each.name] for each in fields(cls)}
        own["sources"] = tuple(Ledger.of(one) for one in known["sources"])
        tuples = {name: tuple(own[name]) for name in ("notes", "rejects")}
        return cls(**{**own, **tuples, "seconds": 0.0, "encoder": ""})

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"ftdata": __version__, **self.totals, **own, "sources": [ledger.as_dict() for ledger in self.sources]}

    def __str__(self) -> str:
        n = self.totals
        reasons = sum((ledger.rejected for ledger in self.sources), Counter[str]())
        listed = ", ".join(f"{count:,} {code}" for code, count in reasons.most_common())
        lines = [
            f"rows     {n['read']:,} read = {n['built']:,} built + {n['rejected']:,} rejected"
            + (f" ({listed})" if listed else "")
            + (f" + {n['passed']:,} filtered out (where)" if n["filtered"] else ""),
            f"tokens   {n['tokens_in']:,} in = {n['tokens_kept']:,} kept + {n['tokens_cut']:,} cut"
            f" + {n['tokens_rejected']:,} in rejected rows",
        ]
        for name, split in self.splits.items():
            share = split["trained"] / split["tokens"] if split["tokens"] else 0
            fill = f"{split['rows']:,} packs, {split['fill']:.1%} full, " if split["fill"] is not None else ""
            lines.append(
                f"{name:8} {split['examples']:,} examples, {fill}{split['tokens']:,} tokens, {share:.1%} trained"
            )
            if len(self.sources) > 1:
                tokens = max(split["tokens"], 1)
                lines += [
                    f"{'':9}{part['examples']:,} examples, {part['tokens'] / tokens:.1%} of tokens: {part['source']}"
                    for part in split["sources"]
                ]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])


def report_notes(ledgers: Sequence[Ledger], recipe: Recipe) -> tuple[str, ...]:
    """Return what the flags of the examples mean, and how the rows were read."""
    flags = Counter[str]()
    for ledger in ledgers:
        flags.update(ledger.flags)
    repeated = f"{sum(ledger.tokens_repeated for ledger in ledgers):,}"
    notes = [
        FLAGS[flag].format(n=f"{count:,}", repeated=repeated) for flag, count in sorted(flags.items()) if flag in FLAGS
    ]
    if recipe.template.uses_date:
        notes.append(f"the template prints a date, shown as {recipe.template.date:%Y-%m-%d}; set it with date=")
    if kwargs := recipe.template.kwargs:
        notes.append(f"template variables: {', '.join(f'{name}={value!r}' for name, value in sorted(kwargs.items()))}")
    return (*notes, *reading_notes(ledgers))


def reading_notes(ledgers: Sequence[Ledger]) -> Iterator[str]:
    """Yield notes on how rows were interpreted: roles under other names, columns that were not read."""
    notes = sum((ledger.notes for ledger in ledgers), Counter[str]())
    for kind, says in (
        ("column", "columns that are not read"),
        ("role", "roles that are read as others"),
        ("text", "columns whose texts spell messages, and are read as texts"),
        ("message key", "keys of messages that only templates read which name them"),
    ):
        own = [(note.removeprefix(kind).strip(), rows) for note, rows in notes.most_common() if note.startswith(kind)]
        if own:
            more = f", and {len(own) - 10} more" if len(own) > 10 else ""
            yield f"{says}: {', '.join(f'{name} ({rows:,} rows)' for name, rows in own[:10])}{more}"
    if count := notes["quotes"]:
        yield f"quotes are text, as the file is not quoted like CSV (--quoting csv changes that): {count:,} rows"
    if count := notes["completion"]:
        yield f"completions that begin before the last answer, which messages do not tell: {count:,} rows"
