"""Weights of another tokenizer than the run's are refused, by the plan and by the run: hf:, checkpoint:, imports."""

import hashlib
import json

import pytest
import tokenizers
from training import (
    THEIR_WARNINGS_IGNORED,
    built_trainer,
    changed,
    config_of,
    lines_of,
    train,
    write_config,
    write_languages,
)
from training import two_stages as two_stages_of

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.hf_export import export
from titan_cpt.checkpoint.hf_import import import_released
from titan_cpt.checkpoint.tokenizer_check import TrainingTokenizer, tokenizer_of_manifest
from titan_cpt.cli import main
from titan_cpt.data.tokenizer.ids_fingerprint import byte_tokenizer_json, ids_fingerprint
from titan_cpt.data.tokenizer.tokenizer import fingerprint_of
from titan_cpt.errors import CheckpointError, DataError
from titan_cpt.models.build import build_model
from titan_cpt.models.huggingface_config import config_from_spec
from titan_cpt.models.huggingface_weights import to_huggingface
from titan_cpt.models.registry import named_size
from titan_cpt.runs.anneal import branch_off
from titan_cpt.training.stage_start import load_initial

pytestmark = THEIR_WARNINGS_IGNORED
KEY = "tokenizer.allow_mismatch = true"


def write_tokenizer(path, *, swapped):
    """The byte tokenizer as a tokenizer.json with two ids swapped."""
    spec = byte_tokenizer_json(256)
    vocab = spec["model"]["vocab"]
    if swapped:
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(spec))
    return path


def one_stage(data, out, **stage):
    """Four steps on English with the byte tokenizer."""
    raw = two_stages_of(data, out)
    first = {"name": "english", "dataset": "en", "steps": 4, "lr": {"schedule": "constant", "max": 1e-3}}
    return changed(raw, stages=[first | stage])


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Data, two tokenizers, a run with the byte tokenizer, a Hugging Face model with the other one, and its import."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("there")
    write_languages(folder / "data")
    write_tokenizer(folder / "other.json", swapped=True)
    outcome = train(write_config(one_stage(folder / "data", folder), folder / "run.toml"))
    assert outcome.status == 0, outcome.output
    spec = named_size("gpt_neox", "debug", 257)
    model = build_model(spec)
    model.init_weights(1)
    write_tokenizer(folder / "release" / "tokenizer.json", swapped=True)
    save_file(to_huggingface(model.state_dict(), spec), folder / "release" / "model.safetensors")
    config = config_from_spec(spec, max_positions=16, dtype="float32")
    (folder / "release" / "config.json").write_text(json.dumps(config))
    import_released(str(folder / "release"), folder / "imported", log=print)
    return folder


def inits(there):
    return {
        "release": f"hf:{there}/release",
        "import": f"checkpoint:{there}/imported",
        "run": f"checkpoint:{there}/run/english/step-00000004",
    }


def mismatched(there, out, what, **stage):
    """A config whose initial weights were trained with another tokenizer than the run's."""
    raw = one_stage(there / "data", out, init=inits(there)[what], **stage)
    path = str(there / "other.json") if what == "run" else "bytes"
    return changed(raw, tokenizer={"path": path})


@pytest.mark.parametrize("what", ["release", "import", "run"])
def test_weights_of_another_tokenizer_are_refused_by_the_plan_and_by_the_run(what, there, tmp_path, capsys):
    """With both fingerprints, their sources, and the key that allows it; nothing is trained."""
    raw = mismatched(there, tmp_path, what)
    both = {fingerprint_of("bytes")[:12], hashlib.sha256((there / "other.json").read_bytes()).hexdigest()[:12]}
    with pytest.raises(SystemExit) as end:
        main(["plan", "--config", str(write_config(raw, tmp_path / "run.toml"))])
    planned = capsys.readouterr().err
    with pytest.raises(CheckpointError) as refusal, built_trainer(config_of(raw)):
        pass

    assert end.value.code == 2
    for message in (planned, str(refusal.value)):
        assert "stages.english.init: the weights of" in message
        assert KEY in message
        assert all(fingerprint in message for fingerprint in both)
    assert lines_of(tmp_path / "run") == []


@pytest.mark.parametrize("what", ["release", "import", "run"])
def test_allow_mismatch_allows_them_with_a_note(what, there, tmp_path, capsys):
    """In the plan and in the log line of the stage's start."""
    raw = mismatched(there, tmp_path, what)
    raw["tokenizer"]["allow_mismatch"] = True
    with pytest.raises(SystemExit) as end:
        main(["plan", "--json", "--config", str(write_config(raw, tmp_path / "run.toml"))])
    (note,) = [note for note in json.loads(capsys.readouterr().out)["notes"] if "another tokenizer" in note]
    with built_trainer(config_of(raw)) as trainer:
        said = load_initial(trainer, trainer.plan.stages[0])

    assert end.value.code == 0
    assert note.endswith("as tokenizer.allow_mismatch allows")
    assert "as tokenizer.allow_mismatch allows" in said


