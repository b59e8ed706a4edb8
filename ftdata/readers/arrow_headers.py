"""Read batch sizes from Arrow message headers, so that huge batches are refused before pyarrow decompresses them.

A compressed batch of a few kilobytes may expand to gigabytes, and pyarrow decompresses a batch completely. The
uncompressed length of a buffer is stored in front of the buffer, and the number of values in the metadata of the batch
(Arrow columnar format, "Serialization and Interprocess Communication"). pyarrow exposes neither, so this module reads
both.
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
"""Bytes to which a batch of any size may expand. The complete batch is in memory."""
_FREE_ROWS, _MAX_ROWS = 1_000_000, 8
"""Rows that a file of any size may have, and rows per byte that a larger file may have."""
_FREE_VALUES, _MAX_VALUES = 8_000_000, 32
"""Values that a file of any size may have, and values per byte that a larger file may have. A value takes half a
microsecond to read. Pretokenized rows that repeat a long prompt have about ten values per byte."""
_MAX_EMPTY = 10_000
_FREE_METADATA, _METADATA_DIVISOR = 8 << 20, 10
"""Bytes of metadata that a file of any size may have, and the divisor for a larger file (a tenth of its size). Parsing
metadata takes forty times its size in memory."""


class Block(NamedTuple):
    """The position and size of an Arrow message in a file. A message contains a batch of rows or a column's dictionary.

    Attributes:
        offset: offset of the message in the file.
        metadata: size of the metadata in bytes, including the length prefix.
        body: size of the body in bytes.
    """

    offset: int
    metadata: int
    body: int


class ArrowMessage(NamedTuple):
    """The metadata of an Arrow message. The message contains a batch of rows or a column's dictionary.

    Attributes:
        kind: 2 for a dictionary, 3 for a batch of rows.
        body: size of the body in bytes.
        rows: number of rows in the batch, or of entries in the dictionary.
        values: number of values in the message.
        buffers: offset and length in bytes of each buffer in the body.
        compressed: whether the buffers are compressed.
    """

    kind: int
    body: int
    rows: int = 0
    values: int = 0
    buffers: tuple[tuple[int, int], ...] = ()
    compressed: bool = False


class TableLimits:
    """Limits on the number of rows, values and uncompressed bytes of a table. Larger files have higher limits.

    Attributes:
        packed: size of the file in bytes, or bytes read so far.
    """

    def __init__(self, file: Input, packed: int) -> None:
        self._file, self.packed = file, packed
        self._plain = self._rows = self._values = self._empty = 0

    def rows(self, rows: int, values: int) -> None:
        """Add `rows` and `values` to the totals, and check the totals against the limits.

        Raises:
            InputRefused: The table has more rows, values or empty batches than the limit for its file size.
        """
        self._rows += rows
        self._values += values
        for count, name, limit in (
            (self._empty, "empty batches", _MAX_EMPTY),
            (self._rows, "rows", max(_FREE_ROWS, _MAX_ROWS * self.packed)),
            (self._values, "values", max(_FREE_VALUES, _MAX_VALUES * self.packed)),
        ):
            if count > limit:
                message = f"has {count:,} {name} in {self.packed:,} bytes, expected at most {limit:,}"
                hint = "write the file again without empty rows and columns"
                raise InputRefused("expansion", message, where=self._file.path, hint=hint)

    def metadata(self, size: int) -> None:
        """Check that metadata of `size` bytes are neither larger than the file nor larger than the limit.

        Raises:
            InputRefused: The metadata are larger than the file or the limit.
        """
        if 0 < self.packed < size:
            error = ValueError(f"the file is truncated, expected {size:,} bytes of metadata")
            raise damaged_file_error(error, self._file, "Arrow")
        limit = max(_FREE_METADATA, self.packed // _METADATA_DIVISOR)
        if size > limit:
            message = f"has {size:,} bytes of metadata, expected at most {limit:,}"
            hint = "write the file again with fewer columns or longer row groups"
            raise InputRefused("expansion", message, where=self._file.path, hint=hint)

    def batch(self, message: ArrowMessage, plain: int) -> None:
        """Add a batch to the totals, and check the limits. `plain` is the uncompressed size of the batch in bytes.

        Raises:
            InputRefused: The batch, or the complete file, expands beyond the limit.
        """
        # The entries of a dictionary are not rows.
        self._empty += not message.rows
        self.rows(message.rows if message.kind == _RECORDS else 0, message.values)
        self._plain += plain
        if plain > max(MAX_BATCH, MAX_RATIO * message.body):
            raise expansion_error(plain, message.body, self._file.path)
        if self._plain > max(FREE, MAX_RATIO * self.packed):
            raise expansion_error(self._plain, self.packed, self._file.path)
        if plain > MAX_LINE * max(message.rows, 1):
            size = plain // max(message.rows, 1)
            reason = f"has rows of {size:,} bytes on average, expected at most {MAX_LINE:,}"
            raise InputRefused("row_too_long", reason, where=self._file.path, hint="split each row into several rows")


def check_stream(stream: io.BufferedReader, file: Input, packed: int | None) -> Generator[bytes]:
    """Yield the bytes of an Arrow stream. The size of each batch is checked before its body is yielded.

    Args:
        stream: the stream, at the beginning of a message.
        file: the input file, for errors.
        packed: size of the file in bytes; `None` if it is unknown.

    Raises:
        InputRefused: A batch, or the complete stream, expands beyond the limit.
    """
    limits, bytes_read = TableLimits(file, packed or 0), 0
    while True:
        head, size = _read_head(stream, limits)
        if not head:
            return
        metadata = stream.read(size)
        yield head + metadata
        if not size:
            return
        message = _parse_message(metadata, file)
        body = stream.read(message.body) if message.kind in (_DICTIONARY, _RECORDS) else b""
        bytes_read += len(head) + len(metadata) + len(body)
        if packed is None:
            limits.packed = bytes_read
        limits.batch(message, _plain_size(message, _read_from_bytes(body)))
        yield body


def check_ahead(stream: io.BufferedReader, file: Input, packed: int) -> None:
    """Check the size of every batch in a seekable Arrow stream.

    Raises:
        InputRefused: A batch, or the complete stream, expands beyond the limit, or the stream is damaged.
    """
    limits, position = TableLimits(file, packed), 0
    while True:
        stream.seek(position)
        head, size = _read_head(stream, limits)
        if not size:
            break
        message = _parse_message(stream.read(size), file)
        body_start = position + len(head) + size
        if message.kind in (_DICTIONARY, _RECORDS):
            limits.batch(message, _plain_size(message, _read_from_stream(stream, body_start)))
        position = body_start + message.body
        if position > packed:
            break
    stream.seek(0)


def check_blocks(stream: io.BufferedReader, file: Input, packed: int) -> None:
    """Check the size of every batch that the footer of an Arrow file lists.

    Raises:
        InputRefused: A batch, or the complete file, expands beyond the limit, or the file is damaged.
    """
    limits = TableLimits(file, packed)
    blocks = _read_footer(stream, file, packed)
    if len({block.offset for block in blocks}) < len(blocks):
        raise damaged_file_error(ValueError("the footer lists the same batch twice"), file, "Arrow")
    for block in blocks:
        stream.seek(block.offset)
        _, size = _read_head(stream, limits)
        message = _parse_message(stream.read(size), file)
        limits.batch(message, _plain_size(message, _read_from_stream(stream, block.offset + block.metadata)))
    stream.seek(0)


def _read_head(stream: io.BufferedReader, limits: TableLimits) -> tuple[bytes, int]:
    """Read the bytes before the metadata of a message. Return them, and the size of the metadata in bytes."""
    head = stream.read(4)
    if head == _CONTINUATION:
        head += stream.read(4)
    size = int.from_bytes(head[-4:], "little")
    limits.metadata(size)
    return head, size


def _read_from_stream(stream: io.BufferedReader, start: int) -> Callable[[int], bytes]:
    def read(offset: int) -> bytes:
        stream.seek(start + offset)
        return stream.read(8)

    return read


def _read_from_bytes(body: bytes) -> Callable[[int], bytes]:
    return lambda offset: body[offset : offset + 8]


def _plain_size(message: ArrowMessage, read: Callable[[int], bytes]) -> int:
    """Return the total size of a batch's buffers in bytes, after decompression.

    `read` returns the eight bytes at an offset in the body of the batch.
    """
    if not message.compressed:
        return sum(length for _, length in message.buffers)
    plain = 0
    for offset, length in message.buffers:
        if length:
            # A size of -1 means that the buffer is not compressed.
            size = int.from_bytes(read(offset), "little", signed=True)
            plain += size if size >= 0 else length
    return plain


def _read_footer(stream: io.BufferedReader, file: Input, packed: int) -> list[Block]:
    stream.seek(max(packed - 10, 0))
    size = int.from_bytes(stream.read(4), "little")
    if not 0 < size <= packed - 10:
        raise damaged_file_error(ValueError("the file is truncated: it has no footer"), file, "Arrow")
    stream.seek(packed - 10 - size)
    try:
        footer = _Table.root(stream.read(size))
        return [Block(*fields) for number in (2, 3) for fields in footer.structs(number, "<qi4xq")]
    except (struct.error, ValueError, IndexError) as error:
        raise damaged_file_error(error, file, "Arrow") from None


def _parse_message(metadata: bytes, file: Input) -> ArrowMessage:
    """Parse the metadata of an Arrow message.

    Raises:
        InputRefused: The metadata are damaged.
    """
    try:
        table = _Table.root(metadata)
        kind, body = table.number(1, "<B"), table.number(3, "<q")
        if body < 0:
            raise ValueError(f"the body size of a message is negative: {body}")
        batch = table.table(2)
        if batch is not None and kind == _DICTIONARY:
            batch = batch.table(1)
        if batch is None or kind not in (_DICTIONARY, _RECORDS):
            return ArrowMessage(kind, body)
        rows, lengths = batch.number(0, "<q"), [length for length, _ in batch.structs(1, "<qq")]
        buffers = tuple((offset, length) for offset, length in batch.structs(2, "<qq"))
        if min(rows, *lengths, *(length for _, length in buffers), 0) < 0:
            raise ValueError("the length of a batch, column or buffer is negative")
        return ArrowMessage(kind, body, rows, sum(lengths), buffers, batch.table(3) is not None)
    except (struct.error, ValueError, IndexError) as error:
        raise damaged_file_error(error, file, "Arrow") from None


class _Table(NamedTuple):
    """Gives access to the fields of a table in a FlatBuffer (https://flatbuffers.dev/internals/).

    Attributes:
        data: the bytes of the FlatBuffer.
        position: offset of the table in `data`.
    """

    data: bytes
    position: int

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, *struct.unpack_from("<I", data))

    def _field_position(self, number: int) -> int | None:
        """Return the offset of a field in `data`. Return `None` if the table does not have the field."""
        (distance,) = struct.unpack_from("<i", self.data, self.position)
        vtable = self.position - distance
        if not 0 <= vtable < len(self.data):
            raise ValueError("an offset in the metadata points outside the metadata")
        (size,) = struct.unpack_from("<H", self.data, vtable)
        entry = 4 + 2 * number
        if entry + 2 > size:
            return None
        (offset,) = struct.unpack_from("<H", self.data, vtable + entry)
        return self.position + offset if offset else None

    def number(self, number: int, form: str) -> int:
        """Return the value of a numeric field. Return 0 if the table does not have the field."""
        position = self._field_position(number)
        return 0 if position is None else int(struct.unpack_from(form, self.data, position)[0])

    def _follow_offset(self, number: int) -> int | None:
        position = self._field_position(number)
        return None if position is None else position + int(struct.unpack_from("<I", self.data, position)[0])

    def table(self, number: int) -> _Table | None:
        """Return the nested table in a field. Return `None` if the table does not have the field."""
        position = self._follow_offset(number)
        return None if position is None else _Table(self.data, position)

    def structs(self, number: int, form: str) -> Iterator[tuple[int, ...]]:
        """Yield the structs in a vector field as tuples. `form` is a format string of the `struct` module."""
        position = self._follow_offset(number)
        if position is None:
            return iter(())
        (count,) = struct.unpack_from("<I", self.data, position)
        size = struct.calcsize(form)
        vector = memoryview(self.data)[position + 4 : position + 4 + count * size]
        if len(vector) < count * size:
            raise ValueError("a list in the metadata is truncated")
        return struct.iter_unpack(form, vector)
