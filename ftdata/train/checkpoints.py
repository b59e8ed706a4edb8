"""Checkpoints: what a run was, whether another may go on from it, and where.

`run.json` holds what decides the weights of a run. Going on is allowed with the same data, model, adapter and
settings; only how long to train, and what is logged and kept, may change.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from ftdata._version import __version__
from ftdata.config import Config
from ftdata.errors import InputRefused, UsageError
from ftdata.store import write_json

FREE = ("num_train_epochs", "max_steps", "disable_tqdm", "report_to", "run_name")
"""Settings that may change when a run goes on, besides those of logging, saving and evaluation."""

_WHOLE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


@dataclass(frozen=True, slots=True)
class Before:
    """A run that is being resumed: its `run.json`, and its last whole checkpoint."""

    about: dict[str, Any]
    checkpoint: str


def check(run: Path, config: Config, *, resume: bool) -> Before | None:
    """Say whether a run may begin in this folder, or go on, before anything in it is touched.

    Raises:
        UsageError: it holds a run or a build, or, to resume, no checkpoint.
        InputRefused: its run was another one.
    """
    if (run / "manifest.json").is_file():
        raise UsageError("target_exists", f"{run} is a build", hint="choose another folder for the run")
    last = last_whole(run)
    about = read(run)
    if not resume:
        if about.get("finished") or last is not None:
            hint = "go on with --resume, or choose another folder"
            raise UsageError("run_exists", f"{run} holds a run already", hint=hint)
        return None
    if last is None:
        raise UsageError("nothing_to_resume", f"{run} holds no whole checkpoint", hint="start without --resume")
    now = describe(config, "")["setup"]
    changed = [name for name in now if now[name] != about.get("setup", {}).get(name)]
    if changed:
        raise InputRefused(
            "other_run",
            f"the checkpoints in {run} come from another run: {', '.join(changed)} changed",
            hint="resume with what it was begun with, or start anew in another folder",
        )
    return Before(about, last)


def same_data(run: Path, before: Before, fingerprint: str) -> None:
    """Refuse to go on with other data.

    Raises:
        InputRefused: the build is not the one that the run began with.
    """
    known = before.about.get("fingerprint")
    if known != fingerprint:
        raise InputRefused(
            "other_data",
            f"the checkpoints in {run} were trained on build {known}, this is {fingerprint}",
            hint="resume with the same data and options, or start anew in another folder",
        )


def begin(run: Path, config: Config, fingerprint: str, before: Before | None) -> str | None:
    """Note that a run begins or goes on; return the checkpoint to go on from.

    Raises:
        InputRefused: the data is not that of the run that goes on.
    """
    if before is not None:
        same_data(run, before, fingerprint)
        return before.checkpoint
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "run.json", {**describe(config, fingerprint), "finished": False})
    return None


def describe(config: Config, fingerprint: str) -> dict[str, Any]:
    """Return what decides the weights of a run, for `run.json`."""
    folder = Path(config.model)
    weights = (
        {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))} if folder.is_dir() else {}
    )
    settings = {
        name: value
        for name, value in config.train.items()
        if name not in FREE and not name.startswith(("logging_", "save_", "eval_"))
    }
    setup = {
        "model": config.model,
        "weights": weights,
        "quantization": config.quantization,
        "lora": to_builtins(config.lora),
        "train": to_builtins(settings),
    }
    return {"ftdata": __version__, "fingerprint": fingerprint, "setup": setup}


def last_whole(run: Path) -> str | None:
    """Return the last checkpoint that was written to its end, or `None`."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if all((path / name).is_file() for name in _WHOLE) and any(path.glob("*.safetensors")):
            return str(path)
    return None


def read(run: Path) -> dict[str, Any]:
    """Return what `run.json` says; empty where there is none.

    Raises:
        InputRefused: it is damaged.
    """
    path = run / "run.json"
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputRefused("damaged_run", f"{path} is damaged: {error}", hint="start anew in another folder") from None
    return about
