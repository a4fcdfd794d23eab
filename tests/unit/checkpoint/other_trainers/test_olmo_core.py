"""OLMo-core's checkpoints: names, layouts, optimizer state, configs; the report names what differs there."""

import json
import math
import pickle
import random
import sys
import types
from dataclasses import asdict, dataclass, make_dataclass

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.optim import AdamW
from torchtitan_checkpoints import trained

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.checkpoint.other_trainers.import_trained import import_from_trainer
from titan_cpt.checkpoint.other_trainers.trained_checkpoint import ImportRequest
from titan_cpt.checkpoint.state_dict import load_state, optimizer_tensors
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import RopeScaling
from titan_cpt.training.optimization.adamw import build_adamw

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)
_SMALL = {"vocab_size": 300, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24}
_YARN = RopeScaling(kind="yarn", factor=4.0, original_seq_len=64)
_STEPWISE = RopeScaling(kind="llama3", factor=8.0, original_seq_len=64, low_freq_factor=2.0, high_freq_factor=4.0)
SPECS = {
    "llama": named_size("llama", "debug", 257, {**_SMALL, "rope_scaling": _STEPWISE, "sliding_window": 8}),
    "qwen3": named_size("llama", "debug", 257, {**_SMALL, "head_width": 6, "qk_norm": True, "norm_eps": 1e-6}),
    "olmo3": named_size(
        "olmo", "debug", 257, {**_SMALL, "layers": 4, "sliding_window": 8, "global_interval": 4, "norm_eps": 1e-6}
    ),
    "tied": named_size("llama", "debug", 257, {**_SMALL, "tie_embeddings": True, "rope_scaling": _YARN}),
}
BLOCK = {
    "attention_norm": "attention_norm",
    "attention.q": "attention.w_q",
    "attention.k": "attention.w_k",
    "attention.v": "attention.w_v",
    "attention.out": "attention.w_out",
    "attention.q_norm": "attention.q_norm",
    "attention.k_norm": "attention.k_norm",
    "mlp_norm": "feed_forward_norm",
    "post_attention_norm": "attention_norm",
    "post_mlp_norm": "feed_forward_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
}
OUTSIDE = {"embedding": "embeddings", "final_norm": "lm_head.norm", "head": "lm_head.w_out"}


