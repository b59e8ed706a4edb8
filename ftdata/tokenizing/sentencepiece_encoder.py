"""Encode texts with SentencePiece models that `tokenizers` cannot represent exactly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from ftdata.tokenizing.batches import EncodedText, Encodings


class SentencePieceModel(NamedTuple):
    """A SentencePiece model.

    Attributes:
        content: the content of its file.
        prefix_once: whether the space that SentencePiece adds before a text is added only at the start of the text, or
            also after each control token.
    """

    content: bytes
    prefix_once: bool


@dataclass(frozen=True)
class SentencePieceEncoder:
    """An encoder that uses the package `sentencepiece`.

    Attributes:
        model: the model.
        control: text -> id of each control token. SentencePiece itself reads no control tokens from a text.
    """

    model: SentencePieceModel
    control: Mapping[str, int]

    @property
    def name(self) -> str:
        """Name and version of the package."""
        return f"sentencepiece {version('sentencepiece')}"

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        tokens = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Return the tokens of each text.

        Raises:
            UnicodeEncodeError: a text contains a lone surrogate.
        """
        return Encodings.from_texts([self._encode(text) for text in texts], map(len, texts))

    def _encode(self, text: str) -> EncodedText:
        text.encode()
        ids, offsets, end = list[int](), list[tuple[int, int]](), 0
        matches = self._pattern.finditer(text) if self._pattern else iter(())
        for match in matches:
            self._append(text, end, match.start(), ids, offsets)
            ids.append(self.control[match.group()])
            offsets.append(match.span())
            end = match.end()
        self._append(text, end, len(text), ids, offsets)
        return EncodedText(np.asarray(ids, np.int32), np.asarray(offsets, np.int32).reshape(-1, 2))

    def _append(self, text: str, start: int, end: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        """Encode a section of a text without control tokens, and append its tokens."""
        if start == end:
            return
        processor = _load_processors(self.model)[bool(start) and self.model.prefix_once]
        encoded = processor.encode_as_offset_mapping(text[start:end])
        ids += encoded["ids"]
        spans = (_fill_span(first, last, end - start) for first, last in encoded["offsets"])
        offsets += ((start + first, start + last) for first, last in spans)


def _fill_span(start: int, end: int, length: int) -> tuple[int, int]:
    """Return the span of a token, which is not empty.

    SentencePiece returns an empty span for a token before the last token of the same character, e.g. for the first
    bytes of the character, and for a space that it adds at the start.
    """
    if start < end:
        return start, end
    return (start, start + 1) if start < length else (start - 1, start)


def parse_model(content: bytes) -> Any:
    """Parse the content of a SentencePiece model, a `ModelProto`."""
    from sentencepiece import sentencepiece_model_pb2

    kind: Any = vars(sentencepiece_model_pb2)["ModelProto"]
    return kind.FromString(content)


@lru_cache(maxsize=8)
def _load_processors(model: SentencePieceModel) -> tuple[Any, Any]:
    """Load a model. Return it as it is, and without the space that it adds before a text."""
    from sentencepiece import SentencePieceProcessor

    proto = parse_model(model.content)
    proto.normalizer_spec.add_dummy_prefix = False
    return (
        SentencePieceProcessor(model_proto=model.content),
        SentencePieceProcessor(model_proto=proto.SerializeToString()),
    )
