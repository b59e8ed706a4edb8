"""Remote files: opened through fsspec, and read on from the same byte where the connection breaks."""

from __future__ import annotations

import inspect
import io
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ftdata.errors import FtdataError, HubError, InputRefused, MissingDependency, UsageError

Result = TypeVar("Result")

TRIES, PAUSE = 5, 1.0
"""How often we ask before we give up, and the seconds after the first failure; they double each time."""

_LASTING = (InputRefused, ImportError, ValueError, FileNotFoundError, PermissionError, NotImplementedError)
_STAMP = ("etag", "size", "last-modified", "lastmodified", "mtime", "md5hash")
_NOBODY = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError")
_CONTENT = ("etag", "md5hash", "crc32c", "generation", "content_md5", "version_id")


def with_retries(
    ask: Callable[[], Result], passing: tuple[type[Exception], ...], lasting: tuple[type[Exception], ...]
) -> Result:
    """Return what `ask` does; it is asked again after failures that pass, `TRIES` times in all.

    Args:
        ask: what is done.
        passing: errors that may pass, unless a server has answered that its refusal is final.
        lasting: those that do not, where they are what the others come from.

    Raises:
        Exception: what the last try raised.
    """
    for number in range(TRIES - 1):
        try:
            return ask()
        except passing as error:
            status = http_status(error)
            final = status is not None and status < 500 and status not in (408, 425, 429)
            if final or isinstance(_root(error), lasting):
                raise
            time.sleep(max(PAUSE * 2**number, _retry_after(error)))
    return ask()


def _root(error: BaseException) -> BaseException:
    return _root(error.__cause__) if error.__cause__ else error


