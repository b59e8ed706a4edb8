"""Read, check and write configuration files, which commands accept in place of data.

```yaml
data: data.json
template: null
mask: {train_on: assistant}
length: {max_length: 1024, overlong: drop_turns}
pack: bfd
model: google/gemma-2-2b
quantization: nf4
lora: {r: 16, alpha: 32}
train: {num_train_epochs: 3, learning_rate: 2.0e-4}
output_dir: out
```

`mask`, `length` and `pack` are optional groups. Their fields can also be top-level keys. An unknown key is an error,
and the error message suggests the closest known key.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from ftdata.errors import UsageError, describe_exception, shorten, suggest_names, suggest_path
from ftdata.options import OPTIONS, SOURCE_KEYS, check_source_keys, parse_list
from ftdata.redaction import drop_redacted, is_redacted, is_secret_name, redact, redact_text
from ftdata.yaml12 import check_plain_values, dump_yaml, parse_yaml

SECTIONS = {
    section: tuple(name for name, option in OPTIONS.items() if option.section == section)
    for section in ("mask", "length", "pack")
}
"""Section of a file -> its fields. A scalar in place of a section sets the first field."""

NULL: Any = object()
"""An override that sets a field to null; an override of `None` leaves the field unchanged."""


_FAMILIAR_NAMES = {
    name: f"use {key}"
    for key, names in {
        "data": "dataset datasets dataset_name train_file train_data data_path",
        "model": "base_model model_name model_name_or_path model_id",
        "template": "chat_template prompt_template",
        "max_length": "seq_length max_seq_length max_seq_len sequence_len cutoff_len block_size",
        "packing": "sample_packing",
        "test_size": "val_set_size val_size validation_split",
        "output_dir": "output out_dir save_dir",
        "train.per_device_train_batch_size": "batch_size train_batch_size micro_batch_size",
        "train.num_train_epochs": "epochs num_epochs",
        "train.learning_rate": "lr",
        "train.gradient_accumulation_steps": "gradient_accumulation grad_accum accumulation_steps",
        "train.warmup_steps": "warmup warmup_ratio",
        "lora.r": "lora_r lora_rank rank",
        "lora.alpha": "lora_alpha",
        "lora.dropout": "lora_dropout",
        "quantization: nf4": "load_in_4bit qlora quantization_bit",
    }.items()
    for name in names.split()
}
"""Key of another tool -> a hint with the key of ftdata."""

LORA_NAMES = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
"""Field of `peft.LoraConfig` -> its short name in ftdata."""


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The hyperparameters of a LoRA adapter (Hu et al. 2021).

    LoRA adds the product of two low-rank matrices to a weight matrix. The factor `alpha / r` scales the product.

    In a file, all fields share one level: `lora: {r: 16, use_dora: true}`.
    """

    r: int = 16
    """Rank of the two matrices."""
    alpha: int = 32
    """Scaling: the adapter's output is multiplied by `alpha / r`."""
    dropout: float = 0.0
    """Dropout probability of the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that receive an adapter."""
    extra_fields: dict[str, Any] = {}
    """Further fields of `peft.LoraConfig`, such as `use_dora`, `use_rslora`, `modules_to_save` or `bias`."""

    def fields(self) -> dict[str, Any]:
        """Return all fields as one flat dictionary with the keys of a configuration file."""
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name != "extra_fields"}
        return {**values, **self.extra_fields}

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            message = (
                f"r is {self.r}, alpha is {self.alpha} and dropout is {self.dropout}: "
                "expected r >= 1, alpha >= 1 and 0 <= dropout < 1"
            )
            raise ValueError(message)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The configuration of a training run.

    The fields from `template` to `template_kwargs` are options of `build_sft_dataset`.
    """

    data: str | dict[str, Any] | list[str | dict[str, Any]]
    """Training data: the folder of a build, or sources as for `ftdata build`: a path, a mapping, or a list."""
    model: str
    """Folder or Hub id of the base model."""
    output_dir: str
    """Run directory."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer. Default: the tokenizer of the model."""
    template: str | None = None
    task: str = "auto"
    schema: str = "auto"
    columns: dict[str, str] | None = None
    """Canonical column name -> name or path in the data."""
    train_on: str = "assistant"
    train_parts: list[str] | None = None
    turns: str = "auto"
    control_tokens: str = "escape"
    on_dropped_message: str = "reject"
    on_missing_stop: str = "flag"
    reject_flags: list[str] = []
    image_folder: str | None = None
    download_images: bool = False
    max_length: int | None = None
    overlong: str = "reject"
    packing: str | None = None
    where: str | None = None
    limit: int | None = None
    dedup: bool = False
    near_duplicate_threshold: float | None = None
    sample: int | float | None = None
    shuffle: bool = False
    test_size: int | float | None = None
    seed: int = 0
    on_bad_rows: str = "error"
    max_rejects: int | float | str | None = None
    date: str | None = None
    template_kwargs: dict[str, Any] | None = None
    """Template variables, such as `{enable_thinking: false}`; variables of a row take precedence."""
    lora: Lora | None = None
    """LoRA adapter. `None` trains all weights, unless `quantization` requires an adapter."""
    quantization: str | dict[str, Any] | None = None
    """`nf4` (QLoRA, Dettmers et al. 2023), `fp4`, `int8`, or fields of `BitsAndBytesConfig`; `None` for none."""
    train: dict[str, Any] = {}
    """Fields of TRL's `SFTConfig`, `DPOConfig`, `RewardConfig` or `KTOConfig`, depending on `task`."""
    early_stopping: int | None = None
    """Stop after this many evaluations without a lower loss; the best model is kept."""
    samples: int | list[str] = 3
    """Prompts that the model answers at every evaluation: a number of test prompts, or a list of prompts."""
    attn_implementation: str | None = None
    """Attention implementation, such as `"sdpa"` or `"flash_attention_2"`; `None` for the model's default."""
    trust_remote_code: bool = False
    """Whether to run Python code from the model repository."""

    def __post_init__(self) -> None:
        if self.early_stopping is not None and self.early_stopping < 1:
            message = f"early_stopping is {self.early_stopping}: expected a number of evaluations, at least 1"
            raise ValueError(message)
        if isinstance(self.samples, int) and self.samples < 0:
            message = f"samples is {self.samples}: expected a number of prompts, or a list of prompts"
            raise ValueError(message)

    def build_options(self) -> dict[str, Any]:
        """Return the values of all options of a build: the arguments for `ftdata.build.dataset.write_build`."""
        return {name: getattr(self, name) for name in OPTIONS}


