"""A sweep file for the tests of this package."""

import pytest
import training


@pytest.fixture
def swept(tmp_path):
    """swept(table, **changes) writes English -> German with that [sweep] table and returns the path of the file."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path / "out")

    def swept(table, **changes):
        return training.write_config(training.changed(raw, **changes) | {"sweep": table}, tmp_path / "sweep.toml")

    return swept
