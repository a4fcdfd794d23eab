"""lm-evaluation-harness: a checkpoint gives the results of the harness's own `hf` model on the export of it."""

import socket
import time

import pytest
import small_checkpoints

from titan_cpt.checkpoint.hf_export import export
from titan_cpt.cli import main
from titan_cpt.config.suites import SUITES, Task

pytest.importorskip("lm_eval", reason="needs lm-eval, which the test extra brings")
pytest.importorskip("accelerate", reason="needs accelerate, which the test extra brings")

import datasets
from huggingface_hub import constants
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from titan_cpt.errors import ConfigError, DataError
from titan_cpt.evaluation import lm_eval_tasks
from titan_cpt.evaluation.evaluate import open_tasks
from titan_cpt.evaluation.lm_eval import run_task
from titan_cpt.evaluation.lm_eval_model import CheckpointLM
from titan_cpt.evaluation.lm_eval_tasks import TaskCatalog

CONTEXTS = ("The dog", "The dog ran over the", "", "a" * 100, "Ünïcode und ein Satz ", "x\ny ")
CONTINUATIONS = (" ran", " over the street because it was late", "b", "\n", " it.", "ü")


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def pair(request, tmp_path_factory):
    """(our model, the harness's `hf` model on the export) with the same float32 weights, for each family."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = small_checkpoints.imported(folder, request.param)
    export(checkpoint, folder / "exported", dtype="float32", tokenizer="bytes", log=lambda line: None)
    theirs = HFLM(pretrained=str(folder / "exported"), dtype="float32", batch_size=3, device="cpu")
    return CheckpointLM(small_checkpoints.load(checkpoint, batch_tokens=150)), theirs


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The task catalog with two small local tasks."""
    return TaskCatalog(
        small_checkpoints.write_tasks(tmp_path_factory.mktemp("tasks")), [Task("sums"), Task("sums_text")]
    )


@pytest.fixture(scope="module")
def all_tasks():
    """The task catalog with all tasks of the harness."""
    return TaskCatalog(None)


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)]


def test_loglikelihoods_equal_those_of_the_hf_model(pair):
    """Each of 36 requests within 1e-3, empty and truncated contexts among them, and the same ones are greedy."""
    ours, theirs = pair
    asked = requests("loglikelihood", [(context, text) for context in CONTEXTS for text in CONTINUATIONS])
    one, other = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)

    assert [nats for nats, _ in one] == pytest.approx([nats for nats, _ in other], abs=1e-3)
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    assert len({round(nats, 2) for nats, _ in one}) > 20


def test_rolling_loglikelihoods_equal_those_of_the_hf_model(pair):
    """Texts of one to four windows."""
    ours, theirs = pair
    asked = requests("loglikelihood_rolling", [("A short text.",), ("Long. " * 20,), ("Longer still. " * 15,)])
    one, other = ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked, disable_tqdm=True)

    assert one == pytest.approx(other, abs=1e-3)


def test_greedy_generations_equal_those_of_the_hf_model(pair):
    """Prompts of different lengths, one truncated, until a stop string or the longest length."""
    ours, theirs = pair
    ways = ({"until": ["e", "zz"], "max_gen_toks": 20}, {"until": [], "max_gen_toks": 9, "do_sample": False})
    asked = requests("generate_until", [(context or "?", way) for context in CONTEXTS for way in ways])
    one, other = ours.generate_until(asked), theirs.generate_until(asked, disable_tqdm=True)

    assert one == other
    assert len(set(one)) > 6


@pytest.mark.parametrize("task", [Task("sums", 0), Task("sums", 3), Task("sums_text", 1)], ids=str)
def test_task_results_equal_those_of_the_hf_model(pair, tasks, task):
    """Every metric, its error, and every sample; zero-shot and few-shot."""
    found = [run_task(model, tasks.load(task), task, 7) for model in pair]

    assert found[0] == found[1]
    assert found[0].samples == 7
    assert found[0].shots == task.shots