_MAX_BYTES, _MAX_DOTS = 1 << 19, 1000
"""Limits of a configuration file: bytes, and dots of a line. A larger file is an attack, or not a configuration."""

_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*+\"|'[^']*+'")


def is_config_file(source: Any) -> bool:
    """Return whether `source` is the path of a configuration file, according to its suffix."""
    return isinstance(source, str | Path) and Path(source).suffix in (".yaml", ".yml", ".toml")


def load_config(path: str | Path, /, **overrides: Any) -> Config:
    """Read the configuration of a training run from a YAML or TOML file.

    Args:
        path: the file.
        overrides: fields that replace the fields of the file; `None` keeps the value of the file.

    Raises:
        UsageError: the file cannot be parsed, a key is unknown, or a value has the wrong type; the message
            contains the key.
    """
    path = Path(path)
    return make_config(_check_sources(read_config_file(path), path), str(path), **overrides)


def load_data_config(path: Path) -> Config:
    """Read a configuration file in which `model` and `output_dir` may be missing. A missing field has the value `""`.

    Commands that do not train need neither field.

    Raises:
        UsageError: as in `load_config`, or the field `data` contains a redacted secret.
    """
    config = make_config({"model": "", "output_dir": "", **_check_sources(read_config_file(path), path)}, str(path))
    check_data_not_redacted(config, path)
    return config


def check_data_not_redacted(config: Config, file: Path) -> None:
    """Check that the field `data` of a saved configuration contains no placeholder of a redacted secret.

    Raises:
        UsageError: the field contains a placeholder.
    """
    if is_redacted(config.data):
        message = "the data field contains a secret that was redacted when the file was saved"
        hint = "pass the data again, with its credentials: --set data=..."
        raise UsageError("redacted", message, where=str(file), hint=hint)


