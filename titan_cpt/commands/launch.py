"""torchrun as run_train.sh starts it: the same processes, and one message in the place of torchrun's log of a failure.

    python -m titan_cpt.commands.launch [--node RANK/NODES@ADDRESS:PORT] [--patience SECONDS] \
        TORCHRUN_OPTION... -m titan_cpt train TRAIN_OPTION...

Before any process starts, the config, its layout and the number of GPUs are checked; on several nodes all of them meet
at ADDRESS:PORT, say whom they wait for, and a mistake that any of them found ends all of them, told once.
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

import torch
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # torch exports it
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun
from torch.distributed.run import parse_args

from titan_cpt.commands.arguments import parse_overrides
from titan_cpt.commands.train import add_train
from titan_cpt.common.exit_status import FAILURE, SUCCESS, USER_ERROR, exit_with
from titan_cpt.config.load import load_run
from titan_cpt.data.inventory import take_inventory
from titan_cpt.data.prepare.prepare_missing import is_complete
from titan_cpt.errors import PlanError, TitanError
from titan_cpt.planning.planner import make_plan

_SECONDS_BETWEEN_REMINDERS = 30.0
_SECONDS_FOR_A_MISTAKE = 20.0  # how long a node that found a mistake waits for the others, for it to be told once
_SECONDS_TO_READ = 10.0  # that node 0 waits for the others to read that nothing starts
_VERDICT, _READ = "titan_cpt/verdict", "titan_cpt/read"
_NOISE = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


@dataclass(frozen=True)
class Node:
    """This node among those of the run, and where they meet: an address and a port of node 0."""

    rank: int
    count: int
    address: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Node:
        """From RANK/NODES@ADDRESS:PORT."""
        match = re.fullmatch(r"(\d+)/(\d+)@(.+):(\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"must be RANK/NODES@ADDRESS:PORT, got {text!r}")
        rank, count, address, port = match.groups()
        return cls(int(rank), int(count), address, int(port))


class Refused(Exception):
    """Nothing starts.

    Attributes:
        status: 2 for the user's mistake; 1 if it may be none, as a node that did not come.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Check, meet, run torchrun, and leave with an exit status; the processes' own goes into the status file."""
    parser = argparse.ArgumentParser(prog="python -m titan_cpt.commands.launch", allow_abbrev=False)
    parser.add_argument("--node", type=Node.parse)
    parser.add_argument("--patience", type=float, default=1800.0)
    options, words = parser.parse_known_args(arguments)
    try:
        mistake = find_mistake(words, nodes=1 if options.node is None else options.node.count)
        if mistake and options.node is None:
            raise Refused(mistake, USER_ERROR)
        store = None if options.node is None else meet(options.node, mistake, options.patience)
    except Refused as refused:
        if str(refused):
            _say(str(refused))
        exit_with(refused.status)
    status = _run(words)
    del store  # node 0's holds the server that torchrun shares
    sys.exit(status)


def find_mistake(words: Sequence[str], *, nodes: int) -> str:
    """What the user would have to change before these processes can train, as a message; "" if nothing is known.

    Args:
        words: torchrun's options and the program's.
    """
    options = parse_args(list(words))  # type: ignore[no-untyped-call]  # torch's
    nproc = int(options.nproc_per_node)
    try:
        check_gpus(nproc)
        check_training(options.training_script_args, world_size=nproc * nodes)
    except TitanError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_gpus(nproc: int) -> None:
    """That this node has a GPU for each process, or none at all, in which case they compute on the CPU.

    Raises:
        PlanError: there are GPUs, and fewer than processes.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else nproc
    if found < nproc:
        raise PlanError(
            f"{nproc} processes on {socket.gethostname()}, which has {found} GPUs for them: each process takes one. "
            f"Start with NPROC={found}, or give the job more GPUs (CUDA_VISIBLE_DEVICES, --gpus-per-node)"
        )


def check_training(arguments: Sequence[str], *, world_size: int) -> None:
    """Raise what `train` would say of a config and of its plan for so many processes.

    Args:
        arguments: from the word `train` on. Data that is still to be prepared leaves the plan unchecked.

    Raises:
        TitanError: the user's mistake.
    """
    parser = argparse.ArgumentParser(prog="titan-cpt")
    add_train(parser.add_subparsers(required=True, metavar="COMMAND"))
    options, unknown = parser.parse_known_args(arguments)
    config = load_run(options.config, parse_overrides(unknown))
    if is_complete(config):
        make_plan(config, take_inventory(config), world_size)


def meet(node: Node, mistake: str, patience_s: float) -> TCPStore:
    """Wait until every node is there; returns the store in which they met, to be kept until torchrun ends.

    Args:
        mistake: what this node found wrong, "" if nothing. One node's mistake ends all of them.
        patience_s: longest wait for the other nodes.

    Raises:
        Refused: the address is unknown, the port in use, a node did not come, or a node found a mistake. Its message is
            empty where node 0 tells the same.
    """
    try:
        socket.getaddrinfo(node.address, node.port)
    except OSError as error:
        raise Refused(
            f"MASTER_ADDR {node.address!r} is not known on {socket.gethostname()}: {error.strerror}. It must be a name "
            "or an address of node 0 that every node can resolve",
            2,
        ) from None
    patience_s = min(patience_s, _SECONDS_FOR_A_MISTAKE) if mistake else patience_s
    entry = json.dumps([socket.gethostname(), mistake])
    if node.rank == 0:
        store = _host(node)
        store.set(_key(0), entry)
        mistakes = _collect(store, node, patience_s)
        _decide(store, node, mistakes)
        return store
    try:
        store = _join(node, patience_s)
        store.set(_key(node.rank), entry)
        while not store.check([_VERDICT]):
            time.sleep(0.2)
        known = json.loads(store.get(_VERDICT))
        store.add(_READ, 1)
    except (DistError, Refused) as error:
        lost = str(error) if isinstance(error, Refused) else f"node 0 at {_where(node)} ended: {_first_line(error)}"
        raise Refused(mistake or lost, 2 if mistake else 1) from None
    if known is not None:
        raise Refused("" if node.rank in known else mistake, 2)
    return store


