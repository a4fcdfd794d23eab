"""File and line in the messages of a config."""

import re

import pytest

from titan_cpt.config.load import load_config
from titan_cpt.errors import ConfigError


def test_a_message_ends_with_the_file_and_line_of_its_key(one_stage, write, load):
    """The last file that sets the key: a base, one of several stages, an inline table; neither for the command line."""
    write(one_stage.replace("seq_len = 16", "seq_len = 1\nmax_norm = -2.0"), "base.toml")
    text = """extends = "base.toml"
[job]
nmae = "x"
[training]
max_norm = -1.0

[[stages]]
name = "second"
dataset = "pile"
steps = 0
[stages.lr]
schedule = "cosine"
max = -1.0

[[stages]]
name = "third"
dataset = "pile"
steps = 3
lr = { schedule = "cosine", max = 1e-3, mim = 1e-4 }
"""
    base_line = 1 + one_stage.split("seq_len")[0].count("\n")
    with pytest.raises(ConfigError) as refusal:
        load_config(write(text), [("training.local_batch_size", "0")])
    found = dict(re.findall(r"- ([\w.]+): .*?(?: \((\S+\.toml, line \d+)\))?$", str(refusal.value), re.MULTILINE))

    assert found == {
        "job.nmae": "config.toml, line 3",
        "training.seq_len": f"base.toml, line {base_line}",
        "training.max_norm": "config.toml, line 5",
        "training.local_batch_size": "",
        "stages.second.steps": "config.toml, line 10",
        "stages.second.lr.max": "config.toml, line 13",
        "stages.third.lr.mim": "config.toml, line 19",
    }
