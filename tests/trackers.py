"""Read back what trackers have (offline files of wandb, trackio's database); an MLflow server; servers that fail."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768  # a .wandb file has LevelDB's log format after a header of 7 bytes


def wandb_records(file: Path) -> Iterator[Any]:
    """The protobuf records of an offline file. wandb has no reader in Python."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if kind == 0 or place + 7 + length > len(content):
            return  # a kill cut it
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield Record.FromString(parts)
            parts = b""


def wandb_rows(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of all offline files of a run in the order of the files, and the run ids of the files."""
    rows, ids = [], []
    for file in sorted(run.glob("trackers/wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.append(row | {"_step": record.history.step.num})
    return rows, ids


def wandb_config(run: Path) -> dict[str, Any]:
    """The last value of every top-level key of the config in a run's offline files."""
    config = {}
    for file in run.glob("trackers/wandb/offline-run-*/run-*.wandb"):
        for record in wandb_records(file):
            for update in (*record.run.config.update, *record.config.update):
                config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
    return config


def trackio_rows(folder: Path, project: str) -> list[tuple[str, int, dict[str, Any]]]:
    """(run id, step, values) of every row of a project in trackio's database."""
    with contextlib.closing(sqlite3.connect(folder / f"{project}.db")) as database:
        found = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(run, step, json.loads(values)) for run, step, values in found]


def free_port() -> int:
    """A port that nobody listens to now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The address of an MLflow server with an empty database."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--port", str(port), "--workers", "1", "--default-artifact-root", str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        )
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError((folder / "server.log").read_text())
            time.sleep(0.1)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel accepts; nobody reads
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Proxy:
    """Passes connections on to a server. While `answers` is False, requests arrive there and the answers are lost."""

    def __init__(self, address: str) -> None:
        self.answers = True
        self.lost = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self._target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Proxy:
        """It accepts connections from the beginning."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all connections: the clients are expected to have ended theirs."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                thread = threading.Thread(target=self._connect, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _connect(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pass, args=(server, client, True))
            back.start()
            self._pass(client, server, False)
            back.join()

    def _pass(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if is_answer and not self.answers:
                    self.lost += 1
                    break
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
