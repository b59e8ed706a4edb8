"""Merge the adapter of a finished run into the base model. The weights are added in float32, then rounded once."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftdata.errors import InputRefused, UsageError, check_choice, describe_exception
from ftdata.tokenizing.tokenizer import Tokenizer, find_control_tokens
from ftdata.train.inference.generation import max_positions
from ftdata.train.inference.run_dir import LOGIT_TOLERANCES, FinishedRun, load_base_model, load_tuned_model
from ftdata.train.model.load import load_model_config
from ftdata.train.model.vision import PROCESSOR_FILES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LIMITS = {name: LOGIT_TOLERANCES[dtype] for name, dtype in DTYPES.items()}
"""Maximum difference between the logits of a merged model and of its adapter, relative to the largest logit."""

_TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969, 3 people flew to the moon; 2 of them walked on it.\n"
    "def add(a, b):\n    return a + b  # 1 + 1 = 2\n"
)
"""Ordinary text, whose tokens occur in the training data of every model."""

_TOKENIZER_FILES = ("tokenizer", "special_tokens", "chat_template", "added_tokens", "vocab", "merges", *PROCESSOR_FILES)


@dataclass(frozen=True, slots=True)
class MergedModel:
    """A saved model whose weights are the sum of the base model and the adapter.

    Attributes:
        folder: folder of the model.
        dtype: dtype of the weights: `float32`, `bfloat16` or `float16`.
        error: the largest difference between the logits of the merged model and the logits of the base model with the
            adapter, computed in float32 and divided by the largest logit. Control tokens are excluded.
        limit: the error above which the model is not written.
    """

    folder: Path
    dtype: str
    error: float
    limit: float


def merge_into_base(run: FinishedRun, target: Path, dtype: str | None = None) -> MergedModel:
    """Merge the adapter of a run into the base model, and save a model that needs neither ftdata nor PEFT.

    Args:
        run: a finished run with an adapter.
        target: the new folder.
        dtype: dtype of the merged weights; `None` keeps the dtype of the base model.

    Raises:
        UsageError: the run has no adapter, or the folder is not empty.
        InputRefused: the merged model differs from the adapter by more than the limit; nothing is written.
    """
    if not run.metadata["adapter"]:
        raise UsageError("no_adapter", f"{run.model} is a full model: it has no adapter to merge")
    if target.exists() and any(target.iterdir()):
        raise UsageError("target_exists", f"the output folder {target} is not empty", hint="choose another folder")
    dtype = dtype or _dtype_of(run)
    check_choice("dtype", dtype, DTYPES)
    merged, error = _merge(run, DTYPES[dtype])
    if not error <= LIMITS[dtype]:
        keep = "use the adapter without merging"
        hint = keep if dtype == "float32" else "merge with --dtype float32, or use the adapter without merging"
        message = f"merging in {dtype} changes a logit by {error:.2g} times the largest logit"
        raise InputRefused("merge_error", f"{message}, expected at most {LIMITS[dtype]:g}", hint=hint)
    if run.task != "reward":
        merged.generation_config = run.generation_config
    target.mkdir(parents=True, exist_ok=True)
    merged.to(DTYPES[dtype]).save_pretrained(target, safe_serialization=True)
    for path in run.model.iterdir():
        if path.name.startswith(_TOKENIZER_FILES):
            shutil.copy(path, target / path.name)
    return MergedModel(target, dtype, error, LIMITS[dtype])


def _merge(run: FinishedRun, dtype: torch.dtype) -> tuple[Any, float]:
    """Merge the adapter, and round each weight to a value of `dtype`. Return the model and its error in logits."""
    ids, ordinary = _find_ordinary_tokens(run.tokenizer, str(run.metadata["options"]["template"]["source"]))
    try:
        # 4-bit weights cannot represent the merged values, and 16 bits would round every sum and every activation.
        model = load_tuned_model(run, load_base_model(run, dtype=torch.float32)).float()
        before = _logits(model, ids, ordinary)
        merged = model.merge_and_unload(safe_merge=True)
        for weight in merged.parameters():
            weight.data = weight.data.to(dtype).float()
        after = _logits(merged, ids, ordinary)
    except torch.OutOfMemoryError:
        hint = "merge on the CPU: CUDA_VISIBLE_DEVICES= ftdata merge ..."
        message = f"the model of {run.folder} does not fit on the GPU in float32"
        raise InputRefused("out_of_memory", message, hint=hint) from None
    except ValueError as error:
        # PEFT rejects weights that are NaN or infinite, and adapter types that cannot be merged.
        message = f"the adapter {run.model} cannot be merged: {describe_exception(error)}"
        raise InputRefused("merge_error", message) from None
    error_ratio = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
    return merged, error_ratio if math.isfinite(error_ratio) else math.inf


def _dtype_of(run: FinishedRun) -> str:
    config = load_model_config(run.metadata["setup"]["model"], trust_remote_code=run.trust_remote_code)
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _find_ordinary_tokens(tokenizer: Tokenizer, template: str) -> tuple[list[int], torch.Tensor]:
    """Return the token ids of a sample text, and a mask that is false for control tokens (bool `[vocabulary]`)."""
    control = set(find_control_tokens(tokenizer, template).ids.tolist())
    control |= {id_ for id_, is_special in tokenizer.added_tokens.values() if is_special}
    ids = [id_ for id_ in tokenizer.encode([_TEXT]).ids.tolist() if id_ not in control]
    ordinary = torch.ones(tokenizer.size, dtype=torch.bool)
    ordinary[[id_ for id_ in control if id_ < tokenizer.size]] = False
    return ids or [id_ for id_ in range(tokenizer.size) if id_ not in control][:32], ordinary


def _logits(model: Any, ids: list[int], ordinary: torch.Tensor) -> torch.Tensor:
    """Compute a model's logits for a token sequence. Leave out the logits of control tokens (float32, on the CPU)."""
    model.eval()
    with torch.inference_mode():
        inputs = torch.tensor([ids[: max_positions(model)]]).to(model.device)
        logits = model(input_ids=inputs, use_cache=False).logits[0].float().cpu()
    if logits.ndim == 1:
        return logits  # the reward of a reward model
    # The embedding matrix may be padded with rows that belong to no token.
    return logits[:, : len(ordinary)][:, ordinary[: logits.shape[1]]]
