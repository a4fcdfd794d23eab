"""torchrun with early checks and short error messages; run_train.sh starts it.

    python -m titan_cpt.commands.launch [--node RANK/NODES@ADDRESS:PORT] [--patience SECONDS] \
        TORCHRUN_OPTION... -m titan_cpt train TRAIN_OPTION...

Before it starts processes it checks the config, its parallel layout and the number of GPUs. With several nodes, all of
them first meet at ADDRESS:PORT and print which nodes are missing. If one node finds an error, it is printed once and no
node starts.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # torch exports it
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun
from torch.distributed.run import parse_args

from titan_cpt.commands.arguments import config_path, parse_overrides
from titan_cpt.commands.parser import CommandParser
from titan_cpt.commands.train import add_train
from titan_cpt.common.exit_status import FAILURE, SUCCESS, USER_ERROR, exit_with
from titan_cpt.config.load import load_run
from titan_cpt.data.inventory import take_inventory
from titan_cpt.data.prepare.prepare_missing import is_complete
from titan_cpt.distributed.process_group import require_gpus
from titan_cpt.errors import TitanError
from titan_cpt.planning.planner import make_plan

_SECONDS_BETWEEN_REMINDERS = 30.0
_SECONDS_TO_SHARE_AN_ERROR = 20.0  # a node that found an error waits this long for the others, so as to print it once
_SECONDS_TO_READ = 10.0  # node 0 waits this long for the others to read that no node starts
_VERDICT = "titan_cpt/verdict"
_READ = "titan_cpt/read"
_SILENCED_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


@dataclass(frozen=True)
class Node:
    """This node's rank among the nodes of the run, and the address and port of node 0 where they meet."""

    rank: int
    count: int
    address: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Node:
        """Parse RANK/NODES@ADDRESS:PORT."""
        match = re.fullmatch(r"(\d+)/(\d+)@(.+):(\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"must be RANK/NODES@ADDRESS:PORT, got {text!r}")
        rank, count, address, port = match.groups()
        return cls(int(rank), int(count), address, int(port))


class LaunchError(Exception):
    """An error before any process is started.

    Attributes:
        status: exit status: 2 for the user's mistake, 1 for what may not be one, such as a node that did not join.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Check the config, meet the other nodes, run torchrun, and exit with its status.

    The exit status of the training processes is in the file TITAN_CPT_STATUS_FILE.
    """
    parser = argparse.ArgumentParser(prog="python -m titan_cpt.commands.launch", allow_abbrev=False)
    parser.add_argument("--node", type=Node.parse)
    parser.add_argument("--patience", type=float, default=1800.0)
    options, words = parser.parse_known_args(arguments)
    try:
        problem = find_problem(words, nodes=1 if options.node is None else options.node.count)
        if problem and options.node is None:
            raise LaunchError(problem, USER_ERROR)
        store = None if options.node is None else meet(options.node, problem, options.patience)
    except LaunchError as error:
        if str(error):
            _say(str(error))
        exit_with(error.status)
    status = _run(words)
    del store  # on node 0 it holds the server that torchrun uses too
    sys.exit(status)


def find_problem(words: Sequence[str], *, nodes: int) -> str:
    """The error message of a config or a number of processes that cannot train; "" if none is found.

    Args:
        words: options of torchrun, then the program and its options.
    """
    options = parse_args(list(words))  # type: ignore[no-untyped-call]  # torch's
    nproc = int(options.nproc_per_node)
    try:
        require_gpus(nproc)
        check_training(options.training_script_args, world_size=nproc * nodes)
    except TitanError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_training(arguments: Sequence[str], *, world_size: int) -> None:
    """Check the config and its plan as `titan-cpt train` does; the plan only if all data is prepared.

    Args:
        arguments: those of `titan-cpt`, `train` being the first.

    Raises:
        TitanError: the config or the plan is invalid.
    """
    parser = CommandParser(prog="titan-cpt")
    add_train(parser.add_subparsers(required=True, metavar="COMMAND"))
    options, unknown = parser.parse_known_args(arguments)
    config = load_run(config_path(options), parse_overrides(unknown, options.parser))
    if is_complete(config):
        make_plan(config, take_inventory(config), world_size)


def meet(node: Node, problem: str, patience_s: float) -> TCPStore:
    """Wait until every node has joined; returns the store in which they met. Keep it until torchrun ends.

    Args:
        problem: the error message that this node found, "" if none. The error of one node ends all of them.
        patience_s: longest wait for the other nodes, in seconds.

    Raises:
        LaunchError: the address is unknown, the port in use, a node did not join, or a node found an error. The message
            is empty if node 0 prints the same.
    """
    try:
        socket.getaddrinfo(node.address, node.port)
    except OSError as error:
        raise LaunchError(
            f"MASTER_ADDR {node.address!r} is not known on {socket.gethostname()}: {error.strerror}. It must be a name "
            "or an address of node 0 that every node can resolve",
            USER_ERROR,
        ) from None
    patience_s = min(patience_s, _SECONDS_TO_SHARE_AN_ERROR) if problem else patience_s
    entry = json.dumps([socket.gethostname(), problem])
    if node.rank == 0:
        store = _host(node)
        store.set(_key(0), entry)
        problems = _collect(store, node, patience_s)
        _decide(store, node, problems)
        return store
    try:
        store = _join(node, patience_s)
        store.set(_key(node.rank), entry)
        while not store.check([_VERDICT]):
            time.sleep(0.2)
        known = json.loads(store.get(_VERDICT))
        store.add(_READ, 1)
    except (DistError, LaunchError) as error:
        lost = str(error) if isinstance(error, LaunchError) else f"node 0 at {_where(node)} ended: {_first_line(error)}"
        raise LaunchError(problem or lost, USER_ERROR if problem else FAILURE) from None
    if known is not None:
        raise LaunchError("" if node.rank in known else problem, USER_ERROR)
    return store


def _collect(store: TCPStore, node: Node, patience_s: float) -> dict[str, list[int]]:
    """On node 0: wait for all nodes; returns each error that nodes found, with these nodes' ranks."""
    begin = reminded = time.monotonic()
    while lacking := [rank for rank in range(node.count) if not store.check([_key(rank)])]:
        waited = time.monotonic() - begin
        if waited > patience_s:
            break
        if time.monotonic() - reminded >= _SECONDS_BETWEEN_REMINDERS:
            reminded = time.monotonic()
            _say(_lacking(node, lacking, waited))
        time.sleep(0.2)
    problems: dict[str, list[int]] = {}
    for rank in set(range(node.count)) - set(lacking):
        found = json.loads(store.get(_key(rank)))[1]
        if found:
            problems.setdefault(found, []).append(rank)
    if lacking and not problems:
        raise LaunchError(_lacking(node, lacking, time.monotonic() - begin), FAILURE)
    return problems


def _decide(store: TCPStore, node: Node, problems: dict[str, list[int]]) -> None:
    """On node 0: publish whether the nodes start; if not, wait until they have read it and raise LaunchError."""
    ranks = [rank for found in problems.values() for rank in found]
    store.set(_VERDICT, json.dumps(ranks or None))
    if not problems:
        return
    until = time.monotonic() + _SECONDS_TO_READ
    while store.add(_READ, 0) < node.count - 1 and time.monotonic() < until:
        time.sleep(0.1)
    lines = [
        found if 0 in where else f"node {_shortened(where)} ({json.loads(store.get(_key(where[0])))[0]}): {found}"
        for found, where in problems.items()
    ]
    raise LaunchError("\n".join(lines), USER_ERROR)


def _host(node: Node) -> TCPStore:
    try:
        return TCPStore(
            node.address,
            node.port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,  # torchrun's own store in this process uses the same server
            timeout=timedelta(seconds=60),
        )
    except DistError as error:
        if "EADDRINUSE" in str(error):
            raise LaunchError(
                f"port {node.port} of {socket.gethostname()} is in use by another program, perhaps by a run that has "
                f"not ended (`ss -ltnp 'sport = :{node.port}'` shows it). Set MASTER_PORT to a free port, the same on "
                "all nodes",
                USER_ERROR,
            ) from None
        raise LaunchError(
            f"node 0 cannot listen at {_where(node)}: {_first_line(error)}. MASTER_ADDR must be an address of "
            "this node",
            USER_ERROR,
        ) from None


def _join(node: Node, patience_s: float) -> TCPStore:
    """On every other node: connect to node 0, however long it takes to start, up to `patience_s` seconds."""
    begin = reminded = time.monotonic()
    while True:
        try:
            socket.create_connection((node.address, node.port), timeout=10).close()
            return TCPStore(node.address, node.port, wait_for_workers=False, timeout=timedelta(seconds=60))
        except (OSError, DistError) as error:
            reason = _first_line(error)
        waited = time.monotonic() - begin
        message = (
            f"node {node.rank} has waited {waited:.0f} s for node 0 at {_where(node)}: {reason}. Check that "
            f"run_train.sh runs on node 0 (NODE_RANK=0, NNODES={node.count}), that MASTER_ADDR is an address "
            "of it, and that no firewall blocks the port"
        )
        if waited > patience_s:
            raise LaunchError(message, FAILURE)
        if time.monotonic() - reminded >= _SECONDS_BETWEEN_REMINDERS:
            reminded = time.monotonic()
            _say(message)
        time.sleep(1)


def _lacking(node: Node, ranks: Sequence[int], waited_s: float) -> str:
    return (
        f"{node.count - len(ranks)} of {node.count} nodes have joined at {_where(node)} after {waited_s:.0f} s; "
        f"missing: node {_shortened(ranks)}. Check that run_train.sh runs there with NNODES={node.count} and its own "
        "NODE_RANK, and that MASTER_ADDR and MASTER_PORT are the same on every node"
    )


def _run(words: Sequence[str]) -> int:
    """Run torchrun without its own log of a failure; returns 0, 1, or 128 + the number of the signal that ended it."""
    for name in _SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun(list(words))
    except ChildFailedError as error:
        for local_rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # torchrun stops the others by SIGTERM
                _say(
                    f"process {local_rank} of {socket.gethostname()} (pid {failure.pid}) was killed by "
                    f"{failure.signal_name()}"
                    + (", often because host memory ran out" if -failure.exitcode == signal.SIGKILL else "")
                )
        return FAILURE
    except SignalException as error:
        return 128 + int(error.sigval)
    except DistError as error:
        _say(f"lost the connection between the nodes: {_first_line(error)}")
        return FAILURE
    return SUCCESS


def _key(rank: int) -> str:
    return f"titan_cpt/node/{rank}"


def _where(node: Node) -> str:
    return f"{node.address}:{node.port}"


def _shortened(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
