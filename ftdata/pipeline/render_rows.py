"""Rows to texts: read, normalised, rendered, checked, and marked with what is to be trained.

    Row ──normalise──> Conversation ──render──> Rendered ──choose──> Shown
     └─────────── or, at any stage, Reject: where, why, and the way out

Rows come together in batches, in the order of what went in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, TypeVar

from ftdata.errors import BadRow, InputRefused, TemplateRefused
from ftdata.pipeline.fast_path import make_fast_path
from ftdata.pipeline.mask import Policy, is_custom
from ftdata.pipeline.recipe import Recipe
from ftdata.schemas import normalize
from ftdata.schemas.messages import has_answer, has_visible_text
from ftdata.templates import append_missing_stop, cross_check_in_worker, render_in_worker, submit_render
from ftdata.templates.attribution.spans import find_thinking_tags
from ftdata.types import Conversation, Reject, Rendered, RenderedRow, Row, Spans

BATCH, LETTERS = 1024, 1 << 20
"""Rows that are tokenised together, or fewer, where their texts are as long."""

LONGEST = 8 << 20
"""Characters of a row that are tokenised: each takes some hundred bytes meanwhile, and no model reads as many."""

FEW, TOGETHER = 64, 1 << 20
"""Rows, or characters, that go through a stage together: one stage over many rows is a third faster than to change
stages with every row (caches of the processor)."""

PROVED, PROVED_EVERY, PROVED_MESSAGES = 32, 100, 4
"""Rows of each source that are confirmed by a second way: the first, every so many-th; by how many messages of each."""


LIMITS_APART = 100
"""A template is refused when two short rows exceed its limits and fewer rows than this lie between them."""

MAX_REJECTED = 100_000
"""A source is refused when this many consecutive rows have no known schema, or are short and rejected: it is not data
for training, and to reject each of a billion such rows would take hours."""
_SHORT = 100
"""Characters of a short row."""

MAX_RAW = 4096
"""Characters of a rejected row that are kept."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str, skipkeys=True)

_T = TypeVar("_T")


def render_rows(
    recipe: Recipe, rows: Iterable[Row | Reject]
) -> Iterator[list[tuple[Row | Reject, RenderedRow | Reject]]]:
    """Yield rows, and what they were rendered to, as many together as shall be in memory."""
    batch, letters = list[tuple[Row | Reject, RenderedRow | Reject]](), 0
    for row, entry in chain.from_iterable(_in_turns(recipe, iter(rows))):
        own = 0 if isinstance(entry, Reject) else sum([len(one.text) for one in entry.texts])
        batch.append((row, entry if own <= LONGEST else _too_long(row, own)))
        letters += own
        if len(batch) == BATCH or letters >= LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _too_long(row: Row | Reject, letters: int) -> Reject:
    told = f"has {letters:,} characters of text, at most {LONGEST:,} are tokenised"
    return make_reject(row, BadRow("row_too_long", told, hint="make several rows of it"))


