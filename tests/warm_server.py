"""Import modules once, then fork for each command: `python warm_server.py SOCKET MODULE...`; see `warm.py`.

The server ends when its stdin is closed.
"""

import atexit
import contextlib
import gc
import importlib
import marshal
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
from pathlib import Path


class Server:
    """A socket that takes commands, and the process of each command that runs."""

    def __init__(self, path):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.processes = {}
        self.ended, self.wake = os.pipe()
        os.set_blocking(self.wake, False)
        signal.set_wakeup_fd(self.wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self):
        """Return a command in its fork, or `None` in the server when stdin is closed."""
        while True:
            ready, _, _ = select.select([0, self.ended, self.listener, *self.processes], [], [])
            for source in ready:
                if source == 0:
                    for process in self.processes.values():
                        os.kill(process, signal.SIGKILL)
                    return None
                if source == self.ended:
                    os.read(self.ended, 4096)
                    self.report_ended()
                elif source is not self.listener:
                    self.signal(source)
                elif command := self.fork():
                    return command

    def fork(self):
        """Return the command in the fork, and `None` in the server."""
        connection, _ = self.listener.accept()
        head, streams, _, _ = socket.recv_fds(connection, 8, 3)
        command = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        process = os.fork()
        if process == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for unused in (self.ended, self.wake):
                os.close(unused)
            for unused in (self.listener, connection, *self.processes):
                unused.close()
            return streams, *marshal.loads(command)
        for stream in streams:
            os.close(stream)
        self.processes[connection] = process
        return None

    def signal(self, connection):
        """Send a command the signal that its client received, and SIGKILL if the client has ended."""
        if connection in self.processes:
            os.kill(self.processes[connection], int.from_bytes(connection.recv(1)) or signal.SIGKILL)

    def report_ended(self):
        for connection, process in list(self.processes.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                del self.processes[connection]
                with contextlib.suppress(BrokenPipeError), connection:
                    connection.sendall(status.to_bytes(8, "big"))


def take_over(streams, folder, environment):
    """Give this process the streams, the folder and the environment of the client."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    modes = {"stdin": "r", "stdout": "w", "stderr": "w"}
    for number, (name, mode) in enumerate(modes.items()):
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(number, mode, encoding="utf-8", errors=errors, buffering=1, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    os.chdir(folder)
    os.environb.clear()
    os.environb.update(environment)


def run_python(arguments):
    """Do what `python` does with these arguments: `-m MODULE`, `-c CODE` or a script."""
    how, *values = arguments
    if how == "-m":
        name, *values = values
        sys.path[0], sys.argv = str(Path.cwd()), [name, *values]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = types.ModuleType("__main__")
    if how == "-c":
        code, *values = values
        sys.path[0], sys.argv = "", ["-c", *values]
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
        return
    sys.path[0], sys.argv = str(Path(how).resolve().parent), [how, *values]
    vars(sys.modules["__main__"]).update(__file__=how)
    exec(compile(Path(how).read_text(), how, "exec"), vars(sys.modules["__main__"]))


def run_and_catch(arguments):
    """Return the exit code, as Python determines it."""
    try:
        run_python(arguments)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        sys.stderr.write(f"{error.code}\n")
        return 1
    except BaseException:  # noqa: BLE001  (Python prints the traceback of each)
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(code):
    """End the process without freeing the memory that it shares with the server, which takes longer than most commands."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    # Where `python -m` looks first.
    sys.path[0] = str(Path.cwd())
    for module in sys.argv[2:]:
        importlib.import_module(module)
    # A garbage collection would copy the memory of all modules into each fork.
    gc.freeze()
    if command := Server(sys.argv[1]).serve():
        streams, folder, arguments, environment = command
        take_over(streams, folder, environment)
        end(run_and_catch(arguments))
