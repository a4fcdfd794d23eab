"""Checks of a config: its plan, data, tokenizer, text behind the tokens, checkpoints, memory and disk space."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.tokenizer_check import check_planned_tokenizers
from titan_cpt.common.run_folder import MANIFEST_FILE, checkpoint_folders
from titan_cpt.config.load import load_config
from titan_cpt.config.schema import Config
from titan_cpt.data.formats.token_files import TokenFiles, count_source, missing_entries, open_source, resolve_paths
from titan_cpt.data.inventory import take_inventory, training_files, validation_files
from titan_cpt.data.sequence_lengths import sequence_lengths
from titan_cpt.data.tokenizer.tokenizer import BYTES, Tokenizer, load_tokenizer
from titan_cpt.doctor.disk import check_folder, check_space
from titan_cpt.doctor.finding import Finding, note, ok, problem
from titan_cpt.doctor.machine import available_memory
from titan_cpt.doctor.request import Request
from titan_cpt.errors import TitanError
from titan_cpt.planning.memory import fits
from titan_cpt.planning.parallel import min_world_size
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.planner import make_plan

_WINDOWS = 2  # of each dataset
_SHOWN_CHARACTERS = 240
_UNREADABLE = 0.1  # share of characters that are not UTF-8


def config_of(request: Request) -> Config:
    """The config of a request that has one."""
    assert request.config is not None, "a check of a config"
    return load_config(request.config, request.overrides)


def check_plan(request: Request) -> Iterator[Finding]:
    """The plan: what it trains, and its notes."""
    try:
        plan = _plan(config_of(request), request)
    except TitanError as error:
        yield problem("plan", str(error), f"correct that; `titan-cpt plan {request.config}` says the same")
        return
    steps = sum(stage.steps for stage in plan.stages)
    sizes = {phase.size * stage.seq_len for stage in plan.stages for phase in stage.batch_sizes.within(stage.steps)}
    tokens = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))
    text = f"{len(plan.stages)} stages, {steps:,} steps of {tokens} tokens, fingerprint {plan.fingerprint}"
    yield ok("plan", text)
    for line in plan.notes:
        yield note("plan", line)


def _plan(config: Config, request: Request) -> Plan:
    return make_plan(config, take_inventory(config), request.world_size or min_world_size(config))


def check_data(request: Request) -> Iterator[Finding]:
    """Training and validation files: present, readable, not damaged."""
    config = config_of(request)
    for key, listed in (("train", training_files(config)), ("validation", validation_files(config))):
        for source, files in listed:
            yield _files(config, f"datasets.{source}.{key}", source, files)
    for name, dataset in config.datasets.items():
        if not (dataset.validation or any(domain.validation for domain in dataset.domains.values())):
            yield note("data", f"datasets.{name} has no validation data: its loss and forgetting are not measured",
                       f"set datasets.{name}.validation, or source.holdout")  # fmt: skip


def _files(config: Config, where: str, source: str, files: TokenFiles) -> Finding:
    try:
        missing = missing_entries(files)
        if not missing:
            trained = where.endswith(".train")
            lengths = sequence_lengths(config)[source.partition(".")[0]] if trained else [config.training.seq_len]
            for length in lengths:
                counts = count_source(files, length, resolve_paths(files))
            open_source(files, 2**31 - 1)
            return ok("data", f"{where}: {counts.tokens:,} tokens")
    except TitanError as error:
        return problem(
            "data", f"{where}: {error}", "restore the file, or prepare it again (`titan-cpt prepare --force`)"
        )
    if config.datasets[source.partition(".")[0]].source is not None:
        return note("data", f"{where}: {missing[0]} does not exist yet; it is prepared when training begins")
    return problem("data", f"{where}: {missing[0]} does not exist", "correct the path (it is relative to the working "
                   "directory), or make the file with `titan-cpt prepare`")  # fmt: skip


def _is_damaged(files: TokenFiles) -> bool:
    """Whether files cannot be read, whatever the tokenizer is; the check of the data says why."""
    try:
        if not missing_entries(files):
            open_source(files, 2**31 - 1)
    except TitanError:
        return True
    return False


def check_tokenizer(request: Request) -> Iterator[Finding]:
    """The tokenizer: present, readable, and that of the data."""
    config = config_of(request)
    path = config.tokenizer.path
    if path != BYTES and not Path(path).exists():
        if config.tokenizer.train is not None:
            yield note("tokenizer", f"{path} does not exist yet; it is trained when training begins")
        elif config.tokenizer.extend is not None and config.tokenizer.extend.add is not None:
            yield note("tokenizer", f"{path} does not exist yet; it is made when training begins, by adding "
                       f"{config.tokenizer.extend.add:,} tokens to {config.tokenizer.extend.base}")  # fmt: skip
        else:
            yield problem("tokenizer", f"{path} does not exist", "copy the tokenizer.json there that made the data, or "
                          "set tokenizer.path, tokenizer.train or tokenizer.extend")  # fmt: skip
        return
    try:
        tokenizer = load_tokenizer(path).with_bos(config.tokenizer.add_bos)
        if not any(_is_damaged(files) for _, files in [*training_files(config), *validation_files(config)]):
            take_inventory(config)  # raises if the data was made with another tokenizer
        for line in check_planned_tokenizers(config):
            yield note("tokenizer", line)
    except TitanError as error:
        yield problem("tokenizer", str(error), "use the tokenizer that made the data, or prepare the data again")
        return
    yield ok("tokenizer", f"{path}: {tokenizer.vocab_size:,} ids")


def check_text(request: Request) -> Iterator[Finding]:
    """A few random windows of each dataset as text, so that a reader sees whether the tokens are right."""
    config = config_of(request)
    tokenizer = load_tokenizer(config.tokenizer.path)
    for source, files in training_files(config):
        if not missing_entries(files) and not _is_damaged(files):
            try:
                length = next(iter(sequence_lengths(config)[source.partition(".")[0]]))
                yield from _windows(source, files, tokenizer, length)
            except TitanError as error:
                yield problem("text", f"{source}: {error}", "use the tokenizer that made the data, or prepare it again")


def _windows(source: str, files: TokenFiles, tokenizer: Tokenizer, seq_len: int) -> Iterator[Finding]:
    tokens = open_source(files, tokenizer.vocab_size)
    count = tokens.windows(seq_len)
    for number in sorted(random.sample(range(count), min(_WINDOWS, count))):
        text = tokenizer.decode([int(token) for token in tokens.window(number, seq_len)])
        unreadable = text.count("\N{REPLACEMENT CHARACTER}") / max(len(text), 1)
        shown = " ".join(text.split())[:_SHOWN_CHARACTERS]
        line = f"{source}, window {number} of {count:,}: {shown}"
        if unreadable > _UNREADABLE:
            yield problem("text", f"{line} ({unreadable:.0%} unreadable)", "the tokens were probably made with another "
                          "tokenizer, or the dtype of headerless files is wrong")  # fmt: skip
        else:
            yield ok("text", line)


def check_checkpoints(request: Request) -> Iterator[Finding]:
    """Checkpoints of the run, and whether they are those of this plan."""
    config = config_of(request)
    run = Path(config.job.output_dir) / config.job.name
    folders = checkpoint_folders(run)
    if not folders:
        yield ok("checkpoints", f"none in {run}: training begins at step 0")
        return
    newest = max(folders, key=lambda folder: (folder / MANIFEST_FILE).stat().st_mtime)
    try:
        record = manifest.read(newest)
    except TitanError as error:
        yield problem("checkpoints", f"{newest}: {error}", f"`titan-cpt verify {newest}` says what is wrong with it")
        return
    stages = [stage.name for stage in config.stages]
    if newest.parent.name not in stages:
        yield note("checkpoints", f"{newest} is of a stage that the config does not have", "another run needs "
                   "another job.name")  # fmt: skip
        return
    try:
        last = _plan(config, request).stages[-1]
        is_finished = (newest.parent.name, record["steps_done"]) == (last.name, last.steps)
    except TitanError:  # the check of the plan says it
        is_finished = False
    what = "the run is finished, at" if is_finished else "training resumes at"
    yield ok("checkpoints", f"{len(folders)}; {what} {newest} (plan {record['fingerprint']})")


def check_memory(request: Request) -> Iterator[Finding]:
    """The plan's estimate of memory against the devices."""
    config = config_of(request)
    plan = _plan(config, request)
    try:
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        total = min((torch.cuda.get_device_properties(index).total_memory for index in range(gpus)), default=0)
    except Exception:  # torch is broken, which its own check says
        total = 0
    device, remedy = (
        "each GPU",
        "`titan-cpt plan --suggest --device-memory 80GiB --world-size N` lists layouts that fit",
    )
    if not total:
        total, device = available_memory(), "the CPU's available memory"
    needed = plan.footprint.memory
    stages = " or that of the stage" if len({*plan.footprints.values()}) > 1 else ""
    text = f"about {needed / 2**30:.2f} GiB for a rank; {device}: {total / 2**30:.1f} GiB"
    if total and not fits(plan.footprint, total):
        yield problem(
            "memory",
            text,
            f"lower training.local_batch_size{stages}, use more GPUs, or recompute activations; {remedy}",
        )
    else:
        yield ok("memory", text)


def check_output(request: Request) -> Iterator[Finding]:
    """The folder for outputs and its free space."""
    if request.config is None:
        yield from check_folder(Path("outputs"))
        return
    try:
        config = config_of(request)
    except TitanError:  # the check of the plan says it
        yield from check_folder(Path("outputs"))
        return
    folder = Path(config.job.output_dir)
    yield from check_folder(folder)
    try:
        needed = _plan(config, request).disk_bytes(config.checkpoint.keep_latest_k)
    except TitanError:
        return
    yield from check_space(folder, needed)
