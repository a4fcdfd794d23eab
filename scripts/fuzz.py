"""Fuzz the readers of untrusted files with atheris (libFuzzer): any exception other than our own errors is a bug.

    pip install atheris
    python scripts/fuzz.py toml -max_total_time=300          # the kinds are those of tests/untrusted.py
    python scripts/fuzz.py idx CORPUS_FOLDER -rss_limit_mb=2048 -timeout=20

Arguments after the kind are passed to libFuzzer, which writes the bytes that cause a crash to a file `crash-...`.
pytest fuzzes the same readers with hypothesis for a shorter time (tests/behavior/test_untrusted_input_is_refused.py).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

with atheris.instrument_imports(include=["titan_cpt", "untrusted"]):
    import untrusted


def main() -> None:
    """Fuzz one kind of file, starting from a valid one."""
    if len(sys.argv) < 2 or sys.argv[1] not in untrusted.KINDS:
        sys.exit(f"usage: fuzz.py {{{','.join(untrusted.KINDS)}}} [libFuzzer's options]")
    kind = sys.argv.pop(1)
    with tempfile.TemporaryDirectory(prefix="seeds-") as seeds:
        (Path(seeds) / "valid").write_bytes(untrusted.KINDS[kind][1])
        atheris.Setup([*sys.argv, seeds], lambda content: untrusted.read_as(kind, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
