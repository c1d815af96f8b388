"""A `dino2` whose imports are done: a server forks for each command typed, and a small program hands the command over.

It spares the seconds that every command takes to import PyTorch. `python ready.py SOCKET MORE` is the server; what is
typed is `PROGRAM`, with the socket's path filled in.
"""

import json
import os
import signal
import socket
import sys
import traceback

PROGRAM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    what = json.dumps(dict(words=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))).encode()
    socket.send_fds(server, [len(what).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(what)
    sys.exit(int(server.recv(1)[0]))
"""


def serve(address: str, more: dict[str, list[str]]) -> None:
    """Do one command after the other; `more` is typed behind those of a command."""
    import dinov2cli.bench.train
    import dinov2cli.eval.linear
    import dinov2cli.start  # noqa: F401

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                connection.sendall(bytes([do(connection, more)]))
                os._exit(0)
            connection.close()


def do(connection: socket.socket, more: dict[str, list[str]]) -> int:
    """Do the command that the other side sends; its exit code."""
    from dinov2cli.cli.main import main

    size, descriptors, *_ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as file:
        what = json.loads(file.read(int.from_bytes(size, "big")))
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.chdir(what["folder"])
    os.environ.clear()
    os.environ.update(what["environment"])
    words = what["words"]
    behind = next((added for command, added in more.items() if words[: len(command.split())] == command.split()), [])
    for option in (word for word in behind if word.startswith("--")):
        while option in words:  # an option is given once
            place = words.index(option)
            del words[place : place + 2]
    code = 0
    try:
        main(words + behind)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
