"""What every reader of tables checks."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

from ftdata.errors import InputRefused
from ftdata.readers.streams import Input, detect_compression


def check_names(names: Sequence[str], file: Input) -> None:
    """Refuse a table that names a column twice."""
    if len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise InputRefused("repeated_column", f"names columns twice: {', '.join(map(repr, twice))}", where=file.path)


def check_seekable(stream: io.BufferedReader, file: Input) -> None:
    """Refuse what cannot be read from its end."""
    if packing := detect_compression(stream.peek(8)[:8]):
        found = f"is packed ({packing}), and this format cannot be read so"
        raise InputRefused("packed_table", found, where=file.path, hint="unpack it first")
    if not stream.seekable():
        raise InputRefused(
            "not_seekable",
            "cannot be read from a pipe: this format is read from its end",
            where=file.path,
            hint="write it to a file first",
        )


def damaged_file_error(error: Exception, file: Input, kind: str) -> InputRefused:
    """Return the refusal of a file that its library cannot read."""
    return InputRefused(
        "damaged_file", f"is no whole {kind} file: {error}", where=file.path, hint="copy or download it again"
    )
