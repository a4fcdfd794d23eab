"""Merges of whole models: checkpoints and sharded releases together, manifests, refusals, memory."""

import errno
import json
import shutil
from itertools import permutations

import numpy as np
import pytest
import torch
from byte_level_tokenizers import save_tokenizer
from releases import SPECS, release, state_of
from safetensors.torch import load_file, save_file
from training import THEIR_WARNINGS_IGNORED, changed, config_of, third_stage, two_stages, write_languages

import titan_cpt
from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_export import export
from titan_cpt.checkpoint.hf_import import import_released
from titan_cpt.checkpoint.hf_release import weight_shapes
from titan_cpt.checkpoint.merge.inputs import open_input
from titan_cpt.checkpoint.merge.merge import merge, require_space
from titan_cpt.checkpoint.merge.settings import merge_settings
from titan_cpt.checkpoint.provenance import find_base_model, find_tokenizer, tokenizer_mismatch
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.checkpoint.weights_only import record_without_training, save_weights
from titan_cpt.common.weights.named_weights import named_weights
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size

pytestmark = THEIR_WARNINGS_IGNORED


def quiet(line):
    """Print nothing."""


def checkpoint(folder, spec, seed, *, recipe=None, scale=1.0, **record):
    """A checkpoint of random weights, with these entries in its manifest; returns the weights."""
    model = build_model(spec)
    model.init_weights(seed)
    state = {name: tensor * scale for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True)
    checksums = save_weights(spec, state.__getitem__, folder)
    made = record_without_training("stage_end", {**spec.as_recipe(), "training.seq_len": 16, **(recipe or {})})
    manifest.write(folder, {**made, **record}, checksums)
    return state


def merged_state(folder, spec):
    return state_of(spec, lambda model: load_state(folder, model, None))


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SPECS)
def test_checkpoints_and_sharded_releases_are_merged_together(name, tmp_path):
    """A checkpoint, a release in bfloat16 shards and its import; the mean by numpy, in blocks of any size and order."""
    spec = SPECS[name]
    one = checkpoint(tmp_path / "one", spec, 1)
    release(tmp_path / "two", spec, torch.bfloat16, seed=2)
    release(tmp_path / "three", spec, seed=3)
    import_released(str(tmp_path / "three"), tmp_path / "imported", log=quiet)
    names = [str(tmp_path / each) for each in ("one", "two", "imported")]
    states = [one, *(merged_state_of(each, spec) for each in names[1:])]
    expected = {
        key: torch.from_numpy(np.mean([state[key].double().numpy() for state in states], axis=0).astype(np.float32))
        for key in one
    }
    for number, (order, elements) in enumerate([(names, 1 << 22), (names[::-1], 1 << 22), (names, 100)]):
        merge(order, tmp_path / str(number), merge_settings(3), log=quiet, block_elements=elements)

    first = merged_state(tmp_path / "0", spec)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    assert ("head.weight" in first) == (not spec.tied)
    assert all(torch.allclose(first[key], expected[key], rtol=2**-23, atol=0) for key in expected)
    assert same_bits(first, merged_state(tmp_path / "1", spec))
    assert same_bits(first, merged_state(tmp_path / "2", spec))