def _check_sources(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Check the keys of the sources in the contents of a configuration file, and return the contents."""
    data = values.get("data")
    for source in data if isinstance(data, list) else [data]:
        if isinstance(source, dict):
            check_source_keys(source, str(file))
    return values


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML, JSON or TOML file into a dictionary. Its values are dictionaries, lists and scalars.

    Raises:
        UsageError: the file cannot be read, or does not contain keys and values.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"the file has more than {_MAX_BYTES:,} bytes, so it is probably a data file")
        text = path.read_text(encoding="utf-8")
        values = _parse_toml(text) if path.suffix == ".toml" else parse_yaml(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        problem = f"{path} cannot be read: {_describe_problem(error)}"
        raise UsageError("config_file", problem, hint=suggest_path(path)) from None
    if not isinstance(values, dict):
        raise UsageError("config_file", f"{path} contains a {type(values).__name__}, expected keys and values")
    return values


def _parse_toml(text: str) -> Any:
    # tomllib takes quadratic time and memory for a key of many parts (`a.b.c`).
    if any(_QUOTED.sub("", line).count(".") > _MAX_DOTS for line in text.splitlines()):
        raise ValueError(f"a line has more than {_MAX_DOTS:,} dots outside strings")
    return check_plain_values(tomllib.loads(text))


def _describe_problem(error: Exception) -> str:
    """Describe a parser error. Leave out the quoted line of the file, because it may contain a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return redact_text(describe_exception(error, 2_000))
    mark = error.problem_mark or error.context_mark
    location = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return shorten(f"{location}{' '.join(filter(None, (error.context, error.problem)))}")


def make_config(values: dict[str, Any], file: str = "", /, **overrides: Any) -> Config:
    """Create a configuration from a dictionary, such as the contents of a configuration file.

    Raises:
        UsageError: a key is unknown or missing, or a value has the wrong type.

    >>> make_config({"data": "d.json", "model": "m", "output_dir": "o", "max_lenght": 512})
    Traceback (most recent call last):
    ftdata.errors.UsageError: [config] the configuration contains the unknown key 'max_lenght'. Fix: did you mean ...
    """
    # TOML parses dates, and the fields of `Config` are strings.
    values = {name: str(value) if isinstance(value, datetime.date) else value for name, value in values.items()}
    # The placeholder of a redacted secret must never be used as the secret.
    values, _ = drop_redacted(values)
    values, overrides = (
        flatten_sections(_shorten_lora_names(fields, file), where)
        for fields, where in ((values, file), (overrides, ""))
    )
    merged = {**values, **{name: value for name, value in overrides.items() if value is not None}}
    merged = {name: None if value is NULL else value for name, value in merged.items()}
    for name in ("lora", "quantization", "train"):
        # An override of some fields of a section keeps the other fields.
        if isinstance(overrides.get(name), dict) and isinstance(values.get(name), dict):
            merged[name] = {**values[name], **overrides[name]}
    if unknown := [key for key in merged if key not in Config.__struct_fields__]:
        names = suggest_names(str(unknown[0]), (*Config.__struct_fields__, *SECTIONS))
        hint = _FAMILIAR_NAMES.get(str(unknown[0]), f"{names}; settings of the trainer belong in the section train")
        if unknown[0] in SOURCE_KEYS:
            hint = "set this key in the mapping of a source: data: [{path: ..., " + f"{unknown[0]}: ...}}]"
        if unknown[0] in ("workers", "engine", "overwrite"):
            hint = f"pass it on the command line, because it does not change the build: --{unknown[0]}"
        raise UsageError("config", f"the configuration contains the unknown key {unknown[0]!r}", where=file, hint=hint)
    if isinstance(lora := merged.get("lora"), dict):
        extra_fields = {name: value for name, value in lora.items() if name not in Lora.__struct_fields__[:-1]}
        fields = {name: value for name, value in lora.items() if name not in extra_fields}
        merged["lora"] = {**fields, "extra_fields": extra_fields}
    try:
        return msgspec.convert(merged, Config)
    except msgspec.ValidationError as error:
        raise UsageError("config", _describe_type_error(str(error), merged), where=file) from None


_TYPE_ERROR = re.compile(r"Expected `(.+?)`, got `.+?`(?: - at `\$\.?(.*)`)?")
_TYPE_NAMES = {
    "str": "text", "int": "an integer", "float": "a number", "bool": "true or false", "object": "keys and values",
    "array": "a list", "null": "null",
}  # fmt: skip


def _describe_type_error(message: str, values: Mapping[str, Any]) -> str:
    """Describe an error of msgspec in the terms of a configuration file.

    >>> _describe_type_error("Expected `str | null`, got `bool` - at `$.packing`", {"packing": True})
    "packing is true, expected 'bfd' or null"
    >>> _describe_type_error("Object missing required field `data`", {})
    'the field data is missing'
    """
    if missing := re.fullmatch(r"Object missing required field `(.+?)`.*", message):
        return f"the field {missing[1]} is missing"
    match = _TYPE_ERROR.fullmatch(message)
    if match is None:
        # Checks of single fields raise a ValueError, whose message names the field.
        return message.partition(" - at `$")[0]
    types, path = match[1].split(" | "), match[2] or ""
    if path in OPTIONS and (choices := OPTIONS[path].choices):
        expected = [*map(repr, choices), *(["null"] if "null" in types else [])]
    else:
        expected = [_TYPE_NAMES.get(name, name) for name in types if name != "int" or "float" not in types]
    value: Any = values
    for key in path.split("."):
        value = value.get(key, NULL) if isinstance(value, dict) else NULL
    is_shown = value is None or (isinstance(value, bool | int | float | str) and not is_secret_name(path))
    problem = f"is {shorten(redact_text(dump_yaml([value])[2:].strip()), 80)}" if is_shown else "has an invalid type"
    return f"{path} {problem}, expected {' or '.join(expected)}"


def _shorten_lora_names(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Rename LoRA fields to their short names, such as `lora_alpha` to `alpha`.

    Raises:
        UsageError: a field is present under both of its names.
    """
    lora = values.get("lora")
    if isinstance(lora, Lora):
        return {**values, "lora": lora.fields()}
    if not isinstance(lora, dict):
        return values
    for name, short in LORA_NAMES.items():
        if name in lora and short in lora:
            raise UsageError("config", f"lora.{short} is set twice, because lora.{name} is the same field", where=where)
    return {**values, "lora": {LORA_NAMES.get(name, name): value for name, value in lora.items()}}


def flatten_sections(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Move the fields of the sections `mask`, `length` and `pack` to the top level.

    Raises:
        UsageError: a section contains an unknown field, or a field is set twice.
    """
    flat = {name: value for name, value in values.items() if name not in SECTIONS}
    for section, fields in SECTIONS.items():
        inner = values.get(section)
        if inner is None:
            continue
        for name, value in (inner if isinstance(inner, dict) else {fields[0]: inner}).items():
            if name not in fields:
                problem = f"{section} contains the unknown key {name!r}"
                raise UsageError("config", problem, where=where, hint=suggest_names(name, fields))
            if values.get(name) is not None:
                raise UsageError("config", f"{name} is set twice: at the top level and in {section}", where=where)
            flat[name] = value
    return flat


def parse_settings(items: Iterable[str]) -> dict[str, Any]:
    """Parse settings of the form `name=value`, and return them as fields of a configuration.

    A name is a field of `SFTConfig`, a field of `Config`, or a field of a section, such as `lora.r`.

    Raises:
        UsageError: a setting has no name or cannot be parsed, or a section is set twice.

    >>> parse_settings(["learning_rate=1e-4", "lora.r=8", "where=lang == 'en'"])
    {'train': {'learning_rate': 0.0001}, 'lora': {'r': 8}, 'where': "lang == 'en'"}
    """
    parsed: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            problem = f"--set is {redact(item.partition(':')[0])!r}, expected name=value, e.g. learning_rate=1e-4"
            raise UsageError("setting", problem)
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            problem = "the value is not valid YAML" if is_secret_name(name) else _describe_problem(error)
            raise UsageError("setting", f"--set {name} cannot be parsed: {problem}") from None
        section, dot, field = name.strip().replace("-", "_").partition(".")
        if not dot and (section in SECTIONS or (section in Config.__struct_fields__ and section != "seed")):
            if isinstance(parsed.get(section), dict) or (isinstance(value, dict) and section in parsed):
                raise UsageError("setting", f"--set sets both the whole section {section} and single fields of it")
            parsed[section] = NULL if value is None else parse_list(section, value)
            continue
        # `--set seed=1` sets the seed of training: the seed of `Config` belongs to the build.
        section, field = (section, field) if dot else ("train", section)
        if not isinstance(parsed.setdefault(section, {}), dict):
            raise UsageError("setting", f"--set sets both the whole section {section} and single fields of it")
        parsed[section][field] = NULL if value is None and section in SECTIONS else parse_list(field, value)
    return parsed


def to_yaml(config: Config, *, redacted: bool = False) -> str:
    """Convert a configuration to YAML text that `load_config` can read. Leave out default values.

    Args:
        config: the configuration.
        redacted: whether to redact secrets, for a file that is shared.

    >>> print(to_yaml(make_config({"data": "d.json", "model": "m", "output_dir": "o", "length": 512})), end="")
    data: d.json
    model: m
    output_dir: o
    max_length: 512
    """
    defaults = config_values(make_config({"data": "", "model": "", "output_dir": ""}))
    changed = {
        name: value
        for name, value in config_values(config).items()
        if name in ("data", "model", "output_dir") or value != defaults[name]
    }
    return dump_yaml(redact(changed) if redacted else changed)


def config_values(config: Config) -> dict[str, Any]:
    """Convert a configuration to a dictionary with the structure of a configuration file."""
    values: dict[str, Any] = msgspec.to_builtins(config)
    return {**values, "lora": msgspec.to_builtins(config.lora.fields()) if config.lora else None}
