"""The repository's skeleton for tests of shell scripts."""

from pathlib import Path

import pytest
from shell_repository import Repository


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """The skeleton, with an environment in .venv whose Python is the recorder."""
    repository = Repository(tmp_path)
    repository.add_recorder(repository.folder / ".venv/bin/python")
    return repository