def _in_turns(
    recipe: Recipe, rows: Iterator[Row | Reject]
) -> Iterator[list[tuple[Row | Reject, RenderedRow | Reject]]]:
    """Yield a few rows at a time, and what they were rendered to; while they are, the next few are read."""
    # A user's own policy is asked later: what it raises must not reject the row, and it sees no refused texts.
    policy, at_once = recipe.policy if is_custom(recipe.train_on) else None, make_fast_path(recipe)
    few, ahead, watch = 1, list[_Few](), _Watch(recipe)
    while some := _next(rows, few):
        known = [None if isinstance(row, Reject) or _is_proved(row) else at_once(row) for row in some]
        said = [_tried(_said, recipe, row) if one is None else one for row, one in zip(some, known, strict=True)]
        ahead.append([(row, one, _begun(recipe, one)) for row, one in zip(some, said, strict=True)])
        # Of long rows no more are in memory than must be.
        alone = few < FEW or len(some) < few
        while len(ahead) > (not alone):
            done = _finished(recipe, ahead.pop(0), policy, watch)
            long = sum([len(one.text) for _, entry in done if isinstance(entry, RenderedRow) for one in entry.texts])
            few = min(FEW, 1 + TOGETHER * len(done) // (long + 1))
            yield done
    yield from (_finished(recipe, one, policy, watch) for one in ahead)


_Few = list[tuple[Row | Reject, Conversation | RenderedRow | Reject, Callable[[], tuple[Rendered, ...]] | None]]
"""A few rows, how each was read, and what waits for its texts."""


@dataclass
class RejectedRows:
    """Counts consecutive rejected rows that are short or have no known schema."""

    rows: int = 0

    def check(self, entry: object) -> None:
        """Count a row, given as the reject or as anything else.

        Raises:
            InputRefused: the last `MAX_REJECTED` rows are such rows; its code is that of the last of them.
        """
        if not isinstance(entry, Reject) or (entry.code != "unknown_schema" and len(entry.raw) > _SHORT):
            self.rows = 0
            return
        self.rows += 1
        if self.rows == MAX_REJECTED:
            raise InputRefused(
                entry.code,
                f"this row and the {MAX_REJECTED - 1:,} rows before it are rejected; this row: {entry.reason}",
                where=str(entry.source),
                hint=entry.fix,
            )


@dataclass
class _Watch:
    """Stops a source whose rows fail for a reason that they share, instead of rejecting millions of them.

    Which rows were read before, by which process, does not matter.
    """

    recipe: Recipe
    previous: int | None = None
    rows: int = 0
    rejected: RejectedRows = field(default_factory=RejectedRows)

    def check(self, entry: RenderedRow | Reject | Conversation) -> None:
        """Count a row.

        Raises:
            TemplateRefused: `template_limits`: two short rows, close to each other, exceed the limits of the template.
                Long rows may honestly exceed them.
            InputRefused: as `RejectedRows.check`.
        """
        self.rows += 1
        self.rejected.check(entry)
        if not isinstance(entry, Reject) or entry.code != "template_limits" or len(entry.raw) >= MAX_RAW:
            return
        if self.previous is not None and self.rows - self.previous < LIMITS_APART:
            raise TemplateRefused(
                "template_limits",
                f"template {self.recipe.template.name!r} exceeds its limits on several short rows: {entry.reason}",
                where=str(entry.source),
                hint="use another template: this one loops, or is an attack",
            )
        self.previous = self.rows


def _finished(
    recipe: Recipe, some: _Few, policy: Policy | None, watch: _Watch
) -> list[tuple[Row | Reject, RenderedRow | Reject]]:
    done = list[tuple[Row | Reject, RenderedRow | Reject]]()
    for row, one, texts in some:
        entry = _tried(_shown, recipe, row, one, policy, texts) if isinstance(one, Conversation) else one
        watch.check(entry)
        done.append((row, entry))
    return done


def _next(rows: Iterator[Row | Reject], few: int) -> list[Row | Reject]:
    """Return the next few rows, fewer where they turn out to be long, as far as their places in a file tell."""
    some = list[Row | Reject]()
    for row in islice(rows, few):
        some.append(row)
        if (row.source.offset or 0) - (some[0].source.offset or 0) >= TOGETHER:
            break
    return some


def _tried(step: Callable[..., _T], recipe: Recipe, row: Row | Reject, *given: Any) -> _T | Reject:
    """Return what a step makes of a row, or why the row is rejected."""
    if isinstance(row, Reject):
        return row
    try:
        return step(recipe, row, *given)
    except BadRow as error:
        return make_reject(row, error)
    except RecursionError:
        return make_reject(row, BadRow("too_deep", "is nested too deep to be read"))


def _said(recipe: Recipe, row: Row) -> Conversation:
    conversation = normalize(row, recipe.schema, recipe.columns)
    check_answers(conversation)
    return conversation


def _is_proved(row: Row) -> bool:
    return row.source.row < PROVED or row.source.row % PROVED_EVERY == 0


def _begun(recipe: Recipe, said: Conversation | RenderedRow | Reject) -> Callable[[], tuple[Rendered, ...]] | None:
    """Begin to render a conversation, if that is all that its rendering depends on."""
    if not isinstance(said, Conversation) or said.tokens is not None or said.kwargs:
        return None
    return submit_render(said, recipe.template, recipe.turns, recipe.on_dropped_message)


def _shown(
    recipe: Recipe,
    row: Row,
    conversation: Conversation,
    policy: Policy | None,
    texts: Callable[[], tuple[Rendered, ...]] | None,
) -> RenderedRow:
    return apply_policy(conversation, render_conversation(recipe, conversation, texts, proved=_is_proved(row)), policy)


def apply_policy(conversation: Conversation, texts: tuple[Rendered, ...], policy: Policy | None) -> RenderedRow:
    """Choose what is to be trained, if there is a policy to ask now."""
    messages = conversation.messages
    plain = len(texts) == 1 and (not messages or messages[-1]["role"] == "assistant")
    asked = None if policy is None else tuple([policy(one, conversation) for one in texts])
    return RenderedRow(conversation, texts, asked, plain)


def render_conversation(
    recipe: Recipe,
    conversation: Conversation,
    begun: Callable[[], tuple[Rendered, ...]] | None = None,
    *,
    proved: bool = False,
) -> tuple[Rendered, ...]:
    """Render a conversation, and see that no control token is hidden in it; `proved`: by a second way, too.

    Where that was `begun`, it is waited for.

    Raises:
        BadRow: as `render` does, or `control_tokens`.
        TemplateRefused: as `render` does, or `template_not_verified`.
    """
    if conversation.tokens is not None:
        return ()
    recipe = recipe.with_kwargs(conversation.kwargs) if conversation.kwargs else recipe
    texts = (
        begun() if begun else render_in_worker(conversation, recipe.template, recipe.turns, recipe.on_dropped_message)
    )
    _check_hidden(recipe, conversation, texts)
    if proved:
        _prove(recipe, conversation, texts)
    texts = add_row_flags(conversation, texts)
    return (
        tuple(append_missing_stop(one, recipe.template) for one in texts)
        if recipe.on_missing_stop == "append_eos"
        else texts
    )


def add_row_flags(conversation: Conversation, texts: tuple[Rendered, ...]) -> tuple[Rendered, ...]:
    """Return the texts with flags for what was left out of the row when it was read."""
    beside = any(note.startswith("column rejected") for note in conversation.notes)
    if conversation.schema != "preference" and not beside:
        return texts
    return tuple(one._replace(flags=one.flags | {"rejected_side_dropped"}) for one in texts)


def _prove(recipe: Recipe, conversation: Conversation, texts: Sequence[Rendered]) -> None:
    """Confirm a row by the second way. That it fails says nothing good about the others, so all are refused."""
    for one in texts:
        if against := cross_check_in_worker(conversation, recipe.template, one, PROVED_MESSAGES):
            raise TemplateRefused(
                "template_not_verified",
                f"two ways of finding what template {recipe.template.name!r} has the model produce disagree: {against}",
                where=str(conversation.source),
                hint="mark what is trained with {% generation %} in a template file of your own",
            )


def _check_hidden(recipe: Recipe, conversation: Conversation, texts: Sequence[Rendered]) -> None:
    """Refuse a row whose own text spells control tokens that would pass for the template's.

    Where a template prints a text in a way that we cannot follow, it counts as the template's. So the row is rendered
    once more with the control tokens in it blotted out: the template must still write as many of them.
    """
    if all(map(_is_followed, texts)):
        return
    pattern = recipe.control.pattern
    if recipe.control_tokens == "allow" or pattern is None or not conversation.messages:
        return
    if not recipe.control.spelled("\n".join(_strings(conversation))):
        return

    def blot(value: Any, keep: Sequence[tuple[int, int]] = ()) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: found.group() if found.span() in keep else "x" * len(found.group()), value)
        if isinstance(value, Mapping):
            # The tags of thinking that is written into an answer are no typed ones, and templates look for them.
            own = value.get("content") if value.get("role") == "assistant" else None
            tags = find_thinking_tags(own, "think") if isinstance(own, str) else ()
            kept = {"role": value.get("role"), "content": blot(own, tags)} if tags else {"role": value.get("role")}
            return {blot(key): kept[key] if key in kept else blot(item) for key, item in value.items()}
        return [blot(item) for item in value] if isinstance(value, list | tuple) else value

    tame = replace(conversation, messages=tuple(blot(conversation.messages)), tools=tuple(blot(conversation.tools)))
    own = sum(len(recipe.control.matches(one)[0]) for one in texts if not one.keep_control)
    try:
        expected = render_in_worker(tame, recipe.template, recipe.turns, recipe.on_dropped_message)
    except BadRow:
        expected = ()
    if own != sum(len(recipe.control.matches(one)[0]) for one in expected if not one.keep_control):
        raise BadRow(
            "control_tokens",
            "spells a control token, which the template prints as if it were its own",
            hint="take it out of the data, or set control_tokens='allow'",
        )


