"""Names that refer to datasets and stages, the budget of a stage, and reserved names."""

import pytest
from config_texts import LR, with_stage

from titan_cpt.config.load import load_config


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ('steps = 10\ntokens = "1M"', "must have exactly one of steps and tokens, got both"),
        ("", "must have exactly one of steps and tokens, got neither"),
    ],
)
def test_a_stage_has_either_steps_or_tokens(head, faults, budget, expected):
    """Both and neither are refused."""
    assert faults(with_stage(head, f'dataset = "pile"\n{budget}\n{LR}')) == [f"stages.first: {expected}"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "stages.second.dataset",
            "germn",
            "stages.second.dataset: there is no [datasets.germn]; did you mean 'german'?",
        ),
        ("stages.second.dataset", '["german"]', "stages.second.dataset: must be a name or a table of weights"),
        ("stages.second.dataset", "{ german = 0.0 }", "stages.second.dataset: the weight of 'german' must be a number"),
        (
            "stages.second.replay.from",
            "[]",
            "stages.second.replay.from: must be a non-empty string",
        ),
        (
            "stages.second.replay.from",
            "books",
            "stages.second.replay.from: there is no [datasets.books]; there are 'pile'",
        ),
        ("stages.second.name", "first", "stages.first.name: two stages have this name"),
        ("stages.second.name", "a/b", "stages.a/b.name: must be letters, digits, '_' and '-'"),
        *(
            ("stages.second.name", name, f"stages.{name}.name: is reserved for the folder {name}/ of every run")
            for name in ("tb", "evaluations", "profile", "report", "logs")
        ),
        ("stages.second.name", "..", "stages.'..'.name: must be letters, digits, '_' and '-'"),
        ("training.steps", "3", "training.steps: unknown key; each of the [[stages]] has its own steps or tokens, lr"),
        ("optimizer.lr", "3e-4", "optimizer.lr: unknown key; each of the [[stages]] has its own steps or tokens, lr"),
        ("stages.first.init", "previous", "stages.first.init: the first stage has no previous one"),
        ("stages.first.init", "stage:second", "stages.first.init: must name an earlier stage"),
        ("stages.second.init", "stage:frist", "stages.second.init: must name an earlier stage"),
        ("stages.second.init", "stage:first@end", "stages.second.init: must name an earlier stage"),
        ("stages.second.init", "scratch", "stages.second.init: must be one of previous, random"),
        ("stages.second.init", "checkpoint:", "stages.second.init: must be one of previous, random"),
        ("stages.second.init", "hf:", "stages.second.init: must be one of previous, random, stage:NAME"),
        (
            "stages.first.optimizer_state",
            "keep",
            "stages.first.optimizer_state: init = 'random' has no optimizer state to keep",
        ),
        (
            "tokenizer.train",
            '{ dataset = "pile", vocab_size = 300 }',
            "tokenizer.train.dataset: [datasets.pile] has no",
        ),
        (
            "tokenizer.train",
            '{ dataset = "pike", vocab_size = 300 }',
            "tokenizer.train.dataset: there is no [datasets.pi",
        ),
        ("tokenizer.train", '{ dataset = "pile", vocab_size = 256 }', "tokenizer.train.vocab_size: must be in [257, "),
    ],
)
def test_unresolved_references_are_refused(two_stages, faults, key, value, expected):
    """Datasets, stages, initial weights and tokenizers are checked before anything runs."""
    found = faults(two_stages, (key, value))

    assert any(fault.startswith(expected) for fault in found), found


def test_a_dataset_with_only_validation_tokens_cannot_be_trained_on(one_stage, write, faults):
    """It loads; a stage that trains on it is refused."""
    text = one_stage + '\n[datasets.books]\nvalidation = "data/books"\n'
    expected = "[datasets.books] has no tokens to train on: give it train or domains"

    assert load_config(write(text)).datasets["books"].validation == ("data/books",)
    assert faults(text, ("stages.first.dataset", "books")) == [f"stages.first.dataset: {expected}"]
