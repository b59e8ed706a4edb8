"""Checkpoints: what a run was, whether another may go on from it, and from where.

`run.json` holds what decides the weights of a run. Going on is allowed with the same data, model, adapter and
settings; only how long to train, and what is logged and kept, may change. A checkpoint is whole when its seal is
there, which is written last, and every file is what the seal says: any other is passed over, with words.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from msgspec import to_builtins
from trl import SFTConfig

from ftdata._version import __version__
from ftdata.config import Config
from ftdata.errors import InputRefused, UsageError
from ftdata.redaction import drop_redacted, redact
from ftdata.storage.disk import hash_bytes, sha256_of_file, sync, write_json

FREE = ("num_train_epochs", "max_steps", "disable_tqdm", "report_to", "run_name", "load_best_model_at_end", "use_cpu")
FREE_KINDS = ("logging_", "save_", "eval_", "per_device_eval_", "dataloader_", "hub_", "push_")
"""Settings that may change when a run goes on: how long it trains, what is logged, kept and evaluated."""

_OWN = ("train_sampling_strategy", "learning_rate", "optim", "bf16", "fp16", "activation_checkpointing")
"""Settings of which what is not said is not what `SFTConfig` would take."""

SEAL = "ftdata.json"


@dataclass(frozen=True, slots=True)
class CheckpointSeal:
    """What a checkpoint belongs to: the fingerprint of its data, and the setup of its run."""

    fingerprint: str
    setup: dict[str, Any]

    @property
    def run(self) -> str:
        """Both in one, short; where a model lies makes no difference while its weights are known."""
        setup = {name: value for name, value in self.setup.items() if name != "model" or not self.setup.get("weights")}
        text = json.dumps([self.fingerprint, setup], sort_keys=True)
        return hash_bytes(text.encode())


@dataclass(frozen=True, slots=True)
class PreviousRun:
    """A run that is being resumed: its `run.json`, its last whole checkpoint, and why later ones are passed over."""

    about: dict[str, Any]
    checkpoint: str
    passed: tuple[str, ...] = ()

    def is_done(self, steps: int, patience: int | None) -> bool:
        """Return whether nothing is left to train: of so many steps, or because nothing got better for so long."""
        path = Path(self.checkpoint) / "trainer_state.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        kept = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
        kept = kept[0] if isinstance(kept, list) else kept
        waited = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)
        return state["global_step"] >= steps or (patience is not None and waited >= patience)


def write_seal(checkpoint: Path, seal: CheckpointSeal) -> None:
    """Say that a checkpoint is whole, when everything in it is on the disk."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL:
            files[str(path.relative_to(checkpoint))] = sha256_of_file(path)
            sync(path)
    about = {"ftdata": __version__, "run": seal.run, "fingerprint": seal.fingerprint, "files": files}
    write_json_atomically(checkpoint / SEAL, about)


def write_json_atomically(path: Path, about: dict[str, Any]) -> None:
    """Write a JSON file so that it is there whole, or as it was; without secrets."""
    new = path.with_name(f"{path.name}.tmp")
    write_json(new, redact(about))
    sync(new)
    new.replace(path)
    sync(path.parent)


def find_damage(checkpoint: Path, seal: CheckpointSeal | None = None) -> str | None:
    """Return what is wrong with a checkpoint, or `None`.

    Args:
        checkpoint: its folder.
        seal: the run that it must belong to.
    """
    try:
        known = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        files, run = dict(known["files"]), known["run"]
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SEAL} is damaged"
    for name, right in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of_file(path) != right:
            return f"{name} is damaged"
    return "it is of another run" if seal is not None and run != seal.run else None


def check_run_folder(run: Path, config: Config, processes: int, *, resume: bool) -> PreviousRun | None:
    """Say whether a run may begin in this folder, or go on, before anything in it is touched.

    Raises:
        UsageError: it holds a run or a build, or, to resume, nothing to go on from.
        InputRefused: its run was another one, or no checkpoint of it is whole.
    """
    if run.exists() and not run.is_dir():
        raise UsageError("target_exists", f"{run} is a file", hint="choose another folder for the run")
    if (run / "manifest.json").is_file():
        raise UsageError("target_exists", f"{run} is a build", hint="choose another folder for the run")
    about = read_run_json(run)
    found = list_checkpoints(run)
    if not resume:
        if about.get("finished") or found:
            done = "finished" if about.get("finished") else f"interrupted after {found[-1].name}"
            hint = "go on with --resume, or choose another folder"
            raise UsageError("run_exists", f"{run} holds a run already, {done}", hint=hint)
        return None
    if not about:
        raise UsageError("nothing_to_resume", f"{run} holds no checkpoint of a run", hint="start without --resume")
    if not found:
        # It was interrupted before there was any: it begins again.
        return None
    _check_same_run(run, about, describe_setup(config, "", processes)["setup"])
    patience = config.early_stopping
    if about.get("finished") and patience is not None and (about.get("stopped_early") or 0) >= patience:
        hint = "raise early_stopping to train on"
        raise UsageError("run_finished", f"{run} is finished: nothing got better any more", hint=hint)
    keeps_best = config.early_stopping is not None or bool(config.train.get("load_best_model_at_end"))
    return _last_whole(run, about, found, keeps_best=keeps_best)


