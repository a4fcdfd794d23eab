"""Options that are off by default: each gives the losses of the plain path, and resumes bit for bit.

An option that this commit's config does not have is skipped, so that the list may run ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from correctness import BF16, difference, killed_and_compared, train

if TYPE_CHECKING:
    from check import Context


@dataclass(frozen=True)
class Option:
    """A key whose value differs from its default.

    Attributes:
        allowed: largest difference of a loss from the plain path's, in nats per token.
        alike: overrides of both sides, such as compile for options that need it.
        resumes: whether a resumed run gives the same bits; not if each session chooses kernels by measuring, nor with
            cuDNN's attention, which torch excludes under job.deterministic.
    """

    name: str
    table: str
    key: str
    value: Any
    allowed: float
    alike: dict[str, Any]
    resumes: bool = True


COMPILED = {"compile": {"enable": True}}
OPTIONS: tuple[Option, ...] = (
    Option("AdamW in one Triton kernel", "optimizer", "implementation", "triton", 0.02, {}),
    Option("CUDA graphs", "training", "cuda_graphs", True, 0.02, COMPILED),
    Option("compile the whole model", "compile", "scope", "model", 0.02, COMPILED),
    Option("attention: cuDNN", "training", "attention_backend", "cudnn", 0.02, {}, resumes=False),
    Option("attention: flash", "training", "attention_backend", "flash", 0.02, {}),
    Option("attention: fastest", "training", "attention_backend", "fastest", 0.02, {}),
    Option("compile: max-autotune", "compile", "mode", "max-autotune-no-cudagraphs", 0.02, COMPILED, resumes=False),
)


def exists(option: Option) -> bool:
    """Whether the config has the key."""
    from titan_cpt.config.schema import Config

    table = Config.model_fields.get(option.table)
    return table is not None and option.key in getattr(table.annotation, "model_fields", {})


def merged(*tables: dict[str, Any]) -> dict[str, Any]:
    """Tables of overrides, key by key."""
    result: dict[str, Any] = {}
    for table in tables:
        for name, keys in table.items():
            result[name] = {**result.get(name, {}), **keys}
    return result


def parity(context: Context) -> None:
    """For each option: losses against the plain path, then kill -9 and resume with it."""
    plain: dict[str, Any] = {}
    for option in OPTIONS:
        if not exists(option):
            context.skip(option.name, f"{option.table}.{option.key} does not exist")
            continue
        if context.device == "cpu":
            context.skip(option.name, "needs a GPU")
            continue
        base = merged({"training": BF16}, option.alike)
        key = repr(base)
        if key not in plain:
            plain[key] = train(context, f"plain-{len(plain)}", **base)
        tables = merged(base, {option.table: {option.key: option.value}})
        slug = f"{option.key}-{option.value}"
        off = difference(train(context, slug, **tables), plain[key])
        context.row(
            f"{option.name}: against plain",
            value=f"{off:.2e} nats",
            expected=f"<= {option.allowed:g}",
            ok=off <= option.allowed,
        )
        if option.resumes:
            killed_and_compared(context, f"{option.name}, deterministic", kills=1, **tables)
