"""Does this model keep packed documents apart? Two short forwards tell.

Document B is scored behind document A, and again behind another A of the same length. If the model keeps
documents apart, nothing of B changes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from ftdata.train.model.device import training_precision

LEAK = 1e-4
"""Relative change of B's logits above which a model counts as leaking."""

_LAYERS = 4
_MOST_LAYERS = 12
_MOST_WEIGHTS = 1_500_000_000


def measure_leak(model: Any, length: int = 20) -> float:
    """Return how much a document changes the one packed behind it: 0 where the model keeps them apart.

    Args:
        model: a causal language model.
        length: tokens of each document.

    Returns:
        The largest change of a logit of B, relative to the largest logit of B; infinity where the model cannot be asked
        so at all.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, rows, (length,), generator=generator) for _ in range(3))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), training_precision(model.device, model.dtype):
            behind, behind_other = (_logits(model, before, second) for before in (first, other))
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        # Models of state or convolution refuse packed sequences without the kernels that keep them apart.
        return float("inf")
    finally:
        model.train(was_training)
    return float((behind - behind_other).abs().max() / behind.abs().max().clamp_min(1e-12))


def has_leaking_architecture(config: Any, attention: str | None = None) -> bool | None:
    """Say whether models of a configuration leak, by a model of a few of its layers with weights by chance.

    Returns:
        `None` where such a model cannot be made, or is too large to be made for this.
    """
    more = {"attn_implementation": attention} if attention else {}
    state = torch.get_rng_state()
    try:
        small = _small(config)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(small, **more).num_parameters()
        if size > _MOST_WEIGHTS:
            return None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, **more)
        for weight in model.parameters():
            # Weights as small as models begin with make attention so even that little is seen through it.
            if weight.dim() > 1:
                weight.data.normal_(std=weight.shape[-1] ** -0.5)
        # What is no number tells nothing good.
        return not measure_leak(model) <= LEAK
    except (RuntimeError, ValueError, TypeError, ImportError, AttributeError, LookupError, StrictDataclassError):
        return None
    finally:
        torch.set_rng_state(state)


def _small(config: Any) -> Any:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = getattr(text, "layer_types", None)
    # Layers may be of several kinds: one of each has to be there.
    first = {kind: at for at, kind in reversed(list(enumerate(kinds or ())))}
    layers = min(max([_LAYERS, *(at + 1 for at in first.values())]), _MOST_LAYERS)
    for name, value in (("num_hidden_layers", layers), ("vocab_size", 64)):
        setattr(text, name, min(getattr(text, name, value) or value, value))
    if isinstance(kinds, list) and getattr(text, "layer_types", None) == kinds:
        text.layer_types = kinds[:layers]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, 0)
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
    """Return what TRL's collator gives beside positions, which FlashAttention and kernels of state go by."""
    if "flash" not in str(model.config._attn_implementation):
        return {}
    bounds = torch.tensor([0, len(document), 2 * len(document)], dtype=torch.int32, device=model.device)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": len(document),
        "max_length_k": len(document),
    }
