"""Training history of a checkpoint, from its manifest: stages, base model, tokenizer, longest sequence."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_config import read_config
from titan_cpt.checkpoint.tokenizer_check import CHECKPOINT_PREFIX, HUB_PREFIX, allowed_mismatch, tokenizer_of_manifest
from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.common.run_folder import CONFIG_FILE
from titan_cpt.common.weights.named_weights import named_weights, split_average
from titan_cpt.common.weights.new_rows import new_rows_in
from titan_cpt.data.tokenizer.tokenizer import BYTES, Tokenizer, load_tokenizer
from titan_cpt.errors import AccessError, CheckpointError, DataError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_RUNS = 50  # a longer chain of runs that start from each other is a cycle


@dataclass(frozen=True)
class TrainedStage:
    """A stage in the training history of a checkpoint.

    Attributes:
        name: the stage's name.
        steps: steps that these weights were trained for: the whole stage, or up to the step that the next stage
            started from.
        init: the stage's first weights: random, hf:NAME, checkpoint:PATH or STAGE@STEPS, with @average for an average.
    """

    name: str
    steps: int
    init: str


@dataclass(frozen=True)
class BaseModelInfo:
    """The pretrained model that training started from.

    Attributes:
        name: folder or Hugging Face hub name, as given in the config.
        config: its config.json; empty if it is no longer available.
        folder: its folder; None for a hub name that is not in the cache, and for a folder that no longer exists.
        others: names of further base models, of merged weights.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path | None
    others: tuple[str, ...] = ()


def training_history(record: Mapping[str, Any]) -> list[TrainedStage]:
    """The stages of this run that trained a manifest's weights, oldest first; empty for an imported model."""
    recipe = record["recipe"]
    stage = str(record["stage"])
    steps = int(record["steps_done"])
    found: list[TrainedStage] = []
    while f"stages.{stage}.init" in recipe:
        init = str(recipe[f"stages.{stage}.init"])
        found.insert(0, TrainedStage(stage, steps, init))
        parent, _, at = split_average(init)[0].rpartition("@")
        is_first = init.startswith((HUB_PREFIX, CHECKPOINT_PREFIX)) or f"stages.{parent}.init" not in recipe
        if is_first or len(found) > len(recipe):  # a damaged manifest may name stages in a cycle
            break
        stage = parent
        steps = int(at)
    return found


def initial_checkpoint(init: str) -> Path:
    """The folder of an `init` of the form checkpoint:PATH or checkpoint:PATH@average."""
    return named_weights(init.removeprefix(CHECKPOINT_PREFIX)).folder


def find_base_model(record: Mapping[str, Any]) -> BaseModelInfo | None:
    """The pretrained model that the weights started from, also through other runs; None for a random initialization."""
    for _ in range(_MAX_RUNS):
        if "released" in record:
            name = str(record["released"]["name"])
            return BaseModelInfo(name, record["released"]["config"], Path(name) if Path(name).is_dir() else None)
        if "merge" in record:
            return _base_of_merge(record["merge"])
        history = training_history(record)
        init = history[0].init if history else "random"
        if init.startswith(HUB_PREFIX):
            return _hub_model(init.removeprefix(HUB_PREFIX))
        if not init.startswith(CHECKPOINT_PREFIX):
            return None
        try:
            record = manifest.read(initial_checkpoint(init))
        except (CheckpointError, AccessError):
            return BaseModelInfo(init.removeprefix(CHECKPOINT_PREFIX), {}, None)
    return None


