"""Sections that measure speed, one at a time: ceilings, the profile of a step, options side by side, races."""

from __future__ import annotations

import json
import os
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
RACES = ("G405", "L1B", "Q", "W4096")


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
    value = str(option.value).lower() if isinstance(option.value, bool) else str(option.value)
    try:
        found = profiled(context, shape, f"{option.key}-{value}", {f"{option.table}.{option.key}": value})
    except ChildError as error:
        context.row(option.name, value=str(error), ok=False)
        return
    context.figures[option.name] = found
    gib = f"{found['peak_gib']:.2f} GiB" if found["peak_gib"] is not None else ""
    context.row(option.name, value=f"{found['tokens_per_s'] / plain['tokens_per_s']:.3f}x of plain, {gib}")


def races(context: Context) -> None:
    """titan_cpt beside other trainers: scripts/bench/speed/race.py on this device."""
    if context.tiny:
        context.skip("races", "the dry run trains no other trainers")
        return
    found = context.folder / "races.json"
    command = [
        sys.executable,
        str(ROOT / "scripts/bench/speed/race.py"),
        "--peers",
        sys.executable,
        "--device",
        context.device,
        "--races",
        ",".join(RACES),
        "--budget",
        f"{context.left_s - 10:.0f}",
        "--json",
        str(found),
    ]
    log = context.folder / "races.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ}
        ) as process,
    ):
        try:
            process.wait(timeout=max(1.0, context.left_s))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
    results = json.loads(found.read_text()) if found.exists() else []
    context.figures["races"] = results
    if not results:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        context.row("races", value=f"status {process.returncode}; {last}", ok=False)
    for result in results:
        ours = max(row["tokens_per_s"] for row in result["contestants"] if row["name"].startswith("titan_cpt"))
        for row in result["contestants"]:
            ratio, peak = ours / row["tokens_per_s"], row["peak_gib"]
            context.row(
                f"{result['key']}: {row['name']}",
                value=f"{row['tokens_per_s']:,.0f} tokens/s, {peak:.1f} GiB",
                expected=f"ours / it {ratio:.2f}",
            )


def _joined(values: Any) -> str:
    return " / ".join(
        "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" for value in values
    )
