"""Sections that compare losses, memory and resumed runs: nothing here measures speed, so they run side by side."""

from __future__ import annotations

import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import inputs
import measure
from children import Child, ChildError

if TYPE_CHECKING:
    from check import Context

CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
FLOAT8_CAPABILITY = (8, 9)
ROOT = Path(__file__).resolve().parents[2]
TINY_QUICKSTART = (
    *("--model.size", "debug", "--tokenizer.train.vocab_size", "300", "--training.seq_len", "32"),
    *("--stages.english.steps", "4", "--stages.german.steps", "4", "--validation.sequences", "4"),
    *("--training.global_batch_size", "4", "--training.local_batch_size", "4"),
)
BF16 = {"mixed_precision_param": "bfloat16"}


def train(context: Context, name: str, environment: dict[str, str] | None = None, **tables: Any) -> Path:
    """Train the small config to its end in a child; returns the run's folder."""
    data = languages(context)
    raw = inputs.small_config(data, context.folder / name, tiny=context.tiny, **tables)
    config = inputs.write_config(raw, context.folder / f"{name}.toml")
    context.call(measure.train, ["--config", str(config)], log=name, environment=environment)
    return context.folder / name / "run"


def languages(context: Context) -> Path:
    """The generated tokens of this section, written once."""
    data = context.folder / "data"
    if not data.exists():
        data.mkdir()
        inputs.write_languages(data, tokens=20_000 if context.tiny else 400_000)
    return data


def difference(first: Path, second: Path) -> float:
    """The largest difference of the two runs' losses, in nats per token, over all steps and validations."""
    one, other = ({key: numbers[0] for key, numbers in inputs.numbers_of(run).items()} for run in (first, second))
    if one.keys() != other.keys() or not one:
        raise ChildError(f"{first} and {second} did not measure the same steps: {len(one)} and {len(other)}")
    return max(abs(one[key] - other[key]) for key in one)


def losses(context: Context) -> None:
    """Losses of the small model: this machine's CPU in float32, then the device in every precision."""
    cpu = train(context, "cpu-float32", {**CPU_ONLY, "OMP_NUM_THREADS": str(min(8, os.cpu_count() or 1))})
    plain = cpu if context.device == "cpu" else train(context, "float32")
    found: dict[str, float] = {}

    def compare(name: str, run: Path, reference: Path, allowed: float) -> None:
        found[name] = difference(run, reference)
        context.row(name, value=f"{found[name]:.2e} nats", expected=f"<= {allowed:g}", ok=found[name] <= allowed)

    if context.device != "cpu":
        compare("float32: CUDA against the CPU", plain, cpu, 5e-3)
    bf16 = train(context, "bf16", training=BF16)
    compare("bfloat16 against float32", bf16, plain, 0.05)
    _float8(context, compare, bf16)
    context.figures["largest differences"] = found


def compiled(context: Context) -> None:
    """Losses of the small model in bfloat16, compiled and not."""
    runs = [
        train(context, name, training=BF16, compile={"enable": name == "compiled"}) for name in ("compiled", "eager")
    ]
    off = difference(*runs)
    context.figures["largest difference"] = off
    context.row("bfloat16: compiled against eager", value=f"{off:.2e} nats", expected="<= 0.02", ok=off <= 0.02)


def _float8(context: Context, compare: Any, bf16: Path) -> None:
    capability = tuple(context.report.about.get("capability", FLOAT8_CAPABILITY))
    if context.report.about.get("torchao") is None:
        context.skip("float8", "torchao is not installed")
        return
    if capability < FLOAT8_CAPABILITY:
        context.skip("float8", f"needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}")
        return
    for recipe in ("tensorwise", "rowwise"):
        # The dry run cannot compile the emulation in bfloat16.
        compile_ = {"enable": context.device == "cuda"}
        run = train(context, f"float8-{recipe}", training=BF16, float8={"recipe_name": recipe}, compile=compile_)
        compare(f"float8 {recipe} against bfloat16", run, bf16, 0.15)


def quickstart(context: Context) -> None:
    """The quick start as it is, on this machine's CPU and on the device in float32; then in bfloat16, compiled."""
    data = context.folder / "data" / "quickstart"
    if context.text is not None:
        shutil.copytree(context.text, data)
    elif context.tiny:
        inputs.write_text(data)
    else:
        context.skip("quick start", "no --text: its text is not on this machine")
        return
    compiled = [] if context.tiny else ["--compile.enable", "true"]
    bf16 = ["--training.mixed_precision_param", "bfloat16", *compiled]
    threads = {"OMP_NUM_THREADS": str(min(8, os.cpu_count() or 1))}

    def run(name: str, overrides: list[str], environment: dict[str, str]) -> dict[str, float]:
        command = ["--config", str(ROOT / "train_configs" / "quickstart.toml"), "--job.name", name, *overrides]
        command += TINY_QUICKSTART if context.tiny else ()
        context.call(in_folder, str(context.folder), command, log=f"quickstart-{name}", environment=environment)
        return _ends(context.folder / "outputs" / name)

    found = {"device": run("device", [], {})}  # the first one prepares the text
    with ThreadPoolExecutor(1) as pool:
        cpu = pool.submit(run, "cpu", [], {**CPU_ONLY, **threads})
        found["bf16"] = run("bf16", bf16, {})
        found["cpu"] = cpu.result()
    context.figures.update(found)
    for key, expected in found["cpu"].items():
        for name, allowed in (("device", 2e-3), ("bf16", 0.02)):
            off = found[name][key] - expected
            label = "float32" if name == "device" else "bf16" if context.tiny else "bf16, compiled"
            context.row(
                f"{key}, {label}",
                value=f"{found[name][key]:.4f} ({off:+.4f})",
                expected=f"{expected:.4f} +- {allowed:g}, this CPU",
                ok=abs(off) <= allowed,
            )


