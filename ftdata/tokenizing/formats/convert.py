"""Find a tokenizer without a `tokenizer.json` in a folder, and convert it.

The result is compared with the vendor's library on difficult texts, and refused if a text has other ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import tokenizers

from ftdata.errors import MissingDependency, TemplateRefused, describe_exception
from ftdata.storage import disk
from ftdata.tokenizing.encoders import difficult_texts
from ftdata.tokenizing.formats import bpe_ranks, sentencepiece_model, specification
from ftdata.tokenizing.formats.added_tokens import (
    check_named_tokens,
    check_stripping,
    merge_added_tokens,
    read_added_tokens,
)
from ftdata.tokenizing.formats.specification import ConversionError, make_added_token
from ftdata.tokenizing.sentencepiece_encoder import SentencePieceModel, parse_model

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

_PACKAGES = {"tekken": "mistral-common", "tiktoken": "tiktoken", "sentencepiece": "sentencepiece"}
"""Format -> the vendor's package. The extra with the package has the name of the format."""


class ConvertedTokenizer(NamedTuple):
    """A converted tokenizer.

    Attributes:
        json: the content of `tokenizer.json`.
        special_tokens: name (`bos_token`, `eos_token`, ...) -> text.
        sentencepiece: the model that encodes texts instead, if `tokenizers` cannot represent it exactly.
    """

    json: bytes
    special_tokens: dict[str, str]
    sentencepiece: SentencePieceModel | None = None


def convert_folder(folder: Path, config: Mapping[str, Any]) -> ConvertedTokenizer | None:
    """Convert the tokenizer in a folder. Return `None` if the folder contains no tokenizer of a known format.

    Args:
        folder: the folder.
        config: the content of `tokenizer_config.json`. `added_tokens_decoder` contains the control tokens of a tiktoken
            file, `add_bos_token` determines whether texts begin with BOS (by default, they do, except for tiktoken
            files), and `legacy` whether SentencePiece adds a space after control tokens, too.

    Raises:
        TemplateRefused: `tokenizer_format`, if the tokenizer cannot be converted exactly.
        MissingDependency: `no_tokenizer_library`, if the vendor's library is not installed.
    """
    file = find_vendor_file(folder)
    if file is None:
        return None
    content = file.read_bytes()
    kind = _find_format(file, content)
    package = _PACKAGES[kind]
    try:
        library = version(package)
    except PackageNotFoundError:
        problem = f"{file} is a tokenizer in the format of {package}, which is not installed"
        raise MissingDependency("no_tokenizer_library", problem, hint=f"pip install 'ftdata[{kind}]'") from None
    key = _make_key(file, content, config, f"{package} {library} tokenizers {tokenizers.__version__}")
    if (cached := _read_cached(key, content)) is not None:
        return cached
    try:
        converted = _convert(kind, file, content, config)
    except ConversionError as error:
        raise TemplateRefused("tokenizer_format", f"{file} cannot be used: {error.problem}", hint=error.hint) from None
    _write_cached(key, converted)
    return converted


def find_vendor_file(folder: Path) -> Path | None:
    """Return the file with the tokenizer in a folder without a `tokenizer.json`, or `None`."""
    patterns = ("tekken.json", "*.tiktoken", "tiktoken.model", "tokenizer.model", "tokenizer.model.v*")
    for pattern in patterns:
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(files) > 1:
            problem = f"{folder} contains several tokenizers: {', '.join(path.name for path in files)}"
            raise TemplateRefused("tokenizer_format", problem, hint="keep only the file of the model")
        if files:
            return files[0]
    return None


def _find_format(file: Path, content: bytes) -> str:
    if file.suffix == ".json":
        return "tekken"
    return "tiktoken" if file.suffix == ".tiktoken" or _TIKTOKEN_LINE.match(content) else "sentencepiece"


def _convert(kind: str, file: Path, content: bytes, config: Mapping[str, Any]) -> ConvertedTokenizer:
    converters = {"tekken": _convert_tekken, "tiktoken": _convert_tiktoken, "sentencepiece": _convert_sentencepiece}
    try:
        return converters[kind](file, content, config)
    except ConversionError:
        raise
    except BaseException as error:
        # Rust panics, which damaged files cause, are only `BaseException`s.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        problem = f"it is damaged, or its version is not supported: {describe_exception(error)}"
        raise ConversionError(problem, "download the file again") from None


