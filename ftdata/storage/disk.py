"""File operations for builds and shards. Tests can make each operation fail.

`FTDATA_FAILPOINT=OPERATION:NUMBER:FAULT` is for tests only. OPERATION is one of `OPERATIONS`, or `*` for any operation.
NUMBER counts these operations from 1 in this process. FAULT is one of:

    kill        end the process in the middle of a write, as SIGKILL or a power failure does
    enospc      the disk is full from this operation on
    eio         this operation fails
    readonly    all operations fail from this operation on
    interrupt   send SIGINT to the process, as Ctrl-C does
    trace       list all operations on stderr
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

OPERATIONS = ("create", "write", "sync", "mkdir", "link", "rename", "swap", "remove")
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "readonly": errno.EROFS}
_LASTING_FAULTS = {"enospc": ("create", "write", "sync", "mkdir", "link"), "readonly": OPERATIONS}
_BUFFER_SIZE = 1 << 20
_operation_counts: Counter[str] = Counter()


def _check_failpoint(operation: str, path: str | Path, write_half: Callable[[], Any] = lambda: None) -> None:
    """Simulate a disk error or crash if a test requests it. Before this, `write_half` does half of the operation."""
    failpoint = os.environ.get("FTDATA_FAILPOINT")
    if failpoint is None:
        return
    _operation_counts.update((operation, "*"))
    name, number, fault = failpoint.split(":")
    if fault == "trace":
        sys.stderr.write(f"{_operation_counts['*']} {operation} {path}\n")
        return
    fails_now = name in ("*", operation) and _operation_counts[name] == int(number)
    is_later = name in ("*", operation) and _operation_counts[name] > int(number)
    if not fails_now and not (is_later and operation in _LASTING_FAULTS.get(fault, ())):
        return
    write_half()
    if fault == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        return
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    _raise_os_error(_ERRORS[fault], path)


def _raise_os_error(number: int, path: str | Path) -> NoReturn:
    raise OSError(number, os.strerror(number), str(path))


class _FailpointFile(io.FileIO):
    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        _check_failpoint("write", str(self.name), lambda: super(_FailpointFile, self).write(view[: len(view) // 2]))
        return super().write(view) or 0


def create(path: Path, mode: str = "w") -> io.BufferedWriter:
    """Open a file for writing bytes. The mode `"a"` appends to the file."""
    _check_failpoint("create", path)
    return io.BufferedWriter(_FailpointFile(path, mode), _BUFFER_SIZE)


def write(path: Path, data: bytes) -> None:
    """Write bytes to a file. An existing file is overwritten."""
    with create(path) as file:
        file.write(data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping to a JSON file. The order of the keys is preserved."""
    write(path, encode_json(value))


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Encode a mapping as indented JSON in UTF-8."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def write_cache_file(path: Path, data: bytes) -> None:
    """Write a small file to the cache. Errors are ignored, because the cache is only an optimization."""
    with suppress(OSError):
        mkdir(path.parent, parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        write(temporary, data)
        rename(temporary, path)


def sync(path: Path) -> None:
    """Flush the content of a file, or the file names in a folder, to disk with `fsync`."""
    _check_failpoint("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Flush a folder, its subfolders and all their files to disk."""
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)


def mkdir(path: Path, *, parents: bool = False, exist_ok: bool = False) -> None:
    """Create a folder."""
    if not (exist_ok and path.is_dir()):
        _check_failpoint("mkdir", path)
        path.mkdir(parents=parents, exist_ok=exist_ok)


def link(source: Path, target: Path) -> None:
    """Create `target` as a hard link to `source`. If the file system does not support hard links, copy the file."""
    _check_failpoint("link", target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder atomically. An existing file is replaced."""
    _check_failpoint("rename", target)
    source.replace(target)


def swap(first: Path, second: Path) -> bool:
    """Exchange the names of two folders atomically. Return `False` if the operating system does not support this."""
    _check_failpoint("swap", second)
    exchange = _renameat2()
    if exchange is None:
        return False
    working_folder, flags = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(exchange(working_folder, os.fsencode(first), working_folder, os.fsencode(second), flags) == 0)


@cache
def _renameat2() -> Any:
    return getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None


def remove(path: Path) -> None:
    """Remove a file, or remove a folder with its contents. Ignore a missing path or a failed removal."""
    with suppress(OSError):
        _check_failpoint("remove", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def read_regular_file(path: Path) -> bytes:
    """Return the content of a regular file as bytes.

    Raises:
        OSError: the file cannot be read, or is not a regular file; reading a pipe or `/dev/zero` could never end.
    """
    _check_regular(path)
    return path.read_bytes()


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "the path is not a regular file", str(path))


def sha256_of_file(path: str | Path, start: int = 0, end: int | None = None) -> str:
    """Return the SHA-256 hash of a file in hexadecimal.

    If `end` is set, hash only the bytes from `start` to `end`, extended to the end of the last line.
    """
    # Faster hashes are not collision-resistant: a crafted file could be mistaken for another file.
    digest = hashlib.sha256()
    _check_regular(Path(path))
    with Path(path).open("rb") as file:
        if end is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        remaining, last_byte = end - file.seek(start), b"\n"
        while part := file.read(min(_BUFFER_SIZE, remaining)):
            digest.update(part)
            remaining, last_byte = remaining - len(part), part[-1:]
        while last_byte != b"\n" and (part := file.readline(_BUFFER_SIZE)):
            digest.update(part)
            last_byte = part[-1:]
    return digest.hexdigest()


def hash_bytes(content: bytes) -> str:
    """Return the first 128 bits of the SHA-256 hash of `content`, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()[:32]


def cache_root() -> Path | None:
    """Return the cache folder, or `None` if the cache is disabled or the user has no home directory."""
    setting = os.environ.get("FTDATA_CACHE")
    if setting is not None:
        return None if setting.lower() in ("", "0", "off", "false", "no") else Path(setting).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftdata"
    except RuntimeError:
        # Path.home() fails if the user has no home directory, as in many containers.
        return None