def _collect(store: TCPStore, node: Node, patience_s: float) -> dict[str, list[int]]:
    """On node 0: each mistake that nodes found, with their ranks; waits for all nodes."""
    begin = reminded = time.monotonic()
    while lacking := [rank for rank in range(node.count) if not store.check([_key(rank)])]:
        waited = time.monotonic() - begin
        if waited > patience_s:
            break
        if time.monotonic() - reminded >= _SECONDS_BETWEEN_REMINDERS:
            reminded = time.monotonic()
            _say(_lacking(node, lacking, waited))
        time.sleep(0.2)
    mistakes: dict[str, list[int]] = {}
    for rank in set(range(node.count)) - set(lacking):
        found = json.loads(store.get(_key(rank)))[1]
        if found:
            mistakes.setdefault(found, []).append(rank)
    if lacking and not mistakes:
        raise Refused(_lacking(node, lacking, time.monotonic() - begin), 1)
    return mistakes


def _decide(store: TCPStore, node: Node, mistakes: dict[str, list[int]]) -> None:
    """On node 0: tell the other nodes whether to start; if not, wait until they have read that and raise Refused."""
    ranks = [rank for found in mistakes.values() for rank in found]
    store.set(_VERDICT, json.dumps(ranks or None))
    if not mistakes:
        return
    until = time.monotonic() + _SECONDS_TO_READ
    while store.add(_READ, 0) < node.count - 1 and time.monotonic() < until:
        time.sleep(0.1)
    lines = [
        found if 0 in where else f"node {_shortened(where)} ({json.loads(store.get(_key(where[0])))[0]}): {found}"
        for found, where in mistakes.items()
    ]
    raise Refused("\n".join(lines), 2)


def _host(node: Node) -> TCPStore:
    try:
        return TCPStore(
            node.address,
            node.port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,  # torchrun's own store of this process is served by the same server
            timeout=timedelta(seconds=60),
        )
    except DistError as error:
        if "EADDRINUSE" in str(error):
            raise Refused(
                f"port {node.port} of {socket.gethostname()} is in use by another program, perhaps a run that has not "
                f"ended (`ss -ltnp 'sport = :{node.port}'` names it). Set MASTER_PORT to a free port, the same on all "
                "nodes",
                2,
            ) from None
        raise Refused(
            f"node 0 cannot listen at {_where(node)}: {_first_line(error)}. MASTER_ADDR must be an address of "
            "this node",
            2,
        ) from None


def _join(node: Node, patience_s: float) -> TCPStore:
    """On another node: connect to node 0."""
    begin = reminded = time.monotonic()
    while True:
        try:
            socket.create_connection((node.address, node.port), timeout=10).close()
            return TCPStore(node.address, node.port, wait_for_workers=False, timeout=timedelta(seconds=60))
        except (OSError, DistError) as error:
            reason = _first_line(error)
        waited = time.monotonic() - begin
        told = (
            f"node {node.rank} has waited {waited:.0f} s for node 0 at {_where(node)}: {reason}. Check that "
            f"run_train.sh runs on node 0 (NODE_RANK=0, NNODES={node.count}), that MASTER_ADDR is an address "
            "of it, and that no firewall blocks the port"
        )
        if waited > patience_s:
            raise Refused(told, 1)
        if time.monotonic() - reminded >= _SECONDS_BETWEEN_REMINDERS:
            reminded = time.monotonic()
            _say(told)
        time.sleep(1)


def _lacking(node: Node, ranks: Sequence[int], waited_s: float) -> str:
    return (
        f"{node.count - len(ranks)} of {node.count} nodes have joined at {_where(node)} after {waited_s:.0f} s; "
        f"missing: node {_shortened(ranks)}. Check that run_train.sh runs there with NNODES={node.count} and its own "
        "NODE_RANK, and that MASTER_ADDR and MASTER_PORT are the same on every node"
    )


def _run(words: Sequence[str]) -> int:
    """torchrun, without its account of how it ended; exit status 0, or 1, or that of a signal."""
    for name in _NOISE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun(list(words))
    except ChildFailedError as error:
        for local_rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # which is how torchrun ends the others
                _say(
                    f"process {local_rank} of {socket.gethostname()} (pid {failure.pid}) was killed by "
                    f"{failure.signal_name()}"
                    + (": often too little host memory" if -failure.exitcode == signal.SIGKILL else "")
                )
        return FAILURE
    except SignalException as error:
        return 128 + int(error.sigval)
    except DistError as error:
        _say(f"the nodes lost each other: {_first_line(error)}")
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
