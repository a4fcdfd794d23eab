"""torchtitan's checkpoints: weights, moments and step counts in our names and order, and what the files lack."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from torchtitan_checkpoints import SPECS, config_json, state_of, trained, write

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.other_trainers.import_trained import import_from_trainer
from titan_cpt.checkpoint.other_trainers.torchtitan.reader import open_torchtitan
from titan_cpt.checkpoint.other_trainers.trained_checkpoint import ImportRequest
from titan_cpt.checkpoint.state_dict import load_state, optimizer_tensors
from titan_cpt.cli import main
from titan_cpt.convert.torchtitan import flavor_fields
from titan_cpt.errors import CheckpointError, TitanError
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import as_config_table
from titan_cpt.training.optimization.adamw import build_adamw

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"  # DCP in a single process
)


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


def refused(folder, *options, path="step-2"):
    """The message of an import that is refused."""
    with pytest.raises(TitanError) as error:
        open_torchtitan(ImportRequest(folder / path, *options))
    return str(error.value)


def test_old_names_and_a_prefix_are_known(tmp_path):
    """Those of torchtitan 0.2, with the weights under `model.` as the first versions had them."""
    model, optimizer = trained(SPECS["llama3"])
    state = state_of(model, optimizer, SPECS["llama3"], fuse=False)
    optimizer_state = state.pop("optimizer")

    def old(name):
        return name.replace("qkv_linear.", "").replace("lm_head.", "output.")

    state = {f"model.{old(name)}" if "weight" in name else name: value for name, value in state.items()}
    state["model.freqs_cis"] = torch.zeros(4)
    write(tmp_path / "step-2", state | {"optimizer": {old(name): value for name, value in optimizer_state.items()}})
    (tmp_path / "config.json").write_text(json.dumps(config_json(SPECS["llama3"])))
    found = open_torchtitan(ImportRequest(tmp_path / "step-2", tmp_path / "config.json"))

    assert found.foreign == []
    assert found.weights.keys() == found.optimizer.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found.weights[name].read(), weight) for name, weight in model.state_dict().items())


def test_a_config_is_needed_and_torchtitans_own_models_are_named(tmp_path):
    """The shapes are those of llama3's debugmodel, whose heads and RoPE the message gives as [model]."""
    fields = flavor_fields("llama3", "debugmodel")
    shapes = {
        "tok_embeddings.weight": (fields["vocab_size"], fields["width"]),
        **{
            f"layers.{layer}.{name}.weight": size
            for layer in range(fields["layers"])
            for name, size in {
                "attention.qkv_linear.wq": (256, 256),
                "attention.qkv_linear.wk": (256, 256),
                "feed_forward.w1": (768, 256),
            }.items()
        },
    }
    write(tmp_path / "step-2", {name: torch.zeros(size) for name, size in shapes.items()})
    message = refused(tmp_path)

    assert "give --config FILE" in message
    assert "are those of torchtitan's llama3 debugmodel, whose [model] is" in message
    assert "heads = 16\n" in message
    assert 'rope_scaling = { kind = "llama3", factor = 8.0' in message


def test_our_own_model_table_is_a_config(tmp_path):
    """The rows of the embedding come from the checkpoint; a wrong table is refused with its key."""
    saved(tmp_path, "qwen3")
    table = as_config_table(SPECS["qwen3"]).replace("vocab_size = 300", "vocab_size = 128")
    (tmp_path / "mine.toml").write_text(table)
    found = open_torchtitan(ImportRequest(tmp_path / "step-2", tmp_path / "mine.toml"))
    (tmp_path / "wrong.toml").write_text('[model]\nfamily = "llama"\nsize = "debug"\nheads = 3')
    (tmp_path / "neox.toml").write_text('[model]\nfamily = "gpt_neox"\nsize = "debug"')

    assert found.spec == SPECS["qwen3"]
    assert "wrong.toml: model.heads: must divide" in refused(tmp_path, tmp_path / "wrong.toml")
    assert "torchtitan's models are of the family llama" in refused(tmp_path, tmp_path / "neox.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec, layer: spec.update(name="deepseek_v3"), "model_spec.name is 'deepseek_v3'; llama3 and qwen3"),
        (lambda spec, layer: layer.update(moe={}), "mixture of experts"),
        (lambda spec, layer: layer["attention"]["rope"].update(scaling="yarn", rope_factor=4), "scaling 'yarn'"),
        (lambda spec, layer: layer["attention"]["rope"].update(dim=4), "RoPE on a part of each head"),
        (lambda spec, layer: layer["attention"].pop("n_heads"), "is not a config that torchtitan 0.3 wrote"),
    ],
    ids=["model", "experts", "yarn", "partial", "damaged"],
)
def test_a_model_that_is_not_available_here_is_refused(tmp_path, change, message):
    """The message names the file, and what is not available."""
    saved(tmp_path, "llama3")
    config = config_json(SPECS["llama3"])
    for layer in config["model_spec"]["model"]["layers"]:
        change(config["model_spec"], layer)
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert message in refused(tmp_path, tmp_path / "config.json")


