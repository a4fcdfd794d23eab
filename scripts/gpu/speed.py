"""Sections that measure speed, one at a time: ceilings, the profile of a step, options side by side, races."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import profile_step
from children import ChildError
from options import OPTIONS, Option, exists

if TYPE_CHECKING:
    from check import Context

ROOT = Path(__file__).resolve().parents[2]
# Seen on one machine each: bf16 product of 8192^3 in TFLOP/s, device copy in TB/s, read and written.
SEEN = {"H200": (787, 4.2), "H100 80GB HBM3": (798, 3.0)}
# Shape -> options of race.py: the trainers of the goals first; `--only races` has time for more.
RACES = {
    "G405": ["--variants", "compiled", "--only", "plain,hf_trainer"],
    "L1B": ["--variants", "compiled", "--only", "torchtitan"],
    "Q": ["--variants", "compiled,eager", "--only", "plain"],
    "W4096": ["--only", "none"],
}


def ceilings(context: Context) -> None:
    """The two rates that bound every kernel."""
    size, copied = (256, 2**20) if context.tiny else (8192, 2**32)
    found = context.call(measure.ceilings, context.device, size, copied, log="ceilings")
    seen = next((rates for name, rates in SEEN.items() if name in str(context.report.about.get("device"))), None)
    context.figures.update(found)
    context.row(
        f"bf16 product {size}^3, random",
        value=f"{found['bf16_product_flops'] / 1e12:.1f} TFLOP/s",
        expected=f"{seen[0]} seen" if seen else "",
    )
    context.row(
        f"copy of {copied / 2**30:.3g} GiB, read + written",
        value=f"{found['copy_bytes_per_s'] / 1e12:.2f} TB/s",
        expected=f"{seen[1]} seen" if seen else "",
    )
    if found["float8_product_flops"] is not None:
        context.row(f"float8 product {size}^3", value=f"{found['float8_product_flops'] / 1e12:.1f} TFLOP/s")


def profiled(context: Context, shape: str, log: str, settings: dict[str, Any], *, compiled: bool = True) -> Any:
    """The result of `profile_step.profile_shape` in a child."""
    steps = 1 if context.tiny else 3
    arguments = (shape, context.device, compiled and not context.tiny, steps, str(context.folder), settings)
    return context.call(_profile, *arguments, log=log)


def _profile(shape: str, device: str, compiled: bool, steps: int, folder: str, settings: dict[str, Any]) -> Any:
    return profile_step.profile_shape(
        shape, device=device, compiled=compiled, steps=steps, folder=folder, settings=settings
    )


def profile(context: Context) -> None:
    """Milliseconds of a compiled step by kind of kernel, of each shape; then float8 against bfloat16."""
    results: dict[str, Any] = {}
    for shape in ("tiny",) if context.tiny else ("G405", "L1B"):
        results[shape] = profiled(context, shape, f"profile-{shape}", {})
    context.figures.update(results)
    context.row("shapes", value=" / ".join(results))
    for key, label in (("tokens_per_s", "tokens/s"), ("peak_gib", "peak GiB"), ("first_step_s", "first step, s")):
        context.row(label, value=_joined(result[key] for result in results.values()))
    product = context.report.figures.get("ceilings", {}).get("bf16_product_flops")
    if product:
        shares = (result["model_flops"] / product for result in results.values())
        context.row("model FLOP/s over the product's", value=" / ".join(f"{share:.1%}" for share in shares))
    for key in ("wall_ms", "busy_ms", "gaps_ms", "launches"):
        context.row(key.replace("_", ", "), value=_joined(result[key] for result in results.values()))
    kinds = dict.fromkeys(kind for result in results.values() for kind in result["kinds"])
    for kind in kinds:
        rows = [result["kinds"].get(kind, {"ms": 0.0, "launches": 0.0}) for result in results.values()]
        launches = " / ".join(f"{row['launches']:.0f}" for row in rows)
        context.row(kind, value=f"{_joined(row['ms'] for row in rows)} ms; {launches} launches")
    if context.device == "cuda":
        _float8(context)


def _float8(context: Context) -> None:
    """Float8 on a shape with large matrices, where it should pay."""
    if context.report.about.get("torchao") is None or tuple(context.report.about["capability"]) < (8, 9):
        context.skip("float8 on W4096", "needs torchao and compute capability 8.9")
        return
    plain = profiled(context, "W4096", "profile-W4096", {})
    context.row("W4096, bf16: tokens/s", value=f"{plain['tokens_per_s']:,.0f}")
    context.figures["W4096"] = plain
    for recipe in ("tensorwise", "rowwise"):
        found = profiled(context, "W4096", f"profile-W4096-{recipe}", {"float8.recipe_name": recipe})
        ratio = found["tokens_per_s"] / plain["tokens_per_s"]
        context.figures[f"W4096 {recipe}"] = found
        context.row(f"W4096, float8 {recipe}", value=f"{ratio:.2f}x of bf16", expected="goal 1.15x")


def options(context: Context) -> None:
    """Tokens/s with each option over tokens/s without, compiled, one after another."""
    shape = "tiny" if context.tiny else "G405"
    wanted = [option for option in OPTIONS if exists(option)]
    plain = profiled(context, shape, "plain", {})
    context.row(f"{shape}, plain: tokens/s", value=f"{plain['tokens_per_s']:,.0f}")
    context.figures["plain"] = plain
    for option in wanted:
        if context.device == "cpu":
            context.skip(option.name, "needs a GPU")
            continue
        if context.left_s < 20:
            context.skip(option.name, "no time left")
            continue
        _with_option(context, shape, option, plain)


def _with_option(context: Context, shape: str, option: Option, plain: Any) -> None:
    value = _toml(option.value)
    try:
        found = profiled(context, shape, f"{option.key}-{value}", {f"{option.table}.{option.key}": value})
    except ChildError as error:
        context.row(option.name, value=str(error), ok=False)
        return
    context.figures[option.name] = found
    gib = f"{found['peak_gib']:.2f} GiB" if found["peak_gib"] is not None else ""
    context.row(option.name, value=f"{found['tokens_per_s'] / plain['tokens_per_s']:.3f}x of plain, {gib}")


def races(context: Context) -> None:
    """titan_cpt beside other trainers: scripts/bench/speed/race.py, one race after another."""
    for number, (key, choice) in enumerate([*RACES.items()][: 1 if context.tiny else None]):
        if context.left_s < (20 if context.tiny else 45):
            context.skip(key, "no time left: check.sh --only races")
            continue
        share = (context.left_s - 5) / (len(RACES) - number)
        _race(context, key, choice, share)


def _race(context: Context, key: str, choice: list[str], seconds: float) -> None:
    found, log = context.folder / f"{key}.json", context.folder / f"{key}.log"
    command = [sys.executable, str(ROOT / "scripts/bench/speed/race.py"), "--races", key, *choice, "--json", str(found)]
    command += ["--device", "cuda", "--turns", "3", "--budget", f"{seconds:.0f}"]
    if context.baseline is not None:
        command += ["--baseline", str(context.baseline)]
    command += ["--dry-run", "--only", "none", "--variants", "eager"] if context.tiny else _all_options()
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            process.wait(timeout=min(max(1.0, context.left_s), 1.5 * seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    if not found.exists():
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        context.row(key, value=f"status {process.returncode}; {last}", ok=False)
        return
    result = json.loads(found.read_text())
    context.figures[key] = result
    for row in result["races"][0]["contestants"]:
        _contestant(context, key, row)
    for goal in result["goals"]:
        if goal["verdict"] != "not run":
            context.row(f"goal {goal['goal']}", value=f"{goal['verdict']}: {goal['ratio']:.3f} ({goal['of']})")


def _contestant(context: Context, key: str, row: dict[str, Any]) -> None:
    name = f"{key}: {row['name']}"
    if row["status"] != "ran":
        failed = row["status"] in ("failed", "disagrees", "out of memory")
        context.row(name, value=f"{row['status']}: {row['reason']}", ok=False if failed else None)
        return
    reference = row["reference_tokens_per_s"]
    ratio = "" if not reference else f"reference / it {reference / row['tokens_per_s']:.3f}"
    context.row(name, value=f"{row['tokens_per_s']:,.0f} tokens/s, {row['peak_gib']:.1f} GiB", expected=ratio)


def _all_options() -> list[str]:
    """A variant of titan_cpt with those options that may be faster and that this commit has."""
    wanted = [option for option in OPTIONS if exists(option) and option.key in ("implementation", "cuda_graphs")]
    pairs = [f"{option.table}.{option.key}={_toml(option.value)}" for option in wanted]
    return ["--variant", "options:" + ",".join(["compile.enable=true", *pairs])] if pairs else []


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined(values: Any) -> str:
    return " / ".join(
        "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" for value in values
    )
