"""A config with domains, for the tests of mixtures and of replay."""

import pytest
from plans import SLIMPAJAMA


@pytest.fixture
def domains(head):
    """The seven domains of SlimPajama with their weights."""
    return head + "".join(
        f'[datasets.slim.domains.{name}]\ntrain = "{name}"\nweight = {weight}\n' for name, weight in SLIMPAJAMA.items()
    )
