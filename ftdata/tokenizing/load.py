"""Load a tokenizer from a folder, from the Hub, or from an object of the packages `transformers` or `tokenizers`."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import tokenizers

from ftdata.errors import HubError, TemplateRefused, UsageError, suggest_path
from ftdata.tokenizing.encoders import describe_encoder_error
from ftdata.tokenizing.tokenizer import Tokenizer, _strip_backend


def load_tokenizer(tokenizer: Any, *, thorough: bool = True) -> Tokenizer:
    """Load a tokenizer without importing transformers. Reuse a tokenizer with the same content if it is already loaded.

    Args:
        tokenizer: a folder, a Hub id, or a `transformers` or `tokenizers` object. A folder contains `tokenizer.json`,
            or else `tekken.json`, a tiktoken file, or a SentencePiece model (`tokenizer.model`). For rows with images,
            a `transformers` object must have been loaded from a folder, which contains its image processor.
        thorough: whether to serialize an object to detect changes since it was last loaded (0.1 to 0.4 s for large
            vocabularies). `False` compares its settings and the tokens of a sample text instead.

    Raises:
        UsageError: the folder does not exist or contains no tokenizer, or the object is not a fast tokenizer.
        TemplateRefused: the tokenizer cannot be used for any row.
        MissingDependency: the tokenizer needs the library of its vendor, which is not installed.
        HubError: the tokenizer cannot be downloaded.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return _from_content("<object>", tokenizer.to_str().encode(), _special_tokens({}, tokenizer), None)
    # A processor of transformers contains a tokenizer, and has a chat template of its own.
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if isinstance(getattr(inner, "backend_tokenizer", None), tokenizers.Tokenizer):
        return _from_transformers(inner, getattr(tokenizer, "chat_template", None), thorough=thorough)
    if not isinstance(tokenizer, str | Path):
        problem = f"tokenizer is a {type(tokenizer).__name__}, expected a fast tokenizer"
        raise UsageError("tokenizer_type", problem, hint="pass a folder, a Hub id, or a fast tokenizer object")
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else _download(str(tokenizer))
    return _from_folder(folder, str(tokenizer))


_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "processor_config.json", "preprocessor_config.json",
)  # fmt: skip

VENDOR_FILES = (
    "tokenizer.model",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "tokenization_*.py",
    "added_tokens.json",
)
"""Files that are downloaded if a model has no `tokenizer.json`. Python files are read and never executed."""

_MAX_LOADED = 8
_loaded: OrderedDict[tuple[str, ...], Tokenizer] = OrderedDict()
"""The most recently used tokenizers, by content."""

_states: WeakKeyDictionary[Any, tuple[Any, Tokenizer]] = WeakKeyDictionary()
"""`transformers` object -> its state when it was last loaded, and the loaded tokenizer."""

_SAMPLE = (
    "The quick brown fox: 0123456789, x = [f(y) for y in {1: 2}]\n\tÄrger, œuvre, привет, 你好世界, こんにちは, 🙂"
)


def _from_content(
    name: str,
    text: bytes,
    special_tokens: dict[str, str],
    chat_template: str | None,
    json_hash: Any = None,
    folder: Path | None = None,
) -> Tokenizer:
    """Create a tokenizer from the content of its files, or return a cached tokenizer with the same content.

    `json_hash` is the SHA-256 object of `text`, if it was computed already.
    """
    json_hash = json_hash or hashlib.sha256(text)
    digest = json_hash.hexdigest()
    key = (digest, name, json.dumps(special_tokens, sort_keys=True), chat_template or "", str(chat_template is None))
    if key not in _loaded:
        cached = _find_loaded(digest)
        if cached is not None and cached.name == name:
            _loaded[key] = cached.with_template(chat_template, special_tokens)
        else:
            _loaded[key] = Tokenizer(name, text, special_tokens, chat_template, folder)
            _loaded[key].__dict__["_json_hash"] = json_hash
        if len(_loaded) > _MAX_LOADED:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    return _loaded[key]


def _find_loaded(digest: str) -> Tokenizer | None:
    """Return a cached tokenizer whose `tokenizer.json` has the hash `digest`. Its chat template may differ."""
    return next((tokenizer for (other, *_), tokenizer in _loaded.items() if other == digest), None)


def _from_transformers(tokenizer: Any, template: Any, *, thorough: bool) -> Tokenizer:
    special_tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    if isinstance(template, dict):
        template = template.get("default")
    backend = tokenizer.backend_tokenizer
    state = _read_state(backend)
    previous_state, loaded = _states.get(tokenizer, (None, None))
    name = getattr(tokenizer, "name_or_path", "") or "<object>"
    if thorough or loaded is None or previous_state != state or loaded.name != name:
        folder = Path(name) if Path(name).is_dir() else None
        loaded = _from_content(name, backend.to_str().encode(), special_tokens, template, folder=folder)
    elif (loaded.special_tokens, loaded.chat_template) != (special_tokens, template):
        loaded = _from_content(loaded.name, loaded.json, special_tokens, template, folder=loaded.folder)
    _states[tokenizer] = state, loaded
    return loaded


