"""The recipe of a build: the options, tokenizer and template that determine how rows are converted to examples."""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from ftdata.errors import BadRow, TemplateRefused, UsageError, check_choice, suggest_similar
from ftdata.images.processor import ImageProcessor, load_image_processor
from ftdata.options import TASKS, check_choices, select_options
from ftdata.pipeline.flags import FLAGS
from ftdata.pipeline.mask import Policy, masks, resolve_policy
from ftdata.readers import FileSource, MemorySource, reread_rows
from ftdata.redaction import is_secret_name
from ftdata.schemas import check_columns, detect_task, schemas
from ftdata.templates import (
    DEFAULT_DATE,
    Template,
    check_can_train,
    find_template,
    scaffold_in_worker,
    start_template_worker,
    templates,
)
from ftdata.templates.python_template import is_python_template, load_template, make_template
from ftdata.templates.verification.probe import TemplateReport
from ftdata.templates.worker.client import forget_user_code, require_verified, verify_template
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.tokenizer import ControlTokens, Tokenizer, find_control_tokens

_log = logging.getLogger(__name__)

_MAX_VARIANTS = 64

PLACEHOLDER_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
"""Special tokens of a template that is inspected without a tokenizer."""

_MAX_STRING_LENGTH, _CONTROL_CHARACTERS = 4096, re.compile(r"[<>\[\]{}|\uff5c\x00-\x08\x0e-\x1f]")
"""Limits for a string that a row passes to the template: its length, and characters that control tokens consist of."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The user's options for converting rows to examples. They are validated on construction.

    Raises:
        UsageError: an option has an invalid value.
    """

    task: str = "auto"
    schema: str = "auto"
    columns: Mapping[str, str] | None = None
    train_on: str | Policy = "assistant"
    train_parts: Sequence[str] | None = None
    turns: str = "auto"
    control_tokens: str = "escape"
    on_dropped_message: str = "reject"
    on_missing_stop: str = "flag"
    reject_flags: Sequence[str] = ()
    image_folder: str | None = None
    download_images: bool = False
    max_length: int | None = None
    overlong: str = "reject"

    def __post_init__(self) -> None:
        check_choices(select_options(vars(self), "task", "rows"))
        object.__setattr__(self, "task", TASKS[self.task])
        if isinstance(self.reject_flags, str) or not isinstance(self.reject_flags, Iterable):
            raise UsageError("reject_flags", f"reject_flags is {self.reject_flags!r}, expected a list of flags")
        for flag in self.reject_flags:
            check_choice("reject_flags", flag, FLAGS)
        if not isinstance(self.schema, str):
            raise UsageError("schema", f"schema is {self.schema!r}, expected the name of a schema, or 'auto'")
        if self.schema != "auto":
            schemas.get(self.schema)
        if self.task == "preference" and self.schema not in ("auto", "preference"):
            problem = f"schema={self.schema!r} does not read preference pairs"
            hint = "remove schema; map columns with columns={'prompt': ..., 'chosen': ..., 'rejected': ...}"
            raise UsageError("schema", problem, hint=hint)
        if self.max_length is not None and (not isinstance(self.max_length, int) or not 2 <= self.max_length < 1 << 31):
            raise UsageError("max_length", f"max_length is {self.max_length!r}, expected an integer of at least 2")
        if self.max_length is None and self.overlong != "reject":
            problem = f"overlong={self.overlong!r} has no effect without max_length"
            raise UsageError("overlong", problem, hint="set max_length, or remove overlong")
        check_columns(self.columns)
        resolve_policy(self.train_on, self.train_parts)
        if self.task != "sft" and self.train_on == "all":
            problem = f"train_on='all' would train the prompts, which task={self.task!r} does not allow"
            raise UsageError("train_on", problem, hint="use train_on='assistant'")

    @property
    def policy(self) -> Policy:
        """The mask policy that `train_on` and `train_parts` define."""
        return resolve_policy(self.train_on, self.train_parts)


_Options = TypeVar("_Options", bound=Options)


def resolve_task(options: _Options, task: str, sources: Iterable[FileSource | MemorySource]) -> _Options:
    """Return the options with the task of the data, which the first row determines if the task is `auto`.

    Data that can be read only once, such as standard input, contains conversations unless the user sets the task. A
    schema that the user sets also means conversations.

    Args:
        options: the options.
        task: the task that the user requested.
        sources: the sources of the data.
    """
    if task != "auto" or options.schema != "auto":
        return options
    found = detect_task(reread_rows(sources), options.columns)
    if found == options.task:
        return options
    _log.info("the first row is a %s: task='%s' (detected)", _ROW_KINDS[found], found)
    return replace(options, task=found)