def _is_followed(rendered: Rendered) -> bool:
    return isinstance(rendered.spans, Spans) and rendered.spans.kinds.followed


def _strings(conversation: Conversation) -> list[str]:
    """Return all strings in a conversation, and all keys that are not of every message."""
    found = list(_strings_in(conversation.tools))
    for message in conversation.messages:
        content = message.get("content")
        if len(message) == 2 and type(content) is str:
            found += message["role"], content
        else:
            found += (one for one in _strings_in(message) if one not in ("role", "content"))
    return found


def _strings_in(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, and all keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        yield from _strings_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings_in(inner)


def check_answers(conversation: Conversation) -> None:
    """Refuse a row that has no answer to learn, or an empty one.

    Raises:
        BadRow: `no_answer` or `empty_answer`.
    """
    if conversation.tokens is not None:
        return
    if conversation.text is not None:
        if not has_visible_text(conversation.text):
            raise BadRow("empty_answer", "is empty, or has no visible character", field="text")
        return
    answers = 0
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        answers += 1
        content = message.get("content")
        texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content or ()]
        asked = message.get("train", True) and not message.get("tool_calls")
        if asked and content is not None and not any(map(has_answer, texts)):
            raise BadRow(
                "empty_answer",
                "is empty, or has no visible character outside thinking: the model would learn to answer nothing",
                field=f"messages[{index}].content",
                hint="take the row out, or give the message train: false",
            )
    if not answers:
        raise BadRow("no_answer", "holds no assistant message, so there is nothing to learn")


def make_reject(row: Row | Reject, error: BadRow) -> Reject:
    """Return the reject of a row, with the first 4 kB of it as far as they can be written."""
    if isinstance(row, Reject):
        return row
    try:
        raw = _ENCODER.encode(row.data)[:MAX_RAW]
    except (RecursionError, ValueError):
        raw = ""
    text = raw.encode("utf-8", "backslashreplace").decode()
    return Reject(row.source, error.code, error.field, error.message, error.hint, text)
