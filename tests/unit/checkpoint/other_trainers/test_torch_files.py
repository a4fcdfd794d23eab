"""Files of torch.save with objects of other projects: values are read, classes and functions are never called."""

import argparse
import collections
import contextlib
import enum
import os
import random

import numpy as np
import pytest
import torch

from titan_cpt.checkpoint.other_trainers.torch_files import attributes, load_torch_file, plain_number
from titan_cpt.errors import CheckpointError


class Kind(enum.Enum):
    """An enum of another project."""

    one = 1


class _Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value",
    [Kind.one, np.float32(2.0), np.arange(3), np.random.get_state(), random.getstate(), frozenset([1]), slice(1, 2)],
    ids=["enum", "numpy scalar", "array", "numpy random state", "random state", "set", "slice"],
)
def test_objects_beside_the_tensors_do_not_hinder_reading(value, tmp_path):
    """Whatever they are, the plain values and tensors of the file are there."""
    stored = argparse.Namespace(number=3, other=value, steps=collections.defaultdict(list, a=[1]))
    torch.save({"args": stored, "weight": torch.arange(3.0)}, tmp_path / "file.pt")
    content = load_torch_file(tmp_path / "file.pt")

    assert attributes(content["args"])["number"] == 3
    assert attributes(content["args"])["steps"] == {"a": [1]}
    assert content["weight"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "function", [os.system, os.mkdir, eval, exec, open, torch.load, __import__], ids=lambda each: each.__name__
)
def test_functions_that_a_file_names_are_not_called(function, tmp_path):
    """They become inert records, or the file is refused."""
    torch.save({"args": _Calls(function, str(tmp_path / "made")), "step": 3}, tmp_path / "file.pt")
    with contextlib.suppress(CheckpointError):
        load_torch_file(tmp_path / "file.pt")

    assert not (tmp_path / "made").exists()


def test_what_is_no_such_file_is_refused(tmp_path):
    """A missing file, one of another format, and one that ends too early."""
    torch.save({"weight": torch.arange(300.0)}, tmp_path / "whole.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:700])
    (tmp_path / "text.pt").write_text("weights")

    for name, message in (("none", "is missing"), ("text", "is not a file of torch.save"), ("short", "cannot be read")):
        with pytest.raises(CheckpointError, match=rf"{name}.pt: {message}"):
            load_torch_file(tmp_path / f"{name}.pt")


def test_numbers_are_read_from_tensors_and_nothing_else():
    """None for texts, flags and tensors of several elements."""
    found = [plain_number(value) for value in (3, 0.5, torch.tensor(2.0), "3", True, torch.ones(2), None)]

    assert found == [3, 0.5, 2.0, None, None, None, None]
