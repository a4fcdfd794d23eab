"""docs/config.md, the generated reference of all keys: the field's terms, and a type and a meaning for each key."""

import re
from pathlib import Path

import pytest

REFERENCE = (Path(__file__).parents[3] / "docs" / "config.md").read_text(encoding="utf-8")

TERMS = {  # a standard term: the section whose text has it
    "gradient accumulation": "[training]",
    "gradient clipping": "[training]",
    "mixed precision": "[training]",
    "compute dtype": "[training]",
    "master weights": "[training]",
    "optimizer state": "[training]",
    "learning-rate warm-up": 'lr = { schedule = "cosine" }',
    "weight decay": "[optimizer]",
    "AdamW hyperparameters": "[optimizer]",
    "grouped-query attention": "[model]",
    "sliding-window attention": "[model]",
    "RoPE scaling": "[model.rope_scaling]",
    "context extension": "[model.rope_scaling]",
    "tensor-parallel degree": "[parallelism]",
    "pipeline-parallel degree": "[parallelism]",
    "context-parallel degree": "[parallelism]",
    "data-parallel": "[parallelism]",
    "all-gather": "[parallelism]",
    "activation checkpointing": "[activation_checkpoint]",
    "torch.compile": "[compile]",
    "float8": "[float8]",
    "checkpoint interval": "[checkpoint]",
    "asynchronous": "[checkpoint]",
    "validation loss": "[validation]",
    "few-shot": "[evaluation]",
    "replay": "[stages.replay]",
    "training stage": "[[stages]]",
    "token budget": "[[stages]]",
    "sweep run": "[sweep]",
}


def section(heading):
    """The text of the section whose title begins with this table."""
    found = re.search(rf"^## {re.escape(heading)}:.*?(?=^## |\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[0]


@pytest.mark.parametrize("term", TERMS)
def test_the_reference_has_the_standard_term_in_the_section_of_its_keys(term):
    """A user of torchtitan or Megatron-LM finds a key by searching for the term that they know."""
    assert term.lower() in section(TERMS[term]).lower()


def test_every_key_has_a_type_a_default_or_a_note_on_being_unset_and_a_meaning():
    """A key without a default is a table, says what "unset" means, or is one of several alternatives."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", REFERENCE, re.MULTILINE)
    of_the_size = set(re.findall(r"^\| `(\w+)`", section("[model]"), re.MULTILINE))
    of_the_optimizer = set(re.findall(r"^\| `(\w+)`", section("[optimizer]"), re.MULTILINE))
    may_be_silent = {"steps", "tokens", "train", "validation", "domains", "source", "index_prefix", "dtype", "fetch"}
    may_be_silent |= of_the_size | of_the_optimizer
    silent = [
        name
        for name, kind, default, meaning in rows
        if not (kind and meaning.endswith("."))
        or not (default or kind == "table" or "Unset: " in meaning or name in may_be_silent)
    ]

    assert len(rows) > 120
    assert silent == []
