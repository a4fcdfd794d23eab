"""The plugin package of docs/library.md, installed with pip into a folder; and metadata of packages that are not."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def blocks(language):
    """{file name of the first line: text} of the page's code blocks."""
    block = re.compile(rf"^```{language}\n# ([\w./]+\.(?:py|toml))\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return dict(block.findall(PAGE.read_text()))


def install_example(folder):
    """Write the package of the page and install it into a folder for sys.path, which is returned."""
    source = folder / "source"
    files = {"pyproject.toml": blocks("toml")["pyproject.toml"], **blocks("python")}
    for name, text in files.items():
        if name.startswith("titan_example/") or name == "pyproject.toml":
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(text)
    target = folder / "installed"
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", target]
    command = [sys.executable, "-m", "pip", "install", *options, source]
    installed = subprocess.run(command, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    return target


def register(folder, package, version, entries):
    """Make the metadata of an installed package: {group: {name: value}}."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in names.items()) for group, names in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder
