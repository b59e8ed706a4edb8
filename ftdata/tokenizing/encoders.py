"""Encode batches of texts as token ids and character offsets.

The reference is `tokenizers`. fastokens (extra `fast`) is about a hundred times faster. ftdata uses it if it encodes a
set of difficult texts in the same way as the reference.

fastokens returns no offsets. ftdata computes them for byte-level BPE, and for SentencePiece-style BPE that replaces
spaces by U+2581: the name of a token determines how many characters it covers, so the offsets are a cumulative sum. A
text is encoded by the reference if a normalizer changes it, or if the sum differs from the length of the text.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray

from ftdata.errors import TemplateRefused
from ftdata.storage import disk
from ftdata.tokenizing.batches import EncodedText, Encodings, end_offsets, offset_dtype

FAST_MIN_CHARACTERS, BYTES_PER_CHARACTER = 1_000_000, 4
"""The fast encoder is loaded if there are more characters to encode than `FAST_MIN_CHARACTERS`, and than the size of
`tokenizer.json` in bytes divided by `BYTES_PER_CHARACTER`. For less data, loading takes longer than it saves."""

COMPARED_LENGTH, COMPARISON_INTERVAL = 1000, 4
"""In every fourth batch, both encoders encode the text whose length is closest to 1,000 characters."""


class EncodersDiffer(Exception):
    """The fast encoder and the reference encoder produced different tokens for the same text."""


class EncodingCache(Protocol):
    """The interface of a cache of tokenized texts."""

    @property
    def has_entries(self) -> bool:
        """Whether the cache contains any text."""

    def encode(self, texts: Sequence[str], encode: Callable[[Sequence[str]], Encodings]) -> Encodings:
        """Return the tokens of each text. Use the cached tokens of a text if they exist. Otherwise, call `encode`."""


@contextmanager
def describe_encoder_error() -> Iterator[None]:
    """Convert exceptions and Rust panics from the package `tokenizers` to the exception `TemplateRefused`.

    Raises:
        TemplateRefused: `bad_tokenizer`.
    """
    try:
        yield
    except (TypeError, UnicodeError):
        raise
    except BaseException as error:
        # A Rust panic is only a `BaseException`, because programs must not continue after it. ftdata stops.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        problem = f"the tokenizer fails: {' '.join(str(error).split())[:300]}"
        raise TemplateRefused("bad_tokenizer", problem, hint="fix tokenizer.json, or use another tokenizer") from None


class Encoder(Protocol):
    """The interface of an encoder, which converts texts to tokens without adding special tokens."""

    @property
    def name(self) -> str:
        """Name and version of the encoder."""

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Return the tokens of each text."""


