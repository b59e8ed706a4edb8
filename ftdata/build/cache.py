"""A cache that all builds share. It stores finished shards and tokenized texts.

    DIR/shards/KEY/         files of a shard; KEY is the hash of everything that determines the shard
    DIR/texts/KEY/PART/     hashes, bounds, ids and offsets of texts; KEY is the hash of a source and a tokenizer

Each folder contains the hashes of its files (`atomic.seal_folder`), which are checked before the folder is used. A
damaged folder is removed, and its contents are computed again.

DIR is `FTDATA_CACHE`, or `ftdata` in `XDG_CACHE_HOME` or `~/.cache`; `FTDATA_CACHE=off` disables the cache. If the
cache cannot be read or written, a build continues without it. The cache uses at most a tenth of the disk, and evicts
the least recently used entries first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import StorageError
from ftdata.storage import atomic, disk
from ftdata.tokenizing.batches import EncodedText, Encodings

_log = logging.getLogger(__name__)

_MAX_DISK_DIVISOR = 10
"""The maximum size of the cache is the size of the disk divided by this number."""

_MAX_UNUSED_FACTOR = 3
"""The cached texts of a source are removed if they have this many times as many tokens as the last build used."""


KINDS = {
    "shards": "finished parts of builds",
    "texts": "tokens of texts",
    "builds": "builds at URLs",
    "verdicts": "reports on templates",
    "encoders": "comparisons of encoders",
}
"""The subfolders of the cache -> their contents."""


class CacheSize(NamedTuple):
    """The size of the cache.

    Attributes:
        folder: the folder of the cache; `None` if the cache is disabled.
        kinds: kind of entry -> number of entries and their size in bytes.
        limit: the maximum size of shards and texts in bytes.
    """

    folder: Path | None
    kinds: dict[str, tuple[int, int]]
    limit: int

    @property
    def total(self) -> int:
        """The size of all entries in bytes."""
        return sum(size for _, size in self.kinds.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes as a JSON object."""
        kinds = {kind: {"entries": entries, "bytes": size} for kind, (entries, size) in self.kinds.items()}
        return {"folder": self.folder and str(self.folder), "bytes": self.total, "limit": self.limit, "kinds": kinds}

    def __str__(self) -> str:
        from rich.filesize import decimal as format_bytes

        if self.folder is None:
            return "the cache is disabled (FTDATA_CACHE=off)"
        lines = [f"{self.folder}: {format_bytes(self.total)}, at most {format_bytes(self.limit)} for shards and texts"]
        for kind, (entries, size) in self.kinds.items():
            lines.append(f"{kind:9}{entries:>8,} entries {format_bytes(size):>10}  {KINDS[kind]}")
        return "\n".join(lines)


@cache
def package_hash() -> str:
    """Return a hash of ftdata's source files. It is part of the cache keys, so new code never uses old entries."""
    package = Path(__file__).parents[1]
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".jinja"))
    return hash_key([(str(path.relative_to(package)), disk.hash_bytes(path.read_bytes())) for path in files])


def hash_key(parts: Any) -> str:
    """Return the hash of a JSON value."""
    return disk.hash_bytes(json.dumps(parts, sort_keys=True, default=str).encode())


def restore_entry(kind: str, key: str, target: Path) -> dict[str, Any] | None:
    """Copy the files of a cache entry to the folder `target`.

    Returns:
        The result that is stored in the entry, or `None` if the cache does not contain the entry.
    """
    folder = disk.cache_root()
    if folder is None or not (entry := folder / kind / key).is_dir():
        return None
    with suppress(OSError):
        result = atomic.read_sealed(entry)
        if result is not None:
            disk.remove(target)
            _copy(entry, target)
            os.utime(entry)
            return result
        shutil.rmtree(entry)
    return None


