"""Where the time of a training step goes, by kind of kernel (kernel_kinds.py): trains a shape under torch.profiler.

    python scripts/gpu/profile_step.py --shape G405 [--device cpu] [--steps 3] [--eager] [--set KEY=VALUE] [--json FILE]

Prints a Markdown table in ms of device time per step. `gaps` is the time of the recorded steps in which no kernel ran.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernel_kinds import OPTIMIZER, STEP, kernels_of, table_of, unknown_of

PHASES = (  # module, attribute, phase: functions of the program that mark a phase of the step
    ("titan_cpt.train", "clip_grad_norm", "clip"),
    ("titan_cpt.training.forward_backward", "fused_linear_cross_entropy", "head"),
    ("titan_cpt.distributed.master_weights", "ComputeCopy.refresh", "master weights"),
    ("torch", "Tensor.backward", "backward"),
)


def profile_shape(
    shape: str,
    *,
    device: str,
    compiled: bool,
    steps: int,
    folder: str,
    settings: dict[str, Any],
    documents: int = 0,
) -> dict[str, Any]:
    """Train a shape of inputs.py and profile it: the table, tokens/s of steps that were not profiled, peak memory.

    Args:
        documents: equal documents in each sequence; 0: none ends.
    """
    import torch
    from inputs import shape_config, shape_of, write_config
    from torch.profiler import ProfilerActivity, profile

    from titan_cpt.common.signals import StopRequest
    from titan_cpt.config.load import load_config
    from titan_cpt.distributed.process_group import init_process_group
    from titan_cpt.train import Trainer
    from titan_cpt.training.build import build
    from titan_cpt.training.stage_start import begin_stage

    warm_up, timed_steps = 4, 8 if device == "cuda" else 2
    total = warm_up + timed_steps + 1 + steps
    place = Path(folder)
    tables = {"compile": {"enable": compiled}, "job": {"name": f"profile-{shape}"}}
    raw = shape_config(shape, place, steps=total, documents=documents, **tables)
    config = load_config(write_config(raw, place / f"profile-{shape}.toml"), list(settings.items()))
    run = Path(config.job.output_dir) / config.job.name
    run.mkdir(parents=True, exist_ok=True)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    with StopRequest() as stop:
        trainer, _ = build(Trainer, config, init_process_group(), run, stop)
        stage = trainer.plan.stages[0]
        begin_stage(trainer, stage)
        loader, done = trainer.open_loader(stage, 0), 0

        def take(count: int) -> float:
            nonlocal done
            begin = time.perf_counter()
            for _ in range(count):
                trainer.train_step(loader, stage, done)
                done += 1
            wait()
            return time.perf_counter() - begin

        first = take(1)
        take(warm_up - 1)
        seconds = take(timed_steps) / timed_steps
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        with marked(trainer), profile(activities=activities) as recorded:
            take(1)  # the profiler's own start falls into this step
            with torch.profiler.record_function(STEP):
                wall = take(steps)
        trace_path = place / f"trace-{shape}.json"
        recorded.export_chrome_trace(str(trace_path))
        trainer.log.close()
    trace = json.loads(trace_path.read_text())
    trace_path.unlink()
    kernels = kernels_of(trace)
    tokens = shape_of(shape).batch * shape_of(shape).seq_len
    flops = trainer.plan.spec.flops_per_token(trainer.plan.seq_len)
    return {
        "shape": shape,
        "compiled": compiled,
        "settings": settings,
        "tokens_per_s": tokens / seconds,
        "model_flops": tokens / seconds * flops,
        "first_step_s": first,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        **table_of(kernels, wall_us=wall * 1e6, steps=steps),
        "unknown": unknown_of(kernels, steps),
    }


@contextmanager
def marked(trainer: Any) -> Iterator[None]:
    """Mark the phases of a step in the trace; restores the program's functions at the end."""
    restored: list[tuple[Any, str, Any]] = []
    places: list[tuple[Any, str, str]] = [(trainer.optimizer, "step", OPTIMIZER)]
    for module, path, phase in PHASES:
        *owners, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for part in owners:
                owner = getattr(owner, part)
            getattr(owner, name)
        except (ImportError, AttributeError):
            print(f"profile_step.py: {module}.{path} does not exist: its phase is not marked", file=sys.stderr)
            continue
        places.append((owner, name, phase))
    for owner, name, phase in places:
        original = getattr(owner, name)
        restored.append((owner, name, original))
        setattr(owner, name, _marking(original, phase))
    try:
        yield
    finally:
        for owner, name, original in restored:
            if owner is trainer.optimizer:
                delattr(owner, name)  # the class has it
            else:
                setattr(owner, name, original)


def _marking(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    from torch.profiler import record_function

    def call(*arguments: Any, **named: Any) -> Any:
        with record_function(phase):
            return function(*arguments, **named)

    return call


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    head = f"{result['shape']}, {'compiled' if result['compiled'] else 'eager'}: {result['tokens_per_s']:,.0f} tokens/s"
    lines = [head, "", "| | ms a step | launches |", "|---|---|---|"]
    lines.append(f"| wall / busy | {result['wall_ms']:.2f} / {result['busy_ms']:.2f} | {result['launches']:.0f} |")
    for kind, row in result["kinds"].items():
        lines.append(f"| {kind} | {row['ms']:.2f} | {row['launches']:.0f} |")
    lines.append(f"| gaps | {result['gaps_ms']:.2f} | |")
    return "\n".join(lines)


def main() -> None:
    """Profile one shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="G405", help="a shape of inputs.py: G405, L1B, L1B@16384, W4096, tiny")
    parser.add_argument("--documents", type=int, default=0, help="equal documents in each sequence (default none ends)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=3, help="recorded steps (default 3)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the config")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(item.split("=", 1) for item in options.set)
        result = profile_shape(
            options.shape,
            device=options.device,
            compiled=not options.eager,
            steps=options.steps,
            folder=folder,
            settings=settings,
            documents=options.documents,
        )
    print(markdown(result))
    for name, milliseconds in result["unknown"]:
        print(f"  {milliseconds:.3f} ms {name}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
