"""Tokenise: texts -> ids, and the characters behind each id.

The whole text is tokenised once, exactly as the tokenizer alone would do it; pieces are never tokenised apart.
The one exception is on purpose: text of the row that spells a control token (`<|im_end|>` typed by a user) is
kept from becoming one, because control tokens come from the template only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ftdata.errors import BadRow, TemplateRefused
from ftdata.tokenizing.batches import EncodedText, Encodings, RenderedBatch
from ftdata.tokenizing.encoders import Encoders, ReferenceEncoder, describe_encoder_error
from ftdata.types import Part, Rendered

CONTROL_POLICIES = ("escape", "refuse", "allow")

_PLACEHOLDERS = (0xF0000, 0xF8000, 0x100000, 0x108000)
"""Private-use characters from one of these on stand for control tokens while typed ones are being escaped."""


_LOADED = frozenset({"_backend", "encoders", "added_tokens", "stripping_tokens", "size"})
"""What a tokenizer holds ready that does not depend on its chat template or special tokens."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A fast tokenizer with what ftdata needs of its configuration. Two are equal if they are the same object.

    Attributes:
        name: folder, hub id or `"<object>"`.
        json: the whole tokenizer, as `tokenizer.json` holds it.
        special_tokens: `bos_token`, `eos_token`, ... -> text, as templates see them.
        chat_template: Jinja text, or `None`.
    """

    name: str
    json: bytes = field(repr=False)
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = field(default=None, repr=False)

    def with_template(self, chat_template: str | None, special_tokens: dict[str, str]) -> Tokenizer:
        """Return the same tokenizer with another chat template, without loading it again."""
        other = replace(self, chat_template=chat_template, special_tokens=special_tokens)
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name in _LOADED})
        return other

    @cached_property
    def _backend(self) -> tuple[tokenizers.Tokenizer, list[int]]:
        return _bare(tokenizers.Tokenizer.from_buffer(self.json))

    @property
    def _plain(self) -> tokenizers.Tokenizer:
        return self._backend[0]

    @cached_property
    def encoders(self) -> Encoders:
        """What encodes texts."""
        return Encoders(self.json, ReferenceEncoder(self._plain))

    def __getstate__(self) -> dict[str, Any]:
        # What is held ready is made anew in other processes.
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids: the tokenizer, its special tokens and its chat template."""
        parts = ("\0", json.dumps(self.special_tokens, sort_keys=True), "\0", self.chat_template or "")
        found = hashlib.sha256(self.json)
        found.update("".join(parts).encode())
        return found.hexdigest()

    @cached_property
    def added_tokens(self) -> dict[str, tuple[int, bool]]:
        """Added token -> (id, is special)."""
        return {token.content: (id_, token.special) for id_, token in self._plain.get_added_tokens_decoder().items()}

    @cached_property
    def stripping_tokens(self) -> frozenset[str]:
        """Added tokens that take the whitespace around them out of the ids."""
        tokens = self._plain.get_added_tokens_decoder().values()
        return frozenset(token.content for token in tokens if token.lstrip or token.rstrip)

    @cached_property
    def bos_ids(self) -> NDArray[np.int32]:
        """What the tokenizer itself puts before a text (int32 `[0]` or `[1]`)."""
        given = self._backend[1]
        bos = self.id_of(self.special_tokens.get("bos_token"))
        # BERT's [CLS] or T5's </s> are not the beginning of a text that a causal model continues.
        return np.asarray([bos] if bos is not None and given[:1] == [bos] else [], dtype=np.int32)

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def count(self) -> int:
        """How many tokens there are, which is told far faster than `size`."""
        return self._plain.get_vocab_size(with_added_tokens=True)

    @property
    def unknown(self) -> str | None:
        """The token for what the vocabulary has not."""
        return getattr(self._plain.model, "unk_token", None)

    def id_of(self, token: str | None) -> int | None:
        """Return the id of a token, or `None`."""
        return None if token is None else self._plain.token_to_id(token)

    def piece(self, id_: int) -> str:
        """Return a token as the vocabulary spells it, e.g. `Ġare`; empty where there is none of that id."""
        return self._plain.id_to_token(id_) or ""

    def decode(self, ids: Iterable[int], *, skip_control: bool = False) -> str:
        """Return the text of ids, with or without special tokens."""
        return str(self._plain.decode(list(ids), skip_special_tokens=skip_control))

    def encode(self, texts: Sequence[str]) -> Encodings:
        """Encode texts as they stand; no special token is added."""
        return self.encoders.encode(texts)


