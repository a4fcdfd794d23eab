"""Megatron-LM: argument lists. Sources: training/arguments.py, core/optimizer_param_scheduler.py of core_v0.16.0."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from titan_cpt.convert.conversion import Conversion
from titan_cpt.convert.megatron_batch import set_batches
from titan_cpt.convert.muon import set_megatron_optimizer
from titan_cpt.convert.shared import (
    END_OF_DOCUMENT_LOSS,
    constant_lr,
    cosine_lr,
    end_point,
    exactly,
    linear_lr,
    set_missing_data,
    set_model,
    set_weighted_data,
)

VERSION = "Megatron-LM core_v0.16.0"

_SAME: tuple[tuple[str, str, Any], ...] = (
    ("adam-beta1", "optimizer.beta1", 0.9),
    ("adam-beta2", "optimizer.beta2", 0.999),
    ("adam-eps", "optimizer.eps", 1e-8),
    ("weight-decay", "optimizer.weight_decay", 0.01),
    ("clip-grad", "training.max_norm", 1.0),
    ("seq-length", "training.seq_len", 1024),
    ("seed", "job.seed", 1234),
    ("tensor-model-parallel-size", "parallelism.tensor_parallel_degree", 1),
    ("pipeline-model-parallel-size", "parallelism.pipeline_parallel_degree", 1),
    ("context-parallel-size", "parallelism.context_parallel_degree", 1),
    ("save-interval", "checkpoint.interval", 0),
    ("eval-interval", "validation.interval", 1000),
    ("log-interval", "metrics.log_freq", 100),
    ("num-workers", "training.num_workers", 2),
)
_POINTS = ("warmup_until", "cooldown_until", "constant_until", "decay_from", "timescale")
_OTHER_MODEL = (
    "num-experts",
    "multi-latent-attention",
    "hybrid-attention-ratio",
    "hybrid-override-pattern",
    "is-hybrid-model",
)
_OTHER_ROPE = ("rotary-seq-len-interpolation-factor", "no-rope-freq", "rotary-interleaved")
_LAUNCHER = "processes are started by torchrun or Slurm: docs/slurm.md"
_FUSION = "not needed: torch chooses kernels, and [compile] fuses; the result is the same up to rounding"
_OVERLAP = "FSDP2 overlaps communication itself"
_CHECKPOINT = "see [checkpoint] in docs/config.md; the format is torch's distributed checkpoint"
_ADVICE: Mapping[str, str] = {
    "nproc*": _LAUNCHER, "nnodes": _LAUNCHER, "node_rank": _LAUNCHER, "node-rank": _LAUNCHER, "master*": _LAUNCHER,
    "rdzv*": _LAUNCHER, "distributed-backend": "nccl on GPUs, gloo on CPUs", "distributed-timeout*": "see [comm]",
    "max-position-embeddings": "rotary positions have no limit; only training.seq_len counts",
    "attention-backend": "see training.attention_backend", "use-flash-attn": "see training.attention_backend",
    "transformer-impl": "titan_cpt's own model code", "use-mcore-models": "titan_cpt's own model code",
    "no-*": _FUSION, "cross-entropy*": "the loss is fused with the head and computed in pieces",
    "overlap-*": _OVERLAP, "use-distributed-optimizer": "FSDP2 shards the optimizer state",
    "sequence-parallel": "always on with tensor parallelism",
    "fp8*": "see [float8]: torchao's recipes, not Transformer Engine's", "te-*": "no Transformer Engine",
    "phase-transition-iterations": "one stage for each phase, the later ones with lr = { schedule = \"continue\" }",
    "decrease-batch-size-if-needed": "every batch size must be a multiple of ranks x local_batch_size",
    "recompute-*": "see [activation_checkpoint]", "distribute-saved-activations": "see [activation_checkpoint]",
    "load": "a run resumes in its own folder; the stage's `init` names other weights",
    "ckpt-*": _CHECKPOINT, "async-save": "checkpoint.async_mode, which is on", "use-dist-ckpt": _CHECKPOINT,
    "use-checkpoint-*": "a changed schedule is refused for steps that were trained; add a stage",
    "override-opt*": "a changed schedule is refused for steps that were trained; add a stage",
    "finetune": "a stage starts with step 0; see stages.optimizer_state",
    "exit-*": "stop with SIGTERM: the run saves and resumes", "log-*": "metrics.jsonl has every step's values",
    "tensorboard*": "TensorBoard events are in tb/ in the run's folder",
    "wandb*": "see [metrics] in docs/config.md for the trackers of this version",
    "profile*": "see [profiling]", "use-pytorch-profiler": "see [profiling]", "timing*": "see [profiling]",
    "data-cache-path": "index files are not built", "data-impl": ".bin/.idx files are read as they are",
    "mock-data": "give real data, or `titan-cpt prepare` a small text",
    "vocab-file": "see tokenizer.path", "merge-file": "see tokenizer.path", "tiktoken*": "see tokenizer.path",
    "manual-gc*": "always: training.gc_freq", "empty-unused-memory-level": "not needed",
    "grad-reduce-in-bf16": "gradients are always summed in float32",
    "accumulate-allreduce*": "gradients are always summed in float32",
    "decoupled-*": "one learning rate for all parameters", "calculate-per-token-loss": "the loss is a mean over tokens",
    "initial-loss-scale": "no loss scaling: bf16 needs none", "loss-scale*": "no loss scaling: bf16 needs none",
    "min-loss-scale": "no loss scaling: bf16 needs none", "hysteresis": "no loss scaling: bf16 needs none",
    "moe-*": "no mixture-of-experts models here", "expert-*": "no mixture-of-experts models here",
    "mamba-*": "no Mamba models here", "rl-*": "no reinforcement learning here",
    "eod-mask-loss": END_OF_DOCUMENT_LOSS,
    "rotary-seq-len-interpolation-factor": "no linear interpolation; YaRN and Llama 3's scaling: model.rope_scaling",
    "start-weight-decay": "weight decay is constant", "end-weight-decay": "weight decay is constant",
    "num-layers-per-virtual*": "see parallelism.pipeline_parallel_schedule",
    "kv-channels": "see model.head_width", "use-cpu-initialization": "always drawn on the CPU",
    "attention-softmax-in-fp32": "always", "enable-experimental": "not needed",
}  # fmt: skip


def convert_megatron(out: Conversion, world_size: int | None) -> None:
    """Fill the conversion from Megatron-LM's arguments.

    Args:
        world_size: number of ranks there; None: torchrun's arguments in the script, or the fewest possible.
    """
    out.set("job.name", out.name, text="name of the file")
    for theirs, ours, default in _SAME:
        if default == 0 and not out.has(theirs):
            continue
        out.same(theirs, ours, default=default)
    _model(out)
    _data(out)
    _documents(out)
    batch = set_batches(out, world_size)
    _schedule(out, batch)
    _options(out)
    set_missing_data(out)
    out.remark(
        "Learning rate: Megatron-LM counts from 0, so that its step n has the LR that step n - 1 has here; its first "
        "step has LR 0 (or lr-warmup-init)."
    )
    out.remark("A script is read line by line and not run: of two branches of an `if`, the last value counts.")
    out.finish(_ADVICE)


def _model(out: Conversion) -> None:
    swiglu = out.has("swiglu")
    family = "llama" if swiglu else "gpt_neox"
    width, heads = out.whole("hidden-size", 1024), out.whole("num-attention-heads", 16)
    whole = int(4 * width * 2 / 3 / 64) * 64 if swiglu else 4 * width
    fields: dict[str, Any] = {"layers": out.whole("num-layers", 24), "width": width, "heads": heads}
    fields |= {"mlp_width": out.whole("ffn-hidden-size", whole), "rope_base": float(out.number("rotary-base", 10_000))}
    fields |= {"norm_eps": float(out.number("norm-epsilon", 1e-5))}
    keys = ["num-layers", "hidden-size", "num-attention-heads", "ffn-hidden-size", "rotary-base", "norm-epsilon"]
    if out.has("padded-vocab-size"):
        fields["vocab_size"] = out.whole("padded-vocab-size")
        keys.append("padded-vocab-size")
    if swiglu:
        groups = out.whole("num-query-groups", 1) if out.has("group-query-attention") else heads
        fields |= {"kv_heads": groups, "head_width": out.whole("kv-channels", width // max(heads, 1))}
        fields |= {"qk_norm": out.has("qk-layernorm"), "qkv_bias": out.has("add-qkv-bias")}
        fields |= {"tie_embeddings": not out.has("untie-embeddings-and-output-weights")}
        keys += ["swiglu", "group-query-attention", "num-query-groups", "kv-channels", "qk-layernorm", "add-qkv-bias"]
        keys += ["untie-embeddings-and-output-weights"]
    else:
        fields |= {"rotary_fraction": float(out.number("rotary-percent", 1.0)), "parallel_residual": False}
        keys.append("rotary-percent")
    if out.has("use-rope-scaling"):
        factor = float(out.number("rope-scaling-factor", 8.0))
        fields["rope_scaling"] = {"kind": "llama3", "factor": factor, "original_seq_len": 8192}
        keys += ["use-rope-scaling", "rope-scaling-factor"]
    set_model(out, family, fields, of=keys)
    _architecture(out, family)
    if not out.has("padded-vocab-size"):
        multiple = out.whole("make-vocab-size-divisible-by", 128) * max(out.whole("tensor-model-parallel-size", 1), 1)
        out.decide(
            f"Megatron-LM pads the vocabulary to a multiple of {multiple} (make-vocab-size-divisible-by x "
            "tensor-parallel size); here it is that of the named size or the tokenizer, padded to a multiple of 128 x "
            "tensor-parallel degree. Set model.vocab_size for another one",
            of=["make-vocab-size-divisible-by", "vocab-size"],
        )


def _architecture(out: Conversion, family: str) -> None:
    llama = family == "llama"
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "normalization": ("LayerNorm", ("RMSNorm",) if llama else ("LayerNorm",)),
        "position-embedding-type": ("learned_absolute", ("rope",)),
    }
    if out.has("use-rotary-position-embeddings"):
        expected.pop("position-embedding-type")
        out.set({}, of=["use-rotary-position-embeddings", "position-embedding-type"], text="RoPE, as here")
    for key, (default, allowed) in expected.items():
        found = out.value(key, default)
        if found not in allowed:
            out.other_architecture(key, f"{found} there, {allowed[0]} in family {family}")
        elif out.has(key):
            out.set({}, of=[key], text=f"as in family {family}")
    for key in ("attention-dropout", "hidden-dropout"):
        if (rate := out.number(key, 0.1)) != 0:
            out.other_architecture(key, f"dropout of {rate:g} there, none here")
        else:
            out.set({}, of=[key], text="no dropout, as here")
    no_biases = out.has("disable-bias-linear")
    if no_biases != llama:
        ours = "without biases" if llama else "with biases"
        out.other_architecture("disable-bias-linear", f"linear layers of family {family} are {ours}")
    elif no_biases:
        out.set({}, of=["disable-bias-linear"], text=f"as in family {family}")
    if not llama and not out.has("untie-embeddings-and-output-weights"):
        out.other_architecture(
            "untie-embeddings-and-output-weights", "embeddings are tied there, not in family gpt_neox"
        )
    elif not llama:
        out.set({}, of=["untie-embeddings-and-output-weights"], text="as in family gpt_neox")
        if out.has("group-query-attention"):
            out.other_architecture("group-query-attention", "family gpt_neox has as many key/value heads as heads")
    if llama and out.number("rotary-percent", 1.0) != 1:
        out.other_architecture("rotary-percent", "family llama rotates the whole head")
    elif llama and out.has("rotary-percent"):
        out.set({}, of=["rotary-percent"], text="as in family llama")
    for key in (*_OTHER_MODEL, "squared-relu", "apply-layernorm-1p", "openai-gelu", *_OTHER_ROPE):
        if out.has(key):
            out.other_architecture(key, _ADVICE.get(key, "not available here"))
    std = float(out.number("init-method-std", 0.02))
    if llama and std == 0.02:
        out.set({}, of=["init-method-std"], text="0.02 and 0.02 / sqrt(2 layers), as here")
    else:
        ours = "0.02 and 0.02 / sqrt(2 layers)" if llama else "sqrt(2 / (5 width)) and 2 / (layers sqrt(width))"
        text = f"{std:g} and {std:g} / sqrt(2 layers) there; here {ours}, which cannot be set"
        if out.has("init-method-std"):
            out.no_counterpart("init-method-std", text)
        else:
            out.remark(f"Initial weights: {text}.")


def _data(out: Conversion) -> None:
    text = "files of Megatron-LM are read as they are; give prefixes as there, from this working directory"
    key = "data-path" if out.has("data-path") else "train-data-path"
    found = out.value(key)
    words = found if isinstance(found, list) else [found] if isinstance(found, str) else []
    if words and not any("$" in str(word) for word in words):
        if len(words) > 1 and len(words) % 2 == 0:
            weights, paths = [_number(word) for word in words[::2]], [str(word) for word in words[1::2]]
        else:
            weights, paths = [1.0] * len(words), [str(word) for word in words]
        set_weighted_data(out, paths, weights, of=[key], text=text)
    elif words:
        text = f"{' '.join(map(str, words))} is a variable that the script does not set: write the prefix"
        out.decide(text, {"datasets.data.train": "data/data/train", "stage.dataset": "data"}, of=[key])
    if out.has("valid-data-path"):
        found = out.value("valid-data-path")
        words = found if isinstance(found, list) else [str(found)]
        paths = [str(word) for word in (words[1::2] if len(words) > 1 and len(words) % 2 == 0 else words)]
        ours = {"datasets.data.validation": paths} if "datasets.data.train" in out.values else {}
        out.decide("all validation tokens of these files together, without weights", ours, of=["valid-data-path"])
    if out.has("split"):
        out.decide(
            "Megatron-LM splits one pair of files into training, validation and test documents; here all of a pair is "
            "trained on. Prepare validation data of its own",
            of=["split"],
        )
    model = out.value("tokenizer-model")
    path = "assets/tokenizer/tokenizer.json"
    if isinstance(model, str) and "$" not in model and "." not in model.rpartition("/")[2]:
        path = f"{model.rstrip('/')}/tokenizer.json"
    text = "a Hugging Face tokenizer.json; it must be the tokenizer that the token files were made with"
    out.decide(text, {"tokenizer.path": path}, of=["tokenizer-type", "tokenizer-model"])


def _documents(out: Conversion) -> None:
    """The document mask; a sequence's positions do not restart with RoPE, neither there nor here."""
    if out.has("reset-position-ids"):
        out.set({}, of=["reset-position-ids"], text="without effect on RoPE there: positions do not restart, as here")
    if not out.has("reset-attention-mask"):
        return
    keys = ["reset-attention-mask", "no-create-attention-mask-in-dataloader", "transformer-impl"]
    applied = out.value("transformer-impl", "transformer_engine") == "local" and not out.has(keys[1])
    mask = {"training.document_mask": True}
    if applied:
        out.set(mask, of=keys, text="an end-of-document token belongs to the document that it ends, as here")
    else:
        text = (
            "attention stays within a document here. Megatron-LM's Transformer Engine layers ignore this mask "
            "(NVIDIA/Megatron-LM issue 2357), and no-create-attention-mask-in-dataloader does not make it: a model "
            "that was trained there attended to other documents, and false continues that"
        )
        out.decide(text, mask, of=keys)