@dataclass(frozen=True)
class ReferenceEncoder:
    """An encoder that uses the package `tokenizers`. Other encoders must produce the same tokens."""

    backend: tokenizers.Tokenizer
    name: str = f"tokenizers {tokenizers.__version__}"

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Return the tokens of each text."""
        with describe_encoder_error():
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        encoded = [
            EncodedText(np.asarray(encoding.ids, np.int32), np.asarray(encoding.offsets, np.int32).reshape(-1, 2))
            for encoding in encodings
        ]
        return Encodings.from_texts(encoded, map(len, texts))


@dataclass(frozen=True)
class FastEncoder:
    """An encoder that uses the package fastokens. It supports byte-level BPE, and BPE with byte fallback.

    Attributes:
        native: the tokenizer of fastokens.
        reference: encodes texts that a normalizer changes.
        doubled_counts: unsigned `[size]`, twice the number of characters that begin in each token, plus 1 if the token
            begins inside a character.
        composes: whether the normalizer is NFC.
        added: bool `[size]`, the added tokens, if the tokenizer prepends a space to the text between added tokens;
            otherwise `None`.
        name: name and version of the encoder.
    """

    native: Any
    reference: Encoder
    doubled_counts: NDArray[np.unsignedinteger]
    composes: bool
    added: NDArray[np.bool_] | None
    name: str

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Return the tokens of each text."""
        if not texts:
            return Encodings.from_texts([], [])
        id_bytes, bound_bytes = self.native.encode_batch_flat(list(texts))
        ids, bounds = np.frombuffer(id_bytes, "<i4"), np.frombuffer(bound_bytes, "<i8")
        text_bounds = end_offsets(map(len, texts))
        doubled_counts = self.doubled_counts.take(ids, mode="clip")
        counts, edges = doubled_counts >> 1, np.zeros(len(ids) + 1, dtype=offset_dtype(int(text_bounds[-1])))
        first = _find_section_starts(self.added.take(ids, mode="clip"), bounds) if self.added is not None else None
        if first is not None:
            counts -= first
        np.cumsum(counts, out=edges[1:])
        # A prepended space covers the first character of its text, also if it is a token without other characters.
        ends = edges[1:] if first is None else edges[1:] + (first & (counts == 0))
        encoded = Encodings(ids, edges[:-1] - (doubled_counts & 1), ends, bounds, edges[bounds])
        uncertain = set(np.flatnonzero(np.diff(encoded.text_bounds) != np.diff(text_bounds)).tolist())
        if self.composes:
            unchanged = (text.isascii() or unicodedata.is_normalized("NFC", text) for text in texts)
            uncertain.update(number for number, is_unchanged in enumerate(unchanged) if not is_unchanged)
        if not uncertain:
            return encoded
        numbers = sorted(uncertain)
        references = dict(zip(numbers, self.reference.encode([texts[number] for number in numbers]), strict=True))
        # If the sum of a text differs from its length, the sums of all texts after it are shifted.
        shifts = np.repeat((text_bounds - encoded.text_bounds)[:-1], np.diff(bounds)).astype(edges.dtype)
        shifted = replace(encoded, starts=encoded.starts + shifts, ends=encoded.ends + shifts, text_bounds=text_bounds)
        return shifted.with_replacements(references)


