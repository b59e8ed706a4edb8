"""Run a training: build the data, load the model, check the data and the model, train, and save."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError  # torch raises it for a pickle that could run code
from typing import Any

import datasets
import torch
from msgspec import structs
from peft import PeftModel
from rich.console import Console
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ftdata.build.dataset import write_build
from ftdata.build.store import read_manifest
from ftdata.config import Config, to_yaml
from ftdata.errors import FtdataError, InputRefused, UsageError, check_choice, describe_exception
from ftdata.options import TASKS, select_options
from ftdata.pipeline.recipe import Options, resolve_task
from ftdata.readers import resolve_sources
from ftdata.spelling import spell_options
from ftdata.templates import Template
from ftdata.templates.python_template import is_python_template
from ftdata.tokenizing.load import load_tokenizer
from ftdata.train import checkpoints
from ftdata.train.dataset import TrainingData, find_rows_with_images, open_training_data
from ftdata.train.model import device
from ftdata.train.model.adapter import check_lora, make_lora_config
from ftdata.train.model.estimate import Estimate, check_adapter, check_memory, count_split, estimate_run
from ftdata.train.model.isolation_probe import LEAK, has_leaking_architecture, measure_leak, mixes_packed_images
from ftdata.train.model.load import fit_vocabulary, load_model, load_model_config, load_trainer_tokenizer, weights_dtype
from ftdata.train.model.quantization import quantization_config
from ftdata.train.model.trainer_tasks import TRAINER_TASKS, is_vision_model
from ftdata.train.model.vision import (
    REFERENCES_COLUMN,
    find_worker_error,
    freeze_vision,
    make_image_collator,
)
from ftdata.train.runs.callbacks import TrainingProgressCallback, make_sample_callback
from ftdata.train.runs.finish import finish_run, set_stop_tokens
from ftdata.train.runs.preference_trainers import (
    DPORunTrainer,
    KTORunTrainer,
    LabelCollator,
    PairCollator,
    RewardRunTrainer,
)
from ftdata.train.runs.trainer import BuildTrainer, RunTrainer
from ftdata.train.runs.trainer_arguments import check_devices, check_first_batch, check_settings, make_trainer_config
from ftdata.train.runs.unpadding import run_without_padding

_TRAINERS: dict[str, tuple[type[RunTrainer], Callable[[int], Any] | None]] = {
    "sft": (BuildTrainer, None),
    "dpo": (DPORunTrainer, PairCollator),
    "reward": (RewardRunTrainer, partial(PairCollator, for_rewards=True)),
    "kto": (KTORunTrainer, LabelCollator),
}
"""Task -> trainer, and its collator, which is created from the id of the pad token; `None` for TRL's collator."""


def train_model(config: Config, build: Path | None, *, resume: bool = False, notes: Sequence[str] = ()) -> Path:
    """Train a model, save it, and plot the loss.

    Args:
        config: the configuration of the run.
        build: the finished build, or `None` to build `config.data` into the run directory first.
        resume: whether to resume from the last intact checkpoint.
        notes: notes to print before the run starts.

    Raises:
        UsageError: a setting is not allowed, the run exists, another process is training in the folder, or the folder
            contains no run to resume.
        InputRefused: the build is damaged or was built with another tokenizer; the settings or the data differ from the
            resumed run; packed documents attend to each other; or the model does not fit into memory.
    """
    check_devices(config.train)
    # Only the main process prints.
    console = Console(stderr=True, quiet=not device.is_main_process())
    run = Path(config.output_dir)
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    config = _resolve_config(config, build)
    model_config = _check_config(config)
    with checkpoints.lock_run(run) if device.is_main_process() else nullcontext():
        return _train_in(run, config, model_config, build, console, resume=resume)


