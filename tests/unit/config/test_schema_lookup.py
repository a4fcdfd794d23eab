"""Tables and bounds of the schema at a location of the TOML file."""

import pytest

from titan_cpt.config.datasets import DatasetConfig, DomainConfig, TextSourceConfig
from titan_cpt.config.lr import CosineLR
from titan_cpt.config.model import RopeScalingConfig
from titan_cpt.config.schema import Config
from titan_cpt.config.schema_lookup import bounds_of, interval, keys_of, tables_at, takes_only_strings
from titan_cpt.config.stages import ReplayConfig


@pytest.mark.parametrize(
    ("location", "table"),
    [
        ((), Config),
        (("model", "rope_scaling"), RopeScalingConfig),
        (("datasets", "source"), DatasetConfig),
        (("datasets", "lr", "source"), TextSourceConfig),
        (("datasets", "german", "domains", "web"), DomainConfig),
        (("stages", 0, "lr", "cosine"), CosineLR),
        (("stages", "german", "replay"), ReplayConfig),
    ],
)
def test_the_table_at_a_location(location, table):
    """Names of datasets, domains and stages, and the schedule in one of pydantic's locations, are no keys."""
    assert tables_at(location) == [table]


def test_a_location_with_a_union_has_several_tables():
    """One for each schedule."""
    found = tables_at(("stages", "german", "lr"))

    assert CosineLR in found
    assert all(table.__name__.endswith("LR") for table in found)
    assert len(set(found)) == len(found) > 1


def test_keys_are_those_of_the_toml_file():
    """`from` is a Python keyword, so its field has another name."""
    assert keys_of(ReplayConfig)["from"] == "from_"
    assert takes_only_strings(TextSourceConfig, "fetch")
    assert not takes_only_strings(TextSourceConfig, "text")
    assert not takes_only_strings(TextSourceConfig, "holdout")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (("optimizer", "beta1"), "in [0, 1)"),
        (("model", "rotary_fraction"), "in (0, 1]"),
        (("model", "layers"), ">= 1"),
        (("training", "max_norm"), "> 0"),
        (("job", "seed"), "in [0, 2**63)"),
    ],
)
def test_bounds_are_written_as_an_interval(location, expected):
    """Also those of a key that may be unset."""
    assert interval(bounds_of(location)) == expected
