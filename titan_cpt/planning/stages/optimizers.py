"""The optimizers of the stages: which one each has, combinations that are refused, and notes on changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from titan_cpt.config.schema import Config
from titan_cpt.config.stages import StageConfig
from titan_cpt.planning.plan import MUON_KEYS, MuonHyperparameters, OptimizerHyperparameters, StageCheckpoint, StagePlan
from titan_cpt.planning.plan_draft import PlanDraft

OPTIMIZER_NAME = "optimizer.name"
"""Key of a stage's recipe; a recipe without it is AdamW's."""


def optimizer_hyperparameters(config: Config, stage: StageConfig) -> OptimizerHyperparameters:
    """Optimizer and hyperparameters of a stage: [optimizer], overridden by [stages.optimizer]."""
    values = config.optimizer.model_dump()
    values |= stage.optimizer.model_dump(exclude_none=True) if stage.optimizer else {}
    muon = MuonHyperparameters(**{key: values[key] for key in MUON_KEYS}) if values["name"] == "Muon" else None
    return OptimizerHyperparameters((values["beta1"], values["beta2"]), values["eps"], values["weight_decay"], muon)


def optimizer_recipe(optimizer: OptimizerHyperparameters) -> dict[str, Any]:
    """The optimizer's keys of a stage's recipe; AdamW's are those from before there was a choice."""
    recipe: dict[str, Any] = {
        "optimizer.beta1": optimizer.betas[0],
        "optimizer.beta2": optimizer.betas[1],
        "optimizer.eps": optimizer.eps,
        "optimizer.weight_decay": optimizer.weight_decay,
    }
    if optimizer.muon is not None:
        recipe |= {OPTIMIZER_NAME: optimizer.name}
        recipe |= {f"optimizer.{key}": value for key, value in asdict(optimizer.muon).items()}
    return recipe


def optimizer_problems(draft: PlanDraft, stage: StagePlan) -> Iterator[str]:
    """A stage that keeps the optimizer state of a stage with another optimizer."""
    if not stage.keep_optimizer or not isinstance(stage.init, StageCheckpoint):
        return
    earlier = draft.stages[stage.init.stage].optimizer
    if earlier.name != stage.optimizer.name:
        yield other_optimizer(stage, earlier.name, of=f"stage {stage.init.stage!r}")


def other_optimizer(stage: StagePlan, found: str, *, of: str) -> str:
    """The message for a stage that keeps the optimizer state of initial weights with another optimizer."""
    continues = ', and lr.schedule = "continue" keeps it' if stage.schedule_offset else ""
    reset = "a schedule of its own" if stage.schedule_offset else 'optimizer_state = "reset"'
    return (
        f'stages.{stage.name}.optimizer_state: "keep" needs the state of {stage.optimizer.name}, which trains this '
        f"stage{continues}, and {of} has that of {found}: set stages.{stage.name}.optimizer.name to {found!r}, or give "
        f"the stage {reset}"
    )


def unused_muon_keys(config: Config) -> Iterator[str]:
    """Settings of Muon that no stage uses."""
    muon = [stage for stage in config.stages if optimizer_hyperparameters(config, stage).muon is not None]
    defaults = type(config.optimizer)()
    if not muon:
        set_keys = [key for key in MUON_KEYS if getattr(config.optimizer, key) != getattr(defaults, key)]
        yield from (_unused(f"optimizer.{key}", "every stage", "optimizer.name") for key in set_keys)
    for stage in config.stages:
        if stage.optimizer is not None and stage not in muon:
            where = f"stages.{stage.name}.optimizer"
            set_keys = [key for key in MUON_KEYS if getattr(stage.optimizer, key) is not None]
            yield from (_unused(f"{where}.{key}", "this stage", f"{where}.name") for key in set_keys)


def _unused(key: str, where: str, name: str) -> str:
    return f'{key}: is of Muon, and AdamW trains {where}: remove it, or set {name} = "Muon"'


def muon_with_other_kernels(config: Config) -> str | None:
    """The message for Muon with settings that it does not support."""
    found = ['optimizer.implementation = "triton"'] if config.optimizer.implementation == "triton" else []
    found += ["training.cuda_graphs"] if config.training.cuda_graphs else []
    found += ["training.enable_cpu_offload"] if config.training.enable_cpu_offload else []
    if not found or all(optimizer_hyperparameters(config, stage).muon is None for stage in config.stages):
        return None
    return f"{OPTIMIZER_NAME}: Muon is not supported together with {' and '.join(found)}: remove it, or use AdamW"


def triton_with_offload(config: Config) -> str | None:
    """The message for the Triton kernel with weights in host memory."""
    if not config.training.enable_cpu_offload or config.optimizer.implementation != "triton":
        return None
    return (
        'optimizer.implementation: "triton" updates weights in GPU memory, and training.enable_cpu_offload keeps them '
        'on the CPU: use "fused", or set enable_cpu_offload to false'
    )


def optimizer_notes(stages: Sequence[StagePlan]) -> Iterator[str]:
    """A note for each stage that trains the weights of a stage with another optimizer."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if isinstance(stage.init, StageCheckpoint):
            earlier = by_name[stage.init.stage]
            if earlier.optimizer.name != stage.optimizer.name:
                yield changed_optimizer(stage, earlier.optimizer.name)


def changed_optimizer(stage: StagePlan, before: str) -> str:
    """The note on a stage whose initial weights were trained with another optimizer."""
    return (
        f"stages.{stage.name}.optimizer: its initial weights were trained with {before}, and {stage.optimizer.name} "
        "trains them further; Qu et al. 2026 (arXiv:2605.10468) saw models of Adam lose more of what they knew "
        "when Muon fine-tuned them"
    )
