"""`titan-cpt generate`: continue prompts with a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import (
    CHECKPOINTS_HELP,
    Subparsers,
    add_command,
    add_inference_options,
    inference_options,
    integer,
    positive_int,
    probability,
    temperature,
)
from titan_cpt.errors import ConfigError


def add_generate(subparsers: Subparsers) -> None:
    """The options of `generate`."""
    generating = add_command(
        subparsers,
        "generate",
        _run,
        "continue prompts with the model of a checkpoint",
        usage="CHECKPOINT [CHECKPOINT ...] --prompt TEXT [options]",
        example='titan-cpt generate outputs/mine --prompt "Once upon a time" --tokens 20',
    )
    generating.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=CHECKPOINTS_HELP)
    generating.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; can be repeated"
    )
    generating.add_argument(
        "--examples",
        action="store_true",
        help="continue nine built-in prompts, and save the answers for the run's report",
    )
    generating.add_argument(
        "--tokens", type=positive_int, default=64, metavar="N", help="maximum number of new tokens (default: 64)"
    )
    generating.add_argument(
        "--temperature",
        type=temperature,
        default=0.8,
        metavar="T",
        help="sampling temperature; 0 is greedy decoding (default: 0.8)",
    )
    generating.add_argument(
        "--top-p",
        type=probability,
        default=0.95,
        metavar="P",
        help="nucleus sampling from this share of the probability (default: 0.95)",
    )
    generating.add_argument("--seed", type=integer, default=0, metavar="N", help="seed of the sampling (default: 0)")
    add_inference_options(generating)


def _run(options: argparse.Namespace) -> int:
    if not options.prompt and not options.examples:
        raise ConfigError("command line: give --prompt TEXT, once or several times, or --examples")
    from titan_cpt.distributed.process_group import destroy_process_group, init_process_group
    from titan_cpt.evaluation.generate import Sampling
    from titan_cpt.evaluation.prompts import continue_prompts

    ranks = init_process_group()
    try:
        continue_prompts(
            options.checkpoints,
            ranks,
            options.prompt,
            sampling=Sampling(options.temperature, options.top_p, options.seed),
            tokens=options.tokens,
            examples=options.examples,
            open_options=inference_options(options),
            log=print,
        )
    finally:
        destroy_process_group()
    return 0
