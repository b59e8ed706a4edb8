"""Convert texts to token ids with character offsets.

Every text is tokenized as a whole, exactly as the tokenizer does it; parts are never tokenized separately. The only
exception is deliberate: if the text of a row contains a control token (a user typed `<|im_end|>`), it is encoded as
plain text, because only the template may write control tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ftdata.errors import BadRow, TemplateRefused
from ftdata.tokenizing.batches import EncodedText, Encodings, RenderedBatch
from ftdata.tokenizing.encoders import Encoder, Encoders, ReferenceEncoder, describe_encoder_error
from ftdata.tokenizing.sentencepiece_encoder import SentencePieceEncoder, SentencePieceModel
from ftdata.types import Rendered

_PLACEHOLDERS = (0xF0000, 0xF8000, 0x100000, 0x108000)
"""First private-use character of the placeholders for control tokens (`ControlTokens.escape`); several candidates."""


_SHARED_PROPERTIES = frozenset(
    {"_stripped_backend", "_json_hash", "encoders", "added_tokens", "stripping_tokens", "size"}
)
"""Cached properties of a tokenizer that do not depend on its chat template or special tokens."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A fast tokenizer with its special tokens and chat template. An instance is equal only to itself.

    Attributes:
        name: folder, Hub id or `"<object>"`.
        json: the content of `tokenizer.json`.
        special_tokens: name (`bos_token`, `eos_token`, ...) -> text, as passed to templates.
        chat_template: Jinja source, or `None`.
        folder: the folder of its files; `None` for an object.
        sentencepiece: the SentencePiece model that encodes texts, if `tokenizers` cannot represent it exactly.
    """

    name: str
    json: bytes = field(repr=False)
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = field(default=None, repr=False)
    folder: Path | None = field(default=None, repr=False)
    sentencepiece: SentencePieceModel | None = field(default=None, repr=False)

    def with_template(self, chat_template: str | None, special_tokens: dict[str, str]) -> Tokenizer:
        """Return a copy with another chat template and special tokens, without loading the tokenizer again."""
        other = replace(self, chat_template=chat_template, special_tokens=special_tokens)
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name in _SHARED_PROPERTIES})
        return other

    @cached_property
    def _stripped_backend(self) -> tuple[tokenizers.Tokenizer, list[int]]:
        return _strip_backend(tokenizers.Tokenizer.from_buffer(self.json))

    @property
    def _backend(self) -> tokenizers.Tokenizer:
        return self._stripped_backend[0]

    @cached_property
    def encoders(self) -> Encoders:
        """The reference encoder and the fast encoder of this tokenizer."""
        if self.sentencepiece is not None:
            encoder = SentencePieceEncoder(self.sentencepiece, self.exact_tokens)
            return Encoders(self.json, encoder, is_fast_trusted=False)
        return Encoders(self.json, ReferenceEncoder(self._backend))

    def __getstate__(self) -> dict[str, Any]:
        # Other processes compute the cached properties again.
        return {field_.name: getattr(self, field_.name) for field_ in fields(self)}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer, its special tokens and its chat template, in hexadecimal."""
        parts = ("\0", json.dumps(self.special_tokens, sort_keys=True), "\0", self.chat_template or "")
        digest = self._json_hash.copy()
        digest.update("".join(parts).encode())
        return str(digest.hexdigest())

    @cached_property
    def _json_hash(self) -> Any:
        """The SHA-256 object of the vocabulary, which takes as long to compute as a small build."""
        return hashlib.sha256(self.json + (repr(self.sentencepiece).encode() if self.sentencepiece else b""))

    @cached_property
    def added_tokens(self) -> dict[str, tuple[int, bool]]:
        """A mapping from the text of each added token to a tuple: its id, and whether the token is special."""
        return {token.content: (id_, token.special) for id_, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def exact_tokens(self) -> dict[str, int]:
        """A mapping from the text of each added token that is found before the text is normalized to its id."""
        tokens = self._backend.get_added_tokens_decoder().items()
        return {token.content: id_ for id_, token in tokens if not token.normalized}

    @cached_property
    def stripping_tokens(self) -> frozenset[str]:
        """Added tokens that remove the whitespace around them (`lstrip` or `rstrip`)."""
        tokens = self._backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in tokens if token.lstrip or token.rstrip)

    @cached_property
    def bos_ids(self) -> NDArray[np.int32]:
        """An int32 array with the id of the BOS token. It is empty if the tokenizer does not prepend BOS to texts."""
        added_ids = self._stripped_backend[1]
        bos = self.token_to_id(self.special_tokens.get("bos_token"))
        # Other tokens around a text, such as BERT's [CLS] and T5's </s>, are not BOS tokens of causal models.
        return np.asarray([bos] if bos is not None and added_ids[:1] == [bos] else [], dtype=np.int32)

    @cached_property
    def size(self) -> int:
        """The largest token id plus 1."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def is_converted(self) -> bool:
        """Whether the folder contains the tokenizer in another format than `tokenizer.json`."""
        return self.folder is not None and not (self.folder / "tokenizer.json").is_file()

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens in the vocabulary. It is much faster to compute than `size`."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def unknown_token(self) -> str | None:
        """The token that represents text outside the vocabulary, or `None` if the tokenizer has no such token."""
        model = self._backend.model
        if isinstance(model, tokenizers.models.Unigram):
            return self._unigram_unknown_token
        return getattr(model, "unk_token", None)

    @cached_property
    def _unigram_unknown_token(self) -> str | None:
        id_ = json.loads(self.json)["model"].get("unk_id")
        return None if id_ is None else self._backend.id_to_token(id_)

    def token_to_id(self, token: str | None) -> int | None:
        """Return the id of a token, or `None` if it is not in the vocabulary."""
        return None if token is None else self._backend.token_to_id(token)

    def id_to_token(self, id_: int) -> str:
        """Return the vocabulary entry for a token id, e.g. `Ġare`. Return an empty string for an unknown id."""
        return self._backend.id_to_token(id_) or ""

    def decode(self, ids: Iterable[int], *, skip_control: bool = False) -> str:
        """Decode token ids to text. Omit special tokens if `skip_control` is true."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_control))

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Encode texts without adding special tokens.

        Whitespace that a token removes (`lstrip`, `rstrip`) belongs to no token.
        """
        tokens = self.encoders.encode(texts)
        return self._exclude_stripped_whitespace(texts, tokens) if self.stripping_tokens else tokens

    def _exclude_stripped_whitespace(self, texts: Sequence[str], tokens: Encodings) -> Encodings:
        """Correct the offsets of added tokens that strip the whitespace around them. Exclude this whitespace."""
        contents = {self.added_tokens[content][0]: content for content in self.stripping_tokens}
        positions = np.flatnonzero(np.isin(tokens.ids, list(contents)))
        numbers = np.searchsorted(tokens.token_bounds, positions, side="right") - 1
        starts, ends = tokens.starts.copy(), tokens.ends.copy()
        for position, number in zip(positions.tolist(), numbers.tolist(), strict=True):
            content, first = contents[int(tokens.ids[position])], int(tokens.text_bounds[number])
            text = texts[number][int(starts[position]) - first : int(ends[position]) - first]
            if (index := text.find(content)) >= 0:
                starts[position] += index
                ends[position] = starts[position] + len(content)
        return replace(tokens, starts=starts, ends=ends)


_LARGEST_ID = 1 << 26


def _strip_backend(backend: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, list[int]]:
    """Disable truncation, padding and post-processing of a tokenizer.

    A post-processor adds special tokens, which ftdata adds itself, and can remove whitespace from offsets.

    Returns:
        The tokenizer, and the ids that its post-processor adds to an empty text.

    Raises:
        TemplateRefused: the tokenizer is random or damaged, or has unsuitable added tokens.
    """
    if getattr(backend.model, "dropout", None):
        problem = f"the tokenizer skips BPE merges randomly (dropout={backend.model.dropout:g}), so its results vary"
        raise TemplateRefused("tokenizer_dropout", problem, hint="set dropout to null in tokenizer.json")
    if (largest := max(backend.get_added_tokens_decoder(), default=0)) > _LARGEST_ID:
        problem = f"the tokenizer is damaged: an added token has the id {largest:,}, expected at most {_LARGEST_ID:,}"
        raise TemplateRefused("bad_tokenizer", problem)
    _check_added_tokens(backend)
    backend.no_truncation()
    backend.no_padding()
    with describe_encoder_error():
        added_ids = backend.encode("", add_special_tokens=True).ids
    if backend.post_processor is not None:
        backend.post_processor = tokenizers.processors.Sequence([])
    return backend, added_ids


def _check_added_tokens(backend: tokenizers.Tokenizer) -> None:
    """Check that no added token changes ordinary text.

    Special tokens are omitted from decoded text, and tokens with `lstrip` or `rstrip` remove whitespace around them.
    Both are intended for control tokens, not for spaces, single characters or words.

    Raises:
        TemplateRefused: `ordinary_special_token`.
    """
    for id_, token in backend.get_added_tokens_decoder().items():
        text = token.content.strip()
        strips = (token.lstrip or token.rstrip) and is_ordinary(token.content)
        if strips or (token.special and len(text) < 2):
            raise TemplateRefused(
                "ordinary_special_token",
                f"the added token {token.content!r} (id {id_}) of the tokenizer is ordinary text, but "
                f"{'strips whitespace' if strips else 'is a special token'}, so texts that contain it would change",
                hint='in tokenizer.json, set "special", "lstrip" and "rstrip" of this token to false',
            )


def is_ordinary(token: str) -> bool:
    """Return whether a token can occur in ordinary text: whitespace, a single character, or an alphanumeric word."""
    text = token.strip()
    return len(text) < 2 or text.isalnum()


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_rendered(
    tokenizer: Tokenizer, batch: RenderedBatch, control: ControlTokens, policy: str
) -> tuple[Encodings, dict[int, BadRow]]:
    """Encode a batch of rendered texts. As `policy` requires, escape, reject or allow control tokens in row text.

    Args:
        tokenizer: the tokenizer.
        batch: rendered texts with their spans.
        control: the tokens that only the template may write.
        policy: how to handle control tokens in the text of a row: `"escape"` (encode as plain text), `"refuse"` or
            `"allow"` (encode as control tokens).

    Returns:
        The tokens of each text, and index of text -> `BadRow` for rejected texts: `lone_surrogate` or `control_tokens`.
    """
    texts = [rendered.text for rendered in batch]
    rejects: dict[int, BadRow] = {}
    try:
        tokens = tokenizer.encode(texts)
    except (UnicodeEncodeError, TypeError):
        error = BadRow("lone_surrogate", "the text contains a lone surrogate, which is not a valid character")
        rejects = {index: error for index, text in enumerate(texts) if not _is_encodable(text)}
        if not rejects:
            raise
        # Replacement characters keep the length of the text, so the offsets of all other texts stay valid.
        tokens = tokenizer.encode([text.encode(errors="replace").decode() for text in texts])
    if policy == "allow":
        return tokens, rejects
    # In most batches, all control tokens are template text, and no text needs to be examined.
    suspects = range(len(batch)) if policy == "refuse" else control.find_suspects(batch, tokens)
    escaped: dict[int, EncodedText] = {}
    for index in suspects:
        rendered = batch[index]
        if rendered.keep_control or index in rejects:
            continue
        template_matches, typed = control.find_matches(rendered)
        # A tokenizer that normalizes text can turn similar text into control tokens, so the ids are counted, too.
        if not typed and control.count(tokens[index].ids) <= control.count_expected(template_matches):
            continue
        if policy == "refuse":
            rejects[index] = BadRow(
                "control_tokens",
                f"the text of the row contains a control token{f': {typed[0].group()!r}' if typed else ''}",
                hint="set control_tokens='escape' to encode it as plain text",
            )
        elif isinstance(plain := control.escape(rendered), BadRow):
            rejects[index] = plain
        else:
            escaped[index] = plain
    return tokens.with_replacements(escaped), rejects


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens, such as `<|im_end|>`, of a tokenizer and template. Methods find and escape them in texts."""

    tokenizer: Tokenizer
    tokens: tuple[str, ...]

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """A pattern that matches any control token, or `None` if there are no control tokens."""
        return re.compile("|".join(map(re.escape, self.tokens))) if self.tokens else None

    @cached_property
    def _first_characters(self) -> tuple[str, ...]:
        return tuple(sorted({token[:1] for token in self.tokens}))

    def occurs_in(self, text: str) -> bool:
        """Return whether a text contains a control token."""
        # Searching for the first characters is much faster, and most texts contain none of them.
        for character in self._first_characters:
            if character in text:
                return self.pattern is not None and self.pattern.search(text) is not None
        return False

    def find_suspects(self, batch: RenderedBatch, tokens: Encodings) -> list[int]:
        """Return the indices of texts in which a control token or the unknown token overlaps text from the row."""
        if not self.tokens:
            return []
        low, high = self._widest_gap
        positions = np.flatnonzero((tokens.ids <= low) | (tokens.ids >= high))
        positions = positions[self._control_table.take(tokens.ids[positions], mode="clip")]
        starts, ends = batch.starts[batch.data], batch.ends[batch.data]
        next_spans = np.searchsorted(ends, tokens.starts[positions], side="right")
        is_typed = np.append(starts, np.iinfo(np.int64).max)[next_spans] < tokens.ends[positions]
        return sorted(set((np.searchsorted(tokens.token_bounds, positions[is_typed], side="right") - 1).tolist()))

    def find_lost_whitespace(self, batch: RenderedBatch, tokens: Encodings) -> list[int]:
        """Return the indices of texts in which a control token removes whitespace of row text (`lstrip`, `rstrip`)."""
        if not self.tokenizer.stripping_tokens:
            return []
        # A gap lies between the end of a token, or the start of its text, and the start of the next token.
        gap_starts = np.append(0, tokens.ends[:-1]) if len(tokens.ends) else tokens.ends
        gaps = np.flatnonzero(gap_starts < tokens.starts)
        starts, ends = batch.starts[batch.data], batch.ends[batch.data]
        next_spans = np.searchsorted(ends, gap_starts[gaps], side="right")
        is_row_text = np.append(starts, np.iinfo(np.int64).max)[next_spans] < tokens.starts[gaps]
        texts = np.searchsorted(tokens.token_bounds, gaps[is_row_text], side="right") - 1
        return sorted(set(texts.tolist()))

    def find_unknown(self, batch: RenderedBatch, tokens: Encodings) -> list[int]:
        """Return the indices of texts with characters that the tokenizer encodes as its unknown token."""
        unknown = self.tokenizer.unknown_token
        positions = np.flatnonzero(tokens.ids == self.tokenizer.token_to_id(unknown)) if unknown else np.empty(0, int)
        texts = np.searchsorted(tokens.token_bounds, positions, side="right") - 1
        with_unknown = set[int]()
        for position, number in zip(positions.tolist(), texts.tolist(), strict=True):
            first = int(tokens.text_bounds[number])
            start, end = int(tokens.starts[position]) - first, int(tokens.ends[position]) - first
            # The text of the token itself is no unknown character.
            if number not in with_unknown and batch[number].text[start:end].strip() != unknown:
                with_unknown.add(number)
        return sorted(with_unknown)

    def find_matches(self, rendered: Rendered) -> tuple[list[re.Match[str]], list[re.Match[str]]]:
        """Find the control tokens in a rendered text.

        Returns:
            The matches in template text, and the typed matches, which overlap the text of the row.
        """
        matches = list(self.pattern.finditer(rendered.text)) if self.pattern is not None else []
        spans = [span for span in rendered.spans if span.part.is_data]
        starts = np.fromiter((span.start for span in spans), np.int64, len(spans))
        ends = np.fromiter((span.end for span in spans), np.int64, len(spans))
        next_spans = np.searchsorted(ends, [match.start() for match in matches], side="right")
        is_typed = [
            index < len(spans) and bool(starts[index] < match.end())
            for match, index in zip(matches, next_spans, strict=True)
        ]
        template_matches = [match for match, typed in zip(matches, is_typed, strict=True) if not typed]
        return template_matches, [match for match, typed in zip(matches, is_typed, strict=True) if typed]

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """The ids of the control tokens (int32 `[tokens]`)."""
        return np.asarray([self.tokenizer.added_tokens[token][0] for token in self.tokens], dtype=np.int32)

    def count(self, ids: NDArray[np.int32]) -> int:
        """Count the control tokens in `ids`. The unknown token is not counted."""
        return int(np.count_nonzero(self.is_control(ids)))

    def is_control(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return for each id whether it is a control token (bool `[n]`). The result is false for the unknown token."""
        return self._counted_table.take(ids, mode="clip")

    def count_expected(self, template_matches: Iterable[re.Match[str]]) -> int:
        """Return the number of control tokens from the template. This number is expected in the encoded text."""
        ids = [self.tokenizer.added_tokens[match.group()][0] for match in template_matches]
        return self.count(np.asarray(ids, dtype=np.int32))

    def escape(self, rendered: Rendered) -> EncodedText | BadRow:
        """Encode a text. Control tokens from the template stay control tokens; control tokens from the row become text.

        Every control token of the template is replaced by a placeholder of the same length, made of private-use
        characters. A modified tokenizer has the placeholders as added tokens instead of the control tokens, so lengths
        and offsets do not change.

        Returns:
            The tokens, or a `BadRow` if the text cannot be escaped.
        """
        points = [ord(char) for char in set(rendered.text)]
        unused = (
            base for base in _PLACEHOLDERS if not any(base <= point < base + len(self.tokens) for point in points)
        )
        base = next(unused, None)
        if base is None:
            return BadRow(
                "control_tokens",
                "the control tokens cannot be escaped, because the text uses all four ranges of private-use characters",
            )
        template_matches, _ = self.find_matches(rendered)
        numbers = {token: number for number, token in enumerate(self.tokens)}
        pieces: list[str] = []
        end = 0
        for match in template_matches:
            pieces += rendered.text[end : match.start()], chr(base + numbers[match.group()]) * len(match.group())
            end = match.end()
        text = "".join([*pieces, rendered.text[end:]])
        encoder, id_map = _make_placeholder_encoder(self, base)
        (encoded,) = encoder.encode([text])
        ids = id_map[encoded.ids]
        if self.count(ids) != self.count_expected(template_matches):
            message = "the text contains a control token that cannot be escaped with this tokenizer"
            return BadRow("control_tokens", message, hint="remove the control token from the data")
        return EncodedText(ids, encoded.offsets, escaped=True)

    @cached_property
    def _widest_gap(self) -> tuple[int, int]:
        """The exclusive bounds of the largest range of ids without control tokens. Ids inside are skipped quickly."""
        edges = [-1, *sorted(self.ids.tolist()), self.tokenizer.vocabulary_size]
        return max(pairwise(edges), key=lambda pair: pair[1] - pair[0])

    @cached_property
    def _control_table(self) -> NDArray[np.bool_]:
        # The last element is false, and `take(mode="clip")` uses it for all larger ids.
        table = np.zeros(max(self.ids.tolist(), default=0) + 2, dtype=np.bool_)
        table[self.ids] = True
        return table

    @cached_property
    def _counted_table(self) -> NDArray[np.bool_]:
        table = self._control_table.copy()
        if self.tokenizer.unknown_token in self.tokens:
            table[self.tokenizer.token_to_id(self.tokenizer.unknown_token)] = False
        return table


@lru_cache(maxsize=8)
def _make_placeholder_encoder(control: ControlTokens, base: int) -> tuple[Encoder, NDArray[np.int32]]:
    """Create an encoder with placeholders instead of control tokens. Also return a table of the original ids."""
    placeholders = {token: chr(base + n) * len(token) for n, token in enumerate(control.tokens)}
    if control.tokenizer.sentencepiece is not None:
        exact = {placeholders.get(token, token): id_ for token, id_ in control.tokenizer.exact_tokens.items()}
        encoder = SentencePieceEncoder(control.tokenizer.sentencepiece, exact)
        return encoder, np.arange(control.tokenizer.size, dtype=np.int32)
    description = json.loads(control.tokenizer.json)
    description["post_processor"] = None
    for added in description["added_tokens"]:
        added["content"] = placeholders.get(added["content"], added["content"])
    backend, _ = _strip_backend(tokenizers.Tokenizer.from_str(json.dumps(description)))
    original_ids = {placeholders.get(token, token): id_ for token, (id_, _) in control.tokenizer.added_tokens.items()}
    added_tokens = backend.get_added_tokens_decoder()
    ids = np.arange(max(control.tokenizer.size, *added_tokens, 0) + 1, dtype=np.int32)
    for id_, token in added_tokens.items():
        ids[id_] = original_ids[token.content]
    return ReferenceEncoder(backend), ids


@lru_cache(maxsize=32)
def find_control_tokens(tokenizer: Tokenizer, template: str) -> ControlTokens:
    """Find the control tokens of a tokenizer that is used with a template.

    Control tokens are all special tokens, added tokens that strip whitespace, and added tokens in the template. Words
    that were added to the vocabulary are not control tokens, even if the template contains them.
    """
    control_tokens = (
        token
        for token, (_, special) in tokenizer.added_tokens.items()
        if token.strip()
        and (special or token in tokenizer.stripping_tokens or (token in template and not is_ordinary(token)))
    )
    return ControlTokens(tokenizer, tuple(sorted(control_tokens, key=lambda token: (-len(token), token))))
