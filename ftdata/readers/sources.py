"""Convert the user's data to sources. A source is a file or a collection of rows in memory."""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from ftdata.errors import FtdataError, InputRefused, UsageError, check_choice, suggest_names
from ftdata.options import FILE_KEYS, HUB_KEYS, SHARE_KEYS, SOURCE_KEYS, check_source_keys
from ftdata.readers.formats import Reader, readers
from ftdata.readers.remote_files import remote_version
from ftdata.readers.resolve_paths import resolve_files
from ftdata.readers.streams import STDIN, Input, detect_compression, is_object_store
from ftdata.readers.traces import read_traces
from ftdata.registry import is_built_in
from ftdata.types import WHOLE, Reject, Row, Source, SourceShare

_MAX_WEIGHT = 1000
_MOST_LISTED_SOURCES = 1000


@dataclass(frozen=True, slots=True)
class FileSource:
    """An input file, with all settings that a worker process needs to read its rows.

    Attributes:
        path: local path, URL, or `-` for standard input.
        reader: name of the reader.
        encoding: encoding of text without a byte order mark; `None` for UTF-8.
        split: split that the rows belong to, if it is known.
        share: how much of the source is trained on.
        item_index: index of the user's data item that contains this file. An item may contain several files.
        streaming: whether a file on the Hub is read from there instead of being downloaded first.
        first: number of the first row to read.
        last: number of the row after the last row to read; `None` for all rows.
        span: the part of the file to read, see `Input`. Rows are counted from the beginning of the part.
        length: bytes of the part, or of a remote file.
        version: version of the file when its parts were planned, which all parts must have.
        quoting: how quotes are read in CSV and TSV files, `csv` or `none`.
        ignore_records: names of unknown types of records of agent sessions to ignore.
    """

    path: str
    reader: str
    encoding: str | None = None
    split: str | None = None
    share: SourceShare = WHOLE
    item_index: int = 0
    streaming: bool = False
    first: int = 0
    last: int | None = None
    span: tuple[int, int] | None = None
    length: int | None = None
    version: Any = None
    quoting: str | None = None
    ignore_records: tuple[str, ...] = ()

    @property
    def input(self) -> Input:
        """The `Input` object to pass to the reader."""
        return Input(self.path, self.encoding, streaming=self.streaming, span=self.span, quoting=self.quoting)

    def rows(self) -> Generator[Row | Reject, None, int | None]:
        """Yield the rows and rejects of the file, in file order.

        The generator returns the number of lines, if the reader counts lines.

        Raises:
            InputRefused: The file cannot be read, or changed while it was being read.
        """
        before, lines = self.version if self.version is not None else _local_version(self.path), None
        self._check_version(before)
        reader = readers.get(self.reader)
        items = reader(self.input) if is_built_in(reader) else _run_user_reader(reader, self)
        is_start = self.span is None or self.span[0] == 0
        rows = read_traces(items, frozenset(self.ignore_records), may_be_session=is_start)
        if self.span is not None and isinstance(rows, Generator):
            lines = yield from rows
        else:
            yield from islice(rows, self.first, self.last)
        self._check_version(before)
        return lines

    def _check_version(self, before: Any) -> None:
        if before != (file_version(self.path) if self.version is not None else _local_version(self.path)):
            message = "the file changed while it was being read"
            raise InputRefused("file_changed", message, where=self.path, hint="read it again")

    @property
    def size(self) -> int:
        """Size in bytes of the file, or of the part to read. The value is 0 if the size is unknown."""
        if self.length is not None:
            return self.length
        version = _local_version(self.path)
        return version[0] if version else 0

    def share_before(self, row: Source) -> float | None:
        """Return the fraction of the file before a row, from 0 to 1. Return `None` if the fraction is unknown."""
        version = _local_version(self.path)
        if row.offset is None or not version or not version[0] or _is_compressed(self.path, version):
            return None
        first, last = self.span or (0, version[0])
        return min((row.offset - first) / (last - first), 1.0)

    def count(self, enough: int | None = None) -> int:
        """Count the rows of the file. Stop when the count reaches `enough`."""
        if self.reader == "parquet":
            from ftdata.readers.parquet import count_parquet_rows

            if (rows := count_parquet_rows(self.input)) is not None:
                return rows if enough is None else min(rows, enough)
        return sum(1 for _ in islice(self.rows(), enough))


