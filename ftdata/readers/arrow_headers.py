"""Arrow messages: what a file or stream says of its batches, read before anything of them is decompressed.

A compressed batch of a few kilobytes may become gigabytes, and pyarrow decompresses it as a whole. The length that each
of its buffers becomes stands in front of the buffer, and the number of its values in the metadata of the batch (Arrow
columnar format, "Serialization and Interprocess Communication"). pyarrow shows neither, so this module reads them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

from ftdata.errors import InputRefused
from ftdata.readers.streams import FREE, MAX_LINE, MAX_RATIO, Input, expansion_error
from ftdata.readers.table_checks import damaged_file_error

_CONTINUATION = b"\xff\xff\xff\xff"
_DICTIONARY, _RECORDS = 2, 3
MAX_BATCH = FREE // 4
"""Bytes that any batch may become: it is in memory as a whole."""
_FREE_ROWS, _MAX_ROWS = 1_000_000, 8
"""Rows that any file may have, and that a larger one may have for each of its bytes."""
_FREE_VALUES, _MAX_VALUES = 8_000_000, 32
"""Values that any file may have, and that a larger one may have for each of its bytes: each takes half a microsecond to
read. Rows of tokens that repeat a long prompt have some ten."""
_MOST_EMPTY = 10_000
_FREE_METADATA, _MOST_METADATA = 8 << 20, 10
"""Bytes of metadata that any file may have, and the part of a larger file that it may be (a tenth): to parse it takes
forty times its size."""


class Block(NamedTuple):
    """Where a message stands in a file."""

    offset: int
    metadata: int
    body: int


class ArrowMessage(NamedTuple):
    """What the metadata of a message says.

    Attributes:
        kind: 2 is a dictionary, 3 are rows.
        body: bytes of what follows.
        rows: how many rows (or entries of a dictionary) there are.
        values: how many values they have.
        buffers: offset and length of each buffer in the body.
        compressed: whether the buffers are.
    """

    kind: int
    body: int
    rows: int = 0
    values: int = 0
    buffers: tuple[tuple[int, int], ...] = ()
    compressed: bool = False


class TableLimits:
    """Counts what the batches of a table become.

    `packed` is the size of the file, or what was read of it so far.
    """

    def __init__(self, file: Input, packed: int) -> None:
        self._file, self.packed = file, packed
        self._plain = self._rows = self._values = self._empty = 0

    def rows(self, rows: int, values: int) -> None:
        """Count rows, and the values in them.

        Raises:
            InputRefused: there are far more than the file's size explains.
        """
        self._rows += rows
        self._values += values
        for count, name, most in (
            (self._empty, "empty batches", _MOST_EMPTY),
            (self._rows, "rows", max(_FREE_ROWS, _MAX_ROWS * self.packed)),
            (self._values, "values", max(_FREE_VALUES, _MAX_VALUES * self.packed)),
        ):
            if count > most:
                found = f"has {count:,} {name} in {self.packed:,} bytes, expected at most {most:,}"
                hint = "write it again, without empty rows and columns"
                raise InputRefused("expansion", found, where=self._file.path, hint=hint)

    def metadata(self, size: int) -> None:
        """Check the size of metadata.

        Raises:
            InputRefused: it is more than a file may have, or the file is cut off.
        """
        if 0 < self.packed < size:
            raise damaged_file_error(
                ValueError(f"it is cut off: it has no {size:,} bytes of metadata"), self._file, "Arrow"
            )
        most = max(_FREE_METADATA, self.packed // _MOST_METADATA)
        if size > most:
            found = f"has {size:,} bytes of metadata, expected at most {most:,}"
            hint = "write it again, with fewer columns, or longer row groups"
            raise InputRefused("expansion", found, where=self._file.path, hint=hint)

    def batch(self, message: ArrowMessage, plain: int) -> None:
        """Count a batch which becomes so many bytes.

        Raises:
            InputRefused: that is more than a batch, or a file, may become.
        """
        # What is in a dictionary is no row yet.
        self._empty += not message.rows
        self.rows(message.rows if message.kind == _RECORDS else 0, message.values)
        self._plain += plain
        if plain > max(MAX_BATCH, MAX_RATIO * message.body):
            raise expansion_error(plain, message.body, self._file.path)
        if self._plain > max(FREE, MAX_RATIO * self.packed):
            raise expansion_error(self._plain, self.packed, self._file.path)
        if plain > MAX_LINE * max(message.rows, 1):
            size = plain // max(message.rows, 1)
            found = f"has rows of {size:,} bytes and more, at most {MAX_LINE:,} are read"
            raise InputRefused("row_too_long", found, where=self._file.path, hint="make several rows of each")


def check_stream(stream: io.BufferedReader, file: Input, packed: int | None) -> Generator[bytes]:
    """Yield the bytes of a stream of messages, each batch only after it was counted.

    Args:
        stream: from the beginning of a message on.
        file: what is read.
        packed: the bytes of the file; `None` if they are not known.

    Raises:
        InputRefused: a batch, or all of them, become more than they may.
    """
    limits, seen = TableLimits(file, packed or 0), 0
    while head := stream.read(4):
        if head == _CONTINUATION:
            head += stream.read(4)
        size = int.from_bytes(head[-4:], "little")
        limits.metadata(size)
        metadata = stream.read(size)
        yield head + metadata
        if not size:
            return
        message = _message(metadata, file)
        body = stream.read(message.body) if message.kind in (_DICTIONARY, _RECORDS) else b""
        seen += len(head) + len(metadata) + len(body)
        if packed is None:
            limits.packed = seen
        limits.batch(message, _plain(message, _in(body)))
        yield body


def check_ahead(stream: io.BufferedReader, file: Input, packed: int) -> None:
    """Count all batches of a stream that can be read again.

    Raises:
        InputRefused: they become more than they may, or the stream is damaged.
    """
    limits, at = TableLimits(file, packed), 0
    while True:
        stream.seek(at)
        head = stream.read(4)
        head += stream.read(4) if head == _CONTINUATION else b""
        size = int.from_bytes(head[-4:], "little")
        if not size:
            break
        limits.metadata(size)
        message = _message(stream.read(size), file)
        begins = at + len(head) + size
        if message.kind in (_DICTIONARY, _RECORDS):
            limits.batch(message, _plain(message, _at(stream, begins)))
        at = begins + message.body
        if at > packed:
            break
    stream.seek(0)


def check_blocks(stream: io.BufferedReader, file: Input, packed: int) -> None:
    """Count all batches of a file, those that its footer names.

    Raises:
        InputRefused: they become more than they may, or the file is damaged.
    """
    limits = TableLimits(file, packed)
    blocks = _footer(stream, file, packed)
    if len({block.offset for block in blocks}) < len(blocks):
        raise damaged_file_error(ValueError("its footer names a batch twice"), file, "Arrow")
    for block in blocks:
        stream.seek(block.offset)
        head = stream.read(4)
        head += stream.read(4) if head == _CONTINUATION else b""
        size = int.from_bytes(head[-4:], "little")
        limits.metadata(size)
        message = _message(stream.read(size), file)
        limits.batch(message, _plain(message, _at(stream, block.offset + block.metadata)))
    stream.seek(0)


def _at(stream: io.BufferedReader, begins: int) -> Callable[[int], bytes]:
    def read(offset: int) -> bytes:
        stream.seek(begins + offset)
        return stream.read(8)

    return read


def _in(body: bytes) -> Callable[[int], bytes]:
    return lambda offset: body[offset : offset + 8]


def _plain(message: ArrowMessage, read: Callable[[int], bytes]) -> int:
    """Return how many bytes the buffers of a batch become; `read` returns eight bytes of its body."""
    if not message.compressed:
        return sum(length for _, length in message.buffers)
    plain = 0
    for offset, length in message.buffers:
        if length:
            # -1 says that the buffer is not compressed.
            size = int.from_bytes(read(offset), "little", signed=True)
            plain += size if size >= 0 else length
    return plain


def _footer(stream: io.BufferedReader, file: Input, packed: int) -> list[Block]:
    stream.seek(max(packed - 10, 0))
    size = int.from_bytes(stream.read(4), "little")
    if not 0 < size <= packed - 10:
        raise damaged_file_error(ValueError("it has no footer: it is cut off"), file, "Arrow")
    stream.seek(packed - 10 - size)
    try:
        footer = _Table.root(stream.read(size))
        return [Block(*found) for number in (2, 3) for found in footer.structs(number, "<qi4xq")]
    except (struct.error, ValueError, IndexError) as error:
        raise damaged_file_error(error, file, "Arrow") from None


def _message(metadata: bytes, file: Input) -> ArrowMessage:
    """Return what the metadata of a message says.

    Raises:
        InputRefused: it is damaged.
    """
    try:
        table = _Table.root(metadata)
        kind, body = table.number(1, "<B"), table.number(3, "<q")
        if body < 0:
            raise ValueError(f"a message has {body} bytes")
        batch = table.table(2)
        if batch is not None and kind == _DICTIONARY:
            batch = batch.table(1)
        if batch is None or kind not in (_DICTIONARY, _RECORDS):
            return ArrowMessage(kind, body)
        rows, lengths = batch.number(0, "<q"), [length for length, _ in batch.structs(1, "<qq")]
        buffers = tuple((offset, length) for offset, length in batch.structs(2, "<qq"))
        if min(rows, *lengths, *(length for _, length in buffers), 0) < 0:
            raise ValueError("a length in it is negative")
        return ArrowMessage(kind, body, rows, sum(lengths), buffers, batch.table(3) is not None)
    except (struct.error, ValueError, IndexError) as error:
        raise damaged_file_error(error, file, "Arrow") from None


class _Table(NamedTuple):
    """A table of a flatbuffer: https://flatbuffers.dev/internals/."""

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, *struct.unpack_from("<I", data))

    def _field(self, number: int) -> int | None:
        """Return where a field stands, if it is there."""
        (back,) = struct.unpack_from("<i", self.data, self.at)
        table = self.at - back
        if not 0 <= table < len(self.data):
            raise ValueError("a table of it is outside")
        (size,) = struct.unpack_from("<H", self.data, table)
        place = 4 + 2 * number
        if place + 2 > size:
            return None
        (offset,) = struct.unpack_from("<H", self.data, table + place)
        return self.at + offset if offset else None

    def number(self, number: int, form: str) -> int:
        """Return a number; 0 if it is not there."""
        at = self._field(number)
        return 0 if at is None else int(struct.unpack_from(form, self.data, at)[0])

    def _follow(self, number: int) -> int | None:
        at = self._field(number)
        return None if at is None else at + int(struct.unpack_from("<I", self.data, at)[0])

    def table(self, number: int) -> _Table | None:
        """Return a table in this one."""
        at = self._follow(number)
        return None if at is None else _Table(self.data, at)

    def structs(self, number: int, form: str) -> Iterator[tuple[int, ...]]:
        """Yield the structs of a vector."""
        at = self._follow(number)
        if at is None:
            return iter(())
        (count,) = struct.unpack_from("<I", self.data, at)
        size = struct.calcsize(form)
        part = memoryview(self.data)[at + 4 : at + 4 + count * size]
        if len(part) < count * size:
            raise ValueError("a list of it is cut off")
        return struct.iter_unpack(form, part)
