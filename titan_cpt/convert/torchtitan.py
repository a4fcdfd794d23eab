"""torchtitan 0.2: its TOML files. Sources: config/job_config.py, components/lr_scheduler.py and models/ of 0.2.2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from titan_cpt.convert.conversion import Conversion
from titan_cpt.convert.muon import OTHER_OPTIMIZER
from titan_cpt.convert.shared import (
    constant_lr,
    end_point,
    linear_lr,
    set_batch,
    set_missing_data,
    set_model,
    set_placeholder_model,
)

VERSION = "torchtitan 0.2.2"

_LLAMA3 = {"kv_heads": 8, "rope_base": 500_000.0, "vocab_size": 128_256}
_QWEN3 = {
    "kv_heads": 8, "head_width": 128, "rope_base": 1_000_000.0, "norm_eps": 1e-6, "qk_norm": True,
    "vocab_size": 151_936,
}  # fmt: skip
_LLAMA3_SCALING = {"kind": "llama3", "factor": 8.0, "original_seq_len": 8192}
_MODELS: Mapping[str, Mapping[str, tuple[int, int, int, int, Mapping[str, Any]]]] = {
    # model.name: {model.flavor: (layers, width, heads, MLP width, other fields)}
    "llama3": {
        "debugmodel": (6, 256, 16, 768, {"kv_heads": 16, "vocab_size": 2048}),
        "8B": (32, 4096, 32, 14_336, {}),
        "70B": (80, 8192, 64, 28_672, {}),
        "405B": (126, 16_384, 128, 53_248, {}),
    },
    "qwen3": {
        "debugmodel": (8, 256, 16, 3072, {"tie_embeddings": True, "vocab_size": 2048}),
        "0.6B": (28, 1024, 16, 3072, {"tie_embeddings": True}),
        "1.7B": (28, 2048, 16, 6144, {"tie_embeddings": True}),
        "4B": (36, 2560, 32, 9728, {"tie_embeddings": True}),
        "8B": (36, 4096, 32, 12_288, {}),
        "14B": (40, 5120, 40, 17_408, {}),
        "32B": (64, 5120, 64, 25_600, {}),
    },
}
_HUB = {"c4": "hub:allenai/c4:en:train", "c4_test": "tests/assets/c4_test/*.json"}

_SAME: tuple[tuple[str, str, Any], ...] = (  # (theirs, ours, their default)
    ("job.dump_folder", "job.output_dir", None),
    ("job.description", "job.description", None),
    ("debug.deterministic", "job.deterministic", None),
    ("optimizer.beta1", "optimizer.beta1", None),
    ("optimizer.beta2", "optimizer.beta2", None),
    ("optimizer.eps", "optimizer.eps", None),
    ("training.seq_len", "training.seq_len", 2048),
    ("training.mixed_precision_param", "training.mixed_precision_param", None),
    ("training.mixed_precision_reduce", "training.mixed_precision_reduce", None),
    ("training.enable_cpu_offload", "training.enable_cpu_offload", None),
    ("training.gc_freq", "training.gc_freq", None),
    ("training.dataloader.num_workers", "training.num_workers", None),
    ("parallelism.data_parallel_replicate_degree", "parallelism.data_parallel_replicate_degree", None),
    ("parallelism.fsdp_reshard_after_forward", "parallelism.fsdp_reshard_after_forward", None),
    ("parallelism.tensor_parallel_degree", "parallelism.tensor_parallel_degree", None),
    ("parallelism.enable_async_tensor_parallel", "parallelism.enable_async_tensor_parallel", None),
    ("parallelism.disable_loss_parallel", "parallelism.disable_loss_parallel", None),
    ("parallelism.pipeline_parallel_degree", "parallelism.pipeline_parallel_degree", None),
    ("parallelism.pipeline_parallel_schedule", "parallelism.pipeline_parallel_schedule", None),
    ("parallelism.pipeline_parallel_microbatch_size", "parallelism.pipeline_parallel_microbatch_size", None),
    ("parallelism.context_parallel_degree", "parallelism.context_parallel_degree", None),
    ("checkpoint.interval", "checkpoint.interval", None),
    ("activation_checkpoint.mode", "activation_checkpoint.mode", "selective"),
    ("activation_checkpoint.memory_budget", "activation_checkpoint.memory_budget", None),
    ("metrics.log_freq", "metrics.log_freq", None),
    ("metrics.enable_tensorboard", "metrics.enable_tensorboard", None),
    ("profiling.enable_profiling", "profiling.enable_profiling", None),
    ("profiling.profile_freq", "profiling.profile_freq", None),
    ("comm.init_timeout_seconds", "comm.init_timeout_seconds", None),
    ("comm.train_timeout_seconds", "comm.train_timeout_seconds", None),
)

_ADVICE = {  # keys without a counterpart
    "job.print_config": "`titan-cpt plan` prints the plan; the resolved config is config.toml in the run's folder",
    "job.save_config_file": "the resolved config is always config.toml in the run's folder",
    "job.*": "torchtitan's own extension point: write a family as docs/models.md describes",
    "experimental.*": "torchtitan's own extension point: write a family as docs/models.md describes",
    "profiling.save_traces_folder": "traces are in profile/ in the run's folder",
    "profiling.profiler_*": "a trace covers one step",
    "profiling.*": "no memory snapshots: use torch.cuda.memory._record_memory_history in a copy of the script",
    "metrics.save_tb_folder": "TensorBoard events are in tb/ in the run's folder",
    "metrics.save_for_all_ranks": "metrics are means over all ranks, written once",
    "metrics.enable_wandb": "see [metrics] in docs/config.md for the trackers of this version",
    "metrics.*": "no counterpart needed: colors follow the terminal and NO_COLOR",
    "model.print_after_conversion": "`titan-cpt plan --check-layout` builds the model",
    "model.tokenizer_path": "use model.hf_assets_path there; here tokenizer.path",
    "optimizer.implementation": "always torch's fused AdamW, on a CPU too",
    "optimizer.early_step_in_backward": "not available; it excludes gradient clipping",
    "training.dataset_path": "set datasets.*.source.text to these files",
    "training.dtype": "master weights are always float32; the compute dtype is training.mixed_precision_param",
    "training.gc_debug": "not available",
    "training.dataloader.*": "not available: data is memory-mapped and copied in the background",
    "parallelism.pipeline_*": "the pipeline is split by the plan, which balances parameters and activations",
    "parallelism.module_fqns_per_model_part": "the pipeline is split by the plan",
    "parallelism.context_parallel_load_balancer": "context parallelism is balanced always",
    "parallelism.expert_*": "no mixture-of-experts models here",
    "checkpoint.folder": "checkpoints are in <output_dir>/<name>/<stage>/step-NNNNNNNN",
    "checkpoint.load_step": "training resumes at the newest checkpoint; `titan-cpt anneal` branches off an older one",
    "checkpoint.enable_first_step_checkpoint": "not available; `titan-cpt train` validates at step 0 instead",
    "checkpoint.create_seed_checkpoint": "not needed: initial weights depend on the seed, not on the layout",
    "checkpoint.*": "a full checkpoint is saved at the end of a stage; `titan-cpt export` writes Hugging Face weights",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": "the selection of operators is fixed",
    "activation_checkpoint.*": "not available",
    "compile.backend": "always inductor",
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": "follows enable_fsdp_float8_all_gather",
    "quantize.linear.float8.emulate": "not available",
    "quantize.*": "no MX formats and no grouped products here",
    "comm.*": "set TORCH_NCCL_TRACE_BUFFER_SIZE and TORCH_NCCL_DEBUG_INFO_TEMP_FILE in the environment",
    "memory_estimation.*": "`titan-cpt plan --device-memory 80GiB` estimates memory",
    "fault_tolerance.*": "no TorchFT; a failed run resumes from its last checkpoint",
    "validation.steps": "set validation.sequences, the number of sequences of each dataset",
    "validation.seq_len": "validation uses training.seq_len",
    "validation.dataloader.*": "not available",
    "validation.*": "set datasets.*.validation",
    "debug.*": "not available",
}  # fmt: skip


def convert_torchtitan(out: Conversion, world_size: int | None) -> None:
    """Fill the conversion from torchtitan's keys.

    Args:
        world_size: number of ranks there; None: the fewest that the degrees allow.
    """
    out.set("job.name", out.name, text="name of the file")
    for theirs, ours, default in _SAME:
        out.same(theirs, ours, default=default)
    _seed(out)
    _model(out)
    _data(out)
    _optimizer(out)
    _schedule(out)
    _batch(out, world_size)
    _options(out)
    set_missing_data(out)
    out.finish(_ADVICE)


def _seed(out: Conversion) -> None:
    if out.has("debug.seed"):
        text = "seeds give other initial weights and another data order than there"
        out.decide(text, {"job.seed": out.whole("debug.seed")}, of=["debug.seed"])


def _model(out: Conversion) -> None:
    name, flavor = out.text("model.name", "llama3"), out.text("model.flavor", "debugmodel")
    plain, _, attention = flavor.partition("_")
    if attention.removesuffix("_attn") not in ("", "flex", "varlen"):
        plain = flavor
    if plain in _MODELS.get(name, {}):
        fields = flavor_fields(name, plain)
        text = ""
        if name == "llama3":
            text = "with Llama 3.1's RoPE scaling, which torchtitan's llama3 always applies"
        sharded = out.whole("parallelism.tensor_parallel_degree", 1) > 1
        set_model(out, "llama", fields, of=["model.name", "model.flavor"], text=text, tensor_parallel=sharded)
        if attention:
            text = f"{attention} keeps attention within a document; positions do not restart, as here"
            out.set("training.document_mask", True, text=text)
    else:
        why = f"{name} {flavor} is none of the dense models of {', '.join(_MODELS)}"
        set_placeholder_model(out, ["model.name", "model.flavor"], why)
    folder = out.text("model.hf_assets_path", "./tests/assets/tokenizer").rstrip("/")
    ours: dict[str, Any] = {"tokenizer.path": f"{folder}/tokenizer.json"}
    text = "the tokenizer.json of that folder"
    if name == "llama3":
        ours |= {"tokenizer.add_bos": True}
        text += "; torchtitan begins every document with its BOS token"
    out.decide(text, ours, of=["model.hf_assets_path"])


def flavor_fields(name: str, flavor: str) -> dict[str, Any]:
    """Fields of our Llama spec for a flavor of one of torchtitan's models."""
    layers, width, heads, mlp_width, more = _MODELS[name][flavor]
    fields: dict[str, Any] = {"layers": layers, "width": width, "heads": heads, "mlp_width": mlp_width}
    fields |= {"head_width": width // heads, **(_QWEN3 if name == "qwen3" else _LLAMA3), **more}
    return fields | ({"rope_scaling": _LLAMA3_SCALING} if name == "llama3" else {})


def flavors() -> list[tuple[str, str]]:
    """The models and flavors that `flavor_fields` knows."""
    return [(name, flavor) for name, known in _MODELS.items() for flavor in known]


def _data(out: Conversion) -> None:
    dataset = out.text("training.dataset", "c4_test")
    source = _HUB.get(dataset)
    ours: dict[str, Any] = {"datasets.data.train": "data/data/train", "stage.dataset": "data"}
    if source is not None:
        ours |= {
            "datasets.data.validation": "data/data/train-validation",
            "datasets.data.source.text": source,
            "datasets.data.source.holdout": 0.001,
        }
    text = (
        "torchtitan tokenizes while it trains; here text is prepared once (`titan-cpt prepare` or datasets.*.source) "
        "into .bin/.idx. "
        + ("source.text downloads all of it: name a part of it for a short run" if source else "Name its files")
    )
    out.decide(text, ours, of=["training.dataset"])


def _optimizer(out: Conversion) -> None:
    name = out.text("optimizer.name", "AdamW")
    if name == "AdamW":
        out.set("optimizer.name", "AdamW", of=["optimizer.name"])
    elif "muon" in name.lower():
        text = (
            "torchtitan 0.2 has Adam and AdamW; later versions set Muon in Python, which is not converted: set "
            'optimizer.name = "Muon" and its keys in docs/config.md'
        )
        out.no_counterpart("optimizer.name", text)
    else:
        out.no_counterpart("optimizer.name", OTHER_OPTIMIZER)
    decay = float(out.number("optimizer.weight_decay", 0.1))
    text = "torchtitan 0.2 decays every parameter; here norms and biases are not decayed"
    out.decide(text, {"optimizer.weight_decay": decay}, of=["optimizer.weight_decay"])
    out.same("training.max_norm", "training.max_norm")


def _schedule(out: Conversion) -> None:
    steps = out.whole("training.steps", 10_000)
    total = out.whole("lr_scheduler.total_steps", steps)
    lr, length, text = torchtitan_lr(
        peak=float(out.number("optimizer.lr", 8e-4)),
        steps=steps,
        total=total,
        warmup=min(out.whole("lr_scheduler.warmup_steps", 200), total),
        decay_ratio=out.number("lr_scheduler.decay_ratio"),
        decay=out.text("lr_scheduler.decay_type", "linear"),
        min_factor=float(out.number("lr_scheduler.min_lr_factor", 0.0)),
    )
    keys = [
        f"lr_scheduler.{key}" for key in ("warmup_steps", "total_steps", "decay_ratio", "decay_type", "min_lr_factor")
    ]
    if length == steps:
        out.set({"stage.lr": lr}, of=["optimizer.lr", *keys], text=text)
        out.set("stage.steps", steps, of=["training.steps"])
    else:
        out.decide(text, {"stage.lr": lr, "stage.steps": length}, of=["optimizer.lr", "training.steps", *keys])


def torchtitan_lr(
    *,
    peak: float,
    steps: int,
    total: int,
    warmup: int,
    decay_ratio: float | None,
    decay: str,
    min_factor: float,
) -> tuple[dict[str, Any], int, str]:
    """Our LR table with the same LR in every step, the number of steps, and a remark.

    torchtitan's decay of D steps ends one step after the last one, so that no step has an LR of 0:

        lr(t) = peak (min + (1 - min) shape((t - (T + 1 - D)) / D))        t > T + 1 - D

    A straight line that ends at step T with the value of that formula is the same. A cosine or square root is the same
    only in a stage of T + 1 steps.
    """
    length = total - warmup if decay_ratio is None else min(round(total * decay_ratio), total - warmup)
    begin = total + 1 - length
    if length == 0 or steps <= begin:
        return constant_lr(peak=peak, warmup=Fraction(min(warmup, steps))), steps, "constant in all of these steps"
    low = peak * min_factor
    if decay == "linear" and steps <= total:
        table = linear_lr(peak=peak, low=low, warmup=Fraction(begin), decay_end=Fraction(total + 1), steps=steps)
        assert table is not None, "it ends after the last step"
        table |= {"schedule": "wsd", "warmup_until": warmup, "decay_from": begin, "decay": "linear"}
        return table, steps, "the same LR in every step; min is that of the last step there, which ends before its 0"
    shapes = {"linear": "linear", "sqrt": "sqrt", "cosine": "cosine"}
    table = {"schedule": "wsd", "max": peak, "min": low, "warmup_until": end_point(Fraction(warmup))}
    table |= {"decay_from": begin, "decay": shapes.get(decay, decay)}
    text = f"the same LR in every step of its schedule, which ends at step {total + 1}, one step after its last one"
    if steps != total:
        text += f"; it trains {steps} of them: stop there, training can be interrupted at any step"
    return table, total + 1, text


def _batch(out: Conversion, world_size: int | None) -> None:
    model_ranks = math.prod(
        out.whole(f"parallelism.{kind}_parallel_degree", 1) for kind in ("tensor", "pipeline", "context")
    )
    replicas = out.whole("parallelism.data_parallel_replicate_degree", 1)
    shards = out.number("parallelism.data_parallel_shard_degree", -1)
    data_parallel = replicas * max(int(shards), 1)
    if shards < 0 and world_size:
        data_parallel = max(world_size // max(model_ranks, 1), 1)
    if shards > 0:
        out.set("parallelism.data_parallel_shard_degree", int(shards), of=["parallelism.data_parallel_shard_degree"])
    else:
        out.set({}, of=["parallelism.data_parallel_shard_degree"], text="all other ranks, as here if it is not set")
    micro = out.whole("training.local_batch_size", 8)
    sequences = out.number("training.global_batch_size", -1)
    keys = ["training.global_batch_size", "training.local_batch_size"]
    if sequences > 0:
        how = f"{int(sequences)} sequences over all ranks, as there"
    else:
        sequences = micro * data_parallel
        how = f"local batch {micro} x {data_parallel} data-parallel ranks = {sequences} sequences"
        how += "" if world_size or shards > 0 else "; the file does not say how many ranks: give --world-size N"
    set_batch(out, sequences=int(sequences), micro=micro, ranks=data_parallel, of=keys, how=how)


def _options(out: Conversion) -> None:
    """Options whose values are not the same text, or that another key turns off."""
    if out.has("activation_checkpoint.selective_ac_option") or out.text("activation_checkpoint.mode", "selective"):
        option = out.value("activation_checkpoint.selective_ac_option", "2")
        out.set(
            "activation_checkpoint.selective_ac_option", str(option), of=["activation_checkpoint.selective_ac_option"]
        )
    converters = out.value("model.converters", [])
    float8 = isinstance(converters, list) and any("float8" in str(name) for name in converters)
    if converters and not float8:
        out.no_counterpart("model.converters", "only float8 of linear layers is available: [float8]")
    prefix = "quantize.linear.float8."
    if float8:
        ours: dict[str, Any] = {"float8.recipe_name": out.text(f"{prefix}recipe_name", "tensorwise")}
        ours |= {"float8.enable_fsdp_float8_all_gather": out.flag(f"{prefix}enable_fsdp_float8_all_gather")}
        ours |= {"float8.filter_fqns": [str(name) for name in out.value(f"{prefix}filter_fqns", []) or []]}
        names = [f"{prefix}{key}" for key in ("recipe_name", "enable_fsdp_float8_all_gather", "filter_fqns")]
        out.decide("layers have other names here (q, k, v, out, gate, up, down)", ours, of=["model.converters", *names])
    else:
        for key in ("recipe_name", "enable_fsdp_float8_all_gather", "filter_fqns"):
            if out.has(prefix + key):
                out.set({}, of=[prefix + key], text="unused there: float8 is not among model.converters")
    if out.flag("compile.enable"):
        out.set("compile.enable", True, of=["compile.enable"])
        out.no_counterpart("compile.components", "blocks are compiled (compile.scope); the loss is not")
    else:
        out.set("compile.enable", False, of=["compile.enable", "compile.components"])
    _checkpoint(out)
    _validation(out)


def _checkpoint(out: Conversion) -> None:
    keep = out.whole("checkpoint.keep_latest_k", 10)
    if keep > 0:
        out.set("checkpoint.keep_latest_k", keep, of=["checkpoint.keep_latest_k"])
    else:
        text = "0 keeps all there; here write how many, or checkpoint.keep_every"
        out.no_counterpart("checkpoint.keep_latest_k", text)
    mode = out.text("checkpoint.async_mode", "disabled")
    out.set("checkpoint.async_mode", "disabled" if mode == "disabled" else "async", of=["checkpoint.async_mode"])
    if out.flag("checkpoint.enable"):
        out.set({}, of=["checkpoint.enable"], text="always on here")
    else:
        out.no_counterpart("checkpoint.enable", "checkpoints cannot be turned off; raise checkpoint.interval")
    if out.has("checkpoint.initial_load_path"):
        path = out.text("checkpoint.initial_load_path")
        init, text = (
            f"checkpoint:{path}",
            "not a checkpoint of titan_cpt: export it there in Hugging Face format, import it",
        )
        if out.flag("checkpoint.initial_load_in_hf"):
            init, text = f"hf:{path}", "a folder in Hugging Face format, imported when the stage starts"
        keys = ["checkpoint.initial_load_path", "checkpoint.initial_load_in_hf"]
        out.decide(text, {"stage.init": init}, of=keys)


def _validation(out: Conversion) -> None:
    if out.flag("validation.enable"):
        out.set("validation.interval", out.whole("validation.freq", 10), of=["validation.enable", "validation.freq"])
        out.same("validation.local_batch_size", "validation.local_batch_size", whole=True)
    else:
        keys = ["validation.freq", "validation.local_batch_size", "validation.dataset", "validation.steps"]
        used = [key for key in ("validation.enable", *keys, "validation.seq_len") if out.has(key)]
        if used:
            text = "off there. Here datasets with `validation` are validated every validation.interval steps"
            out.no_counterpart(used, text)
