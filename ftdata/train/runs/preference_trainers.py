"""Train on rated answers with TRL's `DPOTrainer`, `RewardTrainer` and `KTOTrainer`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler
from trl import DPOTrainer, KTOTrainer, RewardTrainer

from ftdata.build.store import REFERENCE_FOLDER
from ftdata.storage.disk import hash_bytes
from ftdata.train.runs.trainer import RunTrainer
from ftdata.types import IGNORE_INDEX, SIDES


class PreferenceTrainer(RunTrainer):
    """The base class of the trainers of rated answers: it uses the tokens of a build, and its evaluations are exact.

    Attributes:
        scores: names of the scores in `run.json` -> metrics of the trainer of TRL.
    """

    scores: Mapping[str, str]

    def __init__(self, **arguments: Any) -> None:
        self._batch_row_counts = list[dict[str, int]]()
        super().__init__(**arguments)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # The sampler of the parent class can group rows by the length of `input_ids`, which pairs do not have.
        return SequentialSampler(eval_dataset)

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Evaluate a batch, and record how many rows its metrics cover."""
        self._batch_row_counts.append(self._count_rows(inputs))
        return super().prediction_step(model, inputs, *arguments, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics. A metric of an evaluation is the mean over all rows.

        The parent class averages over batches instead, which gives more weight to the rows of a short last batch.
        """
        if not self.model.training:
            for name, values in self._metrics["eval"].items():
                counts = (rows.get(name.rpartition("/")[2], rows["all"]) for rows in self._batch_row_counts)
                # A batch without rows of a kind has no metric of this kind.
                weights = [count for count in counts if count]
                if len(values) == len(weights):
                    self._metrics["eval"][name] = [float(np.average(values, weights=weights))]
            self._batch_row_counts.clear()
            self._complete_metrics(self._metrics["eval"])
        super().log(logs, start_time)

    def _count_rows(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Return the number of rows of a batch behind each metric.

        The keys are the last parts of the names of metrics, such as `chosen` for `rewards/chosen`; `all` is the number
        for all other metrics.
        """
        raise NotImplementedError

    def _complete_metrics(self, metrics: dict[str, list[float]]) -> None:
        """Compute metrics of an evaluation from its other metrics."""

    def test_scores(self) -> dict[str, float | None]:
        """Return the scores of the test split, or `None` for each if there is no test split.

        The accuracy is the share of pairs whose chosen answer has the higher reward. The margin is the mean reward of
        the chosen (desirable) answers minus the mean reward of the rejected (undesirable) answers.
        """
        metrics = self.evaluate() if self.eval_dataset is not None else {}
        return {name: metrics.get(f"eval_{metric}") for name, metric in self.scores.items()}


class PairTrainer(PreferenceTrainer):
    """The base class of the trainers of pairs."""

    def _count_rows(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        return {"all": len(inputs["input_ids"]) // 2}


class DPORunTrainer(PairTrainer, DPOTrainer):
    """A subclass of `DPOTrainer` that trains on the tokens and masks of a build.

    `DPOTrainer` always tokenizes the data again, and trains on all tokens after the prompt. This class does neither.
    The reward of an answer is beta times the difference between its log-probabilities under the trained model and under
    the reference model (Rafailov et al. 2023, equation 5).
    """

    scores = MappingProxyType(
        {"test_loss": "loss", "reward_accuracy": "rewards/accuracies", "reward_margin": "rewards/margins"}
    )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if is_peft_model(self.model):
            # The reference model is the model without the adapter.
            self._precompute_model_hash = _hash_frozen_weights(self.model)
        # The name of the file in TRL depends neither on the data of the build nor on these settings.
        settings = hash_bytes(repr((self.ld_alpha, self.args.bf16, self.args.fp16)).encode())[:8]
        folder, build = _reference_folder(dataset, Path(self.args.output_dir)), self._seal.fingerprint
        dataset._get_cache_file_path = lambda model: str(folder / f"{name}-{build}-{settings}-{model}.arrow")
        return super()._precompute_ref_logps(dataset, name, batch_size)


def _hash_frozen_weights(model: Any) -> str:
    """Return a hash of the weights that are not trained."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reference_folder(dataset: Any, run: Path) -> Path:
    """Return the folder for reference log-probabilities: in the build of a data set, or else in the run directory.

    Later runs with the same build and the same model read them again.
    """
    files = dataset.cache_files
    build = Path(files[0]["filename"]).parents[1] if files else run
    folder = (build if os.access(build, os.W_OK) else run) / REFERENCE_FOLDER
    folder.mkdir(exist_ok=True)
    return folder


class RewardRunTrainer(PairTrainer, RewardTrainer):
    """A subclass of `RewardTrainer` that trains on the tokens of a build, which `RewardTrainer` would tokenize again.

    The model computes the reward of a side, including its prompt, at the last token.
    """

    scores = MappingProxyType({"test_loss": "loss", "reward_accuracy": "accuracy", "reward_margin": "margin"})


class KTORunTrainer(PreferenceTrainer, KTOTrainer):
    """A subclass of `KTOTrainer` that trains on the tokens and masks of a build. `KTOTrainer` would tokenize again."""

    scores = MappingProxyType({"test_loss": "loss", "reward_margin": "rewards/margins"})

    def __init__(self, **arguments: Any) -> None:
        settings = arguments["args"]
        # The parent class pairs answers once, so it requires a fixed order. `LabelCollator` pairs them in each batch.
        strategy, settings.train_sampling_strategy = settings.train_sampling_strategy, "sequential"
        super().__init__(**arguments)
        settings.train_sampling_strategy = strategy

    def _count_rows(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        rows, desirable = len(inputs["label"]), int(inputs["label"].sum())
        both = rows if 0 < desirable < rows else 0
        return {"all": rows, "chosen": desirable, "rejected": rows - desirable, "margins": both}

    def _complete_metrics(self, metrics: dict[str, list[float]]) -> None:
        if metrics.get("rewards/chosen") and metrics.get("rewards/rejected"):
            metrics["rewards/margins"] = [metrics["rewards/chosen"][0] - metrics["rewards/rejected"][0]]


@dataclass(frozen=True)
class LabelCollator:
    """Collates labeled answers for KTO.

    KTO estimates the divergence from the reference model on answers to other prompts (Ethayarajh et al. 2024,
    section 4.1): each prompt is also paired with the answer of the previous row of the batch. Here, the prompt of a row
    ends before its first trained token.

    Attributes:
        pad_id: the token id of the padding on the right.
        max_kl_tokens: the number of tokens after which a prompt with another answer is cut; `None` for no limit.
    """

    pad_id: int
    max_kl_tokens: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch.

        `input_ids`, `attention_mask` and `completion_mask` (1 for each trained token) are int64 `[rows, tokens]`.
        `KL_input_ids`, `KL_attention_mask` and `KL_completion_mask` contain the answers of the previous rows, and can
        have another number of tokens. `label` is bool `[rows]`, true for desirable answers.
        """
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        trained = [torch.tensor(row["labels"]) != IGNORE_INDEX for row in rows]
        starts = [int(mask.int().argmax()) for mask in trained]
        batch = _pad_documents(ids, trained, self.pad_id)
        others = [
            [document[: self.max_kl_tokens] for document in _join_previous_answers(documents, starts)]
            for documents in (ids, trained)
        ]
        other_batch = _pad_documents(others[0], others[1], self.pad_id)
        batch |= {f"KL_{name}": tensor for name, tensor in other_batch.items()}
        return batch | {"label": torch.tensor([row["label"] for row in rows])}


def _join_previous_answers(documents: Sequence[torch.Tensor], starts: Sequence[int]) -> list[torch.Tensor]:
    """Join the part of each tensor before its start (its first trained token) with the rest of the tensor before."""
    return [
        torch.cat((documents[index][:start], documents[index - 1][starts[index - 1] :]))
        for index, start in enumerate(starts)
    ]


def _pad_documents(
    ids: Sequence[torch.Tensor], trained: Sequence[torch.Tensor], pad_id: int
) -> dict[str, torch.Tensor]:
    return {
        "input_ids": pad_sequence([*ids], batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "completion_mask": pad_sequence([mask.long() for mask in trained], batch_first=True),
    }


@dataclass(frozen=True)
class PairCollator:
    """Collates pairs: first all chosen sides, then all rejected sides, each with its prompt.

    Attributes:
        pad_id: the token id of the padding on the right.
        for_rewards: whether the batch is for a reward model, which is not trained on tokens, so there is no mask.
    """

    pad_id: int
    for_rewards: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch.

        `input_ids`, `attention_mask` and, except for rewards, `completion_mask` (1 for each trained token) are int64
        `[2 * rows, tokens]`. If the rows contain them, there are also float32 `[rows]`: `margin` for rewards; otherwise
        `ref_chosen_logps` and `ref_rejected_logps`.
        """
        sides = [(row, side) for side in SIDES for row in rows]
        ids = [torch.tensor([*row["prompt_ids"], *row[f"{side}_ids"]]) for row, side in sides]
        labels = [
            torch.tensor([IGNORE_INDEX] * len(row["prompt_ids"]) + [*row[f"{side}_labels"]]) for row, side in sides
        ]
        batch = _pad_documents(ids, [one != IGNORE_INDEX for one in labels], self.pad_id)
        if self.for_rewards:
            del batch["completion_mask"]
        numbers = ("margin",) if self.for_rewards else ("ref_chosen_logps", "ref_rejected_logps")
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in numbers if name in rows[0]}
