"""Validate the LoRA settings of a run, and create the `peft.LoraConfig`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from ftdata.config import LORA_NAMES, Config, Lora
from ftdata.errors import UsageError, describe_exception, suggest_names
from ftdata.train.model.config_fields import check_fields, convert_fields
from ftdata.train.model.load import embedding_names, wants_adapter
from ftdata.train.model.quantization import quantization_name, skipped_modules
from ftdata.train.model.trainer_tasks import is_vision_model
from ftdata.train.model.vision import language_model_exclusion

FIXED = {
    "task_type": "the task field determines it",
    "peft_type": "it is always LORA",
    "auto_mapping": "PEFT determines it from the class of the model",
    "peft_version": "PEFT sets it to its version",
    "base_model_name_or_path": "set the model field instead",
    "revision": "download the revision, and pass its folder as model",
    "inference_mode": "the adapter is always trained",
    "megatron_config": "Megatron models are not supported",
    "megatron_core": "Megatron models are not supported",
}
"""Field of `LoraConfig` that a user may not set -> reason."""

_FROM_DATA = ("eva", "corda", "lora_ga", "loftq")
"""Initializations that need a pass over the data, or a base model that PEFT quantizes itself."""

_FROM_WEIGHTS = ("pissa", "orthogonal", "mica")
"""Initializations that PEFT can compute only from weights in 16 or 32 bits."""

_MODULE_FIELDS = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")
"""Fields that name modules or parameters of the model."""


def check_lora(config: Config) -> None:
    """Check that each LoRA setting is a field of `LoraConfig` and has a value of the right type.

    Raises:
        UsageError: a field is unknown, fixed or invalid; the message contains the expected type or similar names.
    """
    if config.lora is None:
        return
    check_fields("lora", _long_names(config.lora), LoraConfig, FIXED)
    _check_initialization(config, config.lora.extra_fields.get("init_lora_weights"))
    name = quantization_name(config.quantization)
    if config.lora.extra_fields.get("use_dora") and name == "int8" and not torch.cuda.is_available():
        message = "lora.use_dora with int8 quantization needs a GPU"
        raise UsageError("train_setting", message, hint="set quantization: nf4, or remove use_dora")
    _lora_config(config, {})


def _check_initialization(config: Config, method: Any) -> None:
    """Raise an error if a run cannot compute or cannot reproduce the adapter's initial weights."""
    if not isinstance(method, str):
        return
    reason = None
    if method.startswith(_FROM_DATA):
        reason = "which needs a pass over the data before training"
    elif method.startswith("pissa_niter"):
        reason = "which computes different random values when the adapter is loaded again"
    elif config.quantization is not None and method in _FROM_WEIGHTS:
        reason = f"which needs weights that are not quantized; quantization is {config.quantization!r}"
    if reason is not None:
        hint = "use true, gaussian or olora" + ("" if config.quantization else ", orthogonal, pissa or mica")
        raise UsageError("train_setting", f"lora.init_lora_weights is {method!r}, {reason}", hint=hint)


def make_lora_config(config: Config, model: Any, *, grows: bool, shapes: bool = False) -> LoraConfig | None:
    """Return the LoRA configuration of a run, or `None` if all weights are trained.

    Args:
        config: the configuration of the run.
        model: the base model.
        grows: whether its embeddings contain new tokens; if so, the embeddings are trained and saved in full.
        shapes: whether the model has no weights (device `meta`), so an initialization cannot use them.

    Raises:
        UsageError: `LoraConfig` rejects a field.
    """
    if not wants_adapter(config):
        return None
    lora = config.lora or Lora()
    embeddings = embedding_names(model)
    saved = list(dict.fromkeys([*(lora.extra_fields.get("modules_to_save") or ()), *(embeddings if grows else ())]))
    overrides: dict[str, Any] = {"modules_to_save": saved or None}
    if lora.extra_fields.get("ensure_weight_tying") is None:
        is_tied = len(embeddings) > 1 and bool(model.config.tie_word_embeddings)
        overrides["ensure_weight_tying"] = is_tied and not set(embeddings).isdisjoint(saved)
    if is_vision_model(model.config) and lora.extra_fields.get("exclude_modules") is None:
        overrides["exclude_modules"] = language_model_exclusion(model)
    if shapes:
        overrides["init_lora_weights"] = True
    return _lora_config(config, overrides)


