"""GPT-NeoX: the same answers as transformers, first weights that only the seed decides, rotary positions, stages."""

import math

import family_models
import pytest
import torch
import torch.distributed as dist
from family_models import with_all_weights_drawn
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from titan_cpt.errors import CheckpointError
from titan_cpt.models.common.init import fill_normal
from titan_cpt.models.common.layers import rotary_tables, rotate
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.models.huggingface_rope import rope_scaling_keys
from titan_cpt.models.huggingface_weights import from_huggingface, to_huggingface

TOKENS_BL = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(5))


YARN = {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_seq_len": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def built(*size, **overrides):
    return family_models.built("gpt_neox", *size, **overrides)


def transformers_config(spec):
    return GPTNeoXConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        intermediate_size=spec.mlp_width,
        layer_norm_eps=spec.norm_eps,
        use_parallel_residual=spec.parallel_residual,
        rotary_pct=spec.rotary_fraction,
        rotary_emb_base=spec.rope_base,
        rope_scaling=None if spec.rope_scaling is None else rope_scaling_keys(spec.rope_scaling),
        max_position_embeddings=64,
    )


def in_transformers(model, folder):
    """The model as transformers reads it from the files of an export."""
    transformers_config(model.spec).save_pretrained(folder)
    save_file(to_huggingface(model.state_dict(), model.spec), folder / "model.safetensors")
    return GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)


def transformers_file(spec, folder):
    """The weights in a file that transformers wrote."""
    theirs = GPTNeoXForCausalLM(transformers_config(spec))
    theirs.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("parallel_residual", [True, False])
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rotary_fraction": 1.0},
        {"rotary_fraction": 0.5, "rope_base": 500.0},
        {"rotary_fraction": 0.5, "rope_scaling": YARN},
        {"rotary_fraction": 1.0, "rope_base": 500.0, "rope_scaling": LLAMA3},
    ],
)
def test_logits_and_gradients_are_those_of_transformers(parallel_residual, rope, tmp_path):
    """The same weights give the same logits and, for a random scalar of them, the same gradient of every weight."""
    model = with_all_weights_drawn(built(parallel_residual=parallel_residual, **rope))
    theirs = in_transformers(model, tmp_path)
    logits_BLV, their_logits_BLV = model(TOKENS_BL), theirs(TOKENS_BL).logits
    probe_BLV = torch.randn(logits_BLV.shape, generator=torch.Generator().manual_seed(3))
    (logits_BLV * probe_BLV).mean().backward()
    (their_logits_BLV * probe_BLV).mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    their_grads = {name.replace("lm_head", "embed_out"): p.grad for name, p in theirs.named_parameters()}

    torch.testing.assert_close(logits_BLV, their_logits_BLV, rtol=1e-4, atol=1e-4)
    for name, grad in from_huggingface(their_grads, model.spec).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


def test_weights_go_to_hugging_face_and_back_unchanged(tmp_path):
    """Either round trip gives back every name and every bit, and our model loads what transformers wrote."""
    model = with_all_weights_drawn(built())
    ours, theirs = model.state_dict(), transformers_file(model.spec, tmp_path)
    ours_again = from_huggingface(to_huggingface(ours, model.spec), model.spec)
    theirs_again = to_huggingface(from_huggingface(theirs, model.spec), model.spec)

    assert list(ours_again) == list(ours)
    assert set(theirs_again) == set(theirs)
    assert all(torch.equal(ours_again[name], ours[name]) for name in ours)
    assert all(torch.equal(theirs_again[name], theirs[name]) for name in theirs)
    model.load_state_dict(from_huggingface(theirs, model.spec))


