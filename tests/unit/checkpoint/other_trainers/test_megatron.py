"""Megatron-LM's checkpoints: weights, moments and step counts in our names and order, from every form, and damage."""

import shutil

import pytest
import torch
from megatron_checkpoints import state_of, write_distributed, write_legacy
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
SMALL = {"vocab_size": 24, "width": 12, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 10, "norm_eps": 1e-5}
SPECS = {
    "llama": named_size("llama", "debug", 1, {**SMALL, "head_width": 6}),
    "qwen2": named_size("llama", "debug", 1, {**SMALL, "head_width": 2, "qkv_bias": True, "rope_base": 1e6}),
    "qwen3": named_size("llama", "debug", 1, {**SMALL, "head_width": 6, "qk_norm": True, "tie_embeddings": True}),
    "gpt_neox": named_size(
        "gpt_neox", "debug", 1, {"vocab_size": 24, "width": 32, "heads": 4, "parallel_residual": False}
    ),
}
FORMS = {
    "legacy": (write_legacy, {}),
    "legacy, local layers, 2 x 2 ranks": (write_legacy, {"local": True, "tp": 2, "pp": 2}),
    "legacy, bf16 with float32 copies": (write_legacy, {"dtype": torch.bfloat16, "tp": 2}),
    "legacy, flat buffers": (write_legacy, {"buffers": True, "dtype": torch.bfloat16, "tp": 2, "pp": 2}),
    "distributed": (write_distributed, {}),
    "distributed, layer by layer, bf16": (write_distributed, {"stacked": False, "dtype": torch.bfloat16}),
    "distributed, flat buffers, 2 x 2 ranks": (
        write_distributed,
        {"buffers": True, "dtype": torch.bfloat16, "tp": 2, "pp": 2},
    ),
    "distributed, flat buffers of Transformer Engine": (write_distributed, {"buffers": True, "local": False}),
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
        main(["import", "--from", "megatron", str(source), str(out), *options])
    return ended.value.code


def ours(folder, spec):
    """Weights and optimizer tensors of a written checkpoint."""
    model = build_model(spec)
    adamw = build_adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    load_state(folder, model, adamw)
    return model.state_dict(), optimizer_tensors(model, adamw)


@pytest.mark.parametrize(
    ("form", "name"), [(form, "llama") for form in FORMS] + [
        ("legacy, local layers, 2 x 2 ranks", "qwen2"), ("legacy, flat buffers", "qwen3"),
        ("distributed, flat buffers, 2 x 2 ranks", "qwen3"), ("distributed, flat buffers, 2 x 2 ranks", "gpt_neox"),
        ("legacy, bf16 with float32 copies", "gpt_neox"), ("distributed", "qwen2"),
    ]
)  # fmt: skip
def test_an_import_has_megatrons_weights_and_moments(form, name, training, tmp_path, capsys):
    """Bit for bit: of bf16 models the optimizer's float32 weights; the model from the arguments in the checkpoint."""
    (model, optimizer), spec = training[name], SPECS[name]
    write, how = FORMS[form]
    write(tmp_path / "theirs", state_of(model, optimizer, spec), spec, **how)
    status = imported(tmp_path / "theirs" / "iter_0000002", tmp_path / "out")
    said = capsys.readouterr()

    assert status == 0, said.err
    assert spec_of_checkpoint(manifest.read(tmp_path / "out"), tmp_path / "out") == spec
    weights, tensors = ours(tmp_path / "out", spec)
    for key, weight in model.named_parameters():
        assert torch.equal(weights[key], weight), key
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(tensors[f"state.{key}.{moment}"], optimizer.state[weight][moment]), (key, moment)
        assert tensors[f"state.{key}.step"] == 2
    assert "after 2 updates\nstep: 2; tokens: 32; LR of the next step: 0.01\n" in said.out
    assert "beta2 = 0.95" in said.out


def test_the_newest_checkpoint_of_a_run_is_taken_and_weights_only_leaves_out_the_optimizer(training, tmp_path, capsys):
    """latest_checkpointed_iteration.txt names it; the weights are then the bf16 ones."""
    (model, optimizer), spec = training["llama"], SPECS["llama"]
    write_legacy(tmp_path / "run", state_of(model, optimizer, spec), spec, dtype=torch.bfloat16, vocab_size=20)
    status = imported(tmp_path / "run", tmp_path / "out", "--weights-only")
    said = capsys.readouterr().out
    loaded = build_model(spec)
    load_state(tmp_path / "out", loaded, None)

    assert status == 0
    assert all(torch.equal(loaded.state_dict()[k], w.bfloat16().float()) for k, w in model.state_dict().items())
    assert "not imported: optimizer: as --weights-only says" in said
    assert "the vocabulary has 24 rows, of which Megatron-LM added 4 as padding" in said


def _without(*names):
    return lambda folder: [shutil.rmtree(folder / name) for name in names]


def _truncated(name):
    def cut(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def _changed(change):
    def damage(folder):
        path = folder / "mp_rank_00_000" / "model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_without("mp_rank_01_000"), "has no folder of tensor-parallel rank 1, pipeline stage 0"),
        (_without("mp_rank_01_000", "mp_rank_01_001"), "tensor_model_parallel_size = 2"),
        (_truncated("mp_rank_01_001/model_optim_rng.pt"), "model_optim_rng.pt: cannot be read: "),
        (lambda folder: (folder / "mp_rank_00_000" / "model_optim_rng.pt").unlink(), "model_optim_rng.pt: is missing"),
        (_changed(lambda it: it["optimizer"]["state"][1].update(step=5)), "count different numbers of updates"),
        (_changed(lambda it: setattr(it["args"], "num_layers", "x")), "cannot be read: ValueError: invalid literal"),
        (_changed(lambda it: setattr(it["args"], "num_layers", 10**9)), "a model of 1,000,000,000 layers is described"),
    ],
)  # fmt: skip
def test_a_damaged_legacy_checkpoint_is_refused(damage, expected, training, tmp_path, capsys):
    """The message names the rank or the file; nothing is written."""
    (model, optimizer), spec = training["llama"], SPECS["llama"]
    write_legacy(tmp_path, state_of(model, optimizer, spec), spec, tp=2, pp=2)
    damage(tmp_path / "iter_0000002")
    status = imported(tmp_path / "iter_0000002", tmp_path / "out")

    assert status != 0
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"num_experts": 8}, "num_experts = 8: a mixture of experts"),
        ({"normalization": "LayerNorm"}, "normalization: LayerNorm there, RMSNorm in family llama"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type: learned_absolute there, rope"),
        ({"add_bias_linear": True}, "add_bias_linear: True there, False in family llama"),
        ({"num_layers": None}, "holds no num_layers among the arguments"),
        ({"kv_channels": 4}, "in our layout, but the model needs"),
    ],
)
def test_another_architecture_is_refused(more, expected, training, tmp_path, capsys):
    """The message names the argument, what it is there and what it must be."""
    (model, optimizer), spec = training["llama"], SPECS["llama"]
    write_distributed(tmp_path, state_of(model, optimizer, spec), spec, **more)
    status = imported(tmp_path / "iter_0000002", tmp_path / "out")

    assert status != 0
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, "of embedding.word_embeddings.weight rounds to other values than the model has"),
        ({"buffers": True}, "taken apart: the weights are not where they should be in optimizer.distributed."),
    ],
    ids=["by parameter", "flat buffers"],
)  # fmt: skip
def test_an_optimizer_state_of_other_weights_is_refused(how, expected, training, tmp_path, capsys):
    """As Megatron-LM's fully reshardable state is, where buckets are padded; --weights-only imports the weights."""
    (model, optimizer), spec = training["llama"], SPECS["llama"]
    state = state_of(model, optimizer, spec)
    weights = {name: tensor.roll(1, 0) for name, tensor in state["param"].items()}
    write_distributed(tmp_path, state, spec, dtype=torch.bfloat16, weights=weights, **how)
    status = imported(tmp_path / "iter_0000002", tmp_path / "out")

    assert status != 0
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert imported(tmp_path / "iter_0000002", tmp_path / "out", "--weights-only") == 0


