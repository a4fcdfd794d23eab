"""`titan-cpt sweep --fit`: from the folders of trained runs to the law, its residuals and its advice.

The runs are not trained: their folders have losses that the law gives for the plan of each run.
"""

import json

import numpy as np
import pytest
import training
from sweeps import FRACTION, status_of

from titan_cpt.planning.plan_json import plan_as_json
from titan_cpt.runs.laws import equations, report
from titan_cpt.runs.sweep_runs import read_sweep_runs

pytestmark = training.THEIR_WARNINGS_IGNORED

FRACTIONS = [0.1, 0.25, 0.5, 0.75, 0.9]


def write_runs(path, loss, steps=range(0, 11)):
    """Write plan.json and metrics.jsonl of every run; loss(run, stage, dataset, step) is in nats per token."""
    for run in read_sweep_runs([path]):
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "plan.json").write_text(json.dumps(plan_as_json(run.plan)))
        stage = run.plan.stages[-1]
        lines = [
            {
                "kind": "validation",
                "stage": stage.name,
                "step": step,
                "dataset": name,
                "loss_nats_per_token": float(loss(run, stage, name, step)),
                "bits_per_byte": None,
                "forgetting_nats_per_token": None,
                "validation_id": name,
            }
            for step in steps
            for name in training.LANGUAGES
        ]
        (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def fitted(path, capsys):
    """Fit the sweep, and return fit.json with the printed text."""
    status = status_of("sweep", path, "--fit")
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads((path.parent / "out" / "run" / "fit.json").read_text()), " ".join(shown.out.split())


def cmr_loss(run, stage, name, step):
    """English rises with the share of German, and with the steps; before the stage it is 3.0."""
    share, done = float(stage.shares["de"]), step / stage.steps
    return 3.0 + 0.4 * done * share**1.5 if name == "en" else 4.0 - done * (1 - 0.1 * share**-0.5)


def test_the_critical_share_of_the_domain_and_its_law_over_tokens(swept, capsys):
    """At the end 0.4 R^1.5 = 0.1 at R = 0.25^(2/3) = 0.397; after half of the steps at 0.5^(2/3) = 0.630."""
    fit = {"law": "cmr", "objective": "de", "limit": {"en": 0.1}}
    path = swept({FRACTION: FRACTIONS, "fit": fit})
    write_runs(path, cmr_loss)
    found, shown = fitted(path, capsys)

    assert found["answer"]["share"] == pytest.approx(0.25 ** (2 / 3), rel=1e-2)
    assert found["answer"]["other_share"] == pytest.approx(1 - 0.25 ** (2 / 3), rel=1e-2)
    assert found["datasets"]["en"]["rms"] < 1e-3
    half = next(each for each in found["answer"]["critical_shares"] if each["tokens"] == 5 * 64)
    assert half["share"] == pytest.approx(0.5 ** (2 / 3), rel=1e-2)
    assert found["answer"]["critical_share_law"]["share"] == pytest.approx(0.25 ** (2 / 3), rel=2e-2)
    assert not found["answer"]["critical_share_law"]["extrapolated"]
    assert "L(R) = beta + alpha R^s" in shown
    assert "arXiv:2407.17467" in shown
    assert "share of de with the lowest objective within the limits: 0.3968" in shown


def test_a_budget_beyond_the_trained_tokens_is_marked_as_extrapolated(swept, capsys):
    """Twice the tokens of the runs."""
    fit = {"law": "cmr", "objective": "de", "limit": {"en": 0.1}, "tokens": 1280}
    path = swept({FRACTION: FRACTIONS, "fit": fit})
    write_runs(path, cmr_loss)
    found, shown = fitted(path, capsys)

    assert found["answer"]["critical_share_law"]["extrapolated"]
    assert "at 1,280 tokens (EXTRAPOLATED beyond the trained values)" in shown


def test_a_limit_that_no_trained_share_keeps_gives_no_answer(swept, capsys):
    """The lowest share, 0.5, raises the loss by 0.14."""
    fit = {"law": "cmr", "objective": "de", "limit": {"en": 0.05}}
    path = swept({FRACTION: [0.0, 0.1, 0.25, 0.5], "fit": fit})
    write_runs(path, cmr_loss)
    found, shown = fitted(path, capsys)

    assert found["answer"]["share"] is None
    assert "values outside were not trained, so none is given" in shown


def test_a_law_that_misses_the_losses_says_so(swept, capsys):
    """D-CPT's losses fall with tokens; these rise by 0.4 R^1.5, which is more than the limit's 0.02 off."""
    path = swept({FRACTION: FRACTIONS, "fit": {"law": "d_cpt", "objective": "de", "limit": {"en": 0.02}}})
    write_runs(path, cmr_loss)
    found, shown = fitted(path, capsys)

    assert found["answer"]["misfit"] == ["en"]
    assert "do not rely on this: the law misses the losses of en by" in shown


def d_cpt_at(share, tokens):
    return 2.0 + 0.05 * share**0.8 / tokens**0.4 + 0.2 / (share + 0.1) ** 0.7


def d_cpt_loss(run, stage, name, step):
    return d_cpt_at(float(stage.shares[name]), step / stage.steps) if step else 2.4


def test_the_d_cpt_law_of_every_validation(swept, capsys):
    """German is lowest at its largest share; English keeps 2.4 down to a share of 0.2982 of its own."""
    path = swept({FRACTION: FRACTIONS, "fit": {"law": "d_cpt", "objective": "de", "limit": {"en": 0.0}}})
    write_runs(path, d_cpt_loss)
    found, _ = fitted(path, capsys)
    share = found["answer"]["other_share"]

    assert d_cpt_at(share, 1.0) == pytest.approx(2.4, rel=1e-3)
    assert found["answer"]["losses"]["de"] == pytest.approx(d_cpt_at(1 - share, 1.0), rel=1e-3)
    assert found["datasets"]["de"]["rms"] < 1e-3
    assert len(found["datasets"]["de"]["points"]) == 50  # ten validations of five runs


def mixture_loss(run, stage, name, step):
    share = float(stage.shares["de"])
    return 1.5 + 2 * np.exp(-share if name == "de" else 0.3 * share) if step else 4.0


def test_the_log_linear_law_of_a_mixture(swept, capsys):
    """English may rise to 4.1: 1.5 + 2 exp(0.3 p) = 4.1 at p = ln(1.3) / 0.3 = 0.8746."""
    fit = {"law": "log_linear", "objective": {"de": 1.0}, "limit": {"en": 0.1}}
    mixtures = [{"en": 1 - share, "de": share} for share in (0.2, 0.4, 0.6, 0.8, 0.95)]
    path = swept({"stages.german.dataset": mixtures, FRACTION: [0.0], "fit": fit})
    write_runs(path, mixture_loss)
    found, shown = fitted(path, capsys)

    assert found["answer"]["mixture"]["de"] == pytest.approx(np.log(1.3) / 0.3, rel=1e-2)
    assert found["answer"]["losses"]["en"] == pytest.approx(4.1, rel=1e-3)
    assert "among combinations of the trained ones: de = 0.87" in shown


LR_VALUES = np.array([2.2, 0.5, 0.3, 0.4, 0.4, 8.0, 0.7])


def lr_loss(scale):
    def loss(run, stage, name, step):
        if step == 0:
            return 2.9
        lrs = np.array([stage.lr_at(each) for each in range(step)])
        first = run.plan.stages[0]
        init = stage.init.steps_done
        before = sum(first.lr_at(each) for each in range(init))
        x = [before / scale, lrs.sum() / scale, equations.annealing_areas(lrs, 0.999)[-1] / scale]
        values = LR_VALUES if name == "en" else LR_VALUES * [1, 1, 1, -3, 1, 1, 1]
        return equations.lr_curve().predict(values, np.array([x]))[0]

    return loss


def test_the_law_of_the_learning_rates_advises_a_peak_among_the_trained_ones(swept, capsys):
    """The advised peak's English loss is the limit, within 1 %; German falls with every higher peak."""
    peaks = [1e-3, 2e-3, 4e-3, 6e-3]
    fit = {"law": "lr_curve", "objective": "de", "limit": {"en": 0.08}}
    path = swept({"stages.german.lr.max": peaks, "fit": fit})
    runs = read_sweep_runs([path])
    scale = max(sum(run.plan.stages[-1].lr_at(step) for step in range(10)) for run in runs)
    write_runs(path, lr_loss(scale))
    found, shown = fitted(path, capsys)

    assert found["datasets"]["en"]["rms"] < 1e-3
    assert 1e-3 <= found["answer"]["peak_lr"] <= 6e-3
    assert found["answer"]["losses"]["en"] <= 2.98 + 1e-6
    assert "peak LR with the lowest objective within the limits" in shown


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({FRACTION: [0.1, 0.5]}, "2 different values of the share of de, and the law needs 4"),
        ({"job.seed": [1, 2, 3, 4]}, "1 different values of the share of de"),
    ],
)
def test_too_few_runs_are_refused(swept, capsys, table, expected):
    """With what is missing; nothing is written."""
    path = swept(table | {"fit": {"law": "cmr", "objective": "de", "limit": {"en": 0.1}}})
    write_runs(path, cmr_loss)

    assert status_of("sweep", path, "--fit") != 0
    assert expected in " ".join(capsys.readouterr().err.split())
    assert not (path.parent / "out" / "run" / "fit.json").exists()


