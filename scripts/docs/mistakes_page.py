"""Writes docs/mistakes.md from tests/mistakes.toml: `python scripts/docs/mistakes_page.py > docs/mistakes.md`."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import mistakes

HEADER = """\
# Mistakes and what the commands say

Find a message here, or see what a mistake leads to. Each of these commands ends with exit status 2 and this message. A
test makes every mistake of this page in the run that [the last section](#the-config) shows. The page is generated
(`python scripts/docs/mistakes_page.py > docs/mistakes.md`).
"""
TITLES = {
    "config": "The config file",
    "command_line": "The command line",
    "data": "Token files and tokenizers",
    "prepare": "Preparing text",
    "plan": "The plan",
    "train": "Training and resuming",
    "checkpoints": "Checkpoints, import, export",
    "sweep": "Sweeps and baselines",
    "evaluate": "Evaluation and generation",
    "report": "Reports",
    "init": "New and converted configs",
    "launch": "Several processes",
    "environment": "The environment",
    "watch": "Following a run",
}


def main() -> None:
    """Make every mistake and print the page."""
    parts = [HEADER]
    topic = ""
    with tempfile.TemporaryDirectory() as name:
        playground = mistakes.make_playground(Path(name) / "playground")
        for number, mistake in enumerate(mistakes.read_mistakes()):
            if mistake.topic != topic:
                topic = mistake.topic
                parts.append(f"## {TITLES[topic]}\n")
            answer = mistakes.make(mistake, playground, Path(name) / str(number))
            lines = [line for line in answer.message.splitlines() if not line.startswith("+ ")]
            # The name of an index depends on when its tokens were written.
            lines = [re.sub(r"[0-9a-f]{32}(?=\.pack)", "HASH", line) for line in lines]
            parts.append(f"You {mistake.did}:\n\n```text\n" + "\n".join(lines).strip() + "\n```\n")
    parts.append(f"## The config\n\n```toml\n{mistakes.CONFIG}```")
    print("\n".join(parts))


if __name__ == "__main__":
    main()
