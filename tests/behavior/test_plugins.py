"""A separate package adds a format, a family and a metric; a mistake in it is a message that names the package."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import plugin_package
import pytest
import tomli_w
import torch
import training

from titan_cpt import TitanError, load_config, make_plan, open_checkpoint
from titan_cpt.api import Trainer
from titan_cpt.checkpoint import manifest
from titan_cpt.common.numbers import evenly_spaced
from titan_cpt.config.toml_files import parse_toml
from titan_cpt.data.formats.indexed import TokenStream
from titan_cpt.reporting.summary import summarize

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The package of docs/library.md, installed with pip."""
    return plugin_package.install_example(tmp_path_factory.mktemp("plugin"))


@pytest.fixture
def example(installed, monkeypatch):
    """The package can be imported, and its entry points are seen."""
    monkeypatch.syspath_prepend(str(installed))
    yield installed
    for name in [name for name in sys.modules if name.partition(".")[0] == "titan_example"]:
        del sys.modules[name]


@pytest.fixture
def raw(tmp_path):
    """Two small stages."""
    return training.two_stages(training.write_languages(tmp_path), tmp_path)


def as_decimal(raw):
    """The same run, with its tokens as decimal numbers in text files."""
    datasets = {}
    for name, dataset in raw["datasets"].items():
        datasets[name] = {"format": "decimal", "format_options": {"separator": ","}}
        for key in ("train", "validation"):
            stream = TokenStream([Path(dataset[key])])
            path = Path(f"{dataset[key]}.txt")
            path.write_text(",".join(map(str, stream.read(0, stream.tokens))))
            datasets[name][key] = str(path)
    return training.changed(raw, datasets=datasets)


def trained(raw, **tables):
    """The folder of the run after training in this process."""
    with Trainer(load_config(training.changed(raw, **tables))) as trainer:
        assert trainer.run()
    return trainer.folder


def lines(folder, kind):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def losses(folder):
    return [line["loss_nats_per_token"] for kind in ("train", "validation") for line in lines(folder, kind)]


def test_the_pages_script_trains_with_the_pages_package_and_resumes(raw, installed, tmp_path):
    """In a process of its own: docs/library.md's script, tables and package as they stand there."""
    page = parse_toml(mine_tables())
    names = {"english": "en", "german": "de"}
    raw = as_decimal(raw)
    raw["datasets"] = {names_of(names, name): table for name, table in raw["datasets"].items()}
    for stage in raw["stages"]:
        stage["dataset"] = names_of(names, stage["dataset"])
    raw["model"] = page["model"]
    raw["validation"] |= page["validation"]
    for name, table in page["datasets"].items():
        for key in ("train", "validation"):
            (tmp_path / table[key]).write_bytes(Path(raw["datasets"][name][key]).read_bytes())
        raw["datasets"][name] = table
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(raw))
    (tmp_path / "train.py").write_text(plugin_package.blocks("python")["train.py"])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed), str(training.Path(__file__).parents[2])]),
    }
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "from-python"
    assert f"stopped early {folder}" in done.stdout
    assert [line["name"] for line in lines(folder, "event") if line["name"] in ("stop", "resume")] == ["stop", "resume"]
    assert lines(folder, "event")[0]["plugins"] == {
        "titan_cpt.families: power": "titan-example 1.2",
        "titan_cpt.formats: decimal": "titan-example 1.2",
        "titan_cpt.metrics: accuracy": "titan-example 1.2",
    }
    assert [line["run_step"] for line in lines(folder, "train")] == list(range(1, 23))


def mine_tables():
    """The tables of the page that select the plugins."""
    return plugin_package.PAGE.read_text().partition("# tables of mine.toml\n")[2].partition("```")[0]


def names_of(names, short):
    return next(name for name, one in names.items() if one == short)


def test_a_registered_format_gives_the_losses_of_the_same_tokens_in_a_pair(raw, example):
    """Every training and validation loss is the same to the last bit, and the recipe names the package."""
    pair = trained(raw, job={"name": "pair"})
    own = trained(as_decimal(raw), job={"name": "own"})
    recipe = manifest.read(next(own.glob("german/step-*")))["recipe"]

    assert losses(own) == losses(pair)
    assert [value for key, value in recipe.items() if key.endswith("format.de")] == ["decimal of titan-example 1.2"]


