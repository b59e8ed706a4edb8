"""Generate: token ids of prompts to token ids of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_GREEDY = {"max_new_tokens": 256, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def generate(model: Any, prompts: Sequence[Sequence[int]], *, batch_size: int = 16, **options: Any) -> list[list[int]]:
    """Return the ids that the model answers to each prompt, up to and without its stop token.

    Args:
        model: a causal language model; its generation config says where it stops and what pads on the left.
        prompts: token ids.
        batch_size: prompts generated together.
        options: further arguments of `model.generate`.
    """
    stops, pad_id = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    stop_ids = set(stops if isinstance(stops, list) else [stops])
    answers: list[list[int]] = []
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(prompts), batch_size):
            batch = prompts[at : at + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[pad_id] * (width - len(one)) + list(one) for one in batch])
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                **{**_GREEDY, "pad_token_id": pad_id, **options},
            )
            answers.extend(until_stop(one, stop_ids) for one in output[:, width:].tolist())
    model.train(was_training)
    return answers


def until_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Return the ids before the first stop."""
    return ids[: next((at for at, id_ in enumerate(ids) if id_ in stops), len(ids))]