def test_an_unknown_task_is_refused_with_similar_names(all_tasks):
    """Before any model is loaded; a tag is not a task either."""
    with pytest.raises(ConfigError, match=r"did you mean .*hellaswag"):
        all_tasks.require(Task("hellaswagg"))
    with pytest.raises(ConfigError, match="tag of several tasks"):
        all_tasks.require(Task("ai2_arc"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that sets the hub's address, a folder with a task on that hub, and a server."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    lm_eval_tasks.hub_problem.cache_clear()
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = "task: far\ndataset_path: nobody/nothing-of-this-name\noutput_type: multiple_choice\nvalidation_split: a\n"
    (folder / "far.yaml").write_text(text + 'doc_to_text: "{{a}}"\ndoc_to_target: 0\ndoc_to_choice: ["x", "y"]\n')
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield lambda path="": monkeypatch.setattr(constants, "ENDPOINT", path or address_of(server)), folder, server
    lm_eval_tasks.hub_problem.cache_clear()


def address_of(server):
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_contacted_once(hub, monkeypatch):
    """It accepts a connection and sends nothing: one wait for two tasks, instead of half a minute for each."""
    choose, folder, server = hub
    choose()
    monkeypatch.setattr(lm_eval_tasks, "HUB_TIMEOUT_S", 0.3)
    tasks, began = TaskCatalog(folder, [Task("far")]), time.monotonic()
    for _ in range(2):
        with pytest.raises(DataError, match=r"task far: .*does not answer .*the cache \(HF_HOME\) does not hold it"):
            tasks.load(Task("far"))

    assert time.monotonic() - began < 5
    server.settimeout(0.1)
    server.accept()[0].close()
    with pytest.raises(TimeoutError):
        server.accept()


def test_a_hub_that_refuses_connections_is_reported_at_once(hub):
    """The message says where, why, and what to do instead."""
    choose, folder, server = hub
    choose(address_of(server))
    server.close()
    began = time.monotonic()
    with pytest.raises(DataError, match=r"does not answer .*use --suite offline with scripts/fetch_benchmarks.py"):
        TaskCatalog(folder, [Task("far")]).load(Task("far"))

    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_in_offline_mode_the_hub_is_not_contacted(hub, monkeypatch, name):
    """The message names the environment variable."""
    choose, folder, server = hub
    choose()
    monkeypatch.setenv(name, "1")
    with pytest.raises(DataError, match=f"{name} is set, and the cache"):
        TaskCatalog(folder, [Task("far")]).load(Task("far"))

    server.settimeout(0.1)
    with pytest.raises(TimeoutError):
        server.accept()


def test_missing_local_tasks_are_reported_with_the_download_script(tmp_path, capsys):
    """No folder, a missing one, one without any task of the suite; if only some are missing, the others are loaded."""
    whole = small_checkpoints.write_minimal_pairs(tmp_path)
    for words in ((), ("--tasks-dir", str(tmp_path / "nowhere"))):
        with pytest.raises(SystemExit) as left:
            main(["eval", str(tmp_path), "--suite", "minimal_pairs", *words])
        said = capsys.readouterr().err

        assert left.value.code == 2
        assert "run `scripts/fetch_benchmarks.py data/bench`" in said
    (whole / "clams_de_local.yaml").unlink()
    tasks = open_tasks(SUITES["minimal_pairs"], whole)
    with pytest.raises(DataError, match=r"clams_de_local: not fetched, .*scripts/fetch_benchmarks.py .*pairs` again"):
        tasks.load(Task("clams_de_local", 0, "acc"))
    assert tasks.load(Task("blimp_en_local", 0, "acc"))["tasks"]
    with pytest.raises(ConfigError, match=r"clams_de_local: not fetched.* or choose other tasks .* with --tasks"):
        open_tasks((Task("clams_de_local", 0, "acc"),), whole)


def test_a_dataset_that_cannot_be_loaded_is_reported(tmp_path):
    """The file of a local task is missing: one message with the task and the cause."""
    folder = small_checkpoints.write_tasks(tmp_path)
    (folder.parent / "sums.jsonl").unlink()

    with pytest.raises(DataError, match=r"task sums: .*sums.jsonl"):
        TaskCatalog(folder, [Task("sums")]).load(Task("sums"))


def test_an_unsupported_sampling_option_is_refused(pair):
    """A task with beam search does not get greedy text instead."""
    with pytest.raises(DataError, match="num_beams"):
        pair[0].generate_until(requests("generate_until", [("a", {"until": ["e"], "max_gen_toks": 3, "num_beams": 4})]))


def test_the_papers_suites_are_tasks_of_the_harness(all_tasks):
    """Every name exists."""
    for name in ("paper_english", "paper_german"):
        for task in SUITES[name]:
            all_tasks.require(task)


def test_the_suites_few_shot_count_overrides_the_tasks(tasks):
    """Without one, the task's own count is used."""
    asked, own = (
        tasks.load(task)["tasks"]["sums"].get_config("num_fewshot") for task in (Task("sums", 3), Task("sums"))
    )

    assert (asked, own) == (3, 0)
