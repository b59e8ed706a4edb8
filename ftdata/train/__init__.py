"""Train: a thin hand-over of a finished build to TRL's `SFTTrainer`, and what comes before and after it.

This package is the only one that knows torch, transformers, trl, peft and bitsandbytes, and it imports them
when a function is called, not before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from ftdata.config import Config, load_config, make_config, parse_yaml
from ftdata.errors import MissingDependency, UsageError
from ftdata.store import read_manifest
from ftdata.tokenize import load_tokenizer

if TYPE_CHECKING:
    from ftdata.train.evaluate import Comparison

NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "matplotlib", "sacrebleu")


def run(
    source: str | Path,
    *,
    model: str | None = None,
    output_dir: str | Path | None = None,
    settings: dict[str, Any] | list[str] | None = None,
    resume: bool = False,
    **overrides: Any,
) -> Path:
    """Train a model; build the data first where `source` is not a build yet.

    Args:
        source: a config file (`.yaml`, `.yml`, `.toml`), the folder of a build, or data as `build_sft_dataset` takes.
        model: folder or hub id of the base model.
        output_dir: folder for the run: checkpoints, the model, `run.json`, the loss as picture and figures.
        settings: fields of TRL's `SFTConfig`, as a mapping or as `["learning_rate=1e-4"]`.
        resume: go on from the last checkpoint in `output_dir`.
        overrides: further fields of `Config`.

    Returns:
        The folder of the run.

    Raises:
        UsageError: a field is unknown, missing or contradicts another.
        MissingDependency: the `train` extra is not installed.
    """
    _require()
    _quiet()
    config, build = _resolve(source, model, output_dir, {**overrides, "train": _settings(settings)})
    from ftdata.train import sft

    return sft.train(config, build, resume=resume)


def compare(run_dir: str | Path, data: Any = None, n: int = 20, **generation: Any) -> Comparison:
    """Ask base and tuned model the same questions.

    Args:
        run_dir: the folder of a finished run.
        data: questions with their expected answers; `None` takes the run's own data.
        n: how many rows.
        generation: further arguments of `model.generate`.

    Raises:
        UsageError: the folder is no finished run.
        MissingDependency: the `train` extra is not installed.
    """
    _require()
    _quiet()
    from ftdata.train import evaluate

    return evaluate.compare(Path(run_dir), data, n, **generation)


def _require() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            "missing_train", f"training needs {', '.join(missing)}", hint="pip install 'ftdata[train]'"
        )


def _quiet() -> None:
    # Bars for loading twenty tensors, and advice about settings that ftdata has decided, hide what matters.
    import warnings

    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _resolve(
    source: str | Path,
    model: str | None,
    output_dir: str | Path | None,
    overrides: dict[str, Any],
) -> tuple[Config, Path | None]:
    path = Path(source)
    if (rank := overrides.pop("lora_r", None)) is not None:
        overrides["lora"] = {"r": rank}
    given = {**overrides, "model": model, "output_dir": str(output_dir) if output_dir else None}
    if path.suffix in (".yaml", ".yml", ".toml"):
        config = load_config(path, **given)
        if not isinstance(config.data, str) or not (Path(config.data) / "manifest.json").is_file():
            return config, None
        plain = make_config({"data": config.data}, model=config.model, output_dir=config.output_dir).build_options()
        asked = {name: value for name, value in config.build_options().items() if value != plain[name]}
        _check_built(Path(config.data), asked)
        if config.tokenizer and load_tokenizer(config.tokenizer).fingerprint != _tokenizer_of(Path(config.data)):
            raise UsageError("already_built", f"tokenizer cannot change: {config.data} is built", hint="build again")
        return config, Path(config.data)
    for name, value in (("--model", model), ("--output-dir", output_dir)):
        if not value:
            raise UsageError("missing_option", f"training on {source} needs {name}")
    if path.is_dir():
        _check_built(path, {name: value for name, value in overrides.items() if value is not None})
        return make_config({"data": str(path)}, **given), path
    return make_config({"data": str(source)}, **given), None


def _tokenizer_of(folder: Path) -> str:
    return str(read_manifest(folder)["options"]["tokenizer"]["fingerprint"])


def _check_built(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuse options that a build has decided otherwise; the seed is that of training, too."""
    options = read_manifest(folder)["options"]
    template = options["template"]
    built = {
        **options,
        "template": template["name"],
        "template_kwargs": template["kwargs"],
        "date": template["date"][:10],
    }
    decided = [name for name, value in asked.items() if name in built and built[name] != value and name != "seed"]
    if decided:
        raise UsageError(
            "already_built",
            f"{', '.join(decided)} cannot change: {folder} is built",
            hint="build again, or train from the data",
        )


def _settings(settings: dict[str, Any] | list[str] | None) -> dict[str, Any]:
    if not isinstance(settings, list):
        return settings or {}
    parsed = {}
    for item in settings:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError("setting", f"--set is {item!r}, expected name=value, e.g. learning_rate=1e-4")
        try:
            parsed[name] = parse_yaml(value)
        except YAMLError as error:
            raise UsageError("setting", f"--set {name}: {' '.join(str(error).split())}") from None
    return parsed
