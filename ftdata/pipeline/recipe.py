"""What decides what a row becomes: the user's options, the tokenizer and the template, checked and bound."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from ftdata.errors import BadRow, TemplateRefused, UsageError, check_choice
from ftdata.pipeline.mask import Policy, masks, resolve_policy
from ftdata.pipeline.truncate import POLICIES as OVERLONG
from ftdata.redaction import is_secret_name
from ftdata.schemas import check_columns, schemas
from ftdata.templates import (
    DEFAULT_DATE,
    DROPPED_MESSAGE_POLICIES,
    MISSING_STOP_POLICIES,
    TURNS,
    Template,
    check_can_train,
    find_template,
    scaffold_in_worker,
    start_template_worker,
    templates,
)
from ftdata.templates.verification.probe import TemplateReport
from ftdata.templates.worker.client import require_verified, verify_template
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.tokenizer import CONTROL_POLICIES, ControlTokens, Tokenizer, find_control_tokens

_MOST_VARIANTS = 64

NO_TOKENIZER = {"bos_token": "<bos>", "eos_token": "<eos>"}
"""What stands for special tokens where no tokenizer says what they are."""

_LONGEST_WORDS, _MARKS = 4096, re.compile(r"[<>\[\]{}|\uff5c\x00-\x08\x0e-\x1f]")
"""How long a text may be that a row gives to the template, and what is not in it: control tokens are made of it."""

FLAGS = {
    "arguments_as_text": "{n} examples give the arguments of tool calls as JSON text: the template fails on objects",
    "arguments_parsed": "{n} examples give the arguments of tool calls as objects: the template does not print JSON "
    "text as it stands",
    "message_truncated": "{n} examples lost part of a message to the template",
    "control_tokens": "{n} examples had control tokens spelled in their data, tokenised as plain text",
    "empty_thinking": "{n} examples train an empty thinking block, which the template prints where no reasoning is "
    "given; set enable_thinking=false to leave it to the prompt, or give reasoning",
    "eos_appended": "{n} examples got the stop that the template does not print at the end",
    "fields_dropped": "{n} examples have message keys that the template does not print",
    "text_after_last_stop": "{n} examples end in template text that no model generates; it is not trained",
    "no_trained_stop": "{n} examples have a turn without a trained control token at its end: the model will not learn to stop",
    "content_parts_joined": "{n} examples give contents as text that are lists of one text part: the template takes only text",
    "message_dropped": "{n} examples lost a whole message to the template",
    "pretokenized": "{n} examples came as tokens, which were checked and passed through",
    "prompt_mismatch": "{n} examples lack a scaffold that the generation prompt forces (an open thinking block)",
    "reasoning_dropped": "{n} examples lost reasoning, which the template does not print",
    "rejected_side_dropped": "{n} examples are the chosen side of a preference pair; the rejected side is not built",
    "history_rewritten": "{n} examples show an earlier turn otherwise than the model wrote it",
    "conversation_split": "{n} examples are turns by themselves, {repeated} tokens of them repeated: the template rewrites earlier "
    "turns, so each is shown as it will be asked",
    "stop_outside_generation_tags": "{n} examples train the stop, which the template's own tags leave out: who follows them never "
    "teaches it",
    "token_crosses_boundary": "{n} examples have a trained token that begins or ends outside the answer (tokens follow characters)",
    "generation_tags_overruled": "{n} examples are trained on what the model must generate, its stop included, not on what the "
    "template's tags mark",
    "generation_tags_unconfirmed": "{n} examples are trained on what the template's tags mark, which is not, or not certainly, "
    "what the model must generate",
    "tools_dropped": "{n} examples were given tools that the template does not print, or not whole",
    "trailing_messages": "{n} examples end with messages that nothing answers",
    "answer_truncated": "{n} examples end inside an answer",
    "history_not_compared": "{n} examples have an earlier turn of which it is not known whether the model wrote it so: the "
    "template refuses the conversation up to there",
    "missing_final_stop": "{n} examples end without a stop: the template prints it only before the next message",
    "template_not_probed": "{n} examples were judged by themselves: the template refuses plain conversations",
}
"""Flag -> what the report says about it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may choose about rows; checked when made.

    Raises:
        UsageError: naming the option and the nearest allowed value.
    """

    schema: str = "auto"
    columns: Mapping[str, str] | None = None
    train_on: str | Policy = "assistant"
    train_parts: Sequence[str] | None = None
    turns: str = "auto"
    control_tokens: str = "escape"
    on_dropped_message: str = "reject"
    on_missing_stop: str = "flag"
    reject_flags: Sequence[str] = ()
    max_length: int | None = None
    overlong: str = "reject"

    def __post_init__(self) -> None:
        check_choice("turns", self.turns, TURNS)
        check_choice("control_tokens", self.control_tokens, CONTROL_POLICIES)
        check_choice("on_dropped_message", self.on_dropped_message, DROPPED_MESSAGE_POLICIES)
        check_choice("on_missing_stop", self.on_missing_stop, MISSING_STOP_POLICIES)
        if isinstance(self.reject_flags, str) or not isinstance(self.reject_flags, Iterable):
            raise UsageError("reject_flags", f"reject_flags is {self.reject_flags!r}, expected a list of flags")
        for flag in self.reject_flags:
            check_choice("reject_flags", flag, FLAGS)
        check_choice("overlong", self.overlong, OVERLONG)
        if not isinstance(self.schema, str):
            raise UsageError("schema", f"schema is {self.schema!r}, expected a name, or auto")
        if self.schema != "auto":
            schemas.get(self.schema)
        if self.max_length is not None and (not isinstance(self.max_length, int) or not 2 <= self.max_length < 1 << 31):
            raise UsageError("max_length", f"max_length is {self.max_length!r}, expected a whole number from 2")
        check_columns(self.columns)
        resolve_policy(self.train_on, self.train_parts)

    @property
    def policy(self) -> Policy:
        """Which spans are trained."""
        return resolve_policy(self.train_on, self.train_parts)


@dataclass(frozen=True, kw_only=True)
class Recipe(Options):
    """Everything that decides what a row becomes. Picklable: each worker gets one."""

    tokenizer: Tokenizer
    template: Template
    control: ControlTokens

    def __post_init__(self) -> None:
        super().__post_init__()
        check_can_train(self.template)
        if self.on_missing_stop == "append_eos" and not self.template.special_tokens.get("eos_token"):
            raise UsageError(
                "on_missing_stop", "on_missing_stop='append_eos' needs an eos_token, and this tokenizer names none"
            )

    @cached_property
    def _variants(self) -> dict[str, Recipe]:
        """The same recipe with other variables of the template, by these as JSON."""
        return {}

    def with_kwargs(self, kwargs: Mapping[str, Any]) -> Recipe:
        """Return the recipe for a row with variables of its own for the template, examined as every template is.

        Raises:
            BadRow: with these it cannot be trusted.
        """
        # What it does not read changes nothing, and is often another in each row.
        kwargs = {name: value for name, value in kwargs.items() if name in self.template.names}
        if not kwargs:
            return self
        for name, value in kwargs.items():
            if not _is_plain(value) or (isinstance(value, str) and self.control.spelled(value)):
                found = "is no number, nor words without signs of which control tokens are made"
                hint = "set it for all rows: template_kwargs"
                raise BadRow("row_options", found, field=f"chat_template_kwargs.{name}", hint=hint)
        key, variants = json.dumps(kwargs, sort_keys=True), self._variants
        if key not in variants:
            if len(variants) >= _MOST_VARIANTS:
                del variants[next(iter(variants))]
            try:
                template = require_verified(replace(self.template, kwargs={**self.template.kwargs, **kwargs}))
                variants[key] = replace(self, template=template)
            except TemplateRefused as error:
                raise BadRow(error.code, error.message, field="chat_template_kwargs", hint=error.hint) from None
        return variants[key]

    def describe(self) -> dict[str, Any]:
        """Return the options as JSON, for manifest and fingerprint."""
        return {
            "tokenizer": {"name": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint},
            "template": {
                "name": self.template.name,
                "source": self.template.source,
                "kwargs": dict(self.template.kwargs),
                "date": self.template.date.isoformat(),
            },
            "schema": self.schema,
            "columns": dict(self.columns or {}),
            "train_on": policy_name(self.train_on),
            "train_parts": None if self.train_parts is None else list(self.train_parts),
            "turns": self.turns,
            "control_tokens": self.control_tokens,
            "on_dropped_message": self.on_dropped_message,
            "on_missing_stop": self.on_missing_stop,
            "reject_flags": sorted(self.reject_flags),
            "max_length": self.max_length,
            "overlong": self.overlong,
        }


def recipe_arguments(options: Mapping[str, Any], tokenizer: Any = None, *, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `make_recipe` for a recipe that `Recipe.describe` told of.

    Args:
        options: what it told, maybe of an earlier version, which lacks what that did not know.
        tokenizer: where its tokenizer is now; `None`: where it was.
        names: the fields of `Options` to take over. What runs code (a schema or mask in a file of the user's own) is
            never among them: whoever calls names such files, not a folder that came from somewhere.

    Raises:
        LookupError, TypeError: the options are not what `describe` tells.
    """
    template = options["template"]
    given = {name: options[name] for name in names if name in options}
    for name, known in (("schema", ["auto", *schemas.names()]), ("train_on", masks.names())):
        if name in given and given[name] not in known:
            del given[name]
    return {
        "tokenizer": options["tokenizer"]["name"] if tokenizer is None else tokenizer,
        "template": None if template["name"] == "tokenizer" else template["source"],
        "date": template["date"],
        "template_kwargs": template["kwargs"],
        **given,
    }