def _run_user_reader(reader: Reader, file: FileSource) -> Iterator[Row | Reject]:
    """Run a user-defined reader. Check each row before it is yielded."""
    from ftdata.readers.in_memory import arrays_to_lists

    last = -1
    try:
        rows: Iterator[Any] = iter(reader(file.input))
        for row in rows:
            if fault := _find_fault(row, last):
                raise InputRefused("reader_failed", f"the reader {file.reader} {fault}", where=file.path)
            last = row.source.row
            # The data is copied, because a reader may yield the same object again with different content.
            yield row._replace(data=arrays_to_lists(row.data)) if isinstance(row, Row) else row
    except FtdataError:
        raise
    except Exception as error:
        message = f"the reader {file.reader} failed: {type(error).__name__}: {error}"
        raise InputRefused("reader_failed", message, where=file.path, hint="correct the reader or the file") from error


def _find_fault(row: Any, last: int) -> str | None:
    """Check an object that a user-defined reader yielded. Return the fault, or `None` if the object is valid.

    `last` is the number of the previous row.
    """
    if not isinstance(row, Row | Reject):
        return f"yields a {type(row).__name__}, expected ftdata.types.Row or Reject"
    source: Any = row.source
    if not isinstance(source, Source):
        return f"yields a row whose source is a {type(source).__name__}, expected ftdata.types.Source"
    numbers = [source.row, *(number for number in (source.line, source.offset) if number is not None)]
    if not isinstance(source.path, str) or any(type(number) is not int for number in numbers):
        return f"yields a row with the invalid source {tuple(source)!r:.100}, expected a path and integers"
    if source.row <= last:
        return f"yields row {source.row} after row {last}, expected ascending row numbers from 0"
    texts = [row.code, row.field, row.reason, row.fix, row.raw] if isinstance(row, Reject) else []
    if not all(isinstance(text, str) for text in texts):
        return "yields a Reject with a field that is not a string"
    return None


@dataclass(frozen=True, slots=True)
class MemorySource:
    """A source whose rows are Python objects in memory.

    Attributes:
        items: the rows.
        path: name of the source in reports, in angle brackets.
        split: split that the rows belong to, if it is known.
        share: how much of the source is trained on.
        item_index: index of the user's data item that contains these rows.
        size: always 0; the size in bytes is unknown.
    """

    items: Iterable[Any]
    path: str = "<memory>"
    split: str | None = None
    share: SourceShare = WHOLE
    item_index: int = 0
    size: int = 0

    def share_before(self, row: Source) -> float | None:
        """Return the fraction of rows before a row, from 0 to 1. Return `None` if the number of rows is unknown."""
        count = len(self.items) if isinstance(self.items, Sized) else 0
        return row.row / count if count else None

    def rows(self) -> Iterator[Row | Reject]:
        """Yield each item as a row with a row number."""
        return read_traces(self._items())

    def _items(self) -> Iterator[Row | Reject]:
        from ftdata.readers.in_memory import ValueFault, arrays_to_lists

        for index, item in enumerate(self.items):
            source = Source(self.path, index)
            try:
                # The data is copied, because an iterable may yield the same object again with different content.
                yield Reject(source, *item) if isinstance(item, ValueFault) else Row(arrays_to_lists(item), source)
            except RecursionError:
                yield Reject(source, "too_deep", "", "is nested too deeply to be read")


