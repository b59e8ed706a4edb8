"""Encoders: texts into ids and offsets, many at once.

The reference is `tokenizers`; where it is shown to do the same, fastokens (extra `fast`) takes its place, which is some
hundred times faster.

fastokens gives no offsets. For byte-level BPE, and for SentencePiece's in which blanks are U+2581, none are needed: the
name of each token spells what it stands for, so the places of tokens are a running sum of their lengths. Where a
normaliser changes a text, or the sum is not the length of the text, the reference is asked.
"""

from __future__ import annotations

import ctypes
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray

from ftdata.errors import TemplateRefused
from ftdata.tokenizing.batches import EncodedText, Encodings, end_offsets, offset_dtype

ENOUGH, BYTES = 1_000_000, 4
"""The fast encoder is loaded from this many characters on, and one more for every so many bytes of the tokenizer's
file: with less to do, loading takes longer than it saves."""

SAMPLE, SAMPLED = 1000, 4
"""Characters of the texts that both encoders are compared on, and of how many batches one has such a text."""


class EncodersDiffer(Exception):
    """The fast encoder gave other tokens than the reference for a text of the data."""


class EncodingCache(Protocol):
    """Tokens that texts were made into before."""

    @property
    def has_entries(self) -> bool:
        """Whether there are any."""

    def encode(self, texts: Sequence[str], encode: Callable[[Sequence[str]], Encodings]) -> Encodings:
        """Return the tokens of each text: those that are known, else what `encode` makes."""


@contextmanager
def describe_encoder_error() -> Iterator[None]:
    """Say what `tokenizers` says where it gives up: with an error of no kind, or one that ends programs.

    Raises:
        TemplateRefused: `bad_tokenizer`.
    """
    try:
        yield
    except (TypeError, UnicodeError):
        raise
    except BaseException as error:
        # Rust's panics are no `Exception`: code is not meant to go on after them, and ours does not.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told = f"the tokenizer fails: {' '.join(str(error).split())[:300]}"
        raise TemplateRefused("bad_tokenizer", told, hint="mend its tokenizer.json, or take another") from None


class Encoder(Protocol):
    """What encodes texts as they stand, without adding special tokens."""

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Return the tokens of each text."""


@dataclass(frozen=True)
class ReferenceEncoder:
    """`tokenizers` itself."""

    backend: tokenizers.Tokenizer
    name: str = f"tokenizers {tokenizers.__version__}"

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Return the tokens of each text."""
        with describe_encoder_error():
            found = self.backend.encode_batch(list(texts), add_special_tokens=False)
        encoded = [
            EncodedText(np.asarray(one.ids, np.int32), np.asarray(one.offsets, np.int32).reshape(-1, 2))
            for one in found
        ]
        return Encodings.of(encoded, map(len, texts))


