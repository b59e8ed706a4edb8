"""Functions that query the device (precision, memory, speed) and coordinate the training processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate import PartialState


def compute_dtype(settings: Mapping[str, Any] | None = None) -> torch.dtype:
    """Return the dtype for computation: the dtype that `bf16` or `fp16` selects, or the best dtype for the device.

    The best dtype is bfloat16 or float16 on a GPU, and float32 on a CPU.
    """
    settings = settings or {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if settings.get(name):
            return dtype
    if not torch.cuda.is_available() or settings.get("use_cpu") or {"bf16", "fp16"} <= settings.keys():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() and "bf16" not in settings else torch.float16


def device_name() -> str:
    """Return the name of the GPU, or `CPU` with the number of threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def free_memory() -> int:
    """Return the memory that is available to this process on the device, in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    # The processes of a machine share its memory.
    return int(psutil.virtual_memory().available) // process_count()


def measure_flops(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Measure the device's speed of matrix multiplication in floating-point operations per second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 512
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times, started = 0, None
    while started is None or time.perf_counter() - started < seconds:
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        # The first multiplication includes one-time initialization, so it is not measured.
        started = time.perf_counter() if started is None else started
        times += 1
    return 2.0 * size**3 * (times - 1) / (time.perf_counter() - started)


@contextmanager
def fit_threads(model: Any) -> Iterator[None]:
    """Inside a `with` block, use the number of CPU threads with which the model runs fastest.

    If `OMP_NUM_THREADS` is set or the model is not on a CPU, the number of threads does not change.

    The threads of a parallel region wait for the slowest thread. If another process keeps a core busy, one thread may
    be ten times faster than two threads.
    """
    before = torch.get_num_threads()
    if model.device.type != "cpu" or before == 1 or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    try:
        threads, best = before, _token_seconds(model)
        while threads > 1:
            torch.set_num_threads(threads // 2)
            seconds = _token_seconds(model)
            if seconds > 0.9 * best:
                break
            threads, best = threads // 2, seconds
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def _token_seconds(model: Any, times: int = 3) -> float:
    """Measure several forward passes over one token, and return the shortest time in seconds."""
    ids, durations = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(times):
        started = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        durations.append(time.perf_counter() - started)
    return min(durations)


def process_count() -> int:
    """Return the number of training processes."""
    return int(_state().num_processes)


def is_sharded() -> bool:
    """Return whether FSDP or DeepSpeed shards the model over several processes.

    A sharded model must not be loaded onto a single device.
    """
    return any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))


def training_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return an autocast context: a GPU with float32 weights computes in the compute dtype of training."""
    enabled = device.type == "cuda" and dtype is torch.float32 and compute_dtype() is not torch.float32
    return torch.autocast(device.type, dtype=compute_dtype() if enabled else torch.bfloat16, enabled=enabled)


def is_main_process() -> bool:
    """Return whether this process is the main process. Only the main process writes files and prints."""
    return bool(_state().is_main_process)


def wait_for_processes() -> None:
    """Wait until all processes reach this call."""
    _state().wait_for_everyone()


@contextmanager
def main_process_first() -> Iterator[bool]:
    """Run the body of a `with` statement in the main process first, then in the other processes.

    Yields whether this process is the main process.
    """
    with _state().main_process_first():
        yield is_main_process()


def _state() -> PartialState:
    # Without a GPU, accelerate connects the processes only if `cpu` is set.
    return PartialState(cpu=not torch.cuda.is_available())
