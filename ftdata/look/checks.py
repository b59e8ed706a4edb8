"""Checks: what can be wrong with data, each with a code that stays, a severity, and a way out.

A *flag* check is a flag of the examples; a *row* check looks at each row; a *data* check at all rows together, when
they were read; a *template* check at tokenizer and template. Rows that are rejected are findings, too, by their codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata import similar
from ftdata.errors import BadRow, TemplateRefused
from ftdata.look import detect
from ftdata.look.survey import Ints, Survey
from ftdata.look.views import texts_of
from ftdata.recipe import Recipe, make_recipe
from ftdata.shown import rendered
from ftdata.templates.child import verify
from ftdata.types import Conversation, Example, Message

SEVERITIES = ("note", "warning", "error")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        code: its name, which stays.
        severity: `"error"` (what is trained is wrong), `"warning"` (it likely is) or `"note"` (good to know).
        of: `"flag"`, `"row"`, `"data"` or `"template"`.
        says: what is wrong.
        fix: what to do.
        finds: a row check yields what it found in a `Row`; a data check, in `Data`, the numbers of rows and what it
            found there; a template check what it found in a `Setting`.
        asked: the option that asks for it, where it is not made otherwise.
        of_messages: whether it looks at messages, or at what was decided when a build was made: of a build, neither
            is there.
    """

    code: str
    severity: str
    of: str
    says: str
    fix: str
    finds: Callable[[Any], Iterator[Any]] = field(repr=False)
    asked: str = ""
    of_messages: bool = False


class Row(NamedTuple):
    """One row that was built, as row checks see it; `adds` is what the template prints before it by itself."""

    said: Conversation
    examples: tuple[Example, ...]
    recipe: Recipe
    adds: str


@dataclass(frozen=True)
class Data:
    """All rows, as data checks see them.

    Attributes:
        seen: numbers of the rows.
        scripts: int64 `[rows]`, a bit for each script, of `detect.SCRIPTS`, in which an answer is written.
        held_out: by number of the source, whether its rows must not be trained on.
        near: how similar rows must be to count as equal; `None`: as the same.
        signatures: MinHashes of the rows, where there is `near`.
    """

    seen: Survey
    scripts: Ints
    held_out: Sequence[bool]
    near: float | None = None
    signatures: NDArray[np.uint32] | None = None

    @cached_property
    def out(self) -> NDArray[np.bool_]:
        """Which rows must not be trained on (bool `[rows]`)."""
        return np.asarray(self.held_out, np.bool_)[self.seen.numbers.source]


class Setting(NamedTuple):
    """Tokenizer and template, with which stops answers end, and some conversations, as template checks see them."""

    recipe: Recipe
    stops: frozenset[int]
    said: Sequence[Conversation]


checks: dict[str, Check] = {}
"""Code -> check, in the order in which findings of one severity are told."""

Finds = Callable[[Any], Iterator[Any]]


def _check(code: str, severity: str, of: str, says: str, fix: str, **more: Any) -> Callable[[Finds], Finds]:
    def add(finds: Finds) -> Finds:
        checks[code] = Check(code, severity, of, says, fix, finds, **more)
        return finds

    return add


def _flag(code: str, severity: str, says: str, fix: str) -> None:
    _check(code, severity, "flag", says, fix)(lambda _: iter(()))


# --- flags, which the stages give

_flag(
    "no_stop",
    "error",
    "a trained turn does not end in a trained control token: the model will not learn to stop",
    "use a template that ends turns with one, or unclosed='append_eos'",
)
_flag(
    "truncated_answer",
    "error",
    "max_length cuts an answer in the middle: the model learns to break off",
    "raise max_length, or choose overlong='drop_turns'",
)
_flag(
    "unclosed_final",
    "warning",
    "the last turn has no stop: the template prints it only before the next message",
    "unclosed='append_eos' trains the end-of-text token there",
)
_flag(
    "content_cut",
    "warning",
    "the template prints only part of a message",
    "see what is lost with `ftdata preview --odd`",
)
_flag("payload_dropped", "warning", "the template leaves out a whole message", "use a template that prints it")
_flag(
    "reasoning_dropped",
    "warning",
    "the template does not print reasoning",
    "use a template that does, or take the reasoning out",
)
_flag(
    "tools_dropped",
    "warning",
    "the template does not print the tools that are given, or not whole",
    "use a template that prints tools",
)
_flag(
    "fields_dropped",
    "note",
    "keys of messages are not printed by the template",
    "take them out, if they are not meant to be trained",
)
_flag(
    "prompt_drift",
    "warning",
    "what is trained lacks a scaffold that the prompt forces at inference",
    "see `ftdata templates check`; give reasoning where the prompt opens a thinking block",
)
_flag(
    "tags_unconfirmed",
    "warning",
    "the template's tags mark what is not, or not certainly, what the model produces",
    "mend the tags of the template, or take them out: turns are found without them",
)
_flag(
    "stop_untagged",
    "note",
    "the template's own tags leave the stop out; it is trained all the same",
    "mend the tags of the template",
)
_flag(
    "control_tokens",
    "warning",
    "control tokens are spelled in the data",
    "they are tokenised as plain text; clean the data if they are left-overs of a template",
)
_flag(
    "trailing_turns",
    "warning",
    "the conversation ends with messages that nothing answers",
    "drop them from the data",
)