def find_merge(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The manifest's entry of the merge whose weights these are or that training began with, also through other runs.

    None if there is none, or if its manifest can no longer be read.
    """
    for _ in range(_MAX_RUNS):
        if "merge" in record:
            merge: Mapping[str, Any] = record["merge"]
            return merge
        history = training_history(record)
        if not history or not history[0].init.startswith(CHECKPOINT_PREFIX):
            return None
        try:
            record = manifest.read(initial_checkpoint(history[0].init))
        except (CheckpointError, AccessError):
            return None
    return None


def _base_of_merge(merge: Mapping[str, Any]) -> BaseModelInfo | None:
    """The base models of merged weights, from the manifest's entry, which has a config.json if all have the same."""
    if not merge["base_models"]:
        return None
    first, *others = merge["base_models"]
    return BaseModelInfo(first, merge["base_config"], _hub_model(first).folder, tuple(others))


def _hub_model(name: str) -> BaseModelInfo:
    folder = Path(name) if Path(name).is_dir() else _in_cache(name)
    try:
        return BaseModelInfo(name, read_config(folder) if folder else {}, folder)
    except CheckpointError:
        return BaseModelInfo(name, {}, None)


def _in_cache(name: str) -> Path | None:
    """The folder of a hub model in the cache of huggingface_hub, without network access."""
    try:
        from huggingface_hub import try_to_load_from_cache  # an extra
    except ImportError:
        return None
    repository, _, revision = name.partition("@")
    try:
        config = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except ValueError:  # not a valid name of a hub repository
        return None
    return Path(config).parent if isinstance(config, str) else None


def tokenizer_mismatch(record: Mapping[str, Any], checkpoint: Path) -> str | None:
    """A note if the weights were trained with a second tokenizer, as tokenizer.allow_mismatch allows; else None.

    Searches the `transition` events in metrics.jsonl of the run, then of the runs that it branched from or took its
    first weights from, as far as their folders exist.
    """
    for _ in range(_MAX_RUNS):
        if "merge" in record:
            notes = [parent.get("tokenizer_mismatch") for parent in record["merge"]["parents"]]
            return next(filter(None, notes), None)
        history = training_history(record)
        if not history:
            return None
        try:
            events = read_metrics(checkpoint.absolute().parents[1]).events
            begun = [one for one in events if one["name"] == "transition" and one.get("stage") == history[0].name]
            branched = [str(one.get("folder")) for one in events if one["name"] == "branch"]
            if begun and (note := allowed_mismatch(str(begun[-1].get("weights")))):
                return note
            if not begun and branched:
                checkpoint = Path(branched[-1])
            elif history[0].init.startswith(CHECKPOINT_PREFIX):
                checkpoint = initial_checkpoint(history[0].init)
            else:
                return None
            record = manifest.read(checkpoint)
        except (CheckpointError, AccessError, DataError):
            return None
    return None


def new_rows_by_stage(record: Mapping[str, Any], checkpoint: Path) -> dict[str, str]:
    """How each stage of the run initialized the rows of new tokens, from its `transition` events, in words."""
    try:
        events = read_metrics(checkpoint.absolute().parents[1]).events
    except (AccessError, DataError):
        return {}
    trained = {stage.name for stage in training_history(record)}
    began = [one for one in events if one["name"] == "transition" and one.get("stage") in trained]
    made = {str(one["stage"]): new_rows_in(str(one.get("weights"))) for one in began}
    return {stage: text for stage, text in made.items() if text is not None}


def extended_base(checkpoint: Path) -> str | None:
    """The tokenizer that the run's extends, as its config names it; None if it extends none or is unknown."""
    extend = ((_config_beside(checkpoint) or {}).get("tokenizer") or {}).get("extend") or {}
    base = extend.get("base")
    return base if isinstance(base, str) else None


def max_sequence_length(record: Mapping[str, Any], base_model: BaseModelInfo | None) -> int:
    """The longest sequence in tokens that the weights know: of any stage that trained them, or of the base model.

    Stages of earlier runs count as far as their manifests can be read; the base model's length is its
    max_position_embeddings.
    """
    pretrained = base_model.config.get("max_position_embeddings") if base_model else None
    return max([length for length in (pretrained, *_trained_lengths(record)) if isinstance(length, int)], default=2048)


def _trained_lengths(record: Mapping[str, Any]) -> Iterator[object]:
    """seq_len of every stage that trained a manifest's weights, through runs that start from each other."""
    for _ in range(_MAX_RUNS):
        recipe = record["recipe"]
        history = training_history(record)
        usual = recipe.get("training.seq_len")
        yield from [recipe.get(f"stages.{stage.name}.seq_len", usual) for stage in history] or [usual]
        if not history or not history[0].init.startswith(CHECKPOINT_PREFIX):
            return
        try:
            record = manifest.read(initial_checkpoint(history[0].init))
        except (CheckpointError, AccessError):
            return


def find_tokenizer(
    record: Mapping[str, Any], checkpoint: Path, requested: str | None, base_model: BaseModelInfo | None
) -> Tokenizer | None:
    """The requested tokenizer, else the run's, else the base model's; None if none of them is known.

    It puts the begin-of-document token before a prompt if training documents began with it.

    Raises:
        DataError: it cannot be read, or is not the one that the weights were trained with.
    """
    path = requested or tokenizer_path(record, checkpoint, base_model)
    if path is None:
        return None
    tokenizer = load_tokenizer(path)
    trained_with = tokenizer_of_manifest(record, checkpoint)
    if trained_with is not None and not trained_with.is_that_of(path):
        raise DataError(
            f"{path}: is not the tokenizer of the run (its fingerprint is {tokenizer.fingerprint[:12]}, the run's is "
            f"{trained_with.fingerprint[:12]}); give --tokenizer the file that the run was trained with"
        )
    rows = record["recipe"]["model.vocab_size"]
    if tokenizer.vocab_size > rows:
        raise DataError(
            f"{path}: has {tokenizer.vocab_size:,} ids, but the model has {rows:,} vocabulary rows: it belongs to "
            "another model; give --tokenizer the right one"
        )
    return tokenizer.with_bos(_adds_bos(record, tokenizer))


def tokenizer_path(record: Mapping[str, Any], checkpoint: Path, base_model: BaseModelInfo | None = None) -> str | None:
    """The tokenizer of a checkpoint's weights: "bytes", a tokenizer.json or a folder that holds one; None if unknown.

    It is that of the run, of the merge's inputs, or of the base model, as far as its files are on this machine.

    Args:
        base_model: as `find_base_model` found it; None to find it here.
    """
    if "merge" in record:
        path = record["merge"].get("tokenizer_path")
        if path == BYTES or (path is not None and Path(path).exists()):
            return str(path)
    elif (path := _tokenizer_path_of_run(checkpoint)) is not None:
        return path
    base_model = base_model or find_base_model(record)
    if base_model and base_model.folder and (base_model.folder / "tokenizer.json").exists():
        return str(base_model.folder)
    if manifest.TRAINED_BY in record and tokenizer_of_manifest(record, checkpoint) is not None:
        path = record["released"]["tokenizer"]["where"]  # --tokenizer of the import
        return path if path == BYTES or Path(path).exists() else None
    return None


def documents_begin_with_bos(record: Mapping[str, Any], checkpoint: Path, requested: str | None = None) -> bool | None:
    """Whether the documents that trained the weights began with a begin-of-document token; None if that is unknown."""
    if "released" not in record:
        return record["recipe"].get("tokenizer.add_bos", False) is True
    try:
        tokenizer = find_tokenizer(record, checkpoint, requested, find_base_model(record))
    except DataError:  # raised again when the checkpoint is loaded
        return None
    return None if tokenizer is None else tokenizer.add_bos


def _adds_bos(record: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """tokenizer.add_bos of the run; for an imported model, whether its tokenizer adds a begin-of-document token."""
    if "released" in record:
        return tokenizer.bos is not None and tokenizer.bos.added and len(tokenizer.bos.ids) == 1
    return record["recipe"].get("tokenizer.add_bos", False) is True


def precision_of_run(checkpoint: Path) -> str:
    """Compute dtype of the run that a checkpoint belongs to; float32 for a checkpoint outside a run's folder."""
    config = _config_beside(checkpoint)
    return str((config or {}).get("training", {}).get("mixed_precision_param", "float32"))


def _tokenizer_path_of_run(checkpoint: Path) -> str | None:
    """tokenizer.path in the run's config.toml; None for a checkpoint outside a run's folder."""
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
