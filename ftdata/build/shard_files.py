"""Read and write the files of a shard, which store examples and rejected rows until the build is written.

    SHARD/ids.i32           token ids of all examples
    SHARD/trained.b8        one byte per token: 1 if it is trained, else 0
    SHARD/examples.arrow    table of the examples
    SHARD/rejects.jsonl     rejected rows
    SHARD/images.bin        bytes of images that the rows contain, if there are any
    SHARD/minhashes.u32     MinHash signatures of the examples, for near-duplicates

Rows and lines are counted from the beginning of the shard's part of the file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftdata.build.image_files import IMAGE_LISTS, ImageWriter, to_image_lists
from ftdata.pipeline.batch import Batch
from ftdata.redaction import redact_for_storage
from ftdata.storage import disk
from ftdata.storage.arrow_arrays import (
    float32_array,
    float32_column,
    int64_array,
    int64_column,
    list_offsets,
    string_array,
)
from ftdata.types import FEEDBACK, Conversation, Reject, Source

_MAX_OPEN_FILES = 64
"""Maximum number of example tables to map separately, because many processes can open only 256 files. More tables are
first concatenated into one file."""

_EXAMPLES = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),
        ("line", pa.int64()),
        ("tokens", pa.int64()),
        ("trained", pa.int64()),
        ("cut", pa.int64()),
        ("flags", pa.list_(pa.string())),
        ("content", pa.binary(24)),
        ("group_hash", pa.binary(16)),
        *((name, pa.float32()) for name in FEEDBACK),
        ("images", IMAGE_LISTS),
    ]
)


def write_shard(
    folder: Path,
    batches: Iterable[Batch],
    minhash: Callable[[Sequence[Conversation]], NDArray[np.uint32]] | None = None,
) -> None:
    """Write the examples and rejected rows of a shard to a folder.

    Args:
        folder: the folder.
        batches: the batches of the shard.
        minhash: computes the MinHash signatures of conversations; `None` if they are not needed.
    """
    with ExitStack() as stack:
        ids, trained, rejects, examples = (
            stack.enter_context(disk.create(folder / name))
            for name in ("ids.i32", "trained.b8", "rejects.jsonl", "examples.arrow")
        )
        table = stack.enter_context(pa.ipc.new_file(examples, _EXAMPLES))
        minhashes = stack.enter_context(disk.create(folder / "minhashes.u32")) if minhash else None
        images = ImageWriter(folder, stack)
        for batch in batches:
            ids.write(batch.tokens.ids.data)
            trained.write(batch.trained.data)
            rejects.write(b"".join(map(_encode_reject, batch.rejects)))
            if batch.counts:
                table.write_batch(_table_batch(batch, images))
            if minhash and minhashes:
                signatures = np.repeat(minhash(batch.conversations), batch.counts, axis=0)
                minhashes.write((signatures ^ _hash_images(batch)[:, None]).tobytes())


def _hash_images(batch: Batch) -> NDArray[np.uint32]:
    """Return a hash of the images of each example, 0 without images. Similar examples must have the same images."""
    return np.array([zlib.crc32(names.encode()) for names in batch.image_hashes], np.uint32)


def _encode_reject(reject: Reject) -> bytes:
    source, reason = reject.source, (reject.code, reject.field, reject.reason, reject.fix)
    return json.dumps([source, *reason, reject.raw, reject.lengths]).encode() + b"\n"


class FileOffset(NamedTuple):
    """The number of rows and lines that precede a shard in its file."""

    rows: int = 0
    lines: int = 0


_NO_OFFSET = FileOffset()


def read_rejects(folder: Path, offset: FileOffset = _NO_OFFSET) -> Iterator[Reject]:
    """Yield the rejected rows of a shard. Row and line numbers are counted from the beginning of the file."""
    with (folder / "rejects.jsonl").open("rb") as file:
        for line in file:
            values, code, field_path, reason, fix, raw, lengths = json.loads(line)
            source = Source(*values)
            source = source._replace(row=source.row + offset.rows, line=source.line and source.line + offset.lines)
            yield Reject(source, code, field_path, reason, fix, raw, tuple(lengths))


def _table_batch(batch: Batch, writer: ImageWriter) -> pa.RecordBatch:
    flags = [sorted(names) if names else () for names in batch.flags]
    # The content of an example is the hash of the tokens and labels of its whole row.
    row_hashes = batch.hash_rows()
    contents = [content for hashes, count in zip(row_hashes, batch.counts, strict=True) for content in hashes * count]
    columns = [
        string_array([_redact_path(source.path) for source in batch.sources]),
        int64_array([source.row for source in batch.sources]),
        int64_array([source.line for source in batch.sources]),
        int64_array(batch.lengths),
        int64_array(batch.trained_counts),
        int64_array(batch.cut),
        pa.ListArray.from_arrays(
            list_offsets(map(len, flags)), string_array([flag for names in flags for flag in names])
        ),
        pa.Array.from_buffers(pa.binary(24), len(batch.texts), [None, pa.py_buffer(b"".join(contents))]),
        pa.Array.from_buffers(
            pa.binary(16), len(batch.texts), [None, pa.py_buffer(b"".join(_hash_groups(batch, row_hashes)))]
        ),
        *map(float32_array, _feedback(batch)),
        to_image_lists([[writer.write(image) for image in text.images] for text in batch.texts]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_EXAMPLES)


def _hash_groups(batch: Batch, row_hashes: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    """Return a hash of each example (16 bytes). Examples with equal hashes must be in the same split.

    It is the hash of the tokens, because an example of a split conversation can equal an example of another row. For a
    rated answer, it is the hash of the prompt, because data sets contain several rated answers to one prompt.
    """
    if batch.is_rated:
        ids, trained = batch.tokens.ids, batch.trained
        ranges = pairwise(batch.tokens.token_bounds.tolist())
        prompts = [ids[start : start + int(trained[start:end].argmax())] for start, end in ranges]
        return [hashlib.sha256(prompt.tobytes()).digest()[:16] for prompt in prompts]
    has_split_rows = len(batch.counts) < len(batch.texts)
    return [ids for ids, _ in (batch.hash_examples() if has_split_rows else row_hashes)]


def _feedback(batch: Batch) -> Iterator[Sequence[float | None]]:
    """Yield a column for each name in `FEEDBACK`, with a number or `None` for each example."""
    for name in FEEDBACK:
        yield [conversation.feedback.get(name) for conversation in batch.example_conversations]


@lru_cache(maxsize=64)
def _redact_path(path: str) -> str:
    """Remove secrets from a path or URL before it is stored."""
    return str(redact_for_storage(path))


def read_minhashes(folder: Path, size: int) -> NDArray[np.uint32]:
    """Return the MinHash signatures of a shard's examples: uint32 `[examples, size]`."""
    path = folder / "minhashes.u32"
    # The file is not mapped, because mapping many shards would exceed the limit of open files.
    return np.fromfile(path, np.uint32).reshape(-1, size) if path.exists() else np.empty((0, size), np.uint32)


