"""The configuration file: one frozen typed object. Unknown keys are errors, with the nearest known one.

```yaml
data: data.json
model: google/gemma-2-2b
output_dir: out
max_length: 1024
packing: bfd
quantization: nf4
lora: {r: 16, alpha: 32}
train: {num_train_epochs: 3, learning_rate: 2.0e-4}
```
"""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import yaml

from ftdata.errors import UsageError, nearest


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA adapter (Hu et al. 2021): `alpha / r` scales what the two low-rank matrices add."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            message = (
                f"r {self.r}, alpha {self.alpha}, dropout {self.dropout}: expected r, alpha >= 1, 0 <= dropout < 1"
            )
            raise ValueError(message)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A training run, from data to model.

    The fields up to `template_kwargs` are those of `build_sft_dataset`. `train` holds any field of TRL's `SFTConfig`.
    """

    data: str | dict[str, Any] | list[str | dict[str, Any]]
    model: str
    output_dir: str
    tokenizer: str | None = None
    """`None`: the model's own."""
    template: str | None = None
    schema: str = "auto"
    columns: dict[str, str] | None = None
    train_on: str = "assistant"
    train_parts: list[str] | None = None
    turns: str = "auto"
    control_tokens: str = "escape"
    dropped: str = "refuse"
    unclosed: str = "flag"
    refuse: list[str] = []
    max_length: int | None = None
    overlong: str = "reject"
    packing: str | None = None
    where: str | None = None
    limit: int | None = None
    dedup: bool = False
    near: float | None = None
    sample: int | float | None = None
    shuffle: bool = False
    test_size: int | float | None = None
    on_bad_rows: str = "error"
    max_rejects: int | float | str | None = None
    seed: int = 0
    date: str | None = None
    template_kwargs: dict[str, Any] | None = None
    lora: Lora | None = None
    """`None`: all weights are trained, unless `quantization` asks for an adapter."""
    quantization: str | None = None
    """`"nf4"`: 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023)."""
    train: dict[str, Any] = {}

    def build_options(self) -> dict[str, Any]:
        """Return the fields that `build_sft_dataset` takes, besides data, tokenizer and output_dir."""
        names = (
            "template",
            "schema",
            "columns",
            "train_on",
            "train_parts",
            "turns",
            "control_tokens",
            "dropped",
            "unclosed",
            "refuse",
            "max_length",
            "overlong",
            "packing",
            "where",
            "limit",
            "dedup",
            "near",
            "sample",
            "shuffle",
            "test_size",
            "on_bad_rows",
            "max_rejects",
            "seed",
            "date",
            "template_kwargs",
        )
        return {name: getattr(self, name) for name in names}


class _Loader(yaml.SafeLoader):
    """YAML as 1.2 has it where 1.1 surprises: `1e-4` is a number, `no`, `off` and `yes` are words, dates are texts."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.removeprefix("tag:yaml.org,2002:") not in ("bool", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain values, without surprises.

    >>> parse_yaml("{learning_rate: 1e-4, save_strategy: no, steps: 3, quick: true}")
    {'learning_rate': 0.0001, 'save_strategy': 'no', 'steps': 3, 'quick': True}
    """
    return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)


def load_config(path: Path, **overrides: Any) -> Config:
    """Read a YAML or TOML file.

    Args:
        path: the file.
        overrides: fields to set over those of the file; `None` leaves the file's.

    Raises:
        UsageError: the file cannot be parsed, a key is unknown, or a value has the wrong type; names the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else parse_yaml(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise UsageError("config_file", f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError("config_file", f"{path} holds a {type(values).__name__}, expected keys and values")
    return make_config(values, where=str(path), **overrides)


def make_config(values: dict[str, Any], where: str = "", **overrides: Any) -> Config:
    """Make a configuration from plain values.

    Raises:
        UsageError: a key is unknown or missing, or a value has the wrong type.

    >>> make_config({"data": "d.json", "model": "m", "output_dir": "o", "max_lenght": 512})
    Traceback (most recent call last):
    ftdata.errors.UsageError: [config] unknown key 'max_lenght'. Fix: did you mean 'max_length'? known: columns, ...
    """
    # TOML has dates of its own.
    values = {name: str(value) if isinstance(value, datetime.date) else value for name, value in values.items()}
    given = {**values, **{name: value for name, value in overrides.items() if value is not None}}
    for name in ("lora", "train"):
        # What is overridden in a section leaves the rest of it as it was.
        if isinstance(overrides.get(name), dict) and isinstance(values.get(name), dict):
            given[name] = {**values[name], **overrides[name]}
    for kind, section in ((Config, given), (Lora, given.get("lora"))):
        for key in section if isinstance(section, dict) else ():
            if key not in kind.__struct_fields__:
                raise UsageError(
                    "config", f"unknown key {key!r}", where=where, hint=nearest(str(key), kind.__struct_fields__)
                )
    try:
        return msgspec.convert(given, Config)
    except msgspec.ValidationError as error:
        raise UsageError("config", str(error), where=where) from None
