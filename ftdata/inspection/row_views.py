"""Views: one row as it will be trained, every token with its text, its owner and its label, for people to read.

What prints a view (the terminal, the page, a notebook) decides on nothing: all that is shown is in the view.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import BadRow, escape_unprintable
from ftdata.pipeline.examples import BuiltRow
from ftdata.pipeline.recipe import Options, Recipe
from ftdata.pipeline.render_rows import add_row_flags, check_answers
from ftdata.schemas import normalize
from ftdata.templates import Template, append_missing_stop, render_in_worker
from ftdata.templates.worker.client import verify_template
from ftdata.types import Conversation, Example, Part, Reject, Rendered, Row, Source, Span

_LOSSES = {
    "content": frozenset({"message_truncated", "message_dropped", "history_rewritten"}),
    "reasoning_content": frozenset({"message_truncated", "message_dropped", "reasoning_dropped", "history_rewritten"}),
}
"""What of a message may be lost, and the flags that say that something like it is."""


_MARKS = re.compile("[⟦⟧⟨⟩■✂↵⇥]")
"""With which what is trained is told apart where there are no colours."""


class SegmentOwner(NamedTuple):
    """Who wrote a stretch: the message's number and role (-1 and none: nobody's), and which part of it that is."""

    message: int
    role: str
    part: str


class Segment(NamedTuple):
    """Neighbouring tokens of one kind: `control` marks control tokens, `stop` those that end a trained turn.

    `data` is text of the row itself, all else the template's.
    """

    text: str
    trained: bool
    control: bool
    stop: bool
    owner: SegmentOwner

    @property
    def data(self) -> bool:
        """Whether the row wrote it, not the template."""
        return self.owner.part not in ("", Part.SCAFFOLD)


@dataclass(frozen=True, eq=False)
class ExampleView:
    """One example, by tokens; where there is no tokenizer, by spans, and without ids.

    Attributes:
        text: what is shown, an added BOS included.
        ends: int64 `[n]`, the character before which the text of each ends. A character of several tokens is the
            first one's; what no token stands for goes with the token after it.
        trained: bool `[n]`.
        control: bool `[n]`.
        stop: bool `[n]`, the trained control tokens with which what the model must produce ends.
        owner: int64 `[n]`, numbers of `owners`.
        owners: who wrote it.
        generated: bool `[n]`, what the model must produce; `None`: what is trained.
        ids: int32 `[n]`, or `None`.
        flags: what a careful reader should know.
        cut: tokens that truncation took from the end.
        rest: the text behind the last token.
    """

    text: str
    ends: NDArray[np.int64]
    trained: NDArray[np.bool_]
    control: NDArray[np.bool_]
    owner: NDArray[np.int64]
    owners: tuple[SegmentOwner, ...]
    ids: NDArray[np.int32] | None = None
    flags: frozenset[str] = frozenset()
    cut: int = 0
    rest: str = ""
    generated: NDArray[np.bool_] | None = None

    @property
    def stop(self) -> NDArray[np.bool_]:
        """Which tokens are stops: control tokens that end a trained stretch (bool `[n]`)."""
        own = self.trained if self.generated is None else self.generated
        ends: NDArray[np.bool_] = self.trained & self.control & own & ~np.append(own[1:], False)
        return ends

    def part(self, first: int, last: int) -> ExampleView:
        """Return the tokens from `first` on and before `last`, as a view of their own."""
        start, end = (int(self.ends[at - 1]) if at else 0 for at in (first, last))
        names = ("trained", "control", "owner", "ids", "generated")
        columns = {name: own[first:last] for name in names if (own := getattr(self, name)) is not None}
        return replace(self, text=self.text[start:end], ends=self.ends[first:last] - start, **columns, cut=0, rest="")

    @property
    def pieces(self) -> list[str]:
        """The text of each token."""
        return [self.text[start:end] for start, end in pairwise([0, *self.ends.tolist()])]

    def segments(self) -> Iterator[Segment]:
        """Yield neighbouring tokens of one kind together; each control token is alone."""
        stop = self.stop
        kind = np.stack((self.trained, self.control, stop, self.owner), axis=1)
        apart = np.any(kind[1:] != kind[:-1], axis=1) | self.control[1:]
        bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(kind)] if len(kind) else [0]
        ends = [0, *self.ends.tolist()]
        for first, last in pairwise(bounds):
            is_trained, is_control, is_stop, owner = kind[first].tolist()
            if text := self.text[ends[first] : ends[last]]:
                yield Segment(text, bool(is_trained), bool(is_control), bool(is_stop), self.owners[owner])

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def counts(self) -> tuple[int, int]:
        """How many tokens are trained, of how many; without tokens: characters."""
        if self.ids is not None:
            return int(self.trained.sum()), len(self)
        return int(np.diff(self.ends, prepend=0)[self.trained].sum()), len(self.text)


class DroppedText(NamedTuple):
    """Text of a row that the template does not print."""

    field: str
    text: str


@dataclass(frozen=True)
class RowView:
    """One row: its examples, or why it is rejected.

    Attributes:
        source: where it came from.
        schema: as what it was read.
        examples: what is trained of it.
        lost: what the template does not print of it.
        rejected: why there are no examples.
        why: for what it was chosen, of rows that are odd.
        dropped: the lengths of examples that `overlong="drop_turns"` leaves out.
        number: the number of the example, in a build.
        pack: the number of its pack, in a build.
    """

    source: Source
    schema: str = ""
    examples: tuple[ExampleView, ...] = ()
    lost: tuple[DroppedText, ...] = ()
    rejected: str = ""
    why: tuple[str, ...] = ()
    dropped: tuple[int, ...] = ()
    number: int | None = None
    pack: int | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        """What a careful reader should know of any of its examples."""
        return tuple(sorted(frozenset[str]().union(*(one.flags for one in self.examples))))

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON; `tokens` and `trained` are counts per example, `null` without a tokenizer."""
        with_ids = bool(self.examples) and all(one.ids is not None for one in self.examples)
        return {
            "row": self.source.row,
            "place": str(self.source),
            "schema": self.schema,
            "why": list(self.why),
            "examples": [[_segment(one) for one in view.segments()] for view in self.examples],
            "tokens": [len(one) for one in self.examples] if with_ids else None,
            "trained": [one.counts[0] for one in self.examples] if with_ids else None,
            "dropped": list(self.dropped),
            "example": self.number,
            "pack": self.pack,
            "cut": [{"tokens": one.cut, "text": one.rest} for one in self.examples],
            "lost": [lost._asdict() for lost in self.lost],
            "flags": list(self.flags),
            "rejected": self.rejected,
        }


