"""The faults of mutants.toml, applied one at a time to a copy of the repository: the named tests must fail on each.

    python tests/mutants.py            # all of them, a few minutes; exit status 1 if any survives
    python tests/mutants.py schedules  # those of files whose path holds the word

A mutant that survives shows a test that is missing, or code that nothing needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "titan_cpt",
    "tests",
    "train_configs",
    "pyproject.toml",
    "README.md",
    "docs/library.md",
    "docs/metrics.md",
    "scripts/crash_matrix.py",
)


@dataclass(frozen=True)
class Mutant:
    """One fault: the text of a file that is replaced, and the tests that must notice; mutants.toml says more."""

    what: str
    file: str
    old: str
    new: str
    tests: list[str]

    def is_stale(self) -> bool:
        """Whether its text does not stand in its file exactly once, or some of its tests are not there."""
        text = (ROOT / "titan_cpt" / self.file).read_text()
        return text.count(self.old) != 1 or not all(list((ROOT / "tests").glob(tests)) for tests in self.tests)


def read_mutants() -> list[Mutant]:
    """All of mutants.toml, in its order."""
    with (ROOT / "tests" / "mutants.toml").open("rb") as file:
        return [Mutant(**table) for table in tomllib.load(file)["mutant"]]


def main(words: list[str]) -> int:
    """Apply each mutant, run its tests, tell what survived; returns the exit status."""
    chosen = [mutant for mutant in read_mutants() if not words or any(word in mutant.file for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            _copy(ROOT / name, copy / name)
        for tests in sorted({tests for mutant in chosen for tests in mutant.tests}):
            if not _pass(copy, tests):
                print(f"tests/{tests} fails without any mutant: mend that first")
                return 2
        survivors = [mutant for mutant in chosen if not _killed(copy, mutant)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    return 1 if survivors else 0


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)


def _killed(copy: Path, mutant: Mutant) -> bool:
    path = copy / "titan_cpt" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        print(
            f"STALE     {mutant.file}: {mutant.what}: the text stands there {text.count(mutant.old)} times", flush=True
        )
        return False
    path.write_text(text.replace(mutant.old, mutant.new))
    blind = [tests for tests in mutant.tests if _pass(copy, tests)]
    path.write_text(text)
    print(f"{'SURVIVED ' if blind else 'killed   '} {mutant.file}: {mutant.what}", *blind, flush=True)
    return not blind


def _pass(copy: Path, tests: str) -> bool:
    """Whether the tests pass on the copy. No byte code is written: it would outlive a fault made in the same second."""
    command = [sys.executable, "-c", "import pytest; raise SystemExit(pytest.main())"]
    command += ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants"]
    command += [str(path) for path in sorted((copy / "tests").glob(tests))]
    path = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run tests/{tests}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
