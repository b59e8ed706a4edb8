"""Convert the settings of Axolotl for rated answers: DPO, IPO, KTO and reward models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftdata.importers.draft import Draft, check_setting, conversion_error

PREFERENCE_KEYS = {
    "rl_beta": "beta", "dpo_beta": "beta", "dpo_label_smoothing": "label_smoothing", "dpo_loss_type": "loss_type",
    "dpo_loss_weights": "loss_weights", "dpo_use_weighting": "use_weighting",
    "kto_desirable_weight": "desirable_weight", "kto_undesirable_weight": "undesirable_weight",
}  # fmt: skip
"""Setting of preference training -> field of `DPOConfig` or `KTOConfig`."""

_PAIR_COLUMNS: Mapping[str, dict[str, str]] = {
    "default": {}, "intel": {"prompt": "question"}, "icr": {"prompt": "input"}, "prompt_pairs": {}, "ultra": {},
    "argilla_chat": {},
}  # fmt: skip
"""Name of a format of preference pairs -> the columns that it reads."""

_LABELED_COLUMNS: Mapping[str, dict[str, str]] = {
    "argilla": {"prompt": "instruction"}, "intel": {"prompt": "question"}, "prompt_pairs": {}, "ultra": {},
}  # fmt: skip
"""Name of a format of labeled answers -> the columns that it reads."""


def convert_method(values: Mapping[str, Any], draft: Draft) -> None:
    """Convert the keys `rl` and `reward_model`, which select the training method, and their settings."""
    method = values.get("rl")
    check_setting("", "rl", method, (None, "dpo", "ipo", "kto"), "ftdata does not support this training method")
    if not is_rated(values):
        return
    draft.set_field("task", {None: "reward", "kto": "kto"}.get(method, "preference"))
    if draft.fields.pop("packing", None):
        draft.add_note("sample_packing: left out, because rated answers are not packed")
    if method is None:
        return
    if method == "ipo":
        draft.set_field("train.loss_type", ["ipo"])
    for key, field in PREFERENCE_KEYS.items():
        if values.get(key) is None:
            continue
        if key.startswith("dpo_" if method == "kto" else "kto_"):
            draft.add_note(f"{key}: left out, because it does not apply to rl: {method}")
        else:
            draft.set_field(f"train.{field}", values[key])
    draft.add_note("rl: Axolotl trains all text after the prompt; ftdata trains only what the assistant generates")


def is_rated(values: Mapping[str, Any]) -> bool:
    """Return whether the data sets of a file contain rated answers."""
    return bool(values.get("rl") or values.get("reward_model"))


def read_rated_format(info: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, str], Mapping[str, Any]]:
    """Return the columns of a data set with rated answers, and the setting that selects its template.

    Raises:
        UsageError: `cannot_import`, if ftdata has no equivalent for the type of the data set.
    """
    kind, path, method = str(info.get("type")), str(info["path"]), values.get("rl")
    if method is None:
        check_setting(path, "type", kind, ("bradley_terry.chat_template",))
        return {"prompt": "input"}, info
    formats = _LABELED_COLUMNS if method == "kto" else _PAIR_COLUMNS
    if kind == "chat_template.default" and method != "kto":
        fields = {"messages": "field_messages", "chosen": "field_chosen", "rejected": "field_rejected"}
        return {field: str(info[key]) for field, key in fields.items() if info.get(key, field) != field}, info
    family, _, name = kind.partition(".")
    name = name or "default"
    if family not in ("chatml", "llama3") or name not in formats:
        known = [*(f"chatml.{name}" for name in formats), *([] if method == "kto" else ["chat_template.default"])]
        hint = f"known: {', '.join(known)}"
        raise conversion_error(f"{path}: ftdata has no equivalent for the data set type {kind}", hint=hint)
    return formats[name], {"chat_template": family}
