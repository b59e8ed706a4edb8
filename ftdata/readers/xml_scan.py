"""Parse spreadsheet XML in chunks without building a tree. The nesting depth and the length of tags are limited."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from xml.parsers import expat

from ftdata.errors import InputRefused
from ftdata.readers.streams import MAX_LINE

CHUNK = 1 << 16
"""Bytes per call of the parser."""

_MAX_TAG, _MAX_DEPTH = 1 << 20, 64
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")
_NAMES = ("si", "t", "row", "c", "v", "f", "workbookPr", "sheet", "numFmt", "cellXfs", "xf")
_NAMESPACES = (
    "http://schemas.openxmlformats.org/spreadsheetml/2006/main",
    "http://purl.oclc.org/ooxml/spreadsheetml/main",
)
_LOCAL_NAMES = {f"{namespace} {name}": name for name in _NAMES for namespace in _NAMESPACES}
_LOCAL_NAMES["http://schemas.openxmlformats.org/package/2006/relationships Relationship"] = "Relationship"
"""Local names of the elements by their qualified names, in the transitional and in the strict namespace."""

_PHONETIC = {f"{namespace} rPh" for namespace in _NAMESPACES}
"""Pronunciation guides, whose text is not part of a cell."""


class XmlParser:
    """Base class of XML parsers. Calls `start` and `end` for each element that is relevant to a workbook.

    Elements inside pronunciation guides are skipped.

    Args:
        callbacks: functions that `start` calls with the attributes of an element, by the local name of the element.

    Attributes:
        make_error: function that creates the error for unacceptable XML from a message.
        size: size of the text collected so far, in bytes.
    """

    def __init__(self, callbacks: Mapping[str, Callable[[dict[str, str]], None]] | None = None) -> None:
        self._callbacks = callbacks or {}
        self.parser = parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text, parser.buffer_size = True, CHUNK
        parser.StartElementHandler, parser.EndElementHandler = self._start_element, self._end_element
        parser.StartDoctypeDeclHandler = self._reject_doctype
        self.make_error: Callable[[str], InputRefused] = lambda message: InputRefused("damaged_file", message)
        self._depth = self._phonetic = self._elements = self._fed = self.size = 0
        self._text_parts: list[str] = []

    def feed(self, chunk: bytes, *, last: bool = False) -> int:
        """Parse the next chunk of XML. Return the number of elements that begin in this chunk."""
        self._fed += len(chunk)
        self._elements = 0
        try:
            self.parser.Parse(chunk, last)
        except expat.ExpatError as error:
            raise self.make_error(f"the XML is invalid: {error}") from None
        # Bytes that the parser has not reported yet belong to a single tag, which is parsed again with every chunk.
        if self._fed - max(self.parser.CurrentByteIndex, 0) > _MAX_TAG + len(chunk):
            raise self.make_error(f"a tag or comment is longer than {_MAX_TAG:,} bytes")
        return self._elements

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """Process the start of an element. Subclasses override this method."""
        if (callback := self._callbacks.get(name)) is not None:
            callback(attributes)

    def end(self, _name: str) -> None:
        """Process the end of an element. Subclasses override this method."""

    def collect_text(self, *, on: bool) -> None:
        """Start or stop collecting text. Text beyond `MAX_LINE` bytes is counted but not stored."""
        self.parser.CharacterDataHandler = self._add_text if on else None

    def text(self) -> str:
        """Return the collected text, and clear it."""
        text = "".join(self._text_parts)
        self._text_parts.clear()
        return text

    def _add_text(self, text: str) -> None:
        self.size += len(text) if text.isascii() else len(text.encode())
        self._elements += text.count("_x")  # unescaping a character takes as long as parsing an element
        if self.size <= MAX_LINE:
            self._text_parts.append(text)
        else:
            self._text_parts.clear()

    def _start_element(self, name: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self.make_error(f"the XML is nested deeper than {_MAX_DEPTH} levels")
        self._phonetic += name in _PHONETIC
        if (local_name := _LOCAL_NAMES.get(name)) is not None and not self._phonetic:
            self.start(local_name, attributes)

    def _end_element(self, name: str) -> None:
        self._depth -= 1
        self._phonetic -= name in _PHONETIC
        if (local_name := _LOCAL_NAMES.get(name)) is not None and not self._phonetic:
            self.end(local_name)

    def _reject_doctype(self, *_: Any) -> None:
        # Entities of a document type can expand to text of any length.
        raise self.make_error("the XML declares a document type, which is not allowed in Excel files")


def unescape_xml_string(text: str) -> str:
    r"""Replace each escape `_xHHHH_` in a string by its character (ECMA-376 Part 1, 22.9.2.19).

    Excel writes `_x000D_` for a carriage return, and `_x005F_x000D_` for the text `_x000D_`.

    >>> unescape_xml_string("a_x000D_"), unescape_xml_string("a_x005F_x000D_")
    ('a\r', 'a_x000D_')
    """
    if "_x" not in text:
        return text
    unescaped = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)
    # A character beyond 16 bits is escaped as a surrogate pair.
    return unescaped.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
