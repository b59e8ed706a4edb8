"""Checks that all readers of tables share."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

from ftdata.errors import InputRefused
from ftdata.readers.streams import Input, detect_compression


def check_names(names: Sequence[str], file: Input) -> None:
    """Check that no two columns have the same name.

    Raises:
        InputRefused: A column name is repeated.
    """
    if len(set(names)) < len(names):
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        message = f"several columns have the same name: {', '.join(map(repr, repeated))}"
        raise InputRefused("repeated_column", message, where=file.path)


def check_seekable(stream: io.BufferedReader, file: Input) -> None:
    """Check that a file is uncompressed and seekable.

    Raises:
        InputRefused: The file is compressed or a pipe.
    """
    if compression := detect_compression(stream.peek(8)[:8]):
        message = f"is compressed ({compression}), which is not supported for this format"
        raise InputRefused("packed_table", message, where=file.path, hint="decompress it first")
    if not stream.seekable():
        raise InputRefused(
            "not_seekable",
            "cannot be read from a pipe, because this format must be read from its end",
            where=file.path,
            hint="write it to a file first",
        )


def damaged_file_error(error: Exception, file: Input, kind: str) -> InputRefused:
    """Return the error for a file that its library cannot read."""
    return InputRefused(
        "damaged_file", f"is not a valid {kind} file: {error}", where=file.path, hint="copy or download it again"
    )
