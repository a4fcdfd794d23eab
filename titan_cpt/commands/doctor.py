"""`titan-cpt doctor`: check this machine and a config, and say what to do."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING

from titan_cpt.commands.arguments import Subparsers, add_command, add_config_option, positive_int

if TYPE_CHECKING:
    from titan_cpt.doctor.finding import Finding

_WIDTH = 80
_TOPIC_WIDTH = 14


def add_doctor(subparsers: Subparsers) -> None:
    """The options of `doctor`."""
    doctor = add_command(
        subparsers,
        "doctor",
        _run,
        "check this machine and a config, and say what to do",
        details="Looks at torch, driver, devices, network, disk and packages; with a config also at its plan, data, "
        "tokenizer and memory. Needs no network. Exit status 1 if there is a problem.",
        usage="[FILE] [options]",
        example="titan-cpt doctor mine.toml",
        takes_overrides=True,
    )
    add_config_option(doctor)
    doctor.add_argument("--world-size", type=positive_int, metavar="N", help="number of ranks of the plan")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.commands.arguments import config_path
    from titan_cpt.doctor.doctor import examine
    from titan_cpt.doctor.request import Request

    config = config_path(options) if options.file or options.config else None
    findings = []
    for finding in examine(Request(config, tuple(options.overrides), options.world_size)):
        findings.append(finding)
        if not options.json:
            print(as_text(finding), flush=True)
    problems = [finding for finding in findings if finding.level == "problem"]
    if options.json:
        print(json.dumps({"problems": len(problems), "findings": [finding.as_json() for finding in findings]}))
    else:
        print(summary(findings))
    return 1 if problems else 0


def as_text(finding: Finding) -> str:
    """The finding in lines of 80 columns, the first with its level and topic."""
    start = f"{finding.level:<8}{finding.topic:<{_TOPIC_WIDTH}}"
    return _wrapped(finding.text, start, " " * len(start))


def summary(findings: list[Finding]) -> str:
    """What to do for each problem, and for each note that has something to do."""
    lines = []
    for level in ("problem", "note"):
        chosen = [finding for finding in findings if finding.level == level and (finding.remedy or level == "problem")]
        if chosen:
            lines += ["", "To do:" if level == "problem" else "Perhaps:"]
            lines += [_wrapped(f"{finding.topic}: {finding.remedy}", "  - ", "    ") for finding in chosen]
    count = sum(finding.level == "problem" for finding in findings)
    return "\n".join([*lines, "", f"{count or 'no'} problem{'' if count == 1 else 's'}"])


def _wrapped(text: str, first: str, rest: str) -> str:
    lines = textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=first, subsequent_indent=rest)
    return "\n".join(lines) or first
