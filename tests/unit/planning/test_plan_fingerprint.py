"""The recipe and its fingerprint: their keys, settings that change them, and settings that do not."""

import hashlib
import json

import pytest
from plans import INFINITE, datasets, drawn, stage

RECIPE = {  # of `one_stage`, written by hand
    "model.family": "gpt_neox",
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 2,
    "model.mlp_width": 256,
    "model.vocab_size": 384,
    "model.rotary_fraction": 0.25,
    "model.rope_base": 10_000.0,
    "model.norm_eps": 1e-5,
    "model.parallel_residual": True,
    "job.seed": 0,
    "training.global_batch_size": 20,
    "training.seq_len": 16,
    "training.max_norm": 1.0,
    "training.mixed_precision_param": "bfloat16",
    "stages": ["first"],
    "stages.first.steps": 100,
    "stages.first.dataset": {"pile": "1"},
    "stages.first.domain_weights": {},
    "stages.first.init": "random",
    "stages.first.optimizer_state": "reset",
    "stages.first.optimizer.beta1": 0.9,
    "stages.first.optimizer.beta2": 0.95,
    "stages.first.optimizer.eps": 1e-8,
    "stages.first.optimizer.weight_decay": 0.1,
    "stages.first.lr.schedule": "cosine",
    "stages.first.lr.max": 1e-3,
    "stages.first.lr.min": 1e-4,
    "stages.first.lr.warmup_until": "1",
    "stages.first.replay.fraction": 0.0,
    "stages.first.replay.from": [],
    "stages.first.replay.order": "as_trained",
}


def test_the_fingerprint_is_the_hash_of_the_recipe(one_stage, make):
    """Eight digits of SHA-256 over these keys: a renamed or new key would make every existing checkpoint unusable."""
    plan = make(one_stage)
    text = json.dumps(dict(sorted(RECIPE.items())))

    assert plan.recipe_until(0) == RECIPE
    assert plan.fingerprint == hashlib.sha256(text.encode()).hexdigest()[:8]


RICH = (
    stage("a", "pile", 100, INFINITE)
    + '\n[datasets.web.domains.one]\ntrain = "x"\nweight = 1\n[datasets.web.domains.two]\ntrain = "y"\nweight = 3\n'
    + stage(
        "b",
        "web",
        50,
        'schedule = "wsd", max = 1e-3, min = 1e-4, decay_from = 0.8, decay = "sqrt"',
        replay='{ fraction = 0.25, from = ["pile"] }',
    )
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("job.seed", "1"),
        ("model.layers", "3"),
        ("model.width", "128"),
        ("model.heads", "4"),
        ("model.mlp_width", "512"),
        ("model.vocab_size", "512"),
        ("model.rotary_fraction", "0.5"),
        ("model.rope_base", "50000"),
        ("model.norm_eps", "1e-6"),
        ("model.parallel_residual", "false"),
        ("training.global_batch_size", "40"),
        ("training.seq_len", "32"),
        ("training.max_norm", "2.0"),
        ("training.mixed_precision_param", "float32"),
        ("tokenizer.add_bos", "true"),
        ("optimizer.beta1", "0.8"),
        ("optimizer.eps", "1e-6"),
        ("stages.a.steps", "110"),
        ("stages.a.dataset", "german"),
        ("stages.a.name", "z"),
        ("stages.a.lr.max", "2e-3"),
        ("stages.a.lr.constant", "4e-4"),
        ("stages.a.lr.min", "2e-5"),
        ("stages.a.lr.warmup_until", "0.02"),
        ("stages.a.lr.cooldown_until", "0.5"),
        ("stages.a.lr.constant_until", "0.9"),
        ("stages.a.lr.schedule", "infinite_inv_sqrt"),
        ("stages.b.lr.decay_from", "0.9"),
        ("stages.b.lr.decay", "linear"),
        ("stages.b.init", "stage:a"),
        ("stages.b.optimizer_state", "keep"),
        ("stages.b.optimizer.beta2", "0.99"),
        ("stages.b.optimizer.weight_decay", "0"),
        ("stages.b.replay.fraction", "0.2"),
        ("stages.b.replay.from", "german"),
        ("stages.b.replay.order", "reshuffled"),
        ("stages.b.dataset", "{ web = 1, german = 1 }"),
        ("datasets.web.domains.one.weight", "2"),
    ],
)
def test_the_fingerprint_changes_with_every_setting_that_changes_the_weights(head, make, key, value):
    """Each one is overridden by itself."""
    assert make(head + RICH, (key, value)).fingerprint != make(head + RICH).fingerprint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("job.name", "other"),
        ("job.description", "words"),
        ("job.output_dir", "elsewhere"),
        ("datasets.pile.train", "elsewhere/pile"),
        ("datasets.pile.validation", "elsewhere"),
        ("datasets.web.domains.one.train", "elsewhere"),
        ("training.local_batch_size", "5"),
        ("training.num_workers", "2"),
        ("training.gc_freq", "7"),
        ("parallelism.data_parallel_shard_degree", "1"),
        ("checkpoint.interval", "7"),
        ("checkpoint.keep_latest_k", "7"),
        ("validation.interval", "7"),
        ("validation.final_window_steps", "7"),
        ("metrics.log_freq", "1"),
        ("stages.a.lr.warmup_until", "1"),
        ("stages.a.lr.cooldown_until", '"19_200"'),
        ("stages.a.lr.min", "1e-4"),
        ("stages.b.init", "stage:a@pre_anneal"),
        ("stages.b.replay.on_exhausted", "repeat"),
        ("stages.b.dataset", "{ web = 7 }"),
    ],
)
def test_the_fingerprint_ignores_settings_that_do_not_change_the_weights(head, make, key, value):
    """Parallelism, intervals, paths, names, and the same number in another notation."""
    plain, other = make(head + RICH), make(head + RICH, (key, value))

    assert other.fingerprint == plain.fingerprint
    assert drawn(other, "b") == drawn(plain, "b")


