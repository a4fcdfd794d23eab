"""From draws to tokens: windows, epochs, the same global batch on any number of ranks, and replay."""

import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training

from titan_cpt.common.batch_sizes import BatchPhase, BatchSizes
from titan_cpt.data.formats.indexed import TokenStream
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.inventory import open_sources, take_inventory, training_files
from titan_cpt.data.loader import SequenceReader, StageLoader
from titan_cpt.data.mixture import Draw, draws
from titan_cpt.data.trained_text import TrainedPart
from titan_cpt.planning.planner import make_plan

pytestmark = training.THEIR_WARNINGS_IGNORED

SEQ_LEN, WINDOWS = 5, 37
# 4 more tokens than the last window needs, one too few for another window.
TOKENS = SEQ_LEN * WINDOWS + 1 + 4


@pytest.fixture
def counting(tmp_path):
    """Two sources in which every token is its own position, in documents of uneven length."""
    streams = {}
    for name in ("old", "new"):
        with IndexedWriter(tmp_path / name, 1000) as writer:
            writer.add_documents(np.arange(TOKENS), np.array([7, 60, 1, TOKENS - 68]))
        streams[name] = TokenStream([tmp_path / name], 1000)
    return SequenceReader(streams, seq_len=SEQ_LEN, seed=3)


@pytest.fixture
def planned(tmp_path):
    """A reader over made-up languages, and the plan of two stages on `world_size` ranks."""
    config = training.config_of(training.two_stages(training.write_languages(tmp_path), tmp_path))
    streams = open_sources(training_files(config), 257)

    def plan(world_size=1, local_batch=2):
        training_table = config.training.model_copy(update={"local_batch_size": local_batch})
        asked = config.model_copy(update={"training": training_table})
        return make_plan(asked, take_inventory(asked), world_size)

    return SequenceReader(streams, seq_len=config.training.seq_len, seed=config.job.seed), plan


def of(source, ordinals, *, replayed=False):
    return [Draw(source, ordinal, replayed) for ordinal in ordinals]


def loader_of(reader, plan, stage, *, rank=0, first_step=0, workers=0):
    return StageLoader(
        reader,
        lambda step: plan.batch(stage, step),
        steps=stage.steps,
        first_step=first_step,
        batch_sizes=stage.batch_sizes,
        local_batch=stage.local_batch_size,
        rank=rank,
        ranks=plan.data_parallel,
        workers=workers,
    )


def steps_of(loader, plan, steps):
    """The batches of a rank by step, its micro-batches concatenated, each [B, L + 1]."""
    batches = []
    for step in steps:
        parts = [loader.batch(step, micro) for micro in range(plan.gradient_accumulation_steps)]
        batches.append(torch.cat([torch.cat([part.inputs_BL, part.targets_BL[:, -1:]], dim=1) for part in parts]))
    return batches


