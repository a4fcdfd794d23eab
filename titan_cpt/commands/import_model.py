"""`titan-cpt import`: convert a Hugging Face model into a checkpoint that a run can start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, positive_int


def add_import(subparsers: Subparsers) -> None:
    """The options of `import`."""
    summary = "convert a Hugging Face model into a checkpoint"
    importing = add_command(
        subparsers,
        "import",
        _run,
        summary,
        details='A stage starts from it with init = "checkpoint:OUT".',
        usage="PATH-OR-HUB-NAME OUT [options]",
        example="titan-cpt import EleutherAI/pythia-70m checkpoints/pythia-70m",
    )
    importing.add_argument(
        "source", metavar="PATH-OR-HUB-NAME", help="a model folder, or OWNER/NAME[@REVISION] on the hub"
    )
    importing.add_argument("output", type=Path, metavar="OUT", help="the checkpoint folder to write")
    importing.add_argument(
        "--vocab-size",
        type=positive_int,
        metavar="ROWS",
        help="embedding rows (default: the model's); extra rows are dropped, new rows are the mean of all others",
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.checkpoint.hf_import import import_released

    import_released(options.source, options.output, vocab_size=options.vocab_size, log=print)
    return 0
