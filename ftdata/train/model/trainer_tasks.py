"""The trainer classes and default settings of each training task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig


@dataclass(frozen=True)
class TrainerTask:
    """The settings of a training task that do not depend on a run.

    Attributes:
        config_class: the class of TRL that contains the settings of the trainer.
        model_class: the class of transformers that loads the model.
        metrics: the metrics of an evaluation that can select the best checkpoint.
        learning_rate: the default learning rate of full fine-tuning.
        adapter_learning_rate: the default learning rate of an adapter. It is higher, because an adapter starts at zero,
            whereas full fine-tuning changes pretrained weights.
        no_grad_forward_passes: the number of forward passes without a gradient in a training step; 0 if there is no
            reference model.
    """

    config_class: Any
    model_class: Any
    metrics: tuple[str, ...]
    learning_rate: float
    adapter_learning_rate: float
    no_grad_forward_passes: int = 0


TRAINER_TASKS = {
    "sft": TrainerTask(SFTConfig, AutoModelForCausalLM, ("loss", "perplexity"), 2e-5, 2e-4),
    # The rates of full DPO and KTO are the defaults of TRL, and so is the rate of an adapter of a reward model.
    "dpo": TrainerTask(
        DPOConfig,
        AutoModelForCausalLM,
        ("loss", "rewards/accuracies", "rewards/margins"),
        1e-6,
        1e-5,
        no_grad_forward_passes=1,
    ),
    "reward": TrainerTask(RewardConfig, AutoModelForSequenceClassification, ("loss", "accuracy", "margin"), 1e-5, 1e-4),
    # The reference model processes the answers. Both models process the answers to other prompts.
    "kto": TrainerTask(
        KTOConfig, AutoModelForCausalLM, ("loss", "rewards/margins"), 1e-6, 1e-5, no_grad_forward_passes=3
    ),
}
"""Task of a run -> its settings."""


def is_vision_model(model_config: Any) -> bool:
    """Return whether a model generates text from images and text, according to its `transformers` configuration."""
    return hasattr(model_config, "vision_config") and type(model_config) in AutoModelForImageTextToText._model_mapping


def find_model_class(task: str, model_config: Any) -> Any:
    """Return the class of transformers that loads the model of a run.

    Args:
        task: the task of the run.
        model_config: the `transformers` configuration of the model.
    """
    model_class = TRAINER_TASKS[task].model_class
    is_generator = model_class is AutoModelForCausalLM
    return AutoModelForImageTextToText if is_generator and is_vision_model(model_config) else model_class
