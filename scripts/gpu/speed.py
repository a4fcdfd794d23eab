"""Sections that measure speed, one at a time: ceilings, the profile of a step, options side by side, races."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
import profile_step
from children import ChildError, run_group
from options import OPTIONS, Option, exists

if TYPE_CHECKING:
    from check import Context

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts" / "bench" / "speed"))
import goals  # noqa: E402  # after the path

# Seen on one machine each: bf16 product of 8192^3 in TFLOP/s, device copy in TB/s, read and written.
SEEN = {"H200": (787, 4.2), "H100 80GB HBM3": (798, 3.0)}
ALL_OPTIONS = "options"  # stands for `_all_options()`
FLOAT8 = "float8:compile.enable=true,float8.recipe_name=tensorwise"
# Race -> (share of the time, options of race.py): titan_cpt compiled and the trainer of the goal, then what is left.
RACES: dict[str, tuple[int, list[str]]] = {
    "G405": (10, ["--variants", "compiled", "--only", "plain,hf_trainer", ALL_OPTIONS]),
    "L1B": (9, ["--variants", "compiled", "--only", "torchtitan", ALL_OPTIONS, "--variant", FLOAT8]),
    "Q": (5, ["--variants", "compiled", "--only", "none", ALL_OPTIONS]),
    "W4096": (5, ["--variants", "compiled,float8,float8-rowwise", "--only", "none"]),
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


def profiled(context: Context, shape: str, log: str, settings: dict[str, Any], *, documents: int = 0) -> Any:
    """The result of `profile_step.profile_shape` in a child, compiled."""
    how = {
        "device": context.device,
        "compiled": not context.tiny,
        "steps": 1 if context.tiny else 3,
        "folder": str(context.folder),
        "settings": settings,
        "documents": documents,
    }
    return context.call(_profile, shape, how, log=log)


def _profile(shape: str, how: dict[str, Any]) -> Any:
    return profile_step.profile_shape(shape, **how)


def profile(context: Context) -> None:
    """Milliseconds of a compiled step by kind of kernel, of each shape."""
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
    """titan_cpt beside other trainers: scripts/bench/speed/race.py, one race after another; then every goal."""
    waiting = list(context.races[:1] if context.tiny else context.races)
    results: list[dict[str, Any]] = []
    while waiting:
        key = waiting.pop(0)
        weight, choice = RACES[key]
        seconds = (context.left_s - 10) * weight / sum(RACES[each][0] for each in (key, *waiting))
        if seconds < 25:
            context.skip(key, f"no time left: check.sh --only races --races {key}")
        else:
            results += _race(context, key, choice, seconds)
    for goal in goals.verdicts(results, dry_run=context.tiny):
        name, sign, bound = re.split(" ([<>]=) ", goal["goal"], maxsplit=1)
        found = goal["verdict"] if goal["ratio"] is None else f"{goal['verdict']}: {goal['ratio']:.3f}, {goal['of']}"
        context.row(f"goal {name}", value=found, expected=f"{sign} {bound}")


def _race(context: Context, key: str, choice: list[str], seconds: float) -> list[dict[str, Any]]:
    """Run a race and add its rows; returns the races of its result file: one, or none if it failed."""
    found, log = context.folder / f"{key}.json", context.folder / f"{key}.log"
    command = [sys.executable, str(ROOT / "scripts/bench/speed/race.py"), "--races", key, "--json", str(found)]
    command += ["--device", "cuda", "--turns", "3", "--budget", f"{seconds:.0f}"]
    for word in choice:
        command += _all_options() if word == ALL_OPTIONS else [word]
    if context.baseline is not None and key == "Q":
        command += ["--baseline", str(context.baseline)]
    elif key == "Q":
        context.skip("Q: baseline build", "no --baseline DIR: a checkout of commit 19b0c6e")
    if context.tiny:
        command += ["--dry-run", "--only", "none", "--variants", "eager"]
    # A silent trainer is ended after the budget or a minute; the race then still reports the others.
    status = run_group(command, log=log, seconds=min(context.left_s, seconds + 60))
    if not found.exists():
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        context.row(key, value=f"exceeded its time; {last}" if status is None else f"status {status}; {last}", ok=False)
        return []
    result = json.loads(found.read_text())
    context.figures[key] = result
    for row in result["races"][0]["contestants"]:
        _contestant(context, key, row)
    raced: list[dict[str, Any]] = result["races"]
    return raced


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
    return ["--variant", f"{ALL_OPTIONS}:" + ",".join(["compile.enable=true", *pairs])] if pairs else []


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined(values: Any) -> str:
    return " / ".join(
        "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" for value in values
    )
