"""`titan-cpt tokenizer extend|inspect`: add tokens to a tokenizer, and see what it is and how it splits a text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_cpt.commands.arguments import Subparsers, add_command, positive_int, refuse_unknown
from titan_cpt.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_EXTEND, _INSPECT = "extend", "inspect"
_SHOWN_TOKENS = 12
_OF_EXTEND = ("base", "input", "add", "output")


def add_tokenizer(subparsers: Subparsers) -> None:
    """The options of `tokenizer`."""
    command = add_command(
        subparsers,
        "tokenizer",
        _run,
        "extend a tokenizer by continuing its merges, or inspect one",
        details="extend continues the merges of a BPE on new text; the ids of the base keep their meaning, so that its "
        "weights and token files still fit. inspect prints what a tokenizer is. Both print its fertility: tokens per "
        "word (a part between white space) and bytes per token.",
        usage="extend CONFIG [options] [--table.key VALUE ...]\n"
        "       titan-cpt tokenizer extend --base FILE --input TEXT --add N --output FILE\n"
        "       titan-cpt tokenizer inspect FILE [options]",
        example="titan-cpt tokenizer extend mine.toml\n"
        "titan-cpt tokenizer inspect new.json --base old.json --input german.jsonl",
        takes_overrides=True,
    )
    command.add_argument("action", choices=(_EXTEND, _INSPECT), metavar="extend|inspect", help="what to do")
    command.add_argument(
        "file", nargs="?", metavar="FILE", help="extend: a config with [tokenizer.extend]; inspect: a tokenizer.json"
    )
    command.add_argument("--base", metavar="FILE", help="the tokenizer.json that is extended")
    command.add_argument(
        "--input",
        nargs="+",
        metavar="TEXT",
        help="text to learn merges from, or with inspect to split: files, patterns such as 'text/*.jsonl', or "
        "hub:NAME[:CONFIG[:SPLIT]]",
    )
    command.add_argument("--add", type=positive_int, metavar="N", help="extend: number of tokens to add")
    command.add_argument("--output", type=Path, metavar="FILE", help="extend: the tokenizer.json to write")
    command.add_argument(
        "--compare",
        nargs="+",
        metavar="TEXT",
        default=[],
        help="extend: other text whose fertility is printed too, such as the old language or validation text",
    )
    command.add_argument(
        "--text-field", default="text", metavar="NAME", help="the field that holds a document's text (default: text)"
    )
    command.add_argument(
        "--max-bytes",
        type=positive_int,
        default=1 << 28,
        metavar="N",
        help="of more text than this, an even sample is read (default: 268435456)",
    )
    command.add_argument("--force", action="store_true", help="extend: replace another tokenizer")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _run(options: argparse.Namespace) -> int:
    found = _inspect(options) if options.action == _INSPECT else _extend(options)
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("\n".join(_lines(found)))
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from titan_cpt.data.tokenizer.description import tokenizer_parts

    refuse_unknown([f"--{key}" for key, _ in options.overrides])
    if options.file is None:
        raise ConfigError("command line: FILE is missing: the tokenizer.json to inspect")
    for name in ("add", "output", "compare", "force"):
        if getattr(options, name):
            raise ConfigError(f"command line: --{name} is for `titan-cpt tokenizer extend`: remove it")
    texts = {"input": options.input} if options.input else {}
    return {
        **tokenizer_parts(options.file, options.base),
        "fertility": _fertilities(options, {"input": options.text_field}, texts, options.file, options.base),
    }


def _extend(options: argparse.Namespace) -> dict[str, Any]:
    given = [f"--{name}" for name in _OF_EXTEND if getattr(options, name) is not None]
    if options.file is not None and given:
        raise ConfigError(f"command line: give either a config or {', '.join(f'--{name}' for name in _OF_EXTEND)}")
    if options.file is not None:
        return _extend_of_config(options)
    refuse_unknown([f"--{key}" for key, _ in options.overrides])
    for name in _OF_EXTEND:
        if getattr(options, name) is None:
            raise ConfigError(
                f"command line: --{name} is missing; extend takes a config with [tokenizer.extend], or --base FILE "
                "--input TEXT... --add N --output FILE"
            )
    texts = {"input": options.input, **_compared(options)}
    return _extended(
        options, options.base, options.add, options.output, texts, dict.fromkeys(texts, options.text_field)
    )


def _compared(options: argparse.Namespace) -> dict[str, list[str]]:
    """The texts of --compare by what is printed of them: each on its own, as a mean over two languages says nothing."""
    return {f"compare {text}": [text] for text in options.compare}


def _extend_of_config(options: argparse.Namespace) -> dict[str, Any]:
    from titan_cpt.config.load import load_config
    from titan_cpt.data.prepare.prepare_missing import fetch_missing_text
    from titan_cpt.data.prepare.text_inputs import missing_inputs

    path = Path(options.file)
    config = load_config(path, options.overrides)
    extend = config.tokenizer.extend
    if extend is None or extend.dataset is None or extend.add is None:
        raise ConfigError(
            f"{path}: names no tokenizer to make: write extend = {{ base = ..., dataset = ..., add = ... }} into "
            "[tokenizer]"
        )
    fetch_missing_text(config, extend.dataset, _log)
    sources = {
        name: dataset.source
        for name, dataset in config.datasets.items()
        if dataset.source is not None and (name == extend.dataset or not missing_inputs(dataset.source.text))
    }
    texts = {name: list(sources[name].text) for name in sorted(sources, key=lambda name: name != extend.dataset)}
    fields = {name: source.text_field for name, source in sources.items()}
    texts |= _compared(options)
    fields |= dict.fromkeys(_compared(options), options.text_field)
    return _extended(options, extend.base, extend.add, Path(config.tokenizer.path), texts, fields)


def _extended(
    options: argparse.Namespace,
    base: str,
    add: int,
    output: Path,
    texts: Mapping[str, Sequence[str]],
    fields: Mapping[str, str],
) -> dict[str, Any]:
    """Make the tokenizer from the first of the texts; returns what there is to print."""
    from titan_cpt.data.prepare.extend_tokenizer import extend_on_files
    from titan_cpt.data.tokenizer.description import tokenizer_parts

    source = next(iter(texts))
    extend_on_files(
        base,
        texts[source],
        add,
        output,
        text_field=fields[source],
        max_bytes=options.max_bytes,
        force=options.force,
        log=_log,
    )
    return {**tokenizer_parts(str(output), base), "fertility": _fertilities(options, fields, texts, str(output), base)}


def _fertilities(
    options: argparse.Namespace,
    fields: Mapping[str, str],
    texts: Mapping[str, Sequence[str]],
    path: str,
    base: str | None,
) -> list[dict[str, Any]]:
    """Fertility of the tokenizer on each text, and that of its base."""
    from titan_cpt.data.prepare.extend_tokenizer import sampled_texts
    from titan_cpt.data.tokenizer.fertility import fertility
    from titan_cpt.data.tokenizer.tokenizer import load_tokenizer, vocab_size_of

    found = []
    for name, inputs in texts.items():
        for each in (base, path) if base is not None else (path,):
            first_new = vocab_size_of(base) if base is not None and each == path else None
            documents = sampled_texts(inputs, fields[name], options.max_bytes, lambda line: None)
            counted = fertility(load_tokenizer(each), documents, first_new=first_new)
            found.append({"text": name, "tokenizer": each, **counted.as_json()})
    return found


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    size, fingerprint = found["vocab_size"], found["fingerprint"]
    yield f"{found['tokenizer']}: {found['model']}, {size:,} ids, fingerprint {fingerprint[:12]}"
    yield f"  pre-tokenizer: {found['pre_tokenizer']}; normalizer: {found['normalizer']}"
    yield f"  end of document: {found['end_of_document']}; begin of document: {found['begin_of_document'] or 'none'}"
    extension = found.get("extends")
    if extension is not None:
        tokens = extension["new_tokens"]
        yield f"  extends {extension['base']}: ids {extension['base_vocab_size']:,} to {size - 1:,} are new"
        yield f"  first new tokens: {_quoted(tokens[:_SHOWN_TOKENS])}"
        yield f"  longest new tokens: {_quoted(sorted(tokens, key=len, reverse=True)[:_SHOWN_TOKENS])}"
        yield from (f"  note: {note}" for note in extension["notes"])
    for each in found["fertility"]:
        used = (
            f"; {each['distinct_new']:,} new tokens used"
            if each["tokenizer"] == found["tokenizer"] and extension
            else ""
        )
        ratios = f"{_ratio(each['tokens_per_word'])} tokens/word, {_ratio(each['bytes_per_token'])} bytes/token"
        yield f"  {each['text']}: {ratios} with {each['tokenizer']}{used}"


def _ratio(value: float | None) -> str:
    """A ratio with three decimals; "-" if the text has no words or no tokens to divide by."""
    return "-" if value is None else f"{value:.3f}"


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(json.dumps(token, ensure_ascii=False) for token in tokens)
