"""The wheel holds the whole package: code, and the files that the code reads."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"  # what pip calls


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip would build from a clean copy of the repository."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "titan_cpt", source / "titan_cpt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = source / "out"
    built = subprocess.run([sys.executable, "-c", BUILD, out], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(*out.glob("*.whl")) as archive:
        yield archive


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    """A folder without __init__.py, or a file type missing from package-data, would be absent from an installation."""
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "titan_cpt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    other = {name for name in files if not name.endswith(".py")}

    assert "titan_cpt/reporting/html_page.html" in other
    assert files - set(wheel.namelist()) == set()


def test_the_wheel_installs_nothing_but_the_package_and_its_command(wheel):
    """No tests, scripts or docs; `titan-cpt` is the entry point."""
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]

    assert {top for top in tops if not top.endswith(".dist-info")} == {"titan_cpt"}
    assert "titan-cpt = titan_cpt.cli:main" in wheel.read(entry_points).decode().splitlines()
