"""Mistakes in the command line: one message each, which says what is allowed; and overrides of config keys."""

import pytest

from titan_cpt.cli import main, parse_command_line
from titan_cpt.commands.parser import split_overrides
from titan_cpt.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'? Commands: init, convert-config, "),
        (["frobnicate"], "unknown command 'frobnicate'. Commands: init, convert-config, "),
        (["mine.toml"], "unknown command 'mine.toml'; did you mean `titan-cpt train mine.toml`? Commands: init"),
        ([], "COMMAND is missing. `titan-cpt --help`"),
        (["--vresion"], "unknown argument '--vresion'; did you mean '--version'?"),
        (["plan", "a.toml", "--word-size", "8"], "unknown argument '--word-size'; did you mean '--world-size'?"),
        (["plan", "a.toml", "--seq_len", "8"], "unknown argument '--seq_len'; did you mean --training.seq_len or"),
        (["plan", "a.toml", "--seq-len=8"], "unknown argument '--seq-len=8'; did you mean --training.seq_len or"),
        (["report", "--htlm", "run"], "unknown argument '--htlm'; did you mean '--html'?"),
        (["verify", "a", "b"], "unknown argument 'b'; --help lists what this command takes"),
        (["plan", "a.toml", "b.toml"], "unknown argument 'b.toml'; override a config key with --table.key value"),
        (["export", "a"], "OUT is missing. `titan-cpt export --help` shows what is allowed"),
        (
            ["export", "a", "b", "--dtype", "float16"],
            "--dtype: must be bfloat16 or float32, got 'float16'; did you mean 'bfloat16'? `titan-cpt export --help`",
        ),
        (["prepare", "--workers"], "--workers needs one value. `titan-cpt prepare --help`"),
        (["prepare", "--workers", "two"], "--workers: must be an integer of 1 or more, got 'two'. `titan-cpt prepare"),
        (["prepare", "--holdout", "1"], "--holdout: must be a fraction from 0 and below 1, such as 0.05, got '1'."),
        (["plan", "a.toml", "--json=1"], "--json takes no value"),
        (["plan", "a.toml", "--batch", "x"], "--batch needs 2 values"),
        (["plan", "a.toml", "--training.seq_len"], "--training.seq_len has no value; write --training.seq_len VALUE"),
    ],
)
def test_a_mistake_is_one_message_that_says_what_is_allowed(words, message):
    """A misspelt word has a suggestion: a command, an option of the command, or a config key of that name."""
    with pytest.raises(ConfigError) as error:
        parse_command_line(words)

    assert f"command line: {message}" in str(error.value)


def test_a_mistake_ends_with_status_2_and_without_a_usage_text(capsys):
    """argparse would print the usage of the command before its own message."""
    with pytest.raises(SystemExit) as leaving:
        main(["trian"])
    printed = capsys.readouterr()

    assert (leaving.value.code, printed.out) == (2, "")
    assert printed.err.startswith("ConfigError: command line: unknown command")
    assert printed.err.count("\n") == 1


def test_the_config_is_a_positional_argument_or_an_option():
    """Before or after options and overrides, whose values are not taken for the file."""
    for words in (
        ["a.toml", "--job.seed", "1", "--json"],
        ["--job.seed", "1", "a.toml", "--json"],
        ["--json", "--job.seed=1", "a.toml"],
    ):
        options = parse_command_line(["plan", *words])
        assert (str(options.file), options.json, options.overrides) == ("a.toml", True, [("job.seed", "1")])
    named = parse_command_line(["plan", "--job.seed", "1", "--config", "a.toml"])
    assert (named.file, str(named.config), named.overrides) == (None, "a.toml", [("job.seed", "1")])


def test_a_boolean_key_needs_no_value():
    """Before another option, at the end, and before the name of a TOML file; another value is kept."""
    assert split_overrides(["--compile.enable", "--json"]) == (["--json"], ["--compile.enable=true"])
    assert split_overrides(["--compile.enable"]) == ([], ["--compile.enable=true"])
    assert split_overrides(["--compile.enable", "a.toml"]) == (["a.toml"], ["--compile.enable=true"])
    assert split_overrides(["--compile.enable", "false"]) == ([], ["--compile.enable=false"])
    assert split_overrides(["--tokenizer.path", "a.toml"]) == ([], ["--tokenizer.path=a.toml"])


def test_a_number_may_be_negative_and_the_words_behind_two_dashes_are_no_overrides():
    """One dash begins a number; `--` ends the options, as in other programs."""
    assert split_overrides(["--job.seed", "-1"]) == ([], ["--job.seed=-1"])
    assert split_overrides(["--", "--job.seed", "1"]) == (["--", "--job.seed", "1"], [])