def test_constants_that_older_releases_saved_are_ignored(tmp_path):
    """Pythia's files hold causal masks and wavelengths beside the weights; other releases one for the whole model."""
    state = transformers_file(built().spec, tmp_path)
    names = [f"layers.1.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")]
    names += [
        "layers.0.attn.masked_bias",
        "rotary_emb.inv_freq",
        "rotary_emb.original_inv_freq",
        "embed_in.position_ids",
    ]
    names += ["layers.0.attention.rotary_emb.cos_cached", "layers.0.self_attn.rotary_emb.inv_freq"]
    constants = {f"gpt_neox.{name}": torch.zeros(1) for name in names}
    constants["model.rotary_emb.inv_freq"] = torch.zeros(1)

    assert from_huggingface(state | constants, built().spec).keys() == built().state_dict().keys()
    for weight in ("gpt_neox.layers.1.attention.dense.extra.bias", "gpt_neox.layers.0.rotary_emb.weight"):
        with pytest.raises(CheckpointError, match="not a weight of this model"):
            from_huggingface(state | {weight: torch.zeros(1)}, built().spec)


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    """One missing and one foreign weight: the message names both."""
    state = transformers_file(built().spec, tmp_path)
    del state["gpt_neox.layers.1.attention.dense.bias"]
    state["gpt_neox.layers.2.attention.dense.bias"] = torch.zeros(64)
    with pytest.raises(CheckpointError) as refusal:
        from_huggingface(state, built().spec)

    assert "2 problems" in str(refusal.value)
    assert "gpt_neox.layers.1.attention.dense.bias: missing" in str(refusal.value)
    assert "gpt_neox.layers.2.attention.dense.bias: not a weight of this model" in str(refusal.value)


def test_initial_weights_have_the_papers_standard_deviation():
    """mini (width 256, 6 layers): sqrt(2 / (5 * 256)) = 0.0395285, and 2 / (6 * 16) = 0.0208333 into the residual."""
    for name, parameter in built("mini").named_parameters():
        into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.0208333 if into_residual else 0.0395285, rel=0.02), name
            assert abs(parameter.mean().item()) < 6e-4, name
        else:
            assert (parameter == (1.0 if name.endswith("norm.weight") else 0.0)).all(), name


def test_initial_weights_depend_on_the_seed_and_no_two_are_equal():
    """The same seed gives the same bits, another seed others, and no matrix repeats another's draw."""
    first, again, other = built(seed=1), built(seed=1), built(seed=2)
    matrices = {name: parameter for name, parameter in first.named_parameters() if parameter.ndim == 2}

    assert all(torch.equal(parameter, again.get_parameter(name)) for name, parameter in first.named_parameters())
    assert not any(torch.equal(parameter, other.get_parameter(name)) for name, parameter in matrices.items())
    assert len({parameter.flatten()[:8].sum().item() / parameter.std().item() for parameter in matrices.values()}) == 10


def test_initial_weights_are_the_same_after_the_meta_device():
    """Built on meta, emptied onto memory full of rubbish, initialised: weights and logits as if built directly."""
    with torch.device("meta"):
        model = GPTNeoX(built().spec)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    model.init_weights(11)

    assert torch.equal(model(TOKENS_BL), built()(TOKENS_BL))


def test_pipeline_stages_have_the_models_weights_and_compute_its_logits():
    """Two stages, initialized separately: the weights of the whole model and, one after the other, its logits."""
    first, second = GPTNeoX(built("tiny").spec), GPTNeoX(built("tiny").spec)
    first.final_norm = first.head = second.embedding = None
    for layer in range(4):
        del (second if layer < 3 else first).blocks[str(layer)]
    first.init_weights(11)
    second.init_weights(11)

    assert list(second.blocks) == ["3"]
    assert torch.equal(second(first(TOKENS_BL)), built("tiny")(TOKENS_BL))


