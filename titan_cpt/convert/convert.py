"""From a config file of another project to a `Conversion`: entry point of the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from titan_cpt.convert import gpt_neox, litgpt, megatron, torchtitan
from titan_cpt.convert.conversion import Conversion
from titan_cpt.convert.reading import read_files

_CONVERTERS = {
    "torchtitan": (torchtitan.VERSION, torchtitan.convert_torchtitan),
    "gpt-neox": (gpt_neox.VERSION, gpt_neox.convert_gpt_neox),
    "litgpt": (litgpt.VERSION, litgpt.convert_litgpt),
    "megatron": (megatron.VERSION, megatron.convert_megatron),
}


def convert_files(paths: Sequence[Path], project: str | None = None, world_size: int | None = None) -> Conversion:
    """Convert the config of another project.

    Args:
        paths: its file; for GPT-NeoX one or several, which are merged.
        project: whose file it is; None: recognized from its content.
        world_size: number of ranks there; None: what the file says, or the fewest that its degrees allow.

    Raises:
        ConfigError: a file cannot be read, is not recognized, or a value has the wrong type.
    """
    project, given = read_files(paths, project)
    version, convert = _CONVERTERS[project]
    conversion = Conversion(version, given, paths)
    convert(conversion, world_size)
    return conversion
