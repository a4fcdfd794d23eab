"""From a config to the files that it names: fetch text, train the tokenizer, prepare tokens; only what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from titan_cpt.common.files import same_file
from titan_cpt.common.reading import is_there
from titan_cpt.config.datasets import DatasetConfig, TextSourceConfig
from titan_cpt.config.schema import Config
from titan_cpt.data.formats.indexed import missing_prefixes
from titan_cpt.data.prepare.chunks import iterate_texts
from titan_cpt.data.prepare.outputs import prefix_to_write
from titan_cpt.data.prepare.prepare import prepare
from titan_cpt.data.prepare.text_inputs import find_inputs, missing_inputs
from titan_cpt.data.tokenizer.train_bpe import train_bpe
from titan_cpt.errors import DataError

if TYPE_CHECKING:
    from titan_cpt.common.signals import StopRequest


def prepare_missing_data(
    config: Config, *, workers: int = os.cpu_count() or 1, force: bool = False, say: Callable[[str], None] = print
) -> bool:
    """Make the tokens of every dataset that has a `source` and whose tokens are missing; returns whether any were.

    Args:
        workers: processes that tokenise.
        force: prepare again what was prepared in another way.
        say: is told what is done, a line each.

    Raises:
        DataError: text cannot be had or read; names what and what to do.
    """
    lacking = {name: dataset for name, dataset in config.datasets.items() if dataset.source and _lacks(dataset, force)}
    for name, dataset in lacking.items():
        assert dataset.source is not None, "only datasets with a source were picked"
        _fetch(name, dataset.source, say)
    _train_tokenizer(config, say)
    for name, dataset in lacking.items():
        assert dataset.source is not None, "only datasets with a source were picked"
        assert dataset.train is not None, "the config has checked that a source goes with one train prefix"
        output = prefix_to_write(dataset.train[0])
        say(f"dataset {name}: preparing {output}")
        result = prepare(
            inputs=dataset.source.text,
            output=output,
            tokenizer=config.tokenizer.path,
            text_field=dataset.source.text_field,
            holdout=dataset.source.holdout,
            workers=workers,
            force=force,
            add_bos=config.tokenizer.add_bos,
        )
        say(f"dataset {name}: {result.summary}")
    return bool(lacking)


def prepare_missing_data_unless_stopped(config: Config, stop: StopRequest, *, rank: int) -> None:
    """Like `prepare_missing_data`, on rank 0 of a run: a signal stops it at once, and the next run resumes it."""
    if rank != 0:
        return
    told = ""
    try:
        with stop.interrupting():
            prepare_missing_data(config)
    except KeyboardInterrupt as interrupt:
        told = f"{interrupt}; " if str(interrupt) else ""
    if stop.name:
        print(f"stopped by {stop.name} before training: {told}the same command resumes", flush=True)


def train_tokenizer(inputs: Sequence[str], text_field: str, vocab_size: int, output: Path, *, force: bool) -> bool:
    """Train a BPE on text files and write it; see `train_bpe`.

    Raises:
        DataError: as `find_inputs` and `train_bpe`, or the output is one of the inputs.
    """
    place = same_file(output, (Path(source.spec) for source in find_inputs(inputs) if not source.is_hub))
    if place is not None:
        raise DataError(f"{place}: is an input, and the tokenizer would replace it: choose another output")
    return train_bpe(iterate_texts(inputs, text_field), vocab_size, output, force=force)


def is_complete(config: Config) -> bool:
    """Whether every dataset's tokens and the tokenizer exist, so that `prepare_missing_data` has nothing to do."""
    tokens = all(not _lacks(dataset, force=False) for dataset in config.datasets.values())
    return tokens and (config.tokenizer.train is None or is_there(Path(config.tokenizer.path)))


def _lacks(dataset: DatasetConfig, force: bool) -> bool:
    return force or bool(missing_prefixes(dataset.train or ())) or bool(missing_prefixes(dataset.validation or ()))


def _fetch(name: str, source: TextSourceConfig, say: Callable[[str], None]) -> None:
    if source.fetch is None or not missing_inputs(source.text):
        return
    command = [sys.executable, source.fetch]
    say(f"dataset {name}: its text is not there; running {' '.join(command)}")
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise DataError(f"datasets.{name}.source.fetch: {source.fetch} cannot be run: {error.strerror}") from None
    if status:
        raise DataError(
            f"datasets.{name}.source.fetch: {source.fetch} ended with status {status}; its message is above. "
            f"Put the text at {', '.join(source.text)} by hand, or try again"
        )


def _train_tokenizer(config: Config, say: Callable[[str], None]) -> None:
    train, path = config.tokenizer.train, Path(config.tokenizer.path)
    if train is None or is_there(path):
        return
    source = config.datasets[train.dataset].source
    assert source is not None, "the config has checked that a tokenizer's dataset has a source"
    _fetch(train.dataset, source, say)
    say(f"tokenizer: training a BPE of {train.vocab_size:,} entries on the text of {train.dataset}, into {path}")
    train_tokenizer(source.text, source.text_field, train.vocab_size, path, force=False)
