"""Sources: what a user may pass as data, resolved into files and rows in memory."""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from ftdata.errors import FtdataError, InputRefused, UsageError, check_choice, suggest_names
from ftdata.readers import split_expressions
from ftdata.readers.arrow import count_parquet_rows, from_batches, from_dataset, make_null_reader
from ftdata.readers.formats import Reader, readers
from ftdata.readers.in_memory import ValueFault, arrays_to_lists, from_dataframe
from ftdata.readers.quote_detection import QUOTINGS
from ftdata.readers.remote_files import remote_version
from ftdata.readers.resolve_paths import resolve_files
from ftdata.readers.streams import STDIN, Input, detect_compression, is_object_store
from ftdata.registry import is_built_in
from ftdata.types import WHOLE, Reject, Row, Source, SourceShare

_MOST = 1000
_SHARES = {"weight": "times", "rows": "rows", "tokens": "tokens"}
_ON_HUB = ("name", "revision", "data_files")
_OF_FILES = (*_ON_HUB, "format", "encoding", "quoting", "streaming")
_SPEC = ("path", "split", *_SHARES, *_OF_FILES)


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file and the name of the reader for it: all that a worker process needs to read its rows.

    `place` is the number of what the user named, which may be several files. With `first` or `last`: only the rows from
    the one on and before the other, as the reader counts them. With a `span`: only a part of the file, in which rows
    are counted from its own beginning. `length`: of how many bytes, of a part or of what lies elsewhere. `file_version`:
    what the file was when its parts were planned, which all of them must be of.
    """

    path: str
    reader: str
    encoding: str | None = None
    split: str | None = None
    share: SourceShare = WHOLE
    place: int = 0
    streaming: bool = False
    first: int = 0
    last: int | None = None
    span: tuple[int, int] | None = None
    length: int | None = None
    version: Any = None
    quoting: str | None = None

    @property
    def input(self) -> Input:
        """The file, to be opened."""
        return Input(self.path, self.encoding, streaming=self.streaming, span=self.span, quoting=self.quoting)

    def rows(self) -> Generator[Row | Reject, None, int | None]:
        """Yield the file's rows and rejects, in file order; return in how many lines they stood, if that is known.

        Raises:
            InputRefused: it cannot be read, or has changed while it was.
        """
        before, lines = self.version if self.version is not None else _stamp(self.path), None
        self._check(before)
        reader = readers.get(self.reader)
        rows = reader(self.input) if is_built_in(reader) else _checked(reader, self)
        if self.span is not None and isinstance(rows, Generator):
            lines = yield from rows
        else:
            yield from islice(rows, self.first, self.last)
        self._check(before)
        return lines

    def _check(self, before: Any) -> None:
        if before != (file_version(self.path) if self.version is not None else _stamp(self.path)):
            raise InputRefused("file_changed", "has changed while it was read", where=self.path, hint="read it again")

    @property
    def size(self) -> int:
        """The bytes of the file, or of the part of it, where that is known."""
        if self.length is not None:
            return self.length
        stamp = _stamp(self.path)
        return stamp[0] if stamp else 0

    def share_before(self, row: Source) -> float | None:
        """Return how much of the file comes before a row, from 0 to 1; `None` where that is not told by its place."""
        stamp = _stamp(self.path)
        if row.offset is None or not stamp or not stamp[0] or _is_packed(self.path, stamp):
            return None
        first, last = self.span or (0, stamp[0])
        return min((row.offset - first) / (last - first), 1.0)

    def count(self, enough: int | None = None) -> int:
        """Return how many rows there are; `enough` where there are as many."""
        if self.reader == "parquet" and (rows := count_parquet_rows(self.input)) is not None:
            return rows if enough is None else min(rows, enough)
        return sum(1 for _ in islice(self.rows(), enough))


def _checked(reader: Reader, file: FileSource) -> Iterator[Row | Reject]:
    """Yield what a reader of the user's own does."""
    last = -1
    try:
        rows: Iterator[Any] = iter(reader(file.input))
        for one in rows:
            if told := _odd(one, last):
                raise InputRefused("reader_failed", f"reader {file.reader}: {told}", where=file.path)
            last = one.source.row
            # A copy: it may be the same object for each row, with other texts put into it.
            yield one._replace(data=arrays_to_lists(one.data)) if isinstance(one, Row) else one
    except FtdataError:
        raise
    except Exception as error:
        told = f"reader {file.reader} fails on it: {type(error).__name__}: {error}"
        raise InputRefused("reader_failed", told, where=file.path, hint="mend the reader, or the file") from error


