import torch

from apt_kernels import value_loss

values = torch.zeros(2, 4, requires_grad=True)
returns, mask = torch.ones(2, 4), torch.ones(2, 4)
loss, metrics = value_loss(values, returns, mask)
loss.backward()
assert loss.item() == 0.5  # (0 - 1)^2 / 2
