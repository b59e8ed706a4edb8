"""Disk: every write, sync and rename of builds and shards goes through here, so that a test can make each of them fail.

`FTDATA_FAILPOINT=OPERATION:NUMBER:FAULT` is for tests alone. OPERATION is one of `OPERATIONS`, or `*` for any; NUMBER
counts them from 1 in this process; FAULT is `kill` (as SIGKILL or a power cut does, in the middle of a write), `enospc`
(from then on the disk is full), `eio` (this once), `readonly` (from then on nothing can be changed), or `trace`, which
lists all on stderr.
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
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

OPERATIONS = ("create", "write", "sync", "mkdir", "link", "rename", "swap", "remove")
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "readonly": errno.EROFS}
_LASTING = {"enospc": ("create", "write", "sync", "mkdir", "link"), "readonly": OPERATIONS}
_BUFFER = 1 << 20
_seen: Counter[str] = Counter()


def _reached(operation: str, path: str | Path, half: Callable[[], Any] = lambda: None) -> None:
    """Fail where a test wants it; `half` does a part of the operation before."""
    wanted = os.environ.get("FTDATA_FAILPOINT")
    if wanted is None:
        return
    _seen.update((operation, "*"))
    name, number, fault = wanted.split(":")
    if fault == "trace":
        sys.stderr.write(f"{_seen['*']} {operation} {path}\n")
        return
    now = name in ("*", operation) and _seen[name] == int(number)
    lasts = name in ("*", operation) and _seen[name] > int(number) and operation in _LASTING.get(fault, ())
    if not now and not lasts:
        return
    half()
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    _fail(_ERRORS[fault], path)


def _fail(number: int, path: str | Path) -> NoReturn:
    raise OSError(number, os.strerror(number), str(path))


class _File(io.FileIO):
    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        _reached("write", str(self.name), lambda: super(_File, self).write(view[: len(view) // 2]))
        return super().write(view) or 0


def create(path: Path, mode: str = "w") -> io.BufferedWriter:
    """Open a file to write bytes to it; with mode `"a"`, after those that are there."""
    _reached("create", path)
    return io.BufferedWriter(_File(path, mode), _BUFFER)


def write(path: Path, data: bytes) -> None:
    """Write a whole file."""
    with create(path) as file:
        file.write(data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, keys in the order given."""
    write(path, encode_json(value))


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Return the bytes that `write_json` writes."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, outlast a power cut."""
    _reached("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` all that is in a folder, and the folder."""
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)


def mkdir(path: Path, *, parents: bool = False, exist_ok: bool = False) -> None:
    """Make a folder."""
    if not (exist_ok and path.is_dir()):
        _reached("mkdir", path)
        path.mkdir(parents=parents, exist_ok=exist_ok)


def link(source: Path, target: Path) -> None:
    """Have the file under another name, too: the same where that can be, else a copy."""
    _reached("link", target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def rename(source: Path, target: Path) -> None:
    """Give a file or a folder another name, at once; a file that has it already is replaced."""
    _reached("rename", target)
    source.replace(target)


def swap(one: Path, other: Path) -> bool:
    """Exchange the names of two folders, at once; `False` where the system or the disk has no such thing."""
    _reached("swap", other)
    exchange = _renameat2()
    if exchange is None:
        return False
    here, exchanged = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(exchange(here, os.fsencode(one), here, os.fsencode(other), exchanged) == 0)


@cache
def _renameat2() -> Any:
    return getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None


def remove(path: Path) -> None:
    """Remove a file, or a folder and all that is in it; what is not there, or cannot be removed, is no fault."""
    try:
        _reached("remove", path)
    except OSError:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink()
        except OSError:
            return


def read_regular_file(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: it cannot be read, or is something else: to read a pipe, or `/dev/zero`, may never end.
    """
    _check_regular(path)
    return path.read_bytes()


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def sha256_of_file(path: str | Path, start: int = 0, end: int | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal; or of the bytes from `start` to the end of `end`'s line."""
    # Faster hashes exist, but two files can be made that have the same, and one would be built for the other.
    found = hashlib.sha256()
    _check_regular(Path(path))
    with Path(path).open("rb") as file:
        left = sys.maxsize if end is None else end - file.seek(start)
        last = b"\n"
        while part := file.read(min(1 << 22, left)):
            found.update(part)
            left, last = left - len(part), part[-1:]
        while end is not None and last != b"\n" and (part := file.readline(1 << 22)):
            found.update(part)
            last = part[-1:]
    return found.hexdigest()


def hash_bytes(content: bytes) -> str:
    """Return the first 128 bits of the SHA-256 of `content`, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()[:32]


def cache_root() -> Path | None:
    """Return the folder of what is remembered from run to run; `None` where there shall be none, or no place for it."""
    given = os.environ.get("FTDATA_CACHE")
    if given is not None:
        return None if given.lower() in ("", "0", "off", "false", "no") else Path(given).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftdata"
    except RuntimeError:
        # No home, and a user that is not known, as in many containers.
        return None