# --- tokens of a row


@_check(
    "double_bos",
    "error",
    "row",
    "the text begins with BOS twice",
    "take BOS out of the data, or out of the template",
)
def _double_bos(row: Row) -> Iterator[str]:
    tokenizer = row.recipe.tokenizer
    bos = tokenizer.special_tokens.get("bos_token")
    if bos is not None and any(one.input_ids[:2].tolist() == [tokenizer.id_of(bos)] * 2 for one in row.examples):
        yield f"begins with {bos} twice"


@_check(
    "double_eos",
    "warning",
    "row",
    "an answer ends in two stop tokens",
    "take the stop out of the data: the template writes it",
)
def _double_eos(row: Row) -> Iterator[str]:
    for example in row.examples:
        ids, trained = example.input_ids, example.trained
        again = np.flatnonzero((ids[1:] == ids[:-1]) & trained[1:] & trained[:-1])
        for at in again[row.recipe.control.among(ids[again])].tolist():
            yield f"{example.text[slice(*example.offsets[at].tolist())]} twice"


_LEAST, _LONG = 0.005, 400


@_check(
    "label_share",
    "note",
    "row",
    "next to nothing of the row is trained; or, where it came as tokens, all of it",
    "look at it with `ftdata preview --odd`: a short answer to a long text may be meant, a lost one is not",
)
def _label_share(row: Row) -> Iterator[str]:
    tokens = sum(len(one) for one in row.examples)
    trained = sum(int(one.trained.sum()) for one in row.examples)
    if tokens >= _LONG and trained < _LEAST * tokens:
        yield f"{trained:,} of {tokens:,} tokens are trained"
    came_as_tokens = row.said.tokens is not None and row.recipe.train_on != "all"
    turns = sum(row.recipe.control.count(one.input_ids) for one in row.examples)
    if came_as_tokens and tokens == trained and turns > 1:
        yield "all tokens are trained, those of prompts, too"


# --- messages of a row


@_check(
    "role_order",
    "warning",
    "row",
    "the roles come in an order in which no model is asked",
    "mend the order: a system message first, then questions and answers by turns",
    of_messages=True,
)
def _role_order(row: Row) -> Iterator[str]:
    before = ""
    for number, message in enumerate(row.said.messages):
        role, place = message["role"], f"messages[{number}]"
        if role in ("system", "developer"):
            if before not in ("", "system", "developer"):
                yield f"{place} is a system message after others"
        elif role == "assistant" and before in ("", "system", "developer"):
            yield f"{place} answers before anything was asked"
        elif role == before and role in ("user", "assistant"):
            yield f"{place} follows a message of the same role ({role})"
        before = role
    yield from _calls(row.said.messages)


_RESULTS = ("tool", "observation", "function", "ipython", "tool_response")
"""Roles of what tools answer; those of a template's own are left as they are."""


def _calls(messages: Sequence[Message]) -> Iterator[str]:
    """Yield what is wrong with calls of tools and their results."""
    waiting = list[str | None]()
    for number, message in enumerate(messages):
        place, given = f"messages[{number}]", message.get("tool_call_id")
        if message["role"] not in _RESULTS:
            if waiting:
                yield f"{place} comes before the result of a tool that was called"
            waiting = [call.get("id") for call in message.get("tool_calls") or ()]
        elif not waiting:
            yield f"{place} is the result of a tool that nobody called"
        else:
            own = [call for call in waiting if given is None or call in (None, given)]
            if not own:
                yield f"{place} answers the call {given!r}, which nobody made"
            waiting.remove((own or waiting)[0])


