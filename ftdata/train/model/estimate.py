"""Before a run: how large the model is, how much is trained, what memory and computing it takes, and how long.

Nothing is loaded for it: the model is made of shapes alone, on the device `meta`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from ftdata.config import Config
from ftdata.errors import InputRefused, UsageError, describe_exception
from ftdata.train.model import device
from ftdata.train.model.adapter import check_modules, make_lora_config
from ftdata.train.model.load import weights_dtype
from ftdata.train.model.quantization import bytes_per_weight, quantization_name, skipped_modules
from ftdata.types import IGNORE_INDEX

OPTIMIZER_BYTES = {
    "adafactor": 0.05,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion": 4,
    "lion_8bit": 1,
    "lion_32bit": 4,
    "paged_lion_8bit": 1,
    "paged_lion_32bit": 4,
    "sgd": 0,
}
"""Bytes of optimizer state per trained weight; Adam and what is not listed keep two float32."""

FEW_STEPS = 20
"""A run of fewer steps is told that it is short."""

BUSY = 0.4
"""Share of a device's speed at products of matrices that training reaches, as a rule of thumb."""


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """What the rows of a split hold: tokens of each, and of all, trained ones and documents."""

    lengths: NDArray[np.int64]
    tokens: int
    trained: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run before it is begun.

    Attributes:
        model: its name.
        parameters: weights of the model.
        trainable: those that are trained.
        dtype: what is computed in.
        quantization: `"nf4"`, `"fp4"`, `"int8"` or `None`.
        device: where it would run.
        processes: how many train together.
        rows: of the train split: packs, or examples.
        tokens: of all of them.
        trained_tokens: those that carry loss.
        longest: tokens of the longest row.
        epochs: how often all rows are seen.
        steps: of the optimizer.
        rows_per_step: in all processes.
        tokens_per_step: the mean.
        flops_per_step: floating-point operations: six per token and weight that is no embedding (Kaplan et al. 2020),
            as `Trainer.floating_point_ops` counts them, whatever is trained.
        flops: of all steps.
        seconds: of all steps, roughly.
        weights: bytes in each process.
        gradients: bytes.
        optimizer: bytes of its state.
        activations: bytes that a step keeps for its way back, for the largest batch.
        free: bytes that the device has.
    """

    model: str
    parameters: int
    trainable: int
    dtype: str
    quantization: str | None
    device: str
    processes: int
    rows: int
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
        """All bytes together, in one process."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON."""
        return {**asdict(self), "memory": self.memory}

    def __str__(self) -> str:
        share = self.trainable / self.parameters
        kind = f"{self.quantization}, computing in {self.dtype}" if self.quantization else self.dtype
        parts = " + ".join(
            f"{_bytes(value)} {name}"
            for name, value in (
                ("weights", self.weights),
                ("gradients", self.gradients),
                ("optimizer", self.optimizer),
                ("activations", self.activations),
            )
        )
        many = f" in each of {self.processes} processes" if self.processes > 1 else ""
        told = (
            "\nnote     in so few steps a model hardly changes: more num_train_epochs, or fewer rows a step, make more"
        )
        few = told if self.steps < FEW_STEPS else ""
        return (
            f"model    {self.model}: {self.parameters:,} parameters, {self.trainable:,} trained ({share:.2%}), {kind}\n"
            f"data     {self.rows:,} rows, {self.tokens:,} tokens, {self.trained_tokens:,} trained "
            f"({self.trained_tokens / max(self.tokens, 1):.1%}); the longest row has {self.longest:,}\n"
            f"run      {self.steps:,} steps of {self.rows_per_step:,} rows, {self.epochs:g} epochs; "
            f"{_many(self.flops_per_step)}FLOP a step, {_many(self.flops)}FLOP in all\n"
            f"memory   about {_bytes(self.memory)} of {_bytes(self.free)} free{many}: {parts}\n"
            f"time     about {_time(self.seconds)} on {self.device}{few}"
        )


def check_adapter(config: Config, model_config: Any) -> None:
    """Refuse an adapter that the model cannot take, by a model of shapes alone: no weight and no row is read.

    Raises:
        UsageError: naming the field, and what the model lacks.
    """
    with torch.device("meta"):
        check_modules(config, _shapes(config, model_config, weights_dtype(config)))


def count_split(split: Any) -> SplitCounts:
    """Count what a split of a build holds, a chunk at a time."""
    lengths, trained, documents = [np.empty(0, np.int64)], 0, 0
    for batch in split.data.to_batches():
        lengths.append(pc.list_value_length(batch.column("input_ids")).to_numpy(zero_copy_only=False).astype(np.int64))
        labels = pc.list_flatten(batch.column("labels"))
        trained += pc.sum(pc.not_equal(labels, pa.scalar(IGNORE_INDEX, labels.type))).as_py() or 0
        documents += pc.sum(pc.list_value_length(batch.column("seq_lengths"))).as_py() or 0
    joined = np.concatenate(lengths)
    return SplitCounts(joined, int(joined.sum()), trained, documents)


