"""What is known of the sizes, as text and as JSON."""

from titan_cpt.models.release_text import UNKNOWN, Size, detail_lines, find_sizes, table_lines


def test_unknown_facts_are_shown_as_unknown():
    """In the table, in the details and as null in JSON; a size that is no release says so."""
    (llama,) = find_sizes("llama3-8b")
    (row,) = [line for line in table_lines([llama]) if line.startswith("llama3-8b")]
    details = list(detail_lines(llama, 80))

    assert row.split() == ["llama3-8b", "8.03B", "15T", UNKNOWN, UNKNOWN, "meta-llama/Meta-Llama-3-8B"]
    assert f"{'LR':17}{UNKNOWN}" in details
    assert llama.as_json()["release"]["stages"][0]["peak_lr"] is None
    assert list(detail_lines(Size("llama", "debug", None), 80))[-1] == "not a release"


def test_each_source_is_listed_once_with_the_number_that_facts_refer_to():
    """The peak of Pythia-410m is of its config file; no line is wider than 80 columns."""
    lines = [line for size in find_sizes("410m") for line in detail_lines(size, 80)]
    (peak,) = [line for line in lines if line.startswith("LR")]
    number = peak.partition("0.0003 ")[2].split()[0]
    sources = [line for line in lines if line.startswith("[")]

    assert next(line for line in sources if line.startswith(number)).endswith("models/*/pythia-*.yml")
    assert len({line.split(maxsplit=1)[1] for line in sources}) == len(sources)
    every = [line for size in find_sizes(None) for line in (*detail_lines(size, 80), *table_lines([size]))]
    assert max(map(len, every)) <= 80