def test_runs_that_are_not_done_are_omitted_by_name(swept, capsys):
    """Half a stage is not its end."""
    path = swept({FRACTION: FRACTIONS, "fit": {"law": "cmr", "objective": "de", "limit": {"en": 0.1}}})
    write_runs(path, cmr_loss, steps=range(0, 6))

    assert status_of("sweep", path, "--fit") != 0
    shown = capsys.readouterr()
    assert "fraction-0.1: stage german is not trained to its end, not fitted" in " ".join(shown.out.split())
    assert "no run of this sweep is trained to its end" in shown.err


def test_a_sweep_without_a_law_is_refused(swept, capsys):
    """--fit needs [sweep.fit]."""
    assert status_of("sweep", swept({FRACTION: [0.1]}), "--fit") == 2
    assert "has no [sweep.fit]" in capsys.readouterr().err


def test_files_with_different_laws_are_refused(swept, tmp_path, capsys):
    """Several files are one comparison, with one law."""
    fit = {"law": "cmr", "objective": "de", "limit": {"en": 0.1}}
    first = swept({FRACTION: FRACTIONS, "fit": fit})
    second = first.rename(tmp_path / "first.toml"), swept({FRACTION: FRACTIONS, "fit": fit | {"confidence": 0.9}})

    assert status_of("sweep", *second, "--fit") == 2
    assert "the files have different [sweep.fit] tables; leave one" in capsys.readouterr().err


def test_without_scipy_the_sweep_is_refused_before_it_trains(swept, monkeypatch, capsys):
    """With the command that installs it."""
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    path = swept({FRACTION: FRACTIONS, "fit": {"law": "cmr", "objective": "de", "limit": {"en": 0.1}}})

    assert status_of("sweep", path) != 0
    assert "[sweep.fit] needs scipy, which is not installed" in " ".join(capsys.readouterr().err.split())
    assert not (path.parent / "out").exists()
