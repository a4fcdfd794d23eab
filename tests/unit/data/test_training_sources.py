"""From a config with packing to the batches of its stages: plan, loader, ranks, hashes."""

import numpy as np
import training

from titan_cpt.data.inventory import open_sources, take_inventory, training_files
from titan_cpt.data.loader import SequenceReader, StageLoader
from titan_cpt.data.mixture import Draw, leaves
from titan_cpt.data.training_sources import open_training_sources
from titan_cpt.planning.planner import make_plan

pytestmark = training.THEIR_WARNINGS_IGNORED
EOD = training.END_OF_DOCUMENT


def config_with(tmp_path, packed=("en", "de"), **tables):
    """Two stages on made-up languages of documents of 30 to 90 tokens; those of `packed` are packed at 64 tokens."""
    raw = training.changed(training.two_stages(training.write_languages(tmp_path), tmp_path), **tables)
    raw["storage"] = {"cache_dir": str(tmp_path / "cache")}
    raw["training"]["seq_len"] = 64
    for name in packed:
        raw["datasets"][name]["packing"] = "best_fit"
    return training.config_of(raw)


def sources_of(config):
    return open_training_sources(config, vocab_size=257, eod_id=EOD, log=lambda line: None)


def reader_of(config, stage, sources=None):
    own = {leaf.source: (sources or sources_of(config))[leaf.source] for leaf in leaves(stage.tree)}
    return SequenceReader(own, seq_len=stage.seq_len, seed=config.job.seed)


