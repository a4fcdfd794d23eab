"""Where a checkpoint's weights come from, as its manifest tells: stages, release, tokenizer, length of sequences."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_files import read_config
from titan_cpt.checkpoint.tokenizer_check import allowed_mismatch, tokenizer_of_manifest
from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.common.run_folder import CONFIG_FILE
from titan_cpt.data.tokenizer.tokenizer import BYTES, Tokenizer, load_tokenizer
from titan_cpt.errors import AccessError, CheckpointError, DataError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HUB, _CHECKPOINT = "hf:", "checkpoint:"
_RUNS_FOLLOWED = 50  # a chain of runs that is longer goes in a circle


@dataclass(frozen=True)
class Leg:
    """A stage that the weights went through.

    Attributes:
        steps: of it that were taken, all or up to the point where the next stage picked the weights up.
        init: where it began: random, hf:NAME, checkpoint:PATH, or STAGE@STEPS.
    """

    stage: str
    steps: int
    init: str


@dataclass(frozen=True)
class Origin:
    """The release that a line of stages began from.

    Attributes:
        name: folder or hub name, as it was given.
        config: its config.json; empty where it is not at hand any more.
        folder: where it lies; None for a hub name and a folder that is gone.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path | None


def legs(record: Mapping[str, Any]) -> list[Leg]:
    """The stages of this run behind a manifest's weights, the first one first; none for an import."""
    recipe, found = record["recipe"], list[Leg]()
    stage, steps = str(record["stage"]), int(record["steps_done"])
    while f"stages.{stage}.init" in recipe:
        init = str(recipe[f"stages.{stage}.init"])
        found.insert(0, Leg(stage, steps, init))
        parent, _, at = init.rpartition("@")
        if init.startswith((_HUB, _CHECKPOINT)) or f"stages.{parent}.init" not in recipe or len(found) > len(recipe):
            break
        stage, steps = parent, int(at)
    return found


def origin(record: Mapping[str, Any]) -> Origin | None:
    """The release that the weights began as, through other runs' checkpoints too; None where they began at random."""
    for _ in range(_RUNS_FOLLOWED):
        if "released" in record:
            name, config = str(record["released"]["name"]), record["released"]["config"]
            return Origin(name, config, Path(name) if Path(name).is_dir() else None)
        line = legs(record)
        init = line[0].init if line else "random"
        if init.startswith(_HUB):
            return _of_release(init.removeprefix(_HUB))
        if not init.startswith(_CHECKPOINT):
            return None
        try:
            record = manifest.read(Path(init.removeprefix(_CHECKPOINT)))
        except (CheckpointError, AccessError):
            return Origin(init.removeprefix(_CHECKPOINT), {}, None)
    return None


def _of_release(name: str) -> Origin:
    folder = Path(name) if Path(name).is_dir() else _in_cache(name)
    try:
        return Origin(name, read_config(folder) if folder else {}, folder)
    except CheckpointError:
        return Origin(name, {}, None)


def _in_cache(name: str) -> Path | None:
    """The folder of a hub name in the cache of huggingface_hub, without asking the network."""
    try:
        from huggingface_hub import try_to_load_from_cache  # an extra
    except ImportError:
        return None
    repository, _, revision = name.partition("@")
    try:
        config = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except ValueError:  # not a name that the hub could have
        return None
    return Path(config).parent if isinstance(config, str) else None


def tokenizer_mismatch(record: Mapping[str, Any], checkpoint: Path) -> str | None:
    """That the weights were trained on tokens of another tokenizer than before, as tokenizer.allow_mismatch allows.

    From the metrics.jsonl of the run, of those that it branched off or took its weights from, as far as they are there.
    """
    for _ in range(_RUNS_FOLLOWED):
        line = legs(record)
        if not line:
            return None
        try:
            events = read_metrics(checkpoint.absolute().parents[1]).events
            begun = [one for one in events if one["name"] == "transition" and one.get("stage") == line[0].stage]
            branched = [str(one.get("folder")) for one in events if one["name"] == "branch"]
            if begun and (note := allowed_mismatch(str(begun[-1].get("weights")))):
                return note
            if not begun and branched:
                checkpoint = Path(branched[-1])
            elif line[0].init.startswith(_CHECKPOINT):
                checkpoint = Path(line[0].init.removeprefix(_CHECKPOINT))
            else:
                return None
            record = manifest.read(checkpoint)
        except (CheckpointError, AccessError, DataError):
            return None
    return None


def longest_sequence(record: Mapping[str, Any], came_from: Origin | None) -> int:
    """Tokens that the weights know what to do with: what the run was trained on or the release promises."""
    released = came_from.config.get("max_position_embeddings") if came_from else None
    trained = record["recipe"].get("training.seq_len")
    return max([n for n in (released, trained) if isinstance(n, int)], default=2048)


def find_tokenizer(
    record: Mapping[str, Any], checkpoint: Path, asked: str | None, came_from: Origin | None
) -> Tokenizer | None:
    """The tokenizer that was asked for, the run's or the release's, in this order; None where none is known.

    It puts the begin-of-document token before a prompt if the documents in training had it.

    Raises:
        DataError: it cannot be read, or is not the one that the weights were trained with.
    """
    path = asked or _runs_tokenizer(checkpoint)
    if path is None and came_from and came_from.folder and (came_from.folder / "tokenizer.json").exists():
        path = str(came_from.folder)
    if path is None:
        return None
    words = load_tokenizer(path)
    trained_with = tokenizer_of_manifest(record, checkpoint)
    if trained_with is not None and not trained_with.is_that_of(path):
        raise DataError(
            f"{path}: is not the tokenizer of the run (fingerprint {words.fingerprint[:12]}, the run's is "
            f"{trained_with.fingerprint[:12]}); give --tokenizer the file that the run was trained with"
        )
    if words.vocab_size > record["recipe"]["model.vocab_size"]:
        raise DataError(
            f"{path}: has {words.vocab_size:,} ids, the model {record['recipe']['model.vocab_size']:,} rows: it is "
            "another model's; give --tokenizer the right one"
        )
    return words.with_bos(_documents_begin_with_bos(record, words))


def _documents_begin_with_bos(record: Mapping[str, Any], words: Tokenizer) -> bool:
    """What the run's recipe says of its training data; of a release, that its tokenizer was used as it is."""
    if "released" in record:
        return words.bos is not None and words.bos.added and len(words.bos.ids) == 1
    return record["recipe"].get("tokenizer.add_bos", False) is True


def precision_of(checkpoint: Path) -> str:
    """What the run that a checkpoint belongs to computes in; float32 for one outside of runs."""
    config = _config_beside(checkpoint)
    return str((config or {}).get("training", {}).get("mixed_precision_param", "float32"))


def _runs_tokenizer(checkpoint: Path) -> str | None:
    """What the config beside the run's stages says; None for a checkpoint that is not in a run's folder."""
    config = _config_beside(checkpoint)
    return None if config is None else str(config.get("tokenizer", {}).get("path", BYTES))


def _config_beside(checkpoint: Path) -> dict[str, Any] | None:
    path = checkpoint.absolute().parent.parent / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; give --tokenizer PATH") from None
