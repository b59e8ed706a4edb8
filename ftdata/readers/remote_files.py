"""Read, list, upload and remove remote files through fsspec. Reading resumes after a connection failure."""

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
"""Number of attempts, and the seconds to wait after the first failure. The wait doubles after each failure."""

_PERMANENT_ERRORS = (InputRefused, ImportError, ValueError, FileNotFoundError, PermissionError, NotImplementedError)
_VERSION_KEYS = ("etag", "size", "last-modified", "lastmodified", "mtime", "md5hash")
_CREDENTIAL_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError")
_CONTENT_KEYS = ("etag", "md5hash", "crc32c", "generation", "content_md5", "version_id")


def with_retries(
    request: Callable[[], Result],
    transient_errors: tuple[type[Exception], ...],
    permanent_errors: tuple[type[Exception], ...],
) -> Result:
    """Call `request`, and return its result. After a transient failure, try again. Make at most `TRIES` attempts.

    Args:
        request: the function to call.
        transient_errors: exceptions after which the request is repeated, unless the server's status is permanent.
        permanent_errors: exceptions after which the request is not repeated, even if they are only the root cause.

    Raises:
        Exception: The exception of the last attempt.
    """
    for number in range(TRIES - 1):
        try:
            return request()
        except transient_errors as error:
            status = http_status(error)
            is_permanent = status is not None and status < 500 and status not in (408, 425, 429)
            if is_permanent or isinstance(_root_cause(error), permanent_errors):
                raise
            time.sleep(max(PAUSE * 2**number, _retry_after(error)))
    return request()


def _root_cause(error: BaseException) -> BaseException:
    return _root_cause(error.__cause__) if error.__cause__ else error


def http_status(error: BaseException) -> int | None:
    """Find the HTTP status code of an exception or of its causes. Return `None` if no exception has a status code."""
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None) or getattr(cause, "status", None)
        if isinstance(status, int):
            return status
        cause = cause.__cause__ or cause.__context__
    return None


