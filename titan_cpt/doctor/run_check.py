"""Runs one check in this process: `python -m titan_cpt.doctor.run_check MODULE:FUNCTION TOPIC < REQUEST`.

Each check has a process of its own, so that one that crashes or hangs is a finding and does not end the others.
"""

from __future__ import annotations

import json
import os
import sys
from pkgutil import resolve_name

from titan_cpt.doctor.finding import note
from titan_cpt.doctor.request import Request
from titan_cpt.errors import TitanError


def main() -> None:
    """Print the findings as JSON lines on the real standard output; whatever else is printed goes to stderr."""
    findings = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = Request.from_json(json.loads(sys.stdin.read()))
    try:
        for finding in resolve_name(sys.argv[1])(request):
            print(json.dumps(finding.as_json()), file=findings, flush=True)
    except TitanError as error:  # the config cannot be loaded or planned, which the check of the plan says in full
        line = " ".join(str(error).split())[:120]
        print(json.dumps(note(sys.argv[2], f"not checked, because: {line}").as_json()), file=findings, flush=True)


if __name__ == "__main__":
    main()
