"""A run: the data built, the model loaded, both checked against each other, trained, saved, read back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError  # what torch raises for pickles that it does not trust
from typing import Any

import datasets
import torch
from msgspec import structs
from rich.console import Console
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ftdata.build.dataset import write_build
from ftdata.config import Config, to_yaml
from ftdata.errors import InputRefused, UsageError, describe_exception
from ftdata.templates import Template
from ftdata.tokenizing.load import load_tokenizer
from ftdata.train import checkpoints
from ftdata.train.dataset import TrainingData, open_training_data
from ftdata.train.inference.prompts import encode_messages, read_documents, rebuild_recipe, split_last_turn
from ftdata.train.model import device
from ftdata.train.model.adapter import check_lora, make_lora_config
from ftdata.train.model.estimate import Estimate, check_adapter, check_memory, count_split, estimate_run
from ftdata.train.model.isolation_probe import LEAK, has_leaking_architecture, measure_leak
from ftdata.train.model.load import fit_vocabulary, load_model, load_model_config, load_trainer_tokenizer, weights_dtype
from ftdata.train.model.quantization import quantization_config
from ftdata.train.runs.callbacks import SampleCallback, TrainingProgressCallback
from ftdata.train.runs.finish import finish_run, set_stop_tokens
from ftdata.train.runs.sft_arguments import check_devices, check_first_batch, check_settings, make_sft_config
from ftdata.train.runs.trainer import BuildTrainer


def train_sft(config: Config, build: Path | None, *, resume: bool = False, notes: Sequence[str] = ()) -> Path:
    """Train, save, and draw the loss.

    Args:
        config: the run.
        build: the finished build, or `None` to build `config.data` into the run's folder first.
        resume: go on from the last whole checkpoint.
        notes: what to print before anything is done.

    Raises:
        UsageError: a setting contradicts the hand-over, the run exists, or there is nothing to resume.
        InputRefused: the build is damaged or was made with another tokenizer, the run was another one, the model
            leaks, or does not fit.
    """
    check_devices(config.train)
    # One process speaks for all.
    console = Console(stderr=True, quiet=not device.is_main_process())
    run = Path(config.output_dir)
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    config = _named(config)
    model_config = _checked(config)
    before = checkpoints.check_run_folder(run, config, device.process_count(), resume=resume)
    for passed in before.passed if before else ():
        console.print(f"{run.name}/{passed}: passed over", style="yellow", highlight=False, markup=False)
    data = open_training_data(build or _built(config, run, before, console), str(config.tokenizer))
    found = _estimated(config, model_config, data, isolated=True)
    console.print(str(found), highlight=False, markup=False, soft_wrap=True)
    check_memory(found)
    device.wait_for_processes()
    if device.is_main_process():
        checkpoints.begin_run(run, config, data.manifest["fingerprint"], device.process_count(), before)
        about = config if data.folder == run / "data" else structs.replace(config, data=str(data.folder))
        (run / "config.yaml").write_text(to_yaml(about, redacted=True), encoding="utf-8")
    device.wait_for_processes()
    trainer = _prepared(config, data, run, console)
    watch = TrainingProgressCallback(console)
    trainer.add_callback(watch)
    try:
        if before and before.is_done(found.steps, config.early_stopping):
            trainer.take(before.checkpoint)
        else:
            trainer.train(resume_from_checkpoint=before.checkpoint if before else None)
    except torch.OutOfMemoryError:
        raise InputRefused(
            "out_of_memory",
            f"{config.model} does not fit into the memory of {device.device_name()} with this batch",
            hint="a smaller per_device_train_batch_size with more gradient_accumulation_steps, a smaller max_length, "
            "gradient_checkpointing, or quantization: nf4",
        ) from None
    except UnpicklingError as error:
        raise InputRefused(
            "unsafe_checkpoint",
            f"{before.checkpoint if before else run} holds what is no state of a trainer: {describe_exception(error, 200)}",
            hint="it may run code when it is read: do not go on from it",
        ) from None
    except KeyboardInterrupt:
        watch.stop()
        console.print(f"go on with: ftdata train {run} --resume", highlight=False, markup=False, soft_wrap=True)
        raise
    finally:
        watch.stop()
    return finish_run(trainer, config, data, run, console, found)


def estimate_sft(config: Config, build: Path | None) -> tuple[Estimate, str]:
    """Work out a run without loading its model or leaving anything: the estimate, and what else would be said.

    Raises:
        UsageError: as `train`.
        InputRefused: as `train`; a model that leaks is found by one of its kind with few layers.
    """
    config = _named(config)
    model_config = _checked(config)
    checkpoints.check_run_folder(Path(config.output_dir), config, device.process_count(), resume=False)
    with tempfile.TemporaryDirectory() as scratch:
        if build is None:
            build = Path(scratch) / "data"
            write_build(config.data, config.tokenizer, build, **config.build_options())
        data = open_training_data(build, str(config.tokenizer))
        leaks = has_leaking_architecture(model_config, config.attn_implementation)
        if leaks and data.packed:
            raise _leaks(config.model, model_config.model_type)
        found = _estimated(config, model_config, data, isolated=not leaks)
    check_memory(found)
    return found, "rows are padded: the model lets documents see each other" if leaks else ""


def make_trainer(
    config: Config,
    model: Any,
    splits: datasets.DatasetDict,
    *,
    isolated: bool,
    seal: checkpoints.CheckpointSeal | None = None,
) -> BuildTrainer:
    """Return a trainer that takes the build's labels as they are.

    Args:
        config: the run.
        model: the base model; its embeddings grow where the tokenizer has new tokens.
        splits: the build.
        isolated: whether the model keeps packed documents apart; if not, rows are padded instead of joined.
        seal: what checkpoints are to be known by.

    Raises:
        UsageError: the trainer refuses its settings, or the tokenizer is another model's.
    """
    tokenizer = load_trainer_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    data = TrainingData(Path(), {}, splits)
    new = fit_vocabulary(model, data.vocabulary, tokenizer)
    packed = data.packed
    settings = make_sft_config(config, isolated=isolated, packed=packed, evaluates="test" in splits)
    lengths = count_split(splits["train"]).lengths
    keep, settings.save_total_limit = settings.save_total_limit, None
    if not isolated:
        splits = splits.remove_columns("seq_lengths")
    callbacks = [EarlyStoppingCallback(config.early_stopping)] if config.early_stopping is not None else []
    lora = make_lora_config(config, model, grows=new)
    try:
        trainer = BuildTrainer(
            seal=seal or checkpoints.CheckpointSeal("", {}),
            keep=keep,
            lengths=lengths,
            model=model,
            args=settings,
            train_dataset=splits["train"],
            eval_dataset=splits.get("test"),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=callbacks,
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError("train_setting", f"SFTTrainer refuses: {' '.join(str(error).split())}") from None
    if not torch.cuda.is_available():
        for weight in trainer.model.parameters():
            # TRL casts the adapters of quantised models to bfloat16, which CPUs compute slowly and which
            # makes a resumed run differ from an uninterrupted one.
            if weight.requires_grad:
                weight.data = weight.data.float()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _checked(config: Config) -> Any:
    """Check all settings of a run before any of its data is read, and return the configuration of its model.

    Raises:
        UsageError: a field is unknown, has another type, or names a module that the model lacks.
        InputRefused: there is no such model.
    """
    quantization_config(config.quantization, torch.float32)
    check_settings(config.train)
    # Whether anything is held out is not known yet; all else that the trainer refuses, it refuses now.
    make_sft_config(config, isolated=False, packed=False, evaluates=True)
    check_lora(config)
    # The tokenizer is loaded first: its error says best what is wrong with the name of a model.
    load_tokenizer(config.tokenizer)
    model_config = load_model_config(config.model, trust_remote_code=config.trust_remote_code)
    check_adapter(config, model_config)
    return model_config


def _named(config: Config) -> Config:
    # Adapters remember their base model by this name, and must find it from any folder.
    return structs.replace(
        config,
        model=_absolute(config.model),
        tokenizer=_absolute(config.tokenizer or config.model),
        data=_absolute_data(config.data),
        output_dir=str(Path(config.output_dir).resolve()),
        template=_absolute(config.template) if config.template else None,
    )


def _absolute(name: str) -> str:
    # A template may be given as its text, which no file system takes for a name.
    known = "\n" not in name and len(name) < 1024 and "{" not in name
    return str(Path(name).resolve()) if known and Path(name).exists() else name


def _absolute_data(data: Any) -> Any:
    if isinstance(data, list):
        return [_absolute_data(one) for one in data]
    if isinstance(data, dict):
        return {**data, "path": _absolute(data["path"])} if isinstance(data.get("path"), str) else data
    is_pattern = any(sign in data for sign in "*?[") and "://" not in data
    return str(Path.cwd() / data) if is_pattern and not Path(data).exists() else _absolute(data)


def _built(config: Config, run: Path, before: checkpoints.PreviousRun | None, console: Console) -> Path:
    # While a run is being resumed its data stays as it is until the new build has proved to be the same.
    build = run / ("data.resumed" if before else "data")
    with device.main_process_first() as is_main:
        if is_main:
            report = write_build(config.data, config.tokenizer, build, **config.build_options())
            console.print(str(report), highlight=False, markup=False)
            if before:
                shutil.rmtree(build)
                checkpoints.check_same_data(run, before, report.fingerprint)
    return run / "data"


def _estimated(config: Config, model_config: Any, data: TrainingData, *, isolated: bool) -> Estimate:
    settings = make_sft_config(config, isolated=isolated, packed=data.packed, evaluates="test" in data.splits)
    most = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if most and data.longest > most:
        raise InputRefused(
            "too_long",
            f"an example has {data.longest:,} tokens, {config.model} has {most:,} positions",
            hint=f"build with max_length: {most}",
        )
    return estimate_run(config, model_config, count_split(data.splits["train"]), settings, data.vocabulary)


def _prepared(config: Config, data: TrainingData, run: Path, console: Console) -> BuildTrainer:
    set_seed(int(config.train.get("seed", 42)))
    model = load_model(
        config.model,
        config.quantization,
        dtype=weights_dtype(config),
        attention=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    isolated = measure_leak(model) <= LEAK
    if data.packed and not isolated:
        raise _leaks(config.model, f"{model.config.model_type}, {model.config._attn_implementation}")
    seal = checkpoints.CheckpointSeal(data.manifest["fingerprint"], checkpoints.read_run_json(run)["setup"])
    trainer = make_trainer(config, model, data.splits, isolated=isolated, seal=seal)
    check_first_batch(trainer, padding_free=isolated)
    if not isolated:
        said = f"{model.config.model_type} lets documents see each other: rows are padded, not joined"
        console.print(said, highlight=False, markup=False)
    template = data.manifest["options"]["template"]
    if template["name"] != "tokenizer" and Template(template["name"], template["source"]).chat:
        # Whoever loads the model must prompt it as it was trained.
        trainer.processing_class.chat_template = template["source"]
    stops = set_stop_tokens(trainer, config, data)
    if not stops:
        said = "no answer ends in a control token: the model is not taught to stop"
        console.print(said, style="yellow", highlight=False, markup=False)
    if device.is_main_process() and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        # Where the model is spread over processes, one alone cannot ask it.
        trainer.add_callback(_samples(config, data, run, set(stops), console))
    return trainer


def _leaks(model: str, kind: str) -> InputRefused:
    return InputRefused(
        "model_leaks",
        f"{model} ({kind}) lets packed documents see each other",
        hint="build without packing (pack: null): rows are then padded; or another attn_implementation",
    )


def _samples(config: Config, data: TrainingData, run: Path, stops: set[int], console: Console) -> SampleCallback:
    tokenizer = load_tokenizer(config.tokenizer)
    expected: list[list[int] | None]
    if isinstance(config.samples, int):
        held_out = read_documents(data.splits["test"]) if "test" in data.splits else iter(())
        turns = (turn for ids, labels in held_out if (turn := split_last_turn(ids, labels, stops)) is not None)
        chosen = [turn for _, turn in zip(range(config.samples), turns, strict=False)]
        prompts, expected = [prompt for prompt, _ in chosen], [answer for _, answer in chosen]
    else:
        recipe = rebuild_recipe(str(config.tokenizer), data.manifest["options"])
        prompts = [encode_messages([{"role": "user", "content": text}], recipe) for text in config.samples]
        expected = [None] * len(prompts)
    return SampleCallback(prompts, expected, tokenizer, run / "samples.jsonl", console)