def test_windows_have_seq_len_plus_one_tokens_and_share_one_with_the_next(counting):
    """Token i is the number i, so a window shows its position; the last four tokens belong to no window."""
    rows = counting.read(of("old", range(WINDOWS))).tokens
    rows = rows[rows[:, 0].argsort()]

    assert rows.shape == (37, 6)
    assert rows[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows[1].tolist() == [5, 6, 7, 8, 9, 10]
    assert rows[36].tolist() == [180, 181, 182, 183, 184, 185]


def test_an_epoch_reads_every_window_once_and_the_next_epoch_in_another_order(counting):
    """Three epochs of 37 windows, over two sources."""
    epochs = [counting.windows(of("old", range(e * WINDOWS, (e + 1) * WINDOWS))).tolist() for e in range(3)]
    other = counting.windows(of("new", range(WINDOWS))).tolist()

    assert [sorted(epoch) for epoch in [*epochs, other]] == [list(range(37))] * 4
    assert len({tuple(order) for order in [*epochs, other]}) == 4
    assert list(range(37)) not in epochs


def test_another_seed_gives_another_order(counting):
    """Only the seed differs."""
    other = SequenceReader(counting.sources, seq_len=SEQ_LEN, seed=4)
    draws = of("old", range(WINDOWS))

    assert counting.windows(draws).tolist() != other.windows(draws).tolist()


def test_a_batch_across_epochs_contains_the_windows_of_its_draws(counting):
    """Draws do not depend on the others in a batch: sources and epochs are mixed here."""
    draws = [*of("old", (36, 37, 38)), *of("new", (0, 74)), *of("old", (0,), replayed=True)]
    together = counting.read(draws).tokens
    alone = np.concatenate([counting.read([draw]).tokens for draw in draws])

    assert np.array_equal(together, alone)


@pytest.mark.parametrize(("world_size", "local_batch"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(planned, world_size, local_batch):
    """The rows of all ranks, in order, are those of one rank without gradient accumulation, in every stage."""
    reader, plan_for = planned
    alone, plan = plan_for(1, 4), plan_for(world_size, local_batch)
    for one, stage in zip(alone.stages, plan.stages, strict=True):
        expected = steps_of(loader_of(reader, alone, one), alone, range(4))
        ranks = [steps_of(loader_of(reader, plan, stage, rank=rank), plan, range(4)) for rank in range(world_size)]

        assert plan.gradient_accumulation_steps == 4 // (world_size * local_batch)
        assert all(torch.equal(torch.cat(parts), batch) for batch, *parts in zip(expected, *ranks, strict=True))


def test_targets_are_the_inputs_shifted_by_one_token(planned):
    """In every micro-batch of a stage."""
    reader, plan_for = planned
    plan = plan_for()
    loader = loader_of(reader, plan, plan.stages[1])
    batches = [loader.batch(step, micro) for step in range(10) for micro in range(2)]

    assert {tuple(batch.inputs_BL.shape) for batch in batches} == {(2, 16)}
    assert all(torch.equal(batch.inputs_BL[:, 1:], batch.targets_BL[:, :-1]) for batch in batches)


@pytest.mark.parametrize("taken_up", [1, 6, 9])
def test_a_loader_that_starts_at_any_step_gives_the_same_batches(planned, taken_up):
    """Replay and new data, to the end of the stage."""
    reader, plan_for = planned
    plan = plan_for()
    german = plan.stage("german")
    walked = steps_of(loader_of(reader, plan, german), plan, range(10))[taken_up:]
    jumped = steps_of(loader_of(reader, plan, german, first_step=taken_up), plan, range(taken_up, 10))

    assert all(torch.equal(a, b) for a, b in zip(walked, jumped, strict=True))


def test_loader_workers_give_the_same_batches(planned):
    """num_workers 1 and 0, from a step in the middle."""
    reader, plan_for = planned
    plan = plan_for()
    german = plan.stage("german")
    here = steps_of(loader_of(reader, plan, german, first_step=3), plan, range(3, 10))
    ahead = steps_of(loader_of(reader, plan, german, first_step=3, workers=1), plan, range(3, 10))

    assert all(torch.equal(a, b) for a, b in zip(here, ahead, strict=True))


def test_a_reader_can_be_pickled(counting):
    """Loader workers are forked on Linux and spawned elsewhere, which pickles the reader."""
    draws = of("old", range(5))
    counting.read(draws)
    other = pickle.loads(pickle.dumps(counting))

    assert np.array_equal(counting.read(draws).tokens, other.read(draws).tokens)


def test_batches_out_of_order_are_a_bug(planned):
    """The loader is an iterator: a request for another step must not return the next batch."""
    reader, plan_for = planned
    plan = plan_for()
    loader = loader_of(reader, plan, plan.stages[0])
    loader.batch(0, 0)

    with pytest.raises(AssertionError, match="in order"):
        loader.batch(1, 0)


def test_the_batch_hash_depends_on_every_window_its_source_and_the_order(counting):
    """Each of eight draws replaced in turn, a source changed, two draws exchanged."""
    draws = [*of("old", range(4)), *of("new", range(4))]
    others = [[*draws[:i], Draw(draws[i].source, 11, False), *draws[i + 1 :]] for i in range(8)]
    others += [[*draws[1:], draws[0]], [*of("new", range(4)), *of("old", range(4))], draws[:7]]
    hashes = [counting.batch_hash(each) for each in [draws, *others]]

    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == counting.batch_hash(list(draws))
    assert len(hashes[0]) == 16


def test_the_same_window_of_another_source_has_another_hash(counting):
    """Window 3 of both, at its position in each order."""
    window_3 = [of(name, (counting.windows(of(name, range(WINDOWS))).tolist().index(3),)) for name in ("old", "new")]

    assert counting.batch_hash(window_3[0]) != counting.batch_hash(window_3[1])


def test_replay_has_the_hash_of_the_windows_that_it_replays(counting):
    """Ordinal 3 as new data and as replay is the same window."""
    assert counting.batch_hash(of("old", (3,))) == counting.batch_hash(of("old", (3,), replayed=True))


def test_the_hash_of_a_step_is_the_same_on_any_number_of_ranks(planned):
    """The plan of 1, 2 and 4 ranks, every step of both stages; no two steps have the same hash."""
    reader, plan_for = planned
    tables = []
    for world_size in (1, 2, 4):
        plan = plan_for(world_size, 1)
        tables.append([reader.batch_hash(plan.batch(stage, s)) for stage in plan.stages for s in range(stage.steps)])

    assert tables[0] == tables[1] == tables[2]
    assert len(set(tables[0])) == 22


def test_replay_repeats_the_windows_of_the_earlier_stage_in_their_order(planned):
    """English was trained for 9 steps of 4 before the weights of the German stage were saved; German replays the first
    10 of those 36 windows.
    """
    reader, plan_for = planned
    plan = plan_for()
    english, german = plan.stages
    trained = np.concatenate([reader.read(plan.batch(english, step)).tokens for step in range(9)])
    draws = [draw for step in range(10) for draw in plan.batch(german, step)]
    rows = reader.read(draws).tokens
    replayed = np.array([draw.source == "en" for draw in draws])

    assert replayed.tolist() == [draw.replayed for draw in draws]
    assert replayed.sum() == 10  # a quarter of 40
    assert np.array_equal(rows[replayed], trained[:10])


def test_a_third_stage_replays_fresh_windows_of_both_datasets(tmp_path):
    """Half of a third stage of 40: English continues after its 10 replayed windows, German begins at its first."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    third = training.third_stage() | {"dataset": "fr", "steps": 10, "replay": {"fraction": 0.5}}
    training.write_tokens(tmp_path / "fr", language=3, tokens=4000)
    raw["datasets"]["fr"] = {"train": str(tmp_path / "fr")}
    config = training.config_of(training.changed(raw, stages=[*raw["stages"], third]))
    plan = make_plan(config, take_inventory(config))
    reader = SequenceReader(open_sources(training_files(config), 257), seq_len=16, seed=0)
    rows = {
        stage.name: [
            (d.source, tuple(reader.read([d]).tokens[0])) for s in range(stage.steps) for d in plan.batch(stage, s)
        ]
        for stage in plan.stages
    }
    first_sight = {"en": [row for _, row in rows["english"][:36]]}
    first_sight["de"] = [row for source, row in rows["german"] if source == "de"]
    replayed = {name: [row for source, row in rows["again"] if source == name] for name in ("en", "de")}

    # English was trained on for 36 + 10 sequences and German for 30: 46/76 and 30/76 of 20 are 12.1 and 7.9.
    assert Counter(source for source, _ in rows["again"]) == {"fr": 20, "en": 12, "de": 8}
    assert replayed["en"] == first_sight["en"][10:22]
    assert replayed["de"] == first_sight["de"][:8]


def test_a_stage_that_returns_to_a_dataset_continues_after_its_trained_windows(tmp_path):
    """English again for 20 sequences: none of the 36 that the weights were trained on, but those after them."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    config = training.config_of(training.changed(raw, stages=[*raw["stages"], training.third_stage()]))
    plan = make_plan(config, take_inventory(config))
    reader = SequenceReader(open_sources(training_files(config), 257), seq_len=16, seed=0)
    english, _, again = (
        reader.windows([draw for step in range(stage.steps) for draw in plan.batch(stage, step)]).tolist()
        for stage in plan.stages
    )

    assert len(again) == 20
    assert not {*again} & {*english[:36]}
    assert again[:12] == english[36:48]  # its own annealing steps were on a branch that was left


@pytest.mark.parametrize("first_step", [0, 2, 3, 7])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_ramp_has_the_batches_of_every_step_from_any_step_on(planned, first_step, ranks):
    """Steps 0 to 2 have 4 sequences, later ones 8: the ranks together read those of the mixture, in its order."""
    reader, plan_for = planned
    tree = plan_for().stages[1].tree
    sizes = BatchSizes((BatchPhase(0, 0, 4), BatchPhase(3, 12, 8)))

    def batch_of(step):
        return draws(tree, sizes.sequences_before(step), sizes.sequences_before(step + 1))

    shape = {"batch_sizes": sizes, "local_batch": 2, "ranks": ranks, "workers": 0}
    loaders = [
        StageLoader(reader, batch_of, steps=8, first_step=first_step, rank=rank, **shape) for rank in range(ranks)
    ]
    for step in range(first_step, 8):
        micro = sizes.at(step) // (2 * ranks)
        read = [loader.batch(step, number).inputs_BL for loader in loaders for number in range(micro)]
        assert np.array_equal(torch.cat(read), reader.read(batch_of(step)).tokens[:, :-1])


# Replay in sequences of another length


def parted(*parts, source="old"):
    return Draw(source, parts[0][1], True, tuple(TrainedPart(*part) for part in parts))


def test_a_replayed_row_has_the_inputs_and_targets_that_its_parts_were_trained_with(counting):
    """Rows of 5: two tokens of one window of 5 and three of another; then a window of 3 and two tokens of one of 10.

    The target at the end of a part is the next token of its own window, and the following part begins there.
    """
    draws = [parted((5, 4, 3, 5), (5, 9, 0, 3)), parted((3, 11, 0, 3), (10, 2, 6, 8)), *of("old", (4,))]
    windows = {
        (length, ordinal): SequenceReader(counting.sources, seq_len=length, seed=3)
        .read(of("old", (ordinal,)))
        .tokens[0]
        for length, ordinal in ((5, 4), (5, 9), (3, 11), (10, 2))
    }
    rows = counting.read(draws)
    inputs = [
        [*windows[5, 4][3:5], *windows[5, 9][:3]],
        [*windows[3, 11][:3], *windows[10, 2][6:8]],
        windows[5, 4][:5],
    ]

    assert np.array_equal(rows.tokens[:, :-1], inputs)
    assert np.array_equal(rows.targets, np.array(inputs) + 1)  # each token of this source is its position
    assert np.array_equal(rows.tokens[:, -1], rows.targets[:, -1])
    assert rows.starts == [(2,), (3,), ()]


def test_the_hash_of_a_batch_depends_on_the_parts_of_its_sequences(counting):
    """Other parts of the same windows are another batch; whole sequences are hashed by their windows only."""
    whole, parts = of("old", (4, 9)), [parted((5, 4, 3, 5), (5, 9, 0, 3))]
    others = [parted((5, 4, 2, 5), (5, 9, 0, 2)), parted((5, 9, 0, 3), (5, 4, 3, 5)), parted((10, 4, 3, 8))]

    assert counting.sequences(whole) == [["old", window] for window in counting.windows(whole)]
    assert counting.sequences(parts) == [
        ["old", [[5, counting.windows(whole)[0], 3, 5], [5, counting.windows(whole)[1], 0, 3]]]
    ]
    assert len({counting.batch_hash([each]) for each in [*whole, *parts, *others]}) == 6


def test_parts_are_fetched_in_sequences_of_their_own_length(counting):
    """Of every window of a part, and of whole sequences, with the length of each."""
    fetched = []
    source = SimpleNamespace(
        windows=lambda length: 10, in_stored_order=True, fetch=lambda numbers, length: fetched.append((length, numbers))
    )
    SequenceReader({"old": source}, seq_len=5, seed=0).fetch([parted((5, 4, 3, 5), (3, 9, 0, 3)), *of("old", (7,))])

    assert sorted(fetched) == [(3, [9]), (5, [4, 7])]
