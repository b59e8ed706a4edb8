"""Mark checkpoints as complete, verify checkpoints, and find the checkpoint that a run may resume from.

`run.json` records everything that determines the weights of a run. A run can be resumed only with the same data,
model, adapter and settings; the training length, the logging and the saving may change. The seal of a checkpoint is
written last. A checkpoint is intact if it has a seal and every file matches the digest in the seal; other checkpoints
are skipped with a warning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from msgspec import to_builtins

from ftdata._version import __version__
from ftdata.config import Config
from ftdata.errors import InputRefused, UsageError
from ftdata.redaction import drop_redacted, redact
from ftdata.storage.atomic import check_no_links, convert_os_errors, lock_file
from ftdata.storage.disk import hash_bytes, sha256_of_file, sync, write_json
from ftdata.train.model.trainer_tasks import TRAINER_TASKS

CHANGEABLE_SETTINGS = (
    "num_train_epochs", "max_steps", "disable_tqdm", "report_to", "run_name", "load_best_model_at_end", "use_cpu",
)  # fmt: skip
CHANGEABLE_PREFIXES = ("logging_", "save_", "eval_", "per_device_eval_", "dataloader_", "hub_", "push_")
"""Settings that may change when a run is resumed: training length, logging, saving and evaluation."""

_OVERRIDDEN_DEFAULTS = ("train_sampling_strategy", "learning_rate", "optim", "bf16", "fp16", "activation_checkpointing")
"""Settings whose default in ftdata differs from the default in `SFTConfig` and `DPOConfig`."""

SEAL = "ftdata.json"


@dataclass(frozen=True, slots=True)
class CheckpointSeal:
    """The identity of a run: the fingerprint of the build, and the settings that determine the trained weights.

    The seal file of each checkpoint stores a hash of this identity.
    """

    fingerprint: str
    setup: dict[str, Any]

    @property
    def run(self) -> str:
        """Hash that identifies the run. It is computed from the fingerprint of the build and the settings of the run.

        The path of the model is not hashed if the digests of the model's weights are known.
        """
        setup = {name: value for name, value in self.setup.items() if name != "model" or not self.setup.get("weights")}
        text = json.dumps([self.fingerprint, setup], sort_keys=True)
        return hash_bytes(text.encode())


@dataclass(frozen=True, slots=True)
class PreviousRun:
    """The saved state of an interrupted run: the content of `run.json`, and the checkpoint to resume from.

    Attributes:
        metadata: content of `run.json`.
        checkpoint: folder of the last intact checkpoint.
        skipped: names of later checkpoints, each with the reason why it is skipped.
    """

    metadata: dict[str, Any]
    checkpoint: str
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Number of steps after which the checkpoint was saved."""
        return int(Path(self.checkpoint).name.removeprefix("checkpoint-"))

    def is_done(self, steps: int, patience: int | None) -> bool:
        """Return whether training is complete.

        Training is complete after `steps` steps, or after `patience` evaluations without improvement.
        """
        path = Path(self.checkpoint) / "trainer_state.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        callback = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
        callback = callback[0] if isinstance(callback, list) else callback
        waited = callback.get("attributes", {}).get("early_stopping_patience_counter", 0)
        return state["global_step"] >= steps or (patience is not None and waited >= patience)


def write_seal(checkpoint: Path, seal: CheckpointSeal) -> None:
    """Sync all files of a checkpoint to disk, then write the seal file that marks the checkpoint as complete."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL:
            files[str(path.relative_to(checkpoint))] = sha256_of_file(path)
            sync(path)
    content = {"ftdata": __version__, "run": seal.run, "fingerprint": seal.fingerprint, "files": files}
    write_json_atomically(checkpoint / SEAL, content)


def write_json_atomically(path: Path, content: dict[str, Any]) -> None:
    """Redact all secrets in the content, and write the content atomically to a JSON file."""
    new = path.with_name(f"{path.name}.tmp")
    write_json(new, redact(content))
    sync(new)
    new.replace(path)
    sync(path.parent)


def find_damage(checkpoint: Path, seal: CheckpointSeal | None = None) -> str | None:
    """Verify a checkpoint. Return the reason why the checkpoint cannot be used, or `None` if it is intact.

    Args:
        checkpoint: folder of the checkpoint.
        seal: the run that the checkpoint must belong to.
    """
    try:
        content = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        files, run = dict(content["files"]), content["run"]
    except FileNotFoundError:
        return "it is incomplete"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{SEAL} is damaged"
    for name, digest in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of_file(path) != digest:
            return f"{name} is damaged"
    return "it belongs to another run" if seal is not None and run != seal.run else None


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Lock a run directory inside a `with` block, so that only one training at a time writes to it.

    Raises:
        UsageError: another process is training in the directory.
        StorageError: the directory cannot be written.
    """
    if run.exists() and not run.is_dir():
        # `check_run_folder` reports the file.
        yield
        return
    path = run / ".lock"
    with ExitStack() as stack:
        with convert_os_errors(run):
            is_locked = stack.enter_context(lock_file(path))
        if not is_locked:
            hint = "wait until it ends, or choose another folder"
            raise UsageError("run_in_use", f"another process is training in {run}", hint=hint)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            # A folder that was created only for the lock is empty.
            with suppress(OSError):
                run.rmdir()


