"""Run folders for the tests of the report."""

import json

import pytest

from unit.reporting.run_folders import STEP_TOKENS, stage, trained, use


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, lines, stages) writes a run folder: by default 10 steps of English, then 10 of German."""

    def write_run(name, lines, stages=None, *, plan=True, begun="ab"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        stages = stages or [
            stage("a", 10, ["en"], 10, en=use(10_000, epochs=0.5)),
            stage("b", 10, ["de"], 20, window=(9, 10), en=use(500, 500), de=use(9500)),
        ]
        if plan:
            plan_json = {"name": folder.name, "fingerprint": "f00dcafe", "step_tokens": STEP_TOKENS, "stages": stages}
            (folder / "plan.json").write_text(json.dumps(plan_json))
        steps = [trained(of, step, step + 10 * (of == "b"), 1e-3) for of in begun for step in range(1, 11)]
        start = {"kind": "event", "name": "start", "versions": {"torch": "2.13.0"}, "data": {"datasets.en": "abc"}}
        text = "".join(json.dumps(line) + "\n" for line in [start | {"world_size": 2}, *steps, *lines])
        (folder / "metrics.jsonl").write_text(text)
        return folder

    return write_run
