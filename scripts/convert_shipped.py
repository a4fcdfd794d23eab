"""Convert the config files that other projects ship, and print a table: keys converted, without counterpart, to check.

    python scripts/convert_shipped.py [--clones FOLDER] [--keep FOLDER]

Clones torchtitan, GPT-NeoX, litgpt and Megatron-LM at the versions below (git and network needed; --clones names a
folder that has them already, as FOLDER/torchtitan and so on), reads their files from git, and writes nothing of them
into this repository. The table is in docs/guides/convert_config.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
import tempfile
from pathlib import Path

from titan_cpt.config.load import check_config
from titan_cpt.config.toml_files import parse_toml
from titan_cpt.convert.convert import convert_files
from titan_cpt.convert.toml_text import toml_text
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import TitanError
from titan_cpt.planning.parallel import min_world_size
from titan_cpt.planning.planner import make_plan

SHIPPED = (  # project, repository, revision, files; a tuple of files is merged
    ("torchtitan", "pytorch/torchtitan", "v0.2.2", ("torchtitan/models/*/train_configs/*.toml",)),
    ("gpt-neox", "EleutherAI/gpt-neox", "ea7aefd8", ("configs/*.yml", "configs/*/*.yml")),
    ("litgpt", "Lightning-AI/litgpt", "v0.5.9", ("config_hub/pretrain/*.yaml",)),
    (
        "megatron",
        "NVIDIA/Megatron-LM",
        "core_v0.16.0",
        ("examples/gpt3/train*.sh", "examples/llama/train*.sh", "examples/mixtral/train*.sh"),
    ),
)
NOT_MODELS = ("*setup*", "*cluster*", "*paths*", "*text_generation*", "*prof.yml", "configs/llama/train_config.yml")


def main() -> None:
    """Convert every file, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=Path, help="folder with clones, instead of cloning")
    parser.add_argument("--keep", type=Path, help="folder for the converted files (default: not kept)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch) / "converted"
        print("| file | converted | no counterpart | to check | plans |\n|---|---|---|---|---|")
        for project, repository, revision, patterns in SHIPPED:
            clone = _clone(options.clones, repository, revision, Path(scratch))
            _git(clone, "rev-parse", "--verify", f"{revision}^{{commit}}")
            print(f"| **{repository} {revision}** | | | | |")
            for name in _git(clone, "ls-tree", "-r", "--name-only", revision).splitlines():
                wanted = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
                if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in NOT_MODELS):
                    file = Path(scratch) / project / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(_git(clone, "show", f"{revision}:{name}"), encoding="utf-8")
                    _row(project, file, name, keep / project)


def _clone(clones: Path | None, repository: str, revision: str, scratch: Path) -> Path:
    name = repository.rpartition("/")[2]
    if clones is not None:
        return clones / name
    folder = scratch / "clones" / name
    subprocess.run(["git", "clone", "-q", f"https://github.com/{repository}", str(folder)], check=True)
    return folder


def _git(clone: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(clone), *words], check=True, capture_output=True, text=True).stdout


def _row(project: str, file: Path, name: str, keep: Path) -> None:
    try:
        conversion = convert_files([file], project)
    except TitanError as error:
        print(f"| {name} | | | | not converted: {str(error).replace(str(file), '')[:90]} |")
        return
    text = toml_text(conversion)
    keep.mkdir(parents=True, exist_ok=True)
    (keep / f"{Path(name).stem}.toml").write_text(text, encoding="utf-8")
    try:
        config = check_config(parse_toml(text), file)
        plan = make_plan(config, take_inventory(config), min_world_size(config))
        plans = f"{plan.spec.parameters / 1e6:,.0f} M, {plan.stages[0].steps:,} steps"
    except TitanError as error:
        plans = "no: " + " ".join(str(error).splitlines()[1].split())[:90]
    counts = [
        sum(len(finding.found) for finding in findings)
        for findings in (conversion.converted, conversion.unmatched, conversion.decisions)
    ]
    plans += ", another architecture" if not conversion.same_architecture else ""
    print(f"| {name} | {counts[0]} | {counts[1]} | {counts[2]} | {plans} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
