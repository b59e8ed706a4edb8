"""Views of rows for display. A view contains the text, origin and label of each token.

The terminal, the HTML page and notebooks render the same views and make no decisions themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import BadRow, escape_unprintable
from ftdata.inspection.image_captions import caption_images
from ftdata.pipeline.batch import BuiltRow
from ftdata.pipeline.drift import describe_drift
from ftdata.pipeline.mask import drop_untrained_flags
from ftdata.pipeline.read_rows import check_answers, read_conversation
from ftdata.pipeline.recipe import Options, Recipe
from ftdata.pipeline.render_rows import add_row_flags
from ftdata.templates import Template, append_missing_stop, render_in_worker
from ftdata.templates.worker.client import verify_template
from ftdata.types import Conversation, Example, ImageReference, Part, Reject, Rendered, Row, Source, Span

_LOSS_FLAGS = {
    "content": frozenset({"message_truncated", "message_dropped", "history_rewritten"}),
    "reasoning_content": frozenset({"message_truncated", "message_dropped", "reasoning_dropped", "history_rewritten"}),
}
"""The fields of a message that the template can leave out, and the flags that report it."""


_MARKS = re.compile("[⟦⟧⟨⟩■✂↵⇥]")
"""The characters that mark trained tokens, control tokens and whitespace in plain text."""


class SegmentOwner(NamedTuple):
    """The message, or the part of the template, that a segment of text comes from.

    Attributes:
        message: The number of the message; -1 if the segment belongs to no message.
        role: The role of the message; empty if there is none.
        part: The part of the message, as in `Part`.
    """

    message: int
    role: str
    part: str


class Segment(NamedTuple):
    """Consecutive tokens that come from the same part of a message or template and are displayed in the same style.

    Attributes:
        text: The text of the tokens.
        trained: Whether the tokens are trained.
        control: Whether the segment is a control token.
        stop: Whether the segment is a stop token at the end of a generated span.
        owner: The origin of the text.
    """

    text: str
    trained: bool
    control: bool
    stop: bool
    owner: SegmentOwner

    @property
    def data(self) -> bool:
        """Whether the text comes from the row rather than from the template."""
        return bool(self.owner.part) and Part(self.owner.part).is_data


@dataclass(frozen=True, eq=False)
class ExampleView:
    """One example, divided into tokens for display. Without a tokenizer, it is divided into ranges of characters.

    Attributes:
        text: The visible text, including an added BOS token.
        ends: int64 `[n]`, the end of each token in the text. A character that consists of several tokens belongs to the
            first of them; characters without a token belong to the next token.
        trained: bool `[n]`, whether each token is trained.
        control: bool `[n]`, whether each token is a control token.
        owner: int64 `[n]`, an index into `owners`.
        owners: The origins of the tokens.
        ids: int32 `[n]`, the token ids; `None` without a tokenizer.
        flags: The flags of the example.
        cut: The number of truncated tokens.
        remainder: The text after the last token.
        generated: bool `[n]`, whether the model must generate each token; `None` to use `trained`.
        images: The images, by the number of their first token.
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
    remainder: str = ""
    generated: NDArray[np.bool_] | None = None
    images: Mapping[int, ImageReference] = field(default_factory=dict)

    @property
    def stop(self) -> NDArray[np.bool_]:
        """A mask that is true for the trained stop token at the end of each generated span (bool `[n]`)."""
        generated = self.trained if self.generated is None else self.generated
        stops: NDArray[np.bool_] = self.trained & self.control & generated & ~np.append(generated[1:], False)
        return stops

    def part(self, first: int, last: int) -> ExampleView:
        """Return a view that contains only the tokens `[first, last)`."""
        start, end = (int(self.ends[index - 1]) if index else 0 for index in (first, last))
        names = ("trained", "control", "owner", "ids", "generated")
        columns = {name: column[first:last] for name in names if (column := getattr(self, name)) is not None}
        ends = self.ends[first:last] - start
        images = {token - first: image for token, image in self.images.items() if first <= token < last}
        return replace(self, text=self.text[start:end], ends=ends, **columns, cut=0, remainder="", images=images)

    @property
    def pieces(self) -> list[str]:
        """The text of each token."""
        return [self.text[start:end] for start, end in pairwise([0, *self.ends.tolist()])]

    def segments(self) -> Iterator[Segment]:
        """Group consecutive tokens of the same kind into segments. Every control token is a separate segment."""
        stop = self.stop
        kinds = np.stack((self.trained, self.control, stop, self.owner), axis=1)
        is_new = np.any(kinds[1:] != kinds[:-1], axis=1) | self.control[1:]
        bounds = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(kinds)] if len(kinds) else [0]
        ends = [0, *self.ends.tolist()]
        for first, last in pairwise(bounds):
            is_trained, is_control, is_stop, owner = kinds[first].tolist()
            if text := self.text[ends[first] : ends[last]]:
                yield Segment(text, bool(is_trained), bool(is_control), bool(is_stop), self.owners[owner])

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def counts(self) -> tuple[int, int]:
        """The number of trained tokens and the total number of tokens.

        Without a tokenizer, the numbers count characters.
        """
        if self.ids is not None:
            return int(self.trained.sum()), len(self)
        return int(np.diff(self.ends, prepend=0)[self.trained].sum()), len(self.text)


