import torch

from apt_kernels import bradley_terry_loss

chosen = torch.tensor([1.0, 0.2], requires_grad=True)  # scores of a reward model
rejected = torch.tensor([0.5, 0.4], requires_grad=True)
loss = bradley_terry_loss(chosen, rejected, margin=0.1)
loss.backward()
assert (chosen.grad < 0).all()