def check_run_folder(run: Path, config: Config, processes: int, *, resume: bool) -> PreviousRun | None:
    """Check that a run may start or resume in a folder, before any file in the folder changes.

    Returns:
        The run to resume, or `None` if the run starts from the beginning.

    Raises:
        UsageError: the folder contains a run or a build; or `resume` is set, but the folder contains no run.
        InputRefused: the folder belongs to a different run, or none of its checkpoints is intact.
        StorageError: the folder contains a symbolic link.
    """
    if run.exists() and not run.is_dir():
        raise UsageError("target_exists", f"the run directory {run} is a file", hint="choose another folder")
    if (run / "manifest.json").is_file():
        raise UsageError("target_exists", f"the run directory {run} contains a build", hint="choose another folder")
    if (run / "config.json").is_file():
        raise UsageError("target_exists", f"the run directory {run} contains a model", hint="choose another folder")
    if run.exists():
        check_no_links(run)
    metadata = read_run_json(run)
    folders = list_checkpoints(run)
    if not resume:
        _check_no_run(run, metadata, folders)
        return None
    if not metadata:
        raise UsageError("nothing_to_resume", f"{run} contains no run to resume", hint="start without --resume")
    if not folders:
        # The run was interrupted before its first checkpoint, so it starts again.
        return None
    _check_same_run(run, metadata, describe_setup(config, "", processes)["setup"])
    patience = config.early_stopping
    if metadata.get("finished") and patience is not None and (metadata.get("stopped_early") or 0) >= patience:
        hint = "increase early_stopping to continue training"
        raise UsageError("run_finished", f"the run in {run} is finished: the metric stopped improving", hint=hint)
    keeps_best = config.early_stopping is not None or bool(config.train.get("load_best_model_at_end"))
    return _find_last_intact(run, metadata, folders, keeps_best=keeps_best)


def _check_no_run(run: Path, metadata: dict[str, Any], folders: list[Path]) -> None:
    """Raise an error if a folder contains a finished run, or a run with checkpoints."""
    if metadata.get("finished"):
        hint = "choose another folder; or continue the run with --resume and more epochs or steps"
        raise UsageError("run_exists", f"{run} already contains a run that was finished", hint=hint)
    if folders:
        problem = f"{run} already contains a run that was interrupted after {folders[-1].name}"
        raise UsageError("run_exists", problem, hint="resume it with --resume, or choose another folder")


def _check_same_run(run: Path, metadata: dict[str, Any], now: dict[str, Any]) -> None:
    before = metadata.get("setup", {})
    changed = [name for name in now if now[name] != before.get(name)]
    if now["weights"] and "weights" not in changed and "model" in changed:
        # The same model is in another folder.
        changed.remove("model")
    if changed:
        message = f"the run in {run} has different settings: {'; '.join(_describe_changes(changed, before, now))}"
        hint = "resume with the original settings, or start a new run in another folder"
        raise InputRefused("run_differs", message, hint=hint)


def _find_last_intact(run: Path, metadata: dict[str, Any], folders: list[Path], *, keeps_best: bool) -> PreviousRun:
    seal = CheckpointSeal(metadata["fingerprint"], metadata["setup"])
    skipped: list[str] = []
    for path in reversed(folders):
        damage = find_damage(path, seal) or (_find_damage_of_best(path, seal) if keeps_best else None)
        if damage is None:
            return PreviousRun(metadata, str(path), tuple(skipped))
        skipped.append(f"{path.name}: {damage}")
    listed = "; ".join(skipped)
    raise InputRefused("no_whole_checkpoint", f"{run} contains no intact checkpoint: {listed}", hint="start a new run")