def resolve_sources(data: Any) -> tuple[FileSource | MemorySource, ...]:
    """Convert the user's data to sources (files, or rows in memory), in the same order.

    Args:
        data: a path (of a file or a folder, a URL, or `-` for standard input), a glob, a pandas `DataFrame`, a
            `pyarrow.Table`, a `datasets.Dataset`, `IterableDataset` or `DatasetDict`; a mapping with one of these
            under `path` and, optionally, `split`, `format`, `encoding`, `quoting` (`csv` or `none`), and one of
            `weight`, `rows` and `tokens`; a list of these; or any iterable of rows (dicts, or lists of messages).

    Raises:
        UsageError: A file does not exist, or a glob matches no file.
        InputRefused: No reader is registered for the suffix of a file.
    """
    if (sources := _in_memory_sources(data)) is not None:
        return sources
    if isinstance(data, str | Path):
        return tuple(_file_sources(str(data), None, {}))
    if isinstance(data, Mapping):
        return _resolve_spec(data)
    if isinstance(data, list | tuple) and data and all(_is_source(item) for item in data):
        return tuple(
            replace(source, item_index=number) for number, item in enumerate(data) for source in resolve_sources(item)
        )
    if isinstance(data, Iterable) and not isinstance(data, bytes | bytearray):
        for item in data[:_MOST_LISTED_SOURCES] if isinstance(data, list | tuple) else ():
            if _is_misspelled_source(item):
                check_source_keys(item)
        return (MemorySource(data),)
    raise UsageError("data_type", f"data is a {type(data).__name__}, expected a path, a list of paths, or rows")


def _in_memory_sources(data: Any) -> tuple[FileSource | MemorySource, ...] | None:
    """Return the sources for a pandas, pyarrow or `datasets` object. Return `None` for any other object.

    This function does not import these packages.
    """
    if hasattr(data, "to_arrow"):
        return _in_memory_sources(data.to_arrow())
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        from ftdata.readers.in_memory import from_dataframe

        return (MemorySource(from_dataframe(data), "<DataFrame>"),)
    if hasattr(data, "column_names") and isinstance(data, Mapping):
        return tuple(replace(source, split=name) for name, part in data.items() for source in resolve_sources(part))
    if hasattr(data, "schema") and any(
        hasattr(data, name) for name in ("to_batches", "read_next_batch", "to_struct_array")
    ):
        from ftdata.readers.arrow import from_batches

        batches = data.to_batches() if hasattr(data, "to_batches") else data if hasattr(data, "read_all") else [data]
        return (MemorySource(from_batches(batches, data.schema), "<Table>"),)
    if hasattr(data, "with_format"):
        from ftdata.readers.arrow import from_dataset, make_null_reader

        read_nulls = make_null_reader(getattr(data, "features", None))
        rows = from_dataset(data) if hasattr(data, "data") else map(read_nulls, data.with_format(None))
        return (MemorySource(rows, f"<{type(data).__name__}>"),)
    return None


def _is_source(item: Any) -> bool:
    if isinstance(item, str | Path) or _in_memory_sources(item) is not None:
        return True
    return isinstance(item, Mapping) and set(item) <= set(SOURCE_KEYS) and "path" in item and _is_source(item["path"])


def _is_misspelled_source(item: Any) -> bool:
    """Return whether an item is a mapping that would describe a source if its unknown keys were spelled correctly."""
    if not isinstance(item, Mapping) or not isinstance(item.get("path"), str | Path):
        return False
    unknown = set(item) - set(SOURCE_KEYS)
    return bool(unknown) and all(get_close_matches(str(key), SOURCE_KEYS, n=1, cutoff=0.75) for key in unknown)


def reread_rows(sources: Iterable[FileSource | MemorySource]) -> Iterator[Row | Reject]:
    """Yield the rows of all sources that can be read a second time: not standard input or an iterator."""
    for source in sources:
        if source.path != "-" if isinstance(source, FileSource) else isinstance(source.items, Sized):
            yield from source.rows()


def _resolve_spec(spec: Mapping[str, Any]) -> tuple[FileSource | MemorySource, ...]:
    if "path" not in spec or not _is_source(spec["path"]) or isinstance(spec["path"], Mapping):
        message = "data is a single mapping without a valid path, expected rows"
        raise UsageError("data_type", message, hint="pass a list of rows, or a mapping with a path")
    check_source_keys(spec)
    sources: Sequence[FileSource | MemorySource] = _sources_at_path(spec)
    if spec.get("split") is not None:
        sources = tuple(_select_splits(sources, spec))
    return tuple(replace(source, share=_parse_share(spec)) for source in sources)


