"""A configuration in the making: the fields that are known so far, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftdata.errors import UsageError, escape_line_breaks, escape_unprintable, shorten
from ftdata.schemas import ROLES, SPECIAL_ROLES

Rule = str | Callable[[Any], Mapping[str, Any]]
"""Where a value goes, as `lora.r`; or a function that says so of what it finds: such names -> values."""


@dataclass(frozen=True)
class Draft:
    """Fields of a configuration, and notes for the person who takes it over."""

    fields: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any) -> None:
        """Set a field, or one in a section: `lora.r`."""
        section, dot, inner = name.partition(".")
        if dot:
            self.fields.setdefault(section, {})[inner] = value
        else:
            self.fields[name] = value

    def note(self, text: str) -> None:
        """Say something, once."""
        text = shorten(escape_line_breaks(escape_unprintable(text)))
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, slots=True)
class KeyRules:
    """What becomes of the keys of a file.

    Attributes:
        rules: key -> where its value goes.
        same: keys that are fields of `SFTConfig` by the same name.
        left: keys that say how a run goes, not what it learns.
        noted: key -> what is to be said of it.
        refused: key -> why no configuration of ours can say the same.
    """

    rules: Mapping[str, Rule]
    same: Collection[str]
    left: Collection[str]
    noted: Mapping[str, str]
    refused: Mapping[str, str]


def apply_rules(values: Mapping[str, Any], keys: KeyRules, draft: Draft, *, but: Collection[str] = ()) -> None:
    """Put what a file says into a draft, and note what it leaves out.

    Args:
        values: the file.
        keys: what becomes of its keys.
        draft: where to put it.
        but: keys that are seen to elsewhere.

    Raises:
        UsageError: `cannot_import`, for keys that are refused; all of them at once.
    """
    said = {key: value for key, value in values.items() if key not in but and value not in (None, False, "", [], {})}
    if refused := [f"{key}: {keys.refused[key]}" for key in said if key in keys.refused]:
        raise conversion_error("; ".join(refused))
    for key, value in values.items():
        rule = keys.rules.get(key, f"train.{key}" if key in keys.same else None)
        if key in but or value is None or rule is None:
            continue
        for name, one in ({rule: value} if isinstance(rule, str) else rule(value)).items():
            draft.put(name, one)
    for key in said.keys() & keys.noted.keys():
        draft.note(f"{key}: {keys.noted[key]}")
    if left := [key for key in said if key in keys.left]:
        draft.note(f"left out, for they do not change what is learnt: {', '.join(left)}")
    known = {*keys.rules, *keys.same, *keys.left, *keys.noted}
    if unknown := [key for key in said if key not in known]:
        draft.note(f"not known, and left out: {', '.join(unknown)}")


def explicit_settings(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says beside what its tool takes for granted; null says nothing, steps of warmup come first."""
    said = {**usual, **{key: value for key, value in values.items() if value is not None}}
    if "warmup_steps" in said:
        said.pop("warmup_ratio", None)
    return said


def test_size_of(size: Any) -> Mapping[str, Any]:
    """Return the test split that a size asks for: a share below 1, or rows; nothing for 0.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < 1 << 53:
        raise ValueError(f"{size!r} is no size of a split")
    return {"test_size": int(size) if size > 1 else size} if size else {}


def note_unknown_keys(name: str, given: Mapping[str, Any], known: Collection[str], draft: Draft) -> None:
    """Note keys of a data set that nobody knows, and that were passed over there as well."""
    if unknown := [str(key) for key, value in given.items() if key not in known and value not in (None, False)]:
        draft.note(f"{name}: not known, and left out: {', '.join(unknown)}")


def remove_evaluation(draft: Draft) -> None:
    """Take out when to evaluate, where nothing is held out to be evaluated on."""
    train = draft.fields.get("train", {})
    if "test_size" not in draft.fields:
        for name in ("eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model"):
            if train.pop(name, None) not in (None, "no"):
                draft.note(f"{name}: left out, since no rows are held out: test_size says how many")
        draft.fields.pop("early_stopping", None)


def check_roles(roles: Mapping[str, str], where: str) -> None:
    """Refuse roles that a reader of messages would not take for what the file says that they are.

    Args:
        roles: role in the data -> what it stands for.
        where: which data set says so.
    """
    alike = {"observation": "tool", "function": "tool"}
    for found, meant in roles.items():
        taken = ROLES.get(found, "tool" if found in SPECIAL_ROLES else None)
        if taken != alike.get(meant, meant):
            told = f"is {taken} here" if taken else "is a role that nobody knows"
            raise conversion_error(
                f"{where}: {found!r} stands for {meant}, and {told}",
                hint="rename it in the data, or make messages of rows by a function: schema='./mine.py:convert'",
            )


def conversion_error(why: str, *, hint: str = "take it out of the file, and say it in ours by hand") -> UsageError:
    """Return the error for what cannot be carried over."""
    return UsageError("cannot_import", why, hint=hint)


def merge_dataset_options(found: Mapping[str, Mapping[str, Any]], draft: Draft) -> None:
    """Put what all data sets say of their rows into a draft.

    Args:
        found: name of the data set -> what it says of template, schema, columns.
        draft: where to put it.

    Raises:
        UsageError: `cannot_import`: they say different things, and a configuration is of one kind of rows.
    """
    kinds = [dict(one) for one in found.values()]
    if any(one != kinds[0] for one in kinds):
        raise conversion_error(
            f"data sets are of different kinds: {', '.join(found)}",
            hint="import those of a kind by themselves, with --dataset, and train on their builds one after another",
        )
    for name, value in kinds[0].items():
        draft.put(name, value)
