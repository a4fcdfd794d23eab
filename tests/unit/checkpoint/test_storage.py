"""Checkpoint files: any safetensors library opens them, code in them is never executed, damage is an error."""

import contextlib
import json
import os
import pickle
import sys

import faulty
import pytest
import torch
import training
import xxhash
from faulty import Life
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_import import import_released
from titan_cpt.checkpoint.manager import CheckpointManager
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.checkpoint.storage import read_index
from titan_cpt.common.run_folder import INTERVAL, MANIFEST_FILE
from titan_cpt.errors import CheckpointError
from titan_cpt.training.optimization.adamw import build_adamw

pytestmark = training.THEIR_WARNINGS_IGNORED

RECORD = {"stage_index": 0, "kind": INTERVAL, "run_step": 0, "recipe": {}, "fingerprint": "", "data": {}}
WEIGHTS = {"model.weight", "model.bias"}
MOMENTS = {f"optimizer.state.{name}.{key}" for name in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")}


class Code:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        """Executed by pickle on load."""
        return os.mkdir, (str(self.marker),)


def model_and_optimizer():
    model = nn.Linear(6, 4)
    return model, build_adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def saved(run):
    checkpoints = CheckpointManager(run, keep_latest=1, async_save=False, on_saved=lambda folder: None)
    model, optimizer = model_and_optimizer()
    checkpoints.save(model, optimizer, stage="a", steps_done=1, record=RECORD)
    checkpoints.wait()
    return run / "a" / "step-00000001", model


def write_manifest_again(folder):
    """Write a manifest that matches the files as they are now, as an attacker would."""
    record = json.loads((folder / MANIFEST_FILE).read_text())
    manifest.write(folder, {key: value for key, value in record.items() if key not in ("files", "format")})


def load_into_a_new_model(folder):
    load_state(folder, *model_and_optimizer())


def test_every_tensor_is_in_the_files_under_its_name(tmp_path):
    """Read with safetensors only: weights, moments and step counts, nothing else; two files for two threads."""
    folder, model = saved(tmp_path)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}

    assert files == ["rank-00000-0.safetensors", "rank-00000-1.safetensors"]
    assert found.keys() == WEIGHTS | MOMENTS
    assert torch.equal(found["model.weight"], model.weight)


def test_checksums_made_while_writing_are_those_of_the_files(tmp_path):
    """And the manifest lists every file."""
    folder, _ = saved(tmp_path)
    listed = manifest.read(folder)["files"]
    there = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST_FILE}

    assert {name: file["xxh3_128"] for name, file in listed.items()} == {
        name: xxhash.xxh3_128(content).hexdigest() for name, content in there.items()
    }
    assert {name: file["bytes"] for name, file in listed.items()} == {name: len(c) for name, c in there.items()}


@pytest.mark.parametrize("name", [".metadata", "rank-00000-0.safetensors", "index.json"])
def test_code_in_a_checkpoint_file_is_never_executed(tmp_path, name):
    """A pickled DCP index beside ours is not opened; a pickle with a shard's name is damage."""
    folder, _ = saved(tmp_path)
    (folder / name).write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    write_manifest_again(folder)
    if name == ".metadata":
        load_into_a_new_model(folder)
    else:
        with pytest.raises(CheckpointError):
            load_into_a_new_model(folder)

    assert not (tmp_path / "ran").exists()
    assert pickle.loads((folder / name).read_bytes()) is None
    assert (tmp_path / "ran").exists(), "the payload is a real one"


def test_code_in_a_torch_save_file_is_never_executed(tmp_path):
    """torch.save's format, with a shard's name."""
    folder, _ = saved(tmp_path)
    torch.save({"model.weight": Code(tmp_path / "ran")}, folder / "rank-00000-0.safetensors")
    write_manifest_again(folder)
    with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
        load_into_a_new_model(folder)

    assert not (tmp_path / "ran").exists()


class Watched:
    """Record every class or function that a pickle imports, by the interpreter's audit hook."""

    def lay(self):
        """Install the hook in this process."""
        sys.addaudithook(lambda event, told: print("unpickled", *told) if event == "pickle.find_class" else None)


