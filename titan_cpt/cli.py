"""The command line: subcommands, messages and exit statuses; no logic. Heavy modules are imported by what needs them.

Exit status: 0 done; 2 the user's mistake, or what the operating system refuses (a folder that cannot be written, a full
disk), one message and no traceback; 130 Ctrl-C, in a line; 75 stopped early on a signal with everything
saved, so that a queue may start the same command again; 1 anything else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from titan_cpt.commands.arguments import (
    learning_rate,
    none_left,
    overrides_in,
    positive,
    share,
    steps,
    temperature,
    tokens,
)
from titan_cpt.common.exit_status import leave, leave_interrupted, tell
from titan_cpt.errors import ConfigError, DataError, PlanError, TitanError, how_to_install, in_words

_TAKE_OVERRIDES = ("plan", "train", "sweep", "baselines", "prepare", "anneal")
_CHECKPOINTS = "a checkpoint's folder, or a run: the last checkpoint of each stage"
_OVERRIDES = "Any key is overridden by its dotted name: --training.seq_len 512 --stages.german.lr.max 1e-4"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one subcommand and leave with its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a latin-1 terminal shows "?" for what it lacks
    parser = make_parser()
    words = sys.argv[1:] if arguments is None else arguments
    options, rest = parser.parse_known_args(words)
    try:
        overrides = overrides_in(rest) if options.takes_overrides else none_left(rest)
        status = options.run(options, overrides)
    except TitanError as error:
        tell(f"{type(error).__name__}: {error}", silent=error.on_every_rank and os.environ.get("RANK", "0") != "0")
        status = error.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on, as with `| head`
        status = 1
    except OSError as error:
        tell(f"{type(error).__name__}: {in_words(error)}")
        status = 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "titan_cpt"):
            raise
        tell(f"{package} is not installed for {sys.executable}; {how_to_install(package)}")
        status = 2
    except KeyboardInterrupt as interrupt:
        leave_interrupted(str(interrupt))
    leave(status)


def make_parser() -> argparse.ArgumentParser:
    """All commands, their options, and the function that runs each."""
    parser = argparse.ArgumentParser(
        prog="titan-cpt",
        description="Continual pre-training: stages, re-warming, replay and infinite schedules from one TOML file.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = _command(commands, "plan", _plan, "what a config comes to: steps, tokens, LR, compute; needs no device")
    _add_config(plan)
    plan.add_argument("--device-memory", metavar="SIZE", help="whether a rank's share fits, such as 80GiB")
    plan.add_argument("--check-layout", action="store_true", help="build the sharded model without memory and count it")
    plan.add_argument("--suggest", action="store_true", help="layouts for the ranks and --device-memory")
    plan.add_argument("--world-size", type=positive, metavar="N", help="ranks to plan for (default: the fewest)")
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")
    plan.add_argument("--lr-at", type=steps, default=(), metavar="T,...", help="LR of the 1-based steps T (JSON)")
    plan.add_argument("--recipe", nargs=2, metavar=("STAGE", "STEP"), help="the 0-based global batch STEP (JSON)")

    train = _command(commands, "train", _train, "train what is not trained yet; run_train.sh calls this")
    _add_config(train)

    train.add_argument("--run-info", action="store_true", help="check the config, print the run's folder; no training")

    sweep = _command(commands, "sweep", _sweep, "train the arms of [sweep] files, what they share once")
    sweep.add_argument("files", nargs="+", type=Path, metavar="FILE", help="TOMLs; one without [sweep] is one arm")
    sweep.add_argument("--arm", type=int, metavar="N", help="only arm N, from 0 (default: SLURM_ARRAY_TASK_ID, or all)")
    sweep.add_argument("--plan", action="store_true", help="list the arms and what they come to; trains nothing")
    sweep.add_argument("--prepare-only", action="store_true", help="make the arms' folders and do not train yet")
    sweep.add_argument("--launch", metavar="COMMAND", help="what trains an arm, such as ./run_train.sh")
    sweep.epilog = "Any key of the files is overridden by its dotted name: --training.seq_len 512"

    baselines = _command(commands, "baselines", _baselines, "the runs to compare a config with, derived from it")
    _add_config(baselines)
    baselines.add_argument("--output", type=Path, metavar="FOLDER", help="for their TOMLs (default: below output_dir)")
    baselines.add_argument("--run", action="store_true", dest="train", help="train the config and all of these")
    baselines.add_argument("--launch", metavar="COMMAND", help="what trains a run, such as ./run_train.sh")

    prepare = _command(commands, "prepare", _prepare, "text to token files, and tokenizers from text")
    prepare.add_argument("--config", type=Path, metavar="FILE", help="prepare what this config's datasets still lack")
    prepare.add_argument("--input", nargs="+", metavar="FILE", help="text files, globs, or hub:NAME[:CONFIG[:SPLIT]]")
    prepare.add_argument("--output", metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    prepare.add_argument("--tokenizer", metavar="bytes|PATH", help="default: bytes, one token a byte")
    prepare.add_argument("--text-field", default="text", metavar="NAME", help="field of a document's text")
    prepare.add_argument("--holdout", type=float, default=0.0, metavar="SHARE", help="share for PREFIX-validation")
    prepare.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes")
    prepare.add_argument("--force", action="store_true", help="replace an output that prepare made in another way")
    prepare.add_argument("--add-bos", action="store_true", help="begin documents with the begin-of-document token")
    prepare.add_argument(
        "--train-tokenizer", type=positive, metavar="ENTRIES", help="train a BPE on --input and write it to --output"
    )

    importing = _command(commands, "import", _import, "a released model (Hugging Face) as a checkpoint to begin with")
    importing.add_argument("source", metavar="PATH-OR-HUB-NAME", help="a folder, OWNER/NAME or OWNER/NAME@REVISION")
    importing.add_argument("output", type=Path, metavar="OUT", help="the checkpoint to write")
    importing.add_argument(
        "--vocab-size", type=positive, metavar="ROWS", help="rows beyond are dropped, new ones the mean of the old"
    )

    export = _command(commands, "export", _export, "a checkpoint as a folder that transformers and vLLM load")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    export.add_argument("output", type=Path, metavar="OUT", help="the folder to write")
    export.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    export.add_argument("--tokenizer", metavar="bytes|PATH", help="default: the run's, or the release's")
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default 5GB)")
    export.add_argument(
        "--max-positions", type=positive, metavar="TOKENS", help="sequence length (default: as trained or released)"
    )

    anneal = _command(commands, "anneal", _anneal, "branch off a constant phase: a run that anneals")
    anneal.epilog = f"{_OVERRIDES}. --job.name NAME names the branch, so that one checkpoint can have several."
    anneal.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="such as outputs/RUN/STAGE/step-00080000")
    anneal.add_argument(
        "--tokens", type=tokens, required=True, metavar="N", help="length of the annealing, such as 10B"
    )
    anneal.add_argument("--min", type=learning_rate, metavar="LR", help="LR of its last step (default: the stage's)")
    anneal.add_argument("--prepare-only", action="store_true", help="make the run's folder and do not train yet")

    evaluating = _command(
        commands, "eval", _eval, "benchmarks on checkpoints, before and after (lm-evaluation-harness)"
    )
    evaluating.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=_CHECKPOINTS)
    evaluating.add_argument("--suite", metavar="NAME", help="paper_english, paper_german, minimal_pairs or offline")
    evaluating.add_argument(
        "--tasks", nargs="+", default=(), metavar="TASK[:SHOTS[:METRIC]]", help="tasks, instead of --suite or out of it"
    )
    evaluating.add_argument("--limit", type=positive, metavar="N", help="only N samples of each task, evenly spread")
    evaluating.add_argument("--tasks-dir", type=Path, metavar="DIR", help="more tasks, as YAML files of the harness")
    evaluating.add_argument("--again", action="store_true", help="repeat tasks that are done already")
    evaluating.add_argument("--json", action="store_true", help="one JSON object on stdout, progress on stderr")
    _add_opening(evaluating)

    generating = _command(commands, "generate", _generate, "continue prompts with a checkpoint")
    generating.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=_CHECKPOINTS)
    generating.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    generating.add_argument("--examples", action="store_true", help="nine built-in prompts; kept for the run's report")
    generating.add_argument("--tokens", type=positive, default=64, metavar="N", help="maximum new tokens (default 64)")
    generating.add_argument("--temperature", type=temperature, default=0.8, metavar="T", help="default 0.8; 0: greedy")
    generating.add_argument("--top-p", type=share, default=0.95, metavar="P", help="nucleus sampling (default 0.95)")
    generating.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default 0)")
    _add_opening(generating)

    report = _command(commands, "report", _report, "losses before and after, forgetting and adaptation of runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, such as outputs/quickstart")
    report.add_argument(
        "--html", nargs="?", type=Path, const=Path(), metavar="OUT", help="a page and PNGs into this folder"
    )

    verify = _command(commands, "verify", _verify, "check a checkpoint's manifest, sizes and checksums")
    verify.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, list[tuple[str, str]]], int], summary: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    command.set_defaults(run=run, takes_overrides=name in _TAKE_OVERRIDES)
    return command


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, required=True, metavar="FILE", help="the run's TOML file")
    command.epilog = _OVERRIDES


def _add_opening(command: argparse.ArgumentParser) -> None:
    command.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    command.add_argument("--tokenizer", metavar="bytes|PATH", help="default: the run's, or the release's")
    command.add_argument(
        "--max-length", type=positive, metavar="TOKENS", help="maximum input length (default: that of the training)"
    )
    command.add_argument(
        "--batch-tokens", type=positive, default=8192, metavar="N", help="tokens per forward pass (default 8192)"
    )
    command.add_argument("--shard-weights", action="store_true", help="under torchrun: spread the weights over ranks")


def _plan(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from dataclasses import replace

    from titan_cpt.checkpoint.tokenizer_check import check_planned_tokenizers
    from titan_cpt.common.numbers import parse_bytes
    from titan_cpt.config.load import load_config
    from titan_cpt.data.inventory import take_inventory
    from titan_cpt.planning.parallel import min_world_size
    from titan_cpt.planning.planner import make_plan

    config = load_config(options.config, overrides)
    device_bytes = parse_bytes(options.device_memory, option="--device-memory") if options.device_memory else None
    world_size = options.world_size or min_world_size(config)
    if options.suggest:
        return _suggest(config, options, world_size, device_bytes)
    inventory = take_inventory(config)
    plan = make_plan(
        config, replace(inventory, notes=(*inventory.notes, *check_planned_tokenizers(config))), world_size
    )
    if options.json or options.lr_at or options.recipe:
        from titan_cpt.planning.plan_json import batch_as_json, lr_as_json, plan_as_json

        answer = plan_as_json(plan, device_bytes)
        if options.lr_at:
            answer["lr_at"] = lr_as_json(plan, options.lr_at)
        if options.recipe:
            answer["recipe"] = batch_as_json(plan, *options.recipe)
        print(json.dumps(answer))
    else:
        from titan_cpt.common.console import make_console
        from titan_cpt.planning.plan_text import print_plan

        print_plan(plan, make_console(), config.checkpoint.keep_latest_k, device_bytes)
    if options.check_layout:
        from titan_cpt.training.build import parallel_options
        from titan_cpt.training.dry_run import check_layout  # torch, which the plan itself does without

        for line in check_layout(plan, parallel_options(config)):
            print(line, file=sys.stderr if options.json else sys.stdout)
    return 0


def _suggest(config: Any, options: argparse.Namespace, world_size: int, device_bytes: int | None) -> int:
    from titan_cpt.data.inventory import take_inventory
    from titan_cpt.planning.suggest import assumed, device_of, suggestions

    if device_bytes is None:
        raise PlanError("--suggest: for which device? Give its memory with --device-memory, such as 80GiB")
    found = suggestions(config, take_inventory(config), world_size, device_bytes)
    if options.json:
        lines = [{"overrides": s.overrides, "step_s": s.step_s, "reason": s.reason} for s in found]
        print(json.dumps({"assumed": assumed(device_of(device_bytes)), "suggestions": lines}))
        return 0
    print(f"{len(found)} layouts of {world_size} ranks fit, by an estimate of a step's time")
    print(assumed(device_of(device_bytes)))
    for place, suggestion in enumerate(found[:5], 1):
        words = " ".join(f"--{key} {value}" for key, value in suggestion.overrides.items())
        print(
            f"{place}. {suggestion.plan.parallel_dims.describe()}: {suggestion.step_s:.2f} s a step\n"
            f"   {suggestion.reason}"
        )
        print(f"   {words}")
    return 0


def _train(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from titan_cpt.config.load import load_run

    config = load_run(options.config, overrides)  # before torch: a mistake is told in a blink
    if options.run_info:
        print(f"run_folder={Path(config.job.output_dir) / config.job.name}")
        print(f"init_timeout_seconds={config.comm.init_timeout_seconds}")
        return 0
    from titan_cpt.train import run

    return run(config)


def _sweep(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    if options.plan:
        from titan_cpt.common.console import make_console
        from titan_cpt.runs.sweep import print_sweep_plan

        print_sweep_plan(options.files, overrides, make_console())
        return 0
    arm = options.arm
    if arm is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        arm = int(os.environ["SLURM_ARRAY_TASK_ID"])
    return _train_sweep_runs(options.files, overrides, options.launch, only=arm, train=not options.prepare_only)


def _train_sweep_runs(files: Sequence[Path], overrides: list[tuple[str, str]], launch: str | None, **how: Any) -> int:
    from titan_cpt.common.console import make_console
    from titan_cpt.runs.sweep import TRAIN, exit_status, print_outcomes, train_sweep_runs

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise PlanError("a sweep under torchrun: start it without; --launch ./run_train.sh starts each run's processes")
    outcomes = train_sweep_runs(files, overrides, launch=shlex.split(launch) if launch else TRAIN, **how)
    print_outcomes(outcomes, make_console())
    return exit_status(outcomes)


def _baselines(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from titan_cpt.config.load import load_run
    from titan_cpt.data.inventory import take_inventory
    from titan_cpt.planning.parallel import min_world_size
    from titan_cpt.planning.planner import make_plan
    from titan_cpt.runs.baselines import write_baselines

    config = load_run(options.config, overrides)
    plan = make_plan(config, take_inventory(config), min_world_size(config))
    paths = write_baselines(config, plan, options.output)
    if options.train:
        return _train_sweep_runs(paths, [], options.launch)
    print(f"titan-cpt sweep {paths[0].parent}/*.toml   # trains the run itself and them, what they share once")
    return 0


def _anneal(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from titan_cpt.common.run_folder import CONFIG_FILE
    from titan_cpt.runs.anneal import branch_off

    rank = int(os.environ.get("RANK", "0"))
    asked = {"tokens": options.tokens, "min_lr": options.min, "overrides": overrides}
    config, is_new = branch_off(options.checkpoint, **asked, rank=rank)
    folder = Path(config.job.output_dir) / config.job.name
    if rank == 0:
        what = "branched off" if is_new else "there already"
        print(f"{folder}: {what}; ./run_train.sh --config {folder / CONFIG_FILE} trains it")
    if options.prepare_only:
        return 0
    from titan_cpt.train import run

    return run(config)


def _prepare(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    if (options.config is None) == (options.input is None):
        raise ConfigError("command line: prepare takes either --config FILE or --input FILE... --output PREFIX")
    if options.add_bos and (options.config is not None or options.train_tokenizer):
        raise ConfigError(
            "command line: --add-bos goes with --input FILE... --output PREFIX; with --config write tokenizer.add_bos "
            "= true into the file, or give --tokenizer.add_bos true"
        )
    if options.config is not None:
        from titan_cpt.config.load import load_config
        from titan_cpt.data.prepare.prepare_missing import prepare_missing_data

        if not prepare_missing_data(
            load_config(options.config, overrides), workers=options.workers, force=options.force
        ):
            print(f"{options.config}: every dataset with a source is prepared already, nothing was changed")
        return 0
    none_left([f"--{key}" for key, _ in overrides])
    if options.output is None:
        raise ConfigError("command line: --output is missing: the prefix, or with --train-tokenizer the file, to write")
    if options.train_tokenizer and options.output.endswith(os.sep):
        raise ConfigError(f"command line: --output {options.output} is a folder: name the file, such as tokenizer.json")
    if options.train_tokenizer:
        from titan_cpt.data.prepare.prepare_missing import train_tokenizer

        asked = options.input, options.text_field, options.train_tokenizer
        written = train_tokenizer(*asked, Path(options.output), force=options.force)
        done = "" if written else "already there, nothing was changed: "
        print(f"{options.output}: {done}a byte-level BPE of {options.train_tokenizer:,} entries")
        return 0
    from titan_cpt.data.prepare.outputs import prefix_to_write
    from titan_cpt.data.prepare.prepare import prepare

    output = prefix_to_write(options.output)
    if options.tokenizer is None:
        print(
            "note: no --tokenizer was given: every byte becomes a token (bytes, 257 ids), several times as many as "
            "with a trained tokenizer; `--tokenizer bytes` states that this is meant",
            file=sys.stderr,
            flush=True,
        )
    result = prepare(
        inputs=options.input,
        output=output,
        tokenizer=options.tokenizer or "bytes",
        text_field=options.text_field,
        holdout=options.holdout,
        workers=options.workers,
        force=options.force,
        add_bos=options.add_bos,
    )
    print(result.summary)
    return 0


def _import(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from titan_cpt.checkpoint.hf_import import import_released

    import_released(options.source, options.output, vocab_size=options.vocab_size, log=print)
    return 0


def _export(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from titan_cpt.checkpoint.hf_export import export
    from titan_cpt.common.numbers import parse_bytes

    export(
        options.checkpoint,
        options.output,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        max_shard_bytes=parse_bytes(options.max_shard_size, option="--max-shard-size"),
        max_positions=options.max_positions,
        log=print,
    )
    return 0


def _eval(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from titan_cpt.config.suites import chosen_tasks, require_folder

    tasks = chosen_tasks(options.suite, options.tasks)  # before torch: mistakes are reported at once
    require_folder(tasks, options.tasks_dir)
    from titan_cpt.distributed.process_group import destroy_process_group, init_process_group
    from titan_cpt.evaluation.evaluate import EvalRequest, evaluate_all

    whole_suite = options.suite if not options.tasks else None
    asked = EvalRequest(
        tasks,
        suite=whole_suite,
        folder=options.tasks_dir,
        limit=options.limit,
        again=options.again,
        **_opening(options),
    )
    tell = partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    ranks = init_process_group()
    try:
        columns, lacking = evaluate_all(options.checkpoints, ranks, asked, log=tell)
    finally:
        destroy_process_group()
    if ranks.rank == 0:
        from titan_cpt.common.console import make_console
        from titan_cpt.evaluation.score_table import print_scores, scores_as_json

        if options.json:
            print(json.dumps(scores_as_json(columns)))
        else:
            print_scores(columns, make_console())
    if lacking:
        raise DataError(f"no score for {', '.join(lacking)}, see above; all others are kept, and not asked again")
    return 0


def _generate(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    if not options.prompt and not options.examples:
        raise ConfigError("command line: give --prompt TEXT, once or several times, or --examples")
    from titan_cpt.distributed.process_group import destroy_process_group, init_process_group
    from titan_cpt.evaluation.generate import Sampling
    from titan_cpt.evaluation.prompts import continue_prompts

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    ranks = init_process_group()
    try:
        continue_prompts(
            options.checkpoints,
            ranks,
            options.prompt,
            sampling=sampling,
            tokens=options.tokens,
            examples=options.examples,
            open_options=_opening(options),
            log=print,
        )
    finally:
        destroy_process_group()
    return 0


def _opening(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "precision": options.precision,
        "tokenizer": options.tokenizer,
        "max_length": options.max_length,
        "sharded": options.shard_weights,
        "batch_tokens": options.batch_tokens,
    }


def _report(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from titan_cpt.common.console import make_console
    from titan_cpt.reporting.comparison import print_runs
    from titan_cpt.reporting.summary import read_runs

    unread: list[str] = []
    records = read_runs(options.runs, unread.append)
    print_runs(records, make_console())
    if options.html is not None and records:
        from titan_cpt.reporting.html_page import default_folder, write_page

        out = default_folder([record.folder for record in records]) if options.html == Path() else options.html
        print(f"the page: {write_page(records, out)}")
    if unread:
        raise DataError("\n  ".join(unread))
    return 0


def _verify(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from titan_cpt.checkpoint.manifest import verify

    manifest = verify(options.checkpoint)
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(f"{options.checkpoint}: good, {len(manifest['files'])} files, {size:,} bytes, plan {manifest['fingerprint']}")
    return 0
