"""`titan-cpt export`: convert a checkpoint into a Hugging Face model folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, positive_int


def add_export(subparsers: Subparsers) -> None:
    """The options of `export`."""
    summary = "convert a checkpoint into a Hugging Face folder that transformers and vLLM load"
    export = add_command(subparsers, "export", _run, summary)
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="such as outputs/RUN/STAGE/step-00080000")
    export.add_argument("output", type=Path, metavar="OUT", help="the folder to write")
    export.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the weights (default: bfloat16)"
    )
    export.add_argument(
        "--tokenizer", metavar="bytes|PATH", help="default: the tokenizer of the run or of the imported model"
    )
    export.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="size of the largest weight file (default: 5GB)"
    )
    export.add_argument(
        "--max-positions",
        type=positive_int,
        metavar="TOKENS",
        help="max_position_embeddings (default: the longer of the training's and the imported model's)",
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.common.numbers import parse_bytes

    max_shard_bytes = parse_bytes(options.max_shard_size, option="--max-shard-size")  # before torch is imported
    from titan_cpt.checkpoint.hf_export import export

    export(
        options.checkpoint,
        options.output,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        max_shard_bytes=max_shard_bytes,
        max_positions=options.max_positions,
        log=print,
    )
    return 0