@pytest.fixture
def fake_rank_5_of_8():
    """This process believes to be rank 5 of 8; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("placements", "rows", "columns"),
    [
        ((Shard(0), Replicate()), slice(8, 12), slice(0, 10)),  # rank 5 of a 4 x 2 mesh stands at (2, 1)
        ((Replicate(), Shard(1)), slice(0, 16), slice(5, 10)),
        ((Shard(0), Shard(1)), slice(8, 12), slice(5, 10)),
    ],
)
def test_a_sharded_weight_holds_its_share_of_the_whole_draw(placements, rows, columns, fake_rank_5_of_8):
    """So the number of ranks changes no weight (DTensor's own normal_ would repeat a draw on every rank of a CPU)."""
    mesh = init_device_mesh("cpu", (4, 2))
    sharded = distribute_tensor(torch.zeros(16, 10), mesh, placements, src_data_rank=None)
    whole = torch.zeros(16, 10)
    fill_normal(sharded, std=0.5, seed=1, name="some.weight")
    fill_normal(whole, std=0.5, seed=1, name="some.weight")

    assert torch.equal(sharded.to_local(), whole[rows, columns])


@pytest.mark.parametrize("parallel_residual", [True, False])
def test_attention_is_causal(parallel_residual):
    """Another token at position 10 leaves the logits before it as they were, and changes those from it on."""
    model = built(parallel_residual=parallel_residual)
    changed_BL = TOKENS_BL.clone()
    changed_BL[:, 10] = (changed_BL[:, 10] + 1) % 257
    before_BLV, after_BLV = model(TOKENS_BL), model(changed_BL)

    torch.testing.assert_close(before_BLV[:, :10], after_BLV[:, :10], rtol=0, atol=1e-6)
    assert (before_BLV[:, 10:] - after_BLV[:, 10:]).abs().amax(-1).min() > 1e-4


def test_rotary_tables_by_hand():
    """Four rotated features, base 100: angles p and p / 10."""
    cos_LR, sin_LR = rotary_tables(torch.tensor([0, 3, 2047]), rotary_width=4, base=100.0)

    assert cos_LR.dtype is torch.float32
    for row, position in enumerate((0, 3, 2047)):
        assert cos_LR[row].tolist() == pytest.approx([math.cos(position), math.cos(position / 10)], abs=2e-4)
        assert sin_LR[row].tolist() == pytest.approx([math.sin(position), math.sin(position / 10)], abs=2e-4)


@pytest.mark.parametrize("shift", [1, 100, 1000])
def test_attention_scores_depend_only_on_the_distance(shift):
    """A query and a key moved along together keep their product; features that are not rotated pass unchanged."""
    generator = torch.Generator().manual_seed(4)
    q_BNLH, k_BNLH = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def score(q_position, k_position):
        q_tables = rotary_tables(torch.tensor([q_position]), rotary_width=8, base=10_000.0)
        k_tables = rotary_tables(torch.tensor([k_position]), rotary_width=8, base=10_000.0)
        return (rotate(q_BNLH, *q_tables) * rotate(k_BNLH, *k_tables)).sum().item()

    moved_BNLH = rotate(q_BNLH, *rotary_tables(torch.tensor([shift]), rotary_width=8, base=10_000.0))

    assert score(7 + shift, 2 + shift) == pytest.approx(score(7, 2), abs=1e-3)
    assert score(7, 2) != pytest.approx(score(7, 3), abs=1e-2)
    assert torch.equal(moved_BNLH[..., 8:], q_BNLH[..., 8:])


def test_autocast_to_bf16_stays_close_to_fp32():
    """Logits in bf16, within a few roundings of fp32's; positions beyond 256 stay apart, as their angles are fp32."""
    model = with_all_weights_drawn(built(rotary_fraction=1.0))
    tokens_BL = torch.randint(0, 257, (1, 600), generator=torch.Generator().manual_seed(6))
    exact_BLV = model(tokens_BL)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BLV = model(tokens_BL)
        cos_LR, _ = rotary_tables(torch.arange(600), rotary_width=8, base=10_000.0)
    error = (logits_BLV.float() - exact_BLV).norm() / exact_BLV.norm()

    assert logits_BLV.dtype is torch.bfloat16
    assert error < 0.02
    assert cos_LR[599, 0].item() == pytest.approx(math.cos(599), abs=1e-4)
