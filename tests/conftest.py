"""What all tests share: no GPU, one torch thread, hypothesis without deadlines, and a config of one stage."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import hardware
import pytest
from hypothesis import Phase, settings

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.data.prepare import chunks
from titan_cpt.planning.planner import make_plan

hardware.prepare()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when a test imports it

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` ignores it, and so would what tests interrupt

settings.register_profile("titan_cpt", deadline=None, max_examples=60)
settings.register_profile("mutants", settings.get_profile("titan_cpt"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("titan_cpt")  # `--hypothesis-profile mutants` fails without looking for the smallest example


def pytest_unconfigure() -> None:
    """Remove what `hardware` made."""
    hardware.clean_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    why = "" if hardware.ON_GPU in os.environ else hardware.why_no_gpu()
    for item in items:
        if why and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Report a test marked `gpu` from the process that sees the GPUs."""
    if not item.get_closest_marker("gpu") or item.get_closest_marker("skip") or hardware.ON_GPU in os.environ:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in hardware.reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """In the process that sees the GPUs: hand the report to the process that was given the test."""
    report = yield
    if hardware.ON_GPU in os.environ:
        hardware.record(item.config, report)
    return report


@pytest.fixture
def cuda_device():
    """The first GPU, in tests marked `gpu`."""
    import torch

    if hardware.ON_GPU not in os.environ:
        pytest.fail("this test needs the mark gpu")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _has_its_device(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("cuda_device")


HEAD = """
[job]
name = "tested"

[model]
family = "gpt_neox"
size = "debug"

[datasets.pile]
train = "data/pile"
validation = "data/pile-validation"

[datasets.german]
train = "data/german"
validation = "data/german-validation"

[training]
global_batch_size = 20
local_batch_size = 2
seq_len = 16
"""

FIRST_STAGE = """
[[stages]]
name = "first"
dataset = "pile"
steps = 100
lr = { schedule = "cosine", max = 1e-3, min = 1e-4 }
"""

SECOND_STAGE = """
[[stages]]
name = "second"
dataset = "german"
steps = 50
lr = { schedule = "cosine", max = 1e-3, min = 1e-4 }
replay = { fraction = 0.25 }
"""


@pytest.fixture
def head() -> str:
    """A config's TOML but for its stages: two datasets, 20 sequences x 16 tokens a step."""
    return HEAD


@pytest.fixture
def one_stage() -> str:
    """The smallest config: one stage of 100 steps on `pile`."""
    return HEAD + FIRST_STAGE


@pytest.fixture
def two_stages() -> str:
    """`one_stage` and a second stage of 50 steps on `german` with 25 % replay."""
    return HEAD + FIRST_STAGE + SECOND_STAGE


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(text, name="config.toml") puts a file into the test's own folder and returns its path."""

    def write(text: str, name: str = "config.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def make(write):
    """make(text, *overrides, tokens={source: tokens}, world_size=1): the plan; data that is not named is not there."""

    def make(text, *overrides, tokens=None, world_size=1, vocab_size=257, base_vocab_size=None):
        config = load_config(write(text), overrides)
        absent = {
            source: None
            for name, dataset in config.datasets.items()
            for source in ([f"{name}.{domain}" for domain in dataset.domains] or [name])
        }
        inventory = DataInventory(absent | (tokens or {}), vocab_size, base_vocab_size=base_vocab_size)
        return make_plan(config, inventory, world_size)

    return make


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two kilobytes, so that small inputs have many."""
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK_BYTES", 2000)
    monkeypatch.setattr(chunks, "LARGEST_CHUNK_BYTES", 2000)
