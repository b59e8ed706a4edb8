"""Run Python commands in forks of a process that has imported ftdata, because imports take longer than most commands.

    subprocess.run([*warm.python("-m", "ftdata", "preview", path)], capture_output=True, check=True)

A command is a process with arguments, an environment, a folder, streams and an exit code of its own. It shares only the
imported modules with other commands. Tests of imports and of the start of Python start `sys.executable` instead.
"""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
LIGHT = (
    "ftdata.cli", "ftdata.build.dataset", "ftdata.build.convert", "ftdata.build.push", "ftdata.inspection.preview",
    "ftdata.inspection.audit", "ftdata.inspection.stats", "ftdata.inspection.diff", "ftdata.templates.worker",
    "pydantic.type_adapter", "zoneinfo",
)  # fmt: skip
HUB = (*LIGHT, "datasets", "huggingface_hub.hf_api", "huggingface_hub.hf_file_system", "ftdata.readers.remote_files")
TRAINING = (
    *HUB, "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.pyplot",
    "sacrebleu", "sacrebleu.tokenizers.tokenizer_13a", "transformers.models.llama.modeling_llama", "ftdata.train.runs.train_model",
    "ftdata.train.inference.chat", "ftdata.train.inference.evaluation", "ftdata.train.inference.merge_adapter",
)  # fmt: skip


def python(*arguments, modules=LIGHT, environment=os.environ):
    """Return a command that does what `python ARGUMENTS...` does in an environment, but has imported these modules."""
    prefixes = ("HF_", "PYTHON") if modules != LIGHT else "PYTHON"
    at_import = tuple(sorted((name, value) for name, value in environment.items() if name.startswith(prefixes)))
    return [*_start(modules, at_import), *map(str, arguments)]


@functools.cache
def _start(modules, at_import):
    """Return the command of a client of a new server with these modules, and with the variables that imports read."""
    folder = Path(tempfile.mkdtemp(prefix="ftdata-warm-"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    command = [sys.executable, HERE / "warm_server.py", folder / "socket", *modules]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env={**environment, **dict(at_import)})
    atexit.register(_end, server, folder)
    while not (folder / "socket").exists():
        assert server.poll() is None, "the server has ended"
        time.sleep(0.01)
    return sys.executable, "-I", "-S", str(HERE / "warm_client.py"), str(folder / "socket")


def _end(server, folder):
    server.stdin.close()
    server.wait()
    shutil.rmtree(folder)
