"""A small module with gradients made from a seed, and the bits of its weights and optimizer state."""

import torch
from torch import nn

NUMBERS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Small(nn.Module):
    """A matrix and a vector."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def everything(model, optimizer):
    """Weights, moments and step counts, copied."""
    tensors = [parameter.detach() for parameter in model.parameters()]
    for parameter in model.parameters():
        tensors += optimizer.state[parameter].values()
    return [tensor.clone() for tensor in tensors]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
