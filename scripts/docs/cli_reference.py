"""Writes docs/cli.md from the parsers: `python scripts/docs/cli_reference.py > docs/cli.md`."""

from __future__ import annotations

import argparse
import re
import textwrap

from titan_cpt.cli import make_parser

DEFAULT = re.compile(r"\s*\(?\bdefault: ([^()]*)\)?")  # "(default: 8192)" in a help text
HEADER = """# Command line reference

Look up a command of `titan-cpt` here: its options, their defaults and an example. This page is generated from the
parsers (`python scripts/docs/cli_reference.py > docs/cli.md`), and a test compares the two.

`run_train.sh` takes the arguments of `titan-cpt train` and starts torchrun if `NPROC` is above 1
(`./run_train.sh --help`).

| exit status | meaning |
|---|---|
| 0 | done |
| 2 | a mistake in the config or command, or no permission, no such folder, a full disk: one message |
| 75 | training was stopped by a signal (SIGTERM, Ctrl-C) and saved, or ended before all its uploads; see below |
| 130 | Ctrl-C in every other command |
| 1 | anything else, such as a loss that is not finite, a problem that `doctor` found, or a tracker that failed |

After status 75 the same command resumes the run or finishes its uploads, and `scripts/slurm/train.sbatch` queues its
job again ([slurm.md](slurm.md)). A run that was still preparing its data stops at once and keeps the finished parts.
"""


def reference() -> str:
    """The whole page."""
    commands = _subcommands(make_parser())
    rows = [f"| [`{name}`](#titan-cpt-{name}) | {_cell(summary)} |" for name, summary, _ in commands]
    sections = [_section(name, summary, parser) for name, summary, parser in commands]
    return "\n".join([HEADER, "| command | |", "|---|---|", *rows, *sections])


def _subcommands(parser: argparse.ArgumentParser) -> list[tuple[str, str, argparse.ArgumentParser]]:
    """Name, summary and parser of each command, in the order of --help."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            found += [(name, summaries[name], each) for name, each in action.choices.items() if name in summaries]
    return found


def _section(name: str, summary: str, parser: argparse.ArgumentParser) -> str:
    """A command: what it does, how it is called, its options, and what its --help says below them."""
    description = " ".join((parser.description or summary).split())
    lines = [f"\n## titan-cpt {name}\n", _sentence(description), ""]
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    if shown:
        lines += ["| option | default | meaning |", "|---|---|---|"]
        lines += [f"| {_names(action)} | {_default(action)} | {_meaning(action, parser)} |" for action in shown]
    if parser.epilog:
        lines += ["", "```text", *parser.epilog.replace("%(prog)s", parser.prog).strip("\n").splitlines(), "```"]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    """A summary as a sentence."""
    return textwrap.fill(text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) else "."), 120)


def _names(action: argparse.Action) -> str:
    """`--option VALUE`, or the name of a positional argument."""
    value = _value(action)
    names = ", ".join(action.option_strings) or value
    return f"`{_cell(f'{names} {value}' if action.option_strings and value else names)}`"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    name = action.metavar or choices or action.dest.upper()
    many = {"*": "...", "+": "...", "?": ""}.get(str(action.nargs), "")
    return f"{' '.join(name) if isinstance(name, tuple) else name}{' ' + many if many else ''}"


def _default(action: argparse.Action) -> str:
    """The default that the help text states, else the parser's."""
    if stated := DEFAULT.search(action.help or ""):
        return _cell(stated[1])
    if action.required and action.option_strings:
        return "required"
    if action.default in (None, False, argparse.SUPPRESS, [], ()):
        return ""
    return f"`{_cell(str(action.default))}`"


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    values = vars(action) | {"prog": parser.prog}
    return _cell(" ".join((DEFAULT.sub("", action.help or "") % values).split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference())