_ROW_KINDS = {"preference": "preference pair", "kto": "labeled answer (KTO)"}


@dataclass(frozen=True, kw_only=True)
class Recipe(Options):
    """The options, tokenizer and template that determine how rows are converted to examples.

    A recipe is picklable: each worker process receives a copy.

    Attributes:
        tokenizer, template: the tokenizer and the template.
        control: the control tokens of both.
        image_processor: the image processor of the model; `None` if it has none, or one that is not supported.
        image_problem: why the image processor is not supported. It is raised only for rows with images.
    """

    tokenizer: Tokenizer
    template: Template
    control: ControlTokens
    image_processor: ImageProcessor | None = None
    image_problem: UsageError | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_can_train(self.template)
        if self.on_missing_stop == "append_eos" and not self.template.special_tokens.get("eos_token"):
            problem = "on_missing_stop='append_eos' needs an eos_token, but the tokenizer has none"
            raise UsageError("on_missing_stop", problem)

    @cached_property
    def _variants(self) -> dict[str, Recipe]:
        """A cache of copies of this recipe with other template variables. The keys are the variables as JSON."""
        return {}

    @property
    def reads_images(self) -> bool:
        """Whether the model has an image processor. Otherwise, rows with images are rejected."""
        return self.image_processor is not None or self.image_problem is not None

    @property
    def image_token_id(self) -> int | None:
        """The id of the token that stands for a feature of an image, if the tokenizer contains such a token."""
        return self.tokenizer.token_to_id(self.image_processor.image_token) if self.image_processor else None

    def with_kwargs(self, kwargs: Mapping[str, Any]) -> Recipe:
        """Return a copy of the recipe with the template variables that a row sets. Verify its template.

        Raises:
            BadRow: a variable has an unsafe value, or the template cannot be verified with these variables.
        """
        # Variables that the template does not read have no effect, and often differ in every row.
        kwargs = {name: value for name, value in kwargs.items() if name in self.template.variables}
        if not kwargs:
            return self
        for name, value in kwargs.items():
            if not _is_safe_value(value) or (isinstance(value, str) and self.control.occurs_in(value)):
                problem = "the template variable is unsafe, expected a number, or a short text without < > [ ] { } |"
                hint = "set the variable for all rows with template_kwargs"
                raise BadRow("row_options", problem, field=f"chat_template_kwargs.{name}", hint=hint)
        key, variants = json.dumps(kwargs, sort_keys=True), self._variants
        if key not in variants:
            if len(variants) >= _MAX_VARIANTS:
                del variants[next(iter(variants))]
            try:
                template = require_verified(replace(self.template, kwargs={**self.template.kwargs, **kwargs}))
                variants[key] = replace(self, template=template)
            except TemplateRefused as error:
                raise BadRow(error.code, error.message, field="chat_template_kwargs", hint=error.hint) from None
        return variants[key]

    def describe(self) -> dict[str, Any]:
        """Return the options, tokenizer and template as JSON values, for the manifest and the fingerprint."""
        processor = {"image_processor": self.image_processor.fingerprint} if self.image_processor else {}
        return {
            "tokenizer": {"name": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint, **processor},
            "template": {
                "name": self.template.name,
                "source": self.template.source,
                "kwargs": dict(self.template.kwargs),
                "date": self.template.date.isoformat(),
            },
            **select_options(vars(self), "task", "rows"),
            "columns": dict(self.columns or {}),
            "train_on": policy_name(self.train_on),
            "train_parts": None if self.train_parts is None else list(self.train_parts),
            "reject_flags": sorted(self.reject_flags),
        }

    @classmethod
    def from_manifest(
        cls, options: Mapping[str, Any], tokenizer: Any = None, *, excluded: Collection[str] = ()
    ) -> Recipe:
        """Create the recipe of an existing build.

        Schemas and masks that are not registered are left out, because a downloaded folder must not select code to run.

        Args:
            options: the options in the manifest, as `describe` returns them. An earlier version of ftdata may have
                written them without newer options.
            tokenizer: the current location of the tokenizer; `None` for the recorded location.
            excluded: options that keep their default value.

        Raises:
            LookupError, TypeError: `options` is not a result of `describe`.
            FtdataError: as for `make_recipe`.
        """
        template = options["template"]
        registered = {"schema": ["auto", *schemas.names()], "train_on": masks.names()}
        copied_options = {
            name: value
            for name, value in select_options(options, "task", "rows").items()
            if name not in excluded and value in registered.get(name, [value])
        }
        return make_recipe(
            options["tokenizer"]["name"] if tokenizer is None else tokenizer,
            _recorded_template(template),
            date=template["date"],
            template_kwargs=template["kwargs"],
            **copied_options,
        )


