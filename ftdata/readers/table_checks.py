"""Checks and errors for the Parquet, Arrow, Excel and CSV readers."""

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
        InputRefused: The file is compressed, or it is a pipe.
    """
    if compression := detect_compression(stream.peek(8)[:8]):
        message = f"the file is compressed ({compression}), which is not supported for this format"
        raise InputRefused("packed_table", message, where=file.path, hint="decompress it first")
    if not stream.seekable():
        message = "the input is a pipe, but reading this format starts at the end of the file"
        raise InputRefused("not_seekable", message, where=file.path, hint="write it to a file first")


def damaged_file_error(error: Exception, file: Input, kind: str) -> InputRefused:
    """Create the error for a table file that is damaged or does not have the expected format."""
    message = f"the file is not a valid {kind} file: {error}"
    return InputRefused("damaged_file", message, where=file.path, hint="copy or download it again")
