"""Reading other projects' files: formats, merging, variables of scripts, recognition, and files that cannot be read."""

import pytest

from titan_cpt.convert.reading import read_files
from titan_cpt.errors import ConfigError


def test_yaml_with_comments_and_trailing_commas_and_hyphens_is_read_as_gpt_neox_does(write):
    path = write('# sizes\n{\n  "num-layers": 2,  # blocks\n  "optimizer": {"params": {"lr": 6.0e-4,}},\n}\n', "a.yml")
    assert read_files([path], None) == ("gpt-neox", {"num_layers": 2, "optimizer.params.lr": 6e-4})


def test_several_files_are_merged_and_a_key_in_two_of_them_is_refused(write):
    first, second = write("num_layers: 2", "a.yml"), write("data_path: x", "b.yml")
    assert read_files([first, second], None)[1] == {"num_layers": 2, "data_path": "x"}
    with pytest.raises(ConfigError, match=r"num_layers is in .*a.yml and .*c.yml; GPT-NeoX refuses that too"):
        read_files([first, write("num-layers: 3", "c.yml")], "gpt-neox")


def test_arguments_of_a_script_are_read_with_its_variables_and_arrays(write):
    script = write(
        "\n".join(
            [
                "#!/bin/bash",
                "GPUS=8",
                "NODES=2",
                "WORLD=$(($GPUS*$NODES))",
                "SEQ=${LENGTH:-4096}",
                "MODEL_ARGS=(",
                "    --num-layers 32  # blocks",
                "    --swiglu",
                "    --seq-length $SEQ",
                ")",
                "torchrun --nproc_per_node $GPUS pretrain_gpt.py ${MODEL_ARGS[@]} --lr=1e-4 \\",
                '    --data-path 0.5 a 0.5 "b" --world $WORLD',
            ]
        ),
        "train.sh",
    )
    assert read_files([script], None) == (
        "megatron",
        {
            "num-layers": "32", "swiglu": True, "seq-length": "4096", "nproc_per_node": "8", "lr": "1e-4",
            "data-path": ["0.5", "a", "0.5", "b"], "world": "16",
        },
    )  # fmt: skip


def test_litgpt_and_torchtitan_are_recognized(write):
    assert read_files([write("model_name: pythia-14m\ntrain:\n  max_tokens: 1", "a.yaml")], None)[0] == "litgpt"
    assert read_files([write("[training]\nsteps = 1", "a.toml")], None) == ("torchtitan", {"training.steps": 1})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yml", "a: [1", "not valid YAML"),
        ("a.yml", "- 1", "must be a table"),
        ("a.yml", "other: 1", "not recognized as a config of torchtitan, gpt-neox, litgpt, megatron; say which"),
        ("a.toml", "a = ", "not valid TOML"),
        ("a.txt", "hello", "not recognized"),
        ("a.toml", "", "not recognized"),
        ("a.toml", "[project]\nname = 'x'", "not recognized"),
        ("a.toml", "[job]\nname = 'x'\n[[stages]]\nname = 'a'", "is a config of titan_cpt already; `titan-cpt plan"),
        ("a.toml", "extends = 'b.toml'\n[datasets.x]\ntrain = 'y'", "is a config of titan_cpt already"),
        ("a.yml", "{'num_layers': {'a.b': 1, 'a': {'b': 2}}}", "num_layers.a.b is there twice"),
        ("a.yml", "num_layers: " + "[" * 1500, "not valid YAML"),
        ("a.yml", "num_layers: " + "[" * 9000, "more than 3,000 lists"),
    ],
)
def test_files_that_cannot_be_read_are_named(write, name, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_files([write(text, name)], None)
    assert name in str(error.value)


def test_a_missing_file_a_folder_and_a_second_file_are_refused(tmp_path, write):
    toml = write("[training]", "a.toml")
    for paths, message in (
        ([tmp_path / "no.yml"], "no such file"),
        ([tmp_path], "is a folder"),
        ([toml, toml], "torchtitan reads one config file, got 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_files(paths, None)


@pytest.mark.parametrize("last", ["", "b: &b [*b]\n"])
def test_anchors_do_not_fill_the_memory(write, last):
    """Nine levels of nine references each would be 387 million texts, and a list in itself never ends."""
    bomb = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        read_files([write(last or bomb, "a.yml")], "gpt-neox")
