"""A name that ends in @average means the average in a folder, and a folder whose own name ends so is itself."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.common.weights.named_weights import (
    NamedWeights,
    loaded_name,
    named_weights,
    split_average,
    stored_name,
    suffix_of,
)

NAMES = st.text("abc.@/-", max_size=12)


def test_a_path_names_the_weights_and_with_the_suffix_the_average(tmp_path):
    """With a slash before the suffix too, which a shell's completion of the folder leaves."""
    folder = tmp_path / "step-00000004"
    folder.mkdir()

    assert named_weights(folder) == NamedWeights(folder, average=False)
    assert named_weights(f"{folder}@average") == NamedWeights(folder, average=True)
    assert named_weights(f"{folder}/@average") == NamedWeights(folder, average=True)
    assert str(named_weights(f"{folder}/@average")) == f"{folder}@average"


def test_a_folder_whose_own_name_ends_in_the_suffix_is_read_itself(tmp_path):
    """Its average has the suffix twice, and the other folder's average is named with a slash."""
    (tmp_path / "x").mkdir()
    odd = tmp_path / "x@average"
    odd.mkdir()

    assert named_weights(odd) == NamedWeights(odd, average=False)
    assert named_weights(f"{odd}@average") == NamedWeights(odd, average=True)
    assert named_weights(f"{tmp_path}/x/@average") == NamedWeights(tmp_path / "x", average=True)


def test_a_folder_that_does_not_exist_yet_is_named_in_the_same_way():
    """`plan` names the checkpoints of runs that are not trained."""
    assert named_weights("runs/a/step-00000004@average") == NamedWeights(Path("runs/a/step-00000004"), average=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://bucket/run/german/step-00000004@average", ("s3://bucket/run/german/step-00000004", True)),
        ("s3://bucket/odd@average/", ("s3://bucket/odd@average/", False)),
        ("german@1000@average", ("german@1000", True)),
        ("german@pre_anneal", ("german@pre_anneal", False)),
    ],
)
def test_the_suffix_of_a_text_is_split_off(name, expected):
    """Of URLs and of references to stages, which no folder's name can be confused with."""
    assert split_average(name) == expected


@given(NAMES, st.booleans())
def test_splitting_undoes_the_suffix(name, average):
    """For every name that does not end in it."""
    assert split_average(f"{name}{suffix_of(average)}") == (name, average)


@given(st.sampled_from(["model", "average", "optimizer", "snapshots"]), NAMES, st.booleans())
def test_a_tensor_is_found_under_the_name_that_it_is_loaded_under(weights, parameter, average):
    """The average's tensors are loaded as the model's, the model's own are not, all others are as they are stored."""
    loaded = loaded_name(f"{weights}.{parameter}", average=average)
    expected = f"model.{parameter}" if weights == "average" else f"{weights}.{parameter}"

    if not average:
        assert loaded == f"{weights}.{parameter}"
    else:
        assert loaded == (None if weights == "model" else expected)
    assert loaded is None or stored_name(loaded, average=average) == f"{weights}.{parameter}"
