"""The adapter: fields of `peft.LoraConfig`, checked against their types and against the modules of the model."""

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
from ftdata.train.model.quantization import quantization_name

FIXED = {
    "task_type": "the model is a causal language model",
    "peft_type": "it is LORA",
    "auto_mapping": "the model's class is known",
    "peft_version": "PEFT writes its own version",
    "base_model_name_or_path": "it is the model field",
    "revision": "download that revision, and name its folder as model",
    "inference_mode": "the adapter is trained",
    "megatron_config": "models of Megatron are not loaded",
    "megatron_core": "models of Megatron are not loaded",
}
"""Fields of `LoraConfig` that a user may not set -> why."""

_FROM_DATA = ("eva", "corda", "lora_ga", "loftq")
"""Initializations that need a pass over data, or a base model that is quantized by PEFT itself."""

_FROM_WEIGHTS = ("pissa", "orthogonal", "mica")
"""Initializations that PEFT computes from weights in 16 or 32 bits alone."""

_SEVERAL = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")
"""Fields that name modules or parameters of the model."""


def check_lora(config: Config) -> None:
    """Refuse fields of the adapter that `LoraConfig` does not have, or values of another type.

    Raises:
        UsageError: naming the field, and what it takes, or the nearest name.
    """
    if config.lora is None:
        return
    check_fields("lora", _long_names(config.lora), LoraConfig, FIXED)
    _check_start(config, config.lora.more.get("init_lora_weights"))
    name = quantization_name(config.quantization)
    if config.lora.more.get("use_dora") and name == "int8" and not torch.cuda.is_available():
        raise UsageError(
            "train_setting", "lora.use_dora with int8 needs a GPU", hint="use quantization: nf4, or no DoRA"
        )
    _lora_config(config.lora, {})


def _check_start(config: Config, start: Any) -> None:
    """Refuse an initialization of the adapter that a run cannot compute, or not twice in the same way."""
    if not isinstance(start, str):
        return
    why = None
    if start.startswith(_FROM_DATA):
        why = "which needs a pass over data before training"
    elif start.startswith("pissa_niter"):
        why = "which is drawn anew when the adapter is loaded"
    elif config.quantization is not None and start in _FROM_WEIGHTS:
        why = f"which is computed from weights that are not quantized; quantization is {config.quantization!r}"
    if why is not None:
        hint = "use true, gaussian or olora" + ("" if config.quantization else ", orthogonal, pissa or mica")
        raise UsageError("train_setting", f"lora.init_lora_weights is {start!r}, {why}", hint=hint)


def make_lora_config(config: Config, model: Any, *, grows: bool, shapes: bool = False) -> LoraConfig | None:
    """Return the LoRA adapter of a configuration, or `None` where all weights are trained.

    Args:
        config: the run.
        model: the base model.
        grows: whether its embeddings have new tokens, and so are trained and saved whole.
        shapes: whether the model has no weights, so that nothing can be computed from them.

    Raises:
        UsageError: `LoraConfig` refuses.
    """
    if not wants_adapter(config):
        return None
    lora = config.lora or Lora()
    held = embedding_names(model)
    saved = list(dict.fromkeys([*(lora.more.get("modules_to_save") or ()), *(held if grows else ())]))
    own: dict[str, Any] = {"modules_to_save": saved or None}
    if lora.more.get("ensure_weight_tying") is None:
        is_tied = len(held) > 1 and bool(model.config.tie_word_embeddings)
        own["ensure_weight_tying"] = is_tied and not set(held).isdisjoint(saved)
    if shapes:
        own["init_lora_weights"] = True
    return _lora_config(lora, own)


