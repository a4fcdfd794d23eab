"""Hugging Face's files: what is read, in which part, what is refused, and in which words."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from titan_cpt.checkpoint.hf_files import WeightFiles, released_folder
from titan_cpt.errors import CheckpointError
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.models.huggingface_config import config_from_spec, spec_from_config
from titan_cpt.models.huggingface_weights import hub_names, to_huggingface
from titan_cpt.models.registry import named_size

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "vocab_size": 300,
}
NEOX = {**LLAMA, "model_type": "gpt_neox", "intermediate_size": 256}


def refused(config):
    with pytest.raises(CheckpointError) as refusal:
        spec_from_config(config, "there/config.json")
    return str(refusal.value)


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (LLAMA, {"model_type": "mixtral"}, "model_type: must be one of gpt_neox, llama, mistral, qwen2, qwen3, got"),
        (LLAMA, {"hidden_size": None}, "hidden_size: is missing"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size: must be a number, got '64'"),
        (LLAMA, {"num_attention_heads": 2.5}, "num_attention_heads: must be a number, got 2.5"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act: only 'silu' is supported, got 'gelu'"),
        (LLAMA, {"attention_bias": True}, "attention_bias: only False is supported, got True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias: only False is supported, got True"),
        (LLAMA, {"num_key_value_heads": 3}, "model.kv_heads: must divide model.heads = 4, got 3"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "type llama3 or yarn is supported, got 'dyn",
        ),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "got 'yarn' with mscale"),
        (
            LLAMA,
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
            "type llama3 or yarn is supported",
        ),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor: is missing"),
        (
            LLAMA,
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: only 1",
        ),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantized weights cannot be trained"),
        (
            LLAMA,
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "layer_types: a sliding window in only some of the layers is not supported",
        ),
        (NEOX, {"hidden_act": "gelu_fast"}, "hidden_act: only 'gelu' is supported, got 'gelu_fast'"),
        (NEOX, {"tie_word_embeddings": True}, "tie_word_embeddings: only False is supported"),
        (
            NEOX,
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}},
            "RoPE scaling is not supported for GPT-NeoX",
        ),
    ],
)
def test_a_config_that_asks_for_what_is_not_computed_is_refused(base, changes, expected):
    """By the key of config.json, what was found, and what is computed; never left out silently."""
    message = refused({**base, **changes})

    assert message.startswith("there/config.json: ")
    assert expected in message


def test_all_faults_of_a_config_are_told_at_once():
    """Three wrong keys, three lines below the first."""
    assert len(refused({**LLAMA, "hidden_act": "relu", "mlp_bias": True, "intermediate_size": None}).splitlines()) == 4


@pytest.mark.parametrize(
    ("base", "old", "new", "field", "value"),
    [
        (
            LLAMA,
            {"rope_theta": 5e5},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_base",
            5e5,
        ),
        (NEOX, {"rotary_emb_base": 500}, {"rope_parameters": {"rope_theta": 500}}, "rope_base", 500.0),
        (NEOX, {"rotary_pct": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary_fraction", 0.5),
    ],
)
def test_the_spellings_of_transformers_4_and_5_mean_the_same(base, old, new, field, value):
    """The same number under a key of its own, as the releases have it, and in rope_parameters."""
    shapes = [spec_from_config({**base, **keys}, "config.json") for keys in (old, new)]

    assert [getattr(spec, field) for spec in shapes] == [value, value]
    assert shapes[0] == shapes[1]


def test_defaults_are_those_of_transformers():
    """A config that leaves out what may be left out; Pythia's leave much out."""
    llama, neox = spec_from_config(LLAMA, ""), spec_from_config(NEOX, "")

    assert (llama.kv_heads, llama.head_width, llama.rope_base, llama.norm_eps) == (4, 16, 10_000.0, 1e-6)
    assert (neox.rotary_fraction, neox.rope_base, neox.norm_eps, neox.parallel_residual) == (0.25, 10_000.0, 1e-5, True)


