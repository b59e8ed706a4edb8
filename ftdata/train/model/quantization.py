"""Create the bitsandbytes configuration for quantized models: `nf4`, `fp4`, `int8`, or custom fields."""

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
"""Default block sizes of bitsandbytes: weights per scale, and scales per scale in double quantization."""


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes configuration for a quantization setting, or `None` for an unquantized model.

    Args:
        quantization: a name, or fields of `BitsAndBytesConfig`.
        dtype: compute dtype, unless a field sets it.

    Raises:
        UsageError: a name or field is unknown, or a value has the wrong type.
        MissingDependency: bitsandbytes is not installed.
    """
    if quantization is None:
        return None
    fields = _fields(quantization)
    try:
        import bitsandbytes  # noqa: F401  (checks that it is installed)
    except ImportError:
        message = "quantization needs the package bitsandbytes"
        raise MissingDependency("missing_bitsandbytes", message, hint="pip install bitsandbytes") from None
    if fields.get("load_in_4bit"):
        fields = {"bnb_4bit_compute_dtype": dtype, **fields}
    try:
        return BitsAndBytesConfig(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError("train_setting", f"BitsAndBytesConfig rejects the quantization fields: {error}") from None


def quantization_name(quantization: Quantization) -> str | None:
    """Return the short name of a quantization setting: `nf4`, `fp4`, `int8`, or `None`."""
    if quantization is None or isinstance(quantization, str):
        return quantization
    return "int8" if quantization.get("load_in_8bit") else str(quantization.get("bnb_4bit_quant_type", "fp4"))


def bytes_per_weight(quantization: Quantization) -> float:
    """Return the memory per quantized weight in bytes, including the quantization scales.

    >>> bytes_per_weight("int8"), bytes_per_weight({"load_in_4bit": True})
    (1.0, 0.5625)
    """
    fields = _fields(quantization or "nf4")
    if fields.get("load_in_8bit"):
        return 1.0
    nested = 1 / _BLOCK + 4 / (_BLOCK * _NESTED_BLOCK)
    return 0.5 + (nested if fields.get("bnb_4bit_use_double_quant") else 4 / _BLOCK)


def skipped_modules(quantization: Quantization) -> tuple[str, ...]:
    """Return the names of modules that the user excludes from quantization.

    The output embeddings are never quantized.
    """
    return tuple(quantization.get("llm_int8_skip_modules") or ()) if isinstance(quantization, dict) else ()


def _fields(quantization: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(quantization, str):
        check_choice("quantization", quantization, QUANTIZATIONS)
        return dict(QUANTIZATIONS[quantization])
    check_fields("quantization", quantization, BitsAndBytesConfig, {})
    if bool(quantization.get("load_in_4bit")) == bool(quantization.get("load_in_8bit")):
        state = "both" if quantization.get("load_in_4bit") else "neither"
        message = f"quantization sets {state} of load_in_4bit and load_in_8bit, but exactly one must be set"
        raise UsageError("train_setting", message, hint="set load_in_4bit: true, or use a name: nf4, fp4, int8")
    fields = {name: value for name, value in quantization.items() if value is not None}
    return convert_fields(fields, BitsAndBytesConfig)
