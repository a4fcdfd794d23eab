"""Which tokenizer the first weights of a stage were trained with, and whether it is the run's. Imports no torch.

The ids of one tokenizer mean other tokens than those of another: such weights are worse than random ones, and nothing
later in the run shows it. A mismatch is refused, by the plan where the files are there, and when the stage begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.common.run_folder import MANIFEST_FILE, checkpoint_folders
from titan_cpt.config.schema import Config
from titan_cpt.data.tokenizer.ids_fingerprint import ids_fingerprint
from titan_cpt.data.tokenizer.tokenizer import BYTES, fingerprint_of
from titan_cpt.errors import AccessError, CheckpointError, DataError

HUB_PREFIX = "hf:"  # of stages.NAME.init
CHECKPOINT_PREFIX = "checkpoint:"
_RECORDED = ("where", "fingerprint", "ids")
_ALLOWED = "as tokenizer.allow_mismatch allows"


@dataclass(frozen=True)
class TrainingTokenizer:
    """The tokenizer that weights were trained with.

    Attributes:
        where: the file that says so.
        fingerprint: SHA-256 of its tokenizer.json.
        ids: `ids_fingerprint` of it; None where only the file's is recorded.
    """

    where: str
    fingerprint: str
    ids: str | None = None

    def is_that_of(self, path: str) -> bool:
        """Whether the tokenizer at a path gives the same ids."""
        return self.fingerprint == fingerprint_of(path) or (self.ids is not None and self.ids == ids_fingerprint(path))

    def as_record(self) -> dict[str, str | None]:
        """For the manifest of an import; `of_manifest` reads it."""
        return {key: getattr(self, key) for key in _RECORDED}


def tokenizer_of_release(folder: Path) -> TrainingTokenizer | None:
    """The tokenizer of a released model's folder; None where it brings no tokenizer.json that can be read."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return TrainingTokenizer(str(file), fingerprint_of(str(file)), ids_fingerprint(str(file)))
    except DataError:
        return None


def tokenizer_of_manifest(record: Mapping[str, Any], folder: Path) -> TrainingTokenizer | None:
    """The tokenizer of a checkpoint's run or of an import; None where its manifest does not say.

    Raises:
        CheckpointError: what the manifest says is damaged.
    """
    where = str(folder / MANIFEST_FILE)
    found = record["data"].get("tokenizer")
    if isinstance(found, str):
        return TrainingTokenizer(where, found)
    released = record.get("released", {})
    told = released.get("tokenizer", {}) if isinstance(released, Mapping) else None
    if not isinstance(told, Mapping) or (told and not all(isinstance(told.get(key), str) for key in _RECORDED)):
        raise CheckpointError(f"{where}: damaged: its released.tokenizer is {told!r}")
    return TrainingTokenizer(where, told["fingerprint"], told["ids"]) if told else None


def require_same_tokenizer(stage: str, init: str, weights: TrainingTokenizer | None, config: Config) -> str | None:
    """Refuse weights of another tokenizer than the run's.

    Args:
        stage: the stage that begins with them.
        init: where they come from.
        weights: what is known of their tokenizer.
        config: names the run's tokenizer, which is there, and whether another one is allowed.

    Returns:
        A note where nothing is known, or where the mismatch is allowed; None where it is the same tokenizer.

    Raises:
        CheckpointError: it is another one.
    """
    ours = config.tokenizer.path
    if weights is None:
        return f"nothing says which tokenizer the weights of {init} were trained with; they are taken to be of {ours}"
    if weights.is_that_of(ours):
        return None
    both = (
        f"the weights of {init} were trained with another tokenizer (fingerprint {weights.fingerprint[:12]} by "
        f"{weights.where}) than tokenizer.path = {ours!r} (fingerprint {fingerprint_of(ours)[:12]})"
    )
    if config.tokenizer.allow_mismatch:
        return f"{both}, {_ALLOWED}"
    raise CheckpointError(
        f"stages.{stage}.init: {both}: the ids that they know mean other tokens. Set tokenizer.path to their tokenizer "
        "and prepare the data with it, or set tokenizer.allow_mismatch = true to train on regardless"
    )


def allowed_mismatch(told: str) -> str | None:
    """The note of `require_same` on an allowed mismatch within what a `transition` event tells of the weights."""
    found = re.search(f"the weights of .*{re.escape(_ALLOWED)}", told)
    return found[0] if found else None


def check_init_tokenizers(config: Config, stages: Iterable[str]) -> Iterator[str]:
    """Compare the tokenizers of the weights that these stages begin with, as far as they are on this machine.

    Args:
        config: the run's.
        stages: names of its stages that have not begun.

    Yields:
        The notes of `require_same`, with the stage.

    Raises:
        CheckpointError: one begins with weights of another tokenizer.
    """
    if config.tokenizer.path != BYTES and not Path(config.tokenizer.path).exists():
        return
    inits = {stage.name: stage.init or "" for stage in config.stages}
    for stage in stages:
        note = _check(config, stage, inits[stage])
        if note is not None:
            yield f"stages.{stage}.init: {note}"


def check_planned_tokenizers(config: Config) -> Iterator[str]:
    """`check_first_weights` of all stages; of those that have begun, which training resumes, a mismatch is a note."""
    names = [stage.name for stage in config.stages]
    begun = _stages_begun(Path(config.job.output_dir) / config.job.name)
    for place, stage in enumerate(names):
        try:
            yield from check_init_tokenizers(config, [stage])
        except (CheckpointError, AccessError) as error:
            if place >= begun:
                raise
            yield f"{error}. This stage has begun: a resume does not load these weights again"


def _check(config: Config, stage: str, init: str) -> str | None:
    folder = Path(init.partition(":")[2])
    if init.startswith(HUB_PREFIX) and folder.is_dir():
        weights = tokenizer_of_release(folder)
    elif init.startswith(CHECKPOINT_PREFIX) and (folder / MANIFEST_FILE).is_file():
        weights = tokenizer_of_manifest(manifest.read(folder), folder)
    else:
        return None
    return require_same_tokenizer(stage, init, weights, config)


def _stages_begun(run: Path) -> int:
    """How many stages of a run have begun, by its newest checkpoint; manifests that cannot be read are left out."""
    indexes = [-1]
    try:
        for folder in checkpoint_folders(run):
            with suppress(CheckpointError, AccessError):
                indexes.append(manifest.read(folder)["stage_index"])
    except AccessError:
        return 0
    return max(indexes) + 1
