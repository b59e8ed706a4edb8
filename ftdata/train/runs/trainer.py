"""The trainer: TRL's, with evaluation by token, an order of rows of its own, and sealed checkpoints.

No card is written and nothing reported that was not asked for.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerState
from trl import SFTTrainer

from ftdata.errors import InputRefused
from ftdata.train import checkpoints
from ftdata.train.model.device import wait_for_processes
from ftdata.types import IGNORE_INDEX

_POOL = 50
"""Batches among whose rows those of like length are looked for: enough to fill them evenly, few enough to mix."""


class BuildTrainer(SFTTrainer):
    """Trains on the labels of a build.

    Args:
        seal: what each checkpoint is to be known by.
        keep: how many checkpoints are kept, besides the best; `None` keeps all.
        lengths: tokens of each row.
        more: the arguments of `SFTTrainer`.
    """

    def __init__(
        self, *, seal: checkpoints.CheckpointSeal, keep: int | None, lengths: NDArray[np.int64], **more: Any
    ) -> None:
        self._seal, self._keep, self._lengths, self._rows = seal, keep, lengths, len(lengths)
        if more["args"].world_size > 1:
            more["train_dataset"] = add_filler_row(more["train_dataset"])
        super().__init__(**more)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss over all trained tokens, and the perplexity: its exponential.

        A mean over batches, which is the parent's, gives the tokens of short batches more weight.
        """
        del ignore_keys
        started = time.perf_counter()
        loss, tokens = self.token_loss(eval_dataset if eval_dataset is not None else self.eval_dataset)
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def token_loss(self, dataset: Any) -> tuple[float, int]:
        """Return the mean loss over the trained tokens of a data set, and how many they are, over all processes.

        It is the cross-entropy alone, whatever is added to it or taken for it in training.
        """
        size, rank, ranks = self.args.eval_batch_size, self.args.process_index, self.args.world_size
        sums = torch.zeros(2, dtype=torch.float64)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        for at in range(0, len(dataset), size * ranks):
            mine = range(at + rank * size, min(at + (rank + 1) * size, len(dataset)))
            # A process without rows of its own goes along with others' for nothing: all must call the model as often.
            batch = self.data_collator([dataset[number] for number in mine or range(1)])
            with torch.no_grad(), self.compute_loss_context_manager():
                found = model(**self._prepare_inputs(batch), use_cache=False, fused_lm_head=True)
            if mine:
                sums += torch.stack([-found.log_probs.double().sum(), found.label_mask.double().sum()]).cpu()
        model.train(was_training)
        total, count = self.accelerator.reduce(sums.to(self._sum_device()), "sum").tolist()
        return total / max(count, 1), int(count)

    def _sum_device(self) -> Any:
        # Metal knows no float64.
        return "cpu" if self.args.device.type == "mps" else self.args.device

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        del train_dataset
        arguments = self.args
        at_once = arguments.train_batch_size * arguments.world_size
        strategy = str(getattr(arguments.train_sampling_strategy, "value", arguments.train_sampling_strategy))
        return EpochSampler(
            self._rows,
            at_once * arguments.gradient_accumulation_steps,
            arguments.data_seed if arguments.data_seed is not None else arguments.seed,
            # Of an epoch's end the trainer says that it is the next one's beginning.
            lambda: int((self.state.epoch or 0) + 1e-9),
            self._lengths if strategy == "group_by_length" else None,
            shuffled=strategy != "sequential",
            filled=at_once if arguments.world_size > 1 else 1,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Only what is sealed counts, so an older one goes when the newer is.
        wait_for_processes()
        if self.args.should_save:
            run = Path(self.args.output_dir)
            # A pickle of all settings, secrets among them, which nothing reads.
            (run / f"checkpoint-{self.state.global_step}" / "training_args.bin").unlink(missing_ok=True)
            checkpoints.write_seal(run / f"checkpoint-{self.state.global_step}", self._seal)
            best = self.state.best_model_checkpoint
            kept = checkpoints.list_checkpoints(run)[-self._keep :] if self._keep else checkpoints.list_checkpoints(run)
            for path in checkpoints.list_checkpoints(run):
                if path not in kept and (best is None or path.name != Path(best).name):
                    shutil.rmtree(path)
        wait_for_processes()

    def take(self, checkpoint: str) -> None:
        """Be what a checkpoint is, or the best before it, without training."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            self._load_best_model()

    def release(self) -> None:
        """Let go of the model, the optimizer and all that holds them, so that another model fits into the memory.

        The trainer cannot train, evaluate or save any more.
        """
        # Callbacks get these with each event, so their handler keeps them, too.
        for name in ("model", "model_wrapped", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"):
            for holder in (self, self.callback_handler):
                if hasattr(holder, name):
                    setattr(holder, name, None)
        self.accelerator.free_memory()
        # Models and their wrapped methods hold each other.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load_best_model(self) -> None:
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if wrong := checkpoints.find_damage(best, self._seal):
            hint = "take it away, and go on with --resume from an earlier one"
            raise InputRefused("damaged_checkpoint", f"the best model is that of {best}: {wrong}", hint=hint)
        # The run may have been moved since it was saved.
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: the run has one of its own."""

    def _send_telemetry(self) -> None:
        pass


class EpochSampler(torch.utils.data.Sampler):
    """The order that rows are trained in, decided by seed and epoch alone, so that a resumed run has the same.

    It is by chance, or as the rows stand; with lengths, rows of like length go together and the batch with the longest
    comes first. Several processes need as many rows each: what they lack is a row of which nothing is trained.

    Args:
        size: how many rows there are.
        per_step: how many are trained between two steps of the optimizer.
        seed: decides what is left to chance.
        epoch: says which epoch it is.
        lengths: tokens of each row, or `None`.
        shuffled: whether anything is left to chance.
        filled: the number of rows must be a multiple of this; number `size` stands for those that lack.
    """

    def __init__(
        self,
        size: int,
        per_step: int,
        seed: int,
        epoch: Callable[[], int],
        lengths: NDArray[np.int64] | None,
        *,
        shuffled: bool,
        filled: int,
    ) -> None:
        self._size, self._per_step, self._seed, self._epoch = size, per_step, seed, epoch
        self._lengths, self._shuffled = lengths, shuffled
        self._lacking = -size % filled

    def __len__(self) -> int:
        return self._size + self._lacking

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self._size)
        if self._shuffled:
            chance = np.random.default_rng((self._seed, self._epoch()))
            order = chance.permutation(self._size)
            if self._lengths is not None:
                order = self._grouped(order, self._lengths, chance)
        return iter([*order.tolist(), *[self._size] * self._lacking])

    def _grouped(
        self, order: NDArray[np.int64], lengths: NDArray[np.int64], chance: np.random.Generator
    ) -> NDArray[np.int64]:
        pools = np.split(order, range(self._per_step * _POOL, len(order), self._per_step * _POOL))
        order = np.concatenate([pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools])
        batches = np.split(order, range(self._per_step, len(order), self._per_step))
        whole = len(batches) - 1
        # The last batch may have fewer rows, and stays where it is.
        mixed = [batches[number] for number in chance.permutation(whole)] + batches[whole:]
        longest = max(range(len(mixed)), key=lambda number: (len(mixed[number]), lengths[mixed[number]].max()))
        mixed.insert(0, mixed.pop(longest))
        return np.concatenate(mixed)


def add_filler_row(rows: Any) -> Any:
    """Return rows with one more, of which nothing is trained."""
    first = rows[0]["input_ids"][:1]
    filler = {"input_ids": [first * 2], "labels": [[IGNORE_INDEX] * 2], "seq_lengths": [[2]]}
    kept = {name: filler[name] for name in rows.column_names}
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_dict(kept, features=rows.features)])