def make_recipe(
    tokenizer: Any,
    template: str | Path | None = None,
    *,
    date: str | datetime.date | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Recipe:
    """Load the tokenizer, find the template and bind the two.

    Args:
        tokenizer: a folder, a hub id, or a `transformers` or `tokenizers` object.
        template: `None` for the tokenizer's own chat template, a built-in name, a file, or a Jinja string.
        date: what templates that print a date are shown (default: 2026-01-01, so that builds stay the same).
        template_kwargs: further variables for the template.
        options: the fields of `Options`.

    Raises:
        UsageError: an unknown name or value.
        TemplateRefused: the template cannot be compiled, or marks nothing as trained.
    """
    start_template_worker()
    loaded = load_tokenizer(tokenizer)
    check_kwargs(template_kwargs)
    name, source = ("tokenizer", loaded.chat_template or "") if template is None else find_template(template)
    kwargs = json.dumps(template_kwargs or {}, sort_keys=True)
    bound, control = _bind(loaded, name, source, template is not None, parse_date(date), kwargs)
    return Recipe(tokenizer=loaded, template=bound, control=control, **options)


def load_bare_template(
    template: str | Path, date: str | datetime.date | None = None, kwargs: Mapping[str, Any] | None = None
) -> Template:
    """Return a template to be looked at without a tokenizer: `<bos>` and `<eos>` stand for its special tokens.

    Raises:
        UsageError: an unknown name or value.
        TemplateRefused: the template cannot be compiled, or marks nothing as trained.
    """
    check_kwargs(kwargs)
    name, source = find_template(template)
    control = re.compile(r"<\|[^|<>]*\|>|</?[a-z_]+>")
    bare = Template(
        name, source, special_tokens=NO_TOKENIZER, control=control, date=parse_date(date), kwargs=kwargs or {}
    )
    # Before anything of it is looked at here: to read a template may take for ever, too.
    verify_template(bare)
    check_can_train(bare)
    return bare


def check_template(template_or_tokenizer: Any) -> TemplateReport:
    """Say what a template does: its stop, whether it rewrites earlier turns, what it drops.

    Args:
        template_or_tokenizer: a built-in name, a `.jinja` file, a Jinja string, or a tokenizer (folder, hub id or
            object), whose chat template is checked.

    Returns:
        The verdict, and what it stands on.

    Raises:
        UsageError: it is none of these.
        TemplateRefused: the template cannot be compiled, or the tokenizer has none.
        HubError: the tokenizer cannot be had.

    >>> check_template("chatml").verdict
    'exact'
    """
    return verify_template(_bound(template_or_tokenizer))


def _bound(given: Any) -> Template:
    is_text = isinstance(given, str | Path)
    if given is None or isinstance(given, bytes | int | float):
        raise UsageError("template_type", f"it is {given!r:.60}, expected a template, a tokenizer, or the name of one")
    if is_text and (str(given) in templates or "{" in str(given) or Path(given).is_file()):
        return load_bare_template(given)
    is_name = is_text and "/" not in str(given) and not Path(given).is_dir()
    if is_name and get_close_matches(str(given), templates.names()):
        find_template(given)  # a misspelt name: say so instead of asking the hub
    known = isinstance(given, Tokenizer | tokenizers.Tokenizer) or hasattr(given, "backend_tokenizer")
    return make_recipe(given if is_text or known else str(given)).template


def _is_plain(value: Any) -> bool:
    """Whether a row may give this to the template, which prints it as its own words."""
    if isinstance(value, str):
        return len(value) <= _LONGEST_WORDS and not _MARKS.search(value)
    return value in (None, [], {}) or (isinstance(value, int | float) and abs(value) < 1e15)


def check_kwargs(kwargs: Any) -> None:
    """Refuse variables for the template that are none.

    Raises:
        UsageError: naming them.
    """
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping) or (own := {"messages", "tools", "add_generation_prompt"} & set(kwargs)):
        found = f"names {sorted(own)}, which the rows give" if isinstance(kwargs, Mapping) else f"is {kwargs!r}"
        raise UsageError("template_kwargs", f"template_kwargs {found}; expected further variables of the template")
    if secret := [name for name in kwargs if is_secret_name(str(name))]:
        told = f"names {', '.join(secret)}, which is written to the report and the manifest, as all variables are"
        raise UsageError("template_kwargs", f"template_kwargs {told}", hint="leave it out: a template needs no secrets")
    try:
        json.dumps(kwargs)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError("template_kwargs", f"template_kwargs must be plain values: {error}") from None


