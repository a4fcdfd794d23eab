"""Check that a stage's initial weights exist and were trained with the run's tokenizer. Does not import torch.

Under another tokenizer the same ids mean other tokens: such weights are worse than random ones, and no later check
would notice. A mismatch is an error, in `titan-cpt plan` if the files exist, and when the stage begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.averages import require_weights
from titan_cpt.common.run_folder import MANIFEST_FILE, checkpoint_folders
from titan_cpt.common.weights.named_weights import named_weights
from titan_cpt.config.schema import Config
from titan_cpt.config.stages import StageConfig
from titan_cpt.data.tokenizer.ids_fingerprint import ids_fingerprint
from titan_cpt.data.tokenizer.tokenizer import BYTES, fingerprint_of
from titan_cpt.errors import AccessError, CheckpointError, DataError

HUB_PREFIX = "hf:"  # of stages.NAME.init
CHECKPOINT_PREFIX = "checkpoint:"
_RECORDED = {"where": str, "fingerprint": str, "ids": str | None}  # a merge may know only the fingerprint
_ALLOWED = "as tokenizer.allow_mismatch allows"


@dataclass(frozen=True)
class TrainingTokenizer:
    """The tokenizer that weights were trained with.

    Attributes:
        where: the file that this is read from.
        fingerprint: SHA-256 of its tokenizer.json.
        ids: its `ids_fingerprint`; None if only the file's fingerprint is recorded.
    """

    where: str
    fingerprint: str
    ids: str | None = None

    def is_that_of(self, path: str) -> bool:
        """Whether the tokenizer at `path` gives the same ids."""
        if self.ids is None or self.fingerprint == fingerprint_of(path):
            return self.fingerprint == fingerprint_of(path)
        return self.ids in (ids_fingerprint(path), ids_fingerprint(path, as_written=True))

    def as_record(self) -> dict[str, str | None]:
        """The entry in the manifest of an imported model or a merge, which `tokenizer_of_manifest` reads."""
        return {key: getattr(self, key) for key in _RECORDED}


def tokenizer_of_release(folder: Path) -> TrainingTokenizer | None:
    """The tokenizer in the folder of a Hugging Face model; None if it has no readable tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return TrainingTokenizer(str(file), fingerprint_of(str(file)), ids_fingerprint(str(file)))
    except DataError:
        return None


def tokenizer_of_manifest(record: Mapping[str, Any], folder: Path) -> TrainingTokenizer | None:
    """The tokenizer in the manifest of a run's checkpoint, an imported model or a merge; None if it is not recorded.

    Raises:
        CheckpointError: the manifest's entry is damaged.
    """
    where = str(folder / MANIFEST_FILE)
    found = record["data"].get("tokenizer")
    if isinstance(found, str):
        return TrainingTokenizer(where, found)
    source = "merge" if "merge" in record else "released"
    origin = record.get(source, {})
    entry = origin.get("tokenizer", {}) if isinstance(origin, Mapping) else None
    if not isinstance(entry, Mapping) or (entry and not _is_complete(entry)):
        raise CheckpointError(f"{where}: damaged: its {source}.tokenizer is {entry!r}")
    return TrainingTokenizer(where, entry["fingerprint"], entry["ids"]) if entry else None


