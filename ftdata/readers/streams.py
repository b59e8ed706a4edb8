"""Bytes from anywhere: opened, decompressed and brought to UTF-8, in bounded memory.

    path or URL ──> bytes ──> decompressed ──> UTF-8

What a file is packed in is seen from its first bytes, never from its name.
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
"""Bytes that are read at once."""

MAX_RATIO, FREE = 200, 1 << 30
"""How many times its size a packed file may become, once it is more than `FREE` bytes."""

MAX_XZ_MEMORY = 128 << 20
"""Bytes that unpacking an xz file may take: `xz -9` needs 65 MiB, and a file may ask for gigabytes."""

MAX_REPEATED, FREE_REPEATED = 1000, 16 << 20
"""How many times the size of a file its values may become, once they are more than `FREE_REPEATED` bytes, where a value
stands in the file once and is repeated: a long system prompt in every row is no bomb."""

MAX_LINE = 64 << 20
"""Bytes that a row may have; longer ones are rejected, since one would fill the memory of every later stage."""

STDIN = "-"

_PACKED = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_UTF8_BOM = codecs.BOM_UTF8
# The longer first: a UTF-32 mark begins with a UTF-16 one.
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Which of a text's first four bytes are zero, where it has no mark (RFC 4627, 3).
_ZEROS = {
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}


@dataclass(frozen=True, slots=True)
class Input:
    """A file, wherever it lies. Picklable: it is opened where it is read.

    `path` is a local path, `-` for standard input, or a URL; `encoding` that of a text without a byte order mark. With
    `streaming`, files of the hub are read from there, and not downloaded first. With a `span`, no more is read than a
    part of it: of lines those that begin from the one byte on and before the other, of Parquet such row groups.
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
                raise UsageError("encoding", f"no encoding is called {self.encoding!r}", hint="e.g. cp1252") from None

    @property
    def suffix(self) -> str:
        """What the name says that the file is: its last suffix in lower case, but for that of a packed file."""
        name = self.path.split("?", 1)[0] if is_url(self.path) else self.path
        suffixes = [suffix[1:].lower() for suffix in PurePosixPath(name).suffixes]
        while suffixes and suffixes[-1] in {*_PACKED.values(), "gzip", "zstd"}:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""

    def open(self) -> io.BufferedReader:
        """Open the file as it is.

        Raises:
            UsageError: it is not there.
            MissingDependency: its kind of place needs a package that is not installed.
            StorageError: it cannot be opened.
            HubError: it lies on a network that fails again and again.
        """
        try:
            if self.path == STDIN:
                return file_from_chunks(_at_least(8, _read(sys.stdin.buffer)))
            if not is_url(self.path):
                return cast(io.BufferedReader, Path(self.path).open("rb", buffering=CHUNK))
            if is_hub(self.path) and not self.streaming:
                return cast(io.BufferedReader, HubFile.at(self.path).local().open("rb", buffering=CHUNK))
            return open_remote(self.path)
        except FileNotFoundError:
            raise UsageError("file_not_found", "is not there", where=self.path) from None
        except OSError as error:
            if isinstance(error, FtdataError):
                raise
            raise StorageError("unreadable", error.strerror or str(error), where=self.path) from None

    def text(self) -> io.BufferedReader:
        """Open the file decompressed and in UTF-8; a UTF-8 byte order mark stays.

        Where the text is not in its encoding, lone surrogates come through: whoever reads the line refuses it.

        Raises:
            InputRefused: while reading: the file is cut off or damaged, or grows without bounds.
        """
        file = self.open()
        if packing := detect_compression(_head(file)):
            file = file_from_chunks(_unpacked(file, packing, self.path))
        encoding = _encoding(_head(file), self.encoding)
        return file_from_chunks(_decoded(file, encoding, self.path)) if encoding else file

    def is_plain(self, head: bytes) -> bool:
        """Whether a file that begins so is UTF-8 as it stands."""
        return detect_compression(head) is None and _encoding(head, self.encoding) is None


def detect_compression(head: bytes) -> str | None:
    """Return what a file that begins so is packed in."""
    # Frames to be skipped may come first (zstd, 3.1.2).
    if len(head) >= 4 and head[0] & 0xF0 == 0x50 and head[1:4] == b"\x2a\x4d\x18":
        return "zst"
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)


def is_url(path: str) -> bool:
    """Whether this names a place by its protocol."""
    return "://" in path


def is_object_store(path: str) -> bool:
    """Whether this names a place in an object store, or another file system elsewhere: no page, and not the hub."""
    return is_url(path) and not is_hub(path) and not path.startswith(("http://", "https://"))


def prepend(head: bytes, rest: Generator[bytes]) -> Generator[bytes]:
    """Yield `head`, and then the rest."""
    yield head
    yield from rest


