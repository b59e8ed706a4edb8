"""Data: a finished build, as a run takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ftdata.build.dataset import load_build
from ftdata.build.store import read_manifest, verify_files
from ftdata.errors import InputRefused, UsageError
from ftdata.readers.file_names import split_from_name
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.tokenizer import find_control_tokens
from ftdata.types import IGNORE_INDEX


@dataclass(frozen=True)
class TrainingData:
    """A finished build: its folder, manifest and splits, `train` and maybe `test`."""

    folder: Path
    manifest: Mapping[str, Any]
    splits: datasets.DatasetDict

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents."""
        return any(_largest(split, "seq_lengths", pc.list_value_length) > 1 for split in self.splits.values())

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(_largest(split, "seq_lengths", pc.list_flatten) for split in self.splits.values())

    @property
    def vocabulary(self) -> int:
        """One more than the largest token id."""
        return 1 + max(_largest(split, "input_ids", pc.list_flatten) for split in self.splits.values())

    def stops(self, tokenizer: str) -> list[int]:
        """Return the control tokens that end trained turns: what the saved model must stop at."""
        loaded = load_tokenizer(tokenizer)
        template = self.manifest["options"]["template"]["source"] + (loaded.chat_template or "")
        found: NDArray[np.int64] = np.empty(0, np.int64)
        for batch in self.splits["train"].data.to_batches():
            lengths, ids, labels = (
                pc.list_flatten(batch.column(name)).to_numpy(zero_copy_only=False)
                for name in ("seq_lengths", "input_ids", "labels")
            )
            trained = labels != IGNORE_INDEX
            after = np.append(trained[1:], False)
            after[np.cumsum(lengths) - 1] = False
            found = np.union1d(found, ids[trained & ~after])
        return [int(id_) for id_ in np.intersect1d(found, find_control_tokens(loaded, template).ids)]


def open_training_data(build: Path, tokenizer: str) -> TrainingData:
    """Open a build that is whole, and was made with a tokenizer.

    Raises:
        InputRefused: it is damaged, or was made with another.
        UsageError: it has no split for training, or several.
    """
    manifest = read_manifest(build)
    if damaged := verify_files(build):
        raise InputRefused("damaged_build", f"{build} is damaged: {', '.join(damaged)}", hint="build again")
    made_with = manifest["options"]["tokenizer"]
    if load_tokenizer(tokenizer).fingerprint != made_with["fingerprint"]:
        raise InputRefused(
            "tokenizer_mismatch",
            f"{build} was built with tokenizer {made_with['name']}, which is not that of {tokenizer}",
            hint="build again with the model's own tokenizer, or name it with tokenizer:",
        )
    return TrainingData(build, manifest, training_splits(load_build(build)))


def training_splits(build: datasets.DatasetDict) -> datasets.DatasetDict:
    """Return the splits of a build that a run needs: `train`, and `test` where anything is held out.

    Data sets name them as they like (`train_sft`, `validation`): what is evaluated is what is called a test, or else a
    validation.

    Raises:
        UsageError: none of them, or several, are for training.
    """
    meant = {name: name if name in ("train", "test") else split_from_name(name) or "train" for name in build}
    found = {}
    for kind, wanted in (("train", ("train",)), ("test", ("test", "validation"))):
        for one in wanted:
            names = [name for name in build if meant[name] == one]
            exact = [name for name in names if name == one] or names
            if len(exact) > 1:
                listed = ", ".join(exact)
                raise UsageError("splits", f"several splits are for {kind}: {listed}", hint="choose with split")
            if exact:
                found[kind] = build[exact[0]]
                break
    if "train" not in found:
        raise UsageError("splits", f"no split is for training: {', '.join(build)}", hint="choose with split")
    return datasets.DatasetDict(found)


def _largest(split: datasets.Dataset, column: str, numbers: Any) -> int:
    chunks: list[pa.Array] = split.data.column(column).chunks
    return max((pc.max(numbers(chunk)).as_py() for chunk in chunks if len(chunk)), default=0)
