"""`titan-cpt verify`: check a checkpoint's files against its manifest."""

from __future__ import annotations

import argparse

from titan_cpt.commands.arguments import Subparsers, add_command
from titan_cpt.errors import CheckpointError


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
        help="a checkpoint, such as outputs/RUN/STAGE/step-00080000 or s3://bucket/runs/RUN/STAGE/step-00080000; with "
        "@average at its end, the average in it must exist too",
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.checkpoint.averages import describe_average, has_average, require_weights
    from titan_cpt.checkpoint.manifest import verify
    from titan_cpt.checkpoint.remote.copies import read_copy, verify_copy
    from titan_cpt.common.weights.named_weights import named_weights, split_average
    from titan_cpt.object_storage.locations import is_url

    if is_url(options.checkpoint):
        url, average = split_average(options.checkpoint)
        copy = read_copy(url.rstrip("/"))
        if average and not has_average(copy.manifest):
            raise CheckpointError(f"{url}: holds no average of its weights; name it without @average")
        verify_copy(copy)
        manifest = copy.manifest
    else:
        weights = named_weights(options.checkpoint)
        average = weights.average
        manifest = verify(weights.folder)
        require_weights(weights, manifest)
    size = sum(file["bytes"] for file in manifest["files"].values())
    held = f"; {describe_average(manifest)}" if average else ""
    files = f"{len(manifest['files'])} files, {size:,} bytes"
    print(f"{options.checkpoint}: good, {files}, plan {manifest['fingerprint']}{held}")
    return 0
