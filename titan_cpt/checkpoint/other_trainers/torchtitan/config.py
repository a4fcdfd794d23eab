"""The model of a torchtitan checkpoint: from torchtitan's JSON or TOML config, or from a TOML file with our [model].

torchtitan 0.3 has configs in Python. With `--debug.save_config_file NAME` it writes what a run uses as JSON into its
dump_folder; its `model_spec` describes the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint.other_trainers.dcp_files import DcpFiles
from titan_cpt.checkpoint.other_trainers.model_config import spec_of_trainer_config
from titan_cpt.checkpoint.other_trainers.torchtitan.names import EMBEDDING
from titan_cpt.common.reading import read_text
from titan_cpt.convert.torchtitan import flavor_fields, flavors
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.llama.spec import LlamaSpec
from titan_cpt.models.registry import as_config_table
from titan_cpt.models.spec import RopeScaling

_MODELS = {"llama3": False, "qwen3": True}  # torchtitan's model -> whether it has norms of queries and keys


def read_spec(files: DcpFiles, prefix: str, config: Path | None) -> LlamaSpec:
    """The model of a checkpoint.

    Args:
        files: the checkpoint.
        prefix: of the weights' names.
        config: the file that describes the model; None: the user gave none.

    Raises:
        ConfigError: the config is missing, cannot be read, or describes a model that is not available here.
        CheckpointError: the shape of the embedding is damaged.
    """
    shape = files.tensors[prefix + EMBEDDING].shape
    if len(shape) != 2:
        raise CheckpointError(f"{files.folder}: {EMBEDDING} has shape {list(shape)}, not rows of the vocabulary")
    if config is None:
        raise ConfigError(f"{files.folder}: {_without_config(files, prefix)}")
    spec = _from_json(config, shape[0]) if config.suffix == ".json" else spec_of_trainer_config(
        config, "torchtitan", rows=shape[0]
    )  # fmt: skip
    if not isinstance(spec, LlamaSpec) or spec.family != "llama":  # other families extend Llama's spec
        raise ConfigError(f"{config}: model.family is {spec.family!r}, but torchtitan's models are of the family llama")
    return spec


def _without_config(files: DcpFiles, prefix: str) -> str:
    """What to give as --config, with the named models of torchtitan that have these shapes."""
    lines = [
        "a checkpoint of torchtitan does not say how many heads its model has, nor its RoPE: give --config FILE: "
        "the JSON that torchtitan writes with --debug.save_config_file, the TOML of torchtitan 0.2, or a TOML file "
        "with [model]"
    ]
    for name, flavor in flavors():
        fields = flavor_fields(name, flavor)
        if _has_shapes(files, prefix, fields):
            scaling = fields.pop("rope_scaling", None)
            spec = LlamaSpec(family="llama", **fields, rope_scaling=RopeScaling(**scaling) if scaling else None)
            table = "\n    ".join(as_config_table(spec).splitlines())
            lines.append(f"Its shapes are those of torchtitan's {name} {flavor}, whose [model] is\n    {table}")
    return "\n  ".join(lines)


def _has_shapes(files: DcpFiles, prefix: str, fields: Mapping[str, Any]) -> bool:
    first = f"{prefix}layers.0."
    attention = next(
        (n for n in ("attention.qkv_linear.", "attention.") if f"{first}{n}wq.weight" in files.tensors), ""
    )
    width, head_width = fields["width"], fields["head_width"]
    expected = {
        f"{prefix}{EMBEDDING}": (fields["vocab_size"], width),
        f"{first}{attention}wq.weight": (fields["heads"] * head_width, width),
        f"{first}{attention}wk.weight": (fields["kv_heads"] * head_width, width),
        f"{first}feed_forward.w1.weight": (fields["mlp_width"], width),
    }
    has_norm = f"{first}attention.q_norm.weight" in files.tensors
    layers = sum(name.endswith(".feed_forward.w1.weight") and "optimizer" not in name for name in files.tensors)
    return (
        layers == fields["layers"]
        and has_norm == fields.get("qk_norm", False)
        and all(name in files.tensors and files.tensors[name].shape == size for name, size in expected.items())
    )


def _from_json(path: Path, rows: int) -> LlamaSpec:
    """The model of torchtitan's JSON config."""
    try:
        table = json.loads(read_text(path))
        described = table["model_spec"]
        name, model = described["name"], described["model"]
        if name not in _MODELS:
            raise ConfigError(f"{path}: model_spec.name is {name!r}; {' and '.join(_MODELS)} can be imported")
        first = model["layers"][0]
        if any(_without_names(layer) != _without_names(first) for layer in model["layers"]):
            raise ConfigError(f"{path}: the layers of the model differ from each other, which is not available here")
        return LlamaSpec(family="llama", **_fields(model, first, rows=rows, qk_norm=_MODELS[name]))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: is not a config that torchtitan 0.3 wrote: {type(error).__name__}: {error}; give the file of "
            "--debug.save_config_file, or a TOML file with [model]"
        ) from None


def _fields(model: Mapping[str, Any], layer: Mapping[str, Any], *, rows: int, qk_norm: bool) -> dict[str, Any]:
    """Fields of our spec; raises ConfigError for what this model has and ours cannot have."""
    attention, mlp, rope = layer["attention"], layer["feed_forward"], layer["attention"]["rope"]
    head_width = attention["qkv_linear"]["head_dim"]
    qkv = attention["qkv_linear"]
    linears = [mlp["w1"], mlp["w2"], mlp["w3"], attention["wo"], model["lm_head"]]
    eps = {norm["eps"] for norm in (model["norm"], layer["attention_norm"], layer["ffn_norm"])}
    if layer.get("moe") is not None:
        raise ConfigError("the model is a mixture of experts, which is not available here")
    if any(linear["bias"] for linear in linears) or len(eps) != 1 or rope["dim"] != head_width:
        raise ConfigError("biases, norms of different eps, or RoPE on a part of each head: not available here")
    if (attention["qk_norm"] is not None) != qk_norm:
        raise ConfigError("norms of queries and keys are not as in torchtitan's own model")
    scaling = None
    if rope["scaling"] == "llama":
        scaling = RopeScaling(
            kind="llama3",
            factor=rope["scaling_factor"],
            original_seq_len=rope["original_max_position_embeddings"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
        )
    elif rope["scaling"] != "none" and not (rope["scaling"] == "yarn" and rope["rope_factor"] <= 1):
        raise ConfigError(f"RoPE scaling {rope['scaling']!r} of torchtitan differs from ours: not available here")
    return {
        "layers": len(model["layers"]),
        "width": model["dim"],
        "heads": attention["n_heads"],
        "kv_heads": attention["n_kv_heads"] or attention["n_heads"],
        "head_width": head_width,
        "mlp_width": mlp["w1"]["out_features"],
        "vocab_size": rows,
        "rope_base": float(rope["theta"]),
        "norm_eps": float(eps.pop()),
        "qkv_bias": any(bool(part.get("bias")) for part in qkv.values() if isinstance(part, Mapping)),
        "qk_norm": qk_norm,
        "tie_embeddings": bool(model["enable_weight_tying"]),
        "rope_scaling": scaling,
    }


def _without_names(value: Any) -> Any:
    """A part of the config without the initial distributions, which differ from layer to layer."""
    if isinstance(value, Mapping):
        return {key: _without_names(inner) for key, inner in value.items() if key != "param_init"}
    return value
