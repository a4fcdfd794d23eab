"""Pieces of TOML that tests of the plan are written with, and what a plan draws."""

COSINE = 'schedule = "cosine", max = 1e-3, min = 1e-4'
INFINITE = 'schedule = "infinite_cosine", max = 1e-3, constant = 5e-4, cooldown_until = 0.6, constant_until = 0.85'
SPLITS = ("pile", "split1", "split2", "split3")

SLIMPAJAMA = {
    "wikipedia": 4.00,
    "book": 4.20,
    "c4": 26.69,
    "stackexchange": 3.37,
    "github": 5.22,
    "commoncrawl": 52.09,
    "arxiv": 4.43,
}


def stage(name, dataset, budget, lr=COSINE, **more):
    """One [[stages]] table; `more` is TOML by key."""
    dataset = dataset if dataset.startswith("{") else f'"{dataset}"'
    budget = f'tokens = "{budget}"' if isinstance(budget, str) else f"steps = {budget}"
    lines = [f'name = "{name}"', f"dataset = {dataset}", budget, f"lr = {{ {lr} }}"]
    return "\n[[stages]]\n" + "\n".join(lines + [f"{key} = {value}" for key, value in more.items()]) + "\n"


def datasets(*names):
    return "".join(f'\n[datasets.{name}]\ntrain = "{name}"\nvalidation = "{name}-validation"\n' for name in names)


def drawn(plan, name):
    """All draws of a stage, in order."""
    stage = plan.stage(name)
    return [draw for step in range(stage.steps) for draw in plan.batch(stage, step)]


def ordinals(plan, name, source, *, replayed):
    return [draw.ordinal for draw in drawn(plan, name) if (draw.source, draw.replayed) == (source, replayed)]
