"""Notes on stages with longer sequences than their weights know: context extension needs another RoPE, or much text.

Sources: Xiong et al. 2023, arXiv:2309.16039, section 2.1 (adjusted base frequency); Peng et al. 2023, arXiv:2309.00071
(YaRN).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from titan_cpt.planning.plan import StageCheckpoint, StagePlan, ancestors

NEW_WEIGHTS: Mapping[str, int] = {"random": 0}
"""Random weights know no sequence: the `known` of a plan that has read no files."""


def context_notes(stages: Sequence[StagePlan], known: Mapping[str, int]) -> Iterator[str]:
    """The notes of the stages whose first weights are known, in order.

    Args:
        known: `init` of the first stage of a lineage -> the longest sequence in tokens that these weights know. Stages
            of other lineages get no note.
    """
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        earlier = list(ancestors(stage, by_name))
        first = (earlier or [stage])[-1].init
        if not isinstance(first, str) or first not in known:
            continue
        longest = max(known[first], *(each.seq_len for each in earlier), 0)
        if "rope.kind" in stage.recipe:
            scaled_before = isinstance(stage.init, StageCheckpoint) and by_name[stage.init.stage].spec.rope_scaling
            yield from _new_scaling(stage, 0 if scaled_before else longest)
        elif "rope.base" not in stage.recipe:
            yield from _same_rope(stage, longest)


def _same_rope(stage: StagePlan, longest: int) -> Iterator[str]:
    scaling = stage.spec.rope_scaling
    scaled_from = None if scaling is None else scaling.original_seq_len
    covered = max(longest, 0 if scaling is None or scaled_from is None else int(scaling.factor * scaled_from))
    if not longest or stage.seq_len <= covered:
        return
    original = scaled_from or longest
    yield (
        f"stages.{stage.name}: trains on sequences of {stage.seq_len:,} tokens with the RoPE of weights that know "
        f"{covered:,}, so that later positions are new to them. They need less text to learn these with rope = "
        "{ base = ... }, larger than "
        f"{stage.spec.rope_base:,.10g} (ABF: arXiv:2309.16039 takes 500,000 instead of 10,000 for 32,768 tokens), or "
        f'with rope = {{ kind = "yarn", factor = {stage.seq_len / original:.6g}, original_seq_len = {original} }} '
        "(arXiv:2309.00071)"
    )


def _new_scaling(stage: StagePlan, longest: int) -> Iterator[str]:
    """Notes on a scaling that the stage sets.

    Args:
        longest: longest sequence that the weights know; 0 if an earlier scaling makes a comparison meaningless.
    """
    scaling = stage.spec.rope_scaling
    if scaling is None or scaling.original_seq_len is None:
        return
    covered = scaling.factor * scaling.original_seq_len
    if covered < stage.seq_len:
        yield (
            f"stages.{stage.name}.rope: scales to factor x original_seq_len = {covered:,.10g} tokens, and the stage "
            f"trains on sequences of {stage.seq_len:,}: factor = {stage.seq_len / scaling.original_seq_len:.6g} covers "
            "them"
        )
    if longest and longest != scaling.original_seq_len:
        yield (
            f"stages.{stage.name}.rope.original_seq_len: is {scaling.original_seq_len:,}, but the longest sequences "
            f"that these weights know have {longest:,} tokens"
        )