def _check_same_run(run: Path, about: dict[str, Any], now: dict[str, Any]) -> None:
    before = about.get("setup", {})
    changed = [name for name in now if now[name] != before.get(name)]
    if now["weights"] and "weights" not in changed and "model" in changed:
        # The same model in another place.
        changed.remove("model")
    if changed:
        raise InputRefused(
            "run_differs",
            f"the checkpoints in {run} come from another run: {'; '.join(_changes(changed, before, now))}",
            hint="resume with what it was begun with, or start anew in another folder",
        )


def _last_whole(run: Path, about: dict[str, Any], found: list[Path], *, keeps_best: bool) -> PreviousRun:
    seal = CheckpointSeal(about["fingerprint"], about["setup"])
    passed: list[str] = []
    for path in reversed(found):
        wrong = find_damage(path, seal) or (_damage_of_best(path, seal) if keeps_best else None)
        if wrong is None:
            return PreviousRun(about, str(path), tuple(passed))
        passed.append(f"{path.name}: {wrong}")
    listed = "; ".join(passed)
    raise InputRefused("no_whole_checkpoint", f"{run} holds no whole checkpoint: {listed}", hint="start anew")


def _damage_of_best(checkpoint: Path, seal: CheckpointSeal) -> str | None:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if (step := state.get("best_global_step")) is None:
        return None
    best = checkpoint.with_name(f"checkpoint-{step}")
    wrong = find_damage(best, seal) if best != checkpoint else None
    return f"the best before it is {best.name}, and {wrong}" if wrong else None


def _changes(names: list[str], before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in names:
        old, new = before.get(name), now[name]
        if name == "train" and isinstance(old, dict):
            differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            yield ", ".join(f"train.{key} was {old.get(key)}, is {new.get(key)}" for key in differing)
        else:
            yield f"{name} changed" if name == "weights" else f"{name} was {old}, is {new}"


def check_same_data(run: Path, before: PreviousRun, fingerprint: str) -> None:
    """Refuse to go on with other data.

    Raises:
        InputRefused: the build is not the one that the run began with.
    """
    known = before.about.get("fingerprint")
    if known != fingerprint:
        raise InputRefused(
            "data_differs",
            f"the checkpoints in {run} were trained on build {known}, this is {fingerprint}: data, tokenizer, "
            "template or options are others",
            hint="resume with the same data and options, or start anew in another folder",
        )


def begin_run(run: Path, config: Config, fingerprint: str, processes: int, before: PreviousRun | None) -> None:
    """Note that a run begins or goes on; what cannot be gone on from is taken away.

    Raises:
        InputRefused: the data is not that of the run that goes on.
    """
    if before is not None:
        check_same_data(run, before, fingerprint)
        for name in (passed.partition(":")[0] for passed in before.passed):
            shutil.rmtree(run / name)
        return
    run.mkdir(parents=True, exist_ok=True)
    write_json_atomically(run / "run.json", {**describe_setup(config, fingerprint, processes), "finished": False})


def describe_setup(config: Config, fingerprint: str, processes: int) -> dict[str, Any]:
    """Return what decides the weights of a run, for `run.json`."""
    plain = {field.name: field.default for field in fields(SFTConfig)}
    settings = {
        name: value
        for name, value in config.train.items()
        if name not in FREE and not name.startswith(FREE_KINDS) and (name in _OWN or value != plain.get(name, value))
    }
    setup = {
        "model": config.model,
        "weights": digest_weights(config.model),
        "quantization": config.quantization,
        "lora": to_builtins(config.lora.fields()) if config.lora else None,
        "attn_implementation": config.attn_implementation,
        # Secrets decide no weights, and a resumed run may have others.
        "train": drop_redacted(redact(to_builtins(settings)))[0],
        "processes": processes,
    }
    return {"ftdata": __version__, "fingerprint": fingerprint, "setup": setup}


def digest_weights(model: str) -> dict[str, str]:
    """Return the digest of each file that makes a model in its folder; of a hub id, the commit that was loaded last."""
    folder = Path(model)
    if not folder.is_dir():
        known = try_to_load_from_cache(model, "config.json")
        return {"commit": Path(known).parent.name} if isinstance(known, str) else {}
    made_by = (path for kind in ("*.safetensors", "config.json", "*.py") for path in folder.glob(kind))
    return {path.name: sha256_of_file(path) for path in sorted(made_by)}


def list_checkpoints(run: Path) -> list[Path]:
    """Return the folders of checkpoints, by their steps."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def read_run_json(run: Path) -> dict[str, Any]:
    """Return what `run.json` says; empty where there is none.

    Raises:
        InputRefused: it is damaged.
    """
    path = run / "run.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputRefused("damaged_run", f"{path} is damaged: {error}", hint="start anew in another folder") from None
    if not isinstance(about, dict) or (about and not {"fingerprint", "setup"} <= about.keys()):
        raise InputRefused("damaged_run", f"{path} does not describe a run", hint="start anew in another folder")
    return about
