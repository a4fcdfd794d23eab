"""Extending a tokenizer on files: the command, a config whose tokenizer is missing, and the sample of a long text."""

import json

import pytest
from training import changed, two_stages, write_config

from titan_cpt.cli import main
from titan_cpt.data.prepare.extend_tokenizer import sampled_texts
from titan_cpt.data.tokenizer.extension import extension_of
from titan_cpt.data.tokenizer.ids_fingerprint import byte_tokenizer_json

GERMAN = [
    f"{number}: Die Größe der Fenster und die Maße der Türen; Fenster und Türen schließen, die Größe ändern."
    for number in range(8)
]


@pytest.fixture
def there(tmp_path):
    """A base tokenizer, text in two languages and a config."""
    spec = byte_tokenizer_json(256)
    spec["pre_tokenizer"] = spec["pre_tokenizer"] | {"use_regex": True}
    (tmp_path / "base.json").write_text(json.dumps(spec))
    (tmp_path / "de.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in GERMAN))
    english = [{"text": f"the size of {number} windows"} for number in range(8)]
    (tmp_path / "en.jsonl").write_text("\n".join(map(json.dumps, english)))
    raw = two_stages(tmp_path, tmp_path / "out")
    for name in ("en", "de"):
        raw["datasets"][name] |= {
            "source": {"text": [str(tmp_path / f"{name}.jsonl")], "holdout": 0.3},
            "train": str(tmp_path / name),
        }
        raw["datasets"][name]["validation"] = str(tmp_path / f"{name}-validation")
    extend = {"base": str(tmp_path / "base.json"), "dataset": "de", "add": 30}
    write_config(changed(raw, tokenizer={"path": str(tmp_path / "new.json"), "extend": extend}), tmp_path / "run.toml")
    return tmp_path


def run(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def test_a_text_without_words_has_no_ratio(there, capsys):
    (there / "empty.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    assert run("tokenizer", "inspect", there / "base.json", "--input", there / "empty.jsonl") == 0
    assert "input: - tokens/word, - bytes/token with" in capsys.readouterr().out


def test_the_command_writes_the_tokenizer_and_prints_fertility_before_and_after(there, capsys):
    options = [
        "--base",
        there / "base.json",
        "--input",
        there / "de.jsonl",
        "--add",
        30,
        "--output",
        there / "new.json",
    ]
    assert run("tokenizer", "extend", *options, "--compare", there / "en.jsonl", there / "de.jsonl", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["vocab_size"], len(found["extends"]["new_tokens"])) == (287, 30)
    by_text = {(each["text"], each["tokenizer"] == str(there / "new.json")): each for each in found["fertility"]}
    assert by_text["input", False]["bytes_per_token"] == 1.0
    assert by_text["input", True]["bytes_per_token"] > 1.8
    english, german = (f"compare {there}/{name}.jsonl" for name in ("en", "de"))
    assert by_text[english, True]["new_tokens"] < by_text["input", True]["new_tokens"]
    assert by_text[german, True]["tokens_per_word"] == by_text["input", True]["tokens_per_word"]
    assert (
        run("tokenizer", "inspect", there / "new.json", "--base", there / "base.json", "--input", there / "en.jsonl")
        == 0
    )
    printed = capsys.readouterr().out
    assert f"extends {there}/base.json: ids 257 to 286 are new" in printed
    assert "tokens/word" in printed


def test_a_config_makes_its_missing_tokenizer_before_its_token_files(there, capsys):
    assert run("prepare", there / "run.toml", "--dry-run") == 0
    assert f"{there}/base.json would be extended on the text of de -> {there}/new.json" in capsys.readouterr().out
    assert run("prepare", there / "run.toml", "--quiet") == 0
    assert extension_of(str(there / "base.json"), str(there / "new.json")).vocab_size == 287
    assert json.loads((there / "de.json").read_text())["tokenizer"]["vocab_size"] == 287
    before = (there / "new.json").read_bytes()
    assert run("tokenizer", "extend", there / "run.toml", "--json") == 0
    assert (there / "new.json").read_bytes() == before
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {each["text"] for each in found["fertility"]} == {"de", "en"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extend", "--add", "5"], "--base is missing"),
        (["extend", "RUN", "--add", "5"], "give either a config or --base"),
        (["extend", "RUN", "--tokenizer.path", "bytes"], 'path = "bytes" has no merges'),
        (["inspect"], "FILE is missing"),
        (["inspect", "BASE", "--add", "5"], "--add is for `titan-cpt tokenizer extend`"),
        (["inspect", "NONE"], "No such file"),
        (["extends"], "must be extend or inspect, got 'extends'"),
    ],
)
def test_mistakes_on_the_command_line_are_named(there, capsys, words, message):
    names = {"RUN": there / "run.toml", "BASE": there / "base.json", "NONE": there / "none.json"}
    assert run("tokenizer", *(names.get(word, word) for word in words)) == 2
    assert message in capsys.readouterr().err


def test_a_config_without_an_extension_has_nothing_to_make(there, capsys):
    write_config(two_stages(there, there / "out"), there / "plain.toml")
    assert run("tokenizer", "extend", there / "plain.toml") == 2
    assert "names no tokenizer to make" in capsys.readouterr().err


def test_of_a_long_text_an_even_sample_is_read_whatever_the_order_of_the_files(tmp_path):
    texts = [f"document {number} " * 20 for number in range(400)]
    for name, half in (("a", texts[:200]), ("b", texts[200:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in half))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    said = []
    size = sum((tmp_path / name).stat().st_size for name in ("a.jsonl", "b.jsonl"))
    sample = list(sampled_texts(files, "text", size // 4, said.append))
    assert 60 < len(sample) < 140
    assert 20 < sum(text in texts[:200] for text in sample) < len(sample) - 20
    assert sorted(sampled_texts(files[::-1], "text", size // 4, said.append)) == sorted(sample)
    assert said[0].startswith("reads an even sample, 25.0% of the documents")
    assert list(sampled_texts(files, "text", size, said.append)) == texts
