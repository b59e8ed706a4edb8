"""Estimate the model size, memory, compute and time of a training run before the run starts.

The model is created without weights, on the device `meta`, so nothing is loaded.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from peft import get_peft_model

from ftdata.config import Config
from ftdata.errors import InputRefused, UsageError, count_noun, describe_exception
from ftdata.train.dataset import has_pairs, list_lengths
from ftdata.train.model import device
from ftdata.train.model.adapter import check_modules, make_lora_config
from ftdata.train.model.load import weights_dtype
from ftdata.train.model.quantization import bytes_per_weight, quantization_name, skipped_modules
from ftdata.train.model.trainer_tasks import TRAINER_TASKS, find_model_class, is_vision_model
from ftdata.train.model.vision import freeze_vision
from ftdata.types import IGNORE_INDEX

OPTIMIZER_BYTES = {
    "adafactor": 0.05, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion": 4, "lion_8bit": 1,
    "lion_32bit": 4, "paged_lion_8bit": 1, "paged_lion_32bit": 4, "sgd": 0,
}  # fmt: skip
"""Bytes of optimizer state per trained weight; Adam and unlisted optimizers use 8, two float32 values."""

FEW_STEPS = 20
"""Number of steps below which the estimate contains a note that the run is short."""

UTILIZATION = 0.4
"""Share of the matrix multiplication speed of a device that training typically reaches."""


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """The numbers of rows, tokens and documents in a split.

    Attributes:
        lengths: number of tokens of each row.
        tokens: number of all tokens.
        trained: number of trained tokens.
        documents: number of documents, or of preference pairs.
    """

    lengths: NDArray[np.int64]
    tokens: int
    trained: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The expected size, memory, compute and time of a training run.

    Attributes:
        model: name of the model.
        parameters: number of parameters of the model.
        trainable: number of trainable parameters.
        dtype: compute dtype.
        quantization: `"nf4"`, `"fp4"`, `"int8"` or `None`.
        device: name of the device.
        processes: number of training processes.
        rows: number of rows of the train split: packed sequences, or examples.
        examples: number of examples of the train split.
        tokens: number of tokens of all rows.
        trained_tokens: number of tokens that carry loss.
        longest: number of tokens of the longest row.
        epochs: number of passes over all rows.
        steps: number of optimizer steps.
        rows_per_step: number of rows per step, in all processes.
        tokens_per_step: mean number of tokens per step.
        flops_per_step: floating-point operations per step: six per token and non-embedding weight (Kaplan et al. 2020),
            as in `Trainer.floating_point_ops`, independent of the number of trainable parameters.
        flops: floating-point operations of all steps.
        seconds: approximate time of all steps and evaluations.
        weights: bytes of the weights in each process.
        gradients: bytes of the gradients.
        optimizer: bytes of the optimizer state.
        activations: bytes of the activations that the backward pass needs, for the largest batch.
        free: bytes of available memory on the device.
    """

    model: str
    parameters: int
    trainable: int
    dtype: str
    quantization: str | None
    device: str
    processes: int
    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    epochs: float
    steps: int
    rows_per_step: int
    tokens_per_step: int
    flops_per_step: int
    flops: int
    seconds: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    free: int

    @property
    def memory(self) -> int:
        """Total memory of one training process, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as a JSON-serializable dict."""
        return {**asdict(self), "memory": self.memory}

    def __str__(self) -> str:
        share = self.trainable / self.parameters
        kind = f"{self.quantization}, computing in {self.dtype}" if self.quantization else self.dtype
        names = ("weights", "gradients", "optimizer", "activations")
        parts = " + ".join(f"{_bytes(getattr(self, name))} {name}" for name in names)
        scope = f" in each of {self.processes} processes" if self.processes > 1 else ""
        note = "a model hardly changes in so few steps: increase num_train_epochs, or use fewer rows per step"
        packed = f" with {count_noun(self.examples, 'example')}" if self.examples > self.rows else ""
        rows = f"{count_noun(self.rows, 'pack' if packed else 'row')}{packed}"
        short_note = f"\nnote     {note}" if self.steps < FEW_STEPS else ""
        return (
            f"model    {self.model}: {self.parameters:,} parameters, {self.trainable:,} trained ({share:.2%}), {kind}\n"
            f"data     {rows}, {self.tokens:,} tokens, {self.trained_tokens:,} trained "
            f"({self.trained_tokens / max(self.tokens, 1):.1%}); longest row: {self.longest:,} tokens\n"
            f"run      {self.steps:,} steps of {self.rows_per_step:,} rows, {self.epochs:g} epochs; "
            f"{_with_prefix(self.flops_per_step)}FLOP per step, {_with_prefix(self.flops)}FLOP in total\n"
            f"memory   about {_bytes(self.memory)} of {_bytes(self.free)} free{scope}: {parts}\n"
            f"time     about {_time(self.seconds)} on {self.device}{short_note}"
        )


