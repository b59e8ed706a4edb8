"""Run models on batches without their padding, although the trainer passes padded batches."""

from __future__ import annotations

import functools
import types
from typing import Any

_TOKEN_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
"""Fields of TRL's `FusedCausalLMOutput` with one number per predicted token."""


def run_without_padding(model: Any) -> None:
    """Make a model with TRL's fused head process the tokens of a batch as one sequence, without the padding.

    The position ids restart at each row, which separates the rows. The model must support this (`measure_leak`). The
    outputs have the shapes of the padded batch, with 0 for padding, so the trainer does not notice the difference.
    """
    forward = model.forward

    # Accelerate follows `__wrapped__` to restore the forward method of the class after the training.
    @functools.wraps(type(model).forward)
    def forward_without_padding(_: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head") or kwargs.get("attention_mask") is None:
            return forward(*args, **kwargs)
        mask = kwargs.pop("attention_mask").bool()
        positions = mask.long().cumsum(1) - 1
        batch = {"input_ids": kwargs["input_ids"], "labels": kwargs["labels"], "position_ids": positions}
        output = forward(*args, **{**kwargs, **{name: tensor[mask][None] for name, tensor in batch.items()}})
        # The outputs are shifted: they belong to the second and later tokens of a sequence. The output for the first
        # token of a row comes from the row before, and is left out.
        is_predicted, is_kept = mask[:, 1:], positions[mask][1:] > 0
        for name in _TOKEN_FIELDS:
            if (values := output.get(name)) is not None:
                kept = values[0][is_kept]
                output[name] = values.new_zeros(is_predicted.shape).masked_scatter(is_predicted, kept)
        return output

    model.forward = types.MethodType(forward_without_padding, model)
