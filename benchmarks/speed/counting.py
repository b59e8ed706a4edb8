"""Measure the CPU seconds and the memory of a tool, and compute a digest of all ids and labels."""

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPLATE = "chatml"

Counted = dict[str, Any]


def cpu() -> float:
    """Return the CPU seconds of this process and its children, which may still run."""
    import psutil

    running = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
    return running + sum(
        getattr(resource.getrusage(who), name)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        for name in ("ru_utime", "ru_stime")
    )


def counted(load: Callable[[], Any], work: Callable[[Any], Any], rows: Callable[[Any], Any]) -> Counted:
    """Measure the time of a function, and compute a digest of its rows, which are pairs of ids and labels."""
    began = cpu()
    loaded = load()
    ready, clock = cpu(), time.perf_counter()
    done = work(loaded)
    used, wall = cpu() - ready, time.perf_counter() - clock
    digest, tokens, trained = hashlib.sha256(), 0, 0
    for ids, labels in rows(done):
        digest.update(json.dumps([list(ids), list(labels)]).encode())
        tokens += len(ids)
        trained += sum(label != -100 for label in labels)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"cpu": used, "wall": wall, "load": ready - began, "peak": peak}
    return {**figures, "tokens": tokens, "trained": trained, "digest": digest.hexdigest()}


def run_tool(script: str, tool: str, data: Path, tokenizer: str, **environment: str) -> Counted:
    """Run a benchmark script in a new process with the options `--child`, `--data` and `--tokenizer`."""
    command = [sys.executable, script, "--child", tool, "--data", str(data), "--tokenizer", tokenizer]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603  (itself)
    if done.returncode:
        sys.exit(f"{tool}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def own() -> float:
    """Return the memory of this process and its children without memory-mapped files, in megabytes."""
    import psutil

    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    memory = [one.memory_info() for one in family if one.is_running()]
    return sum(one.rss - one.shared for one in memory) / 1e6


def tiny_model(vocabulary: int) -> Any:
    """Return a model for trainers that need a model before they prepare data."""
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, **sizes))