_LARGEST_ID = 1 << 26


def _bare(backend: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, list[int]]:
    """Return a tokenizer that encodes texts and no more, and the ids that it would put around an empty one.

    A post-processor adds special tokens, which is done elsewhere, and may trim blanks from offsets.

    Raises:
        TemplateRefused: it gives other tokens each time.
    """
    if getattr(backend.model, "dropout", None):
        found = (
            f"leaves out merges by chance (dropout={backend.model.dropout:g}): the same text has other tokens each time"
        )
        raise TemplateRefused(
            "tokenizer_dropout", f"the tokenizer {found}", hint="set dropout to null in its tokenizer.json"
        )
    if (largest := max(backend.get_added_tokens_decoder(), default=0)) > _LARGEST_ID:
        told = f"the tokenizer is damaged: an added token has the id {largest:,}, for which no model has room"
        raise TemplateRefused("bad_tokenizer", told)
    _check_added_tokens(backend)
    backend.no_truncation()
    backend.no_padding()
    with describe_encoder_error():
        around = backend.encode("", add_special_tokens=True).ids
    if backend.post_processor is not None:
        backend.post_processor = tokenizers.processors.Sequence([])
    return backend, around


def _check_added_tokens(backend: tokenizers.Tokenizer) -> None:
    """Refuse added tokens that ordinary text contains, where they change what the text is.

    A special token is left out when text is decoded for people, and a token that strips takes the whitespace around it
    out of the ids. Both are meant for control tokens, not for spaces, single characters or words.

    Raises:
        TemplateRefused: `ordinary_special_token`.
    """
    for id_, token in backend.get_added_tokens_decoder().items():
        text = token.content.strip()
        strips = (token.lstrip or token.rstrip) and is_ordinary(token.content)
        if strips or (token.special and len(text) < 2):
            raise TemplateRefused(
                "ordinary_special_token",
                f"the tokenizer's added token {token.content!r} (id {id_}) is ordinary text, and "
                f"{'strips whitespace' if strips else 'is a special token'}: text that contains it would be changed",
                hint='in tokenizer.json, set "special", "lstrip" and "rstrip" of this token to false',
            )


