"""config.toml in a run's folder: files that no run wrote are refused and stay; those of a run are replaced."""

import json

import pytest

from titan_cpt.config.load import dump_config, load_config
from titan_cpt.config.run_config import changed_settings, require_own_run, write_run_config
from titan_cpt.errors import CheckpointError


@pytest.fixture
def config(write, one_stage):
    return load_config(write(one_stage, "mine.toml"))


@pytest.mark.parametrize("name", ["config.toml", "plan.json", "summary.json", "metrics.jsonl", ".lock"])
@pytest.mark.parametrize("content", ["mine", "# mine\n", '{"mine": 1}\n', "[job]\nname = 'tested'\n", "\xff"])
def test_a_file_that_no_run_wrote_is_refused(tmp_path, config, name, content):
    """Prose, JSON and TOML of a user, and text that is not UTF-8; the message names the file."""
    (tmp_path / name).write_bytes(content.encode("latin-1"))

    with pytest.raises(CheckpointError, match=rf"{name.replace('.', '[.]')}: was not written by a run"):
        require_own_run(tmp_path, config)


def test_files_that_a_run_wrote_are_accepted(tmp_path, config):
    """As written now and by commit 987a5cd (an empty lock), complete and with an incomplete first line after a kill."""
    require_own_run(tmp_path / "none", config)
    record = json.dumps({"kind": "event", "name": "start"}) + "\n"
    for files in (
        {".lock": "", "config.toml": dump_config(config), "metrics.jsonl": record + '{"ki'},
        {".lock": '{"pid": 7', "plan.json": '{"fingerprint": "a", "stages": []}', "metrics.jsonl": record[:12]},
        {"summary.json": '{"stages": []}', "metrics.jsonl": ""},
    ):
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        require_own_run(tmp_path, config)


def test_only_a_config_toml_that_a_run_wrote_is_replaced(tmp_path, config, write, one_stage):
    """A resolved config of another plan or a copied run is replaced; a hand-written one or one with comments is not."""
    path = tmp_path / "config.toml"
    write_run_config(path, config)
    first = path.read_text()
    changed = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": "other.json"})})
    write_run_config(path, changed)
    assert "other.json" in path.read_text() != first

    path.write_text("# a note\n" + first)
    write_run_config(path, config)
    assert path.read_text() == "# a note\n" + first, "it says the same already"
    for text in (one_stage, "# a note\n" + first):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.toml: was not written by a run"):
            write_run_config(path, changed)
        assert path.read_text() == text
    path.write_text(dump_config(load_config(write(one_stage.replace('"tested"', '"copied"'), "copied.toml"))))
    write_run_config(path, config)
    assert path.read_text() == first


def test_changed_settings_are_listed_by_their_dotted_keys(tmp_path, config, write, one_stage):
    """Old and new value, also of defaults; the name of the run and keys that an older file lacks are not compared."""
    path = tmp_path / "config.toml"
    write_run_config(path, config)
    overrides = [("job.name", "other"), ("compile.enable", "true"), ("stages.first.lr.max", "2e-3")]
    other = load_config(write(one_stage, "other.toml"), [*overrides, ("training.local_batch_size", "5")])
    found = changed_settings(path, other)
    older = path.read_text().replace("[comm]", "").replace("init_timeout_seconds = 600\n", "")
    path.write_text(older.replace("train_timeout_seconds = 1800\n", ""))

    assert found == [
        "compile.enable: false -> true",
        "stages.first.lr.max: 0.001 -> 0.002",
        f"training.local_batch_size: {config.training.local_batch_size} -> 5",
    ]
    assert changed_settings(path, config) == []
    assert changed_settings(tmp_path / "none.toml", config) == []


def test_a_fetch_script_is_not_a_changed_setting_on_resume(tmp_path, write, one_stage):
    """config.toml has its absolute path, as the file is in another folder than the user's TOML."""
    dataset = '[datasets.en]\ntrain = "en"\nsource = { text = "en.jsonl", fetch = "../scripts/fetch.py" }\n'
    config = load_config(write(f"{one_stage}\n{dataset}", "mine.toml"))
    write_run_config(tmp_path / "config.toml", config)

    assert changed_settings(tmp_path / "config.toml", config) == []