def merged_state_of(name, spec):
    """The weights of an input, in float32."""
    one = open_input(name)
    return {key: one.read(key, slice(0, None)).float() for key in weight_shapes(spec)}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three checkpoints of a GPT-NeoX, whose biases are 0, and their weights; the third is a base near the second."""
    folder = tmp_path_factory.mktemp("three")
    states = {name: checkpoint(folder / name, SPECS["gpt_neox"], seed) for seed, name in enumerate(("a", "b", "base"))}
    return folder, states


def flattened(state, names):
    """All weights as one vector in float64."""
    return np.concatenate([state[name].double().numpy().ravel() for name in names])


def in_numpy(states, name):
    return {key: state[name].double().numpy() for key, state in states.items()}


def test_ties_trims_the_whole_task_vector(three, tmp_path):
    """Of the largest fifth of each task vector over all weights; elected and averaged with numpy, in small blocks."""
    folder, states = three
    settings = merge_settings(2, method="ties", has_base=True, density=0.2, scale=0.7)
    inputs = [str(folder / "a"), str(folder / "b")]
    merge(inputs, tmp_path / "out", settings, base=str(folder / "base"), log=quiet, block_elements=1000)
    found = merged_state(tmp_path / "out", SPECS["gpt_neox"])
    flat = {
        key: np.concatenate([state[name].double().numpy().ravel() for name in found]) for key, state in states.items()
    }
    keep = -(-len(flat["a"]) // 5)
    vectors = []
    for key in ("a", "b"):
        vector = flat[key] - flat["base"]
        smallest = np.sort(np.abs(vector).astype(np.float32))[-keep]
        vectors.append(np.where(np.abs(vector).astype(np.float32) >= smallest, vector, 0))
    sign = np.sign(sum(vectors))
    agrees = [np.where(np.sign(vector) == sign, vector, 0) for vector in vectors]
    count = sum((vector != 0).astype(int) for vector in agrees)
    expected = flat["base"] + 0.7 * sum(agrees) / np.maximum(count, 1)

    assert np.allclose(flattened(found, found), expected, rtol=2**-22, atol=1e-12)
    assert 0.3 < (count > 0).mean() < 0.4  # two fifths that overlap


def test_slerp_takes_the_angle_of_each_tensor(three, tmp_path):
    """By numpy's arccos, tensor by tensor; biases are 0 and stay 0."""
    folder, states = three
    settings = merge_settings(2, method="slerp", weights=[0.75, 0.25])
    merge([str(folder / "a"), str(folder / "b")], tmp_path / "out", settings, log=quiet, block_elements=1000)
    found = merged_state(tmp_path / "out", SPECS["gpt_neox"])
    for name, tensor in found.items():
        one, other = in_numpy(states, name)["a"], in_numpy(states, name)["b"]
        lengths = np.linalg.norm(one) * np.linalg.norm(other)
        if lengths == 0 or np.array_equal(one, other):
            assert np.array_equal(tensor.numpy(), one)
            continue
        omega = np.arccos((one * other).sum() / lengths)
        expected = (np.sin(0.75 * omega) * one + np.sin(0.25 * omega) * other) / np.sin(omega)

        assert np.allclose(tensor.numpy(), expected, rtol=2**-22, atol=1e-12), name


@pytest.mark.parametrize("method", ["mean", "linear", "slerp", "ties", "task-arithmetic"])
def test_a_merge_of_one_checkpoint_with_itself_is_that_checkpoint(method, three, tmp_path):
    """To the last bit, through the Python API, with the checkpoint as the base too."""
    folder, states = three
    options = {"base": folder / "a"} if method in ("ties", "task-arithmetic") else {}
    weights = {} if method == "mean" else {"weights": [0.7, 0.3]}
    out = titan_cpt.merge([folder / "a", folder / "a"], tmp_path / "out", method=method, **options, **weights)

    assert same_bits(merged_state(out, SPECS["gpt_neox"]), states["a"])


def test_the_order_of_inputs_does_not_change_the_sum(tmp_path):
    """theta, -theta and 1e-20 theta, of which the third is lost in some orders: bit for bit, for every method."""
    for number, scale in enumerate((1.0, -1.0, 1e-20)):
        checkpoint(tmp_path / str(number), SPECS["llama"], 1, scale=scale)
    shutil.copytree(tmp_path / "2", tmp_path / "base")
    for method in ("mean", "ties", "task-arithmetic"):
        base = None if method == "mean" else tmp_path / "base"
        found = []
        for order in permutations("012"):
            out = tmp_path / f"{method}-{''.join(order)}"
            titan_cpt.merge([tmp_path / number for number in order], out, method=method, base=base)
            found.append(merged_state(out, SPECS["llama"]))

        assert all(same_bits(found[0], other) for other in found[1:])


def test_the_average_in_a_checkpoint_can_be_merged(three, tmp_path):
    """PATH@average reads average.* of a checkpoint; one without an average is refused."""
    folder, states = three
    shutil.copytree(folder / "a", tmp_path / "with")
    made = json.loads((tmp_path / "with" / "index.json").read_text().replace('"model.', '"average.'))
    both = json.loads((tmp_path / "with" / "index.json").read_text())
    file = next((tmp_path / "with").glob("*.safetensors"))
    content = load_file(file)
    other = {name.replace("model.", "average."): tensor + 1 for name, tensor in content.items()}
    record = json.loads((tmp_path / "with" / "manifest.json").read_text()) | {"averaging": {"kind": "mean"}}
    (tmp_path / "with" / "manifest.json").unlink()
    save_file({**content, **other}, file)
    (tmp_path / "with" / "index.json").write_text(json.dumps({"tensors": both["tensors"] | made["tensors"]}))
    manifest.write(tmp_path / "with", {key: value for key, value in record.items() if key != "files"})
    titan_cpt.merge([f"{tmp_path}/with@average", folder / "b"], tmp_path / "out", weights=[1, 0])
    parents = manifest.read(tmp_path / "out")["merge"]["parents"]
    found = merged_state(tmp_path / "out", SPECS["gpt_neox"])

    assert all(torch.equal(found[name], states["a"][name] + 1) for name in found)
    assert [parent["weights"] for parent in parents] == ["average", "model"]
    with pytest.raises(CheckpointError, match="holds no average"):
        titan_cpt.merge([f"{folder}/a@average", folder / "b"], tmp_path / "other")


