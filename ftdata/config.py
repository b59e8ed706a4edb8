"""The configuration file: one frozen typed object. Unknown keys are errors, with the nearest known one.

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

`mask`, `length` and `pack` group fields that may as well stand by themselves, under the names that they have as flags.
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
from ftdata.redaction import drop_redacted, is_secret_name, redact, redact_text

SECTIONS = {
    "mask": (
        "train_on",
        "train_parts",
        "turns",
        "control_tokens",
        "on_dropped_message",
        "on_missing_stop",
        "reject_flags",
    ),
    "length": ("max_length", "overlong"),
    "pack": ("packing",),
}
"""Section of a file -> the fields that it groups. A single value is that of the first."""

NULL: Any = object()
"""What overrides a value by nothing, where `None` leaves it as it is."""


LORA_NAMES = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
"""Field of `peft.LoraConfig` -> its short name here."""


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA adapter (Hu et al. 2021): `alpha / r` scales the product of the two low-rank matrices.

    In a file, the fields of `more` stand beside the others: `lora: {r: 16, use_dora: true}`.
    """

    r: int = 16
    """Rank of the matrices."""
    alpha: int = 32
    """What they add is scaled by `alpha / r`."""
    dropout: float = 0.0
    """Share of their input that is left out, by chance, in each step."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get an adapter."""
    more: dict[str, Any] = {}
    """Further fields of `peft.LoraConfig`, such as `use_dora`, `use_rslora`, `modules_to_save` or `bias`."""

    def fields(self) -> dict[str, Any]:
        """Return the adapter as a file has it: further fields beside the four of our own."""
        own = {name: getattr(self, name) for name in self.__struct_fields__ if name != "more"}
        return {**own, **self.more}

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            message = (
                f"r {self.r}, alpha {self.alpha}, dropout {self.dropout}: expected r, alpha >= 1, 0 <= dropout < 1"
            )
            raise ValueError(message)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A training run, from data to model.

    The fields from `template` to `template_kwargs` are those of `build_sft_dataset`.
    """

    data: str | dict[str, Any] | list[str | dict[str, Any]]
    """What to train on, as `ftdata build` takes it: a place, a mapping, a list of these; or the folder of a build."""
    model: str
    """Folder or hub id of the base model."""
    output_dir: str
    """Folder for the run."""
    tokenizer: str | None = None
    """`None`: the model's own."""
    template: str | None = None
    schema: str = "auto"
    columns: dict[str, str] | None = None
    """Canonical column -> name, or path, in the data."""
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
    on_bad_rows: str = "error"
    max_rejects: int | float | str | None = None
    seed: int = 0
    date: str | None = None
    template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, such as `{enable_thinking: false}`; a row's own go before these."""
    lora: Lora | None = None
    """`None`: all weights are trained, unless `quantization` asks for an adapter."""
    quantization: str | dict[str, Any] | None = None
    """`nf4` (QLoRA, Dettmers et al. 2023), `fp4`, `int8`, or fields of `BitsAndBytesConfig`; `None`: 16 or 32 bits."""
    train: dict[str, Any] = {}
    """Fields of TRL's `SFTConfig`."""
    early_stopping: int | None = None
    """Evaluations without a lower loss after which training ends; the best model is kept."""
    samples: int | list[str] = 3
    """Prompts that the model answers at every evaluation: so many of the test split, or these."""
    attn_implementation: str | None = None
    """What computes attention, such as `"sdpa"` or `"flash_attention_2"`; `None`: what the model prefers."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""

    def __post_init__(self) -> None:
        if self.early_stopping is not None and self.early_stopping < 1:
            message = f"early_stopping is {self.early_stopping}: expected evaluations, at least 1"
            raise ValueError(message)
        if isinstance(self.samples, int) and self.samples < 0:
            message = f"samples is {self.samples}: expected a number of prompts, or prompts"
            raise ValueError(message)

    def build_options(self) -> dict[str, Any]:
        """Return the fields that `build_sft_dataset` takes, besides data, tokenizer and output_dir."""
        fields = self.__struct_fields__
        names = fields[fields.index("template") : fields.index("template_kwargs") + 1]
        return {name: getattr(self, name) for name in names}


class _Loader(yaml.SafeLoader):
    """YAML as 1.2 has it where 1.1 surprises: `1e-4` is a number, `no`, `off` and `yes` are words, dates are texts."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Take over the keys of other mappings (`<<`), which may have taken over those of others."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_VALUES:
            raise ValueError("it merges parts of itself too often")


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


