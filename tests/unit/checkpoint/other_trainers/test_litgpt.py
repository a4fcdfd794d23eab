"""litgpt's checkpoints: its QKV layouts, numbered optimizer states and configs; what would execute code is refused."""

import io
import pathlib
import pickletools
import zipfile

import pytest
import torch
import yaml
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader
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
_SMALL = {"vocab_size": 300, "width": 32, "layers": 2, "heads": 4, "mlp_width": 24}
_LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_seq_len=16)


def llama(**fields):
    return named_size("llama", "debug", 257, {**_SMALL, "kv_heads": 2, **fields})


SPECS = {
    "pythia": named_size("gpt_neox", "debug", 257, {**_SMALL, "rotary_fraction": 0.5}),
    "llama": llama(rope_scaling=_LLAMA3, sliding_window=8),
    "qwen2.5": llama(qkv_bias=True, norm_eps=1e-6),
    "qwen3": llama(qk_norm=True, head_width=6),
    "smollm": llama(tie_embeddings=True),
}
BLOCK = {
    "attention_norm": "norm_1",
    "attention.out": "attn.proj",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "mlp_norm": "norm_2",
    "mlp.gate": "mlp.fc_1",
    "mlp.up": "mlp.fc_2",
    "mlp.down": "mlp.proj",
}


def config_of(spec):
    """The fields of litgpt.Config that describe a model."""
    config = {
        "n_layer": spec.layers,
        "n_embd": spec.width,
        "n_head": spec.heads,
        "intermediate_size": spec.mlp_width,
        "norm_eps": spec.norm_eps,
        "rope_base": int(spec.rope_base),
        "padded_vocab_size": spec.vocab_size,
        "block_size": 64,
        "name": "test",
        "rope_adjustments": None,
        "n_expert": 0,
    }
    if spec.family == "gpt_neox":
        return config | {"mlp_class_name": "GptNeoxMLP", "rotary_percentage": spec.rotary_fraction}
    scaling = spec.rope_scaling
    return config | {
        "mlp_class_name": "LLaMAMLP",
        "norm_class_name": "RMSNorm",
        "bias": False,
        "parallel_residual": False,
        "rotary_percentage": 1.0,
        "n_query_groups": spec.kv_heads,
        "head_size": spec.head_width,
        "attn_bias": spec.qkv_bias,
        "norm_qk": spec.qk_norm,
        "sliding_window_size": spec.sliding_window,
        "rope_adjustments": scaling
        and {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_seq_len": scaling.original_seq_len,
        },
    }


def their_tensors(ours, spec, *, old):
    """litgpt's name -> tensor, in the order of its model, of weights (or moments) by our name.

    `old`: before 0.5.5, where QKV has the rows of one key/value head after those of another.
    """
    theirs = {}
    if "head.weight" in ours:
        theirs["lm_head.weight"] = ours["head.weight"]
    theirs["transformer.wte.weight"] = ours["embedding.weight"]
    for layer in range(spec.layers):
        start = f"blocks.{layer}."
        for kind in ("weight", "bias"):
            fused = qkv_rows(ours, f"{start}attention", kind, spec, old=old)
            if fused is not None:
                theirs[f"transformer.h.{layer}.attn.{'attn' if old else 'qkv'}.{kind}"] = fused
        for name, tensor in ours.items():
            inner, _, kind = name.removeprefix(start).rpartition(".")
            if name.startswith(start) and inner in BLOCK:
                their = "mlp.fc" if spec.family == "gpt_neox" and inner == "mlp.up" else BLOCK[inner]
                theirs[f"transformer.h.{layer}.{their}.{kind}"] = tensor
    return theirs | {
        f"transformer.ln_f.{kind}": ours[f"final_norm.{kind}"]
        for kind in ("weight", "bias")
        if f"final_norm.{kind}" in ours
    }


