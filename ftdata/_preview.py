"""Look: what one row becomes, token by token, in the terminal.

Trained text is coloured and underlined; without colour it stands between ⟦ and ⟧. Control tokens are set off,
and so are the blanks that decide so much: a line break that is trained shows as ↵.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from ftdata.errors import BadRow, InputRefused
from ftdata.examples import Built, build_rows
from ftdata.readers import FileSource, sources
from ftdata.recipe import Options, Recipe, as_date, check_kwargs, make_recipe
from ftdata.schemas import normalise
from ftdata.shown import check_answers
from ftdata.templates import Template, check, closed, find, render
from ftdata.types import Example, Reject, Rendered, Row

NO_TOKENIZER = {"bos_token": "<bos>", "eos_token": "<eos>"}
"""What stands for special tokens where no tokenizer says what they are."""

_TRAINED = "bold green underline"
_PROMPT = "default"
_SCAFFOLD = "dim"
_CONTROL = "magenta"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the text as it is shown: `control` marks control tokens, `data` text of the row itself."""

    text: str
    trained: bool
    control: bool
    data: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One row as previewed: its examples' segments, or why it is rejected.

    `tokens` and `trained` count tokens per example; they are `None` where no tokenizer was given.
    """

    row: int
    place: str
    schema: str
    segments: tuple[tuple[Segment, ...], ...] = ()
    tokens: tuple[int, ...] | None = None
    trained: tuple[int, ...] | None = None
    flags: tuple[str, ...] = ()
    rejected: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON."""
        examples = [
            [{"text": s.text, "trained": s.trained, "control": s.control, "data": s.data} for s in one]
            for one in self.segments
        ]
        return {
            "row": self.row,
            "place": self.place,
            "schema": self.schema,
            "examples": examples,
            "tokens": self.tokens,
            "trained": self.trained,
            "flags": list(self.flags),
            "rejected": self.rejected,
        }


@dataclass(frozen=True, slots=True)
class Preview:
    """Some rows of a source, as they would be trained."""

    title: str
    rows: tuple[Shown, ...]

    def __str__(self) -> str:
        console = Console(color_system=None, width=200, soft_wrap=True)
        with console.capture() as capture:
            self.print(console)
        return capture.get()

    def print(self, console: Console) -> None:
        """Print to a rich console, in colour where it has colour."""
        console.print(self.title, style="bold", highlight=False, markup=False)
        for shown in self.rows:
            console.print(
                Text(f"── row {shown.row} · {shown.place} · {shown.schema or 'refused'} ──", style="bold blue")
            )
            if shown.rejected:
                console.print(Text(shown.rejected, style="red"))
            for number, segments in enumerate(shown.segments):
                console.print(_text(segments, plain=console.color_system is None), soft_wrap=True)
                console.print(Text(_counts(shown, number, segments), style="cyan"))
            if shown.flags:
                console.print(Text(f"flags: {', '.join(shown.flags)}", style="yellow"))

    def as_dict(self) -> dict[str, Any]:
        """Return the preview as JSON."""
        return {"title": self.title, "rows": [shown.as_dict() for shown in self.rows]}


