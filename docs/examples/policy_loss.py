import torch

from apt_kernels import policy_loss

logps = torch.full((2, 4), -1.0, requires_grad=True)  # of 2 responses of 4 tokens
advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 4)
loss, metrics = policy_loss(logps, logps.detach(), advantages, mask, clip_high=0.28)
loss.backward()
assert metrics["clip_fraction"] == 0
