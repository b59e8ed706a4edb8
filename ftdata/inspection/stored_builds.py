"""Read the examples of a finished build from disk, with their tokens, labels and sources."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ftdata.build import remote
from ftdata.build.ledger import Report
from ftdata.build.read_packs import list_pack_files, read_pack_file
from ftdata.build.store import check_intact, read_manifest
from ftdata.errors import FtdataError, InputRefused, UsageError, describe_exception
from ftdata.inspection.survey import MOST_REJECTS, Survey
from ftdata.options import OPTIONS
from ftdata.pipeline.batch import Batch
from ftdata.pipeline.recipe import Recipe
from ftdata.readers import MemorySource
from ftdata.tokenizing.batches import Encodings, RenderedBatch, end_offsets
from ftdata.types import (
    FEEDBACK,
    IGNORE_INDEX,
    SIDES,
    Conversation,
    ImageReference,
    Reject,
    Rendered,
    RowTokens,
    Source,
)

_BATCH_SIZE = 256
_NO_TEXT = Rendered("", ())


class BuildDocument(NamedTuple):
    """One stored example of a build: its tokens, labels, flags and source.

    Attributes:
        number: The number of the example in the build.
        split: The name of the split.
        pack: The number of the packed sequence.
        source: The source of the row.
        flags: The flags of the example.
        cut: The number of truncated tokens.
        feedback: The ratings of the example, by their name in `FEEDBACK`.
        images: The images of the example.
        ids: int32 `[n]`, the token ids.
        labels: int32 `[n]`, the labels.
    """

    number: int
    split: str
    pack: int
    source: Source
    flags: frozenset[str]
    cut: int
    feedback: Mapping[str, float]
    images: tuple[ImageReference, ...]
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]


def find_build_folder(data: Any) -> Path | None:
    """Return the folder of a build, or `None` if `data` is not exactly one build.

    The rows of a build that is combined with other data are read as rows with tokens and labels.
    """
    if isinstance(data, list | tuple):
        data = data[0] if len(data) == 1 else None
    if isinstance(data, Mapping) and (folder := find_build_folder(data.get("path"))):
        names = ", ".join(str(name) for name in data if name != "path")
        problem = f"{names} does not apply to {folder}, which is a finished build"
        raise UsageError("option_of_finished_build", problem, hint="remove the option")
    return remote.find_build(data)


def refuse_build_options(options: Mapping[str, Any]) -> None:
    """Raise an error if any options would change the content of a build, because the build is finished.

    Raises:
        UsageError: An option differs from its default.
    """
    for name, value in options.items():
        default = OPTIONS[name].default if name in OPTIONS else None
        if value not in (None, default) and not (name == "reject_flags" and not value):
            hint = "remove the option, or pass the data that the build was made from"
            raise UsageError("option_of_finished_build", f"{name} does not apply to a finished build", hint=hint)


def load_build_recipe(folder: Path, tokenizer: Any = None) -> Recipe:
    """Load the recipe of a build: its options, tokenizer and template.

    Args:
        folder: The folder of the build.
        tokenizer: The current location of the tokenizer; `None` for the recorded location.

    Raises:
        UsageError: The tokenizer is missing, or is a different tokenizer.
        InputRefused: The folder is not a build, or the build is damaged.
    """
    manifest = read_manifest(folder)
    hint = "pass the tokenizer that the build was made with: --tokenizer"
    with _convert_errors(folder / "manifest.json"):
        name, fingerprint = (manifest["options"]["tokenizer"][key] for key in ("name", "fingerprint"))
        try:
            recipe = Recipe.from_manifest(manifest["options"], tokenizer)
        except FtdataError as error:
            if tokenizer is not None or error.code == "template_changed":
                raise
            problem = f"{folder} was built with {name}, which cannot be loaded: {error}"
            raise UsageError("tokenizer_missing", problem, hint=hint) from None
    if recipe.tokenizer.fingerprint != fingerprint:
        problem = f"{recipe.tokenizer.name} is not the tokenizer that {folder} was built with ({name})"
        raise UsageError("tokenizer_differs", problem, hint=hint)
    return recipe


def split_names(folder: Path) -> list[str]:
    """Return the names of the splits of a build, in the order in which the build stores them.

    Raises:
        InputRefused: The build is damaged.
    """
    with _convert_errors(folder / "dataset_dict.json"):
        splits = orjson.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        if not splits or not all(PurePosixPath(name).name == name and (folder / name).is_dir() for name in splits):
            raise ValueError("the listed splits do not match the folders of the build")
        return list(splits)


@contextmanager
def _convert_errors(path: Path) -> Iterator[None]:
    """Raise `InputRefused` in place of any error that occurs in the `with` block, which reads a file of a build."""
    try:
        yield
    except FtdataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        problem = f"{path} cannot be read: {describe_exception(error, 2_000)}"
        raise InputRefused("damaged_build", problem, hint="build the data set again") from None


def read_build_documents(folder: Path, splits: Sequence[str], *, check_files: bool = False) -> Iterator[BuildDocument]:
    """Read the examples of the given splits, in the order of the packed sequences.

    Args:
        folder: The folder of the build.
        splits: The names of the splits.
        check_files: Whether to compare each file with its hash before the file is read.

    Raises:
        InputRefused: The build is damaged.
    """
    documents = ((split, *values) for split in splits for values in _read_documents(folder, split, check_files))
    return (BuildDocument(number, *values) for number, values in enumerate(documents))


@dataclass(frozen=True)
class _TokenRows:
    """The examples of a build as rows with tokens and labels. They can be read several times."""

    folder: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for document in read_build_documents(self.folder, split_names(self.folder)):
            yield {"input_ids": document.ids, "labels": document.labels}


def make_source(folder: Path) -> MemorySource:
    """Return a source with the examples of a build, which may be packed, as rows with tokens and labels."""
    return MemorySource(_TokenRows(folder), str(folder))


def _read_documents(
    folder: Path, split: str, check_files: bool
) -> Iterator[tuple[int, Source, frozenset[str], int, Mapping[str, float], tuple[ImageReference, ...], Any, Any]]:
    def check(path: Path) -> Path:
        if check_files:
            check_intact(folder, {f"{split}/{path.name}"})
        return path

    with _convert_errors(folder / split):
        provenance = _iterate_provenance(check(folder / split / "provenance.parquet"))
        for path in list_pack_files(folder, split):
            check(path)
            for packs in read_pack_file(path):
                for start, end in pairwise(packs.token_bounds.tolist()):
                    if (values := next(provenance, None)) is None:
                        raise ValueError("provenance.parquet has fewer rows than the split has examples")
                    yield *values, packs.ids[start:end], packs.labels[start:end]
        if next(provenance, None) is not None:
            raise ValueError("provenance.parquet has more rows than the split has examples")


def _iterate_provenance(
    path: Path,
) -> Iterator[tuple[int, Source, frozenset[str], int, Mapping[str, float], tuple[ImageReference, ...]]]:
    file = pq.ParquetFile(pa.memory_map(os.fsencode(path)))
    names = ["pack", "source", "row", "line", "flags", "cut"]
    rated = [name for name in FEEDBACK if name in file.schema_arrow.names]
    has_images = "images" in file.schema_arrow.names
    read = [*names, *rated, *(["images"] if has_images else [])]
    for batch in file.iter_batches(columns=read, batch_size=1 << 14):
        lists = batch["images"].to_pylist() if has_images else [()] * len(batch)
        columns = (batch[name].to_pylist() for name in (*names, *rated))
        for images, pack, source, row, line, flags, cut, *ratings in zip(lists, *columns, strict=True):
            feedback = {name: value for name, value in zip(rated, ratings, strict=True) if value is not None}
            references = tuple(_read_reference(image, path.parents[1]) for image in images)
            yield pack, Source(source, row, line), frozenset(flags), cut, feedback, references


def _read_reference(image: Mapping[str, Any], folder: Path) -> ImageReference:
    names = ("start", "size", "hash", "width", "height")
    return ImageReference(str(folder / image["path"]), *(image[name] for name in names))


def batch_documents(recipe: Recipe, documents: Iterable[BuildDocument]) -> Iterator[Batch]:
    """Group stored examples into batches. Each example is a pretokenized row, whose text is decoded on access.

    The two stored examples of a preference pair are one row.
    """
    iterator = iter(documents)
    size = len(SIDES) if recipe.task == "preference" else 1
    while batch := list(islice(iterator, _BATCH_SIZE)):
        masks = [document.labels != IGNORE_INDEX for document in batch]
        token_bounds = end_offsets(len(document.ids) for document in batch)
        no_offsets = np.zeros(token_bounds[-1], np.int32)
        ids = np.concatenate([document.ids for document in batch])
        text_bounds = np.zeros(len(batch) + 1, np.int64)
        yield Batch(
            recipe.tokenizer,
            [_to_conversation(batch[i : i + size], masks[i : i + size]) for i in range(0, len(batch), size)],
            [size] * (len(batch) // size),
            RenderedBatch([_NO_TEXT._replace(images=document.images) for document in batch]),
            Encodings(ids, no_offsets, no_offsets, token_bounds, text_bounds),
            np.concatenate(masks),
            [document.flags for document in batch],
            np.asarray([document.cut for document in batch], np.int64),
            image_token_id=recipe.image_token_id,
        )


def _to_conversation(documents: Sequence[BuildDocument], masks: Sequence[NDArray[np.bool_]]) -> Conversation:
    """Return the row of one stored example, or of the two examples of a preference pair, which are its sides."""
    sides = tuple(
        Conversation(
            (),
            tokens=RowTokens(document.ids, trained),
            schema=document.split,
            source=document.source,
            feedback=document.feedback,
        )
        for document, trained in zip(documents, masks, strict=True)
    )
    number = documents[0].number // len(documents)
    fields = {"example": str(number), "pack": str(documents[0].pack)}
    if len(sides) == 1:
        return replace(sides[0], fields=fields)
    return replace(sides[0], fields=fields, sides=sides, feedback={})


def build_sources(folder: Path, splits: Sequence[str]) -> list[tuple[str, str]]:
    """Return the data sources of each split of a build, as pairs (source name, split).

    Raises:
        InputRefused: The build is damaged.
    """
    sources = list[tuple[str, str]]()
    for split in splits:
        # The path is passed as bytes because it might not be valid UTF-8.
        path = os.fsencode(folder / split / "provenance.parquet")
        with _convert_errors(folder), pa.memory_map(path) as file:
            paths = pq.read_table(file, columns=["source"])["source"].unique().to_pylist()
            sources += ((path, split) for path in paths)
    return sources


def read_report(folder: Path) -> Report:
    """Read the report of a build.

    Raises:
        InputRefused: The build is damaged.
    """
    path = folder / "report.json"
    with _convert_errors(path):
        return Report.from_dict(orjson.loads(path.read_bytes()))


def add_reported_rejects(folder: Path, survey: Survey) -> Survey:
    """Combine the collected counts of a build by row, and add the rejected rows from the build's report."""
    report = read_report(folder)
    codes = sum((ledger.rejected for ledger in report.sources), Counter[str]())
    rejects, overlong = list[Reject](), list[int]()
    for reject in read_build_rejects(folder):
        rejects += [reject] if len(rejects) < MOST_REJECTS else []
        overlong += reject.lengths if reject.code == "overlong" else ()
    return replace(
        survey.by_row(),
        read=report.total("read"),
        rejected=codes,
        rejects=tuple(rejects),
        overlong=np.asarray(overlong, np.int64),
    )


def read_build_rejects(folder: Path) -> Iterator[Reject]:
    """Read the rejected rows of a build.

    Raises:
        InputRefused: The build is damaged.
    """
    path = folder / "rejects.jsonl"
    with _convert_errors(path), path.open("rb") as file:
        for record in map(orjson.loads, file):
            source = Source(record["file"], record["row"], record["line"], record["byte_offset"])
            yield Reject(
                source,
                record["code"],
                record["field"],
                record["reason"],
                record["fix"],
                record["raw"],
                tuple(record["lengths"]),
            )
