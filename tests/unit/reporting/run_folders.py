"""Lines and plans of small run folders, with losses that can be checked by hand."""

import pytest

from titan_cpt.cli import main

STEP_TOKENS = 1000


def use(tokens, replayed=0, epochs=None):
    return {"tokens": tokens, "replayed_tokens": replayed, "epochs": epochs}


def stage(name, steps, new, union_steps, window=(), **datasets):
    return {
        "name": name,
        "steps": steps,
        "tokens": steps * STEP_TOKENS,
        "union_tokens": union_steps * STEP_TOKENS,
        "new_datasets": new,
        "datasets": datasets,
        "final_window": list(window),
    }


def measured(of, step, dataset, loss, forgetting=None):
    return {
        "kind": "validation",
        "stage": of,
        "step": step,
        "dataset": dataset,
        "loss_nats_per_token": loss,
        "bits_per_byte": loss / 2,
        "forgetting_nats_per_token": forgetting,
    }


def trained(of, step, run_step, lr):
    numbers = {"loss_nats_per_token": 3.0, "grad_norm": 1.0, "tokens_per_s": 500.0, "mfu": 0.5, "memory_gib": 0.25}
    place = {"stage": of, "step": step, "run_step": run_step, "tokens": run_step * STEP_TOKENS}
    return {"kind": "train", **place, "lr": lr, **numbers}


EN_DE = [
    measured("a", 0, "en", 8.0),
    measured("a", 0, "de", 8.5),
    measured("a", 10, "en", 4.0),
    measured("a", 10, "de", 7.0),
    measured("b", 0, "en", 4.0, 0.0),
    measured("b", 0, "de", 7.0),
    measured("b", 9, "en", 5.2, 1.2),
    measured("b", 9, "de", 3.4),
    measured("b", 10, "en", 5.0, 1.0),
    measured("b", 10, "de", 3.0),
]

AVERAGED = [  # EN_DE with an average of the weights in stage b
    *EN_DE,
    measured("b", 9, "en@average", 4.8, 0.8),
    measured("b", 9, "de@average", 3.0),
    measured("b", 10, "en@average", 4.6, 0.6),
    measured("b", 10, "de@average", 2.8),
]


def union_of(write_run):
    stages = [stage("all", 20, ["en", "de"], 20, en=use(10_000), de=use(10_000))]
    lines = [measured("all", 0, "en", 8.0), measured("all", 20, "en", 4.2), measured("all", 20, "de", 3.2)]
    return write_run("union", lines, stages)


def status_of(*words):
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    return leaving.value.code


def on(identity, lines):
    """The lines with that validation_id."""
    return [line | {"validation_id": identity} for line in lines]