@dataclass(frozen=True)
class FastEncoder:
    """fastokens, for BPE on bytes, or on characters with bytes for those that it does not know.

    Attributes:
        native: its tokenizer.
        reference: what is asked about texts that a normaliser changes.
        letters: unsigned `[size]`, twice the characters that begin in each token, and 1 where it begins inside of one.
        composes: whether texts are normalised to NFC.
        apart: bool `[size]`, the added tokens, where a blank is put before what stands between them; else `None`.
    """

    native: Any
    reference: ReferenceEncoder
    letters: NDArray[np.unsignedinteger]
    composes: bool
    apart: NDArray[np.bool_] | None
    name: str

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Return the tokens of each text."""
        if not texts:
            return Encodings.of([], [])
        flat, counted = self.native.encode_batch_flat(list(texts))
        ids, bounds = np.frombuffer(flat, "<i4"), np.frombuffer(counted, "<i8")
        places = end_offsets(map(len, texts))
        told = self.letters.take(ids, mode="clip")
        counts, ends = told >> 1, np.zeros(len(ids) + 1, dtype=offset_dtype(int(places[-1])))
        first = _first(self.apart.take(ids, mode="clip"), bounds) if self.apart is not None else None
        if first is not None:
            counts -= first
        np.cumsum(counts, out=ends[1:])
        # The blank that is put before a text stands where its first character does, also as a token of its own.
        lasts = ends[1:] if first is None else ends[1:] + (first & (counts == 0))
        found = Encodings(ids, ends[:-1] - (told & 1), lasts, bounds, ends[bounds])
        unsure = set(np.flatnonzero(np.diff(found.places) != np.diff(places)).tolist())
        if self.composes:
            composed = (text.isascii() or unicodedata.is_normalized("NFC", text) for text in texts)
            unsure.update(number for number, one in enumerate(composed) if not one)
        if not unsure:
            return found
        asked = sorted(unsure)
        others = dict(zip(asked, self.reference.encode([texts[number] for number in asked]), strict=True))
        return Encodings.of([others.get(number, one) for number, one in enumerate(found)], np.diff(places).tolist())


@dataclass
class Encoders:
    """The encoders of one tokenizer: the reference, and from enough work on the fast one.

    `trusted` is false where the fast one was seen to differ, here or elsewhere; where it is found to, who asks does all
    again if `retried`. What is `known` is not encoded once more.
    """

    description: bytes
    reference: ReferenceEncoder
    trusted: bool = True
    retried: bool = False
    expected: int = 0
    cache: EncodingCache | None = None
    _batches: int = 0
    _fast: FastEncoder | None = None
    _tried: bool = False

    @property
    def name(self) -> str:
        """What encodes now."""
        return self.reference.name if self._fast is None or not self.trusted else self._fast.name

    def expect(self, size: int) -> None:
        """Say that other data is to come, and how many characters, or bytes, it has."""
        self.expected, self._batches = max(self.expected, size), 0

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Return the tokens of each text. Of some batches, the first among them, one is encoded by both encoders.

        Raises:
            EncodersDiffer: they do not agree, and all is to be done again.
        """
        return self._encode(texts) if self.cache is None else self.cache.encode(texts, self._encode)

    def _encode(self, texts: Sequence[str]) -> Encodings:
        self.expected += sum(map(len, texts))
        if self.trusted and not self._tried and self.expected > max(ENOUGH, len(self.description) // BYTES):
            _give_back()
            self._fast, self._tried = load_fast_encoder(self.description, self.reference), True
            _give_back()
        if self._fast is None or not self.trusted or not texts:
            return self.reference.encode(texts)
        found = self._fast.encode(texts)
        self._batches += 1
        if self._batches % SAMPLED != 1:
            return found
        tried = min(range(len(texts)), key=lambda number: abs(len(texts[number]) - SAMPLE))
        if has_difference(found[tried], self.reference.encode([texts[tried]])[0]):
            self.trusted = False
            if self.retried:
                raise EncodersDiffer(self._fast.name)
            return self.reference.encode(texts)
        return found


def load_fast_encoder(description: bytes, reference: ReferenceEncoder) -> FastEncoder | None:
    """Return the fast encoder for a tokenizer, where it is installed, can be used, and does the same on hard texts."""
    try:
        import fastokens
    except ImportError:
        return None
    spec = orjson.loads(description)
    in_bytes = _is_byte_level(spec)
    if not in_bytes and not _is_sentencepiece(spec):
        return None
    from importlib.metadata import version

    texts = list(_hard_texts([token["content"] for token in spec.get("added_tokens", ())]))
    letters, normalizers = _letters(spec, in_bytes=in_bytes), [one["type"] for one in _flat(spec.get("normalizer"))]
    apart = _added(spec, len(letters)) if "Prepend" in normalizers else None
    # A post-processor adds special tokens, which is done elsewhere.
    bare = orjson.dumps({**spec, "post_processor": None}).decode()
    # It takes fifty megabytes, and the encoder as much again while it is made.
    del spec
    with _set_up(_SETTINGS):
        try:
            native = fastokens.Tokenizer.from_json_str(bare)
        except Exception:  # noqa: BLE001  (what it does not support it refuses in its own ways)
            return None
        encoder = FastEncoder(
            native, reference, letters, "NFC" in normalizers, apart, f"fastokens {version('fastokens')}"
        )
        return encoder if find_first_difference(encoder, reference, texts) is None else None


def _give_back() -> None:
    """Give memory that is not used any longer back to the system, which the C library of GNU does not do by itself.

    To load a tokenizer takes a hundred megabytes for a while.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


_SETTINGS = {"FASTOKENS_BPE_THREADS": "1", "FASTOKENS_INPUT_CACHE": "0"}
"""What fastokens reads once, before its first text. Threads of one process share its words, and wait for each other:
two take half as much again of the CPU, and worker processes are what uses many. Rows are seldom the same twice."""


@contextmanager
def _set_up(settings: Mapping[str, str]) -> Iterator[None]:
    """Have these in the environment, where the user has not set them."""
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def find_first_difference(encoder: Encoder, reference: Encoder, texts: Sequence[str]) -> str | None:
    """Return the first text that two encoders encode differently."""
    pairs = zip(texts, encoder.encode(texts), reference.encode(texts), strict=True)
    return next((text for text, one, other in pairs if has_difference(one, other)), None)


def has_difference(one: EncodedText, other: EncodedText) -> bool:
    """Whether the tokens of one text, or their places, are not the same."""
    return not (np.array_equal(one.ids, other.ids) and np.array_equal(one.offsets, other.offsets))


_MODEL = ("dropout", "end_of_word_suffix", "continuing_subword_prefix")
_ADDED = ("lstrip", "rstrip", "single_word")
_BLANK = "\u2581"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_PREPEND = {"type": "Prepend", "prepend": _BLANK}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}


def _is_byte_level(spec: Any) -> bool:
    """Whether the names of tokens tell how many bytes each stands for, and texts are changed by NFC at most."""
    normalizers, cutters = (_flat(spec.get(name)) for name in ("normalizer", "pre_tokenizer"))
    bytes_of = [one for one in cutters if one["type"] == "ByteLevel"]
    cut = len(bytes_of) == 1 and not bytes_of[0].get("add_prefix_space")
    cut = cut and all(one["type"] in ("ByteLevel", "Split", "Digits") for one in cutters)
    known = not any(spec["model"].get(name) for name in ("byte_fallback", "unk_token"))
    return _is_plain(spec) and known and cut and [one["type"] for one in normalizers] in ([], ["NFC"])


def _is_sentencepiece(spec: Any) -> bool:
    """Whether tokens are named by their characters, or are bytes of one, and texts are changed in their blanks only."""
    changed = _flat(spec.get("normalizer")) in ([_REPLACE], [_PREPEND, _REPLACE])
    # What it would split at is no blank any longer.
    whole = spec.get("pre_tokenizer") is None or spec["pre_tokenizer"].get("pattern") == {"String": " "}
    as_written = not any(one.get("normalized") for one in spec.get("added_tokens", ()))
    spelled = changed and whole and as_written and _is_plain(spec) and bool(spec["model"].get("byte_fallback"))
    # Then there is no character that no token stands for.
    return spelled and _BYTES.issubset(spec["model"]["vocab"])


def _is_plain(spec: Any) -> bool:
    """Whether it is BPE that adds nothing to words, with added tokens that are found as they are written."""
    model, added = spec["model"], spec.get("added_tokens", ())
    plain = model.get("type") == "BPE" and not any(model.get(name) for name in _MODEL)
    return plain and not any(one.get(name) for one in added for name in _ADDED)


def _flat(stage: Any) -> list[dict[str, Any]]:
    if stage is None:
        return []
    inner = stage.get("normalizers", stage.get("pretokenizers", ()))
    return [one for each in inner for one in _flat(each)] if stage["type"] == "Sequence" else [stage]


def _first(apart: NDArray[np.bool_], bounds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which tokens are the first of a text, or of what follows an added token, and are none themselves."""
    begins = np.ones(len(apart), np.bool_)
    begins[1:] = apart[:-1]
    begins[bounds[:-1][bounds[:-1] < len(apart)]] = True
    return np.asarray(begins & ~apart)


def _added(spec: Any, size: int) -> NDArray[np.bool_]:
    found = np.zeros(size, np.bool_)
    found[[token["id"] for token in spec.get("added_tokens", ())]] = True
    return found


def _letters(spec: Any, *, in_bytes: bool) -> NDArray[np.unsignedinteger]:
    vocabulary = spec["model"]["vocab"]
    added = {token["id"]: token["content"] for token in spec.get("added_tokens", ())}
    letters = np.zeros(max(*vocabulary.values(), *added, 0) + 1, dtype=np.int32)
    sizes = np.fromiter(map(len, vocabulary), np.int64, len(vocabulary))
    numbers = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    if in_bytes:
        ends = np.concatenate(([0], np.cumsum(sizes)))
        continues = _continues()[np.frombuffer("".join(vocabulary).encode("utf-32-le"), "<u4").clip(max=511)]
        begun = np.concatenate(([0], np.cumsum(~continues)))
        letters[numbers] = 2 * (begun[ends[1:]] - begun[ends[:-1]])
        letters[numbers[sizes > 0]] += continues[ends[:-1][sizes > 0]]
    else:
        letters[numbers] = 2 * sizes
        for name in _BYTES:
            letters[vocabulary[name]] = 1 if 0x80 <= int(name[1:-1], 16) < 0xC0 else 2
    for number, text in added.items():
        letters[number] = 2 * len(text)
    # The smaller the table, the more of it stays at hand.
    return letters.astype(np.min_scalar_type(int(letters.max())))


def _continues() -> NDArray[np.bool_]:
    """Return, for each letter in which byte-level BPE spells a byte, whether that is inside a character (`[512]`).

    Bytes that are printable in Latin-1 are their own letters, the others are spelled from U+0100 on (Radford et al.
    2019, GPT-2's `bytes_to_unicode`).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = np.zeros(512, dtype=np.bool_)
    for byte, letter in (*zip(printable, printable, strict=True), *zip(others, range(256, 512), strict=False)):
        found[letter] = 0x80 <= byte < 0xC0
    return found


_BLANKS = ["\n\n", "\r\n", " \n ", *" \t\u00a0\u3000\u2028\x00\x1c\x7f"]
_NUMBERS = ["0", "12", "123", "1234567", "٣", "½", "Ⅷ"]
_WORDS = [
    _BLANK,
    "a",
    "B",
    "'s",
    "'LL",
    "’re",
    "it's",
    "...",
    "!?",
    "->",
    "_",
    "$",
    "€",
    "<",
    "|",
    ">",
    "<|",
    "|>",
    "[",
    "]",
    "</s>",
    "<unk>",
]
_MARKED = ["é", "é", "́", "ß", "İ", "ŉ", "ǆ", "Ω", "Ω", "ﬁ", "Ａ", "ё", "שָ", "يَ"]
_SCRIPTS = ["你好", "々", "が", "한국", "한", "ไทย", "नि", "𝒳"]
_JOINED = ["👍", "👍🏽", "👨\u200d👩", "🇩🇪", "️", "\u200b", "\ufeff", "\ufdd0", "\U0010ffff"]
_PIECES = (*_BLANKS, *_NUMBERS, *_WORDS, *_MARKED, *_SCRIPTS, *_JOINED)


def _hard_texts(added: Sequence[str]) -> Iterator[str]:
    """Yield texts on which encoders differ: blanks, digits, marks, joiners, rare scripts, what looks like control."""
    yield from ("", *_PIECES, *added[:2000])
    for run in (*"a \n1!\t", "ab ", "\u00e9", "\u4f60", "\U0001f44d"):
        yield from (run * count for count in (2, 3, 5, 17, 300))
    chance = Random(0)  # noqa: S311  (the same texts each time)
    pieces = [*_PIECES, *_PIECES, *added[:400]]
    for _ in range(1500):
        yield "".join(chance.choices(pieces, k=chance.randint(2, 12)))
    for _ in range(300):
        points = (chance.choice((chance.randrange(0xD800), chance.randrange(0xE000, 0x110000))) for _ in range(20))
        yield "".join(map(chr, points))
