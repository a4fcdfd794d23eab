"""Draws the packages and their imports for docs/architecture.md: `python scripts/docs/architecture_diagram.py`.

It writes docs/packages.svg and the table of the page. --print writes the page to stdout, --print-svg the drawing.

The packages and their order are PACKAGES of tests/unit/test_architecture.py; the arrows are the imports in the code,
without those that follow from others (a -> c where a -> b -> c).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from unit.test_architecture import OURS, PACKAGES, package

DRAWING = Path(__file__).resolve().parents[2] / "docs" / "packages.svg"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
BEGIN = "<!-- packages: begin (python scripts/docs/architecture_diagram.py writes this) -->\n"
END = "<!-- packages: end -->\n"
BOX_PX = (160, 22)  # width and height
ROW_PX = 30
PURPOSE = {
    "errors": "The exceptions of the project, each with its exit status.",
    "common": "Small tools: atomic writes, file locks, the paths of a run folder, reading metrics.jsonl, numbers.",
    "config": "The TOML file: schema, loading, overrides, error messages, benchmark suites.",
    "object_storage": "Files in object storage (s3://, gs://): lookups, byte ranges, the local block cache.",
    "models": "A folder for each model family: modules, sizes, parameter and FLOP counts, Hugging Face names.",
    "distributed": "Process group, device mesh, and a file for each parallelism technique.",
    "data": "Token file formats, tokenizers, text preparation, replay mixture, shuffling, the loader.",
    "planning": "From config and data to a frozen plan: steps, LR, replay, parallel layout, memory, warnings.",
    "convert": "Configs of torchtitan, GPT-NeoX, litgpt and Megatron-LM as ours, and what has no counterpart.",
    "checkpoint": "Weights on disk: saving, resuming, manifests, import from and export to Hugging Face.",
    "evaluation": "Benchmarks and text generation with a checkpoint.",
    "reporting": "From run folders to tables, figures and the HTML page. Reads files only.",
    "doctor": "Checks of the machine and of a config, each in a process of its own.",
    "tracking": "Follows metrics.jsonl in a process of its own and sends it to Weights & Biases, MLflow and trackio.",
    "training": "The parts of the training loop: loss, optimizer, validation, metrics, handling of bad steps.",
    "train": "The training loop, from top to bottom.",
    "runs": "Runs made from other runs: sweeps, baselines, annealing branches.",
    "api": "The Python API: what `import titan_cpt` offers.",
    "commands": "One file for each command: its options and its handler.",
    "cli": "The entry point of `titan-cpt`.",
    "__main__": "The entry point of `python -m titan_cpt`.",
}


def block() -> str:
    """The diagram and the table, as they stand between BEGIN and END."""
    assert tuple(PURPOSE) == PACKAGES, "PURPOSE needs a line for each entry of PACKAGES, in the same order"
    rows = [f"| {number} | `{name}` | {PURPOSE[name]} |" for number, name in enumerate(PACKAGES, 1)]
    return "\n".join(
        [
            "![The packages from top to bottom; an arrow leads from a package to one that it imports](packages.svg)",
            "",
            "| | package | what it holds |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def drawing() -> str:
    """An SVG with a box for each package, in the order of the imports, and an arc for each import that is drawn."""
    order = [*reversed(PACKAGES)]
    middle = {name: 8 + ROW_PX * number + BOX_PX[1] / 2 for number, name in enumerate(order)}
    shapes = []
    for name in order:
        for number, other in enumerate(direct_imports(name)):
            begin, end = middle[name] + 3 + 3 * number, middle[other] - 5
            reach = 24 + 0.55 * (end - begin)
            curve = (
                f"M {BOX_PX[0]} {begin} C {BOX_PX[0] + reach} {begin}, {BOX_PX[0] + reach} {end}, {BOX_PX[0] + 6} {end}"
            )
            shapes.append(f'<path d="{curve}" fill="none" stroke="#5c6bc0" stroke-width="1.5" marker-end="url(#tip)"/>')
    for name, y in middle.items():
        shown = "python -m titan_cpt" if name == "__main__" else name
        shapes.append(
            f'<rect x="1" y="{y - BOX_PX[1] / 2}" width="{BOX_PX[0] - 1}" height="{BOX_PX[1]}" rx="4" fill="#e8eaf6" '
            f'stroke="#5c6bc0"/>\n<text x="{BOX_PX[0] / 2}" y="{y + 4.5}" text-anchor="middle">{shown}</text>'
        )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="300" height="{8 + ROW_PX * len(order)}" '
            'font-family="sans-serif" font-size="13" fill="#1a237e">',
            '<marker id="tip" viewBox="0 0 8 8" refX="2" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            '<path d="M 0 0 L 8 4 L 0 8 z" fill="#5c6bc0"/></marker>',
            *shapes,
            "</svg>\n",
        ]
    )


def direct_imports(name: str) -> list[str]:
    """The packages that a package imports, except those that it also reaches through another one."""
    imports = imported_packages(name)
    return [one for one in imports if not any(one in reachable(other) for other in imports if other != one)]


def reachable(name: str) -> set[str]:
    """All packages that a package imports, directly or through others."""
    return {one for other in imported_packages(name) for one in {other, *reachable(other)}}


def imported_packages(name: str) -> list[str]:
    """The earlier packages that the files of a package import, in the order of PACKAGES."""
    found = {package(other) for file, others in OURS.items() if package(file) == name for other in others}
    return [one for one in PACKAGES[: PACKAGES.index(name)] if one in found]


def with_block(page: str) -> str:
    """The page with the text between BEGIN and END replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + block() + END + after


if __name__ == "__main__":
    page = with_block(PAGE.read_text(encoding="utf-8"))
    if "--print" in sys.argv:
        print(page, end="")
    elif "--print-svg" in sys.argv:
        print(drawing(), end="")
    else:
        DRAWING.write_text(drawing(), encoding="utf-8")
        PAGE.write_text(page, encoding="utf-8")
