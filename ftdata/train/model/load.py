"""Load models, model configurations and tokenizers, check weight files, and resize embeddings."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from ftdata.config import Config
from ftdata.errors import InputRefused, UsageError, describe_exception
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.train.model import device
from ftdata.train.model.device import compute_dtype
from ftdata.train.model.quantization import Quantization, quantization_config
from ftdata.train.model.trainer_tasks import find_model_class
from ftdata.train.model.vision import register_mrope_hook

_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def weights_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the base model's weights: the compute dtype if they are frozen, float32 if they are trained.

    With a usual learning rate, most updates are too small for the precision of bfloat16 and would be lost.
    """
    return compute_dtype(config.train) if wants_adapter(config) else torch.float32


def load_model_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the `transformers` configuration of a model from a folder or the Hub.

    Raises:
        InputRefused: the model does not exist, is an adapter, or needs remote code.
    """
    if (Path(name) / "adapter_config.json").is_file():
        hint = "pass the base model, or merge the adapter into it first (ftdata merge)"
        raise InputRefused("is_adapter", f"{name} is an adapter, not a model", hint=hint)
    check_weights(Path(name))
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        raise _load_error(name, error) from None


def load_model(
    name: str,
    quantization: Quantization = None,
    *,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    task: str = "sft",
) -> Any:
    """Load a causal language model, a vision-language model or a reward model. The weights must be safetensors.

    Args:
        name: a folder or a Hub id.
        quantization: `"nf4"`, `"fp4"`, `"int8"`, fields of `BitsAndBytesConfig`, or `None`.
        dtype: dtype of the weights; `None` selects the compute dtype of this device.
        attention: the attention implementation, such as `"sdpa"`; `None` selects the default of the model.
        trust_remote_code: whether Python code that comes with the model may run.
        task: `"reward"` loads a model with a linear layer that computes one number. If the files do not contain this
            layer, its weights are random.

    Raises:
        InputRefused: the model does not exist or is incomplete, has no safetensors, or needs remote code.
    """
    dtype = dtype or compute_dtype()
    model_config = load_model_config(name, trust_remote_code=trust_remote_code)
    kind = find_model_class(task, model_config)
    quantized = quantization_config(quantization, dtype)
    if quantized is not None and quantized.llm_int8_skip_modules:
        # transformers replaces its default modules with this list. The embeddings must stay unquantized.
        with torch.device("meta"):
            shapes = kind.from_config(model_config, trust_remote_code=trust_remote_code)
        quantized.llm_int8_skip_modules = sorted({*quantized.llm_int8_skip_modules, *embedding_names(shapes)})
    options = {"dtype": dtype, "quantization_config": quantized, "trust_remote_code": trust_remote_code}
    options |= {"attn_implementation": attention} if attention else {}
    options |= {"num_labels": 1} if task == "reward" else {}
    if torch.cuda.is_available() and not device.is_sharded():
        # The isolation probe runs before training, and FlashAttention needs the model on the GPU.
        options["device_map"] = {"": torch.cuda.current_device()}
    try:
        model, loading_info = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, HfHubHTTPError) as error:
        raise _load_error(name, error) from None
    if missing := sorted(key for key in loading_info["missing_keys"] if task != "reward" or key not in _REWARD_LAYER):
        message = f"{name} has no weights for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        hint = "check that this is a causal language model, and that all files are complete"
        raise InputRefused("missing_weights", message, hint=hint)
    if task != "reward":
        model.generation_config = _make_savable(model.generation_config)
    if not torch.cuda.is_available():
        for module in model.modules():
            # bitsandbytes repacks 4-bit weights for AVX512-BF16 in the first forward pass in eval mode, and repacked
            # weights do not support training.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    register_mrope_hook(model)
    return model


_REWARD_LAYER = ("score.weight", "classifier.weight", "classifier.bias")
"""Names of the weights that a reward model has in addition to a language model."""


def dequantize(model: Any) -> Any:
    """Dequantize a 4-bit model on a CPU if the dequantized weights fit into memory. Return the model.

    A CPU otherwise dequantizes the weights of every layer for every token, which is slow. The weights have the same
    values, so the answers are the same.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    is_packed = quantizer is not None and getattr(quantizer.quantization_config, "load_in_4bit", False)
    if not is_packed or model.device.type != "cpu":
        return model
    needed = count_parameters(model)[1] * compute_dtype().itemsize
    return model.dequantize() if needed < device.free_memory() / 2 else model


