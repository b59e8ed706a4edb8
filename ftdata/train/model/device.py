"""Where a run happens: the device, its precision, memory and speed; and which of several processes this is."""

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
    """Return the dtype to compute in: what `bf16` or `fp16` say, else what the device is good at.

    That is bfloat16 or float16 on a GPU, and float32 without one.
    """
    settings = settings or {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if settings.get(name):
            return dtype
    if not torch.cuda.is_available() or settings.get("use_cpu") or {"bf16", "fp16"} <= settings.keys():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() and "bf16" not in settings else torch.float16


def device_name() -> str:
    """Return what to call the device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def free_memory() -> int:
    """Return the bytes that this process may still take on the device."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    # Processes of one machine share what is free there.
    return int(psutil.virtual_memory().available) // process_count()


def measure_flops(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Measure and return the floating-point operations per second of a product of matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 512
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times, started = 0, None
    while started is None or time.perf_counter() - started < seconds:
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        # The first one pays for what is set up once.
        started = time.perf_counter() if started is None else started
        times += 1
    return 2.0 * size**3 * (times - 1) / (time.perf_counter() - started)


@contextmanager
def fit_threads(model: Any) -> Iterator[None]:
    """Run a model on a CPU with as many threads as make a token fastest; `OMP_NUM_THREADS` is left as it is.

    The threads of a parallel region wait for the slowest. Where another process keeps a core busy, one thread may be
    ten times faster than two.
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
    """Return the seconds of a forward pass over one token, the fastest of a few."""
    ids, found = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(times):
        started = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        found.append(time.perf_counter() - started)
    return min(found)


def process_count() -> int:
    """Return how many processes train together."""
    return int(_state().num_processes)


def is_sharded() -> bool:
    """Return whether a model is to be spread over the processes, and so must not be loaded whole onto a device."""
    return any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))


def training_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which float32 weights on a GPU compute as they do in training."""
    wanted = device.type == "cuda" and dtype is torch.float32 and compute_dtype() is not torch.float32
    return torch.autocast(device.type, dtype=compute_dtype() if wanted else torch.bfloat16, enabled=wanted)


def is_main_process() -> bool:
    """Return whether this process is the one that writes, and speaks."""
    return bool(_state().is_main_process)


def wait_for_processes() -> None:
    """Go on when all processes have come here."""
    _state().wait_for_everyone()


@contextmanager
def main_process_first() -> Iterator[bool]:
    """Let the main process go first; the others find what it made. Yields whether this is the main one."""
    with _state().main_process_first():
        yield is_main_process()


def _state() -> PartialState:
    # Several processes without a GPU take each other for strangers unless they are told that there is none.
    return PartialState(cpu=not torch.cuda.is_available())
