"""Sources: what a user may pass as data, resolved into files and rows in memory."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftdata.errors import InputRefused, UsageError, nearest
from ftdata.readers.formats import readers
from ftdata.readers.hub import hub_files, is_hub
from ftdata.readers.streams import STDIN, Input, is_url
from ftdata.readers.tables import from_dataframe, from_dataset, present
from ftdata.types import Reject, Row, Source

_NO_DATA = {"readme.md", "license", "license.txt", "license.md", "dataset_infos.json"}
_MOST = 1000
_SPEC = ("path", "encoding", "split", "weight", "name", "revision", "data_files", "streaming")


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file and the name of the reader for it: all that a worker process needs to read it."""

    path: str
    reader: str
    encoding: str | None = None
    split: str | None = None
    weight: float = 1.0
    streaming: bool = False

    def rows(self) -> Iterator[Row | Reject]:
        """Yield the file's rows and rejects, in file order."""
        return readers.get(self.reader)(Input(self.path, self.encoding, self.streaming))


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Rows that are already Python objects."""

    items: Iterable[Any]
    path: str = "<memory>"
    split: str | None = None
    weight: float = 1.0

    def rows(self) -> Iterator[Row | Reject]:
        """Yield the items, numbered."""
        for index, item in enumerate(self.items):
            yield Row(item, Source(self.path, index))


def sources(data: Any) -> tuple[FileSource | MemorySource, ...]:
    """Resolve what a user may pass as data into sources, in the order given.

    Args:
        data: a path (also of a folder, a URL, or `-` for standard input), a glob, a mapping with `path` and, maybe,
            `encoding`, `split` and `weight`, a list of these, a pandas `DataFrame`, a `datasets.Dataset`,
            `IterableDataset` or `DatasetDict`, or any iterable of rows (dicts, or lists of messages).

    Raises:
        UsageError: a file is not there, or a glob matches nothing.
        InputRefused: no reader knows the suffix.
    """
    if (found := _in_memory(data)) is not None:
        return found
    if isinstance(data, str | Path):
        return tuple(_files(str(data)))
    if isinstance(data, Mapping):
        return _specified(data)
    if isinstance(data, list | tuple) and data and all(_is_place(item) for item in data):
        return tuple(source for item in data for source in sources(item))
    if isinstance(data, Iterable):
        return (MemorySource(data),)
    raise UsageError("data_type", f"data is a {type(data).__name__}, expected a path, paths, or an iterable of rows")


def _in_memory(data: Any) -> tuple[FileSource | MemorySource, ...] | None:
    """Return the sources that a pandas or `datasets` object is; known by what it has, for neither is imported here."""
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        return (MemorySource(from_dataframe(data), "<DataFrame>"),)
    if hasattr(data, "column_names") and isinstance(data, Mapping):
        return tuple(replace(one, split=name) for name, part in data.items() for one in sources(part))
    if hasattr(data, "with_format"):
        rows = from_dataset(data) if hasattr(data, "data") else map(present, data)
        return (MemorySource(rows, f"<{type(data).__name__}>"),)
    return None


def _is_place(item: Any) -> bool:
    if isinstance(item, Mapping):
        return isinstance(item.get("path"), str | Path) and set(item) <= set(_SPEC)
    return isinstance(item, str | Path)


def _specified(spec: Mapping[str, Any]) -> tuple[FileSource | MemorySource, ...]:
    if not isinstance(spec.get("path"), str | Path):
        raise UsageError(
            "data_type", "data is one mapping, expected rows", hint="pass a list of rows, or a mapping with a path"
        )
    for key in spec:
        if key not in _SPEC:
            raise UsageError("unknown_data_key", f"data has the key {key!r}", hint=nearest(str(key), _SPEC))
    Input(str(spec["path"]), spec.get("encoding"))
    on_hub = {key: spec.get(key) for key in ("name", "revision", "data_files")}
    found = tuple(_files(str(spec["path"]), **on_hub))
    weight = spec.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= _MOST:
        raise UsageError("weight", f"weight is {weight!r}, expected how often each row is taken, e.g. 0.5 or 2")
    encoding, streaming = spec.get("encoding"), bool(spec.get("streaming"))
    found = tuple(replace(one, encoding=encoding, weight=float(weight), streaming=streaming) for one in found)
    chosen = tuple(one for one in found if spec.get("split") in (None, one.split))
    if not chosen:
        names = list(dict.fromkeys(str(one.split) for one in found))
        raise UsageError(
            "no_split", f"{spec['path']} has no split {spec['split']!r}", hint=nearest(str(spec["split"]), names)
        )
    return chosen


def _files(
    place: str, name: str | None = None, revision: str | None = None, data_files: Any = None
) -> Iterator[FileSource]:
    if is_hub(place):
        for file, split in hub_files(place, _is_readable, name, revision, data_files):
            yield replace(_file(str(file)), split=split)
    elif name or revision or data_files:
        raise UsageError("hub_only", f"{place} is not on the hub: name, revision and data_files say nothing of it")
    elif place == STDIN:
        yield FileSource(STDIN, "json")
    elif is_url(place) or Path(place).is_file():
        yield _file(place)
    elif Path(place).is_dir():
        yield from _folder(Path(place))
    else:
        found = sorted(glob.glob(place, recursive=True)) if glob.has_magic(place) else []  # noqa: PTH207  (absolute too)
        if not found:
            beside = [p.name for p in Path(place).parent.glob("*") if p.suffix.lstrip(".") in readers.names()]
            hint = nearest(Path(place).name, beside) if beside else f"looked in {Path(place).parent.resolve()}"
            raise UsageError("file_not_found", f"no file matches {place!r}", hint=hint)
        for path in found:
            # A pattern that goes deep names the files in folders itself.
            if Path(path).is_file() or "**" not in place:
                yield from _files(path)


def _is_readable(name: str) -> bool:
    return Input(name).suffix in readers.names() and _is_data(Path(name))


def _file(path: str) -> FileSource:
    suffix = Input(path).suffix
    if suffix not in readers.names():
        known = ", ".join(f".{name}" for name in readers.names())
        raise InputRefused("no_reader", f"no reader for '.{suffix}' files", where=path, hint=f"readable: {known}")
    return FileSource(path, suffix)


def _folder(folder: Path) -> Iterator[FileSource]:
    """Yield the files of a folder: the splits of `save_to_disk`, or else every file in it, however deep."""
    if (folder / "dataset_dict.json").is_file():
        for split in json.loads((folder / "dataset_dict.json").read_bytes())["splits"]:
            for one in _folder(folder / split):
                yield replace(one, split=split)
        return
    if (folder / "state.json").is_file():
        for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]:
            yield FileSource(str(folder / entry["filename"]), "arrow")
        return
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path.relative_to(folder)))
    if not files:
        raise UsageError("empty_folder", f"{folder} holds no files")
    foreign = [path.name for path in files if Input(str(path)).suffix not in readers.names()]
    if foreign:
        raise InputRefused(
            "no_reader",
            f"holds {len(foreign)} files that no reader knows, e.g. {foreign[0]}",
            where=str(folder),
            hint=f"name those that are data: '{folder}/*.jsonl'",
        )
    yield from (_file(str(path)) for path in files)


def _is_data(path: Path) -> bool:
    return path.name.lower() not in _NO_DATA and not any(part.startswith((".", "_")) for part in path.parts)
