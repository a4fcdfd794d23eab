"""A run's folder: files that no run wrote are named and stay; a run's own, of older versions too, are replaced."""

import json
import os

import pytest

from titan_cpt.common.files import partial_folder, write_bytes_atomically
from titan_cpt.config.load import dump_config, load_config
from titan_cpt.config.run_config import changed_settings, require_own_run, write_run_config
from titan_cpt.errors import CheckpointError


@pytest.fixture
def config(write, one_stage):
    return load_config(write(one_stage, "mine.toml"))


@pytest.mark.parametrize("name", ["config.toml", "plan.json", "summary.json", "metrics.jsonl", ".lock"])
@pytest.mark.parametrize("content", ["mine", "# mine\n", '{"mine": 1}\n', "[job]\nname = 'tested'\n", "\xff"])
def test_a_file_that_no_run_wrote_is_named(tmp_path, config, name, content):
    """Prose, JSON and TOML of the user's, and what is not UTF-8."""
    (tmp_path / name).write_bytes(content.encode("latin-1"))

    with pytest.raises(CheckpointError, match=rf"{name.replace('.', '[.]')}: was not written by a run"):
        require_own_run(tmp_path, config)


def test_a_runs_own_files_are_its_own(tmp_path, config):
    """As written now and by commit 987a5cd (an empty lock), whole and with a first line that a kill cut short."""
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


def test_config_toml_is_replaced_only_where_a_run_wrote_it(tmp_path, config, write, one_stage):
    """The resolved config of another plan or a copied run is; a hand-written one and one with notes are not."""
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


def test_a_temporary_file_never_replaces_one_that_is_there(tmp_path):
    """NAME.tmp may be the user's, and so may what we would call ours: both stay."""
    for name in ("page.tmp", "page.html.tmp", f".page.html.{os.getpid()}-0.tmp"):
        (tmp_path / name).write_text("mine")
    write_bytes_atomically(tmp_path / "page.html", b"page")

    assert (tmp_path / "page.html").read_text() == "page"
    assert {path.read_text() for path in tmp_path.iterdir() if path.name != "page.html"} == {"mine"}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_partial_folder_replaces_only_what_an_interrupted_attempt_left(tmp_path):
    """A `.out.partial` of unknown origin is refused; one with our lock file is cleared; a failure leaves nothing."""
    hidden = tmp_path / ".out.partial"
    hidden.mkdir()
    (hidden / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="did not write it"), partial_folder(tmp_path / "out"):
        pass
    assert (hidden / "model.safetensors").read_text() == "mine"

    (hidden / "titan_cpt.lock").touch()
    (hidden / "content").mkdir()
    (hidden / "content" / "half").write_text("left by a kill")

    def fail():
        with partial_folder(tmp_path / "out") as folder:
            assert list(folder.iterdir()) == []
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (hidden / "model.safetensors").read_text() == "mine", "what is beside the content stays"
    (hidden / "model.safetensors").unlink()
    hidden.rmdir()

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with partial_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("new")
    assert (tmp_path / "out" / "whole").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}


def test_settings_that_changed_are_named_by_their_dotted_keys(tmp_path, config, write, one_stage):
    """Old and new value, defaults too; not the run's name, nor keys that an older version's file does not have."""
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
