"""Helpers for tests of titan_cpt.convert: a conversion of keys, its plan, and the LRs of the plan's only stage."""

from pathlib import Path

from titan_cpt.config.load import check_config
from titan_cpt.config.toml_files import parse_toml
from titan_cpt.convert.conversion import Conversion
from titan_cpt.convert.toml_text import toml_text
from titan_cpt.data.inventory import DataInventory
from titan_cpt.planning.parallel import min_world_size
from titan_cpt.planning.planner import make_plan


def converted(module, keys, world_size=None):
    """The conversion of a table of dotted keys by a module of titan_cpt.convert."""
    conversion = Conversion(module.VERSION, keys, [Path("theirs.yml")])
    convert = getattr(module, f"convert_{module.__name__.rpartition('.')[2]}")
    convert(conversion, world_size)
    return conversion


def planned(conversion):
    """The config and the plan of the file that is written for the conversion."""
    config = check_config(parse_toml(toml_text(conversion)), Path("ours.toml"))
    sources = {f"data.{name}" for name in config.datasets["data"].domains} or {"data"}
    return config, make_plan(config, DataInventory(dict.fromkeys(sources), 257), min_world_size(config))


def learning_rates(conversion, *, at):
    """The LR of steps, which are counted from 1 and need not be whole numbers."""
    from titan_cpt.planning.lr_schedules import lr_at

    stage = planned(conversion)[1].stages[0]
    return [lr_at(stage.schedule, step) for step in at]


def listed(conversion):
    """Every key of the other project's file in the three lists, as often as it is there."""
    findings = (*conversion.converted, *conversion.unmatched, *conversion.decisions)
    return sorted(key for finding in findings if finding.found for key in finding.keys)


def found(findings, key):
    """The finding that lists a key."""
    (one,) = [finding for finding in findings if key in finding.keys]
    return one
