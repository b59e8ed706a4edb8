"""Shard files: what a shard's rows became, in files of their own, until the build is written of them.

    SHARD/ids.i32           the tokens of all examples
    SHARD/trained.b8        which of them carry loss
    SHARD/examples.arrow    a table of the examples
    SHARD/rejects.jsonl     the rows that were rejected
    SHARD/minhashes.u32     what the examples say, where near-duplicates are looked for

Rows and lines are counted from the beginning of the part of a file that the shard is.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftdata.redaction import redact_for_storage
from ftdata.storage import disk
from ftdata.storage.arrow_arrays import int64_array, int64_column, list_offsets, string_array
from ftdata.tokenizing.batches import ExampleColumns
from ftdata.types import Reject, Source

_MAX_OPEN_FILES = 64
"""Tables of examples that stay open: processes may often open 1,024 files, or 256. More are written into one file."""

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
    ]
)


class ShardContent(NamedTuple):
    """What some rows became.

    Attributes:
        columns: their examples.
        contents: for each example the hash of what its row became: 16 bytes of the tokens, 8 of the labels.
        rejects: those that were rejected.
        minhashes: uint32 `[examples, ...]`, what each example says; or `None`.
    """

    columns: ExampleColumns
    contents: Sequence[bytes]
    rejects: Sequence[Reject]
    minhashes: NDArray[np.uint32] | None


def write_shard(folder: Path, batches: Iterable[ShardContent]) -> None:
    """Write what the rows of a shard became into a folder."""
    with ExitStack() as stack:
        ids, trained, rejects, examples = (
            stack.enter_context(disk.create(folder / name))
            for name in ("ids.i32", "trained.b8", "rejects.jsonl", "examples.arrow")
        )
        table = stack.enter_context(pa.ipc.new_file(examples, _EXAMPLES))
        minhashes = None
        for batch in batches:
            ids.write(batch.columns.ids.data)
            trained.write(batch.columns.trained.data)
            rejects.write(b"".join(map(_line, batch.rejects)))
            if batch.contents:
                table.write_batch(_table_batch(batch.columns, batch.contents))
            if batch.minhashes is not None:
                minhashes = minhashes or stack.enter_context(disk.create(folder / "minhashes.u32"))
                minhashes.write(batch.minhashes.tobytes())


def _line(reject: Reject) -> bytes:
    place, why = reject.source, (reject.code, reject.field, reject.reason, reject.fix)
    return json.dumps([place, *why, reject.raw, reject.lengths]).encode() + b"\n"


class FileOffset(NamedTuple):
    """What stands in a file before a shard of it: rows, and lines."""

    rows: int = 0
    lines: int = 0


_NOTHING = FileOffset()


def read_rejects(folder: Path, before: FileOffset = _NOTHING) -> Iterator[Reject]:
    """Yield the rows of a shard that were rejected, counted from the beginning of the file."""
    with (folder / "rejects.jsonl").open("rb") as file:
        for line in file:
            source, code, where, reason, fix, raw, lengths = json.loads(line)
            place = Source(*source)
            place = place._replace(row=place.row + before.rows, line=place.line and place.line + before.lines)
            yield Reject(place, code, where, reason, fix, raw, tuple(lengths))


def _table_batch(examples: ExampleColumns, contents: Sequence[bytes]) -> pa.RecordBatch:
    flags = [sorted(each) if each else () for each in examples.flags]
    columns = [
        string_array([_public(source.path) for source in examples.sources]),
        int64_array([source.row for source in examples.sources]),
        int64_array([source.line for source in examples.sources]),
        int64_array(examples.lengths),
        int64_array(examples.trained_counts),
        int64_array(examples.cut),
        pa.ListArray.from_arrays(
            list_offsets(map(len, flags)), string_array([flag for each in flags for flag in each])
        ),
        pa.Array.from_buffers(pa.binary(24), len(contents), [None, pa.py_buffer(b"".join(contents))]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_EXAMPLES)


@lru_cache(maxsize=64)
def _public(path: str) -> str:
    """Return a path as it may be stored: an address without its password."""
    return str(redact_for_storage(path))


def read_minhashes(folder: Path, size: int) -> NDArray[np.uint32]:
    """Return the MinHashes of a shard's examples: uint32 `[examples, size]`."""
    path = folder / "minhashes.u32"
    # Not mapped: of many shards, more files would be open than a process may have.
    return np.fromfile(path, np.uint32).reshape(-1, size) if path.exists() else np.empty((0, size), np.uint32)


