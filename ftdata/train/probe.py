"""Does this model keep packed documents apart? Two short forwards tell.

Document B is scored behind document A, and again behind another A of the same length. If the model keeps
documents apart, nothing of B changes.
"""

from __future__ import annotations

from typing import Any

import torch

LEAK = 1e-4
"""Relative change of B's logits above which a model counts as leaking."""


def leak(model: Any, length: int = 20) -> float:
    """Return how much a document changes the one packed behind it: 0 where the model keeps them apart.

    Args:
        model: a causal language model.
        length: tokens of each document.

    Returns:
        The largest change of a logit of B, relative to the largest logit of B.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, rows, (length,), generator=generator) for _ in range(3))
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        behind, behind_other = (_logits(model, before, second) for before in (first, other))
    model.train(was_training)
    return float((behind - behind_other).abs().max() / behind.abs().max().clamp_min(1e-12))


def _logits(model: Any, before: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(len(document)).repeat(2)[None]
    ids = torch.cat((before, document))[None]
    output = model(input_ids=ids.to(model.device), position_ids=positions.to(model.device), use_cache=False)
    return output.logits[0, len(before) :].float()