def test_a_metric_is_what_its_function_computes_and_changes_no_loss(raw, example):
    """Accuracy at a stage's end, from the saved checkpoint and the validation windows; summary.json has it."""
    plain = trained(raw, job={"name": "plain"})
    measured = trained(raw, job={"name": "measured"}, validation={"metrics": ["accuracy"]})
    stream = TokenStream([Path(raw["datasets"]["de"]["validation"])])
    chosen = evenly_spaced(stream.windows(16), 6)
    loaded = open_checkpoint(measured / "german" / "step-00000010")
    rows = torch.from_numpy(np.stack([stream.window(number, 16) for number in chosen]))
    right = (loaded.model(rows[:, :-1]).argmax(-1) == rows[:, 1:]).double().mean().item()
    last = summarize(measured)["stages"][1]["metrics"]["accuracy"]["de"]

    assert losses(measured) == losses(plain)
    assert last == pytest.approx(right)
    assert len(lines(measured, "metric")) == len(lines(measured, "validation"))


def test_a_metric_that_draws_random_numbers_trains_and_raises_leaves_training_as_it_was(raw, tmp_path, monkeypatch):
    """The failure is an event with its reason; losses and random states are those of a run without it."""
    plugin_package.register(tmp_path / "site", "bad-metric", "0.1", {"titan_cpt.metrics": {"bad": "bad_metric:bad"}})
    (tmp_path / "site" / "bad_metric.py").write_text(
        "import random, numpy, torch\n"
        "def bad(context):\n"
        "    random.random(), numpy.random.rand(), torch.rand(1)\n"
        "    assert not context.model.training and not torch.is_grad_enabled()\n"
        "    context.model.train()\n"
        "    if context.step: raise ValueError('no luck')\n"
        "    return {'infinite': float('inf')}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    states = []
    for name, metrics in {"plain": [], "bad": ["bad"]}.items():
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        trained(raw, job={"name": name}, validation={"metrics": metrics})
        states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))
    plain, bad = tmp_path / "plain", tmp_path / "bad"
    failed = [line for line in lines(bad, "event") if line["name"] == "metric_failed"]

    assert losses(bad) == losses(plain)
    assert {(line["metric"], line["step"] > 0, line["why"]) for line in failed} == {
        ("bad", False, "not finite: infinite"),
        ("bad", True, "ValueError: no luck"),
    }
    assert {line["value"] for line in lines(bad, "metric")} == {None}
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"model": {"family": "powr"}},
            "got 'powr'; did you mean 'power'",
        ),
        (
            {"model": {"family": "mamba"}},
            "registered are 'power' (titan-example 1.2) under titan_cpt.families",
        ),
        (
            {"validation": {"metrics": ["rouge"]}},
            "registered under titan_cpt.metrics, got 'rouge'; registered are 'accuracy' (titan-example 1.2)",
        ),
        (
            {"model": {"family": "power", "options": {"powr": 3}}},
            "model.powr: the family 'power' has no such hyperparameter; did you mean 'power'",
        ),
        ({"model": {"options": {"power": 3}}}, 'options are for registered families: "gpt_neox"'),
        ({"model": {"family": "power", "options": {"width": 3}}}, "options: width: set as a key of [model]"),
        ({"model": {"family": "power"}, "parallelism": {"tensor_parallel_degree": 2}}, "has no module parallelize"),
        (
            {"validation": {"metrics": ["accuracy"]}, "parallelism": {"pipeline_parallel_degree": 2}},
            "validation.metrics: not supported with parallelism.pipeline_parallel_degree > 1",
        ),
    ],
)
def test_a_mistake_is_named_before_training(raw, example, tables, message):
    """With what is registered, and by which package."""
    with pytest.raises(TitanError) as error:
        make_plan(load_config(training.changed(raw, **tables)))

    assert message in str(error.value)


