"""Texts of configs with one stage, for tests of titan_cpt.config."""

LR = 'lr = { schedule = "cosine", max = 1e-3, min = 1e-4 }'


def with_stage(head, stage):
    """The head of a config, and a stage `first` with these lines."""
    return f'{head}\n[[stages]]\nname = "first"\n{stage}\n'


def with_lr(head, lr):
    """The head of a config, and a stage of 100 steps whose LR table has these entries."""
    return with_stage(head, f'dataset = "pile"\nsteps = 100\nlr = {{ {lr} }}')
