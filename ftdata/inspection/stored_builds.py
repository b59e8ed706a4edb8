"""Builds as data: the documents that a build holds, with their tokens, their labels and where they came from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ftdata.build import remote
from ftdata.build.store import read_manifest
from ftdata.errors import FtdataError, InputRefused, UsageError, describe_exception
from ftdata.inspection.survey import MOST_REJECTS, Survey
from ftdata.pipeline.examples import Batch, BuiltRow, MaskedTexts, pass_tokens_through
from ftdata.pipeline.recipe import Options, Recipe, make_recipe, recipe_arguments
from ftdata.tokenizing.batches import Encodings, ExampleColumns, RenderedBatch
from ftdata.types import IGNORE_INDEX, Conversation, Reject, RowTokens, Source

_AT_ONCE = 256
_NONE = MaskedTexts([], RenderedBatch([]), Encodings.of([], []), np.empty(0, np.bool_), [], {})


class BuildDocument(NamedTuple):
    """One example of a build: its number in it, that of its pack, and its tokens and labels as they are stored."""

    number: int
    split: str
    pack: int
    source: Source
    flags: frozenset[str]
    cut: int
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]


def find_build_folder(data: Any) -> Path | None:
    """Return the folder if that is what the data is: a build."""
    if isinstance(data, list | tuple):
        places = [one for one in data if isinstance(one, str | Path | Mapping)]
        if len(places) > 1 and any(find_build_folder(one) for one in places):
            raise UsageError("build_alone", "a build is looked at alone", hint="name one build, or its data")
        data = data[0] if len(data) == 1 else None
    if isinstance(data, Mapping) and (folder := find_build_folder(data.get("path"))):
        said = ", ".join(str(name) for name in data if name != "path")
        raise UsageError(
            "option_of_finished_build", f"{said} is said of a build, {folder}, which is done", hint="leave it out"
        )
    return remote.find_build(data)


def refuse_build_options(said: Mapping[str, Any]) -> None:
    """Refuse options that decide what a build becomes: it is done.

    Raises:
        UsageError: one is not as it is where nobody says anything.
    """
    usual = {each.name: each.default for each in fields(Options)}
    for name, value in said.items():
        if value is not None and value != usual.get(name) and not (name == "reject_flags" and not value):
            hint = "leave it out, or look at the data that it was made of"
            raise UsageError("option_of_finished_build", f"{name} is said of a build, which is done", hint=hint)


def load_build_recipe(folder: Path, tokenizer: Any = None) -> Recipe:
    """Return the tokenizer and template that a build was made with.

    Args:
        folder: the build.
        tokenizer: where its tokenizer is now; `None`: where it was.

    Raises:
        UsageError: it is another tokenizer, or is not there any more.
        InputRefused: the folder is no build, or damaged.
    """
    manifest = read_manifest(folder)
    names = ("turns", "control_tokens", "on_dropped_message", "on_missing_stop", "max_length", "overlong", "train_on")
    hint = "name the one that it was built with: --tokenizer"
    with _whole(folder / "manifest.json"):
        name, fingerprint = (manifest["options"]["tokenizer"][key] for key in ("name", "fingerprint"))
        given = recipe_arguments(manifest["options"], tokenizer, names=names)
    try:
        recipe = make_recipe(**given)
    except FtdataError as error:
        if tokenizer is not None:
            raise
        raise UsageError("tokenizer_missing", f"{folder} was built with {name}: {error}", hint=hint) from None
    if recipe.tokenizer.fingerprint != fingerprint:
        found = f"{recipe.tokenizer.name} is not the tokenizer that {folder} was built with ({name})"
        raise UsageError("tokenizer_differs", found, hint=hint)
    return recipe


def split_names(folder: Path) -> list[str]:
    """Return the names of a build's splits, in its order.

    Raises:
        InputRefused: the build is damaged.
    """
    with _whole(folder / "dataset_dict.json"):
        splits = orjson.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        if not splits or not all(PurePosixPath(name).name == name and (folder / name).is_dir() for name in splits):
            raise ValueError("it names no splits that are there")
        return list(splits)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Say that a build is damaged where a file of it cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        found = f"{path} cannot be read: {describe_exception(error, 2_000)}"
        raise InputRefused("damaged_build", found, hint="build it again") from None


def read_build_documents(folder: Path, splits: Sequence[str]) -> Iterator[BuildDocument]:
    """Yield the examples of splits, in the order of their packs.

    Raises:
        InputRefused: the build is damaged.
    """
    every = ((split, *one) for split in splits for one in _documents(folder, split))
    return (BuildDocument(number, *one) for number, one in enumerate(every))


def _documents(folder: Path, split: str) -> Iterator[tuple[int, Source, frozenset[str], int, Any, Any]]:
    with _whole(folder / split):
        told = _told(folder / split / "provenance.parquet")
        for path in sorted((folder / split).glob("data-*.arrow")):
            with pa.ipc.open_stream(pa.memory_map(os.fsencode(path))) as stream:
                for batch in stream:
                    # Buffers that contradict each other would end the process.
                    batch.validate(full=True)
                    ids, labels, lengths = (_values(batch[name]) for name in ("input_ids", "labels", "seq_lengths"))
                    ends = np.cumsum(lengths, dtype=np.int64).tolist()
                    if (lengths < 0).any() or not len(ids) == len(labels) == (ends[-1] if ends else 0):
                        raise ValueError("its lengths are not those of its tokens")
                    for start, end in pairwise([0, *ends]):
                        if (one := next(told, None)) is None:
                            raise ValueError("it holds more examples than rows of provenance")
                        yield *one, ids[start:end], labels[start:end]
        if next(told, None) is not None:
            raise ValueError("it holds fewer examples than were built")


def _told(path: Path) -> Iterator[tuple[int, Source, frozenset[str], int]]:
    names = ["pack", "source", "row", "line", "flags", "cut"]
    for batch in pq.ParquetFile(pa.memory_map(os.fsencode(path))).iter_batches(columns=names, batch_size=1 << 14):
        for pack, source, row, line, flags, cut in zip(*(batch[name].to_pylist() for name in names), strict=True):
            yield pack, Source(source, row, line), frozenset(flags), cut


def _values(column: pa.ListArray) -> NDArray[np.int32]:
    flat = column.flatten()
    return np.frombuffer(flat.buffers()[1], np.int32)[flat.offset : flat.offset + len(flat)]


def document_to_row(recipe: Recipe, document: BuildDocument) -> BuiltRow:
    """Return a document as it comes out of the stages: its text is that of its tokens.

    Raises:
        BadRow: it holds tokens that the tokenizer has not.
    """
    said = _said(document)
    assert said.tokens is not None
    example = replace(pass_tokens_through(recipe, said, said.tokens), flags=document.flags, cut=document.cut)
    return BuiltRow(said, (example,))


def _said(document: BuildDocument) -> Conversation:
    tokens = RowTokens(document.ids, document.labels != IGNORE_INDEX)
    told = {"example": str(document.number), "pack": str(document.pack)}
    return Conversation((), told, tokens=tokens, schema=document.split, source=document.source)


@dataclass(frozen=True, eq=False)
class StoredBatch(Batch):
    """Documents as what rows became; their texts are made of their tokens where somebody looks at them."""

    recipe: Recipe
    documents: Sequence[BuildDocument]

    plain = False

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[BuiltRow]:
        return map(self.built, range(len(self)))

    def built(self, number: int) -> BuiltRow:
        """Return one of the documents."""
        return document_to_row(self.recipe, self.documents[number])

    @cached_property
    def conversations(self) -> Sequence[Conversation]:
        """What is known of the rows behind them."""
        return [_said(one) for one in self.documents]

    @cached_property
    def counts(self) -> list[int]:
        """Each is an example."""
        return [1] * len(self.documents)

    @cached_property
    def columns(self) -> ExampleColumns:
        """All documents by columns."""
        some = self.documents
        trained = [one.labels != IGNORE_INDEX for one in some]
        return ExampleColumns(
            np.concatenate([one.ids for one in some]),
            np.concatenate(trained),
            np.asarray([len(one.ids) for one in some], np.int64),
            np.asarray([np.count_nonzero(one) for one in trained], np.int64),
            [one.cut for one in some],
            [one.flags for one in some],
            [one.source for one in some],
        )


def batch_documents(recipe: Recipe, some: Iterable[BuildDocument]) -> Iterator[StoredBatch]:
    """Yield documents as batches of what rows became."""
    left = iter(some)
    while chosen := list(islice(left, _AT_ONCE)):
        yield StoredBatch(_NONE, (), recipe, chosen)


def read_provenance(folder: Path, split: str) -> dict[str, NDArray[np.int64]]:
    """Return what `provenance.parquet` says of the examples of a split, in numbers (int64 `[examples]` each)."""
    table = _provenance(folder, split, ["pack", "tokens"])
    return {name: np.asarray(table[name].to_pylist(), np.int64) for name in table.column_names}


def _provenance(folder: Path, split: str, columns: list[str]) -> pa.Table:
    # Bytes, since a path need not be UTF-8.
    with pa.memory_map(os.fsencode(folder / split / "provenance.parquet")) as file:
        return pq.read_table(file, columns=columns)


def build_sources(folder: Path, splits: Sequence[str]) -> list[tuple[str, str]]:
    """Return the files that a build is made of, and the split of each.

    Raises:
        InputRefused: the build is damaged.
    """
    with _whole(folder):
        tables = [_provenance(folder, split, ["source"]) for split in splits]
    return [
        (path, split)
        for split, table in zip(splits, tables, strict=True)
        for path in table["source"].unique().to_pylist()
    ]


def add_reported_rejects(folder: Path, seen: Survey) -> Survey:
    """Return a survey of a build with what its report says: the rows that were read, and those that were rejected."""
    codes = Counter[str]()
    with _whole(folder / "report.json"):
        report = orjson.loads((folder / "report.json").read_bytes())
        read = int(report["read"])
        for ledger in report["sources"]:
            codes.update(ledger["rejected"])
    rejects, overlong = list[Reject](), list[int]()
    for one in read_build_rejects(folder):
        rejects += [one] if len(rejects) < MOST_REJECTS else []
        overlong += one.lengths if one.code == "overlong" else ()
    return replace(
        seen.by_row(),
        read=read,
        rejected=codes,
        rejects=tuple(rejects),
        overlong=np.asarray(overlong, np.int64),
    )


def read_build_rejects(folder: Path) -> Iterator[Reject]:
    """Yield the rows that were rejected when a build was made.

    Raises:
        InputRefused: the build is damaged.
    """
    path = folder / "rejects.jsonl"
    with _whole(path), path.open("rb") as file:
        for one in map(orjson.loads, file):
            source = Source(one["file"], one["row"], one["line"], one["byte_offset"])
            yield Reject(
                source, one["code"], one["field"], one["reason"], one["fix"], one["raw"], tuple(one["lengths"])
            )