def test_formats_that_are_unknown_broken_or_registered_twice_are_named_with_their_package(
    raw, example, tmp_path, monkeypatch
):
    """The message of a reader's exception, of a missing method, of a wrong id, of an import that fails."""
    site = tmp_path / "site"
    names = ("raises", "bare", "gone", "floats", "high")
    entries = {name: f"broken_formats:{name}" for name in names} | {"lost": "no_such_module:x", "decimal": "a:b"}
    plugin_package.register(site, "broken", "2.0", {"titan_cpt.formats": entries})
    (site / "broken_formats.py").write_text(
        "class Reader:\n"
        "    tokens = 4000\n"
        "    def __init__(self, value): self.value = value\n"
        "    def read(self, start, count): return [self.value] * count\n"
        "    def fingerprint(self): return str(self.value)\n"
        "def raises(entries): raise KeyError('ids')\n"
        "def bare(entries): return object()\n"
        "def gone(entries): raise FileNotFoundError\n"
        "def floats(entries): return Reader(0.5)\n"
        "def high(entries): return Reader(257)\n"
    )
    monkeypatch.syspath_prepend(str(site))

    def refused(name):
        tables = {"datasets": {"de": {"train": "somewhere", "format": name, "validation_format": "indexed"}}}
        tables["datasets"]["de"]["validation"] = raw["datasets"]["de"]["validation"]
        with pytest.raises(TitanError) as error:  # noqa: PT012  some of them only when data is read
            make_plan(load_config(training.changed(raw, **tables)))
            trained(raw, **tables)
        return str(error.value)

    assert "datasets.de.format: must be one of 'indexed', 'raw'" in refused("parquets")
    assert "format 'raises' of broken 2.0 failed: KeyError: 'ids'" in refused("raises")
    assert "returned a object without tokens, read, fingerprint: correct broken" in refused("bare")
    assert "somewhere: not found by format 'gone'" in refused("gone")
    assert "is float64 of shape (17,); allowed are 17 integers: correct broken" in refused("floats")
    assert "has id 257; allowed are ids from 0 to 256" in refused("high")
    assert "'lost' of broken 2.0 cannot be loaded from no_such_module:x: ModuleNotFoundError" in refused("lost")
    assert "both register 'decimal': uninstall one of them" in refused("decimal")


def test_a_family_without_sizes_or_memory_says_so_and_one_that_miscounts_is_refused(raw, tmp_path, monkeypatch):
    """The plan names missing hyperparameters; a spec that counts other parameters than the model has is an error."""
    site = plugin_package.register(tmp_path / "site", "bare", "1", {"titan_cpt.families": {"bare": "bare_family"}})
    (site / "bare_family").mkdir()
    (site / "bare_family" / "__init__.py").touch()
    (site / "bare_family" / "spec.py").write_text(
        "import dataclasses\n"
        "from titan_cpt.models.spec import ModelSpec\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Spec(ModelSpec):\n"
        "    rotary_fraction: float = 0.25\n"
        "    parallel_residual: bool = True\n"
        "    attention_width = property(lambda self: self.width)\n"
        "    head_width = property(lambda self: self.width // self.heads)\n"
        "    rotary_width = property(lambda self: 8)\n"
        "    def block_parameters(self): return ()\n"
        "    def final_norm_parameters(self): return ()\n"
        "SPEC = Spec\n"
    )
    (site / "bare_family" / "model.py").write_text("from titan_cpt.models.gpt_neox.model import GPTNeoX as MODEL\n")
    monkeypatch.syspath_prepend(str(site))
    sizes = {"layers": 1, "width": 32, "heads": 1, "mlp_width": 64}
    whole = training.changed(raw, model={"family": "bare", "size": "custom", **sizes})
    bare = training.changed(raw, model={"family": "bare", "size": "custom"})

    with pytest.raises(TitanError, match="width: is missing; size 'custom' does not set it"):
        make_plan(load_config(bare))
    assert any("does not define activation_bytes_per_token" in note for note in make_plan(load_config(whole)).notes)
    with pytest.raises(TitanError, match=r"the model of 'bare' has .* parameters, its spec counts 24,576"):
        trained(whole)


def test_a_checkpoint_of_a_family_that_is_no_longer_installed_names_its_package(raw, installed, monkeypatch):
    """So does an export of a family without the module huggingface."""
    from titan_cpt import export

    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(installed))
        folder = trained(raw, model={"family": "power", "options": {"power": 3}})
        with pytest.raises(TitanError, match="huggingface, which is needed for import"):
            export(folder / "german" / "step-00000010", folder / "hf")
    with pytest.raises(TitanError, match=r"'power' was registered by titan-example 1\.2, which is not installed"):
        open_checkpoint(folder / "german" / "step-00000010")
