"""`titan-cpt plan`: print what a config will train, before any device is used."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from titan_cpt.commands.arguments import (
    Subparsers,
    add_command,
    add_config_option,
    config_path,
    positive_int,
    step_list,
    token_count,
)
from titan_cpt.errors import PlanError

if TYPE_CHECKING:
    from titan_cpt.config.schema import Config
    from titan_cpt.planning.plan import Plan
    from titan_cpt.runs.update_costs import DeviceRate


def add_plan(subparsers: Subparsers) -> None:
    """The options of `plan`."""
    summary = "print what a config will train"
    plan = add_command(
        subparsers,
        "plan",
        _run,
        summary,
        details="Prints steps, tokens, epochs, learning rates, memory and compute. Needs no device and trains nothing.",
        usage="FILE [options] [--table.key VALUE ...]",
        example="titan-cpt plan mine.toml\ntitan-cpt plan mine.toml --world-size 8 --device-memory 80GiB --suggest\n"
        "titan-cpt plan mine.toml --updates 5 --measured outputs/mine",
        takes_overrides=True,
    )
    add_config_option(plan)
    plan.add_argument(
        "--world-size", type=positive_int, metavar="N", help="plan for N ranks (default: the fewest possible)"
    )
    plan.add_argument(
        "--device-memory", metavar="SIZE", help="check that each rank fits into the memory of a device, such as 80GiB"
    )
    plan.add_argument(
        "--suggest", action="store_true", help="list parallel layouts for --world-size and --device-memory"
    )
    plan.add_argument(
        "--check-layout",
        action="store_true",
        help="build the sharded model without memory (meta device) and compare its size with the plan",
    )
    plan.add_argument(
        "--updates",
        type=positive_int,
        metavar="N",
        help="what N future updates of the last stage's size cost: continual pre-training and retraining on all data",
    )
    plan.add_argument(
        "--measured",
        type=Path,
        metavar="RUN",
        help="with --updates: device hours at the speed of this run (default: this config's own run, if trained)",
    )
    plan.add_argument(
        "--trained-before",
        type=token_count,
        default=0,
        metavar="TOKENS",
        help="with --updates: tokens that the initial weights were trained on, such as 300B, which retraining repeats",
    )
    plan.add_argument("--quiet", action="store_true", help="print notes and errors only")
    plan.add_argument("--verbose", action="store_true", help="also print the settings that are not defaults")
    plan.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    plan.add_argument(
        "--lr-at",
        type=step_list,
        default=(),
        metavar="T,...",
        help="add the learning rate of these 1-based steps (JSON)",
    )
    batch_help = "add the sequences of the global batch of a 0-based step (JSON)"
    plan.add_argument("--batch", nargs=2, metavar=("STAGE", "STEP"), help=batch_help)
    plan.add_argument("--recipe", nargs=2, help=argparse.SUPPRESS)  # old name of --batch


def _run(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from titan_cpt.checkpoint.tokenizer_check import check_planned_tokenizers
    from titan_cpt.common.numbers import parse_bytes
    from titan_cpt.config.load import load_config
    from titan_cpt.data.inventory import take_inventory
    from titan_cpt.planning.parallel import min_world_size
    from titan_cpt.planning.planner import make_plan

    config = load_config(config_path(options), options.overrides)
    device_bytes = parse_bytes(options.device_memory, option="--device-memory") if options.device_memory else None
    world_size = options.world_size or min_world_size(config)
    if options.suggest:
        return _suggest(config, world_size, device_bytes, as_json=options.json)
    inventory = take_inventory(config)
    inventory = replace(inventory, notes=(*inventory.notes, *check_planned_tokenizers(config)))
    plan = make_plan(config, inventory, world_size, gpu_bytes=device_bytes)
    plan = replace(plan, notes=(*plan.notes, *_notes_on_outside_weights(config, plan, inventory.vocab_size)))
    if options.json or options.lr_at or options.batch or options.recipe:
        print(json.dumps(_as_json(plan, options, device_bytes, config.job.output_dir)))
    else:
        from titan_cpt.common.console import TEXT_COLUMNS, make_console
        from titan_cpt.config.run_config import settings_that_are_not_defaults
        from titan_cpt.planning.plan_text import print_notes, print_plan

        console = make_console(TEXT_COLUMNS)
        if options.verbose:
            for setting in settings_that_are_not_defaults(config):
                print(setting)
        if options.quiet:
            print_notes(plan.notes, console)
        else:
            print_plan(plan, console, config.checkpoint.keep_latest_k, device_bytes)
        for line in _update_lines(plan, options, config.job.output_dir):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if options.check_layout:
        from titan_cpt.training.build import parallel_options
        from titan_cpt.training.dry_run import check_layout  # imports torch; the plan itself does not

        for line in check_layout(plan, parallel_options(config)):
            print(line, file=sys.stderr if options.json else sys.stdout)
    return 0


def _notes_on_outside_weights(config: Config, plan: Plan, token_ids: int | None) -> Iterator[str]:
    """Notes on stages that train weights from outside of the run, as far as these or facts on them are known here."""
    from titan_cpt.checkpoint.known.length import length_notes
    from titan_cpt.checkpoint.known.optimizer import check_known_optimizers
    from titan_cpt.checkpoint.known.release import known_release_notes

    yield from length_notes(plan.stages)
    yield from known_release_notes(config, plan.stages, token_ids)
    yield from check_known_optimizers(plan.stages)


def print_plan_of(config: Config, world_size: int | None = None) -> None:
    """Print the plan of a run, for the dry run of a command that would train it.

    Args:
        world_size: number of ranks; None for the fewest possible.
    """
    from dataclasses import replace
    from pathlib import Path

    from titan_cpt.checkpoint.tokenizer_check import check_planned_tokenizers
    from titan_cpt.common.console import TEXT_COLUMNS, make_console
    from titan_cpt.data.inventory import take_inventory
    from titan_cpt.planning.parallel import min_world_size
    from titan_cpt.planning.plan_text import print_plan
    from titan_cpt.planning.planner import make_plan

    inventory = take_inventory(config)
    inventory = replace(inventory, notes=(*inventory.notes, *check_planned_tokenizers(config)))
    plan = make_plan(config, inventory, world_size or min_world_size(config))
    plan = replace(plan, notes=(*plan.notes, *_notes_on_outside_weights(config, plan, inventory.vocab_size)))
    console = make_console(TEXT_COLUMNS)
    print_plan(plan, console, config.checkpoint.keep_latest_k)
    folder = Path(config.job.output_dir) / config.job.name
    print(f"dry run: nothing was written; {folder} {'exists' if folder.exists() else 'would be the run folder'}")


def _update_lines(plan: Plan, options: argparse.Namespace, output_dir: str) -> Iterator[str]:
    """The costs of future updates as text; none without --updates."""
    if options.updates:
        from titan_cpt.runs.update_costs import update_costs, update_lines

        yield ""
        costs = update_costs(plan, options.updates, options.trained_before)
        yield from update_lines(plan, costs, _rate(plan, options, output_dir), options.trained_before)


def _rate(plan: Plan, options: argparse.Namespace, output_dir: str) -> DeviceRate:
    from titan_cpt.runs.update_costs import measured_rate, rate_or_assumption

    return measured_rate(options.measured) if options.measured else rate_or_assumption(Path(output_dir) / plan.name)


def _as_json(plan: Plan, options: argparse.Namespace, device_bytes: int | None, output_dir: str) -> dict[str, object]:
    from titan_cpt.planning.plan_json import batch_as_json, lr_as_json, plan_as_json

    answer: dict[str, object] = plan_as_json(plan, device_bytes)
    if options.updates:
        from titan_cpt.runs.update_costs import update_costs, updates_as_json

        costs = update_costs(plan, options.updates, options.trained_before)
        answer["updates"] = updates_as_json(costs, _rate(plan, options, output_dir))
    if options.lr_at:
        answer["lr_at"] = lr_as_json(plan, options.lr_at)
    for key, stage_and_step in (("batch", options.batch), ("recipe", options.recipe)):
        if stage_and_step:
            answer[key] = batch_as_json(plan, *stage_and_step)
    return answer


def _suggest(config: Config, world_size: int, device_bytes: int | None, *, as_json: bool) -> int:
    from titan_cpt.data.inventory import take_inventory
    from titan_cpt.planning.suggest import assumptions, nearest_device, suggest

    if device_bytes is None:
        raise PlanError("--suggest needs the memory of the device: add --device-memory, such as 80GiB")
    suggestions = suggest(config, take_inventory(config), world_size, device_bytes)
    if as_json:
        lines = [{"overrides": s.overrides, "step_s": s.step_s, "reason": s.reason} for s in suggestions]
        print(json.dumps({"assumed": assumptions(nearest_device(device_bytes)), "suggestions": lines}))
        return 0
    print(f"{len(suggestions)} layouts of {world_size} ranks fit, fastest estimated step first")
    print(assumptions(nearest_device(device_bytes)))
    for number, suggestion in enumerate(suggestions[:5], 1):
        overrides = " ".join(f"--{key} {value}" for key, value in suggestion.overrides.items())
        print(f"{number}. {suggestion.plan.parallel_dims.describe()}: {suggestion.step_s:.2f} s per step")
        print(f"   {suggestion.reason}")
        print(f"   {overrides}")
    return 0
