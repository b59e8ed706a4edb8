"""Configure the trainers of TRL so that they use the tokens and labels of a build unchanged.

SFTTrainer uses `input_ids`, `labels` and `seq_lengths` unchanged only if it skips its own data preparation and batches
without padding. With other settings, it silently packs again, truncates at 1024 tokens, or lets packed documents attend
to each other. Therefore these settings are fixed, and the first batch is compared with the build before training.
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

from ftdata.config import Config
from ftdata.errors import InternalError, UsageError, check_choice, describe_exception, suggest_names
from ftdata.redaction import redact
from ftdata.train.model.config_fields import ConfigField, check_type, fields_of
from ftdata.train.model.device import compute_dtype, process_count
from ftdata.train.model.load import wants_adapter
from ftdata.train.model.trainer_tasks import TRAINER_TASKS
from ftdata.types import IGNORE_INDEX, SIDES

FIXED = {
    "dataset_kwargs": "the build is already prepared, and must not be prepared again",
    "padding_free": "it depends on the data and on whether packed documents attend to each other",
    "packing": "packing is done in the build (the packing field), where no answer is cut",
    "eval_packing": "packing is done in the build (the packing field), where no answer is cut",
    "max_length": "the length is set in the build (the max_length field), which reports each truncation",
    "truncation_mode": "the length is set in the build (the overlong field), which reports each truncation",
    "shuffle_dataset": "the sampler shuffles the rows; shuffling the data set would break the link to its report",
    "push_to_hub": "upload the finished model with its card instead: hf upload OWNER/NAME out/model",
    "use_liger_kernel": "TRL's fused head already computes the loss without storing all logits",
    "remove_unused_columns": "a build contains only the columns that the collator needs",
    "output_dir": "set the output_dir field outside train",
    "dataloader_drop_last": "no row is dropped",
    "resume_from_checkpoint": "use --resume instead",
    "model_init_kwargs": "the model is loaded before the trainer is created; set attn_implementation and quantization "
    "outside train",
    "trust_remote_code": "set the trust_remote_code field outside train",
    "eos_token": "the template of the build determines the stop tokens",
    "pad_token": "the tokenizer determines the pad token; padding is masked by position",
    "chat_template_path": "the template is set in the build (the template field)",
    "completion_only_loss": "the mask is set in the build (the train_on field)",
    "assistant_only_loss": "the mask is set in the build (the train_on field)",
    "accelerator_config": "rows are distributed over the processes so that none is lost or repeated",
    "average_tokens_across_devices": "every trained token has the same weight in all processes",
    "restore_callback_states_from_checkpoint": "a resumed run restores the state of its callbacks",
    "save_only_model": "a checkpoint without the optimizer's state cannot be resumed",
}
"""SFTConfig field that a user may not set -> reason."""


STRATEGIES = ("random", "group_by_length", "sequential")
"""Orders of the training rows: random, random with rows of similar length together, or sequential."""


_NON_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers", "beta")


def check_settings(settings: Mapping[str, Any], task: str = "sft") -> None:
    """Check that each trainer setting is a valid field of the trainer's configuration that does not change the data.

    Raises:
        UsageError: a setting is fixed, unknown or invalid; the message contains the reason or similar names.
    """
    kind = TRAINER_TASKS[task].config_class
    fields = fields_of(kind)
    for name, value in settings.items():
        if name in FIXED:
            raise UsageError("fixed_setting", f"train.{name} cannot be set: {FIXED[name]}")
        if task == "kto" and name == "precompute_ref_log_probs" and value:
            reason = "KTO compares the answers of each batch, and the batches of each epoch differ"
            raise UsageError("fixed_setting", f"train.{name} cannot be set: {reason}")
        if task == "kto" and name.startswith("per_device_") and name.endswith("_batch_size") and value == 1:
            problem = f"train.{name} is 1, expected at least 2, because KTO compares the answers of a batch"
            raise UsageError("train_setting", problem)
        if name not in fields:
            suggestion = suggest_names(str(name), fields).partition("known: ")[0].strip()
            hint = suggestion or f"see the documentation of TRL's {kind.__name__} for its fields"
            raise UsageError("train_setting", f"{kind.__name__} has no field {name!r}", hint=hint)
        if name == "train_sampling_strategy":
            check_choice(name, value, STRATEGIES)
        if name == "metric_for_best_model" and value is not None:
            check_choice(name, str(value).removeprefix("eval_"), TRAINER_TASKS[task].metrics)
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
    elif name in _NON_NEGATIVE and value < 0:
        expected = "at least 0"
    elif name == "label_smoothing" and not 0 <= value < 0.5:
        expected = "at least 0 and below 0.5"
    elif name.endswith(("_batch_size", "accumulation_steps")) and value < 1:
        expected = "at least 1"
    if expected is not None:
        raise UsageError("train_setting", f"train.{name} is {redact(value)!r}, expected {expected}")
    if name == "max_steps" and value == 0:
        raise UsageError("no_steps", "the run would have 0 steps", hint="set num_train_epochs or max_steps")


def check_devices(settings: Mapping[str, Any]) -> None:
    """Raise an error if a single process can use several GPUs. The trainer would distribute each batch over the GPUs.

    Raises:
        UsageError: several GPUs are visible; the hint contains the command that starts one process per GPU.
    """
    gpus = torch.cuda.device_count()
    if gpus > 1 and process_count() == 1 and not settings.get("use_cpu"):
        hint = f"run accelerate launch --num_processes {gpus} -m ftdata train ..., or set CUDA_VISIBLE_DEVICES=0"
        raise UsageError("several_gpus", f"{gpus} GPUs are visible to a single process", hint=hint)


def make_trainer_config(config: Config, *, isolated: bool, packed: bool, evaluates: bool) -> Any:
    """Create the configuration of a trainer of TRL from default settings, the user's settings and fixed settings.

    The user's settings override the defaults. The fixed settings override all other settings.

    Args:
        config: the configuration of the run.
        isolated: whether documents of a packed sequence do not attend to each other, so that rows are concatenated
            instead of padded.
        packed: whether a row contains several documents; if not, rows of similar length are batched together, the
            longest first, so that a batch that does not fit into memory fails early.
        evaluates: whether there is a test split.

    Raises:
        UsageError: TRL rejects a setting.
    """
    task = TRAINER_TASKS[config.task]
    kind = task.config_class
    gpu = torch.cuda.is_available() and not config.train.get("use_cpu")
    dtype = compute_dtype(config.train)
    default_strategy = "steps" if "eval_steps" in config.train else "epoch"
    strategy = config.train.get("eval_strategy", default_strategy if evaluates else "no")
    if not evaluates and str(strategy) != "no":
        message = f"eval_strategy is {strategy!r}, but there is no test split"
        raise UsageError("no_test_split", message, hint="set test_size")
    stops_early = config.early_stopping is not None
    if stops_early and (not evaluates or strategy == "no"):
        message = "early_stopping needs evaluations during training"
        raise UsageError("early_stopping", message, hint="set test_size, or use data with a test split")
    best = {"load_best_model_at_end": True, "save_strategy": strategy} if stops_early else {}
    if stops_early and "eval_steps" in config.train:
        best["save_steps"] = config.train["eval_steps"]
    defaults: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 10,
        "logging_first_step": True,
        # A NaN or infinite loss must be logged, not replaced by the mean of the other losses.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if "save_steps" in config.train else "epoch",
        "save_total_limit": 2,
        "eval_strategy": strategy,
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
        "learning_rate": task.adapter_learning_rate if wants_adapter(config) else task.learning_rate,
        **best,
    }
    if str(config.train.get("metric_for_best_model", "")).endswith("perplexity"):
        # The trainer maximizes every metric that is not named a loss.
        defaults["greater_is_better"] = False
    fixed = {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        # For other tasks, `run_without_padding` removes the padding.
        "padding_free": isolated and config.task == "sft",
        "packing": False,
        "max_length": None,
        "shuffle_dataset": False,
        # The trainers would remove columns of pairs and of images.
        "remove_unused_columns": False,
        "output_dir": config.output_dir,
        "average_tokens_across_devices": True,
        # A resumed run must know for how many evaluations the metric has not improved.
        "restore_callback_states_from_checkpoint": stops_early,
    }
    known = fields_of(kind).keys()
    try:
        settings = kind(**{name: value for name, value in (defaults | config.train | fixed).items() if name in known})
        # Otherwise, a missing integration fails only when the trainer is created, after the model is loaded.
        get_reporting_integration_callbacks(settings.report_to)
        settings.get_process_log_level()
    except Exception as error:  # noqa: BLE001  (an invalid value can raise any exception in other libraries)
        message = f"{kind.__name__} rejects the train settings: {describe_exception(error, 2_000)}"
        raise UsageError("train_setting", message) from None
    return settings


def check_first_batch(trainer: Any, *, padding_free: bool) -> None:
    """Check that the trainer's first batch contains the data of the build. Restore the random generators afterwards.

    Raises:
        InternalError: tokens, labels, document boundaries or masks differ from the build.
    """
    with _restore_random_states():
        indices = list(iter(trainer._get_train_sampler()))[: trainer.args.train_batch_size]
        rows = [trainer.train_dataset[index] for index in indices]
        batch = trainer.data_collator([dict(row) for row in rows])
    if "chosen_ids" in rows[0]:
        compare = _compare_pairs
    elif "label" in rows[0]:
        compare = _compare_labeled
    else:
        compare = _compare_concatenated if padding_free else _compare_padded
    problems = list(compare(batch, rows))
    if problems:
        raise InternalError("hand_over", f"the trainer's first batch has {'; '.join(problems)}")


def _compare_concatenated(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    lengths = np.concatenate([row["seq_lengths"] for row in rows])
    starts = np.cumsum(lengths) - lengths
    labels = np.concatenate([row["labels"] for row in rows])
    # The first token of a document has no context, so it cannot be predicted.
    labels[starts] = IGNORE_INDEX
    yield from _compare("tokens", batch["input_ids"][0], np.concatenate([row["input_ids"] for row in rows]))
    yield from _compare("labels", batch["labels"][0], labels)
    if not np.array_equal(np.flatnonzero(batch["position_ids"][0].numpy() == 0), starts):
        yield f"document boundaries that differ from the {len(starts)} boundaries of the build"
    if "attention_mask" in batch:
        yield "an attention mask, which would override the document boundaries"


def _compare_padded(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        yield from _compare("tokens", batch["input_ids"][index][:size], np.asarray(row["input_ids"]))
        yield from _compare("labels", batch["labels"][index][:size], np.asarray(row["labels"]))
        mask = batch["attention_mask"][index]
        if int(mask.sum()) != size or int(mask[:size].sum()) != size:
            yield "unmasked padding"
        if bool((batch["labels"][index][size:] != IGNORE_INDEX).any()):
            yield "trained padding"


def _compare_pairs(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for index, (side, row) in enumerate((side, row) for side in SIDES for row in rows):
        trained = np.pad(np.asarray(row[f"{side}_labels"]) != IGNORE_INDEX, (len(row["prompt_ids"]), 0))
        yield from _compare_document(batch, index, [*row["prompt_ids"], *row[f"{side}_ids"]], trained)


def _compare_labeled(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for index, row in enumerate(rows):
        trained = np.asarray(row["labels"]) != IGNORE_INDEX
        yield from _compare_document(batch, index, row["input_ids"], trained)
        if bool(batch["label"][index]) != row["label"]:
            yield "a label of an answer that differs from the build"


def _compare_document(
    batch: Mapping[str, Any], index: int, ids: Sequence[int], trained: NDArray[np.bool_]
) -> Iterator[str]:
    width = batch["input_ids"].shape[1]
    yield from _compare("tokens", batch["input_ids"][index][: len(ids)], np.asarray(ids))
    mask = np.pad(trained, (0, width - len(ids)))
    # The batches of a reward model have no mask.
    if "completion_mask" in batch and not np.array_equal(batch["completion_mask"][index].numpy() != 0, mask):
        yield "labels that differ from the build"
    if not np.array_equal(batch["attention_mask"][index].numpy(), np.arange(width) < len(ids)):
        yield "unmasked padding"


def _compare(kind: str, actual: torch.Tensor, expected: NDArray[Any]) -> Iterator[str]:
    if not np.array_equal(actual.numpy()[: len(expected)], expected):
        trained = (actual.numpy() != IGNORE_INDEX).sum(), (expected != IGNORE_INDEX).sum()
        counts = f" ({trained[0]} are trained, {trained[1]} in the build)" if kind == "labels" else ""
        yield f"{kind} that differ from the build{counts}"


@contextmanager
def _restore_random_states() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002  (the trainer uses the global state)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002  (as above)