def qkv_rows(ours, where, kind, spec, *, old):
    """The fused rows: of all queries, keys and values; or, `old`, head by head."""
    if spec.family == "gpt_neox":  # ours is head by head
        rows, width = ours[f"{where}.qkv.{kind}"], spec.head_width
        if old:
            return rows
        return torch.stack(
            [
                rows[head * 3 * width + part * width + i]
                for part in range(3)
                for head in range(spec.heads)
                for i in range(width)
            ]
        )
    if f"{where}.q.{kind}" not in ours:
        return None
    q, k, v = (ours[f"{where}.{part}.{kind}"] for part in "qkv")
    if not old:
        return torch.cat([q, k, v])
    width = spec.head_width
    shared = spec.heads // spec.kv_heads * width
    return torch.cat(
        [rows[g * n : (g + 1) * n] for g in range(spec.kv_heads) for rows, n in ((q, shared), (k, width), (v, width))]
    )


def content_of(model, optimizer, spec, *, old=False):
    """What `litgpt pretrain` saves in a single process: parameters are numbered in the model's order."""
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    states = {name: optimizer.state[weight] for name, weight in model.named_parameters()}
    stored = their_tensors(weights, spec, old=old)
    moments = {
        key: their_tensors({name: state[key] for name, state in states.items()}, spec, old=old)
        for key in ("exp_avg", "exp_avg_sq")
    }
    numbered = {
        number: {"step": torch.tensor(2.0), **{key: values[name].clone() for key, values in moments.items()}}
        for number, name in enumerate(stored)
    }
    if spec.tied:
        stored = {"lm_head.weight": stored["transformer.wte.weight"], **stored}
    group = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01, "decoupled_weight_decay": True}
    return {
        "model": stored,
        "optimizer": {"state": numbered, "param_groups": [{**group, "params": list(numbered)}]},
        "train_dataloader": {"num_samples_yielded": 8},
        "iter_num": 4,
        "step_count": 2,
    }


OPTIONS = {
    "train": {"micro_batch_size": 2, "max_seq_length": 16, "max_norm": 0.5, "tie_embeddings": False},
    "devices": 3,
    "num_nodes": 1,
    "model_name": "test",
}


def saved(folder, spec, content, config=None):
    """A folder of a checkpoint with these files."""
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config or config_of(spec)))
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(OPTIONS))
    return folder


def imported(folder, **request):
    """The lines that the import printed."""
    lines = []
    import_from_trainer("litgpt", ImportRequest(folder, **request), folder / "out", log=lines.append)
    return lines


@pytest.fixture(scope="module")
def run():
    """Name of a spec -> the model and its optimizer after two steps."""
    return {name: trained(spec) for name, spec in SPECS.items()}


