"""Continue prompts with checkpoints: print the texts, and store those of the example prompts for the run's report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.common import reading
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.run_folder import GENERATIONS_FILE
from titan_cpt.common.weights.named_weights import AVERAGE, NamedWeights
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import ConfigError
from titan_cpt.evaluation.checkpoint_paths import scores_folder, stage_ends
from titan_cpt.evaluation.generate import Sampling, generate
from titan_cpt.evaluation.inference import LoadedModel, open_checkpoint

EXAMPLES: tuple[str, ...] = (
    "Der Hund lief über die Straße, weil",
    "Am Morgen nach dem großen Sturm",
    "Um ein neues Dokument zu öffnen,",
    "Die Hauptstadt von Deutschland ist",
    "Früher glaubten viele Menschen, dass",
    "The dog ran across the street because",
    "On the morning after the great storm",
    "To open a new document,",
    "The capital of Germany is",
)


EXAMPLE_TOKENS = 48
EXAMPLE_SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=0)


def continue_prompts(
    paths: Sequence[Path],
    process: ProcessInfo,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    tokens: int,
    examples: bool,
    open_options: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    """Print each checkpoint's continuation of each prompt; collective.

    Args:
        paths: checkpoints, or runs, which stand for the checkpoints at the ends of their stages; with @average for
            their averages.
        prompts: beginnings of texts.
        sampling: temperature, nucleus (top-p) and seed.
        tokens: longest continuation in tokens.
        examples: also continue the example prompts, with fixed sampling parameters, and store the texts.
        open_options: keyword arguments of `open_checkpoint`.
        log: called on rank 0 with each line to print.

    Raises:
        CheckpointError: a folder is neither a checkpoint nor a run.
        ConfigError: a prompt is empty.
    """
    if not all(prompts):
        raise ConfigError("command line: --prompt is empty; give the beginning of a text")
    for checkpoint in [checkpoint for path in paths for checkpoint in stage_ends(path)]:
        loaded = open_checkpoint(checkpoint, process, **open_options)
        texts = []
        if prompts:  # without any, `tokens` is a default that a small model may have no room for
            texts = list(zip(prompts, generate_texts(loaded, prompts, tokens, sampling), strict=True))
        if examples:
            texts += [(text["prompt"], text["continuation"]) for text in save_example_generations(loaded)]
        if process.rank == 0:
            log(f"{checkpoint}")
            for prompt, text in texts:
                log(f"  {prompt} |{text}")


def generate_texts(loaded: LoadedModel, prompts: Sequence[str], tokens: int, sampling: Sampling) -> list[str]:
    """A continuation of each prompt, as text; collective."""
    tokenizer = loaded.tokenizer
    ids = generate(
        loaded, [tokenizer.encode_prompt(text) for text in prompts], max_new_tokens=tokens, sampling=sampling
    )
    # Ids beyond the tokenizer's are padding of the model's vocabulary and have no text.
    return [tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size]) for tokens in ids]


def has_example_generations(weights: NamedWeights, record: Mapping[str, Any]) -> bool:
    """Whether continuations of the example prompts by these weights are stored."""
    try:
        stored = json.loads(reading.read_text(scores_folder(weights, record) / GENERATIONS_FILE))
    except (FileNotFoundError, ValueError):  # none yet, or damaged: they are generated again
        return False
    return isinstance(stored, dict) and stored.get("files") == manifest.digest_of_files(record)


def save_example_generations(loaded: LoadedModel) -> list[dict[str, str]]:
    """Continue the example prompts, store the texts beside the checkpoint's scores, and return them; collective."""
    texts = generate_texts(loaded, EXAMPLES, min(EXAMPLE_TOKENS, loaded.max_length // 2), EXAMPLE_SAMPLING)
    pairs = [{"prompt": prompt, "continuation": text} for prompt, text in zip(EXAMPLES, texts, strict=True)]
    if loaded.process.rank == 0:
        record = loaded.record
        folder = scores_folder(loaded.weights, record)
        folder.mkdir(parents=True, exist_ok=True)
        position = {key: record[key] for key in ("stage", "stage_index", "steps_done")}
        stored = {
            **position,
            **({"weights": AVERAGE} if loaded.average else {}),
            "files": manifest.digest_of_files(record),
            "sampling": asdict(EXAMPLE_SAMPLING),
            "texts": pairs,
        }
        write_text_atomically(folder / GENERATIONS_FILE, json.dumps(stored, indent=1, ensure_ascii=False))
    return pairs
