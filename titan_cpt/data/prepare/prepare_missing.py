"""Make the data files that a config names and that do not exist yet: fetch text, train the tokenizer, tokenize."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from titan_cpt.common.files import same_file
from titan_cpt.common.reading import is_there
from titan_cpt.config.datasets import DatasetConfig, TextSourceConfig
from titan_cpt.config.schema import Config
from titan_cpt.data.formats.indexed import missing_prefixes
from titan_cpt.data.prepare.chunks import iterate_texts
from titan_cpt.data.prepare.extend_tokenizer import extend_on_files
from titan_cpt.data.prepare.outputs import prefix_to_write
from titan_cpt.data.prepare.prepare import prepare
from titan_cpt.data.prepare.text_inputs import find_inputs, inputs_text, missing_inputs
from titan_cpt.data.tokenizer.train_bpe import train_bpe
from titan_cpt.errors import DataError

if TYPE_CHECKING:
    from titan_cpt.common.signals import StopRequest


def prepare_missing_data(
    config: Config,
    *,
    workers: int = os.cpu_count() or 1,
    force: bool = False,
    log: Callable[[str], None] = print,
    show_progress: bool = True,
) -> bool:
    """Tokenize every dataset that has a `source` and whose token files are missing; returns whether there were any.

    Args:
        config: the run's config.
        workers: number of tokenizing processes.
        force: prepare all of them again, replacing files that were made with other options.
        log: called with each line of progress.
        show_progress: report the progress of tokenizing on stderr.

    Raises:
        DataError: a text cannot be fetched or read.
    """
    to_prepare = {
        name: dataset for name, dataset in config.datasets.items() if dataset.source and _is_missing(dataset, force)
    }
    for name, dataset in to_prepare.items():
        assert dataset.source is not None, "only datasets with a source were picked"
        _fetch(name, dataset.source, log)
    _make_tokenizer(config, log)
    for name, dataset in to_prepare.items():
        assert dataset.source is not None, "only datasets with a source were picked"
        assert dataset.train is not None, "the config has checked that a source goes with one train prefix"
        output = prefix_to_write(dataset.train[0])
        log(f"dataset {name}: tokenizing into {output}")
        result = prepare(
            inputs=dataset.source.text,
            output=output,
            tokenizer=config.tokenizer.path,
            text_field=dataset.source.text_field,
            holdout=dataset.source.holdout,
            workers=workers,
            force=force,
            add_bos=config.tokenizer.add_bos,
            show_progress=show_progress,
        )
        log(f"dataset {name}: {result.summary}")
    return bool(to_prepare)


def missing_data_text(config: Config, *, force: bool) -> Iterator[str]:
    """A line for each dataset with a `source`, and for a tokenizer to train: what `prepare_missing_data` would do.

    Raises:
        DataError: a text does not exist and there is no `fetch` script for it.
    """
    train, extend = config.tokenizer.train, config.tokenizer.extend
    if train is not None and not is_there(Path(config.tokenizer.path)):
        yield f"tokenizer: would be trained on the text of {train.dataset} -> {config.tokenizer.path}"
    if extend is not None and extend.dataset is not None and not is_there(Path(config.tokenizer.path)):
        yield f"tokenizer: {extend.base} would be extended on the text of {extend.dataset} -> {config.tokenizer.path}"
    for name, dataset in config.datasets.items():
        if dataset.source is None or dataset.train is None:
            continue
        if not _is_missing(dataset, force):
            yield f"dataset {name}: prepared already: {dataset.train[0]}"
        elif dataset.source.fetch is not None and missing_inputs(dataset.source.text):
            yield f"dataset {name}: its text is missing; {dataset.source.fetch} would fetch it -> {dataset.train[0]}"
        else:
            yield f"dataset {name}: {inputs_text(dataset.source.text)} -> {dataset.train[0]}"


def prepare_missing_data_unless_stopped(
    config: Config, stop: StopRequest, *, log: Callable[[str], None], quiet: bool
) -> None:
    """Call `prepare_missing_data`, on rank 0 of a run. A signal stops it at once, and the next run resumes it."""
    progress = ""
    try:
        with stop.interrupting():
            prepare_missing_data(config, log=log, show_progress=not quiet)
    except KeyboardInterrupt as interrupt:
        progress = f"{interrupt}; " if str(interrupt) else ""
    if stop.name:
        print(f"stopped by {stop.name} before training: {progress}the same command resumes", flush=True)


def train_tokenizer(inputs: Sequence[str], text_field: str, vocab_size: int, output: Path, *, force: bool) -> bool:
    """Train a BPE on text files and write it; see `train_bpe`.

    Raises:
        DataError: see `find_inputs` and `train_bpe`; or the output is one of the inputs.
    """
    overwritten = same_file(output, (Path(source.spec) for source in find_inputs(inputs) if not source.is_hub))
    if overwritten is not None:
        raise DataError(f"{overwritten}: is an input that the tokenizer would overwrite: choose another output")
    return train_bpe(iterate_texts(inputs, text_field), vocab_size, output, force=force)


def is_complete(config: Config) -> bool:
    """Whether the tokens of every dataset and the tokenizer exist, so `prepare_missing_data` has nothing to do."""
    tokens = all(not _is_missing(dataset, force=False) for dataset in config.datasets.values())
    makes_tokenizer = config.tokenizer.train is not None or config.tokenizer.extend is not None
    return tokens and (not makes_tokenizer or is_there(Path(config.tokenizer.path)))


def _is_missing(dataset: DatasetConfig, force: bool) -> bool:
    return force or bool(missing_prefixes(dataset.train or ())) or bool(missing_prefixes(dataset.validation or ()))


def _fetch(name: str, source: TextSourceConfig, log: Callable[[str], None]) -> None:
    if source.fetch is None or not missing_inputs(source.text):
        return
    command = [sys.executable, source.fetch]
    log(f"dataset {name}: its text is missing; running {' '.join(command)}")
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise DataError(f"datasets.{name}.source.fetch: {source.fetch} cannot be run: {error.strerror}") from None
    if status:
        raise DataError(
            f"datasets.{name}.source.fetch: {source.fetch} failed with status {status}; its message is above. "
            f"Run the command again, or put the text at {', '.join(source.text)} by hand"
        )


def fetch_missing_text(config: Config, name: str, log: Callable[[str], None]) -> None:
    """Run the script that fetches the text of a dataset, if the text is missing and there is one.

    Raises:
        DataError: the script fails.
    """
    source = config.datasets[name].source
    assert source is not None, "the config has checked that a tokenizer's dataset has a source"
    _fetch(name, source, log)


def _make_tokenizer(config: Config, log: Callable[[str], None]) -> None:
    """Train or extend the tokenizer, if its file is missing."""
    train, extend, path = config.tokenizer.train, config.tokenizer.extend, Path(config.tokenizer.path)
    name = train.dataset if train is not None else extend.dataset if extend is not None else None
    if name is None or is_there(path):
        return
    fetch_missing_text(config, name, log)
    source = config.datasets[name].source
    assert source is not None, "the config has checked that a tokenizer's dataset has a source"
    if train is not None:
        log(f"tokenizer: training a BPE of {train.vocab_size:,} entries on the text of {name}, into {path}")
        train_tokenizer(source.text, source.text_field, train.vocab_size, path, force=False)
    elif extend is not None and extend.add is not None:
        log(f"tokenizer: extending {extend.base} by {extend.add:,} tokens on the text of {name}, into {path}")
        extend_on_files(extend.base, source.text, extend.add, path, text_field=source.text_field, log=log)
