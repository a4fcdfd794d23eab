"""`titan-cpt models`: what it lists for a family, a size and a hub name."""

import json

import pytest

from titan_cpt.cli import main
from titan_cpt.models.registry import SIZES


def run(capsys, *words):
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as leaving:
        main(["models", *words])
    return leaving.value.code, *capsys.readouterr()


def test_all_families_are_listed_with_a_line_for_each_size(capsys):
    """A family by name lists its own."""
    status, everything, _ = run(capsys)
    _, family, _ = run(capsys, "gpt_neox")

    assert status == 0
    for name, sizes in SIZES.items():
        assert f"\n{name} " in f"\n{everything}"
        assert all(f"\n{size} " in everything for size in sizes)
    assert family in everything
    assert "llama" not in family


def test_a_size_and_a_hub_name_show_the_same_facts(capsys):
    """As text and as JSON; a revision behind the hub name does not matter."""
    status, by_size, _ = run(capsys, "410m")
    _, by_name, _ = run(capsys, "EleutherAI/pythia-410m@step3000")
    _, text, _ = run(capsys, "410m", "--json")
    (found,) = json.loads(text)["models"]

    assert status == 0
    assert by_size == by_name
    assert "LR               0.0003" in by_size
    assert (found["family"], found["size"]) == ("gpt_neox", "410m")
    assert found["release"]["stages"][0]["peak_lr"]["value"] == 3e-4
    assert found["release"]["stages"][0]["peak_lr"]["source"] in by_size


def test_an_unknown_name_is_one_message_with_a_suggestion(capsys):
    """Status 2."""
    status, out, error = run(capsys, "llama3.1-9b")

    assert (status, out) == (2, "")
    assert error.startswith("ConfigError: command line: unknown model 'llama3.1-9b'; did you mean 'llama3.1-8b'?")
    assert error.count("\n") == 1
