"""Rules and helpers that convert the settings of another tool to a draft of an ftdata configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ftdata.errors import UsageError, escape_line_breaks, escape_unprintable, shorten
from ftdata.schemas import ROLES, SPECIAL_ROLES

KERNELS_NOTE = "left out: results are the same without these kernels; the loss of TRL saves the memory of the logits"

TEXT_TEMPLATE = "{% generation %}{{ text }}{{ eos_token }}{% endgeneration %}"
"""The template of plain texts that end with the EOS token, of which all tokens are trained."""

CONVERT_HINT = (
    "remove these settings from the file, import it, and set schema: ./mine.py:convert in the result, with a function "
    "that converts rows to messages"
)

Rule = str | Callable[[Any], Mapping[str, Any]]
"""The field that a value is copied to, such as `lora.r`, or a function from the value to fields and their values."""


@dataclass(frozen=True)
class Draft:
    """An unfinished ftdata configuration: the fields that are already converted, and notes for the user.

    Attributes:
        fields: field or section -> value.
        notes: differences from the original tool, a sentence each.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set_field(self, name: str, value: Any) -> None:
        """Set a field of the configuration. The name may start with a section, as in `lora.r`."""
        section, dot, inner_name = name.partition(".")
        if dot:
            self.fields.setdefault(section, {})[inner_name] = value
        else:
            self.fields[name] = value

    def add_note(self, text: str) -> None:
        """Add a note for the user, unless the draft already contains the same note."""
        text = shorten(escape_line_breaks(escape_unprintable(text)))
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, slots=True)
class KeyRules:
    """Conversion rules for the keys of another tool's configuration file.

    Attributes:
        rules: key -> the field that its value is copied to.
        same_name: keys that are fields of `SFTConfig` under the same name.
        ignored: keys that do not affect the trained model.
        notes: key -> note for keys that are left out or that work differently.
        unsupported: key -> reason why an ftdata configuration cannot express it.
    """

    rules: Mapping[str, Rule]
    same_name: Collection[str]
    ignored: Collection[str]
    notes: Mapping[str, str]
    unsupported: Mapping[str, str]


def apply_rules(values: Mapping[str, Any], keys: KeyRules, draft: Draft, *, skip: Collection[str] = ()) -> None:
    """Apply conversion rules to the settings of a file, and store the resulting fields and notes in a draft.

    Args:
        values: the content of the file.
        keys: the conversion rules for its keys.
        draft: the draft that receives fields and notes.
        skip: keys that are converted elsewhere.

    Raises:
        UsageError: `cannot_import`, with all keys that are not supported.
    """
    used = {key: value for key, value in values.items() if key not in skip and value not in (None, False, "", [], {})}
    if unsupported := [f"{key}: {keys.unsupported[key]}" for key in used if key in keys.unsupported]:
        raise conversion_error(f"the file contains unsupported settings: {'; '.join(unsupported)}")
    default = list[str]()
    for key, value in values.items():
        rule = keys.rules.get(key, f"train.{key}" if key in keys.same_name else None)
        if key in skip or value is None or rule is None:
            continue
        fields = {rule: value} if isinstance(rule, str) else rule(value)
        for name, field_value in fields.items():
            draft.set_field(name, field_value)
        if key in used and not fields:
            default.append(f"{key}: {value}")
    if default:
        draft.add_note(f"left out, because the default of ftdata is used: {', '.join(default)}")
    for key in used:
        if key in keys.notes:
            draft.add_note(f"{key}: {keys.notes[key]}")
    if ignored := [
        key for key, value in values.items() if key in keys.ignored and key not in skip and value is not None
    ]:
        draft.add_note(f"left out, without effect on the trained model: {', '.join(ignored)}")
    _note_unknown(used, {*keys.rules, *keys.same_name, *keys.ignored, *keys.notes, *keys.unsupported, *skip}, draft)


def _note_unknown(used: Collection[str], known_keys: Collection[str], draft: Draft) -> None:
    """Add a note about unknown keys. An unknown key that is similar to a known key is an error.

    Raises:
        UsageError: `cannot_import`.
    """
    unknown = [str(key) for key in used if key not in known_keys]
    _refuse_misspelled_keys("the file", unknown, known_keys)
    if unknown:
        draft.add_note(f"unknown keys, left out: {', '.join(unknown)}")


def _refuse_misspelled_keys(place: str, unknown: Sequence[str], known_keys: Collection[str]) -> None:
    for key in unknown:
        if matches := get_close_matches(key, map(str, known_keys), n=1, cutoff=0.85):
            raise conversion_error(f"{place} contains the unknown key {key}", hint=f"did you mean {matches[0]}?")


