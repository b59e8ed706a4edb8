"""Quantization: `nf4`, `fp4`, `int8`, or fields of `BitsAndBytesConfig`; its configuration, its name, its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ftdata.errors import MissingDependency, UsageError, check_choice
from ftdata.train.model.config_fields import check_fields, convert_fields

QUANTIZATIONS: Mapping[str, Mapping[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""Name -> fields of `BitsAndBytesConfig`: 4-bit types with double quantization (Dettmers et al. 2023), LLM.int8()."""

Quantization = str | dict[str, Any] | None

_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights per scale, and scales per scale of scales, as bitsandbytes chooses them."""


def quantization_config(chosen: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the configuration of a quantization, or `None`.

    Args:
        chosen: a name, or fields of `BitsAndBytesConfig`.
        dtype: of the computation, unless a field says otherwise.

    Raises:
        UsageError: an unknown name or field, or a value of another type.
        MissingDependency: bitsandbytes is not installed.
    """
    if chosen is None:
        return None
    fields = _fields(chosen)
    try:
        import bitsandbytes  # noqa: F401  (is it there?)
    except ImportError:
        raise MissingDependency(
            "missing_bitsandbytes", "quantization needs bitsandbytes", hint="pip install bitsandbytes"
        ) from None
    if fields.get("load_in_4bit"):
        fields = {"bnb_4bit_compute_dtype": dtype, **fields}
    try:
        return BitsAndBytesConfig(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError("train_setting", f"BitsAndBytesConfig refuses the quantization: {error}") from None


def quantization_name(chosen: Quantization) -> str | None:
    """Return the short name of a quantization: `nf4`, `fp4`, `int8`, or `None`."""
    if chosen is None or isinstance(chosen, str):
        return chosen
    return "int8" if chosen.get("load_in_8bit") else str(chosen.get("bnb_4bit_quant_type", "fp4"))


def bytes_per_weight(chosen: Quantization) -> float:
    """Return the bytes of a quantized weight with its share of the scales.

    >>> bytes_per_weight("int8"), bytes_per_weight({"load_in_4bit": True})
    (1.0, 0.5625)
    """
    fields = _fields(chosen or "nf4")
    if fields.get("load_in_8bit"):
        return 1.0
    nested = 1 / _BLOCK + 4 / (_BLOCK * _NESTED_BLOCK)
    return 0.5 + (nested if fields.get("bnb_4bit_use_double_quant") else 4 / _BLOCK)


def skipped_modules(chosen: Quantization) -> tuple[str, ...]:
    """Return the names of the modules that are not quantized, besides the output embeddings."""
    return tuple(chosen.get("llm_int8_skip_modules") or ()) if isinstance(chosen, dict) else ()


def _fields(chosen: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(chosen, str):
        check_choice("quantization", chosen, QUANTIZATIONS)
        return dict(QUANTIZATIONS[chosen])
    check_fields("quantization", chosen, BitsAndBytesConfig, {})
    if bool(chosen.get("load_in_4bit")) == bool(chosen.get("load_in_8bit")):
        found = "both" if chosen.get("load_in_4bit") else "neither"
        raise UsageError(
            "train_setting",
            f"quantization sets {found} of load_in_4bit and load_in_8bit, expected one of them",
            hint="add load_in_4bit: true, or use a name: nf4, fp4, int8",
        )
    return convert_fields({name: value for name, value in chosen.items() if value is not None}, BitsAndBytesConfig)
