"""Write the Arrow files of a build: packed sequences, or preference pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftdata.build.image_files import IMAGE_LISTS, has_images, locate_images, merge_row_images, to_image_lists
from ftdata.build.pack import PackPlan
from ftdata.build.shard_files import ExampleTable, MappedArray
from ftdata.storage import disk
from ftdata.storage.arrow_arrays import bool_array, float32_array, int32_array, list_offsets
from ftdata.types import IGNORE_INDEX

_TOKENS_PER_FILE, _TOKENS_PER_BATCH = 1 << 27, 1 << 20
_MAX_OPEN_SHARDS = 64
"""Maximum number of open shards. Each has two open files, and many processes can open only 256 files."""

_PACKS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("seq_lengths", pa.list_(pa.int32())),
    ]
)


_PAIRS = pa.schema(
    [
        (name, pa.list_(pa.int32()))
        for name in ("prompt_ids", "chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels")
    ]
)


_RATINGS = {"label": pa.bool_(), "margin": pa.float32()}
"""Name of a rating that the rows of a build have, if the data has it -> its type."""


@dataclass(frozen=True)
class PackFile:
    """The plan for one Arrow file of packed sequences: which examples it contains, and in which order.

    Attributes:
        path: the path of the file.
        shards: the folders of the shards that contain the examples.
        shard: int32 `[examples]`, the index into `shards` of each example, in the order of the packs.
        start: int64 `[examples]`, the index of the first token of each example in its shard.
        lengths: int32 `[examples]`, the number of tokens of each example.
        bounds: int64 `[packs + 1]`, the index of the first example of each pack, and the number of examples.
        batches: the index of the first pack of each record batch, and the number of packs.
        has_pairs: whether each pack contains the two sides of a preference pair, which are written as one row.
        ratings: float32 `[packs]`, the label or the margin of each pack, by name.
        images: the images of each example; empty if no example has images.
    """

    path: Path
    shards: Sequence[Path]
    shard: NDArray[np.int32] = field(repr=False)
    start: NDArray[np.int64] = field(repr=False)
    lengths: NDArray[np.int32] = field(repr=False)
    bounds: NDArray[np.int64] = field(repr=False)
    batches: Sequence[int] = field(repr=False)
    has_pairs: bool = False
    ratings: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)
    images: Sequence[list[dict[str, Any]]] = field(default=(), repr=False)

    @property
    def schema(self) -> pa.Schema:
        """The columns of the file."""
        columns = _PAIRS if self.has_pairs else _PACKS
        images = [("images", IMAGE_LISTS)] if self.images else []
        return pa.schema([*columns, *((name, _RATINGS[name]) for name in self.ratings), *images])

    def __str__(self) -> str:
        return str(self.path)


class WrittenFile(NamedTuple):
    """A file of a build, with its size in bytes and its SHA-256 hash for the manifest."""

    path: Path
    bytes: int
    sha256: str


def plan_pack_files(
    folder: Path,
    split: str,
    examples: ExampleTable,
    members: NDArray[np.int64],
    plan: PackPlan,
    *,
    has_pairs: bool = False,
) -> Iterator[PackFile]:
    """Yield a plan for each pack file of a split. The files can be written in any order and by any process.

    Args:
        folder: the folder of the build.
        split: the name of the split and of its folder.
        examples: all examples.
        members: int64, the examples of this split; `plan` contains indices into it.
        plan: the packs.
        has_pairs: whether each pack is a preference pair.
    """
    order, bounds = members[plan.order], plan.bounds
    ratings, images = examples.ratings(_RATINGS), examples.table["images"]
    with_images = has_images(images)
    sizes = np.diff(np.concatenate(([0], np.cumsum(examples.lengths[order])))[bounds])
    before = np.cumsum(sizes) - sizes
    batches = np.flatnonzero(np.diff(before // _TOKENS_PER_BATCH, prepend=-1, append=-1))
    file_of = before[batches[:-1]] // _TOKENS_PER_FILE
    for number in range(int(file_of[-1]) + 1 if len(file_of) else 1):
        file_batches = np.flatnonzero(file_of == number)
        packs = batches[file_batches[0] : file_batches[-1] + 2] if len(file_batches) else np.zeros(1, np.int64)
        file_examples = order[bounds[packs[0]] : bounds[packs[-1]]]
        first_examples = order[bounds[packs[0] : packs[-1]]]
        shard_numbers, shard = np.unique(examples.shard[file_examples], return_inverse=True)
        yield PackFile(
            folder / split / f"data-{number:05d}.arrow",
            [examples.folders[shard_number] for shard_number in shard_numbers.tolist()],
            shard.astype(np.int32),
            examples.start[file_examples],
            examples.lengths[file_examples].astype(np.int32),
            bounds[packs[0] : packs[-1] + 1] - bounds[packs[0]],
            (packs - packs[0]).tolist(),
            has_pairs,
            {name: values[first_examples] for name, values in ratings.items()},
            locate_images(images, file_examples, examples.shard[file_examples]) if with_images else (),
        )


def write_packs(_: None, file: PackFile) -> WrittenFile:
    """Write one pack file. The label of a trained token is its id. The label of an untrained token is -100."""
    with disk.create(file.path) as sink, pa.ipc.new_stream(sink, file.schema) as writer:
        for first, last in zip(file.batches[:-1], file.batches[1:], strict=True):
            writer.write_batch(_pack_batch(file, first, last))
    # The next build may have other shards with the same paths.
    _open_tokens.cache_clear()
    return WrittenFile(file.path, file.path.stat().st_size, disk.sha256_of_file(file.path))


def _pack_batch(file: PackFile, first: int, last: int) -> pa.RecordBatch:
    bounds = file.bounds[first : last + 1]
    batch = slice(int(bounds[0]), int(bounds[-1]))
    lengths = file.lengths[batch]
    ids, trained = _gather_tokens(file.shards, file.shard[batch], file.start[batch], lengths)
    extras = [
        bool_array(values[first:last] != 0) if name == "label" else float32_array(values[first:last].tolist())
        for name, values in file.ratings.items()
    ]
    if file.images:
        extras.append(to_image_lists(merge_row_images(file.images, file.bounds[first : last + 1].tolist())))
    if file.has_pairs:
        return pa.RecordBatch.from_arrays([*_pair_columns(ids, trained, lengths), *extras], schema=file.schema)
    example_bounds = int32_array(bounds - bounds[0])
    token_bounds = int32_array(np.concatenate(([0], np.cumsum(lengths)))[bounds - bounds[0]])
    columns = [
        pa.ListArray.from_arrays(token_bounds, int32_array(ids)),
        pa.ListArray.from_arrays(token_bounds, int32_array(np.where(trained, ids, np.int32(IGNORE_INDEX)))),
        pa.ListArray.from_arrays(example_bounds, int32_array(lengths)),
    ]
    return pa.RecordBatch.from_arrays([*columns, *extras], schema=file.schema)


def _pair_columns(
    ids: NDArray[np.int32], trained: NDArray[np.bool_], lengths: NDArray[np.int32]
) -> Iterator[pa.ListArray]:
    """Yield the columns of preference pairs. `lengths` contains the lengths of the chosen and rejected sides in turn.

    The prompt consists of the untrained tokens with which both sides begin.
    """
    labels = np.where(trained, ids, np.int32(IGNORE_INDEX))
    bounds = np.concatenate(([0], np.cumsum(lengths))).tolist()
    columns: list[list[NDArray[np.int32]]] = [[] for _ in _PAIRS]
    for start, middle, end in zip(bounds[:-2:2], bounds[1:-1:2], bounds[2::2], strict=True):
        shorter = min(middle - start, end - middle)
        differs = ids[start : start + shorter] != ids[middle : middle + shorter]
        differs |= trained[start : start + shorter] | trained[middle : middle + shorter]
        prompt = int(differs.argmax()) if differs.any() else shorter
        chosen, rejected = slice(start + prompt, middle), slice(middle + prompt, end)
        row = (ids[start : start + prompt], ids[chosen], labels[chosen], ids[rejected], labels[rejected])
        for column, values in zip(columns, row, strict=True):
            column.append(values)
    for lists in columns:
        yield pa.ListArray.from_arrays(list_offsets(map(len, lists)), int32_array(np.concatenate(lists)))


def _gather_tokens(
    folders: Sequence[Path], shard: NDArray[np.int32], start: NDArray[np.int64], lengths: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Read the token ids and the trained-token mask of examples from their shards, one shard after another.

    Returns:
        The ids (int32 `[tokens]`) and the mask (bool `[tokens]`), in the order of the examples.
    """
    runs = list(_contiguous_runs(shard, start, lengths))
    sizes = [end - first for _, first, end in runs]
    offsets = np.cumsum([0, *sizes]).tolist()
    ids, trained = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.bool_)
    by_shard = sorted(range(len(runs)), key=lambda run: runs[run][0])
    for number, shard_runs in groupby(by_shard, key=lambda run: runs[run][0]):
        tokens = _open_tokens(folders[number])
        for run in shard_runs:
            target = slice(offsets[run], offsets[run + 1])
            ids[target], trained[target] = (
                tokens.ids.values[slice(*runs[run][1:])],
                tokens.trained.values[slice(*runs[run][1:])],
            )
        tokens.ids.release()
        tokens.trained.release()
    return ids, trained


class _Tokens(NamedTuple):
    ids: MappedArray
    trained: MappedArray


@lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _open_tokens(shard: Path) -> _Tokens:
    return _Tokens(MappedArray.open(shard / "ids.i32", np.int32), MappedArray.open(shard / "trained.b8", np.bool_))


def _contiguous_runs(
    shard: NDArray[np.int32], start: NDArray[np.int64], lengths: NDArray[np.int32]
) -> Iterator[tuple[int, int, int]]:
    """Join examples whose tokens are adjacent in a shard. Yield the shard and token range of each joined group."""
    end = start + lengths
    is_boundary = np.ones(len(shard) + 1, dtype=np.bool_)
    is_boundary[1:-1] = (shard[1:] != shard[:-1]) | (start[1:] != end[:-1])
    bounds = np.flatnonzero(is_boundary)
    yield from zip(shard[bounds[:-1]].tolist(), start[bounds[:-1]].tolist(), end[bounds[1:] - 1].tolist(), strict=True)