def store_entry(kind: str, key: str, source: Path) -> None:
    """Store a folder in the cache. `atomic.seal_folder` must already have written the hashes of its files."""
    folder = disk.cache_root()
    if folder is not None:
        with suppress(OSError):
            _copy(source, folder / kind / key)


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a folder to another folder. Use hard links if possible, because the files never change."""
    with atomic.publish_folder(target) as scratch:
        for path in source.iterdir():
            disk.link(path, scratch / path.name)


def check_writable() -> None:
    """Log a warning if there is a cache folder that cannot be written, because builds continue without the cache."""
    folder = disk.cache_root()
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        _log.warning("the cache folder %s cannot be written, so the build does not use a cache", folder)


def evict_entries() -> None:
    """Remove the least recently used entries if the cache is too large."""
    folder = disk.cache_root()
    if folder is None or not folder.is_dir():
        return
    with suppress(OSError):
        entries = [entry for kind in ("shards", "texts") for entry in (folder / kind).glob("*") if entry.is_dir()]
        by_age = sorted((entry.stat().st_mtime, _folder_size(entry), entry) for entry in entries)
        free = shutil.disk_usage(folder).total // _MAX_DISK_DIVISOR - sum(size for _, size, _ in by_age)
        for _, size, entry in by_age:
            if free >= 0:
                break
            shutil.rmtree(entry, ignore_errors=True)
            free += size


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Part:
    """The texts that one build added to the cache, stored as sorted hashes and tokens."""

    def __init__(self, folder: Path) -> None:
        if atomic.read_sealed(folder) is None:
            raise ValueError("the cache folder is damaged")
        self.hashes = _map_file(folder / "hashes", np.dtype("S16"))
        self._ranges = _map_file(folder / "places.i64", np.dtype(np.int64)).reshape(-1, 2)
        self.ids = _map_file(folder / "ids.i32", np.dtype(np.int32))
        self._offsets = _map_file(folder / "offsets.i32", np.dtype(np.int32)).reshape(-1, 2)
        if len(self._ranges) != len(self.hashes) or not len(self.ids) == len(self._offsets) == self._ranges.max():
            raise ValueError("the cache folder is incomplete")

    def find(self, hashes: NDArray[np.bytes_]) -> list[EncodedText | None]:
        """Return the tokens of each text, or `None` for texts that are not cached."""
        positions = np.searchsorted(self.hashes, hashes)
        cached = np.flatnonzero(positions < len(self.hashes))
        cached = cached[self.hashes[positions[cached]] == hashes[cached]]
        encoded: list[EncodedText | None] = [None] * len(hashes)
        for number, (start, end) in zip(cached.tolist(), self._ranges[positions[cached]].tolist(), strict=True):
            encoded[number] = EncodedText(self.ids[start:end], self._offsets[start:end])
        return encoded


def _map_file(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


class TextCache:
    """A cache of the tokens of texts from one source. New texts are collected during a build and stored at its end."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._parts = folder, list[_Part]()
        self._used, self._added, self._counts = 0, bytearray(), array("q")
        for part in sorted(folder.glob("[!.]*")):
            try:
                self._parts.append(_Part(part))
            except (OSError, ValueError):
                # The texts of a damaged part are tokenized again.
                shutil.rmtree(part, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder))
        self._written, self._max_written = 0, shutil.disk_usage(folder).total // _MAX_DISK_DIVISOR // 4

    @property
    def has_entries(self) -> bool:
        """Whether the cache contains any text of the source."""
        return bool(self._parts)

    def encode(self, texts: Sequence[str], encode: Callable[[Sequence[str]], Encodings]) -> Encodings:
        """Return the tokens of each text. Read the tokens from the cache if possible, or else call `encode`."""
        # BLAKE2b is collision-resistant: a collision would train one text with the tokens of another.
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        hashes = np.frombuffer(b"".join(digests), "S16")
        encoded: list[EncodedText | None] = [None] * len(texts)
        for part in self._parts:
            encoded = [earlier or cached for earlier, cached in zip(encoded, part.find(hashes), strict=True)]
        self._used += sum(len(text.ids) for text in encoded if text is not None)
        missing = [number for number, text in enumerate(encoded) if text is None]
        if missing:
            new = encode([texts[number] for number in missing])
            self._add([digests[number] for number in missing], new)
            if len(missing) == len(texts):
                return new
            for number, text in zip(missing, new, strict=True):
                encoded[number] = text
        return Encodings.from_texts([text for text in encoded if text is not None], map(len, texts))

    def _add(self, digests: Sequence[bytes], new: Encodings) -> None:
        # The limit prevents one source from evicting all other sources.
        if self._written > self._max_written:
            return
        try:
            self._write(digests, new)
        except OSError:
            # The disk is full, or another process cleared the cache. The build continues, but caches no more texts.
            self._written, self._added, self._counts = self._max_written + 1, bytearray(), array("q")

    def _write(self, digests: Sequence[bytes], new: Encodings) -> None:
        offsets = np.stack((new.starts, new.ends), axis=1)
        offsets -= np.repeat(new.text_bounds[:-1], np.diff(new.token_bounds)).astype(offsets.dtype)[:, None]
        for name, values in (("ids.i32", new.ids), ("offsets.i32", offsets.astype(np.int32, copy=False))):
            with (self._scratch / name).open("ab") as file:
                file.write(np.ascontiguousarray(values).data)
                self._written += values.nbytes
        self._added += b"".join(digests)
        self._counts.extend(np.diff(new.token_bounds).tolist())

    def save(self) -> None:
        """Store the new texts. Remove the older texts if they have many more tokens than the current build used."""
        if sum(len(part.ids) for part in self._parts) > _MAX_UNUSED_FACTOR * (self._used + sum(self._counts)):
            for part in self._folder.glob("[!.]*"):
                shutil.rmtree(part, ignore_errors=True)
        os.utime(self._folder)
        if not self._added:
            return
        hashes, counts = np.frombuffer(self._added, "S16"), np.frombuffer(self._counts, np.int64)
        order = np.argsort(hashes, kind="stable")
        ends = np.cumsum(counts)
        (self._scratch / "hashes").write_bytes(hashes[order].tobytes())
        (self._scratch / "places.i64").write_bytes(np.stack((ends - counts, ends), axis=1)[order].tobytes())
        atomic.seal_folder(self._scratch, {})
        self._scratch.rename(self._folder / self._scratch.name.lstrip("."))

    def close(self) -> None:
        """Remove temporary files."""
        shutil.rmtree(self._scratch, ignore_errors=True)


