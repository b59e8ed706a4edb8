"""Convert rows to rendered texts: normalize, render and check each row, and select the trained spans.

    Row ──normalize──> Conversation ──render──> Rendered ──apply policy──> RenderedRow
     └─────────── or, at any stage, Reject: where, why, and the fix

The results are yielded in batches, in the order of the rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from ftdata.errors import BadRow, InputRefused, TemplateRefused, UsageError, suggest_path
from ftdata.images.expand import expand_images
from ftdata.images.processor import ImageText
from ftdata.images.references import read_image
from ftdata.pipeline.download_images import download, start_downloads
from ftdata.pipeline.mask import Policy, is_built_in_policy
from ftdata.pipeline.read_rows import check_row_answers, drops_rejected_side, read_conversation
from ftdata.pipeline.recipe import Recipe
from ftdata.schemas import expand_rankings
from ftdata.schemas.served_tokens import split_turns
from ftdata.templates import append_missing_stop, cross_check_in_worker, render_in_worker, submit_render
from ftdata.templates.attribution.spans import find_thinking_tags
from ftdata.templates.worker.client import PendingTexts
from ftdata.types import IMAGE_PART, SIDES, Conversation, ImageReference, Reject, Rendered, RenderedRow, Row, Spans

BATCH, MAX_BATCH_CHARACTERS = 1024, 1 << 20
"""Limits of a batch that is tokenized together: rows, and characters."""

MAX_CHARACTERS = 8 << 20
"""Maximum number of characters of a row: tokenizing takes some hundred bytes per character, and no model reads more."""

GROUP, MAX_GROUP_CHARACTERS = 64, 1 << 20
"""Limits of a group of rows that goes through a stage together: rows, and characters. Running one stage over many rows
is a third faster than switching stages with every row, because of the processor's caches."""

CHECKED_FIRST, CHECK_INTERVAL, CHECKED_MESSAGES = 32, 100, 4
"""Cross-checked rows of each source: the first 32 rows, then every 100th row; and the number of messages per row."""


_IMAGE_BYTES_PER_CHARACTER = 64
"""Number of image bytes in rows that count as one character for the limit of a batch."""

LIMITS_APART = 100
"""A template is refused if two short rows exceed its limits with fewer rows than this between them."""

MAX_REJECTED = 100_000
"""A source is refused if this many consecutive rows have no known schema, or are short and rejected: it is not training
data, and rejecting each of a billion such rows would take hours."""
_SHORT = 100
"""Maximum number of characters of a short row."""

MAX_RAW = 4096
"""Number of characters of a rejected row that are stored."""