def _sources_at_path(spec: Mapping[str, Any]) -> tuple[FileSource | MemorySource, ...]:
    """Return the sources for the `path` of a data mapping. The other keys, such as `encoding`, are file options."""
    path = spec["path"]
    if not isinstance(path, str | Path):
        if file_keys := [key for key in FILE_KEYS if spec.get(key) is not None]:
            raise UsageError("data_type", f"{file_keys[0]} applies only to files, but path= contains rows in memory")
        return resolve_sources(path)
    encoding, reader = spec.get("encoding"), spec.get("format")
    quoting = spec.get("quoting")
    if quoting is not None:
        check_choice("quoting", quoting, ("csv", "none"))
    ignore_records = spec.get("ignore_records")
    if not isinstance(ignore_records, str | None):
        problem = f"ignore_records is {ignore_records!r:.60}, expected a text with names, separated by commas"
        raise UsageError("ignore_records", problem)
    names = tuple(name.strip() for name in (ignore_records or "").split(",") if name.strip())
    Input(str(path), encoding)
    if reader is not None:
        readers.get(reader)
    files = _file_sources(str(path), reader, {key: spec[key] for key in HUB_KEYS if spec.get(key) is not None})
    streaming = bool(spec.get("streaming"))
    return tuple(
        replace(file, encoding=encoding, quoting=quoting, streaming=streaming, ignore_records=names) for file in files
    )


def _file_sources(location: str, reader: str | None, hub_options: Mapping[str, Any]) -> Iterator[FileSource]:
    for file in resolve_files(location, reader, hub_options):
        yield FileSource(file.path, file.reader, split=file.split, length=file.size)


def _parse_share(spec: Mapping[str, Any]) -> SourceShare:
    keys = [key for key in SHARE_KEYS if spec.get(key) is not None]
    if not keys:
        return WHOLE
    if len(keys) > 1:
        raise UsageError("share", f"a source has both {keys[0]} and {keys[1]}, expected only one of them")
    amount, unit = spec[keys[0]], SHARE_KEYS[keys[0]]
    is_integer = isinstance(amount, int) and not isinstance(amount, bool)
    if unit == "times" and not ((is_integer or isinstance(amount, float)) and 0 <= amount <= _MAX_WEIGHT):
        message = f"weight is {amount!r}, expected a number from 0 to {_MAX_WEIGHT}, e.g. 0.5 or 2"
        raise UsageError("weight", message)
    if unit != "times" and not (is_integer and amount >= 0):
        raise UsageError(keys[0], f"{keys[0]} is {amount!r}, expected a number of {unit}, e.g. 1000")
    return SourceShare(float(amount), unit)


def _select_splits(
    sources: Sequence[FileSource | MemorySource], spec: Mapping[str, Any]
) -> Iterator[FileSource | MemorySource]:
    """Yield the sources that a split expression, such as `train[:10%]`, selects.

    If the expression joins several parts with `+`, the sources have no split name.
    """
    from ftdata.readers.split_expressions import parse_split, split_ranges

    parts = parse_split(str(spec["split"]))
    names = list(dict.fromkeys(source.split or "train" for source in sources))
    for part in parts:
        matching = [source for source in sources if (source.split or "train") == part.name]
        if not matching:
            message = f"{spec['path']} has no split {part.name!r}"
            raise UsageError("no_split", message, hint=suggest_names(part.name, names))
        if part.is_full_split:
            selected = matching
        elif files := [source for source in matching if isinstance(source, FileSource) and source.path != STDIN]:
            ranges = split_ranges(part, [file.count for file in files])
            selected = [replace(files[number], first=first, last=last) for number, first, last in ranges]
        else:
            hint = "slice the data before you pass it to ftdata"
            raise UsageError("split", "only files can be sliced, not standard input or data in memory", hint=hint)
        if not selected:
            raise UsageError("no_rows", f"{spec['path']} has no rows in {spec['split']!r}")
        yield from selected if len(parts) == 1 else (replace(source, split=None) for source in selected)


@lru_cache(maxsize=64)
def _is_compressed(path: str, version: tuple[int, int]) -> bool:  # noqa: ARG001  (the version is part of the cache key)
    with Input(path).open() as file:
        return detect_compression(file.peek(8)[:8]) is not None


def file_version(path: str) -> Any:
    """Return a value that identifies the version of a local or remote file, or `None` if the version is unknown."""
    return remote_version(path) if is_object_store(path) else _local_version(path)


def _local_version(path: str) -> tuple[int, int] | None:
    """Return the size and the modification time of a local file. Together, they identify its version."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
