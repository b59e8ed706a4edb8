"""Import a configuration file of another fine-tuning tool: detect the tool, then convert the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftdata.config import Config, config_values, make_config, read_config_file, to_yaml
from ftdata.errors import UsageError
from ftdata.importers.axolotl import draft_from_axolotl
from ftdata.importers.llamafactory import draft_from_dataset_info, draft_from_training_file

_MODEL_PLACEHOLDER = "MODEL"


@dataclass(frozen=True, slots=True)
class ImportedConfig:
    """An ftdata configuration that was converted from the configuration file of another tool.

    Attributes:
        tool: `"Axolotl"` or `"LLaMA-Factory"`.
        config: the converted configuration.
        notes: differences and omitted settings, a sentence each.
    """

    tool: str
    config: Config
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the tool, the configuration and the notes as a JSON-serializable dict."""
        return {"tool": self.tool, "config": config_values(self.config), "notes": list(self.notes)}

    def __str__(self) -> str:
        notes = "".join(f"# - {note}\n" for note in self.notes)
        header = f"# Imported from {self.tool}.{' Differences:' if notes else ''}\n"
        return header + notes + to_yaml(self.config)


def import_config(path: str | Path, datasets: Sequence[str] = (), *, model: str | None = None) -> ImportedConfig:
    """Convert a configuration file of Axolotl or LLaMA-Factory to an ftdata configuration.

    Args:
        path: an Axolotl YAML file, a LLaMA-Factory training YAML file, or a `dataset_info.json`.
        datasets: the data sets to import, by name, path or number from 0. By default, all are imported.
        model: the base model, if the file has none.

    Returns:
        The configuration, with notes on the differences.

    Raises:
        UsageError: `config_file`, if the file cannot be read; `unknown_tool`, if the tool cannot be detected;
            `cannot_import`, if a setting cannot be expressed, or the data sets need different options.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "dataset_info.json"
    >>> with file.open("x") as info:
    ...     _ = info.write('{"faq": {"hf_hub_url": "me/faq", "columns": {"prompt": "q", "response": "a"}}}')
    >>> print(import_config(file, model="gpt2"))
    # Imported from LLaMA-Factory. Differences:
    # - faq: columns input, system, history are used if a row has them; LLaMA-Factory uses only configured columns
    data:
    - path: me/faq
      split: train
    model: gpt2
    output_dir: run
    schema: alpaca
    columns:
      instruction: q
      output: a
    <BLANKLINE>
    """
    path = Path(path)
    values = read_config_file(path)
    tool, make_draft = _detect_tool(values, str(path))
    try:
        draft = make_draft(values, tuple(datasets), path.parent)
    except UsageError as error:
        raise UsageError(error.code, error.message, where=str(path), hint=error.hint) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A value has a type that the original tool does not accept either.
        problem = f"the file contains a value that is not valid in {tool}: {error}"
        hint = f"check that {tool} accepts the file"
        raise UsageError("cannot_import", problem, where=str(path), hint=hint) from None
    fields = {"model": model or _MODEL_PLACEHOLDER, "output_dir": "run", **draft.fields}
    if model is not None:
        fields["model"] = model
    elif "model" not in draft.fields:
        draft.add_note("the file has no base model: pass --model, or replace MODEL below")
    return ImportedConfig(tool, make_config(fields, str(path)), tuple(draft.notes))


def _detect_tool(values: Mapping[str, Any], path: str) -> tuple[str, Any]:
    """Detect the tool that a configuration file belongs to. Return the tool's name and its conversion function."""
    if "base_model" in values or (isinstance(values.get("datasets"), list) and "model" not in values):
        return "Axolotl", draft_from_axolotl
    if "model_name_or_path" in values or "dataset_dir" in values:
        return "LLaMA-Factory", draft_from_training_file
    if values and all(isinstance(info, Mapping) for info in values.values()) and path.endswith(".json"):
        return "LLaMA-Factory", draft_from_dataset_info
    hint = (
        "pass an Axolotl file with base_model and datasets, a LLaMA-Factory file with model_name_or_path, "
        "or a dataset_info.json"
    )
    raise UsageError("unknown_tool", f"{path} is not a configuration file of Axolotl or LLaMA-Factory", hint=hint)
