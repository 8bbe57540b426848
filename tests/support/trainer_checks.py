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
