"""Subclasses of TRL's trainers with a reproducible row order, verifiable checkpoints, and exact evaluations.

The subclasses write no model card and send no telemetry.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Trainer, TrainerState
from trl import SFTTrainer

from ftdata.errors import InputRefused
from ftdata.train import checkpoints
from ftdata.train.model.device import wait_for_processes
from ftdata.train.model.vision import REFERENCES_COLUMN
from ftdata.types import IGNORE_INDEX

_POOL = 50
"""Number of batches whose rows are sorted by length together; a larger pool means less padding and less mixing."""


class RunTrainer(Trainer):
    """The base class of the trainers of ftdata: the order of the rows, and the checkpoints of a run.

    Args:
        seal: the identity of the run, which is written to each checkpoint.
        max_checkpoints: number of checkpoints to keep in addition to the best checkpoint; `None` keeps all.
        lengths: number of tokens of each row.
        arguments: the arguments of the trainer of TRL.
    """

    def __init__(
        self,
        *,
        seal: checkpoints.CheckpointSeal,
        max_checkpoints: int | None,
        lengths: NDArray[np.int64],
        **arguments: Any,
    ) -> None:
        self._seal, self._max_checkpoints, self._lengths, self._rows = seal, max_checkpoints, lengths, len(lengths)
        if arguments["args"].world_size > 1:
            arguments["train_dataset"] = add_filler_row(arguments["train_dataset"])
        super().__init__(**arguments)

    def test_scores(self) -> dict[str, float | None]:
        """Return the scores of the model on the test split, or `None` for each score if there is no test split."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        del train_dataset
        arguments = self.args
        batch_rows = arguments.train_batch_size * arguments.world_size
        strategy = str(getattr(arguments.train_sampling_strategy, "value", arguments.train_sampling_strategy))
        return EpochSampler(
            self._rows,
            batch_rows * arguments.gradient_accumulation_steps,
            arguments.data_seed if arguments.data_seed is not None else arguments.seed,
            # At the end of an epoch, the trainer already reports the number of the next epoch.
            lambda: int((self.state.epoch or 0) + 1e-9),
            lengths=self._lengths if strategy == "group_by_length" else None,
            shuffled=strategy != "sequential",
            multiple_of=batch_rows if arguments.world_size > 1 else 1,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Older checkpoints are deleted only after the new checkpoint is sealed.
        wait_for_processes()
        if self.args.should_save:
            run = Path(self.args.output_dir)
            # This pickle of all settings, including secrets, is not needed.
            (run / f"checkpoint-{self.state.global_step}" / "training_args.bin").unlink(missing_ok=True)
            checkpoints.write_seal(run / f"checkpoint-{self.state.global_step}", self._seal)
            best = self.state.best_model_checkpoint
            folders = checkpoints.list_checkpoints(run)
            recent = folders[-self._max_checkpoints :] if self._max_checkpoints else folders
            for path in folders:
                if path not in recent and (best is None or path.name != Path(best).name):
                    shutil.rmtree(path)
        wait_for_processes()

    def load_checkpoint(self, checkpoint: str) -> None:
        """Load the model from a checkpoint without training.

        With `load_best_model_at_end`, load the best checkpoint so far instead.
        """
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            self._load_best_model()

    def release(self) -> None:
        """Free the memory of the model and the optimizer, so that another model can be loaded.

        The trainer can no longer train, evaluate or save.
        """
        # The callback handler also references these objects, because it passes them to each callback.
        for name in (
            "model",
            "model_wrapped",
            "ref_model",
            "optimizer",
            "lr_scheduler",
            "train_dataloader",
            "eval_dataloader",
        ):
            for holder in (self, self.callback_handler):
                if hasattr(holder, name):
                    setattr(holder, name, None)
        self.accelerator.free_memory()
        # Models and their wrapped methods form reference cycles.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load_best_model(self) -> None:
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if damage := checkpoints.find_damage(best, self._seal):
            hint = "delete this checkpoint, and resume from an earlier checkpoint with --resume"
            raise InputRefused("damaged_checkpoint", f"the best checkpoint {best} cannot be used: {damage}", hint=hint)
        # The run directory may have been moved since the checkpoint was saved.
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing, because ftdata writes the model card of the run."""

    def _send_telemetry(self) -> None:
        pass


class BuildTrainer(RunTrainer, SFTTrainer):
    """A subclass of `SFTTrainer` that trains on the labels of a build."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the model. Return the mean loss per trained token, the perplexity, and the number of trained tokens.

        The parent class averages over batches instead, which gives more weight to the tokens of short batches.
        """
        del ignore_keys
        started = time.perf_counter()
        loss, tokens = self.token_loss(eval_dataset if eval_dataset is not None else self.eval_dataset)
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def token_loss(self, dataset: Any) -> tuple[float, int]:
        """Return a data set's mean loss per trained token and number of trained tokens. Combine all processes.

        The loss is the plain cross-entropy, even if training uses another loss or adds terms to it.
        """
        size, rank, ranks = self.args.eval_batch_size, self.args.process_index, self.args.world_size
        sums = torch.zeros(2, dtype=torch.float64)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        for start in range(0, len(dataset), size * ranks):
            indices = range(start + rank * size, min(start + (rank + 1) * size, len(dataset)))
            # Every process must call the model equally often, so a process without rows repeats the first row.
            batch = self.data_collator([dataset[index] for index in indices or range(1)])
            with torch.no_grad(), self.compute_loss_context_manager():
                output = model(**self._prepare_inputs(batch), use_cache=False, fused_lm_head=True)
            if indices:
                sums += torch.stack([-output.log_probs.double().sum(), output.label_mask.double().sum()]).cpu()
        model.train(was_training)
        total, count = self.accelerator.reduce(sums.to(self._sum_device()), "sum").tolist()
        return total / max(count, 1), int(count)

    def _sum_device(self) -> Any:
        # Metal does not support float64.
        return "cpu" if self.args.device.type == "mps" else self.args.device

    def test_scores(self) -> dict[str, float | None]:
        """Return the loss per trained token and the perplexity of the test split. Without a split, they are `None`."""
        loss = self.token_loss(self.eval_dataset)[0] if self.eval_dataset is not None else None
        return {"test_loss": loss, "perplexity": None if loss is None else math.exp(min(loss, 700))}


@dataclass(eq=False)
class EpochSampler(torch.utils.data.Sampler):
    """A sampler whose row order depends only on the seed and the epoch, so a resumed run uses the same order.

    The order is random or sequential. With lengths, rows of similar length are in the same batch, and the batch with
    the longest row comes first. With several processes, all of them need the same number of rows; an untrained filler
    row is repeated to make the numbers equal.

    Attributes:
        size: number of rows.
        per_step: number of rows per optimizer step.
        seed: random seed.
        get_epoch: function that returns the number of the current epoch.
        lengths: number of tokens of each row, or `None`.
        shuffled: whether the order is random.
        multiple_of: number that divides the number of samples; index `size`, the filler row, is repeated as needed.
    """

    size: int
    per_step: int
    seed: int
    get_epoch: Callable[[], int]
    lengths: NDArray[np.int64] | None = field(kw_only=True)
    shuffled: bool = field(kw_only=True)
    multiple_of: int = field(kw_only=True)

    def __len__(self) -> int:
        return self.size + -self.size % self.multiple_of

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.size)
        if self.shuffled:
            generator = np.random.default_rng((self.seed, self.get_epoch()))
            order = generator.permutation(self.size)
            if self.lengths is not None:
                order = self._group_by_length(order, self.lengths, generator)
        return iter([*order.tolist(), *[self.size] * (-self.size % self.multiple_of)])

    def _group_by_length(
        self, order: NDArray[np.int64], lengths: NDArray[np.int64], generator: np.random.Generator
    ) -> NDArray[np.int64]:
        pools = np.split(order, range(self.per_step * _POOL, len(order), self.per_step * _POOL))
        order = np.concatenate([pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools])
        batches = np.split(order, range(self.per_step, len(order), self.per_step))
        full = len(batches) - 1
        # The last batch may have fewer rows, so it stays last.
        mixed = [batches[number] for number in generator.permutation(full)] + batches[full:]
        longest = max(range(len(mixed)), key=lambda number: (len(mixed[number]), lengths[mixed[number]].max()))
        mixed.insert(0, mixed.pop(longest))
        return np.concatenate(mixed)


def add_filler_row(rows: Any) -> Any:
    """Append a row without trained tokens to the rows of a data set."""
    row = rows[0]
    first = (row.get("input_ids") or row["prompt_ids"])[:1]
    untrained = [[IGNORE_INDEX] * 2]
    filler = {
        "input_ids": [first * 2],
        "labels": untrained,
        "seq_lengths": [[2]],
        "prompt_ids": [first],
        "chosen_ids": [first * 2],
        "chosen_labels": untrained,
        "rejected_ids": [first * 2],
        "rejected_labels": untrained,
        "label": [False],
        "margin": [0.0],
        "ref_chosen_logps": [0.0],
        "ref_rejected_logps": [0.0],
        REFERENCES_COLUMN: [[]],
    }
    columns = {name: filler[name] for name in rows.column_names}
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_dict(columns, features=rows.features)])
