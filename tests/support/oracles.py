"""What the tests of the reference share: leaves, gradients and spoiled inputs."""

import math

import torch

DPO_TYPES = [
    "sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "kto_pair", "aot", "aot_unpaired", "sigmoid_norm",
    "simpo", "orpo",
]  # fmt: skip
GARBAGE = (math.nan, math.inf, -math.inf)


def randn(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def leaf(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradients(output, *inputs):
    return torch.autograd.grad(output, inputs, allow_unused=True, retain_graph=True)


def spoil(values, mask):
    """A float32 leaf whose slots that do not count hold NaN and infinities."""
    spoiled = values.detach().clone().float()
    spots = (~mask).nonzero()
    for i, spot in enumerate(spots):
        spoiled[tuple(spot)] = GARBAGE[i % 3]
    return spoiled.requires_grad_()
