"""Imported models compared with transformers: settings, logits beyond a sliding window, and which files are read."""

import json
from dataclasses import replace

import pytest
import torch
from releases import SPECS, python, release, state_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from titan_cpt.checkpoint import manifest, transformers_check
from titan_cpt.checkpoint.hf_import import (
    fill,
    import_released,
    load_released,
    open_released,
    verify_against_transformers,
)
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.errors import CheckpointError
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)


def changed_config(folder, **keys):
    """Change values in the model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def imported(folder):
    """The lines that an import of the folder prints; the checkpoint is valid."""
    said = []
    import_released(str(folder), folder.parent / "out", log=said.append)
    manifest.verify(folder.parent / "out")
    return said


@pytest.mark.parametrize(
    "keys",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},
        {"pad_token_id": 100_000},
        {"torch_dtype": "bfloat16", "dtype": "bfloat16"},
    ],
)
def test_settings_without_effect_on_logits_do_not_prevent_the_comparison(keys, tmp_path):
    """An attention backend that is not installed, a pad id beyond the vocabulary, another dtype than the file's."""
    release(tmp_path / "released", SPECS["llama"])
    changed_config(tmp_path / "released", **keys)

    assert imported(tmp_path / "released")[1].startswith("logits are those of transformers")


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"use_cache": None}, "cannot read its config.json: StrictDataclassFieldValidationError: Validation error"),
        ({"torch_dtype": "float33"}, "not compared with transformers"),
    ],
)
def test_a_model_that_transformers_cannot_load_is_imported_without_comparison(keys, why, tmp_path):
    """One line says why; no traceback."""
    release(tmp_path / "released", SPECS["llama"])
    config = json.loads((tmp_path / "released" / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "released" / "config.json").write_text(json.dumps(config | keys))
    said = imported(tmp_path / "released")

    assert said[1].startswith("not compared with transformers ")
    assert why in said[1]


def test_logits_are_compared_beyond_the_end_of_a_sliding_window(tmp_path):
    """The window is 40; the 32 positions compared for models without one would not show that 41 is wrong."""
    spec = named_size("llama", "debug", 257, overrides={"vocab_size": 300, "sliding_window": 40})
    release(tmp_path / "released", spec)
    released = open_released(str(tmp_path / "released"))
    result = verify_against_transformers(released, spec, lambda model: fill(model, released, spec))

    assert result.endswith("on 72 positions")
    with pytest.raises(CheckpointError, match="computes other logits"):
        verify_against_transformers(
            released, replace(spec, sliding_window=41), lambda model: fill(model, released, spec)
        )


@pytest.mark.parametrize("limit", ["_RUN_PARAMETERS", "_RUN_WORK"])
@pytest.mark.parametrize("name", SPECS)
def test_a_run_compares_the_settings_of_a_model_that_is_too_large_for_logits(name, limit, tmp_path, monkeypatch):
    """Every setting and rotary frequency as transformers reads them, which needs no weights."""
    monkeypatch.setattr(transformers_check, limit, 10)
    spec = SPECS[name]
    release(tmp_path / "released", spec)
    message = load_released(build_model(spec), str(tmp_path / "released"), spec)

    assert "settings are those of transformers" in message
    assert "`titan-cpt import` compares them" in message
    released = open_released(str(tmp_path / "released"))
    for wrong in ({"rope_base": 500.0}, {"norm_eps": 1e-3}, {"heads": 1}):
        other = replace(released, spec=replace(spec, **wrong))
        with pytest.raises(CheckpointError, match=r"reads config\.json differently: "):
            verify_against_transformers(other, other.spec, print, in_a_run=True)


def test_a_run_compares_the_settings_of_each_kind_of_layer(tmp_path, monkeypatch):
    """OLMo 3: windows by layer, and both rotary embeddings, of which only that of full attention is scaled."""
    monkeypatch.setattr(transformers_check, "_RUN_PARAMETERS", 10)
    yarn = {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}
    more = {"vocab_size": 300, "sliding_window": 7, "global_interval": 2, "rope_base": 700.0, "rope_scaling": yarn}
    spec = named_size("olmo", "debug", 257, overrides=more)
    release(tmp_path / "released", spec)
    released = open_released(str(tmp_path / "released"))
    wrong = {"rope_base": 500.0, "rope_scaling": None, "sliding_window": 8, "global_interval": None}

    assert "settings are those of transformers" in load_released(build_model(spec), str(tmp_path / "released"), spec)
    for (name, value), said in zip(
        wrong.items(), ("frequency", "amplitude", "layer_types", "layer_types"), strict=True
    ):
        other = replace(released, spec=replace(spec, **{name: value}))
        with pytest.raises(CheckpointError, match=rf"reads config\.json differently: .*{said}"):
            verify_against_transformers(other, other.spec, print, in_a_run=True)


def test_import_prints_only_its_own_lines(tmp_path):
    """No warnings or log lines of what transformers imports, such as torchao."""
    release(tmp_path / "released", SPECS["llama"])
    done = python("-m", "titan_cpt", "import", tmp_path / "released", tmp_path / "out")

    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    begins = (
        f"{tmp_path}/released: llama",
        "logits are those of",
        "note: it has no tokenizer.json",
        f"{tmp_path}/out: ",
    )
    assert len(lines) == len(begins)
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True))


def test_a_single_file_is_read_before_a_stale_index(tmp_path):
    """transformers deletes old shards but keeps their index; the note names the index."""
    release(tmp_path / "released", SPECS["llama"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "released")
    with torch.no_grad():
        theirs.lm_head.weight.add_(1)
    theirs.save_pretrained(tmp_path / "released")
    said = imported(tmp_path / "released")
    out = state_of(SPECS["llama"], lambda model: load_state(tmp_path / "out", model, None))

    assert (tmp_path / "released" / "model.safetensors.index.json").exists()
    assert torch.equal(out["head.weight"], theirs.lm_head.weight)
    assert "note: model.safetensors.index.json was ignored, as it is incomplete; model.safetensors was read" in said


def test_two_complete_sets_of_weights_that_differ_are_refused(tmp_path):
    """A single file beside older shards, safetensors beside pytorch_model.bin; equal sets are read."""
    folder = tmp_path / "released"
    release(folder, SPECS["llama"])
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save({name: tensor.double() for name, tensor in weights.items()}, folder / "pytorch_model.bin")
    (folder / "consolidated.safetensors").write_bytes(b"")
    notes = open_released(str(folder)).notes
    assert [note.partition(",")[0] for note in notes] == [
        "model.safetensors.index.json was ignored",
        "pytorch_model.bin was ignored",
        "consolidated.safetensors: ignored",
    ]
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-3
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors and pytorch_model\.bin are two complete sets"):
        open_released(str(folder))
    (folder / "pytorch_model.bin").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json are two complete .* in model\.norm"):
        open_released(str(folder))

    assert open_released(str(folder), compare_sets=False).files.entry.name == "model.safetensors"
