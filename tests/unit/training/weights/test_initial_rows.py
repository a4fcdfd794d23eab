"""Stages that start from weights with weak rows: what the log names, and what is refused or replaced."""

import json

import numpy as np
import pytest
import torch
import training
from extensions import base_spec, extended
from releases import SPECS, release
from safetensors.torch import load_file, save_file

from titan_cpt.checkpoint.hf_import import import_released
from titan_cpt.checkpoint.state_dict import local_weights
from titan_cpt.common.weights.named_weights import NamedWeights
from titan_cpt.config.load import load_config
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.planning.plan import StageCheckpoint
from titan_cpt.training.stage_start import begin_stage, load_initial
from titan_cpt.training.weights.initial_rows import InitialRows, RowFindings

pytestmark = training.THEIR_WARNINGS_IGNORED

ROWS, TOKENS = 300, 257  # of the release and of its tokenizer, that of bytes
NAMES = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}


def used_ids(data):
    """How often the German file has each id."""
    ids = np.fromfile(data / "de.bin", np.uint16)
    windows = (len(ids) - 1) // 16
    return np.bincount(ids[: 16 * windows], minlength=ROWS), 16 * windows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return training.write_languages(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A random model: no row is weak."""
    folder = tmp_path_factory.mktemp("released") / "model"
    release(folder, SPECS["llama"], shard="1GB")
    return folder


def damaged(released, folder, change):
    """A copy of the release after `change(embedding, head)`."""
    folder.mkdir()
    tensors = load_file(released / "model.safetensors")
    change(*(tensors[name] for name in NAMES.values()))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((released / "config.json").read_text())
    return folder, {ours: tensors[theirs] for ours, theirs in NAMES.items()}


def config_of(data, folder, init, **keys):
    raw = training.two_stages(data, folder)
    lr = {"schedule": "constant", "max": 1e-3}
    stage = {"name": "german", "dataset": "de", "steps": 2, "init": init, "lr": lr, **keys}
    return training.changed(raw, model={"family": "llama"}, stages=[stage])


def begun(data, folder, init, **keys):
    """The weights with which a stage begins, and its transition event."""
    with training.built_trainer(training.config_of(config_of(data, folder, init, **keys))) as trainer:
        begin_stage(trainer, trainer.plan.stages[0])
        return local_weights(trainer.model), training.events_of(folder / "run", "transition")[-1]


def two_zeros_and_a_twin(embedding, head):
    """Byte 97, which the data uses, and 3, which it does not; equal rows of 99 and 100 in the head."""
    embedding[97] = embedding[3] = 0
    head[100] = head[99]


def test_healthy_weights_are_not_mentioned(data, released, tmp_path):
    """A random model has rows like those of ids without a token, and none of them is called untrained."""
    _, event = begun(data, tmp_path, f"hf:{released}", weak_rows="error")

    assert not {"rows", "weak_rows", "weak_rows_replaced"} & event.keys()


@pytest.mark.parametrize("keys", [{}, {"weak_rows": "keep"}])
def test_weak_rows_are_named_with_their_text_and_uses_and_stay_as_they_are(data, released, tmp_path, keys):
    """Counts are those of the file; the weights are the release's, and the mean for the rows that it lacks."""
    folder, files = damaged(released, tmp_path / "model", two_zeros_and_a_twin)
    weights, event = begun(data, tmp_path, f"hf:{folder}", **keys)
    counts, tokens = used_ids(data)

    assert event["rows"] == (
        f"embedding: 2 rows are near zero, used {counts[97]:,} times: 97 'a' ({counts[97]:,}), 3 '\\x03' (0); "
        f"head: 2 rows are equal, used {counts[[99, 100]].sum():,} times: "
        + ", ".join(f"{n} {chr(n)!r} ({counts[n]:,})" for n in sorted((99, 100), key=lambda n: -counts[n]))
        + f"; uses are counted in all {tokens:,} tokens"
    )
    assert event["weak_rows"] == {"embedding.weight": {"near zero": 2}, "head.weight": {"equal": 2}}
    assert event["weak_rows_replaced"] is False
    assert all(torch.equal(weights[name][:ROWS], files[name]) for name in NAMES)


def exact_mean(rows):
    """In rational arithmetic, rounded to float32."""
    columns = rows.double().numpy().T
    return torch.tensor([np.float32(sum(map(float, column)) / len(column)) for column in columns])


def test_weak_rows_are_replaced_by_the_mean_of_the_healthy_rows_of_tokens(data, released, tmp_path):
    """From a release and from its import: the same bits. Ids without a token are in no mean and stay as they are."""
    folder, files = damaged(released, tmp_path / "model", two_zeros_and_a_twin)
    said = []
    import_released(str(folder), tmp_path / "imported", vocab_size=384, log=said.append)
    from_release, event = begun(data, tmp_path / "a", f"hf:{folder}", weak_rows="mean")
    from_import, _ = begun(data, tmp_path / "b", f"checkpoint:{tmp_path / 'imported'}", weak_rows="mean")

    for name, weak in (("embedding.weight", [3, 97]), ("head.weight", [99, 100])):
        healthy = [number for number in range(TOKENS) if number not in weak]
        mean = exact_mean(files[name][healthy])
        assert torch.equal(from_release[name][weak], mean.expand(2, -1))
        assert torch.equal(from_release[name][ROWS:], mean.expand(384 - ROWS, -1))
        assert torch.equal(from_release[name][healthy], files[name][healthy])
        assert torch.equal(from_release[name][TOKENS:ROWS], files[name][TOKENS:])
        assert torch.equal(from_import[name][:ROWS], from_release[name][:ROWS])
    assert event["weak_rows_replaced"] is True
    assert "they are replaced by the mean of the other tokens' rows" in event["rows"]
    assert [line for line in said if line.startswith("note: weak")] == [
        "note: weak rows of the embedding: 2 rows are near zero: 3, 97",
        "note: weak rows of the head: 2 rows are equal: 99, 100",
    ]


def test_weights_that_are_loaded_again_for_a_measurement_have_the_same_rows_replaced(data, released, tmp_path):
    """As when forgetting is measured on other validation data."""
    folder, _ = damaged(released, tmp_path / "model", two_zeros_and_a_twin)
    config = training.config_of(config_of(data, tmp_path, f"hf:{folder}", weak_rows="mean"))
    with training.built_trainer(config) as trainer:
        begin_stage(trainer, trainer.plan.stages[0])
        first = {name: weight.clone() for name, weight in local_weights(trainer.model).items()}
        load_initial(trainer, trainer.plan.stages[0])

        assert training.same_bits(local_weights(trainer.model), first)


def test_weak_rows_that_the_data_uses_are_refused_with_error(data, released, tmp_path):
    """The unused one is not named; without it there is nothing to refuse."""
    folder, _ = damaged(released, tmp_path / "model", two_zeros_and_a_twin)
    with pytest.raises(CheckpointError) as refusal:
        begun(data, tmp_path, f"hf:{folder}", weak_rows="error")

    def unused(embedding, head):
        embedding[3] = 0

    folder, _ = damaged(released, tmp_path / "unused", unused)
    _, event = begun(data, tmp_path / "again", f"hf:{folder}", weak_rows="error")

    assert "stages.german.weak_rows: hf:" in str(refusal.value)
    assert "embedding: 1 row is near zero, used" in str(refusal.value)
    assert "'\\x03'" not in str(refusal.value)
    assert 'set stages.german.weak_rows = "mean"' in str(refusal.value)
    assert event["weak_rows"] == {"embedding.weight": {"near zero": 1}}


def not_numbers(embedding, head):
    embedding[98, 5] = float("nan")
    head[298] = float("inf")  # of no token


@pytest.mark.parametrize("keys", [{}, {"weak_rows": "keep"}, {"weak_rows": "error"}])
def test_rows_that_are_not_finite_are_refused_by_name(data, released, tmp_path, keys):
    """By a stage, whatever it does with other weak rows, and by an import."""
    folder, _ = damaged(released, tmp_path / "model", not_numbers)
    with pytest.raises(CheckpointError) as stage:
        begun(data, tmp_path, f"hf:{folder}", **keys)
    with pytest.raises(CheckpointError) as imported:
        import_released(str(folder), tmp_path / "imported", log=print)

    assert "embedding: 1 row is non-finite, used" in str(stage.value)
    assert ": 98 'b' (" in str(stage.value)
    assert "head: 1 row is non-finite, used 0 times: 298 no token (0)" in str(stage.value)
    assert 'set stages.german.weak_rows = "mean"' in str(stage.value)
    assert "embedding: 1 row is non-finite: 98" in str(imported.value)
    assert not (tmp_path / "imported").exists()


def test_rows_that_are_not_finite_are_replaced(data, released, tmp_path):
    """Also that of no token, which would make all logits NaN; and the rows that the release lacks are finite."""
    folder, files = damaged(released, tmp_path / "model", not_numbers)
    weights, event = begun(data, tmp_path, f"hf:{folder}", weak_rows="mean")
    healthy = [number for number in range(TOKENS) if number != 98]

    assert torch.equal(weights["embedding.weight"][98], exact_mean(files["embedding.weight"][healthy]))
    assert torch.equal(weights["head.weight"][298], exact_mean(files["head.weight"][:TOKENS]))
    assert all(weight.isfinite().all() for weight in weights.values())
    assert "its own are not finite" in event["weights"]


def test_weights_without_a_healthy_row_are_refused(data, released, tmp_path):
    """There is no mean."""
    folder, _ = damaged(released, tmp_path / "model", lambda embedding, head: head.fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"head\.weight has no row that is not weak"):
        begun(data, tmp_path, f"hf:{folder}", weak_rows="mean")


def test_new_ids_of_an_extended_tokenizer_are_no_tokens_of_weights_of_the_base(data, released, tmp_path):
    """Their rows are computed anew; in weights of unknown tokenizer, which is taken to be the base."""

    def zeros(embedding, head):
        embedding[97] = embedding[258] = 0

    folder, _ = damaged(released, tmp_path / "model", zeros)
    (tmp_path / "base.json").write_text(json.dumps(base_spec()))
    (tmp_path / "new.json").write_text(json.dumps(extended(base_spec())))
    tokenizer = {"path": str(tmp_path / "new.json"), "extend": {"base": str(tmp_path / "base.json")}}
    raw = training.changed(config_of(data, tmp_path, f"hf:{folder}"), tokenizer=tokenizer)
    with training.built_trainer(training.config_of(raw)) as trainer:
        begin_stage(trainer, trainer.plan.stages[0])

    assert training.events_of(tmp_path / "run", "transition")[-1]["weak_rows"] == {"embedding.weight": {"near zero": 1}}


def test_checkpoints_of_the_same_run_are_not_examined(data, tmp_path):
    """The files of the first stage's checkpoint are not even opened."""
    with training.built_trainer(training.config_of(training.two_stages(data, tmp_path))) as trainer:
        rows = InitialRows(trainer, trainer.plan.stages[1])

        assert isinstance(trainer.plan.stages[1].init, StageCheckpoint)
        assert rows.of_checkpoint(NamedWeights(tmp_path / "missing")) == {}
        assert rows.findings == RowFindings()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init": "random", "weak_rows": "keep"}, "stages.german.weak_rows: is for weights from outside of the run"),
        (
            {"init": "checkpoint:there", "weak_rows": "mean", "optimizer_state": "keep"},
            'stages.german.weak_rows: "mean" replaces rows whose moments optimizer_state = "keep" would keep',
        ),
        ({"init": "hf:there", "weak_rows": "zero"}, "stages.german.weak_rows: must be one of 'error', 'keep', 'mean'"),
    ],
)
def test_what_the_config_refuses(data, tmp_path, keys, message):
    """The key is for weights from elsewhere, and what it replaces has no moments."""
    raw = config_of(data, tmp_path, **keys)
    with pytest.raises(ConfigError) as refusal:
        load_config(training.write_config(raw, tmp_path / "config.toml"))

    assert message in str(refusal.value)


def test_only_replaced_rows_are_part_of_the_recipe(data, released, tmp_path):
    """Plans of configs without the key are as before."""
    recipes = []
    for keys in ({}, {"weak_rows": "keep"}, {"weak_rows": "mean"}):
        raw = config_of(data, tmp_path / json.dumps(keys), f"hf:{released}", **keys)
        with training.built_trainer(training.config_of(raw)) as trainer:
            recipes.append(dict(trainer.plan.stages[0].recipe))

    assert recipes[0] == recipes[1] == {key: value for key, value in recipes[2].items() if key != "weak_rows"}
    assert recipes[2]["weak_rows"] == "mean"
