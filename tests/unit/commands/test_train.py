"""`titan-cpt train`: the options arrive, and a mistake in the config ends before torch is imported."""

from sweeps import status_of


def test_run_info_prints_the_run_folder_and_the_timeout(write, one_stage, tmp_path, capsys):
    """As run_train.sh and the Slurm script read them, overrides included; nothing is trained."""
    words = ("train", "--config", write(one_stage), "--job.output_dir", tmp_path / "out", "--job.name", "other")
    status = status_of(*words, "--comm.init_timeout_seconds", "17", "--run-info")

    assert status == 0
    assert capsys.readouterr().out.splitlines() == [f"run_folder={tmp_path}/out/other", "init_timeout_seconds=17"]
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_wrong_or_missing_is_status_2(write, one_stage, tmp_path, capsys):
    """With the key, or the file."""
    assert status_of("train", "--config", write(one_stage), "--training.seq_len", "0") == 2
    assert "training.seq_len" in capsys.readouterr().err
    assert status_of("train", "--config", tmp_path / "nothing.toml", "--run-info") == 2
    assert "nothing.toml" in capsys.readouterr().err
    assert status_of("train") == 2
    assert "write `titan-cpt train FILE`" in capsys.readouterr().err
