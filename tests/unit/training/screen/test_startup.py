"""The first lines of a run: what trains where, within 80 columns, and notes on the device."""

import shlex
import socket
import sys
from pathlib import Path

import pytest
import torch
import training

from titan_cpt.common.console import Verbosity
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.training.screen import startup
from titan_cpt.training.screen.startup import device_notes, print_start, rank_lines, run_console

CPU = ProcessInfo(0, 1, torch.device("cpu"))


@pytest.fixture
def config(tmp_path):
    """Two stages in float32 on made-up languages."""
    return training.config_of(training.two_stages(tmp_path, tmp_path))


def started(config, folder, verbosity=Verbosity.NORMAL, process=CPU):
    """Start the console of a run and print its first lines; returns its log."""
    with run_console(folder, process, verbosity) as console:
        print_start(console, config, process, folder)
    return (folder / "logs" / f"rank-{process.rank}.log").read_text()


def test_versions_host_device_precision_and_paths_are_printed_and_logged(config, tmp_path, capsys):
    """Every line has at most 80 columns, unless a path is longer; the log begins with the command."""
    logged = started(config, tmp_path).splitlines()
    printed = capsys.readouterr().out.splitlines()
    values = {line.split()[0]: line for line in printed}

    assert logged[1:] == printed
    assert logged[0].startswith("=== ")
    assert shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace("__main__.py", "titan-cpt") in logged[0]
    assert f"torch {torch.__version__}" in printed[0]
    assert socket.gethostname() in values["host"]
    assert values["device"].startswith("device     CPU: ")
    assert values["processes"].split() == ["processes", "1"]
    assert values["precision"].split() == ["precision", "float32"]
    assert str(tmp_path / "logs" / "rank-0.log") in "".join(printed)
    assert [line for line in printed if len(line) > 80 and len(line.split()) > 2] == []


def test_mixed_precision_and_float8_are_named(config, tmp_path, capsys):
    """Compute dtype, master weights, reduction and recipe."""
    raw = training.two_stages(tmp_path, tmp_path)
    raw["training"]["mixed_precision_param"] = "bfloat16"
    started(training.config_of(raw | {"float8": {"recipe_name": "rowwise"}}), tmp_path)
    text = " ".join(capsys.readouterr().out.split())

    assert "bfloat16 compute, float32 master weights, float32 gradient reduction, float8 (rowwise)" in text


def test_verbose_lists_the_settings_that_are_not_defaults(config, tmp_path, capsys):
    """With their dotted keys; defaults are not listed. Quiet prints none of all this."""
    started(config, tmp_path, Verbosity.VERBOSE)
    verbose = capsys.readouterr().out
    logged = started(config, tmp_path, Verbosity.QUIET)

    assert "  training.seq_len = 16\n" in verbose
    assert '  stages.german.lr.schedule = "cosine"\n' in verbose
    assert "training.gc_freq" not in verbose
    assert capsys.readouterr().out == ""
    assert logged.count("=== ") == 2


def test_another_rank_logs_its_own_host_and_device(config, tmp_path, capsys):
    """And prints nothing."""
    logged = started(config, tmp_path, process=ProcessInfo(3, 8, torch.device("cpu")))

    assert ", rank 3 of 8: " in logged.splitlines()[0]
    assert [line.split()[0] for line in logged.splitlines()[1:]] == ["titan_cpt", "host", "device"]
    assert capsys.readouterr().out == ""


def test_a_build_for_cuda_without_a_driver_says_so(config, tmp_path, monkeypatch):
    """One note; none if the CPU was chosen with CUDA_VISIBLE_DEVICES, or if torch is built for CPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(startup, "NVIDIA_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", None)
    without_cuda = list(device_notes(config, CPU.device))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    (note,) = device_notes(config, CPU.device)
    (tmp_path / "version").write_text("570.1")
    (with_driver,) = device_notes(config, CPU.device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    assert without_cuda == list(device_notes(config, CPU.device)) == []
    assert "is built for CUDA 12.8, but this machine has no NVIDIA driver, so the CPU trains" in note
    assert "titan-cpt --version" in with_driver


def test_the_line_of_a_rank_names_host_device_and_memory():
    """One line in a single process."""
    (line,) = rank_lines(CPU)

    assert line.startswith(f"rank 0: {socket.gethostname()}, process ")
    assert line.endswith("GiB in use")