def test_flattened_ranges_are_refused(training, tmp_path, capsys):
    """The form of Megatron-LM before 0.16; the message says how to save another one."""
    (model, optimizer), spec = training["llama"], SPECS["llama"]
    state = state_of(model, optimizer, spec)
    ranges = {kind: {name: tensor.flatten() for name, tensor in state[kind].items()} for kind in state}
    write_distributed(tmp_path, ranges, spec, weights=state["param"])
    status = imported(tmp_path / "iter_0000002", tmp_path / "out")

    assert status != 0
    assert "save it with --dist-ckpt-optim-fully-reshardable" in capsys.readouterr().err


def test_the_folder_of_a_run_without_a_checkpoint_is_refused(tmp_path, capsys):
    """The message names what is in it."""
    (tmp_path / "iter_0000100").mkdir()
    status = imported(tmp_path, tmp_path / "out")

    assert status != 0
    assert "so it is no Megatron-LM checkpoint; give one of iter_0000100 in it" in capsys.readouterr().err


@pytest.mark.parametrize("newest", ["../elsewhere/iter_0000002", "..", "", "\xb2"])
def test_a_file_that_names_a_checkpoint_outside_of_the_run_is_refused(newest, training, tmp_path, capsys):
    """A copied run names no other folder of this machine."""
    (model, optimizer), spec = training["llama"], SPECS["llama"]
    write_legacy(tmp_path / "elsewhere", state_of(model, optimizer, spec), spec)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text(newest)
    status = imported(tmp_path / "run", tmp_path / "out")

    assert status == 2
    assert ("which is no folder in" if newest != "\xb2" else "is not a checkpoint of") in capsys.readouterr().err


def test_a_distributed_checkpoint_with_one_moment_is_refused(training, tmp_path, capsys):
    """Without the other one nothing would be kept; the message says what is missing, and names --weights-only."""
    (model, optimizer), spec = training["llama"], SPECS["llama"]
    state = state_of(model, optimizer, spec)
    write_distributed(tmp_path, {kind: state[kind] for kind in ("param", "exp_avg")}, spec)
    status = imported(tmp_path / "iter_0000002", tmp_path / "out")

    assert status == 2
    assert "its optimizer state lacks exp_avg_sq in the forms that are read here" in capsys.readouterr().err