def _ends(run: Path) -> dict[str, float]:
    """Validation losses at the end of each stage: {"english after german": nats per token, ...}."""
    last: dict[tuple[str, str], float] = {}
    for (stage, dataset, _), loss in inputs.losses_of(run).items():
        last[stage, dataset] = loss
    return {f"{dataset} after {stage}": loss for (stage, dataset), loss in sorted(last.items())}


def in_folder(folder: str, arguments: list[str]) -> int:
    """`measure.train` in a working directory, to which the quick start's paths are relative."""
    os.chdir(folder)
    return measure.train(arguments)


def resume(context: Context) -> None:
    """A run that is killed three times gives the numbers of an unbroken one, bit for bit; saves happen in between."""
    killed_and_compared(context, "deterministic bf16", kills=1 if context.tiny else 3, training=BF16)
    run = context.folder / "deterministic bf16" / "run"
    events = [line for line in inputs.metrics_of(run) if line["kind"] == "event"]
    saves = sum(line["name"] == "checkpoint" for line in events)
    failures = sum(line["name"] == "save_failed" for line in events)
    context.row(
        "async saves in one run",
        value=f"{saves} saved, {failures} failed",
        expected=">= 3 saved, 0 failed",
        ok=saves >= 3 and failures == 0,
    )
    newest = max((run / "german").glob("step-*"))
    context.call(verify, str(newest), log="verify")
    context.row("titan-cpt verify of the last save", value="exit 0", expected="exit 0", ok=True)


def verify(folder: str) -> int:
    """`titan-cpt verify`; exits with its status if that is not 0."""
    from titan_cpt.cli import main

    try:
        main(["verify", folder])
    except SystemExit as end:
        if end.code:
            raise
    return 0


def killed_and_compared(context: Context, name: str, *, kills: int, **tables: Any) -> None:
    """Train to the end, train again with kill -9 at random moments, and add a row that compares the two."""
    tables = {**tables, "job": {**tables.get("job", {}), "deterministic": True}}
    unbroken = train(context, name, **tables)
    raw = inputs.small_config(languages(context), context.folder / f"{name} killed", tiny=context.tiny, **tables)
    config = inputs.write_config(raw, context.folder / f"{name} killed.toml")
    broken = context.folder / f"{name} killed" / "run"
    lines, died, rng = len(inputs.metrics_of(unbroken)), 0, random.Random(name)
    for number in range(kills):
        child = Child(measure.train, ["--config", str(config)], log=context.folder / f"{name} killed.log")
        try:
            target = int(lines * (number + rng.uniform(0.3, 0.9)) / kills)
            while child.running and len(inputs.metrics_of(broken)) < target and context.left_s > 0:
                time.sleep(0.005)
            died += child.running
        finally:
            child.kill()
    context.call(measure.train, ["--config", str(config)], log=f"{name} killed")
    first, second = inputs.numbers_of(unbroken), inputs.numbers_of(broken)
    differing = sum(first.get(key) != second.get(key) for key in first.keys() | second.keys())
    context.figures[name] = {"records": len(first), "differing": differing, "kills": died}
    context.row(
        f"{name}: {died} x kill -9, resumed",
        value=f"{differing} of {len(first)} records differ",
        expected=f"0 differ, {kills} kills",
        ok=differing == 0 and died == kills and len(first) > 0,
    )


def memory(context: Context) -> None:
    """The plan's memory against the allocator's peak: the configurations of scripts/bench/memory.py --device cuda."""
    bench = measure.memory_bench()
    for number, name in enumerate([*bench.ON_CUDA][: 1 if context.tiny else None]):
        folder = context.folder / str(number)
        folder.mkdir()
        try:
            found = context.call(
                partial(measure.peak_memory, tiny=context.tiny), name, str(folder), log=f"memory-{number}"
            )
        except ChildError as error:
            context.row(name, value=str(error), ok=False)
            continue
        off = found["planned"] / found["measured"] - 1
        context.figures[name] = found
        gib = {key: value / 2**30 for key, value in found.items()}
        reserved = f" ({gib['reserved']:.2f} reserved)" if "reserved" in gib else ""
        context.row(
            name,
            value=f"{gib['planned']:.2f} GiB planned, {gib['measured']:.2f} peak ({off:+.1%})",
            expected=f"+- {bench.PROMISED_ON_CUDA:.0%}{reserved}",
            ok=None if context.device == "cpu" else abs(off) <= bench.PROMISED_ON_CUDA,
        )


def offload(context: Context) -> None:
    """CPU offload on two GPUs; one rank has no shards to offload, so on one GPU the refusal is checked."""
    try:
        train(context, "offload", training={"enable_cpu_offload": True})
    except ChildError as error:
        refused = "enable_cpu_offload" in str(error)
        context.row("one rank", value="refused" if refused else str(error), expected="refused: no shards", ok=refused)
    else:
        context.row("one rank", value="trained", expected="refused: no shards", ok=False)
    if context.gpus < 2:
        context.skip("two ranks", f"needs 2 GPUs, this machine has {context.gpus}")
        return
    plain = train(context, "plain")
    data, out = languages(context), context.folder / "two-ranks"
    raw = inputs.small_config(data, out, tiny=context.tiny, training={"enable_cpu_offload": True})
    config = inputs.write_config(raw, context.folder / "two-ranks.toml")
    context.call(measure.torchrun, 2, ["--config", str(config)], log="two-ranks")
    off = difference(out / "run", plain)
    context.row("two ranks against one without", value=f"{off:.2e} nats", expected="<= 0.005", ok=off <= 5e-3)
