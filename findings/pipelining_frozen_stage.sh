#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: a first stage without trained weights, and a schedule that splits backward.
#
# The first stage's output needs no gradient, so the next stage's input has none. The part of the backward pass that
# computes gradients of inputs then records nothing for the part that computes gradients of weights, and the next
# stage's weights get no gradient. No error and no warning. 1F1B gives them the right one. With requires_grad_() on the
# first stage's output both are right.
#
# Output seen (2 processes, gloo):
#   Schedule1F1B: the second stage's gradient is as without a pipeline
#   ScheduleInterleavedZeroBubble: the second stage has no gradient
#   ScheduleInterleavedZeroBubble with requires_grad_(): the second stage's gradient is as without a pipeline
#
# Installs into a temporary folder. Exit status 0 if the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-input numpy "torch==2.13.0" --extra-index-url https://download.pytorch.org/whl/cpu
cat > "$folder/stages.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleavedZeroBubble


class Stage(nn.Linear):
    marks = False

    def forward(self, x):
        y = super().forward(x)
        return y.requires_grad_() if self.marks and torch.is_grad_enabled() and not y.requires_grad else y


def gradient(schedule, marks):
    """Of the second of two stages, of which the first is frozen, on rank 1; and the one without a pipeline."""
    torch.manual_seed(0)
    stages = [Stage(4, 4), Stage(4, 4)]
    stages[0].requires_grad_(False)
    stages[0].marks = marks
    x, target = torch.randn(4, 4), torch.randn(4, 4)
    expected = torch.autograd.grad((stages[1](stages[0](x)) - target).square().sum(), stages[1].weight)[0]
    rank = dist.get_rank()
    stage = PipelineStage(stages[rank], rank, 2, torch.device("cpu"))
    single = schedule is Schedule1F1B
    runner = schedule(
        stage if single else [stage],
        n_microbatches=2,
        loss_fn=lambda y, t: (y - t).square().sum(),
        scale_grads=False,
    )
    runner.step(*((x,) if rank == 0 else ()), target=target if rank == 1 else None)
    return stages[1].weight.grad, expected


dist.init_process_group("gloo")
for schedule, marks, right in (
    (Schedule1F1B, False, True),
    (ScheduleInterleavedZeroBubble, False, False),
    (ScheduleInterleavedZeroBubble, True, True),
):
    found, expected = gradient(schedule, marks)
    if dist.get_rank() == 1:
        what = "the second stage's gradient is as without a pipeline" if right else "the second stage has no gradient"
        print(f"{schedule.__name__}{' with requires_grad_()' if marks else ''}: {what}", flush=True)
        assert torch.allclose(found, expected) if right else found is None
    dist.barrier()
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node=2 "$folder/stages.py"
