"""Fixtures of the config tests."""

import re

import pytest

from titan_cpt.config.load import load_config
from titan_cpt.errors import ConfigError


@pytest.fixture
def load(write):
    """load(text, *overrides): the config of a TOML text."""
    return lambda text, *overrides: load_config(write(text), overrides)


@pytest.fixture
def faults(write):
    """faults(text, *overrides): the lines of the error message, without their bullets and without file and line."""

    def faults(text, *overrides):
        with pytest.raises(ConfigError) as refusal:
            load_config(write(text), overrides)
        head, *lines = str(refusal.value).splitlines()
        assert head.endswith(f"config.toml: {len(lines)} problem{'s' * (len(lines) > 1)}")
        return [re.sub(r" \(config\.toml(, line \d+)?\)$", "", line.removeprefix("  - ")) for line in lines]

    return faults