@dataclass(frozen=True)
class Heading:
    """The heading of a report.

    Attributes:
        name: A short title.
        facts: Name -> value, such as `{"data": "chats/train.jsonl", "template": "chatml"}`.
    """

    name: str
    facts: Mapping[str, str]

    @classmethod
    def from_paths(cls, paths: Sequence[str], template: str, tokenizer: str) -> Heading:
        """Create the heading of a report on data or a build. Its title contains file names without folders."""
        facts = {"data": _join_names(paths), "template": template, "tokenizer": tokenizer}
        return cls(_join_names([PurePath(path).name or path for path in paths]), facts)

    def __str__(self) -> str:
        return " · ".join(value if name == "data" else f"{name} {value}" for name, value in self.facts.items())


def _join_names(names: Sequence[str]) -> str:
    """Join the first three distinct names, and count the other names."""
    distinct = list(dict.fromkeys(names))
    omitted = f" and {len(distinct) - 3:,} more" if len(distinct) > 3 else ""
    return f"{', '.join(distinct[:3])}{omitted}"


class DroppedText(NamedTuple):
    """Text of a row that the template does not print.

    Attributes:
        field: The name of the field.
        text: The missing text.
    """

    field: str
    text: str


@dataclass(frozen=True)
class RowView:
    """One row for display: its examples, or the reason why the row is rejected.

    Attributes:
        source: The source of the row.
        schema: The schema of the row.
        examples: The examples of the row.
        lost: Text of the row that the template does not print.
        drift: The differences between the served tokens of the row and the tokens that the template renders.
        rejected: The reason why the row is rejected; empty if the row is built.
        why: The kinds of outlier that the row belongs to.
        dropped: The lengths in tokens of the examples that `overlong="drop_turns"` leaves out.
        number: The number of the example, or of the preference pair, in a build; or `None`.
        pack: The number of the packed sequence in a build, or `None`.
        is_pair: Whether the examples are the sides of a preference pair.
        label: For KTO: `"desirable"` or `"undesirable"`; empty for other rows.
    """

    source: Source
    schema: str = ""
    examples: tuple[ExampleView, ...] = ()
    lost: tuple[DroppedText, ...] = ()
    drift: tuple[str, ...] = ()
    rejected: str = ""
    why: tuple[str, ...] = ()
    dropped: tuple[int, ...] = ()
    number: int | None = None
    pack: int | None = None
    is_pair: bool = False
    label: str = ""

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of all examples of the row, in alphabetical order."""
        return tuple(sorted(frozenset[str]().union(*(view.flags for view in self.examples))))

    def describe(self) -> dict[str, Any]:
        """Return the values that do not depend on the tokens of the row, as a JSON-serializable dictionary."""
        return {
            "row": self.source.row,
            "place": str(self.source),
            "schema": self.schema,
            "why": list(self.why),
            "dropped": list(self.dropped),
            "pack": self.pack,
            "label": self.label,
            "lost": [lost._asdict() for lost in self.lost],
            "drift": list(self.drift),
            "flags": list(self.flags),
            "rejected": self.rejected,
        }

    def as_dict(self) -> dict[str, Any]:
        """Convert the row to a JSON-serializable dictionary.

        `tokens` and `trained` are counts per example, or `None` without a tokenizer.
        """
        has_ids = bool(self.examples) and all(view.ids is not None for view in self.examples)
        return {
            **self.describe(),
            "examples": [[_segment_as_dict(segment) for segment in view.segments()] for view in self.examples],
            "tokens": [len(view) for view in self.examples] if has_ids else None,
            "trained": [view.counts[0] for view in self.examples] if has_ids else None,
            "example": self.number,
            "cut": [{"tokens": view.cut, "text": view.remainder} for view in self.examples],
        }


def _segment_as_dict(segment: Segment) -> dict[str, Any]:
    text, trained, control, stop, owner = segment
    values = {"text": text, "trained": trained, "control": control, "stop": stop, "data": segment.data}
    return {**values, **owner._asdict()}


def make_row_view(outcome: BuiltRow | Reject, recipe: Recipe, why: Sequence[str] = ()) -> RowView:
    """Create the view of a built or rejected row.

    Args:
        outcome: The row.
        recipe: The options, tokenizer and template.
        why: The kinds of outlier that the row belongs to.
    """
    if isinstance(outcome, Reject):
        return RowView(outcome.source, rejected=str(outcome), why=tuple(why))
    conversation = outcome.conversation
    is_document = conversation.tokens is not None and "pack" in conversation.fields
    return RowView(
        conversation.source,
        conversation.schema,
        tuple(
            _view_tokens(example, conversation.part(number), recipe) for number, example in enumerate(outcome.examples)
        ),
        tuple(_find_dropped_in_sides(conversation, outcome.examples)),
        tuple(describe_drift(conversation, recipe)),
        why=tuple(why),
        dropped=outcome.dropped,
        number=int(conversation.fields["example"]) if is_document else None,
        pack=int(conversation.fields["pack"]) if is_document and not conversation.sides else None,
        is_pair=bool(conversation.sides),
        label=_name_label(conversation),
    )


def added_texts(recipe: Recipe) -> Iterator[str]:
    """Yield notes about text that the template adds to rows: a default system prompt or a date."""
    template = recipe.template
    if not template.source or not template.is_chat:
        return
    report = verify_template(template)
    if report.adds.strip():
        yield f"the template adds this text to conversations without a system message: {report.adds.strip()}"
    if report.uses_date:
        yield f"the template prints the date, here {template.date:%Y-%m-%d}; set it with date="


def make_text_view(row: Row | Reject, template: Template, options: Options) -> RowView:
    """Create the view of a row if no tokenizer was passed. It shows the rendered text and the trained spans."""
    if isinstance(row, Reject):
        return RowView(row.source, rejected=str(row))
    try:
        conversation = read_conversation(row, options)
        for part in conversation.parts:
            check_answers(part)
        if conversation.tokens is not None:
            hint = "pass the tokenizer that produced the tokens"
            problem = "the row is pretokenized, so a tokenizer is needed to show its text"
            raise BadRow("no_tokenizer", problem, hint=hint)
        if conversation.kwargs:
            template = replace(template, kwargs={**template.kwargs, **conversation.kwargs})
        texts = tuple(
            text
            for part in conversation.parts
            for text in render_in_worker(part, template, options.turns, options.on_dropped_message)
        )
        texts = add_row_flags(conversation, texts)
        if options.on_missing_stop == "append_eos":
            texts = tuple(append_missing_stop(rendered, template) for rendered in texts)
    except (BadRow, RecursionError) as error:
        reason = str(error) if isinstance(error, BadRow) else f"[too_deep] {row.source}: the row is nested too deeply"
        return RowView(row.source, rejected=reason)
    examples = tuple(
        _view_spans(rendered, options.policy(rendered, conversation.part(number)), conversation.part(number), template)
        for number, rendered in enumerate(texts)
    )
    lost = tuple(_find_dropped_in_sides(conversation, texts))
    return RowView(
        row.source,
        conversation.schema,
        examples,
        lost,
        is_pair=bool(conversation.sides),
        label=_name_label(conversation),
    )


def _name_label(conversation: Conversation) -> str:
    label = conversation.feedback.get("label")
    return "" if label is None else "desirable" if label else "undesirable"


def _find_dropped_in_sides(
    conversation: Conversation, texts: Sequence[Example] | Sequence[Rendered]
) -> Iterator[DroppedText]:
    """Yield the texts of a row, or of both sides of a preference pair, that the template does not print."""
    for number, part in enumerate(conversation.parts):
        part_texts = texts[number : number + 1] if conversation.sides else texts
        yield from _find_dropped_texts(part, part_texts)


def _view_spans(
    rendered: Rendered, trained_spans: Sequence[bool], conversation: Conversation, template: Template
) -> ExampleView:
    special_tokens = "|".join(map(re.escape, template.special_tokens.values()))
    pattern = re.compile(f"({special_tokens}|<\\|[^|<>]*\\|>)")
    spans, control, trained = list[Span](), list[bool](), list[bool]()
    for span, is_trained in zip(rendered.spans, trained_spans, strict=True):
        # Text of a row never becomes a control token, even if it looks like one.
        has_control = not span.part.is_data or rendered.keep_control
        start, text = span.start, rendered.text[span.start : span.end]
        for number, piece in enumerate(pattern.split(text) if has_control else [text]):
            end = start + len(piece)
            if end > start:
                spans.append(span._replace(start=start, end=end))
                control.append(bool(number % 2))
                trained.append(is_trained)
            start = end
    owners, owner = _owners_of_spans(spans, conversation)
    ends = np.fromiter((span.end for span in spans), np.int64)
    generated = np.fromiter((span.generated for span in spans), np.bool_)
    columns = (ends, np.array(trained), np.array(control), owner)
    flags = drop_untrained_flags(rendered, trained_spans)
    return ExampleView(rendered.text, *columns, owners, flags=flags, generated=generated)


def _view_tokens(example: Example, conversation: Conversation, recipe: Recipe) -> ExampleView:
    bos_count = len(recipe.tokenizer.bos_ids) if len(example) and example.offsets[0, 1] == 0 else 0
    bos_text = recipe.tokenizer.decode(example.input_ids[:bos_count]) if bos_count else ""
    ends = np.maximum.accumulate(example.offsets[:, 1].astype(np.int64)) + len(bos_text)
    ends[:bos_count] = len(bos_text)
    owners, span_owners = _owners_of_spans(example.spans, conversation)
    span_ends = [span.end for span in example.spans]
    # Tokens after the last span get the index len(spans), which has owner 0 and is not generated.
    spans = np.minimum(np.searchsorted(span_ends, example.offsets[:, 0], side="right"), len(span_owners))
    owner = np.append(span_owners, 0)[spans]
    owner[:bos_count] = 0
    generated = np.asarray([*(span.generated for span in example.spans), False])[spans]
    text = bos_text + example.text
    text_end = int(ends[-1]) if len(ends) else len(bos_text)
    control = recipe.control.is_control(example.input_ids)
    visible, remainder, images = text[:text_end], text[text_end:], dict[int, ImageReference]()
    if example.images:
        control &= ~np.asarray([*(span.part is Part.MEDIA for span in example.spans), False])[spans]
        visible, ends, images = caption_images(example, visible, ends, len(bos_text))
    columns = (ends, example.trained, control, owner)
    return ExampleView(
        visible,
        *columns,
        owners,
        example.input_ids,
        example.flags,
        example.cut,
        remainder,
        generated,
        images,
    )


def _owners_of_spans(
    spans: Sequence[Span], conversation: Conversation
) -> tuple[tuple[SegmentOwner, ...], NDArray[np.int64]]:
    """Return a list of the different parts of messages and of the template, and the list index of each span's part.

    The indices are int64 `[spans]`. Index 0 means that the part is unknown.
    """
    indices = {SegmentOwner(-1, "", ""): 0}
    numbers = []
    for span in spans:
        if conversation.tokens is not None:
            owner = SegmentOwner(-1, "", "")
        elif 0 <= span.message < len(conversation.messages):
            owner = SegmentOwner(span.message, conversation.messages[span.message]["role"], str(span.part))
        else:
            owner = SegmentOwner(-1, "", str(span.part))
        numbers.append(indices.setdefault(owner, len(indices)))
    return tuple(indices), np.asarray(numbers, np.int64)


def _find_dropped_texts(
    conversation: Conversation, texts: Sequence[Rendered] | Sequence[Example]
) -> Iterator[DroppedText]:
    """Yield the texts of messages that occur in none of the examples of the row.

    If an example contains some lines of a text, only the missing lines are yielded.
    """
    flags = frozenset[str]().union(*(rendered.flags for rendered in texts))
    printed = [""] * len(conversation.messages)
    for rendered in texts:
        for span in rendered.spans:
            if span.part.is_data and 0 <= span.message < len(printed):
                printed[span.message] += rendered.text[span.start : span.end]
    for number, message in enumerate(conversation.messages):
        for name, loss_flags in _LOSS_FLAGS.items():
            for content in map(str.strip, content_texts(message.get(name)) if flags & loss_flags else ()):
                if content not in printed[number]:
                    yield DroppedText(f"messages[{number}].{name}", _missing_lines(content, printed[number]))
    if conversation.tools and "tools_dropped" in flags:
        yield DroppedText("tools", json.dumps(conversation.tools, ensure_ascii=False))


def content_texts(content: object) -> Iterator[str]:
    """Yield the texts in the content of a message. The content is a string or a list of parts."""
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            yield part["text"]


def _missing_lines(text: str, printed: str) -> str:
    """Return the lines of a text that do not occur in the printed text.

    If every line occurs, return the whole text.
    """
    lines = [line for line in text.splitlines() if line.strip() and line.strip() not in printed]
    return "\n".join(lines) or text


def make_visible(text: str) -> str:
    """Add visible marks to line breaks and tabs, and escape unprintable characters.

    Characters that look like marks are escaped too.
    """
    escaped = _MARKS.sub(lambda match: f"\\u{ord(match.group()):04x}", escape_unprintable(text))
    return escaped.replace("\t", "⇥\t").replace("\n", "↵\n")


def to_single_line(text: object) -> str:
    """Convert a text to a single line by replacing line breaks and tabs with visible marks."""
    return make_visible(str(text)).replace("↵\n", "↵").replace("⇥\t", "⇥")
