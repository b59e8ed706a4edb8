"""Run builds that crash: a process that forks for each trial, because starting Python takes longer than a build.

Reads lines of JSON from stdin: `failpoint`, `seconds` until SIGKILL, and the arguments of `write_build`. Answers each
with a line: `code` (the exit code of `ftdata`, -9 if killed) and `error`. `together` is the number of concurrent builds.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import traceback

from ftdata.build import dataset
from ftdata.build.dataset import write_build
from ftdata.errors import FtdataError
from ftdata.storage import disk


def main():
    warm = False
    for line in sys.stdin:
        asked = json.loads(line)
        if not warm:
            # What is imported and learnt here is not in each child again.
            with tempfile.TemporaryDirectory() as folder:
                write_build(asked["data"], asked["tokenizer"], folder + "/out", **asked["options"])
            warm = True
        with tempfile.TemporaryFile("w+") as said:
            codes = trial(asked, said)
            said.seek(0)
            text = said.read()
        sys.stdout.write(json.dumps({"code": codes[0], "codes": codes, "error": text}) + "\n")
        sys.stdout.flush()


def trial(asked, said):
    children = []
    # The first build writes to this pipe as soon as it holds the lock of the workspace.
    locked, lock_writer = os.pipe()
    for number in range(asked.get("together") or 1):
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            if number == 0:
                report_lock(lock_writer)
            elif asked.get("first_only"):
                os.close(lock_writer)
                os.read(locked, 1)
                asked["failpoint"] = None
            os._exit(build(asked))
        children.append(child)
    os.close(lock_writer)
    if (seconds := asked.get("seconds")) is not None:
        threading.Timer(seconds, kill, children).start()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(locked)
    return codes


def report_lock(descriptor):
    """Write to a pipe when a build begins inside its locked workspace. If the build is killed, the pipe is closed."""
    begin = dataset._build_unless_current

    def begin_and_report(*arguments):
        os.write(descriptor, b"x" * 8)
        return begin(*arguments)

    dataset._build_unless_current = begin_and_report


def kill(child):
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def build(asked):
    disk._operation_counts.clear()
    if asked.get("failpoint"):
        os.environ["FTDATA_FAILPOINT"] = asked["failpoint"]
    os.environ["FTDATA_CACHE"] = asked.get("cache", "off")
    try:
        report = write_build(asked["data"], asked["tokenizer"], asked["output_dir"], overwrite=True, **asked["options"])
        if asked.get("together"):
            os.write(2, b"built;" if report.encoder else b"there;")
    except FtdataError as error:
        sys.stderr.write(str(error))
        sys.stderr.flush()
        return error.exit_code
    except BaseException:  # noqa: BLE001  (told to who asked)
        traceback.print_exc()
        sys.stderr.flush()
        return 99
    return 0


if __name__ == "__main__":
    main()