def their_tensors(ours, spec, *, layout):
    """OLMo-core's name -> tensor, of weights or moments by our name. layout: "separate", "fused" or "complex"."""
    theirs = {}
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        if not module.startswith("blocks."):
            theirs[f"{OUTSIDE[module]}.{kind}"] = tensor
            continue
        _, layer, inner = module.split(".", 2)
        rows = tensor
        if layout == "complex" and inner.split(".")[-1] in ("q", "k", "q_norm", "k_norm"):
            width = spec.head_width  # RoPE's pairs are neighbours: their feature 2i is our i, 2i + 1 is i + H/2
            row = torch.arange(tensor.shape[0])
            rows = tensor[row - row % width + row % width // 2 + row % 2 * (width // 2)]
        theirs[f"blocks.{layer}.{BLOCK[inner]}.{kind}"] = rows
    if layout == "fused":
        for layer in range(spec.layers):
            parts = [theirs.pop(f"blocks.{layer}.attention.w_{part}.weight") for part in "qkv"]
            theirs[f"blocks.{layer}.attention.w_qkv.weight"] = torch.cat(parts)
    return theirs


def state_of(model, optimizer, spec, *, layout="separate", steps=None):
    """The state dict that OLMo-core gives DCP: weights, and the optimizer's state and settings by parameter name."""
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    stored = their_tensors(weights, spec, layout=layout)
    optim = {}
    for key in ("exp_avg", "exp_avg_sq"):
        moments = {name: optimizer.state[weight][key] for name, weight in model.named_parameters()}
        for name, tensor in their_tensors(moments, spec, layout=layout).items():
            optim[f"state.{name}.{key}"] = tensor.clone()
    for name in stored:
        optim[f"state.{name}.step"] = torch.tensor(2.0 if steps is None else float(steps))
        decay = 0.0 if name == "embeddings.weight" else 0.1
        group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
        optim |= {f"param_groups.{name}.{key}": value for key, value in group.items()}
    if spec.tied:
        stored["lm_head.w_out.weight"] = stored["embeddings.weight"]
    return {"model": stored, "optim": optim}


def norm_of(spec):
    return {"name": "rms", "eps": spec.norm_eps, "bias": False}


def config_of(spec, rope="default"):
    """OLMo-core's config.json of a model."""
    scaling, olmo = None, spec.family == "olmo"
    if spec.rope_scaling == _YARN:
        scaling = {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "old_context_len": 64}
        scaling["_CLASS_"] = "olmo_core.nn.rope.YaRNRoPEScalingConfig"
    elif spec.rope_scaling is not None:
        scaling = {"factor": 8.0, "old_context_len": 64, "low_freq_proportion": 0.5, "high_freq_proportion": 0.25}
        scaling["_CLASS_"] = "olmo_core.nn.rope.StepwiseRoPEScalingConfig"
    attention = {
        "name": "default",
        "n_heads": spec.heads,
        "n_kv_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "bias": False,
        "rope": {"name": rope, "theta": int(spec.rope_base), **({"scaling": scaling} if scaling else {})},
        **({"qk_norm": norm_of(spec)} if olmo or spec.qk_norm else {}),
        **({} if olmo else {"use_head_qk_norm": True} if spec.qk_norm else {}),
        "scalable_softmax": False,
        "type": "attention",
        "_CLASS_": "olmo_core.nn.attention.AttentionConfig",
    }
    if olmo:
        windows = {"pattern": [8, 8, 8, -1], "force_full_attention_on_first_layer": False}
        attention["sliding_window"] = windows
    elif spec.sliding_window:
        ends = {f"force_full_attention_on_{end}_layer": False for end in ("first", "last")}
        attention["sliding_window"] = {"pattern": [spec.sliding_window], **ends}
    block = {
        "name": "reordered_norm" if olmo else "default",
        "sequence_mixer": attention,
        "layer_norm": norm_of(spec),
        "feed_forward": {"hidden_size": spec.mlp_width, "bias": False, "activation": "silu"},
    }
    model = {
        "d_model": spec.width,
        "vocab_size": spec.vocab_size,
        "n_layers": spec.layers,
        "block": block,
        "lm_head": {"name": "default", "layer_norm": norm_of(spec), "bias": False},
        "name": "default",
        "init_seed": 3,
        "tie_word_embeddings": spec.tied,
    }
    return {"model": model, "train_module": {"max_grad_norm": 1.0}, "dataset": {"generate_doc_lengths": False}}


TRAINER = {
    "global_step": 2,
    "global_train_tokens_seen": 1234,
    "data_loader": {"sequence_length": 64},
    "rng": {"numpy": np.random.get_state(), "python": random.getstate(), "cpu": torch.get_rng_state()},
}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a checkpoint as OLMo-core does, whose metadata names a class of OLMo-core's own; returns its folder."""

    def save(state, config, trainer=TRAINER, name="step2"):
        folder = tmp_path / name
        dcp.save(state, checkpoint_id=str(folder / "model_and_optim"), no_dist=True)
        path = folder / "model_and_optim" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        theirs = make_dataclass("_StorageInfo", ["relative_path", "offset", "length"])
        theirs.__module__ = "olmo_core.distributed.checkpoint.filesystem"
        places = metadata.storage_data
        metadata.storage_data = {at: theirs(it.relative_path, it.offset, it.length) for at, it in places.items()}
        names = theirs.__module__.split(".")
        with monkeypatch.context() as importable:  # pickle writes the name of a class that it can import
            for depth in range(len(names)):
                module = types.ModuleType(".".join(names[: depth + 1]))
                module._StorageInfo = theirs
                importable.setitem(sys.modules, module.__name__, module)
            path.write_bytes(pickle.dumps(metadata))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "train").mkdir()
        torch.save(trainer, folder / "train" / "rank0.pt")
        return folder

    return save