_SAMPLED_TOKENS = 1024

_TOKEN_SETTINGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def _read_state(backend: tokenizers.Tokenizer) -> tuple[Any, ...]:
    """Return a tokenizer's mutable settings and its tokens for a sample text, which show whether the tokenizer changed.

    Only a sample of the vocabulary is compared, because hashing all of it takes longer than encoding a conversation.
    """
    added, size = backend.get_added_tokens_decoder(), backend.get_vocab_size(with_added_tokens=True)
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    settings = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
                "ignore_merges", "max_input_chars_per_word")  # fmt: skip
    return (
        size,
        tuple(None if part is None else part.__getstate__() for part in parts),
        tuple(getattr(backend.model, name, None) for name in settings),
        tuple(
            (id_, token.content, *(getattr(token, name) for name in _TOKEN_SETTINGS)) for id_, token in added.items()
        ),
        tuple(backend.encode(_SAMPLE, add_special_tokens=False).ids),
        tuple(map(backend.id_to_token, range(0, size, size // _SAMPLED_TOKENS + 1))),
    )


def _from_folder(folder: Path, name: str) -> Tokenizer:
    file, model = folder / "tokenizer.json", None
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    if file.is_file():
        text = file.read_bytes()
    else:
        from ftdata.tokenizing.formats.convert import convert_folder, find_vendor_file

        converted = convert_folder(folder, config)
        if converted is None:
            problem = f"the folder {folder} contains no tokenizer.json, tokenizer.model, tekken.json or *.tiktoken"
            raise UsageError("no_tokenizer", problem, hint="copy the tokenizer files of the model to the folder")
        file = find_vendor_file(folder) or file
        text, config, model = converted.json, {**converted.special_tokens, **config}, converted.sentencepiece
    template = _read_chat_template(folder, config)
    json_hash = hashlib.sha256(text)
    if model is not None:
        backend = tokenizers.Tokenizer.from_buffer(text)
        return Tokenizer(name, text, _special_tokens(config, backend), template, folder, model)
    cached = _find_loaded(json_hash.hexdigest())
    if cached is not None:
        return _from_content(name, text, _special_tokens(config, cached._backend), template, json_hash, folder)
    try:
        with describe_encoder_error():
            backend = tokenizers.Tokenizer.from_buffer(text)
        stripped = _strip_backend(backend)
    except TemplateRefused as error:
        raise TemplateRefused(error.code, f"{file} cannot be used: {error.message}", hint=error.hint) from None
    loaded = _from_content(name, text, _special_tokens(config, backend), template, json_hash, folder)
    # Set the cached property: loading a large vocabulary again would take most of the time of a preview.
    loaded.__dict__["_stripped_backend"] = stripped
    return loaded


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise TemplateRefused("bad_tokenizer", f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise TemplateRefused("bad_tokenizer", f"{path} contains a {type(content).__name__}, expected a JSON object")
    return {key: value for key, value in content.items() if value is not None}


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise TemplateRefused("bad_tokenizer", f"{file} is not UTF-8 text: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        with suppress(LookupError, TypeError):
            template = {item["name"]: item["template"] for item in template}.get("default")
    if template is not None and not isinstance(template, str):
        problem = f"{folder / 'tokenizer_config.json'} contains a chat_template of type {type(template).__name__}"
        raise TemplateRefused("bad_tokenizer", f"{problem}, expected text, or a list of names and templates")
    return template


def _special_tokens(config: dict[str, Any], backend: tokenizers.Tokenizer) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for key, value in config.items():
        if key.endswith("_token") and not key.startswith(("add_", "use_")):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and backend.token_to_id(text) is not None:
                tokens[key] = text
    return tokens


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError("no_tokenizer", f"the folder {name} does not exist", hint=suggest_path(name))
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
        if not (folder / "tokenizer.json").is_file():
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_FILES, *VENDOR_FILES]))
    except Exception as error:  # noqa: BLE001  (the Hub client raises many types; each means that the download failed)
        raise HubError(
            "hub_tokenizer",
            f"the folder {name} does not exist, and the download from the Hub failed: {error}".splitlines()[0],
            hint=suggest_path(name) or "check the name, HF_TOKEN and HF_ENDPOINT, or pass a local folder",
        ) from None
    return folder
