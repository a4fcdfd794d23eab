"""A step compared with plain torch, the state kept at a transition, bad numbers, and the files of a finished run."""

import copy
import gc
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titan_cpt.checkpoint import manifest
from titan_cpt.models.common import ops
from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.train import run, run_to_end
from titan_cpt.training.stage_start import begin_stage

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def raw(tmp_path):
    """Two small stages."""
    return training.two_stages(training.write_languages(tmp_path), tmp_path)


@pytest.fixture(autouse=True)
def garbage_is_collected_again():
    """A run turns Python's collector off and ends with its process; this one continues."""
    yield
    gc.enable()


def english_lr(t):
    """Infinite cosine over 12 steps, warm-up to 0.12, cool-down to 6, constant to 9, annealed to 3e-4."""
    if t <= 6:
        return 2e-3 + 1e-3 / 2 * (1 + math.cos(math.pi * (t - 0.12) / (6 - 0.12)))
    return 2e-3 if t <= 9 else 2e-3 * (3e-4 / 2e-3) ** ((t - 9) / 3)


def german_lr(t):
    """Warm-up over two steps to 2e-3, a cosine to 2e-4 at step 10."""
    return 2e-3 * t / 2 if t <= 2 else 2e-4 + 1.8e-3 / 2 * (1 + math.cos(math.pi * (t - 2) / 8))


def plain_groups(model):
    """Decay only for matrices."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    kept = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]


def gradients(model, rows, max_norm=1.0):
    """Mean loss, norm before clipping, clipped gradients: plain torch on the whole batch at once."""
    tokens = torch.from_numpy(rows)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return loss.item(), norm.item()


def test_bfloat16_works_on_a_cpu_without_bfloat16_and_the_run_says_that_it_is_emulated(raw, monkeypatch, capfd):
    """Losses and gradient norms of five steps are torch's own within bfloat16's rounding; a note before them."""
    raw["training"]["mixed_precision_param"] = "bfloat16"
    found, said = {}, {}
    for has_bfloat16 in (True, False):
        monkeypatch.setattr(ops, "CPU_HAS_BFLOAT16", has_bfloat16)
        with training.built_trainer(training.config_of(raw)) as trainer:
            stage = trainer.plan.stages[0]
            begin_stage(trainer, stage)
            loader = training.loader_of(trainer, stage)
            steps = [trainer.train_step(loader, stage, step) for step in range(5)]
            found[has_bfloat16] = torch.tensor([[step.loss, step.grad_norm] for step in steps])
        said[has_bfloat16] = "this CPU has no bfloat16 matrix multiplication" in " ".join(
            capfd.readouterr().out.split()
        )

    torch.testing.assert_close(found[False], found[True], rtol=5e-3, atol=0)
    assert said == {True: False, False: True}


@pytest.mark.parametrize("local_batch", [1, 2, 4])
def test_five_steps_are_those_of_a_plain_torch_loop(raw, local_batch):
    """torch's AdamW, cross_entropy and clip_grad_norm_ over the same batches: losses, norms, LRs and final weights."""
    raw["training"]["local_batch_size"] = local_batch
    with training.built_trainer(training.config_of(raw)) as trainer:
        stage = trainer.plan.stages[0]
        begin_stage(trainer, stage)
        loader = training.loader_of(trainer, stage)
        ours = []
        for step in range(5):
            result = trainer.train_step(loader, stage, step)
            ours.append(
                (result.loss.item(), result.grad_norm.item(), {g["lr"] for g in trainer.optimizer.param_groups})
            )
        model = GPTNeoX(trainer.plan.spec)
        model.init_weights(trainer.plan.seed)
        optimizer = torch.optim.AdamW(plain_groups(model), betas=(0.9, 0.95), eps=1e-8)
        for step, (loss, norm, lrs) in enumerate(ours):
            expected = gradients(model, trainer.readers[stage.name].read(trainer.plan.batch(stage, step)).tokens)
            for group in optimizer.param_groups:
                group["lr"] = english_lr(step + 1)
            optimizer.step()

            assert (loss, norm) == pytest.approx(expected, rel=2e-6)
            assert list(lrs) == [pytest.approx(english_lr(step + 1), rel=1e-12)]
        assert expected[1] > 1.0  # there was something to clip
        for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
            if mine.dim() == 2:  # the keys' biases have a gradient of nothing but rounding errors, which AdamW blows up
                torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("local_batch", [1, 4])