def test_a_config_with_fewer_layers_is_refused(tmp_path):
    """The weights of the others are named, each with torchtitan's name."""
    saved(tmp_path, "llama3")
    config = config_json(SPECS["llama3"])
    config["model_spec"]["model"]["layers"].pop()
    (tmp_path / "config.json").write_text(json.dumps(config))
    request = ImportRequest(tmp_path / "step-2", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention_norm\.weight: not a weight of this model"):
        import_from_trainer("torchtitan", request, tmp_path / "out", log=print)


def test_a_tied_model_with_another_head_is_refused(tmp_path):
    """One of the two would be lost."""
    model, optimizer = trained(SPECS["qwen3"])
    state = state_of(model, optimizer, SPECS["qwen3"])
    write(tmp_path / "step-2", state | {"lm_head.weight": state["tok_embeddings.weight"] + 1})
    (tmp_path / "config.json").write_text(json.dumps(config_json(SPECS["qwen3"])))

    assert "lm_head.weight differs from tok_embeddings.weight" in refused(tmp_path, tmp_path / "config.json")


def test_tokens_of_several_ranks_are_not_taken_for_all(tmp_path):
    """torchtitan saves the count of one rank: it is in the report, and the tokens are unknown."""
    saved(tmp_path, "llama3")
    metadata = pickle.loads((tmp_path / "step-2" / ".metadata").read_bytes())
    (tmp_path / "step-2" / "__0_0.distcp").rename(tmp_path / "step-2" / "__1_0.distcp")
    for info in metadata.storage_data.values():
        info.relative_path = "__1_0.distcp"
    (tmp_path / "step-2" / ".metadata").write_bytes(pickle.dumps(metadata))
    found = open_torchtitan(ImportRequest(tmp_path / "step-2", tmp_path / "config.json"))

    assert found.tokens is None
    assert found.not_imported[0].startswith("train_state.ntokens_seen = 36: torchtitan counts the tokens of one data-")


def test_another_optimizers_state_is_refused(tmp_path):
    """The names of its tensors are in the message, and --weights-only reads the rest."""
    model, optimizer = trained(SPECS["llama3"])
    state = state_of(model, optimizer, SPECS["llama3"])
    state["optimizer"] = {"state.norm.weight.momentum_buffer": torch.zeros(32)} | state["optimizer"]
    write(tmp_path / "step-2", state)
    (tmp_path / "config.json").write_text(json.dumps(config_json(SPECS["llama3"])))
    request = ImportRequest(tmp_path / "step-2", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"optimizer.state.norm.weight.momentum_buffer: not a weight"):
        import_from_trainer("torchtitan", request, tmp_path / "out", log=print)
    import_from_trainer("torchtitan", replace(request, weights_only=True), tmp_path / "out", log=print)

    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "a", "b", "--config", "c"], "--config goes with --from TRAINER"),
        (["import", "a", "b", "--from", "torchtitan", "--vocab-size", "512"], "--vocab-size does not go with --from"),
        (["export", "a", "b", "--format", "dcp", "--tokenizer", "bytes"], "--tokenizer goes with --format hf"),
    ],
)
def test_options_of_the_other_kind_are_refused(words, message, capsys):
    """Before anything is read."""
    with pytest.raises(SystemExit):
        main(words)

    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (None, "optimizer.state.norm.weight.step is missing; import with --weights-only"),
        (torch.tensor(float("nan")), "step is not a whole number but tensor(nan)"),
        (2.5, "step is not a whole number but 2.5"),
        ("two", "step is not a whole number but two"),
    ],
    ids=["missing", "nan", "half", "text"],
)
def test_moments_without_a_count_of_updates_are_refused(count, message, tmp_path):
    """Taken for 0, their bias would be corrected as after one update: too large by a factor of up to 10."""
    model, optimizer = trained(SPECS["llama3"])
    state = state_of(model, optimizer, SPECS["llama3"])
    del state["optimizer"]["state.norm.weight.step"]
    if count is not None:
        state["optimizer"]["state.norm.weight.step"] = count
    write(tmp_path / "step-2", state)
    (tmp_path / "config.json").write_text(json.dumps(config_json(SPECS["llama3"])))

    assert message in refused(tmp_path, tmp_path / "config.json")