@_check(
    "trivial_answer",
    "warning",
    "row",
    "an answer says nothing: it is a placeholder, or punctuation alone",
    "take the row out, or give the message train: false",
    of_messages=True,
)
def _trivial_answer(row: Row) -> Iterator[str]:
    for number, message in enumerate(row.said.messages):
        content = message.get("content")
        asked = message["role"] == "assistant" and message.get("train", True) and not message.get("tool_calls")
        text = content if isinstance(content, str) else "\n".join(texts_of(content))
        if asked and content is not None and detect.says_nothing(text) and _is_trained(row, number):
            yield f"messages[{number}].content is {text.strip()!r}"


def _is_trained(row: Row, number: int) -> bool:
    """Whether any token of a message is trained."""
    for one in row.examples:
        for span in one.spans:
            if span.message == number and span.generated:
                inside = (one.offsets[:, 0] >= span.start) & (one.offsets[:, 1] <= span.end)
                if one.trained[inside].any():
                    return True
    return False


@_check(
    "left_over",
    "warning",
    "row",
    "a message holds what the template of some model writes",
    "take it out: the data was templated once before",
    of_messages=True,
)
def _left_over(row: Row) -> Iterator[str]:
    for number, message in enumerate(row.said.messages):
        for text in texts_of(message.get("content")):
            if (found := detect.left_over(text)) and not row.recipe.control.spelled(found):
                yield f"messages[{number}].content holds {found!r}"


@_check(
    "default_system",
    "note",
    "row",
    "the template puts a system prompt of its own before the conversation",
    "give a system message, so that training and inference say the same",
    of_messages=True,
)
def _default_system(row: Row) -> Iterator[str]:
    messages = row.said.messages
    if len(re.findall(r"[^\W\d_]+", row.adds)) > 3 and messages and messages[0]["role"] not in ("system", "developer"):
        yield repr(row.adds[:80])


# --- texts of a row


@_check(
    "mojibake",
    "warning",
    "row",
    "the text was decoded with a wrong encoding once",
    "repair it where it was made, for example with ftfy",
)
def _mojibake(row: Row) -> Iterator[str]:
    for example in row.examples:
        # A build may end in the midst of a character, where it was cut.
        if (found := detect.mojibake(example.text.rstrip("\ufffd") if example.cut else example.text)) is not None:
            yield repr(found)


@_check(
    "pii",
    "warning",
    "row",
    "something looks as if it belonged to a person",
    "take it out, or put a placeholder in its place",
    asked="pii",
)
def _pii(row: Row) -> Iterator[str]:
    for example in row.examples:
        for kind, found in detect.personal(example.text):
            yield f"{kind} {found}"


# --- all rows together


@_check(
    "duplicate",
    "warning",
    "data",
    "the row is an exact duplicate of an earlier one",
    "keep one of them: build with dedup",
)
def _duplicate(data: Data) -> Iterator[tuple[int, str]]:
    trained, content = np.flatnonzero(~data.out), data.seen.numbers.content
    first = _first_of(content, ~data.out)
    for row in trained.tolist():
        if (earlier := first[int(content[row])]) != row:
            yield row, f"equal to {data.seen.source(earlier)}"


@_check(
    "near_duplicate",
    "warning",
    "data",
    "the row says almost the same as an earlier one",
    "keep one of them: build with dedup and near",
    asked="near",
)
def _near_duplicate(data: Data) -> Iterator[tuple[int, str]]:
    assert data.near is not None
    if data.signatures is None:
        return
    trained, content = np.flatnonzero(~data.out), data.seen.numbers.content
    first = trained[similar.first_alike(data.signatures[trained], data.near)]
    for row, earlier in zip(trained.tolist(), first.tolist(), strict=True):
        if content[row] != content[earlier]:
            yield row, f"almost {data.seen.source(earlier)}"


@_check(
    "leakage",
    "error",
    "data",
    "a row that is held out is trained on: an equal one, or, with --near, one that says almost the same",
    "take it out of one of them; build with test_size, which keeps equal rows together",
)
def _leakage(data: Data) -> Iterator[tuple[int, str]]:
    told = set[int]()
    ways: list[tuple[str, NDArray[Any]]] = [("equal to", data.seen.numbers.content)]
    if data.near is not None and data.signatures is not None:
        ways.append(("almost", similar.groups(data.signatures, data.near) + 1))
    for says, values in ways:
        for row, earlier in _shared(data, values):
            if row not in told:
                told.add(row)
                yield row, f"{says} {data.seen.source(earlier)}"


