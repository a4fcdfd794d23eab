"""Resolve and download the wheels that a GPU machine without a network lacks; see wheels.sh."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WITH_TORCH = re.compile(r"^(torch|torchvision|torchaudio|triton|nvidia-.*|cuda-.*)$")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34)] + ["manylinux2014_x86_64"]


def main() -> int:
    """Resolve, download, and print the sizes; status 1 if they exceed the limit."""
    parser = argparse.ArgumentParser(prog="wheels.sh", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="Python of that machine (default 3.12)")
    parser.add_argument("--extras", default="float8", help="extras of pyproject.toml, comma-separated (default float8)")
    parser.add_argument("--packages", default="", help="more, NAME==VERSION, without what they require")
    parser.add_argument("--have", type=Path, help="file with the names of packages on that machine, one a line")
    parser.add_argument("--limit-mb", type=float, default=60, help="largest total size in MB (default 60)")
    options = parser.parse_args()
    wanted = requirements(list(filter(None, options.extras.split(","))))
    have = set() if options.have is None else {normalized(line) for line in options.have.read_text().split()}
    pins = [pin for name, pin in resolve(wanted, options.python) if name not in have and not WITH_TORCH.match(name)]
    pins += filter(None, options.packages.split(","))
    if pins:
        download(pins, options.python, options.folder)
    sizes = {path.name: path.stat().st_size / 1e6 for path in sorted(options.folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:7.2f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total:7.2f} MB  {len(sizes)} wheels in {options.folder}")
    if total > options.limit_mb:
        print(f"wheels.sh: more than {options.limit_mb:g} MB: name with --have what the machine has", file=sys.stderr)
        return 1
    return 0


def requirements(extras: list[str]) -> list[str]:
    """The requirements in pyproject.toml without torch."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional: dict[str, list[str]] = project["optional-dependencies"]
    if unknown := sorted(set(extras) - optional.keys()):
        raise SystemExit(f"wheels.sh: no extra {', '.join(unknown)}; there are {', '.join(optional)}")
    listed = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [line for line in listed if not WITH_TORCH.match(normalized(re.split(r"[^\w.-]", line)[0]))]


def normalized(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def for_machine(python: str) -> list[str]:
    """pip's options that choose wheels for that machine."""
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    return ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]


def resolve(wanted: list[str], python: str) -> list[tuple[str, str]]:
    """(name, name==version) of the requirements and all that they require."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip(
            "install",
            "--dry-run",
            "--ignore-installed",
            "--report",
            report,
            "--target",
            folder,
            *for_machine(python),
            *wanted,
        )
        installs: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    found = [(normalized(each["metadata"]["name"]), each["metadata"]) for each in installs]
    return [
        (name, f"{metadata['name']}=={metadata['version']}") for name, metadata in sorted(found, key=lambda x: x[0])
    ]


def download(pins: list[str], python: str, folder: Path) -> None:
    """Download these wheels and nothing that they require."""
    folder.mkdir(parents=True, exist_ok=True)
    pip("download", "--no-deps", "--dest", folder, *for_machine(python), *pins)


def pip(*arguments: Any) -> None:
    """Run pip; exits with its message if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"wheels.sh: pip {arguments[0]} failed:\n{done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
