"""Data classes that the processing stages exchange, such as rows, conversations and examples.

    Row ──normalize──> Conversation ──render──> Rendered ──tokenize, mask, truncate──> Example ──pack──> build

The classes contain only data, and properties that derive from the data. No stage modifies its input. Arrays are numpy
arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NotRequired, Required, TypedDict, overload

from ftdata.errors import escape_line_breaks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IGNORE_INDEX = -100
"""The label of a token that carries no loss (PyTorch's `cross_entropy(ignore_index=-100)`)."""


class Function(TypedDict):
    """The name and arguments of a tool call: an object in Hugging Face data, and a JSON string in OpenAI data."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(TypedDict):
    """One tool call of an assistant message."""

    id: NotRequired[str]
    type: NotRequired[str]
    function: Function


class Message(TypedDict, total=False):
    """One message of a conversation, with the keys of OpenAI's chat format.

    Attributes:
        role: `"system"`, `"user"`, `"assistant"`, `"tool"`, or another role that the template supports.
        content: a text, or a list of parts, each with a `type`; may be `None` if the message has tool calls.
        reasoning_content: the reasoning before the answer.
        tool_calls: the tool calls of an assistant message.
        tool_call_id: the id of the call that a tool message answers.
        name: the name of the tool or of the speaker.
        train: whether the message is trained; removed before the template renders the message.
    """

    role: Required[str]
    content: str | list[dict[str, Any]] | None
    reasoning_content: str
    tool_calls: list[ToolCall]
    tool_call_id: str
    name: str
    train: bool


class Source(NamedTuple):
    """The place that a row was read from: a file or URL, with the row number and the line.

    Attributes:
        path: the file or URL; `<memory>` or a similar name for rows in memory.
        row: the index of the row, counted from 0.
        line: the physical line on which the row begins, counted from 1; `None` if the format has no lines.
        offset: the byte offset of the row (in JSON Lines, of its line) in the decompressed text, encoded as UTF-8.

    >>> str(Source("data.jsonl", 6, 7)), str(Source("data.parquet", 6)), str(Source("data.json", 6, 1, 99))
    ('data.jsonl:7', 'data.parquet[6]', 'data.json:1[6]')
    """

    path: str
    row: int
    line: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.path}[{self.row}]"
        # If there are more rows than lines before this row, several rows share a line. The rows of all sheets of an
        # Excel file are counted together, but their lines are not, and they have no offset.
        shares_line = self.offset is not None and self.row >= self.line
        return f"{self.path}:{self.line}[{self.row}]" if shares_line else f"{self.path}:{self.line}"


UNKNOWN_SOURCE = Source("<memory>", 0)
"""The source of rows that no reader produced."""


class SourceShare(NamedTuple):
    """How much of the data from one source is used for training.

    The `unit` of `amount` is `"times"` (repetitions of every row), `"rows"` or `"tokens"`.
    """

    amount: float = 1.0
    unit: str = "times"


WHOLE = SourceShare()
"""Every row exactly once."""


class Row(NamedTuple):
    """One row exactly as it was read.

    Attributes:
        data: an object (a dict), or a bare list of messages.
        source: the origin of the row.
        flat: whether every cell is a string, as in CSV.
        notes: notes of the reader for the report, such as `"quotes"` (quotation marks are part of the text).
    """

    data: Any
    source: Source
    flat: bool = False
    notes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RowTokens:
    """The token ids and the training mask of a pretokenized row.

    Attributes:
        input_ids, trained: int32 `[n]` and bool `[n]`.
        turns: the start and the end of each turn that a server generated; empty for other rows.
        origin: the messages whose last answers are these turns; `None` if the row has none.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    turns: tuple[tuple[int, int], ...] = ()
    origin: Conversation | None = None


class ImageReference(NamedTuple):
    """An image of a row.

    Attributes:
        path: path of the file with its bytes, in a build relative to its folder; empty if the row contains the bytes.
        start, size: index of its first byte in the file, and number of its bytes.
        hash: SHA-256 of its bytes, 64 hexadecimal digits.
        width, height: its size in pixels, after the rotation that its EXIF data specifies.
        content: its bytes if the row contains them, until they are written to a file.
    """

    path: str
    start: int
    size: int
    hash: str
    width: int
    height: int
    content: bytes | None = None


IMAGE_PART: Final[dict[str, Any]] = {"type": "image"}
"""The part of a message that represents an image. The reader of messages accepts only this object, so that each image
part belongs to an image of the row."""


class RowImage(NamedTuple):
    """An image of a row, as the row contains it.

    Attributes:
        field: the path of the image in the row.
        value: a path, a URL, bytes, or an object that contains one of them.
    """

    field: str
    value: Any


@dataclass  # Not frozen: assigning the fields of a frozen dataclass takes as long as reading a row.
class Conversation:
    """One normalized row. It contains messages, tools and template variables, or only a text, or only tokens.

    Attributes:
        messages: the messages for the chat template; empty for formatted `text`.
        fields: the columns of the row under their canonical names, for prompt templates.
        tools: JSON schemas of the tools, unchanged.
        text: already formatted text, which is trained without changes; otherwise `None`.
        completion_from: index of the first message of the completion.
        tokens: the tokens of a pretokenized row; otherwise `None`.
        kwargs: the template variables of the row (`enable_thinking`, ...).
        notes: notes for the report on how the row was read, such as ignored columns and mapped roles.
        schema: name of the schema that the row matches.
        source: the origin of the row.
        sides: the conversations of a preference pair, in the order of `SIDES`; empty for other rows.
        feedback: numbers that rate the answer, by their name in `FEEDBACK`.
        images: the images, in the order of the parts `{"type": "image"}` of the messages.
    """

    messages: tuple[Message, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    completion_from: int = 0
    tokens: RowTokens | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: frozenset[str] = frozenset()
    schema: str = "messages"
    source: Source = UNKNOWN_SOURCE
    sides: tuple[Conversation, ...] = ()
    feedback: Mapping[str, float] = field(default_factory=dict)
    images: tuple[RowImage, ...] = ()

    @property
    def parts(self) -> tuple[Conversation, ...]:
        """The sides of a preference pair, or the conversation itself."""
        return self.sides or (self,)

    def part(self, number: int) -> Conversation:
        """Return the conversation of a text: the side with this number, or the conversation itself."""
        return self.sides[number] if self.sides else self


SIDES = ("chosen", "rejected")
"""The sides of a preference pair, and the names of their columns."""

FEEDBACK = ("score", "margin", "label")
"""Numbers that rate an answer: the score of a side of a pair; the margin of a pair, by which the reward of the chosen
side must be higher; and the label of an answer for KTO, 1 if it is desirable and 0 if not."""


class Part(StrEnum):
    """The kind of text that a span contains."""

    SCAFFOLD = "scaffold"
    """Template text."""
    CONTENT = "content"
    """The content of a message."""
    REASONING = "reasoning"
    """The reasoning before an answer."""
    TOOL_CALL = "tool_call"
    """The name and arguments of a tool call."""
    TOOLS = "tools"
    """The tool definitions in the prompt."""
    OTHER = "other"
    """Any other field of a message, such as a name or an id."""
    MEDIA = "media"
    """The image tokens of an image, and the markers around them."""

    @property
    def is_data(self) -> bool:
        """Whether the text comes from the row, not from the template or from the image processor."""
        return self not in (Part.SCAFFOLD, Part.MEDIA)


class Span(NamedTuple):
    """A half-open range `[start, end)` of characters in the rendered text.

    Attributes:
        start: first character.
        end: character after the last.
        part: kind of the span.
        message: index of the message that the span belongs to; -1 for none.
        generated: whether the model must produce the span: from the end of the generation prompt to the stop token,
            inclusive.
    """

    start: int
    end: int
    part: Part
    message: int
    generated: bool


@dataclass(frozen=True)
class SpanKinds:
    """The kind of each span (range of characters) of a text. Texts with the same sequence of kinds share one object.

    Attributes:
        parts: the kind of each span.
        messages: the message index of each span.
        generated: whether the model must produce each span.
        has_constant_template_text: true if the template text is known not to depend on the contents of the row.
    """

    parts: tuple[Part, ...]
    messages: tuple[int, ...]
    generated: tuple[bool, ...]
    has_constant_template_text: bool = False

    @cached_property
    def is_data(self) -> NDArray[np.bool_]:
        """A mask that is true for spans of data and false for template text (bool `[spans]`)."""
        import numpy as np

        return np.fromiter((part.is_data for part in self.parts), np.bool_)

    @cached_property
    def is_media(self) -> NDArray[np.bool_]:
        """A mask that is true for the tokens of images (bool `[spans]`)."""
        import numpy as np

        return np.fromiter((part is Part.MEDIA for part in self.parts), np.bool_)

    @cached_property
    def turns(self) -> tuple[int, ...]:
        """The indices of the messages that contain text that the model must generate."""
        pairs = zip(self.messages, self.generated, strict=True)
        return tuple(dict.fromkeys(message for message, is_generated in pairs if is_generated))


class Spans(Sequence[Span]):
    """The spans (ranges of characters) of a text. Only the size and the kind of each span are stored.

    The spans tile the text. The object compares equal to a tuple of the same spans.

    >>> spans = Spans.from_spans((Span(0, 4, Part.CONTENT, 0, False), Span(4, 9, Part.CONTENT, 1, True)))
    >>> spans.sizes, spans.kinds.generated, spans[1].start, spans == tuple(spans)
    ([4, 5], (False, True), 4, True)
    """

    __slots__ = ("kinds", "sizes")

    def __init__(self, sizes: list[int], kinds: SpanKinds) -> None:
        self.sizes, self.kinds = sizes, kinds

    @classmethod
    def from_spans(cls, spans: Sequence[Span]) -> Spans:
        """Create a `Spans` object from a sequence of spans.

        Raises:
            ValueError: the spans do not tile a text.
        """
        if isinstance(spans, cls):
            return spans
        starts, ends, *kinds = zip(*spans, strict=True) if spans else ((),) * 5
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        if spans and [*accumulate(sizes, initial=0)] != [*starts, ends[-1]]:
            raise ValueError("the spans leave gaps or overlap, expected spans that cover the text exactly once")
        return cls(sizes, SpanKinds(*kinds))

    def __iter__(self) -> Iterator[Span]:
        kinds, edges = self.kinds, [*accumulate(self.sizes, initial=0)]
        columns = (kinds.parts, kinds.messages, kinds.generated)
        return map(Span._make, zip(edges[:-1], edges[1:], *columns, strict=True))

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, key: int) -> Span: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[Span, ...]: ...

    def __getitem__(self, key: int | slice) -> Span | tuple[Span, ...]:
        return tuple(self)[key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spans | tuple) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class Rendered(NamedTuple):
    """A rendered text, and the spans that cover the text without gaps or overlaps.

    Attributes:
        text: the text to tokenize.
        spans: the spans that tile the text.
        flags: properties for the report.
        messages: number of messages of the conversation, from the first, in the text; 0 for plain text and prompt
            templates.
        add_bos: whether to prepend the BOS token of the tokenizer, unless the tokens already begin with it; for prompt
            templates and plain text.
        keep_control: whether control tokens in the text are intended, regardless of the `control_tokens` option; for
            text that was formatted before it was read.
        images: the images of the text, in the order of its spans with the part `Part.MEDIA`.
        repeats: how often each token of an image, which the text contains once, is repeated.
        ids: the token ids that the template rendered; empty for a template that renders text.
    """

    text: str
    spans: Sequence[Span]
    flags: frozenset[str] = frozenset()
    messages: int = 0
    add_bos: bool = False
    keep_control: bool = False
    images: tuple[ImageReference, ...] = ()
    repeats: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()


class RenderedRow(NamedTuple):
    """One row after rendering: its conversation, its rendered texts, and for each text the trained spans.

    Attributes:
        conversation: the normalized row.
        texts: the rendered texts of the row; one empty text for a pretokenized row.
        trained_spans: for each text, which spans are trained; `None` if the mask policy was not applied yet.
        ends_with_answers: whether the row, or each side of a preference pair, is one text that, if it consists of
            messages, ends with an answer.
    """

    conversation: Conversation
    texts: tuple[Rendered, ...]
    trained_spans: tuple[Sequence[bool], ...] | None
    ends_with_answers: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized training example of `n` tokens.

    Attributes:
        input_ids: int32 `[n]`.
        trained: bool `[n]`, true where the token carries loss.
        offsets: int32 `[n, 2]`, the range of characters of `text` that each token covers (empty for an added BOS).
        text: the rendered text. It contains the token for a feature of an image once, although the token is repeated.
        spans: the spans that tile `text`.
        flags: properties for the report (`no_trained_stop`, `control_tokens`, ...).
        source: the origin of the row.
        cut: number of tokens that truncation removed from the end.
        images: the images of the example, in the order of its spans with the part `Part.MEDIA`.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int32]
    text: str
    spans: Sequence[Span]
    flags: frozenset[str]
    source: Source
    cut: int = 0
    images: tuple[ImageReference, ...] = ()

    @property
    def labels(self) -> NDArray[np.int32]:
        """The label of each token: the token id if the token is trained, otherwise -100 (int32 `[n]`)."""
        import numpy as np

        return np.where(self.trained, self.input_ids, np.int32(IGNORE_INDEX))

    def __len__(self) -> int:
        return len(self.input_ids)

    def _repr_html_(self) -> str:
        """Return the text for a notebook. Trained tokens are green, and a title shows the id of each token."""
        style = "background:#2da44e33;text-decoration:underline #2da44e"
        parts, position = list[str](), 0
        tokens = zip(self.offsets.tolist(), self.input_ids.tolist(), self.trained.tolist(), strict=True)
        for (start, end), id_, trained in tokens:
            # Several tokens can share a character, which is shown once.
            first = max(start, position)
            mark = f' style="{style}"' if trained else ""
            text = escape(self.text[first:end]).replace("\n", "↵\n")
            parts.append(f'{escape(self.text[position:first])}<span title="{id_}"{mark}>{text}</span>')
            position = max(end, position)
        share = f"{int(self.trained.sum()):,} of {len(self):,} tokens trained"
        flags = f" · flags: {', '.join(sorted(self.flags))}" if self.flags else ""
        return f'<pre style="white-space:pre-wrap">{"".join(parts)}</pre><p>{share}{escape(flags)}</p>'


@dataclass(frozen=True, slots=True)
class Reject:
    """A rejected row, with the reason for the rejection and a suggested fix.

    Attributes:
        source: the origin of the row.
        code: the error code, which is stable across versions.
        field: path of the invalid value in the row, such as `messages[0].content`; may be empty.
        reason: the error message.
        fix: how to fix the row; may be empty.
        raw: the first 4 kB of the row.
        lengths: number of tokens of each example of the row; empty if the row was rejected before it was tokenized.
    """

    source: Source
    code: str
    field: str
    reason: str
    fix: str = ""
    raw: str = ""
    lengths: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """The total number of tokens in all examples of the row."""
        return sum(self.lengths)

    def __str__(self) -> str:
        location = escape_line_breaks(f"{self.source} {self.field}".rstrip())
        fix = f". Fix: {self.fix}" if self.fix else ""
        return f"[{self.code}] {location}: {self.reason}{fix}"
