"""The hand-over: a finished build -> `SFTTrainer`, with the only settings that keep its labels as they are.

SFTTrainer takes `input_ids, labels, seq_lengths` untouched when it is told to skip its own preparation and to
batch without padding; with other settings it packs again, cuts at 1024 tokens, or lets packed documents see
each other, without a word. So these settings are fixed, and the first batch is counted before the first step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from ftdata._version import __version__
from ftdata.build import load_build, write_build
from ftdata.config import Config
from ftdata.errors import InputRefused, InternalError, UsageError, nearest
from ftdata.store import read_manifest, verify, write_json
from ftdata.tokenize import load_tokenizer
from ftdata.train.plots import loss_picture, sparkline
from ftdata.train.probe import LEAK, leak
from ftdata.train.qlora import adapter, check_vocabulary, load_model, parameters, precision, quantization_config
from ftdata.types import IGNORE_INDEX

FIXED = {
    "dataset_kwargs": "the data is prepared already, and must not be prepared again",
    "padding_free": "follows from the data and from what the model can keep apart",
    "packing": "packing is done in the build (the packing field), where no answer is cut",
    "max_length": "length is decided in the build (the max_length field), where every cut is reported",
    "shuffle_dataset": "the sampler shuffles; shuffling the data set as well would detach it from its report",
    "output_dir": "it has a field of its own",
    "completion_only_loss": "the mask is decided in the build (the train_on field)",
    "assistant_only_loss": "the mask is decided in the build (the train_on field)",
}
"""SFTConfig fields that a user may not set -> why."""


def train(config: Config, build: Path | None, *, resume: bool = False) -> Path:
    """Train, save, and draw the loss.

    Args:
        config: the run.
        build: the finished build, or `None` to build `config.data` into the run's folder first.
        resume: go on from the last checkpoint.

    Raises:
        UsageError: a setting contradicts the hand-over, or there is nothing to resume.
        InputRefused: the build is damaged or was made with another tokenizer, or the model leaks.
    """
    console = Console(stderr=True)
    run = Path(config.output_dir)
    # Adapters remember their base model by this name, and must find it from any folder.
    config = structs.replace(
        config, model=_absolute(config.model), tokenizer=_absolute(config.tokenizer or config.model)
    )
    _check_settings(config.train)
    quantization_config(config.quantization)
    build = build or _build(config, run, console)
    manifest = _checked_manifest(build, config)
    splits = load_build(build)
    checkpoint = _checkpoint(run, manifest, resume=resume)
    set_seed(int(config.train.get("seed", 42)))
    model = load_model(config.model, config.quantization)
    check_vocabulary(model, 1 + max(_largest(split, "input_ids", pc.list_flatten) for split in splits.values()))
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
    check_first_batch(trainer, padding_free=isolated)
    trainable, total = parameters(trainer.model)
    console.print(
        f"{config.model}: {total:,} parameters, {trainable:,} of them trained ({trainable / total:.2%})",
        highlight=False,
    )
    trainer.add_callback(Watch(console))
    trainer.train(resume_from_checkpoint=checkpoint)
    stop_ids = _stop_ids(splits["train"]) or trainer.processing_class.eos_token_id
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
    if tokenizer.pad_token is None:
        # Padding is masked by position, never by id, so sharing a token with EOS costs nothing.
        tokenizer.pad_token = tokenizer.eos_token
    if not isolated:
        splits = splits.remove_columns("seq_lengths")
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config, isolated=isolated, evaluates="test" in splits),
        train_dataset=splits["train"],
        eval_dataset=splits.get("test"),
        processing_class=tokenizer,
        peft_config=adapter(config),
    )
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
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    for name in settings:
        if name in FIXED:
            raise UsageError("fixed_setting", f"train.{name} cannot be set: {FIXED[name]}")
        if name not in known:
            raise UsageError(
                "train_setting", f"SFTConfig has no field {name!r}", hint=nearest(name, known).split(" known:")[0]
            )


def _build(config: Config, run: Path, console: Console) -> Path:
    build = run / "data"
    report = write_build(config.data, config.tokenizer, build, **config.build_options())
    console.print(str(report), highlight=False)
    return build


def _checked_manifest(build: Path, config: Config) -> dict[str, Any]:
    manifest = read_manifest(build)
    if damaged := verify(build):
        raise InputRefused("damaged_build", f"{build} is damaged: {', '.join(damaged)}", hint="build again")
    made_with = manifest["options"]["tokenizer"]
    own = load_tokenizer(config.tokenizer)
    if own.fingerprint != made_with["fingerprint"]:
        raise InputRefused(
            "other_tokenizer",
            f"{build} was built with tokenizer {made_with['name']}, which is not that of {config.tokenizer}",
            hint="build again with the model's own tokenizer, or name it with tokenizer:",
        )
    return manifest


def _checkpoint(run: Path, manifest: dict[str, Any], *, resume: bool) -> str | None:
    state = run / "run.json"
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    if resume:
        if last is None:
            raise UsageError("nothing_to_resume", f"{run} holds no checkpoint", hint="start without --resume")
        known = json.loads(state.read_text())["fingerprint"] if state.is_file() else None
        if known != manifest["fingerprint"]:
            raise InputRefused(
                "other_data",
                f"the checkpoints in {run} were trained on build {known}, this is {manifest['fingerprint']}",
                hint="resume with the same data and options, or start anew in another folder",
            )
    elif last is not None:
        raise UsageError(
            "run_exists", f"{run} holds checkpoints already", hint="go on with --resume, or choose another folder"
        )
    run.mkdir(parents=True, exist_ok=True)
    write_json(state, {"ftdata": __version__, "fingerprint": manifest["fingerprint"], "finished": False})
    return last


def _largest(split: datasets.Dataset, column: str, numbers: Callable[[pa.Array], pa.Array]) -> int:
    return max((pc.max(numbers(chunk)).as_py() for chunk in split.data.column(column).chunks if len(chunk)), default=0)


def _stop_ids(split: datasets.Dataset) -> list[int]:
    """Return the ids that end trained turns: what the saved model must stop at. Read off the first rows."""
    found: set[int] = set()
    for row in split.select(range(min(len(split), 64))):
        ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
        ends = np.cumsum(row["seq_lengths"]) - 1
        after = np.append(labels[1:], IGNORE_INDEX)
        after[ends] = IGNORE_INDEX
        found.update(ids[(labels != IGNORE_INDEX) & (after == IGNORE_INDEX)].tolist())
    # Where turns end in plain text there is no id to stop at.
    return sorted(found) if len(found) <= 4 else []


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
            "ftdata": __version__,
            "fingerprint": manifest["fingerprint"],
            "finished": True,
            "build": build.name if build.parent == run else str(build.resolve()),
            "model": config.model,
            "quantization": config.quantization,
            "adapter": adapter(config) is not None,
            "data": config.data,
            "tokenizer": config.tokenizer,
            "steps": trainer.state.global_step,
            "loss": losses,
            "test_loss": loss,
            "train": config.train,
        },
    )
    if losses:
        console.print(f"loss {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}", highlight=False)
    if loss is not None:
        console.print(f"perplexity {math.exp(loss):.3f} per trained token of the test split", highlight=False)
    console.print(f"saved {run / 'model'}, loss as a picture in {run / 'loss.png'}", highlight=False)
    return run
