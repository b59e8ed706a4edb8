"""The hand-over: a finished build -> `SFTTrainer`, with the only settings that keep its labels as they are.

SFTTrainer takes `input_ids, labels, seq_lengths` untouched when it is told to skip its own preparation and to
batch without padding; with other settings it packs again, cuts at 1024 tokens, or lets packed documents see
each other, without a word. So these settings are fixed, and the first batch is counted before the first step.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from msgspec import structs
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from ftdata.build import load_build, write_build
from ftdata.config import Config
from ftdata.errors import InputRefused, InternalError, UsageError
from ftdata.store import read_manifest, verify, write_json
from ftdata.templates import Template
from ftdata.tokenize import control_tokens, load_tokenizer
from ftdata.train import checkpoints
from ftdata.train.plots import loss_picture, sparkline
from ftdata.train.probe import LEAK, leak
from ftdata.train.qlora import adapter, check_vocabulary, load_model, parameters, precision
from ftdata.types import IGNORE_INDEX

FIXED = {
    "dataset_kwargs": "the data is prepared already, and must not be prepared again",
    "padding_free": "follows from the data and from what the model can keep apart",
    "packing": "packing is done in the build (the packing field), where no answer is cut",
    "max_length": "length is decided in the build (the max_length field), where every cut is reported",
    "shuffle_dataset": "the sampler shuffles; shuffling the data set as well would detach it from its report",
    "output_dir": "it has a field of its own",
    "resume_from_checkpoint": "resuming has a switch of its own (--resume)",
    "model_init_kwargs": "the model is loaded before the trainer sees it",
    "eos_token": "the stop is decided by the template that the data was built with",
    "chat_template_path": "the template is decided in the build (the template field)",
    "completion_only_loss": "the mask is decided in the build (the train_on field)",
    "assistant_only_loss": "the mask is decided in the build (the train_on field)",
}
"""SFTConfig fields that a user may not set -> why."""


def train(config: Config, build: Path | None, *, resume: bool = False) -> Path:
    """Train, save, and draw the loss.

    Args:
        config: the run.
        build: the finished build, or `None` to build `config.data` into the run's folder first.
        resume: go on from the last whole checkpoint.

    Raises:
        UsageError: a setting contradicts the hand-over, the run exists, or there is nothing to resume.
        InputRefused: the build is damaged or was made with another tokenizer, the run was another one, or the
            model leaks.
    """
    console = Console(stderr=True)
    run = Path(config.output_dir)
    # Adapters remember their base model by this name, and must find it from any folder.
    name = _absolute(config.tokenizer or config.model)
    config = structs.replace(config, model=_absolute(config.model), tokenizer=name)
    _check_settings(config.train)
    before = checkpoints.check(run, config, resume=resume)
    model = load_model(config.model, config.quantization)
    build = build or _build(config, run, before, console)
    manifest = _checked_manifest(build, name)
    checkpoint = checkpoints.begin(run, config, manifest["fingerprint"], before)
    splits = load_build(build)
    set_seed(int(config.train.get("seed", 42)))
    isolated = leak(model) <= LEAK
    packed = any(_largest(split, "seq_lengths", pc.list_value_length) > 1 for split in splits.values())
    if packed and not isolated:
        raise InputRefused(
            "model_leaks",
            f"{config.model} ({model.config.model_type}, {model.config._attn_implementation}) "
            "lets packed documents see each other",
            hint="build without packing",
        )
    trainer = make_trainer(config, model, splits, isolated=isolated)
    largest = max(_largest(split, "input_ids", pc.list_flatten) for split in splits.values())
    check_vocabulary(model, 1 + largest, trainer.processing_class.pad_token_id)
    check_first_batch(trainer, padding_free=isolated)
    template = manifest["options"]["template"]
    if template["name"] != "tokenizer" and Template(template["name"], template["source"]).chat:
        # Whoever loads the model must prompt it as it was trained.
        trainer.processing_class.chat_template = template["source"]
    trainable, total = parameters(trainer.model)
    share = f"{total:,} parameters, {trainable:,} of them trained ({trainable / total:.2%})"
    console.print(f"{config.model}: {share}", highlight=False)
    trainer.add_callback(Watch(console))
    trainer.train(resume_from_checkpoint=checkpoint)
    control = control_tokens(load_tokenizer(name), template["source"] + (load_tokenizer(name).chat_template or ""))
    stop_ids = _stop_ids(splits["train"], control.ids) or trainer.processing_class.eos_token_id
    return _finish(trainer, config, manifest, build, run, console, stop_ids)


def make_trainer(config: Config, model: Any, splits: datasets.DatasetDict, *, isolated: bool) -> SFTTrainer:
    """Return an `SFTTrainer` that takes the build's labels as they are.

    Args:
        config: the run.
        model: the base model.
        splits: the build.
        isolated: whether the model keeps packed documents apart; if not, rows are padded instead of joined.
    """
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.model)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        # Padding is masked by position, never by id, so sharing a token with EOS costs nothing.
        tokenizer.pad_token = tokenizer.eos_token
    if not isolated:
        splits = splits.remove_columns("seq_lengths")
    arguments = _arguments(config, isolated=isolated, evaluates="test" in splits)
    try:
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=splits["train"],
            eval_dataset=splits.get("test"),
            processing_class=tokenizer,
            peft_config=adapter(config),
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


def token_loss(trainer: SFTTrainer) -> float:
    """Return the mean loss over all trained tokens of the evaluation split.

    The trainer's own `eval_loss` is a mean over batches, which gives tokens of short batches more weight.
    """
    total, count = 0.0, 0
    trainer.model.eval()
    with torch.inference_mode():
        for batch in trainer.get_eval_dataloader():
            tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            total += float(trainer.model(**trainer._prepare_inputs(batch)).loss) * tokens
            count += tokens
    return total / max(count, 1)


def check_first_batch(trainer: SFTTrainer, *, padding_free: bool) -> None:
    """Count the first batch as the model would get it, against the build; random states are left as they were.

    Raises:
        InternalError: labels, document boundaries or masks are not what the build holds.
    """
    with _same_randomness():
        indices = list(iter(trainer._get_train_sampler()))[: trainer.args.train_batch_size]
        rows = [trainer.train_dataset[index] for index in indices]
        batch = trainer.data_collator([{name: row[name] for name in row} for row in rows])
    labels = [np.asarray(row["labels"]) for row in rows]
    found = int((batch["labels"] != IGNORE_INDEX).sum())
    expected = sum(int((label != IGNORE_INDEX).sum()) for label in labels)
    problems = []
    if found != expected:
        problems.append(f"{found} trained tokens, the build has {expected}")
    if padding_free:
        documents = sum(len(row["seq_lengths"]) for row in rows)
        starts = int((batch["position_ids"] == 0).sum())
        if starts != documents:
            problems.append(f"{starts} documents, the build has {documents}")
        if "attention_mask" in batch:
            problems.append("an attention mask, which would hide the document boundaries")
    elif int(batch["attention_mask"].sum()) != sum(len(row["input_ids"]) for row in rows):
        problems.append("padding that is not masked")
    if problems:
        raise InternalError("hand_over", f"the trainer's first batch has {'; '.join(problems)}")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Shows step, loss and time left."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[says]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("train", says="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002, D102
        self._bar.start()
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002, D102
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002, D102
        for key in ("loss", "eval_loss"):
            if logs and key in logs:
                self._bar.update(self._task, says=f"{key} {logs[key]:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002, D102
        self._bar.stop()


def _arguments(config: Config, *, isolated: bool, evaluates: bool) -> SFTConfig:
    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "eval_strategy": "epoch" if evaluates else "no",
        "prediction_loss_only": True,
        "per_device_eval_batch_size": 4,
        "bf16": precision() is torch.bfloat16,
        "fp16": precision() is torch.float16,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "activation_checkpointing": gpu,
        "disable_tqdm": True,
    }
    fixed = {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "padding_free": isolated,
        "packing": False,
        "max_length": None,
        "shuffle_dataset": False,
        "output_dir": config.output_dir,
    }
    try:
        return SFTConfig(**{**defaults, **config.train, **fixed})
    except (ValueError, TypeError) as error:
        raise UsageError("train_setting", f"SFTConfig refuses the train settings: {error}") from None


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _check_settings(settings: dict[str, Any]) -> None:
    fields = {field.name: str(field.type) for field in dataclasses.fields(SFTConfig)}
    for name, value in settings.items():
        if name in FIXED:
            raise UsageError("fixed_setting", f"train.{name} cannot be set: {FIXED[name]}")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see TRL's SFTConfig for its fields"
            raise UsageError("train_setting", f"SFTConfig has no field {name!r}", hint=hint)
        numeric = ("float" in fields[name] or "int" in fields[name]) and "str" not in fields[name]
        if numeric and not isinstance(value, int | float | None):
            raise UsageError("train_setting", f"train.{name} is {value!r}, expected a number")
        if name.endswith(("_batch_size", "accumulation_steps")) and not value >= 1:
            raise UsageError("train_setting", f"train.{name} is {value!r}, expected at least 1")


def _build(config: Config, run: Path, before: checkpoints.Before | None, console: Console) -> Path:
    # While a run is being resumed its data stays as it is until the new build has proved to be the same.
    build = run / ("data.resumed" if before else "data")
    report = write_build(config.data, config.tokenizer, build, **config.build_options())
    console.print(str(report), highlight=False, markup=False)
    if before:
        shutil.rmtree(build)
        checkpoints.same_data(run, before, report.fingerprint)
    return run / "data"


def _checked_manifest(build: Path, tokenizer: str) -> dict[str, Any]:
    manifest = read_manifest(build)
    if damaged := verify(build):
        raise InputRefused("damaged_build", f"{build} is damaged: {', '.join(damaged)}", hint="build again")
    made_with = manifest["options"]["tokenizer"]
    if load_tokenizer(tokenizer).fingerprint != made_with["fingerprint"]:
        raise InputRefused(
            "other_tokenizer",
            f"{build} was built with tokenizer {made_with['name']}, which is not that of {tokenizer}",
            hint="build again with the model's own tokenizer, or name it with tokenizer:",
        )
    return manifest


def _largest(split: datasets.Dataset, column: str, numbers: Callable[[pa.Array], pa.Array]) -> int:
    return max((pc.max(numbers(chunk)).as_py() for chunk in split.data.column(column).chunks if len(chunk)), default=0)


def _stop_ids(split: datasets.Dataset, control: NDArray[np.int32]) -> list[int]:
    """Return the control tokens that end trained turns: what the saved model must stop at."""
    found: set[int] = set()
    for row in split.select(range(min(len(split), 64))):
        ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
        after = np.append(labels[1:], IGNORE_INDEX)
        after[np.cumsum(row["seq_lengths"]) - 1] = IGNORE_INDEX
        found.update(ids[(labels != IGNORE_INDEX) & (after == IGNORE_INDEX)].tolist())
    return sorted(found & set(control.tolist()))


@contextmanager
def _same_randomness() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002  (the trainer uses the global state)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def _finish(
    trainer: SFTTrainer,
    config: Config,
    manifest: dict[str, Any],
    build: Path,
    run: Path,
    console: Console,
    stop_ids: list[int] | int,
) -> Path:
    # The trainer aligns this with the tokenizer's EOS; the model must stop where its data taught it to.
    trainer.model.generation_config.eos_token_id = stop_ids
    trainer.model.generation_config.pad_token_id = trainer.processing_class.pad_token_id
    trainer.save_model(str(run / "model"))
    trainer.model.generation_config.save_pretrained(str(run / "model"))
    history = trainer.state.log_history
    loss_picture(history, run)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    loss = token_loss(trainer) if trainer.eval_dataset is not None else None
    write_json(
        run / "run.json",
        {
            **checkpoints.describe(config, manifest["fingerprint"]),
            "finished": True,
            "build": build.name if build.parent == run else str(build.resolve()),
            "adapter": adapter(config) is not None,
            "data": config.data,
            "tokenizer": config.tokenizer,
            "steps": trainer.state.global_step,
            "loss": losses,
            "test_loss": loss,
        },
    )
    if losses:
        console.print(f"loss {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}", highlight=False)
    if loss is not None:
        console.print(f"perplexity {math.exp(loss):.3f} per trained token of the test split", highlight=False)
    console.print(f"saved {run / 'model'}, loss as a picture in {run / 'loss.png'}", highlight=False)
    return run
