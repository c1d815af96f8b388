"""`dino2` in processes whose imports are done: a server forks for each command that is asked for.

It spares the seconds of processor time that every command takes to import PyTorch. Each command is still a process of
its own, with its number, signals, streams, working folder, environment and end; what is not tried so is the start of
Python itself. `dino2` and `start` do a command or `python -c` so, by a server that this process keeps; `PROGRAM` is
what a shell can find as `dino2`, with the path of a server's socket filled in.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

HEAVY = ("cv2", "numpy", "pydantic", "rich.console", "torch", "torch._dynamo", "typer.rich_utils", "yaml")
"""What takes seconds to import and is not dino2."""
EVERYTHING = (*HEAVY, "dinov2cli.bench.train", "dinov2cli.cli.main", "dinov2cli.eval.linear", "dinov2cli.start")

PROGRAM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    what = json.dumps(dict(words=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))).encode()
    socket.send_fds(server, [len(what).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(what)
    number, ended = (int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big") for _ in range(2))
    sys.exit(os.waitstatus_to_exitcode(ended) % 256)
"""


class Process:
    """A command that a server does, to be dealt with like a `subprocess.Popen`."""

    def __init__(self, connection: socket.socket, words: list[str]) -> None:
        self.connection, self.args = connection, words
        self.returncode: int | None = None
        self.pid = self._number()

    def _number(self) -> int:
        found = self.connection.recv(4, socket.MSG_WAITALL)
        assert len(found) == 4, "the server has ended"
        return int.from_bytes(found, "big")

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(self._number())
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """Has imported `modules` in a process of its own, which lasts as long as this one; `more` is typed behind the
    words of the commands it names."""

    def __init__(
        self,
        modules: tuple[str, ...] = EVERYTHING,
        more: Mapping[str, list[str]] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.address = tempfile.mkdtemp(prefix="dino2-ready-") + "/socket"
        words = [sys.executable, __file__, self.address, json.dumps(modules), json.dumps(more or {})]
        # Its standard input ends when this process does.
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, env=environment)
        while not os.path.exists(self.address):
            assert self.process.poll() is None, "the server did not start"
            time.sleep(0.02)

    def close(self) -> None:
        """End it; what it has begun goes on."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def start(
        self,
        *words: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: IO[Any] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        code: str | None = None,
        start_new_session: bool = False,
    ) -> Process:
        """Begin `dino2 WORDS`, or `python -c CODE WORDS`; streams that are not given are this process's own."""
        typed = list(map(str, words))
        what = {"words": typed, "folder": str(cwd or os.getcwd()), "environment": dict(env or os.environ),
                "code": code, "session": start_new_session}  # fmt: skip
        message = json.dumps(what).encode()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        with open(os.devnull, "rb") as nothing:
            streams = [
                (stdin or nothing).fileno(),
                *(each.fileno() if each else n for n, each in ((1, stdout), (2, stderr))),
            ]
            socket.send_fds(connection, [len(message).to_bytes(4, "big")], streams)
        connection.sendall(message)
        return Process(connection, typed)

    def run(self, *words: str | Path, timeout: float = 600, **how: Any) -> subprocess.CompletedProcess[str]:
        """As `start`, to its end, with what it wrote."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(*words, stdout=out, stderr=err, **how)
            try:
                code = process.wait(timeout)
            except BaseException:
                process.kill()
                raise
            for stream in (out, err):
                stream.seek(0)
            return subprocess.CompletedProcess(process.args, code, out.read(), err.read())


@functools.cache
def server() -> Server:
    """That of this process."""
    return Server()


def dino2(*words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """`dino2 WORDS`, to its end; how: see `Server.start`."""
    return server().run(*words, **how)


# In the server.


def serve(address: str, more: dict[str, list[str]]) -> None:
    """Fork for each connection; tell it the number of the process, and how that has ended."""
    asked, ended = socket.socket(socket.AF_UNIX), socket.socketpair()
    for each in ended:
        each.setblocking(False)
    signal.set_wakeup_fd(ended[1].fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    asked.bind(address)
    asked.listen()
    there = selectors.DefaultSelector()
    for each in (asked, ended[0], sys.stdin):
        there.register(each, selectors.EVENT_READ)
    waiting: dict[int, socket.socket] = {}
    while True:
        ready = {key.fileobj for key, _ in there.select()}
        if asked in ready:
            connection, _ = asked.accept()
            if (child := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                there.close()
                for other in (asked, *ended, *waiting.values()):
                    other.close()
                do(connection, more)
            connection.sendall(struct.pack(">I", child))
            waiting[child] = connection
        if ended[0] in ready:
            ended[0].recv(4096)
            while waiting and (found := os.waitpid(-1, os.WNOHANG))[0]:
                with waiting.pop(found[0]) as connection, contextlib.suppress(OSError):
                    connection.sendall(struct.pack(">I", found[1]))
        if sys.stdin in ready:
            break


def do(connection: socket.socket, more: dict[str, list[str]]) -> None:
    """Do the command that the other side sends, and end."""
    size, descriptors, *_ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as file:
        what = json.loads(file.read(int.from_bytes(size, "big")))
    connection.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if what.get("session"):
        os.setsid()
    os.chdir(what["folder"])
    os.environ.clear()
    os.environ.update(what["environment"])
    if console := sys.modules.get("dinov2cli.console"):  # its streams as they would be now
        console.out.__init__()  # type: ignore[misc]
        console.err.__init__(stderr=True)  # type: ignore[misc]
    words = what["words"]
    behind = next((added for command, added in more.items() if words[: len(command.split())] == command.split()), [])
    for option in (word for word in behind if word.startswith("--")):
        while option in words:  # an option is given once
            place = words.index(option)
            del words[place : place + 2]
    try:
        if what.get("code") is not None:
            sys.argv = ["-c", *words]
            exec(compile(what["code"], "<string>", "exec"), {"__name__": "__main__"})
            end(0)
        sys.argv = ["dino2", *words, *behind]
        from dinov2cli.cli.main import main

        main()
    except SystemExit as stop:
        end(stop.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        end(1)
    end(0)


def end(code: object) -> NoReturn:
    """As Python ends, but for taking down what has been imported, which takes seconds as well."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path[0] = ""  # as behind -m and -c
    for name in json.loads(sys.argv[2]):
        importlib.import_module(name)
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):  # which reaches all that a terminal has started
        serve(sys.argv[1], json.loads(sys.argv[3]))
    shutil.rmtree(Path(sys.argv[1]).parent)
