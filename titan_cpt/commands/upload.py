"""`titan-cpt upload`: upload the checkpoints of a run that are not in object storage yet."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command


def add_upload(subparsers: Subparsers) -> None:
    """The options of `upload`."""
    upload = add_command(
        subparsers,
        "upload",
        _run,
        "finish the uploads of a run",
        details="Uploads the checkpoints that its checkpoint.upload names and that are not in object storage yet.",
        usage="RUN [options]",
        example="titan-cpt upload outputs/mine",
    )
    upload.add_argument("run_folder", type=Path, metavar="RUN", help="the folder of a run, such as outputs/mine")
    upload.add_argument(
        "--to", metavar="URL", help="URL to use instead of checkpoint.upload.to, such as s3://bucket/runs"
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.runs.upload_run import upload_run

    return upload_run(options.run_folder, to=options.to, say=print)