def check_weights(folder: Path) -> None:
    """Check that a folder's weights are safetensors, and that the weight index refers only to files in the folder.

    Raises:
        InputRefused: the weights are pickles, or the index refers to other files.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter_model.safetensors").is_file():
        raise _pickle_error(str(folder))
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
        is_safe = all(Path(name).name == name and name.endswith(".safetensors") for name in files)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_safe = False
    if not is_safe:
        message = f"{index} refers to files that are not safetensors or are not in the same folder"
        raise InputRefused("weights_index", message, hint="save the model again, or download it from its source")


def load_trainer_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the `transformers` tokenizer for the trainer.

    A tokenizer without `tokenizer.json` is converted by ftdata, because `transformers` converts some of them to a
    tokenizer with other ids.

    Raises:
        InputRefused: the tokenizer needs remote code, or cannot be loaded.
    """
    loaded = load_tokenizer(name)
    if loaded.is_converted:
        backend = tokenizers.Tokenizer.from_buffer(loaded.json)
        template = loaded.chat_template
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **loaded.special_tokens)
    try:
        # Without an explicit value, transformers prompts on standard input whether to run remote code.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _load_error(name, error) from None


def copy_sentencepiece_files(tokenizer: Tokenizer, target: Path) -> None:
    """Replace the saved tokenizer by the original files if `tokenizer.json` cannot represent it exactly."""
    if tokenizer.sentencepiece is None or tokenizer.folder is None:
        return
    (target / "tokenizer.json").unlink(missing_ok=True)
    for name in _CONFIG_FILES:
        # The existence of a configuration determines how texts are encoded.
        (target / name).unlink(missing_ok=True)
        if (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, target / name)
    for file in tokenizer.folder.glob("tokenizer.model*"):
        shutil.copyfile(file, target / file.name)


def _make_savable(settings: GenerationConfig) -> GenerationConfig:
    """Return a generation config that `transformers` can save.

    A config with sampling options cannot be saved unless `do_sample` is true.
    """
    tokens = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sampled = copy.deepcopy(settings)
    sampled.do_sample = True
    for candidate in (settings, sampled):
        with suppress(ValueError):
            candidate.validate(strict=True)
            return candidate
    return GenerationConfig(**tokens)


def _pickle_error(name: str) -> InputRefused:
    message = f"the weights of {name} are pickles, which can run code when they are loaded"
    hint = "convert them to safetensors: load them on a machine that you can trust, and call save_pretrained"
    return InputRefused("no_safetensors", message, hint=hint)


def _load_error(name: str, error: Exception) -> InputRefused:
    description = describe_exception(error, 2_000)
    if "trust_remote_code" in description:
        hint = "read the code, then set trust_remote_code: true (--trust-remote-code)"
        return InputRefused("remote_code", f"{name} contains Python code, which is not run by default", hint=hint)
    if "safetensors" in description and "bin" in description:
        return _pickle_error(name)
    hint = "pass a folder with config.json and safetensors, or a Hub id"
    return InputRefused("no_model", f"{name} cannot be loaded: {description[:300]}", hint=hint)


def wants_adapter(config: Config) -> bool:
    """Return whether a run trains an adapter. Quantized weights always need an adapter."""
    return config.lora is not None or config.quantization is not None


def embedding_names(model: Any) -> list[str]:
    """Return the module names of the input embeddings and the output embeddings, such as `embed_tokens`."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    modules = model.named_modules()
    return [name.rpartition(".")[2] for name, module in modules if any(module is layer for layer in embeddings)]


def fit_vocabulary(model: Any, size: int, tokenizer: Any) -> bool:
    """Add embeddings for the tokens that were added to the tokenizer. Return whether embeddings were added.

    `resize_token_embeddings` samples the new rows around the mean of the old rows (Hewitt 2021). They must be trained.

    Args:
        model: a causal language model.
        size: the largest token id in the data plus one.
        tokenizer: a `transformers` tokenizer; if the model does not have its pad token, it is set to the EOS token.

    Raises:
        UsageError: ids beyond the embeddings are not added tokens, so the tokenizer does not belong to the model; or
            the model has neither the pad token nor the EOS token.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    is_enlarged = size > rows
    if is_enlarged:
        added = set(tokenizer.get_added_vocab().values())
        if not added.issuperset(range(rows, size)):
            message = f"the data contains token id {size - 1}, but the model has only {rows} embeddings"
            raise UsageError("vocabulary", message, hint="build with the model's tokenizer")
        size = max(size, len(tokenizer))
        resize_embeddings(model, size)
    embedded = range(max(rows, size))
    if tokenizer.pad_token_id not in embedded:
        # Padding is masked by position, not by id, so the EOS token can also be the pad token.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id not in embedded:
        message = f"the model has {rows} embeddings, but no embedding for the tokenizer's pad token or EOS token"
        hint = "in tokenizer_config.json, set a pad token that has an embedding in the model"
        raise UsageError("pad_token", message, hint=hint)
    return is_enlarged


def resize_embeddings(model: Any, size: int) -> None:
    """Resize the embeddings of a model. New embeddings are initialized with a fixed random seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(size)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the number of trainable parameters and the number of all parameters.

    Each byte of packed 4-bit weights counts as two parameters.
    """
    trainable = total = 0
    for weight in model.parameters():
        # Packed weights may be stored in a wider dtype (`bnb_4bit_quant_storage`).
        count = weight.numel() * (2 * weight.element_size() if weight.__class__.__name__ == "Params4bit" else 1)
        total += count
        trainable += count if weight.requires_grad else 0
    return trainable, total
