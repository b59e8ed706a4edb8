"""What appears whole or not at all: a file, and a build in its folder, which one process at a time may make.

    DIR                     the build: the old one, or the new one, never a mixture
    .DIR.ftdata/            where the new one is made; gone when it is done
    .DIR.ftdata/lock        held (flock) by the process that builds, until it ends, however it does
    .DIR.ftdata/shards/     what is done already; a build that was killed goes on with it
    .DIR.ftdata/new/        the build, until it takes the place of the old one

Folders of shards are sealed by `result.json`, which says what all others in it are.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ftdata import disk
from ftdata.errors import FtdataError, HubError, InternalError, StorageError

_log = logging.getLogger(__name__)
_SEAL = "result.json"


@dataclass(frozen=True)
class Workplace:
    """Where a build is made: the folder of its shards, and that of the build itself, which is to become `target`."""

    target: Path
    folder: Path

    @property
    def shards(self) -> Path:
        """What is done already."""
        return self.folder / "shards"

    @property
    def new(self) -> Path:
        """What is to be published."""
        return self.folder / "new"

    @property
    def _old(self) -> Path:
        return self.folder / "old"

    def recover(self) -> None:
        """Tidy up after a process that did not come to its end: what it had not published is made anew."""
        if self._old.exists() and not self.target.exists():
            disk.rename(self._old, self.target)
        for left in (self.new, self._old, *self.shards.glob(".*")):
            disk.remove(left)

    def publish(self) -> None:
        """Have `new` take the place of `target`, at once, so that a power cut leaves the one or the other."""
        disk.sync_all(self.new)
        if not self.target.exists():
            disk.rename(self.new, self.target)
        elif not disk.swap(self.new, self.target):
            # The next build would find the old one, were this process to end between the two.
            disk.rename(self.target, self._old)
            disk.rename(self.new, self.target)
        disk.sync(self.target.parent)

    def clear(self) -> None:
        """Remove it all; the lock, for which others may be waiting, last."""
        for path in sorted(self.folder.iterdir()):
            if path.name != "lock":
                disk.remove(path)
        disk.remove(self.folder / "lock")
        try:
            self.folder.rmdir()
        except OSError:
            return


@contextmanager
def workplace(target: Path, check: Callable[[Path], None]) -> Iterator[Workplace]:
    """Give the place where `target` is made; while another process has it, wait.

    After a signal, or a fault of disk or network, what is done so far is kept for the next try.

    Args:
        target: what is to be made.
        check: refuses a target that must not be replaced.

    Raises:
        StorageError: the disk refuses; the message names the path.
    """
    place = Workplace(target, target.parent / f".{target.name}.ftdata")
    with _told(target), _locked(place.folder):
        place.recover()
        try:
            check(target)
            yield place
        except FtdataError as error:
            if not isinstance(error, StorageError | HubError | InternalError):
                place.clear()
            raise
        except Exception as error:
            if not isinstance(error, OSError):
                place.clear()
            raise
        place.clear()


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a file to write into, which becomes `target` when the block ends well, and vanishes otherwise.

    Raises:
        StorageError: the disk refuses; the message names the path.
    """
    with _told(target):
        disk.mkdir(target.parent, parents=True, exist_ok=True)
        temporary = _beside(target)
        disk.write(temporary, b"")
        try:
            yield temporary
            disk.sync(temporary)
            disk.rename(temporary, target)
        finally:
            disk.remove(temporary)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder that becomes `target` when the block ends well, unless another process was faster, or vanishes."""
    disk.mkdir(target.parent, parents=True, exist_ok=True)
    temporary = _beside(target)
    disk.mkdir(temporary)
    try:
        yield temporary
        try:
            disk.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        disk.remove(temporary)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}.tmp")


def seal(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, the last file of a folder: a hash of every other one, a result, and a hash of the two."""
    said = {"files": {path.name: disk.digest(path) for path in sorted(folder.iterdir())}, "result": result}
    disk.write_json(folder / _SEAL, {**said, "seal": _hash(said)})


def sealed(folder: Path) -> dict[str, Any] | None:
    """Return the result of a folder that was sealed, and is as it was; else `None`."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        known = json.loads((folder / _SEAL).read_bytes())
        if (
            known.pop("seal") == _hash(known)
            and {name: disk.digest(folder / name) for name in known["files"]} == known["files"]
        ):
            return dict(known["result"])
    return None


def _hash(said: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(disk.json_of(said))


@contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, FtdataError):
            raise
        at = f": {error.filename}" if error.filename and str(error.filename) != str(target) else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room, or choose another place" if full else "choose a place that can be written to"
        raise StorageError("write", f"cannot write {target}: {error.strerror or error}{at}", hint=hint) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = _lock(folder)
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: Path) -> int:
    """Return the open lock of a folder, made if need be; who held it before may have removed both."""
    import fcntl

    path, told = folder / "lock", False
    while True:
        disk.mkdir(folder, parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    _log.warning("another process is at work in %s: waiting for it", folder)
                told = True
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is(lock, path):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _is(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
