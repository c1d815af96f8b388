"""`dino2` in processes whose imports are done: a server forks for each command that is asked for.

It spares the seconds of processor time that every command takes to import PyTorch. Each command is still a process of
its own, with its number, signals, streams, working folder, environment and end; what is not tried so is the start of
Python itself. `dino2` and `start` do a command or `python -c` so, by a server that this process keeps; `PROGRAM` is
what a shell can find as `dino2`, with the path of a server's socket filled in.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import math
import multiprocessing
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

HEAVY = ("cv2", "numpy", "pydantic.main", "rich.progress", "torch", "torch._dynamo", "torch.distributed.checkpoint",
         "typer.rich_utils", "yaml")  # fmt: skip
"""What takes seconds to import and is not dino2."""
EVERYTHING = (*HEAVY, "dinov2cli.bench.train", "dinov2cli.cli.main", "dinov2cli.eval.linear", "dinov2cli.start")

PROGRAM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    what = dict(words=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
    what["workers"] = sys.argv[1] == "bench" or "--gpus" in sys.argv
    what = json.dumps(what).encode()
    socket.send_fds(server, [len(what).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(what)
    number, ended = (int.from_bytes(server.recv(4, socket.MSG_WAITALL), "big") for _ in range(2))
    sys.exit(os.waitstatus_to_exitcode(ended) % 256)
"""


def ask(connection: socket.socket, what: dict[str, Any], streams: list[int]) -> None:
    message = json.dumps(what).encode()
    socket.send_fds(connection, [len(message).to_bytes(4, "big")], streams)
    connection.sendall(message)


def told(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What is asked for, and the standard streams of it; nothing when the other side has ended."""
    size, streams, *_ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as file:
        return json.loads(file.read(int.from_bytes(size, "big")) or "{}"), streams


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
        if self.process.stdin is not None:
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
        workers: bool = False,
    ) -> Process:
        """Begin `dino2 WORDS`, or `python -c CODE WORDS`; streams that are not given are this process's own.

        `workers`: the processes that it starts in turn have done their imports, too.
        """
        typed = list(map(str, words))
        what = {"words": typed, "folder": str(cwd or os.getcwd()), "environment": dict(env or os.environ),
                "code": code, "session": start_new_session, "workers": workers}  # fmt: skip
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        with open(os.devnull, "rb") as nothing:
            streams = [
                (stdin or nothing).fileno(),
                *(each.fileno() if each else n for n, each in ((1, stdout), (2, stderr))),
            ]
            ask(connection, what, streams)
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
    asked.bind(f"{address}.new")
    asked.listen()
    os.rename(f"{address}.new", address)
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


def do(connection: socket.socket, more: dict[str, list[str]]) -> NoReturn:
    """Do the command that the other side sends, and end."""
    what, streams = told(connection)
    connection.close()
    words = what["words"]
    behind = next((added for command, added in more.items() if words[: len(command.split())] == command.split()), [])
    for option in (word for word in behind if word.startswith("--")):
        while option in words:  # an option is given once
            place = words.index(option)
            del words[place : place + 2]
    words += behind
    if what.get("workers") and sys.platform == "linux":
        forking = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda *_: forking  # type: ignore[assignment]
        subprocess.Popen = functools.partial(begin, Nursery(), subprocess.Popen)  # type: ignore[assignment, misc]
    if what.get("session"):
        os.setsid()
    become(what, streams)


def become(what: dict[str, Any], streams: list[int]) -> NoReturn:
    """Be the process that is asked for, to its end."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(what["folder"])
    os.environ.clear()
    os.environ.update(what["environment"])
    if console := sys.modules.get("dinov2cli.console"):  # its streams as they would be now
        console.out.__init__()  # type: ignore[misc]
        console.err.__init__(stderr=True)  # type: ignore[misc]
    try:
        if what.get("code") is not None:
            sys.argv = ["-c", *what["words"]]
            exec(compile(what["code"], "<string>", "exec"), {"__name__": "__main__"})
            end(0)
        sys.argv = ["dino2", *what["words"]]
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


class Nursery:
    """A fork of a process before it has done anything, of which its children are made: they are its own all the same,
    as the parent of a fork's fork that loses its parent is the next above that has said that it takes such."""

    def __init__(self) -> None:
        self.socket, asked = socket.socketpair()
        self.parent = os.getpid()
        set_child_subreaper = 36
        assert ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0) == 0
        if os.fork() == 0:
            self.socket.close()
            self.bear(asked)
        asked.close()

    def bear(self, asked: socket.socket) -> NoReturn:
        kept = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which reaches all that a terminal has started
        os.closerange(3, asked.fileno())  # the streams of its parent among them, whose end others wait for
        os.closerange(asked.fileno() + 1, 1024)
        while True:
            what, streams = told(asked)
            if not streams:  # the parent has ended
                os._exit(0)
            if (between := os.fork()) == 0:
                if os.fork():
                    os._exit(0)
                while os.getppid() != self.parent:
                    time.sleep(0.001)
                if what["session"]:
                    os.setsid()
                signal.signal(signal.SIGINT, kept)
                asked.sendall(struct.pack(">I", os.getpid()))
                asked.close()
                become(what, streams)
            os.waitpid(between, 0)
            for descriptor in streams:
                os.close(descriptor)


class Child:
    """A process begun by a `Nursery`, to be dealt with like a `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, what: dict[str, Any]) -> None:
        self.args, self.returncode = what["words"], None
        ask(nursery.socket, what, [0, 1, 2])
        self.pid = struct.unpack(">I", nursery.socket.recv(4, socket.MSG_WAITALL))[0]

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (math.inf if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def begin(nursery: Nursery, plain: type[subprocess.Popen[Any]], words: list[str], **how: Any) -> Any:
    """In place of `subprocess.Popen`: what begins with `python -m dinov2cli` or `python -c` is a fork."""
    if words[:3] == [sys.executable, "-m", "dinov2cli"]:
        what = {"words": words[3:], "code": None}
    elif words[:2] == [sys.executable, "-c"]:
        what = {"words": words[3:], "code": words[2]}
    else:
        return plain(words, **how)
    assert how.keys() <= {"env", "start_new_session"}
    what |= {"folder": os.getcwd(), "environment": dict(how.get("env") or os.environ)}
    return Child(nursery, {**what, "session": how.get("start_new_session", False)})


def foresee() -> None:
    """Measure what a tiny training takes, as each does when it begins: the forks know it then."""
    from tiny_run import TINY

    from dinov2cli.config import load_config
    from dinov2cli.train.cost import estimate

    # Where there is a GPU, no process forks after it has computed gradients.
    if not os.path.exists("/dev/nvidiactl"):
        estimate(load_config(overrides=TINY), world_size=1, sharding="none", precision="fp32")


if __name__ == "__main__":
    if tuple(json.loads(sys.argv[2])) == EVERYTHING:
        foresee()
    if not sys.flags.safe_path:
        sys.path[0] = ""  # as behind -m and -c
    for name in json.loads(sys.argv[2]):
        importlib.import_module(name)
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):  # which reaches all that a terminal has started
        serve(sys.argv[1], json.loads(sys.argv[3]))
    shutil.rmtree(Path(sys.argv[1]).parent)
