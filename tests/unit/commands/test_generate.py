"""`titan-cpt generate`: the sampling options arrive."""

import pytest
import small_checkpoints
from sweeps import status_of

from titan_cpt.evaluation.generate import Sampling
from titan_cpt.evaluation.prompts import generate_texts


def test_the_sampling_options_arrive(tmp_path, capsys):
    """Two prompts, sampled: the texts are those of the library with the same temperature, top-p and seed."""
    checkpoint = small_checkpoints.imported(tmp_path, "gpt_neox")
    words = ("--prompt", "The dog", "--prompt", "a", "--tokens", "9", "--temperature", "3", "--top-p", "0.7")
    status = status_of("generate", checkpoint, *words, "--seed", "5", "--tokenizer", "bytes")
    loaded = small_checkpoints.load(checkpoint)
    dog, letter = generate_texts(loaded, ["The dog", "a"], 9, Sampling(temperature=3.0, top_p=0.7, seed=5))

    assert status == 0
    assert capsys.readouterr().out == f"{checkpoint}\n  The dog |{dog}\n  a |{letter}\n"


def test_the_examples_need_no_room_for_the_default_number_of_tokens(tmp_path, capsys):
    """Without a prompt, --tokens has its default of 64, for which a model of short sequences has no room."""
    checkpoint = small_checkpoints.imported(tmp_path, "gpt_neox")

    assert small_checkpoints.load(checkpoint).max_length <= 64
    assert status_of("generate", checkpoint, "--examples", "--tokenizer", "bytes") == 0
    assert "  The capital of Germany is |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "a", "--top-p", "0"), "--top-p: must be above 0"),
        (("--prompt", "a", "--tokens", "0"), "--tokens: must be an integer of 1 or more"),
        (("--prompt", "a", "--temperature", "-1"), "--temperature: must be a temperature"),
    ],
)
def test_a_value_out_of_range_is_status_2(tmp_path, capsys, words, message):
    """Before the checkpoint is opened."""
    assert status_of("generate", tmp_path, *words) == 2
    assert message in capsys.readouterr().err
