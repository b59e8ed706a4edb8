"""Test whether the documents of a packed sequence attend to each other.

Documents of text: the logits of document B are computed after document A, and again after another document of the same
length. Documents with images: the logits of packed documents are compared with the logits of each document alone. If
the documents do not attend to each other, the logits are equal except for rounding errors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ftdata.errors import FtdataError, InputRefused, describe_exception
from ftdata.train.model.device import training_precision
from ftdata.train.model.trainer_tasks import find_model_class
from ftdata.train.model.vision import REFERENCES_COLUMN, ImageCollator, register_mrope_hook

LEAK = 1e-4
"""Relative change of the logits of B above which a model leaks."""

_ROUNDING, _HALF_ROUNDING = 1e-4, 0.05
"""The largest relative change of a logit that rounding errors explain, in float32 and in 16-bit dtypes."""

_LAYERS = 4
_MAX_LAYERS = 12
_VISION_LAYERS = 2
_MAX_WEIGHTS = 1_500_000_000


def measure_leak(model: Any, length: int = 20) -> float:
    """Measure how much a document changes the logits of the next document in a packed sequence.

    If the documents are isolated, the result is 0.

    Args:
        model: a causal language model.
        length: number of tokens of each document.

    Returns:
        The largest change of a logit of B, relative to the largest logit of B; infinity if the model does not support
        packed sequences.
    """
    vocabulary_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, alternative, second = (torch.randint(0, vocabulary_size, (length,), generator=generator) for _ in range(3))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), training_precision(model.device, model.dtype):
            logits, other_logits = (_logits(model, before, second) for before in (first, alternative))
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        # State-space and convolution models reject packed sequences if their kernels are not installed.
        return float("inf")
    finally:
        model.train(was_training)
    return float((logits - other_logits).abs().max() / logits.abs().max().clamp_min(1e-12))


def mixes_packed_images(model: Any, collator: ImageCollator, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Test whether packed documents with images attend to each other.

    In some models, packed documents attend to each other only if they have images: with transformers 5.24, the
    attention mask of Gemma 3 shows the images of the first document to all documents.

    Args:
        model: a vision-language model.
        collator: makes a batch of one packed sequence.
        rows: rows of a build that have images.

    Returns:
        Whether the logits of documents change by more than rounding errors if they are packed together.

    Raises:
        InputRefused: `image_features`, if the model rejects the images.
    """
    split = [document for row in rows for document in _split_documents(row) if document[REFERENCES_COLUMN]]
    # Two documents with images, and a document without images between them.
    documents = [split[0], split[-1]]
    text = [id_ for id_ in split[0]["input_ids"] if id_ != collator.preprocessor.feature_id]
    documents.insert(1, {"input_ids": text, "labels": text, "seq_lengths": [len(text)], REFERENCES_COLUMN: []})
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), training_precision(model.device, model.dtype):
            alone = torch.cat([_image_logits(model, collator([document])) for document in documents])
            packed = _image_logits(model, collator(documents))
    except FtdataError:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        problem = f"the model rejects the images of the build: {describe_exception(error, 500)}"
        hint = "build the data with the tokenizer and the image processor of the model"
        raise InputRefused("image_features", problem, hint=hint) from None
    finally:
        model.train(was_training)
    change = float((packed - alone).abs().max() / alone.abs().max().clamp_min(1e-12))
    return not change <= (_ROUNDING if model.dtype is torch.float32 else _HALF_ROUNDING)


def _split_documents(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the documents of a packed sequence as rows."""
    bounds = [0, *accumulate(row["seq_lengths"])]
    return [
        {
            "input_ids": row["input_ids"][start:end],
            "labels": row["labels"][start:end],
            "seq_lengths": [end - start],
            REFERENCES_COLUMN: [image for image in row[REFERENCES_COLUMN] if image["document"] == number],
        }
        for number, (start, end) in enumerate(pairwise(bounds))
    ]


def _image_logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[0].float()
    return logits


def has_leaking_architecture(config: Any, attention: str | None = None) -> bool | None:
    """Test whether packed documents attend to each other in a model architecture.

    The test uses a model with few layers and random weights.

    Returns:
        Whether the documents attend to each other, or `None` if the test model cannot be created or is too large.
    """
    options = {"attn_implementation": attention} if attention else {}
    state = torch.get_rng_state()
    try:
        small = _small(config)
        model_class = find_model_class("sft", small)
        with torch.device("meta"):
            size = model_class.from_config(small, **options).num_parameters()
        if size > _MAX_WEIGHTS:
            return None
        torch.manual_seed(0)
        model = model_class.from_config(small, dtype=torch.float32, **options)
        register_mrope_hook(model)
        for weight in model.parameters():
            # With the usual small initial weights, attention is almost uniform and a leak would be hard to measure.
            if weight.dim() > 1:
                weight.data.normal_(std=weight.shape[-1] ** -0.5)
        # The comparison is negated so that NaN counts as a leak.
        return not measure_leak(model) <= LEAK
    except (RuntimeError, ValueError, TypeError, ImportError, AttributeError, LookupError, StrictDataclassError):
        return None
    finally:
        torch.set_rng_state(state)


def _small(config: Any) -> Any:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = getattr(text, "layer_types", None)
    # The small model needs a layer of each kind.
    first = {kind: index for index, kind in reversed(list(enumerate(kinds or ())))}
    layers = min(max([_LAYERS, *(index + 1 for index in first.values())]), _MAX_LAYERS)
    for name, value in (("num_hidden_layers", layers), ("vocab_size", 64)):
        setattr(text, name, min(getattr(text, name, value) or value, value))
    if isinstance(kinds, list) and getattr(text, "layer_types", None) == kinds:
        text.layer_types = kinds[:layers]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, 0)
    for name in ("num_hidden_layers", "depth"):
        if hasattr(vision := getattr(small, "vision_config", None), name):
            setattr(vision, name, min(getattr(vision, name), _VISION_LAYERS))
    return small


def _logits(model: Any, before: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(len(document)).repeat(2)[None]
    ids = torch.cat((before, document))[None]
    output = model(
        input_ids=ids.to(model.device),
        position_ids=positions.to(model.device),
        use_cache=False,
        **_bounds(model, document),
    )
    return output.logits[0, len(before) :].float()


def _bounds(model: Any, document: torch.Tensor) -> dict[str, Any]:
    """Return the document boundaries as keyword arguments for FlashAttention, as TRL's collator passes them.

    The dict is empty if the model does not use FlashAttention.
    """
    if "flash" not in str(model.config._attn_implementation):
        return {}
    bounds = torch.tensor([0, len(document), 2 * len(document)], dtype=torch.int32, device=model.device)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": len(document),
        "max_length_k": len(document),
    }
