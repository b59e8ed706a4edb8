"""Record which builds this user made. Records are stored outside the builds, so downloaded builds cannot forge records.

    DIR/KEY     an empty file; KEY is the hash of the recorded content

DIR is `ftdata/records` in `XDG_STATE_HOME` or `~/.local/state`. The hashes in a build prove that it is undamaged, but
not who wrote it. A folder without a record is built again instead of being reused.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

_MAX_RECORDS = 20_000
"""If there are more records than this, the older half is removed."""


def add_record(kind: str, content: bytes) -> None:
    """Record that this user wrote `content`. If the record folder is not writable, do nothing."""
    with suppress(OSError):
        folder = _record_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_old_records(folder)
        (folder / _key(kind, content)).touch(mode=0o600)


def has_record(kind: str, content: bytes) -> bool:
    """Return whether `add_record` recorded `content`. If other users can write to the record folder, return `False`."""
    try:
        folder = _record_folder()
        status = folder.lstat()
        trusted = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        return trusted and stat.S_ISREG((folder / _key(kind, content)).lstat().st_mode)
    except OSError:
        return False


def remove_record(kind: str, content: bytes) -> None:
    """Remove the record of `content`, if it exists."""
    with suppress(OSError):
        (_record_folder() / _key(kind, content)).unlink()


def _record_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ftdata" / "records"
    except RuntimeError as error:
        # Path.home() fails if the user has no home directory, as in many containers.
        raise OSError(str(error)) from None


def _key(kind: str, content: bytes) -> str:
    return hashlib.blake2b(kind.encode() + b"\0" + content, digest_size=20).hexdigest()


def _remove_old_records(folder: Path) -> None:
    with os.scandir(folder) as entries:
        files = [file for file in entries if file.is_file(follow_symlinks=False)]
    if len(files) > _MAX_RECORDS:
        for file in sorted(files, key=lambda file: file.stat(follow_symlinks=False).st_mtime)[: len(files) // 2]:
            Path(file.path).unlink(missing_ok=True)