class MappedArray(NamedTuple):
    """An array of numbers that is memory-mapped from a file."""

    values: NDArray[Any]
    pages: mmap.mmap | None

    @classmethod
    def open(cls, path: Path, dtype: type[np.generic]) -> MappedArray:
        """Map a file into memory."""
        with path.open("rb") as file:
            if not path.stat().st_size:
                return cls(np.empty(0, dtype), None)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(np.frombuffer(pages, dtype), pages)

    def release(self) -> None:
        """Free the memory of the mapped pages. The next access reads the pages from the file again."""
        if self.pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)


def _open_tables(folders: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the example table of each shard, memory-mapped from its file."""
    if len(folders) <= _MAX_OPEN_FILES:
        for folder in folders:
            yield pa.ipc.open_file(pa.memory_map(os.fsencode(folder / "examples.arrow"))).read_all()
        return
    # A mapped file stays open, so many tables are concatenated into one file. It is deleted as soon as it is mapped.
    combined = folders[0].parent / f".examples-{secrets.token_hex(4)}.tmp"
    counts = list[int]()
    try:
        with disk.create(combined) as sink, pa.ipc.new_file(sink, _EXAMPLES) as writer:
            for folder in folders:
                with pa.OSFile(os.fsencode(folder / "examples.arrow")) as file:
                    batches = pa.ipc.open_file(file).read_all().to_batches()
                    counts.append(sum(map(len, batches)))
                    for batch in batches:
                        writer.write_batch(batch)
        table = pa.ipc.open_file(pa.memory_map(os.fsencode(combined))).read_all()
    finally:
        disk.remove(combined)
    ends = np.cumsum(counts)
    for count, end in zip(counts, ends.tolist(), strict=True):
        yield table.slice(end - count, count)


@dataclass(frozen=True)
class ExampleTable:
    """A table of all examples in a build, before they are packed.

    Attributes:
        folders: the folders of the shards.
        offsets: the number of rows and lines before each shard in its file.
        table: a row for each example.
        shard: int64 `[examples]`, the number of the shard.
        start: int64 `[examples]`, the index of the first token in the shard.
    """

    folders: Sequence[Path]
    offsets: Sequence[FileOffset]
    table: pa.Table = field(repr=False)
    shard: NDArray[np.int64] = field(repr=False)
    start: NDArray[np.int64] = field(repr=False)

    @classmethod
    def open(cls, folders: Sequence[Path], offsets: Sequence[FileOffset]) -> ExampleTable:
        """Open the shard files that `write_shard` wrote, as one table."""
        tables = list(_open_tables(folders))
        lengths = [int64_column(table["tokens"]) for table in tables]
        return cls(
            folders,
            offsets,
            pa.concat_tables(tables) if tables else _EXAMPLES.empty_table(),
            shard=np.repeat(np.arange(len(folders)), [len(counts) for counts in lengths]),
            start=np.concatenate([np.cumsum(counts) - counts for counts in lengths] or [np.empty(0, np.int64)]),
        )

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example (int64 `[examples]`)."""
        return self.column("tokens")

    def ratings(self, names: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Return the columns of `FEEDBACK` that have values (float32 `[examples]`). A missing number becomes 0."""
        columns = {name: self.table[name] for name in names}
        return {name: float32_column(column) for name, column in columns.items() if column.null_count < len(column)}

    def column(self, name: str) -> NDArray[np.int64]:
        """Return an integer column of the table (int64 `[examples]`)."""
        return int64_column(self.table[name])

    @property
    def content(self) -> str:
        """A hash of all examples in their order. It does not depend on how the examples are divided into shards."""
        digest = hashlib.sha256()
        for chunk in self.table["content"].chunks:
            digest.update(memoryview(chunk.buffers()[1])[chunk.offset * 24 : (chunk.offset + len(chunk)) * 24])
        return digest.hexdigest()

    @cached_property
    def contents(self) -> NDArray[np.bytes_]:
        """For each example, a 24-byte hash of the tokens and labels of its whole row (`[examples]`)."""
        return self._read_hashes("content", 24)

    @cached_property
    def group_hashes(self) -> NDArray[np.bytes_]:
        """For each example, a 16-byte hash; examples with equal hashes must be in the same split (`[examples]`)."""
        return self._read_hashes("group_hash", 16)

    def _read_hashes(self, name: str, size: int) -> NDArray[np.bytes_]:
        chunks = [
            np.frombuffer(chunk.buffers()[1], np.dtype(f"S{size}"))[chunk.offset : chunk.offset + len(chunk)]
            for chunk in self.table[name].chunks
            if len(chunk)
        ]
        return np.concatenate(chunks) if chunks else np.empty(0, f"S{size}")

    def add_offsets(self, table: pa.Table, shard: NDArray[np.int64]) -> pa.Table:
        """Return a copy of the table in which row and line numbers count from the start of the file, not of the shard.

        Args:
            table: the rows.
            shard: int64 `[rows]`, the number of the shard of each row.
        """
        if not any(map(any, self.offsets)):
            return table
        import pyarrow.compute as pc

        for number, name in enumerate(FileOffset._fields):
            column = table.schema.get_field_index(name[:-1])
            offsets = int64_array(np.array([offset[number] for offset in self.offsets], np.int64)[shard])
            table = table.set_column(column, name[:-1], pc.add(table.column(column), offsets))
        return table
