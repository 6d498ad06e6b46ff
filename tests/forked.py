"""Scripts as processes of their own, without the seconds in which each imports the program.

A server imports what train.py imports, starts no thread, and forks for each script: the fork has
its own environment, output and signals. What JAX, Python and the dynamic linker read of the
environment as they start is the server's: a script that needs it otherwise is started as usual.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    "llm.commands.train", "llm.pages.report_writer", "llm.run.start", "llm.training.initial",
    "llm.training.loop", "llm.inference.samples", "llm.text.shards", "tensorstore",
    "jax.experimental.multihost_utils",
)  # fmt: skip
NUMBER = struct.Struct("i")


def read_early(environment: Mapping[str, str]) -> dict[str, str]:
    beginnings = ("JAX_", "LD_", "PYTHON", "TF_")
    return {name: value for name, value in environment.items() if name.startswith(beginnings)}


@functools.cache
def early() -> dict[str, str]:
    """What the server will be given; first called before a test changes the environment."""
    return read_early(os.environ)


def can_be_forked(environment: Mapping[str, str]) -> bool:
    return sys.platform == "linux" and read_early(environment) == early()


class Forked:
    """What the tests use of subprocess.Popen; `stdout` is text, and holds what goes to stderr."""

    def __init__(self, words: list[str], environment: Mapping[str, str]):
        self.args, self.returncode = words, None
        reads, writes = os.pipe()
        self._state, theirs = socket.socketpair()
        request = json.dumps([words, dict(environment), os.getcwd()]).encode()
        _, server = _started()
        socket.send_fds(server, [request], [writes, theirs.fileno()])
        os.close(writes)
        theirs.close()
        self.stdout = open(reads)  # noqa: SIM115  # open for as long as Popen's
        self._output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        (self.pid,) = NUMBER.unpack(self._state.recv(NUMBER.size))

    def _read(self) -> None:
        self._output = self.stdout.read()

    def poll(self, seconds: float | None = 0.0) -> int | None:
        if self.returncode is None and select.select([self._state], [], [], seconds)[0]:
            (self.returncode,) = NUMBER.unpack(self._state.recv(NUMBER.size))
            self._state.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        if self._reader.ident is None:
            self._reader.start()
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait()
        self.stdout.close()
        return self._output, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _started() -> tuple[subprocess.Popen, socket.socket]:
    """The server, which ends with the process that asks it, and where to ask."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        environment = {**os.environ, **early()}
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment), ours


def _serve(requests: socket.socket) -> list[str]:
    """Returns in each fork, with its words."""
    while True:
        request, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 2)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    # One fork waits for another, and says what became of it.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output, state = descriptors
    if pid := os.fork():
        os.close(output)
        os.write(state, NUMBER.pack(pid))
        _, status = os.waitpid(pid, 0)
        os.write(state, NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    for stream in (1, 2):
        os.dup2(output, stream)
    for descriptor in (output, state, requests.detach()):
        os.close(descriptor)
    words, environment, folder = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return words


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sys.argv = _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(sys.argv[0], run_name="__main__")
