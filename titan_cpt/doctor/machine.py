"""Checks of the machine: Python, packages, CPU, memory, limits of the operating system."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from titan_cpt.common.version import own_version
from titan_cpt.doctor.finding import Finding, note, ok, problem
from titan_cpt.doctor.request import Request
from titan_cpt.doctor.versions import commit_of
from titan_cpt.errors import how_to_install

CPU_FILE = Path("/proc/cpuinfo")
MEMORY_FILE = Path("/proc/meminfo")
CGROUP_LIMIT_FILE = Path("/sys/fs/cgroup/memory.max")
SHARED_MEMORY = Path("/dev/shm")
_OLDEST_PYTHON = (3, 10)
_ENOUGH_FILES = 4096  # a process of a run holds sockets to its peers, token files and checkpoint shards open
_ENOUGH_SHARED_BYTES = 1 << 30
_EXTRAS = {  # package: what it is for
    "huggingface_hub": "hub downloads",
    "transformers": "checks of imports and exports",
    "torchao": "float8",
    "lm_eval": "benchmarks",
    "matplotlib": "figures of reports",
    "jinja2": "HTML reports",
}
_KNOWN = (  # (package, first version, first good version, finding); what was seen with real versions
    (
        "transformers",
        "0",
        "5",
        "reads the RoPE settings of folders that transformers 5 wrote as base 10,000 and share 0.25, without a warning",
        "pip install 'transformers>=5.5', or export with the version that will read the folder",
    ),
    (
        "transformers",
        "5",
        "5.5",
        "reads the rotary share of any GPT-NeoX folder as 0.25",
        "pip install 'transformers>=5.5'",
    ),
)


def check_python(_: Request) -> Iterator[Finding]:
    """Python's version and the platform."""
    version = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < _OLDEST_PYTHON:
        yield problem("python", f"{version}: too old", "install Python 3.10 or newer, and titan_cpt in it")
    else:
        yield ok("python", version)
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() != "Linux":
        yield note("platform", f"{system}: only Linux is tested", "train on Linux; plan and report work elsewhere")
    else:
        yield ok("platform", system)


def check_installation(_: Request) -> Iterator[Finding]:
    """titan_cpt's own version, and the versions of the packages that it needs."""
    here = Path(__file__).parents[2]
    yield ok("titan_cpt", f"{own_version()}{commit_of(here)} in {here}")
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in metadata.requires("titan_cpt") or ()]
    except metadata.PackageNotFoundError:
        yield note("packages", "titan_cpt is run from a folder and not installed", "pip install -e . in that folder")
        return
    wrong = 0
    for requirement in required:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            fault = _missing_or_old(requirement.name, requirement.specifier)
            if fault:
                wrong += 1
                yield problem("packages", fault, how_to_install(requirement.name))
    if not wrong:
        yield ok("packages", "all required packages are installed in versions that are allowed")
    yield from _optional(required)


def _missing_or_old(name: str, allowed: object) -> str:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    fits = allowed.contains(version, prereleases=True)  # type: ignore[attr-defined]  # a SpecifierSet
    return "" if fits else f"{name} {version} is installed; needed is {name}{allowed}"


def _optional(required: Iterable[object]) -> Iterator[Finding]:
    missing = []
    for package, purpose in _EXTRAS.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(f"{package} ({purpose})")
            continue
        for fault, remedy in known_faults(package, version):
            yield note("packages", fault, remedy)
    if missing:
        first = missing[0].partition(" ")[0]
        yield note("extras", f"not installed: {', '.join(missing)}", f"if you need one, such as {first}: "
                   f"{how_to_install(first)}")  # fmt: skip
    else:
        yield ok("extras", "all optional packages are installed")


def known_faults(package: str, version: str) -> Iterator[tuple[str, str]]:
    """What is known to be wrong with a version of a package, and what to do."""
    from packaging.version import Version

    for name, first, good, fault, remedy in _KNOWN:
        if name == package and Version(first) <= Version(version) < Version(good):
            yield f"{package} {version} {fault}", remedy


def check_cpu(_: Request) -> Iterator[Finding]:
    """Cores, instruction sets, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = CPU_FILE.read_text(encoding="utf-8", errors="replace") if CPU_FILE.exists() else ""
    flags = set(_field(text, "flags").split())
    sets = [name for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f"), ("AMX", "amx_tile"),
                                    ("bf16", "avx512_bf16"), ("AMX bf16", "amx_bf16")) if flag in flags]  # fmt: skip
    name = _field(text, "model name") or platform.processor() or platform.machine()
    yield ok("cpu", f"{cores} of {os.cpu_count()} cores, {name}; {', '.join(sets) or 'instruction sets unknown'}")
    if "AuthenticAMD" in text and "avx512f" in flags:
        yield note("cpu", "AMD with AVX-512: oneDNN multiplies float32 about twice as fast as torch's default",
                   "set training.enable_onednn = true for training on this CPU")  # fmt: skip
    if flags and not flags & {"avx512_bf16", "amx_bf16"}:
        yield note("cpu", "no bf16 instructions: bfloat16 is slow on this CPU",
                   'for training on it set training.mixed_precision_param = "float32"')  # fmt: skip
    if memory := available_memory():
        yield ok("memory", f"{memory / 2**30:.1f} GiB available")


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def available_memory() -> int:
    """Bytes of memory that new processes can use, also within the limit of a cgroup; 0 if it is not known."""
    text = MEMORY_FILE.read_text(encoding="utf-8") if MEMORY_FILE.exists() else ""
    free = _field(text, "MemAvailable").partition(" ")[0]
    limit = CGROUP_LIMIT_FILE.read_text(encoding="utf-8").strip() if CGROUP_LIMIT_FILE.exists() else "max"
    known = [int(free) * 1024] if free.isdigit() else []
    return min([*known, *([int(limit)] if limit.isdigit() else [])], default=0)


def check_limits(_: Request) -> Iterator[Finding]:
    """Open files, shared memory and file sizes that the operating system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _ENOUGH_FILES:
        yield ok("open files", f"up to {'any number' if soft == resource.RLIM_INFINITY else soft}")
    else:
        top = "unlimited" if hard == resource.RLIM_INFINITY else hard
        level = problem if soft < 256 else note
        yield level("open files", f"up to {soft}: large runs need {_ENOUGH_FILES}", f"ulimit -n {top} before training")
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY:
        yield problem("file size", f"limited to {size / 2**20:.0f} MiB: checkpoints fail", "ulimit -f unlimited")
    if SHARED_MEMORY.exists():
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < _ENOUGH_SHARED_BYTES:
            yield note("shared memory", f"{free / 2**20:.0f} MiB free in {SHARED_MEMORY}: too little for NCCL and for "
                       "loader workers", "start the container with --shm-size=8g or --ipc=host")  # fmt: skip
        else:
            yield ok("shared memory", f"{free / 2**30:.1f} GiB free in {SHARED_MEMORY}")
