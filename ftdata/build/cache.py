"""The second time: shards that were built before, and tokens that texts were made into, are taken from a folder.

    DIR/shards/KEY/         what a shard's folder holds; KEY is the hash of all that decides it
    DIR/texts/KEY/PART/     hashes, bounds, ids and offsets of texts; KEY is the hash of a source and a tokenizer

Each folder is sealed by hashes of its files (`atomic.seal`), which are compared before anything in it is used; a folder
that is damaged is removed, and what it held is made again.

DIR is `FTDATA_CACHE`, else `ftdata` in `XDG_CACHE_HOME` or `~/.cache`; with `FTDATA_CACHE=off` there is none. It is a
convenience: whatever goes wrong with it, a build goes on without. It holds a tenth of the disk at most, and what was
used last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftdata.storage import atomic, disk
from ftdata.tokenizing.batches import EncodedText, Encodings

_MOST_OF_DISK = 10
"""The cache is kept below the disk's size divided by this."""

_MOST_UNUSED = 3
"""A source's texts are forgotten when they take so many times the room of those that were last used."""


@cache
def package_hash() -> str:
    """Return a hash of this package as it is installed: with other code, nothing is the same."""
    package = Path(__file__).parents[1]
    files = sorted(path for kind in ("*.py", "*.jinja") for path in package.rglob(kind))
    return hash_key([(str(path.relative_to(package)), disk.sha256_of_file(path)) for path in files])


def hash_key(parts: Any) -> str:
    """Return the hash of a JSON value."""
    return disk.hash_bytes(json.dumps(parts, sort_keys=True, default=str).encode())


def restore_entry(kind: str, key: str, target: Path) -> dict[str, Any] | None:
    """Put the files of an entry into the folder `target`, and return its result; `None` where there is none."""
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
    """Remember a folder that was sealed under a key."""
    folder = disk.cache_root()
    if folder is not None:
        with suppress(OSError):
            _copy(source, folder / kind / key)


def _copy(source: Path, target: Path) -> None:
    """Have the files of one folder in another; the same where that can be, since none is ever changed."""
    with atomic.publish_folder(target) as scratch:
        for path in source.iterdir():
            disk.link(path, scratch / path.name)


def evict_entries() -> None:
    """Remove what was used longest ago, if the cache has become too large."""
    folder = disk.cache_root()
    if folder is None or not folder.is_dir():
        return
    with suppress(OSError):
        entries = [entry for kind in ("shards", "texts") for entry in (folder / kind).glob("*") if entry.is_dir()]
        used = sorted((entry.stat().st_mtime, _size(entry), entry) for entry in entries)
        room = shutil.disk_usage(folder).total // _MOST_OF_DISK - sum(size for _, size, _ in used)
        for _, size, entry in used:
            if room >= 0:
                break
            shutil.rmtree(entry, ignore_errors=True)
            room += size


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Part:
    """Texts that one build came upon: their hashes, sorted, and where the tokens of each stand."""

    def __init__(self, folder: Path) -> None:
        if atomic.read_sealed(folder) is None:
            raise ValueError("is damaged")
        self.hashes = _mapped(folder / "hashes", np.dtype("S16"))
        self._places = _mapped(folder / "places.i64", np.dtype(np.int64)).reshape(-1, 2)
        self.ids = _mapped(folder / "ids.i32", np.dtype(np.int32))
        self._offsets = _mapped(folder / "offsets.i32", np.dtype(np.int32)).reshape(-1, 2)
        if len(self._places) != len(self.hashes) or not len(self.ids) == len(self._offsets) == self._places.max():
            raise ValueError("is not whole")

    def find(self, hashes: NDArray[np.bytes_]) -> list[EncodedText | None]:
        """Return the tokens of the texts that are known."""
        at = np.searchsorted(self.hashes, hashes)
        known = np.flatnonzero(at < len(self.hashes))
        known = known[self.hashes[at[known]] == hashes[known]]
        found: list[EncodedText | None] = [None] * len(hashes)
        for number, (first, last) in zip(known.tolist(), self._places[at[known]].tolist(), strict=True):
            found[number] = EncodedText(self.ids[first:last], self._offsets[first:last])
        return found


def _mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    return np.asarray(np.memmap(path, kind, "r")) if path.stat().st_size else np.empty(0, kind)


class TextCache:
    """The tokens that the texts of one source were made into before, and those that are new now."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._parts = folder, list[_Part]()
        self._used, self._added, self._counts = 0, bytearray(), array("q")
        for part in sorted(folder.glob("[!.]*")):
            try:
                self._parts.append(_Part(part))
            except (OSError, ValueError):
                # A part that is not as it was written is made anew.
                shutil.rmtree(part, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder))
        self._written, self._most = 0, shutil.disk_usage(folder).total // _MOST_OF_DISK // 4

    @property
    def has_entries(self) -> bool:
        """Whether any are."""
        return bool(self._parts)

    def encode(self, texts: Sequence[str], encode: Callable[[Sequence[str]], Encodings]) -> Encodings:
        """Return the tokens of each text: as they were made before, else by `encode`."""
        # BLAKE2b, not XXH3: with a collision, data could have one text trained with the tokens of another.
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        hashes = np.frombuffer(b"".join(digests), "S16")
        found: list[EncodedText | None] = [None] * len(texts)
        for part in self._parts:
            found = [one or other for one, other in zip(found, part.find(hashes), strict=True)]
        self._used += sum(len(one.ids) for one in found if one is not None)
        missing = [number for number, one in enumerate(found) if one is None]
        if missing:
            made = encode([texts[number] for number in missing])
            self._note([digests[number] for number in missing], made)
            if len(missing) == len(texts):
                return made
            for number, one in zip(missing, made, strict=True):
                found[number] = one
        return Encodings.of([one for one in found if one is not None], map(len, texts))

    def _note(self, digests: Sequence[bytes], made: Encodings) -> None:
        # One source alone shall not drive out all others.
        if self._written > self._most:
            return
        offsets = np.stack((made.starts, made.ends), axis=1)
        offsets -= np.repeat(made.places[:-1], np.diff(made.bounds)).astype(offsets.dtype)[:, None]
        for name, values in (("ids.i32", made.ids), ("offsets.i32", offsets.astype(np.int32, copy=False))):
            with (self._scratch / name).open("ab") as file:
                file.write(np.ascontiguousarray(values).data)
                self._written += values.nbytes
        self._added += b"".join(digests)
        self._counts.extend(np.diff(made.bounds).tolist())

    def keep(self) -> None:
        """Remember the texts that were new; forget all others, if they take far more room than those in use."""
        if sum(len(part.ids) for part in self._parts) > _MOST_UNUSED * (self._used + sum(self._counts)):
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
        """Forget what was not kept."""
        shutil.rmtree(self._scratch, ignore_errors=True)


@contextmanager
def open_text_cache(key: str) -> Iterator[TextCache | None]:
    """Give what is known of the texts of one source, and remember what is new if the block ends well."""
    folder, found = disk.cache_root(), None
    if folder is not None:
        with suppress(OSError):
            found = TextCache(folder / "texts" / key)
    try:
        yield found
        if found is not None:
            with suppress(OSError):
                found.keep()
    finally:
        if found is not None:
            found.close()


def clear_cache() -> None:
    """Forget everything."""
    folder = disk.cache_root()
    if folder is not None:
        for kind in ("shards", "texts"):
            shutil.rmtree(folder / kind, ignore_errors=True)
