"""A script of a user, which mypy checks against the installed wheel: the names of titan_cpt have types."""

import titan_cpt

config = titan_cpt.load_config({"job": {"name": "typed"}}, {"job.seed": 1})
tokens: int = titan_cpt.make_plan(config, world_size=1).step_tokens
version: str = titan_cpt.__version__

with titan_cpt.Trainer(config, quiet=True) as trainer:
    for step in trainer.steps():
        loss: float = step.loss
        if loss < 1.0:
            trainer.stop()
    finished: bool = trainer.run()

vocabulary: int = titan_cpt.open_checkpoint(trainer.folder / "stage" / "step-00000001").tokenizer.vocab_size
error: type[Exception] = titan_cpt.TitanError