class MappedArray(NamedTuple):
    """A file of numbers, in memory where it is looked at."""

    values: NDArray[Any]
    pages: mmap.mmap | None

    @classmethod
    def of(cls, path: Path, dtype: type[np.generic]) -> MappedArray:
        """Map a file."""
        with path.open("rb") as file:
            if not path.stat().st_size:
                return cls(np.empty(0, dtype), None)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(np.frombuffer(pages, dtype), pages)

    def forget(self) -> None:
        """Give back the memory of what was read; it is read again where somebody asks."""
        if self.pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)


def _tables(folders: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the table of examples of each shard, mapped into memory."""
    if len(folders) <= _MAX_OPEN_FILES:
        for folder in folders:
            yield pa.ipc.open_file(pa.memory_map(os.fsencode(folder / "examples.arrow"))).read_all()
        return
    # A mapped file stays open: many tables become one file, whose name is not needed once it is mapped.
    joined = folders[0].parent / f".examples-{secrets.token_hex(4)}.tmp"
    counts = list[int]()
    try:
        with disk.create(joined) as sink, pa.ipc.new_file(sink, _EXAMPLES) as writer:
            for folder in folders:
                with pa.OSFile(os.fsencode(folder / "examples.arrow")) as file:
                    batches = pa.ipc.open_file(file).read_all().to_batches()
                    counts.append(sum(map(len, batches)))
                    for batch in batches:
                        writer.write_batch(batch)
        table = pa.ipc.open_file(pa.memory_map(os.fsencode(joined))).read_all()
    finally:
        disk.remove(joined)
    ends = np.cumsum(counts)
    for count, end in zip(counts, ends.tolist(), strict=True):
        yield table.slice(end - count, count)


@dataclass(frozen=True)
class ExampleTable:
    """All examples of a build, before packing: where they stand, and one table.

    Attributes:
        folders: the shards.
        before: what stands before each of them in its file.
        table: a row for each example.
        shard: int64 `[examples]`, the number of the shard.
        start: int64 `[examples]`, from which token of the shard on it stands.
    """

    folders: Sequence[Path]
    before: Sequence[FileOffset]
    table: pa.Table = field(repr=False)
    shard: NDArray[np.int64] = field(repr=False)
    start: NDArray[np.int64] = field(repr=False)

    @classmethod
    def open(cls, folders: Sequence[Path], before: Sequence[FileOffset]) -> ExampleTable:
        """Open the shards that `write_shard` wrote."""
        tables = list(_tables(folders))
        lengths = [int64_column(table["tokens"]) for table in tables]
        return cls(
            folders,
            before,
            pa.concat_tables(tables) if tables else _EXAMPLES.empty_table(),
            shard=np.repeat(np.arange(len(folders)), [len(each) for each in lengths]),
            start=np.concatenate([np.cumsum(each) - each for each in lengths] or [np.empty(0, np.int64)]),
        )

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example (int64 `[examples]`)."""
        return self.column("tokens")

    def column(self, name: str) -> NDArray[np.int64]:
        """Return a column of whole numbers of the table (int64 `[examples]`)."""
        return int64_column(self.table[name])

    @property
    def content(self) -> str:
        """A hash of what all rows became, in their order; in which shards they stand does not matter."""
        found = hashlib.sha256()
        for chunk in self.table["content"].chunks:
            found.update(memoryview(chunk.buffers()[1])[chunk.offset * 24 : (chunk.offset + len(chunk)) * 24])
        return found.hexdigest()

    @cached_property
    def contents(self) -> NDArray[np.bytes_]:
        """The hash of what each example's row became (24 bytes each, `[examples]`)."""
        chunks = [
            np.frombuffer(chunk.buffers()[1], np.dtype("S24"))[chunk.offset : chunk.offset + len(chunk)]
            for chunk in self.table["content"].chunks
            if len(chunk)
        ]
        return np.concatenate(chunks) if chunks else np.empty(0, "S24")

    def placed(self, table: pa.Table, shard: NDArray[np.int64]) -> pa.Table:
        """Return rows of the table, of these shards, with places counted from the beginning of their files."""
        if not any(map(any, self.before)):
            return table
        import pyarrow.compute as pc

        for at, name in enumerate(FileOffset._fields):
            column = table.schema.get_field_index(name[:-1])
            more = int64_array(np.array([one[at] for one in self.before], np.int64)[shard])
            table = table.set_column(column, name[:-1], pc.add(table.column(column), more))
        return table