_MOST_BYTES, _MOST_VALUES, _DEEPEST = 1 << 19, 50_000, 32
"""Of a configuration: more is an attack, or no configuration."""


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain values, without surprises.

    >>> parse_yaml("{learning_rate: 1e-4, save_strategy: no, steps: 3, quick: true}")
    {'learning_rate': 0.0001, 'save_strategy': 'no', 'steps': 3, 'quick': True}
    """
    try:
        return _plain(yaml.load(text, _Loader))  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # What the tags of YAML make of texts that are none of theirs.
        told = "it is nested too deep" if isinstance(error, RecursionError) else f"{type(error).__name__}: {error}"
        raise yaml.YAMLError(told) from None


def _plain(value: Any) -> Any:
    """Return a value of a file if it is what a file may say, small enough to be walked through.

    Raises:
        ValueError: it is not, or becomes too much where names for other parts of it are followed.
    """
    left, seen = [(value, 0)], 0
    while left:
        one, depth = left.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_VALUES:
            raise ValueError("it is nested too deep, or in itself, or names parts of itself too often")
        if isinstance(one, dict):
            if odd := [key for key in one if not isinstance(key, str)]:
                raise ValueError(f"{odd[0]!r} is no name: put it in quotes")
            left += ((inner, depth + 1) for inner in one.values())
        elif isinstance(one, list):
            left += ((inner, depth + 1) for inner in one)
        elif isinstance(one, int) and abs(one) >= 1 << 64:
            raise ValueError(f"a number of {one.bit_length():,} bits is too large")
        elif not (one is None or isinstance(one, str | int | float | datetime.date)):
            raise ValueError(f"a value is a {type(one).__name__}")
    return value


class _Dumper(yaml.SafeDumper):
    """Writes what the loader reads as the same: texts that it would take for numbers stand in quotes."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


_BREAKS = re.compile("[\r\x85\u2028\u2029]")


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Templates are to be read by people.
    # What YAML takes for a line break, Jinja prints as it stands.
    style = '"' if _BREAKS.search(text) else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump_yaml(values: dict[str, Any]) -> str:
    r"""Write plain values as YAML that `parse_yaml` reads.

    >>> dump_yaml({"output_dir": "1e5", "save_strategy": "no"})
    "output_dir: '1e5'\nsave_strategy: no\n"
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


def load_config(path: Path, /, **overrides: Any) -> Config:
    """Read a YAML or TOML file.

    Args:
        path: the file.
        overrides: fields to set over those of the file; `None` leaves the file's.

    Raises:
        UsageError: the file cannot be parsed, a key is unknown, or a value has the wrong type; names the key.
    """
    return make_config(read_config_file(path), str(path), **overrides)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the plain values of a YAML, JSON or TOML file.

    Raises:
        UsageError: it cannot be read, or holds no keys and values.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes: is it the data?")
        text = path.read_text(encoding="utf-8")
        values = _plain(tomllib.loads(text)) if path.suffix == ".toml" else parse_yaml(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError("config_file", f"{path} cannot be read: {_problem(error)}") from None
    if not isinstance(values, dict):
        raise UsageError("config_file", f"{path} holds a {type(values).__name__}, expected keys and values")
    return values


def _problem(error: Exception) -> str:
    """Return what is wrong with a file. The line that YAML quotes is left out: it may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return redact_text(describe_exception(error, 2_000))
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return shorten(f"{place}{' '.join(filter(None, (error.context, error.problem)))}")


def make_config(values: dict[str, Any], file: str = "", /, **overrides: Any) -> Config:
    """Make a configuration from plain values.

    Raises:
        UsageError: a key is unknown or missing, or a value has the wrong type.

    >>> make_config({"data": "d.json", "model": "m", "output_dir": "o", "max_lenght": 512})
    Traceback (most recent call last):
    ftdata.errors.UsageError: [config] unknown key 'max_lenght'. Fix: did you mean 'max_length'? known: ...
    """
    # TOML has dates of its own.
    values = {name: str(value) if isinstance(value, datetime.date) else value for name, value in values.items()}
    # A secret that was redacted when the file was kept must never be used as if it were the secret.
    values, _ = drop_redacted(values)
    values, overrides = flatten_sections(_with_lora(values, file), file), flatten_sections(_with_lora(overrides, file))
    given = {**values, **{name: value for name, value in overrides.items() if value is not None}}
    given = {name: None if value is NULL else value for name, value in given.items()}
    for name in ("lora", "quantization", "train"):
        # What is overridden in a section leaves the rest of it as it was.
        if isinstance(overrides.get(name), dict) and isinstance(values.get(name), dict):
            given[name] = {**values[name], **overrides[name]}
    for key in given:
        if key not in Config.__struct_fields__:
            known = (*Config.__struct_fields__, *SECTIONS)
            raise UsageError("config", f"unknown key {key!r}", where=file, hint=suggest_names(str(key), known))
    if isinstance(lora := given.get("lora"), dict):
        own = {name: value for name, value in lora.items() if name in Lora.__struct_fields__ and name != "more"}
        given["lora"] = {**own, "more": {name: value for name, value in lora.items() if name not in own}}
    try:
        return msgspec.convert(given, Config)
    except msgspec.ValidationError as error:
        raise UsageError("config", str(error), where=file) from None


