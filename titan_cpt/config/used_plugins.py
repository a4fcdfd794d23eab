"""Which packages register the formats, the family and the metrics that a config uses."""

from __future__ import annotations

from collections.abc import Iterator

from titan_cpt.common.plugins import FAMILIES, FORMATS, METRICS, find_plugin
from titan_cpt.config.datasets import OWN_FORMATS
from titan_cpt.config.model import OWN_FAMILIES
from titan_cpt.config.schema import Config


def used_plugins(config: Config) -> dict[str, str]:
    """{"titan_cpt.formats: NAME": "PACKAGE VERSION"}; empty if the config uses only what titan_cpt has itself.

    Raises:
        ConfigError: two packages register one of the names.
    """
    return {f"{group}: {name}": find_plugin(group, name).origin for group, name in _used(config)}


def _used(config: Config) -> Iterator[tuple[str, str]]:
    if config.model.family not in OWN_FAMILIES:
        yield FAMILIES, config.model.family
    for dataset in config.datasets.values():
        for table in (dataset, *dataset.domains.values()):
            for name in (table.format, table.resolved_validation_format):
                if name not in OWN_FORMATS:
                    yield FORMATS, name
    for name in config.validation.metrics:
        yield METRICS, name