def assert_ours(folder, model, optimizer, spec):
    """The import in folder/out is this model with this state, bit for bit."""
    assert spec_of_checkpoint(manifest.verify(folder / "out"), folder / "out") == spec
    ours = build_model(spec)
    adamw = build_adamw(ours, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    load_state(folder / "out", ours, adamw)
    mine = optimizer_tensors(ours, adamw)
    assert all(torch.equal(weight, ours.state_dict()[key]) for key, weight in model.state_dict().items())
    for key, weight in model.named_parameters():
        for moment, value in optimizer.state[weight].items():
            assert torch.equal(mine[f"state.{key}.{moment}"], value), (key, moment)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("old", [False, True], ids=["fused", "interleaved"])
def test_an_import_has_litgpts_weights_and_moments(name, old, run, tmp_path):
    """Bit for bit, in our layout; the report has step, tokens of all devices, and what differs in litgpt."""
    spec, (model, optimizer) = SPECS[name], run[name]
    folder = saved(tmp_path / "step-2", spec, content_of(model, optimizer, spec, old=old))
    lines = imported(folder)

    assert_ours(folder, model, optimizer, spec)
    assert f"step: 2; tokens: {4 * 2 * 16 * 3:,}; LR of the last step: 0.01" in lines
    assert any(line.startswith("note: litgpt decays every parameter with weight_decay 0.01") for line in lines)
    assert "note: litgpt clips gradients to train.max_norm = 0.5: set training.max_norm" in lines
    assert any(line.startswith("not imported: train_dataloader") for line in lines)
    assert "weight_decay = 0.01" in lines[-1]


def test_states_by_name_and_prefixes_of_wrappers(run, tmp_path):
    """Under FSDP the state has names; torch.compile puts a prefix before them."""
    spec, (model, optimizer) = SPECS["llama"], run["llama"]
    content = content_of(model, optimizer, spec)
    names = [f"_orig_mod.{name}" for name in content["model"]]
    content["model"] = dict(zip(names, content["model"].values(), strict=True))
    content["optimizer"]["state"] = dict(zip(names, content["optimizer"]["state"].values(), strict=True))
    content["optimizer"]["param_groups"][0]["params"] = names
    folder = saved(tmp_path / "step-2", spec, content)
    imported(folder)

    assert_ours(folder, model, optimizer, spec)


def test_a_file_of_only_weights_is_imported_without_a_state(run, tmp_path):
    """As `litgpt convert_pretrained_checkpoint` writes it; bfloat16 is noted; the path may be the file."""
    spec = SPECS["llama"]
    weights = {name: tensor.bfloat16() for name, tensor in content_of(*run["llama"], spec)["model"].items()}
    folder = saved(tmp_path / "converted", spec, weights)
    lines = []
    request = ImportRequest(folder / "lit_model.pth")
    import_from_trainer("litgpt", request, folder / "out", log=lines.append)

    assert "imported: 21 weights, and no optimizer state" in lines
    assert any(line.startswith("note: the weights are in bfloat16 and are stored in float32") for line in lines)


class _Calls:
    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_objects_are_not_executed(run, tmp_path):
    """litgpt pickles torch's DataLoader into the file: the rest of it is imported; and of a file with a trap in it."""
    spec, (model, optimizer) = SPECS["llama"], run["llama"]
    content = content_of(model, optimizer, spec)
    trap = _Calls()
    trap.path = str(tmp_path / "made")
    loader = saved(tmp_path / "loader", spec, {**content, "train_dataloader": DataLoader([1, 2])})
    evil = saved(tmp_path / "evil", spec, {**content, "step_count": trap})
    lines = [imported(folder) for folder in (loader, evil)]

    assert_ours(loader, model, optimizer, spec)
    assert any(line.startswith("step: 2; ") for line in lines[0])
    assert any(line.startswith("step: unknown; ") for line in lines[1])
    assert not (tmp_path / "made").exists()


def test_damaged_files_are_named(run, tmp_path):
    """Truncated anywhere, cut inside its pickle, or another file: one error, with the file, and no folder is left."""
    spec = SPECS["llama"]
    folder = saved(tmp_path / "step-2", spec, content_of(*run["llama"], spec))
    file = folder / "lit_model.pth"
    whole = file.read_bytes()
    for cut in (0, 200, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"lit_model\.pth: .*[cC]opy"):
            imported(folder)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in parts if name.endswith("data.pkl")]
    for _, _, position in list(pickletools.genops(parts[pickled]))[::211]:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, part in parts.items():
                archive.writestr(name, part[:position] if name == pickled else part)
        with pytest.raises(CheckpointError):
            imported(folder)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="holds a list, not a dict of weights"):
        imported(folder)
    torch.save({"model": {"lm_head.weight": torch.ones(2, 2)}}, file)
    with pytest.raises(
        CheckpointError, match=r"has no transformer.wte.weight, so it is not a model of litgpt; it has lm_head"
    ):
        imported(folder)

    assert not (folder / "out").exists()


