"""The hand-over: rows of a build -> `SFTTrainer`, with the only settings that keep their labels as they are.

SFTTrainer takes `input_ids, labels, seq_lengths` untouched when it is told to skip its own preparation and to
batch without padding; with other settings it packs again, cuts at 1024 tokens, or lets packed documents see
each other, without a word. So these settings are fixed, and the first batch is compared before the first step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig

from ftdata.config import Config
from ftdata.errors import InternalError, UsageError, check_choice, describe_exception, suggest_names
from ftdata.redaction import redact
from ftdata.train.model.config_fields import ConfigField, check_type, fields_of
from ftdata.train.model.device import compute_dtype, process_count
from ftdata.train.model.load import wants_adapter
from ftdata.types import IGNORE_INDEX

FIXED = {
    "dataset_kwargs": "the data is prepared already, and must not be prepared again",
    "padding_free": "follows from the data and from what the model can keep apart",
    "packing": "packing is done in the build (the packing field), where no answer is cut",
    "eval_packing": "packing is done in the build (the packing field), where no answer is cut",
    "max_length": "length is decided in the build (the max_length field), where every cut is reported",
    "truncation_mode": "length is decided in the build (the overlong field), where every cut is reported",
    "shuffle_dataset": "the sampler shuffles; shuffling the data set as well would detach it from its report",
    "push_to_hub": "a model is uploaded with its card when it is finished: hf upload OWNER/NAME out/model",
    "use_liger_kernel": "TRL's own head computes the loss without all logits",
    "remove_unused_columns": "the collator takes the columns of the build, and no others are in it",
    "output_dir": "it has a field of its own",
    "dataloader_drop_last": "no row is dropped",
    "resume_from_checkpoint": "resuming has a switch of its own (--resume)",
    "model_init_kwargs": "the model is loaded before the trainer sees it; attn_implementation and quantization are "
    "fields of their own",
    "trust_remote_code": "it has a field of its own, outside train",
    "eos_token": "the stop is decided by the template that the data was built with",
    "pad_token": "padding is masked by position; the tokenizer says what it is",
    "chat_template_path": "the template is decided in the build (the template field)",
    "completion_only_loss": "the mask is decided in the build (the train_on field)",
    "assistant_only_loss": "the mask is decided in the build (the train_on field)",
    "accelerator_config": "rows are given to processes so that none is lost or stands twice",
    "average_tokens_across_devices": "every trained token weighs the same, whichever process has it",
    "restore_callback_states_from_checkpoint": "a run that goes on is the one that was begun",
    "save_only_model": "a checkpoint without the optimizer's state cannot be resumed",
}
"""SFTConfig fields that a user may not set -> why."""


STRATEGIES = ("random", "group_by_length", "sequential")
"""Orders of rows: by chance, by chance with those of like length together, as they stand."""


METRICS = ("loss", "perplexity")
"""What an evaluation tells."""


_NOT_BELOW_0 = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that would undo the build, that `SFTConfig` does not have, or that have another type.

    Raises:
        UsageError: naming the setting, and why, or what is near.
    """
    fields = fields_of(SFTConfig)
    for name, value in settings.items():
        if name in FIXED:
            raise UsageError("fixed_setting", f"train.{name} cannot be set: {FIXED[name]}")
        if name not in fields:
            near = suggest_names(str(name), fields).partition("known: ")[0].strip()
            hint = near or "see TRL's SFTConfig for its fields"
            raise UsageError("train_setting", f"SFTConfig has no field {name!r}", hint=hint)
        if name == "train_sampling_strategy":
            check_choice(name, value, STRATEGIES)
        if name == "metric_for_best_model" and value is not None:
            check_choice(name, str(value).removeprefix("eval_"), METRICS)
        if fields[name].is_number:
            _check_number(name, value, fields[name])
        else:
            check_type("train", name, value, fields[name])


def _check_number(name: str, value: Any, field: ConfigField) -> None:
    if value is None and field.optional:
        return
    expected = None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        expected = "a number"
    elif isinstance(value, float) and not field.takes_fractions:
        expected = "a whole number"
    elif name in ("seed", "data_seed") and not 0 <= value < 1 << 32:
        expected = f"0 to {(1 << 32) - 1}"
    elif name in _NOT_BELOW_0 and value < 0:
        expected = "at least 0"
    elif name.endswith(("_batch_size", "accumulation_steps")) and value < 1:
        expected = "at least 1"
    if expected is not None:
        raise UsageError("train_setting", f"train.{name} is {redact(value)!r}, expected {expected}")
    if name == "max_steps" and value == 0:
        raise UsageError("no_steps", "there is nothing to train: 0 steps", hint="set num_train_epochs or max_steps")


def check_devices(settings: Mapping[str, Any]) -> None:
    """Refuse one process that sees several GPUs: the trainer would split batches over them in a way of its own.

    Raises:
        UsageError: with the command for one process each.
    """
    gpus = torch.cuda.device_count()
    if gpus > 1 and process_count() == 1 and not settings.get("use_cpu"):
        raise UsageError(
            "several_gpus",
            f"one process sees {gpus} GPUs",
            hint=f"accelerate launch --num_processes {gpus} -m ftdata train ..., or CUDA_VISIBLE_DEVICES=0",
        )


