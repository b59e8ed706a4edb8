"""Read, check and write the configuration files of training runs.

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

from ftdata.errors import UsageError, describe_exception, shorten, suggest_names
from ftdata.options import OPTIONS
from ftdata.redaction import drop_redacted, is_secret_name, redact, redact_text

SECTIONS = {
    section: tuple(name for name, option in OPTIONS.items() if option.section == section)
    for section in ("mask", "length", "pack")
}
"""Section of a file -> its fields. A scalar in place of a section sets the first field."""

NULL: Any = object()
"""An override that sets a field to null; an override of `None` leaves the field unchanged."""


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
    """Fields of TRL's `SFTConfig`."""
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
        """Return the arguments for `build_sft_dataset`, except `data`, `tokenizer` and `output_dir`."""
        return {name: getattr(self, name) for name in OPTIONS}


class _Loader(yaml.SafeLoader):
    """A YAML loader that parses scalars by the rules of YAML 1.2.

    `1e-4` is a number. `no`, `off`, `yes` and dates are strings.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolve the merge keys (`<<`) of a mapping.

        Raises:
            ValueError: the merged mapping has too many values.
        """
        super().flatten_mapping(node)
        if len(node.value) > _MAX_VALUES:
            raise ValueError(f"the merge keys (<<) expand to more than {_MAX_VALUES:,} values")


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


_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 1 << 19, 50_000, 32
"""Limits of a configuration file. A larger file is an attack, or not a configuration."""

_MAX_DOTS = 1000
_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*+\"|'[^']*+'")


def parse_yaml(text: str) -> Any:
    """Parse YAML into dictionaries, lists and scalars. Scalars follow the rules of YAML 1.2.

    >>> parse_yaml("{learning_rate: 1e-4, save_strategy: no, steps: 3, quick: true}")
    {'learning_rate': 0.0001, 'save_strategy': 'no', 'steps': 3, 'quick': True}
    """
    try:
        return _check_plain(yaml.load(text, _Loader))  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # The constructors of YAML tags raise these for invalid values.
        is_too_deep = isinstance(error, RecursionError)
        message = "the document is nested too deeply" if is_too_deep else f"{type(error).__name__}: {error}"
        raise yaml.YAMLError(message) from None


def _check_plain(value: Any) -> Any:
    """Check that a parsed document is small and contains only basic YAML types, and return it unchanged.

    Raises:
        ValueError: a value has another type, or the document is too large after its aliases are resolved.
    """
    pending, count = [(value, 0)], 0
    while pending:
        item, depth = pending.pop()
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_VALUES:
            raise ValueError(f"the document has over {_MAX_DEPTH} levels or {_MAX_VALUES:,} values, counting aliases")
        if isinstance(item, dict):
            if invalid := [key for key in item if not isinstance(key, str)]:
                raise ValueError(f"the key {invalid[0]!r} is not a string; put it in quotes")
            pending += ((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list):
            pending += ((inner, depth + 1) for inner in item)
        elif isinstance(item, int) and abs(item) >= 1 << 64:
            raise ValueError(f"a number has {item.bit_length():,} bits, expected at most 64")
        elif not (item is None or isinstance(item, str | int | float | datetime.date)):
            problem = f"a value has the type {type(item).__name__}, expected text, a number, a boolean or a date"
            raise ValueError(problem)
    return value


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes a string if `_Loader` would otherwise parse it as another type."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


_YAML_LINE_BREAKS = re.compile("[\r\x85\u2028\u2029]")


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Templates use the block style because it is readable. The block style would change the characters that YAML
    # treats as line breaks and Jinja prints unchanged.
    style = '"' if _YAML_LINE_BREAKS.search(text) else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: dict[str, Any]) -> str:
    r"""Convert dictionaries, lists and scalars to YAML text that `parse_yaml` can read.

    >>> dump_yaml({"output_dir": "1e5", "save_strategy": "no"})
    "output_dir: '1e5'\nsave_strategy: no\n"
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


def load_config(path: Path, /, **overrides: Any) -> Config:
    """Read the configuration of a training run from a YAML or TOML file.

    Args:
        path: the file.
        overrides: fields that replace the fields of the file; `None` keeps the value of the file.

    Raises:
        UsageError: the file cannot be parsed, a key is unknown, or a value has the wrong type; the message
            contains the key.
    """
    return make_config(read_config_file(path), str(path), **overrides)


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
        raise UsageError("config_file", f"{path} cannot be read: {_describe_problem(error)}") from None
    if not isinstance(values, dict):
        raise UsageError("config_file", f"{path} contains a {type(values).__name__}, expected keys and values")
    return values


def _parse_toml(text: str) -> Any:
    # tomllib takes quadratic time and memory for a key of many parts (`a.b.c`).
    if any(_QUOTED.sub("", line).count(".") > _MAX_DOTS for line in text.splitlines()):
        raise ValueError(f"a line has more than {_MAX_DOTS:,} dots outside strings")
    return _check_plain(tomllib.loads(text))


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
        hint = suggest_names(str(unknown[0]), (*Config.__struct_fields__, *SECTIONS))
        raise UsageError("config", f"the configuration contains the unknown key {unknown[0]!r}", where=file, hint=hint)
    if isinstance(lora := merged.get("lora"), dict):
        extra_fields = {name: value for name, value in lora.items() if name not in Lora.__struct_fields__[:-1]}
        fields = {name: value for name, value in lora.items() if name not in extra_fields}
        merged["lora"] = {**fields, "extra_fields": extra_fields}
    try:
        return msgspec.convert(merged, Config)
    except msgspec.ValidationError as error:
        raise UsageError("config", str(error), where=file) from None


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
            parsed[section] = NULL if value is None else value
            continue
        # `--set seed=1` sets the seed of training: the seed of `Config` belongs to the build.
        section, field = (section, field) if dot else ("train", section)
        if not isinstance(parsed.setdefault(section, {}), dict):
            raise UsageError("setting", f"--set sets both the whole section {section} and single fields of it")
        parsed[section][field] = NULL if value is None and section in SECTIONS else value
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