@lru_cache(maxsize=64)
def _bind(
    tokenizer: Tokenizer, name: str, source: str, strict: bool, date: datetime.datetime, kwargs: str
) -> tuple[Template, ControlTokens]:
    """Bind a template to a tokenizer. What is learnt of the two is kept with the result."""
    unbound = Template(
        name, source, strict=strict, special_tokens=tokenizer.special_tokens, date=date, kwargs=json.loads(kwargs)
    )
    # Nothing of a template runs here before it was examined: what it prints around messages is asked afterwards.
    written = source + (tokenizer.chat_template or "")
    first = require_verified(replace(unbound, control=find_control_tokens(tokenizer, written).pattern))
    control = find_control_tokens(tokenizer, written + scaffold_in_worker(first))
    return (
        first if control.pattern == first.control else require_verified(replace(first, control=control.pattern))
    ), control


def parse_date(date: str | datetime.date | None) -> datetime.datetime:
    """Return what the clock shows to templates.

    Raises:
        UsageError: not a date.
    """
    if date is None:
        return DEFAULT_DATE
    try:
        return datetime.datetime.fromisoformat(str(date))
    except ValueError:
        raise UsageError("date", f"date is {str(date)!r}, expected the form 2026-01-31") from None


def policy_name(policy: str | Policy) -> str:
    """Return how a policy is named in reports and fingerprints."""
    if isinstance(policy, str):
        return policy
    return f"{policy.__module__}.{getattr(policy, '__qualname__', type(policy).__qualname__)}"
