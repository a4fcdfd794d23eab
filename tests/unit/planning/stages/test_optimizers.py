"""The optimizer of each stage: its settings, its keys of the recipe, and what is refused or noted."""

import pytest

from titan_cpt.config.load import load_config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.errors import PlanError
from titan_cpt.planning.plan import MuonHyperparameters
from titan_cpt.planning.planner import make_plan

MUON = ("optimizer.name", "Muon")
SECOND_MUON = ("stages.second.optimizer.name", "Muon")
RESET = ("stages.second.optimizer_state", "reset")


@pytest.fixture
def plan(two_stages, write):
    """plan(*overrides): the plan of pile -> german."""

    def plan(*overrides):
        config = load_config(write(two_stages), overrides)
        return make_plan(config, DataInventory({"pile": 10**6, "german": 10**6}, 257))

    return plan


def test_a_stage_has_muons_settings_of_both_tables(plan):
    """Its own ones before those of [optimizer]; the other stage has AdamW."""
    first, second = plan(
        SECOND_MUON, RESET, ("optimizer.momentum", "0.9"), ("stages.second.optimizer.ns_steps", "6")
    ).stages

    assert (first.optimizer.name, first.optimizer.muon) == ("AdamW", None)
    assert (second.optimizer.name, second.optimizer.muon) == (
        "Muon",
        MuonHyperparameters(0.9, nesterov=True, ns_steps=6, adjust_lr="match_rms_adamw"),
    )


def test_only_a_stage_with_muon_has_its_keys_in_the_recipe(plan):
    """Recipes of AdamW stay as they were, so old checkpoints resume; a changed setting of Muon changes the recipe."""
    adamw, muon = plan().stages[0].recipe, plan(MUON).stages[0].recipe

    assert {name: value for name, value in muon.items() if name not in adamw} == {
        "optimizer.name": "Muon",
        "optimizer.momentum": 0.95,
        "optimizer.nesterov": True,
        "optimizer.ns_steps": 5,
        "optimizer.adjust_lr": "match_rms_adamw",
    }
    assert {name: value for name, value in muon.items() if name in adamw} == adamw
    assert plan(MUON, ("optimizer.adjust_lr", "original")).stages[0].recipe["optimizer.adjust_lr"] == "original"


def test_the_state_of_another_optimizer_cannot_be_kept(plan):
    """Refused with both names; reset, and equal optimizers, are allowed."""
    with pytest.raises(PlanError) as refused:
        plan(SECOND_MUON, ("stages.second.optimizer_state", "keep"))

    assert (
        'stages.second.optimizer_state: "keep" needs the state of Muon, which trains this stage, and stage '
        "'first' has that of AdamW: set stages.second.optimizer.name to 'AdamW', or give the stage optimizer_state = "
        '"reset"'
    ) in str(refused.value)
    assert plan(MUON, ("stages.second.optimizer_state", "keep")).stages[1].keep_optimizer


def test_a_change_of_the_optimizer_within_the_run_is_noted(plan):
    """In both directions; without a change there is no note."""
    notes = [note for note in plan(SECOND_MUON, RESET).notes if "optimizer" in note]
    back = [note for note in plan(MUON, RESET, ("stages.second.optimizer.name", "AdamW")).notes if "optimizer" in note]

    assert len(notes) == len(back) == 1
    assert notes[0].startswith("stages.second.optimizer: its initial weights were trained with AdamW, and Muon trains")
    assert back[0].startswith("stages.second.optimizer: its initial weights were trained with Muon, and AdamW trains")
    assert not [note for note in plan(MUON).notes if "optimizer" in note]


def test_settings_of_muon_that_nothing_uses_are_refused(plan):
    """Of the run, and of a stage; a default that is written out is not a setting."""
    with pytest.raises(PlanError) as refused:
        plan(("optimizer.momentum", "0.9"), ("stages.second.optimizer.nesterov", "false"))

    assert "optimizer.momentum: is of Muon, and AdamW trains every stage: remove it, or set optimizer" in str(
        refused.value
    )
    assert "stages.second.optimizer.nesterov: is of Muon, and AdamW trains this stage" in str(refused.value)
    plan(("optimizer.momentum", "0.95"))


@pytest.mark.parametrize(
    "setting", [("optimizer.implementation", "triton"), ("training.cuda_graphs", "true")], ids=lambda pair: pair[0]
)
def test_muon_with_kernels_of_adamw_is_refused(plan, setting):
    """In any stage, with one message; AdamW is not."""
    with pytest.raises(PlanError) as refused:
        plan(SECOND_MUON, RESET, setting)

    assert str(refused.value).count("Muon is not supported together with") == 1
    plan(setting)


def test_checkpoints_of_muon_take_four_bytes_less_for_each_weight_of_a_block(plan):
    """By hand: 12 bytes per parameter with AdamW, 8 for the matrices of Muon's stages."""
    adamw, both = plan(), plan(SECOND_MUON, RESET)
    block = sum(rows * columns for _, (rows, *rest), _ in adamw.spec.block_parameters() for columns in rest)
    kept = 1 + (both.stages[1].pre_anneal_step is not None)

    assert adamw.disk_bytes(2) - both.disk_bytes(2) == 4 * kept * adamw.spec.layers * block
