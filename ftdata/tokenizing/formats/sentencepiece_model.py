"""Convert SentencePiece models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftdata.tokenizing.formats.added_tokens import merge_added_tokens
from ftdata.tokenizing.formats.specification import ConversionError, make_added_token, make_specification

_SPACE = "\u2581"
"""The character that represents a space in pieces."""

_UNIGRAM, _BPE = 1, 2
"""Values of `model_type`."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
"""Values of `type` of a piece. The value 6 is a byte."""


def check_model(model: Any) -> None:
    """Check the type and the settings of a SentencePiece model.

    Raises:
        ConversionError: the model has a type or a setting that is not supported.
    """
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise ConversionError("it is a word or character model", "use a BPE or unigram model")
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        problem = "it uses treat_whitespace_as_suffix, or it does not escape spaces"
        raise ConversionError(problem, "use a model with the default settings of SentencePiece")


def has_equivalent(model: Any, *, prefix_once: bool) -> bool:
    """Return whether `tokenizers` gives the same ids as SentencePiece for every text.

    Unigram models add rounded scores in another order, and `tokenizers` normalizes whole graphemes.
    """
    spec, kinds = model.normalizer_spec, {piece.type for piece in model.pieces}
    changes_text = bool(spec.precompiled_charsmap) or spec.remove_extra_whitespaces
    # `tokenizers` would add the space after user-defined pieces, too.
    can_prefix = prefix_once or not spec.add_dummy_prefix or _USER_DEFINED not in kinds
    return model.trainer_spec.model_type == _BPE and not changes_text and can_prefix and _UNUSED not in kinds


def convert_sentencepiece(model: Any, declared: Sequence[dict[str, Any]], *, prefix_once: bool) -> dict[str, Any]:
    """Return the content of `tokenizer.json` for a SentencePiece model.

    If `has_equivalent` is false, the content is used only for the vocabulary, and not to encode texts.

    Args:
        model: the parsed model, a `ModelProto`.
        declared: added tokens in the configuration.
        prefix_once: whether the space that SentencePiece adds before a text is added only at the start of the text, as
            in tokenizers of transformers with `legacy: false`, or also after each control token.

    Raises:
        ConversionError: a declared token has the id or the text of another token, or its id leaves a gap.
    """
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    # User-defined pieces are parts of ordinary text, and are found after the text is normalized.
    added_tokens = [
        make_added_token(id_, piece, special=kind != _USER_DEFINED, normalized=kind == _USER_DEFINED)
        for id_, (piece, _, kind) in enumerate(pieces)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    declared_ids = {token["id"] for token in declared}
    normal = [
        make_added_token(id_, piece, special=False)
        for id_, (piece, _, kind) in enumerate(pieces)
        if id_ in declared_ids and kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    added_tokens = merge_added_tokens([*added_tokens, *normal], declared)
    new_tokens = [token for token in added_tokens if token["id"] >= len(pieces)]
    is_bpe, byte_fallback = model.trainer_spec.model_type == _BPE, model.trainer_spec.byte_fallback
    section = (_make_bpe if is_bpe else _make_unigram)(pieces, byte_fallback=byte_fallback)
    if is_bpe:
        # `tokenizers` numbers added tokens itself unless they are in the vocabulary.
        section["vocab"] |= {token["content"]: token["id"] for token in new_tokens}
    elif [token["id"] for token in new_tokens] != [*range(len(pieces), len(pieces) + len(new_tokens))]:
        problem = f"the ids of its added tokens do not follow its {len(pieces):,} pieces without a gap"
        raise ConversionError(problem, "declare the tokens with the missing ids in added_tokens_decoder")
    adds_prefix, pre_tokenizer = model.normalizer_spec.add_dummy_prefix, None
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    if adds_prefix and prefix_once:
        pre_tokenizer = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}
    elif adds_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
    stages = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": pre_tokenizer,
        "decoder": _make_decoder(strips=adds_prefix),
    }
    return make_specification(section, added_tokens, **stages)


def _make_decoder(*, strips: bool) -> dict[str, Any]:
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strips:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def _make_bpe(pieces: list[tuple[str, float, int]], *, byte_fallback: bool) -> dict[str, Any]:
    """Return the section `model` of a BPE model.

    SentencePiece repeatedly merges the adjacent pieces whose concatenation has the highest score.
    """
    scores = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    numbers = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    merges = list[list[str]]()
    for piece in sorted(scores, key=lambda piece: (-scores[piece], numbers[piece])):
        pairs = [(piece[:middle], piece[middle:]) for middle in range(1, len(piece))]
        mergeable = [
            (numbers[left], numbers[right], left, right) for left, right in pairs if left in scores and right in scores
        ]
        merges += [[left, right] for _, _, left, right in sorted(mergeable)]
    unknown = next((piece for piece, _, kind in pieces if kind == _UNKNOWN), None)
    return {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "vocab": numbers,
        "merges": merges,
    }


def _make_unigram(pieces: list[tuple[str, float, int]], *, byte_fallback: bool) -> dict[str, Any]:
    """Return the section `model` of a unigram model."""
    unknown = next((id_ for id_, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN), None)
    vocabulary = [[piece, score] for piece, score, _ in pieces]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": byte_fallback}
