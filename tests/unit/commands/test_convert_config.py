"""`titan-cpt convert-config`: what is written and printed, exit statuses, and files that it does not overwrite."""

import pytest

from titan_cpt.cli import main

NEOX = '{"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "pos_emb": "rotary", "no_weight_tying": true,}'


@pytest.fixture
def convert(capsys, monkeypatch, tmp_path):
    """convert(*words): exit status, stdout and stderr of titan-cpt convert-config."""
    monkeypatch.chdir(tmp_path)

    def convert(*words):
        with pytest.raises(SystemExit) as leaving:
            main(["convert-config", *map(str, words)])
        return leaving.value.code, *capsys.readouterr()

    return convert


def test_the_file_that_is_written_plans(convert, write, tmp_path, capsys):
    status, out, err = convert(write(NEOX, "a.yml"), write("train_iters: 50", "b.yml"), "out.toml")
    assert (status, err) == (0, "")
    assert "out.toml: plans 50 steps" in out
    with pytest.raises(SystemExit) as leaving:
        main(["plan", "--config", "out.toml"])
    assert leaving.value.code == 0


def test_without_a_name_the_toml_goes_to_stdout_and_the_lists_to_stderr(convert, write):
    status, out, err = convert(write(NEOX, "a.yml"))
    assert status == 0
    assert out.startswith("# Converted by")
    assert "converted:" in err
    assert "to check:" in err


def test_an_existing_file_is_overwritten_only_with_force(convert, write, tmp_path):
    source, target = write(NEOX, "a.yml"), write("mine", "out.toml")
    status, _, err = convert(source, target)
    assert status == 2
    assert "exists already" in err
    assert target.read_text() == "mine"
    assert convert(source, target, "--force")[0] == 0


def test_a_result_that_does_not_plan_is_written_and_says_what_to_edit(convert, write, tmp_path):
    status, _, err = convert(write("[training]\nseq_len = 1\n", "a.toml"), "out.toml")
    assert status == 2
    assert "out.toml was written, but does not plan yet; edit it" in err
    assert "training.seq_len" in err
    assert (tmp_path / "out.toml").exists()


@pytest.mark.parametrize("words", [["no.yml"], ["--from", "litgpt", "a.yml", "b.yml"], ["--world-size", "0", "a.yml"]])
def test_mistakes_are_one_message_and_status_2(convert, write, words):
    write(NEOX, "a.yml")
    write(NEOX, "b.yml")
    status, _, err = convert(*words)
    assert status == 2
    assert "Traceback" not in err
