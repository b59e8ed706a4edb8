"""Places: the files that a path, a pattern, a folder, a URL or a name of the hub stands for."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from ftdata.errors import InputRefused, UsageError, suggest_names
from ftdata.readers.file_names import is_data, matches_pattern, split_from_name
from ftdata.readers.formats import readers
from ftdata.readers.hub import hub_files, is_hub
from ftdata.readers.remote_files import list_url
from ftdata.readers.streams import STDIN, Input, is_url


@dataclass(frozen=True, slots=True)
class ResolvedFile:
    """A file, and the name of the reader for it; if they are known, the split that it is of, and its size elsewhere."""

    path: str
    reader: str
    split: str | None = None
    size: int | None = None


def resolve_files(
    place: str, reader: str | None = None, on_hub: Mapping[str, Any] | None = None
) -> Iterator[ResolvedFile]:
    """Yield the files at a place, in alphabetical order.

    Args:
        place: a path, a glob, a folder, a URL, `-`, or a name of the hub.
        reader: what reads them; `None`: what their suffixes say.
        on_hub: `name`, `revision`, `data_files` of a data set there.

    Raises:
        UsageError: there is none.
        InputRefused: no reader knows one of them.
    """
    if not place.strip():
        raise UsageError("file_not_found", "the path is empty", hint="is a variable not set?")
    if is_hub(place):
        for file, split in hub_files(place, _is_readable, **on_hub or {}):
            yield replace(_file(str(file), reader), split=split)
    elif on_hub:
        raise UsageError("hub_only", f"{place} is not on the hub: {', '.join(on_hub)} say nothing of it")
    elif place == STDIN:
        yield ResolvedFile(STDIN, reader or "json")
    elif is_url(place):
        files, folder = list_url(place)
        found = (_file(one, reader) for one in files) if folder is None else _remote_folder([*files], folder, reader)
        yield from (replace(one, size=files[one.path] or None) for one in found)
    else:
        yield from _local(place, reader)


def _local(place: str, reader: str | None) -> Iterator[ResolvedFile]:
    try:
        path = Path(place)
        if path.is_file():
            yield _file(place, reader)
        elif path.is_fifo():
            yield ResolvedFile(place, reader or (path.suffix[1:] if path.suffix[1:] in readers else "json"))
        elif path.is_dir():
            yield from _folder(path, reader, ())
        else:
            yield from _matching(place, reader)
    except OSError as error:
        raise UsageError("file_not_found", f"cannot be looked at: {error.strerror}", where=place[:200]) from None


def _matching(pattern: str, reader: str | None) -> Iterator[ResolvedFile]:
    found = list[str]()
    if glob.has_magic(pattern):
        found = sorted(_deep(pattern) if "**" in pattern else glob.glob(pattern))  # noqa: PTH207  (absolute too)
    if not found:
        beside = [p.name for p in Path(pattern).parent.glob("*") if p.suffix.lstrip(".") in readers]
        hint = suggest_names(Path(pattern).name, beside) if beside else f"looked in {Path(pattern).parent.resolve()}"
        raise UsageError("file_not_found", f"no file matches {pattern!r}", hint=hint)
    for path in found:
        # A pattern that goes deep names the files in folders itself.
        if Path(path).is_file() or "**" not in pattern:
            yield from _local(path, reader)


def _deep(pattern: str) -> Iterator[str]:
    """Yield the files that fit a pattern with `**`; what is hidden is not looked at, and nothing twice."""
    base = "/".join(takewhile(lambda part: not glob.has_magic(part), pattern.split("/")))
    start = base or ("/" if pattern.startswith("/") else ".")
    seen = {os.path.realpath(start)}
    for folder, folders, files in os.walk(start, followlinks=True):
        # Links may lead to a folder above, or to one that was there already.
        new = [name for name in sorted(folders) if not name.startswith(".")]
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in new}  # noqa: PTH118  (a million names)
        folders[:] = [name for name in new if places[name] not in seen]
        seen.update(places.values())
        paths = (os.path.join(folder, name) for name in files if not name.startswith("."))  # noqa: PTH118  (a million names)
        plain = (path if base else path.removeprefix("./") for path in paths)
        yield from (path for path in plain if matches_pattern(path, pattern.replace("//", "/")))


def _file(path: str, reader: str | None = None) -> ResolvedFile:
    suffix = reader or Input(path).suffix
    if reader is None and suffix not in readers:
        known = ", ".join(f".{name}" for name in readers.names())
        hint = f"readable: {known}; format= says what other files are, e.g. format='jsonl'"
        raise InputRefused("no_reader", f"no reader for '.{suffix}' files", where=path, hint=hint)
    return ResolvedFile(path, suffix)


def _folder(folder: Path, reader: str | None, above: tuple[Path, ...]) -> Iterator[ResolvedFile]:
    """Yield the files of a folder: the splits of `save_to_disk`, or else every file in it, however deep."""
    if (folder / "dataset_dict.json").is_file():
        for split in _saved(folder / "dataset_dict.json", "splits"):
            yield from (replace(one, split=split) for one in _folder(folder / split, reader, above))
    elif (folder / "state.json").is_file():
        for name in _saved(folder / "state.json", "_data_files"):
            yield ResolvedFile(str(folder / name), "arrow")
    else:
        found = list(_files(folder, reader, (*above, folder.resolve())))
        if not found and not above:
            raise UsageError("empty_folder", f"{folder} holds no files")
        for one in found:
            inner = str(Path(one.path).relative_to(folder))
            yield one if above or one.split else replace(one, split=split_from_name(inner))


def _remote_folder(files: Sequence[str], folder: str, reader: str | None) -> Iterator[ResolvedFile]:
    """Yield the files of a folder elsewhere, as `_folder` does those of one here."""
    inner = {name: name.removeprefix(f"{folder}/") for name in files}
    saved = [name for name, path in inner.items() if PurePosixPath(path).name == "state.json"]
    if saved:
        for state in saved:
            home = state.rpartition("/")[0]
            split = home.rpartition("/")[2] if f"{folder}/dataset_dict.json" in inner else None
            for name in files:
                if name.rpartition("/")[0] == home and name.endswith(".arrow"):
                    yield ResolvedFile(name, "arrow", split)
        return
    chosen = [name for name, path in inner.items() if all(map(is_data, PurePosixPath(path).parts))]
    if not chosen:
        raise UsageError("empty_folder", f"{folder} holds no files")
    yield from (replace(_file(name, reader), split=split_from_name(inner[name])) for name in chosen)


def _files(folder: Path, reader: str | None, above: tuple[Path, ...]) -> Iterator[ResolvedFile]:
    for path in sorted(folder.iterdir()):
        if not is_data(path.name):
            continue
        if path.is_dir():
            if path.resolve() not in above:
                yield from _folder(path, reader, above)
        elif not path.is_file():
            raise UsageError("file_not_found", "is a link to nothing", where=str(path))
        else:
            try:
                yield _file(str(path), reader)
            except InputRefused as error:
                hint = f"name those that are data: '{folder}/*.jsonl'"
                raise InputRefused(error.code, error.message, where=error.where, hint=hint) from None


def _saved(path: Path, key: str) -> list[str]:
    """Return the names that `save_to_disk` wrote; they stay in their folder.

    Raises:
        InputRefused: there are none.
    """
    try:
        found = json.loads(path.read_bytes())[key]
        names = [one["filename"] if isinstance(one, dict) else one for one in found]
        if not all(name not in ("", "..") and PurePosixPath(name).name == name for name in names):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        hint = "save the data set again"
        raise InputRefused("damaged_file", f"lists no {key} as save_to_disk does", where=str(path), hint=hint) from None
    return names


def _is_readable(name: str) -> bool:
    return Input(name).suffix in readers and all(map(is_data, PurePosixPath(name).parts))
