"""AdamW hyperparameters of a stage; test_plan_fingerprint.py has the keys of the recipe."""

from titan_cpt.planning.plan import OptimizerHyperparameters


def test_optimizer_hyperparameters_can_change_in_a_stage(two_stages, make):
    """Keys that [stages.optimizer] does not have are those of [optimizer]; "keep" keeps the optimizer state."""
    plan = make(
        two_stages,
        ("optimizer.eps", "1e-6"),
        ("stages.second.optimizer.beta2", "0.99"),
        ("stages.second.optimizer.weight_decay", "0"),
        ("stages.second.optimizer_state", "keep"),
    )

    assert [stage.optimizer for stage in plan.stages] == [
        OptimizerHyperparameters((0.9, 0.95), 1e-6, 0.1),
        OptimizerHyperparameters((0.9, 0.99), 1e-6, 0.0),
    ]
    assert [stage.keep_optimizer for stage in plan.stages] == [False, True]