@contextmanager
def open_text_cache(key: str) -> Iterator[TextCache | None]:
    """Open the text cache of one source. Save the new texts if the `with` block ends without an exception."""
    folder, text_cache = disk.cache_root(), None
    if folder is not None:
        with suppress(OSError):
            text_cache = TextCache(folder / "texts" / key)
    try:
        yield text_cache
        if text_cache is not None:
            with suppress(OSError):
                text_cache.save()
    finally:
        if text_cache is not None:
            text_cache.close()


def clear_cache(kinds: Iterable[str] = ("shards", "texts")) -> None:
    """Remove all entries of the given kinds from the cache.

    Raises:
        StorageError: `write`: an entry cannot be removed.
    """
    folder = disk.cache_root()
    if folder is not None:
        for kind in kinds:
            shutil.rmtree(folder / kind, ignore_errors=True)
            if (folder / kind).exists():
                hint = "check the permissions of the folder"
                raise StorageError("write", f"cannot remove all files in {folder / kind}", hint=hint)


def measure_cache() -> CacheSize:
    """Count the entries of the cache and their bytes."""
    folder = disk.cache_root()
    if folder is None:
        return CacheSize(None, {}, 0)
    kinds = {kind: list((folder / kind).iterdir()) for kind in KINDS if (folder / kind).is_dir()}
    sizes = {
        kind: (len(entries), sum(_folder_size(entry) if entry.is_dir() else entry.stat().st_size for entry in entries))
        for kind, entries in kinds.items()
    }
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return CacheSize(folder, sizes, shutil.disk_usage(existing).total // _MAX_DISK_DIVISOR)
