import torch

from apt_kernels import sup_con_loss

features = torch.randn(8, 32, requires_grad=True)
labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
loss = sup_con_loss(features, labels)
loss.backward()
