"""Replace files and builds atomically. A lock ensures that only one process at a time writes to an output folder.

    DIR                     the build: the old or the new version, never a mixture
    .DIR.ftdata/            the workspace of the new build; removed after the build
    .DIR.ftdata/lock        locked (flock) by the process that makes the build
    .DIR.ftdata/token       recorded by `ftdata.storage.build_records`; without a record, the contents are not reused
    .DIR.ftdata/shards/     finished shards, which an interrupted build reuses
    .DIR.ftdata/new/        the new build, before it replaces the old build

A folder of a shard is sealed by `result.json`, which contains the hashes of all other files.

The workspace may come from an untrusted repository. ftdata follows no links in it, reuses only contents that this user
recorded, and removes only files that a build can write.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftdata.errors import FtdataError, InternalError, StorageError
from ftdata.storage import build_records, disk

_log = logging.getLogger(__name__)
_SEAL = "result.json"


@dataclass(frozen=True)
class Workspace:
    """The temporary folder for a new build. The finished build replaces the target folder.

    Attributes:
        target: the folder that the build replaces.
        folder: the workspace.
    """

    target: Path
    folder: Path

    @property
    def shards(self) -> Path:
        """The folder that contains the finished shards."""
        return self.folder / "shards"

    @property
    def new(self) -> Path:
        """The folder in which the new build is written."""
        return self.folder / "new"

    @property
    def _old(self) -> Path:
        return self.folder / "old"

    def claim(self) -> None:
        """Check that this user created the workspace, and remove incomplete files of an interrupted build.

        Shards are kept if the token of the workspace is recorded. A build that was not published is made again.

        Raises:
            StorageError: `workspace_unknown`: the workspace contains files that no build writes.
        """
        token = self.folder / "token"
        if not (token.is_file() and build_records.has_record("workplace", self._record_content(token.read_bytes()))):
            self._check_foreign_files()
            self._remove_content("lock")
            new_token = secrets.token_hex(16).encode()
            disk.write(token, new_token)
            build_records.add_record("workplace", self._record_content(new_token))
        if self._old.exists() and not self.target.exists():
            disk.rename(self._old, self.target)
        unfinished = (path for path in self.shards.glob(".*") if _TEMPORARY.fullmatch(path.name))
        for path in (self.new, self._old, *unfinished):
            disk.remove(path)

    def _check_foreign_files(self) -> None:
        foreign = next((path for path in _list_paths(self.folder) if not _WRITTEN_BY_BUILDS.fullmatch(path)), None)
        if foreign is not None or self._old.exists():
            foreign = foreign or "old"
            message = f"{self.folder} contains {foreign}, but this user has no record of a build in this folder"
            hint = f"inspect and remove {self.folder}, or choose another output folder"
            raise StorageError("workspace_unknown", message, hint=hint)

    def _record_content(self, token: bytes) -> bytes:
        return os.fsencode(self.folder) + b"\0" + token

    def publish(self) -> None:
        """Replace `target` with the new build atomically. After a power failure, the old or the new build exists."""
        disk.sync_all(self.new)
        if not self.target.exists():
            disk.rename(self.new, self.target)
        elif not disk.swap(self.new, self.target):
            # If this process ends between the two renames, `claim` restores the old build.
            disk.rename(self.target, self._old)
            disk.rename(self.new, self.target)
        disk.sync(self.target.parent)

    def clear(self) -> None:
        """Remove the workspace.

        The token is removed after the content, because `claim` rejects unknown files without a token. The lock file is
        removed last, because other processes can wait for the lock.
        """
        token = self.folder / "token"
        self._remove_content("lock", "token")
        with suppress(OSError):
            record = self._record_content(token.read_bytes())
            disk.remove(token)
            build_records.remove_record("workplace", record)
        disk.remove(self.folder / "lock")
        try:
            self.folder.rmdir()
        except OSError:
            return

    def _remove_content(self, *keep: str) -> None:
        for path in sorted(self.folder.iterdir()):
            if path.name not in keep:
                disk.remove(path)


_TEMPORARY = re.compile(r"\.[^/]+-[0-9a-f]{8}\.tmp")
"""Names of unfinished files and folders (`_temporary_path`)."""

_SHARD_FILES = r"(?:result\.json|ids\.i32|trained\.b8|examples\.arrow|rejects\.jsonl|minhashes\.u32)"
_SPLIT_FILES = r"(?:data-\d{5}\.arrow|provenance\.parquet|state\.json|dataset_info\.json)"
_BUILD_FILES = r"(?:manifest\.json|report\.json|rejects\.jsonl|README\.md|dataset_dict\.json)"
_WRITTEN_BY_BUILDS = re.compile(
    rf"lock|token|shards/(?:(?:{_TEMPORARY.pattern}|[0-9a-f]+(?:-reference)?)/{_SHARD_FILES}?|{_TEMPORARY.pattern})?"
    rf"|(?:new|old)/(?:{_BUILD_FILES}|\w[\w.-]*/{_SPLIT_FILES}?)?"
)
"""Paths in a workspace that builds write."""


def _list_paths(folder: Path) -> Iterator[str]:
    """Yield the relative path of each file and subfolder. Folder paths end with a slash. Links are not followed."""
    for parent, folders, files in os.walk(folder, onerror=_raise_unless_missing):
        for name in (*(f"{name}/" for name in folders), *files):
            yield name if Path(parent) == folder else f"{os.path.relpath(parent, folder)}/{name}"


def _raise_unless_missing(error: OSError) -> None:
    """Raise an error of `os.walk`. Another process that holds the lock can remove a subfolder during the walk."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _check_folder(folder: Path) -> None:
    """Check that a workspace belongs to this user and contains no symbolic links. A link could redirect a write.

    Raises:
        StorageError: `workspace_owner` or `workspace_link`.
    """
    hint = f"inspect and remove {folder}, or choose another output folder"
    if folder.is_symlink():
        raise StorageError("workspace_link", f"{folder} is a symbolic link", hint=hint)
    try:
        owner = folder.lstat().st_uid
    except FileNotFoundError:
        return
    if hasattr(os, "geteuid") and owner != os.geteuid():
        raise StorageError("workspace_owner", f"{folder} belongs to another user (uid {owner})", hint=hint)
    check_no_links(folder)


