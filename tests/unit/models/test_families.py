"""One folder per model family: four files with the same names, and no other module knows a family."""

import ast

import pytest

from titan_cpt.config.model import ModelConfig
from titan_cpt.errors import ConfigError
from titan_cpt.models.registry import FAMILIES, SIZES, SPECS, family_module
from unit.test_architecture import FILES, ROOT, TREES, imported

PARTS = {"model", "spec", "parallelize", "huggingface"}
FOLDERS = {path.name: path for path in (ROOT / "models").iterdir() if (path / "model.py").is_file()}


def names_of(family):
    """The classes that a family's modules define."""
    trees = [TREES[f"models.{family}.{part}"] for part in PARTS]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def test_every_family_has_a_folder_and_every_folder_is_a_family():
    """The registry, the folders, and the values of model.family in a config are the same."""
    assert set(FOLDERS) == set(FAMILIES)
    assert ModelConfig.model_fields["family"].metadata[0].names == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_folder_has_exactly_four_files(family):
    """model.py, spec.py, parallelize.py, huggingface.py, and the empty __init__.py."""
    files = {path.name for path in FOLDERS[family].iterdir() if path.name != "__pycache__"}

    assert files == {f"{part}.py" for part in PARTS} | {"__init__.py"}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_module_outside_the_families_names_the_familys_classes(family):
    """Nor imports its modules: everything else goes through the spec, the model, or the registry.

    A family may be built from another one, as SmolLM3 is from Llama. The readers of other trainers' checkpoints know
    which of our weights are which of theirs.
    """
    inside = {f"models.{family}.{part}" for part in PARTS}
    families = {f"models.{one}.{part}" for one in FAMILIES for part in PARTS}
    readers = "checkpoint.other_trainers."
    others = {name: tree for name, tree in TREES.items() if name not in families and not name.startswith(readers)}
    classes = names_of(family) - {"Block", "Attention", "MLP"}  # each family has these
    users = {
        f"{name}: {node.id}"
        for name, tree in others.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in classes
    }
    importers = {name for name, tree in others.items() if {f"titan_cpt.{one}" for one in inside} & {*imported(tree)}}

    assert users == set()
    assert importers == set()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("models.") and name.endswith(".model")])
def test_a_model_knows_no_parallelism(name):
    """It imports nothing of torch.distributed or titan_cpt.distributed."""
    assert [one for one in imported(TREES[name]) if "distributed" in one] == []


def test_a_familys_specs_are_registered():
    """Each family has named sizes, and builds specs of its own class."""
    assert all(SIZES.values())
    assert all(SPECS[family] is family_module(family, "spec").SPEC for family in FAMILIES)


def test_an_unknown_family_is_refused():
    """The message lists the families."""
    allowed = ", ".join(FAMILIES)
    with pytest.raises(ConfigError, match=rf"unknown family 'lama'; did you mean 'llama'\? Allowed: {allowed}"):
        family_module("lama", "model")