def _retry_after(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", error), "headers", None) or {}
    try:
        return min(float(headers.get("Retry-After", 0)), 60.0)
    except ValueError:
        return 0.0


def open_remote(url: str) -> io.BufferedReader:
    """Open a remote file through fsspec. The file is seekable if the server supports range requests.

    Raises:
        UsageError: The file does not exist, or the protocol is unknown.
        MissingDependency: The protocol needs a package that is not installed.
        HubError: The server fails repeatedly. Also raised while reading.
        InputRefused: While reading: the file changed.
    """
    return io.BufferedReader(_RemoteFile(url), 1 << 20)


def list_url(url: str) -> tuple[dict[str, int], str | None]:
    """List the remote files at a URL. The URL can be a file, a folder or a glob.

    Returns:
        The size in bytes of each file by its URL, 0 if it is unknown; and the URL of the folder, `None` for a file or a
        glob.

    Raises:
        UsageError: No file matches.
        HubError: The server fails repeatedly.
    """
    if url.startswith(("http://", "https://")):
        return {url: 0}, None
    return _call_filesystem(url, _list_files)


def list_sizes(url: str) -> dict[str, int]:
    """Return a mapping from the relative path of each file in a remote folder to its size in bytes.

    If the folder does not exist, return an empty mapping.

    Raises:
        UsageError: The protocol is unknown.
        HubError: The server fails repeatedly.
    """

    def find_sizes(filesystem: Any, path: str) -> dict[str, int]:
        try:
            files = filesystem.find(path, detail=True)
        except FileNotFoundError:
            return {}
        root = str(filesystem._strip_protocol(path)).rstrip("/") + "/"
        return {name.removeprefix(root): int(info["size"]) for name, info in files.items()}

    return _call_filesystem(url, find_sizes)


def remote_version(url: str) -> dict[str, str] | None:
    """Return metadata that identify the content of a remote file, such as its ETag and size.

    Return `None` if the server does not provide such metadata.

    Raises:
        UsageError: The file does not exist.
        HubError: The server fails repeatedly.
    """
    metadata = _call_filesystem(url, lambda filesystem, path: dict(filesystem.info(path)))
    info = {name.lower(): str(value) for name, value in metadata.items() if value is not None}
    identifiers = {name: info[name] for name in _CONTENT_KEYS if name in info}
    return {**identifiers, "size": info["size"]} if identifiers and "size" in info else None


def upload_file(file: Path, url: str, *, anew: bool = False) -> bool:
    """Upload a local file.

    Args:
        file: the local file.
        url: URL to upload to.
        anew: upload only if the URL does not exist yet. On S3, the check and the upload are a single atomic request;
            on other file systems, the check comes first.

    Returns:
        Whether the file was uploaded.

    Raises:
        UsageError: The bucket or folder does not exist, or the protocol is unknown.
        HubError: The server rejects the request, or fails repeatedly.
    """

    def put(filesystem: Any, path: str) -> bool:
        if anew and filesystem.exists(path):
            return False
        has_mode = "mode" in inspect.signature(filesystem.put_file).parameters
        try:
            filesystem.put_file(str(file), path, **({"mode": "create"} if anew and has_mode else {}))
        except FileExistsError:
            return False
        return True

    return _call_filesystem(url, put)


def remove_remote_file(url: str) -> None:
    """Remove a remote file.

    Raises:
        HubError: The server rejects the request, or fails repeatedly.
    """
    _call_filesystem(url, lambda filesystem, path: filesystem.rm_file(path))


def _call_filesystem(url: str, call: Callable[[Any, str], Result]) -> Result:
    """Call a function with the fsspec file system for a URL and the path inside it. Repeat it after failures."""
    return _request(url, lambda: call(*_open_filesystem(url)))


def _open_filesystem(url: str) -> tuple[Any, str]:
    """Clear the cache of the fsspec file system for a URL. Return the file system, and the path inside it."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url, **_filesystem_options(url))
    filesystem.invalidate_cache()
    return filesystem, path


def _list_files(filesystem: Any, path: str) -> tuple[dict[str, int], str | None]:
    import fsspec

    folder = None
    if fsspec.core.has_magic(path):
        files = filesystem.glob(path, detail=True)
    elif filesystem.isdir(path):
        files, folder = filesystem.find(path, detail=True), str(filesystem.unstrip_protocol(path)).rstrip("/")
    else:
        files = {path: filesystem.info(path)}
    if not files:
        raise FileNotFoundError(path)
    return {str(filesystem.unstrip_protocol(name)): int(files[name].get("size") or 0) for name in sorted(files)}, folder


class _RemoteFile(io.RawIOBase):
    """A read-only remote file. Reading raises an error if the file has changed since it was opened."""

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._file: Any = None
        self._without_ranges = False
        self._version = _request(url, self._open)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return getattr(self._file, "size", None) is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation("the remote file is not seekable")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = _request(self._url, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            with suppress(Exception):  # (the data was read completely, so an error of the file system is irrelevant)
                self._file.close()
        super().close()

    def _open(self) -> dict[str, Any]:
        """Open or reopen the remote file. Return metadata that identify the version of the file."""
        filesystem, path = _open_filesystem(self._url)
        info = filesystem.info(path)
        self._file = filesystem.open(path, "rb", **({"block_size": 0} if self._without_ranges else {}))
        return {name.lower(): value for name, value in info.items() if name.lower() in _VERSION_KEYS}

    def _read(self, size: int) -> bytes:
        try:
            if self._file.closed:
                self._check_version()
            if self.seekable():
                self._file.seek(self._position)
            else:
                while (ahead := self._position - self._file.tell()) > 0 and self._file.read(min(ahead, 1 << 20)):
                    pass
            data = self._file.read(size)
        except ValueError as error:
            if self._without_ranges or "range" not in str(error):
                raise
            # The server does not support range requests, so the complete file is requested.
            self._without_ranges = True
            self._file.close()
            return self._read(size)
        except Exception:
            with suppress(Exception):  # (the first error is raised)
                self._file.close()
            raise
        if size and not data:
            self._check_version()
            self._file.close()
        return bytes(data)

    def _check_version(self) -> None:
        before, now = self._version, self._open()
        # Metadata that differ between two consecutive requests do not identify a version.
        if before != now and (now.get("size") != before.get("size") or now == self._open()):
            hint = "read it again, or copy it first"
            raise InputRefused("file_changed", "the file changed while it was being read", where=self._url, hint=hint)


def _request(url: str, request: Callable[[], Result]) -> Result:
    def translate_errors() -> Result:
        try:
            return request()
        except Exception as error:
            # Each store has its own exception classes, and its package may not be installed.
            if type(_root_cause(error)).__name__ in _CREDENTIAL_ERRORS:
                raise PermissionError(str(_root_cause(error)) or "credentials are required") from None
            raise

    try:
        return with_retries(translate_errors, (Exception,), _PERMANENT_ERRORS)
    except InputRefused:
        raise
    except Exception as error:  # noqa: BLE001  (every file system has its own exception classes)
        raise _translate_error(url, _root_cause(error), http_status(error)) from None


def _translate_error(url: str, error: BaseException, status: int | None) -> FtdataError:
    reason = str(error) or type(error).__name__
    if isinstance(error, ImportError):
        scheme = url.partition("://")[0]
        hint = f"pip install 'ftdata[{scheme}]'" if scheme in {"s3", "gs"} else "install the package"
        return MissingDependency("no_filesystem", reason, where=url, hint=hint)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return UsageError("file_not_found", "the file does not exist", where=url)
    if isinstance(error, ValueError):
        return UsageError("unknown_protocol", reason, where=url)
    if isinstance(error, PermissionError):
        hint = "set the environment variables or the credentials file that the tools of this store use"
        return HubError("credentials", reason, where=url, hint=hint)
    message = f"the server answered with status {status}" if status else f"reading failed {TRIES} times"
    return HubError("network", f"{message}: {reason}", where=url, hint="check the address, or try again later")


def _filesystem_options(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    # By default, aiohttp limits the time for a complete file to five minutes.
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