def make_sft_config(config: Config, *, isolated: bool, packed: bool, evaluates: bool) -> SFTConfig:
    """Return the trainer's settings: sensible ones, over them the user's, over them those that keep the labels.

    Args:
        config: the run.
        isolated: whether the model keeps packed documents apart, so that rows are joined instead of padded.
        packed: whether rows hold several documents; if not, rows of like length go together, the longest first, so
            that a batch that does not fit shows at once.
        evaluates: whether there is a test split.

    Raises:
        UsageError: `SFTConfig` refuses.
    """
    gpu = torch.cuda.is_available() and not config.train.get("use_cpu")
    dtype = compute_dtype(config.train)
    often = config.train.get("eval_strategy", "epoch" if evaluates else "no")
    if not evaluates and str(often) != "no":
        raise UsageError("no_test_split", f"eval_strategy is {often!r}, and nothing is held out", hint="set test_size")
    stops_early = config.early_stopping is not None
    if stops_early and (not evaluates or often == "no"):
        raise UsageError("early_stopping", "early_stopping needs evaluations", hint="set test_size, or name a split")
    best = {"load_best_model_at_end": True, "save_strategy": often} if stops_early else {}
    if stops_early and "eval_steps" in config.train:
        best["save_steps"] = config.train["eval_steps"]
    defaults: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 10,
        "logging_first_step": True,
        # A loss that is no number is to be seen, not replaced by the mean of the others.
        "logging_nan_inf_filter": False,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "eval_strategy": often,
        "prediction_loss_only": True,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "random" if packed else "group_by_length",
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "activation_checkpointing": gpu,
        "disable_tqdm": True,
        **({"optim": "paged_adamw_32bit"} if gpu and config.quantization else {}),
        # A step of full fine-tuning moves all weights; an adapter begins at nothing.
        "learning_rate": 2e-4 if wants_adapter(config) else 2e-5,
        **best,
    }
    if str(config.train.get("metric_for_best_model", "")).endswith("perplexity"):
        # Of what is not called a loss, the trainer takes the largest for the best.
        defaults["greater_is_better"] = False
    fixed = {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "padding_free": isolated,
        "packing": False,
        "max_length": None,
        "shuffle_dataset": False,
        "remove_unused_columns": True,
        "output_dir": config.output_dir,
        "average_tokens_across_devices": True,
        # How long it is since anything got better is a part of where a run is.
        "restore_callback_states_from_checkpoint": stops_early,
    }
    try:
        found = SFTConfig(**{**defaults, **config.train, **fixed})
        # It would be asked for when the trainer is made, after the model was loaded.
        get_reporting_integration_callbacks(found.report_to)
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(
            "train_setting", f"SFTConfig refuses the train settings: {describe_exception(error, 2_000)}"
        ) from None
    return found


def check_first_batch(trainer: Any, *, padding_free: bool) -> None:
    """Compare the first batch, as the model would get it, with the build; random states are left as they were.

    Raises:
        InternalError: tokens, labels, document boundaries or masks are not what the build holds.
    """
    with _same_randomness():
        indices = list(iter(trainer._get_train_sampler()))[: trainer.args.train_batch_size]
        rows = [trainer.train_dataset[index] for index in indices]
        batch = trainer.data_collator([dict(row) for row in rows])
    problems = list((_joined if padding_free else _padded)(batch, rows))
    if problems:
        raise InternalError("hand_over", f"the trainer's first batch has {'; '.join(problems)}")


def _joined(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    lengths = np.concatenate([row["seq_lengths"] for row in rows])
    starts = np.cumsum(lengths) - lengths
    labels = np.concatenate([row["labels"] for row in rows])
    # The first token of a document has nothing before it to be predicted from.
    labels[starts] = IGNORE_INDEX
    yield from _other("tokens", batch["input_ids"][0], np.concatenate([row["input_ids"] for row in rows]))
    yield from _other("labels", batch["labels"][0], labels)
    if not np.array_equal(np.flatnonzero(batch["position_ids"][0].numpy() == 0), starts):
        yield f"other document boundaries than the build's {len(starts)}"
    if "attention_mask" in batch:
        yield "an attention mask, which would hide the document boundaries"


def _padded(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for at, row in enumerate(rows):
        size = len(row["input_ids"])
        yield from _other("tokens", batch["input_ids"][at][:size], np.asarray(row["input_ids"]))
        yield from _other("labels", batch["labels"][at][:size], np.asarray(row["labels"]))
        if int(batch["attention_mask"][at].sum()) != size or int(batch["attention_mask"][at][:size].sum()) != size:
            yield "padding that is not masked"
        if bool((batch["labels"][at][size:] != IGNORE_INDEX).any()):
            yield "padding that is trained"


def _other(what: str, found: torch.Tensor, expected: NDArray[Any]) -> Iterator[str]:
    if not np.array_equal(found.numpy()[: len(expected)], expected):
        trained = (found.numpy() != IGNORE_INDEX).sum(), (expected != IGNORE_INDEX).sum()
        counted = f" ({trained[0]} trained, the build has {trained[1]})" if what == "labels" else ""
        yield f"other {what} than the build{counted}"


@contextmanager
def _same_randomness() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002  (the trainer uses the global state)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002  (as above)