# What is known of merged weights


def test_the_manifest_states_the_parents(tmp_path):
    """Their paths, digests, stages, steps, histories, tokenizers and base model; an export's model card has them."""
    spec = SPECS["llama"]
    release(tmp_path / "base", spec, seed=1)
    save_tokenizer(tmp_path / "base" / "tokenizer.json", "gpt2", vocab_size=280)
    import_released(str(tmp_path / "base"), tmp_path / "imported", log=quiet)
    imported = manifest.read(tmp_path / "imported")
    trained = {
        "stages.german.init": f"checkpoint:{tmp_path}/imported",
        "training.seq_len": 128,
    }
    data = {"tokenizer": imported["released"]["tokenizer"]["fingerprint"]}
    checkpoint(tmp_path / "run", spec, 2, recipe=trained, stage="german", steps_done=30, run_step=30, data=data)
    inputs = [tmp_path / "run", tmp_path / "imported"]
    out = titan_cpt.merge(inputs, tmp_path / "out", method="task-arithmetic", base=tmp_path / "base", scale=0.5)
    record = manifest.verify(out)
    run, released = record["merge"]["parents"]
    base_model = find_base_model(record)

    assert (record["kind"], record["stage"], record["steps_done"]) == ("merged", "merged", 0)
    assert {key: record["merge"][key] for key in ("method", "weights", "scale")} == {
        "method": "task-arithmetic",
        "weights": [1, 1],
        "scale": 0.5,
    }
    assert (run["path"], run["stage"], run["steps_done"]) == (str(tmp_path / "run"), "german", 30)
    assert run["digest"] == manifest.digest_of_files(manifest.read(tmp_path / "run"))
    assert run["history"] == [{"name": "german", "steps": 30, "init": trained["stages.german.init"]}]
    assert released["kind"] == record["merge"]["base"]["kind"] == "imported"
    assert {parent["base_model"] for parent in (run, released, record["merge"]["base"])} == {str(tmp_path / "base")}
    assert (base_model.others, base_model.folder) == ((), tmp_path / "base")
    assert find_tokenizer(record, out, None, base_model).name == str(tmp_path / "base")
    export(named_weights(out), tmp_path / "exported", dtype="float32", log=quiet)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "# merge (task-arithmetic)" in card
    assert "| 1 | german, step 30 | german (30 steps) |" in card
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["max_position_embeddings"] == 128
    again = titan_cpt.merge([out, tmp_path / "run"], tmp_path / "again")  # a merge of a merge knows all of it
    assert manifest.read(again)["merge"]["parents"][0]["merge"] == record["merge"]
    assert find_base_model(manifest.read(again)) == base_model


def test_several_base_models_and_a_second_tokenizer_are_remembered(tmp_path):
    """Merged releases have no common base model; a parent that saw tokens of another tokenizer is noted."""
    spec = SPECS["llama"]
    release(tmp_path / "one", spec, seed=1)
    release(tmp_path / "two", spec, seed=2)
    out = titan_cpt.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    record = manifest.read(out)
    base_model = find_base_model(record)

    assert (base_model.name, base_model.others) == (str(tmp_path / "one"), (str(tmp_path / "two"),))
    assert tokenizer_mismatch(record, out) is None
    record["merge"]["parents"][1]["tokenizer_mismatch"] = "other tokens"
    assert tokenizer_mismatch(record, out) == "other tokens"


