"""`titan-cpt prepare`: tokenize text into token files, and train tokenizers."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from titan_cpt.commands.arguments import (
    Subparsers,
    add_command,
    add_config_option,
    add_dry_run_option,
    fraction,
    optional_config_path,
    positive_int,
    refuse_unknown,
)
from titan_cpt.errors import ConfigError

_BYTES_NOTE = (
    "note: no --tokenizer was given: every byte becomes a token (bytes, 257 ids), several times as many as with a "
    "trained tokenizer; `--tokenizer bytes` states that this is meant"
)


def add_prepare(subparsers: Subparsers) -> None:
    """The options of `prepare`."""
    summary = "tokenize text into token files, or train a tokenizer"
    prepare = add_command(
        subparsers,
        "prepare",
        _run,
        summary,
        details="Prepares the datasets of a config that are missing, or the files of --input.",
        usage="FILE [options] [--table.key VALUE ...]\n"
        "       titan-cpt prepare --input TEXT [TEXT ...] --output PREFIX [options]",
        example="titan-cpt prepare mine.toml\n"
        "titan-cpt prepare --input 'text/*.jsonl' --output data/more --tokenizer bytes",
        takes_overrides=True,
    )
    add_config_option(prepare)
    prepare.add_argument(
        "--input",
        nargs="+",
        metavar="TEXT",
        help="text files, patterns such as 'text/*.jsonl', or hub:NAME[:CONFIG[:SPLIT]]",
    )
    prepare.add_argument("--output", metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx")
    prepare.add_argument(
        "--tokenizer", metavar="bytes|PATH", help="tokenizer to use (default: bytes, one token per byte)"
    )
    prepare.add_argument(
        "--text-field", default="text", metavar="NAME", help="the field that holds a document's text (default: text)"
    )
    prepare.add_argument(
        "--holdout",
        type=fraction,
        default=0.0,
        metavar="FRACTION",
        help="write this fraction of the documents to PREFIX-validation instead (default: 0)",
    )
    prepare.add_argument(
        "--workers",
        type=positive_int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of processes (default: one per core)",
    )
    add_dry_run_option(prepare, "what would be read and written")
    prepare.add_argument("--quiet", action="store_true", help="do not report progress on stderr")
    prepare.add_argument("--force", action="store_true", help="replace an output that was made with other options")
    prepare.add_argument(
        "--add-bos", action="store_true", help="begin each document with the begin-of-document token (BOS)"
    )
    prepare.add_argument(
        "--train-tokenizer",
        type=positive_int,
        metavar="ENTRIES",
        help="train a byte-level BPE of this vocabulary size on --input and write it to --output",
    )


def _run(options: argparse.Namespace) -> int:
    path = optional_config_path(options)
    if (path is None) == (options.input is None):
        raise ConfigError("command line: prepare takes either FILE, a config, or --input TEXT... --output PREFIX")
    if options.add_bos and (path is not None or options.train_tokenizer):
        raise ConfigError(
            "command line: --add-bos goes with --input TEXT... --output PREFIX; with a config write tokenizer.add_bos "
            "= true into the file, or give --tokenizer.add_bos true"
        )
    if options.train_tokenizer and options.tokenizer is not None:
        raise ConfigError(
            f"command line: --tokenizer {options.tokenizer} and --train-tokenizer exclude each other: first train a "
            "tokenizer with --train-tokenizer, then prepare the text with --tokenizer FILE"
        )
    if path is not None:
        return _prepare_datasets_of_config(path, options)
    refuse_unknown([f"--{key}" for key, _ in options.overrides])
    if options.output is None:
        raise ConfigError("command line: --output is missing: the prefix, or with --train-tokenizer the file, to write")
    if options.dry_run:
        from titan_cpt.data.prepare.text_inputs import inputs_text

        print(f"{inputs_text(options.input)} -> {options.output}")
        return 0
    return _train_tokenizer(options) if options.train_tokenizer else _prepare_files(options)


def _prepare_datasets_of_config(path: Path, options: argparse.Namespace) -> int:
    from titan_cpt.config.load import load_config
    from titan_cpt.data.prepare.prepare_missing import missing_data_text, prepare_missing_data

    config = load_config(path, options.overrides)
    if options.dry_run:
        for line in missing_data_text(config, force=options.force):
            print(line)
        return 0
    quiet = options.quiet
    if not prepare_missing_data(config, workers=options.workers, force=options.force, show_progress=not quiet):
        print(f"{path}: every dataset with a source is already prepared; nothing was changed")
    return 0


def _train_tokenizer(options: argparse.Namespace) -> int:
    from titan_cpt.data.prepare.prepare_missing import train_tokenizer

    if options.output.endswith(os.sep):
        raise ConfigError(f"command line: --output {options.output} is a folder: name the file, such as tokenizer.json")
    written = train_tokenizer(
        options.input, options.text_field, options.train_tokenizer, Path(options.output), force=options.force
    )
    unchanged = "" if written else "exists already, nothing was changed: "
    print(f"{options.output}: {unchanged}a byte-level BPE of {options.train_tokenizer:,} entries")
    return 0


def _prepare_files(options: argparse.Namespace) -> int:
    from titan_cpt.data.prepare.outputs import prefix_to_write
    from titan_cpt.data.prepare.prepare import prepare

    output = prefix_to_write(options.output)
    if options.tokenizer is None:
        print(_BYTES_NOTE, file=sys.stderr, flush=True)
    result = prepare(
        inputs=options.input,
        output=output,
        tokenizer=options.tokenizer or "bytes",
        text_field=options.text_field,
        holdout=options.holdout,
        workers=options.workers,
        force=options.force,
        add_bos=options.add_bos,
        show_progress=not options.quiet,
    )
    print(result.summary)
    return 0
