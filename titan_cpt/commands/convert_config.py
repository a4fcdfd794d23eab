"""`titan-cpt convert-config`: a config of torchtitan, GPT-NeoX, litgpt or Megatron-LM as a config of titan_cpt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, positive_int
from titan_cpt.errors import ConfigError, TitanError


def add_convert_config(subparsers: Subparsers) -> None:
    """The options of `convert-config`."""
    convert = add_command(
        subparsers,
        "convert-config",
        _run,
        "convert a config of torchtitan, GPT-NeoX, litgpt or Megatron-LM",
        details="It lists the keys that were converted, those that have no counterpart, and what you must check.",
        usage="FILE... [OUT.toml] [options]",
        example="titan-cpt convert-config llama3_8b.toml mine.toml --world-size 64\n"
        "titan-cpt convert-config 410M.yml local_setup.yml mine.toml --from gpt-neox",
    )
    convert.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="the config, or several of GPT-NeoX, which are merged. If the last of two or more names ends in .toml, "
        "the result is written to it; otherwise it is printed, and the lists go to stderr",
    )
    convert.add_argument(
        "--from",
        dest="project",
        choices=("torchtitan", "gpt-neox", "litgpt", "megatron"),
        help="the project whose config it is (default: recognized from the file)",
    )
    convert.add_argument(
        "--world-size", type=positive_int, metavar="N", help="number of GPUs in that project, if the file lacks it"
    )
    convert.add_argument("--force", action="store_true", help="overwrite the output file")


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.common.files import write_text_atomically
    from titan_cpt.convert.convert import convert_files
    from titan_cpt.convert.toml_text import report_text, toml_text

    *files, last = options.files
    out = last if files and last.suffix == ".toml" else None
    files = files if out else options.files
    if out is not None and out.exists() and not options.force:
        raise ConfigError(f"{out}: exists already; choose another name, or add --force to overwrite it")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"{out}: the folder {out.parent} does not exist; make it, or choose another name")
    conversion = convert_files(files, options.project, options.world_size)
    text = toml_text(conversion)
    if out is None:
        print(text, end="")
    else:
        write_text_atomically(out, text)
    lists = sys.stdout if out else sys.stderr
    print(f"{conversion.project}: {', '.join(map(str, files))}\n\n{report_text(conversion)}\n", file=lists)
    try:
        print(_planned(text, out or Path("the result")), file=lists)
    except TitanError as error:
        where = f"{out} was written, but" if out else "The result"
        raise ConfigError(f"{where} does not plan yet; edit it, then `titan-cpt plan` it. {error}") from None
    return 0


def _planned(text: str, name: Path) -> str:
    """Steps, tokens and parameters of the result, in one line."""
    from titan_cpt.config.load import check_config
    from titan_cpt.config.toml_files import parse_toml
    from titan_cpt.data.inventory import take_inventory
    from titan_cpt.planning.parallel import min_world_size
    from titan_cpt.planning.planner import make_plan

    config = check_config(parse_toml(text), name)
    plan = make_plan(config, take_inventory(config), min_world_size(config))
    stage = plan.stages[0]
    return (
        f"{name}: plans {stage.steps:,} steps of {stage.step_tokens(0):,} tokens, {plan.spec.parameters / 1e6:,.1f} M "
        f"parameters; `titan-cpt plan` shows the rest"
    )
