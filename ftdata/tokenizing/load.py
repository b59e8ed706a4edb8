"""Load tokenizers: from a folder, the hub, or an object of `transformers` or `tokenizers`."""

from __future__ import annotations

import json
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import tokenizers

from ftdata.errors import HubError, TemplateRefused, UsageError, suggest_names
from ftdata.storage import disk
from ftdata.tokenizing.encoders import describe_encoder_error
from ftdata.tokenizing.tokenizer import Tokenizer, _bare


def load_tokenizer(tokenizer: Any, *, thorough: bool = True) -> Tokenizer:
    """Load a tokenizer without importing transformers. What was loaded before is reused if its content is the same.

    Args:
        tokenizer: a folder with `tokenizer.json`, a hub id, or a `transformers` or `tokenizers` object.
        thorough: write an object out to see whether it has changed since it was loaded (0.1 to 0.4 s for large
            vocabularies). `False` looks at everything but its merges and vocabulary, of which a sample is compared.

    Raises:
        UsageError: there is no such folder, or the object is no fast tokenizer.
        TemplateRefused: the tokenizer cannot be used for any row.
        HubError: a hub id that cannot be downloaded.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return _from_content("<object>", tokenizer.to_str().encode(), _special_tokens({}, tokenizer), None)
    if isinstance(getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer):
        return _from_transformers(tokenizer, thorough=thorough)
    if not isinstance(tokenizer, str | Path):
        raise UsageError(
            "tokenizer_type",
            f"a {type(tokenizer).__name__} is no fast tokenizer",
            hint="pass a folder, a hub id, or a tokenizer with a tokenizer.json",
        )
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else _download(str(tokenizer))
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(
            "no_tokenizer",
            f"{folder} holds no tokenizer.json",
            hint="save a fast tokenizer into it: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return _from_folder(folder, str(tokenizer))


_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

_MAX_LOADED = 8
_loaded: OrderedDict[tuple[str, ...], Tokenizer] = OrderedDict()
"""The tokenizers that were used last, by the content that they were made of."""

_states: WeakKeyDictionary[Any, tuple[Any, Tokenizer]] = WeakKeyDictionary()
"""Of objects of transformers: the state in which they were last loaded, and what was loaded."""

_SAMPLE = (
    "The quick brown fox: 0123456789, x = [f(y) for y in {1: 2}]\n\tÄrger, œuvre, привет, 你好世界, こんにちは, 🙂"
)


def _from_content(name: str, text: bytes, special_tokens: dict[str, str], chat_template: str | None) -> Tokenizer:
    """Return the tokenizer of this content: the object that was made of it before, if it is among the last ones."""
    digest = disk.hash_bytes(text)
    key = (digest, name, json.dumps(special_tokens, sort_keys=True), chat_template or "", str(chat_template is None))
    if key not in _loaded:
        alike = next((known for (other, *_), known in _loaded.items() if other == digest), None)
        if alike is not None and alike.name == name:
            _loaded[key] = alike.with_template(chat_template, special_tokens)
        else:
            _loaded[key] = Tokenizer(name, text, special_tokens, chat_template)
        if len(_loaded) > _MAX_LOADED:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    return _loaded[key]


def _from_transformers(tokenizer: Any, *, thorough: bool) -> Tokenizer:
    special_tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    backend = tokenizer.backend_tokenizer
    state = _state(backend)
    known, loaded = _states.get(tokenizer, (None, None))
    if thorough or loaded is None or known != state:
        name = getattr(tokenizer, "name_or_path", "") or "<object>"
        loaded = _from_content(name, backend.to_str().encode(), special_tokens, template)
    elif (loaded.special_tokens, loaded.chat_template) != (special_tokens, template):
        loaded = _from_content(loaded.name, loaded.json, special_tokens, template)
    _states[tokenizer] = state, loaded
    return loaded


_TOKEN_SETTINGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def _state(backend: tokenizers.Tokenizer) -> tuple[Any, ...]:
    """Return all that can be changed in a tokenizer but its vocabulary and merges, and what these make of a sample."""
    added = backend.get_added_tokens_decoder()
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    settings = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
                "ignore_merges", "max_input_chars_per_word")  # fmt: skip
    return (
        backend.get_vocab_size(with_added_tokens=True),
        tuple(None if part is None else part.__getstate__() for part in parts),
        tuple(getattr(backend.model, name, None) for name in settings),
        tuple(
            (id_, token.content, *(getattr(token, name) for name in _TOKEN_SETTINGS)) for id_, token in added.items()
        ),
        tuple(backend.encode(_SAMPLE, add_special_tokens=False).ids),
    )


def _from_folder(folder: Path, name: str) -> Tokenizer:
    file = folder / "tokenizer.json"
    text = file.read_bytes()
    config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    template = _chat_template(folder, config)
    digest = disk.hash_bytes(text)
    alike = next((known for (other, *_), known in _loaded.items() if other == digest), None)
    if alike is not None:
        return _from_content(name, text, _special_tokens(config, alike._plain), template)
    try:
        with describe_encoder_error():
            backend = tokenizers.Tokenizer.from_buffer(text)
        bare = _bare(backend)
    except TemplateRefused as error:
        raise TemplateRefused(error.code, f"{file} cannot be used: {error.message}", hint=error.hint) from None
    loaded = _from_content(name, text, _special_tokens(config, backend), template)
    # Loading a large vocabulary once more would take most of a preview.
    loaded.__dict__["_backend"] = bare
    return loaded


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise TemplateRefused("bad_tokenizer", f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise TemplateRefused("bad_tokenizer", f"{path} holds a {type(found).__name__}, expected an object")
    return {key: value for key, value in found.items() if value is not None}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise TemplateRefused("bad_tokenizer", f"{file} is not UTF-8 text: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        with suppress(LookupError, TypeError):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        told = f"chat_template is a {type(template).__name__}, expected text, or a list of names and templates"
        raise TemplateRefused("bad_tokenizer", f"{folder / 'tokenizer_config.json'}: {told}")
    return template


def _special_tokens(config: dict[str, Any], backend: tokenizers.Tokenizer) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        if key.endswith("_token") and not key.startswith(("add_", "use_")):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and backend.token_to_id(text) is not None:
                found[key] = text
    return found


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        parent = Path(name).parent
        beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        raise UsageError(
            "no_tokenizer", f"no folder {name}", hint=suggest_names(Path(name).name, beside) if beside else ""
        )
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES))
    except Exception as error:  # noqa: BLE001  (the hub client raises many kinds; all mean that nothing came)
        raise HubError(
            "hub_tokenizer",
            f"no folder {name}, and it cannot be had from the hub: {error}".splitlines()[0],
            hint="check the name, HF_TOKEN and HF_ENDPOINT, or pass a local folder",
        ) from None
    return Path(folder)