_PRETOKENIZED = Rendered("", Spans.from_spans(()), frozenset({"pretokenized"}), keep_control=True)
"""Takes the place of the text of a pretokenized row."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str, skipkeys=True)

RowAndOutcome = tuple[Row | Reject, RenderedRow | Reject]
"""A row and its rendered row, or its reject."""


def render_rows(recipe: Recipe, rows: Iterable[Row | Reject]) -> Iterator[list[RowAndOutcome]]:
    """Render rows, and yield batches that fit in memory. Each item is a row with its `RenderedRow` or `Reject`."""
    batch, characters = list[RowAndOutcome](), 0
    if recipe.task == "preference":
        rows = expand_rankings(rows, recipe.columns)
    rows = split_turns(rows, recipe.columns)
    for row, outcome in chain.from_iterable(_render_groups(recipe, iter(rows))):
        size = 0 if isinstance(outcome, Reject) else sum([len(text.text) for text in outcome.texts])
        if not isinstance(outcome, Reject) and outcome.conversation.images:
            contents = (image.content for text in outcome.texts for image in text.images)
            characters += sum(len(content) for content in contents if content) // _IMAGE_BYTES_PER_CHARACTER
        batch.append((row, outcome if size <= MAX_CHARACTERS else _reject_too_long(row, size)))
        characters += size
        if len(batch) == BATCH or characters >= MAX_BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _reject_too_long(row: Row | Reject, characters: int) -> Reject:
    problem = f"the row has {characters:,} characters of text, expected at most {MAX_CHARACTERS:,}"
    return make_reject(row, BadRow("row_too_long", problem, hint="split it into several rows"))


def _render_groups(recipe: Recipe, rows: Iterator[Row | Reject]) -> Iterator[list[RowAndOutcome]]:
    """Render rows in groups. The next group is read while the template worker renders the current group."""
    # A custom policy runs later: its exception must not reject the row, and it must not see rejected texts.
    policy = recipe.policy if is_built_in_policy(recipe.train_on) else None
    size, pending, failure_limits = 1, list[_Group](), _FailureLimits(recipe)
    while group := _read_group(rows, size):
        pending.append([_start_row(recipe, row) for row in group])
        # With long rows, only one group is in memory at a time.
        is_single = size < GROUP or len(group) < size
        while len(pending) > (not is_single):
            finished = _finish_group(recipe, pending.pop(0), policy, failure_limits)
            characters = sum(
                [len(text.text) for _, row in finished if isinstance(row, RenderedRow) for text in row.texts]
            )
            size = min(GROUP, 1 + MAX_GROUP_CHARACTERS * len(finished) // (characters + 1))
            yield finished
    yield from (_finish_group(recipe, group, policy, failure_limits) for group in pending)


class _StartedRow(NamedTuple):
    """A row whose rendering has started.

    Attributes:
        row: the row.
        conversation: the normalized row.
        texts: the rendered texts of each side, or functions that wait for them; empty if rendering has not started.
            A row that is not a preference pair has one side.
    """

    row: Row
    conversation: Conversation
    texts: Sequence[PendingTexts]


_Group = list[_StartedRow | Reject]


@dataclass
class RejectedRows:
    """Counts consecutive rejected rows, to stop reading a source that contains no training data."""

    rows: int = 0

    def check(self, outcome: object) -> None:
        """Update the count with the outcome of one row: a `Reject`, or any other object.

        Raises:
            InputRefused: the last `MAX_REJECTED` rows are all such rejects. The error has the code of the last reject.
        """
        if not isinstance(outcome, Reject) or (outcome.code != "unknown_schema" and len(outcome.raw) > _SHORT):
            self.rows = 0
            return
        self.rows += 1
        if self.rows == MAX_REJECTED:
            raise InputRefused(
                outcome.code,
                f"{MAX_REJECTED:,} consecutive rows were rejected. Reason for the last of these rows: {outcome.reason}",
                where=str(outcome.source),
                hint=outcome.fix,
            )


@dataclass
class _FailureLimits:
    """Stops reading a source if many of its rows fail for the same reason.

    The result does not depend on which process read the earlier rows.
    """

    recipe: Recipe
    previous: int | None = None
    rows: int = 0
    rejected: RejectedRows = field(default_factory=RejectedRows)

    def check(self, outcome: RenderedRow | Reject | Conversation) -> None:
        """Count the outcome of one row, and check the limits.

        Raises:
            TemplateRefused: `template_limits`: two short rows close to each other exceed the limits of the template.
                Long rows are not counted, because they can exceed the limits with any template.
            InputRefused: as `RejectedRows.check`.
        """
        self.rows += 1
        self.rejected.check(outcome)
        if not isinstance(outcome, Reject) or outcome.code != "template_limits" or len(outcome.raw) >= MAX_RAW:
            return
        if self.previous is not None and self.rows - self.previous < LIMITS_APART:
            problem = (
                f"template {self.recipe.template.name!r} exceeds its CPU or memory limit on several short rows: "
                f"{outcome.reason}"
            )
            hint = "use another template: this template contains an endless loop, or is malicious"
            raise TemplateRefused("template_limits", problem, where=str(outcome.source), hint=hint)
        self.previous = self.rows


def _finish_group(
    recipe: Recipe, group: _Group, policy: Policy | None, failure_limits: _FailureLimits
) -> list[RowAndOutcome]:
    finished = list[RowAndOutcome]()
    for started in group:
        outcome = started if isinstance(started, Reject) else _finish_row(recipe, started, policy)
        failure_limits.check(outcome)
        finished.append((started if isinstance(started, Reject) else started.row, outcome))
    return finished


def _read_group(rows: Iterator[Row | Reject], size: int) -> list[Row | Reject]:
    """Read up to `size` rows. Stop earlier if the rows are long, according to their byte offsets in the file."""
    group = list[Row | Reject]()
    for row in islice(rows, size):
        group.append(row)
        if (row.source.offset or 0) - (group[0].source.offset or 0) >= MAX_GROUP_CHARACTERS:
            break
    return group


def _start_row(recipe: Recipe, row: Row | Reject) -> _StartedRow | Reject:
    """Normalize a row, and start to render it in the template worker."""
    if isinstance(row, Reject):
        return row
    try:
        conversation = read_conversation(row, recipe, images=recipe.reads_images)
        check_row_answers(conversation)
        if recipe.download_images and conversation.images:
            start_downloads(conversation.images)
    except BadRow as error:
        return make_reject(row, error)
    except RecursionError:
        return _reject_too_deep(row)
    # Rows with token ids are not rendered, and rows with template variables need another template.
    if conversation.tokens is not None or conversation.kwargs:
        return _StartedRow(row, conversation, ())
    options = recipe.template, recipe.turns, recipe.on_dropped_message
    texts = [submit_render(part, *options) for part in conversation.parts]
    return _StartedRow(row, conversation, texts)


def _finish_row(recipe: Recipe, started: _StartedRow, policy: Policy | None) -> RenderedRow | Reject:
    """Wait for the rendered texts of a row, check them, and select the trained spans."""
    row, conversation, pending = started
    cross_check = row.source.row < CHECKED_FIRST or row.source.row % CHECK_INTERVAL == 0
    try:
        texts = _render_sides(recipe, conversation, pending, cross_check=cross_check)
        return apply_policy(conversation, texts, policy)
    except BadRow as error:
        return make_reject(row, error)
    except RecursionError:
        return _reject_too_deep(row)


def _render_sides(
    recipe: Recipe, conversation: Conversation, pending: Sequence[PendingTexts], *, cross_check: bool
) -> tuple[Rendered, ...]:
    """Render a conversation, or both sides of a preference pair, which must have one text each.

    Raises:
        BadRow: as for `render_conversation`, or `pair_split`.
    """
    if not conversation.sides:
        return render_conversation(recipe, conversation, pending[0] if pending else None, cross_check=cross_check)
    texts = list[Rendered]()
    for index, (name, side) in enumerate(zip(SIDES, conversation.sides, strict=True)):
        side_texts = render_conversation(recipe, side, pending[index] if pending else None, cross_check=cross_check)
        if len(side_texts) > 1:
            problem = (
                f"the {name} side would become {len(side_texts)} examples, because the template renders earlier "
                "answers differently than the model wrote them"
            )
            hint = "use rows whose sides differ only in the last turn, or set turns='joint'"
            raise BadRow("pair_split", problem, field=name, hint=hint)
        texts += side_texts
    return tuple(texts)


def _reject_too_deep(row: Row) -> Reject:
    return make_reject(row, BadRow("too_deep", "the row is nested too deeply to be read"))


def apply_policy(conversation: Conversation, texts: tuple[Rendered, ...], policy: Policy | None) -> RenderedRow:
    """Select the trained spans of a rendered row. If `policy` is `None`, the spans are selected later."""
    parts = conversation.parts
    ends_with_answers = len(texts) == len(parts) and all(
        not part.messages or part.messages[-1]["role"] == "assistant" for part in parts
    )
    if conversation.tokens is not None:
        return RenderedRow(conversation, texts, ((),), ends_with_answers)
    trained_spans = (
        None
        if policy is None
        else tuple([policy(text, conversation.part(number)) for number, text in enumerate(texts)])
    )
    return RenderedRow(conversation, texts, trained_spans, ends_with_answers)


def render_conversation(
    recipe: Recipe,
    conversation: Conversation,
    pending: PendingTexts | None = None,
    *,
    cross_check: bool = False,
) -> tuple[Rendered, ...]:
    """Render a conversation. Reject it if a control token from the row looks like a control token of the template.

    Args:
        recipe: the recipe.
        conversation: the normalized row.
        pending: the rendered texts, or a function that waits for them, if rendering has already started.
        cross_check: whether to compare the texts with a second, independent rendering.

    Raises:
        BadRow: as for `render`, or `control_tokens`.
        TemplateRefused: as for `render`, or `template_not_verified`.
    """
    if conversation.tokens is not None:
        return (_PRETOKENIZED,)
    recipe = recipe.with_kwargs(conversation.kwargs) if conversation.kwargs else recipe
    if pending is None:
        pending = submit_render(conversation, recipe.template, recipe.turns, recipe.on_dropped_message)
    texts = pending if isinstance(pending, tuple) else pending()
    _check_control_tokens(recipe, conversation, texts)
    if cross_check:
        _cross_check(recipe, conversation, texts)
    if conversation.images:
        texts = expand_row_images(recipe, conversation, texts)
    texts = add_row_flags(conversation, texts)
    if recipe.on_missing_stop == "append_eos":
        return tuple(append_missing_stop(text, recipe.template) for text in texts)
    return texts


def expand_row_images(recipe: Recipe, conversation: Conversation, texts: tuple[Rendered, ...]) -> tuple[Rendered, ...]:
    """Read the sizes of the images of a row, and replace the placeholders in its texts with the tokens of the images.

    Raises:
        BadRow: as for `read_image`, `ImageProcessor.expand` and `expand_images`.
        UsageError: `image_processor`, if the processor of the model is not supported; `image_folder`, if the folder
            does not exist.
    """
    processor = recipe.image_processor
    if processor is None:
        raise recipe.image_problem or AssertionError("rows without an image processor contain no images")
    folder = Path(recipe.image_folder) if recipe.image_folder else Path(conversation.source.path).parent
    if recipe.image_folder and not folder.is_dir():
        problem = f"image_folder is {recipe.image_folder}, which is not a folder"
        raise UsageError("image_folder", problem, hint=suggest_path(str(folder)))
    fetch = download if recipe.download_images else None
    references, image_texts = list[ImageReference](), list[ImageText]()
    for image in conversation.images:
        reference = read_image(image.value, folder, image.field, fetch)
        try:
            image_texts.append(processor.collapse_repeats(reference.width, reference.height))
        except BadRow as error:
            raise BadRow(error.code, error.message, field=image.field, hint=error.hint) from None
        references.append(reference)
    images_of_message = [
        sum(part == IMAGE_PART for part in content) if isinstance(content := message.get("content"), list) else 0
        for message in conversation.messages
    ]
    expanded = list[Rendered]()
    for text in texts:
        # A text contains the messages of the row from the first message on. A text without messages prints no image.
        count = sum(images_of_message[: text.messages or None])
        new = expand_images(text, processor.placeholder, image_texts[:count])
        expanded.append(new._replace(images=tuple(references[:count])))
    return tuple(expanded)


def add_row_flags(conversation: Conversation, texts: tuple[Rendered, ...]) -> tuple[Rendered, ...]:
    """Add a flag to the texts of a preference pair, because the rejected answer of the pair is not used."""
    if not drops_rejected_side(conversation):
        return texts
    return tuple(text._replace(flags=text.flags | {"rejected_side_dropped"}) for text in texts)


def _cross_check(recipe: Recipe, conversation: Conversation, texts: Sequence[Rendered]) -> None:
    """Compare the texts with a second, independent rendering. If they differ, refuse the template."""
    for text in texts:
        if difference := cross_check_in_worker(conversation, recipe.template, text, CHECKED_MESSAGES):
            problem = (
                f"two renderings with template {recipe.template.name!r} disagree about the text that the model must "
                f"generate: {difference}"
            )
            hint = "copy the template to a file and mark the trained text with {% generation %}"
            raise TemplateRefused("template_not_verified", problem, where=str(conversation.source), hint=hint)


def _check_control_tokens(recipe: Recipe, conversation: Conversation, texts: Sequence[Rendered]) -> None:
    """Reject a row if a control token in its text looks like a control token of the template.

    If ftdata cannot follow how the template prints a text, it attributes the text to the template. Therefore the row
    is rendered again with its control tokens replaced: the template must still print the same number of them.
    """
    if all(map(_has_constant_text, texts)):
        return
    pattern = recipe.control.pattern
    if recipe.control_tokens == "allow" or pattern is None or not conversation.messages:
        return
    if not recipe.control.occurs_in("\n".join(_strings(conversation))):
        return
    messages = tuple(_mask_control_tokens(message, pattern) for message in conversation.messages)
    masked = replace(conversation, messages=messages, tools=tuple(_mask_control_tokens(conversation.tools, pattern)))
    if masked == conversation:
        return
    try:
        masked_texts = render_in_worker(masked, recipe.template, recipe.turns, recipe.on_dropped_message)
    except BadRow:
        masked_texts = ()
    if _count_template_tokens(recipe, texts) != _count_template_tokens(recipe, masked_texts):
        problem = "the row contains a control token that ftdata cannot distinguish from the template's control tokens"
        raise BadRow("control_tokens", problem, hint="remove it from the data, or set control_tokens='allow'")


def _count_template_tokens(recipe: Recipe, texts: Sequence[Rendered]) -> int:
    """Count the control tokens that the template printed, according to the spans."""
    return sum(len(recipe.control.find_matches(text)[0]) for text in texts if not text.keep_control)


def _mask_control_tokens(value: Any, pattern: re.Pattern[str]) -> Any:
    """Replace the control tokens in all strings of a JSON value, except roles, by other text of the same length."""
    if isinstance(value, str):
        return _mask_text(value, pattern)
    if isinstance(value, list | tuple):
        return [_mask_control_tokens(item, pattern) for item in value]
    if not isinstance(value, Mapping):
        return value
    masked = {_mask_text(key, pattern): _mask_control_tokens(item, pattern) for key, item in value.items()}
    if "role" in value:
        masked["role"] = value["role"]
    content = value.get("content")
    if value.get("role") == "assistant" and isinstance(content, str):
        # Thinking tags that an answer contains are not control tokens of the row, and templates search for them.
        masked["content"] = _mask_text(content, pattern, find_thinking_tags(content, "think"))
    return masked


def _mask_text(text: str, pattern: re.Pattern[str], kept_ranges: Sequence[tuple[int, int]] = ()) -> str:
    return pattern.sub(lambda match: match.group() if match.span() in kept_ranges else "x" * len(match.group()), text)


def _has_constant_text(rendered: Rendered) -> bool:
    return isinstance(rendered.spans, Spans) and rendered.spans.kinds.has_constant_template_text


def _strings(conversation: Conversation) -> list[str]:
    """Return all strings and keys in a conversation, except the keys `role` and `content`."""
    strings = list(_iter_strings(conversation.tools))
    for message in conversation.messages:
        content = message.get("content")
        if len(message) == 2 and type(content) is str:
            strings += message["role"], content
        else:
            strings += (text for text in _iter_strings(message) if text not in ("role", "content"))
    return strings


def _iter_strings(value: Any) -> Iterator[str]:
    """Yield all strings and keys in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) or isinstance(value, Mapping):  # noqa: SIM101  (testing for a dict is much faster)
        yield from value
        yield from _iter_strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _iter_strings(inner)


def make_reject(row: Row | Reject, error: BadRow) -> Reject:
    """Create a `Reject` from a row and an error. The `Reject` contains the first 4096 characters of the row as JSON."""
    if isinstance(row, Reject):
        return row
    try:
        raw = _ENCODER.encode(row.data)[:MAX_RAW]
    except (RecursionError, ValueError):
        raw = ""
    text = raw.encode("utf-8", "backslashreplace").decode()
    return Reject(row.source, error.code, error.field, error.message, error.hint, text)