def check_adapter(config: Config, model_config: Any) -> None:
    """Check that the LoRA settings fit the model. The model is created without weights.

    Raises:
        UsageError: the model has no such module, layer or token.
    """
    with torch.device("meta"):
        check_modules(config, _make_shapes(config, model_config, weights_dtype(config)))


def count_split(split: Any) -> SplitCounts:
    """Count the rows, tokens and documents of a split. Read the split in chunks to save memory.

    The prompt of a preference pair is counted twice, because it precedes both sides.
    """
    is_paired = has_pairs(split)
    ids = ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids") if is_paired else ("input_ids",)
    lengths, trained, documents = [np.empty(0, np.int64)], 0, 0
    for batch in split.data.to_batches():
        lengths.append(np.sum([list_lengths(batch, name) for name in ids], axis=0))
        for name in ("chosen_labels", "rejected_labels") if is_paired else ("labels",):
            labels = pc.list_flatten(batch.column(name))
            trained += pc.sum(pc.not_equal(labels, pa.scalar(IGNORE_INDEX, labels.type))).as_py() or 0
        documents += len(batch) if is_paired else int(list_lengths(batch, "seq_lengths").sum())
    joined = np.concatenate(lengths)
    return SplitCounts(joined, int(joined.sum()), trained, documents)


def estimate_run(
    config: Config,
    model_config: Any,
    rows: SplitCounts,
    arguments: Any,
    vocabulary: int = 0,
    test_tokens: int = 0,
) -> Estimate:
    """Estimate the memory, compute, steps and time of a run.

    Args:
        config: the configuration of the run.
        model_config: the configuration of the model.
        rows: the counts of the train split.
        arguments: the settings of the trainer.
        vocabulary: the largest token id plus one; if the embeddings must grow for it, they are trained in full.
        test_tokens: the number of tokens of the test split, which every evaluation reads.

    Raises:
        UsageError: the adapter does not fit the model, or the run would have 0 steps.
    """
    dtype, longest = weights_dtype(config), int(rows.lengths.max())
    with torch.device("meta"):
        model = _make_shapes(config, model_config, dtype)
        weights = _weight_bytes(model, config, dtype)
        flops_per_token = 6 * model.num_parameters(exclude_embeddings=True)
        token_bytes = _kept_per_token(model, dtype, longest, recomputes=bool(arguments.gradient_checkpointing))
        grows = vocabulary > model.get_input_embeddings().weight.shape[0]
        lora = make_lora_config(config, model, grows=grows, shapes=True)
        if lora is None and is_vision_model(model_config):
            freeze_vision(model)
        if lora is not None:
            # Adapter weights are float32, independent of the dtype of the model.
            try:
                model = get_peft_model(model, lora)
            except (ValueError, RuntimeError) as error:
                message = f"the adapter cannot be added to {config.model}: {describe_exception(error)}"
                raise UsageError("lora", message) from None
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * device.process_count()
    steps = count_steps(len(rows.lengths), arguments)
    if steps < 1:
        raise UsageError("no_steps", "the run would have 0 steps", hint="set num_train_epochs or max_steps")
    batch = int(np.sort(rows.lengths)[::-1][: arguments.per_device_train_batch_size].sum())
    tokens_per_step = round(rows.tokens / len(rows.lengths) * min(per_step, len(rows.lengths)))
    flops = flops_per_token * tokens_per_step
    # Of six operations, two are for the forward pass, two for the gradients of the activations, and two for the
    # gradients of the weights, which frozen weights do not need.
    shares = 2 + 2 + 2 * (trainable == total) + 2 * bool(arguments.gradient_checkpointing)
    forward_passes = TRAINER_TASKS[config.task].no_grad_forward_passes
    if forward_passes and not arguments.precompute_ref_log_probs:
        shares += 2 * forward_passes
        # With an adapter, the reference model is the model without the adapter.
        weights *= 1 if lora is not None else 2
    evaluation_flops = flops_per_token * test_tokens * count_evaluations(steps, len(rows.lengths), arguments)
    flops_per_second = device.measure_flops(device.compute_dtype(config.train)) * UTILIZATION * device.process_count()
    state = OPTIMIZER_BYTES.get(str(getattr(arguments.optim, "value", arguments.optim)), 8)
    return Estimate(
        model=config.model,
        parameters=total,
        trainable=trainable,
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization_name(config.quantization),
        device=device.device_name(),
        processes=device.process_count(),
        rows=len(rows.lengths),
        examples=rows.documents,
        tokens=rows.tokens,
        trained_tokens=rows.trained,
        longest=longest,
        epochs=round(steps / count_steps(len(rows.lengths), arguments, epochs=1), 2),
        steps=steps,
        rows_per_step=per_step,
        tokens_per_step=tokens_per_step,
        flops_per_step=flops,
        flops=flops * steps,
        seconds=(flops * steps * shares + evaluation_flops * 2) / 6 / flops_per_second,
        weights=weights + (4 * trainable if lora is not None else 0),
        gradients=4 * trainable,
        optimizer=round(state * trainable),
        activations=round(token_bytes * batch),
        free=device.free_memory(),
    )


