"""Convert tiktoken and tekken files: byte-level BPE whose merges are given by the ranks of the tokens."""

from __future__ import annotations

import ast
import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from ftdata.tokenizing.formats.specification import ConversionError, make_added_token, make_specification

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

_ENDINGS = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")

_QWEN = "|".join(
    (_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", *_ENDINGS)
)  # fmt: skip

_CL100K = "|".join(
    (_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", *_ENDINGS)
)  # fmt: skip

_O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + "?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + "?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", *_ENDINGS,
    )
)  # fmt: skip

PATTERNS = {"qwen": _QWEN, "cl100k_base": _CL100K, "o200k_base": _O200K}
"""Name of a tiktoken file -> the pattern with which it divides a text into words."""

_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
"""The control tokens of Qwen 1, which are constants in its code."""

_PATTERN_NAME = re.compile(r"(?:\w*_)?pat(?:tern)?(?:_?str)?", re.IGNORECASE)

_POSSESSIVE = re.compile(r"(\\[pP]\{\w+\}|\\.|\[\^?(?:\\.|[^\]\\])*\])|([?*+]|\{\d+(?:,\d*)?\})\+")
"""An escape or a character class, which stay as they are; or a quantifier with the `+` that makes it possessive."""


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Read a tiktoken file. Each line contains a token in base64, a space, and its rank, which is also its id.

    Raises:
        ConversionError: a line has another form.
    """
    ranks = dict[bytes, int]()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            problem = f"line {number} is {line[:40]!r}, expected a token in base64 and its rank"
            raise ConversionError(problem, "download the file again") from None
    return ranks


def find_pattern(file: Path) -> str:
    """Return the pattern with which a tiktoken file divides a text into words.

    The file does not contain the pattern. It is found by the name of the file, or it is read from the code of the
    tokenizer in the same folder (`tokenization_*.py`), which is parsed and never executed.

    Raises:
        ConversionError: no pattern is found, or several.
    """
    if (pattern := PATTERNS.get(file.stem.lower())) is not None:
        return pattern
    patterns = {
        pattern
        for path in sorted(file.parent.glob("tokenization_*.py"))
        for pattern in _read_patterns(path.read_text("utf-8", errors="replace"))
    }
    if len(patterns) == 1:
        return patterns.pop()
    found = f"{len(patterns)} different patterns" if patterns else "no pattern (a constant such as pat_str)"
    problem = f"it does not contain its regular expression, and the files tokenization_*.py contain {found}"
    hint = f"add the vendor's tokenization_*.py, or name the file {', '.join(f'{name}.tiktoken' for name in PATTERNS)}"
    raise ConversionError(problem, hint)


def known_added_tokens(file: Path, size: int) -> list[dict[str, Any]]:
    """Return the control tokens of a file of Qwen 1. Other files have their control tokens in the configuration.

    Args:
        file: the tiktoken file.
        size: number of the other tokens, which is the id of the first control token.
    """
    return [
        make_added_token(size + number, token)
        for number, token in enumerate(_QWEN_TOKENS)
        if file.stem.lower() == "qwen"
    ]


def _read_patterns(source: str) -> set[str]:
    """Return the constant patterns that Python code assigns to names such as `pat_str` and `PAT_STR`."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    patterns = set()
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = [target.id if isinstance(target, ast.Name) else getattr(target, "attr", "") for target in targets]
        if any(map(_PATTERN_NAME.fullmatch, names)) and isinstance(node, ast.Assign | ast.AnnAssign):
            text = _evaluate(node.value)
            # A short constant is not the pattern of a tokenizer.
            if text is not None and r"\s" in text:
                patterns.add(text)
    return patterns


def _evaluate(node: ast.expr | None) -> str | None:
    """Evaluate a constant text: a literal, a sum, or `"|".join([...])`. Return `None` for any other expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _evaluate(node.left), _evaluate(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        separator = _evaluate(node.func.value)
        items = node.args[0].elts if len(node.args) == 1 and isinstance(node.args[0], ast.List | ast.Tuple) else None
        texts = None if items is None else [_evaluate(item) for item in items]
        if separator is not None and texts is not None and None not in texts:
            return separator.join(text for text in texts if text is not None)
    return None


def convert_ranks(
    ranks: Mapping[bytes, int], pattern: str, added_tokens: Sequence[Mapping[str, Any]], *, first_id: int = 0
) -> dict[str, Any]:
    """Return the content of `tokenizer.json` for a vocabulary with ranks.

    tiktoken repeatedly merges the adjacent tokens whose concatenation has the lowest rank. `tokenizers` merges pairs
    in the order of a list, so each token contributes all pairs of tokens of which it is the concatenation.

    Args:
        ranks: token -> rank.
        pattern: the regular expression that divides a text into words.
        added_tokens: the added tokens, as in `tokenizer.json`.
        first_id: id of the token with rank 0.

    Raises:
        ConversionError: an added token has the id of another token.
    """
    used = {rank + first_id for rank in ranks.values()}
    for added in added_tokens:
        if added["id"] in used:
            problem = f"the added token {added['content']!r} has the id {added['id']}, which is the id of another token"
            raise ConversionError(problem, "correct added_tokens_decoder in tokenizer_config.json")
    symbols = byte_symbols()
    names = {token: "".join(map(symbols.__getitem__, token)) for token in ranks}
    merges = list[list[str]]()
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:middle], token[middle:]) for middle in range(1, len(token))]
        mergeable = [
            (ranks[left], ranks[right], left, right) for left, right in pairs if left in ranks and right in ranks
        ]
        merges += [[names[left], names[right]] for _, _, left, right in sorted(mergeable)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    # Oniguruma, which `tokenizers` uses, reads `{1,3}+` as a repetition. No pattern depends on possessive quantifiers.
    split = {
        "type": "Split",
        "pattern": {"Regex": _POSSESSIVE.sub(r"\1\2", pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    model = {
        "type": "BPE",
        # A word that is a token is not divided, even if no sequence of merges leads to it.
        "ignore_merges": True,
        # `tokenizers` numbers added tokens itself unless they are in the vocabulary.
        "vocab": {names[token]: rank + first_id for token, rank in ranks.items()}
        | {added["content"]: added["id"] for added in added_tokens},
        "merges": merges,
    }
    stages = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    return make_specification(model, added_tokens, pre_tokenizer=stages, decoder=byte_level)


def byte_symbols() -> list[str]:
    """Return the character that represents each byte in byte-level BPE (Radford et al. 2019, GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    points = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(points)) for byte in range(256)]


def read_tekken(content: bytes) -> tuple[dict[bytes, int], str, int]:
    """Read a tekken file of Mistral.

    Returns:
        Token -> rank, the pattern, and the number of special tokens, whose ids precede the other ids.

    Raises:
        ConversionError: the file has another form.
    """
    try:
        data = orjson.loads(content)
        config = data["config"]
        special_tokens = int(config["default_num_special_tokens"])
        size = int(config["default_vocab_size"]) - special_tokens
        ranks = {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in data["vocab"][:size]}
        return ranks, str(config["pattern"]), special_tokens
    except (ValueError, LookupError, TypeError) as error:
        raise ConversionError(f"it is not a tekken file: {error}", "download the file again") from None
