"""The layouts that are compared with one process, by world size; docs/parallelism.md lists the same ones as tested."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

SCHEDULES = ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")

IS_OLD_TORCH = torch.__version__ < "2.13"
"""Over gloo torch 2.11 runs neither V schedules, in which a rank sends to itself, nor float8 all-gathers."""
V_SCHEDULE = "1F1B" if IS_OLD_TORCH else "ZBVZeroBubble"

_KEYS = {
    "rep": "parallelism.data_parallel_replicate_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "pp": "parallelism.pipeline_parallel_degree",
    "cp": "parallelism.context_parallel_degree",
    "schedule": "parallelism.pipeline_parallel_schedule",
    "size": "parallelism.pipeline_parallel_microbatch_size",
    "reshard": "parallelism.fsdp_reshard_after_forward",
    "gathered_logits": "parallelism.disable_loss_parallel",
    "ac": "activation_checkpoint.mode",
    "select": "activation_checkpoint.selective_ac_option",
    "compile": "compile.enable",
    "layers": "model.layers",
    "length": "training.seq_len",
    "offload": "training.enable_cpu_offload",
    "float8": "float8.recipe_name",
    "gather": "float8.enable_fsdp_float8_all_gather",
}

BF16 = {"training.mixed_precision_param": "bfloat16", "stages.first.lr.max": "1e-4"}
"""Adam's first steps are the gradient's sign times the LR: at 1e-3 a sign that bf16's rounding turns, in whatever
layout, moves the later losses and gradient norms by as much as the tolerance."""

AVERAGED = {"averaging.kind": "like_decay", "averaging.last": "2", "averaging.every": "1"}
"""Averages of the weights, which are validated too."""

MUON = {"optimizer.name": "Muon", **AVERAGED}
"""Newton-Schulz runs in bfloat16, in which a last bit of a gradient may turn the rounding of an update."""

MASKED = {
    "datasets.pages.train": "lines",
    "datasets.pages.validation": "lines-validation",
    "training.document_mask": "true",
    "training.document_positions": "true",
}
"""Documents of a line each, several in a sequence, which attention does not cross."""

SECOND_MASKED = {
    "toml": "gpt_neox-two-stages",
    "datasets.pages.train": "lines",
    "datasets.pages.validation": "lines-validation",
    "stages.second.document_mask": "true",
}
"""Only the second stage has the mask: a pipeline gets other arguments in the middle of a run."""

FROZEN = {
    "head": {"stages.first.trainable": '["head"]'},  # nothing is trained in the first pipeline stages
    "ends": {
        "stages.first.trainable": '["embedding", "head"]',
        "stages.first.lr_scale": "{ embedding = 0.5 }",
    },
    "part": {
        "stages.first.trainable": '["blocks.2", "blocks.3.mlp", "final_norm"]',
        "stages.first.lr_scale": '{ "blocks.*.mlp" = 3.0, "blocks.2.mlp.up" = 0.5 }',
    },
    "embedding": {"stages.first.trainable": '["embedding"]'},
    "rows": {
        "tokenizer": '{ path = "extended.json", extend = { base = "base.json" } }',
        "stages.first.trainable": '["head.new", "blocks.1"]',
        "stages.first.lr_scale": '{ "head.new" = 2.0 }',
    },
    "turns": {
        "toml": "gpt_neox-two-stages",
        "stages.first.trainable": '["blocks.3.attention", "head"]',
        "stages.second.trainable": '["blocks", "head"]',
        "stages.second.lr_scale": "{ blocks = 2.0 }",
    },
}
"""What stages train; the two of "turns" one after another, in which the head keeps its optimizer state."""

LLAMAS = {
    "llama": {},  # 12 heads of queries, 4 of keys and values
    "qwen2": {"model.qkv_bias": "true"},
    "qwen3": {"model.qk_norm": "true", "model.head_width": "16"},
    "tied": {"model.tie_embeddings": "true"},
    "windowed": {
        "model.sliding_window": "20",  # of 48 positions
        "model.rope_scaling": '{ kind = "yarn", factor = 4.0, original_seq_len = 16 }',
    },
}
"""The kinds of Llama, each with what is laid over the tests' llama.toml."""

OTHERS = {
    "olmo2": {"model.family": "olmo"},
    "olmo3": {
        "model.family": "olmo",
        "model.global_interval": "2",  # of 4 layers; the others have the sliding window
        **LLAMAS["windowed"],
    },
    "smollm3": {"model.family": "smollm3"},  # the last of four layers has no rotary positions
    "gemma3": {  # of four layers the second and the last are global
        "model.family": "gemma3",
        "model.global_interval": "2",
        "model.sliding_window": "20",
        "model.rope_scaling": '{ kind = "linear", factor = 8.0 }',
    },
    "gemma3-untied": {"model.family": "gemma3", "model.global_interval": "2", "model.tie_embeddings": "false"},
}
"""Other families, likewise."""


