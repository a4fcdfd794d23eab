"""Writes the packages and their imports into docs/architecture.md: `python scripts/docs/architecture_diagram.py`.

--print writes the page to stdout instead.

The packages and their order are PACKAGES of tests/unit/test_architecture.py; the arrows are the imports in the code,
without those that follow from others (a -> c where a -> b -> c).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from unit.test_architecture import OURS, PACKAGES, package

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
BEGIN = "<!-- packages: begin (python scripts/docs/architecture_diagram.py writes this) -->\n"
END = "<!-- packages: end -->\n"
PURPOSE = {
    "errors": "The exceptions of the project, each with its exit status.",
    "common": "Small tools: atomic writes, file locks, the paths of a run folder, reading metrics.jsonl, numbers.",
    "config": "The TOML file: schema, loading, overrides, error messages, benchmark suites.",
    "models": "A folder for each model family: modules, sizes, parameter and FLOP counts, Hugging Face names.",
    "distributed": "Process group, device mesh, and a file for each parallelism technique.",
    "data": "Token file formats, tokenizers, text preparation, replay mixture, shuffling, the loader.",
    "planning": "From config and data to a frozen plan: steps, LR, replay, parallel layout, memory, warnings.",
    "checkpoint": "Weights on disk: saving, resuming, manifests, import from and export to Hugging Face.",
    "evaluation": "Benchmarks and text generation with a checkpoint.",
    "reporting": "From run folders to tables, figures and the HTML page. Reads files only.",
    "training": "The parts of the training loop: loss, optimizer, validation, metrics, handling of bad steps.",
    "train": "The training loop, from top to bottom.",
    "runs": "Runs made from other runs: sweeps, baselines, annealing branches.",
    "commands": "One file for each command: its options and its handler.",
    "cli": "The entry point of `titan-cpt`.",
    "__main__": "The entry point of `python -m titan_cpt`.",
}


def block() -> str:
    """The diagram and the table, as they stand between BEGIN and END."""
    assert tuple(PURPOSE) == PACKAGES, "PURPOSE needs a line for each entry of PACKAGES, in the same order"
    arrows = [f"    {node(name)} --> {node(other)}" for name in reversed(PACKAGES) for other in direct_imports(name)]
    rows = [f"| {number} | `{name}` | {PURPOSE[name]} |" for number, name in enumerate(PACKAGES, 1)]
    return "\n".join(
        [
            "```mermaid",
            "flowchart TB",
            *arrows,
            "```",
            "",
            "| | package | what it holds |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def node(name: str) -> str:
    """A node of the diagram; Mermaid would read the underscores of __main__ as bold."""
    return 'main["python -m titan_cpt"]' if name == "__main__" else name


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
    else:
        PAGE.write_text(page, encoding="utf-8")