def _segment(segment: Segment) -> dict[str, Any]:
    text, trained, control, stop, owner = segment
    said = {"text": text, "trained": trained, "control": control, "stop": stop, "data": segment.data}
    return {**said, **owner._asdict()}


def make_row_view(outcome: BuiltRow | Reject, recipe: Recipe, why: Sequence[str] = ()) -> RowView:
    """Return what is to be seen of a row that was built or rejected."""
    if isinstance(outcome, Reject):
        return RowView(outcome.source, rejected=str(outcome), why=tuple(why))
    said = outcome.conversation
    of_build = said.tokens is not None and "pack" in said.fields
    return RowView(
        said.source,
        said.schema,
        tuple(_by_token(example, said, recipe) for example in outcome.examples),
        tuple(_lost(said, outcome.examples)),
        why=tuple(why),
        dropped=outcome.dropped,
        number=int(said.fields["example"]) if of_build else None,
        pack=int(said.fields["pack"]) if of_build else None,
    )


def added_texts(recipe: Recipe) -> Iterator[str]:
    """Yield what the template prints that no row says."""
    template = recipe.template
    if not template.source or not template.chat:
        return
    found = verify_template(template)
    if found.adds.strip():
        yield f"the template puts this before conversations that have no system message: {found.adds.strip()}"
    if found.uses_date:
        yield f"the template prints a date, shown as {template.date:%Y-%m-%d}; set it with date="


def make_text_view(row: Row | Reject, template: Template, options: Options) -> RowView:
    """Return what is to be seen of a row where there is no tokenizer: the text, and what of it is trained."""
    if isinstance(row, Reject):
        return RowView(row.source, rejected=str(row))
    try:
        said = normalize(row, options.schema, options.columns)
        check_answers(said)
        if said.tokens is not None:
            hint = "pass the tokenizer that made them"
            raise BadRow("no_tokenizer", "holds tokens, which cannot be shown without their tokenizer", hint=hint)
        if said.kwargs:
            template = replace(template, kwargs={**template.kwargs, **said.kwargs})
        texts = render_in_worker(said, template, options.turns, options.on_dropped_message)
        texts = add_row_flags(said, texts)
        if options.on_missing_stop == "append_eos":
            texts = tuple(append_missing_stop(one, template) for one in texts)
    except (BadRow, RecursionError) as error:
        reason = str(error) if isinstance(error, BadRow) else f"[too_deep] {row.source}: is nested too deep to be read"
        return RowView(row.source, rejected=reason)
    examples = tuple(_by_span(one, options.policy(one, said), said, template) for one in texts)
    return RowView(row.source, said.schema, examples, tuple(_lost(said, texts)))


