"""GPT-NeoX: its YAML files, merged. Sources: megatron/neox_arguments, learning_rates.py, model/ of commit ea7aefd8."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from titan_cpt.convert.conversion import Conversion
from titan_cpt.convert.muon import OTHER_OPTIMIZER
from titan_cpt.convert.shared import (
    END_OF_DOCUMENT_LOSS,
    constant_lr,
    cosine_lr,
    end_point,
    exactly,
    linear_lr,
    pipelined,
    set_batch,
    set_missing_data,
    set_model,
    set_weighted_data,
)

VERSION = "GPT-NeoX ea7aefd8 (2026-05)"

_SAME: tuple[tuple[str, str, Any], ...] = (
    ("seed", "job.seed", None),
    ("seq_length", "training.seq_len", None),
    ("weight_decay", "optimizer.weight_decay", None),
    ("gradient_clipping", "training.max_norm", None),
    ("model_parallel_size", "parallelism.tensor_parallel_degree", None),
    ("eval_interval", "validation.interval", 1000),
    ("keep_last_n_checkpoints", "checkpoint.keep_latest_k", None),
    ("num_workers", "training.num_workers", None),
    ("log_interval", "metrics.log_freq", 100),
)

_FUSION = "not needed: torch chooses kernels, and [compile] fuses; the result is the same up to rounding"
_ZERO = "FSDP2 shards parameters, gradients and optimizer state; see parallelism.data_parallel_shard_degree"
_CLUSTER = "processes are started by torchrun or Slurm: docs/slurm.md"
_GENERATION = "see `titan-cpt generate --help`"
_TRACKER = "see [metrics] in docs/config.md for the trackers of this version"
_ADVICE = {
    "scaled_*": _FUSION, "bias_*": _FUSION, "rope_fusion": _FUSION, "layernorm_fusion": _FUSION,
    "rmsnorm_fusion": _FUSION, "use_flashattn_swiglu": _FUSION, "attention_softmax_in_fp32": _FUSION,
    "mamba_*": "no Mamba models here",
    "te_*": "no Transformer Engine; float8 is [float8]",
    "sparsity_config*": "no sparse attention here",
    "soft_prompt_tuning*": "no prompt tuning here",
    "moe_*": "no mixture-of-experts models here",
    "output_layer_parallelism": "the head is split over its vocabulary (loss parallel)",
    "max_position_embeddings": "rotary positions have no limit; only training.seq_len counts",
    "zero_*": _ZERO, "zero_optimization*": _ZERO, "fp32_allreduce": "gradients are always summed in float32",
    "data_types*": "gradients are always accumulated in float32",
    "fp16*": "no loss scaling: bf16 needs none",
    "bf16*": "see training.mixed_precision_param",
    "data_impl": ".bin/.idx files are read as they are", "pack_impl": "documents are packed",
    "mmap_warmup": "not needed", "use_shared_fs": "index files are not built",
    "test_data_*": "no test data: give it as a dataset with only `validation`",
    "vocab_file": "see tokenizer.path", "merge_file": "see tokenizer.path",
    "load": "a run resumes in its own folder; `stage.init` names other weights",
    "finetune": "a stage starts with step 0 and a new optimizer state; see stages.optimizer_state",
    "save": "see job.output_dir", "s3_*": "see [checkpoint] in docs/config.md",
    "extra_save_iters": "see checkpoint.interval and checkpoint.keep_every",
    "checkpoint_validation_with_forward_pass": "use `titan-cpt verify`",
    "checkpoint_num_layers": "see [activation_checkpoint]", "partition_activations": "sequence parallelism does it",
    "checkpoint_in_cpu": "not available", "contiguous_checkpointing": "not needed",
    "synchronize_each_layer": "not needed", "deepspeed_activation_checkpointing": "see [activation_checkpoint]",
    "activation_checkpointing*": "see [activation_checkpoint]",
    "steps_per_print": "see metrics.log_freq", "wall_clock_breakdown": "see [profiling]",
    "profile*": "see [profiling]", "memory_profiling*": "see [profiling]", "flops_profiler*": "see [profiling]",
    "log_*": "metrics.jsonl has loss, gradient norm and skipped batches of each step",
    "tensorboard*": "TensorBoard events are in tb/ in the run's folder",
    "use_wandb": _TRACKER, "wandb*": _TRACKER, "use_comet": _TRACKER, "comet*": _TRACKER,
    "distributed_backend": "nccl on GPUs, gloo on CPUs",
    "hostfile": _CLUSTER, "launcher": _CLUSTER, "deepspeed*": _CLUSTER, "num_nodes": _CLUSTER, "num_gpus": _CLUSTER,
    "master_*": _CLUSTER, "include": _CLUSTER, "exclude": _CLUSTER, "no_ssh_check": _CLUSTER, "comment": _CLUSTER,
    "account": _CLUSTER, "user_script": _CLUSTER, "force_multi": _CLUSTER,
    "text_gen_type": _GENERATION, "maximum_tokens": _GENERATION, "prompt_end": _GENERATION,
    "sample_*": _GENERATION, "num_samples": _GENERATION, "temperature": _GENERATION, "top_*": _GENERATION,
    "recompute": _GENERATION, "return_logits": _GENERATION, "eval_tasks": "see [evaluation]",
    "eval_results_prefix": "see `titan-cpt eval --help`", "use_mup": "no muP here", "mup_*": "no muP here",
    "override_lr_scheduler": "a changed schedule is refused for steps that were trained; add a stage",
    "use_checkpoint_lr_scheduler": "a changed schedule is refused for steps that were trained; add a stage",
    "no_load_optim": "see stages.optimizer_state", "no_load_rng": "not needed",
    "no_save_optim": "`titan-cpt export` writes only weights", "no_save_rng": "not needed",
    "pipe_partition_method": "the pipeline is split by the plan", "autotuning*": "see `titan-cpt plan --suggest`",
    "sequence_parallel": "always on with tensor parallelism", "dynamic_loss_scale": "no loss scaling: bf16 needs none",
    "loss_scale*": "no loss scaling: bf16 needs none", "hysteresis": "no loss scaling: bf16 needs none",
    "min_scale": "no loss scaling: bf16 needs none", "exit_interval": "see stages.steps",
    "use_cpu_initialization": "always drawn on the CPU", "precision": "see training.mixed_precision_param",
    "use_bnb_optimizer": "only AdamW", "local_rank": _CLUSTER, "rank": _CLUSTER,
    "eod_mask_loss": END_OF_DOCUMENT_LOSS,
    "warmup_iters": "not a key of GPT-NeoX: it uses `warmup`, a fraction",
    "decay_lr_to": "not a key of GPT-NeoX: it uses `min_lr`",
}  # fmt: skip


def convert_gpt_neox(out: Conversion, world_size: int | None) -> None:
    """Fill the conversion from GPT-NeoX's keys.

    Args:
        world_size: number of GPUs in GPT-NeoX; None: global_num_gpus, or the fewest that the degrees allow.
    """
    out.set("job.name", out.name, text="name of the file")
    for theirs, ours, default in _SAME:
        out.same(theirs, ours, default=default)
    if not out.has("seq_length"):
        out.set("training.seq_len", 2048, text="a placeholder: the file has no seq_length")
    for ours, theirs in (("optimizer.weight_decay", "weight_decay"), ("training.max_norm", "gradient_clipping")):
        if not out.has(theirs):
            out.set(ours, 0.1 if theirs == "weight_decay" else 1.0, of=[theirs])
    _model(out)
    _data(out)
    _optimizer(out)
    _schedule(out)
    _batch(out, world_size)
    _options(out)
    set_missing_data(out)
    out.remark(
        "Learning rate: GPT-NeoX counts steps from 0, so that its step n has the LR that step n - 1 has here "
        "(its first step that of step 1). Every later LR comes one step earlier here."
    )
    out.finish(_ADVICE)


def _model(out: Conversion) -> None:
    gated = out.text("activation", "gelu") == "swiglu"
    family = "llama" if gated or out.text("norm", "layernorm").endswith("rmsnorm") else "gpt_neox"
    width, heads = out.whole("hidden_size", 768), out.whole("num_attention_heads", 12)
    mlp_width, how = mlp_width_of(
        width, out.whole("intermediate_size"), multiple=out.whole("mlp_multiple_of", 1), gated=gated
    )
    fields: dict[str, Any] = {
        "layers": out.whole("num_layers", 12),
        "width": width,
        "heads": heads,
        "mlp_width": mlp_width,
        "rope_base": float(out.number("rotary_emb_base", 10_000)),
    }
    keys = [
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "mlp_multiple_of",
        "rotary_emb_base",
    ]
    if family == "llama":
        fields |= {"kv_heads": out.whole("num_kv_heads", heads), "head_width": width // max(heads, 1)}
        fields |= {"norm_eps": float(out.number("rms_norm_epsilon", 1e-8)), "qk_norm": out.flag("use_qk_layernorm")}
        fields |= {"tie_embeddings": not out.flag("no_weight_tying")}
        if out.has("sliding_window_width"):
            fields["sliding_window"] = out.whole("sliding_window_width")
        keys += ["num_kv_heads", "rms_norm_epsilon", "use_qk_layernorm", "no_weight_tying", "sliding_window_width"]
    else:
        fields |= {"rotary_fraction": float(out.number("rotary_pct", 1.0))}
        fields |= {"parallel_residual": out.flag("gpt_j_residual")}
        fields |= {"norm_eps": float(out.number("layernorm_epsilon", 1e-5))}
        keys += ["rotary_pct", "gpt_j_residual", "layernorm_epsilon"]
    set_model(out, family, fields, of=keys, text=how)
    _architecture(out, family)
    divisor = out.whole("make_vocab_size_divisible_by", 128) * max(out.whole("model_parallel_size", 1), 1)
    out.decide(
        f"GPT-NeoX pads the tokenizer's vocabulary to a multiple of {divisor} (make_vocab_size_divisible_by x "
        "model_parallel_size); here it is that of the named size or the tokenizer, padded to a multiple of 128 x "
        "tensor-parallel degree. Set model.vocab_size for another one",
        of=["make_vocab_size_divisible_by"],
    )
    _initialization(out, family)


def _architecture(out: Conversion, family: str) -> None:
    """Settings that the model here must agree with."""
    has_bias = family == "gpt_neox"
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {  # key: their default, the values that the model here has
        "norm": ("layernorm", ("layernorm", "te_layernorm") if has_bias else ("rmsnorm", "te_rmsnorm")),
        "activation": ("gelu", ("gelu",) if has_bias else ("swiglu",)),
        "pos_emb": ("learned", ("rotary",)),
        "use_bias_in_norms": (True, (has_bias,)),
        "use_bias_in_attn_linear": (True, (has_bias,)),
        "use_bias_in_mlp": (True, (has_bias,)),
        "hidden_dropout": (0.0, (0, 0.0)),
        "attention_dropout": (0.0, (0, 0.0)),
        "gpt_j_tied": (False, (False,)),
        "moe_num_experts": (1, (0, 1)),
    }
    if family == "gpt_neox":
        expected["no_weight_tying"] = (False, (True,))
        expected["use_qk_layernorm"] = (False, (False,))
        heads = out.whole("num_attention_heads", 12)
        expected["num_kv_heads"] = (heads, (heads,))
        expected["sliding_window_width"] = (None, (None,))
    else:
        expected["rotary_pct"] = (1.0, (1, 1.0))
        expected["gpt_j_residual"] = (False, (False,))
    for key, (default, allowed) in expected.items():
        found = out.value(key, default)
        if found in allowed:
            if out.has(key):
                out.set({}, of=[key], text=f"as in family {family}")
        else:
            out.other_architecture(
                key, f"{found} there, {allowed[0]} in family {family}; its checkpoints cannot be used"
            )
    for key, other in (("layernorm_epsilon", "gpt_neox"), ("rms_norm_epsilon", "llama")):
        if family != other and out.has(key):
            out.set({}, of=[key], text="unused there with this norm")
    kinds = _attention_kinds(out.value("attention_config"))
    if kinds - {"global", "flash"}:
        out.other_architecture("attention_config", f"{', '.join(sorted(kinds))} there, full causal attention here")
    elif out.has("attention_config"):
        out.set({}, of=["attention_config"], text="full causal attention, by torch's fastest kernel")
    if out.value("bias_gelu_fusion") is True and family == "gpt_neox":
        text = (
            "GPT-NeoX's fused kernel computes the tanh approximation of GELU; here GELU is exact, as in its HF export"
        )
        out.decide(text, of=["bias_gelu_fusion"])


def _attention_kinds(config: Any) -> set[str]:
    """Names of the attention kinds in [[["flash"], 24]], however deep they are."""
    if isinstance(config, str):
        return {config} if not config.isdigit() and config != "all" else set()
    return set().union(*map(_attention_kinds, config)) if isinstance(config, list) else set()


def mlp_width_of(width: int, intermediate: int | None, *, multiple: int, gated: bool) -> tuple[int, str]:
    """Inner dimension of the MLP as megatron/model/transformer.py computes it, and a remark.

    A gated MLP gets a third of intermediate_size (default 4 x hidden_size), so that it has as many parameters as one
    without a gate of that size.
    """
    whole = intermediate or 4 * width
    inner = int(whole * 2 / 3) // 2 if gated else whole
    inner = max(multiple, 1) * math.ceil(inner / max(multiple, 1))
    return inner, f"GPT-NeoX makes a gated MLP of {inner} from {whole}" if gated else ""


def _initialization(out: Conversion, family: str) -> None:
    pair = out.text("init_method", "normal"), out.text("output_layer_init_method", "scaled_normal")
    keys = ["init_method", "output_layer_init_method", "init_method_std"]
    ours = (
        "sqrt(2 / (5 width)) and 2 / (layers sqrt(width))" if family == "gpt_neox" else "0.02 and 0.02 / sqrt(2 layers)"
    )
    std = float(out.number("init_method_std", 0.02))
    same = (
        pair == ("small_init", "wang_init")
        if family == "gpt_neox"
        else (*pair, std) == ("normal", "scaled_normal", 0.02)
    )
    if same:
        if any(map(out.has, keys)):
            out.set({}, of=keys, text=f"the same standard deviations: {ours}")
        return
    text = f"{pair[0]} and {pair[1]} (std {std:g}) there; here N(0, std^2) with {ours}, which cannot be set"
    if any(map(out.has, keys)):
        out.no_counterpart(keys, text)
    else:
        out.remark(f"Initial weights: {text}.")


def _data(out: Conversion) -> None:
    text = "files of GPT-NeoX are read as they are; give prefixes as there, from this working directory"
    train = out.value("train_data_paths")
    if isinstance(train, list) and train:
        weights = out.value("train_data_weights") or [1.0] * len(train)
        if not isinstance(weights, list) or len(weights) != len(train):
            weights = [1.0] * len(train)
        keys = ["train_data_paths", "train_data_weights"]
        set_weighted_data(out, [str(path) for path in train], [float(w) for w in weights], of=keys, text=text)
    elif out.has("data_path"):
        set_weighted_data(out, [out.text("data_path")], [1.0], of=["data_path"], text=text)
    valid = out.value("valid_data_paths")
    if isinstance(valid, list) and valid and any(key.startswith("datasets.data") for key in out.values):
        ours = {"datasets.data.validation": [str(path) for path in valid]}
        text = "all validation tokens of these files together; weights of validation data have no counterpart"
        out.decide(text, ours, of=["valid_data_paths", "valid_data_weights"])
    if out.has("data_path") or out.has("split"):
        text = (
            "GPT-NeoX splits one pair of files into training, validation and test documents; here all of a pair is "
            "trained on. Prepare validation data of its own"
        )
        out.decide(text, of=["split"])
    if out.has("weight_by_num_documents") or out.has("weighted_sampler_alpha"):
        keys = ["weight_by_num_documents", "weighted_sampler_alpha"]
        out.no_counterpart(keys, "compute the weights and write them as domains")
    kind = out.text("tokenizer_type", "GPT2BPETokenizer")
    vocab = out.text("vocab_file", "")
    usable = vocab.endswith(".json") and kind == "HFTokenizer" and not out.has("merge_file")
    path = vocab if usable else "assets/tokenizer/tokenizer.json"
    text = (
        f"{kind} there; here tokenizer.path is a Hugging Face tokenizer.json. It must be the tokenizer that the token "
        "files were made with"
    )
    out.decide(text, {"tokenizer.path": path}, of=["tokenizer_type", "vocab_file", "merge_file"])


def _optimizer(out: Conversion) -> None:
    kind = str(out.value("optimizer.type", out.value("optimizer_type", "Adam")))
    keys = ["optimizer.type", "optimizer_type"]
    if kind.lower() in ("adam", "adamw"):
        out.set("optimizer.name", "AdamW", of=keys, text="decoupled weight decay, not of norms and biases, as here")
    else:
        text = OTHER_OPTIMIZER
        if "muon" in kind.lower():
            text = 'not an optimizer of GPT-NeoX: for Muon set optimizer.name = "Muon" and its keys in docs/config.md'
        out.no_counterpart(keys, text)
    beta1, beta2 = out.pair("optimizer.params.betas", (0.9, 0.999))
    out.set({"optimizer.beta1": beta1, "optimizer.beta2": beta2}, of=["optimizer.params.betas"])
    out.set("optimizer.eps", float(out.number("optimizer.params.eps", 1e-8)), of=["optimizer.params.eps"])


def _schedule(out: Conversion) -> None:
    steps = out.whole("train_iters", 1000)
    if not out.has("train_iters"):
        out.remark("The file has no train_iters: stages.pretrain.steps is a placeholder.")
    fraction = exactly(out.number("lr_decay_fraction", 1.0))
    decay_end = out.whole("lr_decay_iters", math.floor(steps * fraction)) or 1
    peak = float(out.number("optimizer.params.lr", out.number("lr", 0.001)))
    table, length, text = gpt_neox_lr(
        style=out.text("lr_decay_style", "linear"),
        peak=peak,
        low=float(out.number("min_lr", 0.0)),
        warmup=exactly(out.number("warmup", 0.01)) * decay_end,
        decay_end=decay_end,
        steps=steps,
    )
    keys = ["optimizer.params.lr", "lr", "lr_decay_style", "min_lr", "warmup", "lr_decay_iters", "lr_decay_fraction"]
    if text:
        out.decide(text, {"stage.lr": table, "stage.steps": length}, of=[*keys, "train_iters"])
    else:
        out.set({"stage.lr": table}, of=keys)
        out.set("stage.steps", length, of=["train_iters"])


def gpt_neox_lr(
    *, style: str, peak: float, low: float, warmup: Fraction, decay_end: int, steps: int
) -> tuple[Mapping[str, Any], int, str]:
    """Our LR table, the stage's steps, and what differs; "" if step n here has the LR of their step n + 1.

        lr(n) = peak n / W                                      n <= W
        lr(n) = max(low, low + (peak - low) (1 + cos(pi x)) / 2)   cosine,       x = (n - W) / (D - W)
        lr(n) = max(low, peak (1 - x))                          linear: to 0, not to low
        lr(n) = max(low, peak exp(-0.693 x))                    exponential

    Nothing stops x at 1: if training is longer than D steps, GPT-NeoX's cosine rises again.
    """
    low = min(low, peak)
    end, w = Fraction(decay_end), min(warmup, Fraction(steps))
    if style == "constant" or decay_end <= warmup:
        return constant_lr(peak=peak, warmup=w), steps, ""
    stop = f"the schedule ends at step {decay_end}, {steps} are trained: stop there, or set `steps` and accept its end"
    if style == "exponential":
        bottom = max(peak * math.exp(-0.693), low)
        table = {"schedule": "wsd", "max": peak, "min": bottom, "warmup_until": end_point(warmup)}
        table |= {"decay_from": end_point(warmup), "decay": "exponential"}
        if low > peak * math.exp(-0.693):
            return (
                table,
                decay_end,
                "GPT-NeoX falls by exp(-0.693) and stops at min_lr; here min_lr is reached at the end",
            )
        return table, decay_end, "" if decay_end == steps else stop
    if style == "linear":
        if low == 0 and (exact := linear_lr(peak=peak, low=0.0, warmup=warmup, decay_end=end, steps=steps)):
            return exact, steps, ""
        table = {"schedule": "linear", "max": peak, "min": low, "warmup_until": end_point(warmup)}
        how = "GPT-NeoX falls to 0 at lr_decay_iters and stops at min_lr; here the line ends at min_lr"
        return table, max(decay_end, 1), how + ("" if decay_end == steps else f", and {stop}")
    exact = cosine_lr(peak=peak, low=low, warmup=warmup, decay_end=end, steps=steps)
    if exact is None:
        table = {"schedule": "cosine", "max": peak, "min": low, "warmup_until": end_point(warmup)}
        return table, decay_end, stop
    rising = "GPT-NeoX's cosine rises again after lr_decay_iters (as Megatron's does not); here it stays at min_lr"
    return exact, steps, "" if decay_end == steps else rising


def _batch(out: Conversion, world_size: int | None) -> None:
    tensor, pipeline = max(out.whole("model_parallel_size", 1), 1), max(out.whole("pipe_parallel_size", 0), 1)
    ranks = world_size or out.whole("global_num_gpus", tensor * pipeline)
    data_parallel = max(ranks // (tensor * pipeline), 1)
    keys = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "global_num_gpus"]
    sequences, micro = out.whole("train_batch_size"), out.whole("train_micro_batch_size_per_gpu")
    accumulation = out.whole("gradient_accumulation_steps", 1) or 1
    if sequences is None:
        micro = micro or 1
        sequences = micro * accumulation * data_parallel
    micro = micro or max(sequences // data_parallel // accumulation, 1)
    local = pipelined(out, pipeline, micro, max(sequences // data_parallel, 1))
    how = f"micro-batch {micro} x accumulation {accumulation} x {data_parallel} data-parallel ranks"
    how += f" = {sequences} sequences"
    if world_size is None and not (out.has("global_num_gpus") or out.has("train_batch_size")):
        how += "; the file does not say how many GPUs: give --world-size N"
    set_batch(out, sequences=sequences, micro=local, ranks=data_parallel, of=keys, how=how)


def _options(out: Conversion) -> None:
    pipeline = max(out.whole("pipe_parallel_size", 0), 1)
    out.set("parallelism.pipeline_parallel_degree", pipeline, of=["pipe_parallel_size"])
    half, brain = out.value("fp16.enabled") is True, out.value("bf16.enabled") is True
    precision = out.text("precision", "fp16" if half else "bfloat16" if brain else "fp32")
    dtype = "float32" if precision == "fp32" else "bfloat16"
    keys = ["precision", "fp16.enabled", "fp16.fp16", "bf16.enabled"]
    if precision == "fp16":
        text = "fp16 with loss scaling there; bf16 here, which needs no scaling"
        out.decide(text, {"training.mixed_precision_param": dtype}, of=keys)
    else:
        out.set("training.mixed_precision_param", dtype, of=keys)
    recompute = out.flag("checkpoint_activations")
    out.set("activation_checkpoint.mode", "full" if recompute else "none", of=["checkpoint_activations"])
    if out.has("eval_iters"):
        text = (
            "GPT-NeoX validates on that number of batches; here on validation.sequences sequences of each dataset (64)"
        )
        out.decide(text, of=["eval_iters"])
    _checkpoints(out)


def _checkpoints(out: Conversion) -> None:
    factor = out.number("checkpoint_factor")
    if factor is not None and out.text("checkpoint_scale", "linear") == "linear" and factor >= 1:
        out.set("checkpoint.interval", int(factor), of=["checkpoint_factor", "checkpoint_scale"])
    else:
        text = "checkpoints are evenly spaced here: checkpoint.interval"
        out.no_counterpart(["checkpoint_factor", "checkpoint_scale"], text)
    if out.has("save"):
        text = "checkpoints are in <output_dir>/<name>/<stage>/step-NNNNNNNN"
        out.decide(text, {"job.output_dir": out.text("save")}, of=["save"])
