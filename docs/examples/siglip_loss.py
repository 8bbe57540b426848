import torch

from apt_kernels import siglip_loss

images, texts = torch.randn(8, 32, requires_grad=True), torch.randn(8, 32)
loss = siglip_loss(images, texts)
loss.backward()
