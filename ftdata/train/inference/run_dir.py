"""Open a finished run, load the base model and the tuned model, and verify the saved model."""

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

LOGIT_TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""dtype -> maximum difference of logits after a model is saved and reloaded, relative to the largest logit."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished training run: the run directory, the content of `run.json`, and access to the saved model.

    Attributes:
        folder: the run directory.
        metadata: the content of `run.json`.
        trust_remote_code: whether Python code that comes with the model may run.
    """

    folder: Path
    metadata: dict[str, Any]
    trust_remote_code: bool = False

    @property
    def model(self) -> Path:
        """Folder of the trained model or adapter."""
        return self.folder / "model"

    @property
    def build(self) -> Path:
        """Folder of the build that the model was trained on."""
        return self.folder / str(self.metadata["build"])

    def check_generates(self) -> None:
        """Check that the trained model can generate text.

        Raises:
            UsageError: it is a reward model.
        """
        if self.task == "reward":
            problem = f"{self.folder} contains a reward model, which generates no text"
            raise UsageError("reward_model", problem, hint="its scores on the test split are in run.json")

    def check_build(self) -> None:
        """Check that the build has not changed since the model was trained on it.

        Raises:
            InputRefused: the build has another fingerprint, or does not exist.
        """
        fingerprint, expected = read_manifest(self.build).get("fingerprint"), self.metadata.get("fingerprint")
        if expected is not None and fingerprint != expected:
            message = f"{self.build} has changed since {self.folder} was trained on it"
            hint = "build the data again with the original options, or pass prompts with --data"
            raise InputRefused("data_differs", message, hint=hint)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the build was created with."""
        return load_tokenizer(self.metadata["tokenizer"])

    @property
    def recipe(self) -> Recipe:
        """The recipe that rendered and tokenized the rows of the build."""
        return rebuild_recipe(self.metadata["tokenizer"], self.metadata["options"])

    @property
    def task(self) -> str:
        """The task of the run: `sft`, `dpo`, `reward` or `kto`."""
        return str(self.metadata["setup"].get("task", "sft"))

    @property
    def generation_config(self) -> GenerationConfig:
        """Generation config of the trained model. It contains the stop tokens and the pad token."""
        return GenerationConfig.from_pretrained(str(self.model))

    @property
    def stop_ids(self) -> set[int]:
        """Ids of the stop tokens of the trained model."""
        ids = self.generation_config.eos_token_id
        return set(ids if isinstance(ids, list) else [ids])


def open_run(folder: Path, *, trust_remote_code: bool = False) -> FinishedRun:
    """Open the run directory of a finished run.

    Args:
        folder: the run directory.
        trust_remote_code: whether Python code that comes with the model may run; the value in `run.json` is ignored
            because somebody else may have written it.

    Raises:
        UsageError: the folder is not a finished run.
    """
    metadata = checkpoints.read_run_json(folder)
    if not metadata.get("finished"):
        hint = f"resume it with `ftdata train {folder} --resume`" if checkpoints.list_checkpoints(folder) else ""
        problem = "contains no finished run" if folder.is_dir() else "does not exist"
        raise UsageError("not_a_run", f"the folder {folder} {problem}", hint=hint or "create a run with `ftdata train`")
    if "options" not in metadata:
        # Earlier versions did not write the options to `run.json`.
        run = FinishedRun(folder, metadata, trust_remote_code)
        metadata = {**metadata, "options": read_manifest(run.build)["options"]}
    return FinishedRun(folder, metadata, trust_remote_code)


def load_base_model(
    run: FinishedRun, *, quantization: Quantization = None, dtype: Any = None, answers: bool = False
) -> Any:
    """Load the base model of a run, and add embeddings for the tokens that were added in training.

    Args:
        run: a finished run.
        quantization: the quantization of the run, or `None`.
        dtype: dtype of the weights; `None` selects the compute dtype of this device.
        answers: whether the model is loaded for generation, for which speed matters more than memory.

    Raises:
        InputRefused: the model cannot be loaded, or its files have changed.
    """
    setup = run.metadata["setup"]
    if setup["weights"] and checkpoints.digest_weights(setup["model"]) != setup["weights"]:
        message = f"the base model {setup['model']} has changed since the training of {run.folder}"
        hint = "restore the original files of the model, or train again"
        raise InputRefused("base_model_differs", message, hint=hint)
    attention, trusts = setup.get("attn_implementation"), run.trust_remote_code
    options = {"attention": attention, "trust_remote_code": trusts, "task": run.task}
    model = load_model(setup["model"], quantization, dtype=dtype, **options)
    if answers:
        model = dequantize(model)
    rows = run.metadata.get("embeddings")
    if rows and rows > model.get_input_embeddings().weight.shape[0]:
        resize_embeddings(model, rows)
    return model


def load_tuned_model(run: FinishedRun, base: Any = None, *, dtype: Any = None) -> Any:
    """Load the trained model of a run: the base model with the adapter, or the full model.

    Args:
        run: a finished run.
        base: the base model if it is already loaded; it is modified.
        dtype: dtype of the weights; `None` selects the compute dtype of this device.

    Raises:
        InputRefused: the saved model cannot be loaded.
    """
    setup = run.metadata["setup"]
    try:
        if run.metadata["adapter"]:
            base = base if base is not None else load_base_model(run, quantization=setup["quantization"], dtype=dtype)
            check_weights(run.model)
            model = PeftModel.from_pretrained(base, str(run.model))
        else:
            attention, trusts = setup.get("attn_implementation"), run.trust_remote_code
            options = {"attention": attention, "trust_remote_code": trusts, "task": run.task}
            model = load_model(str(run.model), dtype=dtype, **options)
    except FtdataError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        message = f"{run.model} cannot be loaded: {describe_exception(error)}"
        raise InputRefused("damaged_model", message, hint="train again") from None
    if run.task != "reward":
        model.generation_config = run.generation_config
    return model


def compute_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Compute a model's logits for a sequence of tokens (float32 `[tokens, vocabulary]`, on the CPU)."""
    was_training = model.training
    model.eval()
    with torch.inference_mode(), training_precision(model.device, model.dtype):
        logits = model(input_ids=torch.tensor([ids]).to(model.device), use_cache=False).logits[0].float().cpu()
    model.train(was_training)
    return logits


def check_reloads(run: FinishedRun, ids: list[int], before: torch.Tensor, dtype: torch.dtype) -> Any:
    """Reload the saved model of a run, and compare its logits with the logits before saving. Return the model.

    Raises:
        InternalError: the logits differ.
    """
    gc.collect()
    model = load_tuned_model(run, dtype=dtype)
    after = compute_logits(model, ids)
    error = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
    tolerance = LOGIT_TOLERANCES[dtype if dtype in LOGIT_TOLERANCES else torch.float32]
    if error > tolerance:
        difference = f"the largest difference is {error:.2g} times the largest logit"
        message = f"{run.model} computes different logits after reloading: {difference}"
        raise InternalError("reload", message)
    return model