def is_ordinary(token: str) -> bool:
    """Return whether ordinary text contains this token: whitespace, a single character, or letters and digits only."""
    text = token.strip()
    return len(text) < 2 or text.isalnum()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_rendered(
    tokenizer: Tokenizer, batch: RenderedBatch, control: ControlTokens, policy: str
) -> tuple[Encodings, dict[int, BadRow]]:
    """Encode a batch of rendered texts.

    Args:
        tokenizer: the tokenizer.
        batch: rendered texts with their spans.
        control: the tokens that only the template may write.
        policy: what to do where the row's own text spells one: `"escape"` (tokenise it as plain text),
            `"refuse"` or `"allow"` (let it become the control token).

    Returns:
        The tokens of each text, and a `BadRow` for those that are refused: `lone_surrogate` or `control_tokens`.
    """
    texts = [one.text for one in batch]
    refused: dict[int, BadRow] = {}
    try:
        tokens = tokenizer.encode(texts)
    except (UnicodeEncodeError, TypeError):
        broken = BadRow("lone_surrogate", "holds half of a surrogate pair, which is no character")
        refused = {index: broken for index, text in enumerate(texts) if not _is_text(text)}
        if not refused:
            raise
        # In these something of the same length stands for what cannot be encoded.
        tokens = tokenizer.encode([text.encode(errors="replace").decode() for text in texts])
    if policy == "allow":
        return tokens, refused
    # Where every control token stands in the template's own text, none is typed; which is so in most batches.
    suspect = range(len(batch)) if policy == "refuse" else control.foreign(batch, tokens)
    escaped: dict[int, EncodedText] = {}
    for index in suspect:
        one = batch[index]
        if one.keep_control or index in refused:
            continue
        own, typed = control.matches(one)
        # A tokenizer that normalises makes control tokens of what only resembles them: ids tell, not looks.
        if not typed and control.count(tokens[index].ids) <= control.expected(own):
            continue
        if policy == "refuse":
            refused[index] = BadRow(
                "control_tokens",
                f"the data spells a control token{f': {typed[0].group()!r}' if typed else ''}",
                hint="control_tokens='escape' tokenises it as plain text",
            )
        elif isinstance(plain := control.escape(one), BadRow):
            refused[index] = plain
        else:
            escaped[index] = plain
    return tokens.with_(escaped), refused


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a tokenizer and a template, and how to keep typed ones from becoming real."""

    tokenizer: Tokenizer
    tokens: tuple[str, ...]

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Finds control tokens in text, the longest first."""
        return re.compile("|".join(map(re.escape, self.tokens))) if self.tokens else None

    @cached_property
    def _beginnings(self) -> tuple[str, ...]:
        return tuple(sorted({token[:1] for token in self.tokens}))

    def spelled(self, text: str) -> bool:
        """Whether one of the tokens is in a text."""
        # To look for the letters that they begin with is faster by far, and most texts have not even these.
        for letter in self._beginnings:
            if letter in text:
                return self.pattern is not None and self.pattern.search(text) is not None
        return False

    def foreign(self, batch: RenderedBatch, tokens: Encodings) -> list[int]:
        """Return which texts have a control token, or an unknown one, that is not all the template's own text."""
        if not self.tokens:
            return []
        low, high = self._between
        found = np.flatnonzero((tokens.ids <= low) | (tokens.ids >= high))
        found = found[self._listed.take(tokens.ids[found], mode="clip")]
        starts, ends = batch.starts[batch.data], batch.ends[batch.data]
        after = np.searchsorted(ends, tokens.starts[found], side="right")
        typed = np.append(starts, np.iinfo(np.int64).max)[after] < tokens.ends[found]
        return sorted(set((np.searchsorted(tokens.bounds, found[typed], side="right") - 1).tolist()))

    def matches(self, rendered: Rendered) -> tuple[list[re.Match[str]], list[re.Match[str]]]:
        """Return the control tokens in the text: those that the template wrote, and those that the row's text spells.

        One that is only in part the row's text counts as the row's.
        """
        found = list(self.pattern.finditer(rendered.text)) if self.pattern is not None else []
        data = [span for span in rendered.spans if span.part is not Part.SCAFFOLD]
        starts = np.fromiter((span.start for span in data), np.int64, len(data))
        ends = np.fromiter((span.end for span in data), np.int64, len(data))
        after = np.searchsorted(ends, [match.start() for match in found], side="right")
        typed = [at < len(data) and bool(starts[at] < match.end()) for match, at in zip(found, after, strict=True)]
        own = [match for match, is_typed in zip(found, typed, strict=True) if not is_typed]
        return own, [match for match, is_typed in zip(found, typed, strict=True) if is_typed]

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """The ids of the tokens (int32)."""
        return np.asarray([self.tokenizer.added_tokens[token][0] for token in self.tokens], dtype=np.int32)

    def count(self, ids: NDArray[np.int32]) -> int:
        """Return how many ids are control tokens; the unknown token is no sign of one."""
        return int(np.count_nonzero(self.among(ids)))

    def among(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return which ids are of control tokens (bool `[n]`); the unknown token is no sign of one."""
        return self._sure.take(ids, mode="clip")

    def expected(self, own: Iterable[re.Match[str]]) -> int:
        """Return how many ids are control tokens where only the template's own become any."""
        return self.count(np.asarray([self.tokenizer.added_tokens[match.group()][0] for match in own], dtype=np.int32))

    def escape(self, rendered: Rendered) -> EncodedText | BadRow:
        """Encode with the template's control tokens real and typed ones plain.

        The template's are replaced by private-use characters, as many as the token has, which a shadow of the
        tokenizer knows instead of the tokens: so lengths, offsets and everything else stay as they were.
        """
        points = [ord(char) for char in set(rendered.text)]
        unused = (
            base for base in _PLACEHOLDERS if not any(base <= point < base + len(self.tokens) for point in points)
        )
        base = next(unused, None)
        if base is None:
            return BadRow("control_tokens", "typed control tokens stand beside private-use characters of every kind")
        own, _ = self.matches(rendered)
        numbers = {token: number for number, token in enumerate(self.tokens)}
        pieces: list[str] = []
        at = 0
        for match in own:
            pieces += rendered.text[at : match.start()], chr(base + numbers[match.group()]) * len(match.group())
            at = match.end()
        text = "".join([*pieces, rendered.text[at:]])
        shadow, ids = _shadow(self, base)
        (encoded,) = ReferenceEncoder(shadow).encode([text])
        real = ids[encoded.ids]
        if self.count(real) != self.expected(own):
            return BadRow(
                "control_tokens",
                "this tokenizer makes a control token of the typed text whatever we do",
                hint="take it out of the data",
            )
        return EncodedText(real, encoded.offsets, escaped=True)

    @cached_property
    def _between(self) -> tuple[int, int]:
        """Two numbers between which no id is listed, far apart: most have theirs before or after all other tokens."""
        listed = [-1, *sorted(self.ids.tolist()), self.tokenizer.count]
        return max(pairwise(listed), key=lambda pair: pair[1] - pair[0])

    @cached_property
    def _listed(self) -> NDArray[np.bool_]:
        # The last place stands for all larger ids.
        table = np.zeros(max(self.ids.tolist(), default=0) + 2, dtype=np.bool_)
        table[self.ids] = True
        return table

    @cached_property
    def _sure(self) -> NDArray[np.bool_]:
        table = self._listed.copy()
        if self.tokenizer.unknown in self.tokens:
            table[self.tokenizer.id_of(self.tokenizer.unknown)] = False
        return table


@lru_cache(maxsize=8)
def _shadow(control: ControlTokens, base: int) -> tuple[tokenizers.Tokenizer, NDArray[np.int32]]:
    """Return the tokenizer with placeholders for its control tokens, and the map from its ids to the real ones."""
    description = json.loads(control.tokenizer.json)
    description["post_processor"] = None
    names = {token: chr(base + n) * len(token) for n, token in enumerate(control.tokens)}
    for added in description["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    shadow, _ = _bare(tokenizers.Tokenizer.from_str(json.dumps(description)))
    real = {names.get(token, token): id_ for token, (id_, _) in control.tokenizer.added_tokens.items()}
    added_now = shadow.get_added_tokens_decoder()
    ids = np.arange(max(control.tokenizer.size, *added_now, 0) + 1, dtype=np.int32)
    for id_, token in added_now.items():
        ids[id_] = real[token.content]
    return shadow, ids


@lru_cache(maxsize=32)
def find_control_tokens(tokenizer: Tokenizer, template: str) -> ControlTokens:
    """Return the tokens that only this template may write: special ones, and added ones that it prints or that strip.

    Words that were added to the vocabulary are no control tokens, though the template may contain them.
    """
    found = (
        token
        for token, (_, special) in tokenizer.added_tokens.items()
        if token.strip()
        and (special or token in tokenizer.stripping_tokens or (token in template and not is_ordinary(token)))
    )
    return ControlTokens(tokenizer, tuple(sorted(found, key=lambda token: (-len(token), token))))
