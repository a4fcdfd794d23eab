"""litgpt: YAML files of `litgpt pretrain`. Sources: pretrain.py, args.py and config.py of litgpt 0.5.9."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from titan_cpt.convert.conversion import Conversion
from titan_cpt.convert.muon import OTHER_OPTIMIZER, set_torch_muon
from titan_cpt.convert.shared import cosine_lr, end_point, set_batch, set_missing_data, set_model, set_placeholder_model
from titan_cpt.models.registry import SIZES, SPECS

VERSION = "litgpt 0.5.9"

_HUB = {"TinyStories": "hub:roneneldan/TinyStories", "OpenWebText": "hub:Skylion007/openwebtext"}
_OTHER_SIZES: dict[str, dict[str, Any]] = {
    "tiny-llama-1.1b": {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "mlp_width": 5632},
    "micro-llama-300m": {"layers": 12, "width": 1024, "heads": 16, "kv_heads": 4, "mlp_width": 5632},
}
_BLOCK_SIZES = (  # beginning of model_name, context length
    ("pythia-14m", 512), ("pythia-31m", 1024), ("llama-2-", 4096), ("llama-3-", 8192), ("llama-3", 131_072),
    ("mistral-7b-v0.3", 32_768), ("mistral-7b-instruct-v0.3", 32_768), ("mistral-7b", 4096), ("qwen2.5-0.5b", 32_768),
    ("qwen2.5-3b", 32_768), ("qwen2.5", 131_072), ("qwen3", 40_960),
)  # fmt: skip
_ADVICE = {
    "eval.max_new_tokens": "see `titan-cpt generate --help`",
    "eval.evaluate_example": "see `titan-cpt generate --help`",
    "eval.final_validation": "the end of a stage is always validated",
    "eval.initial_validation": "step 0 is always validated",
    "log.*": "see [metrics] in docs/config.md for the trackers of this version",
    "logger_name": "TensorBoard events are in tb/ in the run's folder; see [metrics] for other trackers",
    "num_nodes": "processes are started by torchrun or Slurm: docs/slurm.md",
    "devices": "processes are started by torchrun or Slurm: docs/slurm.md",
    "resume": "`titan-cpt train` resumes whenever the run's folder has a checkpoint",
    "data.*": "see the table [datasets] in docs/config.md", "optimizer.*": "not available",
    "train.epochs": "litgpt pretrain refuses it too: train.max_tokens",
    "train.max_steps": "litgpt pretrain refuses it too: train.max_tokens",
    "train.lr_warmup_fraction": "a fraction of an epoch of the data there: set lr.warmup_until",
    "checkpoint_dir": "a finetuning config: only `litgpt pretrain` is converted",
    "quantize": "no quantized training here", "lora_*": "no LoRA here: all weights are trained",
}  # fmt: skip


def convert_litgpt(out: Conversion, world_size: int | None) -> None:
    """Fill the conversion from litgpt's keys.

    Args:
        world_size: number of devices there; None: devices x num_nodes, or 1 if devices is "auto".
    """
    out.set("job.name", out.name, text="name of the file")
    out.same("seed", "job.seed", default=42)
    out.same("out_dir", "job.output_dir")
    block_size = _model(out)
    seq_len = out.whole("train.max_seq_length", block_size)
    out.set(
        "training.seq_len",
        seq_len,
        of=["train.max_seq_length"],
        text="" if out.has("train.max_seq_length") else "the model's block_size",
    )
    _data(out)
    _optimizer(out)
    _schedule(out, seq_len, world_size)
    _options(out)
    set_missing_data(out)
    out.finish(_ADVICE)


def _model(out: Conversion) -> int:
    """[model]; returns the context length, which is the default sequence length."""
    name = out.text("model_name", "")
    if any(map(out.has, out.keys_below("model_config"))):
        return _from_fields(out)
    known = named_model(name)
    if known is None:
        set_placeholder_model(out, ["model_name"], f"{name or 'no model_name'} is none of the named sizes")
        return 2048
    family, fields = known
    set_model(out, family, fields, of=["model_name", "train.tie_embeddings"], text=_tie(out, family, fields))
    return next((size for start, size in _BLOCK_SIZES if name.lower().startswith(start)), 2048)


def _tie(out: Conversion, family: str, fields: dict[str, Any]) -> str:
    if out.value("train.tie_embeddings") is True:
        if family == "llama":
            fields["tie_embeddings"] = True
        else:
            out.other_architecture("train.tie_embeddings", "embeddings are not tied in family gpt_neox")
    return ""


def named_model(name: str) -> tuple[str, dict[str, Any]] | None:
    """Family and hyperparameters of a model name of litgpt; None if no named size here has them."""
    size = re.sub(r"-(hf|chat|instruct|deduped)\b", "", name.lower())
    if size in _OTHER_SIZES:
        fields = _OTHER_SIZES[size]
        return "llama", fields | {"head_width": fields["width"] // fields["heads"], "vocab_size": 32_000}
    size = size.replace("pythia-", "").replace("llama-", "llama").removesuffix("-v0.1")
    for family, sizes in SIZES.items():
        if size in sizes and (family == "llama" or name.lower().startswith("pythia")):
            vocab, fields = SPECS[family].size_fields(size, {})
            if size == "mistral-7b-v0.3":
                fields |= {"rope_base": 10_000.0}  # litgpt 0.5.9; the released model has 1,000,000
            return family, fields | {"vocab_size": vocab}
    return None


def _from_fields(out: Conversion) -> int:
    """[model] from model_config, the fields of litgpt.Config."""

    def key(name: str) -> str:
        return f"model_config.{name}"

    llama = out.text(key("mlp_class_name"), "GptNeoxMLP") == "LLaMAMLP"
    family = "llama" if llama else "gpt_neox"
    width, heads = out.whole(key("n_embd"), 4096), out.whole(key("n_head"), 32)
    fields: dict[str, Any] = {"layers": out.whole(key("n_layer"), 16), "width": width, "heads": heads}
    fields |= {"mlp_width": out.whole(key("intermediate_size"), 4 * width)}
    fields |= {
        "rope_base": float(out.number(key("rope_base"), 10_000)),
        "norm_eps": float(out.number(key("norm_eps"), 1e-5)),
    }
    vocab, multiple = out.whole(key("vocab_size"), 50_254), out.whole(key("padding_multiple"), 512) or 1
    fields["vocab_size"] = out.whole(key("padded_vocab_size"), -(-vocab // multiple) * multiple)
    names = ["n_embd", "n_head", "n_layer", "intermediate_size", "rope_base", "norm_eps"]
    names += ["vocab_size", "padding_multiple", "padded_vocab_size"]
    if llama:
        fields |= {"kv_heads": out.whole(key("n_query_groups"), heads)}
        fields |= {"head_width": out.whole(key("head_size"), width // max(heads, 1))}
        fields |= {"qkv_bias": out.flag(key("attn_bias")), "qk_norm": out.flag(key("norm_qk"))}
        if out.has(key("sliding_window_size")):
            fields["sliding_window"] = out.whole(key("sliding_window_size"))
        names += ["n_query_groups", "head_size", "attn_bias", "norm_qk", "sliding_window_size"]
    else:
        fields |= {"rotary_fraction": float(out.number(key("rotary_percentage"), 0.25))}
        fields |= {"parallel_residual": out.flag(key("parallel_residual"), True)}
        names += ["rotary_percentage", "parallel_residual"]
    names += _rope_scaling(out, fields)
    text = _tie(out, family, fields)
    set_model(
        out, family, fields, of=["model_name", *map(key, names), "train.tie_embeddings" if llama else ""], text=text
    )
    _check_fields(out, family, heads, width // max(heads, 1))
    out.finish_below("model_config", "a field of litgpt.Config that the model here does not have")
    return int(out.whole(key("block_size"), 4096))


def _rope_scaling(out: Conversion, fields: dict[str, Any]) -> list[str]:
    """Adds Llama 3's RoPE scaling to the model's fields; returns the names of its keys. Other scalings are listed."""
    table = "model_config.rope_adjustments"
    llama3 = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
    llama3 |= {"original_max_seq_len": "original_seq_len"}
    given = out.keys_below(table)
    if {key.removeprefix(f"{table}.") for key in given if out.has(key)} == llama3.keys():
        numbers = {ours: out.number(f"{table}.{theirs}") for theirs, ours in llama3.items()}
        fields["rope_scaling"] = {"kind": "llama3", **numbers, "original_seq_len": int(numbers["original_seq_len"])}
        return [f"rope_adjustments.{theirs}" for theirs in llama3]
    if any(map(out.has, given)):
        out.other_architecture(given, "linear interpolation of positions there; YaRN or Llama 3's scaling here")
    if out.number("model_config.rope_condense_ratio", 1) != 1:
        out.other_architecture("model_config.rope_condense_ratio", "positions are not divided by a number here")
    return []


def _check_fields(out: Conversion, family: str, heads: int, head_width: int) -> None:
    llama = family == "llama"
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {  # field: litgpt's default, the values of the model here
        "norm_class_name": ("LayerNorm", ("RMSNorm",) if llama else ("LayerNorm",)),
        "mlp_class_name": ("GptNeoxMLP", ("LLaMAMLP",) if llama else ("GptNeoxMLP",)),
        "bias": (True, (not llama,)),
        "lm_head_bias": (False, (False,)),
        "scale_embeddings": (False, (False,)),
        "shared_attention_norm": (False, (False,)),
        "n_expert": (0, (0,)),
        "post_attention_norm": (False, (False,)),
        "post_mlp_norm": (False, (False,)),
    }
    if llama:
        expected |= {"rotary_percentage": (0.25, (1, 1.0)), "parallel_residual": (True, (False,))}
    else:
        expected |= {"n_query_groups": (heads, (heads,)), "head_size": (head_width, (head_width,))}
    for name, (default, allowed) in expected.items():
        found = out.value(f"model_config.{name}", default)
        if found not in allowed:
            out.other_architecture(f"model_config.{name}", f"{found} there, {allowed[0]} in family {family}")
        elif out.has(f"model_config.{name}"):
            out.set({}, of=[f"model_config.{name}"], text=f"as in family {family}")
    for name in ("name", "block_size", "hf_config"):
        if out.has(f"model_config.{name}"):
            out.set({}, of=[f"model_config.{name}"], text="a name, or a limit that rotary positions do not have")


def _data(out: Conversion) -> None:
    key = "data" if out.has("data") else "data.class_path"
    name = str(out.value(key, "TinyLlama")).rpartition(".")[2]
    ours: dict[str, Any] = {"datasets.data.train": "data/data/train", "stage.dataset": "data"}
    source = _HUB.get(name)
    folder = out.value("data.init_args.train_data_path")
    if name == "TextFiles" and isinstance(folder, str):
        source = f"{folder.rstrip('/')}/*.txt"
    if source:
        ours |= {"datasets.data.validation": "data/data/train-validation"}
        ours |= {"datasets.data.source.text": source, "datasets.data.source.holdout": 0.001}
    text = f"litgpt's {name} prepares its own files; here text is prepared into .bin/.idx"
    text += "" if source else ": give datasets.data.source.text, or run `titan-cpt prepare`"
    out.decide(text, ours, of=[key, "data.init_args.train_data_path"])
    folder = out.value("tokenizer_dir")
    path = f"{str(folder).rstrip('/')}/tokenizer.json" if folder else "assets/tokenizer/tokenizer.json"
    out.decide("the tokenizer.json in the checkpoint's folder", {"tokenizer.path": path}, of=["tokenizer_dir"])


def _optimizer(out: Conversion) -> None:
    path = str(out.value("optimizer.class_path", out.value("optimizer", "AdamW")))
    keys = ["optimizer.class_path", "optimizer"]
    prefix = "optimizer.init_args."
    muon = path in ("torch.optim.Muon", "Muon")
    if muon:
        set_torch_muon(out, prefix, keys)
    else:
        if path.rpartition(".")[2] == "AdamW":
            out.set("optimizer.name", "AdamW", of=keys)
        else:
            out.no_counterpart(keys, OTHER_OPTIMIZER)
        beta1, beta2 = out.pair(f"{prefix}betas", (0.9, 0.999))
        out.set({"optimizer.beta1": beta1, "optimizer.beta2": beta2}, of=[f"{prefix}betas"])
        out.set("optimizer.eps", float(out.number(f"{prefix}eps", 1e-8)), of=[f"{prefix}eps"])
    decay = float(out.number(f"{prefix}weight_decay", 0.1 if muon else 0.01))
    text = "litgpt decays every parameter; here norms and biases are not decayed"
    out.decide(text, {"optimizer.weight_decay": decay}, of=[f"{prefix}weight_decay"])
    if out.has(f"{prefix}fused"):
        out.set({}, of=[f"{prefix}fused"], text="always fused here")
    out.same("train.max_norm", "training.max_norm", default=1.0)


def _schedule(out: Conversion, seq_len: int, world_size: int | None) -> None:
    """Batch, steps and LR: litgpt counts micro-batches (iterations), and its budget is a number of tokens."""
    devices = out.value("devices", "auto")
    known = isinstance(devices, int) and not isinstance(devices, bool) and devices > 0
    nodes = out.whole("num_nodes", 1) or 1
    ranks = world_size or (devices * nodes if known else nodes)
    micro = out.whole("train.micro_batch_size", 4) or 1
    wanted = out.whole("train.global_batch_size", 512)
    accumulation = max(wanted // ranks // micro, 1)
    sequences = micro * accumulation * ranks
    how = f"global_batch_size {wanted} is {sequences} sequences there: micro-batch {micro} x accumulation "
    how += f"{accumulation} x {ranks} devices" + (
        "" if world_size or known else '; devices is "auto": give --world-size N'
    )
    keys = ["train.global_batch_size", "train.micro_batch_size", "devices", "num_nodes"]
    set_batch(out, sequences=sequences, micro=micro, ranks=ranks, of=keys, how=how)

    tokens = out.whole("train.max_tokens", 3_000_000_000_000)
    iterations = tokens // ranks // (micro * max(seq_len, 1))
    steps = max(iterations // accumulation, 1)
    warmup = min(Fraction(out.whole("train.lr_warmup_steps", 2000)), Fraction(steps))
    peak, low = float(out.number("optimizer.init_args.lr", 1e-3)), float(out.number("train.min_lr", 4e-5))
    table = cosine_lr(peak=peak, low=min(low, peak), warmup=warmup, decay_end=Fraction(steps), steps=steps)
    out.set({"stage.lr": table}, of=["optimizer.init_args.lr", "train.lr_warmup_steps", "train.min_lr"])
    out.set("stage.steps", steps, of=["train.max_tokens"], text=f"{tokens} tokens in whole steps, as there")
    out.remark(
        f"Learning rate: litgpt sets it per micro-batch and counts from 0, so that its step n has the LR of n - "
        f"1/{accumulation} here (accumulation {accumulation}); with accumulation 1 its first step has LR 0."
    )
    if end_point(warmup) == steps:
        out.remark("The LR warm-up is as long as the stage: the budget is smaller than lr_warmup_steps.")


def _options(out: Conversion) -> None:
    precision = out.text("precision", "bf16-true")
    dtype = "float32" if precision.startswith("32") else "bfloat16"
    if precision in ("bf16-mixed", "32-true"):
        out.set("training.mixed_precision_param", dtype, of=["precision"])
    else:
        text = f"{precision} there; here master weights stay float32, and products are in {dtype}"
        out.decide(text, {"training.mixed_precision_param": dtype}, of=["precision"])
    if out.text("model_name", "").startswith("pythia") or out.value("model_config.mlp_class_name") == "GptNeoxMLP":
        out.remark(
            "Initial weights: litgpt draws projections into the residual stream with std 1 / (layers sqrt(width)); "
            "here 2 / (layers sqrt(width)). The others are equal, sqrt(2 / (5 width))."
        )
    else:
        out.remark(
            "Initial weights: std sqrt(2 / (5 width)) and 1 / (layers sqrt(width)) there; here 0.02 and "
            "0.02 / sqrt(2 layers)."
        )
    out.same("train.save_interval", "checkpoint.interval", default=1000)
    out.same("eval.interval", "validation.interval", default=1000)
    out.same("train.log_interval", "metrics.log_freq", default=1)
    if out.has("eval.max_iters"):
        text = "litgpt validates on that number of batches; here on validation.sequences sequences of each dataset (64)"
        out.decide(text, of=["eval.max_iters"])
    out.set({"compile.enable": True}, text="litgpt compiles the model")
    if out.has("initial_checkpoint_dir"):
        folder = out.text("initial_checkpoint_dir")
        text = f"convert it: titan-cpt import --from litgpt {folder} checkpoints/initial"
        out.decide(text, {"stage.init": "checkpoint:checkpoints/initial"}, of=["initial_checkpoint_dir"])
