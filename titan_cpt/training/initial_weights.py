"""The weights that a stage begins with: new ones, those of an earlier stage or another run, or a release's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from titan_cpt.checkpoint.hf_import import IMPORTED, load_released
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.checkpoint.tokenizer_check import require_same_tokenizer, tokenizer_of_manifest, tokenizer_of_release
from titan_cpt.common.recipe import differences
from titan_cpt.common.run_folder import checkpoint_folder
from titan_cpt.errors import CheckpointError
from titan_cpt.planning.plan import StageCheckpoint, StagePlan
from titan_cpt.training.state import Parts


def load_initial(parts: Parts, stage: StagePlan) -> str:
    """Bring a stage's first weights into the model, and the optimizer's state if it is kept; says where from.

    Raises:
        CheckpointError: what `init` means is missing or damaged, or holds another model.
    """
    if stage.init == "random":
        parts.model.init_weights(parts.plan.seed)
        return f"new, from seed {parts.plan.seed}"
    if isinstance(stage.init, str) and stage.init.startswith("hf:"):
        name = stage.init.removeprefix("hf:")
        accept = partial(_accept, parts, stage)
        return f"from {load_released(parts.model, name, parts.plan.spec, accept=accept)}"
    source, note = _source(parts, stage)
    load_state(source, parts.model, parts.optimizer if stage.keep_optimizer else None)
    return f"from {source}" if note is None else f"from {source}; {note}"


def _accept(parts: Parts, stage: StagePlan, folder: Path) -> str | None:
    """What is to be said of the tokenizer of a released model's folder; refuses another one than the run's."""
    return require_same_tokenizer(stage.name, str(stage.init), tokenizer_of_release(folder), parts.config)


def _source(parts: Parts, stage: StagePlan) -> tuple[Path, str | None]:
    """The checkpoint that a stage's `init` means, checked before it is read, and a note on its tokenizer."""
    if isinstance(stage.init, StageCheckpoint):
        folder = checkpoint_folder(parts.folder, stage.init.stage, stage.init.steps_done)
    else:
        folder = Path(stage.init.removeprefix("checkpoint:"))
    found, ours = parts.checkpoints.verify(folder), parts.plan.base_recipe
    if stage.keep_optimizer and found["kind"] == IMPORTED:
        raise CheckpointError(
            f"{folder}: is an import, which has no optimizer state to keep: set stages.{stage.name}.optimizer_state to "
            "reset"
        )
    there = found["recipe"]
    shape = {key for key in {*ours, *there} if key.startswith("model.")}
    changed = differences({k: there.get(k) for k in shape}, {k: ours.get(k) for k in shape})
    if changed:
        raise CheckpointError(f"{folder}: holds another model than the config's: {'; '.join(changed)}")
    init = stage.init if isinstance(stage.init, str) else f"stage:{stage.init.stage}"
    return folder, require_same_tokenizer(stage.name, init, tokenizer_of_manifest(found, folder), parts.config)
