"""Find the input files at a path, glob, folder, URL or Hub data set name."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from ftdata.errors import InputRefused, UsageError, suggest_path
from ftdata.readers.file_names import is_data, matches_pattern, split_from_name
from ftdata.readers.formats import readers
from ftdata.readers.hub import SCHEME, hub_files, is_hub
from ftdata.readers.remote_files import list_url
from ftdata.readers.streams import STDIN, Input, is_url

_LISTED = 10
"""Maximum number of files that an error lists."""


@dataclass(frozen=True, slots=True)
class ResolvedFile:
    """An input file and the name of its reader.

    Attributes:
        path: local path, URL, or `-` for standard input.
        reader: name of the reader.
        split: split that the rows belong to, if it is known.
        size: size in bytes of a remote file, if it is known.
    """

    path: str
    reader: str
    split: str | None = None
    size: int | None = None


def resolve_files(
    location: str, reader: str | None = None, hub_options: Mapping[str, Any] | None = None
) -> Iterator[ResolvedFile]:
    """Yield the input files at a path, glob, URL or Hub data set name, in alphabetical order.

    Args:
        location: a path, a glob, a folder, a URL, `-` for standard input, or the name of a Hub data set.
        reader: name of the reader; `None` to choose it by the suffix of each file.
        hub_options: `name`, `revision` and `data_files` of a Hub data set.

    Raises:
        UsageError: No file matches the location.
        InputRefused: No reader is registered for the suffix of a file.
    """
    if not location.strip():
        message = "the path is empty"
        raise UsageError("file_not_found", message, hint="check that the variable that contains the path is set")
    # Names of data sets do not end with the suffix of a data file, so a missing file is not searched on the Hub.
    if is_hub(location) and (location.startswith(SCHEME) or Input(location).suffix not in readers):
        for file, split in hub_files(location, _is_readable, **hub_options or {}):
            yield replace(_make_file(str(file), reader), split=split)
    elif hub_options:
        options = ", ".join(hub_options)
        raise UsageError("hub_only", f"{options} can be used only with Hub data sets, but {location} is not on the Hub")
    elif location == STDIN:
        yield ResolvedFile(STDIN, reader or "json")
    elif is_url(location):
        sizes, folder = list_url(location)
        files = _list_remote_folder([*sizes], folder, reader) if folder else (_make_file(url, reader) for url in sizes)
        yield from (replace(file, size=sizes[file.path] or None) for file in files)
    else:
        yield from _resolve_local(location, reader)


def _resolve_local(location: str, reader: str | None) -> Iterator[ResolvedFile]:
    try:
        path = Path(location)
        if path.is_file():
            yield _make_file(location, reader)
        elif path.is_fifo():
            yield ResolvedFile(location, reader or (path.suffix[1:] if path.suffix[1:] in readers else "json"))
        elif path.is_dir():
            yield from _list_folder(path, reader, ())
        else:
            yield from _resolve_pattern(location, reader)
    except OSError as error:
        message = f"the path cannot be accessed: {error.strerror}"
        raise UsageError("file_not_found", message, where=location[:200]) from None


def _resolve_pattern(pattern: str, reader: str | None) -> Iterator[ResolvedFile]:
    paths = list[str]()
    if glob.has_magic(pattern):
        paths = sorted(
            _glob_recursively(pattern) if "**" in pattern else glob.glob(pattern)  # noqa: PTH207  (absolute too)
        )
    if not paths:
        hint = "" if glob.has_magic(pattern) else suggest_path(pattern)
        raise UsageError("file_not_found", f"no file matches {pattern!r}", hint=hint or _list_folder_of(Path(pattern)))
    for path in paths:
        # A recursive pattern matches the files inside folders itself.
        if Path(path).is_file() or "**" not in pattern:
            yield from _resolve_local(path, reader)


def _list_folder_of(path: Path) -> str:
    """Return a hint for a missing path: the data files in its folder, or the part of the path that exists."""
    folder = path.parent
    if folder.is_dir():
        names = sorted(file.name for file in folder.iterdir() if file.suffix.lstrip(".") in readers)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listing = f"; {folder.resolve()} contains {', '.join(names[:_LISTED])}{more}" if names else ""
        return f"check the path{listing or f'; searched in {folder.resolve()}'}"
    existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    missing = folder.absolute().relative_to(existing).parts[0]
    siblings = [path.name for path in existing.iterdir() if path.is_dir()]
    matches = get_close_matches(missing, siblings, n=1)
    suggestion = f"; did you mean {matches[0]!r}?" if matches else ""
    return f"{existing} contains no folder {missing!r}{suggestion}"


def _glob_recursively(pattern: str) -> Iterator[str]:
    """Yield the files that match a pattern with `**`. Visit each folder once, and skip hidden files and folders."""
    base = "/".join(takewhile(lambda part: not glob.has_magic(part), pattern.split("/")))
    start = base or ("/" if pattern.startswith("/") else ".")
    visited = {os.path.realpath(start)}
    for folder, folders, files in os.walk(start, followlinks=True):
        # A symbolic link may lead to a parent folder, or to a folder that was already visited.
        names = [name for name in sorted(folders) if not name.startswith(".")]
        targets = {name: os.path.realpath(os.path.join(folder, name)) for name in names}  # noqa: PTH118  (a million names)
        folders[:] = [name for name in names if targets[name] not in visited]
        visited.update(targets.values())
        paths = (os.path.join(folder, name) for name in files if not name.startswith("."))  # noqa: PTH118  (a million names)
        plain = (path if base else path.removeprefix("./") for path in paths)
        yield from (path for path in plain if matches_pattern(path, pattern.replace("//", "/")))


def _make_file(path: str, reader: str | None = None) -> ResolvedFile:
    suffix = reader or Input(path).suffix
    if reader is None and suffix not in readers:
        suffixes = ", ".join(f".{name}" for name in readers.names())
        hint = f"pass a file with one of the suffixes {suffixes}, or set format=, e.g. format='jsonl'"
        raise InputRefused("no_reader", f"ftdata has no reader for '.{suffix}' files", where=path, hint=hint)
    return ResolvedFile(path, suffix)


def _list_folder(folder: Path, reader: str | None, parents: tuple[Path, ...]) -> Iterator[ResolvedFile]:
    """Yield the data files in a folder and its subfolders.

    If `save_to_disk` wrote the folder, yield only the data files that its metadata list.
    """
    if (folder / "dataset_dict.json").is_file():
        for split in _read_saved_names(folder / "dataset_dict.json", "splits"):
            yield from (replace(file, split=split) for file in _list_folder(folder / split, reader, parents))
    elif (folder / "state.json").is_file():
        for name in _read_saved_names(folder / "state.json", "_data_files"):
            yield ResolvedFile(str(folder / name), "arrow")
    else:
        files = list(_list_entries(folder, reader, (*parents, folder.resolve())))
        if not files and not parents:
            raise UsageError("empty_folder", f"{folder} contains no data files")
        for file in files:
            relative_path = str(Path(file.path).relative_to(folder))
            yield file if parents or file.split else replace(file, split=split_from_name(relative_path))


def _list_remote_folder(files: Sequence[str], folder: str, reader: str | None) -> Iterator[ResolvedFile]:
    """Yield the data files in a remote folder. The files are selected by the same rules as in `_list_folder`."""
    relative_paths = {name: name.removeprefix(f"{folder}/") for name in files}
    states = [name for name, path in relative_paths.items() if PurePosixPath(path).name == "state.json"]
    if states:
        for state in states:
            parent = state.rpartition("/")[0]
            split = parent.rpartition("/")[2] if f"{folder}/dataset_dict.json" in relative_paths else None
            for name in files:
                if name.rpartition("/")[0] == parent and name.endswith(".arrow"):
                    yield ResolvedFile(name, "arrow", split)
        return
    data_files = [name for name, path in relative_paths.items() if all(map(is_data, PurePosixPath(path).parts))]
    if not data_files:
        raise UsageError("empty_folder", f"{folder} contains no data files")
    yield from (replace(_make_file(name, reader), split=split_from_name(relative_paths[name])) for name in data_files)


def _list_entries(folder: Path, reader: str | None, parents: tuple[Path, ...]) -> Iterator[ResolvedFile]:
    for path in sorted(folder.iterdir()):
        if not is_data(path.name):
            continue
        if path.is_dir():
            if path.resolve() not in parents:
                yield from _list_folder(path, reader, parents)
        elif not path.is_file():
            raise UsageError("file_not_found", "the path is a broken symbolic link", where=str(path))
        else:
            try:
                yield _make_file(str(path), reader)
            except InputRefused as error:
                hint = f"pass only the data files, e.g. '{folder}/*.jsonl'"
                raise InputRefused(error.code, error.message, where=error.where, hint=hint) from None


def _read_saved_names(path: Path, key: str) -> list[str]:
    """Read file or folder names from metadata that `save_to_disk` wrote. A name must not contain a slash.

    Raises:
        InputRefused: The metadata are damaged, or a name is invalid.
    """
    try:
        entries = json.loads(path.read_bytes())[key]
        names = [entry["filename"] if isinstance(entry, dict) else entry for entry in entries]
        if not all(name not in ("", "..") and PurePosixPath(name).name == name for name in names):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        message = f"the file has no valid list {key!r}, expected metadata that save_to_disk wrote"
        raise InputRefused("damaged_file", message, where=str(path), hint="save the data set again") from None
    return names


def _is_readable(name: str) -> bool:
    return Input(name).suffix in readers and all(map(is_data, PurePosixPath(name).parts))
