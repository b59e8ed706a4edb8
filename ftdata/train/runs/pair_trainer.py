"""Train on preference pairs with TRL's `DPOTrainer` and `RewardTrainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler
from trl import DPOTrainer, RewardTrainer

from ftdata.train.runs.trainer import RunTrainer
from ftdata.types import IGNORE_INDEX, SIDES


class PairTrainer(RunTrainer):
    """The base class of the trainers of pairs: it uses the tokens of a build, and its evaluations are exact.

    Attributes:
        scores: names of the scores in `run.json` -> metrics of the trainer of TRL.
    """

    scores: Mapping[str, str]

    def __init__(self, **arguments: Any) -> None:
        self._evaluated_pairs = list[int]()
        super().__init__(**arguments)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # The sampler of the parent class groups rows by the length of `input_ids`, which pairs do not have.
        return SequentialSampler(eval_dataset)

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Evaluate a batch, and record its number of pairs."""
        self._evaluated_pairs.append(len(inputs["input_ids"]) // 2)
        return super().prediction_step(model, inputs, *arguments, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics. A metric of an evaluation is the mean over all pairs.

        The parent class averages over batches instead, which gives more weight to the pairs of a short last batch.
        """
        if not self.model.training:
            for name, values in self._metrics["eval"].items():
                if len(values) == len(self._evaluated_pairs):
                    self._metrics["eval"][name] = [float(np.average(values, weights=self._evaluated_pairs))]
            self._evaluated_pairs.clear()
        super().log(logs, start_time)

    def test_scores(self) -> dict[str, float | None]:
        """Return the loss, the reward accuracy and the mean reward margin of the test split, or `None` for each.

        The accuracy is the share of pairs whose chosen answer has the higher reward.
        """
        metrics = self.evaluate() if self.eval_dataset is not None else {}
        return {name: metrics.get(f"eval_{metric}") for name, metric in self.scores.items()}


class DPORunTrainer(PairTrainer, DPOTrainer):
    """A subclass of `DPOTrainer` that trains on the labels of a build.

    `DPOTrainer` always tokenizes the data again, and trains on all tokens after the prompt. This class does neither.
    The reward of an answer is beta times the difference between its log-probabilities under the trained model and under
    the reference model (Rafailov et al. 2023, equation 5).
    """

    scores = MappingProxyType(
        {"test_loss": "loss", "reward_accuracy": "rewards/accuracies", "reward_margin": "rewards/margins"}
    )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # The parent class would store the log-probabilities in the folder of the build.
        folder = Path(self.args.output_dir)
        dataset._get_cache_file_path = lambda fingerprint: str(folder / f"reference-{name}-{fingerprint}.arrow")
        return super()._precompute_ref_logps(dataset, name, batch_size)


class RewardRunTrainer(PairTrainer, RewardTrainer):
    """A subclass of `RewardTrainer` that trains on the tokens of a build, which `RewardTrainer` would tokenize again.

    The model computes the reward of a side, including its prompt, at the last token.
    """

    scores = MappingProxyType({"test_loss": "loss", "reward_accuracy": "accuracy", "reward_margin": "margin"})


@dataclass(frozen=True)
class PairCollator:
    """Creates a batch of pairs: first all chosen sides, then all rejected sides, each with its prompt.

    Attributes:
        pad_id: the token id of the padding on the right.
        for_rewards: whether the batch is for a reward model, which is not trained on tokens, so there is no mask.
    """

    pad_id: int
    for_rewards: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return int64 tensors of shape `[2 * rows, tokens]`, and the log-probabilities of the reference model.

        `completion_mask` is 1 for each trained token. The float tensors `ref_chosen_logps` and `ref_rejected_logps` of
        shape `[rows]` exist if the rows contain them.
        """
        sides = [(row, side) for side in SIDES for row in rows]
        ids = [torch.tensor([*row["prompt_ids"], *row[f"{side}_ids"]]) for row, side in sides]
        labels = [
            torch.tensor([IGNORE_INDEX] * len(row["prompt_ids"]) + [*row[f"{side}_labels"]]) for row, side in sides
        ]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "completion_mask": pad_sequence([(one != IGNORE_INDEX).long() for one in labels], batch_first=True),
        }
        if self.for_rewards:
            del batch["completion_mask"]
        references = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in rows[0]]
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in references}