def check_no_links(folder: Path) -> None:
    """Check that a folder contains no symbolic links, which could redirect writes to other files.

    Raises:
        StorageError: `workspace_link`, with the first link.
    """
    link = next((path for path in _list_paths(folder) if (folder / path).is_symlink()), None)
    if link is not None:
        hint = f"inspect and remove {folder / link}, or choose another output folder"
        raise StorageError("workspace_link", f"{folder} contains a symbolic link: {link}", hint=hint)


@contextmanager
def open_workspace(target: Path, check: Callable[[Path], None]) -> Iterator[Workspace]:
    """Open and lock the workspace of a build. If another process holds the lock, wait for that process.

    After a signal, or an error of the disk or network, the workspace is kept so that the next build can resume.

    Args:
        target: the output folder.
        check: raises an exception if the target must not be replaced.

    Raises:
        StorageError: the workspace cannot be used, or the disk cannot be written; the message contains the path.
    """
    workspace = Workspace(target, target.parent / f".{target.name}.ftdata")
    with convert_os_errors(target):
        _check_folder(workspace.folder)
        with _lock_folder(workspace.folder):
            # Check again: another process could have changed the folder before this process locked it.
            _check_folder(workspace.folder)
            workspace.claim()
            with _clear_after(workspace):
                check(target)
                yield workspace


@contextmanager
def _clear_after(workspace: Workspace) -> Iterator[None]:
    """Remove the workspace after the `with` block. After an error, keep it if the same command can resume the build."""
    try:
        yield
    except Exception as error:
        # `StorageError` and `HubError` are OS errors.
        if not isinstance(error, OSError | InternalError):
            workspace.clear()
        raise
    workspace.clear()


@contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `target` when the `with` block ends.

    If the block raises an error, the temporary file is removed. A device or pipe, such as `/dev/null`, is not replaced:
    the content is written to it after the block.

    Raises:
        StorageError: the file cannot be written; the message contains the path.
    """
    with convert_os_errors(target):
        if target.exists() and not target.is_file() and not target.is_dir():
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / "content"
                disk.write(temporary, b"")
                yield temporary
                with temporary.open("rb") as content, disk.create(target) as out:
                    shutil.copyfileobj(content, out)
            return
        disk.mkdir(target.parent, parents=True, exist_ok=True)
        temporary = _temporary_path(target)
        disk.write(temporary, b"")
        try:
            yield temporary
            disk.sync(temporary)
            disk.rename(temporary, target)
        finally:
            disk.remove(temporary)


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `target` when the `with` block ends.

    If the block raises an error, or another process has already created `target`, the temporary folder is removed.
    """
    disk.mkdir(target.parent, parents=True, exist_ok=True)
    temporary = _temporary_path(target)
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


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}.tmp")


def seal_folder(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json` into a folder. All other files of the folder must already exist.

    It contains the result, the hash of each other file, and a hash of its content.
    """
    contents = {"files": {path.name: disk.sha256_of_file(path) for path in sorted(folder.iterdir())}, "result": result}
    disk.write_json(folder / _SEAL, {**contents, "seal": _hash(contents)})


def read_sealed(folder: Path) -> dict[str, Any] | None:
    """Return the result in the `result.json` of a folder. Return `None` if a file there is missing or has changed."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        contents = json.loads(disk.read_regular_file(folder / _SEAL))
        if (
            contents.pop("seal") == _hash(contents)
            and {name: disk.sha256_of_file(folder / name) for name in contents["files"]} == contents["files"]
        ):
            return dict(contents["result"])
    return None


def _hash(contents: Mapping[str, Any]) -> str:
    return disk.hash_bytes(disk.encode_json(contents))


@contextmanager
def convert_os_errors(target: Path) -> Iterator[None]:
    """Inside a `with` block, raise a `StorageError` that contains the path of the target instead of an OS error."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FtdataError):
            raise
        path = f": {error.filename}" if error.filename and str(error.filename) != str(target) else ""
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free disk space, or choose another path" if is_full else "choose a path with write permission"
        if error.errno == errno.EFBIG:
            hint = "increase the limit of the file size: ulimit -f unlimited"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            hint = "increase the limit of open files: ulimit -n 1024"
        raise StorageError("write", f"cannot write {target}: {error.strerror or error}{path}", hint=hint) from None


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder. If another process holds the lock, wait for that process.

    The folder and the lock file are created if necessary, because the previous process may have removed both.
    """
    with ExitStack() as stack:
        path = folder / "lock"
        if not stack.enter_context(lock_file(path)):
            _log.warning("another process uses %s: waiting for it", folder)
            stack.enter_context(lock_file(path, wait=True))
        yield


@contextmanager
def lock_file(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Create and lock a file inside a `with` block. Yield whether this process holds the lock.

    Args:
        path: the lock file; its folder is created if necessary.
        wait: whether to wait for a process that holds the lock.
    """
    import fcntl

    while True:
        disk.mkdir(path.parent, parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue
        with open(lock, "rb"):  # noqa: PTH123  (a file descriptor)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # The previous process may have removed the file.
            if _is_same_file(lock, path):
                yield True
                return


def _is_same_file(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
