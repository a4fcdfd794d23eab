"""The lengths in which a run draws sequences from each dataset."""

from plans import datasets, stage

from titan_cpt.config.load import load_config
from titan_cpt.data.sequence_lengths import sequence_lengths


def test_a_dataset_has_the_lengths_of_the_stages_that_draw_from_it(head, write):
    """German is trained in 64 tokens and then replayed, in parts of those; books are replayed without training."""
    text = (
        head
        + datasets("books", "unused")
        + stage("a", "pile", 1)
        + stage("b", "{ pile = 1, german = 1 }", 1, seq_len=64)
        + stage("c", "pile", 1, seq_len=32, replay='{ fraction = 0.1, from = ["german", "books"] }')
    )

    assert sequence_lengths(load_config(write(text))) == {
        "pile": {16: "training.seq_len", 64: "stages.b.seq_len", 32: "stages.c.seq_len"},
        "german": {64: "stages.b.seq_len"},
        "books": {32: "stages.c.seq_len"},
        "unused": {16: "training.seq_len"},
    }
