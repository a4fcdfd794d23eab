"""`titan-cpt export`: convert a checkpoint into a Hugging Face model folder, or a DCP folder for torchtitan."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, positive_int
from titan_cpt.errors import ConfigError


def add_export(subparsers: Subparsers) -> None:
    """The options of `export`."""
    summary = "convert a checkpoint for transformers or torchtitan"
    export = add_command(
        subparsers,
        "export",
        _run,
        summary,
        details="The result is a Hugging Face model folder, which vLLM loads too, or a DCP folder.",
        usage="CHECKPOINT OUT [options]",
        example="titan-cpt export outputs/mine/german/step-00000500 exported",
    )
    export.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, such as outputs/RUN/STAGE/step-00080000"
    )
    export.add_argument("output", type=Path, metavar="OUT", help="the folder to write")
    export.add_argument(
        "--format",
        choices=("hf", "dcp"),
        default="hf",
        help="hf: Hugging Face (default); dcp: DCP with torchtitan's names, for its initial_load_path",
    )
    export.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="dtype of the weights (default: bfloat16; with --format dcp float32)",
    )
    export.add_argument(
        "--tokenizer",
        metavar="bytes|PATH",
        help="tokenizer to write (default: that of the run or of the imported model)",
    )
    export.add_argument("--max-shard-size", metavar="SIZE", help="maximum size of one weight file (default: 5GB)")
    export.add_argument(
        "--max-positions",
        type=positive_int,
        metavar="TOKENS",
        help="max_position_embeddings (default: the longest sequence length of the training and the imported model)",
    )
    export.add_argument("--push", metavar="NAME", help="then upload OUT to this repository of the Hugging Face hub")
    export.add_argument("--public", action="store_true", help="a repository that --push creates is public, not private")


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.common.numbers import parse_bytes

    if options.public and options.push is None:
        raise ConfigError("--public goes with --push NAME: only a repository of the hub can be public")
    if options.format == "dcp":
        return _to_torchtitan(options)
    max_shard_bytes = parse_bytes(options.max_shard_size or "5GB", option="--max-shard-size")  # before torch
    if options.push is not None:
        from titan_cpt.checkpoint.hf_push import check_push

        check_push(options.push)
    from titan_cpt.checkpoint.hf_export import export

    export(
        options.checkpoint,
        options.output,
        dtype=options.dtype or "bfloat16",
        tokenizer=options.tokenizer,
        max_shard_bytes=max_shard_bytes,
        max_positions=options.max_positions,
        log=print,
    )
    if options.push is not None:
        from titan_cpt.checkpoint.hf_push import push

        push(options.output, options.push, public=options.public, log=print)
    return 0


def _to_torchtitan(options: argparse.Namespace) -> int:
    only_hf = ("tokenizer", "max_shard_size", "max_positions", "push")
    given = [f"--{name.replace('_', '-')}" for name in only_hf if getattr(options, name) is not None]
    if given:
        raise ConfigError(f"{given[0]} goes with --format hf: a DCP folder for torchtitan has only the weights")
    from titan_cpt.checkpoint.other_trainers.torchtitan.export import export_to_torchtitan

    export_to_torchtitan(options.checkpoint, options.output, dtype=options.dtype or "float32", log=print)
    return 0