def _by_span(rendered: Rendered, chosen: Sequence[bool], said: Conversation, template: Template) -> ExampleView:
    specials = "|".join(map(re.escape, template.special_tokens.values()))
    pattern = re.compile(f"({specials}|<\\|[^|<>]*\\|>)")
    spans, control, trained = list[Span](), list[bool](), list[bool]()
    for span, yes in zip(rendered.spans, chosen, strict=True):
        # What a row writes is no control token, whatever it looks like.
        own = span.part is Part.SCAFFOLD or rendered.keep_control
        at = span.start
        for number, text in enumerate(pattern.split(rendered.text[span.start : span.end]) if own else [None]):
            end = span.end if text is None else at + len(text)
            if end > at:
                spans.append(span._replace(start=at, end=end))
                control.append(bool(number % 2))
                trained.append(yes)
            at = end
    owners, owner = _owners(spans, said)
    ends = np.fromiter((span.end for span in spans), np.int64)
    generated = np.fromiter((span.generated for span in spans), np.bool_)
    return ExampleView(
        rendered.text,
        ends,
        np.array(trained),
        np.array(control),
        owner,
        owners,
        flags=rendered.flags,
        generated=generated,
    )


def _by_token(example: Example, said: Conversation, recipe: Recipe) -> ExampleView:
    added = len(recipe.tokenizer.bos_ids) if len(example) and example.offsets[0, 1] == 0 else 0
    begun = recipe.tokenizer.decode(example.input_ids[:added]) if added else ""
    ends = np.maximum.accumulate(example.offsets[:, 1].astype(np.int64)) + len(begun)
    ends[:added] = len(begun)
    owners, by_span = _owners(example.spans, said)
    at = np.searchsorted([span.end for span in example.spans], example.offsets[:, 0], side="right")
    owner = np.append(by_span, 0)[np.minimum(at, len(by_span))]
    owner[:added] = 0
    produced = np.asarray([*(span.generated for span in example.spans), False])[np.minimum(at, len(by_span))]
    whole = begun + example.text
    shown = int(ends[-1]) if len(ends) else len(begun)
    return ExampleView(
        whole[:shown],
        ends,
        example.trained,
        recipe.control.among(example.input_ids),
        owner,
        owners,
        example.input_ids,
        example.flags,
        example.cut,
        whole[shown:],
        produced,
    )


def _owners(spans: Sequence[Span], said: Conversation) -> tuple[tuple[SegmentOwner, ...], NDArray[np.int64]]:
    """Return who wrote stretches, and which of these wrote each span; the first is nobody."""
    found = {SegmentOwner(-1, "", ""): 0}
    numbers = []
    for span in spans:
        if said.tokens is not None:
            owner = SegmentOwner(-1, "", "")
        elif 0 <= span.message < len(said.messages):
            owner = SegmentOwner(span.message, said.messages[span.message]["role"], str(span.part))
        else:
            owner = SegmentOwner(-1, "", str(span.part))
        numbers.append(found.setdefault(owner, len(found)))
    return tuple(found), np.asarray(numbers, np.int64)


def _lost(said: Conversation, texts: Sequence[Rendered] | Sequence[Example]) -> Iterator[DroppedText]:
    """Yield the texts of messages that stand in none of the examples, or what of them does not."""
    flags = frozenset[str]().union(*(one.flags for one in texts))
    printed = [""] * len(said.messages)
    for one in texts:
        for span in one.spans:
            if span.part is not Part.SCAFFOLD and 0 <= span.message < len(printed):
                printed[span.message] += one.text[span.start : span.end]
    for number, message in enumerate(said.messages):
        for name, losses in _LOSSES.items():
            for given in map(str.strip, content_texts(message.get(name)) if flags & losses else ()):
                if given not in printed[number]:
                    yield DroppedText(f"messages[{number}].{name}", _missing(given, printed[number]))
    if said.tools and "tools_dropped" in flags:
        yield DroppedText("tools", json.dumps(said.tools, ensure_ascii=False))


def content_texts(content: object) -> Iterator[str]:
    """Yield the texts of what a message holds: one, or those of its parts."""
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            yield part["text"]


def _missing(given: str, printed: str) -> str:
    """Return the lines of a text that are not printed; all of it where that tells nothing."""
    lines = [line for line in given.splitlines() if line.strip() and line.strip() not in printed]
    return "\n".join(lines) or given


def make_visible(text: str) -> str:
    """Return a text with its line breaks marked, and with codes for what would deceive a reader: our own marks, too."""
    spelled = _MARKS.sub(lambda found: f"\\u{ord(found.group()):04x}", escape_unprintable(text))
    return spelled.replace("\t", "⇥\t").replace("\n", "↵\n")


def to_single_line(text: object) -> str:
    """Return a text as part of one line."""
    return make_visible(str(text)).replace("↵\n", "↵").replace("⇥\t", "⇥")


def row_heading(row: RowView) -> str:
    """Say which row it is, where it stands, and as what it was read."""
    number = f"row {row.source.row}" if row.number is None else f"example {row.number}"
    pack = "" if row.pack is None else f" · pack {row.pack}"
    return to_single_line(f"{number} · {row.source} · {row.schema or 'refused'}{pack}")


def describe_trained_share(view: ExampleView) -> str:
    """Say how much of an example is trained."""
    trained, total = view.counts
    if view.ids is None:
        return f"{trained:,} of {total:,} characters trained"
    return f"{trained:,} of {total:,} tokens trained ({trained / max(total, 1):.0%})"
