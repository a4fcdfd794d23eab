"""The Python API: the same runs as the command line's, stepped through, stopped, resumed, twice in one process."""

import gc
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import training

import titan_cpt
from titan_cpt.common.signals import StopRequest

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def raw(tmp_path):
    """Two small stages."""
    return training.two_stages(training.write_languages(tmp_path), tmp_path)


def config(raw, name="run", **tables):
    return titan_cpt.load_config(training.changed(raw, job={"name": name}, **tables))


def lines(folder, *kinds):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] in kinds]


def numbers(folder):
    """What a run measured, without what depends on the clock."""
    keys = ("stage", "step", "dataset", "lr", "loss_nats_per_token", "grad_norm", "batch_hash")
    return [{key: line.get(key) for key in keys} for line in lines(folder, "train", "validation")]


def test_importing_the_package_imports_nothing_else():
    """Neither torch nor a module of our own; every public name is listed, and an unknown one is an AttributeError."""
    code = (
        "import sys; before = set(sys.modules); import titan_cpt\n"
        "print([name for name in set(sys.modules) - before if name.partition('.')[0] not in sys.stdlib_module_names])\n"
        "print(set(titan_cpt.__all__) <= set(dir(titan_cpt)))\n"
        "titan_cpt.load_config, titan_cpt.Trainer, titan_cpt.TitanError, titan_cpt.__version__\n"
        "print('torch' in sys.modules, hasattr(titan_cpt, 'nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["['titan_cpt']", "True", "False False"]


def test_a_config_is_read_from_a_file_or_from_tables_with_overrides_that_are_values(raw, tmp_path):
    """Both give the same config; the caller's tables do not change; problems are listed as on the command line."""
    path = training.write_config(raw, tmp_path / "run.toml")
    before = json.dumps(raw)
    overrides = {"stages.german.lr.max": 1e-3, "datasets.en.train": (str(tmp_path / "en"),), "job.output_dir": tmp_path}

    assert titan_cpt.load_config(str(path), overrides) == titan_cpt.load_config(raw, overrides)
    assert titan_cpt.load_config(raw, overrides).stages[1].lr.max == 1e-3
    assert json.dumps(raw) == before
    with pytest.raises(
        titan_cpt.TitanError, match=r"^config: 1 problem\n  - job.nmae: unknown key; did you mean 'name'"
    ):
        titan_cpt.load_config(raw, {"job.nmae": "x"})
    with pytest.raises(titan_cpt.TitanError, match=r"stages\.frensh\.steps: there is no stage 'frensh'"):
        titan_cpt.load_config(path, {"stages.frensh.steps": 3})


def test_the_plan_is_that_of_the_command_line(raw, tmp_path):
    """Steps, tokens and fingerprint, for the fewest ranks or the number given."""
    path = training.write_config(raw, tmp_path / "run.toml")
    command = [sys.executable, "-m", "titan_cpt", "plan", str(path), "--json"]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    plan = titan_cpt.make_plan(titan_cpt.load_config(path))

    assert (plan.fingerprint, plan.step_tokens) == (printed["fingerprint"], 64)
    assert [stage.steps for stage in plan.stages] == [12, 10]
    assert titan_cpt.make_plan(titan_cpt.load_config(path), world_size=2).parallel_dims.data_parallel == 2


def test_stepping_through_a_run_gives_the_numbers_of_the_command_line(raw, tmp_path):
    """To the last bit; a step is yielded before the validation and the checkpoint that are due after it."""
    outcome = training.train(training.write_config(training.changed(raw, job={"name": "whole"}), tmp_path / "w.toml"))
    seen = []
    with titan_cpt.Trainer(config(raw, "stepped")) as trainer:
        for step in trainer.steps():
            saved = trainer.folder / "english" / "step-00000012" / "manifest.json"
            seen.append((step.stage, step.step, step.run_step, step.tokens, step.lr, step.loss, step.grad_norm))
            assert (step.stage, step.step) != ("english", 12) or not saved.exists()
    keys = ("stage", "step", "run_step", "tokens", "lr", "loss_nats_per_token", "grad_norm")

    assert outcome.status == 0
    assert trainer.finished
    assert numbers(tmp_path / "stepped") == numbers(tmp_path / "whole")
    assert seen == [tuple(line[key] for key in keys) for line in lines(tmp_path / "whole", "train")]
    assert trainer.summary()["stages"][1]["is_done"]


@pytest.mark.parametrize("how", ["stop", "break", "other"])
def test_a_run_that_is_left_saves_that_step_and_another_trainer_resumes_it(raw, tmp_path, how):
    """By stop(), by leaving the loop and the block, or by taking the iterator up again; all in one process."""
    with titan_cpt.Trainer(config(raw, "whole")) as trainer:
        assert trainer.run()
    with titan_cpt.Trainer(config(raw, "left")) as trainer:
        for step in trainer.steps():
            if step.run_step == 7:
                if how == "stop":
                    trainer.stop()
                else:
                    break
        if how == "other":
            assert next(trainer.steps()).run_step == 8
    last = 8 if how == "other" else 7
    saved = tmp_path / "left" / "english" / f"step-0000000{last}"

    assert not trainer.finished
    assert (saved / "manifest.json").exists()
    assert lines(tmp_path / "left", "event")[-1]["signal"] == "Trainer.stop()"
    with titan_cpt.Trainer(config(raw, "left")) as trainer:
        assert next(trainer.steps()).run_step == last + 1
        assert trainer.run()
    assert numbers(tmp_path / "left") == numbers(tmp_path / "whole")


def test_an_exception_of_the_caller_passes_and_the_run_resumes_from_its_last_checkpoint(raw, tmp_path):
    """Nothing is saved on the way out; garbage collection, signals and the run's lock are as before."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]

    def fail_at_step_7():
        with titan_cpt.Trainer(config(raw)) as trainer:
            for step in trainer.steps():
                if step.run_step == 7:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_at_step_7()

    assert gc.isenabled()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    with titan_cpt.Trainer(config(raw)) as trainer:
        assert next(trainer.steps()).run_step == 5
    assert not torch.are_deterministic_algorithms_enabled()


def test_errors_are_exceptions_with_the_message_of_the_command_line(raw, tmp_path):
    """At opening: another process has the run, the data changed; and a Trainer that is not opened or opened twice."""
    trainer = titan_cpt.Trainer(config(raw))
    with pytest.raises(titan_cpt.TitanError, match="used in a `with` block"):
        trainer.run()
    with trainer:
        for _ in zip(range(3), trainer.steps(), strict=False):
            pass
        with (
            pytest.raises(titan_cpt.TitanError, match="this process is training here already"),
            titan_cpt.Trainer(config(raw)),
        ):
            pass
    with pytest.raises(titan_cpt.TitanError, match="was opened before"), trainer:
        pass
    shorter = config(raw, stages=[{**stage, "steps": 7} for stage in raw["stages"]])
    with pytest.raises(titan_cpt.TitanError, match=r"stages\.english\.steps: 12 -> 7"), titan_cpt.Trainer(shorter):
        pass
    with pytest.raises(titan_cpt.TitanError, match=r"^sweep: "):
        titan_cpt.Trainer(config(raw, sweep={"job.seed": [0, 1]}))
    with pytest.raises(titan_cpt.TitanError, match="dtype: must be one of 'float32', 'bfloat16', got 'float16'"):
        titan_cpt.export(tmp_path, tmp_path / "hf", dtype="float16")
    with pytest.raises(titan_cpt.TitanError, match=r"must be one of 'bfloat16', 'float32', got 'int8'"):
        titan_cpt.open_checkpoint(tmp_path, precision="int8")


def test_it_trains_in_a_thread_without_touching_signals(raw, tmp_path):
    """signal.signal is only allowed in the main thread."""
    finished = []

    def train():
        with titan_cpt.Trainer(config(raw)) as trainer:
            finished.append(trainer.run())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()

    assert finished == [True]


def test_it_uses_a_process_group_that_exists_and_leaves_it(raw, tmp_path):
    """The numbers are those of a run without a group."""
    with titan_cpt.Trainer(config(raw, "alone")) as trainer:
        trainer.run()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with titan_cpt.Trainer(config(raw, "grouped")) as trainer:
            assert trainer.run()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()

    assert numbers(tmp_path / "grouped") == numbers(tmp_path / "alone")


def test_a_second_ctrl_c_raises_keyboard_interrupt_in_a_library(raw):
    """The command line's ends the process instead."""
    with StopRequest(raises=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_checkpoint_is_opened_and_exported(raw, tmp_path):
    """The export's folder loads in transformers; the opened model computes the same logits."""
    transformers = pytest.importorskip("transformers")
    with titan_cpt.Trainer(config(raw)) as trainer:
        trainer.run()
    checkpoint = trainer.folder / "german" / "step-00000010"
    loaded = titan_cpt.open_checkpoint(str(checkpoint))
    folder = titan_cpt.export(checkpoint, tmp_path / "hf", dtype="float32")
    tokens = torch.arange(97, 117).unsqueeze(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)

    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert loaded.tokenizer.vocab_size == 257


def test_the_page_of_metrics_lists_every_kind_event_and_field_that_a_run_writes(raw, tmp_path):
    """A run that stops and resumes with changed settings and validation data; events of other code by their names."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    sections = {name: text.partition("\n## ")[0] for name, text in split_kinds(page).items()}
    with titan_cpt.Trainer(config(raw)) as trainer:
        for step in trainer.steps():
            if step.run_step == 14:
                trainer.stop()
    changed = {"datasets": {**raw["datasets"], "en": {**raw["datasets"]["en"], "validation": other(tmp_path)}}}
    with titan_cpt.Trainer(config(raw, checkpoint={"interval": 5}, **changed)) as trainer:
        trainer.run()
    undocumented = set()
    for line in lines(trainer.folder, *sections):
        kind = line.pop("kind")
        if kind == "event":
            row = next(text for text in sections["event"].splitlines() if text.startswith(f"| `{line['name']}`"))
            fields = set(line) - {"name", "time"}
            undocumented |= {(line["name"], key) for key in fields if f"`{key}`" not in row}
        else:
            undocumented |= {(kind, key) for key in line if f"| `{key}` |" not in sections[kind]}
    kinds = {line["kind"] for line in map(json.loads, (trainer.folder / "metrics.jsonl").read_text().splitlines())}

    assert undocumented == set()
    assert kinds <= set(sections)
    assert {"stop", "resume", "settings_changed", "validation_changed"} <= {
        line["name"] for line in lines(trainer.folder, "event")
    }


def other(tmp_path):
    return str(training.write_tokens(tmp_path / "other-validation", language=1, tokens=700, seed=9))


def split_kinds(page):
    """{kind: the text below its heading}."""
    parts = page.split('## kind = "')[1:]
    return {part.partition('"')[0]: part for part in parts}


def test_the_page_of_metrics_lists_every_event_in_the_code():
    """Every name that is passed to MetricsLog.event, or written by an upload, a branch or a sweep."""
    root = Path(titan_cpt.__file__).parent
    page = (root.parent / "docs" / "metrics.md").read_text()
    code = "\n".join(path.read_text() for path in root.rglob("*.py"))
    names = re.findall(r'(?:\.event|UploadMessage|self\._report)\(\s*"(\w+)"', code)
    names += re.findall(r'event=\{"name": "(\w+)"', code)

    assert len(names) >= 15
    assert {"upload", "upload_failed"} <= set(names)
    assert [name for name in names if f"| `{name}` |" not in page] == []
