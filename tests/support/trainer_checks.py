"""What the tests of every trainer compare."""

import torch


def assert_same_parameters(module, expected, tolerance=0.0):
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), expected[name], rtol=tolerance, atol=tolerance, msg=name
        )


def shifted_left(ids, mask, extra=0):
    """The same rows, padded on the left to `extra` columns more, with other padding."""
    padded = torch.full((len(ids), ids.shape[1] + extra), 5)
    new_mask = torch.zeros_like(padded)
    for row, (tokens, real) in enumerate(zip(ids, mask, strict=True)):
        tokens = tokens[real.bool()]
        padded[row, len(padded[row]) - len(tokens) :] = tokens
        new_mask[row, len(padded[row]) - len(tokens) :] = 1
    return padded, new_mask


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def decayed(parameters, weight_decay):
    """Groups of an optimizer: weight decay for matrices alone, as the trainers make them."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]  # fmt: skip
