"""Small checkpoints and local tasks for the tests of evaluation: models whose logits are far from uniform."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from titan_cpt.checkpoint.hf_import import import_released
from titan_cpt.distributed.process_group import init_process_group
from titan_cpt.evaluation.inference import LoadedModel, open_checkpoint
from titan_cpt.models.build import build_model
from titan_cpt.models.huggingface_config import config_from_spec
from titan_cpt.models.huggingface_weights import to_huggingface
from titan_cpt.models.registry import named_size

SPECS = {
    "gpt_neox": named_size("gpt_neox", "debug", 257, overrides={"vocab_size": 300}),
    "llama": named_size("llama", "debug", 257, overrides={"vocab_size": 300, "kv_heads": 1}),
    "window": named_size("llama", "debug", 257, overrides={"vocab_size": 300, "sliding_window": 7}),
    "olmo": named_size("olmo", "debug", 257, overrides={"vocab_size": 300, "sliding_window": 7, "global_interval": 2}),
    "smollm3": named_size("smollm3", "debug", 257, overrides={"layers": 2, "nope_interval": 2, "vocab_size": 300}),
    "gemma3": named_size(
        "gemma3", "debug", 257, overrides={"layers": 2, "global_interval": 2, "sliding_window": 7, "vocab_size": 300}
    ),
}
POSITIONS = 64


def imported(folder: Path, name: str) -> Path:
    """Write a Hugging Face model with uneven logits to `folder`/released and import it; returns the checkpoint."""
    spec = SPECS[name]
    model = build_model(spec)
    model.init_weights(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 4
    released = folder / "released"
    released.mkdir(parents=True)
    (released / "config.json").write_text(json.dumps(config_from_spec(spec, max_positions=POSITIONS, dtype="float32")))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(released))
    state = {
        key.replace("embed_out", "lm_head"): tensor for key, tensor in to_huggingface(model.state_dict(), spec).items()
    }
    theirs.load_state_dict(state, strict=False)
    theirs.save_pretrained(released)
    import_released(str(released), folder / "imported", log=lambda line: None)
    return folder / "imported"


def load(checkpoint: Path, **how: object) -> LoadedModel:
    """Load a checkpoint in this process, with the byte tokenizer."""
    return open_checkpoint(checkpoint, init_process_group(), tokenizer="bytes", **how)  # type: ignore[arg-type]


QUESTIONS = [
    {"question": f"{a} and {b} make", "choices": [str(a + b), str(a - b), "a lot of it"], "answer": (a * b) % 3}
    for a in range(1, 6)
    for b in range(1, 5)
]


def write_tasks(folder: Path) -> Path:
    """Two tasks on one local file, multiple choice and text generation; returns the folder of their YAML files."""
    tasks = folder / "bench" / "tasks"
    tasks.mkdir(parents=True)
    (tasks.parent / "sums.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    head = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: BENCH_DIR/sums.jsonl\n"
        'validation_split: validation\nfewshot_split: validation\ndoc_to_text: "{{question}}"\n'
    )
    (tasks / "sums.yaml").write_text(
        f'task: sums\n{head}output_type: multiple_choice\ndoc_to_target: answer\ndoc_to_choice: "{{{{choices}}}}"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\nmetadata:\n  version: 1.0\n"
    )
    (tasks / "sums_text.yaml").write_text(
        f'task: sums_text\n{head}output_type: generate_until\ndoc_to_target: "{{{{choices[0]}}}}"\n'
        'generation_kwargs:\n  until: ["e", "\\n"]\n  do_sample: false\n  max_gen_toks: 12\n'
        "metric_list:\n  - metric: exact_match\nmetadata:\n  version: 1.0\n"
    )
    return tasks


def write_minimal_pairs(folder: Path) -> Path:
    """The three tasks of suite `minimal_pairs`, a few sentences each; returns the folder of their YAML files."""
    tasks = folder / "pairs" / "tasks"
    tasks.mkdir(parents=True)
    for number, name in enumerate(("clams_de", "clams_en", "blimp_en")):
        pairs = [
            {"good": f"{word} geht{number}", "bad": f"{word} gehen"} for word in ("er", "sie", "der Hund", "es", "a")
        ]
        (tasks.parent / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (tasks / f"{name}_local.yaml").write_text(
            f"task: {name}_local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    validation: BENCH_DIR/{name}.jsonl\noutput_type: multiple_choice\nvalidation_split: validation\n"
            'doc_to_text: ""\ndoc_to_target: 0\ndoc_to_choice: "{{[good, bad]}}"\nmetric_list:\n  - metric: acc\n'
        )
    return tasks