def _convert_tiktoken(file: Path, content: bytes, config: Mapping[str, Any]) -> ConvertedTokenizer:
    import tiktoken

    ranks, pattern = bpe_ranks.read_ranks(content), bpe_ranks.find_pattern(file)
    if not ranks:
        raise ConversionError("it is empty", "download the file again")
    declared = read_added_tokens(config, file.parent)
    added_tokens = merge_added_tokens(bpe_ranks.known_added_tokens(file, len(ranks)), declared)
    if not added_tokens:
        problem = "it contains no control tokens, and tokenizer_config.json has no added_tokens_decoder"
        raise ConversionError(problem, "add the ids and texts of the control tokens to added_tokens_decoder")
    spec = bpe_ranks.convert_ranks(ranks, pattern, added_tokens)
    vendor = tiktoken.Encoding(file.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return _finish(spec, config, {}, vendor.encode_ordinary, adds_bos=False)


def _convert_tekken(file: Path, content: bytes, config: Mapping[str, Any]) -> ConvertedTokenizer:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    ranks, pattern, first_id = bpe_ranks.read_tekken(content)
    vendor = Tekkenizer.from_file(str(file))
    tokens = [vendor.id_to_piece(id_) for id_ in range(first_id)]
    own = [make_added_token(id_, token) for id_, token in enumerate(tokens)]
    added_tokens = merge_added_tokens(own, read_added_tokens(config, file.parent))
    special_tokens = {"bos_token": tokens[vendor.bos_id], "eos_token": tokens[vendor.eos_id]}
    spec = bpe_ranks.convert_ranks(ranks, pattern, added_tokens, first_id=first_id)
    return _finish(spec, config, special_tokens, lambda text: vendor.encode(text, bos=False, eos=False), adds_bos=True)


def _convert_sentencepiece(file: Path, content: bytes, config: Mapping[str, Any]) -> ConvertedTokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        model = parse_model(content)
        if not model.pieces:
            raise ValueError("it contains no pieces")
        vendor = SentencePieceProcessor(model_proto=content)
    except Exception as error:  # noqa: BLE001  (protobuf and sentencepiece raise several types for damaged files)
        problem = f"it is neither a SentencePiece model nor a tiktoken file: {' '.join(str(error).split())[:200]}"
        raise ConversionError(problem, "download the file again") from None
    sentencepiece_model.check_model(model)
    # Mistral's own folders have no configuration. Its library encodes each section as a text of its own.
    prefix_once = (file.parent / "tokenizer_config.json").is_file() and not config.get("legacy", False)
    if config.get("add_prefix_space") is False:
        model.normalizer_spec.add_dummy_prefix = False
        content = model.SerializeToString()
        vendor = SentencePieceProcessor(model_proto=content)
    declared = read_added_tokens(config, file.parent)
    spec = sentencepiece_model.convert_sentencepiece(model, declared, prefix_once=prefix_once)
    special_tokens = {
        name: vendor.id_to_piece(id_)
        for name, id_ in (
            ("bos_token", vendor.bos_id()),
            ("eos_token", vendor.eos_id()),
            ("unk_token", vendor.unk_id()),
        )
        if id_ >= 0
    }
    if not sentencepiece_model.has_equivalent(model, prefix_once=prefix_once):
        check_stripping(spec["added_tokens"])
        converted = _finish(spec, config, special_tokens, None, adds_bos=True)
        return converted._replace(sentencepiece=SentencePieceModel(content, prefix_once))
    # A space is added before every text that does not begin with a space.
    prefix = "a" if prefix_once else ""
    return _finish(spec, config, special_tokens, vendor.encode, adds_bos=True, prefix=prefix)


def _finish(
    spec: dict[str, Any],
    config: Mapping[str, Any],
    special_tokens: dict[str, str],
    encode: Callable[[str], Sequence[int]] | None,
    *,
    adds_bos: bool,
    prefix: str = "",
) -> ConvertedTokenizer:
    """Add the BOS token, compare the converted tokenizer with the vendor's library, and return it.

    Args:
        spec: the content of `tokenizer.json`.
        config: the content of `tokenizer_config.json`.
        special_tokens: the special tokens that the tokenizer names.
        encode: encodes a text with the vendor's library; `None` if the library encodes the texts anyway.
        adds_bos: whether texts begin with BOS if the configuration does not say so.
        prefix: text before each compared text.
    """
    texts = {token["content"]: token["id"] for token in spec["added_tokens"]}
    named = config.get("bos_token") or special_tokens.get("bos_token")
    bos = named.get("content") if isinstance(named, Mapping) else named
    if isinstance(bos, str) and bos in texts and config.get("add_bos_token", adds_bos):
        spec["post_processor"] = specification.prepend_token(bos, texts[bos])
    spec_json = orjson.dumps(spec)
    backend = tokenizers.Tokenizer.from_buffer(spec_json)
    _check_added_tokens(backend, texts)
    check_named_tokens(config, backend.get_vocab(with_added_tokens=True))
    if encode is not None:
        _compare(backend, encode, [*texts], prefix)
    return ConvertedTokenizer(spec_json, special_tokens)


def _check_added_tokens(backend: tokenizers.Tokenizer, added_tokens: Mapping[str, int]) -> None:
    """Check that the added tokens have their ids, and that none of them is a word, which ordinary text could contain.

    Raises:
        ConversionError: an added token has another id or is a word.
    """
    hint = "correct added_tokens_decoder in tokenizer_config.json"
    for text, id_ in added_tokens.items():
        if (actual := backend.token_to_id(text)) != id_:
            raise ConversionError(
                f"the control token {text!r} has the id {id_}, but the text has the id {actual}", hint
            )
        if getattr(backend.model, "ignore_merges", False) and len(backend.pre_tokenizer.pre_tokenize_str(text)) < 2:
            raise ConversionError(f"the control token {text!r} is a word, so ordinary text could contain it", hint)


def _compare(
    backend: tokenizers.Tokenizer, encode: Callable[[str], Sequence[int]], added_tokens: Sequence[str], prefix: str
) -> None:
    """Compare the ids of difficult texts. The vendors' libraries never read control tokens from a text."""
    pattern = re.compile("|".join(map(re.escape, added_tokens)) or r"(?!)")
    texts = [prefix + text for text in difficult_texts([]) if not pattern.search(text)]
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        if encoding.ids != list(encode(text)):
            problem = f"the text {text[:40]!r} gets other ids than from the library of its vendor"
            raise ConversionError(problem, "report the model, or use a tokenizer.json from its vendor")


def _make_key(file: Path, content: bytes, config: Mapping[str, Any], versions: str) -> str:
    """Return a hash of everything that determines a converted tokenizer."""
    digest = hashlib.sha256(f"{file.name} {versions} {json.dumps(config, sort_keys=True, default=str)}".encode())
    code = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "encoders.py"]
    digest.update(str(file.with_name("tokenizer_config.json").is_file()).encode())
    for path in (*code, *sorted(file.parent.glob("tokenization_*.py")), *file.parent.glob("added_tokens.json")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(content)
    return digest.hexdigest()


def _read_cached(key: str, content: bytes) -> ConvertedTokenizer | None:
    """Return a cached tokenizer whose hash is correct, or `None`. The file of the tokenizer has the given content."""
    root = disk.cache_root()
    with suppress(OSError, ValueError, TypeError):
        data = disk.read_regular_file(root / "tokenizers" / key) if root else b""
        digest, _, body = data.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() == digest:
            facts, _, spec = body.partition(b"\n")
            special_tokens, prefix_once = json.loads(facts)
            model = None if prefix_once is None else SentencePieceModel(content, prefix_once)
            return ConvertedTokenizer(spec, special_tokens, model)
    return None


def _write_cached(key: str, converted: ConvertedTokenizer) -> None:
    if (root := disk.cache_root()) is not None:
        prefix_once = converted.sentencepiece.prefix_once if converted.sentencepiece else None
        body = json.dumps([converted.special_tokens, prefix_once]).encode() + b"\n" + converted.json
        disk.write_cache_file(root / "tokenizers" / key, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
