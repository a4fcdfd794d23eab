"""GPT-NeoX's checkpoints: weights, moments and step counts in our names and order, from both layouts, and damage."""

import pytest
import torch
from neox_checkpoints import write
from torchtitan_checkpoints import trained

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.checkpoint.state_dict import load_state, optimizer_tensors
from titan_cpt.cli import main
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size
from titan_cpt.training.optimization.adamw import build_adamw

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)
NEOX = {"vocab_size": 24, "width": 32, "heads": 4}
LLAMA = {"vocab_size": 24, "width": 16, "layers": 2, "heads": 4, "mlp_width": 6, "norm_eps": 1e-5}
SPECS = {
    "gpt_neox": named_size("gpt_neox", "debug", 1, NEOX),
    "one after the other": named_size("gpt_neox", "debug", 1, {**NEOX, "parallel_residual": False}),
    "llama": named_size("llama", "debug", 1, {**LLAMA, "kv_heads": 2, "head_width": 4}),
    "llama, heads of their own": named_size("llama", "debug", 1, {**LLAMA, "kv_heads": 4, "head_width": 4}),
}


@pytest.fixture(scope="module")
def training():
    """Name of a spec -> its model and optimizer after two steps; vectors and biases unlike each other."""
    made = {}
    for name, spec in SPECS.items():
        model, optimizer = trained(spec)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                if parameter.ndim == 1:
                    parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number)))
        made[name] = model, optimizer
    return made


def imported(source, out, *options):
    """The exit status of `titan-cpt import`."""
    with pytest.raises(SystemExit) as ended:
        main(["import", "--from", "neox", str(source), str(out), *options])
    return ended.value.code


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("gpt_neox", {}),
        ("gpt_neox", {"tp": 2, "pp": 2, "old": True, "dtype": torch.bfloat16}),
        ("gpt_neox", {"tp": 2, "mapped": False}),
        ("one after the other", {"tp": 2, "pp": 1, "mapped": False, "dp": 3}),
        ("llama", {"tp": 2, "pp": 2}),
        ("llama", {"old": True, "dp": 1}),
        ("llama, heads of their own", {"tp": 2, "dtype": torch.bfloat16}),
    ],
)
def test_an_import_has_gpt_neoxs_weights_and_moments(name, how, training, tmp_path, capsys):
    """Bit for bit; of bf16 models the optimizer's float32 weights; the model from the copies of the config files."""
    (model, optimizer), spec = training[name], SPECS[name]
    write(tmp_path / "theirs", model, optimizer, spec, **how)
    status = imported(tmp_path / "theirs", tmp_path / "out")
    said = capsys.readouterr()

    assert status == 0, said.err
    assert spec_of_checkpoint(manifest.read(tmp_path / "out"), tmp_path / "out") == spec
    mine = build_model(spec)
    adamw = build_adamw(mine, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    load_state(tmp_path / "out", mine, adamw)
    tensors = optimizer_tensors(mine, adamw)
    for key, weight in model.named_parameters():
        assert torch.equal(mine.state_dict()[key], weight), key
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(tensors[f"state.{key}.{moment}"], optimizer.state[weight][moment]), (key, moment)
        assert tensors[f"state.{key}.step"] == 2
    assert "after 2 updates\nstep: 2; tokens: unknown; LR of the next step: 0.01\n" in said.out
    assert ("each of 2 tensor-parallel ranks added its own bias" in said.out) == (name == "gpt_neox" and "tp" in how)


@pytest.mark.parametrize(
    ("file", "keep", "expected"),
    [
        ("layer_03-model_01-model_states.pt", 0, "has no layer_03-model_01-model_states.pt"),
        ("layer_03-model_01-model_states.pt", 500, "layer_03-model_01-model_states.pt: cannot be read: "),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", 0, "has no zero_pp_rank_0_mp_rank_01_optim_states.pt"),
        ("zero_pp_rank_1_mp_rank_01_optim_states.pt", 0, "has 1 shards of the optimizer of model-parallel rank 1, but"),
        ("configs/model.yml", 0, "has no configs/*.yml, so the model is unknown"),
    ],
)
def test_a_damaged_checkpoint_is_refused(file, keep, expected, training, tmp_path, capsys):
    """The message names the file; nothing is written."""
    (model, optimizer), spec = training["gpt_neox"], SPECS["gpt_neox"]
    write(tmp_path, model, optimizer, spec, tp=2, pp=1)
    path = tmp_path / "global_step2" / file
    content = path.read_bytes()[:keep]
    path.unlink()
    if content:
        path.write_bytes(content)
    status = imported(tmp_path / "global_step2", tmp_path / "out")

    assert status != 0
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("line", "noted"), [("bias-gelu-fusion: True", True), ("bias_gelu_fusion: false", False)])
def test_the_approximation_of_gelu_is_noted_where_it_was_trained_with(line, noted, training, tmp_path, capsys):
    """As the copy of the config says."""
    (model, optimizer), spec = training["gpt_neox"], SPECS["gpt_neox"]
    write(tmp_path, model, optimizer, spec)
    config = tmp_path / "global_step2" / "configs" / "model.yml"
    config.write_text(f"{config.read_text()}\n{line}\n")
    status = imported(tmp_path, tmp_path / "out")

    assert status == 0
    assert ("GPT-NeoX computes GELU by its tanh approximation" in capsys.readouterr().out) == noted


def test_weights_only_leaves_out_the_optimizer(training, tmp_path, capsys):
    """A checkpoint without ZeRO's shards is then imported too."""
    (model, optimizer), spec = training["llama"], SPECS["llama"]
    write(tmp_path, model, optimizer, spec)
    for path in (tmp_path / "global_step2").glob("zero_*"):
        path.unlink()
    refused = imported(tmp_path, tmp_path / "out")
    message = capsys.readouterr().err

    assert refused != 0
    assert "has no optimizer state of ZeRO-1 or ZeRO-2 of model-parallel rank 0" in message
    assert imported(tmp_path, tmp_path / "out", "--weights-only") == 0
