"""The counts of all rows and tokens in a build: the ledger contains counts per source, the report contains totals.

    rows read = built + rejected + filtered        tokens in = kept + cut + rejected

Every build asserts both equations against the written files. A violation is a bug in ftdata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from itertools import chain
from typing import Any

from ftdata._version import __version__
from ftdata.errors import InternalError, count_noun
from ftdata.options import OPTIONS, SHARE_KEYS
from ftdata.pipeline.batch import Batch
from ftdata.pipeline.flags import describe_flags
from ftdata.pipeline.recipe import Recipe
from ftdata.spelling import spell_options
from ftdata.types import SIDES, Conversation, Reject


@dataclass
class Ledger:
    """Counts of the rows and tokens of one source.

    Attributes:
        source: the path of the source, or the name of a source in memory.
        read: rows read.
        built: rows that became examples.
        filtered: rows that `where` filtered out.
        rejected: rejected rows by code.
        schemas: rows by schema.
        flags: examples by flag.
        notes: rows by note of the reader.
        examples: examples built.
        tokens_in: tokens of all tokenized rows.
        tokens_kept: tokens of the examples.
        tokens_cut: tokens removed by truncation.
        tokens_rejected: tokens of rows that were rejected after tokenization.
        tokens_trained: trained tokens.
        tokens_repeated: tokens that repeat because a conversation is split into several examples.
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
        """Return the ledger as a JSON object."""
        return {
            item.name: dict(value) if isinstance(value := getattr(self, item.name), Counter) else value
            for item in fields(self)
        }

    @classmethod
    def from_dict(cls, counts: Mapping[str, Any]) -> Ledger:
        """Create a ledger from a dictionary that `as_dict` returned."""
        values: dict[str, Any] = {
            name: Counter(value) if isinstance(value, dict) else value for name, value in counts.items()
        }
        return cls(**values)

    def join(self, other: Ledger) -> None:
        """Add the counts of another ledger, which covers other rows of the same source."""
        for item in fields(self)[1:]:
            count, other_count = getattr(self, item.name), getattr(other, item.name)
            setattr(self, item.name, count + other_count)

    def add(self, batch: Batch) -> None:
        """Add the rows and tokens of a batch to the counts."""
        self.add_rejects(batch.rejects)
        self.add_built(batch.conversations)
        tokens, removed_tokens = int(batch.lengths.sum()), batch.removed_tokens
        self.examples += len(batch.texts)
        self.flags.update(chain.from_iterable(sorted(flags) for flags in batch.flags if flags))
        self.tokens_repeated += batch.repeated_tokens
        self.tokens_cut += removed_tokens
        if batch.dropped:
            self.notes["dropped examples"] += sum(map(len, batch.dropped.values()))
        self.tokens_in += removed_tokens + tokens
        self.tokens_kept += tokens
        self.tokens_trained += int(batch.trained_counts.sum())

    def add_rejects(self, rejects: Sequence[Reject]) -> None:
        """Add rejected rows and their tokens to the counts."""
        self.read += len(rejects)
        for reject in rejects:
            self.rejected[reject.code] += 1
            self.tokens_rejected += reject.tokens
            self.tokens_in += reject.tokens

    def add_built(self, conversations: Sequence[Conversation]) -> None:
        """Count built rows, and record their schemas and notes."""
        self.read += len(conversations)
        self.built += len(conversations)
        self.schemas.update(conversation.schema for conversation in conversations)
        for note in chain.from_iterable(sorted(item.notes) for item in conversations if item.notes):
            if note in self.notes or len(self.notes) < _MAX_NOTES:
                self.notes[note] += 1

    def add_filtered(self, rows: int, missing_columns: Mapping[str, int] | None = None) -> None:
        """Add the rows that the `where` option excluded to the counts.

        Args:
            rows: the number of these rows.
            missing_columns: the number of rows that lack a column of the expression, by column.
        """
        self.read += rows
        self.filtered += rows
        for name, count in (missing_columns or {}).items():
            self.notes[f"where {name}"] += count

    def check(self, written: int, tokens_written: int, rejects_written: int) -> None:
        """Check that the counts add up, and that they equal the counts of the written files.

        Raises:
            InternalError: an equation does not hold.
        """
        rows = (
            self.read == self.built + self.rejected.total() + self.filtered and rejects_written == self.rejected.total()
        )
        tokens = self.tokens_in == self.tokens_kept + self.tokens_cut + self.tokens_rejected
        if not (rows and tokens and written == self.examples and tokens_written == self.tokens_kept):
            raise InternalError(
                "ledger",
                f"the counts of {self.source} do not add up: {self.as_dict()}, "
                f"but the files contain {written} examples, {tokens_written} tokens and {rejects_written} rejects",
            )