def saved(folder, shards=1):
    """A debug GPT-NeoX with 300 rows, as transformers would save it; returns its weights under hub names."""
    spec = named_size("gpt_neox", "debug", 257, overrides={"vocab_size": 300})
    model = GPTNeoX(spec)
    model.init_weights(1)
    weights = {name: weight.detach().clone() for name, weight in to_huggingface(model.state_dict(), spec).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_from_spec(spec, max_positions=64, dtype="float32")))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return weights
    names, weight_map = list(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weights


@pytest.mark.parametrize("form", ["one file", "shards", "pytorch", "pytorch shards", "old pytorch"])
def test_every_form_of_file_is_read_whole_and_in_part(form, tmp_path):
    """Whole tensors, and a part of rows and columns, are those that were saved."""
    weights = saved(tmp_path, shards=3 if form == "shards" else 1)
    if "pytorch" in form:
        (tmp_path / "model.safetensors").unlink()
        halves = [dict(list(weights.items())[half::2]) for half in range(2)] if "shards" in form else [weights]
        files = [f"pytorch_model-{number}.bin" for number in range(len(halves))]
        files = files if "shards" in form else ["pytorch_model.bin"]
        for half, file in zip(halves, files, strict=True):
            torch.save(half, tmp_path / file, _use_new_zipfile_serialization=form != "old pytorch")
        index = {name: file for half, file in zip(halves, files, strict=True) for name in half}
        if "shards" in form:
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    files = WeightFiles(tmp_path)
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"

    assert files.shapes == {name: tuple(weight.shape) for name, weight in weights.items()}
    assert all(torch.equal(files.read(name), weight) for name, weight in weights.items())
    assert torch.equal(files.read(name, (slice(10, 20), slice(3, 9))), weights[name][10:20, 3:9])


@pytest.mark.parametrize("part", [(slice(0, 320),), (slice(290, 310),), (slice(305, 315),), (slice(0, 300),)])
def test_rows_beyond_the_files_are_the_mean_of_the_files(part, tmp_path):
    """300 rows lengthened to 320, whatever part of them is asked for, of all columns and of some."""
    weights = saved(tmp_path)
    name = "embed_out.weight"
    mean = weights[name].double().mean(0).float()
    whole = torch.cat((weights[name], mean.expand(20, -1)))
    files = WeightFiles(tmp_path)

    assert torch.equal(files.read_rows(name, 320, part), whole[part])
    assert torch.equal(files.read_rows(name, 320, (*part, slice(5, 9))), whole[part][:, 5:9])
    assert torch.equal(files.read_rows(name, 257), weights[name][:257])


def test_a_new_row_raises_the_loss_by_what_was_promised_at_most(tmp_path):
    """log(1 + n / N) for n new rows beside N, at every position: Jensen's inequality."""
    head = saved(tmp_path)["embed_out.weight"] * 3
    save_file({"embed_out.weight": head}, tmp_path / "model.safetensors")
    longer = WeightFiles(tmp_path).read_rows("embed_out.weight", 400)
    x_PD = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    raised = (x_PD @ longer.T).logsumexp(1) - (x_PD @ head.T).logsumexp(1)

    assert raised.min() > 0
    assert raised.max() <= torch.tensor(1 + 100 / 300).log()


def flip_header(folder):
    path = folder / "model-00002-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[3] ^= 0xFF
    path.write_bytes(content)


def truncate(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lie_in_the_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["embed_out.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["gpt_neox.embed_in.weight"] = "model-00002-of-00003.safetensors"
    path.write_text(json.dumps(index))


def leave_the_folder(folder):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"embed_out.weight": "../other.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip_header, "model-00002-of-00003.safetensors: damaged, or not a safetensors file"),
        (truncate, "model-00002-of-00003.safetensors: damaged, or not a safetensors file"),
        (lambda folder: (folder / "model-00003-of-00003.safetensors").unlink(), "is missing; model.safetensors.index"),
        (lie_in_the_index, "although the index lists it there"),
        (leave_the_folder, "embed_out.weight is in '../other.safetensors', which is not a file of this folder"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "holds no weights: expected model.safetensors",
        ),
    ],
)
def test_damaged_files_are_refused_with_their_place_and_a_remedy(damage, expected, tmp_path):
    """The file, what is wrong with it, what to do."""
    saved(tmp_path, shards=3)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        WeightFiles(tmp_path)

    assert str(tmp_path) in str(refusal.value)
    assert expected in str(refusal.value)


class Hostile:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        """What unpickling calls."""
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_never_run(tmp_path):
    """In either format of torch's, the file is refused and the code in it leaves no trace."""
    for new_format in (True, False):
        torch.save({"a": Hostile(tmp_path / "ran")}, tmp_path / "pytorch_model.bin", pickle, 2, new_format)
        with pytest.raises(CheckpointError, match="holds more than weights"):
            WeightFiles(tmp_path)

    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_is_damaged_or_no_table_is_refused(tmp_path):
    """Cut short; a list of tensors."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[:500])
    with pytest.raises(CheckpointError, match="damaged, or holds more than weights"):
        WeightFiles(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a dict of tensors"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(name):
    """Without asking the network."""
    with pytest.raises(CheckpointError, match=r"not a folder; give a folder with a config\.json, or a hub name"):
        released_folder(name)


def test_a_hub_that_cannot_be_reached_is_told_in_one_message(monkeypatch):
    """The name, that it is no folder, the reason, and what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as refusal:
        released_folder("EleutherAI/pythia-14m@step3000")

    said = "EleutherAI/pythia-14m@step3000: not a folder here, and not available from the Hugging Face hub: "
    assert str(refusal.value).startswith(said)
    assert "download it elsewhere and give its folder" in str(refusal.value)


def test_names_are_those_of_the_files_in_the_models_order(tmp_path):
    """Every name once, and the file that we write has them all."""
    weights = saved(tmp_path)
    names = hub_names(named_size("gpt_neox", "debug", 257))

    assert set(load_file(tmp_path / "model.safetensors")) == set(names.values()) == set(weights)
    assert len(set(names.values())) == len(names)