def watched(output, *arguments):
    """Run a command in a process that reports everything that it unpickles."""
    return faulty.outcome_of(faulty.start(Life(tuple(map(str, arguments)), (Watched(),)), output), output)


def test_no_command_that_reads_a_checkpoint_unpickles_anything(tmp_path):
    """Training from one, resume, verify, export, merge and anneal, observed by the interpreter's audit hook."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    first = training.write_config(raw, tmp_path / "first.toml")

    assert training.train(first).status == 0
    checkpoint = tmp_path / "run" / "english" / "step-00000009"
    raw["stages"][0] |= {"init": f"checkpoint:{checkpoint}", "steps": 2}
    raw["stages"][0]["lr"] = {"schedule": "constant", "max": 1e-3}
    second = training.write_config(
        training.changed(raw, job={"name": "second"}, stages=raw["stages"][:1]), tmp_path / "second.toml"
    )
    commands = [
        ("train", "--config", second),
        ("verify", checkpoint),
        ("export", checkpoint, tmp_path / "exported"),
        ("merge", checkpoint, checkpoint, "--output", tmp_path / "merged"),
        ("anneal", checkpoint, "--tokens", "128"),
    ]
    done = [watched(tmp_path / f"{number}.txt", *command) for number, command in enumerate(commands)]

    assert [one.status for one in done] == [0] * 5, [one.output for one in done]
    assert not [one.output for one in done if "unpickled" in one.output]


def test_import_does_not_execute_code_in_pytorch_model_bin(tmp_path):
    """`titan-cpt import` of a folder whose pytorch_model.bin holds more than weights."""
    (tmp_path / "release").mkdir()
    config = {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config |= {"intermediate_size": 128, "vocab_size": 128, "architectures": ["GPTNeoXForCausalLM"]}
    (tmp_path / "release" / "config.json").write_text(json.dumps(config))
    torch.save({"embed_in.weight": Code(tmp_path / "ran")}, tmp_path / "release" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="which is never executed"):
        import_released(str(tmp_path / "release"), tmp_path / "out", log=print)

    assert not (tmp_path / "ran").exists()


def edited(folder, edit):
    """Change the index."""
    told = json.loads((folder / "index.json").read_text())
    edit(told["tensors"])
    (folder / "index.json").write_text(json.dumps(told))
    write_manifest_again(folder)


FAULTS = {
    "a gap": (lambda t: t["model.weight"]["parts"][0].update(shape=[3, 6]), "do not add up to the tensor"),
    "a part twice": (lambda t: t["model.weight"]["parts"].append(t["model.weight"]["parts"][0]), "do not add up to"),
    "a part outside": (lambda t: t["model.weight"]["parts"][0].update(at=[1, 0]), "is outside the tensor"),
    "another number of dimensions": (lambda t: t["model.weight"]["parts"][0].update(at=[0]), "is outside the tensor"),
    "a file elsewhere": (
        lambda t: t["model.weight"]["parts"][0].update(file="../x"),
        "names a file outside its folder",
    ),
    "an absolute file": (lambda t: t["model.weight"]["parts"][0].update(file="/etc/hosts"), "outside its folder"),
    "no file": (lambda t: t["model.weight"]["parts"][0].update(file=7), "outside its folder"),
    "a negative length": (lambda t: t["model.weight"].update(shape=[-4, -6]), "does not describe a tensor"),
    "a length that is no number": (lambda t: t["model.weight"].update(shape=[True, 6]), "does not describe a tensor"),
    "a dtype that runs": (lambda t: t["model.weight"].update(dtype="os.system"), "does not describe a tensor"),
    "a tensor of another size": (lambda t: t.update({"model.weight": t["model.bias"]}), "Size mismatch"),
    "another tensor's place": (lambda t: t["model.weight"].update(t["optimizer.state.weight.exp_avg"]), "model.weight"),
    "a tensor that is not there": (lambda t: t.pop("model.weight"), "Missing key"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_index_is_refused_with_the_name_of_the_tensor(tmp_path, fault):
    """With a manifest that matches it: a checkpoint may come from an untrusted source."""
    folder, _ = saved(tmp_path)
    edit, told = FAULTS[fault]
    edited(folder, edit)
    with pytest.raises(CheckpointError, match=told):
        load_into_a_new_model(folder)


def test_another_dtype_is_refused_and_not_cast_silently(tmp_path):
    """A shard in bfloat16, with an index and a manifest that match it."""
    folder, _ = saved(tmp_path)
    name = next(path for path in folder.glob("*.safetensors") if "model.weight" in load_file(path)).name
    save_file({key: value.bfloat16() for key, value in load_file(folder / name).items()}, folder / name)
    write_manifest_again(folder)
    with pytest.raises(CheckpointError, match=r"model.weight is torch.bfloat16 of \[4, 6\], not torch.float32"):
        load_into_a_new_model(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "?"]) | JSON,
        "shape": st.lists(st.integers(-1, 1 << 65), max_size=3) | JSON,
        "parts": st.lists(st.fixed_dictionaries({"at": JSON, "shape": JSON, "file": JSON}), max_size=2) | JSON,
    }
)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=100) | st.builds(lambda v: json.dumps(v).encode(), JSON | TENSOR))
@example(content=b"[" * 100_000)
@example(content=b'{"tensors": ' + b"9" * 5000 + b"}")
@example(content=b"\xff\xfe\x00")
def test_any_content_of_an_index_is_read_or_raises_our_error(tmp_path_factory, content):
    """Arbitrary bytes, arbitrary JSON."""
    read_any(tmp_path_factory.mktemp("any"), content)


@settings(max_examples=200, deadline=None)
@given(tensors=st.dictionaries(st.text(max_size=5), TENSOR, max_size=2))
def test_any_table_of_tensors_is_read_or_raises_our_error(tmp_path_factory, tensors):
    """The right keys with any values."""
    read_any(tmp_path_factory.mktemp("any"), json.dumps({"tensors": tensors}).encode())


def read_any(folder, content):
    (folder / "index.json").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        list(read_index(folder))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small checkpoint, and the bytes of its first file."""
    folder, _ = saved(tmp_path_factory.mktemp("sound"))
    return folder, (folder / "rank-00000-0.safetensors").read_bytes()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_content_of_a_shard_is_loaded_or_raises_our_error(sound, data):
    """Any bytes anywhere in header or data, and any file length; what loads has the right shapes."""
    folder, content = sound
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 60))
    new = data.draw(st.binary(min_size=1, max_size=12))
    changed = content[:at] + new + content[at + len(new) :]
    (folder / "rank-00000-0.safetensors").write_bytes(changed[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CheckpointError):
        load_into_a_new_model(folder)
    (folder / "rank-00000-0.safetensors").write_bytes(content)


@pytest.mark.parametrize("length", [1 << 62, 1 << 40, (1 << 64) - 1])
def test_a_header_with_a_huge_length_is_refused_without_allocating_it(sound, length):
    """Eight bytes that announce a terabyte."""
    folder, content = sound
    file = folder / "rank-00000-0.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + content[8:])
    try:
        with pytest.raises(CheckpointError):
            load_into_a_new_model(folder)
    finally:
        file.write_bytes(content)


def test_the_key_of_an_inner_shard_holds_its_offset(tmp_path):
    """Shards of two ranks are read together into one tensor, in any order."""
    folder, model = saved(tmp_path)
    halves = (
        {"at": [0, 0], "shape": [2, 6], "file": "x.safetensors"},
        {"at": [2, 0], "shape": [2, 6], "file": "y.safetensors"},
    )
    save_file({"model.weight": torch.zeros(2, 6)}, folder / "x.safetensors")
    save_file({"model.weight@2,0": torch.ones(2, 6)}, folder / "y.safetensors")
    edited(folder, lambda tensors: tensors["model.weight"].update(parts=halves[::-1]))
    load_state(folder, model, None)
    with safe_open(folder / "y.safetensors", framework="pt") as file:
        names = list(file.keys())

    assert model.weight.sum(1).tolist() == [0.0, 0.0, 6.0, 6.0]
    assert names == ["model.weight@2,0"]