def test_a_path_without_a_checkpoint_says_what_is_there(run, tmp_path):
    """A run's folder, a sharded checkpoint, a folder without the model's config, no folder."""
    spec = SPECS["llama"]
    folder = saved(tmp_path / "step-00000002", spec, content_of(*run["llama"], spec))
    with pytest.raises(CheckpointError, match=f"give one of the checkpoints in it: {folder}"):
        imported(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        imported(tmp_path / "none")
    (folder / "model_config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"model_config.yaml: no such file.*--config FILE"):
        imported(folder)
    own = tmp_path / "own.toml"
    own.write_text(
        '[model]\nfamily = "llama"\nsize = "debug"\n'
        + "".join(f"{k} = {v}\n" for k, v in {**_SMALL, "kv_heads": 2}.items())
    )
    with pytest.raises(CheckpointError, match="has shape"):
        imported(folder, config=pathlib.Path(own.write_text(own.read_text().replace("= 24", "= 25")) and own))
    (folder / "lit_model.pth").unlink()
    (folder / "lit_model.pth").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, a sharded checkpoint"):
        imported(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: is not available here, got 30.0"),
        ({"rope_interleave": True}, "rope_interleave: is not available here"),
        ({"norm_1": False}, "norm_1: only True is supported, got False"),
        ({"rotary_percentage": 0.5}, "rotary_percentage: only 1.0 is supported, got 0.5"),
        ({"rope_adjustments": {"factor": 2.0}}, "rope_adjustments: only Llama 3's"),
        (
            {"rope_adjustments": {"factor": 2.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 64}},
            "rope_adjustments: only Llama 3's",
        ),
        ({"sliding_window_indices": [1, 0]}, "sliding_window_indices: a sliding window in only some of the layers"),
        ({"bias": True}, "bias: only False is supported, got True"),
        ({"attention_scores_scalar": 7}, "attention_scores_scalar: only the head size, 8, is supported"),
        ({"a_new_key": 3}, "a_new_key: is not a key of litgpt 0.5.13, which is read here, got 3"),
        ({"n_head": "four"}, "n_head: must be a number, got 'four'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_model_that_is_not_available_here_is_refused_by_key(change, message, run, tmp_path):
    """With the file and the value."""
    spec = SPECS["llama"]
    content = content_of(*run["llama"], spec)
    folder = saved(tmp_path / "step-2", spec, content, config_of(spec) | change)
    with pytest.raises(ConfigError) as refused:
        imported(folder)

    assert message in str(refused.value)
    assert str(folder / "model_config.yaml") in str(refused.value)


def test_keys_without_effect_are_accepted(run, tmp_path):
    """Windows in no layer; and numbers of experts that a dense model does not use."""
    spec = llama(rope_scaling=_LLAMA3)
    change = {"sliding_window_indices": [0, 0], "routed_scaling_factor": 1.0, "hf_config": {"org": "a", "name": "b"}}
    config = config_of(SPECS["llama"]) | change
    folder = saved(tmp_path / "step-2", spec, content_of(*run["llama"], SPECS["llama"]), config)
    imported(folder)

    assert spec_of_checkpoint(manifest.read(folder / "out"), folder / "out") == spec


def test_other_optimizers_are_not_imported(run, tmp_path):
    """SGD, AMSGrad and Adam with L2 regularization: the report names why; the weights are imported."""
    spec = SPECS["llama"]
    content = content_of(*run["llama"], spec)
    params = [torch.nn.Parameter(tensor.clone()) for tensor in content["model"].values()]
    for number, (optimizer, reason) in enumerate(
        (
            (SGD(params, lr=0.1, momentum=0.9), "it is not AdamW, whose state differs in exp_avg"),
            (AdamW(params, amsgrad=True), "it is not AdamW, whose state differs in max_exp_avg_sq"),
            (Adam(params, weight_decay=0.1), "it is Adam with L2 regularization, not AdamW"),
            (AdamW(params[1:]), "it has 16 parameters, the model 17"),
        )
    ):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        folder = saved(tmp_path / str(number), spec, {**content, "optimizer": optimizer.state_dict()})
        lines = imported(folder)

        assert f"not imported: optimizer: {reason}" in "\n".join(lines)
        assert "imported: 21 weights, and no optimizer state" in lines
    only = saved(tmp_path / "only", spec, content)
    assert "not imported: optimizer: as --weights-only says" in imported(only, weights_only=True)


def test_embeddings_that_should_be_tied_and_differ_are_refused(run, tmp_path):
    """hyperparameters.yaml is then of another run."""
    spec = SPECS["llama"]
    folder = saved(tmp_path / "step-2", spec, content_of(*run["llama"], spec))
    options = {**OPTIONS, "train": {**OPTIONS["train"], "tie_embeddings": True}}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(CheckpointError, match=r"says train.tie_embeddings, but lm_head.weight and"):
        imported(folder)