def check_modules(config: Config, model: Any) -> None:
    """Refuse an adapter that names modules or layers that the model lacks, or that PEFT cannot put into it.

    Args:
        config: the run.
        model: the base model, of shapes alone (on the device `meta`); it is changed.

    Raises:
        UsageError: naming the field, what the model lacks, and the nearest name.
    """
    if not wants_adapter(config):
        return
    fields = (config.lora or Lora()).fields()
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    for field in _SEVERAL:
        names = parameters if field == "target_parameters" else modules
        for wanted in _listed(fields.get(field)):
            if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                raise _lacks(config, f"lora.{field}", f"module {wanted!r}", suggest_names(wanted, _last(names)))
    pattern = fields["target_modules"]
    if isinstance(pattern, str) and pattern != "all-linear" and not _any_match(pattern, modules):
        raise _lacks(
            config, "lora.target_modules", f"module that matches {pattern!r}", suggest_names(pattern, _last(modules))
        )
    _check_layers(config, fields.get("layers_to_transform"), model)
    _check_patterns(config, fields, modules)
    _check_tokens(config, fields.get("trainable_token_indices"), model)
    lora = make_lora_config(config, model, grows=False, shapes=True)
    try:
        get_peft_model(model, lora)
    except (ValueError, TypeError, LookupError, RuntimeError, ImportError, NotImplementedError) as error:
        raise UsageError("lora", f"{config.model} takes no such adapter: {describe_exception(error)}") from None


def _check_layers(config: Config, chosen: Any, model: Any) -> None:
    layers = int(model.config.get_text_config().num_hidden_layers)
    for number in chosen if isinstance(chosen, list) else () if chosen is None else (chosen,):
        if not 0 <= number < layers:
            raise _lacks(config, "lora.layers_to_transform", f"layer {number}", f"expected 0 to {layers - 1}")


def _check_patterns(config: Config, fields: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Refuse ranks, alphas and exclusions for modules that the model lacks; PEFT ignores those."""
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in fields.get(field) or ():
            # As PEFT matches them.
            if not _any_match(rf"(?:.*\.)?(?:{pattern})", modules, f"lora.{field}"):
                raise _lacks(config, f"lora.{field}", f"module {pattern!r}", suggest_names(pattern, _last(modules)))
    excluded = fields.get("exclude_modules")
    if isinstance(excluded, str) and not _any_match(excluded, modules, "lora.exclude_modules"):
        raise _lacks(
            config, "lora.exclude_modules", f"module that matches {excluded!r}", suggest_names(excluded, _last(modules))
        )


def _check_tokens(config: Config, chosen: Any, model: Any) -> None:
    tokens = int(model.get_input_embeddings().num_embeddings)
    ids = chain.from_iterable(chosen.values()) if isinstance(chosen, Mapping) else chosen or ()
    for id_ in ids:
        if not 0 <= id_ < tokens:
            raise _lacks(config, "lora.trainable_token_indices", f"token {id_}", f"expected 0 to {tokens - 1}")


def _lacks(config: Config, field: str, what: str, hint: str) -> UsageError:
    return UsageError("lora", f"{field}: {config.model} has no {what}", hint=hint)


def _last(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names} - {str(number) for number in range(1000)}


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else []


def _any_match(pattern: str, names: Iterable[str], field: str = "lora.target_modules") -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        message = f"{field} is {pattern!r}, which is no regular expression: {error}"
        raise UsageError("train_setting", message, hint="list names: target_modules: [q_proj, v_proj]") from None


def _long_names(lora: Lora) -> dict[str, Any]:
    names = {short: long for long, short in LORA_NAMES.items()}
    return {names.get(name, name): value for name, value in lora.fields().items()}


def _lora_config(lora: Lora, own: Mapping[str, Any]) -> LoraConfig:
    given = {name: value for name, value in {**_long_names(lora), **own}.items() if value is not None}
    try:
        with warnings.catch_warnings():
            # PEFT warns of fields that it is going to ignore.
            warnings.simplefilter("error", UserWarning)
            return LoraConfig(**convert_fields(given, LoraConfig), task_type="CAUSAL_LM")
    except (ValueError, TypeError, ImportError, UserWarning) as error:
        raise UsageError(
            "train_setting", f"LoraConfig refuses the lora settings: {describe_exception(error)}"
        ) from None