@dataclass(frozen=True)
class Case:
    """One run of the trainer.

    Attributes:
        name: of the run's folder.
        world_size: ranks.
        overrides: dotted key to value, over the tests' TOML.
        against: the run of one process with the same model and precision.
        precision: "float32", "bfloat16", "Muon" (float32 but for Newton-Schulz), "float8, one scale" where the same
            tensors are scaled as in one process, or "float8"; each has its tolerance.
        model: "gpt_neox", one of `LLAMAS` or `OTHERS`, or "packed": a GPT-NeoX on masked, packed documents.
        frozen: one of `FROZEN`, or none: all weights are trained.
    """

    name: str
    world_size: int
    overrides: dict[str, str] = field(default_factory=dict)
    against: str = "one"
    precision: str = "float32"
    model: str = "gpt_neox"
    frozen: str | None = None

    @property
    def runs_here(self) -> bool:
        """Whether this torch can run it."""
        newer = (
            self.overrides.get(_KEYS["schedule"]) in ("ZBVZeroBubble", "DualPipeV") or _KEYS["gather"] in self.overrides
        )
        return not (IS_OLD_TORCH and newer)


def _case(
    world_size: int,
    *,
    model: str = "gpt_neox",
    bf16: bool = False,
    masked: bool = False,
    muon: bool = False,
    averaged: bool = False,
    frozen: str | None = None,
    rows: int | None = None,
    **keys: int | str | bool,
) -> Case:
    """A case from the short names of `_KEYS`; `rows` is the local batch.

    Under TP and CP, whose operations cost most on a CPU, fewer and larger batches make up a step unless it says so.
    In float8 a rank scales what it holds: where that is a share of a tensor (TP, CP), or weights are cast from float32
    instead of bfloat16 (the gather), it rounds otherwise than one process does.
    """
    if rows is None and {"tp", "cp"} & set(keys) and "float8" not in keys:
        rows = min(4, 8 * int(keys.get("tp", 1)) * int(keys.get("pp", 1)) * int(keys.get("cp", 1)) // world_size)
        keys |= {"size": rows // 2} if "pp" in keys and rows > 2 else {}
    rows = rows or 2
    overrides = {_KEYS[key]: str(value).lower() if value is True else str(value) for key, value in keys.items()}
    overrides["training.local_batch_size"] = str(rows)
    words = [f"w{world_size}", *(f"{key}_{value}" for key, value in keys.items()), f"rows_{rows}"]
    if bf16:
        overrides |= BF16
        words.append("bf16")
    against = "one-bf16" if bf16 else "one-deep" if "layers" in keys else "one-odd" if "length" in keys else "one"
    if model == "packed":
        overrides = {"toml": "packed", **overrides}
        words.append(model)
        against = model
    elif model != "gpt_neox":
        overrides = {"toml": "llama", **(LLAMAS | OTHERS)[model], **overrides}
        words.append(model)
        against = f"{model}-bf16" if bf16 else model
    if masked:
        overrides |= MASKED
        words.append("masked")
        against = f"{against}-masked"
    if muon or averaged:
        overrides |= MUON if muon else AVERAGED
        words.append("muon" if muon else "averaged")
        against = f"{against}-{words[-1]}"
    if frozen is not None:
        overrides |= FROZEN[frozen]
        words.append(f"frozen-{frozen}")
        against = f"{against}-frozen-{frozen}"
    precision = "bfloat16" if bf16 else "Muon" if muon else "float32"
    if "float8" in keys:
        against = f"one-{keys['float8']}" + ("-bf16" if bf16 else "")
        precision = "float8" if {"tp", "cp"} & set(keys) or (bf16 and "gather" in keys) else "float8, one scale"
    return Case("-".join(words), world_size, overrides, against, precision, model, frozen)


CASES: tuple[Case, ...] = (
    # one process: accumulation and activation checkpointing
    _case(1),
    _case(1, ac="full"),
    _case(1, ac="selective"),
    _case(1, ac="selective", select=2),
    # two ranks: every technique by itself
    _case(2),
    _case(2, rows=4),
    _case(2, bf16=True),
    _case(2, rep=2),
    _case(2, tp=2),
    _case(2, tp=2, gathered_logits=True),
    _case(2, tp=2, bf16=True),
    _case(2, tp=2, ac="selective"),
    _case(2, cp=2),
    _case(2, cp=2, bf16=True),
    _case(2, cp=2, ac="selective"),
    *(_case(2, pp=2, schedule=name, rows=4) for name in SCHEDULES),
    _case(2, offload=True),
    _case(2, offload=True, pp=2, bf16=True),
    _case(2, pp=2, size=2, rows=8),
    _case(2, pp=2, rows=4, bf16=True),
    _case(2, pp=2, schedule="ZBVZeroBubble", rows=4, bf16=True),
    _case(2, pp=2, ac="full"),
    _case(2, pp=2, schedule="ZBVZeroBubble", ac="full"),
    _case(2, pp=2, schedule="Interleaved1F1B", ac="selective"),
    _case(2, compile=True, ac="memory_budget"),
    _case(2, compile=True, bf16=True),
    _case(2, pp=2, compile=True),
    _case(2, cp=2, compile=True, ac="full"),
    # two ranks: the kinds of Llama; the plain one is in "qwen3", which only adds norms, and in those below
    *(_case(2, model=model) for model in LLAMAS if model != "llama"),
    *(_case(2, tp=2, model=model) for model in LLAMAS if model != "llama"),
    *(_case(2, cp=2, model=model) for model in ("qwen3", "windowed")),
    *(_case(2, pp=2, schedule=name, rows=4, model="llama") for name in ("1F1B", "ZBVZeroBubble")),
    _case(2, pp=2, schedule="ZBVZeroBubble", rows=4, model="qwen3"),
    _case(2, bf16=True, model="llama"),
    _case(2, bf16=True, model="tied"),
    _case(2, tp=2, bf16=True, model="llama"),
    _case(2, tp=2, gathered_logits=True, model="tied"),
    _case(2, pp=2, rows=4, bf16=True, model="llama"),
    _case(2, ac="full", model="llama"),
    _case(2, tp=2, ac="selective", model="llama"),
    _case(2, compile=True, model="llama"),
    _case(2, compile=True, bf16=True, model="llama"),
    # two ranks: other families
    _case(2, tp=2, ac="selective", model="olmo3"),
    _case(2, compile=True, masked=True, model="olmo3"),
    _case(2, tp=2, bf16=True, model="gemma3"),
    # two ranks: attention within documents
    _case(2, masked=True, ac="selective"),
    _case(2, tp=2, masked=True),
    _case(2, cp=2, masked=True),
    Case(
        "w2-pp_2-rows_4-second-masked",
        2,
        {**SECOND_MASKED, _KEYS["pp"]: "2", "training.local_batch_size": "4"},
        "second-masked",
    ),
    _case(2, pp=2, schedule="ZBVZeroBubble", rows=4, masked=True),
    _case(2, cp=2, masked=True, model="windowed"),
    _case(2, compile=True, masked=True, model="gemma3"),
    # two ranks: attention within packed documents, of which not every position has a target
    _case(2, model="packed"),
    _case(2, tp=2, model="packed"),
    _case(2, tp=2, gathered_logits=True, model="packed"),
    _case(2, cp=2, model="packed"),
    _case(2, pp=2, rows=4, model="packed"),
    # two ranks: Muon, and averages
    *(_case(2, muon=True, **keys) for keys in ({}, {"tp": 2}, {"pp": 2})),
    _case(2, averaged=True, offload=True),
    # two ranks: frozen weights
    *(_case(2, frozen=frozen) for frozen in ("ends", "part", "turns")),
    _case(2, tp=2, frozen="part"),
    _case(2, tp=2, bf16=True, frozen="turns"),
    *(_case(2, frozen="rows", **keys) for keys in ({}, {"tp": 2}, {"pp": 2, "schedule": V_SCHEDULE, "rows": 4})),
    _case(2, cp=2, frozen="ends"),
    _case(2, rep=2, frozen="head"),
    _case(2, rep=2, bf16=True, frozen="turns"),
    _case(2, offload=True, bf16=True, frozen="turns"),
    _case(2, ac="selective", frozen="part"),
    _case(2, compile=True, ac="full", frozen="part"),
    _case(2, muon=True, frozen="part"),
    _case(2, model="tied", frozen="embedding"),
    *(_case(2, pp=2, schedule=name, rows=4, frozen="head") for name in SCHEDULES),
    *(_case(2, pp=2, schedule=name, rows=4, frozen="turns") for name in ("1F1B", "ZBVZeroBubble")),
    _case(2, pp=2, schedule="InterleavedZeroBubble", rows=4, frozen="part"),
    _case(2, pp=2, rows=4, frozen="embedding"),
    # four ranks: two dimensions, and long pipelines
    _case(4),
    _case(4, rep=2),
    _case(4, rep=2, bf16=True),
    _case(4, tp=2, ac="full"),
    _case(4, tp=2, bf16=True),
    _case(4, tp=4),
    _case(4, cp=4),
    _case(4, cp=2, tp=2),
    *(_case(4, pp=2, schedule=name, rows=4) for name in SCHEDULES),
    *(_case(4, pp=4, schedule=name, rows=8, layers=8) for name in ("1F1B", "InterleavedZeroBubble", "DualPipeV")),
    _case(4, pp=2, tp=2),
    _case(4, pp=2, tp=2, schedule="Interleaved1F1B"),
    _case(4, pp=2, tp=2, schedule="ZBVZeroBubble", ac="selective", select=2),
    _case(4, pp=2, tp=2, schedule="InterleavedZeroBubble", ac="full"),
    _case(4, pp=2, tp=2, bf16=True),
    _case(4, pp=2, cp=2, schedule="ZBVZeroBubble", ac="full", rows=4),
    _case(4, pp=2, rep=2, schedule="DualPipeV", bf16=True, rows=4),
    _case(4, pp=2, reshard="always"),
    # four ranks: the kinds of Llama
    *(_case(4, tp=2, model=model) for model in ("qwen3", "tied")),
    _case(4, pp=2, tp=2, model="qwen3"),
    _case(4, pp=2, tp=2, schedule="ZBVZeroBubble", rows=4, model="llama"),
    _case(4, tp=2, bf16=True, model="llama"),
    _case(4, tp=4, model="llama"),
    _case(4, cp=2, tp=2, model="windowed"),
    # four ranks: other families
    _case(4, tp=4, model="olmo2"),
    _case(4, pp=2, tp=2, schedule="ZBVZeroBubble", rows=4, model="olmo2"),
    _case(4, cp=2, tp=2, masked=True, model="olmo3"),
    _case(4, cp=2, tp=2, masked=True, model="smollm3"),
    _case(4, cp=2, tp=2, masked=True, model="gemma3"),
    _case(4, pp=2, tp=2, model="gemma3-untied"),
    # four ranks: Muon on matrices that FSDP2 and TP shard
    _case(4, muon=True, tp=2),
    _case(4, muon=True, rep=2),
    # four ranks: frozen weights
    _case(4, rep=2, bf16=True, frozen="turns"),
    _case(4, tp=2, ac="full", frozen="ends"),
    _case(4, pp=2, schedule="DualPipeV", rows=4, frozen="turns"),
    _case(4, pp=2, tp=2, schedule="ZBVZeroBubble", frozen="head"),
    # four ranks: attention within documents
    _case(4, cp=2, tp=2, masked=True),
    _case(4, pp=2, cp=2, schedule="ZBVZeroBubble", ac="full", rows=4, masked=True),
    # six ranks: the paper's odd tensor-parallel degree
    _case(6, tp=3, pp=2),
    _case(6, tp=3, pp=2, schedule="ZBVZeroBubble"),
    _case(6, tp=3, pp=2, bf16=True),
    _case(6, tp=3, pp=2, length=50),
    _case(6, tp=3, length=50, gathered_logits=True),
    _case(6, tp=3, pp=2, length=50, masked=True),
    # eight ranks: three and four dimensions
    _case(8, rep=2, tp=2),
    _case(8, tp=2, pp=2, ac="selective", bf16=True),
    _case(8, tp=2, pp=2, schedule="DualPipeV", rows=4),
    _case(8, tp=2, pp=2, cp=2),
    _case(8, rep=2, pp=2, schedule="Interleaved1F1B"),
)

LENGTHS: tuple[Case, ...] = tuple(
    Case(
        f"lengths-{name}",
        world_size,
        {"toml": "lengths", "training.local_batch_size": rows, "stages.second.local_batch_size": own, **overrides},
        "lengths",
    )
    for world_size, name, rows, own, overrides in (
        (1, "accumulation", "2", "1", {}),
        (2, "fsdp", "2", "1", {}),
        (2, "tp", "4", "2", {_KEYS["tp"]: "2"}),
        (2, "cp", "2", "4", {_KEYS["cp"]: "2"}),
        (2, "pp", "4", "2", {_KEYS["pp"]: "2"}),
        (2, "pp-v", "4", "4", {_KEYS["pp"]: "2", _KEYS["schedule"]: V_SCHEDULE}),
        (4, "pp-fsdp", "2", "2", {_KEYS["pp"]: "2"}),
        (4, "tp-cp", "4", "2", {_KEYS["tp"]: "2", _KEYS["cp"]: "2"}),
    )
)
"""A batch-size ramp, then a stage of another length and batch; passes of `rows` sequences, then of `own`."""

QUICKSTART: tuple[Case, ...] = tuple(
    Case(f"quickstart-{name}", 2, {"toml": "quickstart", key: value}, "quickstart", model="quickstart")
    for name, key, value in (
        ("tp", "parallelism.tensor_parallel_degree", "2"),
        ("fsdp", "training.local_batch_size", "8"),
        ("pp", "parallelism.pipeline_parallel_degree", "2"),
    )
)
"""The shipped quick start, made small, in two processes by one override each, as docs/parallelism.md shows it whole."""

REFERENCES: dict[str, dict[str, str]] = {
    "quickstart": {"toml": "quickstart"},
    "lengths": {"toml": "lengths", "training.local_batch_size": "4"},
    "one": {},
    "one-bf16": BF16,
    "one-muon": MUON,
    "one-averaged": AVERAGED,
    "one-deep": {"model.layers": "8"},
    "one-odd": {"training.seq_len": "50"},
    "packed": {"toml": "packed"},
    **{model: {"toml": "llama", **overrides} for model, overrides in (LLAMAS | OTHERS).items()},
    "one-masked": MASKED,
    "second-masked": SECOND_MASKED,
    "one-odd-masked": {"training.seq_len": "50", **MASKED},
    "windowed-masked": {"toml": "llama", **LLAMAS["windowed"], **MASKED},
    "olmo3-masked": {"toml": "llama", **OTHERS["olmo3"], **MASKED},
    "smollm3-masked": {"toml": "llama", **OTHERS["smollm3"], **MASKED},
    "gemma3-masked": {"toml": "llama", **OTHERS["gemma3"], **MASKED},
    **{f"one-frozen-{name}": overrides for name, overrides in FROZEN.items()},
    "one-bf16-frozen-turns": {**BF16, **FROZEN["turns"]},
    "one-muon-frozen-part": {**MUON, **FROZEN["part"]},
    "tied-frozen-embedding": {"toml": "llama", **LLAMAS["tied"], **FROZEN["embedding"]},
    **{f"{model}-bf16": {"toml": "llama", **BF16, **LLAMAS[model]} for model in ("llama", "tied")},
    "gemma3-bf16": {"toml": "llama", **BF16, **OTHERS["gemma3"]},
}

FLOAT8: tuple[Case, ...] = (
    _case(2, float8="tensorwise"),
    _case(2, float8="tensorwise", gather=True),
    _case(2, float8="tensorwise", gather=True, ac="full"),
    _case(2, float8="tensorwise", gather=True, bf16=True),
    _case(2, float8="rowwise"),
    _case(2, float8="rowwise", bf16=True),
    _case(2, float8="rowwise_with_gw_hp", bf16=True),
    _case(2, float8="tensorwise", pp=2, size=2, rows=4),
    _case(2, float8="tensorwise", pp=2, size=2, rows=4, schedule="ZBVZeroBubble"),
    _case(2, float8="tensorwise", tp=2),
    _case(2, float8="tensorwise", tp=2, gather=True),
    _case(2, float8="rowwise", tp=2),
    _case(2, float8="tensorwise", cp=2),
)
"""In float8, which torchao emulates on a CPU; the micro-batches are those of one process, since they share a scale."""

FLOAT8_REFERENCES: dict[str, dict[str, str]] = {
    f"one-{recipe}{suffix}": {
        "float8.recipe_name": recipe,
        "training.local_batch_size": "2",
        **(BF16 if suffix else {}),
    }
    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp")
    for suffix in ("", "-bf16")
}

NEW_WEIGHTS = {
    "toml": "gpt_neox-two-stages",
    "stages.second.init": "random",
    "stages.second.optimizer_state": "reset",
    "stages.first.lr.max": "0.01",
    **FLOAT8_REFERENCES["one-tensorwise"],
}
"""A second stage that begins with other weights than those the first one, at a high LR, ends with."""

HANDED_ON: tuple[tuple[Case, Case], ...] = (
    (_case(4, tp=2), _case(4, pp=2, schedule=V_SCHEDULE, rows=4)),
    (_case(4, pp=2, tp=2), _case(4, rep=2)),
    (_case(4), _case(4, pp=2, cp=2)),
    (_case(4, tp=2, model="tied"), _case(4, model="tied")),
)
"""The first layout saves, the second goes on from its checkpoint."""