def test_the_model_card_names_an_allowed_mismatch(there, tmp_path):
    """For the run that allowed it, its branch, and a run that started from its weights; not for another run."""
    raw = mismatched(there, tmp_path, "release")
    raw["stages"][0]["lr"] = {"schedule": "wsd", "max": 1e-3, "warmup_until": 1, "decay_from": 3, "decay": "linear"}
    raw["tokenizer"]["allow_mismatch"] = True
    raw["checkpoint"]["interval"] = 2
    first = write_config(raw, tmp_path / "run.toml")
    assert train(first).status == 0
    then = one_stage(there / "data", tmp_path / "then", init=f"checkpoint:{tmp_path}/run/english/step-00000004")
    assert train(write_config(then, tmp_path / "then.toml")).status == 0
    branch_off(tmp_path / "run" / "english" / "step-00000002", tokens=128, min_lr=None, overrides=(), writes=True)
    cards = []
    for checkpoint in (
        tmp_path / "run" / "english" / "step-00000004",
        tmp_path / "run-anneal-english-2" / "english" / "step-00000002",
        tmp_path / "then" / "run" / "english" / "step-00000004",
        there / "run" / "english" / "step-00000004",
    ):
        out = tmp_path / f"out-{len(cards)}"
        export(checkpoint, out, dtype="float32", log=print)
        cards.append((out / "README.md").read_text())
    note = (
        f"- **Trained on tokens of another tokenizer**: the weights of hf:{there}/release were trained with another "
        f"tokenizer (fingerprint {fingerprint_of(str(there / 'other.json'))[:12]} by "
    )

    assert [note in card for card in cards] == [True, True, True, False]
    assert "another tokenizer" not in cards[-1]


def test_weights_with_optimizer_state_are_checked_too(there, tmp_path):
    """`optimizer_state = "keep"` from another run is refused as well."""
    with (
        pytest.raises(CheckpointError, match="were trained with another tokenizer"),
        built_trainer(config_of(mismatched(there, tmp_path, "run", optimizer_state="keep"))),
    ):
        pass


def test_a_later_stage_is_refused_before_the_first_one_is_trained(there, tmp_path):
    """Not after days of training."""
    raw = one_stage(there / "data", tmp_path)
    later = {**raw["stages"][0], "name": "later", "init": inits(there)["release"]}
    with (
        pytest.raises(CheckpointError, match=r"stages\.later\.init: "),
        built_trainer(config_of(changed(raw, stages=[raw["stages"][0], later]))),
    ):
        pass


def test_a_stage_that_has_begun_resumes_whatever_its_tokenizer_was(there, tmp_path, capsys):
    """A run of an older version, which did not check, continues; its next stage is checked. The plan agrees."""
    raw = mismatched(there, tmp_path, "release")
    raw["tokenizer"]["allow_mismatch"] = True
    assert train(write_config(raw, tmp_path / "run.toml")).status == 0
    del raw["tokenizer"]["allow_mismatch"]
    first, again = raw["stages"][0], {**raw["stages"][0], "name": "again"}
    appended = changed(raw, stages=[first, again | {"init": "previous"}])
    refused = train(write_config(changed(raw, stages=[first, again]), tmp_path / "b.toml"))
    with pytest.raises(SystemExit) as not_planned:
        main(["plan", "--config", str(tmp_path / "b.toml")])
    planned_refusal = capsys.readouterr().err
    outcome = train(write_config(appended, tmp_path / "a.toml"))

    assert outcome.status == 0, outcome.output
    assert refused.status == 2
    assert "stages.again.init: the weights of" in refused.output
    assert not_planned.value.code == 2
    assert "stages.again.init: the weights of" in planned_refusal
    assert "stages.english.init" not in planned_refusal

    capsys.readouterr()
    with pytest.raises(SystemExit) as planned:
        main(["plan", "--json", "--config", str(tmp_path / "a.toml")])
    (note,) = [note for note in json.loads(capsys.readouterr().out)["notes"] if "another tokenizer" in note]

    assert planned.value.code == 0
    assert note.startswith("stages.english.init: ")
    assert note.endswith("This stage has begun, and a resume does not load these weights again")


