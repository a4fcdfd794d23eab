"""`titan-cpt init`: write a commented config to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, positive_int
from titan_cpt.errors import ConfigError


def add_init(subparsers: Subparsers) -> None:
    """The options of `init`."""
    init = add_command(
        subparsers,
        "init",
        _run,
        "write a commented config to start from",
        details="--list describes the scenarios. A file that exists is not replaced.",
        usage="SCENARIO [FILE] [options]",
        example="titan-cpt init laptop mine.toml --text 'text/english/*.jsonl'\n"
        "titan-cpt init released pythia.toml --model EleutherAI/pythia-410m\n"
        "titan-cpt init new-data news.toml --text 'news=text/news/*.txt'",
    )
    init.add_argument("scenario", nargs="?", metavar="SCENARIO", help="what the run is for; see --list")
    init.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", default=None, help="the file to write (default: SCENARIO.toml)"
    )
    init.add_argument("--list", action="store_true", help="list the scenarios, and write nothing")
    init.add_argument("--name", metavar="NAME", help="name of the run (default: mine)")
    init.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="[NAME=]FILES",
        help="text of a dataset, such as 'text/*.jsonl'; once for each dataset, in the order of training; NAME renames "
        "the dataset",
    )
    init.add_argument("--size", metavar="SIZE", help="named size of the model (default: tiny, or that of the model)")
    init.add_argument("--steps", type=positive_int, metavar="N", help="optimizer steps of each stage (default: 300)")
    init.add_argument(
        "--model", metavar="PATH-OR-HUB-NAME", help="released: the model to continue (default: EleutherAI/pythia-160m)"
    )
    init.add_argument("--base", type=Path, metavar="FILE", help="new-data: the config of the run (default: mine.toml)")
    init.add_argument("--force", action="store_true", help="replace a file that exists")


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.runs.scenarios import SCENARIOS, ScenarioOptions, write_scenario

    if options.list:
        width = max(map(len, SCENARIOS))
        for name, scenario in SCENARIOS.items():
            print(f"{name:{width}}  {scenario.summary}")
        return 0
    if options.scenario is None:
        raise ConfigError(
            f"command line: SCENARIO is missing: {', '.join(SCENARIOS)}. `titan-cpt init --list` describes them"
        )
    path = options.file or Path(f"{options.scenario}.toml")
    chosen = ScenarioOptions(options.name, options.text, options.size, options.steps, options.model, options.base)
    config = write_scenario(options.scenario, path, chosen, force=options.force)
    train = "titan-cpt sweep" if config.sweep else "./run_train.sh"
    print(f"{path}: written; its comments say what to change. Next:")
    print(f"  titan-cpt plan {path}")
    print(f"  {train} {path}")
    return 0
