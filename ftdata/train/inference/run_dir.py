"""A finished run: its model saved, read back and compared, and loaded again."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import GenerationConfig

from ftdata.build.store import read_manifest
from ftdata.errors import FtdataError, InputRefused, InternalError, UsageError, describe_exception
from ftdata.pipeline.recipe import Recipe
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.train import checkpoints
from ftdata.train.inference.prompts import rebuild_recipe
from ftdata.train.model.device import training_precision
from ftdata.train.model.load import check_weights, dequantize, load_model, resize_embeddings
from ftdata.train.model.quantization import Quantization

CLOSE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""How far logits may be off after a model was written and read, relative to the largest: what the dtype rounds."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that came to its end; `trusted`: whether Python code that comes with its model may run."""

    folder: Path
    about: dict[str, Any]
    trusted: bool = False

    @property
    def model(self) -> Path:
        """The folder of the trained model, or adapter."""
        return self.folder / "model"

    @property
    def build(self) -> Path:
        """What it was trained on."""
        return self.folder / str(self.about["build"])

    def check_build(self) -> None:
        """Refuse a build that has taken the place of the one that was trained on.

        Raises:
            InputRefused: it has another fingerprint, or is not there.
        """
        there, known = read_manifest(self.build).get("fingerprint"), self.about.get("fingerprint")
        if known is not None and there != known:
            told = f"{self.build} is not the build that {self.folder} was trained on any more"
            raise InputRefused("data_differs", told, hint="build it again as it was, or name questions with --data")

    @property
    def tokenizer(self) -> Tokenizer:
        """What it was built with."""
        return load_tokenizer(self.about["tokenizer"])

    @property
    def recipe(self) -> Recipe:
        """How its data was made."""
        return rebuild_recipe(self.about["tokenizer"], self.about["options"])

    @property
    def settings(self) -> GenerationConfig:
        """How the trained model stops and pads."""
        return GenerationConfig.from_pretrained(str(self.model))

    @property
    def stops(self) -> set[int]:
        """Ids of the tokens that it stops at."""
        found = self.settings.eos_token_id
        return set(found if isinstance(found, list) else [found])


def open_run(folder: Path, *, trust_remote_code: bool = False) -> FinishedRun:
    """Return a finished run.

    Args:
        folder: its folder.
        trust_remote_code: whether Python code that comes with its model may run: what the run says of that is whoever
            made it.

    Raises:
        UsageError: the folder is no finished run.
    """
    about = checkpoints.read_run_json(folder)
    if not about.get("finished"):
        begun = f"go on with `ftdata train {folder} --resume`" if checkpoints.list_checkpoints(folder) else ""
        what = "is no finished run" if folder.is_dir() else "is not there"
        raise UsageError("not_a_run", f"{folder} {what}", hint=begun or "make one with `ftdata train`")
    if "options" not in about:
        # Runs of an earlier version say less of what they were.
        found = FinishedRun(folder, about, trust_remote_code)
        about = {**about, "options": read_manifest(found.build)["options"]}
    return FinishedRun(folder, about, trust_remote_code)


def load_base_model(
    run: FinishedRun, *, quantization: Quantization = None, dtype: Any = None, answers: bool = False
) -> Any:
    """Load the model that a run began with; its embeddings have room for the tokens that were added.

    Args:
        run: a finished run.
        quantization: as it was trained, or `None`.
        dtype: of the weights; `None` takes that of computing here.
        answers: whether it is loaded to answer, so that speed matters more than memory.

    Raises:
        InputRefused: it cannot be loaded, or is another by now.
    """
    setup = run.about["setup"]
    if setup["weights"] and checkpoints.digest_weights(setup["model"]) != setup["weights"]:
        raise InputRefused(
            "base_model_differs",
            f"{setup['model']} is not what {run.folder} was trained from: its files have changed",
            hint="put the model back that it was, or train again",
        )
    model = load_model(
        setup["model"],
        quantization,
        dtype=dtype,
        attention=setup.get("attn_implementation"),
        trust_remote_code=run.trusted,
    )
    if answers:
        model = dequantize(model)
    rows = run.about.get("embeddings")
    if rows and rows > model.get_input_embeddings().weight.shape[0]:
        resize_embeddings(model, rows)
    return model


def load_tuned_model(run: FinishedRun, base: Any = None, *, dtype: Any = None) -> Any:
    """Load the trained model: its adapter on the base model, or all of it.

    Args:
        run: a finished run.
        base: the base model where it is loaded already; it is changed.
        dtype: of the weights; `None` takes that of computing here.

    Raises:
        InputRefused: what was saved cannot be read.
    """
    setup = run.about["setup"]
    try:
        if run.about["adapter"]:
            base = base if base is not None else load_base_model(run, quantization=setup["quantization"], dtype=dtype)
            check_weights(run.model)
            model = PeftModel.from_pretrained(base, str(run.model))
        else:
            attention = setup.get("attn_implementation")
            model = load_model(str(run.model), dtype=dtype, attention=attention, trust_remote_code=run.trusted)
    except FtdataError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputRefused(
            "damaged_model", f"{run.model} cannot be loaded: {describe_exception(error)}", hint="train again"
        ) from None
    model.generation_config = run.settings
    return model


def compute_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits of some tokens, on the CPU."""
    was_training = model.training
    model.eval()
    with torch.inference_mode(), training_precision(model.device, model.dtype):
        found = model(input_ids=torch.tensor([ids]).to(model.device), use_cache=False).logits[0].float().cpu()
    model.train(was_training)
    return found


def check_reloads(run: FinishedRun, ids: list[int], before: torch.Tensor, dtype: torch.dtype) -> Any:
    """Load a run's model from the disk, and compare what it says with what it said before; return it.

    Raises:
        InternalError: it says something else.
    """
    gc.collect()
    model = load_tuned_model(run, dtype=dtype)
    after = compute_logits(model, ids)
    off = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
    close = CLOSE[dtype if dtype in CLOSE else torch.float32]
    if off > close:
        message = f"{run.model} was saved, but says something else when it is loaded again: logits are off by {off:.2g}"
        raise InternalError("reload", message)
    return model
