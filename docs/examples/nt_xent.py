import torch

from apt_kernels import nt_xent

z1, z2 = torch.randn(8, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
loss = nt_xent(z1, z2, temperature=0.2)  # two views of 8 images
loss.backward()