@dataclass
class Encoders:
    """The encoders of one tokenizer. The fast encoder is loaded only if there is enough text to encode.

    Attributes:
        description: the content of `tokenizer.json`.
        reference: the reference encoder.
        is_fast_trusted: false after the fast encoder differed from the reference, in this process or another.
        raises_on_difference: whether to raise `EncodersDiffer` if they differ; the caller then repeats its work.
        expected: number of characters (or bytes) that were announced or encoded so far.
        cache: a cache of tokenized texts, or `None`.
    """

    description: bytes
    reference: Encoder
    is_fast_trusted: bool = True
    raises_on_difference: bool = False
    expected: int = 0
    cache: EncodingCache | None = None
    _batch_count: int = 0
    _fast: FastEncoder | None = None
    _has_loaded: bool = False

    @property
    def name(self) -> str:
        """Name and version of the encoder in use."""
        return self.reference.name if self._fast is None or not self.is_fast_trusted else self._fast.name

    def expect_input(self, size: int) -> None:
        """Set the expected size of the next data set, in characters or bytes. Large sizes enable the fast encoder."""
        self.expected, self._batch_count = max(self.expected, size), 0

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Return the tokens of each text. In every fourth batch, compare the results of both encoders for one text.

        Raises:
            EncodersDiffer: the encoders differ, and the caller must repeat its work.
        """
        return self._encode(texts) if self.cache is None else self.cache.encode(texts, self._encode)

    def _encode(self, texts: Sequence[str]) -> Encodings:
        self.expected += sum(map(len, texts))
        is_worthwhile = self.expected > max(FAST_MIN_CHARACTERS, len(self.description) // BYTES_PER_CHARACTER)
        if self.is_fast_trusted and not self._has_loaded and is_worthwhile:
            _trim_memory()
            self._fast, self._has_loaded = load_fast_encoder(self.description, self.reference), True
            _trim_memory()
        if self._fast is None or not self.is_fast_trusted or not texts:
            return self.reference.encode(texts)
        encoded = self._fast.encode(texts)
        self._batch_count += 1
        if self._batch_count % COMPARISON_INTERVAL != 1:
            return encoded
        compared = min(range(len(texts)), key=lambda number: abs(len(texts[number]) - COMPARED_LENGTH))
        if has_difference(encoded[compared], self.reference.encode([texts[compared]])[0]):
            self.is_fast_trusted = False
            if self.raises_on_difference:
                raise EncodersDiffer(self._fast.name)
            return self.reference.encode(texts)
        return encoded


def load_fast_encoder(description: bytes, reference: Encoder) -> FastEncoder | None:
    """Load the fast encoder of a tokenizer.

    Returns:
        The encoder, or `None` if fastokens is not installed, does not support the tokenizer, or differs from the
        reference on difficult texts.
    """
    try:
        import fastokens
    except ImportError:
        return None
    spec = orjson.loads(description)
    is_byte_level = _is_byte_level(spec)
    if not is_byte_level and not _is_sentencepiece(spec):
        return None
    from importlib.metadata import version

    added_tokens = [token["content"] for token in spec.get("added_tokens", ())]
    doubled_counts = _count_characters(spec, is_byte_level=is_byte_level)
    normalizers = [stage["type"] for stage in _flatten_stages(spec.get("normalizer"))]
    added = _mark_added_tokens(spec, len(doubled_counts)) if "Prepend" in normalizers else None
    # Post-processors add special tokens. ftdata adds none here.
    stripped = orjson.dumps({**spec, "post_processor": None}).decode()
    # Free the memory before fastokens loads the tokenizer: the parsed file takes fifty megabytes.
    del spec
    with _set_environment(_SETTINGS):
        try:
            native = fastokens.Tokenizer.from_json_str(stripped)
        except Exception:  # noqa: BLE001  (fastokens raises several types for unsupported tokenizers)
            return None
        name = f"fastokens {version('fastokens')}"
        encoder = FastEncoder(native, reference, doubled_counts, "NFC" in normalizers, added, name)
        return encoder if _agrees_on_difficult_texts(encoder, added_tokens, description) else None


def _agrees_on_difficult_texts(encoder: FastEncoder, added_tokens: Sequence[str], description: bytes) -> bool:
    """Compare a fast encoder with its reference. The result is cached, keyed by the tokenizer and all code."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + f"{encoder.name} {encoder.reference.name} ".encode())
    digest.update(description)
    root, key = disk.cache_root(), digest.hexdigest()
    file = root / "encoders" / key if root else Path(os.devnull)
    # A damaged file does not contain the key.
    with suppress(OSError):
        if disk.read_regular_file(file) == key.encode():
            return True
    agrees = find_first_difference(encoder, encoder.reference, [*difficult_texts(added_tokens)]) is None
    if agrees and root is not None:
        disk.write_cache_file(file, key.encode())
    return agrees