def prepend_to_file(head: bytes, rest: BinaryIO) -> io.BufferedReader:
    """Return a file of what was read of it already and of the rest."""
    return file_from_chunks(prepend(head, read_chunks(rest)))


def file_from_chunks(parts: Generator[bytes]) -> io.BufferedReader:
    """Return chunks of bytes as a file."""
    return io.BufferedReader(_Chunks(parts), CHUNK)


def read_chunks(file: BinaryIO) -> Generator[bytes]:
    """Yield what is left of a file, `CHUNK` bytes or fewer at a time, and close it."""
    with file:
        yield from _read(file)


def _read(file: BinaryIO, size: int = CHUNK) -> Generator[bytes]:
    read = getattr(file, "read1", file.read)
    while chunk := read(size):
        yield chunk


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, parts: Generator[bytes]) -> None:
        self._parts, self._rest = parts, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = memoryview(part)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._parts.close()
        super().close()


def _at_least(size: int, parts: Generator[bytes]) -> Generator[bytes]:
    """Yield parts, the first of which is not shorter, if there is so much: what a pipe holds is told by it."""
    first = b""
    while len(first) < size and (part := next(parts, b"")):
        first += part
    yield first
    yield from parts


def _head(file: io.BufferedReader) -> bytes:
    return file.peek(8)[:8]


def _unpacked(file: BinaryIO, packing: str, path: str) -> Generator[bytes]:
    packed = plain = 0

    def counted() -> Generator[bytes]:
        nonlocal packed
        with file:
            # Little at once: what was read counts as unpacked.
            for chunk in _read(file, 1 << 16):
                packed += len(chunk)
                yield chunk

    try:
        for chunk in read_chunks(_opened(file_from_chunks(counted()), packing)):
            plain += len(chunk)
            if plain > FREE and plain > MAX_RATIO * packed:
                raise expansion_error(plain, packed, path)
            yield chunk
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if "Memory usage limit" in str(error):
            found = f"the xz file needs more than {MAX_XZ_MEMORY:,} bytes of memory to unpack"
            raise InputRefused(
                "expansion", found, where=path, hint="unpack it yourself, or pack it with xz -9"
            ) from None
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        fault = "truncated: it ends" if cut else "corrupt"
        raise InputRefused(
            "partial_file" if cut else "damaged_file",
            f"the {packing} file is {fault} after {plain:,} bytes of text ({error})",
            where=path,
            hint="copy or download it again",
        ) from None


def expansion_error(
    plain: int, packed: int, path: str, ratio: int = MAX_RATIO, hint: str = "unpack it yourself if that is right"
) -> InputRefused:
    """Return the refusal of a file that becomes far more than it is."""
    found = f"becomes more than {ratio:,} times its size: {plain:,} bytes out of {packed:,}"
    return InputRefused("expansion", found, where=path, hint=hint)


def _opened(file: io.BufferedReader, packing: str) -> BinaryIO:
    if packing == "gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if packing in ("bz2", "xz"):
        new = bz2.BZ2Decompressor if packing == "bz2" else partial(lzma.LZMADecompressor, memlimit=MAX_XZ_MEMORY)
        return file_from_chunks(_concatenated(file, new))
    import pyarrow as pa

    return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))


def _concatenated(file: BinaryIO, new: Callable[[], Any]) -> Generator[bytes]:
    """Yield what one packed stream after another holds; what is no stream after one is damage."""
    unpacker = new()
    for chunk in read_chunks(file):
        rest = chunk
        while rest or not (unpacker.eof or unpacker.needs_input):
            if unpacker.eof:
                # Streams may be padded with zeros (xz, 2.2).
                rest = rest.lstrip(b"\0")
                unpacker = new() if rest else unpacker
                if not rest:
                    break
            yield unpacker.decompress(rest, CHUNK)
            rest = unpacker.unused_data
    if not unpacker.eof:
        raise EOFError("it ends before the end of the stream")


def _encoding(head: bytes, given: str | None) -> str | None:
    """Return the encoding of a text that begins so, or `None` for UTF-8."""
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            return name
    if len(head) >= 4 and (name := _ZEROS.get((head[0] == 0, head[1] == 0, head[2] == 0, head[3] == 0), "")):
        return name
    return (
        None
        if given is None or codecs.lookup(given).name in ("utf-8", "utf-8-sig") or head.startswith(_UTF8_BOM)
        else given
    )


def _decoded(file: BinaryIO, encoding: str, path: str) -> Generator[bytes]:
    # What is not text in this encoding comes out as halves of characters, and is refused with its line.
    errors = "surrogatepass" if encoding.startswith("utf-") else "surrogateescape"
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    try:
        for chunk in read_chunks(file):
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise InputRefused("encoding", f"is not {encoding} text: {error}", where=path) from None
