"""Read a file of another tool, whichever it is, and write ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftdata.config import Config, config_values, make_config, read_config_file, to_yaml
from ftdata.errors import UsageError
from ftdata.importers.axolotl import draft_from_axolotl
from ftdata.importers.llamafactory import draft_from_dataset_info, draft_from_training_file

_NAMELESS = "MODEL"


@dataclass(frozen=True, slots=True)
class ImportedConfig:
    """A configuration that came from another tool.

    Attributes:
        tool: `"Axolotl"` or `"LLaMA-Factory"`.
        config: what it says.
        notes: what is not the same, or was left out, a sentence each.
    """

    tool: str
    config: Config
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"tool": self.tool, "config": config_values(self.config), "notes": list(self.notes)}

    def __str__(self) -> str:
        notes = "".join(f"# - {note}\n" for note in self.notes)
        head = f"# From a configuration of {self.tool}.{' What is not the same:' if notes else ''}\n"
        return head + notes + to_yaml(self.config)


def import_config(path: str | Path, datasets: Sequence[str] = (), *, model: str | None = None) -> ImportedConfig:
    """Turn a configuration of Axolotl or LLaMA-Factory into one of ours.

    Args:
        path: Axolotl's YAML, LLaMA-Factory's training YAML, or its `dataset_info.json`.
        datasets: which of the data sets that it names, by name, path or number from 0; none: all.
        model: the base model, where the file names none.

    Returns:
        The configuration, and notes on what is not the same.

    Raises:
        UsageError: `config_file`, if the file cannot be read; `cannot_import`, if it says what ours cannot, or names
            data of several kinds; it names the keys.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "dataset_info.json"
    >>> with file.open("x") as info:
    ...     _ = info.write('{"faq": {"hf_hub_url": "me/faq", "columns": {"prompt": "q", "response": "a"}}}')
    >>> print(import_config(file, model="gpt2"))
    # From a configuration of LLaMA-Factory. What is not the same:
    # - faq: columns of the name input, system, history are read if rows have them; there only when named
    data:
    - path: me/faq
      split: train
    model: gpt2
    output_dir: out
    schema: alpaca
    columns:
      instruction: q
      output: a
    <BLANKLINE>
    """
    path = Path(path)
    values = read_config_file(path)
    tool, read = _tool(values, str(path))
    try:
        draft = read(values, tuple(datasets), path.parent)
    except UsageError as error:
        raise UsageError(error.code, error.message, where=str(path), hint=error.hint) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A value is of another type than that tool takes, too.
        told = f"a value is not what {tool} expects: {error}"
        raise UsageError("cannot_import", told, where=str(path), hint="does it run there?") from None
    fields = {"model": model or _NAMELESS, "output_dir": "out", **draft.fields}
    if model is not None:
        fields["model"] = model
    elif "model" not in draft.fields:
        draft.note("it names no model: --model, or write it below")
    return ImportedConfig(tool, make_config(fields, str(path)), tuple(draft.notes))


def _tool(values: Mapping[str, Any], path: str) -> tuple[str, Any]:
    """Return whose file this is, and what reads it."""
    if "base_model" in values or (isinstance(values.get("datasets"), list) and "model" not in values):
        return "Axolotl", draft_from_axolotl
    if "model_name_or_path" in values or "dataset_dir" in values:
        return "LLaMA-Factory", draft_from_training_file
    if values and all(isinstance(one, Mapping) for one in values.values()) and path.endswith(".json"):
        return "LLaMA-Factory", draft_from_dataset_info
    raise UsageError(
        "unknown_tool",
        f"{path} is no file of Axolotl's or LLaMA-Factory's that is known",
        hint="expected base_model and datasets, model_name_or_path, or a dataset_info.json",
    )