def batches(config, plan, stage, *, ranks=1, first_step=0, workers=0):
    """[step][rank] -> the batch of all micro-batches, as (inputs, targets)."""
    reader = reader_of(config, stage)
    loaders = [
        StageLoader(
            reader,
            lambda step: plan.batch(stage, step),
            steps=stage.steps,
            first_step=first_step,
            batch_sizes=stage.batch_sizes,
            local_batch=2,
            rank=rank,
            ranks=ranks,
            workers=workers,
        )
        for rank in range(ranks)
    ]
    found = []
    for step in range(first_step, stage.steps):
        micro = [loader.batch(step, number) for loader in loaders for number in range(4 // (2 * ranks))]
        found.append(
            (np.concatenate([each.inputs_BL for each in micro]), np.concatenate([each.targets_BL for each in micro]))
        )
    return found


def test_an_epoch_has_every_token_once_as_an_input(tmp_path):
    """In the order of the permutation, which is another one in the next epoch."""
    config = config_with(tmp_path)
    source = sources_of(config)["en"]
    plan = make_plan(config, take_inventory(config))
    reader = reader_of(config, plan.stages[0])
    count = plan.sequences["en", 64]
    epochs = [reader.windows([Draw("en", e * count + k, False) for k in range(count)]).tolist() for e in range(2)]
    rows = reader.read([Draw("en", ordinal, False) for ordinal in range(count)])
    text = open_sources(training_files(config), 257)["en"].read(0, source.tokens)
    inputs = rows.tokens[:, :-1]

    assert count == source.windows(64) == plan.packing["en", 64].sequences
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 2
    assert epochs[0] != epochs[1]
    assert np.bincount(inputs.ravel()).tolist()[:EOD] == np.bincount(text).tolist()[:EOD]
    assert np.count_nonzero(rows.targets == EOD) == np.count_nonzero(text == EOD), "each end is predicted once"


def test_other_world_sizes_workers_and_first_steps_have_the_same_batches(tmp_path):
    config = config_with(tmp_path)
    plan = make_plan(config, take_inventory(config))
    for stage in plan.stages:
        expected = batches(config, plan, stage)
        for found, begin in (
            (batches(config, plan, stage, ranks=2), 0),
            (batches(config, plan, stage, first_step=3), 3),
            (batches(config, plan, stage, workers=1), 0),
        ):
            assert all(np.array_equal(a, b) for one, other in zip(found, expected[begin:], strict=True)
                       for a, b in zip(one, other, strict=True))  # fmt: skip


def test_target_tokens_are_those_of_the_batch(tmp_path):
    """Also where a stage mixes packed and other sequences: German new, English as replay."""
    config = config_with(tmp_path, packed=("en",))
    plan = make_plan(config, take_inventory(config))
    for stage in plan.stages:
        reader = reader_of(config, stage)
        counted = [reader.target_tokens(plan.batch(stage, step)) for step in range(stage.steps)]
        assert counted == [int((targets >= 0).sum()) for _, targets in batches(config, plan, stage)]
        assert min(counted) < 4 * 64
    plain = config_with(tmp_path, packed=())
    plain_plan = make_plan(plain, take_inventory(plain))
    stage = plain_plan.stages[0]
    assert reader_of(plain, stage).target_tokens(plain_plan.batch(stage, 0)) == 4 * 64


def test_packing_changes_the_recipe_and_concat_does_not(tmp_path):
    """A run that began with one does not resume with the other; configs without the key keep their fingerprint."""
    plans = [
        make_plan(config, take_inventory(config))
        for config in (config_with(tmp_path, packed=packed) for packed in ((), ("en",)))
    ]
    written = training.changed(
        training.two_stages(tmp_path, tmp_path),
        datasets={"en": {"packing": "concat"}},
        training={"seq_len": 64},
    )
    written["datasets"]["en"] |= {"train": str(tmp_path / "en"), "validation": str(tmp_path / "en-validation")}
    explicit = training.config_of(written)

    assert [plan.stages[0].recipe.get("packing.en") for plan in plans] == [None, "best_fit"]
    assert make_plan(explicit, take_inventory(explicit)).fingerprint == plans[0].fingerprint != plans[1].fingerprint
    assert (
        sources_of(config_with(tmp_path))["en"].fingerprint()
        != open_sources(training_files(explicit), 257)["en"].fingerprint()
    )


def test_a_domain_can_be_packed(tmp_path):
    training.write_languages(tmp_path)
    raw = training.two_stages(tmp_path, tmp_path)
    raw["datasets"]["en"] = {
        "domains": {
            "web": {"train": str(tmp_path / "en"), "weight": 1.0, "packing": "best_fit"},
            "books": {"train": str(tmp_path / "de"), "weight": 2.0},
        }
    }
    raw["storage"] = {"cache_dir": str(tmp_path / "cache")}
    config = training.config_of(raw)
    plan = make_plan(config, take_inventory(config))

    assert set(plan.packing) == {("en.web", 16)}
    assert {key: value for key, value in plan.stages[0].recipe.items() if key.startswith("packing")} == {
        "packing.en.web": "best_fit"
    }
    assert reader_of(config, plan.stages[0]).packs


def in_two_lengths(tmp_path, **tables):
    """English at 64 tokens; German at 96, with English as replay, which is pieces of the trained sequences."""
    config = config_with(tmp_path, **tables)
    second = config.stages[1].model_copy(update={"seq_len": 96})
    config = config.model_copy(update={"stages": (config.stages[0], second)})
    return config, make_plan(config, take_inventory(config))


def test_every_length_of_the_stages_is_counted_and_packed(tmp_path):
    config, plan = in_two_lengths(tmp_path)
    sources = sources_of(config)

    assert set(plan.packing) == {("en", 64), ("de", 96)}
    assert plan.sequences["de", 96] == plan.packing["de", 96].sequences == sources["de"].windows(96)
    assert len(list((tmp_path / "cache" / "packing").glob("*.pack"))) == 2


def test_replay_at_another_length_is_the_trained_text_with_its_borders_and_targets(tmp_path):
    """The rows of 96 positions are cut from the trained rows of 64, padding included, one after another."""
    config, plan = in_two_lengths(tmp_path)
    english, german = plan.stages
    source = sources_of(config)["en"]
    first = reader_of(config, english)
    trained = [draw for step in range(9) for draw in plan.batch(english, step)]  # until the annealing
    windows = [source.row(int(window), 64) for window in first.windows(trained)]
    inputs = np.concatenate([row.tokens[:-1] for row in windows])
    targets = np.concatenate([row.targets for row in windows])
    borders = {64 * k + start for k, row in enumerate(windows) for start in (0, *row.starts)}
    reader = reader_of(config, german)
    replayed = [draw for step in range(german.steps) for draw in plan.batch(german, step) if draw.replayed]
    rows = reader.read(replayed)

    assert len(replayed) == 10
    assert np.array_equal(rows.tokens[:, :-1].ravel(), inputs[: 10 * 96])
    assert np.array_equal(rows.targets.ravel(), targets[: 10 * 96])
    for number, starts in enumerate(rows.starts):
        assert set(starts) == {b - 96 * number for b in borders if 96 * number < b < 96 * (number + 1)}
    assert reader.target_tokens(replayed) == (rows.targets >= 0).sum()
