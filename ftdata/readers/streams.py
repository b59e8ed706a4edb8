"""Open input files as UTF-8 byte streams. Compressed files are decompressed in bounded memory.

    path or URL ──> bytes ──> decompressed ──> UTF-8

The compression format is detected from the first bytes of a file, never from its name.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from ftdata.errors import FtdataError, InputRefused, StorageError, UsageError
from ftdata.readers.hub import HubFile, is_hub
from ftdata.readers.remote_files import open_remote

CHUNK = 1 << 20
"""Bytes per read."""

MAX_RATIO, FREE = 200, 1 << 30
"""Maximum ratio of decompressed to compressed size. Output of at most `FREE` bytes is exempt."""

MAX_XZ_MEMORY = 128 << 20
"""Bytes of memory that decompressing an xz file may need. `xz -9` needs 65 MiB; a hostile file may need gigabytes."""

MAX_REPEATED, FREE_REPEATED = 1000, 16 << 20
"""Maximum ratio of the size of the values to the size of the file, in formats that store a repeated value only once.
Values of at most `FREE_REPEATED` bytes are exempt. A long system prompt in every row is legitimate data."""

MAX_LINE = 64 << 20
"""Maximum size of a row in bytes. Longer rows are rejected, because a huge row would exhaust the memory of every later
stage."""

MAX_VALUES = 1 << 21
"""Maximum number of values in a row. In memory, a value takes up to 30 times the bytes that it takes in the file."""

STDIN = "-"

_COMPRESSIONS = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_UTF8_BOM = codecs.BOM_UTF8
# UTF-32 comes first, because the UTF-32-LE mark begins with the UTF-16-LE mark.
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# In text without a byte order mark, the zeros among the first four bytes identify the encoding (RFC 4627, section 3).
_ZEROS = {
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}


@dataclass(frozen=True, slots=True)
class Input:
    """A local or remote file, with the options for reading it. The object is picklable and holds no open file.

    Attributes:
        path: local path, URL, or `-` for standard input.
        encoding: encoding of text without a byte order mark; `None` for UTF-8.
        quoting: how quotes are read in CSV and TSV files, `csv` or `none`; `None` for automatic detection.
        streaming: whether a file on the Hub is read from there instead of being downloaded first.
        span: the part of the file to read: the lines that begin in a range of bytes, or a range of Parquet row groups.
            The end is exclusive.
    """

    path: str
    encoding: str | None = None
    quoting: str | None = None
    streaming: bool = False
    span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.encoding is not None:
            try:
                if not "a".encode(self.encoding):
                    raise LookupError
            except (LookupError, TypeError, ValueError, AssertionError):
                message = f"encoding is {self.encoding!r}, expected a text encoding that Python supports"
                raise UsageError("encoding", message, hint="e.g. cp1252") from None

    @property
    def suffix(self) -> str:
        """The last suffix of the file name, in lower case. Compression suffixes such as `.gz` are ignored."""
        name = self.path.split("?", 1)[0] if is_url(self.path) else self.path
        suffixes = [suffix[1:].lower() for suffix in PurePosixPath(name).suffixes]
        while suffixes and suffixes[-1] in {*_COMPRESSIONS.values(), "gzip", "zstd"}:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""

    def open(self) -> io.BufferedReader:
        """Open the file as raw bytes, without decompression.

        Raises:
            UsageError: The file does not exist.
            MissingDependency: The protocol of the URL needs a package that is not installed.
            StorageError: The file cannot be opened.
            HubError: The network or the Hub fails repeatedly.
        """
        try:
            if self.path == STDIN:
                return file_from_chunks(_join_first(8, _read(sys.stdin.buffer)))
            if not is_url(self.path):
                return cast(io.BufferedReader, Path(self.path).open("rb", buffering=CHUNK))
            if is_hub(self.path) and not self.streaming:
                return cast(io.BufferedReader, HubFile.from_url(self.path).download().open("rb", buffering=CHUNK))
            return open_remote(self.path)
        except FileNotFoundError:
            raise UsageError("file_not_found", "the file does not exist", where=self.path) from None
        except OSError as error:
            if isinstance(error, FtdataError):
                raise
            raise StorageError("unreadable", error.strerror or str(error), where=self.path) from None

    def text(self) -> io.BufferedReader:
        """Open the file, decompress it, and convert its text to UTF-8. A UTF-8 byte order mark is kept.

        Bytes that are invalid in the encoding of the file appear as lone surrogates, so that the reader can reject the
        row that contains them.

        Raises:
            InputRefused: While reading: the file is truncated or damaged, or expands beyond the limit.
        """
        file = self.open()
        if compression := detect_compression(_head(file)):
            file = file_from_chunks(_decompress(file, compression, self.path))
        encoding = _detect_encoding(_head(file), self.encoding)
        return file_from_chunks(_transcode(file, encoding, self.path)) if encoding else file

    def is_plain(self, head: bytes) -> bool:
        """Return whether the first bytes of a file indicate uncompressed UTF-8 text."""
        return detect_compression(head) is None and _detect_encoding(head, self.encoding) is None


def detect_compression(head: bytes) -> str | None:
    """Detect the compression format of a file by its first bytes. Return `None` if the file is uncompressed."""
    # Skippable frames may come before the data (RFC 8878, section 3.1.2).
    if len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18":
        return "zst"
    return next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)


def is_url(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def is_object_store(path: str) -> bool:
    """Return whether a path is a URL of a remote file system, such as S3. HTTP and Hub URLs are excluded."""
    return is_url(path) and not is_hub(path) and not path.startswith(("http://", "https://"))


def prepend(head: bytes, chunks: Generator[bytes]) -> Generator[bytes]:
    """Yield the bytes in `head`, then all bytes in `chunks`."""
    yield head
    yield from chunks


def prepend_to_file(head: bytes, file: BinaryIO) -> io.BufferedReader:
    """Return a file object that contains the bytes in `head`, followed by the unread content of `file`."""
    return file_from_chunks(prepend(head, read_chunks(file)))


def file_from_chunks(chunks: Generator[bytes]) -> io.BufferedReader:
    """Return a readable file object that contains the concatenated chunks."""
    return io.BufferedReader(_ChunkFile(chunks), CHUNK)


def read_chunks(file: BinaryIO) -> Generator[bytes]:
    """Yield the remaining content of a file in chunks of at most `CHUNK` bytes, then close the file."""
    with file:
        yield from _read(file)


def _read(file: BinaryIO, size: int = CHUNK) -> Generator[bytes]:
    read = getattr(file, "read1", file.read)
    while chunk := read(size):
        yield chunk


class _ChunkFile(io.RawIOBase):
    """A readable file object that contains concatenated chunks of bytes."""

    def __init__(self, chunks: Generator[bytes]) -> None:
        self._chunks, self._unread = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unread:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._unread = memoryview(chunk)
        size = min(len(buffer), len(self._unread))
        buffer[:size] = self._unread[:size]
        self._unread = self._unread[size:]
        return size

    def close(self) -> None:
        self._chunks.close()
        super().close()


def _join_first(size: int, chunks: Generator[bytes]) -> Generator[bytes]:
    """Concatenate the first chunks to a chunk of at least `size` bytes, and yield it. Yield all other chunks unchanged.

    A pipe may deliver fewer bytes at first than format detection needs.
    """
    first = b""
    while len(first) < size and (chunk := next(chunks, b"")):
        first += chunk
    yield first
    yield from chunks


def _head(file: io.BufferedReader) -> bytes:
    return file.peek(8)[:8]


def _decompress(file: BinaryIO, compression: str, path: str) -> Generator[bytes]:
    compressed_size = plain_size = 0

    def count_compressed() -> Generator[bytes]:
        nonlocal compressed_size
        with file:
            # Chunks are small, because all bytes that were read count as decompressed.
            for chunk in _read(file, 1 << 16):
                compressed_size += len(chunk)
                yield chunk

    try:
        for chunk in read_chunks(_open_decompressor(file_from_chunks(count_compressed()), compression)):
            plain_size += len(chunk)
            if plain_size > FREE and plain_size > MAX_RATIO * compressed_size:
                raise expansion_error(plain_size, compressed_size, path)
            yield chunk
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if "Memory usage limit" in str(error):
            message = f"decompressing the xz file needs more than {MAX_XZ_MEMORY:,} bytes of memory"
            hint = "decompress it yourself, or compress it with xz -9"
            raise InputRefused("expansion", message, where=path, hint=hint) from None
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        fault = "is truncated: it ends" if truncated else "is corrupt"
        message = f"the {compression} file {fault} after {plain_size:,} bytes of text ({error})"
        hint = "copy or download it again"
        raise InputRefused("partial_file" if truncated else "damaged_file", message, where=path, hint=hint) from None


def expansion_error(
    plain_size: int,
    compressed_size: int,
    path: str,
    ratio: int = MAX_RATIO,
    hint: str = "decompress it yourself if the size is correct",
) -> InputRefused:
    """Create the error for a file whose content is far larger in memory than in the file."""
    sizes = f"{compressed_size:,} to {plain_size:,} bytes or more"
    message = f"expands from {sizes}, expected at most {ratio:,} times its size"
    return InputRefused("expansion", message, where=path, hint=hint)


def _open_decompressor(file: io.BufferedReader, compression: str) -> BinaryIO:
    if compression == "gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if compression in ("bz2", "xz"):
        is_bz2 = compression == "bz2"
        new = bz2.BZ2Decompressor if is_bz2 else partial(lzma.LZMADecompressor, memlimit=MAX_XZ_MEMORY)
        return file_from_chunks(_decompress_streams(file, new))
    import pyarrow as pa

    return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))


def _decompress_streams(file: BinaryIO, new: Callable[[], Any]) -> Generator[bytes]:
    """Decompress a file of one or more compressed streams. Any other bytes after a stream cause an error."""
    decompressor = new()
    for chunk in read_chunks(file):
        unread = chunk
        while unread or not (decompressor.eof or decompressor.needs_input):
            if decompressor.eof:
                # Streams may be padded with zeros (.xz file format, section 2.2).
                unread = unread.lstrip(b"\0")
                decompressor = new() if unread else decompressor
                if not unread:
                    break
            yield decompressor.decompress(unread, CHUNK)
            unread = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError("the file ends inside a compressed stream")


def _detect_encoding(head: bytes, encoding: str | None) -> str | None:
    """Detect the encoding of a text by its first bytes. The default is `encoding`. Return `None` for UTF-8."""
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            return name
    if len(head) >= 4 and (name := _ZEROS.get((head[0] == 0, head[1] == 0, head[2] == 0, head[3] == 0), "")):
        return name
    is_utf8 = encoding is None or codecs.lookup(encoding).name in ("utf-8", "utf-8-sig") or head.startswith(_UTF8_BOM)
    return None if is_utf8 else encoding


def _transcode(file: BinaryIO, encoding: str, path: str) -> Generator[bytes]:
    # Invalid bytes become lone surrogates, so that only the row that contains them is rejected.
    errors = "surrogatepass" if encoding.startswith("utf-") else "surrogateescape"
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    try:
        for chunk in read_chunks(file):
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise InputRefused("encoding", f"the file is not {encoding} text: {error}", where=path) from None
