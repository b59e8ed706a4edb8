"""The model: loaded whole or in 4 bits, in the precision that the device is good at, with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ftdata.config import Config, Lora
from ftdata.errors import InputRefused, MissingDependency, UsageError, one_of

QUANTIZATIONS = ("nf4",)


def precision() -> torch.dtype:
    """Return the dtype to compute in: bfloat16 or float16 on a GPU, float32 without one."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def quantization_config(name: str | None) -> BitsAndBytesConfig | None:
    """Return the configuration of 4-bit NormalFloat with double quantisation (Dettmers et al. 2023), or `None`.

    Raises:
        UsageError: an unknown quantisation.
        MissingDependency: bitsandbytes is not installed.
    """
    if name is None:
        return None
    one_of("quantization", name, QUANTIZATIONS)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingDependency(
            "missing_bitsandbytes", "quantization needs bitsandbytes", hint="pip install bitsandbytes"
        ) from None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=precision()
    )


def load_model(name: str, quantization: str | None) -> Any:
    """Load a causal language model from a folder or the hub.

    Raises:
        InputRefused: there is no such model.
    """
    in_bits = quantization_config(quantization)
    if (Path(name) / "adapter_config.json").is_file():
        raise InputRefused(
            "is_adapter",
            f"{name} is an adapter, not a model: training would start without it",
            hint="name the base model, or merge the adapter into it first",
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=precision(), quantization_config=in_bits)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputRefused(
            "no_model",
            f"{name} cannot be loaded: {str(error).splitlines()[0]}",
            hint="pass a folder with config.json and safetensors, or a hub id",
        ) from None
    settings = model.generation_config
    if any(value not in (None, 1.0, 50) for value in (settings.temperature, settings.top_p, settings.top_k)):
        # Sampling settings without sampling are an error when the model is saved, at the end of all the work.
        settings.do_sample = True
    if not torch.cuda.is_available():
        for module in model.modules():
            # bitsandbytes repacks 4-bit weights for AVX512-BF16 on the first forward in eval mode, and then
            # they can no longer be trained.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def adapter(config: Config) -> LoraConfig | None:
    """Return the LoRA adapter of a configuration; quantised weights are never trained without one."""
    lora = config.lora or (Lora() if config.quantization else None)
    if lora is None:
        return None
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def check_vocabulary(model: Any, size: int, pad_id: int | None) -> None:
    """Refuse token ids that the model has no embedding for, the padding's included.

    Raises:
        UsageError: the largest id is beyond the embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if size > rows:
        raise UsageError(
            "vocabulary",
            f"the data holds token id {size - 1}, the model has {rows} embeddings",
            hint="build with the model's own tokenizer",
        )
    if pad_id is None or pad_id >= rows:
        raise UsageError(
            "pad_token",
            f"the tokenizer's pad token has id {pad_id}, the model has {rows} embeddings",
            hint="name a pad token in tokenizer_config.json that the model has; its EOS will do",
        )


def parameters(model: Any) -> tuple[int, int]:
    """Return the number of trainable and of all parameters; a 4-bit weight holds two per byte."""
    trainable = total = 0
    for weight in model.parameters():
        count = weight.numel() * (2 if weight.__class__.__name__ == "Params4bit" else 1)
        total += count
        trainable += count if weight.requires_grad else 0
    return trainable, total