def _number(word: Any) -> float:
    try:
        return float(word)
    except ValueError:
        return 1.0


def _schedule(out: Conversion, batch: int) -> None:
    samples = out.has("train-samples")
    ramp = "stage.global_batch_size" in out.values
    unit, size = ("samples", 1 if ramp else max(batch, 1)) if samples else ("iters", 1)
    total = out.whole(f"train-{unit}", size)
    steps = max(total // size, 1)
    decay_end = Fraction(out.whole(f"lr-decay-{unit}", total), size)
    if out.has("lr-warmup-fraction"):
        warmup = exactly(out.number("lr-warmup-fraction")) * decay_end
    else:
        warmup = Fraction(out.whole(f"lr-warmup-{unit}", 0), size)
    decay = out.whole(f"lr-wsd-decay-{unit}")
    table, length, text = megatron_lr(
        style=out.text("lr-decay-style", "linear"),
        peak=float(out.number("lr", 1e-4)),
        low=float(out.number("min-lr", 0.0)),
        warmup=warmup,
        decay_end=decay_end,
        steps=steps,
        wsd_decay=None if decay is None else Fraction(decay, size),
        wsd_shape=out.text("lr-wsd-decay-style", "exponential"),
        batch=1 if ramp else max(batch, 1),
    )
    keys = ["lr", "min-lr", "lr-decay-style", f"lr-decay-{unit}", f"lr-warmup-{unit}", "lr-warmup-fraction"]
    keys += [f"lr-wsd-decay-{unit}", "lr-wsd-decay-style"]
    if ramp:
        seq_len = out.whole("seq-length", 1024)
        table = {key: _in_tokens(value, seq_len) if key in _POINTS else value for key, value in table.items()}
        text = f"end points in tokens, as the batch grows{f'; counted in samples, {text}' if text else ''}"
        ours = {"stage.lr": table, "stage.tokens": length * seq_len}
        out.decide(text, ours, of=[*keys, f"train-{unit}"])
    elif text or samples:
        text = text or f"{total} samples are {steps} steps of {batch} sequences"
        out.decide(text, {"stage.lr": table, "stage.steps": length}, of=[*keys, f"train-{unit}"])
    else:
        out.set({"stage.lr": table}, of=keys)
        out.set("stage.steps", length, of=[f"train-{unit}"])
    if out.number("lr-warmup-init", 0.0) != 0:
        out.no_counterpart("lr-warmup-init", "the warm-up starts at 0 here")


def _in_tokens(point: Any, seq_len: int) -> Any:
    """An end point in samples, such as 100 or "12.5 steps" with a sample for a step, in tokens; shares stay."""
    if isinstance(point, float):
        return point
    return str(round(Fraction(str(point).removesuffix(" steps")) * seq_len))


def megatron_lr(
    *,
    style: str,
    peak: float,
    low: float,
    warmup: Fraction,
    decay_end: Fraction,
    steps: int,
    wsd_decay: Fraction | None = None,
    wsd_shape: str = "exponential",
    batch: int = 1,
) -> tuple[dict[str, Any], int, str]:
    """Our LR table, the stage's steps, and what differs; "" if step n here has the LR of their step n + 1.

    lr(n) = peak n / W                                n <= W
    lr(n) = low                                       n > D, except for "constant"
    lr(n) = low + (peak - low) shape(x)               x = (n - W) / (D - W); WSD: over its last steps
    lr(n) = max(low, peak sqrt(W / n))                inverse-square-root
    """
    low, w = min(low, peak), end_point(min(warmup, Fraction(steps)))
    if style == "constant" or decay_end <= warmup:
        return constant_lr(peak=peak, warmup=min(warmup, Fraction(steps))), steps, ""
    length = max(int(decay_end), 1)
    stop = "" if decay_end == steps else f"the schedule ends at step {float(decay_end):g}, {steps} are trained: "
    stop += "stop there, or set `steps` and accept its end" if stop else ""
    if style == "inverse-square-root":
        table = {"schedule": "inv_sqrt", "max": peak, "min": low, "warmup_until": w}
        table |= {"timescale": end_point(warmup or Fraction(1, batch))}
        later = "" if warmup > 0 else "without a warm-up Megatron-LM's LR is that of one sequence earlier here"
        return table, steps, later if decay_end >= steps else stop
    if style == "WSD":
        shapes = {"linear": "linear", "cosine": "cosine", "minus_sqrt": "sqrt", "exponential": "exponential"}
        begin = decay_end - (wsd_decay or Fraction(0))
        table = {"schedule": "wsd", "max": peak, "min": low, "warmup_until": w}
        table |= {"decay_from": end_point(begin), "decay": shapes.get(wsd_shape, "linear")}
        if wsd_shape == "exponential":
            table["decay"] = "linear"
            text = (
                "Megatron-LM's exponential decay is 2 (1/2)^x - 1, within 9 % of (max - min) of the straight line here"
            )
            return table, length, f"{text}; {stop}" if stop else text
        return table, length, stop
    if style == "linear":
        exact = linear_lr(peak=peak, low=low, warmup=warmup, decay_end=decay_end, steps=steps)
        table = exact or {"schedule": "linear", "max": peak, "min": low, "warmup_until": w}
        return (table, steps, "") if exact else (table, length, stop)
    exact = cosine_lr(peak=peak, low=low, warmup=warmup, decay_end=decay_end, steps=steps)
    table = exact or {"schedule": "cosine", "max": peak, "min": low, "warmup_until": w}
    return (table, steps, "") if exact else (table, length, stop)


def _options(out: Conversion) -> None:
    if out.has("fp16"):
        text = "fp16 with loss scaling there; bf16 here, which needs no scaling"
        out.decide(text, {"training.mixed_precision_param": "bfloat16"}, of=["fp16", "bf16"])
    else:
        out.set("training.mixed_precision_param", "bfloat16" if out.has("bf16") else "float32", of=["bf16"])
    granularity = out.value("recompute-granularity", "selective" if out.has("recompute-activations") else "none")
    keys = ["recompute-granularity", "recompute-activations"]
    mode = str(granularity) if granularity in ("full", "selective") else "none"
    out.set("activation_checkpoint.mode", mode, of=keys)
    if out.has("eval-iters"):
        text = "Megatron-LM validates on this number of batches; here on validation.sequences sequences a dataset"
        out.decide(text, of=["eval-iters"])
    set_megatron_optimizer(out)
    if out.has("save"):
        folder = out.value("save")
        text = "checkpoints are in <output_dir>/<name>/<stage>/step-NNNNNNNN"
        ours = {"job.output_dir": folder} if isinstance(folder, str) and "$" not in folder else {}
        out.decide(text, ours, of=["save"])
