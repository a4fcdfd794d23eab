"""scripts/release and scripts/docker: what a check of the contents finds, and what the image is made of."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
METADATA = b"Metadata-Version: 2.4\nName: titan_cpt\nVersion: 0.2.0\n"


def contents(tmp_path, wheel, sdist):
    """What contents.py says of these files, in a repository that tracks a module and a test."""
    source = tmp_path / "source"
    for name in ("titan_cpt/a.py", "titan_cpt/py.typed", "tests/test_a.py", "findings/x.sh"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    subprocess.run(["git", "init", "-q", source], check=True)
    subprocess.run(["git", "-C", source, "add", "."], check=True)
    (tmp_path / "dist").mkdir()
    with zipfile.ZipFile(tmp_path / "dist" / "titan_cpt-0.2.0-py3-none-any.whl", "w") as archive:
        archive.writestr("titan_cpt-0.2.0.dist-info/METADATA", METADATA)
        for name, size in wheel.items():
            archive.writestr(name, b"0" * size)
    with tarfile.open(tmp_path / "dist" / "titan_cpt-0.2.0.tar.gz", "w:gz") as archive:
        for name in sdist:
            archive.add(source / name if (source / name).exists() else __file__, f"titan_cpt-0.2.0/{name}")
    script = ROOT / "scripts" / "release" / "contents.py"
    command = [sys.executable, script, tmp_path / "dist", source]
    return subprocess.run(command, capture_output=True, text=True)


COMPLETE_WHEEL = {"titan_cpt/a.py": 9, "titan_cpt/py.typed": 0}
COMPLETE_SDIST = ("titan_cpt/a.py", "titan_cpt/py.typed", "tests/test_a.py")


@pytest.mark.parametrize(
    ("wheel", "sdist", "problem"),
    [
        (COMPLETE_WHEEL, COMPLETE_SDIST, None),
        ({"titan_cpt/a.py": 9}, COMPLETE_SDIST, "wheel: lacks titan_cpt/py.typed"),
        ({**COMPLETE_WHEEL, "tests/test_a.py": 9}, COMPLETE_SDIST, "wheel: has tests/test_a.py"),
        ({**COMPLETE_WHEEL, "titan_cpt/a.py": 2_000_000}, COMPLETE_SDIST, "titan_cpt/a.py: 2,000,000 bytes"),
        (COMPLETE_WHEEL, COMPLETE_SDIST[1:], "sdist: lacks titan_cpt/a.py"),
        (COMPLETE_WHEEL, (*COMPLETE_SDIST, "outputs/run/x"), "sdist: has outputs/run/x"),
        (COMPLETE_WHEEL, (*COMPLETE_SDIST, "findings/x.sh"), "sdist: has findings/x.sh"),
    ],
)
def test_a_file_too_many_too_few_or_too_large_is_a_problem(tmp_path, wheel, sdist, problem):
    """One line for each, and exit status 1."""
    done = contents(tmp_path, wheel, sdist)

    assert done.returncode == (problem is not None), done.stdout + done.stderr
    assert problem is None or problem in done.stdout.splitlines()


def test_the_images_torch_is_the_version_that_setup_installs():
    """The version that the tests were run with."""
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    (tested,) = re.findall(r"^readonly DEFAULT_TORCH=(\S+)$", setup, re.MULTILINE)
    dockerfile = (ROOT / "scripts" / "docker" / "Dockerfile").read_text()

    assert set(re.findall(r"pytorch/pytorch:([\d.]+)-", dockerfile)) == {tested}


def test_the_images_context_has_the_files_that_setup_and_the_build_read():
    """Everything else is excluded: data, outputs and .venv may be hundreds of gigabytes."""
    lines = (ROOT / "scripts" / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    included = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    project = (ROOT / "pyproject.toml").read_text()

    assert rules[0] == "*"
    assert {"pyproject.toml", "titan_cpt", "scripts", "run_train.sh", "LICENSE", "README.md"} <= included
    assert all((ROOT / name).exists() for name in included)
    assert re.search(r'^readme\s*=\s*"README.md"', project, re.MULTILINE)


def test_the_check_explains_itself():
    """--help is the head of the file."""
    done = subprocess.run([ROOT / "scripts" / "release" / "check.sh", "--help"], capture_output=True, text=True)

    assert done.returncode == 0
    assert "PYTHONS " in done.stdout
