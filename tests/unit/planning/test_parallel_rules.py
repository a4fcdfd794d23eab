"""Parallelism rules: every refused combination has its key, reason and nearest valid choice; valid ones are planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from plans import ASYNC, CP, PARALLEL_TOML, PP, RING, TP

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import PlanError
from titan_cpt.planning.parallel_rules import RULES
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.planner import make_plan

SCHEDULE = "parallelism.pipeline_parallel_schedule"
LLAMA = {"model.family": "llama"}

REFUSED = [
    (5, {TP: "2"}, ["5 ranks do not divide into groups of 2", "use 4 ranks"]),
    (4, {"parallelism.data_parallel_shard_degree": "3"}, ["data_parallel_shard_degree: must be 4 on 4 ranks"]),
    (4, {TP: "4"}, ["6 attention heads cannot be split evenly over 4 ranks", "use 3 or 6"]),
    (
        4,
        {TP: "4", **LLAMA, "model.heads": "12", "model.kv_heads": "2"},
        ["2 key/value heads cannot be split evenly over 4 ranks", "use 2"],
    ),
    (2, {PP: "2", **LLAMA, "model.tie_embeddings": "true"}, ["tied weights cannot be on two pipeline stages", "to 1"]),
    (
        3,
        {TP: "3", "model.mlp_width": "128"},
        ["128 MLP features cannot be split evenly over 3 ranks", "use 2 or 4"],
    ),
    (2, {CP: "2", "training.seq_len": "50"}, ["training.seq_len: 50", "use 48 or 52"]),
    (
        2,
        {CP: "2", RING: "ring", **LLAMA, "model.kv_heads": "3", "model.sliding_window": "20"},
        ["no sliding window (model.sliding_window = 20)"],
    ),
    (2, {PP: "2", SCHEDULE: "1f1b"}, ["unknown '1f1b'", "Allowed: GPipe, 1F1B"]),
    (3, {PP: "3"}, ["8 layers do not divide into 3 pipeline stages", "use 2 or 4"]),
    (8, {PP: "8", SCHEDULE: "DualPipeV"}, ["8 layers do not divide into 16 pipeline stages", "use 4"]),
    (2, {PP: "2", "parallelism.pipeline_parallel_microbatch_size": "3"}, ["local_batch_size = 8, got 3", "use 2 or 4"]),
    (4, {PP: "4", "training.local_batch_size": "2"}, ["1F1B on 4 ranks needs at least 4", "use 4 sequences"]),
    (
        4,
        {PP: "4", SCHEDULE: "Interleaved1F1B", "training.local_batch_size": "9"},
        ["needs a multiple of 2", "use 8 sequences"],
    ),
    (4, {PP: "4", SCHEDULE: "DualPipeV", "training.local_batch_size": "6"}, ["at least 8", "use 8 sequences"]),
    (
        2,
        {PP: "2", SCHEDULE: "ZBVZeroBubble", "parallelism.fsdp_reshard_after_forward": "always"},
        ["wrong gradients without an error", '"never"'],
    ),
    (2, {PP: "2", SCHEDULE: "DualPipeV", "compile.enable": "true"}, ["compile.enable", "Interleaved1F1B"]),
    (
        2,
        {PP: "2", SCHEDULE: "InterleavedZeroBubble", "activation_checkpoint.mode": "selective"},
        ["InterleavedZeroBubble makes two", 'mode = "full"'],
    ),
    (
        2,
        {TP: "2", "compile.enable": "true"},
        ["wrong gradients without an error under tensor parallelism", "degree to 1"],
    ),
    (1, {"activation_checkpoint.mode": "memory_budget"}, ["compile.enable = true"]),
    (
        1,
        {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "ops"},
        ["got 'ops'; did you mean \"op\"?"],
    ),
    (1, {"float8.enable_fsdp_float8_all_gather": "true"}, ["no float8 recipe is set", '"tensorwise"']),
    (
        2,
        {"float8.enable_fsdp_float8_all_gather": "true", "float8.recipe_name": "rowwise"},
        ['"rowwise" has a scale for each row', '"tensorwise"'],
    ),
    (
        2,
        {TP: "2", "float8.recipe_name": "tensorwise", "model.width": "72", "model.rotary_fraction": "0.5"},
        ["no layer can be converted", "must be multiples of 32"],
    ),
    (1, {"training.enable_cpu_offload": "true"}, ["a single rank has none", "use 2 ranks"]),
    (
        2,
        {"training.enable_cpu_offload": "true", "optimizer.implementation": "triton"},
        ["optimizer.implementation", "in GPU memory", 'use "fused"'],
    ),
    (2, {ASYNC: "true", TP: "2"}, ["compile.enable = true"]),
    (2, {"training.cuda_graphs": "true"}, ["single process only, and the run has 2", "set it to false"]),
    (
        1,
        {"training.cuda_graphs": "true", "float8.recipe_name": "rowwise", "profiling.enable_profiling": "true"},
        ["together with float8.recipe_name and profiling.enable_profiling", "set it to false, or remove"],
    ),
    (2, {"compile.enable": "true", "compile.scope": "model"}, ["compile.scope", "the run has 2", 'use "block"']),
    (
        1,
        {"compile.enable": "true", "compile.scope": "model", "activation_checkpoint.mode": "full"},
        ["no blocks to recompute", 'use scope "block"'],
    ),
    (
        1,
        {"compile.scope": "model", "compile.mode": "max-autotune-no-cudagraphs"},
        ["compile.scope and compile.mode: without effect", "set compile.enable to true"],
    ),
    (
        1,
        {"compile.enable": "true", "compile.mode": "max-autotune-no-cudagraphs", "job.deterministic": "true"},
        ["compile.mode", "job.deterministic excludes", 'use "default"'],
    ),
    (
        2,
        {CP: "2", "training.attention_backend": "flash"},
        ["context parallelism chooses the attention kernel itself", "context_parallel_degree to 1"],
    ),
    (1, {"training.attention_backend": "flex"}, ['"flex" is for training.document_mask', "set it to true"]),
    (5, {}, ["48 is not a multiple of data-parallel ranks (5) x training.local_batch_size (8) = 40"]),
]


def planned(tmp_path: Path, world_size: int, overrides: dict[str, str]) -> Plan:
    path = tmp_path / "config.toml"
    path.write_text(PARALLEL_TOML)
    config = load_config(path, list(overrides.items()))
    return make_plan(config, take_inventory(config), world_size)


@pytest.mark.parametrize(("world_size", "overrides", "words"), REFUSED)
def test_a_refusal_has_its_key_reason_and_remedy(
    tmp_path: Path, world_size: int, overrides: dict[str, str], words: list[str]
) -> None:
    """The message names the key, what is wrong, and what to write instead."""
    with pytest.raises(PlanError) as refusal:
        planned(tmp_path, world_size, overrides)

    for word in words:
        assert word in str(refusal.value)


def test_every_rule_is_tested_here() -> None:
    """One refusal for each rule, and that of the global batch, which planner.py makes."""
    assert len(REFUSED) >= len(RULES) + 1


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (6, {TP: "6"}),
        (2, {TP: "2", **LLAMA, "model.kv_heads": "2", "model.tie_embeddings": "true"}),
        (2, {TP: "2", **LLAMA, "model.kv_heads": "2", "model.qk_norm": "true"}),
        (2, {CP: "2", **LLAMA, "model.kv_heads": "3", "model.sliding_window": "20"}),
        (2, {TP: "2", "training.seq_len": "47"}),
        (4, {PP: "4", "training.local_batch_size": "4"}),
        (4, {PP: "4", SCHEDULE: "DualPipeV"}),
        (2, {PP: "2", "parallelism.fsdp_reshard_after_forward": "always"}),
        (2, {PP: "2", "compile.enable": "true"}),
        (2, {TP: "2", ASYNC: "true", "compile.enable": "true"}),
        (2, {"float8.recipe_name": "tensorwise", "float8.enable_fsdp_float8_all_gather": "true"}),
        (2, {"training.enable_cpu_offload": "true"}),
        (2, {PP: "2", SCHEDULE: "DualPipeV", "activation_checkpoint.mode": "full"}),
        (1, {"training.cuda_graphs": "true", "compile.enable": "true", "compile.scope": "model"}),
        (1, {"compile.enable": "true", "compile.scope": "model", "activation_checkpoint.mode": "memory_budget"}),
        (2, {TP: "2", "training.attention_backend": "fastest"}),
        (1, {"training.attention_backend": "flex", "training.document_mask": "true", "training.cuda_graphs": "true"}),
    ],
)
def test_valid_combinations_are_planned(tmp_path: Path, world_size: int, overrides: dict[str, str]) -> None:
    """Each is close to a refused one."""
    assert planned(tmp_path, world_size, overrides)
