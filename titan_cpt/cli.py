"""The command line: main() and the list of commands; each command's options and handler are in its file in commands/.

Exit status:
    0   done
    2   the user's mistake, or an error of the operating system (no permission, disk full): one message, no traceback
    75  stopped early by a signal with everything saved; the same command resumes (a batch queue may requeue it)
    130 Ctrl-C, with one line
    1   anything else
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from titan_cpt.commands.anneal import add_anneal
from titan_cpt.commands.arguments import parse_overrides, refuse_unknown
from titan_cpt.commands.baselines import add_baselines
from titan_cpt.commands.completion import add_completion, complete, is_requested
from titan_cpt.commands.convert_config import add_convert_config
from titan_cpt.commands.docs import add_docs
from titan_cpt.commands.doctor import add_doctor
from titan_cpt.commands.evaluate import add_eval
from titan_cpt.commands.export import add_export
from titan_cpt.commands.generate import add_generate
from titan_cpt.commands.import_model import add_import
from titan_cpt.commands.init import add_init
from titan_cpt.commands.merge import add_merge
from titan_cpt.commands.models import add_models
from titan_cpt.commands.parser import CommandParser
from titan_cpt.commands.plan import add_plan
from titan_cpt.commands.prepare import add_prepare
from titan_cpt.commands.report import add_report
from titan_cpt.commands.runs import add_runs
from titan_cpt.commands.sweep import add_sweep
from titan_cpt.commands.tokenizer import add_tokenizer
from titan_cpt.commands.track import add_track
from titan_cpt.commands.train import add_train
from titan_cpt.commands.upload import add_upload
from titan_cpt.commands.verify import add_verify
from titan_cpt.commands.version import PrintVersion
from titan_cpt.commands.watch import add_watch
from titan_cpt.common.exit_status import FAILURE, USER_ERROR, exit_interrupted, exit_with, print_error
from titan_cpt.errors import TitanError, how_to_install, os_error_message

COMMANDS = (  # in the order of --help
    add_init,
    add_convert_config,
    add_doctor,
    add_models,
    add_plan,
    add_train,
    add_sweep,
    add_baselines,
    add_prepare,
    add_tokenizer,
    add_import,
    add_export,
    add_merge,
    add_anneal,
    add_eval,
    add_generate,
    add_runs,
    add_report,
    add_watch,
    add_track,
    add_verify,
    add_upload,
    add_docs,
    add_completion,
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit status."""
    if is_requested():
        complete(make_parser())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a latin-1 terminal shows "?" for characters that it lacks
    try:
        options = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        status = options.run(options)
    except TitanError as error:
        printed_by_rank_0 = error.on_every_rank and os.environ.get("RANK", "0") != "0"
        print_error(f"{type(error).__name__}: {error}", silent=printed_by_rank_0)
        status = error.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as with `| head`
        status = FAILURE
    except OSError as error:
        print_error(f"{type(error).__name__}: {os_error_message(error)}")
        status = USER_ERROR
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "titan_cpt"):
            raise
        print_error(f"{package} is not installed for {sys.executable}; {how_to_install(package)}")
        status = USER_ERROR
    except KeyboardInterrupt as interrupt:
        exit_interrupted(str(interrupt))
    exit_with(status)


def parse_command_line(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command, with its config overrides as `overrides`.

    Raises:
        ConfigError: a mistake in the command line; the message names one.
    """
    parser = make_parser()
    if words and words[0].startswith("-") and words[0] not in parser.options():
        refuse_unknown(words[:1], parser)
    options: argparse.Namespace
    options, unknown = parser.parse_known_args(words)
    check = parse_overrides if options.takes_overrides else refuse_unknown
    options.overrides = check(unknown, options.parser)
    return options


def make_parser() -> CommandParser:
    """The parser of `titan-cpt` with all its commands."""
    parser = CommandParser(
        prog="titan-cpt",
        usage="titan-cpt COMMAND [options]",
        allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
        epilog="`titan-cpt COMMAND --help` lists the options of a command, with an example.",
        description="Continual pre-training of language models: stages, learning-rate re-warming and\n"
        "replay from one TOML file.",
    )
    parser.add_argument("--version", action=PrintVersion, nargs=0, help="print versions and devices, and exit")
    subparsers = parser.add_subparsers(required=True, dest="command", metavar="COMMAND", title="commands")
    for add_command in COMMANDS:
        add_command(subparsers)
    return parser
