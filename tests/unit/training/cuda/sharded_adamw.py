"""Run by test_adamw.py under torchrun: AdamW's Triton kernel on FSDP2 shards against one process's torch AdamW."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from titan_cpt.training.optimization.adamw import build_adamw
from titan_cpt.training.optimization.update import UpdateGuard, clip_grad_norm

NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Layers(nn.Module):
    """Rows that two ranks share unevenly, one row that only rank 0 has, and gradients that are not aligned."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 3)
        self.second = nn.Linear(3, 1)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole = Layers()
    model = Layers()
    model.load_state_dict(whole.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.set_force_sum_reduction_for_comms(True)
    optimizer, expected = build_adamw(model, triton=True, **NUMBERS), build_adamw(whole, **NUMBERS)
    UpdateGuard(optimizer)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for each, each_optimizer in ((model, optimizer), (whole, expected)):
            each(x).sum().backward()
            clip_grad_norm(each, 0.1, optimizer=each_optimizer)
            each_optimizer.step()
            each_optimizer.zero_grad(set_to_none=True)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-5, atol=1e-6)
        assert optimizer.state[ours]["step"].item() == 3
    print("equal to one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
