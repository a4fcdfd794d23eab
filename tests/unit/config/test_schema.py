"""The schema of the TOML file: its defaults, frozen values, and a docstring for every key."""

import pytest
from pydantic import ValidationError

from titan_cpt.config import schema
from titan_cpt.config.load import load_config
from titan_cpt.config.schema_lookup import nested_tables


def test_a_config_needs_thirty_lines_and_has_the_papers_defaults(one_stage, write):
    """AdamW 0.9 / 0.95 / 1e-8 / 0.1, gradient clipping at 1.0, 1 % warm-up, optimizer state reset."""
    config = load_config(write(one_stage))
    adamw = config.optimizer

    assert len(one_stage.strip().splitlines()) <= 30
    assert (adamw.beta1, adamw.beta2, adamw.eps, adamw.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert config.training.max_norm == 1.0
    assert config.stages[0].optimizer_state == "reset"
    assert load_config(write(one_stage.replace(", min = 1e-4", ""))).stages[0].lr.warmup_until == 0.01
    assert (config.tokenizer.path, config.job.output_dir, config.job.seed) == ("bytes", "outputs", 0)
    assert (config.validation.interval, config.checkpoint.interval) == (100, 500)


def test_a_config_is_frozen(one_stage, write):
    """Nothing can change a value after validation."""
    config = load_config(write(one_stage))

    with pytest.raises(ValidationError, match="frozen"):
        config.stages[0].lr.max = 1.0


def test_every_key_is_documented():
    """Each key of each table has a docstring, which messages and the config reference use."""
    tables, waiting = [], [schema.Config]
    while waiting:
        table = waiting.pop()
        tables.append(table)
        waiting += [inner for field in table.model_fields.values() for inner in nested_tables(field.annotation)]
    undocumented = [
        f"{table.__name__}.{name}"
        for table in tables
        if table is not schema.Config
        for name, field in table.model_fields.items()
        if not (field.description or "").strip()
    ]

    assert len(tables) > 30
    assert undocumented == []