def preview(
    data: Any,
    tokenizer: Any = None,
    template: str | Path | None = None,
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    train_on: str = "assistant",
    train_parts: Sequence[str] | None = None,
    turns: str = "auto",
    control_tokens: str = "escape",
    dropped: str = "refuse",
    unclosed: str = "flag",
    refuse: Sequence[str] = (),
    max_length: int | None = None,
    overlong: str = "reject",
    n: int = 3,
    row: int | None = None,
    date: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Preview:
    """Show what rows of `data` become, without building.

    Only as much of the source is read as is shown.

    Args:
        data: as for `build_sft_dataset`, and so are all options that are not listed here.
        tokenizer: `None` shows the text and what of it is trained, without tokens.
        template: without a tokenizer, `None` means `chatml`.
        n: how many rows to show, from the first.
        row: show this row (from 0) instead.

    Raises:
        UsageError: an unknown option value, or no such row.
        InputRefused: the source cannot be read.

    >>> print(preview([{"question": "2+2?", "answer": "4"}], template="question_answer", n=1))
    <memory> · template question_answer · no tokenizer
    ── row 0 · <memory>[0] · question_answer ──
    ### Question:↵
    2+2?↵
    ↵
    ### Answer:↵
    ⟦4⟨<eos>⟩⟧
    6 of 38 characters trained
    <BLANKLINE>
    """
    choices: dict[str, Any] = {
        "schema": schema,
        "columns": columns,
        "train_on": train_on,
        "train_parts": train_parts,
        "turns": turns,
        "control_tokens": control_tokens,
        "dropped": dropped,
        "unclosed": unclosed,
        "refuse": refuse,
        "max_length": max_length,
        "overlong": overlong,
    }
    entries = list(islice(_rows(data), row, row + 1) if row is not None else islice(_rows(data), n))
    if tokenizer is None:
        name, source = find(template if template is not None else "chatml")
        check_kwargs(template_kwargs)
        bare = Template(name, source, special_tokens=NO_TOKENIZER, date=as_date(date), kwargs=template_kwargs or {})
        check(bare)
        options = Options(**choices)
        shown = tuple(_show_text(entry, bare, options) for entry in entries)
        kind = f"template {name} · no tokenizer"
    else:
        recipe = make_recipe(
            tokenizer,
            template,
            date=date,
            template_kwargs=template_kwargs,
            **choices,
        )
        shown = tuple(
            _show_tokens(entry, outcome, recipe)
            for entry, outcome in zip(entries, build_rows(recipe, entries), strict=True)
        )
        kind = f"template {recipe.template.name} · tokenizer {recipe.tokenizer.name}"
    if not shown:
        where = f"there is no row {row}" if row is not None else "there are no rows"
        raise InputRefused("no_such_row", where)
    places = [data] if isinstance(data, str | Path) else list(dict.fromkeys(entry.source.path for entry in entries))
    given = ", ".join(map(str, places))
    return Preview(f"{given} · {kind}", shown)


def _rows(data: Any) -> Iterator[Row | Reject]:
    for source in sources(data):
        # A first look needs no download.
        yield from (replace(source, streaming=True) if isinstance(source, FileSource) else source).rows()


def _show_text(entry: Row | Reject, template: Template, options: Options) -> Shown:
    place = str(entry.source)
    if isinstance(entry, Reject):
        return Shown(entry.source.row, place, "", rejected=str(entry))
    try:
        conversation = normalise(entry, options.schema, options.columns)
        check_answers(conversation)
        if conversation.tokens is not None:
            hint = "pass the tokenizer that made them"
            raise BadRow("no_tokenizer", "holds tokens, which cannot be shown without their tokenizer", hint=hint)
        if conversation.kwargs:
            template = replace(template, kwargs={**template.kwargs, **conversation.kwargs})
        texts = render(conversation, template, options.turns, options.dropped)
        if options.unclosed == "append_eos":
            texts = tuple(closed(one, template) for one in texts)
    except (BadRow, RecursionError) as error:
        reason = str(error) if isinstance(error, BadRow) else f"[too_deep] {place}: is nested too deep to be read"
        return Shown(entry.source.row, place, "", rejected=reason)
    policy = options.policy
    segments = tuple(_by_span(one, policy(one, conversation), template) for one in texts)
    flags = sorted({flag for one in texts for flag in one.flags})
    return Shown(entry.source.row, place, conversation.schema, segments, flags=tuple(flags))


def _by_span(rendered: Rendered, chosen: Iterable[bool], template: Template) -> tuple[Segment, ...]:
    specials = set(template.special_tokens.values())
    segments = []
    for span, trained in zip(rendered.spans, chosen, strict=True):
        text = rendered.text[span.start : span.end]
        segments.append(Segment(text, trained, text in specials, span.part != "scaffold"))
    return tuple(segments)


def _show_tokens(entry: Row | Reject, outcome: Built | Reject, recipe: Recipe) -> Shown:
    place = str(entry.source)
    if isinstance(outcome, Reject):
        return Shown(entry.source.row, place, "", rejected=str(outcome))
    examples = outcome.examples
    return Shown(
        entry.source.row,
        place,
        outcome.conversation.schema,
        segments=tuple(_by_token(example, recipe) for example in examples),
        tokens=tuple(len(example) for example in examples),
        trained=tuple(int(example.trained.sum()) for example in examples),
        flags=tuple(sorted({flag for example in examples for flag in example.flags})),
    )


def _by_token(example: Example, recipe: Recipe) -> tuple[Segment, ...]:
    """Cut the text where the training of tokens, or their kind, changes.

    Characters of several tokens (or of none) stay with the token that begins first at or before them.
    """
    control = np.isin(example.input_ids, recipe.control.ids)
    data = [span for span in example.spans if span.part != "scaffold"]
    ends = np.asarray([span.end for span in data], dtype=np.int64)
    starts = np.asarray([span.start for span in data], dtype=np.int64)
    at = np.searchsorted(ends, example.offsets[:, 0], side="right")
    is_data = at < len(data)
    is_data[is_data] = starts[at[is_data]] <= example.offsets[is_data, 0]
    segments: list[Segment] = []
    position = 0
    added = len(recipe.tokenizer.bos_ids) if len(example) and example.offsets[0, 1] == 0 else 0
    if added:
        segments.append(Segment(recipe.tokenizer.decode(example.input_ids[:added]), False, True, False))
    for index in range(added, len(example)):
        end = max(int(example.offsets[index, 1]), position)
        kind = (bool(example.trained[index]), bool(control[index]), bool(is_data[index]))
        text = example.text[position:end]
        position = end
        last = segments[-1] if segments else None
        if last is not None and (last.trained, last.control, last.data) == kind and not kind[1]:
            segments[-1] = Segment(last.text + text, *kind)
        elif text:
            segments.append(Segment(text, *kind))
    return tuple(segments)


def _text(segments: Iterable[Segment], *, plain: bool) -> Text:
    shown = Text()
    inside = False
    for segment in segments:
        if plain and segment.trained != inside:
            shown.append("⟦" if segment.trained else "⟧")
            inside = segment.trained
        style = _TRAINED if segment.trained else _PROMPT if segment.data else _SCAFFOLD
        text = f"⟨{segment.text}⟩" if segment.control else _visible(segment.text)
        shown.append(text, style=f"{style} {_CONTROL}" if segment.control else style)
    if inside:
        shown.append("⟧")
    return shown


def _visible(text: str) -> str:
    # Terminal control characters of the data must not drive the reader's terminal.
    printable = "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in text)
    return printable.replace("\t", "⇥\t").replace("\n", "↵\n")


def _counts(shown: Shown, number: int, segments: Iterable[Segment]) -> str:
    segments = list(segments)
    if shown.tokens is None or shown.trained is None:
        total = sum(len(segment.text) for segment in segments)
        trained = sum(len(segment.text) for segment in segments if segment.trained)
        return f"{trained:,} of {total:,} characters trained"
    tokens, trained = shown.tokens[number], shown.trained[number]
    return f"{trained:,} of {tokens:,} tokens trained ({trained / tokens:.0%})"