def test_weights_of_an_unknown_tokenizer_give_a_note(there, tmp_path, capsys):
    """A Hugging Face model without tokenizer.json, and an import of an older version: the stage starts."""
    record = manifest.read(there / "imported")
    del record["released"]["tokenizer"]
    manifest.link_checkpoint(there / "imported", tmp_path / "old-import", record)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).write_bytes((there / "release" / name).read_bytes())
    for init in (f"checkpoint:{tmp_path}/old-import", f"hf:{tmp_path}/bare"):
        raw = one_stage(there / "data", tmp_path, init=init)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["plan", "--json", "--config", str(write_config(raw, tmp_path / "run.toml"))])
        expected = f"the tokenizer that the weights of {init} were trained with is unknown"
        assert expected in " ".join(json.loads(capsys.readouterr().out)["notes"])
        with built_trainer(config_of(raw)) as trainer:
            assert expected in load_initial(trainer, trainer.plan.stages[0])


def test_a_tokenizer_that_gives_the_same_ids_is_the_same(there, tmp_path):
    """The byte tokenizer as an exported file, and a file that another library has rewritten."""
    export(there / "run" / "english" / "step-00000004", tmp_path / "exported", dtype="float32", log=print)
    import_released(str(tmp_path / "exported"), tmp_path / "imported", log=print)
    for init in (f"hf:{tmp_path}/exported", f"checkpoint:{tmp_path}/imported"):
        with built_trainer(config_of(one_stage(there / "data", tmp_path, init=init))) as trainer:
            said = load_initial(trainer, trainer.plan.stages[0])
        assert "were trained with" not in said
    again = tmp_path / "again.json"
    tokenizers.Tokenizer.from_file(str(there / "other.json")).save(str(again))

    assert tokenizer_of_manifest(manifest.read(tmp_path / "imported"), tmp_path).is_that_of("bytes")
    assert fingerprint_of(str(again)) != fingerprint_of(str(there / "other.json"))
    assert ids_fingerprint(str(again)) == ids_fingerprint(str(there / "other.json")) != ids_fingerprint("bytes")


@pytest.mark.parametrize(
    "written",
    [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}]},
        {"type": "Metaspace", "replacement": "_", "add_prefix_space": True},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"},
        {"type": "Metaspace", "replacement": "_", "add_prefix_space": False, "prepend_scheme": "never"},
    ],
)
def test_defaults_that_the_library_writes_into_a_file_change_no_ids(written, tmp_path):
    """As save_pretrained does with GPT-NeoX's tokenizer.json; imports of before recorded the file as it is written."""
    spec = byte_tokenizer_json(256) | {"pre_tokenizer": written, "decoder": None}
    path, again = tmp_path / "old.json", tmp_path / "again.json"
    path.write_text(json.dumps(spec))
    tokenizers.Tokenizer.from_file(str(path)).save(str(again))

    assert json.loads(again.read_text())["pre_tokenizer"] != written
    assert ids_fingerprint(str(again)) == ids_fingerprint(str(path))
    recorded = ids_fingerprint(str(again), as_written=True)
    assert recorded != ids_fingerprint(str(path), as_written=True)
    assert TrainingTokenizer("import", "0", recorded).is_that_of(str(again))


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["model"]["merges"].append(["a", "b"]),
        lambda spec: spec.update(normalizer={"type": "NFC"}),
        lambda spec: spec["pre_tokenizer"].update(use_regex=True),
        lambda spec: spec["added_tokens"][0].update(lstrip=True),
        lambda spec: spec["model"].update(ignore_merges=True),
    ],
)
def test_everything_that_decides_ids_is_compared(change, tmp_path):
    """Merges, normalizer, pre-tokenizer, flags of an added token, a model option."""
    spec = byte_tokenizer_json(256)
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))

    assert ids_fingerprint(str(tmp_path)) != ids_fingerprint("bytes")


def test_an_export_of_an_import_keeps_its_tokenizer(there, tmp_path):
    """The Hugging Face model's own tokenizer is exported, and another one is refused."""
    said = []
    export(there / "imported", tmp_path / "out", dtype="float32", log=said.append)
    with pytest.raises(DataError, match="is not the tokenizer of the run"):
        export(there / "imported", tmp_path / "other", dtype="float32", tokenizer="bytes", log=print)

    assert said[-1] == f"tokenizer: {there}/release"


@pytest.mark.parametrize("released", [5, {"tokenizer": 5}, {"tokenizer": {"ids": "x"}}, {"tokenizer": ["where"]}])
def test_a_damaged_tokenizer_entry_is_our_error(released, tmp_path):
    """No traceback; a manifest without the entry is not damaged."""
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged: its released\.tokenizer is"):
        tokenizer_of_manifest({"data": {}, "released": released}, tmp_path)

    assert tokenizer_of_manifest({"data": {}, "released": {"name": "x", "config": {}}}, tmp_path) is None
