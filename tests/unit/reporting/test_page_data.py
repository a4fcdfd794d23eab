"""The files with the numbers of a page."""

import csv
import io
import json

from titan_cpt.reporting.page_data import data_files
from titan_cpt.reporting.run_log import read_run
from unit.reporting.run_folders import EN_DE, union_of


def test_the_files_have_every_validation_and_every_step(write_run):
    """Losses as in metrics.jsonl, over the tokens of the whole run; summaries and rows as in the tables."""
    files = data_files([read_run(write_run("r", EN_DE)), read_run(union_of(write_run))])
    validations = list(csv.DictReader(io.StringIO(files["losses.csv"])))
    steps = list(csv.DictReader(io.StringIO(files["steps.csv"])))
    report = json.loads(files["report.json"])

    assert [(row["run"], row["tokens"], float(row["loss_nats_per_token"])) for row in validations][9:11] == [
        ("r", "20000", 3.0),
        ("union", "0", 8.0),
    ]
    assert validations[8]["forgetting_nats_per_token"] == "1.0"
    assert [row["stage"] for row in steps[:20]] == ["a"] * 10 + ["b"] * 10
    assert [run["run"] for run in report["runs"]] == ["r", "union"]
    assert report["runs"][0]["comparison"]["mean_forgetting"] - 1.1 < 1e-12
    assert report["runs"][0]["stages"][1]["after"] == {"en": 5.0, "de": 3.0}