@_check(
    "same_prompt",
    "warning",
    "data",
    "a row that is held out asks, word for word, what is trained to be answered otherwise",
    "take it out of one of them, unless the question is one that everybody asks",
)
def _same_prompt(data: Data) -> Iterator[tuple[int, str]]:
    numbers = data.seen.numbers
    equal = {row for row, _ in _shared(data, numbers.content)}
    for row, earlier in _shared(data, numbers.asked):
        if row not in equal:
            yield row, f"asks the same as {data.seen.source(earlier)}"


def _shared(data: Data, values: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield rows that are held out whose value is that of one that is trained on, and which; 0: nobody knows."""
    known = _first_of(values, ~data.out)
    for row in np.flatnonzero(data.out).tolist():
        if (value := int(values[row])) and value in known:
            yield row, known[value]


def _first_of(values: NDArray[Any], among: NDArray[np.bool_]) -> dict[int, int]:
    """Return the first row of each value."""
    rows = np.flatnonzero(among)
    distinct, first = np.unique(values[rows], return_index=True)
    return dict(zip(distinct.tolist(), rows[first].tolist(), strict=True))


_FEW, _MOST, _ENOUGH = 0.01, 0.8, 200


@_check(
    "script",
    "note",
    "data",
    "what is trained is written in another script than nearly all else",
    "see whether these rows are meant to be there",
)
def _script(data: Data) -> Iterator[tuple[int, str]]:
    written = np.count_nonzero(data.scripts)
    if written < _ENOUGH:
        return
    shares = [np.count_nonzero(data.scripts >> number & 1) / written for number in range(len(detect.SCRIPTS))]
    usual = max(range(len(shares)), key=shares.__getitem__)
    # Where Kana are usual, words in Han alone are, too.
    beside = {"Kana": "Han"}.get(detect.SCRIPTS[usual])
    rare = [number for number, share in enumerate(shares) if share < _FEW and detect.SCRIPTS[number] != beside]
    for row in (
        np.flatnonzero(data.scripts & sum(1 << number for number in rare)).tolist() if shares[usual] >= _MOST else ()
    ):
        own = next(number for number in rare if data.scripts[row] >> number & 1)
        yield row, f"{detect.SCRIPTS[own]}, where others are {detect.SCRIPTS[usual]}"


# --- tokenizer and template


@_check(
    "pad_is_stop",
    "warning",
    "template",
    "the pad token ends turns, or there is none",
    "name another one: collators that mask it by its id hide the stop from the model (ftdata's labels are safe)",
)
def _pad_is_stop(given: Setting) -> Iterator[str]:
    tokenizer = given.recipe.tokenizer
    specials = tokenizer.special_tokens
    pad, eos = (tokenizer.id_of(specials.get(name)) for name in ("pad_token", "eos_token"))
    if pad is not None and pad in given.stops:
        yield f"{specials['pad_token']} is the pad token, and a stop"
    elif pad is None and eos in given.stops:
        yield f"there is no pad token, for which many trainers then take {specials['eos_token']}, which is a stop"


@_check(
    "date_inserted",
    "note",
    "template",
    "the template prints a date",
    "set it with date=, and print the same at inference",
    of_messages=True,
)
def _date_inserted(given: Setting) -> Iterator[str]:
    template = given.recipe.template
    if template.source and template.chat and verify(template).uses_date:
        yield f"shown as {template.date:%Y-%m-%d}"


@_check(
    "template_drift",
    "warning",
    "template",
    "the tokenizer's own chat template, which inference may use, prints the rows otherwise",
    "keep the template that you train with beside the model, as `ftdata train` does, or train with the tokenizer's",
    of_messages=True,
)
def _template_drift(given: Setting) -> Iterator[str]:
    recipe = given.recipe
    if recipe.tokenizer.chat_template in (None, recipe.template.source):
        return
    try:
        own = make_recipe(
            recipe.tokenizer,
            date=recipe.template.date,
            template_kwargs=recipe.template.kwargs,
            **{name: getattr(recipe, name) for name in ("turns", "dropped", "unclosed")},
        )
    except TemplateRefused as error:
        yield f"it is refused: {error}"
        return
    differ = sum(_text(recipe, one) != _text(own, one) for one in given.said)
    if differ:
        yield f"{differ:,} of {len(given.said):,} rows that were compared"


def _text(recipe: Recipe, said: Conversation) -> str | None:
    try:
        return "\n".join(one.text for one in rendered(recipe, said))
    except (BadRow, TemplateRefused):
        return None
