"""`titan-cpt merge`: merge the weights of checkpoints and Hugging Face models into a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, number, number_list, probability

_METHODS = ("mean", "linear", "slerp", "ties", "task-arithmetic")


def add_merge(subparsers: Subparsers) -> None:
    """The options of `merge`."""
    merging = add_command(
        subparsers,
        "merge",
        _run,
        "merge the weights of checkpoints and Hugging Face models",
        details='Writes a checkpoint in float32, from which a stage starts with init = "checkpoint:DIR".',
        usage="CHECKPOINT [CHECKPOINT ...] --output DIR [options]",
        example="titan-cpt merge outputs/mine/german/step-00000{400,450,500} --output mean\n"
        "titan-cpt merge german python --base pythia --method ties --output both",
    )
    merging.add_argument(
        "inputs",
        nargs="+",
        metavar="CHECKPOINT",
        help="a checkpoint (with @average at its end: the average in it), a Hugging Face folder, or "
        "OWNER/NAME[@REVISION] on the hub",
    )
    merging.add_argument("--output", type=Path, required=True, metavar="DIR", help="the checkpoint folder to write")
    merging.add_argument("--method", choices=_METHODS, help="how to merge (default: mean; linear if there are weights)")
    merging.add_argument(
        "--weights",
        type=number_list,
        metavar="W,W,...",
        help="one for each CHECKPOINT, divided by their sum; task-arithmetic uses them as they are (default: equal "
        "weights; for task-arithmetic 1 each)",
    )
    merging.add_argument(
        "--base", metavar="CHECKPOINT", help="the model that all inputs were trained from, for ties and task-arithmetic"
    )
    merging.add_argument(
        "--density", type=probability, metavar="P", help="share of each task vector that ties keeps (default: 0.2)"
    )
    merging.add_argument(
        "--scale",
        type=number,
        metavar="S",
        help="factor of the merged task vector, for ties and task-arithmetic (default: 1)",
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.checkpoint.merge.settings import merge_settings

    settings = merge_settings(  # before torch is imported
        len(options.inputs),
        method=options.method,
        weights=options.weights,
        has_base=options.base is not None,
        density=options.density,
        scale=options.scale,
    )
    from titan_cpt.checkpoint.merge.merge import merge

    merge(options.inputs, options.output, settings, base=options.base, log=print)
    return 0
