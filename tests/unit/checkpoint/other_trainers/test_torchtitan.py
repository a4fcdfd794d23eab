"""torchtitan's checkpoints: weights, moments and step counts in our names and order, and what the files lack."""

import json

import pytest
import torch
from torchtitan_checkpoints import config_json, state_of, trained, write

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.state_dict import load_state, optimizer_tensors
from titan_cpt.cli import main
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import as_config_table, named_size
from titan_cpt.models.spec import RopeScaling
from titan_cpt.training.optimization.adamw import build_adamw

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)
_SMALL = {"vocab_size": 300, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24}
_SCALING = RopeScaling(kind="llama3", factor=8.0, original_seq_len=8192)
SPECS = {
    "llama3": named_size("llama", "debug", 257, {**_SMALL, "rope_base": 500_000.0, "rope_scaling": _SCALING}),
    "qwen3": named_size(
        "llama", "debug", 257, {**_SMALL, "head_width": 6, "qk_norm": True, "norm_eps": 1e-6, "tie_embeddings": True}
    ),
}


def saved(folder, name, **how):
    """A checkpoint of torchtitan in folder/step-2 and its config in folder/config.json; model and optimizer of ours."""
    model, optimizer = trained(SPECS[name])
    write(folder / "step-2", state_of(model, optimizer, SPECS[name], **how))
    (folder / "config.json").write_text(json.dumps(config_json(SPECS[name])))
    return model, optimizer


def imported(folder, *options):
    """The exit status of `titan-cpt import`."""
    with pytest.raises(SystemExit) as ended:
        main(["import", "--from", "torchtitan", str(folder / "step-2"), str(folder / "out"), *options])
    return ended.value.code


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "separate"])
def test_an_import_has_torchtitans_weights_and_moments(name, fuse, tmp_path, capsys):
    """Bit for bit, in our order of features; the report has step, tokens and the LR of the next step."""
    model, optimizer = saved(tmp_path, name, fuse=fuse)
    status = imported(tmp_path, "--config", str(tmp_path / "config.json"))
    ours = build_model(SPECS[name])
    adamw = build_adamw(ours, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    load_state(tmp_path / "out", ours, adamw)
    mine = optimizer_tensors(ours, adamw)
    said = capsys.readouterr().out

    assert status == 0
    assert all(torch.equal(weight, ours.state_dict()[key]) for key, weight in model.state_dict().items())
    for key, weight in model.named_parameters():
        for moment, value in optimizer.state[weight].items():
            assert torch.equal(mine[f"state.{key}.{moment}"], value), (key, moment)
    assert "AdamW's moments of each, after 2 updates\nstep: 2; tokens: 36; LR of the next step: 0.01\n" in said
    assert "beta1 = 0.9" in said
    assert "beta2 = 0.95" in said
    assert "not imported: dataloader: the position in the data" in said
    assert as_config_table(SPECS[name]).splitlines()[-1] in said


def test_weights_only_leaves_out_the_optimizer(tmp_path, capsys):
    """The report and the manifest say so."""
    saved(tmp_path, "llama3")
    status = imported(tmp_path, "--weights-only", "--config", str(tmp_path / "config.json"), "--tokenizer", "bytes")
    said = capsys.readouterr().out

    assert status == 0
    assert "not imported: optimizer: as --weights-only says" in said
    assert "the tokenizer of these weights is unknown" not in said
    assert "optimizer" not in manifest.read(tmp_path / "out")["trained_by"]
