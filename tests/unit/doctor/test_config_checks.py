"""Checks of a config with their problems: damaged and missing data, tokenizers, unreadable text, memory."""

import json

import pytest
from training import two_stages, write_config, write_languages

from titan_cpt.doctor import config_checks as checks
from titan_cpt.doctor.request import Request


@pytest.fixture
def run(tmp_path):
    """run(check, change=None): its findings for the config of two stages, of which `change` edits the tables."""
    write_languages(tmp_path / "data")

    def run(check, change=None):
        raw = two_stages(tmp_path / "data", tmp_path / "out")
        if change is not None:
            change(raw)
        return list(check(Request(write_config(raw, tmp_path / "config.toml"))))

    return run


def problems(findings):
    return [finding for finding in findings if finding.level == "problem"]


def test_a_config_that_is_ready_has_no_problem(run):
    for check in (checks.check_plan, checks.check_data, checks.check_tokenizer, checks.check_text,
                  checks.check_checkpoints, checks.check_memory, checks.check_output):  # fmt: skip
        assert problems(run(check)) == [], check.__name__


def test_a_mistake_in_the_config_is_the_problem_of_the_plan(run):
    (found,) = run(checks.check_plan, lambda raw: raw["training"].update(seq_len=0))
    assert found.level == "problem"
    assert "training.seq_len" in found.text
    assert "titan-cpt plan" in found.remedy


def test_a_damaged_index_is_named(run, tmp_path):
    (tmp_path / "data" / "en.idx").write_bytes(b"MMIDIDX\x00\x00" + b"\xff" * 40)
    (found,) = problems(run(checks.check_data))
    assert "datasets.en.train" in found.text
    assert "prepare it again" in found.remedy


def test_damaged_data_is_not_called_a_wrong_tokenizer(run, tmp_path):
    """The check of the data names it; the other dataset is still shown as text."""
    (tmp_path / "data" / "en.bin").write_bytes(b"x")
    assert problems(run(checks.check_tokenizer)) == []
    shown = run(checks.check_text)
    assert problems(shown) == []
    assert {each.text.partition(",")[0] for each in shown} == {"de"}


def test_missing_data_is_a_problem_unless_its_source_is_given(run, tmp_path):
    (found,) = problems(run(checks.check_data, lambda raw: raw["datasets"]["en"].update(train="data/none")))
    assert "data/none" in found.text
    assert "titan-cpt prepare" in found.remedy

    def with_source(raw):
        raw["datasets"]["en"] = {"train": str(tmp_path / "later"), "source": {"text": "x.txt"}}

    found = run(checks.check_data, with_source)
    assert problems(found) == []
    assert any("prepared when training begins" in each.text for each in found)


def test_a_dataset_without_validation_data_is_a_note(run):
    found = run(checks.check_data, lambda raw: raw["datasets"]["en"].pop("validation"))
    assert [each.text for each in found if each.level == "note"] == [
        "datasets.en has no validation data: its loss and forgetting are not measured"
    ]


def test_a_missing_tokenizer_is_a_problem_unless_it_will_be_made(run, tmp_path):
    tokenizer = {"path": str(tmp_path / "tokenizer.json")}
    (found,) = run(checks.check_tokenizer, lambda raw: raw.update(tokenizer=tokenizer))
    assert (found.level, "does not exist" in found.text) == ("problem", True)

    for made in ({"train": {"dataset": "en", "vocab_size": 300}}, {"extend": {"base": "x", "dataset": "en", "add": 9}}):

        def with_text(raw, made=made):
            raw["tokenizer"] = tokenizer | made
            raw["datasets"]["en"] = {"train": str(tmp_path / "later"), "source": {"text": "x.txt"}}

        (found,) = run(checks.check_tokenizer, with_text)
        assert found.level == "note"


def test_a_tokenizer_that_is_none_is_a_problem(run, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (found,) = run(checks.check_tokenizer, lambda raw: raw.update(tokenizer={"path": str(tmp_path / "tokenizer.json")}))
    assert found.level == "problem"


def test_windows_are_shown_as_text(run):
    """The made-up languages consist of 20 letters, a to t."""
    found = run(checks.check_text)
    assert len(found) == 4
    for each in found:
        words = each.text.partition(": ")[2].replace("<|endoftext|>", "")
        assert set(words) <= set("abcdefghijklmnopqrst ")


def test_tokens_that_are_no_text_are_a_problem(run, tmp_path):
    """Headerless ids above 127 are no UTF-8."""
    (tmp_path / "noise.bin").write_bytes(b"\xfe\x00" * 4000)
    noise = {"train": str(tmp_path / "noise.bin"), "format": "raw", "dtype": "uint16"}
    found = problems(run(checks.check_text, lambda raw: raw["datasets"].update(en=noise)))
    assert len(found) == 2
    assert "% unreadable)" in found[0].text


def test_a_model_that_does_not_fit_is_a_problem(run, monkeypatch):
    monkeypatch.setattr(checks, "available_memory", lambda: 1000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (found,) = run(checks.check_memory)
    assert found.level == "problem"
    assert "--suggest" in found.remedy


def test_the_space_for_checkpoints_is_checked_in_the_folder_of_the_config(run, tmp_path):
    topics = {each.topic: each for each in run(checks.check_output)}
    assert str(tmp_path / "out") in topics["output folder"].text
    assert topics["disk space"].level == "ok"


@pytest.mark.parametrize(("steps_done", "text"), [(4, "training resumes at"), (10, "the run is finished, at")])
def test_where_training_resumes_is_named(run, tmp_path, steps_done, text):
    """A finished run does not resume."""
    folder = tmp_path / "out" / "run" / "german" / f"step-{steps_done:08d}"
    folder.mkdir(parents=True)
    record = {"format": 2, "stage": "german", "stage_index": 1, "steps_done": steps_done, "run_step": 12 + steps_done}
    record |= {"kind": "step", "recipe": {}, "fingerprint": "f", "data": {}, "files": {}}
    (folder / checks.MANIFEST_FILE).write_text(json.dumps(record))
    (found,) = run(checks.check_checkpoints)
    assert (found.level, found.text) == ("ok", f"1; {text} {folder} (plan f)")


def test_a_checkpoint_whose_manifest_is_damaged_is_a_problem(run, tmp_path):
    folder = tmp_path / "out" / "run" / "en" / "step-00000005"
    folder.mkdir(parents=True)
    (folder / checks.MANIFEST_FILE).write_text("{")
    (found,) = run(checks.check_checkpoints)
    assert found.level == "problem"
    assert "titan-cpt verify" in found.remedy