def test_a_run_starts_from_a_merge_and_its_model_card_names_it(tmp_path):
    """Two checkpoints of a run; a stage from their mean knows its tokenizer, and cannot keep an optimizer state."""
    (tmp_path / "data").mkdir()
    raw = two_stages(write_languages(tmp_path / "data"), tmp_path / "out")
    with titan_cpt.Trainer(config_of(raw), quiet=True) as trainer:
        trainer.run()
    run = tmp_path / "out" / "run"
    merged = titan_cpt.merge([run / "english" / "step-00000012", run / "german" / "step-00000010"], tmp_path / "merged")
    stage = {**third_stage(), "init": f"checkpoint:{merged}"}
    kept = changed(raw, job={"name": "kept"}, stages=[{**stage, "optimizer_state": "keep"}])
    with (
        pytest.raises(ConfigError, match="is a merge, which has no optimizer state to keep"),
        titan_cpt.Trainer(config_of(kept), quiet=True) as trainer,
    ):
        trainer.run()
    with titan_cpt.Trainer(config_of(changed(raw, job={"name": "next"}, stages=[stage])), quiet=True) as trainer:
        assert not any("tokenizer" in note and "unknown" in note for note in trainer.plan.notes)
        trainer.run()
    titan_cpt.export(merged, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    titan_cpt.export(tmp_path / "out" / "next" / "again" / "step-00000005", tmp_path / "trained")
    trained_card = (tmp_path / "trained" / "README.md").read_text()
    table = [line for line in card.splitlines() if line.startswith(("| 1 |", "| `"))]

    assert "# next: again, step 5\n" in trained_card
    assert "## Merge that training began with\n\nmean of the weights below" in trained_card
    assert len(table) == 2
    assert all(line in trained_card for line in table)
    assert manifest.read(merged)["merge"]["tokenizer_path"] == "bytes"
    assert "| 1 | english, step 12 | english (12 steps) |" in card
    assert "| 1 | german, step 10 | english (9 steps), german (10 steps) |" in card
    assert "- Tokenizer: `bytes`" in card


# Refusals


def test_every_difference_of_the_models_is_in_one_message(tmp_path):
    """Sizes, RoPE and tokenizer, of each input against the first."""
    one = named_size("llama", "debug", 257)
    checkpoint(tmp_path / "one", one, 1, data={"tokenizer": "a" * 64})
    checkpoint(tmp_path / "rows", named_size("llama", "debug", 257, {"vocab_size": 512}), 1)
    other = named_size("llama", "debug", 257, {"rope_base": 5e5, "layers": 3})
    checkpoint(tmp_path / "other", other, 1, data={"tokenizer": "b" * 64})
    with pytest.raises(CheckpointError) as raised:
        titan_cpt.merge([tmp_path / each for each in ("one", "rows", "other")], tmp_path / "out")
    message = str(raised.value)

    assert "model.vocab_size: 384 -> 512" in message
    assert "`titan-cpt import NAME OUT --vocab-size ROWS`" in message
    assert "model.rope_base: 10000.0 -> 500000.0" in message
    assert "model.layers: 2 -> 3" in message
    assert f"tokenizer: {'a' * 12} ({tmp_path}/one/manifest.json) -> {'b' * 12}" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "rows"]


def test_tokenizers_with_the_same_ids_are_the_same(tmp_path):
    """Two files of other bytes: the second has no post-processor and other white space."""
    spec = named_size("llama", "debug", 257, {"vocab_size": 384})
    for number, name in enumerate(("one", "two")):
        release(tmp_path / name, spec, seed=number)
        save_tokenizer(tmp_path / name / "tokenizer.json", "gpt2", vocab_size=280)
    text = (tmp_path / "two" / "tokenizer.json").read_text()
    (tmp_path / "two" / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=7))
    lines = []
    merge([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "out", merge_settings(2), log=lines.append)

    assert lines[:2] == [f"2 inputs: llama, {spec.parameters:,} parameters", "mean: equal weights"]
    assert not any(line.startswith("note:") for line in lines)
    save_tokenizer(tmp_path / "two" / "tokenizer.json", "gpt2", vocab_size=290)
    with pytest.raises(CheckpointError, match="the same ids mean other tokens"):
        titan_cpt.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "other")


def damaged(folder):
    """One bit of a weight is changed."""
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_input_is_refused(three, tmp_path):
    """Before anything is written."""
    folder, _ = three
    shutil.copytree(folder / "b", tmp_path / "b")
    damaged(tmp_path / "b")

    with pytest.raises(CheckpointError, match="its content changed since it was saved"):
        titan_cpt.merge([folder / "a", tmp_path / "b"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_merge_that_fails_leaves_nothing(three, tmp_path):
    """A scale whose products are not float32 numbers fails while the weights are written."""
    folder, _ = three

    with pytest.raises(CheckpointError, match="would not be finite: use smaller weights or a smaller scale"):
        titan_cpt.merge([folder / "a"], tmp_path / "out", method="task-arithmetic", base=folder / "b", scale=1e60)
    assert list(tmp_path.iterdir()) == []


def test_slerp_of_opposite_models_names_the_tensor(tmp_path):
    """theta and -theta."""
    checkpoint(tmp_path / "one", SPECS["llama"], 1)
    checkpoint(tmp_path / "two", SPECS["llama"], 1, scale=-1)

    with pytest.raises(CheckpointError, match=r"[a-z0-9_.]+\.weight points in opposite directions in the inputs"):
        titan_cpt.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", method="slerp")


def test_free_disk_space_is_checked_first(tmp_path):
    """The message has both sizes; the output's folder need not exist."""
    require_space(tmp_path / "new" / "out", 1000)
    with pytest.raises(OSError, match=r"needs 1073741824\.00 GiB, and [0-9.]+ GiB are free") as raised:
        require_space(tmp_path / "new" / "out", 1 << 60)

    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(tmp_path / "new" / "out")