def _trim_memory() -> None:
    """Return freed memory to the operating system. By default, glibc keeps this memory.

    Loading a tokenizer temporarily allocates a hundred megabytes.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


_SETTINGS = {"FASTOKENS_BPE_THREADS": "1", "FASTOKENS_INPUT_CACHE": "0"}
"""Settings that fastokens reads once, before its first text. One thread, because threads contend for a shared cache of
words (two threads use 1.5 times the CPU time) and ftdata runs several processes. No cache of inputs, because rows
seldom repeat."""


@contextmanager
def _set_environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside a `with` block. Variables that are already set keep their values."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def find_first_difference(encoder: Encoder, reference: Encoder, texts: Sequence[str]) -> str | None:
    """Return the first text that the two encoders encode differently, or `None` if they agree."""
    pairs = zip(texts, encoder.encode(texts), reference.encode(texts), strict=True)
    return next((text for text, first, second in pairs if has_difference(first, second)), None)


def has_difference(first: EncodedText, second: EncodedText) -> bool:
    """Return whether two encodings of a text differ in token ids or offsets."""
    return not (np.array_equal(first.ids, second.ids) and np.array_equal(first.offsets, second.offsets))


_MODEL_OPTIONS = ("dropout", "end_of_word_suffix", "continuing_subword_prefix")
_ADDED_TOKEN_OPTIONS = ("lstrip", "rstrip", "single_word")
_SPACE_SYMBOL = "\u2581"
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_PREPEND = {"type": "Prepend", "prepend": _SPACE_SYMBOL}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_SYMBOL}


def _is_byte_level(spec: Any) -> bool:
    """Return whether a tokenizer is byte-level BPE and has no normalizer other than NFC, as `FastEncoder` requires."""
    normalizers, pre_tokenizers = (_flatten_stages(spec.get(name)) for name in ("normalizer", "pre_tokenizer"))
    byte_levels = [stage for stage in pre_tokenizers if stage["type"] == "ByteLevel"]
    can_sum = len(byte_levels) == 1 and not byte_levels[0].get("add_prefix_space")
    can_sum = can_sum and all(stage["type"] in ("ByteLevel", "Split", "Digits") for stage in pre_tokenizers)
    has_fallback = any(spec["model"].get(name) for name in ("byte_fallback", "unk_token"))
    is_supported = _is_plain_bpe(spec) and not has_fallback and can_sum
    return is_supported and [stage["type"] for stage in normalizers] in ([], ["NFC"])


def _is_sentencepiece(spec: Any) -> bool:
    """Return whether a tokenizer is SentencePiece BPE with byte fallback, and its normalizer changes only spaces."""
    changes_spaces = _flatten_stages(spec.get("normalizer")) in ([_REPLACE], [_PREPEND, _REPLACE])
    # A pre-tokenizer that splits at spaces has no effect, because the normalizer has replaced all spaces.
    splits_nothing = spec.get("pre_tokenizer") is None or spec["pre_tokenizer"].get("pattern") == {"String": " "}
    has_normalized_tokens = any(token.get("normalized") for token in spec.get("added_tokens", ()))
    can_sum = changes_spaces and splits_nothing and not has_normalized_tokens
    is_supported = can_sum and _is_plain_bpe(spec) and bool(spec["model"].get("byte_fallback"))
    # With all byte tokens in the vocabulary, every character is covered by a token.
    return is_supported and _BYTE_TOKENS.issubset(spec["model"]["vocab"])


def _is_plain_bpe(spec: Any) -> bool:
    """Return whether the model is BPE without dropout, prefixes and suffixes, and added tokens match text exactly."""
    model, added_tokens = spec["model"], spec.get("added_tokens", ())
    is_bpe = model.get("type") == "BPE" and not any(model.get(name) for name in _MODEL_OPTIONS)
    return is_bpe and not any(token.get(name) for token in added_tokens for name in _ADDED_TOKEN_OPTIONS)


def _flatten_stages(stage: Any) -> list[dict[str, Any]]:
    if stage is None:
        return []
    if stage["type"] != "Sequence":
        return [stage]
    inner_stages = stage.get("normalizers", stage.get("pretokenizers", ()))
    return [flat_stage for inner_stage in inner_stages for flat_stage in _flatten_stages(inner_stage)]


def _find_section_starts(is_added: NDArray[np.bool_], bounds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which tokens begin a text or follow an added token. Added tokens are excluded (bool `[tokens]`)."""
    starts = np.ones(len(is_added), np.bool_)
    starts[1:] = is_added[:-1]
    starts[bounds[:-1][bounds[:-1] < len(is_added)]] = True
    return np.asarray(starts & ~is_added)


def _mark_added_tokens(spec: Any, size: int) -> NDArray[np.bool_]:
    marks = np.zeros(size, np.bool_)
    marks[[token["id"] for token in spec.get("added_tokens", ())]] = True
    return marks


