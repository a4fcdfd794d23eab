"""Checks of communication: interfaces, variables of NCCL and gloo, the port, and a real all-reduce of two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from titan_cpt.doctor.finding import Finding, note, ok, problem
from titan_cpt.doctor.request import Request

_INTERFACES = Path("/sys/class/net")
_DEFAULT_PORT = 29500  # torchrun's
_ALL_REDUCE_TIMEOUT_S = 60
_ALL_REDUCE = """
import os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, sys.argv[1] == "0", timeout=timedelta(seconds=30))
dist.init_process_group("gloo", store=store, rank=int(sys.argv[1]), world_size=2, timeout=timedelta(seconds=30))
values = torch.full((1000,), float(sys.argv[1]) + 1)
dist.all_reduce(values)
dist.destroy_process_group()
sys.exit(0 if values.eq(3).all() else 3)
"""


def check_interfaces(_: Request) -> Iterator[Finding]:
    """Network interfaces, the name of this host, and variables that choose an interface."""
    up = {name: _state(name) for _, name in socket.if_nameindex()}
    usable = [name for name, state in up.items() if state != "down" and name != "lo"]
    yield ok("network", f"interfaces: {', '.join(usable) or 'only loopback'}")
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if wanted and not _matches(wanted, up):
            yield problem("network", f"{variable} = {wanted}, but this machine has {', '.join(up)}",
                          f"unset {variable}, or name one of them")  # fmt: skip
    settings = {key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_"))}
    if settings:
        listed = ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))
        yield note("network", f"set in this environment: {listed}", "keep them only if this cluster needs them")
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        yield problem("host name", f"{host} has no address: gloo and torchrun on several nodes cannot find it",
                      f"add a line with its address and {host} to /etc/hosts, or set GLOO_SOCKET_IFNAME")  # fmt: skip
        return
    level = note if address.startswith("127.") else ok
    text = f"{host} is {address}"
    remedy = "on several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the cluster's interface"
    yield (
        note("host name", f"{text}: other nodes cannot reach that", remedy) if level is note else ok("host name", text)
    )


def _state(name: str) -> str:
    try:
        return (_INTERFACES / name / "operstate").read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def _matches(wanted: str, names: dict[str, str]) -> bool:
    """Whether a value of NCCL_SOCKET_IFNAME chooses an interface: prefixes, after "=" exact names, after "^" others."""
    if wanted.startswith("^"):
        return True
    exact = wanted.startswith("=")
    parts = wanted.removeprefix("=").split(",")
    return any(name == part if exact else name.startswith(part) for name in names for part in parts)


def check_port(_: Request) -> Iterator[Finding]:
    """Whether torchrun's port is free."""
    text = os.environ.get("MASTER_PORT", str(_DEFAULT_PORT))
    if not text.isdigit() or not 0 < int(text) < 65536:
        yield problem("port", f"MASTER_PORT = {text!r} is not a port", "unset it, or give a number from 1024 to 65535")
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torchrun binds it: after a run it is free
        try:
            probe.bind(("", int(text)))
        except OSError as error:
            wanted = "MASTER_PORT" in os.environ
            level = problem if wanted else note  # run_train.sh chooses a free port on one node
            text = f"{text} is in use or not allowed ({error.strerror})"
            text += "" if wanted else ": torchrun's own port on several nodes"
            yield level("port", text, "choose a free one with MASTER_PORT, or end the run that uses it (`ss -ltnp`)")
            return
    yield ok("port", f"{text} is free")


def check_all_reduce(_: Request) -> Iterator[Finding]:
    """Two processes sum a tensor over gloo on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _ALL_REDUCE]
    ranks = [
        subprocess.Popen([*command, str(rank), str(port)], env=environment, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]  # fmt: skip
    remedy = "GLOO_SOCKET_IFNAME=lo titan-cpt doctor; if that helps, set it for runs on one node; look for a firewall"
    try:
        errors = [rank.communicate(timeout=_ALL_REDUCE_TIMEOUT_S)[1] for rank in ranks]
    except subprocess.TimeoutExpired:
        yield problem("gloo", f"an all-reduce of two processes did not end within {_ALL_REDUCE_TIMEOUT_S} s", remedy)
        return
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    failed = [error for rank, error in zip(ranks, errors, strict=True) if rank.returncode]
    if failed:
        last = next((line.strip() for line in reversed(failed[0].splitlines()) if line.strip()), "no message")
        yield problem("gloo", f"an all-reduce of two processes failed: {last[:200]}", remedy)
    else:
        yield ok("gloo", "two processes summed a tensor on this machine")


def check_nccl(_: Request) -> Iterator[Finding]:
    """The NCCL version of torch; an all-reduce over NCCL needs two GPUs and is left to scripts/gpu."""
    import torch

    if not torch.distributed.is_nccl_available():
        yield ok("nccl", "this torch has none; CPUs use gloo")
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield ok("nccl", f"{version} (not run by this check)")
