"""The model: loaded whole or in 4 bits, in the precision that the device is good at, with its adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ftdata.config import Config
from ftdata.errors import InputRefused, UsageError, describe_exception
from ftdata.train.model import device
from ftdata.train.model.device import compute_dtype
from ftdata.train.model.quantization import Quantization, quantization_config


def weights_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the weights: that of computing under an adapter, float32 where they are trained themselves.

    Steps of a usual learning rate are smaller than bfloat16 can tell, and would be lost.
    """
    return compute_dtype(config.train) if wants_adapter(config) else torch.float32


def load_model_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration alone.

    Raises:
        InputRefused: there is no such model, or it needs code of its own.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise InputRefused(
            "is_adapter",
            f"{name} is an adapter, not a model: training would start without it",
            hint="name the base model, or merge the adapter into it first (ftdata merge)",
        )
    check_weights(Path(name))
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        raise _refused(name, error) from None


def load_model(
    name: str,
    quantization: Quantization = None,
    *,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model from a folder or the hub; weights are read from safetensors alone.

    Args:
        name: a folder, or a hub id.
        quantization: `"nf4"`, `"fp4"`, `"int8"`, fields of `BitsAndBytesConfig`, or `None`.
        dtype: of the weights; `None` takes that of computing here.
        attention: what computes attention, such as `"sdpa"`; `None` leaves it to the model.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        InputRefused: there is no such model, or it needs what is not allowed.
    """
    dtype = dtype or compute_dtype()
    model_config = load_model_config(name, trust_remote_code=trust_remote_code)
    in_bits = quantization_config(quantization, dtype)
    if in_bits is not None and in_bits.llm_int8_skip_modules:
        # Named modules replace those that are never quantized, where they should be added to them.
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
        in_bits.llm_int8_skip_modules = sorted({*in_bits.llm_int8_skip_modules, *embedding_names(shapes)})
    more: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if torch.cuda.is_available() and not device.is_sharded():
        # Where it is asked before it is trained, FlashAttention has to find it.
        more["device_map"] = {"": torch.cuda.current_device()}
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=in_bits,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **more,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, HfHubHTTPError) as error:
        raise _refused(name, error) from None
    if lacking := sorted(told["missing_keys"]):
        found = f"{name} has no weights for {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"
        hint = "they would be random numbers: is this a causal language model, and all of it there?"
        raise InputRefused("missing_weights", found, hint=hint)
    model.generation_config = _savable(model.generation_config)
    if not torch.cuda.is_available():
        for module in model.modules():
            # bitsandbytes repacks 4-bit weights for AVX512-BF16 on the first forward in eval mode, and then
            # they can no longer be trained.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def dequantize(model: Any) -> Any:
    """Return a model in 4 bits on a CPU with its weights as numbers again, where they fit into the memory.

    A CPU unpacks the weights of every layer for every token otherwise. The numbers are the same, and so are the
    answers.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    is_packed = quantizer is not None and getattr(quantizer.quantization_config, "load_in_4bit", False)
    if not is_packed or model.device.type != "cpu":
        return model
    needed = count_parameters(model)[1] * compute_dtype().itemsize
    return model.dequantize() if needed < device.free_memory() / 2 else model


def check_weights(folder: Path) -> None:
    """Refuse weights in a folder that are no safetensors, or that an index looks for elsewhere.

    Raises:
        InputRefused: there are such.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter_model.safetensors").is_file():
        raise _pickled(str(folder))
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
        plain = all(Path(name).name == name and name.endswith(".safetensors") for name in files)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        plain = False
    if not plain:
        found = f"{index} names files that are no safetensors beside it"
        raise InputRefused("weights_index", found, hint="save the model again, or get it from where it was made")


def load_trainer_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer as the trainer takes it.

    Raises:
        InputRefused: it brings Python code of its own, or cannot be loaded.
    """
    try:
        # Left open, transformers would ask on standard input whether to run such code.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _refused(name, error) from None


def _savable(settings: GenerationConfig) -> GenerationConfig:
    """Return settings that can be saved: sampling without `do_sample` is an error, at the end of all the work."""
    tokens = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sampled = copy.deepcopy(settings)
    sampled.do_sample = True
    for candidate in (settings, sampled):
        try:
            candidate.validate(strict=True)
        except ValueError:
            continue
        return candidate
    return GenerationConfig(**tokens)


def _pickled(name: str) -> InputRefused:
    return InputRefused(
        "no_safetensors",
        f"{name} has its weights as pickles, which can run code when they are read",
        hint="convert them to safetensors: load them where you trust them, and save_pretrained",
    )


def _refused(name: str, error: Exception) -> InputRefused:
    what = describe_exception(error, 2_000)
    if "trust_remote_code" in what:
        return InputRefused(
            "remote_code",
            f"{name} brings Python code of its own, which is not run",
            hint="read it, then say trust_remote_code: true (--trust-remote-code)",
        )
    if "safetensors" in what and "bin" in what:
        return _pickled(name)
    hint = "pass a folder with config.json and safetensors, or a hub id"
    return InputRefused("no_model", f"{name} cannot be loaded: {what[:300]}", hint=hint)


def wants_adapter(config: Config) -> bool:
    """Return whether an adapter is trained; quantised weights are never trained without one."""
    return config.lora is not None or config.quantization is not None


def embedding_names(model: Any) -> list[str]:
    """Return the names of the modules that hold input and output embeddings."""
    held = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is one for one in held)]


def fit_vocabulary(model: Any, size: int, tokenizer: Any) -> bool:
    """Make room in the embeddings for tokens that were added to the tokenizer; return whether there are any.

    New rows are drawn around the mean of the others, as `resize_token_embeddings` does (Hewitt 2021), and must be
    trained.

    Args:
        model: a causal language model.
        size: one more than the largest token id in the data.
        tokenizer: a `transformers` tokenizer; its pad token becomes one that the model has.

    Raises:
        UsageError: ids beyond the embeddings are no added tokens: the tokenizer is another model's.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    new = size > rows
    if new:
        added = set(tokenizer.get_added_vocab().values())
        if not added.issuperset(range(rows, size)):
            raise UsageError(
                "vocabulary",
                f"the data holds token id {size - 1}, the model has {rows} embeddings",
                hint="build with the model's own tokenizer",
            )
        size = max(size, len(tokenizer))
        resize_embeddings(model, size)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= max(rows, size):
        # Padding is masked by position, never by id, so sharing a token with EOS costs nothing.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= max(rows, size):
        raise UsageError(
            "pad_token",
            f"the tokenizer has no pad or EOS token among the model's {rows} embeddings",
            hint="name a pad token in tokenizer_config.json that the model has",
        )
    return new


def resize_embeddings(model: Any, size: int) -> None:
    """Give a model so many embeddings; new ones are drawn the same way each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(size)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the number of trainable and of all parameters; a 4-bit weight holds two per byte."""
    trainable = total = 0
    for weight in model.parameters():
        # Packed weights may be stored as wider numbers (`bnb_4bit_quant_storage`).
        count = weight.numel() * (2 * weight.element_size() if weight.__class__.__name__ == "Params4bit" else 1)
        total += count
        trainable += count if weight.requires_grad else 0
    return trainable, total