def _recorded_template(template: Mapping[str, Any]) -> str | None:
    """Return the template of a manifest. The code of a function is read from its file, never from the manifest.

    Raises:
        UsageError: `template_changed`, if the file is missing or was changed.
    """
    name: str = template["name"]
    if name == "tokenizer":
        return None
    if not is_python_template(name):
        return str(template["source"])
    try:
        is_same = load_template(name)[1] == template["source"]
    except (TemplateRefused, UsageError):
        is_same = False
    if not is_same:
        problem = f"the file of the template {name}, or a module that it imports, has changed since the build"
        raise UsageError("template_changed", problem, hint="restore the file, or build the data again")
    return name


def make_recipe(
    tokenizer: Any,
    template: str | Path | None = None,
    *,
    date: str | datetime.date | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Recipe:
    """Create a recipe: load the tokenizer and the template, verify the template with this tokenizer, check the options.

    Args:
        tokenizer: a folder, a Hub ID, or a `transformers` or `tokenizers` object.
        template: `None` for the tokenizer's chat template, a built-in name, a file, or a Jinja string.
        date: current date for templates that print it. The default is 2026-01-01, so that builds are reproducible.
        template_kwargs: additional template variables.
        options: fields of `Options`.

    Raises:
        UsageError: an option has an unknown name or value.
        TemplateRefused: the template does not compile, or marks no text as trained.
    """
    start_template_worker()
    loaded = load_tokenizer(tokenizer)
    check_kwargs(template_kwargs)
    name, source = ("tokenizer", loaded.chat_template or "") if template is None else load_template(template)
    kwargs = json.dumps(template_kwargs or {}, sort_keys=True)
    is_user_code = is_python_template(name)
    if is_user_code:
        forget_user_code()
    bind_template = _bind_template if is_user_code else _bind_cached
    bound, control = bind_template(loaded, name, source, template is not None, parse_date(date), kwargs)
    _check_variables(bound)
    processor = problem = None
    try:
        processor = load_image_processor(loaded.folder) if loaded.folder else None
    except UsageError as error:
        problem = error
    return Recipe(
        tokenizer=loaded,
        template=bound,
        control=control,
        image_processor=processor,
        image_problem=problem,
        **options,
    )


def load_bare_template(
    template: str | Path, date: str | datetime.date | None = None, kwargs: Mapping[str, Any] | None = None
) -> Template:
    """Load a template without a tokenizer, for inspection only.

    The template's special tokens are the placeholders `<bos>` and `<eos>`.

    Raises:
        UsageError: the template or an option has an unknown name or value.
        TemplateRefused: the template does not compile, or marks no text as trained.
    """
    check_kwargs(kwargs)
    name, source = load_template(template)
    control = re.compile(r"<\|[^|<>]*\|>|</?[a-z_]+>")
    bare = make_template(
        name, source, special_tokens=PLACEHOLDER_TOKENS, control=control, date=parse_date(date), kwargs=kwargs or {}
    )
    if is_python_template(name):
        forget_user_code()
    # Verify the template in the worker process first: merely parsing a hostile template can run forever.
    verify_template(bare)
    check_can_train(bare)
    _check_variables(bare)
    return bare


def _check_variables(template: Template) -> None:
    """Check that the template reads all template variables of the user. A misspelled variable would have no effect.

    Raises:
        UsageError: the template does not read a variable.
    """
    for name in template.kwargs:
        if name not in template.variables:
            problem = f"the template {template.name} does not read the template variable {name!r}"
            hint = suggest_similar(name, template.variables) or f"remove {name} from template_kwargs"
            raise UsageError("template_kwargs", problem, hint=hint)


def check_template(template_or_tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> TemplateReport:
    """Check a template: detect its stop token, the message fields that it omits, and changes to earlier turns.

    Args:
        template_or_tokenizer: a built-in name, a `.jinja` file, a Jinja string, a function (`file.py:function`), or a
            tokenizer (folder, Hub ID or object) whose chat template is checked.
        template_kwargs: template variables.

    Returns:
        The verdict and its evidence.

    Raises:
        UsageError: the argument is neither a template nor a tokenizer.
        TemplateRefused: the template does not compile, or the tokenizer has no chat template.
        HubError: the tokenizer cannot be downloaded.

    >>> check_template("chatml").verdict
    'exact'
    """
    return verify_template(resolve_template(template_or_tokenizer, template_kwargs))


def resolve_template(target: Any, kwargs: Mapping[str, Any] | None = None) -> Template:
    """Return the template that a name, a file, a text, or a tokenizer stands for. See `check_template`."""
    is_text = isinstance(target, str | Path)
    if target is None or isinstance(target, bytes | int | float):
        problem = f"the argument is {target!r:.60}, expected a template, a tokenizer, or a name"
        raise UsageError("template_type", problem)
    is_template = is_text and (str(target) in templates or "{" in str(target) or Path(target).suffix == ".jinja")
    if is_template or is_python_template(str(target)) or (is_text and Path(target).is_file()):
        return load_bare_template(target, kwargs=kwargs)
    is_name = is_text and "/" not in str(target) and not Path(target).is_dir()
    if is_name and get_close_matches(str(target), templates.names()):
        find_template(target)  # A misspelled template name raises an error here, before any request to the Hub.
    is_tokenizer = isinstance(target, Tokenizer | tokenizers.Tokenizer) or hasattr(target, "backend_tokenizer")
    return make_recipe(target if is_text or is_tokenizer else str(target), template_kwargs=kwargs).template


def _is_safe_value(value: Any) -> bool:
    """Return whether a row may set a template variable to `value`. Unsafe text could imitate control tokens."""
    if isinstance(value, str):
        return len(value) <= _MAX_STRING_LENGTH and not _CONTROL_CHARACTERS.search(value)
    return value in (None, [], {}) or (isinstance(value, int | float) and abs(value) < 1e15)


def check_kwargs(kwargs: Any) -> None:
    """Check that the additional template variables are JSON values, are not reserved, and contain no secrets.

    Raises:
        UsageError: they are not a mapping of names to JSON values, contain a secret, or replace a value of the rows.
    """
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping):
        raise UsageError("template_kwargs", f"template_kwargs is {kwargs!r}, expected a mapping of template variables")
    if reserved := {"messages", "tools", "add_generation_prompt"} & set(kwargs):
        raise UsageError("template_kwargs", f"template_kwargs sets {sorted(reserved)}, which ftdata itself sets")
    if names := ", ".join(str(name) for name in kwargs if is_secret_name(str(name))):
        problem = f"template_kwargs contains {names}, but all template variables are stored in the report and manifest"
        raise UsageError("template_kwargs", problem, hint="remove the secrets: no template needs them")
    try:
        json.dumps(kwargs)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError("template_kwargs", f"template_kwargs must contain only JSON values: {error}") from None


def _bind_template(
    tokenizer: Tokenizer, name: str, source: str, strict: bool, date: datetime.datetime, kwargs: str
) -> tuple[Template, ControlTokens]:
    """Verify a template with the special tokens of a tokenizer. Return the template, and the control tokens of both."""
    unbound = make_template(
        name, source, strict=strict, special_tokens=tokenizer.special_tokens, date=date, kwargs=json.loads(kwargs)
    )
    # The template must be verified before it runs, so its text around messages is read only in the second step.
    sources = source + (tokenizer.chat_template or "")
    verified = require_verified(replace(unbound, control=find_control_tokens(tokenizer, sources).pattern))
    control = find_control_tokens(tokenizer, sources + scaffold_in_worker(verified))
    if control.pattern != verified.control:
        verified = require_verified(replace(verified, control=control.pattern))
    return verified, control


_bind_cached = lru_cache(maxsize=64)(_bind_template)


def parse_date(date: str | datetime.date | None) -> datetime.datetime:
    """Parse the date that templates print as the current date. The default is `DEFAULT_DATE`.

    Raises:
        UsageError: the value is not an ISO 8601 date.
    """
    if date is None:
        return DEFAULT_DATE
    try:
        return datetime.datetime.fromisoformat(str(date))
    except ValueError:
        raise UsageError("date", f"date is {str(date)!r}, expected a date such as 2026-01-31") from None


def policy_name(policy: str | Policy) -> str:
    """Return the name of a mask policy, as recorded in reports and fingerprints."""
    if isinstance(policy, str):
        return policy
    return f"{policy.__module__}.{getattr(policy, '__qualname__', type(policy).__qualname__)}"