def http_status(error: BaseException) -> int | None:
    """Return the status that a server answered; a client's own errors have it in their cause."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None) or getattr(seen, "status", None)
        if isinstance(status, int):
            return status
        seen = seen.__cause__ or seen.__context__
    return None


def _retry_after(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", error), "headers", None) or {}
    try:
        return min(float(headers.get("Retry-After", 0)), 60.0)
    except ValueError:
        return 0.0


def open_remote(url: str) -> io.BufferedReader:
    """Open the file at a URL that fsspec knows; it can be sought in where its server sends parts.

    Raises:
        UsageError: it is not there, or the protocol is unknown.
        MissingDependency: the protocol needs a package that is not installed.
        HubError: also while reading: it cannot be had, asked again and again.
        InputRefused: while reading: it has changed meanwhile.
    """
    return io.BufferedReader(_RemoteFile(url), 1 << 20)


def list_url(url: str) -> tuple[dict[str, int], str | None]:
    """Return the files that a URL stands for: itself, or those of a pattern or in a folder, and then the folder.

    With each goes its size in bytes, 0 where the place does not say.

    Raises:
        UsageError: there is none.
        HubError: the place cannot be looked at, asked again and again.
    """
    if url.startswith(("http://", "https://")):
        return {url: 0}, None
    return _asked(url, lambda: _listed(url))


def list_sizes(url: str) -> dict[str, int]:
    """Return the bytes of each file in a folder, by its path in it, as the place says now; none where there is none.

    Raises:
        UsageError: the protocol is unknown.
        HubError: the place cannot be looked at, asked again and again.
    """

    def ask() -> dict[str, int]:
        filesystem, path = _place(url)
        try:
            found = filesystem.find(path, detail=True)
        except FileNotFoundError:
            return {}
        home = str(filesystem._strip_protocol(path)).rstrip("/") + "/"
        return {name.removeprefix(home): int(about["size"]) for name, about in found.items()}

    return _asked(url, ask)


def remote_version(url: str) -> dict[str, str] | None:
    """Return what tells the content of a file from every other; `None` where the place does not say.

    Raises:
        UsageError: it is not there.
        HubError: the place cannot be looked at, asked again and again.
    """

    def ask() -> dict[str, Any]:
        filesystem, path = _place(url)
        return dict(filesystem.info(path))

    about = {name.lower(): str(value) for name, value in _asked(url, ask).items() if value is not None}
    known = {name: about[name] for name in _CONTENT if name in about}
    return {**known, "size": about["size"]} if known and "size" in about else None


def upload_file(file: Path, url: str, *, anew: bool = False) -> bool:
    """Put a file of this machine at a URL; `anew`: only where there is none, and return whether that was so.

    Where a place cannot be asked for the two together (S3 can), it is asked before.

    Raises:
        UsageError: there is no such place, or the protocol is unknown.
        HubError: the place refuses, or fails again and again.
    """

    def ask() -> bool:
        filesystem, path = _place(url)
        if anew and filesystem.exists(path):
            return False
        known = "mode" in inspect.signature(filesystem.put_file).parameters
        try:
            filesystem.put_file(str(file), path, **({"mode": "create"} if anew and known else {}))
        except FileExistsError:
            return False
        return True

    return _asked(url, ask)


def remove_remote_file(url: str) -> None:
    """Remove a file at a URL.

    Raises:
        HubError: the place refuses, or fails again and again.
    """

    def ask() -> None:
        filesystem, path = _place(url)
        filesystem.rm_file(path)

    _asked(url, ask)


def _place(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, which remembers nothing of before, and the path in it."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url, **_options(url))
    filesystem.invalidate_cache()
    return filesystem, path


def _listed(url: str) -> tuple[dict[str, int], str | None]:
    import fsspec

    filesystem, path = _place(url)
    folder = None
    if fsspec.core.has_magic(path):
        found = filesystem.glob(path, detail=True)
    elif filesystem.isdir(path):
        found, folder = filesystem.find(path, detail=True), str(filesystem.unstrip_protocol(path)).rstrip("/")
    else:
        found = {path: filesystem.info(path)}
    if not found:
        raise FileNotFoundError(url)
    return {str(filesystem.unstrip_protocol(one)): int(found[one].get("size") or 0) for one in sorted(found)}, folder


class _RemoteFile(io.RawIOBase):
    """A file that fsspec opens. It is the same to its end: what changes while it is read is refused."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0
        self._file: Any = None
        self._whole = False
        self._stamp = _asked(url, self._open)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return getattr(self._file, "size", None) is not None

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation("seek")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = _asked(self._url, lambda: self._read(len(buffer)))
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        if self._file is not None:
            with suppress(Exception):  # (what was read is whole, whatever a file system says at the end)
                self._file.close()
        super().close()

    def _open(self) -> dict[str, Any]:
        """Open the file anew, and return what tells its versions apart."""
        filesystem, path = _place(self._url)
        info = filesystem.info(path)
        self._file = filesystem.open(path, "rb", **({"block_size": 0} if self._whole else {}))
        return {name.lower(): value for name, value in info.items() if name.lower() in _STAMP}

    def _read(self, size: int) -> bytes:
        try:
            if self._file.closed:
                self._check()
            if self.seekable():
                self._file.seek(self._at)
            else:
                while (ahead := self._at - self._file.tell()) > 0 and self._file.read(min(ahead, 1 << 20)):
                    pass
            part = self._file.read(size)
        except ValueError as error:
            if self._whole or "range" not in str(error):
                raise
            # A server that does not send parts of a file sends all of it.
            self._whole = True
            self._file.close()
            return self._read(size)
        except Exception:
            with suppress(Exception):  # (the first error is raised)
                self._file.close()
            raise
        if size and not part:
            self._check()
            self._file.close()
        return bytes(part)

    def _check(self) -> None:
        before, now = self._stamp, self._open()
        # Where servers have stamps that differ from answer to answer, they say nothing.
        if before != now and (now.get("size") != before.get("size") or now == self._open()):
            hint = "read it again, or copy it first"
            raise InputRefused("file_changed", "has changed while it was read", where=self._url, hint=hint)


def _asked(url: str, ask: Callable[[], Result]) -> Result:
    def known() -> Result:
        try:
            return ask()
        except Exception as error:
            # The errors of each store are its own, and it need not be installed.
            if type(_root(error)).__name__ in _NOBODY:
                raise PermissionError(str(_root(error)) or "it takes credentials") from None
            raise

    try:
        return with_retries(known, (Exception,), _LASTING)
    except InputRefused:
        raise
    except Exception as error:  # noqa: BLE001  (every file system has errors of its own)
        raise _told(url, _root(error), http_status(error)) from None


def _told(url: str, error: BaseException, status: int | None) -> FtdataError:
    reason = str(error) or type(error).__name__
    if isinstance(error, ImportError):
        scheme = url.partition("://")[0]
        hint = f"pip install 'ftdata[{scheme}]'" if scheme in {"s3", "gs"} else "install what it names"
        return MissingDependency("no_filesystem", reason, where=url, hint=hint)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return UsageError("file_not_found", "is not there", where=url)
    if isinstance(error, ValueError):
        return UsageError("unknown_protocol", reason, where=url)
    if isinstance(error, PermissionError):
        hint = "log in, as the tools of that store do: its environment variables, or its file of credentials"
        return HubError("credentials", reason, where=url, hint=hint)
    found = f"the server answers {status}" if status else f"cannot be read, {TRIES} times"
    return HubError("network", f"{found}: {reason}", where=url, hint="check the address, or try again later")


def _options(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    # Its own limit is five minutes for a whole file.
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