def _odd(one: Any, last: int) -> str | None:
    """Return what is wrong with what a reader yields, after the row of that number; `None` if nothing is."""
    if not isinstance(one, Row | Reject):
        return f"yields a {type(one).__name__}, expected a ftdata.types.Row or Reject"
    source: Any = one.source
    if not isinstance(source, Source):
        return f"its source is a {type(source).__name__}, expected a ftdata.types.Source"
    numbers = [source.row, *(number for number in (source.line, source.offset) if number is not None)]
    if not isinstance(source.path, str) or any(type(number) is not int for number in numbers):
        return f"{tuple(source)!r:.100} is no source: expected a path and numbers"
    if source.row <= last:
        return f"row {source.row} comes after row {last}: rows are counted from 0"
    texts = [one.code, one.field, one.reason, one.fix, one.raw] if isinstance(one, Reject) else []
    if not all(isinstance(text, str) for text in texts):
        return "a Reject has other than texts"
    return None


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Rows that are already Python objects."""

    items: Iterable[Any]
    path: str = "<memory>"
    split: str | None = None
    share: SourceShare = WHOLE
    place: int = 0
    size: int = 0

    def share_before(self, row: Source) -> float | None:
        """Return how much comes before a row, from 0 to 1; `None` where nobody knows how much there is."""
        count = len(self.items) if isinstance(self.items, Sized) else 0
        return row.row / count if count else None

    def rows(self) -> Iterator[Row | Reject]:
        """Yield the items, numbered."""
        for index, item in enumerate(self.items):
            source = Source(self.path, index)
            try:
                # A copy: whoever gives the rows may use the same object for the next one.
                yield Reject(source, *item) if isinstance(item, ValueFault) else Row(arrays_to_lists(item), source)
            except RecursionError:
                yield Reject(source, "too_deep", "", "is nested too deep to be read")


def resolve_sources(data: Any) -> tuple[FileSource | MemorySource, ...]:
    """Resolve what a user may pass as data into sources, in the order given.

    Args:
        data: a path (also of a folder, a URL, or `-` for standard input), a glob, a pandas `DataFrame`, a
            `pyarrow.Table`, a `datasets.Dataset`, `IterableDataset` or `DatasetDict`; a mapping with one of these as
            `path` and, maybe, `split`, `format`, `encoding`, `quoting` (`csv` or `none`), and one of `weight`,
            `rows` and `tokens`; a list of these;
            or any iterable of rows (dicts, or lists of messages).

    Raises:
        UsageError: a file is not there, or a glob matches nothing.
        InputRefused: no reader knows the suffix.
    """
    if (found := _in_memory(data)) is not None:
        return found
    if isinstance(data, str | Path):
        return tuple(_files(str(data), None, {}))
    if isinstance(data, Mapping):
        return _specified(data)
    if isinstance(data, list | tuple) and data and all(_is_place(item) for item in data):
        return tuple(replace(one, place=number) for number, item in enumerate(data) for one in resolve_sources(item))
    if isinstance(data, Iterable) and not isinstance(data, bytes | bytearray):
        return (MemorySource(data),)
    raise UsageError("data_type", f"data is a {type(data).__name__}, expected a path, paths, or an iterable of rows")


def _in_memory(data: Any) -> tuple[FileSource | MemorySource, ...] | None:
    """Return the sources that an object of pandas, pyarrow or `datasets` is: none of these is imported here."""
    if hasattr(data, "to_arrow"):
        return _in_memory(data.to_arrow())
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        return (MemorySource(from_dataframe(data), "<DataFrame>"),)
    if hasattr(data, "column_names") and isinstance(data, Mapping):
        return tuple(replace(one, split=name) for name, part in data.items() for one in resolve_sources(part))
    if hasattr(data, "schema") and any(
        hasattr(data, name) for name in ("to_batches", "read_next_batch", "to_struct_array")
    ):
        batches = data.to_batches() if hasattr(data, "to_batches") else data if hasattr(data, "read_all") else [data]
        return (MemorySource(from_batches(batches, data.schema), "<Table>"),)
    if hasattr(data, "with_format"):
        decoded = make_null_reader(getattr(data, "features", None))
        rows = from_dataset(data) if hasattr(data, "data") else map(decoded, data.with_format(None))
        return (MemorySource(rows, f"<{type(data).__name__}>"),)
    return None


def _is_place(item: Any) -> bool:
    if isinstance(item, str | Path) or _in_memory(item) is not None:
        return True
    return isinstance(item, Mapping) and set(item) <= set(_SPEC) and "path" in item and _is_place(item["path"])


def _specified(spec: Mapping[str, Any]) -> tuple[FileSource | MemorySource, ...]:
    if "path" not in spec or not _is_place(spec["path"]) or isinstance(spec["path"], Mapping):
        raise UsageError(
            "data_type", "data is one mapping, expected rows", hint="pass a list of rows, or a mapping with a path"
        )
    for key in spec:
        if key not in _SPEC:
            raise UsageError("unknown_data_key", f"data has the key {key!r}", hint=suggest_names(str(key), _SPEC))
    found: Sequence[FileSource | MemorySource] = _placed(spec)
    if spec.get("split") is not None:
        found = tuple(_chosen(found, spec))
    return tuple(replace(one, share=_share(spec)) for one in found)


def _placed(spec: Mapping[str, Any]) -> tuple[FileSource | MemorySource, ...]:
    """Return the sources at the place that a mapping names, read as it says."""
    place = spec["path"]
    if not isinstance(place, str | Path):
        if said := [key for key in _OF_FILES if spec.get(key) is not None]:
            raise UsageError("data_type", f"{said[0]} is said of data in memory, which has none")
        return resolve_sources(place)
    encoding, reader = spec.get("encoding"), spec.get("format")
    quoting = spec.get("quoting")
    if quoting is not None:
        check_choice("quoting", quoting, QUOTINGS)
    Input(str(place), encoding)
    if reader is not None:
        readers.get(reader)
    files = _files(str(place), reader, {key: spec[key] for key in _ON_HUB if spec.get(key) is not None})
    return tuple(
        replace(one, encoding=encoding, quoting=quoting, streaming=bool(spec.get("streaming"))) for one in files
    )


def _files(place: str, reader: str | None, on_hub: Mapping[str, Any]) -> Iterator[FileSource]:
    for one in resolve_files(place, reader, on_hub):
        yield FileSource(one.path, one.reader, split=one.split, length=one.size)


def _share(spec: Mapping[str, Any]) -> SourceShare:
    given = [key for key in _SHARES if spec.get(key) is not None]
    if not given:
        return WHOLE
    if len(given) > 1:
        raise UsageError("share", f"{given[0]} and {given[1]} say how much of the source is taken: which of them?")
    amount, unit = spec[given[0]], _SHARES[given[0]]
    whole = isinstance(amount, int) and not isinstance(amount, bool)
    if unit == "times" and not ((whole or isinstance(amount, float)) and 0 <= amount <= _MOST):
        raise UsageError("weight", f"weight is {amount!r}, expected how often each row is taken, e.g. 0.5 or 2")
    if unit != "times" and not (whole and amount >= 0):
        raise UsageError(given[0], f"{given[0]} is {amount!r}, expected how many {unit} are taken")
    return SourceShare(float(amount), unit)


def _chosen(found: Sequence[FileSource | MemorySource], spec: Mapping[str, Any]) -> Iterator[FileSource | MemorySource]:
    """Yield the sources of the rows that `split` says. Several parts together are no split any more."""
    parts = split_expressions.parse_split(str(spec["split"]))
    names = list(dict.fromkeys(one.split or "train" for one in found))
    for part in parts:
        own = [one for one in found if (one.split or "train") == part.name]
        if not own:
            raise UsageError(
                "no_split", f"{spec['path']} has no split {part.name!r}", hint=suggest_names(part.name, names)
            )
        if part.whole:
            taken = own
        elif files := [one for one in own if isinstance(one, FileSource) and one.path != STDIN]:
            ranges = split_expressions.split_ranges(part, [one.count for one in files])
            taken = [replace(files[number], first=first, last=last) for number, first, last in ranges]
        else:
            raise UsageError("split", "slices are of files", hint="slice what is in memory before you pass it")
        if not taken:
            raise UsageError("no_rows", f"{spec['path']} has no rows in {spec['split']!r}")
        yield from taken if len(parts) == 1 else (replace(one, split=None) for one in taken)


@lru_cache(maxsize=64)
def _is_packed(path: str, stamp: tuple[int, int]) -> bool:  # noqa: ARG001  (of another version it is asked again)
    with Input(path).open() as file:
        return detect_compression(file.peek(8)[:8]) is not None


def file_version(path: str) -> Any:
    """Return what tells versions of a file apart, wherever it lies; `None` where nothing does."""
    return remote_version(path) if is_object_store(path) else _stamp(path)


def _stamp(path: str) -> tuple[int, int] | None:
    """Return what tells versions of a local file apart."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
