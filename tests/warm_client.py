"""Run a command in a fork of a warm process: `python -I -S warm_client.py SOCKET ARGUMENTS...`; see `warm.py`.

This script imports only built-in modules, so that it starts in a few milliseconds.
"""

import _signal
import _socket
import marshal
import posix
import sys

STREAMS = b"".join(stream.to_bytes(4, sys.byteorder) for stream in (0, 1, 2))


def main():
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.connect(sys.argv[1])
    request = marshal.dumps((posix.getcwd(), sys.argv[2:], dict(posix.environ)))
    connection.sendmsg([len(request).to_bytes(8, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, STREAMS)])
    connection.sendall(request)
    for number in (_signal.SIGINT, _signal.SIGTERM):
        _signal.signal(number, lambda number, _: connection.send(bytes([number])))
    status = int.from_bytes(connection.recv(8, _socket.MSG_WAITALL), "big")
    if posix.WIFSIGNALED(status):
        for number in (_signal.SIGINT, _signal.SIGTERM):
            _signal.signal(number, _signal.SIG_DFL)
        posix.kill(posix.getpid(), posix.WTERMSIG(status))
    sys.exit(posix.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