def _train_in(
    run: Path, config: Config, model_config: Any, build: Path | None, console: Console, *, resume: bool
) -> Path:
    """Train, save and plot in a run directory that this training has locked; see `train_model`."""
    before = checkpoints.check_run_folder(run, config, device.process_count(), resume=resume)
    for skipped in before.skipped if before else ():
        console.print(f"skipped {run.name}/{skipped}", style="yellow", highlight=False, markup=False)
    data = open_training_data(build or _build_data(config, run, before, console), str(config.tokenizer))
    _check_images(config, model_config, data)
    estimate = _estimate(config, model_config, data, isolated=config.task == "sft")
    console.print(str(estimate), highlight=False, markup=False, soft_wrap=True)
    check_memory(estimate)
    if before and before.step > estimate.steps:
        problem = (
            f"the run in {run} has already trained {before.step:,} steps, but the settings allow {estimate.steps:,}"
        )
        raise UsageError("run_too_long", problem, hint="resume with at least as many epochs or steps")
    device.wait_for_processes()
    if device.is_main_process():
        checkpoints.begin_run(run, config, data.manifest["fingerprint"], device.process_count(), before)
        saved = config if data.folder == run / "data" else structs.replace(config, data=str(data.folder))
        (run / "config.yaml").write_text(to_yaml(saved, redacted=True), encoding="utf-8")
    device.wait_for_processes()
    trainer = _prepare_trainer(config, data, run, console)
    progress = TrainingProgressCallback(console)
    trainer.add_callback(progress)
    try:
        if before and before.is_done(estimate.steps, config.early_stopping):
            trainer.load_checkpoint(before.checkpoint)
            note = f"the run has already trained all {before.step:,} steps; the model is evaluated and saved again"
            console.print(note, highlight=False, markup=False, soft_wrap=True)
        else:
            _train(trainer, before)
    except torch.OutOfMemoryError:
        raise InputRefused(
            "out_of_memory",
            f"{config.model} does not fit into the memory of {device.device_name()} with this batch size",
            hint="reduce per_device_train_batch_size and increase gradient_accumulation_steps, reduce max_length, "
            "enable gradient_checkpointing, or set quantization: nf4",
        ) from None
    except UnpicklingError as error:
        raise InputRefused(
            "unsafe_checkpoint",
            f"{before.checkpoint if before else run} contains a pickle file that is not a trainer state: "
            f"{describe_exception(error, 200)}",
            hint="do not resume from this checkpoint: loading it may run code",
        ) from None
    except KeyboardInterrupt:
        progress.stop()
        console.print(f"resume with: ftdata train {run} --resume", highlight=False, markup=False, soft_wrap=True)
        raise
    finally:
        progress.stop()
    return finish_run(trainer, config, data, run, console, estimate)