def explicit_settings(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Add a tool's default values to the settings of a file. A setting that is null gets its default value.

    `warmup_steps` takes precedence over `warmup_ratio`.
    """
    settings = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    if "warmup_steps" in settings:
        settings.pop("warmup_ratio", None)
    return settings


def test_size_of(size: Any) -> Mapping[str, Any]:
    """Convert the size of a validation split to the `test_size` field. The size is a fraction or a number of rows.

    A size of 0 sets no field.

    Raises:
        ValueError: the size is neither a fraction nor a number of rows.
    """
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < 1 << 53:
        raise ValueError(f"the size of the validation split is {size!r}, expected a fraction or a number of rows")
    return {"test_size": int(size) if size > 1 else size} if size else {}


def note_unknown_keys(name: str, info: Mapping[str, Any], known_keys: Collection[str], draft: Draft) -> None:
    """Add a note about the unknown keys of a data set. The original tool ignores these keys as well.

    Raises:
        UsageError: `cannot_import`: an unknown key is similar to a known key.
    """
    unknown = [str(key) for key, value in info.items() if key not in known_keys and value not in (None, False)]
    _refuse_misspelled_keys(f"the data set {name}", unknown, known_keys)
    if unknown:
        draft.add_note(f"{name}: unknown keys, left out: {', '.join(unknown)}")


def remove_packing(draft: Draft) -> None:
    """Remove packing from a draft of one of several data sets, because packed builds cannot be combined."""
    if draft.fields.pop("packing", None):
        draft.add_note(
            "packing: left out, because packed builds cannot be combined; set packing: bfd in the configuration whose "
            "data are the builds, or in this file if you train on this data set only"
        )


def remove_evaluation(draft: Draft) -> None:
    """Remove all evaluation settings from a draft that has no test split."""
    train = draft.fields.get("train", {})
    if "test_size" not in draft.fields:
        for name in ("eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model"):
            if train.pop(name, None) not in (None, "no"):
                draft.add_note(f"{name}: left out, because no rows are held out; set test_size to hold out rows")
        draft.fields.pop("early_stopping", None)


def check_roles(roles: Mapping[str, str], where: str) -> None:
    """Check that each role in the data has the same meaning in ftdata as in the imported file.

    Args:
        roles: role in the data -> role that the file assigns.
        where: name of the data set.

    Raises:
        UsageError: `cannot_import`.
    """
    synonyms = {"observation": "tool", "function": "tool"}
    # ShareGPT data has tool calls in turns of the role `function_call`.
    known = {**dict.fromkeys(SPECIAL_ROLES, "tool"), **ROLES, "function_call": "assistant"}
    for role, meaning in roles.items():
        normalized = known.get(role)
        if normalized != synonyms.get(meaning, meaning):
            difference = f"ftdata reads it as {normalized}" if normalized else "ftdata does not support this role"
            problem = f"{where}: role {role!r} means {meaning} in the file, but {difference}"
            hint = "rename the role in the data, or convert rows with a function: schema='./mine.py:convert'"
            raise conversion_error(problem, hint=hint)


def check_setting(where: str, name: str, value: Any, allowed: Collection[Any], hint: str | None = None) -> None:
    """Check that a setting has a value that can be converted.

    Args:
        where: name of the data set; empty for a setting of the whole file.
        name: name of the setting.
        value: value of the setting.
        allowed: values that can be converted.
        hint: how to express another value in ftdata; `None` for the general hint.

    Raises:
        UsageError: `cannot_import`: the value is not allowed.
    """
    if value not in allowed:
        *names, last = [str(item) for item in allowed if item is not None]
        expected = f"{', '.join(names)} or {last}" if names else last
        problem = f"{where and f'{where}: '}{name} is {value!r:.60}, expected {expected}"
        raise conversion_error(problem, **({"hint": hint} if hint else {}))


def conversion_error(
    why: str, *, hint: str = "remove the setting from the file if the training does not need it"
) -> UsageError:
    """Return an error for a setting that cannot be converted to an ftdata setting."""
    return UsageError("cannot_import", why, hint=hint)


def merge_dataset_options(options_by_dataset: Mapping[str, Mapping[str, Any]], draft: Draft) -> None:
    """Copy the options of the data sets to a draft. All data sets must have the same options.

    Args:
        options_by_dataset: name of the data set -> its template, schema, columns and other options.
        draft: the draft that receives the options.

    Raises:
        UsageError: `cannot_import`: the options differ, but a configuration has only one value for each.
    """
    all_options = [dict(options) for options in options_by_dataset.values()]
    names = dict.fromkeys(name for options in all_options for name in options)
    differing = [
        name for name in names if any(options.get(name) != all_options[0].get(name) for options in all_options)
    ]
    if differing:
        values = "; ".join(
            f"{dataset}: " + ", ".join(f"{name} {shorten(str(options.get(name)), 60)}" for name in differing)
            for dataset, options in options_by_dataset.items()
        )
        problem = f"the data sets need different values of {', '.join(differing)} ({values})"
        hint = (
            "import each data set with --dataset, build each configuration with ftdata build FILE -o FOLDER, and set "
            "data to the list of these folders, and packing, in another configuration"
        )
        if draft.fields.get("task", "sft") != "sft":
            hint = "rename the columns in the data files, so that all data sets have the same columns"
        raise conversion_error(problem, hint=hint)
    for name, value in all_options[0].items():
        draft.set_field(name, value)