def _is_complete(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has the keys of `TrainingTokenizer.as_record`."""
    return all(key in entry and isinstance(entry[key], kind) for key, kind in _RECORDED.items())


def require_same_tokenizer(stage: str, init: str, weights: TrainingTokenizer | None, config: Config) -> str | None:
    """Raise if weights were trained with another tokenizer than the run's.

    Args:
        stage: name of the stage that starts from them.
        init: the stage's `init`, for messages.
        weights: the tokenizer that the weights were trained with; None if unknown.
        config: the run's; its tokenizer.path exists.

    Returns:
        A note if the tokenizer is unknown or the mismatch is allowed; None if it is the same tokenizer.

    Raises:
        CheckpointError: it is another tokenizer.
    """
    path, extend = config.tokenizer.path, config.tokenizer.extend
    if weights is None:
        assumed = path if extend is None else extend.base
        return f"the tokenizer that the weights of {init} were trained with is unknown; assuming that it is {assumed}"
    if weights.is_that_of(path) or has_base_tokenizer(weights, config):
        return None
    mismatch = (
        f"the weights of {init} were trained with another tokenizer (fingerprint {weights.fingerprint[:12]} by "
        f"{weights.where}) than tokenizer.path = {path!r} (fingerprint {fingerprint_of(path)[:12]})"
    )
    if extend is not None:
        mismatch += (
            f" and than tokenizer.extend.base = {extend.base!r} (fingerprint {fingerprint_of(extend.base)[:12]})"
        )
    if config.tokenizer.allow_mismatch:
        return f"{mismatch}, {_ALLOWED}"
    remedy = "Extend theirs, name it in tokenizer.extend.base, and prepare the data with the extension"
    if extend is None:
        remedy = (
            "Set tokenizer.path to their tokenizer and prepare the data with it; if tokenizer.path extends theirs, "
            "name theirs in tokenizer.extend.base"
        )
    raise CheckpointError(
        f"stages.{stage}.init: {mismatch}: the same ids mean other tokens. {remedy}; or set "
        "tokenizer.allow_mismatch = true to train anyway"
    )


def has_base_tokenizer(weights: TrainingTokenizer | None, config: Config) -> bool:
    """Whether weights were trained with the tokenizer that the run's extends, so that its new tokens have no rows yet.

    Args:
        weights: the tokenizer that they were trained with; if unknown, None, it is assumed to be the base.
        config: the run's; its tokenizer.extend.base exists.
    """
    extend = config.tokenizer.extend
    return extend is not None and (weights is None or weights.is_that_of(extend.base))


def require_reset_with_new_rows(stage: str, *, keeps: bool) -> None:
    """Check that a stage that initializes rows of new tokens at its start resets the optimizer state.

    Raises:
        CheckpointError: it keeps the state.
    """
    if keeps:
        raise CheckpointError(
            f"stages.{stage}.optimizer_state: its initial weights were trained with tokenizer.extend.base, or with an "
            "unknown tokenizer, so the rows of the new tokens are initialized, and the kept moments would belong to "
            'other rows: set it to "reset"'
        )


def allowed_mismatch(weights: str) -> str | None:
    """The note of `require_same_tokenizer` on an allowed mismatch, in a `transition` event's `weights`; or None."""
    found = re.search(f"the weights of .*{re.escape(_ALLOWED)}", weights)
    return found[0] if found else None


def check_init_tokenizers(config: Config, stages: Iterable[str]) -> Iterator[str]:
    """`require_same_tokenizer` for the initial weights of these stages, as far as they are on this machine.

    Args:
        config: the run's.
        stages: names of its stages that have not begun.

    Yields:
        Its notes, with the stage's name.

    Raises:
        CheckpointError: a stage starts from weights of another tokenizer, or from an average that its checkpoint lacks.
    """
    if config.tokenizer.path != BYTES and not Path(config.tokenizer.path).exists():
        return
    by_name = {stage.name: stage for stage in config.stages}
    for stage in stages:
        note = _check(config, by_name[stage])
        if note is not None:
            yield f"stages.{stage}.init: {note}"


def check_planned_tokenizers(config: Config) -> Iterator[str]:
    """`check_init_tokenizers` for all stages. A mismatch of a stage that has begun is only a note."""
    names = [stage.name for stage in config.stages]
    begun = _stages_begun(Path(config.job.output_dir) / config.job.name)
    for index, stage in enumerate(names):
        try:
            yield from check_init_tokenizers(config, [stage])
        except (CheckpointError, AccessError) as error:
            if index >= begun:
                raise
            yield f"{error}. This stage has begun, and a resume does not load these weights again"


def _check(config: Config, stage: StageConfig) -> str | None:
    init = stage.init or ""
    folder = Path(init.partition(":")[2])
    named = named_weights(folder)
    if init.startswith(HUB_PREFIX) and folder.is_dir():
        weights = tokenizer_of_release(folder)
    elif init.startswith(CHECKPOINT_PREFIX) and (named.folder / MANIFEST_FILE).is_file():
        record = manifest.read(named.folder)
        require_weights(named, record)
        weights = tokenizer_of_manifest(record, named.folder)
    else:
        return None
    if has_base_tokenizer(weights, config):
        require_reset_with_new_rows(stage.name, keeps=stage.optimizer_state == "keep")
    note = require_same_tokenizer(stage.name, init, weights, config)
    if stage.new_rows is not None and weights is not None and weights.is_that_of(config.tokenizer.path):
        return (
            f"the weights of {init} have rows for the new tokens already: new_rows = {stage.new_rows!r} replaces them; "
            "remove it to keep them"
        )
    return note


def _stages_begun(run: Path) -> int:
    """Number of stages that have begun, from the checkpoints of the run; unreadable manifests are ignored."""
    indexes = [-1]
    try:
        for folder in checkpoint_folders(run):
            with suppress(CheckpointError, AccessError):
                indexes.append(manifest.read(folder)["stage_index"])
    except AccessError:
        return 0
    return max(indexes) + 1
