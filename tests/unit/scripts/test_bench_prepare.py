"""scripts/bench/prepare.py runs: three contestants, both formats, the large document, equal files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench" / "prepare.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of processes in /proc")
def test_the_dry_run_prints_every_line_of_the_table(tmp_path):
    """With this build as its own baseline."""
    command = [sys.executable, str(SCRIPT), "--dry-run", "--baseline", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "| t" in line]
    names = ["line by line, tokenizers", "baseline build", "titan-cpt prepare"]

    assert [row[:2] for row in rows if row[0] != "document.jsonl"] == [
        [text, name] for text in ("text.jsonl", "text.jsonl.zst") for name in names
    ]
    assert re.search(
        r"document\.jsonl \| titan-cpt prepare \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \| \d+ \|", done.stdout
    )
    assert all(float(row[2]) > 0 and float(row[-1]) > 5 for row in rows), "seconds and megabytes"
