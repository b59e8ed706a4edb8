"""What appears whole or not at all: a file, and a build in its folder, which one process at a time may make.

    DIR                     the build: the old one, or the new one, never a mixture
    .DIR.ftdata/            where the new one is made; gone when it is done
    .DIR.ftdata/lock        held (flock) by the process that builds, until it ends, however it does
    .DIR.ftdata/token       recorded by `ftdata.storage.build_records`; without the record, the content is not reused
    .DIR.ftdata/shards/     what is done already; a build that was killed goes on with it
    .DIR.ftdata/new/        the build, until it takes the place of the old one

Folders of shards are sealed by `result.json`, which says what all others in it are.

The folder may have come with a repository of a stranger. No link in it is followed, nothing in it is reused that this
user did not record, and nothing is removed that no build writes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ftdata.errors import FtdataError, HubError, InternalError, StorageError
from ftdata.storage import build_records, disk

_log = logging.getLogger(__name__)
_SEAL = "result.json"


@dataclass(frozen=True)
class Workspace:
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

    def claim(self) -> None:
        """Make sure that what the folder holds was made by this user; remove what an unfinished build left there.

        What a process had not published when it ended is made anew. Shards are kept if the folder's token is recorded.

        Raises:
            StorageError: `workspace_unknown`: the folder holds files that no build writes.
        """
        token = self.folder / "token"
        recorded = token.is_file() and build_records.has_record("workplace", self._record(token.read_bytes()))
        if not recorded:
            foreign = next((path for path in _entries(self.folder) if not _WRITTEN_BY_BUILDS.fullmatch(path)), None)
            if foreign is not None or self._old.exists():
                raise StorageError(
                    "workspace_unknown",
                    f"{self.folder} holds {foreign or 'old'}, and there is no record that a build of this user made it",
                    hint=f"look at it and remove {self.folder}, or choose another output folder",
                )
            self._remove_content(keep="lock")
            new = secrets.token_hex(16).encode()
            disk.write(token, new)
            build_records.add_record("workplace", self._record(new))
        if self._old.exists() and not self.target.exists():
            disk.rename(self._old, self.target)
        unfinished = (path for path in self.shards.glob(".*") if _TEMPORARY.fullmatch(path.name))
        for left in (self.new, self._old, *unfinished):
            disk.remove(left)

    def _record(self, token: bytes) -> bytes:
        return os.fsencode(self.folder) + b"\0" + token

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
        with suppress(OSError):
            build_records.remove_record("workplace", self._record((self.folder / "token").read_bytes()))
        self._remove_content(keep="lock")
        disk.remove(self.folder / "lock")
        try:
            self.folder.rmdir()
        except OSError:
            return

    def _remove_content(self, keep: str) -> None:
        for path in sorted(self.folder.iterdir()):
            if path.name != keep:
                disk.remove(path)


_TEMPORARY = re.compile(r"\.[^/]+-[0-9a-f]{8}\.tmp")
"""Names of unfinished files and folders (`_beside`)."""

_SHARD_FILES = r"(?:result\.json|ids\.i32|trained\.b8|examples\.arrow|rejects\.jsonl|minhashes\.u32)"
_SPLIT_FILES = r"(?:data-\d{5}\.arrow|provenance\.parquet|state\.json|dataset_info\.json)"
_BUILD_FILES = r"(?:manifest\.json|report\.json|rejects\.jsonl|README\.md|dataset_dict\.json)"
_WRITTEN_BY_BUILDS = re.compile(
    rf"lock|token|shards/(?:(?:{_TEMPORARY.pattern}|[0-9a-f]+(?:-reference)?)/{_SHARD_FILES}?|{_TEMPORARY.pattern})?"
    rf"|(?:new|old)/(?:{_BUILD_FILES}|\w[\w.-]*/{_SPLIT_FILES}?)?"
)
"""Paths in a workplace that builds write."""


def _entries(folder: Path) -> Iterator[str]:
    """Yield the paths of all that is in a folder, relative to it, folders with a slash; no link is followed."""
    for at, folders, files in os.walk(folder, onerror=_raise):
        for name in (*(f"{name}/" for name in folders), *files):
            yield name if Path(at) == folder else f"{os.path.relpath(at, folder)}/{name}"


def _raise(error: OSError) -> NoReturn:
    raise error


def _check_folder(folder: Path) -> None:
    """Refuse a workplace that belongs to somebody else or contains links: whoever made it could lead writes elsewhere.

    Raises:
        StorageError: `workspace_owner` or `workspace_link`.
    """
    hint = f"look at it and remove {folder}, or choose another output folder"
    if folder.is_symlink():
        raise StorageError("workspace_link", f"{folder} is a symbolic link", hint=hint)
    if not folder.exists():
        return
    if hasattr(os, "geteuid") and (owner := folder.lstat().st_uid) != os.geteuid():
        raise StorageError("workspace_owner", f"{folder} belongs to another user (uid {owner})", hint=hint)
    link = next((path for path in _entries(folder) if (folder / path).is_symlink()), None)
    if link is not None:
        raise StorageError("workspace_link", f"{folder} contains a symbolic link: {link}", hint=hint)


@contextmanager
def open_workspace(target: Path, check: Callable[[Path], None]) -> Iterator[Workspace]:
    """Give the place where `target` is made; while another process has it, wait.

    After a signal, or a fault of disk or network, what is done so far is kept for the next try.

    Args:
        target: what is to be made.
        check: refuses a target that must not be replaced.

    Raises:
        StorageError: the disk refuses; the message names the path.
    """
    place = Workspace(target, target.parent / f".{target.name}.ftdata")
    with _told(target):
        _check_folder(place.folder)
        with _locked(place.folder):
            # Again: another process may have been at work meanwhile.
            _check_folder(place.folder)
            place.claim()
            with _cleared(place):
                check(target)
                yield place


@contextmanager
def _cleared(place: Workspace) -> Iterator[None]:
    """Remove the workplace in the end, unless the same command can resume from it."""
    try:
        yield
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
def replace_file(target: Path) -> Iterator[Path]:
    """Give a file to write into, which becomes `target` when the block ends well, and vanishes otherwise.

    A device or a pipe, such as `/dev/null`, is not replaced: the content is written to it when the block ends well.

    Raises:
        StorageError: the disk refuses; the message names the path.
    """
    with _told(target):
        if target.exists() and not target.is_file() and not target.is_dir():
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / "content"
                disk.write(temporary, b"")
                yield temporary
                with temporary.open("rb") as content, target.open("wb") as out:
                    shutil.copyfileobj(content, out)
            return
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
def publish_folder(target: Path) -> Iterator[Path]:
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


def seal_folder(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, the last file of a folder: a hash of every other one, a result, and a hash of the two."""
    said = {"files": {path.name: disk.sha256_of_file(path) for path in sorted(folder.iterdir())}, "result": result}
    disk.write_json(folder / _SEAL, {**said, "seal": _hash(said)})


def read_sealed(folder: Path) -> dict[str, Any] | None:
    """Return the result of a folder that was sealed, and is as it was; else `None`."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        known = json.loads(disk.read_regular_file(folder / _SEAL))
        if (
            known.pop("seal") == _hash(known)
            and {name: disk.sha256_of_file(folder / name) for name in known["files"]} == known["files"]
        ):
            return dict(known["result"])
    return None


def _hash(said: Mapping[str, Any]) -> str:
    return disk.hash_bytes(disk.encode_json(said))


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
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
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
