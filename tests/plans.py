"""Pieces of TOML for tests of the plan, and the sequences that a plan draws."""

import io

from rich.console import Console

from titan_cpt.planning.plan_text import print_plan

COSINE = 'schedule = "cosine", max = 1e-3, min = 1e-4'
INFINITE = 'schedule = "infinite_cosine", max = 1e-3, constant = 5e-4, cooldown_until = 0.6, constant_until = 0.85'
SPLITS = ("pile", "split1", "split2", "split3")

# Eight layers of six heads on one dataset that need not exist: for rules of parallel layouts.
PARALLEL_TOML = """
[job]
name = "laid-out"
[model]
family = "gpt_neox"
size = "debug"
layers = 8
width = 96
heads = 6
[datasets.pages]
train = "pages"
[training]
global_batch_size = 48
local_batch_size = 8
seq_len = 48
[[stages]]
name = "only"
dataset = "pages"
steps = 2
lr = { schedule = "constant", max = 1e-3 }
"""
TP, PP, CP = (f"parallelism.{name}_parallel_degree" for name in ("tensor", "pipeline", "context"))
RING = "parallelism.context_parallel_method"
ASYNC = "parallelism.enable_async_tensor_parallel"

SLIMPAJAMA = {
    "wikipedia": 4.00,
    "book": 4.20,
    "c4": 26.69,
    "stackexchange": 3.37,
    "github": 5.22,
    "commoncrawl": 52.09,
    "arxiv": 4.43,
}


PAPER = {"= 20\n": "= 1104\n", "local_batch_size = 2": "local_batch_size = 4", "= 16\n": "= 2048\n"}


def paper_batch(head):
    """The config with the batch of the paper: 1104 sequences of 2048 tokens."""
    for old, new in PAPER.items():
        head = head.replace(old, new)
    return head


def text_of(plan):
    """The plan as it is printed, as one line."""
    console = Console(file=io.StringIO(), width=120)
    print_plan(plan, console, keep_latest_k=1)
    return " ".join(console.file.getvalue().split())


def stage(name, dataset, budget, lr=COSINE, **more):
    """One [[stages]] table; `more` is TOML by key."""
    dataset = dataset if dataset.startswith("{") else f'"{dataset}"'
    budget = f'tokens = "{budget}"' if isinstance(budget, str) else f"steps = {budget}"
    lines = [f'name = "{name}"', f"dataset = {dataset}", budget, f"lr = {{ {lr} }}"]
    return "\n[[stages]]\n" + "\n".join(lines + [f"{key} = {value}" for key, value in more.items()]) + "\n"


def datasets(*names):
    """[datasets] tables with these names."""
    return "".join(f'\n[datasets.{name}]\ntrain = "{name}"\nvalidation = "{name}-validation"\n' for name in names)


def drawn(plan, name):
    """The draws of all steps of a stage, in order."""
    stage = plan.stage(name)
    return [draw for step in range(stage.steps) for draw in plan.batch(stage, step)]


def ordinals(plan, name, source, *, replayed):
    """The ordinals that a stage draws from a source, as new data or as replay."""
    return [draw.ordinal for draw in drawn(plan, name) if (draw.source, draw.replayed) == (source, replayed)]