def count_evaluations(steps: int, rows: int, arguments: Any) -> int:
    """Return how often a run with a test split evaluates the model, with the evaluation of the finished model.

    Args:
        steps: the number of steps.
        rows: the number of rows of the train split.
        arguments: the settings of the trainer.
    """
    strategy = str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy))
    if strategy == "steps":
        interval = arguments.eval_steps or arguments.logging_steps
        # A number below 1 is a share of all steps.
        return 1 + int(steps // (interval if interval >= 1 else max(interval * steps, 1)))
    return 1 + (math.ceil(steps / count_steps(rows, arguments, epochs=1)) if strategy == "epoch" else 0)


def check_memory(estimate: Estimate) -> None:
    """Raise an error if the weights, gradients and optimizer state of a run exceed the available memory.

    Raises:
        InputRefused: the run does not fit; the hint contains settings that reduce the memory.
    """
    minimum = estimate.weights + estimate.gradients + estimate.optimizer
    if minimum > estimate.free:
        fixes = ["use a smaller model"]
        if estimate.trainable == estimate.parameters:
            fixes.insert(0, "lora: {r: 16}")
        if estimate.quantization is None:
            fixes.insert(0, "quantization: nf4")
        message = (
            f"{estimate.model} cannot be trained on this machine: "
            f"weights, gradients and optimizer need {_bytes(minimum)}, "
            f"but only {_bytes(estimate.free)} are free on {estimate.device}"
        )
        raise InputRefused("too_large", message, hint=", or ".join(fixes))


def count_steps(rows: int, arguments: Any, epochs: float | None = None) -> int:
    """Compute the number of optimizer steps of a run in the same way as the trainer.

    Args:
        rows: number of rows.
        arguments: the settings of the trainer.
        epochs: number of epochs; `None` selects the number in the settings.
    """
    if epochs is None and arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches = math.ceil(rows / (arguments.per_device_train_batch_size * device.process_count()))
    steps_per_epoch: int = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    epochs = float(arguments.num_train_epochs) if epochs is None else epochs
    return math.ceil(epochs * steps_per_epoch)


def _make_shapes(config: Config, model_config: Any, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    options["trust_remote_code"] = config.trust_remote_code
    try:
        if config.task == "reward":
            model_config = copy.deepcopy(model_config)
            model_config.num_labels = 1
        return find_model_class(config.task, model_config).from_config(model_config, dtype=dtype, **options)
    except (ValueError, ImportError) as error:
        message = f"the model {config.model} cannot be created: {describe_exception(error)}"
        raise UsageError("model_setting", message) from None


def _weight_bytes(model: Any, config: Config, dtype: torch.dtype) -> int:
    if config.quantization is None:
        weights: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        return sum(int(weight.nbytes) for weight in weights)
    head = model.get_output_embeddings()
    skipped = skipped_modules(config.quantization)
    quantized_ids = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not name.endswith(skipped)
    }
    sizes = {True: bytes_per_weight(config.quantization), False: dtype.itemsize}
    total: float = sum(weight.numel() * sizes[id(weight) in quantized_ids] for weight in model.parameters())
    return round(total)


def _kept_per_token(model: Any, dtype: torch.dtype, longest: int, *, recomputes: bool) -> float:
    """Estimate how many bytes of activations are stored per token for the backward pass.

    Each matrix multiplication keeps its input, and the next operation keeps its output. With the activations that norms
    and activation functions keep, the total is about 1.3 times the inputs and outputs of the linear layers, measured on
    several models with an error of up to a factor of two. Eager attention also keeps the attention weights of all pairs
    of tokens. With gradient checkpointing, only the inputs of all blocks and the activations of one block are kept.
    """
    head = model.get_output_embeddings()
    sizes = [
        sum(module.weight.shape)
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.dim() == 2
        and module is not head
        and not isinstance(module, torch.nn.Embedding)
    ]
    text = model.config.get_text_config()
    layers = max(int(text.num_hidden_layers), 1)
    per_layer = 1.3 * sum(sizes) / layers
    if model.config._attn_implementation == "eager":
        per_layer += 2 * int(getattr(text, "num_attention_heads", 0)) * longest
    values = layers * int(text.hidden_size) + per_layer if recomputes else layers * per_layer
    return float(values * dtype.itemsize)


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number / 1e3:,.0f} kB"


def _with_prefix(number: float) -> str:
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.4g} {prefix}"
    return f"{number:,.0f} "


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 1):.0f} s"
