"""The benchmark tasks of lm-evaluation-harness: which exist, and loading one with its dataset."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from titan_cpt.common.text import did_you_mean
from titan_cpt.config.suites import FETCHED, Task
from titan_cpt.errors import ConfigError, DataError

HUB_TIMEOUT_S = 10.0
_HARNESS_TASKS, _BENCH_DIR = "LM_EVAL_TASKS", "BENCH_DIR"
_FEW_SHOT_SEED = 1234  # selects the few-shot examples; the harness's own default


class TaskCatalog:
    """The tasks of lm-evaluation-harness, and those of a folder of YAML files.

    In these files LM_EVAL_TASKS is replaced with the harness's own folder of tasks, and BENCH_DIR with the parent of
    the folder.

    Args:
        folder: folder of YAML files; None for the harness's tasks only.
        wanted: the tasks that are needed; if the folder has all of them, the harness's thousands are not indexed.

    Raises:
        DataError: the folder holds no YAML file.
    """

    def __init__(self, folder: Path | None, wanted: Iterable[Task] = ()) -> None:
        written = Path(tempfile.mkdtemp(prefix="titan-cpt-tasks-"))
        weakref.finalize(self, shutil.rmtree, written, ignore_errors=True)
        paths: list[str | Path] = []
        local = True  # the datasets of these tasks are local files
        if folder is not None:
            files = sorted(folder.glob("**/*.yaml"))
            if not files:
                raise DataError(
                    f"{folder}: holds no YAML file of a task; scripts/fetch_benchmarks.py creates such a folder"
                )
            harness_tasks = str(Path(lm_eval.__file__).parent / "tasks")
            for number, file in enumerate(files):
                text = file.read_text(encoding="utf-8")
                local = local and "data_files" in text
                if _HARNESS_TASKS in text or _BENCH_DIR in text:
                    text = text.replace(_HARNESS_TASKS, harness_tasks).replace(_BENCH_DIR, str(folder.resolve().parent))
                    (written / f"{number}-{file.name}").write_text(text, encoding="utf-8")
            paths = [folder, written]
        names = {task.name for task in wanted}
        self._folder = folder
        self._is_local = local
        with without_harness_output():
            self._manager = TaskManager(include_path=paths, include_defaults=False)
            if not names or not names - FETCHED <= set(self._manager.all_subtasks):
                self._manager = TaskManager(include_path=paths)
                self._is_local = False

    def require(self, task: Task) -> None:
        """Check that a task exists.

        Raises:
            ConfigError: it does not, or the name is a tag of several tasks, which has no score of its own.
        """
        known = {*self._manager.all_subtasks, *self._manager.all_groups}
        if task.name in self._manager.all_tags and task.name not in known:
            raise ConfigError(f"task {task.name}: is a tag of several tasks; give the tasks one by one")
        if task.name not in known:
            hint = did_you_mean(task.name, sorted(known), at_most=3)
            raise ConfigError(
                f"task {task.name}: is not in lm-evaluation-harness {lm_eval.__version__} or --tasks-dir{hint}"
            )

    def is_not_fetched(self, task: Task) -> bool:
        """Whether scripts/fetch_benchmarks.py downloads this task, and it is not in the folder yet."""
        return task.name in FETCHED and task.name not in self._manager.all_subtasks

    def load(self, task: Task) -> Any:
        """The harness's task object with its dataset, from the disk or the hub, and the few-shot count of `task`.

        A hub that does not answer is contacted only once per process.

        Raises:
            DataError: the dataset cannot be loaded.
        """
        if self.is_not_fetched(task):
            raise DataError(not_fetched_message([task.name], self._folder))
        problem = "" if self._is_local else hub_problem()
        try:
            with without_harness_output():
                loaded = self._manager.load([task.name])
        except Exception as error:  # any exception of the hub, the network, or the task's own code
            reason = " ".join(str(error).split())[:300]
            why = f"{problem}, and the cache (HF_HOME) does not hold it; " if problem else ""
            why += f"{type(error).__name__}: {reason}"
            raise DataError(
                f"task {task.name}: its dataset could not be loaded: {why}. Load it once on a machine with network "
                "access and copy the cache (HF_HOME), or use --suite offline with scripts/fetch_benchmarks.py"
            ) from None
        for part in loaded["tasks"].values():
            own = part.get_config("num_fewshot")
            if own is None or (task.shots is not None and own != task.shots):
                part.set_config(key="num_fewshot", value=task.shots or 0)
            part.set_fewshot_seed(seed=_FEW_SHOT_SEED)
        return loaded


def not_fetched_message(names: Sequence[str], folder: Path | None) -> str:
    """Message: these tasks are not in the folder of tasks, and how to download them."""
    where = folder.parent if folder is not None else Path("data/bench")
    return (
        f"{', '.join(names)}: not fetched, not in {folder}: run `scripts/fetch_benchmarks.py {where}` again "
        "on a machine with network access (existing files are kept), or choose other tasks of the suite with --tasks"
    )


@cache
def hub_problem() -> str:
    """Why the Hugging Face hub is not available; "" if it answers.

    If it does not, its libraries are set to offline mode for this process, in which they use only their cache: they
    would otherwise retry each file of each dataset six times, for half a minute in total.
    """
    import datasets
    import huggingface_hub.constants as hub
    from huggingface_hub import get_session

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            problem = f"{name} is set"
            break
    else:
        try:
            get_session().head(hub.ENDPOINT, timeout=HUB_TIMEOUT_S)
            return ""
        except Exception as error:  # of httpx, of a proxy or of the system: in any case the hub did not answer
            problem = f"{hub.ENDPOINT} does not answer ({type(error).__name__}: {error})"
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return problem


@contextlib.contextmanager
def without_harness_output() -> Iterator[None]:
    """Suppress the harness's progress bars and messages below ERROR."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
