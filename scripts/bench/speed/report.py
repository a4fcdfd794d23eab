"""The results of the races as Markdown tables, and the pages into which they are written."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import goals
from shapes import ROOT

BEGIN, END = "<!-- races: begin -->", "<!-- races: end -->"
PAGES = {"cpu": ROOT / "docs" / "performance.md", "cuda": ROOT / "docs" / "performance_gpu.md"}


def table(result: dict[str, Any]) -> str:
    """The results of one shape as a Markdown table."""
    return _gpu_table(result) if result["device"] == "cuda" else _cpu_table(result)


def _best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """titan_cpt's fastest variant; other builds of it do not count."""
    ours = [row for row in rows if row["kind"] == "ours" and not row["variant"].startswith("baseline")]
    return max((row for row in ours if row["status"] == "ran"), key=goals.speed, default=None)


def _cpu_table(result: dict[str, Any]) -> str:
    best = _best(result["contestants"])
    lines = [
        f"### {result['title']}, {result['precision']}, sequence {result['seq_len']}",
        "",
        f"A matrix product of {result['product']}^3 in the same run: {result['product_flops'] / 1e9:.0f} GFLOP/s.",
        "",
        "| | tokens/s | our best / it | tokens per CPU second | peak GiB | MFU | loss at step 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["contestants"]:
        if row["status"] == "ran":
            lines.append(
                f"| {row['name']} | {row['tokens_per_s']:.0f} | {_ratio(best, row)} | {row['tokens_per_cpu_s']:.0f} "
                f"| {row['peak_gib']:.2f} | {row['mfu_product']:.1%} | {row['first_loss']:.4f} |"
            )
        else:
            lines.append(f"| {row['name']} | {row['status']} | | | | | |")
    return "\n".join([*lines, *_reasons(result)])


def _gpu_table(result: dict[str, Any]) -> str:
    best, sheet = _best(result["contestants"]), result["datasheet_flops"]
    product = (
        f"A matrix product of {result['product']}^3 in the same turns: {result['product_flops'] / 1e12:.0f} TFLOP/s"
    )
    lines = [
        f"### {result['title']}, {result['precision']}, {result['batch']} x {result['seq_len']:,} tokens a step",
        "",
        f"{product}; the data sheet's peak: {f'{sheet / 1e12:.0f} TFLOP/s' if sheet else 'unknown'}.",
        "",
        "| | tokens/s | slowest to fastest turn | our best / it | peak GiB allocated | reserved "
        "| MFU, of the product | of the data sheet | loss at step 1 | first step, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["contestants"]:
        if row["status"] != "ran":
            lines.append(f"| {row['name']} | {row['status']}{' |' * 10}")
            continue
        of_sheet = f"{row['mfu_datasheet']:.1%}" if "mfu_datasheet" in row else ""
        lines.append(
            f"| {row['name']} | {row['tokens_per_s']:,.0f} | {min(row['turns']):,.0f} to {max(row['turns']):,.0f} "
            f"| {_ratio(best, row)} | {row['peak_gib']:.1f} | {row['peak_reserved_gib']:.1f} "
            f"| {row['mfu_product']:.1%} | {of_sheet} | {row['first_loss']:.4f} | {row['first_step_s']:.1f} |"
        )
    return "\n".join([*lines, *_reasons(result)])


def _ratio(best: dict[str, Any] | None, row: dict[str, Any]) -> str:
    return "" if best is None else f"{goals.speed(best) / goals.speed(row):.2f}"


def _reasons(result: dict[str, Any]) -> list[str]:
    """A list of the trainers without figures, and why."""
    missing = [row for row in result["contestants"] if row["status"] != "ran"]
    return ["", *(f"- {row['name']}: {row['status']}: {row['reason']}" for row in missing)] if missing else []


def machine(device: str) -> dict[str, Any]:
    """Processor, cores and load of this machine; on CUDA also GPU and driver."""
    found: dict[str, Any] = {"cpu": _processor(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    if device == "cuda":
        words = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        first = _output(words).splitlines()[:1]
        if first:
            found |= dict(
                zip(("gpu", "driver", "memory"), (part.strip() for part in first[0].split(",")), strict=False)
            )
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return lines[0].split(":")[1].strip() if lines else platform.processor()


def _output(words: list[str]) -> str:
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def commit(folder: Path = ROOT) -> str:
    """Short hash of a checkout, with "+" if files differ from it; "unknown" outside git."""
    hash_ = _output(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]).strip()
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"]).strip()
    return (hash_ + ("+" if changed else "")) or "unknown"


def head(result: dict[str, Any]) -> str:
    """What was measured where: the first line above the tables."""
    about, races = result["machine"], result["races"]
    turns = max((len(row["turns"]) for race in races for row in race["contestants"] if "turns" in row), default=0)
    steps = " or ".join(str(number) for number in sorted({race["steps_a_turn"] for race in races}))
    what = f"{turns} turns of {steps} steps each, medians"
    if result["device"] == "cpu":
        return f"Measured on {about['cpu']}, {about['cores']} cores, load {about['load']}; {what}; one thread."
    built = races[0]["machine"]
    return (
        f"Measured on {built.get('name', 'a CPU (dry run)')}, driver {about.get('driver', 'unknown')}, "
        f"torch {built['torch']}, {about['cores']} CPU cores, on {result['date']} at commit {result['commit']}; {what}."
    )


def page(result: dict[str, Any]) -> str:
    """The text between the markers of a page."""
    tables = [table(race) for race in result["races"]]
    if result["device"] == "cuda":
        tables.append("### Goals\n\n" + goals.table(result["goals"]))
    return "\n\n".join([head(result), *tables])


def write_into(path: Path, text: str) -> None:
    """Replace the text between the two markers of a page."""
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{rest[rest.index(END) :]}")