def _train(trainer: RunTrainer, before: checkpoints.PreviousRun | None) -> None:
    """Train the model. Report an exception before the end of the first step as an invalid setting.

    Raises:
        UsageError: other libraries reject a setting.
    """
    try:
        trainer.train(resume_from_checkpoint=before.checkpoint if before else None)
    except (FtdataError, OSError, MemoryError, UnpicklingError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if worker_error := find_worker_error(error):
            raise worker_error from None
        if before or trainer.state.global_step:
            raise
        message = f"training fails before the end of the first step: {describe_exception(error, 2_000)}"
        raise UsageError("train_setting", message, hint="check the fields of train, lora and quantization") from error


def estimate_training(config: Config, build: Path | None) -> tuple[Estimate, list[str]]:
    """Estimate a run without loading the model or writing to the run directory. Return the estimate and notes.

    The notes say whether rows are padded, and whether the run directory must change before the training.

    A small random model with the same architecture is used to find out whether packed documents attend to each other.

    Raises:
        UsageError: a setting is not allowed.
        InputRefused: see `train_model`.
    """
    config = _resolve_config(config, build)
    model_config = _check_config(config)
    notes = []
    try:
        checkpoints.check_run_folder(Path(config.output_dir), config, device.process_count(), resume=False)
    except UsageError as error:
        notes.append(f"training cannot start yet: {error.message}; {error.hint}")
    with tempfile.TemporaryDirectory() as scratch:
        if build is None:
            build = Path(scratch) / "data"
            report = write_build(config.data, config.tokenizer, build, **config.build_options())
            notes += (spell_options(note) for note in report.notes if note.startswith("left out"))
        data = open_training_data(build, str(config.tokenizer))
        _check_images(config, model_config, data)
        leaks = has_leaking_architecture(model_config, config.attn_implementation)
        leaks = leaks and config.task == "sft"
        if leaks and data.is_packed:
            raise _leak_error(config.model, model_config.model_type)
        estimate = _estimate(config, model_config, data, isolated=not leaks)
    check_memory(estimate)
    if leaks:
        notes.append("rows are padded: packed documents would attend to each other")
    return estimate, notes


def make_trainer(
    config: Config,
    model: Any,
    splits: datasets.DatasetDict,
    *,
    isolated: bool,
    seal: checkpoints.CheckpointSeal | None = None,
    build: Path = Path(),
) -> RunTrainer:
    """Create a trainer that trains on the labels of a build without changing them.

    Args:
        config: the configuration of the run.
        model: the base model; its embeddings are enlarged if the tokenizer has new tokens.
        splits: the splits of the build.
        isolated: whether documents of a packed sequence do not attend to each other; otherwise, rows are padded
            instead of concatenated.
        seal: the identity of the run, which is written to each checkpoint.
        build: the folder of the build, which is needed for rows with images.

    Raises:
        UsageError: the trainer rejects its settings, or the tokenizer does not match the model.
    """
    tokenizer = load_trainer_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    data = TrainingData(Path(), {}, splits)
    has_new_tokens = fit_vocabulary(model, data.vocabulary_size, tokenizer)
    packed = data.is_packed
    settings = make_trainer_config(config, isolated=isolated, packed=packed, evaluates="test" in splits)
    _check_margin_metric(settings, splits)
    lengths = count_split(splits["train"]).lengths
    max_checkpoints, settings.save_total_limit = settings.save_total_limit, None
    if not isolated and config.task == "sft":
        splits = splits.remove_columns("seq_lengths")
    callbacks = [EarlyStoppingCallback(config.early_stopping)] if config.early_stopping is not None else []
    lora = make_lora_config(config, model, grows=has_new_tokens)
    kind, make_collator = _TRAINERS[config.task]
    arguments: dict[str, Any] = {"data_collator": make_collator(tokenizer.pad_token_id)} if make_collator else {}
    if config.task == "sft" and is_vision_model(model.config):
        folder = load_tokenizer(config.tokenizer or config.model).folder
        arguments["data_collator"] = make_image_collator(model, tokenizer, folder, build, padding_free=isolated)
        # This setting of TRL configures only its own collator.
        settings.padding_free = False
        splits = splits.rename_columns({"images": REFERENCES_COLUMN}) if data.has_images else splits
    if config.task == "kto":
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        arguments["data_collator"] = LabelCollator(tokenizer.pad_token_id, positions)
    if lora is None and is_vision_model(model.config):
        freeze_vision(model)
    has_reference = TRAINER_TASKS[config.task].no_grad_forward_passes > 0
    if has_reference and lora is None and not settings.precompute_ref_log_probs:
        # The embeddings of new tokens are random, so the reference model must be a copy.
        arguments["ref_model"] = copy.deepcopy(model)
    try:
        trainer = kind(
            seal=seal or checkpoints.CheckpointSeal("", {}),
            max_checkpoints=max_checkpoints,
            lengths=lengths,
            model=model,
            args=settings,
            train_dataset=splits["train"],
            eval_dataset=splits.get("test"),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=callbacks,
            **arguments,
        )
    except FtdataError:
        raise
    except Exception as error:
        # An invalid value can raise any exception in other libraries.
        message = f"the trainer of TRL rejects the settings: {describe_exception(error, 2_000)}"
        raise UsageError("train_setting", message) from error
    _adjust_models(trainer, isolated=isolated)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _adjust_models(trainer: RunTrainer, *, isolated: bool) -> None:
    """Remove the padding of batches if documents do not attend to each other, and correct the dtype of adapters."""
    if isolated and isinstance(trainer, DPORunTrainer | KTORunTrainer):
        for model in filter(None, (trainer.model, trainer.ref_model)):
            run_without_padding(model.get_base_model() if isinstance(model, PeftModel) else model)
    if not torch.cuda.is_available():
        for weight in trainer.model.parameters():
            # TRL casts the adapters of quantized models to bfloat16. It is slow on CPUs, and it makes a resumed run
            # differ from an uninterrupted run.
            if weight.requires_grad:
                weight.data = weight.data.float()


def _check_margin_metric(settings: Any, splits: datasets.DatasetDict) -> None:
    """Check that the best model is not selected by the margin of labels of which the test split has only one.

    Raises:
        UsageError: `no_margin`.
    """
    metric = str(settings.metric_for_best_model)
    if "test" not in splits or not metric.endswith("rewards/margins") or "label" not in splits["test"].column_names:
        return
    if len(set(splits["test"]["label"])) < 2:
        problem = f"train.metric_for_best_model is {metric!r}, which needs both kinds of labels in the test split"
        raise UsageError("no_margin", problem, hint="use the metric loss, or a larger test split")


def _check_config(config: Config) -> Any:
    """Check all settings of a run before the data is read. Return the `transformers` configuration of the model.

    Raises:
        UsageError: a field is unknown, has the wrong type, or names a module that the model does not have.
        InputRefused: the model cannot be loaded.
    """
    quantization_config(config.quantization, torch.float32)
    check_settings(config.train, config.task)
    # It is not known yet whether there is a test split. All other invalid settings are found here.
    make_trainer_config(config, isolated=False, packed=False, evaluates=True)
    check_lora(config)
    # The tokenizer is loaded first because its error best explains a wrong model name.
    load_tokenizer(config.tokenizer)
    model_config = load_model_config(config.model, trust_remote_code=config.trust_remote_code)
    check_adapter(config, model_config)
    return model_config


def _check_images(config: Config, model_config: Any, data: TrainingData) -> None:
    """Check that the model and the task support images if the rows have images.

    Raises:
        UsageError: `no_vision_model` or `image_task`.
    """
    if not data.has_images:
        return
    if not is_vision_model(model_config):
        problem = f"the rows have images, but the model {config.model} ({model_config.model_type}) reads only text"
        raise UsageError("no_vision_model", problem, hint="use a vision-language model, or data without images")
    if config.task != "sft":
        problem = f"the rows have images, which the task {config.task} does not support"
        raise UsageError("image_task", problem, hint="use task: sft, or data without images")


def _resolve_config(config: Config, build: Path | None) -> Config:
    """Return a configuration with absolute paths, and with the task of the trainer: `sft`, `dpo`, `reward` or `kto`."""
    check_choice("task", config.task, TASKS)
    task = config.task
    if task == "auto" and build:
        task = str(read_manifest(build)["options"].get("task", "sft"))
    elif task == "auto":
        options = Options(**select_options(config.build_options(), "task", "rows"))
        try:
            task = resolve_task(options, task, resolve_sources(config.data)).task
        except FtdataError:
            # The settings are checked first. Then the build reports why the data cannot be read.
            task = options.task
    # An adapter stores the path of its base model, which must be valid from any working directory.
    return structs.replace(
        config,
        task="dpo" if task == "preference" else task,
        model=_absolute(config.model),
        tokenizer=_absolute(config.tokenizer or config.model),
        data=_absolute_data(config.data),
        output_dir=str(Path(config.output_dir).resolve()),
        template=_absolute(config.template) if config.template else None,
        image_folder=_absolute(config.image_folder) if config.image_folder else None,
    )


def _absolute(name: str) -> str:
    if is_python_template(name):
        file, _, function = name.rpartition(":")
        return f"{Path(file).resolve()}:{function}"
    # A template may also be Jinja text, which some file systems reject as a path.
    is_path = "\n" not in name and len(name) < 1024 and "{" not in name
    return str(Path(name).resolve()) if is_path and Path(name).exists() else name


def _absolute_data(data: Any) -> Any:
    if isinstance(data, list):
        return [_absolute_data(source) for source in data]
    if isinstance(data, dict):
        return {**data, "path": _absolute(data["path"])} if isinstance(data.get("path"), str) else data
    is_pattern = any(sign in data for sign in "*?[") and "://" not in data
    return str(Path.cwd() / data) if is_pattern and not Path(data).exists() else _absolute(data)


def _build_data(config: Config, run: Path, before: checkpoints.PreviousRun | None, console: Console) -> Path:
    # A resumed run keeps its data. The data is built again in another folder to check that it is the same.
    build = run / ("data.resumed" if before else "data")
    with device.main_process_first() as is_main:
        if is_main:
            report = write_build(config.data, config.tokenizer, build, overwrite=True, **config.build_options())
            console.print(str(report), highlight=False, markup=False)
            if before:
                shutil.rmtree(build)
                checkpoints.check_same_data(run, before, report.fingerprint)
    return run / "data"


def _estimate(config: Config, model_config: Any, data: TrainingData, *, isolated: bool) -> Estimate:
    settings = make_trainer_config(config, isolated=isolated, packed=data.is_packed, evaluates="test" in data.splits)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions and data.longest_document > positions:
        raise InputRefused(
            "too_long",
            f"an example has {data.longest_document:,} tokens, but {config.model} accepts at most {positions:,} tokens",
            hint=f"build with max_length: {positions}, which leaves out or shortens longer examples (overlong)",
        )
    test_tokens = count_split(data.splits["test"]).tokens if "test" in data.splits else 0
    train = count_split(data.splits["train"])
    return estimate_run(config, model_config, train, settings, data.vocabulary_size, test_tokens)


def _prepare_trainer(config: Config, data: TrainingData, run: Path, console: Console) -> RunTrainer:
    set_seed(int(config.train.get("seed", 42)))
    trusts, attention = config.trust_remote_code, config.attn_implementation
    options: dict[str, Any] = {"dtype": weights_dtype(config), "attention": attention, "trust_remote_code": trusts}
    options["task"] = config.task
    model = load_model(config.model, config.quantization, **options)
    isolated = config.task != "reward" and measure_leak(model) <= LEAK
    if isolated and data.has_images:
        isolated = not _mixes_packed_images(config, model, data)
    if data.is_packed and not isolated:
        raise _leak_error(config.model, f"{model.config.model_type}, {model.config._attn_implementation}")
    seal = checkpoints.CheckpointSeal(data.manifest["fingerprint"], checkpoints.read_run_json(run)["setup"])
    trainer = make_trainer(config, model, data.splits, isolated=isolated, seal=seal, build=data.folder)
    check_first_batch(trainer, padding_free=isolated and config.task == "sft")
    if not isolated and config.task == "sft":
        note = f"packed documents of {model.config.model_type} attend to each other: rows are padded, not concatenated"
        console.print(note, highlight=False, markup=False)
    template = data.manifest["options"]["template"]
    if is_python_template(template["name"]):
        trainer.processing_class.chat_template = None
        note = f"the template is a function, so the saved model has no chat template: serve it with {template['name']}"
        console.print(note, highlight=False, markup=False)
    elif template["name"] != "tokenizer" and Template(template["name"], template["source"]).is_chat:
        # The saved model must be prompted with the template that it was trained with.
        trainer.processing_class.chat_template = template["source"]
    if config.task == "reward":
        return trainer
    stop_ids = set_stop_tokens(trainer, config, data)
    if not stop_ids:
        note = "no answer ends with a control token: the model does not learn to stop"
        console.print(note, style="yellow", highlight=False, markup=False)
    if device.is_main_process() and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        # A single process cannot generate with a model that is sharded over several processes.
        preprocessor = getattr(trainer.data_collator, "preprocessor", None) if data.has_images else None
        trainer.add_callback(make_sample_callback(config, data, run, set(stop_ids), console, preprocessor))
    return trainer


def _mixes_packed_images(config: Config, model: Any, data: TrainingData) -> bool:
    """Test with rows of the build whether packed documents with images attend to each other."""
    tokenizer = load_trainer_tokenizer(str(config.tokenizer), trust_remote_code=config.trust_remote_code)
    folder = load_tokenizer(config.tokenizer).folder
    collator = make_image_collator(model, tokenizer, folder, data.folder, padding_free=True)
    rows = data.splits["train"].rename_columns({"images": REFERENCES_COLUMN})
    numbers = find_rows_with_images(data.splits["train"])[:2].tolist()
    return bool(numbers) and mixes_packed_images(model, collator, [rows[number] for number in numbers])


def _leak_error(model: str, kind: str) -> InputRefused:
    message = f"packed documents attend to each other in the model {model} ({kind})"
    hint = "build without packing (pack: null), so that rows are padded; or set another attn_implementation"
    return InputRefused("model_leaks", message, hint=hint)
