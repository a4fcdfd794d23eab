"""Weight files in Hugging Face's formats: whole and partial reads, padding rows, and refusal of damaged files."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from titan_cpt.checkpoint.hf_files import WeightFiles, released_folder
from titan_cpt.errors import CheckpointError
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.models.huggingface_config import config_from_spec
from titan_cpt.models.huggingface_weights import hub_names, to_huggingface
from titan_cpt.models.registry import named_size


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
def test_every_file_format_is_read_whole_and_in_part(form, tmp_path):
    """Whole tensors, and parts of rows and columns, equal the saved ones."""
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
def test_added_vocabulary_rows_are_the_mean_of_the_rows_in_the_file(part, tmp_path):
    """300 rows extended to 320, for any part of the rows, and for all or some columns."""
    weights = saved(tmp_path)
    name = "embed_out.weight"
    mean = weights[name].double().mean(0).float()
    whole = torch.cat((weights[name], mean.expand(20, -1)))
    files = WeightFiles(tmp_path)

    assert torch.equal(files.read_rows(name, 320, part), whole[part])
    assert torch.equal(files.read_rows(name, 320, (*part, slice(5, 9))), whole[part][:, 5:9])
    assert torch.equal(files.read_rows(name, 257), weights[name][:257])


def test_added_rows_raise_the_loss_by_at_most_log_1_plus_n_over_v(tmp_path):
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
def test_damaged_files_are_refused_with_path_and_remedy(damage, expected, tmp_path):
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


def test_a_pickle_that_is_damaged_or_not_a_dict_is_refused(tmp_path):
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
def test_a_name_that_is_neither_a_folder_nor_a_hub_name_is_refused(name):
    """Without a network request."""
    with pytest.raises(CheckpointError, match=r"not a folder; give a folder with a config\.json, or a hub name"):
        released_folder(name)


def test_an_unreachable_hub_is_reported_in_one_message(monkeypatch):
    """With the name, that it is not a folder, the reason, and what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as refusal:
        released_folder("EleutherAI/pythia-14m@step3000")

    said = "EleutherAI/pythia-14m@step3000: not a folder here, and not available from the Hugging Face hub: "
    assert str(refusal.value).startswith(said)
    assert "download it elsewhere and give its folder" in str(refusal.value)


def test_names_are_listed_in_the_models_order(tmp_path):
    """Every name once, and the file that we write has them all."""
    weights = saved(tmp_path)
    names = hub_names(named_size("gpt_neox", "debug", 257))

    assert set(load_file(tmp_path / "model.safetensors")) == set(names.values()) == set(weights)
    assert len(set(names.values())) == len(names)
