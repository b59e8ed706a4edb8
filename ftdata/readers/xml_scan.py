"""Scan the XML of spreadsheets for its elements: in pieces, without a tree, with limits on depth and length."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from xml.parsers import expat

from ftdata.errors import InputRefused
from ftdata.readers.streams import MAX_LINE

CHUNK = 1 << 16
"""Bytes that are parsed at once."""

_MAX_TAG, _MAX_DEPTH = 1 << 20, 64
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
_NAMES = ("si", "t", "rPh", "row", "c", "v", "f", "workbookPr", "sheet", "numFmt", "cellXfs", "xf")
_MAIN = (
    "http://schemas.openxmlformats.org/spreadsheetml/2006/main",
    "http://purl.oclc.org/ooxml/spreadsheetml/main",
)
_LOCAL = {f"{space} {name}": name for name in _NAMES for space in _MAIN}
_LOCAL["http://schemas.openxmlformats.org/package/2006/relationships Relationship"] = "Relationship"
"""Names of elements with their namespaces (also those of strict files) -> without."""


class XmlParser:
    """A parser of XML that calls `start` and `end` for the elements that a workbook is read from.

    `refuse` makes the error for a text that is not acceptable.
    """

    def __init__(self) -> None:
        self.parser = parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text, parser.buffer_size = True, CHUNK
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.StartDoctypeDeclHandler = self._doctype
        self.refuse: Callable[[str], InputRefused] = lambda found: InputRefused("damaged_file", found)
        self._depth = self._elements = self._fed = self.size = 0
        self._parts: list[str] = []

    def feed(self, piece: bytes, *, last: bool = False) -> int:
        """Parse a piece of the text; return how many elements began in it."""
        self._fed += len(piece)
        self._elements = 0
        try:
            self.parser.Parse(piece, last)
        except expat.ExpatError as error:
            raise self.refuse(f"is not valid XML: {error}") from None
        # The rest, which the parser has not reported yet, is one tag; it is parsed again with every piece.
        if self._fed - max(self.parser.CurrentByteIndex, 0) > _MAX_TAG + len(piece):
            raise self.refuse(f"has a tag or comment of more than {_MAX_TAG:,} bytes")
        return self._elements

    def start(self, _name: str, _attributes: dict[str, str]) -> None:
        """Take the start of an element."""

    def end(self, _name: str) -> None:
        """Take the end of an element."""

    def take(self, *, on: bool) -> None:
        """Start or stop to collect characters; `size` counts their bytes, and none are kept beyond `MAX_LINE`."""
        self.parser.CharacterDataHandler = self._characters if on else None

    def text(self) -> str:
        """Return the collected characters."""
        found = "".join(self._parts)
        self._parts.clear()
        return found

    def _characters(self, text: str) -> None:
        self.size += len(text) if text.isascii() else len(text.encode())
        self._elements += text.count("_x")  # to unescape one takes as long as an element
        if self.size <= MAX_LINE:
            self._parts.append(text)
        else:
            self._parts.clear()

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self.refuse(f"is nested deeper than {_MAX_DEPTH} levels")
        if (local := _LOCAL.get(name)) is not None:
            self.start(local, attributes)

    def _end(self, name: str) -> None:
        self._depth -= 1
        if (local := _LOCAL.get(name)) is not None:
            self.end(local)

    def _doctype(self, *_: Any) -> None:
        # Entities that it declares may be any number of times as long as the text.
        raise self.refuse("declares a document type, which no Excel file does")


class ElementParser(XmlParser):
    """Calls a function with the attributes of each element of some names."""

    def __init__(self, calls: dict[str, Callable[[dict[str, str]], None]]) -> None:
        super().__init__()
        self._calls = calls

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """Take the start of an element."""
        if (call := self._calls.get(name)) is not None:
            call(attributes)


def unescape_xml_string(text: str) -> str:
    r"""Return a string with the characters that `_xHHHH_` stands for (ECMA-376 Part 1, 22.9.2.19).

    Excel writes `_x000D_` for a carriage return, and `_x005F_x000D_` for the text `_x000D_`.

    >>> unescape_xml_string("a_x000D_"), unescape_xml_string("a_x005F_x000D_")
    ('a\r', 'a_x000D_')
    """
    if "_x" not in text:
        return text
    found = _ESCAPED.sub(lambda one: chr(int(one[1], 16)), text)
    # Characters beyond 16 bits are escaped in halves.
    return found.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
