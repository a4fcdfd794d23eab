"""A folder with the shell scripts under test, and stand-ins for the programs that they call."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Appends its arguments and some environment variables to $CALLS, one JSON object per line, then runs $ACTION.
# `-c` (has it titan_cpt?) succeeds unless $LACKS_TITAN_CPT is part of its path; --run-info prints a run folder, and
# exits with $RUN_INFO_STATUS.
RECORDER = """
import json, os, sys
program, *arguments = sys.argv[1:]
if arguments[0] == "-c":
    sys.exit("LACKS_TITAN_CPT" in os.environ and os.environ["LACKS_TITAN_CPT"] in program)
if "--run-info" in arguments:
    print("run_folder=outputs/run", "init_timeout_seconds=345", sep="\\n")
    sys.exit(int(os.environ.get("RUN_INFO_STATUS", "0")))
wanted = ("TITAN_CPT_STATUS_FILE", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
given = {name: os.environ[name] for name in wanted if name in os.environ}
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps({"program": program, "arguments": arguments, "directory": os.getcwd(), **given}), file=calls)
os.execvp("bash", ["bash", "-c", os.environ.get("ACTION", "exit 0")])
"""


class Repository:
    """A folder with the scripts under test, and the calls of the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a repository"  # a path with a space, to test quoting
        self.elsewhere = folder / "elsewhere"
        self.tools = folder / "tools"
        self.calls_file = folder / "calls.jsonl"
        for made in (self.folder / "scripts", self.elsewhere, self.tools, folder / "tmp"):
            made.mkdir(parents=True)
        shutil.copy(ROOT / "run_train.sh", self.folder)
        shutil.copy(ROOT / "scripts" / "setup.sh", self.folder / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        self.environment = {
            "PATH": f"{self.tools}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "CALLS": str(self.calls_file),
        }

    def add_recorder(self, path: Path) -> None:
        """Make `path` a Python that only records how it was called."""
        program = self.calls_file.with_name("recorder.py")
        program.write_text(RECORDER, encoding="utf-8")
        self.add_tool(path, f'#!/usr/bin/env bash\nexec "{sys.executable}" -S "{program}" "$0" "$@"\n')

    def add_tool(self, path: Path, script: str) -> None:
        """Make `path` an executable file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the repository from another directory."""
        return subprocess.run(
            [str(self.folder / script), *arguments],
            cwd=self.elsewhere,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[dict]:
        """The calls of the stand-ins, in order."""
        if not self.calls_file.exists():
            return []
        return [json.loads(line) for line in self.calls_file.read_text(encoding="utf-8").splitlines()]

    def only_call(self) -> dict:
        (call,) = self.calls()
        return call


def option(call: dict[str, Any], name: str) -> str | None:
    """The value of one of torchrun's options, or None if it was not given."""
    return next((a.partition("=")[2] for a in call["arguments"] if a.partition("=")[0] == name), None)


def signalled(repository: Repository, action: str, number: signal.Signals) -> tuple[int, str]:
    """Exit status and later output of a run of two processes that is sent a signal once it has printed `ready`."""
    process = subprocess.Popen(
        [str(repository.folder / "run_train.sh")],
        cwd=repository.elsewhere,
        env={**repository.environment, "NPROC": "2", "ACTION": action},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output = process.stdout.read()
        return process.wait(timeout=30), output