def imported(folder, out=None, **request):
    """The lines that the import printed."""
    lines = []
    import_from_trainer("olmo-core", ImportRequest(folder, **request), out or folder / "out", log=lines.append)
    return lines


@pytest.fixture(scope="module")
def run():
    """Name of a spec -> the model and its optimizer after two steps."""
    return {name: trained(spec) for name, spec in SPECS.items()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "separate"),
        ("llama", "fused"),
        ("llama", "complex"),
        ("qwen3", "complex"),
        ("tied", "separate"),
        ("olmo3", "complex"),
    ],
)
def test_an_import_has_olmo_cores_weights_and_moments(name, layout, run, saved):
    """Bit for bit, in our order of features; the report has step, tokens, LR and what OLMo-core does otherwise."""
    spec, (model, optimizer) = SPECS[name], run[name]
    config = config_of(spec, "complex" if layout == "complex" else "default")
    folder = saved(state_of(model, optimizer, spec, layout=layout), config)
    lines = imported(folder)
    ours = build_model(spec)
    adamw = build_adamw(ours, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    load_state(folder / "out", ours, adamw)
    mine = optimizer_tensors(ours, adamw)

    assert spec_of_checkpoint(manifest.verify(folder / "out"), folder / "out") == spec
    assert all(torch.equal(weight, ours.state_dict()[key]) for key, weight in model.state_dict().items())
    for key, weight in model.named_parameters():
        for moment, value in optimizer.state[weight].items():
            assert torch.equal(mine[f"state.{key}.{moment}"], value), (key, moment)
    assert "step: 2; tokens: 1,234; LR of the last step: 0.001" in lines
    assert any(line.startswith("note: OLMo-core does not decay the embedding; here weight_decay 0.1") for line in lines)
    assert any(line.startswith("note: OLMo-core decays norms with weight_decay 0.1") for line in lines)
    assert "note: gradients are clipped to max_grad_norm = 1: set training.max_norm" in lines
    assert "weight_decay = 0.1" in lines[-1]
    assert "beta2 = 0.95" in lines[-1]


def test_a_config_of_older_versions_and_options_that_are_reported(run, saved):
    """`attention` for `sequence_mixer`, groups by number; z-loss, document masks, no clipping, one more count."""
    spec = SPECS["qwen3"]
    config = config_of(spec)
    block = config["model"]["block"]
    block["attention"] = block.pop("sequence_mixer")
    config["train_module"] = {"z_loss_multiplier": 1e-5, "optim": {"_CLASS_": "olmo_core.optim.SkipStepAdamWConfig"}}
    config["dataset"]["generate_doc_lengths"] = True
    state = state_of(*run["qwen3"], spec, steps=3)
    names = [name for name in state["model"] if name != "embeddings.weight"]
    groups = {key: state["optim"].pop(key) for key in list(state["optim"]) if key.startswith("param_groups.")}
    for number, (listed, of) in enumerate(((["embeddings.weight"], "embeddings.weight"), (names, names[0]))):
        state["optim"][f"param_groups.{number}.params"] = listed
        for key in ("lr", "betas", "eps", "weight_decay"):
            state["optim"][f"param_groups.{number}.{key}"] = groups[f"param_groups.{of}.{key}"]
    lines = "\n".join(imported(saved(state, config)))

    assert "AdamW's moments of each, after 3 updates" in lines
    assert "note: AdamW counts 3 updates: torch counted one when it saved the checkpoint of step 0" in lines
    assert "z_loss_multiplier = 1e-05; there is none here" in lines
    assert "set training.document_mask = true" in lines
    assert "OLMo-core did not clip gradients" in lines
    assert "see training.on_loss_spike" in lines
    assert "weight_decay = 0.1" in lines
    assert "OLMo-core does not decay the embedding" in lines


def test_an_optimizer_that_never_counts_its_steps_continues_exactly(run, saved):
    """SkipStepAdamW's update with t = 1 in every step is AdamW's with the printed LR, eps and weight decay."""
    spec, (model, optimizer) = SPECS["qwen3"], run["qwen3"]
    trainer = {**TRAINER, "global_step": 5000}
    folder = saved(state_of(model, optimizer, spec, steps=0), config_of(spec), trainer, "step5000")
    lines = imported(folder)
    record = manifest.read(folder / "out")["trained_by"]["settings"]
    factor = math.sqrt(1 - 0.95) / (1 - 0.9)
    weight = model.blocks["0"].mlp.up.weight
    theirs = weight.detach().double().clone()
    first, second = (optimizer.state[weight][key].double() for key in ("exp_avg", "exp_avg_sq"))
    gradient = torch.linspace(-1e-3, 1e-3, theirs.numel(), dtype=torch.float64).reshape(theirs.shape)
    later_first, later_second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
    theirs -= 1e-3 * 0.1 * theirs
    theirs -= 1e-3 * (later_first / 0.1) / ((later_second / 0.05).sqrt() + 1e-8)
    ours = torch.nn.Parameter(weight.detach().double().clone())
    settings = {key: record[f"optimizer.{key}"] for key in ("eps", "weight_decay")}
    adamw = AdamW([ours], lr=1e-3 * factor, betas=(0.9, 0.95), **settings)
    adamw.state[ours] = {"step": torch.tensor(5000.0), "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
    ours.grad = gradient
    adamw.step()

    assert f"multiply its LR by {factor:.6g}" in "\n".join(lines)
    assert "after 5,000 updates" in "\n".join(lines)
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


def test_counts_that_nobody_knows_leave_the_state_out(run, saved):
    """Neither the optimizer, nor the trainer, nor the folder's name has the number of steps."""
    spec = SPECS["qwen3"]
    folder = saved(state_of(*run["qwen3"], spec, steps=0), config_of(spec), {}, "last")
    lines = "\n".join(imported(folder))

    assert "and no optimizer state" in lines
    assert "note: the optimizer counts 0 updates, and how many there were is unknown" in lines


@dataclass
class _Opens:
    path: str

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_the_trainers_state_is_not_executed(run, saved, tmp_path):
    """The counts beside it are read, and of a damaged file none: the step is then that of the folder's name."""
    spec = SPECS["qwen3"]
    trainer = {**TRAINER, "callbacks": _Opens(str(tmp_path / "made"))}
    folder = saved(state_of(*run["qwen3"], spec), config_of(spec), trainer)
    lines = "\n".join(imported(folder, weights_only=True))
    (folder / "train" / "rank0.pt").write_bytes(b"PK")
    without = "\n".join(imported(folder, tmp_path / "again"))

    assert not (tmp_path / "made").exists()
    assert "step: 2; tokens: 1,234" in lines
    assert "not imported: optim: as --weights-only says" in lines
    assert "step: 2; tokens: unknown" in without
    assert "not imported: train/: " in without


def test_damaged_and_missing_files_are_named(run, saved):
    """A cut file, a run's folder, a folder without config, a config that is not JSON, tensors of another model."""
    spec = SPECS["qwen3"]
    folder = saved(state_of(*run["qwen3"], spec), config_of(spec))
    (shard,) = (folder / "model_and_optim").glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="ends too early"):
        imported(folder)
    shard.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"give one of the checkpoints in it: {folder}"):
        imported(folder.parent)
    own = folder / "own.toml"
    own.write_text('[model]\nfamily = "llama"\nsize = "debug"\nwidth = 48\nqk_norm = true\n')
    with pytest.raises(CheckpointError, match="does not fit the model"):
        imported(folder, config=own)
    for text, message in (("{", "not valid JSON"), ("[]", 'has no table "model"')):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            imported(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json: no such file.*--config FILE"):
        imported(folder)
    (folder / "model_and_optim" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="so it is not a DCP checkpoint"):
        imported(folder)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("model", {"block_overrides": {"0": {}}}, "model.block_overrides: is not available here"),
        ("model", {"embed_scale": 2.0}, "model.embed_scale: only 1 is supported, got 2.0"),
        ("model", {"a_new_key": 1}, "model.a_new_key: is not a key of OLMo-core 3.0.0"),
        ("block", {"name": "peri_norm"}, "model.block.name: peri_norm with use_head_qk_norm = True is not a model"),
        ("block", {"attention_residual_alpha": 0.5}, "attention_residual_alpha: only 1 is supported"),
        ("attention", {"gate": {"granularity": "headwise"}}, "model.block.sequence_mixer.gate: is not available here"),
        ("attention", {"bias": None}, "sequence_mixer.bias: only False is supported, got None"),
        ("attention", {"use_head_qk_norm": False}, "default with use_head_qk_norm = False is not a model"),
        (
            "attention",
            {"sliding_window": {"pattern": [8], "force_full_attention_on_first_layer": False}},
            "all layers need one size; the layers have [8, -1]",
        ),
        ("attention", {"sliding_window": {"pattern": []}}, "sliding_window.pattern: must be a list of numbers"),
        ("rope", {"no_global_rope": True}, "sequence_mixer.rope.no_global_rope: only False is supported"),
        ("rope", {"partial_rotary_factor": 0.25}, "rope.partial_rotary_factor: only 1.0 is supported"),
        (
            "rope",
            {"scaling": {"_CLASS_": "x.PIRoPEScalingConfig", "factor": 2.0}},
            "rope.scaling._CLASS_: PIRoPEScalingConfig is not available here",
        ),
        (
            "rope",
            {"scaling": {"_CLASS_": "x.YaRNRoPEScalingConfig", "factor": 2.0, "old_context_len": 100_000_000}},
            "OLMo-core's YaRN differs from ours",
        ),
        ("mlp", {"activation": "gelu_tanh"}, "feed_forward.activation: only 'silu' is supported"),
        ("norm", {"name": "l2_norm"}, "layer_norm.name: must be one of rms, fused_rms"),
        ("norm", {"eps": 1e-3}, "all norms need one eps"),
        ("head", {"bias": True}, "model.lm_head.bias: only False is supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_model_that_is_not_available_here_is_refused_by_key(where, change, message, tmp_path, bare):
    """With the file and the value."""
    config = config_of(SPECS["qwen3"])
    model = config["model"]
    block = model["block"]
    tables = {"model": model, "block": block, "attention": block["sequence_mixer"], "mlp": block["feed_forward"]}
    tables |= {"rope": block["sequence_mixer"]["rope"], "norm": block["layer_norm"], "head": model["lm_head"]}
    tables[where].update(change)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as refused:
        imported(bare, tmp_path / "out", config=path)

    assert message in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.fixture(scope="module")
def bare(run, tmp_path_factory):
    """A folder of only weights, as OLMo-core's converters write it."""
    folder = tmp_path_factory.mktemp("weights")
    dcp.save({"model": state_of(*run["qwen3"], SPECS["qwen3"])["model"]}, checkpoint_id=str(folder), no_dist=True)
    return folder


def test_weights_without_a_trainer_are_imported(bare, tmp_path):
    """The folder itself is the DCP checkpoint; ABF is another base of RoPE; the config may be elsewhere."""
    config = config_of(SPECS["qwen3"])
    scaling = {"_CLASS_": "olmo_core.nn.rope.ABFRoPEScalingConfig", "new_theta": 8_000_000}
    config["model"]["block"]["sequence_mixer"]["rope"]["scaling"] = scaling
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    lines = "\n".join(imported(bare, tmp_path / "out", config=path))
    found = spec_of_checkpoint(manifest.read(tmp_path / "out"), tmp_path / "out")

    assert asdict(found) == {**asdict(SPECS["qwen3"]), "rope_base": 8e6}
    assert "step: unknown; tokens: unknown; LR of the last step: unknown" in lines
