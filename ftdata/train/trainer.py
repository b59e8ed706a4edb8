"""The trainer: TRL's, with its own ways to evaluate, to put rows together and to keep checkpoints.

And nothing is written or sent beside what was asked for.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from trl import SFTTrainer

from ftdata.train import checkpoints
from ftdata.train.place import wait
from ftdata.types import IGNORE_INDEX

_POOL = 50
"""Batches among whose rows those of like length are looked for: enough to fill them evenly, few enough to mix."""


class Trainer(SFTTrainer):  # type: ignore[misc]
    """Trains on the labels of a build.

    Args:
        seal: what each checkpoint is to be known by.
        keep: how many checkpoints are kept, besides the best; `None` keeps all.
        lengths: tokens of each row, where rows of like length are to go together.
        more: the arguments of `SFTTrainer`.
    """

    def __init__(
        self, *, seal: checkpoints.Seal, keep: int | None, lengths: NDArray[np.int64] | None, **more: Any
    ) -> None:
        self._seal, self._keep, self._lengths = seal, keep, lengths
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
        """Return the mean loss over the trained tokens of a data set, and how many they are, over all processes."""
        size, rank, ranks = self.args.eval_batch_size, self.args.process_index, self.args.world_size
        sums = torch.zeros(2, dtype=torch.float64)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        for at in range(0, len(dataset), size * ranks):
            mine = range(at + rank * size, min(at + (rank + 1) * size, len(dataset)))
            # A process without rows of its own goes along with others' for nothing: all must call the model as often.
            batch = self.data_collator([dataset[number] for number in mine or range(1)])
            counted = _predicted(batch) if mine else 0
            loss, _, _ = self.prediction_step(model, batch, prediction_loss_only=True)
            sums += torch.tensor([float(loss) * counted, counted], dtype=torch.float64)
        model.train(was_training)
        total, count = self.accelerator.reduce(sums.to(self._sum_device()), "sum").tolist()
        return total / max(count, 1), int(count)

    def _sum_device(self) -> Any:
        # Metal knows no float64.
        return "cpu" if self.args.device.type == "mps" else self.args.device

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._lengths is None or train_dataset not in (None, self.train_dataset):
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return Grouped(self._lengths, rows, seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Only what is sealed counts, so an older one goes when the newer is.
        wait()
        if self.args.should_save:
            run = Path(self.args.output_dir)
            checkpoints.write_seal(run / f"checkpoint-{self.state.global_step}", self._seal)
            best = self.state.best_model_checkpoint
            kept = checkpoints.ordered(run)[-self._keep :] if self._keep else checkpoints.ordered(run)
            for path in checkpoints.ordered(run):
                if path not in kept and (best is None or path.name != Path(best).name):
                    shutil.rmtree(path)
        wait()

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: the run has one of its own."""

    def _send_telemetry(self) -> None:
        pass


class Grouped(torch.utils.data.Sampler):  # type: ignore[misc]
    """Rows in an order by chance, but those of like length together; the batch with the longest comes first.

    It is decided by seed and epoch alone, so that a resumed run goes through the same rows.
    """

    def __init__(self, lengths: NDArray[np.int64], rows: int, seed: int) -> None:
        self._lengths, self._rows, self._seed, self._epoch = lengths, rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = np.random.default_rng((self._seed, self._epoch))
        order = chance.permutation(len(self._lengths))
        pools = np.split(order, range(self._rows * _POOL, len(order), self._rows * _POOL))
        order = np.concatenate([pool[np.argsort(-self._lengths[pool], kind="stable")] for pool in pools])
        batches = np.split(order, range(self._rows, len(order), self._rows))
        whole = len(batches) - 1
        # The last batch may have fewer rows, and stays where it is.
        mixed = [batches[number] for number in chance.permutation(whole)] + batches[whole:]
        longest = max(range(len(mixed)), key=lambda number: (len(mixed[number]), self._lengths[mixed[number]].max()))
        mixed.insert(0, mixed.pop(longest))
        return iter(np.concatenate(mixed).tolist())


def _predicted(batch: Any) -> int:
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
