"""The wheel holds the whole package: code, and the files that the code reads."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

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

    assert {"titan_cpt/reporting/html_page.html", "titan_cpt/py.typed"} <= other
    assert files - set(wheel.namelist()) == set()


def test_the_wheel_installs_nothing_but_the_package_and_its_command(wheel):
    """No tests, scripts or docs; `titan-cpt` is the entry point."""
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]

    assert {top for top in tops if not top.endswith(".dist-info")} == {"titan_cpt"}
    assert "titan-cpt = titan_cpt.cli:main" in wheel.read(entry_points).decode().splitlines()


def test_a_copy_without_git_has_a_version_that_claims_no_commit(wheel):
    """The fallback of pyproject.toml; the metadata name what runs the package."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    fields = wheel.read(name).decode().partition("\n\n")[0].splitlines()

    assert "Version: 0.1.0.dev0" in fields
    assert "Requires-Python: >=3.10" in fields
    assert {line for line in fields if line.startswith("License-Expression")} == {"License-Expression: BSD-3-Clause"}
    assert not any(line.startswith(("Project-URL", "Home-page")) for line in fields)


@pytest.mark.parametrize(
    ("tag", "commits_after", "version"),
    [(None, 0, "0.1.0.dev0"), ("v0.2.0", 0, "0.2.0"), ("v0.2.0", 1, "0.2.1.dev1+g")],
)
def test_an_archive_has_the_version_of_its_tag(tmp_path, tag, commits_after, version):
    """`git archive`, as hosts make it for download: .git_archival.txt has what git describes, without a tag nothing."""
    repository, archive = tmp_path / "repository", tmp_path / "archive"
    for folder in (repository, archive):
        folder.mkdir()
    for name in ("pyproject.toml", ".gitattributes", ".git_archival.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, repository)
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    commands = [["init", "-q"], ["add", "."], ["commit", "-qm", "one"], *([["tag", tag]] if tag else [])]
    for command in [*commands, *[["commit", "-qm", "more", "--allow-empty"]] * commits_after]:
        subprocess.run([*git, *command], check=True, capture_output=True)
    tar = subprocess.run([*git, "archive", "HEAD"], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", archive], input=tar, check=True)
    done = subprocess.run([sys.executable, "-m", "setuptools_scm"], cwd=archive, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(version)
    assert "+" in version or done.stdout.strip() == version


def test_the_citation_is_a_valid_citation_file():
    """Its required keys, and the license of LICENSE; scripts/release/check.sh validates it with cffconvert."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))

    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "BSD-3-Clause"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("BSD 3-Clause License")
    names = [author["family-names"] for author in citation["references"][0]["authors"]]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{', '.join(names[:-1])} and {names[-1]}" in readme
