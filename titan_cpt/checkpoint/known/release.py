"""The release that a stage starts from, and the notes that compare the stage with the release's own training.

`hf:NAME` and `checkpoint:PATH` of an import name a release. A name on the hub decides; a folder on this machine is
known by its name, or by the cache of the hub, and otherwise counts as the release of `model.size`, of which it may hold
any revision. Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.tokenizer_check import CHECKPOINT_PREFIX, HUB_PREFIX
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.common.weights.named_weights import named_weights
from titan_cpt.config.schema import Config
from titan_cpt.errors import AccessError, CheckpointError
from titan_cpt.models.releases import release_of_hub_name, release_of_size, releases
from titan_cpt.planning.plan import StagePlan
from titan_cpt.planning.stages.release_notes import OtherTraining, ReleasedWeights, release_notes

_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+$")  # of huggingface_hub
_NOT_ARCHITECTURE = {"family", "size", "vocab_size", "options"}  # keys of [model] that a release may differ in


def known_release_notes(config: Config, stages: Sequence[StagePlan], token_ids: int | None) -> Iterator[str]:
    """`release_notes` of the stages that start from a release or an import of one.

    Args:
        token_ids: number of ids of the run's tokenizer; None if it is unknown.
    """
    found = {stage.init: released_weights(stage.init, config) for stage in stages if isinstance(stage.init, str)}
    weights = {init: weights for init, weights in found.items() if weights is not None}
    extends = config.tokenizer.extend is not None
    yield from release_notes(stages, weights, None if extends else token_ids)


def released_weights(init: str, config: Config) -> ReleasedWeights | None:
    """The release that an `init` names, known or not; None if it names weights of a run, or new ones."""
    if init.startswith(HUB_PREFIX):
        return _named(init.removeprefix(HUB_PREFIX), config)
    if not init.startswith(CHECKPOINT_PREFIX):
        return None
    checkpoint = named_weights(Path(init.removeprefix(CHECKPOINT_PREFIX))).folder
    if not (checkpoint / MANIFEST_FILE).is_file():
        return None
    try:
        record = manifest.read(checkpoint)
    except (CheckpointError, AccessError):
        return None  # reported when the stage begins
    released, trained_by = record.get("released"), record.get(manifest.TRAINED_BY)
    if isinstance(released, dict) and isinstance(trained_by, dict):
        return ReleasedWeights(str(released.get("name")), None, training=_other_training(trained_by))
    return _named(str(released["name"]), config) if isinstance(released, dict) and "name" in released else None


def _other_training(trained_by: Mapping[str, Any]) -> OtherTraining:
    lr = trained_by.get("next_lr", trained_by.get("lr"))
    return OtherTraining(str(trained_by.get("trainer")), trained_by.get("step"), trained_by.get("tokens"), lr)


def _named(name: str, config: Config) -> ReleasedWeights:
    """The release of a hub name, or of a folder, which may be gone: an import records the name it had."""
    if (folder := _folder(name)) is not None:
        return folder
    repository, _, revision = name.partition("@")
    if not Path(name).is_dir() and (release := release_of_hub_name(repository)) is not None:
        return ReleasedWeights(name, release, revision or "main")
    overridden = config.model.model_dump(exclude=_NOT_ARCHITECTURE, exclude_none=True)
    if Path(name).is_dir() and not overridden:
        release = release_of_size(config.model.family, config.model.size)
        if release is not None:
            by_size = f'{name}, by model.size = "{config.model.size}" the release {release.hub[0]},'
            return ReleasedWeights(by_size, release) if release.hub else ReleasedWeights(name, None)
    return ReleasedWeights(name, None)


def _folder(name: str) -> ReleasedWeights | None:
    """The release of a folder that has the release's name, with or without @REVISION; None for another name."""
    if not name.startswith((".", "/", "~")) and not Path(name).is_dir():
        return None
    path = Path(name).absolute().as_posix()
    if cached := _CACHED.search(path):
        release = release_of_hub_name(f"{cached['owner']}/{cached['name']}")
        return None if release is None else ReleasedWeights(name, release)
    last, _, revision = Path(path).name.partition("@")
    named = [each for each in releases() if last.lower() in [hub.partition("/")[2].lower() for hub in each.hub]]
    return ReleasedWeights(name, named[0], revision or None) if len(named) == 1 else None
