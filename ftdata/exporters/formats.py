"""The description of an export format, and the registry of all formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.registry import Registry
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.tokenizer import Tokenizer


@dataclass(frozen=True)
class BuildFacts:
    """Properties of the exported build that the formats need.

    Attributes:
        folder: the folder of the finished export.
        tokenizer: the name or folder of the tokenizer.
        splits: the number of documents of each split.
        is_packed: whether at least one packed sequence contains several documents.
        longest_pack: the number of tokens of the longest pack.
        longest_document: the number of tokens of the longest document.
        max_length: the option `max_length` of the build, or `longest_document` if the build has no `max_length`.
        fingerprint: the hash of the contents of the build.
    """

    folder: Path
    tokenizer: str
    splits: Mapping[str, int]
    is_packed: bool
    longest_pack: int
    longest_document: int
    max_length: int
    fingerprint: str

    @property
    def test_split(self) -> str | None:
        """The first split that is not for training, or `None`."""
        return next((name for name in self.splits if name != "train"), None)


class ExportFiles(Protocol):
    """Writes the files of an export, for example as JSON Lines."""

    def write(self, folder: Path, batches: Iterator[pa.RecordBatch]) -> None:
        """Write a part of a split to files in an empty folder."""

    def collect(self, target: Path, split: str, parts: Sequence[Path]) -> None:
        """Move the files of all parts of a split to the folder of the export."""


@dataclass(frozen=True)
class ExportFormat:
    """A format that a trainer reads.

    Attributes:
        trainer: the trainer, with the version whose loader was tested, such as `Axolotl 0.19.0`.
        rows: `packs` if a row of the export is a packed sequence, or `documents` if each row is one document.
        labels: how labels are stored, for the table of formats.
        boundaries: how the documents of a pack are separated, for the table of formats.
        padding: the component that pads rows, and how padding is excluded from the loss, for the table of formats.
        source: the file and line of the trainer that reads or shifts the labels, for the table of formats.
        files: the type of the files.
        convert: converts packs to a record batch with the columns of the format. With `rows="documents"`, it receives
            packs of one document each.
        package: the optional package that writes the files, or `""`.
        configure: returns the text files that the export also contains, such as a configuration of the trainer.
        limitations: the name of each limitation of the format -> its description. Users pass the name to `allow`.
        count_affected: returns the number of documents that each limitation affects. It receives the packs, and the
            record batch that `convert` returned for them.
    """

    trainer: str
    rows: str
    labels: str
    boundaries: str
    padding: str
    source: str
    files: ExportFiles
    convert: Callable[[Packs, BuildFacts], pa.RecordBatch]
    package: str = ""
    configure: Callable[[BuildFacts], Mapping[str, str]] = field(default=lambda _: {})
    limitations: Mapping[str, str] = field(default_factory=dict)
    count_affected: Callable[[Packs, pa.RecordBatch, BuildFacts], Mapping[str, int]] = field(default=lambda *_: {})


exporters = Registry[ExportFormat]("ftdata.exporters", "export format")
"""All export formats by name."""

_MODULES = (
    "axolotl", "datatrove", "litgpt", "llamafactory", "megatron_bridge", "megatron_lm", "mlx_lm", "mosaicml_streaming",
    "ms_swift", "nemo_automodel", "parquet", "pytorch", "skyrl", "text_spans", "tinker", "torchtune", "transformers",
    "trl", "verl",
)  # fmt: skip


def _load_format(module: str) -> ExportFormat:
    value: Any = import_module(f"ftdata.exporters.{module}").FORMAT
    assert isinstance(value, ExportFormat)
    return value


for _module in _MODULES:
    exporters.register_lazily(_module, partial(_load_format, _module))


@lru_cache(maxsize=1)
def load_build_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer of a build. The last tokenizer is cached."""
    return load_tokenizer(name)


def load_eos_id(tokenizer: str) -> int | None:
    """Return the id of the EOS token of a tokenizer, or `None` if it has no EOS token."""
    loaded = load_build_tokenizer(tokenizer)
    eos = loaded.special_tokens.get("eos_token")
    return None if eos is None else loaded.token_to_id(eos)