def _count_characters(spec: Any, *, is_byte_level: bool) -> NDArray[np.unsignedinteger]:
    """Compute the array `FastEncoder.doubled_counts` from the vocabulary of a tokenizer (unsigned `[size]`)."""
    vocabulary = spec["model"]["vocab"]
    added = {token["id"]: token["content"] for token in spec.get("added_tokens", ())}
    doubled_counts = np.zeros(max(*vocabulary.values(), *added, 0) + 1, dtype=np.int32)
    sizes = np.fromiter(map(len, vocabulary), np.int64, len(vocabulary))
    numbers = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    if is_byte_level:
        ends = np.concatenate(([0], np.cumsum(sizes)))
        points = np.frombuffer("".join(vocabulary).encode("utf-32-le"), "<u4").clip(max=511)
        is_continuation = _continuation_symbols()[points]
        starts = np.concatenate(([0], np.cumsum(~is_continuation)))
        doubled_counts[numbers] = 2 * (starts[ends[1:]] - starts[ends[:-1]])
        doubled_counts[numbers[sizes > 0]] += is_continuation[ends[:-1][sizes > 0]]
    else:
        doubled_counts[numbers] = 2 * sizes
        for name in _BYTE_TOKENS:
            doubled_counts[vocabulary[name]] = 1 if 0x80 <= int(name[1:-1], 16) < 0xC0 else 2
    for number, text in added.items():
        doubled_counts[number] = 2 * len(text)
    # A smaller table fits better into the CPU cache.
    return doubled_counts.astype(np.min_scalar_type(int(doubled_counts.max())))


def _continuation_symbols() -> NDArray[np.bool_]:
    """Return whether each code point below 512 represents a UTF-8 continuation byte in byte-level BPE (bool `[512]`).

    Bytes that are printable in Latin-1 represent themselves; all other bytes are represented by characters from U+0100
    on (Radford et al. 2019, GPT-2's `bytes_to_unicode`).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    marks = np.zeros(512, dtype=np.bool_)
    for byte, point in (*zip(printable, printable, strict=True), *zip(unprintable, range(256, 512), strict=False)):
        marks[point] = 0x80 <= byte < 0xC0
    return marks


_WHITESPACE = ["\n\n", "\r\n", " \n ", *" \t\u00a0\u3000\u2028\x00\x1c\x7f"]
_NUMBERS = ["0", "12", "123", "1234567", "٣", "½", "Ⅷ"]
_WORDS = [
    _SPACE_SYMBOL,
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
_COMBINING = ["é", "é", "́", "ß", "İ", "ŉ", "ǆ", "Ω", "Ω", "ﬁ", "Ａ", "ё", "שָ", "يَ"]
_SCRIPTS = ["你好", "々", "が", "한국", "한", "ไทย", "नि", "𝒳"]
_JOINED = ["👍", "👍🏽", "👨\u200d👩", "🇩🇪", "️", "\u200b", "\ufeff", "\ufdd0", "\U0010ffff"]
_PIECES = (*_WHITESPACE, *_NUMBERS, *_WORDS, *_COMBINING, *_SCRIPTS, *_JOINED)


def difficult_texts(added_tokens: Sequence[str]) -> Iterator[str]:
    """Yield test texts with content that encoders often treat differently, e.g. whitespace and combining marks."""
    yield from ("", *_PIECES, *added_tokens[:2000])
    for run in (*"a \n1!\t", "ab ", "\u00e9", "\u4f60", "\U0001f44d"):
        yield from (run * count for count in (2, 3, 5, 17, 300))
    random = Random(0)  # noqa: S311  (not for security: the texts must be reproducible)
    pieces = [*_PIECES, *_PIECES, *added_tokens[:400]]
    for _ in range(1500):
        yield "".join(random.choices(pieces, k=random.randint(2, 12)))
    for _ in range(300):
        points = (random.choice((random.randrange(0xD800), random.randrange(0xE000, 0x110000))) for _ in range(20))
        yield "".join(map(chr, points))
