"""The version of a checkout, compared with setuptools-scm's, and of a checkout that git cannot describe."""

import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import setuptools_scm

import titan_cpt
from titan_cpt.common import version

ROOT = Path(titan_cpt.__file__).parents[1]


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit."""
    monkeypatch.setattr(version, "_ROOT", tmp_path)
    version.own_version.cache_clear()
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    yield tmp_path
    version.own_version.cache_clear()


@pytest.mark.parametrize("tags", [[], ["v0.2.0"], ["v0.2.0", "more"], ["1.10"]])
def test_a_clean_checkout_has_the_version_that_a_build_of_it_gets(repository, tags):
    """Without a tag, at a tag, and one commit after it."""
    for tag in tags:
        if tag == "more":
            git(repository, "commit", "-qm", "two", "--allow-empty")
        else:
            git(repository, "tag", tag)

    built = setuptools_scm.get_version(repository, fallback_version="0.1.0.dev0")
    assert simple(version.own_version()) == simple(built)


def simple(text):
    """setuptools-scm before 10 writes 0.1 for 0.1.0; the length of an abbreviated commit depends on the repository."""
    return re.sub(r"^0\.1\.dev", "0.1.0.dev", text).partition("+")[0], text.partition("+g")[2][:7]


def test_a_changed_checkout_says_so_and_a_later_commit_changes_the_version(repository):
    """A stale version, such as that of an editable installation, is never shown as the version of the code."""
    first = version.own_version()
    (repository / "file").write_text("two")
    version.own_version.cache_clear()

    assert version.own_version() == f"{first}.dirty"
    git(repository, "commit", "-qam", "two")
    version.own_version.cache_clear()
    assert re.fullmatch(r"0\.1\.0\.dev2\+g[0-9a-f]+", version.own_version())


def test_a_checkout_that_git_cannot_describe_has_an_unknown_commit(repository, monkeypatch):
    """Git is not installed, or refuses the folder of another user."""
    monkeypatch.setattr(version.metadata, "version", lambda name: "0.3.1.dev7+gabc1234")
    monkeypatch.setenv("PATH", str(repository))

    assert version.own_version() == "0.3.1.dev7+unknown"


def test_an_installed_package_has_the_version_of_its_metadata(tmp_path, monkeypatch):
    """A wheel in a virtual environment that is inside another project's repository."""
    version.own_version.cache_clear()
    monkeypatch.setattr(version, "_ROOT", tmp_path)
    monkeypatch.setattr(version.metadata, "version", lambda name: "0.2.0")

    assert version.own_version() == "0.2.0"
    version.own_version.cache_clear()


def test_without_metadata_and_git_the_version_is_unknown(tmp_path, monkeypatch):
    """A copy of the folder on PYTHONPATH."""

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    version.own_version.cache_clear()
    monkeypatch.setattr(version, "_ROOT", tmp_path)
    monkeypatch.setattr(version.metadata, "version", missing)

    assert version.own_version() == "0.1.0.dev0+unknown"
    version.own_version.cache_clear()
