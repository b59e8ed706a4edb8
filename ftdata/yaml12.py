"""Parse and write YAML by the rules of YAML 1.2: `1e-4` is a number, and `no`, `off`, `yes` and dates are strings."""

from __future__ import annotations

import datetime
import re
from typing import Any

import yaml

_MAX_VALUES, _MAX_DEPTH = 50_000, 32
"""Limits of a document. A larger document is an attack, or not a configuration."""


class _Loader(yaml.SafeLoader):
    """A YAML loader that parses scalars by the rules of YAML 1.2.

    `1e-4` is a number. `no`, `off`, `yes` and dates are strings.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping.

        Raises:
            ComposerError: a key occurs twice, although only the last value would be used.
        """
        node = super().compose_mapping_node(anchor)
        keys = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} occurs twice", key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return node

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


def parse_yaml(text: str) -> Any:
    """Parse YAML into dictionaries, lists and scalars. Scalars follow the rules of YAML 1.2.

    >>> parse_yaml("{learning_rate: 1e-4, save_strategy: no, steps: 3, quick: true}")
    {'learning_rate': 0.0001, 'save_strategy': 'no', 'steps': 3, 'quick': True}
    """
    try:
        return check_plain_values(yaml.load(text, _Loader))  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # The constructors of YAML tags raise these for invalid values.
        is_too_deep = isinstance(error, RecursionError)
        message = "the document is nested too deeply" if is_too_deep else f"{type(error).__name__}: {error}"
        raise yaml.YAMLError(message) from None


def check_plain_values(value: Any) -> Any:
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


def dump_yaml(values: dict[str, Any] | list[Any]) -> str:
    r"""Convert dictionaries, lists and scalars to YAML text that `parse_yaml` can read.

    >>> dump_yaml({"output_dir": "1e5", "save_strategy": "no"})
    "output_dir: '1e5'\nsave_strategy: no\n"
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)
