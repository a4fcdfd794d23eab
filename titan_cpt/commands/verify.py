"""`titan-cpt verify`: check a checkpoint's files against its manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command


def add_verify(subparsers: Subparsers) -> None:
    """The options of `verify`."""
    verify = add_command(
        subparsers,
        "verify",
        _run,
        "check the files of a checkpoint",
        details="Compares their sizes and checksums with the manifest.",
        usage="CHECKPOINT",
        example="titan-cpt verify outputs/mine/german/step-00000500",
    )
    verify.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint, such as outputs/RUN/STAGE/step-00080000 or s3://bucket/runs/RUN/STAGE/step-00080000",
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.checkpoint.manifest import verify
    from titan_cpt.checkpoint.remote.copies import read_copy, verify_copy
    from titan_cpt.object_storage.locations import is_url

    if is_url(options.checkpoint):
        copy = read_copy(options.checkpoint.rstrip("/"))
        verify_copy(copy)
        manifest = copy.manifest
    else:
        manifest = verify(Path(options.checkpoint))
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(f"{options.checkpoint}: good, {len(manifest['files'])} files, {size:,} bytes, plan {manifest['fingerprint']}")
    return 0
