"""`titan-cpt models`: model families, named sizes, and what is published about the training of the releases."""

from __future__ import annotations

import argparse
import json

from titan_cpt.commands.arguments import Subparsers, add_command


def add_models(subparsers: Subparsers) -> None:
    """The options of `models`."""
    models = add_command(
        subparsers,
        "models",
        _run,
        "list models, and how the released ones were trained",
        details="Families and sizes; and of releases the learning rates, tokens, stages and checkpoints, each with its "
        "source. What has no source is unknown. `plan` compares a stage with these facts.",
        usage="[NAME] [options]",
        example="titan-cpt models\ntitan-cpt models 410m\ntitan-cpt models EleutherAI/pythia-410m --json",
    )
    models.add_argument(
        "name", nargs="?", metavar="NAME", help="a family, or a size or a hub name for all that is known of it"
    )
    models.add_argument("--json", action="store_true", help="print one JSON object")


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.common.console import TEXT_COLUMNS
    from titan_cpt.models.registry import family_names
    from titan_cpt.models.release_text import detail_lines, find_sizes, table_lines

    sizes = find_sizes(options.name)
    if options.json:
        print(json.dumps({"models": [size.as_json() for size in sizes]}))
    elif options.name is None or options.name in family_names():
        print("\n".join(table_lines(sizes)))
    else:
        print("\n\n".join("\n".join(detail_lines(size, TEXT_COLUMNS)) for size in sizes))
    return 0
