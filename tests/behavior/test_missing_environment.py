"""A missing package, a missing compiler, and a terminal that lacks characters: one message, or none is needed."""

import io
import sys
from dataclasses import dataclass

import faulty
import pytest
import torch
import training

from titan_cpt.distributed.compile import require_compiler
from titan_cpt.errors import ConfigError

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def raw(tmp_path):
    """Two steps."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["stages"] = [{**raw["stages"][0], "steps": 2, "lr": {"schedule": "constant", "max": 1e-3}}]
    return raw


@dataclass(frozen=True)
class Missing:
    """A package that is not installed."""

    package: str

    def lay(self):
        """For this process."""
        for name in [name for name in sys.modules if name.partition(".")[0] == self.package]:
            del sys.modules[name]
        sys.modules[self.package] = None


class Latin1:
    """A terminal that shows latin-1 and nothing else."""

    def lay(self):
        """As Python opens standard output under such a locale."""
        sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="latin-1", line_buffering=True)  # noqa: SIM115


@pytest.mark.parametrize(
    ("package", "tables", "install"),
    [
        ("torchao", {"float8": {"recipe_name": "tensorwise"}}, r"`./scripts/setup.sh float8` in a clone"),
        ("tensorboard", {"metrics": {"enable_tensorboard": True}}, r"`./scripts/setup.sh` in a clone"),
    ],
)
def test_a_missing_package_gives_one_message_and_no_traceback(raw, tmp_path, package, tables, install):
    """The package, and the commands that install it."""
    config = training.write_config(training.changed(raw, **tables), tmp_path / "c.toml")
    outcome = faulty.train(config, faults=[Missing(package)])

    assert outcome.status == 2, outcome.output
    assert "Traceback" not in outcome.output
    assert package in outcome.output.splitlines()[-1]
    assert install in outcome.output.splitlines()[-1]


def test_a_latin_1_terminal_does_not_end_a_run(raw, tmp_path):
    """Other characters are printed as "?", the LR curve in ASCII; a UnicodeEncodeError ended the run before its first
    step."""
    raw = training.changed(raw, job={"output_dir": str(tmp_path / "\u20ac")})
    outcome = faulty.train(training.write_config(raw, tmp_path / "c.toml"), faults=[Latin1()])

    assert outcome.status == 0, outcome.output
    assert "####" in outcome.output
    assert "??" not in outcome.output
    assert "/?/run" in outcome.output
    assert len(training.lines_of(tmp_path / "\u20ac" / "run", "train")) == 2


def test_a_missing_compiler_is_reported_before_the_first_step(monkeypatch, tmp_path):
    """On the CPU g++ or CXX; torch reports it at the end of a long traceback."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"compile\.enable: .*none of g\+\+ is installed: install one"):
        require_compiler(torch.device("cpu"))
    monkeypatch.setenv("CXX", "mine++")
    with pytest.raises(ConfigError, match=r"CXX=mine\+\+ does not exist"):
        require_compiler(torch.device("cpu"))
    (tmp_path / "mine++").write_text("#!/bin/sh\n")
    (tmp_path / "mine++").chmod(0o755)
    require_compiler(torch.device("cpu"))


def test_a_missing_compiler_for_triton_is_reported_before_the_first_step(monkeypatch, tmp_path):
    """Triton compiles a launcher for every kernel, with gcc, clang or CC; the message names the key that needs it."""
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"optimizer\.implementation: Triton .*none of gcc, clang is installed"):
        require_compiler(torch.device("cuda"), "optimizer.implementation")


def test_a_missing_module_of_titan_cpt_gives_a_traceback(raw, tmp_path):
    """It is a defect of the installation, not a mistake of the user."""
    config = training.write_config(raw, tmp_path / "c.toml")

    assert "Traceback" in faulty.train(config, faults=[MissingOfOurs()]).output


class MissingOfOurs:
    """A broken installation of titan_cpt."""

    def lay(self):
        """The module that `train` imports first."""
        sys.modules["titan_cpt.config.load"] = None
