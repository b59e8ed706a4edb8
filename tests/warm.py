"""Run Python commands in forks of a process that has imported ftdata, because imports take longer than most commands.

    subprocess.run([*warm.python("-m", "ftdata", "preview", path)], capture_output=True, check=True)

A command is a process with arguments, an environment, a folder, streams and an exit code of its own. It shares only the
imported modules with other commands. Tests of imports and of the start of Python start `sys.executable` instead.
"""

import atexit
import fcntl
import functools
import hashlib
import os
import shutil
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
    # Ray sets a debugger when it is imported.
    names = sorted(name for name in environment if name.startswith(prefixes) and name != "PYTHONBREAKPOINT")
    at_import = tuple((name, environment[name]) for name in names)
    return [*_start(modules, at_import), *map(str, arguments)]


@functools.cache
def _start(modules, at_import):
    """Return the command of a client of the server with these modules, and with the variables that imports read.

    The workers of a test run share a server, which ends when the last worker that uses it has ended.
    """
    folder = make_folder() / hashlib.sha256(repr((modules, at_import)).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            alive = os.open(folder / "alive", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            # There is no server that reads from this pipe.
            alive = _start_server(folder, modules, at_import)
    atexit.register(os.close, alive)
    return sys.executable, "-I", "-S", str(HERE / "warm_client.py"), str(folder / "socket")


@functools.cache
def make_folder():
    """Return the folder of the servers, which the workers of a test run inherit from the process that started them."""
    if "FTDATA_WARM" not in os.environ:
        os.environ["FTDATA_WARM"] = tempfile.mkdtemp(prefix="ftdata-warm-")
        atexit.register(shutil.rmtree, os.environ["FTDATA_WARM"], ignore_errors=True)
    return Path(os.environ["FTDATA_WARM"])


def _start_server(folder, modules, at_import):
    """Start a server and wait until its modules are imported. Return its stdin, a pipe that others can open as well."""
    for name in ("alive", "socket"):
        (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / "alive")
    reader = os.open(folder / "alive", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(folder / "alive", os.O_WRONLY)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    command = [sys.executable, str(HERE / "warm_server.py"), str(folder / "socket"), *modules]
    # Nobody waits for the server to end, because other workers can use it longer than this one.
    server = os.posix_spawn(
        command[0], command, {**environment, **dict(at_import)}, file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)]
    )
    os.close(reader)
    while not (folder / "socket").exists():
        assert os.waitpid(server, os.WNOHANG) == (0, 0), "the server has ended"
        time.sleep(0.01)
    return writer