def estimate_run(config: Config, model_config: Any, rows: SplitCounts, arguments: Any, vocabulary: int = 0) -> Estimate:
    """Work out a run.

    Args:
        config: the run.
        model_config: the model's configuration.
        rows: what is trained on.
        arguments: the trainer's settings.
        vocabulary: one more than the largest token id; embeddings that have to grow for it are trained whole.
    """
    dtype, longest = weights_dtype(config), int(rows.lengths.max())
    with torch.device("meta"):
        model = _shapes(config, model_config, dtype)
        weights = _weight_bytes(model, config, dtype)
        flops_per_token = 6 * model.num_parameters(exclude_embeddings=True)
        kept = _kept_per_token(model, dtype, longest, recomputes=bool(arguments.gradient_checkpointing))
        grows = vocabulary > model.get_input_embeddings().weight.shape[0]
        lora = make_lora_config(config, model, grows=grows, shapes=True)
        if lora is not None:
            # Adapters are kept in float32 whatever the model is in.
            try:
                model = get_peft_model(model, lora)
            except (ValueError, RuntimeError) as error:
                raise UsageError("lora", f"{config.model} takes no such adapter: {describe_exception(error)}") from None
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * device.process_count()
    steps = count_steps(len(rows.lengths), arguments)
    if steps < 1:
        raise UsageError("no_steps", "there is nothing to train: 0 steps", hint="set num_train_epochs or max_steps")
    batch = int(np.sort(rows.lengths)[::-1][: arguments.per_device_train_batch_size].sum())
    tokens_per_step = round(rows.tokens / len(rows.lengths) * min(per_step, len(rows.lengths)))
    flops = flops_per_token * tokens_per_step
    # Forward, back to the activations, and, where these are trained, back to the weights: two of six each.
    shares = 2 + 2 + 2 * (trainable == total) + 2 * bool(arguments.gradient_checkpointing)
    worked = (
        flops
        * steps
        * shares
        / 6
        / device.process_count()
        / (device.measure_flops(device.compute_dtype(config.train)) * BUSY)
    )
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
        tokens=rows.tokens,
        trained_tokens=rows.trained,
        longest=longest,
        epochs=round(steps / count_steps(len(rows.lengths), arguments, epochs=1), 2),
        steps=steps,
        rows_per_step=per_step,
        tokens_per_step=tokens_per_step,
        flops_per_step=flops,
        flops=flops * steps,
        seconds=worked,
        weights=weights + (4 * trainable if lora is not None else 0),
        gradients=4 * trainable,
        optimizer=round(state * trainable),
        activations=round(kept * batch),
        free=device.free_memory(),
    )


def check_memory(found: Estimate) -> None:
    """Refuse a run whose weights, gradients and optimizer alone are more than is free.

    Raises:
        InputRefused: with what would make it smaller.
    """
    sure = found.weights + found.gradients + found.optimizer
    if sure > found.free:
        ways = ["a smaller model"]
        if found.trainable == found.parameters:
            ways.insert(0, "lora: {r: 16}")
        if found.quantization is None:
            ways.insert(0, "quantization: nf4")
        raise InputRefused(
            "too_large",
            f"{found.model} cannot be trained here: weights, gradients and optimizer take {_bytes(sure)}, "
            f"{_bytes(found.free)} are free on {found.device}",
            hint=", or ".join(ways),
        )


def count_steps(rows: int, arguments: Any, epochs: float | None = None) -> int:
    """Return the number of optimizer steps, as the trainer counts them.

    Args:
        rows: of the data.
        arguments: the trainer's settings.
        epochs: so many of them; `None` takes what the settings say.
    """
    if epochs is None and arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches = math.ceil(rows / (arguments.per_device_train_batch_size * device.process_count()))
    each: int = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    epochs = float(arguments.num_train_epochs) if epochs is None else epochs
    return math.ceil(epochs * each)


def _shapes(config: Config, model_config: Any, dtype: torch.dtype) -> Any:
    more = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    try:
        return AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, trust_remote_code=config.trust_remote_code, **more
        )
    except (ValueError, ImportError) as error:
        raise UsageError("model_setting", f"{config.model} cannot be made so: {describe_exception(error)}") from None


def _weight_bytes(model: Any, config: Config, dtype: torch.dtype) -> int:
    if config.quantization is None:
        weights: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        return sum(int(weight.nbytes) for weight in weights)
    head = model.get_output_embeddings()
    skipped = skipped_modules(config.quantization)
    small = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not name.endswith(skipped)
    }
    size, quantized = dtype.itemsize, bytes_per_weight(config.quantization)
    return round(
        sum(int(weight.numel()) * (quantized if id(weight) in small else size) for weight in model.parameters())
    )


def _kept_per_token(model: Any, dtype: torch.dtype, longest: int, *, recomputes: bool) -> float:
    """Return the bytes that a token leaves in memory for the way back.

    Every product of matrices keeps its input, and what follows it keeps its output; with what norms and activation
    functions keep that is, of models tried, 1.3 times what goes into and out of the linear layers, give or take a half.
    Eager attention keeps the weights of all pairs of tokens as well. With checkpointing it is the input of each block,
    and one block.
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
    each = 1.3 * sum(sizes) / layers
    if model.config._attn_implementation == "eager":
        each += 2 * int(getattr(text, "num_attention_heads", 0)) * longest
    kept = layers * int(text.hidden_size) + each if recomputes else layers * each
    return float(kept * dtype.itemsize)


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number / 1e3:,.0f} kB"


def _many(number: float) -> str:
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.4g} {prefix}"
    return f"{number:,.0f} "


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 1):.0f} s"