def test_float8_filter_fqns_are_part_of_the_recipe(head, make):
    """Float8 in a layer changes every loss; without a float8 recipe, and in another order, the key has no effect."""
    float8 = ("float8.recipe_name", "rowwise")
    of = [
        make(head + RICH, float8, ("float8.filter_fqns", names)).fingerprint
        for names in ("[]", '["up"]', '["up", "a"]', '["a", "up"]')
    ]
    without = make(head + RICH, ("float8.filter_fqns", '["up"]'))

    assert of[2] == of[3]
    assert len({*of}) == 3
    assert of[0] == make(head + RICH, float8).fingerprint
    assert without.fingerprint == make(head + RICH).fingerprint


def test_the_order_of_keys_changes_nothing(head, make):
    """Datasets, weights and tables in reverse order: the same fingerprint and the same draws."""
    one = (
        head
        + datasets("x", "y")
        + stage("a", "{ x = 1, y = 1, pile = 1 }", 10)
        + stage("b", "german", 10, replay="{ fraction = 0.5, from = { x = 1, y = 1 } }")
    )
    other = (
        head
        + datasets("y", "x")
        + stage("a", "{ pile = 1, y = 1, x = 1 }", 10)
        + stage("b", "german", 10, replay="{ from = { y = 1, x = 1 }, fraction = 0.5 }")
    )

    assert make(one).fingerprint == make(other).fingerprint
    assert drawn(make(one), "a") == drawn(make(other), "a")
    assert drawn(make(one), "b") == drawn(make(other), "b")


def test_an_appended_stage_does_not_change_the_earlier_stages(two_stages, make):
    """Their recipe_until is the same with and without a third stage, and so are their batches."""
    short = make(two_stages)
    long = make(two_stages + stage("third", "pile", 10))

    assert long.recipe_until(1) == short.recipe_until(1)
    assert long.recipe_until(0) == short.recipe_until(0)
    assert long.fingerprint != short.fingerprint
    assert drawn(long, "second") == drawn(short, "second")


# What is shown
