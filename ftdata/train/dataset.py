"""Open a finished build, and provide its splits and token statistics for training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ftdata.build.dataset import load_build
from ftdata.build.store import check_intact, read_manifest
from ftdata.errors import InputRefused, UsageError
from ftdata.images.processor import load_image_processor
from ftdata.readers.file_names import split_from_name
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.tokenizer import find_control_tokens
from ftdata.types import IGNORE_INDEX, ImageReference


@dataclass(frozen=True)
class TrainingData:
    """The data of a finished build: the folder, the manifest, the train split, and the test split if there is one."""

    folder: Path
    manifest: Mapping[str, Any]
    splits: datasets.DatasetDict

    @property
    def has_pairs(self) -> bool:
        """Whether each row is a preference pair."""
        return has_pairs(self.splits["train"])

    @property
    def has_images(self) -> bool:
        """Whether any row has images."""
        return any("images" in split.column_names for split in self.splits.values())

    @property
    def is_packed(self) -> bool:
        """Whether any row is a packed sequence that contains several examples."""
        return not self.has_pairs and any(
            _largest(split, "seq_lengths", pc.list_value_length) > 1 for split in self.splits.values()
        )

    @property
    def longest_document(self) -> int:
        """Number of tokens of the longest example, or of the longest side of a pair with its prompt."""
        if self.has_pairs:
            return max(int(_longest_sides(batch).max()) for batch in self._batches())
        return max(_largest(split, "seq_lengths", pc.list_flatten) for split in self.splits.values())

    @property
    def vocabulary_size(self) -> int:
        """Number of embeddings that the data requires: the largest token id plus one."""
        columns = ("prompt_ids", "chosen_ids", "rejected_ids") if self.has_pairs else ("input_ids",)
        return 1 + max(_largest(split, name, pc.list_flatten) for split in self.splits.values() for name in columns)

    @property
    def first_document(self) -> list[int]:
        """The token ids of the first row of the train split. For a pair: the prompt and the chosen answer."""
        row: dict[str, list[int]] = self.splits["train"][0]
        return row["prompt_ids"] + row["chosen_ids"] if self.has_pairs else row["input_ids"]

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for split in self.splits.values():
            yield from split.data.to_batches()

    def find_stop_tokens(self, tokenizer: str) -> list[int]:
        """Return the ids of the control tokens, such as `<|im_end|>`, at the end of trained turns.

        The saved model must stop generating at these tokens.
        """
        loaded = load_tokenizer(tokenizer)
        template = self.manifest["options"]["template"]["source"] + (loaded.chat_template or "")
        last_tokens: NDArray[np.int64] = np.empty(0, np.int64)
        ids_column, labels_column = ("chosen_ids", "chosen_labels") if self.has_pairs else ("input_ids", "labels")
        for batch in self.splits["train"].data.to_batches():
            ids, labels = (
                pc.list_flatten(batch.column(name)).to_numpy(zero_copy_only=False)
                for name in (ids_column, labels_column)
            )
            lengths = (
                list_lengths(batch, ids_column)
                if self.has_pairs
                else pc.list_flatten(batch.column("seq_lengths")).to_numpy(zero_copy_only=False)
            )
            trained = labels != IGNORE_INDEX
            is_next_trained = np.append(trained[1:], False)
            is_next_trained[np.cumsum(lengths) - 1] = False
            last_tokens = np.union1d(last_tokens, ids[trained & ~is_next_trained])
        return [int(id_) for id_ in np.intersect1d(last_tokens, find_control_tokens(loaded, template).ids)]


def open_training_data(build: Path, tokenizer: str) -> TrainingData:
    """Open a build, and check that it is intact and was built with the given tokenizer and image processor.

    Raises:
        InputRefused: the build is damaged, or was built with another tokenizer; or it has images, and was built with
            other settings of the image processor.
        UsageError: the build has no split for training, or several.
    """
    manifest = read_manifest(build)
    check_intact(build)
    expected = manifest["options"]["tokenizer"]
    loaded = load_tokenizer(tokenizer)
    if loaded.fingerprint != expected["fingerprint"]:
        message = f"the tokenizer of {tokenizer} differs from the tokenizer of {build}, which is {expected['name']}"
        hint = "build again with the model's tokenizer, or set the tokenizer field to the tokenizer of the build"
        raise InputRefused("tokenizer_mismatch", message, hint=hint)
    data = TrainingData(build, manifest, training_splits(load_build(build)))
    if data.has_images:
        processor = load_image_processor(loaded.folder) if loaded.folder else None
        if processor is None or processor.fingerprint != expected["image_processor"]:
            message = f"the image processor of {tokenizer} differs from the image processor of the build {build}"
            hint = "build again with the image processor of the model"
            raise InputRefused("image_processor_mismatch", message, hint=hint)
    return data


def to_reference(image: Mapping[str, Any]) -> ImageReference:
    """Convert an image in a column of a build."""
    return ImageReference(**{name: image[name] for name in ImageReference._fields if name in image})


def training_splits(build: datasets.DatasetDict) -> datasets.DatasetDict:
    """Select the splits for training and evaluation from a build. Return them under the names `train` and `test`.

    Data sets use different split names, such as `train_sft` or `validation`. The evaluation uses a test split, or
    else a validation split.

    Raises:
        UsageError: no split, or more than one, is for training; or more than one is for evaluation.
    """
    kinds = {name: name if name in ("train", "test") else split_from_name(name) or "train" for name in build}
    hint = "in the mapping of the source, set the key 'split' to one of these names"
    splits = {}
    for purpose, candidates in (("train", ("train",)), ("test", ("test", "validation"))):
        by_kind = ([name for name in build if kinds[name] == kind] for kind in candidates)
        names = next(filter(None, by_kind), [])
        names = [name for name in names if name == kinds[name]] or names
        if len(names) > 1:
            raise UsageError("splits", f"the data has several {purpose} splits: {', '.join(names)}", hint=hint)
        if names:
            splits[purpose] = build[names[0]]
    if "train" not in splits:
        raise UsageError("splits", f"none of the splits is a train split: {', '.join(build)}", hint=hint)
    return datasets.DatasetDict(splits)


def find_rows_with_images(split: datasets.Dataset) -> NDArray[np.int64]:
    """Return the numbers of the rows that have images (int64 `[rows with images]`)."""
    counts: NDArray[Any] = pc.list_value_length(split.data.column("images")).to_numpy()
    return np.flatnonzero(counts)


def has_pairs(split: datasets.Dataset) -> bool:
    """Return whether the rows of a split are preference pairs."""
    return "chosen_ids" in split.column_names


def desirable_rows(split: datasets.Dataset) -> datasets.Dataset:
    """Return the rows of a split without the answers that data for KTO labels as undesirable."""
    return split.select(np.flatnonzero(split["label"])) if "label" in split.column_names else split


def list_lengths(batch: pa.RecordBatch, column: str) -> NDArray[np.int64]:
    """Return the length of each list in a column (int64 `[rows]`)."""
    lengths: NDArray[Any] = pc.list_value_length(batch.column(column)).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64)


def _longest_sides(batch: pa.RecordBatch) -> NDArray[np.int64]:
    prompt, chosen, rejected = (list_lengths(batch, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
    return np.asarray(prompt + np.maximum(chosen, rejected))


def _largest(split: datasets.Dataset, column: str, compute: Any) -> int:
    chunks: list[pa.Array] = split.data.column(column).chunks
    return max((pc.max(compute(chunk)).as_py() for chunk in chunks if len(chunk)), default=0)
