"""The tables [[stages]]: optional keys are unset by default."""

from config_texts import LR, with_stage

from titan_cpt.config.load import load_config


def test_a_stage_without_optional_keys_leaves_them_unset(head, write):
    """Only steps or tokens, a dataset and a learning rate are needed."""
    stage = load_config(write(with_stage(head, f'dataset = "pile"\nsteps = 1\n{LR}'))).stages[0]

    assert stage.model_dump(exclude_none=True).keys() == {"name", "dataset", "steps", "optimizer_state", "lr"}
