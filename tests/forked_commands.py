"""Runs shell text in which `titan-cpt`, `run_train.sh` and `python` are forks of a process that has torch imported.

The shell is a real bash, so that variables, globs, quotes and `&&` mean what they mean to a reader. The commands on its
PATH hand their arguments, folder, environment and open files to the server, which forks: half a second in place of the
four of an import.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import training

ROOT = Path(__file__).resolve().parents[1]
CLIENT = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
call = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [len(call).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(call)
sys.exit(int(connection.makefile().read() or 1))
"""
Rewrite = Callable[[list[str]], list[str]]


class Shell:
    """A folder in which shell text runs.

    Args:
        folder: where it runs; `bin` beside it is on the PATH.
        rewrite: changes the arguments of `titan-cpt` before the command gets them, such as to smaller numbers.
    """

    def __init__(self, folder: Path, rewrite: Rewrite = list) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        tools = folder.with_name("bin")
        tools.mkdir()
        address = str(tools / "socket")
        for path in (tools / "titan-cpt", folder / "run_train.sh", tools / "python"):
            path.write_text(CLIENT.format(python=sys.executable, address=address, name=path.name))
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder.with_name("home")),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
        }
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(address)
        listening.listen()
        self._server = training._server().Process(target=_serve, args=(listening, rewrite))
        self._server.start()
        listening.close()
        atexit.register(self._server.kill)

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.join()

    def run(self, text: str) -> tuple[int, str]:
        """Run shell text up to its first command that fails; returns its exit status and all that it printed.

        Variables that the text sets are set in later calls, as in a reader's shell.
        """
        memory = self.folder.with_name("environment.sh")
        script = (
            f"set -eEuo pipefail\n[[ ! -e {memory} ]] || . {memory}\nset -a\n"
            f"trap 'echo \"status $?: $BASH_COMMAND\"' ERR\n{text}\ncd {self.folder}\nexport -p >{memory}\n"
        )
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout


def _serve(listening: socket.socket, rewrite: Rewrite) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies: nobody waits for the processes of the calls
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            _answer(connection, rewrite)
        connection.close()


def _answer(connection: socket.socket, rewrite: Rewrite) -> None:
    """Run one call in a further process, and send its exit status."""
    length, files, *_ = socket.recv_fds(connection, 8, 3)
    rest = connection.makefile("rb").read(int.from_bytes(length, "big"))
    name, arguments, folder, environment = json.loads(rest)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        multiprocessing.set_start_method("fork", force=True)
        _exit_as(lambda: _call(name, arguments, rewrite))
    _, status = os.waitpid(child, 0)
    with suppress(BrokenPipeError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _call(name: str, arguments: list[str], rewrite: Rewrite) -> None:
    from titan_cpt.cli import main

    sys.executable = str(Path(shutil.which("python") or sys.executable))  # what sweeps start their runs with
    if name == "python" and arguments[:2] == ["-m", "titan_cpt"]:
        name, arguments = "titan-cpt", arguments[2:]
    if name == "run_train.sh":
        named = any(word == "--config" or word.endswith(".toml") for word in arguments)
        arguments = ["train", *([] if named else ["--config", "train_configs/quickstart.toml"]), *arguments]
    if name == "python" and arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif name == "python" and arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif name == "python":
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        main(rewrite(arguments))


def _exit_as(call: Callable[[], None]) -> None:
    """Run a call and end this process with the exit status that Python would have had."""
    status = 0
    try:
        call()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)