def check_modules(config: Config, model: Any) -> None:
    """Check that all modules and layers in the LoRA settings exist in the model, and that PEFT can add the adapter.

    Args:
        config: the configuration of the run.
        model: the base model without weights (device `meta`); it is modified.

    Raises:
        UsageError: the model has no such module, layer or token; the message contains the field and similar names.
    """
    skipped = skipped_modules(config.quantization)
    modules = [name for name, _ in model.named_modules() if name]
    _check_names(config, "quantization.llm_int8_skip_modules", skipped, modules)
    if not wants_adapter(config):
        return
    fields = (config.lora or Lora()).fields()
    parameters = [name for name, _ in model.named_parameters()]
    for field in _MODULE_FIELDS:
        names = parameters if field == "target_parameters" else modules
        _check_names(config, f"lora.{field}", _list_or_empty(fields.get(field)), names)
    pattern = fields["target_modules"]
    if isinstance(pattern, str) and pattern != "all-linear" and not _any_match(pattern, modules):
        known = _last_parts(modules)
        suggestion = f"pass a list: [{pattern}]" if pattern in known else suggest_names(pattern, known)
        raise _missing_error(config, "lora.target_modules", f"module that matches {pattern!r}", suggestion)
    layers = int(model.config.get_text_config().num_hidden_layers)
    _check_numbers(config, "layers_to_transform", "layer", fields.get("layers_to_transform"), layers)
    _check_patterns(config, fields, modules)
    tokens = int(model.get_input_embeddings().num_embeddings)
    _check_numbers(config, "trainable_token_indices", "token", fields.get("trainable_token_indices"), tokens)
    lora = make_lora_config(config, model, grows=False, shapes=True)
    try:
        get_peft_model(model, lora)
    except Exception as error:  # noqa: BLE001  (an invalid value can raise any exception in PEFT)
        message = f"the adapter cannot be added to {config.model}: {describe_exception(error)}"
        raise UsageError("lora", message) from None


def _check_names(config: Config, field: str, targets: Iterable[str], names: Sequence[str]) -> None:
    """Raise an error if a LoRA field lists a module or parameter that does not exist in the model."""
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            suggestion = suggest_names(target, _last_parts(names))
            raise _missing_error(config, field, f"module {target!r}", suggestion)


def _check_numbers(config: Config, field: str, noun: str, numbers: Any, size: int) -> None:
    """Raise an error if a LoRA field contains the number of a layer or token that does not exist in the model."""
    values = chain.from_iterable(numbers.values()) if isinstance(numbers, Mapping) else numbers
    for number in values if isinstance(values, Iterable) else () if values is None else (values,):
        if not 0 <= number < size:
            raise _missing_error(config, f"lora.{field}", f"{noun} {number}", f"expected 0 to {size - 1}")


def _check_patterns(config: Config, fields: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Raise an error if a module pattern in the LoRA settings matches no module. PEFT would ignore this pattern."""
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in fields.get(field) or ():
            # PEFT matches the pattern in the same way.
            if not _any_match(rf"(?:.*\.)?(?:{pattern})", modules, f"lora.{field}"):
                suggestion = suggest_names(pattern, _last_parts(modules))
                raise _missing_error(config, f"lora.{field}", f"module {pattern!r}", suggestion)
    excluded = fields.get("exclude_modules")
    if isinstance(excluded, str) and not _any_match(excluded, modules, "lora.exclude_modules"):
        suggestion = suggest_names(excluded, _last_parts(modules))
        raise _missing_error(config, "lora.exclude_modules", f"module that matches {excluded!r}", suggestion)


def _missing_error(config: Config, field: str, name: str, hint: str) -> UsageError:
    return UsageError("lora", f"{field}: {config.model} has no {name}", hint=hint)


def _last_parts(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names} - {str(number) for number in range(1000)}


def _list_or_empty(value: Any) -> list[str]:
    return value if isinstance(value, list) else []


def _any_match(pattern: str, names: Iterable[str], field: str = "lora.target_modules") -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        message = f"{field} is {pattern!r}, which is not a valid regular expression: {error}"
        hint = "pass a list of names: target_modules: [q_proj, v_proj]"
        raise UsageError("train_setting", message, hint=hint) from None


def _long_names(lora: Lora) -> dict[str, Any]:
    names = {short: long for long, short in LORA_NAMES.items()}
    return {names.get(name, name): value for name, value in lora.fields().items()}


def _lora_config(config: Config, overrides: Mapping[str, Any]) -> LoraConfig:
    values = {**_long_names(config.lora or Lora()), **overrides}
    fields = {name: value for name, value in values.items() if value is not None}
    # PEFT trains and saves the layer of a reward model that computes the reward.
    task_type = "SEQ_CLS" if config.task == "reward" else "CAUSAL_LM"
    try:
        with warnings.catch_warnings():
            # PEFT warns about fields that it ignores.
            warnings.simplefilter("error", UserWarning)
            return LoraConfig(**convert_fields(fields, LoraConfig), task_type=task_type)
    except (ValueError, TypeError, ImportError, UserWarning) as error:
        message = f"LoraConfig rejects the lora settings: {describe_exception(error)}"
        raise UsageError("train_setting", message) from None