def test_numbers_that_are_not_needed_may_be_missing_or_damaged(tmp_path):
    """They are unknown then; the LR of a compiled optimizer is a tensor; another optimizer's state is named."""
    model, optimizer = trained(SPECS["llama3"])
    state = state_of(model, optimizer, SPECS["llama3"])
    state["train_state"] = {"step": float("nan"), "ntokens_seen": -7}
    state["optimizer"]["param_groups.tok_embeddings.weight.lr"] = torch.tensor(0.25)
    write(tmp_path / "step-2", state)
    write(tmp_path / "step-3", state | {"optimizer": {"state.norm.weight.momentum_buffer": torch.zeros(32)}})
    (tmp_path / "config.json").write_text(json.dumps(config_json(SPECS["llama3"])))
    found, other = (
        open_torchtitan(ImportRequest(tmp_path / step, tmp_path / "config.json")) for step in ("step-2", "step-3")
    )

    assert (found.step, found.tokens, found.next_lr, found.foreign) == (None, None, 0.25, [])
    assert "optimizer: its state is not that of AdamW" in other.not_imported


def test_a_moment_with_one_row_more_is_refused_by_its_shape(tmp_path):
    """A fused moment is taken apart only if it has the rows of queries, keys and values."""
    model, optimizer = trained(SPECS["llama3"])
    state = state_of(model, optimizer, SPECS["llama3"])
    state["optimizer"]["state.layers.0.attention.qkv_linear.wqkv.weight.exp_avg"] = torch.zeros(65, 32)
    write(tmp_path / "step-2", state)
    (tmp_path / "config.json").write_text(json.dumps(config_json(SPECS["llama3"])))
    request = ImportRequest(tmp_path / "step-2", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"wqkv.weight.exp_avg \(q\): has shape \[65, 32\] in our layout"):
        import_from_trainer("torchtitan", request, tmp_path / "out", log=print)


def test_wrong_configs_and_folders_are_refused(tmp_path, capsys):
    """A TOML file without [model], a base of RoPE that is no number, a billion layers, a checkpoint of ours."""
    saved(tmp_path, "llama3")
    (tmp_path / "empty.toml").write_text("model = 3")
    many = as_config_table(SPECS["llama3"]).replace("layers = 2", "layers = 1_000_000_000")
    (tmp_path / "many.toml").write_text(many)
    config = config_json(SPECS["llama3"])
    for layer in config["model_spec"]["model"]["layers"]:
        layer["attention"]["rope"]["theta"] = float("nan")
    (tmp_path / "nan.json").write_text(json.dumps(config))
    imported(tmp_path, "--config", str(tmp_path / "config.json"))
    (tmp_path / "out").rename(tmp_path / "ours")
    request = ImportRequest(tmp_path / "ours", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"ours: is a checkpoint of titan_cpt; a stage starts from it with"):
        import_from_trainer("torchtitan", request, tmp_path / "out", log=print)

    assert "empty.toml: has no table [model]" in refused(tmp_path, tmp_path / "empty.toml")
    assert "tensors, but a model of 1,000,000,000 layers is described" in refused(tmp_path, tmp_path / "many.toml")
    assert "model.rope_base: must be above 0 and finite, got nan" in refused(tmp_path, tmp_path / "nan.json")
