"""The one sentence on top of the page."""

from titan_cpt.reporting.comparison import compare
from titan_cpt.reporting.run_log import read_run
from titan_cpt.reporting.verdict import verdict
from unit.reporting.run_folders import AVERAGED, EN_DE, on, union_of


def verdict_on(*runs):
    records = [read_run(run) for run in runs]
    return verdict(records, compare(records))


def test_the_verdict_on_a_run_has_adaptation_forgetting_replay_and_compute(write_run):
    """German 3.2 and English 5.1 - 4.0 over the final window; 500 of 10,000 tokens replayed; half of the tokens."""
    assert verdict_on(write_run("r", EN_DE)) == (
        "After stage b (20K tokens in all), the loss on de is 3.200 nats per token and that on en is 1.100 above where "
        "training on it ended, with 5.0% replay and 0.50x the compute of training again on all data."
    )


def test_the_verdict_names_the_loss_of_an_average(write_run):
    """2.9 on German beside 3.2; among several runs the average competes under a name of its own."""
    averaged = write_run("r", AVERAGED)
    text = "the loss on de is 3.200 nats per token, 2.900 with the average of the weights and"

    assert text in verdict_on(averaged)
    assert verdict_on(write_run("p", EN_DE), averaged) == (
        "Of 2 runs, r@average has the lowest mean loss (3.800), r@average forgot least (+0.700) and r@average learned "
        "the new data best (2.900); losses in nats per token."
    )


def test_the_verdict_on_an_unfinished_run_says_so(write_run):
    """In its first stage there is nothing to forget; before the first validation there is no loss."""
    going = write_run("going", EN_DE[:3], begun="a")

    assert verdict_on(going) == "So far, in stage a (10K tokens in all), the loss on en is 4.000 nats per token."
    assert verdict_on(write_run("new", [], begun="a")).endswith("no validation loss is recorded.")


def test_the_verdict_on_several_runs_names_the_best(write_run):
    """The union's mean 3.7 is below 4.15; only one run has anything to forget."""
    assert verdict_on(write_run("5_percent", EN_DE), union_of(write_run)) == (
        "Of 2 runs, union has the lowest mean loss (3.700); losses in nats per token."
    )
    assert "other forgot least (+1.100)" in verdict_on(
        write_run("other", EN_DE),
        write_run(
            "worse", [line | {"forgetting_nats_per_token": line["forgetting_nats_per_token"] and 2.0} for line in EN_DE]
        ),
    )


def test_runs_that_are_not_comparable_have_no_best(write_run):
    """Measured on other validation data."""
    text = verdict_on(write_run("one", on("A", EN_DE)), write_run("two", on("B", EN_DE)))

    assert text == "The runs are not comparable on de, en: validation data or windows differ."


def test_seeds_of_one_configuration_have_a_mean_and_a_range_and_no_best(write_run):
    """Losses on German 3.2 and 3.4, forgetting of English 1.1 and 1.3: a lucky seed is not a better configuration."""
    worse = [line | {"loss_nats_per_token": line["loss_nats_per_token"] + 0.2 * (line["step"] > 8)} for line in EN_DE]
    worse = [line if line["stage"] == "b" else original for line, original in zip(worse, EN_DE, strict=True)]
    worse = [line | {"forgetting_nats_per_token": line["forgetting_nats_per_token"] and 1.0} for line in worse]
    worse[-2] |= {"forgetting_nats_per_token": 1.2}

    assert verdict_on(write_run("seed-0", EN_DE), write_run("seed-1", worse)) == (
        "2 seeds of one configuration. After stage b (20K tokens in all), the loss on de is 3.300 (3.200 to 3.400) "
        "nats per token and that on en is 1.200 above where training on it ended (+1.100 to +1.300), with 5.0% replay "
        "and 0.50x the compute of training again on all data."
    )


def test_means_over_different_datasets_are_not_ranked(write_run):
    """The second run has no loss on German: its AVG is of English only; both forgot English."""
    english = [line for line in EN_DE if line["dataset"] == "en"]
    text = verdict_on(write_run("both", EN_DE), write_run("english", english))

    assert "AVG" in text.partition("not ranked, as means over different datasets: ")[2]
    assert "lowest mean loss" not in text