def _with_lora(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return values with the short names of LoRA fields.

    Raises:
        UsageError: a field stands there under both of its names.
    """
    lora = values.get("lora")
    if isinstance(lora, Lora):
        return {**values, "lora": lora.fields()}
    if not isinstance(lora, dict):
        return values
    for name, short in LORA_NAMES.items():
        if name in lora and short in lora:
            raise UsageError("config", f"lora.{short} is given twice, once as {name}", where=where)
    return {**values, "lora": {LORA_NAMES.get(name, name): value for name, value in lora.items()}}


def flatten_sections(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return values with the fields of sections beside the others."""
    found = {name: value for name, value in values.items() if name not in SECTIONS}
    for section, fields in SECTIONS.items():
        inner = values.get(section)
        if inner is None:
            continue
        for name, value in (inner if isinstance(inner, dict) else {fields[0]: inner}).items():
            if name not in fields:
                raise UsageError(
                    "config", f"unknown key {name!r} in {section}", where=where, hint=suggest_names(name, fields)
                )
            if values.get(name) is not None:
                raise UsageError("config", f"{name} is given twice, once in {section}", where=where)
            found[name] = value
    return found


def parse_settings(items: Iterable[str]) -> dict[str, Any]:
    """Return what `name=value` stands for: a field of `SFTConfig`, one of `Config`, or one in a section.

    Raises:
        UsageError: it is none of these, or the value cannot be parsed.

    >>> parse_settings(["learning_rate=1e-4", "lora.r=8", "where=lang == 'en'"])
    {'train': {'learning_rate': 0.0001}, 'lora': {'r': 8}, 'where': "lang == 'en'"}
    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise UsageError("setting", f"--set is {redact(item)!r}, expected name=value, e.g. learning_rate=1e-4")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            shown = "the value is not valid YAML" if is_secret_name(name) else _problem(error)
            raise UsageError("setting", f"--set {name}: {shown}") from None
        section, dot, field = name.strip().replace("-", "_").partition(".")
        if not dot and (section in SECTIONS or (section in Config.__struct_fields__ and section != "seed")):
            if isinstance(found.get(section), dict) or (isinstance(value, dict) and section in found):
                raise UsageError("setting", f"--set gives {section} twice, whole and in part")
            found[section] = NULL if value is None else value
            continue
        # The seed that matters once there is a build is that of training.
        section, field = (section, field) if dot else ("train", section)
        if not isinstance(found.setdefault(section, {}), dict):
            raise UsageError("setting", f"--set gives {section} twice, whole and in part")
        found[section][field] = NULL if value is None and section in SECTIONS else value
    return found


def to_yaml(config: Config, *, redacted: bool = False) -> str:
    """Return a configuration as a file that `load_config` reads; fields at their defaults are left out.

    Args:
        config: the configuration.
        redacted: replace its secrets, for a file that others may see.

    >>> print(to_yaml(make_config({"data": "d.json", "model": "m", "output_dir": "o", "length": 512})), end="")
    data: d.json
    model: m
    output_dir: o
    max_length: 512
    """
    defaults = config_values(make_config({"data": "", "model": "", "output_dir": ""}))
    given = {
        name: value
        for name, value in config_values(config).items()
        if name in ("data", "model", "output_dir") or value != defaults[name]
    }
    return dump_yaml(redact(given) if redacted else given)


def config_values(config: Config) -> dict[str, Any]:
    """Return all fields of a configuration as plain values, as a file has them."""
    values: dict[str, Any] = msgspec.to_builtins(config)
    return {**values, "lora": msgspec.to_builtins(config.lora.fields()) if config.lora else None}
