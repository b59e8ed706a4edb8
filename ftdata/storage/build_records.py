"""Records of what this user built, kept outside of every build, where a folder from elsewhere cannot forge them.

    DIR/KEY     an empty file; KEY is the hash of what is recorded

DIR is `ftdata/records` in `XDG_STATE_HOME` or `~/.local/state`. The hashes inside a build show that it is undamaged;
they do not show who wrote it. What is not recorded is built again instead of being reused.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

_MAX_RECORDS = 20_000
"""When there are more records than this, the older half is removed."""


def add_record(kind: str, content: bytes) -> None:
    """Record something; without a place for records, nothing is recorded."""
    folder = _folder()
    if folder is None:
        return
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _tidy(folder)
        (folder / _key(kind, content)).touch(mode=0o600)


def has_record(kind: str, content: bytes) -> bool:
    """Return whether this user recorded it. Records in a folder that others can write to do not count."""
    folder = _folder()
    if folder is None:
        return False
    try:
        status = folder.lstat()
        trusted = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        return trusted and stat.S_ISREG((folder / _key(kind, content)).lstat().st_mode)
    except OSError:
        return False


def remove_record(kind: str, content: bytes) -> None:
    """Remove a record, if there is one."""
    folder = _folder()
    if folder is not None:
        with suppress(OSError):
            (folder / _key(kind, content)).unlink()


def _folder() -> Path | None:
    with suppress(RuntimeError):
        # Path.home() fails where there is no home, as in many containers.
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ftdata" / "records"
    return None


def _key(kind: str, content: bytes) -> str:
    return hashlib.blake2b(kind.encode() + b"\0" + content, digest_size=20).hexdigest()


def _tidy(folder: Path) -> None:
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    if len(files) > _MAX_RECORDS:
        for entry in sorted(files, key=lambda entry: entry.stat(follow_symlinks=False).st_mtime)[: len(files) // 2]:
            Path(entry.path).unlink(missing_ok=True)