def _find_damage_of_best(checkpoint: Path, seal: CheckpointSeal) -> str | None:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if (step := state.get("best_global_step")) is None:
        return None
    best = checkpoint.with_name(f"checkpoint-{step}")
    damage = find_damage(best, seal) if best != checkpoint else None
    return f"the best checkpoint before it is {best.name}, and {damage}" if damage else None


def _describe_changes(names: list[str], before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in names:
        old, new = before.get(name), now[name]
        if name == "train" and isinstance(old, dict):
            differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            yield ", ".join(f"train.{key} was {old.get(key)}, is {new.get(key)}" for key in differing)
        else:
            yield f"{name} changed" if name == "weights" else f"{name} was {old}, is {new}"


def check_same_data(run: Path, before: PreviousRun, fingerprint: str) -> None:
    """Raise an error if the data differs from the data that the resumed run started with.

    Raises:
        InputRefused: the build is not the build that the run started with.
    """
    expected = before.metadata.get("fingerprint")
    if expected != fingerprint:
        raise InputRefused(
            "data_differs",
            f"the run in {run} was trained on build {expected}, but the current build is {fingerprint}: the data, "
            "the tokenizer, the template or the options differ",
            hint="resume with the same data and options, or start a new run in another folder",
        )


def begin_run(run: Path, config: Config, fingerprint: str, processes: int, before: PreviousRun | None) -> None:
    """Prepare the run directory: write `run.json` for a new run, or delete the unusable checkpoints of a resumed run.

    Raises:
        InputRefused: the data differs from the data of the run that is being resumed.
    """
    if before is not None:
        check_same_data(run, before, fingerprint)
        for name in (skipped.partition(":")[0] for skipped in before.skipped):
            shutil.rmtree(run / name)
        return
    run.mkdir(parents=True, exist_ok=True)
    write_json_atomically(run / "run.json", {**describe_setup(config, fingerprint, processes), "finished": False})


def describe_setup(config: Config, fingerprint: str, processes: int) -> dict[str, Any]:
    """Return the settings that determine the trained weights, in the format of `run.json`."""
    defaults = {field.name: field.default for field in fields(TRAINER_TASKS[config.task].config_class)}
    settings = {
        name: value
        for name, value in config.train.items()
        if name not in CHANGEABLE_SETTINGS
        and not name.startswith(CHANGEABLE_PREFIXES)
        and (name in _OVERRIDDEN_DEFAULTS or value != defaults.get(name, value))
    }
    setup = {
        "task": config.task,
        "model": config.model,
        "weights": digest_weights(config.model),
        "quantization": config.quantization,
        "lora": to_builtins(config.lora.fields()) if config.lora else None,
        "attn_implementation": config.attn_implementation,
        # Secrets do not affect the weights, and they may change when a run is resumed.
        "train": drop_redacted(redact(to_builtins(settings)))[0],
        "processes": processes,
    }
    return {"ftdata": __version__, "fingerprint": fingerprint, "setup": setup}


def digest_weights(model: str) -> dict[str, str]:
    """Return the SHA-256 digest of each model file that contains weights, configuration or Python code.

    For a Hub id, return the commit that was loaded last.
    """
    folder = Path(model)
    if not folder.is_dir():
        cached = try_to_load_from_cache(model, "config.json")
        return {"commit": Path(cached).parent.name} if isinstance(cached, str) else {}
    files = (path for kind in ("*.safetensors", "config.json", "*.py") for path in folder.glob(kind))
    return {path.name: sha256_of_file(path) for path in sorted(files)}


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, sorted by training step."""
    folders = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def read_run_json(run: Path) -> dict[str, Any]:
    """Return the content of `run.json`, or an empty dict if the file does not exist.

    Raises:
        InputRefused: the file is damaged.
    """
    path = run / "run.json"
    hint = "start a new run in another folder"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputRefused("damaged_run", f"{path} is damaged: {error}", hint=hint) from None
    if not isinstance(metadata, dict) or (metadata and not {"fingerprint", "setup"} <= metadata.keys()):
        raise InputRefused("damaged_run", f"{path} does not contain the keys fingerprint and setup", hint=hint)
    return metadata
