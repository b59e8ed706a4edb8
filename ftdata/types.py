"""The values that flow through the stages. No logic beyond what derives from their own fields.

    Row ──normalise──> Conversation ──render──> Shown ──tokenise, mask, truncate──> Example ──pack──> build

No stage changes what another was given; arrays are numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, Required, TypedDict, overload

from ftdata.errors import escape_line_breaks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IGNORE_INDEX = -100
"""The label of a token that carries no loss (PyTorch's `cross_entropy(ignore_index=-100)`)."""


class Function(TypedDict):
    """The function of a tool call; `arguments` is an object in HF data and a JSON string in OpenAI's."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(TypedDict):
    """One tool call of an assistant message."""

    id: NotRequired[str]
    type: NotRequired[str]
    function: Function


class Message(TypedDict, total=False):
    """One message as chat templates see it, in the keys of OpenAI's chat format as Hugging Face templates read it.

    Attributes:
        role: `"system"`, `"user"`, `"assistant"`, `"tool"`, or another that the template names.
        content: a text, or a list of parts, each with a `type`; `None` beside calls.
        reasoning_content: what was thought before the answer.
        tool_calls: calls of an assistant.
        tool_call_id: which call a tool's message answers.
        name: of the tool, or of who speaks.
        train: whether it is trained; never reaches a template.
    """

    role: Required[str]
    content: str | list[dict[str, Any]] | None
    reasoning_content: str
    tool_calls: list[ToolCall]
    tool_call_id: str
    name: str
    train: bool


class Source(NamedTuple):
    """Where a row came from.

    Attributes:
        path: the file, or URL; `<memory>` and the like for rows in memory.
        row: counted from 0.
        line: the physical line where it begins, counted from 1; `None` where there are no lines.
        offset: the byte where it begins (in JSON Lines: where its line does), in the text once unpacked and in UTF-8.

    >>> str(Source("data.jsonl", 6, 7)), str(Source("data.parquet", 6))
    ('data.jsonl:7', 'data.parquet[6]')
    """

    path: str
    row: int
    line: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line is not None else f"{self.path}[{self.row}]"


UNKNOWN_SOURCE = Source("<memory>", 0)
"""Where rows that nobody read come from."""


class SourceShare(NamedTuple):
    """How much of a source is trained on: an `amount` of `"times"` (each row so often), `"rows"` or `"tokens"`."""

    amount: float = 1.0
    unit: str = "times"


WHOLE = SourceShare()
"""Each row once."""


class Row(NamedTuple):
    """One row exactly as written.

    Attributes:
        data: an object (a dict), or a bare list of messages.
        source: where it stands.
        flat: whether every cell is a text, as in CSV.
        notes: notes of the reader for the report, such as `"quotes"` (quotes of this file are text).
    """

    data: Any
    source: Source
    flat: bool = False
    notes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RowTokens:
    """Tokens that were made elsewhere.

    Attributes:
        input_ids: int32 `[n]`.
        trained: bool `[n]`.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


@dataclass  # To freeze it takes as long as to read a row.
class Conversation:
    """One normalised row.

    Attributes:
        messages: what a chat template sees; empty for already formatted `text`.
        fields: the row's own columns under their canonical names, what a prompt template sees.
        tools: JSON schemas of the tools, as given.
        text: already formatted text, trained as it stands; `None` for everything else.
        completion_from: index of the first message of the completion.
        tokens: the row's own tokens, passed through; `None` for everything else.
        kwargs: the row's own variables for the template (`enable_thinking`, ...).
        notes: what a careful reader should know of how it was read: columns that were not, roles under other names.
        schema: name of the schema that recognised the row.
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


class Part(StrEnum):
    """Why a stretch of text is there."""

    SCAFFOLD = "scaffold"
    """The template's own text."""
    CONTENT = "content"
    """What a message says."""
    REASONING = "reasoning"
    """What was thought before an answer."""
    TOOL_CALL = "tool_call"
    """Name and arguments of a call."""
    TOOLS = "tools"
    """Schemas of tools, printed into the prompt."""
    OTHER = "other"
    """Any other field of a message: a name, an id."""


class Span(NamedTuple):
    """A half-open stretch `[start, end)` of the rendered text.

    Attributes:
        start: in characters.
        end: in characters.
        part: why it is there.
        message: index of the message that it belongs to; -1: none.
        generated: whether the model itself must produce it: from the end of the generation prompt up to and including
            the stop.
    """

    start: int
    end: int
    part: Part
    message: int
    generated: bool


@dataclass(frozen=True)
class SpanKinds:
    """What spans are, but for where they stand; texts that a template makes alike have them in common.

    `followed` is true where it is known that the template's own text would be the same had the row said something else.
    """

    parts: tuple[Part, ...]
    messages: tuple[int, ...]
    generated: tuple[bool, ...]
    followed: bool = False

    @cached_property
    def is_data(self) -> NDArray[np.bool_]:
        """Which of them are not the template's own text (bool `[spans]`)."""
        import numpy as np

        return np.fromiter((part is not Part.SCAFFOLD for part in self.parts), np.bool_)

    @cached_property
    def turns(self) -> tuple[int, ...]:
        """The messages that are generated."""
        return tuple(dict.fromkeys(one for one, yes in zip(self.messages, self.generated, strict=True) if yes))


class Spans(Sequence[Span]):
    """Spans that tile a text, by columns: how many characters each has, and what it is. Equal to a tuple of the same.

    >>> spans = Spans.of((Span(0, 4, Part.CONTENT, 0, False), Span(4, 9, Part.CONTENT, 1, True)))
    >>> spans.sizes, spans.kinds.generated, spans[1].start, spans == tuple(spans)
    ([4, 5], (False, True), 4, True)
    """

    __slots__ = ("kinds", "sizes")

    def __init__(self, sizes: list[int], kinds: SpanKinds) -> None:
        self.sizes, self.kinds = sizes, kinds

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Spans:
        """Return the spans by columns.

        Raises:
            ValueError: they do not tile a text.
        """
        if isinstance(spans, cls):
            return spans
        starts, ends, *kinds = zip(*spans, strict=True) if spans else ((),) * 5
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        if spans and [*accumulate(sizes, initial=0)] != [*starts, ends[-1]]:
            raise ValueError("spans leave gaps, or overlap")
        return cls(sizes, SpanKinds(*kinds))

    def __iter__(self) -> Iterator[Span]:
        kinds, places = self.kinds, [*accumulate(self.sizes, initial=0)]
        rest = (kinds.parts, kinds.messages, kinds.generated)
        return map(Span._make, zip(places[:-1], places[1:], *rest, strict=True))

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
    """The text that is tokenised, and the spans that tile it: no gap, no overlap.

    Attributes:
        text: what is tokenised.
        spans: tile it.
        flags: what a careful reader should know of it.
        messages: how many of the conversation's first messages it shows; 0 for plain text and prompt templates.
        add_bos: whether the tokenizer's own BOS is put in front, unless the tokens begin with it: for prompt templates
            and plain text.
        keep_control: whether control-token text is meant as such, whatever the option says: in text that was formatted
            before it came to us.
    """

    text: str
    spans: Sequence[Span]
    flags: frozenset[str] = frozenset()
    messages: int = 0
    add_bos: bool = False
    keep_control: bool = False


class RenderedRow(NamedTuple):
    """One row that was rendered.

    Attributes:
        conversation: what it says.
        texts: what is made of it.
        trained_spans: for each text, which spans are trained; `None`: not asked yet.
        is_single_text: whether the row has one text, whose last message, if it has messages, is an answer.
    """

    conversation: Conversation
    texts: tuple[Rendered, ...]
    trained_spans: tuple[Sequence[bool], ...] | None
    is_single_text: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised training example of `n` tokens.

    Attributes:
        input_ids: int32 `[n]`.
        trained: bool `[n]`, true where the token carries loss.
        offsets: int32 `[n, 2]`, the characters of `text` behind each token (empty for an added BOS).
        text: the rendered text.
        spans: tile `text`.
        flags: what a careful reader should know (`no_trained_stop`, `control_tokens`, ...).
        cut: tokens that truncation took from the end.
        source: where the row came from.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int32]
    text: str
    spans: Sequence[Span]
    flags: frozenset[str]
    source: Source
    cut: int = 0

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32 `[n]`: `input_ids` where trained, else -100."""
        import numpy as np

        return np.where(self.trained, self.input_ids, np.int32(IGNORE_INDEX))

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that was not built.

    Attributes:
        source: where it stands.
        code: why, as a name that stays.
        field: path of the value inside the row, such as `messages[0].content`; may be empty.
        reason: why, in words.
        fix: what to do; may be empty.
        raw: its first 4 kB.
        lengths: tokens of each of its examples, where it came so far as to have some.
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
        """The tokens of all of its examples."""
        return sum(self.lengths)

    def __str__(self) -> str:
        place = escape_line_breaks(f"{self.source} {self.field}".rstrip())
        way_out = f". Fix: {self.fix}" if self.fix else ""
        return f"[{self.code}] {place}: {self.reason}{way_out}"