_MAX_NOTES = 200
"""Maximum number of notes per source; column names and keys that differ in every row would otherwise be unlimited."""

COUNTS = (
    "read", "built", "rejected", "filtered", "examples", "tokens_in", "tokens_kept", "tokens_cut", "tokens_rejected",
    "tokens_trained", "tokens_repeated",
)  # fmt: skip
"""The counts of a ledger that a report adds up."""


@dataclass(frozen=True)
class Report:
    """The counts, flags and notes of a build, as stored in `report.json`.

    It is also the attribute `report` of the `DatasetDict` that `build_sft_dataset` returns.

    Attributes:
        sources: one ledger per source.
        splits: for each split: examples, rows (packs if packed, otherwise examples), tokens, trained tokens, fill
            (share of `rows * max_length` filled with tokens; `None` if not packed), and the counts per source.
        notes: notes for the user, as sentences.
        rejects: the first rejected rows, as text.
        fingerprint: hash of everything that determines the result.
        options: the options of the build.
        seconds: duration of the build in seconds.
        encoder: name and version of the encoder, which does not affect the tokens; empty if an existing build was
            reused.
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
        """Return the sum of a count over all sources, e.g. `"read"`, `"built"`, `"rejected"` or `"tokens_kept"`."""
        values = (getattr(ledger, name) for ledger in self.sources)
        return sum(value.total() if isinstance(value, Counter) else value for value in values)

    @property
    def totals(self) -> dict[str, int]:
        """A dictionary from the name of each count, such as `"read"`, to its sum over all sources."""
        return {name: self.total(name) for name in COUNTS}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Report:
        """Create a report from the contents of `report.json`. The file contains no duration and no encoder name."""
        values = {item.name: stored[item.name] for item in fields(cls)}
        values["sources"] = tuple(Ledger.from_dict(counts) for counts in stored["sources"])
        tuples = {name: tuple(values[name]) for name in ("notes", "rejects")}
        return cls(**{**values, **tuples, "seconds": 0.0, "encoder": ""})

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        ledgers = [ledger.as_dict() for ledger in self.sources]
        return {"ftdata": __version__, **self.totals, **values, "sources": ledgers}

    def _selecting_options(self) -> list[str]:
        """Return the names of the options that change which built examples are trained."""
        items = self.options.get("data") or ()
        shares = [key for key in SHARE_KEYS if any(isinstance(item, Mapping) and key in item for item in items)]
        return [*shares, *(name for name in ("dedup", "sample") if self.options.get(name))]

    def _repr_html_(self) -> str:
        """Return the report for a notebook."""
        return f'<pre style="white-space:pre-wrap">{escape(str(self))}</pre>'

    def __str__(self) -> str:
        totals = self.totals
        reasons = sum((ledger.rejected for ledger in self.sources), Counter[str]())
        listed = ", ".join(f"{count:,} {code}" for code, count in reasons.most_common())
        lines = [
            f"rows     {totals['read']:,} read = {totals['built']:,} built + {totals['rejected']:,} rejected"
            + (f" ({listed})" if listed else "")
            + (f" + {totals['filtered']:,} filtered out (where)" if totals["filtered"] else ""),
            f"tokens   {totals['tokens_in']:,} in = {totals['tokens_kept']:,} kept + {totals['tokens_cut']:,} cut"
            f" + {totals['tokens_rejected']:,} in rejected rows",
        ]
        built, selected = totals["examples"], sum(split["examples"] for split in self.splits.values())
        if selected != built:
            count = f"{selected:,} examples from {built:,}"
            if self.options.get("task") == "preference":
                count = f"{selected // len(SIDES):,} pairs from {built // len(SIDES):,}"
            lines.append(f"selected {count} ({', '.join(self._selecting_options())})")
        for name, split in self.splits.items():
            share = split["trained"] / split["tokens"] if split["tokens"] else 0
            examples, packs, tokens = (
                count_noun(split[key], noun)
                for key, noun in (("examples", "example"), ("rows", "pack"), ("tokens", "token"))
            )
            if self.options.get("task") == "preference":
                examples = count_noun(split["rows"], "pair")
            fill = f"{packs}, {split['fill']:.1%} full, " if split["fill"] is not None else ""
            lines.append(f"{name:8} {examples}, {fill}{tokens}, {share:.1%} trained")
            if len(self.sources) > 1:
                total = max(split["tokens"], 1)
                lines += [
                    f"{'':9}{count_noun(part['examples'], 'example')}, {part['tokens'] / total:.1%} of tokens: "
                    f"{part['source']}"
                    for part in split["sources"]
                ]
        return "\n".join([*lines, *(f"note     {spell_options(note)}" for note in self.notes)])


def report_notes(ledgers: Sequence[Ledger], recipe: Recipe) -> tuple[str, ...]:
    """Return the notes of a report: sentences about flags, template variables, and how the rows were read."""
    flags = Counter[str]()
    for ledger in ledgers:
        flags.update(ledger.flags)
    repeated_tokens = sum(ledger.tokens_repeated for ledger in ledgers)
    flag_notes = describe_flags(flags, repeated_tokens, trains_repeats=recipe.train_on == "all")
    notes = [*_loss_notes(ledgers, recipe.overlong), *flag_notes]
    notes += _dropped_notes(ledgers)
    notes += _unmasked_notes(ledgers, recipe)
    if recipe.template.uses_date:
        notes.append(f"the template prints the date {recipe.template.date:%Y-%m-%d}; set it with date=")
    if kwargs := recipe.template.kwargs:
        notes.append(f"template variables: {', '.join(f'{name}={value!r}' for name, value in sorted(kwargs.items()))}")
    return (*notes, *reading_notes(ledgers))


def _dropped_notes(ledgers: Sequence[Ledger]) -> Iterator[str]:
    """Yield a note if examples of split conversations were left out because they are too long."""
    if count := sum(ledger.notes["dropped examples"] for ledger in ledgers):
        yield f"{count_noun(count, 'example')} of split conversations left out, because no answer fits into max_length"


def _unmasked_notes(ledgers: Sequence[Ledger], recipe: Recipe) -> Iterator[str]:
    """Yield a note if there are rows to which the mask options of the build do not apply."""
    schemas = sum((ledger.schemas for ledger in ledgers), Counter[str]())
    changed = [name for name in ("train_parts", "turns") if getattr(recipe, name) != OPTIONS[name].default]
    changed += ["train_on"] if recipe.train_on in ("last_assistant", "completion") else []
    rows = schemas["text"] + schemas["tokens"]
    if changed and rows:
        names = " and ".join(filter(None, (", ".join(changed[:-1]), changed[-1])))
        verb = "does" if len(changed) == 1 else "do"
        yield f"{count_noun(rows, 'row')} with formatted text or tokens, to which {names} {verb} not apply"


_MAX_UNMENTIONED_LOSS = 0.01
"""Share of the rows or tokens from which a note states the loss."""


def _loss_notes(ledgers: Sequence[Ledger], overlong_policy: str) -> Iterator[str]:
    """Yield a note if the build leaves out many rows or tokens, with the reasons and the options that change it."""
    rejected = sum((ledger.rejected for ledger in ledgers), Counter[str]())
    rows, filtered, tokens, cut, in_rejected = (
        sum(getattr(ledger, name) for ledger in ledgers)
        for name in ("read", "filtered", "tokens_in", "tokens_cut", "tokens_rejected")
    )
    lost_rows, lost_tokens = rejected.total() + filtered, cut + in_rejected
    shares = lost_rows / max(rows, 1), lost_tokens / max(tokens, 1)
    if max(shares) <= _MAX_UNMENTIONED_LOSS:
        return
    overlong = rejected["overlong"]
    invalid = rejected.total() - overlong
    # With the other policies, no answer begins or fits within max_length.
    policies = "; overlong='drop_turns' keeps the turns that fit, overlong='truncate' cuts answers"
    policies = policies if overlong_policy == "reject" else ""
    fix = f"shorten the rows, or raise max_length up to the limit of the model{policies}"
    reasons = [
        f"{count_noun(overlong, 'row')} longer than max_length ({fix})",
        f"{count_noun(cut, 'token')} beyond max_length (raise max_length)",
        f"{count_noun(invalid, 'invalid row')}",
        f"{count_noun(filtered, 'row')} excluded by where",
    ]
    listed = [reason for reason, count in zip(reasons, (overlong, cut, invalid, filtered), strict=True) if count]
    yield (
        f"left out: {lost_rows:,} of {count_noun(rows, 'row')} ({shares[0]:.1%}) and {lost_tokens:,} of "
        f"{count_noun(tokens, 'token')} ({shares[1]:.1%}): {'; '.join(listed)}"
    )


def reading_notes(ledgers: Sequence[Ledger]) -> Iterator[str]:
    """Yield sentences about how the rows were read, e.g. which columns were ignored and which roles were renamed."""
    notes = sum((ledger.notes for ledger in ledgers), Counter[str]())
    if notes["column trace"] == notes["trace"]:
        del notes["column trace"]  # the column that describes the session of a row
    for kind, title in (
        ("column", "columns that are not read"),
        ("label", "labels"),
        ("role", "renamed roles"),
        ("where", "rows excluded because they lack a column that where= uses"),
        ("text", "columns that contain messages as text, and are used as text"),
        ("message key", "message keys that only some templates read"),
        ("trained", "messages with train: true whose role is not assistant, which are not trained"),
        ("trace ", "agent sessions with records that became no message, or with irregularities"),
    ):
        items = [(note.removeprefix(kind).strip(), rows) for note, rows in notes.most_common() if note.startswith(kind)]
        if items:
            listed = ", ".join(f"{name} ({count_noun(rows, 'row')})" for name, rows in items[:10])
            yield f"{title}: {listed}{f', and {len(items) - 10} more' if len(items) > 10 else ''}"
    for name, sentence in (
        ("quotes", "quotes are text, because the file does not use CSV quoting (override: quoting='csv')"),
        (
            "long quotes",
            "rows with a quoted cell of many lines that look like rows of the file (override: quoting='none')",
        ),
        ("trace", "conversations from agent sessions"),
        ("ranking", "pairs from ranked lists of answers (one for each two answers of different rank)"),
        (
            "served turns",
            "rows with served tokens of turns whose prompts do not begin with the tokens of the turns before",
        ),
        ("split", "conversations written as several texts, because the template rewrites earlier turns"),
        ("rejected side", "preference pairs, of which only the chosen answer is written"),
        ("completion", "completions with several answers, which the messages schema cannot represent"),
    ):
        if count := notes[name]:
            yield f"{sentence}: {count_noun(count, 'row')}"