def test_losses_by_source_are_those_of_the_sources_rows(raw, local_batch):
    """German with replayed English: torch's loss on the rows of each, summed over all micro-batches of a step."""
    raw["training"]["local_batch_size"] = local_batch
    with training.built_trainer(training.config_of(raw)) as trainer:
        stage = trainer.plan.stages[1]
        trainer.model.init_weights(0)
        loader = training.loader_of(trainer, stage)
        model = GPTNeoX(trainer.plan.spec)
        model.load_state_dict(trainer.model.state_dict())
        result = trainer.train_step(loader, stage, 0)
        draws = trainer.plan.batch(stage, 0)
        rows = torch.from_numpy(trainer.readers[stage.name].read(draws).tokens)
        with torch.no_grad():
            losses = F.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:], reduction="none").sum(dim=1)

    assert {draw.replayed for draw in draws} == {True, False}
    for (source, replayed), number in stage.source_numbers.items():
        own = [row for row, draw in enumerate(draws) if (draw.source, draw.replayed) == (source, replayed)]
        expected = [losses[own].sum().item(), 16.0 * len(own)]
        assert result.sums_S2[number].tolist() == pytest.approx(expected, rel=1e-5)


def test_accumulation_does_not_change_a_run(raw):
    """Both stages, in 1, 2 and 4 micro-batches a step: every loss and norm, and the hashes exactly."""
    tables = []
    for local_batch in (4, 2, 1):
        changes = {"job": {"name": f"by-{local_batch}"}, "training": {"local_batch_size": local_batch}}
        run(training.config_of(training.changed(raw, checkpoint={"interval": 100}, **changes)))
        tables.append(training.lines_of(training.Path(raw["job"]["output_dir"]) / f"by-{local_batch}", "train"))

    assert [len(table) for table in tables] == [22, 22, 22]
    for whole, *others in zip(*tables, strict=True):
        for other in others:
            assert whole["loss_nats_per_token"] == pytest.approx(other["loss_nats_per_token"], rel=1e-5)
            assert whole["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            assert whole["batch_hash"] == other["batch_hash"]


def moments_of(trainer):
    return {
        f"state.{name}.{key}": value.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        for key, value in trainer.optimizer.state[parameter].items()
    }


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_the_transition_after_an_infinite_stage_begins_from_its_pre_anneal_checkpoint_bit_for_bit(raw):
    """Weights, and with "keep" moments and step count too, are those after 9 of 12 steps, not those of the end."""
    with training.built_trainer(training.config_of(raw)) as trainer:
        english, german = trainer.plan.stages
        begin_stage(trainer, english)
        run_to_end(trainer.stage_steps(english, 0))
        at_the_end = weights_of(trainer)
        begin_stage(trainer, german)
        weights, moments = weights_of(trainer), moments_of(trainer)
        saved = trainer.folder / "english" / "step-00000009"

    assert training.same_bits(weights, training.tensors_of(saved))
    assert not training.same_bits(weights, at_the_end)
    assert training.same_bits(at_the_end, training.tensors_of(trainer.folder / "english" / "step-00000012"))
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == {9.0}
    saved_moments = training.tensors_of(saved, "optimizer")
    assert all(torch.equal(value, saved_moments[name]) for name, value in moments.items())
    assert any(value.abs().sum() > 0 for name, value in moments.items() if name.endswith("exp_avg"))


def test_the_first_step_of_a_stage_that_keeps_the_optimizer_uses_the_new_hyperparameters(raw):
    """AdamW's step by hand, in fp64, from the kept moments: new betas, eps, decay, LR, and step count 10."""
    raw["stages"][1]["optimizer"] = {"beta1": 0.5, "beta2": 0.7, "eps": 1e-4, "weight_decay": 0.6}
    with training.built_trainer(training.config_of(raw)) as trainer:
        english, german = trainer.plan.stages
        begin_stage(trainer, english)
        run_to_end(trainer.stage_steps(english, 0))
        begin_stage(trainer, german)
        weights, moments = weights_of(trainer), moments_of(trainer)
        twin = copy.deepcopy(trainer.model)
        gradients(twin, trainer.readers[german.name].read(trainer.plan.batch(german, 0)).tokens)
        trainer.train_step(training.loader_of(trainer, german), german, 0)
        lrs = {group["lr"] for group in trainer.optimizer.param_groups}
        counts = {state["step"].item() for state in trainer.optimizer.state.values()}

    assert list(lrs) == [pytest.approx(german_lr(1), rel=1e-12)]
    assert counts == {10.0}
    for name, parameter in twin.named_parameters():
        grad, old = parameter.grad.double(), weights[name].double()
        first = 0.5 * moments[f"state.{name}.exp_avg"].double() + 0.5 * grad
        second = 0.7 * moments[f"state.{name}.exp_avg_sq"].double() + 0.3 * grad**2
        update = (first / (1 - 0.5**10)) / ((second / (1 - 0.7**10)).sqrt() + 1e-4)
        decay = 0.6 if parameter.dim() == 2 else 0.0
        expected = old - german_lr(1) * (decay * old + update)
        torch.testing.assert_close(trainer.model.get_parameter(name).double(), expected, rtol=1e-5, atol=1e-7)


def test_a_transition_that_resets_zeroes_moments_and_step_counts_and_leaves_the_weights(raw):
    """With `optimizer_state = "reset"` only the weights stay."""
    raw["stages"][1]["optimizer_state"] = "reset"
    with training.built_trainer(training.config_of(raw)) as trainer:
        english, german = trainer.plan.stages
        begin_stage(trainer, english)
        run_to_end(trainer.stage_steps(english, 0))
        before = moments_of(trainer)
        begin_stage(trainer, german)
        after, weights = moments_of(trainer), weights_of(trainer)
        trainer.train_step(training.loader_of(trainer, german), german, 0)
        counts = {state["step"].item() for state in trainer.optimizer.state.values()}

    assert all(value.abs().sum() > 0 for name, value in before.items() if name.endswith((".step", "exp_avg_sq")))
    assert all(value.abs().sum() == 0 for value in after.values())
    assert training.same_bits(weights, training.tensors_of(trainer.folder / "english" / "step-00000009"))
    assert counts == {1.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of three stages, the last on a third language, with all that can be written."""
    folder = tmp_path_factory.mktemp("finished")
    raw = training.two_stages(training.write_languages(folder), folder)
    training.write_tokens(folder / "fr", language=3, tokens=4000)
    training.write_tokens(folder / "fr-validation", language=3, tokens=700, seed=1)
    raw["datasets"]["fr"] = {"train": str(folder / "fr"), "validation": str(folder / "fr-validation")}
    raw["stages"].append(training.third_stage() | {"name": "french", "dataset": "fr", "steps": 6})
    raw["validation"] |= {"final_window_steps": 4, "final_window_every": 2}
    raw["metrics"] |= {"enable_tensorboard": True, "log_freq": 5}

    assert run(training.config_of(raw)) == 0
    return folder / "run"


def test_every_step_has_one_line_with_all_keys(finished):
    """12 + 10 + 6 steps, `kind` first, counted within the stage and over the run; tokens are 64 a step."""
    lines = training.lines_of(finished, "train")

    assert [(line["stage"], line["step"]) for line in lines] == [
        *(("english", step) for step in range(1, 13)),
        *(("german", step) for step in range(1, 11)),
        *(("french", step) for step in range(1, 7)),
    ]
    assert [line["run_step"] for line in lines] == list(range(1, 29))
    assert [line["tokens"] for line in lines] == [64 * step for step in range(1, 29)]
    promised = "kind stage step run_step tokens loss_nats_per_token lr grad_norm tokens_per_s mfu memory_gib batch_hash"
    assert all(set(promised.split()) <= line.keys() and next(iter(line)) == "kind" for line in lines)
    assert len({line["batch_hash"] for line in lines}) == 28


def test_every_step_ran_at_the_lr_of_its_number(finished):
    """eta(step) by hand, as the optimizer had it; the constant third stage too."""
    lines = training.lines_of(finished, "train")
    hand = [english_lr(t) for t in range(1, 13)] + [german_lr(t) for t in range(1, 11)] + [1e-3] * 6

    assert [line["lr"] for line in lines] == pytest.approx(hand, rel=1e-12)


def test_a_quarter_of_the_german_stage_is_replay(finished):
    """One sequence of four in each batch, 16 tokens each; none in the others."""
    replayed = Counter((line["stage"], line["replayed_tokens"]) for line in training.lines_of(finished, "train"))

    assert replayed == {("english", 0): 12, ("german", 16): 10, ("french", 0): 6}


def test_every_dataset_is_measured_at_the_start_the_interval_the_end_and_in_the_final_window(finished):
    """Every 5 steps, and every 2 over the last 4: of 12 steps 10 and 12, of 10 steps 8 and 10, of 6 steps 4 and 6."""
    found = Counter((line["stage"], line["step"]) for line in training.lines_of(finished, "validation"))

    assert found == {
        **{("english", step): 3 for step in (0, 5, 10, 12)},
        **{("german", step): 3 for step in (0, 5, 8, 10)},
        **{("french", step): 3 for step in (0, 4, 5, 6)},
    }


def test_forgetting_is_the_loss_minus_the_loss_when_the_weights_left_the_dataset(finished):
    """English ends at German's step 0, German at French's; before that, a dataset has no forgetting."""
    lines = training.lines_of(finished, "validation")
    loss = {(line["stage"], line["step"], line["dataset"]): line["loss_nats_per_token"] for line in lines}
    since = {("german", "en"): "german", ("french", "en"): "german", ("french", "de"): "french"}
    expected = {
        key: loss[key] - loss[since[key[0], key[2]], 0, key[2]] if (key[0], key[2]) in since else None for key in loss
    }

    assert {(e["stage"], e["step"], e["dataset"]): e["forgetting_nats_per_token"] for e in lines} == expected
    assert len([value for value in expected.values() if value]) == 3 + 4 + 3


def test_the_transition_event_names_weights_optimizer_and_lr(finished):
    """Weights from where, optimizer kept or reset, the first LR, the cursors of every source."""
    told = {event["stage"]: event for event in training.events_of(finished, "transition")}

    assert list(told) == ["english", "german", "french"]
    assert told["english"]["weights"] == "new, from seed 0"
    assert told["german"]["weights"] == f"from {finished / 'english' / 'step-00000009'}"
    assert told["french"]["weights"] == f"from {finished / 'german' / 'step-00000010'}"
    assert [told[name]["optimizer"] for name in told] == ["reset", "moments and step count kept", "reset"]
    assert told["german"]["lr"] == "0.001 at the first step"
    assert (told["german"]["data"], told["german"]["replay"]) == ({"en": 36}, {})
    assert (told["french"]["data"], told["french"]["replay"]) == ({"de": 30, "en": 36}, {"en": 10})


def test_stage_ends_and_the_pre_anneal_point_stay_and_two_intervals(finished):
    """Interval checkpoints were at 4, 8 of English and German and 4 of French."""
    kinds = {name: manifest.verify(finished / name)["kind"] for name in training.checkpoints_of(finished)}

    assert kinds == {
        "english/step-00000009": "pre_anneal",
        "english/step-00000012": "stage_end",
        "german/step-00000008": "interval",
        "german/step-00000010": "stage_end",
        "french/step-00000004": "interval",
        "french/step-00000006": "stage_end",
    }


def test_the_events_are_those_of_the_run_in_order(finished):
    """One start, a transition a stage, the annealing, and every checkpoint that was saved."""
    names = [event["name"] for event in training.events_of(finished)]

    assert names[:2] == ["start", "transition"]
    assert Counter(names) == {"start": 1, "transition": 3, "anneal": 1, "checkpoint": 2 + 2 + 3 + 2}


def test_the_summary_agrees_with_metrics_jsonl(finished):
    """Per stage: losses before and after, forgetting, adaptation, final loss, tokens by dataset, seconds."""
    summary = json.loads((finished / "summary.json").read_text())
    lines = training.lines_of(finished, "validation")
    loss = {(line["stage"], line["step"], line["dataset"]): line["loss_nats_per_token"] for line in lines}
    english, german, french = summary["stages"]

    assert [stage["name"] for stage in summary["stages"]] == ["english", "german", "french"]
    assert summary["problems"] == []  # every line that a run writes can be read
    for stage, steps in ((english, 12), (german, 10), (french, 6)):
        name = stage["name"]
        assert stage["before"] == {dataset: loss[name, 0, dataset] for dataset in ("en", "de", "fr")}
        assert stage["after"] == {dataset: loss[name, steps, dataset] for dataset in ("en", "de", "fr")}
        window = {d: (loss[name, steps - 2, d] + loss[name, steps, d]) / 2 for d in ("en", "de", "fr")}
        assert stage["final_loss"] == pytest.approx(window, rel=1e-12)
        assert 0 < stage["seconds"] < 60
    assert english["forgetting"] == {}
    assert german["forgetting"] == {"en": loss["german", 10, "en"] - loss["german", 0, "en"]}
    assert french["forgetting"] == {
        "en": loss["french", 6, "en"] - loss["german", 0, "en"],
        "de": loss["french", 6, "de"] - loss["french", 0, "de"],
    }
    assert [stage["adaptation"] for stage in summary["stages"]] == [
        {"en": loss["english", 12, "en"]},
        {"de": loss["german", 10, "de"]},
        {"fr": loss["french", 6, "fr"]},
    ]
    assert german["tokens"] == {"de": 480, "en": 160}
    assert german["replayed_tokens"] == {"de": 0, "en": 160}


def test_tensorboard_shows_the_run(finished):
    """Losses, LR, throughput, validation and forgetting, at the steps of the whole run."""
    events = EventAccumulator(str(finished / "tb"))
    events.Reload()
    lines = training.lines_of(finished, "train")
    shown = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

    assert shown["train/lr"] == pytest.approx({line["run_step"]: line["lr"] for line in lines}, rel=1e-6)
    assert list(shown["validation/de/loss_nats_per_token"]) == [0, 5, 10, 12, 17, 20, 22, 26, 27, 28]
    assert shown["forgetting/en"].keys() == {12, 17, 20, 22, 26, 27, 28}
    assert {"throughput/tokens_per_s", "train/grad_norm", "validation/fr/bits_per_byte"} <= shown.keys()


def test_a_finished_run_is_all_skipped(finished):
    """The same command again: 0, nothing is trained, the record grows only by events."""
    before = training.numbers_of(finished), training.checkpoints_of(finished)
    status = run(training.load_config(finished / "config.toml"))
    events = training.events_of(finished)

    assert status == 0
    assert (training.numbers_of(finished), training.checkpoints_of(finished)) == before
    assert [event["stage"] for event in events if event["name"] == "skip"] == ["english", "german", "french"]


def test_measuring_does_not_change_training(raw):
    """Validation after every step and after none: the same bits in every loss, norm and LR."""
    tables = []
    for interval in (1, 1000):
        name = f"every-{interval}"
        run(training.config_of(training.changed(raw, job={"name": name}, validation={"interval": interval})))
        numbers = training.numbers_of(training.Path(raw["job"]["output_dir"]) / name)
        tables.append({key: value for key, value in numbers.items() if key[0] == "train"})

    assert len(tables[0]) == 22
    assert tables[0] == tables[1]


def test_saving_in_the_background_does_not_change_training(raw):
    """Asynchronous after every third step, and synchronous only at the stage's end."""
    tables = []
    for mode, interval in (("async", 3), ("disabled", 1000)):
        table = {"async_mode": mode, "interval": interval}
        run(training.config_of(training.changed(raw, job={"name": mode}, checkpoint=table)))
        tables.append(training.numbers_of(training.Path(raw["job"]["output_dir"]) / mode))

    assert tables[0] == tables[1]


def test_the_logged_batch_hashes_are_those_of_the_plan(finished):
    """The hash in the record is the reader's of the plan's draws, for every step."""
    config = training.load_config(finished / "config.toml")
    with training.built_trainer(config) as trainer:
        plan = trainer.plan
        hashes = [
            trainer.readers[s.name].batch_hash(plan.batch(s, step)) for s in plan.stages for step in range(s.steps)
        ]

    assert [line["batch_hash"] for line in training.lines_of(finished, "train")] == hashes
    assert np.unique(hashes).size == 28
