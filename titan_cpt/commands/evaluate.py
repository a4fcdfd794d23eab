"""`titan-cpt eval`: run benchmarks on checkpoints with lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from titan_cpt.commands.arguments import (
    CHECKPOINTS_HELP,
    Subparsers,
    add_command,
    add_inference_options,
    inference_options,
    positive_int,
)
from titan_cpt.errors import DataError


def add_eval(subparsers: Subparsers) -> None:
    """The options of `eval`."""
    evaluating = add_command(
        subparsers,
        "eval",
        _run,
        "run benchmarks on checkpoints",
        details="The benchmarks are those of lm-evaluation-harness. Scores that exist are not computed again.",
        usage="CHECKPOINT [CHECKPOINT ...] [options]",
        example="titan-cpt eval outputs/mine --suite offline --tasks-dir data/bench\n"
        "titan-cpt eval outputs/mine --tasks lambada_openai:0 --limit 100",
    )
    evaluating.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=CHECKPOINTS_HELP)
    evaluating.add_argument(
        "--suite",
        metavar="NAME",
        help="paper_english or paper_german from the hub, or in_context, minimal_pairs or offline from the files of "
        "scripts/fetch_benchmarks.py",
    )
    evaluating.add_argument(
        "--tasks",
        nargs="+",
        default=(),
        metavar="TASK[:SHOTS[:METRIC]]",
        help="tasks of the harness; with --suite, only these tasks of the suite",
    )
    evaluating.add_argument(
        "--limit", type=positive_int, metavar="N", help="use N evenly spaced samples of each task (default: all)"
    )
    evaluating.add_argument("--tasks-dir", type=Path, metavar="DIR", help="a folder with further tasks (YAML)")
    evaluating.add_argument("--again", action="store_true", help="repeat tasks that already have a score")
    evaluating.add_argument("--json", action="store_true", help="print one JSON object, and the progress on stderr")
    add_inference_options(evaluating)


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.config.suites import chosen_tasks, require_folder

    tasks = chosen_tasks(options.suite, options.tasks)  # before torch is imported: mistakes are reported at once
    require_folder(tasks, options.tasks_dir)
    from titan_cpt.distributed.process_group import destroy_process_group, init_process_group
    from titan_cpt.evaluation.evaluate import EvalRequest, evaluate_all

    request = EvalRequest(
        tasks,
        suite=options.suite if not options.tasks else None,
        folder=options.tasks_dir,
        limit=options.limit,
        again=options.again,
        **inference_options(options),
    )
    log = partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    ranks = init_process_group()
    try:
        columns, lacking = evaluate_all(options.checkpoints, ranks, request, log=log)
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
        raise DataError(
            f"no score for {', '.join(lacking)}: the reasons are above. All other scores are saved and not repeated"
        )
    return 0
