"""An opened checkpoint as a model of lm-evaluation-harness, which asks the questions and judges the answers; its tasks.

Where it differs from the harness's own `hf` model on an export of the same weights: log-probabilities are float32
whatever the weights are; the name of a special token inside a text is text; the begin-of-document token stands before a
context if training documents began with it, and only then; and with a `max_length` below 512, texts are by default at
most half of it long.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from titan_cpt.common.numbers import evenly_spaced
from titan_cpt.common.text import did_you_mean
from titan_cpt.config.suites import FETCHED, Task
from titan_cpt.errors import ConfigError, DataError
from titan_cpt.evaluation.generate import Sampling, generate
from titan_cpt.evaluation.inference import LoadedModel, score

LONGEST_TEXT = 256
"""Tokens generated for a task that does not say how many; the harness's own default."""
_HARNESS_TASKS, _BENCH_DIR = "LM_EVAL_TASKS", "BENCH_DIR"
HUB_TIMEOUT_S = 10.0
_BOOTSTRAPS = 1000
_SEED = 1234
"""Of the choice of worked examples; the harness's own."""


class CheckpointLM(TemplateLM):
    """What the harness asks a model for. Every rank is asked everything and gets every answer; the work is shared."""

    def __init__(self, opened: LoadedModel) -> None:
        super().__init__()
        self.opened, self.words = opened, opened.tokenizer
        lengths = self.words.token_byte_lengths()
        self._text_ids = frozenset(number for number in range(self.words.vocab_size) if lengths[number])
        self._encoded: tuple[str, list[int]] = ("", [])

    @property
    def eot_token_id(self) -> int:
        """The end-of-document id."""
        return self.words.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the begin-of-document id, else the end-of-document id."""
        return self.eot_token_id if self.words.bos_id is None else self.words.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model is given at most."""
        return self.opened.max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens that are generated where a task does not say."""
        return min(LONGEST_TEXT, max(1, self.max_length // 2))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, behind the begin-of-document id where training had it.

        The last answer is kept: the choices of one question share their context.

        Args:
            add_special_tokens: False leaves the begin-of-document id out.
        """
        if self._encoded[0] != string:
            self._encoded = (string, self.words.encode(string))
        bos = None if add_special_tokens is False else self.words.bos_id
        return [*([] if bos is None else [bos]), *self._encoded[1]]

    def tok_decode(self, tokens: list[int]) -> str:
        """The text of ids, without special tokens and without rows that only fill the vocabulary up."""
        return self.words.decode([token for token in tokens if token in self._text_ids])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See TemplateLM: (nats, greedy) of a continuation after a context, for each request."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return score(self.opened, [(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Nats of whole texts: each token once, with as much before it as the model is given."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        nats = [0.0] * len(requests)
        for owner, (part, _greedy) in zip(owners, score(self.opened, pairs), strict=True):
            nats[owner] += part
        return nats

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Texts up to the first of a request's stop strings, which is left out.

        Raises:
            DataError: a task asks for more tokens than the model is given, or for a way of sampling that is not here.
        """
        texts = [""] * len(requests)
        numbered = sorted(enumerate(requests), key=lambda pair: repr(pair[1].args[1]))
        for _, group in groupby(numbered, key=lambda pair: repr(pair[1].args[1])):
            same = list(group)
            asked = dict(normalize_gen_kwargs(same[0][1].args[1], self.max_gen_toks))
            stops = [text for text in asked.pop("until") if text]
            continuations = generate(
                self.opened,
                [self.tok_encode(request.args[0]) or [self.prefix_token_id] for _, request in same],
                max_new_tokens=asked.pop("max_gen_toks"),
                sampling=_sampling(asked),
                stop=lambda tokens, stops=stops: any(text in self.tok_decode(tokens) for text in stops),  # type: ignore[misc]
            )
            for (number, _), tokens in zip(same, continuations, strict=True):
                texts[number] = _cut(self.tok_decode(tokens), stops)
        return texts


def _sampling(asked: Mapping[str, Any]) -> Sampling:
    """How a task wants its tokens chosen."""
    drawn = bool(asked.get("do_sample"))
    foreign = {key: value for key, value in asked.items() if key not in ("do_sample", "temperature", "top_p")}
    if foreign:
        raise DataError(f"a task asks for generation with {foreign}; known are do_sample, temperature, top_p")
    return Sampling(float(asked.get("temperature") or 0.0), float(asked.get("top_p", 1.0))) if drawn else Sampling()


def _cut(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


@dataclass(frozen=True)
class Answers:
    """How a task went.

    Attributes:
        shots: worked examples that were given.
        metrics: name to (value, standard error); one of a second filter is called METRIC@FILTER.
        documents: digest of the samples and their prompts, in order.
        per_sample: metric to the samples' values, for metrics that are their mean.
    """

    shots: int
    metrics: dict[str, tuple[float, float | None]]
    samples: int
    documents: str
    per_sample: dict[str, list[float]]


class Tasks:
    """The harness's tasks, and those of a folder besides.

    In the YAML files of that folder LM_EVAL_TASKS stands for the harness's own folder of tasks, and BENCH_DIR for the
    folder above the one with the YAML files.

    Args:
        wanted: tasks; if the folder has all of them, the harness's thousands of others are not looked through.

    Raises:
        DataError: the folder holds no YAML file.
    """

    def __init__(self, folder: Path | None, wanted: Iterable[Task] = ()) -> None:
        written = Path(tempfile.mkdtemp(prefix="titan-cpt-tasks-"))
        weakref.finalize(self, shutil.rmtree, written, ignore_errors=True)
        paths: list[str | Path] = []
        local = True  # no dataset of these tasks is on the hub
        if folder is not None:
            files = sorted(folder.glob("**/*.yaml"))
            if not files:
                raise DataError(
                    f"{folder}: holds no YAML file of a task; scripts/fetch_benchmarks.py makes such a folder"
                )
            ours = str(Path(lm_eval.__file__).parent / "tasks")
            for number, file in enumerate(files):
                text = file.read_text(encoding="utf-8")
                local = local and "data_files" in text
                if _HARNESS_TASKS in text or _BENCH_DIR in text:
                    text = text.replace(_HARNESS_TASKS, ours).replace(_BENCH_DIR, str(folder.resolve().parent))
                    (written / f"{number}-{file.name}").write_text(text, encoding="utf-8")
            paths = [folder, written]
        names = {task.name for task in wanted}
        self._folder, self._is_local = folder, local
        with quiet():
            self._manager = TaskManager(include_path=paths, include_defaults=False)
            if not names or not names - FETCHED <= set(self._manager.all_subtasks):
                self._manager, self._is_local = TaskManager(include_path=paths), False

    def require(self, task: Task) -> None:
        """Find out that there is such a task.

        Raises:
            ConfigError: there is none, or the name is a tag, which has no score of its own.
        """
        known = {*self._manager.all_subtasks, *self._manager.all_groups}
        if task.name in self._manager.all_tags and task.name not in known:
            raise ConfigError(f"task {task.name}: is a tag of several tasks; name them one by one")
        if task.name not in known:
            hint = did_you_mean(task.name, sorted(known), at_most=3)
            raise ConfigError(
                f"task {task.name}: is not in lm-evaluation-harness {lm_eval.__version__} or --tasks-dir{hint}"
            )

    def is_not_fetched(self, task: Task) -> bool:
        """Whether it is one of the tasks that scripts/fetch_benchmarks.py downloads, and is not in the folder."""
        return task.name in FETCHED and task.name not in self._manager.all_subtasks

    def load(self, task: Task) -> Any:
        """The task with its dataset, from the disk or the hub. A hub that does not answer is asked once in a process.

        Raises:
            DataError: the dataset cannot be loaded.
        """
        if self.is_not_fetched(task):
            raise DataError(not_fetched([task.name], self._folder))
        trouble = "" if self._is_local else hub_trouble()
        try:
            with quiet():
                loaded = self._manager.load([task.name])
        except Exception as error:  # whatever the hub, the network, or a task's own code raises
            reason = " ".join(str(error).split())[:300]
            why = f"{trouble}, and the cache (HF_HOME) does not hold it; " if trouble else ""
            why += f"{type(error).__name__}: {reason}"
            raise DataError(
                f"task {task.name}: its dataset could not be loaded: {why}. Load it once where there is a network and "
                "copy the cache (HF_HOME), or use --suite offline with scripts/fetch_benchmarks.py"
            ) from None
        for part in loaded["tasks"].values():
            own = part.get_config("num_fewshot")
            if own is None or (task.shots is not None and own != task.shots):
                part.set_config(key="num_fewshot", value=task.shots or 0)
            part.set_fewshot_seed(seed=_SEED)
        return loaded


def not_fetched(names: Sequence[str], folder: Path | None) -> str:
    """What to do about tasks that are not in the folder of tasks."""
    where = folder.parent if folder is not None else Path("data/bench")
    return (
        f"{', '.join(names)}: not fetched, not in {folder}: run `scripts/fetch_benchmarks.py {where}` again "
        "where there is a network (what is there is kept), or choose other tasks of the suite with --tasks"
    )


@cache
def hub_trouble() -> str:
    """Why the Hugging Face hub cannot be asked; "" where it answers.

    Its libraries would try each file of each dataset six times, half a minute in all. Where it does not answer, they
    are set to offline for this process, and take what is in the cache.
    """
    import datasets
    import huggingface_hub.constants as hub
    from huggingface_hub import get_session

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            trouble = f"{name} is set"
            break
    else:
        try:
            get_session().head(hub.ENDPOINT, timeout=HUB_TIMEOUT_S)
            return ""
        except Exception as error:  # of httpx, of a proxy, of the system: whatever it is, the hub did not answer
            trouble = f"{hub.ENDPOINT} does not answer ({type(error).__name__}: {error})"
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return trouble


def ask(model: CheckpointLM, loaded: Any, task: Task, limit: int | None) -> Answers:
    """Put a loaded task's questions to a model.

    Args:
        limit: only so many samples, of each part of a task that has several: evenly spread, since the first ones are
            often of one kind.
    """
    with quiet():
        few = (
            None
            if limit is None
            else {name: Places(evenly_spaced(len(part.eval_docs), limit)) for name, part in loaded["tasks"].items()}
        )
        found: Any = evaluate(model, loaded, samples=few, bootstrap_iters=_BOOTSTRAPS, log_samples=True)
    parts = sorted(found["samples"])
    metrics: dict[str, tuple[float, float | None]] = {}
    per_sample: dict[str, list[float]] = {}
    filters = {name: samples[0]["filter"] for name, samples in found["samples"].items()}
    for key, value in found["results"][task.name].items():
        metric, comma, applied = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if metric not in metrics else f"{metric}@{applied}"
        error = found["results"][task.name].get(f"{metric}_stderr,{applied}")
        metrics[name] = (float(value), float(error) if isinstance(error, int | float) else None)
        values = [
            sample.get(metric) for part in parts for sample in found["samples"][part] if sample["filter"] == applied
        ]
        numbers = [float(one) for one in values if isinstance(one, int | float)]
        if (
            numbers
            and len(numbers) == len(values)
            and math.isclose(math.fsum(numbers) / len(numbers), value, abs_tol=1e-9)
        ):
            per_sample[name] = numbers
    digest = sha256()
    first = [sample for part in parts for sample in found["samples"][part] if sample["filter"] == filters[part]]
    for sample in first:
        digest.update("".join(str(sample[key]) for key in ("doc_hash", "prompt_hash", "target_hash")).encode())
    shots = {int(found["n-shot"][part]) for part in parts}
    return Answers(max(shots), metrics, len(first), digest.hexdigest(), per_sample)


class Places(list[int]):
    """Places of samples, in order; the harness asks of every sample there is whether it is among them."""

    def __init__(self, places: Iterable[int]) -> None:
        super().__init__(places)
        self._known = frozenset(self)

    def __contains__(self, place: object) -> bool:
        """Without a search."""
        return place in self._known


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness's progress bars and remarks are kept from the screen; its errors are not."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
